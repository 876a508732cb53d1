"""Trees of draft tokens: every node has the logits of the text that leads to it, and an accepted way is that text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.errors import ArtifactError, InputError, OptionError
from llmc.pipeline import compile
from llmc.runtime import load
from llmc.runtime.trees import DraftTree
from tests.graphs import encoder
from tests.runtime import toys
from tests.runtime.conftest import CACHES, DECODER, WIDEST, Models
from tests.runtime.llama import logits

CHAIN, FAN = list(range(-1, 5)), [-1] * 5
MEDUSA = [-1, -1, 0, 0, 1, 2, 2, 3, 5]  # two first tokens, and several of what may follow


def random_tree(count: int, rng: np.random.Generator) -> list[int]:
    return [int(rng.integers(max(-1, i - 4), i)) for i in range(count)]


def way(parents: list[int], node: int) -> list[int]:
    """The nodes from a root to `node`."""
    nodes = [node]
    while parents[nodes[0]] >= 0:
        nodes.insert(0, parents[nodes[0]])
    return nodes


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, DECODER.shape.vocab, count)


def close(found: np.ndarray, expected: np.ndarray, atol: float) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("length", [1, 61, 130])
def test_nodes_and_accepted_ways(models: Models, kind: str, length: int) -> None:
    """Trees that end in the block where the text does, that reach into the next one, and that fill a mask's bits.

    The reference is numpy where nothing is rounded, otherwise the same model reading each way as a text: other kernels,
    whose sums come in another order; in 8 bits a key may then fall to the other side of a half.
    """
    rng, text = np.random.default_rng(length), tokens(length)
    exact = kind in ("float32", "paged")
    atol = 2e-5 if exact else 1e-2
    for parents in (CHAIN, FAN, MEDUSA, random_tree(64, rng), [-1]):
        drafts = rng.integers(0, DECODER.shape.vocab, len(parents))
        session = models(kind).session()
        session.append(text)
        found = session.verify(drafts, parents)
        assert found.shape == (1, len(parents), DECODER.shape.vocab) and session.lengths == (length,)

        def expected(ids: np.ndarray) -> np.ndarray:
            return logits(DECODER, ids) if exact else models(kind).session().append(ids, all=True)[0]

        for node in range(0, len(parents), 1 + len(parents) // 8):
            close(found[0, node], expected(np.concatenate([text, drafts[way(parents, node)]]))[-1], atol)
        path = way(parents, len(parents) - 1)[: 1 + length % 5]
        session.accept(path)
        assert session.length == length + len(path)
        after = np.concatenate([text, drafts[path], tokens(3, seed=9)])
        close(session.append(after[-3:], all=True)[0], expected(after)[-3:], atol)


def test_nothing_is_accepted_by_itself(models: Models) -> None:
    text, more = tokens(60), tokens(1, seed=1)
    wanted = logits(DECODER, np.concatenate([text, more]))[-1]
    for forget in (
        lambda s: s.accept([]),
        lambda s: s.truncate(60),
        lambda s: s.verify(more, [-1]),
    ):
        session = models("paged").session()
        session.append(text)
        session.verify(tokens(9, seed=2), MEDUSA)
        forget(session)
        close(session.append(more)[0], wanted, 2e-5)
        with pytest.raises(InputError, match="no tree to accept from"):
            session.accept([0])


def test_pages_of_a_tree_are_returned(models: Models) -> None:
    """And those that another session has are left alone."""
    session = models("paged").session(pages=3)
    session.append(tokens(60))
    twin = session.fork()
    session.verify(tokens(9, seed=2), MEDUSA)
    assert session.caches.pool.used == 3  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="4 pages of 64 tokens are needed"):
        twin.append(tokens(5))
    session.accept([1, 4])
    assert session.length == 62 and session.caches.pool.used == 2  # type: ignore[attr-defined]
    whole = np.concatenate([tokens(60), tokens(5, seed=1)])
    close(twin.append(whole[60:])[0], logits(DECODER, whole)[-1], 2e-5)
    with pytest.raises(InputError, match="4 pages"):
        session.verify(tokens(3), [-1] * 3)
    assert session.length == 62 and session.caches.pool.used == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("parents", "says"),
    [
        ([-1, 2, 1], "node 1 of the tree: its parent is 2"),
        ([0, 0, 0], "node 0 of the tree: its parent is 0"),
        ([-1, 0, -2], "node 2 of the tree: its parent is -2"),
        ([-1, 0], "3 tokens, and parents of shape"),
        ([-1, 0, 0.5], "dtype float64"),
        ([[-1, 0, 1]], "parents of shape"),
    ],
)
def test_wrong_trees_change_nothing(models: Models, parents: Any, says: str) -> None:
    session = models("paged").session()
    session.append(tokens(5))
    session.verify(tokens(3), [-1, 0, 1])
    with pytest.raises(InputError, match=says):
        session.verify(tokens(3), parents)
    session.accept([0, 1])
    assert session.length == 7


def test_wrong_tokens_and_ways(models: Models) -> None:
    session = models("paged").session()
    for wrong, parents, says in (
        ([], [], "have shape"),
        ([1] * 65, [-1] * 65, "the tree has 65 nodes"),
        ([DECODER.shape.vocab], [-1], "the vocabulary has"),
    ):
        with pytest.raises(InputError, match=says):
            session.verify(wrong, parents)
    session.append(tokens(635))
    with pytest.raises(InputError, match="exceed the model's length of 640"):
        session.verify([1] * 6, [-1] * 6)
    session.verify(tokens(3), [-1, 0, -1])
    for path in ([1], [0, 2], [0, 0], [3], [-1], [0.0], [[0, 1]]):
        with pytest.raises(InputError):
            session.accept(path)  # type: ignore[arg-type]
    session.accept([0, 1])
    with pytest.raises(InputError, match="trees are verified for one"):
        models("paged").session(2).verify([1], [-1])


def test_masks_and_depths() -> None:
    tree = DraftTree.of(np.arange(9), MEDUSA)
    for node in range(9):
        nodes = way(MEDUSA, node)
        assert tree.depths[node] == len(nodes) - 1
        assert int(tree.seen[node]) == sum(1 << n for n in nodes)
    assert int(DraftTree.of(np.zeros(64), list(range(-1, 63))).seen[63]) == 2**64 - 1


def test_models_that_read_no_trees(tmp_path: Path) -> None:
    model = load(toys.write_decoder(tmp_path / "toy.llmc"))
    with pytest.raises(ArtifactError, match="cannot read trees") as error:
        model.session().verify([1], [-1])
    assert "--draft-trees" in (error.value.hint or "")
    encoder(tmp_path / "m.onnx")
    with pytest.raises(OptionError, match="no decoder with a cache, whose sessions could read trees"):
        compile(tmp_path / "m.onnx", target=WIDEST, draft_trees=True)
