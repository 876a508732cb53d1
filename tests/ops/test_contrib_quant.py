"""com.microsoft's operators on quantised tensors against onnxruntime."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from .contrib import Random, ms
from .harness import Compiled, case, check, expected

R = Random(1)
f32, u8, i8 = R.f32, R.u8, R.i8


def quantised(make, *shape, scale=0.1, zero=9):
    """A tensor with its scale and zero point."""
    x = make(*shape)
    return x, np.float32(scale), np.array(zero, x.dtype)


def pair(make, scale, zero):
    return np.float32(scale), np.array(zero, make(1).dtype)


def binary(op, make, left=(3, 8), right=(3, 8), label="", **options):
    operands = *quantised(make, *left), *quantised(make, *right, scale=0.2, zero=50)
    return ms(op, *operands, *pair(make, 0.3 if op == "QLinearAdd" else 2.0, 70), label=label, **options)


def unary(op, make, scale, zero, label="", **options):
    inputs = *quantised(make, 3, 8, zero=40), *pair(make, scale, zero)
    return ms(op, *inputs, const=[1, 2, 3, 4], label=label or make(1).dtype.name, **options)


def softmax(make, scale, zero, version, axis, shape=(3, 8)):
    """QLinearSoftmax, whose attribute `opset` is not the case's."""
    x, s, z = quantised(make, *shape, zero=0)
    label = f"{x.dtype.name}-{version}-{axis}"
    c = ms("QLinearSoftmax", x, s, z, *pair(make, scale, zero), const=[1, 2, 3, 4], label=label, axis=axis)
    return replace(c, attrs={**c.attrs, "opset": version})


def concat(axis, *shapes, make=u8, label=""):
    operands = [q for n, s in enumerate(shapes) for q in quantised(make, *s, scale=0.1 + 0.03 * n, zero=9 + n)]
    const = [i for i in range(2 + len(operands)) if i < 2 or (i - 2) % 3]
    return ms("QLinearConcat", *pair(make, 0.2, 20), *operands, const=const, axis=axis, label=label)


def where(make, condition, x, y, label=""):
    operands = *quantised(make, *x), *quantised(make, *y, scale=0.2, zero=50)
    return ms("QLinearWhere", condition, *operands, *pair(make, 0.15, 30), const=[2, 3, 5, 6, 7, 8], label=label)


def image(op, make, shape, *, out=0.1, zero=12, label="", **attrs):
    inputs = *quantised(make, *shape), *pair(make, out, zero)
    return ms(op, *inputs, const=[1, 2, 3, 4], label=label, **attrs)


def conv(x, w, *, columns=False, bias=False, label="", **attrs):
    scale = R.scales(w.shape[0]) if columns else np.float32(0.02)
    zero = np.zeros(w.shape[0] if columns else (), w.dtype)
    inputs = [x, np.float32(0.1), np.array(5, x.dtype), w, scale, zero, np.float32(0.9), np.array(60, x.dtype)]
    inputs += [R.i32(1000, w.shape[0])] if bias else []
    return ms("QLinearConv", *inputs, const=range(1, len(inputs)), label=label, **attrs)


def lstm(columns=False, initial=False, label="", **attrs):
    """DynamicQuantizeLSTM; onnxruntime rounds activations as well, so its LSTM with the weights' values is asked."""
    directions, width, hidden = (2 if attrs.get("direction") == "bidirectional" else 1), 10, 20
    weights, extra = [], []
    for rows in (width, hidden):
        shape = (directions, 4 * hidden) if columns else (directions,)
        weights.append(i8(directions, rows, 4 * hidden))
        extra += [R.scales(*shape) * 0.1, np.zeros(shape, np.int8)]
    inputs = [f32(5, 2, width), *weights, f32(directions, 8 * hidden), None]
    inputs += [f32(directions, 2, hidden) if initial else None for _ in "hc"]

    def reference(x, w, r, *rest):
        scales = [s[:, None] if columns else s[:, None, None] for s in extra[::2]]
        real = [(q * s).astype(np.float32).swapaxes(1, 2) for q, s in zip((w, r), scales, strict=True)]
        plain = [x, *real, *rest[:4]]
        while plain[-1] is None:
            plain.pop()
        return expected(case("LSTM", *plain, outputs=3, opset=14, hidden_size=hidden, **attrs))

    dims = {0: ("s", 2, width)}
    inputs += [None, *extra]
    return ms(
        "DynamicQuantizeLSTM",
        *inputs,
        outputs=3,
        reference=reference,
        dims=dims,
        label=label,
        hidden_size=hidden,
        **attrs,
    )


