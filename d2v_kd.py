"""Unimodal knowledge distillation (vision): a shallow Data2Vec2-style student learns from BEiTv2 (a thesis draft, Eqs. 1-6).

The idea. A self-supervised teacher has no class probabilities to pass on, only features. One layer's [CLS] token says what the
teacher found, not how. So the student, half as deep, predicts for every token the mean over *all* the teacher's layers, each
first brought to one scale. That mean does not depend on how many layers there are: the student's own are averaged likewise, and
no layer of one has to be paired with a layer of the other.

    image -> teacher, frozen, 12 blocks -> H_1 ... H_12 -> instance norm -> mean over 12 -> layer norm -> Y ----+
      |                                    each block's       Eqs. 1-3         Eq. 4           Eq. 5            |
      |                                    output                                                  loss = mean (Y - Y^)^2, Eq. 6
      +----> student, 6 blocks ----------> H_1 ... H_6 --> instance norm -> mean over 6 --> layer norm -> Y^ ---+

Instance norm: each dim of an image to mean 0, variance 1 over its tokens, [CLS] among them. Layer norm, without parameters: each
token to mean 0, variance 1 over its dims. So the loss is 2 - 2 * (correlation of Y and Y^, mean over tokens): 2 is chance.
Shapes: B images, N patches, T = 1 + N tokens with [CLS] first, D width, L layers.

The student is Data2Vec2's ViT: post-norm blocks (x = LN(x + attn(x)), x = LN(x + mlp(x))), a norm before the first and none after
the last, fixed sine-cosine positions; or, with --student prenorm, the usual one. It starts at random or, with --init, from a file
or its teacher, of which it takes the first blocks or, with --init_blocks spaced, evenly spaced ones. Images are normalised as the
teacher's were. Where no teacher is given, a small one is trained first, the simplest way: by labels, through a head on its [CLS].

Commands:
    python d2v_kd.py                                                digits: a teacher of 4 blocks, then a student of 2
    torchrun --nproc_per_node=8 d2v_kd.py --data IMAGENET --teacher beitv2_base_patch16_224_pt1k.pth --init base_imagenet.pt
                                                                    the paper's run, from unilm's and fairseq's files
    python d2v_kd.py --data IMAGENET                                timm's BEiTv2, which is fine-tuned; a random student
    python d2v_kd.py --teacher runs/sdssl/checkpoint.pth --student prenorm --init teacher --init_blocks spaced
    python eval_linear.py --checkpoint runs/d2v_kd/checkpoint.pth --data digits --finetune all     Eq. 7; or --pool mean --cached

Measured: the first command (seed 0): k-NN of the teacher 92.8 %; of the student 58.9 % before and 80.8 % after, while the
validation loss falls from 1.91 to 0.05.

    what                  paper                       released code               here
    hidden states         each block's output         feed-forward outputs,       each block's output
                                                      before residual and norm
    epsilon of the norms  1e-8                        1e-5                        1e-5
    student's depth       "L_s = 12", half of 12;     6                           half the teacher's, or --depth
                          6 blocks in its Table 1
    learning rate         5e-4; later draft: 1e-4                                 5e-4 for a batch of 256
    BEiTv2's positions    not said                                                unilm's one shared table, copied to each block
                                                                                  as for fine-tuning: same function, 85.8 M
    the first N blocks    of Data2Vec2                                            in the order of the data: the two of fairseq's
                                                                                  context encoder, then the others: 43.1 M
    unlike widths         not met                                                 --proj: one linear map of all student's states
"""
import argparse
import inspect
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common import (MEAN, STD, VITS, ImageData, InputError, Parser, Run, View, ViewLoader, VisionTransformer, add_arguments,
                    apply_recipe, autocast, backbone_weights, check_limits, cosine_schedule, create_backbone, distributed,
                    extract_features, fp32, knn_accuracy, load_backbone, load_data, load_weights, log, meta_of, non_negative,
                    parameter_groups, read_checkpoint, run, setup)

# ------------------------------------------------------------------------------------------------------------ recipes

