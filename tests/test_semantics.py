"""docs/semantics.md names a test for every rule, and every test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "semantics.md").read_text()
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", TEXT)))
# The table rows of the interface's specification, by what stands in the first column here.
ITEMS = """signatures; q; k, v; page_table; LSE; softmax_scale; head map; any strides; causal, window; attention_chunk;
softcap; alibi_slopes; learnable_sink; a row that sees no key; flash_attn_combine; paged = dense;
seqused_q, seqused_k, cache_seqlens; k, v given to with_kvcache; rotary; cache_batch_idx; cache_leftpad;
rotary_seqlens; tree_mask; num_splits; max_seqlen_q, max_seqlen_k; tokens_per_split; deterministic, repeatability;
is_causal; attn_mask; is_causal with a mask; causal_lower_right, causal_upper_left; enable_gqa"""


def names_in(path: Path) -> set[str]:
    """The tests at the top of a file, and what it calls a test class."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    return {n for n in names if n.lower().startswith("test")}


@pytest.mark.parametrize(("file", "test"), NAMED, ids=[f"{f}-{t}" for f, t in NAMED])
def test_a_named_test_exists(file: str, test: str) -> None:
    path = ROOT / "tests" / file
    assert path.is_file()
    assert test in names_in(path)


def rows() -> list[list[str]]:
    """The cells of every line of a table whose last column is "held by"."""
    found, inside = [], False
    for line in TEXT.splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells[-1] == "held by":
            inside = True
        elif inside and not set(line) <= set("|- "):
            found.append(cells)
    return found


def test_every_rule_has_a_test() -> None:
    assert len(rows()) > 50
    assert [r[0] for r in rows() if "::" not in r[-1]] == []


def test_every_item_of_the_interface_has_a_rule() -> None:
    items = {r[0] for r in rows()}
    assert {item.strip() for item in ITEMS.split(";")} - items == set()
