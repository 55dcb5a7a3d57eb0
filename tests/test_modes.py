"""Every way to learn after pretraining, from the command line to what its run leaves."""

import dataclasses
import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Command
from mode_runs import (
    MODES,
    RLHF,
    SHORT,
    assert_same_run,
    flags_of,
    rows_of,
    write_data,
)
from test_resume import stop_at

from convert import conversion
from convert.__main__ import main as convert_command
from convert.tensor_file import read_tensors
from tinyllm_jax import generate, prepare, train
from tinyllm_jax.data.chat_template import CONTROL_TOKENS, ChatTemplate
from tinyllm_jax.data.prepare_chat import prepare_preferences
from tinyllm_jax.data.tokenizer import load_tokenizer
from tinyllm_jax.errors import InputError
from tinyllm_jax.model.weights import merge_weights, model_structure
from tinyllm_jax.objectives.pairs import reference_key
from tinyllm_jax.training.adaptation import for_conversations
from tinyllm_jax.training.checkpoint import Checkpoint, open_checkpoint, read_checkpoint
from tinyllm_torch import generate as torch_generate

pytestmark = pytest.mark.slow  # every test begins with runs of all modes

HELD = ("dpo", "grpo", "ppo")


@pytest.fixture(scope="module")
def runs(trained_run: Path, tmp_path_factory: Any, prepared_folder: Path) -> Path:
    """Give a folder with a finished run of each mode, all but sft begun with that of sft."""
    folder = tmp_path_factory.mktemp("modes")
    write_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
        patch.chdir(folder)
        for name, settings in MODES.items():
            base = trained_run if name == "sft" else "sft"
            settings = {**SHORT, **settings, "run.init_from": base, "run.out": name}
            assert train.main(flags_of(settings)) == 0
    return folder


@pytest.fixture(autouse=True)
def beside_the_data(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared_folder: Path
) -> None:
    """Let each test begin in a folder of its own with the data and links to the runs."""
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    for name in MODES:
        (tmp_path / name).symlink_to(runs / name)


def run_mode(name: str, *more: str, **changed: Any) -> int:
    settings = {**SHORT, **MODES[name], "run.init_from": "sft", "run.out": "new", **changed}
    return train.main([*flags_of(settings), *more])


# What a run leaves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODES)
def test_a_run_leaves_metrics_samples_a_report_and_its_settings(name: str) -> None:
    run = Path(name)
    train_rows, looks = rows_of(run, "train"), rows_of(run, "eval")
    assert [row["step"] for row in train_rows] == [*range(1, 9)]
    assert [row["step"] for row in looks] == [0, 4, 8]
    assert [row["step"] for row in rows_of(run, "sample")] == [0, 4, 8]
    assert all(row["text"].strip() for row in rows_of(run, "sample"))
    measures = {"sft": "bits_per_byte", "dpo": "accuracy", "reward": "accuracy"}
    measure = measures.get(name, "reward")
    assert all(np.isfinite([row["loss"], row[measure]]).all() for row in looks)
    assert all(np.isfinite([row["loss"], row["grad_norm"]]).all() for row in train_rows)
    assert not any(row["skipped"] for row in train_rows)
    report = (run / "report.html").read_text()
    label = {"accuracy": "share of pairs the right way round", "reward": "mean reward of an answer"}
    assert [text in report for text in label.values()] == [measure == key for key in label]
    settings = json.loads((run / "training_config_snapshot.json").read_text())
    assert settings["run"]["mode"] == MODES[name]["run.mode"]
    assert (run / "reference").is_dir() == (name in HELD)


