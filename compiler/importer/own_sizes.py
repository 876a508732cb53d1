"""Sizes of a branch's own: what a branch demands of a dimension holds where it is taken, and nowhere else.

A branch reads what is around it by names of its own, of types in symbols of its own. When it is entered it is told what
its symbols are, and what it demands of them is checked then: that one is a number, that two are equal, that one lies in
a range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llmc.graph import Dim, Graph, TensorType, as_dim
from llmc.importer.opening import Tracer
from llmc.ops.context import Narrow, Unify, bind, symbols
from llmc.ops.functions import Size
from llmc.tvm_shim import substitute, tirx

Bounds = tuple[int, int | None]
_INFINITE = 2**31 - 1  # what `bind` takes for no greatest size


class SameSizes:
    """What a body sees of what is around it: all as it is there."""

    def read(self, name: str) -> str:
        """What a value around the body is called in it."""
        return name

    def around(self, name: str) -> str:
        """What a value that the body reads is called around it."""
        return name

    def outside(self, dim: Dim) -> Dim:
        """A dimension in the body in the symbols around it; symbols that are only found in the body stay."""
        return dim

    def entered(self, graph: Graph, mentioned: Sequence[Any]) -> tuple[Graph, tuple[Size, ...]]:
        """The body's graph, complete, and the sizes that it is told; `mentioned` are the symbols in the graph."""
        return graph, tuple(Size(s, s) for s in mentioned)


SAME = SameSizes()


class OwnSizes(SameSizes):
    """The same, where all symbols are the body's own. `prefix` begins the names of its values and sizes.

    Values have names of their own where symbols are in their types, where they are known up to symbols, and where they
    are lists.
    """

    def __init__(self, tracer: Tracer, prefix: str) -> None:
        self._tracer, self._prefix = tracer, prefix
        self._sizes: dict[Any, Dim] = {}  # a symbol around the branch -> what it is inside
        self._inside: dict[str, str] = {}  # a value around the branch -> its name inside

    def read(self, name: str) -> str:
        emitter, groups = self._tracer.emitter, self._tracer.groups
        if name in self._inside:
            return self._inside[name]
        type_, value = emitter.graph_types.get(name), emitter.values.get(name)
        own = f"{self._prefix}<around>/{name}"
        if name in groups:
            group = groups[name]
            stacked = group.stacked and self.read(group.stacked)
            groups[own] = replace(group, names=tuple(map(self.read, group.names)), stacked=stacked)
        elif value is not None:
            known = np.vectorize(self.inside, otypes=[object])(value)
            self._tracer.value(own, known, emitter.graph_types[name].dtype)
        elif type_ is not None and any(symbols(d) for d in type_.shape):
            self._tracer.variable(own, TensorType(tuple(map(self.inside, type_.shape)), type_.dtype))
        else:
            return name
        self._inside[name] = own
        return own

    def around(self, name: str) -> str:
        return next((outer for outer, inner in self._inside.items() if inner == name), name)

    # -- sizes --------------------------------------------------------------------------------------------------
    def inside(self, dim: Dim) -> Dim:
        """A dimension around the branch in the branch's symbols."""
        for symbol in symbols(dim):
            if symbol not in self._sizes:
                self._sizes[symbol] = self._own(symbol)
        return _replaced(dim, self._sizes)

    def outside(self, dim: Dim) -> Dim:
        found = {d: s for s, d in self._sizes.items() if isinstance(d, tirx.Var) and d.name == self._name(s)}
        return _replaced(dim, found)

    def _name(self, symbol: Any) -> str:
        return f"{symbol.name} in {self._prefix}".removesuffix("/")

    def _own(self, symbol: Any) -> Dim:
        emitter, name = self._tracer.emitter, self._name(symbol)
        dim = emitter.extents.setdefault(name, tirx.Var(name, "int64"))
        if isinstance(dim, tirx.Var) and not emitter.analyzer.can_prove(dim >= 0):
            bind(emitter.analyzer, dim, self._bounds(symbol))
        return dim

    def _bounds(self, symbol: Any) -> Bounds:
        known = self._tracer.emitter.analyzer.const_int_bound(symbol)
        return max(known.min_value, 0), known.max_value if known.max_value < _INFINITE else None

    def check_both(self, other: OwnSizes) -> None:
        """What two branches both demand, of which one is taken, holds around them: raises Unify or Narrow for that."""
        emitter = self._tracer.emitter
        for symbol in [s for s in self._sizes if s in other._sizes and s not in emitter.measured]:
            one, two = self._sizes[symbol], other._sizes[symbol]
            demand = self.outside(one)
            if not emitter.same(demand, symbol):
                if emitter.same(demand, other.outside(two)) and not any(s in emitter.measured for s in symbols(demand)):
                    raise Unify(symbol, demand)
            elif isinstance(two, tirx.Var):
                known, within = (
                    self._bounds(symbol),
                    _within(self._bounds(symbol), self._bounds(one), self._bounds(two)),
                )
                if within != known and (within[1] is None or within[0] <= within[1]):
                    raise Narrow(symbol, within)

    def entered(self, graph: Graph, mentioned: Sequence[Any]) -> tuple[Graph, tuple[Size, ...]]:
        """The graph has its symbols' bounds then."""
        bounds = {s: self._bounds(d) for s, d in self._sizes.items() if isinstance(d, tirx.Var)}
        demands = {s for s in self._sizes if s not in bounds or bounds[s] != self._bounds(s)}
        needed = set(mentioned).union(*(symbols(self._sizes[s]) for s in demands))
        told = [Size(s, d) for s, d in self._sizes.items() if s in demands or d in needed]
        told.sort(key=lambda size: size.around not in bounds)
        told += [Size(s, _nearest(d, *bounds[s])) for s, d in told if s in demands and s in bounds]
        own = [d for _, d in told if isinstance(d, tirx.Var)]
        limits = {d.name: self._bounds(d) for d in own if self._bounds(d) != (0, None)}
        return replace(graph, symbols=limits), tuple(told)


def _within(known: Bounds, one: Bounds, other: Bounds) -> Bounds:
    """The sizes of a range that may lie in one of two others."""
    greatest = None if one[1] is None or other[1] is None else max(one[1], other[1])
    limits = [limit for limit in (known[1], greatest) if limit is not None]
    return max(known[0], min(one[0], other[0])), min(limits, default=None)


def _nearest(symbol: Any, least: int, greatest: int | None) -> Dim:
    """The size in a range that is nearest to a symbol."""
    below = symbol if greatest is None else tirx.min(symbol, tirx.IntImm("int64", greatest))
    return tirx.max(below, tirx.IntImm("int64", least))


def _replaced(dim: Dim, values: dict[Any, Dim]) -> Dim:
    return dim if isinstance(dim, int) else as_dim(substitute(dim, values))
