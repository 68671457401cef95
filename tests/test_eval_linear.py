"""eval_linear.py: batched probes against single ones, layer decay, timm's augmentations, the promises, bad input."""
import argparse
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, assert_one_line_error, read_log, run_script
from PIL import Image
from sklearn.linear_model import LogisticRegression
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms.functional import normalize, pil_to_tensor, to_pil_image

import common
import eval_linear
from common import MEAN, STD, View, ViewLoader, load_data
from eval_linear import Classifier, Probes, hold_out, layer_decay_groups, mix, pooled_layers, seed_globals

STRONG = ["--mixup", 0.8, "--cutmix", 1, "--randaugment", "rand-m9-mstd0.5-inc1", "--erasing", 0.5, "--smoothing", 0.1]
TABLE_1 = "2.3e-04 2.8e-04 3.5e-04 4.3e-04 5.3e-04 6.6e-04 8.1e-04 1.0e-03"  # of d2v_kd


def call_main(arguments):
    sys.argv = ["eval_linear.py", "--device", "cpu", *map(str, arguments)]
    eval_linear.main()


@pytest.fixture
def evaluate(monkeypatch, capsys, tmp_path):
    """evaluate(folder, *arguments): the command line without the start of an interpreter -> what run_script would return."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(folder, *arguments):
        monkeypatch.setattr(sys, "argv", sys.argv)
        monkeypatch.setattr(common, "signals", [])
        capsys.readouterr()
        code = 0
        try:
            common.launch(lambda: call_main(["--output_dir", tmp_path / folder, "--num_workers", 0, *arguments]))
        except SystemExit as stop:
            code = stop.code
        return subprocess.CompletedProcess(sys.argv, code, *capsys.readouterr())

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


common.RESNETS["resnet10"] = ("BasicBlock", [1, 1, 1, 1])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints in our own form: a ViT of 3 blocks, one of 6, and a small ResNet, with random weights."""
    folder, paths = tmp_path_factory.mktemp("checkpoints"), {}
    torch.manual_seed(0)
    for name, options in {"vit": dict(arch="vit_nano", img_size=16, patch_size=8, depth=3),
                          "fine": dict(arch="vit_nano", img_size=16, patch_size=4, depth=3),
                          "vit6": dict(arch="vit_nano", img_size=16, patch_size=8, depth=6),
                          "resnet": dict(arch="resnet10", img_size=16, patch_size=4)}.items():
        backbone = common.create_backbone(**options)
        for parameter in backbone.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        weights = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
        paths[name] = folder / f"{name}.pth"
        meta = {"network": "student", "backbone": options, "mean": MEAN, "std": STD}
        torch.save({"student": weights, "meta": meta}, paths[name])
    return paths


def few(monkeypatch, train=120, test=40):
    """The digits, but only some of them."""
    splits = [common.ImageData(data.labels[:n], data.classes, data.images[:n].clone())
              for data, n in zip(load_data("digits"), (train, test), strict=True)]
    monkeypatch.setattr(eval_linear, "load_data", lambda *_: tuple(dataclasses.replace(data) for data in splits))
    return splits


