"""SFTTrainer beside TRL's own, on the same rows, model and configuration: the same losses, step by step.

Of conversations TRL also trains what the template writes behind the end of a turn, here a line break; so these differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from training_hub import SFTTrainer

ROWS: dict[str, list[dict[str, Any]]] = {
    "prompt and completion": [{"prompt": f"What comes after {n}? ", "completion": f"{n + 1}."} for n in range(16)],
    "text": [{"text": f"After {n} comes {n + 1}." + " And so on." * (n % 3)} for n in range(16)],
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ROWS)
def test_the_same_configuration_gives_the_losses_of_trl(
    kind: str, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trl = pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    config = trl.SFTConfig(
        output_dir="theirs", max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-3, train_sampling_strategy="sequential", bf16=False, use_cpu=True,
        report_to="none", gradient_checkpointing=False, max_length=128, logging_steps=1, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_list(ROWS[kind])
    theirs = trl.SFTTrainer(model=str(tiny_model_folder), args=config, train_dataset=rows)
    theirs.train()
    config.output_dir = "ours"
    ours = SFTTrainer(model=str(tiny_model_folder), args=config, train_dataset=rows)
    ours.train()
    wanted, found = (
        [[row[name] for name in ("loss", "grad_norm")] for row in one.state.log_history if "loss" in row]
        for one in (theirs, ours)
    )
    assert len(wanted) == len(found) == 4
    for theirs_row, ours_row in zip(wanted, found, strict=True):
        # Float32 in another order of sums, over four steps of AdamW at 1e-3.
        assert ours_row == pytest.approx(theirs_row, rel=1e-5)
