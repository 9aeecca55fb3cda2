"""SimCLR in a plain loop, on one GPU or many: DistributedDataParallel.

torchrun --nproc-per-node 8 docs/examples/ddp.py photos/
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from simclr_fast import LARS, TwoViewLoader, nt_xent_loss
from simclr_fast.models import SimCLR, build_encoder, build_projector
from simclr_fast.optim import lars_param_groups, scaled_lr, warmup_cosine


def main(data: str, out="encoder.pt", model="resnet50", size=224, batch_size=1024, epochs=100):
    """batch_size: over all GPUs. Returns the last loss."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)

    loader = TwoViewLoader(data, batch_size, size, rank=rank, world_size=ranks, device=device)
    encoder, dim = build_encoder(model, image_size=size)
    network: nn.Module = SimCLR(encoder, build_projector("nonlinear", dim, 128)).to(device)
    if cuda:
        # The statistics of the whole batch. Else the network tells views of one GPU from others.
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network = DistributedDataParallel(network)
    groups = lars_param_groups(network, weight_decay=1e-6)
    optimizer = LARS(groups, scaled_lr(batch_size), momentum_order="tf", norm="joint", eps=0.0)
    total = epochs * len(loader)
    schedule = warmup_cosine(optimizer, total // 10, total)

    for epoch in range(epochs):
        for view1, view2, _ in loader:
            _, z = network(torch.cat((view1, view2)))
            # The group makes the batches of all GPUs one batch.
            loss = nt_xent_loss(z, temperature=0.1, group=dist.group.WORLD)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    if rank == 0:
        torch.save(encoder.state_dict(), out)  # for load_weights
    dist.destroy_process_group()
    return loss.item()


if __name__ == "__main__":
    main(sys.argv[1])
