"""sdssl.py: losses against loops written from the equations, the promises P1-P10 for all six methods, every ablation flag."""
import math
import shutil

import pytest
import torch
import torch.nn as nn
from conftest import assert_one_line_error, finished, leaf, read_log, run_script

import common
import sdssl

METHODS = [(framework, sd) for framework in ("mocov3", "byol", "simclr") for sd in (True, False)]
TINY = ["--batch_size", "32", "--hidden", "32", "--isd_hidden", "16", "--log_every", "1", "--knn_every", "0", "--num_workers", "0",
        "--epochs", "2", "--warmup_epochs", "0.1"]


@pytest.fixture(autouse=True)
def bare_runs(monkeypatch):
    """Runs in this process draw no curves and check no k-NN, which take longer than their few steps; the subprocesses do."""
    monkeypatch.setattr(common.Run, "draw_curves", lambda self: None)
    monkeypatch.setattr(sdssl, "knn_accuracy", lambda *arguments, **options: None)


def arguments(folder, *extra):
    return sdssl.parse_arguments([*TINY, "--device", "cpu", "--output_dir", str(folder), *map(str, extra)])


def train(folder, *extra):
    """One run in this process -> its checkpoint."""
    sdssl.train(arguments(folder, *extra))
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def sdssl_losses(framework, q1, q2, z1=None, z2=None, p1=None, p2=None):
    """The losses of one framework, as the training loop calls them."""
    if framework == "simclr":
        return sdssl.simclr_losses(q1, q2)
    losses = sdssl.byol_losses if framework == "byol" else sdssl.mocov3_losses
    return losses(q1, q2, z1, z2, p1, p2)


def method_flags(framework, sd):
    return ["--framework", framework, "--sd" if sd else "--no-sd"]


# ------------------------------------------------------------------------------------------------------------- losses


def cos(a, b):
    return (a * b).sum() / (a.norm() * b.norm())


def naive_contrast(rows, candidates, positives, left_out, tau):
    """-log softmax of the positive (Eq. 2), row by row, mean."""
    total = 0
    for i, row in enumerate(rows):
        terms = [torch.exp(cos(row, z) / tau) for j, z in enumerate(candidates) if j != left_out[i]]
        total = total - torch.log(torch.exp(cos(row, candidates[positives[i]]) / tau) / sum(terms))
    return total / len(rows)


