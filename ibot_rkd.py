"""Masked Relational Knowledge Distillation for Self-Supervised Learning (McIntyre Garcia): iBOT
that compares structures.

The idea. iBOT trains a student on masked views to give, for [CLS] and for each masked patch, the
output that its EMA teacher gives for whole views. Relational distillation does not compare outputs
with outputs: it forms the structure of several outputs on each side, all their distances (RKD-D) or
all their angles (RKD-A), and compares structure with structure. The outputs may turn, shift and
grow, as long as they stay arranged as the teacher's.

    V views of -+- masked: student backbone -> head -> s: [CLS] (V, K), patches (V, N, K) -> psi(s)
    an image    |            | EMA                                                            | loss
                +- whole:  teacher backbone -> head -> t: [CLS] (V, K), patches (V, N, K) -> psi(t)

    psi_D(i, j) = |t_i - t_j| / u               u: mean distance of different items         Eq. 1
    psi_A(i, j, k) = cos of the angle at t_j    by the law of cosines on psi_D              Eq. 3
    ce:    H(softmax_j -psi_D(t_i, t_j) / tau, softmax_j -psi_D(s_i, s_j) / tau), mean over i
           H(softmax_k psi_A(t_i, t_j, t_k) / tau, the student's), mean over vertices j and ends i
    huber: smooth L1 of psi(t) and psi(s), mean over all entries                   Eqs. 2, 4
    L = sum over potentials of loss_*_cls (items: V views) and loss_*_patch (items: N patch tokens)

The losses move the student's backbone and head, but the head's last layer only from the second
epoch on; the teacher moves by EMA. A structure does not see the teacher's centring (a shift) nor a
temperature of the outputs (a scale): both belong to iBOT's own loss, `--potential none`, which is
the baseline (KD) and can be added. Of a patch structure only the rows of masked tokens count.

Memory grows with the entries of a structure, n^2 for distances of n items and n^3 for angles, but
only `ENTRIES` of them exist at once, and never with K on top of that.

Symbols: B images of this process, M of the global batch, V global views, L local crops, N patch
tokens, D width, K outputs of the head, P groups of V items of which n rows (for angles: vertices)
are compared, tau temperature, m momentum.

    python ibot_rkd.py                                               iBOT & RKD-D on digits
    python ibot_rkd.py --potential angle --output_dir runs/angle     RKD-A; none: iBOT & KD
    torchrun --nproc_per_node=4 ibot_rkd.py --data cifar10 --potential distance angle \
        --relations batch
    python eval_linear.py --checkpoint runs/ibot_rkd/checkpoint.pth --data digits --cached
    python eval_linear.py --checkpoint runs/ibot_rkd/checkpoint.pth --data digits --finetune all \
        --pool cls                                                   Table 1: linear, [CLS]
    python ibot_rkd.py --attention runs/ibot_rkd/checkpoint.pth runs/angle/checkpoint.pth photo.jpg
                                                                     Fig. 3

Measured: the first command (30 epochs, seed 0, 2.1 minutes on two CPU cores) takes k-NN from 67.2 %
to 75.0 %; the second, RKD-A, to 76.7 %; iBOT alone, with as many views, to 78.1 %. Table 1's
protocol at CIFAR scale: .github/RESULTS.md.

    what                 paper                   released code            here
    what is compared     cross-entropy or Huber  raw distances, least     ce of softmaxes, one tau,
                                                 elsewhere than at s = t  least at s = t; or huber
    student's tau        not said                applied twice, KD too    once in KD
    distances            over their mean         mixed: equal rows at     Eq. 1: equal rows at 0,
                                                 0.95 of the mean         without gradient
    items                views of one image      views of the batch       of an image; --relations
    views                more than iBOT's 2      not said                 4; --global_views
    patch structure      of patch outputs        of views                 of tokens;
                                                                          --patch_relations views
    masks                student's views         enter as distances       student's views
    angles at batch 256  fell to batch 16        -                        in pieces: < 2 GiB
    clipping at 3        not said                each tensor's gradient   the whole gradient
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

from common import (IMAGE_SUFFIXES, MEAN, STD, InputError, Parser, Run, View, ViewLoader,
                    VisionTransformer, add_arguments, apply_recipe, at_least, autocast, byol_views,
                    cosine_schedule, create_backbone, distributed, draw, ema_update, existing_file,
                    fp32, gather, knn_accuracy, launch, load_backbone, load_data, local_rows, log,
                    mean_over_processes, parameter_groups, read_image, refuse_to_replace, setup,
                    start_from, subplots)

# -------------------------------------------------------------------------------------- recipes

RECIPES = {
    # found by trial on two CPU cores, digits alone: a low rate after a long warm-up helps most. In
    # so few steps positions are not learnt; and iBOT's teacher temperature of 0.04 lets its own
    # loss collapse to even outputs
    "digits": dict(
        arch="vit_nano", img_size=16, patch_size=4, pos_embed="sincos", epochs=30, batch_size=32,
        lr=2e-3, warmup_epochs=10, weight_decay=0.04, momentum=0.99, hidden=128, out_dim=128,
        drop_path=0.1, teacher_temp=0.02, teacher_patch_temp=0.04, temp_epochs=10, global_views=4,
        local_size=8, local_scale=(0.1, 0.3), views=dict(scale=(0.3, 1.0), flip=0.0, blur=False)),
    "mnist": dict(
        arch="vit_nano", img_size=28, patch_size=7, pos_embed="sincos", epochs=5, batch_size=64,
        lr=2e-3, warmup_epochs=1.5, weight_decay=0.04, momentum=0.99, hidden=128, out_dim=256,
        drop_path=0.1, teacher_temp=0.02, teacher_patch_temp=0.04, temp_epochs=1.5, global_views=4,
        local_size=14, local_scale=(0.1, 0.3), views=dict(scale=(0.3, 1.0), flip=0.0, blur=False)),
    # the paper, Sec. 3.4, on a tenth of ImageNet at 32 pixels: iBOT's settings but for ViT-S/8,
    # the batch and the epochs
    "cifar10": dict(
        arch="vit_small", img_size=32, patch_size=8, pos_embed="learnt", epochs=40, batch_size=256,
        lr=5e-4, warmup_epochs=10, weight_decay=0.04, momentum=0.996, hidden=2048, out_dim=8192,
        drop_path=0.1, teacher_temp=0.04, teacher_patch_temp=0.07, temp_epochs=30,
        global_views=None, local_size=16, local_scale=(0.05, 0.25),
        views=dict(scale=(0.14, 1.0), blur=False)),
    "imagenet": dict(  # iBOT
        arch="vit_small", img_size=224, patch_size=16, pos_embed="learnt", epochs=800,
        batch_size=1024, lr=5e-4, warmup_epochs=10, weight_decay=0.04, momentum=0.996, hidden=2048,
        out_dim=8192, drop_path=0.1, teacher_temp=0.04, teacher_patch_temp=0.07, temp_epochs=30,
        global_views=None, local_size=96, local_scale=(0.05, 0.25),
        views=dict(scale=(0.14, 1.0))),
}

# --------------------------------------------------------------------------------------- losses

ENTRIES = 2**23  # of a structure that exist at once: 32 MiB in fp32 for each intermediate result


@fp32
def distance_potential(z: Tensor) -> Tensor:
    """(..., V, D) -> (..., V, V): distances over the mean distance of different items.

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
    # written so that what is not a number stays one, for the watch on losses to see
    apart = ~(squared <= 64 * torch.finfo(z.dtype).eps * sums)
    distances = torch.where(apart, squared, 1).sqrt() * apart  # no square root of 0: its gradient
    V = z.shape[-2]
    u = distances.sum((-2, -1), keepdim=True) / max(V * (V - 1), 1)  # (..., 1, 1)
    return distances / u.clamp(min=torch.finfo(z.dtype).tiny)  # Eq. 1


