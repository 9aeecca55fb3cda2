"""The presets' numbers, and a peer's training loop beside ours: same weights, views and steps."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import TINY
from torch import nn

from simclr_fast.data.loader import MultiViewLoader
from simclr_fast.data.sources import ArraySource
from simclr_fast.models.fused_norms import fused_norms
from simclr_fast.models.weights import load_weights
from simclr_fast.optim.schedule import warmup_cosine
from simclr_fast.training import pretrain as module
from simclr_fast.training.config import PRESETS, PretrainConfig
from simclr_fast.training.pretrain import pretrain
from simclr_fast.training.setup import build_model, build_optimizer, loader_options, workload
from simclr_fast.utils.distributed import join_world

STEPS = 6
# Labels of three classes; two images have none.
LABELS = np.where(np.arange(24) % 12 == 5, -1, np.arange(24) % 3)


@pytest.fixture
def config(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 255, (24, 16, 16, 3), dtype=np.uint8)
    monkeypatch.setattr(module, "open_data", lambda config: ArraySource(images, LABELS))
    # A higher learning rate makes rounding grow by a hundred within a few steps.
    return replace(TINY, data="noise", out=tmp_path / "run", steps=STEPS, memory="plain", lr=0.02)


def textbook_nt_xent(z, temperature, decoupled=False):
    z = nn.functional.normalize(z)
    n = len(z) // 2
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    positive = (torch.arange(2 * n) + n) % (2 * n)
    chosen = logits[torch.arange(2 * n), positive]
    if decoupled:
        logits = logits.scatter(1, positive[:, None], -torch.inf)
    return (logits.logsumexp(1) - chosen).mean()


def textbook_sup_con(z, labels, temperature):
    z = nn.functional.normalize(z)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    logs = logits.log_softmax(1)
    same = (labels[:, None] == labels[None]) & ~torch.eye(len(z), dtype=torch.bool)
    per_row = -(torch.where(same, logs, 0).sum(1) / same.sum(1).clamp_min(1))
    return per_row.mean()


def textbook_moco(z, keys, queue, temperature):
    """The positive of a view is the key of the image's other view."""
    z = nn.functional.normalize(z)
    keys = nn.functional.normalize(torch.cat(keys.chunk(2)[::-1]))
    logits = torch.cat([(z * keys).sum(1, keepdim=True), z @ queue.T], 1) / temperature
    return nn.functional.cross_entropy(logits, torch.zeros(len(z), dtype=torch.long))


class PeerLARS:
    """LARS as solo-learn writes it, one tensor at a time."""

    def __init__(self, model, eta, weight_decay, clip):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.buffers = [torch.zeros_like(p) for p in self.parameters]
        self.eta, self.weight_decay, self.clip = eta, weight_decay, clip

    @torch.no_grad()
    def step(self, lr):
        for p, buffer in zip(self.parameters, self.buffers, strict=True):
            step = p.grad
            if p.ndim > 1:
                norms = p.norm(), p.grad.norm()
                if min(norms) > 0:
                    ratio = self.eta * norms[0]
                    ratio /= norms[1] + self.weight_decay * norms[0] + 1e-8
                    if self.clip:
                        # With tensors, a learning rate of 0 gives infinity and so a ratio of 1.
                        ratio = min(ratio / torch.tensor(lr), torch.tensor(1.0))
                    step = ratio * (step + self.weight_decay * p)
            buffer.mul_(0.9).add_(step)
            p -= lr * buffer


def peer_run(config):
    """The encoder's weights and the losses of a plain loop with the textbook loss, but batch norms
    as in ours: torch's round otherwise."""
    with join_world("cpu", 60) as world:
        torch.manual_seed(config.seed)
        source = module.open_data(config)
        options = loader_options(config, world)
        small = {"small_crops": config.small_crops, "small": config.small_augmentation}
        options |= small if config.small_crops else {}
        loader = MultiViewLoader(source, config.batch_size, n_views=config.views, **options)
        model = build_model(config).to(memory_format=torch.channels_last).train()
        momentum = copy.deepcopy(model)
        queue = nn.functional.normalize(torch.randn(config.queue or 1, config.projector_dim))
        optimizer = PeerLARS(
            model, config.trust_coefficient, config.weight_decay, config.trust_clip
        )
        warmup, losses, step = config.warmup_epochs * len(loader), [], 0
        while step < STEPS:
            for *views, index in loader:
                by_size = views[: config.views], views[config.views :]
                with fused_norms(model):
                    z = torch.cat([model(torch.cat(same))[1] for same in by_size if same])
                if config.queue:
                    with torch.no_grad():
                        for p, follower in zip(
                            model.parameters(), momentum.parameters(), strict=True
                        ):
                            follower.mul_(config.queue_momentum)
                            follower.add_((1 - config.queue_momentum) * p)
                        keys = momentum(torch.cat(views))[1]
                labels = torch.from_numpy(LABELS)[index]
                # An image without a label is a class of its own.
                rows = torch.where(labels < 0, 100 + index, labels).repeat(config.all_views)
                images = index.repeat(config.all_views)
                loss = {
                    "nt-xent": lambda z=z, images=images: (
                        textbook_nt_xent(z, config.temperature)
                        if config.all_views == 2
                        else textbook_sup_con(z, images, config.temperature)
                    ),
                    "decoupled": lambda z=z: textbook_nt_xent(z, config.temperature, True),
                    "sup-con": lambda z=z, rows=rows: textbook_sup_con(z, rows, config.temperature),
                }[config.loss]()
                if config.queue:
                    loss = textbook_moco(z, keys, queue, config.temperature)
                    # Image after image.
                    keys = torch.stack(keys.chunk(2), 1).flatten(0, 1)
                    queue = torch.cat([queue, nn.functional.normalize(keys)])[-config.queue :]
                model.zero_grad()
                loss.backward()
                losses.append(loss.item())
                progress = (step - warmup) / (STEPS - warmup)
                factor = step / warmup if step < warmup else (1 + math.cos(math.pi * progress)) / 2
                optimizer.step(config.lr * factor)
                step += 1
                if step == STEPS:
                    break
        return dict(model.encoder.state_dict()), losses