def assert_same_value_and_gradient(ours, naive, *inputs):
    ours_value, naive_value = ours(), naive()
    torch.testing.assert_close(ours_value, naive_value, rtol=1e-6, atol=1e-8)
    ours_gradient = torch.autograd.grad(ours_value, inputs)
    naive_gradient = torch.autograd.grad(naive_value, inputs)
    assert max(g.abs().max() for g in naive_gradient) > 1e-6
    torch.testing.assert_close(ours_gradient, naive_gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_info_nce_equals_eq2(tau):
    q, z = leaf(5, 7), leaf(5, 7, seed=1)
    assert_same_value_and_gradient(lambda: sdssl.info_nce(q, z, tau),
                                   lambda: 2 * tau * naive_contrast(q, z, range(5), [None] * 5, tau), q, z)


def test_info_nce_of_layers_and_gathered_candidates():
    """Three layers, queries of the second of two processes: labels are rank * N + arange(N), shared by the layers."""
    q, z = leaf(3, 4, 7), leaf(8, 7, seed=1)
    labels = 4 + torch.arange(4)

    def naive():
        return sum(2 * 0.2 * naive_contrast(layer, z, labels.tolist(), [None] * 4, 0.2) for layer in q) / 3

    assert_same_value_and_gradient(lambda: sdssl.info_nce(q, z, labels=labels), naive, q, z)
    flat = q.reshape(12, 7)  # the layer outermost
    torch.testing.assert_close(sdssl.info_nce(flat, z, labels=labels), naive())
    torch.testing.assert_close(sdssl.info_nce(q, z[4:]), sdssl.info_nce(flat, z[4:]))


def test_info_nce_closed_forms():
    """Orthogonal candidates: log(1 + (N-1) e^(-1/tau)); equal ones: chance, log N; scale of the inputs does not matter."""
    z = torch.eye(6)
    torch.testing.assert_close(sdssl.info_nce(z, z, 0.5), torch.tensor(1 + 5 * math.exp(-2)).log())
    torch.testing.assert_close(sdssl.info_nce(z, torch.ones(6, 6)), torch.tensor(0.4 * math.log(6)))
    torch.testing.assert_close(sdssl.info_nce(1000 * z, 0.001 * z), sdssl.info_nce(z, z))


def test_regression_loss_equals_eq1():
    q, z = leaf(5, 7), leaf(5, 7, seed=1)
    assert_same_value_and_gradient(lambda: sdssl.regression_loss(q, z), lambda: sum(2 - 2 * cos(a, b) for a, b in zip(q, z)) / 5, q, z)
    layers = leaf(3, 5, 7, seed=2)
    naive = sum(2 - 2 * cos(a, b) for layer in layers for a, b in zip(layer, z)) / 15
    torch.testing.assert_close(sdssl.regression_loss(layers, z), naive)
    torch.testing.assert_close(sdssl.regression_loss(z, -z), torch.tensor(4.0, dtype=torch.float64))


def test_nt_xent_equals_simclr():
    z1, z2 = leaf(4, 7), leaf(4, 7, seed=1)

    def naive():
        z = [*z1, *z2]
        return naive_contrast(z, z, [4, 5, 6, 7, 0, 1, 2, 3], range(8), 0.2)

    assert_same_value_and_gradient(lambda: sdssl.nt_xent(z1, z2), naive, z1, z2)
    torch.testing.assert_close(sdssl.nt_xent(torch.ones(4, 3), torch.ones(4, 3)), torch.tensor(7.0).log())


@pytest.mark.parametrize("framework", ["mocov3", "byol", "simclr"])
def test_terms_of_eq6(framework):
    """The three terms, over both directions, against Eqs. 1-5 layer by layer."""
    L, N = 3, 4
    q1, q2, p1, p2 = (leaf(L, N, 5, seed=i) for i in range(4))
    z1, z2 = (q1[-1], q2[-1]) if framework == "simclr" else (leaf(N, 5, seed=4), leaf(N, 5, seed=5))
    if framework == "simclr":
        p1 = p2 = None
    losses = sdssl_losses(framework, q1, q2, z1, z2, p1, p2)

    def ssl(q, z):
        return sdssl.regression_loss(q, z) if framework == "byol" else sdssl.info_nce(q, z)

    if framework == "simclr":
        both, final = [torch.cat([a, b]) for a, b in zip(q1, q2)], torch.cat([q1[-1], q2[-1]]).detach()
        positives = [4, 5, 6, 7, 0, 1, 2, 3]
        expected = {"loss_ssl": sdssl.nt_xent(q1[-1], q2[-1]),
                    "loss_isd": sum(naive_contrast(layer, final, positives, range(8), 0.2) for layer in both[:-1]) / (L - 1)}
        inputs = (q1, q2)
    else:
        z1, z2 = z1.detach(), z2.detach()
        expected = {"loss_ssl": ssl(q1[-1], z2) + ssl(q2[-1], z1),
                    "loss_isd": sum(ssl(q1[i], z2) + ssl(q2[i], z1) for i in range(L - 1)) / (L - 1),
                    "loss_pred": sum(ssl(p1[i], z2) + ssl(p2[i], z1) for i in range(L))}
        inputs = (q1, q2, p1, p2)
    assert losses.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name])
    total, naive = sum(losses.values()), sum(expected.values())
    torch.testing.assert_close(torch.autograd.grad(total, inputs), torch.autograd.grad(naive, inputs))


def test_losses_run_in_fp32_under_autocast():
    q, z = torch.randn(6, 8), torch.randn(6, 8)
    for loss in (sdssl.info_nce, sdssl.regression_loss, sdssl.nt_xent):
        with torch.autocast("cpu", torch.bfloat16):
            under = loss(q.bfloat16(), z.bfloat16())
        assert under.dtype == torch.float32
        torch.testing.assert_close(under, loss(q.bfloat16().float(), z.bfloat16().float()), rtol=1e-6, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("in_dims", [[12, 12, 12], [4, 8, 12]])
@pytest.mark.parametrize("out_norm", [True, False])
def test_layer_mlp_equals_separate_mlps(in_dims, out_norm):
    """One batched matmul for all layers = L separate MLPs: outputs, input gradients and running statistics."""
    torch.manual_seed(0)
    mlp = sdssl.LayerMLP(in_dims, 10, 6, 3, out_norm)
    separate = []
    for l, dim in enumerate(in_dims):
        parts = [nn.Linear(dim, 10, bias=False), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 10, bias=False), nn.BatchNorm1d(10),
                 nn.ReLU(), nn.Linear(10, 6, bias=False)] + [nn.BatchNorm1d(6, affine=False)] * out_norm
        for linear, weight in zip([parts[0], parts[3], parts[6]], mlp.weights):
            linear.weight.data = weight[l, :, : linear.in_features].clone()
        separate.append(nn.Sequential(*parts))
    inputs = [torch.randn(9, dim, requires_grad=True) for dim in in_dims]
    others = [5 * x.detach() + 1 for x in inputs]  # another view, with other statistics
    ours = torch.stack(mlp(sdssl.stack_layers(inputs), sdssl.stack_layers(others)))
    theirs = torch.stack([torch.stack([m(x) for m, x in zip(separate, view)]) for view in (inputs, others)])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    target = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad((ours * target).sum(), inputs), torch.autograd.grad((theirs * target).sum(), inputs)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mlp.norms[0].running_var.view(3, 10)[1], separate[1][1].running_var)


