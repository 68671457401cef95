"""eval_linear.py: batched probes against single ones, layer decay, timm's augmentations, the promises, bad input."""
import copy
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import assert_one_line_error, finished, read_log, run_script, same
from PIL import Image
from sklearn.linear_model import LogisticRegression
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms.functional import normalize, pil_to_tensor, to_pil_image

import common
import eval_linear
from common import MEAN, STD, View, ViewLoader, load_data
from eval_linear import Classifier, Probes, hold_out, layer_decay_groups, mix, pooled_layers

CONFIG = "rand-m9-mstd0.5-inc1"
STRONG = f"--mixup 0.8 --cutmix 1 --randaugment {CONFIG} --erasing 0.5 --smoothing 0.1"
RUNS = {"probe": "--layers all --lr 0.01 0.3", "cached": "--layers all --cached --pool both --lr 0.01 0.3",
        "all": f"--finetune all {STRONG}", "head": f"--finetune head --holdout 0.1 {STRONG}"}
RUNS = {name: f"{flags} --epochs 2 --batch_size 40".split() for name, flags in RUNS.items()}
common.RESNETS["resnet10"] = ("BasicBlock", [1, 1, 1, 1])


def call_main(arguments):
    sys.argv = ["eval_linear.py", "--device", "cpu", "--num_workers", "0", *map(str, arguments)]
    eval_linear.main()


@pytest.fixture
def evaluate(monkeypatch, capsys, tmp_path):
    """evaluate(folder, *arguments): the command line without the start of an interpreter -> what run_script would return."""

    def call(folder, *arguments):
        def main():
            call_main(["--output_dir", tmp_path / folder, *arguments])
            sys.exit(0)

        monkeypatch.setattr(sys, "argv", sys.argv)
        monkeypatch.setattr(common, "signals", [])
        return finished(capsys, main)

    return call


