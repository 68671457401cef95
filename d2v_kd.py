"""Unimodal knowledge distillation (vision): a shallow Data2Vec2-style student learns from
BEiTv2 (a thesis draft, Eqs. 1-6).

The idea. A self-supervised teacher has features but no class probabilities, and its
last [CLS] token says what it found, not how. So the student, half as deep, predicts for
every token the mean over *all* the teacher's layers, each first brought to one scale.
That mean does not depend on how many layers there are: the student's own are averaged
likewise, and no layer of one has to be paired with a layer of the other.

    image -> teacher, frozen -> H_1 ... H_12 -> instance norm -> mean -> layer norm -> Y ----+
      |                         each block's    Eqs. 1-3         Eq. 4   Eq. 5               |
      |                         output                                loss = mean (Y - Y^)^2, Eq. 6
      +----> student ---------> H_1 ... H_6 --> instance norm -> mean -> layer norm -> Y^ ---+

Instance norm brings each dim of an image to mean 0 and variance 1 over its tokens, so
no layer of large numbers drowns the others. Layer norm, without parameters, does so for
each token over its dims. The loss is thus 2 - 2 * (correlation of Y and Y^, mean over
tokens), and 2 is chance.

It moves the student alone, which is Data2Vec2's ViT: fixed sine-cosine positions, a norm
before the first block, post-norm blocks (x = LN(x + attn(x)), x = LN(x + mlp(x))).
--student prenorm is the usual ViT. It starts at random or, with --init, from a file's or
its teacher's blocks. Images are normalised as the teacher's were. Where no teacher is
given, a small one is trained first, by labels.

Symbols: B images of this process, N patch tokens, T = 1 + N tokens with [CLS] first, D
width, L layers, C classes.

    python d2v_kd.py                       digits: a teacher of 4 blocks, then a student of 2
    torchrun --nproc_per_node=8 d2v_kd.py --data IMAGENET \
        --teacher beitv2_base_patch16_224_pt1k.pth --init base_imagenet.pt
                                           the paper's run, from unilm's and fairseq's files
    python d2v_kd.py --data IMAGENET       timm's BEiTv2, which is fine-tuned; a random student
    python d2v_kd.py --teacher runs/sdssl/checkpoint.pth --student prenorm --init teacher \
        --init_blocks spaced
    python eval_linear.py --checkpoint runs/d2v_kd/checkpoint.pth --data digits --finetune all

Measured: the first command (seed 0): k-NN of the teacher 92.8 %; of the student 58.9 %
before, 80.8 % after; validation loss 1.91, then 0.05.

    what                paper                   released code         here
    hidden states       block outputs           feed-forward outputs  block outputs
    epsilon of norms    1e-8                    1e-5                  1e-5
    student's depth     "L_s = 12", half of 12  6                     half the teacher's
    learning rate       5e-4; later draft 1e-4                        5e-4 for 256 images
    BEiTv2's positions  not said                                      unilm: one table for all
    its k-NN            -                                             of its own output, timm's
    the first blocks    of Data2Vec2                                  context encoder's first
    unlike widths       not met                                       --proj: a linear map
"""
import argparse
import inspect
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common import (MEAN, STD, VITS, ImageData, InputError, Parser, Run, View, ViewLoader,
                    add_arguments, apply_recipe, at_least, autocast, backbone_weights,
                    cosine_schedule, create_backbone, distributed, existing_file, extract_features,
                    fp32, is_moco_small, knn_accuracy, launch, load_backbone, load_data,
                    load_weights, log, meta_of, parameter_groups, read_checkpoint, setup, to_device)

# -------------------------------------------------------------------------------------- recipes

BEIT = "timm/beitv2_base_patch16_224"
# teacher_recipe: of the teacher, where none is given
RECIPES = {
    "digits": dict(  # by trial on two CPU cores
        arch="vit_nano", img_size=16, patch_size=4, epochs=80, batch_size=128, lr=8e-3,
        warmup_epochs=8, weight_decay=0.01, views=dict(scale=(0.5, 1.0), flip=0.0),
        teacher_epochs=30, teacher_recipe=dict(lr=2e-3, warmup_epochs=3, weight_decay=0.05)),
    "mnist": dict(  # not tried at full length
        arch="vit_nano", img_size=28, patch_size=7, epochs=10, batch_size=256, lr=4e-3,
        warmup_epochs=1, weight_decay=0.01, views=dict(scale=(0.5, 1.0), flip=0.0),
        teacher_epochs=5, teacher_recipe=dict(lr=1e-3, warmup_epochs=1, weight_decay=0.05)),
    "cifar10": dict(
        arch="vit_tiny", img_size=32, patch_size=4, epochs=100, batch_size=256, lr=5e-4,
        warmup_epochs=10, weight_decay=0.01, teacher_epochs=100, views=dict(scale=(0.3, 1.0)),
        teacher_recipe=dict(lr=5e-4, warmup_epochs=10, weight_decay=0.05)),
    "imagenet": dict(  # the paper, but for the teacher's file, which timm does not have
        arch="vit_base", img_size=224, patch_size=16, epochs=10, batch_size=256, lr=5e-4,
        warmup_epochs=1, weight_decay=0.01, teacher_arch=BEIT, views=dict(scale=(0.08, 1.0))),
}