def gather(data, index, scales, zeros=None, *, dims=None, **attrs):
    inputs = [data, index, scales, zeros]
    if zeros is None:
        inputs.pop()
    const = [i for i in range(len(inputs)) if i != 1]
    return ms("GatherBlockQuantized", *inputs, const=const, dims=dims or {}, **attrs)


IDS = R.rng.integers(0, 7, (2, 3))
BAD = np.array([[0, 7], [-8, 6], [-1, 100]])
ODD = R.rng.random((3, 8)) > 0.5
I4, U4 = (R.rng.integers(*r, (7, 32)) for r in ((-8, 8), (0, 16)))
I4, U4 = I4.astype(ml_dtypes.int4), U4.astype(ml_dtypes.uint4)
POOL = {"kernel_shape": [3, 3]}

CASES = [
    binary("QLinearAdd", u8),
    binary("QLinearAdd", i8, label="int8"),
    binary("QLinearAdd", u8, right=(8,), label="row", dims={0: ("m", 8)}),
    binary("QLinearAdd", i8, left=(3, 1), label="column"),
    binary("QLinearMul", u8),
    binary("QLinearMul", i8, label="int8"),
    binary("QLinearMul", u8, right=(8,), label="row", dims={0: ("m", 8)}),
    binary("QLinearMul", u8, left=(1,), label="one"),
    unary("QLinearSigmoid", u8, 1 / 256, 0, dims={0: ("m", 8)}),
    unary("QLinearSigmoid", i8, 1 / 256, -128),
    unary("QLinearLeakyRelu", u8, 0.1, 99, alpha=0.3, dims={0: ("m", 8)}),
    unary("QLinearLeakyRelu", i8, 0.1, 3),
    unary("QLinearLeakyRelu", u8, 0.05, 128, alpha=0.1, label="fine"),
    ms("QuantizeLinear", f32(3, 8), np.float32(0.05), np.uint8(128), dims={0: ("m", 8)}),
    ms("QuantizeLinear", f32(3, 8), np.float32(0.05), np.int8(3), label="int8"),
    ms("QuantizeLinear", f32(3, 8), R.scales(3), np.zeros(3, np.int8), axis=0, label="axis"),
    ms("QuantizeLinear", f32(3, 8), np.float32(0.001), np.uint16(3000), label="uint16"),
    ms("DequantizeLinear", u8(3, 8), np.float32(0.05), np.uint8(128)),
    ms("DequantizeLinear", i8(3, 8), R.scales(8), i8(8), axis=1, label="axis"),
    ms("DequantizeLinear", R.i32(1000, 3, 8), np.float32(0.05), label="int32"),
    where(u8, ODD, (3, 8), (3, 8)),
    where(i8, ODD, (3, 8), (3, 8), label="int8"),
    where(u8, ODD, (8,), (3, 1), label="broadcast"),
    concat(1, (2, 3), (2, 4)),
    concat(0, (2, 3), (1, 3), (4, 3), label="three"),
    concat(-1, (2, 2, 3), (2, 2, 5), make=i8, label="int8"),
    image("QLinearAveragePool", u8, (1, 2, 6, 7), **POOL),
    image("QLinearAveragePool", i8, (1, 2, 6, 7), label="int8", **POOL),
    image("QLinearAveragePool", u8, (2, 3, 8, 8), strides=[2, 2], pads=[1, 1, 1, 1], label="padded", **POOL),
    image("QLinearAveragePool", u8, (1, 2, 6, 6), pads=[1] * 4, count_include_pad=1, label="counted", **POOL),
    image("QLinearAveragePool", u8, (1, 6, 7, 2), channels_last=1, label="last", **POOL),
    image("QLinearAveragePool", u8, (1, 2, 7, 7), strides=[2, 2], ceil_mode=1, label="ceil", **POOL),
    image("QLinearGlobalAveragePool", u8, (2, 3, 5, 6)),
    image("QLinearGlobalAveragePool", i8, (2, 3, 5, 6), label="int8"),
    image("QLinearGlobalAveragePool", u8, (2, 5, 6, 3), channels_last=1, label="last"),
    conv(u8(1, 3, 6, 6), i8(4, 3, 3, 3)),
    conv(u8(1, 3, 6, 6), i8(4, 3, 3, 3), columns=True, bias=True, label="columns"),
    conv(u8(1, 6, 6, 3), i8(4, 3, 3, 3), bias=True, channels_last=1, label="last"),
    conv(i8(1, 6, 6, 4), i8(4, 1, 3, 3), group=4, channels_last=1, pads=[1] * 4, label="last-depthwise"),
    lstm(),
    lstm(columns=True, initial=True, label="columns"),
    lstm(direction="bidirectional", label="both"),
    ms("NhwcMaxPool", u8(1, 6, 7, 3), **POOL),
    ms("NhwcMaxPool", i8(1, 6, 7, 3), strides=[2, 2], pads=[1] * 4, label="int8", **POOL),
    ms("NhwcMaxPool", u8(1, 7, 7, 2), dilations=[2, 2], label="dilated", kernel_shape=[2, 2]),
    gather(u8(7, 8), IDS, R.scales(7, 1), bits=4, block_size=16, dims={1: ("b", "s")}, label="4bit"),
    gather(u8(7, 16), IDS, R.scales(7, 2), u8(7, 1), bits=4, block_size=16, label="4bit-zeros"),
    gather(u8(7, 32), IDS, R.scales(7, 2), u8(7, 2), bits=8, block_size=16, label="8bit-zeros"),
    gather(u8(7, 32), IDS.astype(np.int32), R.scales(7, 2), bits=8, block_size=16, label="8bit"),
    gather(u8(7, 8), IDS, R.scales(7, 2), bits=2, block_size=16, label="2bit"),
    gather(u8(7, 16), IDS, R.scales(7, 4), u8(7, 1), bits=2, block_size=16, label="2bit-zeros"),
    gather(u8(7, 8), BAD, R.scales(7, 1), bits=4, block_size=16, label="outside"),
    gather(I4, IDS, R.scales(7, 2), block_size=16, label="int4"),
    gather(U4, IDS, R.scales(7, 1), U4[:, :1], block_size=32, label="uint4-zeros"),
    gather(I4, np.array(3), R.scales(7, 2), block_size=16, label="one-row"),
    gather(I4, np.array([1, 5, 30]), R.scales(1, 32), block_size=16, gather_axis=1, quantize_axis=0, label="columns"),
    gather(I4, IDS, R.scales(7, 2).astype(np.float16), block_size=16, label="half", tolerance=1e-3),
    gather(f32(7, 32).astype(ml_dtypes.float8_e4m3fn), IDS, R.scales(7, 2), block_size=16, label="float8"),
    gather(f32(7, 32).astype(ml_dtypes.float8_e5m2), IDS, R.scales(1, 1), block_size=0, label="float8-whole"),
    softmax(u8, 1 / 256, 0, 13, -1),
    softmax(i8, 1 / 256, -128, 13, 1),
    softmax(u8, 1 / 256, 0, 13, 0),
    softmax(u8, 1 / 256, 0, 12, 1),
    softmax(u8, 1 / 256, 0, 12, 1, shape=(2, 3, 4)),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_contrib_quant(compiled, c):
    check(compiled, c)
