"""Dialects: how each way of calling us names the settings of the one recipe.

The keywords of `sft()` are a table from names to recipe paths; the few that say something else than one setting have a
function each. YAML and flags use recipe paths (and the spellings of `recipe.names`), so they need no table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any

from training_hub.algorithms import find_algorithm
from training_hub.errors import RecipeError
from training_hub.frontends.keyword import Keyword, Settings, flag
from training_hub.frontends.lora_keywords import LORA, whole_batch
from training_hub.recipe import Recipe
from training_hub.recipe.check import RIVALS
from training_hub.recipe.evaluation import LIVE
from training_hub.recipe.findings import Names
from training_hub.recipe.load import Layer, build, layer_of, merge
from training_hub.recipe.names import nearest, nearest_setting
from training_hub.recipe.sections import DataSource
from training_hub.recipe.translate import missing, shown

# Schedules as transformers.get_scheduler names them, where we use another name.
SCHEDULES = MappingProxyType(
    {"constant_with_warmup": "constant", "cosine_with_min_lr": "cosine", "warmup_stable_decay": "wsd"}
)


@dataclass(frozen=True)
class Request:
    """What a caller of a function asked for: settings, and live objects that stand in for `data.path` and its like."""

    layer: Layer
    rows: Any = None
    validation_rows: Any = None
    watchers: tuple[Callable[[Any], None], ...] = ()
    metrics: tuple[Callable[..., Any], ...] = ()

    @property
    def live(self) -> tuple[str, ...]:
        given = {"data.path": self.rows, "data.validation": self.validation_rows}
        return tuple(path for path, rows in given.items() if rows is not None)


def recipe_from(layer: Layer, *, algorithm: str, backend: str, live: Collection[str] = ()) -> Recipe:
    """The recipe of a caller's settings, over the defaults of the contract that its backend names.

    algorithm, backend: what holds where the settings do not say. live: paths that live objects stand in for.
    Raises RecipeError listing everything that is wrong.
    """
    layer = merge(Layer({"algorithm": algorithm, "backend": backend}), layer)
    entry = find_algorithm(str(layer.values["algorithm"]))
    contract = entry.contract(layer.values["backend"])
    demanded = [path for path in (contract.required if contract else ()) if layer.values.get(path) is None]
    defaults = _defaults_beside(layer, contract.defaults if contract else {})
    problems = [] if contract else _unless_installed(layer.values["backend"], [c.name for c in entry.contracts])
    merged = merge(Layer(defaults), layer)
    return build(
        merged.values,
        spelled=merged.spelled,
        problems=[
            *merged.problems,
            *problems,
            *_beside_live(layer, live),
            *(missing(path, Names(merged.spelled)) for path in demanded),
        ],
        required=(*entry.required, "data.path"),
        live=live,
    )


def request_from(keywords: Mapping[str, Any], function: str = "sft") -> Request:
    """What the keywords of a function ask for; None means "not given".

    Unknown keywords and values that cannot be read are problems of the layer, told with all others by `recipe_from`.
    """
    given = {name: value for name, value in keywords.items() if value is not None}
    known = KEYWORDS_OF.get(function, KEYWORDS)
    rows, validation_rows = (
        given.pop(name) if is_live(given.get(name)) else None for name in ("data_path", "validation_data_path")
    )
    watchers, problems = _watchers(given.pop("callbacks", ()))
    for name in ("data_path", "validation_data_path"):
        if isinstance(given.get(name), Mapping):  # a DatasetDict, say
            kind = type(given.pop(name)).__name__
            problems.append(f"{name}: found a {kind}; allowed: a path, a list of paths, or rows. Hand over one split.")
    problems += whole_batch(given) if "micro_batch_size" in known else []
    extra = layer_of(given.pop("overrides", None), "overrides")
    problems += [unknown_keyword(name, function) for name in given if name not in known]
    layer = layer_from([known[name] for name in given if name in known], given)
    twice = [path for path in extra.values if path in layer.values]
    problems += [f"{path}: given twice, as {layer.spelled[path]} and in overrides. Keep one." for path in twice]
    layer, metrics = _live_metrics(merge(layer, extra))
    own_names = {one.path: one.name for one in reversed([*known.values()]) if one.path not in extra.values}
    spelled = {**own_names, **layer.spelled}
    return Request(Layer(layer.values, spelled, (*problems, *layer.problems)), rows, validation_rows, watchers, metrics)


def is_live(value: Any) -> bool:
    """Whether `value` is rows in memory (a DataFrame, a `datasets` object, dictionaries), not the name of some."""
    if isinstance(value, (str, os.PathLike, Mapping)) or not hasattr(value, "__iter__"):
        return False
    if isinstance(value, (list, tuple)):
        return not all(isinstance(item, (str, os.PathLike)) or _is_source(item) for item in value)
    return True


def unknown_keyword(name: str, function: str) -> str:
    """The line for a keyword that nobody knows: the nearest one, or the setting that has this name."""
    near = nearest(name, KEYWORDS_OF.get(function, KEYWORDS))
    if near:
        return f"{function}() has no parameter '{name}'. Did you mean {near}?"
    setting = nearest_setting(name)
    hint = f" For the setting {setting} write overrides={{'{setting}': ...}}." if setting else ""
    return f"{function}() has no parameter '{name}'.{hint}"


def layer_from(keywords: Iterable[Keyword], given: Mapping[str, Any]) -> Layer:
    """The settings that the values of these keywords stand for; a setting given twice is a problem of the layer."""
    values: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    problems: list[str] = []
    for keyword in keywords:
        try:
            pairs = keyword.assignments(given[keyword.name])
        except RecipeError as error:
            problems += error.problems
            continue
        for path, value in pairs:
            if path in values and path not in SHARED:
                problems.append(f"{path}: given twice, as {spelled[path]} and as {keyword.name}. Keep one.")
                continue
            values[path] = (values.get(path) or value) if path in SHARED else value
            spelled.setdefault(path, keyword.name)
    return Layer(values, spelled, tuple(problems))


def _defaults_beside(layer: Layer, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults, but for those that would contradict what the caller says: no epochs beside steps."""
    excluded = {
        other
        for pair in RIVALS
        for mine, other in (pair, reversed(pair))
        if layer.values.get(mine) is not None and other not in layer.values
    }
    return {path: value for path, value in defaults.items() if path not in excluded}


