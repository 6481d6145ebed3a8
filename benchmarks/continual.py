"""What each method forgets over a sequence of tasks, at the same new-task score: full SFT, OSFT, replay, LoRA.

    python benchmarks/continual.py demo --output out       # shipped base (0.7 M parameters), tasks made here
    python benchmarks/continual.py base --output out       # 3.3 M parameters by continual_base.py, the same tasks
    python benchmarks/continual.py stories --output out    # stories260K and five tasks of TRAINING_HUB_TEST_DATA

A method that learns less forgets less, so methods are compared where they have learned as much. Each first runs the
whole sequence at several learning rates with a seed of its own. The goal is a little below the best new-task score of
the worst method, since at the very best a curve is flat and noise would choose, or what --goal asks for; each method
gets the lowest rate that reaches it, interpolated. Those rates then run with the seeds that are reported. A method that
does not reach what --goal asks for is left out of them, and the page says so.
Scores are minus the mean loss on the answers of held-out rows, in nats. General text is watched: prose of the demo
base's own pre-training, or texts that stories260K says itself, on which the rise is its divergence from itself.
What is finished is not run again. benchmarks/continual/RESULTS.md says what came out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from training_hub.evaluation.metrics import average_accuracy, backward_transfer, forgetting, new_task_score
from training_hub.experiments.continual import METHODS, ContinualResult, Course, Method, Study, Task, continual
from training_hub.experiments.continual_files import table, write_files
from training_hub.recipe import Recipe

DEFAULT_METHODS = ("full", "osft", "osft-core", "replay", "lora")
RATES = (1e-3, 3e-3, 1e-2)
MARGIN = 0.1  # nats
HALVINGS = 4  # of the lowest rate, where even that learns more than the goal
Grid = dict[str, list[tuple[float, float, float]]]  # method -> (rate, new-task score, backward transfer)
SELECTING_SEED = 100
DEMO_TASKS = ("reverse", "after", "vowels", "capitals", "larger")
STORIES_TASKS = {  # the word that tells the tasks apart; their definitions are longer than the model can read
    "sentiment": "task363_sst2_polarity_classification",
    "choice": "task073_commonsenseqa_answer_generation",
    "emotion": "task875_emotion_classification",
    "science": "task591_sciq_answer_generation",
    "outcome": "task181_outcome_extraction",
}
# Of 260 thousand parameters no answer is expected to be right more often than by chance.
SCORE = {"demo": "exact_match", "base": "loss", "stories": "loss"}
MEASURES: dict[str, Callable[[Any], float]] = {
    "new task": new_task_score,
    "average": average_accuracy,
    "backward transfer": backward_transfer,
    "forgetting": forgetting,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", choices=["demo", "base", "stories"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path("build/continual-base/run/final"), help="of `base`")
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT_METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--rates-for", nargs="+", action="append", default=[], metavar=("METHOD", "RATE"))
    parser.add_argument("--goal", type=float, default=None, help="the new-task score to compare at, in nats below 0")
    parser.add_argument("--at", nargs=2, action="append", metavar=("METHOD", "RATE"), help="report these; no search")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of 16 rows for each task")
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--set", dest="common", action="append", default=[], help="METHOD:PATH=JSON, for one method")
    arguments = parser.parse_args()
    model, tasks, general = {"demo": demo, "base": partial(base, arguments.model), "stories": stories}[arguments.base](
        arguments.output / "data"
    )
    study = Study(
        recipe_of(model, general, arguments),
        tasks[: arguments.tasks],
        (),
        tuple(arguments.seeds),
        SCORE[arguments.base],
    )
    if arguments.at:
        rates, goal, grid = {name: float(rate) for name, rate in arguments.at}, None, {}
    else:
        rates, goal, grid = matched_rates(study, arguments)
    chosen = tuple(at_rate(method_of(name, arguments), rate) for name, rate in rates.items())
    where = "at" if arguments.at else "matched" if arguments.goal is None else f"matched{goal:+g}"
    result = continual(replace(study, methods=chosen, recipe=inside(study.recipe, where)))
    write_files(result)
    page = "\n".join(report(arguments, result, rates, goal, grid))
    (arguments.output / f"{where}.md").write_text(page + "\n", encoding="utf-8")
    print("\n".join(table(result)))
    print(page)


def recipe_of(model: Path, general: Path, arguments: argparse.Namespace) -> Recipe:
    """What all runs share."""
    return Recipe.model_validate(
        {
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"overlong": "drop", "cache": False},
            "training": {
                "steps": arguments.steps,
                "global_batch_size": 16,
                "max_seq_len": 512 if arguments.base == "stories" else 256,
                "preflight": False,
            },
            "lr_scheduler": {"warmup_ratio": 0.1},
            "checkpoint": {"minutes": None},
            "evaluation": {"watch": str(general), "watch_interval": arguments.steps},
            "monitoring": {"console": "off"},
            "output": str(arguments.output),
        }
    )


def inside(recipe: Recipe, name: str) -> Recipe:
    return recipe.model_copy(update={"output": str(Path(recipe.output) / name)})


def method_of(name: str, arguments: argparse.Namespace) -> Method:
    """The method of the table, without a cache of decompositions that nobody asks for again."""
    known = METHODS[name]
    own = {"osft.cache": False} if known.settings["algorithm"] == "osft" else {}
    for text in arguments.common:
        method, _, setting = text.partition(":")
        path, _, value = setting.partition("=")
        own |= {path: json.loads(value)} if method == name else {}
    return Method(name, {**known.settings, **own}, known.replayed)


def at_rate(method: Method, rate: float, name: str = "") -> Method:
    return Method(name or method.name, {**method.settings, "optimizer.lr": rate}, method.replayed)


def matched_rates(study: Study, arguments: argparse.Namespace) -> tuple[dict[str, float], float, Grid]:
    """A rate for each method that gets there, the new-task score they shall share, and what each rate gave."""
    grid: Grid = {}
    own_rates = {name: sorted(map(float, rates)) for name, *rates in arguments.rates_for}
    for name in arguments.methods:
        own = method_of(name, arguments)
        grid[name] = [tried(study, own, rate) for rate in own_rates.get(name, sorted(arguments.rates))]
        print(name, told_points(grid[name]), flush=True)
    best = {name: max(learned for _, learned, _ in points) for name, points in grid.items()}
    goal = min(best.values()) - MARGIN if arguments.goal is None else arguments.goal
    able = {name: points for name, points in grid.items() if best[name] >= goal}
    for name, points in able.items():
        for _ in range(HALVINGS):
            if points[0][1] < goal:
                break
            points.insert(0, tried(study, method_of(name, arguments), points[0][0] / 2))
            print(name, told_points(points), flush=True)
    return {name: lowest_rate(points, goal) for name, points in able.items()}, goal, grid


def tried(study: Study, method: Method, rate: float) -> tuple[float, float, float]:
    """The rate, its new-task score, and its backward transfer, over the whole sequence with the seed that selects."""
    only = at_rate(method, rate, f"{method.name}-{rate:g}".replace(".", "_"))
    where = inside(study.recipe, "rates")
    (found,) = continual(replace(study, methods=(only,), seeds=(SELECTING_SEED,), score="loss", recipe=where)).courses
    return rate, new_task_score(found.scores), backward_transfer(found.scores)


def told_points(points: Sequence[tuple[float, float, float]]) -> str:
    return ", ".join(f"{rate:g}: {learned:.3f} ({moved:+.3f})" for rate, learned, moved in points)


def lowest_rate(points: Sequence[tuple[float, float, float]], goal: float) -> float:
    """The lowest rate at which the new-task score reaches `goal`, on straight lines over the rate's logarithm."""
    if points[0][1] >= goal:
        return points[0][0]
    for (low, before, _), (high, after, _) in itertools.pairwise(points):
        if after >= goal:
            part = (goal - before) / (after - before)
            return float(f"{math.exp(math.log(low) + part * (math.log(high) - math.log(low))):.3g}")
    raise ValueError(f"no rate of {points} reaches {goal}")


