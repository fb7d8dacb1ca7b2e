"""The operators ``hf_dilated::attend`` and ``hf_dilated::attend_backward``: one node in a compiled graph.

Planning needs the positions of the keys on the host, so these operators read them there.
``hf_dilated::decode`` serves a single causal query and synchronises nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_dilated import patterns
from hf_dilated.engine import decode as decoding
from hf_dilated.engine import execute, kernels
from hf_dilated.engine.block_sparse import BlockSparse
from hf_dilated.engine.chosen import chosen_blocks, chosen_levels
from hf_dilated.engine.plan import Frame, Plan, make_plan, plan_levels
from hf_dilated.engine.streamed import wide
from hf_dilated.memory import BufferType, buffers
from hf_dilated.memory.bounded import bounded_cache
from hf_dilated.patterns.documents import Documents, Layout, layout_from_positions

LAYOUT_BYTES = 256 << 20


@contextmanager
def running(query: Tensor, memory: str = "") -> Iterator[None]:
    """Run on the query's device, where Triton launches, in the dtypes that came in, forward as backward.

    Autocast has done its work on the inputs. Inside it would round what one pass computes in float32, and the other
    not, since autograd runs outside of it.
    """
    device = query.device.type
    as_is = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    with torch.cuda.device_of(query), buffers.using(memory), as_is:
        yield


@torch.library.custom_op("hf_dilated::attend", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_positions: Tensor | None,
    sink_logits: Tensor | None,
    pattern: str,
    is_causal: bool,
    scale: float,
    memory: str = "",
) -> tuple[Tensor, Tensor]:
    """Attend along a pattern: output (B, H, N, Dv) and LSE (B, H, N); ``memory`` says where from to allocate."""
    with running(query, memory):
        query, key, value = _with_rows(query, key, value)
        batch = _Batch(query, key, key_positions, pattern, is_causal)
        q, k, v = batch.query(query), batch.key(key), batch.key(value)
        output, lse = batch.forward(q, k, v, scale)
        output, lse = batch.put_back(output, 0.0), batch.put_back(lse, -torch.inf).contiguous()
        return with_sink(output, lse, sink_logits)


@attend.register_fake
def _(query, key, value, key_positions, sink_logits, pattern, is_causal, scale, memory=""):  # type: ignore[no-untyped-def]
    B, H, N, _ = query.shape
    output = query.new_empty((B, N, H, value.shape[3])).transpose(1, 2)
    return output, query.new_empty((B, H, N), dtype=wide(query.dtype))


@torch.library.custom_op("hf_dilated::decode", mutates_args=())
def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_positions: Tensor | None,
    sink_logits: Tensor | None,
    pattern: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The same for one causal query, without gradients."""
    return decode_now(query, key, value, key_positions, sink_logits, patterns.parse(pattern), scale)


