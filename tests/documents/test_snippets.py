"""The machinery that runs the pages, on a page of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.documents.snippets import blocks, run_page, shell_lines

PAGE = """
Text with `code` in it.

```python
from pathlib import Path
Path("made.txt").write_text(NAME.upper())
```

```yaml
# run.yaml
model: {path: path/to/model}
```

<!-- not run: it needs a second machine -->
```python
raise SystemExit("never")
```

```bash
git clone somewhere   # only parsed
python -c "import pathlib; print(pathlib.Path('made.txt').read_text())" \\
    extra
```
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def test_blocks_are_found_with_their_language_and_line(page: Path):
    assert [(block.language, block.line, block.is_run) for block in blocks(page)] == [
        ("python", 4, True),
        ("yaml", 9, True),
        ("python", 15, False),
        ("bash", 19, True),
    ]


def test_a_page_is_run_in_order_with_its_names_replaced(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    ran = run_page(page, {"NAME": "'stone'", "path/to/model": "/models/tiny"}, tmp_path)
    assert (tmp_path / "made.txt").read_text() == "STONE"
    assert (tmp_path / "run.yaml").read_text() == "# run.yaml\nmodel: {path: /models/tiny}\n"
    assert len(ran) == 3


def test_a_failing_command_fails_the_page(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text('```bash\npython -c "raise SystemExit(3)"\n```\n')
    with pytest.raises(AssertionError, match="ended with 3"):
        run_page(page, {}, tmp_path)


def test_shell_lines_are_joined_and_cleaned():
    text = "# a comment\n$ training-hub sft \\\n    --model m\n\nls\n"
    assert shell_lines(text) == ["training-hub sft --model m", "ls"]
