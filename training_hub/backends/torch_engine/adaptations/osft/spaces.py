"""What trains in the low parts of a model's weights, and how it becomes the weights that forward and backward use.

Forward and backward are those of the dense model. Once per optimizer step, the dense gradients become gradients of what
trains (`gather`), these are cleared of what points into the protected space (`before_step`), the optimizer moves, and
the weights follow (`after_step`).
"""

# N rows, M <= N columns, k protected, r low directions, as in decompose.py

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training_hub.backends.torch_engine.adaptations.osft.core import Core
from training_hub.backends.torch_engine.adaptations.osft.decompose import Split
from training_hub.backends.torch_engine.adaptations.osft.factors import Factors
from training_hub.backends.torch_engine.adaptations.osft.table import Row
from training_hub.backends.torch_engine.adaptations.osft.targets import Target
from training_hub.backends.torch_engine.layouts.owners import Dealt
from training_hub.backends.torch_engine.layouts.pieces import cut_like, cut_of, local_of, whole_of

MARK = ".osft."
"""Stands between the name of a target or a parameter and what is kept for it."""

OF_START = "start"
"""What is kept for a parameter to tell that a checkpoint has what it came as."""

FORMS: Mapping[str, type[Factors] | type[Core]] = {"factors": Factors, "core": Core}


@dataclass(frozen=True)
class Space:
    """One target with what trains in it."""

    target: Target
    trained: Factors | Core

    def weights(self) -> dict[str, Tensor]:
        """What the optimizer moves, by full name."""
        return {f"{self.target.name}{MARK}{key}": tensor for key, tensor in self.trained.weights().items()}

    def fixed(self) -> dict[str, Tensor]:
        """The split, by full name."""
        return {f"{self.target.name}{MARK}split.{key}": t for key, t in self.trained.split.tensors().items()}


