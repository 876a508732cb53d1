"""Sessions with a window: what they hold, where it stands, and that nothing grows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from llmc.errors import InputError
from llmc.runtime import Model, generate, load
from llmc.runtime import streaming as streaming_module
from tests.runtime import toys
from tests.runtime.conftest import CACHES, DECODER, Models
from tests.runtime.llama import Llama

BLOCK = 64


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(toys.write_decoder(tmp_path_factory.mktemp("decoder") / "m.llmc"))


def close(found: np.ndarray, expected: np.ndarray, atol: float = 2e-5) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol * max(1.0, float(np.abs(expected).max())))


class Held:
    """Which tokens of a text a session holds after each, by the rule alone: when it is full, the oldest block goes."""

    def __init__(self, sinks: int, window: int) -> None:
        self.sinks, self.most = sinks, sinks + window
        self.numbers: list[int] = []  # of the tokens in the text
        self.dropped = 0

    def read(self, number: int) -> bool:
        """Did a block go first?"""
        full = len(self.numbers) == self.most
        if full:
            del self.numbers[self.sinks : self.sinks + BLOCK]
            self.dropped += BLOCK
        self.numbers.append(number)
        return full


def toy_logits(ids: np.ndarray, sinks: int, window: int) -> np.ndarray:
    """[S, V] of the toy decoder: it adds up (position + 1) times the row of each token that it holds. Tokens of the
    window keep the position in which they were read; the sinks stand before it."""
    held, found = Held(sinks, window), []
    for number in range(len(ids)):
        held.read(number)
        numbers = np.array(held.numbers)
        positions = np.where(np.arange(len(numbers)) < sinks, numbers + held.dropped, numbers)
        found.append((toys.table()[ids[numbers]].astype("float64") * (positions + 1)[:, None]).sum(0))
    return np.array(found) @ toys.table().astype("float64").T


@pytest.mark.parametrize(("sinks", "window"), [(4, 128), (0, 200), (63, 150), (1, 320)])
def test_sinks_stand_before_the_window(toy: Model, sinks: int, window: int) -> None:
    ids = np.random.default_rng(0).integers(0, toys.V, 900)
    expected = toy_logits(ids, sinks, window)
    session, at = toy.session(window=window, sinks=sinks), 0
    for piece in (3, 1, 200, 1, 1, 70, 300, *[1] * 130, 194):
        found = session.append(ids[at : at + piece], all=True)
        close(found[0], expected[at : at + piece], 1e-4)
        at += piece
        assert session.length <= sinks + window
    assert at == len(ids)
    close(toy.session(window=window, sinks=sinks).append(ids)[0], expected[-1], 1e-4)


@pytest.mark.parametrize("kind", CACHES)
def test_positions_are_those_in_the_cache(models: Models, kind: str) -> None:
    """The reference rotates every key by its place in the cache whenever it is read; the session counts on, past the
    model's length of 640, and reads its window anew once, in which the reference follows it."""
    rng = np.random.default_rng(3)
    ids, sinks, window = rng.integers(0, DECODER.shape.vocab, 760), 4, 140
    session, reference, held = models(kind).session(window=window, sinks=sinks), Llama(DECODER), Held(sinks, window)
    atol = 2e-5 if kind in ("float32", "paged") else 0.03 * (17 if kind == "int4" else 1)  # as tests/test_kv_cache.py
    anew = 0
    for number, token in enumerate(ids):
        if held.read(number):
            if held.dropped + sinks + window > 640 * (anew + 1):
                anew += 1
                reference = Llama(DECODER)
                reference.read(ids[held.numbers[:-1]])
            else:
                reference.forget(sinks, BLOCK)
        wanted = reference.read(token[None])[0]
        close(session.append(token[None])[0], wanted, atol)
    assert anew == 1 and session.length == reference.length


def test_a_prompt_is_read_as_its_tokens_are(models: Models) -> None:
    ids = np.random.default_rng(1).integers(0, DECODER.shape.vocab, 500)
    whole, single = (models("paged").session(window=200, sinks=3) for _ in range(2))
    found = whole.append(ids, all=True)
    close(found[0], np.concatenate([single.append(token[None]) for token in ids]))
    assert found.shape == (1, 500, DECODER.shape.vocab)


def test_memory_is_bounded(models: Models) -> None:
    """And no page is lost, also where another session shares them."""
    session = models("paged").session(window=188, sinks=4, pages=7)
    session.append(np.ones(180, np.int64))
    twin = session.fork()
    for _ in range(3):
        close(session.append(np.ones(150, np.int64)), twin.append(np.ones(150, np.int64)))
    twin.close()
    assert session.caches.pool.used == 3  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="one row"):
        session.fork([0, 0])


def test_trees_in_a_window(models: Models) -> None:
    rng, parents = np.random.default_rng(2), [-1, 0, 0, -1, 3]
    ids, drafts = rng.integers(0, DECODER.shape.vocab, 230), rng.integers(0, DECODER.shape.vocab, 5)
    session = models("paged").session(window=140)
    session.append(ids)
    for _ in range(60):
        found = session.verify(drafts, parents)
        line = session.fork()  # after room was made for the tree
        close(found[0, 4], line.append(drafts[[3, 4]])[0])
        session.accept([3, 4])
    more = rng.integers(0, DECODER.shape.vocab, 200)
    close(session.append(more)[0], line.append(more)[0])


def test_going_back(toy: Model) -> None:
    ids = np.random.default_rng(0).integers(0, toys.V, 400)
    expected = toy_logits(ids, 4, 128)
    session = toy.session(window=128)
    session.append(ids[:350])
    length = session.length
    session.append(ids[350:352])
    session.truncate(length)
    close(session.append(ids[350:], all=True)[0], expected[350:], 1e-4)
    for forget in (session.reset, lambda: session.truncate(0)):
        forget()
        close(session.append(ids[:300], all=True)[0], expected[:300], 1e-4)


def test_an_interruption_leaves_a_session(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the sinks could not be read again, they are before the next token."""
    ids = np.random.default_rng(0).integers(0, toys.V, 400)
    expected = toy_logits(ids, 4, 128)
    session = toy.session(window=128)
    session.append(ids[:132])
    with monkeypatch.context() as patch:
        patch.setattr(session, "_step", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            session.append(ids[132:133])
    assert session.length == 68
    close(session.append(ids[132:], all=True)[0], expected[132:], 1e-4)


def test_text_has_no_end(toy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming_module, "_POSITIONS", 300)
    run = generate(toy.session(window=128), [1, 2, 3], 1000, eos=[])
    assert len(list(run)) == 1000 and run.finish == "limit"


@pytest.mark.parametrize(
    ("open_session", "says"),
    [
        (lambda model: model.session(window=127), "at least 128 tokens, and with the sinks at most the model's 3000"),
        (lambda model: model.session(window=2997), "a window of 2997 tokens and 4 sinks cannot be kept"),
        (lambda model: model.session(window=500, sinks=64), "cannot be 64 sinks"),
        (lambda model: model.session(window=500, sinks=-1), "cannot be -1 sinks"),
        (lambda model: model.session(2, window=500), "has one row, not 2"),
    ],
)
def test_sizes_that_cannot_be(toy: Model, open_session: Callable[[Model], object], says: str) -> None:
    with pytest.raises(InputError) as error:
        open_session(toy)
    assert says in f"{error.value} {error.value.hint}"
