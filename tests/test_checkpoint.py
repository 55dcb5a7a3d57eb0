"""Checkpoints: everything comes back bitwise, damage is noticed, and nothing half-written counts."""

import _thread
import json
import logging
import re
import shutil
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllm_jax.config import Config, ModelConfig
from tinyllm_jax.data.files import sha256_of_file
from tinyllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from tinyllm_jax.errors import InputError
from tinyllm_jax.training import checkpoint as checkpoint_file
from tinyllm_jax.training import step_folders as folders
from tinyllm_jax.training.checkpoint import read_checkpoint, save_checkpoint
from tinyllm_jax.training.optim import read_moments
from tinyllm_jax.training.step import TrainState, new_state
from tinyllm_jax.training.step_folders import (
    damage,
    find_checkpoint,
    mark_best,
    prune_checkpoints,
    step_folders,
)
from tinyllm_jax.training.weight_shapes import kernel_shapes

SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 16}
CONFIG = Config(model=ModelConfig(**SIZES, num_attention_heads=2, num_key_value_heads=1))


@pytest.fixture(scope="module")
def tokenizer(trained_run: Path) -> Tokenizer:
    return load_tokenizer(trained_run)


def state_at(step: int) -> TrainState:
    """Make a state whose every number differs from every other."""
    numbers = np.random.default_rng(step)
    weights = {
        name: jnp.asarray(numbers.normal(size=shape), jnp.float32)
        for name, shape in kernel_shapes(CONFIG.model)
    }
    state = new_state(CONFIG, weights)
    filled = jax.tree.map(
        lambda x: jnp.asarray(numbers.normal(size=x.shape) * 100, x.dtype), state.optimizer_state
    )
    return state._replace(step=jnp.asarray(step, jnp.int32), optimizer_state=filled)


def save(run: Path, step: int, tokenizer: Tokenizer) -> Path:
    return save_checkpoint(
        run,
        state_at(step),
        config=CONFIG,
        tokenizer=tokenizer,
        dataset_hash="d" * 64,
        best={"step": step, "loss": 1.25},
    )


def forbid(message: str) -> None:
    raise AssertionError(message)


def test_every_number_comes_back_bitwise(tmp_path, tokenizer):
    folder = save(tmp_path, 7, tokenizer)
    found = read_checkpoint(find_checkpoint(tmp_path, on_damaged=forbid))
    state = state_at(7)
    expected = read_moments(state.optimizer_state)
    assert (found.folder, found.step, found.nonfinite_streak) == (folder, 7, 0)
    assert found.config == CONFIG
    assert found.best == {"step": 7, "loss": 1.25}
    assert found.tokenizer.hash == found.tokenizer_hash == tokenizer.hash
    assert found.dataset_hash == "d" * 64
    assert int(found.moments.count) == int(expected.count) != 0
    for actual, wanted in (
        (found.weights, state.weights),
        (found.moments.first, expected.first),
        (found.moments.second, expected.second),
    ):
        assert actual.keys() == wanted.keys()
        for name, array in actual.items():
            assert isinstance(array, np.ndarray)
            assert array.dtype == wanted[name].dtype
            np.testing.assert_array_equal(array, wanted[name])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_every_kind_of_damage_to_every_file_is_noticed(tmp_path, tokenizer):
    whole = save(tmp_path, 1, tokenizer)
    assert damage(whole) is None
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert len(files) > 5
    for name in files:
        for harm in (flip_a_byte, truncate, Path.unlink):
            broken = tmp_path / "broken"
            shutil.copytree(whole, broken)
            if (broken / name).stat().st_size == 0 and harm is not Path.unlink:
                (broken / name).write_bytes(b"x")
            else:
                harm(broken / name)
            problem = damage(broken)
            assert problem is not None, (name, harm)
            assert name.name in problem or name.name == "checksums.json", problem
            shutil.rmtree(broken)


