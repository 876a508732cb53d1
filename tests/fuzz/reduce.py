"""Steps that reduce axes, or normalise along them."""

from __future__ import annotations

import numpy as np

from tests.fuzz.elementwise import within
from tests.fuzz.program import MS, Dim, Value
from tests.fuzz.shapes import any_axis
from tests.fuzz.sketch import FLOATS, ULPS, UNIT, Sketch, errors, size_of


def summed(x: Value, count: int, factor: float = 1.0) -> np.ndarray:
    """The error of a sum of `count` elements, each off by x's error."""
    return count * errors(x) + count * count * UNIT[x.dtype] * size_of(x) * factor


def reduce_(s: Sketch) -> None:
    """One of the Reduce family, over some axes or all."""
    x = s.pick(FLOATS) if s.chance(80) else s.exact(("int64", "int32"))
    whole = x.dtype not in FLOATS
    axes = s.some(range(len(x.shape)), 0) if x.shape else []
    keep = s.integer(0, 1)
    dropped = axes or list(range(len(x.shape)))
    shape: list[Dim] = [1 if i in dropped else d for i, d in enumerate(x.shape) if keep or i not in dropped]
    count = s.most([x.shape[i] for i in dropped])
    ops = ["Sum", "Max", "Min", "Mean"] if whole else ["Sum", "Mean", "Max", "Min", "L1", "L2", "SumSquare"]
    op = s.choice(ops if whole or x.dtype == "float16" else [*ops, "LogSum", "LogSumExp", "Prod"])
    if whole and op == "Mean":
        op = "Sum"
    if x.dtype == "float16" and count > 40:
        op = s.choice(["Max", "Min"])
    if op == "LogSum":
        x = s.positive(x)
    if op in ("Prod", "LogSumExp", "SumSquare", "L2"):
        x = within(s, x, -2, 2)
    if op == "Prod" and count > 8:
        op = "Mean"
    most, error = size_of(x), summed(x, count)
    power = max(most, 1.0) ** min(count, 8)
    bounds = {
        "Sum": (x.low * count, x.high * count) if count else (0, 0),
        "Mean": (x.low, x.high),
        "Max": (x.low, x.high),
        "Min": (x.low, x.high),
        "L1": (0, most * count),
        "L2": (0, most * count**0.5),
        "SumSquare": (0, most**2 * count),
        "LogSum": (np.log(max(x.low, 1e-3)), np.log(max(x.high, 0.01) * count)),
        "LogSumExp": (x.low, x.high + np.log(count)),
        "Prod": (-power, power),
    }[op]
    if op == "Sum":
        bounds = min(x.low, bounds[0]), max(x.high, bounds[1])
    error = (
        {
            "Mean": error / count,
            "Max": errors(x),
            "Min": errors(x),
            "L2": errors(x) * count**0.5 + UNIT[x.dtype] * count**1.5 * most if not whole else error,
            "SumSquare": summed(x, count, most) + errors(x) * 2 * most * count if not whole else error,
            "LogSum": error / (count * max(x.low, 0.1)),
            "LogSumExp": errors(x) + ULPS * count * UNIT["float32"],
            "Prod": (errors(x) + ULPS * UNIT["float32"]) * count * power,
        }.get(op, error)
        if not whole
        else np.zeros(2)
    )
    more = [s.given([any_axis(s, x, a) for a in axes])] if axes else []
    if op in ("Max", "Min") or whole:
        s.node(f"Reduce{op}", [x, *more], x.dtype, shape, *bounds, error, keepdims=keep)
    else:
        s.smooth(f"Reduce{op}", [x, *more], shape, *bounds, error, keepdims=keep)


def softmax(s: Sketch) -> None:
    x = within(s, s.pick(FLOATS, 1), -16, 16)
    axis = s.choice([len(x.shape) - 1, s.integer(0, len(x.shape) - 1)])
    count = s.most([x.shape[axis]])
    op = s.choice(["Softmax", "Softmax", "LogSoftmax"])
    low, high = (0, 1) if op == "Softmax" else (x.low - x.high - np.log(count) - 1e-3, 1e-3)
    error = 2 * errors(x) + (count + 2 * size_of(x)) * UNIT[x.dtype]
    s.smooth(op, [x], x.shape, low, high, error, axis=any_axis(s, x, axis))


