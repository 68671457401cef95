"""d2v_kd.py: Eqs. 1-6 against loops, other people's checkpoints by their real keys and shapes, the promises P1-P10."""
import copy
import shutil
import signal
import sys

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import assert_one_line_error, finished, leaf, read_log, same

import common
import d2v_kd

TINY = ["--batch_size", "32", "--log_every", "1", "--knn_every", "0", "--num_workers", "0", "--epochs", "2", "--warmup_epochs", "0.1"]


@pytest.fixture(autouse=True)
def bare_runs(monkeypatch):
    """Runs in this process draw no curves and check no k-NN, which take longer than their few steps; the subprocesses do."""
    monkeypatch.setattr(common.Run, "draw_curves", lambda self: None)
    monkeypatch.setattr(d2v_kd, "knn_accuracy", lambda *arguments, **options: None)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A checkpoint of this repository: a pre-norm ViT of 4 blocks for digits."""
    torch.manual_seed(7)
    options = dict(arch="vit_nano", img_size=16, patch_size=4)
    backbone = common.create_backbone(**options)
    path = tmp_path_factory.mktemp("teacher") / "checkpoint.pth"
    torch.save({"student": {f"backbone.{k}": v for k, v in backbone.state_dict().items()},
                "meta": dict(method="sdssl", network="student", backbone=options, mean=common.MEAN, std=common.STD)}, path)
    return path


def arguments(folder, *extra):
    return d2v_kd.parse_arguments([*TINY, "--device", "cpu", "--output_dir", str(folder), *map(str, extra)])


def train(folder, *extra):
    """One run in this process -> its checkpoint."""
    d2v_kd.train(arguments(folder, *extra))
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def built(*extra):
    """-> student, teacher, the student's meta."""
    args = arguments("unused", "--teacher_arch", "vit_nano", "--arch", "vit_nano", "--img_size", 16, "--patch_size", 4, *extra)
    torch.manual_seed(0)
    backbone, meta = d2v_kd.load_teacher(args)
    return *d2v_kd.build_student(args, backbone, meta), d2v_kd.Contextualized(backbone)


# ------------------------------------------------------------------------------------------------------------- losses


def naive_target(states, eps=1e-5):
    """Eqs. 1-5, one number at a time."""
    B, T, D = states[0].shape
    images = []
    for b in range(B):
        total = [[0.0] * D for _ in range(T)]
        for h in states:
            for d in range(D):
                mu = sum(h[b, t, d] for t in range(T)) / T
                var = sum((h[b, t, d] - mu) ** 2 for t in range(T)) / T
                for t in range(T):
                    total[t][d] = total[t][d] + (h[b, t, d] - mu) / torch.sqrt(var + eps)
        tokens = []
        for t in range(T):
            token = [value / len(states) for value in total[t]]
            mu = sum(token) / D
            var = sum((value - mu) ** 2 for value in token) / D
            tokens.append(torch.stack([(value - mu) / torch.sqrt(var + eps) for value in token]))
        images.append(torch.stack(tokens))
    return torch.stack(images)


def naive_loss(pred, target):
    """Eq. 6: for an image, the patches' mean squared errors and that of [CLS], over N + 1; mean over images."""
    B, T, D = pred.shape
    images = []
    for b in range(B):
        errors = [sum((pred[b, t, d] - target[b, t, d]) ** 2 for d in range(D)) / D for t in range(T)]
        images.append((sum(errors[1:]) + errors[0]) / T)
    return sum(images) / B


def test_target_and_loss_equal_naive_loops():
    """Value and gradient, on both sides, with unlike numbers of layers."""
    student = [leaf(2, 4, 5, seed=i) for i in range(2)]
    teacher = [leaf(2, 4, 5, seed=10 + i) for i in range(3)]
    pairs = [(d2v_kd.contextualized_target(s), naive_target(s)) for s in (student, teacher)]
    for ours, naive in pairs:
        torch.testing.assert_close(ours, naive, rtol=1e-10, atol=1e-12)
    ours, naive = d2v_kd.kd_loss(pairs[0][0], pairs[1][0]), naive_loss(pairs[0][1], pairs[1][1])
    torch.testing.assert_close(ours, naive, rtol=1e-10, atol=0)
    expected = torch.autograd.grad(naive, student + teacher)
    assert min(g.abs().max() for g in expected) > 1e-3
    torch.testing.assert_close(torch.autograd.grad(ours, student + teacher), expected, rtol=1e-8, atol=1e-12)


