from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from llmc.errors import OptionError
from llmc.targets.x86 import AVX2
from llmc.tune import features
from llmc.tune.cost_model import CostModel, Samples, cross_validate, tau
from llmc.tune.task import Measurement
from tests.tune.synthetic import Machine, dense, sample

SHAPES = [(576, 576), (1536, 384), (384, 1536), (1024, 2048), (2048, 1024), (4096, 256)]


def _records(shapes, count=60, noise=0.02):
    machine = Machine(noise)
    return [(t, m) for s in shapes for t in [dense(*s)] for m in machine.measure(t, sample(t, count))]


@pytest.fixture(scope="module")
def known():
    return Samples.of(_records(SHAPES[1:]), threads=2)


def _truth(task, configs):
    return np.array([Machine().cost(task, c) for c in configs])


def test_an_unknown_task_is_ranked(known):
    task = dense(*SHAPES[0])
    configs = [c for c in sample(task, 200, seed=5) if c["MR"] != 14]
    predicted = CostModel.fit(known, kind="regression").predict(task, configs, threads=2)
    assert tau(predicted.mean, _truth(task, configs)) > 0.7


def test_own_measurements_correct_the_prior(known):
    task = dense(*SHAPES[0])
    own = list(Machine(0.01).measure(task, sample(task, 40)))
    configs = [c for c in sample(task, 200, seed=5) if c["MR"] != 14]
    prior = CostModel.fit(known.take(known.task == 0), kind="regression")
    adapted = prior.adapt(Samples.of([(task, m) for m in own], threads=2))
    truth = np.log2(_truth(task, configs))
    before, after = (np.abs(m.predict(task, configs, 2).mean - truth).mean() for m in (prior, adapted))
    assert after < 0.7 * before


def test_both_kinds_are_compared_and_the_better_is_kept(known):
    model = CostModel.fit(known)
    assert set(model.quality) == {"regression", "ranking"}
    assert model.quality[model.kind] == max(model.quality.values()) > 0.5


def test_ranking_predicts_times_too(known):
    task = dense(*SHAPES[0])
    configs = [c for c in sample(task, 100, seed=5) if c["MR"] != 14]
    predicted = CostModel.fit(known, kind="ranking").predict(task, configs, threads=2).mean
    truth = np.log2(_truth(task, configs))
    assert tau(predicted, truth) > 0.6
    assert 0.4 < np.std(predicted) / np.std(truth) < 2.5


def test_kendalls_tau_by_hand():
    assert tau(np.array([1.0, 2, 3, 4]), np.array([10.0, 20, 40, 30])) == pytest.approx(4 / 6)
    assert tau(np.array([1.0, 1, 2]), np.array([1.0, 2, 3])) == pytest.approx(2 / np.sqrt(2 * 3))
    assert np.isnan(tau(np.ones(3), np.arange(3.0)))


def test_cross_validation_needs_several_tasks(known):
    assert np.isnan(cross_validate(known.take(known.task == 0), "regression"))


def test_shuffled_labels_teach_nothing(known):
    shuffled = dataclasses.replace(known, y=np.random.default_rng(0).permutation(known.y))
    timed = shuffled.take(~np.isnan(shuffled.y))
    assert abs(cross_validate(timed, "regression")) < 0.2


def test_the_default_is_as_fast_as_itself(known):
    task = dense(*SHAPES[0])
    default = task.kernel.template.default(task.kernel.workload, task.target)
    prediction = CostModel.fit(known, kind="regression").predict(task, [default], threads=2)
    assert prediction.mean[0] == prediction.std[0] == 0


def test_failures_are_data(known):
    task = dense(*SHAPES[0])
    configs = sample(task, 300, seed=2)
    failure = CostModel.fit(known, kind="regression").predict(task, configs, threads=2).failure
    fails = np.array([c["MR"] == 14 for c in configs])
    assert failure[fails].min() > 0.5 > failure[~fails].max()


def test_an_empty_model_has_no_opinion():
    task = dense(*SHAPES[0])
    model = CostModel.fit(Samples.of([]), kind="regression")
    prediction = model.predict(task, sample(task, 5), threads=2)
    assert not prediction.mean.any() and not prediction.failure.any()
    assert model.adapt(Samples.of([])) == model


