"""Steps that compute each element from those at the same place, broadcasting where ONNX does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.fuzz.program import Dim, Value, element_type
from tests.fuzz.sketch import FLOATS, UNIT, Sketch, errors, exact, size_of

INTS = ("int64", "int32", "int8", "uint8")
NUMBERS = (*FLOATS, "int64", "int32")
WHOLE = 10_000  # magnitude that integer arithmetic stays within, so that no type overflows but the narrow ones


def broadcast_operand(s: Sketch, x: Value, low: float = -2, high: float = 2, dtype: str = "") -> Value:
    """A known or new value whose shape broadcasts to x's."""
    fits = [
        v
        for v in s.values.values()
        if v.dtype == (dtype or x.dtype)
        and v.name not in s.constants
        and v is not x
        and low <= v.low
        and v.high <= high
        and len(v.shape) <= len(x.shape)
        and all(a in (1, b) for a, b in zip(v.shape[::-1], x.shape[::-1], strict=False))
        and s.usable(v)
    ]
    if fits and s.chance(60):
        return s.choice(fits)
    shape: list[Dim] = [1 if s.chance(20) else d for d in x.shape]
    return s.operand(dtype or x.dtype, shape[s.integer(0, len(shape)) if s.chance(40) else 0 :], low, high)


# -- one input ----------------------------------------------------------------------------------------------------
# Operator -> least and greatest argument, the function at an interval's ends (None: the range that follows), its slope.
Ends = Callable[[float], float]
_SIGMOID: Ends = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
SMOOTH: dict[str, tuple[float, float, Ends | tuple[float, float], Callable[[float, float], float]]] = {
    "Sigmoid": (-64, 64, _SIGMOID, lambda a, b: 0.25),
    "Tanh": (-64, 64, np.tanh, lambda a, b: 1),
    "Erf": (-64, 64, (-1, 1), lambda a, b: 1.13),
    "Softplus": (-32, 32, lambda x: np.log1p(np.exp(x)), lambda a, b: 1),
    "Softsign": (-64, 64, lambda x: x / (1 + abs(x)), lambda a, b: 1),
    "Sin": (-16, 16, (-1, 1), lambda a, b: 1),
    "Cos": (-16, 16, (-1, 1), lambda a, b: 1),
    "Tan": (-1, 1, np.tan, lambda a, b: 3.5),
    "Atan": (-64, 64, np.arctan, lambda a, b: 1),
    "Asin": (-0.9, 0.9, np.arcsin, lambda a, b: 2.3),
    "Acos": (-0.9, 0.9, np.arccos, lambda a, b: 2.3),
    "Sinh": (-3, 3, np.sinh, lambda a, b: 10.1),
    "Asinh": (-64, 64, np.arcsinh, lambda a, b: 1),
    "Acosh": (1.25, 64, np.arccosh, lambda a, b: 1.4),
    "Atanh": (-0.9, 0.9, np.arctanh, lambda a, b: 5.3),
    "Exp": (-16, 3, np.exp, lambda a, b: float(np.exp(b))),
    "Log": (0.25, 64, np.log, lambda a, b: 1 / a),
    "Sqrt": (0.25, 64, np.sqrt, lambda a, b: 1),
    "Reciprocal": (0.25, 64, lambda x: 1 / x, lambda a, b: 1 / a**2),
    "HardSigmoid": (-64, 64, (0, 1), lambda a, b: 0.2),
    "HardSwish": (-64, 64, (-0.4, 64), lambda a, b: 1.5),
    "Elu": (-16, 64, (-1, 64), lambda a, b: 1),
    "Selu": (-16, 32, (-1.8, 34), lambda a, b: 1.8),
    "Celu": (-16, 64, (-1, 64), lambda a, b: 1),
    "Mish": (-16, 64, (-0.4, 64), lambda a, b: 1.1),
    "Gelu": (-64, 64, (-0.2, 64), lambda a, b: 1.13),
}
NO_HALF = {
    "Tan",
    "Asin",
    "Acos",
    "Sinh",
    "Asinh",
    "Acosh",
    "Atanh",
    "Atan",
    "Erf",
    "Celu",
}  # too steep, or onnxruntime has none


def within(s: Sketch, x: Value, low: float, high: float) -> Value:
    """x, or an exact or rounded image of x within [low, high]."""
    if low <= x.low and x.high <= high:
        return x
    if low > 0:
        x = s.positive(x, low)
    return x if low <= x.low and x.high <= high else clipped(s, x, low, high)


def clipped(s: Sketch, x: Value, low: float, high: float) -> Value:
    bounds = [s.given(low, x.dtype), s.given(high, x.dtype)]
    return s.node("Clip", [x, *bounds], x.dtype, x.shape, max(x.low, low), max(low, min(x.high, high)), x.error)


