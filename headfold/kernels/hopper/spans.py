"""Tiles and keys: what a tile number means, and which keys its rows see."""

from headfold.kernels.hopper.compat import gl, gluon
from headfold.kernels.hopper.layouts import GROUP_ROWS, accumulator
from headfold.kernels.parts.division import divide
from headfold.kernels.parts.spans import OPEN

# Under a left window a tile's blocks begin at a multiple of so many keys: dense and paged calls cut keys alike.
EDGE = gl.constexpr(16)
# What LEFT is where chunks are looked at too. Programs with a left edge look once a tile whether there are any.
CHUNKS = gl.constexpr(2)


@gluon.jit
def locate(number, shape):
    """(number of the sequence, query head, tile of the sequence) of a tile's place in the order of work.

    Heads go in sections whose K and V stay in the L2 cache together. Within a section the last tiles of all its heads
    come first: under a causal mask they are the longest, and what ends a launch should be short.
    """
    heads, tiles, section, units = shape
    start = number // (section * tiles) * section
    width = gl.maximum(gl.minimum(section, units - start), 1)  # past the last tile: no division by 0
    rest = number - start * tiles
    level = rest // width
    unit = start + rest - level * width
    number = unit // heads
    return number, unit - number * heads, tiles - 1 - level


@gluon.jit
def find(number, place, shape, tile_list):
    """(number of the sequence, query head, tile, place of the sequence in the list) of a tile's place in the order of work.

    For ragged batches: tile_list is what `kernels/tile_list.py` makes, place that of an earlier tile. A sequence's tiles
    come together, heads in sections and levels as in `locate`.
    """
    heads, _, section, units = shape
    end = gl.load(tile_list + place + 1)
    while number >= end * heads:
        place += 1
        end = gl.load(tile_list + place + 1)
    start = gl.load(tile_list + place)
    entry = gl.load(tile_list + units // heads + 1 + place)
    tiles = end - start
    section = gl.minimum(section, heads)
    rest = number - start * heads
    first = rest // (section * tiles) * section
    width = gl.minimum(section, heads - first)
    rest -= first * tiles
    level = rest // width
    return entry, first + rest - level * width, tiles - 1 - level, place


@gluon.jit
def row_keys(position, shift, window, sk, LEFT: gl.constexpr):
    """Half-open range of keys that a query position sees; scalars or tensors.

    `window` is (left, right, chunk, what divides by chunk); open sides, and no chunk, come as OPEN. Chunks are looked at
    with LEFT = CHUNKS alone. Both ends never decrease with the position.
    """
    left, right, chunk, by = window
    low = gl.maximum(position + shift - left, 0)
    high = gl.minimum(position + shift + right + 1, sk)
    if LEFT == CHUNKS:
        at = position + shift
        start = divide(gl.maximum(at, 0), by) * chunk
        low = gl.maximum(low, start)
        # A query before the first key has no chunk that a key could share.
        high = gl.where(at < 0, 0, gl.minimum(high, start + chunk))
    return low, high


@gluon.jit
def seen_end(sq, sk, shift, window, LEFT: gl.constexpr):
    """Where the keys end that the last query sees, or sk if that is less."""
    if LEFT == CHUNKS:
        _, end = row_keys(sq - 1, shift, window, sk, LEFT)
    else:
        end = sq + shift + window[1]
    return end


@gluon.jit
def tile_blocks(first, rows, sq, sk, shift, window, BLOCK_N: gl.constexpr, LEFT: gl.constexpr):
    """(first key that a tile of `rows` positions from `first` on sees, first key of its blocks, blocks, at least one).

    With LEFT blocks begin at a multiple of 16 keys, as boxes of pages must.
    """
    if LEFT:
        if window[2] < OPEN:
            found = blocks_of(first, rows, sq, sk, shift, window, BLOCK_N, CHUNKS)
        else:
            found = blocks_of(first, rows, sq, sk, shift, window, BLOCK_N, LEFT)
    else:
        found = blocks_of(first, rows, sq, sk, shift, window, BLOCK_N, LEFT)
    return found


@gluon.jit
def blocks_of(first, rows, sq, sk, shift, window, BLOCK_N: gl.constexpr, LEFT: gl.constexpr):
    """`tile_blocks`, with chunks where LEFT says so."""
    start, _ = row_keys(first, shift, window, sk, LEFT)
    _, high = row_keys(gl.minimum(first + rows, sq) - 1, shift, window, sk, LEFT)
    low = start
    if LEFT:
        low = start & -EDGE
    return start, low, gl.maximum(gl.cdiv(high - low, BLOCK_N), 1)


@gluon.jit
def seen_blocks(first, rows, sq, sk, shift, window, low, blocks, BLOCK_N: gl.constexpr, LEFT: gl.constexpr):
    """Blocks of the tile, at least one, behind which the `rows` positions from `first` on see nothing."""
    _, high = row_keys(gl.minimum(first + rows, sq) - 1, shift, window, sk, LEFT)
    high = gl.where(first < sq, high, low)
    return gl.minimum(gl.maximum(gl.cdiv(high - low, BLOCK_N), 1), blocks)


@gluon.jit
def full_blocks(first, rows, sq, sk, shift, window, low, blocks, BLOCK_N: gl.constexpr, LEFT: gl.constexpr):
    """Blocks [left, right) of the tile that `rows` positions from `first` on see in full, 0 <= left <= right <= blocks."""
    last = gl.maximum(gl.minimum(first + rows, sq) - 1, 0)
    _, full_high = row_keys(first, shift, window, sk, LEFT)
    full_low, _ = row_keys(last, shift, window, sk, LEFT)
    left = gl.minimum(gl.cdiv(gl.maximum(full_low - low, 0), BLOCK_N), blocks)
    right = gl.maximum(full_high - low, 0) // BLOCK_N
    return left, gl.minimum(gl.maximum(right, left), blocks)


@gluon.jit
def row_bounds(first, shift, window, sk, BLOCK_N: gl.constexpr, LEFT: gl.constexpr):
    """What `hide` needs to know of 64 positions from `first` on: with LEFT the first key that each sees and their end.

    Those are two registers a row for the whole tile, and chunks cost a block nothing. Without LEFT, where a
    comparison is all there is, scalars.
    """
    if LEFT:
        position = first + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, accumulator(BLOCK_N)))
        return row_keys(position, shift, window, sk, LEFT)
    else:
        return first + shift, window[1], sk