@pytest.mark.parametrize("name", MODES)
def test_prepare_does_beforehand_what_the_run_did(
    name: str,
    runs: Path,
    trained_run: Path,
    prepared_folder: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def sets() -> dict[Path, int]:
        return {
            path: path.stat().st_mtime_ns for path in prepared_folder.glob("prepared/*/manifest*")
        }

    monkeypatch.chdir(runs)  # with the very files that the run has read
    before, base = sets(), trained_run if name == "sft" else "sft"
    settings = {**SHORT, **MODES[name], "run.init_from": base, "run.out": "new"}
    assert prepare.main(flags_of(settings)) == 0
    account = json.loads(capsys.readouterr().out)
    assert account == json.loads(Path(name, "dataset_stats.json").read_text())
    assert sets() == before  # found, as a run would find what it left
    assert len(before) > 0
    assert not Path("new").exists()


def test_pairs_are_learnt_the_right_way_round() -> None:
    for name in ("dpo", "reward"):
        first, *_, last = rows_of(Path(name), "eval")
        # Nothing is preferred by the reference itself, nor by scores that are all 0.
        assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
        assert first["margin"] == pytest.approx(0, abs=1e-5)
        assert last["loss"] < first["loss"] - 0.001
        assert last["accuracy"] == 1.0


def test_rollouts_tell_once_for_all_steps_that_learn_from_them() -> None:
    for name in ("grpo", "ppo"):
        rows = rows_of(Path(name), "rollout")
        assert [row["step"] for row in rows] == [1, 3, 5, 7]
        assert all(0 < row["answer_tokens"] <= 12 for row in rows)
        ratios = [row["ratio"] for row in rows_of(Path(name), "train")]
        # On the policy that sampled, then off it.
        assert np.abs(np.array(ratios[::2]) - 1).max() < 1e-5 < abs(ratios[1] - 1)
    assert not any("explained_variance" in row for row in rows_of(Path("grpo"), "train"))
    assert all(row["explained_variance"] < 1 for row in rows_of(Path("ppo"), "train"))
    assert len({row["kl_coef"] for row in rows_of(Path("grpo"), "rollout")}) == 1
    assert len({row["kl_coef"] for row in rows_of(Path("ppo"), "rollout")}) == 4


def test_the_reference_stays_the_model_that_a_run_began_with() -> None:
    begun = open_checkpoint(Path("sft"), on_damaged=pytest.fail)
    for name in HELD:
        kept = read_checkpoint(Path(name) / "reference")
        assert kept.step == begun.step
        for key, array in begun.weights.items():
            np.testing.assert_array_equal(kept.weights[key], array)
        newest = open_checkpoint(Path(name), on_damaged=pytest.fail).weights
        assert any((newest[key] != array).any() for key, array in begun.weights.items())


@pytest.mark.parametrize("name", MODES)
def test_generate_writes_with_what_a_run_leaves(name: str, capsys: Any) -> None:
    flags = ["--checkpoint", name, "--prompt", "Who is it?", "--max-new-tokens", "4", "--greedy"]
    assert generate.main(flags) == 0
    assert capsys.readouterr().out.strip()


def test_both_packages_answer_a_question_with_the_same_words(
    capsys: Any, trained_run: Path
) -> None:
    flags = ["--checkpoint", "sft", "--prompt", "Who is there?", "--chat", "--greedy"]
    answers = []
    for command in (generate, torch_generate):
        assert command.main([*flags, "--max-new-tokens", "8"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert "Who is there?" not in answers[0]
    assert generate.main([word for word in flags if word != "--chat"]) == 0
    assert capsys.readouterr().out.startswith("Who is there?")
    with pytest.raises(InputError, match=r"no control tokens .*--mode sft"):
        generate.main(["--checkpoint", str(trained_run), "--prompt", "Hello", "--chat"])


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("sft", "LlamaForCausalLM"),
        ("dpo", "LlamaForCausalLM"),
        ("reward", "LlamaForSequenceClassification"),
        ("ppo", "LlamaForCausalLM"),
    ],
)
def test_convert_gives_hugging_face_the_model_and_its_chat_template(
    name: str, class_name: str, tmp_path: Path
) -> None:
    assert convert_command([name, str(tmp_path / "hf"), "--to", "hf"]) == 0
    table = json.loads((tmp_path / "hf/config.json").read_text())
    assert table["architectures"] == [class_name]
    tokenizer = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert tokenizer["chat_template"] == ChatTemplate(load_tokenizer(Path(name))).jinja
    back = conversion.read(tmp_path / "hf")
    assert back.model.score_head == (name == "reward")
    weights = conversion.read(Path(name), prefer_best=True).weights
    for key, array in back.weights.items():
        np.testing.assert_array_equal(array, weights[key], err_msg=key)


def test_weights_of_a_policy_stay_a_language_model_on_the_way_through_other_formats(
    capsys: Any,
) -> None:
    policy, reward = (conversion.read(Path(name)) for name in ("ppo", "reward"))
    for bundle, scores in ((policy, False), (reward, True)):
        bundle.training = None  # as of merged adapters
        for middle, to in (("run", "orbax"), ("a.pt", "torch"), ("a.safetensors", "safetensors")):
            conversion.write(bundle, middle, to=to, overwrite=True)
            assert convert_command([middle, "hf", "--to", "hf", "--overwrite"]) == 0
            assert ("value function that PPO" in capsys.readouterr().out) != scores
            assert conversion.read("hf").model.score_head == scores
    assert convert_command(["a.safetensors", "reward.pt"]) == 0
    assert conversion.read("reward.pt").model.score_head


def test_a_policy_of_adapters_is_exported_as_a_language_model_without_its_values(
    capsys: Any,
) -> None:
    assert run_mode("ppo", **{"lora.rank": 4, "train.max_steps": 4}) == 0
    left_out = "the value function that PPO trained beside the model was left out"
    expected = conversion.read(Path("new"), prefer_best=True).weights
    assert "score.weight" in expected
    sources = {"new": expected, "new/reference": conversion.read(Path("new/reference")).weights}
    formats = (("hf", "hf"), ("a.gguf", "gguf"), ("a.bin", "llama2c"))
    for source, weights in sources.items():
        for name, to in formats[: 1 if "reference" in source else 3]:
            assert convert_command([source, name, "--to", to, "--overwrite"]) == 0
            assert left_out in capsys.readouterr().out
            back = conversion.read(Path(name))
            assert back.weights.keys() == weights.keys() - {"score.weight"}
            for key, array in back.weights.items():
                np.testing.assert_array_equal(array, weights[key], err_msg=key)
        table = json.loads(Path("hf/config.json").read_text())
        assert table["architectures"] == ["LlamaForCausalLM"]
    assert convert_command(["new", "adapters", "--to", "peft"]) == 0
    assert left_out in capsys.readouterr().out
    table = json.loads(Path("adapters/adapter_config.json").read_text())
    assert (table["task_type"], table["modules_to_save"]) == ("CAUSAL_LM", None)
    adapters, _ = read_tensors(Path("adapters/adapter_model.safetensors"))
    assert len(adapters) == 2 * 2 * 7
    assert not any("score" in name for name in adapters)


# Going on exactly ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HELD)  # the others in the test that kills, which is slow
def test_a_run_that_goes_on_in_a_new_folder_is_bitwise_the_run_that_never_stopped(
    name: str,
) -> None:
    flags = ["--resume", f"{name}/checkpoints/4", "--out", "branch"]
    assert train.main(flags) == 0
    assert_same_run(Path("branch"), Path(name), step=8, best=False)  # which is a folder's own
    assert (Path("branch") / "reference").is_dir()


@pytest.mark.slow
def test_a_signal_between_the_steps_of_a_rollout_waits_for_the_last_of_them() -> None:
    stopping = stop_at(5)
    assert run_mode("ppo") == 128 + signal.SIGTERM
    stopping.undo()
    assert (Path("new/checkpoints") / "6").is_dir()
    assert not (Path("new/checkpoints") / "5").exists()
    assert train.main(["--resume", "new"]) == 0
    assert_same_run(Path("new"), Path("ppo"), step=8)


def kill_when(process: Any, condition: Callable[[], bool], *, seconds_later: float) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.001)
    time.sleep(seconds_later)
    process.kill()
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODES)
def test_runs_killed_with_sigkill_at_any_moment_go_on_bitwise(
    name: str, command: Command, trained_run: Path, tmp_path: Path
) -> None:
    base = trained_run if name == "sft" else "sft"
    settings = {**SHORT, **MODES[name], "run.init_from": base, "run.out": "killed"}
    chance = random.Random(name)
    metrics, saved = tmp_path / "killed/metrics.jsonl", tmp_path / "killed/checkpoints/4"
    for condition in (metrics.exists, saved.exists):
        process = command.start("train", *flags_of(settings), "--auto-resume")
        kill_when(process, condition, seconds_later=chance.random() * 0.15)
    assert train.main([*flags_of(settings), "--auto-resume"]) == 0
    assert_same_run(tmp_path / "killed", Path(name), step=8)
    assert not list((tmp_path / "killed/checkpoints").glob(".*"))


