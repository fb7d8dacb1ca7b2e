import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hf_dilated import BlockSparseConfig, DilatedConfig, reference
from hf_dilated.cli import app
from hf_dilated.patterns import BlockSparsePattern, DilatedPattern
from hf_dilated.patterns.sight import look
from tests.tiny_models import tiny_config

runner = CliRunner()
BLOCKS = BlockSparseConfig(block_size=4, local_blocks=2, global_blocks=1, stride_blocks=3, random_blocks=1)
BRANCHES = DilatedConfig(segment_lengths=(8, 16), dilation_rates=(1, 2), sink_tokens=1)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("pattern", [BlockSparsePattern(config=BLOCKS), DilatedPattern(config=BRANCHES)])
def test_what_is_seen_is_what_the_oracle_sees(pattern, head, is_causal):
    query, key = torch.zeros(1, 2, 30, 1), torch.zeros(1, 2, 30, 1)
    value = torch.eye(30).expand(1, 2, 30, 30)
    attention = reference.block_sparse_attention if pattern.config is BLOCKS else reference.dilated_attention
    weights = attention(query, key, value, pattern.config, is_causal=is_causal)[0, head]
    sight = look(pattern, 30, head=head, heads=2, kv_heads=2, is_causal=is_causal)
    assert [keys.tolist() for keys in sight.seen] == [row.nonzero()[:, 0].tolist() for row in weights]
    cells = torch.tensor(np.nan_to_num(sight.map(30)), dtype=torch.bool)
    assert torch.equal(cells, weights > 0)


@pytest.mark.parametrize("backend", ["block_sparse", "dilated"])
def test_show(tmp_path, backend):
    config = tiny_config("llama")
    config.hf_dilated = BLOCKS if backend == "block_sparse" else BRANCHES
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    picture = tmp_path / "pictures" / "seen"
    options = ["--length", "64", "--head", "3", "--layer", "1", "--output", str(picture)]
    result = runner.invoke(app, ["show", str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    assert f"{backend}, layer 1, head 3, 64 tokens" in result.output
    assert "keys that a query sees" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    costs = json.loads(runner.invoke(app, ["show", str(tmp_path), *options, "--json"]).stdout)
    assert costs["tokens"] == 64
    assert costs["keys that a query sees"]["here"] < costs["keys that a query sees"]["dense"] == 32.5
    assert runner.invoke(app, ["show", str(tmp_path), "--output", str(tmp_path)]).exit_code == 2  # a folder


@pytest.mark.parametrize(
    ("family", "layer", "reason"),
    [("gemma2", 0, "softcap=50.0"), ("qwen3_next", 0, "layers.0 runs no pattern but"), ("qwen3_next", 1, None)],
)
def test_a_pattern_that_never_runs_is_not_drawn(tmp_path, family, layer, reason):
    tiny_config(family).save_pretrained(tmp_path)
    result = runner.invoke(app, ["show", str(tmp_path), "--layer", str(layer)], env={"COLUMNS": "200"})
    assert result.exit_code == (0 if reason is None else 1), result.output
    assert reason is None or reason in " ".join(result.output.split())
    assert ("density" in result.output) == (reason is None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--head", "4"], "head: expected 0 to 3"),
        (["--layer", "2"], "layer: expected 0 to 1"),
        (["--backend", "x"], ""),
    ],
)
def test_what_cannot_be_shown(tmp_path, options, message):
    config = tiny_config("llama")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    result = runner.invoke(app, ["show", str(tmp_path), *options])
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.output.split())
