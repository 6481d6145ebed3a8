"""Proofs before the first step: what training relies on, tried on the user's own model and rows in seconds.

Nothing a run goes on with is changed: gradients are dropped, updates are made to copies, every step seeds its own
random numbers. A run with proofs therefore ends in the same bits as one without.
"""

# N trained positions, V vocabulary

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from training_hub.backends.shared.final_folder import set_stop_ids
from training_hub.backends.shared.proofs import (
    MOVED,
    SAMPLES,
    SMALL_RATE,
    alone,
    compared,
    excerpt,
    last_trained,
    relative,
    stop_proofs,
    text_proof,
)
from training_hub.backends.torch_engine.objectives import on_excerpts, plain_total
from training_hub.backends.torch_engine.optim import build_optimizer
from training_hub.backends.torch_engine.optimizers.library import table_names
from training_hub.backends.torch_engine.preflight import evaluating, packed_equals_alone
from training_hub.backends.torch_engine.run import Run
from training_hub.backends.torch_engine.tensors import PackTensors, to_device
from training_hub.data.agreement import Agreement
from training_hub.data.packing import pack
from training_hub.errors import TrainingError
from training_hub.types import Pack, Proof, Sample

KNOWN_BY_HEART = 0.1
"""Mean loss in nats below which the first samples say nothing about rounding."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative difference of two losses that rounding explains; ROUGH for 16-bit numbers. Gradients are sums of many more
terms and are allowed ten times as much, measured on random models of two layers: 1e-6 in float32."""

ROUGH = 2e-2


LOGITS_APART = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}
"""Difference of logits, as a share of the largest, that the coarser format, of training or of the file, makes."""

COPIED_NUMBERS = 2**24
COMPARED_NUMBERS = 2**20
EXPORTED_AT_START_BYTES = 2**28
"""A larger model is not written before the first step of a run: the final one is loaded again and compared anyway."""

PLANNED_MEMORY = 1.5
"""Times that measured and planned memory may differ, either way: allocators round, and kernels have workspaces."""

NOT_FINITE = "the loss of the first samples is not finite"


@dataclass(frozen=True)
class Subject:
    """What the proofs are about.

    stop_ids: what the exported model stops at. ending_ids: every token that is special to the tokenizer. save: writes
    the final model into a folder, as the run will, and gives its difference of logits. scratch: a folder that exists.
    predicted: GiB by what takes them, as the plan says. thorough: also what takes long with a large model.
    """

    run: Run
    dtype: torch.dtype
    save_dtype: torch.dtype
    agreement: Callable[[], Agreement]
    stop_ids: Sequence[int]
    ending_ids: Sequence[int]
    save: Callable[[Path], float]
    scratch: Path
    predicted: Mapping[str, Any]
    thorough: bool


def prove(subject: Subject) -> list[Proof]:
    """Every proof, in the order in which one rests on another."""
    run = replace(subject.run, objective=on_excerpts(subject.run.objective))
    subject = replace(subject, run=run)
    proofs = [text_proof(subject.agreement()), *_stops(subject), _finite_weights(subject)]
    if proofs[-1].status == "fails":
        return proofs
    proofs += run.adaptation.proofs()
    with evaluating(run.model):
        excerpts = _excerpts(run)
        if not math.isfinite(_loss(run, alone(excerpts))):
            return [*proofs, _not_finite(subject)]
        proofs += [_packed(subject, excerpts), _fast_loss(subject, excerpts)]
        proofs += _accumulation_and_update(subject, excerpts)
    return [*proofs, _saved(subject), *_memory(subject)]


def agreed(run: Run, proofs: Sequence[Proof]) -> list[Proof]:
    """The proofs as all processes found them: of a divided model each sees its own pieces, and the worst one counts."""
    if not run.layout.is_divided:
        return list(proofs)
    found = [[Proof(**each) for each in some] for some in run.group.gather([asdict(each) for each in proofs])]
    order = ("left out", "holds", "fallback", "fails")
    return [max(same, key=lambda one: order.index(one.status)) for same in zip(*found, strict=True)]


