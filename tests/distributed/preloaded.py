"""What ranks need, imported once: they are forked off the process that has done so."""

import gc

import datasets  # noqa: F401
import peft  # noqa: F401
import torch
import transformers.trainer  # noqa: F401
import trl.trainer.sft_trainer  # noqa: F401

import hf_dilated  # noqa: F401
import tests.distributed.processes  # noqa: F401

torch.set_num_threads(1)
gc.collect()
gc.freeze()  # the collector of a rank looks at its own objects alone, and copies no pages of these
