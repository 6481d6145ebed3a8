"""What one device holds and sends in a step of a divided model: formulas, each with its source.

    L layers, H width of a hidden row, A and K widths of all queries and all keys, I inner width of the MLP, V entries
    of the vocabulary; T tokens that go through the devices of one data rank at once; t, c, p, e degrees of tensor,
    context, pipeline and expert parallelism, s shards, r copies.

Nothing here is fitted to measurements: `docs/scaling.md` says how far published runs lie from it. Bytes, unless named
otherwise; activations and weights in forward are bfloat16, what the optimizer moves is float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from training_hub.recipe.parallelism import Degrees
from training_hub.scaling.models import Shape

LOW, EXACT = 2, 4
"""Bytes of a bfloat16 and of a float32 number."""

DIVIDED_STATE = 4 * EXACT
"""Bytes of a weight in FSDP2: itself, its gradient and two moments, all float32 and divided (Rajbhandari et al. 2020,
arXiv:1910.02054, section 5.3, with float32 where they count 2 + 2 + 12)."""

WHOLE_STATE = LOW + 4 * EXACT
"""Bytes of a weight where it is not divided: the bfloat16 one of forward, master, gradient and two moments."""

CHUNK_LOGITS = 2**28
"""Bytes of logits, their exponentials and gradients that are there at once where the head works in chunks."""

WHOLE_LOGITS = 3 * EXACT
"""Bytes of a logit where all are there at once, at the beginning of backward: log-probability and two gradients."""


@dataclass(frozen=True)
class Work:
    """What a step learns from, and how. rows: samples of `length` tokens that go through a data rank at once.

    checkpointing: what layers forget: none, selective (all but the results of products and attention), full.
    products_kept: of selective checkpointing, the share of products' results that is kept (torchtitan: every second).
    shards_context: whether devices of a context group share out weights, too (torchtitan's do). is_in_eight_bits:
    whether layers multiply in 8-bit floating point.
    """

    samples: int
    length: int
    rows: int = 1
    checkpointing: str = "none"
    has_whole_logits: bool = False
    products_kept: float = 1.0
    shards_context: bool = False
    is_in_eight_bits: bool = False

    def shards(self, degrees: Degrees) -> int:
        """Devices that share out dense weights."""
        return degrees.dp_shard * (degrees.cp if self.shards_context else 1)

    def rows_of(self, degrees: Degrees) -> int:
        """Samples at once: `rows`, or all that a data rank has in a step where these are fewer."""
        return max(1, min(self.rows, self.samples // degrees.data))

    def passes(self, degrees: Degrees) -> int:
        """Times that forward and backward run in a step: micro-batches."""
        return math.ceil(self.samples / (degrees.data * self.rows_of(degrees)))


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest device, by what takes them."""

    state: float
    gathered: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.state + self.gathered + self.activations + self.logits


def memory(shape: Shape, degrees: Degrees, work: Work) -> Memory:
    """What the fullest device holds: of a pipeline the first or the last stage."""
    layers = math.ceil(shape.layers / degrees.pp)
    dense = layers * (shape.layer_parameters - shape.expert_parameters) + _tables(shape, degrees) + shape.width
    experts = layers * shape.expert_parameters
    is_divided = work.shards(degrees) > 1
    each = DIVIDED_STATE if is_divided else WHOLE_STATE
    state = each * (dense / (degrees.tp * work.shards(degrees)) + experts / _sharing_experts(degrees))
    return Memory(
        state=state,
        gathered=_gathered(shape, degrees) if is_divided else 0,
        activations=_activations(shape, degrees, work, layers),
        logits=_logits(shape, degrees, work),
    )


def _sharing_experts(degrees: Degrees) -> int:
    """Devices that share out the experts of a layer: all that are no stages of a pipeline or copies, where weights are
    in shards; else those that they are dealt out to."""
    if degrees.ep == 1:
        return degrees.tp * degrees.dp_shard
    return degrees.ep * (degrees.efsdp if degrees.dp_shard > 1 else 1)


def _tables(shape: Shape, degrees: Degrees) -> int:
    """Weights of embeddings and head on one stage: a pipeline has the one on its first, the other on its last."""
    is_apart = degrees.pp > 1 and not shape.is_tied
    return shape.table_parameters // 2 if is_apart else shape.table_parameters


def _gathered(shape: Shape, degrees: Degrees) -> float:
    """What FSDP has whole at one moment: two layers in bfloat16 (one computes, the next arrives), one matrix of the
    tables, and one layer's gradient in float32 on its way to be summed (Zhao et al. 2023, arXiv:2304.11277, section
    3.3)."""
    layer = (shape.layer_parameters - shape.expert_parameters) / degrees.tp + shape.expert_parameters / degrees.ep
    table = shape.vocabulary * shape.width / degrees.tp
    return LOW * (2 * layer + table) + EXACT * max(layer, table)


def kept_numbers(shape: Shape, checkpointing: str, products_kept: float = 1.0) -> float:
    """Numbers that a layer keeps of each token for backward; counted operation by operation as Korthikanti et al. 2022
    (arXiv:2205.05198, section 4.1) do for a GPT, here for normalised gated MLPs and attention that keeps no scores."""
    mixture = bool(shape.experts)
    inner, times = (shape.expert_inner, shape.chosen) if mixture else (shape.inner, 1)
    queries, keys, width = shape.query_width, shape.key_width, shape.width
    if checkpointing == "full":
        return width  # its input
    if checkpointing == "selective":
        products = queries + 2 * keys + width + times * (2 * inner + width)
        return width + queries + products_kept * products
    # Input, two normalised rows and the sum between; queries, keys, values and what attention gives; gate, up, product.
    # A mixture has a row of its own for each of the chosen experts, before and after.
    dispatched = 2 * times * width if mixture else 0
    return 4 * width + 2 * queries + 2 * keys + 3 * times * inner + dispatched


def _activations(shape: Shape, degrees: Degrees, work: Work, layers: int) -> float:
    """Of all layers of the stage, and what is made again of one, with its gradients. Sequence parallelism divides every
    row by t (Korthikanti et al. 2022, section 4.2); the first stage of 1F1B holds p passes (Narayanan et al. 2021,
    arXiv:2104.04473, section 2.2)."""
    tokens = work.rows_of(degrees) * work.length / (degrees.cp * degrees.tp)
    kept = kept_numbers(shape, work.checkpointing, work.products_kept)
    again = 0 if work.checkpointing == "none" else 2 * (kept_numbers(shape, "none") - kept)
    under_way = min(degrees.pp, work.passes(degrees))
    return LOW * tokens * (layers * kept * under_way + again)


def _logits(shape: Shape, degrees: Degrees, work: Work) -> float:
    if not work.has_whole_logits:
        return CHUNK_LOGITS
    return WHOLE_LOGITS * work.rows_of(degrees) * work.length / degrees.cp * shape.vocabulary / degrees.tp


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends in a step, by why: those of shards and copies may travel while it computes."""

    shards: float = 0
    copies: float = 0
    tensor: float = 0
    context: float = 0
    pipeline: float = 0
    expert: float = 0

    @property
    def total(self) -> float:
        return self.shards + self.copies + self.tensor + self.context + self.pipeline + self.expert


def traffic(shape: Shape, degrees: Degrees, work: Work) -> Traffic:
    """What a device sends in one step. A ring of n sends (n - 1) / n of what is gathered or scattered, and twice that
    for a sum that all get (Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002)."""
    passes, layers = work.passes(degrees), shape.layers / degrees.pp
    tokens = work.rows_of(degrees) * work.length / degrees.cp
    row = LOW * shape.width * tokens
    dense = (shape.parameters - shape.layers * shape.expert_parameters) / (degrees.tp * degrees.pp)
    experts = shape.layers * shape.expert_parameters / degrees.pp
    spread = max(1, _sharing_experts(degrees) // degrees.ep)  # devices that share out the same experts
    held = dense / work.shards(degrees) + experts / _sharing_experts(degrees)
    return Traffic(
        # FSDP gathers before forward and before backward of each pass, and scatters float32 gradients (Rajbhandari et
        # al. 2020, section 7.2).
        shards=(2 * LOW + EXACT)
        * passes
        * (dense * _ring(work.shards(degrees)) + experts / degrees.ep * _ring(spread)),
        # Gradients of what is held, once a step.
        copies=2 * EXACT * held * _ring(degrees.dp_replicate * (1 if work.shards_context else degrees.cp)),
        # Two gathers and two scatters of a layer's rows forward, as many backward, and the gathered inputs once more
        # (Korthikanti et al. 2022, section 4.2.2).
        tensor=10 * layers * row * _ring(degrees.tp) * passes,
        # Keys and values of the others forward and once more backward, and their gradients back in float32.
        context=layers * 2 * shape.key_width / degrees.tp * tokens * (degrees.cp - 1) * (2 * LOW + EXACT) * passes,
        # Rows to the next stage, their gradients to the one before.
        pipeline=2 * row / degrees.tp * passes if degrees.pp > 1 else 0,
        # Each token's rows to its experts and back, forward and backward (Lepikhin et al. 2020, arXiv:2006.16668).
        expert=4 * layers * shape.chosen * row / degrees.tp * _ring(degrees.ep) * passes,
    )


def _ring(size: int) -> float:
    return (size - 1) / size


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one device in a step: products with the weights of layers, with the head's, and
    those of attention, which have no weights."""

    layers: float
    head: float
    attention: float

    @property
    def total(self) -> float:
        return self.layers + self.head + self.attention


def operations(shape: Shape, degrees: Degrees, work: Work) -> Operations:
    """6 for each weight and token, of which full checkpointing repeats a third (Kaplan et al. 2020, arXiv:2001.08361,
    section 2.1), and causal attention: 2 products forward and 4 backward."""
    again = {"none": 0.0, "selective": (1 - work.products_kept) / 3, "full": 1 / 3}[work.checkpointing]
    tokens = work.samples * work.length / degrees.world_size * (1 + again)
    head = shape.vocabulary * shape.width
    return Operations(
        layers=tokens * 6 * (shape.active_parameters - head),
        head=tokens * 6 * head,
        attention=tokens * 6 * shape.layers * shape.query_width * work.length,  # 12 L A S, halved by the mask
    )


def bubble(degrees: Degrees, work: Work) -> float:
    """The share of a pipeline's time in which a device waits: (p - 1) / (m + p - 1) with m passes (Narayanan et al.
    2021, section 2.2.1, as a share of the whole)."""
    return (degrees.pp - 1) / (work.passes(degrees) + degrees.pp - 1)