def saved(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def rows(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


def assert_same(a, b, path=""):
    """Equal to the bit, however deep."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{path}.{i}")
    else:
        assert a == b, path


def assert_same_runs(one, other):
    a, b = saved(one), saved(other)
    for name in a.keys() & {"student", "probes", "optimizer", "scaler"}:
        assert_same(a[name], b[name], name)
    assert rows(one) == rows(other)


# ----------------------------------------------------------------------------------------------------------------- probes


def digits_features(checkpoint, data, pool="cls"):
    """Features of each of the 3 layers, made without our pipeline."""
    weights = {key[9:]: value for key, value in torch.load(checkpoint, weights_only=True)["student"].items()}
    model = common.vit_nano(img_size=16, patch_size=weights["patch_embed.proj.weight"].shape[-1], depth=3).eval()
    model.load_state_dict(weights)
    x = F.interpolate(data.images.float() / 255, (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        outputs = model.get_intermediate_layers(normalize(x, MEAN, STD), 3)
    if pool == "cls":
        return [y[:, 0] for y in outputs]
    return [y[:, 1:].mean(1) if pool == "mean" else torch.cat([y[:, 0], y[:, 1:].mean(1)], 1) for y in outputs]


def test_batched_probes_are_those_trained_one_by_one(checkpoints, evaluate, monkeypatch, tmp_path):
    started = []

    class Recorded(Probes):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            started.append({name: value.clone() for name, value in self.state_dict().items()})

    monkeypatch.setattr(eval_linear, "Probes", Recorded)
    rates, epochs, batch = [0.01, 0.2, 3.0], 4, 100
    result = evaluate("a", "--checkpoint", checkpoints["vit"], "--layers", "all", "--cached", "--lr", *rates, "--epochs", epochs,
                      "--batch_size", batch)
    assert result.returncode == 0, result.stderr
    train, held = hold_out(load_data("digits")[0], 0.1, 0)
    test = load_data("digits")[1]
    features, held_features, test_features = (digits_features(checkpoints["vit"], data) for data in (train, held, test))
    order, steps = ViewLoader(train, [], batch, 0, "cpu"), epochs * (len(train) // batch)
    probes, table = saved(tmp_path / "a")["probes"], rows(tmp_path / "a")
    grid = json.loads((tmp_path / "a" / "results.json").read_text())["val_top1_of_layers_and_rates"]
    for l in range(3):
        found = []
        for r, rate in enumerate(rates):
            model = nn.Sequential(nn.BatchNorm1d(96, eps=1e-6, affine=False), nn.Linear(96, 10))
            model[0].running_mean, model[0].running_var = features[l].mean(0), features[l].var(0)
            model[0].eval()
            part = slice(10 * r, 10 * (r + 1))
            model[1].weight.data, model[1].bias.data = started[0]["weight"][l, :, part].T.clone(), torch.zeros(10)
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
            model.eval()
            torch.testing.assert_close(probes["weight"][l, :, part], model[1].weight.T, rtol=1e-3, atol=2e-4)
            torch.testing.assert_close(probes["bias"][l, 0, part], model[1].bias, rtol=1e-3, atol=2e-4)
            torch.testing.assert_close(probes["norm.running_var"].view(3, 96)[l], model[0].running_var)
            accuracy = [100 * (model(x).argmax(1) == y).float().mean().item()
                        for x, y in ((held_features[l], held.labels), (test_features[l], test.labels))]
            assert grid[l][r] == pytest.approx(accuracy[0], abs=0.8)  # one of 143
            found.append((F.cross_entropy(model(held_features[l]), held.labels).item(), r, accuracy[1]))
        highest = max(grid[l])
        error = 100 * (highest / 100 * (1 - highest / 100) / len(held)) ** 0.5
        best = min(candidate for candidate in found if grid[l][candidate[1]] >= highest - error)
        assert table[l]["layer"] == l + 1 and table[l]["lr"] == rates[best[1]]
        assert table[l]["test_top1"] == pytest.approx(best[2], abs=0.6)  # two of 360


def test_narrow_layers_are_padded():
    torch.manual_seed(0)
    probes, features = Probes([3, 5], 2, 4).train(), [torch.randn(6, 3), torch.randn(6, 5)]
    logits = probes(features)
    assert logits.shape == (2, 6, 2, 4)
    for l, width in enumerate((3, 5)):
        x = F.batch_norm(features[l], None, None, training=True, eps=1e-6)
        for r in range(2):
            torch.testing.assert_close(logits[l, :, r], x @ probes.weight[l, :width, 4 * r : 4 * r + 4], rtol=1e-4, atol=1e-6)


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
    result = evaluate("a", "--checkpoint", checkpoints[network], *mode, "--epochs", 1, "--batch_size", 50, "--lr", 0.1)
    assert result.returncode == 0, result.stderr
    (backbone, before), = seen
    assert_same(backbone.state_dict(), before)
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_the_scale_of_the_features_does_not_matter(checkpoints, evaluate, monkeypatch, tmp_path):
    options = ["--checkpoint", checkpoints["vit"], "--layers", "all", "--cached", "--epochs", 30]
    evaluate("a", *options)
    monkeypatch.setattr(eval_linear, "pooled_layers", lambda *arguments: [1000 * f for f in pooled_layers(*arguments)])
    evaluate("b", *options)
    for one, other in zip(rows(tmp_path / "a"), rows(tmp_path / "b"), strict=True):
        assert abs(one["test_top1"] - other["test_top1"]) < 1 and one["test_top1"] > 60


def test_logistic_regression_of_scikit_learn(checkpoints, evaluate, tmp_path):
    evaluate("a", "--checkpoint", checkpoints["fine"], "--layers", "all", "--cached", "--pool", "both")
    (train, _), test = hold_out(load_data("digits")[0], 0.1, 0), load_data("digits")[1]
    features = [digits_features(checkpoints["fine"], data, "both") for data in (train, test)]
    for row, x, y in zip(rows(tmp_path / "a"), *features, strict=True):
        mean, std = x.mean(0), x.std(0)
        fitted = LogisticRegression(max_iter=3000).fit((x - mean) / std, train.labels)
        assert abs(100 * fitted.score((y - mean) / std, test.labels) - row["test_top1"]) < 1, row


def test_a_loss_of_test_images_that_is_not_finite_stops(capsys):
    """fp16 may overflow on an image that was not trained with."""
    data = load_data("digits")[1].subset(torch.arange(4))
    meta = dict(img_size=8, mean=MEAN, std=STD)
    args = argparse.Namespace(num_workers=0, dtype="fp32")
    with pytest.raises(SystemExit) as stopped:
        eval_linear.evaluate(lambda x: torch.full((1, len(x), 1, 10), torch.nan), data, meta, torch.device("cpu"), args, "test")
    assert stopped.value.code == 1 and "stopped: the loss of the test images is not finite" in capsys.readouterr().out


@pytest.mark.parametrize("pool", ["cls", "mean", "both"])
@pytest.mark.parametrize("layers", [False, True])
def test_pooling(pool, layers, checkpoints):
    backbone, _ = common.load_backbone(str(checkpoints["vit"]))
    other = common.TimmBackbone("vit_tiny_patch16_224", 32, False).eval()
    for network, x in ((backbone, torch.randn(2, 3, 16, 16)), (other, torch.randn(2, 3, 32, 32))):
        blocks, outputs = (backbone if network is backbone else other.model).blocks, []
        hooks = [block.register_forward_hook(lambda module, inputs, output: outputs.append(output)) for block in blocks]
        network(x)
        for hook in hooks:
            hook.remove()
        outputs = [(network if network is backbone else other.model).norm(y) for y in outputs]  # (B, 1+N, D)
        parts = {"cls": [0], "mean": [1], "both": [0, 1]}[pool]
        expected = [torch.cat([(y[:, 0], y[:, 1:].mean(1))[part] for part in parts], 1) for y in outputs]
        found = pooled_layers(network, x, pool, layers)
        assert [f.shape[1] for f in found] == eval_linear.pooled_dims(network, pool, layers)
        for f, e in zip(found, expected if layers else expected[-1:], strict=True):
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


def test_a_resnet_has_stages(checkpoints):
    backbone, _ = common.load_backbone(str(checkpoints["resnet"]))
    found = pooled_layers(backbone, torch.randn(2, 3, 16, 16), "mean", True)
    assert [f.shape for f in found] == [(2, 64), (2, 128), (2, 256), (2, 512)]
    assert eval_linear.pooled_dims(backbone, "mean", True) == [64, 128, 256, 512]


def test_the_chosen_rate():
    top1, loss = torch.tensor([[90.0, 95, 95], [80, 79, 10]]), torch.tensor([[0.1, 0.5, 0.4], [3.0, 1, 1]])
    assert eval_linear.best_rates(top1, loss, 10**4).tolist() == [2, 0]  # standard errors 0.2 and 0.4
    assert eval_linear.best_rates(top1, loss, 400).tolist() == [2, 1]  # 1.1 and 2
    assert eval_linear.best_rates(top1, loss, 16).tolist() == [0, 1]  # 5.4 and 10


@pytest.mark.figures
def test_the_grid_costs_no_forward_passes_and_the_test_is_seen_once(checkpoints, evaluate, monkeypatch, tmp_path):
    data, test = few(monkeypatch)
    seen = {}

    def eval_batches(data, rows, *arguments):
        seen.setdefault("evaluated", []).append((len(data), len(rows)))
        return common.eval_batches(data, rows, *arguments)

    def counted(backbone, x, *arguments):
        seen["images"] = seen.get("images", 0) + len(x)
        return pooled_layers(backbone, x, *arguments)

    monkeypatch.setattr(eval_linear, "eval_batches", eval_batches)
    monkeypatch.setattr(eval_linear, "pooled_layers", counted)
    images = []
    for folder, options in {"grid": ["--layers", "all"], "one": ["--lr", 0.1, "--holdout", 0.1]}.items():
        seen.clear()
        assert evaluate(folder, "--checkpoint", checkpoints["vit"], "--epochs", 2, "--batch_size", 54, *options).returncode == 0
        assert seen["evaluated"] == [(12, 12), (40, 40)]
        images.append(seen["images"])
    assert images == [2 * 108 + 12 + 40] * 2
    assert len(rows(tmp_path / "grid")) == 3 and len(rows(tmp_path / "one")) == 1
    for name in ("multi_exit.png", "curves.png"):
        assert Image.open(tmp_path / "grid" / name).size[0] > 100


def test_accuracies_are_those_of_a_loop(monkeypatch):
    torch.manual_seed(0)
    data, _ = few(monkeypatch, 37)
    logits = torch.randn(37, 2, 3, 10)  # N, L, R, K
    place, monkey_batch = iter(range(0, 1000, 8)), 8
    monkeypatch.setattr(eval_linear, "EVAL_BATCH", monkey_batch)

    def predict(x):
        start = next(place)
        return logits[start : start + len(x)].transpose(0, 1)

    args = eval_linear.parse_arguments([])
    args.dtype, args.num_workers = "fp32", 0
    found = eval_linear.evaluate(predict, data, dict(img_size=8, mean=MEAN, std=STD), torch.device("cpu"), args, "some")
    for l in range(2):
        for r in range(3):
            ranks = [sorted(range(10), key=lambda k, row=row[l, r]: -row[k].item()).index(label)
                     for row, label in zip(logits, data.labels.tolist(), strict=True)]
            expected = [100 * sum(rank < 1 for rank in ranks) / 37, 100 * sum(rank < 5 for rank in ranks) / 37,
                        F.cross_entropy(logits[:, l, r], data.labels).item()]
            assert found[:, l, r].tolist() == pytest.approx(expected, rel=1e-5)


def test_losses_with_soft_targets():
    logits, labels = torch.randn(2, 5, 3, 4), torch.tensor([0, 3, 1, 1, 2])
    hard = eval_linear.sample_losses(logits, labels)
    expected = torch.stack([F.cross_entropy(logits[:, :, r].flatten(0, 1), labels.repeat(2), reduction="none").view(2, 5)
                            for r in range(3)], 2)
    torch.testing.assert_close(hard, expected)
    torch.testing.assert_close(eval_linear.sample_losses(logits, F.one_hot(labels, 4).float()), hard)
    smoothed = F.one_hot(labels, 4) * 0.9 + 0.025
    expected = -(smoothed[None, :, None] * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(eval_linear.sample_losses(logits, labels, 0.1), expected)


def test_hold_out():
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 10 + [-1] * 30)[torch.randperm(100)]
    data = common.ImageData(labels, ["a", "b", "c"], torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1).repeat(1, 3, 1, 1))
    train, held = hold_out(data, 0.1, 0)
    assert held.labels.bincount().tolist() == [4, 2, 1] and train.labels.bincount().tolist() == [36, 18, 9]
    number = torch.cat([train.images, held.images])[:, 0, 0, 0].long()
    assert sorted(number.tolist()) == (labels >= 0).nonzero()[:, 0].tolist()
    assert torch.equal(torch.cat([train.labels, held.labels]), labels[number])
    assert not torch.equal(hold_out(data, 0.1, 1)[1].images, held.images)
    everything, none = hold_out(data, 0.0, 0)
    assert none is None and torch.equal(everything.labels, labels[labels >= 0])


# ------------------------------------------------------------------------------------------------------------ layer decay


def layer_of(name, depth):
    """The rule of d2v_kd: 0 for patch projection, [CLS] and positions; L+1 for norms and head."""
    if found := re.search(r"blocks\.(\d+)\.", name):
        return int(found[1]) + 1
    return 0 if re.search("patch_embed|cls_token|pos_embed", name) else depth + 1


@pytest.mark.parametrize("make, depth", [
    (lambda: common.vit_nano(img_size=16, patch_size=8, depth=6), 6), (lambda: common.vit_tiny(img_size=32), 12),
    (lambda: common.TimmBackbone("vit_tiny_patch16_224", 32, False), 12)], ids=["6 blocks", "12 blocks", "timm"])
@pytest.mark.parametrize("decay", [0.81, 0.65, 1.0])
def test_layer_decay_is_exact(make, depth, decay):
    model = Classifier(make(), "mean", 10, False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups, found = layer_decay_groups(model, 0.05, decay), set()
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["lr_scale"] == decay ** (depth + 1 - layer_of(name, depth)), name
            plain = parameter.ndim > 1 and not name.endswith(("cls_token", "pos_embed"))
            assert group["weight_decay"] == (0.05 if plain else 0.0), name
            assert name not in found
            found.add(name)
    assert found == {name for name in names.values() if "mask_token" not in name}


def test_layers_of_a_resnet():
    model = Classifier(common.create_backbone("resnet18", 32), "mean", 10, False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in layer_decay_groups(model, 0.05, 0.5):
        for parameter in group["params"]:
            name = names[id(parameter)]
            stage = re.search(r"backbone\.layer(\d)", name)
            layer = int(stage[1]) if stage else 0 if name.startswith(("backbone.conv1", "backbone.bn1")) else 5
            assert group["lr_scale"] == 0.5 ** (5 - layer), name


def test_table_1_and_the_first_step_moves_by_it(checkpoints, evaluate, monkeypatch, tmp_path):
    """Adam's first step moves a parameter by its learning rate, whatever the gradient is."""
    few(monkeypatch, 256)
    result = evaluate("a", "--checkpoint", checkpoints["vit6"], "--finetune", "all", "--lr", 1e-3, "--layer_decay", 0.81,
                      "--batch_size", 256, "--warmup_epochs", 0, "--weight_decay", 0, "--max_steps", 1)
    assert result.returncode == 0 and f"up to layer L+1: {TABLE_1}\n" in result.stdout
    assert "the test images have not been looked at" in result.stdout and not (tmp_path / "a" / "results.json").exists()
    before, after = torch.load(checkpoints["vit6"], weights_only=True)["student"], saved(tmp_path / "a")["student"]
    for name, value in before.items():
        moved = (after[name] - value).abs()
        if "mask_token" not in name:  # which is not loaded
            assert moved.max().item() == pytest.approx(1e-3 * 0.81 ** (7 - layer_of(name, 6)), rel=1e-2), name


def test_head_only_learns_the_head(checkpoints):
    model = Classifier(common.load_backbone(str(checkpoints["vit6"]))[0], "mean", 10, True)
    groups = layer_decay_groups(model, 0.01, 0.5)
    head = [*model.norm.parameters(), *model.head.parameters()]
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in head}
    assert {group["lr_scale"] for group in groups} == {1.0}


def test_finetuning_learns_and_loads_elsewhere(checkpoints, evaluate, tmp_path):
    result = evaluate("a", "--checkpoint", checkpoints["vit"], "--finetune", "all", "--epochs", 8, "--lr", 5e-3, "--holdout", 0.1)
    row, = rows(tmp_path / "a")
    assert result.returncode == 0 and row["test_top1"] > 70 and row["val_top1"] > 70 and row["test_top5"] > 95
    weights = saved(tmp_path / "a")["student"]
    bare = torch.load(tmp_path / "a" / "backbone.pth", weights_only=True)
    assert bare and all(torch.equal(value, weights[f"backbone.{key}"]) for key, value in bare.items())
    backbone, meta = common.load_backbone(str(tmp_path / "a" / "checkpoint.pth"))
    assert meta["img_size"] == 16 and meta["pool"] == "mean"
    _, test = load_data("digits")
    x = normalize(F.interpolate(test.images.float() / 255, (16, 16), mode="bicubic", antialias=True).clamp(0, 1), MEAN, STD)
    h = F.layer_norm(backbone.forward_features(x)[:, 1:].mean(1), [96], weights["norm.weight"], weights["norm.bias"])
    logits = F.linear(h, weights["head.weight"], weights["head.bias"])
    assert 100 * (logits.argmax(1) == test.labels).float().mean().item() == pytest.approx(row["test_top1"], abs=0.3)


# ---------------------------------------------------------------------------------------------------- timm's augmentations


def seed_all(*key):
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def test_seeding_is_pure():
    def drawn(*key):
        seed_globals(*key)
        return random.random(), np.random.rand(), torch.rand(1).item()

    first = drawn(1, 2, 3)
    assert all(a != b for a, b in zip(drawn(1, 2, 4), first, strict=True)) and drawn(1, 2, 3) == first


CONFIG = "rand-m9-mstd0.5-inc1"


def test_randaugment_is_timms_on_each_crop(monkeypatch):
    data, _ = few(monkeypatch)
    view = View(8, scale=(1.0, 1.0), flip=0.0)  # often the whole image, pixel by pixel
    plain = ViewLoader(data, [view], 20, 3, "cpu")
    augmented = eval_linear.RandAugmentLoader(data, [view], 20, 3, "cpu", 0, config=CONFIG)
    hyper = dict(translate_const=3, img_mean=(124, 116, 104), magnitude_max=9.99)
    changed = 0
    for (step, (x,), index), (_, (y,), other) in zip(plain.steps(4, 7), augmented.steps(4, 7), strict=True):
        assert torch.equal(index, other)
        pixels = (255 * (x * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None])).round().byte()
        expected = []
        for place, image in enumerate(pixels):  # a crop that is enlarged may be rounded otherwise
            seed_all(3, step, 1002, place)
            expected.append(pil_to_tensor(rand_augment_transform(CONFIG, dict(hyper))(to_pil_image(image))))
        expected = torch.stack(expected)
        same = (y - normalize(expected.float() / 255, MEAN, STD)).abs().flatten(1).amax(1) < 1e-5
        assert same.float().mean() > 0.8
        changed += (expected != pixels).flatten(1).any(1).sum().item()
    assert 30 < changed < 60  # each of two operations has a chance of one half


