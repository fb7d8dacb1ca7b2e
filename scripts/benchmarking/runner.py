"""The run itself: length after length, within a budget of seconds."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarking.cases import Case
from benchmarking.parity import first_line
from benchmarking.report import Row, write_row
from benchmarking.variants import Attention, Choice, Variant, variants, with_control
from hf_dilated import timing
from hf_dilated.timing import Call

Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass
class Run:
    """What all lengths of one run share."""

    kind: str
    machine: dict[str, Any]
    path: Path
    rounds: int
    deadline: float
    choice: Choice
    memory: bool = True
    rows: list[Row] = field(default_factory=list)

    def add(self, case: Case, variant: str, mode: str, status: str, **values: Any) -> None:
        """Keep and write one row."""
        head = {"kind": self.kind, "variant": variant, "mode": mode, "length": case.length, "status": status}
        empty: Row = {"median": None, "seconds": [], "extra_memory": None, "prepare_seconds": None, "reason": None}
        row = head | empty | values | {"case": case.to_dict(), "machine": self.machine}
        self.rows.append(row)
        write_row(self.path, row, is_first=len(self.rows) == 1)

    def left(self) -> float:
        """Return the seconds left of the budget."""
        return self.deadline - time.monotonic()

    def expected_seconds(self, case: Case, variant: Variant, mode: str) -> float | None:
        """Extrapolate a call's time from the longest length that was measured."""
        measured = [
            row
            for row in self.rows
            if (row["variant"], row["mode"], row["status"]) == (variant.name, mode, "measured")
            and row["length"] <= case.length
        ]
        if not measured:
            return None
        longest = max(measured, key=lambda row: row["length"])
        return longest["median"] * (case.length / longest["length"]) ** variant.growth

    def give_up(self, case: Case, variant: Variant, mode: str, status: str, reason: str) -> None:
        """Say why there is no measurement; extrapolate what is dense, as that grows in a known way."""
        seconds = self.expected_seconds(case, variant, mode)
        if variant.claims is None and not variant.is_control and seconds is not None:
            self.add(case, variant.name, mode, "extrapolated", median=seconds, reason=reason)
        else:
            self.add(case, variant.name, mode, status, reason=reason)


def forward(attention: Attention, inputs: Inputs) -> Call:
    """Return a call without gradients."""

    @torch.no_grad()
    def call() -> Tensor:
        return attention(*inputs)

    return call


def forward_backward(attention: Attention, inputs: Inputs) -> Call:
    """Return a call that computes the output and the gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    gradient = torch.empty_like(inputs[0]).copy_(inputs[0])

    def call() -> None:
        torch.autograd.grad(attention(*leaves), leaves, gradient)

    return call


def graph(attention: Attention, inputs: Inputs) -> Call:
    """Return a replay of the forward call as a CUDA graph: the kernels without the launches."""
    call = forward(attention, inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        call()
    return recorded.replay


MODES: dict[str, Callable[[Attention, Inputs], Call]] = {
    "forward": forward,
    "forward+backward": forward_backward,
    "eager": forward,
    "graph": graph,
}


def measure(run: Run, case: Case, modes: Sequence[str]) -> None:
    """Measure every variant at one length and add the rows."""
    everyone = list(variants(case, run.choice))
    chosen = [x for x in everyone if x.longest is None or case.length <= x.longest]
    for variant in everyone:
        if variant not in chosen:
            for mode in modes:
                run.give_up(case, variant, mode, "skipped", f"not run beyond {variant.longest} tokens")
    try:
        inputs = case.inputs()
    except torch.cuda.OutOfMemoryError as error:
        for variant in chosen:
            run.give_up(case, variant, modes[0], "out of memory", f"inputs: {first_line(error)}")
        return
    prepared: list[tuple[Variant, Attention, float]] = []
    for variant in with_control(chosen):
        begin = time.monotonic()
        if not _affordable(run, case, variant, modes[0]):
            continue
        try:
            with variant.in_time():
                attention = variant.prepare()
            prepared.append((variant, attention, time.monotonic() - begin))
        except Exception as error:
            if not variant.optional:
                raise
            run.give_up(case, variant, modes[0], "unavailable", first_line(error))
    for mode in modes:
        _measure_mode(run, case, mode, inputs, prepared)


def _measure_mode(
    run: Run, case: Case, mode: str, inputs: Inputs, prepared: Sequence[tuple[Variant, Attention, float]]
) -> None:
    calls: dict[str, Call] = {}
    once: dict[str, float] = {}
    memory: dict[str, float | None] = {}
    for variant, attention, _ in prepared:
        if not _affordable(run, case, variant, mode):
            continue
        try:
            call = MODES[mode](attention, inputs)
            with variant.in_time():
                once[variant.name] = _warm_up(call, case.device)
            memory[variant.name] = _extra_memory(run, case, mode, variant, call)
            calls[variant.name] = call
        except Exception as error:
            too_large = isinstance(error, torch.cuda.OutOfMemoryError)
            if not (too_large or variant.optional or mode == "graph"):
                raise
            run.give_up(case, variant, mode, "out of memory" if too_large else "unavailable", first_line(error))
        timing.release()
    _drop_what_takes_too_long(run, case, mode, [variant for variant, _, _ in prepared], calls, once)
    repeats = {name: timing.repeats_for(once[name], case.device) for name in calls}
    samples = timing.interleave(calls, repeats, case.device, rounds=run.rounds)
    for variant, _, prepare_seconds in prepared:
        if seconds := samples.get(variant.name):
            run.add(
                case,
                variant.name,
                mode,
                "measured",
                median=statistics.median(seconds),
                seconds=seconds,
                extra_memory=memory[variant.name],
                prepare_seconds=prepare_seconds,
            )


def _affordable(run: Run, case: Case, variant: Variant, mode: str) -> bool:
    needed = (run.expected_seconds(case, variant, mode) or 0) * (run.rounds + 2)
    if needed < run.left():
        return True
    run.give_up(case, variant, mode, "skipped", "the budget is spent")
    return False


def _drop_what_takes_too_long(
    run: Run, case: Case, mode: str, chosen: Sequence[Variant], calls: dict[str, Call], once: dict[str, float]
) -> None:
    """Drop the control, then the slowest, until the rest fits into the budget."""
    order = sorted((x for x in chosen if x.name in calls), key=lambda x: (not x.is_control, -once[x.name]))
    for variant in order:
        seconds = sum(timing.sample_seconds(once[name], case.device) for name in calls) * run.rounds
        if seconds < run.left():
            return
        del calls[variant.name]
        run.give_up(case, variant, mode, "skipped", "the budget is spent")


def _warm_up(call: Call, device: str) -> float:
    """Run a call until it is compiled and its memory is there; return its seconds."""
    first = timing.time_call(call, 1, device)
    return first if device == "cpu" and first > 1 else timing.time_call(call, 1, device)


def _extra_memory(run: Run, case: Case, mode: str, variant: Variant, call: Call) -> float | None:
    if mode != "forward" or not run.memory or variant.is_control:
        return None
    if case.device == "cuda":
        extra: int | None = timing.peak_memory_cuda(call)
    else:
        extra = timing.peak_memory_cpu(prepare_call, case, run.choice, variant.name)
    return None if extra is None else extra / case.query_bytes()


def prepare_call(case: Case, choice: Choice, name: str) -> Call:
    """Return a variant's forward call, warmed up on a short case; for a process of its own."""

    def call_at(case: Case) -> Call:
        variant = next(x for x in variants(case, choice) if x.name == name)
        return forward(variant.prepare(), case.inputs())

    call_at(replace(case, length=256, queries=256))()
    return call_at(case)
