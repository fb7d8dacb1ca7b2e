"""Stopping in time: a machine that is taken away takes nothing with it."""

from time import monotonic
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

EXIT_CODE = 75  # "try again": the same command goes on


class OutOfTime(Exception):
    """The time is over; everything so far is on disk."""


class Deadline(TrainerCallback):
    """Ends a training with a checkpoint when the time is over.

    Args:
        minutes: From now on; None for no end.
    """

    def __init__(self, minutes: float | None) -> None:
        self.end = float("inf") if minutes is None else monotonic() + 60 * minutes

    def check(self) -> None:
        """Stop here if the time is over.

        Raises:
            OutOfTime: Then.
        """
        if monotonic() >= self.end:
            raise OutOfTime

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> TrainerControl:
        """Ask for a checkpoint when the time is over."""
        control.should_save = control.should_save or monotonic() >= self.end
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Stop behind a checkpoint, unless it was the last step."""
        if state.global_step < state.max_steps:
            self.check()