def angles_at(sides: Tensor, vertices: Tensor) -> Tensor:
    """Distances (P, V, V) and vertices (P, n) -> (P, n, V, V): cosine of the angle i, vertex, k by
    the law of cosines; 0 where i is k or an end lies on the vertex."""
    a = torch.take_along_dim(sides, vertices[..., None], 1)  # (P, n, V)
    over = (a != 0) / torch.where(a != 0, a, 1)  # 1 / a, and 0 for an end on the vertex
    cosine = a[..., :, None] ** 2 + a[..., None, :] ** 2 - sides[:, None] ** 2  # (P, n, V, V)
    cosine = cosine * (over / 2)[..., :, None] * over[..., None, :]  # Eq. 3
    same = torch.eye(a.shape[-1], dtype=torch.bool, device=a.device)
    return cosine.clamp(-1, 1).masked_fill(same, 0)


def angle_potential(z: Tensor) -> Tensor:
    """(..., V, D) -> (..., V, V, V): entry [i, j, k] is the cosine of the angle at vertex j."""
    sides = distance_potential(z)  # (..., V, V)
    V = sides.shape[-1]
    groups = sides.reshape(-1, V, V)  # (P, V, V)
    vertices = torch.arange(V, device=z.device).expand(len(groups), V)
    angles = angles_at(groups, vertices)  # (P, V, V, V), the vertex first
    return angles.transpose(1, 2).reshape(*sides.shape, V)


