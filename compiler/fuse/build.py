"""Puts an `Attention` node into a graph, with the lengths and positions that it reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmc.fuse.heads import Heads
from llmc.graph import LLMC, Dim, Editor, Node, TensorType

MASKED = np.float32(-1e30)  # added to the score of a key that must not be seen; finite, so that no row yields nan


# Where an Attention node has slopes, prefix, documents, and a session's tree. Inputs of its caches stand before them.
MASK_INPUTS = slice(13, 17)


@dataclass(frozen=True)
class Mask:
    """What a query may see. `key_bias` [B, T] and `bias` [B|1, H|1, S|1, T] name float values added to the scores.

    `slopes` names a constant [H], `prefix` an int64 [B], `documents` an int64 [B, T] value; for what they and `sinks`
    say see `schedules.attention.workloads`.
    """

    causal: bool = False
    window: int = 0
    key_bias: str = ""
    bias: str = ""
    sinks: int = 0
    slopes: str = ""
    prefix: str = ""
    documents: str = ""


def attention(
    edit: Editor,
    like: Node,
    q: Heads,
    k: Heads | None,
    v: Heads | None,
    *,
    past: tuple[str, str],
    outputs: tuple[str, str, str],
    total: Dim,
    head_dim: int,
    n_kv_heads: int,
    scale: float,
    mask: Mask,
    softcap: float = 0.0,
) -> None:
    """Add the node. `k` and `v` are None where `q` names packed [B, S, (H+2KV)*D]; `total` is past + new keys."""
    B, S = edit.types[q.name].shape[:2]
    kv_len = lengths(edit, B, total)
    names: tuple[str, ...] = (
        q.name,
        k.name if k else "",
        v.name if v else "",
        *past,
        q.cos,
        q.sin,
        kv_len,
        mask.key_bias,
        mask.bias,
    )
    if mask.slopes or mask.prefix or mask.documents:
        names += (*[""] * (MASK_INPUTS.start - len(names)), mask.slopes, mask.prefix, mask.documents)
    attrs: dict[str, Any] = {
        "n_heads": q.n_heads,
        "n_kv_heads": n_kv_heads,
        "head_dim": head_dim,
        "scale": scale,
        "causal": mask.causal,
        "window": mask.window,
        "sinks": mask.sinks,
        "softcap": softcap,
        "interleaved": q.interleaved,
    }
    cache = TensorType((B, n_kv_heads, total, head_dim), "float32")
    types = [TensorType((B, S, q.n_heads * head_dim), "float32"), cache, cache]
    edit.add(Node("Attention", names, outputs, attrs, LLMC, like.name, 1), types)


def lengths(edit: Editor, batch: Dim, total: Dim) -> str:
    """int64 [B] that holds `total` for every sequence; one value for all layers."""
    name = f"kv_len({batch},{total})"
    if name not in edit.types:
        edit.add(
            Node("Lengths", (), (name,), {"batch": batch, "length": total}, LLMC, name, 1),
            [TensorType((batch,), "int64")],
        )
    return name


def positions(edit: Editor, batch: Dim, start: Dim, length: Dim) -> str:
    """int64 [B, S] that counts up from `start`; one value for all layers."""
    name = f"positions({batch},{start},{length})"
    if name not in edit.types:
        attrs = {"batch": batch, "start": start, "length": length}
        edit.add(Node("Positions", (), (name,), attrs, LLMC, name, 1), [TensorType((batch, length), "int64")])
    return name


def documents(edit: Editor, numbers: str) -> str:
    """int64 [B, T] of the documents' numbers."""
    if edit.types[numbers].dtype == "int64":
        return numbers
    name = f"{numbers}.documents"
    if name not in edit.types:
        edit.add(
            Node("Cast", (numbers,), (name,), {"to": 7}, version=13), [replace(edit.types[numbers], dtype="int64")]
        )
    return name


def key_bias(edit: Editor, visible: str) -> str:
    """float32 [B, T]: 0 where the mask `visible` (bool, or numbers where 0 hides) is set, MASKED elsewhere."""
    name = f"{visible}.key_bias"
    if name not in edit.types:
        type_ = edit.types[visible]
        condition = visible
        if type_.dtype != "bool":
            condition = edit.fresh(f"{visible}.bool")
            edit.add(Node("Cast", (visible,), (condition,), {"to": 9}, version=13), [TensorType(type_.shape, "bool")])
        zero = edit.constant(f"{name}.seen", np.zeros((), np.float32))
        hidden = edit.constant(f"{name}.hidden", np.asarray(MASKED))
        edit.add(Node("Where", (condition, zero, hidden), (name,), version=9), [TensorType(type_.shape, "float32")])
    return name
