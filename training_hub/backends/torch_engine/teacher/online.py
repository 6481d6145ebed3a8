"""The teacher as a second model, frozen, beside the student."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from training_hub.backends.torch_engine.as_forward import as_forward
from training_hub.backends.torch_engine.loading.model import choose_dtype, load_model
from training_hub.backends.torch_engine.objectives.cross_entropy import cross_entropy, decoder_states, model_logits
from training_hub.backends.torch_engine.objectives.head import Head, find_head
from training_hub.backends.torch_engine.objectives.targets import WholeTargets
from training_hub.backends.torch_engine.preflight import can_pack
from training_hub.backends.torch_engine.teacher.facts import TeacherFacts, told_of_teacher
from training_hub.backends.torch_engine.teacher.prompted import Prompted
from training_hub.backends.torch_engine.teacher.sliced import load_sliced
from training_hub.backends.torch_engine.tensors import PackTensors, nonfinite_tensors, to_device
from training_hub.errors import TrainingError
from training_hub.recipe import Recipe
from training_hub.recipe.qat import Qat
from training_hub.types import Console, Pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Online:
    """The teacher's word on a pack, asked when the pack is trained.

    through_head: whether its decoder and head can be run apart. is_packed: whether it keeps packed samples apart; else
    each runs alone. prompted: what it reads in place of the student's samples. sharpness: what its logits are
    multiplied by. slices: the processes among which its weights lie, which must all ask equally often; None where they
    are whole.
    """

    model: PreTrainedModel
    common: int
    through_head: bool
    is_packed: bool
    prompted: Prompted | None = None
    sharpness: float = 1.0
    slices: dist.ProcessGroup | None = None

    @torch.no_grad()
    def targets(self, pack: PackTensors) -> WholeTargets:
        """Its states at the trained tokens of the pack, and its head; or its logits there. It reads the whole pack, of
        whose tokens this process may have a part."""
        assert pack.on_host is not None
        whole = read = pack.whole()
        if self.prompted is not None:
            read = to_device(self.prompted.pack(pack.on_host), self.model.device)
            assert len(read.rows) == len(whole.rows)
        parts = [read] if self.is_packed else [to_device(one, self.model.device) for one in _alone(read.on_host)]
        if self.through_head:
            states_ND, head = self._states_and_head(parts)
            head = replace(head, multiplier=head.multiplier * self.sharpness)
            return WholeTargets(self.common, pack.of_trained(states_ND), head)
        logits_NV = pack.of_trained(self._joined(model_logits, parts))
        return WholeTargets(self.common, logits_NV=logits_NV * self.sharpness)

    def _states_and_head(self, parts: list[PackTensors]) -> tuple[Tensor, Head]:
        """What its decoder says at the trained tokens, and its head, whole for as long as the answer is there."""
        found: list[Head] = []

        def ask() -> tuple[Tensor, ...]:
            head = find_head(self.model)
            assert head is not None
            if self.slices is not None:  # what is gathered goes at the end of the pass
                bias = None if head.bias is None else head.bias.clone()
                head = replace(head, weight=head.weight.clone(), bias=bias)
            found.append(head)
            return (self._joined(decoder_states, parts),)

        (states_ND,) = as_forward(self.model, ask)
        return states_ND, found[0]

    def on_excerpts(self) -> Online:
        """Half as sure as it is: a model that teaches itself would leave nothing but rounding to compare."""
        return replace(self, prompted=None, sharpness=0.5)

    def _joined(self, run: Callable[[PreTrainedModel, PackTensors], Tensor], parts: list[PackTensors]) -> Tensor:
        most = self._most(len(parts))
        said = [run(self.model, part) for part in parts]
        for _ in range(most - len(parts)):
            run(self.model, min(parts, key=lambda part: part.ids.shape[1]))  # others have more samples to ask about
        return torch.cat(said) if len(said) > 1 else said[0]

    def _most(self, count: int) -> int:
        """How many passes the process makes that has most to make for a pack."""
        if self.slices is None or self.is_packed:
            return count
        passes = torch.tensor(count)
        dist.all_reduce(passes, op=dist.ReduceOp.MAX, group=self.slices)
        return int(passes)


def _alone(pack: Pack | None) -> list[Pack]:
    """Each sample of a pack as a pack of its own."""
    assert pack is not None
    samples = enumerate(zip(pack.boundaries[:-1], pack.boundaries[1:], strict=True))
    return [
        replace(
            pack,
            ids=pack.ids[start:end],
            positions=pack.positions[start:end],
            weights=pack.weights[start:end],
            boundaries=(pack.boundaries[number : number + 2] - start),
            samples=pack.samples[number : number + 1],
        )
        for number, (start, end) in samples
    ]


def load_teacher(
    recipe: Recipe,
    facts: TeacherFacts,
    device: torch.device,
    console: Console,
    lengths: list[int],
    mesh: DeviceMesh | None = None,
) -> Online:
    """The teacher on `device`, frozen, in its own number format, with attention and kernels of its own; in slices where
    there is a `mesh` over whose `dp_shard` they lie, all of whose processes must call it.

    Raises RecipeError for a model that cannot be loaded, TrainingError for weights that are not finite.
    """
    with told_of_teacher():
        dtype = choose_dtype(facts.chosen.dtype, device)
        console.say(f"teacher: loading {facts.chosen.path} as {str(dtype).removeprefix('torch.')} on {device.type}")
        uncompiled = recipe.training.model_copy(update={"compile": False})  # it runs on our kernels in any case
        own = recipe.model_copy(update={"model": facts.chosen, "qat": Qat(), "training": uncompiled})
        if mesh is None:
            loaded = load_model(own, device, dtype, lengths=lengths, is_trained=False)
            broken = nonfinite_tensors(loaded.model.state_dict())
        else:
            loaded, broken = load_sliced(own, mesh, device, dtype, lengths, console)
    if broken:
        raise TrainingError([*broken, f"The teacher {facts.chosen.path} came with them. Download or convert it again."])
    model = loaded.model.requires_grad_(False).eval()
    plain, note = cross_entropy(model)
    for line in (*loaded.notes, *([note] if note else [])):
        console.say(f"teacher: {line}")
    is_packed = can_pack(model, plain, dtype, console)
    slices = None if mesh is None else mesh.get_group("dp_shard")
    return Online(model, facts.common, plain.through_head, is_packed, facts.prompted, slices=slices)
