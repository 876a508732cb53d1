"""What the built code shows: instructions by kind, in all loops and in the hottest one.

binutils' objdump reads the candidate's library; a linker comes with it. For a kernel whose build takes 0.4 s (lowbit,
one size) linking takes 5 ms, objdump 5 ms and counting 5 ms; where it takes 1.3 s (all sizes) they take 5, 10 and 15.
LLVM generates code once either way, for the library instead of in memory. TVM's assembly text would need neither tool,
but generates the code a second time: 0.06 and 0.26 s.

Only loops count: what runs once, argument checks above all, says nothing about time. A loop is what lies between a jump
backwards and its target: compilers lay loops out in one piece, up to rare cold blocks.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from llmc.tir_pipeline import build_kernels, link
from llmc.tvm_shim import PrimFunc, TvmTarget

_FORMAT = "elf64-x86-64"  # what the patterns below are written for
_PREFIXES = r"(?:(?:cs|ds|data16|notrack|bnd|lock|repn?z?|\{\w+\}) +)*"
_INSTRUCTION = re.compile(rf"^ *([0-9a-f]+):\t{_PREFIXES}(\w+) *([^#<\n]*)", re.M)
_DIRECT = re.compile(r"[0-9a-f]+")  # a jump's operand: the address of its target
_DOT = r"vpdpbusds?|vpmaddubsw|tdp\w+"
_FMA = r"vfn?m(?:add|sub)\w*p[sdh]"
_KINDS = {
    "dots": re.compile(_DOT),
    "fmas": re.compile(_FMA),
    "multiplies": re.compile(rf"{_DOT}|{_FMA}|vmulp[sdh]|vpmull[wdq]"),
    "broadcasts": re.compile(r"vp?broadcast\w+"),
    "conversions": re.compile(r"vcvt\w+|vpmov(?:[sz]x|u?s?[qdw][bwd])\w*"),
    "branches": re.compile(r"j\w+"),
    "moves": re.compile(r"v?mov\w*|vextract\w+|vpmovu?s?[qdw][bwd]|vpscatter\w+"),  # they may write to memory
    "idle": re.compile(r"lea|nopw?|prefetch\w+"),  # they name an address and do not read it
}


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str  # the destination first, as Intel writes it
    framed: bool  # rbp is a frame pointer here

    def is_(self, kind: str) -> bool:
        return kind in _kinds(self.name)

    @property
    def width(self) -> str:
        """The widest vector register that it names: x, y or z; empty if none."""
        return next((x for x in "zyx" if f"{x}mm" in self.operands), "")

    @property
    def spills(self) -> bool:
        """Does it move a vector to or from the stack frame, or compute with one there?"""
        frame = "[rsp" in self.operands or (self.framed and "[rbp" in self.operands)
        return frame and self.width != ""

    @property
    def loads(self) -> bool:
        """Does it read memory?"""
        stores = self.is_("moves") and self.operands.partition(",")[0].endswith("]")
        return "[" in self.operands and not stores and not self.is_("idle")

    @property
    def broadcasts(self) -> bool:
        """As an instruction of its own, or an operand."""
        return self.is_("broadcasts") or "BCST" in self.operands or "{1to" in self.operands


@cache
def readable() -> bool:
    """Are the tools here?"""
    return all(map(shutil.which, ("ld", "objdump")))


def build_and_count(kernels: dict[str, PrimFunc], target: TvmTarget) -> tuple[Any, dict[str, float]]:
    """A runtime module of kernels by name, and `count` of it; without the tools no counts.

    Raises CalledProcessError where the linker fails.
    """
    module = build_kernels(kernels, target)
    if not readable():
        return module, {}
    with TemporaryDirectory(prefix="llmc-") as folder:
        library = Path(folder) / "kernel.so"
        return link(module, library), count(library)


def count(library: Path) -> dict[str, float]:
    """The counts that `features.BUILT` names and explains; empty for code of another architecture.

    Raises CalledProcessError where objdump cannot read the file.
    """
    command = ["objdump", "-d", "-w", "--no-show-raw-insn", "-M", "intel", "-j", ".text", str(library)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return count_text(text)


def count_text(text: str) -> dict[str, float]:
    """The counts of objdump's output."""
    if _FORMAT not in text:
        return {}
    size, looped, hottest = 0, list[Instruction](), list[Instruction]()
    for function in filter(None, map(_function, text.split("\n\n"))):
        size += function[-1].address - function[0].address
        loops = _loops(function)
        looped += [function[i] for i in sorted({i for start, end in loops for i in range(start, end)})]
        innermost = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
        hottest = max([hottest, *(function[a:b] for a, b in innermost)], key=_multiplies)
    widths, multiplies = Counter(i.width for i in looped), _multiplies(hottest)
    share = 1 / max(multiplies, 1)
    return {
        "code": size,
        "looped": len(looped),
        **{f"{x}mm": widths[x] for x in "zyx"},
        **{kind: sum(i.is_(kind) for i in looped) for kind in ("dots", "fmas", "conversions", "branches")},
        "broadcasts": sum(i.broadcasts for i in looped),
        "spills": sum(i.spills for i in looped),
        "hot_multiplies": multiplies,
        "hot_instructions": len(hottest) * share,
        "hot_loads": sum(i.loads for i in hottest) * share,
        "hot_spills": sum(i.spills for i in hottest) * share,
    }


def _function(text: str) -> list[Instruction]:
    framed = re.search(r"\tmov +rbp,rsp", text) is not None
    return [Instruction(int(at, 16), name, args.rstrip(), framed) for at, name, args in _INSTRUCTION.findall(text)]


def _loops(function: Sequence[Instruction]) -> list[tuple[int, int]]:
    """First instruction and the one after the last; several jumps back to one address are one loop."""
    addresses = [i.address for i in function]
    ends: dict[int, int] = {}
    for at, i in enumerate(function):
        target = int(i.operands, 16) if i.is_("branches") and _DIRECT.fullmatch(i.operands) else None
        if target is not None and addresses[0] <= target <= i.address:
            ends[bisect_left(addresses, target)] = at + 1
    return list(ends.items())


def _multiplies(body: Sequence[Instruction]) -> int:
    return sum(i.is_("multiplies") for i in body)


@cache
def _kinds(name: str) -> frozenset[str]:
    return frozenset(kind for kind, pattern in _KINDS.items() if pattern.fullmatch(name))
