"""Frozen weights in fewer bits, through the libraries that do it: int4 by bitsandbytes, int8 by torchao.

int4 is NF4 with its scales quantised once more (Dettmers et al. 2023, arXiv:2305.14314): 4.13 bits for each weight of a
linear layer. int8 is one number from -127 to 127 and a scale for each row. Both multiply in the model's format. Head
and embeddings stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training_hub.backends.torch_engine.fused.exchange import Forward, OnKernels, exchange
from training_hub.backends.torch_engine.loading.packing import Packing, packed
from training_hub.backends.torch_engine.loading.quiet import quiet
from training_hub.recipe.sections import Model

NONE = "none"

BLOCK, SECOND = 64, 256
"""Weights, one behind the other, that share a scale in int4, and scales that share one of their own."""


@dataclass(frozen=True)
class Method:
    """How a number of bits is had. bits: of one weight of a linear layer, scales included. block: how many weights, one
    behind the other, share a scale and cannot be parted; 1 where rows have one each."""

    package: str
    bits: float
    block: int = 1


METHODS = {
    "int4": Method("bitsandbytes", 4 + 8 / BLOCK + 32 / (BLOCK * SECOND), BLOCK),
    "int8": Method("torchao", 8.0),
}
"""By name. On a CPU with AVX512_BF16, LoRA on a Llama of width 512 in bfloat16, processor time of a step over that of
unquantised weights: NF4 of bitsandbytes 1.01, int8 of torchao 1.01, int8 of bitsandbytes (LLM.int8) 1.18, with casts to
float16 on the way. torchao's own int4 needs a GPU."""


def problems(chosen: Model) -> list[str]:
    """What keeps the model from being quantised here, with its remedy."""
    method = METHODS.get(chosen.quantization)
    if method is None or all(find_spec(name) is not None for name in (method.package, "accelerate")):
        return []
    return [
        f"model.quantization: {chosen.quantization} needs {method.package}, which is not installed: "
        f"pip install 'training-hub[{method.package}]'. Or write model.quantization: none."
    ]


def loading_options(quantization: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What transformers' from_pretrained takes beside, to quantise each weight as it is read."""
    if quantization == NONE:
        return {}
    import transformers

    with quiet():
        import_module(METHODS[quantization].package)
    config: Any
    if quantization == "int4":
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    else:
        from torchao.quantization import Int8WeightOnlyConfig

        config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    return {"quantization_config": config, "device_map": {"": device}}


PACKED = "training_hub_packed"
"""Attribute of a quantised layer, whose weight is bytes: what makes numbers of them, a `Packing`."""

OWN = "training_hub_own"
"""Attribute of such a layer that was split while it had no contents: a function from the bytes and the packing of the
whole weight to those that this process computes with, the bytes laid out as the layer's weight is cut."""


TURNED = "training_hub_turned"
"""Attribute of a layer whose weight the files hold turned, [M, N]."""


def straighten(model: nn.Module, quantization: str) -> None:
    """Let layers of a model without contents that multiply by a turned weight, as those of GPT-2 do, be ordinary linear
    ones, in place, where the library makes such of them before it quantises them."""
    from transformers.pytorch_utils import Conv1D

    if quantization != "int4":
        return
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            layer = nn.Linear(module.nx, module.nf, device="meta", dtype=module.weight.dtype)
            layer.weight.requires_grad_(module.weight.requires_grad)
            layer.bias = module.bias
            setattr(layer, TURNED, True)
            model.set_submodule(name, layer)


def quantiser(quantization: str) -> dict[str, str]:
    """Name and version of what quantises, for the files of a run."""
    method = METHODS.get(quantization)
    return {method.package: version(method.package)} if method else {}


def nums_of(model: nn.Module) -> dict[str, int]:
    """How many numbers each parameter holds, by name; of a quantised weight two may lie in a byte."""
    low = {id(layer.weight): layer.in_features * layer.out_features for layer in low_layers(model)}
    return {name: low.get(id(one), one.numel()) for name, one in model.named_parameters()}


def num_quantised(model: Any) -> int:
    """How many weights linear layers have that are frozen, and so are kept in fewer bits; from shapes: `model` may be
    quantised already, or lie on the meta device."""
    return sum(layer.in_features * layer.out_features for layer in frozen_layers(model))


def frozen_layers(model: Any) -> Iterator[nn.Linear]:
    return (layer for layer in linear_layers(model) if not layer.weight.requires_grad)


def linear_layers(model: Any) -> Iterator[nn.Linear]:
    # The head stays as it is, and so does one that PEFT keeps beside a copy that trains.
    left = {id(module) for module in model.get_output_embeddings().modules()}
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module) not in left:
            yield module


def frozen_weights(model: Any) -> list[Tensor]:
    """The weights of a model, which may lie on the meta device, that are kept in fewer bits where any are."""
    return [layer.weight for layer in frozen_layers(model)]


def low_layers(model: nn.Module) -> list[nn.Linear]:
    """The quantised layers, whose weights are bytes."""
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear) and hasattr(layer, PACKED)]


def plain_like(layer: nn.Linear) -> nn.Linear:
    """An empty layer of the same shape on the meta device, frozen, whose weight is no bytes."""
    made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    return made.requires_grad_(False)


