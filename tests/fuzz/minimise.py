"""A program that fails, made smaller as long as it fails in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from tests.fuzz.differential import Failure
from tests.fuzz.program import Dim, Length, Node, Program, pruned

Check = Callable[[Sequence[Program]], list[Failure | None]]
TOGETHER = 24  # candidates that are tried at once


def minimise(program: Program, kind: str, check: Check) -> Program:
    """The smallest program found whose failure is of that kind."""
    while True:
        candidates = sorted(filter(lambda c: size(c) < size(program), smaller(program)), key=size)
        for start in range(0, len(candidates), TOGETHER):
            batch = candidates[start : start + TOGETHER]
            failed = [c for c, f in zip(batch, check(batch), strict=True) if f is not None and f.kind == kind]
            if failed:
                program = failed[0]
                break
        else:
            return program


def size(program: Program) -> tuple[int, ...]:
    """What makes a program large, the worst first."""
    symbols = {n for v in program.values.values() for d in v.shape if isinstance(d, Length) for n, _ in d.terms}
    return len(program.nodes), len(program.outputs), len(symbols), len(program.inputs)


def smaller(program: Program) -> Iterator[Program]:
    """Programs with one thing less: an output, a node whose results are fed instead or passed by, a symbol."""
    if len(program.outputs) > 1:
        yield from (_clean(replace(program, outputs=(name,))) for name in program.outputs)
        yield from (
            _clean(replace(program, outputs=tuple(o for o in program.outputs if o != name))) for name in program.outputs
        )
    held = _held(program)
    for node in program.nodes:
        if set(node.outputs) & held:
            continue
        if len(program.nodes) > 1 and all(_can_be_fed(program, o) for o in node.outputs if o):
            yield _fed(program, node)
        for source in node.inputs:
            if source and _alike(program, source, node.outputs[0]):
                yield _bypassed(program, node, source)
    for symbol in program.sizes[0]:
        yield _fixed(program, symbol)


def _held(program: Program) -> set[str]:
    """Values inside of what the float model has one node for, where another value would make both differ; and those
    that it begins with, because what made them says what a grid's clipping means."""
    makers = {o: n for n in program.nodes for o in n.outputs}
    held: set[str] = set()
    for name, node in program.floats.items():
        ends = {*node.inputs, *program.inputs, *program.constants, ""}
        held |= set(node.inputs)
        stack = list(makers[name].inputs)
        while stack:
            value = stack.pop()
            if value not in ends | held:
                held.add(value)
                stack += makers[value].inputs
    return held


def _can_be_fed(program: Program, name: str) -> bool:
    shape = program.values[name].shape
    return all(not n or n in program.sizes[0] for d in shape if isinstance(d, Length) for n, _ in d.terms)


def _alike(program: Program, a: str, b: str) -> bool:
    x, y = program.values[a], program.values[b]
    return (x.dtype, x.shape) == (y.dtype, y.shape) and a not in program.constants


def _fed(program: Program, node: Node) -> Program:
    """The results of `node` are inputs."""
    results = tuple(o for o in node.outputs if o)
    kept = tuple(n for n in program.nodes if n is not node)
    outputs = tuple(o for o in program.outputs if o not in results)
    return _clean(replace(program, nodes=kept, inputs=program.inputs + results, outputs=outputs))


def _bypassed(program: Program, node: Node, source: str) -> Program:
    """Whoever reads `node` reads `source` in its place."""
    name = node.outputs[0]

    def read(n: Node) -> Node:
        return replace(n, inputs=tuple(source if i == name else i for i in n.inputs))

    nodes = tuple(read(n) for n in program.nodes if n is not node)
    floats = {k: read(n) for k, n in program.floats.items() if k != name}
    return _clean(replace(program, nodes=nodes, floats=floats, outputs=tuple(o for o in program.outputs if o != name)))


def _fixed(program: Program, symbol: str) -> Program:
    """The symbol is a number, that of the first run."""
    number = program.sizes[0][symbol]

    def fixed(dim: Dim) -> Dim:
        if isinstance(dim, int):
            return dim
        terms = dict(dim.terms)
        terms[""] = terms.get("", 0) + terms.pop(symbol, 0) * number
        left = Length(tuple(sorted((n, t) for n, t in terms.items() if t)))
        return left.at({}) if not any(n for n, _ in left.terms) else left

    sizes = tuple({n: s for n, s in run.items() if n != symbol} for run in program.sizes)
    values = {n: replace(v, shape=tuple(map(fixed, v.shape))) for n, v in program.values.items()}
    return _clean(replace(program, sizes=sizes, values=values))


def _clean(program: Program) -> Program:
    """Without what nothing needs, inputs too. Where no output is left, all that nothing reads is one."""
    if not program.outputs:
        read = {i for n in program.nodes for i in n.inputs}
        ends = tuple(o for n in program.nodes for o in n.outputs if o and o not in read)
        program = replace(program, outputs=ends)
    program = pruned(program)
    read = {i for n in (*program.nodes, *program.floats.values()) for i in n.inputs}
    inputs = tuple(i for i in program.inputs if i in read)
    values = {n: v for n, v in program.values.items() if n not in program.inputs or n in inputs}
    used = {n for v in values.values() for d in v.shape if isinstance(d, Length) for n, _ in d.terms}
    sizes = tuple({n: s for n, s in run.items() if n in used} for run in program.sizes)
    return replace(program, inputs=inputs, values=values, sizes=sizes)
