"""SimCLR with parameters, gradients and momentum sharded over the GPUs: FSDP2 (fully_shard).

torchrun --nproc-per-node 8 docs/examples/fsdp2.py photos/
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

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
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    mesh = init_device_mesh(device.type, (ranks,))
    for stage in [encoder.get_submodule(f"layer{i}") for i in (1, 2, 3, 4)] + [network]:
        fully_shard(stage, mesh=mesh)
    # LARS sees the shards and takes the norms of the whole parameters.
    groups = lars_param_groups(network, weight_decay=1e-6)
    optimizer = LARS(groups, scaled_lr(batch_size), momentum_order="tf", norm="joint", eps=0.0)
    total = epochs * len(loader)
    schedule = warmup_cosine(optimizer, total // 10, total)

    for _ in range(epochs):
        for view1, view2, _ in loader:
            _, z = network(torch.cat((view1, view2)))
            loss = nt_xent_loss(z, temperature=0.1, group=dist.group.WORLD)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    whole = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save({key: t for key, t in whole.items() if key.startswith("encoder.")}, out)
    dist.destroy_process_group()
    return loss.item()


if __name__ == "__main__":
    main(sys.argv[1])