def test_the_checkpoint_before_a_damaged_one_is_used_and_the_damage_named(tmp_path, tokenizer):
    for step in (9, 10, 11):
        save(tmp_path, step, tokenizer)
    flip_a_byte(tmp_path / "checkpoints/11/meta.json")
    truncate(tmp_path / "checkpoints/10/state/manifest.ocdbt")
    messages: list[str] = []
    assert find_checkpoint(tmp_path, on_damaged=messages.append).name == "9"
    assert len(messages) == 2
    assert "11: damaged checkpoint (meta.json does not have its checksum)" in messages[0]
    assert "10: damaged checkpoint (state/manifest.ocdbt" in messages[1]


def test_a_damaged_step_folder_named_by_itself_is_refused(tmp_path, tokenizer):
    folder = save(tmp_path, 1, tokenizer)
    flip_a_byte(folder / "meta.json")
    with pytest.raises(InputError, match=r"1: damaged checkpoint .*Name the run folder"):
        find_checkpoint(folder, on_damaged=forbid)
    with pytest.raises(InputError, match="every checkpoint in it is damaged"):
        find_checkpoint(tmp_path, on_damaged=lambda _: None)


@pytest.mark.parametrize(
    ("sums", "expected"),
    [
        (None, "checksums.json is missing"),
        ("[[[1], 2]]", "cannot be read and compared"),
        ("[" * 100_000, "cannot be read and compared"),
        ('{"a\\u001b[2Jb": "0"}', r"a\x1b[2Jb is missing"),
        (json.dumps({"\ud800" * 5000: "0"}), r"\ud800 is missing"),
        (json.dumps({"\a" * 250: "0"}), r"\x07 is missing"),
    ],
)
def test_checksums_of_any_content_are_damage_told_in_one_short_line(tmp_path, sums, expected):
    if sums is not None:
        (tmp_path / "checksums.json").write_text(sums)
    problem = damage(tmp_path)
    assert problem is not None
    assert expected in problem
    assert problem.isprintable()
    assert len(problem) < 400


def test_a_folder_that_may_not_be_looked_into_is_passed_over(tmp_path, tokenizer, monkeypatch):
    good, locked = save(tmp_path, 2, tokenizer), save(tmp_path, 3, tokenizer)
    is_file = Path.is_file

    def refuse(path: Path) -> bool:
        if locked in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuse)
    said: list[str] = []
    assert find_checkpoint(tmp_path, on_damaged=said.append) == good
    assert "3: damaged checkpoint (its files cannot be read" in said[0]


def test_a_best_that_points_nowhere_is_told_and_passed_over(tmp_path, tokenizer):
    newest = save(tmp_path, 3, tokenizer)
    (tmp_path / "best").symlink_to("checkpoints/2")
    said: list[str] = []
    found = find_checkpoint(tmp_path, on_damaged=said.append, prefer_best=True)
    assert found == newest
    assert len(said) == 1
    assert "best: damaged checkpoint (checksums.json is missing)" in said[0]


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        find_checkpoint(tmp_path / "none", on_damaged=forbid)
    with pytest.raises(InputError, match="neither a run folder nor a checkpoint"):
        find_checkpoint(tmp_path, on_damaged=forbid)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/9").write_text("no folder")
    with pytest.raises(InputError, match="has no checkpoint yet. Name another run, or train this"):
        find_checkpoint(tmp_path, on_damaged=forbid)


def test_a_format_of_the_future_is_refused(tmp_path, tokenizer):
    folder = save(tmp_path, 1, tokenizer)
    meta = json.loads((folder / "meta.json").read_text()) | {"format": 99}
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="checkpoint format 99, this version reads"):
        read_checkpoint(folder)


def change_settings(folder: Path, **model: Any) -> None:
    """Write other settings of the model into a step folder, with a checksum that holds."""
    meta, sums = folder / "meta.json", folder / "checksums.json"
    table = json.loads(meta.read_text())
    table["config"]["model"] |= model
    meta.write_text(json.dumps(table))
    held = json.loads(sums.read_text()) | {"meta.json": sha256_of_file(meta)}
    sums.write_text(json.dumps(held))
    assert damage(folder) is None


