"""The body of linear layers of many rows on Hopper: y^T = W x^T by products of warpgroups (wgmma).

The weight is the left operand, straight into registers: the layout of `cuda_mma_packing` is that of A, too, as decoding
has it. A warp has a tile of 32 rows of it, 16 of each of two products; x is the right operand, rounded on its way to
shared memory by the block's threads, once for all its warpgroups. That is how Machete, vLLM's successor of MARLIN
(Frantar et al., arXiv:2408.11743), multiplies on Hopper.

Weights come by bulk copies, several steps ahead: each warp has a ring of its own, which its first lane fills, and waits
for no other. x of the next step is loaded to registers while products run. While one product runs, the registers of the
next one are made; scales come on the float32 sums of each group. Where zero points differ between groups, their part of
a sum is the zero point times the sum of x, which the threads that round x add up; there are not registers for both sets
of sums and these, so that products then wait for one another.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.schedules.gemm.cuda_mma_kernel import MmaKernel
from llmc.schedules.gemm.cuda_mma_packing import TILE
from llmc.schedules.gemm.cuda_mma_tile import CHUNKS, BlockTile, Split, swizzled
from llmc.schedules.gemm.cuda_wgmma_tile import WgmmaTile, parts_of
from llmc.schedules.gemm.lowbit_kernel import widened
from llmc.targets import mma, wgmma
from llmc.targets.threads import WARP, Cell, barrier, launch, shared, shuffled, warp_barrier
from llmc.tvm_shim import T


class WgmmaBlock:
    """What one thread does of one block's tile."""

    def __init__(
        self, kernel: WgmmaKernel, tile: WgmmaTile, split: Split, thread: Any, columns: Any, rows: Any, part: Any
    ) -> None:
        self.k, self.tile, self.layout, self.split, self.part = kernel, tile, kernel.layout, split, part
        self.thread, self.lane = thread, Cell(mma.lane_of(thread), "int64").v
        self.warp = T.bind(T.floordiv(thread, T.int64(WARP)))
        self.r, self.q = mma.fragment_place(self.lane)
        self.column = T.bind(columns * tile.across + self.warp)  # of tiles
        self.stored = T.bind(T.min(self.column, T.int64(self.layout.tiles - 1)))
        self.first_row = T.bind(rows * tile.rows)
        self.units = self.layout.step // self.layout.unit
        self.folds = parts_of(kernel.w) > 0
        self.grouped = kernel.group is not None or not kernel.symmetric  # scales of spans, not of whole rows
        self.group = kernel.group or kernel.w.K
        self.spans = max(1, self.layout.step // self.group) if self.grouped else 1
        self.products = self.layout.step // mma.depth(self.layout.pack)
        self.elements = 4 * self.layout.pack  # of a chunk
        self.begin, self.steps = T.int64(0), T.int64(tile.steps(self.layout, kernel.w.K))
        if not (isinstance(split.parts, int) and split.parts == 1):
            self.begin = T.bind(part * split.share)
            self.steps = Cell(T.min(self.steps - self.begin, T.Cast("int64", split.share)), "int64").v

    # The pipeline

    def emit(self) -> None:
        tile, stages = self.tile, self.tile.stages
        self.x = T.alloc_buffer((2, tile.rows, 4 * CHUNKS), "uint32", scope="shared", align=wgmma.ALIGNED)
        self.weights = T.alloc_buffer((stages, tile.across, self.units, 4 * WARP), "uint32", scope="shared.dyn")
        planes = self.k.planes if self.grouped else {}
        self.staged = {
            name: shared((stages, tile.across, self.spans * TILE), str(plane.dtype)) for name, plane in planes.items()
        }
        self.x_sums = None if self.k.symmetric else shared((2, self.spans, tile.rows))
        self.phases = shared((tile.across, stages), "uint64")
        self.items = tile.rows * CHUNKS // tile.threads
        self.held = T.alloc_buffer((self.items * self.elements,), "float32", scope="local")
        self.sums = [self._accumulators() for _ in range(2)]
        self.parts = [self._accumulators() for _ in range(parts_of(self.k.w))] or self.sums
        with T.If(self.lane == 0), T.Then():
            for slot in range(stages):
                wgmma.make_phase(self.phases[self.warp, slot])
            wgmma.publish_phases()
            for slot in range(stages):
                self._copy_weights(T.int64(slot), T.int64(slot))
        self._prepare()
        self._load_x(self.begin)
        self._store_x(T.int64(0))
        with T.serial(0, self.steps) as at:
            step = T.bind(T.Cast("int64", at))
            slot = T.bind(T.floormod(step, T.int64(stages)))
            barrier()
            with T.If(step + 1 < self.steps), T.Then():
                self._load_x(self.begin + step + 1)
            wgmma.await_phase(self.phases[self.warp, slot], T.floormod(T.floordiv(step, T.int64(stages)), T.int64(2)))
            self._multiply(slot, T.floormod(step, T.int64(2)))
            with T.If(step + 1 < self.steps), T.Then():
                self._store_x(T.floormod(step + 1, T.int64(2)))
            warp_barrier()
            with T.If(self.lane == 0), T.Then():
                self._copy_weights(step + stages, slot)
        self._finish()

    def _copy_weights(self, step: Any, slot: Any) -> None:
        """Begin to copy the weights of this warp's step, where there is one, and the scales that go with them."""
        with T.If(step < self.steps), T.Then():
            phase, spans = self.phases[self.warp, slot], self.spans
            sizes = {name: TILE * np.dtype(str(plane.dtype)).itemsize for name, plane in self.staged.items()}
            wgmma.expect(phase, self.units * 512 + spans * sum(sizes.values()))
            source = self.k.q[self.stored, (self.begin + step) * self.units, 0]
            wgmma.copy(self.weights[slot, self.warp, 0, 0], source, self.units * 512, phase)
            for name, size in sizes.items():
                for span in range(spans):
                    k = (self.begin + step) * self.layout.step + span * (self.layout.step // spans)
                    group = T.min(T.floordiv(k, T.int64(self.group)), T.int64(self.k.groups - 1))
                    source = self.k.planes[name][self.stored, group, 0]
                    wgmma.copy(self.staged[name][slot, self.warp, span * TILE], source, size, phase)

    def _x_place(self, item: int) -> tuple[Any, Any]:
        """Row in the tile and chunk of 16 bytes in the row of what this thread stages."""
        i = T.bind(self.thread + item * self.tile.threads)
        return T.bind(T.floordiv(i, T.int64(CHUNKS))), T.bind(T.floormod(i, T.int64(CHUNKS)))

    def _load_x(self, step: Any) -> None:
        """This thread's share of x, a row beyond the last one being the last one again; 0 where k ends."""
        K, depth = self.k.w.K, self.layout.step
        for item in range(self.items):
            row, chunk = self._x_place(item)
            m = T.bind(T.min(self.first_row + row, self.k.M - 1))
            k = T.bind(step * depth + chunk * self.elements)
            for part in range(0, self.elements, 4):
                at = item * self.elements + part
                self.k.load_x(self.held, at, m, k + part, k + part < K if K % depth else True)

    def _store_x(self, slot: Any) -> None:
        """Rounded, as rows of 16-byte chunks."""
        words = T.alloc_buffer((4,), "uint32", scope="local")
        for item in range(self.items):
            row, chunk = self._x_place(item)
            for word in range(4):
                T.buffer_store(words, self._rounded(item, item * self.elements + word * self.layout.pack), [word])
            T.buffer_store(self.x, words[T.ramp(0, 1, 4)], [slot, row, T.ramp(swizzled(chunk, row) * 4, 1, 4)])
            if self.x_sums is not None:
                self._sum_x([words[word] for word in range(4)], self.x_sums, slot, row, chunk)
        wgmma.publish()

    def _prepare(self) -> None:
        """What rounding x takes."""

    def _rounded(self, item: int, at: int) -> Any:
        """As many held values as one register takes."""
        return self.k.rounded(self.held[at], self.held[at + 1])

    def _sum_x(self, words: list[Any], sums: Any, slot: Any, row: Any, chunk: Any) -> None:
        """Of each span of a row, whose chunks neighbouring threads have."""
        total = Cell(T.float32(0))
        for word in words:
            for bits in (T.bitwise_and(word, T.uint32(0xFFFF)), T.shift_right(word, T.uint32(16))):
                total.v = total.v + T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", bits)))
        together, distance = CHUNKS // self.spans, 1
        while distance < together:
            total.v = total.v + shuffled(total.v, distance)
            distance *= 2
        with T.If(T.floormod(chunk, T.int64(together)) == 0), T.Then():
            T.buffer_store(sums, total.v, [slot, T.floordiv(chunk, T.int64(together)), row])

    # Products

    def _accumulators(self) -> list[Cell]:
        return [Cell(T.float32(0)) for _ in range(self.tile.rows // 2)]

    def _multiply(self, slot: Any, x_slot: Any) -> None:
        """One step: products of rows 0 … 15 of a tile, and 16 … 31, of each span in turn."""
        b = wgmma.describe(self.x[x_slot, 0, 0])
        each = self.products // self.spans
        running: list[tuple[int, int]] = []
        for span in range(self.spans):
            products = range(span * each, (span + 1) * each)
            words = self._words(slot, products)
            for p in range(2):
                a = [self._operands(words, product, p) for product in products]
                wgmma.order_registers()
                for i, product in enumerate(products):
                    sums = self.parts[p % len(self.parts)]
                    wgmma.issue(self.k.kind, sums, a[i], b, product, not self.folds or i > 0)
                wgmma.commit()
                running.append((span, p))
                if self.folds and len(running) == len(self.parts):
                    wgmma.wait(len(running) - 1)
                    self._fold(slot, x_slot, *running.pop(0))
        if running:
            wgmma.wait(0)
        for span, p in running if self.folds else ():
            self._fold(slot, x_slot, span, p)

    def _words(self, slot: Any, products: range) -> dict[int, Any]:
        """This lane's words of the units that these products take."""
        words = {}
        for unit in sorted(
            {2 * product // self.layout.registers for product in products}
            | {(2 * product + 1) // self.layout.registers for product in products}
        ):
            words[unit] = T.alloc_buffer((4,), "uint32", scope="local")
            at = (slot, self.warp, unit, T.ramp(self.lane * 4, 1, 4))
            T.buffer_store(words[unit], self.weights[at], [T.ramp(0, 1, 4)])
        return words

    def _operands(self, words: dict[int, Any], product: int, p: int) -> list[Any]:
        """Four registers of A."""
        (first, i0), (second, i1) = (divmod(2 * product + i, self.layout.registers) for i in range(2))
        low, high = (self.k.codes.pair((words[first][j], words[second][j]), (i0, i1)) for j in (2 * p, 2 * p + 1))
        return [low[0], high[0], low[1], high[1]]

    # Scales

    def _fold(self, slot: Any, x_slot: Any, span: int, p: int) -> None:
        """sums += scale * (parts - zero * sum of x), of one span; without scales, where they are those of rows."""
        scale, zero = (
            [self._of_row(name, self.staged[name], (slot, self.warp), span, 2 * p + h) for h in range(2)]
            if name in self.staged
            else []
            for name in ("scale", "zero")
        )
        of_x = T.alloc_buffer((2,), "float32", scope="local")
        for i, (total, part) in enumerate(zip(self.sums[p], self.parts[p % len(self.parts)], strict=True)):
            h, value = i // 2 % 2, part.v
            if self.x_sums is not None:
                if i % 4 == 0:
                    columns = T.ramp(2 * i + self.q * 2, 1, 2)
                    T.buffer_store(of_x, self.x_sums[x_slot, span, columns], [T.ramp(0, 1, 2)])
                value = value - zero[h] * of_x[i % 2]
            total.v = total.v + (value * scale[h] if scale else value)

    def _of_row(self, name: str, plane: Any, at: tuple[Any, ...], span: int, j: int) -> Any:
        """The value of row r of matrix j."""
        place = span * TILE + T.floordiv(self.r, T.int64(2)) * 8 + 2 * j + T.floormod(self.r, T.int64(2))
        return Cell(widened(plane[(*at, place)], self.k.plane_dtypes[name], 1)).v

    # The end

    def _finish(self) -> None:
        """The columns of y; where blocks share k, this one's part of their sums."""
        if not self.grouped and self.k.planes:
            for p, sums in enumerate(self.sums):
                at = (self.stored, T.int64(0))
                scale = [self._of_row("scale", self.k.planes["scale"], at, 0, 2 * p + h) for h in range(2)]
                for i, total in enumerate(sums):
                    total.v = total.v * scale[i // 2 % 2]
        parts = self.split.parts
        for i in range(0, self.tile.rows // 2, 4):
            for e in range(2):
                row = T.bind(self.first_row + 2 * i + self.q * 2 + e)
                self._scale_column(self._of_column(row), i + e)
                with T.If(T.And(row < self.k.M, self.column < self.layout.tiles)), T.Then():
                    if isinstance(parts, int) and parts == 1:
                        self._store(row, i + e)
                    else:
                        with T.If(parts == 1):
                            with T.Then():
                                self._store(row, i + e)
                            with T.Else():
                                self._store_part(row, i + e)

    def _of_column(self, row: Any) -> Any:
        """What sums of a row of x are multiplied with; None: nothing."""
        return None

    def _scale_column(self, factor: Any, i: int) -> None:
        for sums in self.sums if factor is not None else ():
            for h in range(2):
                sums[i + 2 * h].v = sums[i + 2 * h].v * factor

    def _store(self, row: Any, i: int) -> None:
        w, end, made = self.k.w, self.k.end, TILE // self.k.w.halves
        for h in range(2):
            sums = [self.sums[p][i + 2 * h] for p in range(2)]
            for p, cells in enumerate([sums] if w.halves == 2 else [[cell] for cell in sums]):
                column = T.bind(self.column * made + 16 * p + 8 * h + self.r)
                with T.If(column < w.columns), T.Then():
                    end.store(row, column, cells)

    def _store_part(self, row: Any, i: int) -> None:
        for p in range(2):
            for h in range(2):
                place = self.column * TILE + 16 * p + 8 * h + self.r
                T.buffer_store(self.k.end.sums, self.sums[p][i + 2 * h].v, [self.part * self.k.M + row, place])


class WgmmaKernel(MmaKernel):
    """As `MmaKernel`, with a `WgmmaTile` for many rows, which `many` fills."""

    many: type[WgmmaBlock] = WgmmaBlock

    def _launch_tile(self, tile: BlockTile | WgmmaTile, split: Split) -> None:
        if isinstance(tile, BlockTile):
            super()._launch_tile(tile, split)
            return
        columns = -(-self.layout.tiles // tile.across)
        rows = T.floordiv(self.M + (tile.rows - 1), T.int64(tile.rows))
        with launch(tile.threads, columns, rows, split.parts) as at:
            self.many(self, tile, split, *at).emit()
