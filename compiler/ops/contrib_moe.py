"""Mixtures of experts: MoE, and QMoE with low-bit weights.

Each token is multiplied by the weights of the experts that its router chose, read in place: no expert's weights are
gathered, widened or multiplied by tokens that did not choose it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.ops.context import Context, Rule
from llmc.ops.contrib_gemm import unpack
from llmc.ops.delegate import standard
from llmc.ops.scalar import const, gelu_tanh, sigmoid
from llmc.ops.tensor import cast, compute, elementwise, index_of, product, reduce_rows, reshape, shape_of
from llmc.tvm_shim import Expr, relax, te

op = relax.op


# -- the weights of one layer of all experts --------------------------------------------------------------------
@dataclass(frozen=True)
class Experts:
    """`value(tensors, e, n, k)` is the weight of expert e from input k to output n, of its TE `tensors`."""

    tensors: list[Expr]
    value: Callable[[list[Any], Any, Any, Any], Any]
    outputs: int
    bias: Expr | None


def _plain(ctx: Context, weight: int, bias: int) -> Experts:
    """weight [E, N, K], bias [E, N]."""
    w = cast(ctx, ctx.x(weight), "float32")
    b = cast(ctx, ctx.x(bias), "float32") if ctx.has(bias) else None
    return Experts([w], lambda t, e, n, k: t[0](e, n, k), int(ctx.shape(weight)[1]), b)


def _quantised(ctx: Context, weight: int, scale: int, bias: int, zero: int, bits_name: str) -> Experts:
    """uint8 codes [E, N, K * bits / 8], low bits first; scales [E, N] or [E, N, K / block]; zero points are packed
    along their last axis in the same way, and 2**(bits - 1) where there are none."""
    bits = int(ctx.attr(bits_name, 0)) or int(ctx.attr("expert_weight_bits", 4))
    if bits not in (2, 4, 8):
        ctx.fail(f"{bits}-bit experts are not supported")
    block = int(ctx.attr("block_size", 0)) if ctx.rank(scale) == 3 else 0
    scales = cast(ctx, ctx.x(scale), "float32")
    b = cast(ctx, ctx.x(bias), "float32") if ctx.has(bias) else None

    def code(t: Any, *i: Any) -> Any:
        return unpack(t, bits, *i).astype("float32")

    def value(t: list[Any], e: Any, n: Any, k: Any) -> Any:
        group = (e, n, te.floordiv(k, block)) if block else (e, n)
        centre = code(t[2], *group) if len(t) > 2 else te.const(1 << (bits - 1), "float32")
        return (code(t[0], e, n, k) - centre) * t[1](*group)

    zeros = [ctx.x(zero)] if ctx.has(zero) else []
    return Experts([ctx.x(weight), scales, *zeros], value, int(ctx.shape(weight)[1]), b)


# -- routing ----------------------------------------------------------------------------------------------------
def _route(ctx: Context, normalised: bool, weights: Expr | None) -> tuple[Expr, Expr]:
    """(experts int64, shares float32), both [T, k]: the best of each token's row of router logits, and the softmax of
    these logits; or of all of them, unless `normalised`. `weights` [T, E] replace the softmax."""
    k = int(ctx.attr("k", 1))
    logits = cast(ctx, ctx.x(1), "float32")
    top, chosen = standard(ctx, "TopK", [logits, ctx.literal(np.array([k]), "int64")], outputs=2, axis=-1)
    if weights is not None:
        (shares,) = standard(ctx, "GatherElements", [cast(ctx, weights, "float32"), chosen], axis=1)
        if normalised:
            total = ctx.emit(op.sum(shares, [1], True))
            shares = ctx.emit(op.divide(shares, total))
        return chosen, shares
    if normalised:
        return chosen, ctx.emit(op.nn.softmax(top, 1))
    (shares,) = standard(ctx, "GatherElements", [ctx.emit(op.nn.softmax(logits, 1)), chosen], axis=1)
    return chosen, shares


# -- products ---------------------------------------------------------------------------------------------------
def _multiply(ctx: Context, x: Expr, chosen: Expr, experts: Experts) -> Expr:
    """x [T, K], or [T, k, K], times the weights of the chosen experts [T, k] -> [T, k, N]."""
    tokens, k = shape_of(chosen)
    own = len(shape_of(x)) == 3
    count = int(shape_of(experts.tensors[0])[0])
    biases = [experts.bias] if experts.bias is not None else []

    def body(x: Any, chosen: Any, tensors: list[Any], biases: list[Any], rows: list[Any], width: Any) -> Any:
        def expert(t: Any, j: Any) -> Any:
            return index_of(chosen(t, j), te.const(count, "int64"))

        def term(t: Any, j: Any, n: Any, r: Any) -> Any:
            return (x(t, j, r) if own else x(t, r)) * experts.value(tensors, expert(t, j), n, r)

        y = reduce_rows(te.sum, rows, term, width, "expert")
        if not biases:
            return y
        return te.compute(rows, lambda t, j, n: y(t, j, n) + biases[0](expert(t, j), n), name="bias")

    rows = [tokens, k, experts.outputs]
    return compute(ctx, "experts", body, x, chosen, experts.tensors, biases, rows, shape_of(x)[-1])


def _swiglu(ctx: Context, gate: Expr, up: Expr) -> Expr:
    """clamped gate * sigmoid(alpha * gate) * (clamped up + beta)."""
    alpha, beta = float(ctx.attr("activation_alpha", 1.0)), float(ctx.attr("activation_beta", 0.0))
    limit = float(ctx.attr("swiglu_limit", math.inf))

    def f(g: Any, u: Any) -> Any:
        if math.isfinite(limit):
            g = te.min(g, const(g, limit))
            u = te.max(te.min(u, const(u, limit)), const(u, -limit))
        return g * sigmoid(const(g, alpha) * g) * (u + const(u, beta))

    return elementwise(ctx, "swiglu", f, gate, up)


def _halves(ctx: Context, y: Expr, interleaved: bool) -> tuple[Expr, Expr]:
    """Gate and up of [T, k, 2 * I]: alternating, or one behind the other."""
    tokens, k, width = shape_of(y)
    half = int(width) // 2

    def part(which: int) -> Expr:
        def body(y: Any, out: list[Any]) -> Any:
            step, first = (2, which) if interleaved else (1, which * half)
            return te.compute(out, lambda t, j, i: y(t, j, step * i + first), name="half")

        return compute(ctx, "half", body, y, [tokens, k, half])

    return part(0), part(1)


_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": lambda x: te.max(x, const(x, 0)),
    "gelu": gelu_tanh,
    "silu": lambda x: x * sigmoid(x),
    "identity": lambda x: x,
}


def _hidden(ctx: Context, y: Expr, up: Expr | None) -> Expr:
    """What stands between the two layers of an expert: `up` is the product with FC3, where there is one."""
    name = ctx.attr("activation_type", "relu")
    name = name.decode() if isinstance(name, bytes) else name
    fusion = int(ctx.attr("swiglu_fusion", 0))
    if name == "swiglu":
        if up is None and not fusion:
            ctx.fail("swiglu without FC3 and without swiglu_fusion")
        if ctx.attr("swiglu_limit_after_activation", 0):
            ctx.fail("swiglu_limit_after_activation")
        gate, up = (y, up) if up is not None else _halves(ctx, y, fusion == 1)
        return _swiglu(ctx, gate, up)
    if name not in _ACTIVATIONS:
        ctx.fail(f"the activation {name}")
    y = elementwise(ctx, name, _ACTIVATIONS[name], y)
    return y if up is None else ctx.emit(op.multiply(y, up))


def _mixture(ctx: Context, first: Experts, second: Experts, third: Experts | None, route: tuple[Expr, Expr]) -> Expr:
    """The experts' answers, weighted: x [T, K] or [B, S, K], in x's shape."""
    if ctx.attr("use_sparse_mixer", 0):
        ctx.fail("the sparse mixer's routing")
    chosen, shares = route
    shape = ctx.shape()
    x = cast(ctx, reshape(ctx, ctx.x(), [product(shape[:-1]), shape[-1]]), "float32")
    up = _multiply(ctx, x, chosen, third) if third is not None else None
    answers = _multiply(ctx, _hidden(ctx, _multiply(ctx, x, chosen, first), up), chosen, second)
    tokens, k, width = shape_of(answers)

    def mix(y: Any, s: Any, out: list[Any]) -> Any:
        r = te.reduce_axis((0, k), "r")
        return te.compute(out, lambda t, n: te.sum(y(t, r, n) * s(t, r), axis=r), name="mix")

    mixed = compute(ctx, "mix", mix, answers, shares, [tokens, width])
    return cast(ctx, reshape(ctx, mixed, shape), ctx.dtype())


def _moe(ctx: Context) -> Expr:
    """x, router logits [T, E], then weight and bias of FC1, FC2 and FC3."""
    first, second = _plain(ctx, 2, 3), _plain(ctx, 4, 5)
    third = _plain(ctx, 6, 7) if ctx.has(6) else None
    return _mixture(ctx, first, second, third, _route(ctx, bool(ctx.attr("normalize_routing_weights", 0)), None))


def _q_moe(ctx: Context) -> Expr:
    """x, router logits [T, E], then weight, scale and bias of FC1, FC2 and FC3, their zero points, router weights.

    As in onnxruntime's CPU kernel, shares that come from the logits always add up to 1.
    """
    kind = ctx.attr("quant_type", "int")
    kind = kind.decode() if isinstance(kind, bytes) else kind
    if kind != "int":
        ctx.fail(f"experts of the type {kind}")
    first = _quantised(ctx, 2, 3, 4, 11, "fc1_expert_weight_bits")
    second = _quantised(ctx, 5, 6, 7, 12, "fc2_expert_weight_bits")
    third = _quantised(ctx, 8, 9, 10, 13, "fc3_expert_weight_bits") if ctx.has(8) else None
    weights = ctx.x(14) if ctx.has(14) else None
    normalised = weights is None or bool(ctx.attr("normalize_routing_weights", 0))
    return _mixture(ctx, first, second, third, _route(ctx, normalised, weights))


RULES: dict[str, Rule] = {"MoE": _moe, "QMoE": _q_moe}
