"""Each example in docs/trainers.md and docs/clusters.md runs as it stands, pasted into a file."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

import test_state_clients as clients
from pages import DOCS, blocks, headings, run
from twins import ROUNDING, non_reentrant

TRAINERS = [
    pytest.param(code, printed, id=heading)
    for heading, (_, code, printed) in zip(headings("trainers.md"), blocks("trainers.md"), strict=True)
]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
@pytest.mark.parametrize(("code", "printed"), TRAINERS)
def test_an_example_for_trainers_runs_by_itself_and_prints_what_the_page_says(code, printed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    found = run(code, "trainers.md", {"__name__": "__main__"})
    if printed:
        assert found == printed


def test_the_example_for_clusters_runs_by_itself_on_two_ranks(tmp_path):
    ((_, code, printed),) = blocks("clusters.md")
    (tmp_path / "train.py").write_text(code, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(torchrun, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert (found.returncode, found.stdout) == (0, printed), found.stderr


@pytest.mark.skipif(not find_spec("ruff"), reason="ruff comes with the extra dev")
@pytest.mark.parametrize("page", ["trainers.md", "clusters.md"])
def test_an_example_names_nothing_that_it_does_not_define_and_imports_nothing_needlessly(page, tmp_path):
    for number, (_, code, _) in enumerate(blocks(page)):
        (tmp_path / f"{number}.py").write_text(code, encoding="utf-8")
    lint = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F", "--output-format=concise", "."]
    found = subprocess.run(lint, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_each_fence_that_opens_says_its_language_and_is_closed(page):
    fences = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert all(fences[::2])
    assert not any(fences[1::2])
    assert len(fences) % 2 == 0


# The figures on the page.

ROW = re.compile(r"^\| ([^|]+) \| ([0-9.]+|raises) \| ([0-9.]+|raises) \|$", re.MULTILINE)
ROWS = ROW.findall((DOCS / "trainers.md").read_text(encoding="utf-8"))


def test_the_page_has_a_row_for_each_client_but_those_that_need_another_torch():
    assert {client for client, _, _ in ROWS} == {each for each in clients.CLIENTS if "spikingjelly" not in each}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("client", "state", "gradients"), ROWS, ids=[client for client, _, _ in ROWS])
def test_the_page_says_by_how_much_each_client_is_wrong(client, state, gradients):
    if (client, non_reentrant) in clients.REFUSED:
        assert state == gradients == "raises"
    else:
        found = clients.deviations(clients.CLIENTS[client], non_reentrant)
        for mine, said in zip(found, (state, gradients), strict=True):
            assert mine == pytest.approx(float(said), rel=0.3, abs=ROUNDING)
