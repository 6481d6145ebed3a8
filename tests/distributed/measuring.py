"""What a process really holds of a model that is divided, beside what the plan says."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.backends.torch_engine.tiny_models import random_pack, tiny_model
from tests.invariants.run import recipe
from training_hub.backends import Given
from training_hub.backends.torch_engine.adaptations.lora import Lora
from training_hub.backends.torch_engine.assembly import assemble
from training_hub.backends.torch_engine.attention import DOCUMENTS, register_attention
from training_hub.backends.torch_engine.checkpointing import checkpoint_layers
from training_hub.backends.torch_engine.fused.build import kernels
from training_hub.backends.torch_engine.fused.swap import swap
from training_hub.backends.torch_engine.layouts import layout_of
from training_hub.backends.torch_engine.layouts.pieces import cut_of, local_of
from training_hub.backends.torch_engine.layouts.share import Share
from training_hub.backends.torch_engine.loading.dividing import load_for
from training_hub.backends.torch_engine.loading.model import LoadedModel, choose_dtype, load_model
from training_hub.backends.torch_engine.loading.quantization import PACKED
from training_hub.backends.torch_engine.materials import load_materials
from training_hub.backends.torch_engine.merging_together import merge_together
from training_hub.backends.torch_engine.objectives.cross_entropy import CrossEntropy
from training_hub.backends.torch_engine.optim import Masters, Updater
from training_hub.backends.torch_engine.optimizers.library import table_names
from training_hub.backends.torch_engine.parallel import Group
from training_hub.backends.torch_engine.planning.kept import id_of
from training_hub.backends.torch_engine.planning.memory import GIB, estimate
from training_hub.backends.torch_engine.planning.plan import stages_of
from training_hub.backends.torch_engine.run import Run
from training_hub.backends.torch_engine.saving.base_weights import Written
from training_hub.backends.torch_engine.saving.beside_together import write_beside_together
from training_hub.backends.torch_engine.saving.export_together import export_together
from training_hub.backends.torch_engine.saving.final import finish, numbers_of
from training_hub.monitoring.console import open_console
from training_hub.recipe import Recipe
from training_hub.recipe.folder import RunFolder
from training_hub.recipe.parallelism import Parallelism
from training_hub.recipe.sections import Optimizer

CPU = torch.device("cpu")
LENGTHS = (40, 24, 40, 24)
WIDE = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 257}


def memory_profiled() -> profile:
    """Within it torch tells of what it allocates and lets go, of which what others have left is no part."""
    gc.collect()
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def held(group: Group, family: str, dtype: str, parallelism: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Bytes by part, `planned` and `found`."""
    kind, asked, pack = getattr(torch, dtype), Parallelism(**parallelism), random_pack(LENGTHS)
    settings = Optimizer(lr=1e-3)
    share = Share.of(asked, group.world_size)
    planned = estimate(tiny_model(family, **WIDE), settings, kind, CPU, pack, share=share)
    register_attention()
    model = tiny_model(family, **WIDE).to(kind)
    model.set_attn_implementation(DOCUMENTS)
    if kernels() is not None:
        swap(model)
    layout = layout_of(asked, group, CPU)
    layout = layout.divide(model, kind)
    layout.spread(model)
    masters = Masters(model.named_parameters())
    updater = Updater(masters, settings, 1.0, table_names(model), layout)
    found: dict[str, float] = {"weights": sum(_bytes(local_of(one)) for one in model.parameters())}
    own = {id_of(local_of(one)) for one in model.parameters()}
    found["masters"] = sum(_bytes(one) for one in masters.weights.values() if id_of(one) not in own)
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if id_of(local_of(tensor)) not in own:
            saved[id_of(local_of(tensor))] = local_of(tensor)
        return tensor

    layout.begin_pass(model, is_last=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = CrossEntropy()(model, layout.tensors(model, pack)).total
    found["activations"] = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    total.backward()
    layout.end_passes(model)
    updater.clip()
    found["gradients"] = sum(_bytes(one.grad) for one in masters.weights.values() if one.grad is not None)
    updater.step(1e-3)
    states = (value for state in updater.optimizer.state.values() for value in state.values())
    found["optimizer"] = sum(_bytes(value) for value in states if value.dim())
    sizes = {name: planned[name] * GIB if planned[name] is not None else None for name in found}
    return {"planned": {**sizes, "note": planned["note"]}, "found": found}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def held_in_run(group: Group, recipe: dict[str, Any]) -> dict[str, float]:
    """Bytes of weights and masters that a process of a run holds before its first step, and of what its gradients will
    be; with the weights their scales and what an adaptation keeps beside them."""
    asked, console = Recipe.model_validate(recipe), open_console("off")
    materials = load_materials(asked, Given(), console)
    layout, dtype = layout_of(asked.parallelism, group, CPU), choose_dtype(asked.model.dtype, CPU)
    run = assemble(
        asked, load_for(layout, asked, CPU, dtype, None, [], console), materials, CPU, dtype, console, layout=layout
    )
    packings = [getattr(module, PACKED) for module in run.model.modules() if hasattr(module, PACKED)]
    scales = [tensor for packing in packings for tensor in packing.tensors]
    beside = (*run.adaptation.weights().values(), *run.adaptation.saved().values(), *scales)
    weights = {id_of(local_of(one)): _bytes(local_of(one)) for one in (*run.model.parameters(), *beside)}
    moved = run.updater.masters.weights.values()
    masters = {id_of(one): _bytes(one) for one in moved}
    return {
        "weights": sum(weights.values()),
        "masters": sum(size for key, size in masters.items() if key not in weights),
        "gradients": sum(masters.values()),
    }


def written(group: Group, recipe: dict[str, Any], folder: str) -> dict[str, Any]:
    """What this process makes of the final model, in one file, of a run that has not learned yet."""
    run, loaded = _begun(group, recipe)
    total, _ = numbers_of(run)
    told = export_together(run, loaded.base, Written(torch.float32), Path(folder), _no_more, "50GB", total)
    return told[group.rank]


def carried(group: Group, recipe: dict[str, Any], folder: str) -> dict[str, int]:
    """Of what lies beside a final model: bytes of what this process has, of its largest tensor, and how far those of
    all tensors rise while it is written."""
    run, _ = _begun(group, recipe)
    files = run.adaptation.beside()
    with memory_profiled() as profiled:
        write_beside_together(group, files, Path(folder))
    sizes = [_bytes(tensor) for tensors in files.values() for tensor in tensors.values()]
    mapped = {file.stat().st_size for file in Path(folder).iterdir()}
    return {"own": sum(sizes), "largest": max(sizes), "rise": rise(profiled, mapped)}


def adapter_written(group: Group, recipe: dict[str, Any]) -> dict[str, int]:
    """How far the bytes of all tensors of this process rise while the adapter of a run that has not learned is written,
    and read again."""
    run, loaded = _begun(group, recipe)
    folder = RunFolder(Path(run.recipe.output))
    materials = load_materials(run.recipe, Given(), run.console)
    with memory_profiled() as profiled:
        finish(run, loaded, materials, folder, run.console)
    return {"rise": rise(profiled, {file.stat().st_size for file in folder.final.glob("*.safetensors")})}


def _begun(group: Group, recipe: dict[str, Any]) -> tuple[Run, LoadedModel]:
    """A run that has not learned yet, and what it was made of."""
    asked, console = Recipe.model_validate(recipe), open_console("off")
    materials = load_materials(asked, Given(), console)
    layout, dtype = layout_of(asked.parallelism, group, CPU), choose_dtype(asked.model.dtype, CPU)
    loaded = load_for(layout, asked, CPU, dtype, None, [], console)
    return assemble(asked, loaded, materials, CPU, dtype, console, layout=layout), loaded


def merged(group: Group, base: str, adapter: str, folder: str, how: dict[str, Any]) -> dict[str, int]:
    """How far the bytes of all tensors of this process rise while all merge an adapter into its base; not counted are
    files that are mapped, as the library does with each that it opens."""
    with memory_profiled() as profiled:
        merge_together(group, Path(adapter), Path(folder), open_console("off"), trust_remote_code=False, **how)
    mapped = {file.stat().st_size for one in (base, adapter, folder) for file in Path(one).glob("*.safetensors")}
    return {"rise": rise(profiled, mapped)}


def _no_more(folder: Path) -> None:
    """Nothing lies beside the weights."""


LARGE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "vocab_size": 1024}
LONG = (96, 160, 96, 160)


