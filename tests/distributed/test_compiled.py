"""Compiled blocks find the numbers of blocks that are run as they are written, in one process and in several.

Float32: compiled products add in another order, and fused operations round once where written ones round several times.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests.backends.torch_engine.tiny_models import random_pack, tiny_model
from tests.distributed.test_equal_numbers import SGD, STEPS, apart, weights
from tests.invariants.run import train
from training_hub.backends.torch_engine.attention import DOCUMENTS, register_attention
from training_hub.backends.torch_engine.compiling import budgeted, compile_blocks
from training_hub.backends.torch_engine.objectives.cross_entropy import CrossEntropy
from training_hub.backends.torch_engine.tensors import to_device
from training_hub.recipe.sections import Training

# torch's compiler looks at the gradients of what it is given, and is warned of that.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")]

CLOSE = 1e-5
COMPILED = {**STEPS, "compile": True}
LORA: dict[str, Any] = {"algorithm": "lora_sft", "lora": {"r": 4}}
BUDGET: dict[str, Any] = {"training": {"activation_checkpointing": "memory_budget", "activation_memory_budget": 0.2}}
ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "gpt2": ("gpt2", {}),
    "mixtral": ("mixtral", {}),
    "bfloat16": ("llama", {"model": {"dtype": "bfloat16", "save_dtype": "float32"}}),
    "budget": ("llama", BUDGET),
    "osft": ("llama", {"algorithm": "osft", "osft": {"unfreeze_rank_ratio": 0.5, "cache": False}}),
    "lora": ("llama", LORA),
    "lora, budget": ("llama", {**LORA, **BUDGET}),
    "teacher": ("llama", {"distillation": {"teacher": "another", "alpha": 0.5}}),
    "answers": ("llama", {"evaluation": {"interval": 2, "generate": True, "max_new_tokens": 4}}),
}
TOGETHER: dict[str, tuple[str, dict[str, Any]]] = {
    "replicas": ("llama", {}),
    "slices": ("llama", {"parallelism": {"data_parallel_shard_degree": -1}}),
    "slices, lora": ("llama", {"parallelism": {"data_parallel_shard_degree": -1}, **LORA}),
    "tokens": ("llama", {"parallelism": {"context_parallel_degree": 2}}),
    "heads": ("llama", {"parallelism": {"tensor_parallel_degree": 2}}),
    "heads, whole tokens": ("llama", {"parallelism": {"tensor_parallel_degree": 2, "sequence_parallel": False}}),
    "heads, lora": ("llama", {"parallelism": {"tensor_parallel_degree": 2}, **LORA}),
    "experts": ("qwen3-moe", {"parallelism": {"expert_parallel_degree": 2, "data_parallel_shard_degree": 2}}),
    "stages": ("llama", {"parallelism": {"pipeline_parallel_degree": 2}}),
}
SLICES_OF_HEADS: dict[str, Any] = {"tensor_parallel_degree": 2, "data_parallel_shard_degree": 2}


SETTINGS: dict[str, Any] = {"optimizer": SGD, "evaluation": {"interval": 2}, "data": {"validation_fraction": 0.2}}


def same(found: Any, wanted: Any, rel: float) -> None:
    assert len(found) == len(wanted) > 0
    for row, other in zip(found, wanted, strict=True):
        for key in {"loss", "grad_norm", "validation_loss"} & row.keys():
            assert row[key] == pytest.approx(other[key], rel=rel), key


def settings_of(sections: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sections of a recipe but that of the steps, and of this what is not eager."""
    found = {**SETTINGS, **sections}
    return found, {**COMPILED, **found.pop("training", {})}


def trained(folder: str) -> dict[str, torch.Tensor]:
    return weights(folder, "model" if (Path(folder) / "model.safetensors").exists() else "adapter_model")


def graphs(group: Any = None) -> int:
    """How many pieces of code were made since this was asked last; from now on it is an error to make ever more."""
    found = counters["stats"].pop("unique_graphs", 0)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return found


@pytest.fixture
def strict() -> Iterator[None]:
    graphs()
    yield
    torch._dynamo.config.fail_on_recompile_limit_hit = False


