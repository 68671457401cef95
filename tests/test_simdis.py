"""simdis.py: losses against their equations, what each loss moves, P1, P4, Table 2, LARS, FLOPs."""
import math
import re
import shutil
import sys

import pytest
import timm
import torch
import torch.nn as nn
import torchvision
from conftest import assert_one_line_error, finished, leaf, read_log, same
from torch.testing import assert_close

import bench
import common
import eval_knn
import eval_linear
import simdis

NANO = "--arch vit_nano --depth 1 --teacher_arch vit_nano --img_size 16 --patch_size 8".split()
TINY = "--batch_size 32 --hidden 16 --log_every 1 --knn_every 0 --num_workers 0 --epochs 2 --warmup_epochs 0.1 --device cpu".split()
TABLE_2 = [row.split() for row in (
    "S^-v'", "S^-v' T-v", "S^-v' T-v'", "S^-v' T^-v", "S^-v' T^-v'", "S^-v' T-v T-v'", "S^-v' T^-v T^-v'", "S^-v' T-v T-v' T^-v T^-v'",
    "S-v' S^-v S^-v' T-v T-v' T^-v T^-v'")]
NETWORK = {"S": "student", "S^": "student_momentum", "T": "teacher", "T^": "teacher_momentum"}  # the paper's names


@pytest.fixture(autouse=True)
def bare_runs(monkeypatch):
    """Runs in this process draw no curves and check no k-NN, which take longer than their few steps."""
    monkeypatch.setattr(common.Run, "draw_curves", lambda self: None)
    monkeypatch.setattr(simdis, "knn_accuracy", lambda *arguments, **options: None)


def arguments(folder, *extra, sizes=NANO):
    return simdis.parse_arguments([*TINY, *sizes, "--output_dir", *map(str, (folder, *extra))])


def built(*flags):
    """-> networks and meta, as `train` makes them."""
    args = arguments("unused", *flags)
    simdis.complete(args, common.apply_recipe(args, simdis.RECIPES, common.load_data("digits")[0]))
    torch.manual_seed(0)
    return simdis.build(args)


def train(folder, *extra):
    """One run in this process -> its checkpoint."""
    simdis.train(arguments(folder, *extra))
    return torch.load(folder / "checkpoint.pth", weights_only=True)


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    """A checkpoint of --stage teacher, three steps old."""
    folder = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as patch:
        bare_runs.__wrapped__(patch)
        patch.setattr("signal.signal", lambda *_: None)
        train(folder, "--stage", "teacher", "--max_steps", 3)
    return folder / "checkpoint.pth"


def stage_flags(stage, teacher_file):
    return ["--stage", stage, *(["--teacher", str(teacher_file)] if stage == "offline" else [])]


# ------------------------------------------------------------------------------------------------------------- losses


def naive_eq1(p, z):
    """|p/|p| - z/|z||^2 = 2 - 2 cos, mean over the rows."""
    return 2 - 2 * sum(a @ b / (a @ a * (b @ b)).sqrt() for a, b in zip(p, z, strict=True)) / len(p)


