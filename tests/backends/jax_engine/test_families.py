"""Every family says what transformers says, packed, and has its gradients; what is saved is what was read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.backends.jax_engine.tiny import forward, random_pack, read, saved
from tests.backends.torch_engine.tiny_models import tiny_config
from training_hub.backends.jax_engine import rope, weights
from training_hub.backends.jax_engine.batches import Sizes, side_by_side
from training_hub.backends.jax_engine.objective import PLAIN, term, term_of_whole
from training_hub.backends.jax_engine.shapes import config_problems
from training_hub.backends.jax_engine.table import leaves, of_layer, tensors

LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

MODELS = {
    "llama": ("llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1}),
    "llama-tied": ("llama-tied", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"rope_parameters": LINEAR, "num_hidden_layers": 1}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"num_hidden_layers": 1}),
    "gemma": ("gemma", {"num_hidden_layers": 1}),
    "gpt2": ("gpt2", {"n_layer": 1}),
    "mixtral": ("mixtral", {"num_hidden_layers": 1}),
    "qwen3-moe": ("qwen3-moe", {"decoder_sparse_step": 2}),
}


def theirs(model, pack) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits of each document alone, laid end to end, and the gradients of the weighted sum of losses."""
    rows, total = [], torch.zeros(())
    for start, end in zip(pack.boundaries, pack.boundaries[1:], strict=False):
        ids = torch.from_numpy(pack.ids[start:end]).long()
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        total = total + (losses * torch.from_numpy(pack.weights[start + 1 : end])).sum()
        rows.append(logits.detach().numpy())
    total.backward()
    return np.concatenate(rows), {name: weight.grad.numpy() for name, weight in model.named_parameters()}


def as_theirs(gradients, shape, model) -> dict[str, np.ndarray]:
    """Gradients under the names that the weights have in transformers' memory, where experts are fused."""
    found = {}
    own = dict(model.named_parameters())
    for key, leaf in leaves(shape):
        name = key.replace("block_sparse_moe", "mlp")
        if not leaf.is_of_experts:
            found[name] = gradients[key]
    for layer in range(shape.layers):
        place = f"model.layers.{layer}.mlp.experts."
        if place + "gate_up_proj" in own:
            gate, up, down = (gradients[leaf.key(layer)] for name, leaf in _experts(shape, layer))
            found[place + "gate_up_proj"], found[place + "down_proj"] = np.concatenate([gate, up], axis=1), down
    return found


def _experts(shape, layer):
    return [(name, leaf) for name, leaf in of_layer(shape, layer).items() if leaf.is_of_experts]


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_transformers(name, tmp_path):
    """1e-5 of the largest logit or gradient, in float32: what another order of sums makes is 2e-6 here."""
    family, changes = MODELS[name]
    model, pack = saved(family, tmp_path, **changes), random_pack()
    assert not config_problems(model.config, str(tmp_path))
    shape, loaded = read(tmp_path)
    made = forward(shape)
    batch = side_by_side([pack], Sizes.of(256))

    def measured(params):
        logits = made.logits(params, batch.ids, batch.positions, batch.segments)
        at_rows = jnp.take_along_axis(logits, batch.rows[:, :, None], axis=1)
        return jnp.sum(PLAIN.losses(at_rows, batch.targets) * batch.weights), logits

    params = {key: jnp.asarray(weight) for key, weight in loaded.weights.items()}
    (_, logits), gradients = jax.jit(jax.value_and_grad(measured, has_aux=True))(params)
    wanted, slopes = theirs(model, pack)
    assert np.abs(np.asarray(logits)[0, : len(pack)] - wanted).max() <= 1e-5 * np.abs(wanted).max()
    ours = as_theirs({key: np.asarray(one) for key, one in gradients.items()}, shape, model)
    assert ours.keys() == slopes.keys()
    for key, slope in slopes.items():
        assert np.abs(ours[key] - slope).max() <= 1e-5 * max(np.abs(each).max() for each in slopes.values()), key


