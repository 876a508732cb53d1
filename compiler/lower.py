"""The lower stage: graphs become one Relax module that calls each distinct kernel's PrimFunc.

Weights are parameters of every function, after its inputs: nothing large is ever a constant of the module, so compile
time does not depend on the weights' size and a runtime maps them from the artifact. A parameter is produced by `pack`
only when the artifact is written, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.errors import KernelError
from llmc.graph import NARROW, Constant, Graph, Node, TensorType, same_dim
from llmc.ops import RULES
from llmc.ops.context import Emitter
from llmc.schedules.base import Config, Kernel
from llmc.select import Plan
from llmc.targets.base import Target
from llmc.tir_pipeline import mark_kernel
from llmc.tvm_shim import Expr, IRModule, relax, with_root_block

_LARGE = 1024  # bytes from which a constant that a rule reads is a parameter, not part of the module


@dataclass(frozen=True)
class Param:
    """A weight as a kernel reads it. `pack` makes the group's arrays; this is the one at `index`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    pack: Callable[[], list[np.ndarray]]
    index: int


@dataclass(frozen=True)
class Lowered:
    """A Relax module, the parameters of all its functions, and which of them each function takes, in order."""

    module: IRModule
    params: Mapping[str, Param]
    takes: Mapping[str, tuple[str, ...]]
    kernel_names: Mapping[Kernel, str]

    def __str__(self) -> str:
        """The module as TVMScript, after the parameters that each function takes."""
        params = [f"# {p.name}: {p.dtype}{list(p.shape)}" for p in self.params.values()]
        return "\n".join([*params, self.module.script(show_meta=False)])


def lower(plan: Plan, configs: Mapping[Kernel, Config], target: Target) -> Lowered:
    """Emit every function of the plan. Kernels are built once each, however many layers call them."""
    module = _Module(plan, configs, target)
    takes = {}
    for name, graph in plan.functions.items():
        inputs = {i: _variable(i, graph.types[i]) for i in graph.inputs}
        takes[name] = _Function(module, name, graph, inputs).emit()
    return Lowered(module.bb.get(), module.params, takes, {k: v.name_hint for k, v in module.kernels.items()})


class _Module:
    """What the functions of one module share: kernels and parameters."""

    def __init__(self, plan: Plan, configs: Mapping[Kernel, Config], target: Target) -> None:
        self.plan, self.configs, self.target = plan, configs, target
        self.bb = relax.BlockBuilder()
        self.kernels: dict[Kernel, Any] = {}
        self.weights: dict[Kernel, list[tuple[tuple[int, ...], str]]] = {}
        self.params: dict[str, Param] = {}

    def kernel(self, kernel: Kernel) -> Any:
        """The global variable of a kernel's PrimFunc, built on first use."""
        if kernel not in self.kernels:
            func = kernel.template.build(kernel.workload, self.target, self.configs[kernel])
            name = f"{kernel.template.name}_{len(self.kernels)}"
            if "global_symbol" in (func.attrs or {}):
                func = func.without_attr("global_symbol")
            self.kernels[kernel] = self.bb.add_func(mark_kernel(with_root_block(func)), name)
            buffers = list(func.params)
            inputs, outputs = len(kernel.workload.inputs()), len(kernel.workload.outputs())
            weights = buffers[inputs : len(buffers) - outputs]
            self.weights[kernel] = [(tuple(int(d) for d in b.shape), str(b.dtype)) for b in weights]
        return self.kernels[kernel]

    def packed(self, kernel: Kernel, names: Mapping[str, str], constants: Mapping[str, Constant]) -> list[str]:
        """Parameters that hold the constants `names` (role -> constant) as `kernel` reads them."""
        self.kernel(kernel)
        template, workload, config = kernel.template, kernel.workload, self.configs[kernel]
        values = {role: constants[name] for role, name in names.items()}

        def pack() -> list[np.ndarray]:
            return list(template.prepack(values, workload, config, self.target).values())

        layout = template.layout(workload, config, self.target)
        found = []
        for i, (shape, dtype) in enumerate(self.weights[kernel]):
            name = f"{'+'.join(names.values())}:{layout}:{i}"
            known = self.params.setdefault(name, Param(name, shape, dtype, pack, i))
            if (known.shape, known.dtype) != (shape, dtype):
                raise KernelError(f"two kernels disagree on the layout of '{name}': {known.shape} and {shape}")
            found.append(name)
        return found

    def plain(self, name: str, value: np.ndarray) -> str:
        """A parameter that holds a constant as it is."""
        if name not in self.params:
            shape = tuple(int(d) for d in value.shape)
            self.params[name] = Param(name, shape, value.dtype.name, lambda: [np.ascontiguousarray(value)], 0)
        return name


