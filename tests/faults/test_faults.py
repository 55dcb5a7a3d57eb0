"""A few trials of each fault; `campaign.py` beside this file makes hundreds."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import campaign
import damage
import disks
import harness
import kills
import memory
from harness import BASE, ELSE, EXACT, REFUSED, Ended, Trial

from tinyllm_jax.cli import run as run_command
from tinyllm_jax.data.prepare import read_manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with the data of all modes, and the run that trials begin with."""
    made = tmp_path_factory.mktemp("faults")
    harness.make_base(made)
    return made


@pytest.fixture
def resumable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give a run that has its last steps to make again, beside its data."""
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(folder / "data"))
    with damage.copied(folder, BASE) as run:
        shutil.rmtree(run / damage.LAST)
        yield run


def none_ended_otherwise(trials: list[Trial]) -> None:
    assert trials
    assert [trial for trial in trials if trial.verdict == ELSE] == []


# Quick: one trial of each kind that needs no process of its own -----------------------------------------


def test_a_flipped_bit_in_a_token_shard_is_refused_and_right_when_prepared_again(
    folder: Path,
) -> None:
    """The size stays, so only a checksum can tell; the run would learn from another text."""
    name = next(name for name in damage.files_of_set(folder, BASE) if name.endswith("train.npy"))
    trial = damage.harmed_shard(
        folder, BASE, name, damage.HARMS["a byte in the middle flipped"], what=name
    )
    assert trial.verdict == REFUSED
    assert "has sha256" in trial.told
    assert "and run again: the data is then prepared afresh." in trial.told


@pytest.mark.parametrize("what", damage.EDITS)
def test_a_manifest_that_was_edited_is_refused(what: str, folder: Path, resumable: Path) -> None:
    name = next(name for name in damage.files_of_set(folder, BASE) if "manifest" in name)
    path = folder / "data" / name
    whole = path.read_bytes()
    damage.edit(path, change=damage.EDITS[what])
    ended = harness.call("--resume", str(resumable))
    path.write_bytes(whole)
    assert ended.is_refusal, ended.said
    assert f"{path}: does not have its checksum" in ended.errors[0]


def test_a_manifest_from_before_there_were_checksums_is_taken(folder: Path, tmp_path: Path) -> None:
    name = next(name for name in damage.files_of_set(folder, BASE) if "manifest" in name)
    shutil.copy(folder / "data" / name, tmp_path)
    found = read_manifest(tmp_path)
    damage.edit(tmp_path / "manifest.json", change=lambda table: table.pop("checksum"))
    assert read_manifest(tmp_path) == found


@pytest.mark.parametrize(
    ("name", "what"), [("state/manifest.ocdbt", "last byte flipped"), ("checksums.json", "gone")]
)
def test_damage_to_the_newest_checkpoint_costs_no_step_before_it(
    name: str, what: str, folder: Path
) -> None:
    trial = damage.harmed_checkpoint(folder, name, what)
    assert trial.verdict == EXACT, trial


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(folder: Path) -> None:
    run = folder / "jumping"
    with harness.inside(folder), damage.jumping_clock(0, (0.0, -damage.DAY_SECONDS, 1e5)):
        ended = harness.call(*harness.flags_of_mode("pretrain", **{"run.out": run}))
    assert ended.code == 0, ended.said
    assert harness.differences(run, folder / BASE) == ""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n more"),
        RuntimeError("can't start new thread"),
        RuntimeError("Unable to initialize backend 'cpu': std::bad_alloc"),
    ],
)
def test_a_lack_of_memory_is_told_in_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory")
    assert "--auto-resume" in line


@pytest.mark.slow
def test_a_disk_that_fills_up_during_a_save_is_told_in_one_line_without_a_traceback(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    try:
        trials = disks.full_while_saving(folder, 5, trials=1)
    except disks.NoMountsError as error:
        pytest.skip(f"this user may not mount: {error}")
    assert [trial.verdict for trial in trials] == [REFUSED], trials
    # Whichever was written last: a checkpoint in the background, or the rows of the steps since.
    assert re.search(r"(\.partial|metrics\.jsonl): No space left", trials[0].told), trials
    assert [record for record in caplog.records if record.name == "absl"] == []


def test_verdicts_are_what_happened(folder: Path) -> None:
    """A trial that is neither exact nor refused must not be counted as either."""

    def verdict(ended: Ended, run: str) -> str:
        return harness.verdict_on(
            ended, fault="", what="", run=folder / run, whole=folder / BASE, looked_at=[folder]
        ).verdict

    with damage.copied(folder, BASE) as run:
        assert verdict(Ended(0, ""), run.name) == EXACT
        assert verdict(Ended(2, "error: no\n"), run.name) == REFUSED
        for ended in (
            Ended(1, "error: no\n"),
            Ended(2, ""),
            Ended(2, "error: one\nerror: two\n"),
            Ended(2, "Traceback (most recent call last):\nerror: no\n"),
        ):
            assert verdict(ended, run.name) == ELSE
        (run / "checkpoints/.9.partial").mkdir()
        assert verdict(Ended(2, "error: no\n"), run.name) == ELSE
        (run / "checkpoints/.9.partial").rmdir()
        rows = (run / "metrics.jsonl").read_text().replace('"loss": 6.', '"loss": 7.', 1)
        (run / "metrics.jsonl").write_text(rows)
        assert verdict(Ended(0, ""), run.name) == ELSE


# Slow: some of each kind in the campaign ----------------------------------------------------------------


@pytest.mark.slow
def test_kills_at_random_moments_end_exactly(folder: Path) -> None:
    trials = kills.kill_runs(folder, "pretrain", processes=1, kills=3, seed=0, say=print)
    assert [trial.verdict for trial in trials] == [EXACT] * 3, trials


@pytest.mark.slow
def test_the_campaign_prints_a_table_and_writes_every_trial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    assert campaign.main(["--only", "all-checkpoints", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["trials"]
    assert [trial["verdict"] for trial in found] == [REFUSED, REFUSED, EXACT]
    fault = found[0]["fault"]
    assert f"| {fault} | 3 | 1 | 2 | 0 |" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_that_runs_out_anywhere_ends_in_a_line_and_goes_on_exactly(folder: Path) -> None:
    none_ended_otherwise(memory.raised(folder, 0))


@pytest.mark.slow
def test_folders_that_vanish_end_no_run_in_another_way(folder: Path) -> None:
    none_ended_otherwise(disks.vanishing(folder, 0))


def test_kills_are_shared_out_as_asked() -> None:
    for count in (1, 6, 100):
        assert sum(own for _, _, own in kills.shares(count)) == count
    assert {(mode, processes): own for mode, processes, own in kills.shares(100)} == kills.SHARES
