"""SDSSL: Self-Distilled Self-Supervised Representation Learning (Jang et al.), for SimCLR,
BYOL and MoCo v3.

The idea. A contrastive method trains the last layer of a ViT; the layers below learn only
what helps the last. SDSSL gives every layer the same task: a head of its own turns its [CLS]
token into a query that must find the teacher's *final* output of the image's other view.
Lower layers become good features, which makes the last layer's task easier too.

    view 1 -> student: backbone, projectors, predictors -> q_1 ... q_(L-1)   q_L
                                                                 |            |
                                                              loss_isd    loss_ssl
                                                                 |            |
    view 2 -> teacher: backbone, last projector -> sg --------> z_L          z_L

    (sg: no gradient. Then with the views exchanged. The teacher is the student's EMA.)

    L = L_ssl(q_L, z_L)                                      Eq. 1 (BYOL) or 2
      + alpha / (L-1) * sum over l < L of L_ssl(q_l, z_L)    Eq. 3; alpha rises from 0
      + beta * sum over l of L_ssl(predictor(sg h_l), z_L)   Eq. 5; together Eq. 6

h_l is the [CLS] token of block l after the one final norm (of a ResNet, the mean of a
stage), through the layer's projector. loss_ssl moves the backbone and the last heads, loss_isd
the lower heads, the layers up to theirs and the norm, loss_pred, the last term, the predictors
alone, which lag behind. SimCLR has neither teacher nor predictor: q = h, and z is the student's
own final output, without gradient in loss_isd. A ViT's patch projection stays as it started.
Negatives are the other images of the global batch; BYOL has none.

Symbols: B images of this process, M of the global batch, L layers with a head, D width,
K outputs of a head, tau temperature, m momentum. Logits take 4 * L * B * M numbers a step.

    python sdssl.py                digits, 2 minutes: k-NN from 61 % to 94 %
    python sdssl.py --isd_every 3  every third layer (Table 6; its projectors: --isd_mlp)
    python sdssl.py --framework byol --no-sd --output_dir runs/byol
    torchrun --nproc_per_node=8 sdssl.py --data IMAGENET --arch vit_small    Table 1
    python sdssl.py --analyze runs/sdssl/checkpoint.pth runs/byol/checkpoint.pth \
        --output_dir runs/analysis    Figs. 5 to 8

    what               paper           released code        here
    evaluated network  not said        MoCo v3: teacher     student; --network teacher
    loss_pred          sum             L * mean             L * mean: the sum
    alpha              1.0             0.8, MoCo v3 1.0     1.0; --alpha
    jitter of colours  not said        of 30 % of views     80 %, as MoCo v3
    SimCLR's gradient  not said        of a process's rows  as in one process
    heads of ViT-S     not said        12, as MoCo v3       6; --num_heads
    projectors         parallel: +9 %  one by one           one batched matmul
    order of jitter    not said        for each image       for each batch
"""
import argparse
import copy
import functools
import json
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common import (MEAN, STD, VITS, BatchNorm, InputError, Parser, Run, ViewLoader,
                    add_arguments, apply_recipe, at_least, autocast, byol_views, cosine_schedule,
                    create_backbone, distributed, ema_update, existing_file, extract_features, fp32,
                    gather, knn_accuracy, launch, load_backbone, load_data, local_rows, log,
                    parameter_groups, prepare_files, save_figure, setup, start_from, subplots,
                    world_size)

# -------------------------------------------------------------------------------------- recipes

