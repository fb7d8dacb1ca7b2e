"""LongNet as Transformers expects a model to behave, and its attention against the oracle."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from hf_dilated import DilatedConfig, reference
from hf_dilated.integration.persistence import stored_config
from modeling import (
    LongNetConfig,
    LongNetForCausalLM,
    LongNetForMaskedLM,
    LongNetForSequenceClassification,
    LongNetModel,
)
from modeling.modeling_longnet import LongNetPositions, rotate

PATTERN = DilatedConfig.longnet((8, 16, 64), (1, 2, 4))
ENCODINGS = ("xpos", "rope")
PAD = 1


def config(**options: Any) -> LongNetConfig:
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": PAD, "hf_dilated": PATTERN}
    return LongNetConfig(**sizes | options)


def build(model_class: Any = LongNetForCausalLM, **options: Any) -> Any:
    torch.manual_seed(0)
    if model_class is LongNetForMaskedLM:
        options = {"is_causal": False} | options
    model = model_class(config(**options)).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) / 4)
    return model


def tokens(batch: int = 2, length: int = 40, seed: int = 0) -> Tensor:
    return torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_is_the_oracles(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer's output, from its own projections and the float64 reference."""
    model = build(LongNetModel, is_causal=is_causal, num_hidden_layers=1)
    ids = tokens()
    layer = model.layers[0]
    with torch.no_grad():
        hidden = model.embed_tokens(ids) * 32**0.5
        normed = layer.attention_norm(hidden)
        query, key, value = (
            projection(normed).view(2, 40, 4, 8).transpose(1, 2)
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        cos, sin, scale = model.positions(hidden, torch.arange(40)[None])
        query, key = rotate(query, cos, sin, scale), rotate(key, cos, sin, 1 / scale)
        attended = reference.dilated_attention(query, key, value, PATTERN, is_causal=is_causal)
        attended = layer.self_attn.inner_norm(attended.transpose(1, 2).reshape(2, 40, 32))
        hidden = hidden + layer.self_attn.o_proj(attended)
        expected = model.norm(hidden + layer.mlp(layer.mlp_norm(hidden)))
        found = model(ids).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_only_distances_count(encoding: str) -> None:
    model = build(position_encoding=encoding)
    near = logits(model, tokens(), position_ids=torch.arange(40)[None])
    far = logits(model, tokens(), position_ids=torch.arange(40)[None] + 20)
    torch.testing.assert_close(far, near, rtol=0, atol=1e-4)  # angles are rounded to float32


def test_xpos_decays_with_the_distance_and_rope_does_not() -> None:
    ones = torch.ones(1, 1, 1, 8, dtype=torch.float64)

    def product(encoding: str, distance: int) -> float:
        positions = LongNetPositions(config(position_encoding=encoding, xpos_scale_base=8))
        cos, sin, scale = positions(ones[0], torch.tensor([[40, 40 - distance]]))
        states = ones.expand(1, 1, 2, 8)
        query, key = rotate(states, cos, sin, scale), rotate(states, cos, sin, None if scale is None else 1 / scale)
        turned = rotate(states, cos, sin, None)
        return (query[0, 0, 0] @ key[0, 0, 1] / (turned[0, 0, 0] @ turned[0, 0, 1])).item()

    decays = [product("xpos", distance) for distance in (0, 6, 12)]
    assert decays[0] == pytest.approx(1)
    assert decays[0] > decays[1] > decays[2] > 0
    assert product("rope", 12) == pytest.approx(1)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_dense_attention_is_another_backend(backend: str) -> None:
    dense = DilatedConfig(segment_lengths=(64,), dilation_rates=(1,))
    model = build(hf_dilated=dense)
    expected = logits(model, tokens())
    model.set_attn_implementation(backend)
    torch.testing.assert_close(logits(model, tokens()), expected)
    assert (logits(build(), tokens()) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_class", [LongNetForCausalLM, LongNetForMaskedLM])
def test_padding_changes_nothing(side: str, model_class: Any) -> None:
    model, ids = build(model_class), tokens(length=33)
    pad = torch.full((2, 7), PAD)
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], 1)
    real = torch.cat([pad == 0, ids > 0] if side == "left" else [ids > 0, pad == 0], 1)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    found = logits(model, padded, attention_mask=real.long(), position_ids=positions)
    torch.testing.assert_close(found[real].view(2, 33, -1), logits(model, ids))
    assert found.isfinite().all()