def smooth(s: Sketch) -> None:
    x = s.pick()
    op = s.choice([k for k in SMOOTH if x.dtype == "float32" or k not in NO_HALF])
    least, greatest, ends, slope = SMOOTH[op]
    x = within(s, x, least, greatest)
    if isinstance(ends, tuple):
        low, high = ends[0], min(ends[1], max(1.0, size_of(x) * 1.1))
    else:
        low, high = sorted((float(ends(x.low)), float(ends(x.high))))
    attrs: dict[str, Any] = {}
    if op == "Gelu":
        attrs = {"approximate": s.choice(["none", "tanh"])}
    s.smooth(op, [x], x.shape, low, high, errors(x) * slope(x.low, x.high), **attrs)


def simple(s: Sketch) -> None:
    """Exact on whatever error its argument has."""
    x = s.pick(NUMBERS)
    op = s.choice(["Neg", "Abs", "Relu", "Clip", "Identity", "LeakyRelu"])
    if op == "LeakyRelu" and x.dtype in FLOATS:
        s.smooth(op, [x], x.shape, min(x.low, 0) * 0.5, max(x.high, 0), errors(x), alpha=0.5)
    elif op == "Clip":
        low, high = sorted(s.some([-3, -1, 0, 1, 2], 2)[:2])
        limits = [s.given(low, x.dtype), s.given(high, x.dtype)]
        absent = s.integer(0, 3) if x.dtype in FLOATS else 0
        if absent == 1:
            s.node("Clip", [x, limits[0]], x.dtype, x.shape, max(x.low, low), max(x.high, low), x.error)
        elif absent == 2:
            s.node("Clip", [x, None, limits[1]], x.dtype, x.shape, min(x.low, high), min(x.high, high), x.error)
        else:
            s.node("Clip", [x, *limits], x.dtype, x.shape, low, high, x.error)
    elif op == "Neg":
        s.node(op, [x], x.dtype, x.shape, -x.high, -x.low, x.error)
    elif op == "Identity":
        s.moved(op, x, x.shape)
    else:
        op = "Abs" if op == "Abs" or x.dtype == "int64" else "Relu"  # onnxruntime has no Relu of int64
        low = 0 if op == "Abs" else max(x.low, 0)
        s.node(op, [x], x.dtype, x.shape, low, size_of(x), x.error)


def jump(s: Sketch) -> None:
    """A function that jumps, of an exact value."""
    x = s.exact((*FLOATS, "int64", "int32"))
    ops = ["Sign", "Sign", "cast"] if x.dtype in INTS else ["Floor", "Ceil", "Round", "Sign", "ThresholdedRelu", "cast"]
    op = s.choice(ops)
    if op == "cast":
        cast(s, x)
    elif op == "ThresholdedRelu":
        s.node(op, [x], x.dtype, x.shape, 0, max(x.high, 0), alpha=0.5)
    else:
        low, high = (-1.0, 1.0) if op == "Sign" else (np.floor(x.low), np.ceil(x.high))
        s.node(op, [x], x.dtype, x.shape, low, high)


def cast(s: Sketch, x: Value | None = None) -> None:
    """To another type that holds the values; of floats that are rounded, between floats only."""
    x = x or s.pick((*FLOATS, *INTS, "bool"))
    targets = [*FLOATS, *((*INTS, "bool") if exact(x) else ())]
    if x.low < 0:
        targets = [t for t in targets if t != "uint8"]
    if size_of(x) > 100:
        targets = [t for t in targets if not t.endswith("int8")]
    if size_of(x) > 2000:
        targets = [t for t in targets if t != "float16"]
    targets = [t for t in targets if t != x.dtype]
    if not targets:
        return
    dtype = s.choice(targets)
    low, high = (x.low, x.high) if dtype != "bool" else (0, 1)
    error = errors(x)
    if dtype in FLOATS and dtype == "float16":
        error = error + (UNIT[dtype] * size_of(x) if x.dtype in FLOATS else 0)
    elif dtype in INTS:
        low, high = np.trunc(low), np.trunc(high)
    s.node("Cast", [x], dtype, x.shape, low, high, error, to=element_type(dtype))


