"""pytorch-metric-learning's NT-Xent for two views.

`from simclr_fast.compat.pytorch_metric_learning import NTXentLoss, SelfSupervisedLoss`
"""

from torch import Tensor, nn

from simclr_fast.losses.nt_xent import nt_xent_loss


class NTXentLoss(nn.Module):
    """NT-Xent of embeddings [2N, D] with labels [2N]. Every label must occur exactly twice."""

    def __init__(self, temperature: float = 0.07):
        super().__init__()
        self.temperature = temperature

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        if labels.shape != embeddings.shape[:1] or len(labels) % 2:
            raise ValueError(
                f"labels must hold one label per row of embeddings {list(embeddings.shape)}, each "
                f"label twice, got shape {list(labels.shape)}"
            )
        values, order = labels.sort(stable=True)
        pairs = values.unflatten(0, (-1, 2))
        if not ((pairs[:, 0] == pairs[:, 1]).all() and (pairs[1:, 0] != pairs[:-1, 0]).all()):
            raise ValueError(
                "labels must hold every label exactly twice, the two views of an image"
            )
        first, second = order.unflatten(0, (-1, 2)).to(embeddings.device).unbind(1)
        return nt_xent_loss(embeddings[first], embeddings[second], self.temperature)


class SelfSupervisedLoss(nn.Module):
    """`SelfSupervisedLoss(NTXentLoss(temperature))(embeddings, ref_emb)`, both [N, D]."""

    def __init__(self, loss: NTXentLoss, symmetric: bool = True):
        super().__init__()
        if not isinstance(loss, NTXentLoss):
            raise TypeError(f"loss must be this module's NTXentLoss, got {type(loss).__name__}")
        if not symmetric:
            raise ValueError(
                "symmetric must be True: NT-Xent is a mean over the rows of both views"
            )
        self.loss = loss

    def forward(self, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
        return nt_xent_loss(embeddings, ref_emb, self.loss.temperature)
