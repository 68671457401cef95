"""d2v_kd.py: Eqs. 1-6 against loops, other people's checkpoints by their real keys and shapes, the promises P1-P10."""
import copy
import shutil
import signal

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import assert_one_line_error, finished, leaf, read_log, same
from torch.testing import assert_close

import common
import d2v_kd
import eval_linear

TINY = ("--batch_size 32 --log_every 1 --knn_every 0 --num_workers 0 --epochs 2 --warmup_epochs 0.1 --device cpu "
        "--output_dir unused").split()


@pytest.fixture(autouse=True)
def bare_runs(monkeypatch):
    """Runs in this process draw no curves and check no k-NN, which take longer than their few steps."""
    monkeypatch.setattr(common.Run, "draw_curves", lambda self: None)
    monkeypatch.setattr(d2v_kd, "knn_accuracy", lambda *arguments, **options: None)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A checkpoint of this repository: a pre-norm ViT of 4 blocks for digits."""
    torch.manual_seed(7)
    options = dict(arch="vit_nano", img_size=16, patch_size=4)
    weights = common.create_backbone(**options).state_dict()
    meta = dict(method="sdssl", network="student", backbone=options, mean=common.MEAN, std=common.STD)
    path = tmp_path_factory.mktemp("teacher") / "checkpoint.pth"
    torch.save({"student": {f"backbone.{key}": value for key, value in weights.items()}, "meta": meta}, path)
    return path


def arguments(*flags):
    return d2v_kd.parse_arguments([*TINY, *map(str, flags)])


def train(folder, *flags):
    """One run in this process -> its checkpoint."""
    d2v_kd.train(arguments("--output_dir", folder, *flags))
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def built(*flags):
    """-> student, the student's meta, and a teacher: by default a ViT of 4 blocks and random weights."""
    args = arguments("--teacher_arch", "vit_nano", "--arch", "vit_nano", "--img_size", 16, "--patch_size", 4, *flags)
    torch.manual_seed(0)
    backbone, meta = common.load_backbone(None, args.teacher_arch, args.patch_size, args.img_size)
    return *d2v_kd.build_student(args, backbone, meta), d2v_kd.Contextualized(backbone)


# ------------------------------------------------------------------------------------------------------------- losses


def standardised(x, dim):
    """To mean 0 and variance 1."""
    return (x - x.mean(dim, keepdim=True)) / (x.var(dim, correction=0, keepdim=True) + 1e-5).sqrt()


def naive_target(states):
    """Eqs. 1-5, of each image L layers (T, D)."""
    return torch.stack([standardised(sum(standardised(h, 0) for h in image) / len(image), 1) for image in zip(*states, strict=True)])


def naive_loss(pred, target):
    """Eq. 6: for an image, the patches' mean squared errors and that of [CLS], over N + 1; mean over images."""
    errors = [((a - b) ** 2).sum(1) / a.shape[1] for a, b in zip(pred, target, strict=True)]  # of an image (T,)
    return sum((error[1:].sum() + error[0]) / len(error) for error in errors) / len(errors)


def test_target_and_loss_equal_naive_loops():
    """Value and gradient, on both sides, with unlike numbers of layers."""
    student = [leaf(2, 4, 5, seed=i) for i in range(2)]
    teacher = [leaf(2, 4, 5, seed=10 + i) for i in range(3)]
    pairs = [(d2v_kd.contextualized_target(s), naive_target(s)) for s in (student, teacher)]
    for ours, naive in pairs:
        assert_close(ours, naive, rtol=1e-10, atol=1e-12)
    ours, naive = d2v_kd.kd_loss(pairs[0][0], pairs[1][0]), naive_loss(pairs[0][1], pairs[1][1])
    assert_close(ours, naive, rtol=1e-10, atol=0)
    expected = torch.autograd.grad(naive, student + teacher)
    assert min(g.abs().max() for g in expected) > 1e-3
    assert_close(torch.autograd.grad(ours, student + teacher), expected, rtol=1e-8, atol=1e-12)