# -- several inputs -----------------------------------------------------------------------------------------------
def binary(s: Sketch) -> None:
    """Arithmetic on two broadcast operands, in either order."""
    x = s.bounded(s.pick(NUMBERS))
    op = s.choice(["Add", "Sub", "Mul", "Add", "Mul", "Div", "Min", "Max", "Pow", "PRelu", "Mean", "Sum", "Mod"])
    whole = x.dtype not in FLOATS
    if op == "Div" or (op == "Mod" and whole):
        y = broadcast_operand(s, x, 1 if whole else 0.5, 5)
        if op == "Mod":
            x, y = (x, y) if exact(x) else (y, y)
            s.node(op, [x, y], x.dtype, x.shape, 0, y.high)
        elif whole:
            s.node(op, [x, y], x.dtype, x.shape, min(x.low, 0), max(x.high, 0))
        else:
            error = errors(x) / y.low + size_of(x) / y.low**2 * errors(y)
            ends = [a / b for a in (x.low, x.high) for b in (y.low, y.high)]
            s.smooth(op, [x, y], x.shape, min(ends), max(ends), error)
        return
    if op == "Pow" and not whole:
        x = within(s, x, 0.25, 4)
        power = s.choice([0.5, 2.0, 3.0, -1.0])
        ends = sorted((x.low**power, x.high**power))
        slope = abs(power) * max(x.low ** (power - 1), x.high ** (power - 1))
        s.smooth(op, [x, s.given(power, x.dtype)], x.shape, *ends, errors(x) * slope)
        return
    if op == "PRelu" and not whole:
        slope_ = s.operand(x.dtype, x.shape[s.integer(0, len(x.shape)) :], -1, 1)
        s.smooth(op, [x, slope_], x.shape, -size_of(x), size_of(x), errors(x))
        return
    y = s.bounded(broadcast_operand(s, x, -64, 64) if s.chance(50) else broadcast_operand(s, x))
    pair = [x, y] if s.chance(50) else [y, x]
    if op in ("Min", "Max"):
        pick = min if op == "Min" else max
        s.node(op, pair, x.dtype, x.shape, pick(x.low, y.low), pick(x.high, y.high), np.maximum(x.error, y.error))
    elif op in ("Mean", "Sum") and not whole:
        scale = 0.5 if op == "Mean" else 1.0
        bounds = (x.low + y.low) * scale, (x.high + y.high) * scale
        s.smooth(op, pair, x.shape, *bounds, errors(x, y) * scale)
    elif op == "Mul" and (whole or x.dtype == "float32"):
        most = size_of(x) * size_of(y)
        if not whole or most < WHOLE:
            _arithmetic(s, op, pair, x, -most, most, errors(x) * size_of(y) + errors(y) * size_of(x))
    elif op == "Sub":
        a, b = pair
        _arithmetic(s, op, pair, x, a.low - b.high, a.high - b.low, errors(x, y))
    else:
        _arithmetic(s, "Add", pair, x, x.low + y.low, x.high + y.high, errors(x, y))


def _arithmetic(s: Sketch, op: str, pair: list[Value], x: Value, low: float, high: float, error: np.ndarray) -> None:
    if x.dtype in FLOATS:
        s.smooth(op, pair, x.shape, low, high, error)
    else:
        s.node(op, pair, x.dtype, x.shape, low, high)


def outer(s: Sketch) -> None:
    """Both operands are stretched: [.., a, 1] with [.., 1, b]."""
    x = s.bounded(s.pick(), 8)
    if not x.shape or s.most(x.shape) > 200:
        return
    column = s.moved("Unsqueeze", x, (*x.shape, 1), [s.given([-1])])
    row = s.operand(x.dtype, (s.choice([2, 3, 5]),), 0.5, 2)
    op = s.choice(["Add", "Mul", "Sub"])
    shape = (*x.shape, row.shape[0])
    s.smooth(op, [column, row], shape, -2 * size_of(x) - 2, 2 * size_of(x) + 2, 2 * errors(x))


def compare(s: Sketch) -> None:
    x = s.exact((*FLOATS, "int64", "int32"))
    y = broadcast_operand(s, x, -1, 1)
    if not exact(y):
        return
    op = s.choice(["Less", "Greater", "LessOrEqual", "GreaterOrEqual", "Equal"])
    s.node(op, [x, y] if s.chance(70) else [y, x], "bool", x.shape, 0, 1)


def truth(s: Sketch) -> Value:
    """A boolean, made by a comparison or fed."""
    return s.pick(("bool",))


def logic(s: Sketch) -> None:
    x = truth(s)
    op = s.choice(["And", "Or", "Xor", "Not"])
    s.node(op, [x] if op == "Not" else [x, broadcast_operand(s, x, 0, 1)], "bool", x.shape, 0, 1)


def bits(s: Sketch) -> None:
    x = s.input(s.choice(["int32", "uint8", "int64"]), s.shape(), 0, 100)
    op = s.choice(["BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot"])
    if op == "BitwiseNot":
        low, high = (155, 255) if x.dtype == "uint8" else (-101, -1)
        s.node(op, [x], x.dtype, x.shape, low, high)
    else:
        s.node(op, [x, broadcast_operand(s, x, 0, 100)], x.dtype, x.shape, 0, 127)


def where(s: Sketch) -> None:
    x = s.pick((*FLOATS, "int64", "int32"))
    y = broadcast_operand(s, x)
    condition = broadcast_operand(s, x, 0, 1, "bool")
    pair = [x, y] if s.chance(50) else [y, x]
    error = np.maximum(x.error, y.error)
    s.node("Where", [condition, *pair], x.dtype, x.shape, min(x.low, y.low), max(x.high, y.high), error)


STEPS = [smooth, smooth, smooth, simple, jump, cast, binary, binary, binary, binary, outer, compare, logic, bits, where]
