"""Workspaces: device memory that a call needs only until it ends, kept for the next call on the same stream."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from headfold.backends.launch import current_stream

# Floats of the largest workspace that is kept: a decode that fills an H200 needs a quarter of it. Others come and go.
MOST = 4 << 20

# torch.cuda.is_current_stream_capturing() without the call in between.
_is_capturing: Callable[[], bool] = getattr(
    torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing
)


class _Kept(threading.local):
    """By device and stream. Each thread has its own: a call is two launches, and another's may come between them."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[int, int], torch.Tensor] = {}


_kept = _Kept()


def workspace(like: torch.Tensor, floats: int) -> torch.Tensor:
    """At least `floats` float32 on the device of `like`, which must be current, for launches on its current stream.

    Their contents are whatever an earlier call left. A call that is captured into a graph gets memory of the graph's own:
    replays may run on any stream, beside anything.
    """
    if not like.is_cuda:
        return workspace_on(None, 0, like, floats)
    index = like.device.index
    return workspace_on(index, current_stream(index), like, floats)


def workspace_on(index: int | None, stream: int, like: torch.Tensor, floats: int) -> torch.Tensor:
    """The same, on a GPU's current stream; without an index on the CPU."""
    if index is None or floats > MOST or _is_capturing():
        return like.new_empty(floats, dtype=torch.float32)
    buffer = _kept.buffers.get((index, stream))
    if buffer is None or buffer.numel() < floats:
        # What the smaller one holds may still be read: the allocator gives it to later work of this stream alone.
        buffer = _kept.buffers[index, stream] = like.new_empty(floats, dtype=torch.float32)
    return buffer
