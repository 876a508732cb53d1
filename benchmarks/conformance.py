"""The ONNX backend node suite through llmc: each case imported, compiled for this machine's CPU, run and compared.

    python benchmarks/conformance.py                    the whole suite of the installed onnx package
    python benchmarks/conformance.py --only Conv        the cases of one operator
    python benchmarks/conformance.py --shard 2/8        every eighth case, the third of them first
    python benchmarks/conformance.py --write-docs       docs/operators.md anew; runs nothing

A case goes the way of a model, from a file through the importer, the rewrites and the kernels' selection to machine
code; only what it takes to write and load an artifact is left out, and cases are built together, because most of
building is the same for all. Results are compared by the suite's own runner, at the suite's own tolerances.

A case passes as it stands; CONSTANT lists those that need some of their inputs made initializers. Nothing else is done
for a case, and what is left out has its reason in EXCLUDED.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import defs, numpy_helper

from llmc.build import build
from llmc.errors import LlmcError
from llmc.fuse import fuse
from llmc.graph import Graph
from llmc.importer import import_model
from llmc.importer.control import CONTROL
from llmc.importer.reader import OLDEST_OPSET
from llmc.importer.sequences import GROUPS
from llmc.lower import lower
from llmc.ops import RULES
from llmc.ops.contrib import REFUSED as REFUSED_CONTRIB
from llmc.ops.refused import REFUSED
from llmc.options import resolve_target
from llmc.quantize import quantize
from llmc.runtime.arrays import aligned, to_numpy, to_tensor
from llmc.select import select
from llmc.targets.base import Target
from llmc.tune import choose_configs
from llmc.tvm_shim import relax, tvm

TOGETHER = 48  # cases that are built as one module
PAGE = Path(__file__).parent.parent / "docs" / "operators.md"
IN_IMPORTER = ("Constant", *CONTROL, *GROUPS)  # operators that the importer itself resolves
UNTUNED = Path(__file__).parent / "no database"  # of measurements: kernels get what llmc ships

# Operators that are left out, and cases (patterns of their names) of operators that are not.
EXCLUDED: dict[str, str] = {
    **REFUSED,
    **dict.fromkeys(("test_training_dropout", "test_training_dropout_mask"), "random: dropout in training mode"),
    "test_training_dropout_default*": "random: dropout in training mode",
    "test_not_?d": "opset 1",
    "test_scan_sum": "Scan of opset 8, with lengths of its own for each batch",
    "test_attention_4d_causal_fp16_expanded": "two of 192 values differ by 2 units of float16: our softmax is float32",
    "test_dft_inverse*": "expects 1.9e-7 for 0, as the float32 transform rounds that wrote the case",
}

# Cases some of whose inputs are made constant, and why.
CONSTANT: dict[str, tuple[tuple[str, ...], str]] = {
    "test_affine_grid_3d_align_corners_expanded": (("size",), "a size decides between branches of different ranks"),
}


@dataclass(frozen=True)
class Case:
    """A model of one node, or of one node's standard definition; `op` is that node's either way, and `operands` are
    the inputs that may be made constant."""

    name: str
    domain: str
    op: str
    operands: tuple[str, ...]
    model: onnx.ModelProto
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    rtol: float
    atol: float


@dataclass(frozen=True)
class Outcome:
    """`state` is passed, failed or excluded. `frozen` names the inputs that had to be constant."""

    case: str
    op: str
    state: str
    reason: str = ""
    frozen: tuple[str, ...] = ()


# -- the suite --------------------------------------------------------------------------------------------------
def collect() -> list[Case]:
    """The suite's cases in its own order."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    nodes: dict[str, onnx.NodeProto] = {}
    cases = []
    for test in found:
        node = nodes.setdefault(test.name.split("_expanded")[0], test.model.graph.node[0])
        ((inputs, outputs),) = test.data_sets
        cases.append(
            Case(
                test.name,
                node.domain,
                node.op_type,
                CONSTANT.get(test.name, ((), ""))[0],
                test.model,
                inputs,
                outputs,
                test.rtol,
                test.atol,
            )
        )
    return cases


