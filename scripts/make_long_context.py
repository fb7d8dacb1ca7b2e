"""From a short model to a long one that can be published: patch, fine-tune, evaluate, write the card.

    python scripts/make_long_context.py --output outputs/long                     # the shipped model, 2k -> 32k
    python scripts/make_long_context.py --output outputs/long --train-base        # train the short one first
    python scripts/make_long_context.py --output outputs/long --minutes 9         # stop in time, and go on another day
    python scripts/make_long_context.py --output outputs/small --device cpu --length 4096 --steps 10 --rows 1 \
        --documents 1 --task passkey                                              # on a laptop
    python scripts/make_long_context.py --output outputs/qwen --model Qwen/Qwen3-0.6B --length 131072 --rows 1 \
        --learning-rate 2e-5 -- --gradient_checkpointing --gradient_accumulation_steps 8

The same command goes on where it was stopped. docs/training.md tells more.
"""

import gc
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
import train_base
import train_long_context
import typer
from huggingface_hub import ModelCard
from training.base_card import read_summary
from training.deadline import EXIT_CODE, Deadline, OutOfTime
from training.library import CHARACTERS_PER_TOKEN, joined
from training.recipe import (
    LEARNING_RATE,
    LESSON_SHARE,
    ROWS,
    SHIPPED,
    STEPS,
    check_one_gpu,
    curriculum,
    training_options,
    training_seconds,
)
from training.steps import Step, save, take
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from hf_dilated.cards import write_card
from hf_dilated.cli.evaluate import run as measure
from hf_dilated.evaluation.report import short_count
from hf_dilated.integration.reach import trained_length
from hf_dilated.integration.report import ReportError
from hf_dilated.patching import plan_patch
from hf_dilated.patching.staging import staging_folder
from hf_dilated.tasks import TASKS

CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every option, and where the steps leave what they make."""

    output: Path
    model: str
    train_base: bool
    name: str | None
    length: int
    backend: str
    pattern: str | None
    steps: int
    rows: int
    learning_rate: float
    lesson_share: float
    training: tuple[str, ...]
    sources: Path
    documents: int
    tasks: tuple[str, ...]
    repeats: int
    base_steps: int
    base_length: int
    device: str
    seed: int

    @property
    def start(self) -> str:
        """The short model."""
        return str(self.base) if self.train_base else self.model

    @property
    def full_name(self) -> str:
        return self.name or f"{Path(self.start).name}-{short_count(self.length)}"

    @property
    def base(self) -> Path:
        return self.output / "base"

    @property
    def texts(self) -> Path:
        return self.output / "texts"

    @property
    def patched(self) -> Path:
        return self.output / "patched"

    @property
    def tuned(self) -> Path:
        return self.output / "tuned"

    @property
    def result(self) -> Path:
        """The folder to publish."""
        return self.output / self.full_name.rpartition("/")[2]


def plan(recipe: Recipe, command: str, deadline: Deadline) -> list[Step]:
    """Return the steps in order, each of them only begun in time; ``command`` is what the card says was typed."""

    def options(*names: str) -> dict[str, Any]:
        return json.loads(json.dumps({name: getattr(recipe, name) for name in names}, default=str))

    base = Step(
        name="base",
        make=partial(train_short, recipe),
        options=options("sources", "base_steps", "base_length", "seed"),
        replaces=[recipe.base],
    )
    texts = Step(
        name="texts",
        make=partial(write_texts, recipe),
        options=options("sources", "length"),
        replaces=[recipe.texts],
    )
    patched = Step(
        name="patch",
        make=partial(patch, recipe),
        options=options("start", "length", "backend", "pattern"),
        replaces=[recipe.patched, staging_folder(recipe.patched)],
    )
    tuned = Step(
        name="tune",
        make=partial(tune, recipe, command, deadline),
        options=options("steps", "rows", "learning_rate", "lesson_share", "training", "seed"),
        replaces=[recipe.tuned],
        resumes=True,
    )
    stored = Step(name="store", make=partial(store, recipe), options=options("full_name"), replaces=[recipe.result])
    evaluated = Step(name="evaluate", make=partial(evaluate, recipe), options=options("documents", "tasks", "repeats"))
    card = Step(name="card", make=partial(describe, recipe), options={}, replaces=[recipe.result / CARD])
    steps = [*([base] if recipe.train_base else []), texts, patched, tuned, stored, evaluated, card]
    return [replace(step, make=partial(_in_time, deadline, step.make)) for step in steps]


def _in_time(deadline: Deadline, make: Callable[[], None]) -> None:
    deadline.check()
    make()


def train_short(recipe: Recipe) -> None:
    """Train the short model."""
    settings = train_base.Settings(steps=recipe.base_steps, length=recipe.base_length, seed=recipe.seed)
    texts = train_base.read_library(recipe.sources)
    train_base.run(texts, recipe.base, settings, device=recipe.device, library=recipe.sources.name)


def write_texts(recipe: Recipe) -> None:
    """Lay files end to end into documents of the full length: some to train on, others to evaluate with."""
    texts = train_base.read_library(recipe.sources)
    for folder, is_held_out in ((training_texts(recipe), False), (held_out_texts(recipe), True)):
        chosen = {path: text for path, text in texts.items() if train_base.is_held_out(path) == is_held_out}
        if not chosen:
            raise ValueError(f"sources: {recipe.sources} has too few Python files for {folder.name} texts")
        folder.mkdir(parents=True)
        for path, text in joined(chosen, recipe.length * CHARACTERS_PER_TOKEN).items():
            (folder / path.replace("/", ".")).write_text(text, "utf-8")
    held_out = sum(map(train_base.is_held_out, texts))
    read = f"{len(texts) - held_out:,} Python files of {recipe.sources.name}; {held_out:,} others are held out"
    save(recipe.texts / "texts.json", {"data": [read]})


def training_texts(recipe: Recipe) -> Path:
    return recipe.texts / "training"


def held_out_texts(recipe: Recipe) -> Path:
    return recipe.texts / "held-out"


def patch(recipe: Recipe) -> None:
    """Let the short model reach the full length with its backend."""
    plan_patch(
        recipe.start,
        recipe.patched,
        backend=recipe.backend,
        attention=json.loads(recipe.pattern) if recipe.pattern else None,
        max_position_embeddings=recipe.length,
    ).execute()


def parse_training(recipe: Recipe) -> tuple[Any, ...]:
    """Return the options of the training as ``train_long_context.run`` takes them.

    Raises:
        ValueError: If the short model's length is not known, or several GPUs are visible.
    """
    trained = recipe.base_length if recipe.train_base else trained_length(AutoConfig.from_pretrained(recipe.model))
    if trained is None:
        raise ValueError(f"model: the configuration of {recipe.model} does not tell the length that it was made for")
    values = {
        "model": recipe.patched,
        "attention": recipe.backend,
        "max_length": recipe.length,
        "dtype": "float32",
        "dataset": training_texts(recipe),
        "curriculum": curriculum(trained, recipe.length),
        "lesson_share": recipe.lesson_share,
        "output_dir": recipe.tuned,
        "save_steps": max(1, recipe.steps // 5),
        "save_total_limit": 1,
        "report_to": "none",
    } | training_options(
        steps=recipe.steps,
        rows=recipe.rows,
        learning_rate=recipe.learning_rate,
        device=recipe.device,
        seed=recipe.seed,
    )
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    kinds = (train_long_context.ModelArguments, train_long_context.DataArguments, TrainingArguments)
    parsed = HfArgumentParser(kinds).parse_args_into_dataclasses([*words, *recipe.training])
    check_one_gpu(parsed[-1])
    return parsed


def tune(recipe: Recipe, command: str, deadline: Deadline) -> None:
    """Train the patched model on long documents, and write down how it went."""
    model, data, arguments = parse_training(recipe)
    train_long_context.run(model, data, arguments, callbacks=[deadline])
    gc.collect()  # trainer and optimizer hold one another
    torch.cuda.empty_cache()
    state = json.loads((recipe.tuned / TRAINER_STATE_NAME).read_text("utf-8"))
    log = [entry for entry in state["log_history"] if "loss" in entry]
    last = log[-1]["step"] - (log[-2]["step"] if len(log) > 1 else 0)
    tokens = model.max_length * arguments.train_batch_size * arguments.gradient_accumulation_steps
    made = f"a model that this command trained for {recipe.base_steps:,} steps at {recipe.base_length:,} tokens"
    if share := short_lessons(recipe):
        made += f", {share:.0%} of them in made documents"
    training = {
        "command": command,
        **json.loads((recipe.texts / "texts.json").read_text("utf-8")),
        "recipe": {
            "started from": made if recipe.train_base else Path(recipe.model).name,
            "steps": arguments.max_steps,
            "tokens": arguments.max_steps * tokens,
            "tokens in a row": model.max_length,
            "longest documents, and their shares of the steps": data.curriculum,
            "share of made documents that ask for something far away": data.lesson_share,
            "learning rate": arguments.learning_rate,
            "trained": f"adapters of rank {model.lora_rank}, embeddings and norms"
            if model.lora_rank
            else "all weights",
        },
        "hardware": torch.cuda.get_device_name()
        if recipe.device == "cuda"
        else f"{torch.get_num_threads()} CPU threads",
        "seconds": training_seconds(log, tokens),
        "results": {
            f"training loss, mean of the last {last} steps": round(log[-1]["loss"], 4),
            "tokens a second, median": round(median(entry["tokens_per_second"] for entry in log)),
        },
    }
    save(recipe.tuned / "training.json", training)


def short_lessons(recipe: Recipe) -> float:
    """Return the share of made documents in what the short model has read, if it is one of ours."""
    is_ours = recipe.train_base or recipe.model == str(SHIPPED)
    return read_summary(Path(recipe.start)).get("lesson_share", 0.0) if is_ours else 0.0


def store(recipe: Recipe) -> None:
    """Write weights and tokenizer as they are published, in the precision of the short model."""
    dtype = AutoConfig.from_pretrained(recipe.patched).dtype
    AutoModelForCausalLM.from_pretrained(recipe.tuned, dtype=dtype or "auto").save_pretrained(recipe.result)
    AutoTokenizer.from_pretrained(recipe.tuned).save_pretrained(recipe.result)


def evaluate(recipe: Recipe) -> None:
    """Measure what is published on held-out documents, with its own and with dense attention."""
    chosen = sorted(held_out_texts(recipe).iterdir())[: recipe.documents]
    measure(
        str(recipe.result),
        {path.name: path.read_text("utf-8") for path in chosen},
        recipe.result,
        tasks=list(recipe.tasks),
        repeats=recipe.repeats,
        device=recipe.device,
    )


def describe(recipe: Recipe) -> None:
    """Write the card from what the other steps have left."""
    limits = [
        "Trained on Python sources alone.",
        "The texts that were measured are held-out files laid end to end; some have near relatives in the training.",
    ]
    _, data, _ = parse_training(recipe)
    for share, whose in ((data.lesson_share, "the"), (short_lessons(recipe), "the short model's")):
        if share:
            limits.append(
                f"{share:.0%} of {whose} training tokens were made documents that practise the retrieval tasks: what "
                "is found there is a trained skill."
            )
    own_card = Path(recipe.start) / CARD
    write_card(
        recipe.result,
        evaluation=recipe.result / "report.json",
        training=recipe.tuned / "training.json",
        name=recipe.full_name,
        base_model=None if Path(recipe.start).exists() else recipe.start,
        license=ModelCard.load(own_card).data.license if own_card.is_file() else None,
        limits=limits,
    )


def main(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder for everything; the model to publish is in it, by its name.")],
    model: Annotated[str, typer.Option(help="The short model: a folder or a name on the Hub.")] = str(SHIPPED),
    train_base: Annotated[bool, typer.Option("--train-base", help="Train the short model first.")] = False,
    name: Annotated[str | None, typer.Option(help="user/model; by default the short one's with the length.")] = None,
    length: Annotated[int, typer.Option(help="Tokens in a row, and the longest text afterwards.", min=2)] = 32768,
    backend: Annotated[Literal["dilated", "block_sparse"], typer.Option(help="Attention.")] = "dilated",
    pattern: Annotated[str | None, typer.Option(help="Its pattern as JSON; by default what suits the length.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps of the fine-tuning.", min=1)] = STEPS,
    rows: Annotated[int, typer.Option(help="Rows in a step.", min=1)] = ROWS,
    learning_rate: Annotated[float, typer.Option(help="At its highest; large models want far less.")] = LEARNING_RATE,
    lesson_share: Annotated[float, typer.Option(help="Share of made documents that ask for something far away.")] = (
        LESSON_SHARE
    ),
    sources: Annotated[
        Path, typer.Option(help="Python files; one in ten is held out.", file_okay=False, exists=True)
    ] = (train_base.STANDARD_LIBRARY),
    documents: Annotated[int, typer.Option(help="Held-out documents to read.", min=1)] = 8,
    task: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(TASKS)}; repeat it.")] = None,
    repeats: Annotated[int, typer.Option(help="Samples of every task, length and depth.", min=1)] = 2,
    base_steps: Annotated[int, typer.Option(help="Optimizer steps of --train-base.", min=1)] = (
        train_base.Settings.steps
    ),
    base_length: Annotated[int, typer.Option(help="Tokens in a row of --train-base.", min=2)] = (
        train_base.Settings.length
    ),
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="What to compute on.")] = (
        "cuda" if torch.cuda.is_available() else "cpu"
    ),
    seed: Annotated[int, typer.Option(help="Of weights, order and lessons.")] = 0,
    minutes: Annotated[float | None, typer.Option(help="Stop after so long, with a checkpoint.", min=0)] = None,
) -> None:
    """Make a long model of a short one: patch, fine-tune, evaluate, and write the card.

    Options after `--` go to scripts/train_long_context.py. The same command goes on where it was stopped: finished
    steps are skipped, the training resumes from its last checkpoint. Exits with 75 where --minutes were too few.
    """
    deadline = Deadline(minutes)
    recipe = Recipe(
        output=output, model=model, train_base=train_base, name=name, length=length, backend=backend, pattern=pattern,
        steps=steps, rows=rows, learning_rate=learning_rate, lesson_share=lesson_share, training=tuple(context.args),
        sources=sources, documents=documents, tasks=tuple(task or TASKS), repeats=repeats, base_steps=base_steps,
        base_length=base_length, device=device, seed=seed,
    )  # fmt: skip
    command = shlex.join(["python", "scripts/make_long_context.py", *sys.argv[1:]])
    try:
        parse_training(recipe)
        take(plan(recipe, command, deadline), output)
    except OutOfTime:
        typer.echo(f"stopped after {minutes:g} minutes; the same command goes on")
        raise typer.Exit(EXIT_CODE) from None
    except (ValueError, OSError, ReportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{recipe.result} is ready: read its {CARD}, then publish it with `hf upload`")


app = typer.Typer(add_completion=False)
app.command(context_settings={"allow_extra_args": True})(main)

if __name__ == "__main__":
    app()
