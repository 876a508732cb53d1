"""Recognises what an exporter's mask means by *running* it at small sizes.

There are dozens of spellings of a causal or padding mask (Range and compare, Trilu, Where over finfo.min, cumulative
sums …), and each release of an exporter adds one. All are small subgraphs of the model's dimensions, of one [B, T] mask
input and of positions. So the subgraph is evaluated with ONNX's own reference implementation for a few sizes and random
masks, and compared with the hypotheses that kernels know: causal or not, windowed or not, padded or not. Sizes just
beyond every integer constant in the subgraph are tried too, because a sliding window shows itself only there. What fits
no hypothesis is passed to the kernel as the additive bias that it is: still fused, only read from memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.fuse.build import Mask, key_bias
from llmc.fuse.heads import expand, reshape
from llmc.graph import Dim, Editor, Node, TensorType, same_dim
from llmc.match import array, rank
from llmc.tvm_shim import Analyzer, substitute, tirx

_MOST_NODES = 200
_HIDDEN_BELOW = -1e4
_MOST_QUERIES = 4096  # of a trial: as many keys, and some tens of bytes for each pair


@dataclass(frozen=True)
class _Subgraph:
    nodes: tuple[Node, ...]
    leaves: tuple[str, ...]  # run-time inputs
    constants: tuple[str, ...]


def recognise(edit: Editor, name: str, batch: Dim, queries: Dim, keys: Dim) -> Mask:
    """What the additive or boolean mask `name` (broadcast over [B, H, S, T]) means."""
    sub = _ancestors(edit, name)
    if sub is not None:
        key_masks = [leaf for leaf in sub.leaves if _is_key_mask(edit, leaf, keys, queries)]
        # A row of floats that is fed is added as it is: no trial could tell what is in it.
        added = any(edit.types[leaf].dtype.startswith("float") for leaf in sub.leaves if leaf not in key_masks)
        readable = len(key_masks) <= 1 and not added
        found = _hypothesis(edit, name, sub, key_masks, batch, queries, keys) if readable else None
        if found is not None:
            causal, window, padded = found
            return Mask(causal, window, key_bias(edit, key_masks[0]) if padded else "")
    return Mask(bias=_additive(edit, name, keys))


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


def _ancestors(edit: Editor, name: str) -> _Subgraph | None:
    """All that `name` is computed from; None where that is large or no arithmetic of masks."""
    order: list[Node] = []
    leaves: dict[str, None] = {}
    constants: dict[str, None] = {}
    seen: set[str] = set()

    def visit(value: str) -> bool:
        if not value or value in seen:
            return True
        seen.add(value)
        node = edit.producer.get(value)
        if value in edit.constants:
            constants[value] = None
            return array(edit, value) is not None
        if node is None:
            leaves[value] = None
            return rank(edit, value) <= 2
        known = node.domain == "" or node.op in ("ShapeValue", "Positions")
        if not known or len(order) >= _MOST_NODES or not all(visit(i) for i in node.inputs):
            return False
        order.append(node)
        return True

    if not visit(name):
        return None
    unique = tuple({id(n): n for n in order}.values())
    return _Subgraph(unique, tuple(leaves), tuple(constants))


def _is_key_mask(edit: Editor, leaf: str, keys: Dim, queries: Dim) -> bool:
    """[B, T]; where T is S, positions look the same and are told apart by their name."""
    shape = edit.types[leaf].shape
    return len(shape) == 2 and Analyzer().can_prove_equal(shape[1], keys) and "position" not in leaf


def _hypothesis(
    edit: Editor, name: str, sub: _Subgraph, key_masks: list[str], batch: Dim, queries: Dim, keys: Dim
) -> tuple[bool, int, bool] | None:
    """(causal, window, padded) that explains every trial."""
    trials = []
    rng = np.random.default_rng(0)
    for sizes in _trial_sizes(edit, name, sub, batch, queries, keys):
        B, S, T = (_evaluate(d, sizes) for d in (batch, queries, keys))
        feeds = {leaf: _feed(edit, leaf, sizes, leaf in key_masks, T - S, rng) for leaf in sub.leaves}
        result = _run(edit, sub, name, sizes, feeds)
        visible = None if result is None else _visible(result)
        if visible is None or visible.ndim > 4:
            return None
        mask = feeds[key_masks[0]] != 0 if key_masks else np.ones((B, T), bool)
        trials.append((visible.reshape((1,) * (4 - visible.ndim) + visible.shape), mask, S, T))
    if not trials:
        return None
    windows = sorted({0, *(c + d for c in _integers(edit, sub) for d in (-1, 0, 1))})
    for padded in (True, False) if key_masks else (False,):
        for causal, window in [(False, 0), *((True, w) for w in windows if w >= 0)]:
            if all(_explains(causal, window, padded, *trial) for trial in trials):
                return causal, window, padded
    return None


def _explains(causal: bool, window: int, padded: bool, visible: np.ndarray, mask: np.ndarray, S: int, T: int) -> bool:
    query, key = np.arange(T - S, T)[:, None], np.arange(T)[None, :]
    expected = (key <= query) if causal else np.ones((S, T), bool)
    if window:
        expected = expected & (key > query - window)
    full = expected[None, None] & (mask[:, None, None, :] if padded else True)
    shape = np.broadcast_shapes(full.shape, visible.shape)
    return bool(np.array_equal(np.broadcast_to(full, shape), np.broadcast_to(visible, shape)))


def _visible(result: np.ndarray) -> np.ndarray | None:
    """Which keys an evaluated mask lets through; None where it adds anything but nothing or a very negative number."""
    if result.dtype == bool:
        return result
    hidden = result < _HIDDEN_BELOW
    return None if np.any(result[~hidden] != 0) else ~hidden


def _trial_sizes(
    edit: Editor, name: str, sub: _Subgraph, batch: Dim, queries: Dim, keys: Dim
) -> Iterator[Mapping[Any, int]]:
    """Values for every symbol: three small trials, and one just beyond each integer constant."""
    dims: list[Dim] = [batch, queries, keys, *edit.types[name].shape]
    for node in sub.nodes:
        dims += list(node.attrs["value"].flat) if node.op == "ShapeValue" else []
        dims += [d for out in node.outputs if out for d in edit.types[out].shape]
    dims += [d for leaf in sub.leaves for d in edit.types[leaf].shape]
    symbols = list(
        {s.name: s for d in dims if not isinstance(d, int) for s in tirx.analysis.undefined_vars(d)}.values()
    )
    role = {id(s): "batch" if s.same_as(batch) else "query" if s.same_as(queries) else "other" for s in symbols}
    for b, s, o in ((2, 3, 4), (1, 5, 0), (3, 1, 7)):
        yield {x: {"batch": b, "query": s, "other": o}[role[id(x)]] for x in symbols}
    if "other" in role.values():
        for c in _integers(edit, sub):
            yield {x: {"batch": 1, "query": 2, "other": c + 2}[role[id(x)]] for x in symbols}
    else:
        for c in _integers(edit, sub):
            if c <= _MOST_QUERIES:
                yield {x: {"batch": 1, "query": c + 2, "other": 0}[role[id(x)]] for x in symbols}


def _integers(edit: Editor, sub: _Subgraph) -> list[int]:
    """Integer constants in the subgraph that could be the length of a window."""
    found = set()
    for name in sub.constants:
        value = array(edit, name)
        if value is not None and value.size == 1 and value.dtype.kind in "iuf" and np.isfinite(value).all():
            number = abs(float(value.reshape(-1)[0]))
            if 4 < number < 1 << 17 and number == int(number):
                found.add(int(number))
    return sorted(found)


def _evaluate(dim: Dim, sizes: Mapping[Any, int]) -> int:
    if isinstance(dim, int):
        return dim
    return int(Analyzer().simplify(substitute(dim, sizes)))


def _feed(
    edit: Editor, leaf: str, sizes: Mapping[Any, int], is_mask: bool, past: int, rng: np.random.Generator
) -> np.ndarray:
    type_ = edit.types[leaf]
    shape = tuple(_evaluate(d, sizes) for d in type_.shape)
    if is_mask:
        return rng.integers(0, 2, shape).astype(type_.dtype)
    if type_.dtype.startswith("int") and shape:
        return np.broadcast_to(past + np.arange(shape[-1]), shape).astype(type_.dtype)
    return np.zeros(shape, type_.dtype)


def _run(
    edit: Editor, sub: _Subgraph, name: str, sizes: Mapping[Any, int], feeds: Mapping[str, np.ndarray]
) -> np.ndarray | None:
    """The subgraph's value at these sizes, by ONNX's reference implementation; None where it has no such operator."""
    from onnx import helper, numpy_helper
    from onnx.reference.reference_evaluator import ReferenceEvaluator

    values: dict[str, np.ndarray] = dict(feeds)
    values.update({c: np.asarray(edit.constants[c]) for c in sub.constants})
    for node in sub.nodes:
        if node.op == "ShapeValue":
            flat = [_evaluate(d, sizes) for d in node.attrs["value"].reshape(-1)]
            values[node.outputs[0]] = np.asarray(flat, np.int64).reshape(node.attrs["value"].shape)
            continue
        if node.op == "Positions":
            batch, start, length = (_evaluate(node.attrs[k], sizes) for k in ("batch", "start", "length"))
            values[node.outputs[0]] = np.broadcast_to(start + np.arange(length), (batch, length))
            continue
        try:
            tensors = {k: numpy_helper.from_array(v) for k, v in node.attrs.items() if isinstance(v, np.ndarray)}
            proto = helper.make_node(node.op, node.inputs, node.outputs, **{**node.attrs, **tensors})
            used = [i for i in dict.fromkeys(node.inputs) if i]
            graph = helper.make_graph(
                [proto],
                "mask",
                [
                    helper.make_tensor_value_info(i, helper.np_dtype_to_tensor_dtype(values[i].dtype), None)
                    for i in used
                ],
                [helper.make_empty_tensor_value_info(o) for o in node.outputs],
            )
            model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", max(node.version, 11))])
            outputs = ReferenceEvaluator(model).run(None, {i: values[i] for i in used})
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
            return None
        values.update(zip(node.outputs, outputs, strict=True))
    return np.asarray(values[name])
