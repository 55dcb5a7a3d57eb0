"""Prepared data holds every document once, is made once, and is never stale, torn or half done."""

import dataclasses
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import run_python

from tinyllm_jax.config import Config, DataConfig, ModelConfig, TokenizerConfig
from tinyllm_jax.data import prepare as module
from tinyllm_jax.data.batches import Batches
from tinyllm_jax.data.corpus import Part, split_of
from tinyllm_jax.data.groups import plan_groups, start_worker
from tinyllm_jax.data.prepare import PreparedData, prepare
from tinyllm_jax.data.shards import Split
from tinyllm_jax.errors import InputError

WORDS = [
    "the",
    "a",
    "dog",
    "cat",
    "bird",
    "tree",
    "ball",
    "park",
    "was",
    "saw",
    "ran",
    "Tim",
    "and",
]
PACKINGS = ["stream", "padded", "packed"]


def make_stories(count: int, *, seed: int = 0) -> list[str]:
    """Make stories of 5 to 60 words, each of its own."""
    pick = random.Random(seed)
    return [
        f"Story {seed}.{number}: " + " ".join(pick.choices(WORDS, k=pick.randint(5, 60))) + ".\n▁😀"
        for number in range(count)
    ]


def write_jsonl(path: Path, stories: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    return path


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "data"
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(folder))
    return folder


@pytest.fixture
def stories_file(tmp_path) -> Path:
    return write_jsonl(tmp_path / "stories.jsonl", make_stories(200))


@pytest.fixture
def small_groups(monkeypatch) -> None:
    """Cut corpora into several groups, as only large ones are."""
    monkeypatch.setattr(module, "GROUP_BYTES", 8000)


def make_config(*paths: Path, tokenizer: TokenizerConfig | None = None, **data) -> Config:
    given = {"validation_fraction": 0.2, "sequence_length": 32, "workers": 1} | data
    return Config(
        model=ModelConfig(vocab_size=320),
        tokenizer=tokenizer or TokenizerConfig(),
        data=DataConfig(paths=tuple(map(str, paths)), **given),
    )


def run(*paths: Path, **settings) -> PreparedData:
    return prepare(make_config(*paths, **settings), progress=False)


def documents_of(split: Split, prepared: PreparedData) -> list[str]:
    """Read the documents back out of the shards, in alphabetical order."""
    tokenizer, found = prepared.tokenizer, []
    for shard in split.shards:
        if split.packing == "stream":
            lines = [shard.tokens]
        elif split.packing == "padded":
            assert shard.lengths is not None
            lines = [row[:n] for row, n in zip(shard.tokens, shard.lengths, strict=True)]
        else:
            assert shard.segments is not None
            lines = [
                row[segments == number]
                for row, segments in zip(shard.tokens, shard.segments, strict=True)
                for number in range(1, segments.max() + 1)
            ]
        for line in lines:
            starts = np.flatnonzero(line == tokenizer.bos_id)
            assert line[0] == tokenizer.bos_id
            assert line[-1] == tokenizer.eos_id
            for start, stop in zip(starts, [*starts[1:], len(line)], strict=True):
                assert line[stop - 1] == tokenizer.eos_id
                found.append(tokenizer.decode(line[start:stop]))
    return sorted(found)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", ["sentencepiece", "bytelevel"])
def test_every_document_is_in_exactly_one_split_and_comes_back(stories_file, packing, kind):
    prepared = run(
        stories_file,
        packing=packing,
        sequence_length=800,
        tokenizer=TokenizerConfig(kind=kind),
    )
    train = documents_of(prepared.train, prepared)
    validation = documents_of(prepared.validation, prepared)
    assert sorted(train + validation) == sorted(make_stories(200))
    assert 20 < len(validation) < 60
    assert (prepared.train.documents, prepared.validation.documents) == (
        len(train),
        len(validation),
    )
    assert prepared.train.text_bytes == sum(len(text.encode()) for text in train)
    assert not [path for path in prepared.folder.iterdir() if path.name.startswith(".")]


def test_small_files_share_shards(tmp_path):
    for number, story in enumerate(make_stories(60)):
        write_jsonl(tmp_path / "many" / f"{number:02d}.jsonl", [story])
    prepared = run(tmp_path / "many")
    assert len(prepared.train.shards) == len(prepared.validation.shards) == 1
    found = documents_of(prepared.train, prepared) + documents_of(prepared.validation, prepared)
    assert sorted(found) == sorted(make_stories(60))
    assert len(prepared.stats["files"]) == 60


