"""Rows of a batch that differ in length give what sessions of their own give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmc.errors import InputError
from llmc.runtime import Model, load
from llmc.runtime import session as session_module
from tests.runtime import toys


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(toys.write_decoder(tmp_path_factory.mktemp("decoder") / "m.llmc"))


def tokens(counts: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, toys.V, count) for count in counts]


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * max(1, np.abs(expected).max(initial=0)))


def logits(ids: np.ndarray) -> np.ndarray:
    return toys.decoder_reference(ids[None])[0]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(*[st.sampled_from((0, 0, 1, 2, 5, 8, 9, 70))] * 3), min_size=1, max_size=6), st.booleans())
def test_rows_of_any_lengths(model: Model, pieces: list[tuple[int, ...]], all: bool) -> None:
    session, texts = model.session(3), [np.zeros(0, np.int64)] * 3
    for i, counts in enumerate(pieces):
        if not any(counts):
            continue
        parts = tokens(list(counts), seed=i)
        texts = [np.concatenate(pair) for pair in zip(texts, parts, strict=True)]
        found = session.append(parts, all=all)
        assert session.lengths == tuple(map(len, texts)) and session.length == max(map(len, texts))
        for row, text, count in zip(found, texts, counts, strict=True):
            if all:
                close(row, logits(text)[len(text) - count :] if count else np.zeros((0, toys.V)))
            elif count:
                close(row, logits(text)[-1])
            else:
                assert np.isnan(row).all()


def test_rows_are_dropped_and_refilled(model: Model) -> None:
    first, second, third = tokens([100, 70, 4])
    session = model.session(2)
    session.append([first, second])
    session.truncate([0, 65])
    assert session.lengths == (0, 65)
    found = session.append([third, second[65:]])
    close(found[0], logits(third)[-1])
    close(found[1], logits(second)[-1])
    session.truncate(3)
    assert session.lengths == (3, 3)


def test_forks_of_chosen_rows(model: Model) -> None:
    first, second, more = tokens([70, 9, 3])
    session = model.session(2)
    session.append([first, second])
    twin = session.fork([1, 0, 1])
    assert twin.lengths == (9, 70, 9)
    found = twin.append([more, more, []])
    close(found[0], logits(np.concatenate([second, more]))[-1])
    close(found[1], logits(np.concatenate([first, more]))[-1])
    assert session.lengths == (70, 9)
    close(session.append([[], more])[1], logits(np.concatenate([second, more]))[-1])
    for wrong in ([], [2], [-1, 0]):
        with pytest.raises(InputError, match="there are rows 0 to 1"):
            session.fork(wrong)


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([[1], [2], [3, 4]], "of 3 rows"),
        ([[1], []] * 2, "of 4 rows"),
        ([[], []], "have shape"),
        ([[1, 2], [1.5]], "row 1: ids have dtype float64"),
        ([[1, 2], [toys.V]], "vocabulary has 50"),
        ([[1, 2], [[1], [2, 3]]], "row 1: ids are no list of numbers"),
        ([[1, 2], 3], "row 1: ids are no list of numbers"),
        ([[1] * toys.MAX_LENGTH, []], "row 0: 2 tokens and 3000 more"),
    ],
)
def test_wrong_rows_change_nothing(model: Model, ids: Any, says: str) -> None:
    session = model.session(2)
    session.append([[7, 8], [9]])
    with pytest.raises(InputError, match=says):
        session.append(ids)
    assert session.lengths == (2, 1)
    close(session.append([[], [4]])[1], logits(np.array([9, 4]))[-1])


def test_wrong_lengths(model: Model) -> None:
    session = model.session(2)
    session.append([[7, 8], [9]])
    for wrong in (2, [2, 2], [1], [1, 1, 1], [-1, 0], [0.5, 1]):
        with pytest.raises(InputError, match=r"cannot truncate \[2 1\] tokens"):
            session.truncate(wrong)  # type: ignore[arg-type]
    assert session.lengths == (2, 1)


def test_an_interrupted_call_is_forgotten(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "CHUNK", 4)
    session = model.session(2)
    session.append([[7], [8, 9]])
    step, calls = session._step, []

    def interrupted(*arguments: Any) -> np.ndarray:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(session, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.append(tokens([2, 20]))
    assert session.lengths == (1, 2)


def test_a_round_of_few_tokens_is_one_call_for_each_number(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are read once for all rows that have the same number of tokens."""
    session = model.session(4)
    step, shapes = session._step, []

    def counted(function: Any, rows: slice, ids: np.ndarray, reading: Any, outcome: Any) -> np.ndarray:
        shapes.append(ids.shape)
        return step(function, rows, ids, reading, outcome)

    monkeypatch.setattr(session, "_step", counted)
    session.append(tokens([1, 0, 1, 1]))
    session.append(tokens([1, 40, 3, 1]))
    assert shapes == [(4, 1), (4, 1), (4, 3), (1, 40)]
