"""One dense partial attention on the best stock kernel of the device.

Shapes: query and output gradient (n, H, N, D), key and value (n, G, M, D), LSE (n, H, N), ``H`` a multiple of
``G``. Causal partials are square. The backward pass takes the *global* output and LSE of its queries, which
makes the sum over partials the exact gradient (FlashAttention-2, arXiv:2307.08691, algorithm 2).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

aten = torch.ops.aten
Gradients = tuple[Tensor, Tensor, Tensor]
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """What decides whether a kernel can run."""

    device: str
    capability: tuple[int, int]
    dtype: torch.dtype
    head_size: int
    value_size: int
    deterministic: bool
    recurs: bool = False

    @classmethod
    def of(cls, query: Tensor, value: Tensor, *, recurs: bool = False) -> "Case":
        """Describe a call; ``recurs`` says that calls of the same shape are likely to follow."""
        capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else (0, 0)
        deterministic = torch.are_deterministic_algorithms_enabled()
        sizes = query.shape[-1], value.shape[-1]
        return cls(query.device.type, capability, query.dtype, *sizes, deterministic, recurs)


@dataclass(frozen=True)
class Kernel:
    """A stock attention kernel.

    Attributes:
        name: How reports call it.
        refuses: Returns why a case cannot run, or None if it can.
        forward: ``(query, key, value, is_causal, scale) -> (output, lse)``.
        backward: ``(grad_output, query, key, value, output, lse, is_causal, scale) -> gradients``.
    """

    name: str
    refuses: Callable[[Case], str | None]
    forward: Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], Gradients]


@lru_cache(maxsize=256)
def choose(case: Case) -> Kernel:
    """Return the first kernel of :data:`KERNELS` that can run a case."""
    return next(kernel for kernel in KERNELS if kernel.refuses(case) is None)


def explain(case: Case) -> list[tuple[str, str | None]]:
    """List every kernel, in order of preference, with the reason for which it is skipped.

    Example:
        >>> case = Case("cpu", (0, 0), torch.float32, 64, 64, deterministic=False)
        >>> [name for name, reason in explain(case) if reason is None]
        ['cpu_flash', 'math']
    """
    return [(kernel.name, kernel.refuses(case)) for kernel in KERNELS]


def _one_of(case: Case, *, device: str, dtypes: tuple[torch.dtype, ...], multiple: int, largest: int) -> str | None:
    if case.device != device:
        return f"needs {device}, the tensors are on {case.device}"
    if case.dtype not in dtypes:
        return f"does not support {case.dtype}"
    for size in (case.head_size, case.value_size):
        if size % multiple or size > largest:
            return f"needs head sizes that are multiples of {multiple} up to {largest}, got {size}"
    return None


def _same_sizes(case: Case) -> str | None:
    if case.head_size != case.value_size:
        return f"needs equal head sizes, got {case.head_size} for keys and {case.value_size} for values"
    return None


def _no_seed(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=like.device)


def _cudnn_refuses(case: Case) -> str | None:
    if case.deterministic:
        return "its backward pass is not deterministic"
    if not case.recurs:
        return "compiles for every new shape (0.04 s forward, 0.05 s backward), and this one is unlikely to recur"
    if case.device == "cuda" and case.capability < (8, 0):
        return f"needs compute capability 8.0, this GPU has {case.capability[0]}.{case.capability[1]}"
    largest = 256 if case.capability[0] == 9 else 128
    return _one_of(case, device="cuda", dtypes=HALF, multiple=8, largest=largest)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    output, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, is_causal, False, scale=scale)
    return output, lse.view(output.shape[:-1])


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> Gradients:
    seed = _no_seed(q)
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, output, lse.contiguous().unsqueeze(-1), seed, seed, None, None, None,
        q.shape[2], k.shape[2], 0.0, is_causal, scale=scale,
    )  # fmt: skip


def _flash_refuses(case: Case) -> str | None:
    if case.device == "cuda" and case.capability < (8, 0):
        return f"needs compute capability 8.0, this GPU has {case.capability[0]}.{case.capability[1]}"
    return _one_of(case, device="cuda", dtypes=HALF, multiple=8, largest=256) or _same_sizes(case)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    output, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)
    return output, lse


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> Gradients:
    seed = _no_seed(q)
    return aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, output, lse.contiguous(), None, None,
        q.shape[2], k.shape[2], 0.0, is_causal, seed, seed, scale=scale,
    )  # fmt: skip


def _efficient_refuses(case: Case) -> str | None:
    if case.deterministic:
        return "its backward pass is not deterministic"
    multiple = 8 if case.dtype in HALF else 4
    return _one_of(case, device="cuda", dtypes=(*HALF, torch.float32), multiple=multiple, largest=1 << 16)


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    k, v = _per_query_head(k, q), _per_query_head(v, q)
    output, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, is_causal, scale=scale)
    return output, lse[..., : q.shape[2]]


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> Gradients:
    seed, kv_heads = _no_seed(q), k.shape[1]
    k, v = _per_query_head(k, q), _per_query_head(v, q)
    output = output.transpose(1, 2).contiguous().transpose(1, 2)  # the kernel takes rows to lie side by side
    grad_q, grad_k, grad_v, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, output, _padded_to_32(lse), seed, seed, 0.0, [True, True, True, False], is_causal,
        scale=scale,
    )  # fmt: skip
    return grad_q, _per_key_head(grad_k, kv_heads), _per_key_head(grad_v, kv_heads)


def _padded_to_32(lse: Tensor) -> Tensor:
    """As the efficient kernel wants it; it asks for no stride of the last dimension."""
    return pad(lse, (0, -lse.shape[2] % 32), value=math.inf).contiguous()


def _cpu_flash_refuses(case: Case) -> str | None:
    dtypes = (*HALF, torch.float32, torch.float64)
    return _one_of(case, device="cpu", dtypes=dtypes, multiple=1, largest=1 << 16) or _same_sizes(case)


def _cpu_flash_forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)


def _cpu_flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> Gradients:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, output, lse, 0.0, is_causal, scale=scale
    )


def _scores(q: Tensor, k: Tensor, is_causal: bool, scale: float) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = q.to(wide) @ _per_query_head(k, q).to(wide).transpose(2, 3) * scale
    if is_causal:
        future = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return scores


def _math_forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, is_causal, scale)
    lse = scores.logsumexp(-1)
    output = (scores - lse.unsqueeze(-1)).exp() @ _per_query_head(v, q).to(scores.dtype)
    return output.to(q.dtype), lse


def _math_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> Gradients:
    weights = (_scores(q, k, is_causal, scale) - lse.unsqueeze(-1)).exp()
    grad_wide = grad.to(weights.dtype)
    delta = (grad_wide * output).sum(-1, keepdim=True)
    grad_scores = weights * (grad_wide @ _per_query_head(v, q).to(weights.dtype).transpose(2, 3) - delta) * scale
    grad_q = grad_scores @ _per_query_head(k, q).to(weights.dtype)
    grad_k = _per_key_head(grad_scores.transpose(2, 3) @ q.to(weights.dtype), k.shape[1])
    grad_v = _per_key_head(weights.transpose(2, 3) @ grad_wide, k.shape[1])
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _per_query_head(x: Tensor, query: Tensor) -> Tensor:
    return x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)


def _per_key_head(x: Tensor, kv_heads: int) -> Tensor:
    return x.unflatten(1, (kv_heads, -1)).sum(2)


KERNELS = (
    Kernel("cudnn", _cudnn_refuses, _cudnn_forward, _cudnn_backward),
    Kernel("flash_attention_2", _flash_refuses, _flash_forward, _flash_backward),
    Kernel("efficient", _efficient_refuses, _efficient_forward, _efficient_backward),
    Kernel("cpu_flash", _cpu_flash_refuses, _cpu_flash_forward, _cpu_flash_backward),
    Kernel("math", lambda case: None, _math_forward, _math_backward),
)


def packs(case: Case) -> bool:
    """Whether sequences of different lengths can go through one call (:func:`packed_forward`)."""
    return _flash_refuses(case) is None


def packed_forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: "PackedLengths", is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend within sequences that lie side by side: query (T, H, D), key and value (T', G, D); LSE (T, H)."""
    output, lse, *_ = aten._flash_attention_forward(
        q, k, v, *lengths.arguments(), 0.0, is_causal, False, scale=scale
    )  # fmt: skip
    return output, lse.transpose(0, 1)


def packed_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, lengths: "PackedLengths",
    is_causal: bool, scale: float,
) -> Gradients:  # fmt: skip
    """Gradients of :func:`packed_forward`."""
    seed = _no_seed(q)
    return aten._flash_attention_backward(
        grad,
        q,
        k,
        v,
        output,
        lse.transpose(0, 1).contiguous(),
        *lengths.arguments(),
        0.0,
        is_causal,
        seed,
        seed,
        scale=scale,
    )


@dataclass(frozen=True)
class PackedLengths:
    """Where sequences start (cumulative lengths, int32, on the device) and the longest of them."""

    query: Tensor
    key: Tensor
    longest_query: int
    longest_key: int

    def arguments(self) -> tuple[Tensor, Tensor, int, int]:
        """In the order of the kernel's signature."""
        return self.query, self.key, self.longest_query, self.longest_key
