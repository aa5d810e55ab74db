"""Two attentions in one launch: how many ranges each list of sequences is cut into, from the lengths that lie on the device.

Programs of one list are bound by their products, those of the other by memory: side by side they take what the longer
one takes, one after the other the sum.
"""

import triton
import triton.language as tl


@triton.jit
def cut_pair(programs, own, prefix):
    """(ranges of the prefixes' list, ranges of the list of what follows them).

    own and prefix are (length of the list, programs of a range, what a block costs). Of the numbers of ranges beside those at
    which both kinds of programs would end together it takes the ones whose last program ends first: a range more of a prefix
    of many programs may leave few for the other list. Each list has at least one range; `programs` must be enough for that.
    """
    own_work = own[0].to(tl.float32) * own[2]
    work = prefix[0].to(tl.float32) * prefix[2]
    both = tl.maximum(own_work * own[1] + work * prefix[1], 1.0)
    most, own_most = (programs - own[1]) // prefix[1], (programs - prefix[1]) // own[1]
    asked = (programs * work / both).to(tl.int32)
    ranges = tl.minimum(tl.maximum(asked, 1), most)
    own_ranges = tl.minimum(tl.maximum((programs * own_work / both).to(tl.int32), 1), own_most)
    ranges, end = sooner(ranges, ranges, float("inf"), programs, own_work, own[1], work, prefix[1])
    for more in tl.static_range(2):
        few = (programs - tl.minimum(own_ranges + more, own_most) * own[1]) // prefix[1]
        ranges, end = sooner(few, ranges, end, programs, own_work, own[1], work, prefix[1])
    more = tl.maximum(tl.minimum(asked + 1, most), 1)
    ranges, end = sooner(more, ranges, end, programs, own_work, own[1], work, prefix[1])
    return ranges, (programs - ranges * prefix[1]) // own[1]


@triton.jit
def sooner(n, ranges, end, programs, own_work, own_lanes, work, lanes):
    """(n, when the last program ends) where that is before `end`, else (ranges, end)."""
    ends = tl.maximum(work / n, own_work / ((programs - n * lanes) // own_lanes))
    return tl.where(ends < end, n, ranges), tl.minimum(ends, end)
