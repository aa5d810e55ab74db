"""The planner's predicted times beside the measured ones: how far the cost model can be trusted on a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headfold.bench.cases import Case
from headfold.bench.results import Result
from headfold.planner import DEVICES, Device, make_plan, running_device
from headfold.planner.cost import NoPrediction, predicted_seconds

WITHIN = 0.2  # a prediction is near when it is at most this far from the measured time


@dataclass(frozen=True, slots=True)
class Prediction:
    """A case's predicted and measured microseconds."""

    case: str
    predicted_us: float
    measured_us: float

    @property
    def error(self) -> float:
        """How much too long the prediction is, as a fraction of the measured time."""
        return self.predicted_us / self.measured_us - 1

    @property
    def is_near(self) -> bool:
        """True when it is within 20 %."""
        return abs(self.error) <= WITHIN


def device_of(result: Result) -> Device:
    """The device that a result was measured on, with the numbers that plans are made with.

    Raises:
        ValueError: a CPU, or a GPU that neither the table of devices nor this machine knows.
    """
    facts = result.device_facts
    if facts.get("type") != "cuda":
        raise ValueError("--predict needs a result of a GPU: a CPU's rates are not known")
    if torch.cuda.is_available() and torch.cuda.get_device_name() == facts.get("name"):
        return running_device(torch.device("cuda"))
    for device in DEVICES.values():
        if str(facts.get("name")).startswith(device.name):
            return device
    known = ", ".join(d.name for d in DEVICES.values())
    raise ValueError(
        f"--predict has no numbers for {facts.get('name')!r}; it knows {known}, and the GPU here"
    )


def predictions(result: Result) -> list[Prediction]:
    """What the planner of now predicts for every case that headfold has a time of, where it predicts at all.

    Raises:
        ValueError: a device without numbers.
    """
    device, found = device_of(result), []
    for name, record in result.cases.items():
        row = result.own(name)
        case = Case.from_record(name, record)
        if row is None or row.median_us is None or case.shared:
            continue  # what sequences share is read by a plan of its own
        problem = case.problem("cuda")
        try:
            seconds = predicted_seconds(problem, make_plan(problem, device), device)
        except NoPrediction:
            continue
        found.append(Prediction(name, seconds * 1e6, row.median_us))
    return found
