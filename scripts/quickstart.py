"""Read, continue and learn from documents far longer than the model was made for, on a CPU, in a few minutes.

    python scripts/quickstart.py
    python scripts/quickstart.py --model Qwen/Qwen3-0.6B --text book.txt --device cuda --max-length 131072

Without options it reads files of Python's standard library that the shipped model has never seen. It writes a
table, a plot and the numbers to outputs/quickstart.
"""

import json
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from train_base import is_held_out, read_library
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_dilated import DilatedConfig
from hf_dilated.evaluation.perplexity import Bucket, Reading, perplexity_by_position, read, read_in_windows

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHIPPED = Path(__file__).resolve().parents[1] / "model_cards" / "pystdlib-4m"
SHORTEST_CHARACTERS_PER_TOKEN = 2
NEW_TOKENS = 96
BACKENDS = {"dense": "sdpa", "dilated": "dilated"}

console = Console()


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to read and how."""

    model: str
    max_length: int
    device: str
    learn_steps: int
    learning_rate: float

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.startswith("cuda") else torch.float32


@dataclass(kw_only=True)
class Report:
    """What was measured; perplexities by the name of the way of reading."""

    model: str
    trained_length: int
    pattern: dict[str, Any]
    documents: list[str]
    perplexities: dict[str, list[Bucket]] = field(default_factory=dict)
    costs: list[dict[str, Any]] = field(default_factory=list)
    prompt: str = ""
    continuation: str = ""
    learning_losses: list[float] = field(default_factory=list)


def stretches(config: Any, max_length: int) -> dict[str, dict[str, Any] | None]:
    """Return the ways in which the model's rotary positions can go to ``max_length``: as they are, and YaRN.

    Raises:
        typer.BadParameter: If the model has no positions beyond its own length.
    """
    text = config.get_text_config()
    trained = text.max_position_embeddings
    if max_length <= trained:
        return {"RoPE as trained": None}
    rope = getattr(text, "rope_parameters", None)
    if not rope:
        raise typer.BadParameter(
            f"{config.model_type} has learned positions for {trained:,} tokens and cannot read beyond them; "
            f"pass --max-length {trained} or a model with rotary positions"
        )
    ways: dict[str, dict[str, Any] | None] = {"RoPE as trained": None}
    if rope.get("rope_type") == "default":
        yarn = {"rope_type": "yarn", "factor": max_length / trained, "original_max_position_embeddings": trained}
        ways["YaRN"] = {**rope, **yarn}
    return ways


def load(task: Task, rope: dict[str, Any] | None) -> Any:
    """Load the model with the dilated backend, a pattern for ``task.max_length`` and the given rotary positions."""
    config = AutoConfig.from_pretrained(task.model)
    config.hf_dilated = long_pattern(config, task.max_length)
    if rope is not None:
        config.get_text_config().rope_parameters = rope
    config.get_text_config().max_position_embeddings = max(
        task.max_length, config.get_text_config().max_position_embeddings
    )
    model = AutoModelForCausalLM.from_pretrained(
        task.model, config=config, attn_implementation="dilated", dtype=task.dtype
    )
    return model.to(task.device).eval()


def long_pattern(config: Any, max_length: int) -> DilatedConfig:
    """Choose the pattern: a few sinks, and segments that start elsewhere in every second layer."""
    pattern = DilatedConfig.from_model_config(config, max_length=max_length)
    return replace(pattern, sink_tokens=4, phase="alternate")


def encode(tokenizer: Any, text: str, length: int, device: str) -> Tensor:
    """Return the first tokens of ``text``, at most ``length``."""
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0, :length].to(device)


def long_documents(tokenizer: Any, task: Task, texts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and first ``task.max_length`` tokens of the texts that are long enough."""
    for name, text in texts:
        if len(text) >= SHORTEST_CHARACTERS_PER_TOKEN * task.max_length:
            tokens = encode(tokenizer, text, task.max_length, task.device)
            if len(tokens) == task.max_length:
                yield name, tokens


def documents_to_read(tokenizer: Any, task: Task, text: Path | None, count: int) -> dict[str, Tensor]:
    """Return the user's own text, or ``count`` held-out files.

    Raises:
        typer.BadParameter: If nothing is long enough.
    """
    if text is not None:
        tokens = encode(tokenizer, text.read_text("utf-8"), task.max_length, task.device)
        if len(tokens) < task.max_length:
            raise typer.BadParameter(
                f"{text} has {len(tokens):,} tokens, fewer than --max-length {task.max_length}; lower --max-length"
            )
        return {text.name: tokens}
    held_out = [(path, text) for path, text in read_library().items() if is_held_out(path)]
    found = dict(islice(long_documents(tokenizer, task, held_out), count))
    if not found:
        raise typer.BadParameter(
            f"no held-out file of the standard library has {task.max_length:,} tokens; lower --max-length or set --text"
        )
    return found


