"""The emulator itself: what it computes, and that it notices what a GPU would get wrong silently."""

# No `from __future__ import annotations`: gluon.jit tells constants by what an annotation is.

import pytest
import torch

pytest.importorskip("triton")

from headfold.kernels.hopper.compat import (
    TensorDescriptor,
    async_copy,
    barrier,
    copy_to_shared,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_load,
    view_as,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from headfold.kernels.hopper.layouts import accumulator, shared_layout, store_layout
from tests.gluon_emulator import DeadlockError, RaceError, language, launch
from tests.gluon_emulator.values import Tensor

SEEDS = range(10)


def boxes(t: torch.Tensor, rows: int = 64) -> TensorDescriptor:
    layout = shared_layout(rows, t.shape[1], 16, 2)
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, t.shape[1]], layout)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float16)


@gluon.jit
def bars(SLOTS: gl.constexpr):
    found = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(found.index(i), count=1)
    return found


@gluon.jit
def write(Out, first, block):
    rows = first + gl.arange(0, 64, gl.SliceLayout(1, block.type.layout))
    columns = gl.arange(0, 64, gl.SliceLayout(0, block.type.layout))
    gl.store(Out + rows[:, None] * 64 + columns[None, :], block)


@gluon.jit
def fetch(source, blocks, buffers, full, free, FAULT: gl.constexpr):
    for i in range(blocks):
        if FAULT != "no wait for the buffer":
            mbarrier.wait(free.index(i % 2), ((i // 2) & 1) ^ 1)
        if FAULT != "no bytes expected":
            mbarrier.expect(full.index(i % 2), source.block_type.nbytes)
        tma_load(source, [i * 64, 0], full.index(i % 2), buffers.index(i % 2))


@gluon.jit
def copy_blocks(blocks, buffers, full, free, Out, FAULT: gl.constexpr):
    for i in range(blocks):
        if FAULT != "no wait for the bytes":
            mbarrier.wait(full.index(i % 2), (i // 2) & 1)
        if FAULT == "handed back first":
            mbarrier.arrive(free.index(i % 2))
        block = buffers.index(i % 2).load(store_layout(64))
        if FAULT != "no fence":
            fence_async_shared()
        if FAULT != "no barrier":
            barrier()
        if FAULT != "handed back first":
            mbarrier.arrive(free.index(i % 2))
        write(Out, i * 64, block)


@gluon.jit
def square_blocks(blocks, buffers, full, free, Out, FAULT: gl.constexpr):
    """block @ block.T of every block."""
    for i in range(blocks):
        buffer = buffers.index(i % 2)
        if FAULT != "no wait for the bytes":
            mbarrier.wait(full.index(i % 2), (i // 2) & 1)
        if FAULT == "stored without a fence":
            buffer.store(buffer.load(store_layout(64)) + 1.0)
        zeros = gl.zeros([64, 64], gl.float32, accumulator(64))
        product = warpgroup_mma(buffer, buffer.permute([1, 0]), zeros, use_acc=False, is_async=True)
        if FAULT == "handed back in flight":
            mbarrier.arrive(free.index(i % 2))
        if FAULT == "used in flight":
            product = warpgroup_mma_wait(1, deps=[product])
        else:
            product = warpgroup_mma_wait(0, deps=[product])
        if FAULT != "handed back in flight":
            mbarrier.arrive(free.index(i % 2))
        write(Out, i * 64, product.to(gl.float16))


@gluon.jit
def pipeline(source, Out, blocks, PRODUCT: gl.constexpr, FAULT: gl.constexpr):
    buffers = gl.allocate_shared_memory(source.dtype, [2, 64, 64], source.layout)
    full = bars(2)
    free = bars(2)
    work = square_blocks if PRODUCT else copy_blocks
    gl.warp_specialize(
        [
            (work, (blocks, buffers, full, free, Out, FAULT)),
            (fetch, (source, blocks, buffers, full, free, FAULT)),
        ],
        [1],
        [24],
    )


def run(product: bool, fault: str = "", blocks: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(what came out, what should)."""
    torch.manual_seed(seed)
    source, out = rand(blocks * 64 - 5, 64), torch.full((blocks * 64, 64), torch.nan, dtype=torch.float16)
    launch(pipeline, 1, boxes(source), out, blocks, seed=seed, PRODUCT=product, FAULT=fault)
    padded = torch.cat([source, torch.zeros(5, 64, dtype=torch.float16)])  # out of bounds: zeros
    each = padded.view(blocks, 64, 64).float()
    return out, (each @ each.mT if product else each).view(-1, 64).half()


@pytest.mark.parametrize("product", [False, True])
def test_a_right_pipeline_gives_the_same_in_every_schedule(product: bool) -> None:
    for seed in SEEDS:
        got, want = run(product, seed=seed)
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("product", "fault", "words"),
    [
        (False, "handed back first", "is not ordered after the (load by pipeline|copy by the engine)"),
        (False, "no fence", "without a fence_async_shared"),
        (False, "no barrier", "without a barrier after the fence"),
        (True, "stored without a fence", "without a fence_async_shared"),
        (True, "handed back in flight", "copy by fetch .* is not ordered after the product by pipeline"),
    ],
)
def test_races_are_found_in_every_schedule(product: bool, fault: str, words: str) -> None:
    for seed in SEEDS:
        with pytest.raises(RaceError, match=words):
            run(product, fault, seed=seed)


@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("fault", ["no wait for the buffer", "no wait for the bytes"])
def test_a_missing_wait_is_found_in_every_schedule(product: bool, fault: str) -> None:
    """It is a race, unless the schedule makes it too many arrivals or leaves the other side waiting."""
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=r"is not ordered after|arrivals where 0|nobody can go on"):
            run(product, fault, seed=seed)


def test_a_deadlock_says_who_waits_for_what() -> None:
    with pytest.raises(
        DeadlockError, match=r"partition 0\) waits for mbarrier 0 .* 1 of 1 arrivals and -8192"
    ):
        run(False, "no bytes expected", blocks=1)


def test_the_result_of_a_product_in_flight_cannot_be_used() -> None:
    with pytest.raises(RuntimeError, match="may be in flight"):
        run(True, "used in flight")


@gluon.jit
def fetch_pieces(Source, rows, blocks, buffers, full, free, FAULT: gl.constexpr, ARRIVING: gl.constexpr):
    """Blocks of 64 rows by `cp.async`; rows from `rows` on as zeros."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    column = gl.arange(0, 64, gl.SliceLayout(0, layout))
    for i in range(blocks):
        row = i * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
        if FAULT != "no wait for the buffer":
            mbarrier.wait(free.index(i % 2), ((i // 2) & 1) ^ 1)
        pointers = Source + row[:, None] * 64 + column[None, :]
        copy_to_shared(buffers.index(i % 2), pointers, mask=(row < rows)[:, None])
        if ARRIVING:
            async_copy.mbarrier_arrive(full.index(i % 2), increment_count=False)
        else:
            async_copy.commit_group()
            if FAULT != "no wait for the pieces":
                async_copy.wait_group(0)
            if FAULT != "no fence":
                fence_async_shared()
            if FAULT != "no barrier":
                barrier()
            mbarrier.arrive(full.index(i % 2))


@gluon.jit
def square_pieces(blocks, buffers, full, free, Out, FAULT: gl.constexpr, ARRIVING: gl.constexpr):
    for i in range(blocks):
        buffer = buffers.index(i % 2)
        if FAULT == "a fence too early":
            fence_async_shared()
        if FAULT != "no wait for the arrivals":
            mbarrier.wait(full.index(i % 2), (i // 2) & 1)
        if ARRIVING:
            if FAULT != "no fence" and FAULT != "a fence too early":
                fence_async_shared()
        zeros = gl.zeros([64, 64], gl.float32, accumulator(64))
        product = warpgroup_mma(buffer, buffer.permute([1, 0]), zeros, use_acc=False)
        mbarrier.arrive(free.index(i % 2))
        write(Out, i * 64, product.to(gl.float16))


@gluon.jit
def pieces(Source, Out, rows, blocks, FAULT: gl.constexpr, ARRIVING: gl.constexpr):
    buffers = gl.allocate_shared_memory(gl.float16, [2, 64, 64], shared_layout(64, 64, 16, 2))
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=32 if ARRIVING else 1)
    free = bars(2)
    gl.warp_specialize(
        [
            (square_pieces, (blocks, buffers, full, free, Out, FAULT, ARRIVING)),
            (fetch_pieces, (Source, rows, blocks, buffers, full, free, FAULT, ARRIVING)),
        ],
        [1],
        [24],
    )


def run_pieces(fault: str, seed: int, arriving: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    source, out = rand(6 * 64 - 5, 64), torch.empty(6 * 64, 64, dtype=torch.float16)
    launch(pieces, 1, source, out, len(source), 6, seed=seed, FAULT=fault, ARRIVING=arriving)
    each = torch.cat([source, torch.zeros(5, 64, dtype=torch.float16)]).view(6, 64, 64).float()
    return out, (each @ each.mT).view(-1, 64).half()


@pytest.mark.parametrize("arriving", [False, True])
def test_copies_in_pieces_are_there_after_the_wait_for_them(arriving: bool) -> None:
    for seed in SEEDS:
        got, want = run_pieces("", seed, arriving)
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no fence", "product by .* follows the piece .* without a fence_async_shared"),
        ("no barrier", "product by .* follows the piece .* without a barrier after the fence"),
        ("no wait for the pieces", "is not ordered after the piece"),
        ("no wait for the buffer", "is not ordered after|arrivals where 0|nobody can go on"),
    ],
)
def test_races_of_pieces_are_found_in_every_schedule(fault: str, words: str) -> None:
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=words):
            run_pieces(fault, seed)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no fence", "product by .* follows the piece .* without a fence_async_shared"),
        ("a fence too early", "product by .* follows the piece .* without a fence_async_shared"),
        ("no wait for the arrivals", "is not ordered after|nobody can go on"),
        ("no wait for the buffer", "is not ordered after|arrivals where|nobody can go on"),
    ],
)
def test_races_of_pieces_that_arrive_are_found_in_every_schedule(fault: str, words: str) -> None:
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=words):
            run_pieces(fault, seed, arriving=True)


@gluon.jit
def send(letter, posted, taken, POLITE: gl.constexpr):
    for i in range(8):
        if POLITE:
            mbarrier.wait(taken, (i & 1) ^ 1)
        letter.store(gl.full([1], i, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
        barrier()
        if not POLITE and i > 0:
            mbarrier.wait(posted, (i & 1) ^ 1)
        mbarrier.arrive(posted)


@gluon.jit
def read(letter, posted, taken, Out):
    for i in range(8):
        mbarrier.wait(posted, i & 1)
        value = gl.max(letter.load(gl.BlockedLayout([1], [32], [4], [0])), 0)
        barrier()
        mbarrier.arrive(taken)
        gl.store(Out + i, value)


@gluon.jit
def letters(Out, POLITE: gl.constexpr):
    letter = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    both = bars(2)
    gl.warp_specialize(
        [
            (read, (letter, both.index(0), both.index(1), Out)),
            (send, (letter, both.index(0), both.index(1), POLITE)),
        ],
        [1],
        [24],
    )


def test_ordinary_stores_that_come_too_early_show_in_the_results() -> None:
    """Nothing checks the order of ordinary accesses: that is what many schedules are for."""
    wrong = {True: 0, False: 0}
    for polite in wrong:
        for seed in range(20):
            out = torch.full((8,), -1, dtype=torch.int32)
            try:
                launch(letters, 1, out, seed=seed, POLITE=polite)
            except DeadlockError:
                wrong[polite] += 1
                continue
            wrong[polite] += out.tolist() != list(range(8))
    assert wrong[True] == 0
    assert wrong[False] > 10


@gluon.jit
def arithmetic(Out, a: gl.int32, b: gl.int32):
    gl.store(Out, a // b)
    gl.store(Out + 1, a % b)
    one = 1
    gl.store(Out + 2, (one - 3) // 2)  # -1 in C and here, -2 in Python
    column = gl.arange(0, 4, gl.BlockedLayout([1], [32], [4], [0])) - 3
    gl.store(Out + 3 + gl.arange(0, 4, column.type.layout), column // 2)


def test_integers_divide_as_in_c() -> None:
    out = torch.empty(7, dtype=torch.int32)
    launch(arithmetic, 1, out, -7, 2)
    assert out.tolist() == [-3, -1, -1, -1, -1, 0, 0]


@gluon.jit
def product_of(Out, a: gl.int32, b: gl.int32):
    gl.store(Out, a * b)


@gluon.jit
def wide_product_of(Out, a: gl.int64, b: gl.int32):
    gl.store(Out, a * b)


def test_integers_that_leave_32_bits_raise() -> None:
    out = torch.empty(1, dtype=torch.int64)
    with pytest.raises(OverflowError, match="leaves the range of int32"):
        launch(product_of, 1, out, 1 << 20, 1 << 20)
    launch(wide_product_of, 1, out, 1 << 20, 1 << 20)
    assert out.item() == 1 << 40


@gluon.jit
def misuse(source, Out, FAULT: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, 64, gl.SliceLayout(1, layout))
    columns = gl.arange(0, 64, gl.SliceLayout(0, layout))
    full = bars(1)
    buffers = gl.allocate_shared_memory(source.dtype, [1, 64, 64], source.layout)
    if FAULT == "layouts":
        rows = rows + columns
    if FAULT == "dimension":
        rows = rows[None, :]
    if FAULT == "address":
        gl.store(Out + rows, rows)
    if FAULT == "alignment":
        tma_load(source, [0, 4], full.index(0), buffers.index(0))
    if FAULT == "arrivals":
        mbarrier.expect(full.index(0), 64)
        mbarrier.arrive(full.index(0))
    if FAULT == "end":
        tma_load(source, [0, 0], full.index(0), buffers.index(0))
    if FAULT == "constant":
        number = 1
        bars(number)
    if FAULT == "unknown":
        gl.histogram(rows, 4)
    if FAULT == "swizzle":
        buffers.index(0).store(gl.zeros([32, 64], source.dtype, layout))


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("layouts", ValueError, "layouts differ"),
        ("dimension", ValueError, "dimension 0 is inserted"),
        ("address", IndexError, "element 4 of memory of 4"),
        ("alignment", ValueError, "a multiple of 16 bytes"),
        ("arrivals", RuntimeError, "1 arrivals where 0 of 1 are left"),
        ("end", RuntimeError, "1 copies were under way"),
        ("constant", TypeError, "SLOTS is a constexpr"),
        ("unknown", NotImplementedError, "gl.histogram is not emulated"),
        ("swizzle", ValueError, "stored into"),
    ],
)
def test_misuse_raises(fault: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        launch(misuse, 1, boxes(rand(64, 64)), torch.empty(4, dtype=torch.int32), FAULT=fault)


@gluon.jit
def untouched(Out):
    memory = gl.allocate_shared_memory(gl.float16, [4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    gl.store(Out + gl.program_id(0) * 4 + gl.arange(0, 4, layout), memory.load(layout))


def test_shared_memory_begins_as_nan_and_programs_have_their_own() -> None:
    out = torch.zeros(3, 4, dtype=torch.float16)
    launch(untouched, 3, out)
    assert out.isnan().all()


@gluon.jit
def twice(Out):
    gl.store(Out + gl.program_id(0) // 2, 1)


def test_work_done_twice_is_found_where_asked() -> None:
    out = torch.zeros(4, dtype=torch.int32)
    launch(twice, 2, out)
    with pytest.raises(RuntimeError, match="stored twice"):
        launch(twice, 2, out, once=(out,))


@gluon.jit
def long_rows(source, Out):
    """Boxes of the columns of one swizzled row, each put where a longer row's part lies."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    matrix = gl.allocate_shared_memory(source.dtype, [64, 128], source.layout)
    pieces = view_as(matrix, source.dtype, [4, 32, 64], source.layout)
    full = bars(1)
    mbarrier.expect(full.index(0), 4 * source.block_type.nbytes)
    for i in range(4):
        tma_load(source, [i % 2 * 32, i // 2 * 64], full.index(0), pieces.index(i))
    mbarrier.wait(full.index(0), 0)
    rows = gl.arange(0, 64, gl.SliceLayout(1, layout))
    columns = gl.arange(0, 128, gl.SliceLayout(0, layout))
    gl.store(Out + rows[:, None] * 128 + columns[None, :], matrix.load(layout))


def test_rows_longer_than_a_swizzled_one_lie_in_pieces() -> None:
    source, out = rand(64, 128), torch.zeros(64, 128, dtype=torch.float16)
    box = TensorDescriptor(source, [64, 128], [128, 1], [32, 64], shared_layout(32, 64, 16, 2))
    launch(long_rows, 1, box, out)
    assert torch.equal(out, source)


@gluon.jit
def turned_round(Source, Out):
    """Rows that are stored as the columns of shared memory, whose rows lie in two pieces."""
    layout: gl.constexpr = store_layout(32)
    buffers = gl.allocate_shared_memory(gl.float16, [2, 32, 128], shared_layout(32, 128, 16, 2))
    rows = gl.arange(0, 128, gl.SliceLayout(1, layout))
    columns = gl.arange(0, 32, gl.SliceLayout(0, layout))
    at = rows[:, None] * 32 + columns[None, :]
    buffers.index(1).permute([1, 0]).store(gl.load(Source + at))
    barrier()
    out_rows = gl.arange(0, 32, gl.SliceLayout(1, layout))
    out_columns = gl.arange(0, 128, gl.SliceLayout(0, layout))
    gl.store(Out + out_rows[:, None] * 128 + out_columns[None, :], buffers.index(1).load(layout))


def test_stores_into_permuted_memory() -> None:
    source, out = rand(128, 32), torch.zeros(32, 128, dtype=torch.float16)
    launch(turned_round, 1, source, out)
    assert torch.equal(out, source.T)


def test_tensors_are_seen_with_other_shapes() -> None:
    """Every way has a layout of its own: what came different ways does not mix until it is converted."""
    x = Tensor(torch.arange(8.0), gl.BlockedLayout([1], [32], [4], [0]))
    low, high = x.reshape([2, 2, 2]).permute([0, 2, 1]).split()
    assert low.data.tolist() == [[0, 1], [4, 5]]
    assert high.data.tolist() == [[2, 3], [6, 7]]
    assert language.join(low, high).data.flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert (low + high).data.tolist() == [[2, 4], [10, 12]]
    with pytest.raises(ValueError, match="layouts differ"):
        _ = low + x.reshape([2, 4]).reshape([2, 2, 2]).split()[0]


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_assembly_rounds_pairs_and_takes_them_apart(name: str) -> None:
    layout = gl.BlockedLayout([1], [32], [4], [0])
    low, high = (Tensor(t, layout) for t in torch.randn(2, 64))
    kind = {"bf16": gl.bfloat16, "f16": gl.float16}[name]
    words = language.inline_asm_elementwise(
        f"cvt.rn.{name}x2.f32 $0, $2, $1;", "=r,f,f", [low, high], gl.int32, is_pure=True, pack=1
    )
    halves = language.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], (kind, kind), is_pure=True, pack=1
    )
    for half, one in zip(halves, (low, high), strict=True):
        assert torch.equal(half.data, one.data.to(half.data.dtype))
    assert words.dtype == gl.int32
    assert halves[0].dtype == kind
