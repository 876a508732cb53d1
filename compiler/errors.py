"""The one exception hierarchy of llmc.

Every message says what happened, where (node, op, domain, file), and what to do. The command line prints the
message alone and exits with the class's `exit_code`; a traceback appears only with `--debug`.
"""

from __future__ import annotations

import re

# Control characters, line separators, marks that change the direction of text, halves of characters: a name with one of
# them does not fit into a line, or makes a terminal do something. Names from files are refused for it.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class LlmcError(Exception):
    """Base of every error that llmc raises on purpose.

    `what` happened, `where` it happened (a node, a file, an input name), and `hint`: what the user can do.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        lines = [f"{where}: {what}" if where else what]
        if hint:
            lines.append(f"  hint: {hint}")
        super().__init__("\n".join(lines))


class OptionError(LlmcError):
    """A command-line or API option has no such value, or two options contradict each other."""

    exit_code = 2


class ModelError(LlmcError):
    """The ONNX file is damaged, hostile, or not a valid model."""

    exit_code = 3


class UnsupportedError(ModelError):
    """The model is valid, but holds nodes that llmc cannot compile; all of them are listed at once."""

    exit_code = 4


class ShapeError(ModelError):
    """Shapes contradict each other, or depend on data where they may not."""

    exit_code = 5


class ArtifactError(LlmcError):
    """A `.llmc` file is damaged, was altered, or needs what this machine does not have."""

    exit_code = 6


class InputError(LlmcError):
    """A compiled model was called with inputs of the wrong names, types or shapes."""

    exit_code = 7


class KernelError(LlmcError):
    """A kernel template was asked for something outside its contract, or its code failed to build."""

    exit_code = 8


class CheckError(LlmcError):
    """A compiled model's results differ from its reference's by more than the stated tolerance."""

    exit_code = 9
