"""The kernels as functions of tensors, with gradients. For float32 or bfloat16 tensors.

On a CPU they are those of kernels.c, and each is called only where `build.kernels()` is there. On a GPU norms, rotary
positions and gated units are those of triton_kernels.py. Tensors without contents (torch's meta device) pass as shapes.
"""

# T tokens, D width of queries and keys (or of the model), E width of values, Q query heads, K key-value heads

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from training_hub.backends.torch_engine.fused.build import kernels, kernels_problem

TYPES = (torch.float32, torch.bfloat16)
CHUNK, GPU_CHUNK = 64, 16
"""Rows over which one thread of a CPU (as in kernels.c), or one program of a GPU, sums the gradient of a norm's weight.
With 64, the 8,192 rows of a pack were too few programs for the 132 multiprocessors of an H200: 1.4 TB/s."""


def are_fit(*tensors: Tensor) -> bool:
    """Whether the kernels of kernels.c take these tensors: on a CPU or without contents, of one type they know."""
    return tensors[0].device.type in ("cpu", "meta") and are_known(*tensors)


def are_known(*tensors: Tensor) -> bool:
    """Whether norms, rotary positions and gated units have kernels for these tensors: in one place, of one type."""
    kind, place = tensors[0].dtype, tensors[0].device.type
    is_known = kind in TYPES and place in ("cpu", "meta", "cuda")
    return is_known and all(one.dtype == kind and one.device.type == place for one in tensors)


def problem_on(device: torch.device) -> str | None:
    """Why there are no kernels for this device, None where there are."""
    if device.type != "cuda":
        return kernels_problem()
    return None if find_spec("triton") is not None else "Triton is not installed: pip install triton"


class _Heads(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("token", ctypes.c_long), ("head", ctypes.c_long))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("low", ctypes.c_int),
        *((name, ctypes.c_long) for name in ("heads", "kv_heads", "width", "value_width", "documents", "window")),
        ("starts", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("scale", ctypes.c_float),
    )


def attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scaling: float, window: int | None
) -> Tensor:
    """Causal attention inside each document: [1, T, Q, E] from [1, Q, T, D], [1, K, T, D] and [1, K, T, E].

    The last dimension must be contiguous, the others may have any stride. Scores are float32 and never written out.
    """
    output: Tensor = _Attention.apply(query, key, value, tuple(lengths), scaling, window or 0)
    return output


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scaling: float, window: int
    ) -> Tensor:
        _, heads, tokens, _ = query.shape
        output = query.new_empty(1, tokens, heads, value.shape[-1])
        normalisers_QT = query.new_empty(heads, tokens, dtype=torch.float32)
        if not query.is_meta:
            layer = _layer(query, key, value, lengths, scaling, window)
            given = (_heads(query), _heads(key), _heads(value), *_at(output, normalisers_QT))
            _refuse(_library().attention_forward(ctypes.byref(layer), *given, torch.get_num_threads()))
        ctx.save_for_backward(query, key, value, normalisers_QT)
        ctx.rule = (lengths, scaling, window)
        return output

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, normalisers_QT = ctx.saved_tensors
        # Laid out as models lay them out: heads beside each other within a token.
        made = [one.new_empty(one.transpose(1, 2).shape) for one in (query, key, value)]
        if not query.is_meta:
            layer = _layer(query, key, value, *ctx.rule)
            gradient = upstream[0].contiguous().transpose(1, 2)
            given = (*(_heads(one) for one in (query, key, value, gradient)), *_at(normalisers_QT, *made))
            _refuse(_library().attention_backward(ctypes.byref(layer), *given, torch.get_num_threads()))
        return (*(one.transpose(1, 2) for one in made), None, None, None)


def _layer(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scaling: float, window: int) -> _Layer:
    starts, order = _places(lengths)
    sizes = (query.shape[1], key.shape[1], query.shape[-1], value.shape[-1], len(lengths), window)
    return _Layer(query.dtype == torch.bfloat16, *sizes, starts.data_ptr(), order.data_ptr(), scaling)