def peak(
    group: Group, family: str, dtype: str, parallelism: dict[str, Any], packs: int, how: dict[str, Any]
) -> dict[str, Any]:
    """The most bytes that tensors take in a step, as planned and as torch's profiler found them in this process, in the
    usual one of five.

    how: checkpointing, optimizer and state, sizes of the model and lengths of the documents, as far as they are not the
    usual ones; lora: of what beside the weights.
    """
    sizes = {**LARGE, **how.get("sizes", {})}
    kind, asked = getattr(torch, dtype), Parallelism(**parallelism)

    def beside(model: Any) -> Any:
        if "lora" not in how:
            return model
        sections = {"algorithm": "lora_sft", "lora": how["lora"], "parallelism": parallelism}
        return Lora(recipe(Path("model"), Path("rows.jsonl"), Path("out"), **sections)).attach(model)

    settings = Optimizer(lr=1e-3, name=how.get("optimizer", "AdamW"), state=how.get("state", "full"))
    checkpointing, given = how.get("checkpointing", "none"), [random_pack(tuple(how.get("lengths", LONG)))] * packs
    share = Share.of(asked, group.world_size)
    planned = [
        estimate(
            here, settings, kind, CPU, given[0],
            accumulates=packs > 1, share=share, stage=stage, checkpointing=checkpointing,
        )
        for here, stage in stages_of(beside(tiny_model(family, **sizes)), asked, packs)
    ]  # fmt: skip
    register_attention()
    model = beside(tiny_model(family, **sizes).to(kind))
    model.set_attn_implementation(DOCUMENTS)
    if kernels() is not None:
        swap(model)
    layout = layout_of(asked, group, CPU).divide(model, kind)
    layout.spread(model)
    checkpoint_layers(model, checkpointing)
    masters = Masters(model.named_parameters(), are_split=settings.state != "full", are_held=layout.is_backward_whole)
    updater = Updater(masters, settings, 1.0, table_names(model), layout)

    def step() -> None:
        for _ in layout.learn(model, CrossEntropy(), given, 1.0, lambda: given[0], made=masters.collect):
            pass
        updater.clip()
        updater.step(1e-3)

    def risen() -> int:
        with memory_profiled() as profiled:
            step()
        return rise(profiled)

    step()
    # Gloo lets go of what was sent when it has been, which may be a layer later: one step in many differs by a tenth.
    usual = median(risen() for _ in range(5))
    always = {id_of(local_of(one)): _bytes(local_of(one)) for one in _held_always(model, masters, updater)}
    fullest = max(planned, key=lambda one: one["total"])
    beside = sum(fullest.get(name, 0) for name in ("libraries", "products", "gaps"))
    wanted = (fullest["total"] - beside) * GIB
    return {"planned": wanted, "found": sum(always.values()) + usual, "parts": fullest}


