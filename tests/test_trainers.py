"""Trainers: with calibrate, as docs/calibrate.md has it, and others, each ends with the uncheckpointed statistics."""

import copy
import logging
from contextlib import ExitStack, nullcontext

import lightning
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerForSequenceClassification,
)

from momentum_fix import (
    calibrate,
    correct,
    corrected_momentum,
    diagnose,
    preserve_everywhere,
    preserve_state,
    update_once,
)
from pages import blocks, definitions, run
from recipes import TINY_CONFORMER
from twins import ROUNDING, by_context, counters, deviation, drop_in, momenta, non_reentrant, plainly

PAGE = {}
for section in ("Hugging Face Trainer", "Lightning"):
    for _, code, _ in blocks("calibrate.md", section):
        definitions(code, "calibrate.md", PAGE)
Calibrate, CalibrateFirstStep = PAGE["Calibrate"], PAGE["CalibrateFirstStep"]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Net(nn.Module):
    """One block is run once a batch, one is checkpointed, one is checkpointed within that."""

    def __init__(self):
        super().__init__()
        self.stem, self.outer, self.inner = (
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()) for _ in range(3)
        )
        self.ckpt = plainly

    def forward(self, x):
        return self.ckpt(lambda y: self.ckpt(self.inner, self.outer(y)).tanh(), self.stem(x))


PASSES = {"stem.1": 1, "outer.1": 2, "inner.1": 3}


def loss_of(y, target):
    return nn.functional.mse_loss(y, target)


def loader():
    generator = torch.Generator().manual_seed(5)
    x, target = torch.randn(2, 48, 4, generator=generator)
    return DataLoader(TensorDataset(3 * x + 1, target), batch_size=8)


def steps(net, batches):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for x, target in batches:
        optimizer.zero_grad()
        loss_of(net(x), target).backward()
        optimizer.step()


def plain_loop(net, calibrated):
    first, *others = loader()
    with calibrate(net) if calibrated else nullcontext():
        steps(net, [first])
    steps(net, others)


def accelerate_loop(net, calibrated):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, data = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1), loader())

    def step(x, target):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model(x), target))
            optimizer.step()
            optimizer.zero_grad()

    batches = iter(data)
    if calibrated:
        with calibrate(accelerator.unwrap_model(model)):
            step(*next(batches))
    for batch in batches:
        step(*batch)


