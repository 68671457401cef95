"""SDSSL: Self-Distilled Self-Supervised Representation Learning (Jang et al.), in SimCLR, BYOL and MoCo v3.

The idea. A contrastive method trains the last layer of a ViT; the layers below learn only what helps the last. SDSSL gives
each of them the same task: its own head turns its [CLS] token into a query that must find the teacher's *final* output of
the image's other view (loss_isd). Lower layers become good features, which makes the last layer's task easier too. The
predictors of the lower layers would lag behind, so they get a loss of their own that moves nothing else (loss_pred).

    view 1 -> student backbone -> h_1 ... h_L -> projectors -> predictors -> q_1 ... q_L
                                                                              |       |
                                                                          loss_isd  loss_ssl      (and the views exchanged)
                                                                              |       |
    view 2 -> teacher backbone --------> h_L --> projector ---- sg ---------> z_L    z_L          sg: no gradient
              (EMA of the student)

    L = L_ssl(q_L, z_L) + alpha * 1/(L-1) sum_{l<L} L_ssl(q_l, sg z_L) + beta * sum_{l<=L} L_ssl(pred(sg h_l), sg z_L)
        Eq. 1 (BYOL) or 2          Eq. 3, alpha 0 -> 1 along a cosine          Eq. 5; all three together are Eq. 6

SimCLR has neither teacher nor predictor: q = h, and z is the student's own final output (Eq. 4).
Shapes: N images a process, M in the global batch, L layers that have a head (the final one last), D width, K = 256.

Commands:
    python sdssl.py                                                        digits, 2 minutes on a laptop
    python sdssl.py --framework byol --no-sd --output_dir runs/byol        a baseline: the method without self-distillation
    torchrun --nproc_per_node=8 sdssl.py --data IMAGENET --arch vit_small  the paper's run (Table 1)
    python eval_knn.py --checkpoint runs/sdssl/checkpoint.pth --layers all
    python sdssl.py --analyze runs/sdssl/checkpoint.pth runs/byol/checkpoint.pth --output_dir runs/analysis   Figs. 5-8

Measured: the first command (60 epochs, seed 0, 2 CPU cores, 2.1 minutes) takes k-NN from 61.4 % to 94.2 %.

    what                  paper                               released code               here
    loss_pred             sum over L layers (Eq. 5)           L * mean                    the same number, as in Algorithm 1
    alpha                 1.0                                 1.0; SimCLR and BYOL 0.8    1.0; --alpha
    SimCLR's gradient     not said                            local slice of the gather   that of a single process
    heads of ViT-S        not said                            12, as MoCo v3              6, as timm: backbone.pth gives the same
                                                                                          outputs there; --num_heads 12
    layer heads           in parallel: +8.6 % time            one after the other         one batched matmul for all layers
    jitter's order        not said                            drawn for each image        drawn for each batch
    teacher's BatchNorm   not said                            batch statistics            batch statistics, its own running ones
"""
import argparse
import copy
import csv
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common import (MEAN, STD, VITS, BatchNorm, ImageData, InputError, Parser, Run, ViewLoader, add_arguments, apply_recipe,
                    autocast, byol_views, check_limits, cosine_schedule, create_backbone, distributed, ema_update,
                    extract_features, fp32, gather, knn_accuracy, load_backbone, load_data, local_rows, log, make_folder,
                    parameter_groups, run, setup, start_from, subplots)

# ------------------------------------------------------------------------------------------------------------ recipes

