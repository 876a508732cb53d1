"""Recognises what an exporter's mask means by *running* it at small sizes.

There are dozens of spellings of a causal or padding mask (Range and compare, Trilu, Where over finfo.min, cumulative
sums …), and each release of an exporter adds one. All are small subgraphs of the model's dimensions, of one [B, T] mask
input and of positions. So the subgraph is evaluated with ONNX's own reference implementation for a few sizes and random
masks (`trials`), and compared with what kernels know: causal or not, a window, with sinks before it or not, a prefix,
documents, padding, and ALiBi's slopes. Sizes just beyond every integer constant in the subgraph are tried too, because
a sliding window shows itself only there. What fits no guess is passed to the kernel as the additive bias that it is:
still fused, only read from memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from llmc.fuse.build import Mask, documents, key_bias, lengths
from llmc.fuse.heads import expand, reshape
from llmc.fuse.trials import Sizes, Subgraph, Trials, integers, subgraph
from llmc.graph import Dim, Editor, Node, TensorType, same_dim
from llmc.tvm_shim import Analyzer

_HIDDEN_BELOW = -1e4
_LEAST_WINDOW = 5  # smaller constants are axes and the like
_MOST_SINKS = 1024


def recognise(edit: Editor, name: str, batch: Dim, queries: Dim, keys: Dim, heads: int) -> Mask:
    """What the additive or boolean mask `name` (broadcast over [B, H, S, T]) means."""
    sub = subgraph(edit, name, (batch, queries, keys))
    found = _Search(edit, sub, heads).mask() if sub is not None else None
    return found or Mask(bias=_additive(edit, name, keys))


def _additive(edit: Editor, name: str, keys: Dim) -> str:
    """The mask as float numbers to add, [B|1, H|1, S|1, T]."""
    if edit.types[name].dtype == "bool":
        name = key_bias(edit, name)
    type_ = edit.types[name]
    if len(type_.shape) < 4:
        wide = f"{name}.4d"
        if wide not in edit.types:
            reshape(edit, name, wide, TensorType((1,) * (4 - len(type_.shape)) + type_.shape, type_.dtype))
        name, type_ = wide, edit.types[wide]
    if not same_dim(type_.shape[3], keys):
        wide = f"{name}.all_keys"
        if wide not in edit.types:
            expand(edit, name, wide, TensorType((*type_.shape[:3], keys), type_.dtype))
        name = wide
    return name


@dataclass(frozen=True)
class _Guess:
    """What a mask could mean. `padding`, `numbers` and `prefix_of` name inputs: masks of keys, documents' numbers, and
    the length of each sequence's prefix."""

    causal: bool = False
    window: int = 0
    sinks: int = 0
    prefix: int = 0
    prefix_of: str = ""
    padding: str = ""
    numbers: str = ""


@dataclass(frozen=True)
class _Trial:
    """What came out for some sizes and inputs: visible bool and added float, both [B|1, H|1, S|1, T|1]."""

    B: int
    S: int
    T: int
    feeds: Mapping[str, np.ndarray] = field(repr=False)
    visible: np.ndarray = field(repr=False)
    added: np.ndarray = field(repr=False)

    def fits(self, guess: _Guess) -> bool:
        query, key = np.arange(self.T - self.S, self.T)[:, None], np.arange(self.T)[None, :]
        seen = np.ones((self.B, self.S, self.T), bool)
        if guess.causal:
            prefix = self.feeds[guess.prefix_of].reshape(-1, 1, 1) if guess.prefix_of else guess.prefix
            seen &= (key <= query) | (key < prefix)
        if guess.window:
            seen &= (key > query - guess.window) | (key < guess.sinks)
        if guess.numbers:
            number = self.feeds[guess.numbers]
            seen &= number[:, -self.S :, None] == number[:, None, :]
        if guess.padding:
            seen &= self.feeds[guess.padding][:, None, :] != 0
        shape = np.broadcast_shapes(seen[:, None].shape, self.visible.shape)
        return bool(np.array_equal(np.broadcast_to(seen[:, None], shape), np.broadcast_to(self.visible, shape)))


