"""Rules of LSTM, GRU and RNN against onnxruntime, the ONNX reference, and numpy for batches that come first."""

from dataclasses import replace

import numpy as np
import pytest

from .harness import Compiled, case, check, expected

rng = np.random.default_rng(0)
S, B, WIDTH, H = 7, 3, 10, 20
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
ACTIVATIONS = {
    "RNN": (["LeakyRelu"], [0.1], []),
    "GRU": (["HardSigmoid", "ScaledTanh"], [0.3, 1.2], [0.4, 0.7]),
    "LSTM": (["HardSigmoid", "Softsign", "Elu"], [0.3, 0.5], [0.6]),
}


def f32(*shape):
    return (rng.standard_normal(shape) * 0.4).astype(np.float32)


def recurrent(
    op,
    *,
    steps=S,
    hidden=H,
    inputs=WIDTH,
    bias=True,
    lens=None,
    initial=False,
    peepholes=False,
    symbolic=False,
    direction="forward",
    reference="ort",
    label="",
    **attrs,
):
    """One node with random weights."""
    D, G, first = (2 if direction == "bidirectional" else 1), GATES[op], attrs.get("layout", 0)

    def state():
        return f32(B, D, hidden) if first else f32(D, B, hidden)

    arguments = [
        f32(B, steps, inputs) if first else f32(steps, B, inputs),
        f32(D, G * hidden, inputs),
        f32(D, G * hidden, hidden),
        f32(D, 2 * G * hidden) if bias else None,
        np.array(lens, np.int32) if lens else None,
        state() if initial else None,
    ]
    if op == "LSTM":
        arguments += [state() if initial else None, f32(D, 3 * hidden) if peepholes else None]
    while arguments[-1] is None:
        arguments.pop()
    dims = {}
    if symbolic:
        dims = {0: ("b", "s", inputs) if first else ("s", "b", inputs)}
        dims |= {4: ("b",)} if lens else {}
        state_dims = ("b", D, hidden) if first else (D, "b", hidden)
        dims |= {i: state_dims for i in (5, 6) if i < len(arguments) and arguments[i] is not None}
    return case(
        op,
        *arguments,
        direction=direction,
        hidden_size=hidden,
        outputs=3 if op == "LSTM" else 2,
        opset=14,
        dims=dims,
        reference=reference,
        label=label or direction,
        **attrs,
    )


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_batch(op, **attrs):
    """The standard's equations in float64, of a node with layout 1, forwards, default activations."""

    def run(x, w, r, b=None, lens=None, h=None, c=None, p=None):
        x, w, r = x.swapaxes(0, 1).astype(np.float64), w[0].astype(np.float64), r[0].astype(np.float64)
        size = r.shape[1]
        wb, rb = np.split(np.zeros(2 * len(w)) if b is None else b[0].astype(np.float64), 2)
        h = np.zeros((x.shape[1], size)) if h is None else h[:, 0].astype(np.float64)
        c = np.zeros_like(h) if c is None else c[:, 0].astype(np.float64)
        outputs = []
        for step in x:
            a, u = step @ w.T + wb, h @ r.T + rb
            if op == "RNN":
                h = np.tanh(a + u)
            elif op == "LSTM":
                i, o, f, g = np.split(a + u, 4, -1)
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                h = sigmoid(o) * np.tanh(c)
            else:
                z, q = (sigmoid(a[:, k * size : (k + 1) * size] + u[:, k * size : (k + 1) * size]) for k in (0, 1))
                h = (1 - z) * np.tanh(a[:, 2 * size :] + q * u[:, 2 * size :]) + z * h
            outputs.append(h)
        y = np.stack(outputs)[:, None].transpose(2, 0, 1, 3)
        return [v.astype(np.float32) for v in (y, h[:, None], *([c[:, None]] if op == "LSTM" else []))]

    return recurrent(op, layout=1, reference=run, label="by-batch", **attrs)


def family(op):
    names, alpha, beta = ACTIVATIONS[op]
    both = {"activations": names * 2, "activation_alpha": alpha * 2, "activation_beta": beta * 2}
    return [
        recurrent(op, symbolic=True),
        recurrent(op, bias=False, label="no-bias"),
        recurrent(op, direction="reverse", initial=True),
        recurrent(op, direction="bidirectional", initial=True, symbolic=True),
        recurrent(op, lens=[7, 3, 5], symbolic=True, label="ragged"),
        recurrent(op, lens=[2, 7, 5], direction="reverse", initial=True, label="ragged-reverse"),
        recurrent(op, lens=[4, 1, 6], direction="bidirectional", label="ragged-both"),
        recurrent(op, clip=0.3, label="clip"),
        recurrent(op, direction="bidirectional", label="activations", **{k: v for k, v in both.items() if v}),
        recurrent(op, steps=1, hidden=160, inputs=70, initial=True, label="wide"),
        recurrent(op, hidden=5, inputs=3, label="narrow"),
        recurrent(op, reference="onnx", label="standard", **({"linear_before_reset": 1} if op == "GRU" else {})),
        by_batch(op, initial=True, symbolic=True, **({"linear_before_reset": 1} if op == "GRU" else {})),
    ]


def half(op):
    """A node of half precision, for which onnxruntime has no kernel: the same in float32 is near enough."""
    c = recurrent(op, symbolic=True, label="half")

    def reference(*inputs):
        wide = (x if x is None else x.astype(np.float32) for x in inputs)
        return [y.astype(np.float16) for y in expected(replace(c, inputs=tuple(wide)))]

    narrow = tuple(x if x is None else x.astype(np.float16) for x in c.inputs)
    return replace(c, inputs=narrow, reference=reference, tolerance=1e-3)


CASES = [
    *family("RNN"),
    *family("GRU"),
    *family("LSTM"),
    *(recurrent("RNN", activations=[name], label=name.lower()) for name in ("Relu", "Softplus", "Sigmoid")),
    recurrent("RNN", activations=["Affine"], activation_alpha=[0.7], activation_beta=[0.2], label="affine"),
    recurrent("RNN", activations=["ThresholdedRelu"], activation_alpha=[0.3], label="thresholded"),
    recurrent("GRU", linear_before_reset=1, initial=True, symbolic=True, label="after"),
    recurrent("GRU", linear_before_reset=1, bias=False, direction="bidirectional", label="after-no-bias"),
    recurrent("GRU", linear_before_reset=1, hidden=130, lens=[7, 2, 4], label="after-wide"),
    recurrent("LSTM", peepholes=True, initial=True, direction="bidirectional", label="peepholes"),
    recurrent("LSTM", input_forget=1, label="input-forget"),
    half("LSTM"),
    recurrent("LSTM", peepholes=True, clip=0.2, lens=[1, 7, 3], symbolic=True, label="peepholes-clip"),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_recurrent(compiled, c):
    check(compiled, c)
