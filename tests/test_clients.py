"""Real models that others have written, with their own checkpointing switched on, beside their unchanged twins."""

import copy

import pytest
import torch
import transformers as hf
from transformers.models.seamless_m4t.modeling_seamless_m4t import SeamlessM4TSpeechEncoder

from momentum_fix import calibrate, correct, diagnose, preserve_everywhere, update_once
from recipes import TINY_CONFORMER
from twins import ROUNDING, counters, deviation

pytestmark = pytest.mark.slow
SPEECH = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


def wav2vec2_conformer():
    config = hf.Wav2Vec2ConformerConfig(
        **TINY_CONFORMER,
        num_hidden_layers=3,
        layerdrop=0.0,
        apply_spec_augment=False,
    )
    return hf.Wav2Vec2ConformerModel(config), {"input_values": (2, 400)}


def seamless_m4t_speech():
    config = hf.SeamlessM4TConfig(
        hidden_size=16,
        speech_encoder_layers=2,
        speech_encoder_attention_heads=2,
        speech_encoder_intermediate_size=32,
        speech_encoder_layerdrop=0.0,
        feature_projection_input_dim=8,
        conv_depthwise_kernel_size=5,
        max_source_positions=64,
        use_cache=False,
    )
    return SeamlessM4TSpeechEncoder(config), {"input_features": (2, 20, 8)}


def parakeet():
    config = hf.ParakeetEncoderConfig(
        **SPEECH, num_hidden_layers=2, num_mel_bins=8, subsampling_conv_channels=4, conv_kernel_size=5, layerdrop=0.0
    )
    return hf.ParakeetEncoder(config), {"input_features": (2, 64, 8)}


def lasr():
    config = hf.LasrEncoderConfig(
        **SPEECH, num_hidden_layers=2, num_mel_bins=8, subsampling_conv_channels=8, conv_kernel_size=5, layerdrop=0.0
    )
    return hf.LasrEncoder(config), {"input_features": (2, 64, 8)}


def granite_speech5():
    config = hf.GraniteSpeech5EncoderConfig(
        **SPEECH, num_hidden_layers=3, num_mel_bins=8, context_size=8, conv_kernel_size=3, vocab_size=12
    )
    return hf.GraniteSpeech5Encoder(config), {"input_features": (2, 64, 32)}


def mobilevit():
    config = hf.MobileViTConfig(
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
        num_attention_heads=2,
        image_size=64,
        expand_ratio=2.0,
    )
    return hf.MobileViTModel(config), {"pixel_values": (2, 3, 64, 64)}


def mobilevitv2():
    config = hf.MobileViTV2Config(image_size=64, width_multiplier=0.125, n_attn_blocks=[1, 1, 1], expand_ratio=2.0)
    return hf.MobileViTV2Model(config), {"pixel_values": (2, 3, 64, 64)}


def swiftformer():
    config = hf.SwiftFormerConfig(depths=[1, 1, 2, 1], embed_dims=[8, 8, 16, 16], image_size=64)
    return hf.SwiftFormerModel(config), {"pixel_values": (2, 3, 64, 64)}


def pp_lcnet():
    return hf.PPLCNetForImageClassification(hf.PPLCNetConfig(scale=0.25)), {"pixel_values": (2, 3, 64, 64)}


def mmcv_resnet():
    import mmcv.cnn  # in the test that ignores what importing it warns of

    stages = {"num_stages": 2, "strides": (1, 2), "dilations": (1, 1), "out_indices": (0, 1), "bn_eval": False}
    return mmcv.cnn.ResNet(50, **stages, with_cp=True), {"x": (2, 3, 32, 32)}


def torchvision_densenet():
    models = pytest.importorskip("torchvision.models", reason="its wheel does not load beside a torch without CUDA")
    return models.DenseNet(8, (2, 2), 16, memory_efficient=True), {"x": (2, 3, 64, 64)}


def timm_model(name, **options):
    timm = pytest.importorskip("timm", reason="it needs torchvision, which does not load beside a torch without CUDA")
    return timm.create_model(name, **options), {"x": (2, 3, 64, 64)}


