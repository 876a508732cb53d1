"""From PrimFuncs to host functions and device functions, the short way for templates' kernels (cf. `tir_pipeline`).

TVM's own passes insert barriers where shared memory is written and read; a template's kernel has all of its own, and is
changed by nothing that may move an access across one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmc.gpu.launch import Launch, launch_of
from llmc.tir_pipeline import KERNEL, TO_HOST, TO_PLAIN, TO_VECTORS
from llmc.tvm_shim import IRModule, PrimFunc, TvmTarget, s_tir, split_host_device, tirx, tvm, tvm_ffi

_SHORT = tvm.transform.Sequential(
    [
        *TO_VECTORS,
        *TO_PLAIN,
        s_tir.transform.InferFragment(),
        s_tir.transform.LowerThreadAllreduce(),
        s_tir.transform.MergeSharedMemoryAllocations(),
        *TO_HOST,
    ]
)


def lower(module: IRModule, target: TvmTarget) -> tuple[IRModule, dict[str, tuple[PrimFunc, Launch]]]:
    """(host functions, kernels by name) of PrimFuncs with scheduled bodies, ready for code generation.

    Host functions check no tensors: the virtual machine has, and where kernels are emulated they lie in other memory
    than the target's.
    """
    default, finalize_host, finalize_device = s_tir.pipeline.default_s_tir_pipeline()
    module = tirx.transform.BindTarget(target)(module)
    parts: dict[bool, dict[str, PrimFunc]] = {True: {}, False: {}}
    for name, func in module.functions.items():
        parts[bool(func.attrs and func.attrs.get(KERNEL, False))][name] = func
    lowered = default(IRModule(parts[False], attrs=module.attrs))
    lowered.update(_SHORT(IRModule(parts[True], attrs=module.attrs)))
    host, device = split_host_device(lowered)
    device = IRModule({name: _with_plain_names(func) for name, func in device.functions.items()})
    launches = {name.name_hint: launch_of(func) for name, func in device.functions.items()}
    finished = {name.name_hint: func for name, func in finalize_device()(device).functions.items()}
    kernels = {name: (finished[name], launch) for name, launch in sorted(launches.items())}
    host = IRModule({name: _launch_none_of_nothing(func, kernels) for name, func in host.functions.items()})
    return tirx.transform.SkipAssert()(finalize_host()(host)), kernels


def _with_plain_names(func: PrimFunc) -> PrimFunc:
    """A device function whose parameters have names of C: a model's own, of inputs and dimensions, may be any text."""
    plain = {
        param: tirx.Var(f"p{i}_{re.sub(r'[^A-Za-z0-9]', '_', param.name)}", param.ty)
        for i, param in enumerate(func.params)
    }
    return tvm_ffi.structural_map(func, (tvm.ir.Var, lambda var: plain.get(var, var)), order="post")


def _launch_none_of_nothing(func: PrimFunc, kernels: Mapping[str, tuple[PrimFunc, Launch]]) -> PrimFunc:
    """A host function that leaves launches of no blocks out: the driver refuses them, and a size may be 0."""

    def guarded(statement: tirx.Evaluate) -> Any:
        call = statement.value
        name = str(getattr(call.args[0], "value", "")) if isinstance(call, tvm.ir.Call) and call.args else ""
        if name not in kernels:
            return statement
        sizes = call.args[1 + len(kernels[name][1].arguments) :]
        unknown = [size > 0 for size in sizes if not isinstance(size, tirx.IntImm)]
        return tirx.IfThenElse(tirx.all(*unknown), statement, None) if unknown else statement

    return tvm_ffi.structural_map(func, (tirx.Evaluate, guarded), order="post")
