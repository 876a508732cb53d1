"""The command line: one file a verb. Nothing computes here, and nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from llmc.cli import bench, check, compile, generate, inspect, logs, report, run, targets, tune
from llmc.errors import LlmcError

# Help without rich: it costs 60 ms at every start, and the text must also read well in a pipe.
app = typer.Typer(
    name="llmc",
    help="Compile ONNX models, language models above all, into fast single-file artifacts.\n\n"
    "\b\n"
    "Example:\n"
    "  llmc compile model.onnx --quantize w4a8-g32 -o model.llmc\n"
    '  llmc generate model.llmc "What is the capital of France?"\n'
    "\n"
    "\b\n"
    "Exit codes: 0 done, 2 wrong option, 3 bad model, 4 unsupported operators,\n"
    "  5 shapes, 6 bad artifact, 7 wrong inputs, 8 kernel, 9 check failed, 130 interrupted, 1 anything else.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (compile, tune, run, generate, bench, check, inspect, report, targets):
    app.command(verb.__name__.rpartition(".")[2])(verb.command)
app.add_typer(logs.app, name="logs")


def _show_version(wanted: bool) -> None:
    if wanted:
        from llmc import __version__

        typer.echo(f"llmc {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; anywhere on the line.")
    ] = False,
) -> None:
    """Both are read before a verb runs: --version above, --debug in `main`."""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code. An LlmcError is one message, without a traceback."""
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words
    try:
        app(args=[w for w in words if w != "--debug"], prog_name="llmc")
    except SystemExit as done:
        if done.code == 130:
            _complain("interrupted")
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except Exception as error:
        explained = _explain(error)
        if debug or explained is None:
            raise
        message, code = explained
        _complain(message)
        return code
    return 0


def _explain(error: Exception) -> tuple[str, int] | None:
    """The message for a user and the exit code; None for a mistake of llmc's own, which deserves its traceback."""
    if isinstance(error, LlmcError):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("llmc"):
        hint = "pip install 'llmc[compile]' installs the compiler"
        return f"this needs the module {error.name}, which is not installed\n  hint: {hint}", LlmcError.exit_code
    if isinstance(error, OSError):
        where = str(error.filename) if error.filename else None
        return str(LlmcError(error.strerror or str(error), where=where, hint=_remedy(error))), LlmcError.exit_code
    if isinstance(error, MemoryError):
        hint = "close other programs, or use a machine with more memory"
        return str(LlmcError("out of memory", hint=hint)), LlmcError.exit_code
    return None


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space or choose another disk; TMPDIR names the folder for temporary files"
    return "choose a file or folder that exists and that you may use"


def _complain(message: str) -> None:
    print(f"llmc: {message}", file=sys.stderr)
