"""Checkpoints that were cut short are not gone on from."""

from pathlib import Path
from types import SimpleNamespace

from hf_dilated.training.checkpoints import CompleteCheckpointsMixin, last_complete_checkpoint


def test_the_newest_that_is_complete(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    for step, state in ((9, "{}"), (10, "{}"), (11, '{"global'), (12, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_the_state_waits_for_all_processes() -> None:
    done: list[str] = []

    class Base:
        accelerator = SimpleNamespace(wait_for_everyone=lambda: done.append("all"))

        def _save_rng_state(self, output_dir: str) -> None:
            done.append(output_dir)

    class Trainer(CompleteCheckpointsMixin, Base):
        pass

    Trainer()._save_rng_state("own")
    assert done == ["own", "all"]
