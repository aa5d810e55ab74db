"""New tokens that the decode kernel writes itself: the bits of an append and an attention in turn, in one launch."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import headfold
from headfold import append, appending, backends, prepared
from headfold.backends import append as append_launcher
from headfold.backends import besides
from headfold.backends import triton as launcher
from headfold.kernels.parts.new_tokens import cache_rows
from headfold.planner import DEVICES, hopper_decode, make_plan
from headfold.values import value_checks_enabled
from tests.cases import NAN
from tests.conftest import HAS_GPU, Target

CAPACITY = 48


class Counting(launcher.Launcher):
    """A launcher that says what it launches."""

    names: list[str]

    def __call__(self, arguments: tuple[int | float, ...]) -> None:
        self.names.append(self._kernel.fn.__name__)
        super().__call__(arguments)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched from now on, calls kept before forgotten."""
    Counting.names = []
    monkeypatch.setattr(launcher, "Launcher", Counting)
    monkeypatch.setattr(append_launcher, "Launcher", Counting)
    prepared._kept.clear()
    return Counting.names


def step(device: str, *, seed: int = 0, **options: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(arguments of a step, its caches): three sequences, or as `options` say."""
    o = {
        "lens": (5, 30, 0),
        "new": 1,
        "sq": 1,
        "heads": (4, 2),
        "dims": (16, 16),
        "page_size": 0,
        "dtype": torch.float32,
        "rotary_dim": 0,
        "rotary_interleaved": False,
        **options,
    }
    g = torch.Generator().manual_seed(seed)
    h, hk = o["heads"]
    d, dv = o["dims"]
    batch, size = len(o["lens"]), o["page_size"]

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(o["dtype"]).to(device)

    lead = (batch * CAPACITY // size, size) if size else (batch, CAPACITY)
    caches = {"k_cache": rand(*lead, hk, d), "v_cache": rand(*lead, hk, dv)}
    x: dict[str, Any] = {
        "q": rand(batch, o["sq"], h, d),
        "k": rand(batch, o["new"], hk, d),
        "v": rand(batch, o["new"], hk, dv),
        "cache_seqlens": torch.tensor(o["lens"], dtype=torch.int32, device=device),
        "causal": True,
        "return_softmax_lse": True,
    }
    if size:
        pages = torch.randperm(lead[0], generator=g).to(torch.int32)
        x["page_table"] = pages.view(batch, -1).to(device)
    if o["rotary_dim"]:
        angles = torch.rand(2, CAPACITY + 30, o["rotary_dim"] // 2, generator=g) * 6
        kind = o.get("angles", o["dtype"])
        x |= {
            "rotary_cos": angles[0].cos().to(kind).to(device),
            "rotary_sin": angles[1].sin().to(kind).to(device),
        }
    return x | {name: o[name] for name in o.keys() & KEYWORDS}, caches


KEYWORDS = {
    "causal",
    "learnable_sink",
    "num_splits",
    "rotary_interleaved",
    "rotary_seqlens",
    "softcap",
    "window_size",
    "pack_gqa",
}


def run(
    x: dict[str, Any], caches: dict[str, torch.Tensor], out: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """(out, LSE, the caches after it) of a step, which leaves the given caches alone."""
    after = {name: t.clone() for name, t in caches.items()}
    return *headfold.flash_attn_with_kvcache(**x, **after, out=out), *after.values()


def in_two_launches(
    monkeypatch: pytest.MonkeyPatch, x: dict[str, Any], caches: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """By the same kernel: the Gluon one, which appends nothing, has other bits."""
    with monkeypatch.context() as m:
        m.setattr(appending, "takes_new_tokens", lambda plan, device: False)
        m.setattr(hopper_decode, "decode_tile", lambda *problem, **how: "")
        prepared._kept.clear()
        make_plan.cache_clear()
        results = run(x, caches)
    prepared._kept.clear()
    make_plan.cache_clear()
    return results


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(s.nan_to_num(7.0), t.nan_to_num(7.0)) for s, t in zip(a, b, strict=True))


def appends_inside(device: str) -> bool:
    """On other GPUs than Hopper's an append is a launch of its own."""
    return device == "cpu" or torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.parametrize("page_size", [0, 1, 8])
@pytest.mark.parametrize("rotary_dim", [0, 16])
def test_one_launch_and_the_bits_of_two(
    kernels: Target, launches: list[str], monkeypatch: pytest.MonkeyPatch, page_size: int, rotary_dim: int
) -> None:
    if not appends_inside(kernels.device):
        pytest.skip("needs a Hopper GPU")
    x, caches = step(kernels.device, page_size=page_size, rotary_dim=rotary_dim)
    got = run(x, caches)
    assert "append_kernel" not in launches
    assert launches.count("decode_kernel") == 1
    want = in_two_launches(monkeypatch, x, caches)
    assert launches.count("append_kernel") == 1
    assert same(got, want)
    assert not torch.equal(got[2], caches["k_cache"]), "nothing was appended"


def test_a_prefix_of_0_takes_no_launch_away(kernels: Target, launches: list[str]) -> None:
    if not appends_inside(kernels.device):
        pytest.skip("needs a Hopper GPU")
    x, caches = step(kernels.device, page_size=8)
    run({**x, "shared_prefix_len": 0}, caches)
    assert "append_kernel" not in launches


def drawn(seed: int, device: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    r = random.Random(seed)
    dtype = r.choice((torch.float16, torch.bfloat16) if device == "cuda" else (torch.float32, torch.float16))
    hk = r.choice((1, 2, 3))
    group = r.choice((1, 2, 4, 7))
    new = r.randint(1, 8)
    sq = r.randint(1, (16 - new) // group)
    heads = (hk * group, hk)
    dims = r.choice(((16, 16), (64, 64), (96, 96), (40, 72), (192, 128), (128, 64)))
    o: dict[str, Any] = {
        "seed": seed,
        "lens": tuple(r.randint(0, CAPACITY - new) for _ in range(r.randint(1, 5))),
        "new": new,
        "sq": sq,
        "heads": heads,
        "dims": dims,
        "dtype": dtype,
        "page_size": r.choice((0, 0, 1, 3, 8, 16)),
        "rotary_dim": r.choice((0, 8, dims[0] // 2 // 2 * 2, dims[0])),
        "angles": r.choice((dtype, torch.float32)),
        "causal": r.random() < 0.7,
        "num_splits": r.choice((0, 0, 1, 3)),
        "window_size": r.choice(((-1, -1), (-1, 0), (new + r.randint(0, 20), 0))),
    }
    if r.random() < 0.4:
        o["softcap"] = 2.0
    if r.random() < 0.4:
        o["learnable_sink"] = torch.randn(heads[0], generator=torch.Generator().manual_seed(seed)).to(device)
    if r.random() < 0.3:
        o["rotary_seqlens"] = torch.tensor([r.randint(0, 20) for _ in o["lens"]], dtype=torch.int32).to(
            device
        )
    if not o["rotary_dim"]:
        o.pop("rotary_seqlens", None)
    return step(device, **o)


@pytest.mark.parametrize("seed", range(60 if HAS_GPU else 10))
def test_drawn_steps(
    kernels: Target, launches: list[str], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Layouts, head dimensions, groups, angles, windows, features and splits: to the bit what two launches give."""
    if not appends_inside(kernels.device):
        pytest.skip("needs a Hopper GPU")
    x, caches = drawn(seed, kernels.device)
    got = run(x, caches)
    assert "append_kernel" not in launches
    assert same(got, in_two_launches(monkeypatch, x, caches))


def test_tokens_without_a_place_are_not_written(kernels: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the capacity, before the first key, and on pages that are not there: as a launch of its own treats them."""
    x, caches = step(kernels.device, lens=(CAPACITY - 1, -1, CAPACITY + 3, 7), new=3, sq=2, rotary_dim=8)
    assert same(run(x, caches), in_two_launches(monkeypatch, x, caches))


@triton.jit
def places_kernel(table, Keys, Values, There, first, pages, magic: tl.uint32, shift: tl.uint32):
    """Where keys first.. of a sequence lie in pages of 8, for keys of 16 and values of 32 columns."""
    i = tl.arange(0, 4)
    keys, values, there = cache_rows(
        first + i, i < 3, table, pages, (8, magic, shift), (128, 16), (256, 32), True, 1
    )
    tl.store(Keys + i, keys)
    tl.store(Values + i, values)
    tl.store(There + i, there.to(tl.int32))


def test_a_page_that_is_not_there_takes_nothing(kernels: Target) -> None:
    """Of tokens at 7, 8 and 9 the first lies on page 1, the others on a page that a cache of two does not have."""
    for missing in (-1, 2, 99):
        keys, values = torch.zeros(2, 4, dtype=torch.int64, device=kernels.device)
        there = torch.zeros(4, dtype=torch.int32, device=kernels.device)
        table = torch.tensor([1, missing], dtype=torch.int32, device=kernels.device)
        places_kernel[(1,)](table, keys, values, there, 7, 2, *besides.division(8))
        assert there.tolist() == [1, 0, 0, 0], missing
        assert (keys[0].item(), values[0].item()) == (128 + 7 * 16, 256 + 7 * 32)
    table[1] = 0
    places_kernel[(1,)](table, keys, values, there, 7, 2, *besides.division(8))
    assert there.tolist() == [1, 1, 1, 0]
    assert keys.tolist()[:3] == [128 + 7 * 16, 0, 16]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"new": 9}, "more tokens than a program writes at once"),
        ({"sq": 5, "heads": (8, 2)}, "rows that another kernel takes, or a program that does not append"),
        ({"heads": (16, 1)}, "no row of the tile left for the new key"),
        ({"rotary_dim": 16, "rotary_interleaved": True}, "pairs side by side"),
        ({"new": 4, "window_size": (1, 0)}, "tokens that no query sees"),
    ],
)
def test_other_calls_append_before(
    kernels: Target, launches: list[str], change: dict[str, Any], why: str
) -> None:
    x, caches = step(kernels.device, **change)
    run(x, caches)
    assert launches.count("append_kernel") == 1, why


def test_steps_are_kept_and_played_again(kernels: Target, launches: list[str]) -> None:
    """A step that looks like an earlier one goes straight to its launch, on its own tensors."""
    for seed in range(3):
        x, caches = step(kernels.device, seed=seed, rotary_dim=16)
        got = run(x, caches)
        prepared_before = dict(prepared._kept)
        prepared._kept.clear()
        want = run(x, caches)
        assert same(got, want)
        prepared._kept.clear()
        prepared._kept.update(prepared_before)
    assert "append_kernel" not in launches or not appends_inside(kernels.device)


def test_results_may_be_given(kernels: Target) -> None:
    x, caches = step(kernels.device, rotary_dim=8)
    want = run(x, caches)
    out = torch.full_like(want[0], NAN)
    got = run(x, caches, out=out)
    assert got[0] is out
    assert same(got, want)
    assert same(run(x, caches, out=out), want)  # kept


def inputs_of(x: dict[str, Any], caches: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The operator's arguments of a step without rotation."""
    return {
        "q": x["q"],
        "k": caches["k_cache"],
        "v": caches["v_cache"],
        "seqused_k": x["cache_seqlens"],
        "page_table": x.get("page_table"),
        "window_right": 0,
        "new_k": x["k"],
        "new_v": x["v"],
    }


@pytest.mark.parametrize("page_size", [0, 8])
def test_opcheck(kernels: Target, page_size: int) -> None:
    """The caches are declared as written, and fakes look like the results."""
    if not appends_inside(kernels.device):
        pytest.skip("needs a Hopper GPU")
    x, caches = step(kernels.device, page_size=page_size)
    args = inputs_of(x, caches)
    new, into = appending.OPERATORS
    torch.library.opcheck(new, (), args)
    out = torch.zeros_like(x["q"])
    lse = out.new_zeros(out.shape[0], out.shape[2], out.shape[1], dtype=torch.float32)
    torch.library.opcheck(into, (), {**args, "out": out, "lse": lse})


def test_the_operator_refuses_what_no_program_appends_to() -> None:
    x, caches = step("cpu")
    before = caches["k_cache"].clone()
    with pytest.raises(
        ValueError, match="new_k cannot be written by the attention of this call; append it before"
    ):
        appending.OPERATORS[0](**inputs_of(x, caches))
    assert torch.equal(caches["k_cache"], before)


def test_values_are_checked_before_anything_is_written(
    kernels: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not appends_inside(kernels.device):
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setenv("HEADFOLD_CHECK", "1")
    assert value_checks_enabled()
    x, caches = step(kernels.device, lens=(5, CAPACITY, 0))
    before = caches["k_cache"].clone()
    for call in (
        lambda: headfold.flash_attn_with_kvcache(**x, **caches),
        lambda: appending.OPERATORS[0](**inputs_of(x, caches)),
    ):
        with pytest.raises(ValueError, match=rf"\[1\] is {CAPACITY}; sequence 1 gets 1 new tokens"):
            call()
    assert torch.equal(caches["k_cache"], before)


def test_the_plan_says_so() -> None:
    x, caches = step("cpu", page_size=8)
    y = appending.AppendingInputs(**inputs_of(x, caches))
    with backends.force(DEVICES["h200"]):
        plan = appending.plan_of(y)
    assert plan is not None
    assert plan.appends
    assert plan.reasons[-1] == "every program writes the new keys of its share"
    with backends.force(DEVICES["a100"]):
        assert appending.plan_of(y) is None
    assert append.check(appending.append_of(y)) is None
