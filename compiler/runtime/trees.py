"""Trees of draft tokens: what follows a text in several ways that share their beginnings, read in one pass.

A small model, or further heads of the large one, propose them ("SpecInfer", Miao et al., 2024; "Medusa", Cai et al.,
2024; "EAGLE", Li et al., 2024); the large model says which of them it would have written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmc.errors import InputError

MOST_NODES = 64  # bits of a node's mask


@dataclass(frozen=True)
class DraftTree:
    """Nodes with their tokens [S], their parents [S], their depths [S] (0 for children of the text's last token), and
    in bits which nodes each one sees, uint64 [S]: those on the way to it, and itself."""

    tokens: np.ndarray
    parents: np.ndarray
    depths: np.ndarray
    seen: np.ndarray

    @staticmethod
    def of(tokens: np.ndarray, parents: Sequence[int] | np.ndarray) -> DraftTree:
        """Raises InputError for more than 64 nodes, and for parents that are none: each stands before its children."""
        links = np.asarray(parents)
        count = len(tokens)
        if count > MOST_NODES:
            raise InputError(f"the tree has {count} nodes; at most {MOST_NODES} are read in one pass")
        if links.shape != (count,) or links.dtype.kind not in "iu":
            raise InputError(
                f"there are {count} tokens, and parents of shape {list(links.shape)} and dtype {links.dtype}",
                hint="give each token the number of its parent, and -1 to those that follow the session's last token",
            )
        wrong = np.flatnonzero((links < -1) | (links >= np.arange(count)))
        if wrong.size:
            node = int(wrong[0])
            raise InputError(
                f"its parent is {links[node]}; parents are -1 or stand before their children",
                where=f"node {node} of the tree",
                hint="give the nodes from the roots to the leaves",
            )
        depths, seen = np.zeros(count, np.int64), np.zeros(count, np.uint64)
        for node, parent in enumerate(links.tolist()):
            depths[node] = depths[parent] + 1 if parent >= 0 else 0
            seen[node] = np.uint64(1 << node) | (seen[parent] if parent >= 0 else np.uint64(0))
        return DraftTree(tokens, links, depths, seen)

    def check_path(self, path: Sequence[int] | np.ndarray) -> np.ndarray:
        """Numbers of nodes [n], each the child of the one before it, the first one's parent the text.

        Raises InputError for anything else.
        """
        nodes = np.asarray(path, np.int64) if not len(path) else np.asarray(path)
        if nodes.ndim != 1 or nodes.dtype.kind not in "iu":
            raise InputError(f"a path of shape {list(nodes.shape)} and dtype {nodes.dtype} is no list of nodes")
        previous = -1
        for node in nodes.tolist():
            if not 0 <= node < len(self.parents) or self.parents[node] != previous:
                before = "the session's last token" if previous < 0 else f"node {previous}"
                raise InputError(
                    f"node {node} is no child of {before}",
                    where=f"path {nodes.tolist()}",
                    hint="name the nodes of one way from a root down",
                )
            previous = node
        return nodes
