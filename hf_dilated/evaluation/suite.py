"""The whole evaluation: the same weights with several attentions, side by side."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from hf_dilated.evaluation.cost import measure_cost
from hf_dilated.evaluation.perplexity import Reading, perplexity_by_position, read, read_in_windows
from hf_dilated.evaluation.report import Report
from hf_dilated.evaluation.retrieval import make_samples, retrieve
from hf_dilated.integration.persistence import stored_config
from hf_dilated.tasks import TASKS, Haystack

DENSE = "dense"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SHORT_PIECES = 16  # of every document
PARTS = ("perplexity", "retrieval", "short", "cost")

Advance = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured.

    Args:
        max_length: Longest text in tokens.
        trained_length: Longest text that the dense model was made for; the windows of its sliding reading.
        attentions: Names of backends; ``"dense"`` is the model's dense attention.
        parts: Some of ``perplexity`` (by position), ``retrieval``, ``short`` (perplexity of texts that fit into
            ``trained_length``) and ``cost``.
        tasks: Names of :data:`hf_dilated.tasks.TASKS`.
        depths: Where needles lie.
        repeats: Samples of every task, length and depth.
        seed: Of the samples.

    Raises:
        ValueError: If a name is unknown or a length too short.
    """

    max_length: int
    trained_length: int
    attentions: Sequence[str] = (DENSE, "dilated")
    parts: Sequence[str] = PARTS
    tasks: Sequence[str] = tuple(TASKS)
    depths: Sequence[float] = DEPTHS
    repeats: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("parts", PARTS), ("tasks", tuple(TASKS))):
            if unknown := sorted(set(getattr(self, name)) - set(known)):
                raise ValueError(f"{name}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
        if not self.attentions:
            raise ValueError("attentions: name at least one, for example dense")
        for name in ("max_length", "trained_length"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}: expected at least 2 tokens, got {getattr(self, name)}")

    @property
    def lengths(self) -> list[int]:
        """Lengths that double from ``trained_length`` (or ``max_length``, if that is shorter) to ``max_length``."""
        lengths = [min(self.trained_length, self.max_length)]
        while lengths[-1] < self.max_length:
            lengths.append(min(2 * lengths[-1], self.max_length))
        return lengths


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """Let a model run another attention for a while; ``"dense"`` is sdpa.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, attn_implementation="dilated"))
        >>> with attention(model, "dense"):
        ...     print(model.config._attn_implementation)
        sdpa
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa" if name == DENSE else name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def evaluate(
    model: Any,
    tokenizer: Any,
    documents: dict[str, Tensor],
    haystack: Haystack,
    plan: Evaluation,
    advance: Advance = lambda step: None,
) -> Report:
    """Measure a model with every attention of the plan.

    Args:
        model: A causal language model of Transformers.
        tokenizer: Its tokenizer.
        documents: (N,) tokens of every text to read, on the model's device; cut to ``plan.max_length``.
        haystack: The text that needles are hidden in.
        plan: What to measure.
        advance: Called with a description after every step.
    """
    texts = [document[: plan.max_length] for document in documents.values()]
    report = Report(
        model=model.config._name_or_path,
        attention=stored_config(model.config).to_dict(),
        documents={name: min(len(tokens), plan.max_length) for name, tokens in documents.items()},
        plan=asdict(plan) | {"lengths": plan.lengths},
        environment=environment(model),
    )
    for name in plan.attentions:
        with attention(model, name):
            for part in plan.parts:
                rows = MEASURES[part](model, tokenizer, texts, haystack, plan)
                report.rows(part).extend({"attention": name} | row for row in rows)
                advance(f"{name}: {part}")
    if _reads_windows(plan):
        with attention(model, DENSE):
            rows = _by_position(texts, plan, partial(read_in_windows, model, window=plan.trained_length))
            label = f"{DENSE}, windows of {plan.trained_length:,}"
            report.perplexity.extend({"attention": label} | row for row in rows)
        advance(label)
    return report


def steps(plan: Evaluation) -> int:
    """Return how often :func:`evaluate` calls ``advance``."""
    return len(plan.attentions) * len(plan.parts) + _reads_windows(plan)


def _reads_windows(plan: Evaluation) -> bool:
    return DENSE in plan.attentions and "perplexity" in plan.parts and plan.max_length > plan.trained_length


def environment(model: Any) -> dict[str, str]:
    """Return where something is measured."""
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    dtype = str(model.dtype).removeprefix("torch.")
    return {"device": name, "dtype": dtype, "torch": torch.__version__, "transformers": transformers.__version__}


def _by_position(texts: list[Tensor], plan: Evaluation, reader: Callable[[Tensor], Reading]) -> list[dict[str, Any]]:
    losses = [reader(text).losses for text in texts]
    edges = [0, max(1, plan.lengths[0] // 2), *plan.lengths]
    return [asdict(bucket) for bucket in perplexity_by_position(losses, edges)]


def _perplexity(model: Any, tokenizer: Any, texts: list[Tensor], haystack: Haystack, plan: Evaluation) -> list[dict]:
    return _by_position(texts, plan, partial(read, model))


def _retrieval(model: Any, tokenizer: Any, texts: list[Tensor], haystack: Haystack, plan: Evaluation) -> list[dict]:
    samples = make_samples(haystack, plan.tasks, plan.lengths, plan.depths, repeats=plan.repeats, seed=plan.seed)
    return [
        {
            "task": sample.task,
            "tokens": length,
            "depth": sample.depth,
            "score": retrieve(model, tokenizer, sample),
        }
        for length, sample in samples
    ]


def _short(model: Any, tokenizer: Any, texts: list[Tensor], haystack: Haystack, plan: Evaluation) -> list[dict]:
    pieces = [piece for text in texts for piece in text.split(plan.trained_length)[:SHORT_PIECES] if len(piece) > 1]
    losses = [read(model, piece).losses for piece in pieces]
    return [asdict(bucket) for bucket in perplexity_by_position(losses, [0, plan.trained_length])]


def _cost(model: Any, tokenizer: Any, texts: list[Tensor], haystack: Haystack, plan: Evaluation) -> list[dict]:
    longest = max(texts, key=len)
    return [asdict(measure_cost(model, longest[:length])) for length in plan.lengths if length <= len(longest)]


MEASURES: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "perplexity": _perplexity,
    "retrieval": _retrieval,
    "short": _short,
    "cost": _cost,
}
