"""rrkd.py: losses against loops written from the equations, the promises P1-P10, anchors, teachers, and the five tables."""
import json
import math
import re
import shutil

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from conftest import assert_one_line_error, finished, leaf, read_log, run_script, same
from sklearn.linear_model import LogisticRegression

import common
import rrkd

TINY = ["--batch_size", "32", "--log_every", "1", "--knn_every", "0", "--num_workers", "0", "--epochs", "2"]


@pytest.fixture(autouse=True)
def bare_runs(monkeypatch):
    """Runs in this process draw nothing and check no k-NN, which take longer than their few steps."""
    monkeypatch.setattr(common.Run, "draw_curves", lambda self: None)
    monkeypatch.setattr(rrkd, "draw_maps", lambda path, maps: None)
    monkeypatch.setattr(rrkd, "knn_accuracy", lambda *arguments, **options: None)
    monkeypatch.setattr(common, "signals", [])


def arguments(folder, *extra):
    return rrkd.parse_arguments([*TINY, "--device", "cpu", "--output_dir", str(folder), *map(str, extra)])


def filled(*flags):
    """Arguments with what the recipe fills in."""
    args = arguments("unused", *flags)
    rrkd.prepare(args)
    return args


def train(folder, *extra):
    """One run in this process -> the student's checkpoint."""
    rrkd.train(arguments(folder, *extra))
    return common.read_checkpoint(folder / "checkpoint.pth")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Flags for a distillation alone: from an autoencoder without labels, and from a classifier with labels."""
    root = tmp_path_factory.mktemp("teachers")
    with pytest.MonkeyPatch.context() as patch:
        bare_runs.__wrapped__(patch)
        train(root / "ae64", "--loss", "none", "--arch", "ae64")
        train(root / "mlp32", "--loss", "none", "--arch", "mlp32", "--labels")
    return {False: ["--no-baseline", "--teacher", root / "ae64" / "checkpoint.pth"],
            True: ["--no-baseline", "--teacher", root / "mlp32" / "checkpoint.pth", "--arch", "mlp32", "--labels"]}


# ------------------------------------------------------------------------------------------------------------- losses


def naive_relative(z, anchors):
    return torch.stack([F.cosine_similarity(row[None], anchors) for row in z])


def naive_rrkd(v_s, v_t, eps=1e-8):
    return -sum(torch.log(F.cosine_similarity(s, t, dim=0) / 2 + 0.5 + eps) for s, t in zip(v_s, v_t)) / len(v_s)


def naive_spkd(z_s, z_t):
    maps = ([F.normalize(z @ row, dim=0) for row in z] for z in (z_s, z_t))
    return sum((g_s - g_t).square().sum() for g_s, g_t in zip(*maps)) / len(z_s) ** 2


def naive_lpkd(z_s, z_t, k=5, sigma=1.0):
    total = 0
    for i in range(len(z_t)):
        squared = [(z - z_t[i]).square().sum() for z in z_t]
        for j in sorted({*range(len(z_t))} - {i}, key=lambda j: squared[j].item())[:k]:
            total = total + torch.exp(-squared[j] / sigma**2) * (z_s[i] - z_s[j]).square().sum()
    return total / k


def naive_soft_cross_entropy(s, t, tau):
    return -sum((torch.softmax(b / tau, 0) * torch.log_softmax(a / tau, 0)).sum() for a, b in zip(s, t)) / len(s)


@pytest.mark.parametrize("ours, naive, shapes, options", [
    (rrkd.relative_representation, lambda z: naive_relative(z, z), [(5, 7)], {}),
    (rrkd.relative_representation, naive_relative, [(5, 7), (3, 7)], {}),
    *[(rrkd.rrkd_loss, naive_rrkd, [(5, 6), (5, 6)], options) for options in ({}, {"eps": 0.1})],
    (lambda s, t: rrkd.distillation_losses("rrkd", s, t)["loss_rrkd"],
     lambda s, t: naive_rrkd(naive_relative(s, s), naive_relative(t, t)), [(5, 3), (5, 8)], {}),
    (rrkd.spkd_loss, naive_spkd, [(5, 3), (5, 8)], {}),
    # of the last all others count, and k still divides
    *[(rrkd.lpkd_loss, naive_lpkd, [(8, 3), (8, 4)], options) for options in ({}, {"k": 2, "sigma": 3.0}, {"k": 20, "sigma": 2.0})],
    *[(rrkd.soft_cross_entropy, naive_soft_cross_entropy, [(4, 6), (4, 6)], {"tau": tau}) for tau in (0.5, 4.0)]])
def test_losses_equal_loops_from_their_equations(ours, naive, shapes, options):
    """Values and gradients, of student and teacher, whose widths may differ."""
    x = [leaf(*shape, seed=i) for i, shape in enumerate(shapes)]
    values = ours(*x, **options), naive(*x, **options)
    torch.testing.assert_close(*values, rtol=1e-7, atol=1e-10)
    weight = torch.linspace(1, 2, values[1].numel(), dtype=torch.float64).view_as(values[1])
    gradients = [torch.autograd.grad((weight * value).sum(), x) for value in values]
    assert max(g.abs().max() for g in gradients[1]) > 1e-6
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def test_closed_forms():
    """RRKD: equal maps 0, orthogonal rows log 2, opposite rows -log eps; not Eq. 3 as printed, which is not 0 for equal maps.
    LPKD: three points on a line at 0, 1, 3, one neighbour each: 1-0, 0-1, 3-1; not symmetrised."""
    v, one = torch.eye(4), torch.ones(2, 2)
    for other, expected in ((5 * v, 0), (v.roll(1, 0), math.log(2)), (-v, -math.log(1e-8))):
        assert rrkd.rrkd_loss(v, other).item() == pytest.approx(expected, abs=1e-6)
    assert rrkd.rrkd_loss(one, torch.eye(2)).item() == pytest.approx(-math.log(0.5**0.5 / 2 + 0.5))  # collapsed
    x = torch.randn(64, 33)  # rounding takes some cosines below -1
    assert rrkd.rrkd_loss(x, -x).isfinite()
    z, rotation = leaf(6, 4), torch.linalg.qr(leaf(4, 4, seed=1))[0]
    torch.testing.assert_close(rrkd.relative_representation(3 * z @ rotation), rrkd.relative_representation(z))
    assert rrkd.spkd_loss(z, 3 * z) < 1e-12
    z_t, z_s = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 5.0]])
    assert rrkd.lpkd_loss(z_s, z_t, k=1).item() == pytest.approx(math.exp(-1) * 4 * 2 + math.exp(-4) * 9)
    assert rrkd.lpkd_loss(torch.ones(3, 2), z_t) == 0  # LPKD is smallest where the student collapses


def test_the_gradient_of_every_loss_repeats_exactly(request):
    """P2 at the losses, where a row is the neighbour of many and threads could add to its gradient in any order."""
    z_s, z_t = leaf(400, 64, dtype=torch.float32), leaf(400, 64, seed=1, dtype=torch.float32).detach() / 8
    request.addfinalizer(lambda threads=torch.get_num_threads(): torch.set_num_threads(threads))
    torch.set_num_threads(2)
    for loss in ("rrkd", "spkd", "lpkd", "feature"):
        gradients = [torch.autograd.grad(sum(rrkd.distillation_losses(loss, z_s, z_t).values()), z_s)[0] for _ in range(30)]
        assert gradients[0].norm() > 0 and all(torch.equal(gradients[0], each) for each in gradients), loss


ODD = {"batch of one": torch.randn(1, 6), "identical rows": torch.ones(5, 6), "zero vectors": torch.zeros(5, 6),
       "one zero vector": torch.randn(5, 6) * (torch.arange(5) != 1)[:, None], "tiny": 1e-30 * torch.randn(5, 6),
       "large": 1e6 * torch.randn(5, 6)}


@pytest.mark.parametrize("student", ODD)
@pytest.mark.parametrize("teacher", ODD)
@pytest.mark.parametrize("loss", ["rrkd", "spkd", "lpkd"])
def test_losses_stay_finite(loss, student, teacher):
    z_s, z_t = ODD[student], ODD[teacher]
    n = min(len(z_s), len(z_t))
    z_s, z_t = z_s[:n].clone().requires_grad_(), z_t[:n, [0, 1, 2]]  # of unlike width
    value = rrkd.distillation_losses(loss, z_s, z_t)[f"loss_{loss}"]
    gradient, = torch.autograd.grad(value, z_s)
    assert value.isfinite() and gradient.isfinite().all()
    if loss == "rrkd":  # F.normalize would give rows of zeros a gradient of 1e12
        assert (gradient[(z_s == 0).all(1)].abs() < 1e3).all()


def test_losses_run_in_fp32_under_autocast():
    z_s, z_t = torch.randn(6, 8), torch.randn(6, 8)
    for loss in ("rrkd", "spkd", "lpkd", "kd", "feature"):
        with torch.autocast("cpu", torch.bfloat16):
            rounded = [z_s.bfloat16(), z_t.bfloat16()] * 2  # features, and logits
            under = rrkd.distillation_losses(loss, *rounded)
        expected = rrkd.distillation_losses(loss, *(x.float() for x in rounded))
        assert all(value.dtype == torch.float32 for value in under.values())
        torch.testing.assert_close(under, expected, rtol=1e-6, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("arch,parameters,width", [("ae64", 108_736, 64), ("ae32", 52_320, 32), ("mlp1200", 2_383_200, 1200),
                                                   ("mlp32", 26_176, 32), ("resnet9_half", 1_226_400, 256)])
def test_sizes_are_the_papers(arch, parameters, width):
    """Tables 1-3: 109K, 52K, 2M, 26K; and of ResNet-9 x 0.5 the share of the teacher's."""
    S = 32 if arch == "resnet9_half" else 28
    backbone = rrkd.make_backbone(arch, S)
    assert rrkd.Network(arch, backbone, 0, (), ()).size == parameters and backbone.embed_dim == width
    assert backbone.eval()(torch.randn(2, 3, S, S)).shape == (2, width)
    if arch == "resnet9_half":
        teacher = sum(p.numel() for p in rrkd.make_backbone("resnet18", S).parameters())
        shares = [(parameters + 257 * classes) / (teacher + 513 * classes) for classes in (10, 100, 10)]
        assert sum(shares) / 3 == pytest.approx(0.1105, abs=5e-5)  # Sec. 5.2: 11.05 % on average, classifiers included
        assert backbone.conv1.stride == (1, 1) and isinstance(backbone.maxpool, nn.Identity)
        assert [len(getattr(backbone, f"layer{i}")) for i in (1, 2, 3, 4)] == [1, 1, 1, 1]
        assert [z.shape[1] for z in backbone(torch.randn(1, 3, S, S), layers=True)] == [32, 64, 128, 256]


