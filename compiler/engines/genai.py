"""onnxruntime-genai: the folder of the ONNX file must hold a genai_config.json."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime_genai

from llmc.engines.base import ROOM, Engine
from llmc.errors import ModelError


class GenAiEngine(Engine):
    def __init__(self, path: Path, threads: int) -> None:
        config_file = path.parent / "genai_config.json"
        if not config_file.is_file():
            raise ModelError("onnxruntime-genai needs a genai_config.json beside the model", where=str(path))
        configured = json.loads(config_file.read_text())["model"]["decoder"]["session_options"]
        config = onnxruntime_genai.Config(str(path.parent))
        if configured.get("intra_op_num_threads") != threads:
            overlay = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
            config.overlay(json.dumps(overlay))
        self.model = onnxruntime_genai.Model(config)

    def reset(self, batch: int = 1, room: int = ROOM) -> None:
        params = onnxruntime_genai.GeneratorParams(self.model)
        length = max(room + 1, ROOM)  # caches are made for all of it at once; the last token is chosen, but never read
        params.set_search_options(batch_size=batch, max_length=length, min_length=length, do_sample=False)
        self.generator = onnxruntime_genai.Generator(self.model, params)

    def step(self, ids: np.ndarray) -> np.ndarray:
        self._append(ids)
        return np.asarray(self.generator.get_output("logits"))

    def read(self, ids: np.ndarray) -> None:
        self._append(ids)

    def decode(self, n: int) -> None:
        for _ in range(n + 1):  # the first one only chooses, from the logits of the prompt
            self.generator.generate_next_token()

    def _append(self, ids: np.ndarray) -> None:
        self.generator.append_tokens(ids.astype(np.int32))
