"""Long documents from Python's standard library."""

from collections.abc import Mapping
from typing import Any

from hf_dilated.tasks import Haystack

HAYSTACK_CHARACTERS = 1 << 20
CHARACTERS_PER_TOKEN = 5  # more than any file has with the shipped tokenizer


def joined(texts: dict[str, str], characters: int) -> dict[str, str]:
    """Lay files end to end into documents of at least so many characters, named after their first file.

    What is left over at the end is dropped, unless it is all there is.

    Example:
        >>> joined({"a.py": "a = 1\\n", "b.py": "b = 2\\n", "c.py": "c = 3\\n"}, 10)
        {'a.py': 'a = 1\\nb = 2\\n'}
    """
    documents: dict[str, str] = {}
    name, text = "", ""
    for path, part in texts.items():
        name, text = name or path, text + part
        if len(text) >= characters:
            documents[name], name, text = text, "", ""
    return documents or {name: text}


def haystack(tokenizer: Any, texts: Mapping[str, str]) -> Haystack:
    """Return the first million characters of the texts, to hide things in."""
    return Haystack(tokenizer, "\n".join(texts.values())[:HAYSTACK_CHARACTERS])
