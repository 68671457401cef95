"""Masked Relational Knowledge Distillation for Self-Supervised Learning (McIntyre Garcia): iBOT that compares structures.

The idea. iBOT trains a student on masked views to give, for [CLS] and for each masked patch, the output that its EMA teacher
gives for whole views. Relational distillation does not compare outputs with outputs: it forms the structure of several outputs
on each side, all their distances (RKD-D) or all their angles (RKD-A), and compares structure with structure. The outputs may
turn, shift and grow, as long as they stay arranged as the teacher's.

    V views of an image -+- masked: student backbone -> head -> s: [CLS] (V, K), patches (V, N, K) -> psi(s) -+- loss
                         |          | EMA                                                                     |
                         +- whole:  teacher backbone -> head -> t: [CLS] (V, K), patches (V, N, K) -> psi(t) -+  no gradient

    psi_D(i, j) = |t_i - t_j| / u                    u: the mean distance of different items                        Eq. 1
    psi_A(i, j, k) = cos of the angle at t_j         by the law of cosines on psi_D                                 Eq. 3
    ce:    H(softmax_j -psi_D(t_i, t_j) / tau, softmax_j -psi_D(s_i, s_j) / tau), mean over i          i itself left out
           H(softmax_k psi_A(t_i, t_j, t_k) / tau, the student's), mean over vertices j and ends i      i and j left out
    huber: smooth L1 of psi(t) and psi(s), mean over all entries                                                    Eqs. 2, 4
    L = sum over the chosen potentials of loss_*_cls (items: the V views) + loss_*_patch (items: the N tokens of a view)

A structure does not see the teacher's centring (a shift) nor a temperature of the outputs (a scale): both belong to iBOT's own
loss, `--potential none`, which is there as the baseline (KD) and to be added. Structures come from one Gram matrix.
Shapes: B images a process, M in the global batch, V global views, L local crops, N patch tokens, D width, K outputs of the
head; P groups of items of which n rows (for angles: vertices) are compared.

Commands:
    python ibot_rkd.py                                                     iBOT & RKD-D on digits
    python ibot_rkd.py --potential angle --output_dir runs/angle           RKD-A; none is iBOT & KD; none distance is a sum
    torchrun --nproc_per_node=4 ibot_rkd.py --data cifar10 --potential distance angle --relations batch
    python eval_linear.py --checkpoint runs/ibot_rkd/checkpoint.pth --data digits --cached       Table 1: linear
    python eval_linear.py --checkpoint runs/ibot_rkd/checkpoint.pth --data digits --finetune all --pool cls    and [CLS]
    python ibot_rkd.py --attention runs/ibot_rkd/checkpoint.pth runs/angle/checkpoint.pth photo.jpg            Fig. 3

Measured: the first command (30 epochs, seed 0, 2.1 minutes on two CPU cores) takes k-NN from 67.2 % to 75.0 %; the second,
RKD-A, to 76.7 %; iBOT alone, with as many views, to 78.1 %. Table 1's protocol at CIFAR scale: README.

    what                  paper                        released code                  here
    structures compared   cross-entropy or Huber       raw distances are the target:  ce of softmaxes with one tau: least where
                                                       least elsewhere than at s = t  structures agree; --relation_loss huber
    student's temperature not said                     applied twice, in KD too       once in KD; none in structures
    distances             over their mean (Eq. 1)      normalised and other vectors   Eq. 1; equal rows are at distance 0,
                                                       mixed: equal rows at 0.95 u    and give no gradient
    items                 views of one image           all views of the batch         of one image; --relations batch
    views                 more than iBOT's 2           not said                       4 with relations; --global_views
    patch structure       of patch outputs             of views, tokens side by side  of a view's tokens; --patch_relations views
    masks                 on the student's views       enter as distances of masks    on the student's views: rows of masked
                                                                                      tokens count; exactly the ratio
    angles, batch 256     fell to batch 16             -                              a few vertices at a time, made again in
                                                                                      the backward pass: < 2 GiB
    clipping at 3         not said                     each tensor's gradient         the whole gradient
"""
import copy
import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchvision.transforms.v2 import functional as tv

from common import (IMAGE_SUFFIXES, MEAN, STD, InputError, Parser, Run, View, ViewLoader, VisionTransformer, add_arguments,
                    apply_recipe, at_least, autocast, byol_views, cosine_schedule, create_backbone, distributed, draw,
                    ema_update, existing_file, fp32, gather, knn_accuracy, launch, load_backbone, load_data, local_rows, log,
                    mean_over_processes, parameter_groups, read_image, refuse_to_replace, setup, start_from, subplots)

# ------------------------------------------------------------------------------------------------------------ recipes

