"""Decoding over and over on a GPU: graphs with lengths drawn anew, a busy card, every count of splits."""

from __future__ import annotations

import pytest
import torch

import headfold

pytestmark = pytest.mark.gpu

REPLAYS = 10_000
RUNS = 1_000
Results = tuple[torch.Tensor, torch.Tensor]


class Step:
    """A decoding step over a cache of up to `most` keys a sequence, and its float32 definition on the device.

    `layout` is "dense", or "paged16" for shuffled pages of 16 tokens.
    """

    def __init__(self, heads: int, kv_heads: int, d: int, batch: int, most: int, layout: str) -> None:
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

        self.group, self.most = heads // kv_heads, most
        self.q, self.k, self.v = (
            draw(batch, 1, heads, d),
            draw(batch, most, kv_heads, d),
            draw(batch, most, kv_heads, d),
        )
        self.lengths = torch.full((batch,), most, dtype=torch.int32, device="cuda")
        self.table = None
        self.caches = (self.k, self.v)
        if layout == "paged16":
            pages = batch * most // 16
            order = torch.randperm(pages, device="cuda")
            self.table = order.argsort().int().view(batch, -1)  # page order[i] lies at place i
            self.caches = (
                self.k.view(pages, 16, kv_heads, d)[order],
                self.v.view(pages, 16, kv_heads, d)[order],
            )
        keys, values = (t.float().repeat_interleave(self.group, 2) for t in (self.k, self.v))
        self.scores = torch.einsum("bqhd,bkhd->bhk", self.q.float(), keys) * d**-0.5
        self.values = values

    def run(self, out: torch.Tensor | None = None, num_splits: int = 0) -> Results:
        """The call under test."""
        result = headfold.flash_attn_with_kvcache(
            self.q,
            *self.caches,
            cache_seqlens=self.lengths,
            page_table=self.table,
            num_splits=num_splits,
            return_softmax_lse=True,
            out=out,
        )
        assert isinstance(result, tuple)
        return result

    def expected(self) -> Results:
        """Output (b, 1, h, d) and LSE (b, h, 1) in float32, at the lengths of now."""
        visible = torch.arange(self.most, device="cuda") < self.lengths[:, None, None]
        scores = self.scores.masked_fill(~visible, float("-inf"))
        lse = scores.logsumexp(-1)
        weights = (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp()
        return torch.einsum("bhk,bkhd->bhd", weights, self.values).unsqueeze(1), lse.unsqueeze(-1)

    def capture(self, out: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """A graph of one step that writes `out`, and the LSE that it writes."""
        self.run(out)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _, lse = self.run(out)
        return graph, lse


def error(got: Results, want: Results) -> torch.Tensor:
    """Largest difference of outputs and LSEs, on the device; infinite where only one side is finite or NaN."""
    parts = [(a.float() - b).abs().nan_to_num(nan=0.0).amax() for a, b in zip(got, want, strict=True)]
    same = [(a.isfinite() == b.isfinite()).all() & ~a.isnan().any() for a, b in zip(got, want, strict=True)]
    return torch.where(torch.stack(same).all(), torch.stack(parts).amax(), float("inf"))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "batch", "most", "layout"),
    [(32, 8, 128, 4, 1024, "dense"), (8, 2, 64, 7, 512, "paged16"), (16, 1, 128, 3, 2048, "paged16")],
)
def test_ten_thousand_replays_with_lengths_drawn_anew(
    heads: int, kv_heads: int, d: int, batch: int, most: int, layout: str
) -> None:
    """Every replay is compared, whatever lengths it meets: 0, equal, very ragged; outputs are poisoned before."""
    torch.manual_seed(0)
    step = Step(heads, kv_heads, d, batch, most, layout)
    out = torch.empty_like(step.q)
    graph, lse = step.capture(out)
    drawn = torch.randint(0, most + 1, (REPLAYS, batch), dtype=torch.int32, device="cuda")
    drawn[::7] = drawn[::7, :1]  # equal lengths
    drawn[1::11, : batch // 2] = 0
    worst = torch.zeros((), device="cuda")
    for lengths in drawn:
        step.lengths.copy_(lengths)
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        graph.replay()
        worst = torch.maximum(worst, error((out, lse), step.expected()))
    # bf16 outputs of N(0, 1) values: half a unit in the last place of 4 is 2**-7, and the weights are rounded too.
    assert worst.item() < 3e-2


@pytest.mark.parametrize("layout", ["dense", "paged16"])
def test_a_thousand_ragged_runs_beside_a_busy_stream_give_the_same_bits(layout: str) -> None:
    """Who arrives last at a fixup changes from run to run, the order of summation does not."""
    torch.manual_seed(1)
    step = Step(32, 8, 128, 5, 4096, layout)
    step.lengths.copy_(torch.tensor([4096, 3, 0, 2500, 129], dtype=torch.int32))
    first = step.run()
    busy, stream = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16), torch.cuda.Stream()
    differ = torch.zeros((), dtype=torch.int32, device="cuda")
    for i in range(RUNS):
        if i % 5 == 0:
            with torch.cuda.stream(stream):
                busy @ busy
        again = step.run()
        for a, b in zip(first, again, strict=True):
            differ += (a != b).any()
    assert differ.item() == 0


def test_every_count_of_splits() -> None:
    """1 to 256, forced: the meaning of the result does not change."""
    torch.manual_seed(2)
    step = Step(32, 8, 128, 2, 4096, "dense")
    step.lengths.copy_(torch.tensor([4000, 77], dtype=torch.int32))
    want = step.expected()
    worst = {n: error(step.run(num_splits=n), want).item() for n in range(1, 257)}
    assert {n: e for n, e in worst.items() if not e < 3e-2} == {}


def test_two_streams_decode_at_once() -> None:
    """Each has its own workspace and counters."""
    torch.manual_seed(3)
    steps = [Step(32, 8, 128, 2, 4096, "dense") for _ in range(2)]
    wants = [step.expected() for step in steps]
    streams = [torch.cuda.Stream() for _ in steps]
    torch.cuda.synchronize()
    worst = torch.zeros(len(steps), device="cuda")
    for _ in range(200):
        for i, (step, stream) in enumerate(zip(steps, streams, strict=True)):
            with torch.cuda.stream(stream):
                worst[i] = torch.maximum(worst[i], error(step.run(), wants[i]))
    torch.cuda.synchronize()
    assert worst.max().item() < 3e-2


def give_up_a_capture(step: Step) -> None:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        step.run()
        raise RuntimeError("given up")


def test_a_call_that_raised_leaves_the_next_one_right() -> None:
    """Refused arguments, and a capture that was given up, touch nothing that a later call relies on."""
    torch.manual_seed(4)
    step = Step(32, 8, 128, 1, 8192, "dense")
    want = step.expected()
    step.run()
    with pytest.raises(ValueError, match="num_splits"):
        step.run(num_splits=257)
    with pytest.raises(RuntimeError, match="given up"):
        give_up_a_capture(step)
    torch.cuda.synchronize()
    for _ in range(3):
        assert error(step.run(), want).item() < 3e-2
