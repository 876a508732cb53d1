"""LSTM, GRU and RNN: the inputs of all steps are projected first, then one loop over time does the rest.

Weights are read where they are, each row of a matrix as one dot product: nothing is transposed or copied, which for a
model that hears one short piece of sound at a time would cost more than the steps themselves. The rows of a batch are
independent, and run in parallel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from llmc.graph import Dim
from llmc.ops.activations import ACTIVATIONS, Scalar
from llmc.ops.context import Context, Rule
from llmc.ops.delegate import standard
from llmc.ops.tensor import cast, compute, concat, full, loops, permute, reduce_rows, reshape, shape_of
from llmc.tvm_shim import Expr, T, te, tirx

LANES, UNROLL = 16, 8  # floats of a vector, and vectors of one step of a dot product


# -- a node -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Cell:
    """What distinguishes the three operators.

    `step(s)` writes the new hidden state (and cell) of one row of the batch; `scratch` is how many floats for each
    hidden unit it works in, `tensors` the inputs that a direction reads beyond R and the states.
    """

    gates: int
    activations: tuple[str, ...]
    scratch: int
    step: Callable[[Step], None]
    has_cell: bool = False


@dataclass(frozen=True)
class Step:
    """One step of one row of the batch, while its code is written. Buffers are flat views by several indices."""

    ctx: Context
    direction: int
    batch: Any
    hidden: int
    time: Any
    projected: Any  # [S, B, gates * H]: x W^T + Wb, and Rb where that is a plain sum
    weights: Any  # [D, gates * H, H]
    recurrent_bias: Any  # [D, 2 * gates * H], or None
    peepholes: Any  # [D, 3 * H], or None
    h: Any  # [B, H]
    c: Any
    work: Any  # [B, scratch * H]
    functions: tuple[Scalar, ...]

    def activate(self, which: int, x: Any) -> Any:
        """Function `which` of x, which must not leave the attribute clip's limits. x is bound: it is read often."""
        limit = float(self.ctx.attr("clip", 0.0))
        return self.functions[which](T.bind(T.max(T.min(x, T.float32(limit)), T.float32(-limit)) if limit else x))

    def dot(self, gate: int, j: Any, vector: Any, start: int = 0) -> Any:
        """Row j of a gate's matrix times vector[batch, start:start + hidden], as a scalar that is bound."""
        row, width = gate * self.hidden + j, self.hidden
        lanes = T.ramp(T.int64(0), 1, LANES)
        partial = T.alloc_buffer((LANES,), "float32")

        def term(k: Any) -> Any:
            at, place = T.ramp(k, 1, LANES), T.ramp(start + k, 1, LANES)
            return self.weights[self.direction, row, at] * vector[self.batch, place]

        whole = width // LANES
        blocks, rest = divmod(whole, UNROLL)
        T.buffer_store(partial, T.broadcast(T.float32(0), LANES), [lanes])
        if blocks:
            with T.serial(0, blocks) as k:
                terms = [term((k * UNROLL + n) * LANES) for n in range(UNROLL)]
                T.buffer_store(partial, partial[lanes] + _tree(terms), [lanes])
        if rest:
            terms = [term(T.int64((blocks * UNROLL + n) * LANES)) for n in range(rest)]
            T.buffer_store(partial, partial[lanes] + _tree(terms), [lanes])
        scalars = [partial[T.int64(n)] for n in range(LANES)] if whole else []
        for n in range(whole * LANES, width):
            k = T.int64(n)
            scalars.append(self.weights[self.direction, row, k] * vector[self.batch, start + k])
        return T.bind(_tree(scalars))

    def input(self, gate: int, j: Any) -> Any:
        return self.projected[self.time, self.batch, gate * self.hidden + j]

    def peep(self, which: int, j: Any, cell: Any) -> Any:
        """A peephole's part in a gate: its weight times the cell."""
        if self.peepholes is None:
            return T.float32(0)
        return self.peepholes[self.direction, which * self.hidden + j] * cell


def _tree(terms: Sequence[Any]) -> Any:
    """The sum of terms, by halves: no long chain of additions that wait for each other."""
    terms = list(terms)
    while len(terms) > 1:
        terms = [reduce(lambda a, b: a + b, terms[n : n + 2]) for n in range(0, len(terms), 2)]
    return terms[0]


# -- the three cells --------------------------------------------------------------------------------------------
def _rnn_step(s: Step) -> None:
    with T.serial(0, s.hidden) as j:
        s.work[s.batch, j] = s.input(0, j) + s.dot(0, j, s.h)
    with T.serial(0, s.hidden) as j:
        s.h[s.batch, j] = s.activate(0, s.work[s.batch, j])


