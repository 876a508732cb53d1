"""Calling: right inputs give right outputs, wrong ones a message that names the input and what was expected."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llmc.errors import ArtifactError, InputError
from llmc.package.manifest import ArraySpec, FunctionSpec
from llmc.runtime import Model, load
from llmc.runtime.arrays import aligned, aligned_zeros, to_numpy, to_tensor
from llmc.runtime.binding import bind
from tests.runtime import toys


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(toys.write_mlp(tmp_path_factory.mktemp("mlp") / "m.llmc"))


def inputs(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rows)
    return {
        "x": rng.standard_normal((rows, toys.HIDDEN), "float32"),
        "shift": rng.standard_normal((rows, 3), "float32"),
    }


@pytest.mark.parametrize("rows", [1, 2, 17, 64])
def test_results(model: Model, rows: int) -> None:
    given = inputs(rows)
    out = model(**given)
    assert isinstance(out, dict)
    for found, expected in zip(out.values(), toys.mlp_reference(**given), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert list(out) == ["hidden", "out"]
    np.testing.assert_array_equal(model(given)["out"], out["out"])  # type: ignore[index]


def test_layouts_of_the_caller(model: Model) -> None:
    """Transposed, strided, unaligned and read-only arrays are copied; the caller's are never written."""
    given = inputs(4)
    expected = model(given)["out"]  # type: ignore[index]
    x = given["x"]
    raw = np.zeros(x.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64 + 4
    unaligned = raw[start : start + x.nbytes].view("float32").reshape(x.shape)
    unaligned[...] = x
    frozen = x.copy()
    frozen.flags.writeable = False
    for variant in (np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2], unaligned, frozen, x.tolist()):
        np.testing.assert_array_equal(model(x=variant, shift=given["shift"])["out"], expected)  # type: ignore[index]


def test_outputs_are_the_callers_own(model: Model) -> None:
    first = model(inputs(3))["out"]  # type: ignore[index]
    kept = first.copy()
    model(inputs(5))
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "input 'x': is missing"),
        ({"x": inputs(2)["x"]}, "input 'shift': is missing"),
        ({**inputs(2), "y": 1}, "input 'y': the model has no such input"),
        ({"shif": inputs(2)["shift"], "x": inputs(2)["x"]}, "did you mean 'shift'?"),
        ({**inputs(2), "x": np.zeros((2, 40))}, "dtype float64, expected float32 [rows, 40]"),
        ({**inputs(2), "x": np.zeros((2, 40))}, "hint: convert it: array.astype('float32')"),
        ({**inputs(2), "x": [["a"] * 40]}, "input 'x'"),
        ({**inputs(2), "x": [[1], [1, 2]]}, "is not an array"),
        ({**inputs(2), "x": np.zeros(40, "float32")}, "has shape [40], expected float32 [rows, 40]"),
        ({**inputs(2), "x": np.zeros((2, 41), "float32")}, "dimension 1 is 41, expected 40"),
        ({**inputs(2), "shift": np.zeros((3, 3), "float32")}, "dimension 0 (rows) is 3, but input 'x' has rows = 2"),
        (inputs(65), "dimension 0 (rows) is 65, must be from 1 to 64"),
        (inputs(0), "dimension 0 (rows) is 0, must be from 1 to 64"),
    ],
)
def test_wrong_inputs(model: Model, given: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as error:
        model(given)
    assert says in str(error.value)


def test_an_array_without_a_name_is_refused(model: Model) -> None:
    with pytest.raises(InputError, match="given by name"):
        model(np.zeros(3, np.float32))  # type: ignore[arg-type]


def test_the_signature_is_the_hint(model: Model) -> None:
    with pytest.raises(InputError) as error:
        model(z=1)
    assert "x: float32 [rows, 40], shift: float32 [rows, 3]" in str(error.value.hint)
    assert "x: float32 [rows, 40]" in repr(model)


def test_a_long_signature_is_cut_short() -> None:
    """A decoder has two inputs for every layer; nobody reads a hundred in a message."""
    spec = FunctionSpec(tuple(ArraySpec(f"x{i}", "float32", (1,)) for i in range(100)), (), ())
    with pytest.raises(InputError) as error:
        bind(spec, {})
    assert "x5: float32 [1], and 94 more, which llmc inspect shows" in str(error.value.hint)
    assert len(str(error.value)) < 400


def test_what_only_the_code_can_refuse(model: Model) -> None:
    with pytest.raises(InputError, match="refused these inputs"):
        model.functions["main"].run(())


def test_no_decoder_no_session(model: Model) -> None:
    with pytest.raises(ArtifactError, match="not a decoder"):
        model.session()


def sums(past: int, seq: int, mask: int) -> None:
    array = ArraySpec
    spec = FunctionSpec(
        inputs=(array("mask", "int64", ("past + seq",)), array("p", "int64", ("past",)), array("s", "int64", ("seq",))),
        outputs=(),
        params=(),
    )
    bind(spec, {"mask": np.zeros(mask, int), "p": np.zeros(past, int), "s": np.zeros(seq, int)})


def test_dimensions_that_are_sums() -> None:
    sums(3, 4, 7)
    sums(0, 4, 4)
    with pytest.raises(InputError, match=r"\(past \+ seq\) is 6, expected 7 \(past = 3, seq = 4\)"):
        sums(3, 4, 6)


@pytest.mark.parametrize("dim", ["unbound + 1", "f(x)", "7 / 2", "1 //", "n // 0"])
def test_dimensions_that_nobody_can_evaluate_are_left_to_the_code(dim: str) -> None:
    spec = FunctionSpec((ArraySpec("x", "float32", (dim, "n")),), (), ())
    bind(spec, {"x": np.zeros((3, 4), "float32")})


@pytest.mark.parametrize("value", [[1.5], 2.5])
def test_numbers_are_not_rounded_silently(value: Any) -> None:
    spec = FunctionSpec((ArraySpec("n", "int64", np.shape(value)),), (), ())
    with pytest.raises(InputError, match="dtype float64"):
        bind(spec, {"n": value})
    assert bind(spec, {"n": (np.shape(value) and [1]) or 2})[0].dtype == np.int64


@pytest.mark.parametrize("dtype", ["float32", "int64", "uint8", "bool", "float16", ml_dtypes.bfloat16])
def test_arrays_and_tensors_share_memory(dtype: Any) -> None:
    array = aligned_zeros((3, 5), dtype)
    assert array.ctypes.data % 64 == 0
    assert aligned(array) is array
    array[1, 2] = 1
    tensor = to_tensor(array)
    back = to_numpy(tensor)
    assert back.dtype == array.dtype and back.shape == array.shape
    assert back[1, 2] == 1
    assert tensor.data_ptr() == array.ctypes.data
