"""Read any checkpoint into a bundle, write a bundle in any format, and check what was written."""

import copy
import ctypes
import dataclasses
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.architectures import architecture_of
from convert.bundle import (
    DTYPES,
    Bundle,
    cast_bundle,
    check_tokenizer,
    dtype_names,
    size_in_bytes,
    without_values,
)
from convert.detect import detect, is_run_folder, read_tensor_file
from convert.formats import gguf, huggingface, llama2c, orbax, peft, safetensors, torch_file
from convert.landing import landing
from convert.setting_values import check_held
from convert.tokenizer_files import load_any_tokenizer
from convert.verify import Comparer, compare, fingerprint
from tinyllm_jax.config import ModelConfig
from tinyllm_jax.data.files import free_name
from tinyllm_jax.data.sentencepiece_bpe import SentencePieceTokenizer
from tinyllm_jax.errors import InputError
from tinyllm_jax.training.step_folders import find_checkpoint

FORMATS = ("orbax", "torch", "safetensors", "hf", "llama2c", "gguf")
# What else may be written, of runs that train adapters.
TARGETS = (*FORMATS, peft.NAME)
# Formats that hold the moments and counters of a run.
WITH_TRAINING = ("orbax", "torch", "safetensors")
SUFFIXES = {
    ".pt": "torch",
    ".pth": "torch",
    ".ckpt": "torch",
    ".safetensors": "safetensors",
    ".bin": "llama2c",
    ".gguf": "gguf",
}
QUANTIZED = "q8_0"
DTYPE_WORDS = (*DTYPES, QUANTIZED)
NO_TOKENIZER = "none"


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    source: dict[str, Any]  # layout of what was read
    target: dict[str, Any]  # layout of what was written; {} where it was not read back
    tensors: int
    moments: tuple[int, int] | None  # first and second ones that were written
    step: int | None
    source_bytes: int
    target_bytes: int
    largest_difference: float | None
    relative_difference: float | None
    notes: list[str]


