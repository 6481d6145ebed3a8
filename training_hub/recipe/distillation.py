"""The section of distillation: which model teaches, and how far from it the trained one is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from training_hub.recipe.sections import Count, Positive, Section, _a_number

Inside = Annotated[float, BeforeValidator(_a_number), Field(gt=0, lt=1, allow_inf_nan=False)]
Part = Annotated[float, BeforeValidator(_a_number), Field(gt=0, le=1, allow_inf_nan=False)]


class Distillation(Section):
    """A teacher: on the trained tokens, any algorithm learns its distribution over the next token instead of the
    token alone."""

    teacher: str | None = None
    """Folder in Hugging Face format, or a name on the hub, of the model that teaches. Its vocabulary must be the
    trained model's. model.attention and model.trust_remote_code hold for it, too."""

    teacher_revision: str | None = None
    """Branch, tag or commit, for a teacher on the hub."""

    teacher_dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Number format of the teacher. auto: the one that the trained model computes in."""

    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = "forward_kl"
    """What is minimised, between the teacher p and the trained model q. forward_kl: KL(p, q), which covers all that the
    teacher may say. reverse_kl: KL(q, p), which stays with what it is sure of. jensen_shannon: both, mixed by beta."""

    beta: Inside = 0.5
    """With jensen_shannon: beta KL(p, m) + (1 - beta) KL(q, m), where m = beta p + (1 - beta) q."""

    temperature: Positive = 1.0
    """Both models' logits are divided by it. The divergence is multiplied by its square, so that gradients keep their
    size."""

    alpha: Part = 1.0
    """Share of the divergence in the loss; the rest, 1 - alpha, is the cross-entropy of the tokens themselves."""

    cache: Literal["none", "top_k", "sampled"] = "none"
    """none: the teacher runs beside the trained model in each step. top_k: it runs once over the data before training,
    and its top_k likeliest tokens, with all others as one, are kept on disk. sampled: tokens drawn from it are kept,
    which is the whole distribution on average."""

    top_k: Count = 64
    """With cache: top_k, tokens that are kept for each trained one; 8 bytes each."""

    samples: Count = 50
    """With cache: sampled, tokens that are drawn for each trained one; 4 bytes each."""

    prompt: str | None = None
    """System message that only the teacher sees, in place of a row's own: the trained model learns to answer as if it
    had it. The teacher may be the trained model itself."""

    max_teacher_length: Count | None = None
    """Longest sequence that the teacher may read, in tokens; a longer one is an error. Default: what its config says it
    can."""