def test_randaugment_of_files(tmp_path):
    write_folder(tmp_path, (120, 120))
    data, _ = load_data(str(tmp_path))
    assert data.images is None
    loaders = [eval_linear.RandAugmentLoader(data, [View(32)], 8, 0, "cpu", workers, config=CONFIG) for workers in (0, 2)]
    plain = [x for _, (x,), _ in ViewLoader(data, [View(32)], 8, 0, "cpu").steps(0, 3)]
    first, second = ([x for _, (x,), _ in loader.steps(0, 3)] for loader in loaders)
    assert all(map(torch.equal, first, second)) and not any(map(torch.equal, first, plain))


def test_erasing_is_timms_on_each_image():
    x = torch.randn(12, 3, 16, 16)
    found = eval_linear.erase(x.clone(), RandomErasing(0.5, mode="pixel", device="cpu"), 7, 9)
    expected = x.clone()
    for place, image in enumerate(expected):
        seed_all(7, 9, 1003, place)
        RandomErasing(0.5, mode="pixel", device="cpu")(image)
    assert torch.equal(found, expected)
    erased = (found != x).flatten(1).any(1).sum()
    assert 1 <= erased <= 11


@pytest.mark.parametrize("alphas, kinds", [((0.8, 0.0), {"mixup"}), ((0.0, 1.0), {"cutmix"}), ((0.8, 1.0), {"mixup", "cutmix"})])
def test_mixing_by_the_definition(alphas, kinds):
    x, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 5
    mixup = eval_linear.Mixup(*alphas, prob=0.9, switch_prob=0.5, label_smoothing=0.1, num_classes=5)
    smooth = F.one_hot(labels, 5) * 0.9 + 0.02
    found = set()
    for step in range(30):
        y, targets = mix(x.clone(), labels, mixup, 0, step)
        again, _ = mix(x.clone(), labels, mixup, 0, step)
        assert torch.equal(y, again)
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


