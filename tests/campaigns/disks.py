"""Disks that fill up, folders that cannot be written or vanish, two runs in one place, and retention."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from tests.campaigns.case import Case
from tests.campaigns.damage import cut, unbroken
from tests.campaigns.workshop import STEPS, At, Ended, Workshop, die, goes_on, leftovers, nothing
from tests.moments import act_in, hold
from training_hub.folders import damage

DISK_EXIT = 75
NOBODY = 65534

Prepared = tuple[list[Any], Callable[[], None]]
Make = Callable[[Path], Prepared]
"""Lays out an output; the watchers of the run, and what its process does first."""


def disk_full(shop: Workshop, count: int, random: Random) -> Iterator[Case]:
    """A disk with too little room from the start, and one that fills up (or a limit on file sizes) while saving."""
    wanted = "exit 75 with bytes needed and free, earlier checkpoints whole, nothing half written; goes on with room"
    reference = unbroken(shop)
    for number in range(count):
        if number % 2 or not _may_mount(shop):
            limit = random.randrange(0, 100_000)
            step = random.randrange(1, STEPS)
            yield _limited(shop, reference, wanted, number, step, limit)
        else:
            yield _filled(shop, reference, wanted, number, random.randrange(2, STEPS), random.randrange(0, 160_000))
    for number, share in enumerate(range(0, 100, 100 // max(1, count // 2))):
        if _may_mount(shop):
            yield _small(shop, reference, wanted, number, share)


def _limited(shop: Workshop, reference: Any, wanted: str, number: int, step: int, limit: int) -> Case:
    output = shop.place("limit")
    recipe = shop.recipe(output)

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    ended = shop.train(recipe, [At(step, lower)])
    problem, silent = _refused(output, ended, step - 1), False
    if not problem:
        problem, silent = goes_on(shop, recipe, reference)
    return Case("disk full", f"{number}: files of at most {limit:,} bytes at step {step}", wanted, problem, silent)


def _refused(output: Path, ended: Ended, saved: int) -> str:
    if ended.code != DISK_EXIT:
        return ended.brief
    if "free" not in ended.said:
        return f"names no free bytes, {ended.brief}"
    if left := leftovers(output):
        return f"left {', '.join(left)}"
    folders = sorted((output / "checkpoints").glob("step-*"))
    if broken := [line for folder in folders for line in damage(folder)]:
        return "; ".join(broken)
    return "" if not saved or (output / "checkpoints" / f"step-{saved}").exists() else f"step-{saved} is gone"


def _may_mount(shop: Workshop) -> bool:
    place = shop.root / "may-mount"
    place.mkdir(exist_ok=True)
    if os.geteuid() != 0 or not shutil.which("mount"):
        return False
    tried = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "campaign", str(place)], capture_output=True)
    if tried.returncode == 0:
        subprocess.run(["umount", str(place)], check=True)
    return tried.returncode == 0


class Disk:
    """A disk of its own in memory, of `size` bytes, for the time of a `with` block."""

    def __init__(self, place: Path, size: int):
        self.place, self.size = place, size

    def __enter__(self) -> Path:
        self.place.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self.size}", "campaign", str(self.place)], check=True)
        return self.place

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", str(self.place)], check=True)

    def grow(self, size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.place)], check=True)


def _filled(shop: Workshop, reference: Any, wanted: str, number: int, step: int, left: int) -> Case:
    disk = Disk(shop.place("disk"), 2**21)
    with disk as place:
        recipe = shop.recipe(place / "run")

        def fill() -> None:
            free = shutil.disk_usage(place).free
            (place / "ballast").write_bytes(bytes(max(0, free - left)))

        ended = shop.train(recipe, [At(step, fill)])
        problem, silent = _refused(place / "run", ended, step - 1), False
        (place / "ballast").unlink()
        if not problem:
            problem, silent = goes_on(shop, recipe, reference)
    return Case("disk full", f"{number}: {left:,} bytes left at step {step}", wanted, problem, silent)


def _small(shop: Workshop, reference: Any, wanted: str, number: int, share: int) -> Case:
    needed = 4 * 214_000  # four checkpoints are on this disk at once
    disk = Disk(shop.place("disk"), max(4096, needed * share // 100))
    with disk as place:
        recipe = shop.recipe(place / "run")
        ended = shop.train(recipe)
        # A disk of a page has no room for the folder itself; that is found even earlier.
        problem = "" if ended.code in (2, DISK_EXIT) and not leftovers(place) else ended.brief
        if not problem and ended.code == DISK_EXIT and "free" not in ended.said:
            problem = f"names no numbers, {ended.brief}"
        silent = False
        disk.grow(2**22)
        if not problem:
            problem, silent = goes_on(shop, recipe, reference)
    return Case("disk full", f"preflight {number}: {share} % of the room", wanted, problem, silent)


def retention(shop: Workshop, count: int, random: Random) -> Iterator[Case]:
    """keep_last 1, and a save that fails or a newest checkpoint that is damaged."""
    wanted = "the last whole checkpoint is still there; goes on to the same bits"
    one = {"interval": 1, "keep_last": 1, "minutes": None}
    reference = unbroken(shop)
    for number in range(count):
        output = shop.place("keep")
        step = random.randrange(2, STEPS)
        recipe = shop.recipe(output, checkpoint=one)
        if number % 2:
            limit = random.randrange(0, 90_000)
            ended = shop.train(recipe, [At(step, _limit_files(limit))])
            problem = _refused(output, ended, step - 1)
            fault = f"save of step {step} fails at {limit:,} bytes"
        else:
            # Of steps e - 2 and e, e is damaged; the run goes on from e - 2 and is stopped at e - 1, behind it.
            even = random.choice((4, 6))
            sparse = {"interval": 2, "keep_last": 2, "minutes": None}
            shop.train(shop.recipe(output, checkpoint=sparse), [At(even + 1, die)])
            cut(output / "checkpoints" / f"step-{even}" / "model.safetensors", output, random)
            ended = shop.train(shop.recipe(output, checkpoint={**sparse, "keep_last": 1}), [At(even - 1, _terminate)])
            problem = "" if ended.code == 143 else ended.brief
            fault = f"step {even} damaged, then stopped and saved at {even - 1}"
        whole = [path for path in (output / "checkpoints").glob("step-*") if not damage(path)]
        problem = problem or ("" if whole else "no whole checkpoint is left")
        silent = False
        if not problem:
            problem, silent = goes_on(shop, recipe, reference)
        yield Case("retention with keep_last 1", f"{number}: {fault}", wanted, problem, silent)


def _limit_files(limit: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def two_at_once(shop: Workshop, count: int, random: Random) -> Iterator[Case]:
    """The same command while the first still runs, with and without restart; and after it was killed."""
    wanted = "the second is refused naming process and host; the lock of a dead process does not bind"
    reference = unbroken(shop)
    for number in range(count):
        output = shop.place("twice")
        moment = output.parent / f"{output.name}-moment"
        first = shop.start(shop.recipe(output), [At(2, partial(hold, moment))])
        problem, silent = "", False
        if number % 2:
            asked = {"checkpoint": {"resume": "restart"}} if number % 4 == 1 else {}
            second = act_in(moment, partial(shop.train, shop.recipe(output, **asked)))
            if second.code != 2 or f"process {first.pid} on" not in second.said:
                problem = f"second run: {second.brief}"
            problem = problem or ("" if first.wait().code == 0 else "the first run did not finish")
        else:
            act_in(moment, partial(first.signal, signal.SIGKILL))
            first.wait()
        if not problem and number % 2 == 0:
            problem, silent = goes_on(shop, shop.recipe(output), reference)
        fault = "at once" if number % 2 else "stale lock"
        yield Case("two runs in one folder", f"{number}: {fault}", wanted, problem, silent)


def bad_outputs(shop: Workshop, count: int, random: Random) -> Iterator[Case]:
    """Outputs that are read-only, files, loops of links, or vanish while the run is at work."""
    wanted = "refused before training, or a clear error; never 'saved' where nothing is"
    tricks = list(_outputs(shop).items())
    for number in range(count):
        name, (make, codes, words) = tricks[number % len(tricks)]
        output = shop.place("output")
        output.parent.mkdir(exist_ok=True)
        watchers, prepare = make(output)
        ended = shop.train(shop.recipe(output), watchers, prepare)
        claims = ended.code == 0 and not (output / "final" / "model.safetensors").exists()
        problem = "" if ended.code in codes and words in ended.said and not claims else ended.brief
        yield Case("outputs that cannot be written", f"{number}: {name}", wanted, problem, claims)


def _outputs(shop: Workshop) -> dict[str, tuple[Make, tuple[int, ...], str]]:
    def as_nobody() -> None:
        if os.geteuid() == 0:  # root may write anywhere
            os.setgid(NOBODY)
            os.setuid(NOBODY)

    def read_only(output: Path) -> Prepared:
        output.mkdir()
        output.chmod(0o555)
        _let_in(shop)
        return [], as_nobody

    def parent_read_only(output: Path) -> Prepared:
        _let_in(shop)
        return [], as_nobody

    def a_file(output: Path) -> Prepared:
        output.write_text("")
        return [], nothing

    def loop(output: Path) -> Prepared:
        output.symlink_to(output)
        return [], nothing

    def link(output: Path) -> Prepared:
        place = shop.place("linked")
        place.mkdir()
        output.symlink_to(place)
        return [], nothing

    def dangling(output: Path) -> Prepared:
        output.symlink_to(output.with_name("nowhere"))
        return [], nothing

    def vanishes(output: Path) -> Prepared:
        return [At(3, lambda: shutil.rmtree(output))], nothing

    def vanishes_at_the_end(output: Path) -> Prepared:
        return [At(STEPS, lambda: shutil.rmtree(output))], nothing

    def made_read_only(output: Path) -> Prepared:
        def close() -> None:
            as_nobody()  # the folder stays root's, so that nothing can be added to it any more

        if os.geteuid() == 0:
            return [At(3, close)], nothing
        return [At(3, lambda: (output / "checkpoints").chmod(0o555))], nothing

    return {
        "read-only": (read_only, (2,), "cannot be written"),
        "in a read-only folder": (parent_read_only, (2,), "cannot be written"),
        "a file": (a_file, (2,), "cannot be written"),
        "a link to itself": (loop, (2,), "cannot be written"),
        "a link to a folder": (link, (0,), ""),
        "a link to nothing": (dangling, (2,), "cannot be written"),
        "removed while running": (vanishes, (75,), "is gone"),
        "removed after the last step": (vanishes_at_the_end, (75,), "is gone"),
        "made read-only while running": (made_read_only, (75,), "could not be written"),
    }


def _let_in(shop: Workshop) -> None:
    """Let another user read model and data, and open its log, but write nothing else."""
    for path in (shop.root, *shop.root.parents):
        mode = path.stat().st_mode
        if mode & 0o005 != 0o005 and path.stat().st_uid == os.geteuid():
            path.chmod(mode | 0o055)
    for path in (*shop.model.rglob("*"), shop.data):
        path.chmod(0o644)
