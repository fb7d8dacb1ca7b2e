import pytest
import torch
from transformers.utils import logging

from tests.integration import oracle_backend

oracle_backend.install()
logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
