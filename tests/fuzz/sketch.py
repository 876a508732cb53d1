"""A graph while it is drawn: values that steps may read, with what is known of each.

Every value has bounds for its elements, and a bound for its rounding error. Both follow from those of a node's inputs.
That keeps graphs meaningful: a step takes values from the domain of its function, so that nothing overflows, divides by
nearly zero or is not a number; and what jumps (rounding, comparing, ranking) is given exact values only, so that a
difference of one bit cannot become one of a whole step. It also says what the results' tolerance is.

The bounds are those of any textbook: an operation errs by a few units of the last place of its result; a sum of K
products by K units of the sum of their magnitudes, in whatever order; a function with slope L carries on L times the
error of its argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from hypothesis import strategies as st

from tests.fuzz.program import RUNS, Dim, Length, Node, Program, Value

FLOATS = ("float32", "float16")
UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "int64": 0.0, "int32": 0.0}  # of rounding, relative
ULPS = 8  # of an elementary function or an addition, in units of rounding
WORST = 2.0**-7  # relative error beyond which a value is not worth computing with
MASKED = 1e6  # magnitude from which a float is what a mask adds: nobody but a softmax reads it
LARGEST = 64.0  # magnitude that steps keep floats within

T = TypeVar("T")


def size_of(value: Value) -> float:
    """The largest magnitude of a value's elements."""
    return max(abs(value.low), abs(value.high))


def exact(value: Value) -> bool:
    """Is it free of rounding?"""
    return value.error == (0.0, 0.0)


def errors(*values: Value) -> np.ndarray:
    """The sum of the errors."""
    return np.sum([v.error for v in values], axis=0) if values else np.zeros(2)


