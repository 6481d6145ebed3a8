"""Packs that are replayed. What records here repeats the work itself; tests/backends/torch_engine/test_cuda_step.py
records it on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from tests.backends.torch_engine.steps import assembled, gradients, update
from tests.backends.torch_engine.tiny_models import tiny_model
from training_hub.backends.torch_engine.assembly import recorder_of
from training_hub.backends.torch_engine.attention import DOCUMENTS, register_attention
from training_hub.backends.torch_engine.engine import TorchEngine
from training_hub.backends.torch_engine.filling import FilledPack, Size, Untold, filled
from training_hub.backends.torch_engine.objectives.cross_entropy import CrossEntropy
from training_hub.backends.torch_engine.optim import Masters
from training_hub.backends.torch_engine.recording import Recorder, Work
from training_hub.backends.torch_engine.tensors import to_device
from training_hub.monitoring.console import SilentConsole
from training_hub.recipe.load import build
from training_hub.types import Pack

CPU = torch.device("cpu")
BUDGET = 64
ON_DEVICE, BAKED = "attention_told_on_the_device", "attention_told_once"


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, cu_seq_lens_q: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """Attention within documents whose borders only the device is asked for, as by the variable-length kernel."""
    places = torch.arange(query.shape[2])
    document = torch.searchsorted(cu_seq_lens_q[1:], places, right=True)
    seen = (document[:, None] == document) & (places[:, None] >= places)
    made = scaled_dot_product_attention(query, key, value, seen, scale=options.get("scaling"), enable_gqa=True)
    return made.transpose(1, 2), None


BORDERS: dict[int, Tensor] = {}


def baked_attention(
    *inputs: Any, cu_seq_lens_q: Tensor, document_lengths: tuple[int, ...], **options: Any
) -> tuple[Tensor, None]:
    """The same, but that what is recorded goes on with the borders of the first pack."""
    first = BORDERS.setdefault(len(cu_seq_lens_q), cu_seq_lens_q.clone())
    borders = first if isinstance(document_lengths, Untold) else cu_seq_lens_q
    return attention(*inputs, cu_seq_lens_q=borders, **options)


@pytest.fixture(autouse=True)
def registered() -> None:
    BORDERS.clear()
    register_attention()
    AttentionInterface.register(ON_DEVICE, attention)
    AttentionInterface.register(BAKED, baked_attention)


def pack_of(*lengths: int, seed: int = 0) -> Pack:
    """Documents of random tokens, of which about half are trained."""
    draw = np.random.default_rng(seed)
    boundaries = np.append(0, np.cumsum(lengths)).astype(np.int32)
    weights = draw.integers(0, 2, boundaries[-1]).astype(np.float32)
    weights[boundaries[:-1]] = 0
    return Pack(
        ids=draw.integers(3, 128, boundaries[-1]).astype(np.int32),
        positions=np.concatenate([np.arange(length) for length in lengths]).astype(np.int32),
        weights=weights,
        boundaries=boundaries,
        samples=np.arange(len(lengths), dtype=np.int64),
    )


STEPS = (
    [pack_of(9, 30, 20, seed=1), pack_of(25, 30, 5, seed=2), pack_of(7, seed=3)],
    [pack_of(10, 20, 30, seed=4), pack_of(31, 1, 28, seed=5), pack_of(5, seed=6)],
)
"""Packs of three sizes, of which those of the first come twice in the first step already."""


@pytest.mark.parametrize("lengths", [(9, 30, 20), (64,), (1, 1, 1), (63,), (40, 24), (3,) * 21])
def test_a_filled_pack_is_as_large_as_its_size_says(lengths: tuple[int, ...]):
    pack = pack_of(*lengths)
    size = Size.of(pack, BUDGET)
    made = filled(pack, size, CPU)
    assert made.ids.shape == made.positions.shape == made.weights.shape == (1, size.tokens)
    assert made.rows.shape == (size.trained,) and made.cu_seqlens.shape == (size.documents + 1,)
    assert sum(made.lengths) == size.tokens and max(made.lengths) <= size.longest == made.longest
    assert made.cu_seqlens[-1] == size.tokens and bool((made.cu_seqlens.diff() >= 0).all())
    assert made.cu_seqlens.diff()[made.cu_seqlens.diff() > 0].tolist() == list(made.lengths)
    assert made.rows[: int((pack.weights[1:] > 0).sum())].tolist() == np.flatnonzero(pack.weights[1:]).tolist()
    assert made.target_weights.sum() == pack.weights.sum()
    assert size.tokens <= len(pack) + BUDGET // 8 and size.trained <= pack.weights.sum() + BUDGET // 8


def test_a_pack_that_is_full_of_trained_tokens_is_left_as_it_is():
    pack = pack_of(64)
    pack.weights[1:] = 1
    size = Size.of(pack, BUDGET)
    assert (size.tokens, size.trained, size.documents) == (64, 63, 1)
    assert filled(pack, size, CPU).rows.tolist() == list(range(63))


def test_a_filled_pack_teaches_what_the_pack_teaches():
    model = tiny_model("llama").double()
    model.set_attn_implementation(DOCUMENTS)
    pack = pack_of(9, 30, 20)

    def learned(tensors: Any) -> list[Tensor]:
        model.zero_grad()
        total = CrossEntropy()(model, tensors).total
        total.backward()
        return [total.detach(), *[parameter.grad for parameter in model.parameters()]]

    for found, wanted in zip(
        learned(filled(pack, Size.of(pack, BUDGET), CPU)), learned(to_device(pack, CPU)), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def tried(work: Work) -> Work:
    """As a GPU does, work once before it is recorded."""
    work()
    return work


def steps_of(attend: str, record: Callable[[Work], Work]) -> tuple[Recorder, list[Tensor], list[Tensor]]:
    """The recorder after STEPS; what it found of each and of the weights, and what plain passes find."""
    found: list[Tensor] = []
    wanted: list[Tensor] = []
    model, plain = tiny_model("llama").double(), tiny_model("llama").double()
    model.set_attn_implementation(attend)
    plain.set_attn_implementation(DOCUMENTS)
    plain.load_state_dict(model.state_dict())
    masters = Masters(model.named_parameters())
    recorder = Recorder(model, CrossEntropy(), masters, BUDGET, CPU, SilentConsole(), record)
    for packs in STEPS:
        plain.zero_grad()
        for one, tensors, term in recorder.learn(packs, 3.0, lambda: None):
            assert term.losses is not None and tensors.target_weights.sum() == one.weights.sum()
            theirs = CrossEntropy()(plain, to_device(one, CPU))
            (theirs.total / 3.0).backward()
            assert theirs.losses is not None
            found += [term.total, term.losses]
            wanted += [theirs.total.detach(), theirs.losses]
        found += [weight.grad.clone() for weight in masters.weights.values()]
        wanted += [parameter.grad.clone() for parameter in plain.parameters()]
        masters.drop_gradients()
    return recorder, found, wanted


def test_what_is_replayed_learns_what_plain_passes_learn():
    recorder, found, wanted = steps_of(ON_DEVICE, tried)
    assert not recorder.refused and {size.tokens for size in recorder.sizes} == {64, 8}
    # In which order a pack's tokens are added up differs; in float64 that is all.
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def doubled(work: Work) -> Work:
    def replay() -> None:
        work()
        work()

    return replay


def failing(work: Work) -> Work:
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


@pytest.mark.parametrize(
    ("attend", "record", "reason"),
    [
        (ON_DEVICE, doubled, "its gradient is 100.0% off"),
        (ON_DEVICE, failing, "operation not permitted when stream is capturing"),
        (BAKED, tried, "its loss is"),
        (DOCUMENTS, tried, "the host reads how long documents are"),
    ],
    ids=["learns twice", "cannot be recorded", "told once", "steered by the host"],
)
def test_what_cannot_be_replayed_is_learned_by_passes(attend: str, record: Callable[[Work], Work], reason: str):
    recorder, found, wanted = steps_of(attend, record)
    assert reason in recorder.refused and not recorder.sizes
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_gradients_that_were_exchanged_for_others_are_not_lost():
    """As by AdaLoRA, which adds a term of its own to the gradients of a step and keeps the sums."""
    model = tiny_model("llama").double()
    model.set_attn_implementation(ON_DEVICE)
    masters, found = Masters(model.named_parameters()), []
    recorder = Recorder(model, CrossEntropy(), masters, BUDGET, CPU, SilentConsole(), tried)
    for _ in range(3):
        for _ in recorder.learn(STEPS[0], 3.0, lambda: None):
            pass
        found.append([weight.grad.clone() for weight in masters.weights.values()])
        is_replayed = bool(recorder.sizes)
        for weight in masters.weights.values():
            weight.grad = weight.grad + 1
        masters.drop_gradients()
        assert is_replayed == (len(found) == 1)
    assert recorder.refused == "gradients were exchanged for others between two steps"
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[2], found[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", ["full", "split masters", "lora", "other losses"])
def test_whole_steps_of_a_run_are_replayed(case: str, tiny_model_folder: Path, chat_file: Path, tmp_path: Path):
    """Masters, sums of each source and the update, in bfloat16, with gradients that stay where they are."""
    figures = []
    for is_recorded in (False, True):
        output = tmp_path / str(is_recorded)
        output.mkdir()
        run = assembled(case, CPU, tiny_model_folder, chat_file, output)
        run.model.set_attn_implementation(ON_DEVICE)
        if is_recorded:
            run.recorder = Recorder(run.model, run.objective, run.updater.masters, 128, CPU, SilentConsole(), tried)
        for number in (1, 2, 3):
            mean, norm = gradients(run, run.feed.batch(number, 0, 1))
            update(run)
            assert run.by_source is not None
            figures.append(torch.cat([torch.stack([mean, norm.to(mean.dtype)]), run.by_source.sums]))
    assert run.recorder is not None and run.recorder.sizes
    # Rounding to bfloat16 (2^-8) in packs of other lengths: seen to change a norm by 1 %.
    torch.testing.assert_close(torch.stack(figures[3:]), torch.stack(figures[:3]), rtol=0.03, atol=0.0)


def test_a_filled_pack_wants_starts_without_a_weight():
    pack = pack_of(5, 6)
    pack.weights[5] = 1
    with pytest.raises(ValueError, match="nothing predicts it"):
        filled(pack, Size.of(pack, BUDGET), CPU)


def test_a_recipe_for_a_cpu_is_refused(tiny_model_folder: Path, chat_file: Path):
    paths = {"model.path": str(tiny_model_folder), "data.path": str(chat_file), "output": "out"}
    recipe = build({**paths, "training.cuda_graphs": True, "processes.procs": 1})
    if not torch.cuda.is_available():
        found = TorchEngine().objections(recipe)
        assert found == ["training.cuda_graphs: needs a CUDA device, this run is on cpu. Write false."]


def test_attention_that_the_host_steers_is_not_recorded(tiny_model_folder: Path, chat_file: Path, tmp_path: Path):
    run = assembled("full", CPU, tiny_model_folder, chat_file, tmp_path)
    assert recorder_of(run) is None and not run.updater.masters.keeps_gradients
    asked = run.recipe.training.model_copy(update={"cuda_graphs": True})
    run.recipe, run.console = run.recipe.model_copy(update={"training": asked}), Noting()
    assert recorder_of(run) is None
    assert run.console.told == [
        "training.cuda_graphs: each pack runs operation by operation, since attention of this architecture is "
        "training_hub_documents, which is not for graphs"
    ]


class Noting(SilentConsole):
    def __init__(self) -> None:
        self.told: list[str] = []

    def say(self, text: str) -> None:
        self.told.append(text)


def test_numbers_are_taken_over_in_place():
    first, second = (filled(pack_of(9, 30, 20, seed=n), Size.of(pack_of(9, 30, 20), BUDGET), CPU) for n in (0, 1))
    places = [first.ids.data_ptr(), first.rows.data_ptr()]
    first.copy_(second)
    assert isinstance(first, FilledPack) and torch.equal(first.ids, second.ids)
    assert places == [first.ids.data_ptr(), first.rows.data_ptr()]
