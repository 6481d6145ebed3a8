"""Parts of a step on one GPU, each timed alone, a line each in gpu_parts.jsonl: `python benchmarks/gpu_parts.py`.

Matrix products, our kernels beside what they stand for, attention, the optimizer's step, and forward and backward of a
model so small that it waits for its host: as the engine runs it, and recorded as a CUDA graph and replayed. A part that
fails is a line too. `--tiny` tries the script on whatever device there is, with what that device has.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu import LLAMA_135M, TINY, random_model
from torch import Tensor

from training_hub.backends.torch_engine.attention import DOCUMENTS, FUNCTIONS, VARLEN, register_attention
from training_hub.backends.torch_engine.attention_trial import Heads, try_each
from training_hub.backends.torch_engine.fused import functions, one_input, products
from training_hub.backends.torch_engine.fused.swap import run_on_kernels
from training_hub.backends.torch_engine.objectives.cross_entropy import CrossEntropy
from training_hub.backends.torch_engine.optim import Masters
from training_hub.backends.torch_engine.optimizers.compact import CompactAdamW
from training_hub.backends.torch_engine.tensors import PackTensors, to_device
from training_hub.types import Pack

HERE = Path(__file__).parent
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16
ROUNDS = 20 if ON_GPU else 2

Work = Callable[[], Any]


@dataclass(frozen=True)
class Part:
    """What is timed, and how much it does: operations, or bytes that it must move, as `unit` counts them."""

    name: str
    work: Work
    amount: float
    unit: str


def main() -> None:
    options = read_options()
    torch.manual_seed(0)
    tokens, width = (64, 32) if options.tiny else (16384, 4096)
    for make in (multiplied, normed, gated, lost, moved):
        for part in tried(make, tokens, width):
            write(options, part)
    for found in (*attended(tokens, options), *small_model(options)):
        write(options, found)


def tried(make: Callable[[int, int], Iterator[Part]], tokens: int, width: int) -> Iterator[dict[str, Any]]:
    """What each part took, until one fails."""
    try:
        for part in make(tokens, width):
            seconds = timed(part.work)
            yield {"part": part.name, "seconds": seconds, part.unit: part.amount / seconds / 1e12}
    except (RuntimeError, NotImplementedError) as error:
        yield {"part": f"{make.__name__} and what follows it", "error": str(error).strip().splitlines()[0]}


def timed(work: Work) -> float:
    """Median of ROUNDS, after those that warm up. Events of the device tell the time where there is one."""
    for _ in range(min(ROUNDS, 3)):
        work()
    return median(once(work) for _ in range(ROUNDS))


def once(work: Work) -> float:
    if not ON_GPU:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def random(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def backward_of(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> Work:
    upstream = tuple(torch.randn_like(one) for one in outputs)
    return lambda: torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)


def multiplied(tokens: int, width: int) -> Iterator[Part]:
    x, weight, upstream = random(tokens, width), random(4 * width, width), random(tokens, 4 * width)
    total, operations = torch.zeros(4 * width, width, device=DEVICE), 8.0 * tokens * width * width
    yield Part("product", lambda: x @ weight.T, operations, "tflops")
    yield Part("gradient of a weight, in 16 bits", lambda: upstream.T @ x, operations, "tflops")
    add = products.add_product_
    yield Part("gradient of a weight, to its float32 sum", lambda: add(total, upstream.T, x), operations, "tflops")
    layers = [
        torch.nn.Linear(width, side, bias=False, device=DEVICE, dtype=DTYPE) for side in (width, *[width // 4] * 2)
    ]
    given, operations = x.clone().requires_grad_(), 6.0 * tokens * width * width  # 2 products, of 1.5 such weights
    alone, together = tuple(layer(given) for layer in layers), one_input.project(given, layers)
    inputs = (given, *(layer.weight for layer in layers))
    yield Part("query, key and value, backward, one by one", backward_of(alone, inputs), operations, "tflops")
    yield Part("query, key and value, backward, together", backward_of(together, inputs), operations, "tflops")


def normed(tokens: int, width: int) -> Iterator[Part]:
    """A residual sum and its norm, in two passes and in one. Bytes are those of the one."""
    x, delta, weight = (random(*shape).requires_grad_() for shape in ((tokens, width), (tokens, width), (width,)))
    moved = 2.0 * 4 * tokens * width

    def two() -> tuple[Tensor, Tensor]:
        total = x + delta
        return total, functions.rms_norm(total, weight, 1e-5, 0.0)

    def one() -> tuple[Tensor, Tensor]:
        return functions.add_norm(x, delta, weight, 1e-5, 0.0)

    for name, way in (("two passes", two), ("one pass", one)):
        yield Part(f"sum and norm, {name}", way, moved, "terabytes")
        yield Part(f"sum and norm, {name}, backward", backward_of(way(), (x, delta, weight)), moved, "terabytes")


def gated(tokens: int, width: int) -> Iterator[Part]:
    gate, up = (random(tokens, 2 * width).requires_grad_() for _ in range(2))
    moved, heads = 2.0 * 2 * tokens * width, random(1, tokens, width // 16, 16).requires_grad_()
    angles = random(1, tokens, 16), random(1, tokens, 16)
    yield Part("gated unit", lambda: functions.swiglu(gate, up), 3 * moved, "terabytes")
    yield Part("gated unit, backward", backward_of((functions.swiglu(gate, up),), (gate, up)), 5 * moved, "terabytes")
    yield Part("rotary positions", lambda: functions.rotate(heads, *angles), moved, "terabytes")


def lost(tokens: int, width: int) -> Iterator[Part]:
    rows, vocabulary = tokens // 8, 32 * width
    targets, weights = torch.randint(0, vocabulary, (rows,), device=DEVICE), torch.ones(rows, device=DEVICE)
    if not ON_GPU:
        logits = random(rows, vocabulary)
        yield Part("loss", lambda: functions.cross_entropy_(logits, targets, weights, 1.0), 0, "terabytes")
        return
    exact = random(rows, vocabulary, dtype=torch.float32)
    moved = (4.0 + 4 + 2) * rows * vocabulary
    yield Part("loss", lambda: functions.gpu_cross_entropy(exact, targets, weights, 1.0, DTYPE), moved, "terabytes")


def moved(tokens: int, width: int) -> Iterator[Part]:
    """The step of a billion weights, or of a few where `width` is small."""
    for state, each in (("split", 2 + 2 + 8 + 4), ("8bit", 2 + 2 + 2 + 4)):
        weight = torch.nn.Parameter(random(64 * width, width))
        extra = torch.zeros_like(weight, dtype=torch.int16)
        optimizer = CompactAdamW([{"params": [weight]}], {weight: extra}, is_8bit=state == "8bit", lr=1e-5,
                                 betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)  # fmt: skip
        weight.grad_dtype = torch.float32
        weight.grad = random(*weight.shape, dtype=torch.float32)
        # Read and written, but for the gradient.
        yield Part(f"AdamW, {state}", optimizer.step, (2.0 * each - 4) * weight.numel(), "terabytes")


def attended(tokens: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Forward and backward of 32 over 8 heads of 128, of one document and of many."""
    heads = Heads(4, 2, 16) if options.tiny else Heads(32, 8, 128)
    for lengths in ([tokens // 4] * 4, [tokens // 64 + 3 * number for number in range(40)]):
        for trial in try_each(FUNCTIONS, heads, lengths, DEVICE, DTYPE):
            found = {"seconds": trial.seconds} if trial.seconds is not None else {"error": trial.problem}
            yield {"part": f"{trial.name}, {len(lengths)} documents", **found}


def small_model(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Forward and backward of one pack, step for step and as a graph, whose numbers are compared."""
    register_attention()
    model = random_model(TINY if options.tiny else LLAMA_135M).to(DTYPE)
    model.set_attn_implementation(VARLEN if ON_GPU else DOCUMENTS)
    note = run_on_kernels(model)
    length = 64 if options.tiny else 1024
    packs = [to_device(pack_of(8, length, model.config.vocab_size, seed), DEVICE) for seed in (0, 1)]
    weights = list(Masters(model.train().named_parameters()).weights.values())

    def learn(pack: PackTensors) -> Tensor:
        for weight in weights:
            weight.grad.zero_()
        total = CrossEntropy()(model, pack).total
        total.backward()
        return total.detach()

    for weight in weights:  # which stay where they are, as a graph needs it; the engine makes them anew in each step
        weight.grad = torch.zeros_like(weight)
    eager = timed(lambda: learn(packs[0]))
    yield {"part": "small model, eager", "seconds": eager, "note": note}
    if not ON_GPU:
        yield {"part": "small model, recorded", "error": "nothing is recorded without a GPU"}
        return
    try:
        yield {"part": "small model, recorded", **replayed(learn, packs, weights)}
    except RuntimeError as error:
        yield {"part": "small model, recorded", "error": str(error).strip().splitlines()[0]}


def replayed(learn: Callable[[PackTensors], Tensor], packs: list[PackTensors], weights: list[Any]) -> dict[str, Any]:
    """Recorded on the first pack and replayed on the second, which must learn what it learns step for step."""
    place, other = packs
    learn(other)
    before = [weight.grad.clone() for weight in weights]
    wanted = learn(other).clone()
    gradients = [weight.grad.clone() for weight in weights]
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            learn(place)
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = learn(place)
    for name in ("ids", "positions", "weights", "cu_seqlens", "rows"):
        getattr(place, name).copy_(getattr(other, name))
    graph.replay()
    loss = abs(float(total) - float(wanted)) / float(wanted)
    return {"seconds": timed(graph.replay), "loss_difference": loss, **furthest(gradients, before, weights)}


def furthest(gradients: list[Tensor], before: list[Tensor], weights: list[Any]) -> dict[str, float]:
    """How far the gradient of some weight lies from that of the replay, and from that of another eager pass."""

    def difference(other: Tensor, gradient: Tensor) -> float:
        return float((other.float() - gradient.float()).norm() / gradient.float().norm().clamp_min(1e-12))

    replayed = max(difference(weight.grad, gradient) for weight, gradient in zip(weights, gradients, strict=True))
    again = max(map(difference, before, gradients))
    return {"gradient_difference": replayed, "difference_of_eager_gradients": again}


def pack_of(documents: int, length: int, vocabulary: int, seed: int) -> Pack:
    """Documents of random tokens, all of them trained but the first."""
    import numpy as np

    draw = np.random.default_rng(seed)
    weights = np.ones((documents, length), dtype=np.float32)
    weights[:, 0] = 0
    return Pack(
        ids=draw.integers(3, vocabulary, documents * length).astype(np.int32),
        positions=np.tile(np.arange(length, dtype=np.int32), documents),
        weights=weights.ravel(),
        boundaries=np.arange(documents + 1, dtype=np.int32) * length,
        samples=np.arange(documents, dtype=np.int64),
    )


def write(options: argparse.Namespace, found: dict[str, Any]) -> None:
    device = torch.cuda.get_device_name() if ON_GPU else "cpu"
    with Path(options.output).open("a", encoding="utf-8") as file:
        file.write(json.dumps({**found, "device": device, "torch": torch.__version__}) + "\n")
    rates = [f"{found[unit]:,.3g} {unit} a second" for unit in ("tflops", "terabytes") if unit in found]
    rest = [f"{name} {found[name]:.1e}" for name in found if "difference" in name]
    took = f"{found['seconds'] * 1e3:9.3f} ms" if "seconds" in found else found["error"]
    print(f"{found['part']:<44} {'  '.join([took, *rates, *rest])}", flush=True)


def read_options() -> argparse.Namespace:
    reader = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    reader.add_argument("--tiny", action="store_true", help="small sizes on whatever device there is")
    reader.add_argument("--output", default=str(HERE / "gpu_parts.jsonl"), help="file to which a line each is appended")
    return reader.parse_args()


if __name__ == "__main__":
    main()
