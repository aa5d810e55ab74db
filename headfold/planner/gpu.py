"""Plans for the Triton backend: which kernel, which tile, how many splits."""

from __future__ import annotations

from dataclasses import replace

from headfold.planner import hopper, hopper_decode
from headfold.planner.device import Device
from headfold.planner.mixed import beside_sms, short_queries
from headfold.planner.plan import Plan
from headfold.planner.tiles import Form, Tile, decode_tile, padded, prefill_tile, shared_memory, split_dim
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
# Blocks for each multiprocessor, at the tile of one wave, up to which smaller blocks are used: 32:8 b1 s1024 4.4 us with
# 64 keys in 16 splits, 5.3 with 128 in 8 (loop alone, H200).
FEW_BLOCKS = 0.75
# Bytes of K and V of a head of a sequence up to which many waves of programs have smaller blocks: each starts anew.
SHORT = 2 << 20
# What the start of a sequence costs in a stream, in blocks. 64 ragged sequences in rows: 0 1.066 x read, 1 1.048, 2 1.043,
# 4 1.060; in pages of 16: 1 1.092, 2 1.071, 3 1.067. One for both, for the cuts are part of a result's bits.
GAP = 2
# Keys that a fixed extent has at most where it can be halved: an extent is one program's. 16 sequences of 32:8 s8192 in extents
# of 8192 keys take 142.9 us, 128 programs that have a multiprocessor each and cannot fill it; in extents of 2048 124.7.
LONGEST_EXTENT = 2048
# Why one sequence is cut into equal splits. 32:8 s8192 in pages of 16 takes 14.0 us in splits of the Gluon kernel, 15.0 in
# ranges, 17.0 in splits of the Triton kernel; s1024 7.0, 8.1 and 8.8, 16:2 d256 s16384 14.9, 19.5 and 19.8.
ONE_SEQUENCE = "there is one sequence"
# The share of ranges that may be given up for even cuts: 16 sequences in 32 ranges of 33 1.07 x read, in 33 1.15.
UNEVEN = 0.05


