"""What no training has moved leaves a run bit for bit as it came in, whatever is computed in; what trains begins there.

The tiny model is random in float32, so that bfloat16 holds few of its numbers. A learning rate of 1e-30 moves none.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.backends.torch_engine.tiny_models import FAMILIES
from tests.invariants.run import final_weights, recipe, train
from tests.invariants.test_families import folder_of
from training_hub.backends import Given
from training_hub.errors import TrainingError
from training_hub.launch import run

STILL = {"lr": 1e-30, "weight_decay": 0.0}
LOW = {"dtype": "bfloat16"}
TWO_STEPS = {"steps": 2}
OSFT = {"algorithm": "osft", "osft": {"unfreeze_rank_ratio": 0.5, "cache": False}}


def same(one, other) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def base_weights(folder: Path):
    return load_file(folder / "model.safetensors")


def lossy(folder: Path) -> list[str]:
    """Weights of which bfloat16 holds only the rounding."""
    return [name for name, one in base_weights(folder).items() if not torch.equal(one.bfloat16().to(one.dtype), one)]


def written_as(folder: Path, target: Path, formats) -> Path:
    """The model with each weight in the format that `formats` gives its name."""
    shutil.copytree(folder, target)
    weights = {name: one.to(formats(name)) for name, one in base_weights(folder).items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("state", ["full", "split", "8bit"])
def test_masters_begin_from_the_files_however_they_are_kept(state, tiny_model_folder, chat_file, tmp_path):
    settings = {"model": LOW, "optimizer": {**STILL, "state": state}, "training": TWO_STEPS}
    result = train(tiny_model_folder, chat_file, tmp_path / "run", **settings, checkpoint={"interval": 1})
    base, masters = base_weights(tiny_model_folder), load_file(result.checkpoints[-1] / "model.safetensors")
    assert len(lossy(tiny_model_folder)) > 10
    assert masters.keys() == base.keys() == final_weights(result).keys()
    assert all(same(masters[name], one) and same(final_weights(result)[name], one) for name, one in base.items())


def test_frozen_weights_are_written_as_they_came_and_trained_ones_as_their_masters(
    tiny_model_folder, chat_file, tmp_path
):
    settings = {"model": LOW, "freezing": {"blocks": 1, "embeddings": True}, "checkpoint": {"interval": 2}}
    result = train(tiny_model_folder, chat_file, tmp_path / "run", **settings, training=TWO_STEPS)
    base, final = base_weights(tiny_model_folder), final_weights(result)
    masters = load_file(result.checkpoints[-1] / "model.safetensors")
    frozen = base.keys() - masters.keys()
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"} <= frozen & set(lossy(tiny_model_folder))
    assert all(same(final[name], base[name]) for name in frozen)
    assert all(same(final[name], one) and not torch.equal(one, base[name]) for name, one in masters.items())


def test_an_adapter_is_merged_into_the_weights_that_came(tiny_model_folder, chat_file, tmp_path):
    pytest.importorskip("peft")
    lora = {"r": 2, "alpha": 4, "target_modules": ["q_proj"], "merge": True}
    settings = {"algorithm": "lora_sft", "model": LOW, "lora": lora, "optimizer": {"lr": 1e-2}}
    result = train(tiny_model_folder, chat_file, tmp_path / "run", **settings, training=TWO_STEPS)
    base, merged = base_weights(tiny_model_folder), load_file(result.model_path.parent / "merged" / "model.safetensors")
    adapter = load_file(result.model_path / "adapter_model.safetensors")
    for name, came in base.items():
        key = "base_model.model." + name.removesuffix(".weight")
        if f"{key}.lora_B.weight" not in adapter:
            assert same(merged[name], came), name
            continue
        added = 2 * adapter[f"{key}.lora_B.weight"].double() @ adapter[f"{key}.lora_A.weight"].double()
        assert added.abs().max() > 1e-4
        # One rounding to float32 of products of two terms: bfloat16 would be off by 1e-3 of each number.
        torch.testing.assert_close(merged[name].double(), came.double() + added, rtol=1e-6, atol=1e-8)


def test_a_whole_module_beside_an_adapter_begins_from_the_files(tiny_model_folder, chat_file, tmp_path):
    pytest.importorskip("peft")
    lora = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    settings = {"algorithm": "lora_sft", "model": LOW, "lora": lora, "optimizer": STILL, "training": TWO_STEPS}
    result = train(tiny_model_folder, chat_file, tmp_path / "run", **settings)
    adapter = load_file(result.model_path / "adapter_model.safetensors")
    assert "lm_head.weight" in lossy(tiny_model_folder)
    assert same(adapter["base_model.model.lm_head.weight"], base_weights(tiny_model_folder)["lm_head.weight"])


@pytest.mark.parametrize("others", ["train", "freeze"])
def test_osft_goes_on_from_the_weights_that_came(others, tiny_model_folder, chat_file, tmp_path):
    settings = {**OSFT, "osft": {**OSFT["osft"], "others": others}, "model": LOW, "training": TWO_STEPS}
    still = train(tiny_model_folder, chat_file, tmp_path / "still", **settings, optimizer=STILL)
    base = base_weights(tiny_model_folder)
    assert final_weights(still).keys() == base.keys()
    assert all(same(final_weights(still)[name], one) for name, one in base.items())
    moved = final_weights(train(tiny_model_folder, chat_file, tmp_path / "moved", **settings, optimizer={"lr": 1e-3}))
    key = "model.layers.0.mlp.up_proj.weight"
    # Half of all directions are kept, and D lies in the others: rounding the start to bfloat16 would fill them all.
    change = torch.linalg.svdvals(moved[key].double() - base[key].double())
    assert change[0] > 1e-4 and change[len(change) // 2 :].max() < 1e-3 * change[0]


def test_osft_resumes_from_float32_starts_bit_for_bit(tiny_model_folder, chat_file, tmp_path):
    class StopAt:
        def __call__(self, report) -> None:
            if report.step == 2:
                raise KeyError("the plug was pulled")

    settings = {**OSFT, "model": LOW, "optimizer": {"lr": 1e-3}, "training": {"steps": 4}}
    settings["checkpoint"] = {"interval": 1}
    unbroken = train(tiny_model_folder, chat_file, tmp_path / "unbroken", **settings)
    with pytest.raises(TrainingError, match="the plug was pulled"):
        train(tiny_model_folder, chat_file, tmp_path / "run", [StopAt()], **settings)
    resumed = train(tiny_model_folder, chat_file, tmp_path / "run", **settings)
    assert all(same(final_weights(resumed)[name], one) for name, one in final_weights(unbroken).items())
    assert [row["loss"] for row in resumed.history] == [row["loss"] for row in unbroken.history]


@pytest.mark.parametrize(
    ("formats", "computed"),
    [
        (lambda name: torch.float32 if "norm" in name else torch.bfloat16, "bfloat16"),
        (lambda name: torch.float16, "bfloat16"),
        (lambda name: torch.float64, "float32"),
        (lambda name: torch.float64, "bfloat16"),
    ],
    ids=["float32 norms among bfloat16", "float16 in bfloat16", "float64 in float32", "float64 in bfloat16"],
)
def test_each_weight_that_stays_keeps_its_own_format(formats, computed, tiny_model_folder, chat_file, tmp_path):
    jittered = tmp_path / "jittered"
    shutil.copytree(tiny_model_folder, jittered)
    noise = {name: one * (1 + 1e-4 * torch.randn_like(one)) for name, one in base_weights(tiny_model_folder).items()}
    save_file(noise, jittered / "model.safetensors", metadata={"format": "pt"})
    folder = written_as(jittered, tmp_path / "base", lambda name: torch.float64)
    wide = {name: one * (1 + 1e-10 * torch.randn_like(one)) for name, one in base_weights(folder).items()}
    save_file({name: one.to(formats(name)) for name, one in wide.items()}, folder / "model.safetensors")
    settings = {"model": {"dtype": computed}, "optimizer": STILL, "training": TWO_STEPS}
    final = final_weights(train(folder, chat_file, tmp_path / "run", **settings, freezing={"blocks": 1}))
    assert all(same(final[name], one) for name, one in base_weights(folder).items())


def test_a_format_that_is_asked_for_is_rounded_to_once(tiny_model_folder, chat_file, tmp_path):
    settings = {"model": {**LOW, "save_dtype": "float16"}, "optimizer": STILL, "freezing": {"blocks": 1}}
    final = final_weights(train(tiny_model_folder, chat_file, tmp_path / "run", **settings, training=TWO_STEPS))
    assert all(same(final[name], one.half()) for name, one in base_weights(tiny_model_folder).items())


OTHERWISE = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "llama-tied", "granitemoe"])
def test_families_whose_files_name_weights_otherwise_begin_there_too(
    family, tiny_model_folder, chat_file, tmp_path, monkeypatch
):
    """Of Granite, transformers makes experts of what the files hold, in a way of its own: it reads them twice."""
    monkeypatch.setitem(FAMILIES, "granitemoe", ("GraniteMoeConfig", OTHERWISE))
    folder = folder_of(family, tiny_model_folder, tmp_path / "model")
    base = base_weights(folder)  # the row of the padding token is 0, which even this rate moves
    filled = {name: torch.where(one == 0, 1 / 3, one) for name, one in base.items()}
    save_file(filled, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"model": LOW, "optimizer": STILL, "training": TWO_STEPS}
    final = final_weights(train(folder, chat_file, tmp_path / "run", **settings))
    assert all(same(final[name], one) for name, one in base_weights(folder).items())


def test_a_live_model_is_trained_from_what_it_held(tiny_model_folder, chat_file, tmp_path):
    live = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    settings = {"model": LOW, "optimizer": STILL, "freezing": {"blocks": 1}, "training": TWO_STEPS}
    wanted = recipe(tiny_model_folder, chat_file, tmp_path / "run", **settings)
    final = final_weights(run(wanted, Given(model=live)))
    assert all(same(final[name], one) for name, one in base_weights(tiny_model_folder).items())


def test_a_base_that_is_gone_at_the_end_costs_its_precision_and_that_is_said(
    tiny_model_folder, chat_file, tmp_path, capsys
):
    folder = tmp_path / "base"
    shutil.copytree(tiny_model_folder, folder)

    def remove_base(report) -> None:
        if report.step == 2:
            (folder / "model.safetensors").unlink()

    settings = {"model": LOW, "freezing": {"blocks": 1}, "training": TWO_STEPS, "monitoring": {"console": "plain"}}
    final = final_weights(train(folder, chat_file, tmp_path / "run", [remove_base], **settings))
    assert "cannot be read any more" in capsys.readouterr().out
    name = "model.layers.0.mlp.up_proj.weight"
    assert same(final[name], base_weights(tiny_model_folder)[name].bfloat16().float())
