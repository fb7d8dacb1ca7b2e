"""Teach a checkpoint to read longer documents than it was made for.

    python scripts/train_long_context.py --model model_cards/pystdlib-4m --dataset docs --files "*.md" \
        --max_length 4096 --max_steps 20 --output_dir outputs/long
    python scripts/train_long_context.py --model Qwen/Qwen3-0.6B --dataset HuggingFaceFW/fineweb-edu \
        --max_length 131072 --lora_rank 16 --bf16 --gradient_checkpointing --max_steps 500 --output_dir outputs/qwen
    accelerate launch --config_file scripts/accelerate/gpu8.yaml scripts/train_long_context.py … the same …

Every option of Transformers' ``TrainingArguments`` works. The same command goes on after a kill from the last
checkpoint that is complete. docs/training.md explains the recipe.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from training.library import HAYSTACK_CHARACTERS, haystack
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import hf_dilated  # noqa: F401  (registers the backends)
from hf_dilated.integration.persistence import stored_config
from hf_dilated.integration.reach import reach_of
from hf_dilated.patching.configuration import patch_config
from hf_dilated.patching.rope import extend
from hf_dilated.tasks import Haystack, lesson
from hf_dilated.training.checkpoints import CompleteCheckpointsMixin, RowsPerStep, last_complete_checkpoint
from hf_dilated.training.curriculum import LengthCurriculum
from hf_dilated.training.documents import stream_texts, tokenized
from hf_dilated.training.lora import long_lora
from hf_dilated.training.packing import Documents, PackedRows
from hf_dilated.training.sequence_parallel import SequenceParallelTrainerMixin
from hf_dilated.training.sharded import ShardedTrainerMixin
from hf_dilated.training.throughput import ThroughputMixin


@dataclass(kw_only=True)
class ModelArguments:
    """What is trained."""

    model: str = field(metadata={"help": "A causal language model: a folder or a name on the Hub."})
    max_length: int = field(metadata={"help": "Tokens in a row, and the longest document afterwards."})
    attention: str = field(default="dilated", metadata={"help": "A backend of this package, or sdpa for dense."})
    pattern: str | None = field(
        default=None, metadata={"help": "JSON of the backend's pattern; by default the one that suits max_length."}
    )
    rope_scaling: str | None = field(
        default=None, metadata={"help": "yarn (default), linear, dynamic, or JSON of Transformers' rope_parameters."}
    )
    lora_rank: int = field(default=0, metadata={"help": "Train adapters of this rank, norms and embeddings; 0: all."})
    sequence_parallel_size: int = field(
        default=1, metadata={"help": "Processes that share each row; needs a ring backend. 1: each has its own."}
    )
    dtype: str = field(default="auto", metadata={"help": "Of the weights; float32 for full training is safest."})


@dataclass(kw_only=True)
class DataArguments:
    """What it reads."""

    dataset: str = field(metadata={"help": "A folder, a file, or a dataset's name on the Hub; it is streamed."})
    files: str = field(default="**/*", metadata={"help": "Which files of a folder."})
    subset: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    split: str = field(default="train", metadata={"help": "Of a dataset on the Hub."})
    column: str = field(default="text", metadata={"help": "Where a dataset keeps its texts."})
    curriculum: str | None = field(
        default=None, metadata={"help": "Longest documents and shares of the steps: 2048:0.25,8192:0.25,32768:0.5."}
    )
    lesson_share: float = field(
        default=0.0, metadata={"help": "Share of the tokens in made documents that ask for something far away."}
    )


class LongContextTrainer(
    ThroughputMixin, SequenceParallelTrainerMixin, ShardedTrainerMixin, CompleteCheckpointsMixin, Trainer
):
    """``Trainer`` whose processes may share sequences and weights, with throughput and memory in its log."""


def load_model(arguments: ModelArguments) -> Any:
    """Load the model with its backend, reaching ``max_length``.

    A checkpoint that has a backend already is taken as it is.

    Raises:
        ValueError: If options contradict what the checkpoint holds, or cannot be met.
    """
    config = AutoConfig.from_pretrained(arguments.model)
    scaling = _parsed(arguments.rope_scaling)
    if stored_config(config).attn_implementation is not None:
        _check_is_met(config, arguments)
    elif arguments.attention == "sdpa":
        extend(config.get_text_config(), arguments.max_length, scaling)
        config._attn_implementation = "sdpa"
    else:
        patch_config(
            config,
            backend=arguments.attention,
            attention=_parsed(arguments.pattern),
            max_position_embeddings=arguments.max_length,
            rope_scaling=scaling,
        )
    if arguments.lora_rank and config.get_text_config().tie_word_embeddings:
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # see ShardedTrainerMixin
    return AutoModelForCausalLM.from_pretrained(arguments.model, config=config, dtype=arguments.dtype)


def _check_is_met(config: Any, arguments: ModelArguments) -> None:
    stored, reach = stored_config(config), reach_of(config)
    if arguments.attention != stored.attn_implementation or arguments.pattern or arguments.rope_scaling:
        raise ValueError(
            f"{arguments.model} runs {stored.attn_implementation!r} already: leave out pattern and rope_scaling and "
            f"pass --attention {stored.attn_implementation}, or start from the dense checkpoint"
        )
    if reach is not None and reach < arguments.max_length:
        raise ValueError(f"max_length: {arguments.model} is patched for {reach:,} tokens; start from the dense one")


def _parsed(option: str | None) -> Any:
    return json.loads(option) if option and option.lstrip().startswith("{") else option


def make_rows(
    documents: Documents,
    arguments: TrainingArguments,
    *,
    length: int,
    curriculum: str | None = None,
    haystack: Haystack | None = None,
    lesson_share: float = 0.0,
    sequence_parallel_size: int = 1,
) -> PackedRows:
    """Return as many packed rows as the training takes; ``haystack`` is the text between the facts of lessons."""
    readers = arguments.world_size // sequence_parallel_size
    per_step = arguments.train_batch_size * readers * arguments.gradient_accumulation_steps
    return PackedRows(
        documents,
        length=length,
        rows=arguments.max_steps * per_step,
        curriculum=LengthCurriculum.parse(curriculum) if curriculum else None,
        lesson=partial(lesson, haystack) if haystack else None,
        lesson_share=lesson_share,
        seed=arguments.data_seed if arguments.data_seed is not None else arguments.seed,
    )


def make_trainer(
    model: Any,
    tokenizer: Any,
    rows: PackedRows,
    arguments: TrainingArguments,
    *,
    sequence_parallel_size: int = 1,
    callbacks: Sequence[TrainerCallback] = (),
) -> LongContextTrainer:
    """Return the trainer; ``trainer.train()`` trains ``model`` in place."""
    if sequence_parallel_size > 1:
        arguments.accelerator_config.dispatch_batches = False  # every process reads all rows and takes its own
    return LongContextTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=[RowsPerStep(rows.rows // arguments.max_steps), *callbacks],
        sequence_parallel_size=sequence_parallel_size,
    )


def run(
    model_arguments: ModelArguments,
    data: DataArguments,
    arguments: TrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Train, and save the model (with adapters merged into it) to ``output_dir``."""
    if arguments.max_steps <= 0:
        raise ValueError("max_steps: streams have no end; say how many steps to take with --max_steps")
    sharing = model_arguments.sequence_parallel_size
    if sharing < 1 or arguments.world_size % sharing:
        raise ValueError(f"sequence_parallel_size: {sharing} does not divide {arguments.world_size} processes")
    set_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_arguments.model)
    model = load_model(model_arguments)
    use_cache = getattr(model.config, "use_cache", None)
    if model_arguments.lora_rank:
        from peft import get_peft_model

        model = get_peft_model(model, long_lora(model, rank=model_arguments.lora_rank))
    texts = stream_texts(
        data.dataset, files=data.files, split=data.split, **({"name": data.subset} if data.subset else {})
    )
    rows = make_rows(
        tokenized(texts, tokenizer, column=data.column, seed=arguments.seed),
        arguments,
        length=model_arguments.max_length,
        curriculum=data.curriculum,
        haystack=_haystack(texts, tokenizer, data.column) if data.lesson_share else None,
        lesson_share=data.lesson_share,
        sequence_parallel_size=sharing,
    )
    trainer = make_trainer(model, tokenizer, rows, arguments, sequence_parallel_size=sharing, callbacks=callbacks)
    checkpoint = arguments.resume_from_checkpoint or last_complete_checkpoint(Path(arguments.output_dir))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if model_arguments.lora_rank:
        trainer.model = trainer.model.merge_and_unload()
    if use_cache is not None:
        trainer.model.config.use_cache = use_cache  # `Trainer` switches it off
    trainer.save_model()
    trainer.save_state()


def _haystack(texts: Any, tokenizer: Any, column: str) -> Haystack:
    """The first texts, as many as are used."""
    parts: dict[str, str] = {}
    for number, example in enumerate(texts):
        parts[str(number)] = example[column]
        if sum(map(len, parts.values())) >= HAYSTACK_CHARACTERS:
            break
    return haystack(tokenizer, parts)


def main() -> None:
    """Parse the command line and train."""
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model, data, arguments = parser.parse_args_into_dataclasses()
    try:
        run(model, data, arguments)
    except (StrictDataclassError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
