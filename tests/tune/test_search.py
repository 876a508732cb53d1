from __future__ import annotations

import statistics

import pytest

from llmc.schedules.base import Kernel, Space
from llmc.schedules.norm.norm import NORM, NormWorkload
from llmc.tune.budget import Standing, next_task
from llmc.tune.cost_model import CostModel, Samples
from llmc.tune.neighbours import distance, starts
from llmc.tune.search import Search, key
from llmc.tune.task import Measurement, Point, Task, Timing
from tests.tune.synthetic import Machine, Still, dense, lowbit, norm, sample

TASK = dense(576, 576)


def _run(search: Search, machine: Machine, trials: int, batch: int = 8) -> list[dict]:
    proposed = []
    while len(proposed) < trials and (configs := search.propose(batch)):
        proposed += configs
        search.observe(list(machine.measure(search.task, configs)))
    return proposed


def _trials_to(configs, good: set) -> int:
    return next((i for i, c in enumerate(configs, 1) if key(c) in good), len(configs) + 1)


@pytest.fixture(scope="module")
def good():
    """Configurations within 3 % of the best, and how many there are."""
    configs = list(TASK.kernel.template.space(TASK.kernel.workload, TASK.target))
    costs = {key(c): Machine().cost(TASK, c) for c in configs}
    best = {k for k, cost in costs.items() if cost <= 1.03 * min(costs.values())}
    assert 1 <= len(best) <= len(costs) / 40, "or any search would find one"
    return best, len(costs)


@pytest.mark.parametrize("task", [TASK, lowbit(960, 576), norm()], ids=["whole", "evolved", "tiny"])
def test_proposals_are_new_legal_and_the_same_for_a_seed(task):
    class Any(Still):
        pass

    runs = [_run(Search(task, CostModel(), seed=4, threads=2), Any(0.02, seed=1), 40) for _ in range(2)]
    assert runs[0] == runs[1]
    assert len({key(c) for c in runs[0]}) == len(runs[0])
    space = task.kernel.template.space(task.kernel.workload, task.target)
    assert all(c in space for c in runs[0])
    default = task.kernel.template.default(task.kernel.workload, task.target)
    assert default not in runs[0], "measurements are relative to it: it needs none"
    if len(space.knobs) > 2:
        assert runs[0] != _run(Search(task, CostModel(), seed=5, threads=2), Any(0.02, seed=1), 40)


def test_cold_search_beats_chance(good):
    best, size = good
    found = [
        _trials_to(_run(Search(TASK, CostModel(), seed=s, threads=2), Machine(0.01, s), 64), best) for s in range(4)
    ]
    assert statistics.mean(found) < (size + 1) / (len(best) + 1) / 1.5


def test_warm_search_starts_near_the_best(good):
    best, _ = good
    shapes = [(1536, 384), (384, 1536), (1024, 2048), (2048, 1024)]
    history = [(t, m) for s in shapes for t in [dense(*s)] for m in Machine(0.01).measure(t, sample(t, 100))]
    model = CostModel.fit(Samples.of(history, threads=2), kind="regression")
    found = [
        _trials_to(
            _run(Search(TASK, model, starts=starts(TASK, history), seed=s, threads=2), Machine(0.01, s), 24), best
        )
        for s in range(3)
    ]
    assert statistics.median(found) <= 16


def test_a_space_is_searched_to_its_end():
    task = norm()
    search = Search(task, CostModel(), threads=2)
    assert len(_run(search, Still(), 100)) == 31, "all of the 32 but the default"
    assert search.finished


def test_search_ends_where_only_noise_is_left():
    search, machine, trials = Search(TASK, CostModel(), threads=2), Still(0.02), 0
    while not search.finished:
        configs = search.propose(8)
        search.observe(list(machine.measure(TASK, configs)))
        trials += len(configs)
    assert trials < 200, "of 992"


def test_search_goes_on_while_gains_are_in_sight(good):
    search = Search(TASK, CostModel(), threads=2)
    _run(search, Machine(), 16)
    assert not search.finished