def test_validation_files_are_taken_whole_and_never_trained_on(tmp_path):
    train, held_out = make_stories(60), make_stories(30, seed=1)
    unseen = [story.replace("Story", "Ŝŧōřÿ") for story in held_out]
    prepared = run(
        write_jsonl(tmp_path / "a.jsonl", train),
        validation_paths=(str(write_jsonl(tmp_path / "b.jsonl", unseen)),),
        tokenizer=TokenizerConfig(character_coverage=1.0),
    )
    assert documents_of(prepared.train, prepared) == sorted(train)
    assert documents_of(prepared.validation, prepared) == sorted(unseen)
    # A character that only validation has got no token of its own, so training never saw it.
    assert len(prepared.tokenizer.encode("ŧ")) == 3


def test_toy_stories_need_no_files():
    prepared = run(Path("toy"), toy_documents=200)
    assert prepared.train.documents + prepared.validation.documents == 200
    assert [file["path"] for file in prepared.stats["files"]] == ["toy"]
    assert prepared.folder != run(Path("toy"), toy_documents=200, toy_seed=1).folder
    more = run(Path("toy"), toy_documents=300)
    assert more.train.documents + more.validation.documents == 300


def test_another_story_grammar_makes_a_new_set(monkeypatch):
    first = run(Path("toy"), toy_documents=200)
    monkeypatch.setattr(module.toy_stories, "corpus_hash", lambda: "another")
    assert run(Path("toy"), toy_documents=200).folder != first.folder


def test_a_finished_set_is_used_again(stories_file):
    first = run(stories_file)
    before = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    again = run(stories_file, workers=2)
    assert again.folder == first.folder
    assert {path: path.stat().st_mtime_ns for path in again.folder.iterdir()} == before
    assert again.dataset_hash == first.dataset_hash


CHANGES = [
    ("text_field", "story"),
    ("min_document_characters", 90),
    ("on_bad_record", "skip"),
    ("validation_fraction", 0.3),
    ("packing", "stream"),
    ("sequence_length", 40),
    ("long_documents", "truncate"),
    ("document_separator", "###"),
]


@pytest.mark.parametrize(("name", "value"), CHANGES)
def test_a_changed_setting_makes_a_new_set(tmp_path, name, value):
    rows = [{"text": text, "story": text[:60]} for text in make_stories(200)]
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"packing": "packed", "validation_fraction": 0.2}
    assert run(path, **given).folder != run(path, **(given | {name: value})).folder


def test_settings_that_change_no_shard_share_the_set(stories_file):
    first = run(stories_file)
    assert run(stories_file, workers=2, long_documents="truncate").folder == first.folder
    longer = run(stories_file, sequence_length=64)
    assert longer.folder == first.folder
    batch = Batches(longer.train, rows_per_step=2, seed=0).batch(0)
    assert batch.tokens.shape == (2, 64)


def test_a_changed_file_or_tokenizer_makes_a_new_set(stories_file):
    first = run(stories_file)
    other = run(stories_file, tokenizer=TokenizerConfig(kind="bytelevel"))
    assert other.folder != first.folder
    os.utime(stories_file, ns=(0, 1))
    assert run(stories_file).folder != first.folder
    with stories_file.open("a") as file:
        file.write(json.dumps({"text": "One more story, about a fox."}) + "\n")
    changed = run(stories_file)
    assert changed.train.documents + changed.validation.documents == 201


def test_the_dataset_hash_knows_content_and_not_names(tmp_path):
    stories = make_stories(200)
    one = run(write_jsonl(tmp_path / "one/a.jsonl", stories), packing="packed")
    two = run(write_jsonl(tmp_path / "two/b.jsonl", stories), packing="packed")
    assert one.folder != two.folder
    assert one.dataset_hash == two.dataset_hash
    assert one.tokenizer.hash == two.tokenizer.hash
    three = run(write_jsonl(tmp_path / "two/b.jsonl", stories[1:]), packing="packed")
    assert three.dataset_hash != one.dataset_hash


