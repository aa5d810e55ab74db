"""The classic bugs of attention kernels, one test each. The docstrings tell how each comes about."""

from __future__ import annotations

import pytest
import torch

import headfold
from headfold import backends, reference
from headfold.problem import Inputs
from tests.cases import NAN, assert_accurate, make, poisoned
from tests.conftest import Target


def attend(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of `x` into poisoned outputs."""
    out, lse = poisoned(x)
    backends.run(x, out, lse)
    return out, lse


@pytest.mark.parametrize("group", [3, 5, 6, 7, 12])
def test_lanes_past_the_group_do_not_reach_the_next_head(target: Target, group: int) -> None:
    """A tile has 16 rows or more, a group of 5 fills 5 of them. If the other lanes compute their head as
    `kv_head * G + lane`, they read and write heads of the next group, in whatever order programs finish."""
    x = make([1, 1], [40, 8], heads=3 * group, kv_heads=3, dtype=target.dtypes[-1], device=target.device)
    for _ in range(3):
        assert_accurate(x, *attend(x))


@pytest.mark.parametrize("sk", [1, 15, 17, 129, 130])
def test_keys_past_the_end_do_not_dilute_the_softmax(target: Target, sk: int) -> None:
    """A masked load fills the tail block with zeros. Zeros as keys score 0, not -inf: where all real scores are
    far below 0 they take the whole softmax, and the output is scaled down to nothing."""
    x = make([1], [sk], dtype=target.dtypes[-1], device=target.device)
    x.q, x.k = torch.full_like(x.q, 4.0), x.k.masked_fill(~x.k.isnan(), -1.0)
    out, lse = attend(x)
    assert_accurate(x, out, lse)
    assert lse.max() < -5


def test_a_row_that_sees_nothing_is_zero_and_not_nan(target: Target) -> None:
    """Bottom-right causal with sq > sk leaves the first rows without a key: their maximum is -inf, and
    exp(-inf - -inf) is NaN; dividing by their sum 0 is the second chance to get one."""
    x = make([9], [4], causal=True, heads=6, dtype=target.dtypes[-1], device=target.device)
    out, lse = attend(x)
    assert (out[:, :5] == 0).all()
    assert (lse[..., :5] == float("-inf")).all()
    assert_accurate(x, out, lse)


def test_a_row_that_sees_nothing_in_a_block_that_others_see(target: Target) -> None:
    """Under a window a row may see no key of the first block of its tile: its state must survive a block of
    -inf scores before the first real one, and after the last."""
    x = make([70], [90], window=(3, 0), heads=4, dtype=target.dtypes[-1], device=target.device)
    assert_accurate(x, *attend(x))


@pytest.mark.parametrize("splits", [2, 5])
def test_a_split_that_sees_nothing_does_not_spoil_the_merge(target: Target, splits: int) -> None:
    """With more splits than blocks some hold no key: LSE -inf, and an output that nobody wrote. 0 * NaN is NaN,
    so the merge must not multiply them."""
    x = make([1, 1], [3, 0], num_splits=splits, dtype=target.dtypes[-1], device=target.device)
    out, lse = attend(x)
    assert_accurate(x, out, lse)
    assert (out[1] == 0).all()


@pytest.mark.parametrize(
    "layout", [("dense", "dense"), ("ragged", "ragged"), ("dense", "paged"), ("ragged", "paged")]
)
@pytest.mark.parametrize("lengths", [([], []), ([0, 0], [5, 3]), ([2, 1], [0, 0]), ([0, 3], [4, 0])])
def test_empty_batch_empty_q_and_empty_k(
    target: Target, layout: tuple[str, str], lengths: tuple[list[int], list[int]]
) -> None:
    """A grid of size 0 is a launch error, a loop over no keys leaves its sum 0, and a cumulative sum of no
    lengths is one offset: every layout meets all three."""
    q_lens, k_lens = lengths
    x = make(
        q_lens,
        k_lens,
        q_layout=layout[0],
        kv_layout=layout[1],
        slack=0,
        dtype=target.dtypes[-1],
        device=target.device,
    )
    out, lse = attend(x)
    assert_accurate(x, out, lse)


def test_rows_of_no_sequence(target: Target) -> None:
    """Ragged q with rows behind its last offset, and no query in any sequence: the bound of the lengths is 0, by which
    planners divide."""
    x = make([0, 0], [5, 9], q_layout="ragged", kv_layout="paged", slack=0, device=target.device)
    x.q = torch.full((3, *x.q.shape[1:]), float("nan"), dtype=x.q.dtype, device=x.q.device)
    assert x.max_seqlen_q == 0
    attend(x)


@pytest.mark.parametrize(("sq", "sk"), [(5, 9), (9, 5), (1, 7), (130, 70), (70, 130)])
def test_causal_with_other_lengths_is_aligned_bottom_right(target: Target, sq: int, sk: int) -> None:
    """`j <= i` is right only for sq == sk. The last query sees the last key: `j <= i + sk - sq`, where the shift
    is negative for sq > sk and integer division of a negative position is a trap of its own."""
    x = make([sq], [sk], causal=True, heads=6, dtype=target.dtypes[-1], device=target.device)
    out, lse = attend(x)
    assert_accurate(x, out, lse)
    top_left = make(
        [sq], [sk], causal=True, bottom_right=False, heads=6, dtype=target.dtypes[-1], device=target.device
    )
    assert_accurate(top_left, *attend(top_left))


def test_scale_zero_is_zero(target: Target) -> None:
    """`scale or d**-0.5` turns 0.0 into the default. 0.0 means a plain average of the visible values; and a
    hidden score, -inf * 0, is NaN unless the mask comes after the scale."""
    x = make([3], [50], scale=0.0, causal=True, dtype=torch.float32, device=target.device)
    out, lse = attend(x)
    assert_accurate(x, out, lse)
    assert torch.allclose(out[0, 2, 0], x.v[0, :50, 0].mean(0), atol=1e-5)
    assert torch.allclose(lse[0, :, 2], torch.full_like(lse[0, :, 2], 50.0).log(), atol=1e-5)


def test_a_negative_scale_picks_the_smallest_score(target: Target) -> None:
    """The maximum of raw scores times a negative scale is the minimum of the scaled ones: exp overflows."""
    x = make([2, 70], [50, 90], scale=-3.0, dtype=torch.float32, device=target.device)
    assert_accurate(x, *attend(x))


def test_heads_that_do_not_divide_are_refused(target: Target) -> None:
    """h // hk rounds down, and the last heads would read a KV head that does not exist."""
    q = torch.zeros(1, 2, 5, 16, device=target.device)
    k = torch.zeros(1, 2, 2, 16, device=target.device)
    with pytest.raises(ValueError, match="q has 5 heads; that must be a multiple of the 2 KV heads"):
        headfold.flash_attn_func(q, k, k)


def test_garbage_in_a_page_table_past_the_end_is_never_followed(target: Target) -> None:
    """Engines leave old or random entries behind the last page. A look-up for a whole block reads them; a load
    through one faults or brings NaN."""
    x = make([1, 4], [33, 1], kv_layout="paged", page_size=16, dtype=target.dtypes[-1], device=target.device)
    assert x.page_table is not None
    assert int(x.page_table[1, 1]) == 2**31 - 1
    assert_accurate(x, *attend(x))


@pytest.mark.parametrize("stride", ["batch", "row", "head", "page"])
def test_element_offsets_beyond_2_to_31(target: Target, stride: str) -> None:
    """Offsets in 32 bits wrap at 2**31 elements, 4 GB of fp16: batch, row, head and page strides each reach it
    in a large cache. (The memory in between is reserved, not touched.)"""
    far = 2**31 + 16
    buffer = torch.empty(far + 4096, dtype=torch.float16, device=target.device)
    small = make([2, 2], [2, 2], d=16, slack=0, dtype=torch.float16, causal=True, device=target.device)
    shape = (2, 2, 2, 16)
    strides = {
        "batch": (far, 32, 16, 1),
        "row": (64, far, 16, 1),
        "head": (32, 16, far, 1),
        "page": (far, 32, 16, 1),
    }[stride]
    k, v = (torch.as_strided(buffer, shape, strides, storage_offset=n) for n in (0, 1024))
    k.copy_(small.k)
    v.copy_(small.v)
    x = Inputs(small.q, k, v, window_right=0)
    if stride == "page":
        x.page_table = torch.tensor([[1], [0]], dtype=torch.int32, device=target.device)
        x.seqused_k = torch.tensor([2, 2], dtype=torch.int32, device=target.device)
    assert_accurate(x, *attend(x))


def test_keys_outside_every_window_are_not_read(target: Target) -> None:
    """A sliding window frees old pages to other sequences: what lies before the first visible key may be NaN,
    and a block that starts before the window still loads it."""
    for sq in (1, 20):
        x = make([sq], [200], window=(30, 0), dtype=target.dtypes[-1], device=target.device)
        assert x.k[0, 0].isnan().all()
        assert_accurate(x, *attend(x))


def test_rows_past_seqused_q_are_left_alone(target: Target) -> None:
    """Padded rows of q may hold anything; computing them is waste, and writing them may hit the next sequence."""
    x = make([3, 1], [20, 20], q_layout="ragged", dtype=target.dtypes[-1], device=target.device)
    out, lse = attend(x)
    assert_accurate(x, out, lse)
    assert out.shape[0] > 4


def test_the_reference_agrees_with_pytorch() -> None:
    """The law itself, against PyTorch's math attention at float64 where both are defined."""
    q, k, v = (torch.randn(2, 7, h, 16, dtype=torch.float64) for h in (6, 3, 3))
    seen = reference.visible(7, 7, -1, 0, True)
    out, lse = zip(*(reference.attend(q[i], k[i], v[i], 0.25, seen) for i in range(2)), strict=True)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, scale=0.25, enable_gqa=True
    ).transpose(1, 2)
    assert torch.allclose(torch.stack(out), expected)
    assert torch.isfinite(torch.stack(lse)).all()


def test_the_reference_gives_nothing_for_no_key() -> None:
    """Rows without a key are 0 and -inf in the reference too, and unseen NaN keys do not reach it."""
    q, k = torch.randn(2, 1, 4, dtype=torch.float64), torch.full((3, 1, 4), NAN, dtype=torch.float64)
    out, lse = reference.attend(q, k, k, 1.0, torch.zeros(2, 3, dtype=torch.bool))
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
