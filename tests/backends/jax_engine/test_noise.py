"""Dropout and noise on embeddings: as much as said, of the seed and the step, the same packed and alone."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.backends.jax_engine.tiny import LENGTHS, random_pack, read, saved
from tests.invariants.run import train
from training_hub.backends.jax_engine.attention import in_blocks, plainly
from training_hub.backends.jax_engine.batches import Arrays, Sizes, side_by_side
from training_hub.backends.jax_engine.decoder import Build
from training_hub.backends.jax_engine.forward import Forward
from training_hub.backends.jax_engine.noise import Noise, Rates, disturbed, drop, noise_of, token_keys
from training_hub.backends.jax_engine.objective import PLAIN, term
from training_hub.errors import TrainingError
from training_hub.types import Pack

ALL = {"attn_pdrop": 0.2, "embd_pdrop": 0.1, "resid_pdrop": 0.3}


def batch(packs: list[Pack], step: int, seed: int = 0) -> Arrays:
    arrays = side_by_side(packs, Sizes.of(256))
    return replace(arrays, noise=noise_of(packs, jnp.asarray(arrays.positions), seed, step))


def keys(one: Arrays) -> jax.Array:
    assert isinstance(one.noise, Noise)
    return token_keys(one.noise, jnp.asarray(one.positions))


def test_as_many_numbers_are_dropped_as_said_and_the_rest_makes_up_for_them():
    """Within five standard deviations of what 77 tokens of 500 numbers show."""
    found = keys(batch([random_pack()], 1))[:, : sum(LENGTHS)]
    ones = jnp.ones((1, sum(LENGTHS), 500))
    dropped = np.asarray(drop(ones, found, "here", 0.3))
    share, spread = (dropped == 0).mean(), np.sqrt(0.3 * 0.7 / dropped.size)
    assert abs(share - 0.3) < 5 * spread
    assert np.allclose(dropped[dropped != 0], 1 / 0.7)
    other = [drop(ones, found, "there", 0.3), drop(ones, keys(batch([random_pack()], 2))[:, :77], "here", 0.3)]
    for each in other:  # another place, another step: numbers that know nothing of each other
        assert abs(((np.asarray(each) == 0) & (dropped == 0)).mean() - 0.09) < 0.01
    assert np.array_equal(drop(ones, found, "here", 0.3), dropped)
    assert drop(ones, None, "here", 0.3) is ones


def test_noise_is_uniform_within_a_bound_that_falls_with_the_length_of_the_sample():
    one = batch([random_pack()], 1)
    embedded = jnp.zeros((1, one.ids.shape[1], 400))
    noise = np.asarray(disturbed(embedded, keys(one), one.noise.lengths, 5.0))[0]
    start = 0
    for length in LENGTHS:
        own, bound = noise[start : start + length], 5 / np.sqrt(length * 400)
        assert 0.95 * bound < np.abs(own).max() <= bound
        assert abs(own.std() / (bound / np.sqrt(3)) - 1) < 0.1
        start += length


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Any:
    """A GPT-2 that drops numbers everywhere: transformers' model, and ours as a function of its rates."""
    folder = tmp_path_factory.mktemp("gpt2")
    model = saved("gpt2", folder, n_layer=1, **ALL)
    shape, loaded = read(folder)
    rates = Rates(shape.embedding_dropout, shape.attention_dropout, shape.residual_dropout)
    assert rates == Rates(0.1, 0.2, 0.3)

    def made(rates: Rates, attend: Any = partial(in_blocks, reach=max(LENGTHS)), **options: Any) -> Forward:
        return Forward(Build(shape, attend, jnp.float32, rates=rates), **options)

    return model, made, rates, {key: jnp.asarray(weight) for key, weight in loaded.weights.items()}


