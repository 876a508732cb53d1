"""`llmc generate`: text from a prompt, shown while it is made."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmc.cli.common import JsonFlag, ThreadsOption, print_json, stderr

if TYPE_CHECKING:
    from llmc.runtime import Model


def command(
    artifact: Annotated[Path, typer.Argument(help="The .llmc file of a language model.")],
    prompt: Annotated[str, typer.Argument(help="What to answer or, with --raw, to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Stop after so many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; higher is more varied.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw among so many likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes the draws repeatable.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="Use the chat template, or not; default: if there is one.")
    ] = None,
    threads: ThreadsOption = None,
    json: JsonFlag = False,
) -> None:
    """Answer or continue a prompt.

    \b
    Example:
      llmc generate model.llmc "What is the capital of France?" --max-new-tokens 64
    """
    from llmc.runtime import generate, load

    started = time.perf_counter()
    model = load(artifact, threads=threads)
    loaded = time.perf_counter() - started
    generation = generate(
        model.session(),
        _encode(model, prompt, chat),
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    text = ""
    try:
        for piece in model.text.stream().feed(generation):
            text += piece
            if not json:
                typer.echo(piece, nl=False)
    finally:
        if text and not json:
            typer.echo()
    figures = {
        "prompt_tokens": generation.prompt_tokens,
        "new_tokens": generation.new_tokens,
        "finish": generation.finish,
        "load_s": loaded,
        "first_token_s": generation.first_token_s,
        "prompt_tokens_per_s": generation.prompt_tokens_per_s,
        "decode_tokens_per_s": generation.decode_tokens_per_s,
    }
    if json:
        print_json({"text": text, **figures})
        return
    stderr().print(
        f"[dim]prompt: {generation.prompt_tokens} tokens, {generation.prompt_tokens_per_s:.0f} tokens/s; "
        f"answer: {generation.new_tokens} tokens, {generation.decode_tokens_per_s:.1f} tokens/s; "
        f"loaded in {loaded:.2f} s[/]"
    )


def _encode(model: Model, prompt: str, chat: bool | None) -> list[int]:
    """Token ids of the prompt, inside the chat template where there is one and --raw does not forbid it."""
    from llmc.runtime.text import TEMPLATE

    if chat is None:
        chat = TEMPLATE in model.manifest.entries
    if not chat:
        return model.text.encode(prompt)
    return model.text.encode(model.text.chat([{"role": "user", "content": prompt}]), special=False)