def test_an_adapted_weight_of_the_divergence_needs_the_metrics_it_comes_from() -> None:
    shutil.copytree("ppo", "mine", symlinks=True)
    (Path("mine") / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"metrics.jsonl: tells of no rollout"):
        train.main(["--resume", "mine", "--max-steps", "10"])


# What does not fit --------------------------------------------------------------------------------------


def refused(capsys: Any, *flags: str) -> str:
    """Give the one line of an error as a person sees it; nothing is left half-written."""
    from tinyllm_jax.cli import run

    with pytest.raises(SystemExit) as caught:
        run(lambda: train.main(flags))
    assert caught.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, errors
    assert not list(Path().rglob("*.partial"))
    return errors[0]


@pytest.mark.parametrize("name", MODES)
def test_no_mode_begins_without_a_model(name: str, capsys: Any) -> None:
    settings = {**SHORT, **MODES[name], "run.out": "new"}
    assert "Name it with --init-from" in refused(capsys, *flags_of(settings))
    assert not Path("new").exists()


TURNS = {
    "roles out of order": (["user", "user", "assistant"], "turn 2 is of 'user' after 'user'"),
    "an empty answer": (["user", ""], "turn 2 is an empty answer"),
    "no answer": (["user"], "no assistant turn"),
}


@pytest.mark.parametrize("what", TURNS)
def test_a_bad_conversation_is_named_with_file_and_line(what: str, capsys: Any) -> None:
    roles, message = TURNS[what]
    turns = [{"role": role or "assistant", "content": role and "Hm."} for role in roles]
    with open("chat.jsonl", "a") as file:
        file.write(json.dumps({"messages": turns}) + "\n")
    flags = flags_of({**SHORT, **MODES["sft"], "run.init_from": "sft", "run.out": "new"})
    error = refused(capsys, *flags)
    assert f"chat.jsonl:51: {message}" in error
    assert "--data.on_bad_record skip" in error
    assert not Path("new").exists()


