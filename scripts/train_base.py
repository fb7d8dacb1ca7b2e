"""Train the small decoder that the quickstart reads with, at 2,048 tokens, on Python's standard library.

A part of what it reads are lessons: documents that state facts and ask for them, so that it learns early to look
things up; a fine-tuning at long contexts then only has to stretch that.

    python scripts/train_base.py --output model_cards/pystdlib-4m
    python scripts/train_base.py --output model_cards/pystdlib-4m --only-card --report outputs/quickstart/report.md

It takes a few minutes on one H100 and writes the model, its tokenizer, the log and the card. A file
of the library is held out when a hash of its relative path says so: the same files in every release.
"""

import hashlib
import json
import math
import platform
import random
import sysconfig
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tokenizers
import torch
import transformers
import typer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from training.base_card import write_card
from training.library import haystack
from training.recipe import workers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_dilated.tasks import Haystack, lesson
from hf_dilated.training.packing import PackedRows

STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
NOT_READ = {"site-packages", "dist-packages", "encodings", "pydoc_data"}  # other projects; generated tables
HELD_OUT_SHARE = 10
DOCUMENT = "<|document|>"
IGNORED = -100
# settings in the summary
TOLD = ("steps", "length", "learning_rate", "lesson_share", "layers", "hidden", "rope_theta", "seed")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides the result, apart from the text."""

    steps: int = 2000
    rows: int = 64
    length: int = 2048
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    lesson_share: float = 0.45
    vocabulary: int = 3072
    hidden: int = 256
    layers: int = 5
    rope_theta: float = 10_000.0
    held_out_rows: int = 256
    seed: int = 0


def read_library(folder: Path = STANDARD_LIBRARY) -> dict[str, str]:
    """Return the text of every UTF-8 source file under ``folder`` by its relative path, in order of the paths."""
    texts = {}
    for path in folder.rglob("*.py"):
        relative = path.relative_to(folder)
        if NOT_READ.intersection(relative.parts) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            texts[relative.as_posix()] = text
    return dict(sorted(texts.items()))


def is_held_out(relative_path: str) -> bool:
    """Whether the file at this path (relative to the library, with forward slashes) is never trained on.

    Example:
        >>> is_held_out("ast.py"), is_held_out("typing.py")
        (True, False)
    """
    return int(hashlib.sha256(relative_path.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def train_tokenizer(texts: Iterable[str], settings: Settings) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that begins every text with one document token.

    A digit is a token: a number is spelled the same wherever it stands, so it can be copied.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{DOCUMENT} $A", special_tokens=[(DOCUMENT, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=DOCUMENT, eos_token=DOCUMENT, model_max_length=settings.length
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> list[Tensor]:
    """Return one 1-D tensor a text: a document token, the text, a document token."""
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(list(texts))
    return [torch.tensor([*encoding.ids, tokenizer.eos_token_id]) for encoding in encodings]


def pack(documents: list[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Lay documents end to end and cut them into rows.

    Returns:
        Tokens and positions, both (rows, length). Positions start at 0 with every document and every row;
        attention stays inside a document because of them. What does not fill a row is left out.
    """
    tokens = torch.cat(documents)
    positions = torch.cat([torch.arange(len(document), device=tokens.device) for document in documents])
    rows = len(tokens) // length
    tokens, positions = (x[: rows * length].view(rows, length) for x in (tokens, positions))
    return tokens, positions.minimum(torch.arange(length, device=tokens.device))


def packed_rows(documents: list[Tensor], between: Haystack, settings: Settings) -> PackedRows:
    """Return the rows of the whole training; each epoch shuffles the documents, which also moves the cuts."""
    tokens = [document.tolist() for document in documents]
    return PackedRows(
        lambda epoch: random.Random(f"{settings.seed} {epoch}").sample(tokens, len(tokens)),
        length=settings.length,
        rows=settings.steps * settings.rows,
        lesson=partial(lesson, between),
        lesson_share=settings.lesson_share,
        seed=settings.seed,
    )


