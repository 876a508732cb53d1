"""Linear layers on tensor cores, y = act(x W^T + bias) + residual: one body, `cuda_mma_kernel`, for weights of few bits
with x in float16 or int8, and for bfloat16.

Weights that must keep float32's accuracy are not multiplied here: tensor cores have no such products.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from llmc.errors import KernelError
from llmc.schedules.base import Arrays, Config, Space, Template, Workload
from llmc.schedules.gemm.bf16 import Bf16Linear, Bf16LinearWorkload
from llmc.schedules.gemm.bf16_packing import round_to_bf16
from llmc.schedules.gemm.cuda_mma_decode import DecodeTile, room_for_x
from llmc.schedules.gemm.cuda_mma_int8 import GROUPS, Int8Block
from llmc.schedules.gemm.cuda_mma_kernel import MmaBlock, MmaKernel, plane_dtypes
from llmc.schedules.gemm.cuda_mma_packing import FragmentLayout
from llmc.schedules.gemm.cuda_mma_tile import BlockTile, Split, best_split
from llmc.schedules.gemm.lowbit import LowBitLinear, LowBitLinearWorkload
from llmc.schedules.gemm.packing import stored_dtype
from llmc.targets.base import Target
from llmc.targets.cuda import CudaTarget

_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
_WARPS = 8  # that share k in decoding
_WIDE = 2048  # rows and columns of a weight with which even short prompts fill a GPU
_SHARED_STEPS = 6  # from so many on, blocks of many rows share k


@dataclass(frozen=True)
class HalfLinearWorkload(LowBitLinearWorkload):
    """As `LowBitLinearWorkload`, with x rounded to float16 (beyond 65504 it is infinite); sums are float32."""

    @property
    def kernel_name(self) -> str:
        return f"linear_w{self.bits}a16"


class MmaTemplate(Template):
    """What the families share.

    Knobs: more than 16 rows go to blocks of BM rows by BN columns, whose warps stand `down` over one another; fewer go
    to blocks of 32 columns, whose `along` warps share k. Weights are copied `stages` - 1 steps ahead, `few_stages` - 1
    for few rows. Up to 8 rows, as shared memory has room for them (`cuda_mma_decode`), go to blocks of 32 columns and
    `warps` that share k, each with `ahead` loads on their way. k is shared by `one_split` such blocks, by `few_split`
    for few rows, by up to `split` for more, where multiprocessors were idle without.
    """

    block: type[MmaBlock] = MmaBlock

    @abstractmethod
    def fragments(self, workload: Any) -> FragmentLayout:
        """How the weight is laid out."""

    @abstractmethod
    def kind(self, workload: Any) -> str:
        """Of the products, as `mma.multiply_add` names them."""

    def space(self, workload: Any, target: Target) -> Space:
        knobs: dict[str, tuple[int | str, ...]] = {"BM": (32, 64, 128), "BN": (64, 128), "down": (1, 2, 4)}
        knobs |= {"stages": (2, 3, 4), "split": (1, 2, 4, 8)}
        knobs |= {"along": (1, 2, 4, 8), "few_stages": (2, 3, 4), "few_split": _SPLITS}
        knobs |= {"warps": (2, 4, 8, 16), "ahead": (1, 2, 4, 8), "one_split": _SPLITS}
        return Space(knobs, lambda config: self._valid(config, workload, target))

    def default(self, workload: Any, target: Target) -> dict[str, int | str]:
        """The deepest pipelines that shared memory holds, for few rows those that leave room for two warps of each
        scheduler, and the most warps that share k there; as many blocks as pay for the second launch."""
        assert isinstance(target, CudaTarget)
        layout, places = self.fragments(workload), (self.fragments(workload).tiles, target.multiprocessors)
        for config in _preferred(layout):
            decode, few, many = tiles_of(config)
            config["one_split"] = best_split(decode.rounds(layout), *places, _SPLITS)
            config["few_split"] = best_split(few.steps(layout, workload.K), *places, _SPLITS)
            if many.steps(layout, workload.K) < _SHARED_STEPS:
                config["split"] = 1
            if self._valid(config, workload, target):
                return config
        raise KernelError(f"{workload.key()} has no configuration", where=target.name)

    def layout(self, workload: Any, config: Config, target: Target) -> str:
        layout, planes = self.fragments(workload), ".".join(f"{n}-{d}" for n, d in plane_dtypes(workload).items())
        order = ".rows" if layout.in_rows else ""
        return f"mma.{layout.width}.{layout.pack}.{layout.halves}{order}.{planes}"

    def build(self, workload: Any, target: Target, config: Config) -> Any:
        if not self.accepts(workload, target):
            raise KernelError(f"{workload.key()} is outside what {self.name} computes", where=target.name)
        assert isinstance(target, CudaTarget)
        layout, kind = self.fragments(workload), self.kind(workload)
        return MmaKernel(workload, target, tiles_of(config), layout, kind, self.block).build()

    def _valid(self, config: Config, w: Any, target: Target) -> bool:
        assert isinstance(target, CudaTarget)
        decode, few, many = tiles_of(config)
        layout, group = self.fragments(w), self._group(w)
        room, registers = room_for_x(target), min(target.vector_registers, target.registers // decode.threads)
        decodes = decode.fits(layout, group, room) and decode.needs(layout, group, self._plane_bytes(w)) <= registers
        even = Split.even(few.steps(layout, w.K), few.split).parts == few.split
        return decodes and even and all(self._fits(tile, w, target) for tile in (few, many))

    def _group(self, w: Any) -> int | None:
        """k of one scale; None where one serves a whole row, or there is none."""
        size = int(getattr(w, "group_size", w.K))
        return size if size < w.K else None

    def _plane_bytes(self, w: Any) -> int:
        """Of scale and zero point for one row and group."""
        return sum(np.dtype(stored_dtype(dtype)).itemsize for dtype in plane_dtypes(w).values())

    def _fits(self, tile: BlockTile, w: Any, target: Target) -> bool:
        """Are its shapes whole, and are there registers and shared memory for a block?"""
        assert isinstance(target, CudaTarget)
        layout, group = self.fragments(w), self._group(w)
        if tile.rows % (16 * tile.down) or tile.threads > 512:
            return False
        planes, spans = (self._plane_bytes(w), max(1, layout.step // group)) if group else (0, 0)
        registers = tile.registers(layout, group is not None)
        fits = registers <= target.vector_registers and registers * tile.threads <= target.registers
        return fits and tile.shared_bytes(layout, planes, spans) <= target.static_shared_bytes


class MmaLowBitLinear(MmaTemplate, LowBitLinear):
    """Template "lowbit_mma": weights as codes, x in float16. Weights in: weight, a `QuantizedWeight`; bias [N]. Packed:
    `cuda_mma_packing`, bias [N]."""

    name = "lowbit_mma"
    serves: type[LowBitLinearWorkload] = HalfLinearWorkload

    def accepts(self, workload: Workload, target: Target) -> bool:
        if not isinstance(workload, LowBitLinearWorkload) or type(workload) is not self.serves or target.kind != "cuda":
            return False
        w = workload
        # A float16 counts ones up to 2048; a scale is one for a whole product, and changes alike in every step.
        zero = not w.symmetric or (float(w.zero).is_integer() and 0 <= w.zero <= 1024)
        step, size = self.fragments(w).step, w.group_size
        groups = size >= w.K or (size % 16 == 0 and (step % size == 0 or size % step == 0))
        return w.activations == "a32" and zero and groups

    def fragments(self, workload: Any) -> FragmentLayout:
        return _fragments(workload, 2)

    def kind(self, workload: Any) -> str:
        return "f16"

    def prepack(self, weights: Mapping[str, Any], workload: Any, config: Config, target: Target) -> Arrays:
        layout, weight = self.fragments(workload), weights["weight"]
        packed = {"q": layout.pack_codes(np.asarray(weight.q))}
        scale = layout.pack_plane(np.asarray(weight.scale, np.float32))
        if workload.scale_dtype == "bfloat16":
            packed["scale"] = (scale.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        else:
            packed["scale"] = scale.astype(workload.scale_dtype)
        if not workload.symmetric:
            zero = np.broadcast_to(np.asarray(weight.zero, np.float32), weight.scale.shape)
            packed["zero"] = layout.pack_plane(zero)
        return packed | packed_bias(weights, workload)

    def _products(self, workload: Any, inputs: Mapping[str, np.ndarray], weight: Any) -> np.ndarray:
        rounded = np.asarray(inputs["x"], np.float16).astype(np.float32)
        return super()._products(workload, {**inputs, "x": rounded}, weight)


class MmaInt8Linear(MmaLowBitLinear):
    """Template "int8_mma": `MmaLowBitLinear` for x in int8, quantised by row and group."""

    name = "int8_mma"
    serves = LowBitLinearWorkload
    block = Int8Block

    def accepts(self, workload: Workload, target: Target) -> bool:
        if not isinstance(workload, LowBitLinearWorkload) or type(workload) is not self.serves or target.kind != "cuda":
            return False
        w = workload
        # A code less the zero point has a byte with sign; codes without one are multiplied as they are.
        zero = not w.symmetric or (float(w.zero).is_integer() and 0 <= w.zero <= 128 and 2**w.bits - 1 - w.zero < 128)
        groups = w.group_size in GROUPS and w.group_size < w.K
        return w.activations == "a8" and zero and groups

    def fragments(self, workload: Any) -> FragmentLayout:
        return _fragments(workload, 4)

    def kind(self, workload: Any) -> str:
        return "s8" if workload.symmetric else "s8u8"

    def _products(self, workload: Any, inputs: Mapping[str, np.ndarray], weight: Any) -> np.ndarray:
        return LowBitLinear._products(self, workload, inputs, weight)


class MmaBf16Linear(MmaTemplate, Bf16Linear):
    """Template "bf16_mma": weights and x in bfloat16. Weights in: weight [N, K] float32, bias [N]. Packed: q of
    `cuda_mma_packing`, bias [N]."""

    name = "bf16_mma"

    def accepts(self, workload: Workload, target: Target) -> bool:
        if not isinstance(workload, Bf16LinearWorkload) or target.kind != "cuda":
            return False
        return workload.activations == "bf16"

    def fragments(self, workload: Any) -> FragmentLayout:
        return FragmentLayout(workload.N, workload.K, 16, 2, workload.halves)

    def kind(self, workload: Any) -> str:
        return "bf16"

    def prepack(self, weights: Mapping[str, Any], workload: Any, config: Config, target: Target) -> Arrays:
        codes = round_to_bf16(np.asarray(weights["weight"]))
        return {"q": self.fragments(workload).pack_codes(codes)} | packed_bias(weights, workload)


def _fragments(w: LowBitLinearWorkload, pack: int) -> FragmentLayout:
    # A unit of one bit with 16-bit elements would be more k than a step: they take two.
    width = {3: 4, 1: 1 if pack == 4 else 2}.get(w.bits, w.bits)
    return FragmentLayout(w.N, w.K, width, pack, w.halves, bool(w.table))


def tiles_of(config: Config) -> tuple[DecodeTile, BlockTile, BlockTile]:
    """For up to 8 rows, up to 16, and more."""
    c = {knob: int(value) for knob, value in config.items()}
    few = BlockTile(16, 1, 1, c["along"], c["few_stages"], c["few_split"])
    decode = DecodeTile(c["warps"], c["ahead"], c["one_split"])
    return decode, few, BlockTile(c["BM"], c["down"], c["BN"] // 32, 1, c["stages"], c["split"])


def _preferred(layout: FragmentLayout) -> Iterator[dict[str, int | str]]:
    # Blocks of 128 columns read x, which is float32, half as often as those of 64; taking codes apart leaves them no
    # registers for more than 32 rows. Without codes, layers that fill the GPU want fewer reads of the weight.
    wide = layout.width == 16 and min(layout.N, layout.K) >= _WIDE
    shapes: tuple[tuple[int, int, int], ...] = ((64, 128, 2),) if wide else ()
    shapes += ((32, 128, 1), (64, 64, 2), (32, 64, 1))
    for along, few_stages, (BM, BN, down), stages in product((4, 2, 1), (3, 2), shapes, (4, 3, 2)):
        config: dict[str, int | str] = {"BM": BM, "BN": BN, "down": down, "stages": stages, "split": 4}
        config |= {"along": along, "few_stages": few_stages, "few_split": 1, "warps": _WARPS, "one_split": 1}
        # All warps should have chunks.
        for ahead in sorted((4, 2, 1, 8), key=lambda ahead: -(-layout.units // ahead) < _WARPS):
            yield {**config, "ahead": ahead}


def packed_bias(weights: Mapping[str, Any], workload: Any) -> Arrays:
    """bias [N] float32, where there is one."""
    return {"bias": np.asarray(weights["bias"], np.float32).reshape(-1)} if workload.bias else {}


MMA_LOWBIT, MMA_INT8, MMA_BF16 = MmaLowBitLinear(), MmaInt8Linear(), MmaBf16Linear()