@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_two_answers_that_are_the_same_are_named_with_file_and_line(name: str, capsys: Any) -> None:
    with open("pairs.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "Hm?", "chosen": "Yes.", "rejected": "Yes."}) + "\n")
    flags = flags_of({**SHORT, **MODES[name], "run.init_from": "sft", "run.out": "new"})
    assert "pairs.jsonl:51: chosen and rejected are the same" in refused(capsys, *flags)
    assert not Path("new").exists()


REWARDS = {
    "": "rlhf.reward is empty",
    "nowhere": "no such folder, and no function",
    "no_module:f": "No module named 'no_module'",
    ":f": "no such folder, and no function",
    "mode_rewards:missing": "no attribute 'missing'",
    "mode_rewards:CONSTANT": "no function, but 1",
    "fails_to_import:f": "ZeroDivisionError",
    "sft": "no reward model. Train one with --mode reward",
    "ppo": "a policy that PPO trained, whose scores are the values of positions",
    "chat.jsonl": "chat.jsonl",
    "other_reward": "its tokenizer is another than the policy's",
}


@pytest.mark.parametrize("reward", REWARDS)
def test_what_gives_no_rewards_is_refused_before_the_run_begins(reward: str, capsys: Any) -> None:
    Path("fails_to_import.py").write_text("1 / 0\n")
    if reward == "other_reward":
        shutil.copytree("reward", reward, symlinks=True)
        change_tokenizer(Path(reward))
    settings = {**SHORT, **RLHF, "run.init_from": "sft", "run.out": "new", "rlhf.reward": reward}
    assert REWARDS[reward] in refused(capsys, *flags_of(settings))
    assert not Path("new").exists()


def change_tokenizer(run: Path) -> None:
    """Give the checkpoints of a run another tokenizer, with sums that are right."""
    from tinyllm_jax.config import TokenizerConfig
    from tinyllm_jax.data.tokenizer import extend_tokenizer, train_tokenizer
    from tinyllm_jax.data.toy_stories import generate_stories
    from tinyllm_jax.training.checkpoint import write_step_folder

    checkpoint = open_checkpoint(run, on_damaged=pytest.fail)
    shutil.rmtree(run)
    stories = generate_stories(seed=9, start=0, stop=300)
    other = train_tokenizer(stories, config=TokenizerConfig(), vocab_size=512)
    write_step_folder(
        run,
        weights=checkpoint.weights,
        moments=checkpoint.moments,
        step=np.int32(4),
        nonfinite_streak=np.int32(0),
        config=checkpoint.config,
        tokenizer=extend_tokenizer(other, CONTROL_TOKENS),
        dataset_hash="",
        best=None,
        remarks={},
    )


def test_a_reward_function_that_fails_ends_the_run_and_the_mended_one_goes_on(capsys: Any) -> None:
    source = Path("mode_rewards.py").read_text()
    changed = f"{source}\nfrom pathlib import Path\ndef mended(*given):\n"
    changed += "    return (length if Path('mended').exists() else broken)(*given)\n"
    Path("rewards_that_fail.py").write_text(changed)
    settings = {**SHORT, **RLHF, "run.init_from": "sft", "run.out": "new"}
    settings |= {"rlhf.reward": "rewards_that_fail:mended", "train.max_steps": 4}
    error = refused(capsys, *flags_of(settings))
    assert "it failed: RuntimeError: no such judge. Mend the function" in error
    assert "--auto-resume" in error
    Path("mended").touch()
    assert train.main([*flags_of(settings), "--auto-resume"]) == 0
    said, last = capsys.readouterr().err, rows_of(Path("new"), "eval")[-1]
    assert f"step 4: validation reward {last['reward']:.4f} (ended" in said
    assert f"Highest validation reward {last['reward']:.4f}, at step 4: new/best" in said
    assert "validation loss" not in said


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rlhf.group_size": 3}, "rlhf.group_size=3 does not divide the 8 answers"),
        ({"rlhf.group_size": 1}, "leaves nothing to compare"),
        ({"train.max_steps": 9}, "train.max_steps=9 falls between"),
        ({"checkpoint.interval_steps": 5}, "checkpoint.interval_steps=5 falls between"),
        ({"train.eval_interval_steps": 1}, "train.eval_interval_steps=1 falls between"),
        ({"train.steps_per_dispatch": 4}, "does not divide rlhf.updates_per_rollout=2"),
        ({"rlhf.kl_target": 1}, "says nothing to rlhf.algorithm=grpo"),
    ],
)
def test_settings_that_do_not_divide_are_refused(changed: Any, message: str, capsys: Any) -> None:
    settings = {**SHORT, **MODES["grpo"], "run.init_from": "sft", "run.out": "new", **changed}
    assert message in refused(capsys, *flags_of(settings))
    assert not Path("new").exists()


