"""The mask function alone, through Transformers' own mask builders."""

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    StaticCache,
    masking_utils,
)

from hf_dilated.integration import documents
from hf_dilated.integration.documents import check_gaps, shared_positions
from hf_dilated.integration.masks import FORMS, position_mask
from hf_dilated.integration.support import UnsupportedError

CONFIG = LlamaConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, attn_implementation="dilated")
MODELS = (LlamaModel, MistralModel)  # loaded, as they are when a model asks for its mask


def build(
    length, *, mask=None, cache=None, position_ids=None, builder=masking_utils.create_causal_mask, batch=1, **more
):
    mask = None if mask is None else torch.tensor(mask)
    return builder(
        config=more.pop("config", CONFIG), inputs_embeds=torch.zeros(batch, length, 8), attention_mask=mask,
        past_key_values=cache, position_ids=position_ids, **more,
    )  # fmt: skip


def filled(cache, length):
    keys = torch.zeros(1, 1, length, 8)
    cache.update(keys, keys, 0)
    return cache


def static(length, slots=8):
    cache = StaticCache(config=CONFIG, max_cache_len=slots)
    return filled(cache, length) if length else cache


def rows(mask):
    assert FORMS[mask.dtype].has_positions
    assert mask.shape[1:3] == (1, 1)
    return mask[:, 0, 0].tolist()


def is_whole(mask):
    return mask.shape[:3] == (1, 1, 1) and not FORMS[mask.dtype].has_positions


def test_whole_documents_need_no_positions():
    assert is_whole(build(5))
    assert shared_positions(build(5, mask=[[1] * 5]), None, batch=1, queries=5, keys=5) is None
    assert is_whole(build(3, cache=filled(DynamicCache(), 4)))
    assert is_whole(build(1, cache=filled(DynamicCache(), 4)))
    mask = build(3, mask=[[1] * 7], cache=filled(DynamicCache(), 4))
    assert shared_positions(mask, None, batch=1, queries=3, keys=7) is None
    assert is_whole(build(5, builder=masking_utils.create_bidirectional_mask))


@pytest.mark.parametrize("mask", [None, [[1, 1, 1, 0]]])
def test_masks_say_whether_tokens_see_the_future(mask):
    assert FORMS[build(4, mask=mask).dtype].is_causal
    assert not FORMS[build(4, mask=mask, builder=masking_utils.create_bidirectional_mask).dtype].is_causal


def test_padding_has_no_position():
    assert rows(build(5, mask=[[0, 0, 1, 1, 1], [1, 1, 1, 0, 1]], batch=2)) == [[-1, -1, 0, 1, 2], [0, 1, 2, -1, 3]]
    assert rows(build(4, mask=[[1, 1, 0, 0]], builder=masking_utils.create_bidirectional_mask)) == [[0, 1, -1, -1]]


@pytest.mark.parametrize("queries", [1, 3])
def test_slots_that_are_not_written(queries):
    expected = [*range(2 + queries), *[-2] * (6 - queries)]
    assert rows(build(queries, cache=static(2))) == [expected]
    assert rows(build(queries, cache=static(2), mask=[[0] + [1] * (1 + queries)])) == [
        [p - 1 if p >= 0 else p for p in expected]
    ]


def test_one_query_never_looks_at_the_padding_mask():
    """What is all real on the host is not looked at while decoding, so positions come instead of None."""
    assert rows(build(1, mask=[[1] * 5], cache=filled(DynamicCache(), 4))) == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("builder", [masking_utils.create_causal_mask, masking_utils.create_sliding_window_causal_mask])
def test_packed_documents(builder):
    config = MistralConfig(sliding_window=4, attn_implementation="dilated")

    ids = torch.tensor([[0, 1, 2, 0, 7, 8], [5, 6, 7, 8, 9, 0]])
    mask = build(6, position_ids=ids, builder=builder, batch=2, config=config)
    assert rows(mask) == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 0]]