def loss_gradients(framework, name, weights=None):
    """Gradients of one loss term with respect to every parameter of student and teacher."""
    torch.manual_seed(0)
    args = arguments("unused", "--framework", framework, "--arch", "vit_nano", "--img_size", 16, "--patch_size", 4)
    student, teacher, _ = sdssl.build(args)
    x1, x2 = torch.randn(2, 8, 3, 16, 16)
    (q1, q2), (p1, p2) = student(x1, x2)
    if teacher:
        teacher.requires_grad_(True)  # were it not for the stop-gradient in the loss, gradient would now arrive
    z1, z2 = (teacher(x1), teacher(x2)) if teacher else (q1[-1], q2[-1])
    loss = sdssl_losses(framework, q1, q2, z1, z2, p1, p2)[name]
    loss.backward()
    return student, teacher


@pytest.mark.parametrize("framework", ["mocov3", "byol"])
def test_loss_pred_moves_predictors_only(framework):
    student, teacher = loss_gradients(framework, "loss_pred")
    for name, parameter in student.named_parameters():
        if name.startswith("predictor.weights"):
            assert parameter.grad is not None and all(layer.abs().max() > 0 for layer in parameter.grad), name
        elif not name.startswith("predictor."):
            assert parameter.grad is None, name
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("framework", ["mocov3", "byol", "simclr"])
def test_loss_isd_leaves_the_targets_alone(framework):
    """Eq. 3: no gradient to the teacher; for SimCLR none to the final layer, its projector or the final block."""
    student, teacher = loss_gradients(framework, "loss_isd")
    assert teacher is None or all(parameter.grad is None for parameter in teacher.parameters())
    last = len(student.backbone.blocks) - 1
    for name, parameter in student.named_parameters():
        if name.startswith(("projector.", f"backbone.blocks.{last}.")):
            assert parameter.grad is None or parameter.grad.abs().max() == 0, name
    assert all(p.grad.abs().max() > 0 for n, p in student.named_parameters() if n.startswith("isd_projector.weights"))
    assert student.backbone.blocks[0].attn.qkv.weight.grad.abs().max() > 0


def test_teacher_shares_nothing_and_gets_no_gradient():
    """P4: separate storage; frozen patch projection in both; the predictor and the lower heads stay with the student."""
    student, teacher, _ = sdssl.build(arguments("unused", "--arch", "vit_nano", "--img_size", 16, "--patch_size", 4))
    storages = {p.data_ptr() for p in student.state_dict().values()}
    assert not storages & {p.data_ptr() for p in teacher.state_dict().values()}
    assert not any(p.requires_grad for p in teacher.parameters())
    assert {name.split(".")[0] for name in teacher.state_dict()} == {"backbone", "projector"}


