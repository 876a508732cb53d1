"""What g++ makes for the emulator, and where it is kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmc.emulator.build import CUDA, CUDART
from llmc.emulator.emulator import available

_FIRST = """
import numpy as np
from llmc.emulator.build import driver
from llmc.emulator.emulator import Emulator
print(driver())
out = np.zeros(4, "f4")
source = 'extern "C" __global__ void k(float* x) { __syncthreads(); x[threadIdx.x] = 1.0f; }'
Emulator(source).launch("k", (1,), (4,), [out])
assert out.min() == 1
"""


@pytest.mark.slow
@pytest.mark.skipif(not available(), reason="no g++ 12 for x86-64")
def test_two_processes_may_find_it_empty(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", _FIRST]
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    (folder,) = {Path(out.strip()) for out, _ in said}
    assert {file.name for file in folder.iterdir()} == {CUDA, CUDART}
    assert not list((tmp_path / "llmc" / "cuda-emulator").glob("tmp*"))  # nothing half done is left


@pytest.mark.slow
@pytest.mark.skipif(not available(), reason="no g++ 12 for x86-64")
def test_a_compiler_that_checks_jumps_by_default(tmp_path: Path) -> None:
    """Ubuntu's does; threads of a block jump from stack to stack."""
    wrapper = tmp_path / "g++"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} -D_FORTIFY_SOURCE=2 "$@"\n')
    wrapper.chmod(0o755)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "-c", _FIRST], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
