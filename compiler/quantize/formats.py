"""The table of weight formats: what `--quantize NAME` means."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.errors import OptionError

WHOLE_ROW = 0  # as a group size: one scale for each output channel


@dataclass(frozen=True)
class Format:
    """How the weights of linear layers are stored, and in what the products are computed.

    `activations` "a8" multiplies 8-bit weights codes with activations rounded to int8 at run time, one scale per group;
    "a32" widens the weights and computes in float32. `head_bits` is the output layer's own width: its errors reach the
    logits directly, so it stays 8-bit unless asked otherwise.
    """

    name: str
    bits: int
    group_size: int
    activations: str
    head_bits: int
    description: str


def _format(bits: int, activations: str, group: int) -> Format:
    suffix = f"-g{group}" if group else ""
    compute = "int8 activations" if activations == "a8" else "float activations"
    grouping = f"a scale for every {group} weights" if group else "a scale for every output channel"
    name = f"w{bits}{'a8' if activations == 'a8' else 'a16'}{suffix}"
    return Format(name, bits, group, activations, 8, f"{bits}-bit weights, {grouping}, {compute}")


_ALL = [
    _format(8, "a8", WHOLE_ROW),
    _format(8, "a8", 32),
    _format(8, "a32", WHOLE_ROW),
    *(_format(4, activations, group) for activations in ("a8", "a32") for group in (32, 64, 128)),
]
FORMATS: dict[str, Format] = {f.name: f for f in _ALL}
ALIASES = {"w4a8": "w4a8-g32", "w4a16": "w4a16-g32", "int8": "w8a8", "int4": "w4a8-g32"}


def resolve_format(name: str) -> Format | None:
    """The format of that name; None for "none". Raises OptionError for an unknown name."""
    if name == "none":
        return None
    found = FORMATS.get(ALIASES.get(name, name))
    if found is None:
        raise OptionError(f"there is no weight format '{name}'", hint="one of: none, " + ", ".join(FORMATS))
    return found
