"""No setting is without effect: each is changed alone, and something that a person gets changes.

Settings of model and optimizer have their tables in test_model.py and test_optim.py.
"""

import dataclasses
import functools
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from conftest import SMALL_RUN
from jax.experimental.compilation_cache import compilation_cache
from test_dispatch import DISPATCH_SETTINGS
from test_evaluate import EVALUATE_SETTINGS
from test_hosts import DISTRIBUTED_CHANGES
from test_loggers import LOGGING_SETTINGS
from test_lora import LORA_CHANGES
from test_mode_settings import MODE_SETTINGS
from test_model import CASES as MODEL_CASES
from test_monitor import MONITOR_SETTINGS
from test_optim import OPTIMIZER_CHANGES
from test_serve_command import SHOWN_BY as SHOWN_BY_SERVING
from test_sharding import PARALLEL_CHANGES

from tinyllm_jax import generate, train
from tinyllm_jax.config import (
    Config,
    EvaluateConfig,
    GenerateConfig,
    ServeConfig,
    TokenizerConfig,
    load_config,
)
from tinyllm_jax.data import groups
from tinyllm_jax.data import prepare as prepare_module
from tinyllm_jax.data.asking import as_text
from tinyllm_jax.data.chat_template import CONTROL_TOKENS
from tinyllm_jax.data.prepare import prepare
from tinyllm_jax.data.prepare_chat import prepare_conversations
from tinyllm_jax.data.tokenizer import extend_tokenizer, load_tokenizer, train_tokenizer
from tinyllm_jax.data.toy_stories import generate_stories
from tinyllm_jax.errors import InputError
from tinyllm_jax.inference import generate as jax_generators
from tinyllm_jax.inference import language_model
from tinyllm_jax.settings import setting_fields
from tinyllm_jax.training import dry_run, loop
from tinyllm_jax.training.checkpoint import open_checkpoint
from tinyllm_jax.training.metrics import read_metrics
from tinyllm_torch import generate as torch_generate
from tinyllm_torch import train as torch_train
from tinyllm_torch.inference import generate as torch_generators
from tinyllm_torch.inference import language_model as torch_language_model
from tinyllm_torch.model.weights import as_tensors
from tinyllm_torch.training import loop as torch_loop
from tinyllm_torch.training.checkpoint import open_checkpoint as torch_open_checkpoint

pytestmark = pytest.mark.slow  # the file as a whole

Settings = Mapping[str, Any]
TRAINERS = {"jax": train, "torch": torch_train}
# Each command, and the module that loads its model.
COMMANDS: dict[str, tuple[ModuleType, ModuleType]] = {
    "jax": (generate, language_model),
    "torch": (torch_generate, torch_language_model),
}
GENERATORS: dict[str, Any] = {"jax": jax_generators, "torch": torch_generators}
STORIES = [*generate_stories(seed=3, start=0, stop=60)]


def as_flags(settings: Settings) -> list[str]:
    flags = []
    for key, value in settings.items():
        words = value if isinstance(value, tuple) else (value,)
        flags += [f"--{key}", *(str(word) for word in words)]
    return flags


def config_of(settings: Settings) -> Config:
    """Read settings as the command line gives them."""
    preset, overrides, problems = train.read_command(as_flags(settings))
    return load_config(preset or "tiny", overrides, problems)


# From text to rows --------------------------------------------------------------------------------