def _stops(subject: Subject) -> list[Proof]:
    if subject.run.recipe.data.pretraining:
        return stop_proofs(None, set(), ())
    return stop_proofs(last_trained(subject.run.feed.store), _generation_stops(subject), subject.ending_ids)


def _generation_stops(subject: Subject) -> set[int]:
    """The ids at which generate() would stop, by the file that export writes and the class that reads it."""
    with tempfile.TemporaryDirectory(dir=subject.scratch, prefix=".preflight-") as folder:
        own = getattr(subject.run.model, "generation_config", None)
        if own is not None:
            own.save_pretrained(folder)
        set_stop_ids(Path(folder) / "generation_config.json", subject.stop_ids)
        stops = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    return {stops} if isinstance(stops, int) else set(stops or ())


def _finite_weights(subject: Subject) -> Proof:
    name, limit = "every weight is a finite number", "0"
    weights = subject.run.updater.masters.weights
    wrong = {key: int((~torch.isfinite(weight)).sum()) for key, weight in weights.items()}
    held = [f"{key} holds {count:,} numbers that are not finite" for key, count in wrong.items() if count]
    if subject.run.layout.is_divided:  # all must come to the same conclusion
        held = sorted({line for some in subject.run.group.gather(held) for line in some})
    if not held:
        return Proof(name, "holds", "0 are not", limit)
    remedy = f"{'; '.join(held[:5])}. Fetch the model again: nothing trained from these weights could be used."
    return Proof(name, "fails", f"{sum(wrong.values()):,} are not", limit, remedy)


def _not_finite(subject: Subject) -> Proof:
    """A step of the run names the rows and follows training.on_nonfinite; a check has no later step."""
    remedy = "training.on_nonfinite decides at the step that meets them; `training.global_batch_size: 1` finds the row."
    return Proof("the loss is finite", "fails" if subject.thorough else "left out", NOT_FINITE, "finite", remedy)


def _packed(subject: Subject, excerpts: Sequence[Sample]) -> Proof:
    name, run = "packed samples are as if alone", subject.run
    limit = TOLERANCE.get(subject.dtype, ROUGH)
    vocabulary = run.model.config.get_text_config().vocab_size
    # Own rows say that all is well with what will be trained, random ones have no text in common to hide behind.
    own = relative(_packed_losses(run, excerpts), [_loss(run, [one]) for one in alone(excerpts)])
    difference = max(own, packed_equals_alone(run.model, run.objective, vocabulary))
    if difference <= limit:
        return Proof(name, "holds", f"{difference:.1e}", f"{limit:.0e}")
    if not run.feed.settings.is_packed:
        remedy = "this architecture mixes packed samples, so each runs alone; slower, and right."
        return Proof(name, "fallback", f"{difference:.1e}", f"{limit:.0e}", remedy)
    return Proof(name, "fails", f"{difference:.1e}", f"{limit:.0e}", "Write data.packing: false.")


def _packed_losses(run: Run, excerpts: Sequence[Sample]) -> list[float]:
    """The loss of each excerpt within a pack of all of them, in which it alone is trained."""
    silent = [Sample(one.ids, np.zeros_like(one.weights), one.origin) for one in excerpts]
    indices = list(range(len(excerpts)))
    packs = (pack([*silent[:at], excerpts[at], *silent[at + 1 :]], indices) for at in indices)
    try:
        return [_loss(run, [one]) for one in packs]
    except ValueError:  # how linear attention without its kernels refuses a pack
        return [math.inf] * len(excerpts)


def _fast_loss(subject: Subject, excerpts: Sequence[Sample]) -> Proof:
    """Loss and gradients of the objective against the same in plain float32 from the model's own full logits."""
    name, run = "fast loss is the plain one", subject.run
    packs, limit = [to_device(one, run.device) for one in alone(excerpts)], TOLERANCE.get(subject.dtype, ROUGH)
    fast = _Gradients.of(run, [run.objective(run.model, one).total for one in packs])
    plain = _Gradients.of(run, [_plain_loss(run, one) for one in packs])
    run.updater.masters.drop_gradients()
    loss, gradient = abs(fast.loss - plain.loss) / max(abs(plain.loss), 1e-12), fast.difference(plain)
    return compared(
        name, loss, gradient, limit, "Report the model and its versions; training it would be wrong as it is."
    )


