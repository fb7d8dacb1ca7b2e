"""What a model finds in a long text: the tasks of :mod:`hf_dilated.tasks`, by depth and length."""

from collections.abc import Iterable, Iterator, Sequence
from random import Random
from typing import Any

import torch

from hf_dilated.tasks import TASKS, Haystack, Sample

SPARE_TOKENS = 4  # an answer may be written in more tokens than the tokenizer would choose


def make_samples(
    haystack: Haystack,
    tasks: Iterable[str],
    lengths: Iterable[int],
    depths: Sequence[float],
    *,
    repeats: int = 1,
    seed: int = 0,
) -> Iterator[tuple[int, Sample]]:
    """Yield length and sample for every point of a grid, always the same ones.

    Args:
        haystack: The text to hide needles in.
        tasks: Names of :data:`hf_dilated.tasks.TASKS`.
        lengths: Tokens of prompt and answer, and of what the tokenizer puts in front of every text.
        depths: Where the needle lies; every task has as many samples of a length.
        repeats: Samples of every length and depth.
        seed: Of text, words and numbers.

    Raises:
        ValueError: If a task is unknown.
    """
    spare = len(haystack.tokenizer("").input_ids) + SPARE_TOKENS
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"tasks: expected some of {', '.join(TASKS)}, got {task!r}")
        for length in lengths:
            for depth in depths:
                for repeat in range(repeats):
                    random = Random(f"{seed} {task} {length} {depth} {repeat}")
                    yield length, TASKS[task](haystack, length - spare, random, depth)


@torch.no_grad()
def retrieve(model: Any, tokenizer: Any, sample: Sample) -> float:
    """Let a model answer greedily, with its cache; return the share of the answers that it finds.

    Args:
        model: A causal language model of Transformers.
        tokenizer: Its tokenizer; what it puts in front of every text goes in front of the prompt.
        sample: The question.
    """
    model.eval()
    prompt = torch.tensor([[*tokenizer("").input_ids, *sample.prompt]], device=model.device)
    end = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    written = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=len(sample.completion) + SPARE_TOKENS,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=end,
    )
    answer = tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)
    return sample.score(answer)


@torch.no_grad()
def recites(model: Any, tokenizer: Any, sample: Sample) -> bool:
    """Whether the right answer, token by token, is what a model would write greedily; found out in one pass.

    It is stricter than :func:`retrieve`, which takes other words around an answer, and much faster.

    Args:
        model: A causal language model of Transformers.
        tokenizer: Its tokenizer, as for :func:`retrieve`.
        sample: The question.
    """
    model.eval()
    tokens = torch.tensor([[*tokenizer("").input_ids, *sample.prompt, *sample.completion]], device=model.device)
    count = len(sample.completion)
    written = model(input_ids=tokens, use_cache=False, logits_to_keep=count + 1).logits[0, :-1].argmax(-1)
    return torch.equal(written, tokens[0, -count:])
