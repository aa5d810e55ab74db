"""Checks of what a call adds to plain attention: caps, sinks, biases, masks, cache rows and fixed splits."""

from __future__ import annotations

import torch

from headfold.problem import DTYPES, MAX_SEQLEN, MAX_SPLITS, Inputs, fail, k_capacity, q_capacity


def check_features(x: Inputs) -> None:
    """Raise on the first feature argument that does not fit. Reads no device memory.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a shape, dtype, device, stride or value that does not fit, named in the message.
        NotImplementedError: a call that needs the backward.
    """
    _check_scalars(x)
    heads = x.q.shape[-2]
    if x.sink is not None:
        _check_tensor(x, "learnable_sink", x.sink, [(heads,)], DTYPES)
    if x.alibi_slopes is not None:
        _check_tensor(x, "alibi_slopes", x.alibi_slopes, [(heads,), (x.batch, heads)], (torch.float32,))
    if x.mask is not None:
        _check_mask(x, x.mask)
    if x.tree_mask is not None:
        _check_tree(x, x.tree_mask)
    for name, t in (("cache_batch_idx", x.cache_batch_idx), ("cache_leftpad", x.cache_leftpad)):
        if t is None:
            continue
        _check_tensor(x, name, t, [(x.batch,)], (torch.int32,))
        if x.cu_seqlens_k is not None:
            raise fail(x, name, "is given with cu_seqlens_k", "it belongs to a dense or paged cache")
    _check_rotary(x)
    _check_early_lengths(x)
    _check_gradients(x)


def _check_early_lengths(x: Inputs) -> None:
    if not 0 <= x.early_new <= MAX_SEQLEN:
        raise fail(x, "early_new", f"is {x.early_new}", f"it must be 0 to {MAX_SEQLEN}")
    if x.early_lengths is None:
        if x.early_new:
            raise fail(x, "early_new", f"is {x.early_new}", "it is added to early_lengths")
        return
    _check_tensor(x, "early_lengths", x.early_lengths, [(x.batch,)], (torch.int32,))
    if x.seqused_k is None:
        raise fail(x, "early_lengths", "is given without seqused_k", "it tells what that will hold")


def _check_scalars(x: Inputs) -> None:
    if not 0.0 <= x.softcap < float("inf"):
        raise fail(x, "softcap", f"is {x.softcap}", "it must be 0.0 (off) or a finite cap > 0")
    if not 0 <= x.attention_chunk <= MAX_SEQLEN:
        raise fail(x, "attention_chunk", f"is {x.attention_chunk}", f"it must be 0 (off) to {MAX_SEQLEN}")
    if not 0 <= x.tokens_per_split <= MAX_SEQLEN:
        raise fail(x, "tokens_per_split", f"is {x.tokens_per_split}", f"it must be None or 1 to {MAX_SEQLEN}")
    if x.tokens_per_split > 0:
        keys = k_capacity(x) if x.max_seqlen_k is None else min(x.max_seqlen_k, k_capacity(x))
        if keys > MAX_SPLITS * x.tokens_per_split:
            need = f"at most {MAX_SPLITS} splits can be merged, so it must be >= {-(-keys // MAX_SPLITS)}"
            raise fail(x, "tokens_per_split", f"is {x.tokens_per_split} for up to {keys} keys", need)


def _check_tensor(
    x: Inputs, name: str, t: torch.Tensor, shapes: list[tuple[int, ...]], dtypes: tuple[torch.dtype, ...]
) -> None:
    if not isinstance(t, torch.Tensor):
        raise fail(x, name, f"is a {type(t).__name__}", "it must be a torch.Tensor", TypeError)
    if t.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise fail(x, name, f"has dtype {t.dtype}", f"it must be {names}")
    if t.device != x.q.device:
        raise fail(x, name, f"is on {t.device}", f"it must be on the queries' device {x.q.device}")
    if tuple(t.shape) not in shapes:
        want = " or ".join(str(s) for s in shapes)
        raise fail(x, name, f"has shape {tuple(t.shape)}", f"it must be {want}")
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        raise fail(x, name, f"has last stride {t.stride(-1)}", "its last dimension must be contiguous")


