"""Properties of the public functions, for whatever arguments are allowed."""

import io
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from simclr_fast import multi_view_nt_xent_loss, nt_xent_loss, reference, sup_con_loss
from simclr_fast.augment.params import Augmentation, draw_params
from simclr_fast.augment.views import SimCLRViews
from simclr_fast.data.image_check import in_common_format, try_decoding
from simclr_fast.optim.lars import lars_param_groups
from simclr_fast.optim.schedule import warmup_cosine
from simclr_fast.training.config import PRESETS, from_json, to_json

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("dense", "transposed", "sliced", "reversed")
SEEDS = st.integers(0, 2**32)
TEMPERATURES = st.floats(0.05, 5)


def examples(number):
    """Hypothesis's settings: the same examples in every run."""
    return settings(max_examples=number, derandomize=True, deadline=None, database=None)


def embeddings(rows, dim, seed, dtype, layout):
    """[rows, dim] with the strides that `layout` names."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, dim, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "transposed":
        return z.T.contiguous().T
    if layout == "sliced":
        return torch.cat((z, z), 1)[:, :dim]
    return z.flip(0) if layout == "reversed" else z


def with_gradient(loss, z, upstream):
    """Loss and gradient, in float64."""
    z = z.detach().requires_grad_()
    value = loss(z)
    (gradient,) = torch.autograd.grad(value, z, torch.full_like(value, upstream))
    return value.detach().double(), gradient.double()


def error(found, exact):
    return ((found - exact).norm() / exact.norm().clamp(min=1e-2)).item()


def assert_as_exact_as_plain_torch(ours, plain, z, upstream):
    """At most twice the error of the formula in z's dtype. With one feature the gradient is 0."""
    exact = with_gradient(plain, z.double(), upstream)
    floor = {torch.float64: 1e-12, torch.float32: 1e-5}.get(z.dtype, torch.finfo(z.dtype).eps)
    for found, same_dtype, wanted in zip(
        with_gradient(ours, z, upstream), with_gradient(plain, z, upstream), exact, strict=True
    ):
        assert error(found, wanted) <= 2 * error(same_dtype, wanted) + floor


def reduced(rows, reduction):
    return rows if reduction == "none" else getattr(rows, reduction)()


REDUCTIONS = st.sampled_from(("mean", "sum", "none"))


@examples(60)
@given(
    pairs=st.integers(2, 40),
    dim=st.integers(2, 70),
    seed=SEEDS,
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    temperature=TEMPERATURES,
    reduction=REDUCTIONS,
    decoupled=st.booleans(),
    upstream=st.floats(-3, 3).filter(lambda u: abs(u) > 0.1),
)
def test_nt_xent_is_as_exact_as_plain_torch(
    pairs, dim, seed, dtype, layout, temperature, reduction, decoupled, upstream
):
    z = embeddings(2 * pairs, dim, seed, dtype, layout)

    def ours(z):
        return nt_xent_loss(z, None, temperature, reduction=reduction, decoupled=decoupled)

    def plain(z):
        rows = reference.nt_xent(z, None, temperature, decoupled=decoupled)
        return reduced(rows, reduction)

    loss = ours(z)
    assert loss.shape == ((2 * pairs,) if reduction == "none" else ())
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert_as_exact_as_plain_torch(ours, plain, z, upstream)


@examples(30)
@given(
    pairs=st.integers(2, 40),
    dim=st.integers(2, 70),
    seed=SEEDS,
    temperature=TEMPERATURES,
    scale=st.floats(1e-3, 1e3),
)
def test_nt_xent_does_not_depend_on_order_length_or_swapped_views(
    pairs, dim, seed, temperature, scale
):
    z1, z2 = embeddings(2 * pairs, dim, seed, torch.float64, "dense").chunk(2)
    rows = nt_xent_loss(z1, z2, temperature, reduction="none")
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed))
    moved = nt_xent_loss(scale * z1[order], z2[order], temperature, reduction="none")
    torch.testing.assert_close(moved, rows.view(2, -1)[:, order].flatten(), rtol=1e-9, atol=1e-12)
    swapped = nt_xent_loss(z2, z1, temperature, reduction="none")
    torch.testing.assert_close(swapped, rows.roll(pairs), rtol=1e-9, atol=1e-12)


