"""Checkpoints: everything comes back bitwise, damage is noticed, and nothing half-written counts."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllm_jax.config import Config
from tinyllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from tinyllm_jax.errors import InputError
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


@pytest.fixture(scope="module")
def tokenizer(trained_run: Path) -> Tokenizer:
    return load_tokenizer(trained_run)


def state_at(step: int) -> TrainState:
    """Make a state whose every number differs from every other."""
    numbers = np.random.default_rng(step)
    weights = {
        "layers.0.mlp.up_proj.kernel": jnp.asarray(numbers.normal(size=(3, 5)), jnp.float32),
        "norm.weight": jnp.asarray(numbers.normal(size=5), jnp.float32),
    }
    state = new_state(Config(), weights)
    filled = jax.tree.map(
        lambda x: jnp.asarray(numbers.normal(size=x.shape) * 100, x.dtype), state.optimizer_state
    )
    return state._replace(step=jnp.asarray(step, jnp.int32), optimizer_state=filled)


def save(run: Path, step: int, tokenizer: Tokenizer) -> Path:
    return save_checkpoint(
        run,
        state_at(step),
        config=Config(),
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
    assert found.config == Config()
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


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        find_checkpoint(tmp_path / "none", on_damaged=forbid)
    with pytest.raises(InputError, match="neither a run folder nor a checkpoint"):
        find_checkpoint(tmp_path, on_damaged=forbid)


def test_a_format_of_the_future_is_refused(tmp_path, tokenizer):
    folder = save(tmp_path, 1, tokenizer)
    meta = json.loads((folder / "meta.json").read_text()) | {"format": 99}
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="checkpoint format 99, this version reads"):
        read_checkpoint(folder)


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
