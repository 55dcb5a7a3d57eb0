"""Run by `make wheel` where only the wheel is installed: every package, preset and page file is there."""

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

import convert
import tinyllm_jax
import tinyllm_torch
from tinyllm_jax.config import mode_names, preset_names

SMALL = ["--max-steps", "2", "--data.toy_documents", "300", "--train.eval_batches", "1"]


def tinyllm(folder: str, *words: str) -> str:
    """Run the console script in a folder; gives what it prints."""
    script = Path(sys.executable).parent / "tinyllm"
    ended = subprocess.run([script, *words], cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout + ended.stderr


def main() -> None:
    """Look at what is installed, then train, write and answer with it."""
    for package in (convert, tinyllm_jax, tinyllm_torch):
        place = Path(str(package.__file__))
        assert "site-packages" in place.parts, f"{place} is not the installed one"
    assert "tiny" in preset_names()
    assert set(mode_names()) == {"sft", "dpo", "reward", "rlhf"}
    page = Path(str(tinyllm_jax.__file__)).parent / "server" / "page"
    assert (page / "index.html").is_file(), "the page is not in the wheel"
    assert importlib.metadata.metadata("tinyllm")["License-Expression"] == "Apache-2.0"
    with tempfile.TemporaryDirectory() as folder:
        tinyllm(folder, "train", "--config", "tiny", *SMALL)
        run = "checkpoints/pretrain_tiny"
        story = tinyllm(folder, "generate", "--checkpoint", run, "--max-new-tokens", "5")
        assert "Once upon a time" in story
        assert "--port" in tinyllm(folder, "serve", "--help")
    print(f"tinyllm {importlib.metadata.version('tinyllm')}: the wheel works by itself")


if __name__ == "__main__":
    main()
