"""Models allocate from the pool that their length asks for; the numbers are the same to the bit."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from hf_dilated import (
    BlockSparseCache,
    BlockSparseConfig,
    ConfigError,
    DilatedCache,
    DilatedConfig,
    MemoryConfig,
    block_sparse_attention,
    dilated_attention,
    model_memory,
    ring_attention,
)
from hf_dilated.distributed import SequenceLayout
from hf_dilated.integration.memory import module_memory
from hf_dilated.memory import MemoryPool, auto_configure_memory_pool
from hf_dilated.patterns import BlockSparsePattern, DensePattern, DilatedPattern
from hf_dilated.patterns.partials import Pattern
from tests.tiny_models import tiny_config, tiny_model, tokens

Attention = Callable[..., Any]
PATTERN = DilatedConfig(segment_lengths=(8, 16, 32), dilation_rates=(1, 2, 4), sink_tokens=2, phase="alternate")
MODES = {2048: "disabled", 4096: "lightweight", 8192: "full"}


@pytest.fixture
def allocating(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The modes of the pools that allocate, one entry each time."""
    lease, modes = MemoryPool._lease, []

    def spy(pool: MemoryPool, *arguments: Any) -> memoryview:
        modes.append(pool.mode)
        return lease(pool, *arguments)

    monkeypatch.setattr(MemoryPool, "_lease", spy)
    return modes


def small_buffers(model: Any, **settings: Any) -> Any:
    """A tiny model's buffers are tiny, too."""
    model.config.hf_dilated = PATTERN
    model.config.hf_dilated = MemoryConfig(smallest=1, **settings)
    return model


def train(model: Any, ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    output = model(ids, labels=ids, use_cache=False)
    output.loss.backward()
    return [output.logits.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("length", MODES)
@pytest.mark.parametrize("door", ["constructor", "from_pretrained", "set_attn_implementation"])
def test_every_door_leads_to_the_same_pool(length: int, door: str, allocating: list[str], tmp_path: Any) -> None:
    if door == "set_attn_implementation":
        model = tiny_model("llama", "sdpa", max_position_embeddings=length)
        model.set_attn_implementation("dilated")
        small_buffers(model)
    else:
        model = small_buffers(tiny_model("llama", "dilated", max_position_embeddings=length))
    if door == "from_pretrained":
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path)
    train(model, tokens(2, 40))
    assert set(allocating) == ({MODES[length]} - {"disabled"})
    found = model_memory(model)
    assert [layer.name for layer in found] == [f"model.layers.{i}.self_attn" for i in range(2)]
    assert all(layer.policy.mode == layer.manager.mode == MODES[length] for layer in found)
    assert all(f"{length:,} tokens" in layer.policy.reason for layer in found)


def test_the_longest_segment_counts_too() -> None:
    model = tiny_model("llama", "dilated", max_position_embeddings=64)
    model.config.hf_dilated = DilatedConfig(segment_lengths=(2048, 8192), dilation_rates=(1, 2))
    assert model_memory(model)[0].policy.mode == "full"


@pytest.mark.parametrize("mode", ["disabled", "lightweight", "full"])
@pytest.mark.parametrize("length", [64, 8192])
def test_the_user_wins(mode: Any, length: int, allocating: list[str], tmp_path: Any) -> None:
    model = small_buffers(tiny_model("llama", "dilated", max_position_embeddings=length), mode=mode)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.hf_dilated["memory"] == {"mode": mode, "smallest": 1}
    assert loaded.config.hf_dilated["dilated"] == model.config.hf_dilated["dilated"]
    train(loaded, tokens(1, 40))
    assert set(allocating) == {mode} - {"disabled"}
    assert {layer.policy.reason for layer in model_memory(loaded)} == {"set by the user"}


def test_settings_in_the_stored_form() -> None:
    config = tiny_config("llama")
    config.hf_dilated = {"dilated": PATTERN.to_dict(), "memory": {"mode": "full"}}
    assert config.hf_dilated["memory"] == {"mode": "full"}
    with pytest.raises(ConfigError, match="mode: expected one of"):
        config.hf_dilated = {"memory": {"mode": "huge"}}


def test_other_attention_has_no_entry() -> None:
    assert model_memory(tiny_model("llama", "sdpa")) == []


def test_encoders_too() -> None:
    found = model_memory(small_buffers(tiny_model("bert", "dilated", max_position_embeddings=4096)))
    assert [layer.policy.mode for layer in found] == ["lightweight"] * 2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_model_gives_the_same_to_the_bit(dtype: torch.dtype, checkpointing: bool) -> None:
    ids = tokens(2, 40)
    found = []
    for mode in ("disabled", "lightweight", "full"):
        model = small_buffers(tiny_model("llama", "dilated", max_position_embeddings=64), mode=mode).to(dtype).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": mode == "full"})
        found.append([train(model, ids) for _ in range(3)][-1])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_the_compiler_sees_a_constant() -> None:
    model = small_buffers(tiny_model("llama", "dilated", max_position_embeddings=8192, num_hidden_layers=1))
    ids = tokens(1, 40)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(ids).logits, expected)
    assert '"mode":"full"' in module_memory(model.model.layers[0].self_attn)
    torch._dynamo.reset()


