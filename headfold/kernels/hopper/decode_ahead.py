"""What a decode of equal lengths asks for before the kernel in front of it has ended."""

from headfold.kernels.hopper.compat import gl, gluon
from headfold.kernels.parts.address import times
from headfold.kernels.parts.prefetch import LINE, PREFETCH


@gluon.jit
def ask_for_rows(
    source, seq, head, first, end, BLOCK_N: gl.constexpr, COLUMNS: gl.constexpr, ALIGN: gl.constexpr
):
    """Have the L2 cache fetch the block of BLOCK_N rows from `first` on, none from row `end` on; one warp asks.

    `source` is (tensor, strides of a batch entry, of a row, of a head). Nothing is read: as `prefetch_rows`.
    """
    X, stride_b, stride_s, stride_h = source
    WIDTH: gl.constexpr = LINE * 8 // X.dtype.element_ty.primitive_bitwidth  # elements of a line
    ACROSS: gl.constexpr = 1 << ((COLUMNS + WIDTH - 1) // WIDTH - 1).bit_length()
    ROWS: gl.constexpr = 32 // ACROSS
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [ROWS, ACROSS], [1, 1], [1, 0])
    column = gl.minimum(gl.arange(0, ACROSS, gl.SliceLayout(0, layout)) * WIDTH, COLUMNS - 1)
    base = X + (times(seq, stride_b, ALIGN) + times(head, stride_h, ALIGN))
    last = gl.maximum(end - 1, 0)  # a tile may see no key
    for i in range(0, BLOCK_N, ROWS):
        row = gl.minimum(first + i + gl.arange(0, ROWS, gl.SliceLayout(1, layout)), last)
        at = times(row, stride_s, ALIGN)
        gl.inline_asm_elementwise(
            PREFETCH, "=r,l", [base + (at[:, None] + column[None, :])],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
