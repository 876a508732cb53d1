"""Names of torch.onnx have colons, and so have the names of packed weights."""

from __future__ import annotations

import numpy as np

from llmc.artifact import _Packed
from llmc.lower import Param


def test_weights_of_equal_shapes_are_not_exchanged() -> None:
    arrays = {f"onnx::LSTM_{i}": np.full((2, 3), i, np.float32) for i in range(3)}
    params = {name: Param(name, (2, 3), "float32", lambda x=x: [x], 0) for name, x in arrays.items()}
    packed = _Packed(params, ())
    for name, value in arrays.items():
        np.testing.assert_array_equal(packed[name], value)


def test_tensors_of_one_kernel_are_packed_once() -> None:
    calls = []

    def pack() -> list[np.ndarray]:
        calls.append(1)
        return [np.zeros(1), np.ones(1)]

    packed = _Packed({f"w:layout:{i}": Param(f"w:layout:{i}", (1,), "float64", pack, i) for i in range(2)}, ())
    assert [float(packed[f"w:layout:{i}"][0]) for i in range(2)] == [0, 1]
    assert len(calls) == 1
