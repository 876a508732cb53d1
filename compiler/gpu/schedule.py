"""Schedules for whatever no kernel template covers: TVM's dlight, and plain threads for what it cannot take apart.

Loop nests that come with an order of their own (scatters, recurrences, searches) are beyond dlight's rules. Of these a
nest that is one parallel loop becomes a block of one thread for each of its steps; any other runs in one thread: slow,
and right.
"""

from __future__ import annotations

from typing import Any

from llmc.tvm_shim import PrimFunc, TvmTarget, dlight, s_tir, tirx, tvm, tvm_ffi

_RULES = (
    dlight.gpu.Matmul(),
    dlight.gpu.GEMV(),
    dlight.gpu.Reduction(),
    dlight.gpu.GeneralReduction(),
    dlight.gpu.Fallback(),
)
# What TVM cannot lower of what its rules make shows here.
_CHECK = tvm.transform.Sequential([s_tir.transform.CanonicalizeLoop(), s_tir.transform.LowerCrossThreadReduction()])


def schedule(func: PrimFunc, target: TvmTarget) -> PrimFunc:
    """The function with its loops on blocks and threads. Never fails."""
    for rule in _RULES:
        try:
            found = rule.apply(func, target, False)
            if found is None:
                continue
            module = (found if isinstance(found, s_tir.Schedule) else found[0]).mod
            _CHECK(module)
        except Exception:  # whatever a rule stumbles over, the next one asks for less
            continue
        return module["main"]
    root = func.body.block
    statements = list(root.body.seq) if isinstance(root.body, tirx.SeqStmt) else [root.body]
    launches = [_launched(statement) for statement in statements]
    body = tirx.SeqStmt(launches) if len(launches) > 1 else launches[0]
    return func.with_body(tvm.s_tir.SBlockRealize([], True, _with_body(root, body)))


def _launched(statement: Any) -> Any:
    """One statement of the function as one launch."""
    if isinstance(statement, tvm.s_tir.SBlockRealize) and not statement.block.iter_vars:
        block = statement.block
        inner = block.body.body if isinstance(block.body, tirx.AttrStmt) else block.body
        if isinstance(inner, tirx.For) and inner.kind == tirx.ForKind.PARALLEL:
            return tvm.s_tir.SBlockRealize(
                [], True, _with_body(block, _blocks(inner.loop_var, inner.extent, inner.body))
            )
    return _blocks(tirx.Var("launch", "int64"), tirx.IntImm("int64", 1), statement)


def _blocks(index: Any, count: Any, body: Any) -> Any:
    """A block of one thread for each value of `index`; loops inside run one step after another."""
    thread = tirx.IterVar(None, tirx.Var("blockIdx.x", index.ty.dtype), tirx.IterVar.ThreadIndex, "blockIdx.x")
    zero = tirx.IntImm(str(index.ty.dtype), 0)
    return tirx.For(index, zero, count, tirx.ForKind.THREAD_BINDING, _of_thread(_serial(body)), thread)


def _of_thread(body: Any) -> Any:
    """What is allocated inside belongs to the thread: a kernel has no other place for it."""
    found: list[Any] = []
    tvm_ffi.structural_walk(body, (tirx.AllocBuffer, found.append), order="post")
    buffers = [allocation.buffer for allocation in found if allocation.buffer.scope() == "global"]
    own = {b: tirx.decl_buffer(b.shape, b.dtype, b.name, scope="local") for b in buffers}
    return tvm_ffi.structural_map(body, (tvm.ir.Var, lambda var: own.get(var, var)), order="post") if own else body


def _serial(body: Any) -> Any:
    def plain(loop: Any) -> Any:
        if loop.kind != tirx.ForKind.PARALLEL:
            return loop
        return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)

    return tvm_ffi.structural_map(body, (tirx.For, plain), order="post")


def _with_body(block: Any, body: Any) -> Any:
    kept = (block.init, block.alloc_buffers, block.match_buffers, block.annotations)
    return tvm.s_tir.SBlock(block.iter_vars, block.reads, block.writes, block.name_hint, body, *kept)