def test_target_closed_forms():
    h = [leaf(3, 6, 8, seed=i).detach() for i in range(4)]
    before = copy.deepcopy(h)
    y = d2v_kd.contextualized_target(h)
    assert same(h, before)  # inputs unmodified
    torch.testing.assert_close(y.mean(-1), torch.zeros(3, 6, dtype=y.dtype), atol=1e-12, rtol=0)
    torch.testing.assert_close(y.pow(2).mean(-1), torch.ones(3, 6, dtype=y.dtype), atol=1e-3, rtol=0)
    # a layer's scale and offset per dim are taken away; so are copies of every layer
    scale, offset = 1 + torch.rand(8, dtype=y.dtype) * 9, torch.randn(8, dtype=y.dtype)
    torch.testing.assert_close(d2v_kd.contextualized_target([h[0] * scale + offset, *h[1:]]), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(d2v_kd.contextualized_target(h + h), y)
    # images do not see each other, the order of the layers does not count, and the order of the tokens stays
    torch.testing.assert_close(d2v_kd.contextualized_target([x[1:2] for x in h])[0], y[1])
    torch.testing.assert_close(d2v_kd.contextualized_target(h[::-1]), y)
    order = torch.randperm(6)
    torch.testing.assert_close(d2v_kd.contextualized_target([x[:, order] for x in h]), y[:, order])


def test_loss_is_two_minus_two_correlations():
    """0 for the same, about 4 for the opposite, near 2 (chance) for independent states; [CLS] counts as one token of T."""
    a = d2v_kd.contextualized_target([leaf(4, 9, 64).detach()])
    b = d2v_kd.contextualized_target([leaf(4, 9, 64, seed=1).detach()])
    assert d2v_kd.kd_loss(a, a) == 0 and d2v_kd.kd_loss(a, -a) == pytest.approx(4, abs=1e-3)
    assert d2v_kd.kd_loss(a, b) == pytest.approx(2, abs=0.1)
    correlation = torch.stack([torch.corrcoef(torch.stack([x, y]))[0, 1] for x, y in zip(a.flatten(0, 1), b.flatten(0, 1))]).mean()
    assert d2v_kd.kd_loss(a, b) == pytest.approx(2 - 2 * correlation.item(), abs=1e-3)
    other = a.clone()
    other[:, 0] = b[:, 0]
    torch.testing.assert_close(d2v_kd.kd_loss(other, a), (b[:, 0] - a[:, 0]).pow(2).mean() / 9)


def test_constant_states_stay_finite():
    """Tokens that are all alike, or dims that are: no division by zero, forwards or backwards."""
    h = torch.ones(2, 5, 4, requires_grad=True)
    y = d2v_kd.contextualized_target([h, h])
    d2v_kd.kd_loss(y, torch.randn(2, 5, 4)).backward()
    assert (y == 0).all() and h.grad.isfinite().all()
    h = 1e4 + 1e-3 * torch.randn(2, 5, 4)
    assert d2v_kd.contextualized_target([h]).isfinite().all()


def test_norms_and_loss_run_in_fp32_under_autocast():
    h = [5 + 3 * torch.randn(2, 7, 16) for _ in range(3)]
    half = [x.bfloat16() for x in h]
    with torch.autocast("cpu", torch.bfloat16):
        y = d2v_kd.contextualized_target(half)
        loss = d2v_kd.kd_loss(y.bfloat16(), torch.zeros_like(y).bfloat16())
    assert y.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(y, d2v_kd.contextualized_target([x.float() for x in half]), rtol=0, atol=0)
    torch.testing.assert_close(loss, y.bfloat16().float().pow(2).mean())
    assert d2v_kd.kd_loss(half[0], half[1]).dtype == torch.float32


# -------------------------------------------------------------------------------------------------- models and files


def blocks_one_by_one(model, x):
    """The outputs of a timm ViT's blocks, from its parts."""
    x = model.patch_embed(x).reshape(len(x), -1, model.embed_dim)
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1)
    x = x if model.pos_embed is None else x + model.pos_embed
    outputs = []
    for block in model.blocks:
        x = block(x)
        outputs.append(x)
    return outputs


@pytest.mark.parametrize("name", ["beitv2_base_patch16_224", "vit_tiny_patch16_224"])
def test_hidden_states_of_timm_are_the_blocks_outputs(name):
    """Every block, [CLS] first, no final norm."""
    torch.manual_seed(0)
    backbone = common.create_backbone(f"timm/{name}", img_size=48).eval()
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.05)
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        ours, theirs = backbone.block_outputs(x), blocks_one_by_one(backbone.model, x)
    assert len(ours) == 12 and ours[0].shape == (2, 10, backbone.embed_dim)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("post_norm", [True, False])
def test_hidden_states_of_ours_are_the_blocks_outputs(post_norm):
    backbone = common.vit_nano(img_size=16, patch_size=4, post_norm=post_norm)
    x = torch.randn(2, 3, 16, 16)
    y, outputs = backbone.embed(x), []
    for block in backbone.blocks:
        a = block.attn(y if post_norm else block.norm1(y))
        y = block.norm1(y + a) if post_norm else y + a
        m = block.mlp(y if post_norm else block.norm2(y))
        y = block.norm2(y + m) if post_norm else y + m
        outputs.append(y)
    torch.testing.assert_close(backbone.block_outputs(x), outputs)


def random_weights(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(*shape, generator=generator) * 0.05 for key, shape in shapes.items()}


def layer(name, out, inside):
    return {f"{name}.weight": (out, inside), f"{name}.bias": (out,)}


