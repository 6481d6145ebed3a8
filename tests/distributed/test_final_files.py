"""The final model of a divided one: written by all processes in files of a stated size, and read by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.test_equal_numbers import SGD, STEPS, apart
from tests.invariants.run import train
from tests.invariants.test_families import folder_of
from training_hub.folders import damage

LAYOUTS = {
    "slices": {"data_parallel_shard_degree": -1},
    "split": {"tensor_parallel_degree": 2},
}
CASES = [
    ("llama", "slices"),
    ("llama", "split"),
    ("llama-tied", "slices"),
    ("mixtral", "slices"),
    ("qwen3-moe", "slices"),
]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_the_files_of_all_processes_are_the_model_that_one_writes(
    family, layout, two, tiny_model_folder, uneven_file, tmp_path
):
    model = folder_of(family, tiny_model_folder, tmp_path / "model")
    settings = {
        "model": {"save_dtype": "bfloat16"},
        "training": {**STEPS, "steps": 2},
        "optimizer": SGD,
        "checkpoint": {"max_shard_size": "20KB"},
    }
    ended = two.train(model, uneven_file, tmp_path / "together", **settings, parallelism=LAYOUTS[layout])
    assert [each.get("status") for each in ended] == ["finished"] * 2, ended
    alone = train(model, uneven_file, tmp_path / "alone", **settings)
    final, wanted = Path(ended[0]["model_path"]), alone.model_path
    assert not damage(final)
    assert {path.name for path in final.iterdir() if not path.name.startswith("model-")} == {
        path.name for path in wanted.iterdir() if not path.name.startswith("model-")
    }
    assert len(list(final.glob("model-*-of-*.safetensors"))) > 2
    ours, theirs = (json.loads((one / "model.safetensors.index.json").read_text()) for one in (final, wanted))
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert ours["metadata"] == theirs["metadata"]
    loaded, report = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not any(report.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    other = AutoModelForCausalLM.from_pretrained(wanted)
    assert loaded.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits, so that sums in another order may round to the next number.
    assert apart(loaded.state_dict(), other.state_dict()) <= 2**-8
    assert json.loads((final / "config.json").read_text()) == json.loads((wanted / "config.json").read_text())


def test_what_nothing_has_moved_is_written_as_it_came(two, tiny_model_folder, uneven_file, tmp_path):
    """Computed in bfloat16, which holds few of the tiny model's float32 numbers; such a rate moves none of them."""
    settings = {
        "model": {"dtype": "bfloat16"},
        "training": {**STEPS, "steps": 2},
        "optimizer": {"lr": 1e-30},
        "freezing": {"blocks": 1},
        "checkpoint": {"max_shard_size": "40KB"},
        "parallelism": LAYOUTS["slices"],
    }
    ended = two.train(tiny_model_folder, uneven_file, tmp_path / "together", **settings)
    assert [each.get("status") for each in ended] == ["finished"] * 2, ended
    final, base = (AutoModelForCausalLM.from_pretrained(one) for one in (ended[0]["model_path"], tiny_model_folder))
    assert apart(final.state_dict(), base.state_dict()) == 0
