"""Long-context tasks made on the spot from any text: to test a model with, and to teach it with."""

from hf_dilated.tasks.haystack import Haystack
from hf_dilated.tasks.lessons import lesson
from hf_dilated.tasks.sample import Sample
from hf_dilated.tasks.suite import TASKS, common_words, needles, passkey, variables

__all__ = ["TASKS", "Haystack", "Sample", "common_words", "lesson", "needles", "passkey", "variables"]