def documents_to_learn_from(tokenizer: Any, task: Task) -> list[Tensor]:
    """Return up to ``task.learn_steps`` long files of the standard library that are not held out."""
    texts = [(path, text) for path, text in read_library().items() if not is_held_out(path)]
    random.Random(0).shuffle(texts)
    return [tokens for _, tokens in islice(long_documents(tokenizer, task, texts), task.learn_steps)]


def learn(model: Any, documents: list[Tensor], task: Task, step_done: Callable[[], None]) -> list[float]:
    """Take ``task.learn_steps`` optimizer steps of one whole document each; return the losses."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate, weight_decay=0.0)
    losses = []
    for step in range(task.learn_steps):
        for group in optimizer.param_groups:
            group["lr"] = task.learning_rate * (1 - step / task.learn_steps)
        tokens = documents[step % len(documents)][None]
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        step_done()
    model.eval()
    return losses


def position_edges(trained: int, max_length: int) -> list[int]:
    """Return bucket edges that double up to ``max_length``, from half the length that the model was made for."""
    first = max(1, min(trained, max_length) // 2)
    edges = [0, first]
    while edges[-1] < max_length:
        edges.append(min(2 * edges[-1], max_length))
    return edges


def cost(name: str, tokens: int, reading: Reading) -> dict[str, Any]:
    return {"attention": name, "tokens": tokens, "seconds": reading.seconds, "peak_bytes": reading.peak_bytes}


def continue_document(model: Any, tokenizer: Any, document: Tensor) -> tuple[str, str]:
    """Return the end of the document and what the model writes after it."""
    prompt = document[: max(2, len(document) - NEW_TOKENS)]
    torch.manual_seed(0)
    output = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        max_new_tokens=min(NEW_TOKENS, len(document) - len(prompt)) or 1,
        do_sample=True,
        temperature=0.5,
        top_p=0.9,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    return tokenizer.decode(prompt[-160:]), tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)


def start(progress: Progress, label: str, total: int) -> Any:
    """Add a bar; where bars are not drawn while they move, print its label."""
    if not progress.console.is_terminal:
        progress.console.print(label, "…")
    return progress.add_task(label, total=total)


def measure(task: Task, text: Path | None, count: int, progress: Progress) -> Report:
    """Read with every combination of attention and positions, learn, read again, continue."""
    config = AutoConfig.from_pretrained(task.model)
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    trained = config.get_text_config().max_position_embeddings
    ways = stretches(config, task.max_length)
    documents = documents_to_read(tokenizer, task, text, count)
    lessons = documents_to_learn_from(tokenizer, task)
    edges = position_edges(trained, task.max_length)
    report = Report(
        model=task.model, trained_length=trained, pattern=long_pattern(config, task.max_length).to_dict(),
        documents=list(documents),
    )  # fmt: skip

    readings = Readings(list(documents.values()), edges, report, progress)
    full: dict[str, Reading] = {}
    for way, rope in ways.items():
        model = load(task, rope)
        if rope is None and task.max_length > trained:
            model.set_attn_implementation("sdpa")
            readings.add(f"dense, windows of {trained:,}", partial(read_in_windows, model, window=trained))
        for name, backend in BACKENDS.items():
            model.set_attn_implementation(backend)
            full[name] = readings.add(f"{name}, {way}", partial(read, model))
    first = next(iter(documents.values()))
    measure_cost(model, first, edges[2:-1], report, progress)
    report.costs += [cost(name, task.max_length, reading) for name, reading in full.items()]
    if lessons:
        bar = start(progress, f"learn from {short(task.max_length)} tokens a step", total=task.learn_steps)
        report.learning_losses = learn(model, lessons, task, lambda: progress.advance(bar))
        readings.add(f"dilated, {way}, after {task.learn_steps} steps", partial(read, model))
    bar = start(progress, "continue the document", total=1)
    report.prompt, report.continuation = continue_document(model, tokenizer, first)
    progress.advance(bar)
    return report


@dataclass(frozen=True)
class Readings:
    """Reads the same documents in several ways and keeps the perplexities in a report."""

    documents: list[Tensor]
    edges: list[int]
    report: Report
    progress: Progress

    def add(self, label: str, reader: Callable[[Tensor], Reading]) -> Reading:
        """Return how the first document was read."""
        bar = start(self.progress, label, total=len(self.documents))
        done = []
        for document in self.documents:
            done.append(reader(document))
            self.progress.advance(bar)
        self.report.perplexities[label] = perplexity_by_position([reading.losses for reading in done], self.edges)
        return done[0]


def measure_cost(model: Any, document: Tensor, lengths: list[int], report: Report, progress: Progress) -> None:
    """Add time and memory of one pass over ever longer beginnings of a document."""
    bar = start(progress, "time and memory", total=len(BACKENDS) * len(lengths))
    for length in lengths:
        for name, backend in BACKENDS.items():
            model.set_attn_implementation(backend)
            report.costs.append(cost(name, length, read(model, document[:length])))
            progress.advance(bar)


def short(tokens: int) -> str:
    """Write 16384 as 16k."""
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def perplexity_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return header and rows."""
    buckets = next(iter(report.perplexities.values()))
    header = ["perplexity at position", *(f"{short(b.start)}–{short(b.stop)}" for b in buckets)]
    return header, [[name, *(f"{b.perplexity:.2f}" for b in row)] for name, row in report.perplexities.items()]


