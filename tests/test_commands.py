"""The smaller commands, and the console script that is the same thing."""

import json
import subprocess
import sys

import pytest
from conftest import SMALL_RUN, Command

from tinyllm_jax import __main__, prepare, tokenizer
from tinyllm_jax.data.tokenizer import load_tokenizer
from tinyllm_jax.errors import InputError


@pytest.fixture(autouse=True)
def one_data_folder(monkeypatch, prepared_folder, tmp_path):
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
    monkeypatch.chdir(tmp_path)


def test_prepare_prints_the_account_that_a_run_keeps(capsys, trained_run):
    assert prepare.main([*SMALL_RUN, "--verify"]) == 0
    printed = capsys.readouterr()
    account = json.loads(printed.out)
    assert account == json.loads((trained_run / "dataset_stats.json").read_text())
    (toy,) = account["files"]
    assert toy["documents_read"] == toy["documents_kept"] == 400
    splits = account["splits"]
    assert splits["train"]["documents"] + splits["validation"]["documents"] == 400
    assert splits["train"]["tokens"] + splits["validation"]["tokens"] == toy["tokens"]
    assert "Prepared data: " in printed.err


@pytest.mark.parametrize("kind", ["sentencepiece", "bytelevel"])
def test_a_tokenizer_is_trained_by_itself_and_fits_a_run(kind, capsys, tmp_path):
    stories = tmp_path / "stories.txt"
    stories.write_text("<|endoftext|>".join(f"The {n} cats saw {n} dogs. " * 9 for n in range(300)))
    flags = ["--input", str(stories), "--vocab-size", "300", "--tokenizer.kind", kind]
    assert tokenizer.main(["train", *flags, "--out", "mine"]) == 0
    path = capsys.readouterr().out.strip()
    trained = load_tokenizer(path)
    assert trained.vocab_size == 300
    assert trained.decode(trained.encode("The 5 cats saw 5 dogs.")) == "The 5 cats saw 5 dogs."
    assert tokenizer.main(["train", *flags, "--out", f"again/{trained.file_name}"]) == 0
    assert load_tokenizer("again").hash == trained.hash


def test_a_tokenizer_file_has_the_name_of_its_kind():
    with pytest.raises(InputError, match=r"is a file named tokenizer.model. Name a folder, or"):
        tokenizer.main(["train", "--input", "toy", "--vocab-size", "400", "--out", "mine.json"])


@pytest.mark.parametrize("flag", [["--tokenizer.path", "mine"], ["--retrain-tokenizer"]])
def test_training_a_tokenizer_refuses_what_would_do_nothing(flag):
    words = ["train", "--input", "toy", "--vocab-size", "400", "--out", "new", *flag]
    with pytest.raises(InputError, match="is for training a model.* Leave it out"):
        tokenizer.main(words)


def test_a_vocabulary_size_that_is_no_number_is_refused():
    with pytest.raises(InputError, match="model.vocab_size='big' does not fit"):
        tokenizer.main(["train", "--input", "toy", "--vocab-size", "big", "--out", "mine"])


def test_every_command_of_the_console_script_has_help(command: Command):
    for name in __main__.COMMANDS:
        done = command.run("__main__", name, "--help")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("usage: ")


def test_an_unknown_command_names_those_there_are(command: Command):
    done = command.run("__main__", "trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: 'trian' is no command. Use one of {', '.join(__main__.COMMANDS)}.\n"
    )
    assert "train a model" in command.run("__main__").stdout


def test_the_package_imports_no_framework(command: Command):
    script = (
        "import sys, tinyllm_jax, tinyllm_jax.config, tinyllm_jax.data.prepare, "
        "tinyllm_jax.data.batches; "
        "print([name for name in ('jax', 'flax', 'torch', 'transformers') if name in sys.modules])"
    )
    environment = command.options["env"]
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
