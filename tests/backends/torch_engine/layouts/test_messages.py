"""How often ranks that split a model speak to each other in a pass, and what each keeps for its backward pass.

Torch's `fake` backend sends nothing and waits for nobody: what is asked for and kept is that of a rank among two. Its
numbers mean nothing; tests/distributed holds those.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from tests.backends.torch_engine.tiny_models import tiny_model
from training_hub.backends.torch_engine.layouts.pieces import local_of
from training_hub.backends.torch_engine.layouts.sequence import slice_tokens
from training_hub.backends.torch_engine.layouts.tensor import split_tensors
from training_hub.backends.torch_engine.layouts.tokens import Tokens

NUM_LAYERS = 3

REDUCE, GATHER, SCATTER = "allreduce_", "_allgather_base_", "_reduce_scatter_base_"


@pytest.fixture(scope="module", autouse=True)
def one_of_two() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def split(family: str, *, are_sliced: bool, **changes: Any) -> Any:
    model = tiny_model(family, num_hidden_layers=NUM_LAYERS, **changes)
    tokens = Tokens(init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))["tp"], are_sliced=are_sliced)
    split_tensors(model, tokens)
    if are_sliced:
        slice_tokens(model, tokens)
    return model


class Messages(TorchDispatchMode):
    """How often each operation of torch's process groups is called within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function.namespace == "c10d":
            self.counts[function._schema.name.partition("::")[2]] += 1
        return function(*arguments, **(keywords or {}))


def messages(work: Callable[[], Any]) -> dict[str, int]:
    with Messages() as sent:
        work()
    return dict(sent.counts)


def states(model: Any, length: int = 33) -> torch.Tensor:
    ids = torch.arange(length)[None] % 100
    return model.model(input_ids=ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
def test_what_attention_and_mlps_are_given_is_added_up_once(family):
    model = split(family, are_sliced=False)
    found: dict[str, Any] = {}
    ahead = messages(lambda: found.update(states=states(model)))
    behind = messages(lambda: found["states"].sum().backward())
    # The embeddings, and each attention and each MLP; backward where these begin. Phi-3 cuts the widths of a product
    # that lies whole between two split ones, twice a layer.
    joined = {GATHER: 2 * NUM_LAYERS} if family == "phi3" else {}
    assert ahead == {REDUCE: 1 + 2 * NUM_LAYERS, **joined}
    assert behind == {REDUCE: 2 * NUM_LAYERS, **joined}


def test_slices_of_tokens_are_gathered_and_scattered_in_their_place():
    model = split("llama", are_sliced=True)
    found: dict[str, Any] = {}
    ahead = messages(lambda: found.update(states=states(model)))
    behind = messages(lambda: found["states"].sum().backward())
    assert ahead == {REDUCE: 1, GATHER: 2 * NUM_LAYERS + 1, SCATTER: 2 * NUM_LAYERS}
    # Attention and MLPs gather what they were given a second time, for the gradients of their weights.
    assert behind == {GATHER: 4 * NUM_LAYERS + 1, SCATTER: 2 * NUM_LAYERS}


def kept(model: Any, length: int) -> int:
    """Bytes that a forward pass keeps for its backward pass, weights left out."""
    weights = {local_of(weight).untyped_storage().data_ptr() for weight in model.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = states(model, length)
    assert result.grad_fn is not None
    return sum(held.values())


def test_a_rank_keeps_less_where_it_has_a_slice_of_the_tokens():
    length, width = 240, 32
    whole, sliced = (kept(split("llama", are_sliced=one), length) for one in (False, True))
    # In each layer the inputs of two norms, of attention and of an MLP, in float32.
    assert whole - sliced >= NUM_LAYERS * 4 * (length // 2) * width * 4, (whole, sliced)
