"""Short tiles of the Hopper prefill: 64 rows of one consumer, several programs a multiprocessor, where tiles see few blocks."""

from __future__ import annotations

from headfold.planner.tiles import Tile
from headfold.problem import Problem

# By columns of queries and of values: programs a multiprocessor, as many as shared memory and registers have room for; and how
# many blocks a tile of two consumers sees up to which short tiles take its place. A tile costs as much as several of its blocks
# before its first product and behind its last one, which several programs hide from each other; of more blocks two consumers
# that share K and V are faster. On an H200, 8192 keys, windows of 128, 256, 512, 1024 keys, us: 64:8 d64 in tiles of two
# consumers 178, 203, 263, 397, in short ones two a multiprocessor 101, 143, 233, 396, three 90, 124, 202, 346, four 84, 117,
# 192, 332; 32:8 d128 102, 119, 161, 267, two short ones 70, 100, 157, 289, a window of 512 in pages of 16 219 and 188.
# Without a left edge, dense or ragged calls, over those of tiles of two consumers (64 sequences of 16 to 256, 1024 or 4096
# tokens, as long on average as dense ones are): 64:8 d64 causal 256 0.69, 512 0.79, 1024 0.85, full 256 0.78, 512 1.00, 1024
# 0.98, 2048 1.13, ragged 0.52, 0.75, 0.92; 32:8 d128 causal 256 0.97, 512 1.04, full 1.11 and 1.21, ragged 0.64, 0.95, 1.14.
RESIDENT = {64: 4, 128: 2}
MOST_BLOCKS = {64: 9, 128: 5}
MOST_BLOCKS_DENSE = {64: 8, 128: 0}
MOST_BLOCKS_RAGGED = {64: 17, 128: 5}
ROWS = 64
# Keys of a block: of a window of 128 keys 64 rows see 191, three blocks of 64 or two of 128.
KEYS = 64
STAGES = 2


def short_tile(p: Problem, wide: int, rows: int, keys: int) -> Tile | None:
    """The short tile of a problem, None where tiles of `rows` rows, in blocks of `keys` keys, see more than a few of them.

    `wide` are the most columns of its products. Programs are a budget: short tiles are those for a left edge, have no softcap,
    and without a left edge they take no pages, whose boxes would be small, nor what has the bits of pages.
    """
    columns = next((n for n in RESIDENT if wide <= n), 0)
    if not columns or p.softcap or p.tensor_mask:
        return None
    if p.window_left is not None or p.attention_chunk:
        most = MOST_BLOCKS[columns]
    elif p.kv_layout == "ragged":
        most = MOST_BLOCKS_RAGGED[columns]
    elif p.kv_layout == "dense" and not p.lengths_on_device:
        most = MOST_BLOCKS_DENSE[columns]
    else:
        return None
    if -(-keys_seen(p, rows) // keys) > most:
        return None
    return Tile(ROWS, KEYS, 8, STAGES, tma=True, resident=RESIDENT[columns])


def keys_seen(p: Problem, rows: int) -> int:
    """The most keys that any tile of `rows` rows sees; of a ragged batch, of an average sequence."""
    everything = p.max_seqlen_k
    if p.kv_layout == "ragged":
        everything = min(everything, -(-p.total_k // p.batch))
    chunk = p.attention_chunk - 1 if p.attention_chunk else everything
    left = min(chunk, everything if p.window_left is None else p.window_left)
    right = min(chunk, everything if p.window_right is None else p.window_right)
    return min(everything, left + min(rows, p.max_seqlen_q) + right)
