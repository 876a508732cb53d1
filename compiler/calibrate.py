"""The calibrate stage: the model, compiled in float32 for this machine, measures on samples what its layers read."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from llmc import samples
from llmc.artifact import describe
from llmc.build import build
from llmc.errors import ArtifactError, InputError, OptionError
from llmc.fuse import fuse
from llmc.graph import Graph
from llmc.lower import lower
from llmc.options import resolve_target
from llmc.quantize.formats import Format
from llmc.quantize.observe import Statistics, linear_inputs, observe, statistics
from llmc.runtime import Model, load
from llmc.select import select
from llmc.tune import choose_configs

PIECE, PIECES = 512, 16  # tokens of a text that are one call, and how many calls there are at most
_ROWS = 8  # of a batch in one call
_OPTION = "--calibrate"


def resolve_calibration(data: str | Path | None, format: Format | None) -> Path | None:
    """The file that a format's recipe needs. Raises OptionError where there is none, or one that nothing reads."""
    if format is None or not format.recipe:
        if data is not None:
            what = f"{format.name if format else 'none'} needs no calibration"
            raise OptionError(what, where=_OPTION, hint="leave it out, or choose a format that does")
        return None
    if data is None:
        hint = "llmc compile --calibrate FILE: a text, or an .npz with the model's inputs; llmc tune takes the artifact"
        raise OptionError(f"{format.name} needs samples of what the model reads", where=_OPTION, hint=hint)
    if not Path(data).is_file():
        raise OptionError(
            f"no such file: {data}", where=_OPTION, hint="give a text, or an .npz with the model's inputs"
        )
    return Path(data)


def calibrate(graph: Graph, model: Path, data: Path) -> Statistics:
    """Statistics of what the linear layers of `graph` read, over `data`: a text, which the tokenizer beside the
    file `model` cuts into tokens, or an .npz with the model's inputs by name, the batch along their first axis.

    Raises OptionError where the model cannot read the data, and for a machine that runs no target.
    """
    if not linear_inputs(graph):
        what = f"{model} has no linear layers that a format would round"
        raise OptionError(what, where="--quantize", hint="compile it with --quantize none")
    machine = resolve_target("native")
    plan = select({"main": fuse(observe(graph))}, machine)
    choices = choose_configs(plan.calls(), machine, None)
    lowered = lower(plan, {kernel: choice.config for kernel, choice in choices.items()}, machine)
    with (folder := tempfile.TemporaryDirectory(prefix="llmc-")) as name:
        workspaces = build(lowered.module, machine, Path(name) / "lib.so")
        artifact = describe(model, machine, None, plan, choices, lowered, None, workspaces, folder)
        artifact.save(Path(name) / "observed.llmc")
        observed = load(Path(name) / "observed.llmc")
        try:
            found = statistics(graph, ([*observed.main(call).values()] for call in _calls(observed, data)))
        except InputError as error:
            raise OptionError(
                f"{data}: {error.what}", where=_OPTION, hint="give inputs as the model takes them"
            ) from error
    rows = found.largest.values()
    if not rows or not all(np.isfinite(row).all() for row in rows):
        what = "makes values that are no numbers" if rows else "holds no samples"
        raise OptionError(f"{data} {what}", where=_OPTION, hint="give samples of what the model will read")
    return found


def _calls(model: Model, data: Path) -> Iterator[Mapping[str, np.ndarray]]:
    return _batches(model, data) if data.suffix == ".npz" else _pieces(model, data)


def _batches(model: Model, data: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """The arrays of an .npz, a few rows of the batch at a time where all inputs have one."""
    try:
        with np.load(data, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise OptionError(f"cannot read {data}: {error}", where=_OPTION, hint="write it with numpy.savez") from None
    batch = {spec.shape[0] if spec.shape else 1 for spec in model.inputs}
    sizes = {array.shape[0] if array.ndim else 1 for array in arrays.values()}
    if len(batch) != 1 or len(sizes) != 1 or not isinstance(batch.pop(), str):
        yield arrays
        return
    for first in range(0, sizes.pop(), _ROWS):
        yield {name: array[first : first + _ROWS] for name, array in arrays.items()}


def _pieces(model: Model, data: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """The tokens of a text, in pieces with an empty past; a last one that is shorter counts where it may be."""
    spec = next((s for s in model.inputs if s.name == "input_ids" and len(s.shape) == 2), None)
    if spec is None:
        what = f"{data} is taken for a text, and the model has no input_ids [batch, sequence]"
        raise OptionError(what, where=_OPTION, hint="give an .npz with the model's inputs by name")
    ids, symbol = _tokens(model, data), spec.shape[1]
    if isinstance(symbol, int):
        length = least = symbol
    else:
        low, high = model.main.spec.symbols.get(symbol, (1, None))
        least, length = max(low, 1), min(PIECE, high or PIECE)
    case = samples.cases(model.main.spec.symbols, {})[0]  # of a batch of one and no past
    for first in range(0, min(len(ids), PIECES * length), length):
        piece = ids[first : first + length]
        if len(piece) < least:
            break
        dims = case | ({} if isinstance(symbol, int) else {symbol: len(piece)})
        inputs = samples.make(model.inputs, dims, np.random.default_rng(0), vocabulary=1)
        yield inputs | {spec.name: piece[None].astype(spec.dtype)}


def _tokens(model: Model, data: Path) -> np.ndarray:
    """int64 [n]."""
    try:
        content = data.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise OptionError(f"cannot read {data}: {reason}", where=_OPTION, hint="give a text, or an .npz") from None
    try:
        ids = np.array(model.text.encode(content), np.int64)
    except ArtifactError as error:
        hint = "put the model's tokenizer.json beside it, or give an .npz with its inputs"
        raise OptionError(f"the text needs a tokenizer: {error.what}", where=_OPTION, hint=hint) from None
    if not len(ids):
        raise OptionError(f"{data} holds no tokens", where=_OPTION, hint="give some hundred words at least")
    return ids
