"""The teacher beside the student: what it takes, what it is asked, and what is kept of its word."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.backends.torch_engine.tiny_models import VOCABULARY, documents_of, random_pack, tiny_model
from training_hub.backends import Given
from training_hub.backends.shared.materials import Limits
from training_hub.backends.torch_engine.attention import DOCUMENTS, register_attention
from training_hub.backends.torch_engine.engine import TorchEngine
from training_hub.backends.torch_engine.materials import load_materials
from training_hub.backends.torch_engine.objectives.cross_entropy import CrossEntropy
from training_hub.backends.torch_engine.objectives.distillation import Distillation
from training_hub.backends.torch_engine.objectives.divergence import KINDS, Divergence
from training_hub.backends.torch_engine.objectives.token_loss import PLAIN
from training_hub.backends.torch_engine.planning.work import work_of
from training_hub.backends.torch_engine.teacher.facts import common_vocabulary
from training_hub.backends.torch_engine.teacher.form import Form
from training_hub.backends.torch_engine.teacher.kept import Kept
from training_hub.backends.torch_engine.teacher.online import Online
from training_hub.backends.torch_engine.teacher.teaching import open_teaching
from training_hub.backends.torch_engine.tensors import to_device
from training_hub.data import targets as target_files
from training_hub.data.tokenizer import ChatTokenizer
from training_hub.errors import RecipeError
from training_hub.monitoring.console import open_console
from training_hub.recipe import Recipe

register_attention()
CPU = torch.device("cpu")
SILENT = open_console("off")


def teacher_of(family: str, dtype: torch.dtype = torch.float64, **how: Any) -> Online:
    model = tiny_model(family, dtype, hidden_size=48).requires_grad_(False).eval()
    model.set_attn_implementation(DOCUMENTS)
    return Online(model, VOCABULARY, **{"through_head": True, "is_packed": True, **how})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("student", "teacher"), [("llama", "qwen3"), ("gemma2", "cohere"), ("cohere", "gemma2")])
def test_packed_is_alone_and_the_fast_form_is_the_plain_one(kind: str, student: str, teacher: str) -> None:
    """Of models of other widths, with capped and multiplied logits, and of teachers that cannot be packed."""
    model, pack = tiny_model(student, torch.float64), random_pack()
    model.set_attn_implementation(DOCUMENTS)
    divergence = Divergence(kind, 0.3, 2.0, 0.6)
    found = {}
    for name, how in (("fast", {}), ("alone", {"is_packed": False}), ("whole", {"through_head": False})):
        objective = Distillation(CrossEntropy(), divergence, PLAIN, teacher_of(teacher, **how))
        found[name] = float(objective(model, to_device(pack, CPU)).total.detach())
    objective = Distillation(CrossEntropy(), divergence, PLAIN, teacher_of(teacher))
    found["parts"] = sum(float(objective(model, to_device(one, CPU)).total.detach()) for one in documents_of(pack))
    found["plain"] = float(objective.plain_losses(model, to_device(pack, CPU)).sum().detach())
    general = Distillation(CrossEntropy(through_head=False), divergence, PLAIN, teacher_of(teacher))
    found["general"] = float(general(model, to_device(pack, CPU)).total.detach())
    for name, value in found.items():
        # transformers' RMSNorm computes in float32 even where the model is float64.
        assert value == pytest.approx(found["fast"], rel=1e-6), name


def test_a_teacher_forms_no_graph_and_gets_no_gradient() -> None:
    teacher, model = teacher_of("llama"), tiny_model("llama", torch.float64)
    model.set_attn_implementation(DOCUMENTS)
    Distillation(CrossEntropy(), Divergence(), PLAIN, teacher)(model, to_device(random_pack(), CPU)).total.backward()
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())


def asked(model: Path, data: Path, tmp_path: Path, **how: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "output": str(tmp_path / "out"),
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"path": str(data), "cache_dir": str(tmp_path / "kept")},
            "training": {"epochs": 1, "global_batch_size": 8, "max_seq_len": 256},
            "monitoring": {"console": "off"},
            "distillation": {"teacher": str(model), **how} if how != {"teacher": None} else {},
        }
    )


def test_the_plan_counts_the_teacher(tiny_model_folder: Path, chat_file: Path, tmp_path: Path) -> None:
    def planned(**how: Any) -> dict[str, Any]:
        return TorchEngine().plan(asked(tiny_model_folder, chat_file, tmp_path, **how), SILENT, measures=True)

    alone, online, kept = planned(teacher=None), planned(alpha=0.5), planned(cache="top_k", top_k=8)
    weights = 4 * alone["parameters"] / 2**30
    assert "teacher" not in alone["memory_gib"] and "teacher" not in alone
    assert weights < online["memory_gib"]["teacher"] < 4 * weights
    assert online["memory_gib"]["total"] - alone["memory_gib"]["total"] > weights
    assert kept["memory_gib"]["teacher"] < 0.5 * online["memory_gib"]["teacher"]
    assert online["teacher"]["common_tokens"] > 200 and online["teacher"]["cache"] == "none"


def test_the_meter_counts_the_teachers_forward(tiny_model_folder: Path, chat_file: Path, tmp_path: Path) -> None:
    from training_hub.backends.torch_engine.teacher.load import teacher_load
    from training_hub.data.packing import pack

    def load_of(**how: Any) -> tuple[Any, Any]:
        recipe = asked(tiny_model_folder, chat_file, tmp_path, **how)
        materials = load_materials(recipe, Given(), SILENT)
        store = materials.prepared.train
        one = pack([store[index] for index in range(3)], range(3))
        return teacher_load(recipe, materials.teacher, one, CPU), one

    load, one = load_of(alpha=0.5)
    student = work_of(tiny_model("llama"))
    assert work_of(tiny_model("llama"), learns=False).per_token == student.per_token / 3
    assert work_of(tiny_model("llama"), learns=False).per_pair[0][0] == student.per_pair[0][0] / 3
    longer, same = load_of(prompt="Count on.")
    assert 0 < load.operations(one) < longer.operations(same)
    assert 0 < load.passing < longer.passing
    assert load_of(cache="top_k")[0].operations(one) == 0


@pytest.mark.parametrize("cache", ["none", "top_k"])
def test_of_a_teacher_in_slices_a_process_has_and_sends_a_share(
    cache: str, tiny_model_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    from training_hub.backends.torch_engine.layouts.share import Share, Sizes
    from training_hub.backends.torch_engine.teacher.load import teacher_load
    from training_hub.data.packing import pack

    recipe = asked(tiny_model_folder, chat_file, tmp_path, cache=cache)
    materials = load_materials(recipe, Given(), SILENT)
    one = pack([materials.prepared.train[0]], [0])
    whole, half = (teacher_load(recipe, materials.teacher, one, CPU, Share(slices=slices)) for slices in (1, 2))
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    sizes, head = Sizes.of(model), model.get_output_embeddings().weight.numel()
    gathered, width = sizes.around + 2 * sizes.block, 4
    assert whole.sent == 0
    if cache == "none":
        assert half.beside == whole.beside + (head - sizes.total // 2) * width
        assert half.passing == whole.passing + gathered * width
        assert half.sent == sizes.total * width / 2
    else:
        assert half.beside == whole.beside
        assert half.before == whole.before + (gathered - sizes.total // 2) * width


@pytest.mark.parametrize("cache", ["none", "top_k"])
def test_of_a_split_vocabulary_a_process_makes_a_slice_of_each_chunk(
    cache: str, tiny_model_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    from training_hub.backends.torch_engine.layouts.share import Share
    from training_hub.backends.torch_engine.teacher.load import teacher_load
    from training_hub.data.packing import pack

    recipe = asked(tiny_model_folder, chat_file, tmp_path, cache=cache)
    materials = load_materials(recipe, Given(), SILENT)
    one = pack([materials.prepared.train[0]], [0])
    shares = (Share(), Share(heads=2), Share(heads=2, gathers_head=True))
    whole, split, gathered = (teacher_load(recipe, materials.teacher, one, CPU, share) for share in shares)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    logits = int((one.weights != 0).sum()) * model.config.vocab_size
    assert gathered == whole and whole.chunk == (4 * logits if cache == "none" else 0)
    # The student's own two are counted with it; of a vocabulary that is odd the first process has one more.
    assert split.chunk == pytest.approx(4 * logits / 2 * (8.25 - 2 if cache == "none" else 2), rel=0.01)
    assert split.beside == whole.beside


def test_what_was_asked_is_not_asked_again_after_a_stop(
    tiny_model_folder: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_files, "ROWS_PER_PART", 100)
    recipe = asked(tiny_model_folder, chat_file, tmp_path, cache="sampled", samples=5)
    materials = load_materials(recipe, Given(), SILENT)
    store, written = materials.prepared.train, []
    write = target_files.write_part

    def stopped(folder: Path, number: int, *rest: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(number)
        write(folder, number, *rest)

    from training_hub.backends.torch_engine.teacher import kept, teaching

    monkeypatch.setattr(kept, "write_part", stopped)
    with pytest.raises(KeyboardInterrupt):
        open_teaching(recipe, materials.teacher, store, CPU, SILENT)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("part-*/ids.bin")}
    assert len(made) == 2
    monkeypatch.setattr(kept, "write_part", write)
    seen = []
    load = teaching.load_teacher
    monkeypatch.setattr(teaching, "load_teacher", lambda *given: seen.append(load(*given)) or seen[-1])
    found = open_teaching(recipe, materials.teacher, store, CPU, SILENT)
    gone = weakref.ref(seen.pop().model)
    gc.collect()
    assert gone() is None  # before the student is loaded
    assert isinstance(found, Kept)
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache_dir": str(tmp_path / "other")})})
    unbroken = open_teaching(other, materials.teacher, store, CPU, SILENT)
    assert isinstance(unbroken, Kept)
    every = range(len(store))
    assert np.array_equal(found.store.rows(every).ids, unbroken.store.rows(every).ids)
    assert len(found.store.rows(every).ids) == int(store.trained_tokens.sum())


def test_rows_of_samples_come_in_the_order_asked(tmp_path: Path) -> None:
    counts = [np.array([2, 0, 3]), np.array([1, 4])]
    at = 0
    for number, each in enumerate(counts):
        ids = np.arange(at, at + each.sum())[:, None].repeat(2, 1)
        target_files.write_part(tmp_path, number, target_files.Rows(ids, None, ids[:, 0]), each)
        at += each.sum()
    store = target_files.TargetStore(tmp_path, [0, 3, 5], width=2)
    assert store.rows([4, 0, 1, 3]).last.tolist() == [6, 7, 8, 9, 0, 1, 5]
    assert store.rows([2]).ids.tolist() == [[2, 2], [3, 3], [4, 4]]


def test_likeliest_tokens_and_the_rest_are_all_there_is() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    form = Form("top_k", 5, 50, 2.0, 0)
    from training_hub.backends.torch_engine.objectives.targets import WholeTargets

    ids, logs, tails = form.kept(WholeTargets(50, logits_NV=logits), 6, torch.Generator())
    assert logs is not None
    torch.testing.assert_close(logs.exp().sum(-1) + tails, torch.ones(6))
    assert torch.equal(ids, logits.topk(5).indices)


def test_padding_beyond_the_tokenizer_may_differ_but_no_token_may_lack(tiny_model_folder: Path) -> None:
    from training_hub.recipe.sections import Model

    tokenizer, chosen = ChatTokenizer.load(str(tiny_model_folder)), Model(path=str(tiny_model_folder))
    size = tokenizer.vocab_size
    for theirs, ours, common in ((size + 64, size, size), (size, size + 64, size), (size + 8, size + 64, size + 8)):
        assert common_vocabulary(chosen, Limits(theirs, None, False), tokenizer, ours) == common
    with pytest.raises(RecipeError, match="the teacher has logits for"):
        common_vocabulary(chosen, Limits(size - 1, None, False), tokenizer, size)