def test_neighbours_may_be_measured_at_several_sets_of_points():
    near, other = norm(), Task(norm().kernel, TASK.target, (Point((("M", 16),)),))
    slow, fast = ({"unroll": u, "grain": 65536} for u in (1, 2))
    history = [
        (t, Measurement(c, "ok", {str(p): Timing(ratio, 1.0, 0.01) for p in t.points}))
        for t, c, ratio in ((near, slow, 0.9), (other, fast, 0.8))
    ]
    task = Task(Kernel(NORM, NormWorkload(640)), TASK.target, near.points)
    assert starts(task, history) == starts(task, history[::-1]) == [fast]


def test_starts_come_first_and_foreign_ones_are_passed_over():
    start = sample(TASK, 1)[0]
    search = Search(TASK, CostModel(), starts=[{"other": 1}, start], threads=2)
    assert search.propose(4)[0] == start


def test_a_batch_is_diverse():
    history = [(TASK, m) for m in Machine().measure(TASK, sample(TASK, 100))]
    search = Search(dense(576, 1536), CostModel.fit(Samples.of(history, threads=2), kind="regression"), threads=2)
    batch = search.propose(8)
    for i, a in enumerate(batch):
        assert all(sum(a[k] != b[k] for k in a) >= 2 for b in batch[:i])


def test_failing_candidates_are_learned_to_be_avoided():
    search, machine = Search(TASK, CostModel(), seed=1, threads=2), Machine()
    proposed = _run(search, machine, 64)
    early, late = (sum(machine.fails(c) for c in part) for part in (proposed[:16], proposed[-32:]))
    share = sum(machine.fails(c) for c in sample(TASK, 10**6)) / 992
    assert late <= max(2, 32 * share), (early, late)
    assert search.best_cost < 1


def test_disturbed_measurements_are_not_taken_for_fast():
    search = Search(TASK, CostModel(), threads=2)
    calm, wild = sample(TASK, 2)
    for config, ratio, spread in ((calm, 0.9, 0.01), (wild, 0.3, 5.0)):
        timings = {str(p): Timing(ratio, 1.0, spread) for p in TASK.points}
        search.observe([Measurement(config, "ok", timings)])
    assert search.ranked[0].config == calm
    assert search.best_cost == pytest.approx(0.909)


def test_a_restricted_space_is_kept_to():
    allowed = {key(c) for c in sample(TASK, 20)}
    knobs = TASK.kernel.template.space(TASK.kernel.workload, TASK.target).knobs
    search = Search(TASK, CostModel(), space=Space(knobs, lambda c: key(c) in allowed), threads=2)
    assert {key(c) for c in _run(search, Machine(), 100)} <= allowed


def test_neighbours_are_tasks_of_like_sizes():
    near, far = dense(640, 576), dense(8192, 8192)
    assert distance(TASK, near) < distance(TASK, far)
    history = [(t, m) for t in (far, near, norm()) for m in Still(0.05, 3).measure(t, sample(t, 10))]
    best = min((m for t, m in history if t is near), key=lambda m: m.cost(near.points))
    assert starts(TASK, history)[0] == best.config
    assert starts(near, [(t, m) for t, m in history if t is near]) == [], "a task is not its own neighbour"


# -- the budget -----------------------------------------------------------------------------------------------------
def _standing(**changes) -> Standing:
    fields = {"seconds": 1.0, "trials": 8, "trial_seconds": 1.0, "gained": 0.01, "hoped": 0.01, "finished": False}
    return Standing(**(fields | changes))


def test_every_task_gets_a_batch_the_longest_first():
    assert next_task([_standing(), _standing(trials=0, seconds=1), _standing(trials=0, seconds=2)]) == 2


@pytest.mark.parametrize(
    "better", [{"seconds": 2.0}, {"trial_seconds": 0.5}, {"gained": 0.1}, {"hoped": 0.1}], ids=lambda b: next(iter(b))
)
def test_trials_go_where_they_gain_most(better):
    assert next_task([_standing(), _standing(**better), _standing()]) == 1


def test_finished_tasks_get_nothing():
    assert next_task([_standing(finished=True, trials=0), _standing(hoped=0, gained=0)]) == 1
    assert next_task([_standing(finished=True)]) is None
    assert next_task([]) is None
