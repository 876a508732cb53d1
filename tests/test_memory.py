"""How much memory a compilation takes beside what the compiler itself needs."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.graphs import F32, MS, Builder

SIZE, GROUP = 2048, 32  # a layer is 2 MiB of codes


def chain(path: Path, layers: int) -> Path:
    """4-bit layers one after another, in external data."""
    rng, g = np.random.default_rng(0), Builder()
    x = "x"
    g.input("x", F32, ["m", SIZE])
    g.output("y", F32, ["m", SIZE])
    for i in range(layers):
        codes = g.const(f"codes{i}", rng.integers(0, 256, (SIZE, SIZE // GROUP, GROUP // 2), np.uint8))
        scales = g.const(f"scales{i}", rng.random(SIZE * SIZE // GROUP).astype(np.float16), np.float32)
        sizes = {"K": SIZE, "N": SIZE, "bits": 4, "block_size": GROUP, "accuracy_level": 4}
        x = g.op("MatMulNBits", [x, codes, scales], "y" if i == layers - 1 else f"y{i}", domain=MS, **sizes)
    g.save(path, 23)
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location=f"{path.name}.data")
    return path


def peak_mb(model: Path) -> float:
    """Of a process that compiles and saves `model`."""
    script = f"""
        import llmc
        llmc.compile({str(model)!r}, target="x86-avx2").save({str(model.with_suffix(".llmc"))!r})
        print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


@pytest.mark.slow  # three compilations, each in a process of its own
def test_packed_weights_are_never_all_in_memory(tmp_path: Path) -> None:
    """32 layers take hardly more than 2, although their codes, one a byte, would be 120 MB more."""
    few, many = (peak_mb(chain(tmp_path / f"{n}.onnx", n)) for n in (2, 32))
    size = sum(f.stat().st_size for f in tmp_path.glob("32.onnx*")) / 2**20
    assert many - few < 0.25 * size, f"{many:.0f} MB for {size:.0f} MB of model, {few:.0f} MB for two layers"
