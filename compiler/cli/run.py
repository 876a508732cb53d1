"""`llmc run`: call an artifact's main function on arrays from files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmc.cli.common import JsonFlag, ThreadsOption, print_json, print_table
from llmc.errors import InputError, OptionError

if TYPE_CHECKING:
    import numpy as np


def command(
    artifact: Annotated[Path, typer.Argument(help="The .llmc file.")],
    input: Annotated[list[str] | None, typer.Option(help="NAME=FILE.npy; once for every input of the model.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the outputs to this .npz file.")] = None,
    threads: ThreadsOption = None,
    json: JsonFlag = False,
) -> None:
    """Run a compiled model on arrays from .npy files.

    \b
    Example:
      llmc run encoder.llmc --input input_ids=ids.npy --input attention_mask=mask.npy -o out.npz
    """
    from llmc.package.replace import replacing
    from llmc.runtime import load

    arrays = _read(input or ())
    outputs = load(artifact, threads=threads).main(arrays)
    if output is not None:
        import numpy as np

        with replacing(output) as file:
            np.savez(file, allow_pickle=False, **outputs)
    summary = {name: _summary(array) for name, array in outputs.items()}
    if json:
        print_json(summary)
    else:
        rows = [
            (n, s["dtype"], " × ".join(map(str, s["shape"])), s["min"], s["mean"], s["max"]) for n, s in summary.items()
        ]
        print_table(("output", "dtype", "shape", "min", "mean", "max"), rows)


def _read(items: Iterable[str]) -> dict[str, np.ndarray]:
    import numpy as np

    arrays: dict[str, np.ndarray] = {}
    for item in items:
        name, equals, file = item.partition("=")
        if not (name and equals and file):
            raise OptionError(f"'{item}' is not an input", where="--input", hint="write NAME=FILE.npy")
        if name in arrays:
            raise OptionError(f"input '{name}' is given twice", where="--input", hint="give it once")
        try:
            array = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"cannot be read as .npy: {error}", where=file) from None
        if not isinstance(array, np.ndarray):
            raise InputError("holds several arrays", where=file, hint="save each with numpy.save, as .npy")
        arrays[name] = array
    return arrays


def _summary(array: np.ndarray) -> dict[str, Any]:
    low, mean, high = (float(f"{f():.6g}") for f in (array.min, array.mean, array.max)) if array.size else (None,) * 3
    return {"dtype": array.dtype.name, "shape": list(array.shape), "min": low, "mean": mean, "max": high}
