"""The register of hostile files: each kind is a function that writes one into a folder, and words of its refusal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Make = Callable[[Path], Path | None]  # None where this system cannot make it


@dataclass(frozen=True)
class Kind:
    """`make` writes the file into an empty folder and returns its path; `says` stands in the one-line refusal."""

    make: Make
    says: str

    @property
    def name(self) -> str:
        return self.make.__name__


KINDS: dict[str, Kind] = {}


def kind(says: str) -> Callable[[Make], Make]:
    """Registers a function as a kind of hostile file."""

    def register(make: Make) -> Make:
        assert make.__name__ not in KINDS
        KINDS[make.__name__] = Kind(make, says)
        return make

    return register
