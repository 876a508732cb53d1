"""Generated kernels with every mutation in them at once, one of which a run turns on.

    source, mutants = mutated(cuda_source)
    emulator = Emulator(source)
    with mutants_of(emulator).on(number): ...

Mutated are: barriers of blocks and warps, waits for asynchronous copies and products and their groups, bulk copies and
what counts them, fences (each left out); indices into
global and shared memory (each one access further), swizzles (each left out) and shuffles (each to half the distance).
What the compiler drops, since nothing reads it, is not mutated.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llmc.emulator.emulator import Emulator

_HEAD = r"""
extern "C" { int emu_mutant = -1; unsigned char emu_reached[65536]; }
__attribute__((noinline, no_sanitize("thread", "undefined"))) static bool emu_is(int k) {
  emu_reached[k] = 1;
  return emu_mutant == k;
}
__attribute__((noinline, no_sanitize("thread", "undefined"))) static int64_t emu_step(int k, int n) {
  emu_reached[k] = 1;
  return emu_mutant == k ? n : 0;
}
"""
_STATEMENTS = {
    "barrier": re.compile(r"__syncthreads\(\);"),
    "warp barrier": re.compile(r"__syncwarp\([^;]*\);"),
    "wait": re.compile(r"\w*(?:cp_async_wait|wgmma_wait)\w*\([^;]*\);"),
    "commit": re.compile(r"\w*(?:cp_async_commit|wgmma_commit)\w*\([^;]*\);"),
    "fence": re.compile(r"\w*(?:wgmma_fence|fence_proxy|fence_mbarrier)\w*\(\);"),
    "mbarrier": re.compile(r"\w*(?:mbarrier_init_init|mbarrier_arrive|cp_async_bulk)\w*\([^;]*\);"),
}
_POLLS = re.compile(r"if \((?=!\(\(\w+\[0\] == \(uint\)0\)\)\) \{ break; \})")  # for a phase of an mbarrier
_SHARED = re.compile(r"__shared__\s+(?:(?:__align__|alignas)\(\d+\)\s+)?(\w+)\s+(\w+)\s*\[")
_PARAMETER = re.compile(r"(\w+)\s*\*\s*(?:__restrict__\s+)?(\w+)")
_UNREAD = re.compile(r"^\s*(?:int|int64_t|uint|bool)\s+(\w+) = [^;]*;$", re.M)
_BYTES = {"float": 4, "half": 2, "nv_bfloat16": 2, "uint": 4, "int": 4, "int64_t": 8, "uint64_t": 8, "uchar": 1}
_BYTES |= {"char": 1, "int8_t": 1, "uint8_t": 1, "short": 2, "ushort": 2, "uint16_t": 2, "double": 8, "bool": 1}
_VECTOR = re.compile(r"(float|half|nv_bfloat16|uint|int|uchar|char|ushort|short|double|longlong)(\d+)$")
_COPIED = 16  # bytes of what a copy, or a row of ldmatrix, is


@dataclass(frozen=True)
class Mutant:
    """`kind`: barrier, warp barrier, wait, commit, fence, mbarrier, shared, global, swizzle or shuffle; `line`: what it
    changes."""

    number: int
    kind: str
    line: str


class _Change:
    """Edits of a text, none inside of another's insertion."""

    def __init__(self, text: str) -> None:
        self.text, self.insertions, self.mutants = text, list[tuple[int, str]](), list[Mutant]()

    def mutant(self, kind: str, at: int) -> int:
        line = self.text[self.text.rfind("\n", 0, at) + 1 : self.text.find("\n", at)].strip()
        self.mutants.append(Mutant(len(self.mutants), kind, line))
        return len(self.mutants) - 1

    def insert(self, at: int, text: str) -> None:
        self.insertions.append((at, text))

    def result(self) -> str:
        parts, end = [], 0
        for at, text in sorted(self.insertions, key=lambda each: each[0]):
            parts += [self.text[end:at], text]
            end = at
        return "".join([*parts, self.text[end:]])


def mutated(source: str) -> tuple[str, list[Mutant]]:
    """The source with all mutants in it, none of them on, and what they are."""
    start = source.index("{", source.rindex('extern "C" __global__'))
    head, body = source[:start], source[start:]
    body = _UNREAD.sub(lambda m: "" if len(re.findall(rf"\b{m[1]}\b", body)) == 1 else m[0], body)
    change = _Change(body)
    for kind, pattern in _STATEMENTS.items():
        for match in pattern.finditer(body):
            change.insert(match.start(), f"if (!emu_is({change.mutant(kind, match.start())})) ")
    for match in _POLLS.finditer(body):
        change.insert(match.end(), f"emu_is({change.mutant('wait', match.start())}) || ")
    parameters = head[head.rindex('extern "C" __global__') :]
    arrays = {name: ("shared", type_) for type_, name in _SHARED.findall(body)}
    arrays |= {name: ("global", type_) for type_, name in _PARAMETER.findall(parameters)}
    for name, (kind, type_) in arrays.items():
        for match in re.finditer(rf"\b{name}(\[| \+ \()", body):
            _index(change, match, kind, type_)
    for match in re.finditer(r" \^ ", body):
        end = _closing(body, match.end())
        change.insert(match.end(), f"(emu_is({change.mutant('swizzle', match.start())}) ? 0 : (")
        change.insert(end, "))")
    for match in re.finditer(r"__shfl_\w+\(\(uint\)\d+, ", body):
        comma = body.index(", ", _argument_end(body, match.end()) + 2)
        change.insert(comma, f" >> (int)emu_step({change.mutant('shuffle', match.start())}, 1)")
    first = source.index('extern "C" __global__')
    return source[:first] + _HEAD + head[first:] + change.result(), change.mutants


def _index(change: _Change, match: re.Match[str], kind: str, type_: str) -> None:
    """An index, or an offset of a pointer, that is one access further."""
    body = change.text
    if "__shared__" in body[body.rfind("\n", 0, match.start()) + 1 : match.start()]:
        return  # its declaration
    end = _closing(body, match.end())
    before = body[: match.start()]
    wide = re.search(r"\*\((\w+)\*\)\($", before)
    size = _COPIED if before.endswith("(&(") else _bytes(wide[1]) if wide else _bytes(type_)
    step = max(size // _bytes(type_), 1)
    change.insert(end, f" + emu_step({change.mutant(kind, match.start())}, {step})")


def _bytes(type_: str) -> int:
    vector = _VECTOR.match(type_)
    return _BYTES[vector[1]] * int(vector[2]) if vector else _BYTES[type_]


def _closing(text: str, at: int) -> int:
    """Where what was open at `at` closes."""
    depth = 0
    while depth or text[at] not in ")]":
        depth += (text[at] in "([") - (text[at] in ")]")
        at += 1
    return at


def _argument_end(text: str, at: int) -> int:
    """Where the argument that begins at `at` ends."""
    depth = 0
    while depth or text[at] not in ",)":
        depth += (text[at] in "([") - (text[at] in ")]")
        at += 1
    return at


class Switch:
    """Turns the mutants of an emulator's kernel on."""

    def __init__(self, emulator: Emulator) -> None:
        self._chosen = ctypes.c_int.in_dll(emulator.library, "emu_mutant")
        self._reached = (ctypes.c_ubyte * 65536).in_dll(emulator.library, "emu_reached")

    @contextmanager
    def on(self, number: int) -> Iterator[None]:
        self._chosen.value = number
        try:
            yield
        finally:
            self._chosen.value = -1

    def reached(self, number: int) -> bool:
        """Has any thread come to it, in any run so far?"""
        return bool(self._reached[number])