def test_target_closed_forms():
    h = [leaf(3, 6, 8, seed=i).detach() for i in range(4)]
    before = copy.deepcopy(h)
    y = d2v_kd.contextualized_target(h)
    assert same(h, before)  # inputs unmodified
    assert_close(y.mean(-1), torch.zeros(3, 6, dtype=y.dtype), atol=1e-12, rtol=0)
    assert_close(y.pow(2).mean(-1), torch.ones(3, 6, dtype=y.dtype), atol=1e-3, rtol=0)
    # a layer's scale and offset per dim are taken away; so are copies of every layer
    scale, offset = 1 + torch.rand(8, dtype=y.dtype) * 9, torch.randn(8, dtype=y.dtype)
    assert_close(d2v_kd.contextualized_target([h[0] * scale + offset, *h[1:]]), y, rtol=1e-4, atol=1e-4)
    assert_close(d2v_kd.contextualized_target(h + h), y)
    # images do not see each other, the order of the layers does not count, and the order of the tokens stays
    assert_close(d2v_kd.contextualized_target([x[1:2] for x in h])[0], y[1])
    assert_close(d2v_kd.contextualized_target(h[::-1]), y)
    order = torch.randperm(6)
    assert_close(d2v_kd.contextualized_target([x[:, order] for x in h]), y[:, order])
    # tokens that are all alike, or nearly so: no division by zero, forwards or backwards
    ones = torch.ones(2, 5, 4, requires_grad=True)
    y = d2v_kd.contextualized_target([ones, ones])
    d2v_kd.kd_loss(y, torch.randn(2, 5, 4)).backward()
    assert (y == 0).all() and ones.grad.isfinite().all()
    assert d2v_kd.contextualized_target([1e4 + 1e-3 * torch.randn(2, 5, 4)]).isfinite().all()


def test_loss_is_two_minus_two_correlations():
    """0 for the same, about 4 for the opposite, near 2 (chance) for independent states."""
    a = d2v_kd.contextualized_target([leaf(4, 9, 64).detach()])
    b = d2v_kd.contextualized_target([leaf(4, 9, 64, seed=1).detach()])
    assert d2v_kd.kd_loss(a, a) == 0 and d2v_kd.kd_loss(a, -a) == pytest.approx(4, abs=1e-3)
    assert d2v_kd.kd_loss(a, b) == pytest.approx(2, abs=0.1)
    pairs = zip(a.flatten(0, 1), b.flatten(0, 1), strict=True)
    correlation = sum(torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in pairs) / 36
    assert d2v_kd.kd_loss(a, b) == pytest.approx(2 - 2 * correlation, abs=1e-3)