@examples(40)
@given(
    rows=st.integers(2, 60),
    dim=st.integers(2, 50),
    classes=st.integers(1, 12),
    seed=SEEDS,
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    temperature=TEMPERATURES,
    reduction=REDUCTIONS,
)
def test_sup_con_is_as_exact_as_plain_torch(
    rows, dim, classes, seed, dtype, layout, temperature, reduction
):
    z = embeddings(rows, dim, seed, dtype, layout)
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))

    def ours(z):
        return sup_con_loss(z, labels, temperature, reduction=reduction)

    def plain(z):
        return reduced(reference.sup_con(z, labels, temperature), reduction)

    assert_as_exact_as_plain_torch(ours, plain, z, 1.7)
    renamed = sup_con_loss(z, 1000 - 7 * labels, temperature, reduction=reduction)
    assert torch.equal(renamed, ours(z))


@examples(20)
@given(pairs=st.integers(2, 30), dim=st.integers(2, 40), seed=SEEDS, temperature=TEMPERATURES)
def test_two_views_of_multi_view_are_nt_xent(pairs, dim, seed, temperature):
    z = embeddings(2 * pairs, dim, seed, torch.float64, "dense")
    torch.testing.assert_close(
        multi_view_nt_xent_loss(z, 2, temperature),
        nt_xent_loss(z, None, temperature),
        rtol=1e-10,
        atol=1e-12,
    )


AUGMENTATIONS = st.builds(
    Augmentation,
    size=st.integers(1, 40),
    spec=st.sampled_from(("simclr", "torchvision")),
    s=st.floats(0, 2.5),
    area=st.tuples(st.floats(0.02, 0.5), st.floats(0.5, 1)),
    p_flip=st.floats(0, 1),
    p_gray=st.floats(0, 1),
    p_blur=st.floats(0, 1),
    interpolation=st.sampled_from(("bicubic", "bilinear")),
    crop=st.booleans(),
)
SIDES = st.integers(1, 90)


@examples(40)
@given(
    aug=AUGMENTATIONS,
    sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=4),
    seed=st.integers(-(2**63), 2**64),
    first=st.integers(-(2**62), 2**62),
    epoch=st.integers(0, 2**31 - 1),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    channels_last=st.booleans(),
)
def test_views_depend_only_on_their_key(aug, sizes, seed, first, epoch, dtype, channels_last):
    """A function of (seed, epoch, id, view): alone, in a batch and in any order."""
    rng = np.random.default_rng(abs(first))
    images = [torch.from_numpy(rng.integers(0, 256, (*hw, 3), dtype=np.uint8)) for hw in sizes]
    views = SimCLRViews(seed=seed, dtype=dtype, channels_last=channels_last)
    views.aug = aug
    ids = [first + i for i in range(len(images))]
    both = views(images, ids=ids, epoch=epoch)
    backwards = views(images[::-1], ids=ids[::-1], epoch=epoch)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for view, other in zip(both, backwards, strict=True):
        assert view.shape == (len(images), 3, aug.size, aug.size)
        assert view.dtype == dtype
        assert view.is_contiguous(memory_format=layout)
        assert view.min() >= 0
        assert view.max() <= 1
        assert torch.equal(view, other.flip(0))
    alone = views(images[-1], ids=ids[-1:], epoch=epoch)
    assert torch.equal(alone[1], both[1][-1])


@examples(60)
@given(
    aug=AUGMENTATIONS,
    sizes=st.lists(st.tuples(*[st.integers(1, 5000)] * 2), min_size=1, max_size=8),
    seed=SEEDS,
    view=st.sampled_from((0, 1)),
)
def test_boxes_lie_inside_their_images(aug, sizes, seed, view):
    sizes = np.array(sizes)
    params = draw_params(aug, seed, 0, np.arange(len(sizes)), view, sizes)
    corner, extent = params.box[:, :2], params.box[:, 2:]
    assert (corner >= 0).all()
    assert (extent >= 1).all()
    assert (corner + extent <= sizes).all()
    assert (np.sort(params.order, axis=1) == np.arange(4)).all()


LAYERS = {
    "linear": lambda: nn.Linear(3, 3),
    "bare": lambda: nn.Linear(3, 3, bias=False),
    "convolution": lambda: nn.Conv2d(2, 2, 3),
    "batch norm": lambda: nn.BatchNorm2d(4),
    "layer norm": lambda: nn.LayerNorm((4, 5)),
    "frozen": lambda: nn.Linear(3, 3).requires_grad_(False),
}


