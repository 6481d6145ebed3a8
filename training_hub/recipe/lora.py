"""The section of adapters: what is added to a frozen model and trained in its place."""

from __future__ import annotations

from typing import Any

from training_hub.recipe.sections import Count, Decay, Positive, Section


class Lora(Section):
    """An adapter of PEFT beside the frozen weights: LoRA, and every other tuner that PEFT knows by name."""

    tuner: str = "lora"
    """lora, rslora, dora, pissa, olora, or another tuner by PEFT's name for it: oft, boft, ia3, vera, loha,
    lokr, ..."""

    r: Count | None = None
    """Rank of what is added to each weight. Default: 16 for the kinds of LoRA, PEFT's own for other tuners."""

    alpha: Positive | None = None
    """What is added is multiplied by alpha / r (rslora: alpha / sqrt(r)). Default: 32 for the kinds of LoRA."""

    dropout: Decay | None = None
    """Dropout of what goes into the adapter. Default: 0. Only without it the fused kernels run."""

    target_modules: str | list[str] | None = None
    """Modules that get an adapter. all-linear: every linear layer but the head. A list: ends of module names,
    [q_proj, v_proj]. Another text: a regular expression for the whole name. One that matches nothing is an error.
    Default: all-linear; for ia3 and ln_tuning what PEFT knows for the model's architecture."""

    modules_to_save: list[str] | None = None
    """Ends of the names of modules that are trained in full and saved with the adapter, such as lm_head."""

    trainable_tokens: list[int | str] | None = None
    """Tokens, as text or id, whose rows in the table of embeddings (and in a head tied to it) are trained."""

    options: dict[str, Any] = {}
    """Further fields of the tuner's configuration in PEFT, by their names there: {layers_to_transform: [0, 1]}."""

    adapter: str | None = None
    """Folder of an adapter to go on with, in PEFT's format. Its own configuration holds."""