@lru_cache(maxsize=8)
def _places(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Where documents start, and the order in which to take them: the longest first, so that no thread ends late."""
    starts = torch.tensor([0, *accumulate(lengths)])
    return starts, torch.tensor(lengths).argsort(descending=True, stable=True)


def _heads(tensor: Tensor) -> Any:
    return ctypes.byref(_Heads(tensor.data_ptr(), tensor.stride(2), tensor.stride(1)))


def _refuse(failed: int) -> None:
    if failed:
        raise torch.OutOfMemoryError("attention: can't allocate memory for the longest document")


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset), over the last dimension."""
    result: Tensor = _RMSNorm.apply(x.contiguous(), weight, eps, offset)
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        result, inverse = torch.empty_like(x), _a_number_a_row(x)
        _call("rms_norm_forward", (x, weight, result, inverse), len(inverse), x.shape[-1], eps, offset)
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        return result

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*_of_norm(ctx, None, upstream[0]), None, None)


def norm_beside(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """x itself and its `rms_norm`. What goes on with this x sends its gradient back to the norm, which adds it to its
    own in one pass."""
    both: tuple[Tensor, Tensor] = _NormBeside.apply(x.contiguous(), weight, eps, offset)
    return both


class _NormBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return x, _RMSNorm.forward(ctx, x, weight, eps, offset)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_of_norm(ctx, *upstream), None, None)


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """x + delta, of one shape, and its `rms_norm`, in one pass; as `norm_beside` backward."""
    both: tuple[Tensor, Tensor] = _AddNorm.apply(x.contiguous(), delta.contiguous(), weight, eps, offset)
    return both


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
        total, result, inverse = torch.empty_like(x), torch.empty_like(x), _a_number_a_row(x)
        tensors = (x, delta, weight, total, result, inverse)
        _call("add_norm_forward", tensors, len(inverse), x.shape[-1], eps, offset)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, inverse)
        ctx.offset = offset
        return total, result

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        of_x, of_weight = _of_norm(ctx, *upstream)
        return of_x, of_x, of_weight, None, None


def _a_number_a_row(x: Tensor) -> Tensor:
    return x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