class LowSpaces:
    """The low parts of all targets.

    A parameter in float32 or float64 goes back to its start before a step, by its D = L V0, and on from there after it,
    so that its start needs no memory. One in bfloat16 keeps its start, and is the rounding of start + D; its gradients
    are in bfloat16, and so are the products with them (a sum over several packs is in float32). D and all that it comes
    from is in float32.

    What trains in a parameter that is dealt out lies in one of the processes that have pieces of it. The others send
    that their pieces of the dense gradient, and get their pieces of the update.
    """

    def __init__(
        self,
        pairs: Iterable[tuple[Target, Split]],
        form: str,
        starts: Mapping[str, Tensor] | None = None,
        *,
        is_layerwise: bool = False,
        parameters: Mapping[str, nn.Parameter] | None = None,
        dealt: Dealt | None = None,
    ):
        """starts: what the parameters in bfloat16 came as, or this process's pieces of it, where that is finer than
        they are. is_layerwise: turn each dense gradient into those of what trains as soon as backward has it, and free
        it. parameters: those that targets are cut from, also where another process has the target, as `dealt` says."""
        self.spaces = [Space(target, FORMS[form](split)) for target, split in pairs]
        of_spaces = {one.target.parameter_name: one.target.parameter for one in self.spaces}
        self.parameters = dict(of_spaces if parameters is None else parameters)
        self._dealt = dealt or Dealt({}, torch.empty(0))
        self._starts = _starts_of(self.parameters, starts or {})
        self._sums: dict[str, Tensor] = {}
        self._moved = [(one.target.parameter_name, torch.zeros(()), torch.zeros(())) for one in self.spaces]
        self._is_layerwise, self._is_last_backward = is_layerwise, False
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(self._taken(name))

    def pairs(self) -> list[tuple[Target, Split]]:
        """The targets and their splits."""
        return [(one.target, one.trained.split) for one in self.spaces]

    def rows(self) -> dict[str, Row]:
        """What to tell of each target, by its name."""
        return {
            one.target.name: Row(
                one.target.parameter_name,
                one.trained.split.short_side - one.trained.split.left.shape[-1],
                one.trained.split.short_side,
                sum(tensor.numel() for tensor in one.weights().values()),
            )
            for one in self.spaces
        }

    def has(self, key: str) -> bool:
        """Whether what a checkpoint calls so is kept for a target, or a parameter, that is here."""
        name, _, what = key.partition(MARK)
        return name in self.parameters if what == OF_START else any(name == one.target.name for one in self.spaces)

    def divide(self, parameters: Mapping[str, nn.Parameter], dealt: Dealt) -> None:
        """Take these, which are divided over processes, in place of the whole ones. What trains stays whole: in each
        process, or in that to which it is dealt."""
        before, self._dealt = self.parameters, dealt
        self.spaces = [
            replace(one, target=replace(one.target, parameter=parameters[one.target.parameter_name]))
            for one in self.spaces
            if one.target.parameter_name not in dealt.names - dealt.mine
        ]
        self.parameters = {name: parameters[name] for name in before}
        self._moved = [one for one in self._moved if one[0] not in dealt.names - dealt.mine]
        self._starts = _starts_of(
            self.parameters, {name: _own_piece(start, self.parameters[name]) for name, start in self._starts.items()}
        )
        for name, parameter in self.parameters.items():
            if parameter is not before[name]:
                parameter.register_post_accumulate_grad_hook(self._taken(name))

    def weights(self) -> dict[str, Tensor]:
        """What the optimizer moves, by name: `<target>.osft.<factor>`."""
        return {name: tensor for one in self.spaces for name, tensor in one.weights().items()}

    def sources(self) -> dict[str, str]:
        """By the name of each of `weights`, the parameter that it moves."""
        return {name: one.target.parameter_name for one in self.spaces for name in one.weights()}

    def expect_last_backward(self) -> None:
        """The next backward completes the gradients of a step: each dense one is free once it is there."""
        self._is_last_backward = True

    def collect(self) -> None:
        """Take gradients that something else than backward has made, which calls no hooks."""
        for name, parameter in self.parameters.items():
            self._taken(name)(parameter)

    @torch.no_grad()
    def gather(self) -> None:
        """Turn the dense gradients of the step that are still there into those of what trains, and free them."""
        self._is_last_backward = False
        for name in self._alike:
            gradient = self._take_gradient(name)
            if gradient is not None:
                self._add_gradient(name, gradient)
        for name, whole in self._dealt.brought(self._take_gradient):
            self._add_whole_gradient(name, whole)

    def drop_gradients(self) -> None:
        """Forget all gradients, and free their memory."""
        self._is_last_backward = False
        self._sums.clear()
        for tensor in (*self.parameters.values(), *self.weights().values()):
            tensor.grad = None

    @torch.no_grad()
    def before_step(self, rate: float = 0.0, decay: float = 0.0, *, is_decoupled: bool = True) -> None:
        """Project the gradients; decay U, S and V (or C), which the optimizer does not know. Until `after_step` the
        parameters in float32 or float64 are where they started.

        is_decoupled: the decay shrinks the weights by rate x decay, as AdamW does; else it is added to the gradient.
        """
        self._add_dealt(self._dealt.names, lambda name: self._add_low(name, self._nothing(name), -1))
        others = self._starts.keys() | self._dealt.names
        for one in self.spaces:
            if one.target.parameter_name not in others:
                one.target.add(one.target.parameter.data, one.trained.low().neg_(), one.trained.split.right)
            weights = one.trained.weights()
            gradients = {key: weight.grad for key, weight in weights.items() if weight.grad is not None}
            if not gradients:
                continue
            # Like the gradients themselves; what the optimizer makes of them is projected exactly afterwards.
            is_low = one.target.parameter.dtype == torch.bfloat16
            gradients = one.trained.project(gradients, torch.bfloat16 if is_low else None)
            for key, total in one.trained.totals().items() if decay else ():
                moved, factor = (weights[key], -rate * decay) if is_decoupled else (gradients[key], decay)
                moved.add_(total, alpha=factor)
            for key, gradient in gradients.items():
                weights[key].grad = gradient

    @torch.no_grad()
    def after_step(self) -> None:
        """Project what the optimizer moved, and let the weights follow: one at a time, which is all that is held."""
        self._moved = []
        for name in self._alike:
            parameter, start = self.parameters[name], self._starts.get(name)
            total = parameter.data if start is None else start.to(torch.float32, copy=True)
            self._add_projected(name, total)
            if start is not None:
                local_of(parameter.data).copy_(local_of(total))
        self._add_dealt(self._dealt.names, lambda name: self._add_projected(name, self._nothing(name)))

    def _add_projected(self, name: str, total: Tensor) -> Tensor:
        """Project what the optimizer moved in the parameter `name`, and add what that makes of it to `total`."""
        for one in self._of(name):
            weights = one.trained.weights()
            for key, projected in one.trained.project(weights).items():
                weights[key].copy_(projected)
            low = one.trained.low()
            self._moved.append((name, *leak_and_size(one.trained.split, low)))
            one.target.add(total, low, one.trained.split.right)
        return total

    def is_finer(self, name: str) -> bool:
        """Whether the parameter `name` began from finer numbers than it holds."""
        return name in self._starts and self._starts[name].dtype != self.parameters[name].dtype

    def exact(self, name: str) -> Tensor:
        """The parameter `name` before it is rounded to the format of the model."""
        start = self._starts.get(name)
        return self.parameters[name].detach() if start is None else self._sum(name, start)

    @torch.no_grad()
    def begun(self, name: str) -> Tensor | None:
        """This process's piece, in float32, of what the parameter `name` began as, where that is kept."""
        start = self._starts.get(name)
        return None if start is None else local_of(start).to(torch.float32, copy=True)

    @torch.no_grad()
    def completed(self, name: str, whole: Tensor) -> Tensor:
        """The parameter `name` before it is rounded, from `whole` of what `begun` gives: the product of its factors is
        made in one piece, as a process by itself makes it."""
        return self._add_low(name, whole.to(self._of(name)[0].trained.split.right.device))

    @torch.no_grad()
    def moved(self, speaks: Callable[[str], bool] = lambda name: True) -> tuple[Tensor, Tensor] | None:
        """The largest share of an update D that lies in the protected space, over all matrices; and the squared norms
        of all D and of all targets as they came. Of what trains, before rounding; None where there are no targets.

        speaks: for which parameters this process adds to the sums, where others have them, too."""
        spaces = [one for one in self.spaces if speaks(one.target.parameter_name)]
        if not spaces:
            return None
        moved = [one for one in self._moved if speaks(one[0])]
        leak = torch.stack([shares.max() for _, shares, _ in moved]).max()
        size = torch.stack([squares.double().sum() for _, _, squares in moved]).sum()
        whole = torch.stack([one.trained.split.norm.double().square().sum() for one in spaces]).sum()
        return leak, torch.stack([size, whole])

    def metrics(self) -> dict[str, Tensor]:
        """What is reported of `moved`; nothing where there are no targets."""
        found = self.moved()
        return reported(*found) if found is not None else {}

    def saved(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside `weights`: the dense weights (those in 16 bits as they came, of which a number
        under another name tells), and the splits, since another library or machine may turn singular vectors around."""
        dense = {name: self._starts.get(name, parameter.detach()) for name, parameter in self.parameters.items()}
        dense |= {_told_start(name): torch.ones((), device=start.device) for name, start in self._starts.items()}
        return dense | {name: t for one in self.spaces for name, t in one.fixed().items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `saved` gave, bit for bit where weights are in the format they had there; those of `weights`
        have been taken over already."""
        for one in self.spaces:
            for name, tensor in one.fixed().items():
                tensor.copy_(tensors[name])
        self._moved = [
            (one.target.parameter_name, *leak_and_size(one.trained.split, one.trained.low())) for one in self.spaces
        ]
        for name, parameter in self.parameters.items():
            self._take_over(name, parameter, tensors[name], is_start=_told_start(name) in tensors)
        begun = {name for name in self._dealt.names if _told_start(name) in tensors}
        self._add_dealt(begun, lambda name: self._add_low(name, self._nothing(name)))

    def _take_over(self, name: str, parameter: nn.Parameter, found: Tensor, *, is_start: bool) -> None:
        """found: this process's piece of the parameter as it stands, or of what it came as."""
        start = self._starts.get(name)
        if start is None:
            local_of(parameter.data).copy_(found)
            if is_start and name not in self._dealt.names:
                self._add_low(name, parameter.data)
            return
        if is_start:
            local_of(start).copy_(found)
        else:
            exact = start.to(torch.float32, copy=True)
            local_of(exact).copy_(found)
            local_of(start).copy_(local_of(self._add_low(name, exact, -1)))
        local_of(parameter.data).copy_(local_of(self._sum(name, start)))

    def _taken(self, name: str) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def take(parameter: Tensor) -> None:
            is_complete = (self._is_layerwise or self._is_last_backward) and _is_at_hand(parameter)
            if parameter.grad is None or not (is_complete or name in self._starts):
                return  # float32 adds up where backward puts it
            gradient, parameter.grad = local_of(cut_like(parameter.grad, parameter)), None
            before = self._sums.pop(name, None)
            total = gradient if before is None else before.add_(gradient)
            if is_complete:
                self._add_gradient(name, total)
            else:
                self._sums[name] = total.float()

        return take

    @property
    def _alike(self) -> list[str]:
        """The parameters of which each process that has a piece has what trains."""
        return [name for name in self.parameters if name not in self._dealt.names]

    def _take_gradient(self, name: str) -> Tensor | None:
        """This process's piece of the dense gradient, which is forgotten."""
        parameter = self.parameters[name]
        gradient = self._sums.pop(name, parameter.grad)
        parameter.grad = None
        return None if gradient is None else local_of(cut_like(gradient, parameter))

    def _add_dealt(self, names: Collection[str], make: Callable[[str], Tensor]) -> None:
        """Add to the pieces of dealt parameters what `make` gives as a whole where they are kept."""
        for name, piece in self._dealt.given(names, make):
            local = local_of(self.parameters[name].data)
            local.add_(piece.to(local.device))

    def _nothing(self, name: str) -> Tensor:
        """Zeros in the shape of a dealt parameter that is kept here."""
        parameter = self.parameters[name]
        return self._of(name)[0].trained.split.right.new_zeros(parameter.shape, dtype=parameter.dtype)

    def _add_gradient(self, name: str, gradient: Tensor) -> None:
        """gradient: this process's piece of it."""
        self._add_whole_gradient(name, whole_of(gradient, self.parameters[name]))

    def _add_whole_gradient(self, name: str, gradient: Tensor) -> None:
        for one in self._of(name):
            weights = one.trained.weights()
            dense = one.target.view(gradient)
            if dense.dtype != torch.bfloat16:
                dense = dense.to(one.trained.split.left.dtype)
            for key, part in one.trained.gradients(dense).items():
                sum_so_far = weights[key].grad
                weights[key].grad = part if sum_so_far is None else sum_so_far.add_(part)

    def _of(self, name: str) -> Sequence[Space]:
        return [one for one in self.spaces if one.target.parameter_name == name]

    def _sum(self, name: str, start: Tensor) -> Tensor:
        return self._add_low(name, start.to(torch.float32, copy=True))

    def _add_low(self, name: str, total: Tensor, times: int = 1) -> Tensor:
        """Add the update D of the parameter `name`, so many times, to `total`, in place."""
        for one in self._of(name):
            one.target.add(total, one.trained.low().mul_(times), one.trained.split.right)
        return total


def _starts_of(parameters: Mapping[str, nn.Parameter], came: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What those in 16 bits begin as, cut as they are: what they came as where that is finer, else as they are.

    came: this process's pieces of what they came as."""
    finer = {name: start for name, start in came.items() if start.dtype == torch.float32}
    return {
        name: _divided_as(p, finer[name]) if name in finer else p.detach().clone()
        for name, p in parameters.items()
        if is_low_precision(p)
    }


def _own_piece(whole: Tensor, weight: Tensor) -> Tensor:
    """Of a whole tensor what this process has of one that is divided as `weight` is, in memory of its own."""
    return whole[cut_of(weight).slices].clone() if isinstance(weight, DTensor) else whole


def _divided_as(weight: Tensor, piece: Tensor) -> Tensor:
    if not isinstance(weight, DTensor):
        return piece
    return DTensor.from_local(
        piece, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )


def _told_start(name: str) -> str:
    return f"{name}{MARK}{OF_START}"


def _is_at_hand(parameter: Tensor) -> bool:
    """Whether all processes that have pieces of this weight have its gradient at one point of the backward pass."""
    return not isinstance(parameter, DTensor) or parameter.device_mesh.mesh_dim_names == ("tp",)


def reported(leak: Tensor, squares: Tensor) -> dict[str, Tensor]:
    """`osft_leak` and `osft_drift`, which is the norm of all updates over that of all targets as they came, from what
    `LowSpaces.moved` says."""
    return {"osft_leak": leak, "osft_drift": (squares[0] / squares[1]).sqrt()}


def leak_and_size(split: Split, low: Tensor) -> tuple[Tensor, Tensor]:
    """Of D = L V0, the share of its norm inside the protected space, and its squared norm; [...] each.

    V0 has orthonormal rows, so the norm of D is that of L. What lies in both protected spaces is counted twice.
    """
    size = low.square().sum((-2, -1))
    inside = ((low.mT @ low) * split.overlap_right).sum((-2, -1))
    if split.is_square:
        c = split.left.mT @ low
        inside = inside + ((c @ c.mT) * split.overlap_left).sum((-2, -1))
    else:
        inside = inside + (split.protected.mT @ low).square().sum((-2, -1))
    return (inside.clamp_min(0) / size.clamp_min(torch.finfo(size.dtype).tiny)).sqrt(), size


def is_low_precision(parameter: Tensor) -> bool:
    """Whether a parameter is the rounding of something finer."""
    return parameter.dtype not in (torch.float32, torch.float64)


def parameters_of(targets: Iterable[Target]) -> dict[str, nn.Parameter]:
    """The parameters that targets are cut from, by name."""
    return {one.parameter_name: one.parameter for one in targets}