def succeeds(result):
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints in our own form: two ViTs of 3 blocks, one of 6, and a small ResNet, with random weights."""
    folder, paths, vit = tmp_path_factory.mktemp("checkpoints"), {}, dict(arch="vit_nano", img_size=16, patch_size=8, depth=3)
    torch.manual_seed(0)
    for name, options in {"vit": vit, "fine": vit | dict(patch_size=4), "vit6": vit | dict(depth=6),
                          "resnet": dict(arch="resnet10", img_size=16, patch_size=4)}.items():
        backbone = common.create_backbone(**options)
        for parameter in backbone.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        weights = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
        meta = {"network": "student", "backbone": options, "mean": MEAN, "std": STD}
        paths[name] = folder / f"{name}.pth"
        torch.save({"student": weights, "meta": meta}, paths[name])
    return paths


def few(monkeypatch, train=120, test=40):
    """The digits, but only some of them."""
    splits = [data.subset(torch.arange(n)) for data, n in zip(load_data("digits"), (train, test), strict=True)]
    monkeypatch.setattr(eval_linear, "load_data", lambda *_: tuple(dataclasses.replace(data) for data in splits))
    return splits


def saved(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def rows(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


def assert_same_runs(one, other):
    a, b = saved(one), saved(other)
    for name in a.keys() & {"student", "probes", "optimizer", "scaler"}:
        assert same(a[name], b[name]), name
    assert rows(one) == rows(other)


def write_folder(folder, size, train=("ant", "bee"), test=("ant", "bee")):
    generator = np.random.default_rng(0)
    for side, classes, number in (("train", train, 14), ("val", test, 3)):
        for name in classes:
            (folder / side / name).mkdir(parents=True, exist_ok=True)
            for i in range(number):
                Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / side / name / f"{i}.png")


# ----------------------------------------------------------------------------------------------------------------- probes


def whole_images(data):
    return normalize(F.interpolate(data.images.float() / 255, (16, 16), mode="bicubic", antialias=True).clamp(0, 1), MEAN, STD)


def digits_features(checkpoint, data, pool="cls"):
    """Features of each of the 3 layers, made without our pipeline."""
    weights = {key[9:]: value for key, value in torch.load(checkpoint, weights_only=True)["student"].items()}
    model = common.vit_nano(img_size=16, patch_size=weights["patch_embed.proj.weight"].shape[-1], depth=3).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        outputs = model.get_intermediate_layers(whole_images(data), 3)
    return [y[:, 0] if pool == "cls" else torch.cat([y[:, 0], y[:, 1:].mean(1)], 1) for y in outputs]


def test_batched_probes_are_those_trained_one_by_one(checkpoints, evaluate, monkeypatch, tmp_path):
    started, rates, epochs, batch = [], [0.01, 0.2, 3.0], 4, 100
    monkeypatch.setattr(eval_linear, "Probes", lambda *sizes: started.append(Probes(*sizes)) or copy.deepcopy(started[0]))
    succeeds(evaluate("a", "--checkpoint", checkpoints["vit"], "--layers", "all", "--cached", "--lr", *rates, "--epochs", epochs,
                      "--batch_size", batch))
    digits, test = load_data("digits")
    train, held = hold_out(digits, 0.1, 0)
    features, held_features, test_features = (digits_features(checkpoints["vit"], data) for data in (train, held, test))
    order, steps = ViewLoader(train, [], batch, 0, "cpu"), epochs * (len(train) // batch)
    probes, table = saved(tmp_path / "a")["probes"], rows(tmp_path / "a")
    grid = json.loads((tmp_path / "a" / "results.json").read_text())["val_top1_of_layers_and_rates"]
    for l in range(3):
        found, highest = [], max(grid[l])
        error = 100 * (highest / 100 * (1 - highest / 100) / len(held)) ** 0.5
        for r, rate in enumerate(rates):
            model = nn.Sequential(nn.BatchNorm1d(96, eps=1e-6, affine=False), nn.Linear(96, 10)).eval()
            model[0].running_mean, model[0].running_var = features[l].mean(0), features[l].var(0)
            part = slice(10 * r, 10 * (r + 1))
            model[1].weight.data, model[1].bias.data = started[0].weight.detach()[l, :, part].T.clone(), torch.zeros(10)
            groups = [dict(params=[model[1].weight], weight_decay=1 / len(train)), dict(params=[model[1].bias], weight_decay=0)]
            optimizer = torch.optim.SGD(groups, lr=rate * batch / 256, momentum=0.9)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            for step in range(steps):
                index = order.index(step)
                loss = F.cross_entropy(model(features[l][index]), train.labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            torch.testing.assert_close(probes["weight"][l, :, part], model[1].weight.T, rtol=1e-3, atol=2e-4)
            torch.testing.assert_close(probes["bias"][l, 0, part], model[1].bias, rtol=1e-3, atol=2e-4)
            torch.testing.assert_close(probes["norm.running_var"].view(3, 96)[l], model[0].running_var)
            val, top1 = (100 * (model(x).argmax(1) == y).float().mean().item()
                         for x, y in ((held_features[l], held.labels), (test_features[l], test.labels)))
            assert grid[l][r] == pytest.approx(val, abs=0.8)  # one of 143
            if grid[l][r] >= highest - error:
                found.append((F.cross_entropy(model(held_features[l]), held.labels).item(), rate, top1))
        _, rate, top1 = min(found)
        assert table[l]["layer"] == l + 1 and table[l]["lr"] == rate
        assert table[l]["test_top1"] == pytest.approx(top1, abs=0.6)  # two of 360


@pytest.mark.parametrize("network", ["vit", "resnet"])
@pytest.mark.parametrize("mode", [["--layers", "all"], ["--layers", "all", "--cached"], ["--finetune", "head", "--mixup", 0.2]])
def test_the_backbone_stays_bit_equal(network, mode, checkpoints, evaluate, monkeypatch):
    few(monkeypatch)
    seen = []

    def load_backbone(*arguments):
        loaded = common.load_backbone(*arguments)
        loaded[0].train()  # whatever state it comes in
        seen.append((loaded[0], {name: value.clone() for name, value in loaded[0].state_dict().items()}))
        return loaded

    monkeypatch.setattr(eval_linear, "load_backbone", load_backbone)
    result = succeeds(evaluate("a", "--checkpoint", checkpoints[network], *mode, "--epochs", 1, "--batch_size", 50, "--lr", 0.1))
    assert "learning rates" not in result.stdout or "up to layer L+1: 2.0e-02\n" in result.stdout  # of a head alone
    (backbone, before), = seen
    assert same(dict(backbone.state_dict()), before)
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_logistic_regression_of_scikit_learn(checkpoints, evaluate, tmp_path):
    evaluate("a", "--checkpoint", checkpoints["fine"], "--layers", "all", "--cached", "--pool", "both")
    digits, test = load_data("digits")
    train, _ = hold_out(digits, 0.1, 0)
    features = [digits_features(checkpoints["fine"], data, "both") for data in (train, test)]
    for row, x, y in zip(rows(tmp_path / "a"), *features, strict=True):
        mean, std = x.mean(0), x.std(0)
        fitted = LogisticRegression(max_iter=3000).fit((x - mean) / std, train.labels)
        assert abs(100 * fitted.score((y - mean) / std, test.labels) - row["test_top1"]) < 1, row


@pytest.mark.parametrize("pool", ["cls", "mean", "both"])
@pytest.mark.parametrize("layers", [False, True])
def test_pooling(pool, layers, checkpoints):
    ours, _ = common.load_backbone(str(checkpoints["vit"]))
    theirs = common.TimmBackbone("vit_tiny_patch16_224", 32, False).eval()
    for network, inner, side in ((ours, ours, 16), (theirs, theirs.model, 32)):
        x, outputs = torch.randn(2, 3, side, side), []
        for block in inner.blocks:
            block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        network(x)
        parts = [(y[:, 0], y[:, 1:].mean(1)) for y in map(inner.norm, outputs if layers else outputs[-1:])]  # (B, D) twice
        expected = [{"cls": cls, "mean": mean, "both": torch.cat([cls, mean], 1)}[pool] for cls, mean in parts]
        torch.testing.assert_close(pooled_layers(network, x, pool, layers), expected, rtol=1e-4, atol=1e-5)
        features = eval_linear.FrozenLayers(network, pool, layers)(x)
        torch.testing.assert_close(features, torch.stack(expected, 1), rtol=1e-4, atol=1e-5)


def test_stages_of_a_resnet_end_in_zeros(checkpoints):
    backbone, _ = common.load_backbone(str(checkpoints["resnet"]))
    x = torch.randn(6, 3, 16, 16)
    stages = backbone(x, layers=True)
    features, probes = eval_linear.FrozenLayers(backbone, "mean", True)(x), Probes(4, 512, 2, 5).train()
    logits = probes(features)
    assert features.shape == (6, 4, 512) and logits.shape == (4, 6, 2, 5)
    for l, width in enumerate((64, 128, 256, 512)):
        assert torch.equal(features[:, l, :width], stages[l]) and not features[:, l, width:].any()
        standard = F.batch_norm(stages[l], None, None, training=True, eps=1e-6)
        torch.testing.assert_close(logits[l].flatten(1), standard @ probes.weight[l, :width], rtol=1e-4, atol=1e-6)


def test_the_chosen_rate():
    top1, loss = torch.tensor([[90.0, 95, 95], [80, 79, 10]]), torch.tensor([[0.1, 0.5, 0.4], [3.0, 1, 1]])
    # standard errors: 0.2 and 0.4; 1.1 and 2; 5.4 and 10
    for images, choice in {10**4: [2, 0], 400: [2, 1], 16: [0, 1]}.items():
        assert eval_linear.best_rates(top1, loss, images).tolist() == choice


@pytest.mark.figures
def test_the_grid_costs_no_forward_passes_and_the_test_is_seen_once(checkpoints, evaluate, monkeypatch, tmp_path):
    few(monkeypatch)
    evaluated, images, eval_batches = [], [], common.eval_batches
    monkeypatch.setattr(eval_linear, "eval_batches", lambda data, mine, *arguments: evaluated.append((len(data), len(mine))) or
                        eval_batches(data, mine, *arguments))
    monkeypatch.setattr(eval_linear, "pooled_layers", lambda network, x, *arguments: images.append(len(x)) or
                        pooled_layers(network, x, *arguments))
    for folder, options in {"grid": ["--layers", "all"], "one": ["--lr", 0.1, "--holdout", 0.1]}.items():
        evaluated.clear(), images.clear()
        succeeds(evaluate(folder, "--checkpoint", checkpoints["vit"], "--epochs", 2, "--batch_size", 54, *options))
        assert evaluated == [(12, 12), (40, 40)] and sum(images) == 2 * 108 + 12 + 40
    assert len(rows(tmp_path / "grid")) == 3 and len(rows(tmp_path / "one")) == 1
    for name in ("multi_exit.png", "curves.png"):
        assert Image.open(tmp_path / "grid" / name).size[0] > 100


def bare_run():
    """What `evaluate` asks of a run."""
    loader = SimpleNamespace(device=torch.device("cpu"), num_workers=0, mean=MEAN, std=STD)
    return SimpleNamespace(loader=loader, meta={"img_size": 8}, args=SimpleNamespace(dtype="fp32"))


def test_a_loss_of_test_images_that_is_not_finite_stops(capsys):
    """fp16 may overflow on an image that was not trained with."""
    data = load_data("digits")[1].subset(torch.arange(4))
    with pytest.raises(SystemExit) as stopped:
        eval_linear.evaluate(bare_run(), lambda x: torch.full((1, len(x), 1, 10), torch.nan), data, "test")
    assert stopped.value.code == 1 and "stopped: the loss of the test images is not finite" in capsys.readouterr().out


def test_accuracies_are_those_of_a_loop(monkeypatch):
    torch.manual_seed(0)
    data, _ = few(monkeypatch, 37)
    logits = torch.randn(37, 2, 3, 10)  # n, L, R, C
    batches = iter(logits.split(8))
    monkeypatch.setattr(eval_linear, "EVAL_BATCH", 8)
    found = eval_linear.evaluate(bare_run(), lambda x: next(batches).transpose(0, 1), data, "some")
    for l, r in np.ndindex(2, 3):
        places = [row[l, r].argsort(descending=True).tolist().index(label) for row, label in zip(logits, data.labels, strict=True)]
        expected = [100 * sum(place < k for place in places) / 37 for k in (1, 5)]
        expected.append(F.cross_entropy(logits[:, l, r], data.labels).item())
        assert found[:, l, r].tolist() == pytest.approx(expected, rel=1e-5)


def accuracies_of_few(rank, folder):
    data = load_data(str(folder))[1].subset(torch.tensor([0, 4]))  # a cat and a dog, from files
    return eval_linear.evaluate(bare_run(), lambda x: x.mean((2, 3))[None, :, None, :2], data, "few")


def test_more_processes_than_images(in_processes, image_folder):
    expected = accuracies_of_few(0, image_folder)
    for found in in_processes(3, accuracies_of_few, image_folder):
        torch.testing.assert_close(found, expected)


def test_losses_with_soft_targets():
    logits, labels = torch.randn(2, 5, 3, 4), torch.tensor([0, 3, 1, 1, 2])
    hot = F.one_hot(labels, 4).float()
    for smoothing in (0.0, 0.1):
        soft = hot * (1 - smoothing) + smoothing / 4
        expected = -(soft[None, :, None] * logits.log_softmax(-1)).sum(-1)
        torch.testing.assert_close(eval_linear.sample_losses(logits, labels, smoothing), expected)
        torch.testing.assert_close(eval_linear.sample_losses(logits, soft), expected)


def test_hold_out():
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 10 + [-1] * 30)[torch.randperm(100)]
    data = common.ImageData(labels, ["a", "b", "c"], torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1).repeat(1, 3, 1, 1))
    train, held = hold_out(data, 0.1, 0)
    assert held.labels.bincount().tolist() == [4, 2, 1] and train.labels.bincount().tolist() == [36, 18, 9]
    number = torch.cat([train.images, held.images])[:, 0, 0, 0].long()
    assert sorted(number.tolist()) == (labels >= 0).nonzero()[:, 0].tolist()
    assert torch.equal(torch.cat([train.labels, held.labels]), labels[number])
    assert not torch.equal(hold_out(data, 0.1, 1)[1].images, held.images)
    with pytest.raises(common.InputError, match="keep some of each class: change --holdout"):
        hold_out(common.ImageData(torch.tensor([0] * 9 + [1]), ["a", "b"], data.images[:10]), 0.1, 0)
    everything, none = hold_out(data, 0.0, 0)
    assert len(none) == 0 and torch.equal(everything.labels, labels[labels >= 0])


# ------------------------------------------------------------------------------------------------------------ layer decay


def layer_of(name, depth):
    """The rule of d2v_kd: 0 for patch projection, [CLS] and positions; L+1 for norms and head. A ResNet's stages count from 1."""
    if found := re.search(r"blocks\.(\d+)\.", name):
        return int(found[1]) + 1
    if found := re.search(r"backbone\.layer(\d)", name):
        return int(found[1])
    return 0 if re.search(r"patch_embed|cls_token|pos_embed|backbone\.(conv1|bn1)", name) else depth + 1


