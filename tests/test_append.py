"""headfold::append against its reference: every layout, every byte of the caches compared, and every check."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from headfold.append import AppendInputs, append, check, reference_append
from headfold.backends.cpu_append import rotate
from tests.conftest import CPU, Target

FIELDS = [f.name for f in dataclasses.fields(AppendInputs)]
ROTARY = ("rotary_cos", "rotary_sin", "rotary_seqlens")
Caches = tuple[torch.Tensor, torch.Tensor]

# How engines lay a cache of n rows or pages out: shapes of the buffers, and K and V as views of them.
STORAGES: dict[str, tuple[Callable[..., list[tuple[int, ...]]], Callable[..., Caches]]] = {
    "plain": (
        lambda n, s, h, d, dv: [(n, s, h, d), (n, s, h, dv)],
        lambda b, d: (b[0], b[1]),
    ),
    "halves": (
        lambda n, s, h, d, dv: [(n, 2, s, h, max(d, dv))],
        lambda b, d: (b[0][:, 0, ..., :d], b[0][:, 1]),
    ),
    "side by side": (
        lambda n, s, h, d, dv: [(n, s, h, d + dv)],
        lambda b, d: (b[0][..., :d], b[0][..., d:]),
    ),
    "heads before tokens": (
        lambda n, s, h, d, dv: [(n, h, s, d), (h, n, s, dv)],
        lambda b, d: (b[0].transpose(1, 2), b[1].movedim(0, 2)),
    ),
    "row pitch 2d": (
        lambda n, s, h, d, dv: [(n, s, h, 2 * d), (n, s, h, 2 * dv)],
        lambda b, d: (b[0][..., :d], b[1][..., : b[1].shape[-1] // 2]),
    ),
    "odd pitch and base": (
        lambda n, s, h, d, dv: [(n, s, h, d + 3), (n, s, h, dv + 1)],
        lambda b, d: (b[0][..., 1 : d + 1], b[1][..., 1:]),
    ),
}


@dataclass
class Case:
    """An append, and all bytes that it might touch."""

    x: AppendInputs
    buffers: list[torch.Tensor]
    views: Callable[[list[torch.Tensor]], Caches]


def make(
    starts: Sequence[int] | None,
    counts: Sequence[int],
    *,
    capacity: int = 12,
    page_size: int = 0,
    ragged: bool = False,
    heads: int = 2,
    d: int = 8,
    dv: int | None = None,
    dtype: torch.dtype = torch.float32,
    storage: str = "plain",
    rotary_dim: int = 0,
    interleaved: bool = True,
    rotary_dtype: torch.dtype | None = None,
    rotary_at: Sequence[int] | None = None,
    batch_idx: Sequence[int] | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """Random new tokens for random caches; table entries that no append needs are garbage."""
    g = torch.Generator().manual_seed(seed)
    dv = d if dv is None else dv
    batch, total = len(counts), sum(counts)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype).to(device)

    def ints(values: Sequence[int] | None) -> torch.Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)

    rows = batch if batch_idx is None else max([*batch_idx, 0]) + 2
    if page_size:
        per = -(-capacity // page_size)
        pages = rows * per + 1
        table = torch.randperm(pages, generator=g, dtype=torch.int32)[: rows * per].view(rows, per)
        for i, n in enumerate(counts):
            used = -(-((starts[i] if starts else 0) + n) // page_size)
            table[i if batch_idx is None else max(batch_idx[i], 0), used:] = 2**31 - 1
        sizes, table = (pages, page_size), table.to(device)
    else:
        sizes, table = (rows, capacity), None
    shapes, views = STORAGES[storage]
    buffers = [rand(*shape) for shape in shapes(*sizes, heads, d, dv)]
    lead = (total,) if ragged else (batch, counts[0] if counts else 0)
    k_cache, v_cache = views(buffers, d)
    angles = torch.rand(40, rotary_dim // 2, generator=g) * 6.3
    cos, sin = (t.to(rotary_dtype or dtype).to(device) for t in (angles.cos(), angles.sin()))
    x = AppendInputs(
        k_cache,
        v_cache,
        rand(*lead, heads, d),
        rand(*lead, heads, dv),
        cache_seqlens=ints(starts),
        cu_seqlens_k_new=ints([sum(counts[:i]) for i in range(batch + 1)]) if ragged else None,
        page_table=table,
        cache_batch_idx=ints(batch_idx),
        rotary_cos=cos if rotary_dim else None,
        rotary_sin=sin if rotary_dim else None,
        rotary_seqlens=ints(rotary_at),
        rotary_interleaved=interleaved,
    )
    return Case(x, buffers, lambda b: views(b, d))


def call(x: AppendInputs) -> torch.Tensor:
    return append(*(getattr(x, name) for name in FIELDS))[0]


def on_cpu(x: AppendInputs, **changes: Any) -> AppendInputs:
    values = {name: getattr(x, name) for name in FIELDS} | changes
    return AppendInputs(**{n: v.cpu() if isinstance(v, torch.Tensor) else v for n, v in values.items()})


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.cpu().view(torch.int16 if t.element_size() == 2 else torch.int32)


def reference(case: Case) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """(lengths, the buffers at float64 as they must be, which of their elements are written)."""
    want = [b.cpu().double() for b in case.buffers]
    k_cache, v_cache = case.views(want)
    lengths = reference_append(on_cpu(case.x, k_cache=k_cache, v_cache=v_cache))
    written = [torch.zeros(b.shape, dtype=torch.float64) for b in case.buffers]
    k_cache, v_cache = case.views(written)
    ones = {"k": torch.ones_like(case.x.k), "v": torch.ones_like(case.x.v)}
    reference_append(
        on_cpu(case.x, k_cache=k_cache, v_cache=v_cache, **ones, **dict.fromkeys(ROTARY)),
    )
    return lengths, want, [w.bool() for w in written]


def assert_appends(case: Case, device: str) -> None:
    """The buffers and lengths after an append are the reference's: not rotated, not written: bit for bit."""
    x, before = case.x, [b.clone() for b in case.buffers]
    inputs = [(getattr(x, n), getattr(x, n).clone()) for n in FIELDS[2:] if hasattr(getattr(x, n), "clone")]
    lengths, want, written = reference(case)
    got = call(x)
    assert got.dtype == torch.int32
    assert got.device.type == device
    assert torch.equal(got.cpu(), lengths)
    for old, new, w in zip(before, case.buffers, written, strict=True):
        assert torch.equal(bits(old)[~w], bits(new)[~w]), "bytes outside the new tokens changed"
    for t, copy in inputs:
        assert torch.equal(
            bits(t) if t.is_floating_point() else t, bits(copy) if t.is_floating_point() else copy
        )
    (k, v), (k_want, v_want) = case.views(case.buffers), case.views(want)
    assert torch.equal(v.cpu().double(), v_want)
    turned = 0 if x.rotary_cos is None else 2 * x.rotary_cos.shape[1]
    assert torch.equal(k[..., turned:].cpu().double(), k_want[..., turned:])
    # float32 arithmetic on values up to 5, then one rounding, to half a unit of the dtype.
    ulp = torch.finfo(x.k.dtype).eps / 2
    torch.testing.assert_close(k.cpu().double(), k_want, rtol=ulp, atol=2e-6, equal_nan=True)


