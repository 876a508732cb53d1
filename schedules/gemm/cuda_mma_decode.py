"""Linear layers of a few rows (decoding): the weight is the left operand, x the right one, whose columns are its rows.

A product then has 16 rows of the weight and up to 8 of x, and nothing of it is padding where eight tokens are decoded.
Codes go from memory straight into the registers that are multiplied: a warp has chunks of k of its own, and several
loads of 16 bytes a lane on their way; it waits for no other warp until the end. x is in shared memory as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmc.schedules.gemm.cuda_mma_outliers import Aside
from llmc.schedules.gemm.cuda_mma_packing import TILE, FragmentLayout
from llmc.schedules.gemm.cuda_mma_tile import Split
from llmc.targets import mma
from llmc.targets.cuda import CudaTarget
from llmc.targets.threads import WARP, Cell, barrier, shared, strided
from llmc.tvm_shim import T

_ROWS = mma.COLUMNS  # of x, at most
_TOGETHER = 4  # registers of x that a lane loads at once: 16 bytes
_PITCH = TILE + 4  # of sums in shared memory: lanes of a warp, which have 8 rows and 4 pairs of columns, meet all banks


_STATIC = 32 << 10  # bytes of shared memory that are left for all but x


def room_for_x(target: CudaTarget) -> int:
    """Bytes of a block's shared memory that its rows of x may have."""
    return target.block_shared_bytes - _STATIC


