"""Tiny models as folders, and the model that the jax engine makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from tests.backends.torch_engine.tiny_models import from_config, tiny_config
from training_hub.backends.jax_engine import shapes, weights
from training_hub.backends.jax_engine.decoder import Build
from training_hub.backends.jax_engine.document_loops import in_loops
from training_hub.backends.jax_engine.forward import Forward
from training_hub.data.packing import pack
from training_hub.monitoring.console import open_console
from training_hub.recipe.sections import Model
from training_hub.types import Origin, Pack, Sample

LENGTHS = (11, 40, 23, 3)


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of the family, saved into the folder by transformers."""
    model = from_config(tiny_config(family, **changes), dtype).eval()
    model.save_pretrained(folder)
    return model


def read(folder: Path) -> tuple[shapes.Shape, weights.Loaded]:
    """What the jax engine reads of the folder."""
    shape = shapes.shape_of(shapes.read_config(Model(path=str(folder))))
    return shape, weights.load(folder, shape, open_console("off"))


def forward(shape: shapes.Shape, **options: Any) -> Forward:
    return Forward(Build(shape, in_loops, jnp.float32), **options)


def random_pack(lengths: tuple[int, ...] = LENGTHS, vocabulary: int = 128) -> Pack:
    """Documents of random tokens, each trained with random weights, some of them 0."""
    random = np.random.default_rng(0)
    samples = []
    for length in lengths:
        some = random.random(length).astype(np.float32) * (random.random(length) > 0.3)
        samples.append(Sample(random.integers(0, vocabulary, length, np.int32), some, Origin("random", 1)))
    return pack(samples, range(len(samples)))


def losses(result: Any) -> np.ndarray:
    """The losses of a run, step by step."""
    return np.array([row["loss"] for row in result.history])
