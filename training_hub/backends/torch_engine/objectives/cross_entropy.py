"""Cross-entropy of the next token, or what the section `loss` makes of it: the weighted sum over a pack's trained
tokens."""

# T tokens of the pack, N trained positions, D width of the model, V vocabulary

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from training_hub.backends.torch_engine.as_forward import as_forward, device_of
from training_hub.backends.torch_engine.fused.swap import WANTED_ROWS, gives_wanted_rows, no_mask, takes_no_mask
from training_hub.backends.torch_engine.objectives.head import find_head
from training_hub.backends.torch_engine.objectives.token_loss import PLAIN, TokenCriterion, TokenLoss
from training_hub.backends.torch_engine.tensors import PackTensors, Term
from training_hub.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""How far two ways to the same logits may lie apart, relative to the largest; ROUGH for 16-bit numbers, which keep as
few as 8 bits and are rounded again by each scale and cap."""

ROUGH = 0.03


@dataclass(frozen=True)
class CrossEntropy:
    """Sum over trained tokens of weight * loss of the token given those of its document before it, not divided.

    loss: -log p, or what TokenLoss makes of it.

    through_head: run the decoder and multiply only trained positions with the head, in chunks. Otherwise the whole
    model is run and asked for the logits of the trained positions; slower, right for a head with its own arithmetic.
    is_split: where the vocabulary is split over ranks, take the loss where the logits are; else gather the head first.
    """

    through_head: bool = True
    loss: TokenLoss = PLAIN
    is_split: bool = True

    def __call__(self, model: PreTrainedModel, pack: PackTensors) -> Term:
        return Term(*as_forward(model, lambda: self._losses(model, pack)))

    def _losses(self, model: PreTrainedModel, pack: PackTensors) -> tuple[Tensor, Tensor]:
        """Their sum, and each of them without gradients."""
        head = find_head(model, is_split=self.is_split) if self.through_head else None
        if head is None:
            losses_N = losses_of_logits(model_logits(model, pack), pack, self.loss)
            return losses_N.sum(), losses_N.detach()
        hidden_ND = decoder_states(model, pack)
        return head.weigh(hidden_ND, TokenCriterion(self.loss, pack.targets, pack.target_weights))


def cross_entropy(model: PreTrainedModel, *, is_split: bool = True) -> tuple[CrossEntropy, str | None]:
    """Plain cross-entropy for this model: its fast form where `check_head` agrees, else the general one and why."""
    reason = check_head(model)
    return CrossEntropy(through_head=reason is None, is_split=is_split), reason


def as_asked(plain: CrossEntropy, recipe: Recipe, teaching: object = None) -> CrossEntropy:
    """The same with what the recipe's section `loss` adds."""
    return replace(plain, loss=TokenLoss.of(recipe.loss))


def decoder_states(model: PreTrainedModel, pack: PackTensors) -> Tensor:
    """[N, D]: what the decoder says at the trained positions."""
    decoder = _decoder(model)
    arguments = pack.arguments(decoder.forward)
    if takes_no_mask(decoder):
        arguments["attention_mask"] = no_mask(pack.ids.device)
    if gives_wanted_rows(decoder):
        return decoder(**arguments, **{WANTED_ROWS: pack.rows})[0][0]
    return decoder(**arguments)[0][0].index_select(0, pack.rows)


def _decoder(model: PreTrainedModel) -> nn.Module:
    """The part below the head; the model itself where that cannot be told."""
    decoder = model.get_decoder()
    # Models cut out of a multimodal one name their base for it, and are found to be their own decoder.
    return getattr(model, "model", model) if decoder is model else decoder


def model_logits(model: PreTrainedModel, pack: PackTensors) -> Tensor:
    """[N, V]: the model's own logits at the trained positions."""
    arguments = pack.arguments(model.forward)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**arguments, logits_to_keep=pack.rows).logits[0]
    return model(**arguments).logits[0].index_select(0, pack.rows)


def losses_of_logits(logits_NV: Tensor, pack: PackTensors, loss: TokenLoss = PLAIN) -> Tensor:
    """[N]: the weighted losses of the pack's trained tokens, from whole logits."""
    exact = torch.promote_types(logits_NV.dtype, torch.float32)
    return loss.losses(logits_NV.to(exact), pack.targets) * pack.target_weights.to(exact)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> str | None:
    """None where decoder and head give the model's own logits on a few tokens; else what is done instead, and why."""
    instead = "the loss runs the whole model instead of decoder and head, which is slower"
    if find_head(model) is None:
        return f"{type(model).__name__} has no plain matrix as its head: {instead}."
    if _decoder(model) is model:
        return f"{type(model).__name__} has no decoder apart from its head: {instead}."
    pack = _tiny_pack(model)
    was_training = model.training
    model.eval()
    theirs_NV = model_logits(model, pack)
    (ours_NV,) = as_forward(model, lambda: _logits_of_head(model, pack))
    model.train(was_training)
    if ours_NV.shape != theirs_NV.shape:
        return f"{type(model).__name__} gives logits of another shape than its head: {instead}."
    difference = float((ours_NV - theirs_NV).abs().max() / theirs_NV.abs().max().clamp_min(1e-30))
    if difference <= TOLERANCE.get(theirs_NV.dtype, ROUGH):
        return None
    return f"{type(model).__name__} does more than multiply by a matrix (logits off by {difference:.1%}): {instead}."


def _logits_of_head(model: PreTrainedModel, pack: PackTensors) -> tuple[Tensor, ...]:
    head = find_head(model)
    return () if head is None else (head.logits(decoder_states(model, pack)),)


def _tiny_pack(model: PreTrainedModel) -> PackTensors:
    """Twelve tokens spread over the vocabulary, one document, all trained but the first."""
    device = device_of(model)
    vocabulary = model.config.get_text_config().vocab_size
    options: dict[str, Any] = {"device": device}
    weights = torch.ones(1, 12, **options)
    weights[0, 0] = 0
    return PackTensors(
        ids=torch.linspace(1, vocabulary - 1, 12, **options).long()[None],
        positions=torch.arange(12, **options)[None],
        weights=weights,
        lengths=(12,),
        cu_seqlens=torch.tensor([0, 12], dtype=torch.int32, **options),
        rows=torch.arange(11, **options),
    )
