"""Loading a causal language model for training: strictly, from safetensors, with our attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training_hub.backends.shared.model_folder import folder_problems
from training_hub.backends.torch_engine.attention import (
    DOCUMENTS,
    FUNCTIONS,
    VARLEN,
    register_attention,
    varlen_problem,
)
from training_hub.backends.torch_engine.attention_trial import heads_of, told, try_each
from training_hub.backends.torch_engine.fused import eight_bit, onednn, panels
from training_hub.backends.torch_engine.fused.swap import multiply_in_eight_bits, run_on_kernels
from training_hub.backends.torch_engine.loading.model_config import from_library, read_config, source_options
from training_hub.backends.torch_engine.loading.on_demand import UNCHANGED, Changed
from training_hub.backends.torch_engine.loading.quantization import NONE, loading_options, part
from training_hub.backends.torch_engine.loading.rounding import round_in_forward
from training_hub.backends.torch_engine.preflight import (
    ROUGH,
    SAME_LOGITS,
    attention_difference,
    logits_of_one,
    relative_difference,
)
from training_hub.backends.torch_engine.saving.base_weights import UNREAD, BaseWeights, base_of, is_finer, lost_names
from training_hub.errors import BackendError, RecipeError
from training_hub.recipe import Recipe
from training_hub.recipe.qat import Qat
from training_hub.recipe.sections import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LoadedModel", "choose_device", "choose_dtype", "folder_problems", "load_model"]


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device. `original_dtype`: the number format it came in. `notes`: what a user should be told.

    attention: the name it attends by, of ours, or transformers' own where the architecture allows no other.
    files: what the weights of a model without contents are to be read from, once it is divided. base: the weights as
    they came, which may be finer than those of `model`. changed: what takes the place of some once they are read.
    """

    model: PreTrainedModel
    original_dtype: torch.dtype
    attention: str
    notes: tuple[str, ...]
    files: tuple[Path, ...] = ()
    base: BaseWeights = UNREAD
    changed: Changed = UNCHANGED


