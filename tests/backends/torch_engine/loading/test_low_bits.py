"""What is made quantised before it has contents is what the library quantises."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.backends.torch_engine.tiny_models import FAMILIES, tiny_config, tiny_model
from training_hub.backends.torch_engine.loading.blank import without_contents
from training_hub.backends.torch_engine.loading.low_bits import empty_layers, empty_parts
from training_hub.backends.torch_engine.loading.packing import packed
from training_hub.backends.torch_engine.loading.quantization import (
    PACKED,
    is_quantised,
    loading_options,
    quantised,
)

PACKAGES = {"int4": "bitsandbytes", "int8": "torchao"}
QUICK = ("llama-tied", "gpt2")
families = [pytest.param(one, marks=[] if one in QUICK else [pytest.mark.slow]) for one in FAMILIES]


@pytest.mark.parametrize("kind", PACKAGES)
@pytest.mark.parametrize("family", families)
def test_the_layers_are_those_that_the_library_quantises(family, kind, tmp_path):
    pytest.importorskip(PACKAGES[kind])
    tiny_model(family).save_pretrained(tmp_path)
    options = loading_options(kind, torch.float32, torch.device("cpu"))
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    wanted = {name for name, one in whole.named_parameters() if is_quantised(one)}
    blank = without_contents(lambda: transformers.AutoModelForCausalLM.from_config(tiny_config(family)))
    empty_layers(blank, kind)
    assert {f"{name}.weight" for name, one in blank.named_modules() if hasattr(one, PACKED)} == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", PACKAGES)
@pytest.mark.parametrize("shape", [(7, 9), (300, 64)])
def test_a_layer_without_contents_has_the_form_of_one_with(shape, kind, dtype):
    """7 x 9 numbers are a byte with half a number, and one block that is not full."""
    pytest.importorskip(PACKAGES[kind])
    real, packing = packed(quantised(torch.randn(shape, dtype=dtype), kind).weight)
    blank, empty = empty_parts(torch.nn.Linear(shape[1], shape[0], bias=False), kind, dtype)
    assert (empty.form, empty.sizes, empty.dtype) == (packing.form, packing.sizes, packing.dtype)
    forms = [[(one.shape, one.dtype) for one in each] for each in ((blank, *empty.tensors), (real, *packing.tensors))]
    assert forms[0] == forms[1]
    assert blank.is_meta and all(one.is_meta for one in empty.tensors)
