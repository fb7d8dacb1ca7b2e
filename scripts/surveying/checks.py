"""One family: does ``attn_implementation="dilated"`` compute what it says, or say that it does not?"""

import copy
import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from hf_dilated import ConfigError, DilatedConfig
from hf_dilated.integration.attention import attention_function
from hf_dilated.integration.report import report
from hf_dilated.integration.support import UnsupportedError
from surveying.tiny import randomize

PATTERN = DilatedConfig(segment_lengths=(32, 64, 128), dilation_rates=(1, 2, 4))
SHORT, LONG, PADDING = 32, 128, 7
TOLERANCE = 1e-3  # of the largest logit; float32, eight layers

STATUSES = ("works", "refused", "own attention", "not built tiny", "fails", "silently wrong")
BUGS = ("fails", "silently wrong")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one family."""

    status: str
    why: str = ""


def survey(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Outcome:
    """Compare a tiny model with itself under ``"dilated"``.

    Args:
        model_class: With a language modelling head.
        config: Small enough to run in seconds.
    """
    warnings.simplefilter("ignore")
    try:
        dense = _build(model_class, config, "sdpa" if model_class._supports_sdpa else "eager")
        randomize(dense)
        weights = copy.deepcopy(dense.state_dict())  # RWKV rescales its weights when it runs
        short, long = _tokens(SHORT), _tokens(LONG)
        expected = {"short": _logits(dense, short), "long": _logits(dense, long)}
    except Exception as error:
        return Outcome(status="not built tiny", why=_words(error))
    if not all(logits.isfinite().all() for logits in expected.values()):
        return Outcome(status="not built tiny", why="its random weights give no finite logits")
    calls = _count_calls()
    try:
        dilated = _build(model_class, config, _dilated(config))
        dilated.load_state_dict(weights)
        actual = {"short": _logits(dilated, short), "long": _logits(dilated, long)}
        if not calls:
            return _own_attention(config, expected, actual)
        return _judge(dense, dilated, expected, actual)
    except (UnsupportedError, ConfigError) as error:
        return Outcome(status="refused", why=_words(error))
    except Exception as error:
        if isinstance(error, KeyError) and str(error) == "'dilated'":  # a family's own table of attention classes
            return Outcome(status="refused", why="KeyError: 'dilated', by Transformers: it has a table of its own")
        return Outcome(status="fails", why=_words(error))


def _own_attention(config: PreTrainedConfig, expected: dict[str, Tensor], actual: dict[str, Tensor]) -> Outcome:
    if any(_differ(expected[name], actual[name]) for name in expected):
        return Outcome(status="silently wrong", why="never calls the backend, and its results change")
    try:
        report(config)
    except UnsupportedError as error:
        return Outcome(status="own attention", why=_words(error))
    except Exception as error:
        return Outcome(status="silently wrong", why=f"never calls the backend; hf-dilated info: {_words(error)}")
    return Outcome(status="silently wrong", why="never calls the backend, and hf-dilated info does not say so")


def _judge(
    dense: PreTrainedModel, dilated: PreTrainedModel, expected: dict[str, Tensor], actual: dict[str, Tensor]
) -> Outcome:
    wrong = []
    if _differ(expected["short"], actual["short"]):
        wrong.append(f"differs from dense at {SHORT} tokens by {_distance(expected['short'], actual['short']):.0e}")
    if not _differ(expected["long"], actual["long"]):
        wrong.append(f"equals dense at {LONG} tokens, so the pattern does not run")
    if _is_causal(dense) and not _is_causal(dilated):
        wrong.append("sees the future")
    few = _tokens(SHORT - PADDING)
    padded_dense, padded_dilated = _padded(dense, few), _padded(dilated, few)
    if _differ(padded_dense, padded_dilated):
        wrong.append(f"differs from dense with padding by {_distance(padded_dense, padded_dilated):.0e}")
    ignores_padding = not _differ(padded_dense[:1], _logits(dense, few)[:1])
    if ignores_padding and _differ(_padded(dilated, _tokens(LONG))[:1], actual["long"][:1]):
        wrong.append("depends on padding")
    if wrong:
        return Outcome(status="silently wrong", why="; ".join(wrong))
    return Outcome(status="works")


def _build(model_class: type[PreTrainedModel], config: PreTrainedConfig, attention: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    part = _text_part(config)
    (getattr(config, part) if part else config).hf_dilated = PATTERN
    return model_class._from_config(config, attn_implementation=attention).eval().float()


def _dilated(config: PreTrainedConfig) -> Any:
    part = _text_part(config)
    return {part: "dilated"} if part else "dilated"


def _text_part(config: PreTrainedConfig) -> str | None:
    """Name of the part that reads text, in a configuration of several parts."""
    text = config.get_text_config(decoder=True)
    return next((name for name in config.sub_configs if getattr(config, name, None) is text), None)


def _count_calls() -> list[str]:
    calls: list[str] = []

    def attend(module: torch.nn.Module, *arguments: Any, **options: Any) -> tuple[Tensor, None]:
        calls.append(type(module).__name__)
        return attention_function("dilated")(module, *arguments, **options)

    AttentionInterface.register("dilated", attend)
    return calls


def _tokens(count: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(5, 90, (batch, count), generator=generator)


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: Tensor, **options: Any) -> Tensor:
    output = model(input_ids=tokens, **options)
    return output.logits if "logits" in output else output[0]


def _padded(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits of real tokens behind padding; in the second row more real tokens follow instead."""
    first = torch.cat([torch.zeros_like(tokens[:1, :PADDING]), tokens[:1]], 1)
    second = torch.cat([tokens[1:], tokens[1:, :PADDING]], 1)
    mask = torch.ones_like(torch.cat([first, second]))
    mask[0, :PADDING] = 0
    options: dict[str, Tensor] = {"attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    logits = _logits(model, torch.cat([first, second]), **options)
    return torch.cat([logits[:1, PADDING:], logits[1:, : tokens.shape[1]]])


def _is_causal(model: PreTrainedModel) -> bool:
    tokens = _tokens(LONG)
    changed = tokens.clone()
    changed[:, LONG * 2 // 3 :] = tokens[:, LONG * 2 // 3 :].flip(1)
    before = slice(0, LONG * 2 // 3)
    return not _differ(_logits(model, tokens)[:, before], _logits(model, changed)[:, before])


def _distance(expected: Tensor, actual: Tensor) -> float:
    return float((expected - actual).abs().max() / expected.abs().max())


def _differ(expected: Tensor, actual: Tensor) -> bool:
    return expected.shape != actual.shape or not _distance(expected, actual) <= TOLERANCE


def _words(error: BaseException) -> str:
    text = next(iter(str(error).strip().splitlines()), "")
    own = isinstance(error, UnsupportedError | ConfigError)
    return text if own else f"{type(error).__name__}: {text}"