def norm(name, width=768):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def unilm_shapes():
    """beitv2_base_patch16_224_pt1k.pth: BEiTv2's pretraining model, with the two layers that train [CLS]."""
    shapes = {"cls_token": (1, 1, 768), "mask_token": (1, 1, 768), "patch_embed.proj.weight": (768, 3, 16, 16),
              "patch_embed.proj.bias": (768,), "rel_pos_bias.relative_position_bias_table": (732, 12),
              **norm("norm"), **layer("lm_head", 8192, 768)}
    for block in [*(f"blocks.{i}" for i in range(12)), *(f"cls_pt_layers.{i}" for i in range(2))]:
        shapes |= {f"{block}.gamma_1": (768,), f"{block}.gamma_2": (768,), **norm(f"{block}.norm1"), **norm(f"{block}.norm2"),
                   f"{block}.attn.q_bias": (768,), f"{block}.attn.v_bias": (768,), f"{block}.attn.qkv.weight": (2304, 768),
                   **layer(f"{block}.attn.proj", 768, 768), **layer(f"{block}.mlp.fc1", 3072, 768),
                   **layer(f"{block}.mlp.fc2", 768, 3072)}
    return shapes


def fairseq_shapes(prenet=2, depth=10):
    """base_imagenet.pt: Data2Vec2's image model, two blocks of which sit in the context encoder, and its decoder."""
    image = "modality_encoders.IMAGE"
    shapes = {f"{image}.extra_tokens": (1, 1, 768), f"{image}.local_encoder.proj.weight": (768, 3, 16, 16),
              f"{image}.local_encoder.proj.bias": (768,), f"{image}.fixed_positional_encoder.positions": (1, 196, 768),
              **norm(f"{image}.context_encoder.norm"), **layer(f"{image}.decoder.proj", 768, 768)}
    for i in range(6):
        shapes |= {f"{image}.decoder.blocks.{i}.0.weight": (768, 48, 3, 3), f"{image}.decoder.blocks.{i}.0.bias": (768,)}
    for block in [*(f"{image}.context_encoder.blocks.{i}" for i in range(prenet)), *(f"blocks.{i}" for i in range(depth))]:
        shapes |= {**norm(f"{block}.norm1"), **norm(f"{block}.norm2"), **layer(f"{block}.attn.qkv", 2304, 768),
                   **layer(f"{block}.attn.proj", 768, 768), **layer(f"{block}.mlp.fc1", 3072, 768), **layer(f"{block}.mlp.fc2", 768, 3072)}
    return shapes


@pytest.fixture(scope="module")
def unilm(tmp_path_factory):
    weights = random_weights(unilm_shapes())
    weights["rel_pos_bias.relative_position_index"] = torch.zeros(197, 197, dtype=torch.long)  # a buffer there
    path = tmp_path_factory.mktemp("unilm") / "beitv2_base_patch16_224_pt1k.pth"
    torch.save({"model": weights}, path)
    yield path
    path.unlink()  # 400 MB


@pytest.fixture(scope="module")
def fairseq(tmp_path_factory):
    weights = random_weights(fairseq_shapes(), seed=1)
    weights["_ema"] = {"blocks.0.norm1.weight": torch.zeros(768)}
    path = tmp_path_factory.mktemp("fairseq") / "base_imagenet.pt"
    torch.save({"model": weights, "cfg": {"model": {"depth": 10}}, "args": None}, path)
    yield path
    path.unlink()


def test_unilm_file_is_the_shared_bias_model(unilm):
    """No key is left over on either side, and the hidden states are those of timm's BEiT with one shared table."""
    import timm

    args = arguments("unused", "--teacher", unilm, "--img_size", 224, "--patch_size", 16)
    teacher, meta = d2v_kd.load_teacher(args)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert meta["mean"] == common.MEAN and meta["std"] == common.STD
    assert round(sum(p.numel() for p in teacher.parameters()) / 1e6, 1) == 85.8
    theirs = timm.create_model("beitv2_base_patch16_224", num_classes=0, global_pool="token", use_rel_pos_bias=False,
                               use_shared_rel_pos_bias=True).eval()
    kept = {key: value for key, value in torch.load(unilm, weights_only=True)["model"].items()
            if not key.startswith(("mask_token", "lm_head", "cls_pt_layers")) and "position_index" not in key}
    theirs.load_state_dict(kept, strict=True)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        states = teacher.block_outputs(x)
        expected = theirs.forward_intermediates(x, norm=False, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True)
        torch.testing.assert_close(teacher.model.fc_norm(states[-1]), theirs.norm(states[-1]))
    torch.testing.assert_close(states, [torch.cat([prefix, patches], 1) for patches, prefix in expected])


def test_timm_and_finetuned_unilm_files_load(tmp_path):
    """The other form: a table in each block, with or without unilm's indices and head; --teacher_arch is not needed."""
    backbone = common.create_backbone(d2v_kd.BEIT, 32)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.05)
    weights = backbone.model.state_dict()
    native = {k: torch.randn(732, 12) if k.endswith("table") else v for k, v in weights.items()}
    theirs = native | {"blocks.0.attn.relative_position_index": torch.zeros(197, 197), "head.weight": torch.zeros(1000, 768)}
    torch.save({"model": theirs}, tmp_path / "file.pth")
    teacher, _ = d2v_kd.load_teacher(arguments("unused", "--teacher", tmp_path / "file.pth", "--img_size", 224))
    assert teacher.model.state_dict().keys() == weights.keys() and same(dict(teacher.model.state_dict()), native)