BEIT = "timm/beitv2_base_patch16_224"
# `teacher_recipe` is that of the small teacher that is trained here, from labels, where none is given
RECIPES = {
    # digits: by trial on two CPU cores; MNIST and CIFAR-10: sizes that fit, not tried at full length
    "digits": dict(arch="vit_nano", img_size=16, patch_size=4, epochs=80, batch_size=128, lr=8e-3, warmup_epochs=8,
                   weight_decay=0.01, teacher_epochs=30, teacher_recipe=dict(lr=2e-3, warmup_epochs=3, weight_decay=0.05),
                   views=dict(scale=(0.5, 1.0), flip=0.0)),
    "mnist": dict(arch="vit_nano", img_size=28, patch_size=7, epochs=10, batch_size=256, lr=4e-3, warmup_epochs=1,
                  weight_decay=0.01, teacher_epochs=5, teacher_recipe=dict(lr=1e-3, warmup_epochs=1, weight_decay=0.05),
                  views=dict(scale=(0.5, 1.0), flip=0.0)),
    "cifar10": dict(arch="vit_tiny", img_size=32, patch_size=4, epochs=100, batch_size=256, lr=5e-4, warmup_epochs=10,
                    weight_decay=0.01, teacher_epochs=100, teacher_recipe=dict(lr=5e-4, warmup_epochs=10, weight_decay=0.05),
                    views=dict(scale=(0.3, 1.0))),
    # the paper, but for the teacher's file, which timm does not have: --teacher beitv2_base_patch16_224_pt1k.pth
    "imagenet": dict(arch="vit_base", img_size=224, patch_size=16, epochs=10, batch_size=256, lr=5e-4, warmup_epochs=1,
                     weight_decay=0.01, teacher_arch=BEIT, views=dict(scale=(0.08, 1.0))),
}

# ------------------------------------------------------------------------------------------------------------- losses

EPS = 1e-5  # as released; the text says 1e-8


@fp32
def instance_norm(h: Tensor) -> Tensor:
    """Each dim of an image's states (B, T, D) to mean 0 and variance 1 over its T tokens (Eqs. 1, 2)."""
    h = h - h.mean(1, keepdim=True)
    return h * (h.square().mean(1, keepdim=True) + EPS).rsqrt()  # Eqs. 1, 2


def contextualized_target(hidden_states: list[Tensor]) -> Tensor:
    """L hidden states (B, T, D) -> (B, T, D) in fp32: instance norm, mean over layers, layer norm without parameters."""
    mean = sum(map(instance_norm, hidden_states)) / len(hidden_states)  # Eqs. 3, 4
    return F.layer_norm(mean, mean.shape[-1:], eps=EPS)  # Eq. 5


@fp32
def kd_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over images, tokens, [CLS] among them, and dims of (B, T, D)."""
    return F.mse_loss(pred, target)  # Eq. 6


# -------------------------------------------------------------------------------------------------------------- model


def hidden_states(backbone: nn.Module, x: Tensor) -> list[Tensor]:
    """Images (B, 3, H, W) -> every block's output, L of (B, T, D), [CLS] first, before any final norm."""
    if isinstance(backbone, VisionTransformer):
        return backbone.block_outputs(x)
    states = backbone.model.forward_intermediates(x, norm=False, output_fmt="NLC", return_prefix_tokens=True,
                                                  intermediates_only=True)
    return [torch.cat([prefix, patches], 1) for patches, prefix in states]


class Contextualized(nn.Module):
    """A backbone seen through Eqs. 1-5, student and teacher alike: images -> (B, T, D).

    proj: a linear map of the student's states to the teacher's width, the same for all layers, where the two differ.
    """

    def __init__(self, backbone: nn.Module, proj: nn.Module | None = None):
        super().__init__()
        self.backbone, self.proj = backbone, proj or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return contextualized_target([self.proj(h) for h in hidden_states(self.backbone, x)])  # (B, T, D)


