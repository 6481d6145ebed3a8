"""What AutoTrain's parameters say in a recipe: a table of names, and functions for what says more."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from training_hub.errors import HubError
from training_hub.frontends.autotrain.params import LLMTrainingParams
from training_hub.frontends.dialects import SCHEDULES
from training_hub.recipe.check import ADAM, LION
from training_hub.recipe.load import Layer, layer_of, merge
from training_hub.recipe.translate import shown

if TYPE_CHECKING:
    from training_hub.frontends.autotrain.rows import Rows

ADAM_BETA2 = 0.999
"""transformers 5.23 `TrainingArguments.adam_beta2`, which AutoTrain leaves as it is."""

OPTIMIZERS: Mapping[str, str] = MappingProxyType(
    {
        "adamw_torch": "AdamW",
        "adamw_torch_fused": "AdamW",
        "adamw": "AdamW",
        "adafactor": "Adafactor",
        "sgd": "SGD",
        "rmsprop": "RMSprop",
        "adagrad": "Adagrad",
        "lion_32bit": "Lion",
        "lion": "Lion",
        "lion_8bit": "Lion8bit",
        "adamw_bnb_8bit": "AdamW8bit",
        "adamw_8bit": "AdamW8bit",
        "paged_adamw": "PagedAdamW",
        "paged_adamw_32bit": "PagedAdamW",
        "paged_adamw_8bit": "PagedAdamW8bit",
        "paged_lion": "PagedLion",
        "paged_lion_32bit": "PagedLion",
        "paged_lion_8bit": "PagedLion8bit",
        "muon": "Muon",
        "schedule_free_adamw": "AdamWScheduleFree",
        "galore_adamw": "GaLoreAdamW",
    }
)
"""`optim` of transformers 5.23 to ours, and short forms of it."""

DTYPES: Mapping[str | None, str] = MappingProxyType({None: "auto", "fp16": "auto", "bf16": "bfloat16", "no": "float32"})

PLAIN: Mapping[str, str] = MappingProxyType(
    {
        "model": "model.path",
        "project_name": "output",
        "max_samples": "data.max_rows",
        "epochs": "training.epochs",
        "lr": "optimizer.lr",
        "weight_decay": "optimizer.weight_decay",
        "max_grad_norm": "training.max_norm",
        "seed": "seed",
        "valid_path": "data.validation",
        "early_stopping_patience": "evaluation.early_stopping_patience",
        "save_total_limit": "checkpoint.keep_last",
    }
)
"""Parameters that are one setting, with the same value."""

REQUIRED: Mapping[str, str] = MappingProxyType(
    {"model.path": "model", "data.path": "data_path", "output": "project_name"}
)
OF_LORA: Mapping[str, str] = MappingProxyType(
    {
        "lora_r": "lora.r",
        "lora_alpha": "lora.alpha",
        "lora_dropout": "lora.dropout",
        "target_modules": "lora.target_modules",
        "merge_adapter": "lora.merge",
        "quantization": "model.quantization",
    }
)
OF_DISTILLATION: Mapping[str, str] = MappingProxyType(
    {
        "teacher_model": "distillation.teacher",
        "distill_temperature": "distillation.temperature",
        "distill_alpha": "distillation.alpha",
        "distill_max_teacher_length": "distillation.max_teacher_length",
    }
)
TRAINERS = ("default", "generic", "dpo", "orpo", "ppo", "grpo", "reward", "distillation")

Settings = dict[str, Any]
Name = Callable[[str], str]


@dataclass(frozen=True)
class Asked:
    """A run as asked for in AutoTrain's words. rows: what is in memory. notes: to be said when it begins."""

    layer: Layer
    rows: Any = None
    notes: tuple[str, ...] = ()


@dataclass
class _Reading:
    """Parameters on the way to settings; `write` shows a parameter as its caller wrote it: lr, or --lr."""

    params: LLMTrainingParams
    write: Name
    settings: Settings = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def is_given(self, name: str) -> bool:
        return name in self.params.model_fields_set and getattr(self.params, name) is not None

    def give(self, path: str, value: Any, name: str) -> None:
        self.settings[path] = value
        if self.is_given(name):
            self.spelled[path] = self.write(name)


