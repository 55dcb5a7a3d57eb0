"""What a step frees is there for the next one."""

import sys

import pytest
from conftest import run_python

from tinyllm_jax.host import keep_freed_memory

# Works in 64 MB; 4 KiB are a page.
PROGRAM = """
import resource, sys
from tinyllm_jax.host import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: (jnp.sin(jnp.outer(x, x)) @ jnp.ones((4096, 8))).sum())
x = jnp.arange(4096.0)
for _ in range(12):
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    return int(run_python("-c", PROGRAM, how, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own settings")
def test_a_step_touches_no_fresh_memory_once_it_is_kept():
    # 16,384 pages for each step whose memory is new; one kept may still move once.
    assert page_faults("kept") < 50_000 < 120_000 < page_faults("as it is")


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr("tinyllm_jax.host.platform.libc_ver", lambda: ("musl", "1"))
    assert not keep_freed_memory()
