"""The section of comm: how the processes of a run wait for each other."""

from __future__ import annotations

from training_hub.recipe.sections import Positive, Section


class Comm(Section):
    """How the processes of a run wait for each other; nothing here matters to a single one."""

    timeout_seconds: Positive = 600
    """A process that does not come to where the others wait for it within so many seconds ends the run. What one does
    for all (reading data, proofs, saving), and answers, may take longer: the others wait for as long as it is alive."""