RECIPES = {
    # found by trial on two CPU cores
    "digits": dict(arch="vit_nano", img_size=16, patch_size=4, epochs=60, batch_size=128, lr=4e-3, warmup_epochs=10,
                   weight_decay=0.1, momentum=0.99, hidden=512, isd_hidden=256,
                   views=dict(scale=(0.5, 1.0), flip=0.0, blur=False)),
    "mnist": dict(arch="vit_nano", img_size=28, patch_size=7, epochs=20, batch_size=256, lr=1e-3, warmup_epochs=1,
                  weight_decay=0.1, momentum=0.99, hidden=512, isd_hidden=256,
                  views=dict(scale=(0.3, 1.0), flip=0.0, blur=False)),
    "cifar10": dict(arch="vit_tiny", img_size=32, patch_size=4, epochs=200, batch_size=512, lr=5e-4, warmup_epochs=10,
                    weight_decay=0.1, momentum=0.99, hidden=2048, isd_hidden=1024, views=dict(scale=(0.15, 1.0), blur=False)),
    # the paper, Sec. 4.1 (batch 4096 for ViT-S/32); views as in BYOL
    "imagenet": dict(arch="vit_small", img_size=224, patch_size=16, epochs=300, batch_size=1024,
                     lr=dict(simclr=1.3e-4, byol=1.5e-4, mocov3=1.5e-4), warmup_epochs=40, weight_decay=0.1,
                     momentum=0.996, hidden=4096, isd_hidden=2048, views=dict(scale=(0.08, 1.0))),
}

LIMITS = {"tau": (1e-6, 1e3), "alpha": (0, 1e3), "beta": (0, 1e3), "isd_hidden": (1, 1e6)}

# ------------------------------------------------------------------------------------------------------------- losses


@fp32
def info_nce(q: Tensor, z: Tensor, tau: float = 0.2, labels: Tensor | None = None, own: Tensor | None = None) -> Tensor:
    """Contrastive loss (Eq. 2, as in Algorithm 1): 2 * tau * cross-entropy, mean over the rows of q.

    q: (N, D), (L, N, D), or (L*N, D) with the layer outermost. z: (M, D), the candidates.
    labels (N,): the row of z that is positive for each query, the same for every layer; default arange(M).
    own (N,): a row of z that is left out for each query, because it is the query's own output (SimCLR).
    """
    q, z = F.normalize(q.flatten(0, -2), dim=-1), F.normalize(z, dim=-1)  # (L*N, D), (M, D)
    labels = torch.arange(len(z), device=z.device) if labels is None else labels
    layers = len(q) // len(labels)
    logits = q @ z.T / tau  # (L*N, M)
    if own is not None:
        logits = logits.scatter(1, own.repeat(layers)[:, None], -torch.inf)
    return 2 * tau * F.cross_entropy(logits, labels.repeat(layers))  # Eq. 2


@fp32
def regression_loss(q: Tensor, z: Tensor) -> Tensor:
    """BYOL's loss (Eq. 1): mean of 2 - 2 cos(q, z). q: (N, D) or (L, N, D); z: (N, D)."""
    return (2 - 2 * (F.normalize(q, dim=-1) * F.normalize(z, dim=-1)).sum(-1)).mean()  # Eq. 1


def nt_xent(z1: Tensor, z2: Tensor, tau: float = 0.2) -> Tensor:
    """SimCLR's loss over the 2N rows of two views (N, D), a row's similarity with itself left out; no factor 2 * tau.

    What `sdssl_losses` makes of "simclr" where there is one process and one layer.
    """
    z = torch.cat([z1, z2])  # (2N, D)
    rows = torch.arange(len(z), device=z.device)
    return info_nce(z, z, tau, labels=rows.roll(len(z1)), own=rows) / (2 * tau)  # Eq. 2


