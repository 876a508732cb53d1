"""A measurement or prediction with everything that decides whether it applies elsewhere, and its one-line text form."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

from llmc.schedules.base import Config
from llmc.targets.base import Target
from llmc.targets.detect import gpu, machine
from llmc.tune.task import Measurement, Point, Predicted, Status, Task, Timing
from llmc.tvm_shim import TVM_VERSION

# Stands in the place of a machine where nothing was measured. The number counts up whenever `llmc.gpu.predict` says
# something else of the same kernels: predictions compare only with those of the same model.
_PREDICTED = "predicted"
PREDICTOR = f"{_PREDICTED} by model 1"
_TIMES, _MARKED = ("us", "predicted_us"), ("not marked as predicted", "marked as predicted")
_DIGITS = 4  # significant ones, of times and counts: more would be noise


@dataclass(frozen=True, order=True)
class Key:
    """What must agree before one measurement says anything about another compilation.

    `target` is the target's name with its mcpu and mattr, `cpu` and `cores` the machine on which it was measured: a
    CPU, or a GPU and its multiprocessors, or the model that predicted it.
    `points` is the text form of the task's points and their weights.
    """

    template: str
    version: int
    workload: str
    points: str
    target: str
    cpu: str
    cores: int
    tvm: str

    @staticmethod
    def of(task: Task, predicted: bool = False) -> Key:
        """The key of what this machine measures for `task`, or predicts."""
        template, target = task.kernel.template, task.target
        mattr = "".join(f",{m}" for m in target.mattr)
        return Key(
            template.name,
            template.version,
            task.kernel.workload.key(),
            points_text(task.points),
            f"{target.name}({target.mcpu}{mattr})",
            *((PREDICTOR, 0) if predicted else _here(target)),
            TVM_VERSION,
        )

    @property
    def predicted(self) -> bool:
        return self.cpu.startswith(_PREDICTED)

    @property
    def target_name(self) -> str:
        return self.target.partition("(")[0]

    def differences(self, other: Key) -> list[str]:
        """Names of the parts in which two keys differ."""
        return [f.name for f in fields(Key) if getattr(self, f.name) != getattr(other, f.name)]


@dataclass(frozen=True)
class Record:
    """One measurement under its key. Raises ValueError if one of them is a prediction and the other is not."""

    key: Key
    measurement: Measurement

    def __post_init__(self) -> None:
        if self.key.predicted != bool(self.measurement.predicted):
            marked = _MARKED[bool(self.measurement.predicted)]
            raise ValueError(f"it is {marked}, and its machine is '{self.key.cpu}'")

    def to_json(self) -> str:
        """One line, the same for equal records: short keys, times rounded."""
        k, m = self.key, self.measurement
        data: dict[str, Any] = {
            "k": f"{k.template}.{k.version}",
            "w": k.workload,
            "p": k.points,
            "t": k.target,
            "cpu": k.cpu,
            "cores": k.cores,
            "tvm": k.tvm,
            "c": dict(sorted(m.config.items())),
            "s": m.status,
        }
        if m.timings:
            data[_TIMES[bool(m.predicted)]] = {
                point: [_round(t.seconds * 1e6), _round(t.default_seconds * 1e6), _round(t.spread)]
                for point, t in sorted(m.timings.items())
            }
        if m.code:
            data["b"] = {name: _round(value) for name, value in sorted(m.code.items())}
        if m.detail:
            data["why"] = m.detail
        if m.verified:
            data["v"] = 1
        if m.predicted:
            data["predicted"] = m.predicted
        return json.dumps(data, separators=(",", ":"), ensure_ascii=False)

    @staticmethod
    def from_json(line: str) -> Record:
        """Raises ValueError, with a message for people, if the line is not a record."""
        try:
            data = json.loads(line)
            template, _, version = data["k"].rpartition(".")
            workload, points, target, cpu, tvm = (_typed(data[name], str) for name in ("w", "p", "t", "cpu", "tvm"))
            key = Key(template, int(version), workload, points, target, cpu, _typed(data["cores"], int), tvm)
            predicted = data.get("predicted", "")
            if predicted not in get_args(Predicted):
                raise ValueError(f"the mark {predicted!r} is unknown")
            if _TIMES[not predicted] in data:
                raise ValueError(f"its times are '{_TIMES[not predicted]}', and it is {_MARKED[bool(predicted)]}")
            timings = {
                point: Timing(float(ours) / 1e6, float(theirs) / 1e6, float(spread))
                for point, (ours, theirs, spread) in data.get(_TIMES[bool(predicted)], {}).items()
            }
            if data["s"] not in get_args(Status):
                raise ValueError(f"status {data['s']!r} is unknown")
            named = {str(p) for p in parse_points(key.points)}
            if data["s"] == "ok" and (set(timings) != named or any(t.default_seconds <= 0 for t in timings.values())):
                raise ValueError("its times are not those of its points")
            config = {name: _typed(value, (int, str)) for name, value in data["c"].items()}
            detail = _typed(data.get("why", ""), str)
            code = {name: _typed(value, (int, float)) for name, value in data.get("b", {}).items()}
            verified = bool(data.get("v", 0))
            measurement = Measurement(config, data["s"], timings, detail, 0.0, verified, code, predicted)
            return Record(key, measurement)
        except KeyError as error:
            raise ValueError(f"{error} is missing") from None
        except (TypeError, AttributeError) as error:
            raise ValueError(f"a field is of the wrong type: {error}") from None


def _here(target: Target) -> tuple[str, int]:
    """What this machine measures kernels for `target` on, and how many cores or multiprocessors that has."""
    if target.kind == "cuda":
        return gpu() or ("no GPU", 0)
    here = machine()
    return here.cpu, here.cores


def points_text(points: Sequence[Point]) -> str:
    """Points and weights as text: "M=1 1;M=32 0.5"."""
    return ";".join(f"{p} {p.weight:g}" for p in points)


def parse_points(text: str) -> tuple[Point, ...]:
    """The points of `points_text`. Raises ValueError."""
    points = []
    for part in text.split(";"):
        dims, _, weight = part.partition(" ")
        pairs = (pair.split("=") for pair in dims.split(","))
        points.append(Point(tuple((name, int(size)) for name, size in pairs), float(weight)))
    return tuple(points)


@dataclass(frozen=True)
class Best:
    """A configuration that beats the default, its cost (below 1) and the relative half-width of that; `predicted` as in
    `Measurement`."""

    config: Config
    cost: float
    noise: float
    predicted: Predicted = ""


def best_of(
    records: Iterable[Record], points: tuple[Point, ...], allowed: Callable[[Config], bool] = lambda config: True
) -> Best | None:
    """The best configuration among records of one key, or None if none beats the default beyond the noise
    (`Measurement.is_faster`).

    Only verified measurements count, and a configuration that ever failed does not. Several measurements of one
    configuration are averaged; what is compared is the upper end of each cost's interval, so that a lucky wide
    measurement does not win.
    """
    by_config: defaultdict[str, list[Measurement]] = defaultdict(list)
    for record in records:
        by_config[json.dumps(record.measurement.config, sort_keys=True)].append(record.measurement)
    found: list[Best] = []
    for measurements in by_config.values():
        verified = [m for m in measurements if m.verified]
        if not verified or any(m.status != "ok" for m in measurements) or not allowed(verified[0].config):
            continue
        cost = sum(m.cost(points) for m in verified) / len(verified)
        noise = sum(m.noise(points) for m in verified) / len(verified)
        if all(m.is_faster(points) for m in verified):
            found.append(Best(verified[0].config, cost, noise, verified[-1].predicted))
    return min(found, key=lambda b: b.cost * (1 + b.noise), default=None)


def _round(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.{_DIGITS}g}")


def _typed(value: Any, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind}")
    return value
