"""The keywords of `lora_sft` beside those of `sft`: those of training_hub 0.11, and what our recipe adds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from training_hub.errors import RecipeError
from training_hub.frontends.keyword import Keyword, Settings, flag
from training_hub.recipe.translate import shown


def _only(name: str, allowed: Any, why: str = "") -> Callable[[Any], Settings]:
    """For a keyword that has one value here, which is what is done anyway."""

    def settings(value: Any) -> Settings:
        if value != allowed:
            reason = f", since {why}" if why else ""
            raise RecipeError(f"{name}: found {shown(value)}; allowed: {shown(allowed)}{reason}. Leave it out")
        return []

    return settings


def _dataset_type(value: Any) -> Settings:
    # The formats of training_hub's lora_sft; a passthrough row is text that was rendered already.
    known = {"chat_template": "messages", "alpaca": "instruction", "passthrough": "text"}
    if value not in known:
        raise RecipeError(f"dataset_type: found {shown(value)}; allowed: {', '.join(known)}.")
    return [("data.format", known[value])]


def _column(name: str) -> Callable[[Any], Settings]:
    return lambda value: [(f"data.columns.{name}", value)]


def whole_batch(given: dict[str, Any]) -> list[str]:
    """Put samples per step in the place of samples per device and forward pass; what is wrong with them."""
    own = ("micro_batch_size", "gradient_accumulation_steps")
    parts: dict[str, Any] = {name: given.pop(name) for name in own if name in given}
    if not parts:
        return []
    whole = next((name for name in ("effective_batch_size", "batch_size") if name in given), None)
    if whole is not None:
        return [f"{', '.join(parts)}: given beside {whole}, which says the same. Keep one."]
    parts |= {name: given[name] for name in ("nproc_per_node", "nnodes") if isinstance(given.get(name), int)}
    wrong = [
        name for name, count in parts.items() if not isinstance(count, int) or isinstance(count, bool) or count < 1
    ]
    if wrong:
        return [f"{name}: found {shown(parts[name])}; allowed: a whole number of at least 1." for name in wrong]
    given["effective_batch_size"] = math.prod({"micro_batch_size": 2, **parts}.values())
    return []


LORA = (
    Keyword("lora_r", "lora.r"),
    Keyword("lora_alpha", "lora.alpha"),
    Keyword("lora_dropout", "lora.dropout"),
    Keyword("target_modules", "lora.target_modules"),
    Keyword("modules_to_save", "lora.modules_to_save"),
    Keyword("tuner", "lora.tuner"),
    Keyword("use_rslora", "lora.tuner", flag("use_rslora", [("lora.tuner", "rslora")]), doc="tuner rslora.", kind=bool),
    Keyword("use_dora", "lora.tuner", flag("use_dora", [("lora.tuner", "dora")]), doc="tuner dora.", kind=bool),
    Keyword("adapter_path", "lora.adapter"),
    Keyword("merge_adapter", "lora.merge"),
    Keyword(
        "micro_batch_size",
        "training.global_batch_size",
        doc="Samples per device and forward pass; with gradient_accumulation_steps and the number of processes it "
        "makes the samples of an optimizer step. How many go through a device at once is chosen here: it changes "
        "memory, never the result.",
    ),
    Keyword(
        "gradient_accumulation_steps",
        "training.global_batch_size",
        doc="Forward passes per optimizer step, with micro_batch_size.",
    ),
    Keyword(
        "load_in_4bit",
        "model.quantization",
        flag("load_in_4bit", [("model.quantization", "int4")]),
        doc="True: frozen weights as NF4, with quantised scales.",
        kind=bool,
    ),
    Keyword(
        "load_in_8bit",
        "model.quantization",
        flag("load_in_8bit", [("model.quantization", "int8")]),
        doc="True: frozen weights as 8-bit numbers.",
        kind=bool,
    ),
    Keyword("bnb_4bit_quant_type", "", _only("bnb_4bit_quant_type", "nf4"), doc="nf4.", kind=str),
    Keyword("bnb_4bit_use_double_quant", "", _only("bnb_4bit_use_double_quant", True), doc="True.", kind=bool),
    Keyword("sample_packing", "data.packing"),
    Keyword(
        "bf16",
        "model.dtype",
        flag("bf16", [("model.dtype", "bfloat16")], [("model.dtype", "float32")]),
        doc="True: forward and backward in bfloat16. False: in float32.",
        kind=bool,
    ),
    Keyword(
        "flash_attention",
        "model.attention",
        flag("flash_attention", [], [("model.attention", "documents")]),
        doc="False: attention sample by sample, without the variable-length kernel.",
        kind=bool,
    ),
    Keyword("dataset_type", "data.format", _dataset_type, doc="chat_template, alpaca or passthrough.", kind=str),
    *(
        Keyword(
            f"field_{name}",
            "data.columns",
            _column(ours),
            doc=f"Column that holds the {name.replace('_', ' ')}.",
            kind=str,
        )
        for name, ours in (
            ("messages", "messages"),
            ("instruction", "instruction"),
            ("input", "input"),
            ("output", "output"),
        )
    ),
    Keyword("eval_data_path", "data.validation"),
    Keyword("eval_steps", "evaluation.interval"),
    Keyword("save_steps", "checkpoint.interval"),
    Keyword("save_total_limit", "checkpoint.keep_last"),
    Keyword("logging_steps", "monitoring.log_interval"),
    Keyword(
        "enable_model_splitting",
        "",
        _only("enable_model_splitting", False, "the engine keeps a model on one device"),
        doc="A model over several GPUs; only False so far.",
        kind=bool,
    ),
)