def sdssl_losses(framework: str, q1: Tensor, q2: Tensor, z1: Tensor, z2: Tensor, p1: Tensor | None = None,
                 p2: Tensor | None = None, tau: float = 0.2) -> dict[str, Tensor]:
    """The terms of Eq. 6, over both directions: loss_ssl, and with self-distillation loss_isd and loss_pred.

    q (L, N, K): the student's output for each layer, final one last. z (N, K): the teacher's; for SimCLR the student's own.
    p (L, N, K): predictions from projections without gradient; None for SimCLR. Candidates span the global batch.
    """
    if framework == "simclr":
        z = torch.cat([gather(z1), gather(z2)])  # (2M, K)
        M = len(z) // 2
        rows = torch.arange(M, device=z.device)[local_rows(M)]  # (N,)
        own, labels = torch.cat([rows, M + rows]), torch.cat([M + rows, rows])  # (2N,)
        q = torch.cat([q1, q2], 1)  # (L, 2N, K)
        losses = {"loss_ssl": info_nce(q[-1], z, tau, labels, own) / (2 * tau)}  # Eq. 2
        if len(q) > 1:
            losses["loss_isd"] = info_nce(q[:-1], z.detach(), tau, labels, own) / (2 * tau)  # Eq. 3
        return losses
    if framework == "byol":
        ssl = regression_loss  # Eq. 1
    else:
        z1, z2 = gather(z1), gather(z2)  # (M, K)
        rows = torch.arange(len(z1), device=z1.device)[local_rows(len(z1))]  # (N,)

        def ssl(q, z):
            return info_nce(q, z, tau, rows)  # Eq. 2

    z1, z2 = z1.detach(), z2.detach()
    losses = {"loss_ssl": ssl(q1[-1], z2) + ssl(q2[-1], z1)}
    if len(q1) > 1:
        losses["loss_isd"] = ssl(q1[:-1], z2) + ssl(q2[:-1], z1)  # Eq. 3: a mean over rows is a mean over layers
        losses["loss_pred"] = len(p1) * (ssl(p1, z2) + ssl(p2, z1))  # Eq. 5: L times the mean over layers is their sum
    return losses


# -------------------------------------------------------------------------------------------------------------- model


def stack_layers(layers: list[Tensor]) -> Tensor:
    """L of (N, D_l) -> (L, N, max D_l). Narrower layers (a ResNet's lower stages) are padded with zeros, which add nothing."""
    width = max(layer.shape[-1] for layer in layers)
    return torch.stack([F.pad(layer, (0, width - layer.shape[-1])) for layer in layers])


class LayerMLP(nn.Module):
    """L MLPs at once, one for each layer: views (L, N, D) -> views (L, N, K). Linear without bias, BatchNorm and ReLU on hidden.

    A batched matmul takes all layers and views, BatchNorm one view at a time. Inside, the samples come last, so that BatchNorm
    sees one batch of L*D channels.
    """

    def __init__(self, in_dims: list[int], hidden: int, out_dim: int, depth: int, out_norm: bool):
        super().__init__()
        L, dims = len(in_dims), [max(in_dims)] + [hidden] * (depth - 1) + [out_dim]
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(L, k, d)) for d, k in zip(dims, dims[1:], strict=False))
        self.norms = nn.ModuleList(BatchNorm(L * k) for k in dims[1:-1])
        if out_norm:
            self.norms.append(BatchNorm(L * out_dim, affine=False))
        for i, weight in enumerate(self.weights):
            for layer, fan_in in zip(weight, in_dims if i == 0 else dims[i : i + 1] * L, strict=True):
                nn.init.uniform_(layer, -(fan_in**-0.5), fan_in**-0.5)  # as nn.Linear

    def forward(self, *views: Tensor) -> list[Tensor]:
        V = len(views)
        x = torch.cat([view.transpose(1, 2) for view in views], 2)  # (L, D, V*N)
        for i, weight in enumerate(self.weights):
            x = torch.bmm(weight, x)  # (L, K, V*N)
            if i < len(self.norms):  # each view: (1, L*K, N) -> (L, K, N)
                x = torch.cat([self.norms[i](view.flatten(0, 1)[None]).view_as(view) for view in x.chunk(V, 2)], 2)
            if i < len(self.weights) - 1:
                x = F.relu(x)
        return [view.transpose(1, 2) for view in x.chunk(V, 2)]  # V of (L, N, K)