class Module(lightning.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        x, target = batch
        return loss_of(self.net(x), target)

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(module, callbacks=(), epochs=1, resume=None):
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        accumulate_grad_batches=2,
        val_check_interval=2,
        callbacks=list(callbacks),
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    trainer.fit(module, loader(), loader(), ckpt_path=resume)
    return trainer


def lightning_fit(net, calibrated, epochs=1, save=None, resume=None):
    trainer = fitted(Module(net), [CalibrateFirstStep()] if calibrated else [], epochs, resume)
    if save:
        trainer.save_checkpoint(save)


def trained(trainer, net, ckpt, calibrated=False, **options):
    net = copy.deepcopy(net)
    net.ckpt = ckpt
    trainer(net, calibrated, **options)
    return net


@pytest.mark.parametrize("trainer", [plain_loop, accelerate_loop, lightning_fit])
def test_a_loop_that_calibrates_its_first_step_ends_with_the_uncheckpointed_statistics(trainer):
    net = Net()
    truth, uncorrected = trained(trainer, net, plainly), trained(trainer, net, non_reentrant)
    calibrated = trained(trainer, net, non_reentrant, calibrated=True)
    assert momenta(calibrated) == {name: corrected_momentum(0.1, k) for name, k in PASSES.items()}
    for model in (uncorrected, calibrated):
        assert all(map(torch.equal, model.parameters(), truth.parameters()))
    assert deviation(uncorrected, truth) > 1e-2
    assert deviation(calibrated, truth) < ROUNDING


@pytest.mark.parametrize("fix", [update_once, lambda net: preserve_everywhere()], ids=["once", "everywhere"])
@pytest.mark.parametrize("trainer", [plain_loop, accelerate_loop, lightning_fit])
def test_a_loop_under_what_is_exact_ends_with_the_uncheckpointed_statistics_bit_for_bit(trainer, fix):
    net = Net()
    truth = trained(trainer, net, plainly)
    with fix(net):
        exact = trained(trainer, net, non_reentrant)
    assert deviation(exact, truth) == 0
    assert counters(exact) == counters(truth)


class DiagnoseLightning(lightning.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.block = ExitStack()
        self.report = self.block.enter_context(diagnose(module))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.block.close()


def test_diagnose_is_ok_in_lightning_if_statistics_move_once_and_only_then():
    for fix in (nullcontext, update_once):
        net, watching = Net(), DiagnoseLightning()
        net.ckpt = non_reentrant
        with fix(net):
            fitted(Module(net), [watching])
        assert watching.report.gradients_right
        assert watching.report.ok is (fix is update_once)
        assert {each.remedy for each in watching.report.values()} <= {"update_once"}


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_diagnose_around_one_step_of_a_trainer_names_update_once():
    ((_, code, _),) = blocks("diagnose.md", "In a Trainer")
    names = {"lightning": lightning, "module": Module(Net()), "loader": loader(), "diagnose": diagnose}
    names["module"].net.ckpt = non_reentrant
    run(code, "diagnose.md", names)
    assert names["report"].gradients_right is True
    assert names["report"].fixes == ("update_once(model)",)


class Logs(Module):
    """Sums up what it sees in a checkpointed method."""

    def __init__(self, ckpt):
        super().__init__(Net())
        self.layer, self.ckpt = nn.Linear(4, 4), [ckpt]

    def part(self, x):
        self.log("seen", float(len(x)), on_step=False, on_epoch=True, reduce_fx="sum")
        return self.layer(x).tanh().tanh()

    def training_step(self, batch, batch_idx):
        x, target = batch
        return loss_of(self.ckpt[0](self.part, self.net(x)), target)


@pytest.mark.parametrize("ckpt", [plainly, non_reentrant, by_context, drop_in])
def test_what_is_logged_in_a_checkpointed_method_is_logged_once(ckpt):
    assert fitted(Logs(ckpt)).callback_metrics["seen"] == len(loader().dataset)


# Hugging Face Trainer.

CONFIG = Wav2Vec2ConformerConfig(**TINY_CONFORMER, num_hidden_layers=3, classifier_proj_size=8)


def conformer(layerdrop):
    config = copy.deepcopy(CONFIG)
    config.layerdrop, config.mask_time_length = layerdrop, 2
    return Wav2Vec2ConformerForSequenceClassification(config).double()


def speech():
    generator = torch.Generator().manual_seed(6)
    return [{"input_values": torch.randn(400, generator=generator) * (1 + i % 3), "labels": i % 2} for i in range(16)]


def hugging_face(model, folder, callbacks=(), resume=None, steps=8, **options):
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        seed=3,
        **{"save_strategy": "no", **options},
    )
    Trainer(model, arguments, train_dataset=speech(), callbacks=list(callbacks)).train(resume_from_checkpoint=resume)
    return model


@pytest.mark.parametrize("layerdrop", [0.0, 0.4], ids=["every layer in every step", "layers dropped at random"])
def test_hugging_face_trainer_with_the_callback_ends_with_the_uncheckpointed_statistics(tmp_path, layerdrop):
    model, calibration = conformer(layerdrop), Calibrate()
    truth = hugging_face(copy.deepcopy(model), tmp_path)
    uncorrected = hugging_face(copy.deepcopy(model), tmp_path, activation_checkpointing=True)
    calibrated = hugging_face(copy.deepcopy(model), tmp_path, [calibration], activation_checkpointing=True)
    names = [f"wav2vec2_conformer.encoder.layers.{i}.conv_module.batch_norm" for i in range(3)]
    assert calibration.passes == dict.fromkeys(names, 2)
    for other in (uncorrected, calibrated):
        assert all(map(torch.equal, other.parameters(), truth.parameters()))
    assert deviation(uncorrected, truth) > 1e-2
    assert deviation(calibrated, truth) < ROUNDING


@pytest.mark.parametrize("fix", [update_once, lambda model: preserve_everywhere()], ids=["once", "everywhere"])
@pytest.mark.parametrize("layerdrop", [0.0, 0.4], ids=["every layer in every step", "layers dropped at random"])
def test_hugging_face_trainer_under_what_is_exact_ends_with_the_uncheckpointed_statistics(tmp_path, layerdrop, fix):
    model = conformer(layerdrop)
    truth = hugging_face(copy.deepcopy(model), tmp_path)
    with fix(model):
        hugging_face(model, tmp_path, activation_checkpointing=True)
    assert deviation(model, truth) == 0
    assert counters(model) == counters(truth)


class DiagnoseStep(TrainerCallback):
    def on_step_begin(self, args, state, control, model, **_):
        self.block = ExitStack()
        self.report = self.block.enter_context(diagnose(model))

    def on_step_end(self, args, state, control, **_):
        self.block.close()


def test_diagnose_names_update_once_in_hugging_faces_trainer_and_preserve_everywhere_makes_it_ok(tmp_path):
    for fix in (nullcontext, preserve_everywhere):
        watching = DiagnoseStep()
        with fix():
            hugging_face(conformer(0.0), tmp_path, [watching], steps=1, activation_checkpointing=True)
        assert watching.report.gradients_right
        assert watching.report.ok is (fix is preserve_everywhere)
        assert watching.report.fixes == (() if watching.report.ok else ("update_once(model)",))


def test_one_calibrated_step_alone_misses_the_layers_that_it_dropped(tmp_path):
    model, calibration = conformer(0.4), Calibrate()
    hugging_face(model, tmp_path, [calibration], steps=1, activation_checkpointing=True)
    assert 0 < len(calibration.passes) < len(calibration.report.rows)


def test_every_second_layer_checkpointed_is_found_out(tmp_path):
    model, calibration = conformer(0.0), Calibrate()
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}}
    truth = hugging_face(copy.deepcopy(model), tmp_path)
    constant = hugging_face(correct(copy.deepcopy(model), 2), tmp_path, **options)
    hugging_face(model, tmp_path, [calibration], **options)
    assert sorted(calibration.passes.values()) == [1, 2, 2]
    assert deviation(constant, truth) > 1e-2
    assert deviation(model, truth) < ROUNDING


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
def test_the_older_name_of_the_option_does_the_same(tmp_path):
    model = conformer(0.0)
    truth = hugging_face(copy.deepcopy(model), tmp_path)
    hugging_face(model, tmp_path, [Calibrate()], gradient_checkpointing=True)
    assert deviation(model, truth) < ROUNDING


