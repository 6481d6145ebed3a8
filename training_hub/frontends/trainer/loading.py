"""`AutoEasyDeLModelForCausalLM.from_pretrained`: a model by name and how it is to be loaded, which a trainer takes.

No weight is read until the model is used as one, or trained.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from training_hub.errors import RecipeError
from training_hub.frontends.trainer.fields import ATTENTION, CHECKPOINTING
from training_hub.frontends.trainer.together import dtype_name
from training_hub.recipe.names import nearest
from training_hub.recipe.translate import shown

AXES = {
    "dp": "parallelism.data_parallel_replicate_degree",
    "fsdp": "parallelism.data_parallel_shard_degree",
    "ep": "parallelism.expert_parallel_degree",
    "tp": "parallelism.tensor_parallel_degree",
    "sp": "parallelism.context_parallel_degree",
}
"""EasyDeL's names of the axes of a mesh, in its order, and the settings that say how long each is."""

DTYPES = ("float32", "bfloat16", "float64")
STORED = (*DTYPES, "float16")
ENGINES = ("torch", "jax")


@dataclass
class ModelHandle:
    """A model by name. settings: what loading it says of the recipe, by path. spelled: by which of our parameters.

    What is none of its own attributes is the model's, which transformers loads for that: `config`, `generate`, ...
    """

    path: str
    settings: dict[str, Any] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)
    _loaded: Any = field(default=None, repr=False)

    @property
    def model(self) -> Any:
        """The model as transformers loads it, in the format that was asked for."""
        if self._loaded is None:
            from transformers import AutoModelForCausalLM

            self._loaded = AutoModelForCausalLM.from_pretrained(
                self.path,
                dtype=self.settings.get("model.dtype", "auto"),
                revision=self.settings.get("model.revision") or "main",
                trust_remote_code=self.settings.get("model.trust_remote_code", False),
            ).eval()
        return self._loaded

    def apply_lora_to_layers(self, lora_rank: int, lora_pattern: str | Sequence[str] | None = None) -> ModelHandle:
        """This model with an adapter of this rank to be trained on modules whose whole names fit the pattern."""
        own = {"algorithm": "lora_sft", "lora.r": lora_rank}
        if lora_pattern is not None:
            own["lora.target_modules"] = lora_pattern
        names = {path: path.partition(".")[2] for path in own if "." in path}
        spelled = {"r": "lora_rank", "target_modules": "lora_pattern"}
        return ModelHandle(
            self.path, {**self.settings, **own}, {**self.spelled, **{path: spelled[n] for path, n in names.items()}}
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.model, name)


