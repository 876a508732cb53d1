"""The targets that attention kernels are tested for: those this CPU can run."""

from __future__ import annotations

import pytest

from llmc.targets.base import Target
from llmc.targets.x86 import TARGETS

from .harness import missing_flags


@pytest.fixture(scope="module", params=sorted(TARGETS))
def target(request: pytest.FixtureRequest) -> Target:
    target = TARGETS[request.param]
    if missing := missing_flags(target):
        pytest.skip(f"this CPU lacks {', '.join(sorted(missing))}")
    return target
