"""How much memory a run will take, from the shapes of its model: no weight is loaded and nothing is computed.

What grows with the weights is counted; what forward keeps for backward is found by running the model on shapes
(`kept.py`). What comes and goes is not all there at once: the total is what there is at the fullest of the moments of a
step (`moments.py`). `benchmarks/memory.py` holds it against what processes really take.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from training_hub.backends.torch_engine.adaptations.holdings import NOTHING, Beginning, Holdings
from training_hub.backends.torch_engine.checkpointing import NONE
from training_hub.backends.torch_engine.fused import panels
from training_hub.backends.torch_engine.fused.functions import TYPES, problem_on
from training_hub.backends.torch_engine.layouts.experts import experts_of
from training_hub.backends.torch_engine.layouts.fully_sharded import blocks_of
from training_hub.backends.torch_engine.layouts.share import (
    EVERYTHING,
    Share,
    Sizes,
    cut_down,
    divided_parts,
    held,
    mask_numbers,
    part_of,
)
from training_hub.backends.torch_engine.loading.quantization import frozen_weights, low_layers, plain_like
from training_hub.backends.torch_engine.objectives.head import chunk_rows, find_head
from training_hub.backends.torch_engine.optim import LOW_PRECISION
from training_hub.backends.torch_engine.parallel import BUCKET_BYTES
from training_hub.backends.torch_engine.planning.kept import Kept, Ways, kept_bytes
from training_hub.backends.torch_engine.planning.moments import Flow, Gathering
from training_hub.backends.torch_engine.planning.of_optimizers import (
    kept_in_slices,
    optimizer_bytes,
    owned_bytes,
    tables_in,
)
from training_hub.backends.torch_engine.processor import LARGEST_KEPT_BLOCK
from training_hub.backends.torch_engine.teacher.load import TeacherLoad
from training_hub.recipe.sections import Optimizer
from training_hub.types import Pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIB = 2**30

LIBRARIES = {"cpu": int(0.45 * 2**30)}
"""Bytes that a process holds with Python, torch, transformers and a tokenizer loaded, and of their files once they have
computed; a GPU has none of them."""

PRODUCTS_KEPT = {"cpu": int(0.33 * 2**30)}
"""Bytes that oneDNN keeps for 16-bit products of up to 1,024 sizes: experts get another number of tokens each time."""

PRODUCT_KEPT = {"cpu": int(0.53 * 2**20)}
"""Bytes that it keeps for products of one size, each: 543 MiB for 1,024 sizes, and no more for more."""

MOST_SIZES, SIZES_BEFORE, SIZES_OF_PACKS, SIZES_OF_LOOKS = 1024, 80, 20, 40
"""Sizes whose products it keeps; of a Llama with an adapter beside every linear layer, or without kernels of ours,
those met before the first step and those of each number of tokens in a pack; and all where these multiply: 39, of the
few tokens on which a model is looked at before and of the squares that the processor's peak is measured on.
ONEDNN_VERBOSE=2 tells of each."""

GAPS = {"cpu": 0.155}
"""What an allocator loses between blocks, as a share of those that come and go in a step. Measured with glibc 2.36
(benchmarks/memory.py); a GPU's allocator counts what tensors take."""

HOLES = {"cpu": (27, 5, 50, 3)}
"""The same of what is gathered: how many times the largest block of weights and what stands around the blocks; where
tokens lie in slices, all of them at the width of the model; and where they lie on several processes, what these
exchange; as far as these are blocks of memory that glibc keeps. Before 2.38 it does not fill the hole of an aligned
block with another of its size, so that what comes and goes leaves holes wherever smaller blocks stay. Measured on 6 to
12 layers; it differs by a tenth from run to run, with slices of tokens by more."""

COPIES = {"cpu": 2}
"""How often what processes send lies in memory: gloo gathers into a copy of its own, and adds up in one."""

ALWAYS = ("libraries", "products", "weights", "masters", "optimizer", "teacher")
COMING_AND_GOING = ("gradients", "activations", "logits")