RUNS = {"probe": ["--layers", "all", "--lr", 0.01, 0.3, "--epochs", 2, "--batch_size", 40],
        "cached": ["--layers", "all", "--cached", "--pool", "both", "--lr", 0.01, 0.3, "--epochs", 2, "--batch_size", 40],
        "all": ["--finetune", "all", "--epochs", 2, "--batch_size", 40, *STRONG],
        "head": ["--finetune", "head", "--epochs", 2, "--batch_size", 40, "--holdout", 0.1, *STRONG]}


def in_one_group(number, runs, folder):
    """What each of two processes does: all runs on some of the digits, and the images and targets of one mixed batch."""
    digits = [common.ImageData(data.labels[:144], data.classes, data.images[:144]) for data in load_data("digits")]
    eval_linear.load_data = lambda name, _: map(dataclasses.replace, digits) if name == "digits" else load_data(name)
    for name, arguments in runs.items():
        call_main(["--output_dir", f"{folder}/{name}", "--num_workers", 0, *arguments])
    data, _ = load_data("digits")
    loader = eval_linear.RandAugmentLoader(data, [View(16)], 12, 0, "cpu", 0, config=CONFIG)
    (_, (x,), index), = loader.steps(5, 6)
    x = eval_linear.erase(x, RandomErasing(0.5, mode="pixel", device="cpu"), 0, 5)
    return mix(x, data.labels[index], eval_linear.Mixup(0.8, 1.0, prob=1.0, num_classes=10), 0, 5)


