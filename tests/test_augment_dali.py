"""The DALI graph against apply_views on the CPU; its GPU form against the operators' schemas."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image

from simclr_fast.augment import Augmentation, apply_views, draw_params

dali = pytest.importorskip("nvidia.dali", reason="DALI is optional")
from nvidia.dali import backend, fn, pipeline_def, types  # noqa: E402

from simclr_fast import dali_views  # noqa: E402

NAMES = dali_views.PARAM_NAMES
CHINA, FLOWER = (load_sample_image(f"{name}.jpg").copy() for name in ("china", "flower"))
IMAGES = [CHINA, FLOWER, CHINA[:97, :61].copy(), FLOWER[200:208, 300:308].copy()] * 3
pytestmark = pytest.mark.filterwarnings("ignore:The external source node")


def run(images, views, aug, **options):
    feeds = [f for p in views for f in dali_views.feeds(p, aug)]

    @pipeline_def(batch_size=len(images), num_threads=2, device_id=None, enable_conditionals=True)
    def pipeline():
        nodes = fn.external_source(
            lambda: [images, *feeds],
            batch=True,
            num_outputs=1 + len(feeds),
            dtype=[types.UINT8, *dali_views.param_types() * len(views)],
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


@pytest.mark.parametrize("size", [224, 48])
@pytest.mark.parametrize(
    ("spec", "brightness", "interpolation"),
    [
        ("simclr", "multiplicative", "bicubic"),
        ("simclr", "additive", "bilinear"),
        ("torchvision", "multiplicative", "bicubic"),
        ("torchvision", "multiplicative", "bilinear"),
    ],
)
def test_both_views_match_the_fused_kernel(size, spec, brightness, interpolation):
    aug = Augmentation(size, spec, brightness=brightness, interpolation=interpolation)
    views = [drawn(aug, 0), drawn(aug, 1)]
    for out, params in zip(run(IMAGES, views, aug), views, strict=True):
        error = (out - apply_views(IMAGES, params, aug)).abs() * 255
        assert error.max() < 1
        assert error.mean() < 0.05


def test_layout_half_precision_and_normalisation():
    aug = Augmentation(32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    params = drawn(aug, 0)
    expected = apply_views(IMAGES, params, aug).permute(0, 2, 3, 1)
    (out,) = run(IMAGES, [params], aug, dtype=types.FLOAT16, channels_last=True)
    assert out.dtype == torch.float16
    assert (out - expected).abs().max() < 0.02


@pytest.mark.parametrize("off", ["crop", "p_flip", "p_jitter", "p_gray", "p_blur"])
def test_switched_off_steps(off):
    aug = Augmentation(40, **{off: 0 if off != "crop" else False})
    params = drawn(aug, 0)
    error = (run(IMAGES, [params], aug)[0] - apply_views(IMAGES, params, aug)).abs() * 255
    assert error.max() < 1


@pytest.mark.parametrize("spec", ["simclr", "torchvision"])
def test_the_gpu_graph_satisfies_the_operator_schemas(spec):
    """All that needs no driver: every operator exists for its device, and takes its arguments and
    its inputs' devices."""
    aug = Augmentation(224, spec)

    @pipeline_def(batch_size=2, num_threads=1, device_id=0, enable_conditionals=True)
    def pipeline():
        kinds = [types.UINT8, *dali_views.param_types() * 2]
        files, *nodes = fn.external_source(
            lambda: None, batch=True, num_outputs=len(kinds), dtype=kinds
        )
        images = fn.decoders.image(files, device="mixed", jpeg_fancy_upsampling=True)
        return tuple(dali_views.make_views(images, nodes, aug, "gpu", dtype=types.FLOAT16))

    pipe = pipeline()
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
    assert {"Slice", "Resize", "GaussianBlur", "CoordTransform", "CropMirrorNormalize"} <= computing
    assert all(node.device == "gpu" for node in pipe._graph_outputs)
