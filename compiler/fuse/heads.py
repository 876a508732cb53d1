"""Between [B, S, H*D], which linear layers and kernels use, and [B, H, S, D], which exporters use around attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from llmc.graph import LLMC, Editor, Node, TensorType, same_dim
from llmc.match import fused, ints, made_by, only_user, rank

TO_HEADS = [0, 2, 1, 3]  # its own inverse


@dataclass(frozen=True)
class Heads:
    """Queries, keys or values as [B, S, H*D], with the rotation that is applied to them, if any."""

    name: str
    n_heads: int
    cos: str = ""
    sin: str = ""
    interleaved: bool = False


def flatten_heads(edit: Editor, name: str, n_heads: int) -> Heads:
    """The [B, S, H*D] value behind [B, H, S, D] (or itself); made by a Transpose and a Reshape where there is none."""
    turned: Node | None = None
    while True:
        if turned is None and (turned := fused(edit, name, "Rope")) is not None:
            name = turned.inputs[0]
        elif rank(edit, name) == 4 and (flat := _flat_source(edit, name)) is not None:
            name = flat
        else:
            break
    if rank(edit, name) == 4:
        name = _make_flat(edit, name)
    if turned is None:
        return Heads(name, n_heads)
    return Heads(name, n_heads, turned.inputs[1], turned.inputs[2], bool(turned.attrs["interleaved"]))


def _flat_source(edit: Editor, name: str) -> str | None:
    transpose = made_by(edit, name, "Transpose")
    reshape = made_by(edit, transpose.inputs[0], "Reshape") if transpose is not None else None
    if transpose is None or reshape is None or list(transpose.attrs.get("perm", ())) != TO_HEADS:
        return None
    source = reshape.inputs[0]
    flat, split = edit.types[source].shape, edit.types[reshape.outputs[0]].shape
    if len(flat) != 3 or not all(same_dim(a, b) for a, b in zip(flat[:2], split[:2], strict=True)):
        return None
    return source


def _make_flat(edit: Editor, name: str) -> str:
    type_ = edit.types[name]
    B, H, S, D = type_.shape
    swapped, flat = edit.fresh(f"{name}.bshd"), edit.fresh(f"{name}.flat")
    edit.add(
        Node("Transpose", (name,), (swapped,), {"perm": TO_HEADS}, version=13), [replace(type_, shape=(B, S, H, D))]
    )
    reshape(edit, swapped, flat, TensorType((B, S, H * D), type_.dtype))
    return flat


def split_heads(edit: Editor, flat: str, out: str, n_heads: int) -> None:
    """`out` [B, H, S, D] of `flat` [B, S, H*D], for readers that were not fused."""
    B, S, width = edit.types[flat].shape
    dtype = edit.types[flat].dtype
    assert isinstance(width, int)
    split = edit.fresh(f"{out}.bshd")
    reshape(edit, flat, split, TensorType((B, S, n_heads, width // n_heads), dtype))
    edit.add(Node("Transpose", (split,), (out,), {"perm": TO_HEADS}, version=13))


def reshape(edit: Editor, x: str, out: str, type_: TensorType) -> None:
    """`out` is `x` with the shape of `type_`."""
    edit.add(Node("Reshape", (x, shape_value(edit, out, type_)), (out,), {}, version=14), [type_])


def expand(edit: Editor, x: str, out: str, type_: TensorType) -> None:
    """`out` is `x` broadcast to the shape of `type_`."""
    edit.add(Node("Expand", (x, shape_value(edit, out, type_)), (out,), {}, version=13), [type_])


def shape_value(edit: Editor, out: str, type_: TensorType) -> str:
    dims = np.empty(len(type_.shape), object)
    dims[:] = type_.shape
    name = edit.fresh(f"{out}.shape")
    edit.add(Node("ShapeValue", (), (name,), {"value": dims}, LLMC, version=1), [TensorType((len(dims),), "int64")])
    return name


def merged(edit: Editor, name: str) -> str | None:
    """The [B, S, H*D] value where [B, H, S, D] is only turned back and flattened."""
    transpose = only_user(edit, name, "Transpose")
    reshaped = only_user(edit, transpose.outputs[0], "Reshape") if transpose is not None else None
    if transpose is None or reshaped is None or list(transpose.attrs.get("perm", ())) != TO_HEADS:
        return None
    out, (B, _, S, _) = reshaped.outputs[0], edit.types[name].shape
    shape = edit.types[out].shape
    return out if len(shape) == 3 and same_dim(shape[0], B) and same_dim(shape[1], S) else None


def repeated_source(edit: Editor, name: str) -> str:
    """Keys or values before each head was repeated for its group of query heads: Unsqueeze → Expand → Reshape."""
    node = made_by(edit, name, "Reshape")
    expand = made_by(edit, node.inputs[0], "Expand", "Tile") if node is not None else None
    unsqueeze = made_by(edit, expand.inputs[0], "Unsqueeze") if expand is not None else None
    if expand is None or unsqueeze is None or ints(edit, unsqueeze.input(1)) not in ([2], None):
        return name
    wide, narrow = edit.types[name].shape, edit.types[unsqueeze.inputs[0]].shape
    if len(wide) != 4 or len(narrow) != 4 or len(edit.types[expand.outputs[0]].shape) != 5:
        return name
    grouped = edit.types[expand.outputs[0]].shape
    same = same_dim(grouped[1], narrow[1]) and same_dim(wide[2], narrow[2]) and same_dim(wide[3], narrow[3])
    return unsqueeze.inputs[0] if same else name