Estimate = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """What a process of a pipeline does: how many stages it has, packs whose activations are there at once, packs that
    it gets in a step, and whether its layers begin with tokens and end with the loss. late: packs whose activations are
    there where most gradients of activations wait for those of weights, and of how many packs these are."""

    count: int = 1
    under_way: float = 1.0
    packs: float = 1.0
    is_first: bool = True
    is_last: bool = True
    late: tuple[float, float] = (0.0, 0.0)

    @property
    def rows(self) -> float:
        """Packs' rows that lie between stages: torch's stages have a place for what each pack brings, forward and back,
        and keep what they have handed on till its gradient comes."""
        arriving = 2 * self.count - self.is_first - self.is_last
        return self.packs * arriving + self.under_way * (self.count - self.is_last)


def estimate(
    model: PreTrainedModel,
    optimizer: Optimizer,
    dtype: torch.dtype,
    device: torch.device,
    largest: Pack,
    *,
    accumulates: bool = True,
    holdings: Holdings = NOTHING,
    checkpointing: str = NONE,
    teacher: TeacherLoad | None = None,
    share: Share = EVERYTHING,
    stage: Stage = Stage(),
    is_staged: bool = False,
    is_compiled: bool = False,
    is_read_whole: bool = False,
    among: int = 0,
    num_pack_sizes: int = 1,
) -> Estimate:
    """GiB by what takes them, for a step whose largest pack is `largest`; `total` is the most there is at once.

    holdings: what the adaptation holds beside the model; it is counted among weights, gradients and optimizer.
    accumulates: steps have several packs, so that the gradients of the first are there in the forward pass of the next.
    checkpointing: how layers forget what they made; one layer's activations are there again in its backward pass.
    teacher: what a second model takes beside. share: what this process has of a model that is divided; stage: of one in
    stages, of which `model` has this process's layers. is_staged: checkpoints are copied into the host's memory first;
    `staged` is what that takes there, which beside a GPU is not in `total`. is_compiled: blocks are compiled, and keep
    less than is counted. is_read_whole: the model is whole in each process before it is divided. among: how many
    processes make what trains of weights that are read one by one; 0: each makes it of weights that are there.
    num_pack_sizes: how many numbers of tokens its packs have.
    start, where matrices are decomposed before the first step, is what there is then.
    activations is None, and total without it, where the model cannot be run without contents; `note` then says why.
    """
    blank = blank_like(model)
    spared = holdings.spared(dtype.itemsize)
    read = sum(p.numel() for p in blank.parameters()) * dtype.itemsize - spared if is_read_whole else 0
    has_experts, owned = any(experts_of(blank)), owned_bytes(blank, optimizer, holdings, dtype, share)
    holdings = _dealt_out(holdings, share)
    claimed = [p for name, p in blank.named_parameters() if name in holdings.claimed]
    numbers = sum(p.numel() for p in claimed)
    low = frozen_weights(blank) if spared else []
    whole = sum(one.numel() for one in low)
    apart = cut_down(blank, share)
    spared *= sum(one.numel() for one in low) / whole if whole else 1.0
    part = part_of(largest, share)
    trained = [p for n, p in blank.named_parameters() if p.requires_grad and n not in holdings.claimed]
    own = torch.empty(holdings.trained, device="meta")
    is_low = dtype in LOW_PRECISION
    exact = 4 if is_low else dtype.itemsize
    is_swapped = not is_compiled and dtype in TYPES and problem_on(device) is None
    ways = Ways(device.type != "cuda", is_swapped and device.type == "cpu", is_swapped, stage.is_first, stage.is_last)
    counted = int((part.weights != 0).sum()) if stage.is_last else 0
    copies = holdings.copied * holdings.copied_bytes * _low_share(claimed, numbers, share, apart) if is_low else 0
    parts: Estimate = {
        "libraries": LIBRARIES.get(device.type, 0),
        "weights": sum(p.numel() for p in blank.parameters()) * dtype.itemsize
        - spared
        + (holdings.trained + holdings.fixed) * exact
        + copies,
        "masters": sum(p.numel() for p in trained) * (4 if optimizer.state == "full" else 2) if is_low else 0,
        "gradients": (sum(p.numel() for p in trained) + (holdings.gradients if accumulates else holdings.complete))
        * exact,
        "optimizer": optimizer_bytes([*trained, own], optimizer, exact, tables_in(blank)),
        "activations": None,
        # The kernel of the loss wants whole rows of logits.
        "logits": logit_bytes(
            blank,
            dtype,
            device,
            counted,
            on_kernels=ways.on_kernels and (share.heads == 1 or share.gathers_head),
            among=share.heads if share.gathers_head else 1,
        ),
    }
    if is_low and device.type in PRODUCT_KEPT:
        is_ours = ways.on_kernels and panels.is_trusted(dtype)
        parts["products"] = _products_kept(blank, num_pack_sizes, is_ours=is_ours, has_experts=has_experts)
    if is_staged:
        parts["staged"] = _staged_bytes(parts, sum(p.numel() for p in trained), own.numel(), holdings, exact, share)
    if share.slices > 1:
        parts = divided_parts(parts, blank, share, dtype, apart, spared)
        parts["weights"] += holdings.scales * (1 - 1 / share.slices)
        parts["masters"] = sum(p.numel() for p in trained if held(p, share, apart) is p) * 4 if is_low else 0
        parts["optimizer"] = kept_in_slices(trained, own, blank, optimizer, share, exact, apart)
    head = getattr(blank.get_output_embeddings(), "weight", None)  # which another stage may have
    if share.gathers_head and head is not None:
        parts["gathered"] = parts.get("gathered", 0) + head.numel() * share.heads * dtype.itemsize
    if teacher is not None:
        parts["teacher"] = teacher.beside
        parts["logits"] += teacher.chunk
    kept, note = _kept(blank.to(dtype), largest, ways, checkpointing, share)
    row = len(part.ids) * blank.config.get_text_config().hidden_size * dtype.itemsize
    passing = _passing(blank, largest, row, device, share, forgets=checkpointing != NONE)
    flow = _flow(parts, kept, owned, blank, row, passing, dtype, device, share, stage, teacher, accumulates=accumulates)
    parts["activations"] = None if note else flow.kept
    parts["gaps"] = GAPS.get(device.type, 0.0) * sum(parts[name] or 0 for name in COMING_AND_GOING)
    gathered: tuple[float, ...] = (0, 0, row * share.is_sliced, passing * (share.tokens > 1))
    if share.slices == 1:
        moments = {name: value + parts.get("gathered", 0) for name, value in flow.moments().items()}
    else:
        gathering, of_blocks = _gathering(blank, apart, dtype, device, share, spared)
        moments = gathering.moments(flow, of_blocks)
        parts["buffers"] = gathering.buffers
        gathered = (gathering.block, gathering.around, *gathered[2:])
    holes = zip(HOLES.get(device.type, (0, 0, 0, 0)), gathered, strict=True)
    lost = sum(times * size for times, size in holes if size <= LARGEST_KEPT_BLOCK)
    parts["gaps"] += max(0, lost - parts.get("staged", 0))  # copies fill some
    most = max(moments.values()) + parts["gaps"] + sum(parts.get(name, 0) for name in ALWAYS)
    most += parts.get("staged", 0) if device.type == "cpu" else 0
    start = max(read, parts["weights"] - copies)
    if holdings.beginning.scratch:
        start = parts["start"] = _start(holdings.beginning, start, dtype, device, among)
    before = max(start, teacher.before if teacher is not None else 0)
    gib = {name: value / GIB if value is not None else None for name, value in parts.items()}
    return {**gib, "total": max(most, parts["libraries"] + before) / GIB, "note": note}


