"""Compares an artifact with onnxruntime: every output on random inputs of several sizes, and perplexity on a text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc import samples
from llmc.engines import Engine, open_engine
from llmc.errors import ArtifactError, CheckError, ModelError, OptionError
from llmc.options import show_dims
from llmc.package.manifest import FunctionSpec, Manifest
from llmc.package.reader import Artifact, open_artifact
from llmc.perplexity import demand_length, perplexity

# In float32 only the order of additions differs. Rounded activations and weights change results by design: there the
# direction of an output must hold: strictly where the weights arrived rounded, less so where llmc rounded them.
FLOAT_RELATIVE = 2e-3
COSINE_ARRIVED, COSINE_8_BIT, COSINE_4_BIT = 0.99, 0.99, 0.90
_PIECES = (1, 17, 70, 1)  # tokens, one piece after another, with which sessions are compared
_EMULATED_PIECES = (1, 17, 1)
_EMULATED_CASES = 2  # and of sizes, the smaller ones
_FIXED_GRIDS = (
    "a model that rounds activations itself (QuantizeLinear, DynamicQuantizeLinear) does so differently in every "
    "engine, and llmc as they come: compare with the float model that it was made from"
)


@dataclass(frozen=True)
class OutputCheck:
    """One output of one call. `relative` is the largest error over the reference's largest magnitude.

    For logits also `top1`, the share of positions with the same likeliest token, and `kl`, the mean divergence
    KL(reference || artifact) in nats.
    """

    case: str
    output: str
    max_error: float
    relative: float
    cosine: float
    top1: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class CheckReport:
    """`cosine_bound` is what outputs must reach; None where nothing was rounded, and errors are bounded instead.
    `emulated`: the artifact's kernels ran on a CPU, and not on the GPU that they are for."""

    outputs: tuple[OutputCheck, ...]
    perplexity: dict[str, float]
    cosine_bound: float | None
    emulated: bool = False

    def demand(self) -> None:
        """Raises CheckError where an output is beyond its tolerance."""
        failed = [c for c in self.outputs if not self._holds(c)]
        if failed:
            c = max(failed, key=lambda c: (np.isnan(c.relative), c.relative))
            bound = f"cosine {self.cosine_bound}" if self.cosine_bound else f"relative error {FLOAT_RELATIVE}"
            raise CheckError(
                f"{len(failed)} of {len(self.outputs)} outputs are beyond {bound}; worst: relative error "
                f"{c.relative:.2e}, cosine {c.cosine:.5f}",
                where=f"output '{c.output}' at {c.case or 'fixed sizes'}",
                hint=_FIXED_GRIDS if self.cosine_bound else "compile with --dump-ir and compare the stages",
            )

    def _holds(self, c: OutputCheck) -> bool:
        """Caches of a rounded model are shown, not judged: single heads may turn far while the logits stay."""
        if self.cosine_bound is None:
            return c.relative <= FLOAT_RELATIVE
        return c.output.startswith("present") or c.cosine >= self.cosine_bound

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"passed": all(map(self._holds, self.outputs))}


def check(
    artifact: str | Path,
    onnx: str | Path,
    *,
    seed: int = 0,
    dims: Mapping[str, int] | None = None,
    text: str | Path | None = None,
    threads: int | None = None,
    emulate: bool = False,
) -> CheckReport:
    """Run both on the same inputs, drawn with `seed`, at several sizes of the symbolic dimensions (`dims` fixes some).

    With `text`, also the perplexity of both on that file. With `emulate`, an artifact for a GPU runs on the CPU, at
    fewer sizes; this process has an emulated GPU from then on. Raises OptionError where onnxruntime is not installed
    or emulation cannot be had, CheckError for what the emulator finds, and what loading either file raises;
    `CheckReport.demand` turns disagreement into an error.
    """
    opened = open_artifact(artifact)
    manifest = opened.manifest
    if text and emulate:
        raise OptionError("a text takes too long without a GPU", where="--emulate", hint="leave --text out")
    ids = _tokens(opened, text) if text else None
    rounded = manifest.decoder is not None and manifest.decoder.kv_cache != "float32"
    if rounded and dims:
        what = f"{artifact} keeps its cache rounded: it is checked as a session, which has no dimensions"
        raise OptionError(what, where="--dim", hint="leave --dim out")
    pieces = _EMULATED_PIECES if emulate else _PIECES
    cases = [] if rounded else samples.cases(_main(opened).symbols, dims or {})
    if emulate:
        from llmc import emulation

        cases = cases[:_EMULATED_CASES]
        emulation.prepare(opened, pieces if rounded else [emulation.rows(_main(opened).inputs, case) for case in cases])
    with emulation.judged(opened) if emulate else nullcontext():
        threads = threads or len(os.sched_getaffinity(0))
        reference = open_engine("onnxruntime", onnx, threads)
        ours = open_engine("llmc", artifact, threads)
        rng = np.random.default_rng(seed)
        if rounded:
            outputs = _sessions(manifest, reference, ours, pieces, rng)
        else:
            outputs = _calls(opened, reference, ours, cases, rng, Path(onnx))
        engines = {"onnxruntime": reference, "llmc": ours}
        scores = {name: perplexity(engine, ids) for name, engine in engines.items()} if ids is not None else {}
    return CheckReport(tuple(outputs), scores, cosine_bound(manifest), emulate)


