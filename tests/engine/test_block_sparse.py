"""Block-sparse attention against the oracle."""

import os

import torch
from hypothesis import HealthCheck, given, settings

from tests.cases import block_configs, cases
from tests.engine.checks import assert_equals_oracle

EXAMPLES = int(os.environ.get("HF_DILATED_EXAMPLES", "150"))
generated = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@given(case=cases(config=block_configs()))
@generated
def test_float64(case):
    assert_equals_oracle(case, torch.float64, 1e-11)
