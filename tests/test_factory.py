"""Factories: same engine and policy as everywhere; `auto` changes nothing that can be seen in the numbers."""

import dataclasses
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_dilated import (
    BlockSparseConfig,
    ConfigError,
    DilatedConfig,
    MemoryConfig,
    MemoryPool,
    RingConfig,
    block_sparse_attention,
    create_block_sparse_attention,
    create_dilated_attention,
    create_multihead_dilated_attention,
    dilated_attention,
    model_memory,
)
from hf_dilated.factory import TYPES, Attention, register_attention_type

PATTERN = DilatedConfig(segment_lengths=(8, 16, 32), dilation_rates=(1, 2, 4), sink_tokens=2, phase="alternate")
BLOCKS = BlockSparseConfig(block_size=8, local_blocks=2, global_blocks=1)
CONFIGS = {"dilated": PATTERN, "block_sparse": BLOCKS}
EMBEDDED = {"embed_dim": 32, "num_heads": 4, "config": PATTERN}


@pytest.fixture
def tensors() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(2, heads, 40, 8, requires_grad=True) for heads in (4, 2, 2))


def config_for(name: str) -> Any:
    return next(config for config in CONFIGS.values() if isinstance(config, TYPES[name].config_class))


@pytest.mark.parametrize("name", [name for name in TYPES if not name.startswith("ring")])
@pytest.mark.parametrize("length", [64, 4096, 8192])
def test_every_type_runs_and_allocates_from_its_pool(
    name: str, length: int, tensors: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: set[str] = set()
    lease = MemoryPool._lease
    monkeypatch.setattr(MemoryPool, "_lease", lambda pool, *args: modes.add(pool.mode) or lease(pool, *args))
    module = create_dilated_attention(
        name, config=config_for(name), max_seq_len=length, layer=1, memory=MemoryConfig(smallest=1)
    )
    mode = "full" if length == 8192 else "lightweight" if length == 4096 or name != "dilated" else "disabled"
    module(*tensors).sum().backward()
    assert module.memory.mode == mode
    assert modes == {mode} - {"disabled"}
    assert [layer.manager.mode for layer in model_memory(module)] == [mode]


@pytest.mark.parametrize("mode", ["disabled", "lightweight", "full"])
def test_the_user_wins(mode: Any) -> None:
    for module in (
        create_dilated_attention(max_seq_len=8192, memory=MemoryConfig(mode=mode)),
        create_multihead_dilated_attention(
            embed_dim=32, num_heads=4, max_seq_len=64, memory=MemoryConfig(mode=mode)
        ).attention,
        create_block_sparse_attention(max_seq_len=64, memory=MemoryConfig(mode=mode)),
    ):
        assert (module.memory.mode, module.memory.reason) == (mode, "set by the user")


@pytest.mark.parametrize("is_causal", [True, False])
def test_auto_is_the_same_mathematics(is_causal: bool, tensors: tuple[torch.Tensor, ...]) -> None:
    mask = torch.arange(40) >= torch.tensor([[3], [0]])
    ids = torch.cat([torch.arange(15), torch.arange(25)]).expand(2, 40)
    options = {"attention_mask": mask, "position_ids": ids}
    dilated = create_dilated_attention(config=PATTERN, layer=1, is_causal=is_causal, max_seq_len=8192)
    expected = dilated_attention(*tensors, PATTERN, layer=1, is_causal=is_causal, **options)
    assert torch.equal(dilated(*tensors, **options), expected)
    blocks = create_block_sparse_attention(config=BLOCKS, is_causal=is_causal)
    expected = block_sparse_attention(*tensors, BLOCKS, is_causal=is_causal, **options)
    assert torch.equal(blocks(*tensors, **options), expected)


def test_a_pattern_is_given_or_chosen() -> None:
    fields = create_dilated_attention(segment_lengths=(16, 32), dilation_rates=(1, 2), overlap="count")
    assert fields.config == DilatedConfig(segment_lengths=(16, 32), dilation_rates=(1, 2), overlap="count")
    assert create_dilated_attention(max_seq_len=8192, num_heads=2).config.dilation_rates == (1, 2, 2)
    assert create_block_sparse_attention(max_seq_len=8192).config.block_size == 128


def test_multihead_attention_with_grouped_heads() -> None:
    torch.manual_seed(0)
    module = create_multihead_dilated_attention(embed_dim=32, num_heads=4, num_kv_heads=2, bias=False, config=PATTERN)
    x = torch.randn(2, 40, 32)
    q, k, v = (
        (x @ layer.weight.T).view(2, 40, -1, 8).transpose(1, 2)
        for layer in (module.q_proj, module.k_proj, module.v_proj)
    )
    expected = dilated_attention(q, k, v, PATTERN).transpose(1, 2).flatten(2) @ module.out_proj.weight.T
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(module(x[:, -1:], x), expected[:, -1:])


def test_compiled_in_one_graph() -> None:
    torch._dynamo.reset()
    module = create_multihead_dilated_attention(embed_dim=32, num_heads=4, config=PATTERN, max_seq_len=8192)
    x = torch.randn(2, 40, 32)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), module(x))
    torch._dynamo.reset()