def rkd_loss(s: Tensor, t: Tensor, potential, kind: str = "ce", tau: float = 0.1,
             rows: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """Relational loss of student and teacher features (..., V, D), each group of V items by itself;
    the widths D may differ.

    potential: distance_potential or angle_potential. kind: "huber" or "ce". rows (..., n): the
    items whose rows are compared (for angles: the vertices), default all; weights (..., n) sum to
    1, default equal.
    """
    V = s.shape[-2]
    groups = s.shape[:-2]
    s = s.reshape(-1, *s.shape[-2:])  # (P, V, D)
    t = t.detach().reshape(-1, *t.shape[-2:])  # (P, V, D')
    if rows is None:
        rows = torch.arange(V, device=s.device)
    rows = rows.expand(*groups, rows.shape[-1]).reshape(len(s), -1)  # (P, n)
    angles = potential is angle_potential
    s = in_pieces(distance_potential, s, 0, s[0].numel())  # (P, V, V)
    t = in_pieces(distance_potential, t, 0, t[0].numel())  # (P, V, V)
    losses = in_pieces(lambda part: row_losses(s, t, part, angles, kind, tau), rows, 1,
                       len(s) * V ** (2 if angles else 1))  # (P, n)
    if weights is None:
        return losses.mean()
    return (losses * weights.reshape(len(s), -1)).sum(1).mean()


def row_losses(s: Tensor, t: Tensor, rows: Tensor, angles: bool, kind: str, tau: float) -> Tensor:
    """Distances of student and teacher (P, V, V) -> (P, n): the loss of each row or vertex (P, n).

    "ce": softmax over j of -distance / tau in row i, or over k of cosine / tau at vertex j for each
    end i, turns a structure into distributions; an item with itself is left out.
    """
    V = s.shape[-1]
    if angles:
        psi_s = angles_at(s, rows)  # (P, n, V, V)
        psi_t = angles_at(t, rows)  # (P, n, V, V)
    else:
        psi_s = torch.take_along_dim(s, rows[..., None], 1)  # (P, n, V)
        psi_t = torch.take_along_dim(t, rows[..., None], 1)  # (P, n, V)
    if kind == "huber":
        return F.smooth_l1_loss(psi_s, psi_t, reduction="none").flatten(2).mean(2)  # Eqs. 2, 4
    itself = rows[..., None] == torch.arange(V, device=s.device)  # (P, n, V)
    if not angles:
        return cross_entropy(-psi_s / tau, -psi_t / tau, itself)  # Eq. 2 as a cross-entropy
    left_out = itself[..., None, :] | torch.eye(V, dtype=torch.bool, device=s.device)
    losses = cross_entropy(psi_s / tau, psi_t / tau, left_out)  # (P, n, V), Eq. 4 likewise
    return (losses * ~itself).sum(-1) / (V - 1)


def cross_entropy(s: Tensor, t: Tensor, left_out: Tensor) -> Tensor:
    """Logits (..., V) of student and teacher -> (...), without the entries that are left out."""
    target = t.masked_fill(left_out, -1e30).softmax(-1)
    return -(target * s.masked_fill(left_out, -1e30).log_softmax(-1)).sum(-1)


def in_pieces(function, x: Tensor, dim: int, entries: int) -> Tensor:
    """function(x), made along `dim` in pieces that hold ENTRIES numbers at most, where one step
    along it takes `entries`, and made again in the backward pass: so memory is bounded."""
    parts = x.split(max(1, ENTRIES // entries), dim)
    results = [checkpoint(function, part, use_reentrant=False, preserve_rng_state=False)
               for part in parts]
    return torch.cat(results, dim)


@fp32
def cls_loss(s: Tensor, t: Tensor, centre: Tensor, tau_s: float = 0.1,
             tau_t: float = 0.04) -> Tensor:
    """iBOT's [CLS] loss: cross-entropy of student views (V+L, B, K) with teacher views (V, B, K),
    mean over pairs. The student's first V views are the teacher's, and no view meets itself."""
    target = ((t - centre) / tau_t).softmax(-1)
    log_q = (s / tau_s).log_softmax(-1)
    pairs = -(target.flatten(1) @ log_q.flatten(1).T) / t.shape[1]  # (V, V+L)
    others = 1 - torch.eye(*pairs.shape, device=s.device)  # (V, V+L)
    return (pairs * others).sum() / others.sum()


@fp32
def patch_loss(s: Tensor, t: Tensor, centre: Tensor, weights: Tensor, tau_s: float = 0.1,
               tau_t: float = 0.07) -> Tensor:
    """iBOT's patch loss: cross-entropy at n masked tokens of P views (P, n, K), whose weights
    (P, n) sum to 1 in each view."""
    target = ((t - centre) / tau_t).softmax(-1)
    log_q = (s / tau_s).log_softmax(-1)
    return -((target * log_q).sum(-1) * weights).sum(1).mean()


def relational_losses(name: str, s_cls: Tensor, t_cls: Tensor, s_patch: Tensor, t_patch: Tensor,
                      rows: Tensor, weights: Tensor, relations="image", patch_relations="tokens",
                      kind="ce", tau=0.1, vertices=8) -> dict[str, Tensor]:
    """Structures of [CLS] outputs (V, B, K) and of patch outputs (V*B, N, K) -> two terms.

    relations: the items are the views of one "image", or all views of the global "batch".
    patch_relations: the items are the "tokens" of one view, and only the rows (V*B, n) of masked
    ones count; or "views", with all their tokens side by side.
    """
    potential = {"distance": distance_potential, "angle": angle_potential}[name]

    def among_views(s, t):  # (V, B, D) each
        s = s.transpose(0, 1)  # (B, V, D): B groups
        t = t.transpose(0, 1)
        if relations == "image":
            return rkd_loss(s, t, potential, kind, tau)
        s = gather(s.contiguous()).flatten(0, 1)  # (M*V, D): one group
        t = gather(t.contiguous()).flatten(0, 1)
        mine = torch.arange(len(s), device=s.device)[local_rows(len(s))]  # (B*V,)
        return rkd_loss(s, t, potential, kind, tau, mine)

    cls = among_views(s_cls, t_cls)
    if patch_relations == "views":
        s = s_patch.unflatten(0, t_cls.shape[:2]).flatten(2)  # (V, B, N*K)
        t = t_patch.unflatten(0, t_cls.shape[:2]).flatten(2)
        patch = among_views(s, t)
    else:
        if name == "angle":  # some of the masked tokens, which are in random order
            rows = rows[:, :vertices]  # (V*B, n)
            weights = F.normalize(weights[:, :vertices], p=1, dim=1)
        patch = rkd_loss(s_patch, t_patch, potential, kind, tau, rows, weights)
    return {f"loss_{name}_cls": cls, f"loss_{name}_patch": patch}


# ---------------------------------------------------------------------------------------- masks

BLOCKS = 20  # drawn for one mask
ASPECT = 0.3  # of a block: from this to its inverse
MASK_DRAWS = 1 + 4 * BLOCKS


def block_masks(u: Tensor, grid: tuple[int, int], ratio: float, variation: float = 0.0) -> Tensor:
    """Uniform numbers (B, MASK_DRAWS) -> bool (B, N): block-wise masks, of exactly round(N * r)
    patches, at least one, with r from ratio - variation to ratio + variation.

    Blocks are laid until so many patches are masked; the last is cut.
    """
    H, W = grid
    count = H * W * (ratio + variation * (2 * u[:, :1] - 1))
    count = count.round().clamp(1, H * W)  # (B, 1)
    area, aspect, top, left = u[:, 1:].view(len(u), 4, BLOCKS).unbind(1)  # (B, blocks) each
    least = count.clamp(max=max(1, (min(H, W) // 3) ** 2))  # (B, 1)
    area = least + (count - least) * area
    aspect = torch.exp((2 * aspect - 1) * math.log(1 / ASPECT))
    h = (area * aspect).sqrt().round().clamp(1, H)
    w = (area / aspect).sqrt().round().clamp(1, W)
    top = (top * (H - h + 1)).floor()
    left = (left * (W - w + 1)).floor()
    y = torch.arange(H)[:, None]
    x = torch.arange(W)
    h, w, top, left = (v[:, :, None, None] for v in (h, w, top, left))
    inside = (y >= top) & (y < top + h) & (x >= left) & (x < left + w)  # (B, blocks, H, W)
    inside = inside.flatten(2)  # (B, blocks, N)
    # the block that covers a patch first; in this order, and then in reading order, patches count
    first = torch.where(inside.any(1), inside.int().argmax(1), BLOCKS)  # (B, N)
    order = first * (H * W) + torch.arange(H * W)
    places = order.argsort(1).argsort(1)  # (B, N)
    return places < count


def masked_rows(masks: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Masks (P, N), uniform numbers (P, N) -> rows (P, n) and weights (P, n): each view's masked
    tokens, in random order.

    The weights of a view are equal and sum to 1; rows that only fill up a view weigh 0.
    """
    counts = masks.sum(1, keepdim=True)  # (P, 1)
    n = int(counts.max())
    rows = torch.where(masks, u, u + 1).argsort(1)[:, :n]  # masked tokens first
    return rows, (torch.arange(n) < counts) / counts


# ---------------------------------------------------------------------------------------- model


class Head(nn.Module):
    """MLP -> bottleneck -> K cosines with unit prototypes: L2 norm, and a weight-normalised linear
    layer whose gains stay 1."""

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
    """Backbone, and one head that [CLS] and patch tokens share."""

    def __init__(self, backbone: VisionTransformer, hidden: int, out_dim: int):
        super().__init__()
        self.backbone = backbone
        self.head = Head(backbone.embed_dim, hidden, out_dim)

    def forward(self, x: Tensor, masks: Tensor, noise: Tensor,
                crops: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Global views (V*B, 3, S, S) under masks (V*B, N), local crops (L*B, 3, s, s) -> outputs
        of [CLS] ((V+L)*B, K) and of patches (V*B, N, K)."""
        z = self.head(self.backbone.forward_features(x, masks, noise[: len(x)]))  # (V*B, 1+N, K)
        cls = z[:, 0]
        if crops is not None:
            h = self.backbone.forward_features(crops, noise=noise[len(x) :])[:, 0]  # (L*B, D)
            cls = torch.cat([cls, self.head(h)])  # ((V+L)*B, K)
        return cls, z[:, 1:]


class Teacher(nn.Module):
    """The student's twin, moved only by EMA, without masks and stochastic depth; it keeps the
    centres of its outputs. Frozen, in evaluation mode."""

    def __init__(self, student: Student):
        super().__init__()
        self.backbone = copy.deepcopy(student.backbone)
        self.head = copy.deepcopy(student.head)
        K = self.head.last.out_features
        self.register_buffer("centre_cls", torch.zeros(K))
        self.register_buffer("centre_patch", torch.zeros(K))
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Global views (V*B, 3, S, S) -> [CLS] (V*B, K), patches (V*B, N, K), and the backbone's
        [CLS] (V*B, D)."""
        h = self.backbone.forward_features(x)  # (V*B, 1+N, D)
        z = self.head(h)  # (V*B, 1+N, K)
        return z[:, 0], z[:, 1:], h[:, 0]

    @torch.no_grad()
    def recentre(self, cls: Tensor, patches: Tensor, momentum: float = 0.9) -> None:
        """Moves the centres towards the mean outputs of the global batch."""
        means = torch.stack([cls.float().mean(0), patches.float().mean((0, 1))])  # (2, K)
        means = mean_over_processes(means)
        self.centre_cls.lerp_(means[0], 1 - momentum)
        self.centre_patch.lerp_(means[1], 1 - momentum)


def build(args) -> tuple[Student, Teacher, dict]:
    """-> student, teacher, and what a reader of the checkpoint must know of the backbone."""
    options = dict(arch=args.arch, img_size=args.img_size, patch_size=args.patch_size,
                   pos_embed=args.pos_embed)
    if not hasattr(create_backbone(**options), "forward_features"):
        raise InputError(f"--arch {args.arch} has no patch tokens to mask: use one of this "
                         f"repository's ViTs, such as vit_small")
    backbone = create_backbone(**options, drop_path=args.drop_path, mask_token=True)
    if args.init:
        start_from(backbone, args.init)
    student = Student(backbone, args.hidden, args.out_dim)
    meta = dict(method="ibot_rkd", network="teacher", backbone=options, mean=MEAN, std=STD)
    return student, Teacher(student), meta


# ------------------------------------------------------------------------------------- training


def make_views(args, recipe: dict) -> list[View]:
    """Global views, BYOL's two kinds in turn, then local crops; with these, global crops start
    where local ones end."""
    options = dict(recipe["views"])
    if args.local_crops:
        options["scale"] = (recipe["local_scale"][1], 1.0)
    first, second = byol_views(args.img_size, **options)
    if first.blur == 0:  # small images are neither blurred nor solarized
        second = dataclasses.replace(second, solarize=0.0)
    local = dataclasses.replace(first, size=args.local_size, scale=recipe["local_scale"],
                                blur=0.5 * first.blur)
    views = [first if v % 2 == 0 else second for v in range(args.global_views)]
    return views + [local] * args.local_crops


def complete(args) -> None:
    """Fills in the number of views, which depends on the potentials; refuses too few items."""
    relations = [name for name in args.potential if name != "none"]
    if args.global_views is None:
        args.global_views = 4 if relations else 2
    least = 2
    if relations and args.relations == "image":
        least = 4 if "angle" in relations else 3
    if args.global_views < least:
        raise InputError(f"--global_views {args.global_views} are too few: --potential "
                         f"{' '.join(args.potential)} needs {least}")
    tokens = args.patch_relations == "tokens"
    if relations and tokens and args.img_size // args.patch_size < 3:
        raise InputError(f"--patch_size {args.patch_size} of --img_size {args.img_size} gives too "
                         f"few patches to relate: lower it")
    if args.local_crops and "none" not in args.potential:
        raise InputError("--local_crops are for the student alone, so they have no part in "
                         "relations: add none to --potential")
    if args.local_crops and args.local_size % args.patch_size:
        raise InputError(f"--local_size {args.local_size} is not a multiple of --patch_size "
                         f"{args.patch_size}")
    low = args.mask_ratio - args.mask_ratio_var
    high = args.mask_ratio + args.mask_ratio_var
    if not 0 < low <= high <= 1:
        raise InputError(f"--mask_ratio and --mask_ratio_var mask {low:g} to {high:g} of the "
                         f"patches: stay above 0 and up to 1")


def chance_level(args, patches: int) -> float | None:
    """The loss of even distributions, those of outputs that know nothing; the Huber loss has no
    such level."""
    if args.relation_loss == "huber" and args.potential != ["none"]:
        return None
    items = args.global_views  # of the [CLS] structure
    if args.relations == "batch":
        items *= args.batch_size
    others = items if args.patch_relations == "views" else patches  # of the patch structure
    choices = {"none": (args.out_dim, args.out_dim), "distance": (items - 1, others - 1),
               "angle": (items - 2, others - 2)}
    return sum(math.log(n) for name in dict.fromkeys(args.potential) for n in choices[name])


def losses_of(args, s_cls: Tensor, t_cls: Tensor, s_patch: Tensor, t_patch: Tensor, rows: Tensor,
              weights: Tensor, teacher: Teacher, tau_patch: float) -> dict[str, Tensor]:
    """The terms of all potentials, of [CLS] (V+L, B, K) and (V, B, K) and patches (V*B, N, K)."""
    losses = {}
    for name in dict.fromkeys(args.potential):
        if name == "none":
            s = torch.take_along_dim(s_patch, rows[..., None], 1)  # (V*B, n, K)
            t = torch.take_along_dim(t_patch, rows[..., None], 1)  # (V*B, n, K)
            losses["loss_cls"] = cls_loss(s_cls, t_cls, teacher.centre_cls, args.student_temp,
                                          args.teacher_temp)
            losses["loss_patch"] = patch_loss(s, t, teacher.centre_patch, weights,
                                              args.student_temp, tau_patch)
        else:
            losses |= relational_losses(name, s_cls[: len(t_cls)], t_cls, s_patch, t_patch, rows,
                                        weights, args.relations, args.patch_relations,
                                        args.relation_loss, args.relation_tau, args.angle_vertices)
    return losses


def draws(args, step: int, stream: int, views: int, columns: int) -> Tensor:
    """Uniform numbers of this process's images (views*B, columns), the view outermost."""
    mine = local_rows(args.batch_size)
    parts = [draw(args.seed, step, stream + v, args.batch_size, columns)[mine]
             for v in range(views)]
    return torch.cat(parts)


def draw_masks(args, step: int, V: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Masks (V*B, N) of a step, the rows that they mask (V*B, n), and the weights of these."""
    u = draws(args, step, 2000, V, MASK_DRAWS)
    masks = block_masks(u, grid, args.mask_ratio, args.mask_ratio_var)
    return masks, *masked_rows(masks, draws(args, step, 2100, V, math.prod(grid)))


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
    if args.compile:
        for backbone in (student.backbone, teacher.backbone):
            backbone.forward_features = torch.compile(backbone.forward_features)
    groups = parameter_groups(student, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")

    # the run: V global views and L local crops of each image, k-NN of the teacher
    views = make_views(args, recipe)
    loader = ViewLoader(train_data, views, args.batch_size, args.seed, device, args.num_workers)

    def knn():
        return knn_accuracy(teacher.backbone, train_data, test_data, args.img_size, device,
                            num_workers=args.num_workers, dtype=args.dtype)

    run = Run(args, loader, meta, {"knn": (knn, args.knn_every)}, student=student, teacher=teacher,
              optimizer=optimizer, scaler=scaler)

    # schedules, a value for each step
    peak_lr = args.lr * args.batch_size / 256
    epoch = run.steps_per_epoch
    lr = cosine_schedule(peak_lr, 1e-6, run.total, int(args.warmup_epochs * epoch))
    weight_decay = cosine_schedule(args.weight_decay, args.weight_decay_end, run.total)
    momentum = cosine_schedule(args.momentum, 1.0, run.total)
    tau_patch = np.interp(range(run.total), [0, args.temp_epochs * epoch],
                          [args.teacher_temp, args.teacher_patch_temp])
    V = args.global_views
    grid = student.backbone.grid
    N = math.prod(grid)
    depth = len(student.backbone.blocks)
    log_plan(args, run.total, peak_lr, student, N)

    for step, views, _ in run.steps():  # V global views and L local crops, (B, 3, S, S) each
        # schedules
        for group in optimizer.param_groups:
            group["lr"] = float(lr[step])
        optimizer.param_groups[0]["weight_decay"] = float(weight_decay[step])

        # views: masks, rows of masked tokens, stochastic depth
        x = torch.cat(views[:V])  # (V*B, 3, S, S)
        crops = torch.cat(views[V:]) if args.local_crops else None  # (L*B, 3, s, s)
        masks, rows, weights = (y.to(device, non_blocking=True)
                                for y in draw_masks(args, step, V, grid))
        noise = draws(args, step, 2200, len(views), 2 * depth).to(device, non_blocking=True)

        # teacher: whole views, no gradient
        with torch.no_grad(), autocast(device, args.dtype):
            t_cls, t_patch, features = teacher(x)  # (V*B, K), (V*B, N, K), (V*B, D)

        # student: masked views
        with autocast(device, args.dtype):
            s_cls, s_patch = model(x, masks, noise, crops)  # ((V+L)*B, K), (V*B, N, K)
        s_cls = s_cls.unflatten(0, (len(views), -1))  # (V+L, B, K)
        t_cls = t_cls.unflatten(0, (V, -1))  # (V, B, K)

        # losses
        losses = losses_of(args, s_cls, t_cls, s_patch, t_patch, rows, weights, teacher,
                           tau_patch[step])
        loss = sum(losses.values())
        losses["loss"] = loss

        # backward and step; the head's last layer waits until the rest has settled
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if step < args.freeze_last_layer * epoch:
            student.head.last.weight.grad = None
        norm = nn.utils.clip_grad_norm_(student.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()

        # EMA, once a step, after the student moved; and the centres
        ema_update(student, teacher, float(momentum[step]))
        teacher.recentre(t_cls.flatten(0, 1), t_patch)

        # log, check and save, where it is due
        accuracy = (t_cls[0].argmax(-1) == s_cls[1].argmax(-1)).float().mean()  # Fig. 2
        run.end_step(step, losses, features=features[: len(x) // V], accuracy=accuracy,
                     lr=float(lr[step]), momentum=float(momentum[step]), gradient_norm=norm,
                     chance=chance_level(args, N))


def log_plan(args, steps: int, peak_lr: float, student: Student, N: int) -> None:
    parameters = sum(p.numel() for p in student.parameters()) / 1e6
    log(f"iBOT, potential {' + '.join(args.potential)}, {args.arch}: {parameters:.1f} M "
        f"parameters, {steps} steps of {args.batch_size} images, {args.global_views} global views "
        f"and {args.local_crops} local crops each, lr {args.lr:.1e} * {args.batch_size} / 256 = "
        f"{peak_lr:.1e}")
    chance = chance_level(args, N)
    if chance:
        log(f"chance level of loss {chance:.2f}")
    if "angle" in args.potential and args.patch_relations == "tokens":
        log(f"angles of a view's {N} patch tokens: at {args.angle_vertices} masked ones, drawn for "
            f"each step")


# ------------------------------------------------------------------------------------ arguments


def parse_arguments(argv=None):
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_arguments(parser, "ibot_rkd")
    add = parser.add_argument_group("relations").add_argument
    add("--potential", nargs="+", default=["distance"], choices=["none", "distance", "angle"],
        help="one or several, their losses added; none is iBOT's own loss (default: distance)")
    add("--relation_loss", default="ce", choices=["ce", "huber"], help="comparison of structures")
    add("--relations", default="image", choices=["image", "batch"], help="whose views are related")
    add("--patch_relations", default="tokens", choices=["tokens", "views"],
        help="patches: the tokens of a view, or whole views as --relations says")
    add("--relation_tau", type=at_least(1e-6), default=0.1, help="temperature of ce (default: 0.1)")
    add("--angle_vertices", type=at_least(1), default=8, help="masked tokens with angles (8)")
    add = parser.add_argument_group("views").add_argument
    add("--global_views", type=at_least(1), help="(recipe; else 4 with relations, 2 without)")
    add("--local_crops", type=at_least(0), default=0, help="crops for the student's [CLS] in iBOT")
    add("--local_size", type=at_least(1), help="their side in pixels (default: recipe)")
    add("--mask_ratio", type=float, default=0.3, help="share of masked patches (default: 0.3)")
    add("--mask_ratio_var", type=float, default=0.0, help="variation of that share between views")
    add = parser.add_argument_group("iBOT (defaults: recipe)").add_argument
    add("--hidden", type=at_least(1), help="width of the head")
    add("--out_dim", type=at_least(2), help="outputs of the head")
    add("--pos_embed", choices=["learnt", "sincos"], help="positions")
    add("--drop_path", type=at_least(0.0, 0.99), help="stochastic depth of the student")
    add("--momentum", type=at_least(0.0), help="the teacher's first, rising to 1")
    add("--student_temp", type=at_least(1e-6), default=0.1, help="temperature (default: 0.1)")
    add("--teacher_temp", type=at_least(1e-6), help="temperature of [CLS]")
    add("--teacher_patch_temp", type=at_least(1e-6), help="temperature of patches, after a rise")
    add("--temp_epochs", type=at_least(0.0), help="epochs of the rise from --teacher_temp")
    add("--weight_decay_end", type=at_least(0.0), default=0.4, help="end of a cosine (0.4)")
    add("--clip_grad", type=at_least(1e-9), default=3.0, help="largest norm of the gradient (3)")
    add("--freeze_last_layer", type=at_least(0.0), default=1.0, help="epochs without it (1)")
    parser.add_argument("--attention", nargs="+", type=existing_file, metavar="FILE",
                        help="draw Fig. 3 of these checkpoints and images instead")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------- attention (Fig. 3)

MOST_TOKENS = 20_000  # of an image without --img_size: a minute or so on a CPU


@torch.no_grad()
def attention_maps(backbone: VisionTransformer, x: Tensor) -> Tensor:
    """One image (1, 3, H, W) of any size that patches divide -> (heads, h, w): how the last block's
    [CLS] attends to patches."""
    grid = backbone.grid_of(*x.shape[-2:])
    return backbone.get_last_selfattention(x, queries=1)[0, :, 0, 1:].unflatten(1, grid)


def prepare_image(image: Tensor, size: int | None, patch: int) -> Tensor:
    """uint8 (3, H, W) -> (1, 3, H', W') in [0, 1], of whole patches."""
    x = image[None] / 255
    H, W = x.shape[2:]
    most = MOST_TOKENS * patch * patch  # pixels
    if not size and H * W > most:
        size = int(min(H, W) * (most / (H * W)) ** 0.5)
        log(f"{W} x {H} pixels are more than enough for {MOST_TOKENS} tokens: shrunk; --img_size "
            f"sets another size")
    if size:
        x = tv.resize(x, [size], antialias=True)
    x = x[:, :, : x.shape[2] // patch * patch, : x.shape[3] // patch * patch]
    if not x.numel():
        raise InputError(f"an image of {(H, W)} pixels is smaller than a patch of {patch}: pass "
                         f"--img_size")
    return x


def draw_attention(args) -> None:
    """Every image for every checkpoint, one below the other: itself, each head, all in colour."""
    from matplotlib import colormaps

    device = setup(args)
    target = Path(args.output_dir) / "attention.png"
    refuse_to_replace([target], args.overwrite)
    images = [path for path in args.attention if Path(path).suffix.lower() in IMAGE_SUFFIXES]
    checkpoints = [path for path in args.attention if path not in images]
    if not images or not checkpoints:
        raise InputError("--attention needs at least one checkpoint and one image file")
    networks = []
    for path in checkpoints:
        backbone, meta = load_backbone(path, args.arch, args.patch_size)
        if not hasattr(backbone, "get_last_selfattention"):
            raise InputError(f"{path} is not one of this repository's ViTs: it has no attention to "
                             f"draw")
        networks.append((Path(path).parent.name, backbone.to(device), meta))
    lines = []
    for path in images:
        image = read_image(path)  # (3, H, W)
        for name, backbone, meta in networks:
            x = prepare_image(image.to(device), args.img_size, backbone.patch_size)
            x_normalised = tv.normalize(x, list(meta["mean"]), list(meta["std"]))
            maps = attention_maps(backbone, x_normalised).cpu()  # (heads, h, w)
            maps = (maps / maps.amax((1, 2), keepdim=True)).numpy()
            hues = colormaps["hsv"](np.arange(len(maps)) / len(maps))[:, :3]  # (heads, 3)
            combined = np.einsum("nhw,nc->hwc", maps, hues)  # (h, w, 3)
            pictures = [x[0].permute(1, 2, 0).cpu().numpy(), *maps, combined / combined.max()]
            lines.append((name, pictures))
    columns = max(len(pictures) for _, pictures in lines)
    figure, axes = subplots(len(lines), columns, 1.8, 1.8)
    for axis in axes.flat:
        axis.axis("off")
    for line, (name, pictures) in zip(axes, lines, strict=True):
        titles = [name, *(f"head {i + 1}" for i in range(len(pictures) - 2)), "all heads"]
        for axis, picture, title in zip(line, pictures, titles, strict=False):
            axis.imshow(picture)
            axis.set_title(title, fontsize=7)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=100)
    log(f"wrote {target}")


if __name__ == "__main__":
    arguments = parse_arguments()
    launch(lambda: draw_attention(arguments) if arguments.attention else train(arguments))