@pytest.mark.parametrize("packing", ["stream", "packed"])
def test_any_number_of_workers_writes_the_same_bytes(stories_file, small_groups, packing):
    alone = run(stories_file, packing=packing)
    before = contents(alone.folder)
    assert len(alone.train.shards) > 2
    shutil.rmtree(alone.folder)
    together = run(stories_file, packing=packing, workers=2)
    assert together.folder == alone.folder
    assert contents(together.folder) == before


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, small_groups):
    path = write_jsonl(tmp_path / "more.jsonl", make_stories(400))
    prepared = run(path)
    before = contents(prepared.folder)
    (prepared.folder / "manifest.json").unlink()
    (prepared.folder / "00001.json").unlink()
    (prepared.folder / "00002.train.npy").write_bytes(b"half a shard")
    (prepared.folder / ".00003.train.npy.1.tmp").write_bytes(b"of a killed run")
    (prepared.folder / "00003.json").write_bytes(before["00003.json"][:-9])
    flipped = before["00004.train.npy"]
    (prepared.folder / "00004.train.npy").write_bytes(flipped[:-1] + bytes([flipped[-1] ^ 1]))
    done = (prepared.folder / "00000.train.npy").stat().st_mtime_ns
    again = run(path)
    assert contents(again.folder) == before
    assert (again.folder / "00000.train.npy").stat().st_mtime_ns == done


def test_groups_are_of_one_split_and_none_is_small_beside_others():
    sizes = [900, 200, 950, 700, 400, 1000, 60]
    parts = [
        Part(split, f"{number}.txt", 0, size, size)
        for number, size in enumerate(sizes)
        for split in ("train", "validation")
    ]
    groups = plan_groups(parts, group_bytes=1000)
    for split in ("train", "validation"):
        own = [group for group in groups if {part.split for part in group.parts} == {split}]
        joined = [part for group in own for part in group.parts]
        assert joined == [part for part in parts if part.split == split]
        assert len(own) == 4
        assert min(group.bytes for group in own) >= 500
    assert [group.name for group in groups] == [f"{number:05d}" for number in range(8)]
    (alone,) = plan_groups(parts[2:3], group_bytes=1000)
    assert alone.bytes == 200


def test_tokens_of_a_stream_shorter_than_a_window_are_counted(tmp_path, small_groups):
    given = {
        "tokenizer": TokenizerConfig(),
        "validation_paths": (str(write_jsonl(tmp_path / "c.jsonl", make_stories(100, seed=2))),),
    }
    files = [
        write_jsonl(tmp_path / "a.jsonl", make_stories(200)),
        write_jsonl(tmp_path / "b.jsonl", [*["short"] * 2000, *make_stories(1, seed=1)]),
    ]
    prepared = run(*files, **given)
    tokens = next(f["tokens"] for f in prepared.stats["files"] if f["path"] == str(files[1]))
    for length, expected in ((tokens, tokens), (tokens - 1, 0)):
        again = run(*files, sequence_length=length, **given)
        assert again.folder == prepared.folder
        assert again.stats["splits"]["train"]["unreachable_tokens"] == expected


@pytest.fixture
def many_groups(tmp_path, small_groups) -> Path:
    """Give a corpus of so many groups that a run can be caught in the middle."""
    return write_jsonl(tmp_path / "many.jsonl", make_stories(2000))


def test_a_killed_worker_is_one_line_and_what_is_done_is_kept(
    many_groups, data_folder, monkeypatch
):
    tokenise = module.tokenise_groups

    def kill_workers(_: int) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    def tokenise_and_kill(*args, **options):
        return tokenise(*args, **options | {"on_progress": kill_workers})

    with monkeypatch.context() as patch:
        patch.setattr(module, "tokenise_groups", tokenise_and_kill)
        with pytest.raises(InputError, match=r"was killed.*Use --data\.workers 1 or"):
            run(many_groups, workers=2)
    (record, *_) = sorted((data_folder / "prepared").glob("*/0*.json"))
    done = record.stat().st_mtime_ns
    assert run(many_groups).train.documents > 1000
    assert record.stat().st_mtime_ns == done