def test_a_cache_that_keeps_a_window_counts_from_its_first_slot():
    config = MistralConfig(sliding_window=4, num_hidden_layers=1, attn_implementation="dilated")
    cache = filled(DynamicCache(config=config), 9)
    options = {"cache": cache, "builder": masking_utils.create_sliding_window_causal_mask, "config": config}
    assert is_whole(build(1, **options))
    assert rows(build(1, mask=[[0] * 7 + [1] * 3], **options)) == [[-1, 0, 1, 2]]


def test_padding_inside_a_window_is_refused():
    config = MistralConfig(sliding_window=4, attn_implementation="dilated")
    options = {"builder": masking_utils.create_sliding_window_causal_mask, "config": config}
    positions = rows(build(5, mask=[[0, 1, 1, 1, 0]], **options))
    assert positions == [[-1, 0, 1, 2, -1]]
    check_gaps(torch.tensor(positions))
    with pytest.raises(UnsupportedError, match="padding between real tokens"):
        check_gaps(torch.tensor(rows(build(5, mask=[[0, 1, 0, 1, 1]], **options))))


def custom(batch_idx, head_idx, q_idx, kv_idx):
    return kv_idx < 2


@pytest.mark.parametrize(
    ("more", "seen"),
    [
        ({"or_mask_function": custom}, "or_masks"),
        ({"and_mask_function": custom}, "and_masks"),
        ({"block_sequence_ids": torch.tensor([[-1, 0, 0, -1]])}, "or_masks"),
    ],
)
def test_masks_with_additions_are_refused(more, seen):
    with pytest.raises(UnsupportedError, match=seen):
        build(4, **more)


def test_chunked_attention_is_refused():
    config = LlamaConfig(attn_implementation="dilated")
    config.attention_chunk_size = 2
    with pytest.raises(UnsupportedError, match="and_masks"):
        build(4, builder=masking_utils.create_chunked_causal_mask, config=config)


def test_queries_of_another_sequence_are_refused():
    with pytest.raises(UnsupportedError, match="cross-attention"):
        build(3, builder=masking_utils.create_bidirectional_mask, encoder_hidden_states=torch.zeros(1, 5, 8))


def test_unknown_arguments_are_refused():
    with pytest.raises(UnsupportedError, match="segments=3"):
        position_mask(1, 2, 2, config=CONFIG, segments=3)


def test_kinds_of_layers_share_what_a_padding_mask_says():
    mask = torch.tensor([[False, True, True, True]], device="cpu")
    windowed = masking_utils.sliding_window_causal_mask_function(2)
    plain, again = (position_mask(1, 4, 4, attention_mask=mask, mask_function=f, config=CONFIG)
                    for f in (masking_utils.causal_mask_function, windowed))  # fmt: skip
    assert plain is again
    mask[0, 0] = True
    assert position_mask(1, 4, 4, attention_mask=mask, config=CONFIG).flatten().tolist() == [0, 1, 2, 3]


def test_positions_and_ids_come_to_the_host_together(monkeypatch):
    """On a device, where `cpu()` waits for all work under way."""
    transfers = []
    mask, ids = (torch.tensor([values]) for values in ([-1, 0, 1, 2], [0, 1, 2, 0]))

    class Away(torch.Tensor):
        """A tensor that says that it is somewhere else."""

        device = torch.device("meta")

        def cpu(self):
            transfers.append(self)
            return self.as_subclass(torch.Tensor)

    found = documents._fetch(mask.as_subclass(Away), ids.as_subclass(Away))
    assert [x.tolist() for x in found] == [mask.tolist(), ids.tolist()]
    assert len(transfers) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_decoding_on_a_device_asks_the_host_for_nothing():
    mask = torch.ones(2, 9, dtype=torch.bool, device="cuda")
    with torch.cuda.device(0):
        torch.cuda.set_sync_debug_mode("error")
        try:
            positions = position_mask(2, 1, 9, q_offset=8, attention_mask=mask, config=CONFIG, device="cuda")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert positions.device.type == "cuda"


def test_positions_stay_where_they_are_whatever_the_default_device():
    mask = torch.tensor([[False, True, True, True]], device="cpu")
    with torch.device("meta"):
        positions = position_mask(1, 4, 4, attention_mask=mask, config=CONFIG, device="cpu")
    assert rows(positions) == [[-1, 0, 1, 2]]
