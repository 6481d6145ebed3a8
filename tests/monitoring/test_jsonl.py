from __future__ import annotations

import json
import math

import numpy as np
import pytest

from training_hub.errors import DataError
from training_hub.monitoring.jsonl import MetricsFile, metrics_row, read_metrics

REQUIRED = {
    *("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens"),
    *("tokens_per_second", "step_seconds", "memory_gib"),
}


def written(path, reports, resume_step=0):
    file = MetricsFile(path, resume_step)
    for one in reports:
        file(one)
    file.close()
    return read_metrics(path)


def test_each_step_is_on_disk_before_the_next_one_begins(tmp_path, report):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in (1, 2, 3):
        file(report(step=step))
        assert [row["step"] for row in read_metrics(path)] == list(range(1, step + 1))
    assert set(read_metrics(path)[0]) >= REQUIRED
    file.close()


def test_floats_read_back_as_the_same_floats(tmp_path, report):
    values = [0.1 + 0.2, 1e-300, 5e-324, 1.7976931348623157e308, -0.0, float(np.float32(3.2449999)), 1 / 3, 1e22]
    rows = written(tmp_path / "m", [report(step=n, loss=value) for n, value in enumerate(values, 1)])
    assert [row["loss"].hex() for row in rows] == [value.hex() for value in values]


def test_nan_and_infinity_are_null_with_their_names_beside_in_valid_json(tmp_path, report):
    path = tmp_path / "m"
    written(path, [report(loss=math.nan, grad_norm=math.inf, validation_loss=-math.inf, skipped=True)])
    row = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row["loss"] is row["grad_norm"] is row["validation_loss"] is None
    assert row["nonfinite"] == {"loss": "nan", "grad_norm": "inf", "validation_loss": "-inf"}
    assert row["skipped"] is True


def test_validation_stands_only_where_it_was_measured(report):
    assert "validation_loss" not in metrics_row(report())
    assert metrics_row(report(validation_loss=2.0, validation_perplexity=7.4))["validation_perplexity"] == 7.4
    before = metrics_row(report(step=0, loss=math.nan, validation_loss=2.0))
    assert "loss" not in before and "nonfinite" not in before and before["validation_loss"] == 2.0


def test_a_resumed_run_drops_later_steps_and_the_line_a_killed_process_did_not_finish(tmp_path, report):
    path = tmp_path / "m"
    written(path, [report(step=step) for step in (1, 2, 3, 4)])
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole) + b'{"step": 5, "los')
    rows = written(path, [report(step=3, loss=9.0)], resume_step=2)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 3.2449999), (2, 3.2449999), (3, 9.0)]
    assert path.read_bytes().splitlines(keepends=True)[:2] == whole[:2]
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def test_a_last_line_without_its_newline_is_torn_even_if_it_reads_as_json(tmp_path):
    path = tmp_path / "m"
    path.write_text('{"step": 1, "loss": 1.5}\n{"step": 2}')
    assert read_metrics(path) == [{"step": 1, "loss": 1.5}]


def test_a_new_run_begins_the_file_anew(tmp_path, report):
    path = tmp_path / "m"
    path.write_text("anything")
    assert [row["step"] for row in written(path, [report()])] == [1]


@pytest.mark.parametrize("damaged", ['{"step": 2', "[]", '{"loss": 1}', "\x00\x00"])
def test_damage_in_the_middle_is_named(tmp_path, damaged):
    path = tmp_path / "m"
    path.write_text('{"step": 1}\n' + damaged + '\n{"step": 3}\n')
    with pytest.raises(DataError, match="m line 2: not"):
        read_metrics(path)
