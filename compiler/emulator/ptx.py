"""PTX instructions as statements of C++: what a kernel's `asm` becomes. An instruction that is not here is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from llmc.emulator import ptx_async

TYPES = {
    "f32": "float", "f64": "double", "f16": "half", "bf16": "nv_bfloat16", "f16x2": "half2", "bf16x2": "nv_bfloat162",
    "s16": "int16_t", "s32": "int32_t", "s64": "int64_t", "u8": "uint8_t", "u16": "uint16_t", "u32": "uint32_t",
    "u64": "uint64_t", "b8": "uint8_t", "b16": "uint16_t", "b32": "uint32_t", "b64": "uint64_t", "pred": "bool",
}  # fmt: skip
_MMA_TYPES = {
    "f16": "EMU_F16", "bf16": "EMU_BF16", "tf32": "EMU_TF32", "f32": "EMU_F32", "s32": "EMU_S32", "s8": "EMU_S8",
    "u8": "EMU_U8", "s4": "EMU_S4", "u4": "EMU_U4", "e4m3": "EMU_E4M3", "e5m2": "EMU_E5M2",
}  # fmt: skip
_MMA_BITS = {"f16": 16, "bf16": 16, "tf32": 32, "s8": 8, "u8": 8, "s4": 4, "u4": 4, "e4m3": 8, "e5m2": 8}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_ARITHMETIC = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>"}
_FUNCTIONS = {
    "ex2": "std::exp2({})", "lg2": "std::log2({})", "rcp": "1 / ({})", "rsqrt": "1 / std::sqrt({})",
    "sqrt": "std::sqrt({})", "tanh": "std::tanh({})", "sin": "std::sin({})", "cos": "std::cos({})", "neg": "-({})",
    "abs": "std::fabs({})",
}  # fmt: skip
_PAIRS = {"add": "__hadd2", "sub": "__hsub2", "mul": "__hmul2", "max": "__hmax2", "min": "__hmin2", "fma": "__hfma2"}
_PAIR_FUNCTIONS = {"ex2": "h2exp2", "tanh": "h2tanh", "neg": "__hneg2", "abs": "__habs2"}
_VOTES = {"all": "'&'", "any": "'|'", "ballot": "'b'"}
_REDUCTIONS = {"add": "'a'", "min": "'<'", "max": "'>'", "and": "'A'", "or": "'O'", "xor": "'X'"}


class UnknownInstruction(Exception):
    """An instruction, or a form of one, that is not emulated."""


@dataclass(frozen=True)
class Instruction:
    """`parts` of the opcode between its dots, and the operands as C++ expressions; a group in braces is a list."""

    text: str
    parts: tuple[str, ...]
    operands: tuple[str | tuple[str, ...], ...]

    @property
    def type(self) -> str:
        """C++'s name for the last part, the type."""
        return TYPES[self.parts[-1]]

    def one(self, i: int) -> str:
        operand = self.operands[i]
        return operand if isinstance(operand, str) else operand[0]

    def group(self, i: int) -> tuple[str, ...]:
        operand = self.operands[i]
        return (operand,) if isinstance(operand, str) else operand

    def read(self, i: int, type_: str | None = None) -> str:
        return f"ptx::get<{type_ or self.type}>({self.one(i)})"

    def write(self, value: str, type_: str | None = None) -> str:
        return f"ptx::put({self.one(0)}, {type_ or self.type}({value}));"


def _words(group: tuple[str, ...]) -> str:
    return ", ".join(f"ptx::get<uint32_t>({register})" for register in group)


def _results(group: tuple[str, ...], array: str) -> str:
    return " ".join(f"ptx::put({register}, {array}[{i}]);" for i, register in enumerate(group))


def _matrix_load(i: Instruction) -> str:
    count = int(next(part for part in i.parts if re.fullmatch(r"x[124]", part))[1:])
    signed = -count if "trans" in i.parts else count
    return f"uint32_t emu_m[{count}]; ptx::ldmatrix<{signed}>({i.one(1)}, emu_m); {_results(i.group(0), 'emu_m')}"


def _matrix_store(i: Instruction) -> str:
    count = int(next(part for part in i.parts if re.fullmatch(r"x[124]", part))[1:])
    signed = -count if "trans" in i.parts else count
    return f"uint32_t emu_m[] = {{{_words(i.group(1))}}}; ptx::stmatrix<{signed}>({i.one(0)}, emu_m);"


