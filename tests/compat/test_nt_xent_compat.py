"""The drop-in losses against the libraries they stand in for."""

import pytest
import torch

from simclr_fast import NTXentLoss
from simclr_fast.benchmarks import peers
from simclr_fast.compat import google_simclr, lightly, pytorch_metric_learning, solo_learn

N, D = 24, 10


def views(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(N, D, dtype=torch.float64, generator=generator) for _ in range(2)]
    return [z.requires_grad_() for z in draw]


def assert_same(ours, theirs, z):
    """Same loss and, with an upstream gradient that is not one, same gradients."""
    torch.testing.assert_close(ours, theirs)
    wanted = torch.autograd.grad(3 * theirs, z)
    for actual, expected in zip(torch.autograd.grad(3 * ours, z), wanted, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_lightlys_loss(temperature):
    theirs = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    z = views()
    ours = lightly.NTXentLoss(temperature)(*z)
    assert_same(ours, theirs.NTXentLoss(temperature)(*z), z)


def test_lightlys_decoupled_loss():
    theirs = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    z = views()
    ours = NTXentLoss(0.2, decoupled=True)(*z)
    assert_same(ours, theirs.DCLLoss(0.2)(*z), z)


def test_lightlys_memory_bank():
    theirs = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    size = (60, D)  # two batches of 24, then one that is cut at the end
    wanted, ours = theirs.NTXentLoss(0.2, size), lightly.NTXentLoss(0.2, size)
    assert ours.bank.shape == size
    torch.testing.assert_close(ours.bank.norm(dim=1), torch.ones(60))
    wanted.double(), ours.double()
    ours.bank.copy_(wanted.memory_bank.bank)
    for step in range(5):
        z = views(step)
        assert_same(ours(*z), wanted(*z), z)
        torch.testing.assert_close(ours.bank, wanted.memory_bank.bank)
        assert ours.bank_ptr == wanted.memory_bank.bank_ptr
    kept = ours.bank.clone()
    ours(*(z.detach() for z in views(9)))
    assert torch.equal(ours.bank, kept)


def test_lightly_without_torch_distributed(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    lightly.NTXentLoss()
    with pytest.raises(ValueError, match="gather_distributed=True needs"):
        lightly.NTXentLoss(gather_distributed=True)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_solo_learns_loss(temperature):
    z = [torch.cat(views()).detach().requires_grad_()]
    indexes = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:N].repeat(2)
    ours = solo_learn.simclr_loss_func(z[0], indexes, temperature)
    assert_same(ours, peers.solo_learn(z[0], indexes, temperature), z)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_pytorch_metric_learnings_loss(temperature):
    theirs = pytest.importorskip(
        "pytorch_metric_learning.losses", reason="pytorch-metric-learning is not installed"
    )
    z = views()
    wanted = theirs.SelfSupervisedLoss(theirs.NTXentLoss(temperature))
    loss = pytorch_metric_learning.NTXentLoss(temperature)
    assert_same(pytorch_metric_learning.SelfSupervisedLoss(loss)(*z), wanted(*z), z)
    shuffled = torch.randperm(2 * N, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(N).repeat(2)[shuffled]
    embeddings = torch.cat(z)[shuffled]
    assert_same(
        loss(embeddings, labels), theirs.NTXentLoss(temperature)(embeddings, labels), [embeddings]
    )


def google(hidden, hidden_norm, temperature, weights):
    """google-research/simclr's objective.py with the definitions of TensorFlow's functions."""
    if hidden_norm:
        square = hidden.square().sum(1, keepdim=True)
        hidden = hidden * square.clamp(min=1e-12).rsqrt()
    a, b = hidden.chunk(2)
    n = len(a)
    large = 1e9 * torch.eye(n, dtype=a.dtype)
    ab, ba = a @ b.T / temperature, b @ a.T / temperature
    labels = torch.eye(n, 2 * n, dtype=a.dtype)
    loss = 0
    for logits in (
        torch.cat((ab, a @ a.T / temperature - large), 1),
        torch.cat((ba, b @ b.T / temperature - large), 1),
    ):
        rows = -(labels * logits.log_softmax(1)).sum(1)
        w = torch.as_tensor(weights, dtype=a.dtype).expand(n)
        loss = loss + (w * rows).sum() / max(int((w != 0).sum()), 1)
    return loss, ab, labels


WEIGHTS = {
    "one": 1.0,
    "number": 0.3,
    "zero": torch.zeros(N),
    "scalar": torch.tensor(2.0),
    "each": torch.linspace(0, 2, N).where(torch.arange(N) % 3 != 0, 0.0),
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("rows", ["ordinary", "short", "zero"])
@pytest.mark.parametrize("hidden_norm", [True, False])
def test_google_simclrs_loss(hidden_norm, rows, weights):
    z = torch.cat(views()).detach()
    if rows != "ordinary":
        z[3], z[N + 5] = (
            z[3] * 1e-8 * (rows == "short"),
            z[N + 5] * (1e-7 if rows == "short" else 0),
        )
    z = [z.requires_grad_()]
    ours, logits, labels = google_simclr.add_contrastive_loss(z[0], hidden_norm, 0.7, None, weights)
    wanted, expected_logits, expected_labels = google(z[0], hidden_norm, 0.7, weights)
    assert_same(ours, wanted, z)
    torch.testing.assert_close(logits, expected_logits)
    assert torch.equal(labels, expected_labels)
    _, again, _ = google_simclr.add_contrastive_loss(z[0], hidden_norm, 0.7)
    _, wanted, _ = google(z[0], hidden_norm, 0.7, 1.0)
    torch.testing.assert_close(
        *(torch.autograd.grad(x.square().sum(), z)[0] for x in (again, wanted))
    )


def test_google_simclr_in_half_precision():
    z = torch.cat(views()).detach()
    loss, logits, labels = google_simclr.add_contrastive_loss(z.half())
    wanted = google(z.half().double(), True, 1.0, 1.0)
    for actual, expected in zip((loss, logits, labels), wanted, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z: lightly.NTXentLoss(0.5, 64), ValueError, r"\(rows, features\), got 64"),
        (lambda z: lightly.NTXentLoss(0.0), ValueError, r"temperature must be positive, got 0.0"),
        (lambda z: solo_learn.simclr_loss_func(z, torch.arange(4)), ValueError, r"shape \[4\]"),
        (lambda z: solo_learn.simclr_loss_func(z, torch.arange(6)), ValueError, "once per view"),
        (
            lambda z: solo_learn.simclr_loss_func(z, torch.zeros(6)),
            ValueError,
            "once per view",
        ),
        (
            lambda z: pytorch_metric_learning.NTXentLoss()(z, torch.tensor([0, 0, 0, 0, 1, 1])),
            ValueError,
            "every label exactly twice",
        ),
        (
            lambda z: pytorch_metric_learning.SelfSupervisedLoss(torch.nn.L1Loss()),
            TypeError,
            "got L1Loss",
        ),
        (
            lambda z: google_simclr.add_contrastive_loss(z, weights=torch.ones(6)),
            ValueError,
            r"weights must be a number or a tensor \[3\], got shape \[6\]",
        ),
        (
            lambda z: google_simclr.add_contrastive_loss(z[:5]),
            ValueError,
            r"hidden must be \[2N, D\], both views of each image, got \[5, 3\]",
        ),
    ],
)
def test_bad_input_to_drop_in_losses_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(6, 3))