# --------------------------------------------------------------------------------------- losses

EPS = 1e-5  # as released; the text says 1e-8


@fp32
def instance_norm(h: Tensor) -> Tensor:
    """Each dim of an image's states (B, T, D) to mean 0 and variance 1 over its T tokens."""
    h = h - h.mean(1, keepdim=True)  # Eqs. 1, 2: centred ...
    return h * (h.square().mean(1, keepdim=True) + EPS).rsqrt()  # ... and scaled


def contextualized_target(hidden_states: list[Tensor]) -> Tensor:
    """L hidden states (B, T, D) -> (B, T, D) in fp32, on both sides."""
    mean = sum(map(instance_norm, hidden_states)) / len(hidden_states)  # Eqs. 3, 4
    return F.layer_norm(mean, mean.shape[-1:], eps=EPS)  # Eq. 5


@fp32
def kd_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over images, tokens with [CLS], and dims of (B, T, D)."""
    return F.mse_loss(pred, target)  # Eq. 6


# ---------------------------------------------------------------------------------------- model

class Contextualized(nn.Module):
    """A backbone seen through Eqs. 1-5: images -> (B, T, D).

    proj: a linear map of all layers' states to a teacher of another width.
    """

    def __init__(self, backbone: nn.Module, proj: nn.Module | None = None):
        super().__init__()
        self.backbone = backbone
        self.proj = proj or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden_states = [self.proj(h) for h in self.backbone.block_outputs(x)]  # L of (B, T, D)
        return contextualized_target(hidden_states)


class ImageLoss(nn.ModuleList):
    """[student, teacher]: Eq. 6 of each image, in the place of a feature: images -> (B, 1)."""

    def forward(self, x: Tensor, layers: bool = False) -> Tensor:
        student, teacher = self
        # `forward`: as in `extract_features`
        errors = (student.forward(x) - teacher.forward(x)).square()  # (B, T, D)
        return errors.mean((1, 2))[:, None]  # (B, 1)


def load_teacher(args) -> tuple[nn.Module, dict]:
    """-> a frozen backbone and its meta, of any ViT's file or of timm."""
    path = args.teacher
    arch = args.teacher_arch
    weights = {}
    if path:
        weights = backbone_weights(read_checkpoint(path))
    if any(key.endswith("relative_position_bias_table") for key in weights):
        backbone = create_backbone(arch or BEIT, img_size=None)
        load_weights(backbone, from_unilm(weights), path)
        backbone.model.set_input_size(args.img_size)
        meta = dict(backbone={}, mean=backbone.mean, std=backbone.std)
    elif not path and not arch.startswith("timm/"):
        raise InputError(f"--teacher_arch {arch} without weights teaches nothing: pass --teacher "
                         f"FILE, or timm/NAME")
    elif arch:
        backbone, meta = load_backbone(path, arch, args.patch_size, args.img_size)
    else:
        raise InputError(f"{path} does not say which architecture: pass --teacher_arch")
    model = getattr(backbone, "model", backbone)
    one_prefix = getattr(model, "num_prefix_tokens", 1) == 1
    states = model is backbone
    if hasattr(model, "forward_intermediates"):
        options = inspect.signature(model.forward_intermediates).parameters
        states = "return_prefix_tokens" in options
    if getattr(model, "cls_token", None) is None or not one_prefix or not states:
        raise InputError(f"--teacher_arch {arch} has no tokens to learn from: use a ViT with [CLS]")
    return backbone.eval().requires_grad_(False), meta