def excluded(case: Case) -> str:
    """Why a case is left out; empty for one that has to pass."""
    if case.domain not in ("", "ai.onnx", "ai.onnx.preview"):
        return f"the domain {case.domain}"
    for key in (case.op, *(k for k in EXCLUDED if fnmatchcase(case.name, k))):
        if key in EXCLUDED:
            return EXCLUDED[key]
    infos = [*case.model.graph.input, *case.model.graph.output]
    for info in infos:
        kind = info.type.WhichOneof("value")
        if kind != "tensor_type":
            return f"{(kind or 'unknown').removesuffix('_type')}s as inputs or outputs of a model"
        if info.type.tensor_type.elem_type == onnx.TensorProto.STRING:
            return "string tensors"
    return ""


def array(value: Any) -> np.ndarray:
    """A tensor of a case as numpy array."""
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def frozen_model(case: Case, names: Sequence[str]) -> onnx.ModelProto:
    """The case's model with some of its inputs as initializers of their values."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    kept = [info for info in model.graph.input if info.name not in names]
    for info, value in zip(case.model.graph.input, case.inputs, strict=True):
        if info.name in names:
            model.graph.initializer.append(numpy_helper.from_array(array(value), info.name))
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return model


# -- one case after another -------------------------------------------------------------------------------------
class Suite:
    """Imports cases one by one, builds and runs them in groups."""

    def __init__(self, target: Target, report: Callable[[Outcome], None] = lambda _: None) -> None:
        self.target, self.report = target, report
        self.outcomes: list[Outcome] = []

    def run(self, cases: Iterable[Case]) -> list[Outcome]:
        """The outcome of every case; those that were built together come together."""
        waiting: list[tuple[Case, Graph, tuple[str, ...]]] = []
        for case in cases:
            if reason := excluded(case):
                self._tell(Outcome(case.name, case.op, "excluded", reason))
                continue
            try:
                waiting.append((case, *self._graph(case)))
            except Exception as error:
                self._fail(case, error)
            if len(waiting) == TOGETHER:
                self._together(waiting)
                waiting = []
        self._together(waiting)
        return self.outcomes

    def _graph(self, case: Case) -> tuple[Graph, tuple[str, ...]]:
        """The case up to its kernels, and the inputs that had to be constant."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            frozen: tuple[str, ...] = ()
            while True:
                path.write_bytes(frozen_model(case, frozen).SerializeToString())
                try:
                    return fuse(quantize(import_model(path), None)), frozen
                except LlmcError:
                    if frozen == case.operands:
                        raise
                    frozen = case.operands

    def _together(self, group: list[tuple[Case, Graph, tuple[str, ...]]]) -> None:
        """Build and run some cases; where that fails, each half of them alone, down to the one at fault."""
        if not group:
            return
        try:
            calls = build_functions([graph for _, graph, _ in group], self.target)
        except Exception as error:
            if len(group) == 1:
                self._fail(group[0][0], error)
                return
            half = len(group) // 2
            self._together(group[:half])
            self._together(group[half:])
            return
        for (case, graph, frozen), call in zip(group, calls, strict=True):
            try:
                compare(case, graph, call)
            except Exception as error:
                self._fail(case, error)
            else:
                self._tell(Outcome(case.name, case.op, "passed", frozen=frozen))

    def _fail(self, case: Case, error: Exception) -> None:
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        detail = " | ".join(line.strip() for line in lines[:6]) or repr(error)
        self._tell(Outcome(case.name, case.op, "failed", f"{type(error).__name__}: {detail}"))

    def _tell(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.report(outcome)


def build_functions(graphs: Sequence[Graph], target: Target) -> list[Callable[..., list[np.ndarray]]]:
    """The graphs as functions of one library, each from arrays in its inputs' order to arrays in its outputs'."""
    functions = {f"case{i}": with_prefix(graph, f"case{i}.") for i, graph in enumerate(graphs)}
    plan = select(functions, target)
    choices = choose_configs(plan.calls(), target, UNTUNED)
    lowered = lower(plan, {kernel: choice.config for kernel, choice in choices.items()}, target)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "lib.so"
        build(lowered.module, target, library)
        machine = relax.VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())

    def function(name: str) -> Callable[..., list[np.ndarray]]:
        weights = [lowered.params[p].pack()[lowered.params[p].index] for p in lowered.takes[name]]

        def call(*inputs: np.ndarray) -> list[np.ndarray]:
            result = machine[name](*(to_tensor(aligned(x)) for x in (*inputs, *weights)))
            graph, results = functions[name], result if len(functions[name].outputs) > 1 else [result]
            return [to_numpy(r, graph.types[o].dtype) for r, o in zip(results, graph.outputs, strict=True)]

        return call

    return [function(name) for name in functions]


