"""The body of the low-bit linear: dispatch on M, register blocks, epilogue. `lowbit` says what it computes.

Every body walks a register block, `rows` rows of x by some row blocks of the weight, over all of K:

- M up to the knob `skinny`: one pass over the packed weights, all rows at once. The weights stream from memory, each
  byte read once.
- more: blocks of MR rows pass over a panel of NV row blocks, which stays in the cache. The last block starts at
  M - MR: it computes a few rows twice, with equal results, and tails need no code of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from llmc.schedules import epilogue
from llmc.schedules.base import Config
from llmc.schedules.gemm.packing import stored_dtype
from llmc.targets.base import Target
from llmc.targets.intrinsics import Reg, Simd
from llmc.tvm_shim import IRBuilder, T

if TYPE_CHECKING:
    from llmc.schedules.gemm.lowbit import LowBitLinearWorkload

Block = list[list[Reg]]  # [row of x][row block of the weight]


def knobs(rows: tuple[int, ...], tiles: bool) -> dict[str, tuple[int | str, ...]]:
    """What `LowBitKernel` may be told: blocks of `rows` rows in registers, or of one or two tiles."""
    return {
        "MR": (16, 32) if tiles else rows,
        "NV": (1, 2) if tiles else (1, 2, 4),
        "KU": (4, 8, 16),
        "blocks": (1, 2, 4),
        "skinny": (4, 6, 8),
        "ahead_one": (0, 2048, 4096, 8192),
        "ahead_many": (0, 2048, 4096, 8192),
        "task_rows": (48, 96, 192),
    }


class LowBitKernel(ABC):
    """One kernel under construction: what the pieces of its body share."""

    def __init__(self, workload: LowBitLinearWorkload, target: Target, config: Config) -> None:
        self.workload, self.simd = workload, Simd(target)
        self.layout = workload.layout(target.lanes)
        self.MR, self.NV, self.KU = int(config["MR"]), int(config["NV"]), int(config["KU"])
        self.flight, self.skinny = int(config["blocks"]), int(config["skinny"])
        self.ahead_one, self.ahead_many = int(config["ahead_one"]), int(config["ahead_many"])
        self.task_rows = int(config["task_rows"])

    # -- what the compute type decides ---------------------------------------------------------------------------
    @abstractmethod
    def activations(self, M: Any) -> Any:
        """Prepare all M rows of x; what `stream` and `multiply` read them from."""

    @abstractmethod
    def multiply(self, x: Any, panel: Any, first: Any, rows: int, blocks: list[Any], ahead: int) -> Block:
        """Rows first to first + rows of x times row blocks of the weight. `panel` is what `expand` made of them, or
        None: then they are read packed, and asked for `ahead` bytes before their use."""

    def expand(self, blocks: list[Any]) -> Any:
        """Scratch with these row blocks in the form that many rows multiply with; None: the packed form itself."""
        return None

    @abstractmethod
    def registers(self, rows: int, blocks: int) -> int:
        """Registers that a block over packed weights keeps."""

    # -- the function ---------------------------------------------------------------------------------------------
    def build(self) -> Any:
        w, layout = self.workload, self.layout
        with IRBuilder() as ib:
            with T.prim_func(s_tir=True):
                T.func_name(w.kernel_name)
                T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
                inputs = {arg.name: T.arg(arg.name, T.handle()) for arg in w.inputs()}
                self.declare_weights()
                self.bias = T.arg("bias", T.Buffer((layout.blocks, layout.lanes), "float32")) if w.bias else None
                y = T.arg("y", T.handle())
                M = T.int64()
                self.x = T.match_buffer(inputs["x"], (M, w.K), "float32")
                self.residual = T.match_buffer(inputs["residual"], (M, w.columns), "float32") if w.residual else None
                self.y = T.match_buffer(y, (M, w.columns), "float32")
                x = self.activations(M)
                for rows in range(1, self.skinny + 1):
                    with T.If(T.int64(rows) == M), T.Then():
                        self._stream_all(x, rows)
                with T.If(T.int64(self.skinny) < M), T.Then():
                    self._panels(x, M)
        return ib.get()

    def declare_weights(self) -> None:
        """The parameters that hold the packed weight."""
        w, layout = self.workload, self.layout
        self.q = T.arg("q", T.Buffer(layout.q_shape, "uint8"))
        self.scale = T.arg("scale", T.Buffer(layout.plane_shape, stored_dtype(w.scale_dtype)))
        self.zero = None if w.symmetric else T.arg("zero", T.Buffer(layout.plane_shape, w.zero_dtype))

    def _stream_all(self, x: Any, rows: int) -> None:
        """y of exactly `rows` rows, in one pass over the packed weights."""
        flight = self.flight
        while flight > 1 and self.registers(rows, flight) >= self.simd.target.vector_registers:
            flight //= 2
        task_blocks, ahead = max(self.flight, self.layout.halves), self.ahead_one if rows == 1 else self.ahead_many
        with T.parallel(0, -(-self.layout.used_blocks // task_blocks)) as task:
            blocks = [T.bind(task * task_blocks + b) for b in range(task_blocks)]
            self._columns(x, None, 0, rows, blocks, flight, ahead)

    def _panels(self, x: Any, M: Any) -> None:
        """y of many rows. Threads share the panels and, where M is large, spans of rows."""
        MR, task_blocks = self.MR, max(self.NV, self.layout.halves)
        row_blocks = T.bind(T.ceildiv(M, T.int64(MR)))
        spans = T.bind(T.max(T.floordiv(row_blocks, T.int64(max(1, self.task_rows // MR))), T.int64(1)))
        panels = -(-self.layout.used_blocks // task_blocks)
        with T.parallel(0, spans * panels) as task:
            panel, span = T.bind(T.floordiv(task, spans)), T.bind(T.floormod(task, spans))
            blocks = [T.bind(panel * task_blocks + b) for b in range(task_blocks)]
            expanded = self.expand(blocks)
            low, high = (T.bind(T.floordiv((span + i) * row_blocks, spans)) for i in (0, 1))
            self.span(x, expanded, M, blocks, low, high)

    def span(self, x: Any, expanded: Any, M: Any, blocks: list[Any], low: Any, high: Any) -> None:
        """Columns of `blocks`, blocks `low` to `high` of MR rows."""
        MR = self.MR

        def rows(r: Any, ahead: int) -> None:
            self._columns(x, expanded, T.bind(T.min(r * MR, M - MR)), MR, blocks, self.NV, ahead)

        if expanded is None and self.ahead_many:  # the first rows find the weights in memory, the others in cache
            rows(low, self.ahead_many)
            low = low + 1
        with T.serial(low, high) as r:
            rows(r, 0)

    def _columns(self, x: Any, panel: Any, first: Any, rows: int, blocks: list[Any], flight: int, ahead: int) -> None:
        """y[first : first + rows, columns of `blocks`], `flight` blocks at a time; gate and up finish together."""
        together = max(flight, self.layout.halves)
        for start in range(0, len(blocks), together):
            acc: Block = [[] for _ in range(rows)]
            for b in range(start, start + together, flight):
                part = self.multiply(x, panel, first, rows, blocks[b : b + flight], ahead)
                for row, more in zip(acc, part, strict=True):
                    row.extend(more)
            self._finish(acc, first, blocks[start])

    # -- pieces that the compute types share ----------------------------------------------------------------------
    def zeros(self, rows: int, blocks: int, dtype: str = "float32") -> Block:
        block = [[self.simd.reg(dtype) for _ in range(blocks)] for _ in range(rows)]
        for register in (r for row in block for r in row):
            register.v = self.simd.f32(0) if dtype == "float32" else self.simd.i32(0)
        return block

    def scales(self, block: Any, g: Any) -> Any:
        return T.bind(widened(self.scale[block, g, self.simd.span(0)], self.workload.scale_dtype, self.simd.lanes))

    def shifts(self, block: Any, g: Any) -> Any:
        """-zero * scale, where zero points differ between groups."""
        assert self.zero is not None
        return T.bind(T.Cast(f"float32x{self.simd.lanes}", self.zero[block, g, self.simd.span(0)]))

    def unit(self, block: Any, g: Any, unit: Any, ahead: int = 0) -> list[Any]:
        """The lines of a unit, each asked for `ahead` bytes before its use."""
        lines = []
        for i in range(self.layout.unit_lines):
            line = unit * self.layout.unit_lines + i
            if ahead:
                self.simd.prefetch(self.q[block, g, line, ahead])
            lines.append(T.bind(self.q[block, g, line, self.simd.span(0, 4 * self.simd.lanes)]))
        return lines

    def prefetch_planes(self, block: Any, g: Any, ahead: int) -> None:
        """Scales and zero points of the group whose codes are `ahead` bytes away."""
        for plane in (self.scale, self.zero):
            if ahead and plane is not None:
                self.simd.prefetch(plane[block, g, ahead // (4 * self.layout.lines)])

    # -- epilogue -------------------------------------------------------------------------------------------------
    def _finish(self, acc: Block, first_row: Any, first_block: Any) -> None:
        """Bias, activation, residual and store of a register block."""
        simd, activation, halves = self.simd, self.workload.activation, self.layout.halves
        if self.bias is not None:
            for v in range(len(acc[0])):
                bias = T.bind(self.bias[first_block + v, simd.span(0)])
                for row in acc:
                    row[v].v = row[v].v + bias
        for row in acc:
            for v in range(0, len(row), halves):
                if activation == "silu_mul":
                    row[v].v = epilogue.silu_mul(simd, row[v].v, row[v + 1].v)
                else:
                    row[v].v = epilogue.apply(simd, activation, row[v].v)
        for v in range(0, len(acc[0]), halves):
            self._store([row[v] for row in acc], first_row, T.bind(T.floordiv(first_block + v, halves)))

    def _store(self, column: list[Reg], first_row: Any, block: Any) -> None:
        """One block of columns of y; the last may be narrower, and padding blocks behind it are none at all."""
        full, left = divmod(self.workload.columns, self.simd.lanes)

        def store(n: int) -> None:
            for m, register in enumerate(column):
                value = register.v if n == self.simd.lanes else register.part(n)
                at = [first_row + m, self._range(block * self.simd.lanes, n)]
                if self.residual is not None:
                    value = value + self.residual[tuple(at)]
                T.buffer_store(self.y, value, at)

        if not left and self.layout.used_blocks == self.layout.blocks:
            store(self.simd.lanes)
            return
        with T.If(block < full), T.Then():
            store(self.simd.lanes)
        if left:
            with T.If(block == full), T.Then():
                store(left)

    @staticmethod
    def _range(start: Any, n: int) -> Any:
        """Index of n elements; TVM has no vectors of one."""
        return T.ramp(start, 1, n) if n > 1 else start


def widened(scales: Any, dtype: str, lanes: int) -> Any:
    """`lanes` scales as float32, from how a plane of `dtype` stores them."""
    vector = f"x{lanes}" if lanes > 1 else ""
    if dtype != "bfloat16":
        return T.Cast(f"float32{vector}", scales)
    sixteen = T.broadcast(T.uint32(16), lanes) if lanes > 1 else T.uint32(16)
    return T.reinterpret(f"float32{vector}", T.shift_left(T.Cast(f"uint32{vector}", scales), sixteen))
