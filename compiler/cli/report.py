"""`llmc report`: what tuning tried, found and gained, as one page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmc.cli.common import JsonFlag, human_bytes, print_json, stderr
from llmc.cli.tuning import DatabaseOption
from llmc.errors import OptionError

if TYPE_CHECKING:
    from llmc.report.profiles import Profiles

_PROMPT = 128  # tokens


def command(
    artifact: Annotated[
        Path | None, typer.Argument(help="A .llmc file: adds its kernels' times and rooflines on this machine.")
    ] = None,
    before: Annotated[
        Path | None, typer.Option(help="The same model compiled untuned, to compare ARTIFACT with.")
    ] = None,
    db: DatabaseOption = None,
    target: Annotated[str | None, typer.Option(help="Only records of this target.")] = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="How long to profile an artifact for each task, in steps of 2.")
    ] = 4,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page to write; default: report.html, without --json.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Write a page about tuning: search, kernels, rooflines.

    It shows every task's search and result, and how well the cost model ranks tasks that it has not seen. With an
    artifact also where a model's time goes, and with --before what tuning changed in that: both are profiled in turns,
    a prompt of 128 tokens and the next token of a language model, one call of any other. The page holds all that it
    needs. Figures take matplotlib: pip install 'llmc[report]'.

    \b
    Example:
      llmc report model.llmc --before untuned.llmc -o report.html
    """
    from llmc import options
    from llmc.report import collect
    from llmc.tune.database import Database, default_path

    if before and not artifact:
        raise OptionError("--before needs an artifact to compare with", hint="llmc report TUNED --before UNTUNED")
    path = db or default_path()
    if not path.is_file():
        raise OptionError("no such tuning database", where=str(path), hint="`llmc tune` makes one; --db names another")
    output = output or (None if json else Path("report.html"))
    if output:  # what stands in the page's way shows before anything is measured
        from llmc.report import page

        if not output.parent.is_dir():
            raise OptionError("no such folder", where=str(output.parent), hint="choose another --output")
    chosen = options.resolve_target(target) if target else None
    with Database(path) as database, stderr().status("reading") as status:
        profiles = _profiles(artifact, before, seconds, status.update) if artifact else None
        status.update("judging the cost model")
        report = collect(database, chosen, profiles)
    if output:
        page.write(report, output)
        stderr().print(f"wrote {output}, {human_bytes(output.stat().st_size)}", markup=False)
    if json:
        print_json(report.as_json())


def _profiles(artifact: Path, before: Path | None, seconds: float, progress: Callable[[str], None]) -> Profiles:
    from llmc import bench
    from llmc.cli.bench import call_task
    from llmc.package.reader import open_artifact
    from llmc.report.profiles import take_profiles

    manifest = open_artifact(artifact).manifest
    tasks = bench.decoder_tasks((_PROMPT,), 1) if manifest.decoder else [call_task(manifest, [])]
    return take_profiles(artifact, before, tasks, seconds, progress)