RECIPES = {
    "digits": dict(  # found by trial on two CPU cores
        arch="vit_nano", img_size=16, patch_size=4, epochs=60, batch_size=128, lr=4e-3,
        warmup_epochs=10, weight_decay=0.1, momentum=0.99, hidden=512, isd_hidden=256,
        views=dict(scale=(0.5, 1.0), flip=0.0, blur=False)),
    "mnist": dict(
        arch="vit_nano", img_size=28, patch_size=7, epochs=20, batch_size=256, lr=1e-3,
        warmup_epochs=1, weight_decay=0.1, momentum=0.99, hidden=512, isd_hidden=256,
        views=dict(scale=(0.3, 1.0), flip=0.0, blur=False)),
    "cifar10": dict(
        arch="vit_tiny", img_size=32, patch_size=4, epochs=200, batch_size=512, lr=5e-4,
        warmup_epochs=10, weight_decay=0.1, momentum=0.99, hidden=2048, isd_hidden=1024,
        views=dict(scale=(0.15, 1.0), blur=False)),
    "imagenet": dict(  # the paper, Sec. 4.1 (batch 4096 for ViT-S/32); views as in BYOL
        arch="vit_small", img_size=224, patch_size=16, epochs=300, batch_size=1024,
        lr=dict(simclr=1.3e-4, byol=1.5e-4, mocov3=1.5e-4), warmup_epochs=40, weight_decay=0.1,
        momentum=0.996, hidden=4096, isd_hidden=2048, views=dict(scale=(0.08, 1.0))),
}

# --------------------------------------------------------------------------------------- losses

@fp32
def contrastive_loss(q: Tensor, z: Tensor, labels: Tensor, tau: float,
                     excluded: Tensor | None = None) -> Tensor:
    """Cross-entropy of finding each query's positive among the candidates, mean over queries.

    q: queries (..., B, K). z: candidates (M, K). labels (B,): the row of z that is positive,
    and excluded (B,) a row that is no candidate, the same for every layer.
    """
    q = F.normalize(q.flatten(0, -2), dim=-1)  # (L*B, K)
    layers = len(q) // len(labels)
    logits = q @ F.normalize(z, dim=-1).T / tau  # (L*B, M)
    if excluded is not None:
        logits = logits.scatter(1, excluded.repeat(layers)[:, None], -torch.inf)
    return F.cross_entropy(logits, labels.repeat(layers))  # Eq. 2


def info_nce(q: Tensor, z: Tensor, tau: float = 0.2, labels: Tensor | None = None) -> Tensor:
    """MoCo v3's loss: Eq. 2 times 2 * tau, as in Algorithm 1, so that the size of the
    gradient does not depend on tau. q: (B, K), (L, B, K), or (L*B, K) with the layer
    outermost. z: (M, K). labels: as above, by default arange(M)."""
    if labels is None:
        labels = torch.arange(len(z), device=z.device)
    return 2 * tau * contrastive_loss(q, z, labels, tau)


@fp32
def regression_loss(q: Tensor, z: Tensor) -> Tensor:
    """BYOL's loss: mean of 2 - 2 cos(q, z). q: (B, K) or (L, B, K); z: (B, K)."""
    cosine = (F.normalize(q, dim=-1) * F.normalize(z, dim=-1)).sum(-1)
    return (2 - 2 * cosine).mean()  # Eq. 1


def simclr_losses(q1: Tensor, q2: Tensor, tau: float = 0.2) -> dict[str, Tensor]:
    """The terms of Eq. 6, mean of both directions. q1, q2 (L, B, K): queries of the two views,
    the final layer last. Candidates are both views' final outputs of the global batch."""
    z = torch.cat([gather(q1[-1]), gather(q2[-1])])  # (2M, K)
    M = len(z) // 2
    rows = torch.arange(M, device=z.device)[local_rows(M)]  # (B,)
    same = torch.cat([rows, M + rows])  # (2B,): where a query's own view is ...
    other = torch.cat([M + rows, rows])  # ... and the other view of its image
    q = torch.cat([q1, q2], 1)  # (L, 2B, K)
    losses = {"loss_ssl": contrastive_loss(q[-1], z, other, tau, same)}  # Eq. 2
    if len(q) > 1:  # with --no-sd the final layer is the only one
        losses["loss_isd"] = contrastive_loss(q[:-1], z.detach(), other, tau, same)  # Eq. 3
    return losses


