"""com.microsoft's operators on quantised tensors: elementwise, pooling, joining, and rows of quantised tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmc.ops import quant
from llmc.ops.context import Context, Rule
from llmc.ops.contrib_gemm import unpack
from llmc.ops.delegate import standard
from llmc.ops.scalar import select, sigmoid
from llmc.ops.tensor import (
    cast,
    compute,
    concat,
    elementwise,
    index_of,
    permute,
    product,
    reshape,
    shape_of,
    simplify,
)
from llmc.tvm_shim import Expr, relax, te, tirx

op = relax.op


# -- values and codes -------------------------------------------------------------------------------------------
def _real(ctx: Context, i: int) -> Expr:
    """float32 values of the quantised input `i`, whose scale and zero point follow it."""
    zero = ctx.x(i + 2) if ctx.has(i + 2) else None
    return quant.dequantize(ctx, ctx.x(i), ctx.x(i + 1), zero, "float32")


def _code(ctx: Context, y: Expr, at: int, dtype: str) -> Expr:
    """y quantised by the scale and zero point at inputs `at` and `at` + 1."""
    return quant.quantize(ctx, y, ctx.x(at), ctx.x(at + 1) if ctx.has(at + 1) else None, dtype)


def _qlinear(name: str, f: Callable[..., Any], operands: int) -> Rule:
    """An elementwise operator on quantised tensors: (value, scale, zero) for each operand, then the output's pair."""

    def rule(ctx: Context) -> Expr:
        values = [_real(ctx, i) for i in range(0, 3 * operands, 3)]
        y = elementwise(ctx, name, lambda *x: f(ctx, *x), *values)
        return _code(ctx, y, 3 * operands, ctx.dtype())

    return rule


def _leaky(ctx: Context, x: Any) -> Any:
    return select(x < te.const(0.0, "float32"), te.const(float(ctx.attr("alpha", 0.01)), "float32") * x, x)


def _q_where(ctx: Context) -> Expr:
    """condition, x, its scale and zero point, y, its, and the output's."""
    y = elementwise(ctx, "where", select, ctx.x(0), _real(ctx, 1), _real(ctx, 4))
    return _code(ctx, y, 7, ctx.dtype(1))


def _q_concat(ctx: Context) -> Expr:
    """The output's scale and zero point, then (value, scale, zero) for each operand."""
    values = [_real(ctx, i) for i in range(2, len(ctx), 3)]
    joined = concat(ctx, values, ctx.axis(int(ctx.attr("axis")), ctx.rank(2)))
    return _code(ctx, joined, 0, ctx.dtype(1))


def _q_softmax(ctx: Context) -> Expr:
    """Along `axis` in the sense of Softmax of the version `opset`."""
    opset = int(ctx.attr("opset"))
    axis = int(ctx.attr("axis", -1 if opset >= 13 else 1))
    (y,) = standard(ctx, "Softmax", [_real(ctx, 0)], opset=opset, axis=axis)
    return _code(ctx, y, 3, ctx.dtype())


# -- images -----------------------------------------------------------------------------------------------------
def _channels(ctx: Context, x: Expr, last: bool) -> Expr:
    """[N, ..., C] as [N, C, ...], or back where not `last`."""
    rank = len(shape_of(x))
    return permute(ctx, x, [0, rank - 1, *range(1, rank - 1)] if last else [0, *range(2, rank), 1])


def _in_channels_first(ctx: Context, x: Expr, last: bool, rule: Callable[[Expr], Expr]) -> Expr:
    """`rule` of x, which takes and gives [N, C, ...]; x and the result have their channels last where `last`."""
    return _channels(ctx, rule(_channels(ctx, x, True)), False) if last else rule(x)


def _attributes(ctx: Context) -> dict[str, Any]:
    return {k: v for k, v in ctx.node.attrs.items() if k != "channels_last"}


def _q_average_pool(ctx: Context) -> Expr:
    def pool(x: Expr) -> Expr:
        return standard(ctx, "AveragePool", [x], **_attributes(ctx))[0]

    y = _in_channels_first(ctx, _real(ctx, 0), bool(ctx.attr("channels_last", 0)), pool)
    return _code(ctx, y, 3, ctx.dtype())


def _q_global_average_pool(ctx: Context) -> Expr:
    """Integers are summed exactly and scaled once."""

    def pool(x: Expr) -> Expr:
        zero = cast(ctx, reshape(ctx, ctx.x(2), ()), "int32")
        centred = ctx.emit(op.subtract(cast(ctx, x, "int32"), zero))
        axes = list(range(2, ctx.rank()))
        total = ctx.emit(op.sum(centred, axes, True))
        count = product(shape_of(x)[a] for a in axes)
        if not isinstance(count, int):
            ctx.fail("a symbolic number of elements to average")
        one, out = (reshape(ctx, ctx.x(i), ()) for i in (1, 3))
        factor = elementwise(ctx, "factor", lambda a, y: a / (y * te.const(count, "float32")), one, out)
        return quant.requantize(ctx, total, factor, reshape(ctx, ctx.x(4), ()), ctx.dtype())

    return _in_channels_first(ctx, ctx.x(), bool(ctx.attr("channels_last", 0)), pool)


