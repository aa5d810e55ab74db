"""One run of the benchmark from the command line's options to a result, saved after every case."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from headfold.bench import machine, peers
from headfold.bench.cases import DTYPES, Case, select
from headfold.bench.catalogue import catalogue
from headfold.bench.ceilings import Ceilings, ceilings_of
from headfold.bench.measure import first_line
from headfold.bench.results import Result
from headfold.bench.runner import Progress, Runner


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """What to measure, as the command line names it. Empty `names` means the whole suite."""

    device: str
    suite: str = "all"
    names: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    with_torch: bool = True
    dtype: str | None = None
    rounds: int | None = None
    fa3_library: str | None = None


def default_device() -> str:
    """ "cuda" where a GPU is there, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def cases_of(options: Options) -> list[Case]:
    """The cases that the options choose of the device's catalogue.

    Raises:
        ValueError: an option that names nothing.
    """
    if options.dtype is not None and options.dtype not in DTYPES:
        raise ValueError(f"--dtype is {options.dtype!r}; it must be one of {', '.join(DTYPES)}")
    if options.rounds is not None and options.rounds < 1:
        raise ValueError(f"--rounds is {options.rounds}; it must be at least 1")
    cases = list(catalogue(options.device, "all" if options.names else options.suite))
    if options.names:
        cases = select(cases, options.names)
    if options.dtype is not None:
        cases = [dataclasses.replace(c, dtype=options.dtype) for c in cases]
    return cases


def peers_of(options: Options) -> list[peers.Implementation]:
    """Every implementation there is a name for, those of `options` among them."""
    peers.chosen(options.against, options.device, fa3_library=options.fa3_library)
    return list(peers.REGISTRY.values())


def run(
    options: Options,
    cases: Sequence[Case],
    save_to: Path | None = None,
    progress: Progress = lambda text: None,
    advance: Progress = lambda case: None,
) -> Result:
    """Measure the cases.

    Args:
        options: how to measure them.
        cases: what to measure.
        save_to: where to write the result after every case, so that a killed run keeps what it had.
        progress: told what is being done.
        advance: told the name of each case before it is measured.

    Raises:
        ValueError: an option that does not fit this machine.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is 'cuda', and PyTorch sees no GPU; leave it out or pass cpu")
    device = (
        torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    )
    implementations = peers.chosen(options.against, options.device, options.with_torch, options.fa3_library)
    ceilings = ceilings_of(device)
    progress("measuring this machine's ceilings")
    result = Result(
        device=(facts := machine.device_facts(device))["name"],
        device_facts=facts,
        versions=machine.versions(),
        commit=machine.commit(),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        ceilings=_recorded_ceilings(ceilings),
        options=_recorded(options),
    )
    runner = Runner(device, implementations, ceilings, options.rounds, progress)
    for case in cases:
        advance(case.name)
        result.cases[case.name] = case.record()
        result.rows += runner.run_case(case)
        if save_to is not None:
            result.save(save_to)
    return result


def _recorded(options: Options) -> dict[str, object]:
    found: dict[str, object] = {
        "against": list(options.against),
        "fa3-library": options.fa3_library,
        "dtype": options.dtype,
        "rounds": options.rounds,
        "no-torch": not options.with_torch,
    }
    return {name: value for name, value in found.items() if value}


def _recorded_ceilings(ceilings: Ceilings) -> dict[str, object]:
    try:
        return ceilings.record()
    except Exception as e:
        return {"note": f"not measured: {first_line(e)}"}
