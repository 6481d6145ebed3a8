"""Where runs are broken: a tiny model, its data, and runs forked from this process, which has imported everything.

A forked run starts in milliseconds where a new interpreter takes seconds, so that hundreds of kills take minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from tests.conftest import CHATML, CONVERSATIONS, _byte_level_tokenizer
from training_hub.backends import Given, find_backend
from training_hub.errors import HubError
from training_hub.folders import sha256
from training_hub.launch import run
from training_hub.monitoring.jsonl import read_metrics
from training_hub.recipe import Recipe

RAW_ERROR = 99  # exit code of a run that ended with an error that is not one of ours
TIMEOUT_SECONDS = 300
STEPS = 8
EVERY_STEP = {"interval": 1, "keep_last": 3, "minutes": None}


def nothing() -> None:
    """Prepare nothing."""


@dataclass(frozen=True)
class Ended:
    """How a run in a process of its own ended: negative codes are signals. `said` is all it printed."""

    code: int
    said: str
    seconds: float

    @property
    def brief(self) -> str:
        return f"exit {self.code}: {' '.join(self.said.split())[-300:]}"


@dataclass
class Child:
    """A run at work in a process of its own."""

    pid: int
    log: Path
    began: float
    ready: int

    def wait_until_ready(self) -> None:
        """Return when the process is about to start its run."""
        os.read(self.ready, 1)
        os.close(self.ready)
        self.ready = -1

    def is_over(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def signal(self, number: int) -> None:
        """Send a signal, if the process still lives."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return

    def wait(self) -> Ended:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
            time.sleep(0.003)
        if self.ready >= 0:
            os.close(self.ready)
        said = self.log.read_text(encoding="utf-8", errors="replace")
        return Ended(os.waitstatus_to_exitcode(status), said, time.monotonic() - self.began)


@dataclass
class Workshop:
    """Everything the campaigns share, in one folder."""

    root: Path
    model: Path = field(init=False)
    gpt2: Path = field(init=False)
    data: Path = field(init=False)
    count: int = 0

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        find_backend("torch")
        disable_progress_bar()
        self.root.mkdir(parents=True, exist_ok=True)
        self.model, self.gpt2, self.data = self.root / "model", self.root / "gpt2", self.root / "chat.jsonl"
        self.data.write_text("".join(json.dumps(row) + "\n" for row in CONVERSATIONS), encoding="utf-8")
        torch.manual_seed(0)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_byte_level_tokenizer(), eos_token="<|im_end|>", pad_token="<|endoftext|>"
        )
        tokenizer.chat_template = CHATML
        small = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
        llama = LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id, **small,
        )  # fmt: skip
        LlamaForCausalLM(llama).save_pretrained(self.model)
        GPT2LMHeadModel(
            GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=256, resid_pdrop=0.2, **small)
        ).save_pretrained(self.gpt2)
        for folder in (self.model, self.gpt2):
            tokenizer.save_pretrained(folder)

    def place(self, name: str = "run") -> Path:
        """A folder name that nothing has yet."""
        self.count += 1
        return self.root / "runs" / f"{name}-{self.count}"

    def recipe(self, output: Path, **sections: Any) -> Recipe:
        """Eight steps of a float32 run that saves each; `sections` are merged over it."""
        base: dict[str, Any] = {
            "model": {"path": str(self.model), "dtype": "float32"},
            "data": {"path": str(self.data), "cache": False, "workers": 0},
            "training": {"global_batch_size": 8, "max_seq_len": 256, "steps": STEPS, "preflight": False},
            "optimizer": {"lr": 1e-3},
            "monitoring": {"console": "plain"},
            "checkpoint": EVERY_STEP,
        }
        for name, values in sections.items():
            base[name] = {**base.get(name, {}), **values} if isinstance(values, dict) else values
        return Recipe.model_validate({**base, "output": str(output)})

    def start(
        self, recipe: Recipe, watchers: Sequence[Any] = (), prepare: Callable[[], None] = nothing, **given: Any
    ) -> Child:
        """Begin a run in a forked process; `prepare` is called there first."""
        self.count += 1
        log = self.root / f"log-{self.count}.txt"
        sys.stdout.flush()
        sys.stderr.flush()
        here, there = os.pipe()
        began = time.monotonic()
        pid = os.fork()
        if pid:
            os.close(there)
            return Child(pid, log, began, here)
        code = RAW_ERROR
        try:
            os.close(here)
            handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o666)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            # torch makes its thread pool anew at the first call after a fork; if threads of transformers' loader make
            # that call at once, one of them finds "Invalid thread pool!". A new interpreter does not have this problem.
            torch.set_num_threads(1)
            prepare()
            os.write(there, b"x")
            code = _run(recipe, Given(watchers=watchers, **given))
        finally:
            os._exit(code)

    def train(self, recipe: Recipe, watchers: Sequence[Any] = (), prepare: Callable[[], None] = nothing) -> Ended:
        """A run in a forked process, to its end."""
        return self.start(recipe, watchers, prepare).wait()

    def copy(self, folder: Path) -> Path:
        """The same run folder under another name."""
        place = self.place(folder.name)
        shutil.copytree(folder, place, symlinks=True)
        return place


def _run(recipe: Recipe, given: Given) -> int:
    code = RAW_ERROR
    try:
        run(recipe, given)
        code = 0
    except HubError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:  # as the command line says it
        print("error: interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BaseException:  # what a user would see as a traceback; the campaign counts it as not wanted
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


@dataclass(frozen=True)
class Outcome:
    """What a finished run left: the sum of its final weights, its losses by step, the sum of its last optimizer."""

    weights: str
    losses: tuple[tuple[int, float], ...]
    optimizer: str


def outcome(output: Path) -> Outcome:
    """What the finished run in `output` left. Raises where it is not there."""
    losses = tuple((row["step"], row["loss"]) for row in read_metrics(output / "metrics.jsonl") if row["step"])
    checkpoints = sorted((output / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    optimizer = sha256(checkpoints[-1] / "optimizer.safetensors") if checkpoints else ""
    return Outcome(sha256(output / "final" / "model.safetensors"), losses, optimizer)


def leftovers(output: Path) -> list[str]:
    """Names in the run folder that only an unfinished write has."""
    return sorted(path.name for path in output.rglob(".*") if path.name.startswith((".tmp-", ".old-")))


def goes_on(shop: Workshop, recipe: Recipe, wanted: Outcome, says: str = "") -> tuple[str, bool]:
    """Run `recipe` again, as a user would who only knows the command; what was not as wanted, and whether silently."""
    ended = shop.train(recipe)
    output = Path(recipe.output)
    if ended.code != 0:
        return f"did not go on by itself, {ended.brief}", False
    if outcome(output) != wanted:
        return "ended in other numbers than the unbroken run", True
    if json.loads((output / "result.json").read_text())["status"] != "finished":
        return "result.json does not say finished", False
    if left := leftovers(output):
        return f"left {', '.join(left)}", False
    if says and says not in ended.said:
        return f"did not say {says!r}: {ended.brief}", True
    return "", False


class At:
    """A watcher that does something after one step, before that step is saved."""

    def __init__(self, step: int, act: Callable[[], Any]):
        self.step, self.act = step, act

    def __call__(self, report: Any) -> None:
        if report.step == self.step:
            self.act()


def die() -> None:
    """End this process as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)
