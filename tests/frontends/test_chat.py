"""`training-hub chat`: through a pipe, on a terminal, and asked once; what it says is what the model says."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.invariants.run import train
from training_hub.backends.shared.voice import _Pieces
from training_hub.data.tokenizer import ChatTokenizer
from training_hub.errors import RecipeError
from training_hub.frontends.cli import main
from training_hub.frontends.commands.chat import shown

ROOT = Path(__file__).parents[2]
PLAIN = ["--model.dtype", "float32", "--max-new-tokens", "24"]


@pytest.fixture(scope="module")
def taught(tiny_model_folder: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("taught") / "run"
    settings = {"training": {"steps": 120, "global_batch_size": 16, "preflight": False}, "optimizer": {"lr": 1e-2}}
    result = train(tiny_model_folder, chat_file, output, **settings)
    assert result.model_path is not None
    return result.model_path


def said(folder: Path, *messages: tuple[str, str], limit: int = 24) -> str:
    """The answer by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    turns = [{"role": role, "content": content} for role, content in messages]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**ids, max_new_tokens=limit, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(made[0, ids["input_ids"].shape[1] :]).removesuffix("<|im_end|>")


def piped(*words: str, text: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "training_hub", "chat", *words, *PLAIN]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(program, input=text, capture_output=True, text=True, env=environment, timeout=120)


def test_asked_once_it_prints_the_answer_and_nothing_else(taught: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["chat", "--model", str(taught), "--prompt", "What comes after 7?", *PLAIN]) == 0
    assert capsys.readouterr().out == shown(said(taught, ("user", "What comes after 7?"))) + "\n"


def test_two_models_answer_beside_each_other(taught: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--model", str(taught), "--beside", str(tiny_model_folder), "--prompt", "What comes after 7?"]
    assert main(["chat", *words, *PLAIN]) == 0
    answers = capsys.readouterr().out
    tuned, base = (said(folder, ("user", "What comes after 7?")) for folder in (taught, tiny_model_folder))
    assert answers == f"final: {shown(tuned)}\nmodel: {shown(base)}\n"


def test_a_pipe_is_a_conversation_with_its_history(taught: Path):
    asked = ["What comes after 3?", "And then?"]
    done = piped("--model", str(taught), text="\n".join([*asked, "/reset", asked[1], "/quit", "never asked"]) + "\n")
    assert done.returncode == 0, done.stderr
    first = said(taught, ("user", asked[0]))
    second = said(taught, ("user", asked[0]), ("assistant", first), ("user", asked[1]))
    alone = said(taught, ("user", asked[1]))
    assert done.stdout == "".join(f"{shown(each)}\n" for each in (first, second, "a new conversation begins", alone))
    assert "\x1b" not in done.stdout


def test_a_system_message_is_told_and_unknown_commands_are_not_sent(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "lines").write_text("/system You count.\nWhat comes after 4?\n/sytem x\n//what?\n\n")
    with (tmp_path / "lines").open() as lines:
        monkeypatch.setattr(sys, "stdin", lines)
        assert main(["chat", "--model", str(taught), *PLAIN]) == 0
    told = ("system", "You count.")
    first = said(taught, told, ("user", "What comes after 4?"))
    second = said(taught, told, ("user", "What comes after 4?"), ("assistant", first), ("user", "/what?"))
    out = capsys.readouterr().out
    assert out.startswith(f"a new conversation begins, with a system message\n{shown(first)}\n/sytem is not known:\n")
    assert out.endswith(f"begins with /\n{shown(second)}\n")


class Terminal:
    """A chat on a pseudo-terminal."""

    def __init__(self, *words: str):
        self.handle, other = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "training_hub", "chat", *words],
            stdin=other,
            stdout=other,
            stderr=other,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"},
            start_new_session=True,
        )
        os.close(other)
        self.seen = ""

    def until(self, wanted: str, seconds: float = 300) -> str:
        """What was shown up to `wanted`, which is passed over."""
        end = time.monotonic() + seconds
        while wanted not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.handle], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.handle, 4096).decode("utf-8", "replace")
                except OSError:
                    raise AssertionError(f"ended before {wanted!r}: {self.seen}") from None
        before, _, self.seen = self.seen.partition(wanted)
        return before

    def type(self, text: str) -> None:
        os.write(self.handle, text.encode())


@pytest.fixture
def terminal(taught: Path) -> Iterator[Terminal]:
    one = Terminal("--model", str(taught), "--model.dtype", "float32", "--max-new-tokens", "24")
    yield one
    one.process.kill()
    one.process.wait()
    os.close(one.handle)


def test_on_a_terminal_one_is_asked_and_answered(terminal: Terminal, taught: Path):
    terminal.until("you: ")
    terminal.type("What comes after 7?\n")
    answer = terminal.until("you: ")
    assert shown(said(taught, ("user", "What comes after 7?"))) in answer.replace("\r\n", "\n")
    assert "a second)" in answer
    terminal.type("/help\n")
    assert "/reset" in terminal.until("you: ")
    terminal.type("\x04")  # Ctrl-D
    assert terminal.process.wait(timeout=300) == 0


def test_control_characters_of_an_answer_do_not_reach_the_terminal():
    assert shown("a\x1b[2Jb\nc\td\u202e") == "a\\x1b[2Jb\nc\td\\u202e"


def test_pieces_are_whole_characters_and_together_the_text(tiny_model_folder: Path):
    tokenizer = ChatTokenizer.load(str(tiny_model_folder))
    text = "Déjà vu, 漢字 \U0001f600 4. ok"
    ids = tokenizer.encode_batch([text])[0][0].tolist()
    heard: list[str] = []
    pieces = _Pieces(tokenizer, heard.append)
    for token in ids:
        pieces.take(token)
    pieces.finish(text)
    assert "".join(heard) == text and len(heard) > 5 and not any("\ufffd" in piece for piece in heard)
    cut: list[str] = []
    pieces = _Pieces(tokenizer, cut.append)
    for token in ids[:2]:
        pieces.take(token)  # D and half of é
    pieces.finish(tokenizer.hf.decode(ids[:2]))
    assert "".join(cut) == "D\ufffd"


@pytest.mark.parametrize(
    "words, told",
    [
        (["--max-new-tokens", "0"], "at least 1"),
        (["--temperature", "-1"], "at least 0"),
        (["--top-p", "0.5"], "temperature 0"),
        (["--prompt", " "], "found nothing"),
    ],
)
def test_options_that_mean_nothing_are_refused_before_a_model_is_loaded(words: list[str], told: str, tmp_path: Path):
    from training_hub.frontends.cli import _run

    with pytest.raises(RecipeError, match=told):
        _run(["chat", "--model", str(tmp_path / "nowhere"), *words])


def test_both_models_are_looked_at_before_one_is_loaded(taught: Path, tmp_path: Path):
    from training_hub.frontends.cli import _run

    with pytest.raises(RecipeError, match="nowhere"):
        _run(["chat", "--model", str(taught), "--beside", str(tmp_path / "nowhere"), "--prompt", "x"])


def test_a_conversation_that_the_model_has_no_positions_for_is_an_error_that_ends_nothing(
    tmp_path: Path, tiny_model_folder: Path
):
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=40)
    ).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    done = piped("--model", str(tmp_path / "gpt2"), text=f"{'4 ' * 60}\nhi\n")
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.split("\n")
    assert "the model has 40 positions: /reset begins anew" in first and len(rest) >= 1
