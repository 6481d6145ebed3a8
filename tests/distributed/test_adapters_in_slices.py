"""An adapter is put beside a base that no process holds: it begins and learns as beside a whole one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.test_equal_numbers import SGD, STEPS
from tests.invariants.run import recipe
from training_hub.backends.torch_engine.adaptations.lora import Lora

SLICES = {"data_parallel_shard_degree": -1}
HEADS = {"tensor_parallel_degree": 2}
STAGES = {"pipeline_parallel_degree": 2}
LORA = {"r": 4, "dropout": 0.0}
TABLES = {**LORA, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}
BY_COLUMNS = {**LORA, "tuner": "rslora", "options": {"init_lora_weights": "gaussian"}}
NOT_ZERO = {**LORA, "options": {"init_lora_weights": False}}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "slices": ("llama", SLICES, {"lora": NOT_ZERO}),
    "slices, in 16 bits": ("llama-tied", SLICES, {"lora": BY_COLUMNS, "model": {"dtype": "bfloat16"}}),
    "slices of tables": ("llama", SLICES, {"lora": TABLES}),
    "slices of experts": ("qwen3-moe", SLICES, {"lora": LORA}),
    "heads": ("llama", HEADS, {"lora": BY_COLUMNS}),
    "stages": ("llama-tied", STAGES, {"lora": NOT_ZERO}),
}

QUICK = ("slices, in 16 bits", "heads", "stages")


def settings_of(parallelism: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    return {"algorithm": "lora_sft", "training": STEPS, "optimizer": SGD, "parallelism": parallelism, **sections}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in CASES]
)
def test_an_adapter_begins_as_beside_a_whole_base(case, two, folders, chat_file, tmp_path):
    """Bit for bit; and how far that is from the base, in a digit, is found in pieces as well."""
    family, parallelism, sections = CASES[case]
    model, settings = folders(family, num_hidden_layers=4), settings_of(parallelism, sections)
    asked = recipe(model, chat_file, tmp_path / "run", **settings)
    for each in two.call("tests.distributed.measuring:adapter_begun", asked.model_dump(mode="json")):
        assert each["read"] == "slices"
        assert each["unlike"] == [] and each["trained"] > 4
        found, wanted = each["differences"]
        assert found == pytest.approx(wanted, rel=0.11, abs=1e-3)


WHOLE: dict[str, dict[str, Any]] = {
    "use_dora": {"lora": {"tuner": "dora"}},
    "init_lora_weights": {"lora": {"tuner": "pissa"}},
    "an adapter of IA3": {"lora": {"tuner": "ia3"}},
    "modules_to_save": {"lora": {"modules_to_save": ["lm_head"]}},
    "rows of a table": {"lora": {"trainable_tokens": [5]}},
}


@pytest.mark.parametrize("words", WHOLE)
def test_what_is_made_of_whole_weights_says_why(words, tmp_path):
    asked = recipe(tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "out", algorithm="lora_sft", **WHOLE[words])
    assert words in Lora(asked).begins_beside()
