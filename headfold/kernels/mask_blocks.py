"""Which blocks of keys a mask leaves alive: a list for every tile, which the loop of a prefill walks.

A branch around the products of a dead block would cost the loop its pipeline; a list to walk leaves it as it is.
"""

import triton
import triton.language as tl

from headfold.kernels.parts.address import load_index, pointer
from headfold.kernels.parts.fold import fold_rows
from headfold.kernels.parts.mask import mask_elements, to_bias
from headfold.kernels.parts.spans import visible_keys
from headfold.kernels.parts.tile import tile_keys
from headfold.kernels.specialize import MASK_BLOCKS_ARGUMENTS

# Rows that are looked at together, the last ones of a tile first. Where the diagonal of a causal mask cuts a block, its
# last rows live: most blocks that are alive are known from these, and the other rows are not read.
ROWS: tl.constexpr = tl.constexpr(16)


@triton.jit
def seen_keys(
    mask, rows, first, low, high, chosen, unbanded, SIZE: tl.constexpr, WIDE: tl.constexpr, KEYS: tl.constexpr
):
    """Which of the keys first..first+KEYS some chosen row sees within its band low..high, (KEYS,) int32 of 0 and 1.

    mask is (address, kind, stride of a key). unbanded: these keys are in all bands. No condition along the keys then
    splits the 16-byte loads that WIDE promises to be possible.
    """
    address, kind, stride_key = mask
    TYPE: tl.constexpr = tl.uint8 if SIZE == 1 else (tl.int16 if SIZE == 2 else tl.float32)
    ALIGN: tl.constexpr = 16 // SIZE if WIDE else 1
    if unbanded:
        inside = chosen[:, None] & tl.full([1, KEYS], 1, tl.int1)
        raw = mask_elements(address, rows, first, stride_key, inside, TYPE, ALIGN, KEYS)
        bias = tl.where(inside, to_bias(raw, kind), float("-inf"))
    else:
        j = first + tl.arange(0, KEYS)
        inside = chosen[:, None] & (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
        raw = mask_elements(address, rows, first, stride_key, inside, TYPE, 1, KEYS)
        bias = tl.where(inside, to_bias(raw, kind), float("-inf"))
    return tl.max((bias > float("-inf")).to(tl.int32), 0)


@triton.jit(do_not_specialize=MASK_BLOCKS_ARGUMENTS)
def mask_blocks_kernel(
    lists: tl.int64,
    list_size: tl.int32,
    units: tl.int32,
    tiles: tl.int32,
    seqused_q: tl.int64,
    seqused_k: tl.int64,
    cache_leftpad: tl.int64,
    sq_capacity: tl.int32,
    sk_capacity: tl.int32,
    fold: tl.int32,
    window_left: tl.int32,
    window_right: tl.int32,
    bottom_right: tl.int32,
    chunk: tl.int32,
    mask: tl.int64,
    mask_kind: tl.int32,
    mask_stride_b: tl.int64,
    mask_stride_h: tl.int64,
    mask_stride_q: tl.int64,
    mask_stride_k: tl.int64,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Grid: one program for each list, (sequence * units + head unit) * tiles + tile; 1 where all share one.

    List n is list_size numbers (int32) from lists + n * list_size on: how many blocks of BLOCK_N keys, counted from
    the first key that the tile sees, have a key that one of its rows sees, and their numbers, ascending. What lies
    behind them is left as it was. Tiles without a row have no list.

    No element of a tile is read twice: of rows that share elements the first one reads. Rows that are not live, and keys
    outside a row's band, are not read.
    """
    number = tl.program_id(0)
    rest = number // tiles
    tile = number - rest * tiles
    seq = rest // units
    unit = rest - seq * units
    first_row = tile * BLOCK_M
    sq = load_index(seqused_q, seq, sq_capacity)
    if first_row >= sq * fold:
        return
    sk = tl.maximum(load_index(seqused_k, seq, sk_capacity) - load_index(cache_leftpad, seq, 0), 0)
    shift = (sk - sq) * bottom_right
    last_row = tl.minimum(first_row + BLOCK_M, sq * fold) - 1
    key_low, key_high, full_low, full_high = tile_keys(
        first_row // fold, last_row // fold, sk, shift, window_left, window_right, chunk, True
    )
    rows_here = tl.minimum(sq * fold - first_row, BLOCK_M)
    if mask_stride_q == 0:
        # A row reads for all positions of the tile, whose bands make up the keys of the tile. (The last position may be
        # in the tile for some heads only; a block that it alone sees is then listed for nothing.)
        rows_here = tl.minimum(rows_here, fold)
        full_low = key_low
        full_high = key_high
        if mask_stride_h == 0:
            rows_here = 1
    blocks = tl.minimum(tl.maximum(tl.cdiv(key_high - key_low, BLOCK_N), 0), list_size - 1)
    at = pointer(lists, tl.int32, 1) + number.to(tl.int64) * list_size
    BLOCKS: tl.constexpr = KEYS // BLOCK_N
    parts = tl.cdiv(rows_here, ROWS)
    count = 0
    for some in range(tl.cdiv(blocks, BLOCKS)):
        first = key_low + some * KEYS
        block = some * BLOCKS + tl.arange(0, BLOCKS)
        unbanded = (first >= full_low) & (first + KEYS <= full_high)
        known = (block >= blocks).to(tl.int32)
        for part in range(parts):
            if tl.min(known, 0) == 0:
                row, position, lane = fold_rows(first_row + (parts - 1 - part) * ROWS, fold, ROWS)
                chosen = row < first_row + rows_here
                if mask_stride_h == 0:
                    chosen = chosen & ((lane == 0) | (row == first_row))
                head = unit * fold + lane
                rows = position.to(tl.int64) * mask_stride_q + head.to(tl.int64) * mask_stride_h
                low, high = visible_keys(position, shift, window_left, window_right, chunk, sk, True)
                low = tl.where(mask_stride_q == 0, key_low, low)
                high = tl.where(mask_stride_q == 0, key_high, high)
                seen = seen_keys(
                    (mask, mask_kind, mask_stride_k),
                    rows + seq.to(tl.int64) * mask_stride_b,
                    first,
                    low,
                    high,
                    chosen,
                    unbanded,
                    SIZE,
                    WIDE,
                    KEYS,
                )
                known = tl.maximum(known, tl.max(tl.reshape(seen, [BLOCKS, BLOCK_N]), 1))
        alive = tl.where(block < blocks, known, 0)
        # Entry 0 is for the count.
        tl.store(at + count + tl.cumsum(alive, 0), block, mask=alive != 0)
        count += tl.sum(alive, 0)
    tl.store(at, count)
