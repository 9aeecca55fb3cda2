"""Accuracy, features and logistic regression: known answers."""

import json
import os
import signal
import socket
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from rank_runs import on_ranks
from sklearn.linear_model import LogisticRegression

from simclr_fast.augment.params import Augmentation
from simclr_fast.commands.eval import measured
from simclr_fast.data.datasets import open_source
from simclr_fast.data.sources import ArraySource, FileSource, subset
from simclr_fast.evaluation import features as module
from simclr_fast.evaluation import linear
from simclr_fast.evaluation.accuracy import bootstrap, score, true_class_rank
from simclr_fast.evaluation.features import (
    cached_features,
    extract_features,
    features,
    fingerprint,
    pixels,
)
from simclr_fast.evaluation.linear import (
    SWEEP,
    fit_logistic,
    linear_probe,
    sweep_logistic,
)
from simclr_fast.evaluation.subsets import balanced_subset, labelled_pair, listed_subset
from simclr_fast.utils.distributed import join_world
from simclr_fast.utils.interrupts import raise_sigterm


def clusters(n, spread):
    generator = torch.Generator().manual_seed(n)
    labels = torch.arange(n) % 3
    centers = torch.eye(3, 8) * 4
    return centers[labels] + spread * torch.randn(n, 8, generator=generator), labels.numpy()


def small_images(n=7):
    return np.random.default_rng(0).integers(0, 255, (n, 8, 8, 3), dtype=np.uint8)


def test_ranks_of_the_true_class():
    scores = torch.tensor([[0.1, 0.7, 0.2, 0], [0.4, 0.1, 0.4, 0.1], [0.0, 0.0, 0.0, 1.0]])
    # Of equal scores, that with the lower index is first, as in argmax.
    assert true_class_rank(scores, torch.tensor([2, 2, 1])).tolist() == [1, 1, 2]
    assert true_class_rank(scores, scores.argmax(1)).tolist() == [0, 0, 0]
    classes = tuple("abcdefg")
    found = score(torch.tensor([0, 1, 4, 5, 0, 6]), np.array([0, 0, 0, 1, 1, 6]), classes)
    assert found.top1.value == pytest.approx(2 / 6)
    assert found.top5.value == pytest.approx(4 / 6)
    assert found.per_class == {"a": pytest.approx(1 / 3), "b": 0.5, "g": 0.0}
    assert score(torch.tensor([0]), np.array([0]), ("a", "b")).top5 is None
    assert json.dumps(found.to_json())