def _calls(
    artifact: Artifact,
    reference: Engine,
    ours: Engine,
    cases: Sequence[dict[str, int]],
    rng: np.random.Generator,
    onnx: Path,
) -> list[OutputCheck]:
    """Every output of the plain signature, at several sizes."""
    main, manifest = _main(artifact), artifact.manifest
    _demand_same(main, artifact, reference, onnx)
    vocabulary = manifest.decoder.vocab_size if manifest.decoder else smallest_table(onnx)
    outputs = []
    for case in cases:
        case, inputs, expected = _reference(reference, main, case, rng, vocabulary)
        got = ours.call(inputs)
        mask = next((a for name, a in inputs.items() if "mask" in name and a.ndim == 2), None)
        outputs += [compare(show_dims(case), name, expected[name], got[name], manifest, mask) for name in expected]
    return outputs


def _sessions(
    manifest: Manifest, reference: Engine, ours: Engine, pieces: Sequence[int], rng: np.random.Generator
) -> list[OutputCheck]:
    """The logits of a session, which is all that a model with a rounded cache has: a prompt, then tokens after it."""
    assert manifest.decoder is not None
    longest = manifest.decoder.max_length or sum(pieces)
    outputs, length = [], 0
    for engine in (reference, ours):
        engine.reset()
    for piece in pieces:
        piece = min(piece, longest - length)
        if not piece:
            break
        ids = rng.integers(0, manifest.decoder.vocab_size, (1, piece))
        case = f"past={length}, seq={piece}"
        outputs.append(compare(case, "logits", reference.step(ids), ours.step(ids), manifest))
        length += piece
    return outputs


def _main(artifact: Artifact) -> FunctionSpec:
    """The function that is compared. Raises ArtifactError if there is none."""
    if "main" not in artifact.manifest.functions:
        raise ArtifactError("has no function main to compare", where=str(artifact.path))
    return artifact.manifest.functions["main"]


def _demand_same(main: FunctionSpec, artifact: Artifact, reference: Engine, onnx: Path) -> None:
    """Raises ModelError for another model's artifact."""
    for kind, ours, theirs in (
        ("inputs", main.inputs, reference.inputs),
        ("outputs", main.outputs, reference.outputs),
    ):
        names = [array.name for array in ours]
        if set(names) != set(theirs):
            raise ModelError(
                f"its {kind} are {', '.join(theirs)}; those of {artifact.path} are {', '.join(names)}",
                where=str(onnx),
                hint="give the ONNX file that the artifact was compiled from",
            )


