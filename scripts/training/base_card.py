"""The card of the shipped short model."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

CARD = """---
{{ card_data }}
---

# {{ name }}

A Llama of {{ "{:,}".format(parameters) }} parameters that continues Python source code. It exists to try attention
backends on: small enough to ship and to read long files on a laptop, trained on text that every machine with Python
has. It is not a coding assistant.

## Use

```python
import hf_dilated  # registers attn_implementation="dilated"
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("model_cards/{{ name }}")
model = AutoModelForCausalLM.from_pretrained("model_cards/{{ name }}", attn_implementation="dilated")
```

`python scripts/quickstart.py` reads long files with it, and measures what that costs and how well it works.

## Training

`python scripts/train_base.py --output model_cards/{{ name }}` on {{ device }} (torch {{ torch }}, Transformers
{{ transformers }}): {{ "{:,}".format(steps) }} steps of {{ "{:,}".format(tokens_per_step) }} tokens in
{{ "%.0f"|format(seconds) }} s, AdamW, learning rate {{ learning_rate }} with a cosine, bfloat16 autocast on a GPU,
weights stored in bfloat16. `training.jsonl` is the log.

- Text: the sources of {{ library }} as installed, {{ "{:,}".format(training_files) }} files with
  {{ "{:,}".format(training_tokens) }} tokens for training ({{ "%.1f"|format(epochs) }} epochs), and
  {{ "{:,}".format(held_out_files) }} files with {{ "{:,}".format(held_out_tokens) }} tokens held out. A file is held
  out when a hash of its relative path says so (`is_held_out`).
{% if lesson_share %}- Lessons: {{ "%.0f"|format(100 * lesson_share) }} % of the training tokens are made documents that
  state facts between lines of the training files and ask for them (`hf_dilated.tasks.lesson`). The epochs count the
  text alone.
{% endif -%}
- Documents are packed into rows of {{ "{:,}".format(length) }} tokens; attention does not cross from one document to
  the next.
- Architecture: {{ layers }} layers, hidden size {{ hidden }}, 8 query and 4 key-value heads, RoPE
  {%- if rope_theta %} of base {{ '{:,.0f}'.format(rope_theta) }}{% endif %}, tied embeddings,
  a byte-level BPE tokenizer of {{ "{:,}".format(vocabulary) }} tokens trained on the training files.
- The GPU kernels do not add in a fixed order, so a second run gives the same curve, not the same bits.

## Evaluation

Held-out files, {{ held_out_rows }} rows of {{ "{:,}".format(length) }} tokens, the stored bfloat16 weights: loss
{{ "%.3f"|format(held_out_loss) }} nats a token, perplexity {{ "%.2f"|format(held_out_perplexity) }},
{{ "%.3f"|format(bits_per_byte) }} bits a byte (training loss at the end: {{ "%.3f"|format(training_loss) }}).

| position in the row | perplexity |
|---|---|
{% for position, perplexity in by_position.items() %}| {{ position }} | {{ "%.2f"|format(perplexity) }} |
{% endfor %}
{% if long_documents %}{{ long_documents }}
{% endif %}
## Limits

- Made for {{ "{:,}".format(length) }} tokens. Beyond them it reads only as well as
  {% if long_documents %}measured above{% else %}`scripts/quickstart.py` measures{% endif %}.
{% if lesson_share %}- What it finds of facts, such as pass keys, is a trained skill: the lessons practise it.
{% endif -%}
- Knows the standard library's style and little else; what it writes is often wrong and never checked.
- Some held-out files have near relatives among the training files (a module and its tests), as in any library.

## Licence

The weights are under Apache-2.0. The training text is Python's standard library, under the PSF licence; none of it is
part of this folder.
"""


def read_summary(folder: Path) -> dict[str, Any]:
    """Return how the short model in this folder was trained and measured."""
    summary: dict[str, Any] = json.loads((folder / "training.jsonl").read_text("utf-8").splitlines()[-1])["summary"]
    return summary


def write_card(folder: Path, report: Path | None = None) -> None:
    """Write ``README.md`` from the summary in ``training.jsonl`` and the ``report.md`` of the quickstart."""
    data = ModelCardData(
        language="code", license="apache-2.0", library_name="transformers", pipeline_tag="text-generation",
        tags=["hf_dilated", "python"],
    )  # fmt: skip
    long_documents = report.read_text().strip() if report else ""
    values = {"name": folder.name, "long_documents": long_documents, **read_summary(folder)}
    card = ModelCard.from_template(data, template_str=CARD, **values)
    card.save(folder / "README.md")
