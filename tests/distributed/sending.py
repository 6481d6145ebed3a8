"""What a process really gathers and adds up in a step of a model that is divided, and when."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tests.backends.torch_engine.tiny_models import random_pack, tiny_model
from tests.distributed.measuring import CPU, LONG
from training_hub.backends.torch_engine.attention import DOCUMENTS, register_attention
from training_hub.backends.torch_engine.checkpointing import checkpoint_layers
from training_hub.backends.torch_engine.layouts import layout_of
from training_hub.backends.torch_engine.layouts.pieces import local_of
from training_hub.backends.torch_engine.layouts.share import Share, Sizes, exchanged_bytes
from training_hub.backends.torch_engine.layouts.sliced_stages import SlicedStages
from training_hub.backends.torch_engine.layouts.stages import ORDERS, stages_of
from training_hub.backends.torch_engine.objectives.cross_entropy import CrossEntropy
from training_hub.backends.torch_engine.parallel import Group
from training_hub.recipe.parallelism import Parallelism

EXCHANGES = {
    "gathered": "c10d::_allgather_base_",
    "summed": "c10d::_reduce_scatter_base_",
    "agreed": "c10d::allreduce_",
}


def in_a_step(group: Group, parallelism: dict[str, Any], packs: int, checkpointing: str = "none") -> dict[str, Any]:
    """Of a step of a small Llama of four layers: how many numbers come to lie whole in this process (gathered), and lay
    whole before they were added up into slices (summed); how often replicas added up; how many numbers its weights
    have, those around the layers, and the rows of a pack; how many times a layer went forward; and what is planned to
    be sent between slices, and is, in bytes."""
    asked, given, passes = Parallelism(**parallelism), [random_pack(LONG)] * packs, []
    register_attention()
    model = tiny_model("llama", num_hidden_layers=4)
    model.set_attn_implementation(DOCUMENTS)
    numbers = {name: weight.numel() for name, weight in model.named_parameters()}
    layout = layout_of(asked, group, CPU).divide(model, torch.float32)
    checkpoint_layers(model, checkpointing)
    for name, module in model.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_pre_hook(lambda *_: passes.append(1))

    def step() -> None:
        for _ in layout.learn(model, CrossEntropy(), given, 1.0, lambda: given[0]):
            pass

    step()
    passes.clear()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        step()
    found = {name: [one for one in profiled.events() if one.name == kind] for name, kind in EXCHANGES.items()}
    gathered, summed = (sum(_most(one.input_shapes) for one in found[name]) for name in ("gathered", "summed"))
    own = {name: numbers[name] for name, _ in model.named_parameters()}
    around = sum(number for name, number in own.items() if ".layers." not in name)
    sizes, share = Sizes(sum(own.values()), sum(own.values()), 0, around, 0, around), Share.of(asked, group.world_size)
    splits = ORDERS[asked.pipeline_parallel_schedule].splits
    return {
        "gathered": gathered,
        "summed": summed,
        "added_up": sum(one.name == "c10d::allreduce_" for one in profiled.events()) - 1,  # and one about their passes
        "weights": sizes.total,
        "around": around,
        "rows": sum(LONG) * model.config.hidden_size,
        "passes": len(passes),
        "planned": exchanged_bytes(sizes, replace(share, replicas=1), torch.float32, packs, makes_later=splits),
        "sent": 4 * (gathered + summed) * (share.slices - 1) / share.slices,
    }


def _most(shapes: list[list[int]]) -> int:
    """The numbers of the largest of some tensors."""
    return max(torch.Size(one).numel() for one in shapes)


def made_later(group: Group) -> dict[str, float]:
    """How far gradients of weights in slices are from those of a whole backward pass, where they are made after that of
    the input; and how many of them were there before."""
    wanted, of_input, _ = _learned(group, splits=False)
    found, of_same, early = _learned(group, splits=True)
    assert wanted.keys() == found.keys()
    most = max((found[name] - one).abs().max().item() for name, one in wanted.items() if one.numel())
    return {"apart": max(most, (of_same - of_input).abs().max().item()), "number": len(wanted), "early": early}


def _learned(group: Group, *, splits: bool) -> tuple[dict[str, Tensor], Tensor, int]:
    from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

    asked = Parallelism(data_parallel_shard_degree=-1)
    model = tiny_model("llama")
    layout = layout_of(asked, group, CPU).divide(model, torch.float32)
    sliced = SlicedStages(model, asked)
    layout.begin_pass(model, is_last=True)
    torch.manual_seed(group.rank)
    given = torch.randn(1, 8, model.config.hidden_size, requires_grad=True)
    loss = model(inputs_embeds=given, use_cache=False).logits.square().mean()
    early = 0
    if splits:
        (of_input,), parts = stage_backward_input([loss], None, [given], iter(sliced.weights))
        early = sum(weight.grad is not None for weight in model.parameters())
        sliced.make(parts, lambda some: stage_backward_weight(iter(sliced.weights), some), is_last=True)
    else:
        loss.backward()
        of_input = given.grad
    layout.end_passes(model)
    own = {name: local_of(weight.grad) for name, weight in model.named_parameters() if weight.grad is not None}
    return own, of_input, early


def under_way_at_most(group: Group, order: str, packs: int) -> list[float]:
    """How many packs' activations are there at once in this process in torch's schedule, as a share of its stages; how
    many where most gradients of activations wait for those of weights, and how many packs' these are."""
    from torch.distributed.pipelining import PipelineStage, schedules

    asked = Parallelism(pipeline_parallel_degree=group.world_size, pipeline_parallel_schedule=order)
    stages = stages_of(asked, 2 * group.world_size)
    own, number = stages.of_process(group.rank), torch.empty(1, device="meta")
    made = [
        PipelineStage(nn.Identity(), one, len(stages.ends), CPU, input_args=number, output_args=number) for one in own
    ]
    schedule = getattr(schedules, ORDERS[order].kind)(made, packs, loss_fn=lambda output, target: output)
    there = waiting = 0
    moments = []
    for action in schedule.pipeline_order[group.rank]:
        kind = action.computation_type.name if action is not None else ""
        there += (kind == "FORWARD") - (kind in ("BACKWARD_WEIGHT", "FULL_BACKWARD"))
        waiting += (kind == "BACKWARD_INPUT") - (kind == "BACKWARD_WEIGHT")
        moments.append((waiting / len(own), there / len(own)))
    late, beside = max(moments)
    return [max(one for _, one in moments), beside, late]
