"""`llmc tune`: better configurations of kernels, kept in the tuning database."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmc.cli.common import JsonFlag, human_seconds, one_line, print_json, print_table, stderr
from llmc.cli.tuning import (
    BudgetOption,
    DatabaseOption,
    SeedOption,
    TrialsOption,
    TuneView,
    noticing_interrupts,
    show_ratio,
)
from llmc.errors import KernelError, ModelError, OptionError

if TYPE_CHECKING:
    from llmc.pipeline import StageEvent
    from llmc.tune.effort import Elsewhere
    from llmc.tune.stage import KernelReport
    from llmc.tuning import Subject


def command(
    model: Annotated[
        Path | None, typer.Argument(help="An ONNX file, its external data beside it, or an artifact.")
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(help="Instead of MODEL: a kernel, its workload, as `llmc logs list` has them; may be repeated."),
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="Of each --workload: numbers of rows to compare at, as 1,128.")
    ] = None,
    target: Annotated[str, typer.Option(help="What to tune for; this machine must run it, or it is a GPU.")] = "native",
    quantize: Annotated[str, typer.Option(help="Format of an ONNX file's weights, as for `llmc compile`.")] = "none",
    dim: Annotated[
        list[str] | None, typer.Option(help="Fix or bound a symbolic dimension: batch=1, seq=1..4096; may be repeated.")
    ] = None,
    effort: Annotated[str, typer.Option(help="quick or full.")] = "quick",
    time_budget: BudgetOption = None,
    trials: TrialsOption = None,
    seed: SeedOption = 0,
    db: DatabaseOption = None,
    tracker: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Measure on devices that this RPC tracker knows, by --key.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="What the tracker calls the devices to measure on.")] = None,
    builders: Annotated[
        str | None, typer.Option(metavar="tcp://HOST:PORT", help="With --tracker: build on this dask cluster.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Search for faster kernels for a model or an artifact.

    What is measured goes to the tuning database at once, and `llmc compile` takes the best from there. An artifact
    itself does not change: compile its model again. Ctrl-C ends the search: what was found so far is verified (a second
    Ctrl-C skips that), summed up, and the exit code is 130.

    Kernels for a GPU are predicted where there is none: compiled, examined, and ranked by an analytic model. What was
    not measured says so wherever it is shown, and gives way to whatever is measured.

    \b
    Example:
      llmc tune model.onnx --quantize w4a8-g32 --effort full --time-budget 10m
      llmc tune model.llmc
      llmc tune --workload 'dense DenseLinearWorkload(N=960,K=576)' --rows 1,128
    """
    from llmc import options

    seconds = options.parse_duration(time_budget, "--time-budget") if time_budget else None
    dims = options.parse_dims(dim or ())
    counts = options.parse_counts(rows, "--rows") if rows is not None else ()
    if effort == "none":
        raise OptionError("nothing to do", where="--effort", hint="quick or full")
    elsewhere = _elsewhere(tracker, key, builders)
    onnx = _onnx(model, workload)
    if counts and model is not None:
        raise OptionError("a model's kernels have rows of their own", where="--rows", hint="--rows needs --workload")
    if onnx is None and (dims or quantize != "none"):
        name = "--dim" if dims else "--quantize"
        raise OptionError("artifacts and workloads say this themselves", where=name, hint=f"{name} needs an ONNX file")

    with noticing_interrupts() as interrupts, TuneView() as view:
        if onnx is not None:
            from llmc import pipeline

            left_out: tuple[str, ...] = ()
            kernels = pipeline.tune_model(
                onnx,
                target=target,
                quantize=quantize,
                dims=dims or None,
                progress=_stage,
                tune=effort,
                tune_seconds=seconds,
                trials=trials,
                seed=seed,
                database=db,
                tune_progress=view,
                elsewhere=elsewhere,
            ).kernels
        else:
            from llmc import tuning

            subject = _artifact(model, target) if model else tuning.of_workloads(workload or (), target, counts)
            left_out = subject.left_out
            kernels = tuning.tune(
                subject,
                effort,
                seconds=seconds,
                trials=trials,
                seed=seed,
                database=db,
                progress=view,
                elsewhere=elsewhere,
            )
    if json:
        print_json({"interrupted": bool(interrupts), "kernels": list(map(asdict, kernels)), "left_out": left_out})
    else:
        _show(kernels)
    for k in kernels:
        if k.error:
            stderr().print(f"could not be tuned: {k.error}", markup=False)
    if interrupts:
        raise typer.Exit(130)
    if kernels and all(k.error for k in kernels):
        raise typer.Exit(KernelError.exit_code)


def _elsewhere(tracker: str | None, key: str | None, builders: str | None) -> Elsewhere | None:
    """The devices to measure on; None for this machine. Raises OptionError."""
    if tracker and key:
        from llmc.tune.effort import Elsewhere

        return Elsewhere(tracker, key, builders or "")
    if tracker or key or builders:
        given = "--tracker" if tracker else "--key" if key else "--builders"
        raise OptionError("says too little", where=given, hint="devices are named by --tracker HOST:PORT and --key KEY")
    return None


def _onnx(model: Path | None, workload: list[str] | None) -> Path | None:
    """The ONNX file that is to be tuned; None for an artifact or workloads. Raises OptionError and ModelError.

    Artifacts are told by their first bytes, those of a zip, or their names: damaged ones are artifacts, too.
    """
    if (model is None) == (not workload):
        hint = "name an ONNX file or an artifact, or else give --workload"
        raise OptionError("nothing to tune" if model is None else "both a model and --workload", hint=hint)
    if model is None:
        return None
    if not model.is_file():
        raise ModelError("no such file", where=str(model), hint="give the path of the .onnx or .llmc file itself")
    with model.open("rb") as file:
        return None if file.read(4) == b"PK\3\4" or model.suffix == ".llmc" else model


def _artifact(path: Path, target: str) -> Subject:
    """An artifact's kernels, with remarks on standard error."""
    from llmc import tuning

    subject = tuning.of_artifact(path)
    if target not in ("native", name := subject.target.name):
        raise OptionError(f"{path} is built for {name}", where="--target", hint="leave --target out, or compile for it")
    for line in subject.left_out:
        stderr().print(f"  left out: {line}", markup=False)
    stderr().print(f"  {sum(subject.calls.values())} calls of {len(subject.calls)} kernels for {name}", markup=False)
    return subject


def _stage(event: StageEvent) -> None:
    stderr().print(f"  {event.name:<12} {human_seconds(event.seconds):>8}  {event.detail}", markup=False)


def _ratio(kernel: KernelReport) -> str:
    return show_ratio(kernel.ratio, kernel.provenance.startswith("predicted"))


def _show(kernels: list[KernelReport]) -> None:
    """A row a kernel: what a compilation now takes, and how its time compares with the default's."""
    rows = [
        (k.template, k.calls, k.trials, one_line(dict(k.failures)), _ratio(k), k.provenance, k.workload)
        for k in kernels
    ]
    print_table(("kernel", "calls", "trials", "failed", "of default", "found by", "workload"), rows)
