"""Other projects' names and stacks for the weights of experts.

A bundle has `mlp.gate`, `mlp.experts.E.gate_proj` (up_proj, down_proj) and one wide
`mlp.shared_experts.gate_proj`. Mixtral calls them `block_sparse_moe` and w1, w3, w2; Granite, and
transformers 5 where it is told to keep its own form, stack all experts, gate above up; MiniMind has
a module for each shared expert.

Source: huggingface/transformers, conversion_mapping.py, and models/granitemoe; jingyaogong/minimind,
model/model_minimind.py.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.bundle import Arrays
from convert.checks import listed, shown
from tinyllm_jax.errors import InputError

_LAYER = re.compile(r"^(layers\.[0-9]{1,6}\.)(.+)$")
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_PLAIN = {
    **dict.fromkeys(
        (
            "block_sparse_moe.gate.weight",
            "block_sparse_moe.router.weight",
            "block_sparse_moe.router.layer.weight",
        ),
        "mlp.gate.weight",
    ),
    "shared_mlp.output_linear.weight": "mlp.shared_experts.down_proj.weight",
}
_OF_MIXTRAL = re.compile(r"block_sparse_moe\.experts\.([0-9]{1,6})\.(w[123])\.weight")
# Tensors of [experts, out, in].
_STACKS = {
    "mlp.experts.gate_up_proj": ("gate_proj", "up_proj"),
    "mlp.experts.down_proj": ("down_proj",),
    "block_sparse_moe.experts.gate_up_proj": ("gate_proj", "up_proj"),
    "block_sparse_moe.experts.down_proj": ("down_proj",),
    "block_sparse_moe.input_linear.weight": ("gate_proj", "up_proj"),
    "block_sparse_moe.output_linear.weight": ("down_proj",),
}
_SHARED_PAIR = "shared_mlp.input_linear.weight"
_OF_SHARED = re.compile(
    r"(layers\.[0-9]{1,6}\.mlp\.shared_experts\.)([0-9]{1,6})\.(gate|up|down)_proj\.weight"
)


def from_foreign(arrays: Mapping[str, np.ndarray], *, origin: str) -> Arrays:
    """Give the weights of experts their names of a bundle; all others keep theirs.

    Raises:
        InputError: a stack is not one, shared experts are missing, or two tensors are one weight.
    """
    found: Arrays = {}
    shared: dict[str, dict[int, np.ndarray]] = {}
    for name, array in arrays.items():
        for ours, part in _unstacked(name, array, origin):
            place: dict[Any, np.ndarray] = found
            key: Any = ours
            if match := _OF_SHARED.fullmatch(ours):
                place = shared.setdefault(f"{match[1]}{match[3]}_proj.weight", {})
                key = int(match[2])
            if key in place:
                raise InputError(
                    f"{origin}: several tensors stand for the same weight: {shown(name)} is one of "
                    "them. Keep one of each."
                )
            place[key] = part
    for name, parts in shared.items():
        if sorted(parts) != list(range(len(parts))) or name in found:
            raise InputError(
                f"{origin}: of {shown(name)} there are the shared experts {listed(sorted(parts))}. "
                "Get the file again."
            )
        axis = 1 if name.endswith("down_proj.weight") else 0
        found[name] = _joined([parts[number] for number in sorted(parts)], axis, name, origin)
    return found


def _unstacked(name: str, array: np.ndarray, origin: str) -> list[tuple[str, np.ndarray]]:
    """Give the weights that a tensor holds, with their names."""
    match = _LAYER.match(name)
    if not match:
        return [(name, array)]
    home, rest = match[1], match[2]
    if rest in _PLAIN:
        return [(home + _PLAIN[rest], array)]
    if of_mixtral := _OF_MIXTRAL.fullmatch(rest):
        part = next(ours for ours, theirs in _MIXTRAL.items() if theirs == of_mixtral[2])
        return [(f"{home}mlp.experts.{int(of_mixtral[1])}.{part}.weight", array)]
    if rest == _SHARED_PAIR:
        halves = _halves(name, array, 2, ("gate_proj", "up_proj"), origin)
        return [(f"{home}mlp.shared_experts.{part}.weight", half) for part, half in halves]
    if rest in _STACKS:
        parts = _halves(name, array, 3, _STACKS[rest], origin)
        return [
            (f"{home}mlp.experts.{expert}.{part}.weight", matrix)
            for part, stack in parts
            for expert, matrix in enumerate(stack)
        ]
    return [(name, array)]


def _halves(
    name: str, array: np.ndarray, rank: int, parts: tuple[str, ...], origin: str
) -> list[tuple[str, np.ndarray]]:
    """Cut the rows of a tensor evenly."""
    if array.ndim != rank or array.shape[-2] % len(parts):
        raise InputError(
            f"{origin}: {shown(name)} has shape {shown(list(array.shape))}, which is no stack of "
            f"{' and '.join(parts)}. Get the file again."
        )
    rows = array.shape[-2] // len(parts)
    return [
        (part, array[..., number * rows : (number + 1) * rows, :])
        for number, part in enumerate(parts)
    ]


def _joined(parts: list[np.ndarray], axis: int, name: str, origin: str) -> np.ndarray:
    """Put the matrices of experts side by side: added up, their outputs are those of a wide one."""
    if len(parts) == 1:
        return parts[0]
    if len({(part.shape, part.dtype) for part in parts}) > 1 or parts[0].ndim != 2:
        shapes = listed(list(part.shape) for part in parts)
        raise InputError(f"{origin}: {shown(name)} comes in shapes {shapes}. Get the file again.")
    return np.concatenate(parts, axis=axis)


def to_hugging_face(weights: Arrays, *, kind: str) -> Arrays:
    """Give the weights of experts the names that an architecture's files have.

    Args:
        kind: The model_type of the architecture.
    """
    if kind == "mixtral":
        return {_name_of_mixtral(name): array for name, array in weights.items()}
    return _stacked_for_granite(weights) if kind == "granitemoeshared" else weights


def _name_of_mixtral(name: str) -> str:
    name = name.replace(".mlp.", ".block_sparse_moe.")
    for ours, theirs in _MIXTRAL.items():
        name = name.replace(f".{ours}.", f".{theirs}.") if ".experts." in name else name
    return name


def _stacked_for_granite(weights: Arrays) -> Arrays:
    found: Arrays = {}
    for name, array in weights.items():
        match = _LAYER.match(name)
        if not match or not match[2].startswith("mlp."):
            found[name] = array
            continue
        home, rest = match[1], match[2]
        if rest == "mlp.gate.weight":
            found[f"{home}block_sparse_moe.router.layer.weight"] = array
        elif rest == "mlp.experts.0.gate_proj.weight":
            found |= _stacks_of_layer(weights, home)
        elif rest == "mlp.shared_experts.gate_proj.weight":
            up = weights[f"{home}mlp.shared_experts.up_proj.weight"]
            found[home + _SHARED_PAIR] = np.concatenate([array, up])
        elif rest == "mlp.shared_experts.down_proj.weight":
            found[f"{home}shared_mlp.output_linear.weight"] = array
    return found


def _stacks_of_layer(weights: Arrays, home: str) -> Arrays:
    count = sum(name.startswith(f"{home}mlp.experts.") for name in weights) // 3
    gate, up, down = (
        [weights[f"{home}mlp.experts.{expert}.{part}_proj.weight"] for expert in range(count)]
        for part in ("gate", "up", "down")
    )
    pairs = [np.concatenate(pair) for pair in zip(gate, up, strict=True)]
    return {
        f"{home}block_sparse_moe.input_linear.weight": np.stack(pairs),
        f"{home}block_sparse_moe.output_linear.weight": np.stack(down),
    }
