"""What every format is read into and written from.

Weights have Hugging Face's names without prefix (`layers.0.self_attn.q_proj.weight`,
`lm_head.weight` only where the head is a matrix of its own). Matrices are [out, in], PyTorch's
layout; rotary positions are half-split. Arrays may be views of files and need not be contiguous.
"""

import copy
import dataclasses
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.checks import listed, parse_json, read_count, read_number, run_settings, shown
from tinyllm_jax.config import Config, ModelConfig, config_from_table, config_to_table
from tinyllm_jax.data.tokenizer import Tokenizer, check_tokenizer_hash
from tinyllm_jax.errors import InputError
from tinyllm_jax.training.weight_shapes import SCORES, weight_shapes

META_FORMAT = 1
META_OF_MODEL = ("format", "config")
META_OF_TRAINING = (*META_OF_MODEL, "step", "count", "nonfinite_streak", "dataset_hash", "best")
DTYPES: dict[str, np.dtype] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
WITHOUT_VALUES = "the value function that PPO trained beside the model was left out"
Arrays = dict[str, np.ndarray]
_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(.+)")


@dataclass
class Training:
    """What a run needs, beside its weights, to go on as if it had never stopped."""

    config: Config
    step: int  # batches taken
    count: int  # updates applied
    first: Arrays  # running mean of the gradient, under the names and in the layout of the weights
    second: Arrays  # running mean of its square
    nonfinite_streak: int
    seed: int
    rows_per_step: int
    dataset_hash: str  # "" where the source does not say which data it was
    best: dict[str, Any] | None  # {"step", "loss"} of the lowest validation loss


@dataclass
class Bundle:
    """One model, wherever it came from."""

    model: ModelConfig
    weights: Arrays
    tokenizer: Tokenizer | None
    training: Training | None  # None where the source has weights only
    layout: dict[str, Any]  # what the source was like: format, rope, tied, transposed, dtype, notes
    run: Config | None = None  # settings of the run that it comes from; None for others' files

    def note(self, text: str) -> None:
        """Keep something for the report that a person should know."""
        self.layout.setdefault("notes", []).append(text)


