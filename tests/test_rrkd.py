"""rrkd.py: losses against loops written from the equations, the promises P1-P10, anchors, teachers, and the five tables."""
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import assert_one_line_error, finished, leaf, read_log, run_script, same

import common
import rrkd

TINY = ["--batch_size", "32", "--log_every", "1", "--knn_every", "0", "--num_workers", "0", "--epochs", "2"]
LOSSES = ["rrkd", "spkd", "lpkd", "kd", "feature"]


@pytest.fixture(autouse=True)
def bare_runs(monkeypatch):
    """Runs in this process draw nothing and check no k-NN, which take longer than their few steps; the subprocesses do."""
    monkeypatch.setattr(common.Run, "draw_curves", lambda self: None)
    monkeypatch.setattr(rrkd, "draw_maps", lambda path, maps: None)
    monkeypatch.setattr(rrkd, "knn_accuracy", lambda *arguments, **options: None)
    monkeypatch.setattr(common, "signals", [])


def arguments(folder, *extra):
    return rrkd.parse_arguments([*TINY, "--device", "cpu", "--output_dir", str(folder), *map(str, extra)])


def train(folder, *extra):
    """One run in this process -> the student's checkpoint."""
    rrkd.train(arguments(folder, *extra))
    return torch.load(folder / "checkpoint.pth", weights_only=True)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Flags for a distillation alone: from an autoencoder without labels, and from a classifier with labels."""
    root = tmp_path_factory.mktemp("teachers")
    patch = pytest.MonkeyPatch()
    patch.setattr(common.Run, "draw_curves", lambda self: None)
    patch.setattr(rrkd, "knn_accuracy", lambda *arguments, **options: None)
    train(root / "ae64", "--loss", "none", "--arch", "ae64")
    train(root / "mlp32", "--loss", "none", "--arch", "mlp32", "--labels")
    patch.undo()
    return {False: ["--no-baseline", "--teacher", root / "ae64" / "checkpoint.pth"],
            True: ["--no-baseline", "--teacher", root / "mlp32" / "checkpoint.pth", "--arch", "mlp32", "--labels"]}


def filled(*flags):
    """Arguments with what the recipe of digits would fill in."""
    args = arguments("unused", *flags)
    for name, value in rrkd.RECIPES["digits"].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    return args


# ------------------------------------------------------------------------------------------------------------- losses


def cos(a, b):
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


def naive_relative(z, anchors):
    return torch.stack([torch.stack([cos(a, b) for b in anchors]) for a in z])


def naive_rrkd(v_s, v_t, eps=1e-8):
    return -sum(torch.log(cos(s, t) / 2 + 0.5 + eps) for s, t in zip(v_s, v_t)) / len(v_s)


def naive_spkd(z_s, z_t, all_s, all_t):
    total = 0
    for s, t in zip(z_s, z_t):
        g_s, g_t = torch.stack([(s * a).sum() for a in all_s]), torch.stack([(t * a).sum() for a in all_t])
        total = total + (g_s / (g_s**2).sum().sqrt() - g_t / (g_t**2).sum().sqrt()).pow(2).sum()
    return total / (len(z_s) * len(all_s))


def naive_lpkd(z_s, z_t, all_s, all_t, rows, k=5, sigma=1.0):
    """The sum over the global batch, from this process's rows of it: they are n of m, and processes are averaged."""
    total = 0
    for i, row in enumerate(rows):
        others = [j for j in range(len(all_t)) if j != row]
        nearest = sorted(others, key=lambda j: ((z_t[i] - all_t[j]) ** 2).sum().item())[:k]
        for j in nearest:
            w = torch.exp(-((z_t[i] - all_t[j]) ** 2).sum() / sigma**2)
            total = total + w * ((z_s[i] - all_s[j]) ** 2).sum()
    return total / k * len(all_s) / len(z_s)


def assert_same_value_and_gradient(ours, naive, *inputs):
    ours_value, naive_value = ours(), naive()
    torch.testing.assert_close(ours_value, naive_value, rtol=1e-7, atol=1e-10)
    weight = torch.linspace(1, 2, naive_value.numel(), dtype=torch.float64).view_as(naive_value)
    ours_gradient = torch.autograd.grad((weight * ours_value).sum(), inputs)
    naive_gradient = torch.autograd.grad((weight * naive_value).sum(), inputs)
    assert max(g.abs().max() for g in naive_gradient) > 1e-6
    torch.testing.assert_close(ours_gradient, naive_gradient, rtol=1e-6, atol=1e-9)


def test_relative_representation_equals_eq2():
    z, anchors = leaf(5, 7), leaf(3, 7, seed=1)
    assert_same_value_and_gradient(lambda: rrkd.relative_representation(z), lambda: naive_relative(z, z), z)
    assert_same_value_and_gradient(lambda: rrkd.relative_representation(z, anchors), lambda: naive_relative(z, anchors), z, anchors)
    v = rrkd.relative_representation(z)
    torch.testing.assert_close(v, v.T)
    torch.testing.assert_close(v.diagonal(), torch.ones(5, dtype=torch.float64))


def test_relative_representation_ignores_rotation_and_scale():
    z = leaf(6, 4)
    rotation = torch.linalg.qr(leaf(4, 4, seed=1))[0]
    torch.testing.assert_close(rrkd.relative_representation(3 * z @ rotation), rrkd.relative_representation(z))


@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_rrkd_loss_equals_eq3(eps):
    """On free maps, and through the maps to the features of student and teacher, whose widths differ."""
    v_s, v_t = leaf(5, 6), leaf(5, 6, seed=1)
    assert_same_value_and_gradient(lambda: rrkd.rrkd_loss(v_s, v_t, eps), lambda: naive_rrkd(v_s, v_t, eps), v_s, v_t)
    z_s, z_t = leaf(5, 3), leaf(5, 8, seed=1)
    assert_same_value_and_gradient(
        lambda: rrkd.rrkd_loss(rrkd.relative_representation(z_s), rrkd.relative_representation(z_t), eps),
        lambda: naive_rrkd(naive_relative(z_s, z_s), naive_relative(z_t, z_t), eps), z_s, z_t)


