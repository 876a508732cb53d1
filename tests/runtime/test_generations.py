"""Several texts at once are the texts that come out one by one."""

from __future__ import annotations

import pytest

from llmc.errors import InputError, OptionError
from llmc.runtime import Model, generate, generate_all, load
from tests.runtime import toys

PROMPTS = [[3, 1, 4], [1] * 20, [5, 9]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(toys.write_decoder(tmp_path_factory.mktemp("decoder") / "m.llmc"))


@pytest.mark.parametrize("sampled", [{}, {"temperature": 20.0, "top_k": 9, "seed": 3}])
def test_rows_are_what_they_are_alone(model: Model, sampled: dict[str, float]) -> None:
    alone = [list(generate(model.session(), prompt, 12, **sampled)) for prompt in PROMPTS]  # type: ignore[arg-type]
    run = generate_all(model.session(3), PROMPTS, 12, **sampled)  # type: ignore[arg-type]
    assert [list(row) for row in zip(*run, strict=True)] == alone
    assert run.finish == ["limit"] * 3 and run.new_tokens == [12] * 3 and run.prompt_tokens == 25
    assert run.prompt_tokens_per_s > 0 and run.decode_tokens_per_s > 0


def test_rows_end_on_their_own(model: Model) -> None:
    alone = [list(generate(model.session(), prompt, 12)) for prompt in PROMPTS]
    end = alone[0][3]
    run = generate_all(model.session(3), PROMPTS, 12, eos=[end])
    rows = [[t for t in row if t is not None] for row in zip(*run, strict=True)]
    assert rows == [row[: row.index(end)] if end in row else row for row in alone]
    assert run.finish == ["eos" if end in row else "limit" for row in alone]


def test_a_full_row_ends_alone(model: Model) -> None:
    run = generate_all(model.session(2), [[1] * (toys.MAX_LENGTH - 2), [1]], 9)
    steps = list(run)
    assert run.finish == ["full", "limit"] and run.new_tokens == [3, 9] and len(steps) == 9


def test_wrong_calls(model: Model) -> None:
    with pytest.raises(InputError, match="1 prompts for a session of 2 rows"):
        generate_all(model.session(2), [[1]], 1)
    with pytest.raises(InputError, match="prompt 2: the prompt is empty"):
        generate_all(model.session(2), [[1], []], 1)
    with pytest.raises(OptionError, match="max_new_tokens is -1"):
        generate_all(model.session(2), [[1], [2]], -1)
