"""The smaller commands, and the console script that is the same thing."""

import json
from pathlib import Path

import pytest
from conftest import SMALL_RUN, Command, run_python
from mode_runs import write_data

from tinyllm_jax import __main__, prepare, tokenizer
from tinyllm_jax.data.chat_template import CONTROL_TOKENS
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


@pytest.mark.parametrize(
    ("mode", "data", "kind"),
    [("sft", "chat", "conversations"), ("dpo", "pairs", "preferences")],
)
def test_prepare_makes_the_rows_of_the_mode(mode, data, kind, capsys, trained_run):
    write_data(Path())
    files = ["--data", f"{data}.jsonl", "--data.validation_paths", f"{data}_held.jsonl"]
    begin = ["--mode", mode, "--init-from", str(trained_run)]
    assert prepare.main([*begin, *files, "--verify"]) == 0
    printed = capsys.readouterr()
    account = json.loads(printed.out)
    assert account["settings"]["kind"] == kind
    assert account["splits"]["train"]["learnt_tokens"] > 0
    tokenizer_of_run = load_tokenizer(trained_run)
    assert account["vocab_size"] == tokenizer_of_run.vocab_size + len(CONTROL_TOKENS)
    folder = Path(printed.err.rpartition("Prepared data: ")[2].strip())
    assert load_tokenizer(folder).hash == account["tokenizer_hash"]


def test_prepare_reads_prompts_and_keeps_nothing(capsys, trained_run, prepared_folder):
    write_data(Path())
    files = ["--data", "chat.jsonl", "--data.validation_paths", "chat_held.jsonl"]
    reward = ["--rlhf.reward", "mode_rewards:length"]
    words = ["--mode", "rlhf", "--init-from", str(trained_run), *files, *reward]
    before = {*prepared_folder.glob("prepared/*")}
    assert prepare.main(words) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["splits"]["train"]["prompts"] == 50
    assert "nothing is kept" in printed.err
    assert {*prepared_folder.glob("prepared/*")} == before
    with pytest.raises(InputError, match="--verify: --mode rlhf reads its prompts anew"):
        prepare.main([*words, "--verify"])


def test_prepare_takes_the_tokenizer_of_the_weights_that_a_run_begins_with(capsys, trained_run):
    Path("new.txt").write_text("<|endoftext|>".join(f"A cow saw {n} hens." for n in range(300)))
    assert prepare.main([*SMALL_RUN, "--data", "new.txt", "--init-from", str(trained_run)]) == 0
    account = json.loads(capsys.readouterr().out)
    assert account["tokenizer_hash"] == load_tokenizer(trained_run).hash


def test_prepare_needs_no_jax_for_text_alone():
    lines = ("import sys", "from tinyllm_jax.prepare import main", f"main({SMALL_RUN})")
    code = "\n".join([*lines, "assert 'jax' not in sys.modules"])
    run_python("-c", code, check=True)


@pytest.mark.parametrize("flag", [["--resume", "run"], ["--auto-resume"]])
def test_prepare_refuses_to_go_on_with_a_run(flag):
    with pytest.raises(InputError, match="a run that goes on keeps its data. Leave it out"):
        prepare.main([*SMALL_RUN, *flag])


def test_prepare_asks_for_the_model_whose_tokenizer_a_mode_keeps():
    with pytest.raises(InputError, match="--mode sft goes on from a model. Name it with --init-"):
        prepare.main(["--mode", "sft", "--data", "toy"])


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


def test_the_package_imports_no_framework():
    script = (
        "import sys, tinyllm_jax, tinyllm_jax.config, tinyllm_jax.data.prepare, "
        "tinyllm_jax.data.batches; "
        "print([name for name in ('jax', 'flax', 'torch', 'transformers') if name in sys.modules])"
    )
    done = run_python("-c", script)
    assert done.stdout.strip() == "[]", done.stderr