def asked(params: LLMTrainingParams, write: Name = str, rows: Any = None) -> Asked:
    """The settings that `params` stand for. write: a parameter as the caller wrote it. rows: instead of data_path.

    What is wrong is in the layer's problems, to be told with all that is wrong in the recipe.
    """
    reading = _Reading(params, write)
    for path, name in REQUIRED.items():  # which errors ask for by these names
        reading.spelled[path] = write(name)
    for name, path in PLAIN.items():
        value = getattr(params, name)
        if value is not None:
            reading.give(path, value, name)
    for part in PARTS:
        reading.problems += part(reading)
    live = None
    from training_hub.frontends.autotrain.rows import rows_of  # which loads numpy

    try:
        found = rows_of(params, write, rows)
        live = found.live
        _take_rows(reading, found)
    except HubError as error:
        reading.problems += error.problems
        reading.settings["data.path"] = "?"  # that it is not given is not what is wrong
    extra = layer_of(params.overrides, "overrides")
    both = [path for path in extra.values if path in reading.settings and path in reading.spelled]
    twice = [f"{path}: given twice, as {reading.spelled[path]} and in overrides. Keep one." for path in both]
    own = Layer(reading.settings, reading.spelled, (*reading.problems, *twice))
    return Asked(merge(own, extra), live, tuple(reading.notes))


def _take_rows(reading: _Reading, found: Rows) -> None:
    params = reading.params
    reading.settings |= found.settings
    reading.notes += found.notes
    for path in found.settings:
        if path in ("data.path", "data.validation"):
            reading.spelled[path] = reading.write("data_path" if path == "data.path" else "valid_split")
    template = params.chat_template if params.chat_template != "none" else None
    if params.chat_template == "none" and found.is_plain_text is False:
        reading.problems.append(
            f"{reading.write('chat_template')}: none, but the rows are conversations. Leave it out to take the model's "
            "own template, or name one: chatml, zephyr, llama, alpaca, vicuna, mistral."
        )
    if template is not None and found.is_plain_text:
        reading.problems.append(
            f"{reading.write('chat_template')}: {template} puts conversations into text, and the "
            "rows hold text already. Leave it out, or name a column of messages: "
            f"{reading.write('text_column')} messages."
        )
    elif template not in (None, "tokenizer"):
        reading.give("data.chat_template", template, "chat_template")
    if not params.add_eos_token and found.is_plain_text is False:
        reading.problems.append(
            f"{reading.write('add_eos_token')}: off, but the rows are conversations, and what closes these is the chat "
            f"template's to say. Leave it out, or name another {reading.write('chat_template')}."
        )
    if not params.response_only_loss:
        reading.give("data.unmask", True, "response_only_loss")
    if not params.add_eos_token:
        reading.give("data.end_token", False, "add_eos_token")
    needs_rows = params.use_enhanced_eval or params.early_stopping_patience is not None
    if needs_rows and "data.validation" not in reading.settings:
        reading.settings["data.validation_fraction"] = 0.1
        reading.notes.append(
            "a tenth of the rows is set aside for evaluation; name rows of your own with "
            f"{reading.write('valid_split')} or {reading.write('valid_path')}"
        )


def _trainer(reading: _Reading) -> Iterator[str]:
    trainer, write = reading.params.trainer, reading.write("trainer")
    if trainer == "distillation":
        yield f"{write}: found 'distillation'. Write {write} sft with {reading.write('use_distillation')}."
    elif trainer in TRAINERS:
        yield f"{write}: found {trainer!r}; only sft is here. Write {write} sft."
    elif trainer != "sft":
        yield f"{write}: found {shown(trainer)}; allowed: sft. Write {write} sft."


def _batch(reading: _Reading) -> Iterator[str]:
    params = reading.params
    for name in ("batch_size", "gradient_accumulation"):
        if getattr(params, name) < 1:
            yield f"{reading.write(name)}: found {getattr(params, name)}; allowed: a whole number of at least 1."
    name = "batch_size" if reading.is_given("batch_size") else "gradient_accumulation"
    if params.batch_size > 0 and params.gradient_accumulation > 0:
        reading.give("training.global_batch_size", params.batch_size * params.gradient_accumulation, name)


def _length(reading: _Reading) -> Iterator[str]:
    params = reading.params
    names = [name for name in ("max_seq_length", "model_max_length", "block_size") if reading.is_given(name)]
    given = {name: getattr(params, name) for name in names if not (name == "block_size" and params.block_size == -1)}
    if len(set(given.values())) > 1:
        told = ", ".join(f"{reading.write(name)} {value}" for name, value in given.items())
        yield f"{told}: these are names of one length, the longest sample in tokens. Keep one."
    name, length = next(iter(given.items()), ("max_seq_length", params.max_seq_length))
    reading.give("training.max_seq_len", length, name)
    reading.settings["data.overlong"] = "truncate"