def test_two_processes_are_one(checkpoints, evaluate, in_processes, monkeypatch, tmp_path):
    monkeypatch.setattr(eval_linear, "load_data", load_data)  # to be put back
    runs = {name: ["--checkpoint", str(checkpoints["vit"]), *arguments, "--epochs", 1, "--batch_size", 72]
            for name, arguments in RUNS.items()}
    write_folder(tmp_path / "data", (20, 20))
    resnet = ["--checkpoint", str(checkpoints["resnet"]), "--data", str(tmp_path / "data")]
    runs["resnet"] = [*resnet, *RUNS["probe"], "--epochs", 1, "--batch_size", 12]
    runs["resnet, all"] = [*resnet, "--finetune", "all", "--batch_size", 14, "--max_steps", 1]
    parts = in_processes(2, in_one_group, runs, str(tmp_path / "two"))
    mixed = in_one_group(0, runs, tmp_path / "one")
    for one, *two in zip(mixed, *parts, strict=True):
        assert torch.equal(one, torch.cat(two))
    for name in runs:
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        losses = [[value for record in read_log(folder) for key, value in record.items() if "loss" in key]
                  for folder in (one, two)]
        assert losses[0] == pytest.approx(losses[1], rel=2e-4 if "finetune" in str(runs[name]) else 2e-5)  # after AdamW's steps
        assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
        if "probes" in saved(one):
            for key, value in saved(one)["probes"].items():
                torch.testing.assert_close(saved(two)["probes"][key], value, rtol=1e-4, atol=1e-5)
        if "--max_steps" in runs[name]:
            gradient = [torch.cat([state["exp_avg"].flatten() for state in saved(run)["optimizer"]["state"].values()])
                        for run in (one, two)]  # of the first step, but for a factor
            assert (gradient[0] - gradient[1]).norm() < 1e-5 * gradient[0].norm()
            continue
        for a, b in zip(rows(one), rows(two), strict=True):
            assert a["lr"] == b["lr"] and a["test_top1"] == pytest.approx(b["test_top1"], abs=0.6)


@pytest.mark.parametrize("name", RUNS)
def test_resuming_is_exact(name, checkpoints, evaluate, monkeypatch, tmp_path):
    few(monkeypatch, 130)
    options = ["--checkpoint", checkpoints["vit"], *RUNS[name]]
    assert evaluate("whole", *options).returncode == 0
    assert saved(tmp_path / "whole")["step"] > 3
    assert evaluate("parts", *options, "--max_steps", 3).returncode == 0  # in mid-epoch where a tenth is held out
    assert evaluate("parts", *options, "--max_steps", 4, "--resume").returncode == 0
    assert_one_line_error(evaluate("parts", *options), "already holds a run", "--resume")
    assert evaluate("parts", *options, "--resume").returncode == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / "results.json").unlink()
    assert evaluate("parts", *options, "--resume").returncode == 0  # a finished run is only evaluated
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")
    assert_one_line_error(evaluate("parts", *options, "--resume", "--seed", 1), "cannot resume", "--seed was 0")