def test_unilm_keys_must_match(unilm, monkeypatch):
    weights = torch.load(unilm, weights_only=True)["model"]
    backbone = common.create_backbone(d2v_kd.BEIT, img_size=None)
    monkeypatch.setattr(d2v_kd, "create_backbone", lambda *arguments, **options: backbone)
    for key, value, says in (("blocks.3.attn.v_bias", None, "1 keys are missing .blocks.3.attn.v_bias."),
                             ("extra", torch.zeros(1), "1 are unknown .extra."),
                             ("blocks.0.gamma_1", torch.zeros(5), "size mismatch for blocks.0.gamma_1")):
        changed = {name: x for name, x in {**weights, key: value}.items() if x is not None}
        monkeypatch.setattr(d2v_kd, "read_checkpoint", lambda path, changed=changed: {"model": changed})
        with pytest.raises(common.InputError, match=says):
            d2v_kd.load_teacher(arguments("unused", "--teacher", unilm, "--img_size", 224))


def data2vec2(weights, x, blocks):
    """Data2Vec2's own order: project, positions, token in front, norm, then post-norm blocks, the context encoder's first."""
    image = "modality_encoders.IMAGE"
    w = weights

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def layer_norm(name, x):
        return F.layer_norm(x, (768,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    x = F.conv2d(x, w[f"{image}.local_encoder.proj.weight"], w[f"{image}.local_encoder.proj.bias"], stride=16).flatten(2).transpose(1, 2)
    x = x + w[f"{image}.fixed_positional_encoder.positions"]
    x = layer_norm(f"{image}.context_encoder.norm", torch.cat([w[f"{image}.extra_tokens"].expand(len(x), -1, -1), x], 1))
    outputs = []
    for name in [f"{image}.context_encoder.blocks.0", f"{image}.context_encoder.blocks.1", *(f"blocks.{i}" for i in range(10))][:blocks]:
        B, T, _ = x.shape
        q, k, v = linear(f"{name}.attn.qkv", x).view(B, T, 3, 12, 64).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) / 8).softmax(-1)
        x = layer_norm(f"{name}.norm1", x + linear(f"{name}.attn.proj", (attention @ v).transpose(1, 2).reshape(B, T, 768)))
        x = layer_norm(f"{name}.norm2", x + linear(f"{name}.mlp.fc2", F.gelu(linear(f"{name}.mlp.fc1", x))))
        outputs.append(x)
    return outputs


def test_fairseq_file_is_data2vec2(fairseq):
    """The first six blocks in the order of the data; no key is left over; 43.1 M parameters learn."""
    args = arguments("unused", "--arch", "vit_base", "--img_size", 224, "--patch_size", 16, "--depth", 6, "--init", fairseq)
    teacher = common.create_backbone("vit_base", depth=1)
    student, meta = d2v_kd.build_student(args, teacher, dict(backbone={}, mean=common.MEAN, std=common.STD))
    assert round(sum(p.numel() for p in student.parameters() if p.requires_grad) / 1e6, 1) == 43.1
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        ours = student.backbone.block_outputs(x)
        theirs = data2vec2(torch.load(fairseq, weights_only=True)["model"], x, 6)
    assert len(ours) == 6
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change,says", [
    (lambda w: w.pop("modality_encoders.IMAGE.context_encoder.blocks.1.mlp.fc1.bias"), "1 keys are missing .blocks.1.mlp.fc1.bias."),
    (lambda w: w.update({"modality_encoders.IMAGE.alibi_scale": torch.zeros(1)}), "1 are unknown .modality_encoders.IMAGE.alibi_scale."),
    (lambda w: w.update({"modality_encoders.IMAGE.extra_tokens": torch.zeros(1, 2, 768)}), r"size mismatch for cls_token")])
def test_fairseq_keys_must_match(change, says, fairseq):
    weights = torch.load(fairseq, weights_only=True)["model"]
    change(weights)
    with pytest.raises(common.InputError, match=says):
        d2v_kd.load_blocks(common.vit_base(depth=3, post_norm=True), d2v_kd.from_fairseq(weights), "first", "base_imagenet.pt")


@pytest.mark.parametrize("which,depth,chosen", [("first", 2, [0, 1]), ("spaced", 2, [0, 3]), ("spaced", 3, [0, 2, 3]), ("first", 4, [0, 1, 2, 3])])
def test_blocks_that_the_student_starts_from(which, depth, chosen, teacher):
    """--init teacher: its embedding, and its first or evenly spaced blocks."""
    student, _, t = built("--teacher", teacher, "--student", "prenorm", "--depth", depth, "--init", "teacher", "--init_blocks", which)
    for i, l in enumerate(chosen):
        assert same(dict(student.backbone.blocks[i].state_dict()), dict(t.backbone.blocks[l].state_dict()))
    for name in ("cls_token", "pos_embed"):
        assert torch.equal(getattr(student.backbone, name), getattr(t.backbone, name))
        assert getattr(student.backbone, name).data_ptr() != getattr(t.backbone, name).data_ptr()
    if depth == 4:  # the whole teacher: it predicts itself
        x = torch.randn(2, 3, 16, 16)
        assert d2v_kd.kd_loss(student(x), t(x)) < 1e-10


