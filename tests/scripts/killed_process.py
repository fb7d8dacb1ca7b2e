"""The training script, one process of which is killed in its third step: torchrun tests/scripts/killed_process.py …"""

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, TrainerCallback, TrainingArguments

ROOT = Path(__file__).resolve().parents[2]


class Killed(TrainerCallback):
    """Ends the last process like a power cut."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if state.global_step == 2 and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "scripts"))
    script = importlib.import_module("train_long_context")
    parser = HfArgumentParser((script.ModelArguments, script.DataArguments, TrainingArguments))
    script.run(*parser.parse_args_into_dataclasses(), callbacks=[Killed()])
