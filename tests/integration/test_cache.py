"""Caches that drop keys: the same tokens as with a full cache, in every way of generating."""

import copy
import weakref
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GenerationConfig

from hf_dilated import BlockParts, BlockSparseConfig, DilatedConfig
from hf_dilated.integration.backends import BACKENDS
from hf_dilated.integration.cache import BlockSparseCache, DilatedCache, PatternCache, PatternLayer
from hf_dilated.integration.kept import attend_kept, kept_keys
from hf_dilated.integration.places import Places, Told
from hf_dilated.integration.store import Store
from hf_dilated.integration.support import UnsupportedError
from tests.cases import ATTENTION, Config, block_configs, configs
from tests.tiny_models import tiny_model, tokens

DILATED = DilatedConfig(
    segment_lengths=(8, 16, 64), dilation_rates=(1, 2, 4), sink_tokens=2, phase="alternate", rotate=True
)
COUNT = DilatedConfig.longnet((8, 16, 64), (1, 2, 4))
BLOCKS = BlockSparseConfig(block_size=4, local_blocks=2, global_blocks=1, dilated_blocks=2)
ALL, NEAR = BlockParts(stride_blocks=1), BlockParts(local_blocks=2, global_blocks=1)
CLASSES = BlockSparseConfig(block_size=4, layers=((ALL, NEAR, NEAR, NEAR),))
PATTERNS: dict[str, Config] = {"dilated": DILATED, "count": COUNT, "blocks": BLOCKS, "classes": CLASSES}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "chunked prefill": {"prefill_chunk_size": 7},
    "beam": {"num_beams": 3},
    "sampled": {"do_sample": True, "top_k": 5},
    "several answers": {"do_sample": True, "num_return_sequences": 2},
}


def running(family: str, pattern: Config) -> Any:
    model = tiny_model(family, "block_sparse" if isinstance(pattern, BlockSparseConfig) else "dilated")
    model.config.hf_dilated = pattern
    return model


def cache_for(model: Any, drop_every: int = 3) -> PatternCache:
    backend = model.config._attn_implementation
    return {"dilated": DilatedCache, "block_sparse": BlockSparseCache}[backend](model.config, drop_every=drop_every)


def generate(model: Any, ids: Tensor, cache: Any, way: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    plan = GenerationConfig(
        max_new_tokens=12, min_new_tokens=12, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        **{"do_sample": False} | way,
    )  # fmt: skip
    torch.manual_seed(0)
    output = model.generate(ids, generation_config=plan, past_key_values=cache, **options)
    return output.sequences, torch.stack(output.logits)


def slots(cache: Any) -> int:
    """Keys that all layers hold for all heads."""
    full = sum(x.keys.shape[1] * x.keys.shape[2] for x in cache.layers if not isinstance(x, PatternLayer))
    return full + sum(store.keys.shape[1] * store.places.used for store in stores(cache))


def stores(cache: Any) -> list[Store]:
    """What holds the keys of the layers that drop some."""
    return [store for layer in cache.layers if isinstance(layer, PatternLayer) for store in layer.stores]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_the_same_tokens_as_with_a_full_cache(way: str, padded: bool, pattern: str) -> None:
    model, ids = running("llama", PATTERNS[pattern]), tokens(2, 70)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :11], mask[1, :3] = 0, 0
    full, kept = DynamicCache(config=model.config), cache_for(model)
    expected = generate(model, ids, full, WAYS[way], attention_mask=mask)
    actual = generate(model, ids, kept, WAYS[way], attention_mask=mask)
    assert actual[0].tolist() == expected[0].tolist()
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-9, atol=1e-9)
    assert slots(kept) < 0.8 * slots(full)
    assert kept.get_seq_length() == full.get_seq_length()


@pytest.mark.parametrize("family", ["gemma3", "qwen2_windowed", "gpt_oss", "gpt2", "qwen3_next"])
def test_families(family: str) -> None:
    """Windows keep their own small caches; learned sinks and linear attention stay."""
    model, ids = running(family, DILATED), tokens(2, 70)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for way in ("greedy", "beam"):
        expected = generate(model, ids, DynamicCache(config=model.config), WAYS[way], attention_mask=mask)
        cache = cache_for(model)
        actual = generate(model, ids, cache, WAYS[way], attention_mask=mask)
        assert actual[0].tolist() == expected[0].tolist()
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-6, atol=1e-6)
    assert any(store.places.closed().has_dropped for store in stores(cache))


