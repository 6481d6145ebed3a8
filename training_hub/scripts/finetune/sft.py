"""`python -m training_hub.scripts.finetune.sft`, where EasyDeL has it."""

from __future__ import annotations

from training_hub.frontends.trainer.command import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
