"""What a machine is: one frozen description per target. Plain data; nothing here imports TVM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Measured = Literal["native", "rpc", "emulated", "predicted"]


@dataclass(frozen=True)
class Target:
    """One machine that kernels are built for.

    Sizes are bytes, `lanes` counts 32-bit elements of one vector register. `dot` names the 8-bit dot product that
    the target has: `vnni` multiplies u8 by s8 and adds four products into an int32 lane in one instruction,
    `maddubs` does the same in three and saturates at int16 in between. `tiles`: it has AMX's, for int8 and bfloat16.
    GPUs (`llmc.targets.cuda`) have fields of their own, and no `dot`.
    """

    name: str
    kind: str  # TVM's target kind: "llvm", "cuda"
    mcpu: str
    mattr: tuple[str, ...]
    lanes: int
    vector_registers: int
    dot: Literal["vnni", "maddubs", "none"]
    requires: tuple[str, ...]  # CPU flags (spelled as in /proc/cpuinfo) without which the code cannot run
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int
    description: str = ""
    tiles: bool = False

    def tvm(self) -> dict[str, Any]:
        """The dictionary from which TVM makes its own target object."""
        target: dict[str, Any] = {"kind": self.kind, "mcpu": self.mcpu}
        if self.mattr:
            target["mattr"] = list(self.mattr)
        return target
