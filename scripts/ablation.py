"""Which attention keeps the quality of a long context: the same model, tokens and steps for every pattern.

    python scripts/ablation.py --output outputs/ablation                       # 2k -> 32k on one GPU
    python scripts/ablation.py --output outputs/ablation --only once --only dense
    python scripts/ablation.py --output outputs/ablation --only once --device cpu --max-length 4096 --steps 2 --rows 1

It tunes the shipped model once for each variant on the standard library's sources and on made documents that ask for
something far away, and reads held-out sources and looks for pass keys before and after, with the variant's own
attention and with dense attention. Every variant ends as a line of ablation.jsonl; all of them as ablation.md.
"""

import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from train_base import is_held_out, read_library
from train_long_context import HAYSTACK_CHARACTERS, ModelArguments, load_model, make_rows, make_trainer
from training.library import CHARACTERS_PER_TOKEN, joined
from training.recipe import LESSON_SHARE, SHIPPED, curriculum, training_options
from transformers import AutoConfig, AutoTokenizer, TrainingArguments, set_seed
from transformers.utils import logging

from hf_dilated import BlockSparseConfig, DilatedConfig
from hf_dilated.evaluation.report import Report, Table, short_count
from hf_dilated.evaluation.suite import DENSE, Evaluation, evaluate
from hf_dilated.tasks import Haystack

DEPTHS = tuple(depth / 9 for depth in range(10))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all variants share."""

    model: str
    max_length: int
    trained: int
    steps: int
    rows: int
    learning_rate: float
    documents: int
    repeats: int
    device: str
    seed: int

    @property
    def curriculum(self) -> str:
        """Longest documents, and their shares of the steps."""
        return curriculum(self.trained, self.max_length)


def variants(setting: Setting) -> dict[str, dict[str, Any]]:
    """Return backend and pattern of every variant; the dense one is a single segment, to read packed rows fast."""
    config = AutoConfig.from_pretrained(setting.model)
    config.max_position_embeddings = setting.trained
    once = DilatedConfig.from_model_config(config, max_length=setting.max_length)
    middle = config.num_hidden_layers // 2
    patterns = {
        "dense": DilatedConfig(segment_lengths=(setting.max_length,), dilation_rates=(1,)),
        "once": once,
        "count": replace(once, overlap="count"),
        "sinks": replace(once, sink_tokens=4),
        "alternate": replace(once, phase="alternate"),
        "kv_head, rotate": replace(once, offset="kv_head", rotate=True),
        "dense layer": replace(once, dense_layers=(middle,)),
        "all": replace(once, sink_tokens=4, phase="alternate", dense_layers=(middle,)),
    }
    blocks = BlockSparseConfig.from_model_config(config, max_length=setting.max_length)
    sparse = {"block_sparse": blocks, "block_sparse, dense layer": replace(blocks, dense_layers=(middle,))}
    return {
        name: {"attention": backend, "pattern": pattern.to_dict()}
        for backend, found in (("dilated", patterns), ("block_sparse", sparse))
        for name, pattern in found.items()
    }


class Sources:
    """Held-out and training files of the standard library, laid end to end into long documents."""

    def __init__(self, tokenizer: Any, setting: Setting) -> None:
        texts = read_library()
        size = setting.max_length * CHARACTERS_PER_TOKEN
        parts = [{p: text for p, text in texts.items() if is_held_out(p) == held_out} for held_out in (True, False)]
        held_out, training = (joined(part, size) for part in parts)
        self.test_haystack, self.haystack = (
            Haystack(tokenizer, "\n".join(texts.values())[:HAYSTACK_CHARACTERS]) for texts in (held_out, training)
        )
        chosen = list(held_out.items())[: setting.documents]
        self.documents = {
            name: tokenizer(text, return_tensors="pt", verbose=False).input_ids[0].to(setting.device)
            for name, text in chosen
        }
        self.training: list[list[int]] = tokenizer(list(training.values()), verbose=False).input_ids
        self.seed = setting.seed

    def epoch(self, number: int) -> Iterator[list[int]]:
        """Return the training documents in the order of this epoch."""
        shuffler = random.Random(f"{self.seed} {number}")
        return iter(shuffler.sample(self.training, len(self.training)))


def load(setting: Setting, variant: dict[str, Any]) -> Any:
    """Load the untuned model with a variant's attention, its positions stretched to the full length."""
    arguments = ModelArguments(
        model=setting.model,
        max_length=setting.max_length,
        attention=variant["attention"],
        pattern=json.dumps(variant["pattern"]),
        dtype="float32",
    )
    return load_model(arguments).to(setting.device)


