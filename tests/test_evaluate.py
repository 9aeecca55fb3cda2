"""The probe: known answers."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from simclr_fast.augment import Augmentation
from simclr_fast.evaluate import bootstrap, features, linear_probe, pixels
from simclr_fast.sources import ArraySource


def clusters(n, spread):
    generator = torch.Generator().manual_seed(n)
    labels = torch.arange(n) % 3
    centers = torch.eye(3, 8) * 4
    return centers[labels] + spread * torch.randn(n, 8, generator=generator), labels.numpy()


def test_probe_separates_what_is_separable_and_no_more():
    train, labels = clusters(300, 0.5)
    test, test_labels = clusters(99, 0.5)
    assert linear_probe(train, labels, test, test_labels).value == 1
    noise = torch.randn(399, 8, generator=torch.Generator().manual_seed(1))
    assert 0.2 < linear_probe(noise[:300], labels, noise[300:], test_labels).value < 0.5


def test_probe_is_logistic_regression_on_standardised_features():
    train, labels = clusters(300, 3)
    test, test_labels = clusters(99, 3)
    mean, std = train.mean(0), train.std(0, correction=0)
    model = LogisticRegression(C=1.0, max_iter=10000, tol=1e-8)
    model.fit(((train - mean) / std).numpy(), labels)
    expected = model.score(((test - mean) / std).numpy(), test_labels)
    assert linear_probe(train * 7 + 3, labels, test * 7 + 3, test_labels).value == pytest.approx(
        expected, abs=0.011
    )


def test_features_that_are_not_finite_are_refused():
    train, labels = clusters(30, 1)
    train[3, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        linear_probe(train, labels, train, labels)


def test_bootstrap_interval():
    correct = np.arange(1000) < 700
    accuracy = bootstrap(correct)
    assert accuracy.value == 0.7
    # 1.96 standard errors of a mean of 1,000 draws of .7.
    assert accuracy.high - accuracy.low == pytest.approx(2 * 1.96 * (0.21 / 1000) ** 0.5, rel=0.15)


def test_features_and_pixels_are_in_order_and_undistorted():
    images = np.random.default_rng(0).integers(0, 255, (7, 8, 8, 3), dtype=np.uint8)
    source = ArraySource(images)
    flat = torch.from_numpy(images).permute(0, 3, 1, 2).flatten(1) / 255
    assert torch.allclose(pixels(source, Augmentation(size=8)), flat, atol=1e-6)
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(192))
    found = features(encoder, source, Augmentation(size=8), batch_size=3)
    assert encoder.training
    assert torch.allclose(found, flat / (1 + 1e-5) ** 0.5, atol=1e-6)
