"""What the templates for GPUs do at a point; `features.CODE` names and explains the counts.

Estimates of before anything is compiled, and a time that follows from them: the roofline (Williams et al., 2009), of
which a launch reaches as much as its blocks fill the multiprocessors, and as bytes are on their way (Little's law).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmc.gpu.binary import occupancy
from llmc.schedules.attention.examples import keys_read
from llmc.schedules.base import Config
from llmc.targets.base import Target
from llmc.targets.cuda import CudaTarget

if TYPE_CHECKING:
    from llmc.schedules.attention.workloads import AttentionWorkload
    from llmc.schedules.norm.norm import NormWorkload

# Of an empty kernel; of a load from memory; from one instruction of a warp to the next, two of four cycles overlapping.
_LAUNCH_S, _LATENCY_S, _STEP_S = 1e-6, 6e-7, 1.4e-9
_EXCHANGE = 1000  # instructions' time in which blocks that shared k add up what each has
_TENSOR = 16  # operations of tensor cores on float16, for one of float32 outside of them; twice as many on bytes
_TOKENS, _FEW = 8, 16  # rows up to which the tensor-core templates have bodies of their own
_QUERIES = 4  # and attention
_BLOCK = 64  # keys side by side in the cache
_OUTSTANDING = 64  # bytes that a thread has asked for and waits for, where nothing is copied ahead
_WARP, _COLUMNS, _SIDE, _ROW = 32, 32, 16, 128  # threads; columns of a warp; threads of a side; bytes of x in a step
_LOAD = 16  # bytes that a lane loads at once


@dataclass(frozen=True)
class _Blocks:
    """A launch: `count` blocks of `threads` threads that need so much, each have `flying` bytes on their way, and issue
    `path` instructions one after another."""

    count: float
    threads: int
    registers: int
    shared: int
    flying: float
    path: float = 0.0

    def counts(self, target: CudaTarget, ops: float, bytes_: float, peak: float) -> dict[str, float]:
        """The features that follow, for so many operations at `peak` a second, and bytes."""
        full = occupancy(target, self.threads, self.registers, self.shared)
        warps = -(-self.threads // _WARP) * _WARP
        resident = max(full * target.threads / warps, 0.01)  # blocks of one multiprocessor
        waves = self.count / (resident * target.multiprocessors)
        busy = waves / math.ceil(waves) if waves > 1 else min(1.0, self.count / target.multiprocessors)
        flying = self.flying * min(resident, -(-self.count // target.multiprocessors))
        reached = min(target.bandwidth, flying * min(self.count, target.multiprocessors) / _LATENCY_S)
        path = math.ceil(waves) * (_LATENCY_S + self.path * _STEP_S)
        seconds = _LAUNCH_S + max(bytes_ / reached, ops / (peak * busy), path)
        return {
            "block_threads": self.threads,
            "thread_registers": self.registers,
            "block_shared": self.shared,
            "occupancy": full,
            "waves": waves,
            "in_flight": flying,
            "predicted": seconds * 1e6,
        }


def mma(w: Any, config: Config, target: Target, sizes: Mapping[str, int], threads: int) -> dict[str, float]:
    """`schedules.gemm.cuda_mma`: a body for a few tokens, one for few rows, whose warps share k, and one of tiles;
    `schedules.gemm.cuda_wgmma` has other knobs for the latter."""
    assert isinstance(target, CudaTarget)
    if sizes["M"] <= _TOKENS:
        return _decode(w, config, target, sizes["M"])
    M, few = sizes["M"], sizes["M"] <= _FEW
    bits, bytes_x = getattr(w, "bits", 16), 1 if getattr(w, "activations", "") in ("a8", "fp8") else 2
    if not few and "ring" in config:
        config = {"BN": 128 * int(config["groups"]), "BM": config["rows"], "down": 1, "stages": config["ring"]}
    rows, down = (_FEW, 1) if few else (int(config["BM"]), int(config["down"]))
    along, stages = (int(config["along"]), int(config["few_stages"])) if few else (1, int(config["stages"]))
    across = 1 if few else int(config["BN"]) // _COLUMNS
    split = int(config.get("few_split" if few else "split", 1))
    depth = _ROW // bytes_x * along  # k of a step
    row_tiles, column_tiles = -(-M // rows), -(-w.N // (_COLUMNS * across))
    split = min(split, -(-w.K // depth))
    if not few:  # only as far as multiprocessors were idle
        split = max(1, min(split, target.multiprocessors // (row_tiles * column_tiles)))
    weights = _COLUMNS * across * depth * bits / 8  # of one step
    x = 2 * rows * along * _ROW
    products = rows // down // 16
    grouped = getattr(w, "group_size", w.K) < w.K
    block_threads = _WARP * down * across * along
    blocks = _Blocks(
        count=row_tiles * column_tiles * split,
        threads=block_threads,
        registers=min(56 + products * (36 if grouped else 20) + rows * along * _ROW // block_threads // 2, 255),
        shared=int(stages * weights * (1.25 if grouped else 1)) + x + (along - 1) * rows * _COLUMNS * across * 4,
        flying=(stages - 1) * weights + rows * depth * 4,
        path=-(-w.K // (depth * split)) * _step(products, rows * along, block_threads, bits, grouped)
        + (_EXCHANGE if split > 1 else 0),
    )
    padded = row_tiles * rows * column_tiles * _COLUMNS * across
    ops = 2 * padded * w.K
    least = w.N * w.K * bits / 8 + 4 * M * (w.K + w.N)
    again = row_tiles * w.N * w.K * bits / 8 + 4 * M * w.K * column_tiles / max(across, 1)
    exchanged = 8 * M * w.N * split if split > 1 else 0
    traffic = max(least, min(again, 4 * least)) + exchanged  # much of what is read again is in the second-level cache
    return {
        "block_rows": rows,
        "block_columns": _COLUMNS * across,
        "unroll": depth,
        "trips": -(-w.K // (depth * split)),
        "slices": along * split,
        "waste": padded / (M * w.N),
        "tail": (M % rows) / M,
        "traffic": traffic / least,
        "mma": ops / (2 * 16 * 8 * (32 if bytes_x == 1 else 16)),
        **blocks.counts(target, ops, traffic, target.fma * _TENSOR * (2 if bytes_x == 1 else 1)),
    }


def _decode(w: Any, config: Config, target: CudaTarget, M: int) -> dict[str, float]:
    """Warps with chunks of k of their own, whose codes go from memory straight into registers."""
    warps, ahead, split = (int(config[k]) for k in ("warps", "ahead", "one_split"))
    bits = getattr(w, "bits", 16)
    unit = _LOAD * 8 // bits  # k of one load of 16 bytes a lane, for 32 columns
    chunks = -(-w.K // (ahead * unit))
    each = -(-chunks // (warps * split))
    column_tiles = -(-w.N // _COLUMNS)
    blocks = _Blocks(
        count=column_tiles * split,
        threads=_WARP * warps,
        registers=min(64 + 4 * ahead, 255),
        shared=M * 2 * w.K // split + warps * M * _COLUMNS * 4,
        flying=float(warps * ahead * _WARP * _LOAD),
        path=each * (ahead * 90 + 60) + 200 + (_EXCHANGE if split > 1 else 0),
    )
    least = w.N * w.K * bits / 8 + 4 * M * (w.K + w.N)
    traffic = least + (8 * M * w.N * split if split > 1 else 0)
    padded = _TOKENS * column_tiles * _COLUMNS * w.K
    return {
        "block_rows": M,
        "block_columns": _COLUMNS,
        "unroll": ahead * unit,
        "trips": each,
        "slices": warps * split,
        "imbalance": warps * split * each / chunks,
        "traffic": traffic / least,
        "mma": padded / (16 * 8 * 16),
        **blocks.counts(target, 2 * padded, traffic, target.fma * _TENSOR),
    }


def _step(products: int, staged_rows: int, threads: int, bits: int, grouped: bool) -> float:
    """Instructions of a warp in one step, about: matrices loaded and multiplied, codes taken apart, sums scaled, x
    staged, and what any step takes."""
    multiplied = 4 * (products * 5 + 2 * (4 if bits < 16 else 0) * 4)
    scaled = products * 16 * 3 if grouped else 0
    return multiplied + scaled + staged_rows * 8 / threads * 30 + 100


def tiled(w: Any, config: Config, target: Target, sizes: Mapping[str, int], threads: int) -> dict[str, float]:
    """`schedules.gemm.cuda`: 256 threads make BM rows by BN columns in float32."""
    assert isinstance(target, CudaTarget)
    M, BM, BN, BK = sizes["M"], *(int(config[k]) for k in ("BM", "BN", "BK"))
    row_tiles, column_tiles = -(-M // BM), -(-w.N // BN)
    each = (BM // _SIDE) * (BN // _SIDE)
    block_threads = _SIDE * _SIDE
    blocks = _Blocks(
        count=row_tiles * column_tiles,
        threads=block_threads,
        registers=min(32 + each + BM // _SIDE + BN // _SIDE, 255),
        shared=4 * BK * (BM + BN + 2),
        flying=4 * BK * (BM + BN),
        path=-(-w.K // BK) * (BK * (each + BM // _SIDE + BN // _SIDE) + BK * (BM + BN) // block_threads * 10 + 400),
    )
    padded = row_tiles * BM * column_tiles * BN
    bits = getattr(w, "bits", 32)
    least = w.N * w.K * bits / 8 + 4 * M * (w.K + w.N)
    traffic = min(row_tiles * w.N * w.K * bits / 8 + 4 * M * w.K * column_tiles, 4 * least)
    loads = (BM + BN) / _SIDE / each  # of shared memory, for one multiply of a thread
    return {
        "block_rows": BM,
        "block_columns": BN,
        "sums": each,
        "loads_per_op": loads,
        "unroll": BK,
        "trips": -(-w.K // BK),
        "waste": padded / (M * w.N),
        "tail": (M % BM) / M,
        "traffic": max(traffic, least) / least,
        **blocks.counts(target, 2 * padded * w.K * (1 + loads), max(traffic, least), target.fma),
    }


def attention(
    w: AttentionWorkload, config: Config, target: Target, sizes: Mapping[str, int], threads: int
) -> dict[str, float]:
    """`schedules.attention.cuda`: knobs matter for few queries, whose keys are split over blocks."""
    assert isinstance(target, CudaTarget)
    B, S, C = sizes["B"], sizes["S"], sizes["C"]
    keys = keys_read(w, S, C)
    heads, pairs = B * w.n_kv_heads, B * S * w.n_heads * keys
    bytes_ = 8.0 * heads * keys * w.head_dim + 8.0 * B * S * w.n_heads * w.head_dim
    ops = 4.0 * pairs * w.head_dim
    if S > _QUERIES:
        blocks = _Blocks(heads * -(-S * w.group // _BLOCK), 4 * _WARP, 128, 40 << 10, 4.0 * _BLOCK * w.head_dim)
        return {"block_rows": _BLOCK, **blocks.counts(target, ops, bytes_, target.fma * _TENSOR / 2)}
    chunk, warps = (int(config[k]) for k in ("chunk", "warps"))
    key_blocks = -(-keys // _BLOCK)
    splits = -(-key_blocks // chunk)
    exchanged = 8.0 * heads * S * w.group * splits * (w.head_dim + 2) if splits > 1 else 0.0
    taken = min(chunk, key_blocks)
    blocks = _Blocks(
        count=heads * splits,
        threads=warps * _WARP,
        registers=96,
        shared=4 * w.group * (w.head_dim * (1 + warps) + _BLOCK * warps),
        flying=warps * _WARP * float(_OUTSTANDING) * min(1.0, taken / warps),
        path=-(-taken // warps) * 12.0 * S * w.group * w.head_dim,
    )
    return {
        "block_rows": _BLOCK * taken,
        "slices": splits,
        "trips": -(-taken // warps),
        "imbalance": warps * -(-taken // warps) / taken,
        "traffic": (bytes_ + exchanged) / bytes_,
        **blocks.counts(target, ops, bytes_ + exchanged, target.fma),
    }


def norm(w: NormWorkload, config: Config, target: Target, sizes: Mapping[str, int], threads: int) -> dict[str, float]:
    """`schedules.norm.cuda`: a block a row, which it reads again for every sum."""
    assert isinstance(target, CudaTarget)
    M, size = sizes["M"], int(config["threads"])
    each = -(-w.K // size)
    sums = 2 + (w.kind == "layer")
    path = sums * (each * 25 + 20 * math.log2(size))  # each waits for the first-level cache
    blocks = _Blocks(M, size, 32, 4 * size // _WARP, size * 4.0 * min(each, 4), path)
    bytes_ = 4.0 * M * w.K * (2 + 2 * w.residual)
    counts = blocks.counts(target, 8.0 * M * size * each, bytes_, target.fma)
    return {"block_columns": size, "trips": each, "waste": size * each / w.K, **counts}
