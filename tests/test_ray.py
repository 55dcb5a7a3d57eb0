"""Text prepared on a Ray cluster: the same bytes, also when a process is killed or the driver stopped."""

import importlib.util
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import run_python
from test_prepare import contents, is_running, make_stories, run, wait_until, write_jsonl

from tinyllm_jax.config import TokenizerConfig
from tinyllm_jax.data import prepare as module
from tinyllm_jax.data import ray_groups
from tinyllm_jax.errors import InputError

# Ray starts its processes by forking, of which JAX warns where another test has used it before.
pytestmark = pytest.mark.filterwarnings(r"ignore:os.fork\(\) was called:RuntimeWarning")
NO_RAY = importlib.util.find_spec("ray") is None
needs_ray = pytest.mark.skipif(NO_RAY, reason="the package ray is not installed")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Start a cluster of two processes on this machine, which knows no other."""
    import ray

    root = Path(__file__).resolve().parent
    # Else Ray would make a token in the home folder.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("PYTHONPATH", f"{root.parent}{os.pathsep}{root}")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            object_store_memory=100 << 20,
            _node_ip_address="127.0.0.1",
        )
        yield ray
        ray.shutdown()


@pytest.fixture(autouse=True)
def small_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut corpora into several groups, as only large ones are, and keep tests apart."""
    monkeypatch.setattr(module, "GROUP_BYTES", 8000)
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(tmp_path / "data"))


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "stories.jsonl", make_stories(300))


