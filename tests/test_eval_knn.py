"""eval_knn.py: each measure against hand-computed values and naive loops, other people's checkpoints, every task in its real
file layout, the command line, and bad input."""
import argparse
import functools
import io
import json
import math
import pickle
import re
import shutil
import signal
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import SHARED, assert_one_line_error, finished, run_script
from matplotlib.axes import Axes
from PIL import Image, ImageFilter
from scipy.ndimage import binary_dilation, maximum_filter, minimum_filter
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch.testing import assert_close
from torchvision.transforms.functional import InterpolationMode, normalize, pil_to_tensor
from torchvision.transforms.v2.functional import resize  # rounds otherwise than v1

import common
import eval_knn
from common import InputError, load_backbone, load_data
from eval_knn import knn_classifier

close = functools.partial(assert_close, rtol=1e-4, atol=1e-4)


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """evaluate(*arguments): the command line without the start of an interpreter -> what run_script would return."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["eval_knn.py", "--device", "cpu", *map(str, arguments)])
        return finished(capsys, lambda: sys.exit(eval_knn.main() or 0))

    return call


@pytest.fixture
def mine(evaluate, ours):
    return functools.partial(evaluate, "--checkpoint", ours, "--num_workers", 0)


def table(result):
    """{(layer, k or setup): (values)} of what was printed."""
    assert result.returncode == 0, (result.stdout, result.stderr)
    rows = re.findall(r"^ *(last|\d+) +(\d+|Medium|Hard|strong|val) +([\d. ]+)$", result.stdout, re.M)
    found = {(layer, setup): tuple(map(float, values.split())) for layer, setup, values in rows}
    assert found and len(found) == len(rows), result.stdout
    return found


def noisy(model, seed):
    """Every weight random, biases and norms too, so that none can go missing without notice."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


# -------------------------------------------------------------------------------------------------------- knn_classifier


def naive_scores(train, labels, test, k, temperature, classes):
    """The nearest vote one after the other."""
    scores = torch.zeros(len(test), classes, dtype=torch.float64)
    for votes, query in zip(scores, test.double(), strict=True):
        cosines = F.cosine_similarity(query[None], train.double())
        for i in cosines.argsort(descending=True)[:k]:
            votes[labels[i]] += torch.exp(cosines[i] / temperature)
    return scores.float()


@pytest.fixture
def points():
    """60 training and 23 test features of 5 classes, of every length."""
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(60, 7, generator=generator), torch.randn(23, 7, generator=generator)
    return train * (torch.rand(60, 1, generator=generator) * 10 + 0.1), torch.arange(60) % 5, test


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("k", [1, 3, 10, 20, 60, 200])
def test_scores_are_those_of_a_naive_loop(points, k, temperature):
    """k is cut to the training set; the same scores for every chunk; lengths of features do not matter."""
    train, labels, test = points
    expected = naive_scores(*points, k, temperature, 5)
    sevens = knn_classifier(*points, k, temperature, chunk=7)
    longer = knn_classifier(train * torch.linspace(0.5, 90, 60)[:, None], labels, test * 1000, k, temperature)
    for found in (sevens, longer):
        assert_close(found, expected, rtol=1e-4, atol=1e-6)
    for chunk in (1, 4, 22, 23, 10**9):
        assert_close(knn_classifier(*points, k, temperature, chunk=chunk), sevens, rtol=1e-5, atol=0)


def test_number_of_classes_and_of_labels(points):
    scores, wider = knn_classifier(*points, 10), knn_classifier(*points, 10, 0.07, num_classes=8)  # DINO's temperature
    assert scores.shape == (23, 5) and wider.shape == (23, 8)
    assert torch.equal(wider[:, :5], scores) and not wider[:, 5:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_double_precision_stays_and_half_is_computed_in_fp32(points, dtype, autocast):
    # lengths near 1000: their squares are beyond fp16
    train, labels, test = points[0].mul(100).to(dtype), points[1], points[2].mul(300).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = knn_classifier(train, labels, test, 10)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(scores.float(), naive_scores(train, labels, test, 10, 0.07, 5), rtol=1e-4, atol=1e-6)


def test_top1_and_top5_are_those_of_scikit_learn(points):
    train, _, test = points
    labels, test_labels = torch.arange(60) % 12, torch.arange(23) % 12
    scores = naive_scores(train, labels, test, 30, 0.07, 12)
    top1, top5 = (100 * top_k_accuracy_score(test_labels, scores, k=k, labels=range(12)) for k in (1, 5))
    assert 0 < top1 < top5 < 100
    assert eval_knn.top1_top5(train, labels, test, test_labels, 30, 0.07, 12) == pytest.approx((top1, top5))
    top1, top5 = eval_knn.top1_top5(train, labels, test, test_labels, 1, 0.07, 12)
    assert top1 == top5  # only the neighbour's class has a vote, and the others are no hits
    assert eval_knn.top1_top5(train, labels % 2, test, test_labels % 2, 60, 0.07, 2)[1] == 100  # fewer than five classes


# --------------------------------------------------------------------------------------------- other people's checkpoints


def vit(seed):
    """timm's ViT-Ti/16 for 32 pixels with every weight random."""
    return noisy(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5), seed)


def cls_of(model, x):
    return model.forward_features(x)[:, 0]


@pytest.fixture(scope="module")
def student():
    return vit(1)