def _start(beginning: Beginning, weights: float, dtype: torch.dtype, device: torch.device, among: int) -> float:
    """What there is before the first step while the matrix is decomposed that takes most, which is read for that alone
    by one of several processes, and widened where weights are in 16 bits; or once weights are there, beside those that
    wait. weights: bytes of these."""
    making = beginning.scratch + 4 * beginning.whole * (among > 0 or dtype in LOW_PRECISION)
    if not (among and beginning.waiting):
        return weights + making
    waiting = beginning.waiting * dtype.itemsize / among * (device.type == "cpu")
    return waiting + max(weights, making)


def _products_kept(blank: PreTrainedModel, num_pack_sizes: int, *, is_ours: bool, has_experts: bool) -> int:
    """What a library keeps on a CPU for 16-bit products of the sizes that it has met. is_ours: those of whole weights
    run on kernels of ours, that keep nothing, but for a few rows; those of experts and adapters do not."""
    of_experts = PRODUCTS_KEPT["cpu"] if has_experts else 0
    is_adapted = any(hasattr(module, "lora_A") for module in blank.modules())
    sizes = SIZES_OF_LOOKS if is_ours and not is_adapted else SIZES_BEFORE + SIZES_OF_PACKS * num_pack_sizes
    return max(of_experts, min(MOST_SIZES, sizes) * PRODUCT_KEPT["cpu"])