RECIPES = {
    # found by trial on two CPU cores, digits alone: what helps most is a low rate after a long warm-up. In so few steps positions
    # are not learnt; and iBOT's teacher temperature of 0.04 lets its own loss collapse to even outputs
    "digits": dict(arch="vit_nano", img_size=16, patch_size=4, pos_embed="sincos", epochs=30, batch_size=32, lr=2e-3,
                   warmup_epochs=10, weight_decay=0.04, momentum=0.99, hidden=128, out_dim=128, drop_path=0.1,
                   teacher_temp=0.02, teacher_patch_temp=0.04, temp_epochs=10, global_views=4,
                   local_size=8, local_scale=(0.1, 0.3), views=dict(scale=(0.3, 1.0), flip=0.0, blur=False)),
    "mnist": dict(arch="vit_nano", img_size=28, patch_size=7, pos_embed="sincos", epochs=5, batch_size=64, lr=2e-3,
                  warmup_epochs=1.5, weight_decay=0.04, momentum=0.99, hidden=128, out_dim=256, drop_path=0.1,
                  teacher_temp=0.02, teacher_patch_temp=0.04, temp_epochs=1.5, global_views=4,
                  local_size=14, local_scale=(0.1, 0.3), views=dict(scale=(0.3, 1.0), flip=0.0, blur=False)),
    # the paper, Sec. 3.4, on a tenth of ImageNet at 32 pixels: iBOT's settings but for ViT-S/8, the batch and the epochs
    "cifar10": dict(arch="vit_small", img_size=32, patch_size=8, pos_embed="learnt", epochs=40, batch_size=256, lr=5e-4,
                    warmup_epochs=10, weight_decay=0.04, momentum=0.996, hidden=2048, out_dim=8192, drop_path=0.1,
                    teacher_temp=0.04, teacher_patch_temp=0.07, temp_epochs=30, global_views=None,
                    local_size=16, local_scale=(0.05, 0.25), views=dict(scale=(0.14, 1.0), blur=False)),
    # iBOT
    "imagenet": dict(arch="vit_small", img_size=224, patch_size=16, pos_embed="learnt", epochs=800, batch_size=1024, lr=5e-4,
                     warmup_epochs=10, weight_decay=0.04, momentum=0.996, hidden=2048, out_dim=8192, drop_path=0.1,
                     teacher_temp=0.04, teacher_patch_temp=0.07, temp_epochs=30, global_views=None,
                     local_size=96, local_scale=(0.05, 0.25), views=dict(scale=(0.14, 1.0))),
}

# ------------------------------------------------------------------------------------------------------------- losses

ENTRIES = 2**23  # of a structure that are compared at once: 32 MiB in fp32 for each intermediate result


@fp32
def distance_potential(z: Tensor) -> Tensor:
    """(..., V, D) -> (..., V, V): distances over the mean distance of different items of the group (Eq. 1).

    From one Gram matrix. Items that coincide, to rounding, are at distance 0 and give no gradient.
    """
    z = z - z.mean(-2, keepdim=True)  # distances do not see it, rounding does
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 would drown small distances
    gram = z @ z.mT  # (..., V, V)
    torch.set_float32_matmul_precision(precision)
    norms = gram.diagonal(dim1=-2, dim2=-1)  # (..., V)
    sums = norms[..., :, None] + norms[..., None, :]  # (..., V, V)
    squared = sums - 2 * gram
    apart = ~(squared <= 64 * torch.finfo(z.dtype).eps * sums)  # what is not a number stays one, for the watch on losses to see
    distances = torch.where(apart, squared, 1).sqrt() * apart  # the square root of 0 would have an infinite gradient
    V = z.shape[-2]
    u = distances.sum((-2, -1), keepdim=True) / max(V * (V - 1), 1)  # (..., 1, 1)
    return distances / u.clamp(min=torch.finfo(z.dtype).tiny)  # Eq. 1


def angles_at(sides: Tensor, rows: Tensor) -> Tensor:
    """Distances (P, V, V) and vertices (P, n) -> (P, n, V, V): cosine of the angle i, vertex, k by the law of cosines (Eq. 3)."""
    a = torch.take_along_dim(sides, rows[..., None], 1)  # (P, n, V)
    over = (a != 0) / torch.where(a != 0, a, 1)  # (P, n, V): 1 / a, and 0 for an end on the vertex
    cosine = a[..., :, None] ** 2 + a[..., None, :] ** 2 - sides[:, None] ** 2  # (P, n, V, V)
    cosine = cosine * (over / 2)[..., :, None] * over[..., None, :]  # Eq. 3
    return cosine.clamp(-1, 1).masked_fill(torch.eye(a.shape[-1], dtype=torch.bool, device=a.device), 0)