def test_rrkd_loss_closed_forms():
    """Equal maps 0, orthogonal rows log 2, opposite rows -log eps; not Eq. 3 as printed, which is not 0 for equal maps."""
    v = torch.eye(4)
    assert rrkd.rrkd_loss(v, 5 * v).abs() < 1e-6
    torch.testing.assert_close(rrkd.rrkd_loss(v, v.roll(1, 0)), torch.tensor(math.log(2)))
    torch.testing.assert_close(rrkd.rrkd_loss(v, -v), torch.tensor(-math.log(1e-8)))
    x = torch.randn(64, 33)  # rounding takes some cosines below -1
    assert rrkd.rrkd_loss(x, -x).isfinite()
    collapsed = rrkd.rrkd_loss(torch.ones(2, 2), rrkd.relative_representation(torch.tensor([[1.0, 0], [0, 1.0]])))
    torch.testing.assert_close(collapsed, torch.tensor(-math.log(0.5**0.5 / 2 + 0.5)))


def test_spkd_loss_equals_its_loop():
    z_s, z_t = leaf(5, 3), leaf(5, 8, seed=1)
    assert_same_value_and_gradient(lambda: rrkd.spkd_loss(z_s, z_t), lambda: naive_spkd(z_s, z_t, z_s, z_t), z_s, z_t)
    all_s, all_t = leaf(9, 3, seed=2), leaf(9, 8, seed=3)
    assert_same_value_and_gradient(lambda: rrkd.spkd_loss(z_s, z_t, all_s, all_t), lambda: naive_spkd(z_s, z_t, all_s, all_t),
                                   z_s, z_t, all_s, all_t)
    assert rrkd.spkd_loss(z_s, 3 * z_s) < 1e-12


@pytest.mark.parametrize("k,sigma", [(5, 1.0), (2, 3.0), (20, 2.0)])
def test_lpkd_loss_equals_its_loop(k, sigma):
    """k may exceed the number of other rows: all of them count, and the sum is still divided by k."""
    z_s, z_t = leaf(8, 3), leaf(8, 4, seed=1)
    assert_same_value_and_gradient(lambda: rrkd.lpkd_loss(z_s, z_t, k, sigma),
                                   lambda: naive_lpkd(z_s, z_t, z_s, z_t, range(8), k, sigma), z_s, z_t)
    rows = torch.tensor([2, 3])  # the second of four processes
    assert_same_value_and_gradient(
        lambda: rrkd.lpkd_loss(z_s[2:4], z_t[2:4], k, sigma, z_s, z_t, rows),
        lambda: naive_lpkd(z_s[2:4], z_t[2:4], z_s, z_t, rows.tolist(), k, sigma), z_s, z_t)


def test_the_gradient_of_every_loss_repeats_exactly():
    """P2 at the losses, where a row is the neighbour of many and threads could add to its gradient in any order."""
    z_s, z_t = leaf(400, 64, dtype=torch.float32), leaf(400, 64, seed=1, dtype=torch.float32).detach() / 8
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for loss in ("rrkd", "spkd", "lpkd", "feature"):
            gradients = [torch.autograd.grad(sum(rrkd.distillation_losses(loss, z_s, z_t).values()), z_s)[0] for _ in range(30)]
            assert gradients[0].norm() > 0 and all(torch.equal(gradients[0], each) for each in gradients), loss
    finally:
        torch.set_num_threads(threads)


def test_lpkd_closed_form():
    """Three points on a line at 0, 1, 3, one neighbour each: 1-0, 0-1, 3-1; not symmetrised."""
    z_t, z_s = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 5.0]])
    expected = math.exp(-1) * 4 * 2 + math.exp(-4) * 9
    torch.testing.assert_close(rrkd.lpkd_loss(z_s, z_t, k=1), torch.tensor(expected))
    assert rrkd.lpkd_loss(torch.ones(3, 2), z_t) == 0  # LPKD is smallest where the student collapses


def test_soft_cross_entropy_equals_its_loop():
    s, t = leaf(4, 6), leaf(4, 6, seed=1)
    for tau in (0.5, 4.0):
        def naive(tau=tau):
            return -sum((torch.softmax(b / tau, 0) * torch.log_softmax(a / tau, 0)).sum() for a, b in zip(s, t)) / 4

        assert_same_value_and_gradient(lambda tau=tau: rrkd.soft_cross_entropy(s, t, tau), naive, s, t)


ODD = {"batch of one": torch.randn(1, 6), "identical rows": torch.ones(5, 6), "zero vectors": torch.zeros(5, 6),
       "one zero vector": torch.randn(5, 6) * torch.tensor([1.0, 0, 1, 1, 1])[:, None],
       "tiny": 1e-30 * torch.randn(5, 6), "large": 1e6 * torch.randn(5, 6)}


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
    zero = (z_s == 0).all(1)
    if loss == "rrkd" and zero.any():  # F.normalize would give them a gradient of 1e12
        assert gradient[zero].abs().max() < 1e3


