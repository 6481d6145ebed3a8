"""The section of the hub: whether and where the final model is uploaded."""

from __future__ import annotations

import re

from training_hub.recipe.sections import Section

REPO_ID = re.compile(r"(?=.{3,96}\Z)(?!.*(?:--|\.\.))[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?<![.-])(?<!\.git)")


class Hub(Section):
    """Uploading the final model to the Hugging Face hub. The token comes from HF_TOKEN or from `hf auth login`."""

    push: bool = False
    """Upload the files of final/ once the run is over, and nothing else."""

    repo_id: str | None = None
    """Repository as OWNER/NAME; it is made where there is none."""

    private: bool = True
    """Make it one that only its owners see. A repository that is there already stays as it is."""