class Sketch:
    """Grows a program. Methods return the values that they made."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self._draw = draw
        self.opset = self.choice([21, 23])
        self.sizes: tuple[dict[str, int], ...] = tuple({} for _ in range(RUNS))
        self.values: dict[str, Value] = {}
        self.inputs: list[str] = []
        self.constants: dict[str, int | list[Any]] = {}
        self.nodes: list[Node] = []
        self.floats: dict[str, Node] = {}
        self.inner: set[str] = set()  # values that stay between the nodes that made and read them
        self.kept: set[str] = set()  # outputs, whoever else reads them
        self.float = "float16" if self.chance(10) else "float32"  # what new float values are

    # -- draws ----------------------------------------------------------------------------------------------------
    def integer(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, high))

    def choice(self, options: Sequence[T]) -> T:
        return self._draw(st.sampled_from(options))

    def chance(self, percent: int) -> bool:
        return self.integer(0, 99) < percent

    def some(self, options: Sequence[T], least: int = 1) -> list[T]:
        """A few of the options, in their order."""
        count = self.integer(least, len(options))
        chosen = self._draw(st.permutations(range(len(options))))[:count]
        return [options[i] for i in sorted(chosen)]

    # -- dimensions -----------------------------------------------------------------------------------------------
    def lengths(self, dim: Dim) -> tuple[int, ...]:
        """What a dimension is in each run."""
        return tuple(dim if isinstance(dim, int) else dim.at(sizes) for sizes in self.sizes)

    def most(self, dims: Sequence[Dim]) -> int:
        """The largest product of some dimensions."""
        return max(int(np.prod(run)) for run in zip(*map(self.lengths, dims), strict=True)) if dims else 1

    def symbol(self, name: str, low: int = 1, high: int = 7) -> Length:
        """A symbolic dimension, the known one of that name or a new one."""
        for sizes in self.sizes:
            if name not in sizes:
                sizes[name] = self.integer(low, high)
        return Length.symbol(name)

    def symbol_of_data(self) -> Length:
        """A dimension that depends on data: no step can compute with it."""
        return Length.symbol(f"data{len(self.values)}")

    def dim(self) -> Dim:
        if self.chance(25):
            return self.symbol(self.choice(["N", "S"]))
        return self.choice([1, 2, 3, 4, 5, 8, 16, 17])

    def shape(self, rank: int | None = None) -> tuple[Dim, ...]:
        """A new shape of at most a few hundred elements."""
        rank = self.choice([0, 1, 2, 2, 3, 3, 4]) if rank is None else rank
        dims: list[Dim] = []
        for _ in range(rank):
            d = self.dim()
            dims.append(d if self.most([*dims, d]) <= 600 else self.choice([1, 2]))
        return tuple(dims)

    # -- values that nothing computes -----------------------------------------------------------------------------
    def input(self, dtype: str, shape: Sequence[Dim], low: float = -2, high: float = 2) -> Value:
        value = self._value(dtype, shape, *self._limits(dtype, low, high))
        self.inputs.append(value.name)
        return value

    def constant(self, dtype: str, shape: Sequence[int], low: float = -2, high: float = 2) -> Value:
        """A random initializer."""
        value = self._value(dtype, shape, *self._limits(dtype, low, high))
        self.constants[value.name] = self.integer(0, 2**16)
        return value

    def given(self, data: Any, dtype: str = "int64") -> Value:
        """An initializer of known elements."""
        array = np.asarray(data)
        value = self._value(dtype, array.shape, float(array.min(initial=0)), float(array.max(initial=0)))
        self.constants[value.name] = array.reshape(-1).tolist()
        return value

    def operand(self, dtype: str, shape: Sequence[Dim], low: float = -2, high: float = 2) -> Value:
        """A new input, or an initializer where the shape is known."""
        known = [d for d in shape if isinstance(d, int)]
        if len(known) == len(shape) and self.chance(60):
            return self.constant(dtype, known, low, high)
        return self.input(dtype, shape, low, high)

    def _limits(self, dtype: str, low: float, high: float) -> tuple[float, float]:
        if dtype == "bool":
            return 0, 1
        return (max(low, 0), max(high, 0)) if dtype.startswith("uint") else (low, high)

    def _value(
        self, dtype: str, shape: Sequence[Dim], low: float, high: float, error: Sequence[float] = (0.0, 0.0)
    ) -> Value:
        value = Value(
            f"v{len(self.values)}", dtype, tuple(shape), float(low), float(high), (float(error[0]), float(error[1]))
        )
        self.values[value.name] = value
        return value

    # -- values to read -------------------------------------------------------------------------------------------
    def pick(
        self, dtypes: Sequence[str] = FLOATS, rank: int = 0, accept: Callable[[Value], bool] = lambda _: True
    ) -> Value:
        """A value of one of the dtypes and of at least that rank, often the newest; an input where there is none."""
        found = [v for v in self.values.values() if v.dtype in dtypes and len(v.shape) >= rank and self.usable(v)]
        found = [v for v in found if accept(v)]
        if found and not self.chance(15):
            return found[-1] if self.chance(60) else self.choice(found)
        dtype = self.float if self.float in dtypes and self.chance(80) else self.choice(dtypes)
        while True:
            shape = self.shape(self.integer(rank, max(rank, 4)))
            if accept(Value("", dtype, shape, -2, 2)):
                low, high = (-100, 100) if dtype.endswith("int8") else (-2, 2)
                return self.input(dtype, shape, low, high)

    def exact(self, dtypes: Sequence[str] = FLOATS, rank: int = 0) -> Value:
        return self.pick(dtypes, rank, exact)

    def usable(self, value: Value) -> bool:
        """May a step read it? Its length is known, it is not drowned in rounding, and no motif keeps it to itself."""
        known = all(n in self.sizes[0] or not n for d in value.shape if isinstance(d, Length) for n, _ in d.terms)
        fine = max(value.error) <= WORST * max(size_of(value), 1e-3)
        return known and fine and size_of(value) < MASKED and value.name not in {*self.constants, *self.inner}

    # -- nodes ----------------------------------------------------------------------------------------------------
    def node(
        self,
        op: str,
        inputs: Sequence[Value | None],
        dtype: str,
        shape: Sequence[Dim],
        low: float,
        high: float,
        error: Sequence[float] | np.ndarray = (0.0, 0.0),
        *,
        domain: str = "",
        **attrs: Any,
    ) -> Value:
        """A node with one output."""
        value = self._value(dtype, shape, low, high, error)
        self.nodes.append(Node(op, _names(inputs), (value.name,), attrs, domain))
        return value

    def nodes_of(
        self, op: str, inputs: Sequence[Value | None], outputs: Sequence[Value | None], domain: str = "", **attrs: Any
    ) -> list[Value]:
        """A node with several outputs, each like the value given for it but for its name; None is an absent one."""
        made = [v and self._value(v.dtype, v.shape, v.low, v.high, v.error) for v in outputs]
        self.nodes.append(Node(op, _names(inputs), _names(made), attrs, domain))
        return [v for v in made if v is not None]

    def smooth(
        self, op: str, inputs: Sequence[Value], shape: Sequence[Dim], low: float, high: float, error: Any, **attrs: Any
    ) -> Value:
        """A float node whose result is rounded: `error` is what it carries on, besides a few units of its own."""
        dtype = inputs[0].dtype
        own = ULPS * UNIT[dtype] * max(abs(low), abs(high))
        return self.node(op, inputs, dtype, shape, low, high, np.asarray(error) + own, **attrs)

    def moved(self, op: str, x: Value, shape: Sequence[Dim], more: Sequence[Value | None] = (), **attrs: Any) -> Value:
        """A node whose elements are x's."""
        return self.node(op, [x, *more], x.dtype, shape, x.low, x.high, x.error, **attrs)

    def bounded(self, x: Value, most: float = LARGEST) -> Value:
        """x, or x within the bounds."""
        if size_of(x) <= most:
            return x
        if x.dtype not in FLOATS:
            limits = [self.given(s * int(most), x.dtype) for s in ((0, 1) if x.dtype.startswith("u") else (-1, 1))]
            return self.node("Clip", [x, *limits], x.dtype, x.shape, max(x.low, -most), min(x.high, most))
        if self.chance(50):
            return self.smooth("Tanh", [x], x.shape, -1, 1, errors(x))
        factor = 2.0 ** -np.ceil(np.log2(size_of(x) / most))
        half = self.given(factor, x.dtype)
        return self.node("Mul", [x, half], x.dtype, x.shape, x.low * factor, x.high * factor, self.tiny(x, factor))

    def tiny(self, x: Value, factor: float) -> np.ndarray:
        """The error of x times a power of two, which is exact but for what falls below the smallest numbers."""
        return errors(x) * factor + (2.0**-24 if x.dtype == "float16" else 0.0)

    def positive(self, x: Value, least: float = 0.25) -> Value:
        """x, or something like it that is not near zero."""
        if x.low >= least:
            return x
        away = self.node("Abs", [x], x.dtype, x.shape, 0, size_of(x), x.error)
        return self.smooth("Add", [away, self.given(least, x.dtype)], x.shape, least, size_of(x) + least, errors(x))

    # -- the end --------------------------------------------------------------------------------------------------
    def program(self) -> Program:
        """Every value that nothing reads is an output, and some others are."""
        read = {i for n in self.nodes for i in n.inputs}
        made = [o for n in self.nodes for o in n.outputs if o]
        fine = [o for o in made if o not in self.inner and size_of(self.values[o]) < MASKED]
        outputs = [o for o in fine if o not in read or o in self.kept or self.chance(5)]
        used = read | {i for n in self.floats.values() for i in n.inputs}
        inputs = tuple(i for i in self.inputs if i in used)
        constants = {n: d for n, d in self.constants.items() if n in used}
        values = {n: replace(v) for n, v in self.values.items() if n in made or n in inputs or n in constants}
        return Program(
            self.opset, self.sizes, values, inputs, constants, tuple(self.nodes), tuple(outputs), self.floats
        )


def _names(values: Sequence[Value | None]) -> tuple[str, ...]:
    return tuple(v.name if v is not None else "" for v in values)
