"""LoRA and its kin as an adaptation: the weights stay, what PEFT puts beside them trains.

y = x W^T + s (x A^T) B^T with A [r, in] and B [out, r], B = 0 at first. Source: Hu et al. 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training_hub.backends.torch_engine.adaptations.holdings import Holdings
from training_hub.backends.torch_engine.adaptations.lora import library
from training_hub.backends.torch_engine.adaptations.lora.adalora import ALLOCATED, Allocation
from training_hub.backends.torch_engine.adaptations.lora.configs import (
    begins_beside,
    is_changing_its_base,
    make_config,
    refuse_unrounded,
)
from training_hub.backends.torch_engine.adaptations.lora.files import (
    ADAPTER,
    AdapterFiles,
    Start,
    is_part_of_weight,
    tensors_in_file,
)
from training_hub.backends.torch_engine.adaptations.lora.passing import passing
from training_hub.backends.torch_engine.adaptations.lora.stages import names_in_file, refuse_shared
from training_hub.backends.torch_engine.adaptations.lora.taken import beginning_of
from training_hub.backends.torch_engine.adaptations.lora.targets import refuse_idle, refuse_low
from training_hub.backends.torch_engine.adaptations.of_parameters import OfParameters
from training_hub.backends.torch_engine.fused.low_rank import run_adapters_fused
from training_hub.backends.torch_engine.layouts.cut import route_of
from training_hub.backends.torch_engine.layouts.pieces import cut_of, local_of, whole_cut
from training_hub.backends.torch_engine.loading.blank import has_numbers, recast
from training_hub.backends.torch_engine.loading.low_bits import seen_dense
from training_hub.backends.torch_engine.loading.quantization import METHODS, NONE, num_quantised, nums_of
from training_hub.backends.torch_engine.parallel import Group
from training_hub.backends.torch_engine.preflight import ROUGH, SAME_LOGITS, logits_of_one, relative_difference
from training_hub.backends.torch_engine.saving.base_weights import OpenBase, Written
from training_hub.backends.torch_engine.saving.tensor_files import opened
from training_hub.errors import RecipeError
from training_hub.folders import remove
from training_hub.recipe import Recipe
from training_hub.recipe.adapter_folder import WEIGHTS_FILE
from training_hub.recipe.folder import RunFolder
from training_hub.types import Console, Proof

IDLE = ("did not match", "was matched", "no modules were excluded")
"""Words of PEFT's warnings about settings that do nothing."""

EMBEDDINGS = ("embed_tokens", "wte", "lm_head", "embed_out", "output")


