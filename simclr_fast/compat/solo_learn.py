"""solo-learn: `from simclr_fast.compat.solo_learn import simclr_loss_func`."""

import torch
import torch.distributed as dist
from torch import Tensor

from simclr_fast.losses import nt_xent_loss


def simclr_loss_func(z: Tensor, indexes: Tensor, temperature: float = 0.1) -> Tensor:
    """NT-Xent of two views, z [2N, D] (view 1 first), gathered over ranks when there are several.

    indexes: [2N], the image of each row: N different values, twice in the same order. Gradients
        under DDP are solo-learn's; the value is the whole batch's loss on every rank.
    """
    if indexes.shape != z.shape[:1] or len(indexes) % 2:
        raise ValueError(
            f"indexes must name the image of each row of z {list(z.shape)}, two views after one "
            f"another, got shape {list(indexes.shape)}"
        )
    first, second = indexes.chunk(2)
    ordered = first.sort().values
    two_views = (first == second).all() & (ordered[1:] != ordered[:-1]).all()
    message = "indexes must hold each image once per view, in the same order for both views"
    if indexes.is_cuda:
        torch._assert_async(two_views, message)
    elif not two_views:
        raise ValueError(message)
    several = dist.is_initialized() and dist.get_world_size() > 1
    group = dist.group.WORLD if several else None
    return nt_xent_loss(z, temperature=temperature, group=group)
