"""The benchmark refuses wrong results, measures what it says and marks what it did not measure."""

import json
from collections.abc import Callable
from pathlib import Path

import benchmark
import pytest
import torch
from benchmarking import parity, recompilations, variants
from benchmarking.cases import Case, branches_for
from benchmarking.variants import Choice, Variant
from torch import Tensor
from typer.testing import CliRunner, Result

TINY = Case(
    device="cpu",
    dtype="float32",
    batch=1,
    heads=4,
    kv_heads=2,
    head_dim=16,
    length=256,
    queries=256,
    branches=((64, 1), (128, 2), (256, 4)),
)
PEERS = """
import hf_dilated


def right(query, key, value, segments, rates):
    return hf_dilated.dilated_attention(query, key, value, hf_dilated.DilatedConfig.longnet(segments, rates))


def wrong(query, key, value, segments, rates):
    return right(query, key, value, segments[:-1], rates[:-1])
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    (tmp_path / "peers.py").write_text(PEERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(parity, "LENGTH", 256)
    sizes = ["--heads", "2", "--head-dim", "16", "--rounds", "5", "--output", str(tmp_path), "--name", "rows"]
    if_not_given = {"--kv-heads": "2", "--pattern": "64:1,128:2"}

    def invoke(*arguments: str) -> Result:
        defaults = [x for name, value in if_not_given.items() if name not in arguments for x in (name, value)]
        return CliRunner().invoke(benchmark.app, [*arguments, *sizes, *defaults])

    return invoke


def test_rows_of_attention(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run("attention", "--lengths", "64,128,256", "--dense-up-to", "128", "--no-memory", "--peer", "peers:right")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    table = {(row["length"], row["variant"], row["mode"]): row for row in rows}
    for mode in ("forward", "forward+backward"):
        for length in (64, 128):
            names = {name for n, name, m in table if (n, m) == (length, mode)}
            assert names == {"dense", "dense (again)", "dilated once", "dilated count", "peer right"}
        measured, extrapolated = table[128, "dense", mode], table[256, "dense", mode]
        assert extrapolated["status"] == "extrapolated"
        assert extrapolated["median"] == pytest.approx(4 * measured["median"])
        assert table[256, "dilated once (again)", mode]["status"] == "measured"
    assert all(len(row["seconds"]) == 5 for row in rows if row["status"] == "measured")
    assert all(row["machine"]["torch"] == torch.__version__ for row in rows)
    assert "dilated once" in result.stdout
    assert all(len(line) <= 120 for line in result.stdout.splitlines())
    assert (tmp_path / "rows.png").stat().st_size > 1000


def test_no_report_while_a_result_is_wrong(run: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("of an earlier run")
    result = run("attention", "--lengths", "64", "--peer", "peers:wrong")
    assert result.exit_code == 1
    assert "peer wrong: output is off" in result.stderr
    assert "dilated once:" not in result.stderr
    assert (tmp_path / "rows.jsonl").read_text() == "of an earlier run"


def test_rows_of_decoding(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run("decode", "--lengths", "256,512")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {(row["length"], row["variant"]) for row in rows} >= {(256, "dense"), (512, "dense"), (512, "dilated once")}
    assert all((row["mode"], row["status"]) == ("eager", "measured") for row in rows)


def test_rows_of_changing_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompilations, "LENGTHS", (256, 300, 513))
    sizes = ["--heads", "2", "--head-dim", "16", "--lengths", "512", "--output", str(tmp_path), "--name", "rows"]
    result = CliRunner().invoke(benchmark.app, ["block_sparse", "--changing", "--blocks", "strided:0.9", *sizes])
    assert result.exit_code == 0, result.output
    (row,) = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert (row["recompilations"], len(row["seconds"])) == (0, len(row["lengths"]))


def test_rows_of_bigbird(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "LENGTH", 256)
    sizes = ["--heads", "2", "--head-dim", "16", "--rounds", "5", "--output", str(tmp_path), "--name", "rows"]
    result = CliRunner().invoke(benchmark.app, ["bigbird", "--lengths", "768", *sizes])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["variant"] for row in rows if row["status"] == "measured"} >= {"dense", "transformers bigbird"}
    result = CliRunner().invoke(benchmark.app, ["bigbird", "--lengths", "700", *sizes])
    assert "700 tokens are no whole blocks" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "many"], "lengths: expected tokens"),
        (["--pattern", "64:1,96:2"], "96 is not a multiple of 64"),
        (["--kv-heads", "3"], "3 does not divide 2 heads"),
    ],
)
def test_bad_options(run: Callable[..., Result], arguments: list[str], message: str) -> None:
    result = run("attention", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("overlap", ["once", "count"])
def test_flex_masks_are_the_pattern(monkeypatch: pytest.MonkeyPatch, overlap: str, permuted: bool) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    name = f"flex {overlap}{' permuted' * permuted}"
    flex = next(x for x in variants.variants(TINY, Choice(flex=True)) if x.name == name)
    assert flex.claims is not None
    actual, expected = parity._run(TINY, flex, backward=False), parity._oracle(TINY, flex.claims)
    assert parity.row_error(actual[0], expected[0]) < 1e-4


def test_parity_sees_one_missing_key() -> None:
    chosen = [x for x in variants.variants(TINY, Choice(overlaps=("once",))) if x.name == "dilated once"]
    attend = chosen[0].prepare()

    def forgets(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key = torch.cat([key[:, :, :-1], -key[:, :, -1:]], 2)
        return attend(query, key, value)

    broken = Variant(name="broken", prepare=lambda: forgets, claims=chosen[0].claims)
    assert parity.failures(TINY, chosen) == ([], [])
    wrong, _ = parity.failures(TINY, [broken])
    assert any(line.startswith("broken: output") for line in wrong)


def test_small_case_keeps_the_form() -> None:
    for pattern, heads in (("four", 32), ("model", 32), ("doubling", 8)):
        branches = branches_for(pattern, 131072, heads)
        case = Case(**{**TINY.to_dict(), "length": 131072, "queries": 131072, "branches": branches})
        small = parity.small_case(case)
        assert len(small.branches) == len(branches)
        assert [rate for _, rate in small.branches] == [rate for _, rate in branches]
        assert small.branches[0][0] < small.length
        small.config("once")