@examples(30)
@given(kinds=st.lists(st.sampled_from(sorted(LAYERS)), max_size=8), decay=st.floats(0, 1))
def test_lars_param_groups_are_a_partition(kinds, decay):
    model = nn.Sequential(*(LAYERS[kind]() for kind in kinds))
    weights, rest = lars_param_groups(model, decay)
    wanted = [p for p in model.parameters() if p.requires_grad]
    grouped = [*weights["params"], *rest["params"]]
    assert len(grouped) == len(wanted)
    assert {id(p) for p in grouped} == {id(p) for p in wanted}
    assert all(p.ndim > 1 for p in weights["params"])
    matrices = sum(kind in ("linear", "bare", "convolution") for kind in kinds)
    assert len(weights["params"]) == matrices
    assert (weights["weight_decay"], rest["weight_decay"], rest["adapt"]) == (decay, 0, False)


@examples(30)
@given(total=st.integers(1, 60), data=st.data())
def test_warmup_cosine_rises_then_falls_to_nothing(total, data):
    warmup = data.draw(st.integers(0, total - 1))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3.0)
    schedule = warmup_cosine(optimizer, warmup, total)
    rates = []
    for _ in range(total + 2):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[warmup] == 3
    assert all(a < b for a, b in pairwise(rates[: warmup + 1]))
    assert all(a >= b for a, b in pairwise(rates[warmup:]))
    assert rates[total] == rates[total + 1] == 0


KINDS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")


def encoded(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (37, 23), (10, 200, 90)).save(buffer, kind)
    return buffer.getvalue()


WHOLE = {kind: encoded(kind) for kind in KINDS}


@examples(300)
@given(
    kind=st.sampled_from(sorted(WHOLE)),
    edits=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=6),
    keep=st.floats(0, 1),
    tail=st.binary(max_size=20),
)
def test_any_bytes_are_an_image_or_a_value_error(kind, edits, keep, tail):
    data = bytearray(WHOLE[kind])
    for position, value in edits:
        data[position % len(data)] = value
    data = bytes(data[: round(keep * len(data))]) + tail
    array = np.frombuffer(data, np.uint8)
    try:
        common, (height, width) = in_common_format(array)
        try_decoding(common)
    except ValueError:
        return
    assert height > 0
    assert width > 0


@examples(200)
@given(
    data=st.binary(max_size=200),
    start=st.sampled_from([b"", b"\xff\xd8\xff", b"BM", b"RIFF", b"II*\0", b"GIF8", b"P6\n"]),
)
def test_random_bytes_are_refused(data, start):
    with pytest.raises(ValueError, match=" "):
        in_common_format(np.frombuffer(start + data, np.uint8))


FIELDS = {
    "batch_size": st.integers(-2, 10),
    "epochs": st.integers(-2, 10),
    "steps": st.none() | st.integers(-2, 10),
    "temperature": st.floats(-1, 2),
    "lr": st.none() | st.floats(-1, 2),
    "log_every": st.integers(-2, 10),
    "micro_batch": st.none() | st.integers(-2, 10),
    "timeout": st.floats(-1, 2),
    "warmup_epochs": st.floats(-1, 2),
}
MAY_BE_ZERO = ("warmup_epochs",)


@examples(100)
@given(
    preset=st.sampled_from(sorted(PRESETS)),
    aug=AUGMENTATIONS,
    name=st.sampled_from(sorted(FIELDS)),
    data=st.data(),
)
def test_configurations_are_refused_by_name_or_survive_json(preset, aug, name, data):
    value = data.draw(FIELDS[name])
    allowed = value is None or value > 0 or (value == 0 and name in MAY_BE_ZERO)
    if not allowed:
        with pytest.raises(ValueError, match=name):
            replace(PRESETS[preset](), **{name: value})
        return
    # micro_batch is not for plain.
    config = replace(PRESETS[preset](), memory="lockstep", augmentation=aug, **{name: value})
    assert from_json(to_json(config)) == config


@examples(15)
@given(
    batch=st.integers(1, 9999),
    temperature=st.floats(0.01, 9),
    size=st.integers(1, 500),
    model=st.sampled_from(("resnet18", "resnet50")),
)
def test_options_of_the_command_line_reach_the_configuration(batch, temperature, size, model):
    pytest.importorskip("tyro")
    from simclr_fast.commands.pretrain import Pretrain
    from simclr_fast.commands.run_options import parse_run

    options = ["--preset", "cifar10", "--batch-size", batch, "--temperature", temperature]
    options += ["--augmentation.size", size, "--model", model]
    config = parse_run(Pretrain, [str(option) for option in options], "pretrain").config
    wanted = replace(
        PRESETS["cifar10"](),
        batch_size=batch,
        temperature=temperature,
        model=model,
        augmentation=replace(PRESETS["cifar10"]().augmentation, size=size),
    )
    assert config == wanted
