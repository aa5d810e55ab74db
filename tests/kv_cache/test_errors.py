"""Everything that the cache must refuse, and that a refused call changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headfold.kv_cache import PagedKVCache
from tests.kv_cache.caches import (
    DV,
    HEADS,
    D,
    K,
    V,
    assert_holds,
    assert_unchanged,
    small_cache,
    state_of,
    tokens,
)

CALLS: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
    ("append", (9, K, V), ValueError, "ids [0] is 9; no such sequence; ids come from allocate and fork"),
    ("append", ([0, 0], K, V), ValueError, "ids is [0, 0]; every sequence may come once"),
    ("append", ("01", K, V), TypeError, "ids is '01'; it must be an int on the host"),
    ("append", ([0, 1.0], K, V), TypeError, "ids[1] is 1.0; it must be an int on the host"),
    ("append", (True, K, V), TypeError, "ids is True; it must be an int on the host"),
    (
        "append",
        (torch.tensor([0, 1]), K, V),
        TypeError,
        "ids is tensor([0, 1]); it must be an int on the host",
    ),
    ("append", (None, K, V), TypeError, "ids is None; it must be an int on the host"),
    ("append", ([0, 1], [1.0], V), TypeError, "k is a list; it must be a torch.Tensor"),
    ("append", ([0, 1], K, None), TypeError, "v is a NoneType; it must be a torch.Tensor"),
    (
        "append",
        ([0, 1], K[0], V[0]),
        ValueError,
        "k has shape (3, 2, 8); it must be (n, s, num_kv_heads, head_dim), or ragged with lengths",
    ),
    ("append", ([0], K, V), ValueError, "k has shape (2, 3, 2, 8); it must be (1, 3, 2, 8)"),
    ("append", ([0, 1], K[..., :4], V), ValueError, "k has shape (2, 3, 2, 4); it must be (2, 3, 2, 8)"),
    ("append", ([0, 1], K, V[:, :2]), ValueError, "v has shape (2, 2, 2, 12); it must be (2, 3, 2, 12)"),
    (
        "append",
        ([0, 1], K.half(), V),
        ValueError,
        "k has dtype torch.float16; it must be the cache's torch.float32",
    ),
    ("append", ([0, 1], K, V.to("meta")), ValueError, "v is on meta; it must be on the cache's cpu"),
    ("append", ([0, 1], K[0], V[0], [1]), ValueError, "lengths has 1 entries; there are 2 sequences"),
    ("append", ([0, 1], K[0], V[0], [4, -1]), ValueError, "lengths has -1; it must be >= 0"),
    ("append", ([0, 1], K[0], V[0], [1, 1]), ValueError, "k has shape (3, 2, 8); it must be (2, 2, 8)"),
    ("append", ([0, 1], K, V, [3, 3]), ValueError, "k has shape (2, 3, 2, 8); it must be (6, 2, 8)"),
    (
        "append",
        ([0, 1], K[0], V[0], torch.tensor([1, 2])),
        TypeError,
        "lengths is tensor([1, 2]); it must be an int on the host",
    ),
    (
        "append",
        (0, *tokens(1, 30)),
        ValueError,
        "k brings 30 tokens more to sequence [0], which has 5; max_pages_per_sequence gives room for 32",
    ),
    (
        "reserve",
        ([1, 0], [0, 28]),
        ValueError,
        "num_tokens brings 28 tokens more to sequence [1], which has 5; max_pages_per_sequence gives room for 32",
    ),
    (
        "allocate",
        (33,),
        ValueError,
        "num_tokens brings 33 tokens more to sequence [0], which has 0; max_pages_per_sequence gives room for 32",
    ),
    ("allocate", ([1, None],), TypeError, "num_tokens[1] is None; it must be an int on the host"),
    ("allocate", (-1,), ValueError, "num_tokens has -1; it must be >= 0"),
    ("reserve", ([0, 1], [1]), ValueError, "num_tokens has 1 entries; there are 2 sequences"),
    ("reserve", (0, 2.5), TypeError, "num_tokens is 2.5; it must be an int on the host"),
    ("advance", (0, 4), ValueError, "num_tokens is 4 for sequence 0; 3 are reserved; call reserve first"),
    ("advance", ([0, 1], -1), ValueError, "num_tokens has -1; it must be >= 0"),
    ("slots", (0, 4), ValueError, "num_tokens is 4 for sequence 0; 3 are reserved; call reserve first"),
    ("fork", (7,), ValueError, "ids [0] is 7; no such sequence; ids come from allocate and fork"),
    ("fork", ([0],), TypeError, "ids[0] is [0]; it must be an int on the host"),
    ("free", ([1, 4],), ValueError, "ids [1] is 4; no such sequence; ids come from allocate and fork"),
    ("free", ([1, 1],), ValueError, "ids is [1, 1]; every sequence may come once"),
    ("truncate", (0, 6), ValueError, "length is 6 for sequence 0; it must be 0 to its length 5"),
    ("truncate", ([0, 1], [5, 1]), ValueError, "length is 1 for sequence 1; it must be 0 to its length 0"),
    ("truncate", (0, -1), ValueError, "length has -1; it must be >= 0"),
    ("view", ([5],), ValueError, "ids [0] is 5; no such sequence; ids come from allocate and fork"),
    ("length", (5,), ValueError, "ids [0] is 5; no such sequence; ids come from allocate and fork"),
    (
        "shared_prefix_len",
        ([0, 5],),
        ValueError,
        "ids [1] is 5; no such sequence; ids come from allocate and fork",
    ),
    (
        "shared_prefix",
        ([0, 5],),
        ValueError,
        "ids [1] is 5; no such sequence; ids come from allocate and fork",
    ),
    (
        "shared_prefix",
        (torch.tensor([0, 1]),),
        TypeError,
        "ids is tensor([0, 1]); it must be an int on the host",
    ),
    ("write", ([0], K[0], V[0]), TypeError, "slots is a list; it must be a torch.Tensor"),
    (
        "write",
        (torch.zeros(3, 1).int(), K[0], V[0]),
        ValueError,
        "slots has shape (3, 1); it must be (tokens,)",
    ),
    (
        "write",
        (torch.zeros(3), K[0], V[0]),
        ValueError,
        "slots has dtype torch.float32; it must be int64 or int32",
    ),
    (
        "write",
        (torch.zeros(3, device="meta").int(), K[0], V[0]),
        ValueError,
        "slots is on meta; it must be on the cache's cpu",
    ),
    ("write", (torch.arange(2), K[0], V[0]), ValueError, "k has shape (3, 2, 8); it must be (2, 2, 8)"),
    ("write", (torch.arange(3), K[0], V[0, :2]), ValueError, "v has shape (2, 2, 12); it must be (3, 2, 12)"),
    (
        "write",
        (torch.tensor([0, -2, 2]), K[0], V[0]),
        ValueError,
        "slots [1] is -2; a slot must be 0 to 47, or -1 for padding",
    ),
    (
        "write",
        (torch.tensor([-1, 1, 48]), K[0], V[0]),
        ValueError,
        "slots [2] is 48; a slot must be 0 to 47, or -1 for padding",
    ),
    (
        "write",
        (torch.arange(3), K[0], V[0], 8),
        ValueError,
        "ids [0] is 8; no such sequence; ids come from allocate and fork",
    ),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda c: f"{c[0]}-{c[3][:32]}")
def test_bad_arguments_change_nothing(call: tuple[str, tuple[Any, ...], type[Exception], str]) -> None:
    method, arguments, kind, message = call
    cache = small_cache()
    before = state_of(cache)
    with pytest.raises(kind) as error:
        getattr(cache, method)(*arguments)
    assert str(error.value) == f"PagedKVCache.{method}: {message}"
    assert_unchanged(cache, before)


@pytest.mark.parametrize("name", ["k", "v"])
def test_tokens_that_require_a_gradient_are_refused(name: str) -> None:
    cache = small_cache()
    given = {"k": K.clone(), "v": V.clone()}
    given[name].requires_grad_()
    before = state_of(cache)
    with pytest.raises(NotImplementedError, match=f"PagedKVCache.append: {name} requires a gradient"):
        cache.append([0, 1], **given)
    assert_unchanged(cache, before)
    with torch.no_grad():
        cache.append([0, 1], **given)
    assert_holds(cache, 1, (K[1], V[1]))


SLOT_CHECKS = [
    ([4, 5, 4], None, "slots [2] is 4, as [0] is; all must differ"),
    ([4, 5, 8], [0], "slots [2] is 8, in page 2; one of the sequences [0] must own that page alone"),
    ([5, 6, 4], 1, "slots [0] is 5, in page 1; one of the sequences [1] must own that page alone"),
    ([5, 6, 3], [0, 1], "slots [2] is 3, in page 0; one of the sequences [0, 1] must own that page alone"),
]


@pytest.mark.parametrize("case", SLOT_CHECKS, ids=lambda c: c[2][:24])
def test_value_checks_of_slots(case: tuple[list[int], Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that come twice, of pages that others own, or that a fork shares."""
    slots, ids, message = case
    cache = small_cache()
    cache.fork(0)  # shares page 0
    cache.write(torch.tensor(slots), K[0], V[0], ids)
    monkeypatch.setenv("HEADFOLD_CHECK", "1")
    before = state_of(cache)
    with pytest.raises(ValueError) as error:
        cache.write(torch.tensor(slots), K[0], V[0], ids)
    assert str(error.value) == f"PagedKVCache.write: {message}"
    assert_unchanged(cache, before)