class _Function:
    """One function while it is emitted, or a body of control flow in it."""

    def __init__(self, module: _Module, name: str, graph: Graph, inputs: Mapping[str, Expr]) -> None:
        self.module, self.name, self.graph, self.bb = module, name, graph, module.bb
        self.inputs = inputs
        self.emitter = Emitter.bind_graph(graph, inputs, RULES, module.bb)
        self.emitter.nested = self._nested
        self.params: dict[str, Any] = {}
        self.flat: dict[str, Any] = {}  # values as [M, K], while nobody asked for their own shape

    def emit(self) -> tuple[str, ...]:
        graph = self.graph
        inputs = list(self.inputs.values())
        with self.bb.function(self.name, attrs={"num_input": len(inputs)}):
            with self.bb.dataflow():
                values = self._values((*graph.outputs, *self._caches()))
                output = self.bb.emit_output(values[0] if len(values) == 1 else relax.Tuple(values))
            self.bb.emit_func_output(output, params=[*inputs, *self.params.values()])
        return tuple(self.params)

    def _values(self, names: Sequence[str]) -> list[Expr]:
        """Emit all nodes; returns some of the values."""
        self._large_constants()
        for node in self.graph.nodes:
            self._node(node)
        return [self.value(name) for name in names]

    def _nested(self, graph: Graph, exprs: Mapping[str, Expr]) -> tuple[list[Expr], list[tuple[Any, Expr]]]:
        """Emit a body whose inputs are `exprs`: its outputs, and its own parameters with what they are here."""
        inner = _Function(self.module, self.name, graph, exprs)
        inner.emitter.analyzer, inner.emitter.measured = self.emitter.analyzer, self.emitter.measured
        values = inner._values(graph.outputs)
        return values, [(own, self.param(name)) for name, own in inner.params.items()]

    def _caches(self) -> list[str]:
        """Caches are returned too, so that Relax sees what was written in place."""
        layers = [n for n in self.graph.nodes if n.op == "Attention" and n.attrs.get("in_place")]
        return [name for n in layers for name in _cache(n)]

    def _large_constants(self) -> None:
        read = {
            i for n in self.graph.nodes if (self.name, n.outputs[0]) not in self.module.plan.kernels for i in n.inputs
        }
        for name in self.graph.constants:
            value = self.graph.constants[name]
            if name not in read or not isinstance(value, np.ndarray) or value.dtype.name in NARROW:
                continue
            if value.nbytes >= _LARGE and value.dtype.kind == "f":
                self.emitter.exprs[name] = self.param(self.module.plain(name, value))

    # -- values -------------------------------------------------------------------------------------------------
    def param(self, name: str) -> Any:
        if name not in self.params:
            param = self.module.params[name]
            self.params[name] = _variable(f"p{len(self.params)}", TensorType(param.shape, param.dtype))
        return self.params[name]

    def value(self, name: str) -> Expr:
        """A value in its own shape."""
        if name in self.flat and name not in self.emitter.exprs:
            shape = relax.ShapeExpr(list(self.graph.types[name].shape))
            self.emitter.exprs[name] = self.bb.emit(relax.op.reshape(self.flat[name], shape))
        return self.emitter.expr(name)

    def rows(self, name: str) -> Expr:
        """A value as [M, K]: all leading dimensions in one."""
        if name not in self.flat:
            *leading, K = self.graph.types[name].shape
            value = self.value(name)
            self.flat[name] = (
                value if len(leading) == 1 else self.bb.emit(relax.op.reshape(value, (_product(leading), K)))
            )
        return self.flat[name]

    # -- nodes --------------------------------------------------------------------------------------------------
    def _node(self, node: Node) -> None:
        kernels = self.module.plan.kernels.get((self.name, node.outputs[0]))
        if kernels is not None:
            emitters: dict[str, Callable[..., None]] = {
                "Conv": self._conv,
                "Linear": self._linear,
                "Norm": self._norm,
                "Embedding": self._embedding,
                "Attention": self._attention,
                "IntegerConv": self._conv,
                "Window": self._conv,
                "Recurrent": self._recurrent,
                "Sample": self._sample,
            }
            emitters[node.op](node, *kernels)
            return
        for name in node.inputs:
            if name in self.flat:
                self.value(name)
        self.emitter.run(node)

    def _call(self, kernel: Kernel, inputs: list[Expr], weights: list[str], types: list[TensorType]) -> Any:
        out = [relax.TensorType(t.shape, t.dtype) for t in types]
        gv = self.module.kernel(kernel)
        args = [*inputs, *(self.param(w) for w in weights)]
        return self.bb.emit(relax.call_tir(gv, args, out if len(out) > 1 else out[0]))

    def _linear(self, node: Node, kernel: Kernel) -> None:
        x, weight, bias, residual = node.inputs
        roles = {"weight": weight, **({"bias": bias} if bias else {})}
        *leading, N = self.graph.types[node.outputs[0]].shape
        inputs = [self.rows(x), *([self.rows(residual)] if residual else [])]
        weights = self.module.packed(kernel, roles, self.graph.constants)
        self.flat[node.outputs[0]] = self._call(
            kernel, inputs, weights, [TensorType((_product(leading), N), "float32")]
        )

    def _conv(self, node: Node, kernel: Kernel) -> None:
        """Conv, IntegerConv, Window: images as the workload sees them, whatever number of dimensions the model has."""
        x, weight, bias, residual = node.inputs
        w: Any = kernel.workload
        flat = node.op != "Window" and w.KH == w.KW == w.SH == w.SW == 1

        def shape(name: str) -> tuple[Any, ...]:
            *leading, C = self.graph.types[name].shape
            if flat:
                return 1, 1, _product(leading), C
            return (*leading, C) if len(leading) == 3 else (leading[0], 1, leading[1], C)

        images = [self._reshaped(name, shape(name)) for name in (x, residual) if name]
        roles = {"weight": weight, "bias": bias} if bias else {"weight": weight}
        weights = self.module.packed(kernel, roles, self.graph.constants) if weight else []
        given, made = kernel.workload.inputs()[0].dtype, kernel.workload.outputs()[0].dtype
        if self.graph.types[x].dtype != given:  # integers that go through float32
            images[0] = self.bb.emit(relax.op.astype(images[0], given))
        y = self._call(kernel, images, weights, [TensorType(shape(node.outputs[0]), made)])
        if self.graph.types[node.outputs[0]].dtype != made:
            y = self.bb.emit(relax.op.astype(y, self.graph.types[node.outputs[0]].dtype))
        own = self.graph.types[node.outputs[0]].shape
        if len(own) != 4 or flat:
            y = self.bb.emit(relax.op.reshape(y, relax.ShapeExpr(list(own))))
        self.emitter.exprs[node.outputs[0]] = y

    def _reshaped(self, name: str, shape: tuple[Any, ...]) -> Expr:
        value = self.value(name)
        own = self.graph.types[name].shape
        if len(own) == len(shape) and all(map(same_dim, own, shape)):
            return value
        return self.bb.emit(relax.op.reshape(value, relax.ShapeExpr(list(shape))))

    def _norm(self, node: Node, kernel: Kernel) -> None:
        x, weight, bias, residual = node.inputs
        roles = {"weight": weight, **({"bias": bias} if bias else {})}
        *leading, K = self.graph.types[x].shape
        inputs = [self.rows(x), *([self.rows(residual)] if residual else [])]
        outputs = [o for o in node.outputs if o]
        type_ = TensorType((_product(leading), K), "float32")
        weights = self.module.packed(kernel, roles, self.graph.constants)
        result = self._call(kernel, inputs, weights, [type_] * len(outputs))
        for i, name in enumerate(outputs):
            self.flat[name] = result if len(outputs) == 1 else self.bb.emit(relax.TupleGetItem(result, i))

    def _embedding(self, node: Node, kernel: Kernel) -> None:
        table, ids = node.inputs
        *leading, E = self.graph.types[node.outputs[0]].shape
        M = _product(leading)
        flat = self.value(ids)
        if len(leading) != 1:
            flat = self.bb.emit(relax.op.reshape(flat, (M,)))
        weights = self.module.packed(kernel, {"weight": table}, self.graph.constants)
        self.flat[node.outputs[0]] = self._call(kernel, [flat], weights, [TensorType((M, E), "float32")])

    def _attention(self, node: Node, append: Kernel, attend: Kernel) -> None:
        a = node.attrs
        B, S, _ = self.graph.types[node.inputs[0]].shape
        result = TensorType((B, S, a["n_heads"] * a["head_dim"]), "float32")
        qkv = [self.value(name) for name in node.inputs[:3] if name]
        rope = [self.value(name) for name in node.inputs[5:7] if name]
        # Separate queries pass through the append only to be rotated.
        sources = qkv if rope or len(qkv) == 1 else qkv[1:]
        kv_len = self.value(node.inputs[7])
        put = self._append_in_place if a.get("in_place") else self._append
        cache, q = put(node, append, [*sources, *rope], kv_len, result)
        biases = [self.value(name) for name in (*node.inputs[8:10], *node.inputs[13:]) if name]
        operands = [qkv[0] if q is None else q, *cache, kv_len, *map(self.value, _table(node)), *biases]
        self.emitter.exprs[node.outputs[0]] = self._call(attend, operands, [], [result])

    def _recurrent(self, node: Node, kernel: Kernel) -> None:
        projected, recurrent, bias, *states = node.inputs
        roles = {"recurrent": recurrent, **({"bias": bias} if bias else {})}
        inputs = [self.value(name) for name in (projected, *states)]
        weights = self.module.packed(kernel, roles, self.graph.constants)
        result = self._call(kernel, inputs, weights, [self.graph.types[o] for o in node.outputs])
        for i, name in enumerate(node.outputs):
            self.emitter.exprs[name] = self.bb.emit(relax.TupleGetItem(result, i))

    def _sample(self, node: Node, kernel: Kernel) -> None:
        (token,) = node.outputs
        self.emitter.exprs[token] = self._call(kernel, [*map(self.value, node.inputs)], [], [self.graph.types[token]])

    def _append(
        self, node: Node, kernel: Kernel, sources: list[Expr], kv_len: Expr, queries: TensorType
    ) -> tuple[list[Expr], Expr | None]:
        """New keys and values after a copy of the past; presents are what this returns."""
        a = node.attrs
        past = [self.value(name) for name in node.inputs[3:5] if name]
        B, Sk = self.graph.types[node.inputs[1] or node.inputs[0]].shape[:2]
        T = Sk + (self.graph.types[node.inputs[3]].shape[2] if past else 0)
        KV, D = a["n_kv_heads"], a["head_dim"]
        blocks = (T + 63) // 64
        types = [TensorType((B, KV, blocks, D, 64), "float32"), TensorType((B, KV, T, D), "float32")]
        outputs = kernel.workload.outputs()
        by_name = {"q": queries, "kp": types[0], "v": types[1], "present_k": types[1]}
        result = self._call(kernel, [*sources, *past], [], [by_name[o.name] for o in outputs])
        found = {o.name: self.bb.emit(relax.TupleGetItem(result, i)) for i, o in enumerate(outputs)}
        for output, name in zip(node.outputs[1:], ("present_k", "v"), strict=False):
            if output:
                self.emitter.exprs[output] = found[name]
        return [found["kp"], found["v"]], found.get("q")

    def _append_in_place(
        self, node: Node, kernel: Kernel, sources: list[Expr], kv_len: Expr, queries: TensorType
    ) -> tuple[list[Expr], Expr | None]:
        caches = _cache(node)
        rotated = any(o.name == "q" for o in kernel.workload.outputs())
        types = [self.graph.types[c] for c in caches] + ([queries] if rotated else [])
        indices = [*range(len(caches)), *([-1] if rotated else [])]
        out = [relax.TensorType(t.shape, t.dtype) for t in types]
        args = [*map(self.value, caches), *sources, kv_len, *map(self.value, _table(node)[:1])]
        result = self.bb.emit(relax.op.call_tir_inplace(self.module.kernel(kernel), args, indices, out))
        parts = [self.bb.emit(relax.TupleGetItem(result, i)) for i in range(len(types))]
        self.emitter.exprs.update(zip(caches, parts, strict=False))
        return parts[: len(caches)], parts[-1] if rotated else None


def _cache(node: Node) -> tuple[str, ...]:
    """What an Attention in place writes: keys, values and, where they are rounded, their scales."""
    return (*node.inputs[3:5], *(name for name in node.inputs[10:11] if name))


def _table(node: Node) -> tuple[str, ...]:
    """Where a paged cache's blocks lie, and how many leading ones all sequences share."""
    return tuple(name for name in node.inputs[11:13] if name)


def _variable(name: str, type_: TensorType) -> Any:
    return relax.Var(name, relax.TensorType(type_.shape, type_.carrier))


def _product(dims: list[Any]) -> Any:
    result: Any = 1
    for d in dims:
        result = result * d
    return result
