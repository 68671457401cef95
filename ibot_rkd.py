"""Masked Relational Knowledge Distillation (McIntyre Garcia), iBOT of structures.

The idea. iBOT trains a student on masked views to give, for [CLS] and each masked
patch, what its EMA teacher gives for whole views. Relational distillation compares
structures: all distances of several outputs (RKD-D), or all their angles (RKD-A). The
outputs may turn, shift and grow, as long as they stay arranged as the teacher's.

    masked views: student backbone -> head -> s: [CLS] (V, K), patches (V, N, K)
                     | EMA                    loss: psi(s) against psi(t)
    whole views:  teacher backbone -> head -> t: [CLS] (V, K), patches (V, N, K)

    psi_D(i, j) = |t_i - t_j| / u, u their mean for i != j            Eq. 1
    psi_A(i, j, k) = cosine of the angle at t_j                       Eq. 3
    ce:    H(softmax_j -psi_D(t) / tau, softmax_j -psi_D(s) / tau)    Eq. 2
           H(softmax_k psi_A(t) / tau, softmax_k psi_A(s) / tau)      Eq. 4
    huber: smooth L1 of psi(t) and psi(s)                             Eqs. 2, 4
    L = sum over potentials of loss_*_cls (V views) and loss_*_patch (N tokens)

The losses move the student, its head's last layer from the second epoch on; EMA moves
the teacher. Structures see neither centring (a shift) nor output temperature (a scale):
both belong to iBOT's own loss, `--potential none`, the baseline (KD). Of tokens, the
masked ones are compared by their relations to all. Only the teacher's inertia keeps
relations from collapse; `--potential none distance` adds iBOT's loss.

Symbols: common.py's; V global views, L local crops, P groups of V items, n compared.

    python ibot_rkd.py                                            RKD-D on digits
    python ibot_rkd.py --potential angle --output_dir runs/angle  RKD-A; none: KD
    torchrun --nproc_per_node=4 ibot_rkd.py --data cifar10 --relations batch
    python eval_linear.py --checkpoint runs/ibot_rkd/checkpoint.pth --cached  Table 1
        --finetune all --pool cls --epochs 10      "Unsup CLS"
    python ibot_rkd.py --attention runs/ibot_rkd/checkpoint.pth photo.jpg     Fig. 3

Measured: the first command (seed 0, 2.1 minutes) takes k-NN from 67.2 to 75.0 %;
RKD-A to 76.7 %, iBOT with as many views to 78.1 %.

    what           paper              released code       here
    compared by    cross-entropy or   raw distances, not  ce of softmaxes or huber:
                   Huber              least at s = t      least at s = t
    student's tau  not said           applied twice       once, in KD
    equal rows     distance 0         0.95 of the mean    0, without gradient
    items          views of an image  views of the batch  of an image; --relations
    views          more than iBOT's   not said            4 (KD 2); --global_views
    Eqs. 2, 4      sums               means               means
    patches        of patch outputs   of views            tokens; --patch_relations
    masks          student's views    enter as distances  student's views
    angles at 256  fell to batch 16   -                   in pieces: < 2 GiB
    clipping at 3  not said           of each tensor      of all at once
"""
import copy
import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchvision.transforms.v2 import functional as tv

from common import (IMAGE_SUFFIXES, MEAN, STD, InputError, Parser, Run, View, ViewLoader,
                    VisionTransformer, add_arguments, apply_recipe, at_least, autocast, byol_views,
                    cosine_schedule, create_backbone, distributed, draw, ema_update, existing_file,
                    fp32, gather, knn_accuracy, launch, load_backbone, load_data, local_rows, log,
                    mean_over_processes, parameter_groups, prepare_files, read_image, save_figure,
                    setup, start_from, subplots, to_device)

# -------------------------------------------------------------------------------------- recipes

SMALL = dict(
    # found on digits: a low rate after a long warm-up helps; few steps do not teach
    # positions; iBOT's teacher temperature of 0.04 lets its own loss collapse
    arch="vit_nano", pos_embed="sincos", lr=2e-3, weight_decay=0.04, momentum=0.99,
    hidden=128, drop_path=0.1, teacher_temp=0.02, teacher_patch_temp=0.04,
    global_views=4, local_scale=(0.1, 0.3),
    views=dict(scale=(0.3, 1.0), flip=0.0, blur=False))
