"""Timing: every implementation of a case in turn, round after round, so that all see the same clocks.

On a GPU each implementation is captured in a CUDA graph of about a millisecond of calls, and the graphs are
replayed in turn. On a CPU runs of calls alternate under the wall clock. Calls rotate over the copies of K, V.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[int], torch.Tensor]
"""An implementation bound to its inputs: computes on copy i and returns the output as (b, sq, h, dv)."""

GPU_ROUNDS = 20
GRAPH_US = 800.0  # calls of one graph
GRAPH_LIMIT_US = 10_000.0  # a graph stops rotating over the copies beyond this
CPU_RUN_US = 2_000.0  # calls of one run on a CPU
CPU_BUDGET_US = 2e6  # all rounds of one case on a CPU: the whole catalogue then takes under three minutes
CPU_ROUNDS = (7, 40)
WARM_UP_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one call over the rounds. `note` says what was out of the ordinary."""

    median_us: float
    p10_us: float
    p90_us: float
    rounds: int
    note: str | None = None


def summarize(samples: Sequence[float], note: str | None = None) -> Timing:
    """Reduce microseconds per call, one sample a round."""
    s = sorted(samples)
    return Timing(quantile(s, 0.5), quantile(s, 0.1), quantile(s, 0.9), len(s), note)


def quantile(ordered: Sequence[float], fraction: float) -> float:
    """The quantile of sorted samples, between neighbours by proportion."""
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def calls_per_run(one_us: float, run_us: float, copies: int, limit_us: float) -> int:
    """Calls of one run: enough for `run_us`, in whole turns over the copies unless beyond `limit_us`."""
    n = max(1, math.ceil(run_us / max(one_us, 1e-3)))
    turns = -(-n // copies) * copies
    return turns if turns * one_us <= max(limit_us, run_us) else n


def measure(
    calls: Mapping[str, Call], device: torch.device, copies: int, rounds: int | None = None
) -> dict[str, Timing | Exception]:
    """Time every call in turn.

    Args:
        calls: implementations by name; each must have run once already.
        device: where they run.
        copies: copies of K and V to rotate over.
        rounds: rounds to count, None for the default of the device.

    Returns:
        By name, the timing, or the exception that ended it.
    """
    if device.type == "cuda":
        return _measure_cuda(calls, copies, rounds or GPU_ROUNDS)
    return measure_cpu(calls, copies, rounds)


def measure_cpu(
    calls: Mapping[str, Call],
    copies: int,
    rounds: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing | Exception]:
    """`measure` under the wall clock. `clock` counts seconds."""
    runs: dict[str, int] = {}
    results: dict[str, Timing | Exception] = {}
    total_us = 0.0
    for name, call in calls.items():
        try:
            one_us = _run_cpu(call, range(1), clock)
        except Exception as e:
            results[name] = e
            continue
        runs[name] = calls_per_run(one_us, CPU_RUN_US, 1, 0)
        total_us += runs[name] * one_us
    if rounds is None:
        low, high = CPU_ROUNDS
        rounds = min(high, max(low, int(CPU_BUDGET_US / max(total_us, 1e-3))))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    next_copy = dict.fromkeys(runs, 0)
    for _ in range(rounds):
        for name, n in runs.items():
            if name in results:
                continue
            turn = [(next_copy[name] + i) % copies for i in range(n)]
            next_copy[name] = (turn[-1] + 1) % copies
            try:
                samples[name].append(_run_cpu(calls[name], turn, clock) / n)
            except Exception as e:
                results[name] = e
    return {name: results.get(name) or summarize(samples[name]) for name in calls}


def _run_cpu(call: Call, copies: Sequence[int], clock: Callable[[], float]) -> float:
    start = clock()
    for i in copies:
        call(i)
    return (clock() - start) * 1e6


def _measure_cuda(calls: Mapping[str, Call], copies: int, rounds: int) -> dict[str, Timing | Exception]:
    plays: dict[str, tuple[Callable[[], object], int, str | None]] = {}
    results: dict[str, Timing | Exception] = {}
    for name, call in calls.items():
        try:
            plays[name] = playable(call, copies)
        except Exception as e:
            results[name] = e
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in plays}
    for i in range(WARM_UP_ROUNDS + rounds):
        for name, (play, _, _) in plays.items():
            pair = timed(play)
            if i >= WARM_UP_ROUNDS:
                events[name].append(pair)
    torch.cuda.synchronize()
    for name, (_, n, note) in plays.items():
        results[name] = summarize([a.elapsed_time(z) * 1e3 / n for a, z in events[name]], note)
    return results


def timed(play: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Run something on the GPU between two events, without waiting for it."""
    a, z = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    a.record()
    play()
    z.record()
    return a, z


def playable(
    call: Call, copies: int, run_us: float = GRAPH_US
) -> tuple[Callable[[], object], int, str | None]:
    """Make a run of calls that one function starts: a captured graph, or the plain calls where capture fails.

    Returns:
        The function, the calls it makes, and a note when they are not in a graph.
    """
    n = calls_per_run(_median_us(lambda: call(0)), run_us, copies, GRAPH_LIMIT_US)
    stream = torch.cuda.current_stream()
    try:
        replay = _capture(call, n, copies).replay
        # The first estimate held the host's time to launch; a replay does not, so more calls may fit.
        fitting = calls_per_run(_median_us(replay) / n, run_us, copies, GRAPH_LIMIT_US)
        if fitting > 1.5 * n:
            n = fitting
            del replay
            replay = _capture(call, n, copies).replay
        return replay, n, None
    except Exception as e:
        reason = first_line(e)
    torch.cuda.set_stream(stream)  # a capture that fails may leave its own stream current
    torch.cuda.synchronize()

    def plain() -> None:
        for i in range(n):
            call(i % copies)

    plain()
    return plain, n, f"timed with events, host time included: no CUDA graph ({reason})"


def _median_us(play: Callable[[], object], repeats: int = 5) -> float:
    for _ in range(2):
        play()
    pairs = [timed(play) for _ in range(repeats)]
    torch.cuda.synchronize()
    return quantile(sorted(a.elapsed_time(z) * 1e3 for a, z in pairs), 0.5)


def _capture(call: Call, n: int, copies: int) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(0)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(n):
            call(i % copies)
    return graph


def first_line(e: BaseException, limit: int = 200) -> str:
    """An exception in one line: its kind and how its message begins."""
    lines = str(e).strip().splitlines()
    text = f"{type(e).__name__}: {lines[0]}" if lines else type(e).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
