"""The fields of SFTConfig that are honoured: EasyDeL's names, TRL's, and a few of our own, each with what it sets.

A field whose meaning depends on others has no function here; `together.py` reads it with them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from training_hub.errors import RecipeError
from training_hub.frontends.autotrain.meaning import OPTIMIZERS as TRANSFORMERS_OPTIMIZERS
from training_hub.frontends.keyword import Keyword, Settings, flag
from training_hub.recipe.translate import shown

EASYDEL, TRL, BOTH, OURS = "EasyDeL", "TRL", "both", "here"


@dataclass(frozen=True)
class Field(Keyword):
    """A field of SFTConfig. of: who has it. default: what it reads as where it was not given."""

    of: str = BOTH
    default: Any = None

    def type_or_none(self) -> type | None:
        """The type of its values, where one is known."""
        return self.type() if self.kind is not None or self.path else None


OPTIMIZERS: Mapping[str, str] = MappingProxyType(
    {"adafactor": "Adafactor", "adamw": "AdamW", "lion": "Lion", "muon": "Muon", "rmsprop": "RMSprop"}
)
"""Those of EasyDeL that are here."""

CHECKPOINTING: Mapping[Any, str] = MappingProxyType(
    {
        True: "full",
        False: "none",
        "": "none",
        "none": "none",
        "everything_saveable": "none",
        "nothing_saveable": "full",
        "checkpoint_dots": "selective",
        "checkpoint_dots_with_no_batch_dims": "selective",
        "dots_saveable": "selective",
        "dots_with_no_batch_dims_saveable": "selective",
    }
)
"""gradient_checkpointing: TRL's booleans and EasyDeL's policies."""

ATTENTION: Mapping[str, str] = MappingProxyType(
    {
        "auto": "auto",
        "vanilla": "documents",
        "sdpa": "documents",
        "eager": "documents",
        "flash_attn2": "varlen",
        "cuda_flash_attn2": "varlen",
        "flash_attention_2": "varlen",
    }
)
"""attn_mechanism of EasyDeL and attn_implementation of transformers, to model.attention."""


def chosen(name: str, table: Mapping[Any, Any], path: str, why: str = "") -> Callable[[Any], Settings]:
    """One of the keys of `table`, in any case."""

    def settings(value: Any) -> Settings:
        key = value.lower() if isinstance(value, str) else value
        if not isinstance(key, str | bool) or key not in table:
            known = ", ".join(dict.fromkeys(shown(one) for one in table))
            raise RecipeError(f"{name}: found {shown(value)}; allowed: {known}.{why}")
        return [(path, table[key])]

    return settings


def either(name: str) -> Callable[[Any], Settings]:
    """For a switch that no result could tell apart."""
    return flag(name, [])


def number(name: str) -> Callable[[Any], Settings]:
    """For a number that no result could tell apart."""

    def settings(value: Any) -> Settings:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise RecipeError(f"{name}: found {shown(value)}; allowed: a whole number of at least 0.")
        return []

    return settings


def _count_of_checkpoints(value: Any) -> Settings:
    return [("checkpoint.keep_last", None if value == 0 else value)]


def _packing_strategy(value: Any) -> Settings:
    if value in ("bfd", "first_fit"):
        return []  # what is done anyway
    if value in ("bfd_split", "bfd-requeue"):
        return [("data.overlong", "split")]
    if value == "wrapped":
        return [("data.pretraining", True)]
    raise RecipeError(f"packing_strategy: found {shown(value)}; allowed: bfd, bfd_split, wrapped.")


def _truncation(value: Any) -> Settings:
    if value != "keep_start":
        raise RecipeError(
            f"truncation_mode: found {shown(value)}; allowed: keep_start, which cuts the end of a row that is longer "
            "than max_length. Leave it out, or say what happens to such rows with overrides={'data.overlong': 'drop'}."
        )
    return [("data.overlong", "truncate")]


def _dataset_arguments(value: Any) -> Settings:
    known = ("skip_prepare_dataset", "append_concat_token", "add_special_tokens")
    wrong = [key for key in value if key not in known] if isinstance(value, Mapping) else [value]
    wrong += [key for key in known if isinstance(value, Mapping) and not isinstance(value.get(key, True), bool)]
    if wrong:
        raise RecipeError(
            f"dataset_kwargs: found {', '.join(shown(key) for key in wrong)}; allowed: a dictionary with some of "
            f"{', '.join(known)}, each True or False."
        )
    found: Settings = []
    if value.get("skip_prepare_dataset"):
        found.append(("data.format", "tokens"))
    if "append_concat_token" in value:
        found.append(("data.end_token", value["append_concat_token"]))
    if "add_special_tokens" in value:
        found.append(("data.start_token", value["add_special_tokens"]))
    return found


def _optimizer_arguments(value: Any) -> Settings:
    known = {
        "b1": "optimizer.beta1",
        "b2": "optimizer.beta2",
        "beta1": "optimizer.beta1",
        "beta2": "optimizer.beta2",
        "eps": "optimizer.eps",
        "momentum": "optimizer.momentum",
        "weight_decay": "optimizer.weight_decay",
    }
    wrong = [key for key in value if key not in known] if isinstance(value, Mapping) else [value]
    if wrong:
        raise RecipeError(
            f"extra_optimizer_kwargs: found {', '.join(shown(key) for key in wrong)}; allowed: a dictionary with some "
            f"of {', '.join(known)}."
        )
    return [(known[key], one) for key, one in value.items()]


def _loss_arguments(value: Any) -> Settings:
    known = ("label_smoothing", "z_loss")
    wrong = [key for key in value if key not in known] if isinstance(value, Mapping) else [value]
    if wrong:
        raise RecipeError(
            f"loss_config: found {', '.join(shown(key) for key in wrong)}; allowed: a dictionary with some of "
            f"{', '.join(known)}. Write loss_config={{'z_loss': 1e-4}}"
        )
    return [(f"loss.{key}", one) for key, one in value.items()]


def _progress_bar(value: Any) -> Settings:
    consoles = {"tqdm": "auto", "rich": "rich", "json": "plain"}
    if value not in consoles:
        raise RecipeError(f"progress_bar_type: found {shown(value)}; allowed: {', '.join(consoles)}.")
    return [("monitoring.console", consoles[value])]


def _engine(value: Any) -> Settings:
    if value in ("cpu", "gpu", "tpu"):
        engine = "'jax' is the engine that reaches TPUs" if value == "tpu" else "'torch' or 'jax'"
        raise RecipeError(
            f"backend: found {shown(value)}, a kind of device; here backend names the engine, {engine}, which takes "
            "the device that it finds. Leave it out; to keep torch off a GPU, set CUDA_VISIBLE_DEVICES to nothing."
        )
    return [("backend", value)]


def _frozen(value: Any) -> Settings:
    return [("freezing.weights", [value] if isinstance(value, str) else value)]


def _on_cpu(value: Any) -> Settings:
    has_gpu = os.environ.get("CUDA_VISIBLE_DEVICES") != "" and any(Path("/dev").glob("nvidia[0-9]*"))
    if not isinstance(value, bool) or (value and has_gpu):
        raise RecipeError(
            f"use_cpu: found {shown(value)}; the device is the one that is found. To keep torch off a GPU, set the "
            "environment variable CUDA_VISIBLE_DEVICES to nothing, and leave use_cpu out."
        )
    return []


def _transformers_optimizer(value: Any) -> Settings:
    if str(value) not in TRANSFORMERS_OPTIMIZERS:
        raise RecipeError(f"optim: found {shown(value)}; allowed: one of {', '.join(TRANSFORMERS_OPTIMIZERS)}.")
    return [("optimizer.name", TRANSFORMERS_OPTIMIZERS[str(value)])]


def _loss_type(value: Any) -> Settings:
    if value not in ("nll", "chunked_nll", "dft"):
        raise RecipeError(f"loss_type: found {shown(value)}; allowed: nll, dft.")
    return [("loss.dft", True)] if value == "dft" else []


def _sampling(value: Any) -> Settings:
    orders = {"random": True, "sequential": False}
    if value not in orders:
        raise RecipeError(
            f"train_sampling_strategy: found {shown(value)}; allowed: {', '.join(orders)}. Rows are not grouped by "
            "length, since nothing is padded. Leave it out."
        )
    return [("data.shuffle", orders[value])]


_GONE = " Write EasyDeLOptimizers.ADAMW or MUON."

FIELDS: tuple[Field, ...] = (
    # What both have
    Field("learning_rate", "optimizer.lr", default=2e-5),
    Field("num_train_epochs", "training.epochs", default=3, doc="Passes over the rows; a fraction is allowed."),
    Field("weight_decay", "optimizer.weight_decay", kind=float,
          doc="Decay of matrices per step, times the learning rate: 0.01 as EasyDeL has it, 0 as TRL."),
    Field("warmup_steps", "", doc="Steps in which the rate rises; below 1, as TRL takes it, a share of all steps.",
          kind=float, default=0),
    Field("gradient_accumulation_steps", "training.global_batch_size", default=1,
          doc="What the batch size is multiplied by to make the samples of an optimizer step."),
    Field("max_length", "training.max_seq_len", kind=int,
          doc="Longest sample in tokens: 4096 as EasyDeL has it, 1024 as TRL; of a longer one the end is cut, which is "
          "counted. None, as TRL: a longer one than 4096 is an error."),
    Field("packing", "data.packing", default=False,
          doc="Lay several samples end to end, kept apart. Not given: on, since it changes the speed and never the "
          "result; a batch counts samples, packed or not."),
    Field("packing_strategy", "data.overlong", _packing_strategy, kind=str, default="bfd",
          doc="bfd: best fit, which is always done; bfd_split also cuts rows that are too long into several. wrapped: "
          "documents of plain text joined and cut into blocks."),
    Field("eval_packing", "data.validation_packing"),
    Field("dataset_text_field", "data.columns", kind=str,
          doc="Column with text, or with messages, that is trained on. Not given: the columns of a row tell."),
    Field("dataset_num_proc", "data.workers"),
    Field("dataset_kwargs", "data.end_token", _dataset_arguments, kind=dict,
          doc="skip_prepare_dataset: the rows hold input_ids and labels. append_concat_token: whether plain text is "
          "closed by the end-of-sequence token. add_special_tokens: as the field of this name."),
    Field("truncation_mode", "data.overlong", _truncation, kind=str, default="keep_start", doc="keep_start."),
    Field("assistant_only_loss", "data.unmask", kind=bool, default=True,
          doc="Not given and True: what the assistant says is trained. False: every role but system is."),
    Field("save_steps", "checkpoint.interval"),
    Field("save_total_limit", "checkpoint.keep_last", _count_of_checkpoints, kind=int,
          doc="How many of the newest checkpoints stay; None and 0: all."),
    Field("seed", "seed", default=42),
    Field("backend", "backend", _engine, kind=str, doc="Engine: torch or jax.", of=OURS),
    Field("gradient_checkpointing", "training.activation_checkpointing",
          chosen("gradient_checkpointing", CHECKPOINTING, "training.activation_checkpointing"), kind=bool,
          doc="True, False, or a policy of EasyDeL. Not given: as little as the memory of the device asks for."),
    Field("remove_unused_columns", "", either("remove_unused_columns"), kind=bool, default=True,
          doc="Accepted either way: columns that are not read are named once, and never reach the model."),
    Field("dataloader_num_workers", "", number("dataloader_num_workers"), kind=int, default=0,
          doc="Accepted: batches are cut from tokens that lie on disk, which needs no workers."),
    Field("dataloader_pin_memory", "", either("dataloader_pin_memory"), kind=bool, doc="Accepted either way.",
          default=False),
    Field("do_eval", "evaluation.at_epoch", kind=bool,
          doc="False: eval_dataset is measured at the last step only. Not given: whenever there is one."),
    # EasyDeL
    Field("model_name", "output", kind=str, of=EASYDEL, default="SFTTrainer",
          doc="Name of the run's folder, in save_directory."),
    Field("save_directory", "output", kind=str, of=EASYDEL, default="EasyDeL-Checkpoints",
          doc="Folder that holds the folder of the run."),
    Field("total_batch_size", "training.global_batch_size", of=EASYDEL, default=16,
          doc="Samples per batch over all devices; times gradient_accumulation_steps per optimizer step."),
    Field("max_sequence_length", "training.max_seq_len", of=EASYDEL, default=4096),
    Field("add_special_tokens", "data.start_token", of=EASYDEL, default=False),
    Field("num_of_sequences", "data.chunk_bytes", kind=int, of=EASYDEL, default=1024,
          doc="Sequences whose text is held in memory at once: so many times chars_per_token times max_length."),
    Field("chars_per_token", "data.chunk_bytes", kind=float, of=EASYDEL, default=3.6,
          doc="Characters of a token, for num_of_sequences."),
    Field("dataset_batch_size", "data.chunk_rows", of=EASYDEL, default=1000),
    Field("learning_rate_end", "lr_scheduler.min_lr", kind=float, of=EASYDEL,
          doc="Rate at the end. Without a scheduler the rate falls to it in a straight line."),
    Field("optimizer", "optimizer.name", chosen("optimizer", OPTIMIZERS, "optimizer.name", _GONE), kind=str,
          of=EASYDEL, default="adamw",
          doc="A member of EasyDeLOptimizers, or its value; mars, quad and skew are not here."),
    Field("scheduler", "lr_scheduler.name", kind=str, of=EASYDEL, default="none",
          doc="A member of EasyDeLSchedulers, or its value. none: constant, or with learning_rate_end linear."),
    Field("extra_optimizer_kwargs", "optimizer.beta1", _optimizer_arguments, kind=dict, of=EASYDEL,
          doc="b1, b2, eps, momentum, weight_decay."),
    Field("clip_grad", "training.max_norm", of=EASYDEL),
    Field("loss_config", "loss.z_loss", _loss_arguments, kind=dict, of=EASYDEL, doc="label_smoothing and z_loss."),
    Field("train_on_inputs", "data.unmask", of=EASYDEL, doc="True: every role but system is trained, and prompts."),
    Field("frozen_parameters", "freezing.weights", _frozen, kind=list, of=EASYDEL),
    Field("max_training_steps", "training.steps", of=EASYDEL),
    Field("evaluation_steps", "evaluation.interval", of=EASYDEL),
    Field("eval_batch_size", "", number("eval_batch_size"), kind=int, of=EASYDEL,
          doc="Accepted: rows are measured in packs that fit the device; the loss is that of all tokens."),
    Field("do_last_save", "checkpoint.final", of=EASYDEL, default=True),
    Field("save_interval_minutes", "checkpoint.minutes", of=EASYDEL),
    Field("resume_if_possible", "checkpoint.resume", flag("resume_if_possible", [],
          [("checkpoint.resume", "restart")]), kind=bool, of=EASYDEL, default=True,
          doc="False: what the folder holds is moved aside, and the run begins anew."),
    Field("shuffle_train_dataset", "data.shuffle", of=EASYDEL, default=True),
    Field("shuffle_seed_train", "seed", of=EASYDEL),
    Field("ids_to_pop_from_dataset", "", kind=list, of=EASYDEL, doc="Columns that are taken out of the rows."),
    Field("log_steps", "monitoring.log_interval", of=EASYDEL),
    Field("report_steps", "monitoring.log_interval", of=EASYDEL),
    Field("use_wandb", "monitoring.wandb", of=EASYDEL, default=False),
    Field("wandb_entity", "monitoring.wandb_entity", of=EASYDEL),
    Field("wandb_name", "monitoring.wandb_run_name", of=EASYDEL),
    Field("progress_bar_type", "monitoring.console", _progress_bar, kind=str, of=EASYDEL, default="tqdm",
          doc="tqdm: a live line on a terminal; rich; json: plain lines."),
    Field("verbose", "monitoring.console", flag("verbose", [], [("monitoring.console", "off")]), kind=bool, of=EASYDEL,
          default=True, doc="False: the run says nothing."),
    Field("merge_lora_before_save", "lora.merge", of=EASYDEL),
    Field("lmhead_chunksize", "", number("lmhead_chunksize"), kind=int, of=EASYDEL,
          doc="Accepted: head and loss are always computed in chunks."),
    Field("use_data_collator", "", either("use_data_collator"), kind=bool, of=EASYDEL, default=True,
          doc="Accepted either way: nothing is padded."),
    Field("use_grain", "", either("use_grain"), kind=bool, of=EASYDEL, default=True,
          doc="Accepted either way: which library reads rows changes nothing that is trained."),
    Field("track_memory", "", either("track_memory"), kind=bool, of=EASYDEL, default=False,
          doc="Accepted either way: each step's report has the peak of memory."),
    Field("auto_shard_states", "", either("auto_shard_states"), kind=bool, of=EASYDEL, default=True,
          doc="Accepted either way: how the state is spread over devices is what the model was loaded with."),
    # TRL
    Field("output_dir", "output", kind=str, of=TRL, doc="Folder of the run."),
    Field("per_device_train_batch_size", "training.global_batch_size", of=TRL, default=8,
          doc="Samples per process and batch; times gradient_accumulation_steps and the number of processes per step."),
    Field("per_device_eval_batch_size", "", number("per_device_eval_batch_size"), kind=int, of=TRL, default=8,
          doc="As eval_batch_size."),
    Field("max_steps", "training.steps", kind=int, of=TRL, default=-1, doc="Optimizer steps; -1: as the epochs say."),
    Field("lr_scheduler_type", "lr_scheduler.name", kind=str, of=TRL, default="linear",
          doc="linear, cosine, constant (no warm-up), constant_with_warmup, inverse_sqrt, cosine_with_min_lr, "
          "warmup_stable_decay."),
    Field("lr_scheduler_kwargs", "lr_scheduler.min_lr", kind=dict, of=TRL, doc="min_lr, min_lr_rate, decay_ratio."),
    Field("warmup_ratio", "lr_scheduler.warmup_ratio", of=TRL),
    Field("optim", "optimizer.name", _transformers_optimizer, kind=str, of=TRL, default="adamw_torch",
          doc="Name that transformers has for it."),
    Field("adam_beta1", "optimizer.beta1", of=TRL, default=0.9),
    Field("adam_beta2", "optimizer.beta2", of=TRL, default=0.999),
    Field("adam_epsilon", "optimizer.eps", of=TRL, default=1e-8),
    Field("max_grad_norm", "training.max_norm", of=TRL, default=1.0),
    Field("label_smoothing_factor", "loss.label_smoothing", of=TRL, default=0.0),
    Field("neftune_noise_alpha", "loss.neftune_noise_alpha", of=TRL),
    Field("loss_type", "loss.dft", _loss_type, kind=str, of=TRL, default="nll", doc="nll or dft."),
    Field("bf16", "model.dtype", kind=bool, of=TRL, doc="True: forward and backward in bfloat16. False: in float32."),
    Field("fp16", "model.dtype", kind=bool, of=TRL, default=False,
          doc="True: in bfloat16 where this machine multiplies it fast, else in float32; never in float16."),
    Field("completion_only_loss", "data.unmask", kind=bool, of=TRL,
          doc="Not given and True: of prompt and completion the completion is trained. False: the prompt too."),
    Field("padding_free", "", either("padding_free"), kind=bool, of=TRL, default=False,
          doc="Accepted either way: nothing is ever padded."),
    Field("pad_to_multiple_of", "", number("pad_to_multiple_of"), kind=int, of=TRL,
          doc="Accepted: nothing is ever padded."),
    Field("use_liger_kernel", "", either("use_liger_kernel"), kind=bool, of=TRL, default=False,
          doc="Accepted either way: head and loss are always fused and in chunks."),
    Field("chat_template_path", "data.chat_template", kind=str, of=TRL,
          doc="A Jinja file, or a tokenizer's folder with a chat_template.jinja."),
    Field("shuffle_dataset", "data.shuffle", of=TRL, default=True),
    Field("train_sampling_strategy", "data.shuffle", _sampling, kind=str, of=TRL, default="random",
          doc="random, or sequential: the order of the rows."),
    Field("model_init_kwargs", "model.dtype", kind=dict, of=TRL,
          doc="dtype (torch_dtype), attn_implementation, revision, trust_remote_code, for a model named by path."),
    Field("trust_remote_code", "model.trust_remote_code", of=TRL, default=False),
    Field("eval_strategy", "evaluation.at_epoch", kind=str, of=TRL, default="no",
          doc="no (the last step only), steps, or epoch."),
    Field("eval_steps", "evaluation.interval", of=TRL),
    Field("eval_on_start", "evaluation.at_start", of=TRL, default=False),
    Field("load_best_model_at_end", "checkpoint.keep_best", of=TRL, default=False),
    Field("metric_for_best_model", "evaluation.best_metric", kind=str, of=TRL,
          doc="loss, eval_loss, or another metric."),
    Field("greater_is_better", "evaluation.best_mode", flag("greater_is_better", [("evaluation.best_mode", "max")],
          [("evaluation.best_mode", "min")]), kind=bool, of=TRL, doc="Whether more of that metric is better."),
    Field("save_strategy", "checkpoint.at_epoch", kind=str, of=TRL, default="steps", doc="no, steps, epoch or best."),
    Field("logging_steps", "monitoring.log_interval", of=TRL, default=10),
    Field("logging_dir", "monitoring.tensorboard", kind=str, of=TRL, doc="Folder of TensorBoard files."),
    Field("report_to", "monitoring.wandb", kind=str, of=TRL, default="none",
          doc="none, wandb, tensorboard, mlflow, or a list of these."),
    Field("run_name", "monitoring.wandb_run_name", kind=str, of=TRL, doc="Name of the run where report_to reports."),
    Field("disable_tqdm", "monitoring.console", flag("disable_tqdm", [("monitoring.console", "plain")], []), kind=bool,
          of=TRL, default=False, doc="True: plain lines in place of a live one."),
    Field("push_to_hub", "hub.push", of=TRL, default=False),
    Field("hub_model_id", "hub.repo_id", of=TRL),
    Field("hub_private_repo", "hub.private", of=TRL),
    Field("use_cpu", "", _on_cpu, kind=bool, of=TRL, default=False,
          doc="Taken where no GPU is to be seen; the device is the one that is found."),
    Field("do_train", "", flag("do_train", []), kind=bool, of=TRL, default=True,
          doc="Accepted either way, as in TRL, where scripts read it: train() trains."),
    # Ours
    Field("frozen_blocks", "freezing.blocks", of=OURS),
    Field("freeze_embeddings", "freezing.embeddings", of=OURS),
    Field("unfreeze_interval", "freezing.unfreeze_interval", of=OURS),
    Field("unfrozen_blocks", "freezing.unfrozen_blocks", of=OURS),
    Field("max_tokens_per_gpu", "training.max_tokens_per_gpu", of=OURS),
    Field("overrides", "", kind=dict, of=OURS, doc="Any setting of the recipe by its path: {'data.turns': 'unroll'}."),
)  # fmt: skip

KNOWN: Mapping[str, Field] = MappingProxyType({field.name: field for field in FIELDS})
