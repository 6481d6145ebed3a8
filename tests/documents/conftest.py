"""What a page registers is forgotten after its test: other tests count what is registered."""

from __future__ import annotations

import pytest

from training_hub import AlgorithmRegistry


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AlgorithmRegistry, "_algorithms", dict(AlgorithmRegistry._algorithms))
    backends = {name: dict(classes) for name, classes in AlgorithmRegistry._backends.items()}
    monkeypatch.setattr(AlgorithmRegistry, "_backends", backends)
