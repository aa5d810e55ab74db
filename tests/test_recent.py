"""A recent call is found by PyTorch's own comparison: whatever makes another call is seen by it, or beside it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import headfold
from headfold import backends, kept_calls, prepared, recent
from headfold.planner import DEVICES
from tests.test_kept_calls import LENGTHS, dense, equal, paged, plain

pytestmark = pytest.mark.usefixtures("nothing_kept")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every call since, whether it was found among the recent ones."""
    seen: list[bool] = []
    before = recent.run

    def run(*args: Any) -> Any:
        result = before(*args)
        seen.append(result is not None)
        return result

    monkeypatch.setattr(recent, "run", run)
    return seen


def attend(**change: Any) -> Any:
    """A step against a cache with lengths on the device, changed."""
    q, k, v = dense()
    args = {"q": q, "k_cache": k, "v_cache": v, "cache_seqlens": LENGTHS, "causal": True} | change
    q, k, v = (args.pop(name) for name in ("q", "k_cache", "v_cache"))
    return headfold.flash_attn_with_kvcache(q, k, v, **args)


def test_the_third_call_is_a_recent_one(found: list[bool]) -> None:
    """The first notes what it came to, the second is found by its facts."""
    results = [attend() for _ in range(4)]
    assert found == [False, False, True, True]
    assert all(torch.equal(results[0], one) for one in results)


def shifted(t: torch.Tensor, by: int = 1) -> torch.Tensor:
    """The same tensor at another alignment."""
    flat = torch.empty(t.numel() + 4, dtype=t.dtype)
    return flat[by : by + t.numel()].view(t.shape).copy_(t)