class Labeller(nn.Module):
    """A teacher in the making: a backbone whose [CLS] learns the labels, (B, K)."""

    def __init__(self, backbone: nn.Module, classes: int):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(backbone.embed_dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class ImageLoss(nn.Module):
    """Eq. 6 of each image by itself (B, 1): a feature, for `extract_features`, of which the validation loss is the mean."""

    def __init__(self, student: nn.Module, teacher: nn.Module):
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, x: Tensor, layers: bool = False) -> Tensor:
        return torch.stack([kd_loss(*pair) for pair in zip(self.student(x), self.teacher(x), strict=True)])[:, None]


def from_unilm(weights: dict) -> dict:
    """unilm's BEiT -> timm's. Where one table of relative positions serves all blocks (pretraining), each gets a copy."""
    table = weights.get("rel_pos_bias.relative_position_bias_table")
    converted = {}
    for key, value in weights.items():
        if key.startswith(("lm_head.", "cls_pt_", "rel_pos_bias.")) or key.endswith("relative_position_index"):
            continue  # the heads of masked tokens, the layers that trained [CLS], what timm computes
        if key.endswith("attn.q_bias") and table is not None:
            converted[key.replace("q_bias", "relative_position_bias_table")] = table
        converted[f"fc_{key}" if key.startswith("norm.") else key] = value  # timm's place for the final norm
    return converted


def from_fairseq(weights: dict) -> dict:
    """fairseq's Data2Vec2 -> ours. The two blocks of its context encoder come first; decoder and EMA teacher are left out."""
    image = "modality_encoders.IMAGE."
    if not any(key.startswith(image) for key in weights):
        return weights
    names = {"extra_tokens": "cls_token", "local_encoder.": "patch_embed.", "context_encoder.norm.": "norm_pre.",
             "context_encoder.blocks.": "blocks.", "fixed_positional_encoder.positions": "pos_embed"}
    before = block_count(weights, image + "context_encoder.blocks.")
    converted = {}
    for key, value in weights.items():
        if key == "_ema" or key.startswith((image + "decoder.", "shared_decoder.", "recon_proj.")):
            continue
        if key.startswith("blocks."):
            _, l, rest = key.split(".", 2)
            key = f"blocks.{before + int(l)}.{rest}"
        for theirs, ours in names.items():
            if key.startswith(image + theirs):
                key = ours + key.removeprefix(image + theirs)
        converted[key] = F.pad(value, (0, 0, 1, 0)) if key == "pos_embed" else value  # (1, N, D) -> (1, 1+N, D), 0 for [CLS]
    return converted


def from_beit(weights: dict) -> dict:
    """timm's BEiT -> ours: layer scales multiplied into the matrices before them, relative positions left out."""
    if "blocks.0.attn.q_bias" not in weights:
        return weights
    weights = {key.replace("fc_norm.", "norm."): value for key, value in weights.items() if not key.endswith("bias_table")}
    for l in range(block_count(weights, "blocks.")):
        block = f"blocks.{l}."
        q, v = (weights.pop(f"{block}attn.{name}_bias") for name in "qv")
        weights[f"{block}attn.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])  # (3 * D,)
        for gamma, linear in (("gamma_1", "attn.proj"), ("gamma_2", "mlp.fc2")):
            scale = weights.pop(block + gamma)
            weights[f"{block}{linear}.weight"] = scale[:, None] * weights[f"{block}{linear}.weight"]
            weights[f"{block}{linear}.bias"] = scale * weights[f"{block}{linear}.bias"]
    log("--init teacher: the student has no place for BEiT's relative positions, which are left out")
    return weights


def block_count(weights: dict, prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in weights if key.startswith(prefix)})


