"""How a kernel is launched: its arguments in order, and the sizes of grid and block as expressions of them."""

from __future__ import annotations

import ast
import contextlib
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmc.errors import KernelError
from llmc.tvm_shim import PrimFunc, tirx, tvm, tvm_ffi

_AXES = tuple(f"{what}Idx.{axis}" for what in ("block", "thread") for axis in "xyz")
DYNAMIC_SHARED = "tirx.use_dyn_shared_memory"
_BINARY = {
    "Add": "+",
    "Sub": "-",
    "Mul": "*",
    "Div": "//",
    "FloorDiv": "//",
    "Mod": "%",
    "FloorMod": "%",
    "EQ": "==",
    "NE": "!=",
    "LT": "<",
    "LE": "<=",
    "GT": ">",
    "GE": ">=",
    "And": "and",
    "Or": "or",
}


_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


@dataclass(frozen=True)
class Argument:
    """A parameter of a kernel; `dtype` is that of the elements it points to, or its own."""

    name: str
    dtype: str
    pointer: bool


@dataclass(frozen=True)
class Launch:
    """`grid` and `block` (x, y, z) and `shared`, the bytes of dynamic shared memory, are Python expressions over the
    scalar arguments. A call passes the arguments, then what `tags` name: sizes of axes, and `shared` where it is one.
    """

    arguments: tuple[Argument, ...]
    grid: tuple[str, str, str]
    block: tuple[str, str, str]
    shared: str
    tags: tuple[str, ...]

    @property
    def threads(self) -> int | None:
        """Threads of a block; None where only a call knows them."""
        sizes = [int(size) for size in self.block if size.isdecimal()]
        return sizes[0] * sizes[1] * sizes[2] if len(sizes) == 3 else None

    def sizes(self, scalars: Mapping[str, int]) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """(grid, block, bytes of dynamic shared memory) of a call with these scalar arguments."""
        grid, block = (
            [_value(ast.parse(text, mode="eval").body, scalars) for text in e] for e in (self.grid, self.block)
        )
        return tuple(grid), tuple(block), _value(ast.parse(self.shared, mode="eval").body, scalars)


def _value(node: ast.expr, scalars: Mapping[str, int]) -> int:
    """An expression as `_text` writes it, and nothing else: it may come from a file. Raises KernelError."""
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name) if name in scalars:
            return scalars[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return int(_OPERATORS[type(op)](_value(left, scalars), _value(right, scalars)))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPERATORS:
            return int(_OPERATORS[type(op)](_value(left, scalars), _value(right, scalars)))
        case ast.BoolOp(op=op, values=values):
            return int((all if isinstance(op, ast.And) else any)([_value(v, scalars) for v in values]))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _value(body if _value(test, scalars) else orelse, scalars)
        case ast.Call(func=ast.Name(id="min" | "max" as name), args=args):
            return (min if name == "min" else max)(_value(arg, scalars) for arg in args)
    raise KernelError(
        f"the size of a launch, {ast.unparse(node)}, is no expression of the arguments {', '.join(scalars)}"
    )


def launch_of(kernel: PrimFunc) -> Launch:
    """Of a device function, as SplitHostDevice leaves it. Raises KernelError for a size that is no such expression."""
    names = {param: f"a{i}" for i, param in enumerate(kernel.params)}
    arguments = tuple(_argument(name, param) for param, name in names.items())
    found: list[Any] = []
    tvm_ffi.structural_walk(kernel.body, [(tirx.AttrStmt, found.append), (tirx.Bind, found.append)], order="pre")
    extents: dict[str, str] = {}
    for node in found:
        if isinstance(node, tirx.Bind):  # a common part of several sizes; others do not matter here
            with contextlib.suppress(KernelError):
                names[node.var] = _text(node.value, names)
        elif node.attr_key == "thread_extent":
            extents.setdefault(str(node.node.thread_tag), _text(node.value, names))
    x, y, z, i, j, k = (extents.get(axis, "1") for axis in _AXES)
    tags = tuple(str(tag) for tag in kernel.attrs["tirx.kernel_launch_params"])
    shared = _text(_dynamic_bytes(kernel), names) if DYNAMIC_SHARED in tags else "0"
    return Launch(arguments, (x, y, z), (i, j, k), shared, tags)


def _argument(name: str, param: Any) -> Argument:
    type_ = param.ty
    if isinstance(type_, tvm.ir.PointerType):
        return Argument(name, str(type_.element_type.dtype), True)
    return Argument(name, str(type_.dtype), False)


def _dynamic_bytes(kernel: PrimFunc) -> Any:
    """What the one allocation of dynamic shared memory takes, which all others were merged into."""
    sizes: list[Any] = []

    def visit(node: Any) -> None:
        if node.buffer.scope() == "shared.dyn":
            sizes.append(node.buffer.shape[0] * (tvm.runtime.DataType(str(node.buffer.dtype)).bits // 8))

    tvm_ffi.structural_walk(kernel.body, (tirx.AllocBuffer, visit), order="pre")
    return sizes[0] if sizes else tirx.IntImm("int32", 0)


def _text(expr: Any, names: Mapping[Any, str]) -> str:
    """An integer expression in Python. Divisions are of numbers that are not negative, where all roundings agree."""
    if isinstance(expr, tirx.IntImm):
        return str(int(expr))
    if expr in names:
        return names[expr]
    kind = type(expr).__name__
    if kind in _BINARY:
        return f"({_text(expr.a, names)} {_BINARY[kind]} {_text(expr.b, names)})"
    if kind in ("Min", "Max"):
        return f"{kind.lower()}({_text(expr.a, names)}, {_text(expr.b, names)})"
    if kind == "Cast":
        return _text(expr.value, names)
    if kind == "Select":
        parts = (_text(part, names) for part in (expr.true_value, expr.condition, expr.false_value))
        return "({} if {} else {})".format(*parts)
    raise KernelError(f"the size of a launch is {expr}, which is no expression of the kernel's arguments")