def by_name(model, groups):
    """-> {name of a parameter: its group}, each in one group alone."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(parameter)], group) for group in groups for parameter in group["params"]]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.parametrize("make, depth", [
    (lambda: common.vit_nano(img_size=16, patch_size=8, depth=6), 6), (lambda: common.vit_tiny(img_size=32), 12),
    (lambda: common.TimmBackbone("vit_tiny_patch16_224", 32, False), 12), (lambda: common.create_backbone("resnet18", 32), 4),
], ids=["6 blocks", "12 blocks", "timm", "stages"])
@pytest.mark.parametrize("decay", [0.81, 0.65, 1.0])
def test_layer_decay_is_exact(make, depth, decay):
    model = Classifier(make(), "mean", 10, False)
    groups = by_name(model, layer_decay_groups(model, 0.05, decay))
    assert groups.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        plain = parameter.ndim > 1 and not name.endswith(("cls_token", "pos_embed"))
        assert groups[name]["weight_decay"] == (0.05 if plain else 0.0), name
        assert groups[name]["lr_scale"] == decay ** (depth + 1 - layer_of(name, depth)), name


@pytest.mark.parametrize("name", ["test_vit2", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224", "test_convnext"])
def test_layer_decay_knows_the_tokens_and_the_stem_of_timms_models(name):
    """What the model itself lists has no weight decay; its own stem is layer 0; its blocks are layers in their order."""
    model = Classifier(common.TimmBackbone(name, 56 if "eva" in name else 32, False), "cls", 10, False)
    theirs = model.backbone.model
    groups = {key.removeprefix("backbone.model."): group for key, group in by_name(model, layer_decay_groups(model, 0.05, 0.5)).items()}
    scale = {key: group["lr_scale"] for key, group in groups.items()}
    listed = getattr(theirs, "no_weight_decay", set)()
    present = [groups[key]["weight_decay"] for key in groups.keys() & listed]
    assert not any(present) and (present or name == "test_convnext")
    assert {scale[key] for key in scale if re.match(theirs.group_matcher()["stem"], key)} == {min(scale.values())}
    assert scale["head.weight"] == scale["norm.weight"] == 1.0
    blocks = {}
    for key, value in scale.items():
        if place := re.match(r"(?:stages\.(\d+)\.)?blocks\.(\d+)", key):
            blocks.setdefault(tuple(int(x or 0) for x in place.groups()), set()).add(value)
    ordered = [value for key in sorted(blocks) for value in blocks[key]]
    assert len(ordered) == len(blocks) and ordered == sorted(ordered) and ordered[0] < ordered[-1] < 1.0
    for key, value in scale.items():  # what leads to a stage goes with its first block
        if place := re.match(r"stages\.(\d+)\.downsample", key):
            assert {value} == blocks[int(place[1]), 0]


@pytest.mark.parametrize("name", "cait_xxs24_224 hrnet_w18_small densenet121 poolformer_s12 xcit_nano_12_p16_224 pit_ti_224".split())
def test_layer_decay_of_other_models_is_timms(name):
    """Models with rules of many kinds, or none: each rate is timm's own, to the one layer that a head on top adds."""
    model = Classifier(common.TimmBackbone(name, 224, False), "cls", 10, False)
    inner = model.backbone.model
    theirs = by_name(inner, timm.optim.param_groups_layer_decay(inner, 0.05, layer_decay=0.75))
    ours = by_name(model, layer_decay_groups(model, 0.05, 0.75))
    assert len({group["lr_scale"] for group in theirs.values()}) > 5
    for key, group in theirs.items():
        assert 0.74 < ours[f"backbone.model.{key}"]["lr_scale"] / group["lr_scale"] < 1.34, key


