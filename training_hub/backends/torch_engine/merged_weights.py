"""A base and its adapter as one model, weight by weight from their files: one module of it is held at a time.

PEFT puts the adapter into a base of which every weight is one number, seen as many; a module gets its own when it is
merged, by PEFT's own function. So what comes out are the bits of `merging.merge`, which merges all at once.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training_hub.backends.torch_engine.adaptations.lora import library
from training_hub.backends.torch_engine.loading.blank import (
    loading_report,
    lost_buffers,
    plain_name,
    see_one_number,
    without_contents,
)
from training_hub.backends.torch_engine.loading.model_config import read_config, take_generation_config
from training_hub.backends.torch_engine.loading.quantization import TURNED, linear_weights, rounded, straighten
from training_hub.backends.torch_engine.saving.base_weights import BaseWeights, OpenBase, base_of
from training_hub.backends.torch_engine.saving.exact_pieces import named_tensors
from training_hub.errors import RecipeError
from training_hub.recipe.sections import Model

NUM_QUESTIONS = 16
"""Rows that a layer is asked about."""


class MergedWeights:
    """The weights of `chosen` with the adapter of a folder added to them, in float32 on `device`.

    model: the merged one, without contents. tensors: what its files hold, by name. base: where the base is read.
    deviations: by layer with an adapter that was merged, how far what it says once its weights are rounded to `dtype`
    lies from what it said before: the norm of the difference over the norm.
    """

    def __init__(self, chosen: Model, adapter: Path, quantization: str, dtype: torch.dtype, device: torch.device):
        import transformers

        config, _ = read_config(chosen)
        options = {"dtype": torch.float32, "trust_remote_code": chosen.trust_remote_code}
        self.model: Any = without_contents(lambda: transformers.AutoModelForCausalLM.from_config(config, **options))
        take_generation_config(self.model, chosen)
        self.tensors = named_tensors(self.model)
        self.base: BaseWeights = base_of(chosen, self.model)
        self.deviations: dict[str, float] = {}
        self._formats = {name: one.dtype for name, one in self.model.state_dict().items()}
        self._dtype, self._device, self._quantization = dtype, device, quantization
        self._straight = copy.deepcopy(self.model)  # what the adapter was trained beside
        straighten(self._straight, quantization)
        self._quantised = linear_weights(self._straight, quantization)
        self._turned = {f"{name}.weight" for name, one in self._straight.named_modules() if hasattr(one, TURNED)}
        blank = copy.deepcopy(self._straight)
        self._blank = see_one_number(blank)
        with library.quiet():
            self._peft: Any = library.load().PeftModel.from_pretrained(blank, str(adapter), torch_device="cpu").eval()
        self._adapted = dict(_outermost(self._peft.get_base_model()))
        self._last: tuple[str, Mapping[str, Tensor]] = ("", {})

    def reason(self) -> str:
        """Why the model must be merged as a whole; "" where it need not."""
        with self.base.opened() as came:
            report = loading_report(self.model, came.files)
        if report["missing_keys"] or report["mismatched_keys"]:
            return "the files of the base hold weights otherwise than the model does"
        if lost := lost_buffers(self.model):
            return f"buffers of the base ({', '.join(lost[:3])}) are not computed anew"
        names = [(name, id(one)) for name, one in self.model.named_parameters(remove_duplicate=False)]
        counts = Counter(number for _, number in names)
        tied = {name for name, number in names if counts[number] > 1}
        adapted = {name for path in self._adapted for name, _ in self._of_base(path)}
        return "the adapter is beside a table that is also the head" if adapted & tied else ""

    def made(self, name: str, came: OpenBase) -> Tensor:
        """The weight, whole."""
        path = next((one for one in self._adapted if name.startswith(f"{one}.")), None)
        if path is not None and self._last[0] != path:
            self._last = ("", {})
            self._last = (path, self._merged(path, came))
        whole = self._read(name, came) if path is None else self._last[1][name]
        return whole.T.contiguous() if name in self._turned else whole

    def _read(self, name: str, came: OpenBase) -> Tensor:
        """The weight of the base as it multiplies."""
        whole = came.whole(name).to(self._device, self._formats[name], copy=True)
        whole = whole.T.contiguous() if name in self._turned else whole
        return rounded(whole, self._quantization) if name in self._quantised else whole

    def _of_base(self, path: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights of the base in an adapted module, by the model's names."""
        for name, parameter in self._adapted[path].named_parameters():
            if id(parameter) in self._blank:
                yield plain_name(f"{path}.{name}"), parameter

    @torch.no_grad()
    def _merged(self, path: str, came: OpenBase) -> Mapping[str, Tensor]:
        """The weights of an adapted module, by the model's names."""
        own = {id(one): nn.Parameter(self._read(name, came), False) for name, one in self._of_base(path)}
        holder = nn.Module()
        holder.layer = copy.deepcopy(self._adapted[path], dict[int, Any](own)).to(self._device)
        asked = _question(self._straight.get_submodule(path), self._device)
        before = holder.layer(asked) if asked is not None else None
        tuner = copy.copy(self._peft.base_model)
        tuner._modules = {**tuner._modules, "model": holder}
        layer: Any = merged_by_peft(tuner).layer
        weights = dict(layer.named_parameters())
        if before is not None:
            written = {name: one.to(self._dtype).to(one.dtype) for name, one in weights.items()}
            after = torch.func.functional_call(layer, written, (asked,))
            self.deviations[path] = float((after - before).norm() / before.norm().clamp_min(1e-30))
        return {f"{path}.{name}": one.detach() for name, one in weights.items()}


def merged_by_peft(model: Any) -> Any:
    """What `model` holds, a PEFT model or its tuner, with the adapter in its weights. Raises RecipeError where PEFT
    does not merge one of this kind."""
    try:
        with library.quiet():
            return model.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, ValueError, RuntimeError) as error:
        kind = model.peft_config["default"].peft_type
        raise RecipeError(f"merge: an adapter of kind {getattr(kind, 'value', kind)} is not merged: {error}") from error


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that PEFT has put in the place of others, by the names of these."""
    found: list[str] = []
    for path, module in model.named_modules():
        is_wrapper = hasattr(module, "base_layer") or hasattr(module, "unload_and_optionally_merge_module")
        if is_wrapper and not any(path.startswith(f"{one}.") for one in found):
            found.append(path)
            yield path, module


def _question(layer: nn.Module, device: torch.device) -> Tensor | None:
    """What a layer is asked: rows of numbers, or ids of a table; None for those of another kind."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(layer, nn.Embedding):
        return torch.arange(NUM_QUESTIONS, device=device) % layer.num_embeddings
    if not isinstance(layer, (nn.Linear, Conv1D)):
        return None
    draw, width = torch.Generator().manual_seed(0), layer.nx if isinstance(layer, Conv1D) else layer.in_features
    return torch.randn(NUM_QUESTIONS, width, generator=draw).to(device)
