"""The list of a ragged prefill's tiles: every sequence once, most keys first, none without a query before one with."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from headfold.backends.hopper import list_tiles
from headfold.planner import DEVICES, Plan
from headfold.planner.hopper import plan_hopper
from headfold.planner.tiles import Tile
from headfold.problem import Inputs, problem_of
from tests.conftest import KERNELS


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def listed(x: Inputs) -> tuple[list[int], list[int]]:
    """(tiles before each place of the list and in all, the sequences in their order)."""
    problem = dataclasses.replace(problem_of(x), device_type="cuda")
    plan = plan_hopper(problem, DEVICES["h200"], 2**31, tile=Tile(128, 128, 12, 2, tma=True))
    assert isinstance(plan, Plan), plan
    found = list_tiles(plan, x)
    assert found is not None
    numbers = found.tolist()
    return numbers[: x.batch + 1], numbers[x.batch + 1 :]


def ragged(q_lens: list[int], k_lens: list[int], used: list[int] | None = None) -> Inputs:
    rand = torch.zeros
    x = Inputs(
        rand(sum(q_lens), 2, 64, dtype=torch.float16),
        rand(sum(k_lens), 1, 64, dtype=torch.float16),
        rand(sum(k_lens), 1, 64, dtype=torch.float16),
        cu_seqlens_q=offsets(q_lens),
        cu_seqlens_k=offsets(k_lens),
        seqused_q=None if used is None else torch.tensor(used, dtype=torch.int32),
        max_seqlen_q=max(q_lens),
        max_seqlen_k=max(k_lens),
    )
    tensors = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
    moved = {n: t.to(KERNELS.device) for n, t in tensors.items() if isinstance(t, torch.Tensor)}
    return dataclasses.replace(x, **moved)


def expected(rows: list[int], keys: list[int]) -> tuple[list[int], list[int]]:
    order = sorted(range(len(rows)), key=lambda i: (-keys[i] if rows[i] else 1, i))
    starts = [0]
    for i in order:
        starts.append(starts[-1] + -(-rows[i] // 128))
    return starts, order


def test_sequences_come_with_most_keys_first() -> None:
    q_lens, k_lens = [130, 1, 0, 600, 128], [200, 700, 900, 700, 128]
    assert listed(ragged(q_lens, k_lens)) == expected(q_lens, k_lens)
    assert listed(ragged(q_lens, k_lens)) == ([0, 1, 6, 8, 9, 9], [1, 3, 0, 4, 2])


def test_rows_that_are_not_used_have_no_tiles() -> None:
    q_lens, used = [300, 300, 300, 300], [300, 0, 129, 0]
    assert listed(ragged(q_lens, [64, 32, 96, 16], used)) == ([0, 2, 5, 5, 5], [2, 0, 1, 3])


def test_more_sequences_than_a_program_looks_at() -> None:
    gen = torch.Generator().manual_seed(0)
    q_lens = torch.randint(0, 400, (300,), generator=gen).tolist()
    k_lens = torch.randint(1, 50, (300,), generator=gen).tolist()
    assert listed(ragged(q_lens, k_lens)) == expected(q_lens, k_lens)


def test_dense_queries_on_lengths_of_the_device() -> None:
    q = torch.zeros(3, 150, 2, 64, dtype=torch.float16, device=KERNELS.device)
    k = torch.zeros(3, 256, 1, 64, dtype=torch.float16, device=KERNELS.device)
    used = torch.tensor([10, 256, 0], dtype=torch.int32, device=KERNELS.device)
    assert listed(Inputs(q, k, k, seqused_k=used)) == ([0, 2, 4, 6], [1, 0, 2])
