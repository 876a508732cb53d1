"""Convolutional parts of a model work on channels-last tensors, which their kernels read in long runs.

Every convolution and pooling takes and gives [B, H, W, C]. Between them the operators that act element by element, or
along one axis, follow: they are rewritten to the same order, so that transposes are left only where such a part begins
and ends, and nothing at all where a pooling leaves a single pixel. (The idea is that of layout rewriting in compilers
for images, as in Liu et al., "Optimizing CNN Model Inference on CPUs", arXiv:1809.02697.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from llmc.fuse.batch_norm import scale_and_shift
from llmc.fuse.conv import Last, channels_last, conv, global_pool, is_one, pool
from llmc.fuse.conv_transpose import conv_transpose
from llmc.fuse.integer_conv import qlinear_conv
from llmc.graph import LLMC, Editor, Graph, Node
from llmc.match import array, ints, made_by

_ELEMENTWISE = {
    *("Abs", "Add", "Cast", "Ceil", "Clip", "Cos", "Div", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid"),
    *("HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow", "Reciprocal"),
    *("Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish"),
    *("Tanh", "ThresholdedRelu", "Where", "Activation"),
}
_CONVS = {"Conv", "ConvTranspose", "QLinearConv"}
_ONE_SCALE = {"QuantizeLinear", "DequantizeLinear"}  # elementwise where they have one scale and zero point
_QLINEAR = {"QLinearAdd", "QLinearLeakyRelu", "QLinearMul", "QLinearSigmoid"}  # of com.microsoft: always so


def fuse_channels_last(graph: Graph) -> Graph:
    """Rewrites nothing where there is no convolution."""
    if not any(node.op in _CONVS and not node.domain for node in graph.nodes):
        return graph
    rewrite = _Rewrite(Editor(graph))
    for node in graph.nodes:
        rewrite.visit(node)
    return rewrite.edit.finish()


class _Rewrite:
    """`last` holds the channels-last form of every value that has one."""

    def __init__(self, edit: Editor) -> None:
        self.edit = edit
        self.last: dict[str, str] = {}

    def visit(self, node: Node) -> None:
        """Rewrite a node that can be; its own output is then a transpose, which goes if nothing reads it."""
        node = self.edit.producer.get(next(filter(None, node.outputs), ""), node)  # with its present inputs
        if node.op == "Transpose" and list(node.attrs.get("perm", ())) == _first(4):  # the model's own
            self.last[node.outputs[0]] = node.inputs[0]
            return
        made = self._made(node)
        if made is None:
            return
        self.last[node.outputs[0]] = made.name
        back = {"perm": _first(len(made.type.shape))}
        self.edit.add(Node("Transpose", (made.name,), (node.outputs[0],), back, version=13))

    def _made(self, node: Node) -> Last | None:
        if node.domain == "com.microsoft":
            return self._contrib(node)
        if node.domain not in ("", LLMC) or not node.outputs[0]:
            return None
        if node.op == "Conv":
            return conv(self.edit, node, self.of)
        if node.op == "ConvTranspose":
            return conv_transpose(self.edit, node, self.of)
        if node.op == "QLinearConv":
            return qlinear_conv(self.edit, node, self.of)
        follows = [name for name in node.inputs if name in self.last]
        if node.op in ("MaxPool", "AveragePool"):
            return pool(self.edit, node, self.of)
        if not follows:
            return None
        one_scale = node.op in _ONE_SCALE and all(self._is_scalar(name) for name in node.inputs[1:] if name)
        if node.op in _ELEMENTWISE or one_scale:
            return self._elementwise(node)
        handlers: dict[str, Callable[[Node], Last | None]] = {
            "BatchNormalization": self._batch_norm,
            "Concat": self._concat,
            "Flatten": self._one_pixel,
            "GlobalAveragePool": self._global_pool,
            "GlobalMaxPool": self._global_pool,
            "Pad": self._pad,
            "ReduceMean": self._reduce,
            "Reshape": self._one_pixel,
            "Resize": self._resize,
            "Split": self._split,
            "Squeeze": self._squeeze,
            "Transpose": self._transpose,
        }
        handler = handlers.get(node.op)
        return handler(node) if handler is not None and not node.domain else None

    def _contrib(self, node: Node) -> Last | None:
        if not any(name in self.last for name in node.inputs):
            return None
        if node.op == "QLinearGlobalAveragePool" and not node.attrs.get("channels_last", 0):
            return self._like(node, [self.of(node.inputs[0]), *node.inputs[1:]], channels_last=1)
        return self._elementwise(node) if node.op in _QLINEAR else None

    def _is_scalar(self, name: str) -> bool:
        return all(d == 1 for d in self.edit.types[name].shape)

    # -- values -------------------------------------------------------------------------------------------------
    def of(self, name: str) -> str:
        """The channels-last form of a value [B, C, ...]."""
        if name not in self.last:
            type_ = channels_last(self.edit.types[name])
            node = made_by(self.edit, name, "Transpose")
            if node is not None and list(node.attrs.get("perm", ())) == _first(len(type_.shape)):
                self.last[name] = node.inputs[0]
                return node.inputs[0]
            new = self.edit.fresh(f"{name}.last")
            perm = {"perm": _last(len(type_.shape))}
            self.edit.add(Node("Transpose", (name,), (new,), perm, version=13), [type_])
            self.last[name] = new
        return self.last[name]

    def _operand(self, name: str, rank: int) -> str | None:
        """An operand of an elementwise node of `rank`, to be broadcast against channels-last values."""
        dims = len(self.edit.types[name].shape)
        value = array(self.edit, name)
        if name in self.last and dims == rank:
            return self.last[name]
        if dims == 0 or (value is not None and value.size == 1):
            return name
        if value is not None:
            wide = value.reshape((1,) * (rank - value.ndim) + value.shape)
            return self.edit.constant(f"{name}.last", np.ascontiguousarray(wide.transpose(_last(rank))))
        return self.of(name) if dims == rank else None

    def _like(self, node: Node, inputs: Sequence[str], **attrs: object) -> Last:
        """The same operator on channels-last inputs."""
        name, type_ = self.edit.fresh(f"{node.outputs[0]}.last"), channels_last(self.edit.types[node.outputs[0]])
        new = replace(node, inputs=tuple(inputs), outputs=(name,), attrs={**node.attrs, **attrs})
        self.edit.add(new, [type_])
        return Last(name, type_)

    # -- operators ----------------------------------------------------------------------------------------------
    def _elementwise(self, node: Node) -> Last | None:
        rank = len(self.edit.types[node.outputs[0]].shape)
        if rank not in (3, 4):
            return None
        operands = [self._operand(name, rank) if name else "" for name in node.inputs]
        return None if None in operands else self._like(node, [o for o in operands if o is not None])

    def _batch_norm(self, node: Node) -> Last | None:
        found = scale_and_shift(self.edit, node)
        if found is None:
            return None
        scale, shift = (self.edit.constant(f"{node.outputs[0]}.norm", part.astype(np.float32)) for part in found)
        x = self._like(replace(node, op="Mul", attrs={}, version=14), [self.of(node.inputs[0]), scale])
        name = self.edit.fresh(f"{node.outputs[0]}.shifted")
        self.edit.add(Node("Add", (x.name, shift), (name,), version=14), [x.type])
        return Last(name, x.type)

    def _concat(self, node: Node) -> Last | None:
        rank = len(self.edit.types[node.outputs[0]].shape)
        return self._like(node, [self.of(name) for name in node.inputs], axis=_axis(node.attrs["axis"], rank))

    def _split(self, node: Node) -> None:
        """Every output gets a form of its own."""
        rank = len(self.edit.types[node.inputs[0]].shape)
        names = [self.edit.fresh(f"{output}.last") for output in node.outputs]
        types = [channels_last(self.edit.types[output]) for output in node.outputs]
        attrs = {**node.attrs, "axis": _axis(node.attrs.get("axis", 0), rank)}
        inputs = (self.of(node.inputs[0]), *node.inputs[1:])
        self.edit.remove(node)
        self.edit.add(replace(node, inputs=inputs, outputs=tuple(names), attrs=attrs), types)
        for output, name in zip(node.outputs, names, strict=True):
            self.last[output] = name
            self.edit.add(Node("Transpose", (name,), (output,), {"perm": _first(rank)}, version=13))

    def _pad(self, node: Node) -> Last | None:
        pads = ints(self.edit, node.input(1))
        if pads is None or node.input(3):
            return None
        order = _last(len(pads) // 2)
        moved = [pads[a] for a in order] + [pads[len(order) + a] for a in order]
        amounts = self.edit.constant(f"{node.outputs[0]}.pads", np.array(moved, np.int64))
        return self._like(node, [self.of(node.inputs[0]), amounts, *node.inputs[2:3]])

    def _resize(self, node: Node) -> Last | None:
        """Sizes or scales that are constant, of all axes."""
        if (
            node.version < 11
            or node.attrs.get("axes")
            or "tf_crop" in str(node.attrs.get("coordinate_transformation_mode"))
        ):
            return None
        moved = []
        for name in node.inputs[2:]:
            value = array(self.edit, name) if name else None
            if name and (value is None or value.size not in (0, 3, 4)):
                return None
            order = _last(value.size) if value is not None and value.size else []
            moved.append(self.edit.constant(f"{name}.last", value[order]) if value is not None and order else "")
        return self._like(node, [self.of(node.inputs[0]), "", *moved])

    def _reduce(self, node: Node) -> Last | None:
        """A mean over some axes. If they go, what is left is in the old order only where one of them stays."""
        rank = len(self.edit.types[node.inputs[0]].shape)
        axes = node.attrs.get("axes") or (ints(self.edit, node.input(1)) if node.input(1) else None)
        if not axes or (node.version >= 18 and not node.input(1)):
            return None
        moved = sorted(_axis(a, rank) for a in axes)
        x = self.of(node.inputs[0])
        inputs = [x]
        attrs = {k: v for k, v in node.attrs.items() if k != "axes"}
        if node.version >= 18:
            inputs.append(self.edit.constant(f"{node.outputs[0]}.axes", np.array(moved, np.int64)))
        else:
            attrs["axes"] = moved
        plain = replace(node, attrs=attrs)
        if node.attrs.get("keepdims", 1):
            return self._like(plain, inputs)
        if moved == list(range(1, rank - 1)):  # [B, C]
            self.edit.remove(node)
            self.edit.add(replace(plain, inputs=tuple(inputs)))
        return None

    def _global_pool(self, node: Node) -> Last | None:
        return global_pool(self.edit, node, self.of)

    def _one_pixel(self, node: Node) -> None:
        """[B, C, 1, 1] in another shape: its elements lie the same either way."""
        if not is_one(self.edit.types[node.inputs[0]]):
            return
        if node.op == "Flatten" and node.attrs.get("axis", 1) != 1:
            return
        target = ints(self.edit, node.input(1)) if node.op == "Reshape" else None
        if target is not None and 0 in target[1:]:  # copies an extent of the old order
            return
        self._reads(node, self.of(node.inputs[0]))

    def _squeeze(self, node: Node) -> None:
        rank = len(self.edit.types[node.inputs[0]].shape)
        axes = ints(self.edit, node.input(1)) if node.version >= 13 else node.attrs.get("axes")
        if not axes or not is_one(self.edit.types[node.inputs[0]]) or {a % rank for a in axes} != set(range(2, rank)):
            return
        moved = list(range(1, rank - 1))
        axes_name = self.edit.constant(f"{node.outputs[0]}.axes", np.array(moved, np.int64))
        new = Node("Squeeze", (self.of(node.inputs[0]), axes_name), node.outputs, {}, "", node.name, 13)
        self.edit.remove(node)
        self.edit.add(new)

    def _transpose(self, node: Node) -> None:
        """A transpose of a transpose is one, or none."""
        rank = len(self.edit.types[node.inputs[0]].shape)
        perm = node.attrs.get("perm") or list(range(rank))[::-1]
        order = [_axis(a, rank) for a in perm]
        x = self.of(node.inputs[0])
        self.edit.remove(node)
        if order == list(range(rank)):
            self.edit.add(Node("Identity", (x,), node.outputs, {}, "", node.name, 13))
            self.edit.replace_uses(node.outputs[0], x)
        else:
            self.edit.add(Node("Transpose", (x,), node.outputs, {"perm": order}, "", node.name, 13))

    def _reads(self, node: Node, x: str) -> None:
        self.edit.remove(node)
        self.edit.add(replace(node, inputs=(x, *node.inputs[1:])))


def _last(rank: int) -> list[int]:
    """perm that puts the second axis last."""
    return [0, *range(2, rank), 1]


def _first(rank: int) -> list[int]:
    """perm that puts the last axis second."""
    return [0, rank - 1, *range(1, rank - 1)]


def _axis(axis: int, rank: int) -> int:
    """Where axis `axis` of [B, C, ...] is when channels come last."""
    return _last(rank).index(axis % rank)