def timm_resnet():
    return timm_model("resnet18")


def timm_efficientnet():
    return timm_model("efficientnet_b0")


def switch(model, on):
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(on)
    elif isinstance(model, hf.PreTrainedModel):
        model.activation_checkpointing_enable() if on else model.activation_checkpointing_disable()
    else:
        for module in model.modules():
            for name in ("with_cp", "memory_efficient"):
                if hasattr(module, name):
                    setattr(module, name, on)


def first_outputs(outputs):
    if isinstance(outputs, hf.utils.ModelOutput):
        return outputs.to_tuple()[:1]
    return outputs if isinstance(outputs, tuple) else (outputs,)


def train(model, shapes, on, steps):
    """Train on the steps' batches, which depend on their numbers alone; dropout too repeats itself."""
    model.double()
    model.train()
    switch(model, on)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs = {name: torch.randn(*shape, generator=generator) * (1 + step % 3) for name, shape in shapes.items()}
        torch.manual_seed(step)
        model.zero_grad()
        outputs = model(**inputs)
        loss = sum(y.square().mean() for y in first_outputs(outputs))
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
    return model


CLIENTS = {
    wav2vec2_conformer: {2},
    seamless_m4t_speech: {2},
    parakeet: {2},
    lasr: {2},
    granite_speech5: {2},
    mobilevit: {1, 2},
    mobilevitv2: {1, 2},
    swiftformer: {1, 2},
    pp_lcnet: {1, 2},
    mmcv_resnet: {1, 2},
    torchvision_densenet: {1, 2},
    timm_resnet: {1, 2},
    timm_efficientnet: {1, 2},
}


# mmcv imports parts of torch that torch has deprecated, and leaves the choice of the engine to torch's default
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint. the use_reentrant parameter should be passed explicitly")
@pytest.mark.parametrize(("client", "passes"), CLIENTS.items(), ids=[client.__name__ for client in CLIENTS])
def test_the_statistics_are_those_of_the_unchanged_twin(client, passes):
    model, shapes = client()
    truth = train(copy.deepcopy(model), shapes, False, range(4))
    uncorrected = train(copy.deepcopy(model), shapes, True, range(4))
    calibrated = copy.deepcopy(model)
    with calibrate(calibrated) as report:
        train(calibrated, shapes, True, range(1))
    train(calibrated, shapes, True, range(1, 4))
    corrected = train(correct(copy.deepcopy(model), report), shapes, True, range(4))
    once = copy.deepcopy(model)
    with update_once(once):
        train(once, shapes, True, range(4))
    everywhere = copy.deepcopy(model)
    with preserve_everywhere():
        train(everywhere, shapes, True, range(4))
    assert set(report.values()) == passes
    assert len(report) == len(report.rows)
    for other in (calibrated, corrected, once, everywhere):
        assert all(map(torch.equal, other.parameters(), uncorrected.parameters()))
    for mine, true in zip(uncorrected.parameters(), truth.parameters(), strict=True):
        # not bit for bit: a checkpoint may add up the gradients of a tensor with three uses in another order
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-12)
    assert deviation(uncorrected, truth) > 1e-2
    assert deviation(calibrated, truth) < ROUNDING
    assert deviation(corrected, truth) < ROUNDING
    for other in (once, everywhere):
        assert deviation(other, truth) < ROUNDING  # not 0 where the weights are not equal bit for bit
        assert counters(other) == counters(truth) != counters(uncorrected)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint. the use_reentrant parameter should be passed explicitly")
@pytest.mark.parametrize(("client", "passes"), CLIENTS.items(), ids=[client.__name__ for client in CLIENTS])
def test_diagnose_says_what_their_unchanged_twins_say(client, passes):
    model, shapes = client()
    with diagnose(model) as report:
        train(model, shapes, True, range(1))
    assert report.gradients_right
    assert not report.ok
    assert {finding.times for finding in report.values()} == passes - {1}
    assert report.fixes == ("update_once(model)",)
    with update_once(model), diagnose(model) as report:
        train(model, shapes, True, range(1))
    assert report.ok
