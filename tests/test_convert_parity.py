"""`python -m convert.parity` passes on good checkpoints, and names what a broken twin gets wrong."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_python
from convert_cases import UNTIED, random_bundle

import convert
from convert import parity
from convert.__main__ import main as convert_main
from convert.parity import difference, main, parted, row_text
from tinyllm_jax.errors import InputError
from tinyllm_torch.inference import sampling as torch_sampling
from tinyllm_torch.model import attention as torch_attention
from tinyllm_torch.model import kv_cache as torch_cache
from tinyllm_torch.model import rope as torch_rope
from tinyllm_torch.model import transformer as torch_transformer
from tinyllm_torch.training import optim as torch_optim

TWIN_ROWS = {
    *("logits", "loss", "gradients", "AdamW, update 21", "KV cache", "greedy, 8 tokens"),
    *(f"filter: {name}" for name in ("repetition penalty", "temperature", "top-k", "top-p")),
    "filter: all of them",
}
TRANSFORMERS_ROWS = {"transformers: logits", "transformers: greedy, 8"}
LAYERS = {"layer 0", "layer 1"}


@pytest.fixture
def table(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, str], str]]:
    """Give what runs the command: its exit code, "pass" or "FAIL" of every row, and all it prints."""

    def run(*words: object) -> tuple[int, dict[str, str], str]:
        code = main([*(str(word) for word in words), "--tokens", "8"])
        printed = capsys.readouterr().out
        found = re.findall(r"^(.{27}) .* (pass|FAIL)\b", printed, re.MULTILINE)
        return code, {name.strip(): result for name, result in found}, printed

    return run


@pytest.mark.slow
def test_a_trained_run_passes_with_the_moments_it_has(table: Any, trained_run: Path) -> None:
    code, rows, printed = table(trained_run)
    assert code == 0, printed
    assert rows.keys() == TWIN_ROWS | TRANSFORMERS_ROWS | LAYERS
    assert set(rows.values()) == {"pass"}
    assert "float64, on toy stories" in printed
    assert "moments of step 20" in printed


@pytest.mark.slow
def test_its_copies_pass_in_float32_on_a_text(
    table: Any, trained_run: Path, tmp_path: Path
) -> None:
    for name in ("copy.pt", "hf"):
        flags = ["--to", "hf"] if name == "hf" else []
        assert convert_main([str(trained_run), str(tmp_path / name), *flags, "--no-verify"]) == 0
    code, rows, printed = table(
        tmp_path / "copy.pt", "--dtype", "float32", "--prompt", "Once upon a time"
    )
    assert code == 0, printed
    assert "float32, on the prompt" in printed
    text = tmp_path / "text.txt"
    text.write_text("A cat and a dog. " * 20)
    code, rows, printed = table(tmp_path / "hf", "--text", text)
    assert code == 0, printed
    assert "no moments, so AdamW starts at zero" in printed
    assert "AdamW, update 1" in rows
    assert f"on {text}" in printed


@pytest.mark.slow
def test_a_model_without_tokenizer_is_compared_on_random_tokens(
    table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    convert.write(random_bundle(UNTIED), path)
    monkeypatch.setattr(parity, "transformers_side", lambda *_: (None, "left out"))
    code, rows, printed = table(path)
    assert code == 0, printed
    assert "on random tokens" in printed
    assert "left out" in printed
    assert not rows.keys() & TRANSFORMERS_ROWS


# A broken twin ------------------------------------------------------------------------------------


def turned_the_other_way(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch_rope.rotate(x, cos, -sin)


def without_own_slot(positions: torch.Tensor, *, slots: int) -> torch.Tensor:
    return torch_cache.visible_slots((positions - 1).clamp(min=0), slots=slots)


BREAKS = {
    "rope": (
        torch_transformer,
        "rotate",
        turned_the_other_way,
        {"logits", "loss", "gradients", "AdamW, update 21", "KV cache", *LAYERS},
    ),
    "decay mask": (torch_optim, "decays", lambda _: True, {"AdamW, update 21"}),
    "cache": (torch_transformer, "visible_slots", without_own_slot, {"KV cache"}),
    "documents": (
        torch_transformer,
        "segment_mask",
        lambda ids: torch_attention.segment_mask(torch.ones_like(ids)),
        {"logits", "loss", "gradients", "AdamW, update 21"},
    ),
    "top-k": (
        torch_sampling,
        "keep_top_k",
        lambda logits, **_: logits,
        {"filter: top-k", "filter: all of them"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_twin_fails_in_the_right_rows(
    name: str, table: Any, trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, attribute, broken, expected = BREAKS[name]
    monkeypatch.setattr(module, attribute, broken)
    monkeypatch.setattr(parity, "transformers_side", lambda *_: (None, ""))
    code, rows, printed = table(trained_run)
    assert code == 1
    failed = {row for row, result in rows.items() if result == "FAIL"}
    # A wrong number need not change which token is the likeliest.
    assert failed - {"greedy, 8 tokens"} == expected, printed
    assert "docs/parity.md" in printed


def test_the_worst_place_is_named_and_what_is_no_number_fails() -> None:
    expected = {"a": np.array([1.0, 2.0]), "b": np.array([[100.0, -np.inf]])}
    row = difference("gradients", {"a": np.array([1.0, 2.1]), "b": expected["b"]}, expected, 1e-3)
    assert (row.where, row.passed) == ("a", False)
    assert row.absolute == pytest.approx(0.1)
    assert row.relative == pytest.approx(0.05)
    assert difference("gradients", expected, expected, 1e-3).relative == 0
    kept = expected | {"b": np.array([[100.0, 3.0]])}
    assert difference("gradients", kept, expected, 1e-3).absolute == np.inf
    nan = expected | {"a": np.array([1.0, np.nan])}
    row = difference("gradients", nan, expected, 1e-3)
    assert (row.where, row.passed) == ("a", False)


def test_the_largest_absolute_difference_is_shown_though_another_array_has_the_largest_relative_one():
    expected = {"small": np.array([1e-3]), "large": np.array([1e6, 1.0])}
    found = {"small": np.array([1.5e-3]), "large": np.array([1e6 + 8, 1.0])}
    row = difference("gradients", found, expected, 1e-3)
    assert (row.where, row.absolute_at) == ("small", "large")
    assert row.absolute == 8
    assert row.relative == pytest.approx(0.5)
    assert row_text(row).endswith("small (absolute: large)")
    nan = {"small": np.array([np.nan]), "large": found["large"]}
    row = difference("gradients", nan, expected, 1e-3)
    assert np.isnan([row.absolute, row.relative]).all()
    assert (row.where, row.passed) == ("small", False)


def test_texts_that_part_fail_unless_the_two_logits_are_equal() -> None:
    logits = np.zeros((1, 3, 5))
    logits[0, -1] = [0.0, 4.0, 4.0 - 1e-7, 1.0, -8.0]
    compared = [[3, 1, 4], [7, 7], lambda _: logits, 1e-6]
    row = parted("greedy", [3, 2, 2], *compared)
    assert row.passed
    assert row.where == "token 1: 2 instead of 1"
    assert not parted("greedy", [3, 3, 2], *compared).passed
    assert parted("greedy", [3, 1, 4], *compared).absolute == 0


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "nowhere.txt"], "--text nowhere.txt: No such file"),
        (["--text", "latin.txt"], "not UTF-8"),
        (["--prompt", " "], "holds no text"),
        (["--prompt", "x", "--tokenizer", "none"], "--tokenizer PATH"),
        (["--tokens", "0"], "below 1"),
        (["--dtype", "int8"], "invalid choice"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str],
    message: str,
    trained_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=message) as caught:
        main([str(trained_run), *words])
    assert len(str(caught.value).splitlines()) == 1


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    bundle = random_bundle()
    bundle.weights["layers.1.mlp.up_proj.weight"][0, 3] = np.nan
    convert.write(bundle, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"not finite, in layers\.1\.mlp\.up_proj\.weight\."):
        main([str(tmp_path / "model.pt")])


def test_a_missing_torch_is_named_with_what_to_type(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"pip install 'tinyllm\[torch\]'"):
        main([str(trained_run)])


def test_the_command_exits_2_for_what_is_no_checkpoint(tmp_path: Path) -> None:
    result = run_python("-m", "convert.parity", "nowhere", folder=tmp_path, timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith("error: nowhere")
    assert len(result.stderr.splitlines()) == 1