def with_prefix(graph: Graph, prefix: str) -> Graph:
    """The same graph with other names: constants of all functions of a module share one table."""

    def new(name: str) -> str:
        return prefix + name if name else ""

    def all_(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(map(new, names))

    return replace(
        graph,
        inputs=all_(graph.inputs),
        outputs=all_(graph.outputs),
        nodes=tuple(replace(n, inputs=all_(n.inputs), outputs=all_(n.outputs)) for n in graph.nodes),
        types={new(k): v for k, v in graph.types.items()},
        constants={new(k): v for k, v in graph.constants.items()},
    )


def compare(case: Case, graph: Graph, call: Callable[..., list[np.ndarray]]) -> None:
    """Run a case. Raises AssertionError where shapes, types or values are not the expected ones."""
    from onnx.backend.test.runner import Runner

    given = dict(zip((i.name for i in case.model.graph.input), case.inputs, strict=True))
    results = call(*(array(given[name]) for name in graph.inputs))
    Runner.assert_similar_outputs([array(o) for o in case.outputs], results, case.rtol, case.atol)


# -- figures ----------------------------------------------------------------------------------------------------
def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts as a whole and by operator, with what failed and what was left out, by reason."""
    by_operator: dict[str, Counter[str]] = {}
    for o in outcomes:
        by_operator.setdefault(o.op, Counter())[o.state] += 1
    states = Counter(o.state for o in outcomes)
    return {
        **{state: states[state] for state in ("passed", "failed", "excluded")},
        "passed_with_constant_operands": sum(bool(o.frozen) and o.state == "passed" for o in outcomes),
        "by_operator": {op: dict(by_operator[op]) for op in sorted(by_operator)},
        "failures": [asdict(o) for o in outcomes if o.state == "failed"],
        "exclusions": dict(Counter(o.reason for o in outcomes if o.state == "excluded").most_common()),
    }


def show(figures: Mapping[str, Any]) -> None:
    """The figures for people."""
    for op, counts in figures["by_operator"].items():
        print(f"{op:28}", *(f"{counts.get(s, 0):5} {s}" for s in ("passed", "failed", "excluded")))
    for failure in figures["failures"]:
        print(f"failed {failure['case']}: {failure['reason']}")
    print(*(f"{figures[state]} {state}" for state in ("passed", "failed", "excluded")), sep=", ")
    print(f"of those that passed, {figures['passed_with_constant_operands']} with operands made constant")


# -- the list of operators --------------------------------------------------------------------------------------
def supported() -> dict[str, tuple[int, int, str]]:
    """Operators of ai.onnx that are supported: (first opset, last opset, "rule", "definition" or "importer")."""
    newest = defs.onnx_opset_version()
    found = {}
    for name, schemas in _history().items():
        how = "rule" if ("", name) in RULES else "importer" if name in IN_IMPORTER else ""
        if not how and any(s.has_function or s.has_context_dependent_function for s in schemas):
            how = "definition"
        end = schemas[-1].since_version - 1 if schemas[-1].deprecated else newest
        first = max(OLDEST_OPSET, schemas[0].since_version)
        if how and name not in EXCLUDED and first <= end:
            found[name] = (first, end, how)
    return found


def _history() -> dict[str, list[defs.OpSchema]]:
    """Every version of every operator of ai.onnx, the oldest first, by name."""
    table: dict[str, list[defs.OpSchema]] = {}
    for schema in defs.get_all_schemas_with_history():
        if schema.domain == "":
            table.setdefault(schema.name, []).append(schema)
    return {name: sorted(table[name], key=lambda s: s.since_version) for name in sorted(table)}


def page() -> str:
    """docs/operators.md."""
    known = supported()
    standard = [f"| {n} | {a} to {b} | {how} |" for n, (a, b, how) in known.items()]
    contrib = sorted(op for domain, op in RULES if domain == "com.microsoft" and op not in REFUSED_CONTRIB)
    refused = [f"| com.microsoft {op} | {REFUSED_CONTRIB[op]} |" for op in sorted(REFUSED_CONTRIB)]
    obsolete = {n for n, schemas in _history().items() if schemas[-1].deprecated}
    missing = [
        f"| {n} | {EXCLUDED.get(n, 'not supported yet')} |" for n in _history() if n not in known and n not in obsolete
    ]
    partial = [f"| {p} | {reason} |" for p, reason in EXCLUDED.items() if p not in _history()]
    constant = [f"| {case} | {', '.join(names)} | {reason} |" for case, (names, reason) in CONSTANT.items()]
    return TEMPLATE.format(
        onnx=onnx.__version__,
        oldest=OLDEST_OPSET,
        newest=defs.onnx_opset_version(),
        count=len(known),
        standard="\n".join(standard),
        contrib=", ".join(contrib),
        missing="\n".join(missing + refused),
        partial="\n".join(partial),
        constant="\n".join(constant),
    )


TEMPLATE = """# Operators

Written by `benchmarks/conformance.py --write-docs` from the code's own tables; a test compares. llmc reads models of
opset {oldest} to {newest} of ai.onnx, the newest of onnx {onnx}.

An operator is supported by a *rule* of its own, by its standard *definition* in terms of others, or by the *importer*,
which resolves it; of sequences and optionals it has to know lengths and positions. What every supported operator means
is checked by the ONNX backend node suite, case by case, at the suite's own tolerances:
`python benchmarks/conformance.py`.

Sizes may be symbols, or depend on data: NonZero, Compress, Unique and NonMaxSuppression find how much they return when
the model runs. Any operand that decides a size, an axis or a step may be an input of the model, or be computed: the
shape of Reshape, Expand and ConstantOfShape, the bounds of Slice, Pad, Range and Split, repeats, k and depth, scales
and sizes of Resize, the axes of reductions. Only how many dimensions a tensor has must not depend on data: where the
length of an operand decides that, as of Squeeze's axes, it has to be known. A size that is found at run time and has to
equal another is taken for equal; where it is not, the run fails, as it does where data asks for a shape that cannot be.

## ai.onnx: {count} operators

| operator | opsets | by |
|---|---|---|
{standard}

## com.microsoft

{contrib}.

## Not supported

A model with one of these is refused, with the node's name and the reason.

| operator | reason |
|---|---|
{missing}

Of the node suite these cases are left out, too; the others of their operators have to pass.

| cases | reason |
|---|---|
| with a string tensor as input or output | string tensors |
| with a sequence or an optional as input or output | such values cannot be inputs or outputs of a model |
| of ai.onnx.ml, ai.onnx.preview.training | these domains |
{partial}

These pass once some of their inputs are constants.

| case | inputs | reason |
|---|---|---|
{constant}
"""


def main() -> int:
    """Run what the command line asks for; 1 where a case failed."""
    parser = argparse.ArgumentParser(description="the ONNX backend node suite through llmc")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="run every N-th case, from the I-th on")
    parser.add_argument("--only", metavar="OP", help="run the cases of one operator")
    parser.add_argument("--target", default="native")
    parser.add_argument("--write-docs", action="store_true", help=f"write {PAGE.name} and stop")
    args = parser.parse_args()
    if args.write_docs:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    index, count = map(int, args.shard.split("/"))
    cases = [case for case in collect() if args.only in (None, case.op)][index::count]

    def tell(outcome: Outcome) -> None:
        if outcome.state == "failed":
            print(f"failed {outcome.case}: {outcome.reason}", file=sys.stderr, flush=True)

    figures = summary(Suite(resolve_target(args.target), tell).run(cases))
    if args.json:
        print(json.dumps(figures, indent=1))
    else:
        show(figures)
    return bool(figures["failed"])


if __name__ == "__main__":
    sys.exit(main())