def test_autoencoder_equals_its_layers():
    """Linear, dropout, ReLU after every hidden layer, the latent too; tanh at the end; the encoder ends at a linear layer."""
    student, _ = rrkd.build(filled("--arch", "ae64", "--loss", "none"), 10, None)
    layers = [(layer.weight, layer.bias) for layer in [*student.backbone.layers, *student.decoder]]
    assert [(64, 128), (128, 64), (64, 128), (128, 64)] == [tuple(weight.T.shape) for weight, _ in layers]
    x, u = torch.rand(5, 1, 8, 8).expand(-1, 3, -1, -1), common.draw(3, 7, 2000, 5, 128 + 64 + 128)
    keep = [2 * (part >= 0.5) for part in u.split([128, 64, 128], 1)]
    first = F.linear(x[:, 0].flatten(1), *layers[0])
    z = F.linear(F.relu(first * keep[0]), *layers[1])
    hidden = F.linear(F.relu(z * keep[1]), *layers[2])
    pixels = torch.tanh(F.linear(F.relu(hidden * keep[2]), *layers[3]))
    student.hand_out(3, 7, 5, 0)
    torch.testing.assert_close(student(x), (z, None, pixels))
    student.eval()  # no dropout: the features that are probed
    torch.testing.assert_close(student.backbone(x), F.linear(F.relu(first), *layers[1]))


