"""Saved models on rows that several processes share out: the scores and answers of one, whichever way the model lies.

Float32. A loss is the same sum of the same packs, added up in float64 in another order; what is promised is 1e-6. What
sums within a layer are split over processes for is apart by rounding, 1e-5 as in training. Answers are the same tokens:
with the likeliest each time since the tiny model has learned, with drawn ones since batches are dealt out whole.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.crew import Crew
from tests.distributed.test_equal_numbers import STEPS
from tests.invariants.run import train
from training_hub import evaluate
from training_hub.errors import DataError
from training_hub.frontends.cli import main

QUIET = {"monitoring.console": "off", "model.dtype": "float32", "data.cache": False}
SLICES = {"parallelism.data_parallel_shard_degree": -1}
HEADS = {"parallelism.tensor_parallel_degree": 2}
TOKENS = {"parallelism.context_parallel_degree": 2}
EXPERTS = {"parallelism.data_parallel_shard_degree": 2, "parallelism.expert_parallel_degree": 2}
STAGES = {"parallelism.pipeline_parallel_degree": 2}
DRAWN = {"temperature": 0.8, "top_p": 0.9, "batch_tokens": 600, "seed": 3}


@pytest.fixture(scope="module")
def taught(folders: Any, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tiny models that have learned so much that their answers end, by family; made once."""
    root, made = tmp_path_factory.mktemp("taught"), {}

    def folder(family: str) -> Path:
        if family not in made:
            settings = {"training": {**STEPS, "steps": 40}, "optimizer": {"lr": 1e-2}}
            made[family] = train(folders(family), chat_file, root / family, **settings).model_path
        return made[family]

    return folder


def same(
    crew: Crew, model: Path | list[Path], file: Path, close: float, parallelism: dict[str, Any], **asked: Any
) -> Any:
    """The scores and predictions of one process, which all of the crew find."""
    metrics = asked.pop("metrics", ["exact_match", "f1"])
    alone = evaluate(model, file, metrics, overrides=QUIET, **asked)
    together = crew.evaluate(model, file, *metrics, overrides={**QUIET, **parallelism}, **asked)
    assert not [each["problems"] for each in together if "error" in each], together
    for each in together:
        assert each["predictions"] == alone.predictions
        for name, scores in alone.scores.items():
            assert list(each["scores"][name]) == list(scores)
            assert each["scores"][name] == pytest.approx(scores, rel=close)
    return alone


@pytest.mark.parametrize(("parallelism", "close"), [({}, 1e-6), (SLICES, 1e-6), (HEADS, 1e-5)], ids=json.dumps)
def test_two_processes_find_the_scores_and_the_answers_of_one(parallelism, close, two, taught, uneven_file):
    model = taught("llama")
    alone = same(two, model, uneven_file, close, parallelism, rows=7)
    assert len(alone.predictions) == 7 and alone.scores["final"]["unfinished"] < 1


def test_what_is_drawn_is_what_one_process_draws(two, taught, uneven_file):
    alone = same(two, taught("llama"), uneven_file, 1e-6, {}, rows=12, **DRAWN)
    assert len({row["final"]["answer"] for row in alone.predictions}) > 3


def test_stages_measure_what_one_process_does(two, taught, uneven_file):
    alone = same(two, taught("llama"), uneven_file, 1e-6, STAGES, metrics=["perplexity"])
    assert list(alone.scores["final"]) == ["rows", "loss", "perplexity"]


def test_the_error_of_a_metric_is_that_of_the_first_process(two, taught, uneven_file, tmp_path):
    (tmp_path / "own.py").write_text("def picky(answer, reference):\n    return 1 / 0\n")
    first, second = two.evaluate(taught("llama"), uneven_file, f"{tmp_path}/own.py:picky", overrides=QUIET, rows=2)
    assert first["error"] == "DataError" and "ZeroDivisionError" in first["problems"][0]
    assert second["error"] == "LaunchError" and "rank 0 failed at what answers are worth" in second["problems"][0]


