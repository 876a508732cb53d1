"""What `llmc targets` says that a machine can do."""

from __future__ import annotations

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
