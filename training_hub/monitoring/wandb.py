"""Steps at Weights & Biases."""

from __future__ import annotations

import secrets
from importlib.util import find_spec
from pathlib import Path

from training_hub.errors import BackendError
from training_hub.monitoring.progress_line import is_due
from training_hub.monitoring.series import series
from training_hub.monitoring.settings import public_settings
from training_hub.monitoring.tracked_run import known_id, remember_id
from training_hub.recipe import Recipe
from training_hub.types import StepReport


def objection(recipe: Recipe) -> str | None:
    """Why Weights & Biases, if asked for, cannot be reported to from here."""
    if not recipe.monitoring.wandb or find_spec("wandb") is not None:
        return None
    return "wandb is not installed: pip install 'training-hub[wandb]', or set monitoring.wandb to false."


class WandbRun:
    """A watcher that reports to Weights & Biases; its own files go under `wandb` in the run folder.

    A resumed run goes on in the same run there. Raises BackendError where that service refuses (no login, say).
    """

    def __init__(self, recipe: Recipe, run_folder: Path, resume_step: int = 0):
        import wandb

        asked = recipe.monitoring
        identity = (known_id(run_folder, "wandb") if resume_step else None) or secrets.token_hex(4)
        try:
            self._run = wandb.init(
                project=asked.wandb_project,
                entity=asked.wandb_entity,
                name=asked.wandb_run_name,
                id=identity,
                resume="allow",
                dir=str(run_folder),
                config=public_settings(recipe),
                # Left on, these send the command line, the git remote, the code and the package list of the user.
                settings=wandb.Settings(
                    console="off",
                    disable_code=True,
                    disable_git=True,
                    x_disable_machine_info=True,
                    x_disable_meta=True,
                    x_save_requirements=False,
                ),
            )
        except wandb.errors.Error as error:
            raise BackendError(
                f"monitoring.wandb: Weights & Biases refused the run ({error}). Log in with `wandb login`, set "
                "WANDB_MODE=offline, or set monitoring.wandb to false."
            ) from error
        remember_id(run_folder, "wandb", identity)
        self._interval = asked.log_interval
        # With its own step axis, steps repeated after a resume are taken; W&B's counter would drop them.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def __call__(self, report: StepReport) -> None:
        if is_due(report, self._interval):
            self._run.log({"step": report.step, **series(report)})

    def close(self, status: str = "finished") -> None:
        """End the run there; `status` other than finished shows it as failed."""
        self._run.finish(exit_code=0 if status == "finished" else 1)
