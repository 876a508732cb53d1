"""What is found out about symbols from two dimensions that have to be equal."""

from __future__ import annotations

from typing import Any

import pytest

from llmc.graph import Dim, same_dim
from llmc.ops.context import bind
from llmc.ops.equal_dims import quotient, sizes_where_equal, solve
from llmc.tvm_shim import Analyzer, tirx

h, n, s, t = (tirx.Var(name, "int64") for name in "hnst")


def found(a: Dim, b: Dim, least: int = 0, most: int | None = None) -> tuple[str, int, int] | None:
    analyzer = Analyzer()
    for var in (h, n, s, t):
        bind(analyzer, var, (least, most))
    result = sizes_where_equal(analyzer, a, b)
    return None if result is None else (result[0].name, *result[1:])


@pytest.mark.parametrize(
    ("a", "b", "solution"),
    [
        (s + n, t + n, ("s", "t")),
        (n, s + t, ("n", "s + t")),
        (s * 2 + t, s * 2 + 5, ("t", "5")),
        (s * 2, t * 2 + 1, None),
        (h // 2, n // 2, None),
        (s * n, t * n, None),
    ],
)
def test_one_symbol_in_terms_of_others(a: Any, b: Any, solution: tuple[str, str] | None) -> None:
    solved = solve(a, b)
    text = None if solved is None else (solved[0].name, str(solved[1]).replace("T.int64(5)", "5"))
    if solution is not None and text is not None and text[0] != solution[0]:
        text = (text[1], text[0])  # the same, said the other way round
    assert text == solution


@pytest.mark.parametrize(
    ("a", "b", "sizes"),
    [
        ((h - 33) // 48 + 1, 1, ("h", 33, 80)),
        (1, (h - 192) // 512 + 1, ("h", 192, 703)),
        (n * ((h - 33) // 48 + 1) * 120, n * 120, ("h", 33, 80)),
        (h // 2, 3, ("h", 6, 7)),
        (h * 3, 6, ("h", 2, 2)),
        (h * 3, 7, None),
        (h + n, 4, None),
        (7 - h, 3, None),
    ],
)
def test_sizes_of_one_symbol(a: Any, b: Any, sizes: tuple[str, int, int] | None) -> None:
    assert found(a, b) == sizes


def test_ranges_that_are_known_bound_what_is_found() -> None:
    assert found(h // 8, 2, least=18, most=100) == ("h", 18, 23)
    assert found(h // 8, 2, least=30, most=100) is None
    assert found(h // 8, 2, least=17, most=20) is None, "nothing new"


@pytest.mark.parametrize(
    ("over", "under", "result"),
    [
        ([n, 4, s + t, 8], [s + t, 8], n * 4),
        ([n, s, 16], [n, s, 4, 4], 1),
        ([n * s, 6], [s, 2], n * 3),
        ([n, 12], [8], n * 3 // 2),
        ([n, 0], [4], 0),
    ],
)
def test_quotients_cancel_factors(over: list[Any], under: list[Any], result: Any) -> None:
    assert same_dim(quotient(over, under), result)
