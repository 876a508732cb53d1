"""Mixtures of experts against onnxruntime, or numpy where its kernel rounds activations or does not exist."""

import numpy as np
import pytest

from .contrib import Random, ms
from .harness import Compiled, check

R = Random(2)
f32 = R.f32
E, HIDDEN, INNER = 4, 32, 48


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def activate(name, y, up, alpha=1.0, beta=0.0, limit=np.inf, fusion=0):
    if name == "swiglu":
        if fusion == 1:
            y, up = y[..., ::2], y[..., 1::2]
        elif fusion == 2:
            y, up = np.split(y, 2, -1)
        y, up = np.minimum(y, limit), np.clip(up, -limit, limit)
        return y * sigmoid(alpha * y) * (up + beta)
    done = {"relu": np.maximum(y, 0), "silu": y * sigmoid(y), "identity": y}[name]
    return done if up is None else done * up


def mixture(k, normalised, name, **options):
    """Float64, token by token; weights [E, N, K] as numbers."""

    def run(x, logits, layers, weights=None):
        rows, out = x.reshape(-1, x.shape[-1]).astype(np.float64), []
        for row, score, own in zip(
            rows, logits.astype(np.float64), logits if weights is None else weights, strict=True
        ):
            best = np.argsort(-score, kind="stable")[:k]
            if weights is not None:
                share = own[best].astype(np.float64)
                share = share / share.sum() if normalised else share
            else:
                share = np.exp(score - score.max())
                share = share[best] / (share[best].sum() if normalised else share.sum())
            total = 0
            for e, s in zip(best, share, strict=True):
                first, second, third = (None if w is None else (w[e], 0 if b is None else b[e]) for w, b in layers)
                y = row @ first[0].T + first[1]
                up = None if third is None else row @ third[0].T + third[1]
                total = total + s * (activate(name, y, up, **options) @ second[0].T + second[1])
            out.append(total)
        return [np.stack(out).reshape(x.shape).astype(x.dtype)]

    return run


def layer(width, inputs, bias):
    return f32(E, width, inputs) * 0.2, f32(E, width) if bias else None


def moe(name="relu", *, k=2, bias=True, fusion=0, third=False, normalised=0, shape=(3, HIDDEN), label="", **options):
    width = INNER * (2 if fusion else 1)
    layers = [
        layer(width, HIDDEN, bias),
        layer(HIDDEN, INNER, bias),
        layer(INNER, HIDDEN, bias) if third else (None, None),
    ]
    tokens = int(np.prod(shape[:-1]))
    inputs = [f32(*shape), f32(tokens, E), *(x for pair in layers for x in pair)]
    while inputs[-1] is None:
        inputs.pop()
    attrs = {"k": k, "activation_type": name, "normalize_routing_weights": normalised}
    if fusion:
        attrs["swiglu_fusion"] = fusion
    numbers = {
        key: options.pop(key) for key in ("activation_alpha", "activation_beta", "swiglu_limit") if key in options
    }
    if options.get("reference") == "numpy":
        short = {key.rsplit("_", 1)[1]: v for key, v in numbers.items()}
        run = mixture(k, normalised, name, fusion=fusion, **short)
        options["reference"] = lambda x, logits, *w: run(x, logits, layers)
    return ms("MoE", *inputs, tolerance=1e-4, label=label or name, **attrs, **numbers, **options)


def pack(codes, bits):
    """Codes packed along the last axis, low bits first."""
    per = 8 // bits
    short = -codes.shape[-1] % per
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, short)])
    grouped = codes.reshape(*codes.shape[:-1], -1, per).astype(np.uint16)
    return np.sum(grouped << (np.arange(per) * bits), -1).astype(np.uint8)


