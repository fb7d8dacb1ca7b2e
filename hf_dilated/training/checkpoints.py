"""Which checkpoint to go on from after a kill."""

import json
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def last_complete_checkpoint(output: Path) -> Path | None:
    """Return the newest checkpoint of ``Trainer`` that was written to its end; None if there is none.

    ``Trainer`` writes its own state after everything else, so a checkpoint without it was cut short.
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
