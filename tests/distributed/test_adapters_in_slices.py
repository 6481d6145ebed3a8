"""An adapter is put beside a base that no process holds: it begins and learns as beside a whole one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.test_equal_numbers import SGD, STEPS, same_steps
from tests.distributed.test_pipeline_adapters import same_adapter
from tests.invariants.run import recipe, train
from training_hub.backends.torch_engine.adaptations.lora import Lora

SLICES = {"data_parallel_shard_degree": -1}
HEADS = {"tensor_parallel_degree": 2}
STAGES = {"pipeline_parallel_degree": 2}
LORA = {"r": 4, "dropout": 0.0}
TABLES = {**LORA, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}
BY_COLUMNS = {**LORA, "tuner": "rslora", "options": {"init_lora_weights": "gaussian"}}
SIXTEEN = {"model": {"dtype": "bfloat16"}}
LOW = {"quantization": "int4"}
DRAWN = {**LORA, "options": {"init_lora_weights": "pissa_niter_4"}}
NOT_ZERO = {**LORA, "options": {"init_lora_weights": False}}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "slices": ("llama", SLICES, {"lora": NOT_ZERO}),
    "slices, in 16 bits": ("llama-tied", SLICES, {"lora": BY_COLUMNS, **SIXTEEN}),
    "slices of tables": ("llama", SLICES, {"lora": TABLES}),
    "slices of experts": ("qwen3-moe", SLICES, {"lora": LORA}),
    "heads": ("llama", HEADS, {"lora": BY_COLUMNS}),
    "stages": ("llama-tied", STAGES, {"lora": NOT_ZERO}),
    "lengths of rows": ("llama", SLICES, {"lora": {**LORA, "tuner": "dora"}, **SIXTEEN}),
    "lengths of rows of bytes": (
        "llama",
        SLICES,
        {"lora": {**LORA, "tuner": "dora"}, "model": {"quantization": "int4"}},
    ),
    "a head beside bytes": (
        "llama",
        SLICES,
        {"lora": {**LORA, "modules_to_save": ["lm_head"]}, "model": {"quantization": "int8", "dtype": "bfloat16"}},
    ),
    "lengths of rows, in stages": ("llama", STAGES, {"lora": {**LORA, "tuner": "dora"}}),
    "a part of the weights": ("llama", SLICES, {"lora": {**LORA, "tuner": "pissa"}}),
    "a part of the weights, drawn": ("llama-tied", SLICES, {"lora": DRAWN, **SIXTEEN}),
    "a part of the weights, in stages": ("llama", STAGES, {"lora": {**LORA, "tuner": "olora"}}),
    "whole modules": ("llama", SLICES, {"lora": {**LORA, "modules_to_save": ["lm_head"]}, **SIXTEEN}),
    "whole modules, in stages": ("llama", STAGES, {"lora": {**LORA, "modules_to_save": ["lm_head"]}}),
    "rows of a table": ("llama", SLICES, {"lora": {**LORA, "trainable_tokens": [43, 86]}}),
    "whole modules beside ranks that are shared out": (
        "llama",
        SLICES,
        {"lora": {"tuner": "adalora", "r": 4, "modules_to_save": ["lm_head"]}, **SIXTEEN},
    ),
    "norms": ("llama", SLICES, {"lora": {"tuner": "ln_tuning"}, **SIXTEEN}),
    **{
        f"an adapter of {tuner}": ("llama", SLICES, {"lora": {"tuner": tuner, "r": 4}})
        for tuner in ("adalora", "deft", "delora", "psoft", "supertuning", "loha")
    },
}

PROVEN = {**STEPS, "preflight": True}
QUICK = (
    *("slices, in 16 bits", "heads", "stages", "lengths of rows", "a part of the weights", "whole modules"),
    *("rows of a table", "an adapter of delora"),
)


def settings_of(parallelism: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    return {"algorithm": "lora_sft", "training": STEPS, "optimizer": SGD, "parallelism": parallelism, **sections}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in CASES]
)
def test_an_adapter_begins_as_beside_a_whole_base(case, two, folders, chat_file, tmp_path):
    """Bit for bit; and how far that is from the base is found in pieces as well, in a digit."""
    family, parallelism, sections = CASES[case]
    model, settings = folders(family, num_hidden_layers=4), settings_of(parallelism, sections)
    asked = recipe(model, chat_file, tmp_path / "run", **settings)
    for each in two.call("tests.distributed.measuring:adapter_begun", asked.model_dump(mode="json")):
        assert each["read"] == "slices"
        assert each["unlike"] == [] and each["trained"] > 4
        found, wanted = each["differences"]
        assert found == pytest.approx(wanted, rel=0.11, abs=1e-3)


BANK = "a bank for all layers"
LEARNING = {
    "lengths of rows": {**LORA, "tuner": "dora"},
    "lengths of rows of bytes": {**LORA, "tuner": "dora"},
    "rows of a table, beside bytes": {**LORA, "trainable_tokens": [5, 7]},
    "a head, beside bytes": {**LORA, "modules_to_save": ["lm_head"]},
    "directions, beside bytes": {"tuner": "psoft", "r": 4},
    "a part of the weights": {**LORA, "tuner": "pissa"},
    "whole modules": {**LORA, "modules_to_save": ["lm_head"]},
    "rows of a table": {**LORA, "trainable_tokens": [43, 86]},
    "an adapter of psoft": {"tuner": "psoft", "r": 4},
    "an adapter of supertuning": {"tuner": "supertuning"},
    "numbers for all layers": {"tuner": "unilora"},
    "numbers for all layers, made of weights": {"tuner": "tinylora"},
    BANK: {"tuner": "vblora", "options": {"vector_length": 8, "num_vectors": 16, "topk": 2}},
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case == "a bank for all layers" else [pytest.mark.slow]) for case in LEARNING],
)
def test_it_learns_what_it_does_beside_a_whole_base(case, two, folders, uneven_file, tmp_path):
    """From its first step to the final adapter, which is read back and compared, and proven before the first step."""
    model, settings = folders("llama"), settings_of(SLICES, {"lora": LEARNING[case], "training": PROVEN})
    if "bytes" in case:
        settings["model"] = {"quantization": "int8" if "head" in case else "int4"}
    together = two.train(model, uneven_file, tmp_path / "together", **settings)
    alone = train(model, uneven_file, tmp_path / "alone", **{**settings, "parallelism": {}})
    same_steps(alone, together)
    same_adapter(alone, together)


WHOLE: dict[str, dict[str, Any]] = {
    "an adapter with arrow_config": {"lora": {"options": {"arrow_config": {}}}},
    "an adapter of GLORA": {"lora": {"tuner": "glora"}},
}


@pytest.mark.parametrize("words", WHOLE)
def test_what_may_want_whole_weights_says_why(words, tmp_path):
    asked = recipe(tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "out", algorithm="lora_sft", **WHOLE[words])
    assert words in Lora(asked).begins_beside()