# State of other kinds, by the model's own switch: docs/preserving.md says why not by the arguments.


def test_hugging_face_trainer_leaves_a_model_that_was_switched_on_with_preserve_state_as_it_is(tmp_path):
    model = conformer(0.4)
    truth = hugging_face(copy.deepcopy(model), tmp_path)
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": preserve_state})
    hugging_face(model, tmp_path)
    assert all(map(torch.equal, model.parameters(), truth.parameters()))
    assert deviation(model, truth) == 0
    assert counters(model) == counters(truth)


def test_its_arguments_hand_preserve_state_on_too_but_cannot_be_written_as_json(tmp_path):
    model = conformer(0.0)
    truth = hugging_face(copy.deepcopy(model), tmp_path)
    options = {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": False, "context_fn": preserve_state},
    }
    hugging_face(model, tmp_path, **options)
    assert deviation(model, truth) == 0
    with pytest.raises(TypeError, match="function is not JSON serializable"):
        TrainingArguments(str(tmp_path), **options).to_json_string()


# Resuming: the momentum is not in the checkpoint.


def test_a_resumed_hugging_face_run_with_the_callback_is_right_and_without_it_is_not(tmp_path):
    model = conformer(0.0)
    truth = hugging_face(copy.deepcopy(model), tmp_path)
    options = {"activation_checkpointing": True, "save_strategy": "steps", "save_steps": 4}
    hugging_face(copy.deepcopy(model), tmp_path, [Calibrate()], **options)
    resumed, forgotten, once = (conformer(0.0) for _ in range(3))
    assert set(momenta(resumed).values()) == {0.1}
    hugging_face(resumed, tmp_path, [Calibrate()], tmp_path / "checkpoint-4", **options)
    hugging_face(forgotten, tmp_path, [], tmp_path / "checkpoint-4", **options)
    with update_once(once):
        hugging_face(once, tmp_path, [], tmp_path / "checkpoint-4", **options)
    for other in (resumed, forgotten, once):
        assert all(map(torch.equal, other.parameters(), truth.parameters()))
    assert deviation(forgotten, truth) > 1e-2
    assert deviation(resumed, truth) < ROUNDING
    assert deviation(once, truth) < ROUNDING  # what was saved was calibrated


def test_passes_kept_beside_the_weights_make_a_rebuilt_model_right(tmp_path):
    net = Net()
    truth, halves = trained(plain_loop, net, plainly), list(loader())
    first = copy.deepcopy(net)
    first.ckpt = non_reentrant
    with calibrate(first) as report:
        steps(first, halves[:1])
    steps(first, halves[1:3])
    torch.save({"model": first.state_dict(), "passes": report.passes}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt")
    resumed, forgotten = Net(), Net()
    for model in (resumed, forgotten):
        model.load_state_dict(saved["model"])
        model.ckpt = non_reentrant
    steps(correct(resumed, saved["passes"]), halves[3:])
    steps(forgotten, halves[3:])
    assert deviation(forgotten, truth) > 1e-2
    assert deviation(resumed, truth) < ROUNDING


def test_a_resumed_lightning_run_with_the_callback_is_right_and_without_it_is_not(tmp_path):
    net = Net()
    truth = trained(lightning_fit, net, plainly, epochs=2)
    first, resumed, forgotten = (copy.deepcopy(net) for _ in range(3))
    for model in (first, resumed, forgotten):
        model.ckpt = non_reentrant
    lightning_fit(first, calibrated=True, save=tmp_path / "run.ckpt")
    lightning_fit(resumed, calibrated=True, epochs=2, resume=tmp_path / "run.ckpt")
    lightning_fit(forgotten, calibrated=False, epochs=2, resume=tmp_path / "run.ckpt")
    assert deviation(forgotten, truth) > 1e-2
    assert deviation(resumed, truth) < ROUNDING


class FailsOnceError(Exception):
    pass


def test_after_a_first_step_that_fails_training_starts_again_as_if_nothing_had_been(tmp_path):
    model, calibration = conformer(0.0), Calibrate()
    truth = hugging_face(copy.deepcopy(model), tmp_path)
    weights = copy.deepcopy(model.state_dict())

    def fail(*_):
        raise FailsOnceError

    hook = model.projector.register_forward_hook(fail)
    with pytest.raises(FailsOnceError):
        hugging_face(model, tmp_path, [calibration], activation_checkpointing=True)
    hook.remove()
    model.load_state_dict(weights)
    hugging_face(model, tmp_path, [calibration], activation_checkpointing=True)
    assert deviation(model, truth) < ROUNDING
