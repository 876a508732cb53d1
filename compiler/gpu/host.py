"""What a call launches: the lowered host function, interpreted for given shapes. Nothing runs, and no memory is there.

Of what it does only sizes matter. Arrays are therefore their place among the arguments, and their bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmc.errors import KernelError
from llmc.gpu.evaluate import Values, evaluate, name_of
from llmc.gpu.launch import Launch
from llmc.tvm_shim import PrimFunc, tvm

# TVM's numbers for the fields of a DLTensor and of a packed argument.
_DATA, _SHAPE, _TYPE, _VALUE, _ELEMENT = 1, 2, 13, 15, 17


@dataclass(frozen=True)
class Array:
    """A buffer that a call gets (`argument` is its number) or makes (a workspace: None), of so many bytes."""

    argument: int | None
    bytes: int


@dataclass(frozen=True)
class Launched:
    """One launch of a call: the kernel's arguments in order, arrays and numbers, and its sizes."""

    kernel: str
    arguments: tuple[Any, ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int

    @property
    def blocks(self) -> int:
        return math.prod(self.grid)

    @property
    def threads(self) -> int:
        return math.prod(self.block)


@dataclass(frozen=True)
class _Of:
    """A field of an argument: its handle, its shape."""

    argument: int
    what: str


def launched(
    host: PrimFunc, arguments: Sequence[tuple[tuple[int, ...], int] | int], kernels: Mapping[str, Launch]
) -> list[Launched]:
    """The launches of one call of `host`, as `lower` returns it. An argument is the shape of an array with the bytes of
    an element, or a number. Raises KernelError where what is launched depends on more than these."""
    call = _Call(arguments, kernels)
    call.run(host.body)
    return [each for each in call.found if each.blocks]


class _Call:
    def __init__(self, arguments: Sequence[Any], kernels: Mapping[str, Launch]) -> None:
        self.arguments, self.kernels = arguments, kernels
        self.values: Values = {}
        self.stack: dict[int, Any] = {}
        self.found: list[Launched] = []

    def run(self, node: Any) -> None:
        match type(node).__name__:
            case "SeqStmt":
                for each in node.seq:
                    self.run(each)
            case "Bind":
                self.values[node.var] = self.value(node.value)
            case "AttrStmt" | "SBlockRealize":
                self.run(node.body)
            case "DeclBuffer" if node.data is not None:
                self.values[node.buffer] = self.value(node.data)
            case "IfThenElse":
                condition = self.value(node.condition)
                if condition is None:
                    if self._launches(node):
                        raise KernelError(f"what is launched depends on {node.condition}")
                elif condition:
                    self.run(node.then_case)
                elif node.else_case is not None:
                    self.run(node.else_case)
            case "Evaluate" if isinstance(node.value, tvm.ir.Call):
                self._call(node.value)

    def value(self, expr: Any) -> Any:
        return evaluate(expr, self.values, self._special)

    def _launches(self, node: Any) -> bool:
        return any(f'"{name}"' in str(node) for name in self.kernels)

    def _call(self, call: Any) -> None:
        name = name_of(call)
        if name == "tvm_struct_set" and int(call.args[2]) == _VALUE:
            self.stack[int(call.args[1])] = self.value(call.args[3])
        elif name == "tvm_call_packed_lowered" and str(call.args[0].value) in self.kernels:
            self._launch(str(call.args[0].value), int(call.args[2]))

    def _launch(self, name: str, first: int) -> None:
        launch = self.kernels[name]
        count = len(launch.arguments)
        given = tuple(self.stack[first + i] for i in range(count + len(launch.tags)))
        if any(size is None for size in given[count:]):
            raise KernelError("a launch whose sizes are not known before the call", where=name)
        sizes = dict(zip(launch.tags, map(int, given[count:]), strict=True))
        grid, block = (tuple(sizes.get(f"{what}Idx.{axis}", 1) for axis in "xyz") for what in ("block", "thread"))
        self.found.append(
            Launched(name, given[:count], grid, block, sizes.get("tirx.use_dyn_shared_memory", 0))  # type: ignore[arg-type]
        )

    def _special(self, expr: Any) -> Any:
        """What only host functions have: their arguments' fields, and workspaces."""
        if not isinstance(expr, tvm.ir.Call):
            return None
        name = name_of(expr)
        if name == "tvm_struct_get":
            return self._field(expr)
        if name == "buffer_data":
            return self.values.get(expr.args[0])
        if name == "if_then_else":  # a tensor may come as an object or as a plain DLTensor
            return self.value(expr.args[2])
        if name in ("reinterpret", "handle_add_byte_offset"):
            return self.value(expr.args[0])
        if name == "isnullptr":
            return False
        if name == "TVMBackendAllocWorkspace":
            return Array(None, int(self.value(expr.args[2]) or 0))
        return None

    def _field(self, expr: Any) -> Any:
        whole, field = expr.args[0], int(expr.args[2])
        index, value = int(expr.args[1]), self.values.get(whole)
        if field == _VALUE and value is None:
            argument = self.arguments[index]
            return argument if isinstance(argument, int) else _Of(index, "tensor")
        if field == _SHAPE and isinstance(value, _Of):
            return _Of(value.argument, "shape")
        if field == _ELEMENT and isinstance(value, _Of):
            return self.arguments[value.argument][0][index]
        if field == _DATA and isinstance(value, _Of):
            shape, bytes_ = self.arguments[value.argument]
            return Array(value.argument, math.prod(shape) * bytes_)
        return None