def ring(pattern: Pattern) -> Attention:
    """Ring attention in one process; its layout says what is padding."""

    def run(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor, memory: str) -> Any:
        shape = q.shape[0], q.shape[2]
        layout = SequenceLayout.of(shape, ranks=1, attention_mask=attention_mask)
        q, k, v = (layout.shard(x.transpose(1, 2), 0).transpose(1, 2) for x in (q, k, v))
        output = ring_attention(q, k, v, layout, pattern=pattern, memory=memory)
        return layout.unshard(output.transpose(1, 2)[None]).transpose(1, 2)

    return run


BLOCKS = BlockSparseConfig(block_size=8, local_blocks=2, global_blocks=1, random_blocks=1)
CHOSEN = BlockSparseConfig(block_size=8, local_blocks=1, topk_blocks=2)
ATTENTION: dict[str, Attention] = {
    "dilated": lambda q, k, v, **options: dilated_attention(q, k, v, PATTERN, **options),
    "block_sparse": lambda q, k, v, **options: block_sparse_attention(q, k, v, BLOCKS, **options),
    "chosen blocks": lambda q, k, v, **options: block_sparse_attention(q, k, v, CHOSEN, **options),
    "ring": ring(DensePattern()),
    "ring_dilated": ring(DilatedPattern(config=PATTERN)),
    "ring_block_sparse": ring(BlockSparsePattern(config=BLOCKS)),
}


