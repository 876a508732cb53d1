"""Generation: the tokens a loop over full runs would choose, when it stops, and its figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmc.errors import InputError, OptionError
from llmc.runtime import Model, generate, load
from tests.runtime import toys

PROMPT = [3, 1, 4]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(toys.write_decoder(tmp_path_factory.mktemp("decoder") / "m.llmc"))


def expected_greedy(count: int) -> list[int]:
    ids = list(PROMPT)
    for _ in range(count):
        ids.append(int(toys.decoder_reference(np.array([ids]))[0, -1].argmax()))
    return ids[len(PROMPT) :]


def test_greedy(model: Model) -> None:
    run = generate(model.session(), PROMPT, 12)
    assert list(run) == expected_greedy(12)
    assert (run.finish, run.new_tokens, run.prompt_tokens) == ("limit", 12, 3)
    assert run.first_token_s > 0 and run.prompt_tokens_per_s > 0 and run.decode_tokens_per_s > 0


def test_a_session_generates_too(model: Model) -> None:
    sampled = {"temperature": 0.8, "top_k": 5, "seed": 7}
    assert list(model.session().generate(PROMPT, 12)) == expected_greedy(12)
    assert list(model.session().generate(PROMPT, 6, **sampled)) == list(generate(model.session(), PROMPT, 6, **sampled))


def test_tokens_stream(model: Model) -> None:
    session = model.session()
    run = generate(session, PROMPT, 5)
    assert session.length == 0
    next(run)
    assert session.length == len(PROMPT)
    next(run)
    assert session.length == len(PROMPT) + 1
    assert run.finish is None


def test_stops_at_the_end_token(model: Model, tmp_path: Path) -> None:
    full = expected_greedy(12)
    end = full[4]
    first = full.index(end)
    run = generate(model.session(), PROMPT, 12, eos=[end])
    assert list(run) == full[:first] and run.finish == "eos"
    own = load(toys.write_decoder(tmp_path / "m.llmc", eos=(end,)))
    assert list(generate(own.session(), PROMPT, 12)) == full[:first]
    assert list(generate(own.session(), PROMPT, 12, eos=())) == full


def test_stops_when_the_model_is_full(model: Model) -> None:
    session = model.session()
    session.append(np.zeros(toys.MAX_LENGTH - 5, int))
    run = generate(session, PROMPT, 100)
    assert len(list(run)) == 3 and run.finish == "full"
    assert session.length == toys.MAX_LENGTH


def test_continues_a_session(model: Model) -> None:
    session = model.session()
    session.append(PROMPT[:2])
    assert list(generate(session, PROMPT[2:], 6)) == expected_greedy(6)


def test_seeds_reproduce(model: Model) -> None:
    def sample(seed: int) -> list[int]:
        return list(generate(model.session(), PROMPT, 20, temperature=20.0, top_k=40, top_p=0.95, seed=seed))

    assert sample(5) == sample(5)
    assert sample(5) != sample(6)


def test_nothing_to_do(model: Model) -> None:
    run = generate(model.session(), PROMPT, 0)
    assert list(run) == [] and run.finish == "limit" and run.prompt_tokens_per_s == 0


def test_unusable_requests(model: Model) -> None:
    with pytest.raises(InputError, match="2 rows"):
        generate(model.session(2), PROMPT, 1)
    with pytest.raises(OptionError, match="max_new_tokens"):
        generate(model.session(), PROMPT, -1)
    with pytest.raises(InputError, match="prompt is empty"):
        next(generate(model.session(), [], 1))