def tune(model: Any, tokenizer: Any, sources: Sources, setting: Setting, output: Path) -> list[dict[str, Any]]:
    """Train in place; return the log."""
    set_seed(setting.seed)
    arguments = TrainingArguments(
        output_dir=str(output),
        **training_options(
            steps=setting.steps,
            rows=setting.rows,
            learning_rate=setting.learning_rate,
            device=setting.device,
            seed=setting.seed,
        ),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    rows = make_rows(
        sources.epoch,
        arguments,
        length=setting.max_length,
        curriculum=setting.curriculum,
        haystack=sources.haystack,
        lesson_share=LESSON_SHARE,
    )
    trainer = make_trainer(model, tokenizer, rows, arguments)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def measure(model: Any, tokenizer: Any, sources: Sources, setting: Setting, name: str, *, is_tuned: bool) -> Report:
    """Read with the variant's attention; once tuned, with dense attention as well, and look for pass keys."""
    own = DENSE if name == "dense" else model.config.hf_dilated["attn_implementation"]
    plan = Evaluation(
        max_length=setting.max_length,
        trained_length=setting.trained,
        attentions=tuple(dict.fromkeys((own, DENSE))) if is_tuned else (own,),
        parts=("perplexity", "retrieval", "short") if is_tuned else ("perplexity", "short"),
        tasks=("passkey",),
        depths=DEPTHS,
        repeats=setting.repeats,
    )
    half = torch.bfloat16 if setting.device.startswith("cuda") else torch.float32
    return evaluate(model.to(half), tokenizer, sources.documents, sources.test_haystack, plan)


def run(name: str, variant: dict[str, Any], tokenizer: Any, sources: Sources, setting: Setting, output: Path) -> dict:
    """Measure a variant before and after tuning; save the tuned model, and return its row."""
    before = measure(load(setting, variant), tokenizer, sources, setting, name, is_tuned=False)
    model = load(setting, variant)
    started = time.perf_counter()
    log = tune(model, tokenizer, sources, setting, output / name)
    seconds = time.perf_counter() - started
    after = measure(model, tokenizer, sources, setting, name, is_tuned=True)
    model.save_pretrained(output / name)
    tokenizer.save_pretrained(output / name)
    return {
        "variant": name,
        **variant,
        "setting": asdict(setting) | {"curriculum": setting.curriculum, "lesson_share": LESSON_SHARE},
        "training_seconds": seconds,
        "log": log,
        "before": asdict(before),
        "after": asdict(after),
    }


def summary(rows: list[dict[str, Any]]) -> Table:
    """Return a line for every variant, way of reading, and time before or after tuning."""
    header = ["variant", "tuning", "read with", "perplexity at the end", "short texts", "pass keys found", "tuned in"]
    return Table(
        "Variants", header, [line for row in rows for when in ("before", "after") for line in _lines(row, when)]
    )


def _lines(row: dict[str, Any], when: str) -> Iterator[list[str]]:
    report = row[when]
    seconds = f"{row['training_seconds']:.0f} s" if when == "after" else "–"
    last = {found["attention"]: found["perplexity"] for found in report["perplexity"]}
    short = {found["attention"]: found["perplexity"] for found in report["short"]}
    for attention, perplexity in last.items():
        keys: dict[int, list[float]] = {}
        for found in report["retrieval"]:
            if found["attention"] == attention:
                keys.setdefault(found["tokens"], []).append(found["score"])
        share = ", ".join(f"{short_count(n)} {mean(scores):.0%}" for n, scores in sorted(keys.items()))
        short_texts = f"{short[attention]:.3f}" if attention in short else "–"
        yield [row["variant"], when, attention, f"{perplexity:.3f}", short_texts, share or "–", seconds]


def main(
    output: Annotated[Path, typer.Option(help="Folder for ablation.jsonl, ablation.md and the tuned models.")],
    model: Annotated[str, typer.Option(help="The model to start from.")] = str(SHIPPED),
    only: Annotated[list[str] | None, typer.Option(help="Names of variants; repeat it. By default all.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens in a row and of the longest document.")] = 32768,
    trained: Annotated[int, typer.Option(help="Length that the model was made for.")] = 2048,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    rows: Annotated[int, typer.Option(help="Rows in a step.")] = 2,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 1e-3,
    documents: Annotated[int, typer.Option(help="Held-out documents to read.")] = 8,
    repeats: Annotated[int, typer.Option(help="Pass keys of every length and depth.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cuda" if torch.cuda.is_available() else "cpu",
    seed: Annotated[int, typer.Option(help="Of order and lessons.")] = 0,
) -> None:
    """Tune and measure every variant."""
    logging.set_verbosity_error()
    setting = Setting(
        model=model, max_length=max_length, trained=trained, steps=steps, rows=rows, learning_rate=learning_rate,
        documents=documents, repeats=repeats, device=device, seed=seed,
    )  # fmt: skip
    known = variants(setting)
    if unknown := sorted(set(only or ()) - set(known)):
        raise typer.BadParameter(f"--only {', '.join(unknown)}: known are {', '.join(known)}")
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    sources = Sources(tokenizer, setting)
    done: list[dict[str, Any]] = []
    with (output / "ablation.jsonl").open("a") as lines:
        for name in only or known:
            done.append(run(name, known[name], tokenizer, sources, setting, output))
            lines.write(json.dumps(done[-1]) + "\n")
            lines.flush()
            for line in summary(done[-1:]).rows:
                typer.echo("  ".join(line))
    (output / "ablation.md").write_text(summary(done).markdown() + "\n", "utf-8")


if __name__ == "__main__":
    typer.run(main)