def locally(path: Path, elsewhere: Path, **settings: Any) -> dict[str, bytes]:
    """Give the files of a set that was prepared in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYLLM_DATA_DIR", str(elsewhere))
        return contents(run(path, **settings).folder)


@needs_ray
@pytest.mark.parametrize("packing", ["stream", "packed"])
def test_ray_writes_the_bytes_of_a_local_run(cluster, stories, tmp_path, packing):
    there = run(stories, runner="ray", workers=0, packing=packing)
    assert len(list(there.folder.glob("0*.json"))) > 4
    assert contents(there.folder) == locally(stories, tmp_path / "other", packing=packing)


@pytest.fixture
def before_groups(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], None]], None]:
    """Give what makes each task call something first, with the folder that it writes into."""

    def install(first: Callable[[Path], None]) -> None:
        work = ray_groups.run_task

        def task(group: Any, data: Any, shared: Any) -> Any:
            first(shared.folder)
            return work(group, data, shared)

        monkeypatch.setattr(ray_groups, "run_task", task)

    return install


@needs_ray
def test_a_killed_worker_costs_its_group_a_second_run_and_nothing_else(
    cluster, stories, tmp_path, monkeypatch
):
    marker = tmp_path / "killed"
    work = ray_groups.run_task

    def kill_once(group: Any, data: Any, shared: Any) -> Any:
        def die(_: Any) -> None:
            if group.name == "00002" and not marker.exists():
                marker.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)

        # In the middle of the task: shards have been begun, and lie there under temporary names.
        from tinyllm_jax.data import groups

        encode = groups.tokenise_group
        try:
            groups.tokenise_group = lambda *a, **o: encode(*a, **o | {"on_progress": die})
            return work(group, data, shared)
        finally:
            groups.tokenise_group = encode

    monkeypatch.setattr(ray_groups, "run_task", kill_once)
    there = run(stories, runner="ray", workers=0)
    assert marker.exists()
    assert int(marker.read_text()) != os.getpid()
    expected = locally(stories, tmp_path / "other")
    assert {n: c for n, c in contents(there.folder).items() if n[0] != "."} == expected


@pytest.mark.slow
@needs_ray
def test_a_group_whose_process_always_dies_names_the_file_and_the_rest_is_kept(
    cluster, stories, tmp_path, monkeypatch
):
    work = ray_groups.run_task

    def die(group: Any, data: Any, shared: Any) -> Any:
        if group.name == "00003":
            os.kill(os.getpid(), signal.SIGKILL)
        return work(group, data, shared)

    monkeypatch.setattr(ray_groups, "RETRIES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(ray_groups, "run_task", die)
        with pytest.raises(InputError, match=r"stories\.jsonl.*lost 2 times.*--data\.workers"):
            run(stories, runner="ray", workers=1)
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "data").glob("prepared/*/0*.json")}
    assert len(done) == 3
    again = run(stories, runner="ray", workers=0)
    assert done == {path: path.stat().st_mtime_ns for path in done}
    assert contents(again.folder) == locally(stories, tmp_path / "other")


@needs_ray
def test_errors_in_the_text_are_the_reader_s_own_and_name_the_file(cluster, stories, tmp_path):
    tokenizer = run(stories).tokenizer.save(tmp_path)
    lines = stories.read_text().splitlines(keepends=True)
    stories.write_text("".join([*lines[:150], '{"text": \n', *lines[150:]]))
    with pytest.raises(InputError, match=r"stories\.jsonl.*line"):
        run(stories, runner="ray", tokenizer=TokenizerConfig(path=str(tokenizer)))


@needs_ray
def test_a_full_disk_on_a_node_names_the_file_that_was_prepared(cluster, stories, before_groups):
    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device", str(folder))

    before_groups(fail)
    with pytest.raises(OSError, match="No space left") as caught:
        run(stories, runner="ray")
    assert "stories.jsonl" in " ".join(caught.value.__notes__)


@needs_ray
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("text", r"stories\.jsonl: the machine .* sees another file there.*shared file system"),
        ("tokenizer", r"does not see .*tokenizer\.model as it was written.*shared file system"),
        ("libraries", r"The machine .* has .*9\.9.*Install the same versions"),
    ],
)
def test_a_node_that_sees_something_else_is_refused(
    cluster, stories, monkeypatch, changed, message
):
    work = ray_groups.run_task

    def elsewhere(group: Any, data: Any, shared: Any) -> Any:
        import dataclasses

        other: dict[str, Any] = {
            "text": {"files": dict.fromkeys(shared.files, (1, 1))},
            "tokenizer": {"tokenizer_hash": "0"},
            "libraries": {"libraries": {"numpy": "9.9"}},
        }[changed]
        return work(group, data, dataclasses.replace(shared, **other))

    monkeypatch.setattr(ray_groups, "run_task", elsewhere)
    with pytest.raises(InputError, match=message):
        run(stories, runner="ray")


def test_without_the_package_one_line_says_what_to_install(stories, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'tinyllm\[ray\]', or --data\.runner local"):
        run(stories, runner="ray")


@needs_ray
def test_without_a_cluster_one_line_says_how_to_get_one(stories, tmp_path):
    script = (
        "import sys\nfrom tinyllm_jax.prepare import main\nfrom tinyllm_jax.cli import run\n"
        "run(lambda: main(sys.argv[1:]))"
    )
    flags = ["--data", str(stories), "--data.runner", "ray", "--model.vocab_size", "320"]
    flags += ["--data.ray_address", "127.0.0.1:1", "--data.validation_fraction", "0.2"]
    done = run_python("-c", script, *flags, timeout=120, RAY_USAGE_STATS_ENABLED="0")
    assert done.returncode == 2, done.stderr
    assert "data.ray_address=127.0.0.1:1 leads to no Ray cluster" in done.stderr
    assert "Traceback" not in done.stderr


INTERRUPTED = """
import os, signal, sys, time
from pathlib import Path
from test_prepare import make_config
from tinyllm_jax.cli import run
from tinyllm_jax.data import prepare as module
from tinyllm_jax.data import ray_groups
from tinyllm_jax.data.prepare import prepare

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts this may ignore it
module.GROUP_BYTES = 8000
work, running = ray_groups.run_task, Path(sys.argv[2])

def slow(group, data, shared):
    if group.name >= "00002":
        (running / str(os.getpid())).touch()
        time.sleep(120)
    return work(group, data, shared)

ray_groups.run_task = slow
config = make_config(Path(sys.argv[1]), runner="ray", ray_address="local", workers=0)
run(lambda: prepare(config, progress=False) and 0)
"""


@pytest.mark.slow
@needs_ray
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ctrl_c_ends_a_cluster_of_its_own_and_the_next_run_goes_on(cluster, stories, tmp_path):
    running = tmp_path / "running"
    running.mkdir()
    tests = Path(__file__).resolve().parent
    environment = {
        "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    command = [sys.executable, "-c", INTERRUPTED, str(stories), str(running)]
    with subprocess.Popen(command, env=os.environ | environment) as process:
        prepared = tmp_path / "data" / "prepared"
        wait_until(lambda: any(running.iterdir()) and len(list(prepared.glob("*/0*.json"))) > 1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    wait_until(lambda: not any(is_running(int(path.name)) for path in running.iterdir()))
    assert not list(prepared.glob("*/manifest.json"))
    done = {path: path.stat().st_mtime_ns for path in prepared.glob("*/0*.json")}
    assert contents(run(stories, runner="ray").folder) == locally(stories, tmp_path / "other")
    assert done == {path: path.stat().st_mtime_ns for path in done}