def launches(layers: int, config: Config | None) -> Counter[str]:
    """Operators, other than views, of a step behind a cache that drops keys, or of a dense one behind a full cache."""
    model = tiny_model("llama", "sdpa", num_hidden_layers=layers)
    if config is not None:
        model.config.hf_dilated = config
        model.set_attn_implementation("block_sparse" if isinstance(config, BlockSparseConfig) else "dilated")
    cache = cache_for(model, 128) if config is not None else DynamicCache(config=model.config)
    ids, counter = tokens(1, 70), _Launches()
    for part in ids.split([68, 1, 1], 1):  # the first token after a prompt makes room for others
        counter.found.clear()
        with torch.no_grad(), counter:
            model(part, attention_mask=torch.ones(1, cache.get_seq_length() + part.shape[1]), past_key_values=cache)
    return counter.found


class _Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(x.alias_info and not x.alias_info.is_write for x in func._schema.returns):
            self.found[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pattern", [*PATTERNS])
def test_a_step_takes_no_more_launches_than_a_dense_one(pattern: str) -> None:
    """A layer of one class adds as many as a dense one; what layers share is small, and asks the device for nothing."""
    dense, kept = ([launches(n, config) for n in (4, 8)] for config in (None, PATTERNS[pattern]))
    added = [more.total() - fewer.total() for fewer, more in (dense, kept)]
    further = 4 * (pattern == "classes")  # a second class: its key, value and attention; outputs side by side
    assert added[1] == added[0] + 4 * further  # rates of 4: after four layers the pattern begins anew
    different = {"dilated": 4, "classes": 2}.get(pattern, 1)
    assert kept[0].total() - dense[0].total() <= 10 + 12 * different + 4 * further
    assert not any("_local_scalar_dense" in name or "nonzero" in name for name in kept[0])


def test_layers_share_places() -> None:
    """Also behind reordered rows, and after the room was full; nothing of earlier steps stays."""
    model, ids = running("llama", replace(DILATED, phase="none", rotate=False)), tokens(2, 70)
    cache = cache_for(model)
    generate(model, ids, cache, {"num_beams": 3}, attention_mask=torch.ones_like(ids))
    one, other = (store.places for store in stores(cache))
    assert one is other
    earlier = weakref.ref(one)
    with torch.no_grad():
        for _ in range(5):
            model(ids[:1].expand(6, -1)[:, :1], past_key_values=cache)
    del one, other
    assert earlier() is None


def test_dense_layers_keep_everything() -> None:
    pattern = DilatedConfig(segment_lengths=(8, 16), dilation_rates=(1, 2), dense_layers=(0,))
    model, ids = running("llama", pattern), tokens(1, 70)
    cache = cache_for(model)
    expected = generate(model, ids, DynamicCache(config=model.config), {})
    assert generate(model, ids, cache, {})[0].tolist() == expected[0].tolist()
    assert cache.layers[0].keys.shape[2] == 70 + 11
    (store,) = stores(cache)
    assert store.places.used < 30


@pytest.mark.parametrize("pattern", ["dilated", "classes"])
def test_a_conversation_goes_on(pattern: str) -> None:
    """Later turns bring several tokens at once to a cache that has dropped."""
    model, ids = running("llama", PATTERNS[pattern]), tokens(2, 120)
    caches = cache_for(model), DynamicCache(config=model.config)
    with torch.no_grad():
        for start, stop in ((0, 50), (50, 51), (51, 90), (90, 120)):
            actual, expected = (model(ids[:, start:stop], past_key_values=cache).logits for cache in caches)
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def without_random_blocks(config: BlockSparseConfig) -> BlockSparseConfig:
    layers = [[replace(parts, random_blocks=0) for parts in layer] for layer in config.layers]
    return replace(config, layers=layers)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Any, ...]:
    torch.manual_seed(draw(st.integers(0, 1 << 16)))
    config = draw(st.one_of(configs(), block_configs(40).map(without_random_blocks)))
    if isinstance(config, BlockSparseConfig) and draw(st.booleans()):  # some heads see everything
        groups = len(config.layers[0])
        chosen = draw(st.sets(st.integers(0, groups - 1), min_size=1))
        layers = [[ALL if n in chosen else parts for n, parts in enumerate(layer)] for layer in config.layers]
        config = replace(config, layers=layers)
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    cuts = draw(st.sets(st.integers(1, max(1, length - 1)), max_size=6))
    if draw(st.booleans()):  # the last ones one by one
        cuts |= set(range(max(1, length - 12), length))
    mask = torch.ones(rows, length, dtype=torch.bool)
    match draw(st.sampled_from(["whole", "left", "anywhere"])):
        case "left":
            mask = torch.arange(length) >= torch.arange(rows)[:, None] * 5
        case "anywhere":
            mask = torch.rand(rows, length) < 0.8
    heads = draw(st.sampled_from([(2, 2), (4, 2), (6, 1), (6, 3), (12, 6)]))
    return config, mask, [0, *sorted(cuts), length], heads, draw(st.integers(0, 3)), draw(st.integers(1, 6))