def build_student(args, teacher: nn.Module, meta: dict) -> tuple[Contextualized, dict]:
    """-> the student and its meta, from the teacher's."""
    args.depth = args.depth or max(1, len(teacher.layer_dims) // 2)
    options = dict(arch=args.arch, img_size=args.img_size, patch_size=args.patch_size,
                   depth=args.depth, pos_embed="sincos", post_norm=args.student == "postnorm")
    if args.arch == meta["backbone"].get("arch"):  # then heads of the same width too
        options["num_heads"] = meta["backbone"].get("num_heads")
    weights = {}
    source = args.init
    if args.init == "teacher":
        source = "the teacher"
        weights = getattr(teacher, "model", teacher).state_dict()
    elif args.init:
        weights = read_fairseq(args.init)
        if is_moco_small(weights, {}):
            options["num_heads"] = 12
    backbone = create_backbone(**options)
    if weights:
        load_blocks(backbone, weights, args.init_blocks, source)
    backbone.norm.requires_grad_(False)  # the hidden states are before it
    T, D = backbone.pos_embed.shape[1:]
    with torch.no_grad():
        image = torch.zeros(1, 3, args.img_size, args.img_size)
        tokens, width = teacher.block_outputs(image)[-1].shape[1:]
    if T != tokens:
        raise InputError(f"the student makes {T} tokens and the teacher {tokens}: give it the "
                         f"teacher's --patch_size")
    if D != width and not args.proj:
        raise InputError(f"the student is {D} wide and the teacher {width}: pass --proj")
    student = Contextualized(backbone, nn.Linear(D, width) if args.proj else None)
    meta = dict(method="d2v_kd", network="student", backbone=options, mean=meta["mean"],
                std=meta["std"])
    return student, meta


# ------------------------------------------------------------------------------------- training

def make_optimizer(args, network: nn.Module, device):
    """AdamW of the paper, and the scaler of its gradients for fp16."""
    groups = parameter_groups(network, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=device.type != "mps")
    return optimizer, torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")


def load_images(args) -> tuple[ImageData, ImageData]:
    """To train and to test with; where there are no test images, every tenth image is one."""
    train_data, test_data = load_data(args.data, args.data_path)
    if test_data is None:
        rows = torch.arange(len(train_data))
        test_data = train_data.subset(rows[::10])
        train_data = train_data.subset(rows[rows % 10 > 0])
    if len(train_data) == 0:
        raise InputError(f"{args.data} has one image, and that is to test with: add some")
    return train_data, test_data


def train(args) -> None:
    # data and networks; the teacher's file decides what no flag does
    device = setup(args)
    train_data, test_data = load_images(args)
    if args.teacher:
        sizes = meta_of(read_checkpoint(args.teacher)).get("backbone", {})
        args.teacher_arch = args.teacher_arch or sizes.get("arch")
        if sizes.get("arch") in VITS:
            args.arch = args.arch or sizes["arch"]
        args.img_size = args.img_size or sizes.get("img_size")
        args.patch_size = args.patch_size or sizes.get("patch_size")
    teacher_arch = args.teacher_arch
    recipe = apply_recipe(args, RECIPES, train_data)
    if args.teacher:
        args.teacher_arch = teacher_arch  # the recipe's is for want of a file
    if args.arch not in VITS:
        raise InputError(f"--arch {args.arch} is no student: use one of {' '.join(VITS)}")
    if args.teacher or args.teacher_arch:
        backbone, meta = load_teacher(args)
    else:
        backbone, meta = train_teacher(args, recipe, train_data, device)
    student, meta = build_student(args, backbone, meta)
    trainable = sum(p.numel() for p in student.parameters() if p.requires_grad) / 1e6
    frozen = sum(p.numel() for p in backbone.parameters()) / 1e6
    log(f"student, {args.arch} of {args.depth} blocks: {trainable:.1f} M trainable parameters, "
        f"teacher {frozen:.1f} M frozen")
    student.to(device)
    teacher = Contextualized(backbone).to(device)
    model = distributed(student)
    if args.compile:
        student.compile()
        teacher.compile()
    optimizer, scaler = make_optimizer(args, student, device)

    # the run: one view of each image, validation loss and k-NN
    options = dict(num_workers=args.num_workers, mean=meta["mean"], std=meta["std"])
    view = View(args.img_size, **recipe["views"])
    loader = ViewLoader(train_data, [view], args.batch_size, args.seed, device, **options)

    def knn(network=student):
        return knn_accuracy(network.backbone, train_data, test_data, args.img_size, device,
                            dtype=args.dtype, **options)

    def validate():
        losses, = extract_features(ImageLoss([student, teacher]), test_data, args.img_size, device,
                                   dtype=args.dtype, **options)  # (n, 1)
        return losses.mean().item()

    checks = {
        "knn_teacher": (lambda: knn(teacher), 0),
        "loss_val": (validate, 1),
        "knn": (knn, args.knn_every),
    }
    run = Run(args, loader, meta, checks, student=student, optimizer=optimizer, scaler=scaler)

    # schedule, a value for each step
    M = args.batch_size
    peak_lr = args.lr * M / 256
    warmup = int(args.warmup_epochs * run.steps_per_epoch)
    lr = cosine_schedule(peak_lr, 0.0, run.total, warmup)
    log(f"{run.total} steps of {M} images, lr {args.lr:.1e} * {M} / 256 = {peak_lr:.1e}")

    for step, (x,), _ in run.steps():  # one view (B, 3, H, W)
        # schedules
        for group in optimizer.param_groups:
            group["lr"] = float(lr[step])

        # teacher: targets without gradient
        with torch.no_grad(), autocast(device, args.dtype):
            target = teacher(x)  # (B, T, D)

        # student: predictions of all tokens
        with autocast(device, args.dtype):
            pred = model(x)  # (B, T, D)

        # losses
        loss = kd_loss(pred, target)  # Eq. 6

        # backward and step
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        # log, check and save; a token in the middle is watched for collapse
        run.end_step(step, {"loss": loss}, features=pred[:, pred.shape[1] // 2],
                     lr=float(lr[step]), chance=2.0)


def train_teacher(args, recipe: dict, train_data: ImageData, device) -> tuple[nn.Module, dict]:
    """Where none is given: a ViT of the student's --arch learns the labels, in teacher/."""
    if not train_data.labelled:
        raise InputError(f"{args.data} has no labels to train a teacher by: pass --teacher")
    options = dict(arch=args.arch, img_size=args.img_size, patch_size=args.patch_size)
    meta = dict(method="d2v_kd", network="teacher", backbone=options, mean=MEAN, std=STD)
    with torch.random.fork_rng(devices=[]):  # a student that does not suit it is found now
        build_student(args, create_backbone(**options), meta)
    folder = Path(args.output_dir) / "teacher"
    log(f"no --teacher: a small one is trained first, by the labels, in {folder}")
    changes = dict(recipe["teacher_recipe"], epochs=args.teacher_epochs, output_dir=str(folder),
                   max_steps=None)
    changes |= dict.fromkeys(("student", "depth", "init", "init_blocks", "proj"))  # not its own
    args = argparse.Namespace(**{**vars(args), **changes})
    backbone = create_backbone(**options)
    head = nn.Linear(backbone.embed_dim, len(train_data.classes))
    teacher = nn.Sequential(OrderedDict(backbone=backbone, head=head)).to(device)
    model = distributed(teacher)
    if args.compile:
        teacher.compile()
    optimizer, scaler = make_optimizer(args, teacher, device)
    labelled = train_data.subset((train_data.labels >= 0).nonzero()[:, 0])
    view = View(args.img_size, **recipe["views"])
    loader = ViewLoader(labelled, [view], args.batch_size, args.seed, device, args.num_workers)
    run = Run(args, loader, meta, teacher=teacher, optimizer=optimizer, scaler=scaler)
    peak_lr = args.lr * args.batch_size / 256
    warmup = int(args.warmup_epochs * run.steps_per_epoch)
    lr = cosine_schedule(peak_lr, 0.0, run.total, warmup)
    log(f"teacher, {args.arch} of {len(backbone.blocks)} blocks: {run.total} steps")
    for step, (x,), index in run.steps():
        for group in optimizer.param_groups:
            group["lr"] = float(lr[step])
        labels = to_device(labelled.labels[index], device)  # (B,)
        with autocast(device, args.dtype):
            logits = model(x)  # (B, C)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        run.end_step(step, {"loss": loss}, lr=float(lr[step]))
    return load_backbone(str(folder / "checkpoint.pth"))


# ------------------------------------------------------------------------------------ arguments

def parse_arguments(argv=None):
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_arguments(parser, "d2v_kd", init_type=lambda x: x if x == "teacher" else existing_file(x))
    add = parser.add_argument_group("teacher").add_argument
    add("--teacher", type=existing_file, metavar="FILE",
        help="ours, unilm's BEiTv2, or any ViT's (default: trained here, or timm's)")
    add("--teacher_arch", help="of a FILE that does not say; alone: timm/NAME, pretrained")
    add("--teacher_epochs", type=at_least(1), help="of a teacher that is trained here")
    add = parser.add_argument_group("student").add_argument
    add("--student", default="postnorm", choices=["postnorm", "prenorm"], help="kind of its blocks")
    add("--depth", type=at_least(1), help="blocks of the student (default: half the teacher's)")
    add("--init_blocks", default="first", choices=["first", "spaced"],
        help="blocks that it takes from a deeper --init FILE or teacher (default: first)")
    add("--proj", action="store_true", help="linear map of its states to the teacher's width")
    return parser.parse_args(argv)


# ------------------------------------------------------------------ keys of other people's files

def from_unilm(weights: dict) -> dict:
    """unilm's BEiT -> timm's. A table of positions for all blocks is copied to each."""
    table = weights.get("rel_pos_bias.relative_position_bias_table")
    converted = {}
    for key, value in weights.items():
        # layers that trained [CLS], and what timm computes
        if key.startswith(("cls_pt_", "rel_pos_bias.")) or key.endswith("position_index"):
            continue
        if key.endswith("attn.q_bias") and table is not None:
            converted[key.replace("q_bias", "relative_position_bias_table")] = table
        if key.startswith("norm."):  # timm's place for the final norm
            key = f"fc_{key}"
        converted[key] = value
    return converted


def from_fairseq(weights: dict) -> dict:
    """fairseq's Data2Vec2 -> ours; other weights stay as they are.

    The two blocks of the context encoder come first. Decoder and EMA teacher are left out.
    """
    image = "modality_encoders.IMAGE."
    if not any(key.startswith(image) for key in weights):
        return weights
    names = {"extra_tokens": "cls_token", "local_encoder.": "patch_embed.",
             "context_encoder.norm.": "norm_pre.", "context_encoder.blocks.": "blocks.",
             "fixed_positional_encoder.positions": "pos_embed"}
    before = block_count(weights, image + "context_encoder.blocks.")
    converted = {}
    for key, value in weights.items():
        if key.startswith(("_ema", image + "decoder.", "shared_decoder.", "recon_proj.")):
            continue
        if key.startswith("blocks."):
            _, l, rest = key.split(".", 2)
            key = f"blocks.{before + int(l)}.{rest}"
        for theirs, ours in names.items():
            key = key.replace(image + theirs, ours)
        if key == "pos_embed":
            value = F.pad(value, (0, 0, 1, 0))  # (1, N, D) -> (1, T, D), 0 for [CLS]
        converted[key] = value
    return converted


def read_fairseq(path: str) -> dict:
    """A file's weights with our keys: fairseq's Data2Vec2, or a file that has them already."""
    content = read_checkpoint(path)
    if layer_norm_first(content):
        raise InputError(f"{path} was made with layer_norm_first, whose blocks are not ours: use a "
                         f"file made without, such as base_imagenet.pt")
    return from_fairseq(backbone_weights(content))


def layer_norm_first(content) -> bool:
    """Whether a fairseq file was made so, by its settings, at any depth, or its last norm."""
    if not isinstance(content, dict):
        return False
    fairseq = any(str(key).startswith("modality_encoders.") for key in content)
    if content.get("layer_norm_first") or (fairseq and "norm.weight" in content):
        return True
    return any(layer_norm_first(value) for value in content.values())


def block_count(weights: dict, prefix: str) -> int:
    return sum(key.startswith(prefix) and key.endswith(".norm1.weight") for key in weights)


def load_blocks(backbone: nn.Module, weights: dict, which: str, source: str) -> None:
    """From a network at least as deep: all but its blocks, and of those as many as fit."""
    L = block_count(weights, "blocks.")
    depth = len(backbone.blocks)
    kind = "postnorm" if "norm_pre.weight" in weights else "prenorm"
    if (kind == "postnorm") != backbone.blocks[0].post_norm:
        raise InputError(f"{source} has {kind} blocks: pass --student {kind}")
    if L < depth:
        raise InputError(f"{source} has {L} blocks, fewer than --depth {depth}")
    chosen = list(range(depth))
    if which == "spaced":
        chosen = torch.linspace(0, L - 1, depth).round().int().tolist()
    picked = {key: value for key, value in weights.items() if not key.startswith("blocks.")}
    for i, l in enumerate(chosen):
        for key, value in weights.items():
            if key.startswith(f"blocks.{l}."):
                picked[key.replace(f"blocks.{l}.", f"blocks.{i}.")] = value
    load_weights(backbone, picked, source)
    numbers = " ".join(str(l + 1) for l in chosen)
    log(f"the student starts from blocks {numbers} of the {L} of {source}")


if __name__ == "__main__":
    launch(lambda: train(parse_arguments()))
