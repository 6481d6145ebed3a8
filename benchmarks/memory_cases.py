"""What `memory.py` measures: models of a stated shape, what they train on, and over how many processes they lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Configuration:
    """A model and what it trains on: `lengths` are repeated until a pack has `tokens`; a step has `packs` of them for
    each process that has samples of its own. sections: of the recipe."""

    config: dict[str, Any]
    dtype: str
    optimizer: str
    lengths: tuple[int, ...]
    tokens: int
    packs: int = 1
    processes: int = 1
    parallelism: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, Any] = field(default_factory=dict)


NARROW = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
MIDDLE = {"hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 8}
WORDS = {"intermediate_size": 704, "vocab_size": 131072}
LONG = {**SMALL, "intermediate_size": 1408, "vocab_size": 8192}
HEAVY = {**MIDDLE, "intermediate_size": 2816, "vocab_size": 8192}
HALF = {**HEAVY, "num_hidden_layers": 6}
MIXED = {
    **SMALL, "num_hidden_layers": 4, "head_dim": 64, "intermediate_size": 1408, "moe_intermediate_size": 512,
    "num_experts": 16, "num_experts_per_tok": 2, "vocab_size": 8192,
}  # fmt: skip
"""A Qwen3 mixture of 60 M weights, of which 50 M are experts'."""

SELECTIVE = {"training": {"activation_checkpointing": "selective"}}
FULL = {"training": {"activation_checkpointing": "full"}}
EIGHT_BITS = {"optimizer": {"state": "8bit"}}

ALONE: Mapping[str, Configuration] = {
    "short documents, float32 AdamW": Configuration(
        {**NARROW, "intermediate_size": 704, "vocab_size": 8192}, "float32", "AdamW", (96, 160, 160, 240, 400), 16384
    ),
    "long documents, bfloat16 AdamW": Configuration(LONG, "bfloat16", "AdamW", (2048,), 4096),
    "vocabulary 131,072, bfloat16 AdamW": Configuration({**NARROW, **WORDS}, "bfloat16", "AdamW", (512,), 8192),
    "vocabulary 131,072, float32 Adafactor": Configuration(
        {**NARROW, **WORDS}, "float32", "Adafactor", (300, 700), 4096
    ),
    "158 M weights, bfloat16 SGD, two packs": Configuration(HEAVY, "bfloat16", "SGD", (100, 400), 512, 2),
    "158 M weights, float32 AdamW": Configuration(HEAVY, "float32", "AdamW", (512,), 512),
    "158 M weights, bfloat16 AdamW in 8 bits": Configuration(
        HEAVY, "bfloat16", "AdamW", (512,), 512, sections=EIGHT_BITS
    ),
    "long documents, selective checkpointing": Configuration(
        LONG, "bfloat16", "AdamW", (2048,), 8192, sections=SELECTIVE
    ),
    "long documents, full checkpointing": Configuration(LONG, "bfloat16", "AdamW", (2048,), 8192, sections=FULL),
    "a mixture, bfloat16 AdamW": Configuration(MIXED, "bfloat16", "AdamW", (512,), 2048),
}


def divided(degrees: dict[str, Any], processes: int = 2) -> dict[str, Any]:
    """How the processes of a configuration divide it."""
    return {"processes": processes, "parallelism": degrees}


SLICES = divided({"data_parallel_shard_degree": 2})
WHOLE_SLICES = divided({"data_parallel_shard_degree": 2, "fsdp_reshard_after_forward": "never"})
REPLICAS_OF_SLICES = divided({"data_parallel_shard_degree": 2, "data_parallel_replicate_degree": 2}, 4)
SEQUENCE = divided({"tensor_parallel_degree": 2})
HEADS = divided({"tensor_parallel_degree": 2, "sequence_parallel": False})
TOKENS = divided({"context_parallel_degree": 2})
EXPERTS = divided({"data_parallel_shard_degree": 2, "expert_parallel_degree": 2})
SLICED_EXPERTS = divided({"data_parallel_shard_degree": 4, "expert_parallel_degree": 2}, 4)


def stages(schedule: str) -> dict[str, Any]:
    """Two processes with layers each."""
    return divided({"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": schedule})


