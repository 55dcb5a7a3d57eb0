"""Loggers: the rows of `metrics.jsonl`, each step once, whatever happens to the run or to the logger."""

import importlib.util
import json
import struct
import sys
from collections import defaultdict
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT, SMALL_RUN, run_python

from tinyllm_jax import train
from tinyllm_jax.config import Config, LoggingConfig, load_config
from tinyllm_jax.errors import InputError
from tinyllm_jax.training import loop
from tinyllm_jax.training.loggers import Loggers, check_installed, key_of, points
from tinyllm_jax.training.metrics import read_metrics
from tinyllm_jax.training.trackers import make_logger, written_at
from tinyllm_torch import train as torch_train
from tinyllm_torch.training import loop as torch_loop

# Settings that this file shows to have an effect, for the test that every setting has one.
LOGGING_SETTINGS = ("logging.to", "logging.project", "logging.name", "logging.offline")
TRAINERS = {"jax": train, "torch": torch_train}


def config_of(*flags: str) -> Config:
    preset, overrides, problems = train.read_command([*SMALL_RUN, *flags])
    return load_config(preset or "tiny", overrides, problems)


# What is sent --------------------------------------------------------------------------------------


def test_a_row_becomes_numbers_and_texts_with_names_of_their_own():
    row = {
        "kind": "monitor",
        "step": 3,
        "time": 99.0,
        "loss": "nan",
        "skipped": True,
        "text": "A story.",
        "update_ratio": {"layers.0": 0.5},
        "expert_load": [[0.25, 0.75]],
    }
    numbers, texts = points(row)
    assert numbers.pop("monitor/loss") != numbers.get("monitor/loss")  # it is no number
    assert numbers == {
        "monitor/skipped": 1.0,
        "monitor/update_ratio/layers.0": 0.5,
        "monitor/expert_load/0/0": 0.25,
        "monitor/expert_load/0/1": 0.75,
    }
    assert texts == {"monitor/text": "A story."}


def test_rows_were_written_when_the_next_one_says():
    rows = [{"step": 1}, {"step": 2}, {"step": 2, "time": 50.0}, {"step": 3}]
    first, second, third, last = written_at(rows)
    assert (first, second, third) == (50.0, 50.0, 50.0)
    assert last > 1e9


def test_the_same_numbers_have_the_same_key_also_after_a_rewind():
    def key(*flags: str, rows: list[dict] | None = None) -> str:
        return key_of(config_of(*flags), rows or [])

    assert key() == key("--out", "elsewhere", "--logging.offline", "true", "--data.workers", "2")
    assert key() != key("--learning-rate", "1e-3")
    rewound = [{"kind": "rewind", "step": 3, "batches": "4-6"}]
    assert key() != key(rows=rewound)
    assert key(rows=rewound) == key("--monitor.skip_batches", "4-6", rows=rewound)
    # Checkpoints name as one those that touch.
    rewound.append({"kind": "rewind", "step": 3, "batches": "7-9"})
    assert key(rows=rewound) == key("--monitor.skip_batches", "4-9", rows=rewound)
    assert key("--monitor.skip_batches", "7", "4-6") == key("--monitor.skip_batches", "4-7")
    assert key("--monitor.skip_batches", "4-7") != key("--monitor.skip_batches", "4-8")


# Loggers that are not there, or fail ---------------------------------------------------------------


def test_a_package_that_is_missing_is_refused_with_what_to_install(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    gone = ("wandb", "trackio")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in gone else find(name, *more)
    )
    with pytest.raises(InputError, match=r"logging.to=json wandb trackio needs wandb and trackio"):
        check_installed(LoggingConfig(to=("json", "wandb", "trackio")))
    for trainer in TRAINERS.values():
        with pytest.raises(InputError, match=r"pip install 'tinyllm\[wandb\]', or leave"):
            trainer.main([*SMALL_RUN, "--logging.to", "wandb", "--out", "new"])
    assert not Path("new").exists()


@pytest.mark.parametrize("words", [["tensorbord"], ["wandb", "wandb"]])
def test_what_is_no_list_of_loggers_is_refused(words):
    with pytest.raises(InputError, match="Use some of tensorboard wandb swanlab trackio"):
        load_config("tiny", {"logging.to": tuple(words)}, [])