def test_table_1_and_the_first_step_moves_by_it(checkpoints, evaluate, monkeypatch, tmp_path):
    """Adam's first step moves a parameter by its learning rate, whatever the gradient is."""
    few(monkeypatch, 256)
    result = succeeds(evaluate("a", "--checkpoint", checkpoints["vit6"], "--finetune", "all", "--lr", 1e-3, "--layer_decay", 0.81,
                               "--batch_size", 256, "--warmup_epochs", 0, "--weight_decay", 0, "--max_steps", 1))
    assert "up to layer L+1: 2.3e-04 2.8e-04 3.5e-04 4.3e-04 5.3e-04 6.6e-04 8.1e-04 1.0e-03\n" in result.stdout  # of d2v_kd
    assert "the test images have not been looked at" in result.stdout and not (tmp_path / "a" / "results.json").exists()
    before, after = torch.load(checkpoints["vit6"], weights_only=True)["student"], saved(tmp_path / "a")["student"]
    for name, value in before.items():
        moved = (after[name] - value).abs().max().item()
        assert moved == pytest.approx(1e-3 * 0.81 ** (7 - layer_of(name, 6)), rel=1e-2), name


def test_finetuning_learns_and_loads_elsewhere(checkpoints, evaluate, tmp_path):
    succeeds(evaluate("a", "--checkpoint", checkpoints["vit"], "--finetune", "all", "--epochs", 8, "--lr", 5e-3, "--holdout", 0.1))
    row, = rows(tmp_path / "a")
    assert row["test_top1"] > 70 and row["val_top1"] > 70 and row["test_top5"] > 95
    weights = saved(tmp_path / "a")["student"]
    bare = torch.load(tmp_path / "a" / "backbone.pth", weights_only=True)
    assert bare and all(torch.equal(value, weights[f"backbone.{key}"]) for key, value in bare.items())
    backbone, meta = common.load_backbone(str(tmp_path / "a" / "checkpoint.pth"))
    assert meta["img_size"] == 16 and meta["pool"] == "mean"
    _, test = load_data("digits")
    h = backbone.forward_features(whole_images(test))[:, 1:].mean(1)
    h = F.layer_norm(h, [96], weights["norm.weight"], weights["norm.bias"])
    logits = F.linear(h, weights["head.weight"], weights["head.bias"])
    assert 100 * (logits.argmax(1) == test.labels).float().mean().item() == pytest.approx(row["test_top1"], abs=0.3)


