"""llmc itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llmc.engines.base import ROOM, Engine
from llmc.runtime import load


class ArtifactEngine(Engine):
    def __init__(self, path: Path, threads: int) -> None:
        self.model = load(path, threads=threads)
        if self.model.manifest.decoder is not None:
            self.session = self.model.session()

    def call(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.model.main(inputs)

    def reset(self, batch: int = 1, room: int = ROOM) -> None:
        if batch == self.session.batch:
            self.session.reset()
        else:
            self.session = self.model.session(batch)
        self.session.reserve(room)

    def step(self, ids: np.ndarray) -> np.ndarray:
        return self.session.append(ids, all=True)
