from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from training_hub.monitoring.charts import Curve, line_chart, thinned, ticks
from training_hub.monitoring.jsonl import metrics_row
from training_hub.monitoring.report import write_report

VOID = {"meta", "br", "link"}


class Page(HTMLParser):
    """The page's tags, attributes and text; fails on a tag that is closed wrongly."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def history(report, steps=40):
    rows = [
        metrics_row(report(step=step, loss=3 / step, validation_loss=2.0 if step % 20 == 0 else None))
        for step in range(1, steps + 1)
    ]
    return [metrics_row(report(step=0, loss=math.nan, validation_loss=3.0)), *rows]


def test_the_page_has_four_charts_and_the_numbers(tmp_path, report):
    facts = {"status": "finished", "model_path": "out/final", "metrics": {"loss": 0.075}, "settings": {"seed": 42}}
    path = write_report(tmp_path, history(report), facts)
    page = Page(path.read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 4
    for said in ("Loss", "Learning rate", "Tokens per second", "Gradient norm", "out/final", "0.075", "40 steps"):
        assert said in page.text
    assert path.name == "report.html"


def test_the_page_needs_nothing_from_outside_and_runs_nothing(tmp_path, report):
    page = Page(write_report(tmp_path, history(report), {"status": "finished"}).read_text(encoding="utf-8"))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "onload", "onclick"} & {name for name, _ in page.attributes}
    assert "default-src 'none'" in dict(page.attributes)["content"] or any(
        "default-src 'none'" in (value or "") for _, value in page.attributes
    )


def test_text_of_a_run_cannot_become_part_of_the_page(tmp_path, report):
    attack = "</td></table><script>alert(1)</script>\"'><img src=x onerror=alert(1)>\x1b[2J"
    folder = tmp_path / "<b>run&"
    folder.mkdir()
    facts = {attack: attack, "settings": {attack: [attack, {"x": attack}]}, "status": attack}
    page = Page(write_report(folder, history(report), facts).read_text(encoding="utf-8"))
    assert not {"script", "img", "b>run&"} & set(page.tags)
    assert "<script>alert(1)</script>" in page.text and "<b>run&" in page.text
    assert "\x1b" not in page.text


def test_secrets_among_the_settings_are_left_out(tmp_path, report):
    facts = {"settings": {"api_key": "canary-5c1f", "uri": "http://me:canary-5c1f@host"}}
    assert "canary-5c1f" not in write_report(tmp_path, history(report), facts).read_text(encoding="utf-8")


def test_a_run_without_steps_or_with_only_nan_still_has_a_page(tmp_path, report):
    Page(write_report(tmp_path, [], {}).read_text(encoding="utf-8"))
    rows = [metrics_row(report(loss=math.nan, grad_norm=math.inf))]
    text = write_report(tmp_path, rows, {"metrics": {"loss": math.nan}}).read_text(encoding="utf-8")
    assert Page(text).text.count("No values.") == 2


def test_a_long_run_makes_a_small_page(tmp_path, report):
    path = write_report(tmp_path, history(report, steps=20_000), {})
    assert path.stat().st_size < 300_000


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.13, 0.87, [0.2, 0.4, 0.6, 0.8]), (1e-6, 1e-5, [2e-6, 4e-6, 6e-6, 8e-6, 1e-5])],
)
def test_ticks_are_round_numbers_within_the_range(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_thinning_keeps_spikes_gaps_and_order():
    points = [(float(step), 1.0) for step in range(10_000)]
    points[5000], points[7000] = (5000.0, 99.0), (7000.0, math.nan)
    kept = thinned(points, 100)
    assert len(kept) <= 110
    assert (5000.0, 99.0) in kept
    assert any(math.isnan(y) for _, y in kept)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    root = ElementTree.fromstring(svg)
    return [
        [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        for line in root.iter("polyline")
    ]


def test_a_curve_goes_where_its_numbers_are():
    svg = line_chart([Curve("loss", [(0, 1.0), (5, 3.0), (10, 2.0)])], "Loss")
    ((x0, y0), (x1, y1), (x2, y2)) = points_of(svg)[0]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    # The picture's y grows downwards.
    assert (y0 - y1) == pytest.approx(2 * (y2 - y1), abs=0.31)
    box = re.search(r'viewBox="0 0 (\d+) (\d+)"', svg)
    assert all(0 <= x <= int(box[1]) and 0 <= y <= int(box[2]) for x, y in points_of(svg)[0])


def test_a_value_that_is_not_finite_leaves_a_gap():
    svg = line_chart([Curve("loss", [(1, 1.0), (2, 2.0), (3, math.nan), (4, 2.0), (5, 1.0)])], "Loss")
    assert [len(line) for line in points_of(svg)] == [2, 2]


@pytest.mark.parametrize("value", [0.0, 1e-5, 7.0, -3.0, 1e300])
def test_a_single_point_or_a_constant_can_be_drawn(value):
    for points in ([(1, value)], [(1, value), (2, value)]):
        root = ElementTree.fromstring(line_chart([Curve("rate", points)], "Rate"))
        assert len(list(root.iter("circle"))) == len(points)