IBOT = dict(
    arch="vit_small", pos_embed="learnt", lr=5e-4, weight_decay=0.04, momentum=0.996,
    hidden=2048, drop_path=0.1, teacher_temp=0.04, teacher_patch_temp=0.07,
    out_dim=8192, local_scale=(0.05, 0.25), warmup_epochs=10, temp_epochs=30)
RECIPES = {
    "digits": dict(
        SMALL, img_size=16, patch_size=4, local_size=8, epochs=30, batch_size=32,
        warmup_epochs=10, temp_epochs=10, out_dim=128),
    "mnist": dict(
        SMALL, img_size=28, patch_size=7, local_size=14, epochs=5, batch_size=64,
        warmup_epochs=1.5, temp_epochs=1.5, out_dim=256),
    # the paper, Sec. 3.4, on a tenth of ImageNet at 32 pixels
    "cifar10": dict(
        IBOT, img_size=32, patch_size=8, local_size=16, epochs=40, batch_size=256,
        views=dict(scale=(0.14, 1.0), blur=False)),
    "imagenet": dict(
        IBOT, img_size=224, patch_size=16, local_size=96, epochs=800, batch_size=1024,
        views=dict(scale=(0.14, 1.0))),
}

# --------------------------------------------------------------------------------------- losses

ENTRIES = 2**23  # of structures at once: 32 MiB, or one row of all groups


@fp32
def distance_potential(z: Tensor) -> Tensor:
    """(..., V, D) -> (..., V, V): distances over the mean of different items. Items that
    coincide, to rounding, are at 0 and give no gradient."""
    eps = torch.finfo(z.dtype).eps
    largest = z.detach().square().sum(-1).amax(-1)[..., None, None]  # (..., 1, 1)
    z = z - z.mean(-2, keepdim=True)  # for less rounding
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 would drown small distances
    gram = z @ z.mT  # (..., V, V)
    torch.set_float32_matmul_precision(precision)
    norms = gram.diagonal(dim1=-2, dim2=-1)  # (..., V)
    sums = norms[..., :, None] + norms[..., None, :]  # (..., V, V)
    squared = sums - 2 * gram
    # by rounding of the product and of z; nan counts as apart, for the watch on losses
    apart = ~(squared <= 64 * eps * sums + (16 * eps) ** 2 * largest)
    distances = torch.where(apart, squared, 1).sqrt() * apart
    V = z.shape[-2]
    u = distances.sum((-2, -1), keepdim=True) / (V * (V - 1))  # (..., 1, 1)
    return distances / torch.where(u == 0, 1, u)  # Eq. 1


def angles_at(vertices: Tensor, sides: Tensor) -> Tensor:
    """Vertices (..., n), distances (..., V, V) -> (..., n, V, V): cosines of the angles
    i, vertex, k; 0 where i is k or an end lies on the vertex."""
    a = torch.take_along_dim(sides, vertices[..., None], -2)  # (..., n, V)
    over = (a != 0) / torch.where(a != 0, a, 1)  # 1 / a, or 0
    squared = a**2
    cosine = squared[..., :, None] + squared[..., None, :] - sides[..., None, :, :] ** 2
    cosine = cosine * (over / 2)[..., :, None] * over[..., None, :]  # Eq. 3
    same = torch.eye(a.shape[-1], dtype=torch.bool, device=a.device)
    return cosine.clamp(-1, 1).masked_fill(same, 0)


def angle_potential(z: Tensor) -> Tensor:
    """(..., V, D) -> (..., V, V, V): cosine of the angle i, j, k at j."""
    vertices = torch.arange(z.shape[-2], device=z.device).expand(z.shape[:-1])  # (..., V)
    return angles_at(vertices, distance_potential(z)).transpose(-3, -2)


