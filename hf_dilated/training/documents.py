"""Where documents come from: the Hub, or files at hand, read as a stream."""

from array import array
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}  # of everything else a file is a document
SHUFFLED_AT_ONCE = 1000
REMEMBERED_TOKENS = 1 << 24  # a corpus that is read many times is tokenised once
OF_A_DOCUMENT = 64  # tokens as large as what else is remembered of it


def stream_texts(source: str, *, files: str = "**/*", split: str = "train", **options: Any) -> Any:
    """Open a streaming dataset of texts with 🤗 Datasets; nothing is downloaded or read as a whole.

    Args:
        source: A folder, a file (text, ``.jsonl``, ``.json`` or ``.parquet``) or a dataset's name on the Hub.
        files: Which files of a folder; every text file is one document.
        split: Of a dataset on the Hub.
        options: Passed to ``datasets.load_dataset``, for example ``name="sample-10BT"``.

    Raises:
        ValueError: If a folder holds no such file, or files of several kinds.
    """
    from datasets import load_dataset

    path = Path(source)
    if not path.exists():
        return load_dataset(source, split=split, streaming=True, **options)
    found = sorted(file for file in path.glob(files) if file.is_file()) if path.is_dir() else [path]
    builders = {BUILDERS.get(file.suffix, "text") for file in found}
    if len(builders) != 1:
        what = f"files of several kinds ({', '.join(sorted(builders))})" if builders else "no file"
        raise ValueError(f"{source}: {files!r} finds {what}; choose others")
    builder = builders.pop()
    if builder == "text":
        options |= {"sample_by": "document"}
    return load_dataset(builder, data_files=[str(file) for file in found], split="train", streaming=True, **options)


def tokenized(
    texts: Any, tokenizer: Any, *, column: str = "text", seed: int = 0
) -> Callable[[int], Iterator[list[int]]]:
    """Return the documents of an epoch in tokens, in another order each time, for ``PackedRows``.

    A document ends with the tokenizer's end-of-text token, and begins as the tokenizer lets texts begin. The first
    16M tokens, fewer where documents are short, are remembered for further epochs.

    Args:
        texts: A streaming dataset.
        tokenizer: A tokenizer of Transformers.
        column: Where the dataset keeps its texts.
        seed: Of the order.
    """
    encode = _remembering(partial(_encode, tokenizer))

    def epoch(number: int) -> Iterator[list[int]]:
        shuffled = texts.shuffle(seed=seed, buffer_size=SHUFFLED_AT_ONCE)
        shuffled.set_epoch(number)
        for batch in shuffled.iter(batch_size=1):  # plain iteration takes another order in a worker of a data loader
            if column not in batch:
                raise ValueError(f"column: {column!r} is not one of {', '.join(batch)}")
            if not isinstance(text := batch[column][0], str):
                raise ValueError(f"column: {column!r} holds {type(text).__name__}, not text")
            yield encode(text)

    return epoch


def _encode(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer(text, verbose=False).input_ids
    end = tokenizer.eos_token_id
    return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]


def _remembering(encode: Callable[[str], list[int]]) -> Callable[[str], list[int]]:
    """Let ``encode`` remember its first results, as many as there is room for."""
    known: dict[bytes, array[int]] = {}
    room = REMEMBERED_TOKENS

    def remember(text: str) -> list[int]:
        nonlocal room
        key = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key in known:
            return known[key].tolist()
        tokens = encode(text)
        if len(tokens) + OF_A_DOCUMENT <= room:
            known[key] = array("i", tokens)
            room -= len(tokens) + OF_A_DOCUMENT
        return tokens

    return remember