def test_spaced_blocks_of_twelve(teacher):
    """Six of twelve as in DistilBERT's release: 0 2 4 7 9 11."""
    source = common.vit_nano(img_size=16, patch_size=4, depth=12)
    student = common.vit_nano(img_size=16, patch_size=4, depth=6)
    d2v_kd.load_blocks(student, source.state_dict(), "spaced", "it")
    for i, l in enumerate([0, 2, 4, 7, 9, 11]):
        assert torch.equal(student.blocks[i].mlp.fc1.weight, source.blocks[l].mlp.fc1.weight)


def test_beit_blocks_become_ours():
    """Layer scale and separate biases are folded in exactly: without relative positions the outputs are equal."""
    from timm.models.beit import Beit

    torch.manual_seed(0)
    beit = Beit(img_size=16, patch_size=4, num_classes=0, embed_dim=96, depth=3, num_heads=3, init_values=0.1, use_abs_pos_emb=False,
                use_rel_pos_bias=True).eval()
    for name, parameter in beit.named_parameters():
        if "bias_table" not in name:
            nn.init.normal_(parameter, mean=0.1, std=0.1)
    student = common.vit_nano(img_size=16, patch_size=4, depth=3, pos_embed="sincos")
    d2v_kd.load_blocks(student, d2v_kd.from_beit(beit.state_dict()), "first", "the teacher")
    assert (student.pos_embed[:, 1:] != 0).any()  # its own stay
    student.pos_embed.data.zero_()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(student.block_outputs(x), blocks_one_by_one(beit, x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(student.norm(student.block_outputs(x)[-1]), beit.fc_norm(blocks_one_by_one(beit, x)[-1]), rtol=1e-4, atol=1e-4)


def test_proj_bridges_widths(teacher):
    """Unlike widths name --proj; with it every state of the student is mapped, and the map learns."""
    flags = ["--teacher", teacher, "--arch", "vit_tiny", "--depth", 2]
    with pytest.raises(common.InputError, match="student is 192 wide and the teacher 96: pass --proj"):
        built(*flags)
    student, _, t = built(*flags, "--proj")
    x = torch.randn(2, 3, 16, 16)
    states = [F.linear(h, student.proj.weight, student.proj.bias) for h in student.backbone.block_outputs(x)]
    torch.testing.assert_close(student(x), d2v_kd.contextualized_target(states))
    d2v_kd.kd_loss(student(x), t(x)).backward()
    assert student.proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["postnorm", "prenorm"])
def test_what_learns(kind, teacher):
    """All but the mask token, the fixed positions and the final norm, which Eq. 6 does not see."""
    student, meta, t = built("--teacher", teacher, "--student", kind)
    d2v_kd.kd_loss(student(torch.randn(2, 3, 16, 16)), t(torch.randn(2, 3, 16, 16))).backward()
    for name, parameter in student.named_parameters():
        still = name in ("backbone.pos_embed", "backbone.norm.weight", "backbone.norm.bias")
        assert parameter.requires_grad != still and (parameter.grad is None) == still, name
    assert len(student.backbone.blocks) == 2 and meta["backbone"]["post_norm"] == (kind == "postnorm")
    assert all(parameter.grad is None for parameter in t.parameters())


def test_validation_loss_is_the_mean_over_images(teacher):
    student, _, t = built("--teacher", teacher)
    x = torch.randn(5, 3, 16, 16)
    each = d2v_kd.ImageLoss(student, t)(x)
    assert each.shape == (5, 1)
    torch.testing.assert_close(each.mean(), d2v_kd.kd_loss(student(x), t(x)))


# ---------------------------------------------------------------------------------------------- P1: several processes


def step_gradients(number, path, flags):
    """Loss and gradients of one step on a global batch of 16 digits, from whichever share this process has."""
    student, _, teacher = built("--teacher", path, *flags)
    network = student if flags else d2v_kd.Labeller(student.backbone, 10)
    if not flags:
        network.backbone.requires_grad_(True)
    model = common.distributed(network)
    data, _ = common.load_data("digits")
    (_, (x,), index), = common.ViewLoader(data, [common.View(16)], 16, 0, "cpu").steps(3, 4)
    with torch.no_grad():
        target = teacher(x) if flags else data.labels[index]
    pred = model(x)
    loss = d2v_kd.kd_loss(pred, target) if flags else F.cross_entropy(pred, target)
    loss.backward()
    return {"loss": common.mean_over_processes(loss), "gradients": {n: p.grad for n, p in network.named_parameters() if p.grad is not None}}


KINDS = [["--student", "postnorm"], ["--student", "prenorm", "--arch", "vit_tiny", "--proj"], []]  # the last one learns labels


def all_gradients(number, path):
    return [step_gradients(number, path, flags) for flags in KINDS]


def test_world_size_does_not_matter(teacher, in_processes):
    """P1: two processes with 8 images each = one with 16: loss and gradients; also of a teacher that learns labels."""
    together = in_processes(2, all_gradients, teacher)
    for i, alone in enumerate(all_gradients(0, teacher)):
        scale = torch.cat([g.flatten() for g in alone["gradients"].values()]).norm()
        assert len(alone["gradients"]) > 20
        for one in (process[i] for process in together):
            torch.testing.assert_close(one["loss"], alone["loss"], rtol=1e-5, atol=0)
            assert one["gradients"].keys() == alone["gradients"].keys()
            difference = torch.cat([(one["gradients"][n] - g).flatten() for n, g in alone["gradients"].items()]).norm()
            assert difference / scale < 1e-5


# ---------------------------------------------------------------------------------------------- P2, P3: exact repeats


def test_the_teacher_that_is_trained_here_resumes_too(tmp_path, monkeypatch):
    """A signal in the teacher's training: --resume goes on there, then to the student, and all is as without a break."""
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
    changed = (tmp_path / "parts" / "teacher" / "checkpoint.pth").stat().st_mtime_ns
    train(tmp_path / "parts", *flags, "--resume", "--max_steps", 3)  # a finished teacher is taken as it is
    assert (tmp_path / "parts" / "teacher" / "checkpoint.pth").stat().st_mtime_ns == changed


# ------------------------------------------------------------------------------------------------------- P4: teachers


@pytest.mark.parametrize("source", ["ours", "timm"])
def test_teacher_is_untouched(source, teacher, tmp_path, monkeypatch):
    """P4: bit-identical after training, in evaluation mode, no gradient asked for; so is its file."""
    kept = []

    class Kept(d2v_kd.Contextualized):
        def __init__(self, backbone, proj=None):
            super().__init__(backbone, proj)
            kept.append((self, copy.deepcopy(dict(self.state_dict()))))

    monkeypatch.setattr(d2v_kd, "Contextualized", Kept)
    monkeypatch.setattr(common.TimmBackbone, "__init__", lambda self, name, size, pretrained, init=common.TimmBackbone.__init__: init(self, name, size, False))
    flags = ["--teacher", teacher] if source == "ours" else ["--teacher_arch", "timm/vit_tiny_patch16_224", "--arch", "vit_tiny",
                                                             "--img_size", 32, "--patch_size", 16, "--depth", 2]
    before = teacher.read_bytes()
    train(tmp_path, *flags, "--max_steps", 3, "--lr", 0.1)
    (student, start), (frozen, weights) = kept
    assert same(dict(frozen.state_dict()), weights) and not same(dict(student.state_dict()), start)
    assert not any(module.training for module in frozen.backbone.modules()) and student.training
    assert not any(p.requires_grad or p.grad is not None for p in frozen.parameters())
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in frozen.parameters()}
    assert teacher.read_bytes() == before


