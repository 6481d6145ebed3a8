"""What another version of torch or transformers does otherwise is asked for, and refused in words where it lacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from tests.backends.torch_engine.tiny_models import tiny_config, tiny_model
from tests.invariants.run import recipe
from training_hub.backends.torch_engine.engine import TorchEngine
from training_hub.backends.torch_engine.layouts.abilities import can_split_backward
from training_hub.backends.torch_engine.layouts.fitness import split_problems
from training_hub.recipe.parallelism import Degrees, Parallelism


def test_a_plan_may_name_the_table_of_embeddings_or_not():
    """transformers 5.17 adds it to the plan of every model whose table is its head."""
    config = tiny_config("llama-tied")
    for inner in ({}, {"embed_tokens": "embedding_rowwise"}):
        config.base_model_tp_plan = {**config.base_model_tp_plan, **inner}
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        assert split_problems(model, Degrees(tp=2), Parallelism()) == []


@pytest.mark.parametrize("order", ["ZBVZeroBubble", "InterleavedZeroBubble"])
def test_gradients_of_weights_are_made_apart_where_torch_does_that_rightly(order: str, tmp_path: Path):
    tiny_model("llama", num_hidden_layers=4).save_pretrained(tmp_path / "model")
    parallelism = {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": order}
    paths = (tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "out")
    said = TorchEngine().objections(recipe(*paths, processes={"procs": 2}, parallelism=parallelism))
    wrong = f"{order} makes gradients of weights by itself, which torch {torch.__version__} does wrongly"
    assert any(wrong in problem for problem in said) is not can_split_backward()
    # The first version that is known to do it; an older one may be told apart by this alone.
    assert can_split_backward() or torch.__version__ < "2.13"
