"""Whole runs with adapters: what trains, what is written, broken off and gone on with, the same in PEFT."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.backends.torch_engine.lora.learned import learned_adapter
from tests.backends.torch_engine.tiny_models import tiny_model
from tests.invariants.run import recipe
from tests.invariants.run import train as run_of
from tests.invariants.test_resume import EVERY_STEP, StopAt, held_in_step_4
from training_hub.backends.torch_engine.adaptations import ADAPTATIONS
from training_hub.backends.torch_engine.loading.model import load_model
from training_hub.backends.torch_engine.objectives.cross_entropy import check_head
from training_hub.backends.torch_engine.objectives.head import find_head
from training_hub.errors import CheckpointError, RecipeError, TrainingError
from training_hub.launch import run
from training_hub.types import TrainResult

peft = pytest.importorskip("peft")

SMALL = {"r": 4, "alpha": 8}


def asked(**sections: Any) -> dict[str, Any]:
    lora = sections.pop("lora", {})
    small = SMALL if not lora.keys() & {"tuner", "adapter"} else {}
    return {"algorithm": "lora_sft", "lora": {**small, **lora}, "optimizer": {"lr": 3e-3}, **sections}


def train(model: Path, data: Path, output: Path, watchers: Any = (), /, **sections: Any) -> TrainResult:
    return run_of(model, data, output, watchers, **asked(**sections))


def adapter_of(result: TrainResult) -> dict[str, torch.Tensor]:
    assert result.model_path is not None
    return load_file(result.model_path / "adapter_model.safetensors")


def same_adapters(one: TrainResult, other: TrainResult) -> bool:
    first, second = adapter_of(one), adapter_of(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def logits_in_peft(result: TrainResult, model: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # boft looks for a CUDA compiler, ln_tuning does not know RMSNorm
        loaded = peft.PeftModel.from_pretrained(base, result.model_path).eval()
    with torch.no_grad():
        return loaded(torch.arange(3, 60)[None]).logits


@pytest.fixture(scope="module")
def plain(tiny_model_folder, chat_file, tmp_path_factory) -> TrainResult:
    return train(tiny_model_folder, chat_file, tmp_path_factory.mktemp("lora") / "run", checkpoint=EVERY_STEP)


def test_the_loss_falls_and_a_checkpoint_holds_the_adapter_alone(plain):
    losses = [row["loss"] for row in plain.history]
    assert losses[-1] < losses[0] - 0.05
    saved = load_file(plain.checkpoints[-1] / "model.safetensors")
    assert all("lora_" in name for name in saved)
    assert len(saved) == 2 * 14
    assert plain.plan["trained_parameters"] == sum(tensor.numel() for tensor in saved.values())


def test_the_adapter_loads_in_peft_with_the_logits_that_the_run_measured(plain, tiny_model_folder):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    before = base(torch.arange(3, 60)[None]).logits
    after = logits_in_peft(plain, tiny_model_folder)
    assert (after - before).abs().max() > 0.01
    config = peft.PeftConfig.from_pretrained(plain.model_path)
    assert config.base_model_name_or_path == str(tiny_model_folder.resolve())
    assert (config.r, config.lora_alpha, config.inference_mode) == (4, 8, True)
    assert {path.name for path in plain.model_path.iterdir()} >= {"tokenizer.json", "chat_template.jinja"}
    assert not list(plain.model_path.glob("model*.safetensors"))


def test_the_plain_adapter_of_peft_itself_is_where_a_run_can_go_on(tiny_model_folder, chat_file, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(base, config)
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        wanted = theirs.eval()(torch.arange(3, 60)[None]).logits
    # Too small a rate to move a float32 number of 0.1: what comes out is what went in.
    kept = train(
        tiny_model_folder,
        chat_file,
        tmp_path / "run",
        lora={"adapter": str(tmp_path / "theirs")},
        optimizer={"lr": 1e-30},
    )
    torch.testing.assert_close(logits_in_peft(kept, tiny_model_folder), wanted, rtol=0, atol=1e-6)
    assert adapter_of(kept).keys() == load_file(tmp_path / "theirs" / "adapter_model.safetensors").keys()


@pytest.mark.parametrize("tuner", ["pissa", "olora"])
def test_an_adapter_of_peft_that_took_a_part_out_of_the_weights_is_where_one_can_go_on(
    tuner, tiny_model_folder, chat_file, tmp_path
):
    """PEFT takes the part out again where it loads the folder, and so is it done here; what comes out needs no more."""
    lora = {"tuner": tuner, "r": 4, "modules_to_save": ["lm_head"]}
    theirs = learned_adapter(tiny_model_folder, tmp_path / "theirs", lora)
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_folder), theirs).eval()
    with torch.no_grad():
        wanted = loaded(torch.arange(3, 60)[None]).logits
    kept = train(tiny_model_folder, chat_file, tmp_path / "run", lora={"adapter": str(theirs)}, optimizer={"lr": 1e-30})
    # A sum of products of twice the rank is rounded otherwise.
    torch.testing.assert_close(logits_in_peft(kept, tiny_model_folder), wanted, rtol=0, atol=1e-5)
    config = peft.PeftConfig.from_pretrained(kept.model_path)
    assert (config.r, config.init_lora_weights) == (8, True)


@pytest.mark.parametrize(
    ("begun", "quantization", "message"),
    [
        ("pissa_niter_4", "none", r"pissa_niter_4: what it took out.*drawn.*path_initial_model_for_weight_conversion"),
        ("corda", "none", r"corda: what it took out of the weights .* made of rows"),
        (
            "pissa",
            "int8",
            r"pissa: it stands beside weights.*int8 numbers do not allow.*quantization: none",
        ),
        ("olora", "int4", r"olora: it stands beside weights.*int4 numbers do not allow"),
    ],
)
def test_a_folder_whose_part_of_the_weights_cannot_be_had_again_is_refused(
    begun, quantization, message, tiny_model_folder, chat_file, tmp_path
):
    """Of a pretrained Llama of 260,000 numbers logits were 31 % off after pissa_niter_4 was drawn anew."""
    learned_adapter(tiny_model_folder, tmp_path / "theirs", {"r": 4})
    config = tmp_path / "theirs" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": begun}))
    lora, model = {"adapter": str(tmp_path / "theirs")}, {"quantization": quantization}
    with pytest.raises(RecipeError, match=message):
        train(tiny_model_folder, chat_file, tmp_path / "run", lora=lora, model=model)


TUNERS: dict[str, dict[str, Any]] = {
    "rslora": {"r": 4},
    "dora": {"r": 4},
    "pissa": {"r": 4, "alpha": 4},
    "olora": {"r": 4, "alpha": 4},
    "oft": {"options": {"oft_block_size": 8}},
    "boft": {"options": {"boft_block_size": 4}},
    "ia3": {},
    "vera": {"r": 8},
    "loha": {"r": 2, "alpha": 2},
    "hra": {"r": 2},
    "lokr": {"r": 2},
    "randlora": {},
    "delora": {"r": 2},
    "miss": {"r": 4},
    "ln_tuning": {"target_modules": ["input_layernorm", "norm"]},
}


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_tuner_by_name_starts_as_the_model_learns_and_loads_in_peft(tuner, tiny_model_folder, chat_file, tmp_path):
    # Two epochs at a rate at which even a few numbers show in the loss.
    result = train(
        tiny_model_folder,
        chat_file,
        tmp_path / "run",
        lora={"tuner": tuner, **TUNERS[tuner]},
        optimizer={"lr": 0.02},
        training={"epochs": 2},
    )
    proofs = {each["name"]: each for each in json.loads((tmp_path / "run" / "preflight.json").read_text())["proofs"]}
    assert proofs["the adapter begins as the model"]["status"] == "holds"
    assert proofs["saved and loaded gives the same logits"]["status"] == "holds"
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    before = base(torch.arange(3, 60)[None]).logits
    assert (logits_in_peft(result, tiny_model_folder) - before).abs().max() > 1e-4


@pytest.mark.parametrize(
    "changed",
    [{"data": {"packing": False}}, {"training": {"max_seq_len": 64, "max_tokens_per_gpu": 64}}],
    ids=["unpacked", "many small packs"],
)
def test_packing_and_accumulation_change_rounding_only(changed, plain, tiny_model_folder, chat_file, tmp_path):
    other = train(tiny_model_folder, chat_file, tmp_path / "run", **changed)
    for mine, theirs in zip(other.history, plain.history, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 and dropout": {"model": {"dtype": "bfloat16"}, "lora": {"dropout": 0.1}},
    "pissa": {"lora": {"tuner": "pissa", "r": 4, "alpha": 4}},
    "vera": {"lora": {"tuner": "vera", "r": 8}},
    "saved whole": {"lora": {"modules_to_save": ["lm_head"]}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_that_fails_goes_on_to_the_same_bits(name, tiny_model_folder, chat_file, tmp_path):
    changed = VARIANTS[name]
    whole = train(tiny_model_folder, chat_file, tmp_path / "whole", **changed)
    with pytest.raises(TrainingError, match="the plug was pulled"):
        train(tiny_model_folder, chat_file, tmp_path / "run", [StopAt(4)], checkpoint=EVERY_STEP, **changed)
    resumed = train(tiny_model_folder, chat_file, tmp_path / "run", checkpoint=EVERY_STEP, **changed)
    assert same_adapters(resumed, whole)
    assert [row["loss"] for row in resumed.history] == [row["loss"] for row in whole.history]


def test_kill_9_loses_nothing_that_was_saved(plain, tiny_model_folder, chat_file, tmp_path):
    wanted = recipe(tiny_model_folder, chat_file, tmp_path / "run", **asked(checkpoint=EVERY_STEP))
    held_in_step_4(wanted, lambda process: process.kill())
    assert same_adapters(run(wanted), plain)


def test_another_rank_in_the_folder_is_refused(plain, tiny_model_folder, chat_file):
    with pytest.raises(CheckpointError, match=r"lora\.r: was 4, now 2"):
        train(tiny_model_folder, chat_file, plain.output_dir, lora={"r": 2, "alpha": 8}, checkpoint=EVERY_STEP)


def test_the_base_keeps_its_format_and_its_bits(tiny_model_folder, chat_file, tmp_path):
    seen = {}

    class Look:
        def __call__(self, report: Any) -> None:
            import gc

            models = [o for o in gc.get_objects() if type(o).__name__ == "LlamaForCausalLM" and hasattr(o, "model")]
            seen.update({n: (p.dtype, p.requires_grad) for m in models for n, p in m.named_parameters()})

    train(tiny_model_folder, chat_file, tmp_path / "run", [Look()], model={"dtype": "bfloat16"})
    assert {dtype for dtype, _ in seen.values()} == {torch.bfloat16}
    assert {name for name, (_, trains) in seen.items() if trains} == {name for name in seen if "lora_" in name}


def test_a_head_that_is_saved_whole_is_trained_through_the_fused_loss(tiny_model_folder, chat_file, tmp_path):
    result = train(tiny_model_folder, chat_file, tmp_path / "run", lora={"modules_to_save": ["lm_head"]})
    saved = adapter_of(result)
    before = load_file(tiny_model_folder / "model.safetensors")["lm_head.weight"]
    assert (saved["base_model.model.lm_head.weight"] - before).abs().max() > 1e-3
    assert result.plan["trained_parameters"] == sum(tensor.numel() for tensor in saved.values())


HEADS: dict[str, dict[str, Any]] = {"chunked": {}, "dropout": {"dropout": 0.1}}


@pytest.mark.parametrize("name", HEADS)
def test_an_adapter_on_the_head_is_trained_through_the_fused_loss(name, tiny_model_folder, chat_file, tmp_path):
    lora = {"target_modules": ["q_proj", "lm_head"], **HEADS[name]}
    for dtype in ("float32", "bfloat16"):
        result = train(tiny_model_folder, chat_file, tmp_path / dtype, lora=lora, model={"dtype": dtype})
        proofs = json.loads((tmp_path / dtype / "preflight.json").read_text())["proofs"]
        # Among them that loss and gradients, the head's too, are those of PEFT's own layers and whole logits.
        assert {each["status"] for each in proofs} <= {"holds", "left out"}
        moved = adapter_of(result)["base_model.model.lm_head.lora_B.weight"]
        assert moved.abs().max() > 1e-3
        assert result.history[-1]["loss"] < result.history[0]["loss"]
    wanted = recipe(tiny_model_folder, chat_file, tmp_path / "head", **asked(lora=lora))
    model = ADAPTATIONS["lora"](wanted).attach(load_model(wanted, torch.device("cpu"), torch.float32).model)
    said = [str(check_head(model)), str(find_head(model.train()) is None)]
    # With dropout in training it is more than a sum of two products, and PEFT's own layer is asked.
    assert said == ["None", str(name == "dropout")]


@pytest.mark.parametrize("kept", [{"trainable_tokens": ["<|im_end|>", 7]}, {"modules_to_save": ["embed_tokens"]}])
def test_rows_of_a_tied_table_train_in_both_of_its_places(kept, tiny_model_folder, chat_file, tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(tiny_model_folder)
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(tmp_path / "tied")
    result = train(tmp_path / "tied", chat_file, tmp_path / "run", lora=kept)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    table = base.get_input_embeddings().weight.detach().clone()
    loaded = peft.PeftModel.from_pretrained(base, result.model_path)
    merged = loaded.merge_and_unload()
    inside, outside = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    assert torch.equal(inside, outside)
    moved = (inside != table).any(1).nonzero()[:, 0].tolist()
    ids = AutoTokenizer.from_pretrained(tmp_path / "tied").convert_tokens_to_ids(["<|im_end|>"])
    assert moved == sorted({7, *ids}) if "trainable_tokens" in kept else len(moved) > 100


def test_rows_of_a_table_that_is_not_the_head_train_in_one_place(tiny_model_folder, chat_file, tmp_path):
    result = train(tiny_model_folder, chat_file, tmp_path / "run", lora={"trainable_tokens": ["<|im_end|>"]})
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    before = [base.get_input_embeddings().weight.clone(), base.get_output_embeddings().weight.clone()]
    merged = peft.PeftModel.from_pretrained(base, result.model_path).merge_and_unload()
    inside, outside = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    end = base.config.eos_token_id
    assert (inside != before[0]).any(1).nonzero()[:, 0].tolist() == [end]
    assert torch.equal(outside, before[1])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "tuner": ({"tuner": "lorra"}, r"lora\.tuner: found 'lorra'; known: lora, .* Write lora\.tuner: lora"),
    "refused tuner": ({"tuner": "xlora"}, "xlora cannot be trained here: it mixes adapters"),
    "option": ({"options": {"layers_to_transfrom": [0]}}, r"has no field 'layers_to_transfrom'.*layers_to_transform\?"),
    "own option": ({"options": {"lora_dropout": 0.1}}, r"lora_dropout is a setting of its own: lora\.dropout"),
    "data option": ({"options": {"init_lora_weights": "eva"}}, "needs rows"),
    "no rank": ({"tuner": "ia3", "r": 8}, r"lora\.r: the tuner ia3 has none"),
    "idle option": ({"options": {"rank_pattern": {"nowhere": 2}}}, r"lora\.options: .*rank_pattern keys did not match"),
    "target": ({"target_modules": ["q_porj"]}, r"'q_porj' is the end of no module's name. Did you mean q_proj\?"),
    "pattern": ({"target_modules": "q_proj"}, r"matches none. For modules whose names end in it write \[q_proj\]"),
    "saved": ({"modules_to_save": ["lm_haed"]}, r"'lm_haed' .* Did you mean lm_head\?"),
    "token": ({"trainable_tokens": ["<|nowhere|>"]}, r"lora\.trainable_tokens: '<\|nowhere\|>' is not a token"),
    "adapter": ({"adapter": "nowhere"}, r"lora\.adapter: nowhere is not a folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_before_weights_are_read(name, tiny_model_folder, chat_file, tmp_path):
    wrong, message = WRONG[name]
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    content = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model.safetensors").write_bytes(content[: len(content) // 2] + b"\0" * (len(content) // 2))
    with pytest.raises(RecipeError, match=message):
        train(tmp_path / "model", chat_file, tmp_path / "run", lora=wrong)


def test_settings_of_lora_without_it_and_beside_an_adapter_are_refused(tiny_model_folder, chat_file, tmp_path):
    with pytest.raises(ValueError, match=r"lora\.r: 4 would change nothing while algorithm is sft"):
        recipe(tiny_model_folder, chat_file, tmp_path / "run", lora={"r": 4})
    with pytest.raises(ValueError, match=r"lora\.r: 4 beside lora\.adapter"):
        recipe(tiny_model_folder, chat_file, tmp_path / "run", algorithm="lora_sft", lora={"r": 4, "adapter": "a"})


def test_experts_of_a_mixture_get_adapters_that_peft_loads_and_merges(tiny_model_folder, chat_file, tmp_path):
    """PEFT warns of patterns that it wrote itself for experts; the proofs read the folder again."""
    model = tmp_path / "mixture"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tiny_model("qwen3-moe", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(model)
    tokenizer.save_pretrained(model)
    result = train(model, chat_file, tmp_path / "run", lora={"merge": True})
    learned = [name for name, tensor in adapter_of(result).items() if "experts" in name and "lora_B" in name]
    assert len(learned) == 4 and all(adapter_of(result)[name].any() for name in learned)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged", dtype=torch.float32)
    with torch.no_grad():
        said = merged(torch.arange(3, 60)[None]).logits
    assert torch.allclose(said, logits_in_peft(result, model), atol=1e-5)
