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
from tests.invariants.run import recipe, train
from training_hub.backends.torch_engine.adaptations.lora import Lora
from training_hub.backends.torch_engine.attention import DOCUMENTS, register_attention
from training_hub.backends.torch_engine.compiling import budgeted, compile_blocks
from training_hub.backends.torch_engine.loading.model import load_model
from training_hub.backends.torch_engine.objectives.cross_entropy import CrossEntropy
from training_hub.backends.torch_engine.tensors import to_device
from training_hub.recipe.sections import Training

# torch's compiler looks at the gradients of what it is given, and is warned of that.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")]

CLOSE = 1e-5
COMPILED = {**STEPS, "compile": True}
LORA: dict[str, Any] = {"algorithm": "lora_sft", "lora": {"r": 4}}
DORA: dict[str, Any] = {"algorithm": "lora_sft", "lora": {"r": 4, "tuner": "dora"}}
INT4: dict[str, Any] = {**LORA, "model": {"quantization": "int4"}}
INT8: dict[str, Any] = {**LORA, "model": {"quantization": "int8"}}
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}
"""Rows of whole blocks of 4 bits, and weights so small that rounding is not made ten times as large by each layer."""
HALVES: dict[str, Any] = {**WIDE, "hidden_size": 128}
"""The same of halves of rows."""
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
    "dora": ("llama", DORA),
    "dora of conv1d": ("gpt2", DORA),
    "int4": ("wide", INT4),
    "int8": ("wide", INT8),
    "int4, dora": ("wide", {**INT4, **DORA}),
    "teacher": ("llama", {"distillation": {"teacher": "another", "alpha": 0.5}}),
    "answers": ("llama", {"evaluation": {"interval": 2, "generate": True, "max_new_tokens": 4}}),
}
TOGETHER: dict[str, tuple[str, dict[str, Any]]] = {
    "replicas": ("llama", {}),
    "slices": ("llama", {"parallelism": {"data_parallel_shard_degree": -1}}),
    "slices, lora": ("llama", {"parallelism": {"data_parallel_shard_degree": -1}, **LORA}),
    "slices, dora": ("llama", {"parallelism": {"data_parallel_shard_degree": -1}, **DORA}),
    "slices, int4": ("wide", {"parallelism": {"data_parallel_shard_degree": -1}, **INT4}),
    "replicas, int8": ("wide", INT8),
    "tokens": ("llama", {"parallelism": {"context_parallel_degree": 2}}),
    "heads": ("llama", {"parallelism": {"tensor_parallel_degree": 2}}),
    "heads, whole tokens": ("llama", {"parallelism": {"tensor_parallel_degree": 2, "sequence_parallel": False}}),
    "heads, lora": ("llama", {"parallelism": {"tensor_parallel_degree": 2}, **LORA}),
    "heads, dora": ("llama", {"parallelism": {"tensor_parallel_degree": 2}, **DORA}),
    "heads, int4": ("whole blocks", {"parallelism": {"tensor_parallel_degree": 2}, **INT4}),
    "heads, int8": ("wide", {"parallelism": {"tensor_parallel_degree": 2}, **INT8}),
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


def model_of(folders: Any, family: str, **changes: Any) -> Path:
    named = {"wide": WIDE, "whole blocks": HALVES}
    found: Path = folders("llama", **named[family], **changes) if family in named else folders(family, **changes)
    return found


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
    eager = train(model_of(folders, family), uneven_file, tmp_path / "eager", training=STEPS, **settings)
    compiled = train(model_of(folders, family), uneven_file, tmp_path / "compiled", training=steps, **settings)
    assert graphs() > 0
    same(compiled.history, eager.history, 2e-2 if case == "bfloat16" else CLOSE)
    distance = apart(trained(compiled.model_path), trained(eager.model_path))
    assert distance <= (1e-2 if case == "bfloat16" else CLOSE)


def several_find_the_numbers_of_one(crew, family, sections, folders, uneven_file, tmp_path):
    settings, steps = settings_of(sections)
    crew.call("tests.distributed.test_compiled:graphs")
    together = crew.train(model_of(folders, family), uneven_file, tmp_path / "compiled", training=steps, **settings)
    alone = {name: values for name, values in settings.items() if name != "parallelism"}
    eager = train(model_of(folders, family), uneven_file, tmp_path / "eager", training=STEPS, **alone)
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


@pytest.mark.parametrize("case", ["lora", "dora", "int4", "int8"])
def test_more_layers_with_adapters_take_no_more_code(case, folders, uneven_file, tmp_path, strict):
    family, sections = ALONE[case]
    settings, steps = settings_of(sections)
    made = []
    for layers in (2, 5):
        model = model_of(folders, family, num_hidden_layers=layers)
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


def kept_of_blocks(model: torch.nn.Module, loss: torch.Tensor) -> dict[int, torch.Tensor]:
    """What compiled blocks keep beside parameters for the backward pass, by where it lies."""
    own, found, nodes, seen = {p.data_ptr() for p in model.parameters()}, {}, [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [other for other, _ in node.next_functions]
        if "CompiledFunction" in type(node).__name__:
            found |= {one.data_ptr(): one for one in node.saved_tensors if one.data_ptr() not in own}
    return found


def kept_bytes(budget: float) -> int:
    """Bytes beside parameters that the compiled blocks of a model keep for the backward pass."""
    register_attention()
    model = tiny_model("llama", num_hidden_layers=3).train()
    model.set_attn_implementation(DOCUMENTS)
    compile_blocks(model)
    asked = Training(compile=True, activation_checkpointing="memory_budget", activation_memory_budget=budget)
    with budgeted(asked):
        loss = CrossEntropy()(model, to_device(random_pack((40, 24, 40, 24)), torch.device("cpu"))).total
    return sum(one.nbytes for one in kept_of_blocks(model, loss).values())


def test_a_smaller_budget_keeps_less_of_each_block():
    assert 0 < kept_bytes(0.0) < kept_bytes(1.0)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_weights_of_few_bits_are_never_kept_dense(kind, folders, uneven_file, tmp_path):
    sections = {**LORA, "training": COMPILED, "model": {"quantization": kind, "dtype": "float32"}}
    asked = recipe(model_of(folders, "wide"), uneven_file, tmp_path / "run", **sections)
    loaded = load_model(asked, torch.device("cpu"), torch.float32)
    model = Lora(asked).attach(loaded.model).train()
    matrices = [module for module in model.modules() if hasattr(module, "lora_A")]
    shapes = {(module.base_layer.out_features, module.base_layer.in_features) for module in matrices}
    compile_blocks(model)
    pack = to_device(random_pack((31, 22)), torch.device("cpu"))  # no side of a matrix
    kept = kept_of_blocks(model, CrossEntropy()(model, pack).total)
    assert kept
    assert not [one.shape for one in kept.values() if {tuple(one.shape), tuple(one.shape[::-1])} & shapes]