def test_norms_and_loss_run_in_fp32_under_autocast():
    half = [(5 + 3 * torch.randn(2, 7, 16)).bfloat16() for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        y = d2v_kd.contextualized_target(half)
        loss = d2v_kd.kd_loss(y.bfloat16(), torch.zeros_like(y).bfloat16())
    assert y.dtype == loss.dtype == torch.float32
    assert_close(y, d2v_kd.contextualized_target([x.float() for x in half]), rtol=0, atol=0)
    assert_close(loss, y.bfloat16().float().pow(2).mean())
    assert d2v_kd.kd_loss(half[0], half[1]).dtype == torch.float32


# ------------------------------------------------------------------------------------------- other people's models and files


IMAGE = "modality_encoders.IMAGE"
FAIRSEQ_BLOCKS = [f"{IMAGE}.context_encoder.blocks.0", f"{IMAGE}.context_encoder.blocks.1", *(f"blocks.{i}" for i in range(10))]


@pytest.fixture(scope="module")
def unilm(tmp_path_factory):
    """beitv2_base_patch16_224_pt1k.pth: keys that timm has too, and those of BEiTv2's pretraining -> file, timm's model."""
    model = timm.create_model("beitv2_base_patch16_224", num_classes=0, global_pool="token", use_rel_pos_bias=False,
                              use_shared_rel_pos_bias=True).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    weights = model.state_dict()
    cls_layer = {key.replace("blocks.0.", "cls_pt_layers.0."): x for key, x in weights.items() if key.startswith("blocks.0.")}
    index = {"rel_pos_bias.relative_position_index": torch.zeros(197, 197, dtype=torch.long)}
    tokens = {"mask_token": torch.zeros(1, 1, 768), "lm_head.weight": torch.zeros(8192, 768), "lm_head.bias": torch.zeros(8192)}
    path = tmp_path_factory.mktemp("unilm") / "beitv2_base_patch16_224_pt1k.pth"
    torch.save({"model": {**weights, **cls_layer, **index, **tokens}}, path)
    yield path, model
    path.unlink()  # 400 MB


@pytest.fixture(scope="module")
def fairseq(tmp_path_factory):
    """base_imagenet.pt: Data2Vec2's image model, two blocks of which sit in the context encoder, its decoder and EMA teacher."""
    tensors = {f"{IMAGE}.extra_tokens": (1, 1, 768), f"{IMAGE}.fixed_positional_encoder.positions": (1, 196, 768)}
    layers = {f"{IMAGE}.local_encoder.proj": (768, 3, 16, 16), f"{IMAGE}.context_encoder.norm": (768,),
              f"{IMAGE}.decoder.blocks.0.0": (768, 48, 3, 3), f"{IMAGE}.decoder.proj": (768, 768)}
    for block in FAIRSEQ_BLOCKS:
        layers |= {f"{block}.norm1": (768,), f"{block}.norm2": (768,), f"{block}.attn.qkv": (2304, 768),
                   f"{block}.attn.proj": (768, 768), f"{block}.mlp.fc1": (3072, 768), f"{block}.mlp.fc2": (768, 3072)}
    for name, shape in layers.items():
        tensors |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    weights = {key: torch.randn(shape) * 0.05 for key, shape in tensors.items()}
    path = tmp_path_factory.mktemp("fairseq") / "base_imagenet.pt"
    torch.save({"model": {**weights, "_ema": {"blocks.0.norm1.weight": torch.zeros(768)}}, "args": None}, path)
    yield path
    path.unlink()


def test_unilm_file_is_the_shared_bias_model(unilm):
    """The hidden states are the outputs of the blocks of timm's BEiT with one shared table; its blocks are no start for ours."""
    path, theirs = unilm
    teacher, meta = d2v_kd.load_teacher(arguments("--teacher", path, "--img_size", 224, "--patch_size", 16))
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert meta["mean"] == common.MEAN and meta["std"] == common.STD
    assert round(sum(p.numel() for p in teacher.parameters()) / 1e6, 1) == 85.8
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        states = teacher.block_outputs(x)
        y = torch.cat([theirs.cls_token, theirs.patch_embed(x)], 1)
        expected = []
        for block in theirs.blocks:
            y = block(y, shared_rel_pos_bias=theirs.rel_pos_bias())
            expected.append(y)
        assert_close(states, expected)
        assert_close(teacher.model.fc_norm(y), theirs.norm(y))
    with pytest.raises(common.InputError, match="the teacher does not fit this architecture"):
        d2v_kd.load_blocks(common.vit_base(depth=6), teacher.model.state_dict(), "first", "the teacher")


def test_timm_and_finetuned_unilm_files_load(tmp_path):
    """The other form: a table in each block, with or without unilm's indices and head; --teacher_arch is not needed."""
    weights = common.create_backbone(d2v_kd.BEIT, 32).model.state_dict()
    native = {key: torch.randn((732, 12) if key.endswith("table") else x.shape) for key, x in weights.items()}
    theirs = native | {"blocks.0.attn.relative_position_index": torch.zeros(197, 197), "head.weight": torch.zeros(1000, 768)}
    torch.save({"model": theirs}, tmp_path / "file.pth")
    teacher, _ = d2v_kd.load_teacher(arguments("--teacher", tmp_path / "file.pth", "--img_size", 224))
    assert same(dict(teacher.model.state_dict()), native)


def test_fairseq_file_is_data2vec2(fairseq):
    """The first six blocks in the order of the data, and what comes before: project, positions, token in front, norm. No key is left
    over; 43.1 M parameters learn."""
    args = arguments("--arch", "vit_base", "--img_size", 224, "--patch_size", 16, "--depth", 6, "--init", fairseq)
    teacher = common.create_backbone("vit_base", depth=1)
    student, _ = d2v_kd.build_student(args, teacher, dict(backbone={}, mean=common.MEAN, std=common.STD))
    assert round(sum(p.numel() for p in student.parameters() if p.requires_grad), -5) == 43_100_000
    weights = torch.load(fairseq, weights_only=True)["model"]

    def parts(name):
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    image = torch.randn(1, 3, 224, 224)
    x = F.conv2d(image, *parts(f"{IMAGE}.local_encoder.proj"), stride=16).flatten(2).mT
    x = x + weights[f"{IMAGE}.fixed_positional_encoder.positions"]
    x = F.layer_norm(torch.cat([weights[f"{IMAGE}.extra_tokens"], x], 1), (768,), *parts(f"{IMAGE}.context_encoder.norm"), 1e-6)
    expected = []
    for name in FAIRSEQ_BLOCKS[:6]:  # post-norm
        q, k, v = F.linear(x, *parts(f"{name}.attn.qkv")).unflatten(2, (3, 12, 64)).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = F.layer_norm(x + F.linear(mixed, *parts(f"{name}.attn.proj")), (768,), *parts(f"{name}.norm1"), 1e-6)
        hidden = F.gelu(F.linear(x, *parts(f"{name}.mlp.fc1")))
        x = F.layer_norm(x + F.linear(hidden, *parts(f"{name}.mlp.fc2")), (768,), *parts(f"{name}.norm2"), 1e-6)
        expected.append(x)
    with torch.no_grad():
        assert_close(student.backbone.block_outputs(image), expected, rtol=1e-4, atol=1e-4)


def test_keys_of_other_peoples_files_must_match(unilm, fairseq, tmp_path):
    """One missing, one unknown, one of another shape; and Data2Vec2 with layer_norm_first, told by its settings or by its final norm."""
    beit = common.create_backbone(d2v_kd.BEIT, img_size=None)
    vit = common.vit_base(depth=3, post_norm=True)
    load = {unilm[0]: lambda weights: common.load_weights(beit, d2v_kd.from_unilm(weights), "unilm"),
            fairseq: lambda weights: d2v_kd.load_blocks(vit, d2v_kd.from_fairseq(weights), "first", "fairseq")}
    for path, key, value, says in (
            (unilm[0], "blocks.3.attn.v_bias", None, "1 keys are missing .blocks.3.attn.v_bias."),
            (unilm[0], "extra", torch.zeros(1), "1 are unknown .extra."),
            (unilm[0], "blocks.0.gamma_1", torch.zeros(5), "size mismatch for blocks.0.gamma_1"),
            (fairseq, f"{IMAGE}.context_encoder.blocks.1.mlp.fc1.bias", None, "1 keys are missing .blocks.1.mlp.fc1.bias."),
            (fairseq, f"{IMAGE}.alibi_scale", torch.zeros(1), f"1 are unknown .{IMAGE}.alibi_scale."),
            (fairseq, f"{IMAGE}.extra_tokens", torch.zeros(1, 2, 768), "size mismatch for cls_token")):
        weights = torch.load(path, weights_only=True, mmap=True)["model"] | {key: value}
        with pytest.raises(common.InputError, match=says):
            load[path]({name: x for name, x in weights.items() if x is not None})
    tokens = {f"{IMAGE}.extra_tokens": torch.ones(1, 1, 768)}
    for content in ({"cfg": {"model": {"layer_norm_first": True}}, "model": tokens}, {"model": {**tokens, "norm.weight": torch.ones(768)}}):
        torch.save(content, tmp_path / "prenorm.pt")
        with pytest.raises(common.InputError, match="prenorm.pt was made with layer_norm_first"):
            d2v_kd.read_fairseq(tmp_path / "prenorm.pt")


# ------------------------------------------------------------------------------------------------------------ student


@pytest.mark.parametrize("arch, which, depth, chosen", [
    ("vit_nano", "first", 2, [0, 1]), ("vit_nano", "first", 4, [0, 1, 2, 3]), ("vit_nano", "spaced", 2, [0, 3]),
    ("vit_nano", "spaced", 3, [0, 2, 3]), ("vit_tiny", "spaced", 6, [0, 2, 4, 7, 9, 11])])  # the last: DistilBERT's
def test_blocks_that_the_student_starts_from(arch, which, depth, chosen):
    """--init teacher: its embedding, and its first or evenly spaced blocks, in storage of its own."""
    flags = ["--teacher_arch", arch, "--arch", arch, "--depth", depth, "--init_blocks", which]
    student, _, teacher = built(*flags, "--student", "prenorm", "--init", "teacher")
    ours, theirs = student.backbone, teacher.backbone
    for i, l in enumerate(chosen):
        assert same(dict(ours.blocks[i].state_dict()), dict(theirs.blocks[l].state_dict()))
    for name in ("cls_token", "pos_embed"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert not {p.data_ptr() for p in ours.parameters()} & {p.data_ptr() for p in theirs.parameters()}
    if len(theirs.blocks) == depth:  # the whole teacher: it predicts itself
        x = torch.randn(2, 3, 16, 16)
        assert d2v_kd.kd_loss(student(x), teacher(x)) < 1e-10


def test_moco_v3s_vit_small_has_12_heads(tmp_path):
    weights = common.vit_small(img_size=16, patch_size=4, depth=2, num_heads=12, pos_embed="sincos").state_dict()
    torch.save({**weights, "pos_embed": weights["pos_embed"].roll(192, 2)}, tmp_path / "moco.pth")
    flags = ["--arch", "vit_small", "--student", "prenorm", "--depth", 2, "--proj", "--init", tmp_path / "moco.pth"]
    student, meta, _ = built(*flags)
    assert student.backbone.blocks[0].attn.num_heads == meta["backbone"]["num_heads"] == 12


@pytest.mark.parametrize("flags", [[], ["--student", "prenorm"], ["--arch", "vit_tiny", "--depth", 2, "--proj"]])
def test_what_learns(flags):
    """All but the fixed positions and the final norm, which Eq. 6 does not see; --proj maps every state of a student of another
    width; the validation loss is Eq. 6 of each image."""
    student, meta, teacher = built(*flags)
    assert len(student.backbone.blocks) == 2 and meta["backbone"]["post_norm"] == ("prenorm" not in flags)
    x = torch.randn(5, 3, 16, 16)
    states = student.backbone.block_outputs(x)
    if "--proj" in flags:
        states = [F.linear(h, student.proj.weight, student.proj.bias) for h in states]
    assert_close(student(x), d2v_kd.contextualized_target(states))
    loss = d2v_kd.kd_loss(student(x), teacher(x))
    loss.backward()
    for name, parameter in student.named_parameters():
        still = name in ("backbone.pos_embed", "backbone.norm.weight", "backbone.norm.bias")
        assert parameter.requires_grad != still and (parameter.grad is None) == still, name
    assert all(parameter.grad is None for parameter in teacher.parameters())
    each = d2v_kd.ImageLoss([student, teacher])(x)
    assert_close(each[2], d2v_kd.kd_loss(student(x[2:3]), teacher(x[2:3]))[None])
    assert_close(each.mean(), loss)


# ------------------------------------------------------------------------------------------------------ P1, P2, P4, P7


def gradients(number):
    """Loss and gradients of a step of each kind on 16 digits, from whichever share this process has; the last learns labels."""
    results = []
    for flags in (["--student", "postnorm"], ["--student", "prenorm", "--arch", "vit_tiny", "--proj"], []):
        network, _, teacher = built(*flags)
        if not flags:
            network = nn.Sequential(network.backbone, nn.Linear(96, 10)).requires_grad_(True)
        model = common.distributed(network)
        data, _ = common.load_data("digits")
        (_, (x,), index), = common.ViewLoader(data, [common.View(16)], 16, 0, "cpu").steps(3, 4)
        pred = model(x)
        loss = d2v_kd.kd_loss(pred, teacher(x)) if flags else F.cross_entropy(pred, data.labels[index])
        loss.backward()
        found = {name: p.grad.flatten() for name, p in network.named_parameters() if p.grad is not None}
        results.append([common.mean_over_processes(loss.detach()), list(found), torch.cat(list(found.values()))])
    return results


def test_world_size_does_not_matter(in_processes):
    """P1: two processes with 8 images each = one with 16: loss and gradients; also of a teacher that learns labels."""
    alone = gradients(0)
    for shared in in_processes(2, gradients):
        for (loss, names, vector), (other_loss, other_names, other) in zip(alone, shared, strict=True):
            assert_close(other_loss, loss, rtol=1e-5, atol=0)
            assert len(names) > 20 and other_names == names
            assert (other - vector).norm() / vector.norm() < 1e-5


def test_the_teacher_that_is_trained_here_resumes_too(tmp_path, monkeypatch):
    """P2: a signal in the teacher's training: --resume goes on there, then to the student, and all is as without a break."""
    flags = ["--batch_size", 359, "--teacher_epochs", 2, "--max_steps", 2, "--patch_size", 8]
    whole = train(tmp_path / "whole", *flags)
    teacher = torch.load(tmp_path / "whole" / "teacher" / "checkpoint.pth", weights_only=True)
    assert teacher["step"] == 8 and teacher["meta"]["network"] == "teacher"
    end_step = common.Run.end_step

    def interrupted(self, step, *rest, **values):
        if step == 4:
            common.signals.append(signal.SIGTERM)
        end_step(self, step, *rest, **values)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "end_step", interrupted)
        with pytest.raises(SystemExit) as stopped:
            train(tmp_path / "parts", *flags)
    common.signals.clear()
    assert stopped.value.code == 128 + signal.SIGTERM and not (tmp_path / "parts" / "checkpoint.pth").exists()
    parts = train(tmp_path / "parts", *flags, "--resume")
    assert same(whole["student"], parts["student"]) and same(whole["optimizer"], parts["optimizer"])
    again = torch.load(tmp_path / "parts" / "teacher" / "checkpoint.pth", weights_only=True)
    assert same(teacher["teacher"], again["teacher"])
    # the folder may be moved, and a finished teacher is taken as it is
    moved = shutil.move(tmp_path / "parts", tmp_path / "moved") / "teacher" / "checkpoint.pth"
    changed = moved.stat().st_mtime_ns
    assert train(tmp_path / "moved", *flags, "--resume", "--max_steps", 3)["step"] == 3
    assert moved.stat().st_mtime_ns == changed


@pytest.mark.parametrize("flags", ["", "--teacher_arch timm/vit_tiny_patch16_224 --arch vit_tiny --img_size 32 --patch_size 16"])
def test_teacher_is_untouched(flags, teacher, tmp_path, monkeypatch):
    """P4: bit-identical after training, in evaluation mode, no gradient asked for; so is its file."""
    made = []

    class Kept(d2v_kd.Contextualized):
        def __init__(self, backbone, proj=None):
            super().__init__(backbone, proj)
            made.append((self, copy.deepcopy(dict(self.state_dict()))))

    monkeypatch.setattr(d2v_kd, "Contextualized", Kept)
    init = common.TimmBackbone.__init__
    monkeypatch.setattr(common.TimmBackbone, "__init__", lambda self, name, size, pretrained: init(self, name, size, False))
    before = teacher.read_bytes()
    train(tmp_path, *(flags.split() or ["--teacher", teacher]), "--max_steps", 3, "--lr", 0.1)
    (student, start), (frozen, weights) = made
    assert same(dict(frozen.state_dict()), weights) and not same(dict(student.state_dict()), start)
    assert not any(module.training for module in frozen.backbone.modules()) and student.training
    assert not any(p.requires_grad or p.grad is not None for p in frozen.parameters())
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in frozen.parameters()}
    assert teacher.read_bytes() == before


