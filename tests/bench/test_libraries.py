"""What other libraries are given, without them: the arguments of FlashAttention-3's operators, one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headfold.bench.inputs import make_inputs
from headfold.bench.libraries import fa3_operators, prepare_fa3_operators
from tests.bench.tiny import TINY, TINY_FEATURES

CASES = {c.name: c for c in TINY}


class Operators:
    """Records the calls; refuses a schedule when told to."""

    def __init__(self, refuses_schedule: bool = False) -> None:
        self.refuses_schedule = refuses_schedule
        self.calls: list[tuple[Any, ...]] = []
        self.schedules: list[tuple[Any, ...]] = []

    def get_scheduler_metadata(self, *args: Any) -> torch.Tensor:
        self.schedules.append(args)
        return torch.zeros(1, dtype=torch.int32)

    def fwd(self, *args: Any) -> list[torch.Tensor]:
        if self.refuses_schedule and args[29] is not None:
            raise RuntimeError("scheduler_metadata has a wrong shape")
        self.calls.append(args)
        return [torch.empty(*args[0].shape[:-1], args[2].shape[-1])]


@pytest.mark.parametrize("name", CASES)
def test_arguments_of_the_operators(name: str) -> None:
    case, ops = CASES[name], Operators()
    x = make_inputs(case, torch.device("cpu"), copies=2)
    out = prepare_fa3_operators(ops, case, x)(1)
    assert out.shape == case.out_shape
    args = ops.calls[-1]
    assert len(args) == 37
    assert args[1] is x.k[1]
    assert args[2] is x.v[1]
    assert args[7] is x.cu_seqlens_q
    assert args[8] is x.cu_seqlens_k
    assert (args[11] is None) == (x.cu_seqlens_q is not None)
    assert args[14] is x.page_table
    assert args[23:25] == (case.d**-0.5, case.causal)
    assert args[33:] == (None, 1, 0, None)
    if x.cu_seqlens_q is None:
        (schedule,) = ops.schedules
        assert len(schedule) == 23
        assert schedule[:8] == (
            *(case.batch, case.sq, case.sk, case.heads, case.kv_heads),
            *(case.d, case.dv, case.torch_dtype),
        )
        assert schedule[14:17] == (case.page_size or None, 0, case.causal)
        assert args[29] is not None


@pytest.mark.parametrize("name", ["tiny-softcap", "tiny-sink", "tiny-window", "tiny-append-rotary"])
def test_features_reach_the_operators(name: str) -> None:
    case, ops = {c.name: c for c in TINY_FEATURES}[name], Operators()
    assert fa3_operators(__file__, "--against").runs(case, "cuda")
    x = make_inputs(case, torch.device("cpu"), copies=1)
    f, extra = case.features, x.extra
    prepare_fa3_operators(ops, case, x)(0)
    args, (schedule,) = ops.calls[-1], ops.schedules
    assert len(args) == 37
    assert args[3] is extra.k_new
    assert args[4] is extra.v_new
    assert args[11] is schedule[8]
    assert args[11] is (extra.before if f.append else x.lengths)
    assert args[17] is extra.cos
    assert args[18] is extra.sin
    assert args[25:29] == (f.window - 1, -1, f.softcap, False)
    assert (args[33] is None) == (not f.sink)
    assert schedule[15:20] == (case.sq if f.append else 0, False, f.window - 1, -1, f.softcap > 0)


def test_a_refused_schedule_is_left_out() -> None:
    case, ops = CASES["tiny-prefill"], Operators(refuses_schedule=True)
    x = make_inputs(case, torch.device("cpu"), copies=1)
    prepare_fa3_operators(ops, case, x)(0)
    assert ops.calls[-1][29] is None
