"""What a teacher costs a run, in memory and in work, from the shapes of its config: no weight is loaded."""

# T tokens that the teacher reads at once, N trained positions, D its width, V its vocabulary

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from training_hub.backends.torch_engine.layouts.share import EVERYTHING, Share, Sizes, held
from training_hub.backends.torch_engine.loading.model import choose_dtype
from training_hub.backends.torch_engine.loading.model_config import read_blank_model
from training_hub.backends.torch_engine.objectives.head import chunk_rows
from training_hub.backends.torch_engine.planning.work import Work, work_of
from training_hub.backends.torch_engine.teacher.facts import TeacherFacts, told_of_teacher
from training_hub.backends.torch_engine.teacher.form import Form
from training_hub.data.store import TokenStore
from training_hub.recipe import Recipe
from training_hub.types import Pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel


NUMBERS = {"forward_kl": 8.25, "reverse_kl": 7.25, "jensen_shannon": 10.25}
"""Float32 numbers for each logit of a chunk at the fullest moment of torch's operators, counted by what these make; the
student's own and its exponential are two of them."""

NUMBERS_OF_KEPT = 4.0
"""The same where targets are tokens that were kept."""


@dataclass(frozen=True)
class TeacherLoad:
    """Bytes: what is there during the student's forward and backward (weights and states, or kept targets); what is
    made of a chunk of logits, beside what the student's own loss makes of it; what comes and goes while the teacher is
    asked; and all there is before the first step, where it is asked then. work: operations of asking it in each step;
    None where nobody does. prompted: as in TeacherFacts. sent: what a process sends of it for each pack.
    """

    beside: int
    chunk: int
    passing: int
    before: int
    work: Work | None
    facts: TeacherFacts
    sent: float = 0

    def operations(self, pack: Pack) -> float:
        """Those that the teacher needs for a pack of the student's."""
        if self.work is None:
            return 0.0
        lengths = np.diff(pack.boundaries)
        if self.facts.prompted is not None:
            lengths = self.facts.prompted.lengths[pack.samples]
        return self.work.of_lengths(lengths.tolist(), int(np.count_nonzero(pack.weights)))

    def operations_of(self, store: TokenStore, run: dict[str, Any]) -> float:
        """Those of its products in a whole run over `store`, of so many `tokens` and `trained_tokens`."""
        if self.work is None:
            return 0.0
        tokens, prompted = run["tokens"], self.facts.prompted
        if prompted is not None:
            tokens *= float(prompted.lengths.sum()) / float(store.lengths.sum())
        return self.work.per_token * tokens + self.work.per_trained_token * run["trained_tokens"]


def teacher_load(
    recipe: Recipe, facts: TeacherFacts, largest: Pack, device: torch.device, share: Share = EVERYTHING
) -> TeacherLoad:
    """The load of the recipe's teacher in a run whose largest pack is `largest`. share: what the first process has of
    the student, and so in how many slices the teacher lies, and whose logits it makes there."""
    with told_of_teacher():
        blank, _ = read_blank_model(facts.chosen)
        dtype = choose_dtype(facts.chosen.dtype, device)
    tokens, trained = len(largest), int(np.count_nonzero(largest.weights))
    if facts.prompted is not None:
        tokens = int(facts.prompted.lengths[largest.samples].sum())
    weights = sum(parameter.numel() for parameter in blank.parameters()) * dtype.itemsize
    slices, own, sizes = share.slices, Share(slices=share.slices), Sizes.of(blank)
    mine = sum(held(parameter, own, ()).numel() for parameter in blank.parameters()) * dtype.itemsize
    # What stands around the blocks, a block and the one that is fetched ahead, or the place it is gathered in.
    gathered = (sizes.around + 2 * sizes.block) * dtype.itemsize * (slices > 1)
    config = blank.config.get_text_config()
    states = trained * config.hidden_size * dtype.itemsize
    rows = min(trained, chunk_rows(config.vocab_size, device.type))
    chunk = _chunk(recipe, config.vocab_size, trained, dtype, device, share)
    passing = tokens * _widest(blank) * dtype.itemsize
    if recipe.distillation.cache == "none":
        matrix = getattr(blank.get_output_embeddings(), "weight", None)
        head = matrix.numel() * dtype.itemsize if slices > 1 and matrix is not None else 0
        sent = weights * (slices - 1) / slices
        work = work_of(blank, learns=False)
        return TeacherLoad(mine + head + states, chunk, passing + gathered, 0, work, facts, sent)
    form = Form.of(recipe.distillation, facts.common, recipe.seed)
    # Ids become 8 bytes wide on the device.
    kept = trained * (form.bytes_per_row + 4 * form.width)
    before = mine + gathered + states + passing + rows * config.vocab_size * 12
    return TeacherLoad(kept, chunk, 0, before, None, facts)


def _chunk(
    recipe: Recipe, vocabulary: int, trained: int, dtype: torch.dtype, device: torch.device, share: Share
) -> int:
    """What is made of a chunk of logits beside what the student's cross-entropy makes of it."""
    is_split = share.heads > 1 and not share.gathers_head
    tokens = -(-vocabulary // share.heads) if is_split else vocabulary
    logits = min(trained, chunk_rows(tokens, device.type)) * tokens
    is_kept = recipe.distillation.cache != "none"
    # On a CPU the kernels take logits as a product gives them.
    if device.type == "cpu" and not is_split:
        return 0 if is_kept else logits * dtype.itemsize
    numbers = NUMBERS_OF_KEPT if is_kept else NUMBERS[recipe.distillation.divergence]
    return int(logits * 4 * (numbers - 2))


def _widest(model: PreTrainedModel) -> int:
    """Numbers for each token at the fullest moment of a layer that keeps nothing: in attention the state, its norm,
    query, key, value and result; in the gated unit the state, its norm, and three of its own width."""
    config = model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return int(max(6 * config.hidden_size, 2 * config.hidden_size + 3 * inner))
