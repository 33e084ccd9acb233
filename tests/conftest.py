import logging
import os
import sys
from importlib.util import find_spec

import pytest
import torch
from hypothesis import settings

collect_ignore = ["typed"]  # a user's own script: tests/test_typed.py runs it in a folder of its own
torch.set_num_threads(1)  # the suite runs one process a core
os.environ.setdefault("TORCH_DISABLE_ADDR2LINE", "1")  # which looks for minutes for the lines of errors in C++
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_configure(config):
    """Let one process import yapf first: that writes a cache of its grammar, which two at once would damage."""
    if not hasattr(config, "workerinput") and find_spec("yapf"):
        __import__("yapf")


@pytest.fixture(autouse=True)
def _seeded_float64_and_nothing_compiled():
    """Statistics are compared in float64, from the same seed, whatever ran before."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    # A checkpoint with debug=True cuts this logger off; pytest then listens to it, and chokes on what older torch logs.
    logging.getLogger("LoggingTensor").propagate = True
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture
def shell():
    """Give what runs a shell command in this process and returns its exit status."""
    from momentum_fix.__main__ import main

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        return end.value.code

    return run
