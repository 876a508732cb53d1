"""A session gives the logits of a full run, however the tokens arrive."""

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


def tokens(count: int, batch: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, toys.V, (batch, count))


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 90), min_size=1, max_size=5), st.integers(1, 3))
def test_pieces_of_any_length(model: Model, pieces: list[int], batch: int) -> None:
    ids = tokens(sum(pieces), batch)
    expected = toys.decoder_reference(ids)
    session, at = model.session(batch), 0
    for i, piece in enumerate(pieces):
        part = ids[:, at : at + piece]
        at += piece
        if i % 2:
            close(session.append(part, all=True), expected[:, at - piece : at])
        else:
            close(session.append(part), expected[:, at - 1])
        assert session.length == at


def test_shapes_and_types(model: Model) -> None:
    session = model.session()
    assert session.append([1, 2, 3]).shape == (1, toys.V)
    logits = session.append(np.array([[4, 5]], np.int32), all=True)
    assert logits.shape == (1, 2, toys.V) and logits.dtype == np.float32


def test_chunks_and_growth(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "CHUNK", 100)
    ids = tokens(777)
    expected = toys.decoder_reference(ids)
    session = model.session()
    first = session.caches.capacity
    close(session.append(ids[0, :650], all=True), expected[:, :650])
    close(session.append(ids[0, 650:]), expected[:, 776])
    assert session.caches.capacity > first and session.caches.capacity % toys.BLOCK == 0
    assert all(cache.ctypes.data % 64 == 0 for cache in session.caches.arrays)


def test_growth_is_geometric_and_bounded(model: Model) -> None:
    session = model.session()
    capacities = set()
    for _ in range(300):
        session.append(tokens(10)[0])
        capacities.add(session.caches.capacity)
    assert len(capacities) <= 4
    assert session.length == toys.MAX_LENGTH
    assert max(capacities) == -(-toys.MAX_LENGTH // toys.BLOCK) * toys.BLOCK
    with pytest.raises(InputError, match="exceed the model's length of 3000"):
        session.append([1])


def test_reserve_moves_nothing_later(model: Model) -> None:
    session = model.session()
    session.reserve(1500)
    caches = list(session.caches.arrays)
    session.append(tokens(1500)[0])
    assert all(now is before for now, before in zip(session.caches.arrays, caches, strict=True))


def test_truncate_goes_back(model: Model) -> None:
    ids = tokens(150)
    expected = toys.decoder_reference(ids)
    session = model.session()
    session.append(ids)
    for length in (130, 64, 63, 1):
        session.truncate(length)
        close(session.append(ids[:, length : length + 5], all=True), expected[:, length : length + 5])
    session.truncate(0)
    close(session.append(ids), expected[:, -1])
    for wrong in (-1, 151):
        with pytest.raises(InputError, match="truncate"):
            session.truncate(wrong)


def test_reset_is_a_new_start(model: Model) -> None:
    session = model.session()
    session.append(tokens(70))
    session.caches.arrays[1][:] = np.nan  # as after a run that went wrong
    session.reset()
    assert session.length == 0
    ids = tokens(70, seed=1)
    close(session.append(ids), toys.decoder_reference(ids)[:, -1])


def test_forks_are_independent(model: Model) -> None:
    ids, other = tokens(600), tokens(600, seed=1)
    session = model.session()
    session.append(ids[:, :590])
    twin = session.fork()
    close(session.append(ids[:, 590:]), toys.decoder_reference(ids)[:, -1])
    mixed = np.concatenate([ids[:, :590], other[:, 590:]], axis=1)
    close(twin.append(other[:, 590:]), toys.decoder_reference(mixed)[:, -1])


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([], "have shape"),
        (3, "have shape"),
        ([[1], [2]], r"expected \[1, S\]"),
        ([1.5], "expected integers"),
        ([0, toys.V], "vocabulary has 50"),
        ([-1], "vocabulary has 50"),
        ([1] * (toys.MAX_LENGTH + 1), "exceed"),
    ],
)
def test_wrong_ids_change_nothing(model: Model, ids: Any, says: str) -> None:
    session = model.session()
    session.append([7, 8])
    with pytest.raises(InputError, match=says):
        session.append(ids)
    assert session.length == 2
    close(session.append([9]), toys.decoder_reference(np.array([[7, 8, 9]]))[:, -1])


def test_an_interrupted_prompt_is_forgotten(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "CHUNK", 4)
    session = model.session()
    session.append([7])
    step, calls = session._step, []

    def interrupted(*arguments: Any) -> np.ndarray:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(session, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.append(tokens(20))
    assert session.length == 1


def test_no_rows(model: Model) -> None:
    with pytest.raises(InputError, match="batch is 0"):
        model.session(0)
