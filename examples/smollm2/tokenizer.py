"""The tokenizer that a GGUF file carries (byte-level BPE, as GPT-2's), as the `tokenizers` library reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONTROL, USER_DEFINED = 3, 4  # token types of GGUF that stand for themselves in the text


def write(metadata: dict[str, Any], folder: Path) -> None:
    """Writes tokenizer.json, chat_template.jinja and tokenizer_config.json (the special tokens) into `folder`."""
    tokens = metadata["tokenizer.ggml.tokens"]
    special = [i for i, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind in (CONTROL, USER_DEFINED)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": tokens[i], **flags} for i in special],
        # SmolLM splits numbers into digits before the byte-level pieces are cut.
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }
    template = metadata["tokenizer.chat_template"]
    config = {
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "model_max_length": metadata["llama.context_length"],
        "chat_template": template,
    }
    for name, data in (("tokenizer.json", spec), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(data, ensure_ascii=False), encoding="utf8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf8")
