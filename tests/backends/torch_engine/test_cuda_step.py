"""Steps of whole runs on a GPU, in which the host waits for the device only where it reads the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.backends.torch_engine.steps import CASES, assembled, gradients, update
from training_hub.backends.torch_engine.recording import Recorder, cuda_graphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

GPU = torch.device("cuda")


@contextmanager
def nobody_waits() -> Iterator[None]:
    """Within, an operation that makes the host wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", CASES)
def test_the_host_waits_only_where_it_reads_the_loss(
    case: str, tiny_model_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    run = assembled(case, GPU, tiny_model_folder, chat_file, tmp_path)
    gradients(run, run.feed.batch(1, 0, 1))
    update(run)  # has built kernels and the optimizer's state
    for number in (2, 3):
        with nobody_waits():
            mean, norm = gradients(run, run.feed.batch(number, 0, 1))
        assert math.isfinite(float(mean)) and float(norm) > 0
        with nobody_waits():
            update(run)


def test_a_wait_is_found(tiny_model_folder: Path, chat_file: Path, tmp_path: Path) -> None:
    run = assembled("full", GPU, tiny_model_folder, chat_file, tmp_path)
    mean, _ = gradients(run, run.feed.batch(1, 0, 1))
    with nobody_waits(), pytest.raises(RuntimeError, match="synchroniz"):
        mean.item()


@pytest.mark.parametrize("case", ["full", "8-bit moments", "lora", "lora with dropout"])
def test_replayed_steps_are_those_that_run_by_themselves(
    case: str, tiny_model_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    found = []
    for is_recorded in (False, True):
        output = tmp_path / str(is_recorded)
        output.mkdir()
        run = assembled(case, GPU, tiny_model_folder, chat_file, output)
        if is_recorded:
            masters = run.updater.masters
            run.recorder = Recorder(run.model, run.objective, masters, 128, GPU, run.console, cuda_graphs())
        for number in range(1, 9):
            mean, norm = gradients(run, run.feed.batch(number, 0, 1))
            found.append([float(mean), float(norm)])
            update(run)
    assert run.recorder is not None and run.recorder.sizes, run.recorder and run.recorder.refused
    if "dropout" not in case:  # other numbers are drawn for a pack of another length
        for ours, theirs in zip(found[8:], found[:8], strict=True):
            assert ours == pytest.approx(theirs, rel=0.03)  # bfloat16, in packs of other lengths
    with nobody_waits():
        gradients(run, run.feed.batch(8, 0, 1))
