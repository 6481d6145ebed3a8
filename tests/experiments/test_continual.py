"""Continual evaluation end to end: two small tasks, real runs, from the command line and from Python."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

import training_hub
from training_hub.evaluation.metrics import backward_transfer
from training_hub.frontends.cli import main
from training_hub.recipe.load import load_file

Tasks = dict[str, tuple[Path, Path]]

SMALL = ("--steps=3", "--batch-size=8", "--learning-rate=1e-2", "--model.dtype=float32", "--training.preflight=false")
QUIET = ("--monitoring.console=off", "--data.cache=false", "--max-seq-len=128")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Tasks:
    """Two tasks of one-word answers: 24 rows to train and 6 to test each."""
    folder = tmp_path_factory.mktemp("tasks")
    found = {}
    for task, answer in (("next", lambda number: number + 1), ("twice", lambda number: 2 * number)):
        for part, numbers in (("train", range(24)), ("test", range(24, 30))):
            rows = [{"prompt": f"{task} {number}: ", "completion": f"{answer(number)}"} for number in numbers]
            (folder / f"{task}-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found[task] = (folder / f"{task}-train.jsonl", folder / f"{task}-test.jsonl")
    return found


def words(model: Path, tasks: Tasks, output: Path, *more: str) -> Sequence[str]:
    named = [word for name, (train, test) in tasks.items() for word in ("--task", name, str(train), str(test))]
    return ["continual", f"--model={model}", f"--output={output}", *named, *SMALL, *QUIET, *more]


@pytest.fixture(scope="module")
def study(tiny_model_folder: Path, tasks: Tasks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study of two methods and two seeds."""
    output = tmp_path_factory.mktemp("study") / "out"
    own = ("--methods", "osft", "replay", "--seeds", "1", "2", "--for", "osft", "osft.cache=false")
    assert main(words(tiny_model_folder, tasks, output, *own, f"--evaluation.watch={tasks['twice'][1]}")) == 0
    return output


def test_every_method_and_seed_gives_a_matrix_of_every_task_after_each(study: Path):
    found = json.loads((study / "continual.json").read_text())
    assert found["tasks"] == ["next", "twice"] and len(found["base"]) == 2
    assert [(one["method"], one["seed"]) for one in found["courses"]] == [
        (method, seed) for seed in (1, 2) for method in ("osft", "replay")
    ]
    for one in found["courses"]:
        assert [len(row) for row in one["scores"]] == [2, 2]
        assert all(0 <= score <= 1 for row in one["scores"] for score in row)
        assert one["losses"][0][0] > 0 and one["losses"][1][1] != one["losses"][0][1]
        assert one["backward_transfer"] == backward_transfer(one["scores"])
        assert one["watch"][-1] - one["watch"][0] == pytest.approx(one["watch_rise"], abs=1e-12)
        assert len(one["watch"]) == 3
    # A course begins from the same weights whatever the seed, but sees its rows in another order.
    assert found["courses"][0]["losses"] != found["courses"][2]["losses"]


def test_each_run_begins_where_the_one_before_ended_and_replay_shows_earlier_rows_again(study: Path):
    first, second = (load_file(study / "replay" / "seed-1" / name / "recipe.yaml") for name in ("1-next", "2-twice"))
    assert isinstance(first.data.path, str)
    assert second.model.path == str(study / "replay" / "seed-1" / "1-next" / "final")
    assert [(Path(source.path).name, source.weight) for source in second.data.path] == [
        ("twice-train.jsonl", 1.0),
        ("next-train.jsonl", 0.01),
    ]
    assert load_file(study / "osft" / "seed-2" / "2-twice" / "recipe.yaml").algorithm == "osft"


