"""When reading shared pages once a group pays: monotone in what is shared, and never for what is not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headfold.planner import DEVICES, device_named
from headfold.planner.sharing import seconds_saved, seconds_spent, sharing_pays
from tests.planner.problems import GPUS, problem, problems

H200 = DEVICES["h200"]
PAGES = {"kv_layout": "paged", "page_size": 16, "lengths_on_device": True}


@pytest.mark.parametrize("device", [*GPUS, device_named("cpu")], ids=lambda d: d.name)
def test_a_long_prompt_of_many_sequences_pays_everywhere_and_a_page_of_two_nowhere(device) -> None:  # type: ignore[no-untyped-def]
    p = problem(batch=64, sk=8704, **PAGES)
    assert sharing_pays(p, device, (8192,), (64,))
    assert not sharing_pays(problem(batch=2, sk=8704, **PAGES), device, (16,), (2,))


def test_what_is_saved_is_the_bytes_that_are_not_read_again() -> None:
    p = problem(batch=10, sk=4096, **PAGES)
    token = 8 * 256 * 2
    once = seconds_saved(p, H200, (1024,), (2,))
    assert once == pytest.approx(1024 * token / H200.bandwidth, rel=0.05)
    assert seconds_saved(p, H200, (1024,), (5,)) == pytest.approx(4 * once)
    assert seconds_saved(p, H200, (1024, 512, 4096), (2, 3, 1)) == pytest.approx(2 * once)


def test_products_are_not_saved() -> None:
    """Prompts of many queries over a shared prefix are bound by arithmetic: all of it stays."""
    p = problem(batch=8, sq=2048, sk=8192, **PAGES)
    assert seconds_saved(p, H200, (4096,), (8,)) == 0.0
    assert not sharing_pays(p, H200, (4096,), (8,))


@given(problems(), st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 40)), min_size=1, max_size=4))
def test_any_groups(p, groups) -> None:  # type: ignore[no-untyped-def]
    """Nothing is saved by groups of one, never less than nothing, and no less by longer prefixes, larger groups or
    slower memory."""
    lengths, sizes = [n for n, _ in groups], [s for _, s in groups]
    saved = seconds_saved(p, H200, lengths, sizes)
    assert saved >= 0
    assert seconds_saved(p, H200, lengths, [1] * len(sizes)) == 0
    assert seconds_spent(p, H200) > 0
    if p.max_seqlen_q <= 1:
        assert seconds_saved(p, H200, [n + 16 for n in lengths], sizes) >= saved
        assert seconds_saved(p, H200, lengths, [s + 1 for s in sizes]) >= saved
    slow = dataclasses.replace(H200, bandwidth=H200.bandwidth / 2)
    assert seconds_saved(p, slow, lengths, sizes) >= saved


def test_wider_dtypes_save_more() -> None:
    p = problem(batch=8, **PAGES)
    wide = dataclasses.replace(p, dtype=torch.float32)
    assert seconds_saved(wide, H200, (64,), (8,)) == 2 * seconds_saved(p, H200, (64,), (8,))
