"""Ahead-of-time compilation of a model's kernels: what is read of its config, and a cache that is complete."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from headfold import backends, precompile
from headfold.planner import DEVICES
from headfold.precompile import Model, read_model

LLAMA = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
}


def config_file(folder: Path, **change: Any) -> Path:
    """A config.json with some keys changed; None takes one away."""
    config = {k: v for k, v in {**LLAMA, **change}.items() if v is not None}
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def test_a_config_is_read_as_hubs_publish_it(tmp_path: Path) -> None:
    """head_dim follows from hidden_size, or is given."""
    assert read_model(config_file(tmp_path)) == Model(32, 8, 128, 128, torch.bfloat16, rotary_dim=128)
    read = read_model(
        config_file(
            tmp_path,
            head_dim=64,
            v_head_dim=32,
            dtype="float16",
            partial_rotary_factor=0.5,
            attn_logit_softcapping=50.0,
            model_type="gpt_oss",
            sliding_window=128,
        )
    )
    assert read == Model(32, 8, 64, 32, torch.float16, rotary_dim=32, softcap=50.0, sinks=True, window=128)
    assert read_model(config_file(tmp_path, sliding_window=4096, use_sliding_window=False)).window == 0


def test_no_kv_heads_means_as_many_as_heads(tmp_path: Path) -> None:
    """Multi-head models leave the key out."""
    assert read_model(config_file(tmp_path, num_key_value_heads=None)).num_kv_heads == 32


def test_the_text_part_of_a_larger_model_is_read(tmp_path: Path) -> None:
    """Models that see and hear hold it apart."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"text_config": LLAMA, "vision_config": {}}))
    assert read_model(path).num_heads == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": None}, "num_attention_heads None"),
        ({"num_key_value_heads": 5}, "num_key_value_heads 5"),
        ({"num_key_value_heads": 0}, "num_key_value_heads 0"),
        ({"head_dim": 512}, "head_dim 512"),
        ({"torch_dtype": "int8"}, "dtype 'int8'"),
        ({"hidden_size": "wide"}, "hidden_size 'wide'"),
        ({"sliding_window": 0}, "sliding_window 0"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """With the key and what it holds."""
    with pytest.raises(ValueError, match=message):
        read_model(config_file(tmp_path, **change))


def test_a_file_that_is_no_config_is_refused(tmp_path: Path) -> None:
    """Missing, not JSON, not an object."""
    with pytest.raises(ValueError, match="no readable JSON"):
        read_model(tmp_path / "nothing.json")
    path = tmp_path / "config.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match="holds a list"):
        read_model(path)


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    """With those that are known."""
    with pytest.raises(ValueError, match=r"'sm_10'.*sm_90"):
        precompile.device_of_arch("sm_10")


def test_calls_hold_no_memory_and_pass_the_checks() -> None:
    """They are calls that the public functions would make."""
    from headfold.features import check_features
    from headfold.problem import check

    model = Model(8, 2, 64, 64, torch.bfloat16, rotary_dim=64, sinks=True)
    calls = list(precompile.calls_of(model))
    assert {x.q.device.type for x in calls} == {"meta"}
    for x in calls[:12]:
        check(x)
        check_features(x)
    assert len(list(precompile.appends_of(model))) > 0


def test_layers_with_a_window_are_compiled_beside_those_without() -> None:
    """A narrow one has tiles of its own on a Hopper GPU."""
    with backends.force(DEVICES["h200"]):
        plans = {
            window: [
                backends.plan_of(x)[1]
                for x in precompile.calls_of(Model(32, 8, 128, 128, torch.bfloat16, window=window))
            ]
            for window in (0, 128)
        }
    assert len(plans[128]) == 2 * len(plans[0])
    rows = {
        window: {plan.block_m for plan in found if plan.backend == "hopper" and plan.kernel == "prefill"}
        for window, found in plans.items()
    }
    assert 64 not in rows[0]
    assert 64 in rows[128]


@pytest.mark.parametrize(
    ("device", "more", "count"),
    [("h200", {}, 1), ("h200", {"sinks": True}, 0), ("h200", {"softcap": 50.0}, 0), ("a100", {}, 0)],
    ids=str,
)
def test_shared_prefixes_are_compiled_where_they_have_programs_of_their_own(
    device: str, more: dict[str, Any], count: int
) -> None:
    model = Model(32, 8, 128, 128, torch.bfloat16, **more)
    with backends.force(DEVICES[device]):
        assert len(list(precompile._shared_prefixes(model))) == count


def test_steps_of_a_hopper_gpu_append_in_the_attentions_launch() -> None:
    """Dense and paged, rotated and not, with features and without; other GPUs have a launch for each."""
    from headfold import appending

    for device, sinks in (("h200", True), ("h200", False), ("a100", True)):
        model = Model(8, 2, 64, 64, torch.bfloat16, rotary_dim=64, sinks=sinks)
        with backends.force(DEVICES[device]):
            inside = [(x.batch, appending.plan_of(x) is not None) for x in precompile.steps_of(model)]
        assert len(inside) == 4 * len(precompile.BATCHES)
        for batch, one in inside:
            assert one == (device == "h200"), batch


COMPILE = """
import json, sys, torch
from pathlib import Path
from headfold import precompile
precompile.QUERIES, precompile.BATCHES, precompile.KEYS = (1, 512), (16,), (1024,)
model = precompile.Model(8, 2, 64, 64, torch.bfloat16, rotary_dim=0)
done = []
n = precompile.precompile(model, "sm_90", Path(sys.argv[1]), done.append)
print(json.dumps([n, done]))
"""


def compile_into(folder: Path) -> tuple[int, list[str]]:
    """In a process without the interpreter."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, str(folder)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return tuple(json.loads(run.stdout))  # type: ignore[return-value]


def kernels_in(folder: Path) -> dict[Path, int]:
    """Every file and when it was written; a C module that this machine cannot load is built anew."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.suffix != ".so")
    return {p.relative_to(folder): p.stat().st_mtime_ns for p in files}


def test_a_second_compilation_finds_every_kernel(tmp_path: Path) -> None:
    """The same number of kernels, and nothing new on disk: what a first call in production will find."""
    first, names = compile_into(tmp_path / "cache")
    kept = kernels_in(tmp_path)
    assert first == len(names) == sum(p.suffix == ".cubin" for p in kept)
    assert {
        "decode_kernel",
        "prefill_kernel",
        "append_kernel",
        "hopper_pair_kernel",
        "pair_merge_kernel",
    } <= set(names)
    assert compile_into(tmp_path / "cache")[0] == first
    assert kernels_in(tmp_path) == kept
