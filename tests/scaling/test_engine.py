"""What plans on paper say of a layout is what the engine's estimate says of it, which real processes are held to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from training_hub.backends.torch_engine.fused.build import kernels
from training_hub.backends.torch_engine.layouts.share import Share
from training_hub.backends.torch_engine.planning.memory import GIB, estimate
from training_hub.recipe.parallelism import FIELDS, Degrees, Parallelism
from training_hub.recipe.sections import Optimizer
from training_hub.scaling.formulas import LOW, Work, kept_numbers, memory
from training_hub.scaling.models import KEPT
from training_hub.types import Pack

LENGTH = 8192
SHAPE = KEPT["llama3_8b"]


@pytest.fixture(scope="module")
def model() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=SHAPE.width,
        intermediate_size=SHAPE.inner,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.key_heads,
        vocab_size=SHAPE.vocabulary,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def one_sample() -> Pack:
    weights = np.ones(LENGTH, np.float32)
    weights[0] = 0
    ids, positions = np.zeros(LENGTH, np.int32), np.arange(LENGTH, dtype=np.int32)
    return Pack(ids, positions, weights, np.array([0, LENGTH], np.int32), np.zeros(1, np.int64))


@pytest.mark.skipif(kernels() is None, reason="the formulas count what our kernels keep, which no compiler could build")
@pytest.mark.parametrize(
    ("degrees", "how"),
    [
        (Degrees(dp_replicate=8), "none"),
        (Degrees(dp_shard=8), "none"),
        (Degrees(dp_shard=8), "selective"),
        (Degrees(dp_shard=4, tp=2), "none"),
        (Degrees(dp_shard=4, tp=2), "full"),
    ],
)
def test_paper_and_engine_agree_on_state_and_activations(degrees: Degrees, how: str, model):
    asked = Parallelism(**{field: getattr(degrees, name) for name, field in FIELDS.items()})
    found = estimate(
        model, Optimizer(), torch.bfloat16, torch.device("cpu"), one_sample(),
        share=Share.of(asked, 8), checkpointing=how,
    )  # fmt: skip
    paper = memory(SHAPE, degrees, Work(8, LENGTH, 1, how))
    state = sum(found[name] for name in ("weights", "masters", "gradients", "optimizer"))
    assert state * GIB == pytest.approx(paper.state, rel=1e-3)
    head = 4 * SHAPE.vocabulary * SHAPE.width / degrees.tp  # which the engine's forward makes, too
    kept = LOW * SHAPE.layers * LENGTH / (degrees.cp * degrees.tp) * kept_numbers(SHAPE, how)
    beside = LOW * LENGTH * SHAPE.width  # what the head is asked about
    # The formulas leave out a few numbers for each token, and the masks by which a part of the tokens attends.
    assert found["activations"] * GIB - head - beside == pytest.approx(kept, rel=0.1)