@dataclass(frozen=True)
class DecodeTile:
    """A block makes 32 columns: `warps` share k, each with `ahead` loads of codes on their way; `split` blocks, too."""

    warps: int
    ahead: int
    split: int

    @property
    def threads(self) -> int:
        return WARP * self.warps

    def depth(self, layout: FragmentLayout) -> int:
        """k of a chunk, which a warp has on its way."""
        return self.ahead * layout.unit

    def chunks(self, layout: FragmentLayout) -> int:
        return -(-layout.units // self.ahead)

    def rounds(self, layout: FragmentLayout) -> int:
        """Chunks that a warp has, where one block has all of k."""
        return -(-self.chunks(layout) // self.warps)

    def share(self, layout: FragmentLayout) -> Split:
        return Split.even(self.chunks(layout), self.split)

    def words(self, layout: FragmentLayout) -> int:
        """Of a row of x in shared memory: eight lanes that load at once meet all banks."""
        words = self.share(layout).share * self.depth(layout) // layout.pack
        return words + (16 - words) % 32

    def rows(self, layout: FragmentLayout, shared_bytes: int) -> int:
        """Of x, which the block has room for."""
        return min(_ROWS, shared_bytes // (4 * self.words(layout)))

    def fits(self, layout: FragmentLayout, group: int | None, room: int) -> bool:
        """Are chunks whole loads of x, and whole groups or parts of one; is each of the `split` parts something; is
        there room for a row?"""
        depth = self.depth(layout)
        loads = self.ahead * layout.registers % _TOGETHER == 0
        groups = group is None or depth % group == 0 or group % depth == 0
        return loads and groups and self.share(layout).parts == self.split and self.rows(layout, room) > 0

    def needs(self, layout: FragmentLayout, group: int | None, plane_bytes: int) -> int:
        """About how many registers of a thread; `plane_bytes` of scales and zero points for each row and group."""
        planes = 2 * plane_bytes * max(1, self.depth(layout) // group) if group else 0
        return 12 * self.ahead + planes + 72


class DecodeBlock:
    """What one thread does. `kernel` is the `MmaKernel`; x becomes float16 or bfloat16."""

    def __init__(self, kernel: Any, tile: DecodeTile, thread: Any, column: Any, part: Any) -> None:
        self.k, self.tile, self.layout, self.thread = kernel, tile, kernel.layout, thread
        self.column, self.part = column, part
        self.lane = Cell(mma.lane_of(thread), "int64").v
        self.warp = T.bind(T.floordiv(thread, T.int64(WARP)))
        self.r, self.q = mma.fragment_place(self.lane)
        self.depth = tile.depth(self.layout)  # k of a chunk
        self.products = self.depth // mma.depth(self.layout.pack)
        group = kernel.group or self.depth
        self.spans = max(1, self.depth // group)  # groups of a chunk
        share = tile.share(self.layout).share
        self.begin = T.bind(part * share)
        count = T.min(T.int64(tile.chunks(self.layout)) - self.begin, T.int64(share))
        self.count = count if tile.split > 1 else T.int64(share)
        self.blocks = share * self.depth // (_TOGETHER * 4 * self.layout.pack)  # of a row of x

    def emit(self) -> None:
        words = self.tile.words(self.layout)
        self.x = T.alloc_buffer((self.k.M, words), "uint32", scope="shared.dyn")
        self.words = [T.alloc_buffer((4,), "uint32", scope="local") for _ in range(self.tile.ahead)]
        self.planes = [
            {name: _Plane(self, name) for name in self.k.planes} if self.k.group is not None else {}
            for _ in range(self.spans)
        ]
        self.sums = _zeros("float32")
        self.row_sums = self._row_sums()
        own = T.floordiv(self.count - self.warp + (self.tile.warps - 1), T.int64(self.tile.warps))
        own = Cell(own, "int64").v
        with T.If(own > 0), T.Then():
            self._load(self.warp)
        self._stage()
        barrier()
        self.a_row = T.bind(T.min(self.r, self.k.M - 1))
        with T.serial(0, own) as at:
            chunk = T.bind(self.warp + T.Cast("int64", at) * self.tile.warps)
            self._multiply(chunk, chunk + self.tile.warps < self.count)
        if self.k.group is None and self.k.planes:
            planes = {name: _Plane(self, name) for name in self.k.planes}
            for plane in planes.values():
                plane.load(T.int64(0))
            self._fold(self.sums, self.row_sums, planes, None, self.sums)
        if self.k.aside is not None:
            with T.If(T.And(self.part == 0, self.warp == 0)), T.Then():
                self._add_outliers(self.k.aside)
        self._finish()

    # Loads

    def _load(self, chunk: Any) -> None:
        for i in range(self.tile.ahead):
            self._load_codes(chunk, i)
        for span in range(self.spans if self.k.group is not None else 0):
            self._load_planes(chunk, span)

    def _load_codes(self, chunk: Any, i: int) -> None:
        unit = (self.begin + chunk) * self.tile.ahead + i
        if self.layout.units % self.tile.ahead:
            unit = T.min(unit, T.int64(self.layout.units - 1))
        at = (self.column, unit, T.ramp(self.lane * 4, 1, 4))
        T.buffer_store(self.words[i], self.k.q[at], [T.ramp(0, 1, 4)])

    def _load_planes(self, chunk: Any, span: int) -> None:
        group = T.bind(self._group(chunk, span))
        for plane in self.planes[span].values():
            plane.load(group)

    def _group(self, chunk: Any, span: int) -> Any:
        k = (self.begin + chunk) * self.depth + span * (self.depth // self.spans)
        return T.min(T.floordiv(k, T.int64(self.k.group)), T.int64(self.k.groups - 1))

    def _stage(self) -> None:
        """x of the block's part of k, rounded, in the order in which lanes load it: four registers of B together."""
        pack, threads = self.layout.pack, self.tile.threads
        with T.serial(0, self.k.M) as row, strided(self.blocks * pack, self.thread, threads) as item:
            row = T.Cast("int64", row)
            block, side = T.floordiv(item, T.int64(pack)), T.floormod(item, T.int64(pack))
            first = T.bind(self.begin * self.depth + block * (_TOGETHER * 4 * pack) + side * 4)
            held = [self._four(row, first + i * 4 * pack) for i in range(_TOGETHER)]
            self._store(row, block, side, held)

    def _four(self, row: Any, k: Any, there: Any = True) -> Any:
        """x[row, k …], zeros beyond its end."""
        held = T.alloc_buffer((4,), "float32", scope="local")
        self.k.load_x(held, 0, row, k, T.And(there, k < self.k.w.K))
        return held

    def _store(self, row: Any, block: Any, side: Any, held: list[Any]) -> None:
        """Of each register two neighbouring words: those of lanes q = 2 `side` and the next."""
        words = T.alloc_buffer((_TOGETHER,), "uint32", scope="local")
        for e in range(2):
            for i, four in enumerate(held):
                T.buffer_store(words, self.k.rounded(four[2 * e], four[2 * e + 1]), [i])
            to = block * 16 + (side * 2 + e) * _TOGETHER
            T.buffer_store(self.x, words[T.ramp(0, 1, 4)], [row, T.ramp(to, 1, 4)])

    # Products

    def _row_sums(self) -> list[Cell]:
        """Sums of x, where zero points want them: of every row of C the same."""
        return [] if self.k.symmetric else _registers(self.k.codes.sums_dtype)

    def _multiply(self, chunk: Any, more: Any) -> None:
        """One chunk; what it leaves free is loaded for the warp's next one, where there are `more`."""
        layout, x = self.layout, T.alloc_buffer((_TOGETHER,), "uint32", scope="local")
        each = self.products // self.spans
        for span in range(self.spans):
            grouped = self.k.group is not None
            sums = _zeros(self.k.codes.sums_dtype) if grouped else self.sums
            row_sums = self._row_sums() if grouped else self.row_sums
            for product in range(span * each, (span + 1) * each):
                if product % 2 == 0:
                    at = (chunk * self.depth // layout.pack + product * 8) + self.q * _TOGETHER
                    T.buffer_store(x, self.x[self.a_row, T.ramp(at, 1, 4)], [T.ramp(0, 1, 4)])
                b = [x[product % 2 * 2 + i] for i in range(2)]
                (first, i0), (second, i1) = (divmod(2 * product + i, layout.registers) for i in range(2))
                pairs = [self.k.codes.pair((self.words[first][j], self.words[second][j]), (i0, i1)) for j in range(4)]
                for p, c in enumerate(sums):
                    low, high = pairs[2 * p], pairs[2 * p + 1]
                    mma.multiply_add(self.k.decode_kind, c, [low[0], high[0], low[1], high[1]], b)
                if row_sums:
                    mma.multiply_add(self.k.decode_kind, row_sums, [T.uint32(self.k.codes.ones)] * 4, b)
                done = [unit for unit, i in {(first, i0), (second, i1)} if i == layout.registers - 1]
                with T.If(more), T.Then():
                    for unit in sorted(done):
                        self._load_codes(chunk + self.tile.warps, unit)
            if grouped:
                self._fold(sums, row_sums, self.planes[span], self._x_scale(chunk, span), self.sums)
                with T.If(more), T.Then():
                    self._load_planes(chunk + self.tile.warps, span)

    def _x_scale(self, chunk: Any, span: int) -> list[Any] | None:
        """What the columns of C are multiplied with, besides the weight's scales."""
        return None

    def _fold(self, sums: Any, row_sums: list[Cell], planes: dict[str, _Plane], x_scale: Any, into: Any) -> None:
        """into (+)= scale * (sums - zero * sum of x): `into` is `sums` where there is one group."""
        scale = planes["scale"].values()
        zero = [] if self.k.symmetric else planes["zero"].values()
        for p, registers in enumerate(sums):
            for at, register in enumerate(registers):
                h, e = divmod(at, 2)
                value = self._float(register.v)
                if zero:
                    value = value - zero[2 * p + h] * self._float(row_sums[e].v)
                factor = scale[2 * p + h] if x_scale is None else scale[2 * p + h] * x_scale[e]
                total = into[p][at]
                total.v = value * factor if into is sums else total.v + value * factor

    def _float(self, register: Any) -> Any:
        return register

    # The end

    def _add_outliers(self, aside: Aside) -> None:
        for product in range(aside.products):
            words = aside.columns_of(self.column, self.lane, product)
            b = aside.x_of(T.min(self.r, self.k.M - 1), self.q, product)
            for p, c in enumerate(self.sums):
                mma.multiply_add("f16", c, [words[i][2 * p + h] for i in range(2) for h in range(2)], b)

    def _finish(self) -> None:
        """The sums of all warps, and what becomes of them."""
        parts = shared((self.tile.warps, _ROWS, _PITCH))
        for p, registers in enumerate(self.sums):
            for at, register in enumerate(registers):
                h, e = divmod(at, 2)
                T.buffer_store(parts, register.v, [self.warp, self.q * 2 + e, 16 * p + 8 * h + self.r])
        barrier()
        w, end = self.k.w, self.k.end
        wide = TILE if self.tile.split > 1 else TILE // w.halves
        with strided(self.k.M * wide, self.thread, self.tile.threads) as i:
            row, place = T.bind(T.floordiv(i, T.int64(wide))), T.bind(T.floormod(i, T.int64(wide)))
            sums = [Cell(T.float32(0)) for _ in range(TILE // wide)]
            for half, total in enumerate(sums):
                for warp in range(self.tile.warps):
                    total.v = total.v + parts[warp, row, half * wide + place]
            if self.tile.split > 1:
                T.buffer_store(end.sums, sums[0].v, [self.part * self.k.M + row, self.column * TILE + place])
            else:
                with T.If(self.column * wide + place < w.columns), T.Then():
                    end.store(row, self.column * wide + place, sums)


class _Plane:
    """A lane's values of one plane and group, as they are in memory: for the eight columns 2 q' + e of C, q' = r / 2,
    of which the lane's own rows 8 j + r are those with e = r % 2."""

    def __init__(self, block: DecodeBlock, name: str) -> None:
        self.block, self.plane, self.dtype = block, block.k.planes[name], block.k.plane_dtypes[name]
        self.bits = 32 if self.dtype == "float32" else 16
        self.words = T.alloc_buffer((self.bits // 4,), "uint32", scope="local")

    def load(self, group: Any) -> None:
        lanes = 128 // self.bits  # values of a load
        first = T.floordiv(self.block.r, T.int64(2)) * 8
        for i in range(8 // lanes):
            value = self.plane[self.block.column, group, T.ramp(first + i * lanes, 1, lanes)]
            T.buffer_store(self.words, T.reinterpret("uint32x4", value), [T.ramp(4 * i, 1, 4)])

    def values(self) -> list[Any]:
        """Four float32: of the rows 8 j + r."""
        odd = T.floormod(self.block.r, T.int64(2)) == 1
        return [Cell(self._value(j, odd)).v for j in range(4)]

    def _value(self, j: int, odd: Any) -> Any:
        if self.bits == 32:
            return T.reinterpret("float32", T.Select(odd, self.words[2 * j + 1], self.words[2 * j]))
        word = self.words[j]
        if self.dtype == "bfloat16":
            upper = T.bitwise_and(word, T.uint32(0xFFFF0000))
            return T.reinterpret("float32", T.Select(odd, upper, T.shift_left(word, T.uint32(16))))
        bits = T.Select(odd, T.shift_right(word, T.uint32(16)), word)
        return T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", bits)))


def _registers(dtype: str) -> list[Cell]:
    return [Cell(T.Cast(dtype, T.int32(0)), dtype) for _ in range(mma.ACCUMULATORS)]


def _zeros(dtype: str) -> list[list[Cell]]:
    """Of two products: rows 0 … 15 of a tile, and 16 … 31."""
    return [_registers(dtype) for _ in range(2)]