def _plain_loss(run: Run, one: PackTensors) -> Tensor:
    return plain_total(run.objective, run.recipe, run.model, one)


def _accumulation_and_update(subject: Subject, excerpts: Sequence[Sample]) -> list[Proof]:
    """The gradient of one large micro-step against that of many small ones, then an update made of the latter."""
    name, run = "accumulation leaves loss and gradient", subject.run
    together = [pack(excerpts, range(len(excerpts)))] if run.feed.settings.is_packed else alone(excerpts)
    totals = [run.objective(run.model, to_device(one, run.device)).total for one in together]
    whole = _Gradients.of(run, [torch.stack(totals).sum()])
    parts = _Gradients.of(run, (run.objective(run.model, to_device(one, run.device)).total for one in alone(excerpts)))
    limit = TOLERANCE.get(subject.dtype, ROUGH)
    loss, gradient = abs(whole.loss - parts.loss) / max(abs(parts.loss), 1e-12), whole.difference(parts)
    proof = compared(name, loss, gradient, limit, "Write data.packing: false, and report the model.")
    moved = _moved(run)
    run.updater.masters.drop_gradients()
    return [proof, moved]


@dataclass(frozen=True)
class _Gradients:
    """The loss, the norm of all gradients, and copies of the smaller ones; the gradients themselves stay in place."""

    loss: float
    norm: float
    small: dict[str, Tensor]

    @classmethod
    def of(cls, run: Run, totals: Any) -> _Gradients:
        masters = run.updater.masters
        masters.drop_gradients()
        loss = 0.0
        for total in totals:
            total.backward()
            loss += float(total.detach())
        masters.gather()
        if run.layout.is_divided:  # else one process is here alone
            run.layout.sum_gradients(masters.weights, masters.sources)
        found = {key: weight.grad for key, weight in masters.weights.items() if weight.grad is not None}
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in found.values()))
        small = {key: grad.clone() for key, grad in found.items() if grad.numel() <= COMPARED_NUMBERS}
        return cls(loss, norm, small)

    def difference(self, other: _Gradients) -> float:
        """The larger of the relative differences of the norms and of the copies."""
        apart = math.sqrt(
            sum(float((self.small[key] - other.small[key]).double().square().sum()) for key in self.small)
        )
        size = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in other.small.values()))
        return max(abs(self.norm - other.norm) / max(other.norm, 1e-30), apart / max(size, 1e-30))


def _moved(run: Run) -> Proof:
    """Share of weights with a gradient that one update at a tiny learning rate moves, on copies of as many as fit."""
    settings = run.recipe.optimizer.model_copy(update={"lr": SMALL_RATE, "weight_decay": 0.0})
    name, limit = f"an update at {SMALL_RATE:.0e} moves weights", MOVED.get(settings.name, 0.0)
    copies, room = {}, COPIED_NUMBERS
    masters = run.updater.masters
    for key, weight in masters.weights.items():
        if weight.grad is not None and 0 < weight.numel() <= room:
            copies[key] = masters.exact(key).detach().clone().requires_grad_()
            copies[key].grad = weight.grad.clone()
            room -= weight.numel()
    if not copies:
        return Proof(name, "left out", "", f"above {limit:.0%}", "every weight is too large to copy")
    has_gradient = {key: copy.grad.ne(0) for key, copy in copies.items() if copy.grad is not None}
    build_optimizer(copies, settings, tables=table_names(run.model)).step()
    changed = sum(int((copies[key].ne(masters.exact(key)) & mask).sum()) for key, mask in has_gradient.items())
    share = changed / max(1, sum(int(mask.sum()) for mask in has_gradient.values()))
    remedy = "" if share > limit else "Weights this precise cannot be trained: write model.dtype: auto."
    return Proof(name, "holds" if share > limit else "fails", f"{share:.1%} of weights", f"above {limit:.0%}", remedy)


