"""Document boundaries beside the position ids: agreed, or refused."""

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from hf_dilated import DilatedConfig
from hf_dilated.integration.documents import shared_positions
from hf_dilated.integration.packing import check_boundaries
from hf_dilated.integration.support import UnsupportedError
from tests.tiny_models import tiny_model, tokens

POSITIONS = torch.tensor([[0, 1, 2, 0, 1]])
AGREEING = [
    {"cu_seq_lens_q": torch.tensor([0, 3, 5])},
    {"cu_seq_lens_k": torch.tensor([0, 3, 5], dtype=torch.int32)},
    {"seq_idx": torch.tensor([[0, 0, 0, 1, 1]])},
]
DIFFERENT = [
    {"cu_seq_lens_q": torch.tensor([0, 2, 5])},
    {"cu_seq_lens_k": torch.tensor([0, 5])},
    {"cu_seq_lens_q": torch.tensor([0, 3, 4])},
    {"seq_idx": torch.tensor([[0, 0, 1, 1, 1]])},
    {"seq_idx": torch.tensor([0, 0, 0, 1, 1])},
]


@pytest.mark.parametrize("options", AGREEING)
def test_what_agrees_passes(options: dict[str, Tensor]) -> None:
    check_boundaries(options, POSITIONS, batch=1, keys=5)


@pytest.mark.parametrize("options", DIFFERENT)
def test_what_differs_is_refused(options: dict[str, Tensor]) -> None:
    with pytest.raises(UnsupportedError, match="its documents are not those of the position_ids"):
        check_boundaries(options, POSITIONS, batch=1, keys=5)


def test_one_whole_document() -> None:
    check_boundaries({"cu_seq_lens_q": torch.tensor([0, 5])}, None, batch=1, keys=5)
    with pytest.raises(UnsupportedError):
        check_boundaries({"cu_seq_lens_q": torch.tensor([0, 3, 5])}, None, batch=1, keys=5)
    with pytest.raises(UnsupportedError):
        check_boundaries({"cu_seq_lens_q": torch.tensor([0, 5, 10])}, None, batch=2, keys=5)


def test_tensors_that_changed_are_compared_again() -> None:
    boundaries, positions = torch.tensor([0, 3, 5]), POSITIONS.clone()
    check_boundaries({"cu_seq_lens_q": boundaries}, positions, batch=1, keys=5)
    boundaries[1] = 2
    with pytest.raises(UnsupportedError):
        check_boundaries({"cu_seq_lens_q": boundaries}, positions, batch=1, keys=5)


def test_the_flattening_collator() -> None:
    pattern = DilatedConfig(segment_lengths=(4, 16), dilation_rates=(1, 2))
    model = tiny_model("llama", "dilated", hf_dilated=pattern)
    documents = [tokens(1, length, seed=length)[0].tolist() for length in (5, 1, 12)]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collate([{"input_ids": document} for document in documents])
    assert {"cu_seq_lens_q", "seq_idx"} <= set(batch)
    with torch.no_grad():
        packed = model(**batch).logits[0].split([5, 1, 12])
        alone = [model(torch.tensor([document])).logits[0] for document in documents]
    for one, other in zip(packed, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_kept_position_ids_serve_batches_of_every_size():
    position_ids = torch.tensor([[0, 1, 2, 0, 1]])
    for batch in (2, 3):
        positions = shared_positions(None, position_ids, batch, 5, 5)
        assert positions is not None
        assert positions.tolist() == [[0, 1, 2, 0, 1]] * batch