@pytest.mark.parametrize("name", ["probe", "all"])
def test_workers_do_not_matter_but_seeds_do(name, checkpoints, evaluate, tmp_path):
    write_folder(tmp_path / "data", (120, 120))
    options = ["--checkpoint", checkpoints["vit"], "--data", tmp_path / "data", *RUNS[name], "--batch_size", 12, "--epochs", 1]
    for folder, extra in {"a": [], "b": ["--num_workers", 2], "c": ["--seed", 1]}.items():
        result = evaluate(folder, *options, *extra)
        assert result.returncode == 0, result.stderr
    assert_same_runs(tmp_path / "a", tmp_path / "b")
    losses = [[record["loss"] for record in read_log(tmp_path / folder)] for folder in "abc"]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("name", ["probe", "all"])
def test_a_loss_that_is_not_finite_stops_the_run(name, checkpoints, evaluate, monkeypatch, tmp_path):
    few(monkeypatch, 130)
    calls = []

    def broken(*arguments, **options):
        calls.append(1)
        features = pooled_layers(*arguments, **options)
        return [f * torch.nan if len(calls) == 5 and l == len(features) - 1 else f for l, f in enumerate(features)]

    monkeypatch.setattr(eval_linear, "pooled_layers", broken)
    result = evaluate("a", "--checkpoint", checkpoints["vit"], *RUNS[name], "--epochs", 4)
    term = "loss_layer3" if name == "probe" else "loss"
    assert result.returncode == 1 and f"{term} was not finite at step 5" in result.stdout
    assert saved(tmp_path / "a")["step"] == (4 if name == "probe" else 3) and not (tmp_path / "a" / "results.json").exists()


@pytest.mark.parametrize("name", ["probe", "all"])
def test_sigterm_saves(name, checkpoints, evaluate, monkeypatch, tmp_path):
    few(monkeypatch, 130)
    options = ["--checkpoint", checkpoints["vit"], *RUNS[name]]
    evaluate("whole", *options)
    calls = []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return pooled_layers(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(eval_linear, "pooled_layers", interrupted)
        result = evaluate("parts", *options)
    assert result.returncode == 143 and "--resume" in result.stdout and saved(tmp_path / "parts")["step"] == 2
    assert not list((tmp_path / "parts").glob("*.tmp")) and not (tmp_path / "parts" / "results.json").exists()
    assert evaluate("parts", *options, "--resume").returncode == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def test_half_precision(checkpoints, evaluate, monkeypatch, tmp_path):
    few(monkeypatch)
    for name in ("probe", "all"):
        result = evaluate(name, "--checkpoint", checkpoints["vit"], *RUNS[name], "--dtype", "bf16")
        assert result.returncode == 0, result.stderr
        weights = saved(tmp_path / name)["probes" if name == "probe" else "student"]
        assert all(value.dtype != torch.bfloat16 for value in weights.values())


def test_timm_models(evaluate, monkeypatch, tmp_path):
    few(monkeypatch, 60)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224.augreg_in21k", img_size=32, num_classes=0)  # its mean and deviation are 0.5
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    options = ["--arch", "timm/vit_tiny_patch16_224.augreg_in21k", "--checkpoint", tmp_path / "timm.pth", "--img_size", 32]
    modes = {"a": ["--layers", "all", "--pool", "both", "--lr", 0.1], "b": ["--finetune", "all", "--pool", "cls"]}
    for folder, extra in modes.items():
        result = evaluate(folder, *options, *extra, "--batch_size", 30, "--epochs", 1)
        assert result.returncode == 0, result.stderr
    assert len(rows(tmp_path / "a")) == 12
    assert saved(tmp_path / "b")["student"].keys() >= {f"backbone.model.{key}" for key in model.state_dict()}


def test_every_flag_is_read():
    source = (ROOT / "eval_linear.py").read_text() + (ROOT / "common.py").read_text()
    for name in vars(eval_linear.parse_arguments([])):
        assert re.search(rf"args\.{name}\b", source), name


def test_through_the_shell(checkpoints, tmp_path):
    result = run_script("eval_linear.py", "--checkpoint", checkpoints["vit"], "--layers", "all", "--epochs", 1, "--device", "cpu",
                        "--output_dir", tmp_path / "a")
    assert result.returncode == 0, result.stderr
    table = re.findall(r"^ *(\d) +([\d.]+) +(\d+\.\d\d) +(\d+\.\d\d) +(\d+\.\d\d)$", result.stdout, re.M)
    assert [row[0] for row in table] == ["1", "2", "3"]
    assert [f"{row['test_top1']:.2f}" for row in rows(tmp_path / "a")] == [row[3] for row in table]
    assert "143 images held out, 360 test images" in result.stdout and "1294 training images" in result.stdout
    assert "img/s" in result.stderr and all(record["data_wait"] >= 0 for record in read_log(tmp_path / "a"))


# -------------------------------------------------------------------------------------------------------------- bad input


def write_folder(folder, size, train=("ant", "bee"), test=("ant", "bee"), images=14):
    generator = np.random.default_rng(0)
    for side, classes, number in (("train", train, images), ("val", test, 3)):
        for name in classes:
            for i in range(number):
                path = folder / side / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)


def test_bad_input_through_the_shell(tmp_path):
    assert_one_line_error(run_script("eval_linear.py", "--arch", "vit_nano", "--data", tmp_path / "nowhere"), "nowhere", "digits")


