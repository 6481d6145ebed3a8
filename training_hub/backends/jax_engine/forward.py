"""From tokens to hidden states: embedding, layers laid out or scanned, final norm."""

# B packs side by side, T tokens, D width, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from training_hub.backends.jax_engine.attention import FAR
from training_hub.backends.jax_engine.decoder import Build, Place, block, gpt2_block, layer_norm, place_of, rms_norm
from training_hub.backends.jax_engine.noise import Noise, disturbed, drop, token_keys
from training_hub.backends.jax_engine.products import KEPT, ein
from training_hub.backends.jax_engine.table import LEFT, RIGHT, adapter_key, ends, of_layer

Params = Mapping[str, Array]
"""Every weight by its name in memory (table.py), and those of an adapter by the matrix beside which they stand."""

FORGET: Mapping[str, Any] = {
    "none": None,
    "selective": jax.checkpoint_policies.save_only_these_names(KEPT),
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What a layer keeps for backward: all, the results of matrix products and of attention, or its input alone."""


@dataclass(frozen=True)
class Forward:
    """The forward pass of a model, as a function of its weights.

    forget: what of each layer is made again in backward. is_scanned: one compiled layer runs over stacked weights;
    compiles faster, and is what accelerators want. Laid out, XLA sees all layers, which is 1.4 times as fast on a CPU;
    but there it finds what is to be made again among what it has, and keeps it.
    """

    build: Build
    forget: str = "none"
    is_scanned: bool = False

    def hidden(
        self, params: Params, ids_BT: Array, positions_BT: Array, segments_BT: Array, noise: Noise | None = None
    ) -> Array:
        """[B, T, D]: what the decoder says at every position; with `noise`, in training."""
        build, shape = self.build, self.build.shape
        outer = {name: params[leaf.key(0)] for name, leaf in ends(shape).items()}
        x_BTD = build.gather(outer["embed"])[ids_BT].astype(build.dtype)
        if shape.embed_scale != 1.0:
            x_BTD = x_BTD * jnp.asarray(shape.embed_scale, build.dtype)
        place = place_of(shape, segments_BT, positions_BT, build.dtype)
        if noise is not None:
            place = replace(place, keys=token_keys(noise, positions_BT))
            x_BTD = disturbed(x_BTD, place.keys, noise.lengths, build.rates.alpha)
        if "places" in outer:
            x_BTD = x_BTD + build.gather(outer["places"])[positions_BT].astype(build.dtype)
        x_BTD = drop(x_BTD, place.keys, "embedding", build.rates.embedding)
        run = _scan if self.is_scanned else _lay_out
        x_BTD = run(self, params, x_BTD, place)
        if shape.is_gpt2:
            return layer_norm(x_BTD, outer["norm"], outer["norm_bias"], shape.eps)
        return rms_norm(x_BTD, outer["norm"], shape)

    @property
    def head(self) -> str:
        """The name of the matrix [V, D] that makes logits of hidden states."""
        outer = ends(self.build.shape)
        return (outer["embed"] if self.build.shape.is_tied else outer["head"]).key(0)

    def logits(self, params: Params, ids_BT: Array, positions_BT: Array, segments_BT: Array) -> Array:
        """[B, T, V] float32; for comparing, since training never needs them all."""
        return ein("btd,vd->btv", self.hidden(params, ids_BT, positions_BT, segments_BT), params[self.head])

    def layer(self, window: Array | int) -> Callable[[Array, Mapping[str, Array], Place], Array]:
        """One layer as a function of (input, weights, place), forgetting what it is to."""
        of_kind = gpt2_block if self.build.shape.is_gpt2 else block

        def one(x_BTD: Array, weights: Mapping[str, Array], place: Place) -> Array:
            return of_kind(self.build, x_BTD, weights, place, window)

        if self.forget == "none":
            return one
        return jax.checkpoint(one, policy=FORGET[self.forget], prevent_cse=not self.is_scanned)


def layer_weights(forward: Forward, params: Params, layer: int) -> dict[str, Array]:
    """The weights of a layer by leaf, with those of an adapter."""
    found: dict[str, Array] = {}
    for name, leaf in of_layer(forward.build.shape, layer).items():
        key = leaf.key(layer)
        found[name] = params[key]
        for side in (LEFT, RIGHT) if leaf.is_linear else ():
            if adapter_key(key, side) in params:
                found[f"{name}.{side}"] = params[adapter_key(key, side)]
    return found


def _windows(forward: Forward) -> list[int]:
    return [window or FAR for window in forward.build.shape.windows]


def _lay_out(forward: Forward, params: Params, x_BTD: Array, place: Place) -> Array:
    for number, window in enumerate(_windows(forward)):
        x_BTD = forward.layer(window)(x_BTD, layer_weights(forward, params, number), place.at_layer(number))
    return x_BTD


def _scan(forward: Forward, params: Params, x_BTD: Array, place: Place) -> Array:
    """Runs of layers of one kind, each run one program."""
    shape, first = forward.build.shape, 0
    for _, run in groupby(shape.has_experts(number) for number in range(shape.layers)):
        numbers = range(first, first := first + len(list(run)))
        x_BTD = _scan_run(forward, params, numbers, x_BTD, place)
    return x_BTD


def _scan_run(forward: Forward, params: Params, numbers: Sequence[int], x_BTD: Array, place: Place) -> Array:
    layers = [layer_weights(forward, params, number) for number in numbers]
    # Stacked in the format of the products: a copy that is made anyway where masters are float32.
    stacked = {name: jnp.stack([_in_format(each[name], forward.build.dtype) for each in layers]) for name in layers[0]}
    windows, places = [_windows(forward)[number] for number in numbers], jnp.asarray(numbers)
    if len(set(windows)) == 1:  # known while compiling, which kernels need
        layer = forward.layer(windows[0])

        def alike(x: Array, of_one: tuple[dict[str, Array], Array]) -> tuple[Array, None]:
            weights, number = of_one
            return layer(x, weights, place.at_layer(number)), None

        return lax.scan(alike, x_BTD, (stacked, places))[0]

    def step(x: Array, of_one: tuple[dict[str, Array], Array, Array]) -> tuple[Array, None]:
        weights, window, number = of_one
        return forward.layer(window)(x, weights, place.at_layer(number)), None

    return lax.scan(step, x_BTD, (stacked, jnp.asarray(windows), places))[0]


def _in_format(weight: Array, dtype: Any) -> Array:
    return weight.astype(dtype) if weight.ndim >= 2 else weight
