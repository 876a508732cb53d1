"""`llmc compile`: an ONNX file to an artifact."""

from __future__ import annotations

import contextlib
import tempfile
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmc.cli.common import JsonFlag, human_bytes, human_seconds, print_json, print_pairs, stderr
from llmc.cli.tuning import BudgetOption, DatabaseOption, SeedOption, TrialsOption, TuneView
from llmc.errors import ModelError, OptionError

if TYPE_CHECKING:
    from llmc.pipeline import StageEvent


def command(
    model: Annotated[Path, typer.Argument(help="The ONNX file; its external data lies beside it.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The artifact to write; default: MODEL's name with .llmc, here."),
    ] = None,
    target: Annotated[str, typer.Option(help="What to build for; `llmc targets` lists them.")] = "native",
    quantize: Annotated[str, typer.Option(help="Format of the weights: none, w8a8, w8a8-outliers, w4a8 ...")] = "none",
    calibrate: Annotated[
        Path | None,
        typer.Option(help="Samples for formats that need them: a text, or an .npz with the model's inputs by name."),
    ] = None,
    kv_cache: Annotated[
        str,
        typer.Option(help="What sessions keep keys and values in: float32, int8, fp8, or int4; paged, or int8,paged."),
    ] = "float32",
    draft_trees: Annotated[
        bool, typer.Option("--draft-trees", help="Have sessions verify trees of draft tokens in one pass.")
    ] = False,
    dim: Annotated[
        list[str] | None, typer.Option(help="Fix or bound a symbolic dimension: batch=1, seq=1..4096; may be repeated.")
    ] = None,
    tune: Annotated[str, typer.Option(help="Search for better kernels first: none, quick or full.")] = "none",
    time_budget: BudgetOption = None,
    trials: TrialsOption = None,
    seed: SeedOption = 0,
    db: DatabaseOption = None,
    dump_ir: Annotated[Path | None, typer.Option(help="Write one readable file a stage into this folder.")] = None,
    json: JsonFlag = False,
) -> None:
    """Compile an ONNX model into one file.

    The file runs without the compiler; `llmc inspect` shows what is in it. Kernels get the best configurations that the
    tuning database and llmc's own logs know; --tune measures more of them first. Ctrl-C meanwhile ends the tuning, and
    the compilation goes on with what was found.

    \b
    Example:
      llmc compile model.onnx --target x86-avx512 --quantize w4a8-g32 -o model.llmc
    """
    from llmc import options

    output = output or Path(model.with_suffix(".llmc").name)
    if not model.is_file():
        raise ModelError("no such file", where=str(model), hint="give the path of the .onnx file itself")
    chosen = options.resolve_target(target)
    dims = options.parse_dims(dim or ())
    budget = options.parse_duration(time_budget, "--time-budget") if time_budget else None
    _demand_writable(output)

    from llmc import pipeline
    from llmc.quantize.formats import resolve_format

    format = resolve_format(quantize)
    console = stderr()
    resolved = {
        "model": f"{model} ({human_bytes(_model_bytes(model))})",
        "target": f"{chosen.name}{' (native)' if target == 'native' else ''}: {chosen.description}",
        "quantize": f"{format.name}: {format.description}" if format else "none: weights stay as they are",
        **({"calibrate": calibrate} if calibrate else {}),
        "kv cache": kv_cache,
        "dims": options.show_dims(dims) or "as in the model",
        "output": output,
    }
    print_pairs(resolved, console)

    stages: dict[str, float] = {}
    started = time.perf_counter()
    with TuneView() as view, console.status("compiling") as status:

        def compiling(event: StageEvent) -> None:
            view.stop()
            if event.name == "select":
                status.stop()  # its thread would disturb what the next stage times
            else:
                status.start()
            stages[event.name] = event.seconds
            line = f"  {event.name:<12} {human_seconds(event.seconds):>8}  {event.detail}"
            console.print(line, markup=False)
            status.update(f"compiling, after {event.name}")

        artifact = pipeline.compile(
            model,
            target=target,
            quantize=quantize,
            dims=dims or None,
            dump_ir=dump_ir,
            progress=compiling,
            calibrate=calibrate,
            kv_cache=kv_cache,
            draft_trees=draft_trees,
            tune=tune,
            tune_seconds=budget,
            trials=trials,
            seed=seed,
            database=db,
            tune_progress=view,
        )
        artifact.save(output)
    seconds, size = time.perf_counter() - started, output.stat().st_size
    if json:
        print_json({"output": str(output), "bytes": size, "seconds": seconds, "stages": stages, "target": chosen.name})
    else:
        console.print(f"wrote {output}, {human_bytes(size)}, in {human_seconds(seconds)}", markup=False)


def _demand_writable(output: Path) -> None:
    """Find out before minutes of work whether their result can be written, and what it would replace."""
    if output.exists() and not _is_artifact(output):
        raise OptionError("exists and is not an llmc artifact", where=str(output), hint="choose another --output")
    try:
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise OptionError(
            f"cannot write there: {error.strerror}", where=str(output.parent), hint="choose another --output"
        ) from None


def _is_artifact(path: Path) -> bool:
    with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        return "manifest.json" in archive.namelist()
    return False


def _model_bytes(model: Path) -> int:
    """The file and its usual companion of external data."""
    return sum(p.stat().st_size for p in (model, model.with_name(model.name + ".data")) if p.is_file())