class Student(nn.Module):
    """Backbone, a projector and (not for SimCLR) a predictor for each layer that learns.

    isd_every: distil to every n-th layer (Table 6, MLP/n). isd_mlp: depth of the intermediate projectors, 0 for none.
    """

    def __init__(self, backbone: nn.Module, framework: str, sd=True, isd_every=1, isd_mlp=3, hidden=4096, isd_hidden=2048,
                 out_dim=256):
        super().__init__()
        dims = backbone.layer_dims
        self.lower = [l for l in range(len(dims) - 1) if (l + 1) % isd_every == 0] if sd else []
        lower_dims = [dims[l] for l in self.lower]
        if sd and not self.lower:
            raise InputError(f"--isd_every {isd_every} leaves none of the {len(dims)} layers to distil to: lower it, "
                             f"or pass --no-sd, or an --arch with layers such as vit_small or resnet50")
        if lower_dims and isd_mlp == 0 and framework == "simclr":
            raise InputError("--isd_mlp 0 needs predictors, to bring [CLS] to the teacher's width: not for --framework simclr")
        norm = framework != "byol"  # BatchNorm on the outputs
        self.backbone = backbone
        self.projector = LayerMLP(dims[-1:], hidden, out_dim, 3, norm)
        self.isd_projector = LayerMLP(lower_dims, isd_hidden, out_dim, isd_mlp, norm) if lower_dims and isd_mlp else None
        widths = [out_dim] * len(lower_dims) if isd_mlp else lower_dims
        self.predictor = LayerMLP([*widths, out_dim], hidden, out_dim, 2, norm) if framework != "simclr" else None

    def forward(self, *views: Tensor) -> tuple[list, list]:
        """Views (N, 3, H, W) -> for each its q (L, N, K), and for loss_pred its predictions from sg(h) (L, N, K) or None."""
        if not self.lower:
            h = self.projector(*[self.backbone(x)[None] for x in views])  # V of (1, N, K)
        else:
            layers = [self.backbone(x, layers=True) for x in views]  # V of L of (N, D_l): [CLS], or a pooled stage
            h = self.projector(*[view[-1][None] for view in layers])  # V of (1, N, K)
            lower = [stack_layers([view[l] for l in self.lower]) for view in layers]  # V of (L-1, N, D)
            lower = self.isd_projector(*lower) if self.isd_projector else lower  # V of (L-1, N, K)
            h = [stack_layers([*below, *last]) for below, last in zip(lower, h, strict=True)]  # V of (L, N, K)
        if self.predictor is None:
            return h, [None] * len(h)
        return self.predictor(*h), self.predictor(*[x.detach() for x in h]) if self.lower else [None] * len(h)


class Teacher(nn.Module):
    """The student's backbone and last projector, moved only by EMA; no predictor. It stays in training mode, so its
    BatchNorm uses the batch's statistics and keeps running ones of its own."""

    def __init__(self, student: Student):
        super().__init__()
        self.backbone, self.projector = copy.deepcopy(student.backbone), copy.deepcopy(student.projector)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x)[None])[0][0]  # (N, K)

    def update(self, student: Student, momentum: float) -> None:
        ema_update(student.backbone, self.backbone, momentum)
        ema_update(student.projector, self.projector, momentum)


def build(args) -> tuple[Student, Teacher | None, dict]:
    """-> student, teacher (None for SimCLR), and what a reader of the checkpoint must know of the backbone."""
    options = dict(arch=args.arch, img_size=args.img_size, patch_size=args.patch_size, num_heads=args.num_heads,
                   pos_embed="sincos")
    backbone = create_backbone(**options)
    if args.init:
        start_from(backbone, args.init)
    if args.num_heads and args.arch not in VITS:
        raise InputError(f"--num_heads is for ViTs of {' '.join(VITS)}, not for --arch {args.arch}")
    patch_embed = getattr(getattr(backbone, "model", backbone), "patch_embed", None)
    if patch_embed is not None:
        patch_embed.requires_grad_(not args.stop_grad_conv1)
    if hasattr(backbone, "mask_token"):
        backbone.mask_token.requires_grad_(False)  # no masks in this method
    student = Student(backbone, args.framework, args.sd, args.isd_every, args.isd_mlp, args.hidden, args.isd_hidden)
    teacher = Teacher(student) if args.framework != "simclr" else None
    return student, teacher, dict(method="sdssl", network="student", backbone=options, mean=MEAN, std=STD)


# ----------------------------------------------------------------------------------------------------------- training


