"""What of a compiled model is not compiled; tests/distributed/test_compiled.py has what is."""

from __future__ import annotations

from torch._dynamo.utils import counters

from tests.backends.torch_engine.tiny_models import tiny_model
from training_hub.backends.shared.answers import Decoding, Prompt
from training_hub.backends.torch_engine.answers.generate import answers
from training_hub.backends.torch_engine.compiling import compile_blocks, uncompiled


def test_answers_are_made_by_blocks_as_they_are_written():
    model, prompts = tiny_model("llama"), [Prompt([5, 6, 7], 4), Prompt([8, 9], 4)]
    plain = answers(model, prompts, Decoding(()))
    compile_blocks(model)
    before = dict(counters["stats"])
    with uncompiled(model):
        assert answers(model, prompts, Decoding(())) == plain
    assert dict(counters["stats"]) == before, "no code was made for any length"
