"""torchforge's SFT app: `load` a configuration, `show` it, `check` it, `save` it, `train`."""

from __future__ import annotations

from training_hub.frontends.forge.run import check, load, save, show, train

__all__ = ["check", "load", "save", "show", "train"]
