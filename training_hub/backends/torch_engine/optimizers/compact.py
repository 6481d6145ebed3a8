"""AdamW that keeps less: masters split into weight and extra bits, moments as one byte for each number.

Each step is torch's own fused kernel, run over one stretch of a weight after another on float32 copies made for it; on
a GPU with Triton it is one kernel of ours, whose results may differ by the rounding of single operations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from training_hub.backends.torch_engine.optimizers.blocks import BLOCK, LEAST, dequantize, quantize, tables
from training_hub.backends.torch_engine.optimizers.split import join, split

STRETCHES = {"cpu": 2**18, "cuda": 2**24}
"""Numbers that are float32 at a time, a multiple of BLOCK: what a CPU's cache holds, and what keeps a GPU busy."""

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""What is kept for each number, by name, and whether it has a sign."""


def moment_bytes(count: int) -> int:
    """Bytes of the 8-bit moments of a weight of `count` numbers."""
    blocks = -(-count // BLOCK)
    return len(MOMENTS) * (blocks * (BLOCK + 4) if count >= LEAST else 4 * count)


class CompactAdamW(torch.optim.Optimizer):
    """AdamW over float32 weights, and bfloat16 ones whose gradients are float32 and whose `extras` make them exact.

    extras: int16, by the weight they belong to. With float32 moments the weights move as torch's fused AdamW moves
    float32 masters, on a CPU bit for bit.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], extras: Mapping[Tensor, Tensor], *, is_8bit: bool, **settings: Any
    ):
        super().__init__(groups, settings)
        self._extras, self._is_8bit = extras, is_8bit
        self._factor: Tensor | None = None
        # Made before the first step, lest they lie where activations were, and these find no room the next time.
        for weight in (weight for group in self.param_groups for weight in group["params"]):
            self.state[weight].update(self._fresh(weight))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, group)
        self._factor = None

    def scale_gradients(self, factor: Tensor) -> None:
        """Let the next step multiply all gradients by this number as it reads them, in place of a pass over them."""
        self._factor = factor

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the tensors of `state_dict()` as they are; torch's own would cast them to the weights' format."""
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for number, kept in state_dict["state"].items():
            weight = weights[number]
            self.state[weight] = {
                name: tensor.to("cpu" if name == "step" else weight.device) for name, tensor in kept.items()
            }

    def _move(self, weight: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        state["step"] += 1
        extra = self._extras.get(weight)
        if weight.is_cuda and find_spec("triton") is not None:
            step_in_one_(weight, extra, state, group, self._factor)
        else:
            self._move_in_stretches(weight, extra, state, group)

    def _move_in_stretches(
        self, weight: Tensor, extra: Tensor | None, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        before = torch.full((), float(state["step"]) - 1, device=weight.device)
        flat, gradient = weight.view(-1), weight.grad.reshape(-1)  # type: ignore[union-attr]
        length = STRETCHES[weight.device.type]
        for start in range(0, flat.numel(), length):
            part = slice(start, min(start + length, flat.numel()))
            exact = flat[part] if extra is None else join(flat[part], extra.view(-1)[part])
            moments = {name: _read(state, name, part) for name in MOMENTS}
            slope = gradient[part] if self._factor is None else gradient[part] * self._factor
            _adamw_(exact, slope, moments, before.clone(), group)
            for name, moment in moments.items():
                _write(state, name, part, moment)
            if extra is not None:
                rounded, extra.view(-1)[part] = split(exact)
                flat[part] = rounded

    def _fresh(self, weight: Tensor) -> dict[str, Tensor]:
        made = {"step": torch.zeros(())}  # on the host, where corrections are made from it without waiting
        is_low = self._is_8bit and weight.numel() >= LEAST
        for name in MOMENTS:
            if is_low:
                blocks = -(-weight.numel() // BLOCK)
                made[name] = torch.zeros(blocks, BLOCK, dtype=torch.uint8, device=weight.device)
                made[f"{name}_scale"] = torch.zeros(blocks, device=weight.device)  # and so all numbers are 0
            else:
                made[name] = torch.zeros_like(weight, dtype=torch.float32)
        return made


def step_in_one_(
    weight: Tensor, extra: Tensor | None, state: dict[str, Tensor], group: dict[str, Any], factor: Tensor | None
) -> None:
    """The step as one Triton kernel, where the tensors are."""
    from training_hub.backends.torch_engine.optimizers.triton_kernels import adamw_

    assert weight.grad is not None
    step, (beta1, beta2) = float(state["step"]), group["betas"]
    borders = (tables(True, str(weight.device))[1], tables(False, str(weight.device))[1])
    corrections = (1 - beta1**step, (1 - beta2**step) ** 0.5)
    adamw_(
        weight, extra, weight.grad.contiguous(), state, borders,
        group["lr"], group["weight_decay"], group["betas"], group["eps"], corrections, factor,
    )  # fmt: skip


def _read(state: dict[str, Tensor], name: str, part: slice) -> Tensor:
    """One stretch of a moment in float32: a view of it, or made from its bytes."""
    if f"{name}_scale" not in state:
        return state[name].view(-1)[part]
    blocks = _blocks(part)
    return dequantize(state[name][blocks], state[f"{name}_scale"][blocks], part.stop - part.start, signed=MOMENTS[name])


def _write(state: dict[str, Tensor], name: str, part: slice, moment: Tensor) -> None:
    if f"{name}_scale" in state:
        blocks = _blocks(part)
        state[name][blocks], state[f"{name}_scale"][blocks] = quantize(moment, signed=MOMENTS[name])


def _blocks(part: slice) -> slice:
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))


def _adamw_(weight: Tensor, gradient: Tensor, moments: dict[str, Tensor], step: Tensor, group: dict[str, Any]) -> None:
    """One step of torch's fused AdamW on float32 tensors, in place."""
    mean, square = moments["exp_avg"], moments["exp_avg_sq"]
    adamw(
        [weight], [gradient], [mean], [square], [], [step], fused=True, amsgrad=False, maximize=False,
        beta1=group["betas"][0], beta2=group["betas"][1],
        lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
    )  # fmt: skip
