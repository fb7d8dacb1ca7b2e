"""From a checkpoint, its training and its evaluation to a card for the Hub."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig

from hf_dilated.cards.training import Training
from hf_dilated.evaluation.report import Report, short_count
from hf_dilated.integration.backends import BACKENDS
from hf_dilated.integration.carried import FILES, brings_package, own_classes
from hf_dilated.integration.loading import brings_model, load_statement
from hf_dilated.integration.persistence import stored_config
from hf_dilated.integration.reach import reach_of
from hf_dilated.integration.report import ModelReport, report

PLOTS = ("perplexity.png", "retrieval.png", "cost.png")
CARD = "README.md"


class CardError(ValueError):
    """A card that cannot be written; the message names the file and the way out."""


def make_card(
    folder: str | Path,
    *,
    name: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    training: Training | None = None,
    evaluation: Report | None = None,
    plots: Sequence[str] = (),
    limits: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> ModelCard:
    """Write the card of a checkpoint that selects a backend by itself.

    Args:
        folder: The checkpoint.
        name: Its name on the Hub, ``user/model``; by default the folder's own.
        base_model: Name on the Hub of the model that it was made from.
        license: Identifier of the licence, as the Hub knows it.
        language: Codes of its languages.
        training: How it was made.
        evaluation: What was measured: the ``report.json`` of ``hf-dilated evaluate``.
        plots: Names of the pictures of the evaluation that lie beside the card.
        limits: What else a reader must know, a sentence each.
        trust_remote_code: Whether to run code that the checkpoint brings, if its model needs that.

    Returns:
        The card; ``save`` writes it, ``push_to_hub`` publishes it.

    Raises:
        CardError: If the checkpoint holds no backend, or the evaluation is another pattern's.
    """
    folder = Path(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    stored = stored_config(config)
    if stored.attn_implementation is None:
        raise CardError(f"{folder}: holds no backend of hf_dilated; patch it first")
    if evaluation is not None:
        _check_same(evaluation, stored.to_dict())
    layers = report(config)
    name = name or folder.resolve().name
    data = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag=_pipeline(config),
        base_model=base_model,
        tags=["hf_dilated", stored.attn_implementation, "long-context"],
        model_name=name,
        eval_results=_results(evaluation) if evaluation else None,
    )
    return ModelCard.from_template(
        data,
        template_str=resources.files(__package__).joinpath("template.md").read_text("utf-8"),
        name=name.rpartition("/")[2],
        summary=_summary(config, layers, base_model),
        load_statement=load_statement(config, name, with_package=brings_package(folder)),
        has_remote_code=_replaces_import(config, folder),
        needs_remote_code=brings_model(config) and brings_package(folder),
        attention=_attention(config, layers),
        pattern=_pattern(layers.pattern.to_dict()),
        training=training.lines() if training else [],
        evaluation=_evaluation(evaluation, plots) if evaluation else None,
        limits=[*_limits(layers, evaluation), *limits],
    )


def write_card(
    folder: str | Path, *, evaluation: Path | None = None, training: Path | None = None, **options: Any
) -> Path:
    """Write ``README.md`` into a checkpoint's folder, with the plots of its evaluation beside it.

    Args:
        folder: The checkpoint.
        evaluation: The ``report.json`` of ``hf-dilated evaluate``; its plots lie beside it.
        training: A ``training.json`` (:class:`Training`).
        options: As in :func:`make_card`.

    Returns:
        Path of the card.

    Raises:
        CardError: As :func:`make_card`, and if there is a card already.
        ConfigError: If ``training`` is malformed.
    """
    folder = Path(folder)
    if (folder / CARD).exists():
        raise CardError(f"{folder / CARD}: exists already; move it away, or keep it")
    found = [plot for plot in PLOTS if evaluation and (evaluation.parent / plot).is_file()]
    try:
        measured = Report.load(evaluation) if evaluation else None
    except (ValueError, TypeError) as error:
        raise CardError(f"{evaluation}: is no report of `hf-dilated evaluate`: {error}") from error
    card = make_card(
        folder,
        evaluation=measured,
        training=Training.load(training) if training else None,
        plots=found,
        **options,
    )
    for plot in found:
        assert evaluation is not None
        if (evaluation.parent / plot).resolve() != (folder / plot).resolve():
            shutil.copyfile(evaluation.parent / plot, folder / plot)
    card.save(folder / CARD)
    return folder / CARD


def _replaces_import(config: Any, folder: Path) -> bool:
    """Whether our classes are named, and lie there with the package."""
    return bool(own_classes(getattr(config, "auto_map", None))) and all((folder / name).is_file() for name in FILES)


def _check_same(evaluation: Report, stored: dict[str, Any]) -> None:
    """An evaluation of another pattern says nothing about this one."""
    measured = {name: value for name, value in evaluation.attention.items() if name in BACKENDS}
    own = {name: value for name, value in stored.items() if name in BACKENDS}
    if measured != own:
        raise CardError(
            "evaluation: it measured another pattern than the checkpoint holds; evaluate the checkpoint itself"
        )


def _pipeline(config: Any) -> str | None:
    text = config.get_text_config()
    if config is not text:
        return "image-text-to-text"
    return "text-generation" if any("CausalLM" in name for name in config.architectures or ()) else None


def _summary(config: Any, layers: ModelReport, base_model: str | None) -> str:
    origin = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else f"A {layers.model}"
    length = reach_of(config)
    reads = f", reading up to {length:,} tokens" if length else ""
    return f"{origin} with `{layers.backend}` attention of hf_dilated{reads}."


def _attention(config: Any, layers: ModelReport) -> list[str]:
    text = config.get_text_config()
    kinds = [layer.kind for layer in layers.layers]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    lines = [f"backend: `{layers.backend}`", f"attention layers: {counts}"]
    lines.append(f"exactly dense attention {_dense_length(layers)}")
    if rope := getattr(text, "rope_parameters", None):
        lines.append(f"rotary positions: `{json.dumps(rope)}`")
    original = stored_config(config).original or {}
    if "max_position_embeddings" in original:
        lines.append(f"the original reads {original['max_position_embeddings']:,} tokens")
    return lines


def _dense_length(layers: ModelReport) -> str:
    return "at any length" if layers.is_dense else f"up to {layers.dense_length:,} tokens"


def _pattern(values: dict[str, Any]) -> str:
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in values.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


def _evaluation(evaluation: Report, plots: Sequence[str]) -> dict[str, Any]:
    environment = ", ".join(f"{name} {value}" for name, value in evaluation.environment.items())
    names = dict.fromkeys(row["attention"] for part in ("perplexity", "retrieval") for row in evaluation.rows(part))
    read = ", ".join(f"{name} ({tokens:,} tokens)" for name, tokens in evaluation.documents.items())
    intro = f"The same weights with {', '.join(f'`{name}`' for name in names)}, on {environment}. Texts: {read}."
    if samples := _samples(evaluation):
        intro += f" Every share of what was found is the mean of {samples} samples."
    return {"intro": intro, "tables": evaluation.markdown().strip(), "plots": list(plots)}


def _samples(evaluation: Report) -> str:
    """How many samples a task has at a length: a number, or from–to."""
    counts = Counter((row["task"], row["attention"], row["tokens"]) for row in evaluation.retrieval).values()
    return "–".join(dict.fromkeys((str(min(counts)), str(max(counts))))) if counts else ""


def _results(evaluation: Report) -> list[EvalResult]:
    """Perplexity of the farthest positions, and what is found in the longest texts, for the Hub's own table."""
    results = []
    last = max((row["stop"] for row in evaluation.perplexity), default=0)
    for row in (row for row in evaluation.perplexity if row["stop"] == last):
        span = f"{short_count(row['start'])}–{short_count(row['stop'])}"
        results.append(_result("perplexity", row["perplexity"], f"perplexity at {span}, {row['attention']}", "texts"))
    longest = max((row["tokens"] for row in evaluation.retrieval), default=0)
    scores: dict[tuple[str, str], list[float]] = {}
    for row in evaluation.retrieval:
        if row["tokens"] == longest:
            scores.setdefault((row["task"], row["attention"]), []).append(row["score"])
    for (task, attention), values in scores.items():
        mean = sum(values) / len(values)
        results.append(_result("accuracy", mean, f"found in {short_count(longest)} tokens, {attention}", task))
    return results


def _result(metric: str, value: float, name: str, dataset: str) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset,
        dataset_name=dataset,
        metric_type=metric,
        metric_value=round(value, 4),
        metric_name=name,
    )


def _limits(layers: ModelReport, evaluation: Report | None) -> list[str]:
    lines = []
    if not layers.is_dense:
        cost = "what that costs was not measured" if evaluation is None else "the tables say what that costs"
        lines.append(f"Beyond {layers.dense_length:,} tokens a token sees only a part of those before it; {cost}.")
    if evaluation is not None:
        longest = max(evaluation.documents.values(), default=0)
        lines.append(f"Measured up to {longest:,} tokens, on these texts only.")
    return lines