GOOD: dict[str, Any] = {
    "num_pages": 3,
    "page_size": 4,
    "num_kv_heads": HEADS,
    "head_dim": D,
    "head_dim_v": DV,
    "max_sequences": 2,
    "max_pages_per_sequence": 3,
    "dtype": torch.float32,
    "device": "cpu",
}
KC, VC = torch.zeros(3, 4, HEADS, D), torch.zeros(3, 4, HEADS, DV)
BAD_CACHES: list[tuple[dict[str, Any], type[Exception], str]] = [
    *(
        ({name: 0}, ValueError, f"{name} is 0; it must be 1 to ")
        for name in GOOD
        if name not in ("dtype", "device")
    ),
    *(
        ({name: 2.0}, TypeError, f"{name} is 2.0; it must be an int on the host")
        for name in GOOD
        if name not in ("dtype", "device")
    ),
    ({"head_dim": 257}, ValueError, "head_dim is 257; it must be 1 to 256"),
    ({"head_dim_v": 257}, ValueError, "head_dim_v is 257; it must be 1 to 256"),
    (
        {"max_pages_per_sequence": 2**28 + 1},
        ValueError,
        "max_pages_per_sequence is 268435457; it must be 1 to 268435456",
    ),
    ({"dtype": torch.float64}, ValueError, "dtype is torch.float64; it must be float16, bfloat16 or float32"),
    ({"dtype": None}, ValueError, "dtype is None; it must be float16, bfloat16 or float32"),
    ({"device": None}, TypeError, "device is None; it must be a torch.device or its name"),
    ({"v_cache": None}, ValueError, "v_cache is None; k_cache and v_cache are given both or neither"),
    ({"k_cache": None}, ValueError, "k_cache is None; k_cache and v_cache are given both or neither"),
    ({"k_cache": 1}, TypeError, "k_cache is a int; it must be a torch.Tensor"),
    ({"k_cache": KC[0]}, ValueError, "k_cache has shape (4, 2, 8); it must be (3, 4, 2, 8)"),
    ({"k_cache": VC}, ValueError, "k_cache has shape (3, 4, 2, 12); it must be (3, 4, 2, 8)"),
    ({"v_cache": KC}, ValueError, "v_cache has shape (3, 4, 2, 8); it must be (3, 4, 2, 12)"),
    (
        {"v_cache": VC.half()},
        ValueError,
        "v_cache has dtype torch.float16; it must be the cache's torch.float32",
    ),
    ({"k_cache": KC.to("meta")}, ValueError, "k_cache is on meta; it must be on the cache's cpu"),
    (
        {"k_cache": torch.zeros(3, 4, D, HEADS).transpose(2, 3)},
        ValueError,
        "k_cache has last stride 2; its last dimension must be contiguous",
    ),
    (
        {"v_cache": torch.zeros(1, 4, HEADS, DV).expand(3, 4, HEADS, DV)},
        ValueError,
        "v_cache is expanded (a stride is 0); every element needs its own place",
    ),
]


@pytest.mark.parametrize("bad", BAD_CACHES, ids=lambda bad: bad[2][:40])
def test_bad_caches(bad: tuple[dict[str, Any], type[Exception], str]) -> None:
    changes, kind, message = bad
    PagedKVCache(**{**GOOD, "k_cache": KC, "v_cache": VC})
    with pytest.raises(kind) as error:
        PagedKVCache(**{**GOOD, "k_cache": KC, "v_cache": VC, **changes})
    assert str(error.value).startswith(f"PagedKVCache: {message}")


def test_head_dim_v_defaults_to_head_dim() -> None:
    cache = PagedKVCache(**{**GOOD, "head_dim_v": None})
    assert cache.v_cache.shape == (3, 4, HEADS, D)
