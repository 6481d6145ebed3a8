"""The section of the loss: what is made of each trained token's prediction, and what is reported of it."""

from __future__ import annotations

from training_hub.recipe.sections import Decay, NotNegative, Section


class Loss(Section):
    """What is made of each trained token's prediction. Validation is always plain cross-entropy, whatever stands
    here, so that runs with different losses can be compared."""

    label_smoothing: Decay = 0.0
    """Share of each target that is spread evenly over the whole vocabulary."""

    z_loss: NotNegative = 0.0
    """Weight of log(sum of e^logit) squared, which keeps logits from growing; 1e-4 is usual."""

    dft: bool = False
    """Dynamic fine-tuning: weigh each token's loss by the probability that the model gives it, taken as a constant, so
    that tokens it finds impossible pull less."""

    neftune_noise_alpha: NotNegative = 0.0
    """Add noise to the embeddings in training: uniform, of at most this over sqrt(tokens of the sample x width); 5 is
    usual."""

    by_source: bool = True
    """Where data.path lists several sources, also report the mean loss of each in every step, as source_loss/NAME."""