def plan_gpu(p: Problem, device: Device, given: Tile | str | None = None) -> Plan:
    """Decide how `p` runs through the kernels on `device`.

    `given` is the Gluon decode kernel's tile where that is settled, "" where the Triton kernel must take the call.
    """
    fold, fold_reason = choose_fold(p)
    usable = max(1, device.sms - p.sm_margin)
    units = p.num_heads // fold
    rows = p.max_seqlen_q * fold
    reasons = [fold_reason]
    if rows > DECODE_ROWS and p.num_splits < 2 and not p.tokens_per_split:
        whole = prefill_plan(p, device, fold, reasons)
        if whole is not None:
            return with_short_sequences(whole, p, device, fold)
    # A sequence whose splits are fixed must not get another tile for what else is in its batch.
    tile_rows = fold if p.tokens_per_split else rows
    form, why = decode_form(p, device, fold, tile_rows)
    gluon = given
    if gluon is None:
        streamed = form in ("stream", "pages") and why in ("", ONE_SEQUENCE)
        gluon = hopper_decode.decode_tile(p, device, tile_rows, units, streamed)
    tile = gluon if isinstance(gluon, Tile) else tile_of(p, device, form, tile_rows)
    if gluon and not isinstance(gluon, Tile):
        reasons.append(gluon)
    slots = usable * tile.resident
    tiles, _, packed = count_tiles(p, fold, tile.rows)
    blocks = span_blocks(p, tile.keys)
    ranges = (0, 0)
    if p.tokens_per_split:
        extent = fixed_extent(p.tokens_per_split)
        splits = -(-p.max_seqlen_k // extent)
        reasons.append(
            f"{splits} splits a tile of {extent} keys, as tokens_per_split={p.tokens_per_split} asks"
        )
    elif p.num_splits:
        splits = p.num_splits
        reasons.append(f"{splits} split{'s' if splits > 1 else ''} a tile, forced by num_splits")
    elif why or packed:
        splits = choose_splits(tiles * units, blocks, slots)
        over = f"over {blocks} block{'s' if blocks > 1 else ''}"
        reasons.append(f"{splits} split{'s' if splits > 1 else ''} a tile, {over}")
    else:
        splits = 1
    why = why or ("packed tiles search for their sequences" if packed else "")
    if why:
        reasons.append(f"every tile has equal shares: {why}")
    else:
        lanes = tiles // p.batch * units
        # An extent is cut nowhere: more ranges than extents would leave programs without one, two on a multiprocessor.
        ranges = choose_ranges(p.batch, lanes, splits if p.tokens_per_split else blocks, slots)
        reasons.append(
            f"the list of {p.batch} sequences is cut on the device into {ranges[0]} ranges of equal cost, {lanes} programs each"
        )
    plan = _plan(p, device, "decode", tile, fold, splits, reasons, ranges)
    return hopper_decode.on_hopper(plan, p, tile) if isinstance(gluon, Tile) else plan


def with_short_sequences(whole: Plan, p: Problem, device: Device, fold: int) -> Plan:
    """The plan of a prefill, and in a mixed batch of the decodes beside it."""
    queries = short_queries(p, fold)
    if not queries:
        return whole
    part = replace(p, max_seqlen_q=queries, total_q=min(p.total_q, p.batch * queries), lengths_on_device=True)
    mixed = "the average sequence is far shorter than the longest: short ones run apart, as a decode"
    tile = hopper_decode.beside_tile(part, device, queries * fold) if whole.backend == "hopper" else None
    sms = beside_sms(device)
    if tile is None or p.sm_margin:  # both together would take those that are left to others
        return replace(
            whole, short=plan_gpu(part, device), short_queries=queries, reasons=(*whole.reasons, mixed)
        )
    short = plan_gpu(replace(part, sm_margin=device.sms - sms), device, tile)
    reasons = (
        *whole.reasons,
        mixed,
        f"it has {sms} multiprocessors while the prefill has the others, then all",
    )
    return replace(whole, short=short, short_queries=queries, beside=True, reasons=reasons)


def prefill_plan(p: Problem, device: Device, fold: int, reasons: list[str]) -> Plan | None:
    """The plan of many rows that need no split of their keys, None where a split would fill the device better."""
    usable = max(1, device.sms - p.sm_margin)
    units, rows = p.num_heads // fold, p.max_seqlen_q * fold
    tile = prefill_tile(
        p.head_dim,
        p.head_dim_v,
        p.dtype,
        tma_possible(p) and not p.rotary,
        device,
        paged=p.kv_layout == "paged",
        aligned=p.aligned,
        tensor_mask=p.tensor_mask or p.rotary,
    )
    whole, _, _ = count_tiles(p, fold, tile.rows)
    decode = tile_of(p, replace(device, tiles=()), "wave", rows)
    tiles, _, _ = count_tiles(p, fold, decode.rows)
    idle = p.num_splits == 0 and whole * units < usable
    if idle and choose_splits(tiles * units, span_blocks(p, decode.keys), usable) > 1:
        reasons.append(f"{whole * units} tiles leave multiprocessors idle: keys are split instead")
        return None
    reasons.append(
        f"{rows} folded rows a sequence fill {whole * units} tiles of {tile.rows}: no split needed"
    )
    parted = short_queries(p, fold) > 0
    gluon = hopper.plan_hopper(p, device, whole * units * tile.rows, parted)
    if isinstance(gluon, Plan):
        return gluon
    reasons.append(gluon)
    return _plan(p, device, "prefill", tile, fold, 1, reasons)


def tile_of(p: Problem, device: Device, form: Form, rows: int) -> Tile:
    """The decode kernel's tile of a problem."""
    return decode_tile(
        rows,
        p.head_dim,
        p.head_dim_v,
        p.dtype,
        form,
        device,
        p.aligned,
        featured=p.featured or has_own_kernel(device, rows),
        tensor_mask=p.tensor_mask,
        rotary=p.rotary,
    )


def has_own_kernel(device: Device, rows: int) -> bool:
    """Whether the Gluon kernel takes plain calls of so many rows: what is left of them needs no program of its own."""
    return rows > hopper_decode.TRITON_ROWS and device.arch == (9, 0)


def decode_form(p: Problem, device: Device, fold: int, rows: int) -> tuple[Form, str]:
    """(form of the tile, why the sequences are not streamed, empty where they are).

    Forms are told apart in blocks of the built-in tiles: a machine's own table says how each form runs, not which.
    """
    why = not_streamed(p)
    if p.kv_layout == "paged":
        return "pages", why
    # Rows of a cache are computed as its pages are: the same bits.
    if p.lengths_on_device or not why or (p.tokens_per_split and not own_program(p)):
        return "stream", why
    one = tile_of(p, replace(device, tiles=()), "wave", rows)
    tiles = count_tiles(p, fold, one.rows)[0] * (p.num_heads // fold)
    usable = max(1, device.sms - p.sm_margin)
    if p.featured or own_program(p):
        return "wave", why
    if tiles * span_blocks(p, one.keys) <= FEW_BLOCKS * usable:
        return "few", why
    # Long sequences do not care how a program starts: 32:8 b64 s8192 1.027 x read in the tile of one wave, 1.033 in the other.
    each = span_blocks(p, 1) * (p.head_dim + p.head_dim_v) * p.dtype.itemsize
    return "waves" if tiles > usable and each <= SHORT else "wave", why


def own_program(p: Problem) -> bool:
    """True for calls whose program, of which there are few, knows equal shares alone."""
    return p.tensor_mask or p.rotary or not p.aligned


def not_streamed(p: Problem) -> str:
    """Why a decode's sequences get equal shares of programs, empty where their list is cut into equal ranges."""
    if own_program(p):
        return "masks, rotation and unaligned rows have programs that know nothing else"
    if not p.tokens_per_split:
        if p.num_splits:
            return "so num_splits asks"
        if not p.lengths_on_device:
            return "the lengths are the same"
        if p.batch == 1:
            return ONE_SEQUENCE
    if p.batch * (p.max_seqlen_k // 16 + GAP) >= 2**30:
        return "the list of all blocks would not fit 32 bits"
    return ""


def fixed_extent(tokens_per_split: int) -> int:
    """Keys of a split that tokens_per_split fixes: a function of it alone, for a sequence's bits depend on where cuts are."""
    extent = tokens_per_split
    while extent > LONGEST_EXTENT and extent % 256 == 0:
        extent //= 2
    return extent


def choose_ranges(batch: int, lanes: int, blocks: int, slots: int) -> tuple[int, int]:
    """(ranges of a list of sequences, of a list of equal ones).

    As many as the device holds at a time, none without a block; for equal sequences up to UNEVEN fewer where they
    divide evenly then: a cut through a sequence costs two states and a start.
    """
    most = max(1, min(slots // lanes, batch * blocks))
    even = [n for n in range(most, int(most * (1 - UNEVEN)), -1) if n % batch == 0 or batch % n == 0]
    return most, even[0] if even else most


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


def programs(p: Problem, device: Device, kernel: str, tile: Tile) -> tuple[bool, bool, bool]:
    """What the kernel's program must know: (features, masks and trees, rotation of q).

    Compiled programs are a budget: what a feature needs is decided at run time, within few programs. Masks and q's
    rotation take registers that the others need: their loads are narrow, and each has an address of its own. So they
    have programs of their own, and unaligned rows, slow for other reasons, one that knows all.
    """
    if kernel == "decode":
        all_of_it = p.tensor_mask or p.rotary or not p.aligned
        featured = p.featured or all_of_it or has_own_kernel(device, tile.rows)
        return featured, all_of_it, all_of_it and tile.rows == 16
    rotary = p.featured and (p.rotary or not p.aligned)
    return p.featured, rotary or p.tensor_mask, rotary


def mask_lists(p: Problem, tile: Tile, fold: int) -> tuple[tuple[int, int, int], int]:
    """((sequences, head units, tiles) that have a list of live blocks of their own, blocks that a list may hold).

    Of a prefill, that is. A decode has none: its equal shares would have to be shares of a list whose length the host
    does not know, and lengths and left padding leave keys out without another launch.
    """
    sequences, heads, queries, keys = p.mask_sizes
    if keys == 0:
        return (0, 0, 0), 0
    same_heads = heads == 1 or fold <= tile.rows  # every tile holds every head of its unit
    same_band = p.window_left is None and p.window_right is None and not p.attention_chunk
    tiles = 1 if queries == 1 and same_heads and same_band else count_tiles(p, fold, tile.rows)[1]
    return (sequences, p.num_heads // fold if heads > 1 else 1, tiles), -(-keys // tile.keys)


def _plan(
    p: Problem,
    device: Device,
    kernel: str,
    tile: Tile,
    fold: int,
    splits: int,
    reasons: list[str],
    cuts: tuple[int, int] = (0, 0),
) -> Plan:
    ranges, even_ranges = cuts
    tiles, per_sequence, search = count_tiles(p, fold, tile.rows)
    lanes = p.num_heads // fold * max(1, per_sequence)
    state_rows = min(tile.rows, p.max_seqlen_q * fold)
    if p.tokens_per_split or not ranges:
        states = tiles * (p.num_heads // fold) * splits if splits > 1 else 0
    else:
        states = 2 * ranges * lanes
    row_width = -(-p.head_dim_v // 8) * 8  # rows of the workspace stay 16-byte aligned
    if padded(p.head_dim) != p.head_dim:
        reasons.append(
            f"head dimension {p.head_dim} runs as {' + '.join(str(n) for n in split_dim(p.head_dim) if n)}"
        )
    if tile.own:
        reasons.append("the tile comes from this machine's own table, which `headfold tune` measured")
    featured, tensor_mask, rotary = programs(p, device, kernel, tile)
    # A prefill's loop fetches such masks ahead; a decode, which waits for K and V, has no program to spare for it.
    wide_mask = p.wide_mask if kernel == "prefill" and p.wide_mask <= 2 and not rotary else 0
    paged = p.kv_layout == "paged"
    # What may be streamed has no program besides for shares that the caller counts: programs are a budget.
    streams = paged or p.lengths_on_device or ranges > 0 or p.tokens_per_split > 0
    lists, list_blocks = mask_lists(p, tile, fold) if kernel == "prefill" else ((0, 0, 0), 0)
    return Plan(
        backend="triton",
        kernel=kernel,  # type: ignore[arg-type]
        stream=kernel == "decode" and streams and not own_program(p),
        ranges=ranges,
        even_ranges=even_ranges,
        gap=GAP if ranges else 0,
        extent=fixed_extent(p.tokens_per_split),
        resident=tile.resident,
        early=device.starts_early and kernel == "decode",
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
        paged=paged,
        featured=featured,
        tensor_mask=tensor_mask,
        rotary=rotary,
        wide_mask=wide_mask,
        mask_lists=lists,
        mask_list_blocks=list_blocks,
        workspace=states * state_rows * (row_width + 1) * 4,
        own_tile=tile.own,
        shared_memory=shared_memory(tile, p.head_dim, p.head_dim_v, p.dtype, paged=paged),
        reasons=tuple(reasons),
    )
