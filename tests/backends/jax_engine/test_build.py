"""What a run builds: layers that forget take less memory, and programs that were compiled are found again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from tests.backends.jax_engine.tiny import forward, random_pack, read, saved
from training_hub.backends.jax_engine.batches import Sizes, side_by_side
from training_hub.backends.jax_engine.build import Machine
from training_hub.backends.jax_engine.forward import FORGET

ROOT = Path(__file__).resolve().parents[3]


def test_what_layers_forget_takes_no_memory(tmp_path):
    """As XLA plans it: all kept, the results of products and attention kept, inputs of layers alone kept."""
    saved("llama", tmp_path, num_hidden_layers=4, intermediate_size=256)
    shape, loaded = read(tmp_path)
    batch = side_by_side([random_pack((240, 250))], Sizes.of(512))
    planned = {}
    for how in FORGET:
        one = forward(shape, forget=how, is_scanned=True)

        def total(params, one=one):
            return jnp.sum(jnp.square(one.hidden(params, batch.ids, batch.positions, batch.segments)))

        program = jax.jit(jax.grad(total)).lower(loaded.weights).compile()
        planned[how] = program.memory_analysis().temp_size_in_bytes
    assert Machine("cpu", "float32").is_scanned("full")  # laid out, XLA would keep all of it on a CPU
    assert planned["full"] < 0.8 * planned["selective"] < 0.8 * 0.8 * planned["none"], planned


COMPILE = """
import sys, jax
import jax.numpy as jnp
from training_hub.backends.jax_engine.build import keep_programs
from training_hub.recipe import Recipe

events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rpartition("/")[2]))
data = {"path": "rows.jsonl", "cache_dir": sys.argv[1]}
keep_programs(Recipe.model_validate({"data": data, "model": {"path": "model"}, "output": "out"}))
jax.jit(lambda x: jnp.tanh(x @ x))(jnp.ones((32, 32))).block_until_ready()
print(events.count("cache_hits"), events.count("cache_misses"))
"""


def test_a_second_process_finds_the_programs_of_the_first(tmp_path):
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")},
        "PYTHONPATH": str(ROOT),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # this one is compiled in less than a second
    }
    said = []
    for _ in range(2):
        words = [sys.executable, "-c", COMPILE, str(tmp_path)]
        said.append(subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.split())
    assert int(said[0][0]) == 0 < int(said[0][1])
    assert said[1] == [said[0][1], "0"]
    assert any((tmp_path / "jax").iterdir())
