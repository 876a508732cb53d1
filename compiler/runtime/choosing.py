"""Reading tokens and choosing what follows: on the host from logits, or on a GPU, which then sends tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from llmc.runtime.sampling import Sampler, Sampling, not_finite
from llmc.runtime.session import Session


class Chooser(Protocol):
    def __call__(self, ids: Any, ended: Sequence[bool]) -> list[int | None]:
        """Have the session read ids, as `Session.append` takes them; the token chosen for each row, None for those that
        have ended. Raises KernelError if a row's best logit is not a finite number."""


class HostChooser:
    """A sampler for each row, all with the same seed."""

    def __init__(self, session: Session, sampling: Sampling) -> None:
        self._session = session
        self._samplers = [Sampler(sampling) for _ in range(session.batch)]

    def __call__(self, ids: Any, ended: Sequence[bool]) -> list[int | None]:
        rows = zip(self._samplers, self._session.append(ids), ended, strict=True)
        return [None if done else sampler(logits) for sampler, logits, done in rows]


class DeviceChooser:
    """The artifact's own function draws, with the host's random numbers: one stream of them for each row."""

    def __init__(self, session: Session, sampling: Sampling) -> None:
        self._session, rows = session, session.batch
        self._draws = sampling.temperature > 0
        self._random = [np.random.default_rng(sampling.seed) for _ in range(rows)]
        self._settings: dict[str, np.ndarray] = {
            "temperature": np.full(rows, sampling.temperature, np.float32),
            "top_k": np.full(rows, sampling.top_k, np.int64),
            "top_p": np.full(rows, sampling.top_p, np.float32),
            "uniform": np.zeros(rows, np.float32),
        }

    def __call__(self, ids: Any, ended: Sequence[bool]) -> list[int | None]:
        if self._draws:
            drawn = [0.0 if done else r.random(dtype=np.float32) for r, done in zip(self._random, ended, strict=True)]
            self._settings["uniform"][:] = drawn
        tokens = self._session.sample(ids, **self._settings).tolist()
        for token, done in zip(tokens, ended, strict=True):
            if token < 0 and not done:
                raise not_finite("the model's best logit is not a finite number")
        return [None if done else token for token, done in zip(tokens, ended, strict=True)]


def chooser(session: Session, sampling: Sampling) -> Chooser:
    """On the device, where the session's caches lie there and the artifact can sample."""
    model = session.model
    on_device = model.memory.on_device and "sample" in model.functions
    return DeviceChooser(session, sampling) if on_device else HostChooser(session, sampling)
