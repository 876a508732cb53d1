"""`llmc check`: does an artifact compute what its ONNX model says?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmc.cli.common import JsonFlag, ThreadsOption, print_json, print_pairs, print_table, stdout
from llmc.errors import ModelError


def command(
    artifact: Annotated[Path, typer.Argument(help="The .llmc file.")],
    model: Annotated[Path, typer.Argument(help="The ONNX file it was compiled from; onnxruntime runs it.")],
    text: Annotated[
        Path | None, typer.Option(help="Also compare the perplexity of a language model on this text file.")
    ] = None,
    dim: Annotated[list[str] | None, typer.Option(help="Size of a dimension, as in batch=2; default: several.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    emulate: Annotated[
        bool, typer.Option("--emulate", help="Run an artifact for a GPU on the CPU: small models, at few sizes.")
    ] = False,
    threads: ThreadsOption = None,
    json: JsonFlag = False,
) -> None:
    """Compare an artifact with onnxruntime.

    Both run on the same random inputs, at several sizes. The exit code is 9 if they disagree.

    \b
    Example:
      llmc check model.llmc model.onnx
      llmc check gpu.llmc model.onnx --emulate
    """
    from llmc import options
    from llmc.checker import check

    if not model.is_file():
        raise ModelError(
            "no such file", where=str(model), hint="give the ONNX file that the artifact was compiled from"
        )
    dims = options.fixed_dims(dim or ())
    report = check(artifact, model, seed=seed, dims=dims, text=text, threads=threads, emulate=emulate)
    if json:
        print_json(report.as_json())
    else:
        columns = ("sizes", "output", "max error", "relative", "cosine", "top-1", "KL")
        print_table(columns, [(c.case, c.output, *_figures(c)) for c in report.outputs])
        if report.perplexity:
            print_pairs({f"perplexity, {k}": f"{v:.4f}" for k, v in report.perplexity.items()}, stdout())
        if report.emulated:
            stdout().print("functionally emulated; not run on a GPU")
    report.demand()


def _figures(c: object) -> tuple[str, ...]:
    def show(name: str, format: str) -> str:
        value = getattr(c, name)
        return "" if value is None else f"{value:{format}}"

    return (
        show("max_error", ".2e"),
        show("relative", ".2e"),
        show("cosine", ".6f"),
        show("top1", ".1%"),
        show("kl", ".2e"),
    )
