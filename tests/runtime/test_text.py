"""Text: byte-level tokens come back as whole characters, and chat templates run in a sandbox."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmc.errors import ArtifactError, InputError, LlmcError
from llmc.runtime import load
from llmc.runtime.text import Text
from tests.runtime import toys

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

TEMPLATE = b"""{{ bos_token }}{% for m in messages %}
{% if m['role'] not in ['user', 'assistant'] %}{{ raise_exception('unknown role ' + m['role']) }}{% endif %}
[{{ m['role'] }}] {{ m['content'] }}
{% endfor %}
{% if add_generation_prompt %}[assistant]{% endif %}"""


def byte_tokenizer() -> bytes:
    """One token a byte: every character beyond ASCII takes several."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    return bytes(made.to_str().encode())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    path = tmp_path_factory.mktemp("text") / "m.llmc"
    toys.write_decoder(
        path,
        tokenizer__json=byte_tokenizer(),
        chat_template__jinja=TEMPLATE,
        tokenizer_config__json=json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "<end>"}).encode(),
    )
    return load(path).text


def test_round_trip(text: Text) -> None:
    assert text.decode(text.encode("Grüße, 世界 🌍")) == "Grüße, 世界 🌍"
    assert text.decode(text.encode("a<end>b")) == "ab"


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_streams_never_show_half_a_character(text: Text, written: str) -> None:
    stream, shown = text.stream(), ""
    for token in text.encode(written):
        piece = stream.push(token)
        assert "\ufffd" not in piece or "\ufffd" in written
        shown += piece
        assert written.startswith(shown)
    assert shown + stream.finish() == written
    assert "".join(text.stream().feed(iter(text.encode(written)))) == written


def test_a_cut_character_appears_only_at_the_end(text: Text) -> None:
    cut = text.encode("é🌍")[:-1]
    stream = text.stream()
    assert "".join(stream.push(token) for token in cut) == "é"
    assert set(stream.finish()) == {"\ufffd"}
    assert stream.finish() == ""


def test_chat(text: Text) -> None:
    prompt = text.chat([{"role": "user", "content": "hi"}])
    assert prompt == "<s>[user] hi\n[assistant]"
    with pytest.raises(InputError, match="unknown role ghost"):
        text.chat([{"role": "ghost", "content": "boo"}])


@pytest.mark.parametrize(
    "template",
    [b"{{ ''.__class__.__mro__ }}", b"{{ messages.append(1) }}", b"{% for x in %}", b"{{ missing.attribute }}"],
)
def test_templates_cannot_leave_their_sandbox(tmp_path: Path, template: bytes) -> None:
    path = toys.write_decoder(tmp_path / "m.llmc", tokenizer__json=byte_tokenizer(), chat_template__jinja=template)
    with pytest.raises(InputError, match="chat template"):
        load(path).text.chat([{"role": "user", "content": "hi"}])


def test_without_the_files(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no tokenizer\.json"):
        _ = load(toys.write_decoder(tmp_path / "a.llmc")).text
    with pytest.raises(ArtifactError, match="cannot be used"):
        _ = load(toys.write_decoder(tmp_path / "b.llmc", tokenizer__json=b"{}")).text
    bare = load(toys.write_decoder(tmp_path / "c.llmc", tokenizer__json=byte_tokenizer())).text
    with pytest.raises(ArtifactError, match=r"holds no chat_template\.jinja"):
        bare.chat([])


def test_without_the_package(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(LlmcError, match="tokenizers is not installed") as error:
        Text(text._artifact)
    assert "pip install tokenizers" in str(error.value.hint)
