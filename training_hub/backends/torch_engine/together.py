"""What the processes of a run make sure of together before its first step: the same rows, the same weights."""

from __future__ import annotations

from training_hub.backends.torch_engine.materials import Materials
from training_hub.backends.torch_engine.parallel import Group
from training_hub.backends.torch_engine.run import Run
from training_hub.errors import DataError


def refuse_other_data(group: Group, materials: Materials) -> None:
    """Raise DataError where the processes of a run do not train on the same tokens."""
    prints = group.gather([materials.prepared.train.fingerprint, materials.tokenizer.fingerprint])
    other = next((rank for rank, one in enumerate(prints) if one != prints[0]), None)
    if other is not None:
        raise DataError(
            f"data.path: rank {other} has read other data, or has another tokenizer, than rank 0: {prints[other]}, not "
            f"{prints[0]}. Give every node the same files."
        )


def same_start(run: Run) -> None:
    """Let all processes begin from the weights of rank 0: new ones may be drawn, or found by another library."""
    if run.group.world_size == 1 or run.layout.is_divided:
        return
    run.group.spread(run.model.state_dict().values())
    masters = run.updater.masters
    state = masters.saved()
    run.group.spread(state.values())
    masters.load(state)
