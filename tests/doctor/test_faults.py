"""Each planted fault is found, and nothing else is said; correct loops pass without a word."""

import math

import pytest
import torch
from doctor_cases import Steps, both_at_once, small_model, textbook, views
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import simclr_fast
from simclr_fast import LargeBatch, doctor, nt_xent_loss
from simclr_fast.models.encoders import SimCLR, build_encoder, build_projector
from simclr_fast.optim import LARS, lars_param_groups, warmup_cosine


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def found(steps, **options):
    return doctor.check(steps, steps.model, steps.batch, **options)


def only(report, name, *, severity="error", says=""):
    assert report.names == [name], str(report)
    assert report.findings[0].severity == severity
    assert says in report.findings[0].seen, str(report)
    assert report.serious == (severity == "error")


def clean(report):
    assert not report.findings, str(report)


# Correct loops


def interleaved(z):
    """NT-Xent of both views of image 0, both of image 1, ..."""
    u = F.normalize(z, dim=1)
    logits = (u @ u.T / 0.2).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)) ^ 1)


def google(z):
    """google-research/simclr's formula: two losses, a large number on the diagonal, their sum."""
    u1, u2 = F.normalize(z, dim=1).chunk(2)
    n = len(u1)
    large, labels = torch.eye(n) * 1e9, torch.arange(n)
    aa, bb = u1 @ u1.T / 0.2 - large, u2 @ u2.T / 0.2 - large
    ab = u1 @ u2.T / 0.2
    return F.cross_entropy(torch.cat((ab, aa), 1), labels) + F.cross_entropy(
        torch.cat((ab.T, bb), 1), labels
    )


def solo_learn(z):
    """solo-learn's form: exponentials, masks of positives and negatives, a quotient."""
    u, index = F.normalize(z, dim=-1), torch.arange(len(z) // 2).repeat(2)
    sim = torch.exp(torch.einsum("if,jf->ij", u, u) / 0.2)
    positive = (index[:, None] == index) & ~torch.eye(len(z), dtype=torch.bool)
    negative = index[:, None] != index
    pos = (sim * positive).sum(1)
    return -torch.log(pos / (pos + (sim * negative).sum(1))).mean()


def root_of_temperature(z):
    """The temperature's root divides the vectors, so that it acts once."""
    u = F.normalize(z, dim=1) / math.sqrt(0.2)
    logits = (u @ u.T).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


def lightly(z):
    loss = pytest.importorskip("lightly.loss").NTXentLoss(0.2)
    return loss(*z.chunk(2))


def metric_learning(z):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    return losses.SelfSupervisedLoss(losses.NTXentLoss(0.2))(*z.chunk(2))


LOSSES = {
    "textbook": textbook,
    "google": google,
    "solo-learn": solo_learn,
    "lightly": lightly,
    "pytorch-metric-learning": metric_learning,
    "root of temperature": root_of_temperature,
    "ours": lambda z: nt_xent_loss(z, temperature=0.2),
    "our module": lambda z: simclr_fast.NTXentLoss(0.2)(*z.chunk(2)),
    "our sum": lambda z: nt_xent_loss(z, temperature=0.2, reduction="sum"),
    "decoupled": lambda z: nt_xent_loss(z, temperature=0.2, decoupled=True),
    "learnable": lambda z: simclr_fast.NTXentLoss(0.2, learnable=True)(z),
    "scaled by a GradScaler": lambda z: textbook(z) * 65536.0,
    "with a penalty": lambda z: textbook(z) + 0.1 * z.square().mean().detach() + 3,
    "high temperature": lambda z: textbook(z, 2.0),
    "low temperature": lambda z: nt_xent_loss(z, temperature=0.02),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("images", [64, 9])
def test_correct_losses(name, images):
    report = found(Steps(loss=LOSSES[name], batch=views(images)))
    clean(report)
    assert any("temperature of the loss" in fact for fact in report.facts), str(report)


def test_correct_with_two_calls_of_the_model():
    def forward(model, batch):
        return torch.cat([model(view)[1] for view in batch])

    clean(found(Steps(forward=forward)))


def test_correct_with_interleaved_rows():
    def forward(model, batch):
        return model(torch.stack(batch, 1).flatten(0, 1))[1]

    report = found(Steps(forward=forward, loss=interleaved))
    clean(report)
    assert "interleaved views" in str(report)


def test_correct_with_vectors_normalised_by_the_model():
    class Normalises(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_model()

        def forward(self, x):
            h, z = self.inner(x)
            return h, F.normalize(z, dim=1)

    def loss(z):
        logits = (z @ z.T / 0.2).fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))

    clean(found(Steps(model=Normalises(), loss=loss)))


def test_correct_with_a_model_that_returns_the_loss():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_model()

        def forward(self, first, second):
            return {"loss": textbook(self.inner(torch.cat((first, second)))[1])}

    steps = Steps(model=Whole())
    report = doctor.check(lambda model, batch: model(*batch), steps.model, steps.batch)
    clean(report)
    assert "temperature of the loss: 0.2" in report.facts


def test_correct_with_autocast_and_our_loss():
    def forward(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return both_at_once(model, batch)

    clean(found(Steps(forward=forward, loss=lambda z: nt_xent_loss(z, temperature=0.2))))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(
            [{"params": p[0]["params"], "weight_decay": 0.01}, {"params": p[1]["params"]}],
            weight_decay=0.0,
        ),
        lambda p: torch.optim.SGD([q for g in p for q in g["params"]], lr=0.06, momentum=0.9),
    ],
)
def test_correct_with_other_optimizers(make):
    model = small_model()
    clean(found(Steps(model=model, optimizer=make(lars_param_groups(model)))))