def test_losses_with_dropout_are_distributed_as_those_of_transformers(gpt2):
    """Mean over 300 draws within four standard errors, spread within a quarter: its own error is 1 / sqrt(600)."""
    model, made, rates, params = gpt2
    one = random_pack((40,))
    measured = jax.jit(lambda arrays: term(made(rates), PLAIN, params, arrays)[0])
    ours = np.array([float(measured(batch([one], step))) for step in range(300)])
    ids, weights = torch.from_numpy(one.ids).long(), torch.from_numpy(one.weights[1:])
    model.train()
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = [model(input_ids=ids[None], use_cache=False).logits[0, :-1] for _ in range(300)]
    losses = [torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none") for logits in drawn]
    theirs = np.array([float((loss * weights).sum()) for loss in losses])
    error = np.hypot(ours.std(), theirs.std()) / np.sqrt(300)
    assert abs(ours.mean() - theirs.mean()) < 4 * error
    assert 0.75 < ours.std() / theirs.std() < 1.33
    without = jax.jit(lambda arrays: term(made(rates), PLAIN, params, arrays)[0])(side_by_side([one], Sizes.of(256)))
    assert abs(float(without) - ours.mean()) > 4 * error, "else nothing was dropped"


def test_a_packed_sample_gets_the_numbers_that_it_would_get_alone(gpt2):
    """1e-5 of the loss, in float32: sums in another order. Attention's own dropout is by place, and left out here."""
    _, made, rates, params = gpt2
    rates = replace(rates, attention=0.0, alpha=5.0)
    whole = random_pack()
    spans = list(zip(whole.boundaries, whole.boundaries[1:], strict=False))
    measured = jax.jit(lambda arrays: term(made(rates), PLAIN, params, arrays)[0])
    alone = 0.0
    for number, (start, end) in enumerate(spans):
        part = Pack(
            whole.ids[start:end], whole.positions[start:end], whole.weights[start:end],
            np.array([0, end - start], np.int32), np.array([number]),
        )  # fmt: skip
        alone += float(measured(batch([part], 3)))
    assert float(measured(batch([whole], 3))) == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_layers_that_are_scanned_or_forgotten_draw_the_same_numbers(gpt2):
    _, made, rates, params = gpt2
    one = batch([random_pack()], 5)

    def slopes(forward: Forward) -> Any:
        return jax.jit(jax.value_and_grad(lambda params: term(forward, PLAIN, params, one)[0]))(params)

    (wanted, plain), (found, ours) = slopes(made(rates)), slopes(made(rates, forget="full", is_scanned=True))
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)
    for key, slope in plain.items():
        assert jnp.abs(ours[key] - slope).max() <= 1e-5 * max(jnp.abs(each).max() for each in plain.values()), key


@pytest.mark.parametrize("attend", [plainly, partial(in_blocks, reach=60)], ids=["plain", "blocks"])
def test_attention_drops_shares_and_not_what_is_masked(attend):
    """With every value 1, what comes out is the sum of the shares left: 1 on average, within 5 standard errors."""
    random = np.random.default_rng(0)
    q, k = (jnp.asarray(random.standard_normal((1, 256, heads, 8)), jnp.float32) for heads in (4, 2))
    segments = jnp.asarray(np.repeat(np.arange(1, 6), [60, 60, 60, 60, 16]))[None]
    one = batch([random_pack((60, 60, 60, 60, 16))], 1)
    out = attend(
        q, k, jnp.ones_like(k), segments, 2**30, drop=lambda shares: drop(shares, keys(one), "shares", 0.5)
    )  # fmt: skip
    sums = np.asarray(out)[0, :, :, 0]
    assert abs(sums.mean() - 1) < 5 * sums.std() / np.sqrt(sums.size)
    assert set(np.unique(sums[0])) <= {0.0, 2.0}, "the first token has one share"
    assert sums[1:].std() > 0.1


class StopAt:
    def __init__(self, step: int):
        self.step = step

    def __call__(self, report: Any) -> None:
        if report.step == self.step:
            raise KeyError("the plug was pulled")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["sft", "lora_sft"])
def test_a_run_that_draws_goes_on_to_the_same_bits(algorithm, tiny_model_folder, chat_file, tmp_path: Path):
    asked: dict[str, Any] = {
        "algorithm": algorithm, "backend": "jax", "loss": {"neftune_noise_alpha": 5},
        "training": {"steps": 6}, "checkpoint": {"interval": 1},
    }  # fmt: skip
    if algorithm == "lora_sft":
        asked |= {"lora": {"r": 4, "dropout": 0.2, "target_modules": ["q_proj", "down_proj"]}, "optimizer": {"lr": 0.1}}
    unbroken = train(tiny_model_folder, chat_file, tmp_path / "unbroken", **asked)
    with pytest.raises(TrainingError, match="the plug was pulled"):
        train(tiny_model_folder, chat_file, tmp_path / "run", [StopAt(4)], **asked)
    resumed = train(tiny_model_folder, chat_file, tmp_path / "run", **asked)
    losses = [[row["loss"] for row in one.history] for one in (unbroken, resumed)]
    assert losses[0] == losses[1]
    one, other = (load_file(next(each.model_path.glob("*.safetensors"))) for each in (unbroken, resumed))
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)
    apart = train(tiny_model_folder, chat_file, tmp_path / "apart", **asked, data={"packing": False})
    # The same numbers for each sample however it is packed: only the order of float32 sums differs.
    assert [row["loss"] for row in apart.history] == pytest.approx(losses[0], abs=1e-5)
    if algorithm == "lora_sft":
        config = json.loads((resumed.model_path / "adapter_config.json").read_text())
        assert config["lora_dropout"] == 0.2
        quiet = {**asked, "lora": {**asked["lora"], "dropout": 0.0}}
        without = train(tiny_model_folder, chat_file, tmp_path / "without", **quiet)
        assert max(abs(np.array([row["loss"] for row in without.history]) - losses[0])) > 1e-3
