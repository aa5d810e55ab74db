"""Decodes from addresses: the launches that the same call's inputs make, by Triton's launcher or past it."""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from headfold.backends import decode_calls, triton
from headfold.backends import launch as door
from headfold.backends.decode_calls import Decode
from headfold.planner import DEVICES, make_plan
from headfold.problem import Inputs, problem_of

LENGTHS = torch.tensor([5, 200], dtype=torch.int32)


class Told(door.Launcher):
    """A launcher that writes down what it is given, and how."""

    launches: list[tuple[str, Any, tuple[Any, ...]]]

    def __call__(self, arguments: tuple[Any, ...]) -> None:
        self.launches.append(("called", self._kernel, arguments))

    def straight(self, stream: int, arguments: tuple[Any, ...]) -> None:
        self.launches.append((f"straight {stream}", self._kernel, arguments))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, tuple[Any, ...]]]:
    """The launches since. Every call has the same workspace."""
    memory = torch.empty(1 << 20)
    monkeypatch.setattr(Told, "launches", [], raising=False)
    monkeypatch.setattr(triton, "Launcher", Told)
    monkeypatch.setattr(decode_calls, "workspace", lambda like, floats: memory[:floats])
    monkeypatch.setattr(decode_calls, "workspace_on", lambda index, stream, like, floats: memory[:floats])
    return Told.launches


def call(rows: int = 256, d: int = 64, **change: Any) -> Inputs:
    """A decoding step of half precision, changed."""
    q = torch.randn(2, 1, 8, d).half()
    k, v = torch.randn(2, 2, rows, 2, d).half().unbind(0)
    return replace(Inputs(q, k, v), **change)


CALLS: dict[str, Inputs] = {
    "even": call(rows=4096),
    "one split": call(rows=16),
    "lengths": call(seqused_k=LENGTHS),
    "long": call(rows=4096, d=128, seqused_k=LENGTHS),
    "window": call(window_left=30, window_right=0),
    "softcap": call(softcap=2.0, softmax_scale=-0.5),
    "ragged": call(
        q=torch.randn(5, 8, 64).half(),
        cu_seqlens_q=torch.tensor([0, 2, 5], dtype=torch.int32),
        seqused_k=LENGTHS,
    ),
    "pages": call(page_table=torch.tensor([[1], [0]], dtype=torch.int32), seqused_k=LENGTHS),
}


def prepared(x: Inputs) -> tuple[Decode, torch.Tensor, torch.Tensor]:
    """What runs a call on an H200, with an output and an LSE."""
    out, lse = torch.empty(x.out_shape, dtype=x.q.dtype), torch.empty(x.lse_shape)
    plan = make_plan(replace(problem_of(x, out), device_type="cuda"), DEVICES["h200"])
    assert plan.kernel == "decode"
    return triton.decode_of(plan, x, out, lse), out, lse


def direct_of(x: Inputs, decode: Decode) -> tuple[Any, list[torch.Tensor], list[int]]:
    """What runs calls that look like x, with x's tensors, the last first."""
    names = [f.name for f in fields(x) if isinstance(getattr(x, f.name), torch.Tensor)][::-1]
    tensors = [getattr(x, name) for name in names]
    direct = decode.from_addresses(x, {name: i for i, name in enumerate(names)}, len(names))
    assert direct is not None
    return direct, tensors, [t.data_ptr() for t in tensors]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("want_lse", [True, False])
def test_addresses_make_the_launches_of_the_inputs(told: list[Any], name: str, want_lse: bool) -> None:
    x = CALLS[name]
    decode, out, lse = prepared(x)
    direct, tensors, addresses = direct_of(x, decode)
    for _ in range(2):
        decode(x, out, lse if want_lse else None)
        expected = list(told)
        told.clear()
        direct(tensors, addresses, out.data_ptr(), lse.data_ptr() if want_lse else None)
        assert len(told) == (1 if decode.merge is None else 2)
        for (_, kernel, arguments), (_, its_kernel, its) in zip(told, expected, strict=True):
            assert kernel is its_kernel
            assert len(arguments) == len(its)
            assert all(a is b or a == b for a, b in zip(arguments, its, strict=True))
        told.clear()
        # Another call that looks the same.
        tensors = [t.clone() for t in tensors]
        addresses = [t.data_ptr() for t in tensors]
        names = [f.name for f in fields(x) if isinstance(getattr(x, f.name), torch.Tensor)][::-1]
        x = replace(x, **dict(zip(names, tensors, strict=True)))


def test_some_of_these_calls_merge_and_some_take_descriptors(told: list[Any]) -> None:
    decodes = [prepared(x)[0] for x in CALLS.values()]
    assert {decode.merge is None for decode in decodes} == {True, False}
    assert {decode.boxes.k is None for decode in decodes} == {True, False}


