"""Keep compiled programs on disk, so that only a program's first run waits for the compiler."""

import os
from pathlib import Path

import jax


def enable_compilation_cache() -> None:
    """Turn JAX's persistent cache on, in the user's cache folder.

    `JAX_COMPILATION_CACHE_DIR` names another folder, and the environment's other `JAX_` settings
    hold too. A cache that cannot be written makes JAX warn and compile again, nothing worse.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(caches) / "tinyllm" / "jax"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
