"""Which attention keeps the quality of a long context: the same model, tokens and steps for every pattern.

    python scripts/ablation.py --output outputs/ablation                       # 2k -> 32k on one GPU
    python scripts/ablation.py --output outputs/ablation --only dense --only dilated --minutes 9
    python scripts/ablation.py --output outputs/small --only dense --device cpu --max-length 4096 --steps 2 --rows 1

It tunes the shipped model once for each variant on the standard library's sources and on made documents that ask for
something far away, and reads held-out sources and looks for pass keys before and after, with the variant's own
attention and with dense attention. The same command goes on where it was stopped. Every variant has a folder; all that
are finished make ablation.jsonl, a line each, and ablation.md.
"""

import gc
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from train_base import STANDARD_LIBRARY, is_held_out, read_library
from train_long_context import ModelArguments, load_model, make_rows, make_trainer
from training.cost import operations, seconds_a_step
from training.deadline import EXIT_CODE, Deadline, OutOfTime
from training.library import CHARACTERS_PER_TOKEN, haystack, joined
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
from training.results import summary
from training.steps import Step, check, made_with, save, take
from training.variants import DENSE, Variant, variants
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed
from transformers.utils import logging

from hf_dilated.evaluation.retrieval import make_samples, recites
from hf_dilated.evaluation.suite import Evaluation, attention, evaluate
from hf_dilated.tasks import Haystack
from hf_dilated.training.checkpoints import last_complete_checkpoint

