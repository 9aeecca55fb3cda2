"""The DALI graph against apply_views on the CPU; its GPU form against the operators' schemas."""

import io
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from simclr_fast.augment.params import Augmentation, draw_params
from simclr_fast.augment.views import apply_views

dali = pytest.importorskip("nvidia.dali", reason="DALI is optional")
from nvidia.dali import backend, fn, pipeline_def, types  # noqa: E402

from simclr_fast.augment import dali as dali_views  # noqa: E402
from simclr_fast.data import decode, pipelines  # noqa: E402
from simclr_fast.data.datasets import open_source  # noqa: E402
from simclr_fast.data.loader import MultiViewLoader, TwoViewLoader  # noqa: E402
from simclr_fast.data.sources import Source  # noqa: E402

CHINA, FLOWER = (load_sample_image(f"{name}.jpg").copy() for name in ("china", "flower"))
IMAGES = [CHINA, FLOWER, CHINA[:97, :61].copy(), FLOWER[200:208, 300:308].copy()] * 3


class Encoded(Source):
    def __len__(self):
        return len(IMAGES)

    def read(self, i):
        buffer = io.BytesIO()
        Image.fromarray(IMAGES[i]).save(buffer, "PNG", compress_level=0)
        return np.frombuffer(buffer.getvalue(), np.uint8)

    def name(self, i):
        return f"image {i}"


ENCODED = Encoded()
# A graph of two views may have this many operators.
OPERATORS = 250
pytestmark = pytest.mark.filterwarnings("ignore:The external source node")


def run(images, views, aug, **options):
    feeds = [f for p in views for f in dali_views.feeds(p, aug)]

    @pipeline_def(batch_size=len(images), num_threads=2, device_id=None, enable_conditionals=True)
    def pipeline():
        nodes = fn.external_source(
            lambda: [images, *feeds],
            batch=True,
            num_outputs=1 + len(feeds),
            dtype=[types.UINT8, *dali_views.param_types(aug) * len(views)],
            layout=["HWC"] + [""] * len(feeds),
        )
        return tuple(dali_views.make_views(nodes[0], nodes[1:], aug, "cpu", **options))

    pipe = pipeline()
    pipe.build()
    outputs = pipe.run()
    return [
        torch.from_numpy(np.stack([np.array(output[i]) for i in range(len(images))]))
        for output in outputs
    ]


def drawn(aug, view):
    sizes = np.array([i.shape[:2] for i in IMAGES])
    return draw_params(aug, 4, 0, np.arange(len(IMAGES)), view, sizes)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("size", [pytest.param(224, marks=pytest.mark.slow), 48])
@pytest.mark.parametrize(
    ("spec", "brightness", "interpolation"),
    [
        ("simclr", "multiplicative", "bicubic"),
        ("simclr", "additive", "bilinear"),
        ("torchvision", "multiplicative", "bicubic"),
        ("torchvision", "multiplicative", "bilinear"),
    ],
)
def test_both_views_match_the_fused_kernel(size, spec, brightness, interpolation, interleaved):
    aug = Augmentation(size, spec, brightness=brightness, interpolation=interpolation)
    views = [drawn(aug, 0), drawn(aug, 1)]
    outputs = run(IMAGES, views, aug, interleaved=interleaved)
    for out, params in zip(outputs, views, strict=True):
        error = (out - apply_views(IMAGES, params, aug)).abs() * 255
        assert error.max() < 1
        assert error.mean() < 0.05


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("spec", ["simclr", "torchvision"])
def test_every_order_of_the_jitter_matches_the_fused_kernel(spec, interleaved):
    """On a magnified crop, where the bicubic filter overshoots, with strong factors."""
    aug = Augmentation(64, spec, p_blur=0, p_gray=0, p_jitter=1, p_flip=0)
    orders = np.array(list(permutations(range(4))), np.uint8)
    image = CHINA[200:240, 100:140].copy()
    rng = np.random.default_rng(0)
    params = draw_params(aug, 0, 0, np.arange(24), 0, np.array([[40, 40]] * 24))
    params.order = orders
    params.factors[:, :3] = rng.uniform(0.2, 1.8, (24, 3))
    params.factors[:, 3] = rng.uniform(-0.5, 0.5, 24)
    (out,) = run([image] * 24, [params], aug, interleaved=interleaved)
    exact = apply_views([image] * 24, params, aug)
    for order, one, two in zip(orders, out, exact, strict=True):
        error = (one - two).abs() * 255
        assert error.max() < 1, order
        assert error.mean() < 0.05, order