OTHER_MODELS = [
    ({"num_hidden_layers": 3}, "has no layers.2.input_layernorm.weight, which is [8] by"),
    ({"num_hidden_layers": 10**9}, "has no layers.2.input_layernorm.weight, which is [8] by"),
    ({"num_hidden_layers": 1}, "has 'layers.1.input_layernorm.weight', which is not in the model"),
    ({"intermediate_size": 20}, "{layers.0.mlp.gate_proj} is [8, 12], and [8, 20] by"),
    ({"hidden_size": 16}, "embed_tokens.weight is [16, 8], and [16, 16] by the settings"),
    ({"num_key_value_heads": 2}, "{layers.0.self_attn.k_proj} is [8, 4], and [8, 8] by"),
    ({"tie_word_embeddings": False}, "has no {lm_head}, which is [8, 16] by the settings"),
    ({"score_head": True}, "has no {score}, which is [8, 1] by the settings"),
    (
        {"num_experts": 4, "moe_intermediate_size": 12},
        "has no {layers.0.mlp.gate}, which is [8, 4] by the settings",
    ),
]


@pytest.mark.parametrize(("changed", "words"), OTHER_MODELS)
def test_weights_of_another_model_than_the_settings_are_refused(
    tmp_path, tokenizer, changed, words
):
    folder = save(tmp_path, 1, tokenizer)
    change_settings(folder, **changed)
    with pytest.raises(InputError) as caught:
        read_checkpoint(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}: {words.replace('}', '.kernel').replace('{', '')}")
    assert message.endswith("These are two models; give another checkpoint.")


@pytest.mark.parametrize(("changed", "words"), [OTHER_MODELS[0], OTHER_MODELS[3], OTHER_MODELS[6]])
def test_the_twin_refuses_weights_of_another_model_too(tmp_path, tokenizer, changed, words):
    pytest.importorskip("torch")
    from tinyllm_torch.model.weights import initial_weights
    from tinyllm_torch.training import checkpoint as twin
    from tinyllm_torch.training.step import new_state as new_twin_state

    state = new_twin_state(CONFIG, initial_weights(CONFIG.model, seed=0))
    kept = {"config": CONFIG, "tokenizer": tokenizer, "dataset_hash": "", "best": None}
    folder = twin.save_checkpoint(tmp_path, state, **kept)
    assert twin.read_checkpoint(folder).weights.keys() == state.weights.keys()
    change_settings(folder, **changed)
    words = words.replace("}", ".weight").replace("{", "")
    for ours, theirs in (("[8, 12]", "[12, 8]"), ("[8, 20]", "[20, 8]"), ("[8, 16]", "[16, 8]")):
        words = words.replace(ours, theirs)
    with pytest.raises(InputError) as caught:
        twin.read_checkpoint(folder)
    assert str(caught.value).startswith(f"{folder}: {words}")


def test_a_failed_save_leaves_what_was_there(tmp_path, tokenizer, monkeypatch):
    save(tmp_path, 1, tokenizer)
    save(tmp_path, 2, tokenizer)

    def full_disk(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(folders, "_flush_to_disk", full_disk)
    for step in (2, 3):
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, step, tokenizer)
    monkeypatch.undo()
    assert [step for step, _ in step_folders(tmp_path)] == [1, 2]
    assert damage(tmp_path / "checkpoints/2") is None
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_threads_that_a_failed_save_leaves_are_silent_and_no_others(monkeypatch, caplog):
    logger = logging.getLogger("absl")
    monkeypatch.setattr(logger, "filters", [])
    for hook in ("excepthook", "unraisablehook"):
        monkeypatch.setattr(sys, hook, getattr(sys, hook))
    for library in ("asyncio", "concurrent.futures"):
        monkeypatch.setattr(logging.getLogger(library), "level", logging.WARNING)

    def say(file: str, text: str) -> None:
        logger.handle(logger.makeRecord("absl", logging.ERROR, file, 1, text, (), None))

    def say_in_background(*given: str) -> None:
        thread = threading.Thread(target=say, args=given)
        thread.start()
        thread.join()

    orbax, other = "site-packages/orbax/checkpoint/_src/futures/future.py", "orbax_user.py"
    with checkpoint_file._quiet_orbax(saves=True):
        pass
    say_in_background(orbax, "after a good save")
    with warnings.catch_warnings(), pytest.raises(OSError, match="disk"):  # noqa: SIM117
        with checkpoint_file._quiet_orbax(saves=True):
            raise OSError("disk")
    say_in_background(orbax, "left over")
    say_in_background(other, "of another")
    say(orbax, "of the main thread")
    assert caplog.messages == ["after a good save", "of another", "of the main thread"]


