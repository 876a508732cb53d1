"""OpenVINO with the caches as its own state, in float32 or with weights compressed to int4 by NNCF."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from llmc.engines.base import ROOM, Engine, decoder_inputs


class OpenVinoEngine(Engine):
    def __init__(self, path: Path, threads: int) -> None:
        self.path = path
        self.options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self.requests: dict[int, Any] = {}
        self.request = self._request(1)
        self.inputs = [i.get_any_name() for i in self.request.get_compiled_model().inputs]

    def prepare(self, model: Any) -> Any:
        return model

    def call(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        results = self.request.infer(dict(inputs), share_inputs=True)
        return {port.get_any_name(): value for port, value in results.items()}

    def reset(self, batch: int = 1, room: int = ROOM) -> None:
        self.request = self._request(batch)
        self.request.reset_state()
        self.length = 0

    def step(self, ids: np.ndarray) -> np.ndarray:
        feeds = {k: v for k, v in decoder_inputs(ids, self.length).items() if k in self.inputs}
        self.request.infer(feeds, share_inputs=True)
        self.length += ids.shape[1]
        return np.asarray(self.request.get_tensor("logits").data)

    def _request(self, batch: int) -> Any:
        """The model compiled for a batch, kept. A decoder's batch must be known: a reset state starts from batch 0."""
        if batch not in self.requests:
            core = openvino.Core()
            model = self.prepare(core.read_model(str(self.path)))
            pasts = [i.get_any_name() for i in model.inputs if i.get_any_name().startswith("past")]
            if pasts:
                _keep_caches_inside(model, pasts, batch)
            self.requests[batch] = core.compile_model(model, "CPU", self.options).create_infer_request()
        return self.requests[batch]


class OpenVinoInt4Engine(OpenVinoEngine):
    """Symmetric int4 in groups of 32, every layer: NNCF's counterpart of w4a8-g32."""

    def prepare(self, model: Any) -> Any:
        import nncf

        mode = nncf.CompressWeightsMode.INT4_SYM
        return nncf.compress_weights(model, mode=mode, ratio=1.0, group_size=32, all_layers=True)


def _keep_caches_inside(model: Any, pasts: list[str], batch: int) -> None:
    """Turn past inputs and present outputs into state."""
    from openvino._offline_transformations import apply_make_stateful_transformation

    shapes = {}
    for port in model.inputs:
        shape, name = port.partial_shape, port.get_any_name()
        fixed = [batch, shape[1].get_length(), -1, shape[3].get_length()] if name in pasts else [batch, -1]
        shapes[name] = fixed
    model.reshape(shapes)
    presents = [o.get_any_name() for o in model.outputs if o.get_any_name() != "logits"]
    apply_make_stateful_transformation(model, dict(zip(pasts, presents, strict=True)))
