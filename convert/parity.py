"""Prove on a checkpoint that JAX and PyTorch compute the same: `python -m convert.parity SRC`."""

import argparse
import dataclasses
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.bundle import Bundle
from convert.conversion import read
from convert.parity_sample import Sample, sample_of
from tinyllm_jax.cli import run, say
from tinyllm_jax.config import ModelConfig, load_config
from tinyllm_jax.errors import InputError
from tinyllm_jax.settings import Parser

if TYPE_CHECKING:
    from convert.transformers_side import TransformersSide
    from convert.twins import Side

# Largest difference between the twins, relative to the largest magnitude; docs/parity.md has what was
# measured. bfloat16 keeps 8 bits: either twin is up to 1.7 % of the largest number away from what
# float32 gives, and they are as far from each other, since sums in another order round another way.
TOLERANCES = {"float64": 1e-10, "float32": 2e-5, "bfloat16": 2e-2}
# Models of more parameters are compared in float32: in float64 weights, moments and gradients of
# both sides would take gigabytes.
LARGEST_IN_FLOAT64 = 50_000_000
GREEDY_TOKENS = 100
# What routers are told to do and did: the losses that keep them even, each expert's share.
ROUTING = ("router_balance_loss", "router_z_loss", "expert_load")
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    absolute: float  # the largest difference of all arrays
    relative: float  # the largest of each array's, by the largest magnitude in it
    where: str  # the place of the relative one
    tolerance: float  # of the relative difference
    absolute_at: str = ""  # the place of the absolute one

    @property
    def passed(self) -> bool:
        """Tell whether it is within the tolerance; what is no number is not."""
        return self.relative <= self.tolerance


def main(words: Sequence[str] | None = None) -> int:
    """Compare as the command line says, and print the table; 1 if anything differs."""
    arguments = read_command(words)
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            "torch: not installed, and half of the comparison runs in it. Type: pip install "
            "'tinyllm[torch]'"
        )
    settings = load_config(arguments.config).model if arguments.config else None
    bundle = read(arguments.source, arguments.tokenizer, settings=settings, say=say)
    check_finite(bundle)
    count = sum(array.size for array in bundle.weights.values())
    dtype = arguments.dtype or ("float64" if count <= LARGEST_IN_FLOAT64 else "float32")
    model = comparable(bundle.model, dtype)
    sample = sample_of(bundle, text=arguments.text, prompt=arguments.prompt)
    # Only now: both frameworks take seconds to import, and bad input should not wait for them.
    from convert.twins import JaxSide, TorchSide
    from tinyllm_jax.compilation_cache import enable_compilation_cache

    enable_compilation_cache()
    print(heading(bundle, count, dtype, sample))  # noqa: T201
    theirs, ours = JaxSide(model, bundle.weights), TorchSide(model, bundle.weights)
    tokens = min(arguments.tokens, model.max_position_embeddings - len(sample.prompt))
    oracle, note = transformers_side(bundle, dtype)
    passed = True
    print(table_line("compared", "absolute", "relative", "tolerance", "result", "largest at"))  # noqa: T201
    layers: list[Row] = []
    for row in compare(bundle, model, sample, ours, theirs, oracle, tokens=tokens, layers=layers):
        print(row_text(row), flush=True)  # noqa: T201
        passed = passed and row.passed
    print("\nresidual stream after")  # noqa: T201
    for row in layers:
        print(row_text(row))  # noqa: T201
        passed = passed and row.passed
    if note:
        print(f"\n{note}")  # noqa: T201
    print("\nThe two compute the same." if passed else "\nFAIL: docs/parity.md says where to look.")  # noqa: T201
    return 0 if passed else 1


def read_command(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        prog="python -m convert.parity",
        description="Compute with a checkpoint in JAX, in the PyTorch twin and, where it is "
        "installed, in transformers, and print how far they are apart. Exit code 0: all within the "
        "tolerance; 1: something is not.",
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="a checkpoint of any format")
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="a SentencePiece .model, tokenizer.json or llama2.c tokenizer.bin, where SRC has none; "
        "none compares on random tokens",
    )
    parser.add_argument(
        "--config",
        metavar="NAME|FILE.toml",
        help="settings of the model, where SRC holds tensors only",
    )
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", metavar="FILE", type=Path, help="compare on this UTF-8 text")
    text.add_argument("--prompt", metavar="TEXT", help="compare on this text")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float64"),
        help="compute in this type (default float64, above 50 million parameters float32)",
    )
    parser.add_argument(
        "--tokens",
        metavar="N",
        type=int,
        default=GREEDY_TOKENS,
        help=f"greedy tokens, as far as the context goes (default {GREEDY_TOKENS})",
    )
    arguments = parser.parse_args(words)
    if arguments.tokens < 1:
        raise InputError(f"--tokens={arguments.tokens} is below 1. Give 1 or more.")
    return arguments