def prefixed(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


def body(model):
    return {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}


def ibot(student, teacher):
    """Without the mask's tokens and one head it is DINO's."""
    keys = "mlp.0.weight", "last_layer.weight_g", "last_layer.weight_v", "last_layer2.weight_v"
    head = {f"head.{key}": torch.randn(9, 8) for key in keys}
    student, teacher = (prefixed("backbone.", body(m) | {"masked_embed": torch.randn(1, 192)}) | head for m in (student, teacher))
    return {"student": prefixed("module.", student), "teacher": teacher, "epoch": 100,
            "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}}


def moco(student, teacher):
    head = {"head.0.weight": torch.randn(8, 192), "head.1.running_mean": torch.zeros(8), "head.3.weight": torch.randn(8, 8)}
    return {"epoch": 300, "arch": "vit_small", "state_dict":
            prefixed("module.base_encoder.", body(student) | head) | prefixed("module.momentum_encoder.", body(teacher) | head)
            | prefixed("module.predictor.", {"0.weight": torch.randn(8, 8)})}


def prepared(images, size, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    """(N, 3, H, W) of bytes, or their files, as a backbone takes them."""
    if isinstance(images, list):
        images = torch.stack([pil_to_tensor(Image.open(path)) for path in images])
    x = F.interpolate(images.float() / 255, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return normalize(x, mean, std)


@pytest.mark.parametrize("write, network, expected", [
    (ibot, None, "teacher"), (ibot, "teacher", "teacher"), (ibot, "student", "student"),
    (moco, None, "student"), (moco, "student", "student"), (moco, "teacher", "teacher")])
def test_other_peoples_weights_give_their_outputs(write, network, expected, student, evaluate, small_folder, tmp_path):
    models = {"student": student, "teacher": vit(2)}
    torch.save(write(**models), tmp_path / "weights.pth")
    result = evaluate("--arch", "vit_tiny", "--patch_size", 16, "--img_size", 32, "--checkpoint", tmp_path / "weights.pth",
                      "--data", small_folder, "--features", tmp_path / "f.pth", *(["--network", network] if network else []))
    assert f"{network or 'weights'} of {tmp_path}/weights.pth" in result.stdout
    saved = torch.load(tmp_path / "f.pth", weights_only=True)["test"]
    outputs = {name: cls_of(model, prepared(saved["paths"], 32)) for name, model in models.items()}
    assert not torch.allclose(outputs["student"], outputs["teacher"], atol=0.1)  # or the choice could not be told
    close(saved["features"], outputs[expected])


def test_layers_and_tokens_are_those_of_timm(student, tmp_path):
    torch.save(student.state_dict(), tmp_path / "weights.pth")
    x = torch.randn(2, 3, 32, 32)
    expected = student.get_intermediate_layers(x, n=12, return_prefix_tokens=True, norm=True)
    for arch in ("timm/vit_tiny_patch16_224", "vit_tiny"):
        backbone, _ = load_backbone(str(tmp_path / "weights.pth"), arch, 16, 32)
        close(backbone(x), cls_of(student, x))
        layers = backbone(x, layers=True)
        for n in (1, 12):
            for layer, (cls, patches), (theirs, prefix) in zip(layers[-n:], backbone.tokens(x, n), expected[-n:], strict=True):
                close(layer, prefix[:, 0])
                close(cls, prefix[:, 0])
                close(patches, theirs.view(2, 2, 2, 192))
        assert len(layers) == 12
    assert backbone.tokens(torch.randn(1, 3, 48, 80), 1)[0][1].shape == (1, 3, 5, 192)


# ------------------------------------------------------------------------------------------------------- the command line

COLOURS = {"ant": (255, 0, 0), "bee": (0, 255, 0), "cat": (0, 0, 255)}
MEAN, STD = [0.4, 0.5, 0.6], [0.3, 0.2, 0.25]  # not ImageNet's, to see that they are taken from the file


def write_image(path, colour, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], colour).save(path)


def make_folder(root, size_of):
    """9 training and 6 test images, one colour a class, but one test image of the class ant has the colour of cat."""
    for name, colour in COLOURS.items():
        for i in range(3):
            write_image(root / "train" / name / f"{i}.png", colour, size_of(i))
        write_image(root / "val" / name / "a.png", colour, size_of(0))
        write_image(root / "val" / name / "b.png", COLOURS["cat"] if name == "ant" else colour, size_of(1))
    return root


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("small"), lambda i: (20, 20))  # of one size: kept in memory


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("large"), lambda i: (30 + 10 * i, 120))  # decoded by the workers


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A checkpoint of this repository, of which the student is to be evaluated."""
    torch.manual_seed(0)
    backbone = {"arch": "vit_nano", "img_size": 16, "patch_size": 4, "depth": 3}
    student = noisy(common.create_backbone(**backbone, mask_token=True), 4).state_dict()
    del student["mask_token"]
    weights = prefixed("backbone.", student) | {"projector.0.weight": torch.randn(8, 96)}
    path = tmp_path_factory.mktemp("run") / "checkpoint.pth"
    torch.save({"student": weights, "step": 7, "args": {"lr": 0.1},
                "meta": {"network": "student", "backbone": backbone, "mean": MEAN, "std": STD}}, path)
    return path


@pytest.fixture(scope="module")
def digits_features(ours):
    """[(train, test) for each of the 3 layers] of the digits under `ours`, and their labels, made without our pipeline."""
    weights = torch.load(ours, weights_only=True)["student"]
    model = common.vit_nano(img_size=16, patch_size=4, depth=3).eval().requires_grad_(False)
    model.load_state_dict({key[9:]: value for key, value in weights.items() if key.startswith("backbone.")})
    splits = load_data("digits")
    layers = [[y[:, 0] for y in model.get_intermediate_layers(prepared(data.images, 16, MEAN, STD), 3)] for data in splits]
    return list(zip(*layers, strict=True)), [data.labels for data in splits]


def sklearn_knn(train, train_labels, test, test_labels, k):
    """Top-1 and top-5 of scikit-learn's k-NN with DINO's weights."""
    knn = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07))
    votes, order = torch.from_numpy(knn.fit(train.numpy(), train_labels.numpy()).predict_proba(test.numpy())).sort(1, descending=True)
    hits = (order == test_labels[:, None]) & (votes > 0)  # a class without a vote is no hit
    return 100 * hits[:, 0].float().mean().item(), 100 * hits[:, :5].any(1).float().mean().item()


@pytest.mark.parametrize("processes", [1, 2])
def test_digits_against_scikit_learn(processes, ours, digits_features, tmp_path):
    save = ["--features", tmp_path / "f.pth"] if processes == 2 else []
    result = run_script("eval_knn.py", "--checkpoint", ours, "--data", "digits", "--device", "cpu", *save, processes=processes)
    found, (layers, (train_labels, test_labels)) = table(result), digits_features
    assert list(found) == [("last", k) for k in ("10", "20", "100", "200")]
    for (_, k), accuracy in found.items():
        expected = sklearn_knn(layers[-1][0], train_labels, layers[-1][1], test_labels, int(k))
        assert accuracy == pytest.approx(expected, abs=0.3)  # one of the 360 test images is 0.28
    for words in ("vit_nano of 16 pixels: student of ", "1437 train images, 360 test images, 10 classes", "T = 0.07",
                  f"{processes} process(es)"):
        assert words in result.stdout
    assert "features: " in result.stderr  # the bar
    if save:  # 1437 images do not divide by two
        saved = torch.load(tmp_path / "f.pth", weights_only=True)
        for features, split in zip(layers[-1], ("train", "test"), strict=True):
            close(saved[split]["features"], features)


def test_all_layers_in_one_pass(mine, digits_features, tmp_path):
    result = mine("--layers", "all", "--k", 20, 5000, "--features", tmp_path / "new" / "f.pth")
    assert "best: layer" in result.stdout
    found, (layers, labels) = table(result), digits_features
    assert list(found) == [(layer, k) for layer in "123" for k in ("20", "5000")]  # of 1437
    saved = torch.load(tmp_path / "new" / "f.pth", weights_only=True)
    assert list(saved) == ["train", "test"] and not list(tmp_path.glob("new/*.tmp"))
    for side, split in enumerate(saved.values()):
        assert torch.equal(split["labels"], labels[side]) and split["classes"] == list(range(10))
        assert torch.equal(split["paths"], torch.arange(len(labels[side])))
        for got, expected in zip(split["features"], layers, strict=True):
            close(got, expected[side])
    for layer, (train, test) in zip("123", layers, strict=True):
        assert found[layer, "20"] == pytest.approx(sklearn_knn(train, labels[0], test, labels[1], 20), abs=0.3)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("folder", ["small_folder", "large_folder"])
def test_class_folders(folder, workers, mine, tmp_path, request):
    folder = request.getfixturevalue(folder)
    result = mine("--data", folder, "--num_workers", workers, "--k", 3, "--batch_size", 4, "--features", tmp_path / "f.pth")
    assert table(result)["last", "3"] == (83.33, 83.33)  # 5 of 6: one ant looks like three cats, so that "ant" has no vote
    assert "9 train images, 6 test images, 3 classes" in result.stdout
    saved = torch.load(tmp_path / "f.pth", weights_only=True)["test"]
    assert saved["paths"] == sorted(str(path) for path in folder.glob("val/*/*.png"))
    assert saved["classes"] == ["ant", "bee", "cat"] and saved["labels"].tolist() == [0, 0, 1, 1, 2, 2]
    assert saved["features"].shape == (6, 96)


@pytest.mark.parametrize("layers", ["last", "all"])
def test_flat_folder_without_labels(layers, mine, tmp_path):
    for i, colour in enumerate(COLOURS.values()):
        write_image(tmp_path / "flat" / f"{i}.png", colour, (20, 20))
    arguments = ["--data", tmp_path / "flat", "--layers", layers]
    assert_one_line_error(mine(*arguments), "needs labels", "flat", "--features")
    result = mine(*arguments, "--features", tmp_path / "f.pth")
    assert result.returncode == 0 and "k-NN skipped" in result.stdout and "top-1" not in result.stdout
    saved = torch.load(tmp_path / "f.pth", weights_only=True)
    assert list(saved) == ["train"] and saved["train"]["labels"].tolist() == [-1, -1, -1]
    assert saved["train"]["paths"] == [str(tmp_path / "flat" / f"{i}.png") for i in range(3)]
    features = saved["train"]["features"]
    assert [f.shape for f in features] == [(3, 96)] * 3 if layers == "all" else features.shape == (3, 96)


@pytest.mark.parametrize("save", [False, True])
def test_images_without_a_label_do_not_vote(save, mine, monkeypatch, tmp_path):
    """STL-10's training split is mostly unlabelled."""
    train, test = (common.ImageData(data.labels[:60], data.classes, data.images[:60]) for data in load_data("digits"))
    half, labels = common.ImageData(train.labels[::2], train.classes, train.images[::2]), train.labels.clone()
    labels[1::2] = -1
    mixed = common.ImageData(labels, train.classes, train.images)
    monkeypatch.setattr(eval_knn, "load_data", lambda *_: (half, test))
    expected = table(mine("--k", 5, 30))
    monkeypatch.setattr(eval_knn, "load_data", lambda *_: (mixed, test))
    assert table(mine("--k", 5, 30, *(["--features", tmp_path / "f.pth"] if save else []))) == expected
    if save:
        assert torch.equal(torch.load(tmp_path / "f.pth", weights_only=True)["train"]["labels"], labels)


def test_no_checkpoint_means_random_weights_and_says_so(evaluate, small_folder, tmp_path):
    def features(*options):
        result = evaluate("--arch", "vit_nano", "--patch_size", 8, "--img_size", 16, "--data", small_folder,
                          "--features", tmp_path / "f.pth", "--overwrite", *options)
        assert "random weights" in result.stdout and result.returncode == 0
        return torch.load(tmp_path / "f.pth", weights_only=True)["test"]["features"]

    first, half = features(), features("--dtype", "bf16")
    assert torch.equal(features("--seed", 0), first) and not torch.allclose(features("--seed", 1), first)
    assert not torch.equal(half, first) and torch.allclose(half, first, atol=0.1)


def test_image_size_overrides_the_checkpoints(mine, ours, small_folder, tmp_path):
    assert "img_size 24" in mine("--data", small_folder, "--features", tmp_path / "f.pth", "--img_size", 24).stdout
    saved = torch.load(tmp_path / "f.pth", weights_only=True)["test"]
    close(saved["features"], load_backbone(str(ours))[0](prepared(saved["paths"], 24, MEAN, STD)))


def test_an_evaluation_can_be_interrupted(mine, small_folder):
    before = signal.getsignal(signal.SIGINT)
    assert table(mine("--data", small_folder))
    handler = signal.getsignal(signal.SIGINT)  # ends the command at once
    assert handler is not before
    with pytest.raises(KeyboardInterrupt):
        handler(signal.SIGINT, None)


def test_several_data_sets_give_one_table(mine, monkeypatch, small_folder, large_folder):
    """Each with the numbers that it has alone, and the mean; a named one is looked for in --data_path."""
    asked, real = [], load_data
    alone = [table(mine("--data", data, "--k", 3, 400)) for data in ("digits", small_folder, large_folder)]

    def load(data, path):
        asked.append((data, path))
        return real("digits" if data == "pets" else data)

    monkeypatch.setattr(eval_knn, "load_data", load)
    result = mine("--data", "pets", small_folder, large_folder, "--data_path", "somewhere", "--k", 3, 400)
    assert result.returncode == 0 and result.stdout.count("9 train images, 6 test images, 3 classes") == 2
    assert asked == [(str(data), "somewhere") for data in ("pets", small_folder, large_folder)]
    heading, *rows = (line.split() for line in result.stdout.split("top-1 in per cent\n")[1].splitlines())
    assert heading == ["pets", small_folder.name, large_folder.name, "mean"]
    assert [row[:2] for row in rows] == [["last", "3"], ["last", "400"]]
    for layer, k, *values in rows:
        expected = [numbers[layer, k][0] for numbers in alone]
        assert list(map(float, values)) == pytest.approx([*expected, np.mean(expected)], abs=0.01)


# -------------------------------------------------------------------------------------------------------------- bad input


def test_bad_input_through_the_shell(tmp_path):
    assert_one_line_error(run_script("eval_knn.py", "--arch", "vit_nano", "--data", tmp_path / "nowhere"), "nowhere", "digits")


@pytest.mark.parametrize("options, says", [
    ("--img_size 18", "18 x 18.*patch size 4"),
    ("--arch vit_tiny", "vit_nano.*vit_tiny"),
    ("--patch_size 8", "--patch_size 8"),
    ("--network teacher", "no teacher.*--network"),
    ("--k 10 0", "argument --k: 0 is not a number of at least 1"),
    ("--batch_size 0", "argument --batch_size: 0 is not a number of at least 1"),
    ("--temperature 0.001", "argument --temperature: 0.001 is not a number of at least 0.012"),
    ("--temperature nan", "argument --temperature: nan is not a number"),
    ("--task retrieval --scales 1 0", "argument --scales: 0 is not a number"),
    ("--task knn --scales 1", "--scales is not for --task knn, but for retrieval, copy"),
    ("--task video --whitening x", "--whitening is not for --task video"),
    ("--task copy --k 3", "--k is not for --task copy, but for knn, video"),
    ("--task video --k 3 4", "takes one --k"),
    ("--task copy --features f.pth", "--features is not for --task copy"),
    ("--features=", "argument --features: the name is empty"),
    ("--layers all --output_dir /dev/null/x --compare tests", "tests/results.json holds no results of --task"),
    ("--data digits mnist --features f.pth", "--features takes one data set"),
    ("--data nowhere", "nowhere is neither a directory nor"),
    ("--task copy --data nowhere", "no images under nowhere/original"),
    ("--task retrieval --data nowhere", "nowhere has 0 gnd_"),
    ("--task video --data nowhere", "no nowhere/ImageSets/2017/val.txt"),
    ("--device cuda", "--device cuda is not available"),
])
def test_bad_values(options, says, mine, small_folder):
    assert_one_line_error(mine("--data", small_folder, *options.split()), says)


@pytest.mark.parametrize("options, says", [
    ("", "--arch"),
    ("--arch vit_smal", "unknown --arch vit_smal.*vit_small.*timm/NAME"),
    ("--arch timm/vit_smal", "timm has no model 'vit_smal'"),
    ("--arch vit_nano --img_size 100", "100 x 100.*patch size 16"),
    ("--arch vit_nano --checkpoint nowhere.pth", "no file .*nowhere.pth"),
])
def test_bad_values_without_a_checkpoint(options, says, evaluate, small_folder):
    assert_one_line_error(evaluate("--data", small_folder, *options.split()), says)


def test_bad_folders(mine, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "train" / "ant").mkdir(parents=True)
    for folder, train in ((tmp_path / "other", "ant/"), (tmp_path / "flat", "")):
        write_image(folder / "train" / f"{train}0.png", COLOURS["ant"], (20, 20))
        write_image(folder / "val" / "bee" / "0.png", COLOURS["bee"], (20, 20))
    for folder, says in {"empty": "no images under .*empty", "hollow": "class folder .*train/ant has no images", "other": "bee",
                         "flat": "needs labels.*train/CLASS"}.items():
        assert_one_line_error(mine("--data", tmp_path / folder), says)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("size", [(20, 20), (200, 200)])
def test_truncated_image_is_named(size, workers, mine, tmp_path):
    for i in range(12):
        write_image(tmp_path / f"{i:02}.png", (20 * i, 0, 0), size)
    broken = tmp_path / "11.png"
    broken.write_bytes(broken.read_bytes()[:50])
    result = mine("--data", tmp_path, "--features", tmp_path / "f.pth", "--num_workers", workers)
    assert_one_line_error(result, "cannot read image .*11.png.*replace or delete")
    assert not (tmp_path / "f.pth").exists()


@pytest.mark.parametrize("options", [["--output_dir", "README.md/x"], ["--features", "README.md/x/f.pth"]])
def test_a_folder_that_cannot_be_made(options, mine):
    assert_one_line_error(mine(*options), "README.md/x", code=1)


def test_files_are_not_replaced_unasked(mine, tmp_path):
    """--features over a checkpoint or a folder: one line, before the work; --overwrite replaces a file."""
    file = tmp_path / "f.pth"
    file.write_bytes(b"precious")
    assert_one_line_error(mine("--features", tmp_path), "already exists.*--overwrite")
    assert_one_line_error(mine("--features", file), "f.pth already exists.*--overwrite")
    assert_one_line_error(mine("--features", tmp_path, "--overwrite"), "is a folder: name a file")
    assert file.read_bytes() == b"precious"
    assert mine("--features", file, "--overwrite").returncode == 0


def test_every_flag_is_read(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval_knn.py"])
    source = open(eval_knn.__file__).read() + "args.seed args.device"  # read by `setup`
    for name in vars(eval_knn.parse_arguments()):
        assert re.search(rf"\bargs\.{name}\b", source), name


# --------------------------------------------------------------------------------------------- average precision, whitening


def similarities(order):
    """(N,) such that images are ranked in this order."""
    return -torch.tensor(order).argsort().float()


def test_easy_hard_and_junk_by_hand():
    # ranked: 4 (junk), 0 (easy), 3 (nothing), 1 (hard), 2 (hard), 5 (nothing)
    ranked = similarities([4, 0, 3, 1, 2, 5])
    medium, *at = eval_knn.judge(ranked, [0, 1, 2], [4])  # ranks 0, 2, 3 once the junk is gone
    assert medium == pytest.approx(((1 + 1) + (1 / 2 + 2 / 3) + (2 / 3 + 3 / 4)) / 6)
    assert at == pytest.approx([1, 3 / 4, 3 / 4])  # k is cut to 4, the last positive's rank
    hard, *at = eval_knn.judge(ranked, [1, 2], [4, 0])  # the easy one is junk as well: ranks 1, 2
    assert hard == pytest.approx(((0 + 1 / 2) + (1 / 2 + 2 / 3)) / 4)
    assert at == pytest.approx([0, 2 / 3, 2 / 3])
    # ranks 0 and 2: trapezoids (1 + 1) / 2 and (1/2 + 2/3) / 2, each half of the recall; rank 1: (0 / 1 + 1 / 2) / 2
    assert eval_knn.judge(ranked, [4, 3])[0] == pytest.approx((1 + 7 / 12) / 2) and eval_knn.judge(ranked, [0])[0] == 0.25
    assert eval_knn.judge(ranked, [4], [0]) == [1, 1, 1, 1] == eval_knn.judge(ranked, [4], [4, 0])  # a positive is not junk


def test_judge_is_a_naive_loop():
    generator = np.random.default_rng(0)
    for _ in range(20):
        labels = generator.integers(0, 4, 30)  # 0: nothing, 1: positive, 2: junk, 3: nothing
        labels[0] = 1
        order = generator.permutation(30).tolist()
        hits = [labels[image] == 1 for image in order if labels[image] != 2]
        precision = [1.0] + [sum(hits[:n]) / n for n in range(1, len(hits) + 1)]
        ranks = [rank for rank, hit in enumerate(hits) if hit]
        areas = [(precision[rank] + precision[rank + 1]) / 2 for rank in ranks]
        expected = [np.mean(areas)] + [precision[min(k, ranks[-1] + 1)] for k in (1, 5, 10)]
        found = eval_knn.judge(similarities(order), *(np.flatnonzero(labels == kind).tolist() for kind in (1, 2)))
        assert found == pytest.approx(expected)


def test_whitening_against_its_closed_form():
    points = torch.tensor([[2.0, 0], [-2, 0], [0, 1], [0, -1]]) + torch.tensor([5.0, 7])  # variances 2 and 1/2
    mean, matrix = eval_knn.whitening(points)
    assert mean.tolist() == [5, 7]
    # ascending variances: y / sqrt(1/2), x / sqrt(2), up to signs
    assert_close(matrix.abs(), torch.tensor([[0, 0.5**0.5], [2**0.5, 0]]))
    five = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))  # span 4 dimensions: empty directions are left out
    for features, rank, atol in ((points @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]]), 2, 1e-5), (five, 4, 1e-4)):
        mean, matrix = eval_knn.whitening(features)
        white = (features - mean) @ matrix
        assert matrix.shape == (features.shape[1], rank) and matrix.dtype == torch.float32
        assert_close(white.T @ white / len(features), torch.eye(rank), atol=atol, rtol=0)
    with pytest.raises(InputError, match="whitening cannot be learnt from 1 images"):
        eval_knn.whitening(five[:1])


