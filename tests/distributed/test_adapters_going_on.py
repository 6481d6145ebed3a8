"""A run goes on with an adapter of a folder beside a base that no process holds: as beside a whole one.

Plain SGD at a small rate, for the reasons that test_pipeline.py gives; 1e-5 as for all that is split.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.backends.torch_engine.lora.learned import learned_adapter
from tests.distributed.test_adapters_in_slices import HEADS, LORA, PROVEN, SIXTEEN, SLICES, STAGES, settings_of
from tests.distributed.test_pipeline import SGD
from tests.distributed.test_pipeline_adapters import same_adapter
from tests.distributed.test_split_models import same_steps
from tests.invariants.run import recipe, train

HEAD = {"modules_to_save": ["lm_head"]}
PART, COPY, BOTH = {**LORA, "tuner": "pissa"}, {**LORA, **HEAD}, {**LORA, **HEAD, "tuner": "pissa"}
ROWS = {**LORA, "trainable_tokens": [43, 86]}
TABLE = {**LORA, "modules_to_save": ["embed_tokens"], "options": {"ensure_weight_tying": True}}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "whole modules": ("llama", SLICES, COPY, SIXTEEN),
    "whole modules, a table that is also the head": (
        "llama-tied",
        SLICES,
        TABLE,
        SIXTEEN,
    ),
    "a part of the weights, split by heads": ("llama", HEADS, PART, {}),
    "an adapter of loha, in stages": ("llama", STAGES, {"tuner": "loha", "r": 4}, {}),
    "rows of a table, split by heads": ("llama", HEADS, ROWS, {}),
    "rows of a table, in stages": ("llama", STAGES, ROWS, {}),
    "whole modules, in stages": ("llama", STAGES, {**LORA, "modules_to_save": ["embed_tokens", "lm_head"]}, {}),
    "whole layers": ("llama", SLICES, {**LORA, "modules_to_save": ["layers.0.mlp"]}, {}),
    "a part of the weights": ("llama", SLICES, PART, {}),
    "a part of the weights, in 16 bits, in stages": ("llama", STAGES, {**LORA, "tuner": "olora"}, SIXTEEN),
    "both": ("llama", SLICES, BOTH, SIXTEEN),
    "both, in stages": ("llama", STAGES, BOTH, {}),
    "lengths of rows": ("llama", SLICES, {**LORA, "tuner": "dora"}, SIXTEEN),
    "rows of a table": ("llama", SLICES, ROWS, {}),
    "norms": ("llama", SLICES, {"tuner": "ln_tuning"}, SIXTEEN),
    "norms, in stages": ("llama", STAGES, {"tuner": "ln_tuning"}, {}),
    **{
        f"an adapter of {tuner}": ("llama", SLICES, {"tuner": tuner, "r": 4}, {})
        for tuner in ("deft", "delora", "psoft", "supertuning", "tinylora", "unilora", "vera")
    },
}
QUICK = ("both", "norms, in stages")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in CASES]
)
def test_an_adapter_goes_on_as_beside_a_whole_base(case, two, folders, chat_file, tmp_path):
    """Bit for bit; and how far that is from the base, in a digit, is found in pieces as well."""
    family, parallelism, lora, sections = CASES[case]
    model = folders(family, num_hidden_layers=4)
    kept = learned_adapter(model, tmp_path / "learned", lora)
    settings = settings_of(parallelism, {**sections, "lora": {"adapter": str(kept)}})
    asked = recipe(model, chat_file, tmp_path / "run", **settings)
    for each in two.call("tests.distributed.measuring:adapter_begun", asked.model_dump(mode="json")):
        assert each["read"] == "slices"
        assert each["unlike"] == [] and each["trained"] > 0
        found, wanted = each["differences"]
        assert found == pytest.approx(wanted, rel=0.11, abs=1e-3) and wanted > 1e-3


LEARNING: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "both": ("llama", SLICES, BOTH),
    "both, in stages": ("llama", STAGES, BOTH),
    "whole modules, a table that is also the head": ("llama-tied", SLICES, TABLE),
    "a part of the weights": ("llama", SLICES, PART),
    "a part of the weights, split by heads": ("llama", HEADS, PART),
    "norms": ("llama", SLICES, {"tuner": "ln_tuning"}),
    "lengths of rows": ("llama", SLICES, {**LORA, "tuner": "dora"}),
    "rows of a table": ("llama", SLICES, ROWS),
    "rows of a table that is also the head, in stages": ("llama-tied", STAGES, ROWS),
    "an adapter of psoft": ("llama", SLICES, {"tuner": "psoft", "r": 4}),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case == "both" else [pytest.mark.slow]) for case in LEARNING]
)
def test_it_learns_what_it_does_beside_a_whole_base(case, two, folders, uneven_file, tmp_path):
    """From its first step to the final adapter, which is read back and compared, and proven before the first step."""
    family, parallelism, lora = LEARNING[case]
    model = folders(family)
    kept = learned_adapter(model, tmp_path / "learned", lora)
    settings = settings_of(parallelism, {"lora": {"adapter": str(kept)}, "training": PROVEN, "optimizer": SGD})
    together = two.train(model, uneven_file, tmp_path / "together", **settings)
    alone = train(model, uneven_file, tmp_path / "alone", **{**settings, "parallelism": {}})
    same_steps(alone, together)
    same_adapter(alone, together)
