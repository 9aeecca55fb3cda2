"""States and options of other optimizers: a run switched in the middle continues as it was."""

import copy
import io
import re

import pytest
import torch
from lars_peers import (
    PEERS,
    SOLO_NAMES,
    model_parameters,
    ours_of,
    solo_learn_version,
    theirs_of,
    train,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from simclr_fast import reference
from simclr_fast.compat import lightly, solo_learn, timm
from simclr_fast.compat.states import library_state
from simclr_fast.optim import LARS

KWARGS = {"lr": 2.0, "momentum": 0.9, "weight_decay": 1e-2}
CLASSES = {"LARS": LARS, "lightly": lightly.LARS, "solo": solo_learn.LARS, "timm": timm.Lars}
each_class = pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES)


def groups(params, **second):
    return [{"params": params[:3]}, {"params": params[3:], "weight_decay": 0.0, **second}]


def copied(params, source):
    with torch.no_grad():
        torch._foreach_copy_(params, source)


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def options_of(peer):
    """Arguments under the peer's names, none of them the default."""
    if peer == "timm":
        return [{"trust_coeff": 0.02, "trust_clip": True}, {"always_adapt": True, "dampening": 0.1}]
    if peer == "lightly":
        return [{"trust_coefficient": 0.02, "eps": 1e-3}, {"nesterov": True}]
    clip, exclude = SOLO_NAMES[int(peer[-1])]
    return [{"eta": 0.02, clip: True}, {exclude: True, "nesterov": True}]


CASES = [(peer, i) for peer in PEERS for i in (0, 1)]
each_case = pytest.mark.parametrize(("peer", "options"), CASES, ids=lambda v: str(v))


@each_case
def test_a_state_goes_from_the_peer_to_lars_and_back(peer, options):
    theirs, ours, options = theirs_of(peer), ours_of(peer), options_of(peer)[options]
    a, b, c = (model_parameters() for _ in range(3))
    first = theirs(groups(a), **KWARGS, **options)
    names = SOLO_NAMES[int(peer[-1])] if peer.startswith("solo") else ()
    second = ours(groups(b), lr=9.0, **dict.fromkeys(names, False))
    third = theirs(groups(c), lr=9.0)
    train([(a, first)], 3)
    second.load_state_dict(through_file(first.state_dict()))
    copied(b, a)
    train([(a, first), (b, second)], 3, start=3)
    assert_close(b, a)
    third.load_state_dict(through_file(second.state_dict()))
    copied(c, b)
    train([(a, first), (c, third)], 3, start=6)
    assert_close(c, a)
    assert {k for g in third.param_groups for k in g} == {k for g in first.param_groups for k in g}


@pytest.mark.parametrize("saved", range(3))
@pytest.mark.parametrize("loading", range(3))
def test_states_of_every_version_of_solo_learn(saved, loading):
    clip, exclude = SOLO_NAMES[saved]
    a, b = model_parameters(), model_parameters()
    first = solo_learn_version(SOLO_NAMES[saved])(groups(a), **KWARGS, **{clip: True})
    first.param_groups[0][exclude] = True
    second = solo_learn.LARS(groups(b), lr=9.0, **dict.fromkeys(SOLO_NAMES[loading], False))
    train([(a, first)], 3)
    second.load_state_dict(through_file(first.state_dict()))
    copied(b, a)
    train([(a, first), (b, second)], 3, start=3)
    assert_close(b, a)
    assert set(SOLO_NAMES[loading]) <= set(second.param_groups[0])


@pytest.mark.parametrize("peer", ["sgd", *PEERS])
@each_class
def test_every_state_keeps_the_exclusion_of_the_group(kind, peer):
    """lars_param_groups excludes biases and norms, which no peer's state mentions."""
    params = model_parameters()
    weights, rest = ([p for p in params if (p.ndim > 1) is many] for many in (True, False))
    options = {"exclude_bias_n_norm": True} if peer == "solo0" else {}
    saved = theirs_of(peer)(
        [{"params": weights}, {"params": rest, "weight_decay": 0.0}], **KWARGS, **options
    )
    train([(params, saved)], 2)
    ours = kind(
        [{"params": weights}, {"params": rest, "weight_decay": 0.0, "adapt": False}], lr=9.0
    )
    keys = [set(group) for group in ours.param_groups]
    ours.load_state_dict(saved.state_dict())
    rules = [ours._rule(ours._names.options(group)) for group in ours.param_groups]
    assert rules[1] == (0.0, False)
    assert ours.param_groups[1]["adapt"] is False
    assert ours.param_groups[0]["lr"] == 2.0
    # Options of LARS that the library of the drop-in lacks are honoured there too.
    honoured = {"maximize", "foreach", "fused", "trust_clip", "adapt"}
    for group, before in zip(ours.param_groups, keys, strict=True):
        assert set(group) - before <= honoured
    train([(params, ours)], 1)


