"""Steps around integers with scales: pairs, quantised weights, products of integers.

Rounding to a grid is a jump: of values that are not exact, the result may be off by a step. A pair with one scale for
the whole tensor leaves no rounding behind in llmc, so that its float model is the value itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.fuzz.matrices import product_error
from tests.fuzz.program import MS, Node, Value
from tests.fuzz.sketch import ULPS, UNIT, Sketch, errors, exact, size_of

LIMITS = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767), "uint16": (0, 65535), "int4": (-8, 7)}
LIMITS["uint4"] = (0, 15)


def grid(s: Sketch, x: Value, dtype: str) -> tuple[float, int]:
    """A scale and zero point whose grid covers x's range and zero."""
    least, greatest = LIMITS[dtype]
    low, high = min(x.low, 0.0), max(x.high, 0.0)
    if s.chance(40):  # symmetric
        low, high = -size_of(x), size_of(x)
    scale = float(np.float32((high - low) / (greatest - least - 1) * 1.01))
    zero = int(np.clip(round(least - low / scale) if dtype.startswith("u") or s.chance(50) else 0, least, greatest))
    if zero == 0 and not dtype.startswith("u"):
        scale = float(np.float32(size_of(x) / greatest))
    return scale, zero


def off_by_a_step(x: Value, step: float) -> np.ndarray:
    """The error of x on a grid: as it is written, and as the float model has it."""
    own = ULPS * UNIT["float32"] * size_of(x)
    return errors(x) + np.array([own if exact(x) else step + own, own])


def pair(s: Sketch, x: Value, dtype: str = "") -> Value:
    """Quantised and dequantised with one scale for all."""
    dtype = dtype or s.choice(["int8", "uint8", "int16", "uint16"])
    scale, zero = grid(s, x, dtype)
    parameters = [s.given(scale, "float32"), s.given(zero, dtype)]
    codes = s.node("QuantizeLinear", [x, *parameters], dtype, x.shape, *LIMITS[dtype])
    s.inner.add(codes.name)
    low, high = x.low - scale, x.high + scale
    y = s.node("DequantizeLinear", [codes, *parameters], "float32", x.shape, low, high, off_by_a_step(x, scale))
    s.floats[y.name] = Node("Identity", (x.name,), (y.name,))
    return y


def activation_pair(s: Sketch) -> None:
    x = s.bounded(s.pick(("float32",)), 8)
    if size_of(x) > 0.1:
        pair(s, x)