def nt_xent(z1: Tensor, z2: Tensor, tau: float = 0.2) -> Tensor:
    """SimCLR's loss over the 2M rows of two views (B, K), each without itself; no 2 * tau."""
    return simclr_losses(z1[None], z2[None], tau)["loss_ssl"]


def byol_losses(q1, q2, z1, z2, p1=None, p2=None, ssl=regression_loss) -> dict[str, Tensor]:
    """The terms of Eq. 6, sum of both directions. q1, q2: as above. z1, z2 (B, K): the
    teacher's outputs. p1, p2 (L, B, K): predictions from projections without gradient. ssl:
    the loss of queries (..., B, K) and targets."""
    z1 = z1.detach()
    z2 = z2.detach()
    losses = {"loss_ssl": ssl(q1[-1], z2) + ssl(q2[-1], z1)}  # Eq. 1 or 2
    if len(q1) > 1:
        # Eq. 3: mean over rows and layers
        losses["loss_isd"] = ssl(q1[:-1], z2) + ssl(q2[:-1], z1)
        L = len(p1)
        losses["loss_pred"] = L * (ssl(p1, z2) + ssl(p2, z1))  # Eq. 5: L * mean is the sum
    return losses


def mocov3_losses(q1, q2, z1, z2, p1=None, p2=None, tau: float = 0.2) -> dict[str, Tensor]:
    """Negatives are the teacher's outputs of all other images of the global batch."""
    z1 = gather(z1)  # (M, K)
    z2 = gather(z2)  # (M, K)
    rows = torch.arange(len(z1), device=z1.device)[local_rows(len(z1))]  # (B,)
    ssl = functools.partial(info_nce, tau=tau, labels=rows)  # Eq. 2
    return byol_losses(q1, q2, z1, z2, p1, p2, ssl)


# ---------------------------------------------------------------------------------------- model

def stack_layers(layers: list[Tensor]) -> Tensor:
    """L of (B, D_l) -> (L, B, D): a ResNet's lower stages are narrower, and zeros add nothing."""
    D = max(layer.shape[-1] for layer in layers)
    return torch.stack([F.pad(layer, (0, D - layer.shape[-1])) for layer in layers])


class LayerMLP(nn.Module):
    """L MLPs at once, one a layer: each view (L, B, D) -> (L, B, K). Linear layers without
    bias, BatchNorm and ReLU on the hidden ones.

    One batched matmul serves all layers and views; BatchNorm takes one view at a time, as one
    batch of L*D channels. The images come last inside.
    """

    def __init__(self, in_dims: list[int], hidden: int, out_dim: int, depth: int, out_norm: bool):
        super().__init__()
        L = len(in_dims)
        widths = [hidden] * (depth - 1) + [out_dim]
        self.weights = nn.ParameterList()
        for width in widths:
            weight = torch.empty(L, width, max(in_dims))
            for l, dim in enumerate(in_dims):  # as nn.Linear
                nn.init.uniform_(weight[l], -(dim**-0.5), dim**-0.5)
            self.weights.append(nn.Parameter(weight))
            in_dims = [width] * L
        self.norms = nn.ModuleList(BatchNorm(L * width) for width in widths[:-1])
        if out_norm:
            self.norms.append(BatchNorm(L * out_dim, affine=False))

    def forward(self, *views: Tensor) -> list[Tensor]:
        V = len(views)
        x = torch.cat([view.mT for view in views], 2)  # (L, D, V*B)
        for i, weight in enumerate(self.weights):
            x = torch.bmm(weight, x)  # (L, K, V*B)
            if i < len(self.norms):
                parts = [self.norms[i](view.flatten(0, 1)[None]) for view in x.chunk(V, 2)]
                x = torch.cat(parts, 2).view_as(x)  # V of (1, L*K, B) -> (L, K, V*B)
            if i < len(self.weights) - 1:
                x = F.relu(x)
        return [view.mT for view in x.chunk(V, 2)]  # V of (L, B, K)