def test_lora_begins_each_task_from_the_model_its_last_adapter_was_merged_into(
    tiny_model_folder: Path, tasks: Tasks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("peft")
    own = words(tiny_model_folder, tasks, tmp_path / "out", "--methods", "lora", "--score", "loss")
    assert main([*own, "--for", "lora", "lora.merge=false"]) == 2
    assert "lora: lora.merge: false leaves only an adapter" in capsys.readouterr().err
    assert main([*own, "--for", "lora", "lora.r=4"]) == 0
    runs = [tmp_path / "out" / "lora" / "seed-0" / name for name in ("1-next", "2-twice")]
    second = load_file(runs[1] / "recipe.yaml")
    assert (second.algorithm, second.lora.r, second.lora.adapter) == ("lora_sft", 4, None)
    assert second.model.path == str(runs[0] / "merged")
    assert json.loads((runs[1] / "merged" / "merge.json").read_text())["base"] == second.model.path
    scored = json.loads((runs[1] / "scores.json").read_text())
    assert scored["next"]["model"] == hashlib.sha256((runs[1] / "merged" / "manifest.json").read_bytes()).hexdigest()
    (course,) = json.loads((tmp_path / "out" / "continual.json").read_text())["courses"]
    assert course["losses"][1][1] < course["losses"][0][1]


def test_the_table_the_csv_and_the_page_say_the_same(study: Path):
    found = json.loads((study / "continual.json").read_text())
    with (study / "continual.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 * 2
    last = [row for row in rows if (row["method"], row["seed"], row["after"]) == ("osft", "2", "2")]
    assert [float(row["score"]) for row in last] == found["courses"][2]["scores"][1]
    page = (study / "continual.html").read_text()
    assert page.count("<polyline") == 2 and "http" not in page.replace("http-equiv", "")


def test_what_is_finished_is_not_run_again(
    study: Path, tiny_model_folder: Path, tasks: Tasks, capsys: pytest.CaptureFixture[str]
):
    before = {path: path.stat().st_mtime_ns for path in study.rglob("metrics.jsonl")}
    scores = {path: path.stat().st_mtime_ns for path in study.rglob("scores.json")}
    own = ("--methods", "replay", "--seeds", "2", "3")
    watch = f"--evaluation.watch={tasks['twice'][1]}"
    assert main(words(tiny_model_folder, tasks, study, *own, watch)) == 0
    assert before.items() <= {path: path.stat().st_mtime_ns for path in study.rglob("metrics.jsonl")}.items()
    assert scores.items() <= {path: path.stat().st_mtime_ns for path in study.rglob("scores.json")}.items()
    assert (study / "replay" / "seed-3" / "2-twice" / "scores.json").is_file()
    shown = capsys.readouterr().out
    assert "backward_transfer" in shown and "mean of 2 seeds" in shown


def test_scores_are_made_anew_where_the_rows_changed(tiny_model_folder: Path, tasks: Tasks, tmp_path: Path):
    test = tmp_path / "test.jsonl"
    rows = tasks["next"][1].read_text().splitlines(keepends=True)
    test.write_text("".join(rows))
    settings = {"training.steps": 1, "training.preflight": False, "data.cache": False, "monitoring.console": "off"}

    def again() -> dict[str, float]:
        one = {"next": (tasks["next"][0], test)}
        result = training_hub.continual(
            tiny_model_folder, one, tmp_path / "out", methods=["full"], score="loss", overrides=settings
        )
        assert result.courses[0].scores[0][0] == -result.courses[0].losses[0][0]
        return json.loads((tmp_path / "out" / "full" / "seed-0" / "1-next" / "scores.json").read_text())["next"][
            "scores"
        ]

    assert again()["rows"] == 6 and "exact_match" not in again()
    test.write_text("".join(rows[:4]))
    assert again()["rows"] == 4


def test_everything_that_is_wrong_is_told_before_anything_is_trained(
    tiny_model_folder: Path, tasks: Tasks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def said(*more: str) -> str:
        assert main(words(tiny_model_folder, tasks, tmp_path / "out", *more)) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    missing = words(tiny_model_folder, tasks, tmp_path / "out", "--task", "third", "gone.jsonl", "away.jsonl")
    assert main(missing) == 3
    told = capsys.readouterr().err
    assert "gone.jsonl" in told and "away.jsonl" in told and not (tmp_path / "out").exists()
    assert "'ostf' is not known; known: full, osft" in said("--methods", "ostf")
    assert "'replay' is not among --methods full" in said("--methods", "full", "--for", "replay", "seed=1")
    assert "optimizer.lrr" in said("--for", "osft", "optimizer.lrr=1")
    assert "seeds: found [1, 1]" in said("--seeds", "1", "1")
    assert "'next' is given twice" in said("--task", "next", "a.jsonl", "b.jsonl")
    assert "'../x' is no name" in said("--task", "../x", "a.jsonl", "b.jsonl")
    assert "the tasks name the rows" in said("--data", "chat.jsonl")
    assert "the methods say what is run" in said("--algorithm=osft", "--osft.unfreeze_rank_ratio=0.3")
