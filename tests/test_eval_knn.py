"""eval_knn.py: the classifier against a naive loop, other people's checkpoints, the command line, and bad input."""
import argparse
import math
import re
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import assert_one_line_error, run_script
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torchvision.transforms.functional import normalize

import common
import eval_knn
from common import InputError, load_backbone, load_data
from eval_knn import knn_classifier


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """evaluate(*arguments): the command line without the start of an interpreter -> what run_script would return."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["eval_knn.py", "--device", "cpu", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            common.run(eval_knn.main)
        except SystemExit as stop:
            code = stop.code
        return subprocess.CompletedProcess(sys.argv, code, *capsys.readouterr())

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def table(result):
    """{(layer, k): (top-1, top-5)} of what was printed."""
    assert result.returncode == 0, (result.stdout, result.stderr)
    rows = re.findall(r"^ *(last|\d+) +(\d+) +(\d+\.\d\d) +(\d+\.\d\d) *$", result.stdout, re.M)
    found = {(layer, int(k)): (float(top1), float(top5)) for layer, k, top1, top5 in rows}
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
    """Python loops over plain floats."""
    def cosine(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(x * x for x in b))

    scores = []
    for query in test.tolist():
        nearest = sorted(((cosine(query, row), label) for row, label in zip(train.tolist(), labels.tolist(), strict=True)),
                         reverse=True)[:k]
        scores.append([sum(math.exp(c / temperature) for c, label in nearest if label == j) for j in range(classes)])
    return torch.tensor(scores)


@pytest.fixture
def points():
    """60 training and 23 test features of 5 classes, of every length."""
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(60, 7, generator=generator), torch.randn(23, 7, generator=generator)
    train *= torch.rand(60, 1, generator=generator) * 10 + 0.1
    return train, torch.arange(60) % 5, test


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("k", [1, 3, 20, 60])
def test_scores_are_those_of_a_naive_loop(points, k, temperature):
    expected = naive_scores(*points, k, temperature, 5)
    torch.testing.assert_close(knn_classifier(*points, k, temperature), expected, rtol=1e-4, atol=1e-6)


def test_default_temperature_is_that_of_dino(points):
    torch.testing.assert_close(knn_classifier(*points, 10), knn_classifier(*points, 10, 0.07))


@pytest.mark.parametrize("chunk", [1, 4, 22, 23, 10**9])
def test_chunks_do_not_change_the_scores(points, chunk):
    torch.testing.assert_close(knn_classifier(*points, 10, chunk=chunk), knn_classifier(*points, 10, chunk=7), rtol=1e-5, atol=0)


def test_k_is_cut_to_the_training_set(points):
    torch.testing.assert_close(knn_classifier(*points, 200), naive_scores(*points, 60, 0.07, 5), rtol=1e-4, atol=1e-6)


def test_number_of_classes(points):
    scores = knn_classifier(*points, 10)
    wider = knn_classifier(*points, 10, num_classes=8)
    assert scores.shape == (23, 5) and wider.shape == (23, 8)
    assert torch.equal(wider[:, :5], scores) and not wider[:, 5:].any()


def test_lengths_of_features_do_not_matter(points):
    train, labels, test = points
    longer = knn_classifier(train * torch.linspace(0.5, 90, 60)[:, None], labels, test * 1000, 10)
    torch.testing.assert_close(longer, knn_classifier(*points, 10), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_features_are_computed_in_fp32(points, dtype, autocast):
    # lengths near 1000: their squares are beyond fp16
    train, labels, test = points[0].mul(100).to(dtype), points[1], points[2].mul(300).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = knn_classifier(train, labels, test, 10)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, naive_scores(train, labels, test, 10, 0.07, 5), rtol=1e-4, atol=1e-6)


def test_labels_of_another_length_are_an_input_error(points):
    with pytest.raises(InputError, match="60 training features but 59 labels"):
        knn_classifier(points[0], points[1][:-1], points[2], 10)


def test_top1_and_top5_count_what_a_loop_counts(points):
    train, labels, test = points
    labels, test_labels = torch.arange(60) % 12, torch.arange(23) % 12
    ranked = [sorted(range(12), key=lambda j: -row[j]) for row in naive_scores(train, labels, test, 30, 0.07, 12).tolist()]
    top1 = sum(order[0] == label for order, label in zip(ranked, test_labels.tolist(), strict=True)) / 23
    top5 = sum(label in order[:5] for order, label in zip(ranked, test_labels.tolist(), strict=True)) / 23
    assert 0 < top1 < top5 < 1
    assert eval_knn.top1_top5(train, labels, test, test_labels, 30, 0.07, 12) == pytest.approx((100 * top1, 100 * top5))


def test_top5_of_fewer_than_five_classes(points):
    train, _, test = points
    assert eval_knn.top1_top5(train, torch.arange(60) % 2, test, torch.arange(23) % 2, 60, 0.07, 2)[1] == 100


# --------------------------------------------------------------------------------------------- other people's checkpoints


def vit(seed, **options):
    """timm's ViT-Ti/16 for 32 pixels with every weight random."""
    return noisy(timm.create_model("vit_tiny_patch16_224", **{"img_size": 32, "num_classes": 5, **options}), seed)


