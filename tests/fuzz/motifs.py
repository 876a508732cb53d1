"""Steps that write what exporters write: norms, feed-forward layers, embeddings. Attention has a file of its own."""

from __future__ import annotations

import numpy as np

from tests.fuzz import attention, recurrent
from tests.fuzz.matrices import product_error
from tests.fuzz.program import MS, Dim, Value
from tests.fuzz.quantised import LIMITS
from tests.fuzz.reduce import norm_error
from tests.fuzz.sketch import ULPS, UNIT, Sketch, errors, size_of


def hidden(s: Sketch) -> Value:
    """A hidden state [batch, sequence, width]."""
    sizes: list[Dim] = [
        s.symbol("N", 1, 3) if s.chance(50) else s.choice([1, 2]),
        s.symbol("S") if s.chance(50) else s.choice([1, 3, 5]),
    ]
    return s.input("float32", [*sizes, s.choice([8, 16, 24, 32])], -1, 1)


def linear(s: Sketch, x: Value, n: int, bias: bool = False) -> Value:
    """x times a weight, in one of the ways to write that."""
    k = x.shape[-1]
    assert isinstance(k, int)
    turned = s.chance(40)
    w = s.constant("float32", [n, k] if turned else [k, n], -(k**-0.5), k**-0.5)
    if turned:
        w = s.moved("Transpose", w, [k, n], perm=[1, 0])
    most = k * size_of(x) * size_of(w)
    y = s.smooth("MatMul", [x, w], [*x.shape[:-1], n], -most, most, product_error(x, w, k))
    if not bias:
        return y
    pair = [y, s.constant("float32", (n,), -1, 1)]
    return s.smooth("Add", pair if s.chance(70) else pair[::-1], y.shape, y.low - 1, y.high + 1, errors(y))


def number(s: Sketch, value: float) -> Value:
    """A constant as exporters store it: a scalar, or one element of a tensor."""
    return s.given(s.choice([value, value, [value], [[[value]]]]), "float32")


# -- activations --------------------------------------------------------------------------------------------------
def gated(s: Sketch, x: Value, kind: str) -> Value:
    """x times a function of x within [0, 1]: SiLU and its kin; each has a slope below 1.2."""
    factor = {"sigmoid": 1.0, "quick": 1.702}[kind]
    inner = x
    if kind == "quick":
        inner = s.smooth("Mul", [x, number(s, factor)], x.shape, x.low * factor, x.high * factor, errors(x) * factor)
    gate = s.smooth("Sigmoid", [inner], x.shape, 0, 1, errors(inner) * 0.25)
    return times(s, x, gate, -0.3, max(x.high, 0.0), 1.2 * errors(x))


def times(s: Sketch, a: Value, b: Value, low: float, high: float, error: np.ndarray) -> Value:
    """A product with its factors in either order."""
    own = ULPS * UNIT["float32"] * max(size_of(a), 1.0)
    return s.smooth("Mul", [a, b] if s.chance(50) else [b, a], a.shape, low, high, error + own)


def gelu_by_erf(s: Sketch, x: Value) -> Value:
    """0.5 x (1 + erf(x / sqrt 2)), multiplied in one of three orders."""
    root = 2**0.5
    if s.chance(50):
        inner = s.smooth("Div", [x, number(s, root)], x.shape, x.low / root, x.high / root, errors(x))
    else:
        inner = s.smooth("Mul", [x, number(s, 1 / root)], x.shape, x.low / root, x.high / root, errors(x))
    erf = s.smooth("Erf", [inner], x.shape, -1, 1, errors(inner) * 1.13)
    return _half_of(s, x, s.smooth("Add", [erf, number(s, 1.0)], x.shape, 0, 2, errors(erf)))


def gelu_by_tanh(s: Sketch, x: Value) -> Value:
    """0.5 x (1 + tanh(0.797 (x + 0.0447 x^3))), its cube as a power or as products."""
    cube_high = size_of(x) ** 3
    slope = 3 * size_of(x) ** 2
    if s.chance(50):
        cube = s.smooth("Pow", [x, number(s, 3.0)], x.shape, -cube_high, cube_high, errors(x) * slope)
    else:
        square = s.smooth("Mul", [x, x], x.shape, 0, size_of(x) ** 2, errors(x) * 2 * size_of(x))
        cube = s.smooth("Mul", [square, x], x.shape, -cube_high, cube_high, errors(x) * slope)
    small = s.smooth(
        "Mul", [cube, number(s, 0.044715)], x.shape, -0.045 * cube_high, 0.045 * cube_high, errors(cube) * 0.045
    )
    most = size_of(x) + size_of(small)
    both = s.smooth("Add", [x, small], x.shape, -most, most, errors(x, small))
    inner = s.smooth("Mul", [both, number(s, 0.7978845608)], x.shape, -most, most, errors(both))
    tanh = s.smooth("Tanh", [inner], x.shape, -1, 1, errors(inner))
    return _half_of(s, x, s.smooth("Add", [tanh, number(s, 1.0)], x.shape, 0, 2, errors(tanh)))


