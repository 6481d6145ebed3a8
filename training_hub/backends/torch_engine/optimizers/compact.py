"""AdamW that keeps less: masters split into weight and extra bits, moments as one byte for each number.

Each step is torch's own fused kernel, run over one stretch of a weight after another on float32 copies made for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from training_hub.backends.torch_engine.optimizers.blocks import BLOCK, LEAST, dequantize, quantize
from training_hub.backends.torch_engine.optimizers.split import join, split

STRETCH = 2**24
"""Numbers that are float32 at a time: 64 MiB for each of weight, gradient and two moments. A multiple of BLOCK."""

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""What is kept for each number, by name, and whether it has a sign."""


def moment_bytes(count: int) -> int:
    """Bytes of the 8-bit moments of a weight of `count` numbers."""
    blocks = -(-count // BLOCK)
    return len(MOMENTS) * (blocks * (BLOCK + 4) if count >= LEAST else 4 * count)


class CompactAdamW(torch.optim.Optimizer):
    """AdamW over float32 weights, and bfloat16 ones whose gradients are float32 and whose `extras` make them exact.

    extras: int16, by the weight they belong to. With float32 moments the weights move exactly as torch's fused AdamW
    moves float32 masters.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], extras: Mapping[Tensor, Tensor], *, is_8bit: bool, **settings: Any
    ):
        super().__init__(groups, settings)
        self._extras, self._is_8bit = extras, is_8bit

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the tensors of `state_dict()` as they are; torch's own would cast them to the weights' format."""
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for number, kept in state_dict["state"].items():
            weight = weights[number]
            self.state[weight] = {name: tensor.to(weight.device) for name, tensor in kept.items()}

    def _move(self, weight: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state.update(self._fresh(weight))
        flat, gradient = weight.view(-1), weight.grad.reshape(-1)  # type: ignore[union-attr]
        extra = self._extras.get(weight)
        for start in range(0, flat.numel(), STRETCH):
            part = slice(start, min(start + STRETCH, flat.numel()))
            exact = flat[part] if extra is None else join(flat[part], extra.view(-1)[part])
            moments = [_read(state, name, part) for name in MOMENTS]
            _adamw_(exact, gradient[part], *moments, state["step"].clone(), group)
            for name, moment in zip(MOMENTS, moments, strict=True):
                _write(state, name, part, moment)
            if extra is not None:
                rounded, extra.view(-1)[part] = split(exact)
                flat[part] = rounded
        state["step"] += 1

    def _fresh(self, weight: Tensor) -> dict[str, Tensor]:
        made = {"step": torch.zeros((), device=weight.device)}
        is_low = self._is_8bit and weight.numel() >= LEAST
        for name in MOMENTS:
            if is_low:
                blocks = -(-weight.numel() // BLOCK)
                made[name] = torch.zeros(blocks, BLOCK, dtype=torch.uint8, device=weight.device)
                made[f"{name}_scale"] = torch.zeros(blocks, device=weight.device)  # and so all numbers are 0
            else:
                made[name] = torch.zeros_like(weight, dtype=torch.float32)
        return made


def _read(state: dict[str, Tensor], name: str, part: slice) -> Tensor:
    """One stretch of a moment in float32: a view of it, or made from its bytes."""
    if f"{name}_scale" not in state:
        return state[name].view(-1)[part]
    blocks = _blocks(part)
    return dequantize(
        state[name][blocks], state[f"{name}_scale"][blocks], part.stop - part.start, signed=MOMENTS[name]
    )


def _write(state: dict[str, Tensor], name: str, part: slice, moment: Tensor) -> None:
    if f"{name}_scale" in state:
        blocks = _blocks(part)
        state[name][blocks], state[f"{name}_scale"][blocks] = quantize(moment, signed=MOMENTS[name])


def _blocks(part: slice) -> slice:
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))


def _adamw_(
    weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: Tensor, group: dict[str, Any]
) -> None:
    """One step of torch's fused AdamW on float32 tensors, in place."""
    adamw(
        [weight], [gradient], [mean], [square], [], [step], fused=True, amsgrad=False, maximize=False,
        beta1=group["betas"][0], beta2=group["betas"][1],
        lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
    )  # fmt: skip
