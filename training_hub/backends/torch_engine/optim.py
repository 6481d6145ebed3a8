"""The optimizer step: gradients summed in float32, clipped, applied to float32 weights.

The optimizer owns precision. A parameter in bfloat16 carries a float32 master here: gradients of the micro-steps are
added up in the master's format, torch's optimizer moves the master, and the parameter becomes its rounding. bfloat16
has 8 bits of mantissa, so without a master a step at learning rate 1e-6 rounds to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from training_hub.recipe.sections import Optimizer as OptimizerSettings

FUSED = frozenset({"AdamW", "Adam", "SGD", "Adagrad"})  # have fused kernels on CPU and CUDA in torch 2.11 and later
LOW_PRECISION = (torch.bfloat16, torch.float16)


class Masters:
    """The weights the optimizer moves, by name: parameters themselves, or float32 masters of low-precision ones."""

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]]):
        self.parameters = {name: p for name, p in named_parameters if p.requires_grad}
        self.weights: dict[str, Tensor] = {}
        self._low: list[str] = []
        for name, parameter in self.parameters.items():
            if parameter.dtype not in LOW_PRECISION:
                self.weights[name] = parameter
                continue
            self.weights[name] = parameter.detach().float()
            self._low.append(name)
            parameter.register_post_accumulate_grad_hook(_move_grad_to(self.weights[name]))

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the parameters that forward and backward use."""
        if self._low:
            torch._foreach_copy_(
                [self.parameters[name].data for name in self._low], [self.weights[name] for name in self._low]
            )

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over `weights` by name, bit for bit, and publish them."""
        for name, weight in self.weights.items():
            weight.copy_(weights[name])
        self.publish()

    def drop_gradients(self) -> None:
        """Forget all gradients, and free their memory."""
        for weight in (*self.parameters.values(), *self.weights.values()):
            weight.grad = None


def _move_grad_to(master: Tensor) -> Callable[[Tensor], None]:
    def move(parameter: Tensor) -> None:
        gradient = parameter.grad
        parameter.grad = None
        if gradient is None:
            return
        if master.grad is None:
            master.grad = gradient.float()
        else:
            master.grad.add_(gradient)

    return move


class Updater:
    """torch's optimizer over the masters: clip, step, publish."""

    def __init__(self, masters: Masters, settings: OptimizerSettings, max_norm: float):
        self.masters = masters
        self.max_norm = max_norm
        self.optimizer = build_optimizer(masters.weights, settings)

    @torch.no_grad()
    def clip(self) -> Tensor:
        """Scale gradients down to `max_norm`; their norm before that, over all weights, as a float32 scalar."""
        weights = [weight for weight in self.masters.weights.values() if weight.grad is not None]
        limit = self.max_norm if self.max_norm > 0 else float("inf")
        return torch.nn.utils.clip_grad_norm_(weights, limit)

    def step(self, learning_rate: float) -> None:
        """Move the weights by their gradients, and forget the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.masters.publish()
        self.masters.drop_gradients()

    def state(self) -> dict[str, Tensor]:
        """The optimizer's tensors by `weight name/state name`; empty before the first step."""
        return {
            f"{name}/{key}": value
            for name, weight in self.masters.weights.items()
            for key, value in self.optimizer.state.get(weight, {}).items()
            if isinstance(value, Tensor)
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` gave, bit for bit."""
        packed = self.optimizer.state_dict()
        numbers = {id(weight): name for name, weight in self.masters.weights.items()}
        order = [numbers[id(weight)] for group in self.optimizer.param_groups for weight in group["params"]]
        by_weight: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, state = key.rpartition("/")
            by_weight.setdefault(name, {})[state] = tensor
        packed["state"] = {number: by_weight[name] for number, name in enumerate(order) if name in by_weight}
        self.optimizer.load_state_dict(packed)


def build_optimizer(weights: dict[str, Tensor], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """torch's optimizer `settings.name`; weight decay on tensors of two or more dimensions only."""
    groups = [
        {"params": [w for w in weights.values() if w.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [w for w in weights.values() if w.dim() < 2], "weight_decay": 0.0},
    ]
    kind = getattr(torch.optim, settings.name)
    arguments = ARGUMENTS[settings.name](settings)
    if settings.name in FUSED and all(weight.dtype != torch.float64 for weight in weights.values()):
        arguments["fused"] = True
    return kind([group for group in groups if group["params"]], lr=settings.lr, **arguments)


def _adam(settings: OptimizerSettings) -> dict[str, object]:
    return {"betas": (settings.beta1, settings.beta2), "eps": settings.eps}


def _rmsprop(settings: OptimizerSettings) -> dict[str, object]:
    return {"momentum": settings.momentum, "eps": settings.eps}


ARGUMENTS: dict[str, Callable[[OptimizerSettings], dict[str, object]]] = {
    "AdamW": _adam,
    "Adam": _adam,
    "NAdam": _adam,
    "RAdam": _adam,
    "SGD": lambda settings: {"momentum": settings.momentum},
    "RMSprop": _rmsprop,
    "Adagrad": lambda settings: {"eps": settings.eps},
    "Adafactor": lambda settings: {},
}