def test_bad_input_gets_one_line(tmp_path, capsys, image_folder, teacher):
    """P7: what is wrong and what to do, exit code 2; test_promises.py and test_ibot_rkd.py have what is the same for every script."""
    run = tmp_path / "run"

    def check(says, *flags):
        assert_one_line_error(finished(capsys, lambda: train(run, *flags)), says)

    def saved(backbone):
        torch.save(getattr(backbone, "model", backbone).state_dict(), tmp_path / "file.pth")
        return tmp_path / "file.pth"

    # found before a teacher is trained: a student that cannot be made, files that are not there or no checkpoints
    (tmp_path / "words.pth").write_text("not a checkpoint")
    check("--arch resnet18 is no student.*vit_small", "--arch", "resnet18")
    check("no file ''", "--teacher", "")
    check("no file .*none.pth", "--teacher", tmp_path / "none.pth")
    for flag in ("--init", "--teacher"):
        check("not a PyTorch checkpoint", flag, tmp_path / "words.pth")
    check("no model 'no_such_model'", "--teacher_arch", "timm/no_such_model")
    check("argument --teacher_epochs: 0 is not a number", "--teacher_epochs", 0)
    check("--teacher_arch vit_small without weights teaches nothing", "--teacher_arch", "vit_small")
    check("the teacher has prenorm blocks.*--student prenorm", "--init", "teacher")
    check("4 blocks, fewer than --depth 5", "--student", "prenorm", "--init", "teacher", "--depth", 5)
    assert not run.exists()

    # teachers of other people that do not fit
    other = ["--img_size", 224, "--patch_size", 16, "--teacher_arch"]
    for name in "resnet18 timm/resnet18 timm/cait_xxs24_224 timm/deit_tiny_distilled_patch16_224 timm/vit_medium_patch16_gap_256".split():
        path = saved(common.create_backbone(name, 256 if "gap" in name else 224))
        check(f"{name} has no tokens to learn from", "--teacher", path, *other, name)
    name = "timm/vit_tiny_patch16_224"
    path = saved(common.create_backbone(name, 224))
    check("the student makes 785 tokens and the teacher 197.*--patch_size", "--teacher", path, *other, name, "--patch_size", 8)
    bare = common.vit_nano(img_size=16, patch_size=4)
    check("does not say which architecture.*--teacher_arch", "--teacher", saved(bare))
    check("does not fit this architecture", "--teacher", saved(bare), "--teacher_arch", "vit_tiny")

    # students that do not fit a teacher of ours
    ours = ["--teacher", teacher]
    check("has --patch_size 4, not --patch_size 8", *ours, "--patch_size", 8)
    check("student is 192 wide and the teacher 96.*--proj", *ours, "--arch", "vit_tiny")
    check("the teacher has prenorm blocks.*--student prenorm", *ours, "--init", "teacher")
    check("4 blocks, fewer than --depth 5", *ours, "--student", "prenorm", "--init", "teacher", "--depth", 5)

    # images: without labels, too few
    flat = shutil.copytree(image_folder / "train" / "cat", tmp_path / "flat")
    check("no labels to train a teacher by.*--teacher", "--data", flat, "--batch_size", 4)
    (tmp_path / "one").mkdir()
    shutil.copy(flat / "0.jpg", tmp_path / "one")
    check("one has one image, and that is to test with", "--data", tmp_path / "one")
    assert not (run / "checkpoint.pth").exists()