# ---- results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("page_size", [0, 1, 3, 16])
def test_every_layout(target: Target, page_size: int, ragged: bool) -> None:
    counts = [2, 0, 5] if ragged else [3, 3, 3]
    for dtype in target.dtypes:
        case = make(
            [4, 0, 7], counts, page_size=page_size, ragged=ragged, dtype=dtype, dv=5, device=target.device
        )
        assert_appends(case, target.device)


@pytest.mark.parametrize("page_size", [1, 3, 4])
def test_across_page_boundaries_and_to_the_end_of_the_last_page(target: Target, page_size: int) -> None:
    case = make([2, 8, 0], [4, 4, 12], page_size=page_size, ragged=True, device=target.device)
    assert_appends(case, target.device)
    case = make([8, 8], [4, 4], page_size=page_size, rotary_dim=4, device=target.device)
    assert_appends(case, target.device)


def test_without_lengths_the_cache_is_filled_from_its_start(target: Target) -> None:
    for page_size in (0, 3):
        case = make(None, [5, 5], page_size=page_size, rotary_dim=8, device=target.device)
        assert_appends(case, target.device)


@pytest.mark.parametrize("ragged", [False, True])
def test_many_tokens_take_many_tiles(target: Target, ragged: bool) -> None:
    """Three heads of width 16: a tile is 128 rows, and no multiple of three."""
    counts = [0, 100, 0, 43, 44] if ragged else [100, 100]
    case = make(
        [3] * len(counts),
        counts,
        capacity=112,
        page_size=16,
        ragged=ragged,
        heads=3,
        d=16,
        rotary_dim=6,
        device=target.device,
    )
    case.x.rotary_seqlens = torch.full_like(case.x.cache_seqlens, -2)  # some positions lie outside
    assert_appends(case, target.device)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("d", "rotary_dim"), [(8, 8), (8, 2), (10, 6), (7, 6), (24, 20), (2, 2)])
