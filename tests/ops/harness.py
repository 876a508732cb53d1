"""Runs one-node ONNX models through their rules, and through an independent reference.

Compiling costs far more than running, so the cases of a family share one module: one Relax function each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from llmc.fallback import legalize_and_schedule
from llmc.graph import Node, TensorType
from llmc.ops import RULES
from llmc.ops.context import Emitter
from llmc.runtime.arrays import aligned, to_numpy, to_tensor
from llmc.targets.x86 import AVX2
from llmc.tvm_shim import TvmTarget, relax, tirx, tvm

Array = np.ndarray
Reference = Callable[..., Sequence[Array]]


@dataclass(frozen=True)
class Case:
    """One node with its inputs: None is an absent input, `const` the positions of those known at compile time.

    `dims` gives input positions symbolic shapes, names or ints; a name is one symbol throughout the case.
    `reference` is "ort", "onnx", or a function of the inputs.
    """

    op: str
    inputs: tuple[Array | None, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    const: frozenset[int] = frozenset()
    dims: Mapping[int, tuple[int | str, ...]] = field(default_factory=dict)
    outputs: int = 1
    opset: int = 21
    domain: str = ""
    reference: str | Reference = "ort"
    tolerance: float = 1e-5
    label: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, [self.op, self.label, f"v{self.opset}", "symbolic" if self.dims else ""]))


def case(op: str, *inputs: Any, const: Sequence[int] = (), **options: Any) -> Case:
    """A Case; keyword arguments that are not its fields are attributes of the node."""
    known = {k: options.pop(k) for k in list(options) if k in Case.__dataclass_fields__}
    arrays = tuple(None if x is None else np.asarray(x) for x in inputs)
    return Case(op, arrays, attrs=options, const=frozenset(const), **known)


def model_of(c: Case) -> onnx.ModelProto:
    names = [f"x{i}" if x is not None else "" for i, x in enumerate(c.inputs)]
    outputs = [f"y{i}" for i in range(c.outputs)]
    node = helper.make_node(c.op, names, outputs, domain=c.domain, **_onnx_attrs(c.attrs))
    inputs, constants = [], []
    for i, x in enumerate(c.inputs):
        if x is None:
            continue
        code = helper.np_dtype_to_tensor_dtype(x.dtype)
        if i in c.const:
            constants.append(numpy_helper.from_array(x, names[i]))
        else:
            inputs.append(helper.make_tensor_value_info(names[i], code, c.dims.get(i, x.shape)))
    results = [helper.make_value_info(o, onnx.TypeProto()) for o in outputs]
    graph = helper.make_graph([node], "case", inputs, results, constants)
    imports = [helper.make_opsetid("", c.opset)] + ([helper.make_opsetid(c.domain, 1)] if c.domain else [])
    return helper.make_model(graph, opset_imports=imports, ir_version=10 if c.opset < 25 else 13)


def _onnx_attrs(attrs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: numpy_helper.from_array(v) if isinstance(v, np.ndarray) else v for k, v in attrs.items()}


def expected(c: Case) -> list[Array]:
    """What the reference computes."""
    if callable(c.reference):
        return list(c.reference(*c.inputs))
    feed = {f"x{i}": x for i, x in enumerate(c.inputs) if x is not None and i not in c.const}
    model = model_of(c)
    if c.reference == "onnx":
        return list(ReferenceEvaluator(model).run(None, feed))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feed))


def emit(bb: Any, name: str, c: Case) -> tuple[TensorType, ...] | Exception:
    """Add the function `name` that computes the case; returns the types its rule found, or what it raised."""
    emitter = Emitter(RULES, bb)
    symbols: dict[str, Any] = {}
    params = []
    for i, x in enumerate(c.inputs):
        if x is None:
            continue
        shape = tuple(
            symbols.setdefault(d, tirx.Var(d, "int64")) if isinstance(d, str) else d for d in c.dims.get(i, x.shape)
        )
        emitter.graph_types[f"x{i}"] = TensorType(shape, x.dtype.name)
        if i in c.const:
            emitter.constants[f"x{i}"] = x
        else:
            carrier = emitter.graph_types[f"x{i}"].carrier
            params.append(relax.Var(f"x{i}", relax.TensorType(list(shape), carrier)))
            emitter.exprs[f"x{i}"] = params[-1]
    names = tuple(f"x{i}" if x is not None else "" for i, x in enumerate(c.inputs))
    outputs = tuple(f"y{i}" for i in range(c.outputs))
    node = Node(c.op, names, outputs, c.attrs, c.domain, c.op, 1 if c.domain else c.opset)
    with bb.function(name, params):
        with bb.dataflow():
            try:
                types: tuple[TensorType, ...] | Exception = emitter.run(node)
                made = [emitter.exprs[o] for o in outputs]
                result = bb.emit_output(made[0] if len(made) == 1 else relax.Tuple(made))
            except Exception as error:  # the builder must be left in order
                types, result = error, bb.emit_output(relax.const(0))
        bb.emit_func_output(result)
    return types


class Compiled:
    """The cases of one family, compiled together; `run` executes one of them."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self.index = {id(c): f"case{i}" for i, c in enumerate(cases)}
        self.errors: dict[int, Exception] = {}
        self.types: dict[int, tuple[TensorType, ...]] = {}
        bb = relax.BlockBuilder()
        for c in cases:
            types = emit(bb, self.index[id(c)], c)
            if isinstance(types, Exception):  # shown by the test of this case
                self.errors[id(c)] = types
            else:
                self.types[id(c)] = types
        mod = legalize_and_schedule(bb.finalize(), AVX2)
        self.vm = relax.VirtualMachine(tvm.compile(mod, target=TvmTarget(AVX2.tvm())), tvm.cpu())

    def run(self, c: Case) -> list[Array]:
        if id(c) in self.errors:
            raise self.errors[id(c)]
        feed = [to_tensor(aligned(x)) for i, x in enumerate(c.inputs) if x is not None and i not in c.const]
        result = self.vm[self.index[id(c)]](*feed)
        results = result if c.outputs > 1 else [result]
        return [to_numpy(r, type_.dtype) for r, type_ in zip(results, self.types[id(c)], strict=True)]


def check(compiled: Compiled, c: Case) -> None:
    """Run a case, and compare types and values with the reference."""
    got, want = compiled.run(c), expected(c)
    for g, w, type_ in zip(got, want, compiled.types[id(c)], strict=True):
        assert g.dtype == w.dtype, (g.dtype, w.dtype)
        assert type_.dtype == w.dtype.name
        assert g.shape == w.shape
        assert len(type_.shape) == w.ndim
        if w.dtype.kind == "f" or w.dtype == ml_dtypes.bfloat16:
            np.testing.assert_allclose(g.astype(np.float64), w.astype(np.float64), c.tolerance, c.tolerance)
        else:
            np.testing.assert_array_equal(g, w)
