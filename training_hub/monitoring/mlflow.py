"""Steps at MLflow."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_hub.errors import BackendError
from training_hub.monitoring.progress_line import is_due
from training_hub.monitoring.series import series
from training_hub.monitoring.settings import flattened, public_settings
from training_hub.monitoring.tracked_run import known_id, remember_id
from training_hub.recipe import Recipe
from training_hub.types import Console, StepReport

if TYPE_CHECKING:
    from mlflow import MlflowClient

SECONDS_BETWEEN_SENDS = 5.0
MOST_POINTS_AT_ONCE = 1000
"""What one call of MLflow's log_batch takes; https://mlflow.org/docs/latest/rest-api.html#log-batch."""
MOST_PARAMETERS_AT_ONCE = 100
LONGEST_PARAMETER = 6000


def objection(recipe: Recipe) -> str | None:
    """Why MLflow, if asked for, cannot be reported to from here."""
    if not recipe.monitoring.mlflow:
        return None
    remedy = "pip install 'training-hub[mlflow]', or set monitoring.mlflow to false."
    if find_spec("mlflow") is None:
        return f"mlflow is not installed: {remedy}"
    if find_spec("sqlalchemy") is None and recipe.monitoring.mlflow_tracking_uri is None:
        # mlflow-skinny, which can talk to a server only.
        return f"monitoring.mlflow_tracking_uri: without an address mlflow needs sqlalchemy, not installed: {remedy}"
    return None


class MlflowRun:
    """A watcher that reports to MLflow, every 5 seconds.

    Without an address it writes the database `mlflow.db` in the run folder: MLflow 3.17 refuses to write its old
    folder format. Points that could not be sent are said on the console and sent again later, since a tracking server
    that restarts must not end a training run. Raises BackendError where the server cannot be reached at the start.
    """

    def __init__(self, recipe: Recipe, run_folder: Path, console: Console, resume_step: int = 0):
        self._console = console
        self._interval = recipe.monitoring.log_interval
        self._unsent: list[Any] = []
        self._last_send = time.monotonic()
        try:
            self._open(recipe, run_folder, resume_step)
        except _failures() as error:
            raise BackendError(
                f"monitoring.mlflow: MLflow refused the run ({error}). Check monitoring.mlflow_tracking_uri, or set "
                "monitoring.mlflow to false."
            ) from error

    def _open(self, recipe: Recipe, run_folder: Path, resume_step: int) -> None:
        from mlflow import MlflowClient

        asked = recipe.monitoring
        uri = asked.mlflow_tracking_uri or f"sqlite:///{(run_folder / 'mlflow.db').resolve()}"
        self._client = MlflowClient(tracking_uri=uri)
        known = known_id(run_folder, "mlflow") if resume_step else None
        if known is not None:
            self._run_id = known
            self._client.update_run(known, status="RUNNING")
            return
        experiment = _experiment(self._client, recipe, run_folder)
        self._run_id = self._client.create_run(experiment, run_name=asked.mlflow_run_name).info.run_id
        remember_id(run_folder, "mlflow", self._run_id)
        self._log_settings(recipe)

    def __call__(self, report: StepReport) -> None:
        if not is_due(report, self._interval):
            return
        from mlflow.entities import Metric

        when = round((report.time or time.time()) * 1000)
        self._unsent += [Metric(tag, number, when, report.step) for tag, number in series(report).items()]
        if time.monotonic() - self._last_send >= SECONDS_BETWEEN_SENDS:
            try:
                self._send()
            except _failures() as error:
                self._console.say(f"mlflow: {len(self._unsent)} values could not be sent, trying again later ({error})")

    def close(self, status: str = "finished") -> None:
        """Send what is left and end the run there: FINISHED, KILLED (interrupted) or FAILED."""
        self._send()
        ended = {"finished": "FINISHED", "interrupted": "KILLED"}.get(status, "FAILED")
        self._client.set_terminated(self._run_id, status=ended)

    def _send(self) -> None:
        self._last_send = time.monotonic()
        while self._unsent:
            self._client.log_batch(self._run_id, metrics=self._unsent[:MOST_POINTS_AT_ONCE])
            self._unsent = self._unsent[MOST_POINTS_AT_ONCE:]

    def _log_settings(self, recipe: Recipe) -> None:
        from mlflow.entities import Param

        settings = [
            Param(key, str(value)[:LONGEST_PARAMETER]) for key, value in flattened(public_settings(recipe)).items()
        ]
        for start in range(0, len(settings), MOST_PARAMETERS_AT_ONCE):
            self._client.log_batch(self._run_id, params=settings[start : start + MOST_PARAMETERS_AT_ONCE])


def _experiment(client: MlflowClient, recipe: Recipe, run_folder: Path) -> str:
    name = recipe.monitoring.mlflow_experiment_name or "training_hub"
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    # A database of our own would otherwise keep artifacts in whatever folder the run was started from.
    is_ours = recipe.monitoring.mlflow_tracking_uri is None
    location = (run_folder / "mlflow_artifacts").resolve().as_uri() if is_ours else None
    return str(client.create_experiment(name, artifact_location=location))


def _failures() -> tuple[type[Exception], ...]:
    from mlflow.exceptions import MlflowException

    # requests' errors, which some calls let through, are OSErrors.
    return (MlflowException, OSError)