def train(args) -> None:
    check_limits(args, LIMITS)
    device = setup(args)
    train_data, test_data = load_data(args.data, args.data_path)
    recipe = apply_recipe(args, RECIPES, train_data)
    if isinstance(args.lr, dict):
        args.lr = args.lr[args.framework]
    student, teacher, meta = build(args)
    student.to(device)
    model = distributed(student)
    if teacher:
        teacher.to(device)
    if args.compile:
        for network in filter(None, (student, teacher)):
            network.backbone.compile()
    optimizer = torch.optim.AdamW(parameter_groups(student, args.weight_decay), fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")

    views = byol_views(args.img_size, **recipe["views"])
    loader = ViewLoader(train_data, views, args.batch_size, args.seed, device, args.num_workers)
    steps_per_epoch = loader.steps_per_epoch
    total = args.epochs * steps_per_epoch
    job = Run(args, total, steps_per_epoch)
    job.same_data(train_data)
    job.restore(student=student, teacher=teacher, optimizer=optimizer, scaler=scaler)

    peak_lr = args.lr * args.batch_size / 256
    lr = cosine_schedule(peak_lr, 0.0, total, warmup=int(args.warmup_epochs * steps_per_epoch))
    momentum = cosine_schedule(args.momentum, 1.0, total)
    alpha = cosine_schedule(0.0 if args.anneal else args.alpha, args.alpha, total)
    M = args.batch_size
    chance = {"mocov3": 4 * args.tau * math.log(M), "byol": 4.0, "simclr": math.log(2 * M - 1)}[args.framework]
    parameters = sum(p.numel() for p in student.parameters()) / 1e6
    log(f"{'SD-' if args.sd else ''}{args.framework}, {args.arch}: {parameters:.1f} M parameters, {total} steps of {M} images, "
        f"lr {args.lr:.1e} * {M} / 256 = {peak_lr:.1e}, chance level of loss_ssl {chance:.2f}")

    def knn():
        return knn_accuracy(student.backbone, train_data, test_data, args.img_size, device, num_workers=args.num_workers,
                            dtype=args.dtype)

    def state():
        networks = dict(student=student.state_dict(), **(dict(teacher=teacher.state_dict()) if teacher else {}))
        return dict(**networks, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), meta=meta)

    if job.start == 0:
        job.record_knn(0, knn())
    for step, (x1, x2), _ in loader.steps(job.start, job.stop):  # two views (N, 3, H, W)
        # schedules
        for group in optimizer.param_groups:
            group["lr"] = float(lr[step])

        # teacher: targets without gradient
        if teacher:
            with torch.no_grad(), autocast(device, args.dtype):
                z1, z2 = teacher(x1), teacher(x2)  # (N, K)

        # student: a query for each layer
        with autocast(device, args.dtype):
            (q1, q2), (p1, p2) = model(x1, x2)  # (L, N, K)
        if not teacher:
            z1, z2 = q1[-1], q2[-1]  # (N, K)

        # losses
        losses = sdssl_losses(args.framework, q1, q2, z1, z2, p1, p2, args.tau)
        weights = {"loss_ssl": 1.0, "loss_isd": float(alpha[step]), "loss_pred": args.beta}
        loss = sum(weights[name] * term for name, term in losses.items())  # Eq. 6
        losses["loss"] = loss  # last: where a term is not finite, the term is named

        # backward and step
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        # EMA, once a step, after the student moved
        if teacher:
            teacher.update(student, float(momentum[step]))

        # log
        job.watch(step, losses)
        if job.log_now(step):
            job.log_step(step, losses, loader.waited, features=z1, lr=float(lr[step]), alpha=float(alpha[step]),
                             momentum=float(momentum[step]), chance=chance)
        job.after_step(step, state, knn)


# ----------------------------------------------------------------------------------------------------------- analysis


def alignment(x: Tensor, y: Tensor, gamma: float = 2.0) -> Tensor:
    """Mean distance of positive pairs (N, D), to the power gamma, on the unit sphere (Eq. 7)."""
    return (F.normalize(x, dim=1) - F.normalize(y, dim=1)).norm(dim=1).pow(gamma).mean()  # Eq. 7


