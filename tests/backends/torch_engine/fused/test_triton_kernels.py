"""Each Triton kernel against the same formula in float64; on a CPU by Triton's interpreter."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("without a GPU Triton's interpreter is needed: TRITON_INTERPRET=1", allow_module_level=True)

from tests.backends.torch_engine.tiny_models import random_pack, tiny_model  # noqa: E402
from training_hub.backends.torch_engine.attention import DOCUMENTS, register_attention  # noqa: E402
from training_hub.backends.torch_engine.fused import functions, triton_kernels  # noqa: E402
from training_hub.backends.torch_engine.fused.swap import swap  # noqa: E402
from training_hub.backends.torch_engine.objectives.cross_entropy import CrossEntropy  # noqa: E402
from training_hub.backends.torch_engine.objectives.token_loss import TokenLoss  # noqa: E402
from training_hub.backends.torch_engine.tensors import to_device  # noqa: E402

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
"""Largest share of a result's norm that rounding takes: float32 keeps 24 bits, bfloat16 8; the interpreter cuts."""

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def exact(*tensors: Tensor) -> list[Tensor]:
    return [one.double().requires_grad_() for one in tensors]


def assert_near(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert float((found.double() - wanted.detach()).norm() / wanted.detach().norm()) < TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (130, 48), (65, 128), (3, 5000)])
def test_rms_norm(dtype: torch.dtype, offset: float, rows: int, width: int) -> None:
    torch.manual_seed(0)
    x, weight, upstream = (random(*shape, dtype=dtype) for shape in ((rows, width), (width,), (rows, width)))
    result, inverse = torch.empty_like(x), torch.empty(rows, device=DEVICE)
    triton_kernels.rms_norm_forward(x, weight, result, inverse, rows, width, 1e-5, offset)
    of_x, partial = torch.empty_like(x), torch.empty(-(-rows // functions.GPU_CHUNK), width, device=DEVICE)
    triton_kernels.rms_norm_backward(upstream, None, x, weight, inverse, of_x, partial, rows, width, offset)
    x_64, weight_64 = exact(x, weight)
    wanted = x_64 * (x_64.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (weight_64 + offset)
    gradients = torch.autograd.grad(wanted, (x_64, weight_64), upstream.double())
    assert_near(result, wanted, dtype)
    assert_near(of_x, gradients[0], dtype)
    assert_near(partial.sum(0), gradients[1], dtype)


@DTYPES
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (130, 48), (65, 128), (3, 5000)])
def test_a_sum_and_its_norm(dtype: torch.dtype, offset: float, rows: int, width: int) -> None:
    torch.manual_seed(0)
    x, delta, beside, upstream = (random(rows, width, dtype=dtype) for _ in range(4))
    weight = random(width, dtype=dtype)
    total, result, inverse = torch.empty_like(x), torch.empty_like(x), torch.empty(rows, device=DEVICE)
    triton_kernels.add_norm_forward(x, delta, weight, total, result, inverse, rows, width, 1e-5, offset)
    of_x, partial = torch.empty_like(x), torch.empty(-(-rows // functions.GPU_CHUNK), width, device=DEVICE)
    triton_kernels.rms_norm_backward(upstream, beside, total, weight, inverse, of_x, partial, rows, width, offset)
    x_64, delta_64, weight_64 = exact(x, delta, weight)
    total_64 = x_64 + delta_64
    wanted = total_64 * (total_64.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (weight_64 + offset)
    gradients = torch.autograd.grad((total_64, wanted), (x_64, weight_64), (beside.double(), upstream.double()))
    assert_near(total, total_64, dtype)
    assert_near(result, wanted, dtype)
    assert_near(of_x, gradients[0], dtype)
    assert_near(partial.sum(0), gradients[1], dtype)


@DTYPES
@pytest.mark.parametrize("count", [1, 4096, 9001])
def test_swiglu(dtype: torch.dtype, count: int) -> None:
    torch.manual_seed(0)
    gate, up, upstream = (random(count, dtype=dtype) for _ in range(3))
    result, of_gate, of_up = (torch.empty_like(gate) for _ in range(3))
    triton_kernels.swiglu_forward(gate, up, result, count)
    triton_kernels.swiglu_backward(upstream, gate, up, of_gate, of_up, count)
    gate_64, up_64 = exact(gate, up)
    wanted = torch.nn.functional.silu(gate_64) * up_64
    gradients = torch.autograd.grad(wanted, (gate_64, up_64), upstream.double())
    for found, right in zip((result, of_gate, of_up), (wanted, *gradients), strict=True):
        assert_near(found, right, dtype)


@DTYPES
@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 1, 2), (7, 3, 16), (5, 33, 96), (3, 4, 256)])
def test_rotate(dtype: torch.dtype, tokens: int, heads: int, width: int) -> None:
    torch.manual_seed(0)
    x, upstream = (random(tokens, heads, width, dtype=dtype) for _ in range(2))
    # The two halves get angles of their own, as in models whose frequencies are not the same twice.
    cosines, sines = (random(tokens, width, dtype=dtype) for _ in range(2))
    result, back = torch.empty_like(x), torch.empty_like(x)
    triton_kernels.rotate(x, cosines, sines, result, tokens, heads, width, False)
    triton_kernels.rotate(upstream, cosines, sines, back, tokens, heads, width, True)
    (x_64,) = exact(x)
    low, high = x_64.chunk(2, -1)
    wanted = x_64 * cosines.double()[:, None] + torch.cat([-high, low], -1) * sines.double()[:, None]
    assert_near(result, wanted, dtype)
    assert_near(back, torch.autograd.grad(wanted, x_64, upstream.double())[0], dtype)


@DTYPES
@pytest.mark.parametrize("loss", [TokenLoss(), TokenLoss(smoothing=0.1, z=1e-2), TokenLoss(dft=True)], ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(3, 7), (2, 8192), (2, 20001)])
def test_cross_entropy(dtype: torch.dtype, rows: int, vocabulary: int, loss: TokenLoss) -> None:
    torch.manual_seed(0)
    logits = 4 * random(rows, vocabulary, dtype=torch.float32)
    targets = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    targets[0] = vocabulary - 1
    weights = random(rows, dtype=torch.float32)
    losses, gradient = torch.empty_like(weights), torch.empty_like(logits, dtype=dtype)
    tensors = (logits, targets, weights, losses, gradient)
    triton_kernels.cross_entropy(*tensors, rows, vocabulary, 0.7, loss.smoothing, loss.z, loss.dft)
    (logits_64,) = exact(logits)
    wanted = loss.losses(0.7 * logits_64, targets) * weights.double()
    assert_near(losses, wanted, torch.float32)
    assert_near(gradient, torch.autograd.grad(wanted.sum(), logits_64)[0], dtype)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_a_model_on_these_kernels_learns_what_the_library_learns(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    register_attention()
    model = tiny_model(family).to(DEVICE)
    model.set_attn_implementation(DOCUMENTS)
    exact = copy.deepcopy(model).double()
    elsewhere, started = functions._call, set()

    def call(name: str, tensors: tuple[Tensor | None, ...], *numbers: float) -> None:
        if name == "cross_entropy":  # the loss calls another on a GPU than on a CPU
            elsewhere(name, tensors, *numbers)
            return
        started.add(name)
        getattr(triton_kernels, name)(*tensors, *numbers)

    monkeypatch.setattr(functions, "_call", call)
    swap(model)
    losses = [CrossEntropy()(one, to_device(random_pack(), DEVICE)).total for one in (model, exact)]
    for loss in losses:
        loss.backward()
    assert {"rms_norm_forward", "add_norm_forward", "rms_norm_backward"} <= started
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=1e-5)
    for (name, found), wanted in zip(model.named_parameters(), exact.parameters(), strict=True):
        # Float32 through two layers: up to 1e-5 of a gradient's norm.
        assert found.grad is not None and wanted.grad is not None
        assert float((found.grad - wanted.grad).norm() / wanted.grad.norm().clamp_min(1e-6)) < 1e-4, name
