"""A model without contents, and its weights read piece by piece: no process ever holds what it does not keep."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from training_hub.backends.torch_engine.layouts.pieces import cut_of, local_of, whole_cut
from training_hub.backends.torch_engine.saving.expert_files import ExpertFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGE = 2**16
"""Numbers of a tensor of ones or zeros above which it is a weight; below it may be part of what a buffer is made of."""


class _WithoutContents(TorchFunctionMode):
    """Gives a place on the meta device to what will be read from files; what is computed is computed.

    Modules ask for weights with torch.empty. Frequencies of rotary positions and other buffers are computed, and would
    be lost on the meta device; some of large tensors of ones or zeros, which are weights elsewhere: is_exact computes
    with all of these.
    """

    def __init__(self, *, is_exact: bool) -> None:
        super().__init__()
        self._is_exact = is_exact

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = dict(options or {})
        is_weight = function is torch.empty
        if function in (torch.zeros, torch.ones) and not self._is_exact:
            sizes = arguments[0] if len(arguments) == 1 and not isinstance(arguments[0], int) else arguments
            is_weight = bool(sizes) and torch.Size(sizes).numel() > LARGE
        return function(*arguments, **({**options, "device": "meta"} if is_weight else options))


OF_ADAPTERS = (
    *(".base_layer", ".token_adapter", ".original_module"),
    *(".modules_to_save.default", ".ln_tuning_layers.default"),
)
"""Parts that PEFT puts into the name of a weight that it wraps or copies."""


def plain_name(name: str) -> str:
    """What a weight is called in a model without adapters."""
    for part in OF_ADAPTERS:
        name = name.replace(part, "")
    return name


def without_contents(make: Any) -> PreTrainedModel:
    """The model that `make` makes, with parameters on the meta device and buffers as they are computed."""
    with _WithoutContents(is_exact=False), torch.no_grad():
        model: PreTrainedModel = make()
    if lost_buffers(model):
        with _WithoutContents(is_exact=True), torch.no_grad():
            model = make()
    blank: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = blank.setdefault(id(parameter), nn.Parameter(parameter.detach().to("meta"), False))
                module._parameters[name] = empty
    return model


def see_one_number(model: nn.Module, device: torch.device | None = None) -> frozenset[int]:
    """Let every parameter be one number that looks like all of them, in place, on the device, by itself the CPU; the
    ids of what is one now. So a model without contents can be given to who asks for memory."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, one in module._parameters.items():
            if one is not None:
                number = torch.zeros((), dtype=one.dtype, device=device).expand(one.shape)
                module._parameters[name] = made.setdefault(id(one), nn.Parameter(number, False))
    return frozenset(map(id, model.parameters()))


def has_numbers(parameter: Tensor) -> bool:
    """Whether a weight has contents of its own: it is not on the meta device, nor one number that looks like all."""
    return not parameter.is_meta and (parameter.numel() < 2 or any(parameter.stride()))


def recast(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Let the parameter be in another format, in place; one number that looks like all stays one."""
    if parameter.dtype == dtype:
        return
    if has_numbers(parameter) or parameter.is_meta:
        parameter.data = parameter.data.to(dtype)
    else:
        parameter.data = torch.zeros((), dtype=dtype, device=parameter.device).expand(parameter.shape)


def empty_again(model: nn.Module, names: Collection[str], device: torch.device) -> None:
    """Let a model's own weights, which are called so without adapters, be without contents again, in place; what has
    been put beside them comes to `device`."""
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for owner, module in model.named_modules():
        for name, one in module._parameters.items():
            if one is None:
                continue
            if plain_name(f"{owner}.{name}" if owner else name) in names:
                empty = nn.Parameter(one.detach().to("meta"), one.requires_grad)
                module._parameters[name] = made.setdefault(id(one), (empty, one))[0]
            else:
                one.data = one.data.to(device)


def lost_buffers(model: nn.Module) -> list[str]:
    """Buffers that have no contents, since they were not computed."""
    return [name for name, buffer in model.named_buffers() if buffer.is_meta]


def wanted_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """What the model wants of its files, by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def names_in_files(model: PreTrainedModel, found: Collection[str]) -> dict[str, str]:
    """What files whose tensors are called as `found` says call weights otherwise than the model, by the model's names:
    as transformers renames what it reads, where it does no more than that; of tied weights each by the one that is
    there, since a part of the model may have another of them."""
    names = _renamed(model, found)
    for same in _names_by_weight(model):
        there = next((names.get(name, name) for name in same if name in found or name in names), None)
        names |= {name: there for name in same if there is not None and name not in found}
    return names


def _renamed(model: PreTrainedModel, found: Collection[str]) -> dict[str, str]:
    wanted = model.state_dict()
    strange = sorted(set(found) - wanted.keys())
    if not strange or wanted.keys() <= set(found):
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    known = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    names = {rename_source_key(name, known, [], model.base_model_prefix, wanted)[0]: name for name in strange}
    return {name: other for name, other in names.items() if name in wanted and name not in found}


def loading_report(
    model: nn.Module, files: ExpertFiles, whole: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Any]:
    """What transformers would say of these files: keys missing, unexpected and of another shape.

    whole: what the model wanted before layers of other processes were taken from it."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    wanted = wanted_shapes(model) if whole is None else whole
    found = files.shapes
    return {
        "missing_keys": sorted(wanted.keys() - found.keys() - tied),
        "unexpected_keys": sorted(found.keys() - wanted.keys()),
        "mismatched_keys": [
            (name, found[name], shape) for name, shape in sorted(wanted.items()) if found.get(name, shape) != shape
        ],
    }


@torch.no_grad()
def fill(
    model: nn.Module,
    files: ExpertFiles,
    device: torch.device,
    is_offloaded: bool,
    advance: Callable[[float], None] = lambda count: None,
) -> None:
    """Give a divided model on the meta device its weights: this process's pieces, in the format that each has there.

    What trains may be wider there than what is computed in: it begins from the files' own numbers. Weights that have
    numbers keep them; quantised ones, which are made of more than a piece, wait for theirs (`low_bits.py`). Buffers
    come to `device`; those that the files hold are read. is_offloaded: the pieces stay on the CPU. advance: told of
    each weight that is there.
    """
    buffers = dict(model.named_buffers())
    beside = {name: local_of(one.detach()) for name, one in model.named_parameters() if not one.is_meta}
    same = _names_by_weight(model)
    model.to_empty(device="cpu" if is_offloaded else device)
    for first, *others in same:  # torch has made each of tied weights anew
        for other in others:
            owner, _, leaf = other.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = model.get_parameter(first)
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        key = plain_name(name)
        kept = files.read(key, whole_cut(buffer.shape)).to(buffer.dtype) if key in files.shapes else buffer
        model.get_submodule(owner)._buffers[leaf] = kept.to(device)
    for name, numbers in beside.items():
        local_of(model.get_parameter(name)).copy_(numbers)
    done: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key = plain_name(name)
        is_read = parameter.is_floating_point() and name not in beside and key in files.shapes
        if is_read and id(parameter) not in done:
            done.add(id(parameter))
            local_of(parameter).copy_(files.read(key, cut_of(parameter)))
            advance(1)


def _names_by_weight(model: nn.Module) -> list[list[str]]:
    """The names of each weight; tied ones have several."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return list(found.values())