DEPTHS = tuple(depth / 9 for depth in range(10))
PARTS = ("cost", "before", "log", "after")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all variants share."""

    model: str
    sources: str
    max_length: int
    trained: int
    steps: int
    rows: int
    learning_rate: float
    lesson_share: float
    rope_scaling: str | None
    documents: int
    repeats: int
    device: str
    seed: int

    @property
    def curriculum(self) -> str:
        """Longest documents, and their shares of the steps."""
        return curriculum(self.trained, self.max_length)

    def training(self, output: Path) -> TrainingArguments:
        """Return the options of a training."""
        return TrainingArguments(
            output_dir=str(output),
            **training_options(
                steps=self.steps,
                rows=self.rows,
                learning_rate=self.learning_rate,
                device=self.device,
                seed=self.seed,
            ),
            save_strategy="no",
            save_total_limit=1,
            report_to=[],
            disable_tqdm=True,
        )


class Sources:
    """Held-out and training files of the standard library, laid end to end into long documents."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.tokenizer: Any = AutoTokenizer.from_pretrained(setting.model)

    @cached_property
    def _texts(self) -> dict[bool, dict[str, str]]:
        texts = read_library(Path(self.setting.sources))
        return {kind: {p: text for p, text in texts.items() if is_held_out(p) == kind} for kind in (True, False)}

    def _joined(self, held_out: bool) -> dict[str, str]:
        return joined(self._texts[held_out], self.setting.max_length * CHARACTERS_PER_TOKEN)

    @cached_property
    def documents(self) -> dict[str, torch.Tensor]:
        """Tokens of the held-out documents to read."""
        chosen = list(self._joined(True).items())[: self.setting.documents]
        tokens = {name: self.tokenizer(text, return_tensors="pt", verbose=False).input_ids[0] for name, text in chosen}
        return {name: found.to(self.setting.device) for name, found in tokens.items()}

    @cached_property
    def training(self) -> list[list[int]]:
        """Tokens of the documents to learn from."""
        tokens: list[list[int]] = self.tokenizer(list(self._joined(False).values()), verbose=False).input_ids
        return tokens

    @cached_property
    def haystacks(self) -> dict[bool, Haystack]:
        """The text between facts, by whether it is held out."""
        return {held_out: haystack(self.tokenizer, texts) for held_out, texts in self._texts.items()}

    def epoch(self, number: int) -> Iterator[list[int]]:
        """Return the training documents in the order of this epoch."""
        return iter(random.Random(f"{self.setting.seed} {number}").sample(self.training, len(self.training)))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One variant, and where its parts are kept."""

    name: str
    variant: Variant
    setting: Setting
    sources: Sources
    output: Path
    deadline: Deadline

    @property
    def folder(self) -> Path:
        return self.output / "".join(letter if letter.isalnum() else "-" for letter in self.name)

    @property
    def own(self) -> str:
        """Name of its attention when it reads."""
        return DENSE if self.name == DENSE else self.variant.backend

    def part(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    @property
    def is_finished(self) -> bool:
        return self.made_with().keys() == set(PARTS)

    def made_with(self) -> dict[str, Any]:
        """Return the options of what is finished, by step."""
        return made_with(self.steps(), self.folder)

    def steps(self) -> list[Step]:
        """Return what is to be done, in order."""
        options = asdict(self.setting) | {"pattern": self.variant.pattern}
        makers = {"cost": self.price, "before": self.look_before, "log": self.tune, "after": self.look_after}
        return [
            Step(
                name=name,
                make=partial(self._make, maker),
                options=options,
                replaces=[self.part(name), *([self.folder / "training"] if name == "log" else [])],
                resumes=name == "log",
            )
            for name, maker in makers.items()
        ]

    def _make(self, maker: Any) -> None:
        self.deadline.check()
        maker()
        gc.collect()  # trainer and optimizer hold one another
        torch.cuda.empty_cache()

    def untuned(self) -> Any:
        """Load the model that all variants start from, its positions stretched to the full length."""
        arguments = ModelArguments(
            model=self.setting.model,
            max_length=self.setting.max_length,
            attention=self.variant.backend,
            pattern=json.dumps(self.variant.pattern),
            rope_scaling=self.setting.rope_scaling,
            dtype="float32",
        )
        return load_model(arguments).to(self.setting.device)

    def price(self) -> None:
        """Say what a step at full length costs, beside dense attention."""
        model, length = self.untuned(), self.setting.max_length
        found: dict[str, Any] = {"operations": operations(model.config, self.variant.backend, length)}
        found["seconds"] = seconds_a_step(model, length)
        with attention(model, DENSE):
            found["dense_seconds"] = seconds_a_step(model, length)
        save(self.part("cost"), found)

    def look_before(self) -> None:
        """Measure the untuned model with the variant's attention."""
        save(self.part("before"), self.measure(self.untuned(), (self.own,)))

    def look_after(self) -> None:
        """Measure the tuned model with the variant's and with dense attention."""
        model = AutoModelForCausalLM.from_pretrained(self.folder / "model").to(self.setting.device)
        save(self.part("after"), self.measure(model, tuple(dict.fromkeys((self.own, DENSE)))))

    def measure(self, model: Any, attentions: tuple[str, ...]) -> dict[str, Any]:
        """Read held-out documents and look for pass keys."""
        setting, tokenizer = self.setting, self.sources.tokenizer
        plan = Evaluation(
            max_length=setting.max_length,
            trained_length=setting.trained,
            attentions=attentions,
            parts=("perplexity", "short"),
        )
        between = self.sources.haystacks[True]
        model = model.to(torch.bfloat16 if setting.device.startswith("cuda") else torch.float32)
        report = evaluate(model, tokenizer, self.sources.documents, between, plan)
        samples = list(make_samples(between, ["passkey"], plan.lengths, DEPTHS, repeats=setting.repeats))
        for name in attentions:
            with attention(model, name):
                for (tokens, depth), group in groupby(samples, lambda pair: (pair[0], pair[1].depth)):
                    found = [recites(model, tokenizer, sample) for _, sample in group]
                    place = {"attention": name, "tokens": tokens, "depth": depth}
                    report.retrieval.append({**place, "found": sum(found), "asked": len(found)})
        return asdict(report)

    def tune(self) -> None:
        """Train, store the model, and keep the log."""
        setting = self.setting
        set_seed(setting.seed)
        arguments = setting.training(self.folder / "training")
        rows = make_rows(
            self.sources.epoch,
            arguments,
            length=setting.max_length,
            curriculum=setting.curriculum,
            haystack=self.sources.haystacks[False],
            lesson_share=setting.lesson_share,
        )
        model = self.untuned()
        trainer = make_trainer(model, self.sources.tokenizer, rows, arguments, callbacks=[self.deadline])
        checkpoint = last_complete_checkpoint(self.folder / "training")
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        model.to(torch.bfloat16).save_pretrained(self.folder / "model")
        self.sources.tokenizer.save_pretrained(self.folder / "model")
        shutil.rmtree(arguments.output_dir)
        seconds = training_seconds(log, setting.rows * setting.max_length)
        save(self.part("log"), {"training_seconds": seconds, "log": log})

    def row(self) -> dict[str, Any]:
        """Return everything about the variant, with the settings that it was made with."""
        parts = {name: json.loads(self.part(name).read_text("utf-8")) for name in PARTS}
        log, options = parts.pop("log"), self.made_with()["log"]
        variant = {"backend": self.variant.backend, "pattern": options.pop("pattern")}
        setting = options | {"curriculum": curriculum(options["trained"], options["max_length"])}
        return {"variant": self.name, "own": self.own, **variant, "setting": setting, **log, **parts}