def _half_of(s: Sketch, x: Value, factor: Value) -> Value:
    """x times the factor times a half, in some order."""
    error = 1.2 * errors(x) + errors(factor) * size_of(x)
    high = max(x.high, 0.0)
    if s.chance(50):
        half = s.node("Mul", [x, number(s, 0.5)], "float32", x.shape, x.low / 2, x.high / 2, errors(x) / 2)
        return times(s, half, factor, -0.2, high, error)
    whole = times(s, x, factor, -0.4, 2 * high, 2 * error)
    return s.node("Mul", [whole, number(s, 0.5)], "float32", x.shape, -0.2, high, errors(whole) / 2)


def activation(s: Sketch, x: Value) -> Value:
    kind = s.choice(["silu", "quick", "erf", "tanh", "Gelu", "Relu", "FastGelu", "QuickGelu", "BiasGelu"])
    high = max(x.high, 0.0)
    if kind == "silu":
        return gated(s, x, "sigmoid")
    if kind == "quick":
        return gated(s, x, "quick")
    if kind == "erf":
        return gelu_by_erf(s, x)
    if kind == "tanh" and size_of(x) <= 8:
        return gelu_by_tanh(s, x)
    if kind == "Relu":
        return s.node("Relu", [x], "float32", x.shape, 0, high, x.error)
    if kind == "BiasGelu":
        bias = s.constant("float32", [d for d in x.shape[-1:] if isinstance(d, int)], -1, 1)
        return s.smooth(kind, [x, bias], x.shape, -0.2, high + 1, 1.2 * errors(x) + 1e-6, domain=MS)
    if kind in ("FastGelu", "QuickGelu"):
        return s.smooth(kind, [x], x.shape, -0.3, high, 1.2 * errors(x) + 1e-6, domain=MS)
    approximate = s.choice(["none", "tanh"])
    return s.smooth("Gelu", [x], x.shape, -0.2, high, 1.2 * errors(x) + 1e-6, approximate=approximate)


# -- norms --------------------------------------------------------------------------------------------------------
def rms_norm(s: Sketch, x: Value) -> Value:
    """x / sqrt(mean(x^2) + e) times a weight, spelled out or as an operator."""
    k = x.shape[-1]
    assert isinstance(k, int)
    epsilon, weight = s.choice([1e-5, 1e-3]), s.constant("float32", (k,), 0.5, 1.5)
    error, most = norm_error(x, k, epsilon, 1.5), 1.5 * k**0.5
    if s.chance(25):
        s.opset = 23
        return s.smooth("RMSNormalization", [x, weight], x.shape, -most, most, error, axis=-1, epsilon=epsilon)
    two = number(s, 2.0)
    top = size_of(x) ** 2
    pair, op = ([x, two], "Pow") if s.chance(60) else ([x, x], "Mul")
    square = s.smooth(op, pair, x.shape, 0, top, errors(x) * 2 * size_of(x))
    mean = _mean(s, square)
    added = s.smooth("Add", [mean, number(s, epsilon)], mean.shape, epsilon * 0.99, top + epsilon, errors(mean))
    slope = 0.5 / epsilon**0.5
    root = s.smooth("Sqrt", [added], mean.shape, epsilon**0.5 * 0.99, size_of(x) + 0.1, errors(added) * slope)
    scaled = _over(s, x, root, k**0.5, norm_error(x, k, epsilon, 1))
    return s.smooth("Mul", [scaled, weight] if s.chance(50) else [weight, scaled], x.shape, -most, most, error)


def layer_norm(s: Sketch, x: Value) -> Value:
    """(x - mean) / sqrt(variance + e) times a weight plus a bias, spelled out."""
    k = x.shape[-1]
    assert isinstance(k, int)
    epsilon = s.choice([1e-5, 1e-3])
    mean = _mean(s, x)
    wide = x.high - x.low
    centred = s.smooth("Sub", [x, mean], x.shape, -wide, wide, errors(x, mean))
    top = wide**2
    pair, op = ([centred, number(s, 2.0)], "Pow") if s.chance(60) else ([centred, centred], "Mul")
    square = s.smooth(op, pair, x.shape, 0, top, errors(centred) * 2 * wide)
    variance = _mean(s, square)
    added = s.smooth(
        "Add", [variance, number(s, epsilon)], variance.shape, epsilon * 0.99, top + epsilon, errors(variance)
    )
    root = s.smooth("Sqrt", [added], added.shape, epsilon**0.5 * 0.99, wide + 0.1, errors(added) * 0.5 / epsilon**0.5)
    scaled = _over(s, centred, root, k**0.5, norm_error(x, k, epsilon, 1))
    error, most = norm_error(x, k, epsilon, 1.5), 1.5 * k**0.5
    weighted = s.smooth("Mul", [scaled, s.constant("float32", (k,), 0.5, 1.5)], x.shape, -most, most, error)
    bias = s.constant("float32", (k,), -1, 1)
    return s.smooth("Add", [weighted, bias], x.shape, -most - 1, most + 1, error)


