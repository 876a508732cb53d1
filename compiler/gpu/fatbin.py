"""NVIDIA's container of device code for several GPUs: the driver takes the entry that fits, or compiles the PTX.

The layout is the one that NVIDIA's `fatbinary` writes without compression; a test compares the two.
"""

from __future__ import annotations

import re
import struct

_MAGIC, _VERSION = 0xBA55ED50, 0x0101
_PTX, _ELF = 1, 2
_LINUX_64_BIT = 0x11
_NO_OPTIONS = struct.pack("<QQ", 0x48, 0)  # where ptxas's options stand in a PTX entry's header: an empty text
_ABI = 8  # where an ELF header has the version of its ABI


def fatbin(arch: int, cubin: bytes, ptx: bytes | None) -> bytes:
    """Machine code for sm_`arch`, and PTX for what is later. Raises ValueError where the PTX names no version."""
    entries = _entry(_ELF, (1, cubin[_ABI]), arch, cubin)
    if ptx is not None:
        entries += _later(arch, ptx)
    return struct.pack("<IHHQ", _MAGIC, 1, 16, len(entries)) + entries


def _later(arch: int, ptx: bytes) -> bytes:
    version = re.search(rb"^\.version (\d+)\.(\d+)$", ptx, re.M)
    if version is None:
        raise ValueError("PTX without a version")
    text = ptx.rstrip(b"\0") + b"\0"
    return _entry(_PTX, (int(version[1]), int(version[2])), arch, text, _NO_OPTIONS)


def _entry(kind: int, version: tuple[int, int], arch: int, content: bytes, options: bytes = b"") -> bytes:
    content += bytes(-len(content) % 8)
    size, options_at = 64 + len(options), 64 if options else 0
    header = struct.pack("<HHIQII", kind, _VERSION, size, len(content), 0, options_at)
    header += struct.pack("<HHIQQQQ", version[1], version[0], arch, 0, _LINUX_64_BIT, 0, 0)
    return header + options + content