def choose_device() -> torch.device:
    """The current CUDA device where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def choose_dtype(requested: str, device: torch.device) -> torch.dtype:
    """The number format of forward and backward: as `requested` ("float32", ...), or for "auto" the fastest safe one.

    auto is bfloat16 where the hardware has instructions that multiply it, else float32. Raises BackendError for
    bfloat16 on a GPU without it.
    """
    fast = _multiplies_bfloat16(device)
    if requested == "auto":
        return torch.bfloat16 if fast else torch.float32
    if requested == "bfloat16" and device.type == "cuda" and not fast:
        name = torch.cuda.get_device_name(device)
        raise BackendError(f"model.dtype: {name} has no bfloat16. Use auto or float32.")
    return getattr(torch, requested)


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Measured on matrices as models have them, against float32: 2.2 times the rate with AVX512_BF16, about 9 with AMX.
    # Other processors have no instruction for it, and take longer than for float32.
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def load_model(
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    model: PreTrainedModel | None = None,
    lengths: Sequence[int] = (),
    *,
    is_trained: bool = True,
) -> LoadedModel:
    """The recipe's model, or the live `model` given instead, on `device` in `dtype`, in evaluation mode.

    lengths: tokens of the rows, on which attention is tried on a GPU. A live model is changed in place. Nothing is
    changed in the part of the config that is saved. is_trained: its weights as they came are wanted, too. Raises
    RecipeError naming every problem of the folder, every weight that is missing and every one of another shape.
    """
    register_attention()
    problem = varlen_problem(device, dtype)
    if recipe.model.attention == "varlen" and problem:
        raise BackendError(problem)
    is_quantised = recipe.model.quantization != NONE
    if model is None:
        loaded, original, notes = read_whole(recipe.model, dtype, device)
        base = finest_base(recipe.model, loaded, original) if is_trained else UNREAD
    elif is_quantised:
        raise RecipeError(
            f"model.quantization: {recipe.model.quantization} is made while weights are read, and the model was handed "
            "over. Give its folder as model.path, or write model.quantization: none."
        )
    else:
        original, (notes, held) = next(model.parameters()).dtype, _convert(model, dtype)
        loaded, base = model, base_of(recipe.model, model, held)
    loaded = loaded.eval() if is_quantised else loaded.to(device).eval()  # it was put there as it was quantised
    kind = next(loaded.parameters()).dtype
    names, tried = attention_names(recipe.model.attention, loaded, lengths, loaded.device, kind)
    attention = attach_attention(loaded, names, dtype)
    told_of = [*notes, *tried, *attention_notes(attention, names), *model_notes(loaded)]
    on_kernels = None if recipe.training.compile else run_on_kernels(loaded)
    told_of += [line for line in (on_kernels, _rounding(loaded, recipe.qat), _slow(loaded)) if line]
    if recipe.training.fp8:
        told_of.append(_in_eight_bits(loaded))
    found = tuple(told_of)
    return LoadedModel(loaded, original, attention, found, base=base)


def attention_names(
    requested: str, model: PreTrainedModel, lengths: Sequence[int], device: torch.device, dtype: torch.dtype
) -> tuple[list[str], list[str]]:
    """What to try, best first, and what a user should be told of it."""
    if requested != "auto":
        return [{"documents": DOCUMENTS, "varlen": VARLEN}[requested]], []
    problem = varlen_problem(device, dtype)
    heads = heads_of(model.config.get_text_config())
    if device.type != "cuda" or heads is None:
        return [DOCUMENTS] if problem else [VARLEN, DOCUMENTS], []
    candidates = {name: attend for name, attend in FUNCTIONS.items() if not (problem and name == VARLEN)}
    trials = try_each(candidates, heads, lengths, device, dtype)
    return [trial.name for trial in trials if trial.seconds is not None] or [DOCUMENTS], [told(trials)]


def read_whole(
    chosen: Model, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, torch.dtype, list[str]]:
    """The model with its weights, as the library loads it; the format they came in; what a user should be told."""
    config, original = read_config(chosen)
    options = {
        "config": config,
        "dtype": dtype,
        "use_safetensors": True,
        "output_loading_info": True,
        # The library's own error for this stops at the first place; ours names them all.
        "ignore_mismatched_sizes": True,
        **loading_options(chosen.quantization, dtype, device),
    }
    model, info = from_library(chosen, "AutoModelForCausalLM", {**source_options(chosen), **options})
    problems = _loading_problems(chosen.path, model, info)
    if problems:
        raise RecipeError(problems)
    part(model)
    return model, original, unexpected_notes(info["unexpected_keys"])


def finest_base(chosen: Model, model: PreTrainedModel, original: torch.dtype) -> BaseWeights:
    """The weights of `model` as they came, by its own names. Those that transformers makes of others, when it reads the
    files, are read by it once more, in the format they came in, and kept on the CPU; not beside quantised ones."""
    base = base_of(chosen, model)
    lost = lost_names(base, model, original)
    if not lost or chosen.quantization != NONE:
        return base
    whole, _, _ = read_whole(chosen, torch.promote_types(original, next(model.parameters()).dtype), torch.device("cpu"))
    exact = dict(whole.named_parameters())
    return replace(base, held={name: _narrowed(exact[name].detach(), original) for name in lost})


def _narrowed(weight: Tensor, original: torch.dtype) -> Tensor:
    """The weight in the format it came in, where that is what it tells."""
    narrow = weight.to(original)
    return narrow if torch.equal(narrow.to(weight.dtype), weight) else weight


def _loading_problems(path: str, model: PreTrainedModel, info: Mapping[str, Any]) -> list[str]:
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = sorted(key for key in info["missing_keys"] if key not in tied)
    problems = []
    if missing:
        problems.append(
            f"model.path {path}: {len(missing)} weights of {type(model).__name__} are not in the files and would start "
            f"at random: {named(missing)}. Use a folder that holds the whole model."
        )
    for key, stored, wanted in sorted(info["mismatched_keys"]):
        problems.append(
            f"model.path {path}: {key} has shape {tuple(stored)} in the files, but config.json makes it "
            f"{tuple(wanted)}. Use the config.json that was saved with these weights."
        )
    return problems + [f"model.path {path}: {message}" for message in info.get("error_msgs") or ()]


def unexpected_notes(keys: Iterable[str]) -> list[str]:
    """What a user should be told of weights in the files that the model does not have."""
    found = sorted(keys)
    if not found:
        return []
    return [f"{len(found)} weights in the files belong to no part of the model that is trained and will not be in the "
            f"result: {named(found)}"]  # fmt: skip


def named(names: list[str], shown: int = 8) -> str:
    """The names, the first of many."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _convert(model: PreTrainedModel, dtype: torch.dtype) -> tuple[list[str], dict[str, Tensor]]:
    """Parameters to `dtype`, in place: what was done, and what was rounded, as it was. Buffers stay: rotary frequencies
    are wrong in 16 bits."""
    before, held = next(model.parameters()).dtype, {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            if is_finer(parameter.dtype, dtype):
                held[name] = parameter.data
            parameter.data = parameter.data.to(dtype)
    done = [] if before == dtype else [f"the given model was converted from {_name(before)} to {_name(dtype)}"]
    return done, held


def attach_attention(model: PreTrainedModel, names: Iterable[str], dtype: torch.dtype) -> str:
    """Switch the model to the first of `names` under which it says what it says by itself; the name it ends up with."""
    own = model.config._attn_implementation
    # Attention in chunks (Llama 4) is told by a mask alone, and shows only in documents longer than a chunk.
    chunked = getattr(model.config.get_text_config(), "attention_chunk_size", None)
    for name in () if chunked else names:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            break
        if attention_difference(model) <= SAME_LOGITS.get(dtype, ROUGH):
            return name
    model.set_attn_implementation(own)
    return own


def _slow(model: PreTrainedModel) -> str | None:
    """What a user should be told of products that could be faster on this processor."""
    is_asked = model.device.type == "cpu" and model.dtype == torch.float32 and not panels.is_trusted(model.dtype)
    return onednn.note() if is_asked else None


def _rounding(model: PreTrainedModel, chosen: Qat) -> str | None:
    """Let the model round as the recipe asks; what a user should be told of it."""
    before = logits_of_one(model)
    line = round_in_forward(model, chosen)
    if line is None:
        return None
    return f"{line}, which changes the logits by {relative_difference(logits_of_one(model), before):.1%}"


def _in_eight_bits(model: PreTrainedModel) -> str:
    """Let the model multiply in 8 bits; what a user should be told of it."""
    before = logits_of_one(model)
    count = multiply_in_eight_bits(model)
    if not count:
        sides = f"matrices whose sides are multiples of {eight_bit.MULTIPLE}"
        raise RecipeError(f"training.fp8: {type(model).__name__} has no linear layers with {sides}. Write false.")
    difference = relative_difference(logits_of_one(model), before)
    return f"{count} linear layers multiply in 8-bit floating point, which changes the logits by {difference:.1%}"


def attention_notes(attention: str, names: list[str]) -> list[str]:
    """What a user should be told where the model does not attend as the first of `names` does."""
    if attention == names[0]:
        return []
    kind = "ours" if attention in names else "transformers' own"
    return [
        f"attention is {kind} ({attention}): this architecture cannot use, or changes what it says with, {names[0]}"
    ]


def model_notes(model: PreTrainedModel) -> list[str]:
    """What a user should be told of training this architecture."""
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return ["the loss is that of the tokens alone; the auxiliary loss of the router is not added"]
    return []


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
