"""EleutherAI's lm-evaluation-harness with the backends of this package: the model type ``hf-dilated``."""

import json
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM


@register_model("hf-dilated")
class DilatedLM(HFLM):
    """The harness's own ``hf`` model, with a backend and a pattern.

    Args:
        pretrained: A folder, a name on the Hub, or a loaded model, which is then taken as it is.
        attention: Name of a backend, or ``"dense"``; by default what the checkpoint holds.
        pattern: The backend's pattern, as a dictionary or JSON.
        options: As the harness's ``hf`` takes them.
    """

    def __init__(self, pretrained: Any, attention: str | None = None, pattern: Any = None, **options: Any) -> None:
        if attention is not None:
            options["attn_implementation"] = "sdpa" if attention == "dense" else attention
        if pattern is not None:
            options["hf_dilated"] = json.loads(pattern) if isinstance(pattern, str) else pattern
        super().__init__(pretrained=pretrained, **options)