@settings(max_examples=80, deadline=None)
@given(problem=problems(), with_sinks=st.booleans(), is_always_told=st.booleans())
def test_layers_against_the_oracle(problem: tuple[Any, ...], with_sinks: bool, is_always_told: bool) -> None:
    """Any chunks, padding anywhere, and what is dropped cannot be found again."""
    config, mask, cuts, (H, G), ordinal, drop_every = problem
    backend = BACKENDS["dilated" if isinstance(config, DilatedConfig) else "block_sparse"]
    told = Told()
    layer = PatternLayer(Places.none(backend.pattern(config, ordinal), H), told, drop_every)
    B, M = mask.shape
    query, key, value = (torch.randn(B, n, M, 4, dtype=torch.float64) for n in (H, G, G))
    positions = torch.where(mask, mask.long().cumsum(1) - 1, -1)
    sinks = torch.randn(H, dtype=torch.float64) if with_sinks else None
    right, lse = ATTENTION[type(config)][1](
        query, key, value, config, key_positions=positions, layer=ordinal, return_lse=True
    )
    if sinks is not None:
        right = right * torch.sigmoid(lse - sinks[:, None]).unsqueeze(-1)
    for start, stop in zip(cuts, cuts[1:], strict=False):
        if start == stop:
            continue
        told.hear(stop, positions[:, :stop] if is_always_told or not mask.all() else None)
        k, v = layer.update(key[:, :, start:stop], value[:, :, start:stop])
        if (kept := kept_keys(k, v)) is None:
            assert torch.equal(k, key[:, :, :stop])
            continue
        assert all(torch.isfinite(part.key).all() for part in kept.parts), "room is zero"
        output = attend_kept(
            query[:, :, start:stop],
            kept,
            kept.pattern,
            are_whole=bool(mask[:, :stop].all()),
            scale=None,
            sink_logits=sinks,
        )
        torch.testing.assert_close(output, right[:, :, start:stop], rtol=0, atol=1e-11)


def test_the_number_of_keys_is_that_of_the_pattern() -> None:
    """A segment of w tokens and, of the larger ones, every r-th token for each head."""
    config = DilatedConfig(segment_lengths=(64, 128, 256), dilation_rates=(1, 2, 4))
    told = Told()
    layer = PatternLayer(Places.none(BACKENDS["dilated"].pattern(config, 0), 4), told, 1)
    key = torch.randn(1, 4, 255, 8)
    told.hear(255, None)
    layer.update(key, key)
    (store,) = layer.stores
    assert store.keys.shape[2] == 63 + 32 + 32  # the last token on residue 0 is still to come for none of the heads
    assert store.keys.untyped_storage().nbytes() == 127 * 4 * 8 * 4


def test_every_class_keeps_what_it_needs_and_nothing_else_alive() -> None:
    config, told = replace(CLASSES, layers=((ALL, NEAR, NEAR, ALL),)), Told()
    layer = PatternLayer(Places.none(BACKENDS["block_sparse"].pattern(config, 0), 16), told, 10)
    earlier: list[Any] = []
    for start, stop in ((0, 51), (51, 60), (60, 61), (61, 64)):
        told.hear(stop, None)
        key, _ = layer.update(*(torch.randn(1, 8, stop - start, 4) for _ in range(2)))
        assert key.shape == (1, 8, stop - start, 4)
        assert [store.keys.shape[1] for store in layer.stores] == [2, 4, 2]
        near = 4 + 4 + stop % 4  # the first block, the one before the next token's, and of that one what is there
        assert [store.places.used for store in layer.stores] == [stop, near, stop]
        assert all(x.untyped_storage().nbytes() == x.nbytes for s in layer.stores for x in (s.keys, s.values))
        assert not any(x() is not None for x in earlier)
        earlier = [weakref.ref(x) for s in layer.stores for x in (s.keys, s.values)] + [weakref.ref(key)]
        del key
    layer.reset()
    assert [store.keys for store in layer.stores] == [None] * 3


