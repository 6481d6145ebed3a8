"""The keys of `parallelism`. Each becomes the recipe's setting of the same name as soon as there is one.

Until then only the value that divides nothing is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from training_hub.frontends.forge.key import COUNT, FLAG, LIST, TEXT, Key, Kinds

NOT_HERE = "this version does not divide a model in this way"

# name, default, the values that are taken without such a setting, kinds, meaning
_ROWS: tuple[tuple[str, Any, tuple[Any, ...], Kinds, str], ...] = (
    ("data_parallel_replicate_degree", 1, (1,), COUNT, "Copies of the (sharded) model."),
    ("data_parallel_shard_degree", -1, (1, -1), COUNT, "Processes that share out the model; -1: all the rest."),
    ("fsdp_reshard_after_forward", "default", ("default",), TEXT, "default, always or never."),
    ("tensor_parallel_degree", 1, (1,), COUNT, "Processes that divide each matrix."),
    ("disable_loss_parallel", False, (False,), FLAG, "Gather the logits of tensor parallelism."),
    ("enable_async_tensor_parallel", False, (False,), FLAG, "Overlap messages of tensor parallelism with products."),
    ("pipeline_parallel_degree", 1, (1,), COUNT, "Stages of layers."),
    ("pipeline_parallel_schedule", "1F1B", ("1F1B",), TEXT, "Order in which stages work."),
    ("pipeline_parallel_schedule_csv", None, (None, ""), TEXT, "File with such an order."),
    ("pipeline_parallel_microbatch_size", 1, (), COUNT, "Samples of seq_len tokens that pass through stages at once."),
    ("pipeline_parallel_layers_per_stage", None, (None,), COUNT, "Layers of a stage."),
    ("pipeline_parallel_first_stage_less_layers", 1, (1,), COUNT, "Layers that the embeddings count for."),
    ("pipeline_parallel_last_stage_less_layers", 1, (1,), COUNT, "Layers that the head counts for."),
    ("module_fqns_per_model_part", None, (None,), LIST, "Modules of each stage."),
    ("context_parallel_degree", 1, (1,), COUNT, "Processes that divide each sample."),
    ("context_parallel_rotate_method", "allgather", ("allgather",), TEXT, "How they exchange keys and values."),
    ("expert_parallel_degree", 1, (1,), COUNT, "Processes that divide the experts of a layer."),
    ("expert_tensor_parallel_degree", 1, (1,), COUNT, "Processes that divide each expert."),
)

LAYOUT: Mapping[str, Key] = MappingProxyType(
    {
        f"parallelism.{name}": Key(default, doc, kinds, only=only, reason=NOT_HERE, follows=f"parallelism.{name}")
        for name, default, only, kinds, doc in _ROWS
    }
)