@pytest.mark.parametrize("framework", ["mocov3", "byol"])
def test_teacher_is_the_ema_after_a_step(framework, tmp_path):
    """P4: after one step teacher = m * teacher + (1 - m) * student, and its BatchNorm statistics are its own."""
    common_flags = ["--framework", framework, "--lr", 0.01, "--momentum", 0.9]
    torch.manual_seed(0)
    first = train(tmp_path / "one", *common_flags, "--max_steps", 1)
    second = train(tmp_path / "two", *common_flags, "--max_steps", 2)
    steps = 2 * (1437 // 32)
    m = float(common.cosine_schedule(0.9, 1.0, steps)[1])
    for name, value in second["teacher"].items():
        if "running" in name or "num_batches" in name:
            continue
        expected = m * first["teacher"][name] + (1 - m) * second["student"][name]
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    moved = [n for n, v in second["teacher"].items() if not torch.equal(v, first["teacher"][n])]
    assert any("blocks" in n for n in moved) and not any("patch_embed" in n for n in moved)
    assert second["teacher"]["projector.norms.0.num_batches_tracked"] == 4  # two steps of two views


# ---------------------------------------------------------------------------------------------- P1: several processes


def step_gradients(number, framework, sd, arch):
    """Loss and gradients of one step on a global batch of 16 digits, from whichever share this process has."""
    size = 16 if arch.startswith("vit") else 8
    args = arguments("unused", *method_flags(framework, sd), "--arch", arch, "--img_size", size, "--patch_size", 4)
    torch.manual_seed(0)
    student, teacher, _ = sdssl.build(args)
    dtype = torch.float32 if arch.startswith("vit") else torch.float64
    for network in filter(None, (student, teacher)):
        network.to(dtype)
    model = common.distributed(student)
    data, _ = common.load_data("digits")
    views = common.byol_views(size, blur=False)
    (_, (x1, x2), _), = common.ViewLoader(data, views, 16, 0, "cpu").steps(3, 4)
    x1, x2 = x1.to(dtype), x2.to(dtype)
    with torch.no_grad():
        z1, z2 = (teacher(x1), teacher(x2)) if teacher else (None, None)
    (q1, q2), (p1, p2) = model(x1, x2)
    losses = sdssl_losses(framework, q1, q2, *((z1, z2) if teacher else (q1[-1], q2[-1])), p1, p2)
    loss = sum(losses.values())
    loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    statistics = {name: b for name, b in student.named_buffers() if "running" in name}
    return {"loss": common.mean_over_processes(loss), "gradients": gradients, "statistics": statistics}


common.RESNETS["resnet10"] = ("BasicBlock", [1, 1, 1, 1])  # fp64 takes its time
CASES = [(*method, "vit_nano") for method in METHODS] + [("mocov3", True, "resnet10"), ("simclr", True, "resnet10")]


def every_gradient(number):
    return [step_gradients(number, *case) for case in CASES]


def test_world_size_does_not_matter(in_processes):
    """P1: two processes with 8 images each = one with 16: loss, gradients, BatchNorm statistics, 1e-5 relative in fp32.

    The ResNet is compared in fp64, closer: in fp32 its gradient is 2e-3 from its own fp64 value, whatever the processes.
    """
    for case, alone, *both in zip(CASES, every_gradient(0), *in_processes(2, every_gradient), strict=True):
        tolerance = 1e-5 if "vit_nano" in case else 1e-10
        scale = torch.cat([g.flatten() for g in alone["gradients"].values()]).norm()
        assert len(alone["gradients"]) > 10
        for one in both:
            torch.testing.assert_close(one["loss"], alone["loss"], rtol=1e-5, atol=0)
            assert one["gradients"].keys() == alone["gradients"].keys()
            difference = torch.cat([(one["gradients"][n] - g).flatten() for n, g in alone["gradients"].items()]).norm()
            assert difference / scale < tolerance, case
            for name, value in alone["statistics"].items():
                torch.testing.assert_close(one["statistics"][name], value, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------- P5, P6: runs in the wild


@pytest.mark.parametrize("features,collapsed", [(torch.ones(16, 8) + 1e-3 * torch.randn(16, 8), True),
                                                (torch.randn(16, 1) * torch.randn(1, 8), True), (torch.randn(16, 8), False)])
def test_collapse_is_named(features, collapsed, tmp_path, capsys):
    """P6: one point and one line are named, in print and in the log; an even spread is not."""
    args = arguments(tmp_path, "--epochs", 1, "--max_steps", 1)
    loader = common.ViewLoader(common.load_data("digits")[0], common.byol_views(8), 32, 0, "cpu")
    run = common.Run(args, loader, {})
    for step, _, _ in run.steps():
        run.end_step(step, {"loss": torch.tensor(1.0)}, features=features, lr=0.1)
    assert ("collapse at step 1" in capsys.readouterr().out) == collapsed == ("collapse" in read_log(tmp_path)[-1])


# ------------------------------------------------------------------------------------------------------ P7: bad input


def run_in_process(capsys, *flags):
    """main() as `python sdssl.py` calls it -> something like a finished process."""
    return finished(capsys, lambda: sdssl.train(sdssl.parse_arguments([*TINY, "--device", "cpu", *map(str, flags)])))


def test_bad_input_gets_one_line(tmp_path, capsys, image_folder):
    """P7: what is wrong and what to do, exit code 2."""

    def check(*flags, says):
        assert_one_line_error(run_in_process(capsys, "--output_dir", tmp_path / "run", *flags), *says)

    nano = ["--arch", "vit_nano", "--img_size", 32, "--patch_size", 8]
    check("--data", tmp_path / "nowhere", says=["nowhere is neither a directory nor one of", "digits"])
    check("--data", "", says=["--data '' is neither a directory"])
    (tmp_path / "empty").mkdir()
    check("--data", tmp_path / "empty", says=["no images under", "empty"])
    check("--data", image_folder, *nano, "--batch_size", 100, says=["24 images are fewer than --batch_size 100"])
    check("--img_size", 18, says=["18 x 18 is not a multiple of patch size 4"])
    check("--arch", "vit_giant", says=["unknown --arch vit_giant", "vit_small"])
    check("--arch", "timm/no_such_model", says=["no model 'no_such_model'"])
    check("--num_heads", 5, says=["--num_heads 5 does not divide"])
    check("--isd_every", 4, says=["--isd_every 4 leaves none"])
    check("--framework", "simclr", "--isd_mlp", 0, says=["--isd_mlp 0 needs predictors"])
    check("--device", "cuda" if not torch.cuda.is_available() else "mps", says=["not available"])
    check("--batch_size", 1, says=["argument --batch_size: 1 is not a number of at least 2"])
    check("--data", "cifar10", "--data_path", tmp_path / "empty", says=["cifar10", "--data_path"])

    (tmp_path / "cut").mkdir()
    photo = next((image_folder / "train" / "cat").iterdir()).read_bytes()
    for i in range(8):
        (tmp_path / "cut" / f"{i}.jpg").write_bytes(photo if i != 5 else photo[: len(photo) // 2])
    check("--data", tmp_path / "cut", *nano, "--batch_size", 8, says=[r"cannot read image \S*cut/5.jpg", "replace or delete"])

    (tmp_path / "not.pth").write_text("not a checkpoint")
    check("--init", tmp_path / "not.pth", says=["not a PyTorch checkpoint"])
    check("--init", tmp_path / "none.pth", says=["argument --init: no file .*none.pth"])
    check("--init", "", says=["argument --init: no file ''"])
    torch.save(common.vit_tiny(img_size=16, patch_size=4, depth=4).state_dict(), tmp_path / "tiny.pth")
    check("--init", tmp_path / "tiny.pth", says=["does not fit this architecture: size mismatch for", "192", "96", "--arch"])
    short = common.vit_nano(img_size=16, patch_size=4).state_dict()
    del short["blocks.2.mlp.fc1.bias"]
    torch.save(short, tmp_path / "short.pth")
    check("--init", tmp_path / "short.pth", says=["1 keys are missing", "blocks.2.mlp.fc1.bias"])
    assert not (tmp_path / "run" / "checkpoint.pth").exists()


def test_resume_with_other_settings_is_refused(tmp_path, capsys):
    train(tmp_path, "--max_steps", 1)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    result = run_in_process(capsys, "--output_dir", tmp_path, "--resume", "--alpha", 0.5)
    assert_one_line_error(result, "cannot resume", r"--alpha was 1.0")
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    train(tmp_path, "--max_steps", 1, "--overwrite", "--alpha", 0.5)


def test_bad_input_from_the_command_line(tmp_path):
    assert_one_line_error(run_script("sdssl.py", "--data", tmp_path, "--output_dir", tmp_path / "run"), "no images under")


def test_a_truncated_image_is_named_through_a_worker(image_folder, tmp_path):
    shutil.copytree(image_folder / "train", tmp_path / "images")
    victim = tmp_path / "images" / "dog" / "11.jpg"
    victim.write_bytes(victim.read_bytes()[:500])
    result = run_script("sdssl.py", *TINY, "--data", tmp_path / "images", "--arch", "vit_nano", "--img_size", 32, "--patch_size", 8,
                        "--batch_size", 24, "--num_workers", 2, "--output_dir", tmp_path / "run")
    assert_one_line_error(result, r"cannot read image \S*dog/11.jpg")


# --------------------------------------------------------------------------------------------- P8, P10: what is saved


def test_backbone_loads_into_timm(tmp_path):
    """P10: strict, with equal outputs; the checkpoint itself is plain (P8: every load here is weights_only)."""
    import timm

    checkpoint = train(tmp_path, "--arch", "vit_small", "--max_steps", 1, "--batch_size", 8)
    theirs = timm.create_model("vit_small_patch16_224", img_size=16, patch_size=4, num_classes=0)
    theirs.load_state_dict(torch.load(tmp_path / "backbone.pth", weights_only=True), strict=True)
    ours, meta = common.load_backbone(tmp_path / "checkpoint.pth")
    assert meta["img_size"] == 16 and meta["backbone"]["arch"] == "vit_small" and checkpoint["step"] == 1
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


def test_resnet_trains_and_loads_into_torchvision(tmp_path):
    import torchvision

    train(tmp_path, "--arch", "resnet18", "--max_steps", 1, "--img_size", 64, "--batch_size", 4)
    theirs = torchvision.models.resnet18()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(torch.load(tmp_path / "backbone.pth", weights_only=True), strict=True)
    ours, _ = common.load_backbone(tmp_path / "checkpoint.pth")
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs.eval()(x))


def test_init_starts_from_weights(tmp_path):
    train(tmp_path / "a", "--max_steps", 1)
    args = arguments(tmp_path / "b", "--init", tmp_path / "a" / "checkpoint.pth", "--arch", "vit_nano", "--img_size", 16, "--patch_size", 4)
    student, _, _ = sdssl.build(args)
    saved = torch.load(tmp_path / "a" / "backbone.pth", weights_only=True)
    assert all(torch.equal(student.backbone.state_dict()[name], value) for name, value in saved.items())


# -------------------------------------------------------------------------------------------------------------- flags


def built(*flags):
    args = arguments("unused", "--arch", "vit_nano", "--img_size", 16, "--patch_size", 4, *flags)
    return sdssl.build(args)


def test_ablations_change_what_they_name():
    """Tables 5 and 6: the structure of the heads follows the flags."""
    student, teacher, _ = built()
    assert student.lower == [0, 1, 2] and len(student.isd_projector.weights) == 3 and len(student.predictor.weights[0]) == 4
    assert not student.backbone.patch_embed.proj.weight.requires_grad and not student.backbone.pos_embed.requires_grad
    plain, _, _ = built("--no-sd")
    assert plain.lower == [] and plain.isd_projector is None and len(plain.predictor.weights[0]) == 1
    every, _, _ = built("--isd_every", 2)
    assert every.lower == [1] and len(every.isd_projector.weights[0]) == 1  # of 4 layers: the 2nd, and the final one
    twelve = sdssl.Student(common.vit_tiny(img_size=16, patch_size=4), "mocov3", isd_every=3, hidden=8, isd_hidden=8)
    assert twelve.lower == [2, 5, 8]
    two, _, _ = built("--isd_mlp", 2)
    assert len(two.isd_projector.weights) == 2 and len(two.projector.weights) == 3
    none, _, _ = built("--isd_mlp", 0)
    assert none.isd_projector is None
    (q,), (p,) = none(torch.randn(4, 3, 16, 16))
    assert q.shape == p.shape == (4, 4, 256)
    assert built("--no-stop_grad_conv1")[0].backbone.patch_embed.proj.weight.requires_grad
    assert built("--num_heads", 12)[0].backbone.blocks[0].attn.num_heads == 12
    simclr, no_teacher, _ = built("--framework", "simclr")
    assert simclr.predictor is None and no_teacher is None
    byol, _, _ = built("--framework", "byol")
    assert len(byol.projector.norms) == 2 and len(student.projector.norms) == 3  # hidden only; output too


def test_weights_of_the_terms(tmp_path):
    """alpha rises along half a cosine, or is constant; beta and alpha weigh what they name; tau changes the loss."""
    total = 2 * (1437 // 32)
    for name, flags, alpha, beta in (("plain", [], None, 1.0), ("constant", ["--no-anneal", "--alpha", 0.8], 0.8, 1.0),
                                     ("pred only", ["--alpha", 0], 0.0, 1.0), ("no pred", ["--beta", 0], None, 0.0)):
        train(tmp_path / name, "--max_steps", 3, *flags)
        for i, record in enumerate(r for r in read_log(tmp_path / name) if "loss" in r):
            expected = alpha if alpha is not None else (1 - math.cos(math.pi * i / total)) / 2
            assert record["alpha"] == pytest.approx(expected, abs=1e-9)
            assert record["loss"] == pytest.approx(record["loss_ssl"] + expected * record["loss_isd"] + beta * record["loss_pred"], rel=1e-5)
    train(tmp_path / "tau", "--max_steps", 1, "--tau", 0.5)
    first, other = read_log(tmp_path / "plain")[0], read_log(tmp_path / "tau")[0]
    assert other["chance"] == pytest.approx(4 * 0.5 * math.log(32)) and first["loss_ssl"] != other["loss_ssl"]


def test_recipes_follow_the_paper():
    """Sec. 4.1: learning rates, warm-up, epochs, batch, decay, momentum and head widths."""
    paper = sdssl.RECIPES["imagenet"]
    assert paper["lr"] == dict(simclr=1.3e-4, byol=1.5e-4, mocov3=1.5e-4) and paper["weight_decay"] == 0.1
    assert (paper["epochs"], paper["warmup_epochs"], paper["batch_size"], paper["momentum"]) == (300, 40, 1024, 0.996)
    assert (paper["hidden"], paper["isd_hidden"]) == (4096, 2048)
    one, two = common.byol_views(224, **paper["views"])
    assert (one.scale, one.jitter, one.p_jitter, one.grey, one.blur, one.solarize) == ((0.08, 1.0), (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, 1.0, 0.0)
    assert (two.blur, two.solarize, two.flip) == (0.1, 0.2, 0.5)
    assert {recipe.keys() ^ paper.keys() == set() for recipe in sdssl.RECIPES.values()} == {True}


def test_photographs_at_224(photos, tmp_path):
    """An unlabelled flat folder at 224 pixels: trains, and says nothing of k-NN."""
    train(tmp_path, "--data", photos, "--arch", "vit_nano", "--batch_size", 8, "--max_steps", 1, "--num_workers", 2)
    assert not any("knn" in record for record in read_log(tmp_path))


# ----------------------------------------------------------------------------------------------------------- analysis


def test_measures_equal_naive_loops():
    """Eqs. 7-9 on the unit sphere, pair by pair."""
    x, y = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    a, b = [v / v.norm() for v in x], [v / v.norm() for v in y]
    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    for gamma in (1.0, 2.0):
        torch.testing.assert_close(sdssl.alignment(x, y, gamma), sum((p - q).norm() ** gamma for p, q in zip(a, b)) / 7)
        torch.testing.assert_close(sdssl.negative_alignment(x, gamma), sum((a[i] - a[j]).norm() ** gamma for i, j in pairs) / len(pairs))
    naive = torch.log(sum(torch.exp(-2 * (a[i] - a[j]).norm() ** 2) for i, j in pairs) / len(pairs))
    torch.testing.assert_close(sdssl.uniformity(x), naive)
    assert sdssl.alignment(x, 3 * x) < 1e-12


def test_uniformity_of_a_circle():
    """n points evenly on a circle: the mean over all n^2 pairs is exp(-2t) I_0(2t), to many digits; ours leaves out the n self-pairs."""
    n, t = 500, 2.0
    angle = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    points = torch.stack([angle.cos(), angle.sin()], 1)
    every_pair = math.exp(-2 * t) * torch.special.i0(torch.tensor(2 * t, dtype=torch.float64))
    torch.testing.assert_close(sdssl.uniformity(points, t), ((n * every_pair - 1) / (n - 1)).log())
    torch.testing.assert_close(sdssl.negative_alignment(points), torch.tensor(2.0 * n / (n - 1), dtype=torch.float64))


def test_cka():
    """1 for a rotated and scaled copy, near 0 for independent features, and the ratio of HSICs of the Gram matrices."""
    x, z = torch.randn(2000, 6, dtype=torch.float64), torch.randn(2000, 4, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    torch.testing.assert_close(sdssl.linear_cka(x, 3 * x @ rotation + 5), torch.tensor(1.0, dtype=torch.float64))
    assert sdssl.linear_cka(x, z) < 0.02
    x, z = x[:9], z[:9]
    centre = torch.eye(9, dtype=torch.float64) - 1 / 9

    def hsic(k, l):
        return sum((centre @ k @ centre)[i, j] * (centre @ l @ centre)[i, j] for i in range(9) for j in range(9))

    k, l = x @ x.T, z @ z.T
    torch.testing.assert_close(sdssl.linear_cka(x, z), hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt())


def test_analyze_draws_and_repeats(tmp_path, monkeypatch):
    """Two runs side by side: three pictures and two tables, the same ones when asked again; one line for a missing file."""
    import csv
    import functools

    monkeypatch.setattr(sdssl, "measure_layers", functools.partial(sdssl.measure_layers, images=64))  # t-SNE takes its time
    train(tmp_path / "a", "--max_steps", 1)
    train(tmp_path / "b", "--max_steps", 1, "--seed", 1)
    tables = []
    for name in ("first", "second"):
        sdssl.analyze(arguments(tmp_path / name, "--analyze", tmp_path / "a" / "checkpoint.pth", tmp_path / "b" / "checkpoint.pth"))
        assert {p.name for p in (tmp_path / name).iterdir()} == {"tsne.png", "cka.png", "alignment.png", "analysis.csv", "cka.csv"}
        tables.append([(tmp_path / name / f).read_text() for f in ("analysis.csv", "cka.csv")])
    assert tables[0] == tables[1]
    rows = list(csv.DictReader(tables[0][0].splitlines()))
    assert len(rows) == 2 * 4 and {row["layer"] for row in rows} == {"1", "2", "3", "4"}
    for row in rows:
        assert float(row["negative / alignment"]) == pytest.approx(float(row["negative alignment"]) / float(row["alignment"]))
    cka = list(csv.DictReader(tables[0][1].splitlines()))
    assert len(cka) == 2 * 16 and all(float(r["cka"]) == pytest.approx(1) for r in cka if r["layer"] == r["other layer"])
    with pytest.raises(SystemExit):
        arguments(tmp_path, "--analyze", tmp_path / "none.pth")
    with pytest.raises(common.InputError, match="alignment.png already exists: pass --overwrite"):
        sdssl.analyze(arguments(tmp_path / "first", "--analyze", tmp_path / "a" / "checkpoint.pth"))


def test_analyze_takes_bare_weights_and_few_images(tmp_path, monkeypatch, capsys):
    """backbone.pth needs --arch and sizes; t-SNE takes images of the first ten classes, and is left out where they are few."""
    import functools

    from PIL import Image

    monkeypatch.setattr(sdssl, "measure_layers", functools.partial(sdssl.measure_layers, images=40))
    train(tmp_path / "a", "--max_steps", 1)
    for split, number in (("train", 2), ("val", 4)):
        for label in range(12):  # of class 0 to 11: few of the first ten among 40 of 48, all of them in t-SNE
            (tmp_path / "data" / split / f"{label:02}").mkdir(parents=True)
            for i in range(number if label > 9 or split == "train" else 0 if label else 3):
                Image.new("RGB", (16, 16), (20 * label, 30 * i, 0)).save(tmp_path / "data" / split / f"{label:02}" / f"{i}.png")
    flags = ["--data", tmp_path / "data", "--arch", "vit_nano", "--img_size", 16, "--patch_size", 4]
    sdssl.analyze(arguments(tmp_path / "out", "--analyze", tmp_path / "a" / "backbone.pth", *flags))
    assert "too few images of the first ten classes" in capsys.readouterr().out and (tmp_path / "out" / "tsne.png").exists()
    with pytest.raises(common.InputError, match="does not say which architecture"):
        sdssl.analyze(arguments(tmp_path / "other", "--analyze", tmp_path / "a" / "backbone.pth", "--data", tmp_path / "data"))


def test_timm_vits_keep_the_flags_that_apply(tmp_path):
    """--stop_grad_conv1 freezes timm's patch projection too; heads are timm's own; layers only where [CLS] is the output."""
    args = arguments(tmp_path, "--arch", "timm/vit_tiny_patch16_224", "--img_size", 32, "--patch_size", 16)
    for name, value in sdssl.RECIPES["digits"].items():
        setattr(args, name, value if getattr(args, name, None) is None else getattr(args, name))
    student, _, _ = sdssl.build(args)
    assert not any(p.requires_grad for p in student.backbone.model.patch_embed.parameters())
    assert student.backbone.model.blocks[0].attn.qkv.weight.requires_grad
    args.num_heads = 3
    with pytest.raises(common.InputError, match="--num_heads is for ViTs of vit_nano"):
        sdssl.build(args)


def test_few_images_are_no_collapse(tmp_path, capsys):
    """Of two images no spread can be told; the record has it, without a verdict."""
    train(tmp_path, "--batch_size", 2, "--max_steps", 2, "--lr", 0)
    assert "collapse" not in capsys.readouterr().out and "effective_rank" in read_log(tmp_path)[-2]