MORE = {
    "several models, one after the other": (["llama", "qwen3"], {}, {}),
    "several models in slices": (["llama", "qwen3"], SLICES, {"rows": 5}),
    "a table that is also the head": (["llama-tied"], SLICES, {}),
    "experts": (["qwen3-moe"], EXPERTS, {"rows": 6}),
    "tokens": (["llama"], TOKENS, {"rows": 6}),
    "stages": (["llama"], STAGES, {"rows": 6}),
    "drawn by a model in slices": (["qwen3"], SLICES, {"rows": 12, **DRAWN}),
    "drawn by a model in stages": (["qwen3"], STAGES, {"rows": 12, **DRAWN}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_two_processes_find_them_of_other_models(case, two, taught, uneven_file):
    families, parallelism, asked = MORE[case]
    same(two, [taught(family).parent / "final" for family in families], uneven_file, 1e-5, parallelism, **asked)


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", [{}, SLICES, HEADS], ids=json.dumps)
def test_an_adapter_answers_beside_a_base_in_several_processes(
    parallelism, two, folders, chat_file, uneven_file, tmp_path
):
    settings = {"algorithm": "lora_sft", "training": STEPS, "optimizer": {"lr": 1e-2}}
    adapter = train(folders("llama"), chat_file, tmp_path / "run", **settings).model_path
    same(two, adapter, uneven_file, 1e-5, parallelism, rows=5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallelism", [{**SLICES, "parallelism.data_parallel_replicate_degree": 2}, {**SLICES, **HEADS}]
)
def test_four_processes_find_them(parallelism, four, taught, uneven_file):
    parallelism = {**parallelism, "parallelism.data_parallel_shard_degree": 2}
    same(four, taught("qwen3"), uneven_file, 1e-5, parallelism, rows=9)


@pytest.mark.slow
def test_processes_are_started_for_it_from_python_and_from_the_command_line(taught, uneven_file, tmp_path, capsys):
    model = taught("llama")
    alone = evaluate(model, uneven_file, ["f1"], rows=5, overrides=QUIET)
    found = evaluate(model, uneven_file, ["f1"], rows=5, overrides={**QUIET, **SLICES}, nproc_per_node=2)
    assert found.predictions == alone.predictions
    assert found.scores["final"] == pytest.approx(alone.scores["final"], rel=1e-6)
    flags = ["--model.dtype", "float32", "--no-data.cache", "--monitoring.console", "plain"]
    words = ["eval", "--model", str(model), "--data", str(uneven_file), "--metrics", "f1", "--rows", "5", *flags]
    more = ["--processes.procs", "2", "--output", str(tmp_path / "eval"), "--json"]
    more += ["--parallelism.data_parallel_shard_degree=-1"]
    capsys.readouterr()
    assert main([*words, *more]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["final"] == pytest.approx(alone.scores["final"], rel=1e-6)
    assert "written: " in said.err
    assert json.loads((tmp_path / "eval" / "evaluation.json").read_text())["models"]["final"]["scores"]["rows"] == 5
    assert "each process reads its own slices of the weights; here 5" in said.err
    assert (tmp_path / "eval" / "logs" / "rank1.log").exists()


@pytest.mark.slow
def test_the_error_of_a_process_is_the_error_of_the_call_with_its_rank(taught, uneven_file, tmp_path):
    (tmp_path / "own.py").write_text("def picky(answer, reference):\n    return 1 / 0\n")
    with pytest.raises(DataError, match=r"ZeroDivisionError(.|\n)*\(rank 0 of 2; its log: "):
        evaluate(taught("llama"), uneven_file, f"{tmp_path}/own.py:picky", rows=2, overrides=QUIET, nproc_per_node=2)


@pytest.mark.slow
def test_the_processes_of_torchrun_are_those_that_ask(taught, uneven_file, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = tmp_path / "program.py"
    program.write_text(
        "import json, sys\nfrom training_hub import evaluate\n"
        "model, rows, asked = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])\n"
        "for number in (1, 2):  # as often as a program likes\n"
        "    found = evaluate(model, rows, ['f1'], rows=5, overrides=asked)\n"
        "    open(f'{sys.argv[4]}-{number}', 'a').write(json.dumps(found.scores) + '\\n')\n"
    )
    words = [
        str(program),
        str(taught("llama")),
        str(uneven_file),
        json.dumps({**QUIET, **SLICES}),
        str(tmp_path / "said"),
    ]
    ended = subprocess.run([*launcher, *words], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    alone = evaluate(taught("llama"), uneven_file, ["f1"], rows=5, overrides=QUIET)
    for number in (1, 2):
        lines = [json.loads(line) for line in Path(f"{tmp_path}/said-{number}").read_text().splitlines()]
        assert len(lines) == 2
        for line in lines:
            assert line["final"] == pytest.approx(alone.scores["final"], rel=1e-6)