def test_packed_documents_are_apart() -> None:
    model, ids = build(), tokens(1, 40)
    positions = torch.cat([torch.arange(17), torch.arange(23)])[None]
    packed = logits(model, ids, position_ids=positions)
    apart = torch.cat([logits(model, ids[:, :17]), logits(model, ids[:, 17:])], 1)
    torch.testing.assert_close(packed, apart)
    assert (logits(model, ids) - apart).abs().max() > 1e-3


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_goes_on_as_the_whole_text_is_read(encoding: str, cache: str | None) -> None:
    model, ids = build(position_encoding=encoding), tokens(length=11)
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 12, "cache_implementation": cache}
    written = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert written.shape == (2, 23)
    for length in range(11, 23):
        assert torch.equal(logits(model, written[:, :length])[:, -1].argmax(-1), written[:, length])


def test_generation_with_left_padding_and_beams() -> None:
    model, ids = build(), tokens(length=11)
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :4], mask[1, :4] = PAD, 0
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 8}
    together = model.generate(padded, attention_mask=mask, **options)
    alone = model.generate(ids[1:, 4:], attention_mask=mask[1:, 4:], **options)
    assert torch.equal(together[1, 11:], alone[0, 7:])
    assert model.generate(ids, num_beams=3, **options).shape == (2, 19)


