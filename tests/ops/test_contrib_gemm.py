"""com.microsoft's matrix products against onnxruntime, or numpy where it has no CPU kernel."""

import numpy as np
import pytest

from .contrib import Random, ms
from .harness import Compiled, check

R = Random()
f32, u8, i8 = R.f32, R.u8, R.i8
X = f32(2, 5, 48)
SYM = {0: ("b", "s", 48)}
N, K = 24, 48


def nbits(bits, block=16, *, zeros=None, g_idx=None, bias=False, x=X, n=N, **options):
    """MatMulNBits with constant weights; zeros: None, "packed" or "float"."""
    blocks = -(-K // block)
    dtype = x.dtype
    inputs = [x, u8(n, blocks, block * bits // 8), R.scales(n, blocks).astype(dtype)]
    made = None
    if zeros == "packed":
        made = u8(n, -(-blocks * bits // 8))
    elif zeros == "float":
        made = (R.rng.random((n, blocks)) * (2**bits - 1)).astype(dtype)
    inputs += [made, g_idx, f32(n).astype(dtype) if bias else None]
    while inputs[-1] is None:
        inputs.pop()
    const = [i for i in range(1, len(inputs)) if inputs[i] is not None]
    options = {"tolerance": 1e-4, "label": f"{bits}bit-{block}", **options}
    return ms("MatMulNBits", *inputs, const=const, N=n, K=K, bits=bits, block_size=block, **options)


def bnb4(kind, block=16, **options):
    inputs = (X, u8(N * K // 2), R.scales(N * K // block))
    label = f"{'nf4' if kind else 'fp4'}-{block}"
    return ms("MatMulBnb4", *inputs, const=[1, 2], N=N, K=K, block_size=block, quant_type=kind, label=label, **options)


def quantised(a_signed, b_signed, columns, zeros, bias, **options):
    """MatMulIntegerToFloat."""
    a, b = (i8 if a_signed else u8)(3, 8), (i8 if b_signed else u8)(8, 5)
    scale = R.scales(5) if columns else np.float32(0.03)
    za = (np.int8 if a_signed else np.uint8)(9) if zeros else None
    zb = None
    if zeros:
        zb = (i8 if b_signed else u8)(5) if columns else (np.int8 if b_signed else np.uint8)(7)
    inputs = [a, b, np.float32(0.1), scale, za, zb, f32(5) if bias else None]
    while inputs[-1] is None:
        inputs.pop()
    label = "-".join([a.dtype.name, b.dtype.name, *(["columns"] if columns else []), *(["zeros"] if zeros else [])])
    return ms("MatMulIntegerToFloat", *inputs, label=label, **options)


def dynamic(b, scale, zero=None, bias=None, label="", **options):
    inputs = [X, b, scale, zero, bias]
    while inputs[-1] is None:
        inputs.pop()
    return ms("DynamicQuantizeMatMul", *inputs, tolerance=1e-4, label=label, **options)


def gemm(output, *, a=None, b=None, c=None, columns=False, label="", **attrs):
    """QGemm; `output` is float32, or the type that A is quantised to."""
    a = u8(6, 8) if a is None else a
    b = i8(8, 5) if b is None else b
    scale = R.scales(5) if columns else np.float32(0.02)
    zero = np.full(5 if columns else (), 3, b.dtype)
    inputs = [a, np.float32(0.1), np.array(9, a.dtype), b, scale, zero, c]
    if output != "float32":
        inputs += [np.float32(0.7), np.array(100, a.dtype)]
    while inputs[-1] is None:
        inputs.pop()
    return ms("QGemm", *inputs, label=label, **attrs)


LEAKY = {"activation": "LeakyRelu", "activation_alpha": 0.1}
HARD = {"activation": "HardSigmoid", "activation_alpha": 0.3, "activation_beta": 0.4}
IMAGE, FILTER = f32(1, 3, 6, 6), f32(4, 3, 3, 3)

CASES = [
    nbits(4, dims=SYM),
    nbits(4, zeros="packed", label="4bit-zeros"),
    nbits(4, zeros="float", label="4bit-float-zeros"),
    nbits(4, bias=True, label="4bit-bias"),
    nbits(4, 32),
    nbits(4, 64, zeros="packed", dims=SYM, label="4bit-64-zeros"),
    nbits(4, x=f32(3, 48), label="4bit-matrix"),
    nbits(4, zeros="packed", bias=True, n=3, label="4bit-three"),
    nbits(4, accuracy_level=1, label="4bit-accuracy"),
    nbits(4, g_idx=np.sort(R.i32(3, 48)), label="4bit-g-idx"),
    nbits(4, x=X.astype(np.float16), tolerance=2e-2, label="4bit-half"),
    nbits(8, dims=SYM),
    nbits(8, zeros="packed", label="8bit-zeros"),
    nbits(8, 32, bias=True, label="8bit-32-bias"),
    nbits(2, dims=SYM),
    nbits(2, zeros="packed", label="2bit-zeros"),
    nbits(2, 32, zeros="packed", bias=True, label="2bit-32"),
    bnb4(0, tolerance=1e-4, dims=SYM),
    bnb4(0, 32, tolerance=1e-4),
    bnb4(1, tolerance=1e-4),
    bnb4(1, 64, tolerance=1e-4),
    ms("MatMulInteger16", *(R.rng.integers(-300, 300, s).astype(np.int16) for s in ((2, 3, 4), (4, 5)))),
    quantised(False, True, False, False, False),
    quantised(False, True, True, True, True),
    quantised(False, False, False, True, True),
    quantised(False, False, True, True, False),
    quantised(True, True, False, True, True),
    quantised(True, True, True, False, False),
    dynamic(i8(48, 6), np.float32(0.02), np.int8(0), f32(6), dims=SYM),
    dynamic(i8(48, 6), np.float32(0.02), label="plain"),
    dynamic(i8(48, 6), R.scales(6), label="columns"),
    dynamic(i8(48, 6), R.scales(6), i8(6), f32(6), label="columns-zeros"),
    dynamic(u8(48, 6), np.float32(0.02), np.uint8(120), label="unsigned"),
    gemm("float32", dims={0: ("m", 8)}),
    gemm("float32", c=R.i32(500, 5), columns=True, label="columns"),
    gemm("float32", a=i8(6, 8), alpha=0.5, label="signed-alpha"),
    gemm("uint8", label="quantised", dims={0: ("m", 8)}),
    gemm("uint8", c=R.i32(500, 6, 5), columns=True, label="quantised-columns"),
    gemm("uint8", b=u8(8, 5), label="quantised-unsigned"),
    gemm("int8", a=i8(6, 8), c=R.i32(500, 1, 5), alpha=1.5, label="quantised-signed"),
    gemm("uint8", a=u8(8, 6), b=i8(5, 8), transA=1, transB=1, label="quantised-transposed"),
    ms("FusedMatMul", f32(2, 3, 4), f32(4, 5), dims={0: ("b", 3, 4)}),
    ms("FusedMatMul", f32(2, 4, 3), f32(2, 5, 4), transA=1, transB=1, alpha=0.5, label="transposed"),
    ms("FusedMatMul", f32(4, 3), f32(4, 5), transA=1, label="matrix"),
    ms("FusedMatMul", f32(4), f32(2, 4, 5), transA=1, label="vector"),
    ms("FusedMatMul", f32(3, 2, 4), f32(2, 4, 5), transBatchA=1, label="batch-a"),
    ms("FusedMatMul", f32(2, 3, 4), f32(4, 2, 5), transBatchB=1, label="batch-b"),
    ms("FusedMatMul", f32(3, 2, 4), f32(5, 2, 4), transBatchA=1, transBatchB=1, transB=1, label="batch-both"),
    ms("FusedMatMul", f32(3, 2, 6, 4), f32(2, 6, 4, 5), transBatchA=1, alpha=2.0, label="batch-deep"),
    ms("FusedMatMul", *(f32(*s).astype(np.float64) for s in ((3, 4), (4, 5))), label="double"),
    ms("TransposeMatMul", f32(2, 4, 3), f32(2, 5, 4), transA=1, transB=1, alpha=0.5),
    ms("FusedGemm", f32(3, 4), f32(4, 5), f32(5), activation="Relu"),
    ms("FusedGemm", f32(3, 4), f32(4, 5), activation="Relu", label="no-c"),
    ms("FusedGemm", f32(3, 4), f32(4, 5), label="leaky", **LEAKY),
    ms("FusedGemm", f32(3, 4), f32(4, 5), label="hard", **HARD),
    ms("FusedGemm", f32(3, 4), f32(4, 5), activation="Elu", activation_alpha=0.7, label="elu"),
    ms("FusedGemm", f32(4, 3), f32(5, 4), f32(3, 1), transA=1, transB=1, alpha=0.5, beta=2.0, activation="Tanh"),
    ms("FusedGemm", f32(3, 4), f32(4, 5), activation="Softsign", label="softsign"),
    ms("FusedConv", IMAGE, FILTER, f32(4), activation="Relu"),
    ms("FusedConv", IMAGE, FILTER, activation="Sigmoid", label="sigmoid", dims={0: ("n", 3, 6, 6)}),
    ms("FusedConv", IMAGE, FILTER, activation="Tanh", pads=[1, 1, 1, 1], strides=[2, 2], label="tanh"),
    ms("FusedConv", IMAGE, FILTER, activation="LeakyRelu", activation_params=[0.2], label="leaky"),
    ms("FusedConv", IMAGE, FILTER, activation="Clip", activation_params=[-0.5, 1.5], label="clip"),
    ms("FusedConv", IMAGE, FILTER, activation="HardSigmoid", activation_params=[0.2, 0.5], label="hard"),
    ms("FusedConv", IMAGE, FILTER, f32(4), f32(1, 4, 4, 4), activation="Relu", label="sum"),
    ms("FusedConv", f32(1, 4, 6, 6), f32(4, 1, 3, 3), f32(4), group=4, activation="Relu", label="depthwise"),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_contrib_gemm(compiled, c):
    check(compiled, c)
