"""PTX of the asynchronous proxy as statements of C++: mbarriers, bulk copies, products of warpgroups."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmc.emulator.ptx import Instruction

_WGMMA_TYPES = {
    "f16": "EMU_F16", "bf16": "EMU_BF16", "s8": "EMU_S8", "u8": "EMU_U8", "e4m3": "EMU_E4M3", "e5m2": "EMU_E5M2",
}  # fmt: skip
_KINDS = {"f16": ("f16",), "bf16": ("bf16",), "s8": ("s8", "u8"), "u8": ("s8", "u8"), "e4m3": ("e4m3", "e5m2")}
_KINDS["e5m2"] = _KINDS["e4m3"]


def wgmma(i: Instruction) -> str | None:
    """None where a form is not emulated: matrices that are not K-major, negated ones, sums in float16, sparse ones."""
    action = i.parts[1]
    if action == "fence":
        return "ptx::wgmma_fence();"
    if action == "commit_group":
        return "ptx::wgmma_commit();"
    if action == "wait_group":
        return f"ptx::wgmma_wait({i.one(0)});"
    if action != "mma_async" or i.parts[2:4] != ("sync", "aligned") or len(i.parts) != 8:
        return None
    shape, (td, ta, tb) = re.fullmatch(r"m64n(\d+)k(\d+)", i.parts[4]), i.parts[5:]
    if not shape or ta not in _KINDS or tb not in _KINDS[ta]:
        return None
    N, halves, integers = int(shape[1]), ta in ("f16", "bf16"), ta in ("s8", "u8")
    registers = i.group(0)
    in_registers = isinstance(i.operands[1], tuple)
    options = list(i.operands[4:])
    expected = [] if integers else ["1", "1"] + ["0"] * (2 - in_registers if halves else 0)
    exact = int(shape[2]) == (16 if halves else 32) and td == ("s32" if integers else "f32")
    if not exact or len(registers) != N // 2 or N % 8 or not 8 <= N <= 256 or options != expected:
        return None
    if in_registers and len(i.group(1)) != 4:
        return None
    into = ", ".join(f"(void*)&{register}" for register in registers)
    words = ", ".join(f"ptx::get<uint32_t>({register})" for register in i.group(1)) if in_registers else ""
    a = f"uint32_t emu_a[] = {{{words}}};" if in_registers else "const uint32_t* emu_a = nullptr;"
    descriptor = "0" if in_registers else i.one(1)
    variant = f"emu_wgmma_variant({N}, {_WGMMA_TYPES[ta]}, {_WGMMA_TYPES[tb]}, {str(in_registers).lower()})"
    return f"{a} void* emu_d[] = {{{into}}}; ptx::wgmma({variant}, emu_d, emu_a, {descriptor}, {i.one(2)}, {i.one(3)});"


def mbarrier(i: Instruction) -> str | None:
    """None where a form is not emulated: generic addresses, clusters, what is relaxed, states as values."""
    modifiers = {*i.parts[2:]} - {"parity", "expect_tx", "acquire", "release", "cta", "shared", "shared__cta", "b64"}
    if modifiers or not {"shared", "shared__cta"} & {*i.parts}:
        return None
    action = i.parts[1]
    if action == "init":
        return f"emu_mbarrier_init({i.one(0)}, {i.one(1)});"
    if action == "arrive" and i.one(0) == "_":
        if "expect_tx" in i.parts:
            return f"emu_mbarrier_arrive({i.one(1)}, 1, {i.one(2)});"
        return f"emu_mbarrier_arrive({i.one(1)}, {i.one(2) if len(i.operands) > 2 else 1}, 0);"
    if action == "try_wait" and "parity" in i.parts:
        return f"{i.one(0)} = emu_mbarrier_try_wait({i.one(1)}, {i.one(2)});"
    return None


def copy_bulk(i: Instruction) -> str | None:
    """From global to shared memory of the own block; None for others."""
    way = ("global", "mbarrier__complete_tx__bytes")
    if i.parts[3] not in ("shared__cluster", "shared__cta") or i.parts[4:] != way:
        return None
    return f"emu_copy_bulk({i.one(0)}, (const void*)({i.one(1)}), {i.one(2)}, {i.one(3)});"


def fence(i: Instruction) -> str | None:
    """fence and membar; None for proxies other than the asynchronous one."""
    if "mbarrier_init" in i.parts:
        return "emu_mbarrier_init_fence();"
    if "proxy" in i.parts:
        return "emu_proxy_fence();" if i.parts[2:] in (("async",), ("async", "shared__cta")) else None
    return "emu_fence();"
