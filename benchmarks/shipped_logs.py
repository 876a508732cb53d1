"""Makes the logs that llmc ships for this machine's target: tunes models and a grid of common shapes.

    python benchmarks/shipped_logs.py --db logs.db --grid --seconds 900
    python benchmarks/shipped_logs.py --db logs.db --model smollm2/model.onnx --seconds 300
    python benchmarks/shipped_logs.py --db logs.db --model fp32/model.onnx --quantize w8a8 --seconds 300
    python benchmarks/shipped_logs.py --db logs.db --table benchmarks/tuner_table.jsonl
    python benchmarks/shipped_logs.py --db logs.db --export tuning_logs/x86-avx512.jsonl --keep 24

Everything goes to one database, from which the export takes `--keep` records a kernel: the verified, the best, and a
spread of the others for the cost model. `--table` adds what `benchmarks/tuner.py` recorded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import tuner as table_of

from llmc import pipeline
from llmc.schedules.base import Kernel
from llmc.schedules.gemm.dense import DENSE, DenseLinearWorkload
from llmc.schedules.gemm.lowbit import LOWBIT, LowBitLinearWorkload
from llmc.targets.detect import native
from llmc.tune import logs
from llmc.tune.database import Database
from llmc.tune.effort import resolve_tuning
from llmc.tune.record import Key, Record
from llmc.tune.stage import tune_kernels
from llmc.tune.tuner import TuneEvent

HIDDEN = (512, 1024, 2048, 4096, 8192)
LARGEST_DENSE_FFN, LARGEST_FFN = 2048, 4096  # beyond, one measurement takes seconds


def grid() -> list[Kernel]:
    """Linears of decoders by hidden size: the square ones, gate and up, down; in the common formats."""
    kernels = []
    for H in HIDDEN:
        ffn = [(8 * H, H, "silu_mul", False), (H, 4 * H, "none", True)] if H <= LARGEST_FFN else []
        for N, K, activation, residual in [(H, H, "none", True), *ffn]:
            parts = {"activation": activation, "residual": residual}
            for bits, group in ((4, 32), (4, 128), (8, 128)):
                zero, scale = float(1 << (bits - 1)), "float16" if bits == 4 else "float32"
                kernels.append(
                    Kernel(LOWBIT, LowBitLinearWorkload(N, K, bits, group, zero=zero, scale_dtype=scale, **parts))
                )
            if H <= LARGEST_DENSE_FFN or N == K:
                kernels.append(Kernel(DENSE, DenseLinearWorkload(N, K, **parts)))
    return kernels


def show(event: TuneEvent) -> None:
    name = f"{event.task.kernel.template.name} {event.task.kernel.workload.key()}"
    print(f"{event.phase} {event.done:4} {event.trials_per_second:.1f}/s {event.best:.3f} {name[:90]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--db", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="an ONNX file to tune")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--grid", action="store_true", help="tune the grid of shapes")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--trials", type=int, default=96, help="for each kernel, on average")
    parser.add_argument("--table", type=Path, help="a table of benchmarks/tuner.py to add")
    parser.add_argument("--export", type=Path, help="the log to write")
    parser.add_argument("--keep", type=int, default=24)
    args = parser.parse_args()
    target = native()
    if args.model:
        pipeline.tune_model(
            args.model,
            quantize=args.quantize,
            tune="full",
            tune_seconds=args.seconds,
            trials=args.trials,
            database=args.db,
            tune_progress=show,
        )
    if args.grid:
        tuning = resolve_tuning("full", target, args.seconds, args.trials, 0, args.db)
        assert tuning is not None
        tune_kernels(dict.fromkeys(grid(), 1), target, tuning, show)
    with Database(args.db) as database:
        if args.table:
            measured = table_of.load(args.table, target)
            found = [Record(Key.of(task), m) for task, known in measured.items() for m in known.values()]
            print(f"{database.insert(found)} records of {args.table}", file=sys.stderr)
        if args.export:
            logs.export(database, args.export, target)
            print(f"{logs.prune(args.export, args.keep)} records in {args.export}", file=sys.stderr)


if __name__ == "__main__":
    main()
