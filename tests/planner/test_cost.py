"""The cost model: measured times it was fitted to, and what more work must do to a prediction."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from headfold.planner import DEVICES, Plan, device_named
from headfold.planner.cost import FIXUP, LAUNCH, NoPrediction, predicted_seconds
from headfold.problem import Problem

H200 = DEVICES["h200"]


def decode(
    heads: int, kv_heads: int, d: int, batch: int, sk: int, splits: int, keys: int = 128
) -> tuple[Problem, Plan]:
    """A bf16 decode of one query a sequence, in one tile a sequence."""
    problem = Problem(
        *("cuda", torch.bfloat16, batch, heads, kv_heads, d, d, 1, sk, batch, batch * sk),
    )
    plan = Plan(
        *("triton", "decode", heads // kv_heads, 16, keys, kv_heads, batch, 1, splits),
        num_stages=3,
        shared_memory=143 * 1024,
    )
    return problem, plan


# What the kernels of one H200 took with these plans, microseconds.
MEASURED = [
    (decode(32, 8, 128, 16, 8192, 1), 121.0),
    (decode(32, 8, 128, 1, 8192, 16), 14.9),
    (decode(32, 8, 128, 1, 131072, 16), 123.5),
    (decode(32, 8, 128, 64, 8192, 1), 487.9),
    (decode(32, 8, 128, 128, 2048, 1), 254.5),
    (decode(96, 8, 128, 4, 65536, 4), 242.8),
    (decode(32, 4, 128, 16, 32768, 2), 243.6),
    (decode(16, 2, 256, 1, 16384, 64, keys=64), 18.7),
    (decode(16, 2, 256, 16, 16384, 4, keys=64), 126.2),
    (decode(64, 8, 64, 16, 8192, 1, keys=256), 64.3),
    (decode(32, 1, 128, 16, 16384, 8), 41.9),
    (decode(32, 32, 128, 4, 65536, 1), 949.7),
]


@pytest.mark.parametrize(("call", "us"), MEASURED, ids=lambda x: str(x) if isinstance(x, float) else "")
def test_predictions_are_within_a_fifth_of_what_was_measured(call: tuple[Problem, Plan], us: float) -> None:
    assert predicted_seconds(*call, H200) * 1e6 == pytest.approx(us, rel=0.2)


def seconds(call: tuple[Problem, Plan], **changes: object) -> float:
    problem, plan = call
    return predicted_seconds(dataclasses.replace(problem, **changes), plan, H200)  # type: ignore[arg-type]


def test_a_wave_more_costs_its_start_and_its_idle_slots() -> None:
    full, over = decode(32, 4, 128, 33, 8192, 1), decode(32, 4, 128, 34, 8192, 1)
    assert full[1].programs == H200.sms
    each = seconds(full) / full[1].programs
    extra = seconds(over) - seconds(full)
    assert extra > 10 * (over[1].programs - full[1].programs) * each


def test_half_the_bandwidth_is_nearly_twice_the_time() -> None:
    call = decode(32, 8, 128, 16, 65536, 1)
    slow = dataclasses.replace(H200, bandwidth=H200.bandwidth / 2)
    assert predicted_seconds(*call, slow) == pytest.approx(2 * seconds(call), rel=0.01)


def test_pages_raggedness_and_splits_cost() -> None:
    call = decode(32, 8, 128, 16, 8192, 1)
    assert seconds(call) < seconds(call, kv_layout="paged", page_size=16) < 1.05 * seconds(call)
    half = call[0].total_k // 2
    ragged = seconds(call, lengths_on_device=True, total_k=half)
    assert 0.5 * seconds(call) < ragged, "half the keys, and the longest sequence's programs run on alone"
    problem, plan = call
    split = dataclasses.replace(plan, num_splits=2, tiles=8)  # as many programs, as many bytes
    assert predicted_seconds(problem, split, H200) - seconds(call) > FIXUP


def test_a_window_reads_less() -> None:
    far = decode(32, 8, 128, 16, 65536, 1)
    assert seconds(far, window_left=1023, window_right=0) < seconds(far) / 10


def test_smaller_programs_share_a_multiprocessor() -> None:
    problem, plan = decode(32, 8, 128, 18, 8192, 1)  # 144 programs: two waves, or one
    small = dataclasses.replace(plan, shared_memory=70 * 1024)
    assert predicted_seconds(problem, small, H200) < predicted_seconds(problem, plan, H200)


def test_nothing_to_do_takes_no_time_and_little_takes_a_launch() -> None:
    problem, plan = decode(8, 8, 64, 1, 1, 1)
    assert predicted_seconds(problem, Plan("triton", "none"), H200) == 0.0
    assert LAUNCH < predicted_seconds(problem, plan, H200) < 4 * LAUNCH


def test_what_is_not_predicted_says_why() -> None:
    problem, plan = decode(32, 8, 128, 16, 8192, 1)
    with pytest.raises(NoPrediction, match="a CPU's rates"):
        predicted_seconds(problem, plan, device_named("cpu"))
    with pytest.raises(NoPrediction, match="only decode is predicted"):
        predicted_seconds(problem, dataclasses.replace(plan, kernel="prefill"), H200)