class _Search:
    """For the guess that explains every trial of a mask."""

    def __init__(self, edit: Editor, sub: Subgraph, heads: int) -> None:
        self.edit, self.sub, self.heads = edit, sub, heads
        self.runs, self.rng = Trials(edit, sub), np.random.default_rng(0)
        self.key_masks = [leaf for leaf in sub.leaves if self.is_key_mask(leaf)]
        self.counts = [leaf for leaf in sub.leaves if self.is_count(leaf)]
        self.integers = integers(edit, sub)

    # -- inputs -------------------------------------------------------------------------------------------------
    def is_key_mask(self, leaf: str) -> bool:
        """[B, T]; where T is S, positions look the same and are told apart by their name."""
        shape = self.edit.types[leaf].shape
        of_keys = len(shape) == 2 and Analyzer().can_prove_equal(shape[1], self.sub.dims[2])
        return of_keys and "position" not in leaf

    def is_count(self, leaf: str) -> bool:
        """A number, or one for each sequence: int [], [1], [B] or [B, 1]."""
        type_ = self.edit.types[leaf]
        first, rest = type_.shape[:1], type_.shape[1:]
        of_batch = all(same_dim(d, 1) or same_dim(d, self.sub.dims[0]) for d in first)
        return (
            type_.dtype in ("int32", "int64")
            and of_batch
            and all(same_dim(d, 1) for d in rest)
            and "position" not in leaf
        )

    def feed(self, leaf: str, shape: tuple[int, ...], numbers: str, S: int, T: int) -> np.ndarray:
        dtype = self.edit.types[leaf].dtype
        if leaf in self.key_masks:
            return self.rng.integers(0, 4 if leaf == numbers else 2, shape).astype(dtype)
        if leaf in self.counts:
            return self.rng.integers(0, T + 2, shape).astype(dtype)
        return np.broadcast_to(T - S + np.arange(shape[-1]), shape).astype(dtype)

    # -- trials -------------------------------------------------------------------------------------------------
    def trial(self, sizes: Sizes, numbers: str = "") -> _Trial | None:
        """None where the mask cannot be run, or has too many dimensions."""
        B, S, T = self.runs.sizes(sizes)
        feeds = self.runs.feeds(sizes, lambda leaf, shape: self.feed(leaf, shape, numbers, S, T))
        result = self.runs.run(sizes, feeds)
        if result is None or result.ndim > 4:
            return None
        result = result.reshape((1,) * (4 - result.ndim) + result.shape)
        visible = result if result.dtype == bool else result >= _HIDDEN_BELOW
        added = np.where(visible & (result.dtype != bool), result, 0)
        return _Trial(B, S, T, feeds, visible, added)

    def trials(self, numbers: str) -> list[_Trial] | None:
        """Small ones, and one beyond each constant: by so much that sinks, if there are any, stand apart."""
        more = 2 + max((c for c in self.integers if c <= _MOST_SINKS), default=0)
        windows = [self.runs.beyond(c, more) for c in self.integers if c >= _LEAST_WINDOW]
        found = []
        for sizes in (*self.runs.small(fed=bool(self.key_masks or self.counts)), *windows):
            if sizes is None:
                continue
            trial = self.trial(sizes, numbers)
            if trial is None:
                return None
            found.append(trial)
        return found

    # -- guesses ------------------------------------------------------------------------------------------------
    def mask(self) -> Mask | None:
        # Of floats and the like that are fed no trial could tell what is in them; of numbers, positions are expected.
        others = {*self.sub.leaves} - {*self.key_masks, *self.counts}
        if not all(self.edit.types[leaf].dtype.startswith("int") and self.edit.types[leaf].shape for leaf in others):
            return None
        if len(self.key_masks) > 2 or len(self.counts) > 1:
            return None
        for numbers in ("", *filter(self.is_numbers, self.key_masks)):
            trials = self.trials(numbers)
            slopes = self.slopes(trials) if trials else None
            if trials is None or slopes is None:
                return None
            for guess in self.guesses(numbers):
                if all(trial.fits(guess) for trial in trials) and self.stands(guess):
                    return self.named(guess, slopes)
        return None

    def is_numbers(self, leaf: str) -> bool:
        type_ = self.edit.types[leaf]
        return type_.dtype in ("int32", "int64") and same_dim(type_.shape[0], self.sub.dims[0])

    def guesses(self, numbers: str) -> Iterator[_Guess]:
        """The simplest first."""
        near = sorted({c + d for c in self.integers if c >= _LEAST_WINDOW for d in (-1, 0, 1)})
        few = sorted({c + d for c in self.integers if c <= _MOST_SINKS for d in (0, 1)})
        first = sorted({c + d for c in self.integers for d in (-1, 0, 1) if c + d > 0})
        shapes = [_Guess(), _Guess(causal=True), *(_Guess(causal=True, window=w) for w in near)]
        shapes += [_Guess(causal=True, window=w, sinks=s) for w in near for s in few]
        if not numbers:
            shapes += [_Guess(causal=True, prefix_of=leaf) for leaf in self.counts]
            shapes += [_Guess(causal=True, prefix=p) for p in first]
        for shape in shapes:
            for padding in (*self.key_masks, ""):
                yield replace(shape, padding=padding, numbers=numbers)

    def stands(self, guess: _Guess) -> bool:
        """Does the guess hold where a query stands on either side of its prefix?"""
        if not guess.prefix:
            return True
        sizes = self.runs.around(guess.prefix)
        trial = self.trial(sizes) if sizes is not None else None
        return trial is not None and trial.fits(guess)

    def slopes(self, trials: Iterable[_Trial]) -> np.ndarray | None:
        """float32 [heads] where all that is added is slope[head] * key, but for a number for each row, which softmax
        takes away; [] where nothing is added; None where it is anything else."""
        wide = [t for t in trials if t.T > 1]
        if not any(t.added.any() for t in trials):
            return np.zeros(0, np.float32)
        found, distance = np.zeros(self.heads), np.zeros(self.heads)
        rows = []
        for t in wide:
            shape = np.broadcast_shapes(t.added.shape, (1, self.heads, 1, t.T))
            if shape[1] != self.heads:
                return None
            visible, added = np.broadcast_to(t.visible, shape), np.broadcast_to(t.added, shape).astype(np.float64)
            first, last = visible.argmax(-1), t.T - 1 - visible[..., ::-1].argmax(-1)
            ends = [np.take_along_axis(added, at[..., None], -1)[..., 0] for at in (first, last)]
            apart = np.where(visible.any(-1), last - first, 0)
            for h in range(self.heads):
                at = np.unravel_index(apart[:, h].argmax(), apart[:, h].shape)
                if apart[:, h][at] > distance[h]:
                    distance[h] = apart[:, h][at]
                    found[h] = (ends[1] - ends[0])[:, h][at] / distance[h]
            rows.append((visible, added, np.take_along_axis(added, first[..., None], -1), first[..., None]))
        for visible, added, start, first in rows:
            line = start + found[None, :, None, None] * (np.arange(added.shape[-1]) - first)
            if not np.allclose(np.where(visible, added, 0), np.where(visible, line, 0), rtol=1e-5, atol=1e-6):
                return None
        return found.astype(np.float32) if found.any() else None

    # -- what kernels take --------------------------------------------------------------------------------------
    def named(self, guess: _Guess, slopes: np.ndarray) -> Mask:
        """The guess as a mask, whose inputs are values of the graph."""
        edit, batch = self.edit, self.sub.dims[0]
        alibi = edit.constant(f"{self.sub.name}.slopes", slopes) if len(slopes) else ""
        prefix = lengths(edit, batch, guess.prefix) if guess.prefix else ""
        if guess.prefix_of:
            prefix = self.of_batch(guess.prefix_of)
        return Mask(
            guess.causal,
            guess.window,
            key_bias(edit, guess.padding) if guess.padding else "",
            sinks=guess.sinks,
            slopes=alibi,
            prefix=prefix,
            documents=documents(edit, guess.numbers) if guess.numbers else "",
        )

    def of_batch(self, leaf: str) -> str:
        """int64 [B] of a number, or of one for each sequence."""
        edit, name, batch = self.edit, f"{leaf}.of_batch", self.sub.dims[0]
        if name not in edit.types:
            flat, wide = edit.fresh(f"{leaf}.int64"), edit.fresh(f"{leaf}.flat")
            type_ = edit.types[leaf]
            edit.add(Node("Cast", (leaf,), (flat,), {"to": 7}, version=13), [TensorType(type_.shape, "int64")])
            count: Dim = type_.shape[0] if type_.shape else 1
            reshape(edit, flat, wide, TensorType((count,), "int64"))
            expand(edit, wide, name, TensorType((batch,), "int64"))
        return name
