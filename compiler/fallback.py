"""Code for whatever no kernel template covers: Relax's own fusion, then one plain CPU schedule for every PrimFunc.

The schedule decides only what LLVM cannot: which stages are inlined, which loop runs innermost, and what runs in
parallel. LLVM vectorises the innermost loop, with tails and run-time extents; its code reached memory bandwidth where
explicit vector loops, whose tails need predicates, reached a third of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmc.gpu import schedule as gpu
from llmc.legalize import LEGALIZE, LEGALIZE_GPU
from llmc.order import define_symbols_first
from llmc.reshapes import reshapes_as_views
from llmc.targets.base import Target
from llmc.tvm_shim import IRModule, PrimFunc, Schedule, TvmTarget, relax, tirx, tvm, tvm_ffi

SCHEDULED = "tirx.is_scheduled"  # set on kernels that templates built: they stay as they are
SERIAL_BELOW = 1 << 14  # scalar steps that take about as long as starting a parallel loop
SPATIAL, REDUCTION = 0, 2  # tirx.IterVar.DataPar, .CommReduce

ScheduleError = tvm.s_tir.ScheduleError
# calls that are not worth repeating; nearbyint is the mark of a polynomial exponential, if_then_else of padding
_COSTLY = ("exp", "log", "pow", "erf", "tanh", "sin", "cos", "tan", "sqrt", "extern", "nearbyint", "if_then_else")


def legalize_and_schedule(mod: IRModule, target: Target) -> IRModule:
    """Lower Relax operators to fused PrimFuncs, and schedule those that are not yet. Never fails on a schedule."""
    device = TvmTarget(target.tvm())
    with device:
        mod = tvm.transform.Sequential(
            [
                relax.transform.LegalizeOps(LEGALIZE_GPU if target.kind == "cuda" else LEGALIZE),
                relax.transform.FoldConstant(),
                relax.transform.DeadCodeElimination(),
                relax.transform.AnnotateTIROpPattern(),
                relax.transform.FuseOps(),
                relax.transform.FuseTIR(),
            ]
        )(mod)
        mod = relax.transform.DeadCodeElimination()(reshapes_as_views(mod))
        mod = define_symbols_first(mod)
        for name, func in mod.functions_items():
            if isinstance(func, PrimFunc) and not (func.attrs and func.attrs.get(SCHEDULED, False)):
                if target.kind != "cuda":
                    mod[name] = schedule(func)
                elif not func.attrs.get("tirx.is_host_func", False):
                    mod[name] = gpu.schedule(func, device).with_attr(SCHEDULED, True)
    return mod


def schedule(func: PrimFunc) -> PrimFunc:
    """The same function with loops ordered and made parallel."""
    for plan in (_by_rows, _by_stage, _as_it_is):
        sch = Schedule(func)
        try:
            plan(sch)
        except Exception:  # whatever a schedule stumbles over, the next plan asks for less
            continue
        return sch.mod["main"].with_attr(SCHEDULED, True)
    return func.with_attr(SCHEDULED, True)


# -- plans ------------------------------------------------------------------------------------------------------
def _by_stage(sch: Schedule) -> None:
    """Every stage that could not be inlined gets loops of its own."""
    for stage in _inline(sch):
        if loops := sch.get_loops(stage.block):
            _arrange(sch, stage.block, loops)


def _as_it_is(sch: Schedule) -> None:
    """No order but what correctness asks for: a sum begins with its zero even where its loop does not run at all."""
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        kinds, loops = [int(v.iter_type) for v in sch.get(block).iter_vars], sch.get_loops(block)
        if REDUCTION in kinds and len(kinds) == len(loops):
            sch.decompose_reduction(block, loops[kinds.index(REDUCTION)])


def _by_rows(sch: Schedule) -> None:
    """Stages that reduce the same rows (softmax, norms) share one parallel loop over these rows."""
    *producers, last = _inline(sch)
    if not any(p.reduces for p in producers):
        raise ValueError("not a computation by rows")
    depth = min(stage.rows for stage in (*producers, last))
    if depth == 0:
        raise ValueError("one row")
    row = sch.get_loops(last.block)[depth - 1]
    for p in reversed(producers):
        sch.compute_at(p.block, row, preserve_unit_loops=True)
    _parallel(sch, sch.get_loops(last.block)[:depth])
    for stage in (*producers, last):
        inner = sch.get_loops(stage.block)[1:]
        if inner:
            _arrange(sch, stage.block, inner, parallel=False)


# -- stages -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Stage:
    """One block: does it reduce, and how many of its leading loops may be shared with other stages?

    The last spatial loop may not where it has to run inside of the reduction.
    """

    block: Any
    reduces: bool
    rows: int


def _inline(sch: Schedule) -> list[Stage]:
    """Merge every elementwise stage into its readers, unless that would repeat costly work; returns what is left."""
    blocks = list(sch.get_child_blocks(sch.get_sblock("root")))
    for block in blocks[:-1]:
        node = sch.get(block)
        if _reduces(node):
            continue
        readers = sch.get_consumers(block)
        if _is_costly(node) and (len(readers) > 1 or any(_reduces(sch.get(r)) for r in readers)):
            continue
        try:
            sch.compute_inline(block)
        except ScheduleError:
            continue  # an output of the function, or read by a stage that cannot take it
    return [_stage(sch, b) for b in sch.get_child_blocks(sch.get_sblock("root"))]


def _stage(sch: Schedule, block: Any) -> Stage:
    node, loops = sch.get(block), sch.get_loops(block)
    if node.iter_vars and not loops and not _reduces(node):
        return Stage(block, False, 0)  # a single number
    if not node.iter_vars or len(loops) != len(node.iter_vars):
        raise ValueError("an opaque block")  # an external loop nest, which comes with its own schedule
    spatial = [v for v in node.iter_vars if int(v.iter_type) == SPATIAL]
    while spatial and _extent(spatial[-1].dom.extent) == 1:
        spatial.pop()
    reduces = _reduces(node)
    return Stage(block, reduces, len(spatial) - (reduces and bool(spatial) and _spatial_runs(node)))


def _reduces(node: Any) -> bool:
    return any(int(v.iter_type) == REDUCTION for v in node.iter_vars)


def _is_costly(node: Any) -> bool:
    return any(any(c in getattr(call.op, "name", "") for c in _COSTLY) for call in _collect(node.body, tvm.ir.Call))


def _collect(body: Any, kind: type) -> list[Any]:
    """All nodes of one class inside of a statement."""
    found: list[Any] = []
    tvm_ffi.structural_walk(body, (kind, found.append), order="post")
    return found


# -- loops ------------------------------------------------------------------------------------------------------
def _arrange(sch: Schedule, block: Any, loops: Sequence[Any], parallel: bool = True) -> None:
    """Order the `loops` of one stage: what runs contiguously through memory comes last."""
    node = sch.get(block)
    kinds = [int(v.iter_type) for v in node.iter_vars][-len(loops) :]
    spatial = [rv for rv, kind in zip(loops, kinds, strict=True) if kind == SPATIAL]
    reduced = [rv for rv, kind in zip(loops, kinds, strict=True) if kind == REDUCTION]
    if not reduced:
        if parallel:
            _parallel(sch, spatial if _is_flat(node) or len(spatial) == 1 else spatial[:-1])
        return
    if spatial and _spatial_runs(node):
        sch.reorder(*spatial[:-1], *reduced, spatial[-1])
        spatial = spatial[:-1]
    if parallel and spatial:
        _parallel(sch, spatial)
    sch.decompose_reduction(block, reduced[0])


def _parallel(sch: Schedule, loops: Sequence[Any]) -> None:
    """One parallel loop over all of `loops`, unless the work is known to be less than starting one costs."""
    if not loops:
        return
    outer = sch.fuse(*loops) if len(loops) > 1 else loops[0]
    if _steps(sch.get(outer)) >= SERIAL_BELOW:
        sch.parallel(outer)


def _steps(loop: Any) -> float:
    """How often the body of a loop nest runs; infinite where that is only known at run time."""
    extent = _extent(loop.extent)
    if extent is None:
        return math.inf
    inner = [_steps(n) for n in _nested(loop.body)]
    return extent * (sum(inner) or 1)


def _nested(body: Any) -> list[Any]:
    """The outermost loops inside of a statement."""
    if isinstance(body, tirx.For):
        return [body]
    if isinstance(body, tirx.SeqStmt):
        return [loop for stmt in body.seq for loop in _nested(stmt)]
    return _nested(body.block.body) if isinstance(body, tvm.s_tir.SBlockRealize) else []


def _extent(e: Any) -> int | None:
    """A loop's extent where it is known."""
    return int(e) if isinstance(e, tirx.IntImm) else None


def _is_flat(node: Any) -> bool:
    """Does every buffer have the shape of the loops, and is it read and written at the loops' own place?"""
    place = [v.var for v in node.iter_vars]
    for region in (*node.reads, *node.writes):
        starts = [r.min for r in region.region]
        if len(starts) != len(place) or not all(s.same_as(p) for s, p in zip(starts, place, strict=True)):
            return False
        shape, loops = region.source.shape, [v.dom.extent for v in node.iter_vars]
        if not all(tvm_ffi.structural_equal(a, b) for a, b in zip(shape, loops, strict=True)):
            return False
    return True


def _spatial_runs(node: Any) -> bool:
    """Does the last spatial loop run contiguously through as many inputs as the last reduction loop does?"""
    spatial = [v.var for v in node.iter_vars if int(v.iter_type) == SPATIAL][-1]
    reduced = [v.var for v in node.iter_vars if int(v.iter_type) == REDUCTION][-1]
    votes = {spatial: 0, reduced: 0}
    for region in node.reads:
        if region.region:
            used = tirx.analysis.undefined_vars(region.region[-1].min)
            for v in votes:
                votes[v] += any(v.same_as(u) for u in used)
    return 0 < votes[spatial] >= votes[reduced]