# ---------------------------------------------------------------------------------------------------- timm's augmentations


def seed_all(*key):
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.mark.parametrize("workers, side", [(0, 8), (2, 120)], ids=["memory", "files"])
def test_randaugment_is_timms_on_each_crop(workers, side, tmp_path):
    write_folder(tmp_path, (side, side))
    data, _ = load_data(str(tmp_path))
    assert (data.images is None) == (side == 120)
    settings = data, [View(8, scale=(1.0, 1.0), flip=0.0)], 20, 3, "cpu"  # often the whole image, pixel by pixel
    loaders = ViewLoader(*settings), eval_linear.RandAugmentLoader(*settings, workers, config=CONFIG)
    transform = rand_augment_transform(CONFIG, dict(translate_const=3, img_mean=(124, 116, 104), magnitude_max=9.99))
    changed = 0
    for (step, (x,), index), (_, (y,), other) in zip(*(loader.steps(4, 7) for loader in loaders), strict=True):
        assert torch.equal(index, other)
        pixels = (255 * (x * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None])).round().byte()
        expected = pixels.clone()
        for place, image in enumerate(expected):  # a crop that is enlarged may be rounded otherwise
            seed_all(3, step, 1002, place)
            image.copy_(pil_to_tensor(transform(to_pil_image(image))))
        equal = (y - normalize(expected.float() / 255, MEAN, STD)).abs().flatten(1).amax(1) < 1e-5
        assert equal.float().mean() > 0.8
        changed += (expected != pixels).flatten(1).any(1).sum().item()
    assert 30 < changed < 60  # each of two operations has a chance of one half


def test_erasing_is_timms_on_each_image():
    x, erasing = torch.randn(12, 3, 16, 16), RandomErasing(0.5, mode="pixel", device="cpu")
    found = eval_linear.erase(x.clone(), erasing, 7, 9)
    expected = x.clone()
    for place, image in enumerate(expected):
        seed_all(7, 9, 1003, place)
        erasing(image)
    assert torch.equal(found, expected)
    assert 1 <= (found != x).flatten(1).any(1).sum() <= 11


@pytest.mark.parametrize("alphas, kinds", [((0.8, 0.0), {"mixup"}), ((0.0, 1.0), {"cutmix"}), ((0.8, 1.0), {"mixup", "cutmix"})])
def test_mixing_by_the_definition(alphas, kinds):
    x, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 5
    mixup = eval_linear.Mixup(*alphas, prob=0.9, switch_prob=0.5, label_smoothing=0.1, num_classes=5)
    smooth = F.one_hot(labels, 5) * 0.9 + 0.02
    found = set()
    for step in range(30):
        y, targets = mix(x.clone(), labels, mixup, 0, step)
        assert torch.equal(y, mix(x.clone(), labels, mixup, 0, step)[0])
        lam = ((targets[0, 0] - smooth[7, 0]) / (smooth[0, 0] - smooth[7, 0])).item()
        torch.testing.assert_close(targets, lam * smooth + (1 - lam) * smooth.flip(0))
        if torch.equal(y, x):
            assert lam == pytest.approx(1)
        elif torch.allclose(y, lam * x + (1 - lam) * x.flip(0), atol=1e-5):
            found.add("mixup")
        else:
            own = (y == x).all(1)  # (8, 16, 16)
            assert (own | (y == x.flip(0)).all(1)).all() and own[0].float().mean().item() == pytest.approx(lam, abs=1e-5)
            found.add("cutmix")
    assert found == kinds


# --------------------------------------------------------------------------------------------------------------- promises


def in_one_group(number, runs, folder):
    """What each of two processes does: all runs on some of the digits, and the images and targets of one mixed batch."""
    digits = [data.subset(torch.arange(144)) for data in load_data("digits")]
    eval_linear.load_data = lambda name, _: map(dataclasses.replace, digits) if name == "digits" else load_data(name)
    for name, arguments in runs.items():
        call_main(["--output_dir", f"{folder}/{name}", *arguments])
    data, _ = load_data("digits")
    loader = eval_linear.RandAugmentLoader(data, [View(16)], 12, 0, "cpu", 0, config=CONFIG)
    (_, (x,), index), = loader.steps(5, 6)
    x = eval_linear.erase(x, RandomErasing(0.5, mode="pixel", device="cpu"), 0, 5)
    return mix(x, data.labels[index], eval_linear.Mixup(0.8, 1.0, prob=1.0, num_classes=10), 0, 5)


