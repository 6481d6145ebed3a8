"""Bad inputs 75 to 86: tokenizers, templates and model folders."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bad_inputs.desk import DATA, GOOD, RECIPE, Case, Desk, chat, refuses, run, trains
from tests.data.tiny import THINKING

ASK, ANSWER = ("user", "Is it warm in Paris?"), ("assistant", "Yes, very.")
TALK = chat(ASK, ANSWER, ("user", "And now?"), ("assistant", "Still."))
SYNTAX = "{% for m in messages %}\n{{ m.content }\n{% endfor %}"
RAISES = "{% if messages|length > 2 %}{{ raise_exception('one question at a time') }}{% endif %}" + THINKING
DROPS = "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
NO_STOP = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
ENDLESS = "{% for a in range(90000) %}{% for b in range(90000) %}{{ '' }}{% endfor %}{% endfor %}"
LARGE = "{{ 'a' * 200000000 }}{% for m in messages %}{{ m.content }}{% endfor %}"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def with_template(case: Callable[..., Case], number: int, name: str, source: str, *words: str) -> tuple[Case, str]:
    return case(number, name, [GOOD, TALK], *words), source


TEMPLATES = (
    with_template(refuses, 76, "template raises", RAISES, "line 2: message 3 (user)", "one question at a time"),
    with_template(refuses, 77, "template syntax", SYNTAX, "template.jinja", "line 2"),
    with_template(
        refuses, 78, "template drops text", DROPS, "line 1: message 1 (user): the chat template shows nothing of"
    ),
    with_template(refuses, 79, "template without end", ENDLESS, "template.jinja", "stopped"),
    with_template(refuses, 79, "template of 200 MB", LARGE, "template.jinja", "stopped"),
    with_template(
        trains,
        80,
        "earlier turns shown otherwise",
        THINKING,
        "template shows earlier turns differently",
        "data.turns: unroll",
    ),
    with_template(
        trains, 83, "no stop token", NO_STOP, "stop token not trained: the template puts none behind the turn: 2 rows"
    ),
)
CASES = tuple(case for case, _ in TEMPLATES)


@pytest.mark.parametrize(("case", "source"), TEMPLATES, ids=[case.id for case in CASES])
def test_template(case: Case, source: str, desk: Desk) -> None:
    template = desk.file(source, "template.jinja")
    began = time.process_time()
    outcome = desk.train(case.content, "--data.chat_template", str(template))
    if case.code:
        outcome.refused(case.code, *case.words)
        assert time.process_time() - began < 20  # 2 seconds of the template; without its limit it has no end
    else:
        outcome.trained(*case.words)


@pytest.fixture
def model(desk: Desk) -> Path:
    """A copy of the model folder that a case may spoil."""
    return Path(shutil.copytree(desk.model, desk.folder / "model"))


def edit(path: Path, **changes: object) -> None:
    """Set keys of a JSON file; None takes the key out."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_75_without_a_template_the_built_in_ones_are_named(desk: Desk, model: Path) -> None:
    (model / "chat_template.jinja").unlink(missing_ok=True)
    edit(model / "tokenizer_config.json", chat_template=None)
    words = (
        "has no chat template and none is given",
        "data.chat_template",
        "chatml, zephyr, llama, alpaca, vicuna, mistral",
    )
    desk.train([GOOD], model=model).refused(DATA, *words)


def test_81_without_a_padding_token_nothing_is_resized(desk: Desk, model: Path) -> None:
    edit(model / "tokenizer_config.json", pad_token=None)
    edit(model / "config.json", pad_token_id=None)
    before = json.loads((model / "config.json").read_text())["vocab_size"]
    assert desk.train([GOOD, TALK], "--checkpoint.final", model=model).code == 0
    assert json.loads((desk.folder / "out" / "final" / "config.json").read_text())["vocab_size"] == before


def test_82_the_stop_token_is_trained_where_it_is_also_the_padding_token(desk: Desk, model: Path) -> None:
    edit(model / "tokenizer_config.json", pad_token="<|im_end|>")
    data = desk.file([GOOD])
    desk.run(data, model=model).trained()
    outcome = run("preview", "--model.tokenizer", str(model), "--data", str(data), "--json", "--data.cache", "false")
    shown = json.loads(outcome.out.splitlines()[0])
    ends = [weight for token, weight in zip(shown["tokens"], shown["weights"], strict=True) if token == "<|im_end|>"]
    assert ends == [0.0, 1.0]


