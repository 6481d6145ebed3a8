"""The final model: an ordinary Hugging Face folder, checked by loading it again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from training_hub.backends.shared.disk import disk_errors_explained
from training_hub.backends.shared.final_folder import save_tokenizer, set_stop_ids
from training_hub.backends.shared.model_folder import weight_files
from training_hub.backends.torch_engine.attention import attention_of_transformers
from training_hub.backends.torch_engine.loading.low_bits import seen_dense
from training_hub.backends.torch_engine.loading.quiet import library_bars
from training_hub.backends.torch_engine.saving.model_files import ModelFiles
from training_hub.backends.torch_engine.saving.tensor_files import opened
from training_hub.backends.torch_engine.tensors import nonfinite_tensors
from training_hub.errors import DiskError, TrainingError
from training_hub.folders import write_whole

PROBE_LENGTH = 16


@dataclass(frozen=True)
class WholeModel:
    """A folder that holds every weight, read by transformers alone; in files of at most `max_shard_size`."""

    trust_remote_code: bool = False
    max_shard_size: str = "50GB"
    dtype: torch.dtype | None = None

    def save(self, model: Any, tensors: dict[str, Tensor], dtype: torch.dtype, folder: Path) -> None:
        """Weights, config and generation config, as save_pretrained writes them."""
        model.save_pretrained(folder, state_dict=dict(tensors), max_shard_size=self.max_shard_size)
        _set_dtype(folder / "config.json", dtype)

    def load(self, model: Any, dtype: torch.dtype, folder: Path) -> tuple[Any, dict[str, Tensor], list[str]]:
        """The model of the folder, from its files alone."""
        loaded, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            trust_remote_code=self.trust_remote_code,
        )
        loaded.set_attn_implementation(attention_of_transformers(loaded))
        problems = [f"{kind}: {', '.join(sorted(map(str, report[kind])))}" for kind in _CHECKED if report.get(kind)]
        return loaded, loaded.state_dict(), problems


def export(
    model: PreTrainedModel,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    folder: Path,
    tokenizer: Any,
    chat_template: str | None,
    stop_ids: Sequence[int],
    trust_remote_code: bool = False,
    beside: Mapping[str, dict[str, Tensor]] | None = None,
    files: ModelFiles | None = None,
    documents: Mapping[str, bytes] | None = None,
    said: Tensor | None = None,
) -> float:
    """Write `tensors`, the state dict as an adaptation exports it, into `folder`; atomic.

    The folder loads with transformers alone: weights, config, generation config that stops at `stop_ids`, tokenizer and
    the chat template used in training. Before it gets its name it is loaded again: every tensor must be equal to what
    was meant to be written. `beside`: further safetensors files of the folder, by name. `documents`: other files, such
    as a model card. `said`: the `probed_logits` of the model, where it cannot be asked here, and the folder neither.
    `files`: how the weights are written and read, where not as a whole model. Returns the largest difference of logits
    between the model and the folder, which is 0 where both have the same format. Raises TrainingError where the folder
    does not hold the model.
    """
    files = files or WholeModel(trust_remote_code)
    refuse_nonfinite(tensors)
    if not folder.parent.is_dir():
        raise DiskError(f"{folder.parent} is gone; it was there when the run began. The final model is not written.")
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    with (
        disk_errors_explained("the final model", folder, size),
        library_bars(),
        write_whole(folder, {"dtype": str(dtype)}, replace=True) as aside,
    ):
        files.save(model, tensors, dtype, aside)
        put_beside(aside, tokenizer, chat_template, stop_ids, beside or {}, documents or {})
        return verify(aside, model, tensors, dtype, files, said)


def is_rounding(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers in two formats: apart by what rounding to each of 16 bits makes, half a
    unit in the last place, eps / 2 of a number or of the smallest normal one; equal where neither has 16 bits."""
    if not one.is_floating_point() or one.shape != other.shape:
        return one.shape == other.shape
    low = [torch.finfo(kind) for kind in (one.dtype, other.dtype) if kind.itemsize == 2]
    if not low:
        coarse = min(one.dtype, other.dtype, key=lambda kind: kind.itemsize)
        return torch.equal(one.detach().cpu().to(coarse), other.to(coarse))
    here, there = one.detach().cpu().float(), other.float()
    share = sum(kind.eps / 2 for kind in low)
    allowed = torch.maximum(here.abs(), there.abs()).clamp_min(max(kind.smallest_normal for kind in low)) * share
    return bool(((here - there).abs() <= allowed).all())


