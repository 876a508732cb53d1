"""WIP"""

from __future__ import annotations

from llmc.targets.base import Target
from llmc.tvm_shim import IRModule, TvmTarget, relax, tvm


def legalize_and_schedule(mod: IRModule, target: Target) -> IRModule:
    with TvmTarget(target.tvm()):
        return tvm.transform.Sequential(
            [
                relax.transform.LegalizeOps(),
                relax.transform.FoldConstant(),
                relax.transform.AnnotateTIROpPattern(),
                relax.transform.FuseOps(),
                relax.transform.FuseTIR(),
            ]
        )(mod)
