"""How PrimFuncs become code: the short way for kernels that templates wrote, TVM's own for everything else.

TVM's default passes serve schedules: buffers are compacted, loops partitioned, thread bindings lowered. A template's
kernel is already the loop nest that it wants to be, and on its thousands of unrolled statements those passes take most
of the compile time (CompactBufferAllocation alone 1.7 of 2.2 s for one attention kernel) to change nothing: the machine
code runs equally fast. What stays is what matters: 32-bit indices, simplification and common subexpressions (without
simplification a GEMM runs 20 times slower, since guards stay in its inner loop).

A kernel divides no negative integers, so its floor divisions are the machine's own. TVM cannot know that where the
divisor is a size of run time: it writes a choice by both signs instead, over which its code generator then reasons for
most of the time that a kernel takes (attention: 2.0 of 3.1 s).
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from llmc.tvm_shim import IRModule, PrimFunc, TvmTarget, register_tir_pipeline, s_tir, tirx, tvm, with_plain_division

KERNEL = "llmc.kernel"  # the function attribute that asks for the short way
PIPELINE = "llmc"
OPAQUE = 8  # TVM's kind of operator that is never fused


@tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
def plain_division(mod: IRModule, _: Any) -> IRModule:
    return IRModule({name: with_plain_division(func) for name, func in mod.functions.items()}, attrs=mod.attrs)


# What the short ways of CPUs and of GPUs (`llmc.gpu.passes`) have in common, in this order.
TO_VECTORS = (
    s_tir.transform.ConvertBlocksToOpaque(),
    s_tir.transform.LowerOpaqueBlock(),
    tirx.transform.FlattenBuffer(),
    tirx.transform.BF16ComputeLegalize(),
    tirx.transform.NarrowDataType(32),
    tirx.transform.VectorizeLoop(True),
)
TO_PLAIN = (
    tirx.transform.UnrollLoop(),
    tirx.transform.StmtSimplify(),
    plain_division,  # while differences still stand where they are divided
    tirx.transform.CommonSubexprElim(),
    tirx.transform.FP8ComputeLegalize(),
    tirx.transform.VerifyMemory(),
    tirx.transform.AnnotateEntryFunc(),
)
TO_HOST = (
    tirx.transform.SplitHostDevice(),
    tirx.transform.MakePackedAPI(),
    tirx.transform.FP8StorageLegalize(),
    tirx.transform.BF16StorageLegalize(),
)
_SHORT = tvm.transform.Sequential([*TO_VECTORS, tirx.transform.StorageRewrite(), *TO_PLAIN, *TO_HOST])


def mark_kernel(func: PrimFunc) -> PrimFunc:
    """The function, to be built the short way, and fused with nothing."""
    return func.with_attr(KERNEL, True).with_attr("op_pattern", OPAQUE)


def build_kernels(kernels: dict[str, PrimFunc], target: TvmTarget) -> Any:
    """A runtime module of kernels by name, for measuring and testing them alone."""
    marked = {name: mark_kernel(func).with_attr("global_symbol", name) for name, func in kernels.items()}
    return tvm.tirx.build(IRModule(marked), target, pipeline=PIPELINE)


def link(module: Any, library: Path) -> Any:
    """What `build_kernels` returned, as a shared library that is written and loaded: LLVM then generates code once, for
    the file, and not in memory. Raises CalledProcessError where the linker fails."""
    parts = library.with_suffix(".o")
    module.write_to_file(str(parts), "o")
    # Not by way of the compiler's driver, which takes four times as long. A missing symbol is to fail here, not when
    # the kernel runs.
    command = ["ld", "-shared", "-z", "now", "-o", str(library), str(parts)]
    subprocess.run(command, check=True, capture_output=True)
    return tvm.runtime.load_module(str(library))


def _factory() -> tuple[Any, Any, Any]:
    default, finalize_host, finalize_device = s_tir.pipeline.default_s_tir_pipeline()

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
    def lower(mod: IRModule, _: Any) -> IRModule:
        parts: dict[bool, dict[Any, Any]] = {True: {}, False: {}}
        for name, func in mod.functions.items():
            parts[bool(func.attrs and func.attrs.get(KERNEL, False))][name] = func
        result = default(IRModule(parts[False], attrs=mod.attrs))
        result.update(_SHORT(IRModule(parts[True], attrs=mod.attrs)))
        return result

    return lower, finalize_host, finalize_device


register_tir_pipeline(PIPELINE, _factory)