@pytest.mark.parametrize("options, patterns", [
    (["--layer_decay", 0.5], ["--layer_decay is for --finetune"]),
    (["--randaugment", "none"], ["--randaugment is for --finetune"]),
    (["--finetune", "all", "--layers", "all"], ["are for probes"]),
    (["--finetune", "all", "--cached"], ["are for probes"]),
    (["--finetune", "all", "--lr", 1, 2], ["are for probes"]),
    (["--finetune", "all", "--erasing", 1.5], ["argument --erasing: 1.5 is not a number of at least 0.0 and at most 1.0"]),
    (["--finetune", "all", "--layer_decay", 0], ["argument --layer_decay: 0 is not a number of at least 0.01"]),
    (["--finetune", "all", "--randaugment", "strong"], ["--randaugment strong is not understood"]),
    (["--finetune", "all", "--batch_size", 25], ["--batch_size 25 is odd"]),
    (["--lr", 0.1, -1], ["argument --lr: -1 is not a number"]),
    (["--lr", 0.1, "nan"], ["argument --lr: nan is not a number"]),
    (["--holdout", 0], ["--holdout 0 leaves no images"]),
    (["--holdout", 0.001], ["300 labelled training images are too few"]),
    (["--holdout", 2], ["argument --holdout: 2 is not a number of at least 0.0 and at most 0.9"]),
    (["--img_size", 18], ["18 x 18", "patch size 8"]),
    (["--checkpoint", ""], ["argument --checkpoint: no file ''"]),
    (["--img_size", 0], ["argument --img_size: 0 is not a number"]),
    (["--batch_size", 5000], ["fewer than --batch_size 5000"]),
    (["--batch_size", 1], ["argument --batch_size: 1 is not a number of at least 2"]),
    (["--epochs", 0], ["--epochs"]),
    (["--arch", "vit_tiny"], ["vit_nano", "vit_tiny"]),
    (["--network", "teacher"], ["no teacher"]),
])
def test_bad_values(options, patterns, checkpoints, evaluate, monkeypatch, tmp_path):
    few(monkeypatch, 300)
    assert_one_line_error(evaluate("a", "--checkpoint", checkpoints["vit"], *options), *patterns)
    assert not (tmp_path / "a" / "checkpoint.pth").exists()


def test_a_resnet_has_no_tokens(checkpoints, evaluate):
    result = evaluate("a", "--checkpoint", checkpoints["resnet"], "--pool", "both")
    assert_one_line_error(result, "resnet10 has no tokens", "--pool")


@pytest.mark.parametrize("mode", [[], ["--finetune", "all"]])
def test_bad_folders(mode, checkpoints, evaluate, tmp_path):
    options = ["--checkpoint", checkpoints["vit"], *mode, "--data"]
    write_folder(tmp_path / "more", (20, 20), test=("ant", "bee", "cat"))
    assert_one_line_error(evaluate("a", *options, tmp_path / "more"), "cat")
    write_folder(tmp_path / "fewer", (20, 20), test=("ant",))
    assert_one_line_error(evaluate("a", *options, tmp_path / "fewer"), r"different classes \(bee\)")
    write_folder(tmp_path / "flat", (20, 20), train=(".",), test=("ant",))
    assert_one_line_error(evaluate("a", *options, tmp_path / "flat"), "no labels", "train/CLASS")
    write_folder(tmp_path / "flat2", (20, 20), test=())
    assert_one_line_error(evaluate("a", *options, tmp_path / "flat2"), "no labels", "val/CLASS")
    assert_one_line_error(evaluate("a", *options, tmp_path / "flat2" / "train" / "ant"), "no labels")
    (tmp_path / "empty").mkdir()
    assert_one_line_error(evaluate("a", *options, tmp_path / "empty"), "no images under .*empty")
    write_folder(tmp_path / "cut", (120, 120))
    path = tmp_path / "cut" / "train" / "bee" / "0.png"
    path.write_bytes(path.read_bytes()[:2000])
    result = evaluate("a", *options, tmp_path / "cut", "--batch_size", 24, "--epochs", 1)
    lines = [line for line in result.stderr.splitlines() if "error" in line]
    assert result.returncode == 2 and len(lines) == 1 and "0.png" in lines[0], result.stderr


def test_bad_checkpoints(checkpoints, evaluate, tmp_path):
    content = torch.load(checkpoints["vit"], weights_only=True)
    del content["student"]["backbone.blocks.1.attn.qkv.bias"]
    torch.save(content, tmp_path / "cut.pth")
    assert_one_line_error(evaluate("a", "--checkpoint", tmp_path / "cut.pth"), "does not fit", r"blocks\.1\.attn\.qkv\.bias")
    assert_one_line_error(evaluate("a", "--checkpoint", tmp_path / "nowhere.pth"), "no file")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    assert_one_line_error(evaluate("a", "--checkpoint", tmp_path / "text.pth"), "is not a PyTorch checkpoint")
    assert_one_line_error(evaluate("a"), "--arch")


def test_timm_vits_that_pool_otherwise(evaluate, tmp_path, monkeypatch):
    """timm's own pooling for one layer, tokens where asked for; no layer by [CLS], and no part that fine-tuning cannot reach."""
    import timm

    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: original(name, **options, **dict(global_pool="avg") if name == "test_vit" else {}))
    flags = ["--arch", "timm/test_vit", "--checkpoint", tmp_path / "avg.pth", "--img_size", 32, "--max_steps", 1, "--batch_size", 8]
    backbone = common.create_backbone("timm/test_vit", img_size=32)
    common.save_file(backbone.model.state_dict(), tmp_path / "avg.pth")
    assert_one_line_error(evaluate("a", *flags, "--layers", "all"), r"if its own output is \[CLS\]")
    assert evaluate("b", *flags, "--layers", "all", "--pool", "mean").returncode == 0
    network = eval_linear.Classifier(backbone, "mean", 10, head_only=False)
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)  # else several processes would stop
    gap = common.create_backbone("timm/test_vit2", img_size=32)
    common.save_file(gap.model.state_dict(), tmp_path / "gap.pth")
    flags = ["--arch", "timm/test_vit2", "--checkpoint", tmp_path / "gap.pth", "--img_size", 32, "--max_steps", 1]
    assert_one_line_error(evaluate("c", *flags, "--pool", "cls"), "has no tokens")
    assert evaluate("d", *flags, "--finetune", "all").returncode == 0