def test_gem_by_hand():
    patches = torch.tensor([[1.0, -3], [2, -1]]).view(1, 2, 1, 2)
    assert_close(eval_knn.gem(patches), torch.tensor([[(17 / 2) ** 0.25, 1e-6]]))
    assert_close(eval_knn.gem(patches, p=1)[:, 0], torch.tensor([1.5]))
    assert eval_knn.gem(patches.bfloat16()).dtype == torch.float32


# --------------------------------------------------------------------------------------------------------------- J and F


def rectangle(top, left, height, width, size=(100, 100)):
    mask = np.zeros(size, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def test_region_similarity_by_hand():
    a, b, none = rectangle(0, 0, 4, 4), rectangle(0, 2, 4, 4), rectangle(0, 0, 0, 0)
    for one, other, j in ((a, b, 8 / 24), (a, a, 1), (a, ~a, 0), (none, none, 1), (none, a, 0)):
        assert eval_knn.region_similarity(one, other) == j


def test_boundary_by_hand():
    found = eval_knn.boundary(rectangle(1, 1, 2, 2, (5, 5)))
    assert found.astype(int).tolist() == [[1, 1, 1, 0, 0], [1, 0, 1, 0, 0], [1, 1, 1, 0, 0], [0] * 5, [0] * 5]
    found = eval_knn.boundary(rectangle(2, 2, 3, 3, (4, 4)))  # beyond the border there is no boundary
    assert found.astype(int).tolist() == [[0] * 4, [0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 0, 0]]


def test_contour_accuracy_by_hand():
    square, edge, none = rectangle(40, 40, 10, 10), rectangle(0, 0, 100, 50), rectangle(0, 0, 0, 0)
    # 0.8 % of the diagonal of 100 x 100 is 1.13, rounded up 2 pixels
    for found, true, f in ((square, square, 1), (none, none, 1), (square, none, 0), (none, square, 0),
                           (square, rectangle(40, 42, 10, 10), 1), (square, rectangle(40, 80, 10, 10), 0),
                           (edge, rectangle(0, 0, 100, 52), 1), (edge, rectangle(0, 0, 100, 53), 0)):
        assert eval_knn.contour_accuracy(found, true) == f
    assert 0 < eval_knn.contour_accuracy(square, rectangle(40, 43, 10, 10)) < 1
    half = edge & ~rectangle(50, 0, 50, 50)  # the upper half of the edge, and one below it
    assert eval_knn.contour_accuracy(half, edge) == pytest.approx(naive_f(half, edge))


def test_void_pixels_are_no_object():
    """As in DAVIS's semi-supervised evaluation: 255 is background in the truth, and a prediction there is wrong."""
    true, predicted = np.zeros((100, 100), np.uint8), np.zeros((100, 100), np.uint8)
    true[:, :50], true[:, 50:60], predicted[:, :60] = 1, 255, 1
    (j, f), = eval_knn.score(predicted, true, 1)
    assert j == pytest.approx(50 / 60) and f == eval_knn.contour_accuracy(predicted == 1, rectangle(0, 0, 100, 50)) == 0
    assert eval_knn.score((true == 1).astype(np.uint8), true, 1) == [(1.0, 1.0)]


def naive_f(found, true, tolerance=0.008):
    """Boundaries, where 2 x 2 pixels are not all the same, dilated by a disk."""
    radius = math.ceil(tolerance * math.sqrt(true.shape[0] ** 2 + true.shape[1] ** 2))
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    square = dict(size=2, origin=-1, mode="nearest")
    found, true = (maximum_filter(mask, **square) != minimum_filter(mask, **square) for mask in (found, true))
    if not found.any() or not true.any():
        return float(found.any() == true.any())
    near_found, near_true = (binary_dilation(mask, x * x + y * y <= radius * radius) for mask in (found, true))
    precision, recall = found[near_true].sum() / found.sum(), true[near_found].sum() / true.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_contour_accuracy_is_dilation_by_a_disk():
    generator = torch.Generator().manual_seed(0)
    for trial, size in enumerate([(30, 40), (160, 90), (97, 20)] * 3):
        soft = F.interpolate(torch.randn(1, 2, 5, 6, generator=generator), size, mode="bilinear")[0]
        a, b = (soft[0] > 0).numpy(), (soft[0] + 0.2 * trial * soft[1] > 0.1).numpy()
        for options in ({}, {"tolerance": 0.05}):
            assert eval_knn.contour_accuracy(a, b, **options) == pytest.approx(naive_f(a, b, **options))


# ------------------------------------------------------------------------------------------------------ label propagation


def naive_propagation(features, labels, target, k, temperature, reach):
    n, h, w, _ = features.shape
    found = torch.zeros(h, w, labels.shape[-1])
    for i, j in np.ndindex(h, w):
        near = [(f, y, x) for f, y, x in np.ndindex(n, h, w) if abs(y - i) <= reach and abs(x - j) <= reach]
        best = sorted(((F.cosine_similarity(target[i, j], features[place], 0).item(), place) for place in near), reverse=True)[:k]
        total = sum(math.exp(cosine / temperature) for cosine, _ in best)
        found[i, j] = sum(math.exp(cosine / temperature) / total * labels[place] for cosine, place in best)
    return found


@pytest.mark.parametrize("k, temperature, reach", [(5, 0.1, 1), (1, 0.1, 3), (9, 1.0, 2), (500, 0.5, 9)])
def test_propagation_is_a_naive_loop(k, temperature, reach):
    generator = torch.Generator().manual_seed(0)
    features, target = torch.randn(3, 4, 5, 6, generator=generator), torch.randn(4, 5, 6, generator=generator)
    labels = torch.rand(3, 4, 5, 2, generator=generator)
    expected = naive_propagation(features, labels, target, k, temperature, reach)
    assert_close(eval_knn.propagate(features, labels, target, k, temperature, reach), expected, rtol=1e-4, atol=1e-5)


def test_propagation_holds_one_row_of_cosines(monkeypatch):
    features, target = torch.randn(4, 40, 30, 8), torch.randn(40, 30, 8)
    sizes, topk = [], torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, *rest: sizes.append(x.numel()) or topk(x, *rest))
    eval_knn.propagate(features, features, target, neighbourhood=5)
    assert len(sizes) == 40 and max(sizes) == 30 * 4 * 11 * 30  # of the rows that are near


