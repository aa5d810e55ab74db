"""Running cases: inputs, outputs checked, times, rows. Whatever fails becomes the note of a row."""

from __future__ import annotations

import dataclasses
import gc
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch

from headfold.bench.cases import Case
from headfold.bench.ceilings import Ceilings
from headfold.bench.errors import WrongOutput, error_of
from headfold.bench.inputs import CaseInputs, make_inputs, memory_shortage
from headfold.bench.machine import OtherWork
from headfold.bench.measure import Call, Timing, first_line, measure
from headfold.bench.peers import Implementation, Unsupported
from headfold.bench.results import SKIPPED, Row

Progress = Callable[[str], None]
"""Told what is being done, in a few words."""


class DeviceLost(Exception):
    """The GPU stopped answering this process: nothing after it can be measured."""


@dataclasses.dataclass(slots=True)
class Runner:
    """Runs cases on one device, with one set of implementations."""

    device: torch.device
    implementations: Sequence[Implementation]
    ceilings: Ceilings
    rounds: int | None = None
    progress: Progress = lambda text: None
    _lost: str | None = dataclasses.field(default=None, init=False)

    def run(self, cases: Iterable[Case]) -> Iterable[list[Row]]:
        """The rows of each case in turn."""
        for case in cases:
            yield self.run_case(case)

    def run_case(self, case: Case) -> list[Row]:
        """The rows of one case, one for each implementation that says anything about it."""
        able = [i for i in self.implementations if i.runs(case, self.device.type)]
        if self._lost is not None:
            return [_failed(case, i.name, self._lost) for i in able]
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch warns of each backend that it passes over
                return self._run_case(case, able)
        except DeviceLost as e:
            self._lost = _lost_in(case, e)
            return [_failed(case, i.name, str(e)) for i in able]
        except Exception as e:
            return [_failed(case, i.name, first_line(e)) for i in able]
        finally:
            self._tidy(case)

    def _run_case(self, case: Case, able: Sequence[Implementation]) -> list[Row]:
        short = memory_shortage(case, self.device)
        if short is not None:
            return [_failed(case, i.name, SKIPPED + short) for i in able]
        self.progress("measuring the ceiling")
        full_us = self._ceiling_us(case)
        self.progress("drawing inputs")
        inputs = make_inputs(case, self.device)
        calls: dict[str, Call] = {}
        errors: dict[str, float] = {}
        failures: dict[str, Row] = {}
        for implementation in able:
            name = implementation.name
            self.progress(f"checking {name}")
            try:
                call = self._prepared(implementation, case, inputs)
                errors[name] = error_of(call, inputs, implementation.appends)
                calls[name] = call
            except WrongOutput as e:
                failures[name] = _failed(case, name, str(e), e.error)
            except NotRun as e:
                failures[name] = _failed(case, name, str(e))
            except DeviceLost:
                raise
            except Exception as e:
                failures[name] = _failed(case, name, first_line(e))
                require_device(self.device, name)
        self.progress(f"timing {len(calls)} implementations in turn")
        others = OtherWork()
        timings = measure(calls, self.device, inputs.copies, self.rounds)
        if self.device.type == "cpu" and others.disturbs():
            timings = {name: _doubtful(t) for name, t in timings.items()}
        return [
            failures.get(i.name) or _row(case, i.name, timings[i.name], full_us, errors[i.name]) for i in able
        ]

    def _ceiling_us(self, case: Case) -> float | None:
        """The time at which the case would sit at the machine's ceiling; None if that cannot be measured."""
        try:
            if case.is_memory_bound:
                return self.ceilings.read_us(case.kv_bytes)
            return case.flops / self.ceilings.matmul_tflops(case.torch_dtype) / 1e6
        except Exception:
            require_device(self.device, "the ceiling")
            return None

    def _prepared(self, implementation: Implementation, case: Case, inputs: CaseInputs) -> Call:
        missing = implementation.available()
        if missing is not None:
            raise NotRun(missing)
        call = implementation.prepare(case, inputs)
        if isinstance(call, Unsupported):
            raise NotRun(call.reason)
        return call

    def _tidy(self, case: Case) -> None:
        gc.collect()
        if self._lost is not None:
            return
        try:
            require_device(self.device, case.name)
        except DeviceLost as e:
            self._lost = _lost_in(case, e)
            return
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def require_device(device: torch.device, name: str) -> None:
    """Raise DeviceLost if an error in `name` has left the GPU unusable for this process."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except Exception as e:
        raise DeviceLost(f"{name}: {first_line(e)}") from e


class NotRun(Exception):
    """An implementation that cannot run a case, with the reason."""


def _doubtful(timing: Timing | Exception) -> Timing | Exception:
    if isinstance(timing, Exception):
        return timing
    return dataclasses.replace(timing, note="doubtful: other work took CPU time while this was timed")


def _lost_in(case: Case, e: DeviceLost) -> str:
    return f"not run: the GPU was lost in {case.name} ({e}); run this case alone"


def _failed(case: Case, name: str, note: str, error: float | None = None) -> Row:
    return Row(case.name, case.kind, name, max_error=error, note=note)


def _row(case: Case, name: str, timing: Timing | Exception, full_us: float | None, error: float) -> Row:
    if isinstance(timing, Exception):
        return _failed(case, name, first_line(timing), error)
    us = timing.median_us
    return Row(
        case.name,
        case.kind,
        name,
        median_us=us,
        p10_us=timing.p10_us,
        p90_us=timing.p90_us,
        gbps=case.kv_bytes / us / 1e3,
        tflops=case.flops / us / 1e6,
        ceiling_fraction=None if full_us is None else full_us / us,
        max_error=error,
        note=timing.note,
    )
