"""sdssl.py: losses against loops written from the equations, what each loss moves, P1, every ablation flag, the analyses."""
import json
import math
from itertools import product

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from conftest import assert_one_line_error, finished, leaf, read_log
from PIL import Image
from torch.testing import assert_close

import common
import sdssl

FRAMEWORKS = ["mocov3", "byol", "simclr"]
TINY = ("--batch_size 32 --hidden 32 --isd_hidden 16 --log_every 1 --knn_every 0 --num_workers 0 --epochs 2 --warmup_epochs 0.1 "
        "--device cpu").split()
NANO = "--arch vit_nano --img_size 16 --patch_size 4".split()


@pytest.fixture(autouse=True)
def bare_runs(monkeypatch):
    """Runs in this process draw no curves and check no k-NN, which take longer than their few steps."""
    monkeypatch.setattr(common.Run, "draw_curves", lambda self: None)
    monkeypatch.setattr(sdssl, "knn_accuracy", lambda *arguments, **options: None)


def arguments(folder, *extra):
    return sdssl.parse_arguments([*TINY, "--output_dir", *map(str, (folder, *extra))])


def built(*flags):
    """-> student and teacher."""
    torch.manual_seed(0)
    return sdssl.build(arguments("unused", *NANO, *flags))[:2]


def train(folder, *extra):
    """One run in this process -> its checkpoint."""
    sdssl.train(arguments(folder, *extra))
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def losses_of(framework, q1, q2, z1=None, z2=None, p1=None, p2=None):
    """The losses of one framework, as the training loop calls them."""
    if framework == "simclr":
        return sdssl.simclr_losses(q1, q2)
    return {"byol": sdssl.byol_losses, "mocov3": sdssl.mocov3_losses}[framework](q1, q2, z1, z2, p1, p2)


# ------------------------------------------------------------------------------------------------------------- losses


def naive_contrast(rows, candidates, positives, left_out=None, tau=0.2):
    """-log softmax of the positive (Eq. 2), mean over rows. left_out: of each row a candidate that is none."""
    logits = F.cosine_similarity(rows[:, None], candidates, dim=-1) / tau
    positive = logits[range(len(rows)), list(positives)]
    if left_out:
        logits[range(len(rows)), list(left_out)] = -torch.inf
    return (logits.logsumexp(1) - positive).mean()


def naive_regression(q, z):
    return (2 - 2 * F.cosine_similarity(q, z)).mean()


