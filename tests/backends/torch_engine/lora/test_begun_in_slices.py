"""An adapter made beside a model whose weights are read one by one is the adapter made beside the whole model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.backends.torch_engine.lora.learned import learned_adapter
from tests.backends.torch_engine.tiny_models import tiny_model
from tests.invariants.run import recipe
from training_hub.backends.torch_engine.adaptations.lora import Lora
from training_hub.backends.torch_engine.adaptations.lora.configs import KINDS_OF_LORA, REFUSED, TUNERS, _kinds
from training_hub.backends.torch_engine.loading.blank import plain_name, see_one_number
from training_hub.backends.torch_engine.loading.dividing import attach, filled, load_blank
from training_hub.backends.torch_engine.loading.model import LoadedModel, load_model
from training_hub.backends.torch_engine.loading.on_demand import OnDemand, hand_out
from training_hub.backends.torch_engine.parallel import ALONE
from training_hub.errors import RecipeError
from training_hub.monitoring.console import open_console

CPU = torch.device("cpu")

FIT_FOR_TINY: dict[str, dict[str, Any]] = {
    "c3a": {"options": {"block_size": 8}},
    "fourierft": {"options": {"n_frequency": 8}},
    "waveft": {"options": {"n_frequency": 8}},
    "road": {"options": {"group_size": 8}},
    "vblora": {"options": {"vector_length": 8, "num_vectors": 16, "topk": 2}},
    "miss": {"r": 4},
    "psoft": {"r": 4},
}
"""Settings without which a tuner does not go into matrices of 32 rows."""

BOTH = "a part of the weights, and whole modules"
BEGUN: dict[str, dict[str, Any]] = {
    **{tuner: {"tuner": tuner} for tuner in KINDS_OF_LORA},
    **{tuner: {"tuner": tuner, **FIT_FOR_TINY.get(tuner, {})} for tuner in TUNERS},
    **{name: {"options": {"init_lora_weights": name}} for name in ("gaussian", "orthogonal", "mica", "pissa_niter_4")},
    "whole modules": {"modules_to_save": ["lm_head", "layers.0.mlp"]},
    "rows of a table": {"trainable_tokens": [5, 7]},
    BOTH: {"tuner": "pissa", "modules_to_save": ["lm_head"]},
    "a part of the weights of tables, too": {"tuner": "pissa", "target_modules": ["q_proj", "lm_head"]},
}
LEFT = [case for case in BEGUN if case != "pissa_niter_4"]
LOOKING = {"dora", "pissa", "olora", "mica", "pissa_niter_4", "deft", "delora", "psoft", "supertuning", "tinylora",
           "ln_tuning", "rows of a table", BOTH, "a part of the weights of tables, too"}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("begun") / "model"
    tiny_model("llama", num_hidden_layers=1).save_pretrained(path)
    return path


@pytest.mark.parametrize("case", BEGUN)
def test_an_adapter_begins_alike_beside_weights_that_are_read_one_by_one(case, folder):
    """Bit for bit: what trains, what it keeps beside that, and what it leaves of weights that it takes a part from."""
    asked = recipe(folder, Path("rows.jsonl"), Path("out"), algorithm="lora_sft", lora=BEGUN[case])
    whole = load_model(asked, CPU, torch.bfloat16)
    Lora(asked).attach(whole.model)
    blank = load_blank(asked, CPU, torch.bfloat16)
    assert isinstance(blank, LoadedModel) and Lora(asked).begins_beside() == ""
    begun = attach(blank, Lora(asked), CPU)
    wanted, found = dict(whole.model.named_parameters()), dict(begun.model.named_parameters())
    assert {name: one.requires_grad for name, one in found.items()} == {
        name: one.requires_grad for name, one in wanted.items()
    }
    made = {name: one for name, one in found.items() if not one.is_meta}
    made |= dict(begun.model.named_buffers())
    wanted |= dict(whole.model.named_buffers())
    left = {name: begun.changed.held[plain_name(name)] for name in found if plain_name(name) in begun.changed.held}
    unlike = [name for name, one in {**made, **left}.items() if not torch.equal(one, wanted[name])]
    assert unlike == [] and all(found[name].dtype == wanted[name].dtype for name in found)
    assert ("read one by one" in " ".join(begun.notes)) == (case in LOOKING)
    assert bool(left) == (asked.lora.tuner in ("pissa", "olora") or case == "pissa_niter_4")


def numbers(adapted: Any) -> dict[str, torch.Tensor]:
    return {**dict(adapted.named_parameters()), **dict(adapted.named_buffers())}


QUICK = ("lora", "dora", "pissa", "olora", "ln_tuning", "psoft", "whole modules", "rows of a table", BOTH)


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in LEFT])
def test_one_that_goes_on_from_a_folder_does_so_too(case, folder, tmp_path):
    """With the part of the weights that PEFT takes out for it, and with modules of its own, read in pieces."""
    kept = learned_adapter(folder, tmp_path / "learned", BEGUN[case])
    asked = recipe(folder, Path("rows.jsonl"), Path("out"), algorithm="lora_sft", lora={"adapter": str(kept)})
    whole, adaptation = load_model(asked, CPU, torch.bfloat16), Lora(asked)
    adaptation.attach(whole.model)
    blank, other = load_blank(asked, CPU, torch.bfloat16), Lora(asked)
    assert isinstance(blank, LoadedModel) and other.begins_beside() == ""
    begun = attach(blank, other, CPU)
    model, base = begun.model, blank.base.shapes
    assert all(one.is_meta == (plain_name(name) in base) for name, one in model.named_parameters())
    filled(begun, 1, CPU, open_console("off"), is_offloaded=False)
    other.filled()
    hand_out(model, begun.changed, ALONE)
    other.divided()
    wanted, found = numbers(whole.model), numbers(model)
    assert found.keys() == wanted.keys()
    assert [name for name, one in found.items() if not torch.equal(one, wanted[name])] == []
    differences = [float(one.proofs()[0].measured) for one in (other, adaptation)]
    assert differences[0] == pytest.approx(differences[1], rel=0.11, abs=1e-3)


def test_what_changes_a_copy_that_is_not_there_yet_is_refused(folder):
    blank = load_blank(recipe(folder, Path("rows.jsonl"), Path("out")), CPU, torch.float32)
    assert isinstance(blank, LoadedModel)
    see_one_number(blank.model, CPU)
    with blank.base.opened() as came, OnDemand(blank.model, came), torch.no_grad():
        copied = copy.deepcopy(blank.model.lm_head)
        with pytest.raises(RecipeError, match=r"lm_head\.weight in a copy.*Leave the module out of lora"):
            copied.weight.mul_(2)


def test_every_tuner_that_trains_here_is_tried_so_but_one():
    """glora takes no linear layer but torch's own, and ours are others."""
    assert set(_kinds()) - {*REFUSED, "lora"} == {*TUNERS, "glora"}