@pytest.mark.parametrize("pattern", ["dilated", "classes"])
def test_inference_mode_and_autocast_come_and_go(pattern: str) -> None:
    model, ids = running("llama", PATTERNS[pattern]), tokens(2, 80)
    caches = cache_for(model, 50), DynamicCache(config=model.config)
    for turn, part in enumerate(ids.split([60, *[1] * 20], 1)):
        with torch.inference_mode() if turn % 7 < 3 else torch.no_grad():
            actual, expected = (model(part, past_key_values=cache).logits for cache in caches)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    cache = cache_for(model.float(), 50)
    with torch.no_grad():
        for turn, part in enumerate(ids.split([60, *[1] * 20], 1)):
            with torch.autocast("cpu", torch.bfloat16, enabled=turn < 5):
                assert model(part, past_key_values=cache).logits.isfinite().all()
    assert stores(cache)[0].values.dtype == torch.float32


def test_other_patterns_and_heads_are_refused() -> None:
    model = running("llama", DILATED)
    cache = cache_for(model)
    ids = tokens(1, 70)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model.config.hf_dilated = COUNT
        with pytest.raises(UnsupportedError, match="made for another pattern"):
            model(ids[:, :1], past_key_values=cache)
    with pytest.raises(UnsupportedError, match="attn_implementation='dilated', not 'block_sparse'"):
        BlockSparseCache(model.config)
    with pytest.raises(UnsupportedError, match="attn_implementation='sdpa', not 'dilated'"):
        DilatedCache(tiny_model("llama", "sdpa").config)
    with pytest.raises(ValueError, match="drop_every: expected at least 1"):
        DilatedCache(model.config, drop_every=0)


def test_patterns_that_never_forget_are_refused() -> None:
    model = running("llama", BlockSparseConfig(block_size=4, local_blocks=2, random_blocks=1))
    with pytest.raises(UnsupportedError, match="random_blocks: a later token may choose any block.*DynamicCache"):
        cache_for(model)


@pytest.mark.parametrize("way", [{"prompt_lookup_num_tokens": 3}, {"assistant": True}])
def test_tokens_cannot_be_taken_back(way: dict[str, Any]) -> None:
    model, ids = running("llama", DILATED), tokens(1, 70).repeat(1, 2)[:, :90]
    more = {"assistant_model": tiny_model("llama", "sdpa")} if way.pop("assistant", False) else {}
    with pytest.raises((UnsupportedError, ValueError), match="cannot take tokens back|croppable"):
        generate(model, ids, cache_for(model), way, **more)


@pytest.mark.parametrize("implementation", ["offloaded", "quantized", "static"])
def test_other_caches_do_not_mix(implementation: str) -> None:
    model = running("llama", DILATED)
    with pytest.raises(ValueError, match="Passing both `cache_implementation`"):
        generate(model, tokens(1, 9), cache_for(model), {"cache_implementation": implementation})


def test_what_the_cache_is_not_told_of_is_refused() -> None:
    model, ids = running("llama", DILATED), tokens(1, 70)
    cache = cache_for(model)
    with torch.no_grad(), pytest.raises(UnsupportedError, match="the mask told of -1 tokens, the cache has 70"):
        cache.layers[0].update(torch.zeros(1, 2, 70, 8), torch.zeros(1, 2, 70, 8))
    cache = cache_for(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        positions = torch.tensor([[70, 71, 0, 1]])
        with pytest.raises(UnsupportedError, match="documents packed into a row"):
            model(ids[:, :4], position_ids=positions, past_key_values=cache)
    with pytest.raises(UnsupportedError, match="no gradients flow through dropped keys"):
        model(ids[:, :3], past_key_values=cache)


@pytest.mark.parametrize("pattern", ["dilated", "classes"])
def test_it_can_be_used_again(pattern: str) -> None:
    model, ids = running("llama", PATTERNS[pattern]), tokens(2, 70)
    cache = cache_for(model)
    first = generate(model, ids, cache, {})
    cache.reset()
    assert cache.get_seq_length() == 0
    assert generate(model, ids, cache, {})[0].tolist() == first[0].tolist()
    other = copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    assert len(stores(cache)[0].keys) == 4
    with torch.no_grad():
        more = tokens(2, 12)
        for token in more.split(1, 1):  # both go on by themselves
            one = model(token.repeat_interleave(2, 0), past_key_values=cache).logits
            two = model(token, past_key_values=other).logits
            torch.testing.assert_close(one[::2], two, rtol=1e-9, atol=1e-9)
