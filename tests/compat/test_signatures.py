"""The drop-ins take the arguments of the installed libraries: names, order, defaults."""

import inspect
from importlib import import_module

import pytest

from simclr_fast.compat import google_simclr, lightly, pytorch_metric_learning, solo_learn, timm

# The installed library's module and name, ours, and the arguments that docs/coming_from.md names as
# missing.
INSTALLED = [
    ("lightly.loss", "NTXentLoss", lightly.NTXentLoss, ()),
    ("lightly.loss", "NTXentLoss.forward", lightly.NTXentLoss.forward, ()),
    ("lightly.transforms", "SimCLRTransform", lightly.SimCLRTransform, ()),
    ("lightly.transforms", "SimCLRTransform.__call__", lightly.SimCLRTransform.__call__, ()),
    ("lightly.utils.lars", "LARS", lightly.LARS, ()),
    ("lightly.utils.lars", "LARS.step", lightly.LARS.step, ()),
    ("timm.optim.lars", "Lars", timm.Lars, ()),
    ("timm.optim.lars", "Lars.step", timm.Lars.step, ()),
    (
        "pytorch_metric_learning.losses",
        "NTXentLoss",
        pytorch_metric_learning.NTXentLoss,
        ("kwargs",),
    ),
    (
        "pytorch_metric_learning.losses",
        "NTXentLoss.forward",
        pytorch_metric_learning.NTXentLoss.forward,
        ("indices_tuple", "ref_emb", "ref_labels"),
    ),
    (
        "pytorch_metric_learning.losses",
        "SelfSupervisedLoss",
        pytorch_metric_learning.SelfSupervisedLoss,
        ("kwargs",),
    ),
    (
        "pytorch_metric_learning.losses",
        "SelfSupervisedLoss.forward",
        pytorch_metric_learning.SelfSupervisedLoss.forward,
        (),
    ),
]
REQUIRED = inspect.Parameter.empty
# From the sources of libraries that are not installed. solo-learn's lr has no usable default.
RECORDED = {
    "solo-learn 1.0.6": (
        solo_learn.LARS,
        {
            "params": REQUIRED,
            "lr": REQUIRED,
            "momentum": 0,
            "dampening": 0,
            "weight_decay": 0,
            "nesterov": False,
            "eta": 1e-3,
            "eps": 1e-8,
            "clip_lr": False,
            "exclude_bias_n_norm": False,
        },
    ),
    "solo-learn's loss": (
        solo_learn.simclr_loss_func,
        {"z": REQUIRED, "indexes": REQUIRED, "temperature": 0.1},
    ),
    "google-research/simclr": (
        google_simclr.add_contrastive_loss,
        {
            "hidden": REQUIRED,
            "hidden_norm": True,
            "temperature": 1.0,
            "tpu_context": None,
            "weights": 1.0,
        },
    ),
}


def positional(function):
    """Name → default of the arguments that can be given by position."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind in kinds}


@pytest.mark.parametrize(
    ("module", "name", "ours", "missing"), INSTALLED, ids=[f"{m}.{n}" for m, n, *_ in INSTALLED]
)
def test_arguments_equal_those_of_the_installed_library(module, name, ours, missing):
    pytest.importorskip(module.partition(".")[0])
    theirs = import_module(module)
    for part in name.split("."):
        theirs = getattr(theirs, part)
    expected = positional(theirs)
    for argument in missing:
        del expected[argument]
    # The labels are required in ours and optional in theirs.
    if name == "NTXentLoss.forward" and "metric" in module:
        expected["labels"] = REQUIRED
    assert list(positional(ours).items()) == list(expected.items())


@pytest.mark.parametrize(("ours", "expected"), RECORDED.values(), ids=RECORDED)
def test_arguments_equal_those_in_the_librarys_source(ours, expected):
    assert list(positional(ours).items()) == list(expected.items())


def test_arguments_by_position_from_before_lightly_1_6():
    """lightly had kernel_size in the place of sigmas, so sigmas must not be taken for it."""
    before = (224, 0.8, 1.0, 0.8, 0.8, 0.8, 0.2, 0.08, 0.2, 0.5, None, (0.1, 2))
    with pytest.raises(ValueError, match=r"sigmas must be the range \(lowest, highest\), got None"):
        lightly.SimCLRTransform(*before)
    with pytest.raises(TypeError, match="kernel_size"):
        lightly.SimCLRTransform(kernel_size=23)