@pytest.mark.parametrize("name", HELD)
def test_a_run_that_has_lost_its_reference_is_refused(name: str, capsys: Any) -> None:
    shutil.copytree(name, "mine", symlinks=True)
    shutil.rmtree("mine/reference")
    before = sorted(Path("mine").rglob("*"))
    error = refused(capsys, "--resume", "mine", "--max-steps", "12")
    assert "mine: reference/ is gone" in error
    assert sorted(Path("mine").rglob("*")) == before


def test_a_run_does_not_go_on_in_another_mode(capsys: Any) -> None:
    before = sorted(Path("sft").rglob("*"))
    for flags in (["--resume", "sft"], ["--config", "dpo", "--resume", "sft", "--out", "sft"]):
        words = ["--mode", "dpo", "--data", "pairs.jsonl", "--max-steps", "10", *flags]
        assert "a run of --mode sft, and this one is of dpo" in refused(capsys, *words)
    assert sorted(Path("sft").rglob("*")) == before


def test_a_run_keeps_its_algorithm_and_its_tokenizer(capsys: Any, trained_run: Path) -> None:
    words = ["--max-steps", "12", "--out", "new"]
    error = refused(capsys, "--resume", "grpo", *words, "--rlhf.algorithm", "ppo")
    assert "grpo/checkpoints/8: has no head for scores, which rlhf.algorithm=ppo" in error
    flags = flags_of({**SHORT, **MODES["sft"], "run.init_from": "sft", "run.out": "new"})
    error = refused(capsys, *flags, "--tokenizer.path", str(trained_run))
    assert "the same ids mean other text" in error
    assert "keeps the tokenizer of its model" in refused(capsys, *flags, "--retrain-tokenizer")
    error = refused(capsys, *flags, "--seed", "many")
    assert "many" in error
    assert not Path("new").exists()