class Noted:
    """Keeps what it is told, and fails when it is to."""

    def __init__(self, name: str, *, fails_at: int = -1):
        self.name, self._fails_at, self.steps, self.closed = name, fails_at, [], False

    def begin(self, rows: Any, *_: Any) -> None:
        self.steps = [row["step"] for row in rows]

    def write(self, rows: Any) -> None:
        for row in rows:
            if row["step"] == self._fails_at:
                raise ConnectionError("nobody\n  listens")
            self.steps.append(row["step"])

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def test_a_logger_that_fails_is_left_out_with_one_line_and_the_others_go_on():
    said: list[str] = []
    good, bad = Noted("good"), Noted("bad", fails_at=3)
    loggers = Loggers([bad, good], say=said.append)
    loggers.begin([{"kind": "train", "step": 1}], config_of())
    for step in range(2, 6):
        loggers.write(row for row in [{"kind": "train", "step": step}])
    loggers.close()
    assert bad.steps == [1, 2]
    assert good.steps == [1, 2, 3, 4, 5]
    assert good.closed
    assert len(said) == 1
    assert said[0].startswith(
        "warning: bad failed and gets no more numbers (ConnectionError: nobody listens)"
    )


def test_a_logger_that_fails_once_it_is_open_is_closed_at_the_end():
    class Opened(Noted):
        def begin(self, *_: Any) -> None:
            raise OSError("disk full")

        def close(self) -> None:
            super().close()
            raise OSError("still full")

    said: list[str] = []
    bad = Opened("bad")
    loggers = Loggers([bad], say=said.append)
    loggers.begin([], config_of())
    loggers.write([{"kind": "train", "step": 1}])
    assert not bad.closed  # which may take a while
    loggers.close()
    assert bad.closed
    assert len(said) == 1


# A service that is made up -------------------------------------------------------------------------


