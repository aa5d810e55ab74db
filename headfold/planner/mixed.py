"""Mixed batches: decodes and prefills in one ragged call, each sequence through the kernel that suits it."""

from __future__ import annotations

from headfold.planner.device import Device
from headfold.problem import Problem

# Folded rows up to which a sequence of a mixed batch counts as a decode: what the decode kernel's lowest tile holds.
SHORT_ROWS = 16
# How many times as many rows a batch would have, were all its sequences as long as the longest, from which on it is taken to
# be mixed. A wrong guess costs a launch that finds nothing to do.
SKEW = 4
# Bytes of K and V from which on the two launches more, about 8 us, are small beside what they save.
WORTH_BYTES = 64 << 20
# The share of the multiprocessors that decodes have beside a prefill: as many as saturate memory. On an H200 8 chunks of 512
# and 120 decodes, all on 8192 keys of 32:8 d128, with 0.36, 0.42, 0.48, 0.55, 0.62 of them: in rows 1384, 1411, 1321, 1460,
# 1508 us, in pages of 16 1663, 1660, 1485, 1506, 1550. Alone the parts take 772 and 885; a kernel that only reads in place of
# the decode, on 48 multiprocessors, 1285.
BESIDE = 0.48


def beside_sms(device: Device) -> int:
    """Multiprocessors that the decodes of a mixed batch have while its prefill runs on the others."""
    return max(1, round(BESIDE * device.sms))


def short_queries(p: Problem, fold: int) -> int:
    """Queries up to which a sequence of `p` goes to the decode kernel, beside a prefill of the longer ones; 0 for none.

    The lengths lie on the device: all that is known is that the average is far below the bound.
    """
    queries = max(1, SHORT_ROWS // fold)
    kv_bytes = p.batch * p.max_seqlen_k * p.num_kv_heads * (p.head_dim + p.head_dim_v) * p.dtype.itemsize
    mixed = p.q_layout == "ragged" and SKEW * p.total_q <= p.batch * p.max_seqlen_q
    return queries if mixed and kv_bytes >= WORTH_BYTES and queries < p.max_seqlen_q else 0