def cls_of(model, x):
    return model.forward_features(x)[:, 0]


@pytest.fixture(scope="module")
def student():
    return vit(1)


@pytest.fixture(scope="module")
def teacher():
    return vit(2)


def body(model):
    return {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}


def prefixed(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


def dino(student, teacher):
    head = {"mlp.0.weight": torch.randn(8, 192), "last_layer.weight_g": torch.ones(9, 1),
            "last_layer.weight_v": torch.randn(9, 8)}
    return {"student": prefixed("module.backbone.", body(student)) | prefixed("module.head.", head),
            "teacher": prefixed("backbone.", body(teacher)) | prefixed("head.", head), "epoch": 100,
            "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}}


def ibot(student, teacher):
    content = dino(student, teacher)
    content["student"]["module.backbone.masked_embed"] = torch.randn(1, 192)
    content["teacher"]["backbone.masked_embed"] = torch.randn(1, 192)
    content["teacher"]["head.last_layer2.weight_v"] = torch.randn(9, 8)
    return content


def moco(student, teacher):
    head = {"head.0.weight": torch.randn(8, 192), "head.1.running_mean": torch.zeros(8), "head.3.weight": torch.randn(8, 8)}
    return {"epoch": 300, "arch": "vit_small", "state_dict":
            prefixed("module.base_encoder.", body(student) | head) | prefixed("module.momentum_encoder.", body(teacher) | head)
            | prefixed("module.predictor.", {"0.weight": torch.randn(8, 8)})}


CHECKPOINTS = {
    "dino": (dino, None, "teacher"), "dino teacher": (dino, "teacher", "teacher"), "dino student": (dino, "student", "student"),
    "dino backbone": (lambda s, t: body(t), None, "teacher"),
    "ibot": (ibot, None, "teacher"), "ibot teacher": (ibot, "teacher", "teacher"), "ibot student": (ibot, "student", "student"),
    "ibot backbone": (lambda s, t: {"state_dict": body(t)}, None, "teacher"),
    "moco": (moco, None, "student"), "moco student": (moco, "student", "student"), "moco teacher": (moco, "teacher", "teacher"),
    "timm": (lambda s, t: s.state_dict(), None, "student"),
    "deit": (lambda s, t: {"model": s.state_dict()}, None, "student"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_other_peoples_weights_give_their_outputs(name, student, teacher, tmp_path):
    write, network, expected = CHECKPOINTS[name]
    torch.save(write(student, teacher), tmp_path / "weights.pth")
    backbone, meta = load_backbone(str(tmp_path / "weights.pth"), "vit_tiny", 16, 32, network)
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    outputs = {"student": cls_of(student, x), "teacher": cls_of(teacher, x)}
    assert not torch.allclose(outputs["student"], outputs["teacher"], atol=0.1)  # or the choice could not be told
    torch.testing.assert_close(backbone(x), outputs[expected], rtol=1e-4, atol=1e-4)
    assert meta["mean"] == common.MEAN and meta["img_size"] == 32


def test_layers_are_those_of_timm(student, tmp_path):
    torch.save(student.state_dict(), tmp_path / "weights.pth")
    x = torch.randn(2, 3, 32, 32)
    expected = student.get_intermediate_layers(x, n=12, return_prefix_tokens=True, norm=True)
    for arch in ("vit_tiny", "timm/vit_tiny_patch16_224"):
        backbone, _ = load_backbone(str(tmp_path / "weights.pth"), arch, 16, 32)
        layers = backbone(x, layers=True)
        assert len(layers) == 12
        for ours, (_, prefix) in zip(layers, expected, strict=True):
            torch.testing.assert_close(ours, prefix[:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(backbone(x), cls_of(student, x), rtol=1e-4, atol=1e-4)


def test_positions_of_another_grid_are_interpolated(student, tmp_path):
    torch.save(student.state_dict(), tmp_path / "weights.pth")  # 2 x 2 patches
    backbone, _ = load_backbone(str(tmp_path / "weights.pth"), "vit_tiny", 16, 80)
    positions = student.pos_embed[:, 1:].reshape(1, 2, 2, 192).permute(0, 3, 1, 2)
    positions = F.interpolate(positions, (5, 5), mode="bicubic").permute(0, 2, 3, 1).reshape(1, 25, 192)
    larger = vit(3, img_size=80)
    larger.load_state_dict({**student.state_dict(), "pos_embed": torch.cat([student.pos_embed[:, :1], positions], 1)})
    x = torch.randn(2, 3, 80, 80)
    torch.testing.assert_close(backbone(x), cls_of(larger, x), rtol=1e-4, atol=1e-4)
    x = torch.randn(2, 3, 32, 32)  # and at their own grid they are untouched
    torch.testing.assert_close(backbone(x), cls_of(student, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("extra", [
    {"args": argparse.Namespace(arch="vit_tiny")},
    {"args": argparse.Namespace(arch="vit_tiny"), "optimizer": {"param_groups": [{"lr": np.float64(0.1)}]}}],
    ids=["namespace", "as DINO writes it"])
def test_pickled_objects_name_a_conversion_that_works(extra, evaluate, student, teacher, small_folder, tmp_path):
    path = tmp_path / "full checkpoint.pth"
    torch.save({**dino(student, teacher), **extra}, path)
    arguments = ["--arch", "vit_tiny", "--img_size", 32, "--data", small_folder, "--num_workers", 0, "--checkpoint"]
    result = evaluate(*arguments, path)
    assert_one_line_error(result, "full checkpoint.pth holds pickled Python objects", "can run code", "weights_only=False")
    command = re.search(r'python (-c ".*")$', result.stderr.strip())[1]
    subprocess.run([sys.executable, *shlex.split(command)], check=True, cwd=tmp_path)
    assert table(evaluate(*arguments, tmp_path / "clean.pth"))


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_network_is_chosen_on_the_command_line(network, evaluate, student, teacher, small_folder, tmp_path):
    torch.save(dino(student, teacher), tmp_path / "weights.pth")
    result = evaluate("--arch", "vit_tiny", "--patch_size", 16, "--img_size", 32, "--checkpoint", tmp_path / "weights.pth",
                      "--data", small_folder, "--network", network, "--features", tmp_path / "f.pth")
    assert f"weights.pth ({network})" in result.stdout
    saved = torch.load(tmp_path / "f.pth", weights_only=True)["test"]
    x = F.interpolate(read_images(saved["paths"]), (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    x = normalize(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    source = {"student": student, "teacher": teacher}[network]
    torch.testing.assert_close(saved["features"], cls_of(source, x), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- the command line

COLOURS = {"ant": (255, 0, 0), "bee": (0, 255, 0), "cat": (0, 0, 255)}


def write_image(path, colour, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], colour).save(path)


def read_images(paths):
    """(N, 3, H, W) in [0, 1]."""
    return torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in paths]).float() / 255


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


MEAN, STD = [0.4, 0.5, 0.6], [0.3, 0.2, 0.25]  # not ImageNet's, to see that they are taken from the file


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A checkpoint of this repository, of which the student is to be evaluated."""
    torch.manual_seed(0)
    backbone = {"arch": "vit_nano", "img_size": 16, "patch_size": 4, "depth": 3}
    student = noisy(common.create_backbone(**backbone), 4)
    weights = prefixed("backbone.", student.state_dict()) | {"projector.0.weight": torch.randn(8, 96)}
    path = tmp_path_factory.mktemp("run") / "checkpoint.pth"
    torch.save({"student": weights, "step": 7, "args": {"lr": 0.1},
                "meta": {"network": "student", "backbone": backbone, "mean": MEAN, "std": STD}}, path)
    return path


@pytest.fixture(scope="module")
def digits_features(ours):
    """[(train, test) for each of the 3 layers] of the digits under `ours`, and their labels, made without our pipeline."""
    weights = torch.load(ours, weights_only=True)["student"]
    model = common.vit_nano(img_size=16, patch_size=4, depth=3).eval()
    model.load_state_dict({key[9:]: value for key, value in weights.items() if key.startswith("backbone.")})
    layers, labels = [], []
    for data in load_data("digits"):
        x = F.interpolate(data.images.float() / 255, (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
        with torch.no_grad():
            layers.append([tokens[:, 0] for tokens in model.get_intermediate_layers(normalize(x, MEAN, STD), 3)])
        labels.append(data.labels)
    return list(zip(*layers, strict=True)), labels


def sklearn_knn(train, train_labels, test, test_labels, k):
    """Top-1 and top-5 of scikit-learn's k-NN with DINO's weights."""
    knn = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07))
    order = torch.from_numpy(knn.fit(train.numpy(), train_labels.numpy()).predict_proba(test.numpy())).argsort(1, descending=True)
    hits = order == test_labels[:, None]
    return 100 * hits[:, 0].float().mean().item(), 100 * hits[:, :5].any(1).float().mean().item()


def test_digits_against_scikit_learn(ours, digits_features):
    result = run_script("eval_knn.py", "--checkpoint", ours, "--data", "digits", "--device", "cpu")
    found, (layers, (train_labels, test_labels)) = table(result), digits_features
    assert list(found) == [("last", k) for k in (10, 20, 100, 200)]
    for (_, k), accuracy in found.items():
        expected = sklearn_knn(layers[-1][0], train_labels, layers[-1][1], test_labels, k)
        assert accuracy == pytest.approx(expected, abs=0.3)  # one of the 360 test images is 0.28
    for words in ("vit_nano", "(student)", "16 pixels", "1437 train images, 360 test images, 10 classes", "T = 0.07"):
        assert words in result.stdout
    assert "features: " in result.stderr  # the bar


def test_all_layers_in_one_pass(ours, digits_features, evaluate, tmp_path):
    result = evaluate("--checkpoint", ours, "--layers", "all", "--k", 20, 5000, 9000, "--features", tmp_path / "new" / "f.pth")
    found, (layers, labels) = table(result), digits_features
    assert list(found) == [(str(layer), k) for layer in (1, 2, 3) for k in (20, 1437)]  # k is cut, and shown once
    saved = torch.load(tmp_path / "new" / "f.pth", weights_only=True)
    assert list(saved) == ["train", "test"] and not list(tmp_path.glob("new/*.tmp"))
    for side, split in enumerate(("train", "test")):
        assert torch.equal(saved[split]["labels"], labels[side]) and saved[split]["classes"] == list(range(10))
        assert torch.equal(saved[split]["paths"], torch.arange(len(labels[side])))
        for got, expected in zip(saved[split]["features"], layers, strict=True):
            torch.testing.assert_close(got, expected[side], rtol=1e-4, atol=1e-4)
    for number, (train, test) in enumerate(layers, 1):
        expected = sklearn_knn(train, labels[0], test, labels[1], 20)
        assert found[str(number), 20] == pytest.approx(expected, abs=0.3)


def test_two_processes_give_the_numbers_of_one(ours, digits_features, tmp_path):
    result = run_script("eval_knn.py", "--checkpoint", ours, "--device", "cpu", "--features", tmp_path / "f.pth", processes=2)
    found, (layers, (train_labels, test_labels)) = table(result), digits_features
    assert "2 process(es)" in result.stdout and len(found) == 4  # 1437 images do not divide by two
    saved = torch.load(tmp_path / "f.pth", weights_only=True)
    for side, split in enumerate(("train", "test")):
        torch.testing.assert_close(saved[split]["features"], layers[-1][side], rtol=1e-4, atol=1e-4)
    for (_, k), accuracy in found.items():
        expected = eval_knn.top1_top5(layers[-1][0], train_labels, layers[-1][1], test_labels, k, 0.07, 10)
        assert accuracy == pytest.approx(expected, abs=0.3)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("folder", ["small_folder", "large_folder"])
def test_class_folders(folder, workers, ours, evaluate, tmp_path, request):
    folder = request.getfixturevalue(folder)
    result = evaluate("--checkpoint", ours, "--data", folder, "--num_workers", workers, "--k", 3, "--batch_size", 4,
                      "--features", tmp_path / "f.pth")
    assert table(result)["last", 3] == (83.33, 100.0)  # 5 of 6: one ant looks like a cat
    assert "9 train images, 6 test images, 3 classes" in result.stdout
    saved = torch.load(tmp_path / "f.pth", weights_only=True)
    assert saved["test"]["paths"] == sorted(str(path) for path in folder.glob("val/*/*.png"))
    assert saved["test"]["classes"] == ["ant", "bee", "cat"] and saved["test"]["labels"].tolist() == [0, 0, 1, 1, 2, 2]
    assert saved["test"]["features"].shape == (6, 96)


@pytest.mark.parametrize("layers", ["last", "all"])
def test_flat_folder_without_labels(layers, ours, evaluate, tmp_path):
    for i, colour in enumerate(COLOURS.values()):
        write_image(tmp_path / "flat" / f"{i}.png", colour, (20, 20))
    arguments = ["--checkpoint", ours, "--data", tmp_path / "flat", "--layers", layers]
    assert_one_line_error(evaluate(*arguments), "needs labels", "flat", "--features")
    result = evaluate(*arguments, "--features", tmp_path / "f.pth")
    assert result.returncode == 0 and "k-NN skipped" in result.stdout and "top-1" not in result.stdout
    saved = torch.load(tmp_path / "f.pth", weights_only=True)
    assert list(saved) == ["train"] and saved["train"]["labels"].tolist() == [-1, -1, -1]
    assert saved["train"]["paths"] == [str(tmp_path / "flat" / f"{i}.png") for i in range(3)]
    features = saved["train"]["features"]
    assert [f.shape for f in features] == [(3, 96)] * 3 if layers == "all" else features.shape == (3, 96)


@pytest.mark.parametrize("save", [False, True])
def test_images_without_a_label_do_not_vote(save, evaluate, ours, monkeypatch, tmp_path):
    """STL-10's training split is mostly unlabelled."""
    train, test = (common.ImageData(data.labels[:60], data.classes, data.images[:60]) for data in load_data("digits"))
    half = common.ImageData(train.labels[::2], train.classes, train.images[::2])
    labels = train.labels.clone()
    labels[1::2] = -1
    mixed = common.ImageData(labels, train.classes, train.images)
    options = ["--checkpoint", ours, "--k", 5, 30]
    monkeypatch.setattr(eval_knn, "load_data", lambda *_: (half, test))
    expected = table(evaluate(*options))
    monkeypatch.setattr(eval_knn, "load_data", lambda *_: (mixed, test))
    assert table(evaluate(*options, *(["--features", tmp_path / "f.pth"] if save else []))) == expected
    if save:
        assert torch.equal(torch.load(tmp_path / "f.pth", weights_only=True)["train"]["labels"], labels)


def test_no_checkpoint_means_random_weights_and_says_so(evaluate, small_folder, tmp_path):
    def features(*options):
        result = evaluate("--arch", "vit_nano", "--patch_size", 8, "--img_size", 16, "--data", small_folder,
                          "--features", tmp_path / "f.pth", *options)
        assert "random weights" in result.stdout and result.returncode == 0
        return torch.load(tmp_path / "f.pth", weights_only=True)["test"]["features"]

    first = features()
    assert torch.equal(features("--seed", 0), first) and not torch.allclose(features("--seed", 1), first)
    assert not torch.equal(features("--dtype", "bf16"), first) and torch.allclose(features("--dtype", "bf16"), first, atol=0.1)


def test_image_size_overrides_the_checkpoints(evaluate, ours, small_folder, tmp_path):
    options = ["--checkpoint", ours, "--data", small_folder, "--features", tmp_path / "f.pth", "--img_size", 24]
    assert "at 24 pixels" in evaluate(*options).stdout
    saved = torch.load(tmp_path / "f.pth", weights_only=True)["test"]
    backbone, _ = load_backbone(str(ours))
    x = F.interpolate(read_images(saved["paths"]), (24, 24), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(saved["features"], backbone(normalize(x, MEAN, STD)), rtol=1e-4, atol=1e-4)


def test_an_evaluation_can_be_interrupted(evaluate, ours, small_folder):
    before = signal.getsignal(signal.SIGINT)
    assert table(evaluate("--checkpoint", ours, "--data", small_folder))
    assert signal.getsignal(signal.SIGINT) is before


# -------------------------------------------------------------------------------------------------------------- bad input


def test_bad_input_through_the_shell(tmp_path):
    assert_one_line_error(run_script("eval_knn.py", "--arch", "vit_nano", "--data", tmp_path / "nowhere"), "nowhere", "digits")


@pytest.mark.parametrize("options, patterns", [
    (["--img_size", 18], ["18 x 18", "patch size 4"]),
    (["--arch", "vit_tiny"], ["vit_nano", "vit_tiny"]),
    (["--patch_size", 8], ["--patch_size 8"]),
    (["--network", "teacher"], ["no teacher", "--network"]),
    (["--k", 10, 0], ["--k must be at least 1"]),
    (["--batch_size", 0], ["--batch_size must be at least 1"]),
    (["--temperature", 0.001], ["--temperature must be at least 0.012"]),
])
def test_bad_values_for_our_checkpoint(options, patterns, evaluate, ours, small_folder):
    assert_one_line_error(evaluate("--checkpoint", ours, "--data", small_folder, *options), *patterns)


@pytest.mark.parametrize("options, patterns", [
    ([], ["--arch"]),
    (["--arch", "vit_smal"], ["unknown --arch vit_smal", "vit_small", "timm/NAME"]),
    (["--arch", "timm/vit_smal"], ["timm has no model 'vit_smal'"]),
    (["--arch", "vit_nano", "--img_size", 100], ["100 x 100", "patch size 16"]),
    (["--arch", "vit_nano", "--checkpoint", "nowhere.pth"], ["no checkpoint file nowhere.pth"]),
])
def test_bad_values_without_a_checkpoint(options, patterns, evaluate, small_folder):
    assert_one_line_error(evaluate("--data", small_folder, *options), *patterns)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_absent_device(evaluate, ours):
    assert_one_line_error(evaluate("--checkpoint", ours, "--device", "cuda"), "--device cuda is not available")


def test_bad_folders(evaluate, ours, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "val" / "train" / "ant").mkdir(parents=True)
    assert_one_line_error(evaluate("--checkpoint", ours, "--data", tmp_path / "nowhere"), "nowhere is neither a directory nor")
    assert_one_line_error(evaluate("--checkpoint", ours, "--data", tmp_path / "empty"), "no images under .*empty")
    assert_one_line_error(evaluate("--checkpoint", ours, "--data", tmp_path / "val"), "no images under .*train")


def test_class_folder_that_training_lacks(evaluate, ours, tmp_path):
    write_image(tmp_path / "train" / "ant" / "0.png", COLOURS["ant"], (20, 20))
    write_image(tmp_path / "val" / "bee" / "0.png", COLOURS["bee"], (20, 20))
    assert_one_line_error(evaluate("--checkpoint", ours, "--data", tmp_path), "bee")


def test_training_images_without_class_folders(evaluate, ours, tmp_path):
    write_image(tmp_path / "train" / "0.png", COLOURS["ant"], (20, 20))
    write_image(tmp_path / "val" / "bee" / "0.png", COLOURS["bee"], (20, 20))
    assert_one_line_error(evaluate("--checkpoint", ours, "--data", tmp_path), "needs labels", "train/CLASS")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("size", [(20, 20), (200, 200)])
def test_truncated_image_is_named(size, workers, evaluate, ours, tmp_path):
    for i in range(12):
        write_image(tmp_path / f"{i:02}.png", (20 * i, 0, 0), size)
    broken = tmp_path / "11.png"
    broken.write_bytes(broken.read_bytes()[:50])
    result = evaluate("--checkpoint", ours, "--data", tmp_path, "--features", tmp_path / "f.pth", "--num_workers", workers)
    assert_one_line_error(result, "cannot read image .*11.png", "replace or delete")
    assert not (tmp_path / "f.pth").exists()


@pytest.mark.parametrize("content", [
    b"not a checkpoint", [torch.zeros(3)], {"epoch": 3}, {0: torch.zeros(3)},
    {"meta": {"epoch": 3}, "state_dict": {"weight": torch.zeros(3)}},
], ids=["text", "list", "no weights", "keys that are not strings", "somebody's meta"])
def test_file_that_is_not_a_checkpoint(content, evaluate, small_folder, tmp_path):
    path = tmp_path / "other.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    result = evaluate("--arch", "vit_nano", "--checkpoint", path, "--data", small_folder)
    assert_one_line_error(result, "other.pth", "is not a|does not fit")


def test_checkpoint_of_another_architecture(evaluate, student, small_folder, tmp_path):
    torch.save(student.state_dict(), tmp_path / "tiny.pth")
    options = ["--checkpoint", tmp_path / "tiny.pth", "--data", small_folder, "--img_size", 32]
    assert_one_line_error(evaluate(*options, "--arch", "vit_small"), "tiny.pth does not fit", "192", "384", "--arch")
    assert_one_line_error(evaluate(*options, "--arch", "vit_large"), "tiny.pth does not fit", "keys are missing", "blocks.12")
    assert_one_line_error(evaluate(*options, "--arch", "resnet18"), "tiny.pth does not fit", "conv1.weight", "cls_token")
    assert_one_line_error(evaluate(*options, "--arch", "vit_tiny", "--patch_size", 8), "tiny.pth does not fit", "patch_embed")


def test_missing_keys_are_named(evaluate, ours, small_folder, tmp_path):
    content = torch.load(ours, weights_only=True)
    del content["student"]["backbone.blocks.1.attn.qkv.bias"]
    torch.save(content, tmp_path / "cut.pth")
    result = evaluate("--checkpoint", tmp_path / "cut.pth", "--data", small_folder)
    assert_one_line_error(result, "cut.pth does not fit", "1 keys are missing", r"blocks\.1\.attn\.qkv\.bias")


def test_features_into_a_directory(evaluate, ours, small_folder, tmp_path):
    result = evaluate("--checkpoint", ours, "--data", small_folder, "--features", tmp_path)
    assert_one_line_error(result, "is a directory", "features.pth")