class Service(ModuleType):
    """Stands for `wandb` and what it sends to: steps only grow, and a run that goes on is asked for."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.runs: dict[str, dict[str, list[tuple[int, Any]]]] = {}
        self.started: list[dict[str, Any]] = []

    def Settings(self, **_: Any) -> None:  # noqa: N802 (wandb's name)
        return None

    def init(self, **options: Any) -> "Service.Run":
        self.started.append(options)
        goes_on = options["resume"] == "allow"
        assert goes_on or options["id"] not in self.runs
        return Service.Run(self.runs.setdefault(options["id"], defaultdict(list)))

    class Run:
        def __init__(self, history: dict[str, list[tuple[int, Any]]]):
            self._history = history

        @property
        def step(self) -> int:
            return 1 + max(
                (step for each in self._history.values() for step, _ in each), default=-1
            )

        def log(self, values: dict[str, Any], *, step: int) -> None:
            assert step >= self.step - 1, "it would be dropped"
            for name, value in values.items():
                self._history[name].append((step, value))

        def finish(self) -> None:
            pass


@pytest.fixture
def service(monkeypatch, tmp_path, prepared_folder) -> Service:
    made = Service()
    monkeypatch.setitem(sys.modules, "wandb", made)
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
    monkeypatch.chdir(tmp_path)
    for module in (loop, torch_loop):
        monkeypatch.setattr(module, "write_report", lambda _, **__: None)
    return made


RUN = [
    *(*SMALL_RUN, "--logging.to", "wandb", "--optimizer.decay_steps", "9"),
    *("--checkpoint.interval_steps", "4", "--train.eval_interval_steps", "4"),
]


def losses(history: dict[str, list[tuple[int, Any]]]) -> list[tuple[int, float]]:
    return history["train/loss"]


def expected_losses(run: str) -> list[tuple[int, float]]:
    rows = read_metrics(Path(run) / "metrics.jsonl")
    return [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]


@pytest.mark.parametrize("package", ["jax", pytest.param("torch", marks=pytest.mark.slow)])
def test_a_run_that_goes_on_sends_each_step_once(package, service):
    trainer = TRAINERS[package]
    assert trainer.main([*RUN, "--max-steps", "6", "--out", "run"]) == 0
    assert trainer.main(["--resume", "run", "--max-steps", "9"]) == 0
    first, second = service.started
    assert (first["project"], first["name"], first["mode"]) == ("tinyllm", "run", None)
    assert first["config"]["train"]["max_steps"] == 6
    # More steps are another setting: another run, with all there is.
    assert second["name"] == "run-2"
    assert second["group"] == first["group"]
    assert losses(service.runs[second["id"]]) == expected_losses("run")
    assert [step for step, _ in expected_losses("run")] == [*range(1, 10)]
    assert [step for step, _ in service.runs[second["id"]]["eval/loss"]] == [4, 6, 8, 9]
    assert all(isinstance(text, str) for _, text in service.runs[second["id"]]["sample/text"])


def test_a_run_that_was_killed_goes_on_in_the_same_curve(service):
    flags = [*RUN, "--max-steps", "9", "--out", "run"]
    assert train.main(flags) == 0
    for step in (8, 9):  # as if it had been killed after step 9, and had not sent 7 and 9
        path = Path(f"run/checkpoints/{step}")
        path.rename(Path(f"run/.gone_{step}"))
    [run] = service.runs.values()
    for history in run.values():
        history[:] = [each for each in history if each[0] not in (9,)]
    assert train.main(["--resume", "run"]) == 0
    assert [each["resume"] for each in service.started] == [None, "allow"]
    assert len(service.runs) == 1
    assert losses(run) == expected_losses("run")
    assert [step for step, _ in run["eval/loss"]] == [4, 8, 9]


def test_settings_of_logging_reach_the_library(service):
    flags = [*RUN, "--max-steps", "1", "--logging.project", "mine", "--logging.name", "first"]
    assert train.main([*flags, "--logging.offline", "true", "--out", "run"]) == 0
    [options] = service.started
    assert (options["project"], options["name"], options["mode"]) == ("mine", "first", "offline")
    assert not Path("run/checkpoints/.gone").exists()
    quiet = [flag for flag in RUN if flag not in ("--logging.to", "wandb")]
    assert train.main([*quiet, "--max-steps", "1", "--out", "quiet"]) == 0
    assert len(service.started) == 1


@pytest.mark.slow
def test_offline_a_run_that_goes_on_is_written_anew(service):
    flags = [*RUN, "--max-steps", "6", "--logging.offline", "true", "--out", "run"]
    assert train.main(flags) == 0
    Path("run/checkpoints/6").rename("run/.gone")
    assert train.main(["--resume", "run"]) == 0
    first, second = service.runs.values()
    assert losses(first) == losses(second) == expected_losses("run")
    assert json.loads(Path("run/loggers.json").read_text())["wandb"]["number"] == 2


def test_training_goes_on_when_the_service_does_not(service, monkeypatch, capsys):
    def refuse(**_: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(service, "init", refuse)
    assert train.main([*RUN, "--max-steps", "2", "--out", "run"]) == 0
    assert "warning: wandb failed and gets no more numbers" in capsys.readouterr().err
    assert [step for step, _ in expected_losses("run")] == [1, 2]


# The libraries themselves --------------------------------------------------------------------------


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(name) is None, reason=f"needs pip install 'tinyllm[{name}]'"
    )


def tell(name: str, folder: Path, has: int, last: int, *flags: str, end: str = "close") -> str:
    """Bring a logger to the rows until step `has`, and add those until `last`, in a process of its own."""
    words = [ROOT / "tests/logger_program.py", name, folder, str(has), str(last), end, *flags]
    folder.mkdir(exist_ok=True)
    home = folder.parent
    done = run_python(*words, folder=home, TRACKIO_DIR=str(home / "trackio"), HOME=str(home))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning:" not in done.stdout, done.stdout
    return done.stdout


EXPECTED = [(step, pytest.approx(10.0 / step, rel=1e-6)) for step in range(1, 9)]
EVALUATED = [(step, pytest.approx(5.0 / step, rel=1e-6)) for step in (3, 6)]


@needs("tensorboard")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_every_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"

    def read() -> EventAccumulator:
        found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
        return found.Reload()

    def curve(name: str) -> list[tuple[int, float]]:
        return [(each.step, each.value) for each in read().Scalars(name)]

    tell("tensorboard", run, 0, 6, end="kill")
    assert curve("train/loss") == EXPECTED[:6]
    tell("tensorboard", run, 4, 8)  # goes on from a checkpoint of step 4
    assert curve("train/loss") == EXPECTED
    assert curve("eval/loss") == EVALUATED
    text = read().Tensors("sample/text")
    assert [each.tensor_proto.string_val[0] for each in text] == [b"Story 3.", b"Story 6."]
    assert len([*(run / "tensorboard").iterdir()]) == 1


@needs("tensorboard")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_tensorboard_that_is_looking_forgets_what_a_run_went_back_from(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = make_logger("tensorboard", config_of(), tmp_path)
    seen = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    rows = [{"kind": "train", "step": step, "loss": float(step)} for step in range(1, 7)]
    logger.begin([], config_of(), "")
    logger.write(rows)
    logger.flush()
    seen.Reload()
    logger.begin(rows[:3], config_of(), "")
    logger.write([{**rows[3], "loss": 40.0}])
    logger.close()
    seen = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    found = [(each.step, each.value) for each in seen.Scalars("train/loss")]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


@pytest.mark.slow
@needs("tensorboard")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_shows_in_tensorboard_what_its_metrics_say(tmp_path, prepared_folder, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "write_report", lambda _, **__: None)
    flags = [*SMALL_RUN, "--logging.to", "tensorboard", "--monitor.interval_steps", "2"]
    assert train.main([*flags, "--max-steps", "4", "--out", "run"]) == 0
    assert train.main(["--resume", "run", "--max-steps", "6"]) == 0
    found = EventAccumulator("run/tensorboard", size_guidance={"scalars": 0}).Reload()
    curve = [(each.step, each.value) for each in found.Scalars("train/loss")]
    assert curve == [(step, pytest.approx(loss)) for step, loss in expected_losses("run")]
    assert [step for step, _ in curve] == [1, 2, 3, 4, 5, 6]
    assert [each.step for each in found.Scalars("monitor/update_ratio/layers.1")] == [2, 4, 6]


def records(path: Path) -> list[bytes]:
    """Read the records of a file that wandb or swanlab wrote offline: LevelDB's log, after 7 bytes."""
    content, place, record, found = path.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        _, length, kind = struct.unpack_from("<IHB", content, place)
        left = -place % 32768
        if left < 7 or kind == 0:  # the rest of a block is empty
            place += left or 32768
            continue
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(record)
            record = b""
    return found


