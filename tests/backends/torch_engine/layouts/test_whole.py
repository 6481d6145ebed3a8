"""One process with the whole model, which is no layout at all."""

from __future__ import annotations

from tests.backends.torch_engine.tiny_models import random_pack, tiny_model
from training_hub.backends.torch_engine.layouts import WHOLE


def test_a_pack_goes_where_the_model_computes_whoever_asks():
    # `check` and `eval` ask without saying where; on a GPU the pack then stayed on the CPU. meta is another device too.
    model = tiny_model("llama").to("meta")
    tensors = WHOLE.tensors(model, random_pack((5, 3)))
    assert tensors.ids.device.type == "meta"
