"""docs/coming_from.md: a test for each line of its lists."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lars_peers import PEERS, SoloLearn, model_parameters, ours_of, theirs_of, train
from PIL import Image
from rank_runs import on_ranks
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from simclr_fast import nt_xent_loss
from simclr_fast.benchmarks import peers
from simclr_fast.compat import (
    google_simclr,
    lightly,
    pytorch_metric_learning,
    solo_learn,
    timm,
)
from simclr_fast.optim import LARS
from simclr_fast.optim import lars as lars_module

PAGE = Path(__file__).parents[2] / "docs" / "coming_from.md"
TESTED = []


def lines():
    """(section, text) of every line of a list."""
    found = []
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        name, _, text = section.partition("\n")
        items = re.findall(r"^- (.*?)(?=\n- |\n\n|\Z)", text, flags=re.MULTILINE | re.DOTALL)
        found += [(name, " ".join(item.split())) for item in items]
    return found


def difference(section, start):
    """Mark a test as that of the line that begins with `start`."""
    TESTED.append((section, start))
    return lambda test: test


def test_every_line_has_a_test_and_every_test_a_line():
    for section, text in lines():
        tests = [s for s in TESTED if s[0] == section and text.startswith(s[1])]
        assert len(tests) == 1, f"{section}: {text}"
    for section, start in TESTED:
        assert any(s == section and text.startswith(start) for s, text in lines()), start


def library(name):
    return pytest.importorskip(name, reason=f"{name} is not installed")


def views(n=6, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, n, 5, dtype=torch.float64, generator=generator) * scale
    return [v.to(dtype).requires_grad_() for v in z]


def losses(temperature=0.5):
    """name → (ours, theirs), each a function of both views."""
    theirs = library("lightly.loss")
    metric = library("pytorch_metric_learning.losses")

    def both(function):
        return lambda a, b: function(torch.cat((a, b)))

    indexes = torch.arange(6).repeat(2)
    our_metric = pytorch_metric_learning.NTXentLoss(temperature)
    return {
        "lightly": (
            lightly.NTXentLoss(temperature),
            lambda a, b: theirs.NTXentLoss(temperature)(a, b),
        ),
        "solo": (
            both(lambda z: solo_learn.simclr_loss_func(z, indexes, temperature)),
            both(lambda z: peers.solo_learn(z, indexes, temperature)),
        ),
        "metric": (
            pytorch_metric_learning.SelfSupervisedLoss(our_metric),
            metric.SelfSupervisedLoss(metric.NTXentLoss(temperature)),
        ),
        "google": (
            both(lambda z: google_simclr.add_contrastive_loss(z, True, temperature)[0]),
            both(lambda z: peers.google_simclr(z, True, temperature)[0]),
        ),
    }


@difference("All losses", "They compute in float32 or wider")
def test_losses_of_16_bit_inputs_are_float32():
    for name, (ours, theirs) in losses().items():
        z = views(dtype=torch.bfloat16)
        assert ours(*z).dtype == torch.float32, name
        assert theirs(*z).dtype == torch.bfloat16, name


@difference("All losses", "`temperature` must lie between")
def test_temperatures_out_of_range_are_refused():
    for temperature in (-0.5, 1e-7, 1e7):
        for make in (lightly.NTXentLoss, pytorch_metric_learning.NTXentLoss):
            with pytest.raises(ValueError, match="temperature"):
                make(temperature)(*views(2)) if make is lightly.NTXentLoss else make(temperature)(
                    torch.cat(views(2)), torch.arange(2).repeat(2)
                )
        for call in (
            lambda z, t: solo_learn.simclr_loss_func(z, torch.arange(6).repeat(2), t),
            lambda z, t: google_simclr.add_contrastive_loss(z, True, t),
        ):
            with pytest.raises(ValueError, match="temperature"):
                call(torch.cat(views()), temperature)
    theirs = library("lightly.loss")
    assert theirs.NTXentLoss(-0.5)(*views()).isfinite()
    with pytest.raises(ValueError, match="temperature"):
        theirs.NTXentLoss(0.0)


@difference("All losses", "There is no second derivative")
def test_second_derivatives_are_refused():
    for ours, theirs in losses().values():
        for loss in (ours, theirs):
            z = views()
            (gradient,) = torch.autograd.grad(loss(*z), z[0], create_graph=True)
            if loss is theirs:
                gradient.sum().backward()
                continue
            with pytest.raises(RuntimeError, match=r"second|twice|double|once_differentiable"):
                gradient.sum().backward()


@difference("All LARS optimizers", "Norms are computed in float32 or wider")
def test_norms_of_half_precision_do_not_overflow():
    start = torch.full((400, 400), 200.0, dtype=torch.float16)  # of norm 80000
    for peer in PEERS:
        results = []
        for kind in (ours_of(peer), theirs_of(peer)):
            p = nn.Parameter(start.clone())
            p.grad = torch.full_like(p, 300.0)
            kind([p], lr=100.0, weight_decay=1e-6).step()
            results.append(p.detach().float())
        torch.testing.assert_close(results[0], torch.full((400, 400), 180.0))
        assert torch.equal(results[1], start.float()) or results[1].isnan().all()


@difference("All LARS optimizers", "An `adapt` key in a group")
def test_groups_may_have_an_adapt_key():
    for peer in PEERS:
        for adapt in (True, False):
            a, b = model_parameters(), model_parameters()
            first = ours_of(peer)([{"params": a, "adapt": adapt}], lr=2.0, weight_decay=0.0)
            second = LARS([{"params": b, "adapt": adapt}], lr=2.0, momentum=0.0)
            second.param_groups[0]["when_zero"] = "decay" if peer == "timm" else "skip"
            train([(a, first), (b, second)], 2)
            assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
            c, d = model_parameters(), model_parameters()
            third = theirs_of(peer)([{"params": c, "adapt": adapt}], lr=2.0)
            fourth = theirs_of(peer)(d, lr=2.0)
            train([(c, third), (d, fourth)], 2)
            assert all(torch.equal(p, q) for p, q in zip(c, d, strict=True))


@difference("All LARS optimizers", "A loaded state that lacks an option")
def test_a_state_that_lacks_an_option():
    for peer in PEERS:
        for kind in (ours_of(peer), theirs_of(peer)):
            params = model_parameters()
            optimizer = kind(params, lr=2.0, weight_decay=0.5)
            state = optimizer.state_dict()
            del state["param_groups"][0]["weight_decay"]
            optimizer.load_state_dict(state)
            if kind is ours_of(peer):
                assert optimizer.param_groups[0]["weight_decay"] == 0.5
                train([(params, optimizer)], 1)
                continue
            with pytest.raises(KeyError, match="weight_decay"):
                train([(params, optimizer)], 1)


@difference("All LARS optimizers", "Names that other libraries give an option")
def test_names_of_other_libraries():
    for name in ("eta", "trust_coeff", "clip_lr", "clip_lars_lr"):
        for peer in PEERS:
            for kind in (ours_of(peer), theirs_of(peer)):
                a, b = model_parameters(), model_parameters()
                first = kind([{"params": a, name: True if "clip" in name else 0.5}], lr=2.0)
                second = kind(b, lr=2.0)
                for optimizer in (first, second):
                    optimizer.param_groups[0]["weight_decay"] = 0.1
                known = name in second.defaults
                train([(a, first), (b, second)], 2)
                differ = not all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
                assert differ == (known or kind is ours_of(peer)), (name, kind)


@difference("All LARS optimizers", "An option that cannot be honoured")
def test_differentiable_is_refused():
    for peer in PEERS:
        group = {"params": model_parameters(), "differentiable": True}
        with pytest.raises(ValueError, match="differentiable=True is not supported"):
            ours_of(peer)([group], lr=1.0)


@difference("All LARS optimizers", "Options of the wrong type")
def test_options_of_the_wrong_type_are_refused():
    for peer in PEERS:
        with pytest.raises(TypeError, match="nesterov must be a bool, got 'no'"):
            ours_of(peer)(model_parameters(), lr=1.0, momentum=0.9, nesterov="no")
        theirs_of(peer)(model_parameters(), lr=1.0, momentum=0.9, nesterov="no")
        p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        with pytest.raises(ValueError, match="real floating-point parameters"):
            ours_of(peer)([p], lr=1.0)
        theirs_of(peer)([p], lr=1.0)


@difference("All LARS optimizers", "Parameters of `FullyShardedDataParallel`")
def test_flat_parameters_of_fsdp_are_refused():
    """tests/optim/test_lars_sharded.py tests fully_shard and parameters of real FSDP."""
    for peer in PEERS:
        p = nn.Parameter(torch.ones(2))
        p._fsdp_flattened = True
        with pytest.raises(ValueError, match="fully_shard"):
            ours_of(peer)([p], lr=1.0)
        theirs_of(peer)([p], lr=1.0)


@difference("lightly", "`NTXentLoss`: with `gather_distributed=True`")
def test_lightlys_gathered_loss_on_two_ranks(tmp_path):
    library("lightly.loss")
    on_ranks(gathered, (str(tmp_path / "store"),), 2)


def gathered(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        from lightly.loss import NTXentLoss

        results = []
        for kind in (lightly.NTXentLoss, NTXentLoss):
            torch.manual_seed(0)
            net = DistributedDataParallel(nn.Linear(5, 4).double())
            x = torch.randn(2, 6, 5, dtype=torch.float64)[:, 3 * rank : 3 * rank + 3]
            loss = kind(0.3, gather_distributed=True)(net(x[0]), net(x[1]))
            loss.backward()
            values = [torch.zeros_like(loss) for _ in range(2)]
            dist.all_gather(values, loss.detach())
            results.append((values, [p.grad for p in net.parameters()]))
        (ours, our_grads), (theirs, their_grads) = results
        torch.testing.assert_close(our_grads, their_grads)
        assert ours[0] == ours[1]
        assert theirs[0] != theirs[1]
        torch.testing.assert_close(ours[0], sum(theirs) / 2)
    finally:
        dist.destroy_process_group()


@difference("lightly", "`NTXentLoss`: the memory bank is")
def test_lightlys_memory_bank_has_another_name():
    theirs = library("lightly.loss").NTXentLoss(0.5, (8, 5))
    ours = lightly.NTXentLoss(0.5, (8, 5))
    assert ours.bank.shape == theirs.memory_bank.bank.shape == (8, 5)
    assert set(ours.state_dict()) == set(theirs.state_dict()) == set()


def photo(mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC).convert(mode)


@difference("lightly", "`SimCLRTransform`: the same seed gives other views")
def test_the_same_seed_gives_other_views_than_lightlys():
    theirs = library("lightly.transforms").SimCLRTransform
    depends = []
    for kind in (lightly.SimCLRTransform, theirs):
        made = []
        for numpy_seed in (1, 2):
            torch.manual_seed(0)
            np.random.seed(numpy_seed)  # noqa: NPY002 - lightly uses this generator
            made.append(kind(32, gaussian_blur=1.0)(photo()))
        depends.append(not torch.equal(made[0][0], made[1][0]))
    assert depends == [False, True]


PLAIN = {"cj_prob": 0.0, "random_gray_scale": 0.0, "normalize": None}


@difference("lightly", "`SimCLRTransform`: pixels are float32")
def test_pixels_are_not_rounded_to_bytes():
    theirs = library("lightly.transforms").SimCLRTransform
    for blur in (0.0, 1.0):
        rounded = []
        for kind in (lightly.SimCLRTransform, theirs):
            view = kind(32, gaussian_blur=blur, **PLAIN)(photo())[0] * 255
            rounded.append(bool((view - view.round()).abs().max() < 1e-4))
        assert rounded == [blur == 1.0, True]


@difference("lightly", "`SimCLRTransform`: `cj_bright`, `cj_contrast`, `cj_sat`, `vf_prob`")
def test_fixed_arguments_of_the_views_refuse_other_values():
    theirs = library("lightly.transforms").SimCLRTransform
    for name, value in {
        "cj_bright": 0.4,
        "cj_contrast": 0.4,
        "cj_sat": 0.4,
        "vf_prob": 0.5,
        "rr_prob": 0.5,
        "rr_degrees": 10,
    }.items():
        default = inspect.signature(theirs).parameters[name].default
        with pytest.raises(ValueError, match=f"{name} must be {default}, SimCLR's, got {value}"):
            lightly.SimCLRTransform(**{name: value})
        lightly.SimCLRTransform(**{name: default})
        theirs(**{name: value})


@difference("lightly", "`SimCLRTransform`: images of any mode")
def test_images_of_any_mode_are_accepted():
    theirs = library("lightly.transforms").SimCLRTransform
    for mode in ("L", "RGBA", "P", "CMYK"):
        assert lightly.SimCLRTransform(32)(photo(mode))[0].shape == (3, 32, 32)
    plain = {"cj_prob": 0.0, "random_gray_scale": 0.0, "gaussian_blur": 0.0}
    assert theirs(32, normalize=None, **plain)(photo("L"))[0].shape == (1, 32, 32)
    with pytest.raises(RuntimeError):
        theirs(32, **plain)(photo("RGBA"))


@difference("lightly", "`SimCLRTransform`: both views come from one object")
def test_both_views_come_from_one_object():
    theirs = library("lightly.transforms").SimCLRTransform(32)
    assert len(theirs.transforms) == 2
    assert not hasattr(lightly.SimCLRTransform(32), "transforms")


@difference("solo-learn", "`simclr_loss_func`: `indexes` must name each image twice")
def test_solo_learn_indexes_must_name_each_image_twice():
    z = torch.cat(views())
    for indexes in (torch.arange(4).repeat(3), torch.arange(6).repeat_interleave(2)):
        with pytest.raises(ValueError, match="indexes must"):
            solo_learn.simclr_loss_func(z, indexes)
        assert peers.solo_learn(z, indexes).isfinite()


@difference("solo-learn", "`simclr_loss_func`: it is finite at low temperatures")
def test_solo_learns_loss_is_finite_at_low_temperatures():
    z, indexes = torch.cat([views()[0]] * 2), torch.arange(6).repeat(2)
    for temperature, finite in ((0.0114, True), (0.0112, False)):
        assert solo_learn.simclr_loss_func(z, indexes, temperature).isfinite()
        assert bool(peers.solo_learn(z, indexes, temperature).isfinite()) is finite


@difference("solo-learn", "`LARS`: it takes `clip_lr` and `exclude_bias_n_norm`")
def test_every_name_of_solo_learns_options_is_accepted():
    for clip in ("clip_lr", "clip_lars_lr"):
        for exclude in ("exclude_bias_n_norm", "exclude_bias_n_norm_lars"):
            a, b = model_parameters(), model_parameters()
            kwargs = {"lr": 2.0, "momentum": 0.9, "weight_decay": 0.1}
            first = solo_learn.LARS(a, **kwargs, **{clip: True, exclude: True})
            second = SoloLearn(b, **kwargs, clip_lr=True, exclude_bias_n_norm=True)
            train([(a, first), (b, second)], 3)
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
            saved = first.state_dict()["param_groups"][0]
            assert saved[clip] is saved[exclude] is True
            assert len(saved) == len(second.state_dict()["param_groups"][0])


@difference("pytorch-metric-learning", "`NTXentLoss`: every label must occur exactly twice")
def test_metric_learning_labels_must_occur_twice():
    theirs = library("pytorch_metric_learning.losses").NTXentLoss()
    z = torch.cat(views())
    for labels in (torch.arange(4).repeat(3), torch.zeros(12), torch.arange(12) // 5):
        with pytest.raises(ValueError, match="every label exactly twice"):
            pytorch_metric_learning.NTXentLoss()(z, labels)
        theirs(z, labels)


@difference("pytorch-metric-learning", "`NTXentLoss`: it has no `distance`")
def test_metric_learnings_other_arguments_are_missing():
    metric = library("pytorch_metric_learning.losses")
    for name in ("distance", "reducer", "embedding_regularizer"):
        metric.NTXentLoss(**{name: None})
        with pytest.raises(TypeError, match=name):
            pytorch_metric_learning.NTXentLoss(**{name: None})
    z, labels = torch.cat(views()), torch.arange(6).repeat(2)
    for name in ("indices_tuple", "ref_emb", "ref_labels"):
        assert name in inspect.signature(metric.NTXentLoss.forward).parameters
        with pytest.raises(TypeError, match=name):
            pytorch_metric_learning.NTXentLoss()(z, labels, **{name: None})


@difference("pytorch-metric-learning", "`NTXentLoss`: the loss of a row has no upper limit")
def test_metric_learnings_loss_has_no_upper_limit():
    metric = library("pytorch_metric_learning.losses")
    # The positives are opposite and the negatives equal: 2 / temperature.
    a = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    for temperature in (0.1, 0.01):
        ours = pytorch_metric_learning.SelfSupervisedLoss(
            pytorch_metric_learning.NTXentLoss(temperature)
        )(a, -a)
        theirs = metric.SelfSupervisedLoss(metric.NTXentLoss(temperature))(a, -a)
        torch.testing.assert_close(ours, torch.tensor(2 / temperature), rtol=0.1, atol=0)
        limit = torch.tensor(87.3) if temperature == 0.01 else ours
        torch.testing.assert_close(theirs, limit, rtol=1e-3, atol=0)


@difference("pytorch-metric-learning", "`SelfSupervisedLoss`: `loss` must be")
def test_self_supervised_loss_wraps_only_our_loss():
    metric = library("pytorch_metric_learning.losses")
    with pytest.raises(TypeError, match="this module's NTXentLoss, got NTXentLoss"):
        pytorch_metric_learning.SelfSupervisedLoss(metric.NTXentLoss())
    with pytest.raises(ValueError, match="symmetric must be True"):
        pytorch_metric_learning.SelfSupervisedLoss(pytorch_metric_learning.NTXentLoss(), False)
    metric.SelfSupervisedLoss(metric.NTXentLoss(), symmetric=False)(*views())


@difference("google-research/simclr", "`add_contrastive_loss`: `tpu_context` (TensorFlow 1)")
def test_contexts_of_tensorflow_are_refused():
    for name in ("tpu_context", "strategy"):
        with pytest.raises(ValueError, match=f"{name} must be None"):
            google_simclr.add_contrastive_loss(torch.cat(views()), **{name: object()})


@difference("google-research/simclr", "`add_contrastive_loss`: on the CPU, rows shorter")
def test_short_rows_in_google_simclrs_loss():
    """test_nt_xent_compat.py checks the values. Fake tensors have none that could be checked."""
    z = torch.cat(views(scale=1e-8))
    loss = google_simclr.add_contrastive_loss(z)[0]
    assert not torch.allclose(loss, 2 * nt_xent_loss(z, temperature=1.0))
    for device in ("meta", "cpu"):
        with FakeTensorMode():
            hidden = torch.empty(12, 5, device=device)
            loss, logits, labels = google_simclr.add_contrastive_loss(hidden)
        assert (loss.shape, logits.shape, labels.shape) == ((), (6, 6), (6, 12))
    compiled = torch.compile(google_simclr.add_contrastive_loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(z)[0], 2 * nt_xent_loss(z, temperature=1.0))


@difference("timm", "`Lars`: `foreach=None` uses the native kernels")
def test_timms_lars_uses_the_native_kernels(monkeypatch):
    calls = []
    monkeypatch.setattr(
        lars_module, "use_native", lambda group, params: calls.append(group["foreach"])
    )
    for foreach in (None, True):
        params = model_parameters()
        train([(params, timm.Lars(params, foreach=foreach))], 1)
    assert calls == [None, True]
    assert lars_module.wants_native({"fused": None, "foreach": None})
    assert not lars_module.wants_native({"fused": None, "foreach": True})