@pytest.mark.parametrize(
    ("name", "is_orbax"),
    [
        ("async_serialize_from_host.<locals>.write_fragment", True),
        ("_async_serialize_shardings", True),
        ("NumpyHandler._background_serialize", True),
        ("SavePass.<locals>._coro_with_registration", True),
        ("serve", False),
        ("Server.<locals>.write_fragment", False),
    ],
)
def test_tasks_that_a_failed_save_never_began_are_known_by_name(name, is_orbax):
    said = f"coroutine '{name}' was never awaited"
    assert bool(re.match(checkpoint_file._NOT_BEGUN, said)) == is_orbax


def test_a_failed_read_silences_nothing_but_its_own_late_threads(monkeypatch, recwarn):
    told: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: told.append(str(found.exc_value)))
    names = ("absl", "asyncio", "concurrent.futures")

    def look() -> list[Any]:
        loggers = [logging.getLogger(name) for name in names]
        return [sys.excepthook, *warnings.filters, *((x.level, [*x.filters]) for x in loggers)]

    before = look()
    for _ in range(3):
        with pytest.raises(ValueError, match="nothing"), checkpoint_file._quiet_orbax(saves=False):
            raise ValueError("nothing")
        assert look() == before
    hook: Any = sys.unraisablehook
    assert not isinstance(hook._told, type(hook)), "each failure adds another"
    late = SimpleNamespace(exc_value=RuntimeError("Event loop is closed"))
    other = SimpleNamespace(exc_value=RuntimeError("another"))

    def say(name: str, found: Any, done: threading.Event) -> None:
        found.exc_value.args = (f"{found.exc_value} ({name})",)
        hook(found)
        done.set()

    for found in (late, other):  # as threads of a library in C++, and of Python
        for name, begin in (
            ("foreign", _thread.start_new_thread),
            ("own", lambda call, given: threading.Thread(target=call, args=given).start()),
        ):
            text, done = str(found.exc_value), threading.Event()
            begin(say, (name, found, done))
            assert done.wait(20)
            found.exc_value.args = (text,)
    assert told == ["Event loop is closed (own)", "another (foreign)", "another (own)"]


def test_a_checkpoint_whose_arrays_cannot_be_read_is_refused_and_leaves_the_hooks(
    tmp_path, tokenizer
):
    # The hook for reads that end late stays, as it does in a run: some end during the tests that follow.
    hook, level = sys.excepthook, logging.getLogger("asyncio").level
    folder = save(tmp_path, 1, tokenizer)
    for path in (folder / "state/d").iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    sums = json.loads((folder / "checksums.json").read_text())
    sums = {name: sha256_of_file(folder / name) for name in sums}
    (folder / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(InputError, match="no checkpoint that this version writes"):
        checkpoint_file.open_to_resume(folder, on_damaged=forbid)
    assert sys.excepthook is hook
    assert logging.getLogger("asyncio").level == level


def test_the_newest_and_the_best_are_kept(tmp_path, tokenizer):
    for step in range(1, 6):
        save(tmp_path, step, tokenizer)
    (tmp_path / "checkpoints/.6.partial").mkdir()
    prune_checkpoints(tmp_path, keep=2, best_step=1)
    assert [step for step, _ in step_folders(tmp_path)] == [1, 4, 5]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_best_points_at_the_marked_step(tmp_path, tokenizer):
    for step in (1, 2):
        save(tmp_path, step, tokenizer)
        mark_best(tmp_path, step)
    assert (tmp_path / "best").resolve() == (tmp_path / "checkpoints/2").resolve()
    assert read_checkpoint(tmp_path / "best").step == 2


def test_saving_a_step_again_replaces_it(tmp_path, tokenizer):
    save(tmp_path, 3, tokenizer)
    folder = save(tmp_path, 3, tokenizer)
    assert damage(folder) is None
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
