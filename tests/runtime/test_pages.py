"""Paged caches, from ONNX to logits: the same as rows of their own, with less memory and less reading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from llmc.cli import app
from llmc.errors import InputError, OptionError
from llmc.pipeline import compile
from llmc.runtime.pages import PagedCaches
from llmc.runtime.session import Session
from tests.graphs import encoder
from tests.runtime.conftest import CACHES, DECODER, WIDEST, Models
from tests.runtime.llama import logits


def tokens(*counts: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, DECODER.shape.vocab, count) for count in counts]


def close(actual: np.ndarray, expected: np.ndarray, atol: float = 2e-5) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol * max(1.0, float(np.abs(expected).max())))


def pool(session: Session) -> tuple[int, int]:
    """Pages that are used, and leading ones that all rows share."""
    assert isinstance(session.caches, PagedCaches)
    return session.caches.pool.used, int(session.caches.inputs(slice(0, 1))["shared_blocks"][0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["paged", "int8,paged"])
def test_one_sequence_is_bit_for_bit_that_of_rows(models: Models, kind: str) -> None:
    ours, theirs = (models(name).session() for name in (kind, kind.removesuffix(",paged").replace("paged", "float32")))
    for piece in tokens(70, 1, 1, 5, 200, 1):
        np.testing.assert_array_equal(ours.append(piece, all=True), theirs.append(piece, all=True))
    assert pool(ours)[0] == -(-ours.length // 64)


@pytest.mark.parametrize("kind", CACHES)
def test_rows_equal_sessions_of_their_own(models: Models, kind: str) -> None:
    """Prompts are read by the very same calls. A token of several rows goes through other kernels than one of one: its
    sums may come in another order, and in 8 bits a key may then fall to the other side of a half."""
    model, atol = models(kind), 2e-5 if "int8" not in kind else 1e-2
    session, alone = model.session(3), [model.session() for _ in range(3)]
    prompts = tokens(100, 9, 63)
    found = session.append(prompts)
    for b, prompt in enumerate(prompts):
        np.testing.assert_array_equal(found[b], alone[b].append(prompt)[0])
    for pieces in ([1, 1, 1], [1, 0, 1], [2, 1, 0], [0, 30, 2], [1, 1, 1]):
        parts = tokens(*pieces, seed=sum(pieces))
        found = session.append(parts)
        for b, part in enumerate(parts):
            if len(part):
                close(found[b], alone[b].append(part)[0], atol)
    session.truncate([70, 0, 5])
    found = session.append([parts[0], prompts[0], parts[0]])
    alone[0].truncate(70)
    close(found[0], alone[0].append(parts[0])[0], atol)
    close(found[1], model.session().append(prompts[0])[0], atol)


def test_forks_share_their_pages(models: Models) -> None:
    """Eight ways to go on from one prompt: its full pages stay shared, its last one is copied when one writes."""
    model = models("paged")
    prompt, others = tokens(150)[0], tokens(*[3] * 8, seed=1)
    session = model.session()
    session.append(prompt)
    ways = session.fork([0] * 8)
    assert pool(ways) == (3, 2)
    for i in range(3):
        found = ways.append([part[i : i + 1] for part in others])
        assert pool(ways) == (3 + 8, 2)
    for row, part in zip(found, others, strict=True):
        close(row, logits(DECODER, np.concatenate([prompt, part]))[-1])
    kept = ways.fork([1, 6])
    ways.close()
    assert pool(kept) == (3 + 2, 2)
    assert session.length == 150
    close(session.append(others[0])[0], logits(DECODER, np.concatenate([prompt, others[0]]))[-1])
    assert pool(session)[0] == 3 + 2  # nobody else counts on its last page any more
    session.close()
    del kept
    assert pool(session)[0] == 0


def test_sharing_survives_pauses_and_dropped_rows(models: Models) -> None:
    prompt, more = tokens(130, 1)
    session = models("paged").session()
    session.append(prompt)
    ways = session.fork([0] * 4)
    wanted = logits(DECODER, np.concatenate([prompt, more]))[-1]
    ways.truncate([0, 130, 130, 130])
    assert pool(ways)[1] == 2
    close(ways.append([[], more, [], more])[1], wanted)
    close(ways.append([[], [], more, []])[2], wanted)
    found = ways.append([prompt, [], [], []])
    close(found[0], logits(DECODER, prompt)[-1])
    assert pool(ways)[1] == 0


def test_a_page_that_is_not_full_is_never_shared(models: Models) -> None:
    """Even where all other rows are empty, and where going back made it so."""
    prompt, more = tokens(130, 1)
    session = models("paged").session(2)
    session.append([[], prompt])
    session.truncate([0, 100])
    assert pool(session)[1] == 1
    for i in range(2):
        wanted = logits(DECODER, np.concatenate([prompt[:100], *[more] * (i + 1)]))[-1]
        close(session.append([[], more])[1], wanted)


def test_going_back_returns_pages(models: Models) -> None:
    ids = tokens(300)[0]
    session = models("paged").session()
    whole = session.append(ids, all=True)
    twin = session.fork()
    session.truncate(65)
    assert pool(session)[0] == 5 and pool(twin)[0] == 5
    close(session.append(ids[65:70], all=True), whole[:, 65:70])
    assert pool(session)[0] == 6  # the page that both had is copied
    twin.truncate(64)
    assert pool(session)[0] == 2
    session.reserve(640)
    assert pool(session)[0] == 10
    close(session.append(ids[70:], all=True), whole[:, 70:])


def test_a_pool_may_be_bounded(models: Models) -> None:
    prompt, more = tokens(64, 70)
    session = models("paged").session(2, pages=3)
    session.append([prompt, prompt[:60]])
    with pytest.raises(InputError, match="4 pages of 64 tokens are needed, and the pool has 3") as error:
        session.append([more, []])
    assert error.value.hint and session.lengths == (64, 60) and pool(session)[0] == 2
    close(session.append([more[:1], []])[0], logits(DECODER, np.concatenate([prompt, more[:1]]))[-1])
    twin = session.fork([1])
    with pytest.raises(InputError, match="pages"):
        twin.append(more[:1])
    session.close()
    twin.append(more[:1])
    with pytest.raises(InputError, match="holds nothing"):
        models("paged").session(pages=0)


def test_an_interrupted_call_returns_its_pages(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    session = models("paged").session()
    session.append(tokens(10)[0])
    monkeypatch.setattr(session, "_step", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        session.append(tokens(300)[0])
    assert session.length == 10 and pool(session)[0] == 1


def test_the_option(models: Models, tmp_path: Path) -> None:
    model = models("paged")
    assert "float32 in pages" in CliRunner().invoke(app, ["inspect", str(model.artifact.path)]).output
    assert set(model.functions) == {"main", "step", "step_last", "decode", "verify"}
    for wrong in ("paged,paged", "int8,int4", "int8,paged,int8"):
        with pytest.raises(OptionError, match="says too much"):
            compile(tmp_path / "m.onnx", kv_cache=wrong)
    encoder(tmp_path / "m.onnx")
    with pytest.raises(OptionError, match="no decoder with a cache that a session could keep in pages"):
        compile(tmp_path / "m.onnx", target=WIDEST, kv_cache="paged")


@pytest.mark.slow
def test_of_rounded_pages(models: Models) -> None:
    text = CliRunner().invoke(app, ["inspect", str(models("int8,paged").artifact.path)]).output
    assert "int8 in pages, 288 B a token" in text
    with pytest.raises(InputError, match="no pages to count"):
        models("float32").session(pages=3)
