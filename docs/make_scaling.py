"""Writes docs/scaling.md, the tables of `training-hub plan --world-size N`: python docs/make_scaling.py"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

from training_hub.frontends.commands.on_paper import HEAD, Comparison, comparison, rows
from training_hub.recipe.parallelism import Degrees
from training_hub.scaling.choose import (
    ATTENTION,
    DEVICES,
    EFFICIENCY,
    EIGHT_BITS,
    GIB,
    LONG,
    ROOM,
    Cluster,
    candidate,
    family,
    reasons,
    told,
)
from training_hub.scaling.formulas import Work, memory
from training_hub.scaling.models import KEPT

PAGE = Path(__file__).parent / "scaling.md"
MODELS = {
    "llama3_8b": "Llama 3.1 8B",
    "llama3_70b": "Llama 3.1 70B",
    "qwen3_235b_a22b": "Qwen3 235B, a mixture of experts",
}
WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)
SHOWN = (8, 64, 256, 1024)
STEP = Work(samples=1024, length=8192)
DEVICE = DEVICES["h100"]

SOURCE = "https://github.com/pytorch/torchtitan/blob/31a17bfd/benchmarks/llama3_h100_202412_torchtitan.md"

# What, model, layout, step, GiB that were published; torchtitan's page, its tables 1 to 4.
_EIGHT, _MANY = Degrees(dp_shard=8), Degrees(dp_shard=128)
_TITAN = {"has_whole_logits": True, "products_kept": 0.5, "shards_context": True}
_EIGHT_BITS = {**_TITAN, "is_in_eight_bits": True}
PUBLISHED = (
    ("8B, 8 GPUs, FSDP", "llama3_8b", _EIGHT, Work(16, 8192, 2, "selective", **_TITAN), 82.4),
    ("the same, compiled", "llama3_8b", _EIGHT, Work(16, 8192, 2, "selective", **_TITAN), 77.0),
    ("the same, float8", "llama3_8b", _EIGHT, Work(16, 8192, 2, "selective", **_EIGHT_BITS), 76.8),
    ("8B, 128 GPUs, FSDP", "llama3_8b", _MANY, Work(256, 8192, 2, "selective", **_TITAN), 67.0),
    ("the same, compiled", "llama3_8b", _MANY, Work(256, 8192, 2, "selective", **_TITAN), 62.0),
    ("the same, float8", "llama3_8b", _MANY, Work(256, 8192, 2, "selective", **_EIGHT_BITS), 61.8),
    *(
        (
            f"8B, 8 GPUs, FSDP {8 // context} x CP {context}, {length:,} tokens, float8",
            "llama3_8b",
            Degrees(dp_shard=8 // context, cp=context),
            Work(8 // context, length, 1, "full", **_EIGHT_BITS),
            gib,
        )
        for context, length, gib in ((1, 32768, 83.9), (2, 65536, 84.2), (4, 131072, 84.0), (8, 262144, 84.5))
    ),
    (
        "70B, 256 GPUs, FSDP 32 x TP 8, float8",
        "llama3_70b",
        Degrees(dp_shard=32, tp=8),
        Work(512, 8192, 16, "full", **_EIGHT_BITS),
        71.9,
    ),
    (
        "the same, asynchronous TP",
        "llama3_70b",
        Degrees(dp_shard=32, tp=8),
        Work(512, 8192, 16, "full", **_EIGHT_BITS),
        67.6,
    ),
)

# Tokens per second of a GPU, of the same runs in the same order, and the run that each is held against.
SPEEDS = (5762, 6667, 8532, 5605, 6514, 8380, 3890, 2540, 1071, 548, 829, 876)
BESIDE = (0, 1, 2, 0, 1, 2, 6, 6, 6, 6, 2, 2)

HEADLINE = f"""<!-- Written by docs/make_scaling.py; change that, or training_hub/scaling, instead. -->

# Which layout for how many GPUs