def _optimizer(reading: _Reading) -> Iterator[str]:
    params, write = reading.params, reading.write
    ours = OPTIMIZERS.get(params.optimizer)
    if ours is None:
        yield f"{write('optimizer')}: found {shown(params.optimizer)}; allowed: one of {', '.join(OPTIMIZERS)}."
    else:
        reading.give("optimizer.name", ours, "optimizer")
        if ours in ADAM and ours not in LION:
            reading.settings["optimizer.beta2"] = ADAM_BETA2
    schedule = SCHEDULES.get(params.scheduler, params.scheduler)
    reading.give("lr_scheduler.name", schedule, "scheduler")
    if params.scheduler == "constant":  # in transformers the one without warm-up
        if reading.is_given("warmup_ratio") and params.warmup_ratio:
            yield (
                f"{write('warmup_ratio')}: {params.warmup_ratio}, but the schedule 'constant' has no warm-up. Write "
                f"{write('scheduler')} constant_with_warmup, or leave {write('warmup_ratio')} out."
            )
    else:
        reading.give("lr_scheduler.warmup_ratio", params.warmup_ratio, "warmup_ratio")


def _memory(reading: _Reading) -> Iterator[str]:
    params, write = reading.params, reading.write
    path = "training.activation_checkpointing"
    if params.disable_gradient_checkpointing and params.gradient_checkpointing:
        yield (
            f"{write('gradient_checkpointing')} and {write('disable_gradient_checkpointing')}: both are given, and one "
            "excludes the other. Leave one out."
        )
    elif params.disable_gradient_checkpointing or params.gradient_checkpointing is False:
        reading.settings[path] = "none"
    elif params.gradient_checkpointing:
        reading.settings[path] = "full"
    if reading.is_given("packing"):
        reading.give("data.packing", params.packing, "packing")
    reading.give("model.dtype", DTYPES[params.mixed_precision], "mixed_precision")
    if params.mixed_precision == "fp16":
        reading.notes.append(
            f"{write('mixed_precision')} fp16: computed in bfloat16 where this machine multiplies it fast, else in "
            "float32"
        )


def _adapter(reading: _Reading) -> Iterator[str]:
    params = reading.params
    if not params.peft:
        yield from _without(reading, OF_LORA, "peft")
        return
    reading.give("algorithm", "lora_sft", "peft")
    for name, path in OF_LORA.items():
        value = getattr(params, name)
        if name == "target_modules" and isinstance(value, str) and value != "all-linear":
            value = [one.strip() for one in value.split(",") if one.strip()]
        if value is not None and value is not False:
            reading.give(path, value, name)


def _teacher(reading: _Reading) -> Iterator[str]:
    params = reading.params
    if not params.use_distillation:
        yield from _without(reading, OF_DISTILLATION, "use_distillation")
        return
    if params.teacher_model is None:
        yield f"{reading.write('teacher_model')}: not given; {reading.write('use_distillation')} needs a teacher."
    for name, path in OF_DISTILLATION.items():
        if getattr(params, name) is not None:
            reading.give(path, getattr(params, name), name)


def _without(reading: _Reading, names: Mapping[str, str], switch: str) -> Iterator[str]:
    """A line for each parameter that is given and does nothing while `switch` is off."""
    for name in names:
        if reading.is_given(name) and getattr(reading.params, name) is not False:
            yield (
                f"{reading.write(name)}: {shown(getattr(reading.params, name))} would change nothing without "
                f"{reading.write(switch)}. Give that too, or leave it out."
            )


def _evaluation(reading: _Reading) -> Iterator[str]:
    params, write = reading.params, reading.write
    metrics = params.eval_metrics.split(",") if isinstance(params.eval_metrics, str) else params.eval_metrics
    wanted = [name.strip() for name in metrics if name.strip() and name.strip() != "perplexity"]
    if params.use_enhanced_eval:
        if wanted or params.eval_save_predictions:
            reading.settings["evaluation.generate"] = True
        if wanted:
            reading.give("evaluation.metrics", wanted, "eval_metrics")
    else:
        yield from _without(reading, {"eval_save_predictions": ""}, "use_enhanced_eval")
        if wanted:
            yield from _without(reading, {"eval_metrics": ""}, "use_enhanced_eval")
    reading.settings["evaluation.at_epoch"] = params.eval_strategy == "epoch"
    reading.settings["evaluation.at_start"] = params.eval_strategy != "no"
    if params.eval_strategy == "steps":
        if params.eval_steps is None:
            yield f"{write('eval_steps')}: not given; {write('eval_strategy')} steps needs a number of them."
        else:
            reading.give("evaluation.interval", params.eval_steps, "eval_steps")
    elif params.eval_steps is not None:
        yield f"{write('eval_steps')}: would change nothing without {write('eval_strategy')} steps. Leave one out."


