import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_dilated import BlockSparseConfig, DilatedConfig, dilated_attention
from hf_dilated.engine import execute, op
from hf_dilated.functional import attend
from hf_dilated.patterns import BlockSparsePattern, DensePattern, DilatedPattern, parse

CONFIG = DilatedConfig(segment_lengths=(8, 16, 32), dilation_rates=(1, 2, 4))


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return tuple(torch.randn(2, heads, 40, 8, requires_grad=True) for heads in (4, 2, 2))


def test_operators_keep_their_promises(tensors):
    positions = torch.arange(40).expand(2, 40).contiguous()
    sinks = torch.randn(4, requires_grad=True)
    arguments = (*tensors, positions, sinks, DilatedPattern(config=CONFIG).spec, True, 0.3)
    torch.library.opcheck(op.attend, arguments)
    query = tensors[0].detach()[:, :, -1:]
    key, value = (x.detach() for x in tensors[1:])
    torch.library.opcheck(op.decode, (query, key, value, positions, None, arguments[5], 0.3))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_results_have_the_promised_strides(fused, padded, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(execute, "runs_fused", lambda x: fused and x.element_size() <= 4)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, h, 24, 8, requires_grad=True) for h in (4, 2, 2))  # by head, as caches store
    positions = torch.arange(24).expand(2, 24).clone()
    if padded:
        positions[:, 5], positions[:, 6:] = -1, positions[:, 6:] - 1
    arguments = (positions, None, DilatedPattern(config=CONFIG).spec, True, 0.3)
    torch.library.opcheck(op.attend, (query, key, value, *arguments))
    output, lse = (x.detach() for x in op.attend(query, key, value, *arguments))
    inputs = (x.detach() for x in (torch.randn_like(output), query, key, value))
    torch.library.opcheck(op.attend_backward, (*inputs, output, lse, positions, *arguments[2:]))


def test_compiled_for_several_lengths():
    compiled = torch.compile(dilated_attention, fullgraph=True, backend="aot_eager")
    for length in (40, 41, 50):
        inputs = [torch.randn(1, heads, length, 8, requires_grad=True) for heads in (4, 2, 2)]
        found, right = (f(*inputs, CONFIG) for f in (compiled, dilated_attention))
        assert torch.equal(found, right)
        grads = (torch.autograd.grad(x.square().sum(), inputs) for x in (found, right))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_layers_of_one_pattern_share_their_plans():
    rotating = DilatedConfig(segment_lengths=(8, 16), dilation_rates=(1, 4), rotate=True, phase="alternate")
    assert len({DilatedPattern(config=rotating, layer=layer).spec for layer in range(80)}) == 4
    assert len({DilatedPattern(config=CONFIG, layer=layer).spec for layer in range(80)}) == 1


def test_one_node_in_a_compiled_graph(tensors):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(dilated_attention, fullgraph=True, backend=backend)
    assert torch.equal(compiled(*tensors, CONFIG), dilated_attention(*tensors, CONFIG))
    targets = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert [t for t in targets if "hf_dilated" in str(t)] == [torch.ops.hf_dilated.attend.default]


def test_export(tensors):
    class Attention(torch.nn.Module):
        def forward(self, query, key, value):
            return dilated_attention(query, key, value, CONFIG)

    inputs = tuple(x.detach() for x in tensors)
    exported = torch.export.export(Attention(), inputs)
    assert torch.equal(exported.module()(*inputs), Attention()(*inputs))


def test_short_inputs_are_dense_attention_to_the_bit(tensors):
    short = tuple(x[:, :2, :8] for x in tensors)
    dense = scaled_dot_product_attention(*short, is_causal=True)
    assert torch.equal(dilated_attention(*short, CONFIG), dense)


@pytest.mark.parametrize(
    ("dtype", "value_size", "pattern"),
    [
        (
            torch.bfloat16,
            16,
            BlockSparsePattern(config=BlockSparseConfig(block_size=16, local_blocks=1, topk_blocks=3)),
        ),
        (torch.float32, 12, DilatedPattern(config=CONFIG)),
        (torch.float32, 16, DensePattern()),
    ],
)
def test_autocast_changes_neither_pass(dtype, value_size, pattern):
    """Autograd runs outside of it: chosen blocks and scores would differ between the passes."""
    torch.manual_seed(0)
    sizes = (16, 16, value_size)
    tensors = [torch.randn(1, 4, 256, size, dtype=dtype, requires_grad=True) for size in sizes]

    def run():
        output = attend(*tensors, pattern)
        return output, *torch.autograd.grad(output.square().sum(), tensors)

    right = run()
    with torch.autocast("cpu", torch.bfloat16):
        found = run()
    assert [x.dtype for x in found] == [x.dtype for x in right]
    assert all(torch.equal(x, y) for x, y in zip(found, right, strict=True))


def test_learned_sinks(tensors):
    """A sink logit is one more column of scores whose value is zero."""
    query, key, value = (x.detach().double().requires_grad_() for x in tensors)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    output = attend(query, key, value, DensePattern(), sink_logits=sinks)
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
    scores = scores.masked_fill(torch.ones(40, 40, dtype=torch.bool).triu(1), -torch.inf)
    scores = torch.cat([scores, sinks[None, :, None, None].expand(2, 4, 40, 1)], 3)
    right = scores.softmax(-1)[..., :40] @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(output, right, atol=1e-12, rtol=0)
    grad = torch.randn_like(right)
    for found, expected in zip(
        torch.autograd.grad(output, (query, key, value, sinks), grad),
        torch.autograd.grad(right, (query, key, value, sinks), grad),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [None, 1, 2, 5, 16, 100])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("queries", [40, 13])
def test_windows(window, is_causal, queries):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, h, n, 8, dtype=torch.float64, requires_grad=True)
                         for h, n in ((4, queries), (2, 40), (2, 40)))  # fmt: skip
    mask = torch.arange(40) >= torch.tensor([[0], [7]])
    positions = torch.where(mask, mask.long().cumsum(1) - 1, -1)
    output = attend(query, key, value, DensePattern(window=window), is_causal=is_causal, key_positions=positions)
    i, j = positions[:, 40 - queries :, None], positions[:, None, :]
    allowed = (i >= 0) & (j >= 0) & ((i - j).abs() < (window or 100))
    allowed = (allowed & (j <= i) if is_causal else allowed).unsqueeze(1)
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
    weights = torch.where(allowed, scores.masked_fill(~allowed, -1e9).softmax(-1), 0)
    right = weights @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(output, right, atol=1e-12, rtol=0)
    for found, expected in zip(
        torch.autograd.grad(output.square().sum(), (query, key, value)),
        torch.autograd.grad(right.square().sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)


def test_patterns_travel_as_text():
    for pattern in (DensePattern(), DensePattern(window=3), DilatedPattern(config=CONFIG)):
        assert parse(pattern.spec) == pattern


@pytest.mark.parametrize("queries", [1, 3])
def test_tensors_without_numbers_have_the_shape_of_results(queries: int) -> None:
    query, key = (torch.empty(1, h, n, 64, device="meta") for h, n in ((8, queries), (2, 1000)))
    pattern = DilatedConfig(segment_lengths=(128, 512), dilation_rates=(1, 2))
    output = dilated_attention(query, key, key[..., :32], pattern)
    assert (output.shape, output.device.type) == ((1, 8, queries, 32), "meta")
