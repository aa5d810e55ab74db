"""Layouts: how tiles lie in shared memory and in the registers of a warpgroup."""

from headfold.kernels.hopper.compat import gl, gluon

GROUP_ROWS = gl.constexpr(64)  # rows of a consumer warpgroup: what one wgmma instruction takes
SWIZZLED = gl.constexpr(128)  # bytes of a row of shared memory as it is swizzled


@gluon.constexpr_function
def shared_layout(rows, columns, bits, rank):
    """The swizzled layout that TMA writes and wgmma reads, for boxes (1, 1, rows, columns) or (rows, columns)."""
    width = columns * bits // 8
    swizzle = next((n for n in (128, 64, 32) if width % n == 0), 0)
    return gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=rank)


@gluon.constexpr_function
def groups_layout(bits):
    """Whole rows as boxes (heads, groups of 8 rows, pieces, 8, columns of a swizzled row) bring them."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=5)


@gluon.constexpr_function
def is_grouped(shape):
    """Whether buffers of that shape, (buffers, groups, pieces, 8, 64), hold whole rows in groups of 8."""
    return shape[3] == 8


@gluon.constexpr_function
def rows_of(shape):
    """Rows of a buffer."""
    return 8 * shape[1] if is_grouped(shape) else shape[3]


@gluon.constexpr_function
def grouped_layout(rows, columns):
    """The same memory as a matrix of 16-bit elements: 8 rows of a swizzled row's 64 columns, the next 64 columns of those
    8 rows, and so on, then the next 8 rows."""
    bases = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [0, 32], [1, 8], [2, 16], [4, 32]]
    bases += [[0, 64 << i] for i in range((columns // 64).bit_length() - 1)]
    bases += [[8 << i, 0] for i in range((rows // 8).bit_length() - 1)]
    return gl.SharedLinearLayout(bases, [], 1024)


@gluon.constexpr_function
def first_part(columns):
    """Columns of a head dimension's first part, the largest power of two; the rest are the second."""
    return 1 << (columns.bit_length() - 1)


@gluon.constexpr_function
def columns_in_memory(columns, bits):
    """Columns of both parts as they lie in shared memory: the second has rows of the swizzling's width."""
    first = first_part(columns)
    return first + (SWIZZLED.value * 8 // bits if columns > first else 0)


@gluon.constexpr_function
def hold(columns, others):
    """Whether buffers of `columns` have room for `others`, part by part."""
    first, first_of_others = first_part(columns), first_part(others)
    return first >= first_of_others and (columns > first or others == first_of_others)


@gluon.constexpr_function
def staged_columns(width, columns):
    """Columns of results that leave at a time through buffers whose first part is `width` wide: all, or a half."""
    return columns if width >= first_part(columns) else width


@gluon.constexpr_function
def accumulator(columns):
    """A (64, columns) float32 accumulator over the four warps of a warpgroup."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def weights_layout(columns):
    """The weights as the left operand of a product, in registers: the accumulator's elements where they are."""
    return gl.DotOperandLayout(0, accumulator(columns), 2)


@gluon.constexpr_function
def store_layout(columns):
    """Rows of `columns` 16-bit elements over a warpgroup, 16 bytes a thread."""
    across = min(32, columns // 8)
    return gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])