def in_batches(rows: PackedRows, settings: Settings, device: str) -> DataLoader:
    """Return the batches of the whole training."""
    return DataLoader(rows, batch_size=settings.rows, num_workers=workers(device), pin_memory=device != "cpu")


def sample_rows(documents: list[Tensor], settings: Settings) -> tuple[Tensor, Tensor]:
    """Return ``held_out_rows`` packed rows of the documents (all, if there are fewer), always the same."""
    tokens, positions = pack(documents, settings.length)
    order = random.Random(settings.seed).sample(range(len(tokens)), min(settings.held_out_rows, len(tokens)))
    return tokens[order], positions[order]


def build_model(settings: Settings) -> LlamaForCausalLM:
    """Return an untrained Llama with eight heads."""
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=2 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=settings.length,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def token_losses(model: LlamaForCausalLM, tokens: Tensor, positions: Tensor) -> Tensor:
    """Return the loss in nats of each next token, (rows, length - 1); 0 where a document ends."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits[:, :-1]
    targets = tokens[:, 1:].masked_fill(positions[:, 1:] == 0, IGNORED)
    losses = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(targets)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokens: Tensor, positions: Tensor, rows: int) -> tuple[float, Tensor]:
    """Return the mean loss of all rows, and the mean loss by position in the row, (length - 1,)."""
    parts = zip(tokens.split(rows), positions.split(rows), strict=True)
    losses = torch.cat([token_losses(model, *part) for part in parts])
    counted = positions[:, 1:] != 0
    return (losses.sum() / counted.sum()).item(), losses.sum(0) / counted.sum(0).clamp(min=1)


def make_optimizer(model: LlamaForCausalLM, settings: Settings) -> torch.optim.Optimizer:
    """Return AdamW that decays matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=model.device.type == "cuda")


