"""The page: well formed, complete in itself, the same for the same data, and true to the figures in it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from llmc.errors import LlmcError
from llmc.profile import Ceilings, Operator, Profile
from llmc.report import Report, figures, page
from llmc.report.profiles import Profiles, TaskProfile
from llmc.tune.held_out import HeldOut, Quality
from llmc.tune.record import Key, Record
from llmc.tune.report import TaskReport, task_reports
from tests.tune.records import measured, task

CEILINGS = Ceilings({"fma": 1e11, "dot": 4e11}, 1e10)
SVG = "{http://www.w3.org/2000/svg}"


def tasks() -> tuple[TaskReport, ...]:
    found = [measured(r, verified=False, MR=i) for i, r in enumerate((1.2, 0.95, 2.5))]
    found += [measured(0, "crash", verified=False, MR=7), measured(0.94, MR=1)]
    return task_reports(Record(Key.of(task(N)), m) for N in (96, 64) for m in found)


def profile(factor: float) -> Profile:
    dense = Operator("dense_0", {"N": 96, "K": 64, "bias": False}, 3, factor * 2e-3, 3e7, 1e6, 0.15)
    copy = Operator("transpose", {}, 1, factor * 1e-3, 0, 1e5, 0.01)
    return Profile(factor * 4e-3, (dense, copy), 2e-4, 1e-4)


def full(before: bool = True) -> Report:
    held = [
        HeldOut("dense", f"DenseLinearWorkload(K=64,N={n})", "x86-avx2", (0.1, 0.3), (0.2, 0.5), t)
        for n, t in ((64, 1.0), (96, None))
    ]
    pair = TaskProfile(profile(1), profile(1.25) if before else None)
    profiles = Profiles("new.llmc", "old.llmc" if before else None, CEILINGS, {"prefill 128": pair, "decode 1": pair})
    return Report("0.1", "a <b> & c.db", 10, tasks(), Quality("ranking", tuple(held)), profiles)


EMPTY = Report("0.1", "t.db", 0, (), None, None)
REPORTS = {"full": full(), "alone": full(before=False), "empty": EMPTY}


class Reader(HTMLParser):
    """Collects text by element, the rows of tables, and whatever would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = {"src", "href", "xlink:href", "data", "action", "srcset"}
        self.fetched += [v for k, v in attributes if k in names and v and not v.startswith("#")]
        self.fetched += [tag] * (tag in ("script", "link", "iframe", "img", "object"))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag in ("table", "figure"):
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] = " ".join(f"{self.rows[-1][-1]} {data}".split())


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_it_needs_nothing_else(report: Report) -> None:
    text = page.render(report)
    assert Reader(text).fetched == []
    assert not re.search(r"@import|url\((?!#)", text)
    assert text == page.render(report), "the same data give the same page"
    ids = re.findall(r' id="([^"]+)"', text)
    assert set(re.findall(r"#(m[0-9a-f]{10}|p[0-9a-f]{10})\b", text)) <= set(ids)
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(svg)


def test_names_are_no_markup() -> None:
    assert "a &lt;b&gt; &amp; c.db, 10 records of 2 tasks" in page.render(full())


def test_kernels_are_listed() -> None:
    rows = Reader(page.render(full())).rows
    first = next(row for row in rows if row and row[0].startswith("dense") and "MR 1" in " ".join(row))
    assert first[0] == "dense K 64, N 64, dtype float32"
    assert first[1:3] == ["0.940", "1.0 %"] and first[4:6] == ["4", "1 crash"]


def test_before_and_after() -> None:
    rows = [row for row in Reader(page.render(full())).rows if len(row) == 11]
    assert rows[0][4:] == ["ms", "share", "of roofline", "ms", "share", "of roofline", "ratio"]
    dense = ["1", "dense_0", "N 96, K 64", "3", "2.500", "50.0 %", "15 %", "2.000", "50.0 %", "15 %", "0.80"]
    assert rows[1] == dense
    assert [row[1] for row in rows[2:7]] == ["transpose", "virtual machine", "Python", "waits", "in all"]
    alone = [row for row in Reader(page.render(full(before=False))).rows if row and row[:2] == ["1", "dense_0"]]
    assert alone[0] == [*dense[:4], *dense[7:10]]


def test_what_is_missing_is_said() -> None:
    text = page.render(EMPTY)
    assert "holds no records" in text and "Fewer than two tasks" in text and "roofline" not in text


def test_a_page_is_whole_or_not_there(tmp_path: Path) -> None:
    page.write(EMPTY, tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text() == page.render(EMPTY)
    assert list(tmp_path.iterdir()) == [tmp_path / "r.html"]
    with pytest.raises(LlmcError, match="choose a folder"):
        page.write(EMPTY, tmp_path / "absent" / "r.html")


# -- figures ------------------------------------------------------------------------------------------------------
def marks(svg: str, color: str) -> int:
    """How many markers of one colour a figure has."""
    groups = ElementTree.fromstring(svg).iter(f"{SVG}use")
    return sum(color in use.get("style", "") for use in groups)


def test_a_curve_marks_failures_and_candidates() -> None:
    svg = figures.tuning_curve(tasks()[0])
    assert marks(svg, figures.RED) == 1
    assert marks(svg, figures.FAINT) == 3
    assert figures.GREEN in svg
    untuned = task_reports([Record(Key.of(task()), measured(1.2, verified=False))])[0]
    assert figures.GREEN not in figures.tuning_curve(untuned)


def test_a_roofline_names_its_ceilings() -> None:
    svg = figures.roofline(TaskProfile(profile(1), profile(1.25)), CEILINGS)
    words = [t.text for t in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert {"fma 100 Gop/s", "dot 400 Gop/s", "reads 10 GB/s", "dense", "1"} <= set(words)
    assert "transpose" not in words, "what computes nothing has no place"


def test_a_model_that_computes_nothing_has_ceilings_all_the_same() -> None:
    copies = Profile(1e-3, (Operator("transpose", {}, 1, 1e-3, 0, 1e5, 0.01),), 0, 0)
    assert "dot 400 Gop/s" in figures.roofline(TaskProfile(copies), CEILINGS)
