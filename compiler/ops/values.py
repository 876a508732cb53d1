"""Shape values: integer tensors known at compile time, up to the model's symbols, evaluated instead of compiled.

Exporters compute shapes inside the graph: Shape, Gather, Add, Concat, Reshape … Each rule here evaluates one such
operator on numpy object arrays of ints, bools and TVM expressions, so that none of that arithmetic survives import.
A rule raises `Unknown` where the result would depend on data or on a comparison that cannot be proven.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np

from llmc.errors import ShapeError
from llmc.graph import Node, TensorType, as_dim
from llmc.ops.context import objects
from llmc.tvm_shim import tirx

MAX_ELEMENTS = 4096
MAX_TERMS = 500  # of one value: exporters write a few; what squares a symbol again and again doubles them each time
MAX_FACTOR = 2**40  # of a symbol: more than any dimension has

Values = list[np.ndarray | None]


class Unknown(Exception):
    """The value is not known at compile time."""


class Call:
    """One operator while its value is computed: inputs as object arrays, attributes, and the symbols' analyzer."""

    def __init__(self, node: Node, inputs: Values, types: Sequence[TensorType | None], analyzer: Any) -> None:
        self.node, self.inputs, self.types, self.analyzer = node, inputs, types, analyzer

    def x(self, i: int = 0) -> np.ndarray:
        """Input `i`. Raises Unknown where it is absent or run-time data."""
        value = self.inputs[i] if i < len(self.inputs) else None
        if value is None:
            raise Unknown
        return value

    def attr(self, name: str, default: Any = None) -> Any:
        return self.node.attrs.get(name, default)

    def ints(self, i: int, attribute: str = "") -> list[int] | None:
        """Plain ints from input `i`, or from the attribute that older opsets have instead; None where absent."""
        if attribute and self.attr(attribute) is not None:
            return list(self.attr(attribute))
        if not self.node.input(i):
            return None
        values = list(self.x(i).reshape(-1))
        if not all(isinstance(v, int) for v in values):
            raise Unknown
        return values

    def shape(self) -> tuple[Any, ...]:
        """The shape of input 0, which may be run-time data."""
        type_ = self.types[0]
        if type_ is None:
            raise Unknown
        return type_.shape

    def proven(self, condition: Any) -> bool:
        """A condition's truth. Raises Unknown where it can be neither proven nor refuted."""
        if isinstance(condition, (bool, int)):
            return bool(condition)
        if self.analyzer.can_prove(condition):
            return True
        if self.analyzer.can_prove(tirx.Not(condition)):
            return False
        raise Unknown


def evaluate(
    node: Node, inputs: Values, types: Sequence[TensorType | None], analyzer: Any
) -> list[tuple[np.ndarray, str]] | None:
    """The outputs of `node` as (object array, dtype), None where they are run-time data.

    `inputs` are integer, bool or object arrays, None for run-time data and absent inputs; `types` those of the inputs.
    Raises ShapeError for a value that has grown beyond all that a dimension can be.
    """
    rule = _RULES.get(node.op) if not node.domain else None
    if rule is None:
        return None
    known: Values = [
        objects(v) if v is not None and v.dtype.kind in "iubO" and v.size <= MAX_ELEMENTS else None for v in inputs
    ]
    try:
        result = rule(Call(node, known, types, analyzer))
    except (Unknown, ValueError, TypeError, IndexError, ArithmeticError):
        return None  # data decides it, or the operands make no sense, which the operator's own rule will say
    outputs = result if isinstance(result, list) else [result]
    dtype = _dtype(node, types)
    return [(_simplified(np.asarray(o, object), analyzer, node), dtype) for o in outputs]


def _simplified(array: np.ndarray, analyzer: Any, node: Node) -> np.ndarray:
    out = np.empty(array.shape, object)
    for index, value in np.ndenumerate(array):
        if isinstance(value, (bool, int)):
            out[index] = value
            fits = -(2**63) <= value < 2**63
        else:
            fits = _is_small(value)  # before it is simplified: that may take for ever
            out[index] = as_dim(analyzer.simplify(value)) if fits else None
        if not fits:
            raise ShapeError(
                "its value is too large for a shape",
                where=f"node '{node.name or node.outputs[0]}' ({node.op})",
                hint="the model is damaged, or made to do harm; export it again",
            )
    return out


def _is_small(value: Any) -> bool:
    """Has an expression, counted as a tree, few terms, and no huge factors?"""
    left, terms = [value], 0
    while left and terms <= MAX_TERMS:
        expr = left.pop()
        terms += 1
        if isinstance(expr, tirx.Mul) and any(
            isinstance(e, tirx.IntImm) and abs(int(e)) > MAX_FACTOR for e in (expr.a, expr.b)
        ):
            return False
        left += [
            getattr(expr, part) for part in ("a", "b", "condition", "true_value", "false_value") if hasattr(expr, part)
        ]
        left += list(getattr(expr, "args", ()))
    return terms <= MAX_TERMS