def _held_always(model: Any, masters: Masters, updater: Updater) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from masters.weights.values()
    yield from masters.extras.values()
    for state in updater.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def rise(profiled: Any, mapped: Collection[int] = ()) -> int:
    """How far the bytes of all tensors rose above those at the beginning; mapped: sizes that are not counted."""
    events = [one for one in profiled.profiler.kineto_results.events() if one.name() == "[memory]"]
    live = most = 0
    for one in sorted((one for one in events if abs(one.nbytes()) not in mapped), key=lambda one: one.start_ns()):
        live += one.nbytes()
        most = max(most, live)
    return most


def adapter_begun(group: Group, recipe: dict[str, Any]) -> dict[str, Any]:
    """How this process came by an adapter and the model beside it; and which of its pieces of weights are not those of
    the same recipe beside whole weights."""
    asked, console = Recipe.model_validate(recipe), open_console("off")
    materials = load_materials(asked, Given(), console)
    layout, dtype = layout_of(asked.parallelism, group, CPU), choose_dtype(asked.model.dtype, CPU)
    loaded = load_for(layout, asked, CPU, dtype, None, [], console)
    run = assemble(asked, loaded, materials, CPU, dtype, console, layout=layout)
    whole, adaptation = load_model(asked, CPU, dtype), Lora(asked)
    adaptation.attach(whole.model)
    wanted: dict[str, Tensor] = dict(whole.model.named_parameters(remove_duplicate=False))
    with whole.base.opened() as came:  # where a run by itself begins to learn from
        finer = {name: came.finer(name, one) for name, one in wanted.items() if one.requires_grad}
    wanted |= {name: one for name, one in finer.items() if one is not None}
    unlike = [
        name
        for name, one in run.model.named_parameters(remove_duplicate=False)
        if not torch.equal(local_of(one.detach()), wanted[name].detach()[cut_of(one).slices].to(one.dtype))
    ]
    beside = dict(whole.model.named_buffers())
    unlike += [name for name, one in run.model.named_buffers() if not torch.equal(one, beside[name])]
    differences = [float(one.proofs()[0].measured) for one in (run.adaptation, adaptation)]
    trained = sum(one.requires_grad for one in run.model.parameters())
    read = "slices" if loaded.files else "whole"
    return {"read": read, "unlike": unlike, "trained": trained, "differences": differences}
