"""Which target serves which GPU."""

from __future__ import annotations

import pytest

from llmc.errors import OptionError
from llmc.options import resolve_target
from llmc.targets import detect
from llmc.targets.cuda import SM80, SM90, SM90A, CudaTarget, newest, runs


@pytest.mark.parametrize(
    ("capability", "target"),
    [(None, SM80), ((7, 5), SM80), ((8, 0), SM80), ((8, 9), SM80), ((9, 0), SM90), ((12, 0), SM90)],
)
def test_cuda_is_the_newest_that_the_gpu_runs(
    capability: tuple[int, int] | None, target: CudaTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detect, "compute_capability", lambda: capability)
    assert newest(capability) is resolve_target("cuda") is target


def test_a_gpu_runs_what_is_not_newer_than_itself() -> None:
    assert runs(SM80, (8, 0)) and runs(SM80, (9, 0)) and runs(SM90, (9, 0))
    assert not runs(SM90, (8, 9)) and not runs(SM80, (7, 5)) and not runs(SM80, None)


def test_only_hopper_runs_hoppers_own_instructions() -> None:
    assert runs(SM90A, (9, 0)) and resolve_target("cuda-sm90a") is SM90A
    assert not runs(SM90A, (8, 9)) and not runs(SM90A, (10, 0)) and not runs(SM90A, None)


def test_names() -> None:
    assert resolve_target("cuda-sm90") is SM90
    with pytest.raises(OptionError, match="no target 'cuda-sm85'"):
        resolve_target("cuda-sm85")
