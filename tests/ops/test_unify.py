"""Rules demand that dimensions agree: a free symbol is substituted, two numbers are an error."""

import numpy as np
import pytest

from llmc.errors import ShapeError, UnsupportedError
from llmc.ops.context import Unify
from llmc.tvm_shim import relax

from .harness import case, emit


def f32(*shape):
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("c", "substitution"),
    [
        (case("MatMul", f32(2, 3), f32(3, 4), dims={0: ("m", "k"), 1: (3, 4)}), "k = 3"),
        (case("Add", f32(2, 3), f32(2, 3), dims={0: ("m", 3), 1: ("n", 3)}), "m = n"),
        (case("Concat", f32(2, 3), f32(2, 3), axis=0, dims={0: ("m", "k"), 1: ("m", 3)}), "k = 3"),
        (case("Split", f32(6), np.array([2, 4]), const=[1], outputs=2, dims={0: ("n",)}), "n = 6"),
    ],
    ids=str,
)
def test_symbols_are_substituted(c, substitution):
    raised = emit(relax.BlockBuilder(), "f", c)
    assert isinstance(raised, Unify)
    assert str(raised) == substitution


def test_unequal_numbers_are_an_error():
    raised = emit(relax.BlockBuilder(), "f", case("MatMul", f32(2, 3), f32(4, 5)))
    assert isinstance(raised, ShapeError)
    assert "3" in str(raised)


def test_a_rank_may_not_be_data():
    raised = emit(relax.BlockBuilder(), "f", case("Squeeze", f32(1, 3), np.array([0]), dims={1: ("n",)}))
    assert isinstance(raised, UnsupportedError)
    assert "decides the result's rank, and how long it is, n, varies" in str(raised)