CROPS = {"small_crops": 2, "small_size": 12}


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "nt-xent"},
        {"loss": "decoupled"},
        {"loss": "sup-con"},
        {"views": 3},
        {"loss": "sup-con", "views": 4},
        {"queue": 21, "queue_momentum": 0.9},
        CROPS,
        CROPS | {"memory": "replay"},
    ],
    ids=str,
)
def test_a_peers_loop_trains_the_same_encoder(config, options):
    solo_learn = {
        "trust_coefficient": 0.02,
        "trust_clip": True,
        "lars_variant": "lightly",
        "weight_decay": 1e-2,
        "projector_hidden": 40,
        "projector_batch_norm": False,
        "zero_gamma": True,
        "temperature": 0.2,
    }
    config = replace(config, **{**solo_learn, **options})
    start = dict(build_model(config).encoder.state_dict())
    expected, losses = peer_run(config)
    out = pretrain(config)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-4)
    trained = load_weights(out).encoder.state_dict()
    assert expected.keys() == trained.keys()
    still = 0
    for name, value in expected.items():
        moved = (value.double() - start[name].double()).abs().max()
        still += bool(moved == 0)
        difference = (trained[name].double() - value.double()).abs().max()
        assert difference <= 1e-3 * moved + 1e-9, name
    # With gamma 0, the first gradients within a block are too small for some weights.
    assert still <= 0.1 * len(expected)


def test_sup_con_needs_labels(config, monkeypatch):
    images = np.zeros((24, 16, 16, 3), np.uint8)
    for labels in (None, np.full(24, -1)):
        monkeypatch.setattr(module, "open_data", lambda _, given=labels: ArraySource(images, given))
        with pytest.raises(ValueError, match="sup-con needs labels"):
            pretrain(replace(config, loss="sup-con"))


