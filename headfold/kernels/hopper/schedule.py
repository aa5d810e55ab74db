"""Who works on which tile: one counter in global memory, taken from by the producers, longest tiles first."""

from headfold.kernels.hopper.compat import barrier, gl, gluon, mbarrier


@gluon.constexpr_function
def one_each(warps):
    """A layout of one element a lane."""
    return gl.BlockedLayout([1], [32], [warps], [0])


LETTER = gl.constexpr(8)  # numbers that a letter has room for
LONG = gl.constexpr(24)  # blocks of a tile behind which the next one is taken late


@gluon.jit
def publish(number, found, lengths, turn, mail, posted, taken, VARLEN: gl.constexpr, WARPS: gl.constexpr = 1):
    """Give the consumers the tile of their turn `turn`, -1 at the end. By the producer; two letters may be under way.

    The letter says too what the consumers would have nothing to hide behind, three divisions and with VARLEN loads:
    what was `found` out about the tile (its sequence, head and number in both, and with VARLEN the sequence's place in
    the list, which the producer itself comes back to), and the sequence's first row, rows and keys.
    """
    slot = turn & 1
    mbarrier.wait(taken.index(slot), ((turn >> 1) & 1) ^ 1)
    mail.index(slot * LETTER).store(gl.full([1], number, gl.int32, one_each(WARPS)))
    for i in gl.static_range(4 if VARLEN else 3):
        mail.index(slot * LETTER + 1 + i).store(gl.full([1], found[i], gl.int32, one_each(WARPS)))
    if VARLEN:
        for i in gl.static_range(3):
            mail.index(slot * LETTER + 5 + i).store(gl.full([1], lengths[i], gl.int32, one_each(WARPS)))
    barrier()
    mbarrier.arrive(posted.index(slot), count=1)


@gluon.jit
def last_place(turn, mail, WARPS: gl.constexpr = 1):
    """Where the tile before turn `turn` is in the list. In a register from tile to tile it would spill (d256, pages)."""
    place = 0
    if turn > 0:
        place = gl.max(mail.index(((turn - 1) & 1) * LETTER + 4).load(one_each(WARPS)), 0)
    return place


@gluon.jit
def receive(turn, lengths, mail, posted, taken, VARLEN: gl.constexpr, WARPS: gl.constexpr = 4):
    """The tile of turn `turn`, for a consumer or a producer that assists.

    (number, head, tile of the sequence, the sequence's batch index in q, its first row, its rows, its keys, its number);
    `lengths` as for `spans.sequence`.
    """
    slot = turn & 1
    mbarrier.wait(posted.index(slot), (turn >> 1) & 1)
    number = gl.max(mail.index(slot * LETTER).load(one_each(WARPS)), 0)
    entry = gl.max(mail.index(slot * LETTER + 1).load(one_each(WARPS)), 0)
    head = gl.max(mail.index(slot * LETTER + 2).load(one_each(WARPS)), 0)
    tile = gl.max(mail.index(slot * LETTER + 3).load(one_each(WARPS)), 0)
    sq, sk, _, given = lengths
    q_batch = entry
    q_first = 0
    if VARLEN:
        if given[0] != 0:
            q_batch = 0
        q_first = gl.max(mail.index(slot * LETTER + 5).load(one_each(WARPS)), 0)
        sq = gl.max(mail.index(slot * LETTER + 6).load(one_each(WARPS)), 0)
        sk = gl.max(mail.index(slot * LETTER + 7).load(one_each(WARPS)), 0)
    barrier()
    mbarrier.arrive(taken.index(slot), count=1)
    return number, head, tile, q_batch, q_first, sq, sk, entry


@gluon.jit
def take(counter, programs):
    """The next tile that no program has begun: the first `programs` go to the programs by their number."""
    return gl.atomic_add(counter, 1, sem="relaxed", scope="gpu") + programs


@gluon.jit
def asking_block(blocks, STAGES: gl.constexpr, VARLEN: gl.constexpr):
    """The block of a tile at which its producer takes the next tile: the answer takes a microsecond, and the buffers are full.

    A tile that is taken waits for the one before it, whatever other programs have left: behind a long one it is taken late.
    Of ragged batches, whose tiles are many, it has to be found in a list as well.
    """
    early = gl.minimum(blocks - 1, STAGES)
    return early if VARLEN else gl.where(blocks < LONG, early, blocks - 2)


@gluon.jit
def sign_off(counter, programs):
    """Leave both counters at zero for the next launch: the last program that ends does it."""
    if gl.atomic_add(counter + 1, 1, sem="relaxed", scope="gpu") == programs - 1:
        gl.atomic_xchg(counter, 0, sem="relaxed", scope="gpu")
        gl.atomic_xchg(counter + 1, 0, sem="relaxed", scope="gpu")


@gluon.jit
def wait_turn(turns, count, GROUP: gl.constexpr):
    """Wait until it is this consumer's turn to issue the products of block `count`; consumer 0 begins."""
    mbarrier.wait(turns.index(GROUP), (count & 1) ^ (GROUP == 0))


@gluon.jit
def pass_turn(turns, GROUP: gl.constexpr, GROUPS: gl.constexpr):
    mbarrier.arrive(turns.index((GROUP + 1) % GROUPS), count=1)