# ------------------------------------------------------------------------------------------- P5, P6: runs in the wild


def test_a_run_that_was_moved_resumes(tmp_path):
    """With the teacher that it trained: no path of its own making is compared."""
    flags = ["--batch_size", 359, "--teacher_epochs", 1]
    train(tmp_path / "here", *flags, "--max_steps", 1)
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert train(tmp_path / "there", *flags, "--max_steps", 2, "--resume")["step"] == 2


def test_nothing_is_trained_before_what_cannot_work(tmp_path, capsys):
    """A student that cannot be made, and files that are not there, are found before the teacher is trained."""
    for flags, says in ((["--arch", "resnet18"], "resnet18 is no student"), (["--init", tmp_path / "none.pth"], "no file .*none.pth"),
                        (["--init", ""], "no file ''"), (["--teacher", ""], "no file ''")):
        assert_one_line_error(run_in_process(capsys, "--output_dir", tmp_path / "run", *flags), says)
    (tmp_path / "words.pth").write_text("no checkpoint")
    assert_one_line_error(run_in_process(capsys, "--output_dir", tmp_path / "run", "--init", tmp_path / "words.pth"), "not a PyTorch checkpoint")
    assert not (tmp_path / "run").exists()


def test_fairseq_files_with_another_block_are_refused(tmp_path):
    """layer_norm_first has no residual in its block: their settings say so."""
    torch.save({"cfg": {"model": {"layer_norm_first": True}}, "model": {}}, tmp_path / "first.pth")
    with pytest.raises(common.InputError, match="layer_norm_first"):
        d2v_kd.read_fairseq(str(tmp_path / "first.pth"))
    torch.save({"cfg": {"model": {"layer_norm_first": False}}, "model": {"a": torch.ones(1)}}, tmp_path / "last.pth")
    assert d2v_kd.read_fairseq(str(tmp_path / "last.pth"))["a"] == 1


# ------------------------------------------------------------------------------------------------------ P7: bad input


def run_in_process(capsys, *flags):
    """main() as `python d2v_kd.py` calls it -> something like a finished process."""
    return finished(capsys, lambda: d2v_kd.train(d2v_kd.parse_arguments([*TINY, "--device", "cpu", *map(str, flags)])))