def negative_losses(one: Course) -> list[list[float]]:
    return [[-loss for loss in row] for row in one.losses]


def report(
    arguments: argparse.Namespace,
    result: ContinualResult,
    rates: dict[str, float],
    goal: float | None,
    grid: Grid,
) -> Iterator[str]:
    """The page: the comparison at the same new-task score, and what each learning rate gave."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    tasks = ", ".join(result.tasks)
    told_goal = "" if goal is None else f"; goal {goal:.3f} nats"
    yield f"## {arguments.base}: {tasks}\n"
    yield f"Seeds {arguments.seeds}, {arguments.steps} steps of 16 rows for each task{told_goal}. "
    yield f"{platform.machine()}, Python {platform.python_version()}, {packages}.\n"
    names = [*MEASURES, "general text"]
    is_answered = result.score == "exact_match"
    names += ["answers right: average", "backward transfer of these"] if is_answered else []
    yield "| method | rate | " + " | ".join(names) + " |"
    yield "|---|---|" + "---|" * len(names)
    for method in result.methods():
        courses = result.of(method)
        cells = [told([measure(negative_losses(one)) for one in courses]) for measure in MEASURES.values()]
        cells.append(told([one.watch[-1] - one.watch[0] for one in courses]))
        if is_answered:
            measures = (average_accuracy, backward_transfer)
            cells += [told([measure(one.scores) for one in courses]) for measure in measures]
        yield f"| {method} | {rates[method]:g} | " + " | ".join(cells) + " |"
    for method in (name for name in grid if name not in rates):
        yield f"\n{method} does not reach the goal, and is not compared."
    if grid:
        yield f"\nNew-task score at each learning rate with seed {SELECTING_SEED}, backward transfer in brackets:\n"
    for method, points in grid.items():
        yield f"- {method}: {told_points(points)}"


def told(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.3f}{spread}"


def demo(folder: Path) -> tuple[Path, tuple[Task, ...], Path]:
    """The shipped base, five of the demo's tasks with operands kept apart, and prose that it was not trained on."""
    from training_hub.demo.base import BASE_FOLDER
    from training_hub.demo.tasks import TASKS, draw_prose, draw_questions

    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for part, count, held_out in (("train", 600, False), ("test", 40, True)):
        for question in draw_questions(count * len(TASKS), seed=11, held_out=held_out):
            rows.setdefault(question.task, {}).setdefault(part, []).append(question.as_conversation())
    rng = random.Random(12)
    general = write(folder / "general.jsonl", [{"text": draw_prose(rng)} for _ in range(200)])
    return BASE_FOLDER, tuple(task_of(folder, name, rows[name]) for name in DEMO_TASKS), general


