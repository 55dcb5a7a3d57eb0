"""No setting of a mode is without effect: each is changed alone, and what a run tells changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL_RUN
from mode_runs import MODES, SHORT, flags_of, reproducible, write_data

from tinyllm_jax import train
from tinyllm_jax.config import READ_BY, Config, loading
from tinyllm_jax.settings import setting_fields
from tinyllm_jax.training import loop

pytestmark = pytest.mark.slow  # the file as a whole

# Two steps of the same answers at a rate at which the second is outside of every clip range.
BRIEF = {
    **SHORT,
    "train.max_steps": 2,
    "train.eval_interval_steps": 2,
    "train.eval_batches": 1,
    "checkpoint.interval_steps": 2,
    "optimizer.learning_rate": 0.02,
    "optimizer.warmup_steps": 0,
    "sampling.max_new_tokens": 6,
    "run.init_from": "sft",
}
BASES: dict[str, dict[str, Any]] = {
    "dpo": MODES["dpo"],
    "simpo": {**MODES["dpo"], "dpo.loss": "simpo"},
    "grpo": MODES["grpo"],
    "ppo": {**MODES["ppo"], "rlhf.kl_target": 0.0},
    # The weight of the divergence changes from one rollout to the next.
    "two rollouts": {**MODES["ppo"], "rlhf.kl_target": 0.0, "rlhf.updates_per_rollout": 1},
}
# Each setting: what it is changed from and to.
MODE_SETTINGS: dict[str, tuple[str, Any]] = {
    "run.mode": ("dpo", "reward"),
    "dpo.loss": ("dpo", "ipo"),
    "dpo.beta": ("dpo", 0.5),
    "dpo.label_smoothing": ("dpo", 0.2),
    "dpo.length_normalised": ("dpo", "true"),
    "dpo.simpo_margin": ("simpo", 0.5),
    "rlhf.algorithm": ("grpo", "ppo"),
    "rlhf.reward": ("grpo", "mode_rewards:of_words"),
    "rlhf.group_size": ("grpo", 2),
    "rlhf.updates_per_rollout": ("grpo", 1),
    "rlhf.normalised_advantages": ("grpo", "false"),
    "rlhf.loss_level": ("grpo", "sequence"),
    "rlhf.clip_low": ("grpo", 0.001),
    "rlhf.clip_high": ("grpo", 0.001),
    "rlhf.kl_coef": ("grpo", 0.5),
    "rlhf.kl_target": ("two rollouts", 0.01),
    "rlhf.discount": ("ppo", 0.5),
    "rlhf.trace": ("ppo", 0.1),
    "rlhf.value_coef": ("ppo", 0.1),
    "rlhf.value_clip": ("ppo", 0.001),
}
# Where what other modes read is changed and must not be told.
DEAF: dict[str, dict[str, Any]] = {
    "pretrain": {
        flag[2:]: value for flag, value in zip(SMALL_RUN[::2], SMALL_RUN[1::2], strict=True)
    },
    **{name: MODES[name] for name in ("sft", "reward", "dpo", "grpo", "ppo")},
}


@pytest.fixture(scope="module")
def told(
    trained_run: Path, tmp_path_factory: pytest.TempPathFactory, prepared_folder: Path
) -> Callable[[dict[str, Any]], list[dict[str, Any]]]:
    """Give what trains in one folder and tells the metrics, once for the same settings."""
    folder = tmp_path_factory.mktemp("mode_settings")
    write_data(folder)
    known: dict[str, list[dict[str, Any]]] = {}

    def tell(settings: dict[str, Any], *, again: bool = False) -> list[dict[str, Any]]:
        key = str(sorted(settings.items()))
        if key not in known or again:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
                patch.chdir(folder)
                patch.setattr(loop, "write_report", lambda _, **__: None)
                out = f"run{len(known)}"
                assert train.main(flags_of({**settings, "run.out": out})) == 0
            known[key] = reproducible(folder / out)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
        base = {**SHORT, **MODES["sft"], "run.init_from": trained_run, "run.out": "sft"}
        assert train.main(flags_of(base)) == 0
    return tell


@pytest.mark.parametrize("name", MODE_SETTINGS)
def test_a_setting_of_a_mode_changes_what_a_run_tells(name: str, told: Any) -> None:
    base, changed = MODE_SETTINGS[name]
    before = {**BRIEF, **BASES[base]}
    assert told(before) != told({**before, name: changed})


def of_other_modes(name: str) -> dict[str, Any]:
    """Change every setting that a mode never reads to something that another would tell."""
    ways, changed = {name} | ({"rlhf"} if name in ("grpo", "ppo") else set()), {}
    for key, (field, kind) in setting_fields(Config).items():
        readers = READ_BY.get(key) or READ_BY.get(key.partition(".")[0])
        if readers is None or not ways.isdisjoint(readers):
            continue
        if field.metadata["choices"]:
            changed[key] = next(c for c in field.metadata["choices"] if c != field.default)
        elif kind is bool:
            changed[key] = not field.default
        elif kind is int:
            changed[key] = field.default + 1
        else:
            changed[key] = "other" if kind is str else 0.99 * field.default or 0.1
    return changed


@pytest.mark.parametrize("name", DEAF)
def test_what_is_refused_since_a_mode_never_reads_it_would_change_nothing(
    name: str, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "named_in_vain", lambda *_: [])
    before, changed = {**BRIEF, **DEAF[name]}, of_other_modes(name)
    assert len(changed) > 10
    if name == "pretrain":
        del before["run.init_from"]
    assert told(before) == told({**before, **changed})


@pytest.mark.parametrize("base", ["dpo", "ppo"])
def test_what_a_run_tells_does_not_change_by_itself(base: str, told: Any) -> None:
    settings = {**BRIEF, **BASES[base]}
    first = told(settings)
    assert first == told(settings, again=True)
