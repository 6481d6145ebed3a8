"""Which layout to take: all that a model and a number of devices allow, what each takes, and which is fastest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from training_hub.recipe.parallelism import Degrees
from training_hub.scaling.formulas import Memory, Operations, Traffic, Work, bubble, memory, operations, traffic
from training_hub.scaling.models import Shape

GIB = 2**30

ROOM = 0.8
"""Share of a device's memory that may be planned: published runs took up to a quarter more than the formulas say, for
libraries and what the allocator loses (docs/scaling.md)."""

EFFICIENCY = 0.5
"""Share of the peak that products reach; published bfloat16 runs lie between 0.33 and 0.58. It only weighs computing
against sending."""

ATTENTION = 0.35 * 6 / 7
"""The same of attention: FlashAttention-2 reaches 0.35 on an H100 (Shah et al. 2024, arXiv:2407.08608, abstract), and
its backward pass has five products, of which `operations` counts four. cuDNN's reached 0.42 on an H200, counted so
(benchmarks/GPU.md: 548 TFLOP/s forward, 470 backward)."""

EIGHT_BITS = 1205 / 777
"""How much faster products in 8-bit floating point are, both measured on one H200 (benchmarks/GPU.md)."""


@dataclass(frozen=True)
class Device:
    """A device and its wires, by its maker's data sheet: memory in GiB as torch reports it, bfloat16 operations per
    second, bytes per second to others of its host and, one way, to other hosts (network cards sold with it)."""

    name: str
    memory_gib: float
    peak: float
    inside: float
    between: float


DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        "a100": Device("a100", 79.3, 312e12, 300e9, 25e9),
        "h100": Device("h100", 79.6, 989e12, 450e9, 50e9),
        "h200": Device("h200", 140.4, 989e12, 450e9, 50e9),
        "b200": Device("b200", 179.1, 2250e12, 900e9, 50e9),
    }
)
"""NVIDIA data sheets: A100 80GB SXM, H100 SXM, H200 SXM, B200 (dense bfloat16; NVLink halved to one way; 200 or 400
Gb/s network cards)."""


@dataclass(frozen=True)
class Cluster:
    """So many devices of a kind, so many in a host."""

    device: Device
    world_size: int
    per_host: int = 8


@dataclass(frozen=True)
class Candidate:
    """A layout, and a step in it, with what they take. seconds: of a step, by part; only good for comparing.
    is_doubtful: it divides samples shorter than LONG."""

    degrees: Degrees
    work: Work
    memory: Memory
    traffic: Traffic
    compute_seconds: float
    sending_seconds: float
    room_gib: float
    is_doubtful: bool = False

    @property
    def memory_gib(self) -> float:
        return self.memory.total / GIB

    @property
    def fits(self) -> bool:
        return self.memory_gib <= self.room_gib

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.sending_seconds

    @property
    def is_plain(self) -> bool:
        """Whether it divides the data in one way and the model in at most one other."""
        return family(self.degrees).count("+") <= 1


NAMES: Mapping[str, str] = MappingProxyType(
    {
        "dp_replicate": "replicate",
        "dp_shard": "shard",
        "tp": "tensor",
        "cp": "context",
        "pp": "pipeline",
        "ep": "expert",
    }
)
"""What degrees are called in tables."""


def family(degrees: Degrees) -> str:
    """What a layout is called: DDP, FSDP, HSDP, and what it divides beside the data: FSDP + TP."""
    copies = degrees.dp_replicate > 1
    data = ("HSDP" if copies else "FSDP") if degrees.dp_shard > 1 else "DDP" if copies else ""
    parts = [data, *(name.upper() for name in ("tp", "cp", "pp", "ep") if getattr(degrees, name) > 1)]
    return " + ".join(part for part in parts if part) or "one device"


def told(degrees: Degrees) -> str:
    """The degrees that are not 1: "shard 32, tensor 8"."""
    found = [f"{name} {getattr(degrees, key)}" for key, name in NAMES.items() if getattr(degrees, key) > 1]
    return ", ".join(found) or "1 device"


def layouts(shape: Shape, cluster: Cluster, work: Work) -> Iterator[Degrees]:
    """Every layout that divides evenly: heads by t, layers by p, experts by e, the step's samples by the data ranks.

    Tensor groups stay within a host, where every layer's messages are fast; powers of two, as hosts are built.
    """
    for tensor in _powers(min(cluster.per_host, cluster.world_size)):
        if shape.key_heads % tensor:
            continue
        for pipeline in _powers(min(16, cluster.world_size // tensor)):
            if shape.layers < 2 * pipeline:
                continue
            for context in _powers(min(16, cluster.world_size // (tensor * pipeline))):
                rest, left = divmod(cluster.world_size, tensor * pipeline * context)
                if left or (context > 1 and work.length < 1024 * context):
                    continue
                yield from _of_data(shape, work, Degrees(tp=tensor, pp=pipeline, cp=context), rest)


def _of_data(shape: Shape, work: Work, degrees: Degrees, rest: int) -> Iterator[Degrees]:
    """The ways to share out the rest of the devices among shards and copies, and experts among all."""
    if work.samples < rest:
        return  # ranks would have nothing to do
    for replicate in _powers(rest):
        if rest % replicate:
            continue
        chosen = replace(degrees, dp_replicate=replicate, dp_shard=rest // replicate)
        if chosen.pp > 1 and work.passes(chosen) < chosen.pp:
            continue  # stages would wait for most of a step
        yield chosen
        for expert in _powers(chosen.efsdp):
            if expert > 1 and shape.experts and not shape.experts % expert:
                yield replace(chosen, ep=expert)


def _powers(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length()) if 2**power <= most]


def candidate(shape: Shape, degrees: Degrees, cluster: Cluster, work: Work, room_gib: float) -> Candidate:
    """What a layout takes on a cluster."""
    sent = traffic(shape, degrees, work)
    compute = _computing(operations(shape, degrees, work), work, cluster.device.peak) / (1 - bubble(degrees, work))
    seconds = _seconds(sent, degrees, work, cluster)
    ahead = max(0.0, seconds["shards"] + seconds["copies"] - compute)  # travels while it computes
    waiting = sum(seconds[name] for name in ("tensor", "context", "pipeline", "expert"))
    is_doubtful = degrees.cp > 1 and work.length < LONG
    return Candidate(degrees, work, memory(shape, degrees, work), sent, compute, ahead + waiting, room_gib, is_doubtful)


def _computing(needed: Operations, work: Work, peak: float) -> float:
    """Seconds that a device computes, each kind of operation at the share of the peak that it reaches."""
    layers = needed.layers / (EIGHT_BITS if work.is_in_eight_bits else 1)
    return (layers + needed.head) / (EFFICIENCY * peak) + needed.attention / (ATTENTION * peak)


def _seconds(sent: Traffic, degrees: Degrees, work: Work, cluster: Cluster) -> dict[str, float]:
    """How long each kind of message takes. From inside out the order of devices is tensor, context, shards, copies,
    stages, as in torchtitan's mesh.

    A ring that leaves a host does so through the cards of all its members there, as NCCL's rings do; what goes from one
    device to another (stages, experts) has the card of its own.
    """
    device, found = cluster.device, {}
    shards = work.shards(degrees)
    same = degrees.data * degrees.cp // shards  # devices with other tokens and the same weights
    inner = degrees.tp * degrees.cp
    rings = {
        "tensor": (1, degrees.tp),
        "context": (degrees.tp, degrees.cp),
        "shards": (degrees.tp if work.shards_context else inner, shards),
        "copies": (degrees.tp * shards if work.shards_context or degrees.cp == 1 else degrees.tp, same),
    }
    for name, (start, reach) in rings.items():
        members = max(1, min(reach, cluster.per_host // start))
        is_inside = start * reach <= cluster.per_host
        speed = device.inside if is_inside else min(device.inside, members * device.between)
        found[name] = getattr(sent, name) / speed
    found["pipeline"] = sent.pipeline / (device.inside if cluster.world_size <= cluster.per_host else device.between)
    is_near = max(degrees.ep, degrees.tp) <= cluster.per_host
    found["expert"] = sent.expert / (device.inside if is_near else device.between)
    return found


def candidates(shape: Shape, cluster: Cluster, work: Work, memory_gib: float, how: str = "auto") -> list[Candidate]:
    """Every layout with as little checkpointing as fits, the fastest first; those that do not fit are at the end."""
    room = ROOM * memory_gib
    ways = ("none", "selective", "full") if how == "auto" else (how,)
    found = []
    for layout in layouts(shape, cluster, work):
        tried = [candidate(shape, layout, cluster, replace(work, checkpointing=way), room) for way in ways]
        fitting = [one for one in tried if one.fits]
        found.append(fitting[0] if fitting else min(tried, key=lambda one: one.memory_gib))
    return sorted(
        found, key=lambda one: (not one.fits, one.seconds if one.fits else one.memory_gib, _parts(one.degrees))
    )


def _parts(degrees: Degrees) -> int:
    return sum(getattr(degrees, name) > 1 for name in NAMES)


LONG = 16384
"""Tokens of a sample from which context parallelism is taken where another layout would do: published runs with it lose
more than the formulas say (docs/scaling.md)."""

SIMPLER = 1.05
"""A layout of fewer parts is taken if it is at most so much slower: the estimate is no better than that."""


def best(found: list[Candidate]) -> Candidate | None:
    """The fastest that fits, or a simpler one that is hardly slower; None where none fits."""
    fitting = [one for one in found if one.fits]
    fitting = [one for one in fitting if not one.is_doubtful] or fitting
    if not fitting:
        return None
    near = [one for one in fitting if one.seconds <= SIMPLER * fitting[0].seconds]
    return min(near, key=lambda one: (_parts(one.degrees), one.seconds))


def by_family(found: list[Candidate]) -> list[Candidate]:
    """The best of each family, in the order of `found`."""
    chosen: dict[str, list[Candidate]] = {}
    for one in found:
        chosen.setdefault(family(one.degrees), []).append(one)
    return [best(same) or same[0] for same in chosen.values()]


def reasons(chosen: Candidate, others: list[Candidate]) -> list[str]:
    """Why this layout, compared with each of the others: what does not fit, what is slower and by what."""
    return [_reason(chosen, other) for other in others if family(other.degrees) != family(chosen.degrees)]


def _reason(chosen: Candidate, other: Candidate) -> str:
    name = family(other.degrees)
    if not other.fits:
        return f"{name} does not fit: {other.memory_gib:,.0f} GiB at least, {other.room_gib:,.0f} are planned"
    ratio = other.seconds / chosen.seconds
    if other.is_doubtful:
        return (
            f"{name} divides samples of fewer than {LONG:,} tokens: slower than {ratio:.2f} times, which formulas say"
        )
    if ratio <= SIMPLER and _parts(other.degrees) > _parts(chosen.degrees):
        return f"{name} would take {'about as long' if ratio > 1 / SIMPLER else 'less'}, and has more parts"
    more_compute = other.compute_seconds - chosen.compute_seconds
    if more_compute < other.sending_seconds - chosen.sending_seconds:
        cause = "waits for messages"
    elif other.degrees.pp > chosen.degrees.pp and other.work.checkpointing == chosen.work.checkpointing:
        cause = "stages wait for each other"
    else:
        cause = "activations are computed again"
    return f"{name} takes {ratio:.2f} times as long: {cause}"