def _saved(subject: Subject) -> Proof:
    name, model = "saved and loaded gives the same logits", subject.run.model
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if subject.run.layout.is_divided or (not subject.thorough and size > EXPORTED_AT_START_BYTES):
        return Proof(name, "left out", "", "", "done with the final model; `training-hub check` does it now")
    scale = _largest_logit(subject.run)
    with tempfile.TemporaryDirectory(dir=subject.scratch, prefix=".preflight-") as folder:
        try:
            difference = subject.save(Path(folder) / "model") / scale
        except TrainingError as error:
            return Proof(name, "fails", "another model", "the same", str(error))
        except OSError as error:
            return Proof(name, "fails", "not written", "the same", f"{error}: {size:,} bytes are needed in {folder}.")
    limit = max(LOGITS_APART[subject.dtype], LOGITS_APART[subject.save_dtype])
    holds = difference <= limit
    remedy = "" if holds else "Report the model and its versions, or write model.save_dtype: float32."
    return Proof(name, "holds" if holds else "fails", f"{difference:.1e}", f"{limit:.0e}", remedy)


def _memory(subject: Subject) -> list[Proof]:
    """The plan's memory against that of the step on the largest pack, which has just been tried.

    On CUDA the peak of the device's tensors, but for the optimizer's, which come with the first update. On a CPU, whose
    processes hold much that is no tensor, the bytes kept for backward; that takes another step, so a run leaves it out.
    A plan that is off stops no run.
    """
    name, limit, predicted = "memory is as planned", f"within {PLANNED_MEMORY:g} times", subject.predicted
    if predicted.get("activations") is None:
        return [Proof(name, "left out", "", limit, str(predicted.get("note", "")))]
    if subject.run.device.type == "cuda":
        measured = torch.cuda.max_memory_allocated(subject.run.device) / 2**30
        planned = predicted["total"] - predicted["optimizer"]
    elif subject.thorough:
        measured, planned = _kept_for_backward(subject.run) / 2**30, predicted["activations"]
    else:
        return []
    ratio = measured / max(planned, 1e-9)
    shown = f"{measured:.3g} GiB of {planned:.3g} planned"
    if 1 / PLANNED_MEMORY <= ratio <= PLANNED_MEMORY:
        return [Proof(name, "holds", shown, limit)]
    remedy = "the plan counts this architecture wrongly; leave room, or lower training.max_tokens_per_gpu."
    return [Proof(name, "fallback", shown, limit, remedy)]


def _kept_for_backward(run: Run) -> int:
    """Bytes of the tensors that forward keeps on the run's largest pack, weights aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in run.model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor  # held, so that its place is not given to another
        return tensor

    run.model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run.objective(run.model, to_device(run.feed.largest_pack(), run.device))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@torch.no_grad()
def _largest_logit(run: Run) -> float:
    ids = torch.arange(16, device=run.device).remainder(run.model.config.get_text_config().vocab_size)[None]
    with evaluating(run.model):
        return max(float(run.model(input_ids=ids, use_cache=False).logits.float().abs().max()), 1e-12)


def _excerpts(run: Run) -> list[Sample]:
    """The ends of the first samples; other tokens in their place where the model knows them by heart.

    A loss near 0 is the difference of numbers near 1, and its own rounding is then as large as itself.
    """
    store = run.feed.store
    excerpts = [excerpt(store[index]) for index in range(min(SAMPLES, len(store)))]
    if _loss(run, alone(excerpts)) >= KNOWN_BY_HEART * sum(float(one.weights[1:].sum()) for one in excerpts):
        return excerpts
    random, vocabulary = np.random.default_rng(0), run.model.config.get_text_config().vocab_size
    return [Sample(random.integers(0, vocabulary, len(one), np.int32), one.weights, one.origin) for one in excerpts]


@torch.no_grad()
def _loss(run: Run, packs: Sequence[Pack]) -> float:
    return sum(float(run.objective(run.model, to_device(one, run.device)).total) for one in packs)
