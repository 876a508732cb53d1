"""What a machine is, read from files of machines that are not this one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from llmc.errors import OptionError
from llmc.options import fixed_dims, parse_counts, parse_dims, resolve_target, show_dims
from llmc.targets import detect
from llmc.targets.x86 import AMX, AVX2, AVX512

SKYLAKE = detect.Machine("Skylake", frozenset(AVX2.requires) | {"avx512f"}, 4, 32 << 10, 0, 0)


def test_native_is_the_widest_that_runs() -> None:
    assert detect.native(SKYLAKE).name == "x86-avx2"
    cascadelake = dataclasses.replace(SKYLAKE, flags=frozenset(AVX2.requires + AVX512.requires))
    assert detect.native(cascadelake).name == "x86-avx512"


def test_native_is_never_amx() -> None:
    """Nobody has measured it yet."""
    sapphire_rapids = dataclasses.replace(SKYLAKE, flags=frozenset(AVX2.requires + AMX.requires))
    assert not sapphire_rapids.missing(AMX) and detect.native(sapphire_rapids).name == "x86-avx512"
    with pytest.raises(OptionError, match="no target runs on this machine"):
        detect.native(sapphire_rapids, [AMX])


def test_native_takes_the_machines_caches_and_nothing_else() -> None:
    best = detect.native(dataclasses.replace(SKYLAKE, l1_bytes=48 << 10, l2_bytes=3 << 20))
    assert best == dataclasses.replace(AVX2, l1_bytes=48 << 10, l2_bytes=3 << 20)


def test_no_target_runs() -> None:
    with pytest.raises(OptionError, match="no target runs on this machine"):
        detect.native(dataclasses.replace(SKYLAKE, flags=frozenset({"sse2"})))


def test_missing_flags_are_named() -> None:
    assert "avx512_vnni" in SKYLAKE.missing(AVX512)
    assert SKYLAKE.missing(AVX2) == []


def test_cpuinfo() -> None:
    text = "processor\t: 0\nmodel name\t: A CPU: fast\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nmodel name\t: other\n"
    assert detect._cpuinfo(text) == {"processor": "0", "model name": "A CPU: fast", "flags": "fpu avx2"}


def test_caches(tmp_path: Path) -> None:
    for i, (kind, level, size) in enumerate([("Data", 1, "48K"), ("Instruction", 1, "32K"), ("Unified", 2, "2M")]):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, value in (("type", kind), ("level", level), ("size", size)):
            (folder / name).write_text(f"{value}\n")
    assert detect._caches(tmp_path) == {1: 48 << 10, 2: 2 << 20}
    assert detect._caches(tmp_path / "none") == {}


def test_unknown_target_names_a_near_one() -> None:
    with pytest.raises(OptionError, match="did you mean x86-avx512"):
        resolve_target("x86-avx-512")


def test_dimensions() -> None:
    dims = parse_dims(["batch=1", "seq=1..4096"])
    assert dims == {"batch": 1, "seq": (1, 4096)}
    assert show_dims(dims) == "batch=1, seq=1..4096"


@pytest.mark.parametrize(
    "wrong", ["batch", "=1", "seq=", "seq=a", "seq=1..", "seq=..4", "seq=5..4", "b=0", "b=-1", "b=1..2..3"]
)
def test_wrong_dimensions(wrong: str) -> None:
    with pytest.raises(OptionError):
        parse_dims([wrong])


def test_a_dimension_is_given_once() -> None:
    with pytest.raises(OptionError, match="twice"):
        parse_dims(["b=1", "b=2"])


def test_fixed_dimensions_refuse_ranges() -> None:
    assert fixed_dims(["b=2"]) == {"b": 2}
    with pytest.raises(OptionError, match="one size"):
        fixed_dims(["b=1..2"])


def test_counts() -> None:
    assert parse_counts("128, 512", "--prefill") == (128, 512)
    for wrong in ("", "0", "1,,2", "x"):
        with pytest.raises(OptionError, match="--prefill"):
            parse_counts(wrong, "--prefill")
