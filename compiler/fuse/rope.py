"""Rotary position embedding becomes `Rope`(x, cos, sin): cos and sin [B, S, D/2], made once a step for all layers.

Exporters keep cos and sin as tables that are indexed by position (RotaryEmbedding), or compute them from the positions
with each half stored twice (the primitive form). Both end as the same two tensors. Attention takes `Rope` in later.
"""

from __future__ import annotations

from llmc.graph import LLMC, Editor, Graph, Node, TensorType
from llmc.match import array, ints, made_by, nodes, other, rank, unsqueezed


def fuse_rope(graph: Graph) -> Graph:
    edit = Editor(graph)
    for domain in ("", "com.microsoft"):
        for node in nodes(edit, "RotaryEmbedding", domain=domain):
            _standard(edit, node)
    for node in nodes(edit, "Add"):
        _rotate_half(edit, node)
    return edit.finish()


def rope(edit: Editor, like: Node, x: str, cos: str, sin: str, heads: int, interleaved: bool) -> None:
    attrs = {"interleaved": interleaved, "n_heads": heads}
    edit.add(Node("Rope", (x, cos, sin), (like.outputs[0],), attrs, LLMC, like.name, 1))


def table_rows(edit: Editor, table: str, positions: str) -> str:
    """[B, S, D/2] rows of a constant table [max, D/2]; made once for each pair of table and positions."""
    name = f"{table}[{positions}]"
    if name not in edit.types:
        batch_seq = edit.types[positions].shape
        row = edit.types[table].shape[1]
        edit.add(
            Node("Embedding", (table, positions), (name,), {}, LLMC, name, 1),
            [TensorType((*batch_seq, row), "float32")],
        )
    return name


def _standard(edit: Editor, node: Node) -> None:
    """ai.onnx and com.microsoft differ only in the order of their inputs."""
    if node.domain:
        x, positions, cos, sin = node.inputs[:4]
    else:
        x, cos, sin = node.inputs[:3]
        positions = node.input(3)
    if node.attrs.get("rotary_embedding_dim", 0) or rank(edit, x) not in (3, 4):
        return
    if positions:
        if array(edit, cos) is None or array(edit, sin) is None or rank(edit, positions) != 2:
            return
        cos, sin = table_rows(edit, cos, positions), table_rows(edit, sin, positions)
    else:
        made = made_by(edit, cos, "Cos"), made_by(edit, sin, "Sin")
        cos, sin = (_shared_table(edit, n, n.inputs[0]) if n else x for n, x in zip(made, (cos, sin), strict=True))
    shape = edit.types[x].shape
    heads = node.attrs.get("num_heads", 0) or (shape[1] if len(shape) == 4 else 0)
    if not heads:
        return
    rope(edit, node, x, cos, sin, int(heads), bool(node.attrs.get("interleaved", 0)))


def _rotate_half(edit: Editor, node: Node) -> None:
    """x * cos + concat(-x2, x1) * sin over [B, H, S, D]."""
    products = [made_by(edit, name, "Mul") for name in node.inputs]
    if None in products or rank(edit, node.outputs[0]) != 4:
        return
    for plain, turned in (products, products[::-1]):
        assert plain is not None and turned is not None
        for half in turned.inputs:
            x = _rotated(edit, half)
            if x is None or x not in plain.inputs:
                continue
            cos, sin = _half_table(edit, other(plain, x), "Cos"), _half_table(edit, other(turned, half), "Sin")
            heads = edit.types[x].shape[1]
            if cos is not None and sin is not None and isinstance(heads, int):
                rope(edit, node, x, cos, sin, heads, False)
            return


def _rotated(edit: Editor, name: str) -> str | None:
    """x where `name` is concat(-x[..., D/2:], x[..., :D/2])."""
    concat = made_by(edit, name, "Concat")
    if concat is None or len(concat.inputs) != 2 or concat.attrs.get("axis") not in (-1, rank(edit, name) - 1):
        return None
    negative = made_by(edit, concat.inputs[0], "Neg")
    high = _half(edit, negative.inputs[0]) if negative is not None else None
    low = _half(edit, concat.inputs[1])
    if high is None or low is None or high[0] != low[0]:
        return None
    return high[0] if (low[1], high[1]) == ("low", "high") else None


def _half(edit: Editor, name: str) -> tuple[str, str] | None:
    """(x, which) where `name` is one half of x along the last axis, by Slice or Split."""
    node = made_by(edit, name, "Slice", "Split")
    if node is None:
        return None
    x = node.inputs[0]
    D = edit.types[x].shape[-1]
    if edit.types[name].shape[-1] * 2 != D:
        return None
    if node.op == "Split":
        last = node.attrs.get("axis", 0) in (-1, rank(edit, x) - 1)
        return (x, "low" if node.outputs[0] == name else "high") if last and len(node.outputs) == 2 else None
    start, axes = ints(edit, node.inputs[1]), ints(edit, node.input(3))
    if start is None or axes is None or len(start) != 1 or axes[0] not in (-1, rank(edit, x) - 1):
        return None
    return x, "low" if start[0] == 0 else "high"


def _half_table(edit: Editor, name: str, function: str) -> str | None:
    """[B, S, D/2] behind Unsqueeze(Cos(Concat(f, f))): the function of f alone."""
    node = made_by(edit, unsqueezed(edit, name), function)
    concat = made_by(edit, node.inputs[0], "Concat") if node is not None else None
    if node is None or concat is None or len(concat.inputs) != 2 or concat.inputs[0] != concat.inputs[1]:
        return None
    half = _shared_table(edit, node, concat.inputs[0])
    return half if len(edit.types[half].shape) == 3 else None


def _shared_table(edit: Editor, node: Node, angles: str) -> str:
    """The function of `node` of these angles, made once: exporters write it for queries, and again for keys."""
    name = f"{angles}.{node.op}"
    if name not in edit.types:
        edit.add(Node(node.op, (angles,), (name,), {}, "", node.name, node.version), [edit.types[angles]])
    return name