def moving_square(step):
    return rectangle(8 + 4 * (step // 2), 8 + 4 * step, 24, 24, (96, 128))


def test_moving_square_with_ideal_features():
    """Features that say what a patch shows carry the square along."""
    settings = argparse.Namespace(k=[5], temperature=0.1, neighbourhood=12, context=7)
    generator = torch.Generator().manual_seed(0)
    names = F.normalize(torch.randn(4 + 24 * 24 // 16, 64, generator=generator), dim=1)  # background, and parts of the square

    def ideal(step):
        what = np.zeros((96, 128), int)
        what[moving_square(step)] = np.arange(1, 37).reshape(6, 6).repeat(4, 0).repeat(4, 1).flatten()
        return names[torch.from_numpy(what[2::4, 2::4])]  # (24, 32, 64)

    objects, labels = eval_knn.first_labels(moving_square(0).astype(np.uint8), (24, 32), "mask.png")
    assert objects == 1 and labels.shape == (24, 32, 2)
    memory, scores = [(ideal(0), labels)], []
    for step in range(1, 16):
        mask = eval_knn.hard_labels(eval_knn.carry(memory, ideal(step), settings), (96, 128)) == 1
        scores.append(eval_knn.region_similarity(mask, moving_square(step)))
    assert min(scores) > 0.95 and np.mean(scores) > 0.98


def test_the_first_frame_and_the_last_are_remembered(monkeypatch):
    seen = []

    def note(features, labels, target, *_):
        seen.append((features[:, 0, 0, 0].tolist(), labels[:, 0, 0, 0].tolist()))
        return 10 * target

    monkeypatch.setattr(eval_knn, "propagate", note)
    settings = argparse.Namespace(k=[5], temperature=0.1, neighbourhood=12, context=3)
    first, *frames = torch.arange(6.0).view(6, 1, 1, 1)
    memory = [(first, first - 1)]
    for frame in frames:
        eval_knn.carry(memory, frame, settings)
    assert [f for f, _ in seen] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 2, 3, 4]]
    assert seen[-1][1] == [-1, 20, 30, 40]


def test_soft_labels_are_stretched_before_the_largest_wins():
    labels = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.9, 0.1]]).view(1, 3, 2)
    assert eval_knn.hard_labels(labels, (1, 3)).tolist() == [[0, 1, 0]]
    assert eval_knn.hard_labels(torch.ones(2, 2, 1), (4, 4)).max() == 0  # nothing to stretch