def q_layer(width, inputs, bits, block, zeros, bias):
    """(numbers, codes, scales, bias, zero points) of one layer."""
    codes = R.rng.integers(0, 2**bits, (E, width, inputs))
    shape = (E, width, inputs // block) if block else (E, width)
    scales = R.scales(*shape) * 0.3
    points = R.rng.integers(0, 2**bits, shape) if zeros else np.full(shape, 1 << (bits - 1))
    spread = (lambda a: np.repeat(a, block, -1)) if block else (lambda a: a[..., None])
    numbers = (codes - spread(points)) * spread(scales).astype(np.float64)
    return numbers, pack(codes, bits), scales, f32(E, width) if bias else None, pack(points, bits) if zeros else None


def q_moe(name="silu", *, bits=4, block=0, zeros=False, bias=False, k=2, fusion=0, weights=False, normalised=0,
          shape=(3, HIDDEN), label="", numpy=False, **options):  # fmt: skip
    first = q_layer(INNER * (2 if fusion else 1), HIDDEN, bits, block, zeros, bias)
    second = q_layer(HIDDEN, INNER, bits, block, zeros, bias)
    tokens = int(np.prod(shape[:-1]))
    inputs = [f32(*shape), f32(tokens, E), *first[1:4], *second[1:4], None, None, None, first[4], second[4], None]
    inputs += [R.rng.random((tokens, E)).astype(np.float32) if weights else None]
    chosen = inputs[14]
    while inputs[-1] is None:
        inputs.pop()
    attrs = {"k": k, "activation_type": name, "normalize_routing_weights": normalised, "expert_weight_bits": bits}
    attrs |= {"block_size": block} if block else {}
    attrs |= {"swiglu_fusion": fusion} if fusion else {}
    if numpy:
        layers = [(first[0], first[3]), (second[0], second[3]), (None, None)]
        run = mixture(k, normalised, name, fusion=fusion)
        options["reference"] = lambda x, logits, *rest: run(x, logits, layers, chosen)
    const = [i for i in range(2, 14) if i < len(inputs) and inputs[i] is not None]
    return ms("QMoE", *inputs, const=const, tolerance=1e-4, label=label or f"{bits}bit-{name}", **attrs, **options)


SYM = {0: ("t", HIDDEN), 1: ("t", E)}
DENSE = {0: (2, "s", HIDDEN)}
GLU = {"fusion": 1, "activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 1.5}

CASES = [
    moe(dims=SYM),
    moe(bias=False, label="no-bias"),
    moe("silu", k=1),
    moe("gelu"),
    moe("identity", k=4, label="all"),
    moe(normalised=1, label="normalised"),
    moe("silu", normalised=1, shape=(2, 3, HIDDEN), label="dense"),
    moe("swiglu", fusion=1, label="swiglu"),
    moe("swiglu", label="swiglu-limit", **GLU),
    moe("swiglu", fusion=2, reference="numpy", label="swiglu-halves"),
    moe("silu", third=True, reference="numpy", normalised=1, label="gated"),
    moe("relu", k=1, reference="numpy", label="numpy"),
    q_moe("silu", dims=SYM),
    q_moe("relu", bias=True, k=1),
    q_moe("gelu", bits=8),
    q_moe("identity", bits=8, bias=True, zeros=True),
    q_moe("silu", zeros=True, label="zeros"),
    q_moe("silu", block=16, label="blocks"),
    q_moe("silu", block=16, zeros=True, bias=True, label="blocks-zeros"),
    q_moe("swiglu", fusion=1, label="swiglu"),
    q_moe("swiglu", fusion=1, bits=8, bias=True, shape=(2, 3, HIDDEN), label="swiglu-8bit"),
    q_moe("silu", normalised=1, label="normalised"),
    q_moe("silu", weights=True, label="weights"),
    q_moe("silu", weights=True, normalised=1, label="weights-normalised"),
    q_moe("silu", bits=8, block=16, numpy=True, normalised=1, label="8bit-blocks"),
    q_moe("relu", bits=2, block=16, numpy=True, normalised=1, label="2bit-blocks"),
    q_moe("silu", bits=4, block=16, zeros=True, numpy=True, normalised=1, label="numpy"),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_contrib_moe(compiled, c):
    check(compiled, c)
