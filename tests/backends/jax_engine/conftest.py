"""The tests of the jax engine need JAX, and share compiled programs: most of their time is compiling."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

# test_presence.py says in words why the others are not there.
OTHERS = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name != "test_presence.py"]
collect_ignore = [] if find_spec("jax") and find_spec("optax") else OTHERS


@pytest.fixture(scope="session", autouse=True)
def programs(tmp_path_factory):
    """A folder for compiled programs, so that the same model is compiled once in a session."""
    if not find_spec("jax"):
        yield
        return
    import jax

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(tmp_path_factory.mktemp("programs")))
    jax.config.update(names[1], 0.2)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
