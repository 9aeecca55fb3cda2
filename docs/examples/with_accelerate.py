"""SimCLR in a loop of one's own with Hugging Face accelerate.

accelerate launch docs/examples/with_accelerate.py photos/
"""

import sys

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed

from simclr_fast import LARS, TwoViewLoader, nt_xent_loss
from simclr_fast.models import SimCLR, build_encoder, build_projector
from simclr_fast.optim import lars_param_groups, scaled_lr, warmup_cosine


def main(data: str, out="encoder.pt", model="resnet50", size=224, batch_size=1024, epochs=100):
    """batch_size: over all GPUs. Returns the last loss."""
    accelerator = Accelerator()
    set_seed(0)
    # The loader gives each process its part of a batch, on its device: it is not prepared.
    rank, ranks, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    loader = TwoViewLoader(data, batch_size, size, rank=rank, world_size=ranks, device=device)

    encoder, dim = build_encoder(model, image_size=size)
    network = SimCLR(encoder, build_projector("nonlinear", dim, 128))
    if device.type == "cuda":
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    groups = lars_param_groups(network, weight_decay=1e-6)
    optimizer = LARS(groups, scaled_lr(batch_size), momentum_order="tf", norm="joint", eps=0.0)
    total = epochs * len(loader)
    schedule = warmup_cosine(optimizer, total // 10, total)
    network, optimizer = accelerator.prepare(network, optimizer)
    group = dist.group.WORLD if ranks > 1 else None

    for epoch in range(epochs):
        for view1, view2, _ in loader:
            _, z = network(torch.cat((view1, view2)))
            loss = nt_xent_loss(z, temperature=0.1, group=group)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    if accelerator.is_main_process:
        torch.save(encoder.state_dict(), out)
    accelerator.end_training()
    return loss.item()


if __name__ == "__main__":
    main(sys.argv[1])
