"""Fourier transforms against numpy, the mel filters against onnxruntime."""

import numpy as np
import pytest

from .harness import Compiled, case, check

rng = np.random.default_rng(0)
REAL = rng.standard_normal((2, 9, 3, 1)).astype(np.float32)
COMPLEX = rng.standard_normal((2, 9, 3, 2)).astype(np.float32)
HALF = np.stack([np.fft.rfft(REAL[..., 0], axis=1).real, np.fft.rfft(REAL[..., 0], axis=1).imag], -1).astype(np.float32)
SIGNAL = rng.standard_normal((2, 40, 1)).astype(np.float32)
WINDOW = np.hanning(16).astype(np.float32)


def parts(z):
    return [np.stack([z.real, z.imag], -1).astype(np.float32)]


def together(x):
    return x[..., 0] + 1j * x[..., 1]


def frames(x, window, bins):
    starts = range(0, x.shape[1] - len(window) + 1, 5)
    cut = np.stack([x[:, s : s + len(window), 0] * window for s in starts], 1)
    return parts(np.fft.fft(cut)[..., :bins])


CASES = [
    case("DFT", REAL, axis=1, opset=17, reference=lambda x: parts(np.fft.fft(x[..., 0], axis=1))),
    case(
        "DFT",
        COMPLEX,
        axis=1,
        opset=17,
        dims={0: ("b", "n", 3, 2)},
        reference=lambda x: parts(np.fft.fft(together(x), axis=1)),
    ),
    case(
        "DFT",
        COMPLEX,
        axis=2,
        opset=17,
        inverse=1,
        label="inverse",
        reference=lambda x: parts(np.fft.ifft(together(x), axis=2)),
    ),
    case(
        "DFT",
        REAL,
        axis=1,
        opset=17,
        onesided=1,
        label="half",
        reference=lambda x: parts(np.fft.rfft(x[..., 0], axis=1)),
    ),
    case(
        "DFT",
        REAL,
        np.array(12),
        None,
        const=[1],
        opset=20,
        label="padded",
        reference=lambda x, n, _: parts(np.fft.fft(x[..., 0], n, axis=-1)),
    ),
    case(
        "DFT",
        REAL,
        np.array(5),
        np.array(1),
        const=[1, 2],
        opset=20,
        label="cut",
        reference=lambda x, n, a: parts(np.fft.fft(x[..., 0], n, axis=a)),
    ),
    case(
        "DFT",
        HALF,
        np.array(9),
        np.array(1),
        const=[1, 2],
        opset=20,
        inverse=1,
        onesided=1,
        label="real",
        reference=lambda x, n, a: [np.fft.irfft(together(x), n, axis=a)[..., None].astype(np.float32)],
    ),
    case("STFT", SIGNAL, np.array(5), WINDOW, None, const=[1], opset=17, reference=lambda x, s, w, _: frames(x, w, 9)),
    case(
        "STFT",
        SIGNAL,
        np.array(5),
        WINDOW,
        None,
        const=[1],
        opset=17,
        onesided=0,
        dims={0: ("b", "t", 1)},
        reference=lambda x, s, w, _: frames(x, w, 16),
    ),
    case(
        "STFT",
        SIGNAL,
        np.array(5),
        None,
        np.array(12),
        const=[1, 3],
        opset=17,
        label="bare",
        reference=lambda x, s, w, n: frames(x, np.ones(n), 7),
    ),
    case(
        "MelWeightMatrix",
        np.array(8),
        np.array(64),
        np.array(8000),
        np.float32(0),
        np.float32(4000),
        const=range(5),
        opset=17,
        tolerance=1e-4,
    ),
]


@pytest.fixture(scope="module")
def compiled():
    return Compiled(CASES)


@pytest.mark.parametrize("c", CASES, ids=str)
def test_signal(compiled, c):
    check(compiled, c)
