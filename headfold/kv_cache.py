"""PagedKVCache: keys and values in pages, made for flash_attn_with_kvcache.

Who owns which page is decided on the host, from what the host knows; the device holds what a kernel reads: pages,
`page_table` and `lengths`. A call sends at most one small copy to the device and waits for nothing. It is drawn up
as a `Change` first and carried out only when all of it is known to be possible: a call that raises changed nothing.

A page that is written belongs to one sequence. `fork` shares full pages and copies a last, partial one; `truncate`
can leave a sequence that ends inside a shared page: its next `append` or `reserve` first copies that page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from headfold.append import append
from headfold.kv_arguments import bad, check_kind, integer, integers
from headfold.kv_pages import Change, Ledger
from headfold.problem import DTYPES, MAX_HEAD_DIM, MAX_SEQLEN
from headfold.values import value_checks_enabled

Ints = int | Sequence[int]


class PagedKVCache:
    """K and V in pages of `page_size` tokens, with page table and lengths of up to `max_sequences` sequences.

    A sequence is named by its row of `page_table`. A decoding step:

        cache.append(ids, k_new, v_new)
        table, lengths = cache.view(ids)
        out = flash_attn_with_kvcache(q, cache.k_cache, cache.v_cache, cache_seqlens=lengths, page_table=table)

    or, where the kernel appends: `reserve(ids, n)`, `view`, the call with k= and v=, then `advance(ids, n)`.

    Not thread-safe. Work is enqueued on the current stream, which must be the one that reads the cache. CUDA graphs
    may read `page_table` and `lengths` (their addresses are fixed) and hold `write`; other methods run between
    replays.

    Args:
        num_pages: pages in the pool that all sequences take theirs from.
        page_size: tokens per page, any number >= 1.
        num_kv_heads, head_dim, head_dim_v: of K and V; head_dim_v=None is head_dim.
        max_sequences, max_pages_per_sequence: rows and columns of the page table.
        dtype: float16, bfloat16 or float32.
        device: where pages, page table and lengths live.
        k_cache, v_cache: storage that the caller owns, (num_pages, page_size, num_kv_heads, head_dim | head_dim_v),
            used as it is. Any strides whose last one is 1: heads before tokens, K and V as halves of one tensor.
            None allocates uninitialised pages.

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
        def size(name: str, value: Any, high: int) -> int:
            n = integer("", name, value)
            if not 1 <= n <= high:
                raise bad("", name, f"is {n}", f"it must be 1 to {high}")
            return n

        self.num_pages = size("num_pages", num_pages, 2**31 - 1)
        self.page_size = size("page_size", page_size, MAX_SEQLEN)
        self.num_kv_heads = size("num_kv_heads", num_kv_heads, 2**31 - 1)
        self.head_dim = size("head_dim", head_dim, MAX_HEAD_DIM)
        self.head_dim_v = size("head_dim_v", head_dim if head_dim_v is None else head_dim_v, MAX_HEAD_DIM)
        self.max_sequences = size("max_sequences", max_sequences, 2**31 - 1)
        longest = MAX_SEQLEN // self.page_size
        self.max_pages_per_sequence = size("max_pages_per_sequence", max_pages_per_sequence, longest)
        if dtype not in DTYPES:
            raise bad("", "dtype", f"is {dtype}", "it must be float16, bfloat16 or float32")
        if (k_cache is None) != (v_cache is None):
            name = "k_cache" if k_cache is None else "v_cache"
            raise bad("", name, "is None", "k_cache and v_cache are given both or neither")
        if not isinstance(device, torch.device | str):
            raise bad("", "device", f"is {device!r}", "it must be a torch.device or its name", TypeError)
        self.dtype = dtype
        with torch.inference_mode(False):  # tensors made in inference mode could not be changed outside it
            rows = (self.max_sequences, self.max_pages_per_sequence)
            self._page_table = torch.zeros(rows, dtype=torch.int32, device=device)
            self._lengths = torch.zeros(rows[:1], dtype=torch.int32, device=device)
            self.device = self._lengths.device  # with its index: "cuda" has become "cuda:0"
            self.k_cache = self._storage("k_cache", k_cache, self.head_dim)
            self.v_cache = self._storage("v_cache", v_cache, self.head_dim_v)
        self._ledger = Ledger(
            page_size=self.page_size,
            free=list(range(self.num_pages))[::-1],
            free_ids=list(range(self.max_sequences))[::-1],
            owners=[0] * self.num_pages,
        )

    @property
    def page_table(self) -> torch.Tensor:
        """(max_sequences, max_pages_per_sequence) int32, live. Entries past a sequence's end mean nothing."""
        return self._page_table

    @property
    def lengths(self) -> torch.Tensor:
        """(max_sequences,) int32, live: tokens of each sequence, 0 for free rows."""
        return self._lengths

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence owns."""
        return len(self._ledger.free)

    def length(self, id: int) -> int:
        """Tokens of a sequence, as the host knows them."""
        return self._ledger.sequences[self._ids("length", [id])[0]].length

    def view(self, ids: Ints) -> tuple[torch.Tensor, torch.Tensor]:
        """page_table (n, max_pages_per_sequence) and lengths (n,) of `ids` in their order, int32.

        Copies, which later calls do not change. An id may come more than once.
        """
        (rows,) = self._to_device(self._ids("view", ids, distinct=False))
        return self._page_table.index_select(0, rows), self._lengths.index_select(0, rows)

    def slots(self, ids: Ints, num_tokens: Ints) -> torch.Tensor:
        """Where the next num_tokens tokens of each sequence go once they are reserved: what `write` takes.

        Returns (sum of num_tokens,) int64 on the device, page * page_size + offset, one sequence after another.
        """
        listed, counts = self._ids_and_counts("slots", ids, num_tokens)
        self._check_reserved("slots", listed, counts)
        return self._to_device(self._ledger.slots(Change(), listed, counts))[0]

    def shared_prefix_len(self, ids: Ints) -> int:
        """Leading tokens that all of `ids` hold in the same pages; 0 for no ids."""
        sequences = [self._ledger.sequences[i] for i in self._ids("shared_prefix_len", ids, distinct=False)]
        pages = 0
        for column in zip(*(s.pages for s in sequences), strict=False):
            if len(set(column)) > 1:
                break
            pages += 1
        return min((min(pages * self.page_size, s.length) for s in sequences), default=0)

    def shared_prefix(self, ids: Ints) -> tuple[list[int], list[int]]:
        """(shared_prefix_len, shared_prefix_groups) of `flash_attn_with_kvcache` for `ids` in their order.

        A group are neighbours that hold their first tokens in the same pages, and its prefix is all that they have in
        common, whole pages only. It is parted where fewest pages are common, and its parts again, if that shares more
        tokens, counted as prefix x (sequences - 1) over its groups: beams of several requests behind one system prompt
        become a group for each request once the requests are longer than it. A sequence that shares nothing with its
        neighbours is a group of one, with all its whole pages. Known on the host; nothing is read from the device.
        Forks side by side make large groups. Queries must stand past the prefix: append their tokens first, or have the
        call do it. An id may come more than once.
        """
        found = self._ledger.families(self._ids("shared_prefix", ids, distinct=False))
        return [pages * self.page_size for pages, _ in found], [n for _, n in found]

    def allocate(self, num_tokens: Ints = 0) -> list[int]:
        """Make new, empty sequences with pages reserved for num_tokens tokens; a list makes one for each entry.

        Returns their ids, a list even for one. Raises OutOfPages or OutOfSequences when too little is free.
        """
        counts = integers("allocate", "num_tokens", num_tokens)
        self._check_fits("allocate", "num_tokens", [0] * len(counts), counts)
        change = self._ledger.opened(counts)
        self._commit(change)
        return list(change.lengths)

    def fork(self, id: int) -> int:
        """Make a sequence with the same tokens: full pages are shared, a last, partial one is copied.

        Neither sees what the other appends. Pages that `id` has only reserved stay its own. Returns the new id.
        Raises OutOfPages or OutOfSequences when too little is free.
        """
        change = self._ledger.forked(self._ids("fork", [id])[0])
        self._commit(change)
        return next(iter(change.lengths))

    def free(self, ids: Ints) -> None:
        """End sequences; their ids, and pages that no other sequence shares, can be used again."""
        listed = self._ids("free", ids)
        self._commit(self._ledger.cut(listed, [0] * len(listed)))
        self._ledger.close(listed)

    def truncate(self, ids: Ints, length: Ints) -> None:
        """Keep the first `length` tokens (one for all, or one each); pages past them, reserved ones too, go back.

        Raises ValueError for a length above the sequence's own.
        """
        listed, lengths = self._ids_and_counts("truncate", ids, length, "length")
        for i, n in zip(listed, lengths, strict=True):
            now = self._ledger.sequences[i].length
            if n > now:
                raise bad(
                    "truncate", "length", f"is {n} for sequence {i}", f"it must be 0 to its length {now}"
                )
        self._commit(self._ledger.cut(listed, lengths))

    def append(
        self, ids: Ints, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int] | None = None
    ) -> None:
        """Append tokens to sequences, taking pages as needed.

        Args:
            ids: n distinct sequences.
            k, v: (n, s, num_kv_heads, head_dim | head_dim_v), or ragged (total, num_kv_heads, ...) with `lengths`;
                the cache's dtype and device, any strides.
            lengths: n ints on the host: tokens of ragged k and v for each sequence, one after another.

        Raises:
            OutOfPages: too few pages are free.
            TypeError, ValueError: an argument that does not fit.
            NotImplementedError: k or v require a gradient.
        """
        listed = self._ids("append", ids)
        if lengths is None:
            check_kind("append", "k", k, 4, "(n, s, num_kv_heads, head_dim), or ragged with lengths")
            lead: tuple[int, ...] = (len(listed), k.shape[1])
            counts = [k.shape[1]] * len(listed)
        else:
            counts = integers("append", "lengths", lengths, len(listed))
            lead = (sum(counts),)
        self._check_tokens("append", k, v, lead)
        change = self._grown("append", "k", listed, counts)
        change.lengths = self._ledger.longer(listed, counts)
        slots = self._commit(change, self._ledger.slots(change, listed, counts))
        self._put(slots.view(lead), k, v)

    def write(self, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: Ints | None = None) -> None:
        """Write tokens into given slots (append by slot mapping). Lengths stay; `advance` counts the tokens.

        Slots on a GPU are the caller's promise; HEADFOLD_CHECK=1 reads them back. It also finds slots that come
        twice and, given ids, slots in pages that none of them owns alone.

        Args:
            slots: (tokens,) int64 or int32 on the device, page * page_size + offset, all different. -1 is padding:
                that token is not written, and its k and v may hold anything.
            k, v: (tokens, num_kv_heads, head_dim | head_dim_v), the cache's dtype and device, any strides.
            ids: the sequences that the tokens are of.

        Raises:
            TypeError, ValueError: an argument, or a slot that was looked at, that does not fit.
            NotImplementedError: k or v require a gradient.
        """
        listed = None if ids is None else self._ids("write", ids)
        check_kind("write", "slots", slots, 1, "(tokens,)")
        if slots.dtype not in (torch.int32, torch.int64):
            raise bad("write", "slots", f"has dtype {slots.dtype}", "it must be int64 or int32")
        if slots.device != self.device:
            raise bad("write", "slots", f"is on {slots.device}", f"it must be on the cache's {self.device}")
        self._check_tokens("write", k, v, (slots.shape[0],))
        if slots.device.type == "cpu" or value_checks_enabled():
            self._check_slots(slots, listed)
            real = slots >= 0
            self._put(slots[real].long(), k[real], v[real])
        else:
            self._put_unseen(slots, k, v)

    def reserve(self, ids: Ints, num_tokens: Ints) -> None:
        """Have pages ready for num_tokens more tokens (one number for all, or one each) that a kernel will append.

        Lengths do not change, and reserving again adds nothing. Raises OutOfPages when too few are free.
        """
        self._commit(self._grown("reserve", "num_tokens", *self._ids_and_counts("reserve", ids, num_tokens)))

    def advance(self, ids: Ints, num_tokens: Ints) -> None:
        """Count tokens that a kernel has put into reserved pages. Raises ValueError for more than were reserved."""
        listed, counts = self._ids_and_counts("advance", ids, num_tokens)
        self._check_reserved("advance", listed, counts)
        self._commit(Change(lengths=self._ledger.longer(listed, counts)))

    def _grown(self, caller: str, name: str, listed: list[int], counts: list[int]) -> Change:
        self._check_fits(caller, name, [self._ledger.sequences[i].length for i in listed], counts)
        return self._ledger.grown(listed, counts)

    def _commit(self, change: Change, slots: Sequence[int] = ()) -> torch.Tensor:
        """Do what the change says, on the host and on the device; returns the slots on the device."""
        self._ledger.refuse_if_out(change)
        new = self._ledger.new_cells(change)
        cells = [row * self.max_pages_per_sequence + column for row, column, _ in new]
        rows, lengths = list(change.lengths), list(change.lengths.values())
        parts = self._to_device(cells, [page for _, _, page in new], rows, lengths, slots)
        self._ledger.commit(change)
        for source, target, tokens in change.copies:
            for cache in (self.k_cache, self.v_cache):
                cache[target, :tokens].copy_(cache[source, :tokens])
        if cells:
            self._page_table.view(-1).index_copy_(0, parts[0], parts[1].int())
        if rows:
            self._lengths.index_copy_(0, parts[2], parts[3].int())
        return parts[4]

    def _to_device(self, *parts: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """The parts as int64 tensors on the device, in one copy that nothing waits for."""
        flat = [n for part in parts for n in part]
        # The allocator of pinned memory does not hand these bytes out again before the copy is done.
        host = torch.tensor(flat, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        return host.to(self.device, non_blocking=True).split([len(part) for part in parts])

    def _put(self, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        where = (slots // self.page_size, slots % self.page_size)
        self.k_cache.index_put_(where, k)
        self.v_cache.index_put_(where, v)

    def _put_unseen(self, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write by slots that the host does not know: each token is appended to its page, or to none at -1."""
        pages = slots.div(self.page_size, rounding_mode="floor")
        k, v = ((t if t.stride(-1) == 1 else t.contiguous()).unsqueeze(1) for t in (k, v))
        append(
            *(self.k_cache, self.v_cache, k, v, (slots - pages * self.page_size).int()),
            cache_batch_idx=pages.int(),
            caller="PagedKVCache.write",
        )

    def _storage(self, name: str, t: torch.Tensor | None, d: int) -> torch.Tensor:
        shape = (self.num_pages, self.page_size, self.num_kv_heads, d)
        if t is None:
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        self._check_tensor("", name, t, shape)
        if d > 1 and t.stride(-1) != 1:
            raise bad("", name, f"has last stride {t.stride(-1)}", "its last dimension must be contiguous")
        if any(n > 1 and s == 0 for n, s in zip(t.shape, t.stride(), strict=True)):
            raise bad("", name, "is expanded (a stride is 0)", "every element needs its own place")
        return t

    def _check_tokens(self, caller: str, k: Any, v: Any, lead: tuple[int, ...]) -> None:
        self._check_tensor(caller, "k", k, (*lead, self.num_kv_heads, self.head_dim))
        self._check_tensor(caller, "v", v, (*lead, self.num_kv_heads, self.head_dim_v))

    def _check_tensor(self, caller: str, name: str, t: Any, shape: tuple[int, ...]) -> None:
        check_kind(caller, name, t, len(shape), str(shape))
        if tuple(t.shape) != shape:
            raise bad(caller, name, f"has shape {tuple(t.shape)}", f"it must be {shape}")
        if t.dtype != self.dtype:
            raise bad(caller, name, f"has dtype {t.dtype}", f"it must be the cache's {self.dtype}")
        if t.device != self.device:
            raise bad(caller, name, f"is on {t.device}", f"it must be on the cache's {self.device}")
        if torch.is_grad_enabled() and t.requires_grad:
            need = "a cache keeps no gradients; detach it, or call under torch.no_grad()"
            raise bad(caller, name, "requires a gradient", need, NotImplementedError)

    def _check_slots(self, slots: torch.Tensor, listed: list[int] | None) -> None:
        size = self.num_pages * self.page_size
        outside = ((slots < -1) | (slots >= size)).nonzero()
        if len(outside):
            j = int(outside[0])
            need = f"a slot must be 0 to {size - 1}, or -1 for padding"
            raise bad("write", "slots", f"[{j}] is {int(slots[j])}", need)
        if not value_checks_enabled():
            return
        seen: dict[int, int] = {}
        pages = {page for i in listed or () for page in self._ledger.sequences[i].pages}
        for j, slot in enumerate(slots.tolist()):
            page = slot // self.page_size
            if slot < 0:
                continue
            if slot in seen:
                raise bad("write", "slots", f"[{j}] is {slot}, as [{seen[slot]}] is", "all must differ")
            if listed is not None and (page not in pages or self._ledger.owners[page] > 1):
                got = f"[{j}] is {slot}, in page {page}"
                raise bad("write", "slots", got, f"one of the sequences {listed} must own that page alone")
            seen[slot] = j

    def _check_fits(self, caller: str, name: str, lengths: list[int], counts: list[int]) -> None:
        most = self.max_pages_per_sequence * self.page_size
        for j, (has, n) in enumerate(zip(lengths, counts, strict=True)):
            if has + n > most:
                got = f"brings {n} tokens more to sequence [{j}], which has {has}"
                raise bad(caller, name, got, f"max_pages_per_sequence gives room for {most}")

    def _check_reserved(self, caller: str, listed: list[int], counts: list[int]) -> None:
        for i, n in zip(listed, counts, strict=True):
            room = self._ledger.room(i)
            if n > room:
                need = f"{room} are reserved; call reserve first"
                raise bad(caller, "num_tokens", f"is {n} for sequence {i}", need)

    def _ids(self, caller: str, ids: Any, distinct: bool = True) -> list[int]:
        listed = integers(caller, "ids", ids)
        for j, i in enumerate(listed):
            if i not in self._ledger.sequences:
                raise bad(caller, "ids", f"[{j}] is {i}", "no such sequence; ids come from allocate and fork")
        if distinct and len(set(listed)) < len(listed):
            raise bad(caller, "ids", f"is {listed}", "every sequence may come once")
        return listed

    def _ids_and_counts(
        self, caller: str, ids: Any, counts: Any, name: str = "num_tokens"
    ) -> tuple[list[int], list[int]]:
        listed = self._ids(caller, ids)
        return listed, integers(caller, name, counts, len(listed))