def rounded(s: Sketch) -> None:
    """QuantizeLinear alone, of an exact value: by tensor, by axis or by block."""
    x = s.exact(("float32",), 1)
    if size_of(x) > 64 or size_of(x) < 0.1:
        return
    dtype = s.choice(["int8", "uint8", "int16", "uint16"])
    scale, zero = grid(s, x, dtype)
    axis = s.integer(0, len(x.shape) - 1)
    d = x.shape[axis]
    attrs: dict[str, Any] = {}
    shape: list[int] = []
    if isinstance(d, int) and d > 1 and s.chance(60):
        attrs = {"axis": axis - len(x.shape) if s.chance(40) else axis}
        shape = [d]
        known = [e for e in x.shape if isinstance(e, int)]
        if len(known) == len(x.shape) and len(x.shape) > 1 and s.chance(50):
            block = s.choice([b for b in (1, 2, 4, 8) if d % b == 0])
            attrs["block_size"] = block
            shape = [e // block if i == axis else e for i, e in enumerate(known)]
    random = np.random.default_rng(s.integer(0, 999))
    scales = s.given((scale * random.uniform(1, 1.5, shape)).astype(np.float32), "float32")
    zeros = s.given(np.full(shape, zero), dtype)
    s.node("QuantizeLinear", [x, scales, zeros], dtype, x.shape, *LIMITS[dtype], **attrs)


def dequantised(s: Sketch) -> None:
    """DequantizeLinear of integers that something else made, or that are fed."""
    x = s.pick(("int8", "uint8"))
    scale = s.choice([0.01, 0.0123, 0.02])
    low, high = LIMITS[x.dtype]
    zero = s.integer(low, high) if s.chance(60) else 0
    more = [s.given(zero, x.dtype)] if zero else []
    low, high = (x.low - zero) * scale, (x.high - zero) * scale
    s.node("DequantizeLinear", [x, s.given(scale, "float32"), *more], "float32", x.shape, low, high, [1e-6] * 2)


def weight_of_codes(s: Sketch, n: int, k: int, transposed: bool) -> Value:
    """DequantizeLinear of a random matrix [k, n], or [n, k]: by tensor, by output column or by block of inputs."""
    dtype = s.choice(["int8", "int8", "uint8", "int4", "uint4"])
    low, high = LIMITS[dtype]
    shape = [n, k] if transposed else [k, n]
    outputs = 0 if transposed else 1
    random = np.random.default_rng(s.integer(0, 999))
    block, attrs = k, {}
    how = s.choice(["tensor", "axis", "block"])
    blocks = [b for b in (16, 32) if k % b == 0]
    if how == "block" and blocks:
        block = s.choice(blocks)
        attrs = {"axis": 1 - outputs, "block_size": block}
        parameters = [n, k // block] if transposed else [k // block, n]
    elif how == "axis" and n > 1:
        attrs = {"axis": outputs}
        parameters = [n]
    else:
        parameters = []
    unit = 2.0 / (high - low) / k**0.5
    scales = (unit * random.uniform(0.5, 1, parameters)).astype(np.float32)
    zeros = random.integers(low // 4, high // 4 + 1, parameters) if s.chance(50) or dtype[0] == "u" else None
    codes = s.constant(dtype, shape, low, high)
    more = [s.given(zeros, dtype)] if zeros is not None else []
    most = unit * (high - low) * 1.25
    return s.node(
        "DequantizeLinear",
        [codes, s.given(scales, "float32"), *more],
        "float32",
        shape,
        -most,
        most,
        [1e-7] * 2,
        **attrs,
    )


def quantised_linear(s: Sketch) -> None:
    """A linear layer with a quantised weight; its input may be rounded, too, and then llmc rounds it by rows."""
    n = s.choice([1, 5, 8, 16, 33])
    x = s.pick(("float32",), 2, lambda v: v.shape[-1] in (8, 16)) if s.chance(50) else None
    x = s.bounded(x or s.input("float32", [*s.shape(s.integer(1, 2)), s.choice([32, 48, 64])]), 4)
    k = x.shape[-1]
    assert isinstance(k, int)
    source = x
    if s.chance(60) and size_of(x) > 0.1:
        x = pair(s, x, s.choice(["int8", "uint8"]))
    by_rows = x.name in s.floats
    spelling = s.choice(["plain", "transpose", "gemm"]) if len(x.shape) == 2 else s.choice(["plain", "transpose"])
    weight = weight_of_codes(s, n, k, spelling != "plain")
    error = product_error(x, weight, k)
    if by_rows:
        error = error + np.array([0, rows_error(source, weight, k)])
    most = k * size_of(x) * size_of(weight)
    if spelling == "gemm":
        beta = s.choice([1.0, 1.0, 0.5])
        shape = s.choice([[n], [n], [1, n], [1]])
        bias = [s.constant("float32", shape, -1, 1)] if s.chance(60) else []
        s.smooth("Gemm", [x, weight, *bias], [*x.shape[:-1], n], -most - 1, most + 1, error, transB=1, beta=beta)
        return
    if spelling == "transpose":
        weight = s.moved("Transpose", weight, weight.shape[::-1], perm=[1, 0])
    y = s.smooth("MatMul", [x, weight], [*x.shape[:-1], n], -most, most, error)
    if s.chance(40):
        s.smooth("Add", [y, s.constant("float32", (n,), -1, 1)], y.shape, y.low - 1, y.high + 1, errors(y))


def rows_error(x: Value, weight: Value, count: int) -> float:
    """Activations rounded to 8 bits by rows or groups of them: a step of the largest is 1/127 of it."""
    return count * size_of(weight) * size_of(x) / 127


def matmul_nbits(s: Sketch) -> None:
    """com.microsoft's linear layer of 2, 4 or 8 bits. accuracy_level 4 lets both sides round activations."""
    bits, block = s.choice([4, 4, 8, 2]), s.choice([16, 32, 64])
    n, k = s.choice([1, 5, 16, 33]), s.choice([16, 32, 40, 64, 96])
    x = s.operand("float32", [*s.shape(s.integer(1, 2)), k], -1, 1)
    if x.name in s.constants:
        x = s.input("float32", x.shape, -1, 1)
    blocks = -(-k // block)
    codes = s.constant("uint8", [n, blocks, block * bits // 8], 0, 255)
    unit = 1.0 / 2**bits
    scales = s.constant("float32", [n, blocks] if s.chance(50) else [n * blocks], unit / 2, unit)
    width = -(-blocks * bits // 8)
    zeros = s.constant("uint8", [n, width] if s.chance(50) else [n * width], 0, 255) if s.chance(50) else None
    more: list[Value | None] = [zeros] if zeros else []
    level = s.choice([0, 0, 4])
    weight = Value("", "float32", (), -1, 1)
    error = product_error(x, weight, k) + (2 * rows_error(x, weight, k) if level == 4 else 0)
    attrs = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": level}
    if s.chance(30):
        more = [*(more or [None]), None, s.constant("float32", (n,), -1, 1)]
    most = k + 1.0
    s.smooth("MatMulNBits", [x, codes, scales, *more], [*x.shape[:-1], n], -most, most, error, domain=MS, **attrs)


def dynamic_linear(s: Sketch) -> None:
    """What a dynamic quantiser writes: one scale for the input, found at run time; llmc finds one for each row."""
    x = s.exact(("float32",), 2)
    k = x.shape[-1]
    if not isinstance(k, int) or size_of(x) > 8:
        return
    n = s.choice([4, 8, 17])
    dtype = s.choice(["int8", "uint8"])
    low, high = LIMITS[dtype]
    random = np.random.default_rng(s.integer(0, 999))
    codes = random.integers(low, high + 1, [k, n])
    zero = int(random.integers(low // 4, high // 4 + 1)) if s.chance(50) else 0
    scale = (random.uniform(0.5, 1, [n] if s.chance(40) else []) * 2 / 255 / k**0.5).astype(np.float32)
    outputs = [
        Value("", "uint8", x.shape, 0, 255),
        Value("", "float32", (), 0, 1),
        Value("", "uint8", (), 0, 255),
    ]
    q, q_scale, q_zero = s.nodes_of("DynamicQuantizeLinear", [x], outputs)
    s.inner |= {q.name, q_scale.name, q_zero.name}
    more = [s.given(zero, dtype)] if zero else []
    w = s.given(codes, dtype)
    shape = [*x.shape[:-1], n]
    total = k * 256 * 256
    acc = s.node("MatMulInteger", [q, w, q_zero, *more], "int32", shape, -total, total)
    wide = s.node("Cast", [acc], "float32", shape, -total, total, [total * UNIT["float32"]] * 2, to=1)
    s.inner |= {acc.name, wide.name}
    factor = s.node("Mul", [q_scale, s.given(scale, "float32")], "float32", scale.shape, 0, 1)
    s.inner.add(factor.name)
    weight = s.given(((codes - zero) * scale).astype(np.float32), "float32")
    most = 1.1 * k * size_of(x) * size_of(weight)
    rounding = product_error(x, weight, k) + ULPS * UNIT["float32"] * most
    error = rounding + np.array([0, rows_error(x, weight, k)])
    y = s.node("Mul", [wide, factor], "float32", shape, -most, most, error)
    s.floats[y.name] = Node("MatMul", (x.name, weight.name), (y.name,))


def integer_product(s: Sketch) -> None:
    """MatMulInteger and QLinearMatMul of what is fed."""
    m, k, n = s.dim(), s.choice([3, 8, 16]), s.choice([1, 5, 8])
    dtype = s.choice(["uint8", "int8"])
    a, b = s.input(dtype, [m, k], *LIMITS[dtype]), s.constant("int8", [k, n], *LIMITS["int8"])
    if s.chance(50):
        zeros = [s.given(3, a.dtype), s.given(-2, "int8")] if s.chance(60) else []
        most = k * 260 * 131
        s.node("MatMulInteger", [a, b, *zeros], "int32", [m, n], -most, most)
        return
    parameters = [s.given(0.02, "float32"), s.given(3, a.dtype), b, s.given(0.01, "float32"), s.given(-2, "int8")]
    result = [s.given(0.05, "float32"), s.given(5, a.dtype)]
    s.node("QLinearMatMul", [a, *parameters, *result], a.dtype, [m, n], *LIMITS[a.dtype], [1.0, 1.0])


def integer_conv(s: Sketch) -> None:
    x = s.input("uint8", (s.dim(), 2, 5, 5), 0, 255)
    w = s.constant("int8", (3, 2, 3, 3), -128, 127)
    zeros = [s.given(7, "uint8")] if s.chance(60) else []
    most = 18 * 255 * 128
    pads = [1, 1, 1, 1] if s.chance(50) else [0, 0, 0, 0]
    size = 5 if pads[0] else 3
    s.node("ConvInteger", [x, w, *zeros], "int32", [x.shape[0], 3, size, size], -most, most, pads=pads)


def relu_grid(s: Sketch) -> None:
    """A layer whose Relu a quantiser folded into a grid from zero on: the clipping stays, the rounding does not."""
    x = s.pick(("float32",), 2, lambda v: len(v.shape) == 2)
    k = x.shape[-1]
    if len(x.shape) != 2 or not isinstance(k, int):
        return
    x = s.bounded(x, 4)
    w = s.constant("float32", [k, 8], -1 / k**0.5, 1 / k**0.5)
    most = k * size_of(x) * size_of(w)
    y = s.smooth(
        "Gemm", [x, w, s.constant("float32", (8,), -1, 1)], [x.shape[0], 8], -most - 1, most + 1, product_error(x, w, k)
    )
    scale = float(np.float32(most / 300))  # the upper end clips, too
    parameters = [s.given(scale, "float32"), s.given(0, "uint8")]
    codes = s.node("QuantizeLinear", [y, *parameters], "uint8", y.shape, 0, 255)
    s.inner.add(codes.name)
    top = 255 * scale
    z = s.node("DequantizeLinear", [codes, *parameters], "float32", y.shape, 0, top + scale, off_by_a_step(y, scale))
    bounds = [s.given(0.0, "float32"), s.given(top, "float32")]
    s.floats[z.name] = Node("Clip", (y.name, *(b.name for b in bounds)), (z.name,))


STEPS = [
    *(activation_pair, activation_pair, rounded, rounded, dequantised, dequantised, integer_product, integer_conv),
    *(quantised_linear, matmul_nbits, dynamic_linear, relu_grid),
]
