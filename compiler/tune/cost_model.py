"""The learned cost model: how much longer than the default a configuration takes at a point.

Gradient-boosted trees (Chen and Guestrin, "XGBoost", 2016) over the vectors of `features`, in two layers: a prior,
trained on everything that was ever measured, and a correction, trained on what the current task's own measurements
leave over. What is known without measuring (`features.analytic`) lies below both. Each layer has several members,
trained on resampled data: their disagreement is the model's uncertainty.

The prior is either a regression of log2(time / default's time), or a ranking of configurations within a task and
point ("rank:pairwise", as in Chen et al., "Learning to Optimize Tensor Programs", 2018), scaled to the same unit.
Cross-validation over whole tasks decides. Candidates that failed train a classifier of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xgboost

from llmc.errors import OptionError
from llmc.schedules.base import Config
from llmc.tune import features
from llmc.tune.samples import Samples as Samples
from llmc.tune.task import Task

Kind = Literal["regression", "ranking"]

SCHEMA = 1
MEMBERS = 4
_FOLDS = 5
_COMPARED = 1500  # rows, spread over all, that decide between the kinds: a search shall not wait for it
# One thread: with few rows a second one costs more than it brings, and it would disturb what is being measured.
_TREES: dict[str, Any] = {"tree_method": "hist", "max_bin": 64, "nthread": 1, "verbosity": 0, "subsample": 0.8}
_PRIOR = {**_TREES, "max_depth": 6, "eta": 0.1, "colsample_bytree": 0.6, "min_child_weight": 2}
_CORRECTION = {**_TREES, "max_depth": 4, "eta": 0.15, "colsample_bytree": 0.5, "min_child_weight": 1, "lambda": 0.5}
_PRIOR_ROUNDS, _CORRECTION_ROUNDS, _FAILURE_ROUNDS = 200, 40, 60


@dataclass(frozen=True)
class Prediction:
    """mean and std [n] of log2(time / default's time); failure [n] the probability that the candidate fails."""

    mean: np.ndarray
    std: np.ndarray
    failure: np.ndarray


@dataclass(frozen=True)
class CostModel:
    """See the module. An empty model, `CostModel()`, says what `features.analytic` says: for CPUs, that every
    configuration is as fast as the default."""

    kind: Kind = "regression"
    prior: tuple[xgboost.Booster, ...] = ()
    scale: tuple[float, ...] = ()  # of each prior member's score, in log2
    correction: tuple[xgboost.Booster, ...] = ()
    failures: xgboost.Booster | None = None
    quality: Mapping[str, float] = field(default_factory=dict)  # Kendall's tau in cross-validation, by kind

    # -- learning -----------------------------------------------------------------------------------------------
    @staticmethod
    def fit(samples: Samples, seed: int = 0, kind: Kind | None = None) -> CostModel:
        """A prior from measurements of many tasks; without `kind` the one that ranks unknown tasks better."""
        quality: dict[str, float] = {}
        chosen = kind or "regression"
        if kind is None:
            kinds: tuple[Kind, ...] = ("regression", "ranking")
            timed = samples.timed()
            some = timed.take(np.arange(0, len(timed), -(-len(timed) // _COMPARED) or 1))
            quality = {k: cross_validate(some, k, seed) for k in kinds}
            chosen = max(kinds, key=lambda k: np.nan_to_num(quality[k], nan=-1))
        return replace(_fit(samples, chosen, seed), quality=quality)

    def compare_code(self, samples: Samples, seed: int = 0) -> CostModel:
        """This model, whose `quality` also says how well candidates whose machine code `samples` know are ranked with
        what it shows, and without: what it could bring if they were judged between building and timing."""
        known = samples.with_code()
        if not len(known.timed()):
            return self
        rest = replace(known, X=known.X[:, : len(features.names())])
        compared = {
            name: cross_validate(s.timed(), "regression", seed) for name, s in (("with code", known), ("without", rest))
        }
        return replace(self, quality={**self.quality, **compared})

    def adapt(self, samples: Samples, seed: int = 0) -> CostModel:
        """This prior, corrected by a task's own measurements; an earlier correction is replaced."""
        timed = samples.timed()
        if not len(timed):
            return self
        left_over = timed.y - replace(self, correction=())._members(timed.X)
        rng = np.random.default_rng(seed)
        correction = []
        for i in range(MEMBERS):
            times_drawn = rng.poisson(1, len(timed)) + 0.25  # a bootstrap that drops no row wholly: there are few
            data = xgboost.DMatrix(timed.X, left_over[i], weight=timed.weight * times_drawn, nthread=1)
            parameters = {**_CORRECTION, "seed": seed + i, "base_score": 0.0}
            correction.append(xgboost.train(parameters, data, _CORRECTION_ROUNDS))
        failures = _fit_failures(samples, seed)
        failures = self.failures if failures is None else failures
        return replace(self, correction=tuple(correction), failures=failures)

    # -- predicting ---------------------------------------------------------------------------------------------
    def predict(
        self, task: Task, configs: Sequence[Config], threads: int | None = None, foreign: bool = False
    ) -> Prediction:
        """The whole task's cost, by the weights of its points, as `Measurement.cost` sums it up."""
        vectors = [features.matrix(task, p, configs, threads, foreign) for p in task.points]
        return self.predict_vectors(vectors, [p.weight for p in task.points])

    def predict_vectors(self, vectors: Sequence[np.ndarray], weights: Sequence[float]) -> Prediction:
        """The same from vectors [n, features] for each point."""
        shares = np.asarray(weights, float) / sum(weights)
        members = sum(share * self._members(X) for share, X in zip(shares, vectors, strict=True))
        failure = np.zeros(len(vectors[0]))
        if self.failures is not None:
            failure = np.max([self.failures.inplace_predict(X) for X in vectors], axis=0)
        return Prediction(np.mean(members, axis=0), np.std(members, axis=0), failure)

    def _members(self, X: np.ndarray) -> np.ndarray:
        """log2 cost by member [members, n], without what a member says of the default itself."""
        both = np.concatenate([X, features.of_default(X)])
        total = np.tile(features.analytic(X), (MEMBERS, 1)).astype(float)
        scales = (self.scale, (1.0,) * len(self.correction))
        for boosters, scale in zip((self.prior, self.correction), scales, strict=True):
            for i, booster in enumerate(boosters):
                score = booster.inplace_predict(both)
                total[i] += scale[i] * (score[: len(X)] - score[len(X) :])
        return total

    # -- keeping and explaining ---------------------------------------------------------------------------------
    def explain(self, top: int = 20) -> dict[str, float]:
        """The features that matter most, and each one's share of the trees' total gain."""
        names = features.names()
        gains = np.zeros(len(names))
        for booster in (*self.prior, *self.correction):
            for name, gain in booster.get_score(importance_type="total_gain").items():
                gains[int(name[1:])] += gain
        order = np.argsort(-gains, kind="stable")[:top]
        return {names[i]: float(gains[i] / gains.sum()) for i in order if gains[i] > 0}

    def save(self, path: Path) -> None:
        """The prior as JSON; corrections belong to one task, and are not kept."""
        content = {
            "schema": SCHEMA,
            "features": features.names(),
            "kind": self.kind,
            "scale": self.scale,
            "quality": dict(self.quality),
            "prior": [_to_text(b) for b in self.prior],
            "failures": None if self.failures is None else _to_text(self.failures),
        }
        path.write_text(json.dumps(content), encoding="utf-8")

    @staticmethod
    def load(path: Path) -> CostModel:
        """Raises OptionError for a model of other features, or another version."""
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("schema") != SCHEMA or content.get("features") != list(features.names()):
            raise OptionError("the cost model is of another version of llmc", where=str(path), hint="train it again")
        return CostModel(
            content["kind"],
            tuple(_from_text(t) for t in content["prior"]),
            tuple(content["scale"]),
            failures=None if content["failures"] is None else _from_text(content["failures"]),
            quality=content["quality"],
        )


def _fit(samples: Samples, kind: Kind, seed: int) -> CostModel:
    timed, failures = samples.timed(), _fit_failures(samples, seed)
    if not len(timed):
        return CostModel(kind, failures=failures)
    prior, scale = zip(*(_fit_prior(timed, kind, seed + i) for i in range(MEMBERS)), strict=True)
    return CostModel(kind, prior, scale, failures=failures)


def cross_validate(samples: Samples, kind: Kind, seed: int = 0) -> float:
    """Mean Kendall's tau between predicted and measured within each point of tasks that were left out of training;
    NaN where there is but one task."""
    tasks = np.unique(samples.task)
    if len(tasks) < 2:
        return float("nan")
    folds = np.random.default_rng(seed).permutation(len(tasks)) % min(_FOLDS, len(tasks))
    taus = []
    for fold in range(folds.max() + 1):
        out = np.isin(samples.task, tasks[folds == fold])
        booster, scale = _fit_prior(samples.take(~out), kind, seed)
        model = CostModel(kind, (booster,) * MEMBERS, (scale,) * MEMBERS)
        held = samples.take(out)
        predicted = model._members(held.X)[0]
        taus += [tau(predicted[held.group == g], held.y[held.group == g]) for g in np.unique(held.group)]
    return float(np.nanmean(taus)) if not np.all(np.isnan(taus)) else float("nan")


def tau(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Kendall's tau-b: pairs in the same order less pairs in the other, over all that are tied in neither, roughly.

    NaN where all of one side is tied.
    """
    a, b = (np.sign(x[:, None] - x[None, :])[np.triu_indices(len(x), 1)] for x in (predicted, measured))
    untied = np.sqrt(float(np.count_nonzero(a)) * np.count_nonzero(b))
    return float(a @ b / untied) if untied else float("nan")


def _fit_prior(samples: Samples, kind: Kind, seed: int) -> tuple[xgboost.Booster, float]:
    """One member, and the factor that makes its scores log2 of times."""
    rng = np.random.default_rng(seed)
    samples = replace(samples, y=samples.y - features.analytic(samples.X))
    counts = dict(zip(*np.unique(samples.group, return_counts=True), strict=True))
    balance = 1 / np.sqrt([counts[g] for g in samples.group])  # a much measured task shall not drown the others
    if kind == "regression":
        drawn = rng.poisson(1, len(samples)) + 0.1
        data = xgboost.DMatrix(samples.X, samples.y, weight=samples.weight * balance * drawn, nthread=1)
        return xgboost.train({**_PRIOR, "seed": seed, "base_score": 0.0}, data, _PRIOR_ROUNDS), 1.0
    order = np.argsort(samples.group, kind="stable")
    rows = samples.take(order)
    data = xgboost.DMatrix(rows.X, -rows.y, qid=rows.group.astype(np.int64), nthread=1)
    parameters = {**_PRIOR, "seed": seed, "objective": "rank:pairwise", "lambdarank_pair_method": "mean"}
    booster = xgboost.train({**parameters, "lambdarank_num_pair_per_sample": 8}, data, _PRIOR_ROUNDS)
    score = -booster.inplace_predict(rows.X)
    centred, y = score.copy(), rows.y.copy()
    for g in np.unique(rows.group):
        centred[rows.group == g] -= score[rows.group == g].mean()
        y[rows.group == g] -= rows.y[rows.group == g].mean()
    return booster, -float(centred @ y / max(centred @ centred, 1e-12))


def _fit_failures(samples: Samples, seed: int) -> xgboost.Booster | None:
    """Which candidates fail; None where all or none did."""
    failed = np.isnan(samples.y)
    if failed.all() or not failed.any():
        return None
    data = xgboost.DMatrix(samples.X, failed.astype(np.float32), nthread=1)
    parameters = {**_TREES, "objective": "binary:logistic", "max_depth": 4, "eta": 0.2, "seed": seed}
    return xgboost.train(parameters, data, _FAILURE_ROUNDS)


def _to_text(booster: xgboost.Booster) -> str:
    return booster.save_raw("json").decode()


def _from_text(text: str) -> xgboost.Booster:
    booster = xgboost.Booster()
    booster.load_model(bytearray(text.encode()))
    return booster
