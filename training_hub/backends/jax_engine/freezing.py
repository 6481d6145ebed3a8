"""What freezing tells apart of a model of this engine, under the names that the torch engine knows; no JAX here."""

from __future__ import annotations

from training_hub.backends.jax_engine.shapes import Shape
from training_hub.backends.jax_engine.table import ends, leaves, of_layer
from training_hub.backends.shared.freezing import Parts

TABLES = ("embed", "places")

FUSED = {"gates": "gate_up_proj", "ups": "gate_up_proj", "downs": "down_proj"}
"""What transformers calls, in memory, the experts of a layer, which are one weight there."""


def parts_of(shape: Shape) -> Parts:
    """The weights of a model of this shape by their names in memory, those of transformers beside them."""
    outer = ends(shape)
    names = [(name, key) for key, _ in leaves(shape) for name in [_name(key, shape)]]
    if shape.is_tied:
        names.append(("lm_head.weight", outer["embed"].key(0)))
    return Parts(
        names=names,
        blocks=[tuple(leaf.key(layer) for leaf in of_layer(shape, layer).values()) for layer in range(shape.layers)],
        tables=tuple(leaf.key(0) for name, leaf in outer.items() if name in TABLES),
        model=f"a {shape.family}",
    )


def tables_of(shape: Shape) -> frozenset[str]:
    """The weights with one row for each token or position: embeddings, and a head of its own."""
    return frozenset(leaf.key(0) for name, leaf in ends(shape).items() if name in (*TABLES, "head"))


def _name(key: str, shape: Shape) -> str:
    """The name in transformers' memory of the weight `key`."""
    place, _, own = key.partition(".experts.")
    place = place.replace("block_sparse_moe", "mlp")
    if not own:
        return place
    layer = int(key.split(".")[2])
    which = next(name for name, leaf in of_layer(shape, layer).items() if leaf.key(layer) == key)
    return f"{place}.experts.{FUSED[which]}"