@gluon.constexpr_function
def rows_of_columns(layout):
    """The layout of what `by_column` sees has for its rows alone."""
    return gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout)))


@gluon.jit
def by_column(scores):
    """(`scores` with a dimension each for i, lane and j of their columns 8 i + 2 lane + j, the numbers 8 i, 2 lane + j).

    Such are a thread's columns: i is a constant that a comparison takes as it is; column numbers would take 32 registers.
    """
    ROWS: gl.constexpr = scores.shape[0]
    COLUMNS: gl.constexpr = scores.shape[1]
    view = scores.reshape([ROWS, COLUMNS // 8, 4, 2])
    layout: gl.constexpr = view.type.layout
    eight = gl.arange(0, COLUMNS // 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, layout)))) * 8
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout)))) * 2
    pair = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))
    return view, eight[None, :, None, None], lane[None, None, :, None] + pair[None, None, None, :]


@gluon.jit
def keep(scores, view, seen):
    """What `by_column` sees of `scores`, as scores: -inf where not `seen`."""
    view = gl.where(seen, view, float("-inf"))
    return gl.convert_layout(view.reshape(scores.shape), scores.type.layout, assert_trivial=True)


@gluon.jit
def hide(scores, bounds, key, LEFT: gl.constexpr):
    """`scores` of the block from `key` on, -inf where a row does not see the key. `bounds` are `row_bounds`.

    Without LEFT the left side is open.
    """
    view, eight, column = by_column(scores)
    of_rows: gl.constexpr = rows_of_columns(view.type.layout)
    if LEFT:
        low = gl.convert_layout(bounds[0], of_rows) - key
        high = gl.convert_layout(bounds[1], of_rows) - key
        seen = eight < high[:, None, None, None] - column
        seen = seen & (eight >= low[:, None, None, None] - column)
    else:
        first, right, sk = bounds
        row = gl.arange(0, scores.shape[0], of_rows)
        high = gl.minimum(row + (first + right + 1 - key), sk - key)
        seen = eight < high[:, None, None, None] - column
    return keep(scores, view, seen)


@gluon.jit
def sequence(number, lengths, VARLEN: gl.constexpr):
    """(batch index in q, its first row, its rows, batch index in K and V, their first key, their keys).

    Ragged tensors have one batch entry, in which a sequence begins where cu_seqlens says. `lengths` are the
    capacities of dense tensors, four pointers to int32 and a flag a pointer that tells whether it is given.
    """
    sq, sk, pointers, given = lengths
    q_batch = number
    k_batch = number
    q_first = 0
    k_first = 0
    if VARLEN:
        cu_q, cu_k, used_q, used_k = pointers
        if given[0] != 0:
            q_batch = 0
            q_first = gl.load(cu_q + number)
            sq = gl.load(cu_q + number + 1) - q_first
        if given[1] != 0:
            k_batch = 0
            k_first = gl.load(cu_k + number)
            sk = gl.load(cu_k + number + 1) - k_first
        if given[2] != 0:
            sq = gl.load(used_q + number)
        if given[3] != 0:
            sk = gl.load(used_k + number)
    return q_batch, q_first, sq, k_batch, k_first, sk