def test_noisy_measurements_count_less():
    task = dense(*SHAPES[0])
    (_, quiet), *_ = _records([SHAPES[0]], 1, noise=0)
    loud = {p: dataclasses.replace(t, spread=0.3) for p, t in quiet.timings.items()}
    samples = Samples.of([(task, quiet), (task, Measurement(quiet.config, "ok", loud))], threads=2)
    assert samples.weight[0] > 10 * samples.weight[1]


def test_other_targets_are_marked():
    records = _records([SHAPES[0]], 2)
    abroad = [(dataclasses.replace(t, target=AVX2), m) for t, m in records]
    samples = Samples.of(records + abroad, target=records[0][0].target, threads=2)
    foreign = samples.X[:, features.names().index("foreign")]
    assert set(foreign[samples.task == 0]) == {0} and set(foreign[samples.task == 1]) == {1}


def test_the_same_seed_gives_the_same_model(known):
    task = dense(*SHAPES[0])
    configs = sample(task, 20)
    a, b = (CostModel.fit(known, seed=3, kind="regression").predict(task, configs, 2).mean for _ in range(2))
    np.testing.assert_array_equal(a, b)


def test_saved_models_predict_the_same(known, tmp_path):
    task, path = dense(*SHAPES[0]), tmp_path / "model.json"
    configs = sample(task, 20)
    model = CostModel.fit(known, kind="ranking")
    model.save(path)
    before, after = model.predict(task, configs, 2), CostModel.load(path).predict(task, configs, 2)
    np.testing.assert_array_equal(before.mean, after.mean)
    np.testing.assert_array_equal(before.failure, after.failure)


def test_a_model_of_other_features_is_refused(known, tmp_path):
    path = tmp_path / "model.json"
    CostModel.fit(known.take(np.arange(20)), kind="regression").save(path)
    content = json.loads(path.read_text())
    content["features"][0] = "is_something_else"
    path.write_text(json.dumps(content))
    with pytest.raises(OptionError, match="another version"):
        CostModel.load(path)


def test_features_that_matter_are_named(known):
    gains = CostModel.fit(known, kind="regression").explain(10)
    assert set(gains) <= set(features.names())
    assert list(gains.values()) == sorted(gains.values(), reverse=True)
    assert any(name.startswith("~") for name in gains), "times relative to the default follow from relative counts"


def _shown(task, measurement):
    """What spills beyond all foresight: a third of the configurations, by a number drawn from each."""
    draw = np.random.default_rng([*json.dumps(measurement.config, sort_keys=True).encode()]).random()
    spills = 40.0 if draw < 0.33 and measurement.config != _default(task) else 0.0
    timings = {
        p: dataclasses.replace(t, seconds=t.seconds * 2 ** (spills / 40)) for p, t in measurement.timings.items()
    }
    return dataclasses.replace(measurement, timings=timings, code={"spills": spills, "hot_loads": 0.5})


def _default(task):
    return task.kernel.template.default(task.kernel.workload, task.target)


@pytest.fixture(scope="module")
def shown():
    records = _records(SHAPES, 40)
    defaults = [(t, m) for s in SHAPES for t in [dense(*s)] for m in Machine().measure(t, [_default(t)])]
    return [(task, _shown(task, m)) for task, m in defaults + records]


def test_what_code_shows_tells_more_than_the_description(shown):
    samples = Samples.of(shown, threads=2)
    model = CostModel.fit(samples, kind="regression").compare_code(samples)
    assert set(model.quality) == {"with code", "without"}
    assert model.quality["with code"] > model.quality["without"] + 0.03


def test_without_codes_nothing_is_compared(known):
    assert CostModel.fit(known, kind="regression").compare_code(known).quality == {}


def test_verified_code_is_another_kernel(shown):
    """It is built for all sizes: it does not compare with what was built for one, nor is the default's to it."""
    careful = [(t, dataclasses.replace(m, verified=True)) for t, m in shown[:20]]
    assert len(Samples.of(careful, threads=2).with_code()) == 0
    both = Samples.of([*careful, *shown], threads=2)
    assert len(both.with_code()) == len(Samples.of(shown, threads=2))