def _lstm_step(s: Step) -> None:
    """Gates input, output, forget, cell; functions f of the gates, g of the cell's input, h of its output. As in
    onnxruntime, clip does not limit what enters h."""
    for gate in range(4):
        with T.serial(0, s.hidden) as j:
            s.work[s.batch, gate * s.hidden + j] = s.input(gate, j) + s.dot(gate, j, s.h)
    with T.serial(0, s.hidden) as j:
        i, o, f, g = (s.work[s.batch, gate * s.hidden + j] for gate in range(4))
        old = T.bind(s.c[s.batch, j])
        enter = T.bind(s.activate(0, i + s.peep(0, j, old)))
        coupled = bool(s.ctx.attr("input_forget", 0))
        keep = T.float32(1) - enter if coupled else s.activate(0, f + s.peep(2, j, old))
        new = T.bind(keep * old + enter * s.activate(1, g))
        s.c[s.batch, j] = new
        s.h[s.batch, j] = s.activate(0, o + s.peep(1, j, new)) * s.functions[2](new)


def _gru_step(s: Step) -> None:
    """Gates update, reset, hidden; functions f of the gates, g of the hidden state.

    The reset gate applies to the old state, or with linear_before_reset to the old state's product.
    """
    after = bool(s.ctx.attr("linear_before_reset", 0))
    update, candidate = 0, s.hidden  # places in `work`
    with T.serial(0, s.hidden) as j:
        s.work[s.batch, update + j] = s.activate(0, s.input(0, j) + s.dot(0, j, s.h))
    with T.serial(0, s.hidden) as j:
        reset = T.bind(s.activate(0, s.input(1, j) + s.dot(1, j, s.h)))
        if after:
            bias = T.float32(0)
            if s.recurrent_bias is not None:
                bias = s.recurrent_bias[s.direction, 5 * s.hidden + j]
            s.work[s.batch, candidate + j] = s.input(2, j) + reset * (s.dot(2, j, s.h) + bias)
        else:
            s.work[s.batch, candidate + j] = reset * s.h[s.batch, j]
    if not after:
        with T.serial(0, s.hidden) as j:
            s.work[s.batch, 2 * s.hidden + j] = s.input(2, j) + s.dot(2, j, s.work, candidate)
        candidate = 2 * s.hidden
    with T.serial(0, s.hidden) as j:
        z, old = T.bind(s.work[s.batch, update + j]), T.bind(s.h[s.batch, j])
        new = s.activate(1, s.work[s.batch, candidate + j])
        s.h[s.batch, j] = (T.float32(1) - z) * new + z * old


RNN = Cell(1, ("tanh",), 1, _rnn_step)
LSTM = Cell(4, ("sigmoid", "tanh", "tanh"), 4, _lstm_step, has_cell=True)
GRU = Cell(3, ("sigmoid", "tanh"), 3, _gru_step)


# -- a direction ------------------------------------------------------------------------------------------------
def _project(ctx: Context, x: Expr, cell: Cell, direction: int) -> Expr:
    """x [S, B, I] times W[direction]^T, plus the biases that simply add: [S, B, gates * H]."""
    steps, batch, width = shape_of(x)
    rows = int(ctx.shape(1)[1])
    ctx.unify(width, ctx.shape(1)[2])
    plain = rows  # rows whose recurrent bias adds as well
    if ctx.node.op == "GRU" and ctx.attr("linear_before_reset", 0):
        plain = rows // 3 * 2
    bias = [ctx.x(3)] if ctx.has(3) else []

    def body(x: Any, w: Any, bias: list[Any], out: list[Any], width: Any) -> Any:
        y = reduce_rows(te.sum, out, lambda t, b, n, k: x(t, b, k) * w(direction, n, k), width, "project")
        if not bias:
            return y

        def biased(t: Any, b: Any, n: Any) -> Any:
            second = bias[0](direction, rows + n)
            if plain != rows:
                second = tirx.Select(n < plain, second, te.const(0, "float32"))
            return y(t, b, n) + bias[0](direction, n) + second

        return te.compute(out, biased, name="bias")

    return compute(ctx, "project", body, x, ctx.x(1), bias, [steps, batch, rows], width)


def _functions(ctx: Context, cell: Cell, directions: int) -> list[tuple[Scalar, ...]]:
    """The activations of each direction; alphas and betas go to those, in order, that have such parameters."""
    names = [n.decode() if isinstance(n, bytes) else n for n in ctx.attr("activations") or ()]
    names = [n.lower() for n in names] or list(cell.activations) * directions
    if len(names) != len(cell.activations) * directions:
        ctx.fail(f"{len(names)} activations where {len(cell.activations) * directions} are needed")
    given = [list(ctx.attr(f"activation_{p}") or ()) for p in ("alpha", "beta")]
    made = []
    for name in names:
        if name not in ACTIVATIONS:
            ctx.fail(f"the activation {name}")
        values = []
        for default, rest in zip(ACTIVATIONS[name].defaults, given, strict=False):
            values.append(float(rest.pop(0)) if rest else default)
        made.append(ACTIVATIONS[name](*values))
    each = len(cell.activations)
    return [tuple(made[d * each : (d + 1) * each]) for d in range(directions)]