@pytest.mark.parametrize("flags, parts", [
    ("none --arch ae32", {"decoder"}), ("none --arch mlp32", {"classifier"}), ("rrkd", set()), ("spkd", set()), ("lpkd", set()),
    ("rrkd --labels", {"classifier"}), ("kd", {"classifier"}), ("feature", {"projection"}),
    ("feature --labels", {"projection", "classifier"})])
def test_heads_are_those_that_the_losses_need(flags, parts):
    """No parameter without a gradient: a head only where a loss reads it. Feature regression projects to the teacher's width."""
    teacher = None if "none" in flags else rrkd.Network("ae64", rrkd.make_backbone("ae64", 8), 10, common.MEAN, common.STD)
    student, _ = rrkd.build(filled("--loss", *flags.split()), 10, teacher)
    assert {name for name in ("classifier", "decoder", "projection") if getattr(student, name)} == parts
    assert not student.projection or student.projection.out_features == 64


def test_frozen_teacher_never_changes(image_folder, tmp_path, monkeypatch):
    """P4: parameters and BatchNorm's buffers of the teacher are those of its file after training, and it shares nothing.
    Sec. 5.2: momentum of 0.9 to distil, and none for the teacher."""
    networks, momenta, load_teacher, fit = [], [], rrkd.load_teacher, rrkd.fit
    monkeypatch.setattr(rrkd, "load_teacher", lambda *arguments: networks.append(load_teacher(*arguments)) or networks[0])
    monkeypatch.setattr(rrkd, "fit", lambda args, *rest: momenta.append(args.momentum) or fit(args, *rest))
    flags = ["--data", image_folder, "--img_size", 16, "--batch_size", 8, "--teacher_arch", "resnet9_half", "--labels"]
    student = train(tmp_path, *flags, "--arch", "resnet9_half")["student"]
    teacher, = networks
    saved = common.read_checkpoint(tmp_path / "teacher" / "checkpoint.pth")["student"]
    assert same({**teacher.state_dict()}, saved) and any("running_mean" in name for name in saved)
    assert not any(module.training for module in teacher.modules()) and not any(p.requires_grad for p in teacher.parameters())
    assert not torch.equal(student["backbone.conv1.weight"], saved["backbone.conv1.weight"])
    assert momenta == [0.0, 0.9, 0.9]  # teacher, baseline, student


# ----------------------------------------------------------------------------- P1 to P3: several processes, exact repeats

