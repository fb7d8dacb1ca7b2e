"""FSDP2 on CPU processes, which accelerate offers on accelerators only; run as a script, the training script under it.

accelerate launch --config_file scripts/accelerate/gpu2.yaml tests/training/cpu_fsdp.py …
"""

import importlib
import os
import sys
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATION = ROOT / "scripts" / "accelerate" / "gpu2.yaml"


def call_cpus_accelerators() -> None:
    """Let accelerate take the processes for GPUs whose device is the CPU."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


def configure(configuration: Path, **changes: str) -> None:
    """Set the variables that ``accelerate launch`` would set, and ``changes`` to them."""
    arguments = launch_command_parser().parse_args(["--config_file", str(configuration), "script"])
    os.environ |= prepare_multi_gpu_env(_validate_launch_command(arguments)[0]) | changes
    call_cpus_accelerators()


if __name__ == "__main__":
    call_cpus_accelerators()
    sys.path.insert(0, str(ROOT / "scripts"))
    importlib.import_module("train_long_context").main()