def _beside_live(layer: Layer, live: Collection[str]) -> list[str]:
    """Settings that name rows where rows in memory were handed over as well."""
    named = {"data.path": ("data.path",), "data.validation": ("data.validation", "data.validation_fraction")}
    both = [path for one in live for path in named[one] if layer.values.get(path)]
    return [f"{path}: found {shown(layer.values[path])} beside rows in memory. Leave one out." for path in both]


def _unless_installed(backend: str, contracts: list[str]) -> list[str]:
    known = [*contracts, *sorted({point.name for point in entry_points(group="training_hub.backends")})]
    if backend in known:
        return []
    near = nearest(str(backend), known)
    hint = f" Write backend: {near}" if near else ""
    return [f"backend: found {shown(backend)}; known: {', '.join(known)}.{hint}"]


def _watchers(callbacks: Any) -> tuple[tuple[Callable[[Any], None], ...], list[str]]:
    several = tuple(callbacks) if isinstance(callbacks, (list, tuple)) else (callbacks,)
    wrong = [one for one in several if not callable(one)]
    problems = [f"callbacks: found {shown(one)}; allowed: functions that take a StepReport." for one in wrong]
    return tuple(one for one in several if callable(one)), problems


def _live_metrics(layer: Layer) -> tuple[Layer, tuple[Callable[..., Any], ...]]:
    """The layer with names in the place of functions in evaluation.metrics, and these functions."""
    listed = layer.values.get("evaluation.metrics")
    listed = [listed] if callable(listed) else listed
    if not isinstance(listed, (list, tuple)) or not any(callable(one) for one in listed):
        return layer, ()
    names = [f"{LIVE}{getattr(one, '__name__', type(one).__name__)}" if callable(one) else one for one in listed]
    values = {**layer.values, "evaluation.metrics": names}
    return replace(layer, values=values), tuple(one for one in listed if callable(one))


def _is_source(value: Any) -> bool:
    return isinstance(value, Mapping) and "path" in value and set(value) <= set(DataSource.model_fields)


def _schedule(value: Any) -> Settings:
    return [("lr_scheduler.name", SCHEDULES.get(value, value) if isinstance(value, str) else value)]


def _schedule_arguments(value: Any) -> Settings:
    known = ("min_lr", "decay_ratio", "warmup_ratio", "warmup_steps")
    wrong = [key for key in value if key not in known] if isinstance(value, Mapping) else [value]
    if wrong:
        raise RecipeError(
            f"lr_scheduler_kwargs: found {', '.join(shown(key) for key in wrong)}; allowed: a dictionary with some of "
            f"{', '.join(known)}. Write lr_scheduler_kwargs={{'min_lr': 1e-7}}"
        )
    # The page of `osft` says dict[str, str], so that here a number may come as text.
    return [(f"lr_scheduler.{key}", _number_in(one)) for key, one in value.items()]


