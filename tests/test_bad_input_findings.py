"""What the campaign of bad input found, one by one: each was a traceback, or took too long."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_input_kinds import METRICS, STATS, prepared, small_tokenizers
from conftest import run_python

from tinyllm_jax import settings
from tinyllm_jax.cli import LONGEST_LINE, lines_to_show
from tinyllm_jax.config import (
    Config,
    EvaluateConfig,
    EvaluationConfig,
    EvaluationDataConfig,
    config_to_table,
    divisors,
    is_span,
    load_config,
)
from tinyllm_jax.data.chat_records import BadRecord
from tinyllm_jax.data.corpus import Counts
from tinyllm_jax.data.prepare import hash_of, open_prepared
from tinyllm_jax.data.tokenizer import extend_tokenizer, load_tokenizer
from tinyllm_jax.errors import InputError
from tinyllm_jax.evaluation import files, records
from tinyllm_jax.objectives.rewards import load_reward_function, said_by
from tinyllm_jax.training.reports.run import read_run
from tinyllm_jax.training.start import find_folder, find_mode
from tinyllm_jax.training.step_folders import damage, step_folders

TOML = {
    "a number of 5,000 digits": ("train.seed = " + "9" * 5000, "not TOML that can be read"),
    "a longer one in hexadecimal": ("model.hidden_size = 0x" + "f" * 6000, "too large to show"),
    "lists of 3,000 levels": ("train.seed = " + "[" * 3000 + "]" * 3000, "to a depth"),
    "a key of 3,000 parts": (".".join("a" * 3000) + " = 1", "to a depth"),
    "an integer no float holds": ("optimizer.learning_rate = 1" + "0" * 400, "Give a number"),
    "an integer no array holds": ("train.max_steps = 9223372036854775808", "is too large"),
    "a span of 5,000 digits": (f"monitor.skip_batches = ['{'7' * 5000}']", "skip_batches"),
    "a key of 100,000 letters": ("x" * 100_000 + " = 1", "unknown key xxx"),
}


@pytest.mark.parametrize("name", TOML)
def test_settings_that_nobody_can_mean_are_one_line(name: str, tmp_path: Path):
    text, message = TOML[name]
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_config(str(tmp_path / "x.toml"))
    assert len("".join(lines_to_show(str(caught.value)))) < 5000


def test_a_batch_size_without_end_is_answered_at_once(tmp_path: Path):
    assert divisors(2305843009213693951) == [1]
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert not is_span("7" * 5000)
    assert is_span("410-419")


@pytest.mark.parametrize("value", ["5", "['a']", "true", "{a = 1}"])
@pytest.mark.parametrize("key", ["out", "resume", "init_from", "mode"])
def test_names_of_folders_that_are_no_text_wait_for_the_list_of_problems(key, value, tmp_path):
    (tmp_path / "x.toml").write_text(f"run.{key} = {value}")
    assert find_folder(str(tmp_path / "x.toml"), {}) == Path("checkpoints/pretrain_x")


def test_a_number_that_python_cannot_write_is_no_wish_for_a_dry_run(tmp_path: Path):
    from tinyllm_jax.train import wants_dry_run

    for key in ("dry_run", "mode"):
        (tmp_path / f"{key}.toml").write_text(f"run.{key} = 0x" + "f" * 6000)
        assert not wants_dry_run(str(tmp_path / f"{key}.toml"), {})
        assert find_mode(str(tmp_path / f"{key}.toml"), {}) == "pretrain"
    (tmp_path / "x.toml").write_text("run.dry_run = true")
    assert wants_dry_run(str(tmp_path / "x.toml"), {})


def test_a_mode_that_leads_elsewhere_names_no_folder(tmp_path: Path):
    assert find_folder(None, {"run.mode": "../../x"}) == Path("checkpoints/pretrain_tiny")
    with pytest.raises(InputError, match="NUL"):
        find_folder(None, {"run.out": "a\0b"})


def test_a_message_sends_no_commands_to_the_terminal():
    lines = lines_to_show("unknown key \x1b[31mred\udcff é\nsecond " + "x" * 9 * LONGEST_LINE)
    assert lines[0] == "unknown key \\x1b[31mred\\udcff é"
    assert lines[1].startswith("second xxx")
    assert len(lines[1]) < LONGEST_LINE + 10


def test_a_name_that_is_no_text_can_be_printed():
    program = "from tinyllm_jax.cli import run; run(lambda: print('a\\udcffb'))"
    done = run_python("-c", program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "a\\udcffb\n", "")


def test_a_label_of_5000_digits_is_a_bad_record():
    with pytest.raises(BadRecord, match="'label'"):
        records.question_of({"goal": "a", "sol1": "b", "sol2": "c", "label": "9" * 5000})
    assert records.question_of({"goal": "a", "sol1": "b", "sol2": "c", "label": "1"}).gold == 1


def test_a_label_is_a_letter_and_labels_are_a_list():
    record = {"question": "a", "choices": ["b", "c"]}
    with pytest.raises(BadRecord, match="there are 2 answers"):
        records.question_of({**record, "answer": "ﬁ"})  # as a capital it has two letters
    assert records.question_of({**record, "answer": "b"}).gold == 0
    assert records.question_of({**record, "answer": "B"}).gold == 1
    with pytest.raises(BadRecord, match="are no list"):
        records.question_of({**record, "choices": {"text": ["b", "c"], "label": 0.5}, "answer": 0})


def test_parquet_with_damaged_pages_is_one_line(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.table({"good": ["It is. " * 99] * 9, "bad": ["It are. " * 99] * 9}), out)
    content = bytearray(out.getvalue())
    content[30:60] = b"\xff" * 30
    (tmp_path / "x.parquet").write_bytes(content)
    config = EvaluateConfig(
        evaluate=EvaluationConfig(kind="pairs"),
        data=EvaluationDataConfig(paths=(str(tmp_path / "x.parquet"),)),
    )
    (found,) = files.find_data_sets(config, say=print)
    with pytest.raises(InputError, match="not parquet, or damaged"):
        list(files.read(found, config, Counts(), records.pair_of))


# --- tokenizers ---


def changed_json(tmp_path: Path, **changes: Any) -> Path:
    table = json.loads(small_tokenizers()["json"].to_bytes()) | changes
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(table))
    return path


def charsmap(packed: str) -> dict[str, Any]:
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": packed}}


WORDS = {"type": "WordLevel", "vocab": {"a": 0, "<s>": 1, "</s>": 2}, "unk_token": "z"}


def test_a_vocabulary_without_its_unknown_word_is_one_line(tmp_path: Path):
    path = changed_json(tmp_path, model=WORDS, added_tokens=[])
    with pytest.raises(InputError, match="contradicts itself .*UNK"):
        load_tokenizer(path).encode("never seen")


def test_a_regular_expression_without_end_is_one_line(tmp_path: Path):
    pattern = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Removed"}
    path = changed_json(tmp_path, pre_tokenizer={**pattern, "invert": False})
    with pytest.raises(InputError, match="contradicts itself .*retry-limit"):
        load_tokenizer(path).encode("x" * 40)


@pytest.mark.parametrize("packed", ["/////////w==", "AAAAAA==", "BAAAAA==", "no base64"])
def test_a_map_larger_than_its_file_is_refused_before_memory_is_asked_for(packed, tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer\.json that"):
        load_tokenizer(changed_json(tmp_path, **charsmap(packed)))


def test_a_tokenizer_without_tokens_is_one_line(tmp_path: Path):
    model = {"type": "BPE", "vocab": {}, "merges": []}
    with pytest.raises(InputError, match="no tokens that begin and end"):
        load_tokenizer(changed_json(tmp_path, model=model, added_tokens=[]))


def test_vocabularies_that_are_lists_can_be_extended(tmp_path: Path):
    model = {"type": "Unigram", "unk_id": 0, "vocab": [["<s>", 0.0], ["</s>", -1.0]]}
    path = changed_json(tmp_path, model={**model, "byte_fallback": False}, added_tokens=[])
    assert extend_tokenizer(load_tokenizer(path), ("<new>",)).control_id("<new>") == 2


def test_sentencepiece_that_complains_in_broken_text_is_one_line(tmp_path: Path):
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(small_tokenizers()["model"].to_bytes())
    proto.pieces.add().CopyFrom(proto.pieces[290])
    proto.pieces[290].piece = proto.pieces[-1].piece = "QQ"
    content = proto.SerializeToString().replace(b"QQ", b"\xff\x80")
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(InputError, match="neither a SentencePiece model"):
        load_tokenizer(tmp_path / "tokenizer.model")


def test_sentencepiece_pieces_that_are_no_text_are_one_line(tmp_path: Path):
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(small_tokenizers()["model"].to_bytes())
    proto.pieces[290].piece = "QQ"
    content = proto.SerializeToString().replace(b"QQ", b"\xff\x80")
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(InputError, match="is no text"):
        load_tokenizer(tmp_path / "tokenizer.model")


# --- what runs leave behind ---


def a_run(folder: Path, **contents: str) -> Path:
    (folder / "training_config_snapshot.json").write_text(json.dumps(config_to_table(Config())))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    for name, content in contents.items():
        (folder / {"stats": "dataset_stats.json", "starts": "environment.json",
                   "config": "training_config_snapshot.json"}.get(name, f"{name}.jsonl")).write_text(content)  # fmt: skip
    return folder


DEEP = "[" * 960 + "]" * 960
STARTED = {"time": 1.6e9, "step": 0}
RUNS = {
    "rows too deep": {"metrics": f'{{"kind": "sample", "step": 1, "text": {DEEP}}}\n'},
    "rows deeper still": {"metrics": "[" * 100_000 + "\n"},
    "settings too deep": {"config": "[" * 100_000},
    "settings rather deep": {"config": f'{{"a": {DEEP}}}'},
    "stats too deep": {"stats": "[" * 100_000},
    "splits are text": {"stats": json.dumps({**STATS, "splits": "x"})},
    "a split is a number": {"stats": json.dumps({**STATS, "splits": {"train": 1.5}})},
    "files are numbers": {"stats": json.dumps({**STATS, "files": [True]})},
    "a hash is a list": {"stats": json.dumps({**STATS, "tokenizer_hash": []})},
    "starts too deep": {"starts": "[" * 100_000},
    "starts after the end of time": {"starts": json.dumps({"starts": [{**STARTED, "time": 1e300}]})},
    "started at an infinite step": {"starts": '{"starts": [{"time": 1, "step": 1e999}]}'},
    "a preset is a number": {"starts": json.dumps({"starts": [{**STARTED, "preset_settings": 3}]})},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_folder_with_a_broken_file_is_one_line(name: str, tmp_path: Path):
    assert read_run(a_run(tmp_path)).step == 2
    with pytest.raises(InputError, match=r"\.jsonl?:"):
        read_run(a_run(tmp_path, **RUNS[name]))


def test_checksums_too_deep_are_damage_and_no_digit_names_another_step(tmp_path: Path):
    (tmp_path / "checksums.json").write_text("[" * 100_000)
    assert "cannot be read" in str(damage(tmp_path))
    for name in ("²", "7"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [step for step, _ in step_folders(tmp_path)] == [7]


MANIFESTS = {
    "no tokenizer": lambda table: table.pop("tokenizer_file"),
    "a tokenizer of lists": lambda table: table.update(tokenizer_file=[]),
    "sources of lists": lambda table: table.update(sources=[[]]),
    "stats of text": lambda table: table.update(stats="x"),
    "a shard without a name": lambda table: table["shards"][0].pop("name"),
    "bytes as text": lambda table: table["shards"][0].update(text_bytes="x"),
    "no split": lambda table: table["stats"]["splits"].pop("train"),
    "another name": lambda table: table["shards"][0].update(name="{question}"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_is_none_is_one_line(name: str, tmp_path: Path):
    data, contents = prepared()
    table = json.loads(contents["manifest.json"])
    table.pop("checksum")
    MANIFESTS[name](table)
    table["checksum"] = hash_of(table)
    for file, content in contents.items():
        (tmp_path / file).write_bytes(content)
    open_prepared(tmp_path, data, left_out_files=[])
    (tmp_path / "manifest.json").write_text(json.dumps(table))
    with pytest.raises(InputError, match="run again"):
        open_prepared(tmp_path, data, left_out_files=[])


def test_a_manifest_from_before_learnt_tokens_is_read(tmp_path: Path):
    data, contents = prepared()
    table = json.loads(contents["manifest.json"])
    table.pop("checksum")
    for shard in table["shards"]:
        shard.pop("learnt_tokens")
    for file, content in contents.items():
        (tmp_path / file).write_bytes(content)
    (tmp_path / "manifest.json").write_text(json.dumps(table))
    assert open_prepared(tmp_path, data, left_out_files=[]).train.documents > 0


@pytest.mark.parametrize("meta", ["{}", "[1]", "[" * 100_000, '{"format": 1}', None])
def test_a_checkpoint_with_right_sums_of_something_else_is_one_line(meta, run_copy: Path):
    from tinyllm_jax.data.files import sha256_of_file
    from tinyllm_jax.training.checkpoint import open_to_resume

    folder = run_copy / "checkpoints" / "20"
    (folder / "meta.json").unlink()
    if meta is not None:
        (folder / "meta.json").write_text(meta)
    sums = json.loads((folder / "checksums.json").read_text())
    sums.pop("meta.json")
    if meta is not None:
        sums["meta.json"] = sha256_of_file(folder / "meta.json")
    (folder / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(InputError, match="no checkpoint that this version writes"):
        open_to_resume(folder, on_damaged=print)


# --- rewards ---


def test_a_reward_that_leaves_does_not_end_training_silently(tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)")
    with pytest.raises(InputError, match="SystemExit: 0"):
        load_reward_function("leaves:f")


def test_an_exception_that_cannot_be_written_is_named():
    class Odd(Exception):  # noqa: N818 (a person's own)
        def __str__(self) -> str:
            raise ValueError

    assert said_by(Odd()) == "Odd"
    assert said_by(KeyError("a\nb")) == "KeyError: 'a\\nb'"


def test_a_setting_is_written_as_far_as_a_person_reads():
    assert settings.as_text("x" * 400) == "x" * settings.LONGEST_SHOWN + "..."
    assert settings.as_text(np.float64(0.5)) == "0.5"


def test_a_step_folder_whose_sums_know_of_no_metadata_is_one_line(tmp_path: Path):
    import convert
    from convert.formats import orbax

    (tmp_path / "checksums.json").write_text("{}")
    with pytest.raises(InputError, match="no checkpoint that this version writes"):
        orbax.read(tmp_path, say=print)
    with pytest.raises(InputError, match="no checkpoint that this version writes"):
        convert.read(tmp_path)
