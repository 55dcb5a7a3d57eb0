"""No setting of a mode is without effect: each is changed alone, and what a run tells changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mode_runs import MODES, SHORT, flags_of, reproducible, write_data

from tinyllm_jax import train
from tinyllm_jax.training import loop

pytestmark = pytest.mark.slow  # the file as a whole
COMPILED_PLAINLY = True

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


@pytest.mark.parametrize("base", ["dpo", "ppo"])
def test_what_a_run_tells_does_not_change_by_itself(base: str, told: Any) -> None:
    settings = {**BRIEF, **BASES[base]}
    first = told(settings)
    assert first == told(settings, again=True)
