"""Every argument of every function has errors, and a call that is refused writes and launches nothing."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch

import headfold
from headfold import append, ops
from tests.cases import NAN
from tests.interface.attention_errors import LONG_K, LONG_V, attention_errors
from tests.interface.bad import APPEND, BASES, OUT_SHAPES, PAGED, RAGGED_NEW, ROTARY, Bad, K, Q, V, flag
from tests.interface.combine_errors import COMBINE_ERRORS
from tests.interface.functions import FUNCTIONS, SIGNATURES
from tests.interface.kvcache_errors import KVCACHE_ERRORS
from tests.interface.metadata_errors import METADATA_ERRORS
from tests.interface.tensors import bits
from tests.interface.varlen_errors import VARLEN_ERRORS
from tests.recording import run_instead

ERRORS: dict[str, dict[str, list[Bad]]] = {
    "flash_attn_func": {
        **attention_errors(BASES["flash_attn_func"], {"k": LONG_K, "v": LONG_V}),
        "deterministic": flag("deterministic"),
        "return_attn_probs": flag("return_attn_probs"),
        "return_lse": flag("return_lse"),
    },
    "flash_attn_varlen_func": VARLEN_ERRORS,
    "flash_attn_with_kvcache": KVCACHE_ERRORS,
    "flash_attn_combine": COMBINE_ERRORS,
    "get_scheduler_metadata": METADATA_ERRORS,
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_every_argument_has_an_error_test(name: str) -> None:
    assert set(ERRORS[name]) == set(inspect.signature(FUNCTIONS[name]).parameters)
    assert all(ERRORS[name].values())


@pytest.mark.parametrize(
    ("name", "bad"),
    [(name, bad) for name, errors in ERRORS.items() for bad in itertools.chain(*errors.values())],
    ids=[
        f"{name}-{argument}-{i}"
        for name, errors in ERRORS.items()
        for argument, cases in errors.items()
        for i in range(len(cases))
    ],
)
def test_bad_argument_is_refused_before_anything_is_written(
    name: str, bad: Bad, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_instead(monkeypatch, lambda *a: pytest.fail("a kernel was launched"))
    for module, launch in ((ops, "run_combine"), (append, "append_on_cpu")):
        monkeypatch.setattr(module, launch, lambda *a: pytest.fail("a kernel was launched"))
    out = {"out": torch.full(OUT_SHAPES[name], NAN)} if name in OUT_SHAPES else {}
    arguments = {**BASES[name], **out, **bad.changes}
    tensors = [t for t in arguments.values() if isinstance(t, torch.Tensor) and not t.is_meta]
    before = [bits(t) for t in tensors]
    with pytest.raises(bad.kind) as error:
        FUNCTIONS[name](**arguments)
    assert type(error.value) is bad.kind
    assert str(error.value).startswith(f"{name}: ")
    assert bad.message in str(error.value)
    assert all(torch.equal(bits(t), b) for t, b in zip(tensors, before, strict=True))
    if out and "out" not in bad.changes and "with out given" not in bad.message:
        with pytest.raises(bad.kind) as without_out:
            FUNCTIONS[name](**{**BASES[name], **bad.changes})
        assert bad.message in str(without_out.value)


@pytest.mark.parametrize(
    "more", [{}, APPEND, {**APPEND, **ROTARY}, {**APPEND, **RAGGED_NEW}, {**APPEND, **PAGED}]
)
def test_appends_of_the_error_tests_are_valid(more: dict[str, Any]) -> None:
    more = {n: t.clone() if "cache" in n else t for n, t in more.items()}
    out = headfold.flash_attn_with_kvcache(**{"q": Q, "k_cache": K.clone(), "v_cache": V.clone(), **more})
    assert not out.isnan().any()


@pytest.mark.parametrize("name", OUT_SHAPES)
def test_base_call_of_the_error_tests_is_valid(name: str) -> None:
    out = torch.full(OUT_SHAPES[name], NAN)
    FUNCTIONS[name](**BASES[name], out=out)
    assert not out.isnan().any()
