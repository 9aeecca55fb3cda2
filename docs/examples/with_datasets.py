"""SimCLR on a data set of Hugging Face's library `datasets`, then k-NN with its labels.

python docs/examples/with_datasets.py photos/
"""

import sys

import datasets
import torch

from simclr_fast import LARS, TwoViewLoader, nt_xent_loss
from simclr_fast.evaluation.features import features
from simclr_fast.evaluation.knn import votes
from simclr_fast.models import SimCLR, build_encoder, build_projector
from simclr_fast.optim import lars_param_groups


def main(data: str, out="encoder.pt", model="resnet50", size=224, batch_size=256, epochs=100):
    """data: a folder with a folder per class, or the name of a set with a column of images.

    Returns the share of images whose class their 20 nearest neighbours have.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = datasets.load_dataset(data, split="train")
    torch.manual_seed(0)
    # The columns of images and of labels are found by their types.
    loader = TwoViewLoader(dataset, batch_size, size, device=device)
    print(loader.source.account.line())

    encoder, dim = build_encoder(model, image_size=size)
    network = SimCLR(encoder, build_projector("nonlinear", dim, 128)).to(device)
    optimizer = LARS(lars_param_groups(network, weight_decay=1e-6), lr=0.3)
    for epoch in range(epochs):
        for view1, view2, _ in loader:
            _, z = network(torch.cat((view1, view2)))
            loss = nt_xent_loss(z, temperature=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    torch.save(encoder.state_dict(), out)

    h = features(encoder.eval(), loader.source, loader.augmentation, device=device)
    h = torch.nn.functional.normalize(h, dim=1)
    labels = torch.from_numpy(loader.source.labels).to(h.device)
    similar, near = (h @ h.T).fill_diagonal_(-1).topk(min(20, len(h) - 1))
    found = votes(similar, labels[near], int(labels.max()) + 1).argmax(1)
    return (found == labels).float().mean().item()


if __name__ == "__main__":
    print(f"20-NN accuracy {main(sys.argv[1]):.1%}")