def read(
    path: Path | str,
    tokenizer: Path | str | None = None,
    *,
    settings: ModelConfig | None = None,
    prefer_best: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Read a checkpoint of any known format, told by its content.

    Args:
        path: A file or folder. Of a run folder the newest good checkpoint is taken.
        tokenizer: A tokenizer file instead of the checkpoint's own, or "none".
        settings: Settings of the model, for files that hold none.
        prefer_best: Of a run folder, take the checkpoint of lowest validation loss.
        say: Is told of damaged checkpoints that were passed over.

    Raises:
        InputError: what is wrong with it, in one line.
    """
    path = Path(path)
    kind = detect(path)
    if is_run_folder(path) and kind in ("orbax", "safetensors"):
        path = find_checkpoint(path, on_damaged=say, prefer_best=prefer_best)
        kind = detect(path)
    readers: dict[str, Callable[[], Bundle]] = {
        "orbax": lambda: orbax.read(path, say=say),
        "safetensors": lambda: safetensors.read(path),
        "torch": lambda: torch_file.read(path, settings=settings),
        "hf": lambda: huggingface.read(path, settings=settings, with_tokenizer=tokenizer is None),
        "llama2c": lambda: llama2c.read(path, with_tokenizer=tokenizer is None),
        "gguf": lambda: gguf.read(path, with_tokenizer=tokenizer is None),
        "tensors": lambda: read_tensor_file(path, settings=settings),
        "peft": lambda: peft.refuse(path),
    }
    bundle = readers[kind]()
    bundle.layout["read_from"] = str(path)
    if tokenizer == NO_TOKENIZER:
        bundle.tokenizer = None
    elif tokenizer is not None:
        bundle.tokenizer = load_any_tokenizer(Path(tokenizer))
    # What lies beside a llama2.c file may be of another model.
    own = tokenizer is None and kind != "llama2c"
    check_tokenizer(bundle, origin=str(tokenizer or path), may_be_smaller=own)
    return bundle


def write(
    bundle: Bundle,
    path: Path | str,
    *,
    to: str | None = None,
    dtype: str | None = None,
    llama2c_version: int = 0,
    overwrite: bool = False,
) -> None:
    """Write a bundle, whole or not at all, without reading it back.

    Raises:
        InputError: something is there already, or the format cannot hold this model.
    """
    path = Path(path)
    to = target_format(path, to)
    if to == peft.NAME:
        raise InputError("--to peft: a bundle has no adapters. Convert the run itself.")
    check_target(path, overwrite=overwrite)
    check_dtype(to, dtype, llama2c_version)
    target = prepare(bundle, to=to, dtype=dtype)
    with landing(path, folder=is_folder(path, to), replace=overwrite) as place:
        _write(target, place, to=to, dtype=dtype, version=llama2c_version)


def convert(
    source: Path | str,
    target: Path | str,
    *,
    to: str | None,
    tokenizer: Path | str | None,
    settings: ModelConfig | None,
    dtype: str | None,
    llama2c_version: int,
    verify: bool,
    overwrite: bool,
    say: Callable[[str], None],
) -> Report:
    """Convert a checkpoint; the target appears only once it was read back and found the same.

    Raises:
        InputError: what is wrong, in one line; then the target is as it was.
    """
    source, target = Path(source), Path(target)
    to = target_format(target, to)
    check_target(target, overwrite=overwrite)
    check_dtype(to, dtype, llama2c_version)
    if to == peft.NAME:
        return convert_adapters(
            source, target, tokenizer, dtype, verify=verify, overwrite=overwrite, say=say
        )
    bundle = read(
        source, tokenizer, settings=settings, prefer_best=to not in WITH_TRAINING, say=say
    )
    bundle = prepare(bundle, to=to, dtype=dtype)
    moments = None
    if bundle.training and to in WITH_TRAINING:
        moments = (len(bundle.training.first), len(bundle.training.second))
    elif bundle.training:
        bundle.note(f"{to} holds no optimizer state: moments and counters were left out")
    if target.is_dir() and any(target.iterdir()):
        bundle.note(f"what was in {target} is in {free_name(target)} now")
    facts = {
        "source": bundle.layout,
        "tensors": len(bundle.weights),
        "moments": moments,
        "step": bundle.training.step if bundle.training else None,
        "source_bytes": size_in_bytes(Path(bundle.layout["read_from"])),
    }
    with landing(target, folder=is_folder(target, to), replace=overwrite) as place:
        checks: dict[str, Any] = {"largest_difference": None, "relative_difference": None}
        if verify:
            checks = _write_and_compare(
                bundle, place, to=to, dtype=dtype, version=llama2c_version, origin=str(target)
            )
        else:
            _write(bundle, place, to=to, dtype=dtype, version=llama2c_version)
        facts["target_bytes"] = size_in_bytes(place)
    return Report(
        **facts,
        target=checks.pop("layout", {}),
        **checks,
        notes=bundle.layout.get("notes", []),
    )


def convert_adapters(
    source: Path,
    target: Path,
    tokenizer: Path | str | None,
    dtype: str | None,
    *,
    verify: bool,
    overwrite: bool,
    say: Callable[[str], None],
) -> Report:
    """Write the adapters of a run for PEFT.

    Raises:
        InputError: what is wrong, in one line; then the target is as it was.
    """
    for flag, value in (("--tokenizer", tokenizer), ("--dtype", dtype)):
        if value is not None:
            raise InputError(
                f"{flag} {value}: says nothing to --to peft, which holds adapters alone."
            )
    detect(source)
    step = source
    if is_run_folder(source):
        step = find_checkpoint(source, on_damaged=say, prefer_best=True)
    step = step.resolve()  # `best` is another name for a step
    facts = peft.export(step, target, verify=verify, replace=overwrite)
    return Report(
        **facts,
        moments=None,
        step=int(step.name) if step.name.isdigit() else None,
        source_bytes=size_in_bytes(step),
    )


def target_format(path: Path, to: str | None) -> str:
    """Name the format to write: what `--to` says, or what the name's ending stands for."""
    if to is None and path.suffix not in SUFFIXES:
        raise InputError(
            f"{path}: its name does not say which format. Add --to {'|'.join(TARGETS)}."
        )
    to = to or SUFFIXES[path.suffix]
    if to not in TARGETS:
        raise InputError(f"--to {to}: no such format. Use one of {', '.join(TARGETS)}.")
    return to


def check_target(path: Path, *, overwrite: bool) -> None:
    """Refuse to write over something, unless asked to and it is a checkpoint."""
    if not path.name:
        raise InputError(f"{path}: no name for a file or folder. Name one.")
    if path.name == "tokenizer.bin":
        raise InputError(
            f"{path}: llama2.c's tokenizer has that name. Name the model otherwise, as model.bin."
        )
    if not path.exists() and not path.is_symlink():
        return
    if not overwrite:
        raise InputError(f"{path}: already there. Name another, or add --overwrite to replace it.")
    if path.is_dir() and not any(path.iterdir()):
        return
    detect(path)  # refuses to remove what is no checkpoint


def check_dtype(to: str, dtype: str | None, version: int) -> None:
    """Refuse types and versions that a format does not have."""
    if dtype is not None and dtype not in DTYPE_WORDS:
        raise InputError(f"--dtype {dtype}: no such type. Use one of {', '.join(DTYPE_WORDS)}.")
    if dtype == QUANTIZED and to not in ("gguf", "llama2c"):
        raise InputError(f"--dtype {QUANTIZED}: only gguf and llama2c hold it. Use another type.")
    if to == "llama2c" and dtype not in (None, "float32", QUANTIZED):
        raise InputError(f"--dtype {dtype}: llama2.c holds float32, or int8 with {QUANTIZED}.")
    if version not in (0, 1, 2):
        raise InputError(f"--llama2c-version {version}: no such version. Use 0, 1 or 2.")


def prepare(bundle: Bundle, *, to: str, dtype: str | None) -> Bundle:
    """Bring the weights to the type they are written in.

    Without `dtype` they stay as they are, but for formats that cannot: llama2.c and GGUF have no
    float64, llama2.c nothing but float32, and a run trains float32 weights, which half precision
    would not let it do.

    Raises:
        InputError: the format has no place for a setting of the model.
    """
    if to not in WITH_TRAINING:
        bundle = without_values(bundle)
    if to == "hf":
        architecture_of(bundle.model)
    elif to not in WITH_TRAINING:
        check_held(bundle.model, to=to)
    bundle = dataclasses.replace(bundle, layout=copy.deepcopy(bundle.layout))
    if to == "hf" and bundle.model.score_head:
        bundle = without_own_head(bundle)
    stored = dtype_names(bundle.weights.values())
    wanted = None if dtype == QUANTIZED else dtype
    narrow = any(name in stored for name in ("float16", "bfloat16"))
    if wanted is None and (
        to == "llama2c"
        or (to == "orbax" and narrow)
        or (to == "gguf" and ("float64" in stored or dtype == QUANTIZED))
    ):
        wanted = "float32"
    if wanted is None or stored == wanted:
        return bundle
    cast = cast_bundle(bundle, wanted)
    cast.note(f"weights were {stored} and are {wanted}")
    return cast


def without_own_head(bundle: Bundle) -> Bundle:
    """Leave out a head over the vocabulary, for which reward models of transformers have no place."""
    if bundle.model.tie_word_embeddings:
        return bundle
    model = dataclasses.replace(bundle.model, tie_word_embeddings=True)
    weights = {name: array for name, array in bundle.weights.items() if name != "lm_head.weight"}
    bundle.note("hf: a reward model has a score head alone, so lm_head was left out")
    return dataclasses.replace(bundle, model=model, weights=weights)


def is_folder(path: Path, to: str) -> bool:
    """Tell formats that are folders."""
    return to in ("orbax", "hf") or (to == "safetensors" and path.suffix != ".safetensors")


def _write(bundle: Bundle, place: Path, *, to: str, dtype: str | None, version: int) -> None:
    quantized = dtype == QUANTIZED
    writers: dict[str, Callable[[], None]] = {
        "orbax": lambda: orbax.write(bundle, place),
        "torch": lambda: torch_file.write(bundle, place),
        "safetensors": lambda: safetensors.write(bundle, place),
        "hf": lambda: huggingface.write(bundle, place),
        "llama2c": lambda: llama2c.write(bundle, place, version=2 if quantized else version),
        "gguf": lambda: gguf.write(bundle, place, quantized=quantized),
    }
    writers[to]()


def _write_and_compare(
    bundle: Bundle, place: Path, *, to: str, dtype: str | None, version: int, origin: str
) -> dict[str, Any]:
    """Write, let go of the source, read the copy and compare; both never fill memory together."""
    double = any(array.dtype.name == "float64" for array in bundle.weights.values())
    comparer, with_training = Comparer(bundle.model, double=double), to in WITH_TRAINING
    give_memory_back()
    before = fingerprint(bundle, comparer, with_training=with_training)
    has_tokenizer = holds_tokenizer(bundle, to)
    _write(bundle, place, to=to, dtype=dtype, version=version)
    bundle.weights, bundle.training = {}, None
    give_memory_back()
    try:
        after = read(place, None if has_tokenizer else NO_TOKENIZER)
    except InputError as error:
        reason = str(error).replace(str(place), origin)
        reason = reason.replace(str(place.parent), str(Path(origin).parent))
        raise InputError(f"what was written cannot be read back: {reason}") from None
    found = compare(
        before,
        fingerprint(after, comparer, with_training=with_training),
        lossless=dtype != QUANTIZED and (to, version) != ("llama2c", 2),
        tokenizers=(bundle.tokenizer, after.tokenizer) if has_tokenizer else None,
        whole_tokenizer=with_training,
        origin=origin,
    )
    return {
        "layout": after.layout,
        "largest_difference": found.largest,
        "relative_difference": found.relative,
    }


def holds_tokenizer(bundle: Bundle, to: str) -> bool:
    """Tell whether a bundle has a tokenizer and the format takes it."""
    return bundle.tokenizer is not None and (
        to != "llama2c" or isinstance(bundle.tokenizer, SentencePieceTokenizer)
    )


def give_memory_back() -> None:
    """Return what was freed to the operating system.

    What Orbax reads with refers to the arrays in circles, and glibc keeps freed arrays of some
    megabytes for later, which together is as much as the model.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
        if trim is not None:
            trim(0)
