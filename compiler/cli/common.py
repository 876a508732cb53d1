"""What every verb needs: output as a table or as JSON, sizes for readers. Heavy imports wait until they are used."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

JsonFlag = Annotated[bool, typer.Option("--json", help="Print data as JSON on standard output.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Threads to use; default: every core.")]


def stdout() -> Console:
    """A console for results. In a pipe, lines are never folded to a terminal's width."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 400)


def stderr() -> Console:
    """Progress and remarks go here, so that standard output holds results alone."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def print_pairs(pairs: Mapping[str, object], console: Console) -> None:
    """Aligned `name value` lines."""
    from rich.markup import escape

    width = max(map(len, pairs), default=0)
    for name, value in pairs.items():
        console.print(f"[dim]{name:<{width}}[/]  {escape(str(value))}")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
    """A plain table on standard output; columns of numbers are aligned right."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for i, name in enumerate(columns):
        numbers = all(isinstance(row[i], (int, float)) for row in rows)
        table.add_column(name, justify="right" if numbers and rows else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    stdout().print(table)


def human_bytes(n: int) -> str:
    """`n` bytes for a reader, in decimal units."""
    size = float(n)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def human_seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def one_line(value: Any) -> str:
    """A manifest's free-form value on one line; what is off, zero or empty is left out."""
    if isinstance(value, dict):
        return ", ".join(
            f"{k} {one_line(v)}".strip() for k, v in value.items() if v not in (None, False, 0, 0.0, "", [], "none")
        )
    if isinstance(value, list):
        return "; ".join(map(one_line, value))
    return f"{value:g}" if isinstance(value, float) else "" if value is None or value is True else str(value)
