"""Plans for the Gluon prefill of Hopper GPUs: what it takes, its tiles, its order of work."""

from __future__ import annotations

from headfold.extras import FAR_CACHE
from headfold.planner.device import Device
from headfold.planner.plan import Plan
from headfold.planner.short import short_tile
from headfold.planner.tiles import Tile
from headfold.problem import Problem

GROUP_ROWS = 64  # query positions of one head that a consumer warpgroup takes
# Tiles of three consumers (192 rows): 160 registers hold what they need up to head dimension 96. On an H200 they run at
# 1.12 times the speed of two, block by block (16384: d64 515 TFLOP/s against 451, d96 600 against 535), and lose where
# tiles see few blocks: d64 1024 without a mask 404 against 408, 2048 440 against 400; causal 1024 302 against 328, 4096 446
# against 425; d96 causal 4096 462 against 473, 4096 without a mask 553 against 501. With lengths on the device 64:8 d64 b4 8192
# causal takes 4191 us against 4589, in pages of 64 4514 against 5052.
TALL_DIM = 96
TALL_SPEED = 1.1
TALL_KEYS = 2048
TALL_KEYS_CAUSAL = 4096
STAGES = 2
# Columns that products can be over, in one part or two.
PRODUCT_DIMS = (64, 80, 96, 128, 160, 192, 256)
SWIZZLED = 128  # bytes of a row of shared memory as it is swizzled
# Buffers of V where rows are copied, which come later than boxes: values have half a block's time to come in two.
COPY_STAGES = 3
# Boxes lie in shared memory at multiples of 8 rows, the period of its swizzling.
FEWEST_PAGE_ROWS = 8
# The prefill copies keys row by row where their boxes would have fewer keys.
COPIED_BELOW = 8
COPIED_BELOW_WITH_EDGE = 16
# Keys of a box of the prefill: each size is a program, and larger ones are no faster (pages of 64, 128 and 256 3625, 3616 and
# 3589 us in boxes of their own; 32:8 d128 b4 8192 causal).
BOX_KEYS = (64, 16, 8)
# Boxes of a block up to which one warp fetches K and V (`kernels/hopper/pages.py`).
MOST_BOXES = 4
# With a left edge a tile's first block begins at a multiple of so many keys (`kernels/hopper/spans.py`).
EDGE = 16
# Of the words that `headfold/extras.py` has for what calls ask, what the prefill can do: always, and without a mask in memory.
TAKEN = ("a sink", FAR_CACHE)
TAKEN_UNMASKED = ("a softcap", "attention chunks")
# On an H200 this kernel runs at 1.3 times the Triton kernel's TFLOP/s (d128, 4096 keys; d96 1.4, d256 1.9, d64 as
# fast without a mask and 1.1 times causal): it may waste rows for it.
WORTH_ROWS = 1.3
# And in short tiles: 64 ragged sequences of 16 to 256 tokens take 298 us there and 102 here at 64:8 d64, for 1.4 times the
# rows, 189 and 97 at 32:8 d128 for 1.3 times.
WORTH_ROWS_SHORT = 2.0
# Share of the L2 cache that K and V of the heads in flight may take, where tiles are short or have the same length. b16 1024,
# full: a sixth, a third, two thirds, 1.4 give 552, 545, 534, 521 TFLOP/s at d256 h8, 523, 522, 504, 476 at d128 h16.
SECTION_OF_L2 = 1 / 3
# Tiles of a head, of two consumers or three, from which on all heads are in flight under a causal mask: their tiles then begin
# with the longest ones, and programs walk them side by side. b4 4096: a sixth, a third, two thirds of the L2 cache, everything
# give 577, 622, 542, 619 at d256 h8, 551, 520, 540, 561 at d128 h16, 429, 433, 428, 437 at d64 h32; b1 16384, d128: 598, 600,
# 578, 603.
ALL_AT_ONCE = 16