class Student(nn.Module):
    """Backbone, and for each layer that learns a projector and, but for SimCLR, a predictor.

    isd_every: distil to every n-th layer. isd_mlp: depth of the lower projectors, 0 for none.
    """

    def __init__(self, backbone: nn.Module, framework: str, sd=True, isd_every=1, isd_mlp=3,
                 hidden=4096, isd_hidden=2048, out_dim=256):
        super().__init__()
        dims = backbone.layer_dims
        self.lower = []  # the layers below the last that are distilled to
        if sd:
            self.lower = list(range(isd_every - 1, len(dims) - 1, isd_every))
        lower_dims = [dims[l] for l in self.lower]
        if sd and not self.lower:
            raise InputError(f"--isd_every {isd_every} leaves none of the {len(dims)} layers to "
                             f"distil to: lower it, or pass --no-sd or another --arch")
        if sd and isd_mlp == 0 and framework == "simclr":
            raise InputError("--isd_mlp 0 needs predictors, which --framework simclr has not")
        norm = framework != "byol"  # BatchNorm on the outputs
        self.backbone = backbone
        self.projector = LayerMLP(dims[-1:], hidden, out_dim, 3, norm)
        self.isd_projector = None
        self.predictor = None
        if self.lower and isd_mlp > 0:
            self.isd_projector = LayerMLP(lower_dims, isd_hidden, out_dim, isd_mlp, norm)
            lower_dims = [out_dim] * len(self.lower)
        if framework != "simclr":
            self.predictor = LayerMLP([*lower_dims, out_dim], hidden, out_dim, 2, norm)

    def forward(self, *views: Tensor) -> tuple[list, list]:
        """Views (B, 3, H, W) -> for each its queries q (L, B, K), and its predictions from
        sg(h) (L, B, K), which are None where loss_pred has no place."""
        if not self.lower:
            h = self.projector(*[self.backbone(x)[None] for x in views])  # V of (1, B, K)
        else:
            layers = [self.backbone(x, layers=True) for x in views]  # V of L of (B, D_l): [CLS]
            last = self.projector(*[view[-1][None] for view in layers])  # V of (1, B, K)
            lower = []
            for view in layers:
                lower.append(stack_layers([view[l] for l in self.lower]))  # V of (L-1, B, D)
            if self.isd_projector is not None:
                lower = self.isd_projector(*lower)  # V of (L-1, B, K)
            h = []
            for below, final in zip(lower, last, strict=True):
                h.append(stack_layers([*below, *final]))  # V of (L, B, K)
        q = h
        p = [None] * len(h)
        if self.predictor is not None:
            q = self.predictor(*h)  # V of (L, B, K)
            if self.lower:
                p = self.predictor(*[x.detach() for x in h])  # V of (L, B, K)
        return q, p


class Teacher(nn.Module):
    """The student's backbone and last projector, moved only by EMA. In training mode: its
    BatchNorm uses the batch's statistics and keeps running ones of its own."""

    def __init__(self, student: Student):
        super().__init__()
        self.backbone = copy.deepcopy(student.backbone)
        self.projector = copy.deepcopy(student.projector)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        z, = self.projector(self.backbone(x)[None])  # (1, B, K)
        return z[0]  # (B, K)


def build(args) -> tuple[Student, Teacher | None, dict]:
    """-> student, teacher (None for SimCLR), and what a reader of the checkpoint must know."""
    if args.num_heads and args.arch not in VITS:
        raise InputError(f"--num_heads is for ViTs of {' '.join(VITS)}, not for --arch {args.arch}")
    options = dict(arch=args.arch, img_size=args.img_size, patch_size=args.patch_size,
                   num_heads=args.num_heads, pos_embed="sincos")
    backbone = create_backbone(**options)
    if args.init:
        start_from(backbone, args.init)
    for name, parameter in backbone.named_parameters():
        if "patch_embed." in name and args.stop_grad_conv1:
            parameter.requires_grad_(False)  # frozen at its start, as in MoCo v3
    student = Student(backbone, args.framework, args.sd, args.isd_every, args.isd_mlp, args.hidden,
                      args.isd_hidden)
    teacher = Teacher(student) if args.framework != "simclr" else None
    meta = dict(method="sdssl", network="student", backbone=options, mean=MEAN, std=STD)
    return student, teacher, meta


