"""Models of our own, written so that a checkpoint can carry their code.

Importing this package registers them with the Auto classes of Transformers.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from modeling.configuration_longnet import LongNetConfig
from modeling.modeling_longnet import (
    LongNetForCausalLM,
    LongNetForMaskedLM,
    LongNetForSequenceClassification,
    LongNetModel,
)

__all__ = [
    "LongNetConfig",
    "LongNetForCausalLM",
    "LongNetForMaskedLM",
    "LongNetForSequenceClassification",
    "LongNetModel",
]

AutoConfig.register("longnet", LongNetConfig, exist_ok=True)
LongNetConfig.register_for_auto_class()
for auto, model in (
    (AutoModel, LongNetModel),
    (AutoModelForCausalLM, LongNetForCausalLM),
    (AutoModelForMaskedLM, LongNetForMaskedLM),
    (AutoModelForSequenceClassification, LongNetForSequenceClassification),
):
    auto.register(LongNetConfig, model, exist_ok=True)
    model.register_for_auto_class(auto.__name__)