TEXT = {
    "data.paths": "stories.jsonl",
    "data.validation_fraction": 0.2,
    "data.sequence_length": 32,
    "data.workers": 1,
    "model.vocab_size": 320,
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write small files of text and a tokenizer made of other text."""
    folder = tmp_path_factory.mktemp("texts")
    # Letters that are rare enough to be left to bytes, and a document that is short.
    documents = [*STORIES, "Zoë saw a naïve señor.", "Short one.", "A 猫 sat."]
    rows = [{"text": text, "story": text[::-1]} for text in documents]
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "stories.jsonl").write_text("".join(lines))
    (folder / "others.jsonl").write_text("".join(lines[:40]))
    (folder / "broken.jsonl").write_text("".join([*lines, "{broken\n"]))
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"Go on from {text[:20]}"},
                {"role": "assistant", "content": text[:60]},
            ],
            "instruction": text[:20],
            "output": text[:60],
        }
        for text in STORIES
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (folder / "stories.txt").write_text("<|endoftext|>".join(documents).replace(". ", ".\n\n"))
    other = ["mountains were called numbers by certain lawyers of quality"] * 20
    tokenizer = train_tokenizer(iter(other), config=TokenizerConfig(), vocab_size=300)
    wide = [*other, *(text.upper() for text in STORIES)]
    tokenizer = train_tokenizer(iter(wide), config=TokenizerConfig(), vocab_size=320)
    tokenizer.save(folder)
    return folder


def rows(settings: Settings) -> Any:
    """Show every stored token of both splits, or why there is none."""
    try:
        prepared = prepare(config_of(settings), progress=False)
    except InputError as error:
        return str(error)
    return [
        [array.tolist() for array in vars(shard).values() if isinstance(array, np.ndarray)]
        for split in (prepared.train, prepared.validation)
        for shard in split.shards
    ]


def rows_of_conversations(settings: Settings) -> Any:
    """Show every stored token of conversations."""
    tokenizer = extend_tokenizer(load_tokenizer("tokenizer.model"), CONTROL_TOKENS)
    asked = {key: value for key, value in settings.items() if key != "data.workers"}
    config = config_of({**asked, "run.mode": "sft"})
    prepared = prepare_conversations(config, tokenizer=tokenizer, progress=False)
    return [shard.tokens.tolist() for shard in prepared.train.shards]


def rows_beside_another_tokenizer(settings: Settings) -> Any:
    """Show the tokens where a tokenizer that was made earlier lies ready, and is another one."""
    prepare(config_of({**settings, "tokenizer.retrain": "false"}), progress=False)
    (made,) = Path("data/tokenizers").glob("*/tokenizer.model")
    made.write_bytes(Path("tokenizer.model").read_bytes())
    return rows(settings)


def processes(settings: Settings) -> int:
    """Count the processes that are started for a corpus of several groups."""
    counted = []

    class CountedPool(groups.ProcessPoolExecutor):
        def __init__(self, number: int, **options: Any):
            counted.append(number)
            super().__init__(number, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "GROUP_BYTES", 16000)
        patch.setattr(groups, "ProcessPoolExecutor", CountedPool)
        rows(settings)
    return sum(counted)


def cluster_that_is_asked(settings: Settings) -> list[str]:
    """Show which Ray cluster is joined to prepare text; none needs to be there."""
    asked = []

    class NoRay(ModuleType):
        def is_initialized(self) -> bool:
            return False

        def init(self, *, address: str, **_: Any) -> None:
            asked.append(address)
            raise ConnectionError

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ray", NoRay("ray"))
        rows(settings)
    return asked


def host_that_is_asked(settings: Settings) -> Any:
    """Show what is said where neither host can be reached, which names the one that was tried."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            patch.delenv(name, raising=False)
            patch.delenv(name.upper(), raising=False)
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        patch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:10")
        patch.setattr(time, "sleep", lambda _: None)
        message = rows(settings)
    asked = [port for port in ("127.0.0.1:9/", "127.0.0.1:10/") if f"http://{port}" in message]
    assert len(asked) == 1
    return asked


# A run ----------------------------------------------------------------------------------------------

RUN = {
    **{key.removeprefix("--"): value for key, value in zip(*[iter(SMALL_RUN)] * 2, strict=True)},
    "train.max_steps": 4,
    "train.eval_interval_steps": 2,
    "train.log_interval_steps": 2,
    "checkpoint.interval_steps": 2,
    "run.out": "new",
}


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a run ended, and all that it left which does not depend on the clock."""

    code: int | str  # or the message of a refusal
    folders: list[str]  # of the working folder, where runs are
    checkpoints: list[str]
    rows: dict[str, list[dict[str, Any]]]  # of the metrics, by their kind


def end_of_run(package: str, settings: Settings) -> Ended:
    """Train in the working folder, where `run` is an earlier run of 20 steps."""
    try:
        code: int | str = TRAINERS[package].main(as_flags(settings))
    except InputError as error:
        code = str(error)
    folder, kinds = Path(settings["run.out"]), {}
    metrics = folder / "metrics.jsonl"
    for row in read_metrics(metrics) if metrics.is_file() else []:
        kinds.setdefault(row["kind"], []).append(row)
    saved = sorted(path.name for path in folder.glob("checkpoints/[0-9]*"))
    return Ended(code, sorted(path.name for path in Path().glob("[!.]*")), saved, kinds)


def told(kind: str, name: str) -> Callable[[Ended], Any]:
    """Show one number of every row of a kind."""
    return lambda end: [row[name] for row in end.rows.get(kind, [])]


def told_first(end: Ended) -> float:
    return end.rows["train"][0]["loss"]


def exit_code(end: Ended) -> Any:
    return end.code


def saved_steps(end: Ended) -> list[str]:
    return end.checkpoints


def folders_and_exit_code(end: Ended) -> Any:
    return end.folders, end.code


def cached_programs(settings: Settings) -> bool:
    """Tell whether programs that are compiled after JAX is set up lie in the user's cache folder."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
            patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
            patch.setenv("XDG_CACHE_HOME", str(Path("caches").absolute()))
            jax.config.update(names[0], None)
            jax.config.update(names[1], 0.0)
            compilation_cache.reset_cache()
            train.set_up_jax(config_of(settings))
            jax.jit(lambda x: x * 3 + 1)(np.arange(5)).block_until_ready()
            return any(path.is_file() for path in Path("caches").rglob("*"))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


# The table ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A setting's other value, how that is seen, and what must be set besides for it to show."""

    changed: Any
    seen_in: Callable[[Any], Any]
    beside: Settings = dataclasses.field(default_factory=dict)


LONG_RUN = {"train.max_steps": 21, "train.eval_interval_steps": 10, "checkpoint.interval_steps": 10}
IN_THE_EARLIER_RUN = {**LONG_RUN, "run.out": "run"}
DIVERGING = {
    "optimizer.learning_rate": 1e38,
    "optimizer.warmup_steps": 0,
    "train.max_steps": 6,
    "train.max_nonfinite_steps": 100,
    "train.eval_interval_steps": 6,
}
# Looking and saving would write the metrics, too.
SELDOM = {
    "train.max_steps": 8,
    "train.eval_interval_steps": 8,
    "train.log_interval_steps": 4,
    "checkpoint.interval_steps": 8,
}
# Weights stay as they were made.
STILL = {
    "optimizer.learning_rate": 1e-30,
    "optimizer.min_learning_rate": 0.0,
    "train.max_steps": 1,
}
BYTE_LEVEL = {"tokenizer.kind": "bytelevel"}
PLAIN = {"data.paths": "stories.txt"}
PACKED = {"data.packing": "packed"}
CHAT = {"data.paths": "chat.jsonl", "data.packing": "padded", "data.sequence_length": 256}
TOY = {"data.paths": "toy", "data.toy_documents": 100, "model.vocab_size": 512}
OF_TEXT = {
    "tokenizer.kind": Case("bytelevel", rows),
    "tokenizer.path": Case("tokenizer.model", rows),
    "tokenizer.retrain": Case("true", rows_beside_another_tokenizer),
    "tokenizer.character_coverage": Case(1.0, rows),
    "tokenizer.max_sentences": Case(30, rows),
    "tokenizer.min_frequency": Case(2000, rows, BYTE_LEVEL),
    "tokenizer.max_sample_bytes": Case(9000, rows),
    "data.paths": Case(("others.jsonl", "stories.txt"), rows),
    "data.validation_paths": Case("others.jsonl", rows),
    "data.validation_fraction": Case(0.4, rows),
    "data.text_field": Case("story", rows),
    "data.document_separator": Case("\n\n", rows, PLAIN),
    "data.min_document_characters": Case(24, rows),
    "data.on_bad_record": Case("skip", rows, {"data.paths": "broken.jsonl"}),
    "data.packing": Case("padded", rows),
    "data.sequence_length": Case(40, rows, PACKED),
    "data.long_documents": Case("truncate", rows, PACKED),
    "data.toy_documents": Case(120, rows, TOY),
    "data.toy_seed": Case(1, rows, TOY),
    "data.download_source": Case("modelscope", host_that_is_asked, {"data.paths": "tinystories"}),
    "data.workers": Case(2, processes),
    "chat.format": Case("alpaca", rows_of_conversations, CHAT),
    "chat.system": Case("Be kind.", rows_of_conversations, CHAT),
    "data.runner": Case("ray", cluster_that_is_asked),
    "data.ray_address": Case("host:6379", cluster_that_is_asked, {"data.runner": "ray"}),
}
OF_RUN = {
    "train.max_steps": Case(5, told("train", "step")),
    "train.batch_size": Case(2, told("train", "targets")),
    "train.gradient_accumulation_steps": Case(2, told("train", "targets")),
    "train.seed": Case(1, told("eval", "loss"), STILL),
    "train.eval_interval_steps": Case(3, told("eval", "step")),
    "train.eval_batches": Case(1, told("eval", "loss")),
    "train.log_interval_steps": Case(2, told("speed", "step"), SELDOM),
    "train.max_nonfinite_steps": Case(2, exit_code, DIVERGING),
    "checkpoint.interval_steps": Case(3, saved_steps),
    "checkpoint.keep": Case(1, saved_steps, {"checkpoint.interval_steps": 1}),
    "run.out": Case("elsewhere", folders_and_exit_code),
    "run.resume": Case("run", saved_steps, LONG_RUN),
    "run.auto_resume": Case("true", folders_and_exit_code, IN_THE_EARLIER_RUN),
    "run.dry_run": Case("true", folders_and_exit_code),
    "run.init_from": Case("run", told_first),
}
# A broken line stops only one of the two; a rarer pair can only be missing from the vocabulary; a tokenizer
# that was changed is refused, unless it is trained again.
SEEN_IN_REFUSALS = {"data.on_bad_record", "tokenizer.min_frequency", "tokenizer.retrain"}
OF_PROCESS = {"train.compilation_cache": Case("false", cached_programs)}
# Each setting, its other value, and what must be set besides for it to show.
OF_SAMPLING: dict[str, tuple[Any, Settings]] = {
    "sampling.prompt": ("The dog", {}),
    "sampling.max_new_tokens": (9, {}),
    "sampling.temperature": (3.0, {}),
    "sampling.top_k": (1, {}),
    "sampling.top_p": (0.01, {}),
    "sampling.repetition_penalty": (5.0, {"sampling.greedy": "true"}),
    "sampling.greedy": ("true", {}),
    "sampling.seed": (1, {}),
    "sampling.num_samples": (2, {}),
    "sampling.slide": ("true", {"sampling.max_new_tokens": 80}),  # the context has 64
}


def test_every_setting_has_a_case() -> None:
    covered = {f"model.{name}" for name in MODEL_CASES}
    covered |= {f"optimizer.{name}" for name in OPTIMIZER_CHANGES}
    covered |= {f"parallel.{name}" for name in PARALLEL_CHANGES}
    covered |= {f"lora.{name}" for name in LORA_CHANGES}
    covered |= {f"distributed.{name}" for name in DISTRIBUTED_CHANGES}
    covered |= {*DISPATCH_SETTINGS, *MODE_SETTINGS, *MONITOR_SETTINGS, *LOGGING_SETTINGS}
    cases = [*OF_TEXT, *OF_RUN, *OF_PROCESS, *OF_SAMPLING]
    assert sorted([*covered, *cases]) == sorted(setting_fields(Config))
    assert set(OF_SAMPLING) == set(setting_fields(GenerateConfig))
    assert set(EVALUATE_SETTINGS) == set(setting_fields(EvaluateConfig))
    assert set(SHOWN_BY_SERVING) == set(setting_fields(ServeConfig))


def test_packing_that_is_chosen_depends_on_the_mode() -> None:
    def packing(mode: str, *flags: str) -> str:
        _, overrides, problems = train.read_command(["--mode", mode, *flags])
        return load_config("sft", overrides, problems).data.packing

    assert [packing("pretrain"), packing("sft")] == ["stream", "packed"]
    assert packing("sft", "--data.packing", "padded") == "padded"


# Each case ------------------------------------------------------------------------------------------


@pytest.fixture
def in_texts(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Give what looks at settings in a fresh copy of the texts, with nothing prepared."""
    monkeypatch.delenv("TINYLLM_DATA_DIR", raising=False)

    def look(seen_in: Callable[[Settings], Any], settings: Settings) -> Any:
        folder = tmp_path / "texts"
        shutil.rmtree(folder, ignore_errors=True)
        monkeypatch.chdir(shutil.copytree(texts, folder))
        return seen_in(settings)

    return look


@pytest.mark.parametrize("name", OF_TEXT)
def test_a_setting_of_text_changes_what_is_trained_on(name: str, in_texts: Any) -> None:
    case = OF_TEXT[name]
    before = {**TEXT, **case.beside}
    seen = in_texts(case.seen_in, before)
    other = in_texts(case.seen_in, {**before, name: case.changed})
    assert seen != other
    assert seen == in_texts(case.seen_in, before), "it changes by itself"
    refusals = [found for found in (seen, other) if isinstance(found, str)]
    assert len(refusals) == (name in SEEN_IN_REFUSALS), refusals


@pytest.fixture(scope="module")
def earlier_runs(
    trained_run: Path, tmp_path_factory: pytest.TempPathFactory, prepared_folder: Path
) -> dict[str, Path]:
    """Give a run of 20 steps of either package."""
    folder = tmp_path_factory.mktemp("twin") / "run"
    flags = as_flags({**RUN, "train.max_steps": 20, "run.out": folder})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
        assert torch_train.main(flags) == 0
    return {"jax": trained_run, "torch": folder}


@pytest.fixture(scope="module")
def ended(
    earlier_runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, prepared_folder: Path
) -> Callable[..., Ended]:
    """Give what trains in a folder of its own, once for the same settings unless told otherwise."""
    known: dict[str, Ended] = {}

    def end(package: str, settings: Settings, *, anew: bool = False) -> Ended:
        key = f"{package} {sorted(settings.items())}"
        if key not in known or anew:
            folder = tmp_path_factory.mktemp(package)
            shutil.copytree(earlier_runs[package], folder / "run", symlinks=True)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
                patch.setattr(dry_run, "TIMING_SECONDS", 0.0)
                for module in (loop, torch_loop):  # the pictures take a third of such a run
                    patch.setattr(module, "write_report", lambda _, **__: None)
                patch.chdir(folder)
                known[key] = end_of_run(package, settings)
        return known[key]

    return end


@pytest.mark.parametrize("package", TRAINERS)
@pytest.mark.parametrize("name", OF_RUN)
def test_a_setting_of_a_run_changes_what_it_leaves(name: str, package: str, ended: Any) -> None:
    check_run(name, OF_RUN[name], package, ended)


def check_run(name: str, case: Case, package: str, ended: Callable[..., Ended]) -> None:
    before = {**RUN, **case.beside}
    after = {**before, name: case.changed}
    assert case.seen_in(ended(package, before)) != case.seen_in(ended(package, after))


@pytest.mark.parametrize("package", TRAINERS)
def test_the_seed_changes_the_batches_too(package: str, ended: Any) -> None:
    """With weights that are given, what the first step computes depends on its rows alone."""
    check_run("train.seed", Case(1, told_first, {"run.init_from": "run"}), package, ended)


@pytest.mark.parametrize("package", TRAINERS)
def test_what_is_looked_at_does_not_change_by_itself(package: str, ended: Any) -> None:
    first, second = ended(package, RUN), ended(package, RUN, anew=True)
    assert first is not second
    assert first.code == 0
    for case in OF_RUN.values():
        assert case.seen_in(first) == case.seen_in(second)


def test_programs_are_kept_unless_a_setting_says_no(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, (name, case) in enumerate(OF_PROCESS.items()):
        (tmp_path / str(place)).mkdir()
        monkeypatch.chdir(tmp_path / str(place))
        assert not case.seen_in({name: case.changed})
        assert case.seen_in({})


# Sampling -------------------------------------------------------------------------------------------

TALK = {"sampling.max_new_tokens": 12}


def sampler(package: str, run: Path) -> Callable[[Settings], str]:
    """Give what shows the text that a run writes at an evaluation, with the weights of a run."""
    if package == "jax":
        checkpoint = open_checkpoint(run, on_damaged=pytest.fail)
        weights = jax.tree.map(jax.numpy.asarray, checkpoint.weights)
    else:
        checkpoint = torch_open_checkpoint(run, on_damaged=pytest.fail)
        weights = as_tensors(checkpoint.weights, checkpoint.config.model, device="cpu")

    def text(settings: Settings) -> str:
        config = config_of({**RUN, **settings})
        tokenizer = checkpoint.tokenizer
        if package == "torch":
            return torch_train.make_sampler(config, tokenizer)(weights)
        asked = as_text(config.sampling.prompt, tokenizer)
        return train.make_sampler(config, asked, tokens=tokenizer.vocab_size)(weights)

    return text


@pytest.mark.parametrize("package", TRAINERS)
def test_a_setting_of_sampling_changes_the_samples_of_a_run(
    package: str, earlier_runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = GENERATORS[package]
    monkeypatch.setattr(module, "Generator", functools.cache(module.Generator))  # compiles once
    check_sampling(sampler(package, earlier_runs[package]))


def check_sampling(text: Callable[[Settings], str]) -> None:
    """Show that every setting of sampling changes a text, which is otherwise the same each time."""
    plain = text(TALK)
    assert text(TALK) == plain
    for name, (changed, beside) in OF_SAMPLING.items():
        settings = {**TALK, **beside}
        before = text(settings) if beside else plain
        assert text({**settings, name: changed}) != before, name


@pytest.mark.parametrize("package", TRAINERS)
def test_a_setting_of_generate_changes_what_it_prints(
    package: str,
    earlier_runs: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command, model = COMMANDS[package]
    monkeypatch.setattr(model, "load", functools.cache(model.load))

    def text(settings: Settings) -> str:
        flags = ["--checkpoint", str(earlier_runs[package]), *as_flags(settings)]
        assert command.main(flags) == 0
        return capsys.readouterr().out

    check_sampling(text)
