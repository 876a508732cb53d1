"""softmax(q kᵀ · scale + mask) v, spelled in primitives or as ai.onnx Attention, becomes one `Attention` node."""

from __future__ import annotations

import math
from dataclasses import replace

from llmc.fuse.build import Mask, attention
from llmc.fuse.heads import Heads, flatten_heads, merged, repeated_source, split_heads
from llmc.fuse.masks import recognise
from llmc.fuse.scores import split_mask
from llmc.graph import Dim, Editor, Graph, Node, TensorType, same_dim
from llmc.match import made_by, nodes, only_user, peel_scale, rank, scalar


def fuse_attention(graph: Graph) -> Graph:
    edit = Editor(graph)
    masks: dict[str, Mask] = {}
    for node in nodes(edit, "Attention"):
        _standard(edit, node, masks)
    for node in nodes(edit, "Softmax"):
        _primitive(edit, node, masks)
    return edit.finish()


def _mask(edit: Editor, masks: dict[str, Mask], name: str, batch: Dim, queries: Dim, keys: Dim, heads: int) -> Mask:
    """Layers share their mask: each is recognised once."""
    if not name:
        return Mask()
    if name not in masks:
        masks[name] = recognise(edit, name, batch, queries, keys, heads)
    return masks[name]


# -- ai.onnx Attention (opset 23 and later) --------------------------------------------------------------
def _standard(edit: Editor, node: Node, masks: dict[str, Mask]) -> None:
    q, k, v = node.inputs[:3]
    past = node.input(4), node.input(5)
    if any(node.outputs[3:]) or node.input(6) or node.attrs.get("softmax_precision") not in (None, 1):
        return
    windows = (node.attrs.get(f"{side}_window_size", -1) for side in ("left", "right"))
    if edit.types[q].dtype != "float32" or any(w >= 0 for w in windows):
        return
    four = rank(edit, q) == 4
    H, KV = (
        (edit.types[x].shape[1] for x in (q, k)) if four else (node.attrs["q_num_heads"], node.attrs["kv_num_heads"])
    )
    D, DV = (_head_dim(edit.types[x].shape[-1], 1 if four else n) for x, n in ((q, H), (v, KV)))
    causal = bool(node.attrs.get("is_causal", 0))
    if not isinstance(H, int) or not isinstance(KV, int) or D is None or D != DV or (causal and any(past)):
        return
    B, S = edit.types[q].shape[0], edit.types[q].shape[-2]
    total = edit.types[k].shape[-2] + (edit.types[past[0]].shape[2] if past[0] else 0)
    presents = tuple(node.outputs[1:3]) + ("",) * (3 - len(node.outputs))
    if four and not any((*past, *presents)):  # torch.onnx joins the past itself, and repeats heads for their groups
        k, v = repeated_source(edit, k), repeated_source(edit, v)
        KV, (past_k, new_k), (past_v, new_v) = edit.types[k].shape[1], _past(edit, k), _past(edit, v)
        if past_k and past_v:
            past, presents, (k, v) = (past_k, past_v), (k, v), (new_k, new_v)
    if causal and not same_dim(S, total):
        return  # how a causal mask lies over keys of another number depends on the opset: the operator's rule knows
    mask = _mask(edit, masks, node.input(3), B, S, total, H)
    if causal:
        mask = replace(mask, causal=True, prefix="")
    heads = flatten_heads(edit, q, H), flatten_heads(edit, k, KV), flatten_heads(edit, v, KV)
    if not _same_rope(heads[0], heads[1]):
        return
    out = edit.fresh(f"{node.outputs[0]}.flat") if four else node.outputs[0]
    edit.remove(node)
    attention(
        edit,
        node,
        *heads,
        past=past,
        outputs=(out, presents[0], presents[1]),
        total=total,
        head_dim=D,
        n_kv_heads=KV,
        scale=node.attrs.get("scale") or 1 / math.sqrt(D),
        mask=mask,
        softcap=node.attrs.get("softcap", 0.0),
    )
    if four:
        _restore_heads(edit, out, node.outputs[0], H)


def _head_dim(width: Dim, heads: object) -> int | None:
    return width // heads if isinstance(width, int) and isinstance(heads, int) else None


def _same_rope(q: Heads, k: Heads) -> bool:
    return (q.cos, q.sin, q.interleaved) == (k.cos, k.sin, k.interleaved)


def _restore_heads(edit: Editor, flat: str, name: str, heads: int) -> None:
    """Give readers of [B, H, S, D] what they read: nothing, where they only turn it back."""
    back = merged(edit, name)
    if back is not None:
        edit.replace_uses(back, flat)
    else:
        split_heads(edit, flat, name, heads)