def dense(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """[N, M]: the weight of a linear layer as it multiplies; of a quantised one made from its 4 or 8 bits in memory of
    its own, and of one that is split this process's part."""
    packing = _packing_of(layer)
    return layer.weight if packing is None else packing.dense(_bytes_of(layer)).to(dtype)


def is_quantised(weight: Tensor) -> bool:
    """Whether a library keeps a weight in fewer bits."""
    return getattr(weight, "quant_state", None) is not None or type(weight).__module__.startswith("torchao")


def part(model: nn.Module) -> None:
    """Part the weights that a library has quantised into bytes, which become ordinary parameters of ordinary layers,
    and what makes numbers of them (scales, 1/32 of their size in int4), in place; the model multiplies by their dense
    weights then, and nothing in it says any more that a library quantised it."""
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_quantised(module.weight):
            layer = plain_like(module)
            bytes_of, packing = packed(module.weight)
            layer.weight, layer.bias = nn.Parameter(bytes_of, requires_grad=False), module.bias
            setattr(layer, PACKED, packing)
            if getattr(module, "source_cls", None) is Conv1D:  # what transformers has put it in the place of
                setattr(layer, TURNED, True)
            model.set_submodule(name, layer)
    multiply_dense(model)
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method", "hf_quantizer"):
        vars(model).pop(mark, None)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def multiply_dense(model: nn.Module) -> None:
    """Let quantised layers multiply by their dense weights, in place: the same arithmetic in every mode."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and hasattr(module, PACKED) and not isinstance(module, OnKernels):
            exchange(model, name, module, _dense_forward)


def _dense_forward(own: Any) -> Forward:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = frozen_product(x, self)
        return y if self.bias is None else y + self.bias

    return forward


def frozen_product(x: Tensor, layer: nn.Linear) -> Tensor:
    """x W^T for a weight that is kept in fewer bits, or for this process's part of one."""
    y: Tensor = _Frozen.apply(x, layer)
    return y


class _Frozen(torch.autograd.Function):
    """x W^T for a weight that is made dense for each product, and never kept so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return _product(x, layer, is_turned=True)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return _product(upstream[0], ctx.layer, is_turned=False), None


def _product(x: Tensor, layer: nn.Linear, *, is_turned: bool) -> Tensor:
    """x W^T, or x W."""
    packing = _packing_of(layer)
    if packing is None:
        return x @ (layer.weight.T if is_turned else layer.weight)
    return packing.product(x, _bytes_of(layer), is_turned=is_turned)


def _packing_of(layer: nn.Linear) -> Packing | None:
    """What makes numbers of the layer's bytes; None where its weight is, or for now looks like, numbers."""
    return None if layer.weight.is_floating_point() else getattr(layer, PACKED)


def _bytes_of(layer: nn.Linear) -> Tensor:
    """What this process has of the bytes of a weight."""
    weight = layer.weight
    return (weight.to_local() if isinstance(weight, DTensor) else weight).data


def linear_weights(model: Any, quantization: str) -> frozenset[str]:
    """The names of the weights that are kept in fewer bits, of a model that has none of them yet."""
    chosen = {id(layer.weight) for layer in frozen_layers(model)} if quantization != NONE else set[int]()
    return frozenset(name for name, one in model.named_parameters() if id(one) in chosen)


@torch.no_grad()
def quantised(weight: Tensor, quantization: str) -> nn.Linear:
    """A linear layer with this weight [N, M], kept in 4 or 8 bits as in a model that was read so, on its device."""
    with quiet():
        import_module(METHODS[quantization].package)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    if quantization == "int4":
        from bitsandbytes.functional import quantize_4bit
        from bitsandbytes.nn import Params4bit

        low, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
        layer.weight = Params4bit(low, quant_state=state, quant_type="nf4", bnb_quantized=True)
    else:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        layer.weight = nn.Parameter(weight, requires_grad=False)
        quantize_(layer, Int8WeightOnlyConfig())
    return layer


def rounded(weight: Tensor, quantization: str) -> Tensor:
    """[N, M] in float32: the numbers of the weight of a linear layer once it is kept in 4 or 8 bits, by which a model
    that was read so multiplies."""
    bytes_of, packing = packed(quantised(weight, quantization).weight)
    return packing.dense(bytes_of).to(torch.float32)


@torch.no_grad()
def dequantise(model: nn.Module) -> None:
    """Put ordinary float32 layers with the same numbers in the place of quantised ones, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and hasattr(module, PACKED):
            made = plain_like(module)
            made.weight, made.bias = nn.Parameter(dense(module, torch.float32), requires_grad=False), module.bias
            if hasattr(module, TURNED):
                setattr(made, TURNED, True)
            model.set_submodule(name, made)


@torch.no_grad()
def turn_back(model: nn.Module) -> None:
    """Let layers whose weight files hold turned multiply by a turned weight again, in place."""
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and hasattr(module, TURNED):
            with torch.device("meta"):
                made = Conv1D(module.out_features, module.in_features)
            made.weight, made.bias = nn.Parameter(module.weight.T.contiguous(), requires_grad=False), module.bias
            model.set_submodule(name, made)
