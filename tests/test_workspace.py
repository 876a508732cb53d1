"""Hoisted memory: the same results, from memory that the caller hands in and that values share."""

from __future__ import annotations

import numpy as np

from llmc.tvm_shim import TvmTarget, relax, tvm
from llmc.workspace import Workspace, hoist

PLAN = tvm.transform.Sequential(
    [
        relax.transform.LegalizeOps(),
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
        relax.transform.LowerAllocTensor(),
    ]
)
REST = tvm.transform.Sequential(
    [
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        relax.transform.AttachGlobalSymbol(),
    ]
)


def chain(length: int) -> tvm.IRModule:
    """x → tanh, reshaped to and fro → … → (result, x)."""
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4, 16), "float32"))
    with bb.function("decode", [x], attrs={"num_input": 1}):
        with bb.dataflow():
            h = x
            for _ in range(length):
                h = bb.emit(relax.op.tanh(h))
            out = bb.emit_output(relax.Tuple([h, x]))
        bb.emit_func_output(out)
    return bb.get()


def test_results_and_sharing() -> None:
    target = TvmTarget({"kind": "llvm", "mcpu": "x86-64"})
    with target:
        module = PLAN(chain(5))
        workspaces = hoist(module, "decode")
        executable = relax.build(REST(module), target, relax_pipeline=None)
    assert workspaces == tuple(Workspace(i, 0, (4, 16), "float32") for i in range(len(workspaces)))
    assert len(workspaces) < 5, "values that are never alive together share memory"
    vm = relax.VirtualMachine(executable, tvm.cpu())
    x = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
    memory = [tvm.runtime.tensor(np.full((4, 16), np.nan, np.float32)) for _ in workspaces]
    expected = x
    for _ in range(5):
        expected = np.tanh(expected)
    result = vm["decode"](tvm.runtime.tensor(x), *memory)
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-6)
    assert any(result.data_ptr() == m.data_ptr() for m in memory), "the result lies in the caller's memory"


def test_nothing_is_allocated_any_more() -> None:
    with TvmTarget({"kind": "llvm", "mcpu": "x86-64"}):
        module = PLAN(chain(5))
        assert "alloc_tensor" in module["decode"].script()
        hoist(module, "decode")
    assert "alloc" not in module["decode"].script()
