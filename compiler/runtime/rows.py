"""What a caller gives a session to read: token ids of one row, of several of one length, or of each its own."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.errors import InputError


def piece_of_each_row(ids: Any, batch: int) -> np.ndarray | list[np.ndarray]:
    """Integers [B, S], S at least 1; or B arrays [S of the row], some of them empty, where their lengths differ.

    Raises InputError for anything else, and where nobody has a token.
    """
    try:
        tokens = np.asarray(ids)
    except ValueError:  # numpy has no arrays of rows that differ in length
        return _unequal(ids, batch)
    if tokens.ndim == 1 and batch == 1:
        tokens = tokens[None]
    if tokens.ndim != 2 or tokens.shape[0] != batch or not tokens.size:
        raise InputError(f"ids have shape {list(tokens.shape)}, expected [{batch}, S] with S at least 1")
    return _integers(tokens, None)


def demand_vocabulary(tokens: np.ndarray | list[np.ndarray], vocab_size: int) -> None:
    """Raises InputError for ids, as `piece_of_each_row` gives them, that stand for no token."""
    for row in [tokens] if isinstance(tokens, np.ndarray) else tokens:
        if not row.size:
            continue
        least, greatest = (row.flat[0],) * 2 if row.size == 1 else (row.min(), row.max())
        if least < 0 or greatest >= vocab_size:
            raise InputError(
                f"ids reach from {least} to {greatest}; the vocabulary has {vocab_size}",
                hint="is this the model's own tokenizer?",
            )


def demand_room(tokens: np.ndarray | list[np.ndarray], lengths: np.ndarray, most: int) -> None:
    """Raises InputError where a row of `lengths` [B] would exceed `most` tokens with these."""
    counts = tokens.shape[1] if isinstance(tokens, np.ndarray) else np.array([len(row) for row in tokens])
    ends = lengths + counts
    if (ends > most).any():
        b = int(ends.argmax())
        raise InputError(
            f"{lengths[b]} tokens and {ends[b] - lengths[b]} more exceed the model's length of {most}",
            where=f"row {b}" if len(lengths) > 1 else None,
            hint="shorten the prompt, generate fewer tokens, or reset the session",
        )


def _unequal(ids: Any, batch: int) -> list[np.ndarray]:
    if len(ids) != batch:
        raise InputError(f"ids are of {len(ids)} rows, and the session has {batch}")
    rows = []
    for b, row in enumerate(ids):
        try:
            tokens = np.asarray(row)
        except ValueError:
            tokens = np.zeros((0, 0))
        if tokens.ndim != 1:
            raise InputError("ids are no list of numbers", where=f"row {b}")
        rows.append(_integers(tokens, f"row {b}") if tokens.size else np.zeros(0, np.int64))
    return rows


def _integers(tokens: np.ndarray, where: str | None) -> np.ndarray:
    if tokens.dtype.kind not in "iu":
        raise InputError(f"ids have dtype {tokens.dtype}, expected integers", where=where)
    return tokens
