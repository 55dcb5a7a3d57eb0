"""What all tests share: strict arrays, a compilation cache, real data, and one small trained run."""

import contextlib
import functools
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Other programs on the machine make any example slow now and then; none of these tests is about time.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

ROOT = Path(__file__).resolve().parent.parent

# Set before jax is imported, here and in the commands that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Threads of torch wait for each other without sleep: with other programs on the cores, the other worker
# of the tests among them, a run of a small model on two threads takes four times as long as on one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A model and a corpus so small that a run of 20 steps is a matter of seconds.
SMALL_RUN = [
    *("--config", "tiny"),
    *("--model.vocab_size", "512"),
    *("--model.hidden_size", "32"),
    *("--model.intermediate_size", "64"),
    *("--model.num_hidden_layers", "2"),
    *("--model.num_attention_heads", "2"),
    *("--model.num_key_value_heads", "1"),
    *("--model.max_position_embeddings", "64"),
    *("--data.sequence_length", "64"),
    *("--data.toy_documents", "400"),
    *("--data.validation_fraction", "0.1"),
    *("--train.batch_size", "4"),
    *("--train.eval_batches", "2"),
    *("--train.log_interval_steps", "3"),
    *("--max-new-tokens", "16"),
]

# What Chromium is called.
BINARIES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# The files that take longest, which begin first, so that two workers end at about the same time.
LONGEST = [
    *("tiny", "lora", "monitor", "faults", "resume", "parity_model", "modes", "rl_control"),
    *("hosts", "sharding", "page", "decoding", "mode_settings", "settings_reach", "presets"),
    *("parity_training", "convert_family_runs", "convert_meaning", "switch", "parity_generation"),
    *("bad_input_kinds", "engine", "train", "attention", "model", "convert_chain", "serve_command"),
    *("convert_parity", "verify_resume", "ray", "preference_losses", "expert_runs", "dispatch"),
]


def pytest_configure(config: pytest.Config) -> None:
    """Check the shapes in signatures, and let arrays of different rank never meet silently."""
    import jax
    from jaxtyping import install_import_hook

    # Where arrays are; checking every call of the story grammar would take most of its tests' time.
    rooms = ["data.batches", "data.packing", "data.shards"]
    rooms += ["model", "training", "objectives", "inference"]
    names = ["tinyllm_torch", *(f"tinyllm_jax.{room}" for room in rooms)]
    install_import_hook(names, "shape_checks.checked")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.devices()  # one, also where the first test is a command that would make several of a CPU


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files in order; tests of a file stay in theirs."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the collector of garbage not walk all of torch and jax over and over while jax traces."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


XLA_FLAGS = os.environ.get("XLA_FLAGS", "")
# Of XLA, left out of plain programs besides: MLIR's passes over each fusion, which take half of the rest,
# and threads that compile, since the other worker has the other core.
PLAIN_OPTIONS = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}


@functools.cache
def plain_options() -> dict[str, Any]:
    """Give those options that this XLA knows."""
    import jax

    known = {}
    for name, value in PLAIN_OPTIONS.items():
        try:
            jax.jit(lambda x: x, compiler_options={name: value}).lower(0.0).compile()
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
        else:
            known[name] = value
    return known


@contextlib.contextmanager
def compiled_plainly(*, plainly: bool = True) -> Iterator[None]:
    """Compile without most optimizations, here and in commands: a third of the time, other last bits."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    flags = " ".join(f"--{name}={str(value).lower()}" for name, value in plain_options().items())
    jax.clear_caches()  # which do not know how a program was compiled
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(plainly)))
        patch.setenv("XLA_FLAGS", f"{XLA_FLAGS} {flags}" if plainly else XLA_FLAGS)
        jax.config.update("jax_disable_most_optimizations", plainly)
        try:
            yield
        finally:
            jax.config.update("jax_disable_most_optimizations", before)
            jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def quick_compiler() -> Iterator[None]:
    """Compile plainly all but what says otherwise: compiling is most of what the tests do."""
    import jax
    from jax._src import compiler

    usual, options = compiler.get_compile_options, plain_options()

    def options_of_program(*given: Any, **named: Any) -> Any:
        made = usual(*given, **named)
        if jax.config.read("jax_disable_most_optimizations"):
            made.env_option_overrides = [*made.env_option_overrides, *options.items()]
        return made

    with pytest.MonkeyPatch.context() as patch, compiled_plainly():
        # XLA reads its variable only once in a process.
        patch.setattr(compiler, "get_compile_options", options_of_program)
        yield


@pytest.fixture(scope="module", autouse=True)
def compiler(request: pytest.FixtureRequest, quick_compiler: None) -> Iterator[None]:
    """Compile as a user's commands do for a file that says OPTIMIZED; single tests take `optimized`.

    What a file has set for the process ends with it.
    """
    import jax

    optimized, wide = getattr(request.module, "OPTIMIZED", False), jax.config.jax_enable_x64
    with compiled_plainly(plainly=False) if optimized else contextlib.nullcontext():
        yield
    # A command that trains in float64 turns it on for its process.
    jax.config.update("jax_enable_x64", wide)


@pytest.fixture
def optimized() -> Iterator[None]:
    """Compile as a user's commands do, for a comparison with other programs."""
    with compiled_plainly(plainly=False):
        yield


