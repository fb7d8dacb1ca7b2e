"""From a dense checkpoint or model to one that runs a backend of this package, and back."""

from hf_dilated.patching.checkpoint import (
    CheckpointPlan,
    patch_checkpoint,
    plan_patch,
    plan_unpatch,
    unpatch_checkpoint,
)
from hf_dilated.patching.errors import PatchError
from hf_dilated.patching.live import patch_model, unpatch_model

__all__ = [
    "CheckpointPlan",
    "PatchError",
    "patch_checkpoint",
    "patch_model",
    "plan_patch",
    "plan_unpatch",
    "unpatch_checkpoint",
    "unpatch_model",
]