def test_a_run_goes_on_by_itself_where_its_beginning_is_not_named_again() -> None:
    shutil.copytree("sft", "mine", symlinks=True)
    assert train.main(["--mode", "sft", "--auto-resume", "--out", "mine", "--max-steps", "9"]) == 0
    assert [row["step"] for row in rows_of(Path("mine"), "train")] == [*range(1, 10)]


# What a run begins with --------------------------------------------------------------------------------


def logits_of(checkpoint: Checkpoint, tokens: np.ndarray) -> np.ndarray:
    structure, _ = model_structure(checkpoint.config.model)
    weights = {name: jnp.asarray(array) for name, array in checkpoint.weights.items()}
    model = merge_weights(structure, weights)
    return np.asarray(model.logits(model.hidden(jnp.asarray(tokens)).states))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [0, 1, 10])
def test_new_tokens_leave_the_logits_of_the_old_ones_as_they_are(
    trained_run: Path, tied: bool, padding: int
) -> None:
    old = widened(open_checkpoint(trained_run, on_damaged=pytest.fail), padding, tied=tied)
    known = old.tokenizer.vocab_size
    new = for_conversations(old, scores=True, seed=0)
    assert new.tokenizer.vocab_size == known + 2
    assert new.config.model.vocab_size == max(known + 2, old.config.model.vocab_size)
    tokens = np.arange(1, 25, dtype=np.int32).reshape(2, 12)
    # Two more columns may change the last bit of a product.
    np.testing.assert_allclose(
        logits_of(new, tokens)[..., :known], logits_of(old, tokens)[..., :known], atol=2e-6
    )
    names = ("embed_tokens.weight", *([] if tied else ["lm_head.kernel"]))
    for name in names:
        table = new.weights[name] if name == names[0] else new.weights[name].T
        before = old.weights[name] if name == names[0] else old.weights[name].T
        mean, spread = before[:known].mean(axis=0), before[:known].std(axis=0)
        assert (np.abs(table[known : known + 2] - mean) < 0.06 * spread).all()
        assert (table[known] != table[known + 1]).all()  # or they could not be told apart
        np.testing.assert_array_equal(table[known + 2 :], before[known + 2 :])
    assert not new.weights["score.kernel"].any()


def widened(checkpoint: Checkpoint, padding: int, *, tied: bool) -> Checkpoint:
    """Give a checkpoint rows that no token has, and a head of its own if wanted."""
    model = checkpoint.config.model
    assert model.tie_word_embeddings
    size = model.vocab_size + padding
    rows = checkpoint.weights["embed_tokens.weight"]
    numbers = np.random.default_rng(0)
    extra = numbers.standard_normal((padding, model.hidden_size)).astype(rows.dtype)
    weights = {**checkpoint.weights, "embed_tokens.weight": np.concatenate([rows, extra])}
    if not tied:
        head = numbers.standard_normal((model.hidden_size, size))
        weights["lm_head.kernel"] = head.astype(rows.dtype)
    model = dataclasses.replace(model, vocab_size=size, tie_word_embeddings=tied)
    config = dataclasses.replace(checkpoint.config, model=model)
    return dataclasses.replace(checkpoint, config=config, weights=weights)