class Lora(OfParameters):
    """The adaptation that freezes the model and trains an adapter of PEFT."""

    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        self._model: nn.Module = nn.Module()
        self._peft: Any = None
        self._start: Start | None = None
        self._allocation: Allocation | None = None
        self._difference: float | None = None
        self._before: Tensor | None = None
        self._notes: list[str] = []
        self._names: dict[str, str] = {}
        self._to_come: dict[str, str] = {}
        self._dtype = torch.float32

    def begins_beside(self) -> str:
        """Why the adapter must be made beside whole weights, where it must."""
        return begins_beside(make_config(self._recipe, None))

    def attach(self, model: nn.Module, console: Console | None = None) -> nn.Module:
        """The same model, frozen, with an adapter in the place of each target.

        Raises RecipeError where a target matches nothing or PEFT refuses the configuration for this model.
        """
        config = make_config(self._recipe, _token_ids(self._recipe))
        refuse_idle(model, getattr(config, "target_modules", None), getattr(config, "modules_to_save", None))
        if self._recipe.model.quantization != NONE:
            refuse_low(model, getattr(config, "modules_to_save", None), self._recipe.model.quantization)
        if self._recipe.qat.weight_dtype is not None:
            refuse_unrounded(config, self._recipe.lora.tuner)
        _tie(config, model)
        parameter = next(p for p in model.parameters() if p.is_floating_point())
        before = logits_of_one(model) if has_numbers(parameter) else None
        with seen_dense(model), passing(model, console):
            self._put_in(config, model, is_blank=parameter.is_meta)
        self._model = model
        if self._recipe.parallelism.pipeline_parallel_degree > 1:
            self._names = names_in_file(self._peft, model)
            refuse_shared(model, self._names, str(getattr(config.peft_type, "value", config.peft_type)).lower())
        if config.peft_type == ALLOCATED:
            self._allocation = Allocation(self._peft)
            self.adds_gradients = True
            # Ranks are shared out by comparing all of the adapter, which is small.
            self.undivided = frozenset(name for name, _ in model.named_parameters() if name.endswith(f".{ADAPTER}"))
        # Ranks are taken in the numbers that the optimizer moves: these are float32, without masters beside them.
        wider = torch.promote_types(parameter.dtype, torch.float32)
        self._dtype = parameter.dtype if self._allocation is None else wider
        for name, trained in model.named_parameters():
            if trained.requires_grad and trained.is_floating_point():
                # A copy of a module multiplies what the layers before it say, in their format.
                recast(trained, self._dtype if name.endswith(f".{ADAPTER}") else parameter.dtype)
        # Which of AdaLoRA's ranks are left is not known without numbers.
        if self._folder is not None and not (parameter.is_meta and config.peft_type == ALLOCATED):
            self._refuse_another(self._folder)
        if before is not None:
            self.shared()
            with seen_dense(model):  # PEFT's own forward looks at weights
                self._difference = relative_difference(logits_of_one(model), before)
        run_adapters_fused(model)
        return model

    def shared(self) -> None:
        """What begins as a part of the weights is kept as it is now, and the numbers of a folder take the place of all
        that trains; of copies of modules, whose own are not here yet, once these are."""
        if is_changing_its_base(self._config):
            factors = {name: one for name, one in tensors_in_file(self._peft).items() if is_part_of_weight(name)}
            self._start = Start({name: one.detach().to("cpu", copy=True) for name, one in factors.items()})
        if self._folder is not None:
            self._take_over(self._folder)

    def filled(self) -> None:
        """What the base says, from whose weights a part will be taken, or that will have others in a folder."""
        if is_changing_its_base(self._config) or self._folder is not None:
            self._before = self._said_without()
        if self._folder is not None and self._to_come:
            self._take_over_pieces(self._folder)

    def divided(self) -> None:
        """Where the base had no weights before, it is told only now how far from it the model with the adapter is."""
        if self._allocation is not None:
            self._allocation.divided(self._model)
        if self._difference is not None:
            return
        before = self._said_without() if self._before is None else self._before
        self._difference, self._before = relative_difference(logits_of_one(self._model), before), None

    def _said_without(self) -> Tensor:
        is_low_rank = any(hasattr(module, "lora_A") for module in self._model.modules())  # a stage may have none
        # One that has learned may have more than what is added: lengths of rows, whole modules.
        is_silenced = is_low_rank and self._folder is None
        with (library.silent if is_silenced else library.disabled)(self._model):
            return logits_of_one(self._model)

    def holdings(self) -> Holdings:
        """What there is beside the model's parameters, the adapter's among them: the start of PiSSA, small files."""
        nums = {name: p.numel() for name, p in self._model.named_parameters() if p.requires_grad}
        trained = sum(nums.values())
        factors = sum(count for name, count in nums.items() if ".lora_A." in name or ".lora_B." in name)
        kept = factors if is_changing_its_base(self._config) else 0
        averages = 2 * trained if self._allocation is not None else 0
        method = METHODS.get(self._recipe.model.quantization)
        return Holdings(
            fixed=averages + kept,
            saved=averages,
            exported=trained + kept,
            quantised=num_quantised(self._model) if method is not None else 0,
            bits=method.bits if method is not None else 0.0,
            beginning=beginning_of(self._model, self._config),
        )

    def expect_steps(self, total: int) -> None:
        """How many steps the run will have. Raises RecipeError where ranks cannot be shared out in them."""
        if self._allocation is None:
            return
        if self._folder is not None:
            raise RecipeError(
                f"lora.adapter: {self._recipe.lora.adapter} is an AdaLoRA adapter, whose ranks have been shared out. "
                "Merge it into its base and begin another beside that, or begin anew."
            )
        self._allocation.expect_steps(total)

    def gather(self) -> None:
        """The gradients of a step are complete, but for those of a term that is no loss of tokens."""
        if self._allocation is not None:
            self._allocation.gather()

    def before_step(self, rate: float) -> None:
        """The optimizer is about to move the weights."""
        if self._allocation is not None:
            self._allocation.before_step()

    def after_step(self) -> None:
        """Share ranks out anew, where the tuner does."""
        if self._allocation is not None:
            self._allocation.after_step()

    def metrics(self) -> dict[str, Tensor]:
        """Where ranks are shared out, how many there are."""
        return {} if self._allocation is None else {"adapter_mean_rank": self._allocation.mean_rank()}

    def saved(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside the adapter: how ranks are being shared out."""
        return {} if self._allocation is None else self._allocation.saved()

    def is_here(self, key: str) -> bool:
        """Whether a tensor of a checkpoint that is called so is about a matrix of this process."""
        return self._allocation is not None and self._allocation.is_here(key)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `saved` gave."""
        if self._allocation is not None:
            self._allocation.load(tensors)

    def begin(self, console: Console) -> None:
        """Say what trains."""
        for line in (*self._notes, *_told(self._model, self._config)):
            console.say(f"lora: {line}")

    def proofs(self) -> list[Proof]:
        """That the model with its new adapter says what it said without; left out for one that has learned already."""
        name = "the adapter begins as the model"
        limit = SAME_LOGITS.get(self._dtype, ROUGH)
        measured = f"{self._difference:.1e}"
        if self._folder is not None:
            return [Proof(name, "left out", measured, "", "it goes on with an adapter that has learned")]
        if (self._difference or 0.0) <= limit:
            return [Proof(name, "holds", measured, f"{limit:.0e}")]
        remedy = (
            "lora.options ask for a start that is not the model's, or the tuner has none; the run begins elsewhere."
        )
        return [Proof(name, "fallback", measured, f"{limit:.0e}", remedy)]

    def export(self, weights: dict[str, Tensor], written: Written, came: OpenBase | None = None) -> dict[str, Tensor]:
        """The adapter under PEFT's names, on the CPU: `weights` by parameter name, as the optimizer moves them. One
        that started from a part of the weights becomes a LoRA of twice the rank on the weights as they came.
        """
        tensors = self._adapter_tensors(weights)
        if self._start is not None:
            tensors = self._start.difference(tensors)
        return {name: t.to(written.dtype if t.is_floating_point() else t.dtype) for name, t in tensors.items()}

    def further(self, final: Path, rows: Sequence[Sequence[int]], console: Console, group: Group) -> None:
        """With lora.merge, the merged model in `merged` beside the final one; one that is there makes way."""
        if not self._recipe.lora.merge:
            return
        from training_hub.backends.torch_engine.merging import merge
        from training_hub.backends.torch_engine.merging_together import merge_together

        merged, chosen = RunFolder(final.parent).merged, self._recipe.model
        how: dict[str, Any] = {
            "save_dtype": chosen.save_dtype,
            "trust_remote_code": chosen.trust_remote_code,
            "max_shard_size": self._recipe.checkpoint.max_shard_size,
        }
        group.on_main("the merged model of before", lambda: remove(merged) if merged.exists() else None)
        if group.world_size == 1:
            merge(final, merged, console, rows=rows, **how)
        else:
            merge_together(group, final, merged, console, **how)

    @property
    def files(self) -> AdapterFiles:
        """How the final model is written and read again."""
        return AdapterFiles(self._peft, self._recipe, self._start, torch.promote_types(self._dtype, torch.float32))

    @property
    def _config(self) -> Any:
        return self._peft.peft_config[ADAPTER]

    @property
    def _folder(self) -> Path | None:
        """That of the adapter that the run goes on with."""
        given = self._recipe.lora.adapter
        return None if given is None else Path(given).expanduser()

    def _put_in(self, config: Any, model: nn.Module, *, is_blank: bool) -> None:
        peft = library.load()
        own = {*(getattr(config, "rank_pattern", None) or ()), *(getattr(config, "alpha_pattern", None) or ())}
        kind = getattr(config, "init_lora_weights", None)
        if is_blank and is_changing_its_base(config):
            config.init_lora_weights = True  # the shapes are the same, and there is nothing to decompose
        try:
            with seeded(self._recipe.seed), library.quiet(), warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                self._peft = peft.get_peft_model(
                    model, config, ADAPTER, autocast_adapter_dtype=False, low_cpu_mem_usage=is_blank
                )
        except (ValueError, TypeError, ImportError, NotImplementedError) as error:
            raise RecipeError(
                f"lora.tuner: {self._recipe.lora.tuner} cannot be put into this model: {error}"
            ) from error
        idle = [line for line in (str(one.message) for one in said) if _is_idle(line, own)]
        if idle and self._folder is None:  # what PEFT wrote into an adapter's own file is nobody's mistake
            raise RecipeError([f"lora.options: {line}" for line in idle])
        if is_blank and kind is not None:
            config.init_lora_weights = kind

    def _adapter_tensors(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapter by PEFT's names, copied to the CPU, with `weights` in place of the parameters so named.

        Of a model in stages these are all of it: what PEFT has here has some of the layers.
        """
        if route_of(self._model) is not None:
            own = {name: weights[of].detach().cpu().contiguous().clone() for name, of in self._names.items()}
            return own if self._allocation is None else self._allocation.resized(own)
        names = dict(self._peft.named_parameters(remove_duplicate=False))
        moved = {id(p): weights[name] for name, p in self._model.named_parameters() if name in weights}
        everything = {
            name: moved.get(id(names.get(name, tensor)), tensor) for name, tensor in self._peft.state_dict().items()
        }
        with library.quiet():
            found = library.load().get_peft_model_state_dict(
                self._peft, state_dict=everything, adapter_name=ADAPTER, save_embedding_layers=False
            )
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in found.items()}

    def _refuse_another(self, folder: Path) -> None:
        wanted = {name: tuple(tensor.shape) for name, tensor in tensors_in_file(self._peft).items()}
        with opened([folder / WEIGHTS_FILE]) as files:
            found = files.shapes
        wrong = [
            f"lora.adapter: {folder / WEIGHTS_FILE}: {name} is {found.get(name, 'not there')}, wanted is "
            f"{wanted.get(name, 'none')}. Give the adapter of this model."
            for name in sorted(wanted.keys() | found.keys())
            if wanted.get(name) != found.get(name)
        ]
        if wrong:
            raise RecipeError(wrong[:5])
        came_from = self._config.base_model_name_or_path
        if came_from and Path(came_from).name != Path(self._recipe.model.path).name:
            self._notes.append(
                f"the adapter names {came_from} as its base; it goes on beside {self._recipe.model.path}"
            )

    def _take_over(self, folder: Path) -> None:
        """Put the numbers of a saved adapter into the one that was attached, but for those of weights without contents,
        whose names are kept."""
        own = tensors_in_file(self._peft)
        names = {id(one): name for name, one in self._model.named_parameters()}
        self._to_come = {name: names[id(tensor)] for name, tensor in own.items() if tensor.is_meta}
        with opened([folder / WEIGHTS_FILE]) as files:
            tensors = {
                name: torch.empty_like(tensor) if name in self._to_come else files.read(name, whole_cut(tensor.shape))
                for name, tensor in own.items()
            }
        with library.quiet():
            library.load().set_peft_model_state_dict(self._peft, tensors, adapter_name=ADAPTER)

    @torch.no_grad()
    def _take_over_pieces(self, folder: Path) -> None:
        """Put this process's pieces of what was without contents in the place of those of the base, rounded as the
        whole would be."""
        here = dict(self._model.named_parameters(remove_duplicate=False))
        with opened([folder / WEIGHTS_FILE]) as files:
            for name, parameter in ((name, here[of]) for name, of in self._to_come.items() if of in here):
                local_of(parameter).copy_(files.read(name, cut_of(parameter)).to(self._dtype))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the block torch draws from `seed`; afterwards it goes on as if nothing had been drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _is_idle(line: str, patterns: Collection[str]) -> bool:
    """Whether a warning of PEFT is about a setting that does nothing. It also warns of patterns that it writes itself
    for the experts of a mixture (PEFT 0.21), which do something; `patterns` are those that were given."""
    is_about_patterns = any(f"{name} keys did not match" in line for name in ("rank_pattern", "alpha_pattern"))
    return any(words in line for words in IDLE) and (
        not is_about_patterns or any(repr(one) in line for one in patterns)
    )


def _tie(config: Any, model: Any) -> None:
    """What trains of a table that is also the head trains in both."""
    is_tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    if is_tied and hasattr(config, "ensure_weight_tying"):
        targets = getattr(config, "target_modules", None)
        named = [
            *(getattr(config, "modules_to_save", None) or ()),
            *([] if isinstance(targets, str) else targets or ()),
        ]
        if any(name.rpartition(".")[2] in EMBEDDINGS for name in named):
            config.ensure_weight_tying = True


def _token_ids(recipe: Recipe) -> list[int] | None:
    """The ids of lora.trainable_tokens. Raises RecipeError for a text that is not one token."""
    wanted = recipe.lora.trainable_tokens
    if not wanted:
        return None
    if all(isinstance(token, int) for token in wanted):
        return sorted(set(map(int, wanted)))
    from training_hub.data.tokenizer import ChatTokenizer

    path = recipe.model.tokenizer or recipe.model.path
    tokenizer = ChatTokenizer.load(
        path, trust_remote_code=recipe.model.trust_remote_code, revision=recipe.model.revision
    )
    known = tokenizer.hf.get_vocab()
    unknown = [token for token in wanted if isinstance(token, str) and token not in known]
    if unknown:
        raise RecipeError(
            f"lora.trainable_tokens: {', '.join(map(repr, unknown))} is not a token of {path}. Write a token as the "
            "tokenizer's vocabulary has it, or its id."
        )
    return sorted({token if isinstance(token, int) else known[token] for token in wanted})


def _told(model: nn.Module, config: Any) -> Iterator[str]:
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    total, everything = sum(trained.values()), sum(nums_of(model).values())
    places: Counter[str] = Counter()
    for name, module in model.named_modules():
        if hasattr(module, "adapter_layer_names") and hasattr(module, "base_layer"):
            places[name.rpartition(".")[2]] += 1
    where = ", ".join(f"{count} {name}" for name, count in sorted(places.items())) or "modules of its own choice"
    rank = f" of rank {config.r}" if isinstance(getattr(config, "r", None), int) and config.r else ""
    yield f"trains {total:,} of {everything:,} numbers ({total / everything:.2%}): adapters{rank} in {where}"
