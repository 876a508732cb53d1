"""The table of weight formats: what `--quantize NAME` means."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmc.errors import OptionError
from llmc.schedules.formats import E4M3, TABLES
from llmc.targets.base import Target


@dataclass(frozen=True)
class Format:
    """How the weights of linear layers are stored, and in what the products are computed.

    `activations` "a8" multiplies 8-bit weights codes with activations rounded to int8 at run time, one scale per group;
    "a32" widens the weights and computes in float32; "bf16" rounds weights, and on tiles activations, to bfloat16,
    without groups; "f16" weights, and on GPUs activations, to float16; "fp8" is for GPUs alone, and rounds activations
    to E4M3 where they have such products, else to float16. `head_bits` is the output layer's own width: its errors
    reach the logits directly, so it stays 8-bit unless asked otherwise. group_size 0 is one scale for a whole row. With
    a `table` (of `schedules.formats.TABLES`, or E4M3) codes stand for its values; `powers` makes scales powers of two.
    `recipe` names what is done with statistics over a calibration set: "outliers" are multiplied in float32, "smooth"
    moves the differences between channels to the weights. `asymmetric` codes reach from a group's smallest element to
    its largest; those of 8 bits gain nothing by it and stay symmetric.
    """

    name: str
    bits: int
    group_size: int
    activations: str
    head_bits: int
    description: str
    table: str = ""
    powers: bool = False
    recipe: str = ""
    asymmetric: bool = False


def _format(bits: int, activations: str, group: int) -> Format:
    compute = "int8 activations" if activations == "a8" else "float activations"
    name = f"w{bits}{'a8' if activations == 'a8' else 'a16'}-{f'g{group}' if group else 'row'}"
    every = group or "row"
    return Format(name, bits, group, activations, 8, f"{bits}-bit weights, a scale for every {every}, {compute}")


def _table(name: str, table: str, activations: str, group: int, powers: bool = False) -> Format:
    compute = "int8 activations" if activations == "a8" else "float activations"
    full = f"{name}{'a8' if activations == 'a8' else 'a16'}-g{group}"
    scale = "a power of two" if powers else "a scale"
    return Format(
        full, 4, group, activations, 8, f"{name} weights, {scale} for every {group}, {compute}", table, powers
    )


_COMPUTE = ("a8", "a32")
FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        *(_format(bits, compute, group) for bits in (8, 4, 3, 2) for compute in _COMPUTE for group in (32, 64, 128)),
        *(_format(bits, compute, 0) for bits in (8, 4) for compute in _COMPUTE),
        *(_table(name, name, compute, group) for name in TABLES for compute in _COMPUTE for group in (32, 64)),
        *(_table("mxfp4", "fp4", compute, 32, powers=True) for compute in _COMPUTE),
    )
}
_ROW = "8-bit weights, a scale for every row, int8 activations"
FORMATS["w8a8-outliers"] = Format(
    "w8a8-outliers", 8, 0, "a8", 8, f"{_ROW}, outlying channels in float32", recipe="outliers"
)
FORMATS["w8a8-smooth"] = Format("w8a8-smooth", 8, 0, "a8", 8, f"{_ROW}, channels smoothed before", recipe="smooth")
FORMATS["bf16"] = Format("bf16", 16, 0, "bf16", 16, "weights rounded to bfloat16, float activations")
FORMATS["f16"] = Format("f16", 16, 0, "f16", 16, "weights rounded to float16, float activations")
FORMATS["fp8"] = Format(
    "fp8", 8, 0, "fp8", 8, "weights and activations in 8-bit floats (E4M3), a scale for every row; GPUs only", E4M3
)
# One scale for a whole row would save 2 % of the time and cost MiniLM 0.002 of its cosine: hence groups of 128.
ALIASES = {
    **{"w8a8": "w8a8-g128", "w8a16": "w8a16-g128", "w4a8": "w4a8-g32", "w4a16": "w4a16-g32"},
    **{"w3a8": "w3a8-g32", "w3a16": "w3a16-g32"},
    **{"nf4": "nf4a8-g64", "fp4": "fp4a8-g32", "mxfp4": "mxfp4a8-g32"},
}


def require_kernels(format: Format | None, target: Target) -> None:
    """Raises OptionError for a format that no kernel of the target computes."""
    if format is not None and format.table == E4M3 and target.kind != "cuda":
        raise OptionError(
            f"'{format.name}' is for GPUs: no kernel for {target.name} multiplies 8-bit floats",
            hint="--target cuda-sm90; here w8a16-row is as small, and more exact",
        )


def resolve_format(name: str) -> Format | None:
    """The format of that name; None for "none".

    After a name, "-asym" makes codes of fewer than 8 bits asymmetric, and "-head4" gives the output layer 4 bits too.
    Raises OptionError for an unknown name.
    """
    if name == "none":
        return None
    base, head, bits = name.partition("-head")
    plain = base.removesuffix("-asym")
    found = FORMATS.get(ALIASES.get(plain, plain))
    if found is not None and plain != base:
        if found.bits >= 8 or found.table:
            raise OptionError(f"'{name}': only codes of 2, 3 and 4 bits can be asymmetric", hint="leave out -asym")
        found = replace(found, name=f"{found.name}-asym", asymmetric=True)
    if found is not None and head and bits in ("4", "8") and found.bits < 16:
        return replace(found, name=f"{found.name}-head{bits}", head_bits=int(bits))
    if found is None or head:
        raise OptionError(
            f"there is no weight format '{name}'", hint="one of: none, " + ", ".join([*ALIASES, *FORMATS])
        )
    return found
