"""The build stage: a Relax module becomes one shared library of machine code and virtual-machine byte code."""

from __future__ import annotations

import ctypes
from pathlib import Path

from llmc.errors import KernelError
from llmc.fallback import legalize_and_schedule
from llmc.gpu import build as gpu
from llmc.gpu.typical import typical_calls
from llmc.gpu.workspaces import lift
from llmc.reshapes import reshapes_as_views
from llmc.targets.base import Target
from llmc.targets.cuda import CudaTarget
from llmc.tir_pipeline import PIPELINE
from llmc.tvm_shim import IRModule, TvmTarget, relax, tirx, tvm
from llmc.workspace import Workspace, hoist

DECODE = "decode"  # the function whose sizes are all known


def build(module: IRModule, target: Target, library: Path) -> dict[str, tuple[Workspace, ...]]:
    """Compile `module` and write `library` (.so). Returns the workspaces that functions take after their weights.

    Raises KernelError where code generation fails.
    """
    tvm_target = TvmTarget(target.tvm())
    try:
        with tvm_target:
            explicit = _WITH_OUTPUTS(reshapes_as_views(legalize_and_schedule(module, target)))
            if isinstance(target, CudaTarget):  # whose memory the virtual machine's pool gives out
                lifted = lift(explicit)
                planned = _in_order(_TO_BYTE_CODE(_PLAN_MEMORY(lifted)))
                gpu.build(planned, target, library, typical_calls(lifted))
                return {}
            planned = _PLAN_MEMORY(explicit)
            workspaces = {name: hoist(planned, name) for name in _names(planned) & {DECODE}}
            lowered = _in_order(_TO_BYTE_CODE(planned))
            executable = relax.build(lowered, tvm_target, relax_pipeline=None, tir_pipeline=PIPELINE)
        executable.export_library(str(library))
    except (RuntimeError, ValueError, TypeError, tvm.error.InternalError) as e:
        reason = str(e).strip().splitlines()[-1]
        raise KernelError(f"code generation for {target.name} failed: {reason}", hint="--debug shows where") from e
    _give_memory_back()
    return workspaces


def _give_memory_back() -> None:
    """Code generation leaves some 70 MB of freed memory with the C library, which packing weights would add to."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _names(module: IRModule) -> set[str]:
    return {name.name_hint for name, _ in module.functions_items()}


# What relax.build does by default, without a second legalisation and without sort/sampling libraries that CPUs lack.
_WITH_OUTPUTS = tvm.transform.Sequential(
    [
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
    ]
)
_PLAN_MEMORY = tvm.transform.Sequential([relax.transform.StaticPlanBlockMemory(), relax.transform.LowerAllocTensor()])
_TO_BYTE_CODE = tvm.transform.Sequential(
    [
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        relax.transform.AttachGlobalSymbol(),
    ]
)


def _in_order(module: IRModule) -> IRModule:
    """Sorts the statements that compute shapes. TVM emits them in the order of a hash table over addresses, so that two
    builds of one model would differ; each writes a slot of its own and reads only the inputs' slots."""
    for name, func in module.functions_items():
        if name.name_hint.startswith("shape_func") and isinstance(func.body, tirx.SeqStmt):
            stores = sorted(func.body, key=lambda store: int(store.indices[0]))
            module[name] = func.with_body(tirx.SeqStmt(stores))
    return module
