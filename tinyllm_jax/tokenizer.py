"""Train a tokenizer by itself: `python -m tinyllm_jax.tokenizer train --input GLOB... --out PATH`.

Training a model does it when it must; this is for sharing one tokenizer between runs, with
`--tokenizer.path PATH`.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from tinyllm_jax.cli import run
from tinyllm_jax.config import Config, DataConfig, TokenizerConfig
from tinyllm_jax.errors import InputError
from tinyllm_jax.settings import Parser, add_flags, build, parse_flags


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """The sections of `Config` that a tokenizer depends on."""

    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)

    def problems(self) -> list[str]:
        """List broken rules between settings: there are none to break."""
        return []


def main(words: Sequence[str] | None = None) -> int:
    """Train as the command line says and print what one line of text becomes."""
    parser = Parser(
        prog="python -m tinyllm_jax.tokenizer",
        description="Train a tokenizer on the training documents of a corpus.",
    )
    parser.add_argument("command", choices=["train"], help="what to do")
    parser.add_argument(
        "--input",
        nargs="+",
        metavar="GLOB",
        dest="data.paths",
        help="files, folders or globs of text; the same as --data",
    )
    parser.add_argument(
        "--vocab-size", metavar="N", required=True, help="entries of the vocabulary (tokens)"
    )
    parser.add_argument(
        "--out", metavar="PATH", required=True, help="folder, or the file itself by its name"
    )
    add_flags(parser, TokenizerSettings)
    arguments, overrides, problems = parse_flags(parser, TokenizerSettings, words)
    settings = build(TokenizerSettings, [("", overrides)], problems)
    refuse_useless(settings.tokenizer)
    vocab_size = build(Config, [("", {"model.vocab_size": arguments.vocab_size})]).model.vocab_size

    from tinyllm_jax.data.corpus import find_parts, sample_documents
    from tinyllm_jax.data.prepare import GROUP_BYTES
    from tinyllm_jax.data.tokenizer import train_tokenizer

    parts = find_parts(settings.data, part_bytes=GROUP_BYTES)
    documents = sample_documents(
        parts, settings.data, max_bytes=settings.tokenizer.max_sample_bytes
    )
    shown = tqdm(
        documents,
        desc="training tokenizer",
        unit=" documents",
        disable=not sys.stderr.isatty(),
    )
    tokenizer = train_tokenizer(iter(shown), config=settings.tokenizer, vocab_size=vocab_size)
    path = tokenizer.save(folder_of(Path(arguments.out), file_name=tokenizer.file_name))
    text = "Once upon a time there was a little girl."
    ids = tokenizer.encode(text)
    print(path)
    print(
        f"{tokenizer.vocab_size} tokens, sha256 {tokenizer.hash}\n{text!r} is {len(ids)} tokens: "
        + "|".join(map(tokenizer.token_text, ids)),
        file=sys.stderr,
    )
    return 0


def refuse_useless(tokenizer: TokenizerConfig) -> None:
    """Refuse settings that say which tokenizer a run takes.

    Raises:
        InputError: names the setting.
    """
    for name in ("tokenizer.path", "tokenizer.retrain"):
        if getattr(tokenizer, name.split(".")[1]):
            raise InputError(
                f"{name} is for training a model; this command always trains a tokenizer anew. "
                "Leave it out."
            )


def folder_of(out: Path, *, file_name: str) -> Path:
    """Read `--out` as the folder to write into.

    Raises:
        InputError: it names a file that this kind of tokenizer is not called.
    """
    if out.name == file_name:
        return out.parent
    if out.suffix in (".model", ".json"):
        raise InputError(
            f"--out {out}: this kind of tokenizer is a file named {file_name}. Name a folder, or "
            f"{out.with_name(file_name)}."
        )
    return out


if __name__ == "__main__":
    run(main)
