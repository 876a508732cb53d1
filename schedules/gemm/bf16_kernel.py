"""The bodies of the linear with bfloat16 weights: widened in registers, or multiplied on AMX tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmc.schedules import loops
from llmc.schedules.gemm.lowbit_a32 import Float32Kernel
from llmc.schedules.gemm.lowbit_kernel import Block
from llmc.schedules.gemm.tile_rows import TileRows
from llmc.targets import tiles
from llmc.tvm_shim import T

if TYPE_CHECKING:
    from llmc.schedules.gemm.bf16_packing import Bf16Layout

_SERIAL = 1 << 15  # values that one thread rounds sooner than it wakes others


class Bf16Kernel(Float32Kernel):
    """y = sum over k of weight * x in float32. A line holds two k, of which each is widened by one instruction."""

    layout: Bf16Layout  # type: ignore[assignment]

    def declare_weights(self) -> None:
        self.weight = T.arg("weight", T.Buffer(self.layout.weight_shape, "uint16"))

    def value(self, x: Any, m: Any, k: Any) -> Any:
        """One element of x in every lane."""
        return self.simd.splat(x[m, k])

    def _packed(self, x: Any, rows: int, blocks: list[Any], ahead: int) -> Block:
        chains = self._chains(rows, len(blocks))
        acc = [self.zeros(rows, len(blocks)) for _ in range(chains)]

        def pair(i: Any, count: int, chain: int) -> None:
            """k = 2i and, of two, k = 2i + 1."""
            for v, block in enumerate(blocks):
                if ahead:
                    self._ask(block, i, ahead)
                for j, weight in enumerate(self._widened(block, i)[:count]):
                    for m, row in enumerate(acc[(chain + j) % chains]):
                        row[v].v = self.simd.fma(weight, self.value(x, m, 2 * i + j), row[v].v)

        pairs, step = self.layout.K // 2, self.KU // 2
        if pairs >= step:
            with T.serial(0, pairs // step) as s:
                for u in range(step):
                    pair(s * step + u, 2, 2 * u)
        for i in range(pairs // step * step, pairs):
            pair(i, 2, 2 * i)
        if self.layout.K % 2:
            pair(pairs, 1, 0)
        for chain in acc[1:]:
            for total, row in zip(acc[0], chain, strict=True):
                for register, part in zip(total, row, strict=True):
                    register.v = register.v + part.v
        return acc[0]

    def expand(self, blocks: list[Any]) -> Any:
        """Scratch [padded_K, NV, R] float32."""
        scratch = T.alloc_buffer((self.layout.padded_K, len(blocks), self.layout.lanes), "float32")
        with T.serial(0, self.layout.padded_K // 2) as i:
            for v, block in enumerate(blocks):
                for j, weight in enumerate(self._widened(block, i)):
                    T.buffer_store(scratch, weight, [2 * i + j, v, self.simd.span(0)])
        return scratch

    def _ask(self, block: Any, i: Any, ahead: int) -> None:
        """For what lies `ahead` bytes behind the i-th pair of k."""
        self.simd.prefetch(self.weight[block, i, ahead // 2])

    def _widened(self, block: Any, i: Any) -> list[Any]:
        """The weights of k = 2i and 2i + 1, one a row of the block: a bfloat16 is the upper half of a float32."""
        R = self.layout.lanes
        line = T.bind(T.reinterpret(f"int32x{R}", self.weight[block, i, self.simd.span(0, 2 * R)]))
        both = T.shift_left(line, self.simd.i32(16)), T.bitwise_and(line, self.simd.i32(-(1 << 16)))
        return [T.bind(T.reinterpret(f"float32x{R}", bits)) for bits in both]


class Bf16TileKernel(TileRows, Bf16Kernel):
    """x is rounded to bfloat16 as well, for any number of rows; many of them are multiplied on tiles."""

    depth = tiles.ROWS

    def activations(self, M: Any) -> Any:
        """x as bfloat16, [M, padded_K] uint16: whole tiles, the last with zeros behind K."""
        simd, K, R = self.simd, self.layout.K, self.layout.lanes
        out = T.alloc_buffer((M, self.layout.padded_K), "uint16")

        def row(m: Any) -> None:
            with T.serial(0, K // R) as i:
                T.buffer_store(out, tiles.to_bf16(self.x[m, simd.span(i * R)], R), [m, simd.span(i * R)])
            for k in range(K // R * R, K):
                T.buffer_store(out, tiles.to_bf16(self.x[m, k], 1), [m, k])
            for k in range(K, self.layout.padded_K):
                T.buffer_store(out, T.uint16(0), [m, k])

        loops.rows(M, K, _SERIAL, row)
        return out

    def value(self, x: Any, m: Any, k: Any) -> Any:
        bits = T.shift_left(T.Cast("uint32", x[m, k]), T.uint32(16))
        return self.simd.splat(T.reinterpret("float32", bits))

    def expand(self, blocks: list[Any]) -> None:
        """Tiles are read where the weight is stored."""

    def sum_tiles(self, x: Any, expanded: None, firsts: list[Any], rows: Any, blocks: list[Any], total: Any) -> None:
        K, width = self.layout.padded_K, 4 * self.layout.lanes

        def rows_of_x(t: int, step: Any) -> tuple[Any, int]:
            return x[firsts[t], step * (2 * tiles.ROWS)], 2 * K

        def weight(v: int, step: Any) -> tuple[Any, int]:
            return self.weight[blocks[v], step * tiles.ROWS, 0], width

        for v in range(0, len(blocks), self.NV):
            some = range(v, v + self.NV)
            self.multiply_tiles(K // (2 * tiles.ROWS), rows_of_x, weight, tiles.dot_bf16, total, len(firsts), some)
