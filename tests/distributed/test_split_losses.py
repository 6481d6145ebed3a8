"""A teacher beside a vocabulary that is split over two processes: each has a slice of the logits of both models, and
losses and gradients are those of all logits in one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.profiler import ProfilerActivity, profile

from tests.backends.torch_engine.test_divergence import Case, drawn, top
from tests.distributed.measuring import rise
from tests.distributed.test_equal_numbers import SGD, STEPS, apart, weights
from tests.distributed.test_split_models import CLOSE, same_steps
from tests.invariants.run import train
from training_hub.backends.torch_engine.layouts.shared import Rows
from training_hub.backends.torch_engine.objectives import head as head_module
from training_hub.backends.torch_engine.objectives.distillation import DistillationCriterion
from training_hub.backends.torch_engine.objectives.divergence import KINDS, Divergence
from training_hub.backends.torch_engine.objectives.head import Head
from training_hub.backends.torch_engine.objectives.targets import Targets, TopTargets, WholeTargets
from training_hub.backends.torch_engine.objectives.token_loss import PLAIN, TokenCriterion, TokenLoss
from training_hub.backends.torch_engine.parallel import Group
from training_hub.backends.torch_engine.teacher.load import NUMBERS, NUMBERS_OF_KEPT

FORMS: dict[str, Callable[[Case], Targets]] = {
    "head": lambda case: case.whole(),
    "head with a bias and a cap": lambda case: case.whole(
        Head(case.teacher_weight, torch.linspace(-1, 1, 13, dtype=torch.float64), 0.5, 3.0)
    ),
    "logits": lambda case: WholeTargets(case.common, logits_NV=case.teacher_logits()),
    "top": lambda case: top(case, 3, 1.7),
    "all": lambda case: top(case, case.common, 1.7),
    "drawn": lambda case: drawn(case, 6, 1.7),
}
COMMON = {"all but the last": 10, "all": 11, "none of the second process": 5}


def found_in_one_and_in_two(group: Group) -> dict[str, float]:
    """How far losses and gradients of a split vocabulary lie from those of a whole one, by case."""
    ways = [(form, kind) for form in FORMS for kind in (KINDS if form != "drawn" else KINDS[:1])]
    losses = ((1.0, PLAIN), (0.6, TokenLoss(smoothing=0.1, z=0.01)))
    mesh, found = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_module, "chunk_rows", lambda vocabulary, device: 4)
        for (form, kind), (alpha, loss), (which, common) in product(ways, losses, COMMON.items()):
            case = Case(common=common)
            given = (Divergence(kind, 0.3, 1.7, alpha), FORMS[form](case), loss)
            found[f"{form}, {kind}, {alpha}, {which}"] = farthest(mesh, case, *given)
    return found


def farthest(mesh: DeviceMesh, case: Case, *given: Any) -> float:
    split = distribute_tensor(case.weight.detach(), mesh, [Shard(0)], src_data_rank=None)
    rows, own = Rows.of(split), split.to_local().requires_grad_()
    criterion = case.criterion(*given)
    one, each_of_one = Head(case.weight, cap=4.0).weigh(case.hidden, criterion)
    several, each = Head(own, cap=4.0, rows=rows).weigh(case.hidden, criterion)
    of_one = torch.autograd.grad(one, (case.hidden, case.weight))
    of_several = torch.autograd.grad(several, (case.hidden, own))
    wanted = (one, each_of_one, of_one[0], of_one[1][rows.start : rows.end])
    return max(distance(a, b) for a, b in zip((several, each, *of_several), wanted, strict=True))


def distance(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())


def test_losses_and_gradients_are_those_of_all_logits(two):
    first, second = two.call("tests.distributed.test_split_losses:found_in_one_and_in_two")
    assert len(first) == len(second) == 96
    # Float64: sums of eleven terms of about 1, in another order.
    assert max([*first.values(), *second.values()]) < 1e-13


def numbers_of_a_chunk(group: Group) -> dict[str, tuple[float, float]]:
    """Float32 numbers for each logit of a chunk at its fullest moment, by case: as planned, and as they were."""
    mesh, found = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), {}
    rows = Rows(mesh, group.rank * 5000, group.rank * 5000 + 5000, 10000, 5000)
    head, ids_NK, flat_N = Head(torch.randn(10000, 4)), torch.arange(16).expand(16, 16), torch.full((16,), 0.5)
    top_ones = TopTargets(ids_NK, torch.full((16, 16), -4.0), flat_N, 10000)
    whole = WholeTargets(10000, torch.randn(16, 4), head)
    for kind, targets in product(KINDS, (whole, top_ones)):
        tokens = TokenCriterion(PLAIN, ids_NK[0], torch.ones(16))
        criterion = DistillationCriterion(Divergence(kind, alpha=0.5), tokens, targets, 10000).of_rows(rows)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            criterion.in_torch_(torch.randn(16, 5000), slice(0, 16), 1.0)
        planned = NUMBERS[kind] if targets is whole else NUMBERS_OF_KEPT
        found[f"{kind}, {type(targets).__name__}"] = (planned, rise(profiled) / (4 * 16 * 5000))
    return found


def test_the_plan_counts_what_is_made_of_a_slice_of_logits(two):
    for found in two.call("tests.distributed.test_split_losses:numbers_of_a_chunk"):
        assert len(found) == 6
        for planned, was in found.values():
            assert was == pytest.approx(planned, rel=0.02)  # what is made for rows alone is not counted


TENSOR = {"tensor_parallel_degree": 2}
HALF = {"alpha": 0.5}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "asked in each step": ("llama", TENSOR, HALF),
}
MORE_CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "asked before": ("llama-tied", TENSOR, {**HALF, "cache": "top_k", "top_k": 8}),
    "a divergence the other way": ("qwen3", TENSOR, {"divergence": "reverse_kl", "temperature": 2.0}),
    "one between both": ("llama", TENSOR, {**HALF, "divergence": "jensen_shannon", "beta": 0.3}),
    "drawn before": ("llama", TENSOR, {**HALF, "cache": "sampled", "samples": 8}),
    "all tokens in each": ("llama", {**TENSOR, "sequence_parallel": False}, HALF),
    "logits that are multiplied and capped": ("gemma2", TENSOR, HALF),
    "logits that are multiplied": ("granite", TENSOR, {**HALF, "temperature": 2.0}),
    "a head with a bias": ("phi", TENSOR, HALF),
    "experts": ("qwen3-moe", TENSOR, HALF),
    "behind a message of its own": ("llama", TENSOR, {"prompt": "You know it."}),
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(one, marks=pytest.mark.slow) for one in MORE_CASES)])
def test_a_student_with_half_the_vocabulary_in_each_process_learns_what_one_learns(
    case, two, folders, uneven_file, tmp_path
):
    family, parallelism, asked = {**CASES, **MORE_CASES}[case]
    teacher = str(folders("qwen3", hidden_size=48))
    settings = {"training": STEPS, "optimizer": SGD, "distillation": {"teacher": teacher, **asked}}
    same_numbers(two, folders(family), uneven_file, tmp_path, parallelism, settings)


PRODUCTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "and slices of both models": ({"data_parallel_shard_degree": 2}, {}),
    "and tokens": ({"context_parallel_degree": 2}, {"distillation": {"cache": "sampled", "samples": 8}}),
    "and stages": ({"pipeline_parallel_degree": 2}, {}),
    "and stages there and back, with proofs": (
        {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "ZBVZeroBubble"},
        {"training": {**STEPS, "preflight": True}},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", PRODUCTS)
def test_so_it_does_where_the_model_is_split_in_two_ways(case, four, folders, uneven_file, tmp_path):
    parallelism, sections = PRODUCTS[case]
    model = folders("llama", num_hidden_layers=4)
    teacher = {"teacher": str(folders("qwen3", hidden_size=48)), **HALF, **sections.get("distillation", {})}
    settings = {"training": STEPS, "optimizer": SGD, **sections, "distillation": teacher}
    same_numbers(four, model, uneven_file, tmp_path, {**TENSOR, **parallelism}, settings)


@pytest.mark.slow
def test_an_adapter_learns_the_same_from_a_teacher(two, folders, uneven_file, tmp_path):
    distillation = {"teacher": str(folders("qwen3", hidden_size=48)), **HALF}
    lora = {"algorithm": "lora_sft", "lora": {"r": 4, "dropout": 0.0}}
    settings = {"training": STEPS, "optimizer": SGD, **lora, "distillation": distillation}
    same_numbers(two, folders("llama"), uneven_file, tmp_path, TENSOR, settings)


def same_numbers(crew: Any, model: Any, rows: Any, folder: Any, parallelism: Any, settings: dict[str, Any]) -> None:
    alone = train(model, rows, folder / "alone", **settings)
    together = crew.train(model, rows, folder / "together", parallelism=parallelism, **settings)
    same_steps(alone, together)
    name = "adapter_model" if "lora" in settings else "model"
    assert apart(weights(alone.model_path, name), weights(together[0]["model_path"], name)) <= CLOSE