def test_losses_run_in_fp32_under_autocast():
    z_s, z_t = torch.randn(6, 8), torch.randn(6, 12)
    for loss in (lambda s, t: rrkd.rrkd_loss(rrkd.relative_representation(s), rrkd.relative_representation(t)), rrkd.spkd_loss,
                 rrkd.lpkd_loss, lambda s, t: rrkd.soft_cross_entropy(s, t[:, :8]),
                 lambda s, t: rrkd.distillation_losses("feature", s, t[:, :8])["loss_feature"]):
        with torch.autocast("cpu", torch.bfloat16):
            under = loss(z_s.bfloat16(), z_t.bfloat16())
        assert under.dtype == torch.float32
        torch.testing.assert_close(under, loss(z_s.bfloat16().float(), z_t.bfloat16().float()), rtol=1e-6, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("arch,parameters,width", [("ae64", 108_736, 64), ("ae32", 52_320, 32), ("mlp1200", 2_383_200, 1200),
                                                   ("mlp32", 26_176, 32), ("resnet9_half", 1_226_400, 256)])
def test_sizes_are_the_papers(arch, parameters, width):
    """Tables 1-3: 109K, 52K, 2M, 26K; and of ResNet-9 x 0.5 the share of the teacher's."""
    img_size = 32 if arch.startswith("resnet") else 28
    backbone = rrkd.make_backbone(arch, img_size)
    assert sum(p.numel() for p in backbone.parameters()) == parameters and backbone.embed_dim == width
    assert backbone.eval()(torch.randn(2, 3, img_size, img_size)).shape == (2, width)
    if arch == "resnet9_half":
        teacher = sum(p.numel() for p in rrkd.make_backbone("resnet18", 32).parameters())
        shares = [(parameters + 257 * classes) / (teacher + 513 * classes) for classes in (10, 100, 10)]
        assert sum(shares) / 3 == pytest.approx(0.1105, abs=5e-5)  # Sec. 5.2: 11.05 % on average, classifiers included
        assert backbone.conv1.stride == (1, 1) and isinstance(backbone.maxpool, nn.Identity)
        assert [len(getattr(backbone, f"layer{i}")) for i in (1, 2, 3, 4)] == [1, 1, 1, 1]
        assert [z.shape[1] for z in backbone(torch.randn(1, 3, 32, 32), layers=True)] == [32, 64, 128, 256]


def test_autoencoder_equals_its_layers():
    """Linear, dropout, ReLU after every hidden layer, the latent too; tanh at the end; the encoder ends at a linear layer."""
    torch.manual_seed(0)
    student, _ = rrkd.build(filled("--arch", "ae64", "--loss", "none"), 10, None)
    assert [tuple(layer.weight.shape[::-1]) for layer in [*student.backbone.layers, *student.decoder.layers]] == [
        (64, 128), (128, 64), (64, 128), (128, 64)] and student.classifier is None
    x, u = torch.rand(5, 1, 8, 8).expand(-1, 3, -1, -1), torch.rand(5, 128 + 64 + 128)
    (a, b), (c, d) = student.backbone.layers, student.decoder.layers
    keep = [2 * (part >= 0.5) for part in u.split([128, 64, 128], 1)]
    z = b(F.relu(a(x[:, 0].flatten(1)) * keep[0]))
    expected = torch.tanh(d(F.relu(c(F.relu(z * keep[1])) * keep[2])))
    student.hand_out(u)
    ours, logits, pixels = student(x, 5)
    torch.testing.assert_close((ours, pixels), (z, expected))
    assert logits is None
    student.eval()  # no dropout: the features that are probed
    torch.testing.assert_close(student.backbone(x), b(F.relu(a(x[:, 0].flatten(1)))))


def test_heads_are_those_that_the_losses_need():
    """No parameter without a gradient: a head only where a loss reads it. Feature regression projects to the teacher's width."""
    class Fake:
        backbone, classifier, classes = rrkd.make_backbone("ae64", 8), object(), 10
        mean = std = (0.5, 0.5, 0.5)

    def parts(*flags):
        student, _ = rrkd.build(filled("--arch", "ae32", *flags), 10, None if "none" in flags else Fake)
        return {name for name in ("classifier", "decoder", "projection") if getattr(student, name)}

    assert parts("--loss", "none") == {"decoder"} and parts("--loss", "none", "--arch", "mlp32") == {"classifier"}
    assert parts("--loss", "rrkd") == parts("--loss", "spkd") == parts("--loss", "lpkd") == set()
    assert parts("--loss", "rrkd", "--labels") == parts("--loss", "kd") == {"classifier"}
    assert parts("--loss", "feature") == {"projection"} and parts("--loss", "feature", "--labels") == {"projection", "classifier"}


@pytest.mark.parametrize("labels", [False, True])
def test_frozen_teacher_never_changes(labels, image_folder, tmp_path, monkeypatch):
    """P4: parameters and BatchNorm's buffers of the teacher are those of its file after training, and it shares nothing."""
    flags = ["--data", image_folder, "--img_size", 16, "--batch_size", 8, "--teacher_arch", "resnet9_half"]
    flags += ["--labels"] if labels else ["--no-labels", "--no-baseline"]
    kept, original = [], rrkd.Teacher.__init__

    def keep(self, *arguments):
        original(self, *arguments)
        kept.append(self)

    monkeypatch.setattr(rrkd.Teacher, "__init__", keep)
    student = train(tmp_path, *flags, "--arch", "resnet9_half")["student"]
    teacher, = kept
    saved = torch.load(tmp_path / "teacher" / "checkpoint.pth", weights_only=True)["student"]
    assert same({**teacher.state_dict()}, saved) and any("running_mean" in name for name in saved)
    assert not any(module.training for module in teacher.modules()) and not any(p.requires_grad for p in teacher.parameters())
    assert not torch.equal(student["backbone.conv1.weight"], saved["backbone.conv1.weight"])


# ---------------------------------------------------------------------------------------------- P1: several processes

STEPS = [(False, "--loss", "none", "--arch", "ae32"), (True, "--loss", "none"), (False, "--loss", "rrkd"),
         (True, "--loss", "rrkd"), (False, "--loss", "rrkd", "--anchors", "random"), (False, "--loss", "spkd"),
         (False, "--loss", "lpkd"), (True, "--loss", "lpkd"), (True, "--loss", "kd"), (False, "--loss", "feature")]


def first_steps(number, runs):
    """The loss and all gradients of the first step of each run, as the training loop has them, and the second step's loss."""
    common.Run.draw_curves = rrkd.draw_maps = rrkd.knn_accuracy = lambda *arguments, **options: None
    rrkd.accuracy = lambda *arguments: dict(accuracy=None, metric="probe")
    original, found = torch.optim.SGD.step, []

    def step(self, *arguments):
        grads.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return original(self, *arguments)

    torch.optim.SGD.step = step
    try:
        for flags in runs:
            grads = []
            args = arguments(*flags, "--max_steps", 2)
            rrkd.train(args)
            found.append({"losses": [r["loss"] for r in read_log(args.output_dir) if "loss" in r], "gradients": grads[0]})
    finally:
        torch.optim.SGD.step = original
    return found


def test_world_size_does_not_matter(teachers, in_processes, tmp_path, monkeypatch):
    """P1: two processes with 16 images each = one with 32, for every loss, dropout and fixed anchors: losses and gradients."""
    for name in ("draw_maps", "knn_accuracy", "accuracy"):
        monkeypatch.setattr(rrkd, name, getattr(rrkd, name))

    def runs(processes):
        return [[str(tmp_path / processes / str(i)), *map(str, teachers[labels][3 * ("none" in flags) :]), *flags]
                for i, (labels, *flags) in enumerate(STEPS)]

    alone = first_steps(0, runs("one"))
    both = in_processes(2, first_steps, runs("two"))
    for (_, *flags), expected, *found in zip(STEPS, alone, *both):
        scale = torch.cat([g.flatten() for g in expected["gradients"]]).norm()
        assert scale > 0 and len(expected["gradients"]) >= 4
        for one in found:
            assert one["losses"] == pytest.approx(expected["losses"], rel=1e-5), flags
            pairs = zip(one["gradients"], expected["gradients"], strict=True)
            difference = torch.cat([(a - b).flatten() for a, b in pairs]).norm()
            assert difference / scale < 1e-5, flags


def resnet_gradients(number, loss):
    """The same for ResNet-9 x 0.5, whose BatchNorm spans the global batch, in fp64."""
    torch.manual_seed(0)
    network = rrkd.Student(rrkd.make_backbone("resnet9_half", 16), nn.Linear(256, 4)).double()
    model = common.distributed(network)
    generator = torch.Generator().manual_seed(1)
    x, z_t = torch.randn(12, 3, 16, 16, generator=generator).double(), torch.randn(12, 20, generator=generator).double()
    labels, rows = torch.arange(12) % 4, common.local_rows(12)
    z, logits, _ = model(x[rows], 12)
    terms = rrkd.distillation_losses(loss, z, z_t[rows]) | {"loss_ce": F.cross_entropy(logits, labels[rows])}
    sum(terms.values()).backward()
    return {"loss": common.mean_over_processes(sum(terms.values())), "gradients": [p.grad for p in network.parameters()],
            "statistics": [b.clone() for name, b in network.named_buffers() if "running" in name]}


def all_resnet_gradients(number):
    return [resnet_gradients(number, loss) for loss in ("rrkd", "spkd", "lpkd")]


def test_world_size_does_not_matter_to_resnets(in_processes):
    for expected, *found in zip(all_resnet_gradients(0), *in_processes(2, all_resnet_gradients)):
        for one in found:
            torch.testing.assert_close(one, expected, rtol=1e-7, atol=1e-9)


# ---------------------------------------------------------------------------------------------- P2, P3: exact repeats


def test_the_whole_job_resumes_exactly(tmp_path):
    """P2 for teacher, baseline and student together: a teacher is not cut short, so its student sees the same one."""
    flags = ["--batch_size", 359, "--epochs", 1]
    whole = train(tmp_path / "whole", *flags)
    train(tmp_path / "moved", *flags, "--max_steps", 2)
    (tmp_path / "moved").rename(tmp_path / "parts")  # no path of its own making is compared
    parts = train(tmp_path / "parts", *flags, "--resume")
    whole["args"] = parts["args"] = None
    assert same(whole, parts)
    for name in ("teacher", "baseline"):
        a, b = (torch.load(tmp_path / run / name / "backbone.pth", weights_only=True) for run in ("whole", "parts"))
        assert same(dict(a), dict(b))


# ------------------------------------------------------------------------------------------------------ P7: bad input


def run_in_process(capsys, *flags):
    """main() as `python rrkd.py` calls it -> something like a finished process."""

    def main():
        args = rrkd.parse_arguments([*TINY, "--device", "cpu", *map(str, flags)])
        rrkd.table(args) if args.table else rrkd.train(args)

    return finished(capsys, main)


def test_bad_input_gets_one_line(tmp_path, capsys, image_folder, teachers):
    """P7: what is wrong and what to do, exit code 2."""

    def check(*flags, says):
        assert_one_line_error(run_in_process(capsys, "--output_dir", tmp_path / "run", *flags), *says)

    ae, mlp = teachers[False][-1], teachers[True][2]
    alone = ["--no-baseline", "--teacher", ae]
    check("--data", tmp_path / "nowhere", says=["nowhere is neither a directory nor one of", "digits"])
    check("--data", image_folder, "--batch_size", 100, says=["24 images are fewer than --batch_size 100"])
    check(*alone, "--arch", "vit_giant", says=["unknown --arch vit_giant", "vit_small"])
    check(*alone, "--arch", "timm/no_such_model", says=["no model 'no_such_model'"])
    check(*alone, "--arch", "vit_nano", "--patch_size", 3, says=["8 x 8 is not a multiple of patch size 3"])
    check(*alone, "--arch", "ae32", "--pretrained", says=["no ImageNet weights for --arch ae32"])
    check("--teacher", tmp_path / "none.pth", says=["no file"])
    (tmp_path / "not.pth").write_text("not a checkpoint")
    check("--teacher", tmp_path / "not.pth", says=["not a PyTorch checkpoint"])
    bare = torch.load(ae, weights_only=True)["student"]
    bare = {name.removeprefix("backbone."): value for name, value in bare.items() if name.startswith("backbone.")}
    torch.save(bare, tmp_path / "bare.pth")
    check("--teacher", tmp_path / "bare.pth", "--teacher_arch", "ae32", says=["does not fit this", "size mismatch"])
    del bare["layers.1.bias"]
    torch.save(bare, tmp_path / "short.pth")
    check("--teacher", tmp_path / "short.pth", "--teacher_arch", "ae64", says=["1 keys are missing", "layers.1.bias"])
    check(*alone, "--init", mlp, says=["does not fit this architecture"])
    check(*alone, "--loss", "kd", says=["--loss kd needs the teacher's logits"])
    check(*alone, "--loss", "lpkd", "--labels", says=["--loss lpkd needs the teacher's logits", "--no-labels"])
    check("--device", "cuda" if not torch.cuda.is_available() else "mps", says=["not available"])
    check("--batch_size", 1, says=["argument --batch_size: 1 is not a number of at least 2"])
    check("--table", 1, "--teacher", ae, says=["--table trains its own teachers"])
    check("--table", 1, "--data_path", tmp_path / "empty", says=["mnist is not under", "--data_path"])
    flat = ["--data", image_folder / "train" / "cat", "--batch_size", 8, "--img_size", 8]
    check(*flat, "--teacher", ae, says=["has no labels", "--no-labels"])
    check(*flat, *alone, "--no-labels", "--anchors", "class", says=["--anchors class needs labels"])
    check(*flat, "--table", 3, says=["no test images with labels", "class folders"])
    check(*alone, "--img_size", 16, says=["takes images of 8 pixels and no others", "--img_size"])
    check("--loss", "kd", says=["--teacher_arch ae64 is an autoencoder", "mlp1200"])
    check("--arch", "timm/vit_tiny_patch16_224", says=["images of 8 pixels are not a multiple of patch size 16 of timm/vit_tiny_patch16_224"])
    two = ["--data", image_folder, "--batch_size", 8, "--img_size", 8, "--no-baseline", "--teacher", mlp]
    check(*two, "--loss", "kd", says=["logits of 2 classes, and this teacher has 10"])
    check("--table", 3, "--tau", 0, says=["argument --tau: 0 is not a number of at least"])
    assert not (tmp_path / "run" / "checkpoint.pth").exists()
    with pytest.raises(SystemExit):
        rrkd.parse_arguments(["--loss", "spkd", "--anchors", "random"])
    assert "--anchors is for --loss rrkd" in capsys.readouterr().err


def test_a_table_of_a_folder_that_is_a_known_data_set(tmp_path, monkeypatch):
    """A folder named mnist has MNIST's recipe, as its column has MNIST's numbers; anchors are for the rows of RRKD alone."""
    from PIL import Image

    for split, number in (("train", 8), ("val", 4)):
        for label in "01":
            (tmp_path / "mnist" / split / label).mkdir(parents=True)
            for i in range(number):
                Image.fromarray(np.full((28, 28), 20 * i, dtype=np.uint8)).save(tmp_path / "mnist" / split / label / f"{i}.png")
    rows = []
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(rrkd, "fit", lambda row, *arguments: rows.append(row) or dict(accuracy=50.0, parameters=1, minutes=0))
    rrkd.table(rrkd.parse_arguments(["--table", "1", "--data", str(tmp_path / "mnist"), "--output_dir", str(tmp_path / "out")]))
    assert {(row.img_size, row.epochs, row.mean, row.view["flip"]) for row in rows} == {(28, 20, (0.5,) * 3, 0.0)}
    rows.clear()
    rrkd.table(rrkd.parse_arguments(["--table", "3", "--anchors", "class", "--seeds", "0", "--data", str(tmp_path / "mnist"),
                                     "--output_dir", str(tmp_path / "out")]))
    assert {row.loss for row in rows if row.anchors == "class"} == {"rrkd"} < {row.loss for row in rows}


def test_what_a_teacher_file_settles(teachers, image_folder, tmp_path, capsys):
    """Its image size; its classifier tests only data of as many classes; one class alone has no accuracy; momentum."""
    vit = common.vit_nano(img_size=16, patch_size=8)
    meta = dict(method="sdssl", network="student", backbone=dict(arch="vit_nano", img_size=16, patch_size=8), mean=(0.5,) * 3, std=(0.5,) * 3)
    weights = {f"backbone.{name}": w for name, w in vit.state_dict().items()}
    common.save_file(dict(student=weights, meta=meta), tmp_path / "vit.pth")
    content = train(tmp_path / "size", "--teacher", tmp_path / "vit.pth", "--no-baseline", "--max_steps", 1)
    assert content["meta"]["backbone"]["img_size"] == 16
    capsys.readouterr()
    two = ["--data", image_folder, "--img_size", 8, "--batch_size", 8, "--no-baseline", "--no-labels", "--metric", "head", "--max_steps", 1]
    train(tmp_path / "classes", *two, "--teacher", teachers[True][2], "--arch", "mlp32")
    assert re.search(r"teacher .* probe accuracy \S+ %", capsys.readouterr().out)
    shutil.copytree(image_folder / "train" / "cat", tmp_path / "one" / "train" / "cat")
    shutil.copytree(image_folder / "val" / "cat", tmp_path / "one" / "val" / "cat")
    one = ["--data", tmp_path / "one", *two[2:], "--teacher", teachers[True][2], "--arch", "mlp32"]
    train(tmp_path / "lonely", *one)
    assert "none: no labels of two classes" in capsys.readouterr().out
    assert_one_line_error(run_in_process(capsys, *one, "--anchors", "confident", "--output_dir", tmp_path / "c"), "labels of two classes")
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rrkd, "fit", lambda args, *rest: seen.append(args) or dict(accuracy=None, parameters=1, metric="head"))
        rrkd.train(arguments(tmp_path / "m", "--data", image_folder, "--arch", "resnet9_half", "--img_size", 16, "--batch_size", 8))
    assert [args.momentum for args in seen] == [0.0, 0.9, 0.9]  # Sec. 5.2: teacher, baseline, student


