"""A public call that looks like an earlier one runs what that one came to, on its own tensors; any other does not."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import headfold
from headfold import kept_calls, prepared

Kept = Callable[..., Any]
LENGTHS = torch.tensor([5, 20], dtype=torch.int32)

pytestmark = pytest.mark.usefixtures("nothing_kept")


def tapes() -> int:
    """How many public calls are kept."""
    return sum(isinstance(one, kept_calls._Tape) for one in prepared._kept.values())


def plain(public: Kept) -> Kept:
    """The public function behind what keeps its calls."""
    return inspect.unwrap(public)


def dense(seed: int = 0, sq: int = 1) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(2, sq, 4, 16, generator=g),
        torch.randn(2, 24, 2, 16, generator=g),
        torch.randn(2, 24, 2, 16, generator=g),
    )


def paged(seed: int = 0) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = dense(seed)
    table = torch.randperm(6, generator=g).int().view(2, 3)
    lengths = torch.randint(1, 24, (2,), generator=g).int()
    return (q, k.reshape(6, 8, 2, 16), v.reshape(6, 8, 2, 16)), {
        "cache_seqlens": lengths,
        "page_table": table,
    }


def ragged(seed: int = 0) -> tuple[Any, ...]:
    q, k, v = dense(seed)
    first = 3 + seed % 5
    cu_q, cu_k = (torch.tensor(cu, dtype=torch.int32) for cu in ([0, 1, 2], [0, first, 40]))
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_q, cu_k, 1, 40


CALLS: dict[str, Callable[[int], tuple[Kept, tuple[Any, ...], dict[str, Any]]]] = {
    "dense": lambda seed: (headfold.flash_attn_func, dense(seed), {"causal": True}),
    "dense with LSE": lambda seed: (headfold.flash_attn_func, dense(seed), {"return_lse": True}),
    "ragged": lambda seed: (headfold.flash_attn_varlen_func, ragged(seed), {"softcap": 2.0}),
    "cache": lambda seed: (
        headfold.flash_attn_with_kvcache,
        dense(seed),
        {"cache_seqlens": LENGTHS, "learnable_sink": torch.full((4,), float(seed))},
    ),
    "pages": lambda seed: (headfold.flash_attn_with_kvcache, *paged(seed)),
    "window": lambda seed: (headfold.flash_attn_func, dense(seed), {"window_size": (3, None)}),
    "prefill": lambda seed: (headfold.flash_attn_func, dense(seed, 20), {"causal": True}),
    "tree": lambda seed: (
        headfold.flash_attn_with_kvcache,
        dense(seed, 3),
        {"cache_seqlens": LENGTHS, "tree_mask": torch.tril(torch.ones(2, 3, 3, dtype=torch.bool))},
    ),
}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_the_second_call_goes_past_the_dispatcher_with_its_own_tensors(name: str) -> None:
    function, args, options = CALLS[name](0)
    first = function(*args, **options)
    assert tapes() == 1
    assert equal(first, plain(function)(*args, **options))
    function, args, options = CALLS[name](1)
    dispatched: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headfold.ops.note", dispatched.append)
        second = function(*args, **options)
    assert dispatched == [], "the operator ran through the dispatcher"
    assert equal(second, plain(function)(*args, **options))
    assert not equal(first, second)


def step(seed: int = 0) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """A step that appends two tokens and rotates."""
    g = torch.Generator().manual_seed(100 + seed)
    new = torch.randn(2, 2, 2, 2, 16, generator=g)
    angle = torch.randn(24, 8, generator=g)
    options = {"rotary_cos": angle.cos(), "rotary_sin": angle.sin(), "cache_seqlens": LENGTHS, "causal": True}
    return (*dense(seed, 2), new[0], new[1]), options


@pytest.mark.parametrize("rotates", [True, False])
def test_a_step_that_appends_is_kept_whole(rotates: bool) -> None:
    """The append writes, its lengths and rotated queries go to the attention."""
    for seed in range(3):
        args, options = step(seed)
        if not rotates:
            del options["rotary_cos"], options["rotary_sin"]
        copies = [t.clone() for t in args]
        out = headfold.flash_attn_with_kvcache(*args, **options, return_softmax_lse=True)
        assert tapes() == 1
        assert equal(
            out, plain(headfold.flash_attn_with_kvcache)(*copies, **options, return_softmax_lse=True)
        )
        assert all(torch.equal(a, b) for a, b in zip(args, copies, strict=True))
        assert not torch.equal(args[1], dense(seed, 2)[1])


@pytest.mark.parametrize("want_lse", [True, False])
def test_a_given_output_is_written_and_returned(want_lse: bool) -> None:
    q, k, v = dense()
    expected = headfold.flash_attn_func(q, k, v, return_lse=want_lse)
    for _ in range(3):
        out = torch.full_like(q, float("nan"))
        result = headfold.flash_attn_func(q, k, v, out=out, return_lse=want_lse)
        assert (result[0] if want_lse else result) is out
        assert equal(result, expected)
    assert tapes() == 2


def test_a_tensor_given_twice_is_not_kept() -> None:
    """Which of its places a tensor came from would be a guess."""
    q, k, v = dense()
    headfold.flash_attn_func(q, k, k)
    assert tapes() == 0
    out = headfold.flash_attn_func(q, k, v)
    assert torch.equal(out, plain(headfold.flash_attn_func)(q, k, v))
    assert torch.equal(headfold.flash_attn_func(q, k, k), plain(headfold.flash_attn_func)(q, k, k))


def test_values_that_the_host_reads_are_read_every_time() -> None:
    q, k, v = dense()
    for left in (2, 9, 0):
        sides = torch.tensor([left, 0])
        out = headfold.flash_attn_func(q, k, v, window_size=sides)
        assert torch.equal(out, headfold.flash_attn_func(q, k, v, window_size=(left, 0)))
    for n in (3, 20):
        out = headfold.flash_attn_with_kvcache(q, k, v, cache_seqlens=n)
        assert torch.equal(out, plain(headfold.flash_attn_func)(q, k[:, :n], v[:, :n]))


def test_kinds_of_arguments_are_facts() -> None:
    """1 is True and 1.0 to a dictionary, not to a caller."""
    q, k, v = dense()
    headfold.flash_attn_func(q, k, v, causal=True, window_size=(1, 0), num_splits=1)
    for wrong in ({"causal": 1}, {"window_size": (True, 0)}, {"num_splits": True}, {"num_splits": 1.0}):
        options: dict[str, Any] = {"causal": True, "window_size": (1, 0), "num_splits": 1} | wrong
        with pytest.raises(TypeError):
            headfold.flash_attn_func(q, k, v, **options)


def test_metadata_of_a_schedule_is_a_value() -> None:
    q, k, v = dense()
    metadata = headfold.get_scheduler_metadata(2, 1, 24, 4, 2, 16, LENGTHS)
    for _ in range(2):
        headfold.flash_attn_with_kvcache(q, k, v, cache_seqlens=LENGTHS, scheduler_metadata=metadata)
    assert tapes() == 1


def test_other_kinds_of_arguments_are_not_kept() -> None:
    args, options = paged()
    groups = headfold.flash_attn_with_kvcache(
        *args, **options, shared_prefix_groups=[1, 1], shared_prefix_len=0
    )
    assert tapes() == 0
    assert torch.equal(groups, headfold.flash_attn_with_kvcache(*args, **options))


def test_a_shared_prefix_is_not_kept() -> None:
    q, k, v = dense()
    table = torch.tensor([[0, 1, 2], [0, 1, 3]], dtype=torch.int32)
    cache = k.reshape(6, 8, 2, 16), v.reshape(6, 8, 2, 16)
    lengths = torch.tensor([20, 24], dtype=torch.int32)
    for _ in range(2):
        out = headfold.flash_attn_with_kvcache(
            q, *cache, cache_seqlens=lengths, page_table=table, shared_prefix_len=16
        )
    assert tapes() == 0
    expected = headfold.flash_attn_with_kvcache(q, *cache, cache_seqlens=lengths, page_table=table)
    torch.testing.assert_close(out, expected)


def test_a_call_that_raises_leaves_nothing() -> None:
    q, k, v = dense()
    for _ in range(2):
        with pytest.raises(ValueError, match="k has"):
            headfold.flash_attn_func(q, k[..., :8], v)
    assert tapes() == 0
    assert kept_calls._notes.steps is None


def test_checks_of_values_are_made_as_soon_as_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = dense()
    wrong = torch.tensor([5, 99], dtype=torch.int32)
    monkeypatch.delenv("HEADFOLD_CHECK", raising=False)
    for _ in range(2):
        headfold.flash_attn_with_kvcache(q, k, v, cache_seqlens=LENGTHS)
    for on in ("1", "yes"):
        monkeypatch.setenv("HEADFOLD_CHECK", on)
        with pytest.raises(ValueError, match="cache_seqlens"):
            headfold.flash_attn_with_kvcache(q, k, v, cache_seqlens=wrong)
    for off in ("0", ""):
        monkeypatch.setenv("HEADFOLD_CHECK", off)
        assert not kept_calls.value_checks_enabled()


def test_modes_profilers_and_transforms_see_the_operator() -> None:
    q, k, v = dense()
    call = headfold.flash_attn_func
    expected = call(q, k, v)
    seen: list[str] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        call(q, k, v)
    assert "headfold.attention.default" in seen
    with torch.profiler.profile() as profile:
        call(q, k, v)
    assert any("headfold::attention" in e.key for e in profile.key_averages())
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v), expected)


def test_a_subclass_goes_through_the_dispatcher() -> None:
    q, k, v = dense()
    expected = headfold.flash_attn_func(q, k, v)
    out = headfold.flash_attn_func(torch.nn.Parameter(q, requires_grad=False), k, v)
    assert torch.equal(out, expected)
    assert tapes() == 1


def test_a_kept_call_keeps_no_tensor_alive() -> None:
    args, options = paged()
    dead = [weakref.ref(t) for t in (*args, *options.values())]
    headfold.flash_attn_with_kvcache(*args, **options)
    assert tapes() == 1
    del args, options
    gc.collect()
    assert [r() for r in dead] == [None] * 5


def test_threads_do_not_take_each_others_tensors() -> None:
    inputs = [dense(seed) for seed in range(8)]
    expected = [plain(headfold.flash_attn_func)(*x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            outs = list(pool.map(lambda x: headfold.flash_attn_func(*x), inputs))
            assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))


def test_the_signatures_are_the_functions_own() -> None:
    for public in (
        headfold.flash_attn_func,
        headfold.flash_attn_varlen_func,
        headfold.flash_attn_with_kvcache,
    ):
        assert "softmax_scale" in inspect.signature(public).parameters
        assert public.__doc__
