"""A divided model is read slice by slice: here as one of four processes, of which the others are not there.

torch's "fake" group lets collectives return at once, with whatever lay in their memory; reading needs none.
"""

from __future__ import annotations

import gc
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from tests.backends.torch_engine.tiny_models import SHAPE, from_config, tiny_model
from tests.distributed.measuring import rise
from tests.invariants.run import recipe
from tests.invariants.test_families import folder_of
from training_hub.backends.torch_engine.adaptations.lora import Lora
from training_hub.backends.torch_engine.layouts import Layout
from training_hub.backends.torch_engine.layouts.fully_sharded import blocks_of, shard
from training_hub.backends.torch_engine.layouts.pieces import cut_of, local_of
from training_hub.backends.torch_engine.loading.blank import LARGE, fill
from training_hub.backends.torch_engine.loading.dividing import attach, load_blank, load_for
from training_hub.backends.torch_engine.loading.model import LoadedModel
from training_hub.backends.torch_engine.parallel import Group
from training_hub.backends.torch_engine.saving.tensor_files import opened
from training_hub.errors import RecipeError
from training_hub.monitoring.console import open_console
from training_hub.recipe.parallelism import Degrees, Parallelism

CPU = torch.device("cpu")
RANK, SIZE = 1, 4


@pytest.fixture
def four() -> Iterator[DeviceMesh]:
    """This process and three that are not there; begun when the test's models have been saved."""
    dist.init_process_group("fake", rank=RANK, world_size=SIZE, store=FakeStore())
    yield init_device_mesh("cpu", (SIZE,), mesh_dim_names=("dp_shard",))
    dist.destroy_process_group()


@pytest.fixture
def folder(request, tiny_model_folder, tmp_path) -> Path:
    return folder_of(getattr(request, "param", "llama"), tiny_model_folder, tmp_path / "model")


def divided(folder: Path, mesh: DeviceMesh, dtype: torch.dtype, offload: bool = False) -> tuple[LoadedModel, int]:
    """The model of `folder` as this process holds it, and the numbers that were read for that."""
    wanted = recipe(folder, Path("none.jsonl"), Path("none"))
    blank = load_blank(wanted, CPU, dtype)
    assert isinstance(blank, LoadedModel), blank
    assert all(parameter.is_meta for parameter in blank.model.parameters())
    degrees = Degrees(dp_shard=SIZE)
    asked = Parallelism(data_parallel_shard_degree=SIZE, enable_cpu_offload=offload)
    for parameter in blank.model.parameters():
        parameter.requires_grad_()
    Layout(degrees=degrees, mesh=mesh, asked=asked).divide(blank.model, dtype)
    told: list[float] = []
    with opened(blank.files) as files:
        fill(blank.model, blank.base.named(files), CPU, is_offloaded=offload, advance=told.append)
        assert sum(told) == len(list(blank.model.parameters())), "progress is told of each"
        return blank, files.numbers_read


@pytest.mark.parametrize(("tuner", "at_hand", "left"), [("lora", 1, 0), ("dora", 6, 0), ("pissa", 6, 1)])
def test_beside_an_adapter_no_more_is_held_than_slices_and_a_tensor(tuner, at_hand, left, tmp_path, request):
    """While a base is read; and the adapter, which is whole till it is divided, and once more as that is done. Of a
    weight that an adapter is made of, its parts and sums take a few times as much as it does. left: of the weights from
    which this process took a part, what is left is with it till it is handed out."""
    folder, slices = tmp_path / "model", Parallelism(data_parallel_shard_degree=SIZE)
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 8}
    tiny_model("llama", **sizes).save_pretrained(folder)
    mesh = request.getfixturevalue("four")
    asked = recipe(folder, Path("none.jsonl"), Path("none"), algorithm="lora_sft", lora={"r": 2, "tuner": tuner})
    layout = Layout(degrees=Degrees(dp_shard=SIZE), mesh=mesh, asked=slices)
    gc.collect()  # what other tests left would count as given back
    # Else older versions of torch warn that what was recorded is forgotten with the next.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        blank = load_for(layout, asked, CPU, torch.float32, None, [], open_console("off"))
        begun = attach(blank, Lora(asked), CPU, Group(RANK, RANK, SIZE))
        model = begun.model
        layout.divide(model, torch.float32)
        with opened(blank.files) as files:
            fill(model, blank.base.named(files), CPU, is_offloaded=False)
    whole = [4 * one.numel() for one in AutoModelForCausalLM.from_pretrained(folder).parameters()]
    own = sum(4 * local_of(one).numel() for one in model.parameters())
    added = sum(4 * one.numel() for one in model.parameters() if one.requires_grad)
    held = rise(profiled, {file.stat().st_size for file in folder.glob("*.safetensors")})
    read = int("".join(re.findall(r"[\d,]+(?= numbers here)", " ".join(begun.notes))).replace(",", "") or 0)
    assert read * 4 <= (sum(whole) / SIZE if at_hand > 1 else 0) + max(whole)
    kept = sum(4 * one.numel() for one in begun.changed.held.values())
    assert (kept > 0) == (left > 0) and kept <= 4 * read
    assert own <= held <= own + at_hand * max(whole) + 2 * added + kept < (1 + left / 2) * sum(whole) * 0.6


