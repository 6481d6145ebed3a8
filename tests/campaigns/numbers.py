"""Numbers that are not finite, runs that are not the same run, and runs that must be the same to the bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.campaigns.case import Case
from tests.campaigns.damage import stopped
from tests.campaigns.workshop import STEPS, At, Workshop, die, goes_on, leftovers, outcome
from tests.conftest import CONVERSATIONS
from training_hub.recipe.load import dump

REPOSITORY = Path(__file__).parents[2]


def not_finite(shop: Workshop, count: int, random: Random) -> Iterator[Case]:
    """NaN and infinity from weights, rows, gradients and rates, under both policies."""
    wanted = "stopped within a step (or skipped), step, rows or tensors named, no such number in any saved file"
    kinds = list(POISONS)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        output = shop.place("nan")
        sections, words, codes, detail = POISONS[kind](shop, random)
        recipe = shop.recipe(output, **sections)
        ended = shop.train(recipe)
        bad = _not_finite_on_disk(output)
        problem = "" if ended.code in codes and any(word in ended.said for word in words) else ended.brief
        problem = problem or (f"saved in {', '.join(bad)}" if bad else "")
        problem = problem or ("left a half-written folder" if leftovers(output) else "")
        if not problem and ended.code:
            problem = _result_problem(output, ended.code)
        silent = bool(bad) or (ended.code == 0 and 0 not in codes)
        yield Case("NaN and infinity", f"{number}: {kind} {detail}", wanted, problem, silent)


def _result_problem(output: Path, code: int) -> str:
    said = json.loads((output / "result.json").read_text())
    return "" if (said["status"], said["exit_code"]) == ("failed", code) else f"result.json says {said}"


def _not_finite_on_disk(output: Path) -> list[str]:
    return [
        str(path.relative_to(output))
        for path in output.rglob("*.safetensors")
        if any(not bool(torch.isfinite(tensor).all()) for tensor in load_file(path).values())
    ]


def _weights(shop: Workshop, random: Random) -> tuple[dict[str, Any], tuple[str, ...], tuple[int, ...], str]:
    folder = shop.place("poisoned")
    shutil.copytree(shop.model, folder)
    weights = load_file(folder / "model.safetensors")
    name = random.choice(sorted(weights))
    weights[name].view(-1)[random.randrange(weights[name].numel())] = random.choice((float("nan"), float("inf")))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return {"model": {"path": str(folder)}}, (f"{name} holds 1 numbers",), (6,), f"in {name}"


def _rows(shop: Workshop, random: Random, policy: str, heavy: float = 1e38) -> tuple[Any, ...]:
    guilty = random.sample(range(len(CONVERSATIONS)), random.randrange(1, 4))
    path = shop.place("rows").with_suffix(".jsonl")
    path.parent.mkdir(exist_ok=True)
    lines = [{**row, "weight": heavy if at in guilty else 1.0} for at, row in enumerate(CONVERSATIONS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sections = {"data": {"path": str(path)}, "training": {"on_nonfinite": policy}}
    named = tuple(f"{path.name} line {at + 1}" for at in guilty)
    return (
        sections,
        (named if policy == "stop" else ("final:",)),
        ((6,) if policy == "stop" else (0,)),
        f"rows {guilty}",
    )


def _rate(shop: Workshop, random: Random, policy: str) -> tuple[Any, ...]:
    rate = 10.0 ** random.randrange(18, 45)  # up to what takes float32 weights to infinity in one step
    sections: dict[str, Any] = {
        "optimizer": {"name": "SGD", "lr": rate, "momentum": random.choice((0.0, 0.9))},
        "training": {"max_norm": 0, "on_nonfinite": policy},
        "lr_scheduler": {"name": "constant"},
    }
    return sections, ("not finite",), (6,), f"{sections['optimizer']}"


def _endless(shop: Workshop, random: Random) -> tuple[Any, ...]:
    """Every step of the run is left out."""
    path = shop.place("rows").with_suffix(".jsonl")
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({**row, "weight": 1e38}) + "\n" for row in CONVERSATIONS))
    most = random.randrange(2, STEPS)
    training = {"on_nonfinite": "skip", "max_skipped": most}
    words = (f"step {most}: loss inf, gradient norm nan: not finite. {most} steps in a row",)
    return {"data": {"path": str(path)}, "training": training}, words, (6,), f"at most {most} in a row"


def _scale(shop: Workshop, random: Random, policy: str) -> tuple[Any, ...]:
    """Weights so large that forward is finite or not, and gradients are not."""
    folder = shop.place("scaled")
    shutil.copytree(shop.model, folder)
    weights = load_file(folder / "model.safetensors")
    factor = 10.0 ** random.randrange(30, 37)
    weights["lm_head.weight"] *= factor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    sections = {"model": {"path": str(folder)}, "training": {"on_nonfinite": policy}}
    # Under "skip" every step is left out, and what is left is the finite model the run began with.
    return sections, ("not finite", "final:"), (6, 0), f"lm_head x {factor:g}"


POISONS: dict[str, Callable[..., Any]] = {
    "weights": _weights,
    "rows, stop": lambda shop, random: _rows(shop, random, "stop"),
    "rows, skip": lambda shop, random: _rows(shop, random, "skip"),
    "rate, stop": lambda shop, random: _rate(shop, random, "stop"),
    "rate, skip": lambda shop, random: _rate(shop, random, "skip"),
    "rows, skip without end": _endless,
    "gradients, stop": lambda shop, random: _scale(shop, random, "stop"),
}

CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 7}, "seed: was 42, now 7"),
    "optimizer.lr": ({"optimizer": {"lr": 2e-3}}, "optimizer.lr: was"),
    "optimizer.name": ({"optimizer": {"name": "SGD"}}, "optimizer.name: was"),
    "optimizer.beta1": ({"optimizer": {"beta1": 0.8}}, "optimizer.beta1: was"),
    "optimizer.eps": ({"optimizer": {"eps": 1e-6}}, "optimizer.eps: was"),
    "optimizer.weight_decay": ({"optimizer": {"weight_decay": 0.1}}, "optimizer.weight_decay: was"),
    "training.global_batch_size": ({"training": {"global_batch_size": 4}}, "training.global_batch_size: was"),
    "training.max_seq_len": ({"training": {"max_seq_len": 128}}, "training.max_seq_len: was"),
    "training.steps": ({"training": {"steps": 9}}, "training.steps: was"),
    "training.max_norm": ({"training": {"max_norm": 0.5}}, "training.max_norm: was"),
    "lr_scheduler.name": ({"lr_scheduler": {"name": "linear"}}, "lr_scheduler.name: was"),
    "lr_scheduler.warmup_steps": ({"lr_scheduler": {"warmup_steps": 2}}, "lr_scheduler.warmup_steps: was"),
    "model.dtype": ({"model": {"dtype": "bfloat16"}}, "model.dtype: was"),
    "data.shuffle": ({"data": {"shuffle": False}}, "data.shuffle: was"),
    "data.turns": ({"data": {"turns": "last"}}, "data.turns: was"),
    "data.chat_template": ({"data": {"chat_template": "zephyr"}}, "data.chat_template: was"),
}


def wrong_resumes(shop: Workshop, count: int, random: Random) -> Iterator[Case]:
    """Going on with another recipe, or the same over rows, tokenizer or model that changed under their names."""
    wanted = "refused, the change named; nothing in the folder changed"
    changes: dict[str, Callable[[], tuple[Any, str]]] = {
        **{name: (lambda pair=pair: pair) for name, pair in CHANGED.items()},
        "rows in place": lambda: _in_place(shop, "data", _other_rows),
        "tokenizer in place": lambda: _in_place(shop, "model", _other_tokenizer),
        "model config in place": lambda: _in_place(shop, "model", _other_config),
        "model shape in place": lambda: _in_place(shop, "model", _other_shape),
    }
    names = list(changes)
    for number in range(count):
        name = names[(number * 7) % len(names)]
        sections, words, output = *changes[name](), None
        if callable(sections):
            output, recipe = sections()
        else:
            output = stopped(shop, 4)
            recipe = shop.recipe(output, **sections)
        before = sorted(path.name for path in (output / "checkpoints").iterdir())
        ended = shop.train(recipe)
        after = sorted(path.name for path in (output / "checkpoints").iterdir())
        problem = "" if ended.code == 5 and words in ended.said else ended.brief
        problem = problem or ("" if before == after else f"checkpoints changed from {before} to {after}")
        yield Case("wrong resumes", f"{number}: {name}", wanted, problem, ended.code == 0)


def _in_place(shop: Workshop, section: str, change: Callable[[Path], str]) -> tuple[Any, str]:
    source = shop.data if section == "data" else shop.model
    place = shop.place("changed").with_suffix(source.suffix)
    place.parent.mkdir(exist_ok=True)
    shutil.copy(source, place) if source.is_file() else shutil.copytree(source, place)
    output = stopped(shop, 4, **{section: {"path": str(place)}})
    words = change(place)
    return (lambda: (output, shop.recipe(output, **{section: {"path": str(place)}}))), words


def _other_rows(path: Path) -> str:
    path.write_text(path.read_text().replace("I think", "for sure"))
    return "data_fingerprint: was"


def _other_tokenizer(folder: Path) -> str:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"][0]["lstrip"] = not content["added_tokens"][0]["lstrip"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return "tokenizer_fingerprint: was"


def _other_config(folder: Path) -> str:
    content = json.loads((folder / "config.json").read_text())
    content["rms_norm_eps"] = 1e-3
    (folder / "config.json").write_text(json.dumps(content))
    return "config.rms_norm_eps: was"


def _other_shape(folder: Path) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(folder)
    config.intermediate_size = 48
    LlamaForCausalLM(config).save_pretrained(folder)
    return "config.intermediate_size: was"


def fresh_processes(shop: Workshop, count: int, random: Random) -> Iterator[Case]:
    """The same recipe in two new interpreters, with other hash seeds, folders to work in and outputs."""
    wanted = "same bits"
    for number in range(count):
        pair = [_fresh(shop, random) for _ in range(2)]
        problems = [found for found in pair if isinstance(found, str)]
        problem = problems[0] if problems else ("" if pair[0] == pair[1] else "ended in other numbers")
        yield Case("same run in fresh processes", f"{number}", wanted, problem, not problems and bool(problem))


def _fresh(shop: Workshop, random: Random) -> Any:
    output = shop.place("fresh")
    place = shop.place("elsewhere")
    place.mkdir(parents=True)
    (place / "recipe.yaml").write_text(dump(shop.recipe(output, monitoring={"console": "off"})))
    environment = {**os.environ, "PYTHONHASHSEED": str(random.randrange(2**32)), "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(
        [sys.executable, "-m", "training_hub", "sft", "--config", "recipe.yaml"],
        cwd=place, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return outcome(output) if ended.returncode == 0 else f"exit {ended.returncode}: {ended.stderr[-300:]}"


VARIANTS: dict[str, Callable[[Workshop], dict[str, Any]]] = {
    "float32": lambda shop: {},
    "bfloat16 with float32 masters": lambda shop: {"model": {"dtype": "bfloat16"}},
    "dropout": lambda shop: {"model": {"path": str(shop.gpt2)}},
    "dropout in bfloat16": lambda shop: {"model": {"path": str(shop.gpt2), "dtype": "bfloat16"}},
    "no packing": lambda shop: {"data": {"packing": False}},
    "several packs per step": lambda shop: {"training": {"max_seq_len": 128, "max_tokens_per_gpu": 128}},
    "SGD with momentum": lambda shop: {"optimizer": {"name": "SGD", "momentum": 0.9}},
    "more than an epoch": lambda shop: {"training": {"global_batch_size": 24}},
}


def resumes(shop: Workshop, count: int, random: Random) -> Iterator[Case]:
    """Killed at a step, gone on, and killed and gone on again, in several formats and shapes of batches."""
    wanted = "weights, optimizer and losses of the unbroken run, bit for bit"
    references: dict[str, Any] = {}
    names = list(VARIANTS)
    for number in range(count):
        name = names[number % len(names)]
        sections = VARIANTS[name](shop)
        if name not in references:
            output = shop.place("unbroken")
            ended = shop.train(shop.recipe(output, **sections))
            assert ended.code == 0, ended.said
            references[name] = outcome(output)
        output = shop.place("resume")
        recipe = shop.recipe(output, **sections)
        steps = sorted(random.sample(range(1, STEPS + 1), random.randrange(1, 3)))
        for step in steps:
            shop.train(recipe, [At(step, die)])
        problem, silent = goes_on(shop, recipe, references[name])
        yield Case("bitwise resume", f"{number}: {name}, killed at {steps}", wanted, problem, silent)
