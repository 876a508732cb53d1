"""`llmc bench`: how fast an artifact is, alone or against other engines in the same run."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmc.cli.common import JsonFlag, ThreadsOption, one_line, print_json, print_pairs, print_table, stderr, stdout
from llmc.errors import LlmcError, ModelError, OptionError

if TYPE_CHECKING:
    from llmc.bench import Contestant, Result, Task
    from llmc.package.manifest import Manifest


def command(
    artifact: Annotated[Path, typer.Argument(help="The .llmc file.")],
    prefill: Annotated[str, typer.Option(help="Prompt lengths of a language model.")] = "128,512",
    decode: Annotated[int, typer.Option(min=0, help="Tokens to generate after a prompt of 128.")] = 64,
    context: Annotated[str | None, typer.Option(help="Generate after longer prompts too, as 2048,8192.")] = None,
    batch: Annotated[str | None, typer.Option(help="Generate for so many sequences at once too, as 4,8.")] = None,
    dim: Annotated[
        list[str] | None, typer.Option(help="Size of a dimension of any other model: batch=1, seq=128.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Peers: onnxruntime, onnxruntime-genai, openvino, openvino-int4, llama.cpp.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="The ONNX file that the peers run.")] = None,
    gguf: Annotated[
        Path | None, typer.Option(help="The GGUF file that llama.cpp runs; llama-bench must be on the PATH.")
    ] = None,
    threads: ThreadsOption = None,
    repeat: Annotated[int, typer.Option(min=1, help="Measured rounds, after one of warming up.")] = 5,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show instead where the time goes, kernel by kernel.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Measure an artifact, alone or against its peers.

    Tokens per second of a language model, ms a call of any other: medians of interleaved rounds. Logits are computed
    for every position, by llmc and by its peers; what is generated is the likeliest token each time (llama.cpp takes
    random ones, after random prompts of its own). With --profile, the time of each kernel and how near it comes to its
    roofline: what this machine's measured arithmetic and memory would allow. That needs the compiler installed.

    \b
    Example:
      llmc bench model.llmc --prefill 128,512 --decode 64 --against onnxruntime --model model.onnx
    """
    from llmc import bench, options
    from llmc.package.reader import open_artifact

    lengths = options.parse_counts(prefill, "--prefill")
    contexts = options.parse_counts(context, "--context") if context else ()
    batches = options.parse_counts(batch, "--batch") if batch else ()
    peers = [name.strip() for name in against.split(",")] if against else []
    if profile and peers:
        raise OptionError("--profile looks into llmc alone", hint="give --profile and --against one after the other")
    contestants = [bench.Contestant("llmc", artifact), *(_contestant(name, model, gguf) for name in peers)]
    manifest = open_artifact(artifact).manifest
    if manifest.decoder:
        tasks = bench.decoder_tasks(lengths, decode, contexts, batches)
    else:
        tasks = [call_task(manifest, dim or [])]
    if profile:
        _profile(artifact, tasks, threads, json)
        return
    console = stderr()
    with console.status("measuring") as status:
        results = bench.compare(
            contestants,
            tasks,
            threads=threads or len(os.sched_getaffinity(0)),
            repeat=repeat,
            vocabulary=manifest.decoder.vocab_size if manifest.decoder else 1000,
            progress=status.update,
        )
    ours = results["llmc"]
    if isinstance(ours, LlmcError):
        raise ours
    if json:
        print_json({name: bench.as_json(result) for name, result in results.items()})
    else:
        _show(tasks, results)


def _contestant(name: str, model: Path | None, gguf: Path | None) -> Contestant:
    """The peer `name` on its file. Raises OptionError for an unknown peer or a file not given, ModelError for none."""
    from llmc.bench import Contestant
    from llmc.engines import demand_engine

    demand_engine(name)
    path, what, option = (gguf, "GGUF", "--gguf") if name == "llama.cpp" else (model, "ONNX", "--model")
    if path is None:
        raise OptionError(
            f"{name} needs the {what} file that it runs", where="--against", hint=f"add {option} model.{what.lower()}"
        )
    if not path.is_file():
        hint = "give the ONNX file that the artifact was compiled from" if what == "ONNX" else "give a GGUF file"
        raise ModelError("no such file", where=str(path), hint=hint)
    return Contestant(name, path)


