"""Ring attention against the oracle: outputs and gradients, in processes that talk over gloo."""

import functools
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hf_dilated import BlockSparseConfig, DilatedConfig, reference
from hf_dilated.config import RingConfig
from hf_dilated.distributed import layout as layouts
from hf_dilated.distributed.layout import SequenceLayout
from hf_dilated.distributed.ring import ring_attention
from hf_dilated.memory import auto_configure_memory_pool
from hf_dilated.patterns import BlockSparsePattern, DensePattern, DilatedPattern
from tests.distributed.processes import divided, run_on_ranks

CASES = 60
TOLERANCE = 1e-11
POOLED = auto_configure_memory_pool(8192, "ring", smallest=1).spec


@dataclass
class Case:
    """A problem that every rank draws alike from its seed."""

    seed: int

    def __post_init__(self) -> None:
        draw = random.Random(self.seed)
        self.draw = draw
        torch.manual_seed(self.seed)
        self.kv_heads, repeats = draw.choice([1, 2, 4]), draw.choice([1, 2, 3])
        self.heads = self.kv_heads * repeats
        self.rows, self.length = draw.choice([1, 1, 2, 3]), draw.choice([1, 2, 5, 16, 33, 64, 90])
        self.is_causal = draw.random() < 0.7
        self.kind = draw.choice(["zigzag", "contiguous"])
        self.shortest = draw.choice([1, 2, 128])
        self.transport = draw.choice(["auto", "gather", "exchange", "rows", "heads"])
        self.options: dict[str, Any] = {}
        if draw.random() < 0.4:
            self.options["attention_mask"] = self._padding()
        if draw.random() < 0.5:
            self.options["position_ids"] = self._packing()
        self.pattern = self._pattern()
        size, value_size = 4, draw.choice([4, 4, 3])
        shapes = ((self.heads, size), (self.kv_heads, size), (self.kv_heads, value_size))
        self.inputs = [torch.randn(self.rows, h, self.length, d, dtype=torch.float64) for h, d in shapes]
        self.grad = torch.randn(self.rows, self.heads, self.length, value_size, dtype=torch.float64)

    def _padding(self) -> torch.Tensor:
        match self.draw.choice(["left", "right", "scattered", "a row"]):
            case "scattered":
                return torch.rand(self.rows, self.length) < 0.7
            case "a row":
                mask = torch.ones(self.rows, self.length, dtype=torch.bool)
                mask[0] = False
                return mask
            case side:
                cut = torch.tensor([[self.draw.randint(0, self.length)] for _ in range(self.rows)])
                place = torch.arange(self.length)
                return place >= cut if side == "left" else place < cut

    def _packing(self) -> torch.Tensor:
        ids = torch.arange(self.length).repeat(self.rows, 1)
        for row in range(self.rows):
            for _ in range(self.draw.randint(0, 4)):
                start = self.draw.randrange(self.length)
                ids[row, start:] = torch.arange(self.length - start)
        return ids

    def _pattern(self) -> Any:
        match self.draw.choice(["dense", "dense", "window", "dilated", "dilated", "blocks"]):
            case "dense":
                return DensePattern()
            case "window":
                return DensePattern(window=self.draw.choice([1, 3, 8, 40]))
            case "blocks":
                parts = {"local_blocks": self.draw.randint(1, 3), "global_blocks": self.draw.randint(0, 1)}
                parts |= {"stride_blocks": self.draw.choice([0, 3]), "random_blocks": self.draw.choice([0, 2])}
                config = BlockSparseConfig(block_size=self.draw.choice([1, 4, 16]), **parts)
                return BlockSparsePattern(config=config, layer=self.draw.randint(0, 3))
        config = DilatedConfig(
            segment_lengths=self.draw.choice([(4, 8, 32), (8, 16, 64), (2, 16, 128)]),
            dilation_rates=self.draw.choice([(1, 2, 4), (1, 1, 2), (1, 2, 2)]),
            offset=self.draw.choice(["head", "kv_head"]),
            overlap=self.draw.choice(["once", "count"]),
            sink_tokens=self.draw.choice([0, 0, 1, 3]),
            phase=self.draw.choice(["none", "alternate"]),
            rotate=self.draw.random() < 0.5,
        )
        return DilatedPattern(config=config, layer=self.draw.randint(0, 3))

    def expected(self) -> list[torch.Tensor]:
        """Output, LSE and gradients by the definition, for the whole batch."""
        inputs = [x.clone().requires_grad_() for x in self.inputs]
        if not isinstance(self.pattern, DensePattern):
            is_dilated = isinstance(self.pattern, DilatedPattern)
            oracle = reference.dilated_attention if is_dilated else reference.block_sparse_attention
            output, lse = oracle(
                *inputs, self.pattern.config, is_causal=self.is_causal, layer=self.pattern.layer, return_lse=True,
                **self.options,
            )  # fmt: skip
        else:
            output, lse = windowed(*inputs, self.pattern.window, self.is_causal, self.options)
        return [output.detach(), lse.detach(), *torch.autograd.grad(output, inputs, self.grad)]


