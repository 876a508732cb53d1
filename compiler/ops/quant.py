"""WIP"""

from __future__ import annotations

from llmc.ops.context import Rule

RULES: dict[str, Rule] = {}
