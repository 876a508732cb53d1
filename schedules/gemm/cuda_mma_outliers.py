"""Outlying channels of a linear layer on tensor cores: a product of their own in float16, on the finished sums.

As in LLM.int8() (Dettmers et al., arXiv:2208.07339), which channels these are is known when the kernel is built; their
codes are the zero point, so that they count nothing among the others. There are few of them: a thread fetches what it
multiplies straight from memory.

    channels  [padded] int32: padded to whole products, with channel 0
    columns   their columns of the weight, as `cuda_mma_packing` has 16-bit elements; zeros where there is no channel
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.schedules.base import Arrays
from llmc.schedules.formats import Outliers
from llmc.schedules.gemm.cuda_mma_packing import FragmentLayout
from llmc.targets import mma
from llmc.targets.threads import WARP, Cell
from llmc.tvm_shim import T

_DEPTH = mma.depth(2)


class Aside:
    """The outliers of one kernel (`MmaKernel`); made where its weights are declared."""

    def __init__(self, kernel: Any) -> None:
        self.k, w = kernel, kernel.w
        self.layout = layout_of(w)
        self.products = -(-w.outliers // _DEPTH)
        self.channels = T.arg("channels", T.Buffer((self.products * _DEPTH,), "int32"))
        self.columns = T.arg("columns", T.Buffer((self.layout.tiles, self.layout.units, 4 * WARP), "uint32"))

    def columns_of(self, tile: Any, lane: Any, product: int) -> list[list[Any]]:
        """[2 registers][4 matrices] of a tile of the weight."""
        words = []
        for i in range(2):
            four = T.alloc_buffer((4,), "uint32", scope="local")
            T.buffer_store(four, self.columns[tile, 2 * product + i, T.ramp(lane * 4, 1, 4)], [T.ramp(0, 1, 4)])
            words.append([four[j] for j in range(4)])
        return words

    def x_of(self, row: Any, q: Any, product: int) -> list[Any]:
        """A row's two registers, as float16."""
        found = []
        for i in range(2):
            first = _DEPTH * product + 8 * i + 2 * q
            pair = [Cell(self.k.x[row, T.Cast("int64", self.channels[first + e])]).v for e in range(2)]
            register = Cell(T.uint32(0), "uint32")
            mma.pack("f16", register, *pair)
            found.append(register.v)
        return found


def layout_of(workload: Any) -> FragmentLayout:
    """Of the columns."""
    return FragmentLayout(workload.N, workload.outliers, 16, 2, workload.halves)


def pack_outliers(workload: Any, outliers: Outliers) -> Arrays:
    """channels, columns."""
    channels = np.pad(outliers.channels, (0, -len(outliers.channels) % _DEPTH))
    columns = np.asarray(outliers.columns, np.float16).view(np.uint16)
    return {"channels": channels.astype(np.int32), "columns": layout_of(workload).pack_codes(columns)}