@pytest.mark.parametrize("interleaved", [False, True])
def test_layout_half_precision_and_normalisation_of_the_output(interleaved):
    aug = Augmentation(32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    params = drawn(aug, 0)
    expected = apply_views(IMAGES, params, aug).permute(0, 2, 3, 1)
    options = {"half": True, "channels_last": True, "interleaved": interleaved}
    (out,) = run(IMAGES, [params], aug, **options)
    assert out.dtype == torch.float16
    assert (out - expected).abs().max() < 0.02


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("off", ["crop", "p_flip", "p_jitter", "p_gray", "p_blur"])
def test_views_without_a_step_match_the_fused_kernel(off, interleaved):
    aug = Augmentation(40, **{off: 0 if off != "crop" else False})
    params = drawn(aug, 0)
    (out,) = run(IMAGES, [params], aug, interleaved=interleaved)
    error = (out - apply_views(IMAGES, params, aug)).abs() * 255
    assert error.max() < 1


def crop_loader(aug, **options):
    """The loader that backend="fused" makes on the GPU, with its graph and its op on the CPU."""
    loader = TwoViewLoader(ENCODED, 6, augmentation=aug, shuffle=False, **options)
    loader._pipeline = pipelines.DaliCrops(
        decode.FileReader(ENCODED, 2), 6, loader.augmentations, loader._draw, torch.device("cpu")
    )
    return loader


def all_views(loader):
    return torch.stack([torch.cat([view1, view2]) for view1, view2, _ in loader])


@pytest.mark.parametrize("spec", ["simclr", "torchvision"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crops_equal_the_resize_rounded_to_bytes(spec, interpolation):
    aug = Augmentation(48, spec, interpolation=interpolation, p_jitter=0, p_gray=0, p_blur=0)
    exact = all_views(TwoViewLoader(ENCODED, 6, augmentation=aug, shuffle=False))
    crops = all_views(crop_loader(aug)) * 255
    assert (crops - crops.round()).abs().max() < 1e-3
    assert (crops - exact.clamp(0, 1) * 255).abs().max() < 0.6


@pytest.mark.parametrize(("spec", "most"), [("simclr", 12), ("torchvision", 3)])
def test_rounding_crops_to_bytes_changes_views_little(spec, most):
    """Bytes round the crop and clip the bicubic overshoot. The jitter may amplify the error."""
    aug = Augmentation(96, spec)
    exact = all_views(TwoViewLoader(ENCODED, 6, augmentation=aug, shuffle=False))
    error = (all_views(crop_loader(aug)) - exact).abs() * 255
    assert error.mean() < 0.15
    assert (error > 2).float().mean() < 1e-3
    assert error.max() < most


def test_crops_stay_with_their_images():
    aug = Augmentation(32, "torchvision", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    options = {"channels_last": True, "dtype": torch.float16}
    exact = TwoViewLoader(ENCODED, 6, augmentation=aug, shuffle=False, **options)
    for given, expected in zip(crop_loader(aug, **options), exact, strict=True):
        assert torch.equal(given[2], expected[2])
        for one, two in zip(given[:2], expected[:2], strict=True):
            assert one.dtype == torch.float16
            assert one.is_contiguous(memory_format=torch.channels_last)
            assert (one - two).abs().mean() < 0.01


def test_small_crops_equal_those_of_the_fused_op():
    """Through both of DALI's graphs, on the CPU."""
    aug = Augmentation(48, p_blur=0)
    options = {"augmentation": aug, "n_views": 2, "small_crops": 2, "shuffle": False}
    options["small"] = replace(aug, size=20, area=(0.05, 0.14), min_covered=0)
    exact = MultiViewLoader(ENCODED, 6, **options)
    crops = MultiViewLoader(ENCODED, 6, **options)
    crops._pipeline = pipelines.DaliCrops(
        decode.FileReader(ENCODED, 2), 6, crops.augmentations, crops._draw, torch.device("cpu")
    )
    dali = MultiViewLoader(ENCODED, 6, backend="dali", **options)
    for expected, one, two in zip(exact, crops, dali, strict=True):
        assert [view.shape[-1] for view in expected[:4]] == [48, 48, 20, 20]
        assert not torch.equal(expected[2], expected[3])
        for view, rounded, same in zip(expected[:4], one, two, strict=False):
            assert ((rounded - view).abs() * 255).mean() < 0.3
            assert ((same - view).abs() * 255).mean() < 0.05


def test_all_images_go_to_the_same_decoder(monkeypatch):
    """With a share between 0 and 1, an image's place in its part would choose the decoder."""
    given = []
    image = fn.decoders.image
    monkeypatch.setattr(fn.decoders, "image", lambda *a, **k: (given.append(k), image(*a, **k))[1])
    reader = decode.FileReader(ENCODED, 1)
    for kind in (pipelines.DaliViews, pipelines.DaliCrops):
        kind(
            reader, 2, [Augmentation(64)] * 2, lambda ids, sizes: [], torch.device("cuda:0")
        ).define()
    assert [options["hw_decoder_load"] in (0.0, 1.0) for options in given] == [True, True]


@pytest.mark.parametrize("spec", ["simclr", "torchvision"])
@pytest.mark.parametrize("kind", [pipelines.DaliViews, pipelines.DaliCrops])
@pytest.mark.parametrize("source", [ENCODED, open_source(np.stack(IMAGES[:2]))])
def test_the_gpu_graph_satisfies_the_operator_schemas(kind, spec, source):
    """What can be checked without a driver: every operator exists for its device, and accepts its
    arguments and the devices of its inputs."""
    reader = (decode.FileReader if source.encoded else decode.PixelReader)(source, 1)
    aug, device = Augmentation(224, spec), torch.device("cuda:0")
    pipe = kind(reader, 2, [aug] * 2, lambda ids, sizes: [], device).define()
    pipe._build_graph()
    registered = {
        "cpu": backend.RegisteredCPUOps(),
        "gpu": backend.RegisteredGPUOps(),
        "mixed": backend.RegisteredMixedOps(),
    }
    seen = set()
    for instance in pipe._ops:
        operator, spec_ = instance._op, instance.spec
        schema, device = operator.schema, operator.device
        name = schema.Name()
        seen.add((schema.OperatorName(), device))
        assert name in registered[device], (name, device)
        schema.CheckArgs(spec_)
        for i in range(spec_.NumRegularInput()):
            actual = spec_.InputDevice(i)
            if device != "mixed":
                assert schema.GetInputDevice(i, actual, device) == actual, (name, i)
    computing = {name for name, device in seen if device == "gpu"}
    expected = {"Slice", "Resize"}
    if kind is pipelines.DaliViews:
        expected |= {"GaussianBlur", "LookupTable", "CropMirrorNormalize"}
    assert expected <= computing
    # External sources are no operations. Each other operator is a launch, or work of the host.
    operators = [i for i in pipe._ops if i._op.schema.OperatorName() != "ExternalSource"]
    assert len(operators) <= OPERATORS
    assert (("Image", "mixed") in seen) == source.encoded
    assert all(node.device == "gpu" for node in pipe._graph_outputs)
    assert pipe.exec_dynamic
