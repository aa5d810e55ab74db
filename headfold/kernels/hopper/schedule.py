"""Who works on which tile: one counter in global memory, taken from by the producers, longest tiles first."""

from headfold.kernels.hopper.compat import barrier, gl, gluon, mbarrier


@gluon.constexpr_function
def one_each(warps):
    """A layout of one element a lane."""
    return gl.BlockedLayout([1], [32], [warps], [0])


@gluon.jit
def publish(number, turn, mail, posted, taken):
    """Give the consumers the tile of their turn `turn`. Called by the producer; two letters may be under way."""
    slot = turn & 1
    mbarrier.wait(taken.index(slot), ((turn >> 1) & 1) ^ 1)
    mail.index(slot).store(gl.full([1], number, gl.int32, one_each(1)))
    barrier()
    mbarrier.arrive(posted.index(slot), count=1)


@gluon.jit
def receive(turn, mail, posted, taken):
    """The tile of turn `turn`, for a consumer."""
    slot = turn & 1
    mbarrier.wait(posted.index(slot), (turn >> 1) & 1)
    number = gl.max(mail.index(slot).load(one_each(4)), 0)
    barrier()
    mbarrier.arrive(taken.index(slot), count=1)
    return number


@gluon.jit
def take(counter, programs):
    """The next tile that no program has begun: the first `programs` go to the programs by their number."""
    return gl.atomic_add(counter, 1, sem="relaxed", scope="gpu") + programs


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
