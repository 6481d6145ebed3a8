"""An adapter merged into its base: an ordinary model in a folder of its own, compared with what it was made from.

The sum W + s B A is made in float32, of weights that are first made dense where the adapter was trained beside
quantised ones: into the weights as they were before that, it would be another model than the one that was trained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training_hub.backends import Given
from training_hub.backends.shared.disk import disk_errors_explained
from training_hub.backends.shared.model_folder import is_folder, stored_dtype
from training_hub.backends.torch_engine.adaptations.lora import library
from training_hub.backends.torch_engine.attention import attention_of_transformers
from training_hub.backends.torch_engine.loading.low_bits import seen_dense
from training_hub.backends.torch_engine.loading.model import choose_device, folder_problems
from training_hub.backends.torch_engine.loading.quantization import NONE, dequantise, loading_options, part, turn_back
from training_hub.backends.torch_engine.loading.quiet import library_bars
from training_hub.backends.torch_engine.materials import load_materials
from training_hub.backends.torch_engine.merged_weights import merged_by_peft
from training_hub.backends.torch_engine.saving.base_weights import OpenBase, Written, base_of
from training_hub.backends.torch_engine.saving.export import WholeModel
from training_hub.data.tokenizer import ChatTokenizer
from training_hub.errors import RecipeError, TrainingError
from training_hub.folders import write_json, write_whole
from training_hub.recipe import Recipe
from training_hub.recipe.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, origin_of
from training_hub.recipe.sections import Model
from training_hub.types import Console

REPORT = "merge.json"
TEXTS = (
    "The capital of France is Paris, which lies on the Seine.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))  # 5",
    "Question: A train takes 3 hours for 240 km. How fast is it?\nAnswer: 240 / 3 = 80 km per hour.",
)
"""What the models read where no rows are given."""
NO_ROWS = "(none)"
MOST_ROWS = 16
TOKENS_OF_ROW = 256
FAR = 0.3
"""Norm of the difference of logits over their norm, beyond which the folder does not hold what was trained."""


@dataclass(frozen=True)
class Deviation:
    """How far the merged model's logits lie from those of base and adapter, over `tokens` tokens of `rows` rows.

    relative: norm of the difference over the norm. largest: of single logits. divergence: mean KL of the merged model's
    next token from the other's, in nats. agreement: share of tokens after which both think the same token likeliest.
    """

    rows: int
    tokens: int
    relative: float
    largest: float
    divergence: float
    agreement: float

    def told(self) -> str:
        """In one line."""
        return (
            f"logits deviate by {self.relative:.1e} of their norm (largest {self.largest:.1e}, KL "
            f"{self.divergence:.1e} nats, same likeliest token {self.agreement:.1%}) over {self.tokens:,} "
            f"tokens of {self.rows} rows"
        )


def refuse_other_folders(adapter: Path) -> None:
    """Raise RecipeError where the folder holds no adapter."""
    if not (adapter / CONFIG_FILE).is_file() or not (adapter / WEIGHTS_FILE).is_file():
        raise RecipeError(
            f"adapter: {adapter} holds no {CONFIG_FILE} and {WEIGHTS_FILE}. Give the folder of an adapter in PEFT's "
            "format, such as final/ of a run of lora-sft."
        )


def merge_for(recipe: Recipe, given: Given, adapter: Path, console: Console) -> dict[str, Any]:
    """`merge` as a recipe asks for it; its deviation as plain numbers.

    model.path: the base, or a text in parentheses, which names none. data.path, or rows that are given: what both are
    compared on, with the adapter's own tokenizer and template.
    """
    base = None if recipe.model.path.startswith("(") else recipe.model.path
    refuse_other_folders(adapter)
    origin = origin_of(adapter)
    rows: list[list[int]] = []
    if given.rows is not None or (recipe.data.path is not None and recipe.data.path != NO_ROWS):
        chosen = recipe.model.model_copy(update={"path": base or str(origin["path"]), "tokenizer": str(adapter)})
        store = load_materials(recipe.model_copy(update={"model": chosen}), given, console).prepared.train
        rows = [store[index].ids.tolist() for index in range(min(MOST_ROWS, len(store)))]
    found = merge(
        adapter,
        Path(recipe.output),
        console,
        base=base,
        save_dtype=recipe.model.save_dtype,
        rows=rows,
        trust_remote_code=recipe.model.trust_remote_code,
        max_shard_size=recipe.checkpoint.max_shard_size,
    )
    return asdict(found)


def merge(
    adapter: Path,
    output: Path,
    console: Console,
    *,
    base: str | None = None,
    save_dtype: str = "auto",
    rows: Sequence[Sequence[int]] = (),
    trust_remote_code: bool = False,
    max_shard_size: str = "50GB",
) -> Deviation:
    """Write the model of `adapter` and its base as one into the new folder `output`, with merge.json; atomic.

    base: in place of the one that the adapter names. save_dtype: auto is the format in which the base is stored. rows:
    token ids on which both are compared; without them those of a few texts. Nothing of the adapter's folder changes.
    Raises RecipeError where something is not there or cannot be merged, TrainingError where the merged model says
    something else.
    """
    refuse_other_folders(adapter)
    origin = origin_of(adapter)
    path = base or origin["path"]
    problems = _problems(adapter, output, path, trust_remote_code)
    if problems:
        raise RecipeError(problems)
    device = choose_device()
    loader = _Loader(str(path), origin, device, trust_remote_code)
    stored = stored_dtype(Path(path).expanduser()) if is_folder(path) else None
    dtype = getattr(torch, save_dtype if save_dtype != "auto" else stored or "float32")
    tokenizer = ChatTokenizer.load(str(adapter)).hf
    ids = _ids(rows, tokenizer)
    console.say(f"merge: {adapter} into {path}" + _of_quantised(origin))
    wanted = _logits(loader.with_adapter(adapter, "float32"), ids)
    model = loader.with_adapter(adapter, "float32", is_dense=True)
    merged = merged_by_peft(model)
    turn_back(merged)
    size = sum(p.numel() for p in merged.parameters()) * dtype.itemsize
    facts = {"adapter": str(adapter), "base": str(path), "quantization": origin["quantization"]}
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    with disk_errors_explained("the merged model", output, size), library_bars(), write_whole(output) as aside:
        written = Written(dtype, is_asked=save_dtype != "auto")
        chosen = Model(path=str(path), revision=origin["revision"])
        with base_of(chosen, merged).opened() as came:
            tensors = _as(merged.state_dict(), written, came)
        WholeModel(trust_remote_code, max_shard_size).save(merged, tensors, dtype, aside)
        put_tokenizer_beside(adapter, aside)
        del model, merged
        found = deviation(wanted, _logits(loader.plain(aside, "float32"), ids))
        if not found.relative <= FAR:
            raise TrainingError(f"merge: {found.told()}: that is another model. It is not written.")
        write_json(aside / REPORT, {**facts, "dtype": str(dtype), "deviation": asdict(found), "versions": versions})
    console.say(f"merge: written to {output} as {str(dtype).removeprefix('torch.')}; {found.told()}")
    return found


def deviation(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> Deviation:
    """How `found` deviates from `wanted`; each a list of logits [T, V], one for each row."""
    there, here = torch.cat(list(wanted)).double(), torch.cat(list(found)).double()
    likely, other = there.log_softmax(-1), here.log_softmax(-1)
    return Deviation(
        rows=len(wanted),
        tokens=len(there),
        relative=float((here - there).norm() / there.norm()),
        largest=float((here - there).abs().max()),
        divergence=float((likely.exp() * (likely - other)).sum(-1).mean()),
        agreement=float((here.argmax(-1) == there.argmax(-1)).double().mean()),
    )


@dataclass(frozen=True)
class _Loader:
    """Loads the base, or a folder, each time anew."""

    path: str
    origin: dict[str, Any]
    device: torch.device
    trust_remote_code: bool

    def plain(self, path: Path | str, dtype: str, quantization: str = NONE) -> Any:
        import transformers

        exact = getattr(torch, dtype)
        options: dict[str, Any] = loading_options(quantization, exact, self.device)
        if str(path) == self.path and self.origin["revision"]:
            options["revision"] = self.origin["revision"]
        with library_bars():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(Path(path).expanduser()) if is_folder(str(path)) else path,
                dtype=exact,
                use_safetensors=True,
                trust_remote_code=self.trust_remote_code,
                **options,
            )
        model.set_attn_implementation(attention_of_transformers(model))
        part(model)
        return (model if options.get("quantization_config") else model.to(self.device)).eval()

    def with_adapter(self, adapter: Path, dtype: str, *, is_dense: bool = False) -> Any:
        """Base and adapter, by PEFT; is_dense: quantised weights as ordinary ones with the same numbers."""
        base = self.plain(self.path, dtype, self.origin["quantization"])
        if is_dense:
            dequantise(base)
        with library.quiet(), seen_dense(base):
            return library.load().PeftModel.from_pretrained(base, str(adapter)).eval()


def _problems(adapter: Path, output: Path, path: str | None, trust_remote_code: bool) -> list[str]:
    if not library.is_installed():
        return [library.MISSING]
    found = []
    if path is None:
        found.append(f"model.path: {adapter / CONFIG_FILE} names no base. Give its folder: --model BASE.")
    else:
        found += folder_problems(str(path), trust_remote_code=trust_remote_code)
    if origin_of(adapter)["qat"]:
        found.append(
            f"adapter: {adapter} was trained beside weights rounded in forward (qat), and rounding its sum with them "
            "would be another model. Quantise the base and load the adapter beside it."
        )
    if output.exists():
        found.append(f"output: {output} exists, and a merged model gets a folder of its own. Name another.")
    return found


def _of_quantised(origin: dict[str, Any]) -> str:
    chosen = origin["quantization"]
    return "" if chosen == NONE else f", whose {chosen} weights are made dense first"


def _ids(rows: Sequence[Sequence[int]], tokenizer: Any) -> list[Tensor]:
    texts = rows or [tokenizer(text, add_special_tokens=True)["input_ids"] for text in TEXTS]
    return [torch.tensor(list(row[:TOKENS_OF_ROW]))[None] for row in texts if len(row) > 1]


@torch.no_grad()
def _logits(model: Any, ids: Sequence[Tensor]) -> list[Tensor]:
    device = next(model.parameters()).device
    with seen_dense(model):
        return [model(input_ids=each.to(device), use_cache=False).logits[0].float().cpu() for each in ids]


def _as(tensors: dict[str, Tensor], written: Written, came: OpenBase) -> dict[str, Tensor]:
    """The tensors as they are to be written, those to which nothing was added as they came; what is one tensor under
    two names stays one."""
    made: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if tensor.data_ptr() not in made:
            same = [other for other, one in tensors.items() if one.data_ptr() == tensor.data_ptr()]
            unmoved = came.unmoved(same, tensor, written)
            cast = tensor.to(written.dtype if tensor.is_floating_point() else tensor.dtype)
            made[tensor.data_ptr()] = cast if unmoved is None else unmoved
    return {name: made[tensor.data_ptr()] for name, tensor in tensors.items()}


def put_tokenizer_beside(adapter: Path, folder: Path) -> None:
    """Write the adapter's tokenizer beside merged weights, and the stop ids that training found."""
    ChatTokenizer.load(str(adapter)).hf.save_pretrained(folder)
    ours, theirs = adapter / "generation_config.json", folder / "generation_config.json"
    if ours.is_file():
        before = json.loads(theirs.read_text(encoding="utf-8")) if theirs.is_file() else {}
        write_json(theirs, {**before, **json.loads(ours.read_text(encoding="utf-8"))})
