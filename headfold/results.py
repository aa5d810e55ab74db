"""Results of kept calls: what has a prepared call write into new tensors, or into a given one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from headfold.backends import Runner
from headfold.problem import Inputs

# What a call that looks like an earlier one comes to, from its tensors and their addresses.
Direct = Callable[[Sequence[torch.Tensor], Sequence[int]], Any]


def _direct(
    launch: Runner,
    x: Inputs,
    sources: Mapping[str, int],
    count: int,
    out_of: Callable[[torch.Tensor], torch.Tensor],
    at: int,
    lse_shape: Sequence[int] | None,
) -> Direct | None:
    """What a call comes to whose output `out_of` gives for its tensor number `at`, with an LSE where that has a shape.

    The others are as `IntoNew.direct` takes them.
    """
    make = getattr(launch, "from_addresses", None)
    direct = None if make is None else make(x, sources, count)
    if direct is None:
        return None

    def run(tensors: Sequence[torch.Tensor], addresses: Sequence[int]) -> Any:
        out = out_of(tensors[at])
        if lse_shape is None:
            direct(tensors, addresses, out.data_ptr(), None)
            return out
        lse = out.new_empty(lse_shape, dtype=torch.float32)
        direct(tensors, addresses, out.data_ptr(), lse.data_ptr())
        return out, lse

    return run


class IntoNew:
    """What has `launch` compute inputs that look like x into new results; the LSE only where it is wanted."""

    def __init__(self, x: Inputs, launch: Runner) -> None:
        self._launch = launch
        self._out_shape, self._lse_shape = x.out_shape, x.lse_shape
        self._like_q = self._out_shape == tuple(x.q.shape) and x.q.is_contiguous()  # 0.5 us less to ask for

    def __call__(self, x: Inputs, want_lse: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute inputs."""
        out = self._new_out(x.q)
        lse = out.new_empty(self._lse_shape, dtype=torch.float32) if want_lse else None
        self._launch(x, out, lse)
        return out, lse

    def direct(
        self, x: Inputs, sources: Mapping[str, int], count: int, want_lse: bool, into: int
    ) -> Direct | None:
        """What the call comes to, from the addresses of its tensors alone; None where its Runner needs inputs.

        Args:
            x: inputs of such a call.
            sources: which of the call's tensors stands in which field of its inputs.
            count: how many tensors the call has.
            want_lse: whether it returns the LSE too.
            into: which of its tensors is the output that the caller gave.
        """
        lse_shape = self._lse_shape if want_lse else None
        return _direct(self._launch, x, sources, count, self._new_out, sources["q"], lse_shape)

    def _new_out(self, q: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(q) if self._like_q else q.new_empty(self._out_shape)


class IntoGiven:
    """What has `launch` compute into an output that is given; the LSE only where it is wanted."""

    def __init__(self, launch: Runner, lse_shape: torch.Size) -> None:
        self._launch = launch
        self._lse_shape = lse_shape

    def __call__(
        self, x: Inputs, want_lse: bool, out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute inputs."""
        lse = x.q.new_empty(self._lse_shape, dtype=torch.float32) if want_lse else None
        self._launch(x, out, lse)
        return out, lse

    def direct(
        self, x: Inputs, sources: Mapping[str, int], count: int, want_lse: bool, into: int
    ) -> Direct | None:
        """Like that of `IntoNew`."""
        lse_shape = self._lse_shape if want_lse else None
        return _direct(self._launch, x, sources, count, lambda out: out, into, lse_shape)
