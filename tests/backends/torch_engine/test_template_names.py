"""A tokenizer whose chat templates are called by paths writes nothing outside the folder it is saved in."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tests.data.tiny import CHATML, hf_tokenizer
from training_hub.backends.shared.final_folder import save_tokenizer

NAMES = (
    "../../x", "../x", "..", ".", "a/../../x", "..\\x", "/{outside}/x", "{outside}/x", "//x", "x\0y", "\0", "x" * 300,
    "additional_chat_templates/../../../x", "~/x", "x\n../../y", "",
)  # fmt: skip


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", NAMES, ids=repr)
@pytest.mark.parametrize("used", [CHATML, None], ids=["template used", "no template used"])
def test_no_name_of_a_chat_template_leads_out_of_the_folder(tmp_path, name, used):
    outside, inside = tmp_path / "outside", tmp_path / "outside" / "deep" / "model"
    inside.mkdir(parents=True)
    tokenizer = hf_tokenizer(template={"default": CHATML, name.replace("{outside}", str(outside)): "evil"})
    before = files(tmp_path)
    # transformers refuses some of these names where it would write a file for each template: that is well, too.
    with contextlib.nullcontext() if used is not None else contextlib.suppress(ValueError, OSError):
        save_tokenizer(tokenizer, used, inside)
    written = files(tmp_path) - before
    assert all(path.is_relative_to(inside) for path in written), written
    if used is not None:
        assert not any("evil" in path.read_text(encoding="utf-8") for path in written)
        assert (inside / "chat_template.jinja").read_text(encoding="utf-8") == CHATML
