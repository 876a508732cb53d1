"""The format fp8: how weights are rounded, which kernels take them, and who refuses."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from llmc.cli import main
from llmc.errors import OptionError
from llmc.fuse import fuse
from llmc.importer import import_model
from llmc.pipeline import compile
from llmc.quantize import quantize
from llmc.quantize.formats import resolve_format
from llmc.quantize.rtn import round_to_e4m3
from llmc.schedules.formats import QuantizedWeight, to_e4m3
from llmc.select import select
from llmc.targets.base import Target
from llmc.targets.cuda import SM80, SM90
from tests.graphs import Decoder, Shape
from tests.halves import to_half

SHAPE = Shape(hidden=128, inner=200, vocab=512)


def test_rounding() -> None:
    """To nearest, ties to even; what is beyond the range is its end."""
    given = np.array([1.0625, 1.1875, 449, 1e9, -1e9, 2.0**-9, 2.0**-10, 0.75 * 2.0**-9, -0.0], np.float32)
    want = np.array([1, 1.25, 448, 448, -448, 2.0**-9, 0, 2.0**-9, -0.0], np.float32)
    found = to_e4m3(given).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(found, want)
    assert np.signbit(found[-1])


def test_a_row_has_one_scale() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((7, 100)).astype(np.float32) * np.logspace(-3, 3, 7, dtype=np.float32)[:, None]
    weight[3] = 0
    found = round_to_e4m3(weight)
    assert (found.bits, found.group_size, found.table, found.scale.shape) == (8, 100, "e4m3", (7, 1))
    normal = np.abs(weight) >= np.abs(weight).max(1, keepdims=True) / 448 * 2.0**-6
    error = np.abs(found.dequantize() - weight)
    # Half a step of 3 bits, and what rounding the scale to a float16 moves.
    assert np.all(error[normal] <= np.abs(weight[normal]) * (2.0**-4 + 2.0**-10))
    assert not found.dequantize()[3].any()


@pytest.mark.parametrize(("target", "x"), [(SM80, "f16"), (SM90, "fp8")], ids=["sm80", "sm90"])
@pytest.mark.parametrize("half", [False, True])
def test_what_multiplies(tmp_path: Path, target: Target, x: str, half: bool) -> None:
    """Layers in E4M3; the output layer, and the embedding that shares its weight, in 8-bit integers."""
    path = Decoder(SHAPE).plain(tmp_path / "plain.onnx")
    path = to_half(path, tmp_path / "half.onnx") if half else path
    graph = fuse(quantize(import_model(path), resolve_format("fp8")))
    weights = [w for w in graph.constants.values() if isinstance(w, QuantizedWeight)]
    assert sorted(w.table for w in weights) == ["", *["e4m3"] * 8]
    kernels = select({"main": graph}, target).calls()
    floats = {k.workload.activations: n for k, n in kernels.items() if k.template.name.startswith("fp8")}  # type: ignore[attr-defined]
    assert set(floats) == {x}
    names = {k.template.name for k in kernels}
    assert {"lowbit_mma", "embedding_lowbit_cuda"} <= names and not {"dense_cuda", "table_cuda"} & names


def test_cpus_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Decoder(SHAPE).plain(tmp_path / "plain.onnx")
    with pytest.raises(OptionError, match="'fp8' is for GPUs: no kernel for x86-avx2"):
        compile(path, target="x86-avx2", quantize="fp8")
    code = main(["compile", str(path), "--target", "x86-avx512", "--quantize", "fp8", "-o", str(tmp_path / "m.llmc")])
    said = capsys.readouterr().err
    assert code != 0 and "--target cuda-sm90" in said and "Traceback" not in said
