"""The search for one task's best configuration: what to measure next, given what was measured so far.

Small spaces are ranked whole. In large ones candidates evolve (as in Zheng et al., "Ansor: Generating
High-Performance Tensor Programs for Deep Learning", 2020): the best known configurations, those that neighbours of
the task were tuned to, and random ones are mutated and crossed, the cost model choosing who stays. A batch takes
those with the lowest bound mean - k * std that differ enough from each other, and some at random, so that a model
that is wrong can find out. Nothing is measured twice. The same seed and the same measurements give the same
proposals.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

import numpy as np

from llmc.schedules.base import Config, Space
from llmc.tune import features
from llmc.tune.cost_model import CostModel, Prediction, Samples
from llmc.tune.task import Measurement, Task

Key = tuple[tuple[str, int | str], ...]

_WHOLE = 4096  # a space of at most so many configurations is ranked whole
_POPULATION, _GENERATIONS, _ELITE = 192, 4, 48
_EXPLORE = 1.0  # k of mean - k * std
_FAILURE = 1.0  # log2 cost of a candidate that is sure to fail
_RANDOM = 0.25  # share of a batch
_PATIENCE = 6  # batches without hope before the search ends
_LEAST_TRIALS = 16
# Hopes count as much as they came true before, or a model that is always sure of the next trial would spend the whole
# budget on one task. So much (log2) is believed without proof.
_TRUSTED = 0.05


def key(config: Config) -> Key:
    """A configuration as something that sets and dictionaries take."""
    return tuple(sorted(config.items()))


def upper_cost(task: Task, m: Measurement) -> float:
    """The upper end of the cost's interval: what was disturbed while it was measured is not taken for fast."""
    return m.cost(task.points) * (1 + m.noise(task.points)) if m.status == "ok" else math.inf