# ----------------------------------------------------------------------------------------------------------- ground truths


def ground_truth(array=list, number=int):
    return {"imlist": ["a", "b", "c", "d"], "qimlist": ["q"],
            "gnd": [{"bbx": array([1.5, 2.0, 30.0, 40.0]), "easy": array([0]), "hard": array([1, number(3)]), "junk": array([])}]}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("array", [list, np.array, lambda x: np.array(x, ">i4"), lambda x: np.array(x, object)])
def test_ground_truths_of_all_makers(protocol, old, array, tmp_path):
    truth = ground_truth(array, np.int64)
    truth["gnd"][0]["bbx"] = np.array([1.5, 2.0, 30.0, 40.0], np.float32)
    truth["gnd"][0]["junk"] = np.array([], int) if array is np.array else []  # an empty float array indexes nothing either
    content = pickle.dumps(truth, protocol)
    if old and protocol < 4:
        content = content.replace(b"numpy._core", b"numpy.core")  # the module's name before NumPy 2
    (tmp_path / "gnd_x.pkl").write_bytes(content)
    queries, images, truths = eval_knn.read_oxford(tmp_path)
    assert queries == [(f"{tmp_path}/jpg/q.jpg", (2, 2, 30, 40))] and images == [f"{tmp_path}/jpg/{name}.jpg" for name in "abcd"]
    assert truths == [{"Medium": ([0, 1, 3], []), "Hard": ([1, 3], [0])}] and type(truths[0]["Hard"][0][1]) is int


