"""OSFT as an adaptation: the large singular directions of each weight are protected, the small ones train.

Source: Nayak et al. 2025, arXiv:2504.07097; the trajectory is that of mini_trainer 0.9, computed on dense weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training_hub.backends.shared.model_folder import stored_dtype
from training_hub.backends.torch_engine.adaptations.full import Full
from training_hub.backends.torch_engine.adaptations.holdings import Beginning, Holdings, Part
from training_hub.backends.torch_engine.adaptations.osft.carry import FILE, NOTHING, read_state, state_of
from training_hub.backends.torch_engine.adaptations.osft.decompose import Split, rank_kept, scratch_bytes, split
from training_hub.backends.torch_engine.adaptations.osft.division import collected, dealt_over, over_all
from training_hub.backends.torch_engine.adaptations.osft.importance import shares_kept
from training_hub.backends.torch_engine.adaptations.osft.shelf import Shelf
from training_hub.backends.torch_engine.adaptations.osft.spaces import (
    MARK,
    OF_START,
    LowSpaces,
    is_low_precision,
    parameters_of,
    reported,
)
from training_hub.backends.torch_engine.adaptations.osft.table import Row, Weights, told
from training_hub.backends.torch_engine.adaptations.osft.targets import Target, find_targets
from training_hub.backends.torch_engine.layouts import WHOLE, Layout
from training_hub.backends.torch_engine.layouts.owners import Dealt
from training_hub.backends.torch_engine.layouts.stages import DEGREE
from training_hub.backends.torch_engine.loading.blank import has_numbers
from training_hub.backends.torch_engine.parallel import Group, shared_out
from training_hub.backends.torch_engine.saving.base_weights import (
    UNREAD,
    BaseWeights,
    OpenBase,
    Written,
    is_finer,
)
from training_hub.backends.torch_engine.saving.model_files import ModelFiles
from training_hub.data.cache import cache_folder
from training_hub.errors import RecipeError
from training_hub.recipe import Recipe
from training_hub.types import Console, Proof

DECOUPLED = (
    "AdamW", "Lion", "AdamW8bit", "Lion8bit", "PagedAdamW", "PagedAdamW8bit", "PagedLion", "PagedLion8bit",
)  # fmt: skip
"""Optimizers that decay weights themselves, apart from gradients."""

NEARLY_NOTHING = 1e-12
"""A ratio of 0 freezes a weight; a block that is to be kept whole still trains one direction."""


class Osft:
    """The adaptation that keeps every update out of the protected directions."""

    undivided: frozenset[str] = frozenset()
    adds_gradients: bool = False

    def __init__(self, recipe: Recipe):
        self._settings, self._optimizer = recipe.osft, recipe.optimizer
        self._came_from = Path(recipe.model.path).expanduser()
        root = cache_folder(recipe.data.cache_dir) / "osft"
        self._shelf = Shelf(root, recipe.data.cache_size * 1e9) if recipe.osft.cache else None
        self._full = Full()
        self._targets: list[Target] = []
        self._spaces = LowSpaces([], self._settings.form)
        self._shares: dict[str, float] = {}
        self._layout = WHOLE
        self._is_staged = recipe.parallelism.pipeline_parallel_degree > 1
        self._base = UNREAD
        self._weights = Weights({}, frozenset())
        self._here: frozenset[str] = frozenset()
        self._tied: dict[str, list[str]] = {}
        self._dealt: Dealt | None = None
        self.claimed: frozenset[str] = frozenset()

    def begins_beside(self) -> str:
        """Factors are made in `begin`, each of a whole weight, which is read for that alone."""
        return ""

    def attach(self, model: nn.Module, console: Console | None = None) -> nn.Module:
        """The same model; what is frozen gets no gradient. Weights are looked at in `begin`.

        Raises RecipeError where a target pattern matches nothing, or a weight that two stages have.
        """
        settings, ratio = self._settings, self._settings.unfreeze_rank_ratio
        found = find_targets(self._full.attach(model), settings.targets, splits_fused=settings.split_fused)
        is_carried = settings.carry and (self._came_from / FILE).is_file()
        if ratio == 0:
            self._targets = []
        elif ratio is None or is_carried or settings.importance:
            self._targets = found
        else:
            # A weight of which no part has a direction to protect trains in full.
            cut = {one.parameter_name for one in found if rank_kept(one.short_side, ratio) > 0}
            self._targets = [one for one in found if one.parameter_name in cut]
        self.claimed = frozenset(parameters_of(self._targets))
        if self._is_staged:
            _refuse_ends(model, self._targets)
        chosen = parameters_of(found).keys()
        for name, parameter in model.named_parameters():
            if (ratio == 0 and name in chosen) or (settings.others == "freeze" and name not in chosen):
                parameter.requires_grad_(False)
        self._model, self._weights = model, Weights.of(model)
        self._here = frozenset(self._weights.numbers)
        firsts = {id(parameter): name for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._tied.setdefault(firsts[id(parameter)], []).append(name)
        return model

    def weigh(self, importance: Mapping[str, float]) -> None:
        """Share the ranks out by the importance of each block, by its name; for `begin`, which comes after."""
        settings = self._settings
        target = 1 - (settings.unfreeze_rank_ratio or 0.0)
        self._shares = shares_kept(importance, settings.least_kept, target)

    def share_work(self, layout: Layout) -> None:
        """Let each process decompose a share of the weights that it will have; for `begin`, which comes after. The
        model must still be whole."""
        self._layout, self._here = layout, frozenset(layout.names_here(self._model))

    def begin_as_it_came(self, base: BaseWeights) -> None:
        """Decompose the weights that came, and go on from them, not from their rounding; for `begin`."""
        self._base = base

    def holdings(self) -> Holdings:
        """What the run will hold for OSFT; where `energy` decides the ranks, as if half of each were protected."""
        parts: dict[str, Part] = {}
        for one in self._targets:
            before, more = parts.get(one.parameter_name), self._part(one)
            parts[one.parameter_name] = more if before is None else before.with_more(more)
        trained, fixed = (sum(getattr(one, name) for one in parts.values()) for name in ("trained", "fixed"))
        dense = sum(one.size for one in parts.values())
        waiting = trained if self._settings.gradients == "layer" else dense
        is_finer = self._came_from.is_dir() and stored_dtype(self._came_from) != "bfloat16"
        width = 4 if is_finer else 2
        return Holdings(
            self.claimed, trained, fixed, dense, width, waiting, trained, dense + fixed, parts=tuple(parts.values()),
            beginning=self._beginning(),
        )  # fmt: skip

    def _beginning(self) -> Beginning:
        """What there is while the matrix is decomposed that takes most; of a stack one at a time."""
        shapes = [_shape(one)[1:] for one in self._targets]
        takes = [
            Beginning(rows * columns, scratch_bytes(rows, columns, self._low(columns))) for rows, columns in shapes
        ]
        return max(takes, key=lambda one: one.scratch, default=Beginning())

    def _low(self, columns: int) -> int:
        """How many directions train of so many."""
        ratio = self._settings.unfreeze_rank_ratio
        return columns - (columns // 2 if ratio is None else rank_kept(columns, ratio))

    def _part(self, target: Target) -> Part:
        """What there will be of a target, which may be a part of its parameter."""
        is_core = self._settings.form == "core"
        stack, rows, columns = _shape(target)
        low, is_square = self._low(columns), rows == columns
        per_factors, per_core = low * (rows + columns + 1), low * (low if is_square else rows)
        beside = low**2 if is_square else rows * (columns - low)
        return Part(
            target.parameter_name,
            size=stack * rows * columns,
            trained=stack * (per_core if is_core else per_factors),
            fixed=stack * (per_factors + low**2 + beside + 1),
            is_stack=target.parameter.dim() > 2,
        )

    def expect_steps(self, total: int) -> None:
        """Nothing depends on how many steps the run has."""

    @torch.no_grad()
    def begin(self, console: Console) -> None:
        """Decompose the targets, and say what is protected, trained in full and frozen.

        Of a model that had no contents when it was attached, and has been divided since, each target is read whole
        where it is decomposed, one at a time.
        """
        earlier = read_state(self._came_from, self._targets) if self._settings.carry else NOTHING
        if not self._settings.carry and (self._came_from / FILE).is_file():
            console.say(
                f"osft: {self._came_from / FILE} is not used, since osft.carry is false: a fresh decomposition may "
                "leave unprotected what an earlier task wrote"
            )
        elif earlier.path is not None:
            console.say(f"osft: going on from what {self._came_from / FILE} protects")
        targets = [one for one in self._targets if one.parameter_name in self._here]
        costs = {one.name: _cost(one) for one in targets}
        named = {one.name: one for one in targets}
        number, count = self._layout.alike
        # The largest first, so that the time left is not told too short.
        own = shared_out(costs, count)[number]
        self._layout.group.note("the decomposition of weights")
        splits: dict[str, Split] = {}
        with (
            self._base.opened() as came,
            console.progress("decomposing weights", sum(costs[name] for name in own), "GFLOP") as advance,
        ):
            for name in own:
                splits[name] = self._split(named[name], earlier.of(name), console, came)
                advance(costs[name])
            splits = collected(splits, targets, self._layout, self._dealt)
            targets = [self._present(one) for one in targets]
            starts = {name: _start(name, p, came) for name, p in parameters_of(targets).items() if is_low_precision(p)}
        self._base.let_go(starts)
        pairs = [(one, splits.pop(one.name)) for one in targets if one.name in splits]
        is_layerwise = self._settings.gradients == "layer"
        self._spaces = LowSpaces(
            pairs, self._settings.form, starts, is_layerwise=is_layerwise, parameters=parameters_of(targets),
            dealt=self._dealt,
        )  # fmt: skip
        for block, share in self._shares.items():
            console.say(f"osft: {block} keeps {share:.1%} of its directions, by its importance")
        told_here = {name: asdict(row) for name, row in self._spaces.rows().items()}
        is_dealt = self._layout.is_sharded
        each = self._layout.group.gather(told_here) if is_dealt else [self._layout.told_by_stages(told_here)]
        rows = {name: row for some in each for name, row in some.items()}
        for line in told(self._weights, [Row(**row) for row in rows.values()]):
            console.say(f"osft: {line}")

    def shared(self) -> None:
        """Nothing is made of weights that are not here yet."""

    def filled(self) -> None:
        """Nothing to learn from weights that are about to change: it changes them itself."""

    def divided(self) -> None:
        """Hold on to the model's parameters as they are now: divided over processes. What trains in those that lie in
        slices stays in one process for each, or will."""
        parameters = dict(self._model.named_parameters())
        claimed = {name: one for name, one in parameters.items() if name in self.claimed}
        self._dealt = dealt_over(claimed, self._layout)
        self._spaces.divide(parameters, self._dealt)
        self._targets = [replace(one, parameter=_only_shape(one.parameter)) for one in self._targets]

    def weights(self) -> dict[str, Tensor]:
        """What the optimizer moves beside the model's own parameters, by name."""
        return self._spaces.weights()

    @property
    def dealt(self) -> frozenset[str]:
        """Parameters of which `weights`, and what is kept beside these, lie in one process of those with pieces."""
        return self._dealt.names if self._dealt is not None else frozenset()

    def sources(self) -> dict[str, str]:
        """By the name of each of `weights`, the parameter whose gradient its own is made from."""
        return self._spaces.sources()

    def begun(self, name: str) -> Tensor | None:
        """This process's piece of what a claimed parameter in 16 bits began as, in float32; None for others."""
        return self._spaces.begun(name) if name in self.claimed else None

    def completed(self, name: str, whole: Tensor) -> Tensor:
        """A claimed parameter before it was rounded: `whole` of what it began as, with what was learned."""
        return self._spaces.completed(name, whole)

    def expect_last_backward(self) -> None:
        """Let the next backward turn each dense gradient into those of `weights` as soon as it is there."""
        self._spaces.expect_last_backward()

    def collect(self) -> None:
        """Take gradients that something else than backward has made."""
        self._spaces.collect()

    def gather(self) -> None:
        """Turn the dense gradients of the claimed parameters into those of `weights`."""
        self._spaces.gather()

    def drop_gradients(self) -> None:
        """Forget all gradients of the claimed parameters and of `weights`."""
        self._spaces.drop_gradients()

    def before_step(self, rate: float) -> None:
        """Project the gradients, and decay the factors."""
        is_decoupled = self._optimizer.name in DECOUPLED
        self._spaces.before_step(rate, self._optimizer.weight_decay, is_decoupled=is_decoupled)

    def after_step(self) -> None:
        """Project the factors, and rebuild the weights from them."""
        self._spaces.after_step()

    def metrics(self) -> dict[str, Tensor]:
        """`osft_leak`: the largest share of an update that lies in the protected space, over all matrices; and
        `osft_drift`: the norm of all updates over that of all targets as they came. Both before rounding."""
        if not self._targets:
            return {}
        device = self._layout.device
        nothing = torch.zeros((), device=device), torch.zeros(2, dtype=torch.float64, device=device)
        if self._layout.is_sharded:
            leak, squares = self._spaces.moved(self._speaks) or nothing
            return reported(over_all(leak, is_highest=True), over_all(squares))
        leak, squares = self._spaces.moved() or nothing
        return reported(self._layout.over_stages(leak, is_highest=True), self._layout.over_stages(squares))

    def _speaks(self, name: str) -> bool:
        """Whether this process is the first of those that have what trains in the parameter `name`."""
        is_dealt = name in self.dealt
        return not self._layout.is_copy(name, self._spaces.parameters[name]) if is_dealt else self._layout.is_first

    def is_here(self, key: str) -> bool:
        """Whether a tensor of a checkpoint that is called so belongs to a weight of this process."""
        return self._spaces.has(key)

    def is_spoken_for(self, key: str) -> bool | None:
        """Whether this process writes what a checkpoint calls so of a parameter that is dealt out; None for others."""
        name = self._parameter_of(key)
        return self.is_here(key) and self._speaks(name) if name in self.dealt else None

    def saved(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside the weights that the optimizer moves."""
        return self._spaces.saved()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `saved` gave."""
        self._spaces.load(tensors)

    def export(self, weights: dict[str, Tensor], written: Written, came: OpenBase | None = None) -> dict[str, Tensor]:
        """The state dict to write, as Full gives it: an ordinary dense model."""
        whole = {name: p for name, p in self._spaces.parameters.items() if name not in weights}
        lost = [name for name, p in whole.items() if p.dtype != written.dtype or self._spaces.is_finer(name)]
        exact = {name: self._spaces.exact(name) for name in lost}
        dense = {name: weight for name, weight in weights.items() if name not in self._spaces.weights()}
        return self._full.export({**dense, **exact}, written, came)

    files: ModelFiles | None = None
    """How the final model is written and read again: as a whole one."""

    def proofs(self) -> list[Proof]:
        """What an adaptation itself can prove before the first step: nothing; leak and drift are told in each step."""
        return []

    def further(self, final: Path, rows: Sequence[Sequence[int]], console: Console, group: Group) -> None:
        """Make something of the final model beside it: nothing."""

    def beside(self) -> dict[str, dict[str, Tensor]]:
        """Further safetensors files of the final model's folder, by name; of the layers that are here."""
        return {FILE: state_of(self._spaces.pairs())} if self._settings.carry else {}

    def _split(self, target: Target, before: Split | None, console: Console, came: OpenBase) -> Split:
        ratio, energy = self._settings.unfreeze_rank_ratio, self._settings.energy or 0.0
        weight = self._whole(target, came)
        if before is not None:
            before = Split(**{name: tensor.to(weight.device) for name, tensor in before.tensors().items()})
        free = before.right.shape[-2] if before is not None else target.short_side
        shares = (share for block, share in self._shares.items() if target.parameter_name.startswith(f"{block}."))
        ratio = next((max(1 - share, NEARLY_NOTHING) for share in shares), ratio)
        kept = None if ratio is None else rank_kept(free, ratio)
        if self._shelf is None or before is not None:
            return split(weight, kept, before, energy)
        cut = f"energy {energy}" if kept is None else f"kept {kept}"
        return self._shelf.get(weight, cut, lambda: split(weight, kept, energy=energy), console.say)

    def _parameter_of(self, key: str) -> str:
        """The parameter for a target of which a checkpoint has what it calls so; "" where that is told of a start."""
        name, _, what = key.partition(MARK)
        return "" if what == OF_START else next((t.parameter_name for t in self._targets if t.name == name), "")

    def _present(self, target: Target) -> Target:
        """The target with the parameter that the model has now."""
        return replace(target, parameter=self._model.get_parameter(target.parameter_name))

    def _whole(self, target: Target, came: OpenBase) -> Tensor:
        """What a target begins as, from the files where the model had no contents when it was attached."""
        like = target.parameter
        if has_numbers(like):
            return target.view(_start(target.parameter_name, like, came))
        names = self._tied.get(target.parameter_name, [target.parameter_name])
        part = came.part(next(name for name in names if came.has(name, like)), target.cut)
        is_kept = is_low_precision(like) and is_finer(part.dtype, like.dtype)
        part = part.to(self._layout.device, torch.float32 if is_kept else like.dtype)
        return part.mT if target.is_wide else part


def _refuse_ends(model: Any, targets: Sequence[Target]) -> None:
    """Raise RecipeError where a table that is also the head is to be decomposed, which lies in two stages."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if table is head and any(one.parameter is table for one in targets):
        raise RecipeError(
            f"osft.targets: the table that is also the head lies in the first stage and in the last. Name other "
            f"weights, or write {DEGREE}: 1."
        )


def _start(name: str, parameter: Tensor, came: OpenBase) -> Tensor:
    """What a weight begins as, or this process's piece of it: a copy where it is finer than the parameter, in float32
    then."""
    exact = came.finer(name, parameter) if is_low_precision(parameter) else None
    return parameter.detach() if exact is None else exact.to(parameter.device, torch.float32, copy=True)


def _only_shape(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter without its contents, which nobody shall keep who asks for its shape."""
    return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)


def _cost(target: Target) -> float:
    """Operations of the Gram matrix and its eigenvectors, in 1e9: 2 N M^2 + 9 M^3 for each matrix, about."""
    stack, rows, columns = _shape(target)
    return stack * (2 * rows * columns**2 + 9 * columns**3) / 1e9


def _shape(target: Target) -> tuple[int, int, int]:
    """Matrices in the stack, their rows and their columns."""
    *stack, rows, columns = target.view(target.parameter.detach()).shape
    return torch.Size(stack).numel(), rows, columns