def test_rotary(target: Target, d: int, rotary_dim: int, interleaved: bool) -> None:
    for dtype in target.dtypes:
        case = make(
            [4, 1],
            [3, 3],
            d=d,
            dtype=dtype,
            rotary_dim=rotary_dim,
            interleaved=interleaved,
            device=target.device,
        )
        assert_appends(case, target.device)


@pytest.mark.parametrize("interleaved", [True, False])
def test_angles_may_be_float32_and_positions_other_than_the_lengths(
    target: Target, interleaved: bool
) -> None:
    case = make(
        [4, 1, 9],
        [2, 0, 3],
        ragged=True,
        page_size=3,
        dtype=torch.float16,
        rotary_dim=4,
        rotary_dtype=torch.float32,
        interleaved=interleaved,
        rotary_at=[7, 0, 30],
        device=target.device,
    )
    assert_appends(case, target.device)
    assert_appends(
        dataclasses.replace(case, x=dataclasses.replace(case.x, rotary_seqlens=None)), target.device
    )


@pytest.mark.parametrize("storage", ["plain", "side by side"])
def test_angles_may_be_two_halves_of_one_table(target: Target, storage: str) -> None:
    """vLLM keeps (max_len, rotary_dim) with the cosines first: its rows are longer than either half."""
    case = make([4, 1], [3, 3], rotary_dim=4, storage=storage, device=target.device)
    both = torch.cat((case.x.rotary_cos, case.x.rotary_sin), dim=1)  # type: ignore[arg-type]
    case.x.rotary_cos, case.x.rotary_sin = both[:, :2], both[:, 2:]
    assert_appends(case, target.device)


@pytest.mark.parametrize("page_size", [0, 3])
def test_sequences_may_choose_their_cache_rows(target: Target, page_size: int) -> None:
    for ragged in (False, True):
        case = make(
            [4, 1, 9],
            [3, 3, 3],
            page_size=page_size,
            ragged=ragged,
            batch_idx=[3, 0, 4],
            rotary_dim=4,
            device=target.device,
        )
        assert_appends(case, target.device)


@pytest.mark.parametrize("page_size", [0, 3])
@pytest.mark.parametrize("storage", STORAGES)
def test_strides_as_engines_lay_caches_out(target: Target, storage: str, page_size: int) -> None:
    for dtype in target.dtypes:
        case = make(
            [4, 1],
            [3, 3],
            page_size=page_size,
            storage=storage,
            dtype=dtype,
            rotary_dim=6,
            device=target.device,
        )
        assert_appends(case, target.device)


