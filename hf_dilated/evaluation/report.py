"""What an evaluation found: JSON, tables, and both again from the JSON."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

Rows = list[dict[str, Any]]


class Table(NamedTuple):
    """Text in columns."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Return the table in Markdown, numbers to the right."""
        lines = [self.header, ["---"] + ["--:"] * (len(self.header) - 1), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(kw_only=True)
class Report:
    """Measurements of one model, a list of plain rows for each part.

    Attributes:
        model: Folder or name.
        attention: Backend and pattern that the checkpoint holds.
        documents: Tokens of every text that was read.
        plan: What was measured.
        environment: On what.
        perplexity: attention, start, stop, tokens, perplexity.
        retrieval: attention, task, tokens, depth, score.
        short: As ``perplexity``, for texts that the dense model was made for.
        cost: attention, tokens, read_seconds, seconds_per_token, peak_bytes.
    """

    model: str
    attention: dict[str, Any]
    documents: dict[str, int]
    plan: dict[str, Any]
    environment: dict[str, str]
    perplexity: Rows = field(default_factory=list)
    retrieval: Rows = field(default_factory=list)
    short: Rows = field(default_factory=list)
    cost: Rows = field(default_factory=list)

    def rows(self, part: str) -> Rows:
        """Return the rows of a part."""
        return getattr(self, part)

    def save(self, path: Path) -> None:
        """Write JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Read what :meth:`save` wrote."""
        return cls(**json.loads(path.read_text("utf-8")))

    def tables(self) -> list[Table]:
        """Return a table of each part that was measured."""
        tables = (_perplexity(self.perplexity), _retrieval(self.retrieval), _short(self.short), _cost(self.cost))
        return [table for table in tables if table.rows]

    def markdown(self) -> str:
        """Return all tables in Markdown, under their titles."""
        return "\n\n".join(f"**{table.title}**\n\n{table.markdown()}" for table in self.tables()) + "\n"


def short_count(tokens: int) -> str:
    """Write 16384 as 16k.

    Example:
        >>> short_count(16384), short_count(1000)
        ('16k', '1000')
    """
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def _perplexity(rows: Rows) -> Table:
    spans = list(dict.fromkeys((row["start"], row["stop"]) for row in rows))
    found = {(row["attention"], row["start"]): f"{row['perplexity']:.2f}" for row in rows}
    header = ["attention", *(f"{short_count(start)}–{short_count(stop)}" for start, stop in spans)]
    body = [[name, *(found.get((name, start), "–") for start, _ in spans)] for name in _attentions(rows)]
    return Table("Perplexity by position", header, body)


def _retrieval(rows: Rows) -> Table:
    lengths = sorted({row["tokens"] for row in rows})
    body = []
    for task in dict.fromkeys(row["task"] for row in rows):
        for name in _attentions(rows):
            chosen = [row for row in rows if row["task"] == task and row["attention"] == name]
            scores = [[row["score"] for row in chosen if row["tokens"] == length] for length in lengths]
            body.append([task, name, *(f"{mean(score):.0%}" if score else "–" for score in scores)])
    return Table("Found, by length of the text", ["task", "attention", *map(short_count, lengths)], body)


def _short(rows: Rows) -> Table:
    body = [
        [row["attention"], f"{row['perplexity']:.3f}", f"{row['perplexity'] / rows[0]['perplexity'] - 1:+.2%}"]
        for row in rows
    ]
    against = f"against {rows[0]['attention']}" if rows else ""
    return Table("Short texts", ["attention", "perplexity", against], body)


def _cost(rows: Rows) -> Table:
    body = [
        [
            short_count(row["tokens"]),
            row["attention"],
            f"{row['read_seconds']:.3f} s",
            f"{row['seconds_per_token'] * 1e3:.1f} ms",
            "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB",
        ]
        for row in sorted(rows, key=lambda row: row["tokens"])
    ]
    return Table("Time and memory", ["tokens", "attention", "reading", "each new token", "memory"], body)


def _attentions(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["attention"] for row in rows))
