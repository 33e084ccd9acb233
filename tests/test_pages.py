"""The examples of the pages on trainers, on state and on clusters run as they stand."""

import ast
import copy
import itertools
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import swa_utils

import contracts
import test_state_clients as clients
from momentum_fix import applied
from pages import DOCS, blocks, headings, run
from twins import ROUNDING, batches, counters, deviation, non_reentrant, plainly, train

PASTED = ["preserving.md", "remat.md"]  # each example there stands alone
EXAMPLES = [
    pytest.param(page, code, printed, id=f"{page} {heading}")
    for page in PASTED
    for heading, (_, code, printed) in zip(headings(page), blocks(page), strict=True)
]


@pytest.mark.parametrize(("page", "code", "printed"), EXAMPLES)
def test_an_example_runs_by_itself_and_prints_what_the_page_says(page, code, printed):
    torch.set_default_dtype(torch.float32)
    assert run(code, page, {"__name__": "__main__"}) == printed


# docs/trainers.md: each section goes on from the first example.

NOT_HERE = {"timm": "timm", "nnU-Net": "nnunetv2", "DeepSpeed": "deepspeed"}
SECTIONS = headings("trainers.md")[1:]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Give what runs a section of the page, with this text replaced, in a folder and a process group of its own."""
    monkeypatch.chdir(tmp_path)
    for name in ("COLUMNS", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    torch.set_default_dtype(torch.float32)

    def run_section(section, **replaced):
        if section in NOT_HERE and not find_spec(NOT_HERE[section]):
            for name, module in contracts.modules(NOT_HERE[section]).items():
                monkeypatch.setitem(sys.modules, name, module)
        if section == "DDP and FSDP2":
            dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
        names = {"__name__": "__main__"}
        ((_, code, printed),) = blocks("trainers.md", section)
        for old, new in replaced.items():
            code = re.sub(rf"\b{old}\(", new, code)
        run(blocks("trainers.md")[0][1], "trainers.md", names)
        return run(code, "trainers.md", names).splitlines()[-1:], printed.splitlines(), names

    yield run_section
    if dist.is_initialized():
        dist.destroy_process_group()


NOISE = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed"),
    pytest.mark.filterwarnings("ignore:torch.utils.checkpoint. the use_reentrant parameter should be passed"),
]


def noisy(function):
    """Let Lightning, and mmcv's own call of the checkpoint, say what they say."""
    for mark in NOISE:
        function = mark(function)
    return function


@noisy
@pytest.mark.parametrize("section", [section for section in SECTIONS if section != "nnU-Net"])
def test_a_section_for_a_trainer_prints_what_the_page_says(section, trained):
    printed, said, _ = trained(section)
    assert printed == said != []


@noisy
@pytest.mark.parametrize("section", [section for section in SECTIONS if section != "nnU-Net"])
def test_without_its_line_a_section_counts_the_recomputations_too(section, trained):
    printed, said, _ = trained(section, update_once="id(", UpdateOnce="*(")
    assert max(ast.literal_eval(printed[0])) >= 2 * max(ast.literal_eval(said[0]))


def test_the_trainer_for_nnu_net_covers_the_layers_that_initialize_has_made(trained):
    *_, names = trained("nnU-Net")
    trainer = names["nnUNetTrainerBNOnce"]()
    trainer.initialize()
    assert applied(trainer.network) == {"1": "update_once"}


def test_the_table_names_each_section():
    page = (DOCS / "trainers.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[(.+?)\]\(#", page, re.MULTILINE) == SECTIONS


def test_update_bn_gives_a_model_trained_with_checkpointing_the_statistics_that_it_gives_its_uncheckpointed_twin():
    data = batches(12, 8, 4)
    truth = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    recomputed = copy.deepcopy(truth)
    for model, ckpt in ((truth, plainly), (recomputed, non_reentrant)):
        train(model, lambda model, x, ckpt: ckpt(model, x.requires_grad_()).square().sum().backward(), data, ckpt)
    assert deviation(recomputed, truth) > 1e-2
    for loader in (data, data[:5], [(x, "its label") for x in data]):
        for model in (truth, recomputed):
            swa_utils.update_bn(itertools.islice(loader, 10), model)
        assert deviation(recomputed, truth) == 0
        assert set(counters(recomputed).values()) == {min(len(loader), 10)}


def test_the_example_for_clusters_runs_by_itself_on_two_ranks(tmp_path):
    ((_, code, printed),) = blocks("clusters.md")
    (tmp_path / "train.py").write_text(code, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(torchrun, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert (found.returncode, found.stdout) == (0, printed), found.stderr


@pytest.mark.skipif(not find_spec("ruff"), reason="ruff comes with the extra dev")
@pytest.mark.parametrize("page", [*PASTED, "clusters.md", "trainers.md", "calibrate.md"])
def test_an_example_names_nothing_that_it_does_not_define_and_imports_nothing_needlessly(page, tmp_path):
    first, *others = [code for _, code, _ in blocks(page)]
    goes_on = page in ("trainers.md", "calibrate.md")  # from the first example
    for number, code in enumerate([first, *(first + code if goes_on else code for code in others)]):
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
ROWS = ROW.findall((DOCS / "preserving.md").read_text(encoding="utf-8"))


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
