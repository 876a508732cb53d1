"""What the cost model sees of a configuration: a vector of fixed length, computed without building anything.

Three parts. What is the same for every configuration of a task at a point (`TASK`); what the kernel's code does with
this configuration at this point (`CODE`), as the functions of `features_gemm`, `features_attention` and
`features_rows` describe it; and the same counts relative to the default configuration, which are what the model's
label, the time relative to the default, mostly follows from. Counts say what happens at the point, not what the knobs
are: a knob without effect there leaves no trace, and kernels of different templates share one vocabulary.

Of GPUs these counts include a predicted time, from which the cost model starts (`analytic`).

A candidate that is built shows more: `BUILT` is counted in its machine code (`machine_code`), and is appended, again
with the same counts relative to the default's, where such candidates are compared (`CostModel.compare_code`).

All quantities enter as log2: sizes, shares and costs act as ratios. A count that a template does not have, or code that
nobody looked at, is missing (NaN), which XGBoost's trees treat as a branch of their own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llmc.schedules.base import Config
from llmc.targets.base import Target
from llmc.tune import features_gpu
from llmc.tune.features_attention import attention, kv_append
from llmc.tune.features_conv import conv, window
from llmc.tune.features_gemm import dense, lowbit
from llmc.tune.features_recurrent import recurrent
from llmc.tune.features_rows import embedding, norm
from llmc.tune.features_tiles import bf16
from llmc.tune.task import Point, Task

Describe = Callable[[Any, Config, Target, Mapping[str, int], int], dict[str, float]]

_MMA = (  # templates for tensor cores of GPUs
    *("lowbit_mma", "int8_mma", "table_mma", "int8_table_mma", "outliers_mma", "lowbit_wgmma"),
    *("bf16_mma", "f16_mma", "bf16_wgmma", "f16_wgmma", "fp8_mma", "fp8_f16_mma", "fp8_wgmma"),
)

_DESCRIBE: dict[str, Describe] = {
    "lowbit": lowbit,
    "table": lowbit,
    "outliers": lowbit,
    "bf16": bf16,
    "f16": bf16,
    "dense": dense,
    "attention": attention,
    "kv_append": kv_append,
    "conv": conv,
    "integer_conv": conv,
    "window": window,
    "recurrent": recurrent,
    "norm": norm,
    "embedding_dense": embedding,
    **dict.fromkeys(_MMA, features_gpu.mma),
    "dense_cuda": features_gpu.tiled,
    "lowbit_cuda": features_gpu.tiled,
    "table_cuda": features_gpu.tiled,
    "attention_cuda": features_gpu.attention,
    "norm_cuda": features_gpu.norm,
}

TASK: dict[str, str] = {
    **{f"is_{name}": "0 or 1: the template" for name in _DESCRIBE},
    "foreign": "0 or 1: measured on another target than the one that is tuned",
    "m": "rows at this point: M, or B*S, or pixels",
    "n": "output columns N, or heads times head_dim",
    "k": "length of the sums: K, or head_dim",
    "keys": "keys in the cache at this point: C",
    "bits": "bits of one weight",
    "group_size": "weights that share a scale",
    "heads": "query heads that share one key head",
    "halves": "rows of the weight that make one output column: 2 for silu_mul",
    "epilogue": "count of bias, residual and activation",
    "symmetric": "0 or 1: one zero point for the whole weight",
    "float_sums": "0 or 1: products are float32, not int8",
    "ops": "operations of one call",
    "bytes": "bytes that one call must move",
    "intensity": "operations a byte",
    "lanes": "32-bit elements of one register",
    "vector_registers": "registers of the target",
    "vnni": "0 or 1: the target multiplies and adds bytes in one instruction",
    "l1": "bytes of first-level data cache",
    "l2": "bytes of second-level cache",
    "l3": "bytes of third-level cache",
    "threads": "threads of one call",
}

CODE: dict[str, str] = {
    "rows": "rows of the register tile",
    "vectors": "registers side by side in the register tile",
    "sums": "independent sums in flight: they hide the latency of one multiply",
    "registers": "registers that the tile needs, over those of the target; above 1 it spills",
    "loads_per_op": "register loads and broadcasts a multiply instruction",
    "unroll": "steps of the sum in one iteration of the innermost loop",
    "body": "multiply instructions in one iteration of the innermost loop",
    "trips": "iterations of the innermost loop",
    "unpack_per_op": "instructions that take codes apart or expand them, a multiply instruction",
    "scale_per_op": "instructions that apply scales, a multiply instruction",
    "waste": "work done over work needed: padding of rows and columns",
    "tail": "share of the rows in the last, smaller block",
    "tile_l1": "bytes that one pass over a register tile reads, over the first-level cache",
    "panel_l1": "bytes that successive tiles read again, over the first-level cache",
    "panel_l2": "bytes that successive tiles read again, over the second-level cache",
    "scratch_l1": "bytes of a task's scratch, over the first-level cache",
    "traffic": "bytes read from beyond the second-level cache, over those that one call must move",
    "prefetch": "bytes between a prefetch and its use; 0 without",
    "tasks": "iterations of the parallel loop, a thread",
    "imbalance": "the busiest thread's tasks over the mean",
    "used_threads": "threads at work, over the threads there are",
    "task_ops": "operations of one task",
    "slices": "pieces that a sum is cut into",
    "tile_dots": "instructions of one call that multiply AMX tiles",
    "tile_loads": "tiles loaded and stored, one of those instructions",
    "tile_bytes": "bytes that tiles load and store, over those that one call must move",
    "block_rows": "of a GPU: rows of a block of threads, or keys",
    "block_columns": "columns of a block",
    "block_threads": "threads of a block",
    "thread_registers": "registers that a thread needs, as estimated",
    "block_shared": "bytes of shared memory of a block, as estimated",
    "occupancy": "share of a multiprocessor's warps that such blocks let run",
    "waves": "blocks, over those that the GPU runs at once",
    "in_flight": "bytes that a multiprocessor has asked for and waits for, at most",
    "mma": "instructions of tensor cores in one call: hmma, imma",
    "predicted": "microseconds that a roofline of these estimates predicts",
}

# Of machine code. All but `code` leave out what is in no loop; "hot" is the innermost loop with the most multiplies.
CPU_BUILT: dict[str, str] = {
    "code": "bytes of machine code",
    "looped": "instructions in loops",
    "zmm": "instructions with a register of 512 bits",
    "ymm": "instructions with a register of 256 bits, and none wider",
    "xmm": "instructions with a register of 128 bits, scalars among them, and none wider",
    "dots": "instructions that multiply bytes, or AMX tiles, and add them up: vpdpbusd, vpmaddubsw, tdp*",
    "fmas": "instructions that multiply and add float vectors",
    "conversions": "instructions that widen, narrow or convert the elements of a vector",
    "broadcasts": "instructions that repeat one element over a vector, themselves or as an operand",
    "branches": "jumps",
    "spills": "vector instructions that read or write the stack frame: registers spilled and reloaded, small scratch",
    "hot_multiplies": "multiply instructions in one iteration of the hot loop",
    "hot_instructions": "instructions in the hot loop, a multiply",
    "hot_loads": "instructions in the hot loop that read memory, a multiply",
    "hot_spills": "`spills` in the hot loop, a multiply",
}
GPU_BUILT: dict[str, str] = {
    "gpu_registers": "of a GPU: registers of a thread, of the kernel that takes most of a call",
    "gpu_spills": "bytes that did not fit into them",
    "gpu_shared": "bytes of shared memory of a block",
    "gpu_occupancy": "share of a multiprocessor's warps that run",
    "hmma": "instructions of tensor cores on floats",
    "imma": "instructions of tensor cores on integers",
    "predicted_us": "microseconds of all points together, as `llmc.gpu.predict` predicts them",
}
BUILT = {**CPU_BUILT, **GPU_BUILT}

_BITS = {
    **dict.fromkeys(("integer_conv", "fp8_mma", "fp8_f16_mma", "fp8_wgmma"), 8),
    **dict.fromkeys(("bf16", "f16", "bf16_mma", "f16_mma", "bf16_wgmma", "f16_wgmma"), 16),
}
_LEAST = 2.0**-10  # stands for zero
_ANALYTIC = len(TASK) + len(CODE) + list(CODE).index("predicted")


def names(built: bool = False) -> tuple[str, ...]:
    """Names of the elements of a vector: counts, and with "~" before them counts relative to the default's. With
    `built` those of machine code follow."""
    parts = (CODE, BUILT) if built else (CODE,)
    return (*TASK, *(f"{relative}{name}" for part in parts for relative in ("", "~") for name in part))


def default_threads() -> int:
    """Threads that TVM's pool uses here."""
    return int(os.environ.get("TVM_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))


def matrix(
    task: Task, point: Point, configs: Sequence[Config], threads: int | None = None, foreign: bool = False
) -> np.ndarray:
    """Vectors of `configs` at `point`: float32 [len(configs), len(names())]."""
    threads = threads or default_threads()
    kernel, sizes = task.kernel, point.sizes()
    describe = _DESCRIBE.get(kernel.template.name, _knobs)

    def code(config: Config) -> np.ndarray:
        counts = describe(kernel.workload, config, task.target, sizes, threads)
        return np.array([counts.get(name, math.nan) for name in CODE])

    shared = task_vector(task, point, threads, foreign)
    default = _log(code(kernel.template.default(kernel.workload, task.target)))
    counts = np.stack([code(config) for config in configs]) if configs else np.empty((0, len(CODE)))
    own = _log(counts)
    return np.hstack([np.broadcast_to(shared, (len(configs), len(shared))), own, own - default]).astype(np.float32)


def built_vector(code: Mapping[str, float], default: Mapping[str, float]) -> np.ndarray:
    """What follows a vector of `matrix` if the candidate's and the default's machine code are known, or one of them:
    float32 [2 * len(BUILT)]. Either may be empty."""
    own, base = (_log(np.array([counts.get(name, math.nan) for name in BUILT])) for counts in (code, default))
    return np.concatenate([own, own - base]).astype(np.float32)


def of_default(X: np.ndarray) -> np.ndarray:
    """The default configuration's vectors at the points of the vectors `X`, of `matrix` or longer ones of machine code.
    What they do not tell stays missing."""
    default, start = X.copy(), len(TASK)
    for part in (CODE, BUILT)[: 1 + (X.shape[1] > len(names()))]:
        middle, end = start + len(part), start + 2 * len(part)
        default[:, start:middle] -= X[:, middle:end]
        default[:, middle:end] = np.where(np.isnan(X[:, middle:end]), np.nan, 0)
        start = end
    return default


def analytic(X: np.ndarray) -> np.ndarray:
    """log2 of the time relative to the default's, as estimated without any measurement; 0 where nothing is said [n]."""
    return np.nan_to_num(X[:, _ANALYTIC], nan=0.0)


def is_analytic(X: np.ndarray) -> bool:
    """Do these vectors hold such an estimate?"""
    return not bool(np.isnan(X[:, _ANALYTIC]).all())


def _log(x: np.ndarray) -> np.ndarray:
    return np.log2(np.maximum(x, _LEAST))


def task_vector(task: Task, point: Point, threads: int | None = None, foreign: bool = False) -> np.ndarray:
    """The part `TASK` of the vectors at a point."""
    template, w, target, sizes = task.kernel.template, task.kernel.workload, task.target, point.sizes()
    work = template.work(w, sizes)
    fields = vars(w)
    head_dim, heads = fields.get("head_dim", 0), fields.get("n_heads", 0)
    flags = {
        **{f"is_{name}": float(template.name == name) for name in _DESCRIBE},
        "foreign": float(foreign),
        "symmetric": float(fields.get("symmetric", True)),
        "float_sums": float(fields.get("activations", "a32") == "a32" and template.name != "integer_conv"),
        "vnni": float(target.dot == "vnni"),
    }
    extras = (fields.get("bias"), fields.get("residual"), fields.get("activation", "none") != "none")
    sizes_ = {
        "m": sizes.get("M", sizes.get("B", 1) * sizes.get("S", 1) * _pixels(w, sizes)),
        "n": fields.get("N", fields.get("C", heads * head_dim)),
        "k": getattr(w, "K", fields.get("E", head_dim)),
        "keys": sizes.get("C", math.nan),
        "bits": fields.get("bits", _BITS.get(template.name, 32)),
        "group_size": fields.get("group_size", math.nan),
        "heads": heads / fields.get("n_kv_heads", 1) if heads else math.nan,
        "halves": 2 if fields.get("activation") == "silu_mul" else 1,
        "epilogue": sum(map(bool, extras)),
        "ops": work.ops,
        "bytes": work.bytes,
        "intensity": work.ops / max(work.bytes, 1),
        "lanes": target.lanes,
        "vector_registers": target.vector_registers,
        "l1": target.l1_bytes,
        "l2": target.l2_bytes,
        "l3": target.l3_bytes,
        "threads": threads or default_threads(),
    }
    logs = dict(zip(sizes_, _log(np.array(list(sizes_.values()), float)), strict=True))
    return np.array([flags[name] if name in flags else logs[name] for name in TASK])


def _pixels(w: Any, sizes: Mapping[str, int]) -> int:
    """Pixels of one image's output; 1 where there are no images."""
    return math.prod(getattr(w, name, 1) or sizes[name] for name in ("OH", "OW"))


def _knobs(workload: Any, config: Config, target: Target, sizes: Mapping[str, int], threads: int) -> dict[str, float]:
    """A template that nobody described: its numeric knobs, in their order, stand in the first counts."""
    numbers = [float(v) if isinstance(v, int) else float(len(v)) for _, v in sorted(config.items())]
    return dict(zip(CODE, numbers, strict=False))