`training-hub plan --world-size N` computes what each layout of a model takes on N devices that need not be here:
memory of
the fullest device, what a device sends in a step, and about how long that step is. It reads the shape of the model,
no weight
and no data. Nothing on this page was run on so many GPUs: it is arithmetic, checked below against runs that others
published. Which of them this version can train with is what the section `parallelism` of
[the recipe](reference/recipe.md) has degrees for; copies of the whole model (DDP) it always can.

```bash
training-hub plan --world-size 64 --model llama3_70b --batch-size 1024 --max-seq-len 8192
training-hub plan --world-size 16 --model path/to/model --gpu h200 --gpus-per-node 8 --gpu-memory 120 --json
```

`--model` is a folder with a `config.json`, or a shape that is known by name ({", ".join(KEPT)}). `--gpu` is a100,
h100, h200
or b200, `--gpu-memory` the GiB of a device where that is another.

## How it is computed

The formulas stand in `training_hub/scaling/formulas.py`, each with its source. In short:

- **State.** 16 bytes for each weight on the device, sharded as FSDP2 does it (weight, gradient and two moments in
  float32); 18 where it is whole (DDP), with the bfloat16 weight beside its master. FSDP also holds two layers and a
  table of embeddings gathered, and one layer's gradient. CP divides no weights here; torchtitan's runs below share them
  out over the devices of a context group, too, and are computed so.
- **Activations.** What a layer keeps of each token for backward, operation by operation; TP and CP divide it, PP
  holds it
  for as many passes as there are stages. `none`, `selective` and `full` are what layers forget; the least that fits
  is taken.
- **Messages.** Rings: 2 (n - 1) / n of what is summed, (n - 1) / n of what is gathered or scattered. FSDP gathers
  twice and
  scatters once in each pass; TP exchanges rows ten times a layer; CP gathers keys and values; EP sends each token's
  rows to
  {KEPT["qwen3_235b_a22b"].chosen} experts and back.
- **Time.** {EFFICIENCY:.0%} of the peak for products, {EIGHT_BITS:.2f} times as much for those of layers in 8 bits
  (`training.fp8`), {ATTENTION:.0%} for attention, messages at the speed of the wires; what FSDP and DDP send travels
  while devices compute. It is good for comparing layouts, not for promising hours.
- **The choice** is the fastest layout that fits in {ROOM:.0%} of the memory, or one of fewer parts that is at most
  5% slower. CP is chosen for samples of fewer than {LONG:,} tokens only if nothing else fits.

## Against published runs

Memory of the fullest GPU in GiB, for torchtitan's page [{SOURCE.rpartition("/")[2]}]({SOURCE}): H100 of 96 GB, 8,192
tokens
unless said, all logits at once, every second product forgotten where checkpointing is selective.
"""

AFTER_MEMORY = f"""
The formulas lie below every published number: they leave out what libraries, NCCL and the allocator take. Hence
{ROOM:.0%}.