def _q_conv(ctx: Context) -> Expr:
    """QLinearConv, also of images whose channels come last; weights are [M, C / groups, kernel...] either way."""

    def conv(x: Expr) -> Expr:
        rest = [ctx.x(i) if ctx.has(i) else None for i in range(1, len(ctx))]
        return standard(ctx, "QLinearConv", [x, *rest], **_attributes(ctx))[0]

    return _in_channels_first(ctx, ctx.x(), bool(ctx.attr("channels_last", 0)), conv)


def _nhwc_max_pool(ctx: Context) -> Expr:
    return _in_channels_first(ctx, ctx.x(), True, lambda x: standard(ctx, "MaxPool", [x], **_attributes(ctx))[0])


# -- recurrent ---------------------------------------------------------------------------------------------------
def _dynamic_quantize_lstm(ctx: Context) -> tuple[Expr | None, ...]:
    """LSTM with 8-bit weights W [D, I, 4 * H] and R [D, H, 4 * H]; their scales and zero points, [D] or [D, 4 * H],
    are inputs 8 to 11. What is multiplied with them stays float32: onnxruntime rounds that to 8 bits, too."""

    def weights(i: int, scale: int) -> Expr:
        d, rows, columns = ctx.shape(i)

        def body(q: Any, s: Any, z: Any, out: list[Any]) -> Any:
            def element(d: Any, n: Any, k: Any) -> Any:
                place = (d, n) if len(s.shape) == 2 else (d,)
                return (q(d, k, n).astype("int32") - z(*place).astype("int32")).astype("float32") * s(*place)

            return te.compute(out, element, name="dequantize")

        return compute(ctx, "dequantize", body, ctx.x(i), ctx.x(scale), ctx.x(scale + 1), [d, columns, rows])

    rest = [ctx.x(i) if ctx.has(i) else None for i in range(3, 8)]
    inputs = [ctx.x(0), weights(1, 8), weights(2, 10), *rest]
    return tuple(standard(ctx, "LSTM", inputs, outputs=3, **ctx.node.attrs))


# -- tables -----------------------------------------------------------------------------------------------------
def _gather_block_quantized(ctx: Context) -> Expr:
    """Rows of a table quantised in blocks along one axis; rows outside of it are zeros.

    uint8 data hold 8 / bits codes a byte, low bits first, along the last axis, around 2**(bits - 1); int4 and uint4
    data have a zero point of 0 where none is given; eight- and four-bit floats have none, and a block size of 0 makes
    one block of the whole axis.
    """
    bits, block = int(ctx.attr("bits", 4)), int(ctx.attr("block_size", 128))
    plain = ctx.dtype().startswith("float")
    packed = ctx.dtype() == "uint8" and bits < 8
    data = list(ctx.shape())
    if packed:
        data[-1] = simplify(data[-1] * (8 // bits))
    axis = ctx.axis(int(ctx.attr("gather_axis", 0)), len(data))
    along = ctx.axis(int(ctx.attr("quantize_axis", 1)), len(data))
    index, dtype = ctx.shape(1), ctx.dtype(2)
    default = 1 << (bits - 1) if ctx.dtype() == "uint8" else 0
    zeros = [quant.widened(ctx, 3)] if ctx.has(3) else []
    single = [isinstance(d, int) and d == 1 for d in ctx.shape(2)]

    def code(t: Any, i: Any) -> Any:
        if plain:
            return t(*i).astype(dtype)
        return unpack(t, bits if packed else 8, *i).astype("int32")

    def body(x: Any, indices: Any, s: Any, zs: list[Any], out: list[Any], size: Any) -> Any:
        def element(*o: Any) -> Any:
            given = indices(*o[axis : axis + len(index)]).astype("int64")
            i = (*o[:axis], index_of(given, size), *o[axis + len(index) :])
            g = [*i[:along], te.floordiv(i[along], block) if block else te.const(0, "int64"), *i[along + 1 :]]
            value = code(x, i)
            if not plain:
                value = (value - (code(zs[0], g) if zs else te.const(default, "int32"))).astype(dtype)
            scale = s(*(te.const(0, "int64") if one else d for d, one in zip(g, single, strict=True)))
            inside = tirx.all(given >= -size, given < size)
            return select(inside, value * scale, te.const(0, dtype))

        return te.compute(out, element, name="gather_dequantize")

    out = [*data[:axis], *index, *data[axis + 1 :]]
    return compute(ctx, "gather_dequantize", body, quant.widened(ctx, 0), ctx.x(1), ctx.x(2), zeros, out, data[axis])


RULES: dict[str, Rule] = {
    "QuantizeLinear": quant.RULES["QuantizeLinear"],
    "DequantizeLinear": quant.RULES["DequantizeLinear"],
    "QLinearAdd": _qlinear("add", lambda ctx, a, b: a + b, 2),
    "QLinearMul": _qlinear("multiply", lambda ctx, a, b: a * b, 2),
    "QLinearSigmoid": _qlinear("sigmoid", lambda ctx, x: sigmoid(x), 1),
    "QLinearLeakyRelu": _qlinear("leaky_relu", _leaky, 1),
    "QLinearWhere": _q_where,
    "QLinearConcat": _q_concat,
    "QLinearSoftmax": _q_softmax,
    "QLinearAveragePool": _q_average_pool,
    "QLinearGlobalAveragePool": _q_global_average_pool,
    "QLinearConv": _q_conv,
    "NhwcMaxPool": _nhwc_max_pool,
    "DynamicQuantizeLSTM": _dynamic_quantize_lstm,
    "GatherBlockQuantized": _gather_block_quantized,
}