DIVIDED: Mapping[str, Configuration] = {
    "replicas": Configuration(HALF, "bfloat16", "AdamW", (512,), 512, **divided({})),
    "FSDP2, float32": Configuration(HALF, "float32", "AdamW", (512,), 512, **SLICES),
    "FSDP2, bfloat16": Configuration(HALF, "bfloat16", "AdamW", (512,), 512, **SLICES),
    "FSDP2, bfloat16, two packs": Configuration(HALF, "bfloat16", "AdamW", (512,), 512, 2, **SLICES),
    "FSDP2, never resharded, two packs": Configuration(HALF, "bfloat16", "AdamW", (512,), 512, 2, **WHOLE_SLICES),
    "FSDP2, vocabulary 131,072": Configuration({**NARROW, **WORDS}, "bfloat16", "AdamW", (512,), 4096, **SLICES),
    "FSDP2, long documents": Configuration(LONG, "bfloat16", "AdamW", (2048,), 4096, **SLICES),
    "FSDP2, long documents, selective": Configuration(
        LONG, "bfloat16", "AdamW", (2048,), 8192, **SLICES, sections=SELECTIVE
    ),
    "FSDP2, long documents, full": Configuration(LONG, "bfloat16", "AdamW", (2048,), 8192, **SLICES, sections=FULL),
    "FSDP2, 8-bit moments": Configuration(HALF, "bfloat16", "AdamW", (512,), 512, **SLICES, sections=EIGHT_BITS),
    "FSDP2, Muon": Configuration(HALF, "float32", "Muon", (512,), 512, **SLICES),
    "FSDP2, LoRA": Configuration(
        HALF, "bfloat16", "AdamW", (2048,), 2048, **SLICES, sections={"algorithm": "lora_sft"}
    ),
    "FSDP2, QLoRA": Configuration(
        HALF, "bfloat16", "AdamW", (2048,), 2048, **SLICES,
        sections={"algorithm": "lora_sft", "model": {"quantization": "int4"}},
    ),
    "FSDP2, checkpoints in the background": Configuration(
        HALF, "bfloat16", "AdamW", (512,), 512, **SLICES,
        sections={"checkpoint": {"async_mode": "async", "interval": 1}},
    ),
    "HSDP, 2 x 2": Configuration(HALF, "bfloat16", "AdamW", (512,), 512, **REPLICAS_OF_SLICES),
    "TP, sequence parallel, float32": Configuration(LONG, "float32", "AdamW", (2048,), 4096, **SEQUENCE),
    "TP, sequence parallel, bfloat16": Configuration(LONG, "bfloat16", "AdamW", (2048,), 4096, **SEQUENCE),
    "TP, sequence parallel, selective": Configuration(
        LONG, "bfloat16", "AdamW", (2048,), 8192, **SEQUENCE, sections=SELECTIVE
    ),
    "TP, sequence parallel, full": Configuration(
        LONG, "bfloat16", "AdamW", (2048,), 8192, **SEQUENCE, sections=FULL
    ),
    "TP, 79 M weights": Configuration(HALF, "bfloat16", "AdamW", (512,), 512, **SEQUENCE),
    "TP, Muon": Configuration(HALF, "float32", "Muon", (512,), 512, **SEQUENCE),
    "TP, whole tokens": Configuration(LONG, "bfloat16", "AdamW", (2048,), 4096, **HEADS),
    "CP, bfloat16": Configuration(LONG, "bfloat16", "AdamW", (4096,), 8192, **TOKENS),
    "CP, full": Configuration(LONG, "bfloat16", "AdamW", (4096,), 8192, **TOKENS, sections=FULL),
    "FSDP2 of a mixture": Configuration(MIXED, "bfloat16", "AdamW", (512,), 2048, **SLICES),
    "EP, bfloat16": Configuration(MIXED, "bfloat16", "AdamW", (512,), 4096, **EXPERTS),
    "EP, full": Configuration(MIXED, "bfloat16", "AdamW", (512,), 4096, **EXPERTS, sections=FULL),
    "EP of two, in two slices": Configuration(MIXED, "bfloat16", "AdamW", (512,), 2048, **SLICED_EXPERTS),
    "stages, 1F1B": Configuration(LONG, "bfloat16", "AdamW", (2048,), 2048, 6, **stages("1F1B")),
    "stages, 1F1B, full": Configuration(LONG, "bfloat16", "AdamW", (2048,), 4096, 6, **stages("1F1B"), sections=FULL),
    "stages, GPipe": Configuration(LONG, "bfloat16", "AdamW", (2048,), 2048, 4, **stages("GPipe")),
    "stages, Interleaved1F1B": Configuration(LONG, "bfloat16", "AdamW", (2048,), 2048, 6, **stages("Interleaved1F1B")),
    "stages, InterleavedZeroBubble": Configuration(
        LONG, "bfloat16", "AdamW", (2048,), 2048, 6, **stages("InterleavedZeroBubble")
    ),
    "stages, ZBVZeroBubble": Configuration(LONG, "bfloat16", "AdamW", (2048,), 2048, 6, **stages("ZBVZeroBubble")),
    "FSDP2 x TP": Configuration(
        HALF, "bfloat16", "AdamW", (2048,), 2048,
        **divided({"data_parallel_shard_degree": 2, "tensor_parallel_degree": 2}, 4),
    ),
    "FSDP2 x stages": Configuration(
        HALF, "bfloat16", "AdamW", (512,), 512, 4,
        **divided({"data_parallel_shard_degree": 2, "pipeline_parallel_degree": 2}, 4),
    ),
}  # fmt: skip

CONFIGURATIONS: Mapping[str, Configuration] = {**ALONE, **DIVIDED}