def attend(kind: str, memory: str, dtype: torch.dtype, seed: int, length: int = 70) -> list[Tensor]:
    """Outputs and gradients of a padded batch, twice through a checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, length, 8, generator=generator).to(dtype).requires_grad_() for h in (4, 2, 2))
    mask = torch.rand(2, length, generator=generator) < 0.8

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ATTENTION[kind](q, k, v, attention_mask=mask, memory=memory)

    once = checkpoint(run, q, k, v, use_reentrant=False)
    twice = checkpoint(run, once, k, v, use_reentrant=True)
    twice.square().sum().backward()
    return [twice.detach(), q.grad, k.grad, v.grad]


def test_eight_threads_give_the_same_to_the_bit() -> None:
    spec = auto_configure_memory_pool(8192, smallest=1).spec
    cases = [(list(ATTENTION)[seed % len(ATTENTION)], seed) for seed in range(8)]
    expected = [attend(kind, "", torch.float32, seed) for kind, seed in cases]
    wrong: list[int] = []

    def work(kind: str, seed: int) -> None:
        for _ in range(6):
            found = attend(kind, spec, torch.float32, seed)
            if not all(torch.equal(a, b) for a, b in zip(found, expected[seed], strict=True)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=case, daemon=True) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    assert wrong == []


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_attention_gives_the_same_to_the_bit(kind: str, dtype: torch.dtype, allocating: list[str]) -> None:
    for seed in range(2):
        expected = attend(kind, "", dtype, seed)
        assert not allocating
        for mode in ("lightweight", "full"):
            spec = auto_configure_memory_pool(8192, kind, mode=mode, smallest=1).spec
            assert all(torch.equal(a, b) for a, b in zip(attend(kind, spec, dtype, seed), expected, strict=True))
            assert set(allocating) == {mode}
            allocating.clear()


@pytest.mark.parametrize(
    ("cache", "pattern"),
    [
        (DilatedCache, DilatedConfig(segment_lengths=(16, 32), dilation_rates=(1, 2), offset="kv_head")),
        (BlockSparseCache, BlockSparseConfig(block_size=8, local_blocks=2, global_blocks=1)),
        (BlockSparseCache, BlockSparseConfig(block_size=8, layers=(({"stride_blocks": 1}, {"local_blocks": 2}),))),
    ],
)
def test_caches_lie_in_the_pool(cache: Any, pattern: Any) -> None:
    """They are told apart by their kind, and give the same to the bit."""
    found = []
    for mode in ("disabled", "full"):
        model = tiny_model("llama", cache.backend, max_position_embeddings=64)
        model.config.hf_dilated = pattern
        model.config.hf_dilated = MemoryConfig(mode=mode, smallest=1, budget=11 << 20)
        own, ids = cache(model.config, drop_every=4), tokens(2, 60)
        with torch.no_grad(), model_memory(model)[0].manager.record() as recording:
            steps = [model(part, past_key_values=own).logits for part in ids.split([30, 20, *[1] * 10], 1)]
        found.append(torch.cat(steps, 1))
        held = sum(event.size for event in recording.events if event.kind == "cache")
        kept = sum(x.nbytes for layer in own.layers for store in layer.stores for x in (store.keys, store.values))
        assert held == (kept if mode == "full" else 0)
        assert own.layers[0].stores[-1].places.closed().has_dropped
    assert torch.equal(*found)


def test_a_cache_is_differentiated_as_ever() -> None:
    model = small_buffers(tiny_model("llama", "dilated", max_position_embeddings=64), mode="full")
    found = []
    for cache in (DilatedCache(model.config), DynamicCache(config=model.config)):
        first = model(tokens(1, 5), past_key_values=cache).logits
        (first.sum() + model(tokens(1, 4), past_key_values=cache).logits.sum()).backward()
        found.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_backward_takes_its_buffers_from_the_same_pool() -> None:
    model = small_buffers(tiny_model("llama", "dilated", max_position_embeddings=64), mode="full", budget=9 << 20)
    ids = tokens(2, 40)
    with model_memory(model)[0].manager.record() as recording:
        loss = model(ids, labels=ids, use_cache=False).loss
        forward = len(recording.events)
        loss.backward()
    sizes = [event.size for event in recording.events[forward:] if event.size > 0]
    config = model.config
    row = 2 * 40 * config.head_dim * model.dtype.itemsize
    gradients = {row * heads for heads in (config.num_attention_heads, config.num_key_value_heads)}
    assert forward > 0
    assert gradients <= set(sizes)
    assert sizes.count(min(gradients)) >= 4  # of keys and values, in two layers


def test_all_memory_comes_back() -> None:
    model = small_buffers(tiny_model("llama", "dilated", max_position_embeddings=64), mode="full", budget=7 << 20)
    train(model, tokens(2, 40))
    pool = model_memory(model)[0].manager.pool()
    assert pool.stats()["misses"] > 0
    assert pool.stats()["bytes_live"] == 0
    before = pool.stats()
    for _ in range(20):
        train(model, tokens(2, 40))
    after = pool.stats()
    assert after["misses"] == before["misses"], "a fixed length needs no new memory"
    assert after["hits"] > before["hits"]
