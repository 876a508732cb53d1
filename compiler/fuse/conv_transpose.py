"""A transposed convolution of stride s is an ordinary one with s outputs for each of its own (s * s in an image).

Output o = q s + r reads what the taps k = r + t s reach: inputs q - t. So all outputs of one phase r are a convolution
of stride 1 with every s-th tap, in reverse order; the phases are channels of one convolution, and become neighbours by
a reshape, which in the order [B, L, C] moves nothing (Shi et al., "Is the deconvolution layer the same as a
convolutional layer?", arXiv:1609.07009).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmc.fuse.conv import Last, channels_last, padded
from llmc.fuse.heads import shape_value
from llmc.graph import LLMC, Dim, Editor, Node, TensorType
from llmc.match import array

_END = np.iinfo(np.int64).max


def conv_transpose(edit: Editor, node: Node, last: Callable[[str], str]) -> Last | None:
    """A ConvTranspose of float32 with constant weights [C, N, taps...], one group and no dilation."""
    weight, x = array(edit, node.inputs[1]), edit.types[node.inputs[0]]
    bias = array(edit, node.inputs[2]) if node.input(2) else None
    if weight is None or weight.ndim not in (3, 4) or x.dtype != "float32" or (node.input(2) and bias is None):
        return None
    _, N, *size = weight.shape
    n = len(size)
    strides = [int(s) for s in node.attrs.get("strides") or [1] * n]
    pads = [int(p) for p in node.attrs.get("pads") or [0] * (2 * n)]
    extra = [int(p) for p in node.attrs.get("output_padding") or [0] * n]
    taps = [-(-k // s) for k, s in zip(size, strides, strict=True)]
    beyond = [t * s - k + p - e for t, s, k, p, e in zip(taps, strides, size, pads[n:], extra, strict=True)]
    plain = node.attrs.get("auto_pad", "NOTSET") in ("NOTSET", b"NOTSET") and not node.attrs.get("output_shape")
    plain = plain and int(node.attrs.get("group", 1)) == 1 and set(node.attrs.get("dilations") or [1]) == {1}
    if not plain or min(*pads, *beyond) < 0:
        return None

    y, type_ = node.outputs[0], channels_last(edit.types[node.outputs[0]])
    phases = int(np.prod(strides))
    source = padded(edit, last(node.inputs[0]), [(t - 1, t - 1) for t in taps])
    grown = [d + t - 1 for d, t in zip(x.shape[2:], taps, strict=True)]
    B = x.shape[0]
    inputs = [source, edit.constant(f"{node.inputs[1]}.phases", _phases(weight, strides, taps)), "", ""]
    if bias is not None:
        inputs[2] = edit.constant(f"{node.inputs[2]}.phases", np.tile(bias, phases))
    kernel = (1, *taps) if n == 1 else tuple(taps)
    attrs = {"kernel": kernel, "strides": (1, 1), "dilations": (1, 1), "groups": 1, "activation": "none"}

    def step(
        name: str, shape: Sequence[Dim], op: str, inputs: Sequence[str], attrs: dict[str, Any], domain: str
    ) -> str:
        made = edit.fresh(f"{y}.{name}")
        edit.add(Node(op, tuple(inputs), (made,), attrs, domain, node.name, 13), [TensorType(tuple(shape), "float32")])
        return made

    value = step("phases", (B, *grown, phases * N), "Conv", inputs, attrs, LLMC)
    if n == 2:
        split = TensorType((B, *grown, *strides, N), "float32")
        value = step("split", split.shape, "Reshape", (value, shape_value(edit, f"{y}.split", split)), {}, "")
        mixed = (B, grown[0], strides[0], grown[1], strides[1], N)
        value = step("mixed", mixed, "Transpose", (value,), {"perm": [0, 1, 3, 2, 4, 5]}, "")
    whole = TensorType((B, *(d * s for d, s in zip(grown, strides, strict=True)), N), "float32")
    value = step("whole", whole.shape, "Reshape", (value, shape_value(edit, f"{y}.whole", whole)), {}, "")
    ends = [-cut if cut else _END for cut in beyond]
    bounds = [edit.constant(f"{y}.bounds", np.array(b, np.int64)) for b in (pads[:n], ends, range(1, n + 1))]
    value = step("last", type_.shape, "Slice", (value, *bounds), {}, "")
    return Last(value, type_)


def _phases(weight: np.ndarray, strides: Sequence[int], taps: Sequence[int]) -> np.ndarray:
    """[C, N, taps...] -> [phases * N, C, taps of a phase...], every phase's taps in reverse order."""
    C, N, *size = weight.shape
    room = [t * s - k for t, s, k in zip(taps, strides, size, strict=True)]
    full = np.pad(weight, [(0, 0), (0, 0), *((0, r) for r in room)])
    n = len(size)
    split = full.reshape(C, N, *(v for t, s in zip(taps, strides, strict=True) for v in (t, s)))
    # [C, N, t0, s0, t1, s1] -> [s0, s1, N, C, t0, t1]
    order = [*(3 + 2 * i for i in range(n)), 1, 0, *(2 + 2 * i for i in range(n))]
    rows = split.transpose(order).reshape(-1, C, *taps)
    return np.ascontiguousarray(np.flip(rows, axis=tuple(range(2, 2 + n))))
