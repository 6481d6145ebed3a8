"""Optimizers of other packages move our masters as they move weights of their own, and go on bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from training_hub.backends.torch_engine.optim import Masters, Updater
from training_hub.backends.torch_engine.optimizers import library
from training_hub.backends.torch_engine.optimizers.library import KINDS, kept_bytes, table_names
from training_hub.recipe.sections import Optimizer

bitsandbytes = pytest.importorskip("bitsandbytes")
galore_torch = pytest.importorskip("galore_torch")
lion_pytorch = pytest.importorskip("lion_pytorch")
schedulefree = pytest.importorskip("schedulefree")

RATE = 3e-3
NAMES = tuple(KINDS)
BETAS = {"betas": (0.9, 0.95)}


class Network(nn.Module):
    """A table, two matrices of which the larger is long enough for 8-bit moments, biases, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(32, 48)
        self.inner = nn.Sequential(nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 48))
        self.head = nn.Linear(48, 32, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def loss(self, step: int) -> torch.Tensor:
        """Predict the id that is 3 further on."""
        torch.manual_seed(step)
        ids = torch.randint(32, (64,))
        return nn.functional.cross_entropy(self.head(self.inner(self.table(ids))).float(), (ids + 3) % 32)


def updater(model: Network, name: str, **settings) -> Updater:
    wanted = Optimizer(name=name, galore_rank=8, galore_interval=3, **settings)
    if name != "GaLoreAdamW":
        wanted = Optimizer(name=name, **settings)
    return Updater(Masters(model.named_parameters()), wanted, 0, table_names(model))


def learn(model: Network, moved: Updater, steps: range, rate: float = RATE) -> list[float]:
    losses = []
    for step in steps:
        loss = model.loss(step)
        loss.backward()
        moved.step(rate)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_each_learns(name, dtype):
    model = Network().to(dtype)
    moved = updater(model, name)
    first = learn(model, moved, range(80))[0]
    with moved.averaged(), torch.no_grad():
        # The untrained loss is that of guessing, log 32 = 3.5.
        assert float(model.loss(99)) < 0.7 * first


def their_own(name: str, model: Network) -> list[torch.optim.Optimizer]:
    """The library's optimizer as its users would set it up for these weights."""
    matrices = [p for p in model.inner.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    if name == "Lion":
        return [lion_pytorch.Lion(model.parameters(), lr=RATE, **BETAS)]
    if name == "AdamWScheduleFree":
        made = schedulefree.AdamWScheduleFree(model.parameters(), lr=RATE, **BETAS)
        made.train()
        return [made]
    if name == "Muon":
        muon = torch.optim.Muon(matrices, lr=RATE, weight_decay=0, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW(others, lr=RATE, weight_decay=0, fused=True, **BETAS)]
    if name == "GaLoreAdamW":
        projected = {"params": matrices, "rank": 8, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
        groups = [projected, {"params": others}]
        return [galore_torch.GaLoreAdamW(groups, lr=RATE, eps=1e-8, no_deprecation_warning=True, **BETAS)]
    # What is paged on a GPU is not on a CPU, as bitsandbytes says of its own accord.
    kind = getattr(bitsandbytes.optim, name.removeprefix("Paged"))
    return [kind(model.parameters(), lr=RATE, weight_decay=0, **BETAS)]


@pytest.mark.parametrize("name", NAMES)
def test_weights_move_as_the_library_moves_them(name):
    model, plain = Network(), Network()
    moved, theirs = updater(model, name), their_own(name, plain)
    learn(model, moved, range(7))
    for step in range(7):
        plain.loss(step).backward()
        for one in theirs:
            one.step()
        plain.zero_grad(set_to_none=True)
    with moved.averaged():
        for one in theirs:
            if hasattr(one, "eval"):
                one.eval()
        for ours, wanted in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours, wanted), "the same calls on the same numbers"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_going_on_from_what_was_saved_is_going_on_bit_for_bit(name, dtype):
    model = Network().to(dtype)
    moved = updater(model, name, weight_decay=0.1)
    learn(model, moved, range(4))
    weights = {key: weight.clone() for key, weight in moved.masters.saved().items()}
    kept = copy.deepcopy(moved.state())
    assert all(isinstance(value, torch.Tensor) for value in kept.values())
    expected = learn(model, moved, range(4, 9))
    other = Network().to(dtype)
    again = updater(other, name, weight_decay=0.1)
    again.masters.load(weights)
    again.load_state(kept)
    assert learn(other, again, range(4, 9)) == expected
    for key, weight in moved.masters.weights.items():
        assert torch.equal(again.masters.weights[key], weight)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_takes_the_bytes_that_are_said(name):
    model = Network()
    moved = updater(model, name)
    learn(model, moved, range(1))
    names = table_names(model)
    assert names == {"table.weight", "head.weight"}
    tables = {id(weight) for key, weight in moved.masters.weights.items() if key in names}
    settings = Optimizer(name=name, galore_rank=8) if name == "GaLoreAdamW" else Optimizer(name=name)
    said = kept_bytes(moved.masters.weights.values(), settings, 4, tables)
    found = sum(value.numel() * value.element_size() for value in moved.state().values() if value.dim())
    # bitsandbytes counts a table of codes for each weight, also where two of them share one tensor.
    assert found == said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_state_that_was_loaded_is_put_into_pages_again():
    made = []
    for _ in range(2):
        model = nn.Linear(512, 512, device="cuda")  # smaller weights have no pages
        model(torch.ones(1, 512, device="cuda")).sum().backward()
        made.append(Updater(Masters(model.named_parameters()), Optimizer(name="PagedAdamW8bit"), 0))
    first, second = made
    first.step(RATE)
    second.load_state(first.state())
    weight = second.masters.weights["weight"]
    state = second.optimizer.state[weight]
    assert state["state1"].is_paged and state["state2"].is_paged
    assert torch.equal(state["state1"].cpu(), first.state()["weight/state1"].cpu())


def test_muon_leaves_embeddings_head_and_biases_to_adamw():
    model = Network()
    moved = updater(model, "Muon")
    learn(model, moved, range(1))
    by_muon = {key.rpartition("/")[0] for key in moved.state() if key.endswith("/momentum_buffer")}
    assert by_muon == {"inner.0.weight", "inner.2.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_looking_at_the_average_changes_no_bit(dtype):
    model = Network().to(dtype)
    moved = updater(model, "AdamWScheduleFree")
    learn(model, moved, range(5))
    before = {key: weight.clone() for key, weight in moved.masters.weights.items()}
    shown = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    with moved.averaged():
        assert any(not torch.equal(weight, before[key]) for key, weight in moved.masters.weights.items())
        for key, parameter in model.named_parameters():
            assert torch.equal(parameter, moved.masters.weights[key].to(dtype))
    assert all(torch.equal(weight, before[key]) for key, weight in moved.masters.weights.items())
    assert all(torch.equal(weight, shown[key]) for key, weight in model.named_parameters())


def test_a_package_that_is_missing_is_named_with_what_to_write(monkeypatch):
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    assert library.problems(Optimizer(name="AdamW")) == []
    assert library.problems(Optimizer(name="Muon")) == []
    (line,) = library.problems(Optimizer(name="Lion"))
    assert line.startswith("optimizer.name: Lion needs lion_pytorch, which is not installed: pip install")
    assert len(library.problems(Optimizer(name="GaLoreAdamW"))) == 2
