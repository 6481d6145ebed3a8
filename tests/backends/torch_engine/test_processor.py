"""Threads and memory of a run on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from training_hub.backends.torch_engine.processor import (
    chooses_slow_kernels,
    cpu_quota,
    prepare_processor,
    usable_cores,
)


@pytest.mark.parametrize(
    ("cpu_max", "found"),
    [("max 100000", None), (None, None), ("200000 100000", 2), ("250000 100000", 2), ("50000 100000", 1)],
)
def test_a_control_groups_quota_is_read_in_whole_processors(cpu_max: str | None, found: int | None) -> None:
    assert cpu_quota(cpu_max) == found


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity of processes")
def test_no_more_cores_are_used_than_the_process_may_run_on() -> None:
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("maker", "has_avx512", "is_slow"),
    [("AuthenticAMD", True, True), ("AuthenticAMD", False, False), ("GenuineIntel", True, False), (None, True, False)],
)
def test_float32_products_are_slow_in_mkl_where_another_than_intel_has_made_the_avx512(maker, has_avx512, is_slow):
    cpuinfo = "processor\t: 0\n" + (f"vendor_id\t: {maker}\n" if maker else "")
    assert chooses_slow_kernels(cpuinfo, has_avx512=has_avx512) == is_slow


@pytest.mark.parametrize(("asked", "expected"), [("1", 1), ("2", 2), (None, 1)])
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity of processes")
def test_threads_are_those_of_omp_num_threads_or_the_cores_of_the_process(asked: str | None, expected: int) -> None:
    script = (
        "import os, torch; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from training_hub.backends.torch_engine.processor import prepare_processor;"
        "prepare_processor(torch.device('cpu')); print(torch.get_num_threads())"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    }
    environment |= {"OMP_NUM_THREADS": asked} if asked else {}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == expected


def test_the_host_of_a_gpu_is_left_as_it_is() -> None:
    before = torch.get_num_threads()
    prepare_processor(torch.device("cuda"))
    assert torch.get_num_threads() == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts page faults as Linux does")
def test_freed_memory_is_taken_again_without_asking_the_system() -> None:
    script = (
        "import resource, torch; from training_hub.backends.torch_engine.processor import prepare_processor;"
        "prepare_processor(torch.device('cpu'));"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt;"
        "step = lambda: [torch.ones(size * 2**20) for size in (16, 24, 12)] and None;"
        "rounds = [(faults(), step(), faults()) for _ in range(12)];"
        "print(sorted(after - before for before, _, after in rounds)[6])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    # 52 blocks of 4 MiB are 53,000 pages; larger than 32 MiB, glibc itself would give all of them back each time. The
    # median is asked because the heap may still grow in the first rounds.
    assert int(done.stdout) < 5_000
