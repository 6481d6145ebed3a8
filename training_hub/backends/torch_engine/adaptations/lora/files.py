"""The folder of an adapter: PEFT's own format, which PEFT alone can load, with tokenizer and template beside it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training_hub.backends.shared.model_folder import is_folder
from training_hub.backends.torch_engine.adaptations.lora import library
from training_hub.backends.torch_engine.adaptations.lora.configs import is_changing_its_base
from training_hub.backends.torch_engine.layouts.cut import route_of
from training_hub.backends.torch_engine.loading.blank import see_one_number, without_contents
from training_hub.backends.torch_engine.loading.model_config import read_config
from training_hub.backends.torch_engine.loading.quantization import multiply_dense, put_together, quantiser
from training_hub.folders import write_json
from training_hub.recipe import Recipe
from training_hub.recipe.adapter_folder import ORIGIN_FILE, WEIGHTS_FILE

ADAPTER = "default"
"""How PEFT calls an adapter that has no name."""


@dataclass(frozen=True)
class Start:
    """The adapter as it was before the first step, by PEFT's names, where it was taken out of the weights.

    W = W' + s B0 A0, so that W' + s B A = W + s [B, -B0] [A; A0]: a LoRA on W of twice the rank.
    """

    tensors: dict[str, Tensor]

    def difference(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """`tensors`, as an adapter of twice the rank on the weights as they came."""
        made = dict(tensors)
        for name, before in self.tensors.items():
            sign, side = (1, 0) if ".lora_A." in name else (-1, 1)
            made[name] = torch.cat([tensors[name], sign * before.to(tensors[name].dtype)], side)
        return made


def is_part_of_weight(name: str) -> bool:
    """Whether a tensor so called in an adapter's file is one of the two factors of what is added to a weight."""
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def tensors_in_file(peft_model: Any) -> dict[str, Tensor]:
    """By PEFT's names in an adapter's file, the parameters and other tensors of the model that these are."""
    with library.quiet():
        found: dict[str, Tensor] = library.load().get_peft_model_state_dict(
            peft_model,
            state_dict=peft_model.state_dict(keep_vars=True),
            adapter_name=ADAPTER,
            save_embedding_layers=False,
        )
    return found


@dataclass(frozen=True)
class AdapterFiles:
    """Writes an adapter and reads it again, by PEFT's own functions."""

    peft: Any
    recipe: Recipe
    start: Start | None
    dtype: torch.dtype

    def save(self, model: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype, folder: Path) -> None:
        """Weights and configuration, as PEFT's save_pretrained writes them."""
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        self.config().save_pretrained(str(folder))
        chosen, computed = self.recipe.model, _computed(model)
        origin: dict[str, Any] = {"quantization": chosen.quantization, "dtype": str(computed).removeprefix("torch.")}
        rounding = self.recipe.qat
        if rounding.weight_dtype is not None:
            origin["qat"] = rounding.model_dump()
        write_json(folder / ORIGIN_FILE, {**origin, "versions": quantiser(chosen.quantization)})

    def config(self) -> Any:
        """The configuration to write: where the base lies, and what the adapter is on the base as it came."""
        config = copy.deepcopy(self.peft.peft_config[ADAPTER])
        path, chosen = self.recipe.model.path, self.recipe.model
        config.base_model_name_or_path = str(Path(path).expanduser().resolve()) if is_folder(path) else path
        config.revision = chosen.revision
        config.inference_mode = True
        for name in ("target_modules", "target_parameters", "modules_to_save"):  # sets, which have no order
            if isinstance(getattr(config, name, None), set):
                setattr(config, name, sorted(getattr(config, name)))
        if is_changing_its_base(config):
            _double(config)
        return config

    def load(self, model: nn.Module, dtype: torch.dtype, folder: Path) -> tuple[Any, dict[str, Tensor], list[str]]:
        """A model with the adapter of `folder`, by PEFT, on the base of `model`, whose weights it shares; the adapter's
        tensors; and what was wrong with them."""
        peft = library.load()
        base = self._base(model)
        with library.quiet():
            loaded = peft.PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False)
            held = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
        found = load_file(folder / WEIGHTS_FILE)
        # What PEFT made of the file is in the format of the base, to which the file's numbers are rounded here.
        problems = [
            f"{name} is not in the model that PEFT makes of the folder"
            for name, tensor in found.items()
            if name not in held or not torch.equal(held[name].cpu(), tensor.to(held[name].dtype))
        ]
        return loaded.get_base_model(), found, problems

    def _base(self, model: nn.Module) -> Any:
        """The model without its adapter; the modules are copies, the weights are not.

        That of a model that is divided over processes, which none of them could hold, has no weights. For an adapter
        that was taken out of the weights they are made whole again, in memory of their own.
        """
        if _is_divided(model):
            return _numberless(self.recipe, _computed(model))
        # PEFT switches gradients on and off, so that each parameter is another object over the same numbers.
        shared: dict[int, Any] = {
            id(p): nn.Parameter(p.detach(), requires_grad=False) if type(p) is nn.Parameter else p
            for p in model.parameters()
        }
        shared |= {id(b): b for b in model.buffers()}
        with library.quiet():
            whole = copy.deepcopy(self.peft, shared)
            base = whole.unload()
        put_together(base)
        multiply_dense(base)  # bitsandbytes would lay out anew, in place, the weights that are shared here
        if self.start is not None:
            self._make_whole(base)
        return base

    def _make_whole(self, base: nn.Module) -> None:
        assert self.start is not None
        config = self.peft.peft_config[ADAPTER]
        for name, left in self.start.tensors.items():
            if ".lora_B." not in name:
                continue
            right = self.start.tensors[name.replace(".lora_B.", ".lora_A.")]
            path = name.removeprefix("base_model.model.").partition(".lora_B.")[0]
            scale = self.peft.get_base_model().get_submodule(path).scaling[ADAPTER]
            layer: Any = base.get_submodule(path)
            part = scale * (left.float() @ right.float())
            part = part.T if getattr(config, "fan_in_fan_out", False) else part
            taken = layer.weight.detach()
            layer.weight = nn.Parameter((taken.float() + part.to(taken.device)).to(taken.dtype), requires_grad=False)


def _numberless(recipe: Recipe, dtype: torch.dtype) -> Any:
    """The recipe's model, every weight of which is one number."""
    import transformers

    config, _ = read_config(recipe.model)
    options = {"dtype": dtype, "trust_remote_code": recipe.model.trust_remote_code}
    blank = without_contents(lambda: transformers.AutoModelForCausalLM.from_config(config, **options))
    see_one_number(blank)
    return blank


def _is_divided(model: nn.Module) -> bool:
    return route_of(model) is not None or any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _computed(model: nn.Module) -> torch.dtype:
    """The format the model computes in; what trains of a divided one is kept in float32."""
    trains = not _is_divided(model)
    return next(p.dtype for p in model.parameters() if p.requires_grad == trains and p.is_floating_point())


def _double(config: Any) -> None:
    """Let the configuration be that of an adapter of twice the rank and the same scale."""
    config.init_lora_weights = True
    config.r *= 2
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2
    config.rank_pattern = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
    factor = 2**0.5 if config.use_rslora else 2
    config.alpha_pattern = {name: factor * alpha for name, alpha in (config.alpha_pattern or {}).items()}
