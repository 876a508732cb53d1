"""The calls at which an artifact's kernels are predicted: a decoder's of one token behind 512 keys, and of 512 tokens;
and of 12 tokens, for kernels that neither launches.

Sizes that are known at run time only are told by their names, as exporters and `llmc.lower` give them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmc.gpu.evaluate import evaluate
from llmc.tvm_shim import IRModule, relax, tvm, tvm_ffi

_BLOCK = 64  # keys side by side in the packed cache


@dataclass(frozen=True)
class Point:
    """`tokens` at once, after which there are `keys`, in one sequence."""

    name: str
    tokens: int
    keys: int

    def size(self, symbol: str) -> int:
        """What a dimension of this name is."""
        name, blocks = symbol.lower(), -(-self.keys // _BLOCK)
        known = {"blocks": blocks, "pages": blocks, "capacity": blocks * _BLOCK, "rows": 1}
        if name in known:
            return known[name]
        if "batch" in name:
            return 1
        if "total" in name or "+" in name:
            return self.keys
        return self.keys - self.tokens if "past" in name else self.tokens


DECODE, PREFILL = Point("one token behind 512 keys", 1, 512), Point("512 tokens", 512, 512)
FEW = Point("12 tokens behind 512 keys", 12, 512)
Arguments = tuple[Any, ...]  # as `llmc.gpu.host.launched` takes them


def typical_calls(module: IRModule) -> dict[str, dict[Point, list[Arguments]]]:
    """Of a module with scheduled PrimFuncs, in which outputs are explicit (CallTIRRewrite): for each of them that a
    function calls, the arguments of its calls.

    A model without a past has no decode. Calls whose sizes are not known are left out.
    """
    functions = [func for _, func in module.functions_items() if isinstance(func, relax.Function)]
    decoder = any("past" in str(param.ty) or "kv_len" in str(param) for func in functions for param in func.params)
    found: dict[str, dict[Point, list[Arguments]]] = {}
    for name, shapes in _calls(functions):
        for point in (DECODE, PREFILL, FEW) if decoder else (PREFILL, FEW):
            at = found.setdefault(name, {}).setdefault(point, [])
            arguments = tuple(_argument(shape, point) for shape in shapes)
            if arguments not in at and None not in arguments:
                at.append(arguments)
    return found


def _calls(functions: list[Any]) -> Iterator[tuple[str, list[Any]]]:
    """(PrimFunc, the types of its arguments, or the number itself) of each call, whose outputs are arguments too."""
    found: list[Any] = []
    for function in functions:
        tvm_ffi.structural_walk(function.body, (tvm.ir.Call, found.append), order="pre")
    for call in found:
        if isinstance(call.op, tvm.ir.GlobalVar):
            parts = ([*a.values] if isinstance(a, relax.ShapeExpr) else [a] for a in call.args)
            given = [part for each in parts for part in each]
            yield str(call.op.name_hint), [a.ty if isinstance(a.ty, relax.TensorType) else a for a in given]


def _argument(type_: Any, point: Point) -> Any:
    """(shape, bytes of an element), or a number; None where it is not known."""
    values = _Sizes(point)
    if not isinstance(type_, relax.TensorType):
        value = evaluate(getattr(type_, "value", type_), values, lambda _: None)
        return None if value is None else int(value)
    shape = [evaluate(size, values, lambda _: None) for size in type_.shape.values]
    return (
        None if None in shape else (tuple(map(int, shape)), int(tvm.runtime.DataType(str(type_.dtype)).bits + 7) // 8)
    )


class _Sizes(dict[Any, Any]):
    """Of symbols, by their names."""

    def __init__(self, point: Point) -> None:
        self.point = point

    def get(self, symbol: Any, default: Any = None) -> int:
        return self.point.size(str(symbol.name))
