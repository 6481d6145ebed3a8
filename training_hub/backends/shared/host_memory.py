"""Memory of the machine that this process has or can have."""

from __future__ import annotations

from pathlib import Path


def free_host_gib() -> float | None:
    """GiB that this process has or can have; None where that cannot be told."""
    available, held = _kibibytes("/proc/meminfo", "MemAvailable"), _kibibytes("/proc/self/status", "VmRSS")
    if available is None or held is None:
        return None
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min((available + held) / 2**20, int(limit) / 2**30 if limit.isdigit() else float("inf"))


def _kibibytes(path: str, name: str) -> int | None:
    """The number behind `name` in a file of the system that counts memory."""
    return next((int(line.split()[1]) for line in _read(path).splitlines() if line.startswith(f"{name}:")), None)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:  # no such file on other systems
        return ""