# ------------------------------------------------------------------------- P8, P10, and the paper's numbers


@pytest.mark.parametrize("kind", ["postnorm", "prenorm"])
def test_a_students_checkpoint(kind, teacher, tmp_path):
    """P8, P10: it is what it was, also as --init of another run; timm's ViT takes it strictly, with equal outputs and states.
    (Evaluations of a student are commands of the README, which test_readme.py runs.)"""
    flags = ["--teacher", teacher, "--student", kind, "--proj"]
    path = tmp_path / "run" / "checkpoint.pth"
    checkpoint = train(tmp_path / "run", *flags, "--max_steps", 2)
    backbone, meta = common.load_backbone(path)
    assert meta["method"] == "d2v_kd" and meta["network"] == "student" and meta["backbone"]["depth"] == 2
    weights = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    again = train(tmp_path / "again", *flags, "--max_steps", 1, "--lr", 0, "--init", path)
    for student in (checkpoint["student"], again["student"]):
        assert same({name: value for name, value in student.items() if name.startswith("backbone.")}, weights)
    if kind == "prenorm":
        theirs = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=2, embed_dim=96, num_classes=0).eval()
        theirs.load_state_dict(torch.load(tmp_path / "run" / "backbone.pth", weights_only=True), strict=True)
        x = torch.randn(2, 3, 16, 16)
        assert_close(backbone(x), theirs(x), rtol=1e-4, atol=1e-5)
        states = theirs.forward_intermediates(x, norm=False, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True)
        states = [torch.cat([prefix, patches], 1) for patches, prefix in states]
        assert_close(backbone.block_outputs(x), states, rtol=1e-4, atol=1e-5)