def rkd_loss(s: Tensor, t: Tensor, potential, kind: str = "ce", tau: float = 0.1,
             rows: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """Relational loss of student and teacher features (..., V, D), each group of V items by
    itself. The two widths may differ.

    potential: distance_potential or angle_potential. kind: "ce" or "huber". rows
    (..., n): items whose rows, or angles at them, are compared; default all. weights
    (..., n): of these, with sum 1; default equal.
    """
    if potential not in (distance_potential, angle_potential):
        raise ValueError("potential: distance_potential or angle_potential")
    *groups, V, D = s.shape
    s = s.reshape(-1, V, D)  # (P, V, D)
    t = t.detach().reshape(-1, *t.shape[-2:])  # (P, V, D')
    if rows is None:
        rows = torch.arange(V, device=s.device)
    rows = rows.expand(*groups, -1).reshape(len(s), -1)  # (P, n)
    s = in_pieces(distance_potential, s, 0, s[0].numel())  # (P, V, V)
    t = in_pieces(distance_potential, t, 0, t[0].numel())  # (P, V, V)
    angles = potential is angle_potential
    entries = len(s) * V  # of one row
    if angles:
        entries *= V
    losses = in_pieces(row_losses, rows, 1, entries, s, t, angles, kind, tau)  # (P, n)
    if weights is None:
        return losses.mean()
    return (losses * weights.reshape(losses.shape)).sum(1).mean()


def row_losses(rows: Tensor, s: Tensor, t: Tensor, angles: bool, kind: str, tau: float):
    """Rows or vertices (P, n), distances (P, V, V) -> the loss of each row (P, n).

    "ce" of distributions: softmax over j of -distance / tau in row i, or over k of
    cosine / tau at vertex j for each end i. An item with itself is left out.
    """
    V = s.shape[-1]
    same = torch.eye(V, dtype=torch.bool, device=s.device)
    itself = same[rows]  # (P, n, V)
    if angles:
        s = angles_at(rows, s)  # (P, n, V, V)
        t = angles_at(rows, t)  # (P, n, V, V)
        left_out = itself[:, :, None] | same  # (P, n, V, V)
    else:
        s = -torch.take_along_dim(s, rows[..., None], 1)  # (P, n, V)
        t = -torch.take_along_dim(t, rows[..., None], 1)  # (P, n, V)
        left_out = itself
    if kind == "huber":
        return F.smooth_l1_loss(s, t, reduction="none").flatten(2).mean(2)  # Eqs. 2, 4
    target = (t / tau).masked_fill(left_out, -1e30).softmax(-1)
    log_q = (s / tau).masked_fill(left_out, -1e30).log_softmax(-1)
    losses = -(target * log_q).sum(-1)  # Eqs. 2, 4: (P, n) or (P, n, V)
    if angles:
        losses = (losses * ~itself).sum(-1) / (V - 1)  # (P, n)
    return losses


def in_pieces(function, x: Tensor, dim: int, entries: int, *others) -> Tensor:
    """function(x, *others) in pieces along `dim`, a step of which takes so many entries;
    made again in the backward pass."""
    parts = x.split(max(1, ENTRIES // entries), dim)
    options = dict(use_reentrant=False, preserve_rng_state=False)
    return torch.cat([checkpoint(function, part, *others, **options) for part in parts], dim)


@fp32
def cls_loss(s: Tensor, t: Tensor, centre: Tensor, tau_t=0.04, tau_s=0.1) -> Tensor:
    """iBOT's [CLS] loss: cross-entropy of student views (V+L, B, K) with teacher views
    (V, B, K), the first of these; mean over pairs of different views."""
    target = ((t - centre) / tau_t).softmax(-1)
    log_q = (s / tau_s).log_softmax(-1)
    pairs = -(target.flatten(1) @ log_q.flatten(1).T) / t.shape[1]  # (V, V+L)
    others = 1 - torch.eye(*pairs.shape, device=s.device)
    return (pairs * others).sum() / others.sum()


@fp32
def patch_loss(s: Tensor, t: Tensor, centre: Tensor, rows: Tensor, weights: Tensor,
               tau_t=0.07, tau_s=0.1) -> Tensor:
    """iBOT's patch loss: cross-entropy of masked tokens, which are rows (P, n) of all
    (P, N, K), by weights (P, n) that sum to 1 in each view."""
    s = torch.take_along_dim(s, rows[..., None], 1)  # (P, n, K)
    t = torch.take_along_dim(t, rows[..., None], 1)  # (P, n, K)
    target = ((t - centre) / tau_t).softmax(-1)
    log_q = (s / tau_s).log_softmax(-1)
    return -((target * log_q).sum(-1) * weights).sum(1).mean()


def relational_losses(name, s_cls, t_cls, s_patch, t_patch, rows, weights, relations="image",
                      patch_relations="tokens", kind="ce", tau=0.1, vertices=8) -> dict:
    """Structures of [CLS] (V, B, K) and of patches (V*B, N, K) -> two terms.

    relations: items are the views of an "image", or all of the global "batch".
    patch_relations: items are the "tokens" of a view, of which the rows (V*B, n) count
    by weights (V*B, n), or "views", with all tokens side by side.
    """
    potential = {"distance": distance_potential, "angle": angle_potential}[name]

    def among_views(s, t):  # (V, B, D) each
        s = s.transpose(0, 1)  # (B, V, D): B groups
        t = t.transpose(0, 1)
        if relations == "image":
            return rkd_loss(s, t, potential, kind, tau)
        s = gather(s.contiguous()).flatten(0, 1)  # (M*V, D): one group
        t = gather(t.contiguous()).flatten(0, 1)  # (M*V, D)
        rows = torch.arange(len(s), device=s.device)
        return rkd_loss(s, t, potential, kind, tau, rows[local_rows(len(s))])

    cls = among_views(s_cls, t_cls)
    if patch_relations == "views":
        s = s_patch.unflatten(0, t_cls.shape[:2]).flatten(2)  # (V, B, N*K)
        t = t_patch.unflatten(0, t_cls.shape[:2]).flatten(2)
        patch = among_views(s, t)
    else:
        if name == "angle":  # some of them: their order is random
            rows = rows[:, :vertices]  # (V*B, n)
            weights = F.normalize(weights[:, :vertices], p=1, dim=1)
        patch = rkd_loss(s_patch, t_patch, potential, kind, tau, rows, weights)
    return {f"loss_{name}_cls": cls, f"loss_{name}_patch": patch}


# ---------------------------------------------------------------------------------------- masks

BLOCKS = 20  # drawn for one mask
ASPECT = 0.3  # of a block: from this to its inverse
MASK_DRAWS = 1 + 4 * BLOCKS


def block_masks(u: Tensor, grid: tuple, ratio: float, variation: float = 0.0) -> Tensor:
    """Uniform numbers (B, MASK_DRAWS) -> block-wise masks, bool (B, N), of round(N * r)
    patches, at least one, where r varies about the ratio."""
    H, W = grid
    u = u[:, :, None]  # (B, MASK_DRAWS, 1)
    count = H * W * (ratio + variation * (2 * u[:, :1] - 1))
    count = count.round().clamp(1, H * W)  # (B, 1, 1)
    area, aspect, top, left = u[:, 1:].split(BLOCKS, 1)  # (B, blocks, 1) each
    least = count.clamp(max=max(1, (min(H, W) // 3) ** 2))
    area = least + (count - least) * area
    aspect = torch.exp((2 * aspect - 1) * math.log(1 / ASPECT))
    h = (area * aspect).sqrt().round().clamp(1, H)
    w = (area / aspect).sqrt().round().clamp(1, W)
    top = (top * (H - h + 1)).floor()
    left = (left * (W - w + 1)).floor()
    y = torch.arange(H).repeat_interleave(W)  # (N,)
    x = torch.arange(W).repeat(H)
    inside = (y >= top) & (y < top + h) & (x >= left) & (x < left + w)  # (B, blocks, N)
    # blocks until so many patches are covered; the last is cut
    first = torch.where(inside.any(1), inside.int().argmax(1), BLOCKS)  # (B, N)
    order = first * (H * W) + torch.arange(H * W)
    places = order.argsort(1).argsort(1)  # (B, N)
    return places < count.flatten(1)


def masked_rows(masks: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Masks and uniform numbers (P, N) -> masked tokens in random order: rows (P, n), and
    weights (P, n) that sum to 1, 0 for rows that only fill up."""
    counts = masks.sum(1, keepdim=True)  # (P, 1)
    n = int(counts.max())
    rows = torch.where(masks, u, u + 1).argsort(1)[:, :n]  # masked tokens first
    return rows, (torch.arange(n) < counts) / counts


# ---------------------------------------------------------------------------------------- model

class Head(nn.Module):
    """MLP, L2 norm, and a weight-normalised linear layer whose gains stay 1."""

    def __init__(self, dim: int, hidden: int, out_dim: int, bottleneck: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden),
                                 nn.GELU(), nn.Linear(hidden, bottleneck))
        self.last = nn.Linear(bottleneck, out_dim, bias=False)
        for layer in (*self.mlp[::2], self.last):
            nn.init.trunc_normal_(layer.weight, std=0.02)
        for layer in self.mlp[::2]:
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.mlp(x), dim=-1)
        return F.linear(x, F.normalize(self.last.weight, dim=-1))  # (..., D) -> (..., K)


class Student(nn.Module):
    """Backbone, and one head for [CLS] and patches."""

    def __init__(self, backbone: VisionTransformer, hidden: int, out_dim: int):
        super().__init__()
        self.backbone = backbone
        self.head = Head(backbone.embed_dim, hidden, out_dim)

    def forward(self, views: list, masks: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """V views and L crops (B, 3, S, S), masks of the views (V*B, N) -> outputs: [CLS]
        (V+L, B, K), patches of the views (V*B, N, K)."""
        V = len(masks) // len(views[0])
        x = torch.cat(views[:V])  # (V*B, 3, S, S)
        h = self.backbone.forward_features(x, masks, noise[: len(x)])  # (V*B, 1+N, D)
        z = self.head(h)  # (V*B, 1+N, K)
        cls = z[:, 0]
        if len(views) > V:
            crops = torch.cat(views[V:])  # (L*B, 3, s, s)
            h = self.backbone.forward_features(crops, noise=noise[len(x) :])
            cls = torch.cat([cls, self.head(h[:, 0])])  # ((V+L)*B, K)
        return cls.unflatten(0, (len(views), -1)), z[:, 1:]


class Teacher(nn.Module):
    """The student's twin, moved only by EMA, without masks and stochastic depth, with the
    centres of its outputs."""

    def __init__(self, student: Student):
        super().__init__()
        self.backbone = copy.deepcopy(student.backbone)
        self.head = copy.deepcopy(student.head)
        K = self.head.last.out_features
        self.register_buffer("centre_cls", torch.zeros(K))
        self.register_buffer("centre_patch", torch.zeros(K))
        self.requires_grad_(False).eval()

    def forward(self, views: list) -> tuple[Tensor, Tensor, Tensor]:
        """V views (B, 3, S, S) -> outputs: [CLS] (V, B, K), patches (V*B, N, K); features
        of the first view (B, D)."""
        h = self.backbone.forward_features(torch.cat(views))  # (V*B, 1+N, D)
        z = self.head(h)  # (V*B, 1+N, K)
        cls = z[:, 0].unflatten(0, (len(views), -1))  # (V, B, K)
        return cls, z[:, 1:], h[: len(views[0]), 0]

    @torch.no_grad()
    def recentre(self, cls: Tensor, patches: Tensor, momentum: float = 0.9) -> None:
        """Moves the centres towards the mean outputs of the global batch."""
        means = torch.stack([x.float().mean((0, 1)) for x in (cls, patches)])
        means = mean_over_processes(means)  # (2, K)
        self.centre_cls.lerp_(means[0], 1 - momentum)
        self.centre_patch.lerp_(means[1], 1 - momentum)


def build(args) -> tuple[Student, Teacher, dict]:
    """-> student, teacher, and what a reader of the checkpoint must know."""
    options = dict(arch=args.arch, img_size=args.img_size, patch_size=args.patch_size,
                   pos_embed=args.pos_embed)
    if not hasattr(create_backbone(**options), "forward_features"):
        raise InputError(f"--arch {args.arch} has no patch tokens to mask: use our ViTs, "
                         f"such as vit_small")
    backbone = create_backbone(**options, drop_path=args.drop_path, mask_token=True)
    if args.init:
        start_from(backbone, args.init)
    student = Student(backbone, args.hidden, args.out_dim)
    teacher = Teacher(student)
    if args.compile:
        for backbone in (student.backbone, teacher.backbone):
            backbone.forward_features = torch.compile(backbone.forward_features)
    meta = dict(method="ibot_rkd", network="teacher", backbone=options, mean=MEAN, std=STD)
    return student, teacher, meta


# ------------------------------------------------------------------------------------- training

def make_views(args, recipe: dict) -> list[View]:
    """Global views, BYOL's two kinds in turn, then local crops, of smaller scales."""
    options = dict(recipe["views"])
    if args.local_crops:
        options["scale"] = (recipe["local_scale"][1], 1.0)
    first, second = byol_views(args.img_size, **options)
    if first.blur == 0:  # small images are neither blurred nor solarized
        second = dataclasses.replace(second, solarize=0.0)
    local = dataclasses.replace(first, size=args.local_size, scale=recipe["local_scale"],
                                blur=0.5 * first.blur)
    views = [first, second] * args.global_views
    return views[: args.global_views] + [local] * args.local_crops


def complete(args) -> None:
    """Fills in the views; refuses too few items."""
    args.potential = list(dict.fromkeys(args.potential))  # each once
    relations = args.potential != ["none"]
    if args.global_views is None:
        args.global_views = 4 if relations else 2
    least = 2
    if relations and args.relations == "image":
        least = 4 if "angle" in args.potential else 3
    if args.global_views < least:
        raise InputError(f"--global_views {args.global_views} are too few: --potential "
                         f"{' '.join(args.potential)} needs {least}")
    tokens = relations and args.patch_relations == "tokens"
    if tokens and args.img_size // args.patch_size < 3:
        raise InputError(f"--patch_size {args.patch_size} of --img_size {args.img_size} "
                         f"gives too few patches: lower it")
    if args.local_crops and "none" not in args.potential:
        raise InputError("--local_crops need iBOT's own loss: add none to --potential")
    if tokens and "angle" in args.potential:
        log(f"angles at {args.angle_vertices} random masked tokens of a view")


def chance_level(args, N: int) -> float | None:
    """The loss of even distributions; the Huber loss has no such level."""
    if args.relation_loss == "huber" and args.potential != ["none"]:
        return None
    items = args.global_views  # of the [CLS] structure
    if args.relations == "batch":
        items *= args.batch_size
    if args.patch_relations == "views":
        N = items
    choices = {"none": args.out_dim**2, "distance": (items - 1) * (N - 1),
               "angle": (items - 2) * (N - 2)}  # of [CLS], times of patches
    return sum(math.log(choices[name]) for name in args.potential)


def draw_step(args, step: int, backbone: VisionTransformer) -> tuple[Tensor, ...]:
    """All that is random but views: masks (V*B, N), rows and weights (V*B, n) of masked
    tokens, numbers for stochastic depth ((V+L)*B, 2 * depth)."""
    M = args.batch_size

    def uniform(stream, views, columns):  # (views*B, columns)
        parts = [draw(args.seed, step, stream + v, M, columns) for v in range(views)]
        return torch.cat([part[local_rows(M)] for part in parts])

    V = args.global_views
    u = uniform(2000, V, MASK_DRAWS)
    masks = block_masks(u, backbone.grid, args.mask_ratio, args.mask_ratio_var)
    rows, weights = masked_rows(masks, uniform(2100, V, masks.shape[1]))
    noise = uniform(2200, V + args.local_crops, 2 * len(backbone.blocks))
    return masks, rows, weights, noise


def train(args) -> None:
    # data and networks
    device = setup(args)
    train_data, test_data = load_data(args.data, args.data_path)
    recipe = apply_recipe(args, RECIPES, train_data)
    complete(args)
    student, teacher, meta = build(args)
    student.to(device)
    teacher.to(device)
    model = distributed(student)
    groups = parameter_groups(student, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")

    # the run: V global views and L local crops of each image, k-NN of the teacher
    views = make_views(args, recipe)
    loader = ViewLoader(train_data, views, args.batch_size, args.seed, device, args.num_workers)
    knn = functools.partial(
        knn_accuracy, teacher.backbone, train_data, test_data, args.img_size, device,
        num_workers=args.num_workers, dtype=args.dtype)
    run = Run(args, loader, meta, {"knn": (knn, args.knn_every)}, student=student,
              teacher=teacher, optimizer=optimizer, scaler=scaler)

    # schedules, a value for each step
    peak_lr = args.lr * args.batch_size / 256
    epoch = run.steps_per_epoch
    lr = cosine_schedule(peak_lr, 1e-6, run.total, int(args.warmup_epochs * epoch))
    weight_decay = cosine_schedule(args.weight_decay, args.weight_decay_end, run.total)
    momentum = cosine_schedule(args.momentum, 1.0, run.total)
    tau_patch = np.interp(range(run.total), [0, args.temp_epochs * epoch],
                          [args.teacher_temp, args.teacher_patch_temp])
    V = args.global_views
    chance = chance_level(args, math.prod(student.backbone.grid))
    log(f"iBOT, potential {' + '.join(args.potential)}, {args.arch}: {run.total} steps of "
        f"{args.batch_size} images, {V} + {args.local_crops} views each, lr {peak_lr:.1e}")
    if chance:
        log(f"chance level of loss {chance:.2f}")

    for step, views, _ in run.steps():  # V views and L crops (B, 3, S, S)
        # schedules
        for group in optimizer.param_groups:
            group["lr"] = float(lr[step])
        optimizer.param_groups[0]["weight_decay"] = float(weight_decay[step])

        # views: masks, rows of masked tokens, stochastic depth
        drawn = draw_step(args, step, student.backbone)
        masks, rows, weights, noise = (to_device(x, device) for x in drawn)

        # teacher: whole views, no gradient
        with torch.no_grad(), autocast(device, args.dtype):
            t_cls, t_patch, features = teacher(views[:V])  # (V, B, K), (V*B, N, K), (B, D)

        # student: masked views
        with autocast(device, args.dtype):
            s_cls, s_patch = model(views, masks, noise)  # (V+L, B, K), (V*B, N, K)

        # losses
        losses = {}
        if "none" in args.potential:
            losses["loss_cls"] = cls_loss(s_cls, t_cls, teacher.centre_cls, args.teacher_temp)
            losses["loss_patch"] = patch_loss(s_patch, t_patch, teacher.centre_patch, rows,
                                              weights, tau_patch[step])
        for name in ("distance", "angle"):
            if name in args.potential:
                losses |= relational_losses(
                    name, s_cls[:V], t_cls, s_patch, t_patch, rows, weights, args.relations,
                    args.patch_relations, args.relation_loss, args.relation_tau,
                    args.angle_vertices)
        losses["loss"] = sum(losses.values())

        # backward and step; the head's last layer waits for the rest to settle
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(losses["loss"]).backward()
        scaler.unscale_(optimizer)
        if step < args.freeze_last_layer * epoch:
            student.head.last.weight.grad = None
        norm = nn.utils.clip_grad_norm_(student.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()

        # EMA, once a step, after the student moved; and the centres
        ema_update(student, teacher, float(momentum[step]))
        teacher.recentre(t_cls, t_patch)

        # log, check and save, where it is due
        accuracy = (t_cls[0].argmax(-1) == s_cls[1].argmax(-1)).float().mean()  # Fig. 2
        run.end_step(step, losses, features=features, accuracy=accuracy, lr=float(lr[step]),
                     momentum=float(momentum[step]), gradient_norm=norm, chance=chance)


# ------------------------------------------------------------------------------------ arguments

def parse_arguments(argv=None):
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_arguments(parser, "ibot_rkd")
    add = parser.add_argument_group("relations").add_argument
    add("--potential", nargs="+", default=["distance"], choices=["none", "distance", "angle"],
        help="one or several; none is iBOT's own loss (default: distance)")
    add("--relation_loss", default="ce", choices=["ce", "huber"], help="(default: ce)")
    add("--relations", default="image", choices=["image", "batch"],
        help="items: views of an image or of the batch (image)")
    add("--patch_relations", default="tokens", choices=["tokens", "views"],
        help="items: tokens of a view, or as --relations (tokens)")
    add("--relation_tau", type=at_least(1e-6), default=0.1, help="of ce (default: 0.1)")
    add("--angle_vertices", type=at_least(1), default=8, help="masked tokens with angles")
    add = parser.add_argument_group("views").add_argument
    add("--global_views", type=at_least(1), help="(else 4, iBOT alone 2)")
    add("--local_crops", type=at_least(0), default=0, help="crops for iBOT's [CLS] loss")
    add("--local_size", type=at_least(1), help="their side in pixels (recipe)")
    add("--mask_ratio", type=at_least(0.01, 1.0), default=0.3, help="share of patches")
    add("--mask_ratio_var", type=at_least(0.0, 1.0), default=0.0, help="its variation")
    add = parser.add_argument_group("iBOT (defaults: recipe)").add_argument
    add("--hidden", type=at_least(1), help="width of the head")
    add("--out_dim", type=at_least(2), help="outputs of the head")
    add("--pos_embed", choices=["learnt", "sincos"], help="positions")
    add("--drop_path", type=at_least(0.0, 0.99), help="the student's stochastic depth")
    add("--momentum", type=at_least(0.0), help="the teacher's first, rising to 1")
    add("--teacher_temp", type=at_least(1e-6), help="temperature of [CLS]")
    add("--teacher_patch_temp", type=at_least(1e-6), help="of patches, after a rise")
    add("--temp_epochs", type=at_least(0.0), help="epochs of the rise")
    add("--weight_decay_end", type=at_least(0.0), default=0.4, help="(default: 0.4)")
    add("--clip_grad", type=at_least(1e-9), default=3.0, help="largest norm (default: 3)")
    add("--freeze_last_layer", type=at_least(0.0), default=1.0, help="epochs (default: 1)")
    parser.add_argument("--attention", nargs="+", type=existing_file, metavar="FILE",
                        help="draw Fig. 3 of checkpoints and images, up to 480 pixels")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------- attention (Fig. 3)

@torch.no_grad()
def attention_maps(backbone: VisionTransformer, x: Tensor) -> Tensor:
    """Image (1, 3, H, W) -> how the last [CLS] attends to patches (heads, h, w)."""
    grid = backbone.grid_of(*x.shape[-2:])
    return backbone.get_last_selfattention(x, queries=1)[0, :, 0, 1:].unflatten(1, grid)


def draw_attention(args) -> None:
    """A line for each checkpoint and image: it, each head, all of them."""
    from matplotlib import colormaps

    device = setup(args)
    target = Path(args.output_dir) / "attention.png"
    prepare_files([target], args.overwrite)
    images = [path for path in args.attention if path.lower().endswith(IMAGE_SUFFIXES)]
    checkpoints = [path for path in args.attention if path not in images]
    if not images or not checkpoints:
        raise InputError("--attention needs a checkpoint and an image")
    lines = []
    for file in checkpoints:
        backbone, meta = load_backbone(file, args.arch, args.patch_size)
        if not hasattr(backbone, "get_last_selfattention"):
            raise InputError(f"{file} is none of our ViTs: no attention")
        backbone.to(device)
        patch = backbone.patch_size
        for path in images:
            image = read_image(path).to(device)  # (3, H, W)
            size = args.img_size or min(480, *image.shape[1:])  # DINO draws at 480
            x = tv.resize(image[None] / 255, [size], antialias=True)  # (1, 3, h, w)
            h, w = x.shape[2:]
            if min(h, w) < patch:
                raise InputError(f"{path} is smaller than a patch of {patch} pixels: "
                                 f"pass --img_size")
            x = x[:, :, : h - h % patch, : w - w % patch]  # whole patches
            normalised = tv.normalize(x, meta["mean"], meta["std"])
            maps = attention_maps(backbone, normalised).cpu()  # (heads, h, w)
            maps = (maps / maps.amax((1, 2), keepdim=True)).numpy()
            hues = colormaps["hsv"](np.arange(len(maps)) / len(maps))[:, :3]  # (heads, 3)
            colours = np.einsum("nhw,nc->hwc", maps, hues)  # (h, w, 3)
            pictures = {Path(file).parent.name: x[0].permute(1, 2, 0).cpu().numpy()}
            pictures |= {f"head {head}": map for head, map in enumerate(maps, 1)}
            pictures["all heads"] = colours / colours.max()
            lines.append(pictures)
    figure, axes = subplots(len(lines), max(map(len, lines)), 1.8, 1.8)
    for axis in axes.flat:
        axis.axis("off")
    for line, pictures in zip(axes, lines, strict=True):
        for axis, (title, picture) in zip(line, pictures.items(), strict=False):
            axis.imshow(picture)
            axis.set_title(title, fontsize=7)
    save_figure(figure, target)
    log(f"wrote {target}")


if __name__ == "__main__":
    arguments = parse_arguments()
    launch(lambda: draw_attention(arguments) if arguments.attention else train(arguments))
