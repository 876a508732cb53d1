"""`llmc generate`: text from a prompt, shown while it is made; or from several prompts at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmc.cli.common import JsonFlag, ThreadsOption, print_json, stderr
from llmc.errors import OptionError

if TYPE_CHECKING:
    from llmc.runtime import Generation, Generations, Model


def command(
    artifact: Annotated[Path, typer.Argument(help="The .llmc file of a language model.")],
    prompt: Annotated[
        list[str] | None, typer.Argument(help="What to answer or, with --raw, to continue; several are read at once.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with further prompts, a line each.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Stop after so many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; higher is more varied.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw among so many likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes the draws repeatable.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="Use the chat template, or not; default: if there is one.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Go on without an end: keep only so many latest tokens, and the sinks.")
    ] = None,
    sinks: Annotated[
        int | None, typer.Option(help="With --window: how many of the first tokens stay.", show_default="4")
    ] = None,
    threads: ThreadsOption = None,
    json: JsonFlag = False,
) -> None:
    """Answer or continue a prompt, or several at once.

    One prompt's text appears while it is made, those of several as each is done. Several take little longer than one:
    each step reads the weights once for all of them. With --window a text may be longer than the model's length, in
    memory that does not grow.

    \b
    Example:
      llmc generate model.llmc "What is the capital of France?" --max-new-tokens 64
      llmc generate model.llmc "What is the capital of France?" "And of Peru?" --prompts more.txt
    """
    from llmc.runtime import generate, generate_all, load

    texts = [*(prompt or ()), *(_lines(prompts) if prompts else ())]
    if not texts:
        raise OptionError("there is no prompt", hint="give one, or a file of them with --prompts")
    if sinks is not None and window is None:
        raise OptionError("a session without a window keeps all tokens", where="--sinks", hint="give --window, too")
    started = time.perf_counter()
    model = load(artifact, threads=threads)
    loaded = time.perf_counter() - started
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    session = model.session(len(texts), window=window, sinks=4 if sinks is None else sinks)
    ids = [_encode(model, text, chat) for text in texts]
    found: Generation | Generations
    if len(texts) == 1:
        found = generate(session, ids[0], max_new_tokens, **options)  # type: ignore[arg-type]
        data = _show_one(model, found, json)
    else:
        found = generate_all(session, ids, max_new_tokens, **options)  # type: ignore[arg-type]
        data = _show_all(model, found, texts, json)
    new = found.new_tokens if isinstance(found.new_tokens, int) else sum(found.new_tokens)
    figures = {
        "prompt_tokens": found.prompt_tokens,
        "new_tokens": new,
        "load_s": loaded,
        "first_token_s": found.first_token_s,
        "prompt_tokens_per_s": found.prompt_tokens_per_s,
        "decode_tokens_per_s": found.decode_tokens_per_s,
    }
    if json:
        print_json(data | figures)
        return
    stderr().print(
        f"[dim]prompt: {found.prompt_tokens} tokens, {found.prompt_tokens_per_s:.0f} tokens/s; "
        f"answer: {new} tokens, {found.decode_tokens_per_s:.1f} tokens/s; "
        f"loaded in {loaded:.2f} s[/]"
    )


def _show_one(model: Model, generation: Generation, json: bool) -> dict[str, Any]:
    """The text as it comes, on standard output unless it is to be data."""
    text = ""
    try:
        for piece in model.text.stream().feed(generation):
            text += piece
            if not json:
                typer.echo(piece, nl=False)
    finally:
        if text and not json:
            typer.echo()
    return {"text": text, "finish": generation.finish}


def _show_all(model: Model, generations: Generations, prompts: list[str], json: bool) -> dict[str, Any]:
    """Each text after its prompt, in order, as soon as it and those before it are done."""
    rows: list[list[int]] = [[] for _ in prompts]
    shown = 0

    def show_finished() -> None:
        nonlocal shown
        while shown < len(prompts) and generations.finish[shown]:
            if not json:
                typer.echo(f"{shown + 1}. {prompts[shown]}\n{model.text.decode(rows[shown])}\n")
            shown += 1

    for tokens in generations:
        for row, token in zip(rows, tokens, strict=True):
            row += [] if token is None else [token]
        show_finished()
    show_finished()
    answers = zip(prompts, rows, generations.finish, strict=True)
    return {"answers": [{"prompt": p, "text": model.text.decode(row), "finish": why} for p, row, why in answers]}


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise OptionError(f"cannot be read: {reason}", where=str(path), hint="give a text file to --prompts") from None
    return [line for line in lines if line.strip()]


def _encode(model: Model, prompt: str, chat: bool | None) -> list[int]:
    """Token ids of the prompt, inside the chat template where there is one and --raw does not forbid it."""
    from llmc.runtime.text import TEMPLATE

    if chat is None:
        chat = TEMPLATE in model.manifest.entries
    if not chat:
        return model.text.encode(prompt)
    return model.text.encode(model.text.chat([{"role": "user", "content": prompt}]), special=False)
