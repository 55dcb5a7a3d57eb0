"""What all tests share: strict arrays, a compilation cache, and the folder of real data."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Before jax is imported, here and in the commands that tests start. A test that sums differently
# each time could not compare runs bitwise; XLA on CPU does not, so nothing else is set.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def pytest_configure(config: pytest.Config) -> None:
    """Make a forgotten broadcast an error: arrays of different rank never meet silently."""
    import jax

    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Give the folder of real stories beside the checkout, or skip where a user has none."""
    folder = ROOT.parent / "shared" / "data"
    if not (folder / "tinystories").is_dir():
        pytest.skip("no real data: ../shared/data/tinystories is not there")
    return folder