def decode_now(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_positions: Tensor | None,
    sink_logits: Tensor | None,
    pattern: patterns.Pattern,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """What the operator does, for tensors with nothing behind them: a call of an operator costs as much as a launch."""
    query, key, value = _with_rows(query, key, value)
    with running(query):
        output, lse = decoding.decode(query, key, value, key_positions, pattern, scale)
        return with_sink(output, lse, sink_logits)


@decode.register_fake
def _(query, key, value, key_positions, sink_logits, pattern, scale):  # type: ignore[no-untyped-def]
    B, H, N, _ = query.shape
    return query.new_empty((B, H, N, value.shape[3])), query.new_empty((B, H, N), dtype=wide(query.dtype))


@torch.library.custom_op("hf_dilated::attend_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    key_positions: Tensor | None,
    pattern: str,
    is_causal: bool,
    scale: float,
    memory: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`attend` by query, key and value."""
    with running(query, memory):
        grad, query, key, value = _with_rows(grad, query, key, value)
        batch = _Batch(query, key, key_positions, pattern, is_causal)
        q, k, v = batch.query(query), batch.key(key), batch.key(value)
        grads = batch.backward(batch.query(grad), q, k, v, batch.query(output), batch.query(lse), scale)
        return batch.put_back(grads[0], 0.0), batch.put_back_key(grads[1]), batch.put_back_key(grads[2])


@attend_backward.register_fake
def _(grad, query, key, value, output, lse, key_positions, pattern, is_causal, scale, memory=""):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (query, key, value))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, key_positions, sink_logits, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, key_positions, sink_logits, *output)


def _autograd_backward(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, key_positions, sink_logits, output, lse = ctx.saved_tensors
    grads = attend_backward(grad, query, key, value, output, lse, key_positions, *ctx.options)
    grad_sink = None if sink_logits is None else sink_gradient(sink_logits, grad, output, lse)
    return *grads, None, grad_sink, None, None, None, None


attend.register_autograd(_autograd_backward, setup_context=_setup_context)


def _with_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Kernels read rows of D neighbouring numbers; expanded gradients, for one, have none."""
    return tuple(x if x.stride(-1) == 1 else buffers.contiguous(BufferType.TEMP, x) for x in tensors)


def with_sink(output: Tensor, lse: Tensor, sink_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Let a learned logit per head take part in the softmax; it has no value."""
    if sink_logits is None:
        return output, lse
    total = torch.logaddexp(lse, sink_logits.to(lse.dtype)[:, None])
    share = (lse - total).exp().unsqueeze(-1)
    return buffers.scaled(BufferType.OUTPUT, output, share), total


def sink_gradient(sink_logits: Tensor, grad: Tensor, output: Tensor, lse: Tensor) -> Tensor:
    """Gradient of the logits of :func:`with_sink`; ``output`` and ``lse`` are what it returned."""
    weight = (sink_logits.to(lse.dtype)[:, None] - lse).exp()
    delta = (grad.to(lse.dtype) * output).sum(-1)
    return -(weight * delta).sum((0, 2)).to(sink_logits.dtype)


class _Batch:
    """A call's documents; tokens are brought together first where padding lies inside a document."""

    def __init__(self, query: Tensor, key: Tensor, key_positions: Tensor | None, pattern: str, is_causal: bool) -> None:
        self.shape = (*query.shape[:3:2], key.shape[2])
        if key_positions is None:
            self.layout = Layout(Documents.whole_rows(*self.shape))
        else:
            host = key_positions.cpu().numpy()
            self.layout = _layout(host.tobytes(), host.dtype, host.shape, query.shape[2])
        self.pattern = patterns.parse(pattern)
        self.is_causal = is_causal

        self.documents = self.layout.documents

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        call = BlockSparse.of(self.pattern, self.documents, self.is_causal, q)
        if call is None:
            return execute.forward(self.plan(q, k, v), q, k, v, scale)
        return call.forward(q, k, v, scale)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, scale: float
    ) -> kernels.Gradients:
        tensors = grad, q, k, v, output, lse, scale
        call = BlockSparse.of(self.pattern, self.documents, self.is_causal, q)
        if call is None:
            return execute.backward(self.plan(q, k, v), *tensors)
        return call.backward(*tensors)

    def plan(self, query: Tensor, key: Tensor, value: Tensor) -> Plan:
        packs = kernels.choose_packed(kernels.Case.of(query, value)) is not None
        plan = make_plan(self.pattern, self.documents, query.shape[1], key.shape[1], self.is_causal, packs)
        return self.with_chosen(plan, query, key, value)

    def with_chosen(self, plan: Plan, query: Tensor, key: Tensor, value: Tensor) -> Plan:
        """Add the blocks that tokens choose by their content."""
        if not isinstance(self.pattern, patterns.BlockSparsePattern) or not self.pattern.chosen_blocks:
            return plan
        packs = kernels.choose_packed(kernels.Case.of(query, value)) is not None
        chosen = chosen_blocks(self.pattern, self.documents, self.is_causal, query, key)
        levels = chosen_levels(self.documents, chosen, self.pattern.config.block_size, key.shape[1])
        frame = Frame(self.documents.rows, self.documents.queries, self.documents.keys, recurs=False)
        repeats = query.shape[1] // key.shape[1]
        return Plan(plan.calls + plan_levels(levels, frame, repeats, packs, goes_on=bool(plan.calls)).calls)

    def query(self, x: Tensor) -> Tensor:
        """Bring the real queries of (B, H, N, …) together as (1, H, T, …)."""
        return _bring_together(x, self.layout.query_index)

    def key(self, x: Tensor) -> Tensor:
        """Bring the real keys of (B, G, M, …) together as (1, G, T, …)."""
        return _bring_together(x, self.layout.key_index)

    def put_back(self, x: Tensor, padding: float) -> Tensor:
        """Spread (1, H, T, …) over (B, H, N, …)."""
        return _spread(x, self.layout.query_index, self.shape[0], self.shape[1], padding)

    def put_back_key(self, x: Tensor) -> Tensor:
        """Spread (1, G, T, …) over (B, G, M, …)."""
        return _spread(x, self.layout.key_index, self.shape[0], self.shape[2], 0.0)


@bounded_cache(LAYOUT_BYTES, most=8)
def _layout(positions: bytes, dtype: np.dtype[Any], shape: tuple[int, int], queries: int) -> Layout:
    """Layers share a layout; positions are compared by value, since buffers of a compiled graph are reused."""
    return layout_from_positions(np.frombuffer(positions, dtype).reshape(shape).astype(np.int64), queries)


def _bring_together(x: Tensor, index: Any) -> Tensor:
    if index is None:
        return x
    row, slot = (torch.from_numpy(i).to(x.device) for i in divmod(index, x.shape[2]))
    return buffers.gathered(x.transpose(1, 2), (row, slot)).transpose(0, 1).unsqueeze(0)


def _spread(x: Tensor, index: Any, rows: int, length: int, padding: float) -> Tensor:
    if index is None:
        return x
    shape = (rows * length, x.shape[1], *x.shape[3:])
    spread = buffers.full(BufferType.OUTPUT, shape, padding, x.dtype, x.device)
    spread[torch.from_numpy(index).to(x.device)] = x[0].transpose(0, 1)
    return spread.unflatten(0, (rows, length)).transpose(1, 2)