@pytest.mark.parametrize("library", ["lightly.utils.lars", "timm.optim.lars"])
def test_correct_with_the_lars_of_other_libraries(library):
    module = pytest.importorskip(library)
    model = small_model()
    weights, rest = lars_param_groups(model)
    groups = [
        {"params": weights["params"], "weight_decay": 1e-6},
        {"params": rest["params"], "weight_decay": 0.0},
    ]
    name = "LARS" if hasattr(module, "LARS") else "Lars"
    optimizer = getattr(module, name)(groups, lr=0.4, momentum=0.9)
    warmup_cosine(optimizer, 10, 100)
    clean(found(Steps(model=model, optimizer=optimizer)))


@pytest.mark.parametrize("memory", ["plain", "replay", "lockstep", "grad-cache"])
def test_correct_with_large_batch(memory):
    model = small_model(nn.GroupNorm if memory == "grad-cache" else nn.BatchNorm2d)
    if memory == "replay":
        encoder, width = build_encoder("resnet10", width=0.125, image_size=16)
        model = SimCLR(encoder, build_projector("nonlinear", width, 16))
    large = LargeBatch(model, memory=memory, micro_batch=32)
    steps = Steps(model=model)

    def step(model, batch):
        steps.optimizer.zero_grad()
        large.backward(batch, lambda outputs: nt_xent_loss(outputs[1], temperature=0.2))
        steps.optimizer.step()

    report = doctor.check(step, model, steps.batch)
    clean(report)
    assert "temperature of the loss: 0.2" in report.facts
    assert not report.unchecked, str(report)


@pytest.mark.parametrize("memory", ["lockstep", "grad-cache"])
@pytest.mark.parametrize("fault", ["identical-views", "different-images", "no-colour-distortion"])
def test_views_are_seen_in_modes_that_run_the_model_in_parts(memory, fault):
    """The loss gets new tensors there, and lockstep calls no module."""
    model = small_model(nn.GroupNorm if memory == "grad-cache" else nn.BatchNorm2d)
    large = LargeBatch(model, memory=memory, micro_batch=32)
    first, second = views()
    batch = {
        "identical-views": (first, first),
        "different-images": (first, second.roll(7, 0)),
        "no-colour-distortion": views(p_jitter=0, p_gray=0),
    }[fault]
    steps = Steps(model=model, batch=batch)
    with doctor.watch(model) as report:
        for _ in range(2):
            steps.optimizer.zero_grad()
            large.backward(batch, lambda outputs: nt_xent_loss(outputs[1], temperature=0.2))
            steps.optimizer.step()
    assert report.names == [fault], str(report)