def workers_of(parent: int) -> list[int]:
    """List the running worker processes of a process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, above = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            started = (folder / "cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        if int(above) == parent and state != "Z" and b"spawn_main" in started:
            found.append(int(folder.name))
    return found


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_are_gone_when_their_parent_is(many_groups, data_folder):
    small = "import tinyllm_jax.data.prepare as room\nroom.GROUP_BYTES = 2000\n"
    script = small + PREPARE.replace("workers=1", "workers=2")
    with subprocess.Popen([sys.executable, "-c", script, str(many_groups)]) as parent:
        wait_until(lambda: list((data_folder / "prepared").glob("*/0*.json")))
        workers = workers_of(parent.pid)
        parent.kill()
    assert len(workers) == 2
    wait_until(lambda: not any(map(is_running, workers)))


def wait_until(condition, *, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_ctrl_c_is_left_to_the_parent():
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=start_worker) as pool:
        worker = pool.submit(os.getpid).result()
        pool.submit(os.kill, worker, signal.SIGINT).result()
        assert pool.submit(os.getpid).result() == worker


def test_errors_in_worker_processes_are_the_reader_s_own(tmp_path, small_groups):
    path = write_jsonl(tmp_path / "stories.jsonl", make_stories(200))
    tokenizer = run(path).tokenizer.save(tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:150], '{"text": \n', *lines[150:]]))
    with pytest.raises(InputError, match=r"stories\.jsonl"):
        run(path, workers=2, tokenizer=TokenizerConfig(path=str(tokenizer)))


PREPARE = """
import sys
from tinyllm_jax.config import Config, DataConfig, ModelConfig
from tinyllm_jax.data.prepare import prepare
data = DataConfig(paths=(sys.argv[1],), validation_fraction=0.2, sequence_length=32, workers=1)
print(prepare(Config(model=ModelConfig(vocab_size=320), data=data), progress=False).dataset_hash)
"""


def test_two_processes_may_prepare_the_same_data_at_once(tmp_path):
    path = write_jsonl(tmp_path / "stories.jsonl", make_stories(3000))
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PREPARE, str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    results = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert any("waiting for it" in error for _, error in results)


def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path, data_folder):
    path = write_jsonl(tmp_path / "stories.jsonl", make_stories(3000))
    tokenizer = run(path).tokenizer  # trained, so that the limit below hits the shards
    shutil.rmtree(data_folder / "prepared")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))\n"
    failed = run_python("-c", limit + PREPARE, str(path))
    assert "OSError: [Errno 27] File too large" in failed.stderr
    (folder,) = [entry for entry in (data_folder / "prepared").iterdir() if entry.is_dir()]
    assert [entry.name for entry in folder.iterdir()] == [tokenizer.file_name]
    assert run(path).train.documents > 2000


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_damaged_shard_is_noticed(stories_file, packing):
    prepared = run(stories_file, packing=packing)
    prepared.verify()
    for path in prepared.folder.glob("*.npy"):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(InputError, match=f"{path.name}: has sha256.*Delete {prepared.folder}"):
            prepared.verify()
        path.write_bytes(whole[:-2])
        with pytest.raises(InputError, match=f"{path.name}: has .* bytes, was written with"):
            run(stories_file, packing=packing)
        path.unlink()
        with pytest.raises(InputError, match=f"{path.name}: a token shard is missing"):
            run(stories_file, packing=packing)
        path.write_bytes(whole)
    run(stories_file, packing=packing).verify()


@pytest.mark.parametrize("damage", ["missing", "other"])
def test_the_tokenizer_of_a_set_is_the_one_it_was_made_with(stories_file, damage):
    prepared = run(stories_file)
    path = prepared.folder / "tokenizer.model"
    if damage == "missing":
        path.unlink()
        message = "is missing"
    else:
        other = run(stories_file, tokenizer=TokenizerConfig(max_sentences=50))
        assert other.tokenizer.hash != prepared.tokenizer.hash
        other.tokenizer.save(prepared.folder)
        message = "has sha256"
    with pytest.raises(InputError, match=rf"tokenizer\.model: .*{message}.*Delete {path.parent}"):
        run(stories_file)


def test_a_damaged_manifest_says_what_to_delete(stories_file):
    prepared = run(stories_file)
    path = prepared.folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=rf"{path}: damaged.*Delete {prepared.folder}"):
        run(stories_file)
    shutil.rmtree(prepared.folder)
    assert run(stories_file).dataset_hash == prepared.dataset_hash


def test_a_finished_set_is_read_from_a_disk_that_takes_no_writes(stories_file, monkeypatch):
    prepared = run(stories_file)

    def refuse(path, **_):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(module, "locked", refuse)  # permissions do not bind the superuser
    assert run(stories_file).folder == prepared.folder
    with pytest.raises(OSError, match="Read-only"):
        run(stories_file, packing="packed")


def test_files_that_are_not_read_are_listed(tmp_path, capfd):
    for name in ("train-0.jsonl", "val-0.jsonl", "test-0.jsonl"):
        write_jsonl(tmp_path / "all" / name, make_stories(60, seed=len(name)))
    (tmp_path / "all/val-0.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in make_stories(60, seed=99))
    )
    left_out = str(tmp_path / "all/test-0.jsonl")
    for _ in range(2):
        assert run(tmp_path / "all").stats["left_out_files"] == [left_out]
        assert capfd.readouterr() == ("", f"Not read, by their names: {left_out}\n")


def test_a_trained_tokenizer_is_used_again_until_its_input_changes(stories_file, data_folder):
    def trained() -> dict[Path, int]:
        files = (data_folder / "tokenizers").glob("*/tokenizer.*")
        return {path: path.stat().st_mtime_ns for path in files}

    run(stories_file)
    first = trained()
    assert len(first) == 1
    run(stories_file, packing="packed")
    assert trained() == first
    run(stories_file, tokenizer=TokenizerConfig(retrain=True))
    assert trained() != first
    assert trained().keys() == first.keys()
    run(stories_file, tokenizer=TokenizerConfig(max_sentences=50))
    assert len(trained()) == 2
    run(stories_file, validation_fraction=0.4)
    assert len(trained()) == 3
    os.utime(stories_file, ns=(0, 1))
    run(stories_file)
    assert len(trained()) == 4


def test_a_given_tokenizer_is_used_as_it_is(stories_file, tmp_path, data_folder):
    path = run(stories_file).tokenizer.save(tmp_path / "given")
    shutil.rmtree(data_folder)
    prepared = run(stories_file, tokenizer=TokenizerConfig(path=str(path)))
    assert prepared.tokenizer.to_bytes() == path.read_bytes()
    assert not (data_folder / "tokenizers").exists()
    config = dataclasses.replace(
        make_config(stories_file, tokenizer=TokenizerConfig(path=str(path))),
        model=ModelConfig(vocab_size=4096),
    )
    with pytest.raises(InputError, match=r"has 320 tokens, and model.vocab_size=4096. Use --model"):
        prepare(config, progress=False)


def test_an_empty_validation_split_says_what_to_type(tmp_path):
    path = write_jsonl(tmp_path / "few.jsonl", make_stories(30))
    with pytest.raises(InputError, match="leaves none for the validation split") as caught:
        run(path, validation_fraction=0.0001)
    fraction = str(caught.value).split("--data.validation_fraction ")[1].split(",")[0]
    assert run(path, validation_fraction=float(fraction)).validation.documents > 0


def test_an_empty_training_split_says_what_to_type(tmp_path, stories_file):
    tokenizer = TokenizerConfig(path=str(run(stories_file).tokenizer.save(tmp_path)))
    held_out = [
        story
        for story in make_stories(100)
        if split_of(story, DataConfig(validation_fraction=0.4)) == "validation"
    ]
    path = write_jsonl(tmp_path / "few.jsonl", held_out[:3])
    with pytest.raises(InputError, match="leaves none for the train split.*fraction 0.2, give"):
        run(path, validation_fraction=0.4, tokenizer=tokenizer)


def test_training_text_that_is_all_held_out_or_broken_is_said_to_be_so(tmp_path, stories_file):
    tokenizer = TokenizerConfig(path=str(run(stories_file).tokenizer.save(tmp_path)))
    given = {"tokenizer": tokenizer, "on_bad_record": "skip"}
    copy = write_jsonl(tmp_path / "copy.jsonl", make_stories(30))
    with pytest.raises(InputError, match="The train files.*: of 30 read.* 30 are validation text"):
        run(copy, validation_paths=(str(stories_file),), **given)
    copy.write_text('{"title": "no text"}\n' * 7)
    with pytest.raises(InputError, match="The train files.*: of 7 read, 7 are broken records"):
        run(copy, validation_paths=(str(stories_file),), **given)
    with pytest.raises(InputError, match="The files hold no document.*: of 7 read, 7 are broken"):
        run(copy, **given)


def test_a_stream_shorter_than_a_window_says_what_to_type(stories_file):
    with pytest.raises(InputError, match="windows of 50001 tokens, and the train split") as caught:
        run(stories_file, sequence_length=50_000)
    longest = int(str(caught.value).split("--data.sequence_length ")[1].split()[0])
    with pytest.raises(InputError, match="and the validation split has at most") as caught:
        run(stories_file, sequence_length=longest)
    longest = int(str(caught.value).split("--data.sequence_length ")[1].split()[0])
    assert run(stories_file, sequence_length=longest).validation.tokens == longest + 1
    assert run(stories_file, sequence_length=50_000, packing="packed").validation.documents > 0


def test_files_without_a_long_enough_document_say_so(tmp_path, stories_file):
    empty = write_jsonl(tmp_path / "short.jsonl", ["a", "b"])
    with pytest.raises(InputError, match="data.min_document_characters=11"):
        run(stories_file, validation_paths=(str(empty),))


def test_half_a_surrogate_pair_names_the_file(tmp_path, stories_file):
    path = tmp_path / "broken.jsonl"
    path.write_text(stories_file.read_text() + '{"text": "a story with \\ud800 in it"}\n')
    with pytest.raises(InputError, match="surrogate"):
        run(path)


def test_stats_account_for_every_document_and_token(tmp_path):
    stories = [*make_stories(150), "too short", "   \n"]
    prepared = run(
        write_jsonl(tmp_path / "a.jsonl", stories),
        write_jsonl(tmp_path / "b.jsonl", make_stories(50, seed=1)),
        packing="padded",
        long_documents="truncate",
    )
    first, second = prepared.stats["files"]
    assert (first["documents_read"], first["documents_kept"]) == (152, 150)
    assert first["too_short"] == 2
    assert second["documents_read"] == second["documents_kept"] == 50
    splits = prepared.stats["splits"].values()
    tokens = sum(split["tokens"] for split in splits)
    assert tokens == first["tokens"] + second["tokens"]
    texts = make_stories(150) + make_stories(50, seed=1)
    lengths = [len(prepared.tokenizer.encode(text, bos=True, eos=True)) for text in texts]
    assert tokens == sum(lengths)
    assert sum(split["text_bytes"] for split in splits) == sum(len(t.encode()) for t in texts)
    assert sum(split["rows"] for split in splits) == 200
    assert sum(split["truncated_tokens"] for split in splits) == sum(
        max(0, n - 33) for n in lengths
    )
    assert sum(split["long_documents"] for split in splits) == sum(n > 33 for n in lengths)
    filled = sum(split["fill_rate"] * split["rows"] * 33 for split in splits)
    assert round(filled) == sum(min(33, n) for n in lengths)
    for split in splits:
        assert split["bytes_per_token"] == split["text_bytes"] / split["tokens"]
    json.dumps(prepared.stats)


def test_the_manifest_names_what_the_set_came_from(stories_file):
    prepared = run(stories_file)
    manifest = json.loads((prepared.folder / "manifest.json").read_text())
    assert manifest["tokenizer_hash"] == prepared.tokenizer.hash
    (source,) = manifest["sources"]
    assert source["path"] == str(stories_file)
    assert source["bytes"] == stories_file.stat().st_size
    for shard in manifest["shards"]:
        for name, known in shard["files"].items():
            assert (prepared.folder / name).stat().st_size == known["bytes"]


def test_progress_goes_to_stderr_and_quiet_is_quiet(stories_file, capfd):
    run(stories_file)
    assert capfd.readouterr() == ("", "")
    prepare(make_config(stories_file, packing="packed"), progress=True)
    out, error = capfd.readouterr()
    assert out == ""
    assert "preparing data" in error


def test_data_needs_no_framework():
    code = "import sys, tinyllm_jax.data.prepare, tinyllm_jax.data.batches; print(*sys.modules)"
    loaded = run_python("-c", code, check=True).stdout.split()
    assert not {"jax", "flax", "torch", "transformers"} & set(loaded)