def test_layer_decay_of_the_paper():
    """Table 1: the rates of a six-block post-norm student with a base rate of 1e-3 and a decay of 0.81."""
    backbone = common.vit_nano(img_size=16, patch_size=4, depth=6, post_norm=True, pos_embed="sincos")
    network = eval_linear.Classifier(backbone, "mean", 10, False)
    scales = {q: group["lr_scale"] for group in eval_linear.layer_decay_groups(network, 0.01, 0.81) for q in group["params"]}
    rates = {name: float(f"{1e-3 * scales[q]:.1e}") for name, q in network.named_parameters() if q.requires_grad}
    table = [2.3e-4, 2.8e-4, 3.5e-4, 4.3e-4, 5.3e-4, 6.6e-4, 8.1e-4, 1e-3]
    assert sorted(set(rates.values())) == table
    assert rates["backbone.norm_pre.weight"] == rates["backbone.patch_embed.proj.weight"] == table[0]
    assert rates["backbone.blocks.0.norm2.weight"] == table[1] and rates["head.weight"] == table[-1]


def test_recipes_follow_the_paper():
    paper = d2v_kd.RECIPES["imagenet"]
    named = dict(epochs=10, batch_size=256, lr=5e-4, weight_decay=0.01, warmup_epochs=1, views=dict(scale=(0.08, 1.0)),
                 arch="vit_base", img_size=224, patch_size=16)
    assert named.items() <= paper.items()
    small = [recipe.keys() for name, recipe in d2v_kd.RECIPES.items() if name != "imagenet"]
    assert all(keys == small[0] for keys in small) and paper.keys() - {"teacher_arch"} < small[0]