def test_regression_loss():
    """Eq. 1, value and gradient; 0 for equal directions, 2 for right angles, 4 for opposite ones, whatever the lengths. No square
    root: the gradient at equal rows is 0, not NaN. fp32 under autocast."""
    p, z = leaf(5, 7), leaf(5, 7, seed=1)
    ours, naive = simdis.regression_loss(p, z), naive_eq1(p, z)
    assert_close(ours, naive)
    assert_close(torch.autograd.grad(ours, (p, z)), torch.autograd.grad(naive, (p, z)))
    z = torch.eye(4, dtype=torch.float64)
    for p, expected in ((5 * z, 0.0), (0.1 * z.roll(1, 0), 2.0), (-z, 4.0), (z + z.roll(1, 0), 2 - 2 / math.sqrt(2))):
        assert_close(simdis.regression_loss(p, 3 * z), torch.tensor(expected, dtype=torch.float64))
    p = leaf(3, 5)
    gradient, = torch.autograd.grad(simdis.regression_loss(p, p.detach().clone()), p)
    assert gradient.isfinite().all() and gradient.abs().max() < 1e-12
    assert simdis.regression_loss(torch.zeros(3, 5), torch.ones(3, 5)) == pytest.approx(1)
    p, z = torch.randn(2, 6, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        under = simdis.regression_loss(p, z)
    assert under.dtype == torch.float32
    assert_close(under, simdis.regression_loss(p.float(), z.float()))


@pytest.mark.parametrize("targets", TABLE_2)
def test_each_target_is_what_its_name_says(targets):
    """Table 2: S^-v' compares predictions of v with what S^ projects of v', and so on; both ways; no gradient to any target."""
    p1, p2 = ({name: leaf(4, 5, seed=20 * view + i) for i, name in enumerate(targets)} for view in (0, 1))
    z = {name: [leaf(4, 5, seed=100 + 2 * i), leaf(4, 5, seed=101 + 2 * i)] for i, name in enumerate(NETWORK.values())}
    losses = simdis.target_losses([p1, p2], z)
    assert list(losses) == targets
    for name in targets:
        network, view = name.split("-")
        of_v, of_w = z[NETWORK[network]][:: -1 if view == "v'" else 1]  # projections of the view or of the other, v first
        expected = naive_eq1(p1[name], of_v.detach()) + naive_eq1(p2[name], of_w.detach())
        assert_close(losses[name], expected)
        ours = torch.autograd.grad(losses[name], (p1[name], p2[name]), retain_graph=True)
        assert_close(ours, torch.autograd.grad(expected, (p1[name], p2[name])))
    sum(losses.values()).backward()
    assert all(x.grad is None for pair in z.values() for x in pair)
    assert all(x.grad is not None for p in (p1, p2) for x in p.values())


# -------------------------------------------------------------------------------------------------------------- model


def losses_of(networks, x1, x2, models={}):
    """The loss of each target, as the step of `train` computes them -> {learner: {target: loss}}. models: learners in DDP."""
    z, p = {}, {}
    for name, network in networks.items():
        if isinstance(network, simdis.Learner):
            z[name], p[name] = models.get(name, network)(x1, x2)
        else:
            with torch.no_grad():
                z[name] = network(x1, x2)
    return {name: simdis.target_losses(predictions, z) for name, predictions in p.items()}


def gradients_of(networks):
    parameters = nn.ModuleDict(networks).named_parameters()
    return {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}


def test_predictors_are_separate_and_share_the_backbone():
    """Sec. 4: FC + BN + ReLU + FC on the projection, for each target with weights of its own; one pass of the backbone a view."""
    student = built()[0]["student"]
    calls = []
    student.backbone.register_forward_hook(lambda *_: calls.append(1))
    z, p = student(*torch.randn(2, 8, 3, 16, 16))
    assert len(calls) == 2 and len(z) == len(p) == 2
    assert list(p[0]) == list(p[1]) == TABLE_2[-1] and all(x.shape == (8, 256) for x in (*z, *p[0].values()))
    assert len({q.data_ptr() for predictor in student.predictors.values() for q in predictor.parameters()}) == 7 * 6
    for target in ("T-v", "S-v'"):
        one, norm, _, two = student.predictors[target]
        h = z[0] @ one.weight.T + one.bias
        h = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt() * norm.weight + norm.bias
        assert_close(p[0][target], h.clamp(min=0) @ two.weight.T + two.bias, rtol=1e-4, atol=1e-5)
    assert [type(m).__name__ for m in student.projector] == ["Linear", "BatchNorm", "ReLU", "Linear"]


def test_momentum_networks_share_nothing_and_learn_nothing():
    """P4: equal at the start, storage of their own, no predictor, no gradient."""
    networks, _ = built()
    for name in ("student", "teacher"):
        learner, momentum = networks[name], networks[f"{name}_momentum"]
        weights = {k: v for k, v in learner.state_dict().items() if not k.startswith("predictors")}
        assert same(weights, dict(momentum.state_dict()))
        assert not {v.data_ptr() for v in weights.values()} & {v.data_ptr() for v in momentum.state_dict().values()}
        assert not any(q.requires_grad for q in momentum.parameters())
    for losses in losses_of(networks, *torch.randn(2, 8, 3, 16, 16)).values():
        sum(losses.values()).backward()
    for name, network in networks.items():
        got = [q.grad is not None for q in network.parameters() if q.requires_grad]
        assert all(got) and bool(got) == (not name.endswith("momentum")), name


@pytest.mark.parametrize("stage,targets,expected", [
    ("teacher", "", "T T^"), ("online", "byol", "S S^"), ("online", "S-v'", "S"), ("online", "2v", "S S^ T T^"),
    ("online", "7v", "S S^ T T^"), ("offline", "2v", "S S^ T^"), ("offline", "T-v'", "S T"), ("offline", "7v", "S S^ T T^")])
def test_only_what_a_target_needs_is_computed(stage, targets, expected, teacher_file, tmp_path, monkeypatch):
    """Passes of each backbone in one step of a run: one a view, none where no target asks; gradient only in learners."""
    calls = []
    build = simdis.build

    def watched(args):
        networks, meta = build(args)
        for name, network in networks.items():
            def count(module, inputs, output, name=name):
                calls.append(name)
                assert output.requires_grad == isinstance(networks[name], simdis.Learner), name

            network.backbone.register_forward_hook(count)
        return networks, meta

    monkeypatch.setattr(simdis, "build", watched)
    train(tmp_path, *stage_flags(stage, teacher_file), *["--targets", targets] * bool(targets), "--max_steps", 1)
    assert sorted(calls) == sorted(2 * [NETWORK[name] for name in expected.split()])


def test_students_gradient_is_the_same_online_and_offline(teacher_file, tmp_path, monkeypatch):
    """With the same frozen teacher, one step of SGD moves the student alike in both stages, bit for bit."""
    flags = ["--optimizer", "sgd", "--lr", 1, "--weight_decay", 1e-4, "--warmup_epochs", 0, "--max_steps", 1]
    offline = train(tmp_path / "offline", *stage_flags("offline", teacher_file), *flags)
    build = simdis.build

    def with_the_frozen_teacher(args):
        networks, meta = build(args)
        for name, network in simdis.load_teacher(teacher_file)[0].items():
            networks[name].load_state_dict(network.state_dict(), strict=False)
            networks[name].eval()
        return networks, meta

    monkeypatch.setattr(simdis, "build", with_the_frozen_teacher)
    online = train(tmp_path / "online", *flags)
    start = built()[0]["student"].state_dict()
    assert not same(dict(start), online["student"]) and not same(online["teacher"], offline["teacher"])
    assert same(offline["student"], online["student"])


def test_offline_teacher_never_changes(teacher_file, tmp_path):
    """P4: parameters and BatchNorm statistics of T and T^, bit for bit, in evaluation mode; the student's move. P2: --resume goes on
    with the teacher that it had, though its file has changed since."""
    content = torch.load(teacher_file, weights_only=True)
    flags = ["--lr", 0.01, *stage_flags("offline", teacher_file)]
    whole = train(tmp_path / "whole", *flags, "--max_steps", 4)
    networks, _ = built(*flags)
    assert not same(dict(networks["student"].state_dict()), whole["student"])
    for name in ("teacher", "teacher_momentum"):
        assert same({key: x for key, x in content[name].items() if not key.startswith("predictors")}, whole[name])
        assert any("running_mean" in key for key in whole[name])
        assert not any(module.training for module in networks[name].modules())
        assert not any(parameter.requires_grad for parameter in networks[name].parameters())
    shutil.copy(teacher_file, tmp_path / "teacher.pth")
    flags[-1] = tmp_path / "teacher.pth"
    train(tmp_path / "run", *flags, "--max_steps", 2)
    content["teacher"]["projector.0.weight"] += 1
    torch.save(content, tmp_path / "teacher.pth")
    parts = train(tmp_path / "run", *flags, "--max_steps", 4, "--resume")
    assert same(parts["student"], whole["student"]) and same(parts["teacher"], whole["teacher"])


@pytest.mark.parametrize("stage,learners", [("teacher", ["teacher"]), ("offline", ["student"]), ("online", ["student", "teacher"])])
def test_momentum_network_is_the_ema_after_a_step(stage, learners, teacher_file, tmp_path):
    """P4, Eq. 2: once a step, after it, m * S^ + (1 - m) * S; T^ likewise; BatchNorm statistics are their own."""
    flags = [*stage_flags(stage, teacher_file), "--lr", 0.05, "--warmup_epochs", 0, "--momentum", 0.9]
    first, second = (train(tmp_path / str(steps), *flags, "--max_steps", steps) for steps in (1, 2))
    m = float(common.cosine_schedule(0.9, 1.0, 2 * (1437 // 32))[1])
    for name in learners:
        before, after = (checkpoint[f"{name}_momentum"] for checkpoint in (first, second))
        for key, value in after.items():
            if "running" not in key and "num_batches" not in key:
                assert_close(value, m * before[key] + (1 - m) * second[name][key], rtol=1e-6, atol=1e-7)
        moved = [key for key, value in after.items() if not torch.equal(value, before[key])]
        assert any("blocks" in key for key in moved) and any("projector.0" in key for key in moved)
        assert after["projector.1.num_batches_tracked"] == 4  # two steps of two views
        assert not torch.equal(after["projector.1.running_mean"], second[name]["projector.1.running_mean"])


@pytest.mark.parametrize("weight_decay", [1e-4, 0.5, 0.0])
def test_lars_scales_matrices_only(weight_decay):
    """You et al.: matrices get lr * 0.001 |w| / (|g| + wd |w|) * (g + wd w); biases and norms plain momentum SGD, no decay."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(4, 3), "norm": nn.LayerNorm(3)})
    model["norm"].weight.data.uniform_(1, 2)
    args = arguments("unused", "--optimizer", "lars", "--weight_decay", weight_decay)
    optimizer = simdis.make_optimizer(args, model, fused=False)
    for group in optimizer.param_groups:
        group["lr"] = 0.3
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    velocity = dict.fromkeys(weights, 0)
    for _ in range(3):
        for name, q in model.named_parameters():
            g, w = torch.randn_like(q), weights[name]
            q.grad = g.clone()
            if name == "linear.weight":
                g = 0.001 * w.norm() / (g.norm() + weight_decay * w.norm()) * (g + weight_decay * w)
            velocity[name] = 0.9 * velocity[name] + g
            weights[name] = w - 0.3 * velocity[name]
        optimizer.step()
        assert_close(dict(model.state_dict()), weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
def test_biases_and_norms_do_not_decay(optimizer):
    learners = nn.ModuleDict({name: network for name, network in built()[0].items() if name in ("student", "teacher")})
    made = simdis.make_optimizer(arguments("unused", "--optimizer", optimizer, "--weight_decay", 0.3), learners, fused=False)
    trainable = {q: 0.3 if q.ndim > 1 and "cls_token" not in name else 0.0 for name, q in learners.named_parameters() if q.requires_grad}
    assert {q: group["weight_decay"] for group in made.param_groups for q in group["params"]} == trainable


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_optimizers_train(optimizer, tmp_path):
    """Two steps move every learner; rates follow warm-up and scaling."""
    checkpoint = train(tmp_path, "--optimizer", optimizer, "--lr", 0.4, "--weight_decay", 1e-4, "--max_steps", 3)
    networks, _ = built()
    for name in ("student", "teacher"):
        matrices = [key for key in checkpoint[name] if key.endswith("qkv.weight")]
        start = networks[name].state_dict()
        assert matrices and not any(torch.equal(checkpoint[name][key], start[key]) for key in matrices)
    rates = [record["lr"] for record in read_log(tmp_path) if "loss" in record]
    assert rates == pytest.approx([0.4 * 32 / 256 * i / 3 for i in range(3)])  # 0.1 epochs are 4 steps


# ---------------------------------------------------------------------------------------------------- P1, P7, P8, P10

common.RESNETS["resnet10"] = ("BasicBlock", [1, 1, 1, 1])  # fp64 takes its time


def step_gradients(number, cases):
    """Of each case losses, gradients and statistics of a step on a global batch of 16 digits, from this process' share."""
    results = []
    for flags, dtype in cases:
        networks = nn.ModuleDict(built(*flags)[0]).to(dtype)
        views = common.byol_views(8 if "resnet10" in flags else 16, blur=False)
        (_, views, _), = common.ViewLoader(common.load_data("digits")[0], views, 16, 0, "cpu").steps(3, 4)
        models = {name: common.distributed(network) for name, network in networks.items() if isinstance(network, simdis.Learner)}
        by_learner = losses_of(networks, *(x.to(dtype) for x in views), models)
        losses = {f"{name} {target}": term for name, terms in by_learner.items() for target, term in terms.items()}
        sum(losses.values()).backward()
        results.append({"losses": {name: common.mean_over_processes(term) for name, term in losses.items()},
                        "gradients": gradients_of(networks),
                        "statistics": {name: b for name, b in networks.named_buffers() if "running" in name}})
    return results


def test_world_size_does_not_matter(in_processes, teacher_file):
    """P1: two processes with 8 images each = one with 16: losses, gradients of S and T, BatchNorm statistics, 1e-5 in fp32.

    ResNets, whose BatchNorm2d amplifies rounding, are compared in fp64, closer. Last, Sec. 4.3's BatchNorm: one process is as
    before; two have statistics of their own, so their losses differ, and DDP still gives both the same gradient.
    """
    resnets = "--arch resnet10 --teacher_arch resnet10 --img_size 8".split()
    cases = [(stage_flags(stage, teacher_file), torch.float32) for stage in ("online", "offline", "teacher")]
    cases += [(resnets, torch.float64), (["--no-sync_bn"], torch.float32)]
    alone, both = step_gradients(0, cases), in_processes(2, step_gradients, cases)
    for process in both:
        for ours, one, tolerance in zip(process, alone, (1e-5, 1e-5, 1e-5, 1e-10)):
            assert_close(ours["losses"], one["losses"], rtol=1e-5, atol=0)
            assert ours["gradients"].keys() == one["gradients"].keys() and len(one["gradients"]) > 10
            scale = torch.cat([g.flatten() for g in one["gradients"].values()]).norm()
            difference = torch.cat([(ours["gradients"][name] - g).flatten() for name, g in one["gradients"].items()]).norm()
            assert scale > 1e-3 and difference / scale < tolerance
            assert_close(ours["statistics"], one["statistics"], rtol=1e-4, atol=1e-6)
    assert same(alone[0], alone[-1])
    one, two = (results[-1] for results in both)
    assert not same(one["statistics"], two["statistics"])
    assert not torch.allclose(one["losses"]["student T^-v'"], alone[0]["losses"]["student T^-v'"], rtol=1e-5)
    assert same(one["gradients"], two["gradients"])


@pytest.mark.parametrize("stage", ["teacher", "online"])
def test_teacher_then_offline(stage, tmp_path, monkeypatch, capsys):
    """The chain of stages, by any checkpoint that holds the teacher's pair, whose sizes come with it: the offline one prints the k-NN
    of the frozen teacher first, where the other ended."""
    monkeypatch.setattr(simdis, "knn_accuracy", common.knn_accuracy)
    train(tmp_path / "teacher", "--stage", stage, "--max_steps", 2)
    said = "step 2 .*teacher: k-NN" if stage == "online" else "step 2 .*k-NN"
    trained, = re.findall(rf"{said} top-1 ([\d.]+) %", capsys.readouterr().out)
    flags = stage_flags("offline", tmp_path / "teacher" / "checkpoint.pth")
    after = train(tmp_path / "offline", *flags, "--max_steps", 2, "--hidden", 8)
    lines = [line for line in capsys.readouterr().out.splitlines() if "top-1" in line]
    assert lines[0] == f"step 0 (epoch 0.0): teacher: k-NN top-1 {trained} %" and lines[1].startswith("step 0 ") and len(lines) == 4
    found = [set(record) & {"knn", "knn_teacher"} for record in read_log(tmp_path / "offline")]
    assert found == [{"knn_teacher"}, {"knn"}, set(), set(), {"knn_teacher"}, {"knn"}]
    assert after["meta"]["teacher"]["arch"] == "vit_nano" and after["teacher"]["projector.0.weight"].shape == (16, 96)
    assert after["student"]["projector.0.weight"].shape == (8, 96)


def test_bad_input_gets_one_line(tmp_path, capsys, teacher_file):
    """P7: what is wrong and what to do, exit code 2; test_promises.py and test_sdssl.py have what is the same for every script."""

    def check(*flags, says, sizes=[]):
        result = finished(capsys, lambda: simdis.train(arguments(tmp_path / "run", *flags, sizes=sizes)))
        assert_one_line_error(result, *says)

    check("--targets", "8v", says=["argument --targets: invalid choice: '8v'", "byol.*2v.*7v", r"T\^-v'"])
    check("--stage", "teacher", "--targets", "2v", says=["--targets are the student's"])
    check("--stage", "teacher", "--arch", "vit_tiny", says=["--arch is the student's", "--teacher_arch"])
    check("--stage", "offline", says=["--stage offline needs --teacher FILE"])
    check("--teacher", teacher_file, says=["--stage offline needs --teacher FILE", "the other stages take none"])
    check("--stage", "offline", "--teacher", teacher_file, "--targets", "byol", says=["no target of the teacher", "--stage online"])
    check("--optimizer", "lars", says=["no rates for --optimizer lars", "--lr and --weight_decay"])
    check("--teacher_arch", "resnet20", says=["unknown --arch resnet20", "resnet50"])
    check("--init", teacher_file, "--arch", "vit_tiny", says=["does not fit this architecture"])
    content = torch.load(teacher_file, weights_only=True)
    del content["teacher"]["projector.3.bias"]
    torch.save(content, tmp_path / "short.pth")
    torch.save(common.vit_nano(img_size=16, patch_size=8).state_dict(), tmp_path / "bare.pth")
    (tmp_path / "not.pth").write_text("not a checkpoint")
    for name, says in (("none", ["no file"]), ("not", ["not a PyTorch checkpoint"]), ("short", ["1 keys are missing", "projector.3.bias"]),
                       ("bare", ["holds no teacher of simdis.py", "--stage teacher"])):
        check("--stage", "offline", "--teacher", tmp_path / f"{name}.pth", says=says)
    assert not (tmp_path / "run" / "checkpoint.pth").exists()

@pytest.mark.parametrize("arch,side,theirs", [
    ("resnet18", 64, lambda: torchvision.models.resnet18()),
    ("vit_tiny", 16, lambda: timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, num_classes=0)),
    ("timm/resnet10t", 32, lambda: timm.create_model("resnet10t", num_classes=0))])
def test_student_loads_into_torchvision_and_timm(arch, side, theirs, tmp_path):
    """P10, P8: backbone.pth is the student, strict with equal outputs; its teacher is any other network."""
    checkpoint = train(tmp_path, "--arch", arch, "--depth", 0, "--teacher_arch", "timm/vit_tiny_patch16_224", "--img_size", side,
                       "--batch_size", 4, "--max_steps", 1, "--hidden", 8)
    weights = torch.load(tmp_path / "backbone.pth", weights_only=True)
    prefix = "backbone.model." if arch.startswith("timm/") else "backbone."
    assert same(weights, {key.removeprefix(prefix): x for key, x in checkpoint["student"].items() if key.startswith(prefix)})
    theirs = theirs()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(weights, strict=True)
    ours, meta = common.load_backbone(tmp_path / "checkpoint.pth")
    assert meta["network"] == "student" and meta["backbone"]["arch"] == arch
    x = torch.randn(2, 3, side, side)
    assert_close(ours(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)
    teacher, meta = common.load_backbone(tmp_path / "checkpoint.pth", network="teacher")
    assert meta["backbone"]["arch"] == "timm/vit_tiny_patch16_224"
    assert torch.equal(teacher.model.norm.weight, checkpoint["teacher"]["backbone.model.norm.weight"])


@pytest.mark.parametrize("stage,kept", [("teacher", "teacher"), ("online", "student")])
def test_both_evaluations_take_the_checkpoint(stage, kept, tmp_path, monkeypatch, capsys):
    """A small-image ResNet, as teacher and as student."""
    few = tuple(data.subset(torch.arange(150)) for data in common.load_data("digits"))
    for script in (simdis, eval_knn, eval_linear):
        monkeypatch.setattr(script, "load_data", lambda name, path: few)
    train(tmp_path / "run", "--stage", stage, "--arch", "resnet10", "--teacher_arch", "resnet10", "--img_size", 8, "--max_steps", 1)
    common_flags = ["--checkpoint", tmp_path / "run" / "checkpoint.pth", "--data", "digits"]
    for script, flags in ((eval_knn, ["--k", 20]), (eval_linear, ["--cached", "--epochs", 1, "--output_dir", tmp_path / "probe"])):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, common_flags + flags)])
        script.main()
    assert f"{kept} of {tmp_path}" in capsys.readouterr().out and (tmp_path / "probe" / "results.json").exists()


def unsynchronised_statistics(rank, folder):
    """Those of the student, when its k-NN is looked at after training on two processes."""
    seen = []
    simdis.knn_accuracy = lambda backbone, *args, **options: seen.append(backbone.bn1.running_mean.clone())
    simdis.train(arguments(folder, "--stage", "teacher", "--teacher_arch", "resnet10", "--img_size", 8, "--no-sync_bn", "--max_steps", 2))
    return seen


def test_without_sync_bn_all_processes_check_what_is_saved(in_processes, tmp_path):
    a, b = in_processes(2, unsynchronised_statistics, tmp_path / "run")
    assert not torch.equal(a[0], a[-1]) and torch.equal(a[-1], b[-1])
    saved = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)["teacher"]["backbone.bn1.running_mean"]
    assert torch.equal(saved, a[-1])


