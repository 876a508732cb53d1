"""com.microsoft's operators with a recurrent state instead of a cache: linear attention and causal convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmc.graph import Dim
from llmc.ops.context import Context, Rule
from llmc.ops.scalar import exp, sigmoid, softplus
from llmc.ops.tensor import (
    cast,
    compute,
    elementwise,
    full,
    loops,
    permute,
    product,
    reshape,
    shape_of,
    simplify,
    take_slice,
)
from llmc.tvm_shim import Expr, T, relax, te, tirx

_RULES = ("linear", "gated", "delta", "gated_delta")


def _text(ctx: Context, name: str, default: str) -> str:
    value = ctx.attr(name, default)
    return value.decode() if isinstance(value, bytes) else str(value)


# -- linear attention -------------------------------------------------------------------------------------------
def _linear_attention(ctx: Context) -> tuple[Expr, Expr]:
    """query [B, T, Hq*dk], key [B, T, Hkv*dk], value [B, T, Hkv*dv], past state [B, Hkv, dk, dv], decay in log space
    [B, T, Hkv] or [B, T, Hkv*dk], beta [B, T, Hkv or 1] -> (output [B, T, max(Hq, Hkv)*dv], state)."""
    rule = _text(ctx, "update_rule", "gated_delta")
    if rule not in _RULES:
        ctx.fail(f"the update rule {rule}")
    if ctx.attr("state_window", 0):
        ctx.fail("a window of states (state_window)")
    heads, kv_heads = int(ctx.attr("q_num_heads")), int(ctx.attr("kv_num_heads"))
    b, t, width = ctx.shape(0)
    dk, dv = int(width) // heads, int(ctx.shape(2)[2]) // kv_heads
    q = reshape(ctx, _float(ctx, 0), [b, t, heads, dk])
    k = reshape(ctx, _float(ctx, 1), [b, t, kv_heads, dk])
    v = reshape(ctx, _float(ctx, 2), [b, t, kv_heads, dv])
    state = _float(ctx, 3) if ctx.has(3) else full(ctx, [b, kv_heads, dk, dv], 0.0, "float32")
    decay = beta = None
    if "gated" in rule:
        decay = reshape(ctx, _float(ctx, 4), [b, t, kv_heads, int(ctx.shape(4)[2]) // kv_heads])
    if "delta" in rule:
        beta = _float(ctx, 5)
    scale = float(ctx.attr("scale", 0.0)) or dk**-0.5
    out, last = _recur(ctx, [q, k, v, state], decay, beta, scale)
    dtype = ctx.dtype()
    result = reshape(ctx, cast(ctx, out, dtype), [b, t, max(heads, kv_heads) * dv])
    return result, cast(ctx, last, ctx.dtype(3) if ctx.has(3) else dtype)


def _float(ctx: Context, i: int) -> Expr:
    return cast(ctx, ctx.x(i), "float32")


def _recur(ctx: Context, tensors: list[Expr], decay: Expr | None, beta: Expr | None, scale: float) -> tuple[Expr, Expr]:
    """S = exp(decay) S + k (beta (v - S^T k))^T, out = scale S^T q, one token after another. A head's S [dk, dv] stays
    in the second output while its tokens pass. Queries, keys and values may have fewer heads than the others: several
    heads then share one."""
    b, t, heads, dk = shape_of(tensors[0])
    kv_heads, dv = (int(d) for d in shape_of(tensors[2])[2:])
    per_key = decay is not None and shape_of(decay)[3] != 1
    shared = beta is not None and shape_of(beta)[2] == 1
    outputs = max(int(heads), kv_heads)
    readers, owners = outputs // kv_heads, outputs // int(heads)
    sharers = kv_heads // int(shape_of(tensors[1])[2])

    def nest(q: Any, k: Any, v: Any, past: Any, *rest: Any) -> None:
        given = list(rest)
        gate = given.pop(0) if decay is not None else None
        rate = given.pop(0) if beta is not None else None
        out, state, delta, batch, tokens = given
        zero = T.int64(0)
        with T.parallel(0, batch * kv_heads) as task:
            n, h = T.bind(tirx.floordiv(task, kv_heads)), T.bind(tirx.floormod(task, kv_heads))
            own = T.bind(tirx.floordiv(h, sharers))
            with T.serial(0, dk) as i, T.serial(0, dv) as j:
                state[n, h, i, j] = past[n, h, i, j]
            with T.serial(0, tokens) as s:
                with T.serial(0, dv) as j:
                    delta[n, h, j] = T.float32(0)
                with T.serial(0, dk) as i:
                    kept = T.bind(exp(gate[n, s, h, i if per_key else zero])) if gate is not None else None
                    with T.serial(0, dv) as j:
                        if kept is not None:
                            state[n, h, i, j] = state[n, h, i, j] * kept
                        if rate is not None:
                            delta[n, h, j] = delta[n, h, j] + state[n, h, i, j] * k[n, s, own, i]
                with T.serial(0, dv) as j:
                    change = v[n, s, h, j] - delta[n, h, j]
                    delta[n, h, j] = change * rate[n, s, zero if shared else h] if rate is not None else change
                with T.serial(0, dk) as i, T.serial(0, dv) as j:
                    state[n, h, i, j] = state[n, h, i, j] + k[n, s, own, i] * delta[n, h, j]
                for reader in range(readers):
                    o = h * readers + reader
                    with T.serial(0, dv) as j:
                        out[n, s, o, j] = T.float32(0)
                    with T.serial(0, dk) as i:
                        weight = T.bind(q[n, s, tirx.floordiv(o, owners), i] * T.float32(scale))
                        with T.serial(0, dv) as j:
                            out[n, s, o, j] = out[n, s, o, j] + weight * state[n, h, i, j]

    extra = [x for x in (decay, beta) if x is not None]
    shapes: list[tuple[Sequence[Dim], str]] = [
        ([b, t, outputs, dv], "float32"),
        ([b, kv_heads, dk, dv], "float32"),
        ([b, kv_heads, dv], "float32"),
    ]
    out, state, _ = loops(ctx, "linear_attention", nest, [*tensors, *extra], shapes, [b, t])
    return out, state


# -- the same with raw gates ------------------------------------------------------------------------------------
def _gated_delta_net(ctx: Context) -> tuple[Expr | None, ...]:
    """query, key [B, T, H, dk], value [B, T, Hv, dv], with batch and time also as one dimension, or all three side by
    side in the query; decay [..., Hv] or [..., Hv, dk], beta [..., Hv], state [B, Hv, dv, dk], a_log and dt_bias for
    decays that are raw -> (output like value, state)."""
    rule = _text(ctx, "update_rule", "gated_delta")
    if rule not in _RULES:
        ctx.fail(f"the update rule {rule}")
    if ctx.has(3) or ctx.attr("state_update_capacity", 0):
        ctx.fail("sequences of several lengths (cu_seqlens) and state updates (state_update_capacity)")
    q, k, v, state = _packed_or_apart(ctx)
    b, t, _, dk = shape_of(q)
    dv = int(shape_of(v)[3])
    heads = shape_of(v)[2]
    if ctx.attr("qk_l2_norm", 0):
        q, k = _unit(ctx, q), _unit(ctx, k)
    decay = beta = None
    if "gated" in rule:
        lead = ctx.rank() - (2 if ctx.has(1) else 1)
        width = ctx.shape(4)[-1] if ctx.rank(4) == lead + 2 else 1
        decay = _decay(ctx, reshape(ctx, _float(ctx, 4), [b, t, heads, width]))
    if "delta" in rule:
        beta = reshape(ctx, _float(ctx, 5), [b, t, heads])
        if _text(ctx, "beta_activation", "none") == "sigmoid":
            beta = elementwise(ctx, "beta", sigmoid, beta)
    if state is None:
        state = full(ctx, [b, heads, int(dk), dv], 0.0, "float32")
    out, last = _recur(ctx, [q, k, v, state], decay, beta, float(ctx.attr("scale", 0.0)) or int(dk) ** -0.5)
    shape = [*ctx.shape()[: -2 if ctx.has(1) else -1], *shape_of(out)[2:]]
    return cast(ctx, reshape(ctx, out, shape), ctx.dtype()), permute(ctx, last, [0, 1, 3, 2]), None


def _packed_or_apart(ctx: Context) -> tuple[Expr, Expr, Expr, Expr | None]:
    """query, key and value as float32 [B, T, heads, D], and the state as [B, Hv, dk, dv]."""
    state = permute(ctx, ctx.x(6), [0, 1, 3, 2]) if ctx.has(6) else None
    if ctx.has(1):
        apart = ctx.rank() == 4
        if not apart and state is None:
            ctx.fail("a batch whose size no state gives")
        b = ctx.shape()[0] if apart or state is None else shape_of(state)[0]
        t = ctx.shape()[1] if apart else simplify(ctx.shape()[0] // b)
        q, k, v = (reshape(ctx, _float(ctx, i), [b, t, *ctx.shape(i)[-2:]]) for i in range(3))
        return q, k, v, state
    if state is None:
        ctx.fail("packed queries, keys and values whose heads no state gives")
    b, heads, dk, dv = shape_of(state)
    width = int(ctx.shape()[-1])
    own = (width - int(heads) * int(dv)) // (2 * int(dk))
    t = simplify(product(ctx.shape()[:-1]) // b)
    x = reshape(ctx, _float(ctx, 0), [b, t, width])
    parts, start = [], 0
    for count, size in ((own, int(dk)), (own, int(dk)), (int(heads), int(dv))):
        parts.append(reshape(ctx, take_slice(ctx, x, 2, start, count * size), [b, t, count, size]))
        start += count * size
    return parts[0], parts[1], parts[2], state


def _unit(ctx: Context, x: Expr) -> Expr:
    """Vectors along the last axis, of length 1."""
    total = ctx.emit(relax.op.sum(ctx.emit(relax.op.multiply(x, x)), [3], True))
    return elementwise(ctx, "unit", lambda v, n: v / te.sqrt(n + te.const(1e-6, "float32")), x, total)


def _decay(ctx: Context, raw: Expr) -> Expr:
    """The decay in log space [B, T, Hv, 1 or dk] that `gate_activation` makes of a raw one."""
    kind = _text(ctx, "gate_activation", "none")
    if kind == "none":
        return raw
    heads = shape_of(raw)[2]
    rate = reshape(ctx, ctx.x(7), [heads, 1])
    bias = reshape(ctx, ctx.x(8), [heads, simplify(product(ctx.shape(8)) // heads)])
    low = te.const(float(ctx.attr("gate_lower_bound", -5.0)), "float32")
    gates = {
        "softplus": lambda x, a, d: te.const(0, "float32") - exp(a) * softplus(x + d),
        "sigmoid": lambda x, a, d: low * sigmoid(exp(a) * (x + d)),
    }
    gates |= {"qwen": gates["softplus"], "kda": gates["sigmoid"]}
    if kind not in gates:
        ctx.fail(f"the gate activation {kind}")
    return elementwise(ctx, "decay", gates[kind], raw, rate, bias)


# -- causal convolution -----------------------------------------------------------------------------------------
def _causal_conv(ctx: Context) -> tuple[Expr, Expr]:
    """Depthwise convolution that looks back only: x [B, C, L], weights [C, 1, K], bias [C], past state
    [B, C, (K - 1) * dilation] -> (y like x, the state after it). With channels_last, [B, L, channels...]."""
    if int(ctx.attr("ndim", 1)) != 1:
        ctx.fail("a causal convolution over more than one dimension")
    for name in ("state_window", "state_update_capacity", "input_channels", "state_length"):
        if ctx.attr(name, 0):
            ctx.fail(f"{name} is not supported")
    activation = _text(ctx, "activation", "none")
    if activation not in ("none", "silu", "swish"):
        ctx.fail(f"the activation {activation}")
    last = bool(ctx.attr("channels_last", 0))
    shape, channels = ctx.shape(), ctx.shape(1)[0]
    taps, dilation = int(ctx.shape(1)[2]), int(ctx.attr("dilation", 1))
    length, history = shape[1 if last else 2], (taps - 1) * dilation

    def first(x: Expr, size: Dim) -> Expr:
        """x, whose time has `size` steps, as [B, C, size]."""
        return permute(ctx, reshape(ctx, x, [shape[0], size, channels]), [0, 2, 1]) if last else x

    def back(x: Expr, size: Dim) -> Expr:
        return reshape(ctx, permute(ctx, x, [0, 2, 1]), [shape[0], size, *shape[2:]]) if last else x

    x = first(ctx.x(0), length)
    past = [first(ctx.x(3), history)] if ctx.has(3) else []
    bias = [ctx.x(2)] if ctx.has(2) else []
    dtype = ctx.dtype()

    def seen(x: Any, past: list[Any], b: Any, c: Any, place: Any) -> Any:
        """Step `place` of the sequence; those before 0 are in the state."""
        before = past[0](b, c, place + history) if past else te.const(0, dtype)
        return te.if_then_else(place >= 0, x(b, c, place), before)

    def convolve(x: Any, w: Any, past: list[Any], bias: list[Any], out: list[Any]) -> Any:
        def wide(value: Any) -> Any:
            return value.astype("float32") if dtype in ("float16", "bfloat16") else value

        def element(b: Any, c: Any, i: Any) -> Any:
            y = wide(bias[0](c) if bias else te.const(0, dtype))
            for tap in range(taps):
                y = y + wide(seen(x, past, b, c, i - (taps - 1 - tap) * dilation)) * wide(w(c, 0, tap))
            return (y if activation == "none" else y * sigmoid(y)).astype(dtype)

        return te.compute(out, element, name="causal_conv")

    def remember(x: Any, past: list[Any], out: list[Any], steps: Any) -> Any:
        return te.compute(out, lambda b, c, i: seen(x, past, b, c, steps + i - history), name="state")

    y = compute(ctx, "causal_conv", convolve, x, ctx.x(1), past, bias, list(shape_of(x)))
    state = compute(ctx, "state", remember, x, past, [shape[0], channels, history], length)
    return back(y, length), back(state, history)


# these two have become part of the standard
STANDARD: dict[str, Rule] = {"LinearAttention": _linear_attention, "CausalConvWithState": _causal_conv}
RULES: dict[str, Rule] = {**STANDARD, "GatedDeltaNet": _gated_delta_net}
