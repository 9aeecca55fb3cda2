"""SimCLR in a loop of one's own with Lightning Fabric.

python docs/examples/with_fabric.py photos/
"""

import sys

import torch
import torch.distributed as dist
from lightning.fabric import Fabric

from simclr_fast import LARS, TwoViewLoader, nt_xent_loss
from simclr_fast.models import SimCLR, build_encoder, build_projector
from simclr_fast.optim import lars_param_groups, scaled_lr, warmup_cosine


def main(data: str, out="encoder.pt", model="resnet50", size=224, batch_size=1024, epochs=100,
         **options):  # fmt: skip
    """options: of Fabric, such as devices and precision. Returns the last loss."""
    fabric = Fabric(**options)
    fabric.launch()
    fabric.seed_everything(0)
    rank, ranks, device = fabric.global_rank, fabric.world_size, fabric.device
    loader = TwoViewLoader(data, batch_size, size, rank=rank, world_size=ranks, device=device)

    encoder, dim = build_encoder(model, image_size=size)
    network = SimCLR(encoder, build_projector("nonlinear", dim, 128))
    if device.type == "cuda":
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    groups = lars_param_groups(network, weight_decay=1e-6)
    optimizer = LARS(groups, scaled_lr(batch_size), momentum_order="tf", norm="joint", eps=0.0)
    total = epochs * len(loader)
    schedule = warmup_cosine(optimizer, total // 10, total)
    network, optimizer = fabric.setup(network, optimizer)
    group = dist.group.WORLD if ranks > 1 else None

    for epoch in range(epochs):
        for view1, view2, _ in loader:
            _, z = network(torch.cat((view1, view2)))
            loss = nt_xent_loss(z, temperature=0.1, group=group)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            schedule.step()
        fabric.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    if fabric.is_global_zero:
        torch.save(encoder.state_dict(), out)
    return loss.item()


if __name__ == "__main__":
    main(sys.argv[1])
