"""The only module that names version-specific paths of TVM.

Everything else imports TVM through here, so that a new release is one file's work. Importing this module loads the
compiler library (about one second and 250 MB): nothing that only loads or inspects an artifact may import it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

# TVM's default is half of the logical cores, which is one thread on a 2-core machine without SMT; it is read once,
# when the library's thread pool starts.
os.environ.setdefault("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import tvm
import tvm_ffi
from tvm import relax, rpc, s_tir, te, tirx, topi
from tvm.ir import Expr, IRModule
from tvm.relax import vm_build
from tvm.s_tir import Schedule, dlight
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.sym import Analyzer
from tvm.target import Target as TvmTarget
from tvm.tirx import PrimFunc
from tvm.tirx.build import split_host_device_mods
from tvm.tirx.compilation_pipeline import register_tir_pipeline

TVM_VERSION, FFI_VERSION = tvm.__version__, tvm_ffi.__version__
REQUIRED_TVM, REQUIRED_FFI = "0.27.0.post1", "0.1.14.post1"


def substitute(expr: Expr, values: Mapping[tirx.Var, Expr | int]) -> Expr:
    """An integer expression with some of its variables replaced."""
    exprs = {var: tirx.IntImm("int64", v) if isinstance(v, int) else v for var, v in values.items()}
    return tvm_ffi.structural_map(expr, (tvm.ir.Var, lambda var: exprs.get(var, var)), order="post")


def for_sizes(func: PrimFunc, shapes: Sequence[Sequence[int | str]], sizes: Sequence[Mapping[str, int]]) -> PrimFunc:
    """A function for these sizes alone: without the branches that none of them takes, and with a number for every
    symbol that is the same in all.

    `shapes` are those of its first parameters, with symbols as strings. Conditions on anything but them stay.
    """
    symbols = {
        dim: symbol
        for param, shape in zip(func.params, shapes, strict=False)
        for dim, symbol in zip(param.shape, shape, strict=True)
        if isinstance(symbol, str)
    }
    analyzer = Analyzer()

    def empty_unreached(branch: tirx.IfThenElse) -> tirx.IfThenElse:
        at = [{dim: size[symbol] for dim, symbol in symbols.items() if symbol in size} for size in sizes]
        taken = [analyzer.simplify(substitute(branch.condition, values)) for values in at]
        if not all(isinstance(known, tirx.IntImm) for known in taken):
            return branch
        if not any(map(int, taken)):  # the condition stays: TVM simplifies the other branch by it
            return tirx.IfThenElse(branch.condition, tirx.Evaluate(0), branch.else_case)
        if all(map(int, taken)):
            return tirx.IfThenElse(branch.condition, branch.then_case, None)
        return branch

    func = tvm_ffi.structural_map(func, (tirx.IfThenElse, empty_unreached), order="post")
    first = sizes[0]
    same = {
        dim: tirx.IntImm("int64", first[symbol])
        for dim, symbol in symbols.items()
        if symbol in first and all(size.get(symbol) == first[symbol] for size in sizes)
    }
    return tvm_ffi.structural_map(func, (tvm.ir.Var, lambda var: same.get(var, var)), order="post")


def with_plain_division(func: PrimFunc) -> PrimFunc:
    """A function whose integer divisions round towards zero: the same one, if it divides no negative numbers.

    Divisions of a difference stay as they are: simplification makes such of sums that were none, 2 + (-i) // 2 of
    (4 - i) // 2.
    """

    def plain(kind: Any) -> Any:
        return lambda e: e if _subtracts(e.a) else kind(e.a, e.b)

    return tvm_ffi.structural_map(
        func, [(tirx.FloorDiv, plain(tirx.Div)), (tirx.FloorMod, plain(tirx.Mod))], order="post"
    )


def _subtracts(expr: Any) -> bool:
    """Is there a difference, or a negative factor, among the terms of a sum?"""
    if isinstance(expr, tirx.Sub):
        return True
    if isinstance(expr, tirx.Mul):
        return any(isinstance(part, tirx.IntImm) and part.value < 0 for part in (expr.a, expr.b))
    return isinstance(expr, tirx.Add) and (_subtracts(expr.a) or _subtracts(expr.b))


def with_root_block(func: PrimFunc) -> PrimFunc:
    """A kernel's body inside a root block, without which Relax's passes take no PrimFunc."""
    root = tvm.s_tir.SBlock([], [], [], "root", func.body)
    return func.with_body(tvm.s_tir.SBlockRealize([], True, root))


def split_host_device(module: IRModule) -> tuple[IRModule, IRModule]:
    """A lowered module's functions for the host, and those for the one device it has, both without the others."""
    host, devices = split_host_device_mods(module)
    return host, next(iter(devices.values()), IRModule({}))


def cuda_source(name: str, kernel: PrimFunc, target: TvmTarget) -> str:
    """CUDA C of one device function. TVM's CUDA runtime, which would compile it at once, is kept out."""
    os.environ["TVM_COMPILE_FORCE_FALLBACK"] = "1"
    module = tvm.get_global_func("target.build.cuda")(IRModule({name: kernel}), target)
    return str(module.inspect_source("cuda"))


def vm_codegen(module: IRModule) -> tuple[Any, IRModule]:
    """(byte code of the Relax functions of `module`, its PrimFuncs): the first half of relax.build."""
    builder = relax.ExecBuilder()
    module = vm_build._vmcodegen(builder, module, "bytecode")
    return builder, vm_build._filter_tir(module) or IRModule({})


def vm_link(builder: Any, host: IRModule, target: TvmTarget) -> Any:
    """The executable of byte code and lowered host functions: the second half. Kernels are left to whoever loads it."""
    library = tvm.get_global_func("target.build.llvm")(host, target.host) if host.functions else None
    return vm_build.VMExecutable(vm_build._ffi_api.VMLink(builder, target, library, [], {}))


__all__ = [
    "FFI_VERSION",
    "TVM_VERSION",
    "Analyzer",
    "Expr",
    "IRBuilder",
    "IRModule",
    "PrimFunc",
    "Schedule",
    "T",
    "TvmTarget",
    "cuda_source",
    "dlight",
    "for_sizes",
    "register_tir_pipeline",
    "relax",
    "rpc",
    "s_tir",
    "split_host_device",
    "substitute",
    "te",
    "tirx",
    "topi",
    "tvm",
    "tvm_ffi",
    "vm_codegen",
    "vm_link",
    "with_plain_division",
    "with_root_block",
]