Messages can be checked through time alone. Tokens per second and GPU of the same runs, and how far the formulas lie
from
them, by themselves and where both are taken relative to another run of the table: that of one GPU a sample for CP,
that of the 8B model on 8 GPUs, compiled and in the same format, for the rest.
"""

AFTER_SPEEDS = """
The formulas know no norms, sums, casts or exchanges of keys beyond their bytes, so they are fast throughout. From 8
to 128
GPUs the published speed of FSDP falls by 2 to 3 %; by the formulas it does not, since all that is sent travels while
devices compute. With all operations at one rate the last column would say +12%, +72% and +98% for CP 2, 4 and 8.
What CP costs beyond attention and messages is not in the formulas, and they take it last.
"""


def page() -> str:
    """The whole page."""
    parts = [
        filled(HEADLINE),
        *_published(),
        "",
        filled(AFTER_MEMORY),
        *_speeds(),
        "",
        filled(AFTER_SPEEDS),
        *_models(),
    ]
    return "\n".join(parts).rstrip() + "\n"


def filled(text: str) -> str:
    """The text with paragraphs and items of lists in lines of at most 120 characters; code stays as it is."""
    blocks = []
    for block in text.split("\n\n"):
        is_prose = not block.lstrip("\n").startswith(("#", "<!--", "```"))
        items = block.split("\n- ") if is_prose else [block]
        blocks.append("\n- ".join(map(_fill, items)) if is_prose else block)
    return "\n\n".join(blocks) + ("\n" if text.endswith("\n") else "")


def _fill(item: str) -> str:
    is_item = item.startswith(("- ", "**"))
    return textwrap.fill(
        " ".join(item.split()),
        118,
        subsequent_indent="  " if is_item else "",
        break_long_words=False,
        break_on_hyphens=False,
    )


def write(path: Path = PAGE) -> None:
    path.write_text(page(), encoding="utf-8")


def deviation(row: tuple[str, str, Degrees, Work, float]) -> float:
    """How far the formulas lie from a published number, as a share of it."""
    _, model, layout, work, gib = row
    return memory(KEPT[model], layout, work).total / GIB / gib - 1


def _published() -> Iterator[str]:
    yield "| run | published | formulas | deviation |\n|---|---|---|---|"
    for row in PUBLISHED:
        yield f"| {row[0]} | {row[4]} | {row[4] * (1 + deviation(row)):.1f} | {deviation(row):+.0%} |"


def speeds() -> list[float]:
    """Tokens per second and GPU by the formulas, for the runs of PUBLISHED."""
    found = []
    for _, model, layout, work, _ in PUBLISHED:
        took = candidate(KEPT[model], layout, Cluster(DEVICE, layout.world_size), work, DEVICE.memory_gib)
        found.append(work.samples * work.length / layout.world_size / took.seconds)
    return found


def _speeds() -> Iterator[str]:
    yield "| run | published | formulas | deviation | relative |\n|---|---|---|---|---|"
    computed = speeds()
    for row, theirs, ours, beside in zip(PUBLISHED, SPEEDS, computed, BESIDE, strict=True):
        own, relative = ours / theirs, computed[beside] / SPEEDS[beside]
        yield f"| {row[0]} | {theirs:,} | {ours:,.0f} | {own - 1:+.0%} | {own / relative - 1:+.0%} |"


def _models() -> Iterator[str]:
    yield (
        f"## Tables\n\n{STEP.samples:,} samples of {STEP.length:,} tokens a step, one at once on a data rank, on H100s "
        f"of {DEVICE.memory_gib} GiB,\neight in a host. An asterisk marks what is chosen.\n"
    )
    for name, title in MODELS.items():
        shape = KEPT[name]
        used = f", {shape.active_parameters / 1e9:.1f} B of them used by a token" if shape.experts else ""
        yield f"### {title}\n\n{shape.parameters / 1e9:.1f} B parameters{used}; {shape.source}.\n"
        found = {world: comparison(shape, Cluster(DEVICE, world), STEP) for world in WORLDS}
        yield from _chosen(found)
        for world in SHOWN:
            yield f"\n#### {title.split(',')[0]} on {world:,} GPUs\n"
            yield "| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD)
            yield from ("| " + " | ".join(cells).replace("* ", "**\\*** ", 1) + " |" for cells in rows(found[world]))
        yield ""


def _chosen(found: dict[int, Comparison]) -> Iterator[str]:
    yield "| GPUs | take | degrees | forgets | GiB | s/step | why |\n|---|---|---|---|---|---|---|"
    for world, one in found.items():
        if one.chosen is None:
            least = min(one.families, key=lambda each: each.memory_gib)
            yield f"| {world:,} | more GPUs | | | {least.memory_gib:,.0f} | | {family(least.degrees)} takes least |"
            continue
        took = one.chosen
        plain = [
            each
            for each in one.families
            if each.is_plain and family(each.degrees) in ("FSDP", "FSDP + TP", "FSDP + EP")
        ]
        why = "; ".join(reasons(took, plain)) or "fastest of all"
        yield (
            f"| {world:,} | {family(took.degrees)} | {told(took.degrees)} | {took.work.checkpointing} | "
            f"{took.memory_gib:.1f} | {took.seconds:.3g} | {why} |"
        )


if __name__ == "__main__":
    write()