@needs("wandb")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_keeps_offline_what_can_be_sent_later(tmp_path):
    run = tmp_path / "run"
    for has, last in ((0, 6), (4, 8)):
        tell("wandb", run, has, last, "--logging.offline", "true")
    from wandb.proto.wandb_internal_pb2 import Record

    newest = max(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    curves: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    for record in map(Record.FromString, records(newest)):
        values = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
        for name, value in values.items():
            curves[name].append((int(values["_step"]), json.loads(value)))
    assert curves["train/loss"] == EXPECTED
    assert curves["eval/loss"] == EVALUATED
    assert curves["sample/text"] == [(3, "Story 3."), (6, "Story 6.")]


@needs("swanlab")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_swanlab_keeps_offline_what_can_be_sent_later(tmp_path):
    run = tmp_path / "run"
    for has, last in ((0, 6), (4, 8)):
        tell("swanlab", run, has, last, "--logging.offline", "true")
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    newest = max(run.glob("swanlog/run-*/*.swanlab"), key=lambda path: path.stat().st_mtime)
    curves: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    for record in map(Record.FromString, records(newest)):
        if record.HasField("scalar"):
            curves[record.scalar.key].append((record.scalar.step, record.scalar.value.number))
    assert curves["train/loss"] == EXPECTED
    assert curves["eval/loss"] == EVALUATED
    assert len([*newest.parent.glob("media/text/*")]) == 2


@needs("trackio")
@pytest.mark.slow
def test_trackio_has_one_run_with_every_step_once(tmp_path):
    run = tmp_path / "run"
    tell("trackio", run, 0, 6)
    tell("trackio", run, 4, 8)
    script = (
        "import json, trackio; from trackio.sqlite_storage import SQLiteStorage as Storage\n"
        "runs = [*trackio.Api().runs('tinyllm')]\n"
        "rows = [Storage.get_logs('tinyllm', each.name, run_id=each.id) for each in runs]\n"
        "print(json.dumps([runs[0].name, *rows], default=str))"
    )
    places = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HOME": str(tmp_path)}
    done = run_python("-c", script, check=True, **places)
    name, *runs = json.loads(done.stdout.splitlines()[-1])
    assert name == "run-2"
    [rows] = runs
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == EXPECTED
    assert [(row["step"], row["eval/loss"]) for row in rows if "eval/loss" in row] == EVALUATED
