"""Caps, sinks, biases, masks, trees, chunks, cache rows and rotary, alone and together, against the reference.

A drawn case is a layout, a set of features, a ratio and lengths; every key that no query sees is NaN.
"""

from __future__ import annotations

import os
import random
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, note, seed, settings
from hypothesis import strategies as st

from headfold import backends, reference
from headfold.features import check_features
from headfold.problem import Inputs, check
from tests.cases import assert_accurate, make, poisoned
from tests.conftest import CPU, KERNELS, TARGETS, Target

FEATURES = (
    "softcap",
    "sink",
    "alibi",
    "chunk",
    "bool_mask",
    "float_mask",
    "tree",
    "rows",
    "leftpad",
    "rotary",
    "fixed",
)


def featured(x: Inputs, features: frozenset[str], seed: int) -> Inputs:
    """The same call with features; keys that nobody sees any more become NaN."""
    g = torch.Generator().manual_seed(seed)
    device, h, b = x.q.device, x.q.shape[-2], x.batch
    dense = x.cu_seqlens_q is None and x.cu_seqlens_k is None and x.page_table is None

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(device)

    if "softcap" in features:
        x.softcap = 1.5
    if "sink" in features:
        x.sink = rand(h).to((torch.float32, torch.bfloat16, torch.float16)[seed % 3])
    if "alibi" in features:
        x.alibi_slopes = rand(h).abs() if seed % 2 else rand(b, h).abs()
    if "chunk" in features:
        x.attention_chunk = 1 + seed % 40
    if dense and ("bool_mask" in features or "float_mask" in features):
        shape = (b, h if seed % 2 else 1, x.q.shape[1], x.k.shape[1])
        mask = rand(*shape)
        hidden = rand(*shape) > 0.3
        mask = ~hidden if "bool_mask" in features else mask.masked_fill(hidden, float("-inf")).to(x.q.dtype)
        x.mask = mask.expand(b, h, -1, -1)
    if "tree" in features:
        most = x.q.shape[1] if x.cu_seqlens_q is None else int(x.max_seqlen_q or 0)
        x.tree_mask = rand(b, most, most) > 0
    if "rows" in features and x.cu_seqlens_k is None:
        order = torch.randperm(b, generator=g).to(device)
        if x.page_table is not None:
            x.page_table = x.page_table[order]
        else:
            x.k, x.v = x.k[order], x.v[order]
        x.cache_batch_idx = order.argsort().int()
    if "leftpad" in features and x.cu_seqlens_k is None and x.seqused_k is not None:
        pads = (torch.rand(b, generator=g).to(device) * (x.seqused_k + 1)).int().clamp(max=5)
        x.cache_leftpad = pads
        _revive(x)
    if "rotary" in features and x.q.shape[-1] >= 8:
        angle = rand(4096, 4)
        x.rotary_cos, x.rotary_sin = angle.cos(), angle.sin()
        x.rotary_positions = torch.randint(0, 2000, (b,), generator=g).int().to(device)
        x.rotary_interleaved, x.rotary_advances = bool(seed % 2), bool(seed % 3)
    if "fixed" in features:
        x.tokens_per_split = 20 + seed % 100
        x.num_splits = 0
    _hide(x)
    return x