# ----------------------------------------------------------------------------- P8, P10: what is saved, and other networks


def test_checkpoint_is_plain_and_names_its_backbone(teachers, tmp_path):
    """P8: every load here is weights_only. A student takes over its teacher's normalisation."""
    content = common.read_checkpoint(teachers[False][-1])
    backbone = dict(arch="ae64", img_size=8, patch_size=4)
    assert content["meta"] == dict(method="rrkd", network="student", backbone=backbone, mean=[0.5] * 3, std=[0.5] * 3)
    student = train(tmp_path, *teachers[False], "--arch", "vit_nano", "--max_steps", 1)
    assert student["meta"]["mean"] == [0.5] * 3


def test_students_load_elsewhere(teachers, tmp_path, monkeypatch):
    """P10: a ResNet into torchvision and a ViT into timm, strict and with equal outputs; both through `load_backbone` too."""
    import timm
    import torchvision

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
        theirs.load_state_dict(torch.load(tmp_path / arch / "backbone.pth", weights_only=True), strict=True)
        ours, meta = common.load_backbone(tmp_path / arch / "checkpoint.pth")
        assert meta["backbone"]["arch"] == arch and meta["img_size"] == size
        x = torch.randn(2, 3, size, size)
        torch.testing.assert_close(ours(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


def test_any_teacher(teachers, tmp_path):
    """Teachers of this repository's other methods, of timm, and bare weights; their normalisation is used where it is known."""
    import timm

    vit = common.vit_nano(img_size=16, patch_size=8, pos_embed="sincos")
    options = dict(arch="vit_nano", img_size=16, patch_size=8, num_heads=None, pos_embed="sincos")
    meta = dict(method="sdssl", network="student", backbone=options, mean=(0.1,) * 3, std=(0.2,) * 3)
    weights = {f"backbone.{name}": w for name, w in vit.state_dict().items()}
    common.save_file(dict(student=weights, meta=meta), tmp_path / "sdssl.pth")
    content = train(tmp_path / "a", "--teacher", tmp_path / "sdssl.pth", "--img_size", 16, "--no-baseline", "--max_steps", 1)
    assert content["meta"]["mean"] == [0.1] * 3 and content["meta"]["std"] == [0.2] * 3
    network = timm.create_model("resnet10t", num_classes=0).eval()
    torch.save(network.state_dict(), tmp_path / "timm.pth")
    teacher = rrkd.Teacher(tmp_path / "timm.pth", filled("--teacher_arch", "timm/resnet10t"))
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(teacher(x)[0], network(x))
    assert tuple(teacher.mean) == common.MEAN and teacher.classifier is None


def test_a_classifier_comes_back_with_its_teacher(teachers, tmp_path):
    """KD and LPKD need the logits that the teacher's own head gave."""
    path = teachers[True][2]
    teacher = rrkd.Teacher(path, filled())
    student, _ = rrkd.build(filled("--loss", "none", "--arch", "mlp32"), 10, None)
    student.load_state_dict(torch.load(path, weights_only=True)["student"])
    x = torch.randn(3, 3, 8, 8)
    z, logits = teacher(x)
    assert logits.shape == (3, 10)
    torch.testing.assert_close(logits, student.eval()(x, 3)[1])
    torch.testing.assert_close(logits, student.classifier.layers[0](F.relu(z)))


def test_pretrained_resnets_take_timm_weights(monkeypatch):
    """`--pretrained resnet18` is timm's resnet18; nothing is downloaded here."""
    import timm

    original, made = timm.create_model, []

    def create(name, pretrained=False, **options):
        model = original(name, **options).eval()
        if pretrained:  # the other call looks at the class alone
            made.append(model)
        return model

    monkeypatch.setattr(timm, "create_model", create)
    ours = rrkd.make_backbone("resnet18", 64, pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), made[0](x), rtol=1e-4, atol=1e-5)
    assert rrkd.RECIPES["imagenet"]["pretrained"]


def test_init_starts_from_weights(teachers):
    path = teachers[False][-1]
    student, _ = rrkd.build(filled("--init", path, "--arch", "ae64", "--loss", "none"), 10, None)
    saved = torch.load(path, weights_only=True)["student"]
    assert all(torch.equal(value, saved[f"backbone.{name}"]) for name, value in student.backbone.state_dict().items())


# ------------------------------------------------------------------------------------------------------------ anchors


def anchors_of(kind, data, batch_size=30, seed=0, teacher=None):
    args = arguments("unused", "--anchors", kind, "--batch_size", batch_size, "--seed", seed)
    return rrkd.choose_anchors(args, lambda backbone, data: [data.images.float().flatten(1) / 255], teacher, data)


def test_random_and_class_anchors():
    data, _ = common.load_data("digits")
    random = anchors_of("random", data)
    assert len(set(random.tolist())) == 30 and same(random, anchors_of("random", data))
    assert not same(random, anchors_of("random", data, seed=1))
    chosen = anchors_of("class", data, batch_size=128)
    assert torch.bincount(data.labels[chosen]).tolist() == [13] * 10 and len(set(chosen.tolist())) == 130  # the paper's 130
    assert len(anchors_of("random", data, batch_size=128)) == 128
    assert not same(chosen, anchors_of("class", data, batch_size=128, seed=1))


def test_confident_anchors_equal_a_loop():
    """The correctly classified images with the largest probability of their class, most confident first."""
    from sklearn.linear_model import LogisticRegression

    data, _ = common.load_data("digits")
    data.labels[::3] = (data.labels[::3] + 1) % 10  # many are classified wrongly
    x = data.images.float().flatten(1).numpy() / 255
    probe = LogisticRegression(max_iter=5000).fit(x, data.labels.numpy())
    p, predicted = probe.predict_proba(x), probe.predict(x)

    class Backbone:
        backbone = None

    chosen = anchors_of("confident", data, batch_size=45, teacher=Backbone).view(10, 5)
    for c in range(10):
        right = [i for i in range(len(data)) if data.labels[i] == c and predicted[i] == c]
        best = sorted(right, key=lambda i: -p[i, c])[:5]
        np.testing.assert_allclose(p[chosen[c].numpy(), c], p[best, c], rtol=1e-6)
        assert set(chosen[c].tolist()) <= set(right)


def test_fixed_anchors_stay_and_learn(teachers, tmp_path, monkeypatch):
    """The maps are (B, A): the teacher's columns are the same images at every step, and gradient reaches the student's."""
    seen = []
    monkeypatch.setattr(rrkd, "distillation_losses", lambda loss, z_s, z_t, a_s, a_t, f=rrkd.distillation_losses:
                        (seen.append((z_s, z_t, a_s, a_t)), f(loss, z_s, z_t, a_s, a_t))[1])
    train(tmp_path, *teachers[False], "--anchors", "class", "--max_steps", 3)
    (z_s, z_t, a_s, a_t), _, (_, _, last_s, last_t) = seen
    assert z_s.shape == (32, 32) and z_t.shape == (32, 64) and a_s.shape == (40, 32) and a_t.shape == (40, 64)
    assert torch.equal(a_t, last_t) and not torch.equal(a_s, last_s) and a_s.requires_grad and not a_t.requires_grad


# ------------------------------------------------------------------------------------------------ flags and the weights


def test_loss_is_the_weighted_sum(teachers, tmp_path):
    """Eq. 4 and Sec. 5.2: lambda_D, lambda_CE, and LPKD's 1.5 and 2; each weight weighs what it names; tau changes the loss."""
    cases = {
        "rrkd": (["--loss", "rrkd"], dict(loss_rrkd=1, loss_ce=1)), "spkd": (["--loss", "spkd"], dict(loss_spkd=1, loss_ce=1)),
        "lpkd": (["--loss", "lpkd"], dict(loss_lpkd=1.5, loss_soft=2, loss_ce=1)),
        "kd": (["--loss", "kd"], dict(loss_kd=1, loss_ce=1)),
        "feature": (["--loss", "feature"], dict(loss_feature=1, loss_ce=1)), "no labels": (["--no-labels"], dict(loss_rrkd=1)),
        "lpkd, no labels": (["--loss", "lpkd", "--no-labels"], dict(loss_lpkd=1.5)),
        "weights": (["--loss", "lpkd", "--lambda_d", 0.1, "--lambda_ce", 3, "--lambda_soft", 0.7],
                    dict(loss_lpkd=0.1, loss_soft=0.7, loss_ce=3)),
        "tau": (["--loss", "kd", "--tau", 2], dict(loss_kd=1, loss_ce=1))}
    first = {}
    for name, (flags, weights) in cases.items():
        train(tmp_path / name, *teachers[True], *flags, "--max_steps", 2)
        for record in (r for r in read_log(tmp_path / name) if "loss" in r):
            assert {key for key in record if key.startswith("loss_")} == weights.keys(), name
            assert record["loss"] == pytest.approx(sum(w * record[key] for key, w in weights.items()), rel=1e-5), name
            first.setdefault(name, record)
    assert first["kd"]["loss_kd"] != first["tau"]["loss_kd"]


def test_recipes_follow_the_paper():
    """Sec. 5: SGD at 0.1 for a batch of 128, which is 0.2 for one of 256; epochs; no augmentation of MNIST, flips of CIFAR."""
    for name, recipe in rrkd.RECIPES.items():
        assert recipe["lr"] * recipe["batch_size"] / 256 == pytest.approx(0.1) and recipe["batch_size"] == 128
        assert recipe.keys() == rrkd.RECIPES["mnist"].keys()
    assert [rrkd.RECIPES[name]["epochs"] for name in ("mnist", "cifar10", "imagenet")] == [20, 50, 20]
    assert rrkd.TABLES[3]["columns"]["svhn"][1] == dict(epochs=20) and rrkd.TABLES[4]["columns"]["flowers102"][1] == dict(epochs=50)
    assert rrkd.TABLES[1]["rows"][1][2]["lr"] / 2 == pytest.approx(1e-8)
    mnist, cifar = (common.View(8, **rrkd.RECIPES[name]["view"]) for name in ("mnist", "cifar10"))
    assert mnist.scale == cifar.scale == (1, 1) and mnist.flip == 0 and cifar.flip == 0.5 and cifar.p_jitter == 0


def test_split_and_normalisation(tmp_path):
    """MNIST's 54,000 / 6,000: a tenth is held out, the same for every seed, and pixels reach the networks in [-1, 1]."""
    args = arguments(tmp_path)
    args.validation = 0.1
    train_data, held_out, test_data = rrkd.prepare(args)
    assert (len(train_data), len(held_out), len(test_data)) == (1294, 143, 360)
    args = arguments(tmp_path, "--seed", 1)
    args.validation = 0.0
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


def steps_done(monkeypatch):
    """Counts the training steps of all runs from here on."""
    done, original = [], common.Run.end_step
    monkeypatch.setattr(common.Run, "end_step", lambda self, *arguments, **values: (done.append(self.folder), original(self, *arguments, **values)))
    return done


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.figures
def test_tables_on_digits(number, tmp_path, monkeypatch, capsys):
    """Every row and seed ends in its own folder; finished runs are not repeated, and one that was cut short goes on."""
    flags = ["--table", number, "--data", "digits", "--seeds", 42, "--batch_size", 128, "--epochs", 1]
    monkeypatch.setitem(rrkd.MLPS, "mlp1200", (40, 40))
    done = steps_done(monkeypatch)
    rrkd.table(arguments(tmp_path, *flags))
    rows = rrkd.TABLES[number]["rows"]
    assert len(done) == 11 * len(rows)
    content = json.loads((tmp_path / f"table{number}.json").read_text())
    assert [row["name"] for row in content["rows"]] == [name for name, _, _ in rows]
    assert content["seeds"] == [42]
    assert all(0 <= row["mean"] <= 100 and row["std"] is None and row["paper"] is None for row in content["rows"])
    assert (tmp_path / f"table{number}.png").stat().st_size > 1000
    output = capsys.readouterr().out
    assert all(name in output for name, _, _ in rows)

    done.clear()
    rrkd.table(arguments(tmp_path, *flags))
    again = json.loads((tmp_path / f"table{number}.json").read_text())
    assert done == [] and again == content
    shutil.rmtree(tmp_path / "digits" / rows[2][1])
    rrkd.table(arguments(tmp_path, *flags))
    assert len(done) == 11 and {folder.parent.name for folder in done} == {rows[2][1]}
    assert json.loads((tmp_path / f"table{number}.json").read_text())["rows"][2]["values"] == content["rows"][2]["values"]


def test_table_over_seeds_beside_the_paper(tmp_path, monkeypatch, capsys):
    """Mean and standard deviation over the seeds, the paper's number beside them; table 5 takes up table 1's runs."""
    monkeypatch.setattr(rrkd, "load_data", lambda data, path, load=common.load_data: load("digits"))
    flags = ["--seeds", 42, 43, "--epochs", 1, "--batch_size", 128, "--img_size", 8]
    rrkd.table(arguments(tmp_path, "--table", 1, *flags))
    done = steps_done(monkeypatch)
    rrkd.table(arguments(tmp_path, "--table", 5, *flags))
    assert {folder.parent.name for folder in done} == {"ae32-random", "ae32-class", "ae32-confident"}
    rows = json.loads((tmp_path / "table1.json").read_text())["rows"]
    assert [row["paper"] for row in rows] == [87.99, 74.14, 80.88, None, None]
    for row in rows:
        a, b = row["values"]
        assert row["mean"] == pytest.approx((a + b) / 2) and row["std"] == pytest.approx(abs(a - b) / 2**0.5)
    logs = [read_log(tmp_path / "mnist" / name / "42") for name in ("ae64", "ae32", "ae32-lr1e-8")]
    assert [log[0]["lr"] for log in logs] == pytest.approx([0.1, 0.1, 1e-8])
    assert "mnist" in capsys.readouterr().out


@pytest.mark.parametrize("number", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_tables_on_class_folders(number, image_folder, tmp_path):
    """CIFAR's and transfer's tables from any class folders, with random weights; a folder's name finds the paper's numbers."""
    data = tmp_path / next(iter(rrkd.TABLES[number]["columns"]))
    data.symlink_to(image_folder)
    flags = ["--table", number, "--no-pretrained", "--data", data, "--batch_size", 12, "--epochs", 1, "--img_size", 16, "--seeds", 42]
    rrkd.table(arguments(tmp_path / "runs", *flags))
    content = json.loads((tmp_path / "runs" / f"table{number}.json").read_text())
    names = ["teacher", "SPKD", "LPKD", "RRKD", "no distillation", "KD (Hinton)", "feature regression"]
    assert [row["name"] for row in content["rows"]] == names
    assert content["rows"][3]["paper"] == {3: 86.21, 4: 76.79}[number] and content["rows"][4]["paper"] is None
    parameters = {row["parameters"] for row in content["rows"][1:]}
    assert len(parameters) == 1 and 0.1 < parameters.pop() / content["rows"][0]["parameters"] < 0.6


def test_settings_of_the_tables():
    """Flags override a table's settings, and they override the recipe's; a column has its own epochs."""
    assert all(row[2]["loss"] == "none" for number in rrkd.TABLES for row in rrkd.TABLES[number]["rows"][:1])
    for number, spec in rrkd.TABLES.items():
        assert all(len(paper) <= len(spec["rows"]) for paper, _ in spec["columns"].values())
        folders = [folder for _, folder, _ in spec["rows"]]
        assert len(set(folders)) == len(folders)
    shared = {folder: settings for spec in (rrkd.TABLES[1], rrkd.TABLES[5]) for _, folder, settings in spec["rows"]}
    assert all(shared[folder] == settings for _, folder, settings in rrkd.TABLES[1]["rows"])  # one folder, one run


def test_nothing_is_trained_before_what_cannot_work(tmp_path, capsys, image_folder):
    """Networks that cannot be made and files that do not fit are found before the teacher is trained."""
    torch.save(rrkd.make_backbone("ae64", 8).state_dict(), tmp_path / "ae64.pth")
    flat = image_folder / "train" / "cat"  # images without labels
    for flags, says in ((["--arch", "vit_giant"], "unknown --arch vit_giant"), (["--teacher_arch", "vit_giant"], "unknown --arch vit_giant"),
                        (["--init", tmp_path / "ae64.pth", "--arch", "ae32"], "does not fit this architecture"),
                        (["--init", tmp_path / "none.pth"], "no file .*none.pth"), (["--teacher", ""], "no file ''"),
                        (["--pretrained", "--teacher_arch", "resnet18"], "no ImageNet weights for --arch ae32"),
                        (["--data", flat, "--batch_size", 8, "--no-labels", "--anchors", "class"], "--anchors class needs labels")):
        assert_one_line_error(run_in_process(capsys, "--output_dir", tmp_path / "run", *flags), says)
    assert not (tmp_path / "run").exists()
