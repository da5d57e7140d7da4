"""The frame of a benchmark: its flags, and the time and memory that variants of a computation take beside each other.

Every round runs all variants once, in random order. A ratio is that of two times of one round, so that a machine which
becomes slower does not change it; shown are its median over the rounds and, in brackets, its quartiles.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Variants = Mapping[str, Callable[[], object]]


def flags(
    doc: str, *, rest: bool = False, choices: Mapping[str, Iterable[str]] | None = None, **defaults: Any
) -> tuple[argparse.Namespace, list[str]]:
    """Read flags by their names and defaults; `--help` shows the benchmark's docstring.

    A flag takes one value of the default's type, or several for a list; False makes a switch, None is a text, and a
    type in place of a default makes a flag that must be given. With `rest` other words are returned, for a training
    script, and else they are an error.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.allow_abbrev = False
    for name, default in defaults.items():
        one, several = (default[0], "+") if isinstance(default, list) else (default, None)
        options: dict[str, Any] = {"action": "store_true"}
        if default is not False:
            kind = one if isinstance(one, type) else str if one is None else type(one)
            options = {"type": kind, "nargs": several, "choices": (choices or {}).get(name)}
        options |= {"required": True} if isinstance(default, type) else {"default": default, "help": "(%(default)s)"}
        parser.add_argument(f"--{name}", **options)
    args, others = parser.parse_known_args()
    if others and not rest:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return args, others


def machine() -> str:
    """The name of the device, for people."""
    return torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def now(clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds, read when the device has done all that it was asked for."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return clock()


def in_turn(
    variants: Variants, rounds: int, warm_up: int = 1, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each variant in each round; those of the first rounds, which compile and warm up, are left out."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warm_up + rounds):
        for name in random.Random(number).sample(list(variants), len(variants)):
            start = now(clock)
            variants[name]()
            seconds = now(clock) - start
            if number >= warm_up:
                times[name].append(seconds)
    return times


def ratio(times: Sequence[float], others: Sequence[float], spec: str = ".2f") -> str:
    """The median and the quartiles of the times in units of others."""
    ratios = [a / b for a, b in zip(times, others, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{statistics.median(ratios):{spec}} ({low:{spec}} to {high:{spec}})"


def peak_memory(run: Callable[[], object]) -> float:
    """Bytes allocated at most at one time during a call, beyond what was there before: by the allocator's count on a
    GPU, by the profiler's on a CPU."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        most = max(most, level)
    return most
