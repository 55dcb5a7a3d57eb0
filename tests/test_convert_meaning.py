"""`convert` keeps what a checkpoint means: padding, tokenizer and where its run stands."""

import dataclasses
import hashlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from convert_cases import (
    GROUPED,
    assert_same_weights,
    changed,
    random_bundle,
    with_training,
)

import convert
from convert import conversion
from convert.__main__ import main
from convert.llama2c_run import SCHEDULE_NOTE, llama2c_settings
from convert.tokenizer_files import build_sentencepiece, pieces_of, tokenizer_bin
from tinyllm_jax.config import TokenizerConfig, config_from_table, config_to_table
from tinyllm_jax.data.tokenizer import Tokenizer, train_tokenizer
from tinyllm_jax.data.toy_stories import generate_stories
from tinyllm_jax.errors import InputError


@pytest.fixture(scope="module")
def bytelevel() -> Tokenizer:
    stories = list(generate_stories(seed=1, start=0, stop=200))
    return train_tokenizer(stories, config=TokenizerConfig(kind="bytelevel"), vocab_size=300)


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    stories = list(generate_stories(seed=1, start=0, stop=200))
    return train_tokenizer(stories, config=TokenizerConfig(kind="sentencepiece"), vocab_size=330)


def padded(tokenizer: Tokenizer, *, rows: int = 2) -> convert.Bundle:
    """Give a model with more rows than its tokenizer has tokens."""
    config = changed(GROUPED, vocab_size=tokenizer.vocab_size + rows)
    return random_bundle(config, tokenizer=tokenizer)


def one_line(caught: pytest.ExceptionInfo[InputError]) -> str:
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    return message


# More rows than tokens ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sentencepiece", "bytelevel"])
def test_an_embedding_padded_beyond_its_tokenizer_goes_through_every_format_that_holds_it(
    kind, request, tmp_path, capsys
):
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    expected = padded(tokenizer)
    convert.write(expected, tmp_path / "hf", to="hf")
    for name, to in (("run", "orbax"), ("x.pt", "torch"), ("x", "safetensors"),
                     ("x.safetensors", "safetensors"), ("back", "hf")):  # fmt: skip
        assert main([str(tmp_path / "hf"), str(tmp_path / name), "--to", to]) == 0
        found = convert.read(tmp_path / name)
        assert_same_weights(found.weights, expected.weights)
        assert found.tokenizer is not None
        assert found.tokenizer.hash == tokenizer.hash
    assert f"{tokenizer.vocab_size} tokens and the embedding" in capsys.readouterr().out
    other = random_bundle(
        changed(GROUPED, vocab_size=tokenizer.vocab_size - 1), tokenizer=tokenizer
    )
    convert.write(other, tmp_path / "smaller.pt")
    with pytest.raises(InputError, match="smaller.pt: the tokenizer has"):
        convert.read(tmp_path / "smaller.pt")


@pytest.mark.parametrize("package", ["tinyllm_jax", "tinyllm_torch"])
def test_a_row_without_a_token_is_never_picked(package, sentencepiece, tmp_path):
    bundle = padded(sentencepiece, rows=50)
    table = bundle.weights["embed_tokens.weight"]
    table[-50:] = 3 * table[:50]  # the likeliest by far
    convert.write(bundle, tmp_path / "x.pt")
    model = importlib.import_module(package).load(tmp_path / "x.pt")
    for greedy in (True, False):
        (story,) = model.generate("Once", max_new_tokens=40, temperature=2.0, greedy=greedy)
        assert story.startswith("Once")


@pytest.mark.slow
def test_llama2c_refuses_more_rows_than_pieces_before_it_writes(tmp_path, sentencepiece, bytelevel):
    convert.write(padded(sentencepiece), tmp_path / "hf", to="hf")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="330 tokens and the embedding 332 rows") as caught:
        main([str(tmp_path / "hf"), str(tmp_path / "x.bin")])
    assert "partial" not in one_line(caught)
    assert sorted(tmp_path.rglob("*")) == before
    assert main([str(tmp_path / "hf"), str(tmp_path / "x.bin"), "--tokenizer", "none"]) == 0
    convert.write(padded(bytelevel), tmp_path / "level.pt")
    assert main([str(tmp_path / "level.pt"), str(tmp_path / "level.bin")]) == 0


# What is compared after writing -------------------------------------------------------------------


@pytest.fixture
def source(tmp_path, sentencepiece) -> Path:
    config = changed(GROUPED, vocab_size=sentencepiece.vocab_size)
    convert.write(with_training(random_bundle(config, tokenizer=sentencepiece)), tmp_path / "x.pt")
    return tmp_path / "x.pt"


def other_tokenizer(bundle: convert.Bundle) -> None:
    tokenizer: Any = bundle.tokenizer
    pieces = pieces_of(tokenizer)
    pieces[-1], pieces[-2] = pieces[-2], pieces[-1]
    bundle.tokenizer = build_sentencepiece(pieces, space_first=True, origin="test")


def no_tokenizer(bundle: convert.Bundle) -> None:
    bundle.tokenizer = None


