"""Run every language model family of the installed Transformers, tiny, with ``attn_implementation="dilated"``.

    python scripts/survey_models.py
    python scripts/survey_models.py --only llama,bert

Writes a table at the end of ``docs/models.md``: which families work, which are refused and why. With ``--only`` it
prints the rows instead.
The exit status is 1 if a family fails or is silently wrong.
"""

import json
import multiprocessing
import resource
import signal
import time
from collections import Counter
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.progress import Progress
from surveying.checks import BUGS, STATUSES, Outcome, survey
from surveying.tiny import tiny_config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging

KINDS = {"causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "masked": MODEL_FOR_MASKED_LM_MAPPING_NAMES}
SECONDS = 20  # of one core; ten times as long by the clock
BYTES = 8 << 30
AT_ONCE = 2
HEADING = "## Every family"

Row = dict[str, Any]


def main(
    only: Annotated[str, typer.Option(help="Families, such as llama,bert; all by default.")] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Run again what an earlier survey has finished.")] = False,
    cache: Annotated[Path, typer.Option(help="Folder for the result of each family.")] = Path("outputs/survey"),
    output: Annotated[Path, typer.Option(help="The table.")] = Path("docs/models.md"),
) -> None:
    """Survey the families, write the table."""
    wanted = {name.strip() for name in only.split(",")} - {""}
    families = [(kind, name) for kind, names in KINDS.items() for name in sorted(names) if not wanted or name in wanted]
    if unknown := wanted - {name for _, name in families}:
        raise typer.BadParameter(f"not among the language models: {', '.join(sorted(unknown))}", param_hint="--only")
    cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    rows = run_all(families, cache, fresh=fresh)
    if wanted:
        typer.echo(table(rows))
    else:
        write(rows, output)
        typer.echo(f"Table: {output}")
    typer.echo(summary(rows))
    bugs = [row for row in rows if row["status"] in BUGS]
    for row in bugs:
        typer.echo(f"{row['family']} ({row['kind']}) {row['status']}: {row['why']}")
    raise typer.Exit(1 if bugs else 0)


def run_all(families: list[tuple[str, str]], cache: Path, *, fresh: bool) -> list[Row]:
    """Run each family in a process of its own, two at a time, and return a row for each."""
    rows: dict[tuple[str, str], Row] = {}
    waiting = []
    for kind, name in families:
        path = _path(cache, kind, name)
        if path.exists() and not fresh:
            rows[kind, name] = json.loads(path.read_text())
        else:
            waiting.append((kind, name))
    with Progress() as progress:
        bar = progress.add_task("families", total=len(families), completed=len(rows))
        running: list[tuple[str, str, BaseProcess, Connection, float]] = []
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                running.append(_start(*waiting.pop(0)))
            wait([connection for *_, connection, _ in running], timeout=1)
            for task in list(running):
                if (outcome := _outcome(task)) is None:
                    continue
                running.remove(task)
                kind, name = task[:2]
                row = {"family": name, "kind": kind, "model": _class_name(kind, name), **asdict(outcome)}
                rows[kind, name] = row
                _path(cache, kind, name).write_text(json.dumps(row))
                progress.advance(bar)
    return [rows[family] for family in families]


def _path(cache: Path, kind: str, name: str) -> Path:
    return cache / f"{transformers.__version__}-{kind}-{name}.json"


def _class_name(kind: str, name: str) -> str:
    found = KINDS[kind][name]
    return found if isinstance(found, str) else found[0]


def _start(kind: str, name: str) -> tuple[str, str, BaseProcess, Connection, float]:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_work, args=(kind, name, sender))
    process.start()
    sender.close()
    return kind, name, process, receiver, time.monotonic() + 10 * SECONDS


def _work(kind: str, name: str, sender: Connection) -> None:
    address_space = _address_space() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    try:
        model_class = getattr(transformers, _class_name(kind, name))
        parts = CONFIG_MAPPING[name].sub_configs.values()
        config_class = model_class.config_class if model_class.config_class in parts else CONFIG_MAPPING[name]
        config = tiny_config(config_class, is_decoder=kind == "causal")
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), "")
        sender.send(Outcome(status="not built tiny", why=f"{type(error).__name__}: {line}"))
        return
    sender.send(survey(model_class, config))


def _address_space() -> int:
    """Bytes that the process has inherited; memory pools reserve much more than they use."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _outcome(task: tuple[str, str, BaseProcess, Connection, float]) -> Outcome | None:
    """Return what a process found, None while it runs."""
    _, _, process, receiver, deadline = task
    try:
        if receiver.poll():
            outcome: Outcome = receiver.recv()
            process.join()
            return outcome
    except EOFError:
        process.join()
        ended = {-signal.SIGKILL: f"not finished after {SECONDS} s", -signal.SIGXCPU: f"not finished after {SECONDS} s"}
        why = ended.get(process.exitcode or 0, f"its process ended with status {process.exitcode}")
        return Outcome(status="not built tiny", why=why)
    if time.monotonic() < deadline:
        return None
    process.kill()
    process.join()
    return Outcome(status="not built tiny", why=f"not finished after {SECONDS} s")


def summary(rows: list[Row]) -> str:
    """Count the families by status, in one line."""
    count = Counter(row["status"] for row in rows)
    return f"{len(rows)} families: " + ", ".join(f"{count[status]} {status}" for status in STATUSES if count[status])


def write(rows: list[Row], page: Path) -> None:
    """Replace the last section of a page, from its heading on."""
    page.parent.mkdir(parents=True, exist_ok=True)
    text = page.read_text() if page.exists() else ""
    page.write_text(text.partition(f"{HEADING}\n")[0] + table(rows))


def table(rows: list[Row]) -> str:
    """Return the section: a summary, then a line for each family."""
    lines = [
        HEADING,
        "",
        "Written by `python scripts/survey_models.py`: every causal and masked language model family of Transformers "
        f"{transformers.__version__}, as a tiny random model.",
        "",
        "- **works**: equal to the dense model at short lengths, different beyond, blind to the future (where the "
        "dense model is) and to padding.",
        '- **refused**: loading or running it with `attn_implementation="dilated"` raises the error that is shown.',
        "- **own attention**: the family never asks for an attention function and stays what it is; `hf-dilated info` "
        "refuses it.",
        "- **fails**, **silently wrong**: defects; the survey's exit status is 1 while there is one.",
        "- **not built tiny**: the survey could not make a small model that runs on tokens alone.",
        "",
        summary(rows) + ".",
        "",
        "| family | head | model | result | why |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        why = row["why"].replace("|", "\\|")
        lines.append(f"| {row['family']} | {row['kind']} | {row['model']} | {row['status']} | {why} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
