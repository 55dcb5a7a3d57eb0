"""Settings: presets, files and flags become one checked object, or every problem is named."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from tinyllm_jax import train
from tinyllm_jax.config import (
    READ_BY,
    Config,
    ModelConfig,
    config_from_table,
    config_to_table,
    load_config,
    preset_names,
    presets_dir,
)
from tinyllm_jax.errors import InputError
from tinyllm_jax.settings import (
    Parser,
    add_flags,
    build,
    convert_value,
    describe,
    parse_flags,
    setting_fields,
)
from tinyllm_jax.train import read_command
from tinyllm_jax.training.start_rules import settings_of

DENSE_PRESETS = {
    *("tiny", "tinystories_7m", "stories_260k", "stories_15m", "stories_42m", "stories_110m"),
    *("tiny_k", "tiny_k_215m", "minimind_26m", "medium"),
}


def problems_of(**overrides) -> list[str]:
    table = {key.replace("__", "."): value for key, value in overrides.items()}
    with pytest.raises(InputError) as caught:
        build(Config, [("", table)])
    return str(caught.value).splitlines()


def test_all_dense_presets_are_there():
    assert set(preset_names()) >= DENSE_PRESETS


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_says_how_it_is_run(name):
    config = load_config(name)
    assert config.model.vocab_size >= 8
    first_lines = (presets_dir() / f"{name}.toml").read_text().splitlines()[:3]
    assert any(f"python -m tinyllm_jax.train --config {name}" in line for line in first_lines)


def test_the_tinyllm_recipe_is_the_published_one():
    config = load_config("tinystories_7m")
    optimizer, run = config.optimizer, config.train
    assert (run.batch_size, config.data.sequence_length) == (32, 256)
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.95, 0.1)
    assert (optimizer.learning_rate, optimizer.min_learning_rate) == (5e-4, 5e-5)
    assert (optimizer.warmup_steps, optimizer.max_grad_norm) == (1000, 1.0)
    assert (run.eval_interval_steps, run.eval_batches) == (500, 100)


def test_every_setting_has_help_and_a_flag_that_sets_it():
    for key, (field, kind) in setting_fields(Config).items():
        assert len(field.metadata["help"]) > 10, key
        if kind is bool:
            word = str(not field.default).lower()
            expected = not field.default
        elif field.metadata["choices"]:
            word = expected = field.metadata["choices"][-1]
        elif kind in (int, float):
            low = field.metadata["minimum"]
            expected = kind(field.default if low is None else low)
            word = repr(expected)
        else:
            word = "some/path"
            expected = word if kind is str else (word,)
        _, overrides, problems = read_command([f"--{key}", word])
        assert problems == []
        assert convert_value(overrides[key], kind) == expected, key


def test_numbers_are_counted_in_units_that_their_names_tell():
    for key, (field, _) in setting_fields(Config).items():
        for unit in ("steps", "bytes", "tokens"):
            if key.endswith(f"_{unit}") and "accumulation" not in key:
                assert field.metadata["unit"] == unit, key


def test_a_flag_goes_over_a_file_and_a_file_over_the_default(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[train]\nbatch_size = 5\nseed = 6\n")
    config = load_config(str(path), {"train.seed": "7"})
    assert (config.train.batch_size, config.train.seed) == (5, 7)
    assert config.train.max_steps == Config().train.max_steps


def test_short_flags_set_what_their_long_names_do():
    words = ["--learning-rate", "1e-3", "--batch-size", "8", "--warmup-steps", "5", "--seed", "9"]
    _, overrides, problems = read_command([*words, "--max-steps", "77", "--auto-resume"])
    config = build(Config, [("", overrides)], problems)
    assert config.optimizer.learning_rate == 1e-3
    assert (config.train.batch_size, config.train.seed, config.train.max_steps) == (8, 9, 77)
    assert config.optimizer.warmup_steps == 5
    assert config.run.auto_resume is True


def test_a_config_survives_being_written_as_json():
    config = load_config("tiny_k", {"data.paths": ["a", "b"], "train.seed": 3})
    table = json.loads(json.dumps(config_to_table(config)))
    assert config_from_table(table, origin="snapshot") == config


def test_ranges_name_the_bound_and_the_unit():
    assert problems_of(train__batch_size=0) == [
        "train.batch_size=0 is too small. Use 1 rows or more."
    ]
    assert problems_of(model__mlp_dropout=1.0) == [
        "model.mlp_dropout=1.0 is too large. Use 0.95 or less."
    ]
    assert problems_of(optimizer__learning_rate=0.0) == [
        "optimizer.learning_rate=0.0 is too small. Use more than 0.0."
    ]
    for value in ("nan", "inf"):
        assert problems_of(optimizer__learning_rate=float(value)) == [
            f"optimizer.learning_rate={value} is not a finite number. Give one."
        ]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.batch_size", "many", "a whole number"),
        ("train.batch_size", 2.5, "a whole number"),
        ("train.batch_size", True, "a whole number"),
        ("optimizer.learning_rate", "fast", "a number"),
        ("model.tie_word_embeddings", "maybe", "true or false"),
        ("tokenizer.path", 3, "text in quotes"),
        ("data.paths", [1, 2], "a list of texts"),
    ],
)
def test_a_value_of_another_type_is_refused_with_the_type_to_give(key, value, expected):
    (line,) = problems_of(**{key: value})
    assert line == f"{key}={value!r} does not fit. Give {expected}."


RULES = [
    (
        {"model.num_attention_heads": 3, "model.num_key_value_heads": 3},
        "model.num_attention_heads=3 does not divide model.hidden_size=128. Use one of [1, 2, 4,",
    ),
    (
        {"model.num_key_value_heads": 3},
        "model.num_key_value_heads=3 does not divide model.num_attention_heads=4. Use one of "
        "[1, 2, 4].",
    ),
    ({"model.head_dim": 5}, "model.head_dim=5 is odd, and rotary positions turn pairs."),
    (
        {"data.sequence_length": 300},
        "data.sequence_length=300 is longer than model.max_position_embeddings=256.",
    ),
    (
        {"optimizer.min_learning_rate": 1.0},
        "optimizer.min_learning_rate=1.0 is above optimizer.learning_rate=0.0005.",
    ),
    ({"data.paths": []}, "data.paths is empty. Give --data NAME or PATH."),
    ({"run.resume": "a", "run.init_from": "b"}, "run.resume and run.init_from are both set."),
    (
        {"model.attention": "xla", "model.attention_dropout": 0.1},
        "model.attention=xla has no dropout on attention weights",
    ),
    (
        {"model.attention": "cudnn", "model.compute_dtype": "float32"},
        "model.attention=cudnn takes no float32.",
    ),
]


@pytest.mark.parametrize(("table", "expected"), RULES)
def test_rules_between_settings_name_both_values_and_what_to_use(table, expected):
    (line,) = problems_of(**table)
    assert line.startswith(expected)


def test_several_problems_are_reported_together():
    lines = problems_of(
        train__batch_size=0, model__rope_tetha=3.0, data__packing="tight", train__seed="x"
    )
    assert len(lines) == 4
    assert "unknown key model.rope_tetha. Did you mean 'model.rope_theta'?" in lines


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[model\n", "not TOML"),
        (b"[model]\nhidden_size = \xff\n", "not UTF-8"),
        (b"hidden_size = 3\n", "unknown key hidden_size. Did you mean 'model.hidden_size'?"),
        (b"[model.hidden_size]\nx = 3\n", "unknown key model.hidden_size.x."),
    ],
)
def test_a_broken_file_is_refused_by_its_name(tmp_path, content, expected):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_config(str(path))
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


def test_head_dim_follows_from_the_width_unless_it_is_given():
    assert ModelConfig(hidden_size=96, num_attention_heads=3).head_dim == 32
    assert ModelConfig(hidden_size=96, num_attention_heads=3, head_dim=8).head_dim == 8


def test_a_head_dim_that_is_given_need_not_divide_the_width():
    table = {"model.hidden_size": 100, "model.num_attention_heads": 6, "model.head_dim": 16}
    table["model.num_key_value_heads"] = 3
    assert build(Config, [("", table)]).model.head_dim == 16


IN_VAIN = [
    (
        {"dpo.beta": "0.3"},
        "dpo.beta says nothing to --mode pretrain: it is of --mode dpo. Use that, or leave it out.",
    ),
    (
        {"dpo.beta": "0.1"},  # its default, which would be taken for heard all the same
        "dpo.beta says nothing to --mode pretrain: it is of --mode dpo. Use that, or leave it out.",
    ),
    (
        {"run.mode": "sft", "rlhf.group_size": 4},
        "rlhf.group_size says nothing to --mode sft: it is of --mode rlhf. Use that, or leave it out.",
    ),
    (
        {"run.mode": "rlhf", "rlhf.reward": "a:b", "rlhf.discount": 0.9},
        "rlhf.discount says nothing to rlhf.algorithm=grpo: it is of --mode rlhf --rlhf.algorithm ppo. "
        "Use that, or leave it out.",
    ),
    (
        {"run.mode": "dpo", "rlhf.value_clip": 0.9},
        "rlhf.value_clip says nothing to --mode dpo: it is of --mode rlhf --rlhf.algorithm ppo. Use "
        "that, or leave it out.",
    ),
    (
        {"chat.system": "Be kind."},
        "chat.system says nothing to --mode pretrain: it is of --mode sft, dpo, reward or rlhf. Use one "
        "of those, or leave it out.",
    ),
    (
        {"run.mode": "sft", "tokenizer.kind": "bytelevel"},
        "tokenizer.kind says nothing to --mode sft: it is of --mode pretrain. Use that, or leave it out.",
    ),
    (
        {"run.mode": "rlhf", "rlhf.reward": "a:b", "sampling.temperature": 0.7},
        "sampling.temperature says nothing to --mode rlhf: it is of --mode pretrain, sft, dpo or reward. "
        "Use one of those, or leave it out.",
    ),
]


@pytest.mark.parametrize(("typed", "expected"), IN_VAIN)
def test_a_flag_that_the_mode_never_reads_is_refused(typed, expected):
    with pytest.raises(InputError) as caught:
        load_config(typed.get("run.mode", "tiny").replace("pretrain", "tiny"), typed)
    assert str(caught.value) == expected


def test_a_file_for_one_mode_that_says_what_it_never_reads_is_refused_by_name(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[dpo]\nbeta = 0.3\n[chat]\nformat = "auto"\n[run]\nmode = "dpo"\n')
    assert load_config(str(path)).dpo.beta == 0.3
    path.write_text(path.read_text().replace('"dpo"', '"pretrain"'))
    with pytest.raises(InputError) as caught:
        load_config(str(path), {"chat.system": "Be kind."})
    lines = str(caught.value).splitlines()
    assert [line.partition(" says")[0] for line in lines] == (
        [f"{path}: dpo.beta", f"{path}: chat.format", "chat.system"]
    )


@pytest.mark.parametrize("own", ["", '[run]\nmode = "pretrain"\n'])
def test_one_file_may_serve_the_runs_of_several_modes(own, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[dpo]\nbeta = 0.3\n[tokenizer]\nkind = "bytelevel"\n' + own)
    assert load_config(str(path), {"run.mode": "dpo"}).dpo.beta == 0.3
    with pytest.raises(InputError, match="rlhf.group_size says nothing to --mode dpo"):
        load_config(str(path), {"run.mode": "dpo", "rlhf.group_size": 4})


@pytest.mark.parametrize("name", [*preset_names(), str(presets_dir() / "tinystories_7m.toml")])
def test_a_preset_may_say_what_the_mode_never_reads(name):
    assert load_config(name, {"run.mode": "sft", "data.packing": "packed"}).run.mode == "sft"


def test_settings_of_another_mode_that_a_checkpoint_holds_are_kept(tmp_path):
    table = {"dpo.beta": 0.3, "chat.system": "Be kind.", "tokenizer.kind": "bytelevel"}
    whole = build(Config, [("", table)])  # as a run folder has it
    rest = dict.fromkeys(("weights", "moments", "tokenizer_hash", "dataset_hash"))
    saved = SimpleNamespace(config=whole, folder=tmp_path, **rest)
    assert settings_of(saved, {"train.max_steps": 7}, []).dpo.beta == 0.3
    with pytest.raises(InputError, match="dpo.beta says nothing to --mode pretrain"):
        settings_of(saved, {"train.max_steps": 7, "dpo.beta": "0.3"}, [])


def test_training_with_a_flag_of_another_mode_ends_before_it_begins(tmp_path):
    words = ["--config", "tiny", "--dpo.beta", "0.3", "--max-steps", "1", "--out"]
    with pytest.raises(InputError, match="dpo.beta says nothing to --mode pretrain"):
        train.main([*words, str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_every_setting_that_only_some_modes_read_is_one():
    known = setting_fields(Config)
    sections = {key.partition(".")[0] for key in known}
    assert READ_BY.keys() <= known.keys() | sections


def test_settings_cannot_be_changed_behind_the_checks():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.batch_size = 0  # type: ignore[misc]


def test_help_tells_unit_range_and_default():
    field, _ = setting_fields(Config)["optimizer.warmup_steps"]
    assert describe(field).endswith("(steps; 0 or more; default 100)")


def test_a_word_without_a_flag_is_a_problem():
    parser = Parser()
    add_flags(parser, Config)
    _, _, problems = parse_flags(parser, Config, ["tiny", "--sede", "3"])
    assert problems == [
        "'tiny': a word with no flag before it. --help shows every flag.",
        "--sede: no such flag. Did you mean '--seed'?",
    ]