class Search:
    """Ask with `propose`, tell with `observe`; `finished` says when going on is not worth it.

    `starts` are configurations that did well elsewhere; those outside of the space are passed over. `space`
    restricts the template's own. The default needs no trial: every measurement is relative to it.
    """

    def __init__(
        self,
        task: Task,
        prior: CostModel,
        *,
        starts: Iterable[Config] = (),
        seed: int = 0,
        space: Space | None = None,
        threads: int | None = None,
    ) -> None:
        kernel = task.kernel
        self.task, self.prior, self.model, self.seed, self.threads = task, prior, prior, seed, threads
        self.space = space or kernel.template.space(kernel.workload, task.target)
        self.default = kernel.template.default(kernel.workload, task.target)
        self.measured: list[Measurement] = []
        self._random = random.Random(seed)
        self._known = {key(self.default)}
        self._starts = [dict(c) for c in starts if c in self.space]
        self._vectors: dict[Key, tuple[np.ndarray, ...]] = {}
        self._whole = self._enumerate()
        vectors = (features.matrix(task, point, [self.default], threads) for point in task.points)
        self._analytic = any(features.is_analytic(X) for X in vectors)
        self._evolved: list[dict[str, int | str]] | None = None
        self._hopeless = 0
        self._hoped = self._gained = _TRUSTED  # log2, of all batches
        self.expected_gain = 0.0  # of one more trial, log2
        self._exhausted = False

    # -- ask and tell ---------------------------------------------------------------------------------------------
    def propose(self, count: int) -> list[dict[str, int | str]]:
        """At most `count` configurations that were never proposed; fewer, or none, where the space ends."""
        pool = self._pool()
        chosen: list[dict[str, int | str]] = []
        for start in self._starts:
            if len(chosen) < count and key(start) not in self._known:
                self._choose(start, chosen)
        blind = not self.model.prior and not self.model.correction and not self._analytic
        guesses = round(count * _RANDOM + self._random.random() * 0.5)
        if pool:
            ranked = self._neighbours(pool) if blind else self._ranked(pool)
            self._choose_diverse(ranked, chosen, max(count - guesses, len(chosen)))
            self._random.shuffle(pool)
            self._choose_diverse(pool, chosen, count)
        self._exhausted = len(chosen) < count
        return chosen

    def observe(self, measurements: Sequence[Measurement]) -> None:
        """Learn from measurements, of proposals or of earlier runs."""
        before = self.best_cost
        self.measured += measurements
        self._hoped += self.expected_gain
        self._gained += math.log2(before / self.best_cost)
        self._known |= {key(m.config) for m in measurements}
        self.model = self.prior.adapt(Samples.of([(self.task, m) for m in self.measured], threads=self.threads))
        self._evolved = None
        self.expected_gain = self._expected_gain() * min(1.0, self._gained / self._hoped)
        hopeless = len(self.measured) >= _LEAST_TRIALS and self.expected_gain < self.noise
        self._hopeless = self._hopeless + 1 if hopeless else 0

    # -- where the search stands ----------------------------------------------------------------------------------
    @property
    def ranked(self) -> list[Measurement]:
        """What could be timed, best first."""
        timed = [m for m in self.measured if m.status == "ok"]
        return sorted(timed, key=lambda m: upper_cost(self.task, m))

    @property
    def best_cost(self) -> float:
        """Time relative to the default's, at most 1: the default itself."""
        return min([1.0, *(upper_cost(self.task, m) for m in self.measured)])

    @property
    def noise(self) -> float:
        """log2 of the factor by which a measured cost is typically off."""
        spreads = [t.spread for m in self.measured for t in m.timings.values()]
        return float(np.median(spreads)) / math.log(2) if spreads else 0.0

    @property
    def finished(self) -> bool:
        """The space is exhausted, or for some batches nothing promised a gain that could be told from noise."""
        return self._exhausted or self._hopeless >= _PATIENCE

    def predict(self, configs: Sequence[Config]) -> list[float]:
        """What the model expects of configurations now: log2 of the time relative to the default's."""
        return [float(x) for x in self._predict(configs).mean] if configs else []

    # -- candidates -----------------------------------------------------------------------------------------------
    def _enumerate(self) -> list[dict[str, int | str]] | None:
        found = []
        for config in self.space:
            found.append(config)
            if len(found) > _WHOLE:
                return None
        return found

    def _pool(self) -> list[dict[str, int | str]]:
        """Configurations worth ranking that were not proposed yet."""
        if self._whole is None and self._evolved is None:
            self._evolved = self._evolve()
        candidates = self._evolved if self._whole is None else self._whole
        return [c for c in candidates or () if key(c) not in self._known]

    def _evolve(self) -> list[dict[str, int | str]]:
        elite = [dict(m.config) for m in self.ranked[: _ELITE // 2]] + self._starts + [self.default]
        population = {key(c): c for c in [*elite, *(self._sample() for _ in range(_POPULATION))]}
        for _ in range(_GENERATIONS):
            parents = self._ranked(list(population.values()))[:_ELITE]
            for _ in range(_POPULATION):
                a, b = self._random.choice(parents), self._random.choice(parents)
                child = self._mutated(self._crossed(a, b))
                population[key(child)] = child
        return list(population.values())

    def _sample(self) -> dict[str, int | str]:
        """Any configuration of the space."""
        for _ in range(1000):
            config = {name: self._random.choice(values) for name, values in self.space.knobs.items()}
            if self.space.valid(config):
                return config
        return dict(self.default)

    def _crossed(self, a: Config, b: Config) -> dict[str, int | str]:
        child = {name: self._random.choice((a[name], b[name])) for name in self.space.knobs}
        return child if self.space.valid(child) else dict(a)

    def _mutated(self, config: dict[str, int | str]) -> dict[str, int | str]:
        """One knob, sometimes two, set to another value: mostly the next one up or down."""
        for _ in range(8):
            child = dict(config)
            for name in self._random.sample(sorted(self.space.knobs), k=self._random.choice((1, 1, 2))):
                values = self.space.knobs[name]
                at = values.index(child[name]) + self._random.choice((-1, 1))
                near = 0 <= at < len(values) and self._random.random() < 0.7
                child[name] = values[at] if near else self._random.choice(values)
            if self.space.valid(child):
                return child
        return config

    def _neighbours(self, pool: list[dict[str, int | str]]) -> list[dict[str, int | str]]:
        """Those nearest the default first, in random order: what a model learns from knob by knob, and not far from
        good, since a default is. For a search that knows nothing else."""
        self._random.shuffle(pool)
        self._look_at(pool)
        return sorted(pool, key=lambda config: sum(config[name] != value for name, value in self.default.items()))

    # -- choice ---------------------------------------------------------------------------------------------------
    def _look_at(self, configs: Sequence[Config]) -> list[Key]:
        """Keys of configurations, whose vectors are known from now on."""
        keys = [key(c) for c in configs]
        new = [(k, c) for k, c in zip(keys, configs, strict=True) if k not in self._vectors]
        if new:
            points = [features.matrix(self.task, p, [c for _, c in new], self.threads) for p in self.task.points]
            self._vectors |= {k: tuple(X[i] for X in points) for i, (k, _) in enumerate(new)}
        return keys

    def _predict(self, configs: Sequence[Config]) -> Prediction:
        keys = self._look_at(configs)
        vectors = [np.stack([self._vectors[k][p] for k in keys]) for p in range(len(self.task.points))]
        return self.model.predict_vectors(vectors, [p.weight for p in self.task.points])

    def _expected_gain(self) -> float:
        """Largest expected improvement of the best cost by any candidate (Jones et al., 1998)."""
        pool = self._pool()
        if not pool:
            return 0.0
        p = self._predict(pool)
        ahead = math.log2(self.best_cost) - p.mean
        std = np.maximum(p.std, 1e-6)
        z = ahead / std
        density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        below = 0.5 * (1 + np.array([math.erf(v / math.sqrt(2)) for v in z]))
        return float(np.max((ahead * below + std * density) * (1 - p.failure)))

    def _ranked(self, configs: list[dict[str, int | str]]) -> list[dict[str, int | str]]:
        """Most promising first; equals in random order."""
        self._random.shuffle(configs)
        p = self._predict(configs)
        score = p.mean - _EXPLORE * p.std + _FAILURE * p.failure
        return [configs[i] for i in np.argsort(score, kind="stable")]

    def _choose(self, config: dict[str, int | str], chosen: list[dict[str, int | str]]) -> None:
        chosen.append(config)
        self._known.add(key(config))

    def _choose_diverse(
        self, candidates: list[dict[str, int | str]], chosen: list[dict[str, int | str]], count: int
    ) -> None:
        """Fill `chosen` up to `count` in the candidates' order: first those that differ from all chosen in two knobs,
        and in what the model sees of them; then whoever is left."""
        for strict in (True, False):
            for config in candidates:
                if len(chosen) >= count:
                    return
                if key(config) not in self._known and not (strict and self._close(config, chosen)):
                    self._choose(config, chosen)

    def _close(self, config: Config, chosen: Sequence[Config]) -> bool:
        least = min(2, len(self.space.knobs) - 1)
        if any(sum(config[k] != c[k] for k in self.space.knobs) < least for c in chosen):
            return True
        mine = self._vectors[key(config)]
        return any(
            all(np.array_equal(a, b, equal_nan=True) for a, b in zip(mine, self._vectors[key(c)], strict=True))
            for c in chosen
            if key(c) in self._vectors
        )
