"""Features: what a case adds to plain attention, by name, so that an implementation can say what it can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MaskKind = Literal["", "additive", "documents"]
DOCUMENTS = 4  # texts that a "documents" mask packs into one sequence


@dataclass(frozen=True, slots=True)
class Features:
    """What a case adds to plain attention; nothing by default.

    `window` is how many keys a query sees, its own included (0: all of them). `mask` is a tensor: "additive" is a
    float for every head, query and key; "documents" is bool, one for all heads, and keeps each query to the
    earlier keys of its own quarter of the sequence. `tree` says which of the newest sq keys each query sees.
    `cache` reads through `flash_attn_with_kvcache` with lengths on the device; `append` also writes sq new tokens
    into the cache's last places, over those that the call before wrote there; `rotary` rotates them and q.
    """

    softcap: float = 0.0
    sink: bool = False
    alibi: bool = False
    window: int = 0
    mask: MaskKind = ""
    tree: bool = False
    cache: bool = False
    append: bool = False
    rotary: bool = False
    tokens_per_split: int = 0

    @property
    def names(self) -> frozenset[str]:
        """The names of those that are on."""
        return frozenset(name for name in self.__slots__ if getattr(self, name))

    @property
    def moves_the_mask(self) -> bool:
        """True where causal alone does not say what a query sees, or something is added to its scores."""
        return bool(self.names & {"alibi", "window", "mask", "tree"})


ALL = frozenset(Features.__slots__)
PLAIN = Features()