def _saving(reading: _Reading) -> Iterator[str]:
    params, write = reading.params, reading.write
    reading.settings["checkpoint.at_epoch"] = params.save_strategy == "epoch"
    if params.save_strategy == "no":
        reading.settings["checkpoint.minutes"] = None
        if reading.is_given("save_total_limit"):
            yield f"{write('save_total_limit')}: would change nothing with {write('save_strategy')} no. Leave one out."
    if params.save_strategy == "steps":
        reading.give("checkpoint.interval", params.save_steps, "save_steps")
    elif reading.is_given("save_steps"):
        yield f"{write('save_steps')}: would change nothing without {write('save_strategy')} steps. Give that too."
    if params.resume_from_checkpoint not in (None, "auto"):
        yield (
            f"{write('resume_from_checkpoint')}: found {shown(params.resume_from_checkpoint)}; started again with the "
            f"same {write('project_name')}, a run goes on from the newest whole checkpoint there. Leave it out, or "
            "write auto."
        )


def _reports(reading: _Reading) -> Iterator[str]:
    params, write = reading.params, reading.write
    if params.logging_steps != -1:
        reading.give("monitoring.log_interval", params.logging_steps, "logging_steps")
    if params.log == "tensorboard":
        reading.settings["monitoring.tensorboard"] = True
    if params.log == "wandb":
        reading.give("monitoring.wandb", True, "log")
        if params.project_name:
            reading.settings["monitoring.wandb_project"] = os.path.basename(os.path.normpath(params.project_name))
    if params.wandb_run_id is not None:
        yield (
            f"{write('wandb_run_id')}: the id is kept in the run folder, so that a run that goes on is the same one at "
            "Weights & Biases. Leave it out; a name is given as monitoring.wandb_run_name."
        )
    if params.wandb_visualizer:
        yield (
            f"{write('wandb_visualizer')}: starts another program beside the run. Leave it out, write {write('log')} "
            "wandb, and run `wandb beta leet` in a second terminal; report.html of the project has the curves anyway."
        )


def _machine(reading: _Reading) -> Iterator[str]:
    params, write = reading.params, reading.write
    if params.unsloth:
        yield (
            f"{write('unsloth')}: Unsloth replaces the model's code on an NVIDIA GPU, needs the package unsloth, and "
            "trains in a loop of its own. Leave it out: fused kernels and a chunked loss are always on here."
        )
    if params.distributed_backend == "ddp":
        reading.give("processes.procs", "gpu", "distributed_backend")
    elif params.distributed_backend == "deepspeed":
        yield f"{write('distributed_backend')}: deepspeed is not here. Write ddp, or leave it out."
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        yield (
            f"WORLD_SIZE is {world}: started in several processes, by accelerate launch or torchrun. This command "
            f"starts its own. Run it alone, with {write('distributed_backend')} ddp."
        )


def _sweep(reading: _Reading) -> Iterator[str]:
    names = ("sweep_backend", "sweep_n_trials", "sweep_metric", "sweep_direction", "sweep_params")
    if not reading.params.use_sweep:
        yield from _without(reading, dict.fromkeys(names, ""), "use_sweep")


def _hub(reading: _Reading) -> Iterator[str]:
    params, write = reading.params, reading.write
    names = ("repo_id", "username", "hub_private")
    if not params.push_to_hub:
        given = [name for name in names if reading.is_given(name)]
        yield from (
            f"{write(name)}: would change nothing without {write('push_to_hub')}. Leave it out." for name in given
        )
        return
    if params.repo_id is None and params.username is None:
        yield f"{write('push_to_hub')}: needs {write('repo_id')} OWNER/NAME, or {write('username')} OWNER."
        return
    name = os.path.basename(os.path.normpath(params.project_name or "model"))
    reading.give("hub.push", True, "push_to_hub")
    reading.give(
        "hub.repo_id", params.repo_id or f"{params.username}/{name}", "repo_id" if params.repo_id else "username"
    )
    reading.give("hub.private", params.hub_private, "hub_private")


PARTS: tuple[Callable[[_Reading], Iterator[str]], ...] = (
    _trainer,
    _batch,
    _length,
    _optimizer,
    _memory,
    _adapter,
    _teacher,
    _evaluation,
    _saving,
    _reports,
    _machine,
    _sweep,
    _hub,
)
"""Each gives settings and yields what is wrong."""