def _profile(artifact: Path, tasks: list[Task], threads: int | None, json: bool) -> None:
    """Where the time goes, task by task, against what the machine can do."""
    from llmc.profile import profile

    with stderr().status("profiling") as status:
        limits, profiles = profile(artifact, tasks, threads=threads, progress=status.update)
    if json:
        print_json({"ceilings": asdict(limits), "profile": {name: p.as_json() for name, p in profiles.items()}})
        return
    peaks = ", ".join(f"{ops / 1e9:.0f} G{unit}/s" for unit, ops in limits.peaks.items())
    print_pairs({"ceilings": f"{peaks}, reads {limits.bandwidth / 1e9:.1f} GB/s"}, stdout())
    for name, p in profiles.items():
        rows: list[tuple[object, ...]] = [
            (o.name, o.calls, *_figures(o.seconds, p.seconds), f"{o.ops / o.seconds / 1e9:.0f}",
             f"{o.bytes / o.seconds / 1e9:.1f}", f"{o.roofline:.0%}", one_line(o.workload))
            for o in p.operators
        ]  # fmt: skip
        rest = {"virtual machine": p.machine, "Python": p.python, "waits": p.waits, "in all": p.seconds}
        rows += [(what, "", *_figures(seconds, p.seconds), "", "", "", "") for what, seconds in rest.items()]
        columns = ("kernel", "calls", "ms", "share", "Gop/s", "GB/s", "of roofline", "workload")
        print_table(columns, rows, title=f"\n{name}")


def _figures(seconds: float, total: float) -> tuple[str, str]:
    return f"{seconds * 1e3:.3f}", f"{seconds / total:.1%}"


def call_task(manifest: Manifest, dim: list[str]) -> Task:
    """One call of the main function at the sizes of --dim; 1 and 128 where none is given."""
    import numpy as np

    from llmc import bench, options, samples

    main = manifest.functions["main"]
    given = options.fixed_dims(dim)
    unknown = set(given) - set(main.symbols)
    if unknown:
        raise OptionError(f"the model has no dimension '{min(unknown)}'", hint=f"it has: {', '.join(main.symbols)}")
    dims = {
        s: given.get(s, 1 if "batch" in s else 128 if high is None else min(128, high))
        for s, (_, high) in main.symbols.items()
    }
    inputs = samples.make(main.inputs, dims, np.random.default_rng(0), vocabulary=1000)
    return bench.Task(options.show_dims(dims) or "call", inputs=inputs)


def _show(tasks: list[Task], results: dict[str, Any]) -> None:
    """A row an engine; every figure as median [lowest–highest], with its speed relative to llmc's."""
    ours: Result = results["llmc"]
    rows, notes = [], []
    for name, result in results.items():
        if isinstance(result, LlmcError):
            notes.append(f"{name} did not take part: {result}")
            continue
        cells = []
        for task in tasks:
            f = result.figures[task.name]
            speed = f.median / ours.figures[task.name].median
            ratio = f"  {speed if task.work else 1 / speed:.2f}×" if len(results) > 1 else ""
            cells.append(f"{f.median:.4g} [{f.low:.4g}–{f.high:.4g}]{ratio}")
        rows.append((name, *cells, f"{result.load_s:.2f}", f"{result.peak_rss_mb:.0f}"))
    unit = "tok/s" if tasks[0].work else "ms"
    print_table(("engine", *(f"{t.name}, {unit}" for t in tasks), "load, s", "peak, MB"), rows)
    for note in notes:
        stderr().print(note, markup=False)
