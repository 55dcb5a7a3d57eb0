"""The twin is literal: the same files, names in the same order, and einsum strings as the JAX code.

What differs on purpose stands in the lists below, each with its reason.
"""

import ast

import pytest
from conftest import ROOT

PACKAGE = ROOT / "tinyllm_torch"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
# Where numbers are made, every name has its twin. What only keeps runs and files in order is smaller
# in the twin.
ROOMS = ("inference", "model", "objectives")
MIRRORED = [file for file in FILES if file.startswith(ROOMS) and "__init__" not in file]
MIRRORED += [
    "generate.py",
    "evaluation/scorer.py",
    *(f"training/{name}.py" for name in ("loop", "optim", "step", "step_log")),
]
ONLY_IN_JAX = {
    "inference/generate.py": {"Generator.compilations", "bucket"},  # nothing is compiled
    "inference/language_model.py": {"precision"},  # JAX is told to keep float64
    "model/attention.py": {"suits_cudnn"},  # torch picks its kernel by itself
    # torch's products take any order of axes
    "model/kv_cache.py": {"LayerCache.slots", "LayerCache.by_slot"},
    # torch multiplies in float32 unless told, needs no program to draw; its generators are not split
    "model/layers.py": {"matmul_precision", "draw", "keys_of"},
    # torch loops over experts
    "model/moe.py": {
        *("ExpertLinear", "ExpertLinear.forward", "Experts", "Experts.forward", "permute"),
    },
    "model/weights.py": {"describe_size"},  # its commands say more
    "objectives/pretrain.py": {
        *("floor_of_rows", "whole_documents"),  # the toy text's own entropy
        *("evaluation_rows", "make_next_token_objective"),  # the twin's runs only pretrain
    },
    # the twin takes one step after another, of rows that the host has read before
    "training/loop.py": {
        *("Rollouts", "Rollouts.batch", "Rollouts.evaluate", "DeviceCorpus", "dispatches"),
    },
    "training/optim.py": {"read_moments", "write_moments"},  # its state has that form already
    "training/step.py": {"scan_steps", "Fixed"},
    # looks at the layers; nothing is compiled
    "training/step_log.py": {"StepLog.add_look", "StepLog.has_compiled"},
}
# Rooms that the twin's plain forms need not have, those of runs beyond pretraining, and what many people
# talk to at once.
ONLY_IN_JAX_FILES = {
    *(f"inference/{name}.py" for name in ("engine", "replicas", "service", "slots")),
    *(f"inference/{name}.py" for name in ("stored_weights", "text_stream")),
    *(f"inference/{name}.py" for name in ("talk", "talk_commands", "terminal")),
    *("model/grouped_dot.py", "model/placement.py", "objectives/device_rows.py"),
    *("model/attention_rows.py", "model/compiled.py", "model/lora.py"),
    *("model/decoding.py", "model/decoding_weights.py"),
    "objectives/head_blocks.py",  # the twin holds all logits
    *(
        f"objectives/{name}.py"
        for name in ("conversations", "pairs", "rewards", "rollouts", "policy_objective")
    ),
}
ONLY_IN_TORCH = {
    "inference/language_model.py": {"model_from_bundle", "bundle_from_model"},
    "model/weights.py": {"from_jax_weights", "to_jax_weights", "as_tensors"},
    # optax
    "training/optim.py": {"Optimizer", "global_norm", "clip_by_global_norm", "orthogonalize"},
    "training/step.py": {"as_device_batch", "step_generator"},  # jax.jit, jax.random
}


def tree_of(package: str, file: str) -> ast.Module:
    return ast.parse((ROOT / package / file).read_text(encoding="utf-8"))


def public_names(tree: ast.Module) -> list[str]:
    """List functions, classes and their public methods, in order."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found.append(node.name)
        elif isinstance(node, ast.ClassDef):
            methods = [child.name for child in node.body if isinstance(child, ast.FunctionDef)]
            # A torch module's `forward` is what a JAX module does when it is called.
            methods = ["forward" if name == "__call__" else name for name in methods]
            found.append(node.name)
            found += [f"{node.name}.{name}" for name in methods if not name.startswith("_")]
    return [
        name
        for name in found
        if not name.startswith("_") and "._" not in name.replace(".__call__", "")
    ]


def einsums(tree: ast.Module) -> list[str]:
    """List the strings that look like einsum equations, in order."""
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return sorted(
        t for t in texts if isinstance(t, str) and "->" in t and "," in t and " " not in t
    )


@pytest.mark.parametrize("file", MIRRORED)
def test_a_file_has_the_names_of_its_twin_in_the_same_order(file: str) -> None:
    expected = public_names(tree_of("tinyllm_jax", file))
    actual = public_names(tree_of("tinyllm_torch", file))
    missing, extra = ONLY_IN_JAX.get(file, set()), ONLY_IN_TORCH.get(file, set())
    assert missing <= set(expected), "declared as JAX's own, and not there"
    assert extra <= set(actual), "declared as the twin's own, and not there"
    assert [name for name in actual if name not in extra] == (
        [name for name in expected if name not in missing]
    )


@pytest.mark.parametrize("file", MIRRORED)
def test_a_file_has_the_einsum_strings_of_its_twin(file: str) -> None:
    actual, expected = (
        einsums(tree_of(package, file)) for package in ("tinyllm_torch", "tinyllm_jax")
    )
    assert actual == expected


def test_every_file_of_the_model_has_a_twin() -> None:
    expected = {
        path.relative_to(ROOT / "tinyllm_jax").as_posix()
        for room in ROOMS
        for path in (ROOT / "tinyllm_jax" / room).glob("*.py")
    }
    assert expected >= ONLY_IN_JAX_FILES
    assert {file for file in FILES if file.startswith(ROOMS)} == expected - ONLY_IN_JAX_FILES


def test_the_twin_imports_of_tinyllm_jax_only_what_imports_no_framework() -> None:
    allowed = ("config", "settings", "errors", "cli", "data", "evaluate", "evaluation.run")
    shared = ("loggers", "metrics", "monitor", "progress", "report", "rewind", "signals")
    shared += ("environment", "figures", "start_rules", "step_folders", "weight_shapes")
    allowed += tuple(f"training.{name}" for name in shared)
    for file in FILES:
        for node in ast.walk(tree_of("tinyllm_torch", file)):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                top, _, rest = name.partition(".")
                assert top not in ("jax", "flax", "optax", "orbax"), f"{file} imports {name}"
                if top == "tinyllm_jax":
                    assert rest.startswith(allowed), f"{file} imports {name}"
