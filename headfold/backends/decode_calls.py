"""Decode calls: the launches of calls that look alike, from a call's inputs, or from its tensors' addresses alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

import torch

from headfold.backends.besides import address, tensor_arguments
from headfold.backends.descriptors import Boxes, metas_of
from headfold.backends.launch import Launcher, current_device, current_stream, undisturbed
from headfold.backends.raw_launch import Launches, Slot, kernel_of
from headfold.backends.workspace import workspace, workspace_on
from headfold.problem import Inputs

# `Q` to `page_table` of the kernels: fields of Inputs, and where the results go.
_POINTERS = [
    "q",
    "k",
    "v",
    "out",
    "lse",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_q",
    "seqused_k",
    "page_table",
]

Addresses = Sequence[int]
# What runs a call: its tensors, their addresses, and the addresses of the output and of the LSE, None if nobody asks for it.
Direct = Callable[[Sequence[torch.Tensor], Addresses, int, int | None], None]


@dataclass(frozen=True, slots=True)
class Decode:
    """What runs a decode, and merges its states where several programs share a tile: for calls that look alike.

    A Runner. `arguments` makes the decode kernel's arguments of those for boxes, `Q` to `page_table`, `states` and
    `state_lses`, and those that `besides` gives. `merge_arguments` makes the merge kernel's of `Q` to `page_table`,
    `cache_leftpad`, `states` and `state_lses`. The LSEs of the states lie `state_floats` behind the states, a workspace's
    first `floats` hold both, and `unwanted` more an LSE that nobody asks for.
    """

    launch: Launcher
    arguments: Callable[..., tuple[Any, ...]]
    boxes: Boxes
    besides: Callable[[Inputs], tuple[int, ...]]
    merge: Launcher | None
    merge_arguments: Callable[..., tuple[Any, ...]]
    state_floats: int
    floats: int
    unwanted: int

    def __call__(self, x: Inputs, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Run a call."""
        self.finish(self.start(x, out, lse))

    def start(self, x: Inputs, out: torch.Tensor, lse: torch.Tensor | None) -> Any:
        """Launch the decode; returns what `finish` takes."""
        floats = self.floats if lse is not None else self.floats + self.unwanted
        memory = workspace(x.q, floats) if floats else None
        at = 0 if memory is None else memory.data_ptr()
        lse_at = at + 4 * self.floats if lse is None else lse.data_ptr()
        tensors = tensor_arguments(
            x, out, lse_at, x.seqused_k if x.early_lengths is None else x.early_lengths
        )
        states = (at, at + 4 * self.state_floats)
        self.launch(self.arguments(self.boxes.of(x.k, x.v), tensors, states, self.besides(x)))
        return memory, tensors, address(x.cache_leftpad), states

    def finish(self, started: Any) -> None:
        """Launch the merge, if there is one."""
        if self.merge is not None:
            self.merge(self.merge_arguments(*started[1:]))

    def from_addresses(self, x: Inputs, sources: Mapping[str, int], count: int) -> Direct | None:
        """What runs calls that look like x from the addresses of their tensors, None where an `x` is needed for that.

        `sources` numbers the tensors of a call's inputs among all `count` of a call.
        """
        if type(x) is not Inputs or not set(_POINTERS).issuperset(sources):
            return None
        return _Direct(self, self.besides(x), sources, count, x.q.device)


class _Direct:
    """A Decode of calls of which no tensor but `Q` to `page_table` is there.

    What moves are the addresses of a call's tensors, of its output, its LSE, the states, and their LSEs.
    """

    def __init__(
        self,
        decode: Decode,
        besides: tuple[int, ...],
        sources: Mapping[str, int],
        count: int,
        device: torch.device,
    ) -> None:
        self._decode = decode
        self._besides = besides
        self._launchers = [decode.launch] if decode.merge is None else [decode.launch, decode.merge]
        self._index = device.index if device.type == "cuda" else None
        self._q, self._k, self._v = sources["q"], sources["k"], sources["v"]
        self._floats, self._with_lse = decode.floats, decode.floats + decode.unwanted
        # Bytes behind the states.
        self._lse, self._state_lses = 4 * decode.floats, 4 * decode.state_floats
        self._moving = count + 4
        places = dict(sources) | {"out": count, "lse": count + 1}
        # Behind what moves stands a 0, for what is not there.
        self._pointers = itemgetter(*(places.get(name, self._moving) for name in _POINTERS))
        self._metas: Sequence[Any] = ()  # of the descriptors of K and V, where the driver is given their maps
        # False where Triton's launcher must launch, None as long as that is not known.
        self._raw: Launches | Literal[False] | None = None

    def __call__(
        self, tensors: Sequence[torch.Tensor], addresses: Addresses, out: int, lse: int | None
    ) -> None:
        index = self._index
        if index is not None and index != current_device():
            with torch.cuda.device(index):  # kernels are launched on the current device
                self(tensors, addresses, out, lse)
            return
        stream = 0 if index is None else current_stream(index)
        at = 0
        floats = self._floats if lse is not None else self._with_lse
        if floats:
            memory = workspace_on(index, stream, tensors[self._q], floats)
            at = memory.data_ptr()
        lse = at + self._lse if lse is None else lse
        moving = (*addresses, out, lse, at, at + self._state_lses)
        launchers = self._launchers
        if index is None or not undisturbed():
            for launcher, arguments in zip(launchers, self._arguments(tensors, moving), strict=True):
                launcher(arguments)
            return
        done = 0
        raw = self._raw
        if raw is None:
            raw = self._find_raw(tensors)
        if raw:
            done = raw(moving, stream, self._maps(tensors))
        if done < len(launchers):
            # What the driver refused too: Triton makes a context current where a thread has none, and says what is wrong.
            left = self._arguments(tensors, moving)[done:]
            for launcher, arguments in zip(launchers[done:], left, strict=True):
                launcher.straight(stream, arguments)

    def _arguments(self, tensors: Sequence[torch.Tensor], moving: tuple[int, ...]) -> list[tuple[Any, ...]]:
        """Those of the decode kernel, and of the merge if there is one."""
        decode = self._decode
        pointers, states = self._pointers((*moving, 0)), moving[-2:]
        boxes = decode.boxes.of(tensors[self._k], tensors[self._v])
        found = [decode.arguments(boxes, pointers, states, self._besides)]
        if decode.merge is not None:
            found.append(decode.merge_arguments(pointers, 0, states))
        return found

    def _find_raw(self, tensors: Sequence[torch.Tensor]) -> Launches | Literal[False]:
        """How the driver launches the kernels, False where Triton's launcher must."""
        launchers = self._launchers
        if any(one.compiled is None for one in launchers):
            return False
        moving = tuple(Slot(i) for i in range(self._moving))
        arguments = zip(launchers, self._arguments(tensors, moving), strict=True)
        found = [kernel_of(one.compiled, one.grid, one.whole(its)) for one, its in arguments]
        kernels = [one for one in found if one is not None]
        self._metas = metas_of(launchers[0].compiled)
        known = len(kernels) == len(launchers) and None not in self._maps(tensors)
        self._raw = Launches(self._moving, kernels) if known else False
        return self._raw

    def _maps(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """(address, owner) of the tensor maps of K and V, where the kernel takes any; None for one that is not to be had."""
        boxes = self._decode.boxes
        if boxes.k is None or boxes.v is None:
            return []
        k_meta, v_meta = self._metas
        return [boxes.k.map_of(tensors[self._k], k_meta), boxes.v.map_of(tensors[self._v], v_meta)]
