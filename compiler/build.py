"""The build stage: a Relax module becomes one shared library of machine code and virtual-machine byte code."""

from __future__ import annotations

from pathlib import Path

from llmc.errors import KernelError
from llmc.fallback import legalize_and_schedule
from llmc.targets.base import Target
from llmc.tir_pipeline import PIPELINE
from llmc.tvm_shim import IRModule, TvmTarget, relax, tirx, tvm


def build(module: IRModule, target: Target, library: Path) -> None:
    """Compile `module` and write `library` (.so). Raises KernelError where code generation fails."""
    tvm_target = TvmTarget(target.tvm())
    try:
        with tvm_target:
            lowered = _in_order(_PASSES(legalize_and_schedule(module, target)))
            executable = relax.build(lowered, tvm_target, relax_pipeline=None, tir_pipeline=PIPELINE)
        executable.export_library(str(library))
    except (RuntimeError, ValueError, TypeError, tvm.error.InternalError) as e:
        reason = str(e).strip().splitlines()[-1]
        raise KernelError(f"code generation for {target.name} failed: {reason}", hint="--debug shows where") from e


# What relax.build does by default, without a second legalisation and without sort/sampling libraries that CPUs lack.
_PASSES = tvm.transform.Sequential(
    [
        relax.transform.RewriteDataflowReshape(),
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
        relax.transform.LowerAllocTensor(),
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
