"""What `llmc targets` says that a machine can do."""

from __future__ import annotations

import json

import pytest

from llmc.targets import detect
from llmc.targets.x86 import AMX, AVX2, AVX512
from tests.cli.conftest import Call


@pytest.mark.parametrize(
    ("flags", "amx"),
    [
        (AVX2.requires, "compiles only: this CPU lacks amx_bf16, amx_int8, amx_tile, avx512_vnni"),
        (AVX512.requires, "compiles; emulated in tests only: this CPU lacks amx_bf16, amx_int8, amx_tile"),
        (AMX.requires, "compiles, runs, measures"),
    ],
    ids=["AVX2", "AVX-512", "AMX"],
)
def test_what_a_machine_can_do_with_amx(
    llmc: Call, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], amx: str
) -> None:
    here = detect.Machine("A CPU", frozenset((*AVX2.requires, *flags)), 2, 0, 0, 0)
    monkeypatch.setattr(detect, "machine", lambda: here)
    code, out, _ = llmc("targets")
    row = out[out.index("x86-amx") :]
    assert code == 0 and " ".join(amx.split()) in " ".join(row.split())


@pytest.mark.parametrize(
    ("capability", "here"),
    [
        (None, ["compiles only: no NVIDIA GPU here"] * 3),
        ((8, 6), ["compiles, loads", *["compiles only: the GPU here is sm_86"] * 2]),
        ((9, 0), ["compiles, loads"] * 3),
        ((10, 0), ["compiles, loads"] * 2 + ["compiles only: the GPU here is sm_100"]),
    ],
)
def test_what_a_machine_can_do_with_gpus(
    llmc: Call, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, here: list[str]
) -> None:
    monkeypatch.setattr(detect, "compute_capability", lambda: capability)
    code, out, _ = llmc("targets")
    rows = [line for line in out.splitlines() if line.startswith("cuda-sm")]
    assert code == 0 and all(said in row for row, said in zip(rows, here, strict=True))
    targets = json.loads(llmc("targets", "--json")[1])["targets"]
    assert targets["cuda-sm90"]["missing"] == (
        [] if here[1] == "compiles, loads" else ["an NVIDIA GPU of sm_90 or later"]
    )