STEPS = [(False, "none --arch ae32"), (True, "none"), (False, "rrkd"), (True, "rrkd"), (False, "rrkd --anchors random"),
         (False, "spkd"), (False, "lpkd"), (True, "lpkd"), (True, "kd"), (False, "feature")]


def first_steps(number, runs):
    """The losses of two steps of each run, and all gradients of the first one, as the training loop has them; and those of ResNets."""
    step, results = torch.optim.SGD.step, []

    def recorded(self, *arguments):
        gradients.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]))
        return step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        bare_runs.__wrapped__(patch)
        patch.setattr(rrkd, "accuracy", lambda *arguments: dict(accuracy=None, metric="probe", parameters=0))
        patch.setattr(torch.optim.SGD, "step", recorded)
        for flags in runs:
            gradients, args = [], arguments(*flags, "--max_steps", 2)
            rrkd.train(args)
            results.append(([record["loss"] for record in read_log(args.output_dir) if "loss" in record], gradients[0]))
    return results, resnet_gradients()


def resnet_gradients():
    """The same for ResNet-9 x 0.5, whose BatchNorm spans the global batch, in fp64, for three losses."""
    results = []
    for loss in ("rrkd", "spkd", "lpkd"):
        torch.manual_seed(0)
        network = rrkd.Network("resnet9_half", rrkd.make_backbone("resnet9_half", 16), 4, common.MEAN, common.STD).double()
        model = common.distributed(network)  # has to be there in the backward pass
        x, z_t = leaf(12, 3, 16, 16).detach(), leaf(12, 20, seed=1).detach()
        labels, rows = torch.arange(12) % 4, common.local_rows(12)
        z, logits, _ = model(x[rows])
        total = rrkd.distillation_losses(loss, z, z_t[rows])[f"loss_{loss}"] + F.cross_entropy(logits, labels[rows])
        total.backward()
        results.append({"loss": common.mean_over_processes(total), "gradients": [p.grad for p in network.parameters()],
                        "statistics": [b.clone() for name, b in network.named_buffers() if "running" in name]})
    return results


def test_world_size_does_not_matter(teachers, in_processes, tmp_path):
    """P1: two processes with 16 images each = one with 32, for every loss, dropout and fixed anchors: losses and gradients."""

    def runs(processes):
        return [[tmp_path / processes / str(i), *teachers[labels][3 * ("none" in loss) :], "--loss", *loss.split()]
                for i, (labels, loss) in enumerate(STEPS)]

    alone, resnets = first_steps(0, runs("one"))
    for steps, resnets_of_two in in_processes(2, first_steps, runs("two")):
        torch.testing.assert_close(resnets_of_two, resnets, rtol=1e-7, atol=1e-9)
        for (_, loss), (losses, gradient), (its_losses, its_gradient) in zip(STEPS, alone, steps, strict=True):
            assert len(gradient) > 3000 and gradient.norm() > 0
            assert its_losses == pytest.approx(losses, rel=1e-5), loss
            assert (its_gradient - gradient).norm() / gradient.norm() < 1e-5, loss


def test_the_whole_job_resumes_exactly(tmp_path):
    """P2 for teacher, baseline and student together: a teacher is not cut short, so its student sees the same one."""
    flags = ["--batch_size", 359, "--epochs", 1]
    whole = train(tmp_path / "whole", *flags)
    train(tmp_path / "moved", *flags, "--max_steps", 2)
    (tmp_path / "moved").rename(tmp_path / "parts")  # no path of its own making is compared
    parts = train(tmp_path / "parts", *flags, "--resume")
    *_, result = log = read_log(tmp_path / "parts")
    steps = [record for record in log if "images_per_s" in record]
    seconds = sum(359 / record["images_per_s"] for record in steps)  # those before the break too
    assert [record["step"] for record in steps] == [1, 2, 3, 4] and result["minutes"] == pytest.approx(seconds / 60)
    whole["args"] = parts["args"] = None
    assert same(whole, parts)
    for name in ("teacher", "baseline"):
        a, b = (common.read_checkpoint(tmp_path / run / name / "backbone.pth") for run in ("whole", "parts"))
        assert same(dict(a), dict(b))


# ------------------------------------------------------------------------------------------------------ P7: bad input