def test_new_tokens_with_strides_of_their_own(target: Target) -> None:
    """Slices of a fused projection, and one value given to all heads."""
    for ragged in (False, True):
        case = make([4, 1], [3, 3], ragged=ragged, rotary_dim=4, interleaved=False, device=target.device)
        fused = torch.cat((case.x.v, case.x.k, case.x.v), dim=-2)
        case.x.k, case.x.v = fused[..., 2:4, :], fused[..., :1, :].expand_as(case.x.v)
        assert_appends(case, target.device)


def test_random_cases(target: Target) -> None:
    for seed in range(30):
        r = random.Random(seed)
        batch, ragged = r.randint(1, 4), r.random() < 0.5
        counts = [r.randint(0, 6) for _ in range(batch)] if ragged else [r.randint(0, 6)] * batch
        d = r.choice([2, 3, 8, 16, 20])
        case = make(
            [r.randint(0, 20 - n) for n in counts],
            counts,
            capacity=20,
            page_size=r.choice([0, 1, 2, 5, 16]),
            ragged=ragged,
            heads=r.randint(1, 5),
            d=d,
            dv=r.choice([d, 1, 9]),
            dtype=r.choice(target.dtypes),
            storage=r.choice([s for s in STORAGES if s != "halves"]),
            rotary_dim=r.choice([0, 2, d // 2 * 2]),
            interleaved=r.random() < 0.5,
            rotary_at=r.choice([None, [r.randint(0, 30) for _ in counts]]),
            batch_idx=r.choice([None, r.sample(range(6), batch)]),
            device=target.device,
            seed=seed,
        )
        if case.x.rotary_cos is None:
            case.x.rotary_seqlens = None
        assert_appends(case, target.device)


# ---- tokens without a place: nothing is read or written there -----------------------------------------------


@pytest.mark.parametrize("page_size", [0, 3, 12])
def test_tokens_that_do_not_fit_write_nothing(target: Target, page_size: int) -> None:
    """The length returned is what is there, so that nobody reads beyond the cache."""
    case = make([4, 1, 0], [4, 4, 4], page_size=page_size, rotary_dim=4, device=target.device)
    if case.x.page_table is not None:
        case.x.page_table.copy_(torch.arange(case.x.page_table.numel()).view_as(case.x.page_table))
    for starts in ([10, 12, 2**31 - 1], [-1, -9, -(2**31)], [3, 8, 2**30]):
        case.x.cache_seqlens = torch.tensor(starts, dtype=torch.int32, device=target.device)
        assert_appends(case, target.device)
    assert call(case.x).tolist() == [7, 12, 12]


def test_a_sequence_of_no_cache_row_has_length_0(target: Target) -> None:
    """cache_batch_idx -1 is how a padded batch of a captured graph leaves a sequence out."""
    for page_size in (0, 3):
        case = make(
            [4, 1, 2],
            [3, 3, 3],
            page_size=page_size,
            batch_idx=[2, -1, 9],
            rotary_dim=4,
            device=target.device,
        )
        case.x.cache_batch_idx[2] = case.x.cache_rows  # type: ignore[index]
        assert_appends(case, target.device)
        assert call(case.x).tolist() == [7, 0, 0]


def test_pages_that_are_not_there_take_nothing(target: Target) -> None:
    case = make([4, 1, 2], [3, 3, 3], page_size=3, rotary_dim=4, device=target.device)
    case.x.page_table[0, 1] = -1  # type: ignore[index]
    case.x.page_table[1, 0] = case.x.k_cache.shape[0]  # type: ignore[index]
    case.x.page_table[2, 1] = 2**31 - 1  # type: ignore[index]
    assert_appends(case, target.device)


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_position_without_angles_is_nan(target: Target, interleaved: bool) -> None:
    """Only in the columns that would have been rotated: wrong keys must not pass for right ones."""
    case = make(
        [4, 1],
        [3, 3],
        rotary_dim=4,
        rotary_at=[38, -1],
        interleaved=interleaved,
        device=target.device,
    )
    assert_appends(case, target.device)
    assert case.x.k_cache[0, 6, :, :4].isnan().all()
    assert not case.x.k_cache[0, :6].isnan().any()
    assert case.x.k_cache[1, 1, :, :4].isnan().all()


def test_nothing_to_append(target: Target) -> None:
    assert_appends(make([4, 12], [0, 0], device=target.device), target.device)
    assert_appends(make([4, 12], [0, 0], ragged=True, page_size=3, device=target.device), target.device)
    for ragged in (False, True):
        empty = make([], [], ragged=ragged, device=target.device)
        assert call(empty.x).shape == (0,)


def test_twice_gives_the_same_bits(target: Target) -> None:
    first, second = (
        make([4, 1], [3, 3], d=16, rotary_dim=12, page_size=3, device=target.device) for _ in range(2)
    )
    call(first.x), call(second.x)
    call(second.x)
    assert all(torch.equal(a, b) for a, b in zip(first.buffers, second.buffers, strict=True))


# ---- rotate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", CPU.dtypes)
def test_rotate_is_the_appends_rotation(dtype: torch.dtype, interleaved: bool) -> None:
    """q (b, s, h, d) and (total, h, d): the same bits as keys that were appended."""
    case = make([4, 1], [3, 3], dtype=dtype, rotary_dim=6, interleaved=interleaved)
    x = case.x
    positions = torch.tensor([[4, 5, 6], [1, 2, 3]], dtype=torch.int32)
    before = x.k.clone()
    turned = rotate(x.k, x.rotary_cos, x.rotary_sin, positions, interleaved)  # type: ignore[arg-type]
    assert torch.equal(x.k, before)
    flat = rotate(x.k.flatten(0, 1), x.rotary_cos, x.rotary_sin, positions.flatten(), interleaved)  # type: ignore[arg-type]
    assert torch.equal(turned.flatten(0, 1), flat)
    call(x)
    assert torch.equal(turned[0], x.k_cache[0, 4:7])
    assert torch.equal(turned[1], x.k_cache[1, 1:4])


# ---- as PyTorch sees it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [0, 3])
@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck(page_size: int, ragged: bool) -> None:
    case = make([4, 1], [3, 3], page_size=page_size, ragged=ragged, batch_idx=[2, 0], rotary_dim=4)
    torch.library.opcheck(append, tuple(getattr(case.x, name) for name in FIELDS))


def test_fake_and_meta_agree_with_real() -> None:
    case = make([4, 1], [2, 4], ragged=True, page_size=3, rotary_dim=4)
    real = call(case.x)
    with FakeTensorMode() as mode:
        moved = [getattr(case.x, n) for n in FIELDS]
        fake, _ = append(*(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in moved))
    meta, _ = append(*(t.to("meta") if isinstance(t, torch.Tensor) else t for t in moved))
    for t in (fake, meta):
        assert (t.shape, t.dtype, t.stride()) == (real.shape, real.dtype, real.stride())
    bad = dataclasses.replace(case.x, v=case.x.v[:3])
    with mode, pytest.raises(ValueError, match="v has shape"):
        append(
            *(
                mode.from_tensor(t) if isinstance(t, torch.Tensor) else t
                for t in map(bad.__getattribute__, FIELDS)
            )
        )


@pytest.mark.parametrize("storage", ["plain", "halves"])
def test_compiled_whole(target: Target, storage: str) -> None:
    """Under torch.compile the caches are written in place, also as two halves of one tensor."""
    eager, traced = (make([4, 1], [3, 3], storage=storage, device=target.device) for _ in range(2))
    want = call(eager.x)
    got = torch.compile(call, backend="aot_eager", fullgraph=True)(traced.x)
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(eager.buffers, traced.buffers, strict=True))


# ---- errors: before anything is written ---------------------------------------------------------------------

Change = Callable[[AppendInputs], dict[str, Any]]
DENSE: dict[str, Any] = {}
PAGED, RAGGED, TURNED = {"page_size": 3}, {"ragged": True}, {"rotary_dim": 4}
ERRORS: list[tuple[dict[str, Any], Change, str]] = [
    (DENSE, lambda x: {"k_cache": x.k_cache.int()}, "k_cache has dtype torch.int32; it must be float16 or"),
    (DENSE, lambda x: {"k_cache": x.k_cache.mT.contiguous().mT}, "k_cache has last stride 2"),
    (DENSE, lambda x: {"k_cache": x.k_cache[0]}, r"k_cache has shape \(12, 2, 8\); it must be \(rows"),
    (PAGED, lambda x: {"k_cache": x.k_cache[0]}, r"must be \(pages, page_size, hk, d\), since page_table"),
    (DENSE, lambda x: {"k_cache": x.k_cache[:1].expand(2, -1, -1, -1)}, "k_cache is expanded"),
    (DENSE, lambda x: {"k_cache": x.k_cache[:1], "v_cache": x.v_cache[:1]}, "k_cache has 1 rows; without"),
    (PAGED, lambda x: {"k_cache": x.k_cache[:, :0], "v_cache": x.v_cache[:, :0]}, "page_size must be at"),
    (DENSE, lambda x: {"k_cache": x.k_cache[:, :, :0], "v_cache": x.v_cache[:, :, :0]}, "has no heads"),
    ({"d": 257}, lambda x: {}, "k_cache has head dimension 257; it must be 1 to 256"),
    ({"capacity": 2}, lambda x: {}, "k has 3 tokens a sequence; the cache has room for 2"),
    ({"capacity": 2, **PAGED}, lambda x: {"page_table": x.page_table[:, :0]}, "the cache has room for 0"),
    (PAGED, lambda x: {"page_table": x.page_table[:, :1].expand(2, 2**29)}, "page_table has last stride 0"),
    (
        DENSE,
        lambda x: {"v_cache": x.v_cache.half()},
        "v_cache has dtype torch.float16; it must have k_cache's",
    ),
    (DENSE, lambda x: {"v_cache": x.v_cache[:, :4]}, "v_cache has shape .* must equal k_cache's"),
    (DENSE, lambda x: {"v_cache": x.v_cache[:, :, :1].expand_as(x.v_cache)}, "v_cache is expanded"),
    (DENSE, lambda x: {"k": x.k.half()}, "k has dtype torch.float16; it must have k_cache's"),
    (DENSE, lambda x: {"k": x.k[0]}, r"k has shape \(3, 2, 8\); it must be \(b, s_new"),
    (RAGGED, lambda x: {"k": x.k[None]}, r"must be \(total_new, hk, d\), since cu_seqlens_k_new"),
    (DENSE, lambda x: {"k": x.k[:, :, :1], "v": x.v[:, :, :1]}, "k has shape .* its heads and head dim"),
    (DENSE, lambda x: {"k": x.k[..., :7]}, "k has shape .* must equal k_cache's"),
    (DENSE, lambda x: {"k": x.k.repeat_interleave(2, -1)[..., ::2]}, "k has last stride 2"),
    (DENSE, lambda x: {"v": x.v[..., :7]}, "v has shape .* must equal v_cache's"),
    (DENSE, lambda x: {"v": x.v[:1]}, "v has shape .* must equal k's"),
    (DENSE, lambda x: {"v": x.v.to("meta")}, "v is on meta; it must be on k_cache's device"),
    (DENSE, lambda x: {"cache_seqlens": x.cache_seqlens.long()}, "cache_seqlens has dtype torch.int64"),
    (DENSE, lambda x: {"cache_seqlens": x.cache_seqlens[:1]}, r"has shape \(1\); it must be \(2,\)"),
    (DENSE, lambda x: {"cache_seqlens": x.cache_seqlens.to("meta")}, "cache_seqlens is on meta"),
    (RAGGED, lambda x: {"cu_seqlens_k_new": x.cu_seqlens_k_new.float()}, "cu_seqlens_k_new has dtype"),
    (RAGGED, lambda x: {"cu_seqlens_k_new": x.cu_seqlens_k_new[:0]}, "is empty; it must hold b"),
    (PAGED, lambda x: {"page_table": x.page_table[0]}, "page_table has shape"),
    (PAGED, lambda x: {"page_table": x.page_table[:1]}, r"page_table has .* must be \(2, max_pages\)"),
    (PAGED, lambda x: {"page_table": x.page_table[:, ::2]}, "page_table has last stride 2"),
    (
        {"batch_idx": [1, 0]},
        lambda x: {"cache_batch_idx": x.cache_batch_idx[:1]},
        "cache_batch_idx has shape",
    ),
    (TURNED, lambda x: {"rotary_cos": None}, "rotary_sin is given alone; rotary_cos and"),
    (TURNED, lambda x: {"rotary_sin": None}, "rotary_cos is given alone; rotary_cos and"),
    (DENSE, lambda x: {"rotary_seqlens": x.cache_seqlens}, "rotary_seqlens is given alone"),
    (TURNED, lambda x: {"rotary_cos": x.rotary_cos[:, [0] * 5]}, "rotary_cos has .* rotary_dim <= d = 8"),
    (TURNED, lambda x: {"rotary_cos": x.rotary_cos[:0]}, "rotary_cos has shape .* max_len >= 1"),
    (TURNED, lambda x: {"rotary_cos": x.rotary_cos.half()}, "rotary_cos has dtype .* must be float32"),
    (TURNED, lambda x: {"rotary_sin": x.rotary_sin[:5]}, "rotary_sin is .* it must be rotary_cos's"),
    (TURNED, lambda x: {"rotary_seqlens": x.cache_seqlens[:1]}, "rotary_seqlens has shape"),
]


def assert_refused(case: Case, kind: type[Exception], message: str) -> None:
    """The call raises, and no byte of the caches has changed."""
    before = [b.clone() for b in case.buffers]
    with pytest.raises(kind, match=message):
        call(case.x)
    assert all(torch.equal(a, b) for a, b in zip(before, case.buffers, strict=True))


@pytest.mark.parametrize(("options", "change", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_every_argument_is_checked(options: dict[str, Any], change: Change, message: str) -> None:
    case = make([0, 0], [3, 3], **options)
    case.x = dataclasses.replace(case.x, **change(case.x))
    assert_refused(case, ValueError, f"^append: .*{message}")


def test_messages_name_the_caller() -> None:
    case = make([0, 0], [3, 3])
    case.x = dataclasses.replace(case.x, v=case.x.v[:1], caller="flash_attn_with_kvcache")
    assert_refused(case, ValueError, "^flash_attn_with_kvcache: v has shape")


@pytest.mark.parametrize("name", ["k_cache", "k", "cache_seqlens", "rotary_cos"])
def test_what_is_no_tensor_is_a_type_error(name: str) -> None:
    x = dataclasses.replace(make([0, 0], [3, 3], rotary_dim=4).x, **{name: 3})
    with pytest.raises(TypeError, match=f"^append: {name} is a int; it must be a torch.Tensor"):
        check(x)


def test_the_layout_of_pairs_is_a_flag() -> None:
    x = dataclasses.replace(make([0, 0], [3, 3], rotary_dim=4).x, rotary_interleaved=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rotary_interleaved is 1; it must be True or False"):
        check(x)


def test_no_gradient_goes_through() -> None:
    case = make([0, 0], [3, 3])
    case.x.k.requires_grad_()
    assert_refused(case, NotImplementedError, "append: an input requires a gradient")
    with torch.no_grad():
        call(case.x)


# ---- HEADFOLD_CHECK=1: values are read first ----------------------------------------------------------------

ROWS = {"batch_idx": [2, 0]}
VALUES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        DENSE,
        {"cache_seqlens": [9, 10]},
        r"cache_seqlens \[1\] is 10; sequence 1 gets 3 new tokens and has room",
    ),
    (PAGED, {"cache_seqlens": [10, 0]}, r"cache_seqlens \[0\] is 10; sequence 0 gets 3 .* room for 12"),
    (DENSE, {"cache_seqlens": [0, -1]}, r"cache_seqlens \[1\] is -1"),
    (RAGGED, {"cu_seqlens_k_new": [1, 3, 6]}, r"cu_seqlens_k_new \[0\] is 1; the first offset must be 0"),
    (RAGGED, {"cu_seqlens_k_new": [0, 3, 2]}, r"cu_seqlens_k_new \[2\] is 2, below \[1\] = 3"),
    (RAGGED, {"cu_seqlens_k_new": [0, 3, 7]}, r"cu_seqlens_k_new \[2\] is 7; k has 6 tokens"),
    (
        {"capacity": 5, **RAGGED},
        {"cache_seqlens": None, "cu_seqlens_k_new": [0, 0, 6]},
        "k does not fit; sequence 1",
    ),
    (ROWS, {"cache_batch_idx": [4, 0]}, r"cache_batch_idx \[0\] is 4; a row must be 0 to 3"),
    (ROWS, {"cache_batch_idx": [0, -1]}, r"cache_batch_idx \[1\] is -1"),
    (
        ROWS,
        {"cache_batch_idx": [2, 2]},
        r"cache_batch_idx \[1\] is 2; sequence 0 is appended to the same row",
    ),
    (
        {**ROWS, **PAGED},
        {"cache_batch_idx": [2, 2]},
        r"page_table \[2, 0\] is \d+; sequence 0 is appended to",
    ),
    (PAGED, {"page_table": [[0, 1, 9, 9], [2, 10, 9, 9]]}, r"page_table \[1, 1\] is 10; a page .* 0 to 8"),
    (PAGED, {"page_table": [[0, -1, 9, 9], [2, 3, 9, 9]]}, r"page_table \[0, 1\] is -1"),
    (
        PAGED,
        {"page_table": [[0, 1, 9, 9], [2, 1, 9, 9]]},
        r"page_table \[1, 1\] is 1; sequence 0 is appended",
    ),
    (TURNED, {"rotary_seqlens": [37, 38]}, "rotary_cos has 40 positions; sequence 1 is rotated at 38 to 40"),
    (TURNED, {"rotary_seqlens": [-1, 0]}, "rotary_cos has 40 positions; sequence 0 is rotated at -1 to 1"),
]


def with_values(case: Case, values: dict[str, Any], device: str) -> Case:
    tensors = {
        n: v if v is None else torch.tensor(v, dtype=torch.int32, device=device) for n, v in values.items()
    }
    return dataclasses.replace(case, x=dataclasses.replace(case.x, **tensors))


@pytest.mark.parametrize(("options", "values", "message"), VALUES, ids=[v[2][:40] for v in VALUES])
def test_checked_values_change_nothing(
    target: Target,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    values: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setenv("HEADFOLD_CHECK", "1")
    case = with_values(make([1, 1], [3, 3], device=target.device, **options), values, target.device)
    assert_refused(case, ValueError, f"^append: {message}")


@pytest.mark.parametrize("page_size", [0, 3])
def test_checked_values_let_right_ones_pass(
    target: Target, monkeypatch: pytest.MonkeyPatch, page_size: int
) -> None:
    """Shared pages that are only read, garbage past the end, and sequences that append nothing anywhere."""
    monkeypatch.setenv("HEADFOLD_CHECK", "1")
    case = make(
        [6, 6, 10, 10],
        [3, 6, 0, 0],
        page_size=page_size,
        ragged=True,
        batch_idx=[3, 0, 1, 1],
        rotary_dim=4,
        rotary_at=[37, 0, 99, -5],
        device=target.device,
    )
    if case.x.page_table is not None:
        case.x.page_table[3, :2] = case.x.page_table[0, :2]
    assert_appends(case, target.device)


@pytest.mark.parametrize("values", [{"cache_seqlens": [11, 12]}, {"rotary_seqlens": [99, -1]}])
def test_unchecked_values_are_not_read(monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]) -> None:
    monkeypatch.delenv("HEADFOLD_CHECK", raising=False)
    case = with_values(make([1, 1], [3, 3], rotary_dim=4), values, "cpu")
    assert_appends(case, "cpu")
