"""Memory between launches becomes an argument: its size is said in terms of arguments alone."""

from __future__ import annotations

from typing import Any

import pytest

from llmc.gpu.workspaces import _Lifted
from llmc.schedules.gemm.cuda_f16 import MMA_F16
from llmc.schedules.gemm.cuda_fp8 import MMA_FP8
from llmc.schedules.gemm.f16 import F16LinearWorkload
from llmc.schedules.gemm.fp8 import Fp8LinearWorkload
from llmc.targets.cuda import SM90
from llmc.tvm_shim import tvm, tvm_ffi


@pytest.mark.parametrize(
    ("template", "workload"),
    [(MMA_F16, F16LinearWorkload(960, 576, activations="f16")), (MMA_FP8, Fp8LinearWorkload(960, 576))],
    ids=["f16", "fp8"],
)
def test_sizes_are_of_arguments(template: Any, workload: Any) -> None:
    """Blocks that share k leave their parts of sums, whose number the host computes from M and keeps under a name."""
    lifted = _Lifted.of(template.build(workload, SM90, template.default(workload, SM90)))
    assert lifted.buffers
    used: list[Any] = []
    for dim in (dim for buffer in lifted.buffers for dim in buffer.shape):
        tvm_ffi.structural_walk(dim, (tvm.ir.Var, used.append), order="pre")
    known = {dim for param in lifted.outer for dim in param.shape if isinstance(dim, tvm.ir.Var)}
    assert used and set(used) <= known
