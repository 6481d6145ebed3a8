"""What a run does to take less memory leaves its result alone, bit for bit, and the plan says what it chose."""

from __future__ import annotations

import pytest
import torch

from tests.backends.torch_engine.tiny_models import tiny_model
from tests.invariants.run import final_weights, recipe, train
from training_hub.backends import Given
from training_hub.backends.torch_engine.adaptations.holdings import NOTHING
from training_hub.backends.torch_engine.checkpointing import USABLE
from training_hub.backends.torch_engine.materials import load_materials
from training_hub.backends.torch_engine.planning.plan import feed_settings, memory_of
from training_hub.data.feed import Feed
from training_hub.errors import HubError
from training_hub.monitoring.console import open_console

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plain(tiny_model_folder, chat_file, tmp_path_factory):
    return train(tiny_model_folder, chat_file, tmp_path_factory.mktemp("runs") / "plain", training={"steps": 3})


@pytest.mark.parametrize("how", ["selective", "full"])
def test_a_run_with_activation_checkpointing_ends_at_the_same_bits(tiny_model_folder, chat_file, tmp_path, plain, how):
    settings = {"steps": 3, "activation_checkpointing": how}
    found = train(tiny_model_folder, chat_file, tmp_path / "run", training=settings)
    assert [row["loss"] for row in found.history] == [row["loss"] for row in plain.history]
    first, second = final_weights(found), final_weights(plain)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert found.plan["activation_checkpointing"] == how


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, beside which it works")
def test_offloading_is_refused_where_there_is_no_gpu_to_spare(tiny_model_folder, chat_file, tmp_path):
    with pytest.raises(HubError, match=r"offload: there is no GPU here(.|\n)*Write full"):
        train(tiny_model_folder, chat_file, tmp_path / "run", training={"activation_checkpointing": "offload"})
    assert not (tmp_path / "run" / "plan.json").exists()


def test_auto_keeps_everything_where_it_fits_and_forgets_as_little_as_it_must(tiny_model_folder, chat_file, tmp_path):
    wanted = recipe(tiny_model_folder, chat_file, tmp_path / "run")
    materials = load_materials(wanted, Given(), open_console("off"))
    store = materials.prepared.train
    feed = Feed(store, feed_settings(wanted, int(store.lengths.max()), CPU, True))

    deep = tiny_model("llama", num_hidden_layers=8)

    def chosen(free: float | None) -> str:
        return memory_of(wanted, deep, feed, CPU, torch.float32, NOTHING, free)[0]

    def total(how: str) -> float:
        forced = wanted.model_copy(
            update={"training": wanted.training.model_copy(update={"activation_checkpointing": how})}
        )
        return memory_of(forced, deep, feed, CPU, torch.float32, NOTHING, None)[1]["total"]

    assert chosen(None) == chosen(64.0) == "none"
    assert chosen(total("selective") * 1.00001 / USABLE) == "selective"
    assert chosen(total("full") * 1.00001 / USABLE) == chosen(0.001) == "full"
