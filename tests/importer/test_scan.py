"""Limits are where they are said to be: what lies just within them is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmc.errors import ModelError
from llmc.importer import scan
from llmc.importer.scan import check_file
from tests.security import seeds
from tests.security.wire import ATTRIBUTE, INITIALIZER, NODE, field, model, nested, number


@pytest.mark.parametrize("name", seeds.models())
def test_real_files_pass(name: str) -> None:
    check_file(seeds.models()[name])


def passes_up_to(content: dict[int, bytes], limit: int, says: str) -> None:
    """Of contents by their size, those within the limit pass, the others are refused."""
    assert min(content) <= limit < max(content)
    for size, file in content.items():
        if size <= limit:
            check_file(file)
        else:
            with pytest.raises(ModelError, match=says):
                check_file(file)


def test_subgraphs() -> None:
    deep = {n: model(nested([NODE, ATTRIBUTE, 6], n)) for n in (29, 30, 31)}
    passes_up_to(deep, scan.MAX_SUBGRAPHS, "subgraphs nest")


def test_names() -> None:
    named = {n: model(field(NODE, field(3, "é".encode() * n))) for n in (4096, 4097)}
    passes_up_to(named, scan.MAX_NAME, "longer than")


def test_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "MAX_NODES", 10)
    inside = field(NODE, field(ATTRIBUTE, field(6, field(NODE, b"") * 4)))
    passes_up_to({n: model(inside + field(NODE, b"") * (n - 5)) for n in (10, 11)}, 10, "nodes")
    monkeypatch.setattr(scan, "MAX_FIELDS", 40)
    # The model: 2 numbers, 2 messages; the initializer itself; then its dimensions.
    passes_up_to({n: model(field(INITIALIZER, number(1, 1) * (n - 5))) for n in (40, 41)}, 40, "fields")


def test_packed_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "MAX_PACKED", 100)
    packed = {n: model(field(INITIALIZER, field(7, bytes(n // 2)) + field(5, bytes(n - n // 2)))) for n in (100, 101)}
    passes_up_to(packed, 100, "integers outside of raw_data")
    check_file(model(field(INITIALIZER, field(4, bytes(400)) + field(9, bytes(400)))))  # floats and raw data


@pytest.mark.parametrize("name", ["/model/layers.0/MatMul:0", "名前", "a b", "naïve\u00a0name", "🦙"])
def test_unusual_names_are_names(name: str) -> None:
    check_file(model(field(NODE, field(3, name.encode()))))


@pytest.mark.parametrize("name", ["\n", "\x1b[31m", "\x7f", "\u2028", "\u202e", "\0"])
def test_names_that_do_not_fit_into_a_line(name: str) -> None:
    with pytest.raises(ModelError, match="control characters") as caught:
        check_file(model(field(NODE, field(3, b"x" + name.encode()))))
    assert caught.value.what.isprintable()


def test_comments_may_have_lines() -> None:
    check_file(model(field(NODE, field(6, b"File x.py, line 1\n    y = f(x)\n"))))


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    content = seeds.models()["functions"]
    for size in range(1, len(content)):
        try:
            check_file(content[:size])
        except ValueError:
            continue
        # Cut between two fields of the model itself, it is a message still.
        assert content[size] >> 3 in (1, 7, 8, 25)
