"""Bad input to `convert`: one clear line, and the destination stays as it was."""

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_python
from convert_cases import (
    GROUPED,
    UNTIED,
    changed,
    meta_arguments,
    meta_state,
    random_bundle,
    save_torch,
)

import convert
from convert import conversion
from convert.__main__ import main
from tinyllm_jax.config import TokenizerConfig
from tinyllm_jax.data.tokenizer import train_tokenizer
from tinyllm_jax.data.toy_stories import generate_stories
from tinyllm_jax.errors import InputError


class Evil:
    """A pickle of this touches a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def truncated_safetensors(folder: Path) -> Path:
    convert.write(random_bundle(), folder / "x.safetensors")
    content = (folder / "x.safetensors").read_bytes()
    (folder / "x.safetensors").write_bytes(content[:-100])
    return folder / "x.safetensors"


def truncated_header(folder: Path) -> Path:
    convert.write(random_bundle(), folder / "x.safetensors")
    content = (folder / "x.safetensors").read_bytes()
    (folder / "x.safetensors").write_bytes(content[:60])
    return folder / "x.safetensors"


def truncated_hugging_face(folder: Path) -> Path:
    convert.write(random_bundle(), folder / "hf", to="hf")
    file = folder / "hf/model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    return folder / "hf"


def wrong_magic(folder: Path) -> Path:
    (folder / "x.gguf").write_bytes(b"GGML" + bytes(range(200)))
    return folder / "x.gguf"


def truncated_gguf(folder: Path) -> Path:
    pytest.importorskip("gguf")
    convert.write(random_bundle(), folder / "x.gguf")
    (folder / "x.gguf").write_bytes((folder / "x.gguf").read_bytes()[:300])
    return folder / "x.gguf"


def truncated_llama2c(folder: Path) -> Path:
    convert.write(random_bundle(), folder / "x.bin")
    (folder / "x.bin").write_bytes((folder / "x.bin").read_bytes()[:-8])
    return folder / "x.bin"


def version_3_llama2c(folder: Path) -> Path:
    header = struct.pack("<I8iB", 0x616B3432, 3, 24, 40, 2, 4, 2, 67, 64, 1)
    (folder / "x.bin").write_bytes(header.ljust(4000, b"\0"))
    return folder / "x.bin"


def zip_of_text(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "x.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    return folder / "x.pt"


def truncated_torch(folder: Path) -> Path:
    convert.write(random_bundle(), folder / "x.pt")
    (folder / "x.pt").write_bytes((folder / "x.pt").read_bytes()[:-2000])
    return folder / "x.pt"


def malicious_torch(folder: Path) -> Path:
    torch.save({"model": Evil(folder / "touched")}, folder / "x.pt")
    return folder / "x.pt"


def malicious_pickle(folder: Path) -> Path:
    (folder / "x.pt").write_bytes(pickle.dumps({"model": Evil(folder / "touched")}))
    return folder / "x.pt"


def torch_script(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"")
        archive.writestr("x/constants.pkl", b"")
    return folder / "x.pt"


def list_in_torch(folder: Path) -> Path:
    torch.save([torch.zeros(2)], folder / "x.pt")
    return folder / "x.pt"


def no_tensors(folder: Path) -> Path:
    torch.save({"model": {}, "epoch": 3}, folder / "x.pt")
    return folder / "x.pt"


def folder_with_no_config(folder: Path) -> Path:
    convert.write(random_bundle(), folder / "hf", to="hf")
    (folder / "hf/config.json").unlink()
    return folder / "hf"


def folder_with_no_weights(folder: Path) -> Path:
    convert.write(random_bundle(), folder / "hf", to="hf")
    (folder / "hf/model.safetensors").unlink()
    return folder / "hf"


def missing_shard(folder: Path) -> Path:
    conversion.huggingface.write(random_bundle(), folder / "hf", shard_bytes=10_000)
    next((folder / "hf").glob("model-00002*")).unlink()
    return folder / "hf"


def empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def empty_file(folder: Path) -> Path:
    (folder / "x.pt").touch()
    return folder / "x.pt"


def damaged_folder(folder: Path) -> Path:
    convert.write(random_bundle(), folder / "x", to="safetensors")
    file = folder / "x/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return folder / "x"


def tied_with_another_head(folder: Path) -> Path:
    convert.write(random_bundle(UNTIED), folder / "hf", to="hf")
    return with_config(folder, tie_word_embeddings=True)


def with_config(folder: Path, **fields) -> Path:
    if not (folder / "hf").exists():
        convert.write(random_bundle(), folder / "hf", to="hf")
    file = folder / "hf/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder / "hf"


def scaled_rope(word: str):
    def make(folder: Path) -> Path:
        return with_config(
            folder, rope_parameters={"rope_type": word, "rope_theta": 1e4, "factor": 2.0}
        )

    return make


def old_scaled_rope(folder: Path) -> Path:
    return with_config(folder, rope_scaling={"type": "dynamic", "factor": 2.0})


def another_architecture(folder: Path) -> Path:
    return with_config(folder, model_type="gemma2")


def settings_out_of_range(folder: Path) -> Path:
    return with_config(folder, num_attention_heads=5, head_dim=None)


def broken_config(folder: Path) -> Path:
    with_config(folder)
    (folder / "hf/config.json").write_text("{")
    return folder / "hf"


def missing_path(folder: Path) -> Path:
    return folder / "nowhere"


CASES = {
    truncated_safetensors: r"x.safetensors: cut short; it has [\d,]+ bytes and says",
    truncated_header: "x.safetensors: cut short",
    truncated_hugging_face: "model.safetensors: cut short",
    wrong_magic: r"x.gguf: not a known format \(it begins with b'GGML'\)",
    truncated_gguf: "x.gguf: no whole GGUF file",
    truncated_llama2c: r"x.bin: its header stands for [\d,]+ bytes of llama2.c version 0",
    version_3_llama2c: "x.bin: version 3 of llama2.c's format",
    zip_of_text: "x.pt: a zip archive, and no checkpoint of PyTorch",
    truncated_torch: "x.pt: cut short or damaged",
    malicious_torch: r"x.pt: holds Python objects that would run code when read \(\w+.mkdir\)",
    malicious_pickle: "x.pt: holds Python objects that would run code when read",
    torch_script: "x.pt: a TorchScript program, which holds code",
    list_in_torch: "x.pt: holds a list where a checkpoint has a dict",
    no_tensors: "x.pt: holds no tensors under",
    folder_with_no_config: "hf: model.safetensors, but no config.json",
    folder_with_no_weights: "hf: a config.json, but neither model.safetensors nor",
    missing_shard: "hf: model-00002-of-.* is missing",
    empty_folder: "empty: a folder with neither config.json nor checkpoints",
    empty_file: "x.pt: an empty file",
    damaged_folder: r"x: damaged checkpoint \(model.safetensors does not have its checksum\)",
    tied_with_another_head: "tie_word_embeddings is true, and lm_head.weight is not",
    scaled_rope("longrope"): "rotary positions scaled by longrope",
    scaled_rope("llama3"): "rotary positions scaled by llama3 without low_freq_factor",
    old_scaled_rope: r"rotary positions scaled by dynamic \(rope_scaling\)",
    another_architecture: "model_type=gemma2 is not computed as a Llama is",
    settings_out_of_range: "num_attention_heads=5",
    broken_config: "config.json: not JSON",
    missing_path: "nowhere: no such file or folder",
}


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_bad_input_is_one_line_and_nothing_is_written(make, tmp_path):
    (tmp_path / "in").mkdir()
    source = make(tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=CASES[make]) as caught:
        main([str(source), str(tmp_path / "out/x.safetensors")])
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_exits_with_2_and_prints_the_line(tmp_path):
    malicious_torch(tmp_path)
    done = run_python("-m", "convert", "x.pt", "hf", "--to", "hf", folder=tmp_path, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: x.pt: holds Python objects that would run code")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_a_tokenizer_of_another_size_is_refused(tmp_path, trained_run):
    stories = list(generate_stories(seed=1, start=0, stop=100))
    other = train_tokenizer(stories, config=TokenizerConfig(kind="bytelevel"), vocab_size=300)
    path = other.save(tmp_path)
    for source in (trained_run, save_torch(tmp_path / "x.pt", foreign())):
        with pytest.raises(InputError, match=r"the tokenizer has 300 tokens and the model \d+\."):
            main([str(source), str(tmp_path / "y.safetensors"), "--tokenizer", str(path)])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tokenizer.json", "x.pt"]


def foreign() -> dict:
    bundle = random_bundle()
    return {"model": meta_state(bundle), "model_args": meta_arguments(bundle.model)}


def test_what_is_there_stays_unless_asked(tmp_path):
    source = save_torch(tmp_path / "x.pt", foreign())
    (tmp_path / "y.safetensors").write_text("mine")
    for target in ("y.safetensors", "x.pt"):
        with pytest.raises(InputError, match=f"{target}: already there.*--overwrite"):
            main([str(source), str(tmp_path / target)])
    with pytest.raises(InputError, match="y.safetensors: not a known format"):
        main([str(source), str(tmp_path / "y.safetensors"), "--overwrite"])
    assert (tmp_path / "y.safetensors").read_text() == "mine"
    convert.write(random_bundle(seed=5), tmp_path / "z.safetensors")
    convert.write(random_bundle(seed=5), tmp_path / "hf", to="hf")
    for target, to in (("z.safetensors", "safetensors"), ("hf", "hf")):
        main([str(source), str(tmp_path / target), "--to", to, "--overwrite"])
        np.testing.assert_array_equal(
            convert.read(tmp_path / target).weights["norm.weight"],
            random_bundle().weights["norm.weight"],
        )
    names = ["hf", "hf.1", "x.pt", "y.safetensors", "z.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


@pytest.mark.parametrize("verify", [True, False])
def test_a_write_that_fails_leaves_nothing(verify, tmp_path, monkeypatch):
    source = save_torch(tmp_path / "x.pt", foreign())

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion.huggingface, "write_tensors", full)
    flags = [] if verify else ["--no-verify"]
    with pytest.raises(OSError, match="No space left"):
        main([str(source), str(tmp_path / "new/hf"), "--to", "hf", *flags])
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_a_copy_that_is_not_the_same_model_is_not_kept(tmp_path, monkeypatch):
    source = save_torch(tmp_path / "x.pt", foreign())
    write = conversion.safetensors.write

    def scramble(bundle, path):
        name = "layers.1.mlp.up_proj.weight"
        bundle.weights[name] = bundle.weights[name][::-1].copy()
        write(bundle, path)

    monkeypatch.setattr(conversion.safetensors, "write", scramble)
    with pytest.raises(
        InputError, match=r"not the same model: layers.1.mlp.up_proj.weight changed"
    ):
        main([str(source), str(tmp_path / "y.safetensors")])
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]
    main([str(source), str(tmp_path / "y.safetensors"), "--no-verify"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["out"], r"out: its name does not say which format. Add --to orbax\|torch"),
        (["out.bin", "--dtype", "float16"], "llama2.c holds float32"),
        (["out.pt", "--dtype", "q8_0"], "only gguf and llama2c hold it"),
        (["out.pt", "--to", "zip"], "invalid choice: 'zip'"),
        (["out.pt", "--config", "tinny"], "--config 'tinny': no such preset or file"),
        (["out.pt", "--tokenizer", "gone.model"], "gone.model: no such tokenizer file"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_torch(tmp_path / "x.pt", foreign())
    with pytest.raises(InputError, match=message):
        main(["x.pt", *flags])
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_values_too_large_for_a_type_are_refused(tmp_path):
    bundle = random_bundle(changed(GROUPED))
    bundle.weights["norm.weight"][3] = 1e6
    convert.write(bundle, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"norm.weight: holds values too large for float16"):
        main([str(tmp_path / "x.safetensors"), str(tmp_path / "y.pt"), "--dtype", "float16"])


def test_a_folder_that_gives_way_is_set_aside_with_all_it_holds(trained_run, tmp_path, capsys):
    target = tmp_path / "project"
    (target / "checkpoints").mkdir(parents=True)
    (target / "precious.txt").write_text("mine")
    assert main([str(trained_run), str(target), "--to", "hf", "--overwrite", "--no-verify"]) == 0
    assert (target / "model.safetensors").is_file()
    assert (tmp_path / "project.1/precious.txt").read_text() == "mine"
    assert f"what was in {target} is in {target}.1 now" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"rope_scaling": {"rope_type": "yarn"}}, "scaled by yarn"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"rope_parameters": [1]}, "is no table"),
    ],
)
def test_settings_that_the_model_does_not_compute_are_refused_beside_a_pt_file(
    table, expected, trained_run, tmp_path
):
    weights = {
        f"model.{name}": torch.tensor(np.array(array))
        for name, array in convert.read(trained_run).weights.items()
    }
    torch.save(weights, tmp_path / "x.pth")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | table))
    with pytest.raises(InputError, match=expected):
        convert.read(tmp_path / "x.pth")
    torch.save({"model": weights, "config": table}, tmp_path / "y.pth")
    with pytest.raises(InputError, match=expected):
        convert.read(tmp_path / "y.pth")


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"0" * 1_000_000)
    with pytest.raises(InputError, match="a compressed archive"):
        convert.read(tmp_path / "x.pt")


def test_a_number_of_layers_that_no_file_holds_is_one_short_line(trained_run, tmp_path):
    convert.write(convert.read(trained_run), tmp_path / "hf", to="hf")
    path = tmp_path / "hf/config.json"
    table = json.loads(path.read_text()) | {"num_hidden_layers": 10**6}
    path.write_text(json.dumps(table))
    with pytest.raises(InputError, match="num_hidden_layers=1000000, and there are") as caught:
        convert.read(tmp_path / "hf")
    assert len(str(caught.value)) < 300
