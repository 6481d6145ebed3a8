"""An adapter that is made of weights is made under the eyes of who waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.backends.torch_engine.tiny_models import tiny_model
from tests.invariants.run import recipe
from training_hub.backends.torch_engine.adaptations.lora import Lora
from training_hub.backends.torch_engine.loading.blank import fill, plain_name
from training_hub.backends.torch_engine.loading.dividing import attach, load_blank
from training_hub.backends.torch_engine.loading.model import LoadedModel, load_model
from training_hub.backends.torch_engine.loading.on_demand import hand_out
from training_hub.backends.torch_engine.parallel import ALONE
from training_hub.backends.torch_engine.saving.tensor_files import opened
from training_hub.errors import RecipeError
from training_hub.monitoring.console import SilentConsole

CPU = torch.device("cpu")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Noting(SilentConsole):
    """Remembers each count of a progress, and how many there were to be."""

    def __init__(self) -> None:
        self.counts: list[float] = []
        self.said: tuple[float | None, str] | None = None

    @contextmanager
    def progress(self, what: str, total: float | None = None, unit: str = "rows") -> Iterator[Callable[[float], None]]:
        self.said = (total, unit)
        yield lambda count: self.counts.append(sum(self.counts[-1:]) + count)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("passing") / "model"
    tiny_model("llama").save_pretrained(path)
    return path


def heard(folder: Path, *, is_whole: bool, **lora: object) -> tuple[Noting, list[str]]:
    """What the console is told while an adapter is put in, and the names of the model's weights."""
    asked, console = recipe(folder, Path("rows.jsonl"), Path("out"), algorithm="lora_sft", lora=lora), Noting()
    loaded = load_model(asked, CPU, torch.bfloat16) if is_whole else load_blank(asked, CPU, torch.bfloat16)
    assert isinstance(loaded, LoadedModel)
    names = [name for name, _ in loaded.model.named_parameters()]
    attach(loaded, Lora(asked), CPU, console=console)
    return console, names


@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "in slices"])
@pytest.mark.parametrize("tuner", ["pissa", "olora", "dora"])
def test_weights_that_were_passed_are_counted_before_each_that_is_computed_with(tuner, is_whole, folder):
    console, names = heard(folder, is_whole=is_whole, tuner=tuner)
    looked = [place for place, name in enumerate(names) if name.split(".")[-2] in PROJECTIONS]
    assert len(looked) == 14 and console.said == (len(names), "weights")
    assert console.counts == [*looked, len(names)]


@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "in slices"])
def test_an_adapter_of_random_numbers_looks_at_no_weight(is_whole, folder):
    """So all are passed at once; what PEFT asks of every weight before it begins is no progress."""
    console, names = heard(folder, is_whole=is_whole, tuner="lora")
    assert console.counts == [len(names)]


def test_weights_that_stay_as_they_are_count_as_passed(folder):
    """The time left follows from all that lies before and behind, whichever of it is decomposed."""
    console, names = heard(folder, is_whole=True, tuner="pissa", target_modules=["down_proj"])
    assert console.counts == [*(names.index(f"model.layers.{n}.mlp.down_proj.weight") for n in (0, 1)), len(names)]


def test_weights_that_are_handed_out_are_counted(folder):
    asked = recipe(folder, Path("rows.jsonl"), Path("out"), algorithm="lora_sft", lora={"tuner": "pissa"})
    blank = load_blank(asked, CPU, torch.float32)
    assert isinstance(blank, LoadedModel)
    begun = attach(blank, Lora(asked), CPU)
    left, told = dict(begun.changed.held), []
    with opened(blank.files) as files:
        fill(begun.model, blank.base.named(files), CPU, is_offloaded=False)
    hand_out(begun.model, begun.changed, ALONE, told.append)
    assert len(left) == 14 and told == [1] * 14 and begun.changed.held == {}
    found = {plain_name(name): one for name, one in begun.model.named_parameters()}
    assert all(torch.equal(found[name], one) for name, one in left.items())


def test_what_cannot_be_put_in_does_not_end_as_done(folder):
    lora = {"target_modules": ["act_fn"]}
    asked, console = recipe(folder, Path("rows.jsonl"), Path("out"), algorithm="lora_sft", lora=lora), Noting()
    with pytest.raises(RecipeError, match="cannot be put into this model"):
        attach(load_model(asked, CPU, torch.bfloat16), Lora(asked), CPU, console=console)
    assert console.said is not None and console.counts == []
