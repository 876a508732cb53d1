"""`llmc targets`: the machines llmc builds for, and what this one can do with each."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.cli.common import JsonFlag, print_json, print_pairs, print_table, stdout

if TYPE_CHECKING:
    from llmc.targets.cuda import CudaTarget


def command(json: JsonFlag = False) -> None:
    """List the targets, and which of them run here.

    \b
    Example:
      llmc targets
    """
    from llmc.errors import OptionError
    from llmc.targets import cuda
    from llmc.targets.detect import compute_capability, machine, native
    from llmc.targets.x86 import TARGETS

    here, gpu = machine(), compute_capability()
    try:
        best = native().name
    except OptionError:
        best = None
    caches = {"L1": here.l1_bytes, "L2": here.l2_bytes, "L3": here.l3_bytes}
    if json:
        print_json(
            {
                "machine": {"cpu": here.cpu, "cores": here.cores, "caches": caches, "flags": sorted(here.flags)},
                "native": best,
                "targets": {
                    t.name: {
                        "description": t.description,
                        "mcpu": t.mcpu,
                        "requires": list(t.requires),
                        "runs_here": not here.missing(t),
                        "missing": here.missing(t),
                    }
                    for t in TARGETS.values()
                }
                | {
                    t.name: {
                        "description": t.description,
                        "mcpu": t.mcpu,
                        "requires": [_gpu(t)],
                        "runs_here": cuda.runs(t, gpu),
                        "missing": [] if cuda.runs(t, gpu) else [_gpu(t)],
                        "verified": _GPU_CLAIMS,
                    }
                    for t in cuda.TARGETS.values()
                },
            }
        )
        return
    print_pairs(
        {
            "cpu": f"{here.cpu}, {here.cores} cores",
            "caches": ", ".join(f"{level} {size >> 10} KiB" for level, size in caches.items() if size) or "unknown",
            "native": best or "none of the targets runs here",
        },
        stdout(),
    )
    rows = []
    for t in TARGETS.values():
        rows.append((t.name, t.description, _ability(here.missing(t))))
    for target in cuda.TARGETS.values():
        rows.append((target.name, target.description, _gpu_ability(target, gpu)))
    print_table(("target", "machines", "here"), rows)


_GPU_CLAIMS = "machine code by NVIDIA's compiler; run on no GPU yet"


def _gpu(target: CudaTarget) -> str:
    """What a target for GPUs needs."""
    return f"an NVIDIA GPU of {target.mcpu}{'' if target.exact else ' or later'}"


def _gpu_ability(target: CudaTarget, gpu: tuple[int, int] | None) -> str:
    """What this machine, with a GPU of this compute capability or none, can do with a target for GPUs."""
    from llmc.targets.cuda import runs

    compiler = any((Path(folder) / "nvidia").is_dir() for folder in sys.path) or shutil.which("nvcc")
    if not compiler:
        return "nothing yet: pip install 'llmc[cuda]' to compile"
    if runs(target, gpu):
        return "compiles, loads: run on no GPU yet"
    here = f"the GPU here is sm_{gpu[0]}{gpu[1]}" if gpu else "no NVIDIA GPU here"
    return f"compiles only: {here}; run on none yet"


def _ability(missing: list[str]) -> str:
    """What a machine without these flags can do with a target."""
    if not missing:
        return "compiles, runs, measures"
    emulated = all(flag.startswith("amx_") for flag in missing)  # tests/amx_emulator
    return f"compiles{'; emulated in tests only' if emulated else ' only'}: this CPU lacks {', '.join(missing)}"