@pytest.mark.parametrize("kept,flags", [("teacher", ["--stage", "teacher"]), ("student", ["--depth", 0])])
def test_init_starts_the_kept_network_from_weights(kept, flags, teacher_file):
    saved = torch.load(teacher_file.parent / "backbone.pth", weights_only=True)
    networks, _ = built("--init", teacher_file, *flags)
    for name in (kept, f"{kept}_momentum"):
        assert all(torch.equal(networks[name].backbone.state_dict()[key], value) for key, value in saved.items())


# -------------------------------------------------------------------------------------- the paper's tables, and flags


@pytest.mark.parametrize("stage,targets", [("online", row) for row in TABLE_2] + [("offline", row) for row in TABLE_2[1:]])
def test_rows_of_table_2_run(stage, targets, teacher_file, tmp_path):
    """All of them (there is no offline BYOL) by their targets: one logged loss for each target, the student's loss their mean."""
    train(tmp_path, *stage_flags(stage, teacher_file), "--targets", *reversed(targets), "--max_steps", 1)
    for record in read_log(tmp_path):
        terms = [record[f"loss_student_{target}"] for target in targets]
        assert sum(name.startswith("loss_student_") for name in record) == len(targets) and all(0 < term < 8 for term in terms)
        assert record["loss_student"] == pytest.approx(sum(terms) / len(terms), rel=1e-5)
        assert ("loss_teacher" in record) == (stage == "online" and len(targets) > 1)
        assert record["loss"] == pytest.approx(record["loss_student"] + record.get("loss_teacher", 0), rel=1e-5)


