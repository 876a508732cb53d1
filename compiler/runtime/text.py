"""Text in, tokens out, and back: the tokenizer and chat template that travel in the artifact."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from types import ModuleType
from typing import Any

from llmc.errors import ArtifactError, InputError, LlmcError
from llmc.package.reader import Artifact

TOKENIZER, TEMPLATE, CONFIG = "tokenizer.json", "chat_template.jinja", "tokenizer_config.json"
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what tokenizers give for a UTF-8 sequence that is not complete


class Text:
    """The model's tokenizer (tokenizer.json) and, if it has one, its chat template (Jinja).

    Raises ArtifactError if the artifact holds no tokenizer, LlmcError if a needed package is not installed.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        tokenizers, content = _needed("tokenizers"), artifact.read(TOKENIZER)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the package raises nothing more specific
            raise ArtifactError(f"{TOKENIZER} cannot be used: {error}", where=str(artifact.path)) from error

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; `special` adds what the tokenizer puts around a text (not wanted after a chat template)."""
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def stream(self) -> TextStream:
        """For text that must appear while its tokens arrive."""
        return TextStream(self)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt for `messages` ({"role", "content"}) up to where the assistant answers.

        Raises ArtifactError if the artifact has no chat template, InputError if the template refuses the messages.
        """
        try:
            return str(self._template.render(messages=messages, add_generation_prompt=True, **self._special_tokens))
        except _needed("jinja2").TemplateError as error:
            raise InputError(f"the chat template refuses these messages: {error}") from error

    @cached_property
    def _template(self) -> Any:
        sandbox = _needed("jinja2.sandbox")  # a template comes with the artifact: it may format text and nothing else

        def refuse(message: str) -> None:
            raise _needed("jinja2").TemplateError(message)

        environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        return environment.from_string(self._artifact.read(TEMPLATE).decode())

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token … as the template may name them."""
        if CONFIG not in self._artifact.manifest.entries:
            return {}
        found = {}
        for name, value in json.loads(self._artifact.read(CONFIG)).items():
            content = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(content, str):
                found[name] = content
        return found


class TextStream:
    """Turns tokens into text as they arrive, holding back characters whose bytes are not all there."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._ids: list[int] = []
        self._context = 0  # ids from here on are decoded: a token's text may depend on the few before it
        self._shown = 0  # ids up to here have been given out

    def push(self, token: int) -> str:
        """The text that `token` completes; often empty, never half a character."""
        self._ids.append(token)
        return self._advance(unfinished=False)

    def finish(self) -> str:
        """What is still held back, with a replacement character for an unfinished one."""
        return self._advance(unfinished=True)

    def feed(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of all `tokens`, in pieces as they come."""
        for token in tokens:
            if piece := self.push(token):
                yield piece
        if piece := self.finish():
            yield piece

    def _advance(self, *, unfinished: bool) -> str:
        before = self._text.decode(self._ids[self._context : self._shown])
        after = self._text.decode(self._ids[self._context :])
        if len(after) <= len(before) or (after.endswith(_UNFINISHED) and not unfinished):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return after[len(before) :]


def _needed(package: str) -> ModuleType:
    from importlib import import_module

    try:
        return import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise LlmcError(f"the package {name} is not installed", hint=f"pip install {name}") from error
