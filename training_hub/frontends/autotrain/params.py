"""The parameters of AutoTrain's SFT guide, with the guide's names and defaults; each one's docstring is its help."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from training_hub.errors import RecipeError
from training_hub.recipe.names import describe, nearest
from training_hub.recipe.translate import shown


class Parameters(BaseModel):
    """Named settings that complain in our errors, all at once."""

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        hide_input_in_errors=True,
        arbitrary_types_allowed=True,
        strict=True,
    )

    def __init__(self, **values: Any):
        """Raises RecipeError (a ValueError) that lists every name that is not known and every value that is wrong."""
        try:
            super().__init__(**{k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in values.items()})
        except ValidationError as error:
            raise RecipeError(list(dict.fromkeys(_problem(self, one) for one in error.errors()))) from error

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            raise RecipeError(list(dict.fromkeys(_problem(self, one) for one in error.errors()))) from error


class LLMTrainingParams(Parameters):
    """What AutoTrain's guide calls the configuration of a run. A parameter that is None was not given."""

    model: str | None = None
    """Model folder in Hugging Face format, or a name on the hub."""

    data_path: Any = None
    """File (jsonl, json, csv, parquet, txt), folder or hub name; in Python also a DataFrame, a `datasets` object or
    dictionaries. Of a folder with a file called after train_split only that is trained on, else all files are."""

    text_column: str = "text"
    """Column with the text that is trained on, or with the messages of a conversation."""

    prompt_text_column: str | None = None
    """Column with what comes before the text and is not trained on."""

    project_name: str | None = None
    """Output folder, where you are. The model is in `final` in it."""

    trainer: str = "sft"
    """sft."""

    train_split: str = "train"
    """Split of a hub data set, or the name, without its ending, of the file to train on in a folder."""

    valid_split: str | None = None
    """The same for validation, in the same place."""

    valid_path: str | None = None
    """File, folder or hub name of validation rows that lie elsewhere."""

    max_samples: int | None = None
    """Train on only so many rows, the first ones."""

    epochs: float = 3
    """Passes over the data."""

    batch_size: int = 8
    """Samples per micro-step and device. Times gradient_accumulation it is the samples per optimizer step; how these go
    through the device is planned by tokens and changes no number."""

    gradient_accumulation: int = 4
    """Micro-steps per optimizer step."""

    lr: float = 5e-5
    """Learning rate at its peak."""

    warmup_ratio: float = 0.1
    """Share of all steps in which the rate rises."""

    optimizer: str = "adamw_torch"
    """By the name that transformers has for it: adamw_torch, adafactor, sgd, lion_32bit, muon, schedule_free_adamw,
    galore_adamw, adamw_bnb_8bit, lion_8bit, ..."""

    scheduler: str = "linear"
    """linear, cosine, constant, constant_with_warmup, inverse_sqrt, cosine_with_min_lr or warmup_stable_decay."""

    weight_decay: float = 0.0
    """Decay of weights per step, times the learning rate."""

    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 turns clipping off."""

    seed: int = 42
    """Start of every random choice."""

    max_seq_length: int = 2048
    """Longest sample in tokens. The end of a longer one is cut, which is counted and told."""

    model_max_length: int | None = None
    """Another name of max_seq_length."""

    block_size: int = -1
    """Another name of max_seq_length; -1 leaves the length to that."""

    padding: Literal["right", "left"] = "right"
    """Accepted either way: nothing is padded in training, and generation pads on the left, as it must."""

    chat_template: str | None = None
    """For conversations: chatml, zephyr, llama, alpaca, vicuna, mistral, or a Jinja file. tokenizer: the model's own,
    as without it."""

    add_eos_token: bool = True
    """Close plain text with the end-of-sequence token. In conversations the template says what closes them."""

    response_only_loss: bool = True
    """Train only what the assistant says. Off: every role but system."""

    peft: bool = False
    """Train an adapter (LoRA) in place of all weights."""

    lora_r: int = 16
    """Rank of the adapter."""

    lora_alpha: int = 32
    """What the adapter adds is multiplied by this over its rank."""

    lora_dropout: float = 0.05
    """Dropout of what goes into the adapter."""

    target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter: all-linear, or names with commas between."""

    merge_adapter: bool = False
    """Also write the model with the adapter merged into it, in a folder of its own."""

    quantization: Literal["int4", "int8"] | None = None
    """Keep the frozen weights under an adapter in so many bits."""

    mixed_precision: Literal["fp16", "bf16", "no"] | None = None
    """bf16: compute in bfloat16 with float32 masters. no: in float32. fp16 and without it: in bfloat16 where the
    hardware multiplies it fast, else in float32, and never in float16."""

    use_flash_attention_2: bool = False
    """Accepted either way: the fastest attention of this machine is tried and checked at the start, and no row that is
    packed or padded sees another."""

    disable_gradient_checkpointing: bool = False
    """Keep all activations for the backward pass."""

    gradient_checkpointing: bool | None = None
    """Forget activations and make them again, which takes less memory and more time. Not given: as far as the memory of
    the device asks for it."""

    unsloth: bool = False
    """Not here: an error says what is needed."""

    packing: bool = False
    """Lay several samples end to end, kept apart. Not given: on, since it changes the speed and never the result."""

    auto_find_batch_size: bool = False
    """Accepted either way: what goes through the device at once is always planned by tokens, to fit its memory, and
    batch_size stays what it says."""

    distributed_backend: Literal["ddp", "deepspeed"] | None = None
    """ddp: one process for each GPU. deepspeed: not here."""

    use_distillation: bool = False
    """Learn from a teacher's distributions."""

    teacher_model: str | None = None
    """The model that teaches; it has the vocabulary of the trained one."""

    distill_temperature: float = 3.0
    """Both models' logits are divided by it."""

    distill_alpha: float = 0.7
    """Share of the teacher in the loss; the rest are the rows' own tokens."""

    distill_max_teacher_length: int | None = None
    """Longest sample that the teacher reads, in tokens."""

    use_enhanced_eval: bool = False
    """Measure validation rows; with metrics beside perplexity, let the model answer them and compare with the rows' own
    answers."""

    eval_metrics: str | list[str] = "perplexity"
    """What they are compared by, with commas between: perplexity, bleu, rouge, chrf, exact_match, accuracy, f1."""

    eval_save_predictions: bool = False
    """Keep what the model answers, in the project. Where eval_metrics need answers these are kept anyway."""

    eval_strategy: Literal["epoch", "steps", "no"] = "epoch"
    """When validation rows are measured: no leaves the last step."""

    eval_steps: int | None = None
    """With eval_strategy steps, every so many."""

    early_stopping_patience: int | None = None
    """Stop once so many evaluations in a row brought nothing better."""

    save_strategy: Literal["epoch", "steps", "no"] = "epoch"
    """When checkpoints are written, beside one after each quarter of an hour; with no, never."""

    save_steps: int = 500
    """With save_strategy steps, every so many."""

    save_total_limit: int = 1
    """How many of the newest checkpoints stay."""

    resume_from_checkpoint: str | None = None
    """auto, as without it: a run that was stopped goes on when it is started again. Of a path an error says what to
    do."""

    logging_steps: int = -1
    """Report every so many steps; -1: every step."""

    log: Literal["none", "wandb", "tensorboard"] = "none"
    """Where steps are reported beside the console and metrics.jsonl."""

    wandb_run_id: str | None = None
    """Not here: an error says what is done instead."""

    wandb_visualizer: bool = False
    """Not here: an error says how to see the same."""

    use_sweep: bool = False
    """Run several times with other values of some parameters, and give the best."""

    sweep_backend: Literal["optuna", "random", "grid"] = "optuna"
    """How values are chosen: optuna learns from the trials before (tree-structured Parzen estimator)."""

    sweep_n_trials: int = 10
    """How many runs."""

    sweep_metric: str = "eval_loss"
    """What decides: eval_loss, eval_perplexity, train_loss, or a metric of the run by its name."""

    sweep_direction: Literal["minimize", "maximize"] = "minimize"
    """Whether less or more of it is better."""

    sweep_params: str | dict[str, Any] | None = None
    """What is tried, in JSON: {"lr": {"type": "loguniform", "low": 1e-5, "high": 1e-3}, "batch_size": [4, 8]}. Without
    it learning rates from a tenth to ten times lr."""

    push_to_hub: bool = False
    """Send the final model to the hub, as repo_id or username/project_name. The token is read from HF_TOKEN."""

    username: str | None = None
    """Who the model on the hub belongs to."""

    repo_id: str | None = None
    """Name of the model on the hub."""

    hub_private: bool = True
    """Whether only you see it there."""

    overrides: dict[str, Any] = {}
    """Any setting of the recipe by its path: {"data.turns": "unroll"}."""


