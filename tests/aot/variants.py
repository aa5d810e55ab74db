"""Which calls to compile ahead of time: one Variant is one call of the library, as a user would make it.

The planner and the launcher turn a call into a kernel, its constants, warps and stages; nothing of that is
repeated here. Tensors are never read nor written, so they cost no memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch

from headfold.append import AppendInputs
from headfold.appending import AppendingInputs
from headfold.problem import Inputs

# Architectures in the order of their figures, and the device of the planner's table that stands for each.
DEVICE_OF = {80: "a100", 90: "h200", 100: "b200", 120: "rtx5090"}
ARCHS = tuple(DEVICE_OF)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BATCH, KEYS = 4, 8192
# Powers of two, cut in two (80, 96), unequal (192/128), and masked columns on both sides (40/72).
ALL_DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (40, 72))

# What a call adds to plain attention: one of each program that features share. Masks are for dense calls only.
# Of masks: bytes and halves in wide loads, and any other.
TENSORS = {"mask-bool": torch.bool, "mask-half": torch.bfloat16, "mask-any": torch.float32}
MASKS = (*TENSORS, "tree")
FEATURES = ("softcap", *MASKS, "rotary-pairs")
# Forms of the two attention kernels; the others have no plan of their own.
ATTENTION = ("decode1", "decode64", "prefill")


@dataclass(frozen=True)
class Variant:
    """One call: `form` is what it does, `layout` where K and V lie, `aligned` whether rows start on 16 bytes."""

    # "decode1": one query (four under a tree); "decode64": 64 folded rows; "prefill"; "fixup": the merge after a
    # split; "blocks": the lists before a prefill with a mask; "append": new keys and values into a cache; "step": a
    # decode that appends
    form: str
    layout: str  # "dense", "ragged", "paged"
    dtype: str
    d: int
    dv: int
    aligned: bool = True
    feature: str = ""

    @property
    def name(self) -> str:
        """Readable and unique: what a failing test prints."""
        dims = f"d{self.d}" if self.d == self.dv else f"d{self.d}/{self.dv}"
        name = f"{self.form}-{self.layout}-{self.dtype}-{dims}" + ("" if self.aligned else "-unaligned")
        return f"{name}-{self.feature}" if self.feature else name

    def inputs(self) -> Inputs:
        """The arguments of the call."""
        heads, kv_heads = (8, 1) if self.form == "decode64" else (16, 4)
        queries = {"decode1": 1, "decode64": 8, "prefill": 1024, "blocks": 1024, "fixup": 1}[self.form]
        if self.form == "decode1" and self.feature == "tree":
            queries = 4
        keys, batch = KEYS, BATCH
        dtype = DTYPES[self.dtype]
        x: dict[str, object] = {}
        if self.layout == "ragged":
            # The first sequence is long and the others short, so that a tile must search for its sequence.
            total = queries + (batch - 1) * max(1, queries // 4)
            if self.form == "decode64":
                queries, total = 40, 46
            x["cu_seqlens_q"], x["max_seqlen_q"] = _index(batch + 1), queries
            x["seqused_q"] = _index(batch) if self.form == "fixup" else None
            x["q"] = self._tensor((total,), heads, self.d, dtype)
            x["cu_seqlens_k"], x["max_seqlen_k"] = _index(batch + 1), keys
            shape: tuple[int, ...] = (2 * keys,)
        else:
            x["q"] = self._tensor((batch, queries), heads, self.d, dtype)
            shape = (batch, keys)
            if self.layout == "paged":
                shape = (batch * keys // 16, 16)
                x["page_table"], x["seqused_k"] = _index(batch, keys // 16), _index(batch)
        x["k"] = self._tensor(shape, kv_heads, self.d, dtype)
        x["v"] = self._tensor(shape, kv_heads, self.dv, dtype)
        x |= self._feature(heads, queries, dtype)
        return Inputs(**x, num_splits={"fixup": 4, "prefill": 1, "blocks": 1}.get(self.form, 0))  # type: ignore[arg-type]

    def _feature(self, heads: int, queries: int, dtype: torch.dtype) -> dict[str, object]:
        """The arguments that ask for the feature."""
        name = self.feature
        if name.startswith("rotary"):
            cos, sin = torch.empty(2, KEYS, self.d // 2, dtype=dtype)
            return {
                "rotary_cos": cos,
                "rotary_sin": sin,
                "rotary_positions": _index(BATCH),
                "rotary_interleaved": name == "rotary-pairs",
            }
        others: dict[str, dict[str, object]] = {
            "": {},
            "softcap": {"softcap": 30.0},
            **{
                mask: {"mask": torch.empty(KEYS, dtype=kind).expand(BATCH, heads, queries, KEYS)}
                for mask, kind in TENSORS.items()
            },
            "tree": {"tree_mask": torch.empty(queries, dtype=torch.bool).expand(BATCH, queries, queries)},
        }
        return others[name]

    def step_inputs(self) -> AppendingInputs:
        """The arguments of a decode of one query that appends a token; rotary as in a decode."""
        x = replace(
            self, form="decode1", feature="" if self.feature.startswith("rotary") else self.feature
        ).inputs()
        dtype = DTYPES[self.dtype]
        given = {field.name: getattr(x, field.name) for field in fields(x)}
        given["seqused_k"] = lengths = _index(BATCH)
        if self.feature.startswith("rotary"):
            given |= self._feature(16, 1, dtype) | {"rotary_positions": lengths}
        new = (self._tensor((BATCH, 1), 4, d, dtype) for d in (self.d, self.dv))
        return AppendingInputs(**given, **dict(zip(("new_k", "new_v"), new, strict=True)))

    def append_inputs(self) -> AppendInputs:
        """The arguments of an append of one token a sequence; rotary as in a decode."""
        dtype, paged = DTYPES[self.dtype], self.layout == "paged"
        rows = (BATCH * KEYS // 16, 16) if paged else (BATCH, KEYS)
        rotary = self._feature(4, 1, dtype)
        if rotary:
            rotary.pop("rotary_positions")  # those of the cache
            rotary["q"] = self._tensor((BATCH, 1), 16, self.d, dtype)
        return AppendInputs(
            self._tensor(rows, 4, self.d, dtype),
            self._tensor(rows, 4, self.dv, dtype),
            self._tensor((BATCH, 1), 4, self.d, dtype),
            self._tensor((BATCH, 1), 4, self.dv, dtype),
            cache_seqlens=_index(BATCH),
            page_table=_index(BATCH, KEYS // 16) if paged else None,
            **rotary,  # type: ignore[arg-type]
        )

    def _tensor(self, rows: tuple[int, ...], heads: int, d: int, dtype: torch.dtype) -> torch.Tensor:
        """(*rows, heads, d), allocated but never touched; unaligned: rows of odd length from an odd address on."""
        extra = 0 if self.aligned else 1
        shape = (*rows, heads, d + extra)
        return torch.empty(math.prod(shape) + extra, dtype=dtype)[extra:].view(shape)[..., :d]


def _index(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32)


def variants(arch: int) -> list[Variant]:
    """What is compiled for an architecture: everything on Hopper, which was tuned; elsewhere a cross-section."""
    return _hopper() if arch == 90 else _cross_section()


def _hopper() -> list[Variant]:
    layouts = ("dense", "ragged", "paged")
    full = [
        Variant(form, layout, "bf16", d, dv)
        for d, dv in ALL_DIMS
        for form in ("decode1", "decode64", "prefill")
        for layout in layouts
    ]
    unaligned = [
        Variant(form, "dense", "bf16", d, d, aligned=False)
        for d in (64, 80, 128)
        for form in ("decode1", "prefill")
    ]
    single = [
        Variant(form, layout, "fp32", d, dv)
        for d, dv in ((64, 64), (96, 96), (128, 128), (256, 256))
        for form, layout in (
            ("decode1", "dense"),
            ("decode1", "paged"),
            ("decode64", "dense"),
            ("prefill", "dense"),
        )
    ]
    single += [
        Variant("prefill", "ragged", "fp32", 128, 128),
        Variant("decode1", "dense", "fp32", 128, 128, aligned=False),
    ]
    half = [Variant(form, "dense", "fp16", 128, 128) for form in ("decode1", "prefill")]
    fixup = [Variant("fixup", layout, "bf16", 128, 128) for layout in layouts]
    fixup += [Variant("fixup", "ragged", "fp32", 40, 72), Variant("fixup", "dense", "bf16", 256, 256)]
    featured = [
        Variant(form, layout, "bf16", 128, 128, feature=feature)
        for feature, layouts in (
            ("softcap", ("dense", "paged")),
            ("mask-bool", ("dense",)),
            ("tree", ("paged",)),
            ("rotary-pairs", ("dense", "paged")),
        )
        for form in ("decode1", "prefill")
        for layout in layouts
    ]
    featured += [
        Variant(form, "dense", "bf16", d, dv, feature=feature)
        for d, dv in ALL_DIMS
        if d != 128
        for form in ("decode1", "prefill")
        for feature in ("softcap", "mask-bool")
    ]
    featured += [
        Variant("decode64", layout, "bf16", 128, 128, feature="softcap") for layout in ("dense", "paged")
    ]
    featured += [
        Variant("decode64", layout, "bf16", 128, 128, feature="tree") for layout in ("dense", "paged")
    ]
    featured += [
        Variant(form, "dense", "bf16", 128, 128, feature=feature)
        for form in ("decode1", "prefill")
        for feature in ("mask-half", "mask-any")
    ]
    featured += [Variant("blocks", "dense", "bf16", 128, 128, feature=feature) for feature in TENSORS]
    featured += [
        Variant(form, "dense", "fp32", 128, 128, feature="mask-bool") for form in ("decode1", "prefill")
    ]
    append = [
        Variant("append", layout, "bf16", 128, 128, feature=feature)
        for layout, feature in (
            ("dense", ""),
            ("paged", ""),
            ("dense", "rotary-pairs"),
            ("paged", "rotary-halves"),
        )
    ]
    step = [
        Variant("step", layout, dtype, d, dv, feature=feature)
        for layout, dtype, d, dv, feature in (
            ("dense", "bf16", 128, 128, ""),
            ("paged", "bf16", 128, 128, ""),
            ("dense", "bf16", 128, 128, "rotary-halves"),
            ("paged", "bf16", 128, 128, "rotary-halves"),
            ("dense", "bf16", 128, 128, "softcap"),
            ("paged", "bf16", 128, 128, "softcap"),
            ("dense", "bf16", 64, 64, "rotary-halves"),
            ("dense", "bf16", 96, 96, "rotary-halves"),
            ("dense", "bf16", 256, 256, "rotary-halves"),
            ("paged", "bf16", 256, 256, "rotary-halves"),
            ("dense", "fp32", 128, 128, "rotary-halves"),
        )
    ]
    return full + unaligned + single + half + fixup + featured + append + step


def _cross_section() -> list[Variant]:
    chosen = [
        Variant(form, layout, "bf16", d, d)
        for d in (64, 128)
        for form in ("decode1", "prefill")
        for layout in ("dense", "paged")
    ]
    chosen += [
        Variant(form, "dense", "bf16", d, dv)
        for d, dv in ((96, 96), (256, 256), (40, 72))
        for form in ("decode1", "prefill")
    ]
    return chosen + [
        Variant("decode64", "ragged", "bf16", 128, 128),
        Variant("prefill", "ragged", "bf16", 128, 128),
        Variant("decode1", "dense", "bf16", 128, 128, aligned=False),
        Variant("decode1", "dense", "fp16", 128, 128),
        Variant("decode1", "dense", "fp32", 128, 128),
        Variant("decode64", "dense", "fp32", 256, 256),
        Variant("prefill", "dense", "fp32", 128, 128),
        Variant("fixup", "ragged", "bf16", 128, 128),
        *(Variant("prefill", "dense", "bf16", d, d, feature=m) for d in (64, 128, 256) for m in TENSORS),
        *(Variant("blocks", "dense", "bf16", 128, 128, feature=m) for m in TENSORS),
        Variant("prefill", "paged", "bf16", 128, 128, feature="tree"),
        Variant("decode1", "paged", "bf16", 128, 128, feature="tree"),
    ]
