"""Five steps of the reference implementation are reproduced: loss, gradient norm, weights and projectors."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.backends.torch_engine.osft import dump
from training_hub.backends.torch_engine.adaptations.osft.decompose import Split

# Loss and norm; dense weights and projectors. Float64: as the last digits of other sums leave them. Float32: Adam turns
# a gradient's rounding into a step of up to its learning rate (1e-3) where the gradient itself is nearly 0.
TOLERANCES = {"float64_5steps": (1e-10, 1e-12), "float32_5steps": (1e-5, 1e-3)}
PROJECTORS = {"float64_5steps": 1e-12, "float32_5steps": 1e-4}


def protected_projectors(split: Split, is_wide: bool) -> tuple[Tensor, Tensor]:
    """U_h U_h^T and V_h^T V_h of the parameter as it lies in the model."""
    short = torch.eye(split.right.shape[-1], dtype=split.right.dtype) - split.right.T @ split.right
    long = split.protected @ split.protected.T
    if split.is_square:
        long = torch.eye(split.left.shape[0], dtype=split.left.dtype) - split.left @ split.left.T
    return (short, long) if is_wide else (long, short)


@pytest.mark.parametrize("name", TOLERANCES)
def test_the_wrapper_reproduces_the_reference(test_data, name):
    folder = dump.dump_folder(test_data, name)
    model = dump.model_of(folder)
    optimizer = dump.optimizer_of(folder, model)
    kept = {
        one.target.name: one.target.short_side - one.trained.split.left.shape[-1] for one in optimizer.spaces.spaces
    }
    assert kept == dump.settings(folder)["osft_config"]
    close, weights_close = TOLERANCES[name]
    for said, batch in zip(dump.steps(folder), dump.batches(folder), strict=True):
        inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
        loss, norm = dump.step(model, optimizer, inputs, batch["labels"])
        assert loss == pytest.approx(said["loss"], rel=close)
        assert norm == pytest.approx(said["grad_norm"], rel=close)
    final = load_file(folder / "final.safetensors")
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), final[key], rtol=0, atol=weights_close)
    wanted = dump.projectors(folder, "init")
    for one in optimizer.spaces.spaces:
        for ours, theirs in zip(
            protected_projectors(one.trained.split, one.target.is_wide), wanted[one.target.name], strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=PROJECTORS[name])
