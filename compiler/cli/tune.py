"""`llmc tune`: better configurations for a model's kernels, kept in the tuning database."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmc.cli.common import JsonFlag, human_seconds, one_line, print_json, print_table, stderr
from llmc.cli.tuning import BudgetOption, DatabaseOption, SeedOption, TrialsOption, TuneView, noticing_interrupts
from llmc.errors import ModelError, OptionError

if TYPE_CHECKING:
    from llmc.pipeline import StageEvent, Tuned


def command(
    model: Annotated[Path, typer.Argument(help="The ONNX file; its external data lies beside it.")],
    target: Annotated[str, typer.Option(help="What to tune for; this machine must run it.")] = "native",
    quantize: Annotated[str, typer.Option(help="Format of the weights, as for `llmc compile`.")] = "none",
    dim: Annotated[
        list[str] | None, typer.Option(help="Fix or bound a symbolic dimension: batch=1, seq=1..4096; may be repeated.")
    ] = None,
    effort: Annotated[str, typer.Option(help="quick or full.")] = "quick",
    time_budget: BudgetOption = None,
    trials: TrialsOption = None,
    seed: SeedOption = 0,
    db: DatabaseOption = None,
    json: JsonFlag = False,
) -> None:
    """Search for faster kernels for a model.

    What is measured goes to the tuning database at once, and `llmc compile` takes the best from there. Ctrl-C ends the
    search: what was found so far is verified (a second Ctrl-C skips that), summed up, and the exit code is 130.

    \b
    Example:
      llmc tune model.onnx --quantize w4a8-g32 --effort full --time-budget 10m
    """
    from llmc import options

    if not model.is_file():
        raise ModelError("no such file", where=str(model), hint="give the path of the .onnx file itself")
    seconds = options.parse_duration(time_budget, "--time-budget") if time_budget else None
    dims = options.parse_dims(dim or ())
    if effort == "none":
        raise OptionError("nothing to do", where="--effort", hint="quick or full")

    from llmc import pipeline

    console = stderr()

    def stage(event: StageEvent) -> None:
        console.print(f"  {event.name:<12} {human_seconds(event.seconds):>8}  {event.detail}", markup=False)

    with noticing_interrupts() as interrupts, TuneView() as view:
        tuned = pipeline.tune_model(
            model,
            target=target,
            quantize=quantize,
            dims=dims or None,
            progress=stage,
            tune=effort,
            tune_seconds=seconds,
            trials=trials,
            seed=seed,
            database=db,
            tune_progress=view,
        )
    if json:
        print_json({"interrupted": bool(interrupts), "kernels": [asdict(k) for k in tuned.kernels]})
    else:
        _show(tuned)
    if interrupts:
        raise typer.Exit(130)


def _show(tuned: Tuned) -> None:
    """A row a kernel: what a compilation now takes, and how its time compares with the default's."""
    rows = [
        (k.template, k.calls, k.trials, one_line(dict(k.failures)), f"{k.ratio:.3f}", k.provenance, k.workload)
        for k in tuned.kernels
    ]
    print_table(("kernel", "calls", "trials", "failed", "of default", "found by", "workload"), rows)
