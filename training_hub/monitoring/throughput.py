"""How fast a run goes, and what it needs: useful tokens per second, time left, memory."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping

from training_hub.monitoring.words import amount


class ThroughputMeter:
    """Useful tokens per second and time left, over the last `window` steps of this process.

    `total_steps` is the end of the run and `first_step` the number of steps done before, by an earlier process: those
    count as done and say nothing about speed now. The first step measured builds caches and kernels, so it counts only
    until there is another. Useful tokens are those of samples; padding is none.
    """

    def __init__(self, total_steps: int, first_step: int = 0, window: int = 20):
        self._total_steps = total_steps
        self._done = first_step
        self._measured = 0
        self._recent: deque[tuple[int, float]] = deque(maxlen=window)

    def add(self, tokens: int, seconds: float) -> None:
        """One more step is done, with `tokens` useful tokens in `seconds`."""
        if self._measured == 1:
            self._recent.clear()
        self._recent.append((tokens, seconds))
        self._measured += 1
        self._done += 1

    @property
    def tokens_per_second(self) -> float:
        """0.0 before the first step."""
        seconds = sum(taken for _, taken in self._recent)
        return sum(tokens for tokens, _ in self._recent) / seconds if seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float:
        """NaN before the first step."""
        if not self._recent:
            return float("nan")
        mean = sum(taken for _, taken in self._recent) / len(self._recent)
        return mean * max(0, self._total_steps - self._done)


def speed_line(metrics: Mapping[str, float]) -> str:
    """The speed of a whole run in a line, from its final metrics."""
    useful, trained = (amount(metrics[name]) for name in ("tokens_per_second", "trained_tokens_per_second"))
    line = f"speed: {useful} useful tokens/s, {trained} trained tokens/s"
    if "peak_fraction" not in metrics:
        return line
    peak = metrics["peak_tflops"]
    shown = f"{peak:,.3g} TFLOP/s" if peak >= 1 else f"{peak * 1000:.3g} GFLOP/s"
    return f"{line}; {metrics['peak_fraction']:.1%} of the {shown} that matrix products reached here at the start"


def memory_gib() -> float:
    """The most memory this process ever held, in GiB (resident); NaN where the system does not tell (Windows)."""
    own = _peak_of_this_program()
    if own is not None:
        return own
    try:
        import resource
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # getrusage(2): kilobytes on the BSDs, bytes on macOS.
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def _peak_of_this_program() -> float | None:
    """What Linux says in proc(5), VmHWM; None elsewhere.

    Linux's getrusage counts what the process held before it became this program: a notebook of 20 GiB that starts a
    run would be shown as the run's own memory.
    """
    try:
        with open("/proc/self/status", "rb") as status:
            line = next(line for line in status if line.startswith(b"VmHWM:"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) / 2**20