# ------------------------------------------------------------------------------------- training

def train(args) -> None:
    # data and networks
    device = setup(args)
    train_data, test_data = load_data(args.data, args.data_path)
    recipe = apply_recipe(args, RECIPES, train_data)
    if isinstance(args.lr, dict):
        args.lr = args.lr[args.framework]
    student, teacher, meta = build(args)
    networks = {"student": student.to(device)}
    if teacher:
        networks["teacher"] = teacher.to(device)
    model = distributed(student)
    if args.compile:
        for network in networks.values():
            network.backbone.compile()
    groups = parameter_groups(student, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")

    # the run: two views of each image, k-NN now and then
    views = byol_views(args.img_size, **recipe["views"])
    loader = ViewLoader(train_data, views, args.batch_size, args.seed, device, args.num_workers)
    knn = functools.partial(knn_accuracy, student.backbone, train_data, test_data, args.img_size,
                            device, num_workers=args.num_workers, dtype=args.dtype)
    run = Run(args, loader, meta, {"knn": (knn, args.knn_every)}, **networks, optimizer=optimizer,
              scaler=scaler)

    # schedules, a value for each step
    M = args.batch_size
    peak_lr = args.lr * M / 256
    warmup = int(args.warmup_epochs * run.steps_per_epoch)
    lr = cosine_schedule(peak_lr, 0.0, run.total, warmup)
    momentum = cosine_schedule(args.momentum, 1.0, run.total)
    alpha = cosine_schedule(0.0 if args.anneal else args.alpha, args.alpha, run.total)
    chance_levels = {"mocov3": 4 * args.tau * math.log(M), "byol": 4.0,
                     "simclr": math.log(2 * M - 1)}
    chance = chance_levels[args.framework]
    name = f"SD-{args.framework}" if args.sd else args.framework
    parameters = sum(p.numel() for p in student.parameters()) / 1e6
    log(f"{name}, {args.arch}: {parameters:.1f} M parameters, {run.total} steps of {M} images, lr "
        f"{args.lr:.1e} * {M} / 256 = {peak_lr:.1e}, chance level of loss_ssl {chance:.2f}")

    for step, (x1, x2), _ in run.steps():  # two views (B, 3, H, W)
        # schedules
        for group in optimizer.param_groups:
            group["lr"] = float(lr[step])

        # teacher: targets without gradient
        if teacher:
            with torch.no_grad(), autocast(device, args.dtype):
                z1 = teacher(x1)  # (B, K)
                z2 = teacher(x2)  # (B, K)

        # student: a query for each layer
        with autocast(device, args.dtype):
            (q1, q2), (p1, p2) = model(x1, x2)  # (L, B, K)

        # losses
        if args.framework == "simclr":
            z1 = q1[-1]  # (B, K)
            losses = simclr_losses(q1, q2, args.tau)
        elif args.framework == "byol":
            losses = byol_losses(q1, q2, z1, z2, p1, p2)
        else:
            losses = mocov3_losses(q1, q2, z1, z2, p1, p2, args.tau)
        weights = {"loss_ssl": 1.0, "loss_isd": float(alpha[step]), "loss_pred": args.beta}
        loss = sum(weights[name] * term for name, term in losses.items())  # Eq. 6
        losses["loss"] = loss

        # backward and step
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        # EMA, once a step, after the student moved
        if teacher:
            ema_update(student.backbone, teacher.backbone, float(momentum[step]))
            ema_update(student.projector, teacher.projector, float(momentum[step]))

        # log, check and save, where it is due
        run.end_step(step, losses, features=z1, lr=float(lr[step]), alpha=float(alpha[step]),
                     momentum=float(momentum[step]), chance=chance)


# ------------------------------------------------------------------------------------ arguments

def parse_arguments(argv=None):
    flag = argparse.BooleanOptionalAction
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_arguments(parser, "sdssl")
    add = parser.add_argument_group("method (other defaults: recipe)").add_argument
    add("--framework", default="mocov3", choices=["simclr", "byol", "mocov3"])
    add("--sd", action=flag, default=True, help="self-distillation; --no-sd: the plain framework")
    add("--tau", type=at_least(1e-6), default=0.2, help="temperature of Eq. 2 (default: 0.2)")
    add("--alpha", type=at_least(0.0), default=1.0, help="final weight of loss_isd (default: 1)")
    add("--anneal", action=flag, default=True, help="rise of alpha from 0 along a cosine")
    add("--beta", type=at_least(0.0), default=1.0, help="weight of loss_pred (default: 1)")
    add("--isd_every", type=at_least(1), default=1, help="step between distilled layers")
    add("--isd_mlp", type=int, default=3, choices=[0, 2, 3], help="depth of the lower projectors")
    add("--hidden", type=at_least(1), help="width of last projector and predictors")
    add("--isd_hidden", type=at_least(1), help="width of the lower projectors")
    add("--momentum", type=at_least(0.0), help="the teacher's first, rising to 1")
    add("--num_heads", type=at_least(1), help="attention heads (default: timm's; MoCo v3: 12)")
    add("--stop_grad_conv1", action=flag, default=True, help="patch projection frozen at its start")
    add("--analyze", nargs="+", type=existing_file, metavar="CHECKPOINT",
        help="draw Figs. 5 to 8 of these instead of training")
    return parser.parse_args(argv)


# ------------------------------------------------------------------ analysis (Figs. 5 to 8)

def alignment(x: Tensor, y: Tensor, gamma: float = 2.0) -> Tensor:
    """Mean distance of positive pairs (n, D), to the power gamma, on the unit sphere."""
    return (F.normalize(x, dim=1) - F.normalize(y, dim=1)).norm(dim=1).pow(gamma).mean()  # Eq. 7


def uniformity(x: Tensor, t: float = 2.0) -> Tensor:
    """Log of the mean Gaussian potential over all pairs of rows (n, D) on the unit sphere."""
    return F.pdist(F.normalize(x, dim=1)).pow(2).mul(-t).exp().mean().log()  # Eq. 8


def negative_alignment(x: Tensor, gamma: float = 2.0) -> Tensor:
    """Mean distance, to the power gamma, over all pairs of rows (n, D) on the unit sphere."""
    return F.pdist(F.normalize(x, dim=1)).pow(gamma).mean()  # Eq. 9


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Centred kernel alignment of (n, D1) and (n, D2) with linear kernels (Kornblith et al.)."""
    x = x - x.mean(0)
    y = y - y.mean(0)
    return (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())


@torch.no_grad()
def measure_layers(backbone: nn.Module, loader: ViewLoader) -> dict[str, Tensor]:
    """Figs. 7 and 8: measures of two views of each image, a value for each layer (L,)."""
    batches = []
    for _, views, _ in loader.steps(0, min(10, loader.steps_per_epoch)):
        layers = [stack_layers(backbone(x, layers=True)) for x in views]  # 2 of (L, B, D)
        batches.append(torch.stack(layers))  # (2, L, B, D)
    first, second = torch.cat(batches, 2).cpu()  # (L, n, D) each
    u = torch.stack([uniformity(x) for x in first])  # (L,)
    a = torch.stack([alignment(x, y) for x, y in zip(first, second, strict=True)])  # (L,)
    negative = torch.stack([negative_alignment(x) for x in first])  # (L,)
    return {
        "-uniformity": -u,
        "alignment": a,
        "-uniformity / alignment": -u / a,
        "negative alignment": negative,
        "negative / alignment": negative / a,
    }


def analyze(args) -> None:
    """Draws Figs. 5 to 8 for one checkpoint or several, and writes the numbers of 6 to 8."""
    from sklearn.manifold import TSNE

    device = setup(args)
    if world_size() > 1:
        raise InputError("--analyze takes one process")
    given = args.arch, args.patch_size, args.img_size  # for files that do not say
    train_data, test_data = load_data(args.data, args.data_path)
    recipe = apply_recipe(args, RECIPES, train_data)
    folder = Path(args.output_dir)
    names = ("alignment.png", "cka.png", "tsne.png", "analysis.json")
    prepare_files([folder / name for name in names], args.overwrite)

    # 1,000 images: of all classes, and of the first ten for t-SNE
    data = test_data or train_data
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    ten_classes = rows[data.labels[rows] < 10][:1000]
    rows = rows[:1000]

    measures_figure, measures_axes = subplots(1, 5, 2.6, 2.6)
    cka_figure, cka_axes = subplots(1, len(args.analyze), 3, 3)
    tsne_figure, tsne_axes = subplots(len(args.analyze), 6, 2, 2)
    numbers = {}
    for i, path in enumerate(args.analyze):
        backbone, meta = load_backbone(path, *given, num_heads=args.num_heads)
        backbone.to(device)
        normalisation = dict(mean=meta["mean"], std=meta["std"])
        options = dict(size=meta["img_size"], device=device, layers=True, **normalisation)
        name = f"{i + 1}: {Path(path).parent.name}"

        # Figs. 7 and 8
        views = byol_views(meta["img_size"], **recipe["views"])
        loader = ViewLoader(data, views, min(100, len(data)), 0, device, **normalisation)
        measures = measure_layers(backbone, loader)
        for axis, (title, values) in zip(measures_axes[0], measures.items(), strict=True):
            axis.plot(range(1, len(values) + 1), values, marker=".", label=name)
            axis.set(title=title, xlabel="layer")

        # Fig. 6
        features = extract_features(backbone, data, rows=rows, **options)  # L of (n, D)
        L = len(features)
        cka = []  # (L, L)
        for x in features:
            cka.append([linear_cka(x.double(), y.double()).item() for y in features])
        edges = (0.5, L + 0.5, 0.5, L + 0.5)
        image = cka_axes[0, i].imshow(cka, vmin=0, vmax=1, origin="lower", extent=edges)
        cka_axes[0, i].set(title=name, xlabel="layer", ylabel="layer")

        # Fig. 5
        if not torch.equal(ten_classes, rows):
            features = extract_features(backbone, data, rows=ten_classes, **options)  # L of (n, D)
        shown = torch.linspace(0, L - 1, 6).round().int().unique().tolist()
        for axis, l in zip(tsne_axes[i], shown, strict=False):
            tsne = TSNE(init="pca", perplexity=min(30, len(ten_classes) / 4), random_state=0)
            points = tsne.fit_transform(features[l].numpy())  # (n, 2)
            axis.scatter(*points.T, c=data.labels[ten_classes], cmap="tab10", s=3)
            axis.set(title=f"layer {l + 1}", ylabel=name, xticks=[], yticks=[])

        numbers[name] = {"checkpoint": path, "cka": cka, **measures}

    (folder / "analysis.json").write_text(json.dumps(numbers, indent=1, default=Tensor.tolist))
    measures_axes[0, 0].legend(fontsize=7)
    cka_figure.colorbar(image, ax=cka_axes[0].tolist(), label="CKA")
    save_figure(measures_figure, folder / "alignment.png")
    save_figure(cka_figure, folder / "cka.png")
    save_figure(tsne_figure, folder / "tsne.png")
    log(f"wrote {', '.join(names)} into {folder}")


if __name__ == "__main__":
    arguments = parse_arguments()
    launch(lambda: analyze(arguments) if arguments.analyze else train(arguments))
