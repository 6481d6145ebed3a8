"""Runs whose products are not torch's own keep every promise: same curve, packed = alone, resumed = uninterrupted.

By our own kernel where the processor has its instructions, else by oneDNN.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.backends.torch_engine.tiny_models import FAMILIES
from tests.invariants.run import final_weights, train
from tests.invariants.test_families import folder_of
from training_hub.backends.torch_engine.fused import onednn, panels
from training_hub.errors import TrainingError

HAS_OWN = panels.problem(torch.float32) is None
pytestmark = pytest.mark.skipif(not HAS_OWN and onednn.problem() is not None, reason=str(onednn.problem()))

WIDE = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.05}
SETTINGS = {"optimizer": {"name": "SGD", "lr": 0.1}, "training": {"steps": 4}, "checkpoint": {"interval": 1}}


@pytest.fixture(scope="module")
def taken():
    """The products that were asked for; as on a processor on which MKL is slow, whichever this is."""
    module, name = (panels, "_multiply") if HAS_OWN else (onednn, "_by_onednn")
    counted, own = [], getattr(module, name)

    def counting(*matrices, **named):
        counted.append(matrices[0].shape)
        return own(*matrices, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panels, "is_trusted", lambda dtype: HAS_OWN and dtype == torch.float32)
        patch.setattr(onednn, "is_trusted", lambda: True)
        patch.setattr(module, name, counting)
        yield counted


@pytest.fixture(scope="module")
def wide(tiny_model_folder, tmp_path_factory) -> Path:
    """A model whose products with a pack are large enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "wide", ("LlamaConfig", WIDE))
        return folder_of("wide", tiny_model_folder, tmp_path_factory.mktemp("wide") / "model")


@pytest.fixture(scope="module")
def unbroken(taken, wide, chat_file, tmp_path_factory):
    result = train(wide, chat_file, tmp_path_factory.mktemp("runs") / "unbroken", **SETTINGS)
    # Seven matrices of a layer, each in forward and for two gradients, but for what the last layer leaves out.
    assert len(taken) > 4 * 2 * 7
    return result


def losses(result) -> list[float]:
    return [row["loss"] for row in result.history]


def apart(one, other) -> float:
    first, second = final_weights(one), final_weights(other)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_a_run_that_fails_goes_on_to_the_same_bits(unbroken, wide, chat_file, tmp_path):
    def pull_the_plug(report) -> None:
        if report.step == 2:
            raise KeyError("the plug was pulled")

    with pytest.raises(TrainingError, match="the plug was pulled"):
        train(wide, chat_file, tmp_path / "run", [pull_the_plug], **SETTINGS)
    resumed = train(wide, chat_file, tmp_path / "run", **SETTINGS)
    assert losses(resumed) == losses(unbroken)
    assert all(torch.equal(final_weights(resumed)[name], one) for name, one in final_weights(unbroken).items())


def test_one_sample_at_a_time_learns_the_same(unbroken, wide, chat_file, tmp_path):
    """Samples alone are too small: so this is also a run of torch's own products. Tolerances as in test_batches.py."""
    alone = train(wide, chat_file, tmp_path / "alone", **SETTINGS, data={"packing": False})
    assert losses(alone) == pytest.approx(losses(unbroken), rel=1e-6)
    assert apart(alone, unbroken) < 1e-6


def test_adapters_beside_such_weights_learn_what_they_learn_beside_others(taken, wide, chat_file, tmp_path):
    pytest.importorskip("peft")
    settings = {**SETTINGS, "algorithm": "lora_sft", "lora": {"r": 4}, "optimizer": {"lr": 1e-3}}
    before = len(taken)
    together = train(wide, chat_file, tmp_path / "together", **settings)
    assert len(taken) > before
    alone = train(wide, chat_file, tmp_path / "alone", **settings, data={"packing": False})
    # AdamW divides by the root of squares, which turns rounding of small gradients into 1e-4 of a step.
    assert losses(alone) == pytest.approx(losses(together), rel=1e-5)
