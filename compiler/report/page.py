"""A report as one HTML page that needs nothing beside itself: styles and figures are in it, scripts there are none."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from llmc.package.replace import replacing
from llmc.report import Report, figures

_OFF = ("False", "None", "none", "0", "0.0", "")


def write(report: Report, path: Path) -> None:
    """Write the page, whole or not at all. Raises LlmcError if that fails."""
    page = render(report).encode()
    with replacing(path) as file:
        file.write(page)


def render(report: Report) -> str:
    """The page's text; equal reports give equal pages."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"workload": _workload, "config": _config}
    template = environment.from_string((files("llmc.report") / "page.html.j2").read_text(encoding="utf-8"))
    return template.render(report=report, figures=figures)


def _workload(key: str) -> str:
    """A workload's key without its class."""
    pairs = (pair.partition("=") for pair in key.partition("(")[2].removesuffix(")").split(","))
    return _config({name: value for name, _, value in pairs})


def _config(config: Mapping[str, Any]) -> str:
    """A configuration, or a workload as artifacts state it: what is off, zero or empty is left out."""
    shown = {name: str(value) for name, value in config.items() if str(value) not in _OFF}
    return ", ".join(name if value == "True" else f"{name} {_short(value)}" for name, value in shown.items())


def _short(value: str) -> str:
    """Numbers as people write them; others as they are."""
    return f"{float(value):g}" if "." in value and value.replace(".", "").replace("e-", "").isdecimal() else value
