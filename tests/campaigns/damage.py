"""Damage to what was saved: bits, lengths, files, pages, names and times of change."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from tests.campaigns.case import Case
from tests.campaigns.workshop import At, Outcome, Workshop, die, goes_on, outcome

FILES = ("model.safetensors", "optimizer.safetensors", "trainer.json", "recipe.yaml", "manifest.json")
PAGE = 4096


def stopped(shop: Workshop, step: int, **sections: Any) -> Path:
    """A run killed before step `step` is saved."""
    output = shop.place("stopped")
    shop.train(shop.recipe(output, **sections), [At(step, die)])
    return output


def corruption(shop: Workshop, count: int, random: Random) -> Iterator[Case]:
    """One damage to one file of the newest checkpoint; five in six are single bits."""
    wanted = "found before training, file and step named, goes on from the checkpoint before, same bits"
    reference = unbroken(shop)
    whole, other = stopped(shop, 6), stopped(shop, 6, seed=7)
    others = [kind for kind in DAMAGES if kind != "flip"]
    for number in range(count):
        kind = "flip" if number % 6 else others[(number // 6) % len(others)]
        name = FILES[(number // 7) % len(FILES)] if kind == "flip" else FILES[(number // 42) % len(FILES)]
        output = shop.copy(whole)
        newest = output / "checkpoints" / "step-5"
        detail = DAMAGES[kind](newest / name, other / "checkpoints" / "step-5" / name, random)
        problem, silent = goes_on(shop, shop.recipe(output), reference, says="checkpoint step-5 is damaged")
        # A manifest of another step is whole in itself: what is named is a file that it does not describe.
        named = "model.safetensors" if (kind, name) == ("swap", "manifest.json") else name
        if not problem and named not in _said(shop):
            problem = f"did not name {named}"
        yield Case("damaged checkpoints", f"{number}: {kind} {name} {detail}", wanted, problem, silent)
        shutil.rmtree(output)


def _said(shop: Workshop) -> str:
    return (shop.root / f"log-{shop.count}.txt").read_text(encoding="utf-8", errors="replace")


def unbroken(shop: Workshop) -> Outcome:
    """What the run leaves that nothing happens to."""
    output = shop.place("unbroken")
    ended = shop.train(shop.recipe(output))
    assert ended.code == 0, ended.said
    return outcome(output)


def _flip(path: Path, other: Path, random: Random) -> str:
    content = bytearray(path.read_bytes())
    bit = random.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return f"bit {bit}"


def cut(path: Path, other: Path, random: Random) -> str:
    """Shorten a file to a random length."""
    size = random.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"to {size} bytes"


def _delete(path: Path, other: Path, random: Random) -> str:
    path.unlink()
    return ""


def _swap(path: Path, other: Path, random: Random) -> str:
    if path.name == "trainer.json" or path.read_bytes() == other.read_bytes():  # facts alike: take another step's
        other = path.parent.parent / "step-4" / path.name
    if path.read_bytes() == other.read_bytes():  # recipes of one run are one text: append to it instead
        path.write_bytes(path.read_bytes() + b"\n")
        return "grown by a byte"
    shutil.copyfile(other, path)
    return "for that of another run or step"


def _zero(path: Path, other: Path, random: Random) -> str:
    content = bytearray(path.read_bytes())
    # A page that is not zero already: losses of small gradients are.
    starts = [at for at in range(0, len(content), PAGE) if any(content[at : at + PAGE])]
    at = random.choice(starts)
    content[at : at + PAGE] = bytes(len(content[at : at + PAGE]))
    path.write_bytes(content)
    return f"page at {at}"


DAMAGES: dict[str, Callable[[Path, Path, Random], str]] = {
    "flip": _flip,
    "cut": cut,
    "delete": _delete,
    "swap": _swap,
    "zero": _zero,
}


def shuffled_times(shop: Workshop, count: int, random: Random) -> Iterator[Case]:
    """Times of change of everything in the folder drawn anew, some from the future, and some all alike."""
    wanted = "goes on from the highest step, same bits"
    reference, whole = unbroken(shop), stopped(shop, 6)
    for number in range(count):
        output = shop.copy(whole)
        for path in output.rglob("*"):
            moment = 1_500_000_000 if number % 4 == 0 else random.randrange(0, 4_000_000_000)
            os.utime(path, (moment, moment))
        problem, silent = goes_on(shop, shop.recipe(output), reference, says="going on after step 5")
        yield Case("times of change shuffled", f"{number}", wanted, problem, silent)


def wrong_folders(shop: Workshop, count: int, random: Random) -> Iterator[Case]:
    """Whole checkpoints where they do not belong, none whole, damaged final models and results."""
    wanted = "refused in words that say what to do, or gone on from what is whole"
    reference, whole, other = unbroken(shop), stopped(shop, 6), stopped(shop, 6, seed=7)
    finished = shop.place("finished")
    shop.train(shop.recipe(finished))
    tricks = _tricks(finished, whole, other)
    for number in range(count):
        name, (source, act, code, words) = list(tricks.items())[number % len(tricks)]
        output = shop.copy(source)
        act(output, random)
        recipe = shop.recipe(output)
        if code == 0:
            problem, silent = goes_on(shop, recipe, reference, says=words)
        else:
            ended, silent = shop.train(recipe), False
            problem = "" if ended.code == code and words in ended.said else ended.brief
            silent = ended.code == 0
        yield Case("folders mixed up", f"{number}: {name}", wanted, problem, silent)


def _tricks(finished: Path, whole: Path, other: Path) -> dict[str, tuple[Path, Callable[..., None], int, str]]:
    def everythingcut(output: Path, random: Random) -> None:
        for folder in (output / "checkpoints").iterdir():
            cut(folder / "model.safetensors", folder, random)

    def of_another_run(output: Path, random: Random) -> None:
        shutil.rmtree(output / "checkpoints" / "step-5")
        shutil.copytree(other / "checkpoints" / "step-5", output / "checkpoints" / "step-5")

    def renamed(output: Path, random: Random) -> None:
        (output / "checkpoints" / "step-4").rename(output / "checkpoints" / "step-7")

    def unfinished_aside(output: Path, random: Random) -> None:
        shutil.copytree(output / "checkpoints" / "step-5", output / "checkpoints" / ".tmp-step-6")
        (output / "checkpoints" / "step-5").rename(output / "checkpoints" / ".old-step-5")

    def final_flipped(output: Path, random: Random) -> None:
        _flip(output / "final" / "model.safetensors", output, random)

    def final_gone(output: Path, random: Random) -> None:
        shutil.rmtree(output / "final")

    def resultcut(output: Path, random: Random) -> None:
        cut(output / "result.json", output, random)

    def torn_line(output: Path, random: Random) -> None:
        with (output / "metrics.jsonl").open("a") as file:
            file.write('{"step": 7, "lo')

    def earlier_failure(output: Path, random: Random) -> None:
        (output / "result.json").write_text('{"status": "failed", "error": "TrainingError", "exit_code": 6}')

    def recipe_gone(output: Path, random: Random) -> None:
        (output / "recipe.yaml").unlink()

    return {
        "no checkpoint whole": (whole, everythingcut, 5, "checkpoint.resume: restart"),
        "a checkpoint of another run": (whole, of_another_run, 5, "seed: was 7, now 42"),
        "a checkpoint renamed to a later step": (whole, renamed, 0, "holds step 4"),
        "killed between two renames": (whole, unfinished_aside, 0, "going on after step 5"),
        "a bit of the final model flipped": (finished, final_flipped, 5, "sha256 differs"),
        "the final model removed": (finished, final_gone, 0, "going on after step 8"),
        "result.json cut": (finished, resultcut, 5, "result.json cannot be read"),
        "a torn line in metrics.jsonl": (whole, torn_line, 0, "going on after step 5"),
        "result.json of an earlier failure": (whole, earlier_failure, 0, "going on after step 5"),
        "recipe.yaml removed": (whole, recipe_gone, 5, "Name another output"),
    }