def _mean(s: Sketch, x: Value) -> Value:
    k = x.shape[-1]
    assert isinstance(k, int)
    error = errors(x) + k * UNIT["float32"] * size_of(x)
    return s.smooth("ReduceMean", [x, s.given([-1])], [*x.shape[:-1], 1], x.low, x.high, error, keepdims=1)


def _over(s: Sketch, x: Value, root: Value, most: float, error: np.ndarray) -> Value:
    """x / root, or x times the inverse of the root."""
    if s.chance(50):
        return s.smooth("Div", [x, root], x.shape, -most, most, error)
    high = 1 / root.low
    carried = errors(root) * high**2
    if s.chance(50):
        inverse = s.smooth("Reciprocal", [root], root.shape, 0, high, carried)
    else:
        inverse = s.smooth("Div", [number(s, 1.0), root], root.shape, 0, high, carried)
    return s.smooth("Mul", [x, inverse], x.shape, -most, most, error)


def any_norm(s: Sketch, x: Value) -> Value:
    return s.choice([rms_norm, layer_norm])(s, x)


# -- layers -------------------------------------------------------------------------------------------------------
def feed_forward(s: Sketch) -> None:
    """A norm, up and down, perhaps with a gate, and the residual."""
    x = hidden(s)
    k, inner = x.shape[-1], s.choice([8, 24, 40])
    assert isinstance(k, int)
    h = any_norm(s, x) if s.chance(70) else x
    up = s.bounded(linear(s, h, inner, s.chance(50)), 16)
    a = activation(s, up)
    if s.chance(50):
        other = linear(s, h, inner)
        most = size_of(a) * size_of(other)
        a = s.smooth("Mul", [a, other], a.shape, -most, most, errors(a) * size_of(other) + errors(other) * size_of(a))
    residual(s, x, linear(s, a, k, s.chance(50)))


def residual(s: Sketch, x: Value, y: Value) -> Value:
    return s.smooth("Add", [x, y] if s.chance(50) else [y, x], x.shape, x.low + y.low, x.high + y.high, errors(x, y))


def norm_chain(s: Sketch) -> None:
    """Norms with residuals around a linear layer."""
    x = hidden(s)
    k = x.shape[-1]
    assert isinstance(k, int)
    h = residual(s, x, linear(s, any_norm(s, x), k))
    if s.chance(70):
        any_norm(s, h)


def embedding(s: Sketch) -> None:
    """A table that is also the output layer's weight; it may be stored as integers."""
    vocab, width = s.choice([11, 32, 50]), s.choice([8, 16, 32])
    ids = s.input(s.choice(["int64", "int64", "int32"]), s.shape(s.integer(1, 2)), 0, vocab - 1)
    if s.chance(40):
        dtype = s.choice(["int8", "uint8"])
        codes = s.constant(dtype, [vocab, width], *LIMITS[dtype])
        rows = s.chance(50)
        scales = s.constant("float32", [vocab] if rows else [], 0.005, 0.01)
        more = [s.given([128] * vocab if rows else 128, dtype)] if dtype == "uint8" else []
        attrs = {"axis": 0} if rows else {}
        table = s.node(
            "DequantizeLinear", [codes, scales, *more], "float32", [vocab, width], -1.3, 1.3, [1e-7] * 2, **attrs
        )
    else:
        table = s.constant("float32", [vocab, width], -1, 1)
    x = s.moved("Gather", table, [*ids.shape, width], [ids], axis=0)
    h = residual(s, x, linear(s, any_norm(s, x), width)) if s.chance(50) and len(x.shape) == 3 else x
    head = s.moved("Transpose", table, [width, vocab], perm=[1, 0])
    most = width * size_of(h) * size_of(table)
    s.smooth("MatMul", [h, head], [*ids.shape, vocab], -most, most, product_error(h, head, width))


def merged_linears(s: Sketch) -> None:
    """Several linear layers of one input, with a value of the middle that others read, too."""
    x = hidden(s)
    for _ in range(s.integer(2, 3)):
        y = linear(s, x, s.choice([4, 8, 16]), s.chance(50))
        if s.chance(40):
            activation(s, y)
        if s.chance(20):
            residual(s, y, s.operand("float32", y.shape))


STEPS = [feed_forward, feed_forward, norm_chain, embedding, merged_linears, *attention.STEPS, *recurrent.STEPS]
