"""The losses of other libraries, after the formulas in their sources, for comparison."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def textbook(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent as most repositories write it: the 2N × 2N matrix and cross_entropy."""
    z = F.normalize(torch.cat((z1, z2)), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z1)))


def textbook_decoupled(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Decoupled contrastive loss (Yeh et al. 2022, equation 5), with the 2N × 2N matrix."""
    z = F.normalize(torch.cat((z1, z2)), dim=1)
    logits = z @ z.T / temperature
    rows = torch.arange(len(z), device=z.device)
    pair = rows.roll(len(z1))
    positive = logits[rows, pair]
    same = (rows == rows[:, None]) | (rows == pair[:, None])
    return (logits.masked_fill(same, -math.inf).logsumexp(1) - positive).mean()


def textbook_sup_con(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, equation 2), with the matrix of all rows."""
    z = F.normalize(z, dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    positives = (labels[:, None] == labels).fill_diagonal_(False)
    log_p = logits.log_softmax(1).masked_fill(~positives, 0)
    return -(log_p.sum(1) / positives.sum(1)).mean()


def _rows(z: Tensor, start: int, end: int, temperature: float) -> Tensor:
    rows = torch.arange(start, end, device=z.device)
    logits = z[start:end] @ z.T / temperature
    logits[rows - start, rows] = -math.inf
    return F.cross_entropy(logits, (rows + len(z) // 2) % len(z), reduction="sum")


def chunked(z1: Tensor, z2: Tensor, temperature: float, rows: int = 512) -> Tensor:
    """Blocks of rows with activation checkpointing: memory O(rows · N)."""
    z = F.normalize(torch.cat((z1, z2)), dim=1)
    total = z.new_zeros(())
    for start in range(0, len(z), rows):
        end = min(start + rows, len(z))
        total = total + checkpoint(_rows, z, start, end, temperature, use_reentrant=False)
    return total / len(z)


class _Tiles(torch.autograd.Function):
    """The forward keeps only each row's log-sum-exp; the backward recomputes every tile."""

    @staticmethod
    def forward(ctx, z: Tensor, temperature: float, side: int) -> Tensor:
        lse = z.new_full((len(z),), -math.inf)
        for i, _, logits in _logit_tiles(z, temperature, side):
            lse[i] = torch.logaddexp(lse[i], logits.logsumexp(1))
        ctx.save_for_backward(z, lse)
        ctx.temperature, ctx.side = temperature, side
        positive = (z * z.roll(len(z) // 2, 0)).sum(1) / temperature
        return (lse - positive).mean()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        z, lse = ctx.saved_tensors
        gradient = -2 * z.roll(len(z) // 2, 0)
        for i, j, logits in _logit_tiles(z, ctx.temperature, ctx.side):
            probability = logits.sub_(lse[i, None]).exp_()
            gradient[i] += probability @ z[j]
            gradient[j] += probability.T @ z[i]
        return gradient * (upstream / (len(z) * ctx.temperature)), None, None


def _logit_tiles(z: Tensor, temperature: float, side: int):
    slices = [slice(k, min(k + side, len(z))) for k in range(0, len(z), side)]
    for i in slices:
        for j in slices:
            logits = z[i] @ z[j].T / temperature
            if i == j:
                logits.fill_diagonal_(-math.inf)
            yield i, j, logits


def tiles(z1: Tensor, z2: Tensor, temperature: float, side: int = 1024) -> Tensor:
    """Square tiles, recomputed in the backward, as Inf-CL does (arXiv:2410.17243)."""
    return _Tiles.apply(F.normalize(torch.cat((z1, z2)), dim=1), temperature, side)


def solo_learn(z: Tensor, indexes: Tensor, temperature: float = 0.1) -> Tensor:
    """simclr_loss_func of vturrisi/solo-learn; no maximum is subtracted before exp."""
    z = F.normalize(z, dim=-1)
    similarity = torch.exp(torch.einsum("if,jf->ij", z, z) / temperature)
    same = indexes[:, None] == indexes[None]
    positives = (similarity * same.clone().fill_diagonal_(False)).sum(1)
    negatives = (similarity * ~same).sum(1)
    return -torch.log(positives / (positives + negatives)).mean()


def google_simclr(
    hidden: Tensor, hidden_norm: bool = True, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """add_contrastive_loss of google-research/simclr: loss, logits of view 1 to 2, labels."""
    hidden = F.normalize(hidden, dim=1) if hidden_norm else hidden
    a, b = hidden.chunk(2)
    labels = torch.arange(len(a), device=a.device)
    large = 1e9 * torch.eye(len(a), device=a.device, dtype=a.dtype)
    aa, bb = a @ a.T / temperature - large, b @ b.T / temperature - large
    ab = a @ b.T / temperature
    loss_a = F.cross_entropy(torch.cat((ab, aa), 1), labels)
    loss_b = F.cross_entropy(torch.cat((ab.T, bb), 1), labels)
    return loss_a + loss_b, ab, labels


def nt_xent_peers(n: int, notes: list[str] | None = None) -> dict:
    """name -> loss(z1, z2, temperature) of every peer that is installed and fits n pairs.

    notes: gets a line for each that is left out.
    """
    notes = [] if notes is None else notes
    peers = {
        "textbook eager": textbook,
        "textbook torch.compile": torch.compile(textbook),
        "chunked, checkpoint": chunked,
        "tiles, recomputed (Inf-CL)": tiles,
        "solo-learn formula": lambda z1, z2, t: solo_learn(
            torch.cat((z1, z2)), torch.arange(len(z1), device=z1.device).repeat(2), t
        ),
    }
    try:
        from lightly.loss import NTXentLoss

        peers["lightly"] = lambda z1, z2, t: NTXentLoss(t)(z1, z2)
    except ImportError as error:
        notes.append(f"lightly left out: {error}")
    if n > 64:
        notes.append(
            "pytorch-metric-learning left out above 64 pairs: it takes 2 GB at 256, as N³."
        )
        return peers
    try:
        from pytorch_metric_learning.losses import NTXentLoss as Metric
        from pytorch_metric_learning.losses import SelfSupervisedLoss

        peers["pytorch-metric-learning"] = lambda z1, z2, t: SelfSupervisedLoss(Metric(t))(z1, z2)
    except ImportError as error:
        notes.append(f"pytorch-metric-learning left out: {error}")
    return peers