def saved_and_loaded(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copy", [lambda module: pickle.loads(pickle.dumps(module)), saved_and_loaded])
@pytest.mark.parametrize("name", TYPES)
def test_modules_are_saved_and_sent(name: str, copy: Callable[[Any], Any], tensors: tuple[torch.Tensor, ...]) -> None:
    options = {"max_seq_len": 64} if name == "ring" else {"config": config_for(name)}
    module = create_dilated_attention(name, layer=1, is_causal=False, scale=0.3, **options)
    again = copy(module)
    assert (again.backend, again.config, again.memory) == (TYPES[name], module.config, module.memory)
    assert torch.equal(again(*tensors), module(*tensors))


@pytest.mark.parametrize("copy", [lambda module: pickle.loads(pickle.dumps(module)), saved_and_loaded])
@pytest.mark.parametrize("name", ["dilated", "block_sparse"])
def test_modules_with_projections_are_saved_and_sent(name: str, copy: Callable[[Any], Any]) -> None:
    module = create_multihead_dilated_attention(name, embed_dim=32, num_heads=4, config=CONFIGS[name])
    x = torch.randn(2, 40, 32)
    assert torch.equal(copy(module)(x), module(x))


def test_an_additive_mask_is_refused(tensors: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(TypeError, match="attention_mask: expected bool"):
        create_dilated_attention(config=PATTERN)(*tensors, attention_mask=torch.zeros(2, 40))


@pytest.mark.parametrize("make", [create_dilated_attention, create_block_sparse_attention])
def test_an_empty_batch(make: Any) -> None:
    module = make(config=PATTERN if make is create_dilated_attention else BLOCKS)
    tensors = [torch.randn(0, 4, 40, 8, requires_grad=True) for _ in range(3)]
    output = module(*tensors, torch.ones(0, 40, dtype=torch.bool))
    output.sum().backward()
    assert output.shape == (0, 4, 40, 8)
    assert all(x.grad.shape == x.shape for x in tensors)


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (create_dilated_attention, {"attention_type": "flash"}, "expected one of 'auto', 'dilated', 'block_sparse'"),
        (create_dilated_attention, {}, "config: pass DilatedConfig"),
        (create_dilated_attention, {"config": BLOCKS}, "'dilated' needs a DilatedConfig, got BlockSparseConfig"),
        (create_dilated_attention, {"config": PATTERN, "overlap": "once"}, "already says what overlap would"),
        (create_dilated_attention, {"segments": (1, 2)}, "unknown 'segments'"),
        (create_block_sparse_attention, {"config": PATTERN}, "needs a BlockSparseConfig"),
        (create_multihead_dilated_attention, {"embed_dim": 30, "num_heads": 4, "config": PATTERN}, "num_heads: 4"),
        (create_multihead_dilated_attention, EMBEDDED | {"embed_dim": 0}, "embed_dim: expected at least 1, got 0"),
        (create_multihead_dilated_attention, EMBEDDED | {"num_heads": 0}, "num_heads: expected at least 1, got 0"),
        (create_multihead_dilated_attention, EMBEDDED | {"num_kv_heads": 0}, "num_kv_heads: expected at least 1"),
        (create_dilated_attention, {"max_seq_len": 8192, "num_heads": 0}, "num_heads: expected at least 1, got 0"),
        (create_dilated_attention, {"max_seq_len": 0}, "max_seq_len: expected at least 1, got 0"),
        (create_block_sparse_attention, {"max_seq_len": -5}, "max_seq_len: expected at least 1, got -5"),
        (create_block_sparse_attention, {"max_seq_len": 9.5}, "max_seq_len: expected a whole number, got 9.5"),
    ],
)
def test_refusals(make: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(**options)


def test_another_type(tensors: tuple[torch.Tensor, ...]) -> None:
    register_attention_type(dataclasses.replace(TYPES["dilated"], name="mine"))
    try:
        module = create_dilated_attention("mine", config=PATTERN)
        assert isinstance(module, Attention)
        assert module(*tensors).shape == (2, 4, 40, 8)
        with pytest.raises(ConfigError, match="'mine'"):
            create_dilated_attention("yours", config=PATTERN)
    finally:
        del TYPES["mine"]


def test_settings_of_ranks_are_refused_in_a_module() -> None:
    words = r"transport='heads': .* pass sequence_parallel\(config=RingConfig\(transport='heads'\)\) instead"
    with pytest.raises(ConfigError, match=words):
        create_dilated_attention("ring", transport="heads")
    with pytest.raises(ConfigError, match=words):
        create_dilated_attention("ring", config=RingConfig(transport="heads"))
    assert create_dilated_attention("ring", config=RingConfig()).backend.name == "ring"
