"""Where the time of a step goes: a few steps taken apart by torch's profiler, operation by operation.

Every operation's own time counts once. It belongs to the named range or autograd function that it runs in (attention,
loss head, optimizer), in backward to that of its forward; else to the matrix products, or to all the rest that computes
(elementwise). What no operation accounts for (Python, launching kernels, waiting) is "other".
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from training_hub.folders import write_json

FILE_NAME = "profile.json"

# Names of ranges, for `torch.profiler.record_function`.
STEP, DATA, OPTIMIZER, ATTENTION, HEAD = "training_hub.step", "data wait", "optimizer", "attention", "loss head"
PRODUCTS, ELEMENTWISE, OTHER = "matrix products", "elementwise", "other"
PARTS = (PRODUCTS, ATTENTION, ELEMENTWISE, HEAD, OPTIMIZER, DATA, OTHER)

SKIPPED, TAKEN = 2, 3
"""Steps of a process that warm up, and those after them that are taken apart."""

PACKS = 6
"""Of steps that have more packs than this together fewer are taken apart, and one at least: what the profiler notes of
a pack of a model of 32 layers takes about 5 seconds to be read."""

LISTED = 15
"""Operations listed by name, those with the most time first."""

NO_OPERATION = re.compile(
    r"^(?:cuda|cu|hip)[A-Z]|^(?:Command Buffer Full|Activity Buffer Request|Buffer Flush|Instrumentation|Resource)$"
)
"""Calls of the driver, and what CUPTI notes of itself. Their numbers are not those of operations, but torch (2.11)
takes them for such, and so gives them kernels of operations a second time."""

# How ranges, autograd functions (forward, and backward as NAMEBackward) and kernels of each part are called.
NAMED = (
    (HEAD, re.compile(r"^loss head$|HeadLoss|linear_cross_entropy", re.IGNORECASE)),
    (ATTENTION, re.compile(r"^attention$|attention|attn", re.IGNORECASE)),
    (OPTIMIZER, re.compile(r"^optimizer$|^Optimizer\.step#|^_adamw_step$")),
    (DATA, re.compile(r"^data wait$")),
)
PRODUCT = re.compile(r"(?:^|::|_)(?:add|badd|b)?mm(?:$|_)|matmul|linear|einsum|addmv", re.IGNORECASE)

Split = dict[str, Any]


class StepProfile:
    """Takes TAKEN steps apart, after SKIPPED that warm up; fewer where the run ends before, or steps are large.

    `ahead`: steps the run will still do, from `next_step` on; `packs`: how many a step has. What was found is written
    to `file` at once, and stands in `split`. Costs time in the steps taken apart and after them, none in others.
    """

    def __init__(self, next_step: int, ahead: int, packs: float, device: torch.device, file: Path):
        taken = max(1, min(TAKEN, int(PACKS / max(packs, 1))))
        skipped = max(0, min(SKIPPED, ahead - taken))
        self.steps = range(next_step + skipped, next_step + min(ahead, skipped + taken))
        self._device, self._file = device, file
        self._profiler: profile | None = None
        self.split: Split | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around all that step `number` does; after the last one to be taken apart, `split` is there."""
        if number not in self.steps:
            yield
            return
        if self._profiler is None:
            self._profiler = self._open()
        with record_function(STEP):
            yield
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        if number == self.steps[-1]:
            self._profiler.stop()
            self.split = {"steps": list(self.steps), **split(self._profiler.events() or (), self._device.type)}
            write_json(self._file, self.split)

    def _open(self) -> profile:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        opened = profile(activities=activities, acc_events=True)
        opened.start()
        return opened


