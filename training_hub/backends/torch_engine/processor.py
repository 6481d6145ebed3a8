"""What a run on a CPU asks of the machine at its start: how many threads compute, and how memory is kept."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
from functools import cache
from pathlib import Path

import torch

# Numbers of glibc's mallopt (malloc.h), and what they are set to.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 2**30
LARGEST_KEPT_BLOCK = 2**28


def prepare_processor(device: torch.device) -> None:
    """On a CPU: compute with as many threads as there are cores for this process, and keep freed memory.

    OMP_NUM_THREADS, where set, decides the threads. A GPU's host has other work, and is left as it is.
    """
    if device.type != "cpu":
        return
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    _keep_freed_memory()


@cache
def is_slow_for_mkl() -> bool:
    """Whether MKL does not choose the best of its kernels for float32 products on this processor."""
    if not torch.backends.mkl.is_available():
        return False
    return chooses_slow_kernels(_read("/proc/cpuinfo") or "", has_avx512=torch.cpu._is_avx512_supported())


def chooses_slow_kernels(cpuinfo: str, *, has_avx512: bool) -> bool:
    """Whether MKL leaves AVX512 idle, since another than Intel has made the processor that /proc/cpuinfo tells of."""
    maker = re.search(r"^vendor_id\s*:\s*(\S+)", cpuinfo, re.MULTILINE)
    return has_avx512 and maker is not None and maker[1] != "GenuineIntel"


def usable_cores() -> int:
    """Cores this process may run on: those of its affinity, two hardware threads counting once, within its quota."""
    processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_read(f"/sys/devices/system/cpu/cpu{one}/topology/thread_siblings_list") or str(one) for one in processors}
    quota = cpu_quota(_read("/sys/fs/cgroup/cpu.max"))
    return max(1, len(cores) if quota is None else min(len(cores), quota))


def cpu_quota(cpu_max: str | None) -> int | None:
    """Whole processors that a control group grants, by its file cpu.max ("200000 100000"); None where it sets none."""
    allowed, _, period = (cpu_max or "max").partition(" ")
    return None if allowed == "max" else max(1, int(allowed) // int(period))


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:  # no such file on other systems, and in containers that hide it
        return None


def _keep_freed_memory() -> None:
    """Let glibc keep what tensors gave back instead of returning it to the system, which hands it out zeroed again.

    A step frees and takes the same large blocks over and over. With glibc's own thresholds a step of a 28M model took
    25,000 page faults; with these 300, and 4 % less time. Huge pages changed nothing beyond that.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have none
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BLOCK)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def give_back_memory() -> None:
    """Return to the system, or to the device, what a model that is not used any more took."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:  # other C libraries have none
        trim(0)
