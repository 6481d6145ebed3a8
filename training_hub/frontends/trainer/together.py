"""Fields of SFTConfig that say something only together: batch, folder, schedule, evaluation, saving, reports.

Each part takes its fields out of what was given, puts settings in their place, and yields what is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from training_hub.frontends.dialects import SCHEDULES
from training_hub.frontends.trainer.fields import ATTENTION, EASYDEL, KNOWN, OPTIMIZERS, TRL
from training_hub.recipe.translate import shown

TRACKERS = ("wandb", "tensorboard", "mlflow")
STRATEGIES = ("no", "steps", "epoch")
EVERY = 500
"""transformers 5.23 `TrainingArguments.save_steps`."""


@dataclass
class Reading:
    """Fields on the way to settings. style: whose defaults hold, EasyDeL's or TRL's. given: what is still to be read.
    said: the names of all that were given."""

    style: str
    given: dict[str, Any]
    said: frozenset[str]
    settings: dict[str, Any] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def take(self, *names: str) -> list[tuple[str, Any]]:
        """The fields of these names that are given, which are not read again; members of enumerations as values."""
        found = [(name, self.given.pop(name)) for name in names if name in self.given]
        return [(name, value.value if isinstance(value, Enum) else value) for name, value in found]

    def give(self, path: str, value: Any, name: str) -> None:
        self.settings[path] = value
        if name.partition("[")[0] in self.said:
            self.spelled[path] = name


def one_of(found: list[tuple[str, Any]], what: str) -> Iterator[str]:
    """A line where two names of one thing were given."""
    if len(found) > 1:
        yield f"{' and '.join(name for name, _ in found)}: two names of {what}. Keep one."


def _engine(reading: Reading) -> Iterator[str]:
    if reading.given.get("backend", "") is None:
        reading.take("backend")
    yield from ()


def _batch(reading: Reading) -> Iterator[str]:
    whole = reading.take("total_batch_size", "per_device_train_batch_size")
    times = dict(reading.take("gradient_accumulation_steps")).get("gradient_accumulation_steps", 1)
    yield from one_of(whole, "the batch size")
    default = {EASYDEL: "total_batch_size", TRL: "per_device_train_batch_size"}[reading.style]
    name, size = whole[0] if whole else (default, KNOWN[default].default)
    counts = {name: size, "gradient_accumulation_steps": times}
    wrong = [one for one, count in counts.items() if isinstance(count, bool) or not isinstance(count, int) or count < 1]
    if wrong:
        yield from (f"{one}: found {shown(counts[one])}; allowed: a whole number of at least 1." for one in wrong)
        return
    devices = int(os.environ.get("WORLD_SIZE", "1")) if name == "per_device_train_batch_size" else 1
    reading.give("training.global_batch_size", size * times * devices, name)


def _length(reading: Reading) -> Iterator[str]:
    names = reading.take("max_sequence_length", "max_length")
    found = [(name, value) for name, value in names if value is not None]
    if len({value for _, value in found}) > 1:
        yield f"{' and '.join(name for name, _ in found)}: two names of the longest sample. Keep one."
    elif found:
        reading.give("training.max_seq_len", found[0][1], found[0][0])
    elif names and reading.style == TRL:  # None: nothing is cut
        reading.defaults["data.overlong"] = "error"
        reading.defaults.pop("training.max_seq_len", None)
    longest = found[0][1] if found else reading.defaults.get("training.max_seq_len", 4096)
    buffer = dict(reading.take("num_of_sequences", "chars_per_token"))
    if not buffer:
        return
    for name, value in buffer.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            yield f"{name}: found {shown(value)}; allowed: a number greater than 0."
            return
    sequences, characters = buffer.get("num_of_sequences", 1024), buffer.get("chars_per_token", 3.6)
    if isinstance(longest, int):
        reading.give("data.chunk_bytes", max(1, round(sequences * characters * longest)), next(iter(buffer)))


def _output(reading: Reading) -> Iterator[str]:
    whole = dict(reading.take("output_dir"))
    parts = dict(reading.take("save_directory", "model_name"))
    parts = {name: value for name, value in parts.items() if value is not None}
    if whole.get("output_dir") is not None:
        if parts:
            yield f"output_dir and {' and '.join(parts)}: two ways to name the folder of the run. Keep one."
        reading.give("output", os.fspath(whole["output_dir"]), "output_dir")
    elif parts or reading.style == EASYDEL:
        folder = parts.get("save_directory", KNOWN["save_directory"].default)
        name = parts.get("model_name", KNOWN["model_name"].default)
        reading.give("output", str(Path(folder) / name), "model_name" if "model_name" in parts else "save_directory")


def _schedule(reading: Reading) -> Iterator[str]:
    found = reading.take("scheduler", "lr_scheduler_type")
    yield from one_of(found, "the schedule")
    ends = dict(reading.take("learning_rate_end")).get("learning_rate_end")
    name, value = found[0] if found else ("", None)
    if name == "scheduler":
        named = {"none": "constant", "linear": "linear", "cosine": "cosine"}
        value = named.get(str(value).lower(), value)
    elif name:
        value = SCHEDULES.get(str(value), str(value))
    if ends is not None:
        reading.give("lr_scheduler.min_lr", ends, "learning_rate_end")
        if value in (None, "constant"):  # a rate that is to end elsewhere than it began falls
            name, value = name or "learning_rate_end", "linear"
    if value is not None:
        reading.give("lr_scheduler.name", value, name)
    yield from _schedule_arguments(reading)
    for _, warmup in reading.take("warmup_steps"):
        is_share = isinstance(warmup, float) and not warmup.is_integer() and 0 < warmup < 1
        path = "lr_scheduler.warmup_ratio" if is_share else "lr_scheduler.warmup_steps"
        reading.give(path, int(warmup) if isinstance(warmup, float) and warmup.is_integer() else warmup, "warmup_steps")


def _schedule_arguments(reading: Reading) -> Iterator[str]:
    for _, given in reading.take("lr_scheduler_kwargs"):
        known = ("min_lr", "min_lr_rate", "decay_ratio")
        wrong = [key for key in given if key not in known] if isinstance(given, Mapping) else [given]
        if given is not None and wrong:
            yield (
                f"lr_scheduler_kwargs: found {', '.join(shown(key) for key in wrong)}; allowed: a dictionary with some "
                f"of {', '.join(known)}. Write lr_scheduler_kwargs={{'min_lr': 1e-7}}"
            )
            return
        for key, value in (given or {}).items():
            path = "lr_scheduler.decay_ratio" if key == "decay_ratio" else "lr_scheduler.min_lr"
            peak = reading.given.get("learning_rate", KNOWN["learning_rate"].default)
            reading.give(path, value * peak if key == "min_lr_rate" else value, "lr_scheduler_kwargs")


def _steps(reading: Reading) -> Iterator[str]:
    found = [(name, n) for name, n in reading.take("max_steps", "max_training_steps") if n is not None and n != -1]
    yield from one_of(found, "the number of steps")
    if found:
        reading.give("training.steps", found[0][1], found[0][0])
        reading.take("num_train_epochs")  # which steps win over, in both


def _precision(reading: Reading) -> Iterator[str]:
    asked = {name: value for name, value in reading.take("bf16", "fp16") if value is not None}
    if asked.get("bf16") and asked.get("fp16"):
        yield "bf16 and fp16: one excludes the other. Write bf16=True"
    elif asked.get("fp16"):
        reading.notes.append("fp16: computed in bfloat16 where this machine multiplies it fast, else in float32")
    elif "bf16" in asked:
        reading.give("model.dtype", "bfloat16" if asked["bf16"] else "float32", "bf16")


def _trained(reading: Reading) -> Iterator[str]:
    for name, value in reading.take("assistant_only_loss", "completion_only_loss"):
        if value is not None and not isinstance(value, bool):
            yield f"{name}: found {shown(value)}; allowed: True or False."
        elif value is False:
            reading.give("data.unmask", True, name)


def _evaluation(reading: Reading) -> Iterator[str]:
    asked = dict(reading.take("do_eval", "eval_strategy", "eval_steps", "evaluation_steps"))
    every = {name: asked[name] for name in ("eval_steps", "evaluation_steps") if asked.get(name) is not None}
    strategy = str(asked.get("eval_strategy", "steps" if every else "no" if reading.style == TRL else "auto"))
    if len(every) > 1:
        yield "eval_steps and evaluation_steps: two names of one thing. Keep one."
    if "eval_strategy" in asked and strategy not in STRATEGIES:
        yield f"eval_strategy: found {shown(strategy)}; allowed: {', '.join(STRATEGIES)}."
        return
    if asked.get("do_eval") is False and not every and strategy in ("auto", "no"):
        strategy = "no"
    if strategy != "auto":
        reading.defaults["evaluation.at_epoch"] = strategy == "epoch"
        reading.defaults["evaluation.at_start"] = False
    if strategy == "steps":
        name, steps = next(iter(every.items()), ("eval_strategy", reading.given.get("logging_steps", 10)))
        reading.give("evaluation.interval", steps, name)
    elif every:
        yield f"{next(iter(every))}: would change nothing with eval_strategy={strategy!r}. Leave one out."
    for name, value in reading.take("metric_for_best_model"):
        if value is not None:
            reading.give("evaluation.best_metric", str(value).removeprefix("eval_"), name)


def _saving(reading: Reading) -> Iterator[str]:
    asked = dict(reading.take("save_strategy"))
    steps = dict(reading.take("save_steps")).get("save_steps")
    strategy = str(asked.get("save_strategy", "steps"))
    if strategy not in (*STRATEGIES, "best"):
        yield f"save_strategy: found {shown(strategy)}; allowed: {', '.join(STRATEGIES)}, best."
    elif strategy == "steps" and (steps is not None or reading.style == TRL):
        reading.give("checkpoint.interval", EVERY if steps is None else steps, "save_steps")
    elif strategy != "steps":
        reading.give("checkpoint.at_epoch", strategy == "epoch", "save_strategy")
        if strategy == "no":
            reading.give("checkpoint.minutes", None, "save_strategy")
        if strategy == "best":
            reading.give("checkpoint.keep_best", True, "save_strategy")
        if steps is not None:
            yield f"save_steps: would change nothing with save_strategy={strategy!r}. Leave one out."


def _reports(reading: Reading) -> Iterator[str]:
    for name, value in reading.take("report_to"):
        listed = [value] if isinstance(value, str) else list(value or ())
        wrong = [one for one in listed if one not in (*TRACKERS, "none")]
        if wrong:
            yield (
                f"{name}: found {', '.join(shown(one) for one in wrong)}; allowed: none, {', '.join(TRACKERS)}, or a "
                "list of these."
            )
        for tracker in TRACKERS:
            if tracker in listed and not (tracker == "tensorboard" and "logging_dir" in reading.given):
                reading.give(f"monitoring.{tracker}", True, name)
        if "tensorboard" not in listed and listed and "logging_dir" in reading.given:
            yield f"logging_dir: would change nothing with report_to={value!r}. Leave one out."
    for name, value in reading.take("run_name"):
        trackers = [one for one in ("wandb", "mlflow") if reading.settings.get(f"monitoring.{one}")]
        trackers += ["wandb"] if reading.given.get("use_wandb") and "wandb" not in trackers else []
        for tracker in trackers if value is not None else ():
            reading.give(f"monitoring.{tracker}_run_name", value, name)
        if value is not None and not trackers:
            yield f"{name}: would change nothing without report_to='wandb' or 'mlflow'. Leave it out."


def _template(reading: Reading) -> Iterator[str]:
    for name, value in reading.take("chat_template_path"):
        if value is None:
            continue
        path = Path(value).expanduser()
        inside = path / "chat_template.jinja"
        if path.is_dir() and not inside.is_file():
            yield f"{name}: {path} holds no chat_template.jinja. Name a Jinja file."
        else:
            reading.give("data.chat_template", str(inside if path.is_dir() else value), name)


def _loading(reading: Reading) -> Iterator[str]:
    for name, given in reading.take("model_init_kwargs"):
        for key, value in (given or {}).items():
            if key in ("dtype", "torch_dtype"):
                reading.give("model.dtype", dtype_name(value), f"{name}[{key!r}]")
            elif key == "attn_implementation" and value in ATTENTION:
                reading.give("model.attention", ATTENTION[value], f"{name}[{key!r}]")
            elif key in ("revision", "trust_remote_code"):
                reading.give(f"model.{key}", value, f"{name}[{key!r}]")
            elif not (key in ("device_map", "use_cache", "low_cpu_mem_usage") and value in (None, False, "auto")):
                yield (
                    f"{name}: found {key!r}: {shown(value)}; allowed: dtype, attn_implementation "
                    f"({', '.join(ATTENTION)}), revision, trust_remote_code."
                )


def dtype_name(value: Any) -> str:
    """A number format as the recipe names it, from a name or from what torch, numpy or JAX has for it."""
    name = value if isinstance(value, str) else getattr(value, "__name__", None) or str(getattr(value, "name", value))
    known = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16", "fp64": "float64", "half": "float16"}
    short = str(name).rpartition(".")[2]
    return known.get(short, short)


PARTS: tuple[Callable[[Reading], Iterator[str]], ...] = (
    _engine,
    _steps,
    _batch,
    _length,
    _output,
    _schedule,
    _precision,
    _trained,
    _evaluation,
    _saving,
    _reports,
    _template,
    _loading,
)


def defaults_of(style: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What holds where a field was not given: the page of EasyDeL's SFTTrainer, and what EasyDeL has where that is
    silent; or TRL 1.16 and transformers 5.23."""
    shared: dict[str, Any] = {
        "training.epochs": KNOWN["num_train_epochs"].default,
        "optimizer.lr": KNOWN["learning_rate"].default,
        "data.overlong": "truncate",
    }
    optimizer = str(given.get("optimizer", given.get("optim", "adamw")))
    if OPTIMIZERS.get(optimizer) not in ("Lion", "RMSprop", "Adafactor") and "adam" in optimizer:
        shared["optimizer.beta2"] = 0.999
    if style == EASYDEL:
        return {
            **shared,
            "lr_scheduler.name": "constant",
            "optimizer.weight_decay": 0.01,
            "data.start_token": False,
        }
    return {
        **shared,
        "training.max_seq_len": 1024,
        "lr_scheduler.name": "linear",
        "monitoring.log_interval": KNOWN["logging_steps"].default,
    }