def test_targets_by_preset_and_by_name():
    assert list(simdis.TARGETS) == TABLE_2[-1] == simdis.PRESETS["7v"]
    assert simdis.PRESETS["byol"] == TABLE_2[0] and simdis.PRESETS["2v"] == TABLE_2[4]
    assert list(built("--targets", "2v", "S-v'", "2v")[0]["student"].predictors) == ["S-v'", "S^-v'", "T^-v'"]
    networks, meta = built("--targets", "byol")
    assert set(networks) == {"student", "student_momentum"} and "teacher" not in meta
    networks, meta = built("--stage", "teacher")
    assert set(networks) == {"teacher", "teacher_momentum"} and meta["network"] == "teacher" and meta["backbone"] == meta["teacher"]


def test_flops_are_those_of_table_1(capsys):
    """4.1 G for ResNet-50, 1.8 G for ResNet-18, 12 M for the six predictors of the distillation terms."""
    teacher, student, predictor = bench.bench_cost().values()
    assert teacher == pytest.approx(4.1e9, rel=0.01) and student == pytest.approx(1.8e9, rel=0.02)
    assert predictor == 2 * 256 * 4096 and 6 * predictor == pytest.approx(12e6, rel=0.05)
    assert "resnet50 and projector" in capsys.readouterr().out
    # of a ViT, by hand: patches, then for each block 12 T D^2 + 2 T^2 D
    T, D = 17, 96
    vit = common.vit_nano(img_size=16, patch_size=4).to("meta")
    assert bench.multiply_adds(vit, 3, 16, 16) == 16 * 48 * D + 4 * (12 * T * D**2 + 2 * T**2 * D)



