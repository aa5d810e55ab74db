"""Workspaces: device memory that a call needs only until it ends, kept for the next call on the same stream."""

from __future__ import annotations

import threading

import torch
from triton.runtime import driver

# Floats of the largest workspace that is kept: a decode that fills an H200 needs a quarter of it. Others come and go.
MOST = 4 << 20


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
    if floats > MOST or not like.is_cuda or torch.cuda.is_current_stream_capturing():
        return like.new_empty(floats, dtype=torch.float32)
    index = like.device.index
    key = (index, driver.active.get_current_stream(index))
    buffer = _kept.buffers.get(key)
    if buffer is None or buffer.numel() < floats:
        # What the smaller one holds may still be read: the allocator gives it to later work of this stream alone.
        buffer = _kept.buffers[key] = like.new_empty(floats, dtype=torch.float32)
    return buffer
