"""Short tiles of the Hopper prefill: 64 rows of one consumer, several programs a multiprocessor, where tiles see few blocks."""

from __future__ import annotations

from headfold.planner.tiles import Tile
from headfold.problem import Problem

# Blocks that a tile of two consumers sees up to which short tiles take its place. A tile costs as much as several of its
# blocks before its first product and behind its last one, which several programs hide from each other; of more blocks two
# consumers that share K and V are faster. A first guess, to be measured.
SHORT_BLOCKS = 4
# Columns of queries and of values -> programs a multiprocessor: as many as its shared memory has room for.
RESIDENT = {64: 3, 128: 2}
ROWS = 64
# Keys of a block: of a window of 128 keys 64 rows see 191, three blocks of 64 or two of 128.
KEYS = 64
STAGES = 2


def short_tile(p: Problem, wide: int, rows: int, keys: int) -> Tile | None:
    """The short tile of a problem, None where tiles of `rows` rows, in blocks of `keys` keys, see more than a few of them.

    `wide` are the most columns of its products. Programs are a budget: short tiles have a left edge and no softcap.
    """
    resident = next((n for columns, n in RESIDENT.items() if wide <= columns), 0)
    if not resident or p.softcap or p.tensor_mask or (p.window_left is None and not p.attention_chunk):
        return None
    if -(-keys_seen(p, rows) // keys) > SHORT_BLOCKS:
        return None
    return Tile(ROWS, KEYS, 8, STAGES, tma=True, resident=resident)


def keys_seen(p: Problem, rows: int) -> int:
    """The most keys that any tile of `rows` rows sees."""
    everything = p.max_seqlen_k
    chunk = p.attention_chunk - 1 if p.attention_chunk else everything
    left = min(chunk, everything if p.window_left is None else p.window_left)
    right = min(chunk, everything if p.window_right is None else p.window_right)
    return min(everything, left + min(rows, p.max_seqlen_q) + right)
