"""A pack on its device."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.backends.torch_engine.tiny_models import random_pack
from training_hub.backends.torch_engine.tensors import to_device
from training_hub.errors import DataError


def test_rows_are_the_positions_before_each_trained_token() -> None:
    pack = random_pack((4, 3))
    pack = dataclasses.replace(pack, weights=torch.tensor([0, 2, 0, 1, 0, 0, 3.0]).numpy())
    tensors = to_device(pack, "cpu")
    assert tensors.rows.tolist() == [0, 2, 5]
    assert tensors.targets.tolist() == pack.ids[[1, 3, 6]].tolist()
    assert tensors.target_weights.tolist() == [2, 1, 3]
    assert tensors.lengths == (4, 3)
    assert tensors.cu_seqlens.tolist() == [0, 4, 7]
    assert tensors.cu_seqlens.dtype == torch.int32
    assert tensors.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2]]


def test_a_weight_on_the_first_token_of_a_document_is_refused() -> None:
    pack = random_pack((4, 3))
    weights = pack.weights.copy()
    weights[4] = 1
    with pytest.raises(DataError, match="samples 1: the first token has a weight, but nothing predicts it"):
        to_device(dataclasses.replace(pack, weights=weights), "cpu")


def test_a_model_is_offered_only_what_it_takes() -> None:
    tensors = to_device(random_pack((4, 3)), "cpu")
    assert set(tensors.arguments(lambda input_ids, position_ids: None)) == {"input_ids", "position_ids"}
    everything = tensors.arguments(lambda **kwargs: None)
    assert everything["document_lengths"] == (4, 3)
    assert everything["use_cache"] is False
    alone = to_device(random_pack((4,)), "cpu").arguments(lambda **kwargs: None)
    assert set(alone) == {"input_ids", "position_ids", "use_cache"}
