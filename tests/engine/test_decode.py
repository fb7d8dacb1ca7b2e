import torch
from hypothesis import HealthCheck, given, settings

from hf_dilated import DilatedConfig, dilated_attention, reference
from hf_dilated.engine.decode import decode
from hf_dilated.patterns import DensePattern, DilatedPattern
from tests.cases import cases


@given(case=cases())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_query_equals_the_oracle(case):
    query = case.query[:, :, -1:]
    layer, positions = case.options["layer"], case.options.get("key_positions")
    if positions is None:
        positions = reference.positions(query.shape[0], 1, case.key.shape[2], case.options.get("attention_mask"), None)
    pattern = DilatedPattern(config=case.config, layer=layer)
    output, lse = decode(query, case.key, case.value, positions, pattern, 0.5)
    right, right_lse = reference.dilated_attention(
        query, case.key, case.value, case.config, scale=0.5, key_positions=positions, layer=layer, return_lse=True
    )
    torch.testing.assert_close(output, right, atol=1e-11, rtol=0)
    torch.testing.assert_close(lse, right_lse, atol=1e-11, rtol=0)


def test_step_by_step_equals_all_at_once():
    torch.manual_seed(0)
    config = DilatedConfig(segment_lengths=(4, 8, 16), dilation_rates=(1, 2, 4), sink_tokens=2, phase="alternate")
    query, key, value = (torch.randn(2, heads, 40, 8, dtype=torch.float64) for heads in (8, 4, 4))
    whole = dilated_attention(query, key, value, config, layer=1)
    for n in range(1, 41):
        step = query[:, :, n - 1 : n], key[:, :, :n], value[:, :, :n]
        planned = dilated_attention(*step, config, layer=1)
        unplanned, _ = decode(*step, None, DilatedPattern(config=config, layer=1), 8**-0.5)
        torch.testing.assert_close(planned, whole[:, :, n - 1 : n], atol=1e-12, rtol=0)
        torch.testing.assert_close(unplanned, whole[:, :, n - 1 : n], atol=1e-12, rtol=0)


def test_keys_that_the_pattern_cannot_see_are_not_read():
    config = DilatedConfig(segment_lengths=(4, 8, 16), dilation_rates=(1, 2, 4))
    query, key, value = (torch.randn(1, 4, n, 8, dtype=torch.float64) for n in (1, 64, 64))
    seen, is_seen = DilatedPattern(config=config).visible(torch.tensor([63]), 64, 4, 4)
    unseen = torch.ones(64, dtype=torch.bool)
    unseen[seen[is_seen]] = False
    assert unseen.sum() >= 48
    expected = dilated_attention(query, key, value, config)
    key[:, :, unseen] = value[:, :, unseen] = float("nan")
    assert torch.equal(dilated_attention(query, key, value, config), expected)
    assert torch.equal(
        decode(query, key, value, None, DilatedPattern(config=config), 8**-0.5)[0].isnan().any(), torch.tensor(False)
    )


def test_window():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 8, dtype=torch.float64) for n in (1, 20, 20))
    output, _ = decode(query, key, value, None, DensePattern(window=5), 8**-0.5)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key[:, :, 15:], value[:, :, 15:])
    torch.testing.assert_close(output, dense, atol=1e-12, rtol=0)
