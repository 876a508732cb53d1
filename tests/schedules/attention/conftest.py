"""The targets that attention kernels are tested for: those this CPU can run."""

from __future__ import annotations

import pytest

from llmc.targets.base import Target
from llmc.targets.detect import machine
from llmc.targets.x86 import TARGETS


@pytest.fixture(scope="module", params=sorted(TARGETS))
def target(request: pytest.FixtureRequest) -> Target:
    target = TARGETS[request.param]
    if missing := machine().missing(target):
        pytest.skip(f"CPU lacks {missing}")
    return target
