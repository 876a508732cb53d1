"""`llmc logs`: the tuning database and the text files that carry its records from machine to machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmc.cli.common import JsonFlag, one_line, print_json, print_table, stderr
from llmc.cli.tuning import DatabaseOption, SeedOption, show_ratio
from llmc.errors import OptionError

if TYPE_CHECKING:
    from llmc.tune.cost_model import CostModel
    from llmc.tune.database import Database
    from llmc.tune.overview import KeySummary
    from llmc.tune.record import Best

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
PredictOption = Annotated[str, typer.Option("--target", help="The target to predict for.")]
LogArgument = Annotated[Path, typer.Argument(help="A log: one record a line.")]


@app.command("list")
def list_(target: TargetOption = None, db: DatabaseOption = None, json: JsonFlag = False) -> None:
    """Show what was measured, or predicted, task by task.

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

    Tasks in which none beats the default are left out, and predictions where the same kernel was measured.

    \b
    Example:
      llmc logs best --target x86-avx512
    """
    from llmc.tune.overview import preferred

    summaries = [s for s in preferred(_summaries(db, target)) if s.best]
    if json:
        print_json([_as_json(s) for s in summaries])
        return
    rows = [
        (s.key.template, _ratio(s), _noise(s.best), one_line(dict(s.best.config)), s.key.cpu, s.key.workload)
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
def train(
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write, JSON.")],
    target: PredictOption = "native",
    seed: SeedOption = 0,
    db: DatabaseOption = None,
    json: JsonFlag = False,
) -> None:
    """Train the cost model on all that is known, and keep it.

    How well it ranks tasks that it has not seen is told by Kendall's tau, for both kinds of models; the better one is
    kept.

    \b
    Example:
      llmc logs train -o model.json
    """
    model = _learned(target, seed, db)
    if not model.prior:
        raise OptionError("nothing was measured yet", where="logs train", hint="`llmc tune` measures, and then train")
    model.save(output)
    if json:
        print_json({"output": str(output), "kind": model.kind, "kendall_tau": _quality(model)})
        return
    stderr().print(f"wrote {output}, a {model.kind}; {_told_quality(model)}", markup=False)


@app.command()
def explain(
    model: Annotated[
        Path | None, typer.Option(help="One that `llmc logs train` kept; default: trained on all that is known.")
    ] = None,
    target: PredictOption = "native",
    top: Annotated[int, typer.Option(min=1, help="How many features to show.")] = 20,
    seed: SeedOption = 0,
    db: DatabaseOption = None,
    json: JsonFlag = False,
) -> None:
    """Show which features the cost model goes by.

    How well it ranks tasks that it has not seen is told, too.

    \b
    Example:
      llmc logs explain --top 10
      llmc logs explain --model model.json
    """
    chosen = _kept(model) if model else _learned(target, seed, db)
    shares = chosen.explain(top)
    if json:
        print_json({"kind": chosen.kind, "kendall_tau": _quality(chosen), "features": shares})
        return
    print_table(("feature", "share"), [(name, f"{share:.1%}") for name, share in shares.items()], title=chosen.kind)
    stderr().print(_told_quality(chosen))


@app.command()
def explain_miss(
    artifact: Annotated[Path, typer.Argument(help="The .llmc file.")], db: DatabaseOption = None, json: JsonFlag = False
) -> None:
    """Show what the database knows of an artifact's kernels.

    Where a compilation would find nothing better than the default, it is told why: in which part of the key the nearest
    record differs.

    \b
    Example:
      llmc logs explain-miss model.llmc
    """
    from llmc import tuning

    subject = tuning.of_artifact(artifact)
    with _existing(db) as database:
        found = tuning.look_up(subject, database.path)
    for line in subject.left_out:
        stderr().print(f"  left out: {line}", markup=False)
    if json:
        print_json([asdict(f) for f in found])
        return
    rows = [
        (f.template, f.provenance, show_ratio(f.ratio, f.provenance.startswith("predicted")), f.miss, f.workload)
        for f in found
    ]
    print_table(("kernel", "found by", "of default", "missed because", "workload"), rows)


def _learned(target: str, seed: int, db: Path | None) -> CostModel:
    """The cost model as a search would start with it."""
    from llmc import options
    from llmc.tune.stage import learn

    with _existing(db) as database:
        return learn(database, options.resolve_target(target), seed)


def _kept(path: Path) -> CostModel:
    """The cost model that a file holds. Raises OptionError."""
    from llmc.tune.cost_model import CostModel

    try:
        return CostModel.load(path)
    except (ValueError, KeyError, TypeError, AttributeError):
        hint = "`llmc logs train -o model.json` writes one"
        raise OptionError("is no cost model", where=str(path), hint=hint) from None


def _quality(model: CostModel) -> dict[str, float | None]:
    """Kendall's tau by kind of model; None where there were too few tasks to tell."""
    return {kind: None if tau != tau else tau for kind, tau in model.quality.items()}


def _told_quality(model: CostModel) -> str:
    scores = (f"{kind} {'unknown' if tau is None else f'{tau:.2f}'}" for kind, tau in _quality(model).items())
    return f"Kendall's tau on tasks left out: {', '.join(scores)}"


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
    return show_ratio(summary.best.cost, summary.key.predicted) if summary.best else "default"


def _noise(best: Best) -> str:
    """Of a measurement."""
    return "" if best.predicted else f"±{best.noise:.1%}"


def _as_json(summary: KeySummary) -> dict[str, object]:
    key = {**asdict(summary.key), "predicted": summary.key.predicted}
    return {**key, "records": summary.statuses, "best": asdict(summary.best) if summary.best else None}