def plan_hopper(
    p: Problem, device: Device, triton_rows: int, parted: bool = False, tile: Tile | None = None
) -> Plan | str:
    """The plan of `p` on the Hopper kernel, or the reason why it goes to the Triton kernel.

    Args:
        p: the Problem.
        device: the Device.
        triton_rows: rows that the Triton kernel's tiles would hold.
        parted: the short sequences of a mixed batch run apart.
        tile: the tile to take in place of `prefill_tile`'s.
    """
    if device.arch != (9, 0) or p.device_type == "cpu":  # on CPU tensors kernels are interpreted
        return "the Triton kernel: the Gluon one is for Hopper GPUs"
    tile = tile or prefill_tile(p, device)
    d, dv = columns(p, tile.rows)
    keys = tile.keys
    taken = TAKEN if p.tensor_mask else TAKEN + TAKEN_UNMASKED
    reason = refusal(p, (d, dv), tuple(word for word in p.extras if word not in taken))
    fetched = fetched_rows(p, keys) if p.kv_layout == "paged" else 0
    if not reason and p.kv_layout == "paged" and not fetched:
        reason = no_boxes(p)
    far = fetched == 1 and FAR_CACHE in p.extras
    if not reason and far and p.softcap:
        reason = "which has no softcap for rows that are copied from more than 32 GiB"
    if not reason and p.pack_gqa and p.group > 1:
        reason = "which does not fold, as pack_gqa=True asks"
    rows = rows_held(p, tile.rows, parted)
    worth = WORTH_ROWS if tile.resident == 1 else WORTH_ROWS_SHORT
    if not reason and not p.tensor_mask and rows > worth * triton_rows:
        reason = f"whose tiles of one head would hold {rows} rows instead of {triton_rows}"
    if reason:
        return f"the Triton kernel, not the Gluon one, {reason}"
    head_bytes = p.max_seqlen_k * (p.head_dim + p.head_dim_v) * p.dtype.itemsize
    section = max(1, int(device.l2 * SECTION_OF_L2) // head_bytes) * p.group
    per_sequence = -(-p.max_seqlen_q // tile.rows)
    falling = p.window_right is not None and not left_edge(p) and not p.lengths_on_device
    if falling and -(-p.max_seqlen_q // max(tile.rows, 2 * GROUP_ROWS)) >= ALL_AT_ONCE:
        section = p.batch * p.num_heads
    dims: tuple[str, ...] = ()
    if (p.head_dim, p.head_dim_v) != (parts(d)[0], parts(dv)[0]):
        cut = [" + ".join(str(n) for n in parts(one) if n) for one in (d, dv)]
        dims = (f"head dimensions {p.head_dim}/{p.head_dim_v} run in {cut[0]} and {cut[1]} columns",)
    workers = min(max(1, device.sms - p.sm_margin) * tile.resident, p.batch * per_sequence * p.num_heads)
    consumers = ("a warpgroup computes", "two warpgroups compute", "three warpgroups compute")
    return Plan(
        backend="hopper",
        kernel="prefill",
        fold=1,
        block_m=tile.rows,
        block_n=keys,
        head_units=p.num_heads,
        tiles=p.batch * per_sequence,
        tiles_per_sequence=per_sequence,
        resident=tile.resident,
        num_warps=tile.warps,
        num_stages=tile.stages,
        value_stages=value_stages(p, tile),
        query_stages=query_stages(p, tile),
        d_parts=parts(d),
        dv_parts=parts(dv),
        use_tma=True,
        paged=fetched > 0,
        page_rows=fetched,
        left_edge=left_edge(p) or tile.resident > 1,
        softcap=p.softcap,
        far=far,
        workers=workers,
        section=min(section, p.batch * p.num_heads),
        shared_memory=shared_memory(p, tile),
        reasons=(
            f"{consumers[tile.rows // GROUP_ROWS - 1]} while another fetches "
            f"{'' if fetched == 1 else 'through the copy engine '}(Gluon, docs/hopper.md)",
            "a tile holds rows of one head: the heads of a group find K and V in the L2 cache",
            *(
                [f"tiles see few blocks: {tile.resident} programs share a multiprocessor"]
                if tile.resident > 1
                else []
            ),
            *dims,
            *pages_reason(p, fetched),
        ),
    )


def rows_held(p: Problem, height: int, parted: bool) -> int:
    """Rows that tiles of `height` rows of one head would hold, used or not, over all heads.

    A ragged batch is laid out at its bound, but a tile past its sequence's end is not there (`kernels/tile_list.py`).
    """
    # Sequences, each of which wastes part of a tile.
    ends = -(-p.total_q // p.max_seqlen_q) if parted else p.batch
    tiles = min(p.batch * -(-p.max_seqlen_q // height), -(-p.total_q // height) + ends)
    return tiles * p.num_heads * height


def prefill_tile(p: Problem, device: Device) -> Tile:
    """The prefill's tile: a short one where tiles see few blocks, else one of two consumers or three."""
    rows, keys = tile_rows(p, device), block_keys(p)
    short = short_tile(p, max(columns_in_memory(n, p.dtype.itemsize) for n in columns(p, rows)), rows, keys)
    # One warp fetches all of a block: where that takes many boxes, or rows are copied, several do.
    if short and (p.kv_layout != "paged" or short.keys <= MOST_BOXES * fetched_rows(p, short.keys)):
        return short
    return Tile(rows, keys, 4 * (rows // GROUP_ROWS + 1), STAGES, tma=True)


def copies_rows(p: Problem, keys: int) -> bool:
    """Whether keys come row by row, as they do from pages too small for boxes."""
    return p.kv_layout == "paged" and fetched_rows(p, keys) == 1


def tile_rows(p: Problem, device: Device) -> int:
    """Rows of a tile: those of two consumers, or of three where that is faster."""
    short, tall = 2 * GROUP_ROWS, 3 * GROUP_ROWS
    if max(p.head_dim, p.head_dim_v) > TALL_DIM or p.tensor_mask or left_edge(p):
        return short
    if copies_rows(p, block_keys(p)):  # by four warps, for which no registers are left
        return short
    # Of a ragged batch the average: sequences may be short.
    queries = p.total_q // p.batch if p.q_layout == "ragged" else p.max_seqlen_q
    keys = p.total_k // p.batch if p.kv_layout == "ragged" else p.max_seqlen_k
    if min(queries, keys) < (TALL_KEYS if p.window_right is None else TALL_KEYS_CAUSAL):
        return short

    def rounds(rows: int) -> float:
        """Rows that the busiest multiprocessor works off."""
        tiles = -(-queries // rows) * p.num_heads * p.batch
        return rows * -(-tiles // device.sms)

    return tall if rounds(tall) < TALL_SPEED * rounds(short) else short


def left_edge(p: Problem) -> bool:
    """Whether the prefill's program is the one whose rows need not see a sequence's first keys.

    Programs are a budget: softcap has none without it.
    """
    return p.window_left is not None or p.attention_chunk > 0 or p.softcap


def refusal(p: Problem, dims: tuple[int, int], extras: tuple[str, ...]) -> str:
    """Why a kernel of tiles with `dims` columns cannot run `p`, as the end of a sentence.

    Empty when it can. `extras` are those of the call that the kernel has not.
    """
    if p.dtype.itemsize != 2:
        return "which is for float16 and bfloat16"
    if not all(dims):
        return f"of whose columns more than a quarter would be padding for {p.head_dim}/{p.head_dim_v}"
    if p.kv_layout == "paged" and p.tensor_mask:
        return "which has no masks over pages"
    if not p.aligned or not p.tma_strides:
        return "which needs rows of 16-byte multiples"
    if extras:
        beside = " beside a mask" if p.tensor_mask and set(extras) & set(TAKEN_UNMASKED) else ""
        return f"which has no {' and no '.join(extras)}{beside}"
    return ""


def pages_reason(p: Problem, box: int) -> list[str]:
    """How keys of pages come, in boxes of so many or copied row by row (1); nothing without pages."""
    if not box:
        return []
    if box == 1:
        return [f"keys are copied row by row from pages of {p.page_size}, too small for boxes"]
    return [f"keys come in boxes of {box}, each from one page of {p.page_size}"]


def no_boxes(p: Problem) -> str:
    """The reason where pages are too small for boxes."""
    return f"whose boxes of {FEWEST_PAGE_ROWS} keys or more would not lie in pages of {p.page_size}"


def block_keys(p: Problem) -> int:
    """Keys of a block of the prefill kernel."""
    d, dv = columns(p, 2 * GROUP_ROWS)
    if max(d, dv) <= 128:
        return 128
    # Of 192/128 shared memory holds blocks of 128 keys too, but with a left edge their loops over pages spill.
    return 128 if d <= 192 and dv <= 128 and not p.tensor_mask and not left_edge(p) else 64


def value_stages(p: Problem, tile: Tile) -> int:
    """Buffers of V of the prefill."""
    copied = copies_rows(p, tile.keys)
    return COPY_STAGES if copied and max(columns(p, tile.rows)) <= 128 else tile.stages


def page_rows(p: Problem, keys: int) -> int:
    """Keys of a box of a paged cache: the largest power of two that divides the page size and fits where blocks of
    `keys` begin."""
    most = min(keys, EDGE) if left_edge(p) else keys
    return min(p.page_size & -p.page_size, most)


def columns(p: Problem, rows: int) -> tuple[int, int]:
    """Columns of the prefill kernel's products in tiles of `rows`, over queries and keys and over values.

    0 where it has none for them. With a mask in memory they are padded.
    """
    if p.tensor_mask:
        return padded_dim(p.head_dim), padded_dim(p.head_dim_v)
    d, dv = product_dim(p.head_dim), product_dim(p.head_dim_v)
    # With weights in registers products of 64 and of 32 columns take two consumers longer than one of 128 (d96, 16384: 440
    # TFLOP/s against 524). Three have no registers for the padding.
    if rows <= 2 * GROUP_ROWS and 64 < dv < 128:
        dv = 128
    return d, dv


def product_dim(d: int) -> int:
    """Columns of products for head dimension d: a power of two, or one and a smaller one (`kernels/hopper/products.py`).

    0 where more than a quarter of them would be padding.
    """
    return next((n for n in PRODUCT_DIMS if 3 * n // 4 <= d <= n), 0)


def fetched_rows(p: Problem, keys: int) -> int:
    """Keys of a paged cache that the prefill fetches at a time: those of a box, 1 where rows are copied; 0 where neither
    can be: rows are copied of head dimensions in one part alone."""
    rows = page_rows(p, keys)
    whole = all(not parts(n)[1] for n in columns(p, 2 * GROUP_ROWS))
    if rows < (COPIED_BELOW_WITH_EDGE if left_edge(p) else COPIED_BELOW) and whole:
        return 1
    return next((n for n in BOX_KEYS if n <= rows), 0)


def padded_dim(d: int) -> int:
    """Columns of a tile that is not cut into parts, for head dimension d; 0 where more than a quarter would be padding.

    The copy engine pads for nothing (it fills in zeros), the products are paid for.
    """
    return next((n for n in (64, 128, 256) if 3 * n // 4 <= d <= n), 0)


def query_stages(p: Problem, tile: Tile) -> int:
    """Buffers for the queries of a tile: two where shared memory has room, so that they come a tile ahead."""
    d, _ = columns(p, tile.rows)
    if p.tensor_mask or copies_rows(p, tile.keys) or tile.resident > 3:
        return 1
    return 2 if d <= 64 or (d <= 128 and tile.rows <= 2 * GROUP_ROWS) else 1


def parts(d: int) -> tuple[int, int]:
    """The power of two that columns of products begin with, and the rest."""
    first = 1 << d.bit_length() >> 1
    return first, d - first


def columns_in_memory(d: int, size: int) -> int:
    """Columns of both parts in shared memory: rows of the second have the width of its swizzling."""
    first, rest = parts(d)
    return first + (SWIZZLED // size if rest else 0)


def shared_memory(p: Problem, tile: Tile) -> int:
    """Bytes of shared memory the kernel needs, an upper bound; tests compare it with what the compiler reports."""
    size, rows, keys = p.dtype.itemsize, tile.rows, tile.keys
    d, dv = columns(p, rows)
    wide, wide_v = columns_in_memory(d, size), columns_in_memory(dv, size)
    total = (
        keys * (tile.stages * wide + value_stages(p, tile) * wide_v) + query_stages(p, tile) * rows * wide
    ) * size
    if copies_rows(p, keys):
        total += 2 * keys * 8  # where rows of K and of V begin
    if p.tensor_mask:
        total += tile.stages * rows * keys * 2
    first, rest = parts(d)
    first_v, rest_v = parts(dv)
    # Where shared memory is short results leave through the queries' buffers, if those have room.
    short = p.tensor_mask or (d > 128 and keys > 64)
    if not short or first < first_v or (rest_v and not rest):
        total += rows * (128 if dv == 256 else wide_v) * size
    return total + 1024
