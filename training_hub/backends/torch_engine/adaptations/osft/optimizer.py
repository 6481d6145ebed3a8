"""OSFT in anyone's training loop: an optimizer over a dense model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from training_hub.backends.torch_engine.adaptations.osft.decompose import rank_kept, split
from training_hub.backends.torch_engine.adaptations.osft.spaces import LowSpaces, parameters_of
from training_hub.backends.torch_engine.adaptations.osft.targets import find_targets
from training_hub.errors import RecipeError


class OsftOptimizer(torch.optim.Optimizer):
    """An optimizer of torch that moves the weights of a dense model without leaving their low singular directions.

        optimizer = OsftOptimizer(model, torch.optim.AdamW, unfreeze_rank_ratio=0.3, lr=1e-5)
        loss.backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()

    `step` turns the dense gradients into those of the factors, projects, moves, and rebuilds the weights in place.
    `osft_leak` and `osft_drift` are in `metrics()`. `param_groups` and `state` are those of the optimizer inside, so
    torch's schedulers work on it. Weights that are not targets train in full, or with others="freeze" not at all.
    `state_dict` is refused: save `tensors()`, which holds all that a loop needs to go on, and give it to `load`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer_class: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        *,
        unfreeze_rank_ratio: float,
        target_patterns: Sequence[str] | None = None,
        form: str = "factors",
        others: str = "train",
        split_fused: bool = False,
        is_layerwise: bool = False,
        **optimizer_arguments: Any,
    ):
        """optimizer_arguments: for optimizer_class; weight_decay reaches the factors as well, as in the reference.

        Raises RecipeError where a target pattern matches nothing, or the optimizer's step depends on a weight's size.
        """
        if optimizer_class is torch.optim.Adafactor:
            raise RecipeError(
                "Adafactor: its step depends on the size of a weight, and OSFT trains differences. Use AdamW."
            )
        if not 0 <= unfreeze_rank_ratio <= 1:
            raise RecipeError(f"unfreeze_rank_ratio must be between 0.0 and 1.0, but got {unfreeze_rank_ratio}")
        found = find_targets(model, target_patterns, splits_fused=split_fused)
        kept = {one.name: rank_kept(one.short_side, unfreeze_rank_ratio) for one in found}
        frozen = {id(p) for p in parameters_of(found).values()} if unfreeze_rank_ratio == 0 else set()
        targets = [] if unfreeze_rank_ratio in (0, 1) else found
        held = {id(p) for p in parameters_of(targets).values()}
        for parameter in model.parameters():
            is_other = id(parameter) not in held
            parameter.requires_grad_(not (id(parameter) in frozen or (is_other and others == "freeze")))
        with torch.no_grad():
            pairs = [(one, split(one.view(one.parameter.detach()), kept[one.name])) for one in targets]
        self.spaces = LowSpaces(pairs, form, is_layerwise=is_layerwise)
        self._others = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in held}
        groups: list[dict[str, Any]] = [{"params": list(self._others.values())}] if self._others else []
        if targets:
            groups.append({"params": list(self.spaces.weights().values()), "weight_decay": 0.0})
        self.inner = optimizer_class(groups, **optimizer_arguments)
        self._decay = float(self.inner.defaults.get("weight_decay") or 0.0)
        self._is_gathered = False
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients of what trains down to `max_norm`; their norm before that. Call it in place of torch's,
        which would see the dense gradients."""
        self._gather()
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        return nn.utils.clip_grad_norm_(trained, max_norm)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move the weights by the gradients that backward left; a closure would need a forward within the step."""
        if closure is not None:
            raise RecipeError("OsftOptimizer.step takes no closure: call backward first, then step().")
        self._gather()
        is_decoupled = bool(self.param_groups[-1].get("decoupled_weight_decay", False))
        self.spaces.before_step(float(self.param_groups[-1]["lr"]), self._decay, is_decoupled=is_decoupled)
        self.inner.step()
        self.spaces.after_step()
        self._is_gathered = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        self.spaces.drop_gradients()
        self.inner.zero_grad(set_to_none)
        self._is_gathered = False

    def metrics(self) -> dict[str, float]:
        """The largest share of an update inside a protected space, and how far all targets have moved."""
        return {name: float(value) for name, value in self.spaces.metrics().items()}

    def tensors(self) -> dict[str, Tensor]:
        """All that a loop needs to go on but the learning rate: weights, splits, factors, and the optimizer's own."""
        named = {**self._others, **self.spaces.weights()}
        states = {
            f"{name}/{key}": value
            for name, weight in named.items()
            for key, value in self.inner.state.get(weight, {}).items()
            if isinstance(value, Tensor)
        }
        return {name: t.detach().clone() for name, t in {**named, **self.spaces.saved(), **states}.items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` gave, bit for bit."""
        named = {**self._others, **self.spaces.weights()}
        for name, weight in named.items():
            weight.copy_(tensors[name])
            own = {key.rpartition("/")[2]: t for key, t in tensors.items() if key.rpartition("/")[0] == name}
            if own:
                self.inner.state[weight] = {key: tensor.clone() for key, tensor in own.items()}
        self.spaces.load(tensors)

    def state_dict(self) -> dict[str, Any]:
        raise RecipeError(
            "OsftOptimizer has no state_dict: save tensors(), for example by safetensors, and load(tensors)."
        )

    def _gather(self) -> None:
        if not self._is_gathered:
            self.spaces.gather()
        self._is_gathered = True