def load_blocks(backbone: nn.Module, weights: dict, which: str, source: str) -> None:
    """A student from a network at least as deep: its embedding, and as many of its blocks as fit, the first or evenly spaced."""
    L, N = block_count(weights, "blocks."), len(backbone.blocks)
    kind, ours = ("prenorm" if "norm.weight" in names else "postnorm" for names in (weights, backbone.state_dict()))
    if kind != ours:
        raise InputError(f"{source} has {kind} blocks: pass --student {kind}")
    if L < N:
        raise InputError(f"{source} has {L} blocks, fewer than the student's {N}: lower --depth")
    chosen = list(range(N)) if which == "first" else torch.linspace(0, L - 1, N).round().int().tolist()
    picked = {key: value for key, value in weights.items() if not key.startswith("blocks.")}
    for i, l in enumerate(chosen):
        block = f"blocks.{l}."
        picked |= {f"blocks.{i}.{key.removeprefix(block)}": value for key, value in weights.items() if key.startswith(block)}
    load_weights(backbone, {"pos_embed": backbone.pos_embed, **picked}, source)  # BEiT has no positions of its own
    log(f"the student starts from blocks {' '.join(str(l + 1) for l in chosen)} of the {L} of {source}")


def load_teacher(args) -> tuple[nn.Module, dict]:
    """-> the teacher's backbone, frozen and in evaluation mode, and its meta: from our file, unilm's, another one, or timm."""
    weights = backbone_weights(read_checkpoint(args.teacher)) if args.teacher else {}
    if any(key.endswith("relative_position_bias_table") for key in weights):
        backbone = create_backbone(args.teacher_arch or BEIT, img_size=None)
        load_weights(backbone, from_unilm(weights), args.teacher)
        backbone.model.set_input_size(args.img_size)
        meta = dict(backbone={}, mean=backbone.mean, std=backbone.std)
    elif args.teacher_arch:
        backbone, meta = load_backbone(args.teacher, args.teacher_arch, args.patch_size, args.img_size)
    else:
        raise InputError(f"{args.teacher} does not say which architecture: pass --teacher_arch (and --patch_size)")
    model = getattr(backbone, "model", backbone)
    returns = inspect.signature(getattr(model, "forward_intermediates", log)).parameters
    plain = model is backbone or "return_prefix_tokens" in returns
    if getattr(model, "cls_token", None) is None or getattr(model, "num_prefix_tokens", 1) != 1 or not plain:
        raise InputError(f"--teacher_arch {args.teacher_arch} has no tokens to learn from: it must be a ViT with [CLS] and patches")
    return backbone.eval().requires_grad_(False), meta


