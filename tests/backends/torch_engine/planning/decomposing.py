"""How far the memory of this process rises while matrices are decomposed: `python -m` this prints it in bytes, as JSON.

glibc gives large blocks back at once where MALLOC_MMAP_THRESHOLD_ is small: then resident memory is what is handed out,
LAPACK's own among it, and its peak, which proc(5) can begin anew, depends on no clock.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training_hub.backends.torch_engine.adaptations.osft.decompose import split

FORGET_PEAK, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
CUT = [(640, 640, 320), (640, 640, 620), (1280, 640, 320), (2240, 640, 320)]
BEGUN = [
    (begun, dtype, rows, columns)
    for begun in ("pissa", "olora", "pissa_niter_4")
    for dtype in ("float32", "bfloat16")
    for rows, columns in ((512, 512), (1408, 512), (512, 1408))
]


def resident(name: str) -> int:
    lines = (line.split() for line in STATUS.read_text(encoding="ascii").splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[0] == f"{name}:")


def risen(work: Callable[[], Any]) -> int:
    FORGET_PEAK.write_text("5", encoding="ascii")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def cut(rows: int, columns: int, kept: int) -> int:
    weight = torch.randn(rows, columns)
    split(weight, kept)  # loads libraries, which keep buffers of their own
    return risen(lambda: split(weight, kept))


def begun(how: str, dtype: str, rows: int, columns: int) -> int:
    """Of a layer with an adapter that begins as a part of its weight."""
    import peft

    def put_in(layer: nn.Linear) -> None:
        config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=how)
        peft.get_peft_model(nn.Sequential(layer), config, autocast_adapter_dtype=False)

    kind = getattr(torch, dtype)
    put_in(nn.Linear(16, 16, bias=False, dtype=kind))
    layer = nn.Linear(columns, rows, bias=False, dtype=kind)
    return risen(lambda: put_in(layer))


if __name__ == "__main__":
    torch.manual_seed(0)
    json.dump({"cut": [cut(*one) for one in CUT], "begun": [begun(*one) for one in BEGUN]}, sys.stdout)
