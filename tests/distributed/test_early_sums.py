"""Replicas add up gradients while backward goes on: the sums of all at the end, and begun before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from training_hub.backends.torch_engine.early_sums import EarlySums
from training_hub.backends.torch_engine.parallel import Group

WIDTH = 64
OWN_BUCKET = 4 * WIDTH * WIDTH
"""Bytes of a matrix here, so that each travels alone."""


class Chain(nn.Module):
    """Layers one after another; `spare` is used by process 1 alone, `unused` by nobody, the first layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.spare = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor, *, spares: bool) -> torch.Tensor:
        x = self.layers[0](x)
        for layer in self.layers:
            x = layer(x).tanh()
        return (self.spare(x) if spares else x).square().sum()


def model_of(seed: int) -> Chain:
    torch.manual_seed(seed)
    return Chain()


def rows(rank: int, number: int) -> torch.Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(10 * rank + number))


def two_steps(group: Group) -> Any:
    """Of two steps, in the second of which process 0 has nothing to learn from: how many sums had begun when the last
    backward pass ended, how many there are, and how far gradients lie from those of all rows in one process."""
    model, alone = model_of(0), model_of(0)
    named = dict(model.named_parameters())
    sums = EarlySums(group, named, named, small_bytes=OWN_BUCKET)
    begun, apart = [], []
    for passes in ([2, 1], [0, 1]):
        for each in (model, alone):
            each.zero_grad()
        for number in range(passes[group.rank]):
            if number + 1 == passes[group.rank]:
                sums.begin()
            model(rows(group.rank, number), spares=group.rank == 1).backward()
        begun.append(sums.num_begun)
        sums.send_rest()
        told = group.sum(torch.ones(()))  # other talk does not come between
        sums.finish()
        for rank, count in enumerate(passes):
            for number in range(count):
                alone(rows(rank, number), spares=rank == 1).backward()
        assert told == 2 and all(weight.grad is None for weight in model.unused.parameters())
        wanted = {name: weight.grad for name, weight in alone.named_parameters() if weight.grad is not None}
        assert wanted.keys() == {name for name, weight in named.items() if weight.grad is not None}
        # Relative to the largest gradient: float32 sums in another order.
        apart.append(max(float((named[n].grad - g).abs().max() / g.abs().max()) for n, g in wanted.items()))
    sums.release()
    model(rows(0, 0), spares=True).backward()  # nobody else does: this would wait for ever if it were sent
    return {"begun": begun, "apart": apart}


def test_sums_begin_within_the_last_backward_pass_and_are_those_of_one_process(two):
    zero, one = two.call(f"{__name__}:two_steps")
    assert max(*zero["apart"], *one["apart"]) < 1e-6
    # Of six layers with a weight and a bias each four are used by both, one by process 1, and one waits for the end.
    assert zero["begun"] == [8, 0] and one["begun"] == [10, 10]
