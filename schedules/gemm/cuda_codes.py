"""The plain packed layout of low-bit weights on GPUs: rows as they are, shared by linear layers and embeddings.

q      [N, ceil(K / n)] uint8: n codes a byte, the first in the lowest bits; 3-bit codes take 4 bits
scale  [N, groups] float32 or float16, or the upper halves of float32: bfloat16
zero   [N, groups] float32: only where zero points differ between groups
table  [16] float32: only where codes stand for the values of a table
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmc.schedules.base import Arrays
from llmc.schedules.formats import TABLES, QuantizedWeight
from llmc.schedules.gemm.lowbit_kernel import widened
from llmc.schedules.gemm.packing import stored_dtype
from llmc.tvm_shim import T


@dataclass
class Codes:
    """A weight [N, K] of one format; after `declare` also the buffers of the kernel under construction."""

    N: int
    K: int
    bits: int
    group_size: int
    scale_dtype: str
    symmetric: bool
    zero: float
    table: str = ""
    buffers: dict[str, Any] = field(default_factory=dict)

    @property
    def per_byte(self) -> int:
        return 2 if self.bits == 3 else 8 // self.bits

    @property
    def groups(self) -> int:
        return -(-self.K // self.group_size)

    @property
    def label(self) -> str:
        """What tells this layout from another one of the same weight."""
        return f"rows.{self.per_byte}.{self.scale_dtype}.{self.symmetric}.{self.table}"

    def pack(self, weight: QuantizedWeight) -> Arrays:
        """The planes, in the order in which `declare` makes parameters of them."""
        n = self.per_byte
        codes = np.asarray(weight.q)
        codes = np.pad(codes, ((0, 0), (0, -self.K % n))).reshape(self.N, -1, n)
        shifts = (np.arange(n) * (8 // n)).astype(np.uint8)
        packed = {"q": np.bitwise_or.reduce(codes << shifts, axis=-1).astype(np.uint8)}
        scale = np.ascontiguousarray(weight.scale, np.float32)
        if self.scale_dtype == "bfloat16":
            packed["scale"] = (scale.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        else:
            packed["scale"] = scale.astype(self.scale_dtype)
        if not self.symmetric:
            packed["zero"] = np.ascontiguousarray(np.broadcast_to(np.float32(weight.zero), scale.shape))
        if self.table:
            packed["table"] = np.array(TABLES[self.table], np.float32)
        return packed

    def declare(self) -> None:
        """The parameters that hold the planes."""
        shapes: dict[str, tuple[tuple[int, ...], str]] = {
            "q": ((self.N, -(-self.K // self.per_byte)), "uint8"),
            "scale": ((self.N, self.groups), stored_dtype(self.scale_dtype)),
        }
        if not self.symmetric:
            shapes["zero"] = ((self.N, self.groups), "float32")
        if self.table:
            shapes["table"] = ((len(TABLES[self.table]),), "float32")
        self.buffers = {name: T.arg(name, T.Buffer(*what)) for name, what in shapes.items()}

    def value(self, n: Any, k: Any) -> Any:
        """The float32 at row n, column k."""
        q, scale = self.buffers["q"], self.buffers["scale"]
        width = 8 // self.per_byte
        byte = q[n, T.floordiv(k, T.int64(self.per_byte))]
        code = T.Cast("int32", byte)
        if self.per_byte > 1:
            start = T.Cast("int32", T.floormod(k, T.int64(self.per_byte))) * width
            code = T.bitwise_and(T.shift_right(code, start), T.int32(2**width - 1))
        group = T.floordiv(k, T.int64(self.group_size))
        factor = widened(scale[n, group], self.scale_dtype, 1)
        if self.table:
            return self.buffers["table"][code] * factor
        zero = T.float32(self.zero) if self.symmetric else self.buffers["zero"][n, group]
        return (T.Cast("float32", code) - zero) * factor