def other_training(**fields: Any):
    def change(bundle: convert.Bundle) -> None:
        assert bundle.training is not None
        bundle.training = dataclasses.replace(bundle.training, **fields)

    return change


def other_settings(bundle: convert.Bundle) -> None:
    assert bundle.training is not None
    table = config_to_table(bundle.training.config)
    table["optimizer"]["learning_rate"] = 0.125
    other_training(config=config_from_table(table, origin="test"))(bundle)


CHANGES = {
    "step": (other_training(step=12), "step=11 became 12"),
    "best": (other_training(best={"step": 10, "loss": 2.5}), "best.loss=1.5 became 2.5"),
    "settings": (other_settings, "optimizer.learning_rate=0.0005 became 0.125"),
    "another tokenizer": (other_tokenizer, "the tokenizer is another file"),
    "no tokenizer": (no_tokenizer, "the tokenizer is gone"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_run_goes_on_from_is_compared(name, source, tmp_path, monkeypatch):
    change, message = CHANGES[name]
    write = conversion.safetensors.write

    def broken(bundle: convert.Bundle, path: Path) -> None:
        other = dataclasses.replace(bundle)
        change(other)
        write(other, path)

    monkeypatch.setattr(conversion.safetensors, "write", broken)
    with pytest.raises(InputError, match=message) as caught:
        main([str(source), str(tmp_path / "y.safetensors")])
    assert "partial" not in one_line(caught)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize("target", ["y.bin", "hf"])
def test_ids_are_compared_where_a_format_keeps_no_bytes(target, source, tmp_path, monkeypatch):
    if target == "hf":
        monkeypatch.setattr(
            conversion.huggingface,
            "write_hugging_face_tokenizer",
            lambda tokenizer, path, **_: [swapped(tokenizer).save(path)][:0],
        )
    else:
        monkeypatch.setattr(
            conversion.llama2c, "tokenizer_bin", lambda tokenizer: tokenizer_bin(swapped(tokenizer))
        )
    with pytest.raises(InputError, match="the tokenizer gives other ids for"):
        main([str(source), str(tmp_path / target), *(["--to", "hf"] if target == "hf" else [])])
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def swapped(tokenizer: Any) -> Any:
    bundle = random_bundle(tokenizer=tokenizer)
    other_tokenizer(bundle)
    return bundle.tokenizer


@pytest.mark.parametrize(
    "meta",
    ["{}", "[]", "3", '{"format": 1, "config": {"model": 3}}', '{"format": 1, "config": []}'],
)
def test_a_run_folder_of_other_hands_is_one_line(meta, source, tmp_path):
    convert.write(convert.read(source), tmp_path / "run", to="orbax")
    folder = tmp_path / "run/checkpoints/11"
    (folder / "meta.json").write_text(meta)
    sums = json.loads((folder / "checksums.json").read_text())
    sums["meta.json"] = hashlib.sha256(meta.encode()).hexdigest()
    (folder / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(InputError, match="no checkpoint that this version writes") as caught:
        convert.read(tmp_path / "run")
    one_line(caught)


def test_a_copy_that_cannot_be_read_names_the_target(source, tmp_path, monkeypatch):
    def cut(bundle: convert.Bundle, path: Path) -> None:
        path.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{")

    monkeypatch.setattr(conversion.safetensors, "write", cut)
    with pytest.raises(InputError, match="what was written cannot be read back: ") as caught:
        main([str(source), str(tmp_path / "y.safetensors")])
    assert str(tmp_path / "y.safetensors") in one_line(caught)
    assert "partial" not in one_line(caught)


# Runs of llama2.c ---------------------------------------------------------------------------------

LLAMA2C_RUN = {
    "max_seq_len": 64, "dropout": 0.1, "decay_lr": True, "warmup_iters": 7, "max_iters": 90,
    "learning_rate": 1e-3, "batch_size": 8, "gradient_accumulation_steps": 4, "eval_iters": 20,
    "compile": True, "device": "cuda",
}  # fmt: skip


def test_a_run_of_llama2c_keeps_its_rows_dropout_and_schedule():
    found, notes = llama2c_settings(LLAMA2C_RUN, GROUPED)
    assert found["data"] == {"sequence_length": 64}
    assert found["model"] == {
        "embedding_dropout": 0.1, "attention_dropout": 0.1, "residual_dropout": 0.1,
    }  # fmt: skip
    assert found["optimizer"]["warmup_steps"] == 7
    assert found["optimizer"]["min_learning_rate"] == 0.0
    assert found["train"]["eval_batches"] == 20
    assert notes == [SCHEDULE_NOTE]


def test_a_run_of_llama2c_without_decay_has_one_learning_rate():
    from tinyllm_jax.training.optim import learning_rate_schedule

    found, notes = llama2c_settings(LLAMA2C_RUN | {"decay_lr": False}, GROUPED)
    assert notes == []
    schedule = learning_rate_schedule(config_from_table(found, origin="test"))
    rates = [float(schedule(update)) for update in (1, 3, 50, 90, 200)]
    assert rates == pytest.approx([1e-3] * 5)


def test_the_benchmark_runs_from_anywhere(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/conversion.py"), "--help"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