@pytest.mark.parametrize("folder", ["llama", "qwen3", "mixtral", "qwen3-moe", "gemma3"], indirect=True)
def test_a_process_reads_its_slices_and_nothing_else(folder, four):
    found, numbers_read = divided(folder, four, torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = dict(plain.named_parameters())
    held = 0
    for name, parameter in found.model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert torch.equal(local_of(parameter), weights[name][cut_of(parameter).slices]), name
        held += local_of(parameter).numel()
    assert held == numbers_read <= 1.1 * sum(weight.numel() for weight in weights.values()) / SIZE
    buffers = dict(plain.named_buffers())
    assert buffers
    for name, buffer in found.model.named_buffers():
        assert torch.equal(buffer, buffers[name]), f"{name}, which is lost where a model is made without contents"


def test_slices_are_float32_masters_that_begin_from_the_files(folder, four):
    found, _ = divided(folder, four, torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, weight in plain.named_parameters():
        parameter = found.model.get_parameter(name)
        assert parameter.dtype == torch.float32
        assert torch.equal(local_of(parameter), weight[cut_of(parameter).slices])


def test_slices_may_stay_in_the_memory_of_the_cpu(folder, four):
    found, _ = divided(folder, four, torch.float32, offload=True)
    logits = found.model(input_ids=torch.arange(5)[None], use_cache=False).logits
    assert logits.shape[:2] == (1, 5)


def test_experts_of_which_processes_could_use_others_are_refused(four):
    model = torch.nn.Module()
    model.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
    with pytest.raises(RecipeError, match="experts of Module is a list of modules, of which"):
        shard(model, four, Parallelism(data_parallel_shard_degree=SIZE), torch.float32)


def test_of_blocks_that_lie_within_each_other_the_outermost_is_gathered(four):
    model = from_config(transformers.MambaConfig(**{**SHAPE, "state_size": 8}))
    assert blocks_of(model) == list(model.backbone.layers)
    shard(model, four, Parallelism(data_parallel_shard_degree=SIZE), torch.float32)
    assert all(isinstance(one, DTensor) for one in model.parameters())


def without_prefix(folder: Path, place: Path) -> Path:
    """The model of the folder as its class without a head saves it."""
    AutoModelForCausalLM.from_pretrained(folder).base_model.save_pretrained(place)
    return place


@pytest.mark.parametrize("folder", ["llama-tied", "gpt2"], indirect=True)
def test_files_that_leave_out_a_prefix_are_read_in_slices(folder, tmp_path, request):
    bare = without_prefix(folder, tmp_path / "bare")
    found, _ = divided(bare, request.getfixturevalue("four"), torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in found.model.named_parameters():
        assert torch.equal(local_of(parameter), plain.get_parameter(name)[cut_of(parameter).slices]), name


def test_what_transformers_renames_as_it_reads_is_found(tmp_path):
    """Norms as models had them that came from TensorFlow."""
    shape = {name: size for name, size in SHAPE.items() if name != "num_key_value_heads"}
    config = transformers.BertConfig(**shape, is_decoder=True)
    plain = from_config(config)
    plain.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    older = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): one for name, one in load_file(file).items()}
    assert any(name.endswith("gamma") for name in older)
    save_file(older, file, {"format": "pt"})
    blank = load_blank(recipe(tmp_path, Path("none.jsonl"), Path("none")), CPU, torch.float32)
    assert isinstance(blank, LoadedModel), blank
    with opened(blank.files) as files:
        fill(blank.model, blank.base.named(files), CPU, is_offloaded=False)
    for name, parameter in blank.model.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name


def test_large_buffers_that_are_made_of_ones_are_computed(tmp_path, request):
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
    config = transformers.GPTNeoConfig(vocab_size=64, max_position_embeddings=512, **shape)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    buffers = dict(model.named_buffers())
    assert max(one.numel() for one in buffers.values()) > LARGE
    found, _ = divided(tmp_path, request.getfixturevalue("four"), torch.float32)
    kept = dict(found.model.named_buffers())
    assert kept.keys() == buffers.keys() and all(torch.equal(kept[name], one) for name, one in buffers.items())


def test_a_name_on_the_hub_is_read_in_slices_from_its_cache(tiny_model_folder, tmp_path, monkeypatch, request):
    snapshot = tmp_path / "models--tiny--chat" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_model_folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    found, numbers_read = divided(Path("tiny/chat"), request.getfixturevalue("four"), torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    for name, parameter in found.model.named_parameters():
        assert torch.equal(local_of(parameter), plain.get_parameter(name)[cut_of(parameter).slices]), name
    assert numbers_read <= 1.1 * sum(one.numel() for one in plain.parameters()) / SIZE
    assert found.model.generation_config.to_dict() == plain.generation_config.to_dict()


def test_a_name_that_cannot_be_had_is_an_error_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RecipeError, match="tiny/none is not a folder here and cannot be had from the hub"):
        load_blank(recipe(Path("tiny/none"), Path("none.jsonl"), Path("none")), CPU, torch.float32)


def test_files_that_lack_weights_are_left_to_the_library(tiny_model_folder, tmp_path):
    """A head, of a model that has one of its own; what is to be said of that, it says."""
    bare = without_prefix(tiny_model_folder, tmp_path / "bare")
    told = load_blank(recipe(bare, Path("none.jsonl"), Path("none")), CPU, torch.float32)
    assert told == "its files hold weights otherwise than it does"