def build_student(args, teacher: nn.Module, meta: dict) -> tuple[Contextualized, dict]:
    """-> the student, and what a reader of its checkpoint must know of the backbone. `meta` is the teacher's."""
    args.depth = args.depth or max(1, len(teacher.layer_dims) // 2)
    same = args.arch == meta["backbone"].get("arch")  # then heads of the same width too
    options = dict(arch=args.arch, img_size=args.img_size, patch_size=args.patch_size, depth=args.depth, pos_embed="sincos",
                   num_heads=meta["backbone"].get("num_heads") if same else None, post_norm=args.student == "postnorm")
    if args.arch not in VITS:
        raise InputError(f"--arch {args.arch} is no student for this method: use one of {' '.join(VITS)}")
    backbone = create_backbone(**options)
    if args.init == "teacher":
        load_blocks(backbone, from_beit(getattr(teacher, "model", teacher).state_dict()), args.init_blocks, "the teacher")
    elif args.init:
        load_blocks(backbone, from_fairseq(backbone_weights(read_checkpoint(args.init))), args.init_blocks, args.init)
    backbone.mask_token.requires_grad_(False)  # no masks in this method
    backbone.norm.requires_grad_(False)  # the hidden states are before it
    with torch.no_grad():
        one = torch.zeros(1, 3, args.img_size, args.img_size)
        (_, T, D), (_, tokens, width) = (hidden_states(network, one)[-1].shape for network in (backbone, teacher))
    if T != tokens:
        raise InputError(f"of an image of {args.img_size} pixels the student makes {T} tokens and the teacher {tokens}: give the "
                         f"student the teacher's --patch_size")
    if D != width and not args.proj:
        raise InputError(f"the student is {D} wide and the teacher {width}: pass --proj, a linear map of the student's hidden "
                         f"states, or another --arch")
    student = Contextualized(backbone, nn.Linear(D, width) if args.proj else None)
    return student, dict(method="d2v_kd", network="student", backbone=options, mean=meta["mean"], std=meta["std"])


# ----------------------------------------------------------------------------------------------------------- training


def train_teacher(args, recipe: dict, train_data: ImageData, test_data: ImageData, device) -> str:
    """Where no teacher is given: a ViT of the recipe's depth learns the labels -> the path of its checkpoint."""
    if not train_data.labelled:
        raise InputError(f"{args.data} has no labels to train a teacher by: pass --teacher FILE or --teacher_arch timm/NAME")
    folder = Path(args.output_dir) / "teacher"
    log(f"no --teacher: a small one is trained first, by the labels, in {folder} (or taken from there, with --resume)")
    changes = dict(recipe["teacher_recipe"], epochs=args.teacher_epochs, output_dir=str(folder), max_steps=None)
    args = argparse.Namespace(**vars(args) | changes)
    options = dict(arch=args.arch, img_size=args.img_size, patch_size=args.patch_size)
    network = Labeller(create_backbone(**options), len(train_data.classes)).to(device)
    network.backbone.mask_token.requires_grad_(False)
    meta = dict(method="d2v_kd", network="teacher", backbone=options, mean=MEAN, std=STD)
    labelled = train_data.subset((train_data.labels >= 0).nonzero()[:, 0])
    fit(args, network, None, meta, labelled, test_data, recipe["views"], device)
    return str(folder / "checkpoint.pth")


def fit(args, network: nn.Module, teacher: nn.Module | None, meta: dict, train_data: ImageData, test_data: ImageData, views: dict,
        device) -> None:
    """The steps of a run: of a student that learns from its teacher or, with teacher None, of a teacher that learns labels."""
    model = distributed(network)
    if args.compile:
        for part in filter(None, (network, teacher)):
            part.compile()
    optimizer = torch.optim.AdamW(parameter_groups(network, args.weight_decay), betas=(0.9, 0.98), eps=1e-6,
                                  fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")
    colours = dict(mean=meta["mean"], std=meta["std"])  # the teacher's, for both
    view = View(args.img_size, **views)
    loader = ViewLoader(train_data, [view], args.batch_size, args.seed, device, args.num_workers, **colours)
    steps_per_epoch = loader.steps_per_epoch
    total = args.epochs * steps_per_epoch
    job = Run(args, total, steps_per_epoch)
    job.same_data(train_data)
    parts = {meta["network"]: network, "optimizer": optimizer, "scaler": scaler}
    job.restore(**parts)
    peak_lr = args.lr * args.batch_size / 256
    lr = cosine_schedule(peak_lr, 0.0, total, warmup=int(args.warmup_epochs * steps_per_epoch))
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad) / 1e6
    frozen = f", teacher {sum(p.numel() for p in teacher.parameters()) / 1e6:.1f} M frozen" if teacher else ""
    depth = len(network.backbone.blocks)
    log(f"{meta['network']}, {args.arch} of {depth} blocks: {trainable:.1f} M trainable parameters{frozen}")
    log(f"{total} steps of {args.batch_size} images, lr {args.lr:.1e} * {args.batch_size} / 256 = {peak_lr:.1e}")

    options = dict(num_workers=args.num_workers, dtype=args.dtype, **colours)

    def knn(backbone=network.backbone):
        return knn_accuracy(backbone, train_data, test_data, args.img_size, device, **options)

    def validate(step):
        began = time.perf_counter()
        losses, = extract_features(ImageLoss(network, teacher), test_data, args.img_size, device, **options)  # (N, 1)
        log(f"step {step} (epoch {step / steps_per_epoch:.1f}): validation loss {losses.mean():.4f}, chance level 2")
        job.record(step=step, loss_val=losses.mean().item())
        job.clock += time.perf_counter() - began  # speed is the steps' own

    def state():
        return {name: part.state_dict() for name, part in parts.items()} | {"meta": meta}

    if job.start == 0:
        if teacher:
            accuracy = knn(teacher.backbone)
            log("teacher: " + ("no labels on both sides, no k-NN" if accuracy is None else f"k-NN top-1 {accuracy:.1f} %"))
            validate(0)
        job.record_knn(0, knn())
    for step, (x,), index in loader.steps(job.start, job.stop):  # one view (B, 3, H, W)
        # schedules
        for group in optimizer.param_groups:
            group["lr"] = float(lr[step])

        # teacher: targets without gradient; for a teacher in the making, the labels
        with torch.no_grad(), autocast(device, args.dtype):
            target = teacher(x) if teacher else train_data.labels[index].to(device, non_blocking=True)  # (B, T, D); (B,)

        # student
        with autocast(device, args.dtype):
            pred = model(x)  # (B, T, D); (B, K)

        # loss
        loss = kd_loss(pred, target) if teacher else F.cross_entropy(pred.float(), target)  # Eq. 6
        losses = {"loss": loss}

        # backward and step
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        # log
        job.watch(step, losses)
        if job.log_now(step):
            watched = dict(features=pred[:, pred.shape[1] // 2], chance=2.0) if teacher else {}  # a patch in the middle
            job.log_step(step, losses, loader.waited, lr=float(lr[step]), **watched)
        if teacher and ((step + 1) % steps_per_epoch == 0 or step + 1 == job.stop):
            validate(step + 1)
        job.after_step(step, state, knn)
    job.bar.close()  # a finished teacher has no step left that would


def train(args) -> None:
    check_limits(args, {"teacher_epochs": (1, 1e6)})
    device = setup(args)
    train_data, test_data = load_data(args.data, args.data_path)
    if test_data is None:  # every tenth image is left for the validation loss
        if len(train_data) < 2:
            raise InputError(f"one image under {args.data} is too few: a tenth is left for the validation loss")
        rows = torch.arange(len(train_data))
        train_data, test_data = train_data.subset(rows[rows % 10 > 0]), train_data.subset(rows[::10])
    if args.teacher:  # what it says of itself settles the student's sizes, where no flag does
        said = meta_of(read_checkpoint(args.teacher)).get("backbone", {})
        args.teacher_arch = args.teacher_arch or said.get("arch")
        args.arch = args.arch or (said.get("arch") if said.get("arch") in VITS else None)
        args.img_size, args.patch_size = args.img_size or said.get("img_size"), args.patch_size or said.get("patch_size")
    recipe = apply_recipe(args, RECIPES, train_data)
    if not (args.teacher or args.teacher_arch):
        args.teacher = train_teacher(args, recipe, train_data, test_data, device)
        args.teacher_arch = args.arch
    backbone, meta = load_teacher(args)
    student, meta = build_student(args, backbone, meta)
    teacher = Contextualized(backbone).to(device)
    fit(args, student.to(device), teacher, meta, train_data, test_data, recipe["views"], device)


# ---------------------------------------------------------------------------------------------------------- arguments


def parse_arguments(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    add_arguments(parser, "d2v_kd")
    group = parser.add_argument_group("teacher")
    group.add_argument("--teacher", metavar="FILE", help="ours, unilm's BEiTv2, or any ViT's (default: trained here, or timm's)")
    group.add_argument("--teacher_arch", help="for a FILE that does not say, or alone: timm/NAME, pretrained (default: recipe)")
    group.add_argument("--teacher_epochs", type=non_negative, help="of the teacher that is trained here (default: recipe)")
    group = parser.add_argument_group("student")
    group.add_argument("--student", default="postnorm", choices=["postnorm", "prenorm"], help="its blocks (default: %(default)s)")
    group.add_argument("--depth", type=non_negative, help="blocks of the student (default: half the teacher's)")
    group.add_argument("--init_blocks", default="first", choices=["first", "spaced"], help="of a deeper --init FILE, or of the "
                       "teacher with --init teacher: the first or evenly spaced ones (default: %(default)s)")
    group.add_argument("--proj", action="store_true", help="linear map of the student's states to the teacher's width")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse_arguments()
    run(lambda: train(arguments))
