"""The table of a model's weights: {leaf: where Hugging Face keeps it, whether it lies transposed, its axes}.

Loading, saving, the names of adapters and the sharding of every family follow from it. A weight is held in memory as
it lies in the file, under the file's name, so that what is saved is what was read; experts alone are stacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from training_hub.backends.jax_engine.shapes import Shape

EXPERT = "{expert}"
STACKED = "*"
"""What stands in a name in memory for the number of the expert: all of them are one array."""


@dataclass(frozen=True)
class Leaf:
    """One weight of the model, or of each layer.

    name: of its tensor, with {layer} and {expert} where there are several. axes: what each dimension is, as it lies in
    the file: vocabulary, width, heads, hidden or experts. is_transposed: a matrix that lies as [in, out].
    is_linear: a linear layer of a block, which adapters and OSFT are about.
    """

    name: str
    axes: tuple[str, ...]
    is_transposed: bool = False
    is_linear: bool = False

    def key(self, layer: int) -> str:
        """The name in memory of this weight of `layer`."""
        return self.name.replace("{layer}", str(layer)).replace(EXPERT, STACKED)

    @property
    def is_of_layer(self) -> bool:
        return "{layer}" in self.name

    @property
    def is_of_experts(self) -> bool:
        return EXPERT in self.name


def _matrix(name: str, axes: tuple[str, ...]) -> Leaf:
    return Leaf(name, axes, is_linear=True)


LAYER = "model.layers.{layer}."

ATTENTION: Mapping[str, Leaf] = {
    "q": _matrix(LAYER + "self_attn.q_proj.weight", ("heads", "width")),
    "k": _matrix(LAYER + "self_attn.k_proj.weight", ("heads", "width")),
    "v": _matrix(LAYER + "self_attn.v_proj.weight", ("heads", "width")),
    "o": _matrix(LAYER + "self_attn.o_proj.weight", ("width", "heads")),
}
QKV_BIAS: Mapping[str, Leaf] = {
    f"{one}_bias": Leaf(LAYER + f"self_attn.{one}_proj.bias", ("heads",)) for one in ("q", "k", "v")
}
OUT_BIAS: Mapping[str, Leaf] = {"o_bias": Leaf(LAYER + "self_attn.o_proj.bias", ("width",))}
Q_NORM: Mapping[str, Leaf] = {
    "q_norm": Leaf(LAYER + "self_attn.q_norm.weight", ("",)),
    "k_norm": Leaf(LAYER + "self_attn.k_norm.weight", ("",)),
}
NORMS: Mapping[str, Leaf] = {
    "norm1": Leaf(LAYER + "input_layernorm.weight", ("",)),
    "norm2": Leaf(LAYER + "post_attention_layernorm.weight", ("",)),
}
GATED: Mapping[str, Leaf] = {
    "gate": _matrix(LAYER + "mlp.gate_proj.weight", ("hidden", "width")),
    "up": _matrix(LAYER + "mlp.up_proj.weight", ("hidden", "width")),
    "down": _matrix(LAYER + "mlp.down_proj.weight", ("width", "hidden")),
}
MLP_BIAS: Mapping[str, Leaf] = {
    "gate_bias": Leaf(LAYER + "mlp.gate_proj.bias", ("hidden",)),
    "up_bias": Leaf(LAYER + "mlp.up_proj.bias", ("hidden",)),
    "down_bias": Leaf(LAYER + "mlp.down_proj.bias", ("width",)),
}


def _mixture(place: str, gate: str, up: str, down: str) -> Mapping[str, Leaf]:
    each = f"{LAYER}{place}.experts.{EXPERT}."
    return {
        "router": Leaf(f"{LAYER}{place}.gate.weight", ("", "width")),
        "gates": Leaf(f"{each}{gate}.weight", ("experts", "hidden", "width")),
        "ups": Leaf(f"{each}{up}.weight", ("experts", "hidden", "width")),
        "downs": Leaf(f"{each}{down}.weight", ("experts", "width", "hidden")),
    }


EXPERTS: Mapping[str, Mapping[str, Leaf]] = {
    "mixtral": _mixture("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": _mixture("mlp", "gate_proj", "up_proj", "down_proj"),
}

ENDS: Mapping[str, Leaf] = {
    "embed": Leaf("model.embed_tokens.weight", ("vocabulary", "width")),
    "norm": Leaf("model.norm.weight", ("",)),
}
HEAD: Mapping[str, Leaf] = {"head": Leaf("lm_head.weight", ("vocabulary", "width"))}

BLOCK = "transformer.h.{layer}."


def _conv1d(name: str, axes: tuple[str, str]) -> Leaf:
    return Leaf(BLOCK + name, axes, is_transposed=True, is_linear=True)


GPT2: Mapping[str, Leaf] = {
    "embed": Leaf("transformer.wte.weight", ("vocabulary", "width")),
    "places": Leaf("transformer.wpe.weight", ("", "width")),
    "norm": Leaf("transformer.ln_f.weight", ("",)),
    "norm_bias": Leaf("transformer.ln_f.bias", ("",)),
    "norm1": Leaf(BLOCK + "ln_1.weight", ("",)),
    "norm1_bias": Leaf(BLOCK + "ln_1.bias", ("",)),
    "norm2": Leaf(BLOCK + "ln_2.weight", ("",)),
    "norm2_bias": Leaf(BLOCK + "ln_2.bias", ("",)),
    "qkv": _conv1d("attn.c_attn.weight", ("width", "")),
    "qkv_bias": Leaf(BLOCK + "attn.c_attn.bias", ("",)),
    "o": _conv1d("attn.c_proj.weight", ("heads", "width")),
    "o_bias": Leaf(BLOCK + "attn.c_proj.bias", ("width",)),
    "up": _conv1d("mlp.c_fc.weight", ("width", "hidden")),
    "up_bias": Leaf(BLOCK + "mlp.c_fc.bias", ("hidden",)),
    "down": _conv1d("mlp.c_proj.weight", ("hidden", "width")),
    "down_bias": Leaf(BLOCK + "mlp.c_proj.bias", ("width",)),
}


LEFT, RIGHT = "lora_B", "lora_A"
"""The two matrices of an adapter, as PEFT calls them: W + scale x left x right."""


def adapter_key(key: str, side: str) -> str:
    """The name in memory, that of the torch engine, of one side of the adapter beside the weight `key`."""
    return f"{key.removesuffix('.weight')}.{side}.default.weight"


def ends(shape: Shape) -> dict[str, Leaf]:
    """The weights outside the layers."""
    if shape.is_gpt2:
        own = {name: leaf for name, leaf in GPT2.items() if not leaf.is_of_layer}
    else:
        own = dict(ENDS)
    return own if shape.is_tied else {**own, **HEAD}


def of_layer(shape: Shape, layer: int) -> dict[str, Leaf]:
    """The weights of one layer."""
    if shape.is_gpt2:
        return {name: leaf for name, leaf in GPT2.items() if leaf.is_of_layer}
    leaves = {**NORMS, **ATTENTION}
    leaves |= QKV_BIAS if shape.qkv_bias else {}
    leaves |= OUT_BIAS if shape.out_bias else {}
    leaves |= Q_NORM if shape.q_norm else {}
    if shape.has_experts(layer):
        return {**leaves, **EXPERTS[shape.family]}
    return {**leaves, **GATED, **(MLP_BIAS if shape.mlp_bias else {})}


def leaves(shape: Shape) -> Iterator[tuple[str, Leaf]]:
    """The name in memory and the leaf of every weight, in the model's order."""
    outer = [(leaf.key(0), leaf) for leaf in ends(shape).values()]
    yield from outer[:1]
    for layer in range(shape.layers):
        yield from ((leaf.key(layer), leaf) for leaf in of_layer(shape, layer).values())
    yield from outer[1:]


def tensors(key: str, leaf: Leaf, shape: Shape) -> list[str]:
    """The names in the files of what is held under `key`: one, or one for each expert."""
    if not leaf.is_of_experts:
        return [key]
    return [key.replace(STACKED, str(expert)) for expert in range(shape.experts)]
