"""Model cards: what a checkpoint runs, how it was made, and what was measured.

Example:
    >>> from hf_dilated.cards import make_card
    >>> print(make_card("model_cards/pystdlib-4m", limits=["Not a coding assistant."]).data.tags)
    Traceback (most recent call last):
    ...
    hf_dilated.cards.card.CardError: model_cards/pystdlib-4m: holds no backend of hf_dilated; patch it first
"""

from hf_dilated.cards.card import CardError, make_card, write_card
from hf_dilated.cards.training import Training

__all__ = ["CardError", "Training", "make_card", "write_card"]
