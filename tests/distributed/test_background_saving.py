"""Several processes write a checkpoint while they train: it has the bits of one that they wait for, and is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.crew import Crew
from training_hub.folders import damage, manifest

LAYOUTS: dict[str, dict[str, Any]] = {
    "replicas": {},
    "slices": {"data_parallel_shard_degree": -1},
    "split": {"tensor_parallel_degree": 2},
}
TRAINING = {"steps": 4, "global_batch_size": 4, "preflight": False}


def train(two: Crew, model: Path, data: Path, output: Path, order: Any = None, /, **sections: Any) -> Any:
    settings = {"training": TRAINING, **sections}
    return two.train(model, data, output, order, **settings)


def saving(mode: str, **more: Any) -> dict[str, Any]:
    return {"interval": 1, "keep_last": None, "final": False, "async_mode": mode, **more}


def whole(output: Path) -> dict[str, Any]:
    """By step and file what the manifests say of tensors; nothing is half written."""
    folders = sorted((output / "checkpoints").iterdir())
    assert not [line for folder in folders for line in damage(folder)]
    return {
        folder.name: {name: facts for name, facts in manifest(folder)["files"].items() if name.endswith("safetensors")}
        for folder in folders
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_step_is_saved_with_the_bits_that_it_had(layout, two, tiny_model_folder, chat_file, tmp_path):
    saved = {}
    for mode in ("disabled", "async_with_pinned_mem"):
        ended = train(
            two, tiny_model_folder, chat_file, tmp_path / mode,
            checkpoint=saving(mode), parallelism=LAYOUTS[layout],
        )  # fmt: skip
        assert [each.get("status") for each in ended] == ["finished"] * 2, ended
        saved[mode] = whole(tmp_path / mode)
    assert list(saved["disabled"]) == [f"step-{step}" for step in (1, 2, 3, 4)]
    assert saved["disabled"] == saved["async_with_pinned_mem"]


def test_a_signal_in_a_save_waits_for_it_and_any_layout_goes_on(two, tiny_model_folder, chat_file, tmp_path):
    settings = {"checkpoint": saving("async"), "parallelism": LAYOUTS["slices"]}
    ended = train(two, tiny_model_folder, chat_file, tmp_path, {"signalled_in_save": 1, "step": 1}, **settings)
    assert [each.get("error") for each in ended] == ["Interrupted"] * 2, ended
    assert whole(tmp_path)
    ended = train(two, tiny_model_folder, chat_file, tmp_path, checkpoint=saving("async"))
    assert [each.get("status") for each in ended] == ["finished"] * 2, ended
    assert [row["step"] for row in ended[0]["history"]] == [1, 2, 3, 4]


@pytest.mark.parametrize("rank", [0, 1])
def test_pieces_that_a_rank_cannot_write_end_the_run_and_leave_the_step_before(
    rank, two, tiny_model_folder, chat_file, tmp_path
):
    settings = {"checkpoint": saving("async"), "parallelism": LAYOUTS["slices"]}
    ended = train(two, tiny_model_folder, chat_file, tmp_path, {"limited": rank, "step": 1}, **settings)
    assert ended[0]["error"] == "DiskError", ended
    assert f"rank {rank}" in (said := " ".join(ended[0]["problems"])) and "could not be written" in said
    assert ended[1]["error"] == "LaunchError" and "rank 0 failed at" in " ".join(ended[1]["problems"])
    assert "step-4" not in whole(tmp_path) and "step-1" in whole(tmp_path)
