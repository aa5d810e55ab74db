"""Plans for the Triton backend: which kernel, which tile, how many splits."""

from __future__ import annotations

from headfold.planner.device import Device
from headfold.planner.hopper import plan_hopper
from headfold.planner.plan import Plan
from headfold.planner.tiles import Tile, decode_tile, padded, prefill_tile, shared_memory, split_dim
from headfold.planner.work import key_span
from headfold.problem import MAX_SPLITS, Problem

# Folded rows up to which the decode kernel's small tile takes a whole sequence at once.
DECODE_ROWS = 64
# What a program costs beyond its blocks (start, pipeline fill, epilogue), and what a fixup costs, in blocks.
# From the prototypes: a segment start costs about two blocks of 64 KB, a fixup kernel 3 to 4 us, about two.
START_COST = 2.0
FIXUP_COST = 2.0
# More than one wave costs 5 to 12 % (measured on an H200), for the programs of the first end at different times.
WAVE_COST = 1.05
FULL_WAVES = 4
FIXUP_COST_PER_SPLIT = 0.05


def plan_gpu(p: Problem, device: Device) -> Plan:
    """Decide how `p` runs through the Triton kernels on `device`."""
    fold, fold_reason = choose_fold(p)
    usable = max(1, device.sms - p.sm_margin)
    units = p.num_heads // fold
    rows = p.max_seqlen_q * fold
    reasons = [fold_reason]
    paged = p.kv_layout == "paged"
    # A sequence whose splits are fixed must not get another tile for what else is in its batch.
    decode_rows = fold if p.tokens_per_split else rows
    tile = decode_tile(
        decode_rows,
        p.head_dim,
        p.head_dim_v,
        p.dtype,
        paged,
        device,
        p.aligned,
        tensor_mask=p.tensor_mask,
        rotary=p.rotary,
    )
    tiles, _, _ = count_tiles(p, fold, tile.rows)
    blocks = span_blocks(p, tile.keys)
    splits = p.num_splits or choose_splits(tiles * units, blocks, usable)
    if p.tokens_per_split:
        splits = -(-p.max_seqlen_k // p.tokens_per_split)
    elif rows > DECODE_ROWS and p.num_splits < 2:
        prefill = prefill_tile(
            p.head_dim,
            p.head_dim_v,
            p.dtype,
            tma_possible(p) and not p.rotary,
            device,
            paged=paged,
            aligned=p.aligned,
            tensor_mask=p.tensor_mask or p.rotary,
        )
        whole, _, _ = count_tiles(p, fold, prefill.rows)
        if splits == 1 or whole * units >= usable:
            reasons.append(
                f"{rows} folded rows a sequence fill {whole * units} tiles of {prefill.rows}: no split needed"
            )
            hopper = plan_hopper(p, device, whole * units * prefill.rows)
            if isinstance(hopper, Plan):
                return hopper
            reasons.append(hopper)
            return _plan(p, device, "prefill", prefill, fold, 1, reasons)
        reasons.append(f"{whole * units} tiles leave multiprocessors idle: keys are split instead")
    how = "forced by num_splits" if p.num_splits else f"over {blocks} block{'s' if blocks > 1 else ''}"
    if p.tokens_per_split:
        how = f"of {p.tokens_per_split} keys, as tokens_per_split asks"
    reasons.append(f"{splits} split{'s' if splits > 1 else ''} a tile, {how}")
    return _plan(p, device, "decode", tile, fold, splits, reasons)


def choose_fold(p: Problem) -> tuple[int, str]:
    """Heads that share a tile's rows: the whole group unless the caller forbids it.

    Folding never needs more rows: ceil(sq * G / rows) <= G * ceil(sq / rows).
    """
    if p.pack_gqa is False and p.group > 1:
        return (
            1,
            f"the {p.group} heads of a group run apart, as pack_gqa=False asks: K and V are read by each",
        )
    if p.group == 1:
        return 1, "one query head per KV head: nothing to fold"
    return p.group, f"the {p.group} heads of a group are folded into rows: each K/V byte is read once"


def tma_possible(p: Problem) -> bool:
    """True when the copy engine can fetch K and V: 16-byte rows, whole tiles in the head dimension, no pages."""
    whole = all(split_dim(d) == (d, 0) for d in (p.head_dim, p.head_dim_v))
    return p.kv_layout != "paged" and p.tma_strides and p.aligned and whole and p.dtype.itemsize == 2


def count_tiles(p: Problem, fold: int, block_m: int) -> tuple[int, int, bool]:
    """(tiles of a head unit over the batch, tiles per sequence, whether a tile must search its sequence).

    A ragged batch is either laid out at its bound, every sequence with the tiles of the longest, or packed, and
    then a tile finds its sequence by bisection: whichever launches fewer programs.
    """
    per_sequence = -(-p.max_seqlen_q * fold // block_m)
    bound = p.batch * per_sequence
    packed = p.total_q * fold // block_m + p.batch
    if p.q_layout == "ragged" and packed < bound:
        return packed, 0, True
    return bound, per_sequence, False


def span_blocks(p: Problem, block_n: int) -> int:
    """Blocks of keys that the longest tile can see, at the bounds."""
    width = p.max_seqlen_k
    if p.window_left is not None and p.window_right is not None:
        width = min(width, p.max_seqlen_q + p.window_left + p.window_right + 1)
    elif p.window_left is not None or p.window_right is not None:
        start, end = key_span(p, 0, p.max_seqlen_q - 1)
        width = end - start
    if p.attention_chunk:
        width = min(width, p.max_seqlen_q + p.attention_chunk)
    return max(1, -(-width // block_n))


def choose_splits(tiles: int, blocks: int, sms: int) -> int:
    """Splits a tile that finish first, counting whole waves of programs and the fixup.

    time(s) = waves(tiles * s) * (ceil(blocks / s) + START_COST) + fixup, in block times of one multiprocessor,
    and WAVE_COST more than that when there is a second wave.
    From FULL_WAVES waves on the idle part of the last one is not worth a fixup, and nothing is split.
    """
    if tiles >= FULL_WAVES * sms:
        return 1

    def time(s: int) -> float:
        waves = -(-tiles * s // sms)
        fixup = FIXUP_COST + FIXUP_COST_PER_SPLIT * s if s > 1 else 0.0
        run = waves * (-(-blocks // s) + START_COST) + fixup
        return run * WAVE_COST if waves > 1 else run

    return min(range(1, min(MAX_SPLITS, blocks) + 1), key=time)


def programs(p: Problem, kernel: str, tile: Tile) -> tuple[bool, bool, bool]:
    """What the kernel's program must know: (features, masks and trees, rotation of q).

    Compiled programs are a budget: what a feature needs is decided at run time, within few programs. Masks and q's
    rotation take registers that the others need: their loads are narrow, and each has an address of its own. So they
    have programs of their own, and unaligned rows, slow for other reasons, one that knows all.
    """
    if kernel == "decode":
        all_of_it = p.tensor_mask or p.rotary or not p.aligned
        return p.featured or all_of_it, all_of_it, all_of_it and tile.rows == 16
    rotary = p.featured and (p.rotary or not p.aligned)
    return p.featured, rotary or p.tensor_mask, rotary


def _plan(
    p: Problem, device: Device, kernel: str, tile: Tile, fold: int, splits: int, reasons: list[str]
) -> Plan:
    tiles, per_sequence, search = count_tiles(p, fold, tile.rows)
    row_width = -(-p.head_dim_v // 8) * 8  # rows of the workspace stay 16-byte aligned
    if padded(p.head_dim) != p.head_dim:
        reasons.append(
            f"head dimension {p.head_dim} runs as {' + '.join(str(n) for n in split_dim(p.head_dim) if n)}"
        )
    featured, tensor_mask, rotary = programs(p, kernel, tile)
    # A prefill's loop fetches such masks ahead; a decode, which waits for K and V, has no program to spare for it.
    wide_mask = p.wide_mask if kernel == "prefill" and p.wide_mask <= 2 and not rotary else 0
    return Plan(
        backend="triton",
        kernel=kernel,  # type: ignore[arg-type]
        fold=fold,
        block_m=tile.rows,
        block_n=tile.keys,
        head_units=p.num_heads // fold,
        tiles=tiles,
        tiles_per_sequence=per_sequence,
        num_splits=splits,
        num_warps=tile.warps,
        num_stages=tile.stages,
        d_parts=split_dim(p.head_dim),
        dv_parts=split_dim(p.head_dim_v),
        use_tma=tile.tma,
        search_tiles=search,
        aligned=p.aligned,
        paged=p.kv_layout == "paged",
        featured=featured,
        tensor_mask=tensor_mask,
        rotary=rotary,
        wide_mask=wide_mask,
        workspace=splits * p.total_q * p.num_heads * (row_width + 1) * 4 if splits > 1 else 0,
        shared_memory=shared_memory(tile, p.head_dim, p.head_dim_v, p.dtype),
        reasons=tuple(reasons),
    )
