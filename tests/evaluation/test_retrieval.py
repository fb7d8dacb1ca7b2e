"""What is asked of the model, and how its answer is scored."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_dilated.evaluation.retrieval import make_samples, recites, retrieve
from hf_dilated.tasks import Haystack
from tests.tiny_checkpoint import TEXT, save_tiny_checkpoint, tokenizer


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return Haystack(tokenizer(), TEXT)


class Scripted:
    """A model that writes given tokens."""

    device = torch.device("cpu")

    def __init__(self, continuation: list[int]) -> None:
        self.continuation = torch.tensor([continuation])

    def eval(self) -> None: ...

    def generate(self, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
        self.prompt, self.options = prompt, SimpleNamespace(**options)
        return torch.cat([prompt, self.continuation[:, : options["max_new_tokens"]]], 1)


def test_the_grid_is_complete_and_always_the_same(haystack: Haystack) -> None:
    grid = {"tasks": ["passkey", "variables"], "lengths": [256, 512], "depths": [0.0, 1.0], "repeats": 2}
    samples = list(make_samples(haystack, **grid))
    assert len(samples) == 16
    assert samples == list(make_samples(haystack, **grid))
    assert len({tuple(sample.prompt) for _, sample in samples}) == 16
    assert {(sample.task, length, sample.depth) for length, sample in samples if sample.task == "passkey"} == {
        ("passkey", length, depth) for length in (256, 512) for depth in (0.0, 1.0)
    }
    assert samples != list(make_samples(haystack, **grid, seed=1))
    with pytest.raises(ValueError, match="tasks: expected some of passkey, .*got 'chess'"):
        next(make_samples(haystack, ["chess"], [256], [0.0]))


def test_prompt_and_answer_stay_within_the_length(haystack: Haystack) -> None:
    tokens = tokenizer()
    for length, sample in make_samples(haystack, ["passkey", "common_words"], [300], [0.5]):
        model = Scripted(sample.completion)
        assert retrieve(model, tokens, sample) == 1
        assert model.prompt[0].tolist() == [tokens.bos_token_id, *sample.prompt]
        assert model.prompt.shape[1] + model.options.max_new_tokens == length
        assert model.options.do_sample is False


def test_a_wrong_answer_scores_nothing(haystack: Haystack) -> None:
    ((_, sample),) = make_samples(haystack, ["passkey"], [300], [0.5])
    assert retrieve(Scripted(haystack.encode(" 1.")), tokenizer(), sample) == 0


def test_a_model_answers_greedily_from_the_whole_prompt(haystack: Haystack, tmp_path: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny_checkpoint(tmp_path, max_position_embeddings=512))
    ((_, sample),) = make_samples(haystack, ["passkey"], [200], [0.5])
    written = [0, *sample.prompt]
    for _ in range(4):
        with torch.no_grad():
            written.append(model(torch.tensor([written])).logits[0, -1].argmax().item())
    answer = tokenizer().decode(written[-4:], skip_special_tokens=True)
    expected = type(sample)(task="own", prompt=sample.prompt, answers=(answer,), completion=sample.completion)
    assert retrieve(model, tokenizer(), expected) == 1
    right, wrong = (replace(expected, completion=[*written[-4:-1], last]) for last in (written[-1], 0))
    assert recites(model, tokenizer(), right)
    assert written[-1] != 0
    assert not recites(model, tokenizer(), wrong)