def assert_same_value_and_gradient(ours, naive, *inputs):
    assert_close(ours, naive, rtol=1e-6, atol=1e-8)
    ours_gradient = torch.autograd.grad(ours, inputs, retain_graph=True)
    naive_gradient = torch.autograd.grad(naive, inputs, retain_graph=True)
    assert max(g.abs().max() for g in naive_gradient) > 1e-6
    assert_close(ours_gradient, naive_gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_info_nce_equals_eq2(tau):
    """One layer; then three, with queries of the second of two processes: labels are B + arange(B), shared by the layers."""
    q, z = leaf(5, 7), leaf(5, 7, seed=1)
    assert_same_value_and_gradient(sdssl.info_nce(q, z, tau), 2 * tau * naive_contrast(q, z, range(5), tau=tau), q, z)
    q, z = leaf(3, 4, 7), leaf(8, 7, seed=1)
    labels = 4 + torch.arange(4)
    naive = sum(2 * tau * naive_contrast(layer, z, labels.tolist(), tau=tau) for layer in q) / 3
    assert_same_value_and_gradient(sdssl.info_nce(q, z, tau, labels), naive, q, z)
    flat = q.reshape(12, 7)  # the layer outermost
    assert_close(sdssl.info_nce(flat, z, tau, labels), naive)
    assert_close(sdssl.info_nce(q, z[4:]), sdssl.info_nce(flat, z[4:]))


def test_info_nce_closed_forms():
    """Orthogonal candidates: log(1 + (n-1) e^(-1/tau)); equal ones: chance, log n; scale of the inputs does not matter."""
    z = torch.eye(6)
    assert_close(sdssl.info_nce(z, z, 0.5), torch.tensor(1 + 5 * math.exp(-2)).log())
    assert_close(sdssl.info_nce(z, torch.ones(6, 6)), torch.tensor(0.4 * math.log(6)))
    assert_close(sdssl.info_nce(1000 * z, 0.001 * z), sdssl.info_nce(z, z))


def test_regression_loss_equals_eq1():
    q, z, layers = leaf(5, 7), leaf(5, 7, seed=1), leaf(3, 5, 7, seed=2)
    assert_same_value_and_gradient(sdssl.regression_loss(q, z), naive_regression(q, z), q, z)
    assert_close(sdssl.regression_loss(layers, z), sum(naive_regression(layer, z) for layer in layers) / 3)
    assert_close(sdssl.regression_loss(z, -z), torch.tensor(4.0, dtype=torch.float64))


def test_nt_xent_equals_simclr():
    z1, z2 = leaf(4, 7), leaf(4, 7, seed=1)
    z = torch.cat([z1, z2])
    naive = naive_contrast(z, z, [4, 5, 6, 7, 0, 1, 2, 3], range(8))
    assert_same_value_and_gradient(sdssl.nt_xent(z1, z2), naive, z1, z2)
    assert_close(sdssl.nt_xent(torch.ones(4, 3), torch.ones(4, 3)), torch.tensor(7.0).log())


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_terms_of_eq6(framework):
    """The three terms, over both directions, against Eqs. 1-5 layer by layer."""
    L, B = 3, 4
    q1, q2, p1, p2 = (leaf(L, B, 5, seed=i) for i in range(4))
    z1, z2 = (leaf(B, 5, seed=i) for i in (4, 5))
    losses = losses_of(framework, q1, q2, z1, z2, p1, p2)

    def naive(q, z):
        return naive_regression(q, z) if framework == "byol" else 0.4 * naive_contrast(q, z, range(B))

    inputs = q1, q2, p1, p2
    if framework == "simclr":
        q, final, inputs = torch.cat([q1, q2], 1), torch.cat([q1[-1], q2[-1]]), (q1, q2)
        candidates = [final.detach()] * (L - 1) + [final]
        terms = [naive_contrast(layer, z, [4, 5, 6, 7, 0, 1, 2, 3], range(8)) for layer, z in zip(q, candidates, strict=True)]
    else:
        terms, predicted = ([naive(a, z2.detach()) + naive(b, z1.detach()) for a, b in zip(*views)] for views in ((q1, q2), (p1, p2)))
    expected = {"loss_ssl": terms[-1], "loss_isd": sum(terms[:-1]) / (L - 1)}
    if framework != "simclr":
        expected["loss_pred"] = sum(predicted)
    assert_close(losses, expected)
    assert_same_value_and_gradient(sum(losses.values()), sum(expected.values()), *inputs)


@pytest.mark.parametrize("loss", [sdssl.info_nce, sdssl.regression_loss, sdssl.nt_xent])
def test_losses_run_in_fp32_under_autocast(loss):
    q, z = torch.randn(2, 6, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        under = loss(q, z)
    assert under.dtype == torch.float32
    assert_close(under, loss(q.float(), z.float()), rtol=1e-6, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("in_dims", [[12, 12, 12], [4, 8, 12]])
@pytest.mark.parametrize("out_norm", [True, False])
def test_layer_mlp_equals_separate_mlps(in_dims, out_norm):
    """One batched matmul for all layers = L separate MLPs: outputs, input gradients and running statistics."""
    torch.manual_seed(0)
    mlp = sdssl.LayerMLP(in_dims, 10, 6, 3, out_norm)
    separate = []
    for l, dim in enumerate(in_dims):
        linears = [nn.Linear(dim, 10, bias=False), nn.Linear(10, 10, bias=False), nn.Linear(10, 6, bias=False)]
        for linear, weight in zip(linears, mlp.weights, strict=True):
            linear.weight.data = weight[l, :, : linear.in_features].clone()
        separate.append(nn.Sequential(linears[0], nn.BatchNorm1d(10), nn.ReLU(), linears[1], nn.BatchNorm1d(10), nn.ReLU(), linears[2],
                                      *[nn.BatchNorm1d(6, affine=False)] * out_norm))
    inputs = [torch.randn(9, dim, requires_grad=True) for dim in in_dims]
    others = [5 * x.detach() + 1 for x in inputs]  # another view, with other statistics
    ours = torch.stack(mlp(sdssl.stack_layers(inputs), sdssl.stack_layers(others)))
    theirs = torch.stack([torch.stack([m(x) for m, x in zip(separate, view)]) for view in (inputs, others)])
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    target = torch.randn_like(ours)
    gradients = [torch.autograd.grad((outputs * target).sum(), inputs) for outputs in (ours, theirs)]
    assert_close(*gradients, rtol=1e-3, atol=1e-4)
    assert_close(mlp.norms[0].running_var.view(3, 10)[1], separate[1][1].running_var)


@pytest.mark.parametrize("framework,loss", [*((framework, "loss_isd") for framework in FRAMEWORKS), ("mocov3", "loss_pred"),
                                            ("byol", "loss_pred")])
def test_what_a_loss_moves(framework, loss):
    """loss_pred: the predictors of all layers alone. loss_isd (Eq. 3): not the final layer, its projector or the final block.
    Neither moves the teacher, though here it would take a gradient."""
    student, teacher = built("--framework", framework)
    views = torch.randn(2, 8, 3, 16, 16)
    (q1, q2), (p1, p2) = student(*views)
    z = []
    if teacher:
        teacher.requires_grad_(True)
        z = [*map(teacher, views), p1, p2]
    losses_of(framework, q1, q2, *z)[loss].backward()
    assert teacher is None or all(parameter.grad is None for parameter in teacher.parameters())
    moving = {"loss_pred": ("predictor.weights",), "loss_isd": ("isd_projector.weights", "backbone.blocks.0.attn.qkv.weight")}[loss]
    still = {"loss_pred": ("backbone.", "projector.", "isd_projector."), "loss_isd": ("projector.", "backbone.blocks.3.")}[loss]
    for name, parameter in student.named_parameters():
        if name.startswith(moving):
            assert all(layer.abs().max() > 0 for layer in parameter.grad), name
        elif name.startswith(still):
            assert parameter.grad is None or parameter.grad.abs().max() == 0, name


def test_teacher_shares_nothing_and_gets_no_gradient():
    """P4: separate storage; the predictor and the lower heads stay with the student."""
    student, teacher = built()
    assert not {p.data_ptr() for p in student.state_dict().values()} & {p.data_ptr() for p in teacher.state_dict().values()}
    assert not any(p.requires_grad for p in teacher.parameters())
    assert {name.split(".")[0] for name in teacher.state_dict()} == {"backbone", "projector"}


@pytest.mark.parametrize("framework", ["mocov3", "byol"])
def test_teacher_is_the_ema_after_a_step(framework, tmp_path):
    """P4: after one step teacher = m * teacher + (1 - m) * student, and its BatchNorm statistics are its own."""
    flags = ["--framework", framework, "--lr", 0.01, "--momentum", 0.9, "--max_steps"]
    first, second = (train(tmp_path / str(steps), *flags, steps) for steps in (1, 2))
    m = float(common.cosine_schedule(0.9, 1.0, 2 * (1437 // 32))[1])
    for name, value in second["teacher"].items():
        if "running" not in name and "num_batches" not in name:
            expected = m * first["teacher"][name] + (1 - m) * second["student"][name]
            assert_close(value, expected, rtol=1e-6, atol=1e-7)
    moved = [n for n, v in second["teacher"].items() if not torch.equal(v, first["teacher"][n])]
    assert any("blocks" in n for n in moved) and not any("patch_embed" in n for n in moved)
    assert second["teacher"]["projector.norms.0.num_batches_tracked"] == 4  # two steps of two views


# ------------------------------------------------------------------------------------------------ P1, P6, P7, P8, P10


common.RESNETS["resnet10"] = ("BasicBlock", [1, 1, 1, 1])  # fp64 takes its time
CASES = [*product(FRAMEWORKS, ["--sd", "--no-sd"], ["vit_nano"]), ("mocov3", "--sd", "resnet10"), ("simclr", "--sd", "resnet10")]


def step_gradients(number):
    """Of each case loss, gradients and statistics of a step on a global batch of 16 digits, from this process' share."""
    results = []
    for framework, sd, arch in CASES:
        size, dtype = (16, torch.float32) if arch == "vit_nano" else (8, torch.float64)
        student, teacher = built("--framework", framework, sd, "--arch", arch, "--img_size", size)
        model = common.distributed(student.to(dtype))
        views = common.byol_views(size, blur=False)
        (_, views, _), = common.ViewLoader(common.load_data("digits")[0], views, 16, 0, "cpu").steps(3, 4)
        views = [x.to(dtype) for x in views]
        (q1, q2), p = model(*views)
        with torch.no_grad():
            z = [*map(teacher.to(dtype), views), *p] if teacher else []
        loss = sum(losses_of(framework, q1, q2, *z).values())
        loss.backward()
        gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        statistics = {name: b for name, b in student.named_buffers() if "running" in name}
        results.append({"loss": common.mean_over_processes(loss), "gradients": gradients, "statistics": statistics})
    return results


def test_world_size_does_not_matter(in_processes):
    """P1: two processes with 8 images each = one with 16: loss, gradients, BatchNorm statistics, 1e-5 relative in fp32.

    The ResNet is compared in fp64, closer: in fp32 its gradient is 2e-3 from its own fp64 value, whatever the processes.
    """
    for case, alone, *both in zip(CASES, step_gradients(0), *in_processes(2, step_gradients), strict=True):
        tolerance = 1e-5 if "vit_nano" in case else 1e-10
        scale = torch.cat([g.flatten() for g in alone["gradients"].values()]).norm()
        assert len(alone["gradients"]) > 10
        for one in both:
            assert_close(one["loss"], alone["loss"], rtol=1e-5, atol=0)
            assert one["gradients"].keys() == alone["gradients"].keys()
            difference = torch.cat([(one["gradients"][n] - g).flatten() for n, g in alone["gradients"].items()]).norm()
            assert difference / scale < tolerance, case
            assert_close(one["statistics"], alone["statistics"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("features,collapsed", [
    (torch.ones(16, 8) + 1e-3 * torch.randn(16, 8), True), (torch.randn(16, 1) * torch.randn(1, 8), True), (torch.randn(16, 8), False),
    (torch.ones(2, 8), False)])
def test_collapse_is_named(features, collapsed, tmp_path, capsys):
    """P6: one point and one line are named, in print and in the log; an even spread is not, and of two images none can be told."""
    args = arguments(tmp_path, "--epochs", 1, "--max_steps", 1)
    run = common.Run(args, common.ViewLoader(common.load_data("digits")[0], common.byol_views(8), 32, 0, "cpu"), {})
    for step, _, _ in run.steps():
        run.end_step(step, {"loss": torch.tensor(1.0)}, features=features, lr=0.1)
    record = read_log(tmp_path)[-1]
    assert ("collapse at step 1" in capsys.readouterr().out) == collapsed == ("collapse" in record) and "effective_rank" in record


def test_bad_input_gets_one_line(tmp_path, capsys):
    """P7: what is wrong and what to do, exit code 2; test_promises.py has what is the same for every script, test_common.py images."""

    def check(*flags, says):
        assert_one_line_error(finished(capsys, lambda: train(tmp_path / "run", *flags)), *says)

    check("--num_heads", 5, says=["--num_heads 5 does not divide"])
    check("--arch", "timm/vit_tiny_patch16_224", "--num_heads", 3, says=["--num_heads is for ViTs of vit_nano"])
    check("--isd_every", 4, says=["--isd_every 4 leaves none"])
    check("--framework", "simclr", "--isd_mlp", 0, says=["--isd_mlp 0 needs predictors"])
    torch.save(common.vit_tiny(img_size=16, patch_size=4, depth=4).state_dict(), tmp_path / "tiny.pth")
    check("--init", tmp_path / "tiny.pth", says=["does not fit this architecture: size mismatch for", "192", "96", "--arch"])
    assert not (tmp_path / "run" / "checkpoint.pth").exists()


@pytest.mark.parametrize("arch,flags,side,theirs", [
    ("vit_small", ["--batch_size", 8], 16, lambda: timm.create_model("vit_small_patch16_224", img_size=16, patch_size=4, num_classes=0)),
    ("resnet18", ["--batch_size", 4, "--img_size", 64], 64, lambda: torchvision.models.resnet18())])
def test_backbone_loads_into_timm_and_torchvision(arch, flags, side, theirs, tmp_path):
    """P10: strict, with equal outputs, also as --init; the checkpoint itself is plain (P8: every load here is weights_only)."""
    checkpoint = train(tmp_path, "--arch", arch, "--seed", 1, "--max_steps", 1, *flags)
    saved = torch.load(tmp_path / "backbone.pth", weights_only=True)
    theirs = theirs()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(saved, strict=True)
    ours, meta = common.load_backbone(tmp_path / "checkpoint.pth")
    assert meta["img_size"] == side and meta["backbone"]["arch"] == arch and checkpoint["step"] == 1
    x = torch.randn(2, 3, side, side)
    assert_close(ours(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)
    weights = built("--arch", arch, *flags, "--init", tmp_path / "checkpoint.pth")[0].backbone.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in saved.items())


# -------------------------------------------------------------------------------------------------------------- flags


def test_ablations_change_what_they_name():
    """Tables 5 and 6: the structure of the heads follows the flags."""
    student, _ = built()
    assert student.lower == [0, 1, 2] and len(student.isd_projector.weights) == 3 and len(student.predictor.weights[0]) == 4
    assert not student.backbone.patch_embed.proj.weight.requires_grad and not student.backbone.pos_embed.requires_grad
    plain, _ = built("--no-sd")
    assert plain.lower == [] and plain.isd_projector is None and len(plain.predictor.weights[0]) == 1
    every, _ = built("--isd_every", 2)
    assert every.lower == [1] and len(every.isd_projector.weights[0]) == 1  # of 4 layers: the 2nd, and the final one
    assert built("--arch", "vit_tiny", "--isd_every", 3)[0].lower == [2, 5, 8]
    two, none = (built("--isd_mlp", depth)[0] for depth in (2, 0))
    assert len(two.isd_projector.weights) == 2 and len(two.projector.weights) == 3 and none.isd_projector is None
    (q,), (p,) = none(torch.randn(4, 3, 16, 16))
    assert q.shape == p.shape == (4, 4, 256)
    assert built("--no-stop_grad_conv1")[0].backbone.patch_embed.proj.weight.requires_grad
    assert built("--num_heads", 12)[0].backbone.blocks[0].attn.num_heads == 12
    simclr, no_teacher = built("--framework", "simclr")
    assert simclr.predictor is None and no_teacher is None
    byol, _ = built("--framework", "byol")
    assert len(byol.projector.norms) == 2 and len(student.projector.norms) == 3  # hidden only; output too
    backbone = built("--arch", "timm/vit_tiny_patch16_224", "--img_size", 32, "--patch_size", 16)[0].backbone.model
    assert not any(p.requires_grad for p in backbone.patch_embed.parameters()) and backbone.blocks[0].attn.qkv.weight.requires_grad


@pytest.mark.parametrize("flags,alpha,beta", [([], None, 1), (["--no-anneal", "--alpha", 0.8], 0.8, 1), (["--alpha", 0], 0, 1),
                                              (["--beta", 0], None, 0), (["--tau", 0.5], None, 1)])
def test_weights_of_the_terms(flags, alpha, beta, tmp_path):
    """alpha rises along half a cosine, or is constant; beta and alpha weigh what they name; tau changes the chance level."""
    train(tmp_path, "--max_steps", 3, *flags)
    records = [record for record in read_log(tmp_path) if "loss" in record]
    assert len(records) == 3
    for i, record in enumerate(records):
        rise = (1 - math.cos(math.pi * i / (2 * (1437 // 32)))) / 2
        expected = rise if alpha is None else alpha
        assert record["alpha"] == pytest.approx(expected, abs=1e-9)
        loss = record["loss_ssl"] + expected * record["loss_isd"] + beta * record["loss_pred"]
        assert record["loss"] == pytest.approx(loss, rel=1e-5)
        assert record["chance"] == pytest.approx(4 * (0.5 if "--tau" in flags else 0.2) * math.log(32))


def test_recipes_follow_the_paper():
    """Sec. 4.1: learning rates, warm-up, epochs, batch, decay, momentum and head widths."""
    paper = sdssl.RECIPES["imagenet"]
    named = dict(lr=dict(simclr=1.3e-4, byol=1.5e-4, mocov3=1.5e-4), weight_decay=0.1, epochs=300, warmup_epochs=40, batch_size=1024,
                 momentum=0.996, hidden=4096, isd_hidden=2048)
    assert named.items() <= paper.items()
    one, two = common.byol_views(224, **paper["views"])
    assert (one.scale, one.jitter, one.p_jitter, one.grey) == ((0.08, 1.0), (0.4, 0.4, 0.2, 0.1), 0.8, 0.2)
    assert (one.blur, one.solarize, two.blur, two.solarize, two.flip) == (1.0, 0.0, 0.1, 0.2, 0.5)
    assert all(recipe.keys() == paper.keys() for recipe in sdssl.RECIPES.values())


# ----------------------------------------------------------------------------------------------------------- analysis


def test_measures_equal_naive_loops():
    """Eqs. 7-9 on the unit sphere, pair by pair."""
    x, y = torch.randn(2, 7, 5, dtype=torch.float64)
    a, b = [v / v.norm() for v in x], [v / v.norm() for v in y]
    pairs = [(a[i] - a[j]).norm() for i in range(7) for j in range(7) if i != j]
    for gamma in (1.0, 2.0):
        assert_close(sdssl.alignment(x, y, gamma), sum((p - q).norm() ** gamma for p, q in zip(a, b)) / 7)
        assert_close(sdssl.negative_alignment(x, gamma), sum(d**gamma for d in pairs) / len(pairs))
    assert_close(sdssl.uniformity(x), torch.log(sum(torch.exp(-2 * d**2) for d in pairs) / len(pairs)))
    assert sdssl.alignment(x, 3 * x) < 1e-12


def test_uniformity_of_a_circle():
    """n points evenly on a circle: the mean over all n^2 pairs is exp(-2t) I_0(2t); ours leaves out the n self-pairs."""
    n, t = 500, 2.0
    angle = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    points = torch.stack([angle.cos(), angle.sin()], 1)
    every_pair = math.exp(-2 * t) * torch.special.i0(torch.tensor(2 * t, dtype=torch.float64))
    assert_close(sdssl.uniformity(points, t), ((n * every_pair - 1) / (n - 1)).log())
    assert_close(sdssl.negative_alignment(points), torch.tensor(2.0 * n / (n - 1), dtype=torch.float64))


def test_cka():
    """1 for a rotated and scaled copy, near 0 for independent features, and the ratio of HSICs of the Gram matrices."""
    x, z = torch.randn(2000, 6, dtype=torch.float64), torch.randn(2000, 4, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    assert_close(sdssl.linear_cka(x, 3 * x @ rotation + 5), torch.tensor(1.0, dtype=torch.float64))
    assert sdssl.linear_cka(x, z) < 0.02
    x, z = x[:9], z[:9]
    centre = torch.eye(9, dtype=torch.float64) - 1 / 9

    def hsic(k, l):
        return sum((centre @ k @ centre)[i, j] * (centre @ l @ centre)[i, j] for i in range(9) for j in range(9))

    k, l = x @ x.T, z @ z.T
    assert_close(sdssl.linear_cka(x, z), hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt())


def test_analyze_draws_and_repeats(tmp_path, monkeypatch):
    """Two runs side by side: three pictures and their numbers, the same when asked again; one line where they would be replaced."""
    digits = common.load_data("digits")
    for name in "ab":
        train(tmp_path / name, "--max_steps", 1, "--seed", ord(name))
    monkeypatch.setattr(sdssl, "load_data", lambda *_: [data.subset(torch.arange(64)) for data in digits])  # t-SNE takes its time
    files = [tmp_path / name / "checkpoint.pth" for name in "ab"]
    for name in ("first", "second"):
        sdssl.analyze(arguments(tmp_path / name, "--analyze", *files))
        assert {p.name for p in (tmp_path / name).iterdir()} == {"tsne.png", "cka.png", "alignment.png", "analysis.json"}
    first, second = (json.loads((tmp_path / name / "analysis.json").read_text()) for name in ("first", "second"))
    assert first == second and [run["checkpoint"] for run in first.values()] == [str(file) for file in files]
    assert first["1: a"]["alignment"] != first["2: b"]["alignment"]
    for run in first.values():
        assert_close(torch.tensor(run["cka"]).diagonal(), torch.ones(4))
        for ratio, above in (("-uniformity / alignment", "-uniformity"), ("negative / alignment", "negative alignment")):
            expected = [a / b for a, b in zip(run[above], run["alignment"], strict=True)]
            assert run[ratio] == pytest.approx(expected) and len(expected) == 4
    with pytest.raises(common.InputError, match="alignment.png already exists: pass --overwrite"):
        sdssl.analyze(arguments(tmp_path / "first", "--analyze", files[0]))


def test_analyze_takes_bare_weights_and_few_images(tmp_path):
    """backbone.pth needs --arch and sizes; of 12 classes t-SNE shows the first ten, here three images."""
    train(tmp_path / "a", "--max_steps", 1)
    for split in ("train", "val"):
        for label in range(12):
            (tmp_path / "data" / split / f"{label:02}").mkdir(parents=True)
            for i in range(4 if label > 9 or split == "train" else 3 * (label == 0)):
                Image.new("RGB", (16, 16), (20 * label, 30 * i, 0)).save(tmp_path / "data" / split / f"{label:02}" / f"{i}.png")
    flags = ["--analyze", tmp_path / "a" / "backbone.pth", "--data", tmp_path / "data"]
    sdssl.analyze(arguments(tmp_path / "out", *flags, *NANO))
    assert (tmp_path / "out" / "tsne.png").exists()
    with pytest.raises(common.InputError, match="does not say which architecture"):
        sdssl.analyze(arguments(tmp_path / "other", *flags))
