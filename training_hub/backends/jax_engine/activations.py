"""What units do to each number between two matrices, by the names that configs give it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
from jax import Array

ACTIVATE: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}
