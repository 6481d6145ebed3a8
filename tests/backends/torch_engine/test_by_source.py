"""Names under which the loss of each source is reported."""

from __future__ import annotations

from training_hub.backends.shared.sources import metric_names


def test_names_are_short_and_told_apart() -> None:
    found = metric_names(["data/a/chat.jsonl", "data/b/chat.jsonl", "math/*.jsonl", "owner/set[train]"])
    assert found == [
        "source_loss/chat.jsonl-1",
        "source_loss/chat.jsonl-2",
        "source_loss/.jsonl",
        "source_loss/set-train",
    ]