def test_top_k_accuracy_equals_scikit_learns():
    from sklearn.metrics import top_k_accuracy_score

    scores = torch.rand(50, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 9
    for k in (1, 5):
        ours = (true_class_rank(scores, labels) < k).double().mean().item()
        assert ours == pytest.approx(top_k_accuracy_score(labels, scores.numpy(), k=k))


def test_the_bootstrap_interval_is_1_96_standard_errors():
    accuracy = bootstrap(np.arange(1000) < 700)
    assert accuracy.value == 0.7
    # 1.96 standard errors of the mean of 1,000 draws that are 1 with probability 0.7.
    assert accuracy.high - accuracy.low == pytest.approx(2 * 1.96 * (0.21 / 1000) ** 0.5, rel=0.15)


@pytest.mark.parametrize("l2", [1e-2, 1.0, 100.0])
def test_logistic_regression_equals_scikit_learns(l2):
    train, labels = clusters(300, 3)
    train = train * torch.logspace(-2, 2, 8) + 5
    fit = fit_logistic(train, labels, l2)
    assert fit.converged
    standard = ((train - fit.mean) / fit.std).double().numpy()
    theirs = LogisticRegression(C=1 / l2, max_iter=10000, tol=1e-9).fit(standard, labels)
    assert np.allclose(fit.weight.numpy(), theirs.coef_, atol=1e-3 * np.abs(theirs.coef_).max())
    test, test_labels = clusters(99, 3)
    test = test * torch.logspace(-2, 2, 8) + 5
    theirs_top1 = theirs.score(((test - fit.mean) / fit.std).double().numpy(), test_labels)
    assert (fit.true_class_rank(test, test_labels) == 0).double().mean().item() == pytest.approx(
        theirs_top1
    )


def test_a_fit_in_blocks_and_from_a_start_is_the_same(monkeypatch):
    train, labels = clusters(300, 3)
    whole = fit_logistic(train, labels, 1.0)
    monkeypatch.setattr("simclr_fast.evaluation.linear._BLOCK", 8 * 77)
    parts = fit_logistic(train, labels, 1.0)
    again = fit_logistic(train, labels, 1.0, start=parts)
    assert again.iterations < 3 < parts.iterations
    for other in (parts, again):
        assert torch.allclose(whole.weight, other.weight, atol=1e-4)


def test_constant_and_dependent_features_have_a_finite_fit():
    train, labels = clusters(60, 1)
    train = torch.cat([train, train, torch.full((60, 2), 3.0)], 1)
    fit = fit_logistic(train, labels, 1.0)
    assert fit.converged
    assert torch.allclose(fit.weight[:, :8], fit.weight[:, 8:16], atol=1e-6)
    assert fit.weight[:, 16:].abs().max() < 1e-6


def test_sweep_chooses_on_held_out_images_and_resumes(tmp_path, monkeypatch):
    assert len(SWEEP) == 45
    assert (SWEEP[0], SWEEP[-1]) == (1e5, pytest.approx(1e-6))
    train, labels = clusters(150, 3)
    values = (1e4, 1e2, 1.0, 1e-2)
    whole = sweep_logistic(train, labels, n_classes=3, values=values)
    top = max(whole.validation.values())
    assert whole.fit.l2 == max(v for v, a in whole.validation.items() if a == top)
    assert torch.allclose(
        whole.fit.weight, fit_logistic(train, labels, whole.fit.l2).weight, atol=1e-6
    )
    # Interrupted after two values, then gone on.
    progress = tmp_path / "sweep.pt"
    problem = "simclr_fast.evaluation.linear._Problem.fit"
    from simclr_fast.evaluation.linear import _Problem

    fit, fits = _Problem.fit, []

    def interrupted(self, l2, *rest):
        if len(fits) == 2:
            raise KeyboardInterrupt
        fits.append(l2)
        return fit(self, l2, *rest)

    def sweep():
        return sweep_logistic(train, labels, n_classes=3, values=values, progress=progress)

    with monkeypatch.context() as patch:
        patch.setattr(problem, interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep()
    fitted = []
    monkeypatch.setattr(problem, lambda self, l2, *r: fitted.append(l2) or fit(self, l2, *r))
    assert sweep().validation == whole.validation
    assert fitted == [1.0, 1e-2, whole.fit.l2]
    # A finished sweep only repeats its last fit. With other arguments it begins anew.
    assert sweep().validation == whole.validation
    assert fitted[3:] == [whole.fit.l2]
    sweep_logistic(train, labels, n_classes=3, values=values, seed=1, progress=progress)
    assert len(fitted) == 4 + 5


def test_probe_separates_what_is_separable_and_no_more():
    train, labels = clusters(300, 0.5)
    test, test_labels = clusters(99, 0.5)
    assert linear_probe(train, labels, test, test_labels).value == 1
    unlabelled = np.where(np.arange(300) % 3 == 0, -1, np.asarray(labels))
    kept = unlabelled >= 0
    assert linear_probe(train, unlabelled, test, test_labels) == linear_probe(
        train[kept], unlabelled[kept], test, test_labels
    )
    noise = torch.randn(399, 8, generator=torch.Generator().manual_seed(1))
    assert 0.2 < linear_probe(noise[:300], labels, noise[300:], test_labels).value < 0.5


def test_bad_arguments_of_a_probe_are_refused():
    train, labels = clusters(30, 1)
    with pytest.raises(ValueError, match="l2"):
        fit_logistic(train, labels, 0)
    with pytest.raises(ValueError, match="labels"):
        fit_logistic(train, labels, 1, n_classes=2)
    train[3, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        linear_probe(train, labels, train, labels)
    with pytest.raises(ValueError, match="fraction"):
        balanced_subset(labels, 0)


def test_features_are_in_the_order_of_the_images():
    images = small_images()
    source = ArraySource(images)
    flat = torch.from_numpy(images).permute(0, 3, 1, 2).flatten(1) / 255
    assert torch.allclose(pixels(source, Augmentation(size=8)), flat, atol=1e-6)
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(192))
    found = features(encoder, source, Augmentation(size=8), batch_size=3)
    assert encoder.training
    assert torch.allclose(found, flat / (1 + 1e-5) ** 0.5, atol=1e-6)


class Counting(torch.nn.Module):
    def __init__(self, stop_after=None, number=None):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.seen, self.stop_after, self.number = 0, stop_after, number

    def forward(self, images):
        if self.stop_after is not None and self.seen >= self.stop_after:
            os.kill(os.getpid(), self.number)
        self.seen += len(images)
        return images.flatten(1) * self.scale


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_features_are_extracted_once_and_resumed(tmp_path, number):
    source, augmentation = ArraySource(small_images(11)), Augmentation(size=8)
    stopped = Counting(6, number)
    with raise_sigterm(), pytest.raises(KeyboardInterrupt):
        cached_features(stopped, source, augmentation, folder=tmp_path, batch_size=3)
    encoder = Counting()
    found = cached_features(encoder, source, augmentation, folder=tmp_path, batch_size=3)
    assert (stopped.seen, encoder.seen) == (6, 5)
    assert torch.equal(found, features(Counting(), source, augmentation))
    again = Counting()
    mapped = cached_features(again, source, augmentation, folder=tmp_path)
    assert torch.equal(mapped, found)
    assert again.seen == 0
    assert {path.suffix for path in tmp_path.iterdir()} == {".npy", ".lock"}
    # Other weights: other features.
    again.scale.data.fill_(2)
    assert torch.equal(cached_features(again, source, augmentation, folder=tmp_path), 2 * found)


def convolution():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Flatten())


def rank_of_three(rank, folder, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    images, encoder, seen = small_images(11), convolution(), []
    encoder.register_forward_hook(lambda module, given, made: seen.append(len(made)))
    with join_world("cpu", 60) as world:
        given = {"augmentation": Augmentation(size=8), "batch_size": 2, "world": world}
        # No file of another rank is read or written.
        own = folder / str(rank)
        module.extract_features(encoder, ArraySource(images), folder=own, **given)
        assert seen == ([2, 2], [2, 2], [2, 1])[rank]
        # Once is enough. Then fewer batches than ranks.
        module.extract_features(encoder, ArraySource(images), folder=own, **given)
        module.extract_features(encoder, ArraySource(images[:3]), folder=own, **given)
        assert seen == ([2, 2, 2], [2, 2, 1], [2, 1])[rank]


def test_ranks_share_the_extraction(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    on_ranks(rank_of_three, (tmp_path, port), 3)
    for images in (small_images(11), small_images(11)[:3]):
        given = convolution(), ArraySource(images), Augmentation(size=8)
        path = extract_features(*given, folder=tmp_path / "alone", batch_size=2)
        assert (tmp_path / "0" / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"alone", "0"}


class Exact(module.World):
    """Two ranks: the other one's batch has the features of this one's."""

    group = "both"

    def share(self, make):
        return make() if self.rank == 0 else (3, True)


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_decides_the_precision_for_all(monkeypatch, rank):
    """Autocast is too coarse for the first batch: the other rank must not use it either."""
    gathered = []
    monkeypatch.setattr(module, "all_gather_rows", lambda own, *given: gathered.append(own) or own)
    infer = module.Inference(torch.nn.Flatten(), torch.device("cpu"))
    infer.dtype, infer.checked = torch.bfloat16, False
    monkeypatch.setattr(torch.nn.functional, "cosine_similarity", lambda *_, dim: torch.zeros(1))
    images = torch.full((2, 3, 1, 1), 1.001)
    world = Exact(rank, 2, torch.device("cpu"))
    module._of_all_ranks(infer, iter([(images, None)]), 0, 4, 2, world)
    assert infer.dtype is None
    assert torch.equal(gathered[0], images.flatten(1))


def test_features_that_are_not_finite_are_not_kept(tmp_path):
    encoder = Counting()
    encoder.scale.data.fill_(torch.nan)
    source = ArraySource(small_images())
    for _ in range(2):
        with pytest.raises(ValueError, match="not finite"):
            cached_features(encoder, source, Augmentation(size=8), folder=tmp_path)


def test_fingerprint_changes_with_weights_images_and_preprocessing(tmp_path):
    images = small_images(3)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    source, size = open_source(tmp_path), Augmentation(size=8)
    changed, other = images.copy(), torch.nn.Linear(2, 2)
    changed[2, 7, 7, 2] ^= 1
    keys = [
        fingerprint(torch.nn.Linear(2, 2), source, size),
        fingerprint(other, source, size),
        fingerprint(other, source, Augmentation(size=9)),
        fingerprint(other, subset(source, np.arange(2)), size),
        fingerprint(other, ArraySource(images), size),
        fingerprint(other, ArraySource(changed), size),
    ]
    assert fingerprint(other, open_source(tmp_path), size) == keys[1]
    Image.fromarray(changed[2]).save(tmp_path / "2.png")
    keys.append(fingerprint(other, source, size))
    assert len(set(keys)) == len(keys)


def test_balanced_subsets_are_balanced_and_nested():
    labels = np.repeat(np.arange(5), [100, 100, 100, 100, 7])
    ten, one = balanced_subset(labels, 0.1), balanced_subset(labels, 0.01)
    assert np.bincount(labels[ten]).tolist() == [10, 10, 10, 10, 1]
    assert np.bincount(labels[one]).tolist() == [1, 1, 1, 1, 1]
    assert set(one) < set(ten)
    assert np.array_equal(ten, balanced_subset(labels, 0.1))
    assert not np.array_equal(ten, balanced_subset(labels, 0.1, seed=1))
    assert np.array_equal(balanced_subset(labels, 1), np.arange(407))


def test_lists_of_images_choose_a_subset(tmp_path):
    names = ["n01/n01_3.JPEG", "n01/n01_7.JPEG", "n02/n02_3.JPEG", "n02/a.JPEG", "n01/a.JPEG"]
    source = FileSource([tmp_path / name for name in names])
    listing = tmp_path / "1percent.txt"
    listing.write_text("n02_3.JPEG\nn01_3.JPEG\n\n")
    assert listed_subset(source, listing).tolist() == [0, 2]
    listing.write_text("n02/a.JPEG\nn01_7.JPEG\r\n")
    assert listed_subset(source, listing).tolist() == [1, 3]
    for text, says in (
        ("n03_1.JPEG\n", "n03_1.JPEG"),
        ("a.JPEG", "2 images named a.JPEG"),
        ("", "no names"),
        ("n01_3.JPEG\nn01_3.JPEG", "twice"),
    ):
        listing.write_text(text)
        with pytest.raises(ValueError, match=says):
            listed_subset(source, listing)


def standardised(n=600, dim=40, classes=7):
    """Classes that overlap, and components of very different variance, as real features have."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(n) % classes
    x = torch.randn(classes, dim, generator=generator)[labels]
    x = (x + 2 * torch.randn(n, dim, generator=generator)) * torch.logspace(-3, 1, dim) + 3
    return x, labels


@pytest.mark.parametrize("l2", [1e5, 1.0, 1e-3])
def test_float32_products_find_the_same_minimum(l2):
    """On GPUs the exploratory fits multiply in float32."""
    x, labels = standardised()
    fits = [
        linear._Problem(x, labels, 7, "cpu", dtype).fit(l2, None, 1e-4, 2000)
        for dtype in (torch.float64, torch.float32)
    ]
    assert all(fit.converged for fit in fits)
    assert fits[1].iterations <= fits[0].iterations + 2
    logits = [(x - fit.mean) / fit.std @ fit.weight.float().T + fit.bias.float() for fit in fits]
    agree = (logits[0].argmax(1) == logits[1].argmax(1)).double().mean()
    assert agree > 0.99


def test_a_sweep_with_float32_products_chooses_the_same(monkeypatch):
    assert linear._rough_products("cuda:1") == torch.float32
    assert linear._rough_products("cpu") == torch.float64
    x, labels = standardised()
    exact = sweep_logistic(x, labels, n_classes=7, values=SWEEP[::4])
    monkeypatch.setattr(linear, "_rough_products", lambda device: torch.float32)
    rough = sweep_logistic(x, labels, n_classes=7, values=SWEEP[::4])
    assert rough.fit.l2 == exact.fit.l2
    # At most one of the 119 held-out images is classified differently.
    assert max(abs(rough.validation[v] - exact.validation[v]) for v in exact.validation) < 1.5 / 119
    # The final fit is in float64 either way.
    assert torch.allclose(rough.fit.weight, exact.fit.weight, atol=1e-6)


def test_the_final_fit_begins_without_the_sweeps_copy(monkeypatch):
    x, labels = standardised(70)
    made, alive = [], []
    real = linear._Problem

    def watched(*given):
        made.append(weakref.ref(problem := real(*given)))
        return problem

    def final(*given, **options):
        alive.append(made[0]() is not None)
        return fit_logistic(*given, **options)

    monkeypatch.setattr(linear, "_Problem", watched)
    monkeypatch.setattr(linear, "fit_logistic", final)
    sweep_logistic(x, labels, n_classes=7, values=(1.0, 0.1))
    assert alive == [False]


class Encoder(torch.nn.Module):
    """coarse: autocast changes the features' directions."""

    def __init__(self, coarse):
        super().__init__()
        self.coarse = coarse
        self.seen = []

    def forward(self, images):
        cast = torch.is_autocast_enabled("cpu")
        self.seen.append(cast)
        h = images.flatten(1)[:, :6].clone()
        if cast:
            h[0] += self.coarse * h[0].flip(0)
            h = h.bfloat16()
        return h


@pytest.mark.parametrize(("coarse", "casts"), [(1e-3, True), (0.3, False), (torch.nan, False)])
def test_autocast_only_where_the_features_stay(monkeypatch, coarse, casts):
    monkeypatch.setattr(module, "_autocast_dtype", lambda *_: torch.bfloat16)
    encoder = Encoder(coarse)
    infer = module.Inference(encoder, torch.device("cpu"))
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    exact = images.flatten(1)[:, :6]
    # The first batch is computed twice and kept in float32.
    assert torch.equal(infer(images), exact)
    second = infer(images)
    assert second.dtype == torch.float32
    assert encoder.seen == [False, True, casts]
    assert torch.nn.functional.cosine_similarity(second, exact).min() > 1 - 1e-3


def test_cached_features_of_another_precision_are_not_read(tmp_path, monkeypatch):
    source = ArraySource(small_images())
    encoder, augmentation = Encoder(0), Augmentation(size=8)
    cached_features(encoder, source, augmentation, folder=tmp_path)
    monkeypatch.setattr(module, "_autocast_dtype", lambda *_: torch.bfloat16)
    cached_features(encoder, source, augmentation, folder=tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 2
    assert len(list(tmp_path.glob("*-bfloat16.npy"))) == 1


@pytest.mark.parametrize("changed", ["features", "labels"])
def test_a_kept_sweep_belongs_to_its_features_and_labels(changed, tmp_path, monkeypatch):
    """Even if the first and the last row are as before."""
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    labels, values = np.arange(60) % 3, (1.0, 0.1)
    sweep_logistic(x, labels, n_classes=3, values=values, progress=tmp_path / "sweep.pt")
    if changed == "features":
        x = x.clone()
        x[1:-1] = x[1:-1].flip(0)
    else:
        labels = labels.copy()
        labels[1:-1] = labels[1:-1][::-1]
    from simclr_fast.evaluation.linear import _Problem

    fit, fitted = _Problem.fit, []
    monkeypatch.setattr(
        _Problem, "fit", lambda self, l2, *r: fitted.append(l2) or fit(self, l2, *r)
    )
    sweep_logistic(x, labels, n_classes=3, values=values, progress=tmp_path / "sweep.pt")
    assert fitted[:-1] == list(values)


def rare_features(counts, seed=0):
    """Features [n, 12] around a centre for each class, and labels, with these numbers of rows."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(len(counts), 12, generator=torch.Generator().manual_seed(9))
    labels = np.repeat(np.arange(len(counts)), counts)
    noise = torch.randn(len(labels), 12, generator=generator)
    return centres[labels] + noise, labels


def test_the_only_image_of_a_class_helps_to_choose_the_penalty():
    train, labels = rare_features([20, 20, 20, 1, 1, 1])
    test, test_labels = rare_features([30] * 6, seed=1)
    seen = []
    fit = linear._Problem.fit

    def noted(self, *given):
        seen.append(np.bincount(self.targets.numpy(), minlength=6).tolist())
        return fit(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear._Problem, "fit", noted)
        sweep = sweep_logistic(train, labels, n_classes=6, values=SWEEP[::5])
    # A fifth of the large classes is held out, and no class is unknown to any fit.
    assert seen[0] == [16, 16, 16, 1, 1, 1]
    assert seen[-1] == [20, 20, 20, 1, 1, 1]
    found = (sweep.fit.true_class_rank(test, test_labels) == 0).double().mean()
    best = max(
        float(
            (fit_logistic(train, labels, l2).true_class_rank(test, test_labels) == 0)
            .double()
            .mean()
        )
        for l2 in SWEEP[::5]
    )
    assert found >= best - 0.05


def test_one_image_per_class_is_enough():
    train, labels = rare_features([1] * 6)
    test, test_labels = rare_features([30] * 6, seed=1)
    sweep = sweep_logistic(train, labels, n_classes=6)
    assert max(sweep.validation.values()) == 1
    assert (sweep.fit.true_class_rank(test, test_labels) == 0).double().mean() > 0.7


def test_a_class_without_test_images_is_told(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for split, names in (("train", "abc"), ("test", "ac"), ("other", "ad")):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    pair = labelled_pair(str(tmp_path / "train"), str(tmp_path / "test"))
    assert pair.classes == ("a", "b", "c")
    assert pair.test_labels.tolist() == [0, 0, 0, 2, 2, 2]
    assert "1 of 3 classes have no test images: b" in measured(pair)
    with pytest.raises(ValueError, match=r"classes without training images in .*train: d"):
        labelled_pair(str(tmp_path / "train"), str(tmp_path / "other"))


def test_only_fits_that_choose_l2_multiply_in_float32_on_a_gpu(monkeypatch):
    """Many GPUs multiply float64 matrices 32 to 64 times more slowly."""
    assert linear._rough_products("cuda") == torch.float32
    assert linear._rough_products("cpu") == torch.float64
    monkeypatch.setattr(linear, "_rough_products", lambda device: torch.float32)
    made = []

    class Recorded(linear._Problem):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self.products)

    monkeypatch.setattr(linear, "_Problem", Recorded)
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    sweep_logistic(x, np.arange(40) % 2, n_classes=2, values=(1.0,))
    assert made == [torch.float32, torch.float64]