def write(trials: list[Trial], output: Path) -> None:
    """Write table and rows of all variants that are finished."""
    rows = [trial.row() for trial in trials if trial.is_finished]
    if rows:
        (output / "ablation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        (output / "ablation.md").write_text(summary(rows, DENSE).markdown() + "\n", "utf-8")


def main(
    output: Annotated[Path, typer.Option(help="Folder for the variants, ablation.jsonl and ablation.md.")],
    model: Annotated[str, typer.Option(help="The model to start from.")] = str(SHIPPED),
    sources: Annotated[Path, typer.Option(help="A standard library.", file_okay=False, exists=True)] = STANDARD_LIBRARY,
    only: Annotated[list[str] | None, typer.Option(help="Names of variants; repeat it. By default all.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens in a row and of the longest document.")] = 32768,
    trained: Annotated[int, typer.Option(help="Length that the model was made for.")] = 2048,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = STEPS,
    rows: Annotated[int, typer.Option(help="Rows in a step.")] = ROWS,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = LEARNING_RATE,
    lesson_share: Annotated[float, typer.Option(help="Share of made documents.")] = LESSON_SHARE,
    rope_scaling: Annotated[str | None, typer.Option(help="As of train_long_context.py; by default YaRN.")] = None,
    documents: Annotated[int, typer.Option(help="Held-out documents to read.")] = 24,
    repeats: Annotated[int, typer.Option(help="Pass keys of every length and depth.")] = 4,
    minutes: Annotated[float | None, typer.Option(help="Stop after so long; the same command goes on.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cuda" if torch.cuda.is_available() else "cpu",
    seed: Annotated[int, typer.Option(help="Of order and lessons.")] = 0,
) -> None:
    """Tune and measure every variant; exits with 75 if there was not enough time for all."""
    deadline = Deadline(minutes)
    logging.set_verbosity_error()
    setting = Setting(
        model=model, sources=str(sources), max_length=max_length, trained=trained, steps=steps, rows=rows,
        learning_rate=learning_rate, lesson_share=lesson_share, rope_scaling=rope_scaling, documents=documents,
        repeats=repeats, device=device, seed=seed,
    )  # fmt: skip
    config = AutoConfig.from_pretrained(model)
    config.max_position_embeddings = trained
    known = variants(config, max_length)
    if unknown := sorted(set(only or ()) - set(known)):
        raise typer.BadParameter(f"--only {', '.join(unknown)}: known are {'; '.join(known)}")
    texts = Sources(setting)
    trials = [
        Trial(name=name, variant=variant, setting=setting, sources=texts, output=output, deadline=deadline)
        for name, variant in known.items()
    ]
    try:
        check_one_gpu(setting.training(output))
        for trial in trials:
            check(trial.steps(), trial.folder)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    try:
        for trial in trials:
            if not only or trial.name in only:
                typer.echo(f"{trial.name}:")
                take(trial.steps(), trial.folder)
                write(trials, output)
    except OutOfTime:
        typer.echo(f"stopped after {minutes:g} minutes; the same command goes on")
        raise typer.Exit(EXIT_CODE) from None
    finally:
        if (output / "ablation.md").exists():
            typer.echo((output / "ablation.md").read_text("utf-8"))


if __name__ == "__main__":
    typer.run(main)