@pytest.fixture(scope="session", autouse=True)
def measured_once() -> Iterator[None]:
    """Measure what the CPU can do once, instead of for 0.2 s on all cores as each run begins."""
    with pytest.MonkeyPatch.context() as patch:
        for package in ("tinyllm_jax", "tinyllm_torch"):
            if devices := sys.modules.get(f"{package}.training.devices"):
                patch.setattr(devices, "measured_tflops", functools.cache(devices.measured_tflops))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Give the folder of real stories beside the checkout, or skip where a user has none."""
    folder = ROOT.parent / "shared" / "data"
    if not (folder / "tinystories").is_dir():
        pytest.skip("no real data: ../shared/data/tinystories is not there")
    return folder


@pytest.fixture(scope="session")
def prepared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give one data folder to all small runs, so that their corpus is prepared once."""
    return tmp_path_factory.mktemp("data")


def flags_for_devices(count: int | str) -> str:
    """Give the XLA_FLAGS of a process whose CPU counts as so many devices."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"


def run_python(
    *words: str | Path,
    folder: Path | None = None,
    timeout: float = 300,
    check: bool = False,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, which finds the project and the programs beside the tests.

    Args:
        words: A file, or `-c` and a program, or `-m` and a module; then its flags.
        folder: Where it runs; None is here.
    """
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=check,
    )


class Command:
    """Runs `python -m tinyllm_jax.NAME FLAGS...` as a person would."""

    def __init__(self, folder: Path, data: Path):
        self.options = {
            "cwd": folder,
            "env": os.environ | {"TINYLLM_DATA_DIR": str(data), "PYTHONPATH": str(ROOT)},
            "text": True,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        }

    def run(self, name: str, *flags: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        words = [sys.executable, "-m", f"tinyllm_jax.{name}", *flags]
        return subprocess.run(words, **self.options | {"timeout": 300} | options)

    def start(self, name: str, *flags: str) -> subprocess.Popen[str]:
        """Start a command, to be watched and killed."""
        words = [sys.executable, "-m", f"tinyllm_jax.{name}", *flags]
        return subprocess.Popen(words, **self.options)


@pytest.fixture
def command(tmp_path: Path, prepared_folder: Path) -> Command:
    """Give what runs commands in an empty folder."""
    return Command(tmp_path, prepared_folder)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, prepared_folder: Path) -> Path:
    """Give a finished run of 20 steps, with checkpoints at 10 and 20; tests only read it."""
    from tinyllm_jax import train

    folder = tmp_path_factory.mktemp("runs") / "small"
    flags = ["--max-steps", "20", "--checkpoint.interval_steps", "10", "--out", str(folder)]
    flags += ["--train.eval_interval_steps", "10"]
    # As in the files that go on with it, which compare bits.
    with pytest.MonkeyPatch.context() as patch, compiled_plainly():
        patch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
        assert train.main([*SMALL_RUN, *flags]) == 0
    return folder


@pytest.fixture
def run_copy(trained_run: Path, tmp_path: Path) -> Path:
    """Give a copy of the finished run that a test may break."""
    return Path(shutil.copytree(trained_run, tmp_path / "run", symlinks=True))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start the browser, or skip where there is none."""
    path = next(filter(None, map(shutil.which, BINARIES)), None)
    if path is None:
        pytest.skip("no Chromium here; on Debian: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()
