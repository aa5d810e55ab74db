"""Problem: what is asked for, and every check of what a user passed.

`Inputs` holds the arguments of one call as they came. `check` raises on anything that the kernels could not
compute as documented, before anything is launched or written. `problem_of` reduces checked inputs to a
`Problem`: shapes, dtypes and features only, no tensors and no values read from a device, so that a plan can be
cached by it and a CUDA graph can replay it with other lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from headfold.extras import extras_of
from headfold.mask_layout import mask_sizes

MAX_HEAD_DIM = 256
MAX_GROUP = 256
MAX_SPLITS = 256  # states that one fixup merges
# Positions are 32-bit in the kernels, and a window bound is added to them: half the range keeps sums safe.
MAX_SEQLEN = 2**30
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

QLayout = Literal["dense", "ragged"]
KVLayout = Literal["dense", "ragged", "paged"]

# What a caller of each public function called the operator's arguments; the others keep their names.
_NAMES: dict[str, dict[str, str]] = {
    "flash_attn_with_kvcache": {
        "k": "k_cache",
        "v": "v_cache",
        "seqused_k": "cache_seqlens",
        "rotary_positions": "rotary_seqlens",
    },
    "scaled_dot_product_attention": {
        "q": "query",
        "k": "key",
        "v": "value",
        "softmax_scale": "scale",
        "mask": "attn_mask",
    },
}


@dataclass(slots=True)
class Inputs:
    """The arguments of one attention call, as the operators take them.

    Shapes: `q` (b, sq, h, d), or (total_q, h, d) with `cu_seqlens_q`; `k`, `v` (b, sk, hk, d | dv), or
    (total_k, hk, d | dv) with `cu_seqlens_k`, or (pages, page_size, hk, d | dv) with `page_table`.
    `window_left`, `window_right` are -1 for an open side; `bottom_right` tells where the diagonal ends.
    `mask` is bool (keep where True) or floating point (added to the scaled scores), of shape (b, h, sq, sk) with
    any strides, expanded ones too; `tree_mask` bool (b, sq, sq) over the newest sq keys. `rotary_cos`,
    `rotary_sin` (max_len, rotary_dim / 2) rotate q at `rotary_positions` (b,), plus i for query i where
    `rotary_advances`.

    `early_lengths` (b,) with `early_new` promises what `seqused_k` will hold, which the append just before this call
    computes: early_lengths[i] + early_new, at most the cache's capacity. It changes when a length is read, not what a
    call means.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    seqused_q: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None
    page_table: torch.Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    softmax_scale: float | None = None
    window_left: int = -1
    window_right: int = -1
    bottom_right: bool = True
    num_splits: int = 0
    pack_gqa: bool | None = None
    sm_margin: int = 0
    softcap: float = 0.0
    attention_chunk: int = 0
    tokens_per_split: int = 0
    sink: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    tree_mask: torch.Tensor | None = None
    cache_batch_idx: torch.Tensor | None = None
    cache_leftpad: torch.Tensor | None = None
    rotary_cos: torch.Tensor | None = None
    rotary_sin: torch.Tensor | None = None
    rotary_positions: torch.Tensor | None = None
    rotary_interleaved: bool = True
    rotary_advances: bool = True
    early_lengths: torch.Tensor | None = None
    early_new: int = 0
    caller: str = "attention"

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def scale(self) -> float:
        """The softmax scale in force: d**-0.5 unless one was given; 0.0 means 0.0."""
        return self.q.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output: q's, with the head dimension of v."""
        return (*self.q.shape[:-1], self.v.shape[-1])

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """Shape of the LSE: (b, h, sq), or (h, total_q) for ragged q."""
        if self.cu_seqlens_q is not None:
            return (self.q.shape[1], self.q.shape[0])
        return (self.q.shape[0], self.q.shape[2], self.q.shape[1])

    def tensors_besides(self) -> tuple[torch.Tensor | None, ...]:
        """Tensors that a kind of call has besides these."""
        return ()

    def empty_lse(self) -> torch.Tensor:
        """A new LSE."""
        return self.q.new_empty(self.lse_shape, dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class Problem:
    """One attention problem, as the planner sees it.

    Lengths are upper bounds known on the host (capacities), never values read from a device.
    `total_q` and `total_k` bound the sums over the batch. Window sides are None when open. `featured` is whether the
    call asks for anything but plain attention over a band of keys, `tensor_mask` whether for a mask or a tree,
    `rotary` whether q is to be rotated; `wide_mask` is the element size of a mask that allows wide loads, `mask_sizes`
    how many sequences, heads, queries and keys of a mask tensor differ (`headfold/mask_layout.py`).
    `extras` names what a kernel for common calls may leave to a general one (`headfold/extras.py`).
    """

    device_type: str
    dtype: torch.dtype
    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    max_seqlen_q: int
    max_seqlen_k: int
    total_q: int
    total_k: int
    q_layout: QLayout = "dense"
    kv_layout: KVLayout = "dense"
    page_size: int = 0
    window_left: int | None = None
    window_right: int | None = None
    bottom_right: bool = True
    lengths_on_device: bool = False
    aligned: bool = True
    tma_strides: bool = True
    num_splits: int = 0
    pack_gqa: bool | None = None
    sm_margin: int = 0
    softcap: bool = False
    attention_chunk: int = 0
    tokens_per_split: int = 0
    tensor_mask: bool = False
    featured: bool = False
    rotary: bool = False
    wide_mask: int = 0
    mask_sizes: tuple[int, int, int, int] = (0, 0, 0, 0)
    extras: tuple[str, ...] = ()

    @property
    def group(self) -> int:
        """G, the query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V at capacity, each counted once."""
        per_token = self.num_kv_heads * (self.head_dim + self.head_dim_v) * self.dtype.itemsize
        return self.total_k * per_token

    @property
    def is_empty(self) -> bool:
        """True when no kernel has anything to do: no query row, or no key anywhere."""
        no_query = self.total_q == 0 or self.batch == 0 or self.max_seqlen_q == 0
        return no_query or self.max_seqlen_k == 0 or self.total_k == 0


def fail(x: Inputs, arg: str, got: str, need: str, kind: type[Exception] = ValueError) -> Exception:
    return kind(f"{x.caller}: {_called(x, arg)} {got}; {need}")


def _called(x: Inputs, arg: str) -> str:
    return _NAMES.get(x.caller, {}).get(arg, arg)


def _shape(t: torch.Tensor) -> str:
    return "(" + ", ".join(str(n) for n in t.shape) + ")"


def check(x: Inputs) -> None:
    """Raise on the first argument that cannot be computed as documented. Reads no device memory.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a shape, dtype, device, stride or value that does not fit; the message names the argument,
            what it got and what it needs.
        NotImplementedError: a call that needs the backward.
    """
    _check_tensors(x)
    _check_layout(x)
    _check_heads(x)
    _check_lengths(x)
    _check_scalars(x)
    if torch.is_grad_enabled() and (x.q.requires_grad or x.k.requires_grad or x.v.requires_grad):
        raise NotImplementedError(
            f"{x.caller}: an input requires a gradient, and headfold has no backward yet; "
            "call it under torch.no_grad() or detach the inputs"
        )


def _check_tensors(x: Inputs) -> None:
    for name, t in (("q", x.q), ("k", x.k), ("v", x.v)):
        if not isinstance(t, torch.Tensor):
            raise fail(x, name, f"is a {type(t).__name__}", "it must be a torch.Tensor", TypeError)
        if t.dtype not in DTYPES:
            raise fail(x, name, f"has dtype {t.dtype}", "it must be float16, bfloat16 or float32")
        if t.dtype != x.q.dtype:
            raise fail(x, name, f"has dtype {t.dtype}", f"it must have the queries' dtype {x.q.dtype}")
        if t.device != x.q.device:
            raise fail(x, name, f"is on {t.device}", f"it must be on the queries' device {x.q.device}")
        if t.dim() > 0 and t.shape[-1] > 1 and t.stride(-1) != 1:
            raise fail(x, name, f"has last stride {t.stride(-1)}", "its last dimension must be contiguous")


def _check_layout(x: Inputs) -> None:
    q_dims, kv_dims = (4, 4) if x.cu_seqlens_q is None else (3, 4)
    if x.cu_seqlens_k is not None and x.page_table is None:
        kv_dims = 3
    if x.q.dim() != q_dims:
        need = "(b, sq, h, d)" if q_dims == 4 else "(total_q, h, d), since cu_seqlens_q is given"
        raise fail(x, "q", f"has shape {_shape(x.q)}", f"it must be {need}")
    for name, t in (("k", x.k), ("v", x.v)):
        if t.dim() != kv_dims:
            need = "(total_k, hk, d), since cu_seqlens_k is given" if kv_dims == 3 else "(b, sk, hk, d)"
            if x.page_table is not None:
                need = "(pages, page_size, hk, d), since page_table is given"
            raise fail(x, name, f"has shape {_shape(t)}", f"it must be {need}")
    _check_index(x, "cu_seqlens_q", x.cu_seqlens_q, ("batch + 1",))
    if x.cu_seqlens_q is not None and x.cu_seqlens_q.shape[0] < 1:
        raise fail(x, "cu_seqlens_q", "is empty", "it must hold batch + 1 offsets")
    batch = x.batch
    _check_index(x, "cu_seqlens_k", x.cu_seqlens_k, (batch + 1,))
    picked = x.cache_batch_idx is not None
    _check_index(x, "page_table", x.page_table, ("rows" if picked else batch, "max_pages"))
    _check_index(x, "seqused_q", x.seqused_q, (batch,))
    _check_index(x, "seqused_k", x.seqused_k, (batch,))
    if x.page_table is not None:
        if x.cu_seqlens_k is None and x.seqused_k is None:
            raise fail(x, "seqused_k", "is None", "a paged cache needs the length of every sequence")
        if x.k.shape[1] < 1:
            raise fail(x, "k", f"has shape {_shape(x.k)}", "page_size must be at least 1")
    elif x.cu_seqlens_k is None and x.k.shape[0] != batch and not picked:
        raise fail(x, "k", f"has batch {x.k.shape[0]}", f"it must have the queries' batch {batch}")


def _check_index(x: Inputs, name: str, t: torch.Tensor | None, shape: tuple[int | str, ...]) -> None:
    if t is None:
        return
    if not isinstance(t, torch.Tensor):
        raise fail(x, name, f"is a {type(t).__name__}", "it must be an int32 tensor", TypeError)
    if t.dtype != torch.int32:
        raise fail(x, name, f"has dtype {t.dtype}", "it must be int32")
    if t.device != x.q.device:
        raise fail(x, name, f"is on {t.device}", f"it must be on the queries' device {x.q.device}")
    fits = t.dim() == len(shape) and all(
        isinstance(n, str) or n == m for n, m in zip(shape, t.shape, strict=False)
    )
    if not fits:
        want = "(" + ", ".join(str(n) for n in shape) + ")"
        raise fail(x, name, f"has shape {_shape(t)}", f"it must be {want} for this batch")
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        raise fail(x, name, f"has last stride {t.stride(-1)}", "its last dimension must be contiguous")


def _check_heads(x: Inputs) -> None:
    h, d = x.q.shape[-2:]
    hk, dk = x.k.shape[-2:]
    if x.v.shape[:-1] != x.k.shape[:-1]:
        need = f"all but its last size must equal {_called(x, 'k')}'s {_shape(x.k)}"
        raise fail(x, "v", f"has shape {_shape(x.v)}", need)
    if hk < 1 or h < 1:
        raise fail(x, "k" if hk < 1 else "q", "has no heads", "at least one head is needed")
    if h % hk != 0:
        raise fail(x, "q", f"has {h} heads", f"that must be a multiple of the {hk} KV heads")
    if h // hk > MAX_GROUP:
        raise fail(x, "q", f"has {h // hk} heads per KV head", f"at most {MAX_GROUP} are supported")
    if dk != d:
        raise fail(x, "k", f"has head dimension {dk}", f"it must equal the queries' head dimension {d}")
    for name, n in (("q", d), ("v", x.v.shape[-1])):
        if not 1 <= n <= MAX_HEAD_DIM:
            raise fail(x, name, f"has head dimension {n}", f"it must be 1 to {MAX_HEAD_DIM}")


def _check_lengths(x: Inputs) -> None:
    for name, bound in (("max_seqlen_q", x.max_seqlen_q), ("max_seqlen_k", x.max_seqlen_k)):
        if bound is not None and bound < 0:
            raise fail(x, name, f"is {bound}", "it must be None or an upper bound >= 0")
    # Dense rows that no seqused shortens all count: a smaller bound would leave some of them out.
    for name, bound, rows, given in (
        ("max_seqlen_q", x.max_seqlen_q, x.q.shape[1], (x.cu_seqlens_q, x.seqused_q)),
        ("max_seqlen_k", x.max_seqlen_k, x.k.shape[1], (x.cu_seqlens_k, x.seqused_k, x.page_table)),
    ):
        if bound is not None and all(t is None for t in given) and bound < rows:
            raise fail(
                x, name, f"is {bound}", f"every sequence has length {rows}, and it must bound them all"
            )
    if q_capacity(x) > MAX_SEQLEN:
        raise fail(x, "q", f"has shape {_shape(x.q)}", f"a sequence may have at most {MAX_SEQLEN} queries")
    if k_capacity(x) > MAX_SEQLEN:
        name = "k" if x.page_table is None else "page_table"
        raise fail(x, name, f"allows {k_capacity(x)} keys", f"a sequence may have at most {MAX_SEQLEN}")


def _check_scalars(x: Inputs) -> None:
    for name, side in (("left", x.window_left), ("right", x.window_right)):
        if side < -1:
            raise fail(x, "window_size", f"has {name} side {side}", "a side is None or -1 (open), or >= 0")
    if x.num_splits < 0 or x.num_splits > MAX_SPLITS:
        raise fail(x, "num_splits", f"is {x.num_splits}", f"it must be 0 (automatic) to {MAX_SPLITS}")
    if x.sm_margin < 0:
        raise fail(x, "sm_margin", f"is {x.sm_margin}", "it must be >= 0")
    if x.softmax_scale is not None and not float("-inf") < x.softmax_scale < float("inf"):
        raise fail(x, "softmax_scale", f"is {x.softmax_scale}", "it must be None or a finite number")


def check_out(x: Inputs, name: str, t: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise unless `t` can take a result of that shape and dtype in place, without overlapping itself."""
    if not isinstance(t, torch.Tensor):
        raise fail(x, name, f"is a {type(t).__name__}", "it must be a torch.Tensor", TypeError)
    if tuple(t.shape) != tuple(shape):
        raise fail(x, name, f"has shape {_shape(t)}", f"it must be {tuple(shape)}")
    if t.dtype != dtype:
        raise fail(x, name, f"has dtype {t.dtype}", f"it must be {dtype}")
    if t.device != x.q.device:
        raise fail(x, name, f"is on {t.device}", f"it must be on the queries' device {x.q.device}")
    if t.dim() > 0 and t.shape[-1] > 1 and t.stride(-1) != 1:
        raise fail(x, name, f"has last stride {t.stride(-1)}", "its last dimension must be contiguous")
    if any(n > 1 and s == 0 for n, s in zip(t.shape, t.stride(), strict=True)):
        raise fail(x, name, "is expanded (a stride is 0)", "every element needs its own place")


def q_capacity(x: Inputs) -> int:
    return x.q.shape[0] if x.cu_seqlens_q is not None else x.q.shape[1]


def k_capacity(x: Inputs) -> int:
    if x.page_table is not None:
        return x.page_table.shape[1] * x.k.shape[1]
    return x.k.shape[0] if x.cu_seqlens_k is not None else x.k.shape[1]


def is_aligned(t: torch.Tensor) -> bool:
    """True when every row along the last dimension starts on a 16-byte boundary, less than 64 GB after the one before.

    (A stride in units of 16 bytes then has 32 bits: `kernels/parts/address.py`.)
    """
    vec = 16 // t.element_size()
    most = vec << 32
    sizes_strides = zip(t.shape[:-1], t.stride()[:-1], strict=True)
    return t.data_ptr() % 16 == 0 and all(n <= 1 or (s % vec == 0 and s < most) for n, s in sizes_strides)


def has_tma_strides(t: torch.Tensor) -> bool:
    """True when the copy engine can walk the tokens of `t`: its token stride is a positive multiple of 16 bytes.

    (A tensor of one token has a stride too, which `is_aligned` need not look at.)
    """
    stride = t.stride(-3) * t.element_size()
    return stride > 0 and stride % 16 == 0


def wide_mask(x: Inputs) -> int:
    """Bytes of an element of a mask of which every row of every block starts on 16 bytes, its keys side by side; 0 for
    any other mask, and for none. Blocks begin where a multiple of 16 keys does unless a window or chunk says otherwise.
    """
    if (
        x.mask is None
        or x.tree_mask is not None
        or (x.mask.stride(3) != 1 and x.mask.shape[3] > 1)
        or not is_aligned(x.mask)
    ):
        return 0
    at_multiples = x.window_left < 0 and x.attention_chunk == 0 and x.tokens_per_split % 16 == 0
    return x.mask.element_size() if at_multiples else 0


def has_features(x: Inputs) -> bool:
    """True when a call asks for more than plain attention over a band of keys."""
    tensors = (x.sink, x.alibi_slopes, x.mask, x.tree_mask, x.cache_batch_idx, x.cache_leftpad, x.rotary_cos)
    return x.softcap > 0 or x.attention_chunk > 0 or any(t is not None for t in tensors)


def problem_of(x: Inputs, out: torch.Tensor | None = None) -> Problem:
    """Reduce checked inputs, and where the output goes if that is known, to what the planner needs."""
    batch = x.batch
    tensors = (x.q, x.k, x.v) if out is None else (x.q, x.k, x.v, out)
    rows, keys = q_capacity(x), k_capacity(x)
    max_q = rows if x.max_seqlen_q is None else min(x.max_seqlen_q, rows)
    max_k = keys if x.max_seqlen_k is None else min(x.max_seqlen_k, keys)
    ragged_q = x.cu_seqlens_q is not None
    layout: KVLayout = "dense" if x.cu_seqlens_k is None else "ragged"
    if x.page_table is not None:
        layout = "paged"
    return Problem(
        device_type=x.q.device.type,
        dtype=x.q.dtype,
        batch=batch,
        num_heads=x.q.shape[-2],
        num_kv_heads=x.k.shape[-2],
        head_dim=x.q.shape[-1],
        head_dim_v=x.v.shape[-1],
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        total_q=x.q.shape[0] if ragged_q else batch * rows,
        total_k=min(batch * max_k, x.k.shape[0]) if layout == "ragged" else batch * max_k,
        q_layout="ragged" if ragged_q else "dense",
        kv_layout=layout,
        page_size=x.k.shape[1] if layout == "paged" else 0,
        window_left=None if x.window_left < 0 else x.window_left,
        window_right=None if x.window_right < 0 else x.window_right,
        bottom_right=x.bottom_right,
        lengths_on_device=layout != "dense" or x.seqused_k is not None,
        aligned=all(is_aligned(t) for t in tensors),
        tma_strides=has_tma_strides(x.k) and has_tma_strides(x.v),
        num_splits=x.num_splits,
        pack_gqa=x.pack_gqa,
        sm_margin=x.sm_margin,
        softcap=x.softcap > 0,
        attention_chunk=x.attention_chunk,
        tokens_per_split=x.tokens_per_split,
        tensor_mask=x.mask is not None or x.tree_mask is not None,
        featured=has_features(x),
        rotary=x.rotary_cos is not None,
        wide_mask=wide_mask(x),
        mask_sizes=mask_sizes(x),
        extras=extras_of(x, out),
    )
