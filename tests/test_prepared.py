"""A call that looks like an earlier one is not checked and planned again; any other is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

import headfold
from headfold import backends, ops, prepared
from headfold.append import AppendInputs
from headfold.append import facts_of as append_facts_of
from headfold.planner import DEVICES, Plan, device
from headfold.problem import Inputs
from tests.planner.tables import pair


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Every test starts with nothing kept."""
    prepared._kept.clear()
    yield
    prepared._kept.clear()


def call(**change: Any) -> Inputs:
    """A small paged decoding step, changed."""
    x = Inputs(
        q=torch.randn(2, 1, 4, 16),
        k=torch.randn(6, 8, 2, 16),
        v=torch.randn(6, 8, 2, 16),
        page_table=torch.arange(6, dtype=torch.int32).view(2, 3),
        seqused_k=torch.tensor([5, 20], dtype=torch.int32),
    )
    return replace(x, **change)


def run(x: Inputs) -> torch.Tensor:
    """Through the operator."""
    return ops.attention(**{name: getattr(x, name) for name in Inputs.__slots__})[0]


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[Inputs]:
    """The inputs that were checked since."""
    checked: list[Inputs] = []
    before = ops.check

    def check(x: Inputs) -> None:
        checked.append(x)
        before(x)

    monkeypatch.setattr(ops, "check", check)
    return checked


def test_the_second_call_is_neither_checked_nor_planned(checks: list[Inputs]) -> None:
    """And reads its own tensors: other values, other results."""
    first = call()
    out = run(first)
    second = replace(first, q=torch.randn_like(first.q), seqused_k=torch.tensor([1, 24], dtype=torch.int32))
    other = run(second)
    assert len(checks) == 1
    prepared._kept.clear()
    assert torch.equal(run(first), out)
    assert torch.equal(run(second), other)
    assert not torch.equal(out, other)


CHANGES: dict[str, Callable[[Inputs], dict[str, Any]]] = {
    "shape": lambda x: {"q": torch.randn(2, 2, 4, 16)},
    "stride": lambda x: {"q": torch.randn(2, 1, 4, 32)[..., :16]},
    "dtype": lambda x: {n: getattr(x, n).half() for n in ("q", "k", "v")},
    "alignment": lambda x: {"q": torch.randn(129)[1:].view(2, 1, 4, 16)},
    "a tensor more": lambda x: {"sink": torch.zeros(4)},
    "scale": lambda x: {"softmax_scale": 0.5},
    "window": lambda x: {"window_left": 3},
    "softcap": lambda x: {"softcap": 2.0},
    "splits": lambda x: {"num_splits": 2},
    "caller": lambda x: {"caller": "somebody"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_that_looks_different_is_checked(checks: list[Inputs], change: str) -> None:
    """Each fact alone makes another call."""
    x = call()
    run(x)
    run(replace(x, **CHANGES[change](x)))
    assert len(checks) == 2


def test_every_field_of_the_inputs_is_a_fact() -> None:
    """A new argument that is not looked at would be dropped by the second call."""
    x = call()
    for name in Inputs.__slots__:
        value = getattr(x, name)
        other: Any = torch.zeros(3, 5)
        if isinstance(value, bool):
            other = not value
        elif isinstance(value, str):
            other = "another"
        elif isinstance(value, int | float):
            other = value + 5
        elif value is None and "Tensor" not in Inputs.__annotations__[name]:
            other = 7
        assert prepared.facts_of(replace(x, **{name: other})) != prepared.facts_of(x), name


def test_every_field_of_an_append_is_a_fact() -> None:
    """Likewise."""
    new = torch.randn(2, 1, 2, 16)
    x = AppendInputs(torch.randn(2, 8, 2, 16), torch.randn(2, 8, 2, 16), new, new)
    for field in fields(AppendInputs):
        value = getattr(x, field.name)
        other: Any = torch.zeros(3, 5)
        if isinstance(value, bool):
            other = not value
        elif isinstance(value, str):
            other = "another"
        assert append_facts_of(replace(x, **{field.name: other})) != append_facts_of(x), field.name


def test_a_gradient_is_refused_after_a_call_without(checks: list[Inputs]) -> None:
    """requires_grad and the grad mode are facts: the same tensors may be refused where they were not before."""
    q, k, v = (torch.randn(1, 3, 2, 16) for _ in range(3))
    headfold.flash_attn_func(q, k, v)
    q.requires_grad_()
    with torch.no_grad():
        headfold.flash_attn_func(q, k, v)
    with pytest.raises(NotImplementedError, match="gradient"):
        headfold.flash_attn_func(q, k, v)


def test_a_refused_call_is_refused_again() -> None:
    """Nothing is kept of a call that raised."""
    x = call(window_left=-5)
    for _ in range(2):
        with pytest.raises(ValueError, match="left side -5"):
            run(x)
    assert prepared._kept == {}


def test_a_given_output_is_a_fact() -> None:
    """It may be refused, or lie at another alignment."""
    x = call()
    out = torch.empty(2, 1, 4, 16)
    for _ in range(2):
        headfold.flash_attn_with_kvcache(
            x.q, x.k, x.v, cache_seqlens=x.seqused_k, page_table=x.page_table, out=out
        )
        with pytest.raises(ValueError, match="out"):
            headfold.flash_attn_with_kvcache(
                x.q, x.k, x.v, cache_seqlens=x.seqused_k, page_table=x.page_table, out=out[:1]
            )


def test_a_forced_device_is_a_fact(checks: list[Inputs]) -> None:
    """The plan is another one."""
    x = call()
    run(x)
    with backends.force(DEVICES["h200"]):
        run(x)
    assert len(checks) == 2


def test_own_tiles_of_a_device_are_a_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call runs in the tile of the device in force, whatever was kept before of a call that looks the same."""
    ran: list[tuple[int, bool]] = []

    def prepare(plan: Plan, *args: Any) -> Callable[..., None]:
        return lambda *args: ran.append((plan.block_n, plan.own_tile))

    monkeypatch.setattr("headfold.backends.triton.prepare", prepare)
    x = call(**{name: getattr(call(), name).half() for name in ("q", "k", "v")})
    built_in = DEVICES["h200"]
    small, large = (replace(built_in, tiles=pair(16, 32, keys=n)) for n in (32, 128))
    for on in (built_in, small, large, small, built_in):
        with backends.force(on):
            run(x)
    assert ran == [(256, False), (32, True), (128, True), (32, True), (256, False)]


def test_a_kept_call_does_not_look_for_its_devices_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the driver nor a table's file: the file is read once a process, and not even asked for by a call."""
    x = call()
    run(x)
    asked: list[torch.device] = []
    monkeypatch.setattr(backends, "running_device", lambda where: asked.append(where) or device.cpu_device())
    run(x)
    assert asked == []
    run(replace(x, softcap=2.0))
    assert asked == [x.q.device]


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program whose shapes never repeat forgets from time to time instead of growing."""
    monkeypatch.setattr(prepared, "MOST", 4)
    for n in range(1, 12):
        headfold.flash_attn_func(*(torch.randn(1, n, 1, 8) for _ in range(3)))
        assert len(prepared._kept) <= 4
