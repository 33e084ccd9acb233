"""The callbacks: a Trainer with one ends with the uncheckpointed statistics, bit for bit, and the model as it was."""

import copy
import logging
import os

import lightning
import pytest
import pytorch_lightning
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import TorchSyncBatchNorm
from test_trainers import Net, conformer, hugging_face, loader, loss_of
from torch import nn

from momentum_fix import applied, correct, update_once
from momentum_fix.integrations import lightning as for_lightning
from momentum_fix.integrations import transformers as for_transformers
from twins import counters, deviation, non_reentrant, plainly

for library in ("lightning.pytorch", "pytorch_lightning"):
    logging.getLogger(library).setLevel(logging.ERROR)
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def module_of(net, library=lightning, fail_at=None):
    class Module(library.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.on = net, []

        def training_step(self, batch, batch_idx):
            if self.global_step == fail_at:
                raise FailsError
            self.on.append(set(applied(self.net)))
            return loss_of(self.net(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            return loss_of(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module()


class FailsError(Exception):
    pass


def net_with(ckpt):
    torch.manual_seed(3)
    net = Net()
    net.ckpt = ckpt
    return net


def fit(net, callbacks=(), library=lightning, fail_at=None, resume=None, save=None, epochs=1, **options):
    """Train with validation within the epoch and accumulated gradients."""
    options = {"max_epochs": epochs, "accumulate_grad_batches": 2, "val_check_interval": 2, **options}
    trainer = library.Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **options, **QUIET)
    module = module_of(net, library, fail_at)
    trainer.fit(module, loader(), loader(), ckpt_path=resume)
    if save:
        trainer.save_checkpoint(save)
    return module


@pytest.mark.parametrize("library", [lightning, pytorch_lightning])
def test_lightning_with_the_callback_ends_with_the_uncheckpointed_statistics(library):
    truth, uncorrected, once = net_with(plainly), net_with(non_reentrant), net_with(non_reentrant)
    fit(truth, library=library)
    fit(uncorrected, library=library)
    module = fit(once, [for_lightning.UpdateOnce()], library)
    assert module.on == [{"stem.1", "outer.1", "inner.1"}] * len(loader())
    assert all(map(torch.equal, once.parameters(), truth.parameters()))
    assert deviation(uncorrected, truth) > 1e-2
    assert deviation(once, truth) == 0
    assert counters(once) == counters(truth)
    assert applied(once) == {}


class ConvertsOnCpu(TorchSyncBatchNorm):
    """What Lightning does for `sync_batchnorm=True`, and then gives the new layers a class that runs without a GPU."""

    def apply(self, model):
        model = super().apply(model)
        for layer in model.modules():
            if isinstance(layer, nn.SyncBatchNorm):
                layer.__class__ = nn.BatchNorm1d
        return model


@pytest.fixture
def one_rank():
    """Let Lightning's strategy for several ranks run with this process alone, and clear away what it leaves behind."""
    environment = dict(os.environ)
    yield {"strategy": "ddp", "plugins": [ConvertsOnCpu()], "num_sanity_val_steps": 0}
    dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


def test_where_lightning_converts_to_sync_batchnorm_the_callback_is_right_and_update_once_before_fit_is_lost(one_rank):
    truth, before, once = net_with(plainly), net_with(non_reentrant), net_with(non_reentrant)
    fit(truth, **one_rank)
    update_once(before)
    fit(before, **one_rank)
    module = fit(once, [for_lightning.UpdateOnce()], **one_rank)
    assert module.on == [{"stem.1", "outer.1", "inner.1"}] * len(loader())
    assert deviation(before, truth) > 1e-2
    assert deviation(once, truth) == 0
    assert counters(once) == counters(truth)
    assert applied(once) == {}


def test_a_resumed_lightning_run_with_the_callback_is_right_and_without_it_is_not(tmp_path):
    truth, first, resumed, forgotten = net_with(plainly), *(net_with(non_reentrant) for _ in range(3))
    fit(truth, epochs=2)
    fit(first, [for_lightning.UpdateOnce()], save=tmp_path / "run.ckpt")
    fit(resumed, [for_lightning.UpdateOnce()], epochs=2, resume=tmp_path / "run.ckpt")
    fit(forgotten, epochs=2, resume=tmp_path / "run.ckpt")
    assert deviation(forgotten, truth) > 1e-2
    assert deviation(resumed, truth) == 0


def test_after_an_exception_lightnings_callback_has_left_the_model_as_it_was():
    net, callback = net_with(non_reentrant), for_lightning.UpdateOnce()
    with pytest.raises(FailsError):
        fit(net, [callback], fail_at=1)
    assert applied(net) == {}
    module = fit(net, [callback])  # and it can be used again
    assert module.on[0]
    assert applied(net) == {}


def test_what_update_once_refuses_the_callbacks_refuse(tmp_path):
    with pytest.raises(ValueError, match="has a corrected momentum"):
        fit(correct(net_with(non_reentrant), 2), [for_lightning.UpdateOnce()])
    with pytest.raises(ValueError, match="has a corrected momentum"):
        hugging_face(correct(conformer(0.0), 2), tmp_path, [for_transformers.UpdateOnce()], steps=1)


@pytest.mark.parametrize("layerdrop", [0.0, 0.4], ids=["every layer in every step", "layers dropped at random"])
def test_hugging_face_trainer_with_the_callback_ends_with_the_uncheckpointed_statistics(tmp_path, layerdrop):
    once = conformer(layerdrop)
    truth, uncorrected = copy.deepcopy(once), copy.deepcopy(once)
    hugging_face(truth, tmp_path)
    hugging_face(uncorrected, tmp_path, activation_checkpointing=True)
    hugging_face(once, tmp_path, [for_transformers.UpdateOnce()], activation_checkpointing=True)
    assert all(map(torch.equal, once.parameters(), truth.parameters()))
    assert deviation(uncorrected, truth) > 1e-2
    assert deviation(once, truth) == 0
    assert counters(once) == counters(truth)
    assert applied(once) == {}


def test_a_resumed_hugging_face_run_with_the_callback_is_right(tmp_path):
    first = conformer(0.0)
    truth = hugging_face(copy.deepcopy(first), tmp_path)
    resumed, forgotten = copy.deepcopy(first), copy.deepcopy(first)
    options = {"activation_checkpointing": True, "save_strategy": "steps", "save_steps": 4}
    hugging_face(first, tmp_path, [for_transformers.UpdateOnce()], **options)
    hugging_face(resumed, tmp_path, [for_transformers.UpdateOnce()], tmp_path / "checkpoint-4", **options)
    hugging_face(forgotten, tmp_path, [], tmp_path / "checkpoint-4", **options)
    assert deviation(forgotten, truth) > 1e-2
    assert deviation(resumed, truth) == 0


def test_after_an_exception_hugging_faces_callback_is_on_until_the_next_training_ends(tmp_path):
    model, callback = conformer(0.0), for_transformers.UpdateOnce()

    def fail(*_):
        raise FailsError

    hook = model.projector.register_forward_hook(fail)
    with pytest.raises(FailsError):
        hugging_face(model, tmp_path, [callback], steps=1)
    hook.remove()
    assert applied(model)
    hugging_face(model, tmp_path, [callback], steps=1)
    assert applied(model) == {}