TOKENS = {"token": "HF_TOKEN", "wandb_token": "WANDB_API_KEY"}
"""Parameters of AutoTrain that are secrets, and the environment variables that hold them here."""


ELSEWHERE = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "train_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "lr_scheduler_type": "scheduler",
    "optim": "optimizer",
    "output_dir": "project_name",
    "use_peft": "peft",
    "use_int4": "quantization",
    "use_int8": "quantization",
    "fp16": "mixed_precision",
    "bf16": "mixed_precision",
    "max_length": "max_seq_length",
    "teacher_prompt_template": "teacher_model",
    "attn_implementation": "use_flash_attention_2",
    "custom_metrics": "eval_metrics",
    "eval_dataset_path": "valid_path",
    "auto_resume": "resume_from_checkpoint",
}
"""Names that transformers, or AutoTrain at some time, has for parameters of the guide."""


def nearest_parameter(name: str) -> str | None:
    """The parameter that an unknown name was probably meant to be."""
    near = nearest(name, [*LLMTrainingParams.model_fields, *ELSEWHERE])
    return ELSEWHERE.get(near, near) if near else None


def unknown_parameter(name: str) -> str:
    """The line for a name that is no parameter."""
    if name in TOKENS:
        return f"{name}: a secret, which is not taken here, so that it is in no file and no list of processes. " + (
            f"Give it in the environment variable {TOKENS[name]}."
        )
    near = nearest_parameter(name)
    return f"{name}: not a parameter.{f' Did you mean {near}?' if near else ''}"


def _problem(owner: Parameters, finding: Any) -> str:
    name = str(finding["loc"][0])
    field = type(owner).model_fields.get(name)
    if field is None:
        return unknown_parameter(name)
    default = f" Default: {shown(field.default)}." if field.default is not None else ""
    return f"{name}: found {shown(finding['input'])}; allowed: {describe(field.annotation)}.{default}"