def _of_norm(ctx: Any, beside: Tensor | None, upstream: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and the weight, from those of x itself and of its norm; None for one that is 0."""
    if upstream is None:
        return beside, None
    x, weight, inverse = ctx.saved_tensors
    width = x.shape[-1]
    sums = -(-len(inverse) // (GPU_CHUNK if x.is_cuda else CHUNK))
    result, partial = torch.empty_like(x), x.new_empty(sums, width, dtype=torch.float32)
    beside = None if beside is None else beside.contiguous()
    tensors = (upstream.contiguous(), beside, x, weight, inverse, result, partial)
    _call("rms_norm_backward", tensors, len(inverse), width, ctx.offset)
    return result, partial.sum(0).to(weight.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    result: Tensor = _SwiGLU.apply(gate.contiguous(), up.contiguous())
    return result


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        result = torch.empty_like(gate)
        _call("swiglu_forward", (gate, up, result), gate.numel())
        ctx.save_for_backward(gate, up)
        return result

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        _call("swiglu_backward", (upstream[0].contiguous(), gate, up, of_gate, of_up), gate.numel())
        return of_gate, of_up


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """x [B, T, heads, D] with the halves of each head turned by the angles of its token, cosines and sines [B, T, D].

    The angles may be [1, T, D], the same for all rows.
    """
    angles = (part.expand(len(x), -1, -1).contiguous() for part in (cosines, sines))
    result: Tensor = _Rotation.apply(x.contiguous(), *angles)
    return result


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _turned(x, cosines, sines, back=False)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return _turned(upstream[0].contiguous(), *ctx.saved_tensors, back=True), None, None


def _turned(x: Tensor, cosines: Tensor, sines: Tensor, *, back: bool) -> Tensor:
    result = torch.empty_like(x)
    batch, tokens, heads, width = x.shape
    _call("rotate", (x, cosines, sines, result), batch * tokens, heads, width, back)
    return result


def cross_entropy_(
    logits_RV: Tensor,
    targets_R: Tensor,
    weights_R: Tensor,
    multiplier: float,
    smoothing: float = 0.0,
    z: float = 0.0,
    dft: bool = False,
) -> Tensor:
    """losses [R] in float32: weight * -log p(target), p = softmax(multiplier * logits); TokenLoss says the rest.

    `logits_RV` become the gradient of their sum. weights are float32, targets int64. Not differentiable by autograd.
    """
    losses_R = weights_R.new_empty(len(targets_R))
    rows, vocabulary = logits_RV.shape
    tensors = (logits_RV, targets_R.contiguous(), weights_R.contiguous(), losses_R)
    _call("cross_entropy", tensors, rows, vocabulary, multiplier, smoothing, z, dft)
    return losses_R


def gpu_cross_entropy(
    logits_RV: Tensor,
    targets_R: Tensor,
    weights_R: Tensor,
    multiplier: float,
    dtype: torch.dtype,
    smoothing: float = 0.0,
    z: float = 0.0,
    dft: bool = False,
) -> tuple[Tensor, Tensor]:
    """Losses [R] in float32 as `cross_entropy_` makes them, and the gradient of their sum [R, V] as `dtype`.

    The logits are float32 on a GPU and stay as they are.
    """
    losses_R, gradient_RV = torch.empty_like(weights_R), torch.empty_like(logits_RV, dtype=dtype)
    rows, vocabulary = logits_RV.shape
    tensors = (logits_RV, targets_R.contiguous(), weights_R.contiguous(), losses_R, gradient_RV)
    _call("cross_entropy", tensors, rows, vocabulary, multiplier, smoothing, z, dft)
    return losses_R, gradient_RV


def divergence_(
    logits_RV: Tensor,
    teacher_RU: Tensor,
    targets_R: Tensor,
    weights_R: Tensor,
    common: int,
    multiplier: float,
    teacher_multiplier: float,
    kind: int,
    beta: float,
    temperature: float,
    alpha: float,
) -> Tensor:
    """losses [R] in float32: weight * (alpha * temperature^2 * D + (1 - alpha) * -log p(target)), see Divergence.

    `logits_RV` become the gradient of their sum; of both, the first `common` entries are compared.
    """
    losses_R = weights_R.new_empty(len(targets_R))
    tensors = (logits_RV, teacher_RU.contiguous(), targets_R.contiguous(), weights_R.contiguous(), losses_R)
    sizes = (*logits_RV.shape, teacher_RU.shape[-1], common, teacher_RU.dtype == torch.bfloat16)
    _call("divergence", tensors, *sizes, multiplier, teacher_multiplier, kind, beta, temperature, alpha)
    return losses_R


def bucket_divergence_(
    logits_RV: Tensor,
    ids_RK: Tensor,
    logs_RK: Tensor,
    last_R: Tensor,
    targets_R: Tensor,
    weights_R: Tensor,
    common: int,
    multiplier: float,
    kind: int,
    beta: float,
    temperature: float,
    alpha: float,
) -> Tensor:
    """The same against some of the teacher's tokens: ids int64, logs their log-probabilities, last the mass of all
    others, less than 0 where there are none; or, of kind 3, tokens drawn from it, and last its entropy."""
    losses_R = weights_R.new_empty(len(targets_R))
    theirs = (ids_RK.contiguous(), logs_RK.float().contiguous(), last_R.float().contiguous())
    tensors = (logits_RV, *theirs, targets_R.contiguous(), weights_R.contiguous(), losses_R)
    sizes = (*logits_RV.shape, common, ids_RK.shape[-1])
    _call("bucket_divergence", tensors, *sizes, multiplier, kind, beta, temperature, alpha)
    return losses_R


def _library() -> ctypes.CDLL:
    library = kernels()
    assert library is not None  # the caller has asked
    return library


def _call(name: str, tensors: tuple[Tensor | None, ...], *numbers: float) -> None:
    """Run kernel `name` where the tensors are, the first of which there must be.

    The C function takes addresses, whether the first tensor's type is the low one, numbers, threads.
    """
    first = tensors[0]
    assert first is not None
    if first.is_cuda:
        from training_hub.backends.torch_engine.fused import triton_kernels

        with torch.cuda.device(first.device):
            getattr(triton_kernels, name)(*tensors, *numbers)
    elif not first.is_meta:
        is_low = first.dtype == torch.bfloat16
        getattr(_library(), name)(*_at(*tensors), is_low, *map(_in_c, numbers), torch.get_num_threads())


def _in_c(number: float) -> Any:
    if isinstance(number, bool):
        return ctypes.c_int(number)
    return ctypes.c_long(number) if isinstance(number, int) else ctypes.c_float(number)


def _at(*tensors: Tensor | None) -> tuple[ctypes.c_void_p, ...]:
    return tuple(ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors)
