"""A process that the runtime aborts while it asks a service that never answers ends in one line."""

import sys

import pytest
from conftest import run_python

PROGRAM = """
import os, sys, threading, time
from tinyllm_jax.training import distributed

distributed.ROLL_CALL_SECONDS = -1.5  # an abort waits 2 s longer

class Client:
    def key_value_set(self, key, value):
        threading.Timer(0.2, os.abort).start()
        if sys.argv[1] == "hangs":
            time.sleep(60.0)

    def key_value_dir_get(self, folder):
        return [(f"{folder}{n}", '[1, "no memory"]' if n == 0 else '[1, ""]') for n in range(2)]

here = distributed.Hosts(1, 2, client=Client(), coordinator="127.0.0.1:1")
here.go_on = "COMMAND"
here.end_on_abort()
here.leave(distributed.PeerEndedError("process 0") if sys.argv[2] == "peer" else OSError("disk"))
time.sleep(60.0)
"""
STOPS = ", so process 1 stops. Start all again, as many as there are, with COMMAND.\n"
GONE = f"error: process 0 of 2 (at 127.0.0.1:1) is gone{STOPS}"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal")
@pytest.mark.parametrize(
    ("service", "why", "line"),
    [
        ("hangs", "peer", GONE),
        ("hangs", "own", GONE),
        ("answers", "peer", f"error: process 0 of 2 stopped (no memory){STOPS}"),
        ("answers", "own", ""),  # the caller says it
    ],
)
def test_a_process_that_is_aborted_in_the_roll_call_ends_in_one_line(service, why, line):
    ended = run_python("-c", PROGRAM, service, why, timeout=50)
    assert (ended.returncode, ended.stderr, ended.stdout) == (1, line, "")
