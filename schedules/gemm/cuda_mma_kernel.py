"""The body of linear layers on tensor cores: x rounded in shared memory, weights straight into registers.

A block goes over k in steps. While it multiplies one step, the weights of the next ones are copied to shared memory
(cp.async, several stages), and x of the next one is loaded to registers; it is rounded on its way to shared memory. One
barrier a step is enough: what a step writes, the step before it has read.

Codes are multiplied as whole numbers, which 16 bits hold exactly; scales come on the float32 sums of each group. Where
zero points differ between groups, their part of a sum is the zero point times the sum of x: a product with ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.schedules.gemm.cuda_mma_codes import Codes, HalfCodes, HalfTable, Operands, Table
from llmc.schedules.gemm.cuda_mma_decode import DecodeBlock, DecodeTile, room_for_x
from llmc.schedules.gemm.cuda_mma_end import Ending
from llmc.schedules.gemm.cuda_mma_outliers import Aside
from llmc.schedules.gemm.cuda_mma_packing import TILE, FragmentLayout
from llmc.schedules.gemm.cuda_mma_tile import CHUNKS, BlockTile, Split, swizzled
from llmc.schedules.gemm.lowbit_kernel import widened
from llmc.schedules.gemm.packing import stored_dtype
from llmc.targets import mma
from llmc.targets.cuda import CudaTarget
from llmc.targets.threads import WARP, Cell, Scalar, barrier, launch, shared
from llmc.tvm_shim import IRBuilder, T

FEW = mma.ROWS  # rows that the first tile is for
_RESIDENT = 2  # blocks of many rows that a multiprocessor holds at once


class MmaKernel:
    """One kernel under construction: `kind` is that of its products (`mma.multiply_add`), `block` what a thread does.

    `group` is k of one scale, None where one serves the whole row, or there is none.
    """

    def __init__(
        self,
        workload: Any,
        target: CudaTarget,
        tiles: tuple[DecodeTile, BlockTile, Any],
        layout: FragmentLayout,
        kind: str,
        block: type[MmaBlock],
    ) -> None:
        self.w, self.target, self.scalar = workload, target, Scalar(target)
        self.tiles, self.layout = tiles, layout
        self.kind, self.block = kind, block
        self.decode_kind = {"s8u8": "u8s8"}.get(kind, kind)  # the weight on the left
        self.room = room_for_x(target)
        self.plane_dtypes = plane_dtypes(workload)
        self.symmetric: bool = getattr(workload, "symmetric", True)
        self.table: str = getattr(workload, "table", "")
        if self.table:
            self.codes: Operands = block.tables(self.table)
        else:
            self.codes = block.codes(layout, getattr(workload, "zero", 0.0) if self.symmetric else None)
        size = getattr(workload, "group_size", workload.K)
        self.group = size if size < workload.K else None
        self.groups = -(-workload.K // size)

    def build(self) -> Any:
        w, layout = self.w, self.layout
        with IRBuilder() as ib, T.prim_func(s_tir=True):
            T.func_name(w.kernel_name)
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            inputs = {arg.name: T.arg(arg.name, T.handle()) for arg in w.inputs()}
            self.q = T.arg("q", T.Buffer((layout.tiles, layout.units, 4 * WARP), "uint32"))
            self.planes: dict[str, Any] = {}
            for name, dtype in self.plane_dtypes.items():
                plane = T.Buffer((layout.tiles, self.groups, TILE), stored_dtype(dtype))
                self.planes[name] = T.arg(name, plane)
            self.aside = Aside(self) if getattr(w, "outliers", 0) else None
            self.bias = T.arg("bias", T.Buffer((w.N,), "float32")) if w.bias else None
            y = T.arg("y", T.handle())
            self.M = T.int64()
            self.x = T.match_buffer(inputs["x"], (self.M, w.K), "float32")
            self.residual = T.match_buffer(inputs["residual"], (self.M, w.columns), "float32") if w.residual else None
            self.y = T.match_buffer(y, (self.M, w.columns), "float32")
            self._launch()
        return ib.get()

    def _launch(self) -> None:
        decode, few, many = self.tiles
        decodes = decode.rows(self.layout, self.room) >= self.M
        split_few, split_many = Split.even(few.steps(self.layout, self.w.K), few.split), self._split(many)
        parts = T.Select(self.M <= FEW, T.int64(split_few.parts), T.Cast("int64", split_many.parts))
        parts = T.bind(T.Select(decodes, T.int64(decode.split), parts))
        self.end = Ending(self, parts if decode.split * few.split * many.split > 1 else None)
        with T.If(decodes):
            with T.Then():
                with launch(decode.threads, self.layout.tiles, decode.split, T.min(self.M, T.int64(1))) as at:
                    self.block.decode(self, decode, *at[:3]).emit()
            with T.Else(), T.If(self.M <= FEW):
                with T.Then():
                    self._launch_tile(few, split_few)
                with T.Else():
                    self._launch_tile(many, split_many)
        self.end.merge()

    def load_x(self, into: Any, at: int, row: Any, k: Any, there: Any) -> None:
        """into[at …] := four of a row of x; zeros unless they are `there`, and beyond K."""
        zero = T.float32(0)
        if self.w.K % 4 == 0:
            value = self.x[row, T.ramp(k, 1, 4)]
            if there is not True:
                value = T.if_then_else(there, value, T.broadcast(zero, 4))
            T.buffer_store(into, value, [T.ramp(at, 1, 4)])
            return
        for i in range(4):  # rows begin anywhere
            found = k + i < self.w.K
            value = T.if_then_else(found if there is True else T.And(there, found), self.x[row, k + i], zero)
            T.buffer_store(into, value, [at + i])

    def rounded(self, low: Any, high: Any) -> Any:
        """Two float32 in one register, as products take them."""
        register = Cell(T.uint32(0), "uint32")
        mma.pack(self.kind, register, low, high)
        return register.v

    def _split(self, tile: BlockTile) -> Split:
        """As many parts as leave no multiprocessor idle: rows decide."""
        steps = tile.steps(self.layout, self.w.K)
        if tile.split == 1:
            return Split(1, steps)
        places = T.floordiv(self.M + (tile.rows - 1), T.int64(tile.rows)) * -(-self.layout.tiles // tile.across)
        wanted = T.floordiv(T.int64(_RESIDENT * self.target.multiprocessors), T.max(places, T.int64(1)))
        split = Split.even(steps, T.bind(T.max(T.min(wanted, T.int64(tile.split)), T.int64(1))))
        return Split(T.bind(split.parts), T.bind(split.share))

    def _launch_tile(self, tile: BlockTile, split: Split) -> None:
        columns = -(-self.layout.tiles // tile.across)
        rows = T.floordiv(self.M + (tile.rows - 1), T.int64(tile.rows))
        with launch(tile.threads, columns, rows, split.parts) as at:
            self.block(self, tile, split, *at).emit()


def plane_dtypes(workload: Any) -> dict[str, str]:
    """What is stored for each row and group, with its dtype."""
    planes = {"scale": workload.scale_dtype} if hasattr(workload, "scale_dtype") else {}
    return planes if getattr(workload, "symmetric", True) else planes | {"zero": "float32"}


class MmaBlock:
    """What one thread does of one block's tile, for products of 16-bit elements."""

    codes: type[Codes] = HalfCodes
    tables: type[Table] = HalfTable
    decode: type[DecodeBlock] = DecodeBlock

    def __init__(
        self,
        kernel: MmaKernel,
        tile: BlockTile,
        split: Split,
        thread: Any,
        column_block: Any,
        row_block: Any,
        part: Any,
    ) -> None:
        self.k, self.tile, self.layout, self.pack = kernel, tile, kernel.layout, kernel.layout.pack
        self.split, self.part = split, part
        self.thread, self.lane = thread, Cell(mma.lane_of(thread), "int64").v
        warp = T.bind(T.floordiv(thread, T.int64(WARP)))
        self.along = T.bind(T.floormod(warp, T.int64(tile.along)))
        place = T.bind(T.floordiv(warp, T.int64(tile.along)))
        self.across = T.bind(T.floormod(place, T.int64(tile.across)))
        self.down = T.bind(T.floordiv(place, T.int64(tile.across)))
        self.r, self.q = mma.fragment_place(self.lane)
        self.first_tile = T.bind(column_block * tile.across)
        self.first_row = T.bind(row_block * tile.rows)
        self.depth = self.layout.step * tile.along  # k of one step of the block
        self.begin, self.steps = self._own_steps(tile.steps(kernel.layout, kernel.w.K))
        self.units = self.layout.step // self.layout.unit  # of one warp in one step
        self.spans = 1 if kernel.group is None else max(1, self.layout.step // kernel.group)
        self.products = self.layout.step // mma.depth(self.pack)  # along k, of one warp in one step

    def _own_steps(self, all_: int) -> tuple[Any, Any]:
        """The first one of this block, and how many."""
        if isinstance(self.split.parts, int) and self.split.parts == 1:
            return 0, all_
        begin = T.bind(self.part * self.split.share)
        return begin, Cell(T.min(T.int64(all_) - begin, T.Cast("int64", self.split.share)), "int64").v

    # The pipeline

    def emit(self) -> None:
        tile, stages = self.tile, self.tile.stages
        row_words = self.depth // self.pack
        self.a = shared((2, tile.rows, row_words), "uint32")
        self.b = shared((stages, tile.across, self.units * tile.along, 4 * WARP), "uint32")
        self.staged = {}
        if self.k.group is not None:
            for name, plane in self.k.planes.items():
                shape = (stages, tile.across, tile.along * self.spans * TILE)
                self.staged[name] = shared(shape, str(plane.dtype))
        self.items = tile.rows * tile.along * CHUNKS // tile.threads
        self.held = T.alloc_buffer((self.items * 4 * self.pack,), "float32", scope="local")
        self.sums = self._accumulators()
        self.row_sums = self._row_sums()
        for step in range(stages - 1):
            if not isinstance(self.steps, int):
                with T.If(step < self.steps), T.Then():
                    self._copy_weights(self.begin + step, step)
            elif step < self.steps:
                self._copy_weights(self.begin + step, step)
            mma.commit_copies()
        self._load_x(self.begin)
        self._store_x(0)
        with T.serial(0, self.steps) as at:
            step = T.bind(T.Cast("int64", at))
            mma.wait_copies(stages - 2)
            barrier()
            with T.If(step + (stages - 1) < self.steps), T.Then():
                self._copy_weights(self.begin + step + (stages - 1), T.floormod(step + (stages - 1), T.int64(stages)))
            mma.commit_copies()
            with T.If(step + 1 < self.steps), T.Then():
                self._load_x(self.begin + step + 1)
            self._multiply(T.bind(T.floormod(step, T.int64(stages))), T.bind(T.floormod(step, T.int64(2))))
            with T.If(step + 1 < self.steps), T.Then():
                self._store_x(T.floormod(step + 1, T.int64(2)))
        if self.k.group is None and self.k.planes:
            self._fold(self.sums, self.sums, self.row_sums, self._whole_row)
        if tile.along > 1:
            self._add_up()
        with T.If(self.along == 0), T.Then():
            if self.k.aside is not None:
                with T.If(self.part == 0), T.Then():
                    self._add_outliers(self.k.aside)
            self._finish()

    def _copy_weights(self, step: Any, slot: Any) -> None:
        """Begin to copy the weights of a step, and what belongs to them; zeros for k beyond the last unit."""
        tile, layout = self.tile, self.layout
        units = self.units * tile.along
        whole = layout.units % units == 0
        for i in self._shares(tile.across * units * WARP):
            at, word = T.bind(T.floordiv(i, T.int64(units * WARP))), T.bind(T.floormod(i, T.int64(units * WARP)))
            local, lane = T.bind(T.floordiv(word, T.int64(WARP))), T.bind(T.floormod(word, T.int64(WARP)))
            unit = T.bind(step * units + local)
            column = T.min(self.first_tile + at, T.int64(layout.tiles - 1))
            source = self.k.q[column, unit if whole else T.min(unit, T.int64(layout.units - 1)), lane * 4]
            mma.copy_async(self.b[slot, at, local, lane * 4], source, None if whole else unit < layout.units)
        for name, staged in self.staged.items():
            self._copy_plane(self.k.planes[name], staged, step, slot)

    def _copy_plane(self, plane: Any, staged: Any, step: Any, slot: Any) -> None:
        group, layout = self.k.group, self.layout
        assert group is not None
        per_copy = mma.COPIED // np.dtype(str(plane.dtype)).itemsize
        of_group = TILE // per_copy
        spans = self.tile.along * self.spans
        for i in self._shares(self.tile.across * spans * of_group):
            at, rest = (
                T.bind(T.floordiv(i, T.int64(spans * of_group))),
                T.bind(T.floormod(i, T.int64(spans * of_group))),
            )
            span, part = T.bind(T.floordiv(rest, T.int64(of_group))), T.bind(T.floormod(rest, T.int64(of_group)))
            k = (step * spans + span) * (layout.step // self.spans)
            g = T.min(T.floordiv(k, T.int64(group)), T.int64(self.k.groups - 1))
            column = T.min(self.first_tile + at, T.int64(layout.tiles - 1))
            mma.copy_async(staged[slot, at, span * TILE + part * per_copy], plane[column, g, part * per_copy])

    def _shares(self, count: int) -> Any:
        """What this thread does of `count` pieces that the block shares out."""
        threads = self.tile.threads
        for start in range(0, count, threads):
            i = T.bind(self.thread + start)
            if start + threads <= count:
                yield i
            else:
                with T.If(i < count), T.Then():
                    yield i

    def _x_place(self, item: int) -> tuple[Any, Any]:
        """Row in the tile and chunk of 16 bytes in the row of what this thread stages."""
        chunks = CHUNKS * self.tile.along
        i = T.bind(self.thread + item * self.tile.threads)
        return T.bind(T.floordiv(i, T.int64(chunks))), T.bind(T.floormod(i, T.int64(chunks)))

    def _load_x(self, step: Any) -> None:
        """This thread's share of x, a row beyond the last one being the last one again; 0 where k ends."""
        elements, K = 4 * self.pack, self.k.w.K
        for item in range(self.items):
            row, chunk = self._x_place(item)
            m = T.bind(T.min(self.first_row + row, self.k.M - 1))
            k = T.bind(step * self.depth + chunk * elements)
            for part in range(0, elements, 4):
                there = k + part < K if K % self.depth else True
                self.k.load_x(self.held, item * elements + part, m, k + part, there)

    def _store_x(self, slot: Any) -> None:
        """Rounded, as rows of 16-byte chunks."""
        words = T.alloc_buffer((4,), "uint32", scope="local")
        for item in range(self.items):
            row, chunk = self._x_place(item)
            for word in range(4):
                T.buffer_store(words, self._rounded(item * 4 * self.pack + word * self.pack), [word])
            to = swizzled(chunk, row) * 4
            T.buffer_store(self.a, words[T.ramp(0, 1, 4)], [slot, row, T.ramp(to, 1, 4)])

    def _rounded(self, at: int) -> Any:
        """Two held values in one register."""
        return self.k.rounded(self.held[at], self.held[at + 1])

    # Products

    def _accumulators(self, dtype: str = "float32") -> list[list[list[Cell]]]:
        """[products of 16 rows][4 matrices][registers], zeros."""
        return [[_registers(dtype) for _ in range(4)] for _ in range(self.tile.products)]

    def _row_sums(self) -> list[list[Cell]]:
        """[products of 16 rows][registers]: sums of x, where zero points want them."""
        return [] if self.k.symmetric else [_registers(self.k.codes.sums_dtype) for _ in range(self.tile.products)]

    def _multiply(self, slot: Any, a_slot: Any) -> None:
        """One step of this warp."""
        a = [[Cell(T.uint32(0), "uint32") for _ in range(4)] for _ in range(self.tile.products)]
        words = [T.alloc_buffer((4,), "uint32", scope="local") for _ in range(2)]  # of a product's two registers of B
        for span in range(self.spans):
            grouped = self.k.group is not None
            sums = self._accumulators(self.k.codes.sums_dtype) if grouped else self.sums
            row_sums = self._row_sums() if grouped else self.row_sums
            each = self.products // self.spans
            for product in range(span * each, (span + 1) * each):
                self._load_a(a, a_slot, product)
                places = [divmod(register, self.layout.registers) for register in (2 * product, 2 * product + 1)]
                for unit, i in places:
                    if i == 0:
                        at = [slot, self.across, self.along * self.units + unit, T.ramp(self.lane * 4, 1, 4)]
                        T.buffer_store(words[unit % 2], self.b[tuple(at)], [T.ramp(0, 1, 4)])
                for j in range(4):
                    (first, i0), (second, i1) = places
                    b = self.k.codes.pair((words[first % 2][j], words[second % 2][j]), (i0, i1))
                    for m, registers in enumerate(a):
                        mma.multiply_add(self.k.kind, sums[m][j], [cell.v for cell in registers], b)
                for total, registers in zip(row_sums, a, strict=False):
                    ones = T.uint32(self.k.codes.ones)
                    mma.multiply_add(self.k.kind, total, [cell.v for cell in registers], [ones, ones])
            if grouped:
                self._fold_span(sums, row_sums, slot, a_slot, span)

    def _load_a(self, a: list[list[Cell]], slot: Any, product: int) -> None:
        for m, registers in enumerate(a):
            row = (self.down * self.tile.products + m) * mma.ROWS + T.floormod(self.lane, T.int64(mma.ROWS))
            chunk = self.along * CHUNKS + 2 * product + T.floordiv(self.lane, T.int64(mma.ROWS))
            mma.load_matrices(registers, self.a[slot, row, swizzled(chunk, self.lane) * 4])

    # Scales

    def _of_span(self, name: str, slot: Any, span: int) -> list[Any]:
        """Eight staged values of a plane, for the columns of this thread."""
        first = (self.along * self.spans + span) * TILE + self.q * 8
        return self._eight(lambda k: self.staged[name][slot, self.across, T.ramp(first + k, 1, 4)], name)

    def _fold_span(self, sums: Any, row_sums: list[list[Cell]], slot: Any, a_slot: Any, span: int) -> None:
        self._fold(self.sums, sums, row_sums, lambda name: self._of_span(name, slot, span))

    def _whole_row(self, name: str) -> list[Any]:
        column = T.min(self.first_tile + self.across, T.int64(self.layout.tiles - 1))
        return self._eight(lambda k: self.k.planes[name][column, 0, T.ramp(self.q * 8 + k, 1, 4)], name)

    def _eight(self, load: Any, name: str) -> list[Any]:
        values = T.alloc_buffer((8,), "float32", scope="local")
        dtype = self.k.plane_dtypes[name]
        for k in (0, 4):
            T.buffer_store(values, widened(load(k), dtype, 4), [T.ramp(k, 1, 4)])
        return [values[k] for k in range(8)]

    def _fold(self, into: Any, sums: Any, row_sums: list[list[Cell]], values: Any) -> None:
        """into (+)= scale * (sums - zero * sum of x): `into` is `sums` where there is one group."""
        scale = values("scale")
        zero = [] if self.k.symmetric else values("zero")
        for m, row in enumerate(sums):
            for j, registers in enumerate(row):
                for at, register in enumerate(registers):
                    h, e = divmod(at, 2)
                    value = register.v
                    if zero:
                        value = value - zero[2 * j + e] * row_sums[m][2 * h].v
                    value = value * scale[2 * j + e]
                    total = into[m][j][at]
                    total.v = value if into is sums else total.v + value

    # The end

    def _add_up(self) -> None:
        """Over the warps that shared k: the first one gets the sums of all."""
        tile = self.tile
        count = tile.products * 4 * mma.ACCUMULATORS
        parts = shared((tile.along - 1, tile.down * tile.across, count, WARP))
        place = T.bind(self.down * tile.across + self.across)
        cells = [cell for row in self.sums for registers in row for cell in registers]
        with T.If(self.along > 0), T.Then():
            for i, cell in enumerate(cells):
                T.buffer_store(parts, cell.v, [self.along - 1, place, i, self.lane])
        barrier()
        with T.If(self.along == 0), T.Then():
            for i, cell in enumerate(cells):
                for other in range(tile.along - 1):
                    cell.v = cell.v + parts[other, place, i, self.lane]

    def _add_outliers(self, aside: Aside) -> None:
        tile = T.bind(T.min(self.first_tile + self.across, T.int64(self.layout.tiles - 1)))
        for product in range(aside.products):
            b = aside.columns_of(tile, self.lane, product)
            for m, row in enumerate(self.sums):
                first = self.first_row + (self.down * self.tile.products + m) * mma.ROWS + self.r
                low, high = (aside.x_of(T.min(first + 8 * h, self.k.M - 1), self.q, product) for h in range(2))
                for j, registers in enumerate(row):
                    mma.multiply_add("f16", registers, [low[0], high[0], low[1], high[1]], [b[0][j], b[1][j]])

    def _finish(self) -> None:
        """The columns of y; where blocks share k, this one's part of their sums."""
        k, parts = self.k, self.split.parts
        tile = T.bind(self.first_tile + self.across)
        for m in range(self.tile.products):
            for h in range(2):
                row = T.bind(self.first_row + (self.down * self.tile.products + m) * mma.ROWS + 8 * h + self.r)
                sums = [registers[2 * h : 2 * h + 2] for registers in self.sums[m]]
                with T.If(row < k.M), T.Then():
                    if isinstance(parts, int) and parts == 1:
                        k.end.store_row(row, tile, self.q, sums)
                    elif isinstance(parts, int):
                        k.end.store_part(self.part, row, tile, self.q, sums)
                    else:
                        with T.If(parts == 1):
                            with T.Then():
                                k.end.store_row(row, tile, self.q, sums)
                            with T.Else():
                                k.end.store_part(self.part, row, tile, self.q, sums)


def _registers(dtype: str) -> list[Cell]:
    return [Cell(T.Cast(dtype, T.int32(0)), dtype) for _ in range(mma.ACCUMULATORS)]