def angle_potential(z: Tensor) -> Tensor:
    """(..., V, D) -> (..., V, V, V): entry [i, j, k] is the cosine of the angle at vertex j (Eq. 3).

    0 where two of the indices coincide or an end lies on the vertex.
    """
    sides = distance_potential(z)
    V = sides.shape[-1]
    vertices = torch.arange(V, device=z.device).expand(sides[..., 0].numel() // V, V)
    angles = angles_at(sides.reshape(-1, V, V), vertices)
    return angles.transpose(1, 2).reshape(*sides.shape, V)


def row_losses(s: Tensor, t: Tensor, rows: Tensor, angles: bool, kind: str, tau: float) -> Tensor:
    """Student's and teacher's distances (P, V, V) -> (P, n): the loss of each of the given rows (or vertices) (P, n)."""
    V = s.shape[-1]
    if angles:
        s, t = angles_at(s, rows), angles_at(t, rows)  # (P, n, V, V)
    else:
        s, t = torch.take_along_dim(s, rows[..., None], 1), torch.take_along_dim(t, rows[..., None], 1)  # (P, n, V)
    if kind == "huber":
        return F.smooth_l1_loss(s, t, reduction="none").flatten(2).mean(2)  # Eq. 2, Eq. 4
    own = rows[..., None] == torch.arange(V, device=s.device)  # (P, n, V)
    if not angles:
        return cross_entropy(-s / tau, -t / tau, own)
    left_out = own[..., None, :] | torch.eye(V, dtype=torch.bool, device=s.device)  # (P, n, V, V)
    return (cross_entropy(s / tau, t / tau, left_out) * ~own).sum(-1) / (V - 1)


def cross_entropy(s: Tensor, t: Tensor, left_out: Tensor) -> Tensor:
    """Logits (..., V) of student and teacher -> (...): cross-entropy of their softmaxes, without the entries left out."""
    target = t.masked_fill(left_out, -1e30).softmax(-1)
    return -(target * s.masked_fill(left_out, -1e30).log_softmax(-1)).sum(-1)


def rkd_loss(s: Tensor, t: Tensor, potential, kind: str = "ce", tau: float = 0.1, rows: Tensor | None = None,
             weights: Tensor | None = None) -> Tensor:
    """Relational loss (Eqs. 2, 4) of student and teacher features (..., V, D), each group of V items by itself.

    potential: distance_potential or angle_potential. kind "huber": smooth L1, mean over the entries. "ce": cross-entropy of
    softmax over k of -distance / tau in row i, or of cosine / tau at vertex j for each i, an item with itself left out.
    rows (..., n): the items whose rows are compared (for angles the vertices), default all; weights (..., n) sum to 1.

    Memory is bounded: the loss of all angles is formed a few vertices at a time, and again in the backward pass.
    """
    V = s.shape[-2]
    s, t = s.reshape(-1, *s.shape[-2:]), t.detach().reshape(-1, *t.shape[-2:])  # (P, V, D) each, of any two widths D
    rows = torch.arange(V, device=s.device) if rows is None else rows
    rows = rows.expand(*s.shape[:-2], rows.shape[-1]).reshape(len(s), -1)  # (P, n)

    def sides(z):
        return torch.cat([checkpoint(distance_potential, part, use_reentrant=False, preserve_rng_state=False)
                          for part in z.split(max(1, ENTRIES // z[0].numel()))])  # (P, V, V)

    angles = potential is angle_potential
    s, t, at_once = sides(s), sides(t), max(1, ENTRIES // (len(s) * V ** (1 + angles)))
    losses = torch.cat([checkpoint(row_losses, s, t, part, angles, kind, tau, use_reentrant=False, preserve_rng_state=False)
                        for part in rows.split(at_once, 1)], 1)  # (P, n)
    return losses.mean() if weights is None else (losses * weights.reshape(len(s), -1)).sum(1).mean()


@fp32
def cls_loss(s: Tensor, t: Tensor, centre: Tensor, tau_s: float = 0.1, tau_t: float = 0.04) -> Tensor:
    """iBOT's [CLS] loss: cross-entropy of student views (V+L, B, K) with teacher views (V, B, K), mean over pairs.

    The student's first V views are the teacher's, and no view is paired with itself; L local crops follow.
    """
    target, log_q = ((t - centre) / tau_t).softmax(-1), (s / tau_s).log_softmax(-1)
    pairs = -(target.flatten(1) @ log_q.flatten(1).T) / t.shape[1]  # (V, V+L)
    others = 1 - torch.eye(*pairs.shape, device=s.device)  # (V, V+L)
    return (pairs * others).sum() / others.sum()


@fp32
def patch_loss(s: Tensor, t: Tensor, centre: Tensor, weights: Tensor, tau_s: float = 0.1, tau_t: float = 0.07) -> Tensor:
    """iBOT's patch loss: cross-entropy at n masked tokens of P views (P, n, K), whose weights (P, n) sum to 1 in each view."""
    target, log_q = ((t - centre) / tau_t).softmax(-1), (s / tau_s).log_softmax(-1)
    return -((target * log_q).sum(-1) * weights).sum(1).mean()


def relational_losses(name: str, s_cls: Tensor, t_cls: Tensor, s_patch: Tensor, t_patch: Tensor, rows: Tensor, weights: Tensor,
                      relations="image", patch_relations="tokens", kind="ce", tau=0.1, vertices=8) -> dict[str, Tensor]:
    """Structures of [CLS] outputs (V, B, K) and of patch outputs (V*B, N, K), student's against teacher's -> two terms.

    relations: the items are the views of one "image", or all views of the global "batch". patch_relations: the items are the
    "tokens" of one view, and only the rows (V*B, n) of masked ones count; or "views", with all their tokens side by side.
    """
    potential = {"distance": distance_potential, "angle": angle_potential}[name]

    def among_views(s, t):  # (V, B, D) each
        s, t = s.transpose(0, 1), t.transpose(0, 1)  # (B, V, D): B groups
        if relations == "image":
            return rkd_loss(s, t, potential, kind, tau)
        s, t = gather(s.contiguous()).flatten(0, 1), gather(t.contiguous()).flatten(0, 1)  # (M*V, D): one group
        own = torch.arange(len(s), device=s.device)[local_rows(len(s))]  # (B*V,)
        return rkd_loss(s, t, potential, kind, tau, own)

    losses = {f"loss_{name}_cls": among_views(s_cls, t_cls)}
    if patch_relations == "views":
        s, t = (z.unflatten(0, t_cls.shape[:2]).flatten(2) for z in (s_patch, t_patch))  # (V, B, N*K)
        losses[f"loss_{name}_patch"] = among_views(s, t)
    else:
        if name == "angle":  # some of the masked tokens, which are in random order
            rows, weights = rows[:, :vertices], F.normalize(weights[:, :vertices], p=1, dim=1)  # (V*B, n)
        losses[f"loss_{name}_patch"] = rkd_loss(s_patch, t_patch, potential, kind, tau, rows, weights)
    return losses


# -------------------------------------------------------------------------------------------------------------- masks

BLOCKS, ASPECT = 20, 0.3  # blocks drawn for one mask; their aspect is 0.3 to 1 / 0.3
MASK_DRAWS = 1 + 4 * BLOCKS


def block_masks(u: Tensor, grid: tuple[int, int], ratio: float, spread: float = 0.0) -> Tensor:
    """Uniform numbers (B, MASK_DRAWS) -> bool (B, N): block-wise masks, of exactly round(N * r) patches, at least one.

    r is drawn from ratio - spread to ratio + spread. Blocks are laid until so many patches are masked; the last is cut.
    """
    (H, W), B = grid, len(u)
    count = (H * W * (ratio + spread * (2 * u[:, :1] - 1))).round().clamp(1, H * W)  # (B, 1)
    area, aspect, top, left = u[:, 1:].view(B, 4, BLOCKS).unbind(1)  # (B, blocks) each
    least = count.clamp(max=max(1, (min(H, W) // 3) ** 2))  # (B, 1)
    area, aspect = least + (count - least) * area, torch.exp((2 * aspect - 1) * math.log(1 / ASPECT))
    h, w = (area * aspect).sqrt().round().clamp(1, H), (area / aspect).sqrt().round().clamp(1, W)
    top, left = (top * (H - h + 1)).floor(), (left * (W - w + 1)).floor()
    y, x = torch.arange(H)[:, None], torch.arange(W)
    h, w, top, left = (v[:, :, None, None] for v in (h, w, top, left))
    inside = ((y >= top) & (y < top + h) & (x >= left) & (x < left + w)).flatten(2)  # (B, blocks, N)
    first = torch.where(inside.any(1), inside.int().argmax(1), BLOCKS)  # (B, N): the block that covers a patch first
    order = first * (H * W) + torch.arange(H * W)
    return order.argsort(1).argsort(1) < count  # (B, N)


def masked_rows(masks: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Masks (P, N), uniform numbers (P, N) -> rows (P, n) and weights (P, n): each view's masked tokens, in random order.

    The weights of a view are equal and sum to 1; where views have unlike counts, rows that only fill up weigh 0.
    """
    counts = masks.sum(1, keepdim=True)  # (P, 1)
    n = int(counts.max())
    return (u + 2 * ~masks).argsort(1)[:, :n], (torch.arange(n) < counts) / counts


# -------------------------------------------------------------------------------------------------------------- model


class Head(nn.Module):
    """MLP -> bottleneck -> K cosines with unit prototypes: L2 norm, and a weight-normalised linear layer whose gains stay 1."""

    def __init__(self, dim: int, hidden: int, out_dim: int, bottleneck: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        self.last = nn.Linear(bottleneck, out_dim, bias=False)
        for layer in (*self.mlp[::2], self.last):
            nn.init.trunc_normal_(layer.weight, std=0.02)
        for layer in self.mlp[::2]:
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.mlp(x), dim=-1), F.normalize(self.last.weight, dim=-1))  # (..., D) -> (..., K)


class Student(nn.Module):
    """Backbone, and one head that [CLS] and patch tokens share."""

    def __init__(self, backbone: VisionTransformer, hidden: int, out_dim: int):
        super().__init__()
        self.backbone, self.head = backbone, Head(backbone.embed_dim, hidden, out_dim)

    def forward(self, x: Tensor, masks: Tensor, noise: Tensor, crops: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Global views (V*B, 3, S, S) under masks (V*B, N), local crops (L*B, 3, s, s) -> outputs of [CLS] and of patches."""
        z = self.head(self.backbone.forward_features(x, masks, noise[: len(x)]))  # (V*B, 1+N, K)
        cls, patches = z[:, 0], z[:, 1:]
        if crops is not None:
            h = self.backbone.forward_features(crops, noise=noise[len(x) :])[:, 0]  # (L*B, D)
            cls = torch.cat([cls, self.head(h)])  # ((V+L)*B, K)
        return cls, patches


class Teacher(nn.Module):
    """The student's twin, moved only by EMA, without masks and stochastic depth; it keeps the centres of its outputs."""

    def __init__(self, student: Student):
        super().__init__()
        self.backbone, self.head = copy.deepcopy(student.backbone), copy.deepcopy(student.head)
        K = self.head.last.out_features
        self.register_buffer("centre_cls", torch.zeros(K))
        self.register_buffer("centre_patch", torch.zeros(K))
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Global views (V*B, 3, S, S) -> [CLS] (V*B, K), patches (V*B, N, K), and the backbone's [CLS] (V*B, D)."""
        h = self.backbone.forward_features(x)  # (V*B, 1+N, D)
        z = self.head(h)  # (V*B, 1+N, K)
        return z[:, 0], z[:, 1:], h[:, 0]

    def update(self, student: Student, momentum: float) -> None:
        ema_update(student.backbone, self.backbone, momentum)
        ema_update(student.head, self.head, momentum)

    @torch.no_grad()
    def recentre(self, cls: Tensor, patches: Tensor, momentum: float = 0.9) -> None:
        """Moves the centres towards the mean outputs of the global batch: all views' [CLS], all their patches."""
        means = torch.stack([cls.float().mean(0), patches.float().mean((0, 1))])  # (2, K)
        for centre, mean in zip((self.centre_cls, self.centre_patch), mean_over_processes(means), strict=True):
            centre.lerp_(mean, 1 - momentum)


def build(args) -> tuple[Student, Teacher, dict]:
    """-> student, teacher, and what a reader of the checkpoint must know of the backbone."""
    options = dict(arch=args.arch, img_size=args.img_size, patch_size=args.patch_size, pos_embed=args.pos_embed)
    if not hasattr(create_backbone(**options), "forward_features"):
        raise InputError(f"--arch {args.arch} has no patch tokens to mask: use one of this repository's ViTs, such as vit_small")
    backbone = create_backbone(**options, drop_path=args.drop_path, mask_token=True)
    if args.init:
        start_from(backbone, args.init)
    student = Student(backbone, args.hidden, args.out_dim)
    return student, Teacher(student), dict(method="ibot_rkd", network="teacher", backbone=options, mean=MEAN, std=STD)


# ----------------------------------------------------------------------------------------------------------- training


def make_views(args, recipe: dict) -> list[View]:
    """Global views, BYOL's two kinds in turn, then local crops; with these, global crops start where local ones end."""
    options = dict(recipe["views"])
    if args.local_crops:
        options["scale"] = (recipe["local_scale"][1], 1.0)
    one, two = byol_views(args.img_size, **options)
    two = dataclasses.replace(two, solarize=two.solarize * one.blur)  # small images are neither blurred nor solarized
    local = dataclasses.replace(one, size=args.local_size, scale=recipe["local_scale"], blur=0.5 * one.blur)
    return [(one, two)[v % 2] for v in range(args.global_views)] + [local] * args.local_crops


def settle(args) -> None:
    """The number of views, which depends on the potentials, and whether there are items enough for these."""
    relations = [name for name in args.potential if name != "none"]
    if args.global_views is None:
        args.global_views = 4 if relations else 2
    least = 2 if args.relations == "batch" or not relations else 4 if "angle" in relations else 3
    if args.global_views < least:
        raise InputError(f"--global_views {args.global_views} are too few: --potential {' '.join(args.potential)} needs {least}")
    if relations and args.patch_relations == "tokens" and args.img_size // args.patch_size < 3:
        raise InputError(f"--patch_size {args.patch_size} of --img_size {args.img_size} gives too few patches to relate: lower it")
    if args.local_crops and "none" not in args.potential:
        raise InputError("--local_crops are for the student alone, so they have no part in relations: add none to --potential")
    if args.local_crops and args.local_size % args.patch_size:
        raise InputError(f"--local_size {args.local_size} is not a multiple of --patch_size {args.patch_size}")
    low, high = args.mask_ratio - args.mask_ratio_var, args.mask_ratio + args.mask_ratio_var
    if not 0 < low <= high <= 1:
        raise InputError(f"--mask_ratio and --mask_ratio_var mask {low:g} to {high:g} of the patches: stay above 0 and up to 1")


def chance_level(args, patches: int) -> float | None:
    """The loss of even distributions, those of outputs that know nothing; None with the Huber loss, which has no such level."""
    if args.relation_loss == "huber" and args.potential != ["none"]:
        return None
    items = args.global_views * (args.batch_size if args.relations == "batch" else 1)  # of the [CLS] structure
    others = items if args.patch_relations == "views" else patches  # of the patch structure
    choices = {"none": (args.out_dim, args.out_dim), "distance": (items - 1, others - 1), "angle": (items - 2, others - 2)}
    return sum(math.log(n) for name in set(args.potential) for n in choices[name])


def train(args) -> None:
    device = setup(args)
    train_data, test_data = load_data(args.data, args.data_path)
    recipe = apply_recipe(args, RECIPES, train_data)
    settle(args)
    student, teacher, meta = build(args)
    student.to(device)
    teacher.to(device)
    model = distributed(student)
    if args.compile:
        for network in (student, teacher):
            network.backbone.forward_features = torch.compile(network.backbone.forward_features)
    optimizer = torch.optim.AdamW(parameter_groups(student, args.weight_decay), fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")

    loader = ViewLoader(train_data, make_views(args, recipe), args.batch_size, args.seed, device, args.num_workers)

    def knn():
        return knn_accuracy(teacher.backbone, train_data, test_data, args.img_size, device, num_workers=args.num_workers,
                            dtype=args.dtype)

    run = Run(args, loader, meta, {"knn": (knn, args.knn_every)}, student=student, teacher=teacher, optimizer=optimizer,
              scaler=scaler)
    total, steps_per_epoch = run.total, run.steps_per_epoch

    peak_lr = args.lr * args.batch_size / 256
    lr = cosine_schedule(peak_lr, 1e-6, total, warmup=int(args.warmup_epochs * steps_per_epoch))
    weight_decay = cosine_schedule(args.weight_decay, args.weight_decay_end, total)
    momentum = cosine_schedule(args.momentum, 1.0, total)
    tau_patch = np.interp(range(total), [0, args.temp_epochs * steps_per_epoch], [args.teacher_temp, args.teacher_patch_temp])
    M, V, L, grid = args.batch_size, args.global_views, args.local_crops, student.backbone.grid
    N, chance = math.prod(grid), chance_level(args, math.prod(grid))
    parameters = sum(p.numel() for p in student.parameters()) / 1e6
    log(f"iBOT, potential {' + '.join(args.potential)}, {args.arch}: {parameters:.1f} M parameters, {total} steps of {M} images, "
        f"{V} global views and {L} local crops each, lr {args.lr:.1e} * {M} / 256 = {peak_lr:.1e}"
        + (f", chance level of loss {chance:.2f}" if chance else ""))
    if "angle" in args.potential and args.patch_relations == "tokens":
        log(f"angles of a view's {N} patch tokens: at {args.angle_vertices} masked ones, drawn for each step")

    def draws(step, stream, views, columns):
        """Uniform numbers of this process's images (views*B, columns), the view outermost."""
        return torch.cat([draw(args.seed, step, stream + v, M, columns)[local_rows(M)] for v in range(views)])

    for step, views, _ in run.steps():  # V global views and L local crops, (B, 3, S, S) each
        # schedules
        for group in optimizer.param_groups:
            group["lr"] = float(lr[step])
        optimizer.param_groups[0]["weight_decay"] = float(weight_decay[step])

        # views and their masks
        x, crops = torch.cat(views[:V]), torch.cat(views[V:]) if L else None  # (V*B, 3, S, S), (L*B, 3, s, s)
        masks = block_masks(draws(step, 2000, V, MASK_DRAWS), grid, args.mask_ratio, args.mask_ratio_var)  # (V*B, N)
        rows, weights = masked_rows(masks, draws(step, 2100, V, N))  # (V*B, n)
        noise = draws(step, 2200, V + L, 2 * len(student.backbone.blocks))  # ((V+L)*B, 2 * depth): stochastic depth
        masks, rows, weights, noise = (y.to(device, non_blocking=True) for y in (masks, rows, weights, noise))

        # teacher: whole views, no gradient
        with torch.no_grad(), autocast(device, args.dtype):
            t_cls, t_patch, features = teacher(x)  # (V*B, K), (V*B, N, K), (V*B, D)

        # student: masked views
        with autocast(device, args.dtype):
            s_cls, s_patch = model(x, masks, noise, crops)  # ((V+L)*B, K), (V*B, N, K)
        s_cls, t_cls = s_cls.unflatten(0, (V + L, -1)), t_cls.unflatten(0, (V, -1))  # (V+L, B, K), (V, B, K)

        # losses
        losses = {}
        for name in dict.fromkeys(args.potential):
            if name == "none":
                s, t = (torch.take_along_dim(z, rows[..., None], 1) for z in (s_patch, t_patch))  # (V*B, n, K)
                losses["loss_cls"] = cls_loss(s_cls, t_cls, teacher.centre_cls, args.student_temp, args.teacher_temp)
                losses["loss_patch"] = patch_loss(s, t, teacher.centre_patch, weights, args.student_temp, tau_patch[step])
            else:
                losses |= relational_losses(name, s_cls[:V], t_cls, s_patch, t_patch, rows, weights, args.relations,
                                            args.patch_relations, args.relation_loss, args.relation_tau, args.angle_vertices)
        loss = sum(losses.values())
        losses["loss"] = loss  # last: where a term is not finite, the term is named

        # backward and step; the head's last layer waits until the rest has settled
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if step < args.freeze_last_layer * steps_per_epoch:
            student.head.last.weight.grad = None
        norm = nn.utils.clip_grad_norm_(student.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()

        # EMA, once a step, after the student moved; and the centres
        teacher.update(student, float(momentum[step]))
        teacher.recentre(t_cls.flatten(0, 1), t_patch)

        # log, check and save, where it is due
        accuracy = (t_cls[0].argmax(-1) == s_cls[1].argmax(-1)).float().mean()  # Fig. 2
        run.end_step(step, losses, features=features[: len(x) // V], accuracy=accuracy, lr=float(lr[step]),
                     momentum=float(momentum[step]), gradient_norm=norm, chance=chance)


# ----------------------------------------------------------------------------------------------------------- attention


MOST_TOKENS = 20_000  # of an image without --img_size: a minute or so on a CPU


@torch.no_grad()
def attention_maps(backbone: VisionTransformer, x: Tensor) -> Tensor:
    """One image (1, 3, H, W) of any size that patches divide -> (heads, h, w): how the last block's [CLS] attends to patches."""
    p = backbone.patch_size
    return backbone.get_last_selfattention(x, queries=1)[0, :, 0, 1:].unflatten(1, (x.shape[-2] // p, x.shape[-1] // p))


def draw_attention(args) -> None:
    """Fig. 3 of every image for every checkpoint, one below the other: the image, each head, all heads in colour."""
    from matplotlib import colormaps

    device = setup(args)
    path = Path(args.output_dir) / "attention.png"
    refuse_to_replace([path], args.overwrite)
    images = [path for path in args.attention if Path(path).suffix.lower() in IMAGE_SUFFIXES]
    checkpoints = [path for path in args.attention if path not in images]
    if not images or not checkpoints:
        raise InputError("--attention needs at least one checkpoint and one image file")
    networks = [load_backbone(path, args.arch, args.patch_size) for path in checkpoints]
    rows = []
    for image in map(read_image, images):  # (3, H, W)
        for file, (backbone, meta) in zip(checkpoints, networks, strict=True):
            if not hasattr(backbone, "get_last_selfattention"):
                raise InputError(f"{file} is not one of this repository's ViTs: it has no attention to draw")
            x, p = image[None].to(device) / 255, backbone.patch_size  # (1, 3, H, W)
            if args.img_size:
                x = tv.resize(x, [args.img_size], antialias=True)
            elif x.shape[2] * x.shape[3] > MOST_TOKENS * p * p:
                x = tv.resize(x, [int(min(x.shape[2:]) * (MOST_TOKENS * p * p / (x.shape[2] * x.shape[3])) ** 0.5)], antialias=True)
                log(f"{x.shape[3]} x {x.shape[2]} pixels of it are enough for {MOST_TOKENS} tokens: --img_size sets another size")
            x = x[:, :, : x.shape[2] // p * p, : x.shape[3] // p * p]
            if not x.numel():
                raise InputError(f"an image of {tuple(image.shape[1:])} pixels is smaller than a patch of {p}: pass --img_size")
            maps = attention_maps(backbone.to(device), tv.normalize(x, meta["mean"], meta["std"])).cpu()  # (heads, h, w)
            maps = (maps / maps.amax((1, 2), keepdim=True)).numpy()
            hues = colormaps["hsv"](np.arange(len(maps)) / len(maps))[:, :3]  # (heads, 3)
            combined = np.einsum("nhw,nc->hwc", maps, hues)  # (h, w, 3)
            rows.append((Path(file).parent.name, [x[0].permute(1, 2, 0).cpu().numpy(), *maps, combined / combined.max()]))
    columns = max(len(pictures) for _, pictures in rows)
    figure, axes = subplots(len(rows), columns, 1.8, 1.8)
    for axis in axes.flat:
        axis.axis("off")
    for line, (name, pictures) in zip(axes, rows, strict=True):
        titles = [name, *(f"head {i + 1}" for i in range(len(pictures) - 2)), "all heads"]
        for axis, picture, title in zip(line, pictures, titles, strict=False):
            axis.imshow(picture)
            axis.set_title(title, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    log(f"wrote {path}")


# ---------------------------------------------------------------------------------------------------------- arguments


def parse_arguments(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    add_arguments(parser, "ibot_rkd")
    group = parser.add_argument_group("relations")
    group.add_argument("--potential", nargs="+", default=["distance"], choices=["none", "distance", "angle"],
                       help="one or several, their losses added; none is iBOT's own loss (default: distance)")
    group.add_argument("--relation_loss", default="ce", choices=["ce", "huber"], help="that compares structures (default: ce)")
    group.add_argument("--relations", default="image", choices=["image", "batch"], help="among whose views (default: image)")
    group.add_argument("--patch_relations", default="tokens", choices=["tokens", "views"],
                       help="of patches: among a view's tokens, or among whole views as --relations says (default: tokens)")
    group.add_argument("--relation_tau", type=at_least(1e-6), default=0.1, help="temperature of ce, both sides (default: %(default)s)")
    group.add_argument("--angle_vertices", type=at_least(1), default=8, help="masked tokens where angles are taken (default: 8)")
    group = parser.add_argument_group("views")
    group.add_argument("--global_views", type=at_least(1), help="(default: recipe; else 4 with relations, 2 without)")
    group.add_argument("--local_crops", type=at_least(0), default=0, help="for the student's [CLS] in iBOT's own loss (default: 0)")
    group.add_argument("--local_size", type=at_least(1), help="their side in pixels (default: recipe)")
    group.add_argument("--mask_ratio", type=float, default=0.3, help="share of patches masked (default: %(default)s)")
    group.add_argument("--mask_ratio_var", type=float, default=0.0, help="each view draws it from so far around (default: 0)")
    group = parser.add_argument_group("iBOT")
    group.add_argument("--hidden", type=at_least(1), help="width of the head (default: recipe)")
    group.add_argument("--out_dim", type=at_least(2), help="outputs of the head (default: recipe)")
    group.add_argument("--pos_embed", choices=["learnt", "sincos"], help="positions (default: recipe)")
    group.add_argument("--drop_path", type=at_least(0.0, 0.99), help="stochastic depth of the student (default: recipe)")
    group.add_argument("--momentum", type=at_least(0.0), help="of the teacher at the start, rising to 1 (default: recipe)")
    group.add_argument("--student_temp", type=at_least(1e-6), default=0.1, help="temperature (default: %(default)s)")
    group.add_argument("--teacher_temp", type=at_least(1e-6), help="temperature, of [CLS] (default: recipe)")
    group.add_argument("--teacher_patch_temp", type=at_least(1e-6), help="of patches, after a rise (default: recipe)")
    group.add_argument("--temp_epochs", type=at_least(0.0), help="that the rise from --teacher_temp takes (default: recipe)")
    group.add_argument("--weight_decay_end", type=at_least(0.0), default=0.4, help="reached along a cosine (default: %(default)s)")
    group.add_argument("--clip_grad", type=at_least(1e-9), default=3.0, help="largest norm of the gradient (default: %(default)s)")
    group.add_argument("--freeze_last_layer", type=at_least(0.0), default=1.0, help="epochs in which it stays (default: 1)")
    parser.add_argument("--attention", nargs="+", type=existing_file, metavar="FILE", help="draw Fig. 3 for these checkpoints and images instead")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse_arguments()
    launch(lambda: draw_attention(arguments) if arguments.attention else train(arguments))
