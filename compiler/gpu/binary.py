"""What a compiled kernel takes and does, read from its binary: no GPU is asked."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from llmc.gpu.toolchain import Binary, disassemble
from llmc.targets.cuda import CudaTarget

_REGISTER_UNIT = 256  # registers of a warp are given out in these
_SYSTEM_SHARED = 1 << 10  # bytes of shared memory that every block loses to the system
_SHARED_UNIT = 128

# Load and store instructions: opcode, qualifiers. The width is 4 bytes unless a qualifier says otherwise.
_MEMORY = re.compile(r"\b(LDG|STG|LDS|STS|LDL|STL|LDGSTS)\b((?:\.\w+)*)")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass(frozen=True)
class Resources:
    """Of one kernel: registers a thread, bytes that did not fit into them (stores and loads of spills), static shared
    memory of a block, tensor-core instructions on floats (`hmma`) and on integers (`imma`), and how many instructions
    load or store how many bytes of a thread at once: {"LDG.16": 4}."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    hmma: int
    imma: int
    accesses: dict[str, int]


def resources(binary: Binary) -> Resources:
    """Of a source with one kernel. Raises OptionError where NVIDIA's disassembler is not installed."""
    code = disassemble(binary.cubin)
    return Resources(
        registers=_logged(binary.log, r"Used (\d+) registers"),
        spill_bytes=_logged(binary.log, r"(\d+) bytes spill stores") + _logged(binary.log, r"(\d+) bytes spill loads"),
        shared_bytes=_logged(binary.log, r"(\d+) bytes smem"),
        hmma=len(re.findall(r"\b(?:H|HG|QG)MMA\.", code)),  # of warps, and of warpgroups
        imma=len(re.findall(r"\bIMMA\.", code)),
        accesses=dict(sorted(Counter(f"{op}.{_width(op, q)}" for op, q in _MEMORY.findall(code)).items())),
    )


def occupancy(target: CudaTarget, threads: int, registers: int, shared_bytes: int) -> float:
    """How full a multiprocessor is with blocks of so many threads: its share of all warps; 0 where not one fits."""
    warps = -(-threads // target.lanes)
    of_warp = -(-registers * target.lanes // _REGISTER_UNIT) * _REGISTER_UNIT
    shared = -(-(shared_bytes + _SYSTEM_SHARED) // _SHARED_UNIT) * _SHARED_UNIT
    blocks = min(
        target.blocks,
        target.threads // (warps * target.lanes),
        target.registers // max(of_warp * warps, 1),
        target.shared_bytes // shared,
    )
    return blocks * warps * target.lanes / target.threads


def _logged(log: str, pattern: str) -> int:
    found = re.search(pattern, log)
    return int(found[1]) if found else 0


def _width(op: str, qualifiers: str) -> int:
    return next((_WIDTHS[q] for q in qualifiers.split(".") if q in _WIDTHS), 4)