def windowed(q: Any, k: Any, v: Any, window: int | None, is_causal: bool, options: Any) -> tuple[Any, Any]:
    """Dense and windowed attention by its definition."""
    rows, heads, length, size = q.shape
    positions = reference.positions(rows, length, length, options.get("attention_mask"), options.get("position_ids"))
    document = (positions == 0).cumsum(1)
    p_i, p_j = positions[:, :, None], positions[:, None, :]
    sees = (p_i >= 0) & (p_j >= 0) & (document[:, :, None] == document[:, None, :])
    sees &= (p_j <= p_i) | (not is_causal)
    sees &= (p_i - p_j).abs() < (length if window is None else window)
    k, v = (x.repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) / size**0.5).masked_fill(~sees[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.where(sees[:, None], (scores - torch.where(lse.isinf(), 0, lse)[..., None]).exp(), 0)
    return weights @ v, lse


def shards_of(case: Case, layout: SequenceLayout, rank: int) -> list[torch.Tensor]:
    """A rank's inputs, spoiled where there is no token, and the gradient of its output."""
    inputs = [layout.shard(x.transpose(1, 2), rank, float("nan")).transpose(1, 2) for x in case.inputs]
    return [*inputs, layout.shard(case.grad.transpose(1, 2), rank).transpose(1, 2)]


def differences(
    case: Case, layout: SequenceLayout, rank: int, found: list[torch.Tensor], expected: list[torch.Tensor]
) -> list[str]:
    """Hold a rank's output, LSE and gradients against those of the whole batch."""
    wrong, real = [], layout.columns(rank) >= 0
    for name, got, want in zip(("output", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        want = want.unsqueeze(-1) if name == "lse" else want
        want = layout.shard(want.transpose(1, 2), rank, -torch.inf if name == "lse" else 0.0).transpose(1, 2)
        if name == "lse":
            want = torch.where(real[:, None, :, None], want, -torch.inf)
            got, want = got.unsqueeze(-1).clamp(min=-1e9), want.clamp(min=-1e9)
        off = ((got - want).abs().max() / want.abs().max().clamp(min=1)).item() if got.numel() else 0.0
        if not off <= TOLERANCE:
            wrong.append(
                f"{case}: {name} is off by {off:.1e} on rank {rank}; {case.pattern} {case.kind} {case.options}"
            )
    return wrong


def check_cases(rank: int, ranks: int, seeds: list[int]) -> list[str]:
    """Hold every case against the oracle; return what differs."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN: what nobody wrote, nobody may read
    expected = divided(seeds, lambda seed: Case(seed).expected())
    wrong = []
    for number, seed in enumerate(seeds):
        case = Case(seed)
        layouts.SHORTEST_PIECE = case.shortest
        transport = case.transport
        if transport == "heads" and case.kv_heads % ranks:
            transport = "exchange"
        layout = SequenceLayout.of((case.rows, case.length), ranks, kind=case.kind, **case.options)
        *inputs, grad = shards_of(case, layout, rank)
        if transport == "heads":
            inputs = [x.nan_to_num(7.0) for x in inputs]
        inputs = [x.requires_grad_() for x in inputs]
        output, lse = ring_attention(
            *inputs, layout, group=dist.group.WORLD, pattern=case.pattern, is_causal=case.is_causal,
            config=RingConfig(transport=transport), return_lse=True, memory=POOLED if number % 2 else "",
        )  # fmt: skip
        found = [output.detach(), lse, *torch.autograd.grad(output, inputs, grad)]
        wrong += [f"{transport} {line}" for line in differences(case, layout, rank, found, expected[seed])]
    return wrong


@pytest.mark.timeout(180)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_equals_the_oracle(ranks: int) -> None:
    seeds = list(range(1000 * ranks, 1000 * ranks + (CASES // 3 if ranks in (1, 8) else CASES)))
    for rank, wrong in enumerate(run_on_ranks(ranks, check_cases, ranks, seeds)):
        assert wrong == [], f"rank {rank}"


def errors_in_bfloat16(rank: int, ranks: int) -> list[float]:
    """Relative errors of output and gradients with each transport, and of flash attention on one device."""
    torch.manual_seed(0)
    length, heads = 1024, (4, 2, 2)
    whole = [torch.randn(1, length, h, 32).bfloat16().transpose(1, 2) for h in (*heads, 4)]
    layout = SequenceLayout.of((1, length), ranks)

    def gradients(attend: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        output = attend(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, inputs[3])]

    def flash(q: Any, k: Any, v: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    exact, on_one = gradients(flash, [x.double() for x in whole]), gradients(flash, whole)
    found = [on_one]
    for transport in ("gather", "exchange"):
        config = RingConfig(transport=transport)
        run = functools.partial(ring_attention, layout=layout, group=dist.group.WORLD, config=config)
        shards = gradients(run, [layout.shard(x.transpose(1, 2), rank).transpose(1, 2) for x in whole])
        parts = [torch.empty(ranks, *x.shape, dtype=x.dtype) for x in shards]
        for x, part in zip(shards, parts, strict=True):
            dist.all_gather(list(part), x.contiguous())
        found.append([layout.unshard(part.transpose(2, 3)).transpose(1, 2) for part in parts])
    return [
        max(((x.double() - y).norm() / y.norm()).item() for x, y in zip(results, exact, strict=True))
        for results in found
    ]


@pytest.mark.timeout(100)
def test_bfloat16_errors_do_not_grow_with_the_ranks() -> None:
    errors = {ranks: run_on_ranks(ranks, errors_in_bfloat16, ranks)[0] for ranks in (2, 4)}
    for ranks, (flash, *ring) in errors.items():
        assert max(ring) < 2.5 * flash, f"{ranks} ranks: {ring}, {flash} on one device"
        assert max(ring) < 1.1 * max(errors[2][1:]), f"{ranks} ranks: {ring}, two: {errors[2]}"