def _reference(
    reference: Engine, main: FunctionSpec, case: dict[str, int], rng: np.random.Generator, vocabulary: int
) -> tuple[dict[str, int], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The case, its inputs, and what the reference makes of them.

    Where it refuses a batch (onnxruntime's GroupQueryAttention does, several tokens after a past), one row must do.
    """
    try:
        inputs = samples.make(main.inputs, case, rng, vocabulary) | _past(reference, main, case, rng, vocabulary)
        return case, inputs, reference.call(inputs)
    except ModelError:
        single = {name: 1 if "batch" in name else size for name, size in case.items()}
        if single == case:
            raise
        return _reference(reference, main, single, rng, vocabulary)


def _past(
    reference: Engine, main: FunctionSpec, case: Mapping[str, int], rng: np.random.Generator, vocabulary: int
) -> dict[str, np.ndarray]:
    """Caches as the reference leaves them after as many random tokens as `case` has in its past.

    Random numbers would be no test: attention to keys that no text makes tells nothing about rounding.
    """
    names = [a.name for a in main.inputs if a.name.startswith("past")]
    made = [a.name for a in main.outputs if a.name.startswith("present")]
    ids = next((a for a in main.inputs if a.name == "input_ids"), None)
    if not names or ids is None or len(names) != len(made):
        return {}
    past, seq = next(a for a in main.inputs if a.name == names[0]).shape[2], ids.shape[-1]
    if not (isinstance(past, str) and isinstance(seq, str) and case.get(past)):
        return {}
    outputs = reference.call(samples.make(main.inputs, {**case, seq: case[past], past: 0}, rng, vocabulary))
    return {name: outputs[present] for name, present in zip(names, made, strict=True)}


def compare(
    case: str, name: str, expected: np.ndarray, got: np.ndarray, manifest: Manifest, mask: np.ndarray | None = None
) -> OutputCheck:
    """Errors of one output; positions that `mask` [batch, seq] calls padding mean nothing, and do not count.

    Raises CheckError where the shapes differ.
    """
    if expected.shape != got.shape:
        raise CheckError(
            f"has shape {got.shape}, onnxruntime's has {expected.shape}", where=f"output '{name}' at {case}"
        )
    if mask is not None and expected.shape[:2] == mask.shape:
        expected, got = expected[mask != 0], got[mask != 0]
    a, b = expected.astype(np.float64), got.astype(np.float64)
    error = float(np.abs(a - b).max(initial=0))
    largest = float(np.abs(a).max(initial=0))
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float((a * b).sum() / norms) if norms else float(np.array_equal(a, b))
    top1 = kl = None
    if manifest.decoder and a.ndim > 1 and a.shape[-1] == manifest.decoder.vocab_size:
        top1 = float((a.argmax(-1) == b.argmax(-1)).mean())
        p, q = _log_softmax(a), _log_softmax(b)
        kl = float((np.exp(p) * (p - q)).sum(-1).mean())
    return OutputCheck(case, name, error, error / largest if largest else error, cosine, top1, kl)


def cosine_bound(manifest: Manifest) -> float | None:
    """The tolerance that an artifact's weights and cache call for; None where all of them are float."""
    weights = manifest.quantization.get("weights", [])
    kv_cache = manifest.decoder.kv_cache if manifest.decoder else "float32"
    if kv_cache == "int4":
        return COSINE_4_BIT
    if not weights:
        return None if kv_cache == "float32" else COSINE_8_BIT
    if manifest.quantization.get("format", "none") == "none":
        return COSINE_ARRIVED
    return COSINE_4_BIT if any("4-bit" in kind for kind in weights) else COSINE_8_BIT


def smallest_table(path: Path) -> int:
    """Rows of the smallest constant that the model looks ids up in: random ids must stay below."""
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's DecodeError is not of onnx's making
        raise ModelError(f"cannot be read as ONNX: {error}", where=str(path)) from None
    rows = {t.name: t.dims[0] for t in graph.initializer if t.dims}
    inputs = {i.name for i in graph.input}
    tables = [
        rows[n.input[0]] for n in graph.node if n.op_type == "Gather" and n.input[1] in inputs and n.input[0] in rows
    ]
    return min(tables, default=1000)


def _tokens(artifact: Artifact, text: str | Path) -> np.ndarray:
    """The tokens of a text file, int64 [n]. Raises OptionError for a file or a model that cannot be scored."""
    from llmc.runtime.text import Text

    if artifact.manifest.decoder is None:
        raise OptionError(f"{artifact.path} is no language model", where="--text", hint="leave --text out")
    try:
        content = Path(text).read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise OptionError(f"cannot read {text}: {reason}", where="--text", hint="give a plain text file") from None
    ids = np.array(Text(artifact).encode(content), np.int64)
    demand_length(ids)
    return ids


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))