def check_finite(bundle: Bundle) -> None:
    """Refuse weights and moments that are no numbers: nothing equals what is computed from them."""
    training = bundle.training
    groups = {"": bundle.weights}
    if training:
        groups |= {"first moment of ": training.first, "second moment of ": training.second}
    bad = [
        f"{group}{name}"
        for group, arrays in groups.items()
        for name, array in arrays.items()
        if not np.isfinite(array).all()
    ]
    if bad:
        raise InputError(
            f"{bundle.layout['read_from']}: holds values that are not finite, in {', '.join(bad)}. "
            "Compare an earlier checkpoint."
        )


def comparable(model: ModelConfig, dtype: str) -> ModelConfig:
    """Give the model without what differs on purpose: drawn dropout and a kernel's own order."""
    return dataclasses.replace(
        model,
        compute_dtype=dtype,
        attention="reference",
        embedding_dropout=0.0,
        attention_dropout=0.0,
        residual_dropout=0.0,
        mlp_dropout=0.0,
    )


def transformers_side(bundle: Bundle, dtype: str) -> "tuple[TransformersSide | None, str]":
    """Make transformers' model, or say why it is left out."""
    if importlib.util.find_spec("transformers") is None:
        return (
            None,
            "transformers: not installed, so it was left out. Type: pip install transformers",
        )
    from convert.transformers_side import TransformersSide

    try:
        return TransformersSide(bundle, dtype=dtype), ""
    except InputError as error:
        return None, f"transformers: left out, since the model is not exported: {error}"


# What is compared --------------------------------------------------------------------------------