@pytest.mark.parametrize("peer", PEERS)
def test_lars_continues_as_the_peer(peer):
    a, b = model_parameters(), model_parameters()
    first = theirs_of(peer)(groups(a), **KWARGS)
    train([(a, first)], 3)
    second = LARS(
        groups(b, adapt=peer.startswith("solo")),
        lr=9.0,
        when_zero="decay" if peer == "timm" else "skip",
    )
    second.load_state_dict(through_file(first.state_dict()))
    copied(b, a)
    train([(a, first), (b, second)], 4, start=3)
    assert_close(b, a)


@pytest.mark.parametrize("peer", PEERS)
def test_states_of_lars_in_the_drop_ins(peer):
    """Also with options that the peer does not have."""
    a, b = model_parameters(), model_parameters()
    first = LARS(groups(a, adapt=False), norm="joint", momentum_order="tf", **KWARGS)
    train([(a, first)], 3)
    second = ours_of(peer)(groups(b), lr=9.0)
    second.load_state_dict(through_file(first.state_dict()))
    copied(b, a)
    train([(a, first), (b, second)], 4, start=3)
    assert_close(b, a)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("peer", ["timm", "lightly", "solo0"])
def test_distributed_checkpoints_of_the_peer(peer, flat):
    """Their state dicts have one entry for each option, so ours must have the same options."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    nets = [nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double() for _ in range(3)]
    theirs, ours = theirs_of(peer), ours_of(peer)
    optimizers = [
        kind([{"params": net[0].parameters()}, {"params": net[1].parameters()}], lr=lr, **kwargs)
        for kind, net, lr, kwargs in zip(
            (theirs, ours, theirs),
            nets,
            (2.0, 9.0, 9.0),
            # The flat form loads no more buffers than the optimizer makes by itself.
            ({"momentum": 0.9, "weight_decay": 1e-2}, {"momentum": 0.9}, {"momentum": 0.9}),
            strict=True,
        )
    ]
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def steps(i):
        for _ in range(2):
            optimizers[i].zero_grad()
            nets[i](x).square().sum().backward()
            optimizers[i].step()

    def hand_over(i, j):
        state = get_optimizer_state_dict(nets[i], optimizers[i], options=options)
        # A state is initialised by steps at lr 0.
        set_optimizer_state_dict(nets[j], optimizers[j], copy.deepcopy(state), options=options)
        nets[j].load_state_dict(nets[i].state_dict())

    steps(0)
    hand_over(0, 1)
    steps(0), steps(1)
    assert_close(list(nets[1].parameters()), list(nets[0].parameters()))
    hand_over(1, 2)
    steps(0), steps(2)
    assert_close(list(nets[2].parameters()), list(nets[0].parameters()))


def test_sgd_and_groups_without_adaptation():
    a, b, c = (model_parameters() for _ in range(3))
    first = torch.optim.SGD(a, **KWARGS)
    train([(a, first)], 3)
    second = LARS([{"params": b, "adapt": False}], lr=9.0)
    second.load_state_dict(through_file(first.state_dict()))
    copied(b, a)
    train([(a, first), (b, second)], 3, start=3)
    assert_close(b, a)
    third = torch.optim.SGD(c, lr=9.0)
    third.load_state_dict(through_file(second.state_dict()))
    copied(c, a)
    train([(a, first), (c, third)], 3, start=6)
    assert_close(c, a)


def test_from_moco_v3_and_vissl():
    """Their buffer is called mu; they adapt and decay tensors of two dimensions or more."""
    params = model_parameters()
    weights, rest = ([p for p in params if (p.ndim > 1) is many] for many in (True, False))
    options = {"lr": 2.0, "weight_decay": 1e-2, "momentum": 0.9, "trust_coefficient": 0.02}
    kwargs = [options, options | {"weight_decay": 0.0, "adapt": False}]
    generator = torch.Generator().manual_seed(0)
    grads = [
        [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in (*weights, *rest)]
        for _ in range(6)
    ]
    expected = [(p.detach().clone(), None) for p in (*weights, *rest)]

    def peer(steps):
        for t in steps:
            for i, (p, v) in enumerate(expected):
                own = kwargs[0 if i < len(weights) else 1]
                expected[i] = reference.lars_step(p, grads[t][i], v, "moco", **own)

    peer(range(3))
    first, second = range(len(weights)), range(len(weights), len(params))
    state = {
        "state": {i: {"mu": v.clone()} for i, (_, v) in enumerate(expected)},
        "param_groups": [
            options | {"params": list(first)},
            options | {"params": list(second), "weight_decay": 0.0},
        ],
    }
    copied([*weights, *rest], [p for p, _ in expected])
    optimizer = LARS(
        [{"params": weights}, {"params": rest, "weight_decay": 0.0, "adapt": False}],
        lr=9.0,
        norm="joint",
        eps=0.0,
    )
    optimizer.load_state_dict(state)
    for t in range(3, 6):
        for p, g in zip((*weights, *rest), grads[t], strict=True):
            p.grad = g
        optimizer.step()
    peer(range(3, 6))
    assert_close([p.detach() for p in (*weights, *rest)], [p for p, _ in expected])
    assert set(optimizer.state[weights[0]]) == {"momentum_buffer"}


def test_a_capturable_group_loads_a_plain_learning_rate():
    """A CUDA graph and its schedule need a tensor on the device."""
    params = model_parameters()
    saved = torch.optim.SGD(params, lr=0.25, momentum=0.9)
    train([(params, saved)], 1)
    optimizer = LARS(params, lr=1.0, capturable=True)
    optimizer.load_state_dict(saved.state_dict())
    lr = optimizer.param_groups[0]["lr"]
    assert isinstance(lr, torch.Tensor)
    assert (lr, lr.dtype) == (0.25, torch.float64)
    # A shallow copy shares the groups, and a graph of the original still reads this tensor.
    copy.copy(optimizer)
    assert optimizer.param_groups[0]["lr"] is lr


CHANGES = {
    "timm": [{"trust_coeff": 0.02}, {"trust_clip": True}, {"always_adapt": True}, {"eps": 0.1}],
    "lightly": [{"trust_coefficient": 0.02}, {"eps": 0.1}],
    "solo0": [{"eta": 0.02}, {"clip_lr": True}, {"exclude_bias_n_norm": True}, {"eps": 0.1}],
    "solo2": [{"eta": 0.02}, {"clip_lars_lr": True}, {"exclude_bias_n_norm_lars": True}],
}
COMMON = [
    *({"lr": 0.5}, {"dampening": 0.2}, {"nesterov": True}, {"momentum": 0.5}, {"momentum": 0}),
    *({"weight_decay": 0.1}, {"weight_decay": 0}),
]
CHANGES = [(peer, change) for peer, several in CHANGES.items() for change in several + COMMON]


@pytest.mark.parametrize(("peer", "change"), CHANGES, ids=lambda v: "-".join(v))
def test_options_changed_later_under_the_peers_name(peer, change):
    a, b = model_parameters(), model_parameters()
    first, second = theirs_of(peer)(groups(a), **KWARGS), ours_of(peer)(groups(b), **KWARGS)
    train([(a, first), (b, second)], 2)
    for i in (0, 1):
        first.param_groups[i] |= change
        second.param_groups[i] |= change
    train([(a, first), (b, second)], 3, start=2)
    assert_close(b, a)
    unchanged, third = model_parameters(), theirs_of(peer)
    third = third(groups(unchanged), **KWARGS)
    train([(unchanged, third)], 5)
    assert any(not torch.equal(p, q) for p, q in zip(unchanged, b, strict=True))


# Another library's name for an option → the name in LARS.
NAMES = {
    "eta": ("trust_coefficient", 0.02),
    "trust_coeff": ("trust_coefficient", 0.02),
    "clip_lr": ("trust_clip", True),
    "clip_lars_lr": ("trust_clip", True),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("when", ["group", "added", "later"])
def test_every_name_of_an_option_takes_effect_everywhere(name, when):
    ours, value = NAMES[name]
    for kind in CLASSES.values():
        results = []
        for option in (name, ours):
            params = model_parameters()
            changed = {option: value}
            start = changed if when == "group" else {}
            optimizer = kind([{"params": params[:3], **start}], **KWARGS)
            optimizer.add_param_group(
                {"params": params[3:], **(changed if when == "added" else {})}
            )
            train([(params, optimizer)], 2)
            if when == "later":
                optimizer.param_groups[0] |= changed
            train([(params, optimizer)], 2, start=2)
            keys = [set(group) for group in optimizer.param_groups]
            assert keys[0] - {ours} == {"params", *optimizer.defaults} - {ours}
            results.append(params)
        assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@each_class
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"differentiable": True}, "differentiable=True is not supported"),
        ({"always_adapt": True, "adapt": False}, "always_adapt=True says that the group is"),
        ({"exclude_bias_n_norm": True}, "exclude_bias_n_norm=True is an option of"),
        ({"exclude_bias_n_norm_lars": True}, "exclude_bias_n_norm_lars=True is an option of"),
        ({"exclude_bias_and_norm": True}, "exclude_bias_and_norm=True is an option of"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_options_that_cannot_be_honoured_are_refused_by_name(kind, option, message):
    params = model_parameters()
    if (kind is timm.Lars and "always_adapt" in option) or (
        kind is solo_learn.LARS and "exclude" in message
    ):
        kind([{"params": params, **option}], **KWARGS)  # the library's own option
        return
    with pytest.raises(ValueError, match=message):
        kind([{"params": params, **option}], **KWARGS)
    optimizer = kind(params, **KWARGS)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)], **option})
    assert len(optimizer.param_groups) == 1
    train([(params, optimizer)], 1)
    before = [p.detach().clone() for p in params]
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0] |= option
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    keys = set(optimizer.param_groups[0])
    assert "differentiable" not in keys
    if "differentiable" in option:
        return
    optimizer.param_groups[0] |= option
    for _ in range(2):  # not only once
        with pytest.raises(ValueError, match=message):
            train([(params, optimizer)], 1)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    for name in option.keys() - {"adapt"}:
        del optimizer.param_groups[0][name]
    train([(params, optimizer)], 1)


@each_class
def test_options_without_effect_are_dropped(kind):
    params = model_parameters()
    optimizer = kind(groups(params), **KWARGS)
    keys = set(optimizer.param_groups[0]) | {"adapt"}
    for group in optimizer.param_groups:
        group |= {"differentiable": False}
        group |= dict.fromkeys(["exclude_bias_n_norm", "exclude_bias_n_norm_lars"], False)
    train([(params, optimizer)], 1)
    assert set(optimizer.param_groups[0]) <= keys


@each_class
@pytest.mark.parametrize("fused", [None, False], ids=["native", "plain"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"norm": "l1"}, "norm must be one of"),
        ({"momentum_order": "jax"}, "momentum_order must be one of"),
        ({"when_zero": None}, "when_zero must be one of"),
        ({"nesterov": "yes"}, "nesterov must be a bool, got 'yes'"),
        ({"maximize": 2}, "maximize must be a bool, got 2"),
        ({"clip_lr": "no"}, "must be a bool, got 'no'"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_choices_changed_later_to_what_would_be_ignored(kind, fused, option, message):
    params = model_parameters()
    optimizer = kind(params, **KWARGS)
    optimizer.param_groups[0]["fused"] = fused
    train([(params, optimizer)], 1)
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0] |= option
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=message):
            train([(params, optimizer)], 1)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_bad_values_are_named_as_the_peer_names_them():
    with pytest.raises(TypeError, match=r"eta must be a number, got '0\.1'"):
        solo_learn.LARS(model_parameters(), lr=0.1, eta="0.1")
    with pytest.raises(ValueError, match="trust_coeff must be finite and at least 0, got -1"):
        timm.Lars(model_parameters(), trust_coeff=-1)
    with pytest.raises(TypeError, match="clip_lars_lr must be a bool, got 1"):
        solo_learn.LARS(model_parameters(), lr=0.1, clip_lars_lr=1)
    with pytest.raises(TypeError, match="clip_lars_lr is the old name of clip_lr"):
        solo_learn.LARS(model_parameters(), lr=0.1, clip_lr=True, clip_lars_lr=True)
    optimizer = timm.Lars(model_parameters(), lr=0.1)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["trust_coeff"] = None
    with pytest.raises(TypeError, match=re.escape("trust_coeff must be a number, got None")):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["trust_coeff"] == 0.001


@pytest.mark.parametrize("peer", PEERS)
def test_a_state_of_lars_goes_to_the_peers_own_class(peer):
    """Their classes raise KeyError at the step for a state without their options. Through the
    drop-in it has them, and biases and norms stay excluded."""
    a, b, c = (model_parameters() for _ in range(3))
    weights, rest = ([i for i, p in enumerate(a) if (p.ndim > 1) is many] for many in (True, False))

    def split(params):
        return [{"params": [params[i] for i in part]} for part in (weights, rest)]

    base = LARS(split(a), **KWARGS)
    base.param_groups[1] |= {"weight_decay": 0.0, "adapt": False}
    names = SOLO_NAMES[int(peer[-1])] if peer.startswith("solo") else ()
    ours = ours_of(peer)(split(b), lr=9.0, **dict.fromkeys(names, False))
    theirs = theirs_of(peer)(split(c), lr=9.0)
    keys = [set(group) for group in theirs.param_groups]
    train([(a, base)], 3)
    for group in base.param_groups:
        group["when_zero"] = "decay" if peer == "timm" else "skip"
    ours.load_state_dict(through_file(base.state_dict()))
    theirs.load_state_dict(through_file(library_state(ours)))
    assert [set(group) for group in theirs.param_groups] == keys
    copied(c, a)
    train([(a, base), (c, theirs)], 3, start=3)
    assert_close(c, a)
    for option, value in (("momentum_order", "tf"), ("norm", "joint"), ("adapt", False)):
        before = base.param_groups[0][option]
        base.param_groups[0][option] = value
        ours.load_state_dict(base.state_dict())
        with pytest.raises(ValueError, match=f"group 0 has {option}="):
            library_state(ours)
        base.param_groups[0][option] = before
