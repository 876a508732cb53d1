"""Every kind of hostile file: importing this fills the register."""

from tests.security import hostile_artifacts, hostile_bytes, hostile_graphs, hostile_tensors, hostile_values
from tests.security.kinds import KINDS

__all__ = ["KINDS", "hostile_artifacts", "hostile_bytes", "hostile_graphs", "hostile_tensors", "hostile_values"]
