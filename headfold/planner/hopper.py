"""Plans for the Gluon kernel of Hopper GPUs: what it takes, its tile, its order of work."""

from __future__ import annotations

from headfold.planner.device import Device
from headfold.planner.plan import Plan
from headfold.problem import Problem

ROWS = 128  # two warpgroups of 64 query positions of one head
STAGES = 2
# On an H200 (32:8 d128) this kernel runs at 1.4 times the Triton kernel's TFLOP/s or more: it may waste rows for it.
WORTH_ROWS = 1.4
# Share of the L2 cache that K and V of the heads in flight may take: 8 to 32 MB of an H200's 50 are within 1 % at
# 4096 keys and more, 32 MB best at 1024 (16 heads, b16, causal: 417 TFLOP/s against 398).
SECTION_OF_L2 = 2 / 3


def plan_hopper(p: Problem, device: Device, triton_rows: int) -> Plan | str:
    """The plan of `p` on the Hopper kernel, or the reason why it goes to the Triton kernel.

    Args:
        p: the Problem.
        device: the Device.
        triton_rows: rows that the Triton kernel's tiles would hold.
    """
    if device.arch != (9, 0) or p.device_type != "cuda":
        return "the Triton kernel: the Gluon one is for Hopper GPUs"
    reason = refusal(p)
    tiles = p.batch * -(-p.max_seqlen_q // ROWS)
    rows = tiles * p.num_heads * ROWS
    if not reason and not p.tensor_mask and rows > WORTH_ROWS * triton_rows:
        reason = f"whose tiles of one head would hold {rows} rows instead of {triton_rows}"
    if reason:
        return f"the Triton kernel, not the Gluon one, {reason}"
    keys = 128
    head_bytes = p.max_seqlen_k * (p.head_dim + p.head_dim_v) * p.dtype.itemsize
    section = max(1, int(device.l2 * SECTION_OF_L2) // head_bytes) * p.group
    workers = min(max(1, device.sms - p.sm_margin), tiles * p.num_heads)
    return Plan(
        backend="hopper",
        kernel="prefill",
        fold=1,
        block_m=ROWS,
        block_n=keys,
        head_units=p.num_heads,
        tiles=tiles,
        tiles_per_sequence=-(-p.max_seqlen_q // ROWS),
        num_warps=12,
        num_stages=STAGES,
        d_parts=(p.head_dim, 0),
        dv_parts=(p.head_dim_v, 0),
        use_tma=True,
        workers=workers,
        section=min(section, p.batch * p.num_heads),
        mask_align=p.mask_align,
        shared_memory=shared_memory(p, keys),
        reasons=(
            "two warpgroups compute while a third fetches through the copy engine (Gluon, docs/hopper.md)",
            "a tile holds rows of one head: the heads of a group find K and V in the L2 cache",
        ),
    )


def refusal(p: Problem) -> str:
    """Why the kernel cannot run `p`, as the end of a sentence; empty when it can."""
    if p.dtype.itemsize != 2:
        return "which is for float16 and bfloat16"
    if (p.head_dim, p.head_dim_v) != (128, 128):
        return f"which is for head dimension 128, not {p.head_dim}/{p.head_dim_v}"
    if p.q_layout != "dense" or p.kv_layout != "dense" or p.lengths_on_device:
        return "which is for dense q, k and v of full length"
    if not p.aligned or not p.tma_strides:
        return "which needs rows of 16-byte multiples"
    if p.pack_gqa and p.group > 1:
        return "which does not fold, as pack_gqa=True asks"
    if p.extras:
        return f"which has no {' and no '.join(p.extras)}"
    return ""


def shared_memory(p: Problem, keys: int) -> int:
    """Bytes of shared memory the kernel needs, an upper bound; tests compare it with what the compiler reports."""
    kv = STAGES * keys * (p.head_dim + p.head_dim_v) * p.dtype.itemsize
    queries = ROWS * p.head_dim * p.dtype.itemsize
    beside = 2 * ROWS * keys * 2 if p.tensor_mask else ROWS * p.head_dim_v * p.dtype.itemsize
    return kv + queries + beside + 1024