def test_two_processes_are_one(checkpoints, in_processes, monkeypatch, tmp_path):
    monkeypatch.setattr(eval_linear, "load_data", load_data)  # to be put back
    vit, resnet = ["--checkpoint", checkpoints["vit"]], ["--checkpoint", checkpoints["resnet"], "--data", tmp_path / "data"]
    runs = {name: [*vit, *arguments, "--epochs", 1, "--batch_size", 72] for name, arguments in RUNS.items()}
    write_folder(tmp_path / "data", (20, 20))
    runs["resnet"] = [*resnet, *RUNS["probe"], "--epochs", 1, "--batch_size", 12]
    runs["resnet, all"] = [*resnet, "--finetune", "all", "--batch_size", 14, "--max_steps", 1]
    parts = in_processes(2, in_one_group, runs, tmp_path / "two")
    mixed = in_one_group(0, runs, tmp_path / "one")
    for one, *two in zip(mixed, *parts, strict=True):
        assert torch.equal(one, torch.cat(two))
    for name, flags in runs.items():
        folders = tmp_path / "one" / name, tmp_path / "two" / name
        one, two = ([value for record in read_log(folder) for key, value in record.items() if "loss" in key] for folder in folders)
        assert one == pytest.approx(two, rel=2e-4 if "--finetune" in flags else 2e-5)  # after AdamW's steps
        assert one[0] == pytest.approx(two[0], rel=1e-5)
        one, two = map(saved, folders)
        torch.testing.assert_close(two.get("probes", {}), one.get("probes", {}), rtol=1e-4, atol=1e-5)
        if "--max_steps" in flags:
            one, two = (torch.cat([state["exp_avg"].flatten() for state in run["optimizer"]["state"].values()])
                        for run in (one, two))  # the gradients of the first step, but for a factor
            assert (one - two).norm() < 1e-5 * one.norm()
            continue
        for a, b in zip(*map(rows, folders), strict=True):
            assert a["lr"] == b["lr"] and a["test_top1"] == pytest.approx(b["test_top1"], abs=0.6)


@pytest.mark.parametrize("name", RUNS)
def test_sigterm_saves_and_resuming_is_exact(name, checkpoints, evaluate, monkeypatch, tmp_path):
    few(monkeypatch, 130)
    checkpoint = shutil.copy(checkpoints["vit"], tmp_path / "vit.pth")
    options = ["--checkpoint", checkpoint, *RUNS[name]]
    succeeds(evaluate("whole", *options))
    assert saved(tmp_path / "whole")["step"] > 3
    calls, sample_losses = [], eval_linear.sample_losses

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:  # in mid-epoch where a tenth is held out
            os.kill(os.getpid(), signal.SIGTERM)
        return sample_losses(*arguments)

    monkeypatch.setattr(eval_linear, "sample_losses", interrupted)
    result = evaluate("parts", *options)
    assert result.returncode == 143 and "--resume" in result.stdout and saved(tmp_path / "parts")["step"] == 3
    assert not list((tmp_path / "parts").glob("*.tmp")) and not (tmp_path / "parts" / "results.json").exists()
    succeeds(evaluate("parts", *options, "--max_steps", 4, "--resume"))
    assert_one_line_error(evaluate("parts", *options), "already holds a run", "--resume")
    for _ in range(2):  # a finished run is only evaluated
        succeeds(evaluate("parts", *options, "--resume"))
        assert_same_runs(tmp_path / "whole", tmp_path / "parts")
        (tmp_path / "parts" / "results.json").unlink()
    assert_one_line_error(evaluate("parts", *options, "--resume", "--seed", 1), "cannot resume", "--seed was 0")
    content = torch.load(checkpoint, weights_only=True)
    content["student"]["backbone.norm.bias"] += 1
    torch.save(content, checkpoint)
    assert_one_line_error(evaluate("parts", *options, "--resume"), "cannot resume", "--weights was")


@pytest.mark.parametrize("name", ["probe", "all"])
def test_workers_do_not_matter_but_seeds_and_precision_do(name, checkpoints, evaluate, tmp_path):
    """Large files and a backbone of small images, whose recipe is CIFAR-10's, not ImageNet's. What learns in bf16 stays in fp32."""
    write_folder(tmp_path / "data", (120, 120))
    options = ["--checkpoint", checkpoints["vit"], "--data", tmp_path / "data", *RUNS[name], "--batch_size", 12, "--epochs", 1]
    for folder, extra in {"a": [], "b": ["--num_workers", 2], "c": ["--seed", 1], "d": ["--dtype", "bf16"]}.items():
        assert "recipe cifar10" in succeeds(evaluate(folder, *options, *extra)).stdout
    assert_same_runs(tmp_path / "a", tmp_path / "b")
    losses = [[record["loss"] for record in read_log(tmp_path / folder)] for folder in "abcd"]
    assert losses[0] == losses[1] != losses[2] and losses[0] != losses[3]
    learnt = saved(tmp_path / "d")["probes" if name == "probe" else "student"]
    assert all(value.dtype != torch.bfloat16 for value in learnt.values())


