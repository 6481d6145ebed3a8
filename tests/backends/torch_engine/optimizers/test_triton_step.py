"""The step as one Triton kernel is the step made of torch's operations; on a CPU by Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("without a GPU Triton's interpreter is needed: TRITON_INTERPRET=1", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from training_hub.backends.torch_engine.optimizers.blocks import tables  # noqa: E402
from training_hub.backends.torch_engine.optimizers.compact import CompactAdamW, step_in_one_  # noqa: E402
from training_hub.backends.torch_engine.optimizers.split import join  # noqa: E402
from training_hub.backends.torch_engine.optimizers.triton_kernels import _nearest  # noqa: E402

DEVICE = torch.device("cuda" if ON_GPU else "cpu")


@pytest.mark.parametrize("is_8bit", [True, False], ids=["8bit", "float32 moments"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(3, 5), (67, 131), (64, 256)], ids=str)
def test_one_kernel_moves_weights_and_moments_as_torchs_operations_do(shape, dtype, is_8bit):
    def begun() -> tuple[torch.Tensor, torch.Tensor | None, CompactAdamW]:
        torch.manual_seed(0)
        weight = torch.randn(shape).to(DEVICE, dtype).requires_grad_()
        weight.grad_dtype = torch.float32
        extra = torch.zeros(shape, dtype=torch.int16, device=DEVICE) if dtype == torch.bfloat16 else None
        extras = {} if extra is None else {weight: extra}
        settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        return weight, extra, CompactAdamW([{"params": [weight]}], extras, is_8bit=is_8bit, **settings)

    (plain, plain_extra, slow), (fused, fused_extra, fast) = begun(), begun()
    fast.state[fused].update(fast._fresh(fused))
    for step in range(4):
        torch.manual_seed(step)
        gradient = torch.randn(shape).to(DEVICE) * torch.logspace(-4, 0, shape[1], device=DEVICE)
        plain.grad, fused.grad = gradient, gradient.clone()
        factor = torch.tensor(0.3, device=DEVICE) if step % 2 else None
        slow._factor = factor
        with torch.no_grad():
            slow.state[plain].update(slow.state[plain] or slow._fresh(plain))
            slow.state[plain]["step"] += 1
            slow._move_in_stretches(plain, plain_extra, slow.state[plain], slow.param_groups[0])
            fast.state[fused]["step"] += 1
            step_in_one_(fused, fused_extra, fast.state[fused], fast.param_groups[0], factor)
    wanted = plain if plain_extra is None else join(plain, plain_extra)
    found = fused if fused_extra is None else join(fused, fused_extra)
    # The order of a few float32 operations differs; a moment that lies between two bytes may then take the other one,
    # and moves its weight by some percent of a step of 0.01.
    difference = (found - wanted).abs()
    assert difference.max() < (5e-3 if is_8bit else 1e-6)
    assert (difference > 1e-6).float().mean() < 1e-2
    for name in ("exp_avg", "exp_avg_sq"):
        one, other = (state[name].float() for state in (slow.state[plain], fast.state[fused]))
        if is_8bit and one.shape != shape:
            assert (one - other).abs().max() <= 1 and (one != other).float().mean() < 1e-2
        else:
            torch.testing.assert_close(one, other)


@triton.jit
def _places(shares, borders, found, count, IS_SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    near = _nearest(tl.load(shares + at, mask=at < count, other=0.0), borders, IS_SIGNED)
    tl.store(found + at, near, mask=at < count)


@pytest.mark.parametrize("signed", [True, False])
def test_the_guessed_byte_is_the_one_that_a_search_finds(signed):
    torch.manual_seed(0)
    values, borders = tables(signed, str(DEVICE))
    beside = [torch.nextafter(borders, torch.full_like(borders, to)) for to in (-2.0, 2.0)]
    drawn = [torch.rand(20_000, device=DEVICE), 10 ** (-9 * torch.rand(20_000, device=DEVICE))]
    shares = torch.cat([values, borders, *beside, *drawn])
    shares = torch.cat([shares, -shares]) if signed else shares[shares >= 0]
    found = torch.full(shares.shape, -1, dtype=torch.int32, device=DEVICE)
    _places[(triton.cdiv(len(shares), 4096),)](shares, borders, found, len(shares), signed, 4096)
    assert torch.equal(found, torch.bucketize(shares, borders, out_int32=True))
