"""The weights of a model as they came: exact, where what is in memory is their rounding.

A model that came in float32 and computes in bfloat16 is read as bfloat16. What trains begins from the numbers of the
files all the same, and what nothing has moved is written as the files have it. Both are read one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from training_hub.backends.shared.model_folder import is_folder, weight_files
from training_hub.backends.torch_engine.layouts.pieces import Cut, cut_of, local_of, whole_cut
from training_hub.backends.torch_engine.loading.blank import names_in_files, plain_name, wanted_shapes
from training_hub.backends.torch_engine.saving.expert_files import ExpertFiles
from training_hub.backends.torch_engine.saving.tensor_files import TensorFiles, opened
from training_hub.recipe.sections import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Written:
    """The format that a final model is written in. is_asked: the user asked for it; else it is that of most weights as
    they came, and those that came in another keep that, unless they have moved."""

    dtype: torch.dtype
    is_asked: bool = False


@dataclass(frozen=True)
class BaseWeights:
    """Where the weights of a model can be read as they came.

    files: safetensors. shapes: of the whole weights, by the model's names. renamed: by these, what the files call
    otherwise. held: weights that no file has under such a name, or that came with a live model.
    """

    files: tuple[Path, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    held: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def opened(self) -> Iterator[OpenBase]:
        """The weights, to be read while this is open."""
        with opened(self.files) as files:
            yield OpenBase(self.named(files), self.held)

    def named(self, files: TensorFiles) -> ExpertFiles:
        """The open files, by the names that the model has for what they hold."""
        return ExpertFiles(files, self.shapes, self.renamed)

    def let_go(self, names: Collection[str]) -> None:
        """Forget these weights of a live model: they are elsewhere, or nobody will ask for them."""
        for name in names:
            self.held.pop(plain_name(name), None)


UNREAD = BaseWeights()
"""That of a model whose weights nobody can, or has to, read again."""


class OpenBase:
    """Weights as they came, while their files are open. unlike: those asked for that are not what the model holds."""

    def __init__(self, files: ExpertFiles, held: Mapping[str, Tensor]):
        self._files, self._held = files, held
        self.unlike: list[str] = []

    @property
    def files(self) -> ExpertFiles:
        """The files, by the names that the model has for what they hold."""
        return self._files

    def whole(self, name: str) -> Tensor:
        """All of the weight as it came."""
        key = plain_name(name)
        return self._held[key] if key in self._held else self._files.read(key, whole_cut(self._files.shapes[key]))

    def part(self, name: str, cut: Cut) -> Tensor:
        """The part of the weight as it came that `cut` says."""
        return self._read(plain_name(name), cut)

    def finer(self, name: str, parameter: Tensor, computed: torch.dtype | None = None) -> Tensor | None:
        """This process's piece of a weight of which `parameter` holds the rounding; None where it is no finer.

        computed: the format that it was rounded to, where the parameter has become wider since.
        """
        key, rounded, own = plain_name(name), computed or parameter.dtype, local_of(parameter.detach())
        if not is_finer(self._format(key, tuple(parameter.shape)), rounded):
            return None
        piece = self._read(key, cut_of(parameter))
        if torch.equal(piece.to(own.device).to(rounded).to(own.dtype), own):
            return piece
        self.unlike.append(name)
        return None

    def unmoved(self, names: Sequence[str], held: Tensor, written: Written) -> Tensor | None:
        """The weight called by one of `names` as the final model is to have it, if `held`, all of it, is still what it
        came as; None where it has moved, or where `held` in the format of the final model is the same."""
        for key in map(plain_name, names):
            came = self._format(key, tuple(held.shape))
            if came is None:
                continue
            target = written.dtype if written.is_asked else came
            if not held.is_floating_point() or (target == written.dtype and not is_finer(came, held.dtype)):
                return None
            whole = self._read(key, whole_cut(held.shape))
            if not torch.equal(whole.to(held.device).to(held.dtype), held):
                return None
            # In memory of its own: pieces of one mapped file look like one shared tensor to whoever writes them.
            return whole.to("cpu", target, copy=True)
        return None

    def may_stay(self, name: str, shape: tuple[int, ...], written: Written) -> bool:
        """Whether the final model would have this weight in another format than that of most, if it has not moved."""
        came = self._format(plain_name(name), shape)
        return came not in (None, written.dtype) and not written.is_asked

    def has(self, name: str, parameter: Tensor) -> bool:
        """Whether there is a weight of this name and shape."""
        return self._format(plain_name(name), tuple(parameter.shape)) is not None

    def _read(self, key: str, cut: Cut) -> Tensor:
        return self._held[key][cut.slices] if key in self._held else self._files.read(key, cut)

    def _format(self, key: str, shape: tuple[int, ...]) -> torch.dtype | None:
        if key in self._held:
            return self._held[key].dtype if tuple(self._held[key].shape) == shape else None
        return self._files.dtype(key) if self._files.shapes.get(key) == shape else None


def is_finer(came: torch.dtype | None, held: torch.dtype) -> bool:
    """Whether numbers in format `came` are lost in part where they are `held`."""
    return came is not None and held.is_floating_point and torch.promote_types(came, held) != held


def base_of(chosen: Model, model: PreTrainedModel, held: dict[str, Tensor] | None = None) -> BaseWeights:
    """Where the weights of this model can be read again: it has just been made from the files of the recipe's model, or
    handed over, with what it held before it was rounded."""
    shapes = wanted_shapes(model)
    if held is not None:
        return BaseWeights((), shapes, held=held)
    paths = files_of_model(chosen)
    with opened(paths) as files:
        return BaseWeights(paths, shapes, names_in_files(model, files.shapes))


def files_of_model(chosen: Model) -> tuple[Path, ...]:
    """The files of a model's weights: of a folder, or of a name on the hub in its cache."""
    if is_folder(chosen.path):
        return tuple(weight_files(Path(chosen.path).expanduser()))
    from huggingface_hub import try_to_load_from_cache

    for name in ("model.safetensors.index.json", "model.safetensors"):
        found = try_to_load_from_cache(chosen.path, name, revision=chosen.revision)
        if isinstance(found, str):
            return tuple(weight_files(Path(found).parent))
    return ()


def lost_names(base: BaseWeights, model: nn.Module, original: torch.dtype) -> list[str]:
    """Weights of the model that came finer than it holds them, as far as `original` tells, and that the files have
    under no name of the model's: transformers makes them of others."""
    with base.opened() as came:
        return [
            name
            for name, parameter in model.named_parameters()
            if is_finer(original, parameter.dtype) and not came.has(name, parameter)
        ]