def accumulate(s: Sketch) -> None:
    x = s.pick(("float32", "int64", "int32"), 1)
    axis = s.integer(0, len(x.shape) - 1)
    count = s.most([x.shape[axis]])
    attrs = {"exclusive": s.integer(0, 1), "reverse": s.integer(0, 1)}
    most = count * size_of(x)
    error = summed(x, count) if x.dtype in FLOATS else (0.0, 0.0)
    s.node("CumSum", [x, s.given(any_axis(s, x, axis))], x.dtype, x.shape, -most, most, error, **attrs)


def norm_error(x: Value, width: int, epsilon: float, factor: float) -> np.ndarray:
    """Of (x - mean) / sqrt(variance + epsilon): no row is flatter than its epsilon says."""
    slope = factor / epsilon**0.5
    return slope * (3 * errors(x) + (width + ULPS) * UNIT[x.dtype] * size_of(x)) + ULPS * UNIT[x.dtype] * width**0.5


def norm(s: Sketch) -> None:
    """Normalisations over the last axis, as operators; rows of random data are not flat."""
    x = s.pick(("float32",), 2, lambda v: isinstance(v.shape[-1], int) and v.shape[-1] > 1)
    width = x.shape[-1]
    if not isinstance(width, int):
        return
    weight = s.constant("float32", (width,), 0.5, 1.5)
    bias = s.constant("float32", (width,), -1, 1)
    epsilon = s.choice([1e-5, 1e-3, 1e-2])
    error = norm_error(x, width, epsilon, 1.5)
    most = 1.5 * width**0.5 + 1
    op = s.choice(["LayerNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplified"])
    if op == "LayerNormalization":
        more = [weight, bias] if s.chance(60) else [weight]
        s.smooth(op, [x, *more], x.shape, -most, most, error, axis=-1, epsilon=epsilon)
    elif op == "SimplifiedLayerNormalization":
        s.smooth(op, [x, weight], x.shape, -most, most, error, axis=-1, epsilon=epsilon)
    elif len(x.shape) == 3:
        skip = s.operand("float32", x.shape)
        both = Value("", "float32", x.shape, x.low - 2, x.high + 2, x.error)
        error = norm_error(both, width, epsilon, 1.5)
        name = op if op == "SkipLayerNormalization" else "SkipSimplifiedLayerNormalization"
        more = [weight, bias] if op == "SkipLayerNormalization" and s.chance(60) else [weight]
        own = errors(both) + ULPS * UNIT["float32"] * size_of(both)
        result = Value("", "float32", x.shape, -most, most, (error[0], error[1]))
        total = Value("", "float32", x.shape, both.low, both.high, (own[0], own[1]))
        outputs = [result, None, None, total] if s.chance(60) else [result]
        s.nodes_of(name, [x, skip, *more], outputs, MS, epsilon=epsilon)


def image_norm(s: Sketch) -> None:
    """Normalisations over an image's places, by channel or group."""
    x = s.pick(("float32",), 3, lambda v: isinstance(v.shape[1], int) and s.most(v.shape[2:]) > 1)
    channels = x.shape[1]
    if not isinstance(channels, int):
        return
    op = s.choice(["InstanceNormalization", "GroupNormalization", "BatchNormalization"])
    scale, bias = s.constant("float32", (channels,), 0.5, 1.5), s.constant("float32", (channels,), -1, 1)
    if op == "BatchNormalization":
        mean, variance = s.constant("float32", (channels,), -1, 1), s.constant("float32", (channels,), 0.5, 2)
        most = 1.5 * (size_of(x) + 1) / 0.5**0.5 + 1
        s.smooth(op, [x, scale, bias, mean, variance], x.shape, -most, most, errors(x) * 2.2)
        return
    groups = channels if op == "InstanceNormalization" else s.choice([g for g in (1, 2, 4) if channels % g == 0])
    width = s.most(x.shape[2:]) * (channels // groups)
    epsilon = s.choice([1e-5, 1e-2])
    most = 1.5 * width**0.5 + 1
    attrs = {"num_groups": groups} if op == "GroupNormalization" else {}
    s.smooth(op, [x, scale, bias], x.shape, -most, most, norm_error(x, width, epsilon, 1.5), epsilon=epsilon, **attrs)


STEPS = [reduce_, reduce_, reduce_, softmax, softmax, accumulate, norm, norm, image_norm]
