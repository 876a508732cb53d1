"""Bindings in an order in which every symbol is defined before it is used.

An extent that is measured at run time is defined by a MatchCast, and read wherever a type names it. TVM's fusion sorts
bindings by the variables that they read, and knows nothing of the symbols.
"""

from __future__ import annotations

import heapq
from typing import Any

from llmc.tvm_shim import IRModule, relax, tirx, tvm_ffi


def define_symbols_first(module: IRModule) -> IRModule:
    """The module with the bindings of each block that matches a shape sorted; the others stay as they are."""
    for name, func in module.functions_items():
        if isinstance(func, relax.Function) and isinstance(func.body, relax.SeqExpr):
            given = {symbol for param in func.params for symbol in _mentioned(param.ty)}
            blocks = [_sorted(block, given) for block in func.body.blocks]
            if any(new is not old for new, old in zip(blocks, func.body.blocks, strict=True)):
                body = relax.SeqExpr(blocks, func.body.body)
                module[name] = relax.Function(func.params, body, func.ret_ty, func.is_pure, func.attrs)
    return module


def _sorted(block: Any, given: set[Any]) -> Any:
    """The block in order; the symbols in `given` are the function's parameters' own."""
    bindings = list(block.bindings)
    casts = [i for i, b in enumerate(bindings) if isinstance(b, relax.MatchCast)]
    if not casts:
        return block
    maker: dict[Any, int] = {b.var: i for i, b in enumerate(bindings)}
    for i in casts:
        maker.update({s: i for s in _mentioned(bindings[i].ty) if s not in given and maker.get(s, i) == i})
    needs = [{maker[v] for v in _mentioned(b) if v in maker} - {i} for i, b in enumerate(bindings)]
    readers: list[list[int]] = [[] for _ in bindings]
    for i, need in enumerate(needs):
        for maker_ in need:
            readers[maker_].append(i)
    ready = [i for i, need in enumerate(needs) if not need]
    order = []
    while ready:
        i = heapq.heappop(ready)
        order.append(bindings[i])
        for reader in readers[i]:
            needs[reader].discard(i)
            if not needs[reader]:
                heapq.heappush(ready, reader)
    return type(block)(order)


def _mentioned(node: Any) -> list[Any]:
    """All variables that a binding or a type mentions: values, and symbols of their shapes."""
    parts = [node]
    if isinstance(node, relax.Binding):
        parts = [node.value, node.var, node.var.ty, *([node.ty] if isinstance(node, relax.MatchCast) else [])]
    found: list[Any] = []
    for part in parts:
        tvm_ffi.structural_walk(part, (tirx.Var, found.append), order="post")
    return found
