"""Tiles and keys: what a tile number means, and which keys its rows see."""

from headfold.kernels.hopper.compat import gl, gluon


@gluon.jit
def locate(number, shape):
    """(sequence, query head, tile of the sequence) of a tile's place in the order of work.

    Heads go in sections whose K and V stay in the L2 cache together. Within a section the last tiles of all its heads
    come first: under a causal mask they are the longest, and what ends a launch should be short.
    """
    heads, tiles, section, units = shape
    start = number // (section * tiles) * section
    width = gl.minimum(section, units - start)
    rest = number - start * tiles
    level = rest // width
    unit = start + rest - level * width
    sequence = unit // heads
    return sequence, unit - sequence * heads, tiles - 1 - level


@gluon.jit
def row_keys(position, shift, window, sk):
    """Half-open range of keys that a query position sees; scalars or tensors. Open sides come as 2**30."""
    low = gl.maximum(position + shift - window[0], 0)
    return low, gl.minimum(position + shift + window[1] + 1, sk)


@gluon.jit
def tile_blocks(first, rows, sq, sk, shift, window, BLOCK_N: gl.constexpr):
    """(first key of a tile of `rows` positions from `first` on, end of its keys, its blocks, at least one)."""
    low, _ = row_keys(first, shift, window, sk)
    _, high = row_keys(gl.minimum(first + rows, sq) - 1, shift, window, sk)
    return low, high, gl.maximum(gl.cdiv(high - low, BLOCK_N), 1)


@gluon.jit
def full_blocks(first, rows, sq, sk, shift, window, low, blocks, BLOCK_N: gl.constexpr):
    """Blocks [left, right) of the tile that `rows` positions from `first` on see in full, 0 <= left <= right <= blocks."""
    last = gl.maximum(gl.minimum(first + rows, sq) - 1, 0)
    _, full_high = row_keys(first, shift, window, sk)
    full_low, _ = row_keys(last, shift, window, sk)
    left = gl.minimum(gl.cdiv(gl.maximum(full_low - low, 0), BLOCK_N), blocks)
    right = gl.maximum(full_high - low, 0) // BLOCK_N
    return left, gl.minimum(gl.maximum(right, left), blocks)
