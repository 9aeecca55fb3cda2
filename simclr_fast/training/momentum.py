"""MoCo's part of a run: a momentum encoder, and a queue of its keys as negatives."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from simclr_fast.data.loader import TwoViewLoader
from simclr_fast.large_batch import LargeBatch
from simclr_fast.losses.queue import KeyQueue, queue_loss
from simclr_fast.models.average import WeightAverage
from simclr_fast.models.encoders import SimCLR
from simclr_fast.training.config import PretrainConfig
from simclr_fast.utils.distributed import World


class MomentumKeys:
    """Makes each step's keys, and the loss of the step against the keys of earlier steps.

    Encoder and projector are followed by a moving average of their weights. It makes a key of each
    view, with batch statistics over all ranks, so no rows are exchanged between ranks as in MoCo,
    whose batch norms see the images of one GPU. The positive of a view is the key of the image's
    other view. The keys of both views enter the queue after the backward.

    dim: of z.
    """

    def __init__(
        self, config: PretrainConfig, world: World, model: SimCLR, loader: TwoViewLoader, dim: int
    ) -> None:
        assert config.queue is not None
        self.config, self.group, self.model, self.loader = config, world.group, model, loader
        self.average = WeightAverage(model, config.queue_momentum)
        self.queue = KeyQueue(config.queue, dim)
        self._keys: Tensor | None = None

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What a checkpoint holds."""
        return {"momentum_encoder": self.average, "queue": self.queue}

    @contextmanager
    def around_backward(self, large_batch: LargeBatch, views: Sequence[Tensor]) -> Iterator[None]:
        """Make the keys of a step's views; after its backward, which reads the queue, push them."""
        rows = self.loader.row_counts()
        self.average.update(self.model)
        _, self._keys = large_batch.forward(self.average.module, views, rows)
        yield
        # Image after image, so that the order is the same for any number of ranks.
        keys = self._keys.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
        self.queue.push(keys, self.group, rows)
        self._keys = None

    def loss(self, z: Tensor) -> Tensor:
        """z: [2n, D], view 1's rows first."""
        assert self._keys is not None
        keys = self._keys.roll(len(z) // 2, 0)
        return queue_loss(
            z,
            keys,
            self.queue,
            self.config.temperature,
            group=self.group,
            row_counts=self.loader.row_counts(),
        )
