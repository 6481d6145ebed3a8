"""Addresses in data and settings are refused or are text: nobody is asked for anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

URLS = (
    *("http://169.254.169.254/latest/meta-data/", "http://2852039166/", "http://[::ffff:169.254.169.254]/x.jsonl"),
    *("http://0251.0376.0251.0376/", "http://user@169.254.169.254/rows.jsonl", "https://example.com/rows.jsonl"),
    *("http://localhost:8080/rows.jsonl", "http://127.0.0.1/rows.jsonl", "ftp://example.com/rows.jsonl"),
    *("file:///etc/passwd", "file://localhost/etc/passwd", "FILE:///etc/passwd", "HTTPS://EXAMPLE.COM/rows.jsonl"),
    *("s3://bucket/rows.jsonl", "gs://bucket/rows.jsonl", "hf://datasets/someone/rows.jsonl", "gopher://127.0.0.1/x"),
    *("//example.com/share/rows.jsonl", "\\\\example.com\\share\\rows.jsonl", "data:application/json,[]"),
    *(
        "http:169.254.169.254",
        "zip://rows.jsonl::http://example.com/a.zip",
        "simplecache::https://example.com/rows.jsonl",
    ),
)
SETTINGS = ("data.path", "data.validation", "data.chat_template", "model.path", "model.tokenizer")


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_address_in_a_setting_is_refused_without_a_request(setting: str, watched: Any, words: Any, call: Any):
    for url in URLS if setting == "data.path" else URLS[SETTINGS.index(setting) :: 4]:
        with watched() as record:
            said = call(*words(f"{setting}={url}"))
        assert said.code in (2, 3), (url, said.text)
        assert record.network == [], url
        assert record.programs == [], url


@pytest.mark.parametrize("kind", ["image_url", "image", "audio_url", "input_audio", "video", "file"])
def test_an_address_in_a_part_of_a_message_is_refused_without_a_request(
    kind: str, tmp_path: Path, watched: Any, words: Any, call: Any
):
    file = tmp_path / "rows.jsonl"
    for url in URLS[:3]:
        content = [{"type": "text", "text": "See."}, {"type": kind, kind: {"url": url}}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]
        file.write_text(json.dumps({"messages": messages}) + "\n")
        with watched() as record:
            said = call(*words(data=file))
        assert said.code == 3, (url, said.text)
        assert "rows.jsonl line 1" in said.text
        assert record.network == []


def test_an_address_in_a_text_is_text(tmp_path: Path, watched: Any, words: Any, call: Any):
    rows = [{"prompt": f"Read {url}", "completion": url} for url in URLS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with watched() as record:
        assert call(*words(data=tmp_path / "rows.jsonl")).code == 0
    assert record.network == []
