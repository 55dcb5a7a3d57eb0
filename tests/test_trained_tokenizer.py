"""A trained tokenizer is kept with its checksum, and a damaged one is never used."""

import hashlib
import json
import random
from pathlib import Path

import pytest
from conftest import run_python

from tinyllm_jax.config import Config, DataConfig, ModelConfig, TokenizerConfig
from tinyllm_jax.data.prepare import prepare
from tinyllm_jax.data.tokenizer import load_tokenizer
from tinyllm_jax.errors import InputError

KINDS = {"sentencepiece": "tokenizer.model", "bytelevel": "tokenizer.json"}
WORDS = ["the", "dog", "cat", "bird", "tree", "ball", "park", "was", "saw", "ran", "Tim", "and"]


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture(params=KINDS)
def config(request, tmp_path) -> Config:
    pick, path = random.Random(0), tmp_path / "stories.jsonl"
    texts = [f"Story {n}: " + " ".join(pick.choices(WORDS, k=30)) for n in range(200)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return settings(path, kind=request.param)


def settings(path: Path, *, packing: str = "stream", **tokenizer) -> Config:
    data = {"validation_fraction": 0.2, "sequence_length": 32, "workers": 1, "packing": packing}
    return Config(
        model=ModelConfig(vocab_size=300),
        tokenizer=TokenizerConfig(**tokenizer),
        data=DataConfig(paths=(str(path),), **data),
    )


def trained(folder: Path, config: Config) -> Path:
    """Train a tokenizer, and give its file."""
    prepare(config, progress=False)
    (path,) = folder.glob(f"tokenizers/*/{KINDS[config.tokenizer.kind]}")
    return path


def again(config: Config, **tokenizer) -> bytes:
    """Prepare another set with the same tokenizer, and give that."""
    other = settings(
        Path(config.data.paths[0]), packing="padded", kind=config.tokenizer.kind, **tokenizer
    )
    return prepare(other, progress=False).tokenizer.to_bytes()


def change_tokens(content: bytes) -> bytes:
    """Damage a tokenizer so that it still reads as one."""
    if content.startswith(b"{"):
        table = json.loads(content)
        ids = table["model"]["vocab"]
        ids["a"], ids["b"] = ids["b"], ids["a"]
        return json.dumps(table).encode()
    letter = b"\n\x01o"  # one token of the model, as protobuf writes it
    assert content.count(letter) == 1
    return content.replace(letter, b"\n\x01?")


def test_its_checksum_is_in_the_form_of_sha256sum(config, data_folder):
    path = trained(data_folder, config)
    expected = f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
    assert (path.parent / "SHA256SUMS").read_text() == expected
    assert again(config) == path.read_bytes()


def test_one_that_is_damaged_and_still_reads_is_refused(config, data_folder):
    path = trained(data_folder, config)
    whole = path.read_bytes()
    path.write_bytes(change_tokens(whole))
    assert load_tokenizer(path).vocab_size == 300
    with pytest.raises(
        InputError, match=f"{path}: is not what was written. Delete {path.parent} and "
    ):
        again(config)
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()
    assert again(config) == whole


@pytest.mark.parametrize("harm", ["cut", "empty", "checksum cut", "checksum of nothing"])
def test_every_other_damage_is_refused_too(config, data_folder, harm):
    path = trained(data_folder, config)
    sums = path.parent / "SHA256SUMS"
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "checksum cut":
        sums.write_bytes(sums.read_bytes()[:40])
    else:
        sums.write_bytes(b"\xff\x00")
    with pytest.raises(
        InputError, match=f": is not what was written. Delete {path.parent} and run"
    ):
        again(config)


def test_one_that_is_missing_or_asked_for_anew_is_trained_again(config, data_folder):
    path = trained(data_folder, config)
    whole = path.read_bytes()
    path.unlink()
    assert again(config) == whole
    path.write_bytes(change_tokens(whole))
    assert again(config, retrain=True) == whole == path.read_bytes()
    assert again(config) == whole


def test_one_from_before_there_were_checksums_is_used(config, data_folder):
    path = trained(data_folder, config)
    (path.parent / "SHA256SUMS").unlink()
    assert again(config) == path.read_bytes()


KILLED_WHILE_SAVING = """
import os, sys
from pathlib import Path
from tinyllm_jax.data import prepare
from tinyllm_jax.data.tokenizer import load_tokenizer

old, new, folder = map(Path, sys.argv[1:])
tokenizers = [load_tokenizer(old), load_tokenizer(new)]

def after(call):
    def counted(*given, **named):
        after.left -= 1
        if after.left < 0:
            os._exit(9)
        return call(*given, **named)
    return counted

def killed(count):
    child = os.fork()
    if child == 0:
        after.left = count
        os.replace, os.fsync, Path.unlink = map(after, (os.replace, os.fsync, Path.unlink))
        prepare.save_trained(tokenizers[1], folder)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

count, ended = 0, 9
while ended == 9:
    prepare.save_trained(tokenizers[0], folder)
    ended = killed(count)
    assert ended in (0, 9), ended
    found = ""
    if prepare.is_trained(folder):
        assert (folder / prepare.TOKENIZER_SUMS).is_file(), count
        found = prepare.load_trained(folder).hash
    print(count, ended, ["", *(each.hash for each in tokenizers)].index(found))
    count += 1
"""


def test_one_whose_saving_is_killed_is_there_with_its_checksum_or_not_at_all(
    config, data_folder, tmp_path
):
    old = trained(data_folder, config)
    new = tmp_path / old.name
    new.write_bytes(change_tokens(old.read_bytes()))
    done = run_python(
        "-c", KILLED_WHILE_SAVING, str(old), str(new), str(tmp_path / "kept"), timeout=60
    )
    assert done.returncode == 0, done.stderr
    found = [tuple(map(int, line.split()[1:])) for line in done.stdout.splitlines()]
    is_old, is_none, is_new = (found.count(each) for each in ((9, 1), (9, 0), (0, 2)))
    assert found == [(9, 1)] * is_old + [(9, 0)] * is_none + [(0, 2)] * is_new
    assert is_old >= 1
    assert is_none >= 3
    assert is_new == 1


def test_one_whose_training_was_killed_is_trained_again(config, data_folder, monkeypatch):
    path = trained(data_folder, config)
    whole = path.read_bytes()
    path.write_bytes(change_tokens(whole))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tinyllm_jax.data.prepare.write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        again(config, retrain=True)
    monkeypatch.undo()
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(data_folder))
    assert not path.exists()
    assert again(config) == whole == path.read_bytes()