def _low_share(weights: Sequence[nn.Parameter], numbers: int, share: Share, apart: Collection[nn.Parameter]) -> float:
    """What this process keeps in 16 bits, as a share of so many numbers, of weights that are cut down: slices are in
    float32."""
    return sum(one.numel() for one in weights if held(one, share, apart) is one) / max(numbers, 1)


def _kept(blank: PreTrainedModel, largest: Pack, ways: Ways, checkpointing: str, share: Share) -> tuple[Kept, str]:
    """What forward keeps; or nothing, and why that is not known."""
    try:
        return kept_bytes(blank, largest, ways, checkpointing=checkpointing, share=share), ""
    except (RuntimeError, ValueError, TypeError) as error:
        lines = str(error).strip().splitlines()
        return Kept(0), f"activations are not estimated: {type(error).__name__}: {lines[0] if lines else ''}"


def _flow(
    parts: Estimate,
    kept: Kept,
    owned: int,
    blank: PreTrainedModel,
    row: int,
    passing: int,
    dtype: torch.dtype,
    device: torch.device,
    share: Share,
    stage: Stage,
    teacher: TeacherLoad | None,
    *,
    accumulates: bool,
) -> Flow:
    """What comes and goes in a step. row: bytes of all tokens of the pack at the width of the model."""
    exact = torch.promote_types(dtype, torch.float32).itemsize
    head, table = blank.get_output_embeddings(), blank.get_input_embeddings()
    weight = getattr(head, "weight", None) if find_head(blank) is not None and stage.is_last else None
    numbers = weight.numel() if weight is not None and weight.requires_grad else 0
    numbers *= share.heads if share.gathers_head else 1
    is_held = dtype in LOW_PRECISION and share.has_whole_weights  # then gradients are added up in float32, in one place
    there, late = stage.late
    is_tied = numbers > 0 and stage.is_first and table is not None and table.weight is weight
    return Flow(
        kept=stage.under_way * kept.forward + stage.rows * row / (share.heads if share.is_sliced else 1),
        again=kept.again,
        passing=passing,
        chunk=parts["logits"],
        head=stage.under_way * numbers * exact if kept.forward else 0,
        given=numbers * (exact * (not accumulates) if is_held else dtype.itemsize),
        table=numbers * dtype.itemsize if is_tied else 0,
        before=parts["gradients"] if accumulates else 0,
        late=max(0.0, late * kept.upstream - (stage.under_way - there) * kept.forward) if late else 0,
        gradients=parts["gradients"],
        summed=min(parts["gradients"], BUCKET_BYTES) if share.tokens > 1 else 0,
        owned=owned if not share.has_whole_weights else 0,
        teacher=teacher.passing if teacher is not None else 0,
    )


def _passing(
    blank: PreTrainedModel, largest: Pack, row: int, device: torch.device, share: Share, *, forgets: bool
) -> int:
    """What a layer holds only while it exchanges tokens: rows of the model's width on their way into split products and
    out of them, and keys and values of all tokens with the masks that are made of numbers of 8 bytes."""
    copies, text = COPIES.get(device.type, 1), blank.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    both = 2 * row // text.hidden_size * share.tokens * heads * width // share.heads
    split = (copies + 1 + (2 + 4 * forgets) * share.is_sliced) * row if share.heads > 1 else 0
    return split + ((copies + 2) * both + 9 * mask_numbers(largest, share) if share.tokens > 1 else 0)


