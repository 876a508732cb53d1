"""The select stage: which kernels serve each big operator; one function an operator."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from llmc.errors import UnsupportedError
from llmc.graph import LLMC, Dim, Graph, Node, graphs, same_dim
from llmc.schedules.attention.attention import ATTENTION
from llmc.schedules.attention.kv_append import KV_APPEND
from llmc.schedules.attention.workloads import AttentionWorkload, KVAppendWorkload
from llmc.schedules.base import Kernel
from llmc.schedules.conv.conv import CONV
from llmc.schedules.conv.integer import INTEGER_CONV, IntegerConvWorkload
from llmc.schedules.conv.window import WINDOW
from llmc.schedules.conv.workloads import ConvWorkload, WindowWorkload
from llmc.schedules.cuda import on
from llmc.schedules.embedding.dense import EMBEDDING_DENSE, EmbeddingDenseWorkload
from llmc.schedules.embedding.lowbit import LOWBIT_EMBEDDING, LowBitEmbeddingWorkload
from llmc.schedules.formats import QuantizedWeight
from llmc.schedules.gemm.bf16 import BF16, Bf16LinearWorkload
from llmc.schedules.gemm.cuda import linear as cuda_linear
from llmc.schedules.gemm.dense import DENSE, DenseLinearWorkload
from llmc.schedules.gemm.f16 import F16, F16LinearWorkload
from llmc.schedules.gemm.lowbit import LOWBIT, TABLE, LowBitLinearWorkload, TableLinearWorkload
from llmc.schedules.gemm.outliers import OUTLIERS, OutlierLinearWorkload
from llmc.schedules.norm.norm import NORM, NormWorkload
from llmc.schedules.recurrent.recurrent import RECURRENT
from llmc.schedules.recurrent.workload import RecurrentWorkload
from llmc.schedules.sampling.cuda import CUDA_SAMPLE
from llmc.schedules.sampling.sample import SampleWorkload
from llmc.targets.base import Target


@dataclass(frozen=True)
class Plan:
    """The kernels of each big operator, by the operator's first output, for every function of the module."""

    functions: Mapping[str, Graph]
    kernels: Mapping[tuple[str, str], tuple[Kernel, ...]]

    def __str__(self) -> str:
        """Each function's big operators in order, with the kernels chosen for them."""
        lines = []
        for name, graph in self.functions.items():
            lines.append(f"function {name}")
            for node in (node for inner in graphs(graph) for node in inner.nodes):
                kernels = self.kernels.get((name, node.outputs[0]), ())
                lines += [f"  {node.outputs[0]}: {kernel}" for kernel in kernels] or [
                    f"  {node.outputs[0]}: {node.op} by rule"
                ]
        return "\n".join(lines)

    def calls(self) -> dict[Kernel, int]:
        """The distinct kernels, and how many calls of each all functions hold."""
        return dict(Counter(k for kernels in self.kernels.values() for k in kernels))


def select(functions: Mapping[str, Graph], target: Target) -> Plan:
    """Choose kernels for every big operator; what no template accepts is left to its rule."""
    chosen: dict[tuple[str, str], tuple[Kernel, ...]] = {}
    for name, whole in functions.items():
        for graph, node in ((inner, node) for inner in graphs(whole) for node in inner.nodes):
            choose = _CHOICES.get(node.op) if node.domain == LLMC else None
            kernels = tuple(on(target, k) for k in choose(graph, node, target)) if choose is not None else ()
            if kernels and all(k.template.accepts(k.workload, target) for k in kernels):
                chosen[name, node.outputs[0]] = kernels
            elif kernels and node.op in _WITHOUT_RULE:
                refused = next(k for k in kernels if not k.template.accepts(k.workload, target))
                raise UnsupportedError(
                    f"no kernel for {target.name} takes this yet: {refused}",
                    where=f"{node.op} that makes '{node.outputs[0]}'",
                    hint="compile for another target; a cache in float32 (--kv-cache) suits them all",
                )
    return Plan(functions, chosen)


