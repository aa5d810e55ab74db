"""What only a GPU can show: graphs, streams, no synchronisation, real model shapes in bfloat16."""

from __future__ import annotations

import pytest
import torch

import headfold
from headfold import backends, reference, shared_prefix
from headfold.problem import Inputs
from tests.cases import assert_accurate

pytestmark = pytest.mark.gpu


def decode_inputs(h: int, hk: int, d: int, lengths: list[int], page_size: int = 16) -> Inputs:
    """One query per sequence against a shuffled paged cache with room for the longest."""
    batch, most = len(lengths), max(lengths)
    per = -(-most // page_size)
    q = torch.randn(batch, 1, h, d, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(batch * per, page_size, hk, d, device="cuda", dtype=torch.bfloat16)
    table = torch.randperm(batch * per, device="cuda").int().view(batch, per)
    return Inputs(
        q,
        k,
        torch.randn_like(k),
        page_table=table,
        seqused_k=torch.tensor(lengths, dtype=torch.int32, device="cuda"),
    )


def call(
    x: Inputs, out: torch.Tensor | None = None, shared_prefix_len: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The public function on these inputs."""
    result = headfold.flash_attn_with_kvcache(
        x.q,
        x.k,
        x.v,
        cache_seqlens=x.seqused_k,
        page_table=x.page_table,
        return_softmax_lse=True,
        out=out,
        shared_prefix_len=shared_prefix_len,
    )
    assert isinstance(result, tuple)
    return result


@pytest.mark.parametrize(
    "shape", [(32, 8, 128), (96, 8, 128), (16, 2, 256), (64, 8, 64), (28, 4, 128), (32, 1, 128)]
)
def test_a_captured_graph_follows_lengths_that_change(shape: tuple[int, int, int]) -> None:
    """The plan comes from bounds and the kernel reads lengths: a replay may have any lengths below the capacity."""
    x = decode_inputs(*shape, lengths=[3000, 1, 700, 2048])
    assert x.seqused_k is not None
    out = torch.empty_like(x.q)
    call(x, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, lse = call(x, out)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x.seqused_k.copy_(torch.randint(0, 3001, (4,), generator=generator, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        assert_accurate(x, out, lse)


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("rotates", [False, True])
def test_a_captured_step_reads_the_lengths_that_the_one_before_it_left(page_size: int, rotates: bool) -> None:
    """Append and attention overlap, and so do a step's end and the next one's start: hundreds of tokens one by one."""
    b, h, hk, d, room, steps = 5, 32, 8, 128, 640, 300
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=g)

    k_cache, v_cache = normal(b, room, hk, d), normal(b, room, hk, d)
    first = torch.tensor([0, 1, 127, 300, 339], dtype=torch.int32, device="cuda")
    lengths, step = first.clone(), torch.zeros(1, dtype=torch.int64, device="cuda")
    q, k, v = normal(steps, b, 1, h, d), normal(steps, b, 1, hk, d), normal(steps, b, 1, hk, d)
    angles = {}
    if rotates:
        cos, sin = (torch.rand(room, d // 2, device="cuda", generator=g).bfloat16() for _ in range(2))
        angles = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": False}
    keys, values, table = k_cache.clone(), v_cache.clone(), None
    if page_size:
        per = room // page_size
        table = torch.randperm(b * per, device="cuda").int().view(b, per)
        for cache in (k_cache, v_cache):
            pages = torch.empty_like(cache).view(b * per, page_size, hk, d)
            pages[table.long()] = cache.view(b, per, page_size, hk, d)
            cache.set_(pages)
    out = torch.empty(steps, b, 1, h, d, device="cuda", dtype=torch.bfloat16)

    def take_a_step() -> None:
        new = [t.index_select(0, step)[0] for t in (q, k, v)]
        found = headfold.flash_attn_with_kvcache(
            new[0], k_cache, v_cache, *new[1:], cache_seqlens=lengths, page_table=table, causal=True, **angles
        )
        assert isinstance(found, torch.Tensor)
        out.index_copy_(0, step, found.unsqueeze(0))
        lengths.add_(1)
        step.add_(1)

    take_a_step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        take_a_step()
    lengths.copy_(first)
    step.zero_()
    for _ in range(steps):
        graph.replay()
    for i in range(steps):
        new_q, new_k = q[i], k[i]
        for n in range(b):
            at = int(first[n]) + i
            if rotates:
                turn = (cos[at : at + 1], sin[at : at + 1])
                zero = torch.zeros(1, dtype=torch.int64, device="cuda")
                new_q[n] = reference.rotate(q[i, n], *turn, zero, False)
                new_k[n] = reference.rotate(k[i, n], *turn, zero, False)
            keys[n, at], values[n, at] = new_k[n, 0], v[i, n, 0]
            rows = new_q[n, 0].float().view(hk, h // hk, d)
            scores = torch.einsum("gid,kgd->gik", rows, keys[n, : at + 1].float()) * d**-0.5
            wanted = torch.einsum("gik,kgd->gid", scores.softmax(-1), values[n, : at + 1].float())
            torch.testing.assert_close(
                out[i, n, 0].float(),
                wanted.reshape(h, d),
                atol=2e-2,
                rtol=2e-2,
                msg=f"step {i}, sequence {n}",
            )


@pytest.mark.parametrize("shared", [512, 8192])
def test_a_captured_graph_of_a_shared_prefix(shared: int) -> None:
    """Both parts and their merge replay with any lengths from the prefix on, and what is kept stays kept."""
    x = decode_inputs(32, 8, 128, lengths=[shared + n for n in (88, 0, 1024, 300, 7, 40, 40, 512)])
    assert x.seqused_k is not None
    assert x.page_table is not None
    x.page_table[:, : shared // 16] = x.page_table[0, : shared // 16]
    out = torch.empty_like(x.q)
    with shared_prefix.force(True):
        call(x, out, shared)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _, lse = call(x, out, shared)
    shared_prefix._kept.clear()
    shared_prefix._made.clear()
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        x.seqused_k.copy_(shared + torch.randint(0, 1025, (8,), generator=generator, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        assert_accurate(x, out, lse)


def test_a_shared_prefix_that_was_never_run_is_not_captured() -> None:
    x = decode_inputs(32, 8, 128, lengths=[640, 660])
    assert x.page_table is not None
    x.page_table[:, :40] = x.page_table[0, :40]
    torch.cuda.synchronize()
    with (
        shared_prefix.force(True),
        pytest.raises(RuntimeError, match="make the same call once before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        call(x, None, 640)


def test_no_call_synchronises() -> None:
    """Nothing is read back from the device: the host runs ahead of it."""
    x = decode_inputs(32, 8, 128, lengths=[3000, 16, 700, 2048])
    assert x.page_table is not None
    x.page_table[:, 0] = x.page_table[0, 0]
    call(x)
    with shared_prefix.force(True):
        call(x, None, 16)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(x)
        with shared_prefix.force(True):
            call(x, None, 16)
        headfold.flash_attn_func(
            *(torch.randn(1, 300, h, 64, device="cuda", dtype=torch.float16) for h in (4, 2, 2))
        )
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_a_side_stream() -> None:
    """Work goes to the current stream, and waits for what is there."""
    x = decode_inputs(32, 8, 128, lengths=[5000] * 4)
    expected, _ = call(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x.q.mul_(1.0)
        got, _ = call(x)
    stream.synchronize()
    assert torch.equal(expected, got)


@pytest.mark.parametrize(
    ("h", "hk", "d", "sq", "sk"),
    [
        (96, 8, 128, 1, 65536),
        (32, 8, 128, 4, 8192),
        (16, 2, 256, 1, 16384),
        (32, 8, 128, 2048, 2048),
        (8, 8, 64, 4000, 4096),
    ],
)
def test_real_shapes_in_bfloat16(h: int, hk: int, d: int, sq: int, sk: int) -> None:
    """Long contexts and many queries: the last group of the last sequence against float64."""
    q = torch.randn(2, sq, h, d, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, sk, hk, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out, lse = headfold.flash_attn_func(q, k, v, causal=True, return_lse=True)
    group = h // hk
    part = Inputs(q[1:, :, -group:], k[1:, :, -1:], v[1:, :, -1:], window_right=0)
    if sq * sk > 2**23:  # keep the float64 scores small: the last queries only
        part.q, out, lse = part.q[:, -256:], out[:, -256:], lse[..., -256:]
    assert_accurate(part, out[1:, :, -group:], lse[1:, -group:])
    assert reference.queries_of(part, 0).shape[0] > 0


def test_a_thousand_runs_give_the_same_bits() -> None:
    """Splits, fixup and all, beside another stream that keeps the card busy."""
    x = decode_inputs(32, 8, 128, lengths=[20000, 7, 9000])
    first, first_lse = call(x)
    busy = torch.randn(2048, 2048, device="cuda")
    stream = torch.cuda.Stream()
    for i in range(1000):
        if i % 10 == 0:
            with torch.cuda.stream(stream):
                busy @ busy
        again, again_lse = call(x)
        assert torch.equal(first, again), i
        assert torch.equal(first_lse, again_lse), i


def test_a_captured_graph_follows_a_mask_that_changes() -> None:
    """The list of live blocks is made anew in every replay, in room that the plan fixed; here for the Triton kernel."""
    q = torch.randn(2, 512, 8, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, 1000, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    mask = torch.zeros(1, 8, 512, 1000, device="cuda")
    x = Inputs(q, k, v, mask=mask.expand(2, -1, -1, -1), num_splits=1)
    _, plan = backends.plan_of(x)
    assert (plan.backend, plan.kernel) == ("triton", "prefill")
    assert plan.mask_list_bytes > 0
    out, lse = torch.empty_like(q), torch.empty(x.lse_shape, device="cuda")
    backends.run(x, out, lse)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backends.run(x, out, lse)
    for live in (0.0, 0.1, 0.5, 1.0):
        squares = torch.rand(1, 8, 16, 32, device="cuda") < live
        keep = squares.repeat_interleave(32, 2).repeat_interleave(32, 3)[..., :1000]
        mask.copy_(torch.randn_like(mask).masked_fill(~keep, float("-inf")))
        out.fill_(float("nan"))
        graph.replay()
        assert_accurate(x, out, lse)
