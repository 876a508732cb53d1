"""Integer expressions of lowered functions in numbers: one, or an array of one for each thread of a block.

What is not known (floats, what memory holds) is None, and so is what depends on it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llmc.tvm_shim import tvm

Values = dict[Any, Any]  # of variables
Special = Callable[[Any], Any]  # what to make of any other expression


def _quotient(a: Any, b: Any) -> Any:
    """Rounded towards zero, as the machine does."""
    if np.any(np.equal(b, 0)):
        return None
    down = a // b
    return np.where((a % b != 0) & ((a < 0) != (b < 0)), down + 1, down) if np.any(np.less(down, 0)) else down


def _remainder(a: Any, b: Any) -> Any:
    quotient = _quotient(a, b)
    return None if quotient is None else a - quotient * b


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": _quotient,
    "FloorDiv": _quotient,
    "Mod": _remainder,
    "FloorMod": _remainder,
    "Min": np.minimum,
    "Max": np.maximum,
    "EQ": operator.eq,
    "NE": operator.ne,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "And": np.logical_and,
    "Or": np.logical_or,
    "BitwiseAnd": operator.and_,
    "BitwiseOr": operator.or_,
    "BitwiseXor": operator.xor,
    "LShift": operator.lshift,
    "RShift": operator.rshift,
}


def evaluate(expr: Any, values: Mapping[Any, Any], special: Special) -> Any:
    """The value of `expr`, or None. `special` is asked for whatever is no arithmetic."""
    kind = type(expr).__name__
    if kind == "IntImm":
        return int(expr.value)
    if kind in _BINARY:
        a, b = evaluate(expr.a, values, special), evaluate(expr.b, values, special)
        if a is None or b is None:
            return _known(kind, a, b)
        return _BINARY[kind](a, b)
    if kind == "Var":
        return values.get(expr)
    if kind == "Cast":
        return evaluate(expr.value, values, special) if _integer(expr) and _integer(expr.value) else None
    if kind == "Not":
        inner = evaluate(expr.a, values, special)
        return None if inner is None else np.logical_not(inner)
    if kind == "Select":
        return _chosen(expr.condition, expr.true_value, expr.false_value, values, special)
    if kind == "Let":
        return evaluate(expr.body, {**values, expr.var: evaluate(expr.value, values, special)}, special)
    if isinstance(expr, tvm.ir.Call) and name_of(expr) == "if_then_else" and _integer(expr):
        condition, then, other = expr.args
        return _chosen(condition, then, other, values, special)
    return special(expr)


def name_of(call: Any) -> str:
    """Of an operator, without its dialect: ptx.mma, buffer_data."""
    return str(getattr(call.op, "name", "")).partition(".")[2]


def _known(kind: str, a: Any, b: Any) -> Any:
    """What one side decides alone."""
    one = b if a is None else a
    if one is None or kind not in ("And", "Or"):
        return None
    if kind == "And":
        return False if not np.any(one) else None
    return True if np.all(one) else None


def _chosen(condition: Any, then: Any, other: Any, values: Mapping[Any, Any], special: Special) -> Any:
    chosen = evaluate(condition, values, special)
    if chosen is None:
        return None
    if np.ndim(chosen) == 0:
        return evaluate(then if chosen else other, values, special)
    a, b = evaluate(then, values, special), evaluate(other, values, special)
    return None if a is None or b is None else np.where(chosen, a, b)


def _integer(expr: Any) -> bool:
    return str(getattr(expr.ty, "dtype", "")).startswith(("int", "uint", "bool"))
