"""What is tuned, and at which sizes."""

from __future__ import annotations

import pytest

from llmc.errors import OptionError
from llmc.schedules.attention.kv_append import KV_APPEND
from llmc.schedules.attention.workloads import KVAppendWorkload
from llmc.schedules.base import Kernel
from llmc.schedules.embedding.lowbit import LOWBIT_EMBEDDING, LowBitEmbeddingWorkload
from llmc.schedules.gemm.lowbit import LOWBIT, LowBitLinearWorkload
from llmc.schedules.norm.norm import NORM, NormWorkload
from llmc.targets.x86 import AVX512
from llmc.tune.record import points_text
from llmc.tune.tasks import has_choice, points_at, points_of, tasks_of

from .synthetic import attention

LINEAR = Kernel(LOWBIT, LowBitLinearWorkload(960, 576, 4, 32))
TABLE = Kernel(LOWBIT_EMBEDDING, LowBitEmbeddingWorkload(96, 64, 4, 32))
APPEND = Kernel(KV_APPEND, KVAppendWorkload(9, 3, 64, in_place=True))


def test_kernels_with_a_choice_are_tasks_that_weigh_their_calls() -> None:
    tasks = tasks_of({LINEAR: 30, TABLE: 1, APPEND: 60}, AVX512)
    assert [(t.kernel, t.calls, t.target) for t in tasks] == [(LINEAR, 30, AVX512), (APPEND, 60, AVX512)]
    assert has_choice(LINEAR, AVX512) and not has_choice(TABLE, AVX512)


@pytest.mark.parametrize(("others", "first"), [({}, 0.1), ({APPEND: 1}, 0.5)], ids=["plain", "decoder"])
def test_a_decoder_weighs_one_row_as_much_as_many(others: dict[Kernel, int], first: float) -> None:
    task = tasks_of({LINEAR: 1, **others}, AVX512)[0]
    assert [p.sizes() for p in task.points] == [{"M": 1}, {"M": 128}, {"M": 512}]
    assert [p.weight for p in task.points] == pytest.approx([first, (1 - first) / 2, (1 - first) / 2])


@pytest.mark.parametrize("kernel", [LINEAR, Kernel(NORM, NormWorkload(576)), TABLE], ids=lambda k: k.template.name)
def test_rows_that_a_user_chooses_count_alike(kernel: Kernel) -> None:
    assert points_text(points_at(kernel, (1, 128, 1))) == "M=1 1;M=128 1"


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [(attention().kernel, [(1, 192), (1, 512), (128, 128)]), (APPEND, [(1, 512), (32, 64), (128, 128)])],
    ids=lambda x: x.template.name if isinstance(x, Kernel) else "",
)
def test_tokens_are_no_rows(kernel: Kernel, expected: list[tuple[int, int]]) -> None:
    """Attention shares few keys out among threads in another way than many: one token is timed behind both."""
    with pytest.raises(OptionError, match=f"{kernel.template.name} has no rows"):
        points_at(kernel, (1,))
    assert [(p.sizes()["S"], p.sizes()["C"]) for p in points_of(kernel)] == expected
