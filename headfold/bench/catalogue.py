"""The catalogue: which cases there are for each kind of machine, as data.

Shapes are those of real models; sizes suit the device. Every GPU size is one that other libraries are usually
measured at, so that figures can be laid side by side.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from headfold.bench.cases import Case
from headfold.bench.features import Features

SUITES = ("decode", "paged", "ragged", "prefill", "features", "all", "quick")


class Heads(NamedTuple):
    """The attention shape of a model."""

    model: str
    heads: int
    kv_heads: int
    d: int


LLAMA_8B = Heads("llama3-8b", 32, 8, 128)
LLAMA_70B = Heads("llama3-70b", 64, 8, 128)
GLM = Heads("glm4.7", 96, 8, 128)
QWEN_30B = Heads("qwen3-30b-a3b", 32, 4, 128)
QWEN_MOE = Heads("qwen3.5-moe", 16, 2, 256)
GPT_OSS = Heads("gpt-oss", 64, 8, 64)
QWEN_14B = Heads("qwen3-14b", 40, 8, 128)  # a group of 5
QWEN_7B = Heads("qwen2.5-7b", 28, 4, 128)  # a group of 7
MQA = Heads("mqa32", 32, 1, 128)
MHA = Heads("mha32", 32, 32, 128)

# Short prompts, 16 to 512 tokens.
PROMPTS_64 = tuple(16 + 167 * i % 497 for i in range(64))

# exp(uniform(log 128, log 32768)) of torch.Generator().manual_seed(0), written out so that no version of
# PyTorch can change the case.
RAGGED_64 = (
    27754,
    6483,
    1634,
    21115,
    4577,
    10291,
    344,
    896,
    3215,
    632,
    1576,
    341,
    917,
    4026,
    1851,
    1474,
    1224,
    399,
    5114,
    9939,
    410,
    5457,
    235,
    2336,
    448,
    2828,
    3327,
    5616,
    7984,
    452,
    11418,
    4224,
    379,
    298,
    1848,
    20738,
    3053,
    1841,
    10575,
    984,
    579,
    161,
    8132,
    851,
    2531,
    1699,
    15370,
    160,
    32273,
    16813,
    8804,
    529,
    366,
    30618,
    9653,
    952,
    2950,
    7801,
    131,
    3255,
    3014,
    167,
    316,
    32529,
)
# The same spread for a CPU: a quarter of the sequences, each a quarter as long.
RAGGED_16 = tuple(n // 4 for n in RAGGED_64[:16])


def _suffix(dtype: str) -> str:
    return "" if dtype == "bf16" else f"-{dtype}"


def _decode(m: Heads, batch: int, sk: int, dtype: str = "bf16") -> Case:
    name = f"{m.model}-decode-b{batch}-s{sk}{_suffix(dtype)}"
    return Case(name, "decode", m.heads, m.kv_heads, m.d, m.d, batch, 1, sk, dtype=dtype)


def _paged(m: Heads, batch: int, sk: int, page_size: int) -> Case:
    name = f"{m.model}-paged{page_size}-b{batch}-s{sk}"
    return Case(name, "paged decode", m.heads, m.kv_heads, m.d, m.d, batch, 1, sk, page_size=page_size)


def _prefix(m: Heads, batch: int, shared: int, own: int, page_size: int) -> Case:
    name = f"{m.model}-prefix{shared}-paged{page_size}-b{batch}-s{shared + own}"
    return replace(_paged(m, batch, shared + own, page_size), name=name, shared=shared)


def _ragged(m: Heads, lengths: tuple[int, ...], page_size: int = 0) -> Case:
    batch, sk = len(lengths), max(lengths)
    name = f"{m.model}-ragged-b{batch}" + (f"-paged{page_size}" if page_size else "")
    return Case(name, "ragged decode", m.heads, m.kv_heads, m.d, m.d, batch, 1, sk, lengths, page_size)


def _speculative(m: Heads, batch: int, sq: int, sk: int) -> Case:
    name = f"{m.model}-speculative{sq}-b{batch}-s{sk}"
    return Case(name, "speculative", m.heads, m.kv_heads, m.d, m.d, batch, sq, sk, causal=True)


def _prefill(m: Heads, batch: int, sq: int, causal: bool, sk: int | None = None) -> Case:
    length = f"s{sq}" if sk is None else f"q{sq}-s{sk}"
    name = f"{m.model}-prefill-b{batch}-{length}-{'causal' if causal else 'full'}"
    return Case(name, "prefill", m.heads, m.kv_heads, m.d, m.d, batch, sq, sk or sq, causal=causal)


def _paged_prefill(m: Heads, batch: int, sq: int, page_size: int) -> Case:
    plain = _prefill(m, batch, sq, True)
    return replace(plain, name=f"{plain.name}-paged{page_size}", page_size=page_size)


def _ragged_prefill(m: Heads, queries: tuple[int, ...], lengths: tuple[int, ...], what: str) -> Case:
    """Causal, ragged on both sides: sequence i has queries[i] of its newest tokens as queries."""
    name, batch, sq, sk = f"{m.model}-prefill-{what}", len(lengths), max(queries), max(lengths)
    return Case(
        *(name, "ragged prefill", m.heads, m.kv_heads, m.d, m.d, batch, sq, sk, lengths),
        causal=True,
        queries=queries,
    )


def _with(base: Case, name: str, features: Features, **changes: object) -> Case:
    """A case that adds features to another, and may see a longer context than it."""
    return replace(base, name=name, features=features, base=base.name, **changes)  # type: ignore[arg-type]


def _features(m: Heads, batch: int, sk: int, far: int, prompt: int) -> tuple[Case, ...]:
    """Every feature beside the plain case with the same work: the same bytes read, the same queries.

    Decode over `sk` keys, a window over `far` of them, and prefill of `prompt` tokens with mask tensors.
    """
    plain, half, short = (_decode(m, batch, n) for n in (sk, sk // 2, 1024))
    tree_base = _speculative(m, batch, 8, sk)
    tree_base = replace(tree_base, name=f"{m.model}-cache-q8-b{batch}-s{sk}", features=Features(cache=True))
    cache = replace(plain, name=f"{m.model}-cache-b{batch}-s{sk}", features=Features(cache=True))
    prefill = _prefill(m, 1, prompt, causal=False)
    everything = Features(sink=True, softcap=30.0, alibi=True, window=sk // 2)
    return (
        plain,
        _with(plain, f"{plain.name}-sink", Features(sink=True)),
        _with(plain, f"{plain.name}-softcap", Features(softcap=30.0)),
        _with(plain, f"{plain.name}-alibi", Features(alibi=True)),
        _with(plain, f"{plain.name}-window-open", Features(), causal=True),
        _with(plain, f"{plain.name}-split2048", Features(tokens_per_split=2048)),
        _with(plain, f"{plain.name}-split8192", Features(tokens_per_split=8192)),
        half,
        _with(half, f"{plain.name}-window{sk // 2}", Features(window=sk // 2), sk=sk),
        _with(half, f"{plain.name}-everything", everything, sk=sk),
        short,
        _with(short, f"{m.model}-decode-b{batch}-s{far}-window1024", Features(window=1024), sk=far),
        tree_base,
        _with(tree_base, f"{m.model}-tree8-b{batch}-s{sk}", Features(cache=True, tree=True), causal=False),
        cache,
        _with(cache, f"{cache.name}-append", Features(cache=True, append=True)),
        _with(cache, f"{cache.name}-append-rotary", Features(cache=True, append=True, rotary=True)),
        prefill,
        _with(prefill, f"{prefill.name}-additive", Features(mask="additive")),
        _with(prefill, f"{prefill.name}-documents", Features(mask="documents")),
    )


def _feature_prefills() -> tuple[Case, ...]:
    """What prefills of gpt-oss (sinks, and a window in every other layer) and of Gemma 2 (softcap) add to plain ones."""
    plain, capped = _prefill(GPT_OSS, 1, 8192, True), _prefill(LLAMA_8B, 1, 4096, True)
    window = replace(plain, name=f"{plain.name}-window128", features=Features(window=128))
    return (
        plain,
        _with(plain, f"{plain.name}-sink", Features(sink=True)),
        window,
        _with(window, f"{window.name}-sink", Features(sink=True, window=128)),
        capped,
        _with(capped, f"{capped.name}-softcap", Features(softcap=50.0)),
    )


def _cuda() -> tuple[Case, ...]:
    decode = [
        _decode(LLAMA_8B, 16, 8192),
        _decode(LLAMA_8B, 1, 8192),
        _decode(LLAMA_8B, 1, 131072),
        _decode(LLAMA_8B, 64, 8192),
        _decode(LLAMA_8B, 128, 2048),
        _decode(LLAMA_70B, 16, 8192),
        _decode(GLM, 4, 65536),
        _decode(QWEN_30B, 16, 32768),
        _decode(QWEN_MOE, 1, 16384),
        _decode(QWEN_MOE, 16, 16384),
        _decode(GPT_OSS, 16, 8192),
        _decode(MQA, 16, 16384),
        _decode(MHA, 4, 65536),
        _decode(QWEN_14B, 16, 16384),
        _decode(QWEN_7B, 16, 16384),
    ]
    paged = [_paged(LLAMA_8B, 16, 8192, 16)]
    paged += [_paged(m, 4, 65536, size) for m in (GLM, MHA) for size in (1, 16, 64)]
    paged += [_prefix(LLAMA_8B, 64, 8192, 512, 16)]
    ragged = [_ragged(LLAMA_8B, RAGGED_64, size) for size in (0, 16, 64)]
    speculative = [_speculative(LLAMA_8B, 16, 4, 8192)]
    prefill = [
        _prefill(Heads(f"d{d}-h{2048 // d}", 2048 // d, 2048 // d, d), batch, sq, causal)
        for d in (64, 96, 128, 256)
        for causal in (False, True)
        for batch, sq in ((16, 1024), (4, 4096), (1, 16384))
    ]
    prefill += [
        _prefill(LLAMA_8B, 2, 8192, True),
        _prefill(LLAMA_8B, 4, 8192, True),
        _prefill(LLAMA_8B, 4, 512, True, 16384),
    ]
    prefill += [_paged_prefill(LLAMA_8B, 4, 8192, size) for size in (1, 8, 16, 64, 128, 256)]
    prefill += [_paged_prefill(GPT_OSS, 2, 8192, 16)]
    # Beside the longest of them, and the parts that the mixed batch has alone.
    prefill += [
        _prefill(LLAMA_8B, 1, 16384, True),
        *(_ragged_prefill(m, RAGGED_64, RAGGED_64, "ragged-b64") for m in (LLAMA_8B, GPT_OSS)),
        *(_ragged_prefill(m, PROMPTS_64, PROMPTS_64, "prompts-b64") for m in (LLAMA_8B, GPT_OSS)),
        *(
            _ragged_prefill(LLAMA_8B, queries, (8192,) * len(queries), what)
            for queries, what in (
                ((512,) * 8 + (1,) * 120, "mixed-8x512-120x1-s8192"),
                ((512,) * 8, "chunks-8x512-s8192"),
                ((1,) * 120, "decodes-120x1-s8192"),
            )
        ),
    ]
    return tuple(decode + paged + ragged + speculative + prefill)


def _cpu() -> tuple[Case, ...]:
    decode = [
        _decode(LLAMA_8B, 1, 8192),
        _decode(LLAMA_8B, 8, 4096),
        _decode(LLAMA_8B, 1, 8192, "fp32"),
        _decode(LLAMA_70B, 1, 8192),
        _decode(GLM, 1, 16384),
        _decode(QWEN_30B, 1, 16384),
        _decode(QWEN_MOE, 1, 16384),
        _decode(GPT_OSS, 1, 16384),
        _decode(QWEN_14B, 1, 8192),
        _decode(QWEN_7B, 1, 16384),
        _decode(MQA, 4, 16384),
        _decode(MHA, 1, 4096),
    ]
    paged = [_paged(LLAMA_8B, 1, 8192, size) for size in (1, 16, 64)]
    paged += [_prefix(LLAMA_8B, 8, 2048, 128, 16)]
    ragged = [_ragged(LLAMA_8B, RAGGED_16, size) for size in (0, 16)]
    speculative = [_speculative(LLAMA_8B, 1, 4, 8192)]
    prefill = [_prefill(LLAMA_8B, 1, sq, causal) for sq in (1024, 2048) for causal in (True, False)]
    prefill += [_ragged_prefill(LLAMA_8B, (256, *(1,) * 7), (2048,) * 8, "mixed-1x256-7x1-s2048")]
    return tuple(decode + paged + ragged + speculative + prefill)


_QUICK = {
    "cuda": (
        "llama3-8b-decode-b16-s8192",
        "glm4.7-decode-b4-s65536",
        "llama3-8b-paged16-b16-s8192",
        "llama3-8b-ragged-b64",
        "d128-h16-prefill-b4-s4096-causal",
    ),
    "cpu": (
        "llama3-8b-decode-b1-s8192",
        "glm4.7-decode-b1-s16384",
        "llama3-8b-paged16-b1-s8192",
        "llama3-8b-prefill-b1-s1024-causal",
    ),
}


def catalogue(device_type: str, suite: str = "all") -> tuple[Case, ...]:
    """The cases for "cuda" or "cpu", all of them or those of a suite.

    Raises:
        ValueError: no such suite or device.
    """
    if device_type not in _QUICK:
        raise ValueError(f"--device is {device_type!r}; it must be one of {', '.join(_QUICK)}")
    if suite not in SUITES:
        raise ValueError(f"--suite is {suite!r}; it must be one of {', '.join(SUITES)}")
    cuda = device_type == "cuda"
    models = _cuda() if cuda else _cpu()
    features = _features(LLAMA_8B, 1, 8192, 32768, 512)
    if cuda:
        features = (*_features(LLAMA_8B, 16, 8192, 65536, 4096), *_feature_prefills())
    if suite == "features":
        return features
    everything = models + tuple(c for c in features if c not in models)
    if suite == "all":
        return everything
    if suite == "quick":
        return tuple(c for c in everything if c.name in _QUICK[device_type])
    return tuple(c for c in models if _is_in(c, suite))


def _is_in(case: Case, suite: str) -> bool:
    if suite in ("decode", "prefill"):
        return case.is_memory_bound == (suite == "decode")
    return case.is_paged if suite == "paged" else case.is_ragged
