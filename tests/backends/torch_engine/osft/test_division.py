"""The decompositions of a run are divided by what they cost; that all get the same is in tests/distributed."""

from __future__ import annotations

import itertools

import pytest

from training_hub.backends.torch_engine.parallel import shared_out


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_every_weight_is_in_one_share_and_shares_cost_about_the_same(processes):
    # A Llama of 32 blocks by the cube of the shorter side, with its tables: counts alone would be far off.
    costs = {f"{block}.{name}": 1.0 for block in range(32) for name in ("q", "o")}
    costs |= {f"{block}.{name}": 0.05 for block in range(32) for name in ("k", "v")}
    costs |= {f"{block}.{name}": 1.4 for block in range(32) for name in ("gate", "up", "down")}
    shares = shared_out(costs, processes)
    assert sorted(name for share in shares for name in share) == sorted(costs)
    loads = [sum(costs[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs.values())
    assert all(costs[a] >= costs[b] for share in shares for a, b in itertools.pairwise(share))
    assert max(loads) < 1.02 * sum(loads) / processes


def test_more_processes_than_weights_leave_some_without():
    assert sorted(map(len, shared_out({"a": 2.0, "b": 1.0}, 4))) == [0, 0, 1, 1]