def _dtype(node: Node, types: Sequence[TensorType | None]) -> str:
    if node.op in ("Shape", "Size"):
        return "int64"
    if node.op in _COMPARISONS or node.op in ("Not", "And", "Or"):
        return "bool"
    if node.op == "Cast":
        return str(_CAST_TYPES[node.attrs["to"]])
    if node.op == "ConstantOfShape":
        value = node.attrs.get("value")
        return "float32" if value is None else str(value.dtype.name)
    type_ = types[1] if node.op == "Where" else types[0]
    return type_.dtype if type_ is not None else "int64"


# -- shapes and elementwise arithmetic --------------------------------------------------------------------------
def _shape(call: Call) -> np.ndarray:
    dims = call.shape()
    return _array(dims[slice(call.attr("start", 0), call.attr("end"))])


def _size(call: Call) -> np.ndarray:
    return _array(reduce(operator.mul, call.shape(), 1))


def _elementwise(f: Callable[..., Any]) -> Callable[[Call], np.ndarray]:
    """A rule from a function of scalars; more inputs than it takes are folded from the left (Min, Max, Sum)."""

    def rule(call: Call) -> np.ndarray:
        arrays = [call.x(i) for i in range(len(call.inputs))]
        if len(np.broadcast(*arrays).shape) and np.broadcast(*arrays).size > MAX_ELEMENTS:
            raise Unknown
        if len(arrays) == 1:
            return _map(lambda a: f(call, a), arrays[0])
        return reduce(lambda a, b: _map(lambda x, y: f(call, x, y), a, b), arrays)

    return rule


