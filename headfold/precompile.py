"""Compile a model's kernels without a GPU, into a cache folder that ships with an image.

The kernels are compiled by the very calls that will run: every shape of call that a model meets goes through the
planner and the launcher with tensors that hold no memory, and each launch becomes a compilation. What Triton keeps on
disk is addressed by kernel source, arguments, target and Triton's own version: a machine with the same headfold,
Triton and Python then finds every kernel in TRITON_CACHE_DIR and compiles nothing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from headfold import backends, shared_prefix
from headfold.append import AppendInputs
from headfold.appending import AppendingInputs, plan_of
from headfold.planner import DEVICES, Device
from headfold.problem import DTYPES, MAX_HEAD_DIM, Inputs

# Lengths and batches that between them meet every tile: variants do not depend on more of a shape than that.
QUERIES = (1, 2, 4, 8, 16, 64, 512, 4096)
BATCHES = (1, 16, 256, 512)
KEYS = (1024, 16384, 131072)
PAGE = 16


@dataclass(frozen=True, slots=True)
class Model:
    """What of a model its attention kernels depend on.

    `rotary_dim` is 0 where q and k come rotated already; `window` the keys that a query sees in layers with a sliding
    window, 0 without such layers.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    rotary_dim: int = 0
    softcap: float = 0.0
    sinks: bool = False
    window: int = 0