def test_new_rows_of_half_precision_are_means_of_all_old_ones() -> None:
    from ml_dtypes import bfloat16

    from tinyllm_jax.training.adaptation import with_new_tokens

    rows = (1 + np.random.default_rng(0).standard_normal((5000, 4)) / 10).astype(bfloat16)
    found = with_new_tokens(rows, known=5000, wanted=5001, size=5001, axis=0, seed=0)
    np.testing.assert_allclose(found[-1].astype(np.float64), 1.0, atol=0.02)


def test_a_run_begins_with_a_folder_of_hugging_face(trained_run: Path, tmp_path: Path) -> None:
    assert convert_command([str(trained_run), str(tmp_path / "hf"), "--to", "hf"]) == 0
    changed = {"run.init_from": "hf", "train.max_steps": 2, "optimizer.learning_rate": 1e-9}
    changed |= {"optimizer.min_learning_rate": 0.0}
    assert run_mode("sft", **changed) == 0
    old = open_checkpoint(trained_run, on_damaged=pytest.fail)
    new = open_checkpoint(Path("new"), on_damaged=pytest.fail)
    assert new.tokenizer.vocab_size == old.tokenizer.vocab_size + 2
    for key, array in old.weights.items():
        np.testing.assert_allclose(new.weights[key][: len(array)], array, atol=1e-6)


# The log-probabilities of the reference ----------------------------------------------------------------


def test_a_checkpoint_between_the_steps_of_a_rollout_is_no_place_to_go_on_from(capsys: Any) -> None:
    flags = ["--rlhf.updates_per_rollout", "3", "--max-steps", "12", "--out", "new"]
    flags += ["--train.eval_interval_steps", "3", "--checkpoint.interval_steps", "3"]
    with pytest.raises(InputError, match=r"would fall between .* Use one of \[1, 2, 4, 8\]"):
        train.main(["--resume", "grpo", *flags])
    assert not Path("new").exists()


def test_damaged_log_probabilities_of_the_reference_are_made_anew(
    prepared_folder: Path, capsys: Any
) -> None:
    kept = {path: path.read_bytes() for path in (prepared_folder / "reference").glob("*.npz")}
    assert kept
    for path, content in kept.items():
        path.write_bytes(content[: len(content) // 2])
    assert run_mode("dpo") == 0
    assert "damaged" in capsys.readouterr().err
    assert any(path.read_bytes() == content for path, content in kept.items())
    for path, content in kept.items():
        path.write_bytes(content)


def test_kept_log_probabilities_belong_to_all_that_they_depend_on() -> None:
    begun = open_checkpoint(Path("sft"), on_damaged=pytest.fail)
    weights = {name: jnp.asarray(array) for name, array in begun.weights.items()}
    config = begun.config
    data = prepare_preferences(
        dataclasses.replace(
            config,
            data=dataclasses.replace(
                config.data, paths=("pairs.jsonl",), validation_paths=("pairs_held.jsonl",)
            ),
        ),
        tokenizer=begun.tokenizer,
        progress=False,
    )
    changed = [
        dataclasses.replace(config, model=dataclasses.replace(config.model, **{name: value}))
        for name, value in (("rope_theta", 5e5), ("rms_norm_eps", 1e-3), ("scan_layers", True))
    ]
    changed += [dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=3))]
    keys = {reference_key(each, data, weights) for each in [config, *changed]}
    other = {**weights, "norm.weight": weights["norm.weight"] + 1}
    keys |= {reference_key(config, data, other)}
    assert len(keys) == 6
    assert reference_key(config, data, weights) in keys
