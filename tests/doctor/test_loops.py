"""Loops of other libraries: Lightning's own, and a stand-in with the shape of accelerate's."""

import pytest
import torch
from doctor_cases import small_model, textbook, views
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from simclr_fast import doctor
from simclr_fast.optim import LARS, lars_param_groups, warmup_cosine

pl = pytest.importorskip("pytorch_lightning")


class Lightning(pl.LightningModule):
    """Parts called in training_step, as lightly's examples do; optionally a probe."""

    def __init__(self, fault=None):
        super().__init__()
        model = small_model()
        self.backbone, self.projection_head = model.encoder, model.projector
        self.probe = nn.Linear(32, 10)
        self.fault = fault

    def training_step(self, batch, index):
        first, second = batch
        if self.fault == "identical-views":
            second = first
        h = [self.backbone(view) for view in (first, second)]
        z = [self.projection_head(part) for part in h]
        if self.fault == "detached-gradient":
            z[1] = z[1].detach()
        probed = h[0] if self.fault == "probe-trains-encoder" else h[0].detach()
        scores = self.probe(probed)
        return textbook(torch.cat(z)) + F.cross_entropy(scores, torch.arange(len(scores)) % 10)

    def validation_step(self, batch, index):
        self.backbone(batch[0])

    def configure_optimizers(self):
        weights, rest = lars_param_groups(self)
        if self.fault == "not-in-optimizer":
            weights, rest = lars_param_groups(self.backbone)
        optimizer = LARS([weights, rest], lr=0.4)
        scheduler = warmup_cosine(optimizer, 10, 100)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


FAULTS = [None, "identical-views", "detached-gradient", "probe-trains-encoder", "not-in-optimizer"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.filterwarnings("ignore")
def test_lightning(fault, tmp_path):
    torch.manual_seed(0)
    module = Lightning(fault)
    loader = DataLoader(TensorDataset(*views(128)), batch_size=64)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=1,
    )
    with doctor.watch(module) as report:
        trainer.fit(module, loader, loader)
    assert report.names == ([fault] if fault else []), str(report)
    assert "temperature of the loss: 0.2" in report.facts


@pytest.mark.filterwarnings("ignore")
def test_lightning_in_bfloat16(tmp_path):
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(*views(64)), batch_size=64)
    module = Lightning()
    trainer = pl.Trainer(
        max_steps=2,
        precision="bf16-mixed",
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    with doctor.watch(module) as report:
        trainer.fit(module, loader)
    assert report.names == ["half-precision-loss"], str(report)


class Prepared:
    """What accelerate's `prepare` and `backward` do: the model's forward is replaced by one in
    autocast whose outputs become float32; the optimizer is wrapped and is not stepped while
    gradients are accumulated; the loss is divided by their number. (accelerate is not a
    requirement of these tests, so this stands in for it.)"""

    def __init__(self, model, optimizer, accumulate=1):
        self.optimizer, self.accumulate, self.calls = optimizer, accumulate, 0
        forward = model.forward

        def in_autocast(*args):
            with torch.autocast("cpu", torch.bfloat16):
                return tuple(part.float() for part in forward(*args))

        model.forward = in_autocast

    def backward(self, loss):
        self.calls += 1
        (loss / self.accumulate).backward()

    @property
    def last(self):
        return self.calls % self.accumulate == 0

    def step(self):
        if self.last:
            self.optimizer.step()

    def zero_grad(self):
        if self.last:
            self.optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loop_of_accelerate(accumulate):
    torch.manual_seed(0)
    model = small_model()
    optimizer = LARS(lars_param_groups(model), lr=0.4)
    warmup_cosine(optimizer, 10, 100)
    prepared = Prepared(model, optimizer, accumulate)
    with doctor.watch(model) as report:
        for seed in range(4):
            _, z = model(torch.cat(views(64, seed)))
            prepared.backward(textbook(z))
            prepared.step()
            prepared.zero_grad()
    assert report.names == (["negatives-per-micro-batch"] if accumulate > 1 else []), str(report)