BAD_INPUT = """
--teacher_arch vit_giant                        => unknown --arch vit_giant
--teacher {ae} --arch timm/no_such_model        => no model 'no_such_model'
--teacher {ae} --arch vit_nano --patch_size 3   => 8 x 8 is not a multiple of patch size 3
--arch timm/vit_tiny_patch16_224                => images of 8 pixels are not a multiple of patch size 16 of timm/vit_tiny
--pretrained --teacher_arch resnet18            => no ImageNet weights for --arch ae32.*--no-pretrained
--teacher {tmp}/none.pth                        => no file .*none.pth
--teacher {tmp}/not.pth                         => not a PyTorch checkpoint
--teacher {tmp}/bare.pth --teacher_arch ae32    => does not fit this.*size mismatch
--teacher {tmp}/short.pth --teacher_arch ae64   => 1 keys are missing.*layers.1.bias
--teacher {ae} --init {mlp}                     => does not fit this architecture
--init {tmp}/bare.pth --arch ae32               => does not fit this architecture
--teacher {ae} --img_size 16                    => takes 8-pixel images.*--img_size
--no-baseline --teacher {ae} --loss kd          => --loss kd needs logits of 10 classes; the teacher has 0.*--teacher
--no-baseline --teacher {ae} --loss lpkd --labels      => --loss lpkd needs logits of 10 classes.*--no-labels
{small} {images} --no-baseline --teacher {mlp} --loss kd => logits of 2 classes; the teacher has 10
--loss kd                                       => --teacher_arch ae64 is an autoencoder.*mlp1200
{small} {flat} --teacher {ae}                   => has no labels.*--no-labels
{small} {flat} --no-labels --anchors class      => --anchors class needs labels
{small} {tmp}/one --no-labels --anchors confident => needs labels of two classes
--loss spkd --anchors random                    => --anchors is for --loss rrkd
--table 5 --anchors random                      => a --table has its own
--loss none --teacher {ae}                      => --loss none trains --arch on its own
--table 1 --seeds -1                            => argument --seeds: -1 is not a number of at least 0
{small} {flat} --recipe mnist --arch mlp32      => has no labels to train mlp32 with.*--no-baseline
--device cuda                                   => not available
--table 1 --teacher {ae}                        => --table trains its own teachers
--table 1 --data_path {tmp}/empty               => mnist is not under.*--data_path
--table 3 {small} {flat}                        => needs labels: train/ and val/ of two class folders
"""


def test_bad_input_gets_one_line(tmp_path, capsys, image_folder, teachers):
    """P7: what is wrong and what to do, exit code 2; and before any network is trained for nothing. (What all scripts refuse is
    in test_promises.py.) One class alone has no accuracy, and a classifier tests only data of as many classes as its own."""
    cats, ae, mlp, run = image_folder / "train" / "cat", teachers[False][2], teachers[True][2], tmp_path / "run"
    small = "--batch_size 8 --img_size 8 --data"
    places = dict(tmp=tmp_path, images=image_folder, flat=cats, ae=ae, mlp=mlp, small=small)
    for split in ("train", "val"):
        shutil.copytree(cats, tmp_path / "one" / split / "cat")
    (tmp_path / "not.pth").write_text("not a checkpoint")
    bare = common.read_checkpoint(ae.parent / "backbone.pth")
    torch.save(bare, tmp_path / "bare.pth")
    del bare["layers.1.bias"]
    torch.save(bare, tmp_path / "short.pth")
    for case in BAD_INPUT.strip().splitlines():
        flags, says = case.format(**places).split("=>")

        def main():
            args = arguments(run, *flags.split())
            rrkd.table(args) if args.table else rrkd.train(args)

        assert_one_line_error(finished(capsys, main), says.strip())
        assert not list(run.rglob("*.pth")), case
    for data, says in ((image_folder, r"teacher .* probe accuracy \S+ %"), (tmp_path / "one", "none: no labels of two classes")):
        train(run / data.name, *small.split(), data, *teachers[True][:-1], "--no-labels", "--metric", "head", "--max_steps", 1)
        assert re.search(says, capsys.readouterr().out)


# ----------------------------------------------------------------------------- P8, P10: what is saved, and other networks