@pytest.mark.parametrize("case", ALONE)
def test_one_process_finds_the_numbers_of_eager_blocks(case, folders, uneven_file, tmp_path, strict):
    family, sections = ALONE[case]
    if "distillation" in sections:
        sections = {"distillation": {**sections["distillation"], "teacher": str(folders("qwen3"))}}
    settings, steps = settings_of(sections)
    eager = train(folders(family), uneven_file, tmp_path / "eager", training=STEPS, **settings)
    compiled = train(folders(family), uneven_file, tmp_path / "compiled", training=steps, **settings)
    assert graphs() > 0
    same(compiled.history, eager.history, 2e-2 if case == "bfloat16" else CLOSE)
    distance = apart(trained(compiled.model_path), trained(eager.model_path))
    assert distance <= (1e-2 if case == "bfloat16" else CLOSE)


def several_find_the_numbers_of_one(crew, family, sections, folders, uneven_file, tmp_path):
    settings, steps = settings_of(sections)
    crew.call("tests.distributed.test_compiled:graphs")
    together = crew.train(folders(family), uneven_file, tmp_path / "compiled", training=steps, **settings)
    alone = {name: values for name, values in settings.items() if name != "parallelism"}
    eager = train(folders(family), uneven_file, tmp_path / "eager", training=STEPS, **alone)
    for each in together:
        assert each.get("status") == "finished", each
        same(each["history"], eager.history, CLOSE)
    assert min(crew.call("tests.distributed.test_compiled:graphs")) > 0
    assert apart(trained(together[0]["model_path"]), trained(eager.model_path)) <= CLOSE


@pytest.mark.parametrize("layout", TOGETHER)
def test_two_processes_find_them_too(layout, two, folders, uneven_file, tmp_path):
    several_find_the_numbers_of_one(two, *TOGETHER[layout], folders, uneven_file, tmp_path)


def test_four_processes_with_slices_of_split_heads_find_them_too(four, folders, uneven_file, tmp_path):
    several_find_the_numbers_of_one(four, "llama", {"parallelism": SLICES_OF_HEADS}, folders, uneven_file, tmp_path)


def test_more_layers_with_adapters_take_no_more_code(folders, uneven_file, tmp_path, strict):
    settings, steps = settings_of(LORA)
    made = []
    for layers in (2, 5):
        model = folders("llama", num_hidden_layers=layers)
        train(model, uneven_file, tmp_path / str(layers), training=steps, **settings)
        made.append(graphs())
    assert made[0] == made[1] > 0


def test_more_layers_of_split_heads_take_no_more_code(two, folders, uneven_file, tmp_path):
    settings, steps = settings_of(TOGETHER["heads"][1])
    made = []
    for layers in (2, 5):
        two.call("tests.distributed.test_compiled:graphs")
        model = folders("llama", num_hidden_layers=layers)
        for each in two.train(model, uneven_file, tmp_path / str(layers), training=steps, **settings):
            assert each.get("status") == "finished", each
        made.append(two.call("tests.distributed.test_compiled:graphs"))
    assert made[0] == made[1]
    assert min(made[0]) > 0


def kept_bytes(budget: float) -> int:
    """Bytes beside parameters that the compiled blocks of a model keep for the backward pass."""
    register_attention()
    model = tiny_model("llama", num_hidden_layers=3).train()
    model.set_attn_implementation(DOCUMENTS)
    compile_blocks(model)
    asked = Training(compile=True, activation_checkpointing="memory_budget", activation_memory_budget=budget)
    with budgeted(asked):
        loss = CrossEntropy()(model, to_device(random_pack((40, 24, 40, 24)), torch.device("cpu"))).total
    own, found, nodes, seen = {p.data_ptr() for p in model.parameters()}, {}, [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [other for other, _ in node.next_functions]
        if "CompiledFunction" in type(node).__name__:
            found |= {one.data_ptr(): one.nbytes for one in node.saved_tensors if one.data_ptr() not in own}
    return sum(found.values())


def test_a_smaller_budget_keeps_less_of_each_block():
    assert 0 < kept_bytes(0.0) < kept_bytes(1.0)
