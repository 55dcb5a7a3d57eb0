"""`convert` between JAX, PyTorch, safetensors, Hugging Face: nothing is lost, and stories agree."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from conftest import SMALL_RUN, run_python
from convert_cases import (
    GROUPED,
    UNTIED,
    assert_same_weights,
    changed,
    random_bundle,
    with_training,
)
from llama_oracle import SMALL, transformers_llama

import convert
import tinyllm_jax
from convert.__main__ import main
from convert.formats import huggingface
from convert.tokenizer_files import load_any_tokenizer, parse_tokenizer_bin, tokenizer_bin
from tinyllm_jax import train
from tinyllm_jax.config import RunConfig, TokenizerConfig
from tinyllm_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from tinyllm_jax.data.toy_stories import generate_stories
from tinyllm_jax.errors import InputError
from tinyllm_jax.training.checkpoint import read_checkpoint
from tinyllm_jax.training.step_folders import mark_best

PROMPT = "Once upon a time"
ODD_TEXTS = [
    "", " ", "  two spaces", "one  two   three", "\n\nline\n", "tab\there", "naïve café", "日本語",
    "🙂🙂 smile", "......", "aaaaaaa", " x", "x ", "\r\n", "e\u0301", "1234567", "\x00",
]  # fmt: skip


@pytest.fixture(scope="module")
def sentencepiece(trained_run: Path) -> Tokenizer:
    return load_tokenizer(trained_run)


@pytest.fixture(scope="module")
def bytelevel() -> Tokenizer:
    stories = list(generate_stories(seed=1, start=0, stop=200))
    return train_tokenizer(stories, config=TokenizerConfig(kind="bytelevel"), vocab_size=300)


@pytest.fixture(scope="module")
def hf_folder(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the trained run as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("hf") / "story"
    assert main([str(trained_run), str(folder), "--to", "hf"]) == 0
    return folder


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def assert_same_run(actual: convert.Bundle, expected: convert.Bundle) -> None:
    """Compare all that a run goes on from; where it lies may differ."""
    assert actual.model == expected.model
    assert_same_weights(actual.weights, expected.weights)
    one, other = actual.training, expected.training
    assert one is not None
    assert other is not None
    assert_same_weights(one.first, other.first)
    assert_same_weights(one.second, other.second)
    settings = [dataclasses.replace(run.config, run=RunConfig()) for run in (one, other)]
    assert settings[0] == settings[1]
    for name in ("step", "count", "nonfinite_streak", "seed", "rows_per_step",
                 "dataset_hash", "best"):  # fmt: skip
        assert getattr(one, name) == getattr(other, name), name
    assert actual.tokenizer is not None
    assert expected.tokenizer is not None
    assert actual.tokenizer.to_bytes() == expected.tokenizer.to_bytes()


@pytest.mark.slow
def test_weights_come_back_bitwise_from_torch_hugging_face_and_llama2c(
    trained_run, tmp_path, capsys
):
    best = trained_run / "best"
    run(best, tmp_path / "story.pt")
    run(tmp_path / "story.pt", tmp_path / "hf", "--to", "hf")
    run(tmp_path / "hf", tmp_path / "jax", "--to", "orbax")
    run(tmp_path / "jax", tmp_path / "story.bin")
    run(tmp_path / "story.bin", tmp_path / "back", "--to", "orbax")
    expected, actual = read_checkpoint(best.resolve()), convert.read(tmp_path / "back")
    assert_same_weights(convert.bundle.to_jax(actual.weights), expected.weights)
    printed = capsys.readouterr().out
    assert printed.count("largest difference 0, 0.00%") == 5
    assert "llama2c, float32, rope interleaved, matrices [out, in], head tied" in printed
    before, after = (tinyllm_jax.load(path) for path in (trained_run, tmp_path / "back"))
    stories = [model.generate(PROMPT, max_new_tokens=40, greedy=True) for model in (before, after)]
    assert stories[0] == stories[1]


@pytest.mark.slow
def test_moments_and_counters_come_back_bitwise_from_every_format_that_has_them(
    trained_run, tmp_path
):
    expected = convert.read(trained_run)
    assert expected.training is not None
    assert expected.training.step == 20
    run(trained_run, tmp_path / "a.pth")
    run(tmp_path / "a.pth", tmp_path / "folder", "--to", "safetensors")
    run(tmp_path / "folder", tmp_path / "one.safetensors")
    run(tmp_path / "one.safetensors", tmp_path / "run", "--to", "orbax")
    for name in ("a.pth", "folder", "one.safetensors", "run"):
        assert_same_run(convert.read(tmp_path / name), expected)
    files = sorted(path.name for path in (tmp_path / "folder").iterdir())
    assert files == ["checksums.json", "meta.json", "model.safetensors", "optimizer.safetensors",
                     "tokenizer.model"]  # fmt: skip
    ours = json.loads((trained_run / "checkpoints/20/meta.json").read_text())
    theirs = json.loads((tmp_path / "folder/meta.json").read_text())
    assert {key: theirs[key] for key in ours} == ours


def test_counters_that_all_differ_come_back(tmp_path, sentencepiece):
    config = changed(GROUPED, vocab_size=sentencepiece.vocab_size)
    expected = with_training(random_bundle(config, tokenizer=sentencepiece))
    for name, to in (("x.pt", "torch"), ("x", "safetensors"), ("y", "orbax")):
        convert.write(expected, tmp_path / name, to=to)
        assert_same_run(convert.read(tmp_path / name), expected)


def test_a_run_that_went_through_torch_goes_on_as_if_it_had_not(
    trained_run, tmp_path, prepared_folder, monkeypatch
):
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
    run(trained_run / "checkpoints/10", tmp_path / "x.pt", "--no-verify")
    run(tmp_path / "x.pt", tmp_path / "run", "--to", "orbax", "--no-verify")
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert_same_run(convert.read(tmp_path / "run"), convert.read(trained_run))


def test_of_a_run_the_newest_goes_on_and_the_best_is_exported(run_copy):
    mark_best(run_copy, 10)
    assert convert.read(run_copy).layout["read_from"].endswith("checkpoints/20")
    assert convert.read(run_copy, prefer_best=True).layout["read_from"].endswith("checkpoints/10")


def test_a_run_folder_of_the_torch_twin_is_read_at_its_newest_good_checkpoint(tmp_path):
    for step, seed in ((3, 0), (20, 1), (100, 2)):
        bundle = with_training(random_bundle(seed=seed))
        convert.write(bundle, tmp_path / f"run/checkpoints/{step}", to="safetensors")
    newest = tmp_path / "run/checkpoints/100/optimizer.safetensors"
    assert_same_weights(convert.read(tmp_path / "run").weights, random_bundle(seed=2).weights)
    newest.write_bytes(newest.read_bytes()[:-1])
    said: list[str] = []
    found = convert.read(tmp_path / "run", say=said.append)
    assert_same_weights(found.weights, random_bundle(seed=1).weights)
    assert "100: damaged checkpoint (optimizer.safetensors does not have its" in said[0]


def test_transformers_tells_the_same_story(hf_folder, trained_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = tinyllm_jax.load(trained_run)
    theirs = AutoModelForCausalLM.from_pretrained(hf_folder)
    tokenizer = AutoTokenizer.from_pretrained(hf_folder)
    rows = tokenizer(PROMPT, return_tensors="pt")
    assert rows.input_ids[0].tolist() == ours.tokenizer.encode(PROMPT, bos=True)
    continued = theirs.generate(**rows, max_new_tokens=40, do_sample=False)
    story = tokenizer.decode(continued[0], skip_special_tokens=True)
    assert story == ours.generate(PROMPT, max_new_tokens=40, greedy=True)[0]
    logits = theirs(rows.input_ids).logits.detach().numpy()
    np.testing.assert_allclose(ours.logits(rows.input_ids.numpy()), logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["sentencepiece", "bytelevel"])
def test_transformers_cuts_and_joins_text_as_we_do(kind, request, tmp_path):
    from transformers import AutoTokenizer

    ours: Tokenizer = request.getfixturevalue(kind)
    config = changed(GROUPED, vocab_size=ours.vocab_size)
    convert.write(random_bundle(config, tokenizer=ours), tmp_path / "hf", to="hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    letters = np.random.default_rng(0).choice(list("aaabehtn  .,\n\"'é日🙂"), (300, 25))
    texts = ODD_TEXTS + ["".join(row) for row in letters]
    texts += list(generate_stories(seed=9, start=0, stop=50))
    for text in texts:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        assert theirs.encode(text) == [ours.bos_id, *ids], text
        assert theirs.decode(ids) == ours.decode(ids), text
    back = convert.read(tmp_path / "hf").tokenizer
    assert back is not None
    assert back.to_bytes() == ours.to_bytes()
    for name in ("bos", "eos", "unk", "pad"):
        assert getattr(theirs, f"{name}_token_id") == getattr(ours, f"{name}_id")


def test_config_json_names_rope_theta_for_both_versions_of_transformers(tmp_path):
    from transformers import AutoConfig

    bundle = random_bundle(changed(SMALL, rope_theta=777.5, rms_norm_eps=1e-3))
    convert.write(bundle, tmp_path / "hf", to="hf")
    table = json.loads((tmp_path / "hf/config.json").read_text())
    assert table["rope_theta"] == table["rope_parameters"]["rope_theta"] == 777.5
    assert table["rope_scaling"] is None
    read = AutoConfig.from_pretrained(tmp_path / "hf")
    assert read.rope_parameters["rope_theta"] == 777.5
    assert read.rms_norm_eps == 1e-3
    for taken_out in ("rope_parameters", "rope_theta"):
        fewer = {key: value for key, value in table.items() if key != taken_out}
        (tmp_path / "hf/config.json").write_text(json.dumps(fewer))
        assert convert.read(tmp_path / "hf").model.rope_theta == 777.5


@pytest.mark.parametrize("config", [GROUPED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_type_comes_back_bitwise_through_every_format_that_has_it(config, dtype, tmp_path):
    expected = convert.bundle.cast_bundle(random_bundle(config), dtype)
    for name, to in (("x.pt", "torch"), ("x.safetensors", None), ("hf", "hf")):
        convert.write(expected, tmp_path / name, to=to)
        assert_same_weights(convert.read(tmp_path / name).weights, expected.weights)


def test_a_folder_that_transformers_wrote_is_read_whole_and_sharded(tmp_path):
    for config in (GROUPED, UNTIED):
        expected = random_bundle(config)
        llama = transformers_llama(config, convert.bundle.to_jax(expected.weights))
        name = f"tied {config.tie_word_embeddings}"
        llama.save_pretrained(tmp_path / name, max_shard_size="20KB")
        assert (tmp_path / name / "model.safetensors.index.json").is_file()
        found = convert.read(tmp_path / name)
        assert_same_weights(found.weights, expected.weights)
        assert found.model == config.__class__(**vars(config) | {"compute_dtype": "auto"})


def test_large_models_are_cut_into_shards_that_transformers_reads(tmp_path):
    from transformers import AutoModelForCausalLM

    expected = random_bundle(UNTIED)
    huggingface.write(expected, tmp_path / "hf", shard_bytes=10_000)
    shards = sorted(path.name for path in (tmp_path / "hf").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert_same_weights(convert.read(tmp_path / "hf").weights, expected.weights)
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    for name, array in expected.weights.items():
        np.testing.assert_array_equal(state[huggingface.hugging_face_name(name)].numpy(), array)


def test_our_safetensors_are_those_of_the_library(tmp_path):
    bundle = random_bundle(UNTIED)
    convert.write(bundle, tmp_path / "x.safetensors")
    assert_same_weights(safetensors.numpy.load_file(tmp_path / "x.safetensors"), bundle.weights)


def test_a_tokenizer_that_is_of_no_use_can_be_left_out(hf_folder, tmp_path):
    folder = Path(shutil.copytree(hf_folder, tmp_path / "hf"))
    (folder / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(InputError, match="neither a SentencePiece model nor"):
        convert.read(folder)
    assert convert.read(folder, tokenizer="none").tokenizer is None


def test_half_precision_becomes_float32_where_training_goes_on(tmp_path, sentencepiece):
    config = changed(GROUPED, vocab_size=sentencepiece.vocab_size)
    half = convert.bundle.cast_bundle(random_bundle(config, tokenizer=sentencepiece), "float16")
    convert.write(half, tmp_path / "run", to="orbax")
    convert.write(convert.read(tmp_path / "run"), tmp_path / "x.pt", dtype="float16")
    assert {array.dtype.name for array in convert.read(tmp_path / "run").weights.values()} == {
        "float32"
    }
    assert_same_weights(convert.read(tmp_path / "x.pt").weights, half.weights)


def test_weights_alone_make_a_run_folder_that_cannot_be_mistaken_for_a_run(tmp_path, sentencepiece):
    config = changed(GROUPED, vocab_size=sentencepiece.vocab_size)
    convert.write(random_bundle(config, tokenizer=sentencepiece), tmp_path / "run", to="orbax")
    assert convert.read(tmp_path / "run").training is None
    checkpoint = read_checkpoint(tmp_path / "run/checkpoints/0")
    assert (checkpoint.step, checkpoint.dataset_hash) == (0, "")
    assert tinyllm_jax.load(tmp_path / "run").config.hidden_size == config.hidden_size
    with pytest.raises(InputError, match="no tokenizer, and a run folder needs one"):
        convert.write(random_bundle(config), tmp_path / "none", to="orbax")


def test_the_layout_stands_in_the_metadata(hf_folder, tmp_path, trained_run):
    run(trained_run, tmp_path / "x", "--to", "safetensors", "--no-verify")
    layout = json.loads((tmp_path / "x/meta.json").read_text())["layout"]
    assert (layout["format"], layout["rope"], layout["tied"]) == ("orbax", "half-split", True)
    with safetensors.safe_open(hf_folder / "model.safetensors", "np") as file:
        assert json.loads(file.metadata()["tinyllm_layout"])["transposed"] is True


def test_llama2c_tokenizers_come_back_with_the_same_ids(sentencepiece, tmp_path):
    content = tokenizer_bin(sentencepiece)
    (tmp_path / "tokenizer.bin").write_bytes(content)
    back = load_any_tokenizer(tmp_path / "tokenizer.bin")
    rows = parse_tokenizer_bin(content)
    assert rows is not None
    assert [rows[id][1] for id in (back.bos_id, back.eos_id)] == [b"\n<s>\n", b"\n</s>\n"]
    for text in [*ODD_TEXTS, *generate_stories(seed=9, start=0, stop=20)]:
        assert back.encode(text) == sentencepiece.encode(text), text
        assert back.decode(back.encode(text)) == text
    for name in ("vocab_size", "bos_id", "eos_id", "unk_id", "pad_id"):
        assert getattr(back, name) == getattr(sentencepiece, name)
    assert tokenizer_bin(back) == content


@pytest.mark.slow
def test_the_command_prints_a_report(trained_run, tmp_path):
    done = run_python("-m", "convert", trained_run, "x.pt", folder=tmp_path, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].endswith(
        "orbax, float32, rope half-split, matrices [in, out], head tied to the embedding"
    )
    assert lines[2] == "Tensors  20, and both moments of each, step 20"
    assert lines[3] == "Logits   largest difference 0, 0.00% of their spread"


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torch", "safetensors", "hf", "llama2c"])
def test_whatever_convert_writes_is_loaded_and_started_from(
    to, trained_run, tmp_path, monkeypatch, prepared_folder
):
    """`load`, `--init-from` and `--resume` take what `convert` reads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
    target = tmp_path / {"torch": "model.pt", "llama2c": "model.bin"}.get(to, "model")
    convert.write(convert.read(trained_run), target, to=to)
    tokens = [[2, 5, 9, 30]]
    expected = tinyllm_jax.load(trained_run / "checkpoints/20").logits(tokens)
    np.testing.assert_array_equal(tinyllm_jax.load(target).logits(tokens), expected)
    flags = ["--max-steps", "1", "--optimizer.weight_decay", "0", "--out", "new"]
    assert train.main([*SMALL_RUN, "--init-from", str(target), *flags]) == 0
    if to in ("torch", "safetensors"):
        assert train.main(["--resume", str(target), "--max-steps", "22"]) == 0
        assert train.main(["--resume", str(trained_run), "--max-steps", "22", "--out", "own"]) == 0
        ours = read_checkpoint(tmp_path / "own/checkpoints/22")
        theirs = read_checkpoint(tmp_path / "checkpoints/pretrain_model/checkpoints/22")
        for name, weight in ours.weights.items():
            np.testing.assert_array_equal(theirs.weights[name], weight)
