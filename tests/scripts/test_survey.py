"""The survey tells families that work from those that are refused, keep their own attention or are wrong."""

from pathlib import Path

import pytest
import survey_models
import transformers as tf
from surveying import checks
from surveying.tiny import tiny_config
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Model = type[tf.PreTrainedModel]


@pytest.fixture(autouse=True)
def backend_as_before() -> object:
    before = tf.AttentionInterface._global_mapping["dilated"]
    yield
    tf.AttentionInterface.register("dilated", before)


@pytest.mark.parametrize(
    ("model_class", "status"),
    [
        (tf.LlamaForCausalLM, "works"),
        (tf.GPT2LMHeadModel, "works"),
        (tf.BertForMaskedLM, "works"),
        (tf.Gemma2ForCausalLM, "refused"),
        (tf.BloomForCausalLM, "refused"),
        (tf.MambaForCausalLM, "own attention"),
    ],
)
def test_status(model_class: Model, status: str) -> None:
    assert _survey(model_class).status == status


def _survey(model_class: Model) -> checks.Outcome:
    config_class = model_class.config_class
    return checks.survey(model_class, tiny_config(config_class, is_decoder="Masked" not in model_class.__name__))


def _sees_everything(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: object, **options: object
) -> tuple[Tensor, None]:
    return _dilated(module, query, key, value, None, **options | {"is_causal": False})


def _is_dense(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: object, **options: object) -> object:
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    output = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=options["scaling"])
    return output.transpose(1, 2), None


_dilated = checks.attention_function("dilated")


@pytest.mark.parametrize(
    ("broken", "words"), [(_sees_everything, "sees the future"), (_is_dense, "the pattern does not run")]
)
def test_a_broken_backend_is_noticed(monkeypatch: pytest.MonkeyPatch, broken: object, words: str) -> None:
    monkeypatch.setattr(checks, "attention_function", lambda name: broken)
    outcome = _survey(tf.LlamaForCausalLM)
    assert outcome.status == "silently wrong"
    assert words in outcome.why


def test_results_are_kept(tmp_path: Path) -> None:
    rows = survey_models.run_all([("causal", "llama")], tmp_path, fresh=False)
    assert [row["status"] for row in rows] == ["works"]
    kept = next(tmp_path.glob("*.json"))
    kept.write_text(kept.read_text().replace("works", "refused"))
    assert survey_models.run_all([("causal", "llama")], tmp_path, fresh=False)[0]["status"] == "refused"
    assert survey_models.run_all([("causal", "llama")], tmp_path, fresh=True)[0]["status"] == "works"


def test_table() -> None:
    row = {"family": "llama", "kind": "causal", "model": "LlamaForCausalLM", "status": "refused", "why": "a | b"}
    page = survey_models.table([row])
    assert "| llama | causal | LlamaForCausalLM | refused | a \\| b |" in page
    assert "1 families: 1 refused." in page


def test_only_the_last_section_of_the_page_is_written(tmp_path: Path) -> None:
    page = tmp_path / "models.md"
    row = {"family": "llama", "kind": "causal", "model": "LlamaForCausalLM", "status": "works", "why": ""}
    page.write_text("# Models\n\nBy hand.\n\n## Every family\n\n| gone |\n")
    for _ in range(2):
        survey_models.write([row], page)
        assert page.read_text().startswith("# Models\n\nBy hand.\n\n## Every family\n\nWritten by")
        assert "gone" not in page.read_text()


def test_every_family_is_asked_for() -> None:
    for names in survey_models.KINDS.values():
        assert all(name in CONFIG_MAPPING for name in names)
