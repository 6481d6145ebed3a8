"""A profile says where the time of a step went, each moment once, and changes nothing that is learned."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import Interval, Kernel
from torch.profiler import record_function

from tests.invariants.run import final_weights, train
from training_hub.backends.torch_engine.profile import (
    ATTENTION,
    DATA,
    ELEMENTWISE,
    HEAD,
    OPTIMIZER,
    OTHER,
    PARTS,
    PRODUCTS,
    SKIPPED,
    STEP,
    TAKEN,
    StepProfile,
    split,
    table,
)

CPU = torch.device("cpu")


def profiled(tmp_path: Path, step) -> dict:
    watch = StepProfile(1, 1, 1, CPU, tmp_path / "profile.json")
    with watch.step(1):
        step()
    assert watch.split is not None
    assert json.loads((tmp_path / "profile.json").read_text()) == watch.split
    return watch.split


def test_a_run_says_where_the_time_of_its_steps_went_and_learns_the_same(
    tiny_model_folder: Path, chat_file: Path, tmp_path: Path
):
    plain = train(tiny_model_folder, chat_file, tmp_path / "plain", training={"epochs": 1})
    result = train(tiny_model_folder, chat_file, tmp_path / "profiled", monitoring={"profile": True})
    assert not (tmp_path / "plain/profile.json").exists()
    found = json.loads((tmp_path / "profiled/profile.json").read_text())
    assert found["steps"] == [SKIPPED + 1, SKIPPED + 2, SKIPPED + 3]
    assert sum(found["seconds"].values()) == pytest.approx(found["seconds_per_step"])
    assert set(found["seconds"]) == set(PARTS)
    assert all(found["seconds"][part] > 0 for part in PARTS)
    assert found["matrix_products_within"][HEAD] > 0
    assert all(torch.equal(weight, final_weights(plain)[name]) for name, weight in final_weights(result).items())
    assert "matrix products" in (tmp_path / "profiled/report.html").read_text()


class Mixing(torch.autograd.Function):
    """Products in forward and backward that belong to whatever the forward was called in."""

    @staticmethod
    def forward(ctx, left, right):
        ctx.save_for_backward(left, right)
        return left @ right

    @staticmethod
    def backward(ctx, upstream):
        left, right = ctx.saved_tensors
        return upstream @ right.T, left.T @ upstream


@pytest.mark.parametrize("part", [ATTENTION, HEAD])
def test_backward_belongs_where_its_forward_was(part: str, tmp_path: Path):
    left, right = (torch.randn(96, 96, requires_grad=True) for _ in range(2))

    def step() -> None:
        with record_function(part):
            own, mixed = left @ right, Mixing.apply(left, right)
        (own.sum() + mixed.sum()).backward()

    found = profiled(tmp_path, step)
    assert found["seconds"][PRODUCTS] == 0
    assert found["matrix_products_within"][part] > 0
    calls = {one["name"]: one["calls_per_step"] for one in found["operations"] if one["part"] == part}
    assert calls["aten::mm"] == 6


def test_products_outside_every_range_are_matrix_products(tmp_path: Path):
    left, right = (torch.randn(96, 96, requires_grad=True) for _ in range(2))

    def step() -> None:
        with record_function(DATA):
            torch.ones(3).numpy()
        (left @ right).relu().sum().backward()
        with record_function(OPTIMIZER):
            left.grad.mul_(0.5)

    found = profiled(tmp_path, step)
    assert found["seconds"][ATTENTION] == found["seconds"][HEAD] == 0
    assert all(found["seconds"][part] > 0 for part in (PRODUCTS, DATA, OPTIMIZER))
    assert {one["part"] for one in found["operations"] if one["name"] == "aten::mm"} == {PRODUCTS}


@pytest.mark.parametrize(
    ("ahead", "taken"),
    [(1, [5]), (2, [5, 6]), (3, [5, 6, 7]), (4, [6, 7, 8]), (5, [7, 8, 9]), (100, [7, 8, 9])],
)
def test_steps_after_the_warm_up_are_taken_where_there_are_enough(ahead: int, taken: list[int], tmp_path: Path):
    assert list(StepProfile(5, ahead, 1.5, CPU, tmp_path / "profile.json").steps) == taken
    assert len(taken) <= TAKEN


@pytest.mark.parametrize(("packs", "taken"), [(2, [7, 8, 9]), (3, [7, 8]), (3.5, [7]), (64, [7])])
def test_of_large_steps_fewer_are_taken_apart_but_one(packs: float, taken: list[int], tmp_path: Path):
    assert list(StepProfile(5, 100, packs, CPU, tmp_path / "profile.json").steps) == taken


def test_the_table_shows_the_largest_part_first(tmp_path: Path):
    matrix = torch.randn(300, 300)
    lines = list(table(profiled(tmp_path, lambda: [matrix @ matrix for _ in range(20)])))
    assert "steps 1 to 1" in lines[0]
    assert lines[1].split()[:2] == ["matrix", "products"]
    assert len(lines) == 1 + len(PARTS)


@dataclass(frozen=True)
class Noted:
    """What a profiler notes on a GPU, of which none is at hand: as torch 2.11 hands it on."""

    name: str
    start: float
    end: float
    device_type: DeviceType = DeviceType.CPU
    kernels: tuple[Kernel, ...] = ()
    cpu_parent: Noted | None = None
    sequence_nr: int = -1
    fwd_thread: int = 0
    is_user_annotation: bool = False

    @property
    def time_range(self) -> Interval:
        return Interval(self.start, self.end)

    @property
    def self_device_time_total(self) -> float:
        return sum(kernel.duration for kernel in self.kernels)

    self_cpu_time_total = 0.0


def test_on_a_gpu_each_kernel_counts_once_and_those_of_no_operation_too():
    gemm, moved = Kernel("nvjet", 0, 400_000), Kernel("_adamw_step", 0, 100_000)
    outer = Noted(OPTIMIZER, 500_000, 600_000)
    noted = [
        Noted(STEP, 0, 1_000_000),
        Noted("aten::mm", 10, 20, kernels=(gemm,)),
        Noted("Command Buffer Full", 15, 18, kernels=(gemm,)),  # its number is that of aten::mm, by chance
        outer,
        Noted("cuLaunchKernelEx", 500_010, 500_020, kernels=(gemm,), cpu_parent=outer),
        Noted(gemm.name, 100, 400_100, DeviceType.CUDA),
        Noted(moved.name, 550_000, 650_000, DeviceType.CUDA),
        Noted(OPTIMIZER, 550_000, 650_000, DeviceType.CUDA, is_user_annotation=True),
    ]
    found = split(noted, "cuda")
    assert found["seconds"] == pytest.approx(
        {PRODUCTS: 0.4, OPTIMIZER: 0.1, OTHER: 0.5, **dict.fromkeys((ATTENTION, ELEMENTWISE, HEAD, DATA), 0.0)}
    )