def compare(
    bundle: Bundle,
    model: ModelConfig,
    sample: Sample,
    ours: "Side",
    theirs: "Side",
    oracle: "TransformersSide | None",
    *,
    tokens: int,
    layers: list[Row],
) -> Iterator[Row]:
    """Compare the twin with JAX, and transformers with JAX; `layers` is filled on the way."""
    from convert.twins import start_of

    tolerance = TOLERANCES[model.compute_dtype]
    actual, expected = ours.numbers(sample.batch), theirs.numbers(sample.batch)
    for name in ("logits", "loss"):
        yield difference(name, {name: actual.pop(name)}, {name: expected.pop(name)}, tolerance)
    if model.num_experts > 0:
        ours_did, theirs_did = ({n: each.pop(n) for n in ROUTING} for each in (actual, expected))
        yield difference("routing", ours_did, theirs_did, tolerance)
    yield difference("gradients", actual, expected, tolerance)
    del actual, expected

    start = start_of(bundle, model)
    what = f"{OPTIMIZERS[start.config.optimizer.name]}, update {start.count + 1}"
    yield difference(
        what, ours.step(start, sample.batch), theirs.step(start, sample.batch), tolerance
    )
    del start

    own, expected_layers = ours.by_layer(sample.rows), theirs.by_layer(sample.rows)
    at_once = expected_layers.pop()
    for index, pair in enumerate(zip(own, expected_layers, strict=False)):
        layers.append(difference(f"  layer {index}", {"": pair[0]}, {"": pair[1]}, tolerance))
    prompt = max(1, sample.rows.shape[1] // 4)
    decoded = {"twin": ours.decode(sample.rows, prompt=prompt)}
    decoded["JAX"] = theirs.decode(sample.rows, prompt=prompt)
    yield difference("KV cache", decoded, dict.fromkeys(decoded, at_once), tolerance)

    story = theirs.greedy(sample.prompt, count=tokens)
    prefix = sample.prompt

    def parting(what: str, found: list[int], tolerance: float) -> Row:
        return parted(what, found, story, prefix, lambda rows: theirs.by_layer(rows)[-1], tolerance)

    yield parting(f"greedy, {tokens} tokens", ours.greedy(prefix, count=tokens), tolerance)
    yield from filter_rows(ours, theirs, at_once, sample, tolerance)
    if oracle is not None:
        # Its norms, angles and softmax are in float32, whatever else is.
        wide = max(tolerance, TOLERANCES["float32"])
        found = {"logits": oracle.logits(sample.rows)}
        yield difference("transformers: logits", found, {"logits": at_once}, wide)
        theirs_too = oracle.greedy(prefix, count=tokens)
        yield parting(f"transformers: greedy, {tokens}", theirs_too, wide)


def filter_rows(
    ours: "Side", theirs: "Side", logits: np.ndarray, sample: Sample, tolerance: float
) -> Iterator[Row]:
    """Compare what each sampling filter leaves of the same logits."""
    from convert.twins import FILTERS

    flat = logits.reshape(-1, logits.shape[-1])
    same = np.ascontiguousarray(flat[np.linspace(0, len(flat) - 1, len(FILTERS)).astype(int)])
    present = np.zeros(same.shape, bool)
    present[:, sample.rows[0]] = True
    actual, expected = ours.filters(same, present), theirs.filters(same, present)
    for name in ("repetition penalty", "temperature", "top-k", "top-p", "all of them"):
        yield difference(f"filter: {name}", {"": actual[name]}, {"": expected[name]}, tolerance)


def difference(
    what: str, actual: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float
) -> Row:
    """Find the largest difference and, of all arrays, the largest relative to its own magnitude."""
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    absolute, relative = (-1.0, ""), (-1.0, "")
    for name, wanted in expected.items():
        one, other = (np.asarray(array).astype(np.float64) for array in (actual[name], wanted))
        assert one.shape == other.shape, f"{name}: {one.shape} is not {other.shape}"
        with np.errstate(invalid="ignore"):
            gap = np.where(one == other, 0.0, np.abs(one - other))
        finite = np.abs(other[np.isfinite(other)])
        place = np.unravel_index(int(np.argmax(gap)), gap.shape)
        largest = float(gap[place])
        found = where(name, what, place) if largest else ""
        absolute = worse(absolute, (largest, found))
        relative = worse(relative, (largest / (float(finite.max(initial=0.0)) or 1.0), found))
    return Row(what, absolute[0], relative[0], relative[1], tolerance, absolute[1])


def worse(one: tuple[float, str], other: tuple[float, str]) -> tuple[float, str]:
    """Choose the larger of two differences with their places; nothing is worse than no number."""
    return one if math.isnan(one[0]) or other[0] <= one[0] else other


def where(name: str, what: str, place: tuple[Any, ...]) -> str:
    """Name the place of a number: the weight, or row and token of logits and states."""
    if name == what:
        name = ""
    if len(place) == 3:
        position = f"row {place[0]}, position {place[1]}"
        return f"{name}: {position}" if name in ("JAX", "twin") else position
    if what.startswith("filter"):
        return f"row {place[0]}, token {place[1]}"
    return name


def parted(
    what: str,
    actual: list[int],
    expected: list[int],
    prompt: list[int],
    logits: Callable[[np.ndarray], np.ndarray],
    tolerance: float,
) -> Row:
    """Compare two greedy texts; where they part, by how far apart the two tokens' logits are.

    Two logits that are equal within the tolerance may be told apart by rounding alone.
    """
    pairs = enumerate(zip(actual, expected, strict=True))
    place = next((index for index, (one, other) in pairs if one != other), None)
    if place is None:
        return Row(what, 0.0, 0.0, "", tolerance)
    text = np.array([[*prompt, *expected[:place]]], np.int32)
    last = logits(text)[0, -1].astype(np.float64)
    gap = float(last[expected[place]] - last[actual[place]])
    shown = f"token {place}: {actual[place]} instead of {expected[place]}"
    return Row(what, gap, gap / (float(np.abs(last).max()) or 1.0), shown, tolerance)


# What is printed ---------------------------------------------------------------------------------


def heading(bundle: Bundle, count: int, dtype: str, sample: Sample) -> str:
    """Say what is compared."""
    training = bundle.training
    moments = (
        f"moments of step {training.step}" if training else "no moments, so AdamW starts at zero"
    )
    return (
        f"{bundle.layout['read_from']}: {bundle.layout['format']}, {count:,} parameters, {moments}\n"
        f"JAX and PyTorch in {dtype}, on {sample.text}; relative to the largest number of an array\n"
    )


def row_text(row: Row) -> str:
    """Write one line of the table."""
    return table_line(
        row.what,
        f"{row.absolute:.1e}",
        f"{row.relative:.1e}",
        f"{row.tolerance:.0e}",
        "pass" if row.passed else "FAIL",
        row.where
        if row.absolute_at in ("", row.where)
        else f"{row.where} (absolute: {row.absolute_at})",
    )


def table_line(
    what: str, absolute: str, relative: str, tolerance: str, result: str, place: str
) -> str:
    """Put cells under one another."""
    return f"{what:<27}{absolute:>9}{relative:>10}{tolerance:>11}  {result:<6}  {place}".rstrip()


if __name__ == "__main__":
    run(main)
