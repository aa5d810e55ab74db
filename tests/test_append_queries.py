"""q rotated in the append's launch: what attention then gets is what it would have rotated itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import headfold
from headfold.append import AppendInputs, append, check, reference_queries
from tests.conftest import Target
from tests.test_append import FIELDS, make, on_cpu


def with_queries(
    counts: Sequence[int], *, heads: int = 6, ragged: bool = False, advances: bool = True, **options: Any
) -> AppendInputs:
    """An append of three tokens to each of two sequences, with queries of these lengths (the longest, where dense)."""
    dtype = options.get("dtype", torch.float32)
    options = {"d": 8, "rotary_dim": 8, **options}
    x = make([4, 1], [3, 3], **options).x
    g = torch.Generator().manual_seed(1)
    lead = (sum(counts),) if ragged else (2, max(counts))
    device = x.k.device
    x.q = torch.randn(*lead, heads, options["d"], generator=g).to(dtype).to(device)
    x.rotary_advances = advances
    if ragged:
        offsets = [0, counts[0], counts[0] + counts[1]]
        x.cu_seqlens_q = torch.tensor(offsets, dtype=torch.int32, device=device)
    return x


def call(x: AppendInputs) -> tuple[torch.Tensor, torch.Tensor]:
    return append(*(getattr(x, name) for name in FIELDS))


def assert_turns(x: AppendInputs) -> torch.Tensor:
    """The second result is q rotated, rounded once, in rows side by side; q itself stays."""
    assert x.q is not None
    assert x.rotary_cos is not None
    before, columns = x.q.clone(), 2 * x.rotary_cos.shape[1]
    want = reference_queries(on_cpu(x))
    _, turned = call(x)
    assert torch.equal(x.q, before)
    assert turned.dtype == x.q.dtype
    assert turned.is_contiguous()
    assert torch.equal(turned[..., columns:], x.q[..., columns:]), "a column that is not rotated changed"
    step = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[x.q.dtype]
    torch.testing.assert_close(turned.cpu().double(), want, rtol=step, atol=step, equal_nan=True)
    return turned


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("advances", [True, False])
@pytest.mark.parametrize("ragged", [False, True])
def test_every_layout(target: Target, ragged: bool, advances: bool, interleaved: bool) -> None:
    for counts in ([1, 1], [5, 2], [60, 0], [0, 70]):
        for dtype in target.dtypes:
            x = with_queries(
                counts,
                ragged=ragged,
                advances=advances,
                interleaved=interleaved,
                dtype=dtype,
                device=target.device,
            )
            assert_turns(x)


@pytest.mark.parametrize(("d", "rotary_dim"), [(8, 2), (24, 20), (7, 6), (80, 66)])
def test_columns_that_are_not_rotated_stay(target: Target, d: int, rotary_dim: int) -> None:
    for interleaved in (True, False):
        x = with_queries([3, 3], d=d, rotary_dim=rotary_dim, interleaved=interleaved, device=target.device)
        assert_turns(x)


def test_positions_may_be_others_than_the_lengths(target: Target) -> None:
    assert_turns(with_queries([2, 2], rotary_at=[7, 0], device=target.device))


def test_a_position_without_angles_is_nan(target: Target) -> None:
    turned = assert_turns(with_queries([2, 2], rotary_at=[-1, 10**6], device=target.device))
    assert turned[0, 0].isnan().all()
    assert turned[1].isnan().all()
    assert not turned[0, 1].isnan().any()


def test_queries_with_strides_of_their_own(target: Target) -> None:
    """Heads before tokens, rows of an odd pitch, and rows that are aligned while those of the result are not."""
    for d in (8, 12):
        x = with_queries([5, 5], d=d, rotary_dim=4, dtype=target.dtypes[-1], device=target.device)
        assert x.q is not None
        q = x.q
        for view in (
            q.transpose(1, 2).contiguous().transpose(1, 2),
            torch.nn.functional.pad(q, (0, 1))[..., :d],
            torch.nn.functional.pad(q, (0, 16 - d))[..., :d],
        ):
            x.q = view
            assert_turns(x)


def test_without_queries_there_is_an_empty_tensor(target: Target) -> None:
    x = make([4, 1], [3, 3], rotary_dim=4, device=target.device).x
    assert call(x)[1].shape == (0,)


def test_fake_and_opcheck_agree_with_real() -> None:
    for ragged in (False, True):
        x = with_queries([3, 2], ragged=ragged)
        torch.library.opcheck(append, tuple(getattr(x, name) for name in FIELDS))
        fields = {name: getattr(x, name) for name in FIELDS}
        meta = [v.to("meta") if isinstance(v, torch.Tensor) else v for v in fields.values()]
        for real, fake in zip(call(x), append(*meta), strict=True):
            assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("ragged", [False, True])
def test_attention_after_an_append_is_attention_that_rotates(
    target: Target, ragged: bool, causal: bool
) -> None:
    """The same bits of q: an append without tokens, which rotates in its launch, and no append at all."""
    g = torch.Generator().manual_seed(0)
    dtype, device = target.dtypes[-1], target.device

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype).to(device)

    q = rand(5, 6, 16) if ragged else rand(2, 3, 6, 16)
    k_cache, v_cache = rand(2, 40, 2, 16), rand(2, 40, 2, 16)
    angle = torch.rand(64, 8, generator=g)
    options: dict[str, Any] = {
        "rotary_cos": angle.cos().to(device),
        "rotary_sin": angle.sin().to(device),
        "cache_seqlens": torch.tensor([30, 7], dtype=torch.int32, device=device),
        "causal": causal,
        "return_softmax_lse": True,
    }
    if ragged:
        options["cu_seqlens_q"] = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
        options["max_seqlen_q"] = 3
    alone = headfold.flash_attn_with_kvcache(q, k_cache, v_cache, **options)
    none = rand(2, 0, 2, 16)
    appended = headfold.flash_attn_with_kvcache(q, k_cache, v_cache, none, none, **options)
    for a, b in zip(alone, appended, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


ERRORS: list[tuple[Callable[[AppendInputs], dict[str, Any]], type[Exception], str]] = [
    (lambda x: {"q": x.q.half()}, ValueError, "q has dtype torch.float16; it must be float32"),
    (lambda x: {"q": x.q[..., :4].contiguous()}, ValueError, r"q has shape .* it must be \(2, sq, h, 8\)"),
    (lambda x: {"q": x.q[:1]}, ValueError, r"q has shape .* it must be \(2, sq, h, 8\)"),
    (lambda x: {"q": x.q.mT.contiguous().mT}, ValueError, "q has last stride"),
    (lambda x: {"q": 3}, TypeError, "q is a int"),
    (
        lambda x: {"rotary_cos": None, "rotary_sin": None},
        ValueError,
        "q is given without rotary_cos; it is only rotated here",
    ),
    (
        lambda x: {"cu_seqlens_q": torch.tensor([0, 3, 6], dtype=torch.int32)},
        ValueError,
        r"must be \(total_q, h, 8\)",
    ),
    (
        lambda x: {"cu_seqlens_q": torch.tensor([0, 3], dtype=torch.int32), "q": x.q[0]},
        ValueError,
        r"cu_seqlens_q has shape \(2\); it must be \(3,\)",
    ),
    (
        lambda x: {"q": None, "cu_seqlens_q": torch.tensor([0, 3, 6], dtype=torch.int32)},
        ValueError,
        "cu_seqlens_q is given without q",
    ),
    (lambda x: {"rotary_advances": 1}, TypeError, "rotary_advances is 1"),
]


@pytest.mark.parametrize(("change", "kind", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_every_argument_is_checked(
    change: Callable[[AppendInputs], dict[str, Any]], kind: type[Exception], message: str
) -> None:
    x = with_queries([3, 3])
    with pytest.raises(kind, match=message):
        check(dataclasses.replace(x, **change(x)))