def test_ground_truth_of_python_2(tmp_path):
    text = b"(dS'imlist'\n(lS'a'\naS'b'\nasS'qimlist'\n(lS'a'\nasS'gnd'\n(l(dS'bbx'\n(lF1.5\naI2\naI3\naI4\nasS'easy'\n"
    text += b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1\ntcnumpy\ndtype\n(S'i8'\nI0\nI1\ntR"
    text += b"(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x00'\ntbsS'hard'\n(lsS'junk'\n(lsas."
    (tmp_path / "gnd_x.pkl").write_bytes(text)
    queries, images, truths = eval_knn.read_oxford(tmp_path)
    assert queries == [(f"{tmp_path}/jpg/a.jpg", (2, 2, 3, 4))] and images == [f"{tmp_path}/jpg/{name}.jpg" for name in "ab"]
    assert truths == [{"Medium": ([1], []), "Hard": ([], [1])}]


class Call:
    def __init__(self, function, *arguments, state=None):
        self.call = function, arguments, state

    def __reduce__(self):
        return self.call


def pointers():
    """An array whose dtype says that its bytes are no pointers, where they are: NumPy would follow them."""
    state = list(np.dtype([("a", "O")]).__reduce__()[2])
    state[7] = 0  # the flags
    kind = Call(np.dtype, "V8", False, True, state=tuple(state))
    return Call(np.zeros(0).__reduce__()[0], np.ndarray, (0,), b"b", state=(1, (1,), kind, False, b"\x01" * 8))


HOSTILE = {
    "a command": lambda mark: Call(__import__("os").system, f"touch {mark}"),
    "eval": lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"),
    "a file": lambda mark: Call(open, str(mark), "w"),
    "getattr": lambda mark: Call(getattr, Call(eval, "[]"), "append"),
    "numpy's own loader": lambda mark: Call(np.load, str(mark)),
    "numpy.save": lambda mark: Call(np.save, str(mark), [1]),
    "pointers": lambda mark: pointers(),
    "a tensor": lambda mark: torch.zeros(1),
    "a path": lambda mark: mark,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_ground_truth_is_refused(name, mine, tmp_path):
    mark = tmp_path / "mark.npy"
    for protocol in (0, 2, 5):
        (tmp_path / "gnd_roxford5k.pkl").write_bytes(pickle.dumps({**ground_truth(), "more": HOSTILE[name](mark)}, protocol))
        assert_one_line_error(mine("--task", "retrieval", "--data", tmp_path),
                              "gnd_roxford5k.pkl is no ground truth in plain containers and NumPy arrays")
        assert not mark.exists()


def changed(**values):
    truth = ground_truth()
    for key, value in values.items():
        (truth if key in truth else truth["gnd"][0])[key] = value
    return truth


@pytest.mark.parametrize("content", [
    b"", b"not a pickle", pickle.dumps(ground_truth())[:-9], [1, 2], {}, changed(imlist=[]), changed(imlist=4), changed(qimlist=[]),
    changed(gnd=[]), changed(gnd=5), changed(bbx=[1, 2, 3]), changed(bbx=[1, 2, 3, math.nan]), changed(bbx="1234"),
    changed(easy=[4]), changed(easy=7), changed(hard=[-1]), changed(junk=["a"])])
def test_bad_ground_truth(content, tmp_path):
    (tmp_path / "gnd_x.pkl").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    with pytest.raises(InputError, match="gnd_x.pkl is no ground truth"):
        eval_knn.read_oxford(tmp_path)


# ----------------------------------------------------------------------------------------- retrieval and copies, in real layouts


def disturbed(image, strength, generator):
    """Cropped, shrunk, blurred, squeezed by JPEG, painted over: as the copies of Copydays, harder with `strength` 0 ... 1."""
    share = 1 - 0.5 * strength * generator.random()
    width, height = (int(share * length) for length in image.size)
    left, top = (int(generator.random() * (whole - part)) for whole, part in zip(image.size, (width, height), strict=True))
    image = image.crop((left, top, left + width, top + height)).resize((int(200 - 80 * strength), int(180 - 80 * strength)))
    image = image.filter(ImageFilter.GaussianBlur(1.5 * strength))
    if strength > 0.5:
        image.paste((int(255 * generator.random()),) * 3, (0, 0, image.width, image.height // 6))
    stream = io.BytesIO()
    image.save(stream, "jpeg", quality=int(90 - 75 * strength))
    return Image.open(stream)


@pytest.fixture(scope="module")
def small_photos(photos, tmp_path_factory):
    """48 of the photographs, 160 pixels wide or high at most, to be quick."""
    root, paths = tmp_path_factory.mktemp("small"), sorted(photos.glob("*.jpg"))
    for path in paths[:: len(paths) // 48][:48]:
        with Image.open(path) as image:
            image.thumbnail((160, 160))
            image.convert("RGB").save(root / path.name, quality=95)
    return sorted(root.glob("*.jpg"))


def make_copydays(root, paths, originals, distractors, strength):
    """Copydays' layout: the first photographs with two copies of each, the next as distractors, the rest for whitening."""
    generator = np.random.default_rng(0)
    for name in ("original", "strong", "distractors/deep", "whitening"):
        (root / name).mkdir(parents=True)
    for i, path in enumerate(paths):
        image = Image.open(path).convert("RGB")
        if i >= originals:
            image.save(root / ("distractors/deep" if i < originals + distractors else "whitening") / path.name, quality=95)
            continue
        image.save(root / "original" / f"{2000 + i}00.jpg", quality=95)
        for copy in (1, 2):
            disturbed(image, strength, generator).save(root / "strong" / f"{2000 + i}0{copy}.jpg", quality=95)
    return root


@pytest.fixture(scope="module")
def copydays(small_photos, tmp_path_factory):
    """20 originals, 40 copies, 14 distractors, 14 images for whitening."""
    return make_copydays(tmp_path_factory.mktemp("copies") / "copydays", small_photos, 20, 14, 0.6)


def resized(image, width, height):
    """(1, 3, height, width), normalised as our checkpoint wants it."""
    x = resize(pil_to_tensor(image), [height, width], InterpolationMode.BICUBIC, antialias=True)
    return normalize(x[None].float() / 255, MEAN, STD)


def naive_copy_map(root, model, size, layer, whiten):
    """mAP in Python loops, image by image."""
    def features(paths):
        rows = []
        for path in paths:
            x = resized(Image.open(path).convert("RGB"), size, size)
            tokens = model.get_intermediate_layers(x, 3)[layer][0].detach().double()
            rows.append(torch.cat([tokens[0], (tokens[1:].clamp(min=1e-6) ** 4).mean(0) ** 0.25]))
        return torch.stack(rows).numpy()

    queries, originals = sorted(root.glob("strong/*")), sorted(root.glob("original/*"))
    asked, bank = features(queries), features(originals + sorted(root.glob("distractors/*/*")))
    if whiten:
        extra = features(sorted(root.glob("whitening/*")))
        values, vectors = np.linalg.eigh(np.cov(extra.T, bias=True))
        values, vectors = values[values > 1e-5 * values.max()], vectors[:, values > 1e-5 * values.max()]
        asked, bank = ((part - extra.mean(0)) @ vectors / np.sqrt(values) for part in (asked, bank))
    asked, bank = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (asked, bank))
    targets = [[path.name[:4] for path in originals].index(query.name[:4]) for query in queries]
    ranks = [int((row > row[target]).sum()) for row, target in zip(asked @ bank.T, targets, strict=True)]
    return 100 * np.mean([0.5 / (rank + 1) if rank else 1 for rank in ranks])


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.figures
def test_copy_detection(whiten, copydays, ours, mine, tmp_path):
    if not (SHARED / "photos").is_dir():
        pytest.skip("made pictures are so alike that rounding decides: needs photographs")
    options = ["--task", "copy", "--data", copydays, "--output_dir", tmp_path / "copy"]
    result = mine(*options, "--distractors", copydays / "distractors", "--img_size", 48, "--layers", "all",
                  *(["--whitening", copydays / "whitening"] if whiten else []))
    found, model = table(result), load_backbone(str(ours))[0]
    assert list(found) == [(layer, "strong") for layer in "123"]
    for layer, (value, *_) in enumerate(found.values()):
        assert value == pytest.approx(naive_copy_map(copydays, model, 48, layer, whiten), abs=0.5)  # ties within rounding
    for words in ("40 queries among 20 images and 14 distractors", "img_size 48", "scales [1.0]", "best: layer",
                  "whitening learnt on 14 images" if whiten else "no whitening"):
        assert words in result.stdout
    saved = json.loads((tmp_path / "copy" / "results.json").read_text())
    assert [row["layer"] for row in saved["rows"]] == [1, 2, 3]
    assert saved["rows"][2]["mAP"] == pytest.approx(found["3", "strong"][0], abs=0.01)
    assert (tmp_path / "copy" / "layers.png").stat().st_size > 5000
    assert_one_line_error(mine(*options), "results.json already exists.*--overwrite")


def test_untouched_copies_are_found(copydays, mine, tmp_path):
    for part in ("original", "strong"):
        shutil.copytree(copydays / "original", tmp_path / "data" / part)
    result = mine("--task", "copy", "--data", tmp_path / "data", "--img_size", 32, "--batch_size", 7, "--output_dir", tmp_path / "copy")
    assert table(result) == {("last", "strong"): (100,) * 4}
    assert not (tmp_path / "copy" / "layers.png").exists()


@pytest.fixture
def drawn(monkeypatch):
    """{label: (layers, values)} of each curve."""
    curves, plot = {}, Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axis, *a, label, **k: curves.update({label: a}) or plot(axis, *a, label=label, **k))
    return curves


def rows_of(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


def test_layers_of_two_runs_in_one_picture(copydays, mine, drawn, tmp_path):
    options = ["--task", "copy", "--data", copydays, "--layers", "all", "--output_dir"]
    mine(*options, tmp_path / "a", "--img_size", 16)
    drawn.clear()
    assert mine(*options, tmp_path / "b", "--img_size", 32, "--compare", tmp_path / "a").returncode == 0
    for name in ("a", "b"):
        curve = (1, 2, 3), tuple(row["mAP"] for row in rows_of(tmp_path / name))
        assert drawn[f"{tmp_path.name}/{name}: {copydays.parent.name}/copydays, strong"] == curve
    (tmp_path / "x").mkdir()
    for text in ("", "[]", '{"args": {"task": "copy", "layers": "all"}}', '{"rows": [1], "args": {"task": "video"}}'):
        (tmp_path / "x" / "results.json").write_text(text)
        assert_one_line_error(mine(*options, tmp_path / "c", "--compare", tmp_path / "x"),
                              "x/results.json holds no results of --task copy --layers all")
    assert_one_line_error(mine(*options[:-3], "--compare", tmp_path / "a"), "--compare .*needs --layers all")


def make_oxford(root, paths):
    """Revisited Oxford's layout: 8 buildings, each with an easy and two hard images and the query itself as junk; 16 others."""
    generator = np.random.default_rng(0)
    (root / "jpg").mkdir(parents=True)
    images, queries, gnd = [], [], []
    for i, path in enumerate(paths[:24]):
        image = Image.open(path).convert("RGB")
        images.append(f"photo_{i:06}")
        image.save(root / "jpg" / f"{images[-1]}.jpg", quality=95)
        if i < 8:
            place = len(images)
            for kind, strength in enumerate((0.1, 0.7, 0.8)):
                images.append(f"photo_{i:06}_{kind}")
                disturbed(image, strength, generator).save(root / "jpg" / f"{images[-1]}.jpg")
            queries.append(f"photo_{i:06}")
            box = np.array([8.2, 5.0, image.width - 10.4, image.height - 7.9])
            gnd.append({"bbx": box.tolist() if i % 2 else box, "easy": np.array([place]), "hard": [place + 1, place + 2],
                        "junk": [place - 1]})
    gnd[7]["easy"], gnd[7]["hard"] = [*gnd[7]["hard"], *gnd[7]["easy"].tolist()], []  # none is hard: left out of that mean
    (root / "gnd_roxford5k.pkl").write_bytes(pickle.dumps({"imlist": images, "qimlist": queries, "gnd": gnd}, 2))
    return root


@pytest.fixture(scope="module")
def oxford(small_photos, tmp_path_factory):
    return make_oxford(tmp_path_factory.mktemp("retrieval") / "roxford5k", small_photos)


def naive_retrieval_map(root, model, size, scales):
    truth = pickle.loads((root / "gnd_roxford5k.pkl").read_bytes())

    def feature(name, box=None):
        image = Image.open(root / "jpg" / f"{name}.jpg").convert("RGB")
        factor = min(1, size / max(image.size))
        if box is not None:
            image = image.crop([round(edge) for edge in box])
        x, total = resized(image, *(round(factor * length) // 4 * 4 for length in image.size)), 0
        for scale in scales:
            sides = [int(scale * length) // 4 * 4 for length in x.shape[2:]]
            total = total + model(F.interpolate(x, sides, mode="bilinear") if scale != 1 else x)[0]
        return total / total.norm()

    bank = torch.stack([feature(name) for name in truth["imlist"]])
    found = {"Medium": [], "Hard": []}
    for name, gnd in zip(truth["qimlist"], truth["gnd"], strict=True):
        similarity = bank @ feature(name, gnd["bbx"])
        easy, hard, junk = (list(gnd[kind]) for kind in ("easy", "hard", "junk"))
        found["Medium"].append(eval_knn.judge(similarity, easy + hard, junk)[0])
        if hard:
            found["Hard"].append(eval_knn.judge(similarity, hard, junk + easy)[0])
    return {setup: 100 * np.mean(values) for setup, values in found.items()}


@pytest.mark.parametrize("scales", [[1.0], [1.0, 0.5]])
def test_retrieval(scales, oxford, ours, mine, tmp_path):
    result = mine("--task", "retrieval", "--data", oxford, "--img_size", 64, "--scales", *scales, "--output_dir", tmp_path / "r")
    found = table(result)
    assert "8 queries among 48 images and 0 distractors" in result.stdout and f"scales {scales}" in result.stdout
    for setup, expected in naive_retrieval_map(oxford, load_backbone(str(ours))[0], 64, scales).items():
        assert found["last", setup][0] == pytest.approx(expected, abs=0.5)  # ties within rounding
    assert 100 > found["last", "Medium"][0] > found["last", "Hard"][0] > 5


def copy_of(folder, place, *leave_out):
    return shutil.copytree(folder, place, ignore=shutil.ignore_patterns(*leave_out), dirs_exist_ok=True)


def test_several_retrieval_sets_in_one_table(oxford, mine, drawn, tmp_path):
    """Of the same name, and the second without any hard image: its place in that line is nan."""
    easy = copy_of(oxford, tmp_path / "roxford5k")
    truth = pickle.loads((easy / "gnd_roxford5k.pkl").read_bytes())
    for gnd in truth["gnd"]:
        gnd["easy"], gnd["hard"] = [*gnd["easy"], *gnd["hard"]], []
    (easy / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth))
    result = mine("--task", "retrieval", "--data", oxford, easy, "--img_size", 32, "--scales", 1, "--layers", "all",
                  "--output_dir", tmp_path / "r", "--distractors", oxford / "jpg")
    assert "mAP in per cent" in result.stdout and "48 distractors" in result.stdout and result.stdout.count(" nan") == 6
    assert len(rows_of(tmp_path / "r")) == 9
    curves = [(oxford, "Medium"), (oxford, "Hard"), (easy, "Medium")]
    names = {f"{tmp_path.name}/r: {data.parent.name}/roxford5k, {setup}" for data, setup in curves}
    assert drawn.keys() == names and {layers for layers, _ in drawn.values()} == {(1, 2, 3)}


@pytest.mark.parametrize("task, size, box, expected", [
    ("copy", 50, None, (48, 48)), ("retrieval", 64, None, (40, 64)), ("retrieval", 999, None, (64, 104)),
    ("video", 40, None, (40, 64)), ("retrieval", 52, (10, 10, 50, 30), (8, 16)), ("video", 4, None, (8, 8))])
def test_sizes_that_images_take(task, size, box, expected, tmp_path):
    write_image(tmp_path / "a.png", (9, 9, 9), (66, 105))  # height, width
    photograph, = eval_knn.read_photographs([(tmp_path / "a.png", box)], task, size, 8)
    assert photograph.shape == (3, *expected) and photograph.dtype == torch.uint8 and (photograph == 9).all()
    pixels = np.arange(40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "b.png")
    boxes = (8, 4, 32, 24), (-4, -2, 8, 99)  # of the second there is a part
    found = eval_knn.read_photographs([(tmp_path / "b.png", cut) for cut in boxes], "retrieval", 60, 4)
    for image, part in zip(found, (pixels[4:24, 8:32], pixels[:, :8]), strict=True):
        assert np.array_equal(image.permute(1, 2, 0), part)


def test_other_backbones(student, copydays, oxford, evaluate, tmp_path):
    """A ResNet has no tokens of patches: only retrieval."""
    torch.save(student.state_dict(), tmp_path / "weights.pth")
    options = ["--layers", "all", "--num_workers", 0, "--img_size", 32, "--overwrite", "--output_dir", tmp_path / "out"]
    copy = ["--task", "copy", "--data", copydays, *options]
    assert len(table(evaluate("--arch", "timm/vit_tiny_patch16_224", "--checkpoint", tmp_path / "weights.pth", *copy))) == 12
    assert len(table(evaluate("--arch", "resnet18", "--task", "retrieval", "--data", oxford, "--scales", 1, *options))) == 8
    assert_one_line_error(evaluate("--arch", "resnet18", *copy), "--task copy needs patch tokens, which resnet18")


# --------------------------------------------------------------------------------------------------------- video, in real layout


def make_davis(root, paths):
    """DAVIS 2017's folders: two short videos in which one and two textured squares move over a photograph."""
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("one\ntwo\n")
    (root / "ImageSets" / "2017" / "train.txt").write_text("\n")
    for number, name in enumerate(("one", "two"), 1):
        textures = [np.array(Image.open(path).convert("RGB").resize((24, 24))) for path in paths[number : number + 2]]
        ground = np.array(Image.open(paths[10 * number]).convert("RGB").resize((96, 64))) // 4
        for step in range(6):
            frame, mask = ground.copy(), np.zeros((64, 96), np.uint8)
            for o in range(1, number + 1):
                top, left = (4 + 3 * step, 8 + 4 * step) if o == 1 else (32, 64 - 4 * step)
                square = slice(top, top + 24), slice(left, left + 24)
                mask[square], frame[square] = o, textures[o - 1] // 2 + 127
            photograph, annotation = Image.fromarray(frame), Image.fromarray(mask)
            annotation.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
            for folder, image, ending in (("JPEGImages", photograph, "jpg"), ("Annotations", annotation, "png")):
                path = root / folder / "480p" / name / f"{step:05}.{ending}"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
    return root


@pytest.fixture(scope="module")
def davis(small_photos, tmp_path_factory):
    return make_davis(tmp_path_factory.mktemp("video") / "DAVIS", small_photos)


def test_video(davis, mine, tmp_path):
    result = mine("--task", "video", "--data", davis, "--img_size", 64, "--layers", "all", "--num_workers", 1, "--output_dir", tmp_path)
    found = table(result)
    assert list(found) == [(layer, "val") for layer in "123"]
    for words in ("2 sequences of val, 12 frames", "k [5]", "temperature 0.1", "context 7", "neighbourhood 12", "img_size 64"):
        assert words in result.stdout
    for both, j, f in found.values():
        assert both == pytest.approx((j + f) / 2, abs=0.02) and j > 60
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*/*")}
    assert written == {f"{kind}/{name}/{i:05}.{end}" for kind, end in (("masks", "png"), ("overlays", "jpg"))
                       for name in ("one", "two") for i in range(6)}
    scores = []
    for name, o in (("one", 1), ("two", 1), ("two", 2)):
        folders = tmp_path / "masks" / name, davis / "Annotations" / "480p" / name
        pairs = [[np.array(Image.open(folder / f"{i:05}.png")) == o for folder in folders]
                 for i in range(1, 5)]  # not the first, not the last
        scores.append(np.mean([((a & b).sum() / (a | b).sum(), naive_f(a, b)) for a, b in pairs], 0))
    assert [100 * value for value in np.mean(scores, 0)] == pytest.approx(found["3", "val"][1:], abs=0.02)
    # the overlay shows the frame outside of the mask, and the object's colour in it
    mask, shown = (np.array(Image.open(tmp_path / part)) for part in ("masks/two/00003.png", "overlays/two/00003.jpg"))
    frame = np.array(Image.open(davis / "JPEGImages/480p/two/00003.jpg")).astype(int)
    assert abs(shown[mask == 0] - frame[mask == 0]).mean() < 8
    for o in (1, 2):
        wanted = frame[mask == o].mean(0) / 2 + eval_knn.PALETTE[o] / 2
        assert abs(shown[mask == o].mean(0) - wanted).max() < 10


def two_processes(number, tasks):
    """Each command on this process -> what the first one wrote."""
    for arguments in tasks.values():
        sys.argv = arguments
        eval_knn.main()
    common.barrier()
    return [json.loads(open(f"{arguments[-1]}/results.json").read())["rows"] for arguments in tasks.values()]


def test_processes_share_the_work(in_processes, evaluate, ours, copydays, davis, tmp_path):
    options = {"copy": ["--data", copydays, "--whitening", copydays / "whitening"], "video": ["--data", davis]}
    shared = ["--checkpoint", ours, "--img_size", 32, "--device", "cpu", "--num_workers", 0]
    tasks = {task: ["eval_knn.py", *map(str, ("--task", task, *shared, *extra, "--output_dir", tmp_path / "two" / task))]
             for task, extra in options.items()}
    first, second = in_processes(2, two_processes, tasks)
    assert first == second
    for (task, arguments), shared in zip(tasks.items(), first, strict=True):
        assert evaluate(*arguments[1:-1], tmp_path / "alone" / task).returncode == 0
        for one, two in zip(rows_of(tmp_path / "alone" / task), shared, strict=True):
            assert one == pytest.approx(two, abs=0.01)


# -------------------------------------------------------------------------------------------------------- bad input of the tasks


@pytest.fixture
def refused(mine, tmp_path):
    """refused(task, folder, pattern, *options): one line of error."""
    def check(task, folder, says, *options):
        result = mine("--task", task, "--data", folder, "--img_size", 16, "--output_dir", tmp_path / "out", "--overwrite", *options)
        assert_one_line_error(result, says)

    return check


def test_bad_copydays(copydays, refused, tmp_path):
    refused("copy", copydays, "no images under .*nothing", "--distractors", tmp_path / "nothing")
    refused("copy", copy_of(copydays, tmp_path / "a", "strong"), "no images under .*a/strong")
    refused("copy", copy_of(copydays, tmp_path / "b", "200300.jpg"), "200301.jpg is a copy of nothing.*begins with 2003")
    bad, photograph = copy_of(copydays, tmp_path / "c"), (copydays / "original" / "200300.jpg").read_bytes()
    (bad / "original" / "200399.jpg").write_bytes(photograph)
    refused("copy", bad, "c/original: several names begin with the same four")
    (bad / "original" / "200399.jpg").unlink()
    (bad / "strong" / "200301.jpg").write_bytes(photograph[:90])
    refused("copy", bad, "cannot read image .*200301.jpg")


def test_bad_oxford(oxford, refused, tmp_path):
    bad = copy_of(oxford, tmp_path / "a", "photo_000003.jpg")
    refused("retrieval", bad, "cannot read image .*jpg/photo_000003.jpg")
    (bad / "gnd_rparis6k.pkl").write_bytes(b"")
    refused("retrieval", bad, "a has 2 gnd_.*pkl")
    bad, truth = copy_of(oxford, tmp_path / "b"), pickle.loads((oxford / "gnd_roxford5k.pkl").read_bytes())
    for gnd in truth["gnd"]:
        gnd["easy"], gnd["hard"] = [], []
    (bad / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth))
    refused("retrieval", bad, "no query has a positive image")


def test_bad_davis(davis, refused, tmp_path):
    refused("video", davis, "no .*ImageSets/2017/test-dev.txt", "--split", "test-dev")
    refused("video", davis, "train.txt names no sequence", "--split", "train")
    refused("video", copy_of(davis, tmp_path / "a", "two"), "0 frames of two in .*: 3 are needed")
    bad = copy_of(davis, tmp_path / "b", "00002.png")
    refused("video", bad, "cannot read mask .*one/00002.png")
    first = copy_of(davis, bad) / "Annotations" / "480p" / "one" / "00000.png"
    other = "00000.png .*not an indexed PNG of the size of .*00000.jpg"
    for mode, width, says in (("P", 96, "00000.png: the first mask .* must show its objects"), ("P", 95, other), ("RGB", 96, other)):
        Image.new(mode, (width, 64)).save(first)
        refused("video", bad, says)
    first.write_bytes(b"nothing")
    refused("video", bad, "cannot read mask .*one/00000.png")
