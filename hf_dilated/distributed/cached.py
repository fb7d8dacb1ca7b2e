"""Decoding with a cache whose prompt is spread over ranks: each attends with its part, and the parts merge."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_dilated.distributed.communication import Wire
from hf_dilated.distributed.layout import SequenceLayout
from hf_dilated.engine.decode import LastDocument, attend_last, slots_of
from hf_dilated.engine.op import with_sink
from hf_dilated.patterns import Pattern


@dataclass
class CachedSequence:
    """Where the keys of a rank's cache stand: its shard of the prompt, then every generated token.

    All ranks keep the generated tokens, which are few beside the prompt; the first rank attends to them.

    Attributes:
        wire: The ranks.
        prompt: (B, n) index within the row's last document of every slot of the shard, -1 for other slots.
        length: (B,) tokens of that document so far.
        generated: Tokens generated so far.
        longest: The most tokens of a row.
    """

    wire: Wire
    prompt: Tensor
    length: Tensor
    generated: int = 0
    longest: int = field(init=False)
    _slots: LastDocument | None = field(init=False, default=None)  # of this step; all layers share it

    def __post_init__(self) -> None:
        self.longest = int(self.length.max())

    @classmethod
    def of(cls, wire: Wire, layout: SequenceLayout, device: torch.device) -> "CachedSequence":
        """Describe the caches after the prompt was read."""
        everywhere = torch.stack([layout.last_document(rank).amax(1) for rank in range(layout.ranks)])
        return cls(wire, layout.last_document(wire.rank).to(device), (everywhere.amax(0) + 1).to(device))

    def append(self) -> None:
        """Count one more token, which all ranks are about to read."""
        self.generated += 1
        self.longest += 1
        self.length = self.length + 1
        self._slots = None

    def positions(self) -> Tensor:
        """(B, n + generated) index of every key that this rank attends to, -1 for the others."""
        number = torch.arange(self.generated, device=self.prompt.device) - self.generated
        tail = self.length[:, None] + number if self.wire.rank == 0 else number.expand(len(self.length), -1) * 0 - 1
        return torch.cat([self.prompt, tail], 1)

    def slots(self) -> LastDocument:
        """Where this rank's keys stand."""
        if self._slots is None:
            positions = self.positions()
            is_here = positions >= 0
            slots = slots_of(torch.where(is_here, positions, self.longest), self.longest)
            self._slots = LastDocument(self.length - 1, self.longest, is_here, slots)
        return self._slots

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, scale: float, sink_logits: Tensor | None
    ) -> Tensor:
        """Attend from the newest token, which all ranks have, to the keys of all ranks that the pattern sees.

        Args:
            query: (B, H, 1, D).
            key: (B, G, n + generated, D) of this rank's cache.
            value: (B, G, n + generated, Dv).
            pattern: Who attends to whom.
            scale: Factor of the scores.
            sink_logits: (H,) logits without a value, or None.

        Returns:
            Output (B, H, 1, Dv), the same on every rank.
        """
        output, lse = attend_last(query, key, value, self.slots(), pattern, scale)
        parts = self.wire.gather(torch.cat([output, lse[..., None]], -1)).wait()  # (P, B, H, 1, Dv + 1)
        lses = parts[..., -1]
        total = lses.logsumexp(0)  # -inf where no rank has a key that is seen
        merged = ((lses - torch.where(total.isinf(), 0, total)).exp()[..., None] * parts[..., :-1]).sum(0)
        return with_sink(merged.to(query.dtype), total, sink_logits)[0]


def chosen_logits(wire: Wire, layout: SequenceLayout, logits: Tensor) -> Tensor:
    """Bring the logits of every row's last token to all ranks.

    Args:
        wire: The ranks.
        layout: Of the prompt.
        logits: (B, K, V) of this rank's shard at the K slots of :func:`last_slots`.

    Returns:
        (B, V).
    """
    slots = last_slots(layout)
    column = torch.tensor([slots.index(slot) for _, slot in layout.last], device=logits.device)
    row = torch.arange(layout.rows, device=logits.device)
    everywhere = wire.gather(logits[row, column]).wait()
    return everywhere[torch.tensor([rank for rank, _ in layout.last], device=logits.device), row]


def last_slots(layout: SequenceLayout) -> list[int]:
    """The slots of shards that hold the last token of a row, on any rank."""
    return sorted({slot for _, slot in layout.last})
