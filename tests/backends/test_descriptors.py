"""Descriptors that are made once, and launches that use what was made of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.nvidia import driver

from headfold.backends.descriptors import MOST, Descriptors, quicken
from headfold.backends.hopper import boxes


def described(t: torch.Tensor) -> Descriptors:
    return Descriptors(boxes(t, 64, 64))


def test_a_place_has_one_descriptor() -> None:
    k = torch.empty(2, 8, 128, 64, dtype=torch.bfloat16)
    other = torch.empty_like(k)
    at = described(k)
    first = at(other)
    assert first is at(other)
    assert first.base.data_ptr() == other.data_ptr() != at(k).base.data_ptr()
    assert (first.shape, first.block_shape) == ([2, 8, 128, 64], [1, 1, 64, 64])


def test_descriptors_keep_no_memory_and_are_not_kept_for_ever() -> None:
    k = torch.empty(MOST + 2, 1, 1, 8, 64, dtype=torch.bfloat16)
    at = described(k[0])
    made = [at(t) for t in k]
    assert not any(isinstance(d.base, torch.Tensor) for d in made)
    assert at(k[0]) is not made[0]
    assert at(k[MOST + 1]) is made[MOST + 1]


@pytest.mark.parametrize("places", [(0, 1), (1, 4), (3,)])
def test_launches_get_the_arguments_that_tritons_own_wrapper_gives(
    monkeypatch: pytest.MonkeyPatch, places: tuple[int, ...]
) -> None:
    """Triton's wrapper of a launcher that writes down what it is given, before and after; each descriptor encoded once."""
    encoded: list[int] = []

    def encode(arg: Any, meta: Any, *more: Any) -> list[Any]:
        encoded.append(arg.base.data_ptr())
        return [(arg.base.data_ptr(), meta), *arg.shape, *arg.strides]

    monkeypatch.setattr(driver, "make_tensordesc_arg", encode)
    signature = {(i,): "tensordesc<bf16[1,1,64,64]>" if i in places else "i64" for i in range(6)}
    metas = [f"meta of {i}" for i in places]
    launches: list[Any] = []
    own = driver.wrap_handle_tensordesc(lambda *a: launches.append(a), signature, metas)
    k = torch.empty(2, 8, 128, 64, dtype=torch.bfloat16)
    arguments = tuple(described(k)(k) if i in places else 100 + i for i in range(6))
    flat = hasattr(driver, "_BASE_ARGS_FORMAT_LEN")
    before = tuple(range(driver._BASE_ARGS_FORMAT_LEN)) if flat else ("grid", "stream")
    given = (*before, *arguments) if flat else (*before, arguments)
    own(*given)
    compiled = SimpleNamespace(run=SimpleNamespace(launch=own))
    quicken(compiled)
    encoded.clear()
    for _ in range(3):
        compiled.run.launch(*given)
    assert all(flatten(one) == flatten(launches[0]) for one in launches[1:])
    if compiled.run.launch is not own:
        assert encoded == [k.data_ptr()] * len(places)


def flatten(launch: tuple[Any, ...]) -> list[Any]:
    return [n for part in launch for n in (part if isinstance(part, (list, tuple)) else (part,))]


def test_other_launchers_stay_as_they_are() -> None:
    def launch(*arguments: Any) -> None:
        pass

    for run in (SimpleNamespace(launch=launch), SimpleNamespace(launch=print), SimpleNamespace()):
        before = dict(vars(run))
        quicken(SimpleNamespace(run=run))
        assert vars(run) == before