def test_correct_with_a_probe_on_detached_features():
    class WithProbe(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.probe = small_model(), nn.Linear(32, 10)

    def forward(model, batch):
        h, z = model.inner(torch.cat(batch))
        return z, model.probe(h.detach())

    def loss(outputs):
        z, scores = outputs
        return textbook(z) + F.cross_entropy(scores, torch.arange(len(z)) % 10)

    clean(found(Steps(model=WithProbe(), forward=forward, loss=loss)))


class Inside(nn.Module):
    """A network behind a layer that draws views of its own, or only normalises."""

    def __init__(self, change, own_parameter=False):
        super().__init__()
        self.inner, self.change = small_model(), change
        if own_parameter:
            self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        h, z = self.inner(self.change(x))
        return h, z * self.scale if hasattr(self, "scale") else z


@pytest.mark.parametrize("own_parameter", [False, True])
def test_correct_with_views_made_inside_of_the_model(own_parameter):
    first, second = views()
    made = iter([first, second] * 2)
    model = Inside(lambda x: next(made), own_parameter)
    raw = torch.rand(64, 3, 16, 16)

    def forward(model, batch):
        return torch.cat([model(raw)[1], model(raw)[1]])

    report = found(Steps(model=model, batch=None, forward=forward))
    clean(report)
    assert not report.unchecked, str(report)


@pytest.mark.parametrize("own_parameter", [False, True])
@pytest.mark.parametrize("calls", [1, 2])
def test_correct_with_a_model_that_normalises(own_parameter, calls):
    model = Inside(lambda x: 2 * x - 1, own_parameter)

    def forward(model, batch):
        return torch.cat([model(part)[1] for part in torch.cat(batch).chunk(calls)])

    report = found(Steps(model=model, forward=forward))
    clean(report)
    assert not report.unchecked, str(report)


@pytest.mark.parametrize("how", ["no_grad", "detached", "before"])
def test_correct_with_a_third_view_for_other_ends(how):
    def forward(model, batch):
        if how == "before":
            with torch.no_grad():
                model(views(64, 3)[0])
        z = model(torch.cat(batch))[1]
        if how != "before":
            with torch.set_grad_enabled(how == "detached"):
                model(views(64, 3)[0])[0].detach()
        return z

    clean(found(Steps(forward=forward)))


def test_correct_with_two_optimizers():
    class WithProbe(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.probe = small_model(), nn.Linear(32, 10)

    steps = Steps(model=WithProbe())
    steps.optimizer = torch.optim.SGD(steps.model.inner.parameters(), lr=0.1)
    other = torch.optim.SGD(steps.model.probe.parameters(), lr=0.1)

    def step(model, batch):
        steps.optimizer.zero_grad()
        other.zero_grad()
        h, z = model.inner(torch.cat(batch))
        textbook(z).backward()
        steps.optimizer.step()
        F.cross_entropy(model.probe(h.detach()), torch.arange(len(z)) % 10).backward()
        other.step()

    clean(doctor.check(step, steps.model, steps.batch))


def test_correct_with_an_optimizer_that_repeats_a_step():
    model = small_model()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=3)
    with doctor.watch(model) as report:
        for seed in range(2):

            def closure(seed=seed):
                optimizer.zero_grad()
                loss = textbook(both_at_once(model, views(64, seed)))
                loss.backward()
                return loss

            optimizer.step(closure)
    clean(report)


def test_correct_with_a_step_of_the_optimizer_inside_the_backward_pass():
    model = small_model()
    own = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def update(p):
        own[p].step()
        own[p].zero_grad()

    for p in own:
        p.register_post_accumulate_grad_hook(update)
    with doctor.watch(model) as report:
        for seed in range(3):
            textbook(both_at_once(model, views(64, seed))).backward()
    clean(report)


@pytest.mark.parametrize("what", ["model", "loss"])
@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_correct_with_a_compiled_part(what):
    torch.compiler.reset()
    steps = Steps()
    if what == "model":
        compiled = torch.compile(steps.model, backend="aot_eager")
        steps.forward = lambda model, batch: both_at_once(compiled, batch)
    else:
        steps.loss = torch.compile(textbook, backend="aot_eager")
    steps(steps.model, steps.batch)
    report = found(steps)
    clean(report)
    assert not report.unchecked, str(report)


def simsiam(z):
    first, second = F.normalize(z, dim=1).chunk(2)
    return -((first * second.detach()).sum(1) + (second * first.detach()).sum(1)).mean()


def barlow_twins(z):
    first, second = ((part - part.mean(0)) / part.std(0) for part in z.chunk(2))
    return (first.T @ second / len(first) - torch.eye(z.size(1))).square().sum()


OTHER_LOSSES = {
    "three views": lambda z: simclr_fast.multi_view_nt_xent_loss(z[:126], 3, 0.2),
    "four views": lambda z: simclr_fast.multi_view_nt_xent_loss(z, 4, 0.2),
    "labels": lambda z: simclr_fast.sup_con_loss(z, torch.arange(len(z)) % 10, 0.2),
    "SimSiam": simsiam,
    "Barlow Twins": barlow_twins,
}


@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_no_word_about_other_losses(name):
    report = found(Steps(loss=OTHER_LOSSES[name]))
    clean(report)
    assert "not that of NT-Xent" in str(report)


def test_correct_over_many_steps():
    steps = Steps(optimizer=None)
    model = steps.model
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    with doctor.watch(model, patience=60) as report:
        for i in range(80):
            optimizer.zero_grad()
            textbook(both_at_once(model, views(64, i % 4))).backward()
            optimizer.step()
            if i % 20 == 0:
                model.eval()
                with torch.no_grad():
                    both_at_once(model, views(64, 5))
                model.train()
    clean(report)


# Planted faults: the views


def test_identical_views():
    first, _ = views()
    only(found(Steps(batch=(first, first.clone()))), "identical-views", says="64 of 64 images")


def test_views_of_different_images():
    first, second = views(128)
    only(found(Steps(batch=(first, second.roll(1, 0)))), "different-images", says="standard errors")


@pytest.mark.parametrize("images", [8, 64])
def test_wrong_order_of_a_known_batch(images):
    def forward(model, batch):
        return model(torch.stack(batch, 1).flatten(0, 1))[1]

    report = found(Steps(forward=forward, batch=views(images)))
    only(report, "wrong-order", says="takes the rows as concatenated views")
    report = found(Steps(loss=interleaved, batch=views(images)))
    only(report, "wrong-order", says="takes the rows as interleaved views")


def test_wrong_order_seen_from_the_pixels():
    steps = Steps(forward=lambda model, x: model(x)[1])
    with doctor.watch(steps.model) as report:
        steps(steps.model, torch.stack(views(), 1).flatten(0, 1))
    only(report, "wrong-order", says="those of the other order by")


def test_no_colour_distortion():
    report = found(Steps(batch=views(p_jitter=0, p_gray=0)))
    only(report, "no-colour-distortion", severity="warning", says="correlate by 0.9")


# The loss


def changed(own=0, positive=1, normalise=True, temperature=0.2):
    def loss(z):
        u = F.normalize(z, dim=1) if normalise else z
        s, partner = u @ u.T / temperature, torch.arange(len(z)).roll(len(z) // 2)
        rows = torch.arange(len(z))
        pos, total = s[rows, partner], s.exp()
        if not own:
            total = total.masked_fill(torch.eye(len(z), dtype=torch.bool), 0)
        return ((total.sum(1) + (positive - 1) * pos.exp()).log() - pos).mean()

    return loss


@pytest.mark.parametrize("images", [8, 64])
def test_self_similarity(images):
    only(found(Steps(loss=changed(own=1), batch=views(images))), "self-similarity")


@pytest.mark.parametrize("images", [8, 64])
def test_positive_counted_twice(images):
    only(found(Steps(loss=changed(positive=2), batch=views(images))), "positive-twice")


def test_not_normalised():
    report = found(Steps(loss=changed(normalise=False, temperature=1.0)))
    only(report, "not-normalised", says="lengths from")


@pytest.mark.parametrize("form", ["logits", "vectors", "declared"])
def test_temperature_applied_twice(form):
    def logits(z):
        u = F.normalize(z, dim=1)
        s = ((u @ u.T / 0.3) / 0.3).fill_diagonal_(-torch.inf)
        return F.cross_entropy(s, torch.arange(len(z)).roll(len(z) // 2))

    def vectors(z):
        u = F.normalize(z, dim=1) / 0.3
        s = (u @ F.normalize(z, dim=1).T / 0.3).fill_diagonal_(-torch.inf)
        return F.cross_entropy(s, torch.arange(len(z)).roll(len(z) // 2))

    losses = {"logits": logits, "vectors": vectors, "declared": LOSSES["ours"]}
    declared = math.sqrt(0.2) if form == "declared" else None
    report = found(Steps(loss=losses[form]), temperature=declared)
    only(report, "temperature-twice", says="squared")


def test_another_temperature_than_expected():
    only(found(Steps(), temperature=0.5), "temperature", says="0.2; 0.5 was expected")
    clean(found(Steps(), temperature=0.2))


@pytest.mark.parametrize("how", ["detach", "no_grad"])
def test_detached_view(how):
    def forward(model, batch):
        first = model(batch[0])[1]
        if how == "detach":
            return torch.cat((first, model(batch[1])[1].detach()))
        with torch.no_grad():
            second = model(batch[1])[1]
        return torch.cat((first, second))

    report = found(Steps(forward=forward))
    only(report, "detached-gradient", says="64 of 128 rows")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_in_half_precision(dtype):
    def loss(z):
        with torch.autocast("cpu", dtype):
            u = F.normalize(z, dim=1)
            s = (u @ u.T / 0.2).fill_diagonal_(-torch.inf)
            return F.cross_entropy(s, torch.arange(len(z)).roll(len(z) // 2))

    only(found(Steps(loss=loss)), "half-precision-loss", severity="warning", says=str(dtype)[6:])


# Parts of a batch


def test_accumulated_gradients():
    steps = Steps()

    def step(model, batch):
        steps.optimizer.zero_grad()
        for first, second in zip(batch[0].split(16), batch[1].split(16), strict=True):
            (textbook(both_at_once(model, (first, second))) / 4).backward()
        steps.optimizer.step()

    report = doctor.check(step, steps.model, steps.batch)
    only(report, "negatives-per-micro-batch", severity="warning", says="32 of 128 rows")


def test_ghost_batch_norm():
    def forward(model, batch):
        return torch.cat([model(part)[1] for part in torch.cat(batch).split(32)])

    report = found(Steps(forward=forward))
    only(report, "ghost-batch-norm", severity="warning", says="128 rows in 4 parts of 32 rows")


def test_ghost_batch_norm_of_pairs():
    """Two calls that do not hold a view each."""

    def forward(model, batch):
        x = torch.stack(batch, 1).flatten(0, 1)
        z = torch.cat([model(part)[1] for part in x.chunk(2)])
        return z.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)

    def loss(z):
        return interleaved(z.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1))

    report = found(Steps(forward=forward, loss=loss))
    only(report, "ghost-batch-norm", severity="warning", says="in 2 parts of 64 rows")


def test_grad_cache_with_ghost_batch_norm():
    steps = Steps()
    large = LargeBatch(steps.model, memory="grad-cache", micro_batch=32, allow_ghost_bn=True)

    def step(model, batch):
        steps.optimizer.zero_grad()
        large.backward(batch, lambda outputs: nt_xent_loss(outputs[1], temperature=0.2))
        steps.optimizer.step()

    report = doctor.check(step, steps.model, steps.batch)
    only(report, "ghost-batch-norm", severity="warning")


@pytest.mark.parametrize("reentrant", [False, True])
def test_running_statistics_updated_twice(reentrant):
    def forward(model, batch):
        x = torch.cat(batch).requires_grad_(reentrant)
        h = checkpoint(model.encoder, x, use_reentrant=reentrant)
        return model.projector(h)

    report = found(Steps(forward=forward))
    only(report, "double-update", severity="warning", says="2 batch norms")


# Modes, parameters and gradients


def test_encoder_in_eval_mode():
    steps = Steps()
    steps.model.encoder.eval()
    only(found(steps), "eval-mode", says="2 of 3 batch norms")


@pytest.mark.parametrize("separate", [False, True])
def test_probe_trains_the_encoder(separate):
    class WithProbe(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.probe = small_model(), nn.Linear(32, 10)

    steps = Steps(model=WithProbe())

    def step(model, batch):
        steps.optimizer.zero_grad()
        h, z = model.inner(torch.cat(batch))
        measured = F.cross_entropy(model.probe(h), torch.arange(len(z)) % 10)
        if separate:
            textbook(z).backward(retain_graph=True)
            measured.backward()
        else:
            (textbook(z) + measured).backward()
        steps.optimizer.step()

    report = doctor.check(step, steps.model, steps.batch)
    only(report, "probe-trains-encoder", says="'probe'")


def test_parameters_without_a_gradient():
    model = small_model()
    model.classifier = nn.Linear(32, 10)
    report = found(Steps(model=model))
    only(report, "no-gradient", severity="warning", says="classifier.bias, classifier.weight")


def test_parameters_in_no_optimizer():
    model = small_model()
    optimizer = torch.optim.SGD(model.encoder.parameters(), lr=0.1)
    only(found(Steps(model=model, optimizer=optimizer)), "not-in-optimizer", says="6 parameters")


def test_gradients_not_zeroed():
    only(found(Steps(zero_grad=False)), "gradients-not-zeroed", says="of step 2")


def test_not_finite():
    steps = Steps(loss=lambda z: textbook(z) * torch.inf)
    report = found(steps)
    only(report, "not-finite", says="the loss is inf")


# The optimizer


def test_lars_adapts_biases_and_norms():
    model = small_model()
    optimizer = LARS(model.parameters(), lr=0.4)
    warmup_cosine(optimizer, 10, 100)
    report = found(Steps(model=model, optimizer=optimizer))
    only(report, "lars-adapts-norms", severity="warning")


@pytest.mark.parametrize("kind", ["lars", "sgd"])
def test_decay_of_biases_and_norms(kind):
    model = small_model()
    if kind == "lars":
        weights, rest = lars_param_groups(model)
        optimizer = LARS([weights, rest | {"weight_decay": 1e-6}], lr=0.4)
        warmup_cosine(optimizer, 10, 100)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)
    report = found(Steps(model=model, optimizer=optimizer))
    only(report, "decay-of-norms", severity="warning")


def test_no_warm_up():
    model = small_model()
    optimizer = LARS(lars_param_groups(model), lr=0.4)
    report = found(Steps(model=model, optimizer=optimizer))
    only(report, "no-warm-up", severity="warning", says="learning rate 0.4")


def test_learning_rate_not_scaled():
    model = small_model()
    optimizer = LARS(lars_param_groups(model), lr=0.02)
    warmup_cosine(optimizer, 10, 100)
    report = found(Steps(model=model, optimizer=optimizer, batch=views(256)))
    only(report, "learning-rate", severity="warning", says="is 0.02; for 256 images")


# What comes out


def test_collapse():
    steps = Steps()
    nn.init.zeros_(steps.model.projector[3].weight)
    only(found(steps), "collapse", says="all rows of z")


def test_collapse_of_a_trained_encoder():
    steps = Steps()
    for module in steps.model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.num_batches_tracked.fill_(1000)
    with torch.no_grad():
        steps.model.projector[3].weight.mul_(0.01)
    assert "collapse" in found(steps).names


def test_loss_at_its_chance_level():
    steps = Steps(batch=views(16))
    optimizer = torch.optim.SGD(steps.model.parameters(), lr=0.0)
    steps.optimizer = optimizer
    with doctor.watch(steps.model, patience=40) as report:
        for _ in range(40):
            steps(steps.model, steps.batch)
    only(report, "at-chance", says="after 40 steps")


def test_chance_level_is_no_finding_while_the_learning_rate_rises():
    steps = Steps(batch=views(16))
    optimizer = torch.optim.SGD(steps.model.parameters(), lr=1e-6)
    scheduler = warmup_cosine(optimizer, 50, 100)
    steps.optimizer = optimizer
    with doctor.watch(steps.model, patience=40) as report:
        for _ in range(40):
            steps(steps.model, steps.batch)
            scheduler.step()
    clean(report)
