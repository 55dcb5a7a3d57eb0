"""Where a conversion puts its file or folder: links, folders in one another, and signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from convert_cases import assert_same_weights, random_bundle, with_training

import convert
from convert.__main__ import main
from convert.landing import landing
from tinyllm_jax.errors import InputError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    convert.write(with_training(random_bundle()), tmp_path / "x.pt")
    return tmp_path / "x.pt"


@pytest.mark.parametrize("there", ["file", "folder", "nothing"])
def test_a_link_at_the_target_stays_unless_asked(there, source, tmp_path):
    place = tmp_path / "place"
    if there == "file":
        place.write_text("mine")
    elif there == "folder":
        place.mkdir()
    (tmp_path / "y.pt").symlink_to(place)
    with pytest.raises(InputError, match=r"y\.pt: already there"):
        main([str(source), str(tmp_path / "y.pt"), "--no-verify"])
    assert (tmp_path / "y.pt").readlink() == place
    with (
        pytest.raises(InputError, match=r"y\.pt: already there"),
        landing(tmp_path / "y.pt", folder=False, replace=False) as hidden,
    ):
        hidden.write_text("new")
    assert names(tmp_path) == sorted(["x.pt", "y.pt"] + ["place"] * place.exists())


def test_a_link_to_a_file_gives_way_and_the_file_stays(source, tmp_path):
    convert.write(random_bundle(seed=5), tmp_path / "old.pt")
    before = (tmp_path / "old.pt").read_bytes()
    (tmp_path / "y.pt").symlink_to("old.pt")
    main([str(source), str(tmp_path / "y.pt"), "--overwrite", "--no-verify"])
    assert not (tmp_path / "y.pt").is_symlink()
    assert (tmp_path / "old.pt").read_bytes() == before


def test_a_link_to_a_folder_is_set_aside_with_its_folder_untouched(source, tmp_path):
    convert.write(random_bundle(seed=5), tmp_path / "old", to="hf")
    before = names(tmp_path / "old")
    (tmp_path / "y").symlink_to("old")
    (tmp_path / "y.1").symlink_to("gone")  # a broken link is something, too
    main([str(source), str(tmp_path / "y"), "--to", "hf", "--overwrite", "--no-verify"])
    assert not (tmp_path / "y").is_symlink()
    assert ((tmp_path / "y.2").readlink(), (tmp_path / "y.1").readlink()) == (
        Path("old"),
        Path("gone"),
    )
    assert names(tmp_path / "old") == before


def test_a_file_may_replace_itself_through_a_link(source, tmp_path):
    (tmp_path / "link.pt").symlink_to("x.pt")
    for target in ("link.pt", "x.pt"):
        main([str(tmp_path / "link.pt"), str(tmp_path / target), "--overwrite"])
        assert_same_weights(convert.read(tmp_path / target).weights, random_bundle().weights)
    assert names(tmp_path) == ["link.pt", "x.pt"]


def test_a_checkpoint_is_no_place_for_other_files(source, tmp_path):
    convert.write(convert.read(source), tmp_path / "step", to="safetensors")
    (tmp_path / "link").symlink_to("step")
    for folder in ("step", "link", "step/new", "link/new"):
        with pytest.raises(InputError, match="inside the checkpoint .*step, which another file"):
            main([str(tmp_path / "step"), str(tmp_path / folder / "y.pt")])
    convert.read(tmp_path / "step")  # its checksums hold


def test_a_source_inside_the_target_is_set_aside_with_it(source, tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    step = tmp_path / "run/checkpoints/11"
    convert.write(convert.read(source), step, to="safetensors")
    main([str(step), str(tmp_path / "run"), "--to", "hf", "--overwrite"])
    aside = tmp_path / "run.1/checkpoints/11"
    for path in (tmp_path / "run", aside):
        assert_same_weights(convert.read(path).weights, random_bundle().weights)


def test_a_target_inside_a_folder_of_hugging_face_leaves_it_whole(tmp_path):
    convert.write(random_bundle(), tmp_path / "hf", to="hf")
    main([str(tmp_path / "hf"), str(tmp_path / "hf/y.pt")])
    for path in ("hf", "hf/y.pt"):
        assert_same_weights(convert.read(tmp_path / path).weights, random_bundle().weights)


def test_a_name_as_long_as_the_disk_allows_is_no_obstacle(source, tmp_path):
    target = tmp_path / ("y" * 252 + ".pt")
    main([str(source), str(target), "--no-verify"])
    assert names(tmp_path) == ["x.pt", target.name]


def test_a_second_file_that_cannot_land_takes_the_first_back(tmp_path):
    def write_too_late() -> None:
        with landing(tmp_path / "y.bin", folder=False, replace=False) as hidden:
            hidden.write_text("model")
            hidden.with_name("tokenizer.bin").write_text("tokenizer")
            (tmp_path / "y.bin").write_text("of somebody else")

    with pytest.raises(InputError, match=r"y\.bin: already there"):
        write_too_late()
    assert names(tmp_path) == ["y.bin"]


# A shell that starts the tests in its background lets its children ignore Ctrl-C, which a person's
# terminal does not.
WAIT = """
import signal, sys, time
from pathlib import Path
from convert.landing import landing
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts this may ignore them
signal.signal(signal.SIGHUP, signal.SIG_DFL)
with landing(Path("new/y"), folder=True, replace=False) as hidden:
    hidden.mkdir()
    (hidden / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing_half_written(number, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout
    with process.stdout:
        assert process.stdout.readline() == "ready\n"
        assert list(tmp_path.rglob(".y.*.partial"))
        process.send_signal(number)
        started = time.monotonic()
        process.wait(timeout=30)
    assert time.monotonic() - started < 20
    assert process.returncode != 0
    assert list(tmp_path.iterdir()) == []


def test_the_callers_own_handlers_stay(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    calls = []
    signal.signal(signal.SIGTERM, lambda *_: calls.append(1))
    try:
        with landing(tmp_path / "y", folder=False, replace=False) as hidden:
            hidden.write_text("whole")
            os.kill(os.getpid(), signal.SIGTERM)
        assert calls == [1]
    finally:
        signal.signal(signal.SIGTERM, before)
    with landing(tmp_path / "z", folder=False, replace=False) as hidden:
        hidden.write_text("whole")
    assert signal.getsignal(signal.SIGTERM) == before
    assert names(tmp_path) == ["y", "z"]