@pytest.mark.parametrize("flags,blocks", [([], 1), (["--arch", "vit_nano"], 4), (["--arch", "vit_nano", "--depth", "2"], 2)])
def test_an_architecture_by_name_has_its_own_depth(flags, blocks, tmp_path):
    """The recipe's depth is that of the recipe's student."""
    simdis.train(arguments(tmp_path, "--max_steps", 1, *flags, sizes=[]))
    assert len(common.load_backbone(tmp_path / "checkpoint.pth")[0].blocks) == blocks


def test_recipes_follow_the_paper():
    """Sec. 4 and 4.3: networks, rates, warm-up, batch, momentum, head width; BYOL's views (those of test_sdssl.py), without blur
    at 32 pixels."""
    paper = simdis.RECIPES["imagenet"]
    named = dict(arch="resnet18", teacher_arch="resnet50", hidden=4096, warmup_epochs=10, batch_size=2048, momentum=0.99,
                 optimizer="lars", views=dict(scale=(0.08, 1.0)))
    assert named.items() <= paper.items()
    for flags, rates in (("lars", (0.3, 1e-4)), ("sgd", (0.05, 1e-4)), ("lars --lr 7", (7, 1e-4))):
        args = simdis.parse_arguments(["--optimizer", *flags.split()])
        simdis.complete(args, paper)
        assert (args.lr, args.weight_decay) == rates
    for name, recipe in simdis.RECIPES.items():
        assert recipe.keys() - {"depth"} == paper.keys() and recipe["optimizer"] in recipe["rates"], name
        assert (recipe["img_size"] <= 32) == (recipe["views"].get("blur") is False)


def test_photographs_without_labels(photos, tmp_path, monkeypatch):
    """A flat folder takes the recipe of the size that is trained at, and says nothing of k-NN."""
    monkeypatch.setattr(simdis, "knn_accuracy", common.knn_accuracy)
    flags = ["--arch", "resnet18", "--teacher_arch", "resnet18", "--img_size", 64, "--batch_size", 4, "--max_steps", 1]
    assert train(tmp_path, "--data", photos, *flags)["args"]["optimizer"] == "sgd"
    assert not any("knn" in name for record in read_log(tmp_path) for name in record)