def test_options_reach_the_optimizer():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    made = build_optimizer(
        model, replace(TINY, trust_coefficient=0.02, trust_clip=True, lars_variant="lightly")
    )
    for name, value in {
        "trust_coefficient": 0.02,
        "trust_clip": True,
        "momentum_order": "torch",
        "norm": "split",
        "eps": 1e-8,
    }.items():
        assert made.param_groups[0][name] == value
    (whole,) = build_optimizer(
        model, replace(TINY, decay_norms=True, weight_decay=0.1)
    ).param_groups
    assert sum(p.numel() for p in whole["params"]) == 28
    assert (whole["weight_decay"], whole["adapt"]) == (0.1, True)
    for name, kind in {
        "sgd": torch.optim.SGD,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }.items():
        made = build_optimizer(model, replace(TINY, optimizer=name, lr=0.01, weight_decay=0.1))
        assert type(made) is kind
        decayed = {
            g["weight_decay"]: sum(p.numel() for p in g["params"]) for g in made.param_groups
        }
        assert decayed == {0.1: 16, 0: 12}
        assert all(group["lr"] == 0.01 for group in made.param_groups)
        with join_world("cpu", 60) as world:
            planned = workload(replace(TINY, optimizer=name, lr=0.01), world.size, world.device, 2)
        assert planned.state == (1 if name == "sgd" else 2)
    with pytest.raises(ValueError, match="lr must be given for optimizer sgd"):
        PretrainConfig(optimizer="sgd")
    with pytest.raises(ValueError, match="views must be at least 2, got 1"):
        PretrainConfig(views=1)
    for options, says in (
        ({"views": 3, "loss": "decoupled"}, "decoupled is for two views, got views=3"),
        ({"small_crops": 1, "loss": "decoupled"}, "two views, got views=2 and small_crops=1"),
        ({"queue": 8, "views": 3}, "queue is for loss nt-xent and two views, .* views=3"),
        ({"queue": 8, "loss": "sup-con"}, "queue is for loss nt-xent .* loss='sup-con'"),
        ({"queue": 0}, "queue must be at least 1, got 0"),
        ({"queue": 8, "memory": "lockstep"}, "queue cannot be used with memory lockstep"),
        ({"small_crops": 2, "memory": "lockstep"}, "small_crops cannot be used with memory lock"),
        ({"small_crops": -1}, "small_crops must be at least 0, got -1"),
        ({"small_crops": 2, "small_area": (0.5, 0.1)}, "area must be .* got"),
        ({"queue_momentum": 1.0}, "queue_momentum must be at least 0 and below 1, got 1.0"),
        ({"ema": -0.5}, "ema must be at least 0 and below 1, got -0.5"),
    ):
        with pytest.raises(ValueError, match=says):
            PretrainConfig(**options)


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adam", "adamw"])
def test_a_first_step_that_overflows_is_skipped(optimizer, monkeypatch):
    """Memory that is not set is NaN in deterministic mode."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        plain = copy.deepcopy(model)
        config = replace(TINY, optimizer=optimizer, lr=0.01)
        made, bare = build_optimizer(model, config), build_optimizer(plain, config)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        for x in (torch.full((4, 3), torch.inf), torch.ones(4, 3), torch.rand(4, 3)):
            made.zero_grad()
            scaler.scale(model(x).sum()).backward()
            scaler.step(made)
            scaler.update()
            if x.isfinite().all():
                bare.zero_grad()
                plain(x).sum().backward()
                bare.step()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    finally:
        torch.use_deterministic_algorithms(False)


def test_zero_gamma_makes_every_block_the_identity_at_first():
    model = build_model(replace(TINY, model="resnet50", zero_gamma=True)).encoder
    assert all(
        (block.bn3.weight == 0).all() for stage in (model.layer1, model.layer4) for block in stage
    )
    with pytest.raises(ValueError, match="zero_gamma is for resnet10"):
        build_model(replace(TINY, model="vgg11", width=1, zero_gamma=True))


@pytest.mark.parametrize(
    ("preset", "images", "warmup", "peak"),
    [
        # google-research/simclr: 0.3 · batch / 256 over 10 epochs; VISSL and mmselfsup: 4.8.
        ("imagenet", 1_281_167, 3_120, 4.8),
        # lightly: 0.075 · √256.
        ("imagenet-256", 1_281_167, 50_040, 1.2),
        # SimCLR v2: 6.4 at 4096, warm-up of 5% of 800 epochs.
        ("simclr-v2", 1_281_167, 12_480, 6.4),
        ("cifar10", 50_000, 1_950, 0.4),
        # simclr-pytorch: 1% of its 48,000 steps.
        ("cifar10-resnet50", 50_000, 480, 4.0),
        ("imagenet100", 126_689, 4_940, 0.3),
    ],
)
def test_learning_rates_are_those_of_the_published_formulas(preset, images, warmup, peak):
    config = PRESETS[preset]()
    per_epoch = images // config.batch_size
    total = config.epochs * per_epoch
    assert round(config.warmup_epochs * per_epoch) == warmup
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    scheduler = warmup_cosine(optimizer, warmup, total)
    for step in (0, 1, warmup // 3, warmup - 1, warmup, total // 2, total - 1):
        ramp = peak * step / warmup
        cosine = peak / 2 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        expected = ramp if step < warmup else cosine
        got = scheduler.base_lrs[0] * scheduler.lr_lambdas[0](step)
        assert got == pytest.approx(expected, abs=1e-12)


def test_every_preset_builds_its_model():
    for preset in PRESETS.values():
        with torch.device("meta"):
            build_optimizer(build_model(preset()), preset())


@pytest.mark.parametrize(("loss", "views"), [("nt-xent", 2), ("decoupled", 2), ("sup-con", 3)])
def test_the_chance_level_is_the_loss_of_equal_embeddings(loss, views):
    assert PretrainConfig(queue=7).chance_loss == pytest.approx(math.log(8))
    assert PretrainConfig(batch_size=6, small_crops=3).chance_loss == pytest.approx(math.log(29))
    z = torch.ones(views * 6, 4, dtype=torch.float64)
    found = {
        "nt-xent": lambda: textbook_nt_xent(z, 0.2),
        "decoupled": lambda: textbook_nt_xent(z, 0.2, True),
        "sup-con": lambda: textbook_sup_con(z, torch.arange(6).repeat(views), 0.2),
    }[loss]()
    config = PretrainConfig(loss=loss, views=views, batch_size=6)
    assert config.chance_loss == pytest.approx(found.item())