# -- MatMul, Softmax, MatMul ------------------------------------------------------------------------------
def _primitive(edit: Editor, node: Node, masks: dict[str, Mask]) -> None:
    if node.attrs.get("axis", -1) not in (-1, 3) or rank(edit, node.inputs[0]) != 4:
        return
    if edit.types[node.inputs[0]].dtype != "float32":
        return
    weights = _guarded(edit, node.outputs[0])
    product = only_user(edit, weights, "MatMul")
    if product is None or product.inputs[0] != weights:
        return
    outer, scores, mask_name = split_mask(edit, node.inputs[0])
    softcap, scores = _peel_softcap(edit, scores)
    if softcap and outer != 1:
        return
    factor, scores = peel_scale(edit, scores)
    first = made_by(edit, scores, "MatMul")
    if first is None:
        return
    (fq, q), (fk, kt) = (peel_scale(edit, name) for name in first.inputs)
    k_heads = _transposed_keys(edit, kt)
    if k_heads is None:
        return
    fk2, k = peel_scale(edit, k_heads)
    k, v = repeated_source(edit, k), repeated_source(edit, product.inputs[1])
    (past_k, k_new), (past_v, v_new) = _past(edit, k), _past(edit, v)
    if not _fit(edit, q, k, v, node.inputs[0]):
        return
    (B, H, S, D), (_, KV, total, _) = edit.types[q].shape, edit.types[k].shape
    if not (isinstance(H, int) and isinstance(KV, int) and isinstance(D, int)) or edit.types[v].shape[3] != D:
        return
    if bool(past_k) != bool(past_v):
        past_k, past_v, k_new, v_new = "", "", k, v
    mask = _mask(edit, masks, mask_name, B, S, total, H)
    heads = flatten_heads(edit, q, H), flatten_heads(edit, k_new, KV), flatten_heads(edit, v_new, KV)
    if not _same_rope(heads[0], heads[1]) or heads[2].cos:
        return
    flat = edit.fresh(f"{product.outputs[0]}.flat")
    edit.remove(product)
    attention(
        edit,
        node,
        *heads,
        past=(past_k, past_v),
        outputs=(flat, k if past_k else "", v if past_v else ""),
        total=total,
        head_dim=D,
        n_kv_heads=KV,
        scale=outer * factor * fq * fk * fk2,
        mask=mask,
        softcap=softcap,
    )
    _restore_heads(edit, flat, product.outputs[0], H)


def _fit(edit: Editor, q: str, k: str, v: str, scores: str) -> bool:
    """Are queries, keys and values [B, H, S, D], [B, KV, T, D] and [B, KV, T, ...], and the masked scores [B, H, S, T]?
    Products broadcast, but kernels do not."""
    queries, keys, values = (edit.types[name].shape for name in (q, k, v))
    if not len(queries) == len(keys) == len(values) == 4:
        return False
    heads, kv_heads = queries[1], keys[1]
    grouped = isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads == 0
    asked = (*queries[:3], keys[2], queries[0], *keys[1:3])
    found = (*edit.types[scores].shape, keys[0], *values[1:3])
    return grouped and same_dim(values[0], queries[0]) and all(map(same_dim, asked, found))


def _guarded(edit: Editor, name: str) -> str:
    """The softmax after torch's guard, which gives a query that sees no key zeros for NaNs, as our kernels do."""
    readers = edit.consumers.get(name, [])
    test = next((n for n in readers if n.op == "IsNaN"), None)
    choice = only_user(edit, test.outputs[0], "Where") if test is not None else None
    if choice is None or len(readers) != 2 or choice.inputs[2] != name or scalar(edit, choice.inputs[1]) != 0:
        return name
    return choice.outputs[0]


def _peel_softcap(edit: Editor, name: str) -> tuple[float, str]:
    """(c, x) of c * tanh(x / c); (0, x) where there is none."""
    cap, inner = peel_scale(edit, name)
    tanh = made_by(edit, inner, "Tanh")
    if tanh is None:
        return 0.0, name
    divided = made_by(edit, tanh.inputs[0], "Div")
    if divided is None or not math.isclose(scalar(edit, divided.inputs[1]) or 0.0, cap):
        return 0.0, name
    return cap, divided.inputs[0]


def _transposed_keys(edit: Editor, name: str) -> str | None:
    """[B, H, T, D] of keys that arrive as [B, H, D, T]."""
    node = made_by(edit, name, "Transpose")
    if node is None:
        return _transposed_in_three(edit, name)
    perm = list(node.attrs.get("perm", ()))
    if perm == [0, 1, 3, 2]:
        return node.inputs[0]
    if perm != [0, 2, 3, 1]:
        return None
    B, T, H, D = edit.types[node.inputs[0]].shape
    swapped = edit.fresh(f"{name}.bhtd")
    edit.add(
        Node("Transpose", (node.inputs[0],), (swapped,), {"perm": [0, 2, 1, 3]}, version=13),
        [TensorType((B, H, T, D), "float32")],
    )
    return swapped


def _transposed_in_three(edit: Editor, name: str) -> str | None:
    """The same, where batch and heads are one dimension meanwhile: Reshape → Transpose → Reshape."""
    split = made_by(edit, name, "Reshape")
    node = made_by(edit, split.inputs[0], "Transpose") if split is not None else None
    joined = made_by(edit, node.inputs[0], "Reshape") if node is not None else None
    if node is None or joined is None or list(node.attrs.get("perm", ())) != [0, 2, 1]:
        return None
    keys, flat, out = (edit.types[x].shape for x in (joined.inputs[0], joined.outputs[0], name))
    if len(keys) != 4 or len(out) != 4 or len(flat) != 3:
        return None
    same = all(map(same_dim, keys[:2], out[:2])) and all(map(same_dim, keys[2:], flat[1:]))
    return joined.inputs[0] if same else None


def _past(edit: Editor, name: str) -> tuple[str, str]:
    """(past, new) of keys or values to which new ones were appended; ("", all) where there is no past."""
    concat = made_by(edit, name, "Concat")
    if concat is None or len(concat.inputs) != 2 or concat.attrs.get("axis") not in (2, -2):
        return "", name
    return concat.inputs[0], concat.inputs[1]
