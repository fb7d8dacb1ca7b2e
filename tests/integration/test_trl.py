"""TRL's SFTTrainer with packed documents."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from hf_dilated import DilatedConfig
from tests.tiny_models import VOCABULARY, tiny_model, tokens

PATTERN = DilatedConfig(segment_lengths=(8, 16), dilation_rates=(1, 2), sink_tokens=1)
LENGTHS = (5, 9, 13, 7, 20, 30, 3, 11)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return words_tokenizer()


def words_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", bos_token="1", eos_token="2", unk_token="3")


def documents() -> Dataset:
    return Dataset.from_dict({"input_ids": [tokens(1, n, seed=n)[0].tolist() for n in LENGTHS]})


def trainer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, path: Path, **options: Any) -> SFTTrainer:
    settings: dict[str, Any] = {"max_length": 32, "per_device_train_batch_size": 2, "max_steps": 3, "logging_steps": 1}
    settings |= {"report_to": [], "use_cpu": True, "bf16": False, "packing": True, "learning_rate": 1e-2}
    arguments = SFTConfig(output_dir=str(path), **settings | options)
    return SFTTrainer(model=model, args=arguments, train_dataset=documents(), processing_class=tokenizer)


def losses_of_tokens(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        logits = model.eval()(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1], batch["input_ids"][0, 1:], reduction="none")


def packed_batches(sft: SFTTrainer) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Batches of several documents, and where these start."""
    for batch in sft.get_train_dataloader():
        starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        assert len(starts) > 1
        yield dict(batch), starts


def test_documents_do_not_see_each_other(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = tiny_model("llama", "dilated", dtype=torch.float64, hf_dilated=PATTERN)
    for batch, starts in packed_batches(trainer(model, tokenizer, tmp_path)):
        before = losses_of_tokens(model, batch)
        first, last = starts[1], starts[2] if len(starts) > 2 else batch["input_ids"].shape[1]
        changed = batch["input_ids"].clone()
        changed[0, first:last] = (changed[0, first:last] + 7) % (VOCABULARY - 1)
        after = losses_of_tokens(model, batch | {"input_ids": changed})
        # A loss at t reads tokens up to t and predicts t + 1: the prediction across a boundary is not trained.
        inside = torch.zeros_like(before, dtype=torch.bool)
        inside[first - 1 : last - 1] = True
        across = torch.tensor(starts[1:]) - 1
        inside[across] = True
        torch.testing.assert_close(after[~inside], before[~inside], rtol=0, atol=0)
        assert (after[first : last - 1] != before[first : last - 1]).all()


def test_packing_changes_no_document(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = tiny_model("llama", "dilated", dtype=torch.float64, hf_dilated=PATTERN)
    for batch, starts in packed_batches(trainer(model, tokenizer, tmp_path)):
        with torch.no_grad():
            packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
            for first, last in zip(starts, [*starts[1:], len(packed)], strict=True):
                alone = model(input_ids=batch["input_ids"][:, first:last]).logits[0]
                torch.testing.assert_close(packed[first:last], alone)


@pytest.mark.parametrize("options", [{"packing_strategy": "bfd"}, {"packing_strategy": "wrapped"}, {"packing": False}])
def test_training_equals_dense_where_the_pattern_is_dense(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Segments as long as the longest document: the same losses as with sdpa, step by step."""
    pattern = DilatedConfig(segment_lengths=(32, 64), dilation_rates=(1, 2))
    losses = {}
    for backend in ("sdpa", "dilated"):
        model = tiny_model("llama", backend, dtype=torch.float64, hf_dilated=pattern)
        sft = trainer(model, tokenizer, tmp_path, gradient_checkpointing=True, **options)
        sft.train()
        losses[backend] = [entry["loss"] for entry in sft.state.log_history if "loss" in entry]
    assert len(losses["dilated"]) == 3
    assert losses["dilated"] == pytest.approx(losses["sdpa"], rel=1e-6)
    assert losses["dilated"][0] != losses["dilated"][-1]


def test_a_short_pattern_trains_another_model(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The test above can fail: with short segments the losses are not those of dense attention."""
    losses = []
    for backend in ("sdpa", "dilated"):
        sft = trainer(tiny_model("llama", backend, hf_dilated=PATTERN), tokenizer, tmp_path, max_steps=1)
        sft.train()
        losses.append(sft.state.log_history[0]["loss"])
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)
