"""Adapters of a run as a folder of PEFT, which loads them onto the exported model that they adapt.

Source: huggingface/peft, docs/source/developer_guides/checkpoint.md (files and names).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from convert.architectures import architecture_of
from convert.bundle import (
    WITHOUT_VALUES,
    Arrays,
    Bundle,
    dtype_names,
    from_jax,
    gives_values,
    size_in_bytes,
    to_jax,
    without_values,
)
from convert.formats import orbax
from convert.landing import landing
from convert.tensor_file import read_tensors, write_tensors
from convert.verify import Comparer, Difference, compare, fingerprint
from tinyllm_jax.config import Config
from tinyllm_jax.errors import InputError

NAME = "peft"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def matches(path: Path) -> bool:
    """Tell a folder by its adapter_config.json."""
    return path.is_dir() and (path / CONFIG).is_file()


def refuse(path: Path) -> Bundle:
    """Refuse to read a folder of PEFT, which lacks the model.

    Raises:
        InputError: says what to do.
    """
    raise InputError(
        f"{path}: adapters of PEFT, without the model that they adapt. Merge them there "
        "(merge_and_unload, then save_pretrained) and convert that folder."
    )


def adapters_of(path: Path) -> tuple[Config, Arrays]:
    """Read the adapters of a step folder, and weights that were trained beside them.

    A policy of PPO is a language model without the head that gave values.

    Raises:
        InputError: it has none, or transformers has no such model.
    """
    from tinyllm_jax.model.weights import SCORES
    from tinyllm_jax.training.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(path) if orbax.matches(path) else None
    if checkpoint is None or checkpoint.config.lora.rank == 0:
        raise InputError(
            f"{path}: holds no adapters to write for PEFT. Give a run that was trained with "
            "--lora.rank, or use --to hf."
        )
    config, adapters = checkpoint.config, checkpoint.weights
    if gives_values(config):
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, score_head=False)
        )
        adapters = {name: array for name, array in adapters.items() if name != SCORES}
    architecture_of(config.model)
    return config, adapters


def write(config: Config, adapters: Arrays, path: Path, *, base: str) -> None:
    """Write a folder that `PeftModel.from_pretrained` reads.

    Args:
        base: Where the model that they adapt is to be found.
    """
    path.mkdir()
    tensors = {peft_name(name): np.ascontiguousarray(array.T) for name, array in adapters.items()}
    write_tensors(path / WEIGHTS, tensors, metadata={"format": "pt"})
    text = json.dumps(config_table(config, base=base), indent=2, ensure_ascii=False)
    (path / CONFIG).write_text(text + "\n", encoding="utf-8")


def read_back(path: Path) -> Arrays:
    """Read what `write` wrote."""
    tensors, _ = read_tensors(path / WEIGHTS)
    return {own_name(name): tensor.T for name, tensor in tensors.items()}


def peft_name(name: str) -> str:
    """Give an adapter's name in PEFT; the head for scores stands outside the blocks."""
    inner = name if name.startswith("score") else f"model.{name}"
    return f"{PREFIX}{inner.removesuffix('kernel')}weight"


def own_name(name: str) -> str:
    """Undo `peft_name`."""
    inner = name.removeprefix(PREFIX).removeprefix("model.")
    return f"{inner.removesuffix('weight')}kernel"


def config_table(config: Config, *, base: str) -> dict[str, Any]:
    """Write the settings of adapters under PEFT's names."""
    lora, scores = config.lora, config.model.score_head
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scores else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "modules_to_save": ["score"] if scores else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def export(source: Path, target: Path, *, verify: bool, replace: bool) -> dict[str, Any]:
    """Write the adapters of a step folder, and compare what they make of its model.

    Returns:
        What the report tells of it.

    Raises:
        InputError: there are none, or what was written is not the same.
    """
    from tinyllm_jax.training.checkpoint import find_adapted

    config, adapters = adapters_of(source)
    if config.lora.embeddings:
        raise InputError(
            f"{source}: its embedding was trained whole (lora.embeddings), which is no adapter. Use --to "
            "hf for the merged model."
        )
    reference = find_adapted(source)
    base = f"{target}_base"
    whole, found = without_values(orbax.read(source, say=lambda _: None)), None
    facts: dict[str, Any] = {"source": whole.layout | {"read_from": str(source)}, "target": {}}
    with landing(target, folder=True, replace=replace) as place:
        write(config, adapters, place, base=base)
        if verify:
            found = compare_back(config, whole, reference, place, origin=str(target))
            layout = {"format": NAME, "dtype": dtype_names(adapters.values()), "transposed": False}
            facts["target"] = whole.layout | layout
        facts["target_bytes"] = size_in_bytes(place)
    notes = [f"the model that they adapt: python -m convert {reference} {base} --to hf"]
    if WITHOUT_VALUES in whole.layout["notes"]:
        notes.append(WITHOUT_VALUES)
    return facts | {
        "tensors": len(adapters),
        "largest_difference": found.largest if found else None,
        "relative_difference": found.relative if found else None,
        "notes": notes,
    }


def compare_back(
    config: Config, whole: Bundle, reference: Path, place: Path, *, origin: str
) -> Difference:
    """Merge what was written into the reference, and compare that with the run's own model."""
    from tinyllm_jax.model.lora import merge_adapters

    base = without_values(orbax.read(reference, say=lambda _: None))
    merged = merge_adapters(to_jax(base.weights), read_back(place), lora=config.lora)
    copy = dataclasses.replace(base, weights=from_jax(merged))
    double = any(array.dtype.name == "float64" for array in whole.weights.values())
    comparer = Comparer(whole.model, double=double)
    before, after = (fingerprint(each, comparer, with_training=False) for each in (whole, copy))
    return compare(
        before, after, lossless=True, tokenizers=None, whole_tokenizer=False, origin=origin
    )
