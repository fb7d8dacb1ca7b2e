"""Settings that must stand before anything is imported.

``HF_DILATED_TEST_DEVICE=cuda`` runs on a GPU what makes its tensors without naming a device:
``pytest tests/engine tests/integration/test_{masks,compile,generation}.py``.

Generated cases are the same in every run; ``pytest --hypothesis-profile=default`` searches for new ones.
"""

import gc
import os

import pytest
import torch
from hypothesis import settings

os.environ["COLUMNS"] = "240"  # messages of the command are compared line by line
torch.set_default_device(os.environ.get("HF_DILATED_TEST_DEVICE", "cpu"))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels run as plain Python
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="module")
def _little_garbage() -> None:
    """What is loaded by now stays: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what is loaded goes with the process as ever
