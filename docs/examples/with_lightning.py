"""SimCLR as a module of PyTorch Lightning.

python docs/examples/with_lightning.py photos/
"""

import sys

import lightning
import torch
import torch.distributed as dist

from simclr_fast import LARS, TwoViewLoader, nt_xent_loss
from simclr_fast.models import SimCLR, build_encoder, build_projector
from simclr_fast.optim import lars_param_groups, scaled_lr, warmup_cosine


class Pretraining(lightning.LightningModule):
    def __init__(self, data: str, model: str, size: int, batch_size: int):
        super().__init__()
        self.loading, self.batch_size = (data, batch_size, size), batch_size
        encoder, dim = build_encoder(model, image_size=size)
        self.network = SimCLR(encoder, build_projector("nonlinear", dim, 128))

    def train_dataloader(self):
        """Makes the batches of this process itself, and their views on its device."""
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        return TwoViewLoader(*self.loading, rank=rank, world_size=ranks, device=self.device)

    def training_step(self, batch, _):
        view1, view2, _ = batch
        _, z = self.network(torch.cat((view1, view2)))
        group = dist.group.WORLD if self.trainer.world_size > 1 else None
        loss = nt_xent_loss(z, temperature=0.1, group=group)
        self.log("loss", loss, prog_bar=True, batch_size=len(view1))
        return loss

    def configure_optimizers(self):
        groups = lars_param_groups(self.network, weight_decay=1e-6)
        rate = scaled_lr(self.batch_size)
        optimizer = LARS(groups, rate, momentum_order="tf", norm="joint", eps=0.0)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = warmup_cosine(optimizer, total // 10, total)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def main(data: str, out="encoder.pt", model="resnet50", size=224, batch_size=1024, **options):
    """options: of the Trainer. Returns the last loss."""
    module = Pretraining(data, model, size, batch_size)
    options = {"max_epochs": 100, "sync_batchnorm": True, **options}
    trainer = lightning.Trainer(use_distributed_sampler=False, **options)
    trainer.fit(module)
    if trainer.is_global_zero:
        torch.save(module.network.encoder.state_dict(), out)
    return float(trainer.callback_metrics["loss"])


if __name__ == "__main__":
    main(sys.argv[1])
