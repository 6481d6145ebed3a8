"""What a step has to compute, however it is computed, and how fast this machine multiplies matrices: the meter's scale.

Needed operations count each token of a sample once, in the head each trained token, in attention each pair of tokens
that sees each other. Padding, recomputation and logits of untrained tokens are nobody's need and are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from training_hub.backends.torch_engine.fused import products
from training_hub.backends.torch_engine.loading.quantization import nums_of
from training_hub.types import Pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# A product of each number in a matrix with one of the input is 2 operations; so is its part in the gradient of the
# input, and in that of the matrix where it is trained.
FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = 2, 2, 2

# Sides of the square matrices that are timed: doubled until one product takes a moment, or memory would be felt.
SMALLEST_SIDE = 512
LARGEST_SIDE = {"cpu": 2048, "cuda": 8192}
A_MOMENT = 0.008
MEASURING_SECONDS = 0.12


@dataclass(frozen=True)
class Work:
    """Floating-point operations of forward and backward.

    per_pair: for each layer with attention, operations for a token and one it sees, and the layer's window (None: all).
    """

    per_token: float
    per_trained_token: float
    per_pair: tuple[tuple[float, int | None], ...]

    def operations(self, packs: Iterable[Pack]) -> float:
        """Those that these packs need."""
        total = 0.0
        for pack in packs:
            lengths = (pack.boundaries[1:] - pack.boundaries[:-1]).tolist()
            total += self.of_lengths(lengths, int((pack.weights != 0).sum()))
        return total

    def of_lengths(self, lengths: Sequence[int], trained: int) -> float:
        """Those that samples of these lengths need, `trained` tokens of which are trained."""
        pairs = {window: sum(pairs_seen(length, window) for length in lengths) for _, window in set(self.per_pair)}
        in_attention = sum(each * pairs[window] for each, window in self.per_pair)
        return self.per_token * sum(lengths) + self.per_trained_token * trained + in_attention


def no_operations(pack: Pack) -> float:
    """Where there is no other model."""
    return 0.0


@dataclass(frozen=True)
class Scale:
    """A run's work, and `peak`: operations per second that a matrix product reached on its device at the start.

    beside: operations that a pack needs of another model, a teacher.
    """

    work: Work
    peak: float
    beside: Callable[[Pack], float] = no_operations

    def fraction(self, packs: Iterable[Pack], seconds: float) -> float:
        """Needed operations of `packs` as a share of what the device could have multiplied in `seconds`."""
        packs = tuple(packs)
        return (self.work.operations(packs) + sum(map(self.beside, packs))) / (seconds * self.peak)


def work_of(model: PreTrainedModel, *, learns: bool = True) -> Work:
    """The work of training `model`, or with learns=False of asking it, from its shapes; it may lie on the meta device.

    Each number in a matrix costs 6 operations per token (4 where it is frozen, 2 in a model that is only asked), in the
    head only per trained token. Of experts, those count that a token is sent to. A table of embeddings is looked up,
    not multiplied.
    """
    head = model.get_output_embeddings()
    apart = {id(layer.weight) for layer in model.modules() if layer is head or isinstance(layer, nn.Embedding)}
    config = model.config.get_text_config()
    share = _share_of_experts(config)
    nums = nums_of(model)
    body = sum(
        nums[name] * _operations(parameter.requires_grad, learns) * (share if ".experts." in name else 1.0)
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and id(parameter) not in apart
    )
    in_head = head.weight.numel() * _operations(head.weight.requires_grad, learns) if head is not None else 0
    layers = ((each if learns else each / 3, window) for each, window in _attention_layers(config))
    return Work(float(body), float(in_head), tuple(layers))


def _operations(is_trained: bool, learns: bool) -> int:
    return FORWARD + (INPUT_GRADIENT + (WEIGHT_GRADIENT if is_trained else 0) if learns else 0)


def _share_of_experts(config: Any) -> float:
    chosen = getattr(config, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    return chosen / experts if chosen and experts else 1.0


def _attention_layers(config: Any) -> Iterable[tuple[float, int | None]]:
    heads = getattr(config, "num_attention_heads", 0) or 0
    if not heads:
        return
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    rotary = getattr(config, "qk_rope_head_dim", None)  # DeepSeek: queries of two parts, values of another width
    queries = rotary + config.qk_nope_head_dim if rotary else width
    values = getattr(config, "v_head_dim", None) or width
    # Scores and their use, forward; each has two products of the same size in backward.
    each = 3.0 * FORWARD * heads * (queries + values)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        kinds = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    for kind in kinds:
        if kind.endswith("attention") and not kind.startswith("linear"):
            yield each, window if kind.startswith("sliding") else None


def pairs_seen(length: int, window: int | None = None) -> int:
    """Pairs (token, token it sees) in a sample of `length`: itself and all before, `window` in all."""
    full = min(length, window or length)
    return full * (full + 1) // 2 + (length - full) * full


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a matrix product, in about 0.2 s: the best of several, of the best size tried, in the
    best of the ways that a step may take.

    Draws from a generator of its own, so that the run's random numbers stay as they are.
    """
    largest, side, best = LARGEST_SIDE.get(device.type, 2048), SMALLEST_SIDE, 0.0
    generator = torch.Generator(device).manual_seed(0)
    matrices = _random(side, device, dtype, generator)
    ways = (torch.mm, products.multiply) if device.type == "cpu" else (torch.mm,)
    for multiply in ways:
        _seconds(multiply, device, *matrices)  # loads the library
    began = time.perf_counter()
    while True:
        taken = min(_seconds(multiply, device, *matrices) for multiply in ways)
        best = max(best, 2 * side**3 / taken)
        if time.perf_counter() - began > MEASURING_SECONDS:
            return best
        if taken < A_MOMENT and side < largest:
            side *= 2
            matrices = _random(side, device, dtype, generator)


def _random(side: int, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> list[torch.Tensor]:
    # Random numbers: a GPU draws less power on zeros, and is faster than it will be.
    return [torch.rand(side, side, device=device, generator=generator).sub_(0.5).to(dtype) for _ in range(2)]


def _seconds(multiply: Multiply, device: torch.device, left: torch.Tensor, right: torch.Tensor) -> float:
    _wait(device)
    began = time.perf_counter()
    multiply(left, right)
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