def _linear(graph: Graph, node: Node, target: Target) -> tuple[Kernel, ...]:
    weight = graph.constants[node.inputs[1]]
    bias, residual = bool(node.inputs[2]), bool(node.inputs[3])
    activation = node.attrs["activation"]
    if target.kind == "cuda":
        return (cuda_linear(weight, bias, activation, residual, node.attrs["activations"], target),)
    if isinstance(weight, np.ndarray):
        N, K = weight.shape
        if node.attrs["activations"] == "bf16":
            x = "bf16" if target.tiles else "a32"
            return (Kernel(BF16, Bf16LinearWorkload(N, K, "float32", bias, activation, residual, x)),)
        if node.attrs["activations"] == "f16":
            return (Kernel(F16, F16LinearWorkload(N, K, bias=bias, activation=activation, residual=residual)),)
        return (Kernel(DENSE, DenseLinearWorkload(N, K, bias=bias, activation=activation, residual=residual)),)
    epilogue = {"activations": node.attrs["activations"], "bias": bias, "activation": activation, "residual": residual}
    if weight.outliers:
        return (Kernel(OUTLIERS, OutlierLinearWorkload.of(weight, **epilogue)),)
    if weight.table:
        return (Kernel(TABLE, TableLinearWorkload.of(weight, **epilogue)),)
    return (Kernel(LOWBIT, LowBitLinearWorkload.of(weight, **epilogue)),)


def _embedding(graph: Graph, node: Node, target: Target) -> tuple[Kernel, ...]:
    """A table that is also an output layer's weight is read where that layer packed it: one copy serves both."""
    table = graph.constants[node.inputs[0]]
    if isinstance(table, QuantizedWeight):
        return (Kernel(LOWBIT_EMBEDDING, LowBitEmbeddingWorkload.of(table)),)
    V, E = table.shape
    tied = [n for n in graph.nodes if n.op == "Linear" and n.domain == LLMC and n.inputs[1] == node.inputs[0]]
    half = table.dtype == np.float16 or any(n.attrs["activations"] == "f16" for n in tied)
    panel = 0
    if tied and target.kind != "cuda":  # there rows lie as they are
        linear = _linear(graph, tied[0], target)[0]
        if half:
            panel = target.lanes
        elif isinstance(linear.workload, DenseLinearWorkload):  # no lookup reads what other linear layers pack
            panel = int(DENSE.default(linear.workload, target)["NV"]) * target.lanes
    return (Kernel(EMBEDDING_DENSE, EmbeddingDenseWorkload(V, E, panel, "float16" if half else "float32")),)


def _norm(graph: Graph, node: Node, target: Target) -> tuple[Kernel, ...]:
    K = graph.types[node.inputs[1]].shape[0]
    assert isinstance(K, int)
    workload = NormWorkload(
        K=K,
        kind=node.attrs["kind"],
        epsilon=float(node.attrs["epsilon"]),
        bias=bool(node.inputs[2]),
        residual=bool(node.inputs[3]),
        sum_output=bool(node.outputs[1]),
    )
    return (Kernel(NORM, workload),)


def _attention(graph: Graph, node: Node, target: Target) -> tuple[Kernel, ...]:
    """Two kernels: one rotates, appends and lays out keys and values; one attends."""
    a, packed, rope = node.attrs, not node.inputs[1], bool(node.inputs[5])
    in_place = bool(a.get("in_place", False))
    heads = {"n_heads": a["n_heads"], "n_kv_heads": a["n_kv_heads"], "head_dim": a["head_dim"]}
    append = KVAppendWorkload(
        **heads,
        packed_qkv=packed,
        rope=rope,
        interleaved=a["interleaved"],
        past=bool(node.inputs[3]) and not in_place,
        in_place=in_place,
        present=bool(node.outputs[1]),
        rotary_dim=_rotary_dim(graph, node),
        kv_cache=a.get("kv_cache", "float32"),
        paged=a.get("paged", False),
    )
    bias = graph.types[node.inputs[9]].shape if node.inputs[9] else (1, 1, 1, 1)
    rounds = (target.tiles or target.kind == "cuda") and _rounds_activations(graph, target)
    f16 = any(n.op == "Linear" and n.domain == LLMC and n.attrs["activations"] == "f16" for n in graph.nodes)
    attend = AttentionWorkload(
        **heads,
        scale=float(a["scale"]),
        causal=a["causal"],
        window=a["window"],
        softcap=float(a["softcap"]),
        key_bias=bool(node.inputs[8]),
        alibi=bool(node.input(13)),
        sinks=a["sinks"],
        prefix=bool(node.input(14)),
        documents=bool(node.input(15)),
        tree=bool(node.input(16)),
        bias=bool(node.inputs[9]),
        bias_batch=not same_dim(bias[0], 1),
        bias_heads=not same_dim(bias[1], 1),
        bias_rows=not same_dim(bias[2], 1),
        bf16=rounds and not f16,
        f16=rounds and f16,
        q_packed=packed and not rope,
        kv_cache=a.get("kv_cache", "float32"),
        paged=a.get("paged", False),
    )
    return Kernel(KV_APPEND, append), Kernel(ATTENTION, attend)


def _rounds_activations(graph: Graph, target: Target) -> bool:
    """Does the format of the linear layers round what they multiply? Then attention may, too."""
    exact = ("a32",) if target.kind == "cuda" else ("a32", "f16")
    return any(n.op == "Linear" and n.domain == LLMC and n.attrs["activations"] not in exact for n in graph.nodes)