def cost_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return header and rows."""
    header = ["one pass over", "dense", "dilated", "faster", "dense memory", "dilated memory"]
    rows = []
    for dense, dilated in zip(report.costs[::2], report.costs[1::2], strict=True):
        memory = [
            f"{c['peak_bytes'] / 2**20:,.0f} MiB" if c["peak_bytes"] is not None else "–" for c in (dense, dilated)
        ]
        seconds = [f"{c['seconds']:.2f} s" for c in (dense, dilated)]
        ratio = f"{dense['seconds'] / dilated['seconds']:.1f}×"
        rows.append([f"{short(dense['tokens'])} tokens", *seconds, ratio, *memory])
    return header, rows


def show(title: str, header: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for column, name in enumerate(header):
        table.add_column(name, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(report: Report, path: Path) -> None:
    """Draw perplexity by position, and time by length."""
    figure, (quality, speed) = plt.subplots(1, 2, figsize=(13, 5), width_ratios=(3, 2), layout="constrained")
    for name, buckets in report.perplexities.items():
        line = "--" if name.startswith("dense") else "-"
        labels = [f"{short(b.start)}–{short(b.stop)}" for b in buckets]
        quality.plot(labels, [b.perplexity for b in buckets], line, marker="o", label=name)
    quality.set(yscale="log", xlabel="position in the document, tokens", ylabel="perplexity")
    quality.set_title(f"{Path(report.model).name}, made for {report.trained_length:,} tokens")
    quality.legend(fontsize="small")
    for name in BACKENDS:
        costs = [c for c in report.costs if c["attention"] == name]
        speed.plot([c["tokens"] for c in costs], [c["seconds"] for c in costs], marker="o", label=name)
    speed.set(xlabel="tokens", ylabel="seconds for one pass", title="time")
    speed.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(report: Report, output: Path) -> None:
    """Write report.json, report.md and perplexity.png."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    pattern = ", ".join(f"{key}={value}" for key, value in report.pattern.items())
    parts = [
        "## Long documents",
        f"`python scripts/quickstart.py` reads {', '.join(f'`{name}`' for name in report.documents)} with\n"
        f"`DilatedConfig({pattern})`:",
        markdown(*perplexity_table(report)),
        markdown(*cost_table(report)),
    ]
    (output / "report.md").write_text("\n\n".join(parts) + "\n")
    plot(report, output / "perplexity.png")


def main(
    model: Annotated[str, typer.Option(help="A causal language model: a folder or a name on the Hub.")] = str(SHIPPED),
    text: Annotated[Path | None, typer.Option(help="A UTF-8 file to read.", exists=True, dir_okay=False)] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    max_length: Annotated[int, typer.Option(help="Tokens of each document.", min=32)] = 16384,
    documents: Annotated[int, typer.Option(help="Held-out files to read.", min=1)] = 1,
    learn_steps: Annotated[int, typer.Option(help="Optimizer steps of one long file each.", min=0)] = 4,
    learning_rate: Annotated[float, typer.Option(help="Of the first of these steps.")] = 5e-4,
    output: Annotated[Path, typer.Option(help="Folder for the plot and the numbers.")] = Path("outputs/quickstart"),
) -> None:
    """Read, continue and learn from documents far longer than the model was made for."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*sequence length is longer than.*")
    task = Task(model=model, max_length=max_length, device=device, learn_steps=learn_steps, learning_rate=learning_rate)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        report = measure(task, text, documents, progress)
    write(report, output)
    show(f"Reading {', '.join(report.documents)}", *perplexity_table(report))
    show("One pass of the whole model", *cost_table(report))
    console.print(Panel(report.prompt[-400:], title="the end of the document", style="dim"), markup=False)
    console.print(Panel(report.continuation, title="the model continues"), markup=False)
    console.print(f"Plot: {output / 'perplexity.png'}   Numbers: {output / 'report.json'}")


if __name__ == "__main__":
    typer.run(main)
