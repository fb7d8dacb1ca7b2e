"""What ranks need, imported once: they are forked off the process that has done so."""

import torch

import hf_dilated  # noqa: F401
import tests.distributed.processes  # noqa: F401

torch.set_num_threads(1)