def _mma(i: Instruction) -> str:
    shape = re.fullmatch(r"m(8|16)n8k(\d+)", i.parts[3])
    rest = [part for part in i.parts[4:] if part != "satfinite"]
    if not shape or rest[:2] != ["row", "col"] or len(rest) != 6 or "satfinite" in i.parts:
        raise UnknownInstruction(i.text)
    M, K, (td, ta, tb, tc) = int(shape[1]), int(shape[2]), rest[2:]
    d, a, b, c = (i.group(n) for n in range(4))
    if not {ta, tb} <= set(_MMA_BITS) or td not in _MMA_TYPES or tc != td:
        raise UnknownInstruction(i.text)
    accumulators = M * 8 // 32 // (2 if td == "f16" else 1)
    expected = (accumulators, M * K * _MMA_BITS[ta] // 1024, 8 * K * _MMA_BITS[tb] // 1024, accumulators)
    if tuple(map(len, (d, a, b, c))) != expected:
        raise UnknownInstruction(f"{i.text} (it has {expected} registers of d, a, b, c)")
    variant = f"emu_mma_variant({M}, {K}, {', '.join(_MMA_TYPES[t] for t in (ta, tb, tc))})"
    inputs = " ".join(f"uint32_t emu_{n}[] = {{{_words(group)}}};" for n, group in zip("abc", (a, b, c), strict=True))
    return f"{inputs} uint32_t emu_d[4]; ptx::mma({variant}, emu_d, emu_a, emu_b, emu_c); {_results(d, 'emu_d')}"


def _copy_async(i: Instruction) -> str:
    if i.parts[2] == "commit_group":
        return "emu_commit_group();"
    if i.parts[2] == "wait_group":
        return f"emu_wait_group({i.one(0)});"
    if i.parts[2] == "wait_all":
        return "emu_wait_all();"
    hinted = any("cache_hint" in part for part in i.parts)
    operands = i.operands[:-1] if hinted else i.operands
    if i.parts[2] not in ("ca", "cg") or len(operands) not in (3, 4) or (i.parts[2] == "cg" and i.one(2) != "16"):
        raise UnknownInstruction(i.text)
    size = i.one(2)
    read = size if len(operands) == 3 else f"int({i.one(3)})"
    return f"emu_copy_async({i.one(0)}, (const void*)({i.one(1)}), {size}, {read});"


def _memory(i: Instruction) -> str:
    """ld and st, of one value or a vector; generic, global or shared."""
    if {"acquire", "release", "relaxed", "volatile", "mmio", "const", "param", "local"} & set(i.parts):
        raise UnknownInstruction(i.text)
    load, size = i.parts[0] == "ld", f"sizeof({i.type})"
    values, address = (i.group(0), i.one(1)) if load else (i.group(1), i.one(0))
    count = len(values)
    shared = any(part.startswith("shared") for part in i.parts)
    where = f"emu_shared_pointer({address}, {count} * {size})" if shared else f"(void*)({address})"
    check = f'if (uint64_t(emu_at) % ({count} * {size})) emu_fail("misaligned {".".join(i.parts)}");'
    at = f"auto* emu_at = ({i.type}*){where}; {check}"
    if load:
        out = " ".join(f"ptx::put({value}, emu_v[{n}]);" for n, value in enumerate(values))
        return f"{at} {i.type} emu_v[{count}]; memcpy(emu_v, emu_at, sizeof emu_v); {out}"
    given = ", ".join(f"ptx::get<{i.type}>({value})" for value in values)
    return f"{at} {i.type} emu_v[] = {{{given}}}; memcpy(emu_at, emu_v, sizeof emu_v);"


def _arithmetic(i: Instruction) -> str:
    name, last = i.parts[0], i.parts[-1]
    operands = [i.read(n) for n in range(1, len(i.operands))]
    if last in ("f16x2", "bf16x2"):
        function = {**_PAIRS, **_PAIR_FUNCTIONS}[name]
        return i.write(f"{function}({', '.join(operands)})")
    if name == "fma":
        function = "__hfma" if last in ("f16", "bf16") else "std::fma"
        return i.write(f"{function}({', '.join(operands)})")
    if name in ("min", "max"):
        function = f"__h{name}" if last in ("f16", "bf16") else f"({name})"
        return i.write(f"{function}({', '.join(operands)})")
    if name in _FUNCTIONS:
        return i.write(_FUNCTIONS[name].format(*operands))
    if name == "mad":
        return i.write(f"{operands[0]} * {operands[1]} + {operands[2]}")
    if name in ("shl", "shr"):  # amounts from the width on leave nothing
        amount, width = i.read(2, "uint32_t"), f"8 * sizeof({i.type})"
        beyond = f"({operands[0]} < 0 ? -1 : 0)" if last.startswith("s") else "0"
        return i.write(f"{amount} < {width} ? {operands[0]} {_ARITHMETIC[name]} {amount} : {beyond}")
    if "hi" in i.parts or "wide" in i.parts:
        raise UnknownInstruction(i.text)
    return i.write(f"{operands[0]} {_ARITHMETIC[name]} {operands[1]}")


def _convert(i: Instruction) -> str:
    to, of = i.parts[-2:]
    if to in ("f16x2", "bf16x2") and of == "f32":  # the first operand is the upper half
        one = TYPES[to[:-2]]
        return f"ptx::put({i.one(0)}, {TYPES[to]}({one}({i.read(2)}), {one}({i.read(1)})));"
    if to in ("e4m3x2", "e5m2x2") and of == "f32":
        kind = f"__nv_fp8x2_{to[:4]}"
        return f"ptx::put({i.one(0)}, uint16_t({kind}(float2{{{i.read(2)}, {i.read(1)}}}).__x));"
    if to == "f16x2" and of in ("e4m3x2", "e5m2x2"):
        return f"__nv_fp8x2_{of[:4]} emu_v; emu_v.__x = {i.read(1, 'uint16_t')}; ptx::put({i.one(0)}, half2(emu_v));"
    value = i.read(1)
    if of in ("f32", "f64") and to[0] in "su":
        rounded = {"rni": "nearbyint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}[i.parts[1]]
        return i.write(f"emu_to_integer<{TYPES[to]}>(std::{rounded}({value}))", TYPES[to])
    if {"rz", "rm", "rp", "sat", "relu"} & set(i.parts):
        raise UnknownInstruction(i.text)
    return i.write(value, TYPES[to])


def _shuffle(i: Instruction) -> str:
    variant = {"idx": "'i'", "up": "'u'", "down": "'d'", "bfly": "'x'"}[i.parts[2]]
    return i.write(f"ptx::shfl({variant}, {i.read(1)}, int({i.one(2)}), int({i.one(3)}), {i.one(4)})")


def _barrier(i: Instruction) -> str:
    if i.parts[1] == "warp":
        return f"__syncwarp({i.one(0)});"
    if len(i.operands) != 1 or i.one(0) != "0":
        raise UnknownInstruction(f"{i.text} (only barrier 0, of all threads)")
    return "__syncthreads();"


def _dot(i: Instruction) -> str:
    a, b = (f"{TYPES[part[0] + '32'].replace('32', '8')}" for part in i.parts[1:3])
    total = "int32_t" if "s32" in i.parts else "uint32_t"
    return i.write(f"emu_dp4a<{a}, {b}>({i.read(1, 'uint32_t')}, {i.read(2, 'uint32_t')}, {i.read(3, total)})", total)


def _move(i: Instruction) -> str:
    if isinstance(i.operands[1], tuple):
        low, high = (f"uint32_t(ptx::get<uint16_t>({register}))" for register in i.group(1))
        return i.write(f"{low} | {high} << 16")
    if isinstance(i.operands[0], tuple):
        halves = (f"ptx::put({register}, uint16_t({i.read(1)} >> {16 * n}));" for n, register in enumerate(i.group(0)))
        return " ".join(halves)
    if i.one(1) == "laneid":
        return i.write("nvcuda::wmma::lane()")
    return i.write(i.read(1))


_RULES: dict[str, Callable[[Instruction], str | None]] = {
    "ldmatrix": _matrix_load,
    "stmatrix": _matrix_store,
    "movmatrix": lambda i: i.write(f"ptx::movmatrix({i.read(1, 'uint32_t')})", "uint32_t"),
    "mma": _mma,
    "ld": _memory,
    "st": _memory,
    "cvt": _convert,
    "shfl": _shuffle,
    "bar": _barrier,
    "barrier": _barrier,
    "dp4a": _dot,
    "mov": _move,
    "lop3": lambda i: i.write(f"ptx::lop3({i.read(1)}, {i.read(2)}, {i.read(3)}, {i.one(4)})"),
    "prmt": lambda i: i.write(f"__byte_perm({i.read(1)}, {i.read(2)}, {i.read(3)})"),
    "not": lambda i: i.write(f"~{i.read(1)}"),
    "setp": lambda i: f"{i.one(0)} = {i.read(1)} {_COMPARISONS[i.parts[1]]} {i.read(2)};",
    "selp": lambda i: i.write(f"{i.one(3)} ? {i.read(1)} : {i.read(2)}"),
    "vote": lambda i: f"{i.one(0)} = emu_voted({_VOTES[i.parts[2]]}, {i.one(2)}, {i.one(1)} != 0);",
    "redux": lambda i: i.write(f"emu_voted({_REDUCTIONS[i.parts[2]]}, {i.one(2)}, uint64_t(int64_t({i.read(1)})))"),
    "activemask": lambda i: i.write("__activemask()"),
    "cvta": lambda i: f"{i.one(0)} = emu_shared_address((const void*)({i.one(1)}));",
    "fence": ptx_async.fence,
    "membar": ptx_async.fence,
    "mbarrier": ptx_async.mbarrier,
    "wgmma": ptx_async.wgmma,
    "prefetch": lambda i: ";",
    "createpolicy": lambda i: i.write("0"),
    **dict.fromkeys((*_ARITHMETIC, *_FUNCTIONS, "fma", "min", "max", "mad"), _arithmetic),
}  # fmt: skip


def statement(instruction: Instruction) -> str:
    """One instruction in C++. Raises UnknownInstruction."""
    name = instruction.parts[0]
    if name == "cvta" and instruction.parts[1:3] != ("to", "shared"):
        raise UnknownInstruction(instruction.text)
    rule = _RULES.get(name)
    if instruction.parts[:2] == ("cp", "async"):
        rule = ptx_async.copy_bulk if instruction.parts[2] == "bulk" else _copy_async
    try:
        made = rule(instruction) if rule else None
    except (KeyError, IndexError, StopIteration) as error:
        raise UnknownInstruction(instruction.text) from error
    if made is None:
        raise UnknownInstruction(instruction.text)
    return f"{{ {made} }}"