def make_layout(
    *, format: str, rope: str, tied: bool, transposed: bool, weights: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Describe how a source holds its weights; `transposed` is true for matrices [in, out]."""
    return {
        "format": format,
        "rope": rope,
        "tied": tied,
        "transposed": transposed,
        "dtype": dtype_names(weights.values()),
    }


def dtype_names(arrays: Iterable[np.ndarray]) -> str:
    """Name the types of arrays, such as "float32" or "float16, float32"."""
    return ", ".join(sorted({array.dtype.name for array in arrays}))


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """List every weight of a model with its shape, in the order of the forward pass."""
    return dict(weight_shapes(config))


def check_moments(first: Arrays, second: Arrays, config: Config, *, origin: str) -> None:
    """Refuse moments that are not those of the model under the optimizer of the run.

    Muon keeps no second moment of the matrices that it updates.

    Raises:
        InputError: the missing, unknown and misshapen tensors, by name, in one line.
    """
    check_tensors(first, config.model, origin=f"{origin} (first moments)")
    kept = {
        name: array
        for name, array in first.items()
        if config.optimizer.name == "muon" and _is_hidden_matrix(name)
    }
    unknown = [name for name in kept if name in second]
    if unknown:
        raise InputError(
            f"{origin} (second moments): Muon keeps none of {listed(unknown)}. Give the settings it "
            "was trained with."
        )
    check_tensors(kept | second, config.model, origin=f"{origin} (second moments)")


def _is_hidden_matrix(name: str) -> bool:
    return name.startswith("layers.") and name.endswith("_proj.weight")


def check_tensors(arrays: Mapping[str, np.ndarray], config: ModelConfig, *, origin: str) -> None:
    """Refuse weights that are not exactly those of the model.

    Raises:
        InputError: the missing, unknown and misshapen tensors, by name, in one line.
    """
    # Before a list of that many names is made.
    if config.num_hidden_layers > len(arrays):
        raise InputError(
            f"{origin}: num_hidden_layers={config.num_hidden_layers}, and there are {len(arrays)} "
            "tensors. Give the settings it was trained with."
        )
    if config.num_hidden_layers * config.num_experts > len(arrays):
        raise InputError(
            f"{origin}: num_experts={config.num_experts} in each of {config.num_hidden_layers} "
            f"layers, and there are {len(arrays)} tensors. Give the settings it was trained with."
        )
    shapes = expected_shapes(config)
    missing = [name for name in shapes if name not in arrays]
    unknown = [name for name in arrays if name not in shapes]
    misshapen = [
        f"{name} has shape {shown(list(array.shape))} instead of {list(shapes[name])}"
        for name, array in arrays.items()
        if name in shapes and array.shape != shapes[name]
    ]
    not_numbers = [
        f"{name} has type {array.dtype.name}"
        for name, array in arrays.items()
        if name in shapes and array.dtype not in DTYPES.values()
    ]
    kinds = {
        "missing": missing,
        "unknown": unknown,
        "misshapen": misshapen,
        "of a type no weight has": not_numbers,
    }
    problems = [f"{kind}: {listed(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise InputError(
            f"{origin}: its tensors are not those of this model ({'; '.join(problems)}). "
            "Give the settings it was trained with, or convert it with the tool it came from."
        )


def check_tokenizer(bundle: Bundle, *, origin: str, may_be_smaller: bool) -> None:
    """Refuse a tokenizer whose ids are not those of the model's embedding.

    Args:
        may_be_smaller: The embedding may have rows that the tokenizer has no token for, as
            Hugging Face folders do that were padded to a round size.
    """
    tokenizer, rows = bundle.tokenizer, bundle.model.vocab_size
    if tokenizer is None or tokenizer.vocab_size == rows:
        return
    if tokenizer.vocab_size < rows and may_be_smaller:
        bundle.note(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the embedding {rows} rows; the "
            "rows beyond are kept"
        )
        return
    raise InputError(
        f"{origin}: the tokenizer has {tokenizer.vocab_size} tokens and the model {rows}. Give the "
        "one it was trained with, as --tokenizer PATH, or --tokenizer none to leave it out."
    )


def settle_tying(weights: Arrays, declared: bool | None, *, origin: str) -> bool:
    """Decide whether the head is the embedding table, and drop its copy where it is.

    Raises:
        InputError: it is declared to be tied, and the file has another head.
    """
    head = weights.get("lm_head.weight")
    if head is None:
        return declared is not False
    table = weights.get("embed_tokens.weight")
    same = table is not None and table.shape == head.shape and np.array_equal(table, head)
    if declared and not same:
        raise InputError(
            f"{origin}: tie_word_embeddings is true, and lm_head.weight is not the embedding "
            "table. Set it to false in the file's config, or take lm_head.weight out."
        )
    tied = same if declared is None else declared
    if tied:
        del weights["lm_head.weight"]
    return tied


def model_config(fields: Mapping[str, Any], *, origin: str) -> ModelConfig:
    """Make the settings of a model, checked as those of a run are.

    Raises:
        InputError: a value is out of range, or does not fit the others.
    """
    return default_run(fields, origin=origin).model


def default_run(model: Mapping[str, Any], *, origin: str) -> Config:
    """Make the settings of a run that trains this model, all others as they are by default.

    Raises:
        InputError: a value is out of range, or does not fit the others; in one line.
    """
    defaults = Config()
    longest = model.get("max_position_embeddings", defaults.model.max_position_embeddings)
    data: dict[str, Any] = {}
    if isinstance(longest, (int, float)) and longest < defaults.data.sequence_length:
        data["sequence_length"] = longest
    return run_settings({"model": dict(model), "data": data}, origin=origin)


def run_config(bundle: Bundle) -> Config:
    """Give the settings of the run a bundle comes from, or default ones around its model."""
    if bundle.training:
        return bundle.training.config
    if bundle.run:
        run = dataclasses.replace(bundle.run, model=bundle.model)
    else:
        run = default_run(dataclasses.asdict(bundle.model), origin="model")
    table = config_to_table(run)
    if bundle.tokenizer:
        table["tokenizer"]["kind"] = bundle.tokenizer.kind
    return config_from_table(table, origin="model")


def meta_table(bundle: Bundle) -> dict[str, Any]:
    """Write all that is no array, in the form of a step folder's `meta.json`."""
    config, training = run_config(bundle), bundle.training
    step = training.step if training else 0
    return {
        "format": META_FORMAT,
        "step": step,
        "data_position": {"next_step": step, "rows_per_step": config.rows_per_step},
        "seed": config.train.seed,
        "config": config_to_table(config),
        "tokenizer_hash": bundle.tokenizer.hash if bundle.tokenizer else "",
        "dataset_hash": training.dataset_hash if training else "",
        "best": training.best if training else None,
        "count": training.count if training else 0,
        "nonfinite_streak": training.nonfinite_streak if training else 0,
        "layout": bundle.layout,
    }


def from_meta_table(
    text: bytes | str,
    *,
    weights: Arrays,
    first: Arrays,
    second: Arrays,
    tokenizer: Tokenizer | None,
    format: str,
    origin: str,
) -> Bundle:
    """Make a bundle of arrays and the text that `meta_table` gave.

    Raises:
        InputError: the text is no such table, or the arrays are not those of its model.
    """
    meta = parse_json(text, origin=f"{origin}: its metadata")
    needed = META_OF_TRAINING if first or second else META_OF_MODEL
    if not isinstance(meta, dict) or not set(needed) <= meta.keys():
        raise InputError(
            f"{origin}: its metadata is no table of {', '.join(needed)}. Convert the source again."
        )
    if meta["format"] != META_FORMAT:
        raise InputError(
            f"{origin}: checkpoint format {shown(meta['format'])}, this version reads "
            f"{META_FORMAT}. Use the version of tinyllm that wrote it."
        )
    config = run_settings(meta["config"], origin=origin)
    known = meta.get("tokenizer_hash")
    if tokenizer is not None and known:
        check_tokenizer_hash(tokenizer, expected=shown(known), origin=origin)
    check_tensors(weights, config.model, origin=origin)
    training = None
    if first or second:
        check_moments(first, second, config, origin=origin)
        training = _training_of(meta, config, first=first, second=second, origin=origin)
    layout = make_layout(
        format=format,
        rope="half-split",
        tied=config.model.tie_word_embeddings,
        transposed=False,
        weights=weights,
    )
    return Bundle(config.model, weights, tokenizer, training, layout, run=config)


def gives_values(config: Config) -> bool:
    """Tell a run whose head for scores gives PPO the values of positions, and judges no answers."""
    return config.model.score_head and config.run.mode == "rlhf"


def without_values(bundle: Bundle) -> Bundle:
    """Leave out a head that gave values, which a finished policy has no use for, and say so.

    The score head of a reward model stays, and so does that of a model that others trained.
    """
    run = bundle.training.config if bundle.training else bundle.run
    if run is None or not gives_values(run) or not bundle.model.score_head:
        return bundle
    model = dataclasses.replace(bundle.model, score_head=False)
    weights = {name: array for name, array in bundle.weights.items() if name != SCORES}
    bundle = dataclasses.replace(
        bundle, model=model, weights=weights, layout=copy.deepcopy(bundle.layout)
    )
    bundle.note(WITHOUT_VALUES)
    return bundle


def _training_of(
    meta: Mapping[str, Any], config: Config, *, first: Arrays, second: Arrays, origin: str
) -> Training:
    step, count, streak = (
        read_count(meta[key], what=key, origin=origin)
        for key in ("step", "count", "nonfinite_streak")
    )
    best = meta["best"]
    if best is not None:
        if not isinstance(best, Mapping):
            raise InputError(
                f"{origin}: best={shown(best)} is no table of step and loss. Get the file again."
            )
        loss = read_number(best.get("loss"), float, what="best.loss", origin=origin)
        best = {"step": read_count(best.get("step"), what="best.step", origin=origin), "loss": loss}
    return Training(
        config=config,
        step=step,
        count=count,
        first=first,
        second=second,
        nonfinite_streak=streak,
        seed=config.train.seed,
        rows_per_step=config.rows_per_step,
        dataset_hash=read_number(meta["dataset_hash"], str, what="dataset_hash", origin=origin),
        best=best,
    )


def to_jax(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Rename `X.weight` [out, in] to `X.kernel` [in, out]; table and norms stay.

    Views, no copies, but for experts: `experts.E.X.weight` is `experts.X.kernel[E]`.
    """
    renamed: Arrays = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, array in arrays.items():
        stem = name.removesuffix("weight")
        if not _is_matrix(name, array):
            renamed[name] = array
        elif match := _EXPERT.fullmatch(stem):
            stacked = f"{match[1]}.experts.{match[3]}kernel"
            experts.setdefault(stacked, {})[int(match[2])] = array.T
        else:
            renamed[f"{stem}kernel"] = array.T
    return renamed | {name: np.stack([of[e] for e in sorted(of)]) for name, of in experts.items()}


def from_jax(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Undo `to_jax`."""
    renamed: Arrays = {}
    for name, array in arrays.items():
        stem = name.removesuffix("kernel")
        if stem == name:
            renamed[name] = array
        elif array.ndim == 3:
            home, part = stem.split(".experts.")
            for expert, kernel in enumerate(array):
                renamed[f"{home}.experts.{expert}.{part}weight"] = kernel.T
        else:
            renamed[f"{stem}weight"] = array.T
    return renamed


def _is_matrix(name: str, array: np.ndarray) -> bool:
    return array.ndim == 2 and name != "embed_tokens.weight"


def cast_bundle(bundle: Bundle, dtype: str) -> Bundle:
    """Give the same model with its weights in another type; moments stay as they are.

    Raises:
        InputError: a value is too large for the type.
    """
    wanted = DTYPES[dtype]
    weights = {name: cast(name, array, wanted) for name, array in bundle.weights.items()}
    return dataclasses.replace(bundle, weights=weights)


def cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Bring a weight to a type, refusing to make an infinity of a number."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore", under="ignore"):
        converted = array.astype(dtype)
    if dtype.itemsize < array.dtype.itemsize and not np.array_equal(
        np.isfinite(converted), np.isfinite(array)
    ):
        raise InputError(
            f"{name}: holds values too large for {dtype.name}. Use --dtype bfloat16 or float32."
        )
    return converted


def digest(array: np.ndarray) -> tuple[str, tuple[int, ...], int]:
    """Give type, shape and a checksum of the bytes, equal for arrays that are equal bit by bit."""
    plain = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return array.dtype.name, array.shape, zlib.crc32(plain.data)


def size_in_bytes(path: Path) -> int:
    """Add up a file, or all files of a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