def uniformity(x: Tensor, t: float = 2.0) -> Tensor:
    """Log of the mean Gaussian potential over all pairs of different rows of (N, D) on the unit sphere (Eq. 8)."""
    return F.pdist(F.normalize(x, dim=1)).pow(2).mul(-t).exp().mean().log()  # Eq. 8


def negative_alignment(x: Tensor, gamma: float = 2.0) -> Tensor:
    """Mean distance, to the power gamma, over all pairs of different rows of (N, D) on the unit sphere (Eq. 9)."""
    return F.pdist(F.normalize(x, dim=1)).pow(gamma).mean()  # Eq. 9


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Centred kernel alignment of (N, D1) and (N, D2) with linear kernels (Kornblith et al.): 1 up to rotation and scale."""
    x, y = x - x.mean(0), y - y.mean(0)
    return (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())


MEASURES = ("-uniformity", "alignment", "-uniformity / alignment", "negative alignment", "negative / alignment")  # Figs. 7, 8


@torch.no_grad()
def measure_layers(backbone: nn.Module, data: ImageData, views, meta: dict, device, images: int = 1000) -> dict:
    """Per layer: features of whole images, CKA with every layer, and the values of Figs. 7 and 8 from two views of each image."""
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    ten = rows[data.labels[rows] < 10][:images]  # of ten classes, or without labels: for t-SNE
    rows = rows[:images]
    options = dict(size=meta["img_size"], device=device, layers=True, mean=meta["mean"], std=meta["std"])
    whole = extract_features(backbone, data, rows=rows, **options)  # L of (N, D)
    few = whole if torch.equal(ten, rows) else extract_features(backbone, data, rows=ten, **options)  # L of (n, D)
    batch = min(100, len(rows))
    loader = ViewLoader(data, views, batch, 0, device, mean=meta["mean"], std=meta["std"])
    pairs = [(backbone(x1, layers=True), backbone(x2, layers=True)) for _, (x1, x2), _ in loader.steps(0, len(rows) // batch)]
    first, second = ([torch.cat(layer).float().cpu() for layer in zip(*view, strict=True)] for view in zip(*pairs, strict=True))
    table = []
    for x, y in zip(first, second, strict=True):
        u, a, n = uniformity(x).item(), alignment(x, y).item(), negative_alignment(x).item()
        table.append((-u, a, -u / a, n, n / a))  # as MEASURES
    cka = [[linear_cka(x.double(), y.double()).item() for y in whole] for x in whole]  # (L, L)
    return dict(few=few, labels=data.labels[ten], cka=cka, table=table)


def analyze(args) -> None:
    """Figs. 5-8 for one checkpoint or several side by side: tsne.png, cka.png, alignment.png, and analysis.csv, cka.csv."""
    from sklearn.manifold import TSNE

    device = setup(args)
    given = args.arch, args.patch_size, args.img_size  # for files that do not say
    train_data, test_data = load_data(args.data, args.data_path)
    recipe, folder = apply_recipe(args, RECIPES, train_data), Path(args.output_dir)
    make_folder(folder)
    names, results = [], []
    for path in args.analyze:
        backbone, meta = load_backbone(path, *given, num_heads=args.num_heads)
        views = byol_views(meta["img_size"], **recipe["views"])
        names.append(f"{len(names) + 1}: {Path(path).parent.name}")
        results.append(measure_layers(backbone.to(device), test_data or train_data, views, meta, device))
        values = zip(MEASURES, results[-1]["table"][-1], strict=True)
        log(f"{names[-1]}: last layer, " + ", ".join(f"{measure} {value:.3f}" for measure, value in values))

    def save(figure, name):
        figure.savefig(folder / name, dpi=80)
        log(f"wrote {folder / name}")

    figure, axes = subplots(1, len(MEASURES), 2.6, 2.6)  # Figs. 7 and 8
    for i, (axis, measure) in enumerate(zip(axes[0], MEASURES, strict=True)):
        for name, result in zip(names, results, strict=True):
            axis.plot(range(1, len(result["table"]) + 1), [row[i] for row in result["table"]], marker=".", label=name)
        axis.set(title=measure, xlabel="layer")
    axes[0, 0].legend(fontsize=7)
    save(figure, "alignment.png")

    figure, axes = subplots(1, len(results), 3, 3)  # Fig. 6
    for axis, name, result in zip(axes[0], names, results, strict=True):
        ticks = (0.5, len(result["cka"]) + 0.5)
        image = axis.imshow(result["cka"], vmin=0, vmax=1, origin="lower", extent=(*ticks, *ticks))
        axis.set(title=name, xlabel="layer", ylabel="layer")
    figure.colorbar(image, ax=axes[0].tolist(), label="CKA")
    save(figure, "cka.png")

    shown = {i: sorted({round(l) for l in torch.linspace(0, len(r["few"]) - 1, 6).tolist()}) for i, r in enumerate(results)}
    figure, axes = subplots(len(results), max(map(len, shown.values())), 2, 2)  # Fig. 5
    for i, result in enumerate(results):
        if len(result["labels"]) < 8:
            log(f"{names[i]}: too few images of the first ten classes for t-SNE")
            continue
        for axis, l in zip(axes[i], shown[i], strict=False):
            tsne = TSNE(init="pca", perplexity=min(30, len(result["labels"]) // 4), random_state=0)
            points = tsne.fit_transform(result["few"][l].numpy())  # (n, 2)
            axis.scatter(*points.T, c=result["labels"], cmap="tab10", s=3)
            axis.set(title=f"{names[i]}, layer {l + 1}", xticks=[], yticks=[])
            axis.title.set_fontsize(7)
    save(figure, "tsne.png")

    layers, pairs = [("run", "checkpoint", "layer", *MEASURES)], [("run", "checkpoint", "layer", "other layer", "cka")]
    for name, path, result in zip(names, args.analyze, results, strict=True):
        layers += [(name, path, l + 1, *row) for l, row in enumerate(result["table"])]
        pairs += [(name, path, i + 1, j + 1, value) for i, row in enumerate(result["cka"]) for j, value in enumerate(row)]
    for name, rows in (("analysis.csv", layers), ("cka.csv", pairs)):
        with open(folder / name, "w", newline="") as file:
            csv.writer(file).writerows(rows)


# ---------------------------------------------------------------------------------------------------------- arguments


def parse_arguments(argv=None):
    flag = argparse.BooleanOptionalAction
    parser = Parser(description=__doc__.split("\n")[0])
    add_arguments(parser, "sdssl")
    group = parser.add_argument_group("method")
    group.add_argument("--framework", default="mocov3", choices=["simclr", "byol", "mocov3"], help="(default: %(default)s)")
    group.add_argument("--sd", action=flag, default=True, help="self-distillation; --no-sd is the plain framework")
    group.add_argument("--tau", type=float, default=0.2, help="temperature of Eq. 2 (default: %(default)s)")
    group.add_argument("--alpha", type=float, default=1.0, help="final weight of loss_isd; 0 keeps only loss_pred (default: 1)")
    group.add_argument("--anneal", action=flag, default=True, help="raise alpha from 0 along a cosine")
    group.add_argument("--beta", type=float, default=1.0, help="weight of loss_pred (default: %(default)s)")
    group.add_argument("--isd_every", type=int, default=1, choices=range(1, 13), metavar="N", help="distil to each n-th layer")
    group.add_argument("--isd_mlp", type=int, default=3, choices=[0, 2, 3], help="depth of the lower projectors (default: 3)")
    group.add_argument("--hidden", type=int, help="width of the last projector and of all predictors (default: recipe)")
    group.add_argument("--isd_hidden", type=int, help="width of the intermediate projectors (default: recipe)")
    group.add_argument("--momentum", type=float, help="of the teacher at the start, rising to 1 (default: recipe)")
    group.add_argument("--num_heads", type=int, help="attention heads (default: timm's, 6 for vit_small; MoCo v3 has 12)")
    group.add_argument("--stop_grad_conv1", action=flag, default=True, help="freeze the random patch projection")
    group.add_argument("--analyze", nargs="+", metavar="CHECKPOINT", help="draw Figs. 5-8 for these instead of training")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse_arguments()
    run(lambda: analyze(arguments) if arguments.analyze else train(arguments))