def test_bad_input_gets_one_line(tmp_path, capsys, image_folder, teacher):
    """P7: what is wrong and what to do, exit code 2."""

    def check(*flags, says):
        assert_one_line_error(run_in_process(capsys, "--output_dir", tmp_path / "run", *flags), *says)

    ours = ["--teacher", teacher]
    check(*ours, "--data", tmp_path / "nowhere", says=["nowhere is neither a directory nor one of", "digits"])
    (tmp_path / "one").mkdir()
    shutil.copy(next((image_folder / "train" / "cat").iterdir()), tmp_path / "one")
    check(*ours, "--data", tmp_path / "one", says=["one image under .*one is too few"])
    check(*ours, "--data", image_folder, "--batch_size", 100, says=["24 images are fewer than --batch_size 100"])
    check(*ours, "--img_size", 18, says=["18 x 18 .*multiple of patch size 4"])
    check(*ours, "--patch_size", 8, says=["has --patch_size 4, not --patch_size 8"])
    check(*ours, "--arch", "vit_giant", says=["--arch vit_giant is no student", "vit_small"])
    check(*ours, "--arch", "resnet18", says=["--arch resnet18 is no student", "vit_small"])
    check(*ours, "--arch", "vit_tiny", says=["student is 192 wide and the teacher 96", "--proj"])
    check("--teacher", tmp_path / "none.pth", says=["no file"])
    check(*ours, "--init", tmp_path / "none.pth", says=["no file"])
    check(*ours, "--init", "teacher", says=["the teacher has prenorm blocks", "--student prenorm"])
    check(*ours, "--init", "teacher", "--student", "prenorm", "--depth", 5, says=["4 blocks, fewer than the student's 5", "--depth"])
    check("--teacher_arch", "timm/no_such_model", says=["no model 'no_such_model'"])
    check("--teacher_epochs", 0, says=["argument --teacher_epochs: 0 is not a number"])
    for name in ("cait_xxs24_224", "deit_tiny_distilled_patch16_224", "vit_medium_patch16_gap_256"):  # other tokens than [CLS] and patches
        torch.save(timm.create_model(name, num_classes=0).state_dict(), tmp_path / "timm.pth")
        check("--teacher", tmp_path / "timm.pth", "--teacher_arch", f"timm/{name}", "--img_size", 224, "--patch_size", 16,
              says=[f"timm/{name} has no tokens to learn from"])
    torch.save(common.vit_nano(img_size=16, patch_size=4).state_dict(), tmp_path / "bare.pth")
    check("--teacher", tmp_path / "bare.pth", says=["does not say which architecture", "--teacher_arch"])
    check("--teacher", tmp_path / "bare.pth", "--teacher_arch", "vit_tiny", says=["does not fit this architecture"])
    check("--teacher", tmp_path / "bare.pth", "--teacher_arch", "resnet18", says=["does not fit this architecture"])
    (tmp_path / "not.pth").write_text("not a checkpoint")
    check("--teacher", tmp_path / "not.pth", says=["not a PyTorch checkpoint"])
    short = common.vit_nano(img_size=16, patch_size=4).state_dict()
    del short["blocks.0.mlp.fc1.bias"]
    torch.save(short, tmp_path / "short.pth")
    check(*ours, "--student", "prenorm", "--init", tmp_path / "short.pth", says=["1 keys are missing", "blocks.0.mlp.fc1.bias"])
    flat = tmp_path / "flat"
    shutil.copytree(image_folder / "train" / "cat", flat)
    check("--data", flat, "--batch_size", 4, says=["no labels to train a teacher by", "--teacher"])
    photo = (flat / "0.jpg").read_bytes()
    (flat / "5.jpg").write_bytes(photo[: len(photo) // 2])
    check(*ours, "--data", flat, "--batch_size", 10, says=[r"cannot read image \S*flat/5.jpg", "replace or delete"])
    assert not (tmp_path / "run" / "checkpoint.pth").exists()


def test_teachers_without_tokens_and_with_other_grids(tmp_path, monkeypatch):
    torch.save({"student": {}, "meta": {}}, tmp_path / "unused.pth")
    for arch in ("resnet18", "timm/resnet18"):
        monkeypatch.setattr(d2v_kd, "load_backbone", lambda *a: (common.create_backbone(arch, None if "timm" in arch else 32), {"backbone": {}}))
        with pytest.raises(common.InputError, match=f"{arch} has no tokens to learn from"):
            d2v_kd.load_teacher(arguments("unused", "--teacher_arch", arch))
    args = arguments("unused", "--arch", "vit_nano", "--img_size", 16, "--patch_size", 8)
    with pytest.raises(common.InputError, match="the student makes 5 tokens and the teacher 17.*--patch_size"):
        d2v_kd.build_student(args, common.vit_nano(img_size=16, patch_size=4), {"backbone": {}})


# ------------------------------------------------------------------------------------- P8, P10: what is saved and read


def test_prenorm_student_loads_into_timm(teacher, tmp_path):
    """P10: strict, with equal outputs; the checkpoint itself is plain (P8: every load here is weights_only)."""
    import timm

    train(tmp_path, "--teacher", teacher, "--student", "prenorm", "--arch", "vit_tiny", "--depth", 2, "--proj", "--max_steps", 1)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=2, num_classes=0).eval()
    theirs.load_state_dict(torch.load(tmp_path / "backbone.pth", weights_only=True), strict=True)
    ours, _ = common.load_backbone(tmp_path / "checkpoint.pth")
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["postnorm", "prenorm"])
def test_student_starts_again_from_its_checkpoint(kind, teacher, tmp_path):
    """A student's checkpoint is what it was: read back, and as --init of another one."""
    checkpoint = train(tmp_path / "a", "--teacher", teacher, "--student", kind, "--max_steps", 2)
    backbone, meta = common.load_backbone(tmp_path / "a" / "checkpoint.pth")
    assert meta["method"] == "d2v_kd" and meta["network"] == "student" and meta["backbone"]["depth"] == 2
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, checkpoint["student"][f"backbone.{name}"])
    again = train(tmp_path / "b", "--teacher", teacher, "--student", kind, "--max_steps", 1, "--lr", 0, "--init", tmp_path / "a" / "checkpoint.pth")
    assert same(again["student"], checkpoint["student"])