CHANGES: dict[str, Callable[[], dict[str, Any]]] = {
    "shape": lambda: {"q": dense(sq=2)[0]},
    "stride": lambda: {"q": torch.cat([dense()[0]] * 2, -1)[..., :16]},
    "stride of a size of 1": lambda: {"q": torch.cat([dense()[0]] * 2, 1)[:, :1]},
    "dtype": lambda: {n: t.half() for n, t in zip(("q", "k_cache", "v_cache"), dense(), strict=True)},
    "alignment": lambda: {"q": shifted(dense()[0])},
    "alignment of lengths": lambda: {"cache_seqlens": shifted(LENGTHS)},
    "no lengths": lambda: {"cache_seqlens": None},
    "a number for lengths": lambda: {"cache_seqlens": 20},
    "a tensor more": lambda: {"learnable_sink": torch.zeros(4)},
    "an argument more": lambda: {"num_splits": 2},
    "an argument by its name": lambda: {"softmax_scale": None},
    "value": lambda: {"causal": False},
    "the LSE": lambda: {"return_softmax_lse": True},
    "a parameter": lambda: {"q": torch.nn.Parameter(dense()[0], requires_grad=False)},
    "an output": lambda: {"out": torch.empty(2, 1, 4, 16)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_that_looks_different_is_another(found: list[bool], change: str) -> None:
    """Each fact alone, and then the first one is still known."""
    for _ in range(3):
        attend()
    found.clear()
    other = CHANGES[change]()
    result = attend(**other)
    assert found == [False]
    prepared._kept.clear()
    assert equal(result, attend(**other))


@pytest.mark.parametrize("by", [2, 3])
def test_alignments_are_each_tensors_own(found: list[bool], by: int) -> None:
    """Those of two tensors together do not tell which of them lies where."""
    q, k, v = dense()
    kept = {"q": shifted(q, 1), "k_cache": shifted(k, by)}
    for _ in range(3):
        attend(**kept)
    found.clear()
    attend(q=shifted(q, by), k_cache=shifted(k, 1))
    attend(**kept)
    assert found == [False, True]


def test_kinds_within_tuples_are_looked_at() -> None:
    """1 is True to a comparison, not to a caller."""
    for _ in range(3):
        attend(window_size=(1, 0))
    for wrong in ((True, 0), (1, False), (1.0, 0)):
        with pytest.raises(TypeError):
            attend(window_size=wrong)
    for wrong in (1, 1.0):
        with pytest.raises(TypeError):
            attend(causal=wrong)


def test_a_gradient_that_would_be_needed_is_refused() -> None:
    """Where it is not recorded the call is the same."""
    q, _, _ = dense()
    for _ in range(3):
        expected = attend()
    with pytest.raises(NotImplementedError, match="gradient"):
        attend(q=q.requires_grad_())
    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(attend(q=q), expected)
    with pytest.raises(NotImplementedError, match="gradient"):
        attend(q=q)


def test_where_a_call_stands_is_looked_at(found: list[bool]) -> None:
    """Whether gradients are recorded, and a device that is forced."""
    for _ in range(3):
        attend()
    found.clear()
    with torch.no_grad():
        attend()
    with backends.force(DEVICES["h200"]):
        attend()
    attend()
    assert found == [False, False, True]


def test_calls_of_two_shapes_in_turn_are_both_known(found: list[bool]) -> None:
    calls = [(dense(seed, sq), {"causal": True}) for seed, sq in ((0, 1), (1, 20))]
    expected = [plain(headfold.flash_attn_func)(*args, **options) for args, options in calls]
    for _ in range(6):
        for (args, options), out in zip(calls, expected, strict=True):
            assert torch.equal(headfold.flash_attn_func(*args, **options), out)
    assert found == [False] * 4 + [True] * 8


def test_the_oldest_is_forgotten(found: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent, "MOST", 2)
    shapes = [dense(0, sq) for sq in (1, 2, 3)]
    for args in shapes:
        for _ in range(2):
            headfold.flash_attn_func(*args)
    found.clear()
    for args in reversed(shapes):
        headfold.flash_attn_func(*args)
    assert found == [True, True, False]


def test_every_call_has_its_own_tensors() -> None:
    """Values are read from the call's tensors, lengths and pages too, and written into its output."""
    for seed in range(5):
        args, options = paged(seed)
        out = torch.full_like(args[0], float("nan"))
        expected = plain(headfold.flash_attn_with_kvcache)(*args, **options)
        result = headfold.flash_attn_with_kvcache(*args, **options, out=out)
        assert result is out
        assert torch.equal(out, expected)
        result, lse = headfold.flash_attn_with_kvcache(*args, **options, return_softmax_lse=True)
        assert torch.equal(result, expected)
        assert lse.shape == (2, 4, 1)


def test_a_call_on_the_kernels_of_a_gpu_is_found_too(found: list[bool]) -> None:
    """They are interpreted here, and run from addresses."""
    with backends.force(DEVICES["h200"]):
        for seed in range(4):
            args, options = paged(seed)
            expected = plain(headfold.flash_attn_with_kvcache)(*args, **options, return_softmax_lse=True)
            out = headfold.flash_attn_with_kvcache(*args, **options, return_softmax_lse=True)
            assert equal(out, expected)
            given = torch.empty_like(args[0])
            assert headfold.flash_attn_with_kvcache(*args, **options, out=given) is given
            assert torch.equal(given, expected[0])
    assert found == [False] * 4 + [True] * 4
    tapes = [one for one in prepared._kept.values() if isinstance(one, kept_calls._Tape)]
    assert [one.direct is not None for one in tapes] == [True, True]


def test_recent_calls_keep_no_tensor_alive() -> None:
    args, options = paged()
    dead = [weakref.ref(t) for t in (*args, *options.values())]
    for _ in range(3):
        headfold.flash_attn_with_kvcache(*args, **options)
    del args, options
    gc.collect()
    assert [r() for r in dead] == [None] * 5


@pytest.mark.parametrize("guards", [None, lambda *tensors: None])
def test_without_guards_calls_are_found_by_their_facts(
    monkeypatch: pytest.MonkeyPatch, found: list[bool], guards: Any
) -> None:
    """The name is PyTorch's own: it may go, or be called in another way."""
    monkeypatch.setattr(recent, "_guards", None if guards is None else type("", (), {"TensorGuards": guards}))
    results = [attend() for _ in range(4)]
    assert found == [False] * 4
    assert all(torch.equal(results[0], one) for one in results)


def test_threads_do_not_take_each_others_tensors() -> None:
    inputs = [dense(seed, 1 + seed % 3) for seed in range(12)]
    expected = [plain(headfold.flash_attn_func)(*x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            outs = list(pool.map(lambda x: headfold.flash_attn_func(*x), inputs))
            assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