def test_students_load_elsewhere(tmp_path, monkeypatch):
    """P10: a ResNet into torchvision and a ViT into timm, strict and with equal outputs; both through `load_backbone` too."""
    few = tuple(data.subset(torch.arange(20)) for data in common.load_data("digits"))
    monkeypatch.setattr(rrkd, "load_data", lambda name, path: few)
    resnet = torchvision.models.resnet18()
    resnet.fc = nn.Identity()
    vit = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, num_classes=0)
    for arch, size, theirs in (("resnet18", 64, resnet), ("vit_tiny", 16, vit)):
        teacher = tmp_path / f"teacher_{arch}.pth"
        torch.save(rrkd.make_backbone("ae64", size).state_dict(), teacher)
        train(tmp_path / arch, "--arch", arch, "--img_size", size, "--teacher", teacher, "--teacher_arch", "ae64",
              "--no-baseline", "--max_steps", 1, "--batch_size", 4)
        theirs.load_state_dict(common.read_checkpoint(tmp_path / arch / "backbone.pth"), strict=True)
        ours, meta = common.load_backbone(tmp_path / arch / "checkpoint.pth")
        assert meta["backbone"]["arch"] == arch and meta["img_size"] == size
        x = torch.randn(2, 3, size, size)
        torch.testing.assert_close(ours(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


def test_any_teacher(tmp_path):
    """Teachers of this repository's other methods, of timm, and bare weights; image size and normalisation are the file's."""
    options = dict(arch="vit_nano", img_size=16, patch_size=8, num_heads=None, pos_embed="sincos")
    vit = common.vit_nano(img_size=16, patch_size=8, pos_embed="sincos")
    meta = dict(method="sdssl", network="student", backbone=options, mean=(0.1,) * 3, std=(0.2,) * 3)
    torch.save(dict(student={f"backbone.{name}": x for name, x in vit.state_dict().items()}, meta=meta), tmp_path / "sdssl.pth")
    ours = train(tmp_path / "a", "--teacher", tmp_path / "sdssl.pth", "--no-baseline", "--max_steps", 1)["meta"]
    assert ours["backbone"]["img_size"] == 16 and ours["mean"] == [0.1] * 3 and ours["std"] == [0.2] * 3
    network = timm.create_model("resnet10t", num_classes=0).eval()
    torch.save(network.state_dict(), tmp_path / "timm.pth")
    teacher = rrkd.load_teacher(tmp_path / "timm.pth", filled("--teacher_arch", "timm/resnet10t"))
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(teacher(x)[0], network(x))
    assert tuple(teacher.mean) == common.MEAN and teacher.classifier is None
    moco = common.vit_small(img_size=32, depth=12, num_heads=12, pos_embed="sincos")  # MoCo v3's, whose positions tell it
    torch.save({**moco.state_dict(), "pos_embed": moco.pos_embed.roll(192, 2)}, tmp_path / "moco.pth")
    teacher = rrkd.load_teacher(tmp_path / "moco.pth", filled("--teacher_arch", "vit_small", "--patch_size", 16, "--img_size", 48))
    assert teacher.backbone.blocks[0].attn.num_heads == 12
    positions = common.resize_positions(moco.pos_embed.roll(192, 2), (2, 2), (3, 3), as_dino=True)  # other people's, at another size
    torch.testing.assert_close(teacher.backbone.pos_embed.detach(), positions)


def test_what_a_checkpoint_brings_back(teachers):
    """P8: every load here is weights_only. KD and LPKD need logits of the teacher's own head; --init takes the backbone alone."""
    path = teachers[True][2]
    content = common.read_checkpoint(path)
    backbone = dict(arch="mlp32", img_size=8, patch_size=4)
    assert content["meta"] == dict(method="rrkd", network="student", backbone=backbone, classes=10, mean=[0.5] * 3, std=[0.5] * 3)
    student, _ = rrkd.build(filled("--loss", "none", "--arch", "mlp32"), 10, None)
    student.load_state_dict(content["student"])
    x = torch.randn(3, 3, 8, 8)
    z, logits, _ = rrkd.load_teacher(path, filled())(x)
    torch.testing.assert_close((z, logits, None), student.eval()(x))
    torch.testing.assert_close(logits, F.linear(F.relu(z), student.classifier[0].weight, student.classifier[0].bias))
    started, _ = rrkd.build(filled("--init", path, "--arch", "mlp32", "--loss", "none"), 10, None)
    assert same({**started.backbone.state_dict()}, {**student.backbone.state_dict()})
    assert not torch.equal(started.classifier[0].weight, student.classifier[0].weight)


def test_pretrained_resnets_take_timm_weights(monkeypatch):
    """`--pretrained resnet18` is timm's resnet18; nothing is downloaded here."""
    theirs, asked = timm.create_model("resnet18", num_classes=0).eval(), []
    monkeypatch.setattr(timm, "create_model", lambda name, **options: asked.append((name, options.get("pretrained"))) or theirs)
    x = torch.randn(2, 3, 64, 64)
    ours = rrkd.make_backbone("resnet18", 64, pretrained=True).eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert asked[-1] == ("resnet18", True) and rrkd.RECIPES["imagenet"]["pretrained"]


# ------------------------------------------------------------------------------------- anchors, weights of losses, recipes


def test_anchors_that_stay(monkeypatch):
    """confident: of each class the images classified correctly that have its largest probability; features are pixels here."""
    data, _ = common.load_data("digits")
    monkeypatch.setattr(rrkd, "features", lambda args, network, data, rows: data.images[rows].float().flatten(1) / 255)

    def choose(kind, batch_size, seed=0):
        return rrkd.choose_anchors(arguments("unused", "--anchors", kind, "--batch_size", batch_size, "--seed", seed), None, data)

    random, of_class = choose("random", 128), choose("class", 128)
    assert len(set(random.tolist())) == 128 and same(random, choose("random", 128))
    assert torch.bincount(data.labels[of_class]).tolist() == [13] * 10 and len(set(of_class.tolist())) == 130  # the paper's 130
    assert not same(random, choose("random", 128, seed=1)) and not same(of_class, choose("class", 128, seed=1))
    data.labels[::3] = (data.labels[::3] + 1) % 10  # many are classified wrongly
    x = data.images.float().flatten(1).numpy() / 255
    probe = LogisticRegression(max_iter=5000).fit(x, data.labels.numpy())
    p, predicted = probe.predict_proba(x), probe.predict(x)
    for c, chosen in enumerate(choose("confident", 45).view(10, 5).tolist()):
        right = [i for i in range(len(data)) if data.labels[i] == c and predicted[i] == c]
        best = sorted(right, key=lambda i: -p[i, c])[:5]
        np.testing.assert_allclose(p[chosen, c], p[best, c], rtol=1e-6)
        assert set(chosen) <= set(right)


def test_fixed_anchors_stay_and_learn(teachers, tmp_path, monkeypatch):
    """The maps are (B, A): the teacher's columns are the same images at every step, and gradient reaches the student's."""
    seen, original = [], rrkd.distillation_losses
    monkeypatch.setattr(rrkd, "distillation_losses", lambda *inputs: seen.append(inputs) or original(*inputs))
    train(tmp_path, *teachers[False], "--anchors", "class", "--max_steps", 3)
    (_, z_s, z_t, _, _, a_s, a_t, _), _, (*_, last_s, last_t, _) = seen
    assert z_s.shape == (32, 32) and z_t.shape == (32, 64) and a_s.shape == (40, 32) and a_t.shape == (40, 64)
    assert torch.equal(a_t, last_t) and not torch.equal(a_s, last_s) and a_s.requires_grad and not a_t.requires_grad
    args = filled("--anchors", "class")
    args.loss = "spkd"  # a row of a table for which --anchors was given
    assert rrkd.fixed_anchors(args, object(), None, None) == ([], None)


def test_loss_is_the_weighted_sum(teachers, tmp_path):
    """Eq. 4 and Sec. 5.2: lambda_D, lambda_CE, and LPKD's 1.5 and 2; each weight weighs what it names; tau changes the loss."""
    cases = {
        "rrkd": dict(rrkd=1, ce=1), "spkd": dict(spkd=1, ce=1), "lpkd": dict(lpkd=1.5, soft=2, ce=1), "kd": dict(kd=1, ce=1),
        "feature": dict(feature=1, ce=1), "rrkd --no-labels": dict(rrkd=1), "lpkd --no-labels": dict(lpkd=1.5),
        "lpkd --lambda_d 0.1 --lambda_ce 3 --lambda_soft 0.7": dict(lpkd=0.1, soft=0.7, ce=3), "kd --tau 2": dict(kd=1, ce=1)}
    first = {}
    for flags, weights in cases.items():
        weights = {f"loss_{name}": weight for name, weight in weights.items()}
        train(tmp_path / flags, *teachers[True], "--loss", *flags.split(), "--max_steps", 2)
        for record in (r for r in read_log(tmp_path / flags) if "loss" in r):
            assert {key for key in record if key.startswith("loss_")} == weights.keys(), flags
            assert record["loss"] == pytest.approx(sum(w * record[key] for key, w in weights.items()), rel=1e-5), flags
            first.setdefault(flags, record)
    assert first["kd"]["loss_kd"] != first["kd --tau 2"]["loss_kd"]


def test_recipes_follow_the_paper(tmp_path):
    """Sec. 5. MNIST's 54,000 / 6,000: a tenth is held out, the same for every seed; pixels reach the networks in [-1, 1]."""
    for recipe in rrkd.RECIPES.values():
        assert recipe["lr"] * recipe["batch_size"] / 256 == pytest.approx(0.1) and recipe["batch_size"] == 128
        assert recipe.keys() == rrkd.RECIPES["mnist"].keys()
    assert [rrkd.RECIPES[name]["epochs"] for name in ("mnist", "cifar10", "imagenet")] == [20, 50, 20]
    mnist, cifar = (common.View(8, **rrkd.RECIPES[name]["view"]) for name in ("mnist", "cifar10"))
    assert mnist.scale == cifar.scale == (1, 1) and mnist.flip == 0 and cifar.flip == 0.5 and cifar.p_jitter == 0
    train_data, held_out, test_data = rrkd.prepare(arguments(tmp_path, "--recipe", "mnist"))
    assert (len(train_data), len(held_out), len(test_data)) == (1294, 143, 360) and rrkd.RECIPES["mnist"]["validation"] == 0.1
    assert torch.equal(rrkd.prepare(arguments(tmp_path, "--recipe", "mnist", "--seed", 1))[0].images, train_data.images)
    args = arguments(tmp_path)
    everything, monitor, test = rrkd.prepare(args)
    assert len(everything) == 1437 and monitor is test and len(test) == 360
    loader = common.ViewLoader(everything, [common.View(8, **args.view)], 100, 0, "cpu", mean=args.mean, std=args.std)
    (_, (x,), _), = loader.steps(0, 1)
    assert x.min() == -1 and x.max() == 1


@pytest.mark.slow
def test_default_run_learns(tmp_path):
    """The README's first command: the student beats the baseline on digits and is within 4 points of the teacher."""
    result = run_script("rrkd.py", "--output_dir", tmp_path, timeout=1200)
    assert result.returncode == 0, result.stderr
    teacher, baseline, student = (float(x) for x in re.findall(r"accuracy (\S+) %", result.stdout))
    assert teacher > 92 and student > baseline + 2 and student > teacher - 4


# ------------------------------------------------------------------------------------------------- tables and figures


@pytest.mark.parametrize("numbers", [(1, 5), (2,)])
@pytest.mark.figures
def test_tables_on_digits(numbers, tmp_path, monkeypatch, capsys):
    """Every row and seed has its own folder. What is finished is not repeated, by table 5 neither; what is missing is made up for."""
    monkeypatch.setitem(rrkd.MLPS, "mlp1200", (40, 40))
    folders, end_step = [], common.Run.end_step  # of all training steps
    monkeypatch.setattr(common.Run, "end_step", lambda run, *a, **more: folders.append(run.folder) or end_step(run, *a, **more))

    def table(number):
        folders.clear()
        flags = "--data digits --recipe digits --seeds 42 43 --batch_size 359 --epochs 1".split()
        rrkd.table(arguments(tmp_path, "--table", number, *flags))
        return json.loads((tmp_path / f"table{number}.json").read_text())

    known = set()
    for number in numbers:
        rows = rrkd.TABLES[number]["rows"]
        content = table(number)
        new = {folder for _, folder, _ in rows} - known
        known |= new
        assert {folder.parent.name for folder in folders} == new and len(folders) == 4 * 2 * len(new)
        assert content["seeds"] == [42, 43] and [row["name"] for row in content["rows"]] == [name for name, _, _ in rows]
        output = capsys.readouterr().out
        for row in content["rows"]:
            a, b = row["values"]
            assert row["mean"] == pytest.approx((a + b) / 2) and row["std"] == pytest.approx(abs(a - b) / 2**0.5)
            assert 0 <= min(a, b) and max(a, b) <= 100 and row["paper"] is None and row["name"] in output
        assert (tmp_path / f"table{number}.png").stat().st_size > 1000
        assert table(number) == content and folders == []
        shutil.rmtree(tmp_path / "digits" / rows[2][1] / "43")
        assert table(number)["rows"][2]["values"] == content["rows"][2]["values"] and len(folders) == 4
    if 1 in numbers:
        logs = [read_log(tmp_path / "digits" / name / "42") for name in ("ae64", "ae32", "ae32-lr1e-8")]
        assert [log[0]["lr"] * 128 / 359 for log in logs] == pytest.approx([0.1, 0.1, 1e-8])


@pytest.mark.parametrize("number, teacher, student, img_size, epochs, momentum", [
    (1, "ae64", "ae32", 28, 20, 0.9), (2, "mlp1200", "mlp32", 28, 20, 0.0), (3, "resnet18", "resnet9_half", 32, 20, 0.0),
    (4, "resnet34", "resnet18", 224, 50, 0.0), (5, "ae64", "ae32", 28, 20, 0.9)])
def test_settings_of_the_tables(number, teacher, student, img_size, epochs, momentum, image_folder, tmp_path, monkeypatch):
    """A folder named as a data set has its recipe, its column's epochs and the paper's numbers; all rows learn from the first one."""
    runs = []
    monkeypatch.setattr(rrkd, "fit", lambda args, *rest: runs.append((args, *rest)) or dict(accuracy=50.0, parameters=1, minutes=0))
    spec = rrkd.TABLES[number]
    data = tmp_path / list(spec["columns"])[-1]
    data.symlink_to(image_folder)
    paper, _ = spec["columns"][data.name]
    for flags, expected in (([], epochs), (["--epochs", "3", "--max_steps", "2"], 3)):
        runs.clear()
        flags += ["--table", str(number), "--data", str(data), "--output_dir", str(tmp_path), "--seeds", "7"]
        rrkd.table(rrkd.parse_arguments(flags))
        assert {(args.img_size, args.epochs, args.seed) for args, *_ in runs} == {(img_size, expected, 7)}
        assert len({args.output_dir for args, *_ in runs}) == len(runs) == len(spec["rows"])
        (first, *_), *others = runs
        assert first.max_steps is None and {args.max_steps for args, *_ in others} == {2 if expected == 3 else None}
        assert (first.loss, first.arch, first.momentum) == ("none", teacher, momentum)
        assert {args.arch for args, *_ in others} == {student}
        for args, _, file in runs:
            assert str(file) == f"{first.output_dir}/checkpoint.pth"
        rows = json.loads((tmp_path / f"table{number}.json").read_text())["rows"]
        assert [row["paper"] for row in rows] == paper + [None] * (len(rows) - len(paper)) and not any(row["std"] for row in rows)