def _revive(x: Inputs) -> None:
    """Numbers for keys that `make` hid: padding moves the diagonal, and they are seen now."""
    assert x.seqused_k is not None
    for i in range(x.batch):
        row = i if x.cache_batch_idx is None else int(x.cache_batch_idx[i])
        n = int(x.seqused_k[i])
        if x.page_table is None:
            valid = [(x.k[row, :n], x.v[row, :n])]
        else:
            pages = x.page_table[row, : -(-n // x.k.shape[1])].tolist()
            valid = [(x.k[page], x.v[page]) for page in pages]
        for k, v in valid:
            k.nan_to_num_(0.5)
            v.nan_to_num_(0.5)


def _hide(x: Inputs) -> None:
    """NaN into every key that no query of its sequence sees, where the sequence shares it with nobody.

    A key between visible ones that only a mask tensor hides is read, as in PyTorch: it must be finite.
    """
    if x.page_table is not None or x.mask is not None or x.tree_mask is not None:
        return
    for i in range(x.batch):
        q, (k, v) = reference.queries_of(x, i), reference.keys_of(x, i)
        seen, _ = reference.mask_of(x, i, q.shape[0], k.shape[0])
        hidden = ~seen.expand(x.q.shape[-2], -1, -1).any(0).any(0)
        k[hidden], v[hidden] = float("nan"), float("nan")  # views of the cache: dense and ragged rows


def run(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention into poisoned outputs, checked by the accuracy rule (3x with softcap)."""
    check(x)
    check_features(x)
    out, lse = poisoned(x)
    backends.run(x, out, lse)
    assert_accurate(x, out, lse, factor=3.0 if x.softcap else 2.0)
    return out, lse


def run_there(x: Inputs, device: str) -> None:
    """`run` on a GPU of a call that was drawn, and is checked, on the CPU: a case drawn there waits for it a hundred times."""
    there = moved(x, device)
    check(there)
    check_features(there)
    out, lse = poisoned(there)
    backends.run(there, out, lse)
    assert_accurate(x, out.cpu(), lse.cpu(), factor=3.0 if x.softcap else 2.0)


def moved(x: Inputs, device: str) -> Inputs:
    """The same call on another device: strides, offsets and what tensors share are kept."""
    storages: dict[int, torch.UntypedStorage] = {}

    def move(t: torch.Tensor) -> torch.Tensor:
        here = t.untyped_storage()
        if here.data_ptr() not in storages:
            raw = torch.empty(0, dtype=torch.uint8).set_(here)
            storages[here.data_ptr()] = raw.to(device, copy=True).untyped_storage()
        there = storages[here.data_ptr()]
        return torch.empty(0, dtype=t.dtype, device=device).set_(
            there, t.storage_offset(), t.shape, t.stride()
        )

    tensors = {f.name: getattr(x, f.name) for f in fields(x)}
    return replace(x, **{name: move(t) for name, t in tensors.items() if isinstance(t, torch.Tensor)})


def test_a_moved_call_is_the_same_call() -> None:
    """In everything but where it lies: views of one cache stay views of one cache."""
    both = torch.randn(2, 3, 8, 2, 16)
    lengths = torch.tensor([5, 8, 1], dtype=torch.int32)
    x = Inputs(torch.randn(3, 2, 4, 16)[..., ::1], both[0], both[1], seqused_k=lengths[0:3])
    y = moved(x, "cpu")
    for a, b in ((x.q, y.q), (x.k, y.k), (x.v, y.v), (x.seqused_k, y.seqused_k)):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)
        assert (a.stride(), a.storage_offset(), a.dtype) == (b.stride(), b.storage_offset(), b.dtype)
        assert a.data_ptr() != b.data_ptr()
    assert y.k.untyped_storage().data_ptr() == y.v.untyped_storage().data_ptr()


@st.composite
def calls(draw: st.DrawFn, target: Target, largest: int) -> Inputs:
    """Any call: layout x features x ratio x lengths x dtype."""
    batch = draw(st.integers(1, 3))
    q_lens = [draw(st.integers(0, largest // 4)) for _ in range(batch)]
    k_lens = [draw(st.integers(0, largest)) for _ in range(batch)]
    seed = draw(st.integers(0, 2**20))
    features = frozenset(draw(st.sets(st.sampled_from(FEATURES), max_size=4)))
    ratio, kv_heads = draw(st.sampled_from([1, 2, 3, 5, 7, 8])), draw(st.integers(1, 2))
    layout = draw(
        st.sampled_from([("dense", "dense"), ("ragged", "ragged"), ("ragged", "paged"), ("dense", "paged")])
    )
    window = draw(st.sampled_from([(-1, -1), (-1, 0), (9, 0), (30, 11), (-1, 5), (0, -1)]))
    d, dv = draw(st.sampled_from([(16, 16), (24, 8), (64, 64), (40, 72)]))
    note(f"{layout} {window} {sorted(features)} G={ratio} q={q_lens} k={k_lens} d={d}/{dv} seed={seed}")
    x = make(
        q_lens,
        k_lens,
        heads=ratio * kv_heads,
        kv_heads=kv_heads,
        d=d,
        dv=dv,
        dtype=draw(st.sampled_from(target.dtypes)),
        q_layout=layout[0],
        kv_layout=layout[1],
        page_size=draw(st.sampled_from([1, 3, 16])),
        window=window,
        bottom_right=draw(st.booleans()) or "tree" in features,
        scale=draw(st.sampled_from([None, 0.3, -0.2])),
        seed=seed,
        device=target.device,
        num_splits=draw(st.sampled_from([0, 0, 1, 3])),
    )
    return featured(x, features, seed)


DRAWN = int(os.environ.get("HEADFOLD_EXAMPLES", "0"))
SEED = int(os.environ.get("HEADFOLD_SEED", random.randrange(2**32)))


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name, indirect=True)
def test_features_together(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    """The product of features is sampled; the number of drawn cases is printed, and the seed, which HEADFOLD_SEED
    repeats. A long run says every 100 cases how far it is."""
    count = 0
    examples = DRAWN or {"cpu": 200, "interpreted": 40, "gpu": 300}[target.name]

    @seed(SEED)
    @settings(max_examples=examples, database=None)
    @given(calls(replace(target, device="cpu"), 200 if target.name != "interpreted" else 60))
    def walk(x: Inputs) -> None:
        nonlocal count
        if target.device == "cpu":
            run(x)
        else:
            run_there(x, target.device)
        count += 1
        if DRAWN and count % 100 == 0:
            with capsys.disabled():
                print(f"\n{target.name}: {count} drawn calls so far, seed {SEED}", flush=True)

    walk()
    with capsys.disabled():
        print(f"\n{target.name}: {count} drawn calls, seed {SEED}")
    assert count >= examples // 2


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(
    "layout", [("dense", "dense"), ("ragged", "ragged"), ("ragged", "paged")], ids=lambda p: p[1]
)
def test_each_feature_alone(target: Target, feature: str, layout: tuple[str, str]) -> None:
    """Short and long rows: both kernels, each feature, each layout, causal."""
    for i, (sq, sk) in enumerate(((3, 50), (70, 90))):
        x = make(
            [sq, sq // 2],
            [sk, sk // 3],
            heads=6,
            dtype=target.dtypes[i % len(target.dtypes)],
            q_layout=layout[0],
            kv_layout=layout[1],
            page_size=3,
            causal=True,
            seed=i,
            device=target.device,
        )
        run(featured(x, frozenset([feature]), seed=i + 1))


def test_masks_differ_by_head(target: Target) -> None:
    """A mask read with head 0's stride gives every head the first one's: here each head sees another key."""
    x = make([2], [6], heads=6, kv_heads=2, slack=0, dtype=target.dtypes[-1], device=target.device)
    x.mask = torch.eye(6, dtype=torch.bool, device=target.device)[None, :, None, :].expand(1, 6, 2, 6)
    out, _ = run(x)
    for head in range(6):
        assert torch.allclose(out[0, 0, head].float(), x.v[0, head, head // 3].float(), atol=1e-3)


def test_a_row_that_a_mask_hides_wholly(target: Target) -> None:
    """A row of False, or of -inf: output 0, LSE -inf, in a tile where other rows see keys."""
    for floating in (False, True):
        x = make([40], [90], heads=4, slack=0, dtype=target.dtypes[-1], device=target.device)
        keep = torch.ones(1, 4, 40, 90, dtype=torch.bool, device=target.device)
        keep[:, 1, 7] = False
        keep[:, :, :, 20:60] = False
        x.mask = (
            torch.zeros_like(keep, dtype=x.q.dtype).masked_fill(~keep, float("-inf")) if floating else keep
        )
        out, lse = run(x)
        assert (out[0, 7, 1] == 0).all()
        assert lse[0, 1, 7] == float("-inf")


def test_a_sink_where_there_is_no_key(target: Target) -> None:
    """Empty k with a sink: output 0 and the sink as LSE, never +inf, in a launch and without one."""
    sink = torch.tensor([0.5, -3.0, 100.0, float("-inf")], device=target.device)
    for k_lens in ([0, 7], [0, 0]):
        for splits in (1, 3):
            slack = 0 if k_lens == [0, 0] else 3
            x = make(
                [2, 2], k_lens, slack=slack, dtype=target.dtypes[-1], device=target.device, num_splits=splits
            )
            x.sink = sink
            out, lse = run(x)
            assert (out[0] == 0).all()
            assert torch.equal(lse[0, :, 0], sink)


def test_left_padding_beyond_the_window(target: Target) -> None:
    """The window ends before the first valid key is reached: padding must count from it, not from the row."""
    x = make([1, 2], [40, 30], window=(5, 0), dtype=target.dtypes[-1], device=target.device)
    x.cache_leftpad = torch.tensor([33, 3], dtype=torch.int32, device=target.device)
    x.k[0, :33], x.v[0, :33] = float("nan"), float("nan")
    x.k[0, 33:40], x.v[0, 33:40] = 1.0, torch.arange(7.0, device=target.device).to(x.v.dtype)[:, None, None]
    out, _ = run(x)
    assert torch.allclose(out[0, 0].float(), torch.full_like(out[0, 0].float(), 3.5), atol=1e-2)


@pytest.mark.parametrize("tokens", [16, 50, 128])
def test_bits_do_not_depend_on_the_batch(target: Target, tokens: int) -> None:
    """tokens_per_split fixes where splits end: a sequence gives the same bits alone and in any batch."""
    for sq in (1, 4):
        x = make([sq, 9, sq], [300, 20, 7], q_layout="ragged", kv_layout="paged", heads=8, causal=True,
                 dtype=target.dtypes[-1], page_size=16, device=target.device, slack=0)  # fmt: skip
        x.tokens_per_split = tokens
        out, lse = run(x)
        assert x.cu_seqlens_q is not None
        assert x.page_table is not None
        assert x.seqused_k is not None
        alone = Inputs(
            x.q[:sq],
            x.k,
            x.v,
            cu_seqlens_q=x.cu_seqlens_q[:2],
            page_table=x.page_table[:1],
            seqused_k=x.seqused_k[:1],
            window_right=0,
            tokens_per_split=tokens,
        )
        alone_out, alone_lse = run(alone)
        assert torch.equal(alone_out, out[:sq])
        assert torch.equal(alone_lse, lse[:, :sq])


def test_both_targets_are_there() -> None:
    """Guards the parametrisation above."""
    assert CPU in TARGETS
    assert KERNELS in TARGETS