def _map(f: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
    return _array(np.frompyfunc(f, len(arrays), 1)(*arrays))


def _array(value: Any) -> np.ndarray:
    """Ints and expressions as an object array: numpy must not look inside of an expression."""
    if isinstance(value, np.ndarray):
        return value
    out = np.empty(len(value) if isinstance(value, (tuple, list)) else (), object)
    out[...] = value
    return out


def _divide(call: Call, a: Any, b: Any) -> Any:
    """Integer division, which ONNX truncates towards zero. A symbolic divisor is not 0: nothing would be computed."""
    if isinstance(b, int) and b == 0:
        raise Unknown
    if isinstance(a, int) and isinstance(b, int):
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    if call.proven(a >= 0) and call.proven(b >= 0):
        return a // b
    raise Unknown


def _modulo(call: Call, a: Any, b: Any) -> Any:
    if call.attr("fmod", 0) or (isinstance(b, int) and b == 0) or not call.proven(b >= 0):
        raise Unknown
    return a % b


def _min(call: Call, a: Any, b: Any) -> Any:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else tirx.min(a, b)


def _max(call: Call, a: Any, b: Any) -> Any:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else tirx.max(a, b)


def _equal(call: Call, a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(call.analyzer.can_prove_equal(a, b)) or call.proven(tirx.EQ(*map(_expr, (a, b))))


def _expr(value: Any) -> Any:
    return tirx.IntImm("int64", value) if isinstance(value, int) else value


def _where(call: Call) -> np.ndarray:
    return _map(lambda c, a, b: a if call.proven(c) else b, call.x(0), call.x(1), call.x(2))


def _cast(call: Call) -> np.ndarray:
    target = _CAST_TYPES.get(call.attr("to"))
    if target == "bool":
        return _map(lambda a: not _equal(call, a, 0), call.x())
    if target in ("int32", "int64"):
        return _map(lambda a: int(a) if isinstance(a, bool) else a, call.x())
    raise Unknown


def _reduce(f: Callable[..., Any], initial: int | None = None) -> Callable[[Call], np.ndarray]:
    def rule(call: Call) -> np.ndarray:
        x, axes = call.x(), call.ints(1, "axes")
        if axes is None or not axes:
            if call.attr("noop_with_empty_axes", 0):
                return x
            axes = list(range(x.ndim))
        if not x.size and initial is None:
            raise Unknown
        ufunc = np.frompyfunc(lambda a, b: f(call, a, b), 2, 1)
        for axis in sorted((a % x.ndim for a in axes), reverse=True):
            x = _array(ufunc.reduce(x, axis=axis, initial=initial) if x.size == 0 else ufunc.reduce(x, axis=axis))
            x = np.expand_dims(x, axis) if call.attr("keepdims", 1) else x
        return x

    return rule


# -- movement ---------------------------------------------------------------------------------------------------
def _concat(call: Call) -> np.ndarray:
    return np.concatenate([call.x(i) for i in range(len(call.inputs))], axis=call.attr("axis"))


def _gather(call: Call) -> np.ndarray:
    x, indices = call.x(), call.ints(1)
    axis = call.attr("axis", 0)
    if indices is None or any(not -x.shape[axis] <= i < x.shape[axis] for i in indices):
        raise Unknown
    return np.take(x, np.array(indices, np.int64).reshape(call.x(1).shape), axis=axis)


def _slice(call: Call) -> np.ndarray:
    x, starts, ends = call.x(), call.ints(1, "starts"), call.ints(2, "ends")
    if starts is None or ends is None:
        raise Unknown
    axes = call.ints(3, "axes") or list(range(len(starts)))
    steps = call.ints(4) or [1] * len(starts)
    index = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # Walking backwards, an end below -size means "through the first element", which Python spells None.
        stop = None if step < 0 and end < -x.shape[axis] else end
        index[axis] = slice(start, stop, step)
    return x[tuple(index)]


def _squeeze(call: Call) -> np.ndarray:
    axes = call.ints(1, "axes")
    return np.squeeze(call.x(), None if axes is None else tuple(axes))


def _unsqueeze(call: Call) -> np.ndarray:
    return np.expand_dims(call.x(), tuple(call.ints(1, "axes") or ()))


def _reshape(call: Call) -> np.ndarray:
    x, shape = call.x(), call.ints(1) or []
    if not call.attr("allowzero", 0):
        shape = [x.shape[i] if d == 0 else d for i, d in enumerate(shape)]
    return x.reshape(shape)


def _flatten(call: Call) -> np.ndarray:
    x, axis = call.x(), call.attr("axis", 1)
    return x.reshape(int(np.prod(x.shape[:axis])), -1)


def _transpose(call: Call) -> np.ndarray:
    return np.transpose(call.x(), call.attr("perm"))


def _expand(call: Call) -> np.ndarray:
    x, shape = call.x(), call.ints(1) or []
    shape = list(np.broadcast_shapes(x.shape, tuple(_bounded(shape))))
    return np.broadcast_to(x, _bounded(shape)).copy()


def _tile(call: Call) -> np.ndarray:
    x, repeats = call.x(), call.ints(1) or []
    _bounded([d * r for d, r in zip(x.shape, repeats, strict=True)])
    return np.tile(x, repeats)


def _constant_of_shape(call: Call) -> np.ndarray:
    value = call.attr("value")
    if value is None or value.dtype.kind not in "iub":
        raise Unknown
    return np.full(_bounded(call.ints(0) or []), value.reshape(-1)[0].item(), object)


def _range(call: Call) -> np.ndarray:
    start, limit, delta = ((call.ints(i) or [0])[0] for i in range(3))
    if delta == 0 or (limit - start) // delta > MAX_ELEMENTS:
        raise Unknown
    return _array(list(range(start, limit, delta)))


def _split(call: Call) -> list[np.ndarray]:
    x, axis, sizes = call.x(), call.attr("axis", 0), call.ints(1, "split")
    if sizes is None:
        count = call.attr("num_outputs", len(call.node.outputs))
        size = -(-x.shape[axis] // count)
        return np.split(x, list(range(size, x.shape[axis], size))[: count - 1], axis)
    return np.split(x, np.cumsum(sizes)[:-1], axis)


def _bounded(shape: list[int]) -> list[int]:
    if any(d < 0 for d in shape) or int(np.prod(shape, dtype=object)) > MAX_ELEMENTS:
        raise Unknown
    return shape


_CAST_TYPES = {6: "int32", 7: "int64", 9: "bool"}  # TensorProto.INT32, INT64, BOOL

_COMPARISONS: dict[str, Callable[[Call, Any, Any], Any]] = {
    "Equal": _equal,
    "Less": lambda call, a, b: call.proven(a < b),
    "LessOrEqual": lambda call, a, b: call.proven(a <= b),
    "Greater": lambda call, a, b: call.proven(a > b),
    "GreaterOrEqual": lambda call, a, b: call.proven(a >= b),
}

_RULES: dict[str, Callable[[Call], np.ndarray | list[np.ndarray]]] = {
    "Shape": _shape,
    "Size": _size,
    "Identity": lambda call: call.x(),
    "Add": _elementwise(lambda call, a, b: a + b),
    "Sub": _elementwise(lambda call, a, b: a - b),
    "Mul": _elementwise(lambda call, a, b: a * b),
    "Div": _elementwise(_divide),
    "Mod": _elementwise(_modulo),
    "Neg": _elementwise(lambda call, a: -a),
    "Abs": _elementwise(lambda call, a: a if call.proven(a >= 0) else -a),
    "Min": _elementwise(_min),
    "Max": _elementwise(_max),
    "Sum": _elementwise(lambda call, a, b: a + b),
    **{op: _elementwise(f) for op, f in _COMPARISONS.items()},
    "Not": _elementwise(lambda call, a: not call.proven(a)),
    "And": _elementwise(lambda call, a, b: call.proven(a) and call.proven(b)),
    "Or": _elementwise(lambda call, a, b: call.proven(a) or call.proven(b)),
    "Where": _where,
    "Cast": _cast,
    "ReduceProd": _reduce(lambda call, a, b: a * b, 1),
    "ReduceSum": _reduce(lambda call, a, b: a + b, 0),
    "ReduceMin": _reduce(_min),
    "ReduceMax": _reduce(_max),
    "Concat": _concat,
    "Gather": _gather,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Expand": _expand,
    "Tile": _tile,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Split": _split,
}