@pytest.mark.parametrize("model_class", [LongNetForCausalLM, LongNetForMaskedLM, LongNetForSequenceClassification])
def test_learning_with_and_without_checkpointing(model_class: Any) -> None:
    gradients = []
    labels = torch.tensor([0, 1]) if model_class is LongNetForSequenceClassification else tokens()
    for is_checkpointed in (False, True):
        model = build(model_class).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        model(tokens(), labels=labels).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    assert all(grad is not None and grad.abs().max() > 0 for grad in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("model_class", [LongNetForCausalLM, LongNetForMaskedLM, LongNetForSequenceClassification])
def test_saving_and_loading(model_class: Any, tmp_path: Path) -> None:
    auto = {
        LongNetForCausalLM: AutoModelForCausalLM,
        LongNetForMaskedLM: AutoModelForMaskedLM,
        LongNetForSequenceClassification: AutoModelForSequenceClassification,
    }[model_class]
    model = build(model_class)
    expected = logits(model, tokens())
    for number in range(2):
        model.save_pretrained(tmp_path / str(number))
        model = auto.from_pretrained(tmp_path / str(number), dtype=torch.float64)
        assert type(model) is model_class
        assert model.config._attn_implementation == "dilated"
        assert stored_config(model.config).dilated == PATTERN
        torch.testing.assert_close(logits(model, tokens()), expected, rtol=0, atol=0)
    base = AutoModel.from_pretrained(tmp_path / "0", dtype=torch.float64)
    assert type(base) is LongNetModel
    torch.testing.assert_close(base(tokens()).last_hidden_state, model.model(tokens()).last_hidden_state)


def test_a_checkpoint_carries_its_code(tmp_path: Path) -> None:
    """A process that has never seen this folder runs it in tests/patching/test_remote_code.py."""
    build().save_pretrained(tmp_path)
    code = {path.name for path in tmp_path.glob("*.py")}
    assert code == {"configuration_longnet.py", "modeling_longnet.py", "hf_dilated_code.py"}
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.auto_map["AutoModelForCausalLM"] == "modeling_longnet.LongNetForCausalLM"
    config.save_pretrained(tmp_path / "configuration")
    assert (tmp_path / "configuration" / "hf_dilated_code.py").read_bytes() == (
        tmp_path / "hf_dilated_code.py"
    ).read_bytes()


def test_tied_weights_and_other_sizes_of_the_vocabulary() -> None:
    model = build()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    expected = logits(model, tokens())
    model.resize_token_embeddings(64)
    assert model.config.vocab_size == 64
    assert model.lm_head.weight is model.get_input_embeddings().weight
    torch.testing.assert_close(logits(model, tokens())[..., :50], expected)
    apart = build(tie_word_embeddings=False)
    assert apart.lm_head.weight is not apart.get_input_embeddings().weight
    apart.resize_token_embeddings(40)
    assert apart.lm_head.weight.shape[0] == 40


def test_embeddings_as_input_and_hidden_states_as_output() -> None:
    model, ids = build(), tokens()
    with torch.no_grad():
        whole = model(input_ids=ids, output_hidden_states=True)
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids))
    torch.testing.assert_close(embedded.logits, whole.logits)
    assert len(whole.hidden_states) == 3
    torch.testing.assert_close(model.lm_head(whole.hidden_states[-1]), whole.logits)
    assert isinstance(model(ids, return_dict=False), tuple)
    torch.testing.assert_close(logits(model, ids, logits_to_keep=3), whole.logits[:, -3:])
    with pytest.raises(ValueError, match="pass exactly one"):
        model(input_ids=ids, inputs_embeds=model.get_input_embeddings()(ids))
    model.set_attn_implementation("eager")
    weights = model(ids, output_attentions=True).attentions
    assert len(weights) == 2
    assert weights[0].shape == (2, 4, 40, 40)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_classes_of_padded_inputs(is_causal: bool, side: str) -> None:
    model, ids = build(LongNetForSequenceClassification, is_causal=is_causal, num_labels=3), tokens(1, 20)
    pad = torch.full((1, 5), PAD)
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], 1)
    mask = (padded != PAD).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = logits(model, ids)
    assert expected.shape == (1, 3)
    torch.testing.assert_close(logits(model, padded, attention_mask=mask, position_ids=positions), expected)
    changed = ids.clone()
    changed[0, 0] += 1
    assert (logits(model, changed) - expected).abs().max() > 1e-6


def test_the_paper_initialises_deeper_models_wider() -> None:
    shallow, deep = (LongNetModel(config(num_hidden_layers=layers)) for layers in (2, 12))
    for name, grows in (("q_proj", False), ("v_proj", True), ("o_proj", True)):
        wide, narrow = (getattr(model.layers[0].self_attn, name).weight.std().item() for model in (deep, shallow))
        assert wide / narrow == pytest.approx((3.178 / 1.386) ** 0.5 if grows else 1, rel=0.15)
    assert shallow.layers[0].mlp.inner_norm.weight.eq(1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 30}, "do not give 4 heads"),
        ({"position_encoding": "learned"}, "position_encoding: expected one of"),
        ({"max_position_embeddings": 65536}, "xPos with xpos_scale_base=512 leaves the range"),
    ],
)
def test_bad_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        config(**options)


def test_causal_and_masked_models_are_not_confused() -> None:
    with pytest.raises(ValueError, match="needs is_causal=True"):
        LongNetForCausalLM(config(is_causal=False))
    with pytest.raises(ValueError, match="needs is_causal=False"):
        LongNetForMaskedLM(config())


def test_configurations_are_kept_apart() -> None:
    first = config()
    second = copy.deepcopy(first)
    second.hf_dilated = DilatedConfig.longnet((4,), (1,))
    assert stored_config(first).dilated == PATTERN
    assert (
        LongNetConfig(max_position_embeddings=4096, position_encoding="rope").hf_dilated["dilated"]["overlap"]
        == "count"
    )