def split(events: Iterable[Any], device: str) -> Split:
    """What `events` of a profiler say of the steps among them, per step: seconds by part, and the slowest operations.

    seconds: by name of PARTS, adding up to seconds_per_step. matrix_products_within: products inside other parts.
    On CUDA the time is that of the kernels each operation launched, in "data wait" that of the host. Kernels that no
    operation launched count by their own names.
    """
    events = [event for event in events if not _is_no_operation(event.name)]
    steps = [event.time_range for event in events if event.name == STEP and event.device_type == DeviceType.CPU]
    within_steps = [e for e in events if any(s.start <= e.time_range.start <= s.end for s in steps) and e.name != STEP]
    inside = [event for event in within_steps if event.device_type == DeviceType.CPU]
    place = _Places(inside)
    count = max(1, len(steps))
    seconds: defaultdict[str, float] = defaultdict(float)
    within: defaultdict[str, float] = defaultdict(float)
    operations: defaultdict[tuple[str, str], float] = defaultdict(float)
    calls: Counter[tuple[str, str]] = Counter()
    for event in inside:
        part = place.of(event)
        taken = _own_seconds(event, part, device) / count
        if part is None:
            continue
        seconds[part] += taken
        operations[event.name, part] += taken
        calls[event.name, part] += 1
        if part not in (PRODUCTS, ELEMENTWISE) and _is_product(event.name):
            within[part] += taken
    for name, taken in _launched_by_none(within_steps).items():
        part = _part_called(name) or (PRODUCTS if _is_product(name) else ELEMENTWISE)
        seconds[part] += taken / count
        operations[name, part] += taken / count
    total = sum(span.end - span.start for span in steps) / 1e6 / count
    seconds[OTHER] = max(0.0, total - sum(seconds.values()))
    slowest = sorted(operations.items(), key=lambda item: -item[1])[:LISTED]
    return {
        "device": device,
        "seconds_per_step": total,
        "seconds": {part: seconds[part] for part in PARTS},
        "matrix_products_within": dict(within),
        "operations": [
            {"name": name, "part": part, "seconds": taken, "calls_per_step": calls[name, part] / count}
            for (name, part), taken in slowest
        ],
    }


def _launched_by_none(events: Iterable[Any]) -> dict[str, float]:
    """Seconds of kernels, by name, that belong to no operation: those which Triton launches outside of autograd."""
    taken: Counter[str] = Counter()
    for event in events:
        if event.device_type == DeviceType.CPU:
            for kernel in event.kernels:
                taken[kernel.name] -= kernel.duration
        elif not event.is_user_annotation:
            taken[event.name] += event.time_range.elapsed_us()
    # What is left of a sum and its parts is not exactly 0.
    return {name: microseconds / 1e6 for name, microseconds in taken.items() if microseconds > 1}


class _Places:
    """Finds the part an event belongs to; for backward by the sequence number that autograd gave its forward."""

    def __init__(self, events: Iterable[Any]):
        self._of_forward: dict[int, str | None] = {}
        for event in events:
            if event.sequence_nr >= 0 and not event.name.startswith("autograd::") and not event.fwd_thread:
                # An operation without gradient shows the number of the next one with; the last to show it owns it.
                self._of_forward[event.sequence_nr] = _named_part(event)

    def of(self, event: Any) -> str | None:
        """None for what computes nothing itself: autograd's own bookkeeping."""
        named = _named_part(event) or self._by_forward(event)
        if named is not None:
            return named
        if _is_product(event.name):
            return PRODUCTS
        return None if event.name.startswith("autograd::engine") else ELEMENTWISE

    def _by_forward(self, event: Any) -> str | None:
        while event is not None:
            if event.fwd_thread and event.sequence_nr >= 0:
                return self._of_forward.get(event.sequence_nr)
            event = event.cpu_parent
        return None


def _named_part(event: Any) -> str | None:
    while event is not None:
        part = _part_called(event.name)
        if part is not None:
            return part
        event = event.cpu_parent
    return None


@cache
def _part_called(name: str) -> str | None:
    return next((part for part, pattern in NAMED if pattern.search(name)), None)


@cache
def _is_no_operation(name: str) -> bool:
    return bool(NO_OPERATION.search(name))


@cache
def _is_product(name: str) -> bool:
    return bool(PRODUCT.search(name))


def _own_seconds(event: Any, part: str | None, device: str) -> float:
    on_device = device == "cuda" and part != DATA
    return (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6


def table(split: Mapping[str, Any]) -> Iterator[str]:
    """The split in lines for a person: what takes how long, the largest first."""
    steps, total = split["steps"], split["seconds_per_step"]
    yield f"a step takes {total:.4g} s (mean of steps {steps[0]} to {steps[-1]}, with the profiler's own cost)"
    for part, seconds in sorted(split["seconds"].items(), key=lambda item: -item[1]):
        products = split["matrix_products_within"].get(part, 0.0)
        note = f"  of which products {products:.4g} s" if products else ""
        yield f"  {part:<16}{seconds:>10.4f} s {seconds / max(total, 1e-12):>6.1%}{note}"