def test_validation_images_of_a_folder_without_any(image_folder, teacher, tmp_path):
    """Every tenth image of a flat folder is left for the validation loss."""
    flags = ["--data", image_folder / "train" / "cat", "--teacher", teacher, "--batch_size", 10, "--max_steps", 1]
    assert train(tmp_path, *flags)["data"].startswith("10 images")  # of 12
    assert [record["step"] for record in read_log(tmp_path) if "loss_val" in record] == [0, 1]


def test_distillation_learns(teacher, tmp_path):
    """44 steps with the paper's AdamW from a random teacher: the validation loss falls from chance to well below."""
    matrices, others = train(tmp_path, "--teacher", teacher, "--epochs", 1, "--lr", 1e-2)["optimizer"]["param_groups"]
    assert matrices["betas"] == (0.9, 0.98) and matrices["eps"] == 1e-6
    assert matrices["weight_decay"] == 0.01 and others["weight_decay"] == 0
    assert max(record.get("lr", 0) for record in read_log(tmp_path)) == pytest.approx(1e-2 * 32 / 256)
    losses = [record["loss_val"] for record in read_log(tmp_path) if "loss_val" in record]
    assert losses[0] > 1.6 and losses[-1] < 0.8


@pytest.mark.slow
def test_one_step_at_real_size(unilm, fairseq, image_folder, tmp_path, capsys):
    """224 pixels, BEiTv2 base in unilm's form, six blocks of Data2Vec2 in fairseq's: one step, and the paper's counts."""
    train(tmp_path, "--data", image_folder, "--arch", "vit_base", "--img_size", 224, "--patch_size", 16, "--batch_size", 2,
          "--teacher", unilm[0], "--init", fairseq, "--max_steps", 1)
    assert "43.1 M trainable parameters, teacher 85.8 M frozen" in capsys.readouterr().out