def _run(
    ctx: Context,
    cell: Cell,
    x: Expr,
    states: list[Expr],
    direction: int,
    backwards: bool,
    functions: tuple[Scalar, ...],
) -> list[Expr]:
    """One direction of x [S, B, I]: its outputs [S, B, H], and the last of each state, [B, H].

    Row b runs through its first sequence_lens[b] steps, backwards from the last of these; the outputs behind are zeros.
    """
    steps, batch, _ = shape_of(x)
    hidden = int(ctx.shape(2)[2])
    optional = {"lens": 4, "bias": 3, "peepholes": 7}
    found = {k: ctx.x(i) for k, i in optional.items() if ctx.has(i) and (k != "peepholes" or cell.has_cell)}

    def nest(projected: Any, weights: Any, *rest: Any) -> None:
        given = list(rest)
        extra = {name: given.pop(0) for name in found}
        starts = [given.pop(0) for _ in states]
        outputs, *last = (given.pop(0) for _ in range(1 + len(states)))
        work, count, rows = given
        lens = extra.get("lens")
        with T.parallel(0, rows) as b:
            for start, state in zip(starts, last, strict=True):
                with T.serial(0, hidden) as j:
                    state[b, j] = start[direction, b, j]
            size = T.bind(T.max(T.min(T.cast(lens[b], "int64"), count), T.int64(0)) if lens is not None else count)
            with T.serial(0, size) as n:
                time = T.bind(size - 1 - n) if backwards else n
                step = Step(
                    ctx,
                    direction,
                    b,
                    hidden,
                    time,
                    projected,
                    weights,
                    extra.get("bias"),
                    extra.get("peepholes"),
                    last[0],
                    last[1] if cell.has_cell else None,
                    work,
                    functions,
                )
                cell.step(step)
                with T.serial(0, hidden) as j:
                    outputs[time, b, j] = last[0][b, j]
            if lens is not None:
                with T.serial(0, count - size) as n, T.serial(0, hidden) as j:
                    outputs[size + n, b, j] = T.float32(0)

    shapes: list[tuple[Sequence[Dim], str]] = [([steps, batch, hidden], "float32")]
    shapes += [([batch, hidden], "float32") for _ in states]
    shapes += [([batch, cell.scratch * hidden], "float32")]
    inputs = [_project(ctx, x, cell, direction), ctx.x(2), *found.values(), *states]
    return loops(ctx, ctx.node.op.lower(), nest, inputs, shapes, [steps, batch])[:-1]


def _in_float32(ctx: Context) -> tuple[Expr | None, ...]:
    """The same node with wider inputs: sums over many steps need them."""
    wide = [None if not ctx.has(i) else ctx.x(i) if i == 4 else cast(ctx, ctx.x(i), "float32") for i in range(len(ctx))]
    made = standard(ctx, ctx.node.op, wide, outputs=len(ctx.node.outputs), opset=ctx.node.version, **ctx.node.attrs)
    return tuple(cast(ctx, y, ctx.dtype()) for y in made)


def _rule(cell: Cell) -> Rule:
    """(Y [S, D, B, H], Y_h [D, B, H], Y_c for an LSTM); with layout 1, [B, S, D, H] and [B, D, H]."""

    def rule(ctx: Context) -> tuple[Expr | None, ...]:
        if ctx.dtype() in ("float16", "bfloat16"):
            return _in_float32(ctx)
        if ctx.dtype() != "float32":
            ctx.fail(f"a recurrent operator on {ctx.dtype()}")
        by_batch = bool(ctx.attr("layout", 0))
        x = permute(ctx, ctx.x(), [1, 0, 2]) if by_batch else ctx.x()
        way = ctx.attr("direction", "forward")
        way = way.decode() if isinstance(way, bytes) else way
        ways = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}.get(way)
        if ways is None:
            ctx.fail(f"the direction {way}")
        _, batch, _ = shape_of(x)
        hidden = int(ctx.shape(2)[2])
        states = []
        for i in (5, 6) if cell.has_cell else (5,):
            if ctx.has(i):
                state = permute(ctx, ctx.x(i), [1, 0, 2]) if by_batch else ctx.x(i)
                ctx.unify(shape_of(state)[1], batch)
            else:
                state = full(ctx, [len(ways), batch, hidden], 0.0, "float32")
            states.append(state)
        if ctx.has(4):
            ctx.unify(ctx.shape(4)[0], batch)
        functions = _functions(ctx, cell, len(ways))
        runs = [_run(ctx, cell, x, states, d, back, functions[d]) for d, back in enumerate(ways)]
        joined = []
        for parts in zip(*runs, strict=True):
            axis = 0 if len(shape_of(parts[0])) == 2 else 1
            wide = [reshape(ctx, p, [*shape_of(p)[:axis], 1, *shape_of(p)[axis:]]) for p in parts]
            joined.append(concat(ctx, wide, axis))
        if by_batch:
            joined = [permute(ctx, joined[0], [2, 0, 1, 3]), *(permute(ctx, s, [1, 0, 2]) for s in joined[1:])]
        return tuple(joined)

    return rule


RULES: dict[str, Rule] = {"RNN": _rule(RNN), "GRU": _rule(GRU), "LSTM": _rule(LSTM)}
