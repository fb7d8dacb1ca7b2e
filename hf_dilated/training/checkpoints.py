"""Which checkpoint to go on from after a kill, and that it goes on where it was."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object


def last_complete_checkpoint(output: Path) -> Path | None:
    """Return the newest checkpoint of ``Trainer`` that was written to its end; None if there is none.

    ``Trainer`` writes its own state after everything else, so a checkpoint without it was cut short. With several
    processes that takes :class:`CompleteCheckpointsMixin`.
    """
    found = [
        (int(state.parent.name.rpartition("-")[2]), state.parent)
        for state in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
        if _is_json(state)
    ]
    return max(found)[1] if found else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text("utf-8"))
    except ValueError:
        return False
    return True


class CompleteCheckpointsMixin(Base):
    """Put before ``Trainer``: its state is written when every process has written its part of a checkpoint."""

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # the last part before the state
        self.accelerator.wait_for_everyone()


# Not the name of the class: under that ``Trainer`` may put what the checkpoint holds in place of the callback, which
# would then be compared with itself.
ROWS_PER_STEP = "rows a step"


class RowsPerStep(TrainerCallback):
    """Refuses to go on from a checkpoint with another number of rows a step: the stream would go on elsewhere.

    Args:
        rows: Of all processes, in every step.

    Raises:
        ValueError: When the training begins, if the checkpoint says otherwise.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Compare with the checkpoint, or write the number down for the next one."""
        before = state.stateful_callbacks.setdefault(ROWS_PER_STEP, self.rows)
        if before != self.rows:
            raise ValueError(
                f"rows a step: {before} until this checkpoint, {self.rows} from now on, and the stream would go on at "
                "another row; choose --per_device_train_batch_size and --gradient_accumulation_steps for the number "
                f"of processes so that there are {before} again, or start in a new --output_dir"
            )
