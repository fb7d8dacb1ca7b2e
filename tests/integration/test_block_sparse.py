"""Block-sparse attention inside whole models: what is particular to it; the rest is the same code for every backend."""

import peft
import pytest
import torch

from hf_dilated import BlockParts, BlockSparseConfig, ConfigError, DilatedConfig
from hf_dilated.integration.persistence import stored_config
from tests.integration.test_generation import WAYS, assert_same, generate
from tests.integration.test_models import assert_close, backend, left_padded, logits, packed_position_ids
from tests.integration.test_peft import LORA
from tests.integration.test_trainer import losses, trainer
from tests.integration.test_trl import losses_of_tokens, packed_batches, words_tokenizer
from tests.integration.test_trl import trainer as sft_trainer
from tests.tiny_models import inputs, model_class, tiny_config, tiny_model, tokens

PATTERN = BlockSparseConfig(block_size=4, local_blocks=2, global_blocks=1, stride_blocks=5, random_blocks=1, seed=3)
PER_LAYER = BlockSparseConfig(
    block_size=4,
    layers=(
        (BlockParts(local_blocks=3), BlockParts(stride_blocks=3)),
        (BlockParts(dilated_blocks=3), BlockParts(global_blocks=1)),
    ),
)
FAMILIES = ("llama", "qwen3", "gemma3", "gpt_oss", "gpt2", "bert", "modernbert", "llava")


def patterned(family, pattern, name="block_sparse"):
    model = tiny_model(family, backend(family, name))
    model.config.hf_dilated = pattern
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pattern", [PATTERN, PER_LAYER], ids=["shared", "per layer"])
def test_long_inputs_equal_the_oracle(family, pattern):
    given = inputs(family, 2, 51)
    actual = logits(patterned(family, pattern), **given)
    assert_close(actual, logits(patterned(family, pattern, "oracle"), **given))
    assert not torch.allclose(actual, logits(tiny_model(family), **given), atol=1e-2), "the pattern did not run"


@pytest.mark.parametrize("family", ["llama", "gemma3", "bert"])
def test_padded_inputs_equal_the_oracle(family):
    mask = left_padded(3, 51)
    mask[1, -7:] = 0
    given = {"input_ids": tokens(3, 51), "attention_mask": mask}
    real = mask.bool()
    actual, expected = (logits(patterned(family, PATTERN, name), **given)[real] for name in ("block_sparse", "oracle"))
    assert_close(actual, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_packed_documents_equal_each_document_alone(family):
    lengths = (20, 1, 30)
    ids = tokens(1, sum(lengths))
    model = patterned(family, PATTERN)
    packed = logits(model, input_ids=ids, position_ids=packed_position_ids(*lengths), use_cache=False)
    for alone, together in zip(ids.split(lengths, 1), packed.split(lengths, 1), strict=True):
        assert_close(together, logits(model, input_ids=alone))


def test_switching_between_backends_at_run_time():
    given = inputs("llama", 1, 51)
    dilated = DilatedConfig(segment_lengths=(8, 16), dilation_rates=(1, 2))
    model = patterned("llama", PATTERN)
    sparse = logits(model, **given)
    model.config.hf_dilated = dilated
    assert torch.equal(logits(model, **given), sparse), "the backend that runs was chosen by name"
    model.set_attn_implementation("dilated")
    assert_close(logits(model, **given), logits(patterned("llama", dilated, "dilated"), **given))
    model.set_attn_implementation("sdpa")
    assert_close(logits(model, **given), logits(tiny_model("llama"), **given))
    model.set_attn_implementation("block_sparse")
    assert torch.equal(logits(model, **given), sparse)


@pytest.mark.parametrize("value", [PER_LAYER, PER_LAYER.to_dict()], ids=["object", "dictionary"])
def test_the_pattern_survives_saving(tmp_path, value):
    given = inputs("llama", 1, 51)
    model = tiny_model("llama")
    model.config.hf_dilated = value
    model.set_attn_implementation("block_sparse")
    for number in range(2):
        model.save_pretrained(tmp_path / str(number))
        loaded = model_class("llama").from_pretrained(tmp_path / str(number), dtype=torch.float64).eval()
        assert loaded.config._attn_implementation == "block_sparse"
        assert stored_config(loaded.config).block_sparse == PER_LAYER
        assert torch.equal(logits(loaded, **given), logits(model, **given))
        model = loaded


def test_without_a_stored_pattern_the_model_length_chooses_it():
    model = tiny_model("llama", "block_sparse")
    given = inputs("llama", 1, 51)
    assert_close(logits(model, **given), logits(tiny_model("llama"), **given))
    assert BlockSparseConfig.from_model_config(model.config).dense_length() >= 256
    with pytest.raises(ConfigError, match=r"max_length.*BlockSparseConfig"):
        tiny_model("vit", "block_sparse")(**inputs("vit", 1, 1))


def test_heads_that_cannot_be_split():
    groups = BlockSparseConfig(block_size=4, layers=((BlockParts(),) * 3,))
    with pytest.raises(ValueError, match="3 groups of heads do not divide 4 query heads"):
        logits(patterned("llama", groups), **inputs("llama", 1, 9))


def test_layers_without_an_index():
    with pytest.raises(ValueError, match="do not know their index"):
        logits(patterned("vit", PER_LAYER), **inputs("vit", 1, 1))
    assert tiny_config("vit").num_hidden_layers == 2


CONTENT = BlockSparseConfig(block_size=4, local_blocks=2, global_blocks=1, topk_blocks=2)


@pytest.mark.parametrize("pattern", [PATTERN, CONTENT], ids=["fixed", "chosen by content"])
@pytest.mark.parametrize("way", ["dynamic", "static", "chunked prefill", "no cache"])
def test_generation(pattern, way):
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, :11] = 0
    models = patterned("llama", pattern), patterned("llama", pattern, "oracle")
    assert_same(*(generate(model, ids, attention_mask=mask, settings=WAYS[way]) for model in models))


def test_a_model_and_its_gradients_are_one_graph():
    torch._dynamo.reset()
    ids, found = tokens(2, 40), []
    for compiled in (False, True):
        model = patterned("llama", PATTERN)
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        output = run(ids, labels=ids)
        output.loss.backward()
        found.append((output.logits, model.model.layers[0].self_attn.q_proj.weight.grad))
    torch.testing.assert_close(found[1], found[0])
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("pattern", [PATTERN, CONTENT], ids=["fixed", "chosen by content"])
def test_checkpointing_changes_no_gradient(pattern, reentrant):
    found = []
    for checkpointed in (False, True):
        model = patterned("llama", pattern).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        ids = tokens(2, 45)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-8)


def test_trainer_and_lora(tmp_path):
    found = {}
    for name in ("block_sparse", "oracle"):
        model = peft.get_peft_model(patterned("llama", PATTERN, name), LORA, autocast_adapter_dtype=False)
        run = trainer(model, tmp_path)
        run.train()
        found[name] = losses(run)
    assert len(found["oracle"]) == 4
    assert found["block_sparse"] == pytest.approx(found["oracle"], rel=1e-5)


def test_packed_documents_of_sft_trainer_do_not_see_each_other(tmp_path):
    model = patterned("llama", PATTERN)
    for batch, starts in packed_batches(sft_trainer(model, words_tokenizer(), tmp_path)):
        together = losses_of_tokens(model, batch)
        for begin, end in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True):
            alone = {"input_ids": batch["input_ids"][:, begin:end]}
            if end - begin > 1:
                torch.testing.assert_close(together[begin : end - 1], losses_of_tokens(model, alone))
        return