@pytest.mark.slow
def test_chunks_of_the_loss_and_forgetful_scanned_layers_change_nothing(tmp_path):
    """Against the logits of every position: the same sums in another order, 1e-6 relative."""
    saved("qwen3", tmp_path)
    shape, loaded = read(tmp_path)
    params = {key: jnp.asarray(weight) for key, weight in loaded.weights.items()}
    batch = side_by_side([random_pack((90,) * 5)], Sizes.of(512))
    assert batch.chunks == 2

    plain, other = forward(shape), forward(shape, forget="full", is_scanned=True)
    wanted, slopes = jax.jit(jax.value_and_grad(lambda params: term_of_whole(plain, PLAIN, params, batch)))(params)
    found, ours = jax.jit(jax.value_and_grad(lambda params: term(other, PLAIN, params, batch)[0]))(params)
    assert abs(found - wanted) <= 1e-6 * wanted
    for key, slope in slopes.items():
        assert jnp.abs(ours[key] - slope).max() <= 1e-5 * max(jnp.abs(each).max() for each in slopes.values()), key


@pytest.mark.parametrize("parameters", [LLAMA3, YARN, LINEAR, {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}])
def test_scaled_positions_have_the_frequencies_of_transformers(parameters):
    config = tiny_config("llama", rope_parameters=parameters, head_dim=16)
    wanted, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)
    found, ours = rope.frequencies(config.rope_parameters, 16, config.max_position_embeddings)
    assert np.allclose(found, wanted.numpy(), rtol=1e-6, atol=0) and ours == pytest.approx(factor)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral", "qwen3-moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_saved_is_byte_for_byte_what_was_read(name, dtype, tmp_path):
    family, changes = MODELS[name]
    saved(family, tmp_path / "before", dtype, **changes)
    shape, loaded = read(tmp_path / "before")
    (tmp_path / "after").mkdir()
    weights.save(weights.named(loaded.weights, loaded.formats, shape), tmp_path / "after")
    before, after = dict(weights.read_all(tmp_path / "before")), dict(weights.read_all(tmp_path / "after"))
    assert before.keys() == after.keys() and not loaded.notes
    assert all(before[key].dtype == after[key].dtype for key in before)
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    assert sum(len(tensors(key, leaf, shape)) for key, leaf in leaves(shape)) == len(before)


def test_shards_are_read_and_written_with_an_index(tmp_path, monkeypatch):
    model = saved("llama", tmp_path / "before")
    model.save_pretrained(tmp_path / "before", max_shard_size="20KB")
    (tmp_path / "before" / "model.safetensors").unlink(missing_ok=True)
    shape, loaded = read(tmp_path / "before")
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    (tmp_path / "after").mkdir()
    weights.save(weights.named(loaded.weights, loaded.formats, shape), tmp_path / "after")
    weights.copy_configs(tmp_path / "before", tmp_path / "after", None)
    assert len(list((tmp_path / "after").glob("model-*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "after").state_dict()
    assert all(torch.equal(again[key], weight) for key, weight in model.state_dict().items())


def test_a_head_that_is_tied_is_not_saved_twice(tmp_path):
    saved("llama-tied", tmp_path)
    shape, _ = read(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert sorted(file.keys()) == sorted(key for key, _ in leaves(shape))
    assert "lm_head.weight" not in dict(leaves(shape))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"router_jitter_noise": 0.1}, "config.router_jitter_noise"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
    ],
)
def test_what_a_config_asks_for_and_is_not_here_is_refused_in_words(changes, named):
    (problem,) = config_problems(tiny_config("llama", **changes), "model")
    assert named in problem and "backend: torch" in problem


def test_a_family_that_is_not_here_is_refused_with_those_that_are():
    (problem,) = config_problems(tiny_config("phi3"), "model")
    assert "'phi3'" in problem and "qwen3_moe" in problem and "backend: torch" in problem