class AutoEasyDeLModelForCausalLM:
    """Causal language models, loaded as EasyDeL loads them."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        device: Any = None,
        dtype: Any = None,
        param_dtype: Any = None,
        precision: Any = None,
        sharding_axis_dims: Sequence[int] = (1, -1, 1, 1, 1),
        sharding_dcn_axis_dims: Sequence[int] | None = None,
        sharding_axis_names: Sequence[str] = tuple(AXES),
        partition_axis: Any = None,
        config_kwargs: Mapping[str, Any] | None = None,
        auto_shard_model: bool = True,
        partition_rules: Any = None,
        quantization_config: Any = None,
        platform: Any = None,
        backend: Any = None,
        from_torch: bool | None = None,
        torch_load_mode: str = "streaming",
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> ModelHandle:
        """A handle on the model of a folder in Hugging Face format or of a name on the hub.

        dtype: format of forward and backward (float32, bfloat16, float64, as text or as torch, numpy or JAX has it).
        param_dtype: format in which the trained weights are saved; while they move they are always float32.
        sharding_axis_dims: lengths of the axes dp, fsdp, ep, tp, sp; -1 for what the others leave.
        config_kwargs: gradient_checkpointing, attn_mechanism, attn_dtype, attn_softmax_dtype.
        backend: the engine, torch or jax. quantization_config: of bitsandbytes, for weights under an adapter.
        Raises RecipeError listing everything that cannot be had, before anything is read.
        """
        loading = _Loading(os.fspath(pretrained_model_name_or_path))
        problems = [
            *_formats(loading, dtype, param_dtype, precision),
            *_engine(loading, backend, platform),
            *_mesh(loading, sharding_axis_dims, sharding_axis_names, auto_shard_model),
            *_config(loading, dict(config_kwargs or {}), dtype),
            *_quantization(loading, quantization_config),
            *_left_out(
                device=device,
                sharding_dcn_axis_dims=sharding_dcn_axis_dims,
                partition_axis=partition_axis,
                partition_rules=partition_rules,
                torch_load_mode=torch_load_mode,
            ),
            *(_unknown(name) for name in options),
        ]
        if problems:
            raise RecipeError(problems)
        if revision is not None:
            loading.give("model.revision", revision, "revision")
        if trust_remote_code:
            loading.give("model.trust_remote_code", True, "trust_remote_code")
        return ModelHandle(loading.path, loading.settings, loading.spelled)


@dataclass
class _Loading:
    path: str
    settings: dict[str, Any] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)

    def give(self, path: str, value: Any, name: str) -> None:
        self.settings[path] = value
        self.spelled[path] = name


def _formats(loading: _Loading, dtype: Any, param_dtype: Any, precision: Any) -> Iterator[str]:
    computed = None if dtype is None else dtype_name(dtype)
    if computed is not None and computed not in DTYPES:
        yield f"dtype: found {shown(computed)}; allowed: {', '.join(DTYPES)}. Write dtype='bfloat16'"
    elif computed is not None:
        loading.give("model.dtype", computed, "dtype")
    stored = None if param_dtype is None else dtype_name(param_dtype)
    if stored is not None and stored not in STORED:
        yield f"param_dtype: found {shown(stored)}; allowed: {', '.join(STORED)}. Write param_dtype='float32'"
    elif stored is not None:
        loading.give("model.save_dtype", stored, "param_dtype")
    asked = str(getattr(precision, "name", precision)).lower()
    if asked in ("high", "highest", "float32") and computed != "float32":
        yield (
            f"precision: {asked} multiplies in float32, and dtype is {computed or 'not given'}. Write dtype='float32', "
            "whose products are float32's own, and leave precision out."
        )
    elif asked not in ("none", "fastest", "default", "high", "highest", "float32", "bfloat16"):
        yield f"precision: found {shown(precision)}; allowed: fastest, default, high, highest."


def _mesh(loading: _Loading, dims: Sequence[int], names: Sequence[str], is_sharded: bool) -> Iterator[str]:
    wrong = [name for name in names if name not in AXES]
    if wrong or len(set(names)) != len(names):
        yield f"sharding_axis_names: found {', '.join(map(shown, names))}; allowed: each of {', '.join(AXES)}, once."
        return
    if len(dims) != len(names) or not all(isinstance(n, int) and (n == -1 or n > 0) for n in dims):
        yield (
            f"sharding_axis_dims: found {shown(tuple(dims))}; allowed: a length for each of {', '.join(names)}, -1 for "
            f"what is left. Write sharding_axis_dims={(1, -1, 1, 1, 1)}"
        )
        return
    if dims.count(-1) > 1:
        yield f"sharding_axis_dims: found {shown(tuple(dims))}; allowed: -1 once, for what the others leave."
    # With JAX a process may have many devices; with torch a process by itself has one, and nothing to divide.
    has_several = os.environ.get("WORLD_SIZE", "1") != "1" or loading.settings.get("backend") == "jax"
    said_of_one = (1,) if has_several else (1, -1)
    lengths = dict(zip(names, dims, strict=True))
    asked = {name: length for name, length in lengths.items() if length not in said_of_one}
    if any(length > 1 for length in asked.values()) and not is_sharded:
        yield "auto_shard_model: False, but sharding_axis_dims asks for axes. Leave one out."
    experts = lengths.get("ep", 1)
    if experts == -1:
        yield "sharding_axis_dims: ep is -1; allowed: a number that divides that of the model's experts. Write it."
        return
    if experts > 1:  # ours are dealt out to devices that also divide the other weights
        shards = lengths.get("fsdp", 1)
        asked["fsdp"] = shards if shards == -1 else shards * experts
    for name, length in asked.items() if is_sharded else ():
        loading.give(AXES[name], length, "sharding_axis_dims")


def _config(loading: _Loading, given: dict[str, Any], dtype: Any) -> Iterator[str]:
    known = ("gradient_checkpointing", "attn_mechanism", "attn_dtype", "attn_softmax_dtype")
    computed = "float32" if dtype is None else dtype_name(dtype)
    for name, raw in given.items():
        value = raw.value if isinstance(raw, Enum) else raw
        if name == "gradient_checkpointing" and isinstance(value, str | bool) and value in CHECKPOINTING:
            loading.give("training.activation_checkpointing", CHECKPOINTING[value], name)
        elif name == "attn_mechanism" and isinstance(value, str) and value.lower() in ATTENTION:
            loading.give("model.attention", ATTENTION[value.lower()], name)
        elif name == "attn_mechanism":
            yield (
                f"attn_mechanism: found {shown(value)}; allowed: {', '.join(ATTENTION)}. Write 'auto': the fastest "
                "that passes a check on the model at hand."
            )
        elif name in ("attn_dtype", "attn_softmax_dtype"):
            wanted = "float32" if name == "attn_softmax_dtype" else computed
            if value is not None and dtype_name(value) != wanted:
                yield f"{name}: found {shown(dtype_name(value))}; allowed: {wanted}, which it always is. Leave it out."
        elif name in known:
            yield f"{name}: found {shown(value)}; allowed: {', '.join(shown(one) for one in CHECKPOINTING)}."
        else:
            near = nearest(name, known)
            hint = f" Did you mean {near}?" if near else " The model's config.json says it, or it is left out."
            yield f"config_kwargs: {name} is not taken; known: {', '.join(known)}.{hint}"


def _engine(loading: _Loading, backend: Any, platform: Any) -> Iterator[str]:
    engine, language = (one.value if isinstance(one, Enum) else one for one in (backend, platform))
    if engine in ENGINES:
        loading.give("backend", engine, "backend")
    elif engine is not None:
        yield (
            f"backend: found {shown(engine)}; allowed: {', '.join(ENGINES)}, an engine, which takes the device that it "
            "finds. Leave it out."
        )
    if language is not None and not (language == "jax" and engine == "jax"):
        yield (
            f"platform: found {shown(language)}; which language kernels are written in is the engine's to choose. "
            "Leave it out, or write backend='jax'."
        )


def _quantization(loading: _Loading, config: Any) -> Iterator[str]:
    try:
        if config is not None:
            loading.give("model.quantization", bits_of(config), "quantization_config")
    except RecipeError as error:
        yield from error.problems


def bits_of(config: Any) -> str:
    """The value of model.quantization that a configuration of bitsandbytes asks for. Raises RecipeError for others."""
    bits = {"int4": getattr(config, "load_in_4bit", False), "int8": getattr(config, "load_in_8bit", False)}
    asked = [name for name, is_on in bits.items() if is_on]
    if len(asked) != 1:
        raise RecipeError(
            f"quantization_config: found {shown(config)}; allowed: BitsAndBytesConfig(load_in_4bit=True) or "
            "(load_in_8bit=True), for weights under an adapter."
        )
    return asked[0]


def _left_out(**given: Any) -> Iterator[str]:
    """Lines for parameters of EasyDeL that are there to be refused, but for what asks for nothing."""
    if given["torch_load_mode"] not in ("full", "streaming"):
        yield f"torch_load_mode: found {shown(given['torch_load_mode'])}; allowed: streaming, full."
    for name, why in (
        ("device", "the engine takes the device that it finds"),
        ("sharding_dcn_axis_dims", "nodes are told apart by processes.nodes"),
        ("partition_axis", "which dimension goes along which axis is the engine's to say"),
        ("partition_rules", "which weight goes along which axis is the engine's to say"),
    ):
        if given[name] is not None:
            yield f"{name}: found {shown(given[name])}; {why}. Leave it out."


def _unknown(name: str) -> str:
    if name == "token":
        return "token: a secret, which is not taken here. Give it in the environment variable HF_TOKEN."
    known = ("dtype", "param_dtype", "precision", "sharding_axis_dims", "config_kwargs", "backend", "revision",
             "quantization_config", "trust_remote_code", "auto_shard_model")  # fmt: skip
    alias = {"torch_dtype": "dtype", "attn_implementation": "config_kwargs"}
    near = alias.get(name) or nearest(name, known)
    return f"{name}: not a parameter of from_pretrained here.{f' Did you mean {near}?' if near else ''}"
