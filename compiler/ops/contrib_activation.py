"""com.microsoft's activations, alone and fused with what stands around them."""

from __future__ import annotations

from llmc.ops.context import Context, Rule
from llmc.ops.matmul import add_bias
from llmc.ops.scalar import gelu, gelu_tanh, sigmoid, softplus
from llmc.ops.tensor import cast, elementwise, simplify, take_slice
from llmc.tvm_shim import Expr, relax, te

op = relax.op


def _biased(ctx: Context) -> Expr:
    return add_bias(ctx, ctx.x(), 1)


def _quick_gelu(ctx: Context) -> Expr:
    alpha = te.const(float(ctx.attr("alpha", 1.702)), ctx.dtype())
    return elementwise(ctx, "quick_gelu", lambda x: x * sigmoid(alpha * x), ctx.x())


def _bias_split_gelu(ctx: Context) -> Expr:
    """The first half of x + bias times the GELU of the second."""
    x, axis = _biased(ctx), ctx.rank() - 1
    half = simplify(ctx.shape()[-1] // 2)
    left, right = (take_slice(ctx, x, axis, start, half) for start in (0, half))
    return elementwise(ctx, "split_gelu", lambda a, b: a * gelu(b), left, right)


def _scaled_silu(ctx: Context) -> Expr:
    """z * sigmoid(z) of z = scale * x, each step rounded to x's type."""
    dtype = ctx.dtype()
    scale = ctx.x(1) if ctx.has(1) else ctx.literal(float(ctx.attr("alpha", 1.0)), "float32")

    def silu(x: Expr, s: Expr) -> Expr:
        z = (x.astype("float32") * s.astype("float32")).astype(dtype)
        return z * sigmoid(z.astype("float32")).astype(dtype)

    return elementwise(ctx, "scaled_silu", silu, ctx.x(), scale)


def _gated_add(ctx: Context) -> Expr:
    """x + y * gate, gate [..., 1]."""
    if ctx.has(3):
        ctx.fail("a projected gate (gate_weight)")
    return op.add(ctx.x(0), ctx.emit(op.multiply(ctx.x(1), ctx.x(2))))


def _linear_attention_gate(ctx: Context) -> tuple[Expr | None, ...]:
    """(decay_scale * softplus(a + dt_bias), sigmoid(b)), computed in float32."""
    dtype = ctx.dtype()
    a = cast(ctx, ctx.x(0), "float32")
    decay = elementwise(ctx, "decay", lambda a, bias, s: s * softplus(a + bias), a, ctx.x(1), ctx.x(2))
    beta = elementwise(ctx, "beta", sigmoid, cast(ctx, ctx.x(3), "float32")) if ctx.has(3) else None
    return cast(ctx, decay, dtype), cast(ctx, beta, dtype) if beta is not None else None


RULES: dict[str, Rule] = {
    "Gelu": lambda ctx: elementwise(ctx, "gelu", gelu, ctx.x()),
    "BiasGelu": lambda ctx: elementwise(ctx, "gelu", gelu, _biased(ctx)),
    "FastGelu": lambda ctx: elementwise(ctx, "gelu_tanh", gelu_tanh, _biased(ctx)),
    "QuickGelu": _quick_gelu,
    "BiasSplitGelu": _bias_split_gelu,
    "BiasAdd": lambda ctx: op.add(_biased(ctx), ctx.x(2)),
    "ScaledSiLU": _scaled_silu,
    "GatedAdd": _gated_add,
    "LinearAttentionGate": _linear_attention_gate,
}
