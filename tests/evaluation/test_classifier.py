"""Training a classifier on an encoder: one step by hand, resume, what stays frozen."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from simclr_fast.augment.params import Augmentation
from simclr_fast.data.sources import ArraySource
from simclr_fast.evaluation import classifier
from simclr_fast.evaluation.classifier import Recipe, classify, train_classifier
from simclr_fast.utils.checkpoint import checkpoints

AUGMENTATION = Augmentation(size=8, crop=False, p_flip=0)


def source(n=24):
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 3
    images = rng.integers(0, 120, (n, 8, 8, 3))
    images[np.arange(n), :, :, labels] += 60
    return ArraySource(images.astype(np.uint8), labels)


def small_encoder():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def train(encoder, recipe, folder, augmentation=AUGMENTATION, data=None):
    return train_classifier(encoder, 4, data or source(), 3, recipe, augmentation, folder)


def test_the_first_training_step_equals_the_formula(tmp_path):
    """Nesterov from rest: p = -lr (1 + momentum) g, at lr = base · batch / 256."""
    encoder, data = small_encoder(), source()
    model = train(encoder, Recipe(frozen=True, epochs=1, lr=0.1), tmp_path)
    images = torch.from_numpy(np.stack(data.images)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        h = encoder.eval()(images)
    error = torch.full((24, 3), 1 / 3) - nn.functional.one_hot(torch.arange(24) % 3, 3)
    step = -(0.1 * 24 / 256) * 1.9
    assert torch.allclose(model.head.weight, step * error.T @ h / 24, atol=1e-6)
    assert torch.allclose(model.head.bias, step * error.mean(0), atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_a_frozen_encoder_does_not_change(tmp_path, optimizer):
    encoder = small_encoder()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    recipe = Recipe(frozen=True, epochs=30, lr=40, batch_size=12, optimizer=optimizer)
    model = train(encoder, recipe, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert model.head.weight.abs().max() > 0
    # LARS takes steps of a thousandth of the weights' norm: 60 of them from zero learn little.
    if optimizer == "sgd":
        assert (classify(model, source(), AUGMENTATION) == 0).double().mean() > 0.9


def test_fine_tuning_trains_everything(tmp_path):
    encoder = small_encoder()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    train(encoder, Recipe(frozen=False, epochs=3, lr=1, batch_size=8), tmp_path)
    assert all(not torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("native", [True, False])
def test_only_native_bfloat16_is_used(native, monkeypatch):
    """A GPU that only emulates it is faster in float32."""

    def supported(including_emulation=True):
        return including_emulation or native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert classifier._uses_bfloat16(torch.device("cuda", 0)) == native
    assert not classifier._uses_bfloat16(torch.device("cpu"))


def with_dropout():
    return nn.Sequential(*small_encoder(), nn.Dropout(0.3))


class Stopping(ArraySource):
    """Stops as Ctrl-C does when image `at` of the second epoch is read."""

    reads = 0

    def read(self, i):
        self.reads += 1
        # After an interruption torch's generator has another state.
        torch.rand(1)
        if self.reads > 24 + 14:
            raise KeyboardInterrupt
        return super().read(i)


@pytest.mark.parametrize("frozen", [True, False])
def test_resume_is_bit_for_bit(tmp_path, monkeypatch, frozen):
    recipe = Recipe(frozen=frozen, epochs=4, lr=1, batch_size=8)
    crops = Augmentation(size=8)
    whole = train(with_dropout(), recipe, tmp_path / "whole", crops)
    broken = Stopping(source().images, source().labels)
    # The fingerprint reads the images too.
    monkeypatch.setattr(Stopping, "fingerprint", lambda self: source().fingerprint())
    with pytest.raises(KeyboardInterrupt):
        train(with_dropout(), recipe, tmp_path / "cut", crops, broken)
    assert checkpoints(tmp_path / "cut")
    resumed = train(with_dropout(), recipe, tmp_path / "cut", crops)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    # A finished training is only read. With another recipe it begins anew.
    done = checkpoints(tmp_path / "cut")[-1]
    stamp = done.stat().st_mtime_ns
    again = train(with_dropout(), recipe, tmp_path / "cut", crops)
    assert torch.equal(again.head.weight, whole.head.weight)
    assert done.stat().st_mtime_ns == stamp
    other = train(with_dropout(), Recipe(frozen, 1, lr=2, batch_size=8), tmp_path / "cut", crops)
    assert not torch.equal(other.head.weight, whole.head.weight)
    assert not done.exists()


def test_a_truncated_checkpoint_is_set_aside(tmp_path, caplog):
    recipe, crops = Recipe(frozen=True, epochs=4, lr=1, batch_size=8), Augmentation(size=8)
    whole = train(with_dropout(), recipe, tmp_path, crops)
    for number in (1, 2):
        # The newest one; then all.
        for path in checkpoints(tmp_path)[-number:]:
            path.write_bytes(path.read_bytes()[:-100])
        caplog.clear()
        again = train(with_dropout(), recipe, tmp_path, crops)
        assert caplog.text.count("not continuing from") == number
        assert torch.equal(again.head.weight, whole.head.weight)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with torch.no_grad():
        encoder[1].weight.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="learning rate"):
        train(encoder, Recipe(frozen=True, epochs=1, lr=1), tmp_path)


@pytest.mark.parametrize("field", ["epochs", "lr", "batch_size"])
def test_a_recipe_refuses_zero(field):
    with pytest.raises(ValueError, match=field):
        Recipe(**{"frozen": True, "epochs": 1, "lr": 1.0, field: 0})


def test_training_a_classifier_needs_labels(tmp_path):
    with pytest.raises(ValueError, match="labels"):
        train(small_encoder(), Recipe(True, 1, 1.0), tmp_path, data=ArraySource(source().images))
