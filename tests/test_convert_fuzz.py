"""Files damaged at random: each gives a bundle or one `InputError` of one line, nothing else."""

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_input_damage import somewhere
from convert_cases import llama2c_checkpoint, random_bundle, with_training

import convert
from convert.bundle import expected_shapes
from convert.formats import safetensors
from tinyllm_jax.data.files import sha256_of_file
from tinyllm_jax.errors import InputError

pytestmark = pytest.mark.slow  # the file as a whole

DEEP: list = []
for _ in range(2000):
    DEEP = [DEEP]


def strange_values() -> list[Any]:
    """List what no setting and no tensor should be; JSON takes those before the tensors."""
    return [
        None, True, False, -1, 0, 3, 10**6, 2**31, 2**70, 10**400, 0.5, -0.0, 1e300, "", "4", "x" * 5000,
        "two\nlines", "NaN", [], [1, 2], [[]], {}, {"a": {"b": 1}}, {"model": 7}, float("nan"),
        float("inf"), DEEP, 10**5000, b"bytes", (1, 2), torch.tensor(3), torch.tensor(2.5), torch.zeros(2, 3),
        torch.zeros(0), torch.zeros(()), torch.ones(24).to(torch.bfloat16), torch.ones(24, dtype=torch.cfloat),
        torch.ones(24).to(torch.float8_e4m3fn), torch.ones(1).expand(10**9), torch.zeros(24, dtype=torch.bool),
        torch.zeros(2, 2).to_sparse(), torch.empty(3, device="meta"), torch.ones(2).expand(67, 2).T,
    ]  # fmt: skip


IN_JSON = 24  # so many of them that JSON can hold


def change_somewhere(table: Any, dice: random.Random, values: list[Any]) -> None:
    """Replace, remove or rename one entry, anywhere in nested tables and lists."""
    found = somewhere(table, dice)
    if found is None:
        return
    table, place = found
    inner, kind = table[place], dice.randrange(6)
    if kind == 0:
        del table[place]
    elif kind == 1 and isinstance(table, dict):
        table[dice.choice([7, "", "a\nb", "layers.9999999999.x.weight", "x" * 3000])] = table.pop(
            place
        )
    elif kind == 2 and isinstance(table, dict) and isinstance(inner, torch.Tensor):
        table[place] = torch.ones(dice.randrange(5), dtype=inner.dtype)
    else:
        table[place] = dice.choice(values)


def change_bytes(path: Path, dice: random.Random) -> None:
    """Flip, cut out or put in some bytes, most often near an end, where the headers are."""
    content = bytearray(path.read_bytes())
    for _ in range(dice.choice([1, 1, 2, 8])):
        near = dice.choice([60, 600, len(content)])
        place = min(dice.randrange(near), len(content) - 1)
        place = place if dice.random() < 0.6 else len(content) - 1 - place
        kind = dice.randrange(5)
        if kind == 0:
            del content[place : place + dice.choice([1, 8, 1000])]
        elif kind == 1:
            content[place:place] = dice.randbytes(dice.choice([1, 8]))
        else:
            content[place] = dice.choice([0, 1, 255, 0x7F, ord("9"), ord("-"), dice.randrange(256)])
        if len(content) < 3:
            break
    path.write_bytes(content)


def change_json(text: str, dice: random.Random) -> str:
    table = json.loads(text)
    for _ in range(dice.choice([1, 1, 3])):
        change_somewhere(table, dice, strange_values()[:IN_JSON])
    text = json.dumps(table, default=str)
    return text.replace('"two', "1" * 5000, 1) if dice.random() < 0.05 else text


def own_content(folder: Path) -> dict[str, Any]:
    convert.write(with_training(random_bundle()), folder / "own.pt")
    return torch.load(folder / "own.pt", weights_only=True)


def damaged_torch(content: dict[str, Any]) -> Callable[[Path, random.Random], Path]:
    def damage(folder: Path, dice: random.Random) -> Path:
        path = folder / "x.pt"
        changed = copy.deepcopy(content)
        if dice.random() < 0.75:
            for _ in range(dice.choice([1, 1, 3])):
                change_somewhere(changed, dice, strange_values())
        else:
            changed["bytes"] = True
        try:
            torch.save(changed, path, _use_new_zipfile_serialization=dice.random() < 0.8)
        except (RuntimeError, RecursionError, ValueError, NotImplementedError, TypeError):
            torch.save(content, path)
            changed["bytes"] = True
        if "bytes" in changed or dice.random() < 0.1:
            change_bytes(path, dice)
        return path

    return damage


def damaged_safetensors(folder: Path, dice: random.Random) -> Path:
    path = folder / "x.safetensors"
    convert.write(with_training(random_bundle()), path)
    content = path.read_bytes()
    if dice.random() < 0.5:
        change_bytes(path, dice)
        return path
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if dice.random() < 0.5:
        header["__metadata__"]["tinyllm"] = change_json(header["__metadata__"]["tinyllm"], dice)
        text = json.dumps(header)
    else:
        text = change_json(json.dumps(header), dice)
    encoded = text.encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])
    return path


def damaged_folder(folder: Path, dice: random.Random) -> Path:
    path = folder / "step"
    convert.write(with_training(random_bundle()), path, to="safetensors")
    if dice.random() < 0.1:
        change_bytes(path / safetensors.SUMS, dice)
        return path
    meta = path / safetensors.META
    if dice.random() < 0.8:
        meta.write_text(change_json(meta.read_text(), dice))
    else:
        change_bytes(meta, dice)
    sums = {
        file.name: sha256_of_file(file) for file in path.iterdir() if file.name != safetensors.SUMS
    }
    (path / safetensors.SUMS).write_text(json.dumps(sums))
    return path


def damaged_config(folder: Path, dice: random.Random) -> Path:
    bundle = random_bundle()
    convert.write(bundle, folder / "hf", to="hf")
    config = folder / "hf/config.json"
    config.write_text(change_json(config.read_text(), dice))
    return folder / dice.choice(["hf", "hf/model.safetensors"])


DAMAGES = {
    "own .pt": lambda folder: damaged_torch(own_content(folder)),
    "ckpt.pt of llama2.c": lambda _: damaged_torch(llama2c_checkpoint(random_bundle())),
    "safetensors": lambda _: damaged_safetensors,
    "step folder": lambda _: damaged_folder,
    "config.json": lambda _: damaged_config,
}


def check(damage: Callable[[Path, random.Random], Path], seed: str, folder: Path) -> bool:
    """Damage a file, read it, and say whether it was still a model."""
    folder.mkdir()
    path = damage(folder, random.Random(seed))
    bundle, problem = None, ""
    try:
        bundle = convert.read(path)
    except InputError as error:
        problem = str(error)
    shutil.rmtree(folder)
    if bundle is None:
        assert problem.isprintable(), seed
        assert len(problem) < 8000, seed
        return False
    shapes = {name: array.shape for name, array in bundle.weights.items()}
    assert shapes == expected_shapes(bundle.model), seed
    if bundle.training:
        assert all(np.isfinite(n) and n >= 0 for n in (bundle.training.step, bundle.training.count))
    return True


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_a_model_or_one_line(kind, tmp_path):
    damage = DAMAGES[kind](tmp_path)
    whole = [check(damage, f"{kind} {seed}", tmp_path / "in") for seed in range(60)]
    assert 0 < sum(whole) < len(whole)  # some changes are harmless, most are not
