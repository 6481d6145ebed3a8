"""Adapters of experts that are dealt out: each process uses those of its own experts, and all learn what one learns.

Float32 and plain SGD, for the reasons that test_equal_numbers.py gives; 1e-5 as for all that is split.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.test_equal_numbers import SGD, STEPS, apart, weights
from tests.distributed.test_experts_beside_other_ways import degrees
from tests.distributed.test_split_models import CLOSE, SMALL_PACKS, same_steps
from tests.invariants.run import train

LORA = {"r": 4, "dropout": 0.0}
OF_WEIGHTS = {
    **LORA,
    "target_modules": ["q_proj"],
    "options": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
}
Case = tuple[str, dict[str, Any], dict[str, Any]]

IN_TWO: dict[str, Case] = {
    "heads and experts, all tokens in each": ("qwen3-moe", {**degrees(heads=2), "sequence_parallel": False}, {}),
    "experts among shards": ("mixtral", degrees(shards=2, experts=2), {}),
}
MORE_IN_TWO: dict[str, Case] = {
    "heads and experts": ("qwen3-moe", degrees(heads=2), {"training": SMALL_PACKS}),
    "experts among heads": ("qwen3-moe", degrees(heads=2, experts=2), {"training": SMALL_PACKS}),
    "experts among tokens": ("qwen3-moe", degrees(tokens=2, experts=2), {"training": SMALL_PACKS}),
    "experts with shared ones": ("deepseek-v3", degrees(heads=2), {}),
    "stored the other way, with biases": ("gpt-oss", degrees(shards=2, experts=2), {"lora": OF_WEIGHTS}),
    "shares of a rank": ("qwen3-moe", degrees(shards=2, experts=2), {"lora": {**LORA, "tuner": "rslora"}}),
    "layers made again": (
        "mixtral",
        degrees(heads=2),
        {"training": {**STEPS, "activation_checkpointing": "full"}},
    ),
    "with proofs": ("qwen3-moe", degrees(heads=2), {"training": {**STEPS, "preflight": True}}),
    "experts, with proofs": (
        "qwen3-moe",
        degrees(shards=2, experts=2),
        {"training": {**STEPS, "preflight": True}},
    ),
}
IN_FOUR: dict[str, Case] = {
    "half as many as shards": ("qwen3-moe", degrees(shards=4, experts=2), {"training": SMALL_PACKS}),
    "shards and heads, among all": ("mixtral", degrees(shards=2, heads=2, experts=4), {}),
    "shards of heads": ("qwen3-moe", degrees(shards=2, heads=2), {}),
    "two replicas of heads": ("qwen3-moe", degrees(heads=2), {}),
    "stages": ("qwen3-moe", {**degrees(shards=2, experts=2), "pipeline_parallel_degree": 2}, {}),
    "stages of heads": ("qwen3-moe", {**degrees(heads=2), "pipeline_parallel_degree": 2}, {}),
}


@pytest.mark.parametrize("case", [*IN_TWO, *(pytest.param(one, marks=pytest.mark.slow) for one in MORE_IN_TWO)])
def test_two_processes_learn_what_one_learns(case, two, folders, uneven_file, tmp_path):
    same_run({**IN_TWO, **MORE_IN_TWO}[case], two, folders, uneven_file, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", IN_FOUR)
def test_four_processes_do_too(case, four, folders, uneven_file, tmp_path):
    same_run(IN_FOUR[case], four, folders, uneven_file, tmp_path)


def same_run(case: Case, crew: Any, folders: Any, rows: Any, folder: Any) -> None:
    family, parallelism, sections = case
    settings = {"training": STEPS, "optimizer": SGD, "algorithm": "lora_sft", "lora": LORA, **sections}
    alone = train(folders(family), rows, folder / "alone", **settings)
    together = crew.train(folders(family), rows, folder / "together", parallelism=parallelism, **settings)
    same_steps(alone, together)
    learned = weights(alone.model_path, "adapter_model")
    assert [name for name in learned if ".experts." in name and "lora_B" in name and learned[name].any()]
    assert apart(learned, weights(together[0]["model_path"], "adapter_model")) <= CLOSE
