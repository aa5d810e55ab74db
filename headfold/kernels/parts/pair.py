"""Two attentions in one launch: how many ranges each list of sequences is cut into, from the lengths that lie on the device.

Programs of one list are bound by their products, those of the other by memory: side by side they take what the longer
one takes, one after the other the sum.
"""

import triton
import triton.language as tl


@triton.jit
def cut_pair(programs, own, prefix):
    """(ranges of the prefixes' list, ranges of the list of what follows them).

    own and prefix are (length of the list, programs of a range, what a block costs): the two kinds of programs shall end
    together. Each list has at least one range; `programs` must be enough for that.
    """
    own_work = own[0].to(tl.int64) * (own[1] * own[2])
    prefix_work = prefix[0].to(tl.int64) * (prefix[1] * prefix[2])
    both = tl.maximum(own_work + prefix_work, 1) * prefix[1]
    nearest = (2 * programs * prefix_work + both) // (2 * both)
    most = (programs - own[1]) // prefix[1]
    ranges = tl.minimum(tl.maximum(nearest.to(tl.int32), 1), most)
    return ranges, (programs - ranges * prefix[1]) // own[1]