def test_84_a_tokenizer_larger_than_the_model_is_refused(desk: Desk, model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(model)
    words = (f"token id {size} occurs, but the model has embeddings for {size} tokens", "add the tokens to it first")
    desk.train([chat(("user", "A zebra?"), ANSWER)], model=model).refused(DATA, *words)


def without_config(model: Path) -> None:
    (model / "config.json").unlink()


def without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def without_shard(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def with_broken_index(model: Path) -> None:
    without_shard(model)
    (model / "model.safetensors.index.json").write_text('{"weight_map": [')


def half_downloaded(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def with_pointer(model: Path) -> None:
    (model / "model.safetensors").write_text(LFS)


def with_config_pointer(model: Path) -> None:
    (model / "config.json").write_text(LFS)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_config, "config.json is missing"),
        (without_weights, "there are no weights"),
        (without_shard, "model-00002-of-00002.safetensors, named in model.safetensors.index.json, is missing"),
        (with_broken_index, "model.safetensors.index.json does not hold a weight_map"),
        (half_downloaded, "model.safetensors is cut short"),
        (with_pointer, "model.safetensors is a Git LFS pointer"),
        (with_config_pointer, "config.json is a Git LFS pointer"),
    ],
    ids=lambda value: f"85-{value.__name__}" if callable(value) else "",
)
def test_85_a_model_folder_that_is_not_whole_is_refused_naming_the_file(
    spoil: Callable[[Path], None], words: str, desk: Desk, model: Path
) -> None:
    spoil(model)
    desk.train([GOOD], model=model).refused(RECIPE, f"model.path {model}: {words}")


def test_85_a_tokenizer_that_is_a_pointer_is_refused_naming_the_file(desk: Desk, model: Path) -> None:
    (model / "tokenizer.json").write_text(LFS)
    desk.train([GOOD], model=model).refused(DATA, "tokenizer.json", "git lfs pull")


def test_85_a_model_folder_that_is_not_there_is_refused(desk: Desk) -> None:
    wrong = desk.folder / "modle"
    (desk.folder / "model").mkdir()
    outcome = desk.train([GOOD], model=wrong)
    outcome.refused(RECIPE, f"model.path: there is no folder {wrong}", f"Near it: {desk.folder / 'model'}")
    assert not (desk.folder / "out").exists()


def test_85_a_model_that_is_neither_a_folder_nor_on_the_hub_is_refused_saying_both(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    (desk.folder / "models" / "chat").mkdir(parents=True)
    monkeypatch.chdir(desk.folder)
    outcome = desk.train([GOOD], model=Path("modles/chat"))
    near = "modles/chat: there is no such folder here. Near it: models/chat."
    outcome.refused(RECIPE, near, "Taken as a name on the hub, it cannot be had")


def test_85_a_model_in_the_cache_of_the_hub_is_taken_from_there(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = desk.folder / "hub" / "models--tiny--chat" / "snapshots" / ("0" * 40)
    shutil.copytree(desk.model, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(desk.folder / "hub"))
    desk.train([GOOD], model=Path("tiny/chat")).trained()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "does not predict next tokens"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "'t5' has no causal language model"),
        ({"model_type": None}, "config.json has no model_type"),
        ({"quantization_config": {"quant_method": "gptq"}}, "the weights are quantized (gptq) and cannot be trained"),
    ],
    ids=["86-masked", "86-two stacks", "86-no type", "86-quantized"],
)
def test_86_a_model_that_cannot_be_trained_so_is_refused(
    changes: dict[str, object], words: str, desk: Desk, model: Path
) -> None:
    edit(model / "config.json", **changes)
    desk.train([GOOD], model=model).refused(RECIPE, words)


def test_86_a_number_format_that_does_not_exist_is_refused(desk: Desk) -> None:
    desk.train([GOOD], "--model.dtype", "float8").refused(RECIPE, "model.dtype", "float8", "bfloat16")