def _number_in(value: Any) -> Any:
    for kind in (int, float):
        if isinstance(value, str):
            with suppress(ValueError):
                return kind(value)
    return value


def _processes(value: Any) -> Settings:
    # torchrun takes digits as text, and so do scripts that read them from the environment.
    return [("processes.procs", int(value) if isinstance(value, str) and value.isdigit() else value)]


def _switches_on(tracker: str, path: str) -> Callable[[Any], Settings]:
    return lambda value: [(f"monitoring.{tracker}", True), (path, value)]


# Settings that several keywords may ask for together; one that asks for it is enough.
SHARED = ("checkpoint.at_epoch", "monitoring.wandb", "monitoring.mlflow")

_WANDB = "monitoring.wandb_"
_MLFLOW = "monitoring.mlflow_"

_TABLE = (
    Keyword("model_path", "model.path"),
    Keyword(
        "data_path",
        "data.path",
        doc="File (jsonl, json, csv, parquet; plain, gzip or zstd), folder, glob or hub name, a list of these, or rows "
        "in memory: a DataFrame, a `datasets` object, a list of dictionaries.",
    ),
    Keyword("ckpt_output_dir", "output"),
    Keyword("num_epochs", "training.epochs", kind=int),
    Keyword("effective_batch_size", "training.global_batch_size"),
    Keyword("learning_rate", "optimizer.lr"),
    Keyword("max_seq_len", "training.max_seq_len"),
    Keyword("max_tokens_per_gpu", "training.max_tokens_per_gpu"),
    Keyword("data_output_dir", "data.cache_dir", doc="Where processed data is kept. Default: the user's cache folder."),
    Keyword("save_samples", "checkpoint.save_samples"),
    Keyword("warmup_steps", "lr_scheduler.warmup_steps"),
    Keyword(
        "accelerate_full_state_at_epoch",
        "checkpoint.at_epoch",
        doc="Save at the end of each epoch what a run needs to go on. Every checkpoint holds that here, so this asks "
        "for the same as checkpoint_at_epoch; where both are given, one that is True is enough.",
    ),
    Keyword("checkpoint_at_epoch", "checkpoint.at_epoch"),
    Keyword("max_batch_len", "training.max_tokens_per_gpu"),
    Keyword("batch_size", "training.global_batch_size"),
    Keyword("max_steps", "training.steps"),
    Keyword("seed", "seed"),
    Keyword("random_seed", "seed"),
    Keyword("lr_scheduler", "lr_scheduler.name", _schedule),
    Keyword(
        "lr_scheduler_kwargs",
        "lr_scheduler.min_lr",
        _schedule_arguments,
        kind=dict,
        doc="Further settings of the schedule: a dictionary with some of min_lr, decay_ratio, warmup_ratio, "
        "warmup_steps.",
    ),
    Keyword("warmup_ratio", "lr_scheduler.warmup_ratio"),
    Keyword("beta1", "optimizer.beta1"),
    Keyword("beta2", "optimizer.beta2"),
    Keyword("eps", "optimizer.eps"),
    Keyword("weight_decay", "optimizer.weight_decay"),
    Keyword("max_grad_norm", "training.max_norm"),
    Keyword("is_pretraining", "data.pretraining"),
    Keyword("block_size", "data.block_size"),
    Keyword(
        "document_column_name",
        "data.columns",
        lambda value: [("data.columns.text", value)],
        doc="Column that holds the text of the documents.",
        kind=str,
    ),
    Keyword("chat_template", "data.chat_template"),
    Keyword("chat_tmpl_path", "data.chat_template"),
    Keyword("unmask_messages", "data.unmask"),
    Keyword(
        "use_processed_dataset",
        "data.format",
        flag("use_processed_dataset", [("data.format", "tokens")]),
        doc="The rows are tokenised already: input_ids and labels.",
        kind=bool,
    ),
    Keyword(
        "validation_data_path",
        "data.validation",
        doc="Validation rows: what data_path takes; each of a list is a set with a loss of its own.",
    ),
    Keyword("validation_split", "data.validation_fraction"),
    Keyword("validation_frequency", "evaluation.interval"),
    Keyword("validate_at_epoch", "evaluation.at_epoch"),
    Keyword("generate", "evaluation.generate", kind=int),
    Keyword(
        "metrics",
        "evaluation.metrics",
        lambda value: [("evaluation.metrics", [value] if isinstance(value, str) or callable(value) else value)],
        kind=list,
        doc="With generate, what answers are compared by: names as in evaluation.metrics, and functions called as "
        "function(answer, reference).",
    ),
    Keyword("save_best_val_loss", "checkpoint.keep_best"),
    Keyword("save_final_checkpoint", "checkpoint.final"),
    Keyword(
        "keep_last_checkpoint_only",
        "checkpoint.keep_last",
        flag("keep_last_checkpoint_only", [("checkpoint.keep_last", 1)], [("checkpoint.keep_last", None)]),
        doc="True: only the newest checkpoint stays on disk. False: all do.",
        kind=bool,
    ),
    Keyword("save_dtype", "model.save_dtype"),
    Keyword("trust_remote_code", "model.trust_remote_code"),
    Keyword(
        "use_liger",
        "",
        flag("use_liger", []),
        doc="Accepted either way: the engine always computes head and loss fused and in chunks, which is what Liger's "
        "kernels are asked for, and needs no package for it.",
        kind=bool,
    ),
    Keyword(
        "disable_flash_attn",
        "model.attention",
        flag("disable_flash_attn", [("model.attention", "documents")]),
        doc="Attention sample by sample, without the variable-length kernel.",
        kind=bool,
    ),
    Keyword("teacher_model", "distillation.teacher"),
    Keyword("distill_divergence", "distillation.divergence"),
    Keyword("distill_temperature", "distillation.temperature"),
    Keyword("distill_alpha", "distillation.alpha"),
    Keyword("distill_cache", "distillation.cache"),
    Keyword("distill_prompt", "distillation.prompt"),
    Keyword("distill_max_teacher_length", "distillation.max_teacher_length"),
    Keyword("nproc_per_node", "processes.procs", _processes),
    Keyword("nnodes", "processes.nodes"),
    Keyword("node_rank", "processes.node_rank"),
    Keyword("rdzv_id", "processes.rdzv_id", kind=int),
    Keyword("rdzv_endpoint", "processes.rdzv_endpoint"),
    Keyword("master_addr", "processes.master_addr"),
    Keyword("master_port", "processes.master_port"),
    Keyword("wandb_project", f"{_WANDB}project", _switches_on("wandb", f"{_WANDB}project")),
    Keyword("wandb_entity", f"{_WANDB}entity", _switches_on("wandb", f"{_WANDB}entity")),
    Keyword("wandb_run_name", f"{_WANDB}run_name", _switches_on("wandb", f"{_WANDB}run_name")),
    Keyword("tensorboard_log_dir", "monitoring.tensorboard", doc="Write TensorBoard files to this folder.", kind=str),
    Keyword("mlflow_tracking_uri", f"{_MLFLOW}tracking_uri", _switches_on("mlflow", f"{_MLFLOW}tracking_uri")),
    Keyword("mlflow_experiment_name", f"{_MLFLOW}experiment_name", _switches_on("mlflow", f"{_MLFLOW}experiment_name")),
    Keyword("mlflow_run_name", f"{_MLFLOW}run_name", _switches_on("mlflow", f"{_MLFLOW}run_name")),
)

