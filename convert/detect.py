"""Tell what a source is by its content, never by its name alone."""

from pathlib import Path

from convert.bundle import Bundle
from convert.formats import gguf, huggingface, llama2c, orbax, peft, safetensors, torch_file
from convert.hugging_face_config import read_config
from convert.tensor_file import looks_like_safetensors, read_tensors
from tinyllm_jax.config import ModelConfig
from tinyllm_jax.errors import InputError
from tinyllm_jax.training.step_folders import step_folders

KNOWN = (
    "a run or step folder, a Hugging Face folder, .pt or .pth of PyTorch, .safetensors, .bin of "
    "llama2.c, or .gguf"
)


def detect(path: Path) -> str:
    """Name the format of a path: orbax, safetensors, hf, torch, llama2c, gguf, peft, or tensors.

    "tensors" is a safetensors file of other hands, which holds no settings.

    Raises:
        InputError: there is nothing, or nothing known.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder. Give {KNOWN}.")
    if path.is_dir():
        return _detect_folder(path)
    if not path.is_file():  # to read from a pipe or a device could take for ever
        raise InputError(f"{path}: neither a file nor a folder. Give {KNOWN}.")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: an empty file. Give {KNOWN}.")
    for module in (gguf, torch_file):
        if module.matches(path):
            return module.NAME
    if looks_like_safetensors(path):
        return safetensors.NAME if safetensors.matches(path) else "tensors"
    if llama2c.matches(path):
        return llama2c.NAME
    with open(path, "rb") as file:
        start = file.read(4)
    raise InputError(f"{path}: not a known format (it begins with {start!r}). Give {KNOWN}.")


def is_run_folder(path: Path) -> bool:
    """Tell a folder that holds checkpoints."""
    return path.is_dir() and (path / "checkpoints").is_dir()


def read_tensor_file(path: Path, *, settings: ModelConfig | None) -> Bundle:
    """Read a .safetensors file of other hands, with the config.json beside it."""
    from convert.bundle import make_layout
    from convert.names import foreign_model

    arrays, _ = read_tensors(path)
    beside, table = path.with_name("config.json"), None
    if beside.is_file() and settings is None:
        table = read_config(beside)
    model, weights, found = foreign_model(
        arrays, table, settings=settings, certain=False, origin=str(path)
    )
    layout = make_layout(
        format="safetensors",
        rope=found["rope"],
        tied=model.tie_word_embeddings,
        transposed=False,
        weights=weights,
    )
    return Bundle(model, weights, None, None, layout | {"notes": found["notes"]})


def _detect_folder(path: Path) -> str:
    for module in (orbax, safetensors, huggingface, peft):
        if module.matches(path):
            return module.NAME
    if is_run_folder(path):
        steps = step_folders(path)
        return orbax.NAME if not steps or orbax.matches(steps[-1][1]) else safetensors.NAME
    if any((path / name).is_file() for name in ("meta.json", "checksums.json")):
        return orbax.NAME  # a damaged one, which its reader explains
    weights = sorted([*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")])
    if weights:
        raise InputError(
            f"{path}: {weights[0].name}, but no config.json that says what model it is. Put it "
            f"there, or give the file itself with --config."
        )
    raise InputError(f"{path}: a folder with neither config.json nor checkpoints. Give {KNOWN}.")