def base(model: Path, folder: Path) -> tuple[Path, tuple[Task, ...], Path]:
    """The base of continual_base.py, and what the demo's learns."""
    if not (model / "config.json").exists():
        raise SystemExit(f"{model} holds no model: run `make continual-base` first, or say where it is with --model.")
    return model, *demo(folder)[1:]


def stories(folder: Path) -> tuple[Path, tuple[Task, ...], Path]:
    """stories260K, five public tasks, and texts of its own."""
    if not os.environ.get("TRAINING_HUB_TEST_DATA"):
        raise SystemExit("TRAINING_HUB_TEST_DATA is not set: it names the folder with the model and the tasks.")
    root = Path(os.environ["TRAINING_HUB_TEST_DATA"])
    model = root / "models" / "stories260K" / "hf"
    tasks = []
    for name, source in STORIES_TASKS.items():
        rows = {}
        for part in ("train", "test"):
            found = json.loads((root / "continual" / source / f"{part}.json").read_text(encoding="utf-8"))["Instances"]
            rows[part] = [as_row(name, one["input"], one["output"]) for one in found]
        tasks.append(task_of(folder, name, rows))
    general = folder / "general.jsonl"
    if not general.exists():
        write(general, [{"text": text} for text in own_texts(model, 64)])
    return model, tuple(tasks), general


def as_row(name: str, asked: str, answers: str | list[str]) -> dict[str, str]:
    answer = answers if isinstance(answers, str) else answers[0]
    return {"prompt": f"{name}: {asked.strip()} Answer:", "completion": f" {answer.strip()}"}


def own_texts(model: Path, count: int) -> list[str]:
    """Texts that a model says from nothing, drawn as it deems them likely."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    speaker = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    torch.manual_seed(13)
    start = torch.full((count, 1), tokenizer.bos_token_id)
    made = speaker.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        top_k=0,
        max_new_tokens=160,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.batch_decode(made, skip_special_tokens=True)


def task_of(folder: Path, name: str, rows: dict[str, list[Any]]) -> Task:
    paths = [write(folder / f"{name}-{part}.jsonl", rows[part]) for part in ("train", "test")]
    return Task(name, *map(str, paths))


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != text:  # another process may be reading it
        path.write_text(text, encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