_OSFT = (
    Keyword("unfreeze_rank_ratio", "osft.unfreeze_rank_ratio"),
    Keyword("target_patterns", "osft.targets"),
    Keyword(
        "osft_memory_efficient_init",
        "",
        flag("osft_memory_efficient_init", []),
        doc="Accepted either way: weights are always decomposed one at a time, beside a model that is loaded once.",
        kind=bool,
    ),
)

KEYWORDS: Mapping[str, Keyword] = MappingProxyType({keyword.name: keyword for keyword in _TABLE})
KEYWORDS_OF: Mapping[str, Mapping[str, Keyword]] = MappingProxyType(
    {
        "sft": KEYWORDS,
        "osft": MappingProxyType({**KEYWORDS, **{keyword.name: keyword for keyword in _OSFT}}),
        "lora_sft": MappingProxyType({**KEYWORDS, **{keyword.name: keyword for keyword in LORA}}),
    }
)
REQUIRED_OF: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "sft": ("model_path", "data_path", "ckpt_output_dir"),
        "osft": (
            "model_path",
            "data_path",
            "unfreeze_rank_ratio",
            "effective_batch_size",
            "max_tokens_per_gpu",
            "max_seq_len",
            "learning_rate",
            "ckpt_output_dir",
        ),
        "lora_sft": ("model_path", "data_path", "ckpt_output_dir"),
    }
)
