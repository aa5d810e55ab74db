"""PagedKVCache: keys and values in pages, made for flash_attn_with_kvcache.

Who owns which page is decided on the host, from what the host knows; the device holds what a kernel reads: the
pages, `page_table` and `lengths`. A call sends at most one small copy to the device and waits for nothing.

Every change is drawn up as a `_Change` first. Only when all of it is known to be possible is it carried out, so
that a call which raises has changed nothing.

Sharing: a page is shared only up to what its owners had in common, and a page that is written belongs to one
sequence. `fork` shares full pages and copies a last, partial one; `truncate` can leave a sequence that ends inside
a shared page, and the next `append` or `reserve` moves it to a page of its own first.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from headfold.problem import DTYPES, MAX_HEAD_DIM, MAX_SEQLEN, value_checks_enabled

Ints = int | Sequence[int]


class OutOfPages(RuntimeError):
    """The cache has fewer free pages than a call needs. Nothing was changed."""


class OutOfSequences(RuntimeError):
    """All max_sequences rows of the page table are taken. Nothing was changed."""


@dataclass(slots=True)
class _Sequence:
    """Pages of one sequence in order, some of them possibly past its length (reserved), and its length."""

    pages: list[int]
    length: int


@dataclass(slots=True)
class _Change:
    """What a call will do.

    tails: sequence id -> (first, pages): its pages from index `first` on become these.
    lengths: sequence id -> new length.
    copies: (from page, to page, tokens) on the device.
    taken, shared, dropped: pages that leave the free list, gain an owner, lose one.
    """

    tails: dict[int, tuple[int, list[int]]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    taken: int = 0
    shared: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)


class PagedKVCache:
    """K and V in pages of `page_size` tokens, with the page table and the lengths of up to `max_sequences`.

    A sequence is named by its row of `page_table`, an int from `allocate` or `fork`; `free` makes the row
    available again. One decoding step, the new tokens appended here:

        cache.append(ids, k_new, v_new)
        table, lengths = cache.view(ids)
        out = flash_attn_with_kvcache(q, cache.k_cache, cache.v_cache, cache_seqlens=lengths, page_table=table)

    or, where the kernel appends: `reserve(ids, n)`, then `view` and the call with k= and v=, then `advance(ids, n)`.

    Not thread-safe. Device work is enqueued on the current stream, which must be the one that reads the cache. A
    CUDA graph may read `page_table` and `lengths`, whose addresses are fixed, but the methods are called between
    replays: what they decide on the host cannot be captured (`write` can).

    Args:
        num_pages: pages in the pool, shared by all sequences.
        page_size: tokens per page, any number >= 1.
        num_kv_heads, head_dim: of K and V; head_dim_v: of V where it differs.
        max_sequences: rows of the page table.
        max_pages_per_sequence: columns of the page table.
        dtype: float16, bfloat16 or float32.
        device: where pages, page table and lengths live.
        k_cache, v_cache: storage that the caller owns, (num_pages, page_size, num_kv_heads, head_dim | head_dim_v).
            Any strides whose last one is 1: heads before tokens, K and V as halves of one tensor, odd pitches. Used
            as it is, never copied. None allocates uninitialised pages.

    Raises:
        TypeError, ValueError: an argument that does not fit, named in the message.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        *,
        max_sequences: int,
        max_pages_per_sequence: int,
        dtype: torch.dtype,
        device: torch.device | str,
        k_cache: torch.Tensor | None = None,
        v_cache: torch.Tensor | None = None,
    ) -> None:
        self.num_pages = _integer("", "num_pages", num_pages, 1, 2**31 - 1)
        self.page_size = _integer("", "page_size", page_size, 1, MAX_SEQLEN)
        self.num_kv_heads = _integer("", "num_kv_heads", num_kv_heads, 1)
        self.head_dim = _integer("", "head_dim", head_dim, 1, MAX_HEAD_DIM)
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        self.head_dim_v = _integer("", "head_dim_v", head_dim_v, 1, MAX_HEAD_DIM)
        self.max_sequences = _integer("", "max_sequences", max_sequences, 1)
        longest = MAX_SEQLEN // self.page_size
        self.max_pages_per_sequence = _integer(
            "", "max_pages_per_sequence", max_pages_per_sequence, 1, longest
        )
        if dtype not in DTYPES:
            raise ValueError(f"PagedKVCache: dtype is {dtype}; it must be float16, bfloat16 or float32")
        if not isinstance(device, torch.device | str):
            raise TypeError(f"PagedKVCache: device is {device!r}; it must be a torch.device or its name")
        if (k_cache is None) != (v_cache is None):
            name = "k_cache" if k_cache is None else "v_cache"
            raise ValueError(f"PagedKVCache: {name} is None; k_cache and v_cache are given both or neither")
        self.dtype = dtype
        # Tensors made in inference mode could not be changed outside it.
        with torch.inference_mode(False):
            rows = (self.max_sequences, self.max_pages_per_sequence)
            self._page_table = torch.zeros(rows, dtype=torch.int32, device=device)
            self._lengths = torch.zeros(rows[:1], dtype=torch.int32, device=device)
            self.device = self._lengths.device  # with its index: "cuda" is "cuda:0"
            self.k_cache = self._storage("k_cache", k_cache, self.head_dim)
            self.v_cache = self._storage("v_cache", v_cache, self.head_dim_v)
        self._sequences: dict[int, _Sequence] = {}
        self._free_ids = list(range(self.max_sequences))[::-1]
        self._free = list(range(self.num_pages))[::-1]
        self._owners = [0] * self.num_pages

    def _storage(self, name: str, t: torch.Tensor | None, d: int) -> torch.Tensor:
        shape = (self.num_pages, self.page_size, self.num_kv_heads, d)
        if t is None:
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        self._check_tensor("", name, t, shape)
        if d > 1 and t.stride(-1) != 1:
            raise ValueError(
                f"PagedKVCache: {name} has last stride {t.stride(-1)}; its last dimension must be contiguous"
            )
        if any(n > 1 and s == 0 for n, s in zip(t.shape, t.stride(), strict=True)):
            raise ValueError(
                f"PagedKVCache: {name} is expanded (a stride is 0); every element needs its own place"
            )
        return t

    # ---- what there is ------------------------------------------------------------------------------------

    @property
    def page_table(self) -> torch.Tensor:
        """(max_sequences, max_pages_per_sequence) int32 on the device, live. Entries past a length mean nothing."""
        return self._page_table

    @property
    def lengths(self) -> torch.Tensor:
        """(max_sequences,) int32 on the device, live: tokens of each sequence; 0 for rows that are free."""
        return self._lengths

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence owns."""
        return len(self._free)

    def length(self, id: int) -> int:
        """Tokens of a sequence, as the host knows them."""
        return self._sequences[self._ids("length", id)[0]].length

    def view(self, ids: Ints) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch of `ids`, in that order, for flash_attn_with_kvcache; an id may come more than once.

        Returns:
            page_table (n, max_pages_per_sequence) and lengths (n,), int32 on the device: copies, which later calls
            do not change.
        """
        (rows,) = self._to_device(self._ids("view", ids, distinct=False))
        return self._page_table.index_select(0, rows), self._lengths.index_select(0, rows)

    def slots(self, ids: Ints, num_tokens: Ints) -> torch.Tensor:
        """Where the next num_tokens tokens of each sequence go, after `reserve`: what `write` takes.

        Returns:
            (sum of num_tokens,) int64 on the device, page * page_size + offset, one sequence after another.
        """
        listed, counts = self._ids_and_counts("slots", ids, num_tokens)
        self._check_reserved("slots", listed, counts)
        return self._to_device(self._slots(_Change(), listed, counts))[0]

    def shared_prefix_len(self, ids: Ints) -> int:
        """Leading tokens that all of `ids` hold in the same pages; 0 for no ids."""
        sequences = [self._sequences[i] for i in self._ids("shared_prefix_len", ids, distinct=False)]
        pages = 0
        for column in zip(*(s.pages for s in sequences), strict=False):
            if len(set(column)) > 1:
                break
            pages += 1
        return min((min(pages * self.page_size, s.length) for s in sequences), default=0)

    # ---- sequences ----------------------------------------------------------------------------------------

    def allocate(self, num_tokens: Ints = 0) -> list[int]:
        """Make new, empty sequences.

        Args:
            num_tokens: tokens to reserve pages for; one number is one sequence, a list makes one for each entry.

        Returns:
            The sequences' ids, a list also for one.

        Raises:
            OutOfPages, OutOfSequences: too little is free; nothing was changed.
        """
        counts = [num_tokens] if _is_integer(num_tokens) else num_tokens
        counts = _integers("allocate", "num_tokens", counts)
        change = _Change()
        for i, n in zip(self._new_ids(len(counts)), counts, strict=True):
            self._grow("allocate", change, i, _Sequence([], 0), n)
            change.lengths[i] = 0
        self._commit(change)
        return list(change.lengths)

    def fork(self, id: int) -> int:
        """Make a sequence with the same tokens. Full pages are shared; a last, partial one is copied.

        From then on neither sees what the other appends. Pages that `id` only reserved stay its own.

        Returns:
            The new sequence's id.

        Raises:
            OutOfPages, OutOfSequences: too little is free; nothing was changed.
        """
        source = self._sequences[self._ids("fork", id)[0]]
        (new,) = self._new_ids(1)
        full, rest = divmod(source.length, self.page_size)
        change = _Change(lengths={new: source.length})
        change.shared = source.pages[:full]
        tail = list(change.shared)
        if rest:
            tail.append(self._take(change))
            change.copies.append((source.pages[full], tail[-1], rest))
        change.tails[new] = 0, tail
        self._commit(change)
        return new

    def free(self, ids: Ints) -> None:
        """End sequences. Their rows, and pages that no other sequence shares, can be used again."""
        listed = self._ids("free", ids)
        change = _Change()
        for i in listed:
            self._cut(change, i, 0)
        self._commit(change)
        for i in listed:
            del self._sequences[i]
        self._free_ids.extend(listed)

    def truncate(self, ids: Ints, length: Ints) -> None:
        """Keep the first `length` tokens (one number for all, or one for each) and give back pages past them.

        Reserved pages past the new end are given back too. Speculative decoding drops rejected tokens this way.

        Raises:
            ValueError: a length that is not 0 to the sequence's own.
        """
        listed, counts = self._ids_and_counts("truncate", ids, length, "length")
        change = _Change()
        for i, n in zip(listed, counts, strict=True):
            now = self._sequences[i].length
            if n > now:
                raise _bad("truncate", "length", f"is {n} for sequence {i}", f"it must be 0 to its length {now}")
            self._cut(change, i, n)
        self._commit(change)

    # ---- tokens -------------------------------------------------------------------------------------------

    def append(
        self, ids: Ints, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int] | None = None
    ) -> None:
        """Append tokens to sequences, taking pages as needed.

        Args:
            ids: n distinct sequences.
            k, v: (n, s, num_kv_heads, head_dim | head_dim_v), s tokens for each; or, with `lengths`, ragged
                (total, num_kv_heads, ...), one sequence after another. The cache's dtype and device, any strides.
            lengths: n ints on the host, how many tokens of ragged k and v each sequence gets.

        Raises:
            OutOfPages: too few pages are free; nothing was changed.
            TypeError, ValueError: an argument that does not fit; nothing was changed.
            NotImplementedError: k or v require a gradient.
        """
        listed = self._ids("append", ids)
        if lengths is None:
            _check_dims("append", k, 4, "(n, s, num_kv_heads, head_dim), or ragged with lengths")
            counts = [k.shape[1]] * len(listed)
            lead: tuple[int, ...] = (len(listed), k.shape[1])
        else:
            counts = _integers("append", "lengths", lengths, len(listed))
            lead = (sum(counts),)
        self._check_tokens("append", k, v, lead)
        change = self._grown("append", listed, counts)
        for i, n in zip(listed, counts, strict=True):
            change.lengths[i] = self._sequences[i].length + n
        slots = self._commit(change, self._slots(change, listed, counts))
        self._put(slots.view(lead), k, v)

    def write(self, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: Ints | None = None) -> None:
        """Write tokens into given slots: append by slot mapping. Lengths do not change; `advance` counts them.

        Without HEADFOLD_CHECK=1 nothing reads the slots of a GPU: they are the caller's promise.

        Args:
            slots: (tokens,) int64 or int32 on the device, page * page_size + offset, all different (see `slots`).
            k, v: (tokens, num_kv_heads, head_dim | head_dim_v), the cache's dtype and device, any strides.
            ids: whose pages the slots lie in; only HEADFOLD_CHECK=1 looks at it.

        Raises:
            TypeError, ValueError: an argument that does not fit; nothing was written. Slots out of range raise if
                they lie on the CPU. Under HEADFOLD_CHECK=1 so do those on a GPU, slots that come twice and, given
                ids, slots in pages that none of them owns or that others share.
            NotImplementedError: k or v require a gradient.
        """
        listed = None if ids is None else self._ids("write", ids)
        _check_dims("write", slots, 1, "(tokens,)", "slots")
        if slots.dtype not in (torch.int32, torch.int64):
            raise _bad("write", "slots", f"has dtype {slots.dtype}", "it must be int64 or int32")
        if slots.device != self.device:
            raise _bad("write", "slots", f"is on {slots.device}", f"it must be on the cache's {self.device}")
        self._check_tokens("write", k, v, (slots.shape[0],))
        if slots.device.type == "cpu" or value_checks_enabled():
            self._check_slots(slots, listed)
        self._put(slots.long(), k, v)

    def reserve(self, ids: Ints, num_tokens: Ints) -> None:
        """Give sequences pages for num_tokens more tokens (one number for all, or one for each).

        For a kernel, or `write`, that will put them there. Lengths do not change; reserving again adds nothing.

        Raises:
            OutOfPages: too few pages are free; nothing was changed.
        """
        self._commit(self._grown("reserve", *self._ids_and_counts("reserve", ids, num_tokens)))

    def advance(self, ids: Ints, num_tokens: Ints) -> None:
        """Count tokens that a kernel, or `write`, has put into reserved pages.

        Raises:
            ValueError: more tokens than were reserved.
        """
        listed, counts = self._ids_and_counts("advance", ids, num_tokens)
        self._check_reserved("advance", listed, counts)
        self._commit(
            _Change(
                lengths={i: self._sequences[i].length + n for i, n in zip(listed, counts, strict=True)}
            )
        )