def put_beside(
    folder: Path,
    tokenizer: Any,
    chat_template: str | None,
    stop_ids: Sequence[int],
    beside: Mapping[str, dict[str, Tensor]],
    documents: Mapping[str, bytes],
) -> None:
    """Write into a folder of weights what else belongs into it; the arguments are those of `export`."""
    set_stop_ids(folder / "generation_config.json", stop_ids)
    save_tokenizer(tokenizer, chat_template, folder)
    for name, more in beside.items():
        save_file({key: tensor.detach().cpu() for key, tensor in more.items()}, folder / name)
    for name, content in documents.items():
        (folder / name).write_bytes(content)


def refuse_nonfinite(tensors: dict[str, Tensor]) -> None:
    """Raise TrainingError naming each tensor with NaN or infinite numbers."""
    problems = nonfinite_tensors(tensors)
    if problems:
        raise TrainingError([*problems, "Such a model is not written."])


@torch.no_grad()
def verify(
    folder: Path,
    model: PreTrainedModel,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    files: ModelFiles | None = None,
    said: Tensor | None = None,
) -> float:
    """Load `folder` and compare: tensors exactly, with the weights in memory as far as both formats tell them apart,
    and logits as the largest difference over a few tokens; of logits that were `said`, only that they are finite."""
    loaded, found, problems = (files or WholeModel()).load(model, dtype, folder)
    for name, tensor in found.items():
        if name in tensors and not torch.equal(tensor, tensors[name].to(tensor.dtype)):
            problems.append(f"{name} is not what was written")
    problems += [f"{name} is not what was written" for name in _other_bits(folder, tensors, dtype)]
    if said is None:  # else the weights lie in several processes
        held = dict(model.named_parameters())
        other = [name for name in held.keys() & tensors.keys() if not is_rounding(held[name], tensors[name])]
        problems += [f"{name} is not the rounding of what was trained" for name in sorted(other)]
    if problems:
        raise TrainingError([f"the final model does not load as it was trained: {line}" for line in problems])
    if said is not None:
        refuse_nonfinite_logits(float(said.abs().max()))
        return 0.0
    here = probed_logits(model, next(model.parameters()).device)
    with seen_dense(loaded):
        there = loaded.eval()(input_ids=_probe(model).to(loaded.device), use_cache=False).logits.float().cpu()
    difference = float((here - there).abs().max())
    refuse_nonfinite_logits(difference)
    return difference


def refuse_nonfinite_logits(largest: float) -> None:
    """Raise TrainingError where the largest of some logits, or of their differences, is not finite."""
    if not math.isfinite(largest):
        raise TrainingError(
            "the final model computes logits that are not finite, though its weights are: they have become too large. "
            "It is not written. Write a lower optimizer.lr, and training.on_nonfinite: stop to see the step."
        )


def _other_bits(folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[str]:
    """Names of tensors that were to be written in another format than `dtype`, in which the library has read them, and
    that the folder holds otherwise."""
    apart = [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.dtype != dtype]
    if not apart:
        return
    with opened(weight_files(folder)) as kept:
        for name in apart:
            if name in kept.shapes and (
                kept.dtype(name) != tensors[name].dtype or not torch.equal(kept.read(name), tensors[name])
            ):
                yield name


_CHECKED = ("missing_keys", "mismatched_keys")


@torch.no_grad()
def probed_logits(model: PreTrainedModel, device: torch.device) -> Tensor:
    """What the model says to a few tokens, on the CPU in float32."""
    was_training, ids = model.training, _probe(model).to(device)
    model.eval()
    logits = model(input_ids=ids, use_cache=False, document_lengths=(ids.shape[1],)).logits.float().cpu()
    model.train(was_training)
    return logits


def _probe(model: PreTrainedModel) -> Tensor:
    return torch.arange(PROBE_LENGTH).remainder(model.config.get_text_config().vocab_size)[None]


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    # save_pretrained writes the format of the model in memory, which is that of training.
    content = json.loads(path.read_text(encoding="utf-8"))
    content["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
