"""How much tuning a user asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from llmc.errors import OptionError
from llmc.gpu.toolchain import find_toolchain
from llmc.targets.base import Target
from llmc.targets.cuda import CudaTarget, runs
from llmc.targets.detect import compute_capability, machine
from llmc.tune.database import Database, default_path


@dataclass(frozen=True)
class Effort:
    """Trials for each task on average, candidates a batch, and seconds for everything, verification included."""

    trials: int
    batch: int
    seconds: float


EFFORTS = {
    "none": Effort(trials=0, batch=0, seconds=0),
    "quick": Effort(trials=16, batch=4, seconds=180),
    "full": Effort(trials=96, batch=4, seconds=900),
}


@dataclass(frozen=True)
class Elsewhere:
    """Devices that an RPC tracker at `tracker` (host:port) knows by `key`; `builders` is the address of a dask
    scheduler whose workers build, or empty: then this machine builds."""

    tracker: str
    key: str
    builders: str = ""


@dataclass(frozen=True)
class Tuning:
    """How kernels are to be tuned: what `stage.tune_kernels` needs besides them. `elsewhere` is where candidates run;
    None: here. With `predicted` none runs: an analytic model of the target ranks them."""

    effort: Effort
    seed: int
    database: Path
    elsewhere: Elsewhere | None = None
    predicted: bool = False


def resolve_tuning(
    effort: str,
    target: Target,
    seconds: float | None = None,
    trials: int | None = None,
    seed: int = 0,
    database: Path | None = None,
    elsewhere: Elsewhere | None = None,
) -> Tuning | None:
    """What a user asks for; None for "none". `seconds` and `trials` (a task) replace those of the effort.

    Kernels for GPUs are predicted where there is none to measure on.

    Everything that would stop the search is found here, before minutes of other work. Raises OptionError for an
    unknown effort, for limits without one, for a target whose code this machine cannot run, unless candidates run
    `elsewhere`, and where NVIDIA's compiler is missing; DatabaseError.
    """
    if effort not in EFFORTS:
        raise OptionError(f"no tuning effort '{effort}'", hint=f"known: {', '.join(EFFORTS)}")
    if effort == "none":
        if seconds is not None or trials is not None:
            raise OptionError("a time budget or trials without tuning", hint="add --tune quick or --tune full")
        return None
    if isinstance(target, CudaTarget):
        find_toolchain()
    if elsewhere is None and (missing := machine().missing(target)):
        raise OptionError(
            f"this machine cannot tune for it: it lacks {', '.join(missing)}",
            where=f"target {target.name}",
            hint="name a device with --tracker and --key, or tune on a machine that runs the target and bring its "
            "records with `llmc logs export` and `import`",
        )
    path = database or default_path()
    Database(path).close()
    limits = EFFORTS[effort]
    limits = replace(limits, seconds=seconds or limits.seconds, trials=trials or limits.trials)
    here = not isinstance(target, CudaTarget) or runs(target, compute_capability())
    predicted = elsewhere is None and not here
    return Tuning(limits, seed, path, elsewhere, predicted)
