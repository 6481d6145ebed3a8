"""What is frozen stays and costs nothing, what is unfrozen later begins then: as in the torch engine, and resumed."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.backends.jax_engine.tiny import read, saved
from tests.backends.torch_engine.tiny_models import tiny_model
from tests.invariants.run import train
from training_hub.backends.jax_engine.freezing import parts_of, tables_of
from training_hub.backends.shared.freezing import Parts, Turns, frozen_keys
from training_hub.backends.torch_engine.freezing import Thaw, freeze, turns_of
from training_hub.backends.torch_engine.optimizers.library import table_names
from training_hub.errors import RecipeError, TrainingError
from training_hub.recipe.freezing import Freezing

STAYS = {"blocks": 1, "embeddings": True, "weights": ["layers.1.*.q_proj", "norm"]}
GRADUAL = {"unfreeze_interval": 2, "weights": ["layers.0.*.k_proj"]}
EVERY_STEP = {"interval": 1, "keep_last": None, "minutes": None}

SETTINGS = (
    {"blocks": 1},
    {"embeddings": True},
    {"weights": ["lm_head"]},
    {"weights": ["mlp", "*.0.*"]},
    {"blocks": 1, "weights": ["*norm*", "ln_*", "experts"]},
)


class StopAt:
    def __init__(self, step: int):
        self.step = step

    def __call__(self, report: Any) -> None:
        if report.step == self.step:
            raise KeyError("the plug was pulled")


def losses(result: Any) -> np.ndarray:
    return np.array([row["loss"] for row in result.history])


def refused_or(what: Callable[..., Any], *given: Any) -> Any:
    try:
        return what(*given)
    except RecipeError:
        return "refused"


def named(parts: Parts, keys: Collection[str]) -> set[str]:
    return {name for name, key in parts.names if key in keys}


def without_gradient(model: Any) -> set[str]:
    return {name for name, one in model.named_parameters(remove_duplicate=False) if not one.requires_grad}


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "mixtral", "qwen3-moe"])
def test_settings_mean_what_they_mean_in_the_torch_engine(family: str, tmp_path: Path):
    saved(family, tmp_path)
    shape, _ = read(tmp_path)
    parts = parts_of(shape)
    for settings in map(Freezing.model_validate, SETTINGS):
        model = tiny_model(family)
        known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        assert {name for name, _ in parts.names} == known
        frozen, is_refused = refused_or(frozen_keys, parts, settings), refused_or(freeze, model, settings) == "refused"
        assert (frozen == "refused") == is_refused
        if is_refused:
            continue
        assert named(parts, frozen) == without_gradient(model)
        asked = settings.model_copy(update={"unfreeze_interval": 3, "unfrozen_blocks": 0})
        turns, thaw = Turns.of(parts, asked, frozen), Thaw(model, turns_of(model, asked))
        for step in (1, 3, 4, 7, 10, 100):
            thaw.begin(step)
            assert named(parts, {*frozen, *turns.waiting(step)}) == without_gradient(model)
    tables = named(parts, tables_of(shape))
    assert tables - {"lm_head.weight"} == table_names(tiny_model(family)) - {"lm_head.weight"}


def test_what_stays_has_no_moments_and_the_rest_learns_as_in_the_torch_engine(tiny_model_folder, chat_file, tmp_path):
    """The first loss to 1e-5, all of twenty to 1e-4, in float32."""
    asked = {"freezing": STAYS, "training": {"steps": 20, "preflight": False}, "checkpoint": {"interval": 20}}
    ours, theirs = (
        train(tiny_model_folder, chat_file, tmp_path / name, backend=name, **asked) for name in ("jax", "torch")
    )
    assert abs(losses(ours) - losses(theirs))[0] <= 1e-5 and abs(losses(ours) - losses(theirs)).max() <= 1e-4
    before = load_file(tiny_model_folder / "model.safetensors")
    after, other = (load_file(one.model_path / "model.safetensors") for one in (ours, theirs))
    stayed = {name for name in before if before[name].tobytes() == after[name].tobytes()}
    assert stayed == {name for name in before if before[name].tobytes() == other[name].tobytes()}
    assert len(stayed) == 9 + 1 + 1 + 1  # block 0, one of block 1's matrices, the last norm, the embeddings
    for file in ("model", "optimizer"):
        kept, wanted = (load_file(one.checkpoints[-1] / f"{file}.safetensors") for one in (ours, theirs))
        assert kept.keys() == wanted.keys()
        assert not stayed & {name.split("/")[0] for name in kept}
    assert ours.plan["trained_parameters"] == theirs.plan["trained_parameters"]


def test_a_name_that_is_not_there_is_refused_before_weights_are_read(tiny_model_folder, chat_file, tmp_path):
    with pytest.raises(RecipeError) as caught:
        train(tiny_model_folder, chat_file, tmp_path, backend="jax", freezing={"weights": ["q_porj"], "blocks": 3})
    assert "'q_porj' is in none of the names" in str(caught.value)
    assert "found 3; the model has 2" in str(caught.value)


@pytest.fixture(scope="module")
def gradual(tiny_model_folder, chat_file, tmp_path_factory):
    """Unbroken runs by engine: block 1 from the first step, block 0 from step 3, the embeddings from step 5."""
    folder = tmp_path_factory.mktemp("gradual")
    return {name: train(tiny_model_folder, chat_file, folder / name, **thawing(name)) for name in ("jax", "torch")}


def thawing(backend: str) -> dict[str, Any]:
    return {"backend": backend, "freezing": GRADUAL, "training": {"steps": 20}, "checkpoint": EVERY_STEP}


@pytest.mark.slow
def test_weights_that_begin_later_learn_as_in_the_torch_engine(gradual):
    """The first loss to 1e-5, all of twenty to 1e-4, in float32; norms of gradients are over what trains."""
    ours, theirs = gradual["jax"], gradual["torch"]
    assert abs(losses(ours) - losses(theirs))[0] <= 1e-5 and abs(losses(ours) - losses(theirs)).max() <= 1e-4
    norms = [[row["grad_norm"] for row in one.history] for one in (ours, theirs)]
    assert np.allclose(norms[0], norms[1], rtol=1e-3)
    for step in (2, 3, 5):
        folders = [one.output_dir / "checkpoints" / f"step-{step}" for one in (ours, theirs)]
        kept, wanted = (load_file(folder / "optimizer.safetensors") for folder in folders)
        assert kept.keys() == wanted.keys()
        assert all(kept[name] == wanted[name] for name in kept if name.endswith("/step"))
    assert ours.plan["frozen_at_first"] == theirs.plan["frozen_at_first"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4])
def test_a_run_goes_on_bit_for_bit_where_the_next_begins(gradual, tiny_model_folder, chat_file, tmp_path, step):
    with pytest.raises(TrainingError, match="the plug was pulled"):
        train(tiny_model_folder, chat_file, tmp_path / "run", [StopAt(step + 1)], **thawing("jax"))
    resumed, unbroken = train(tiny_model_folder, chat_file, tmp_path / "run", **thawing("jax")), gradual["jax"]
    assert losses(resumed).tolist() == losses(unbroken).tolist()
    one, other = (load_file(each.model_path / "model.safetensors") for each in (resumed, unbroken))
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [("jax", "torch"), ("torch", "jax")])
def test_either_engine_goes_on_while_some_wait(gradual, tiny_model_folder, chat_file, tmp_path, first, then):
    """To 1e-5 of the run that one engine made alone, over the steps in which the others begin."""
    with pytest.raises(TrainingError):
        train(tiny_model_folder, chat_file, tmp_path / "run", [StopAt(4)], **thawing(first))
    resumed = train(tiny_model_folder, chat_file, tmp_path / "run", **thawing(then))
    assert resumed.engine == then
    assert abs(losses(resumed) - losses(gradual[then])).max() <= 1e-5
