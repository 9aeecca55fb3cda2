"""The probe beside pretraining: known answers, and pretraining is the same with and without it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import TINY, write_photos

from simclr_fast.evaluation.knn import knn_ranks
from simclr_fast.evaluation.online import OnlineProbe
from simclr_fast.training.pretrain import pretrain
from simclr_fast.utils.checkpoint import checkpoints, load_checkpoint

CPU = torch.device("cpu")


def features(labels, views=2, spread=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(4, 6, generator=torch.Generator().manual_seed(9)) * 2
    return torch.cat(
        [
            centers[labels] + spread * torch.randn(len(labels), 6, generator=generator)
            for _ in range(views)
        ]
    )


def test_a_resumed_probe_reads_its_position_on_the_cpu():
    """On a GPU every step would wait for it. Tensors on "meta" have no values to read."""
    probe = OnlineProbe(np.arange(4), every=1, device=CPU)
    probe.device = torch.device("meta")
    probe.load_state_dict({"next": torch.tensor(3), "bank": torch.ones(4, 2)})
    assert probe.state["next"].item() == 3
    assert probe.state["bank"].is_meta


def test_the_first_step_of_the_probe_equals_the_formula():
    labels = np.arange(8) % 4
    probe = OnlineProbe(labels, every=1, device=CPU)
    index = torch.arange(8)
    h = features(labels)
    probe.take(h)
    row = probe.after_step(1, index)
    # From zero weights all classes are equally likely, and class 0 comes first.
    assert row["linear"] == 2 / 8
    assert row["knn"] is None
    x = torch.cat([(h - h.mean(0)) / h.std(0, correction=0) / 6**0.5, torch.ones(16, 1)], 1)
    error = 1 / 4 - torch.nn.functional.one_hot(index.repeat(2) % 4, 4)
    assert torch.allclose(probe.state["weight"], -2.0 * 1.9 * error.T @ x / 16, atol=1e-4)


def test_the_probe_learns_separable_classes():
    labels = np.arange(400) % 4
    probe = OnlineProbe(labels, every=50, device=CPU)
    rows = []
    for step in range(1, 101):
        index = torch.from_numpy(np.random.default_rng(step).permutation(400)[:32])
        probe.take(features(labels[index], seed=step))
        rows.append(probe.after_step(step, index))
    assert [row["step"] for row in rows if row] == [50, 100]
    assert rows[99]["linear"] > 0.97
    assert rows[99]["knn"] > 0.97
    assert 0 < rows[99]["percent_of_time"] <= 100


def test_knn_is_of_the_steps_before_without_the_image_itself():
    labels = np.arange(60) % 4
    probe = OnlineProbe(labels, every=3, device=CPU)
    h = {}
    for step, index in enumerate((range(0, 25), range(25, 50), range(20, 30)), 1):
        ids = torch.tensor(index)
        h[step] = features(labels[ids], spread=4, seed=step)
        probe.take(h[step])
        row = probe.after_step(step, ids)
    bank = torch.cat([h[1][:25], h[2][:25]])
    right = []
    for query in range(20, 30):
        others = torch.tensor([i for i in range(50) if i != query])
        one = h[3][query - 20][None]
        ranks = knn_ranks(bank[others], labels[others], one, labels[[query]], 4, ks=(20,))
        right.append(ranks[20].item() == 0)
    assert row["knn"] == pytest.approx(np.mean(right))
    assert 0 < np.mean(right) < 1


def test_images_without_labels_teach_nothing_and_do_not_count():
    labels = np.array([0, 1, -1, -1] * 10)
    probe = OnlineProbe(labels, every=1, device=CPU)
    probe.take(features(np.maximum(labels, 0)[:4]))
    assert probe.after_step(1, torch.arange(4))["linear"] == 0.5
    before = probe.state["weight"].clone()
    probe.take(features(np.zeros(2, int)))
    row = probe.after_step(2, torch.tensor([2, 3]))
    assert row["linear"] is None
    # There is no gradient, and momentum goes on.
    assert torch.allclose(probe.state["weight"], before * (1 + 0.81 / 1.9), atol=1e-5)
    for none in (None, np.full(3, -1)):
        with pytest.raises(ValueError, match="labelled"):
            OnlineProbe(none, every=1, device=CPU)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    pytest.importorskip("nvidia.dali", reason="decoding needs DALI (Linux)")
    photos = write_photos(tmp_path_factory.mktemp("train"), 40)
    return replace(TINY, data=str(photos), steps=8, checkpoint_every=3)


def trained(config, out, **changes):
    folder = pretrain(replace(config, out=out, **changes))
    return load_checkpoint(checkpoints(folder / "checkpoints")[-1])


def lines(out):
    rows = [json.loads(line) for line in (out / "online_probe.jsonl").read_text().splitlines()]
    return [(row["step"], row["linear"], row["knn"]) for row in rows]


def test_training_is_the_same_bit_for_bit_and_resumes(config, tmp_path):
    without = trained(config, tmp_path / "without")
    drawn = torch.get_rng_state()
    probed = trained(config, tmp_path / "with", probe_every=4)
    assert torch.equal(torch.get_rng_state(), drawn)
    for key, value in without["model"].items():
        assert torch.equal(value, probed["model"][key]), key
    moments = [state["optimizer"]["state"] for state in (without, probed)]
    assert all(
        torch.equal(moments[0][i]["momentum_buffer"], moments[1][i]["momentum_buffer"])
        for i in moments[0]
    )
    assert [step for step, _, _ in lines(tmp_path / "with")] == [4, 8]
    # Cut after step 6, gone on: the same reports.
    checkpoints(tmp_path / "with" / "checkpoints")[-1].unlink()
    before = lines(tmp_path / "with")
    resumed = trained(config, tmp_path / "with", probe_every=4, resume=True)
    assert lines(tmp_path / "with") == before
    assert torch.equal(resumed["probe"]["weight"], probed["probe"]["weight"])


@pytest.mark.parametrize("memory", ["replay", "lockstep"])
def test_every_way_of_training_shows_the_same_features(config, tmp_path, memory):
    plain = trained(config, tmp_path / "plain", steps=2, probe_every=1)
    size = 4 if memory == "lockstep" else None
    mode = {"memory": memory, "micro_batch": size}
    other = trained(config, tmp_path / memory, steps=2, probe_every=1, **mode)
    assert torch.allclose(plain["probe"]["bank"], other["probe"]["bank"], atol=1e-4)
    assert torch.allclose(plain["probe"]["weight"], other["probe"]["weight"], atol=1e-3)


def test_unlabelled_data_are_refused_before_anything_is_written(config, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(8):
        Image.new("RGB", (16, 16)).save(flat / f"{i}.png")
    with pytest.raises(ValueError, match="labelled"):
        pretrain(replace(config, data=str(flat), out=tmp_path / "run", probe_every=1))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="probe_every"):
        replace(config, probe_every=0)