def read_model(path: Path) -> Model:
    """A Model from a `config.json` as model hubs publish it, or from its `text_config` where there is one.

    Read are num_attention_heads, num_key_value_heads (default: as many), head_dim (default: hidden_size divided by
    the heads), v_head_dim, dtype or torch_dtype, partial_rotary_factor, attn_logit_softcapping, sliding_window and
    use_sliding_window, and whether the model type is known for sinks.

    Raises:
        ValueError: a key is missing or its value is none that attention can run with.
    """
    try:
        config = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ValueError(f"config is {str(path)!r}, which is no readable JSON file: {e}") from None
    if isinstance(config, dict) and isinstance(config.get("text_config"), dict):
        config = {"dtype": config.get("dtype", config.get("torch_dtype")), **config["text_config"]}
    if not isinstance(config, dict):
        raise ValueError(f"config {str(path)!r} holds a {type(config).__name__}; it must hold an object")
    heads = _count(config, "num_attention_heads")
    kv_heads = _count(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(
            f"config has num_attention_heads {heads} and num_key_value_heads {kv_heads}; "
            "the first must be a multiple of the second"
        )
    head_dim = _count(config, "head_dim", _count(config, "hidden_size", heads) // heads)
    head_dim_v = _count(config, "v_head_dim", head_dim)
    for name, d in (("head_dim", head_dim), ("v_head_dim", head_dim_v)):
        if d > MAX_HEAD_DIM:
            raise ValueError(f"config has {name} {d}; it may be at most {MAX_HEAD_DIM}")
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    dtype = getattr(torch, str(name), None)
    if dtype not in DTYPES:
        raise ValueError(f"config has dtype {name!r}; it must be float16, bfloat16 or float32")
    share = config.get("partial_rotary_factor") or 1.0
    # Models without such layers leave the key out, hold null, or switch it off.
    windowed = config.get("sliding_window") is not None and config.get("use_sliding_window", True)
    return Model(
        heads,
        kv_heads,
        head_dim,
        head_dim_v,
        dtype,
        rotary_dim=int(head_dim * share) // 2 * 2,
        softcap=float(config.get("attn_logit_softcapping") or 0.0),
        sinks=config.get("model_type") == "gpt_oss",
        window=_count(config, "sliding_window") if windowed else 0,
    )


def _count(config: dict[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config has {name} {value!r}; it must be an integer of at least 1")
    return value


def _meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _caches(model: Model, batch: int, keys: int) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """((k, v) of a dense cache, the arguments `k`, `v` and `page_table` of a paged one) with room for so many keys each."""
    kv_heads, sizes, dtype = model.num_kv_heads, (model.head_dim, model.head_dim_v), model.dtype
    rows = tuple(_meta(batch, keys, kv_heads, n, dtype=dtype) for n in sizes)
    k, v = (_meta(batch * keys // PAGE, PAGE, kv_heads, n, dtype=dtype) for n in sizes)
    return rows, {"k": k, "v": v, "page_table": _meta(batch, keys // PAGE)}


def _features(model: Model) -> dict[str, Any]:
    """What every causal call of a model has."""
    sink = _meta(model.num_heads, dtype=model.dtype) if model.sinks else None
    return {"window_right": 0, "softcap": model.softcap, "sink": sink}


def calls_of(model: Model) -> Iterator[Inputs]:
    """One call of each kind that serving or training a model makes, on tensors without memory."""
    plain = _features(model)
    yield from _calls_with(model, plain)
    if model.window:
        yield from _calls_with(model, plain | {"window_left": model.window - 1})


def _calls_with(model: Model, plain: dict[str, Any]) -> Iterator[Inputs]:
    heads, d, dtype = model.num_heads, model.head_dim, model.dtype
    for batch, sq, sk in itertools.product(BATCHES, QUERIES, KEYS):
        lengths, offsets = _meta(batch), _meta(batch + 1)
        q = _meta(batch, sq, heads, d, dtype=dtype)
        packed = q.flatten(0, 1)
        (k, v), pages = _caches(model, batch, sk)
        paged = {**pages, "seqused_k": lengths}
        yield Inputs(q, k, v, **plain)
        yield Inputs(q, k, v, **plain | {"window_right": -1})
        yield Inputs(q, k, v, seqused_k=lengths, **plain)
        yield Inputs(q, **paged, **plain)
        bounds: dict[str, Any] = {"cu_seqlens_q": offsets, "max_seqlen_q": sq}
        ragged: dict[str, Any] = {
            "k": k.flatten(0, 1),
            "v": v.flatten(0, 1),
            "cu_seqlens_k": offsets,
            "max_seqlen_k": sk,
        }
        yield Inputs(packed, **ragged, **bounds, **plain)
        yield Inputs(packed, **paged, **bounds, **plain)
        if batch > 1 and sq > 1:  # decodes beside one prompt
            packed = _meta(batch + sq, heads, d, dtype=dtype)
            yield Inputs(packed, **paged, **bounds, **plain)


def _new_tokens(model: Model, batch: int, new: int) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = (model.head_dim, model.head_dim_v)
    k, v = (_meta(batch, new, model.num_kv_heads, n, dtype=model.dtype) for n in sizes)
    return k, v


def _angles(model: Model, rotated: bool) -> dict[str, Any]:
    angles = _meta(4096, model.rotary_dim // 2, dtype=model.dtype) if rotated else None
    return {"rotary_cos": angles, "rotary_sin": angles}


def appends_of(model: Model) -> Iterator[AppendInputs]:
    """The appends of decoding steps and of prefills, dense and paged, with the model's rotation and without."""
    for batch, new, rotated, pairs in itertools.product(BATCHES, (1, 512), (False, True), (False, True)):
        if (rotated and not model.rotary_dim) or (pairs and not rotated):
            continue
        k, v = _new_tokens(model, batch, new)
        facts: dict[str, Any] = {"cache_seqlens": _meta(batch), "rotary_interleaved": pairs}
        facts |= _angles(model, rotated)
        (k_cache, v_cache), pages = _caches(model, batch, 4096)
        yield AppendInputs(k_cache, v_cache, k, v, **facts)
        yield AppendInputs(pages["k"], pages["v"], k, v, page_table=pages["page_table"], **facts)


def steps_of(model: Model) -> Iterator[AppendingInputs]:
    """Decoding steps that append in the attention's launch, dense and paged, with the model's rotation and without."""
    for batch, rotated in itertools.product(BATCHES, (False, True)):
        if rotated and not model.rotary_dim:
            continue
        lengths = _meta(batch)
        new_k, new_v = _new_tokens(model, batch, 1)
        facts: dict[str, Any] = {
            "seqused_k": lengths,
            "new_k": new_k,
            "new_v": new_v,
            "rotary_positions": lengths if rotated else None,
            "rotary_interleaved": False,
            **_angles(model, rotated),
            **_features(model),
        }
        q = _meta(batch, 1, model.num_heads, model.head_dim, dtype=model.dtype)
        (k, v), pages = _caches(model, batch, 4096)
        yield AppendingInputs(q, k, v, **facts)
        yield AppendingInputs(q, **pages, **facts)


def _attentions(model: Model) -> Iterator[Callable[[], None]]:
    for x in calls_of(model):
        out, lse = _meta(*x.out_shape, dtype=x.q.dtype), _meta(*x.lse_shape, dtype=torch.float32)
        yield partial(backends.run, x, out, lse)


def _appends(model: Model) -> Iterator[Callable[[], None]]:
    from headfold.backends.append import prepare

    for x in appends_of(model):
        lengths, turned = _meta(x.batch), _meta(0, dtype=x.k.dtype)
        yield partial(prepare(x, lengths, turned), x, lengths, turned)


def _steps(model: Model) -> Iterator[Callable[[], None]]:
    """Where the GPU's decode kernel appends; else a step is an append and an attention."""
    from headfold.backends.triton import prepare

    for x in steps_of(model):
        plan = plan_of(x)
        if plan is not None:
            out, lse = _meta(*x.out_shape, dtype=x.q.dtype), _meta(*x.lse_shape, dtype=torch.float32)
            yield partial(prepare(plan, x, out, lse), x, out, lse)


def _shared_prefixes(model: Model) -> Iterator[Callable[[], None]]:
    """Decoding steps over a shared prefix, where one launch has both of their parts; else they are two attentions."""
    batch = 8
    _, pages = _caches(model, batch, 4096)
    q = _meta(batch, 1, model.num_heads, model.head_dim, dtype=model.dtype)
    x = Inputs(q, **pages, seqused_k=_meta(batch), **_features(model))
    out, lse = _meta(*x.out_shape, dtype=x.q.dtype), _meta(*x.lse_shape, dtype=torch.float32)
    with shared_prefix.force(True):
        way = shared_prefix.way_of(x, shared_prefix.Groups((2048,), None), out, lse)
    if way is not None and way.pair is not None:
        yield partial(way.pair, x, out, lse)


def device_of_arch(arch: str) -> Device:
    """The planner's device of an architecture, given as sm_90.

    Raises:
        ValueError: not such a name, or an architecture that no known device has.
    """
    known = {f"sm_{d.arch[0]}{d.arch[1]}": d for d in reversed(DEVICES.values())}
    if arch not in known:
        raise ValueError(f"arch is {arch!r}; it must be one of {', '.join(sorted(known))}")
    return known[arch]


def precompile(model: Model, arch: str, cache: Path, progress: Callable[[str], None] = lambda _: None) -> int:
    """Compile every kernel that `model` meets on `arch` into the folder `cache`.

    Args:
        arch: sm_80, sm_90 ...
        cache: made where it is not there; what is in it already is not compiled again.
        progress: called with a kernel's name when it is done.

    Returns:
        The number of distinct kernels.

    Raises:
        ValueError: an unknown architecture.
        RuntimeError: under TRITON_INTERPRET=1, where nothing is compiled, or without a C compiler.
    """
    device = device_of_arch(arch)
    from headfold.planner.device import interpreter_requested

    if interpreter_requested():
        raise RuntimeError("TRITON_INTERPRET=1 is set; unset it, the interpreter compiles nothing")
    from triton import knobs

    from headfold.backends.launch import compile_only
    from headfold.backends.without_gpu import build_host_helpers, target

    seen: dict[str, Any] = {}
    with (
        knobs.cache.scope(),
        backends.force(device),
        target(device.arch[0] * 10 + device.arch[1]),
        compile_only() as done,
    ):
        knobs.cache.dir = str(cache.absolute())
        for launch in itertools.chain(
            *(calls(model) for calls in (_attentions, _appends, _steps, _shared_prefixes))
        ):
            launch()
            for name, kernel in done:
                if kernel.hash not in seen:
                    seen[kernel.hash] = kernel
                    progress(name)
            done.clear()
        build_host_helpers(seen.values())
    return len(seen)