@pytest.mark.parametrize("kind", ["postnorm", "prenorm"])
def test_evaluations_take_the_student(kind, teacher, tmp_path, monkeypatch, capsys):
    """k-NN, a linear probe of mean patch tokens, and fine-tuning (Eq. 7), as the README runs them."""
    import eval_knn
    import eval_linear

    train(tmp_path / "run", "--teacher", teacher, "--student", kind, "--max_steps", 1)

    def evaluate(script, *flags):
        monkeypatch.setattr(sys, "argv", [script.__name__, "--checkpoint", str(tmp_path / "run" / "checkpoint.pth"), *map(str, flags)])
        script.main()
        return capsys.readouterr().out

    assert "vit_nano" in evaluate(eval_knn, "--k", 20)
    evaluate(eval_linear, "--pool", "mean", "--cached", "--epochs", 1, "--output_dir", tmp_path / "probe")
    assert (tmp_path / "probe" / "results.json").exists()
    said = evaluate(eval_linear, "--finetune", "all", "--max_steps", 1, "--num_workers", 0, "--output_dir", tmp_path / "tuned")
    assert "learning rates of the layers" in said
    tuned = torch.load(tmp_path / "tuned" / "checkpoint.pth", weights_only=True)["student"]
    assert any("blocks.1" in name for name in tuned)


def test_layer_decay_of_the_paper():
    """Table 1: the rates of a six-block post-norm student with a base rate of 1e-3 and a decay of 0.81."""
    import eval_linear

    network = eval_linear.Classifier(common.vit_nano(img_size=16, patch_size=4, depth=6, post_norm=True, pos_embed="sincos"), "mean", 10, False)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    rates = {}
    for group in eval_linear.layer_decay_groups(network, 0.01, 0.81):
        for parameter in group["params"]:
            rates[names[id(parameter)]] = float(f"{1e-3 * group['lr_scale']:.1e}")
    table = [2.3e-4, 2.8e-4, 3.5e-4, 4.3e-4, 5.3e-4, 6.6e-4, 8.1e-4, 1e-3]
    assert sorted(set(rates.values())) == table
    assert rates["backbone.norm_pre.weight"] == rates["backbone.patch_embed.proj.weight"] == table[0]
    assert rates["backbone.blocks.0.norm2.weight"] == table[1] and rates["head.weight"] == table[-1]


# -------------------------------------------------------------------------------------------------- flags and recipes


def test_recipes_follow_the_paper():
    paper = d2v_kd.RECIPES["imagenet"]
    assert (paper["epochs"], paper["batch_size"], paper["lr"], paper["weight_decay"]) == (10, 256, 5e-4, 0.01)
    assert paper["warmup_epochs"] == paper["epochs"] / 10 and paper["views"] == dict(scale=(0.08, 1.0))
    assert (paper["arch"], paper["img_size"], paper["patch_size"]) == ("vit_base", 224, 16)
    small = [recipe.keys() for name, recipe in d2v_kd.RECIPES.items() if name != "imagenet"]
    assert all(keys == small[0] for keys in small) and paper.keys() - {"teacher_arch"} < small[0]


def test_optimiser_follows_the_paper(teacher, tmp_path):
    optimizer = train(tmp_path, "--teacher", teacher, "--max_steps", 1)["optimizer"]
    matrices, others = optimizer["param_groups"]
    assert matrices["betas"] == (0.9, 0.98) and matrices["eps"] == 1e-6
    assert matrices["weight_decay"] == 0.01 and others["weight_decay"] == 0


def test_validation_images_of_a_folder_without_any(image_folder, teacher, tmp_path):
    """Every tenth image of a flat folder is left for the validation loss; k-NN says why it is silent."""
    shutil.copytree(image_folder / "train" / "cat", tmp_path / "flat")
    train(tmp_path / "run", "--data", tmp_path / "flat", "--teacher", teacher, "--batch_size", 10, "--max_steps", 1)  # 12 images: 10 and 2
    assert [record["step"] for record in read_log(tmp_path / "run") if "loss_val" in record] == [0, 1]


def test_distillation_learns(teacher, tmp_path):
    """44 steps from a random teacher: the validation loss falls from chance to well below."""
    train(tmp_path, "--teacher", teacher, "--epochs", 1, "--lr", 1e-2)
    losses = [record["loss_val"] for record in read_log(tmp_path) if "loss_val" in record]
    assert losses[0] > 1.6 and losses[-1] < 0.8


@pytest.mark.slow
def test_one_step_at_real_size(unilm, fairseq, image_folder, tmp_path, capsys):
    """224 pixels, BEiTv2 base in unilm's form, six blocks of Data2Vec2 in fairseq's: one step, and the paper's counts."""
    train(tmp_path, "--data", image_folder, "--arch", "vit_base", "--img_size", 224, "--patch_size", 16, "--batch_size", 2,
          "--teacher", unilm, "--init", fairseq, "--max_steps", 1)
    assert "43.1 M trainable parameters, teacher 85.8 M frozen" in capsys.readouterr().out
