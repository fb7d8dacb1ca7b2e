"""Weights sharded with FSDP2: sums in float32, and a whole model in the end."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_dilated.integration.support import UnsupportedError

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object


class ShardedTrainerMixin(Base):
    """What ``Trainer`` leaves open under FSDP2; without FSDP it changes nothing.

    accelerate reduces gradients in the precision of the autocast and rounds every output to it, so that a bfloat16 run
    logs losses of three digits. Here gradients are summed in float32 and losses stay as they are. ``save_model`` writes
    whole weights, on one process, also where checkpoints are sharded: ``Trainer`` would write nothing.

    Raises:
        UnsupportedError: Under the first version of FSDP, or if one process alone has read weights that PEFT has tied.

    Example:
        >>> from transformers import Trainer
        >>> class MyTrainer(ShardedTrainerMixin, Trainer):
        ...     pass
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if not self.is_fsdp_enabled or not self.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
            return
        if hasattr(self.model, "peft_config") and self.model.config.get_text_config().tie_word_embeddings:
            raise UnsupportedError(
                "fsdp_cpu_ram_efficient_loading: accelerate cannot tie the embeddings of an adapted model again; "
                "set it to false, before the model is loaded"
            )

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, and say in what precision FSDP sums."""
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None:
            return
        if plugin.fsdp_version != 2:
            raise UnsupportedError(f"fsdp_version={plugin.fsdp_version}: set fsdp_version: 2 in the configuration")
        if plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = replace(
                plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole model, on all processes together; within a checkpoint, what ``Trainer`` saves there."""
        if _internal_call or not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        plugin = self.accelerator.state.fsdp_plugin
        kind = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            super().save_model(output_dir)
        finally:
            plugin.set_state_dict_type(kind)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled and not any(Path(resume_from_checkpoint).glob("pytorch_model_fsdp*")):
            raise ValueError(
                f"{resume_from_checkpoint} was saved without FSDP; go on without it, or start in a new output_dir"
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is not None:  # gathered, so that tied weights no longer share memory
            tied = getattr(self.model, "all_tied_weights_keys", {})
            state_dict = {name: weight for name, weight in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict=state_dict)