@pytest.mark.parametrize("feature", ["sink", "cache_leftpad", "early_lengths"])
def test_a_call_with_other_tensors_needs_its_inputs(told: list[Any], feature: str) -> None:
    tensor = torch.zeros(8) if feature == "sink" else LENGTHS
    x = call(seqused_k=LENGTHS, **{feature: tensor})
    decode, _, _ = prepared(x)
    sources = {"q": 0, "k": 1, "v": 2, "seqused_k": 3, feature: 4}
    assert decode.from_addresses(x, sources, 5) is None


class Raw:
    """Launches by the driver, of which it refuses those from `refused` on."""

    def __init__(self, refused: int = 2) -> None:
        self.refused = refused
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, moving: Any, stream: int, maps: Any) -> int:
        self.calls.append((tuple(moving), stream, maps))
        return self.refused


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A pretended device 0, current or not, and a stream."""
    state = SimpleNamespace(current=0, visited=[], undisturbed=True)

    class Visit:
        def __init__(self, device: int) -> None:
            self.before, self.device = state.current, device

        def __enter__(self) -> None:
            state.visited.append(self.device)
            state.current = self.device

        def __exit__(self, *_: object) -> None:
            state.current = self.before

    monkeypatch.setattr(decode_calls, "current_device", lambda: state.current)
    monkeypatch.setattr(decode_calls, "current_stream", lambda index: 100 + index)
    monkeypatch.setattr(decode_calls, "undisturbed", lambda: state.undisturbed)
    monkeypatch.setattr(torch.cuda, "device", Visit)
    return state


def on_gpu(raw: Any) -> tuple[Any, list[torch.Tensor], list[int]]:
    """A call that merges, as if on device 0."""
    x = CALLS["even"]
    decode, _, _ = prepared(x)
    assert decode.merge is not None
    direct, tensors, addresses = direct_of(x, decode)
    direct._index, direct._raw = 0, raw
    return direct, tensors, addresses


def test_the_driver_is_given_what_moves(told: list[Any], gpu: SimpleNamespace) -> None:
    raw = Raw()
    direct, tensors, addresses = on_gpu(raw)
    direct(tensors, addresses, 7, 8)
    assert told == []
    (moving, stream, maps), decode = raw.calls[0], direct._decode
    states = moving[-2]
    assert (moving, stream, maps) == (
        (*addresses, 7, 8, states, states + 4 * decode.state_floats),
        100,
        [],
    )
    direct(tensors, addresses, 7, None)
    assert raw.calls[1][0] == (*addresses, 7, states + 4 * decode.floats, *moving[-2:])


@pytest.mark.parametrize("refused", [0, 1])
def test_what_the_driver_refuses_is_launched_by_triton(
    told: list[Any], gpu: SimpleNamespace, refused: int
) -> None:
    direct, tensors, addresses = on_gpu(Raw(refused))
    direct(tensors, addresses, 7, 8)
    assert [how for how, _, _ in told] == ["straight 100"] * (2 - refused)
    assert told[-1][1] is triton.merge_kernel


def test_a_profiler_is_told(told: list[Any], gpu: SimpleNamespace) -> None:
    raw = Raw()
    direct, tensors, addresses = on_gpu(raw)
    gpu.undisturbed = False
    direct(tensors, addresses, 7, 8)
    assert [how for how, _, _ in told] == ["called"] * 2
    assert raw.calls == []


def test_the_tensors_device_is_made_current(told: list[Any], gpu: SimpleNamespace) -> None:
    raw = Raw()
    direct, tensors, addresses = on_gpu(raw)
    gpu.current = 1
    direct(tensors, addresses, 7, 8)
    assert (gpu.visited, gpu.current, len(raw.calls)) == ([0], 1, 1)
    gpu.current = 0
    direct(tensors, addresses, 7, 8)
    assert gpu.visited == [0]


def test_kernels_are_looked_at_once_they_are_compiled(
    told: list[Any], gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And by Triton's launcher until then, or where anything of them is unusual."""
    direct, tensors, addresses = on_gpu(None)
    direct(tensors, addresses, 7, 8)
    assert direct._raw is None
    assert [how for how, _, _ in told] == ["straight 100"] * 2
    compiled = {one._key: SimpleNamespace(metadata=SimpleNamespace()) for one in direct._launchers}
    monkeypatch.setattr(door, "_compiled", compiled)
    looked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(decode_calls, "kernel_of", lambda *args: looked.append(args))
    for _ in range(2):
        direct(tensors, addresses, 7, 8)
    assert direct._raw is False
    assert len(looked) == 2
    assert [how for how, _, _ in told] == ["straight 100"] * 6
    # The numbers that stay, and which of those that move goes where.
    _, _, expected = told[-1]
    for place, value in zip(looked[1][2], expected, strict=False):
        if isinstance(place, decode_calls.Slot):
            assert (*addresses, 7, 8)[place] == value if place < len(addresses) + 2 else value > 0
        else:
            assert place == value
