"""How many programs are compiled when lengths change: ours, FlashAttention 4's, and FlexAttention's."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace

from torch._dynamo.utils import counters

from benchmarking.cases import Case, blocks_for
from benchmarking.parity import first_line
from benchmarking.runner import Run, forward_backward
from benchmarking.variants import Variant, flex_blocks, ours
from hf_dilated.timing import release

LENGTHS = (2048, 3000, 4096, 5001, 6144, 7777, 8192, 10000, 12289, 16384)


def count_recompilations(run: Run, case: Case, say: Callable[[str], None]) -> None:
    """Run forward and backward at one length, then at the others, and count what is compiled only then.

    A row of each variant keeps its ``lengths``, the ``recompilations`` (programs that the lengths after the first one
    added), and the seconds of the first call at each length.
    """
    config = blocks_for(case.blocks[0], case.length)
    makers: dict[str, Callable[[Case], Variant]] = {"block sparse": lambda at: ours(config, "block sparse")}
    if run.choice.flex:
        makers["flex"] = lambda at: flex_blocks(at, config, "flex", at.length, run.choice.flex_seconds)
    for name, make in makers.items():
        seconds, programs = [], []
        try:
            for length in LENGTHS:
                at = replace(case, length=length, queries=length)
                begin, variant = time.perf_counter(), make(at)
                with variant.in_time():
                    forward_backward(variant.prepare(), at.inputs())()
                    release()
                seconds.append(time.perf_counter() - begin)
                programs.append(_programs())
        except Exception as error:
            if not make(case).optional:
                raise
            run.add(case, name, "forward+backward", "unavailable", lengths=LENGTHS, reason=first_line(error))
            say(f"{name}: unavailable, {first_line(error)}")
            continue
        added = programs[-1] - programs[0]
        run.add(case, name, "forward+backward", "measured", lengths=LENGTHS, recompilations=added, seconds=seconds)
        say(f"{name}: {added} recompilations over {len(LENGTHS)} lengths; first calls took up to {max(seconds):.3f} s")


def _programs() -> int:
    return _triton_programs() + _flash_programs() + counters["stats"]["unique_graphs"]


def _triton_programs() -> int:
    modules = [module for name, module in sys.modules.items() if name.startswith("hf_dilated.engine.fused")]
    kernels = {id(x): x for module in modules for x in vars(module).values() if hasattr(x, "device_caches")}
    return sum(len(kept[0]) for kernel in kernels.values() for kept in kernel.device_caches.values())


def _flash_programs() -> int:
    interface = sys.modules.get("flash_attn.cute.interface")
    caches = (getattr(x, "compile_cache", None) for x in vars(interface).values()) if interface else ()
    return sum(len(getattr(cache, "cache", ())) for cache in caches if cache is not None)
