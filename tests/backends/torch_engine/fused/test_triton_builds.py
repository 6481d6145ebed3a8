"""Every Triton kernel becomes machine code for the GPUs that it is meant for, which needs none of them."""

from __future__ import annotations

import inspect
import os
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets here (TRITON_INTERPRET=1) and builds nothing", allow_module_level=True)

from training_hub.backends.torch_engine.fused import triton_eight_bit, triton_kernels  # noqa: E402
from training_hub.backends.torch_engine.optimizers import triton_kernels as triton_step  # noqa: E402

CAPABILITIES = (80, 90, 100)
"""A100, H100 and H200, B200."""

WHOLE = ("rows", "width", "columns", "count", "heads", "half")
"""Arguments that are int32; other numbers are float32."""

LOW, EXACT = "*bf16", "*fp32"
TILE = {"TILE": 2, "BLOCK": 2048}
SUMS = {**TILE, "CHUNK": 16}
WIDE = {"CHUNK": 16, "TILE": 1, "BLOCK": 8192}
NORMS: dict[str, str] = {"inverse": EXACT, "partial": EXACT}
LOSS = {"vocabulary": 128256, "BLOCK": 8192}
TARGETS = {"targets": "*i64", "gradient": LOW}
BYTES = dict.fromkeys(("mean", "square"), "*u8")
MOVES = {"IS_SPLIT": True, "IS_8BIT": False, "HAS_FACTOR": True, "GROUP": 8}
SPLIT = dict.fromkeys(("weight", "extra"), "*i16")

KERNELS: dict[str, tuple[Any, str, dict[str, str], dict[str, Any]]] = {
    "norm": (triton_kernels._norm_forward, LOW, NORMS, TILE),
    "sum and norm": (triton_kernels._add_norm_forward, LOW, NORMS, TILE),
    "norm backward": (triton_kernels._norm_backward, LOW, NORMS, {**SUMS, "IS_BESIDE": False}),
    "sum and norm backward": (triton_kernels._norm_backward, LOW, NORMS, {**SUMS, "IS_BESIDE": True}),
    "wide norm backward": (triton_kernels._norm_backward, LOW, NORMS, {**WIDE, "IS_BESIDE": True}),
    "gated unit": (triton_kernels._swiglu_forward, LOW, {}, {"BLOCK": 4096}),
    "gated unit backward": (triton_kernels._swiglu_backward, LOW, {}, {"BLOCK": 4096}),
    "positions": (triton_kernels._rotate, LOW, {}, {"back": False, "TILE": 32, "BLOCK": 64}),
    "positions backward": (triton_kernels._rotate, LOW, {}, {"back": True, "TILE": 32, "BLOCK": 64}),
    "loss": (triton_kernels._cross_entropy, EXACT, TARGETS, {**LOSS, "DFT": False}),
    "loss with dft": (triton_kernels._cross_entropy, EXACT, TARGETS, {**LOSS, "DFT": True}),
    "to 8 bits": (
        triton_eight_bit._quantize, EXACT, {"numbers": LOW, "low": "*fp8e4nv"},
        {"columns": 4096, "HAS_FACTORS": True, "BLOCK": 4096},
    ),
    "turned": (triton_eight_bit._turn, "*u8", {}, {"SIDE": 64}),
    "step": (triton_step._adamw_step, EXACT, {}, {**MOVES, "IS_SPLIT": False}),
    "split step": (triton_step._adamw_step, EXACT, SPLIT, MOVES),
    "8-bit step": (triton_step._adamw_step, EXACT, SPLIT | BYTES, {**MOVES, "IS_8BIT": True}),
}  # fmt: skip
"""By name: the kernel, the type of its tensors, that of some of them, and what is known when it is built."""


def kernels_of(module: Any) -> set[Any]:
    """Those that are started, not called by others."""
    found = {name: one for name, one in vars(module).items() if isinstance(one, triton.JITFunction)}
    source = inspect.getsource(module)
    return {one for name, one in found.items() if f"{name}[" in source}


def test_no_kernel_is_left_out() -> None:
    built = {kernel for kernel, *_ in KERNELS.values()}
    assert built == kernels_of(triton_kernels) | kernels_of(triton_eight_bit) | kernels_of(triton_step)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_becomes_machine_code(name: str, capability: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, tensors, others, known = KERNELS[name]
    if name == "to 8 bits" and capability < 89:
        pytest.skip("e4m3 came with compute capability 8.9")
    numbers = {*WHOLE, "eps", "offset", "multiplier", "smoothing", "z", "shrink", "beta1", "beta2", "stride", "root"}
    types = {
        one: "constexpr" if one in known
        else ("i32" if one in WHOLE else "fp32") if one in numbers
        else others.get(one, tensors)
        for one in kernel.arg_names
    }  # fmt: skip
    built = triton.compile(ASTSource(kernel, types, constexprs=known), target=GPUTarget("cuda", capability, 32))
    assert f".target sm_{capability}" in built.asm["ptx"] and built.asm["cubin"]