def _recurrent(graph: Graph, node: Node, target: Target) -> tuple[Kernel, ...]:
    hidden = graph.types[node.inputs[1]].shape[2]
    assert isinstance(hidden, int)
    initial = len(node.inputs) > 3
    return (Kernel(RECURRENT, RecurrentWorkload(hidden, node.attrs["cell"], node.attrs["way"], initial)),)


def _sample(graph: Graph, node: Node, target: Target) -> tuple[Kernel, ...]:
    V = graph.types[node.inputs[0]].shape[1]
    assert isinstance(V, int)
    return (Kernel(CUDA_SAMPLE, SampleWorkload(V)),)


def _conv(graph: Graph, node: Node, target: Target) -> tuple[Kernel, ...]:
    """Of one tap, pixels are rows of a matrix: they need no second dimension.

    Integers that no kernel of integers takes go through float32. It holds them exactly as long as partial sums stay
    within 2**24, as those of trained networks do by far; beyond, an addition is off by 2**-24 of its sum, less than a
    thousandth of the step to which the sums are rounded.
    """
    weight = graph.constants[node.inputs[1]]
    if not isinstance(weight, np.ndarray):
        return ()
    N, each = weight.shape[:2]
    x, y = (_image(graph.types[name].shape) for name in (node.inputs[0], node.outputs[0]))
    groups, strides, kernel = node.attrs["groups"], node.attrs["strides"], node.attrs["kernel"]
    H, W = map(_known, x[1:3])
    if flat := kernel == strides == (1, 1):
        H, W = 1, math.prod(d if isinstance(d, int) else 0 for d in y[:3])
    workload = ConvWorkload(
        C=each * groups,
        N=N,
        KH=kernel[0],
        KW=kernel[1],
        SH=strides[0],
        SW=strides[1],
        DH=1 if flat else node.attrs["dilations"][0],
        DW=1 if flat else node.attrs["dilations"][1],
        groups=groups,
        H=H,
        W=W,
        bias=bool(node.inputs[2]),
        activation=node.attrs["activation"],
        residual=bool(node.inputs[3]),
    )
    if node.op == "Conv":
        return (Kernel(CONV, workload),)
    integer = Kernel(INTEGER_CONV, IntegerConvWorkload(**vars(workload)))
    bytes_ = graph.types[node.inputs[0]].dtype == "uint8" and weight.dtype == np.int8
    if bytes_ and INTEGER_CONV.accepts(integer.workload, target):
        return (integer,)
    return (Kernel(CONV, workload),)  # float32 holds the sums


def _window(graph: Graph, node: Node, target: Target) -> tuple[Kernel, ...]:
    a = node.attrs
    x, y = (_image(graph.types[name].shape) for name in (node.inputs[0], node.outputs[0]))
    workload = WindowWorkload(
        C=_known(x[3]),
        KH=a["kernel"][0],
        KW=a["kernel"][1],
        kind=a["kind"],
        SH=a["strides"][0],
        SW=a["strides"][1],
        DH=a["dilations"][0],
        DW=a["dilations"][1],
        top=a["pads"][0],
        left=a["pads"][1],
        H=_known(x[1]),
        W=_known(x[2]),
        OH=_known(y[1]),
        OW=_known(y[2]),
        bias=bool(node.inputs[2]),
        activation=a["activation"],
        count_pad=a["count_pad"],
    )
    return (Kernel(WINDOW, workload),)


def _image(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """[B, L, C] as an image of one row."""
    return shape if len(shape) == 4 else (shape[0], 1, *shape[1:])


def _known(dim: Dim) -> int:
    """A dimension as workloads have it: 0 where it is left to run time."""
    return dim if isinstance(dim, int) else 0


def _rotary_dim(graph: Graph, node: Node) -> int:
    """How many dimensions of a head rotate; 0 where all or none do."""
    width = graph.types[node.inputs[5]].shape[-1] if node.inputs[5] else 0
    assert isinstance(width, int)
    return 0 if 2 * width == node.attrs["head_dim"] else 2 * width


# What templates alone compute.
_WITHOUT_RULE = {"Attention", "Embedding", "Linear", "Norm", "Recurrent", "Sample"}
_CHOICES: dict[str, Callable[[Graph, Node, Target], tuple[Kernel, ...]]] = {
    "Conv": _conv,
    "IntegerConv": _conv,
    "Linear": _linear,
    "Embedding": _embedding,
    "Norm": _norm,
    "Attention": _attention,
    "Window": _window,
    "Recurrent": _recurrent,
    "Sample": _sample,
}