def _check_mask(x: Inputs, mask: torch.Tensor) -> None:
    if not isinstance(mask, torch.Tensor):
        raise fail(x, "mask", f"is a {type(mask).__name__}", "it must be a torch.Tensor", TypeError)
    if x.cu_seqlens_q is not None or x.cu_seqlens_k is not None or x.page_table is not None:
        raise fail(x, "mask", "is given for a ragged or paged call", "q, k and v must be dense")
    if mask.dtype != torch.bool and mask.dtype not in DTYPES:
        raise fail(x, "mask", f"has dtype {mask.dtype}", "it must be bool, float16, bfloat16 or float32")
    if mask.device != x.q.device:
        raise fail(x, "mask", f"is on {mask.device}", f"it must be on the queries' device {x.q.device}")
    shape = (x.batch, x.q.shape[2], x.q.shape[1], x.k.shape[1])
    if tuple(mask.shape) != shape:
        raise fail(x, "mask", f"has shape {tuple(mask.shape)}", f"it must be (b, h, sq, sk) = {shape}")


def _check_tree(x: Inputs, tree: torch.Tensor) -> None:
    if not isinstance(tree, torch.Tensor):
        raise fail(x, "tree_mask", f"is a {type(tree).__name__}", "it must be a torch.Tensor", TypeError)
    if tree.dtype != torch.bool:
        raise fail(x, "tree_mask", f"has dtype {tree.dtype}", "it must be bool (or packed bits, uint8)")
    if tree.device != x.q.device:
        raise fail(x, "tree_mask", f"is on {tree.device}", f"it must be on the queries' device {x.q.device}")
    most = q_capacity(x) if x.max_seqlen_q is None else min(x.max_seqlen_q, q_capacity(x))
    if tree.dim() != 3 or tree.shape[0] != x.batch or tree.shape[1] != tree.shape[2] or tree.shape[1] < most:
        need = f"it must be (b, sq, sq) = ({x.batch}, {most}, {most})"
        raise fail(x, "tree_mask", f"has shape {tuple(tree.shape)}", need)
    if tree.shape[2] > 1 and tree.stride(2) != 1:
        raise fail(
            x, "tree_mask", f"has last stride {tree.stride(2)}", "its last dimension must be contiguous"
        )


def _check_rotary(x: Inputs) -> None:
    cos, sin, positions = x.rotary_cos, x.rotary_sin, x.rotary_positions
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        name = "rotary_cos" if cos is None else "rotary_sin"
        raise fail(x, name, "is None", "rotary_cos and rotary_sin come together")
    for name, t in (("rotary_cos", cos), ("rotary_sin", sin)):
        if not isinstance(t, torch.Tensor):
            raise fail(x, name, f"is a {type(t).__name__}", "it must be a torch.Tensor", TypeError)
        if t.dtype not in (x.q.dtype, torch.float32):
            need = " or ".join(str(d) for d in dict.fromkeys((x.q.dtype, torch.float32)))
            raise fail(x, name, f"has dtype {t.dtype}", f"it must be {need}")
        if t.device != x.q.device:
            raise fail(x, name, f"is on {t.device}", f"it must be on the queries' device {x.q.device}")
        if t.dim() != 2 or not 1 <= t.shape[1] <= x.q.shape[-1] // 2:
            need = f"it must be (max_len, rotary_dim / 2) with rotary_dim <= {x.q.shape[-1]}"
            raise fail(x, name, f"has shape {tuple(t.shape)}", need)
        if t.shape[1] > 1 and t.stride(1) != 1:
            raise fail(x, name, f"has last stride {t.stride(1)}", "its last dimension must be contiguous")
    if sin.shape != cos.shape or sin.dtype != cos.dtype or sin.stride(0) != cos.stride(0):
        got = f"is {tuple(sin.shape)} {sin.dtype} with strides {sin.stride()}"
        raise fail(x, "rotary_sin", got, f"it must be laid out as rotary_cos, {tuple(cos.shape)} {cos.dtype}")
    if positions is None:
        raise fail(x, "rotary_positions", "is None", "rotary_cos needs the position of every sequence")
    _check_tensor(x, "rotary_positions", positions, [(x.batch,)], (torch.int32,))


def _check_gradients(x: Inputs) -> None:
    if not torch.is_grad_enabled():
        return
    for name, t in (
        ("learnable_sink", x.sink),
        ("alibi_slopes", x.alibi_slopes),
        ("mask", x.mask),
        ("rotary_cos", x.rotary_cos),
        ("rotary_sin", x.rotary_sin),
    ):
        if t is not None and t.requires_grad:
            got = "requires a gradient, and headfold has no backward yet"
            need = "call it under torch.no_grad() or detach the inputs"
            raise fail(x, name, got, need, NotImplementedError)