def _gathering(
    blank: PreTrainedModel,
    apart: Collection[nn.Parameter],
    dtype: torch.dtype,
    device: torch.device,
    share: Share,
    spared: float,
) -> tuple[Gathering, float]:
    """What is gathered of weights in slices, and bytes of this process's slices of the gradients of blocks."""
    exact = 4 if dtype in LOW_PRECISION else dtype.itemsize
    sizes, layers = Sizes.of(blank, apart), len(blocks_of(blank))
    gathering = Gathering(
        around=sizes.around * dtype.itemsize,
        block=sizes.block * dtype.itemsize - spared / max(layers, 1),
        blocks=(sizes.total - sizes.around) * dtype.itemsize - spared if share.stays_whole else 0,
        around_made=sizes.around_trained * dtype.itemsize,
        block_made=sizes.block_trained * dtype.itemsize,
        around_summed=sizes.around_trained * exact,
        block_summed=sizes.block_trained * exact,
        among=share.slices,
        layers=layers,
        copies=COPIES.get(device.type, 1),
    )
    of_blocks = (sizes.trained - sizes.around_trained) * exact / share.slices
    return gathering, of_blocks * (not share.is_offloaded)


def _staged_bytes(parts: Estimate, trained: int, own: int, holdings: Holdings, exact: int, share: Share) -> float:
    """What a checkpoint holds of this process: weights as the optimizer moves them, and what it keeps of each."""
    numbers = trained * exact + parts["optimizer"]
    return numbers / share.slices + (own + holdings.saved) * exact


def _dealt_out(holdings: Holdings, share: Share) -> Holdings:
    """What the process has beside its slices that has most."""
    if share.slices == 1:
        return holdings
    among, of_experts = share.slices * share.heads, share.experts * share.expert_slices
    stacks = among if share.experts == 1 else of_experts if share.expert_slices > 1 else 1
    return holdings.dealt_out(share.slices, among, stacks)


def blank_like(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model, with what is attached to it, on the meta device, so that nothing of `model` changes.

    A module on our kernels is one of the library's again in a copy.
    """
    empty: dict[int, Any] = {id(layer): plain_like(layer) for layer in low_layers(model)}
    for parameter in model.parameters():
        blank_of = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        empty[id(parameter)] = nn.Parameter(blank_of, parameter.requires_grad and parameter.is_floating_point())
    for buffer in model.buffers():
        empty[id(buffer)] = torch.empty_like(buffer, device="meta")
    blank = copy.deepcopy(model, empty)
    blank.config._attn_implementation = None
    blank.config.pad_token_id = None  # else some models look for padding in the ids, which have no contents here
    return blank


def logit_bytes(
    model: PreTrainedModel, dtype: torch.dtype, device: torch.device, trained: int, *, on_kernels: bool, among: int = 1
) -> int:
    """What the head takes beside its gradient in the forward pass: a chunk of logits, and that chunk's gradient.

    Without kernels of our own a chunk is in float32, with its exponentials beside it. Processes with a part of the
    vocabulary each exchange four numbers for a row, less than a thousandth of that where each has 12,000 tokens.
    among: of how many processes the head is gathered, of which the model has one's part.
    """
    if not trained:
        return 0
    exact = torch.promote_types(dtype, torch.float32).itemsize
    head = find_head(model)
    if head is None:  # the model's own head, whose logits stay for backward
        return trained * model.config.get_text_config().vocab_size * 3 * exact
    vocabulary, numbers = head.weight.shape[0] * among, head.weight.numel() * among
    is_low = dtype in LOW_PRECISION
    each = dtype.itemsize if on_kernels else 2 * exact
    # A product is one of its own, on a CPU rounded before it is widened, unless a kernel of ours adds it in place.
    on_cpu = device.type == "cpu"
    makes_product = is_low and head.weight.requires_grad and not (on_cpu and panels.is_trusted(dtype))
    product = (exact + dtype.itemsize * on_cpu) * makes_product
    in_chunk = min(trained, chunk_rows(vocabulary, device.type)) * vocabulary * each
    return in_chunk + numbers * product
