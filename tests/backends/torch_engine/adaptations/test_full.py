"""Full fine-tuning."""

from __future__ import annotations

import torch

from tests.backends.torch_engine.tiny_models import tiny_model
from training_hub.backends.torch_engine.adaptations.full import Full
from training_hub.backends.torch_engine.saving.base_weights import Written


def test_every_weight_may_move_even_one_that_was_frozen() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.requires_grad_(False)
    assert Full().attach(model) is model
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_export_writes_what_the_optimizer_moves_under_every_name_of_a_tied_weight() -> None:
    model, adaptation = tiny_model("llama-tied", torch.bfloat16), Full()
    adaptation.attach(model)
    moved = {"model.embed_tokens.weight": torch.full((128, 32), 1 / 3)}
    exported = adaptation.export(moved, Written(torch.float32))
    assert exported.keys() == model.state_dict().keys()
    assert (exported["lm_head.weight"] == torch.tensor(1 / 3)).all()
    assert exported["lm_head.weight"] is exported["model.embed_tokens.weight"]
    assert torch.equal(exported["model.norm.weight"], model.model.norm.weight.float())
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