def learning_rate(step: int, settings: Settings) -> float:
    """Rise linearly over the first twentieth of the steps, then fall along a cosine to zero."""
    warmup = max(1, settings.steps // 20)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup)))


def train(
    model: LlamaForCausalLM, batches: DataLoader, held_out: tuple[Tensor, Tensor], settings: Settings, log: Path
) -> None:
    """Train ``model`` in place and write one JSON line to ``log`` every fiftieth of the steps."""
    optimizer = make_optimizer(model, settings)
    report_every = max(1, settings.steps // 50)
    losses: list[Tensor] = []
    tokens_since, since = 0, time.perf_counter()
    with log.open("w") as lines:
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
            tokens, positions = (
                batch[name].to(model.device, non_blocking=True) for name in ("input_ids", "position_ids")
            )
            loss = token_losses(model, tokens, positions).sum() / (positions[:, 1:] != 0).sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            tokens_since += tokens.numel()
            if (step + 1) % report_every == 0 or step + 1 == settings.steps:
                mean = torch.stack(losses).mean().item()  # waits for the device
                speed = tokens_since / (time.perf_counter() - since)
                held_out_loss, _ = evaluate(model, *held_out, settings.rows)
                row = {"step": step + 1, "loss": mean, "held_out_loss": held_out_loss, "tokens_per_second": speed}
                lines.write(json.dumps({name: round(value, 4) for name, value in row.items()}) + "\n")
                lines.flush()
                typer.echo(f"step {step + 1:5}  loss {mean:.4f}  held out {held_out_loss:.4f}  {speed:,.0f} tokens/s")
                losses, tokens_since, since = [], 0, time.perf_counter()


def perplexity_by_position(losses: Tensor) -> dict[str, float]:
    """Return the perplexity of ever later positions in a row, from the mean loss by position, (length - 1,)."""
    edges = [1, *(edge for edge in (128, 512, 1024) if edge < len(losses)), len(losses) + 1]
    return {f"{a}–{b - 1}": losses[a - 1 : b - 1].mean().exp().item() for a, b in zip(edges, edges[1:], strict=False)}


def run(texts: dict[str, str], output: Path, settings: Settings, *, device: str, library: str) -> None:
    """Train tokenizer and model on ``texts`` by relative path, and write the whole folder."""
    started = time.perf_counter()
    torch.manual_seed(settings.seed)
    output.mkdir(parents=True, exist_ok=True)
    training = {path: text for path, text in texts.items() if not is_held_out(path)}
    held_out = {path: text for path, text in texts.items() if is_held_out(path)}
    tokenizer = train_tokenizer(training.values(), settings)
    tokenizer.save_pretrained(output)
    documents, held_out_documents = (encode(tokenizer, part.values()) for part in (training, held_out))
    held_out_rows = sample_rows([document.to(device) for document in held_out_documents], settings)
    training_tokens, held_out_tokens = (sum(map(len, part)) for part in (documents, held_out_documents))
    model = build_model(settings).to(device)
    typer.echo(
        f"{model.num_parameters():,} parameters, {training_tokens:,} tokens to train on, {held_out_tokens:,} held out; "
        f"tokenizer and data took {time.perf_counter() - started:.0f} s"
    )
    log = output / "training.jsonl"
    rows = packed_rows(documents, haystack(tokenizer, training), settings)
    train(model, in_batches(rows, settings, device), held_out_rows, settings, log)
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=0, do_sample=True, temperature=0.7, top_p=0.95
    )
    model.save_pretrained(output)

    loss, by_position = evaluate(model, *held_out_rows, settings.rows)
    held_out_bytes = sum(len(text.encode()) for text in held_out.values())
    tokens_per_step = settings.rows * settings.length
    summary = {
        "library": library,
        "text_sha256": hashlib.sha256("".join(f"{path}\n{text}" for path, text in texts.items()).encode()).hexdigest(),
        "training_files": len(training),
        "training_tokens": training_tokens,
        "held_out_files": len(held_out),
        "held_out_tokens": held_out_tokens,
        "parameters": model.num_parameters(),
        **{name: getattr(settings, name) for name in TOLD},
        "held_out_rows": len(held_out_rows[0]),
        "vocabulary": len(tokenizer),
        "tokens_per_step": tokens_per_step,
        "epochs": (1 - settings.lesson_share) * settings.steps * tokens_per_step / training_tokens,
        "training_loss": json.loads(log.read_text().splitlines()[-1])["loss"],
        "held_out_loss": loss,
        "held_out_perplexity": math.exp(loss),
        "bits_per_byte": loss * (held_out_tokens - len(held_out)) / held_out_bytes / math.log(2),
        "by_position": perplexity_by_position(by_position),
        "seconds": time.perf_counter() - started,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else f"a CPU ({platform.machine()})",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    with log.open("a") as lines:
        lines.write(json.dumps({"summary": summary}) + "\n")
    write_card(output)
    typer.echo(f"held-out perplexity {math.exp(loss):.2f}; wrote {output} in {time.perf_counter() - started:.0f} s")


def main(
    output: Annotated[Path, typer.Option(help="Folder for model, tokenizer, log and card.")],
    sources: Annotated[Path, typer.Option(help="A standard library; its folder name goes into the card.")] = (
        STANDARD_LIBRARY
    ),
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = Settings.steps,
    rows: Annotated[int, typer.Option(help="Rows in a batch.")] = Settings.rows,
    length: Annotated[int, typer.Option(help="Tokens in a row.")] = Settings.length,
    rope_theta: Annotated[float, typer.Option(help="Base of the rotary positions.")] = Settings.rope_theta,
    held_out_rows: Annotated[int, typer.Option(help="Held-out rows to evaluate on.")] = Settings.held_out_rows,
    seed: Annotated[int, typer.Option(help="Of weights and order.")] = Settings.seed,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cuda" if torch.cuda.is_available() else "cpu",
    only_card: Annotated[bool, typer.Option(help="Write the card again, from the log.")] = False,
    report: Annotated[Path | None, typer.Option(help="report.md of the quickstart, for the card.")] = None,
) -> None:
    """Train the small decoder that the quickstart reads with."""
    if only_card:
        write_card(output, report)
        return
    settings = Settings(
        steps=steps, rows=rows, length=length, rope_theta=rope_theta, held_out_rows=held_out_rows, seed=seed
    )
    run(read_library(sources), output, settings, device=device, library=sources.name)


if __name__ == "__main__":
    typer.run(main)
