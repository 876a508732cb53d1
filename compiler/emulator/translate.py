"""From the CUDA C of a kernel to C++ for the CPU: shared memory comes from the emulator, `asm` becomes calls.

Line numbers stay. Everything else is macros, types and functions of `include/shim.h`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmc.emulator.ptx import TYPES, Instruction, UnknownInstruction, statement

_KERNEL = re.compile(
    r"__global__\s+void\s+(?:__launch_bounds__\(\s*(\d+)[^)]*\)\s*)?(\w+)\s*\(([^)]*)\)\s*\{", re.DOTALL
)
_DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:(?:__align__|alignas)\(\d+\)\s+)?(\w[\w\s]*?)\s+(\w+)\s*\[\s*\]\s*;")
_STATIC = re.compile(
    r"__shared__\s+(?:(?:__align__|alignas)\((\d+)\)\s+)?([\w:]+(?:\s+\w+)*?)\s+(\w+)((?:\s*\[[^\]]+\])*)\s*;"
)
_ASM = re.compile(r"\b(?:asm|__asm__)\b\s*(?:volatile|__volatile__)?\s*\(")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_OPERAND = re.compile(r'"[=+&]*(\w)"\s*\(')


class TranslationError(Exception):
    """A kernel holds what the emulator does not know."""


@dataclass(frozen=True)
class Parameter:
    """`type` of C++, without the pointer."""

    type: str
    name: str
    pointer: bool


@dataclass(frozen=True)
class Entry:
    """A kernel of a source. `max_threads` by its launch bounds, 0 without."""

    name: str
    parameters: tuple[Parameter, ...]
    max_threads: int


def translate(source: str) -> tuple[str, dict[str, Entry]]:
    """(C++, kernels by name). Raises TranslationError for unknown instructions and kinds of shared memory."""
    entries = {m[2]: Entry(m[2], _parameters(m[3]), int(m[1] or 0)) for m in _KERNEL.finditer(source)}
    if not entries:
        raise TranslationError('the source has no kernel (extern "C" __global__ void …)')
    body = _DYNAMIC.sub(lambda m: f"{m[1]}* const {m[2]} = ({m[1]}*)emu_dynamic_shared();", source)
    sites = iter(range(1 << 30))
    body = _STATIC.sub(lambda m: _array(m, next(sites)), body)
    if "__shared__" in body:
        line = next(line for line in body.splitlines() if "__shared__" in line)
        raise TranslationError(f"a declaration of shared memory that is not understood: {line.strip()}")
    lines = ['#line 1 "kernel.cu"', _inline_assembly(body), *map(_entry, entries.values())]
    return "\n".join(lines) + "\n", entries


def _parameters(text: str) -> tuple[Parameter, ...]:
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(.*?)(\*?)\s*(?:__restrict__\s+)?(\w+)", part, re.DOTALL)
        assert match, part
        type_ = re.sub(r"\bconst\b|__grid_constant__", "", match[1]).strip()
        found.append(Parameter(type_, match[3], bool(match[2])))
    return tuple(found)


def _array(match: re.Match[str], site: int) -> str:
    align, type_, name, sizes = int(match[1] or 16), match[2], match[3], match[4].strip()
    whole = f"std::remove_reference_t<decltype(*({type_}(*){sizes})0)>" if sizes else type_
    call = f'emu_static_shared({site}, "{name}", sizeof({whole}), {max(align, 16)})'
    return (
        f"{type_} (&{name}){sizes} = *({type_}(*){sizes}){call};" if sizes else f"{type_}& {name} = *({type_}*){call};"
    )


def _entry(kernel: Entry) -> str:
    arguments = ", ".join(
        f"*({p.type}**)a[{i}]" if p.pointer else f"*({p.type}*)a[{i}]" for i, p in enumerate(kernel.parameters)
    )
    head = 'extern "C" __attribute__((no_sanitize("thread", "undefined")))'
    return f"{head} void emu_entry_{kernel.name}(void** a) {{ {kernel.name}({arguments}); }}"


def _inline_assembly(source: str) -> str:
    out, at = [], 0
    for match in _ASM.finditer(source):
        if match.start() < at:
            continue
        end = _closing(source, match.end())
        after = re.compile(r"\s*;").match(source, end + 1)
        out.append(source[at : match.start()])
        newlines = "\n" * source.count("\n", match.start(), end)
        out.append(_assembly(source[match.end() : end]) + newlines)
        at = after.end() if after else end + 1
    return "".join(out) + source[at:]


def _closing(text: str, at: int) -> int:
    """The parenthesis that closes the one before `at`."""
    depth = 1
    while depth:
        if text[at] == '"':
            match = _STRING.match(text, at)
            assert match
            at = match.end()
            continue
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
    return at - 1


def _assembly(inside: str) -> str:
    """The statements of one asm: template, outputs, inputs, clobbers."""
    template, at = "", 0
    while match := re.compile(r"\s*" + _STRING.pattern).match(inside, at):
        template += match[1].encode().decode("unicode_escape")
        at = match.end()
    operands = _operands(inside[at:])
    locals_: dict[str, str] = {}
    statements = []
    for text in _instructions(template):
        if text.startswith(".reg"):
            kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
            for name in re.split(r"\s*,\s*", names.strip()):
                locals_[name] = f"reg_{name.strip('%')}"
                statements.append(f"{TYPES[kind]} {locals_[name]} = {{}};")
            continue
        statements.append(_instruction(text, operands, locals_))
    return "{ " + " ".join(statements) + " }"


def _operands(rest: str) -> list[str]:
    """The C++ expressions %0, %1, … of all outputs and inputs."""
    found, at = [], 0
    while match := _OPERAND.search(rest, at):
        end = _closing(rest, match.end())
        found.append(f"({rest[match.end() : end].strip()})")
        at = end
    return found


def _instructions(template: str) -> list[str]:
    text = template.strip()
    if text.startswith("{") and not re.match(r"\{\s*%\d", text):
        text = text.removeprefix("{").rstrip().removesuffix("}")
    return [part for part in (" ".join(part.split()) for part in text.split(";")) if part]


def _instruction(text: str, operands: list[str], locals_: dict[str, str]) -> str:
    guard, body = "", text
    if match := re.match(r"@(!?)(%*\w+)\s+", text):
        guard, body = f"if ({match[1]}{locals_.get(match[2], match[2])}) ", text[match.end() :]
    opcode, _, rest = body.partition(" ")

    def expression(operand: str) -> str:
        operand = operand.strip()
        if operand.startswith("["):
            base, plus, offset = operand.strip("[]").partition("+")
            return f"ptx::plus({expression(base)}, {offset.strip()})" if plus else expression(base)
        if match := re.fullmatch(r"%(\d+)", operand):
            return operands[int(match[1])]
        if match := re.fullmatch(r"0f([0-9a-fA-F]{8})", operand):
            return f"0x{match[1]}u"
        return locals_.get(operand, operand.lstrip("%"))

    parsed: list[str | tuple[str, ...]] = []
    for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", rest):
        part = part.strip()
        if not part:
            continue
        parsed.append(
            tuple(expression(one) for one in part.strip("{}").split(",")) if part.startswith("{") else expression(part)
        )
    try:
        return guard + statement(Instruction(text, tuple(opcode.replace("::", "__").split(".")), tuple(parsed)))
    except UnknownInstruction as error:
        raise TranslationError(f"an instruction that is not emulated: {error}") from error