@pytest.mark.parametrize("name", ["probe", "all"])
def test_a_loss_that_is_not_finite_stops_the_run(name, checkpoints, evaluate, monkeypatch, tmp_path):
    few(monkeypatch, 130)
    calls = []

    def spoilt(*arguments, **more):
        calls.append(1)
        *features, last = pooled_layers(*arguments, **more)
        return [*features, last * torch.nan if len(calls) == 5 else last]

    monkeypatch.setattr(eval_linear, "pooled_layers", spoilt)
    result = evaluate("a", "--checkpoint", checkpoints["vit"], *RUNS[name], "--epochs", 4)
    term = "loss_layer3" if name == "probe" else "loss"
    assert result.returncode == 1 and f"{term} was not finite at step 5" in result.stdout
    assert saved(tmp_path / "a")["step"] == (4 if name == "probe" else 3) and not (tmp_path / "a" / "results.json").exists()


def test_timm_vits(evaluate, tmp_path, monkeypatch):
    """Layers and tokens of a ViT with [CLS]. Where timm pools otherwise: its own pooling for one layer, tokens where asked for, no
    layer by [CLS], and no part that fine-tuning cannot reach."""
    few(monkeypatch, 60)
    original = timm.create_model
    monkeypatch.setattr(timm, "create_model",
                        lambda name, **options: original(name, **options, **dict(global_pool="avg") if name == "test_vit" else {}))
    names = "vit_tiny_patch16_224", "test_vit", "test_vit2"
    backbones = {name: common.create_backbone(f"timm/{name}", img_size=32) for name in names}
    plain, average, tokenless = (["--arch", f"timm/{name}", "--checkpoint", tmp_path / name, "--img_size", 32, "--batch_size", 30,
                                  "--epochs", 1] for name in names)
    for name, backbone in backbones.items():
        common.save_file(backbone.model.state_dict(), tmp_path / name)
        network = Classifier(backbone, "mean", 10, head_only=False)
        network(torch.randn(2, 3, 32, 32)).sum().backward()
        assert all(p.grad is not None for p in network.parameters() if p.requires_grad)  # else several processes would stop
    assert all(p.requires_grad for p in network.parameters())  # where there are no tokens, timm's own pooling learns
    succeeds(evaluate("a", *plain, "--layers", "all", "--pool", "both", "--lr", 0.1))
    assert len(rows(tmp_path / "a")) == 12
    succeeds(evaluate("b", *plain, "--finetune", "all", "--pool", "cls"))
    weights = backbones["vit_tiny_patch16_224"].model.state_dict()
    assert saved(tmp_path / "b")["student"].keys() >= {f"backbone.model.{key}" for key in weights}
    assert_one_line_error(evaluate("c", *average, "--layers", "all"), r"if its own output is \[CLS\]")
    succeeds(evaluate("d", *average, "--layers", "all", "--pool", "mean"))
    assert_one_line_error(evaluate("e", *tokenless, "--pool", "cls"), "has no tokens")
    succeeds(evaluate("f", *tokenless, "--finetune", "all"))


def test_through_the_shell(checkpoints, tmp_path):
    flags = ["--layers", "all", "--epochs", 1, "--device", "cpu", "--output_dir", tmp_path / "a"]
    result = succeeds(run_script("eval_linear.py", "--checkpoint", checkpoints["vit"], *flags))
    table = re.findall(r"^ *(\d) +([\d.]+) +(\d+\.\d\d) +(\d+\.\d\d) +(\d+\.\d\d)$", result.stdout, re.M)
    assert [row[0] for row in table] == ["1", "2", "3"]
    assert [f"{row['test_top1']:.2f}" for row in rows(tmp_path / "a")] == [row[3] for row in table]
    assert "143 images held out, 360 test images" in result.stdout and "1294 training images" in result.stdout
    assert "img/s" in result.stderr and all(record["data_wait"] >= 0 for record in read_log(tmp_path / "a"))
    assert_one_line_error(run_script("eval_linear.py", "--arch", "vit_nano", "--data", tmp_path / "nowhere"), "nowhere", "digits")


@pytest.mark.figures
def test_compare_draws_means_over_seeds(tmp_path):
    """Folders that differ by their seed are one curve; the table has its mean and standard deviation; one line for mistakes."""

    def compare(*folders):
        return [line.split() for line in eval_linear.compare([tmp_path / folder for folder in folders], tmp_path)]

    curves = {"a-0": [10.0, 20.0], "a-1": [14.0, 20.0], "b-0": [1.0, 2.0], "x/digits": [50.0, 50.0], "y/digits": [80.0, 80.0], "one": [1.0]}
    contents = {name: json.dumps({"rows": [{"test_top1": value} for value in curve]}) for name, curve in curves.items()}
    for name, content in (contents | {"cut": "{", "list": "[]", "knn": '{"rows": [{"top1": 1.0}]}'}).items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "results.json").write_text(content)
    assert compare("a-0", "a-1", "b-0") == ["a n = 2 12.0 +- 2.8 20.0 +- 0.0".split(), "b n = 1 1.0 +- 0.0 2.0 +- 0.0".split()]
    assert (tmp_path / "multi_exit.png").stat().st_size > 1000
    assert [line[:4] for line in compare("x/digits", "y/digits")] == ["x/digits n = 1".split(), "y/digits n = 1".split()]
    mistakes = {"none": "no results.json", "cut": "of a probe", "list": "of a probe", "knn": "of a probe", "one": "same number of layers"}
    for folder, says in mistakes.items():
        with pytest.raises(common.InputError, match=says):
            compare("b-0", folder)


