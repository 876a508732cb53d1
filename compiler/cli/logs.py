"""`llmc logs`: the tuning database and the text files that carry its records from machine to machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmc.cli.common import JsonFlag, one_line, print_json, print_table, stderr
from llmc.cli.tuning import DatabaseOption, SeedOption
from llmc.errors import OptionError

if TYPE_CHECKING:
    from llmc.tune.database import Database
    from llmc.tune.overview import KeySummary

app = typer.Typer(
    help="See tuning records, and carry them between machines.\n\n"
    "\b\n"
    "Example:\n"
    "  llmc logs export mine.jsonl\n"
    "  llmc logs import mine.jsonl --db other.db",
    no_args_is_help=True,
    rich_markup_mode=None,
)

TargetOption = Annotated[str | None, typer.Option("--target", help="Only records of this target.")]
LogArgument = Annotated[Path, typer.Argument(help="A log: one record a line.")]


@app.command("list")
def list_(target: TargetOption = None, db: DatabaseOption = None, json: JsonFlag = False) -> None:
    """Show what was measured, task by task.

    \b
    Example:
      llmc logs list
    """
    summaries = _summaries(db, target)
    if json:
        print_json([_as_json(s) for s in summaries])
        return
    rows = [
        (s.key.template, one_line(s.statuses), _ratio(s), s.key.target_name, s.key.cpu, s.key.workload)
        for s in summaries
    ]
    print_table(("kernel", "records", "of default", "target", "measured on", "workload"), rows)


@app.command()
def best(target: TargetOption = None, db: DatabaseOption = None, json: JsonFlag = False) -> None:
    """Show every task's best configuration.

    Tasks in which none beats the default are left out.

    \b
    Example:
      llmc logs best --target x86-avx512
    """
    summaries = [s for s in _summaries(db, target) if s.best]
    if json:
        print_json([_as_json(s) for s in summaries])
        return
    rows = [
        (s.key.template, _ratio(s), f"±{s.best.noise:.1%}", one_line(dict(s.best.config)), s.key.cpu, s.key.workload)
        for s in summaries
        if s.best
    ]
    print_table(("kernel", "of default", "", "config", "measured on", "workload"), rows)


@app.command()
def export(log: LogArgument, target: TargetOption = None, db: DatabaseOption = None) -> None:
    """Write the database's records as a log.

    \b
    Example:
      llmc logs export mine.jsonl --target x86-avx512
    """
    from llmc import options
    from llmc.tune import logs

    chosen = options.resolve_target(target) if target else None
    with _existing(db) as database:
        count = logs.export(database, log, chosen)
    stderr().print(f"wrote {log}, {count} records", markup=False)


@app.command("import")
def import_(log: LogArgument, db: DatabaseOption = None) -> None:
    """Add a log's records to the database.

    All of them or, if a line is malformed, none.

    \b
    Example:
      llmc logs import theirs.jsonl
    """
    from llmc.tune import logs
    from llmc.tune.database import Database

    logs.read(log)  # before a database is made for nothing
    with Database(db) as database:
        count = logs.import_(database, log)
        stderr().print(f"{count} new records in {database.path}", markup=False)


@app.command()
def merge(
    inputs: Annotated[list[Path], typer.Argument(metavar="LOG...", help="Logs to unite.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The log to write; may be one of the others.")],
) -> None:
    """Unite logs: sorted, every record once.

    \b
    Example:
      llmc logs merge a.jsonl b.jsonl -o all.jsonl
    """
    from llmc.tune import logs

    count = logs.merge(inputs, output)
    stderr().print(f"wrote {output}, {count} records", markup=False)


@app.command()
def prune(
    log: LogArgument,
    keep: Annotated[int, typer.Option(min=1, help="Records a task: half the best, half of the rest.")] = 64,
) -> None:
    """Make a log smaller.

    What compilations and the cost model need most stays.

    \b
    Example:
      llmc logs prune mine.jsonl --keep 32
    """
    from llmc.tune import logs

    count = logs.prune(log, keep)
    stderr().print(f"{count} records left in {log}", markup=False)


@app.command()
def explain(
    target: Annotated[str, typer.Option(help="The target to predict for.")] = "native",
    top: Annotated[int, typer.Option(min=1, help="How many features to show.")] = 20,
    seed: SeedOption = 0,
    db: DatabaseOption = None,
    json: JsonFlag = False,
) -> None:
    """Show which features the cost model goes by.

    It is trained on all that is known; how well it ranks tasks that it has not seen is told, too.

    \b
    Example:
      llmc logs explain --top 10
    """
    from llmc import options
    from llmc.tune.stage import learn

    with _existing(db) as database:
        model = learn(database, options.resolve_target(target), seed)
    shares = model.explain(top)
    quality = {kind: None if tau != tau else tau for kind, tau in model.quality.items()}
    if json:
        print_json({"kind": model.kind, "kendall_tau": quality, "features": shares})
        return
    scores = ", ".join(f"{kind} {'unknown' if tau is None else f'{tau:.2f}'}" for kind, tau in quality.items())
    print_table(("feature", "share"), [(name, f"{share:.1%}") for name, share in shares.items()], title=model.kind)
    stderr().print(f"Kendall's tau on tasks left out: {scores}")


def _existing(db: Path | None) -> Database:
    """The database to read from. Raises OptionError where there is none yet, rather than make an empty one."""
    from llmc.tune.database import Database, default_path

    path = db or default_path()
    if not path.is_file():
        raise OptionError("no such tuning database", where=str(path), hint="`llmc tune` makes one; --db names another")
    return Database(path)


def _summaries(db: Path | None, target: str | None) -> list[KeySummary]:
    from llmc import options
    from llmc.tune.overview import overview

    chosen = options.resolve_target(target) if target else None
    with _existing(db) as database:
        return overview(database.records(target=chosen))


def _ratio(summary: KeySummary) -> str:
    return f"{summary.best.cost:.3f}" if summary.best else "default"


def _as_json(summary: KeySummary) -> dict[str, object]:
    return {**asdict(summary.key), "records": summary.statuses, "best": asdict(summary.best) if summary.best else None}
