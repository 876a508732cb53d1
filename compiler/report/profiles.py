"""Where a model's time goes, before and after tuning: two artifacts' profiles, taken in turns on one machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmc.bench import Task
from llmc.errors import OptionError
from llmc.package.manifest import Manifest
from llmc.package.reader import open_artifact
from llmc.profile import SECONDS, Ceilings, Operator, Profile, profile


@dataclass(frozen=True)
class TaskProfile:
    """One task, and the same of the artifact `before`, where there is one."""

    after: Profile
    before: Profile | None = None

    @property
    def operators(self) -> Iterator[tuple[Operator, Operator | None]]:
        """Each kernel with its counterpart before, by falling time."""
        known = {o.name: o for o in self.before.operators} if self.before else {}
        return ((o, known.get(o.name)) for o in self.after.operators)


@dataclass(frozen=True)
class Profiles:
    """Profiles by task, the machine's ceilings, and the names of the artifacts."""

    artifact: str
    before: str | None
    ceilings: Ceilings
    tasks: Mapping[str, TaskProfile]


def take_profiles(
    artifact: Path,
    before: Path | None,
    tasks: Sequence[Task],
    seconds: float,
    progress: Callable[[str], None] = lambda message: None,
) -> Profiles:
    """Profile `artifact`, in turns with `before`, for `seconds` a task each, in steps of `profile.SECONDS`.

    Of several turns the least times count: a busy moment then spoils neither side. Raises OptionError if the
    artifacts hold different kernels, and what loading them raises.
    """
    paths = [artifact] if before is None else [artifact, before]
    if before is not None:
        _demand_same(artifact, before)
    taken: list[dict[str, Profile]] = [{} for _ in paths]
    for _ in range(max(1, round(seconds / SECONDS))):
        for profiles, path in zip(taken, paths, strict=True):
            ceilings, new = profile(path, tasks, progress=progress)
            profiles |= {name: _least(profiles[name], p) if name in profiles else p for name, p in new.items()}
    pairs = {t.name: TaskProfile(*(profiles[t.name] for profiles in taken)) for t in tasks}
    return Profiles(str(artifact), None if before is None else str(before), ceilings, pairs)


def _least(a: Profile, b: Profile) -> Profile:
    """Two profiles of one task: the lesser of each time."""
    known = {o.name: o for o in b.operators}
    operators = (min(o, known[o.name], key=lambda o: o.seconds) for o in a.operators)
    by_time = sorted(operators, key=lambda o: -o.seconds)
    return Profile(min(a.seconds, b.seconds), tuple(by_time), min(a.machine, b.machine), min(a.python, b.python))


def _demand_same(artifact: Path, before: Path) -> None:
    """Raises OptionError unless both are one model, quantised alike, for one target: only then do the parts of a
    profile compare."""
    ours, theirs = (_parts(open_artifact(path).manifest) for path in (artifact, before))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise OptionError(
                f"does not compare with {artifact}: its {name} is {theirs.get(name, 'absent')}, "
                f"there it is {ours.get(name, 'absent')}",
                where=str(before),
                hint="compile one model for one target with the same options, untuned and tuned",
            )


def _parts(manifest: Manifest) -> dict[str, str]:
    """What must agree, by name, in words: all but configurations and layouts, which are what tuning changes."""
    functions = {
        f"function {name}": ", ".join(f"{i.name} {i.dtype}[{', '.join(map(str, i.shape))}]" for i in f.inputs)
        for name, f in manifest.functions.items()
    }
    kernels = {f"kernel {k.name}": f"{k.template} {k.workload}, called {k.calls} times" for k in manifest.kernels}
    return {"target": manifest.target.name} | functions | kernels
