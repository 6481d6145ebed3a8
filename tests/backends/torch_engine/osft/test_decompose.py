"""The fast decomposition finds the subspaces of the full one, also where singular values are tiny or equal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training_hub.backends.torch_engine.adaptations.osft.decompose import Split, rank_kept, rank_of_energy, split


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(random(rows, columns, seed=seed))[0]


def protected_sides(one: Split) -> tuple[Tensor, Tensor]:
    """The projectors on the protected space of the long and of the short side."""
    right = one.right.double()
    short = torch.eye(right.shape[-1], dtype=torch.float64) - right.mT @ right
    left = one.left.double()
    long = torch.eye(left.shape[-2], dtype=torch.float64) - left @ left.mT if one.is_square else None
    return one.protected.double() @ one.protected.double().mT if long is None else long, short


# The last has more rows than are float64 at a time.
@pytest.mark.parametrize("shape", [(48, 48), (130, 48), (1100, 48)])
def test_the_subspaces_are_those_of_a_full_decomposition(shape):
    weight = random(*shape)
    u, _, v = torch.linalg.svd(weight, full_matrices=False)
    for dtype, close in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        long, short = protected_sides(split(weight.to(dtype), 30))
        exact = (
            torch.linalg.svd(weight.to(dtype).double(), full_matrices=False) if dtype == torch.float32 else (u, None, v)
        )
        assert (long - exact[0][:, :30] @ exact[0][:, :30].T).abs().max() <= close
        assert (short - exact[2][:30].T @ exact[2][:30]).abs().max() <= close


@pytest.mark.parametrize("shape", [(32, 32), (80, 32)])
@pytest.mark.parametrize("lost", [0, 8, 20])
def test_a_weight_of_low_rank_still_has_orthonormal_directions(shape, lost):
    values = torch.logspace(0, -10, 32, dtype=torch.float64)
    values[32 - lost :] = 0
    weight = (orthonormal(shape[0], 32, 1) * values) @ orthonormal(32, 32, 2).T
    one = split(weight.float(), 20)
    both = torch.cat([one.protected, one.left], dim=1).double()
    identity = torch.eye(both.shape[1], dtype=torch.float64)
    # Rounded to float32: a few units in the last place of numbers below 1.
    assert (both.T @ both - identity).abs().max() < 1e-6
    assert (one.right.double() @ one.right.double().T - torch.eye(12)).abs().max() < 1e-6
    assert one.overlap_right.diagonal().sum() < 1e-12


def test_equal_singular_values_are_cut_into_orthonormal_parts_all_the_same():
    one = split(orthonormal(24, 24, 3).float(), 10)
    long, short = protected_sides(one)
    assert long.trace().item() == pytest.approx(10, abs=1e-5)
    assert short.trace().item() == pytest.approx(10, abs=1e-5)


def test_the_low_part_is_what_the_protected_one_leaves():
    weight = random(60, 24).float()
    one = split(weight, 15)
    low = (one.left.double() * one.values.double()) @ one.right.double()
    assert (one.protected.double().T @ low).abs().max() < 1e-5
    high = one.protected.double() @ (one.protected.double().T @ weight.double())
    torch.testing.assert_close(low + high, weight.double(), rtol=0, atol=1e-5)


def test_a_stack_of_experts_is_cut_matrix_by_matrix():
    stack = random(3, 40, 16).float()
    whole = split(stack, 10)
    assert whole.left.shape == (3, 40, 6)
    for index in range(3):
        alone = split(stack[index], 10)
        for name, tensor in alone.tensors().items():
            assert torch.equal(whole.tensors()[name][index], tensor), name


@pytest.mark.parametrize(
    ("side", "ratio", "kept"), [(64, 0.3, 44), (10, 0.9, 1), (10, 0.01, 9), (10, 0.0, 10), (10, 1.0, 0), (32, 0.3, 22)]
)
def test_the_ratio_says_how_many_directions_are_kept(side, ratio, kept):
    assert rank_kept(side, ratio) == kept


def test_energy_keeps_the_fewest_directions_that_hold_it():
    values = torch.tensor([3.0, 2.0, 1.0, 1.0])  # squares 9, 4, 1, 1 of 15
    assert rank_of_energy(values, 0.5) == 1
    assert rank_of_energy(values, 13 / 15) == 2
    assert rank_of_energy(values, 0.87) == 3
    assert rank_of_energy(values, 1.0) == 3, "one direction is always left to train"
    assert split(torch.diag(values), None, energy=0.6).left.shape[-1] == 3


@pytest.mark.parametrize("shape", [(24, 24), (50, 24)])
def test_a_second_cut_keeps_the_first_and_protects_more(shape):
    weight = random(*shape).float()
    first = split(weight, 12)
    learned = weight + 0.5 * (first.project_left(random(shape[0], 12, seed=4).float()) @ first.right)
    second = split(learned, 5, first)
    assert second.left.shape[-1] == 7
    for before, after in zip(protected_sides(first), protected_sides(second), strict=True):
        assert (after @ before - before).abs().max() < 1e-5, "what was protected is protected still"
        assert after.trace().item() == pytest.approx(17, abs=1e-4)
    # The largest of what is free is what is added.
    free = (
        (torch.eye(shape[0]) - protected_sides(first)[0])
        @ learned.double()
        @ (torch.eye(24) - protected_sides(first)[1])
    )
    top = torch.linalg.svd(free.double())[2][:5]
    added = protected_sides(second)[1] - protected_sides(first)[1]
    assert (added @ top.T - top.T).abs().max() < 1e-4
    assert second.overlap_right.diagonal().sum() < 1e-11