def test_randaugment_that_pillow_refuses_is_one_line(checkpoints, evaluate):
    """Without -inc1, small magnitudes ask for images of 0 bits."""
    result = evaluate("a", "--checkpoint", checkpoints["vit"], "--finetune", "all", "--randaugment", "rand-m2-n15", "--max_steps", 1,
                      "--num_workers", 0)
    assert_one_line_error(result, "--randaugment rand-m2-n15", "add -inc1")


@pytest.mark.figures
def test_compare_draws_means_over_seeds(tmp_path, capsys):
    """Folders that differ by their seed are one curve; the table has its mean and standard deviation; one line for mistakes."""
    for name, top1 in (("a-0", [10.0, 20.0]), ("a-1", [14.0, 20.0]), ("b-0", [1.0, 2.0])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"rows": [{"test_top1": value} for value in top1]}))
    eval_linear.compare([str(tmp_path / name) for name in ("a-0", "a-1", "b-0")], tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].split()[:4] == ["a", "n", "=", "2"] and "12.0 +- 2.8" in lines[0] and "20.0 +- 0.0" in lines[0]
    assert (tmp_path / "out" / "multi_exit.png").stat().st_size > 1000
    with pytest.raises(common.InputError, match="no results.json"):
        eval_linear.compare([str(tmp_path / "none")], tmp_path)
    for content in ("{", "[]", '{"rows": [{"top1": 1.0}]}'):
        (tmp_path / "b-0" / "results.json").write_text(content)
        with pytest.raises(common.InputError, match="no results.json of a probe"):
            eval_linear.compare([str(tmp_path / "b-0")], tmp_path)
    for place, value in (("x", 50.0), ("y", 80.0)):  # one name in two places: two curves
        (tmp_path / place / "digits").mkdir(parents=True)
        (tmp_path / place / "digits" / "results.json").write_text(json.dumps({"rows": [{"test_top1": value}] * 2}))
    capsys.readouterr()
    eval_linear.compare([str(tmp_path / place / "digits") for place in "xy"], tmp_path / "out")
    assert [line.split()[3] for line in capsys.readouterr().out.splitlines()] == ["1", "1"]
    (tmp_path / "b-0" / "results.json").write_text(json.dumps({"rows": [{"test_top1": 1.0}, {"test_top1": 2.0}]}))
    (tmp_path / "a-0" / "results.json").write_text(json.dumps({"rows": [{"test_top1": 1.0}]}))
    with pytest.raises(common.InputError, match="same number of layers"):
        eval_linear.compare([str(tmp_path / "a-0"), str(tmp_path / "b-0")], tmp_path)


def test_several_data_sets_are_one_table(evaluate, tmp_path):
    """Each in a folder of its own with the numbers of a run alone; then a line for each layer, and the mean."""
    for name in ("one", "two"):
        write_folder(tmp_path / name, (20, 20))
    flags = ["--arch", "vit_nano", "--patch_size", 8, "--img_size", 16, "--cached", "--layers", "all", "--epochs", 2, "--batch_size", 8]
    result = evaluate("both", *flags, "--data", tmp_path / "one", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    alone = evaluate("alone", *flags, "--data", tmp_path / "two")
    assert alone.returncode == 0, alone.stderr
    rows = {name: json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in ("both/one", "both/two", "alone")}
    assert rows["both/two"] == rows["alone"] and len(rows["alone"]) == 4
    lines = result.stdout.split("test top-1 in per cent\n")[1].splitlines()
    assert lines[0].split() == ["layer", "one", "two", "mean"] and len(lines) == 5
    first, second = (rows[f"both/{name}"][3]["test_top1"] for name in ("one", "two"))
    assert list(map(float, lines[4].split())) == pytest.approx([4, first, second, (first + second) / 2], abs=0.01)
    same = evaluate("same", *flags, "--data", tmp_path / "one", tmp_path / "x" / "one")
    assert_one_line_error(same, "two data sets of one name")


@pytest.mark.parametrize("name", ["test_vit2", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224", "test_convnext"])
def test_layer_decay_knows_the_tokens_and_the_stem_of_timms_models(name):
    """What the model itself lists has no weight decay; its own stem is layer 0; its blocks are layers in their order."""
    size = 56 if "eva" in name else 32
    model = Classifier(common.TimmBackbone(name, size, False), "cls", 10, False)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    scale, decay = {}, {}
    for group in layer_decay_groups(model, 0.05, 0.5):
        for parameter in group["params"]:
            scale[names[id(parameter)]] = group["lr_scale"]
            decay[names[id(parameter)]] = group["weight_decay"]
    theirs = model.backbone.model
    listed = theirs.no_weight_decay() if hasattr(theirs, "no_weight_decay") else set()
    present = [f"backbone.model.{key}" for key in listed if f"backbone.model.{key}" in decay]
    assert all(decay[key] == 0 for key in present) and (present or name == "test_convnext")
    stem = [key for key in scale if re.match(theirs.group_matcher()["stem"].replace("^", ""), key.removeprefix("backbone.model."))]
    assert stem and {scale[key] for key in stem} == {min(scale.values())}
    assert scale["head.weight"] == scale["norm.weight"] == 1.0
    blocks = {}
    for key, value in scale.items():
        if place := re.match(r"backbone\.model\.(?:stages\.(\d+)\.)?blocks\.(\d+)", key):
            blocks.setdefault(tuple(int(x or 0) for x in place.groups()), set()).add(value)
    assert all(len(values) == 1 for values in blocks.values())
    ordered = [min(blocks[key]) for key in sorted(blocks)]
    assert ordered == sorted(ordered) and ordered[0] < ordered[-1] < 1.0
