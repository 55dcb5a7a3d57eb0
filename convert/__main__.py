"""Convert a checkpoint: `python -m convert SRC DST --to hf`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert.conversion import DTYPE_WORDS, TARGETS, Report, convert
from tinyllm_jax.cli import run, say
from tinyllm_jax.config import load_config
from tinyllm_jax.settings import Parser


def main(words: Sequence[str] | None = None) -> int:
    """Convert as the command line says, and report on stdout."""
    arguments = read_command(words)
    settings = load_config(arguments.config).model if arguments.config else None
    report = convert(
        arguments.source,
        arguments.target,
        to=arguments.to,
        tokenizer=arguments.tokenizer,
        settings=settings,
        dtype=arguments.dtype,
        llama2c_version=arguments.llama2c_version,
        verify=not arguments.no_verify,
        overwrite=arguments.overwrite,
        say=say,
    )
    print(report_text(report, arguments))  # noqa: T201
    return 0


def read_command(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        prog="python -m convert",
        description="Move a checkpoint to another framework or format; what SRC is, its content "
        "tells. DST appears whole, and only after it was read back and compared.",
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="a checkpoint of any format")
    parser.add_argument("target", metavar="DST", type=Path, help="a file or folder not yet there")
    parser.add_argument("--to", choices=TARGETS, help="format of DST (default: by its ending)")
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="a SentencePiece .model, tokenizer.json or llama2.c tokenizer.bin, where SRC has none "
        "or another is wanted; none leaves it out",
    )
    parser.add_argument(
        "--config",
        metavar="NAME|FILE.toml",
        help="settings of the model, where SRC holds tensors only",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPE_WORDS,
        help="type of the weights (default: as stored; half precision becomes float32 in orbax)",
    )
    parser.add_argument(
        "--llama2c-version",
        type=int,
        choices=(0, 1, 2),
        default=0,
        help="0: float32 for run.c; 1: float32 with a header; 2: int8 for runq.c (default 0)",
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not read DST back and compare it"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint at DST")
    return parser.parse_args(words)


def report_text(report: Report, arguments: argparse.Namespace) -> str:
    """Write the report, a line a fact."""
    step = "" if report.step is None else f", step {report.step}"
    lines = [
        f"Source   {report.source['read_from']} ({report.source_bytes:,} bytes): {describe(report.source)}",
        f"Target   {arguments.target} ({report.target_bytes:,} bytes)"
        + (f": {describe(report.target)}" if report.target else ""),
        f"Tensors  {report.tensors}{moments_text(report)}{step}",
    ]
    if report.largest_difference is None:
        lines.append("Logits   not compared (--no-verify)")
    else:
        lines.append(
            f"Logits   largest difference {report.largest_difference:.3g}, "
            f"{report.relative_difference:.2%} of their spread"
        )
    return "\n".join([*lines, *(f"Note     {note}" for note in report.notes)])


def moments_text(report: Report) -> str:
    """Say which moments came along; Muon keeps no second one of the matrices that it updates."""
    if report.moments is None:
        return ""
    first, second = report.moments
    return (
        ", and both moments of each"
        if first == second
        else f", a first moment of each and {second} second ones"
    )


def describe(layout: dict[str, Any]) -> str:
    """Say in one line how a checkpoint holds its weights."""
    matrices = "[in, out]" if layout["transposed"] else "[out, in]"
    tying = "head tied to the embedding" if layout["tied"] else "head of its own"
    return f"{layout['format']}, {layout['dtype']}, rope {layout['rope']}, matrices {matrices}, {tying}"


if __name__ == "__main__":
    run(main)