def test_several_data_sets_are_one_table(evaluate, tmp_path):
    """Each in a folder of its own with the numbers of a run alone; then a line for each layer, and the mean."""
    write_folder(tmp_path / "one", (20, 20))
    write_folder(tmp_path / "two", (20, 20))
    flags = "--arch vit_nano --patch_size 8 --img_size 16 --cached --layers all --epochs 2 --batch_size 8".split()
    result = succeeds(evaluate("both", *flags, "--data", tmp_path / "one", tmp_path / "two"))
    succeeds(evaluate("alone", *flags, "--data", tmp_path / "two"))
    first, second, alone = (rows(tmp_path / name) for name in ("both/one", "both/two", "alone"))
    assert second == alone and len(alone) == 4
    lines = result.stdout.split("test top-1 in per cent\n")[1].splitlines()
    assert lines[0].split() == ["layer", "one", "two", "mean"] and len(lines) == 5
    a, b = first[3]["test_top1"], second[3]["test_top1"]
    assert list(map(float, lines[4].split())) == pytest.approx([4, a, b, (a + b) / 2], abs=0.01)
    assert_one_line_error(evaluate("same", *flags, "--data", tmp_path / "one", tmp_path / "x" / "one"), "two data sets of one name")


# -------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("options, says", [
    ("--layer_decay 0.5", "--layer_decay is for --finetune"), ("--randaugment none", "--randaugment is for --finetune"),
    *[(f"--finetune all {flags}", "are for probes") for flags in ("--layers all", "--cached", "--lr 1 2")],
    ("--finetune all --randaugment strong", "--randaugment strong is not understood"),
    # without -inc1, small magnitudes ask for images of 0 bits
    ("--finetune all --randaugment rand-m2-n15 --max_steps 1", "--randaugment rand-m2-n15 .*add -inc1"),
    ("--finetune all --batch_size 25", "--batch_size 25 is odd"),
    ("--lr 0.1 nan", "argument --lr: nan is not a number"),
    ("--holdout 0", "--holdout 0 leaves no images"),
    ("--holdout 0.001", "300 labelled training images are too few"),
    ("--img_size 18", "18 x 18 .*patch size 8"), ("--batch_size 5000", "fewer than --batch_size 5000"),
    ("--arch vit_tiny", "vit_nano.*vit_tiny"), ("--network teacher", "no teacher")])
def test_bad_values(options, says, checkpoints, evaluate, monkeypatch, tmp_path):
    few(monkeypatch, 300)
    assert_one_line_error(evaluate("a", "--checkpoint", checkpoints["vit"], *options.split()), says)
    assert not (tmp_path / "a" / "checkpoint.pth").exists()


def test_numbers_out_of_bounds(evaluate):
    limits = dict(img_size=(0, 1), epochs=(0, 1), batch_size=(1, 2), lr=(-1, 0.0), layer_decay=(0, 0.01),
                  holdout=(2, "0.0 and at most 0.9"), erasing=(1.5, "0.0 and at most 1.0"))
    for name, (value, least) in limits.items():
        says = f"argument --{name}: {value} is not a number of at least {least}"
        assert_one_line_error(evaluate("a", "--finetune", "all", f"--{name}", value), says)


@pytest.mark.parametrize("mode", [[], ["--finetune", "all"]])
def test_bad_folders(mode, checkpoints, evaluate, tmp_path):
    write_folder(tmp_path / "more", (20, 20), test=("ant", "bee", "cat"))
    write_folder(tmp_path / "fewer", (20, 20), test=("ant",))
    write_folder(tmp_path / "flat", (20, 20), train=(".",), test=("ant",))
    write_folder(tmp_path / "flat2", (20, 20), test=())
    write_folder(tmp_path / "cut", (120, 120))
    (tmp_path / "empty").mkdir()
    path = tmp_path / "cut" / "train" / "bee" / "0.png"
    path.write_bytes(path.read_bytes()[:2000])
    options = ["--checkpoint", checkpoints["vit"], *mode, "--batch_size", 24, "--epochs", 1, "--data"]
    for folder, says in {"more": "cat", "fewer": r"different classes \(bee\)", "flat": "no labels.*train/CLASS", "cut": "0.png",
                         "flat2": "no labels.*val/CLASS", "flat2/train/ant": "no labels", "empty": "no images under .*empty"}.items():
        assert_one_line_error(evaluate("a", *options, tmp_path / folder), says)


def test_bad_checkpoints(checkpoints, evaluate, tmp_path):
    content = torch.load(checkpoints["vit"], weights_only=True)
    del content["student"]["backbone.blocks.1.attn.qkv.bias"]
    torch.save(content, tmp_path / "cut.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    for name, says in {"cut.pth": r"does not fit.*blocks\.1\.attn\.qkv\.bias", "nowhere.pth": "no file",
                       "text.pth": "is not a PyTorch checkpoint"}.items():
        assert_one_line_error(evaluate("a", "--checkpoint", tmp_path / name), says)
    assert_one_line_error(evaluate("a", "--checkpoint", ""), "argument --checkpoint: no file ''")
    options = ["--checkpoint", checkpoints["vit"], "--data", "digits", "--epochs", 1, "--max_steps", 1]
    succeeds(evaluate("probes", *options))
    assert_one_line_error(evaluate("a", "--checkpoint", tmp_path / "probes" / "checkpoint.pth"), "holds probes: give that of")
    (tmp_path / "knn").mkdir()
    (tmp_path / "knn" / "results.json").write_text("of another evaluation")
    assert_one_line_error(evaluate("knn", *options), "results.json already exists: pass --overwrite or another place")
    assert_one_line_error(evaluate("a"), "--arch")
    assert_one_line_error(evaluate("a", "--checkpoint", checkpoints["resnet"], "--pool", "both"), "resnet10 has no tokens.*--pool")
