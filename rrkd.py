"""RRKD: Knowledge Distillation with Relative Representations (Ramos, Alampay, Abu), and its rivals
SPKD and LPKD.

The idea. Two networks that see the same images arrange them alike, up to rotation and scale. So
describe an image not by its feature but by its cosine similarities with a set of anchors, by
default all images of the batch: its relative representation. The student learns to give each image
the relative representation that the frozen teacher gives it. The widths need not agree, nothing is
projected, and no labels are needed; where there are some, a cross-entropy is added.

    x -> teacher, frozen -> Z_t (B, D_t) -> cosines of the rows -> V_t (B, M)     a row: an image
    |                                                               |            a column: an anchor
    |                                   L_D = -mean log(cos(V_t,i , V_s,i) / 2 + 1/2 + eps)
    |                                                               |
    +--> student ---------> Z_s (B, D_s) -> cosines of the rows -> V_s (B, M)
                             |
                             +--> classifier -> P, with --labels

    V = Z~ Z~^T, rows of Z normalised                Eq. 2
    L_D                                              Eq. 3; 0 where the maps are equal
    L = lambda_D * L_D + lambda_CE * CE(P, Y)        Eq. 4

Gradient reaches the student through rows and anchors. Relations span the global batch. Memory
grows with B * M, for LPKD with B * k * D, and never with M * M * D.

Symbols: B images of this process, M of the global batch, A fixed anchors, D_t and D_s the widths,
C classes, S side of an image.

    python rrkd.py                                        digits, half a minute: teacher 95.0 %,
                                                          baseline 88.3, student 93.6 (probe)
    python rrkd.py --loss spkd --output_dir runs/spkd     a rival; or lpkd, feature, kd (logits)
    python rrkd.py --table 1 --data_path DIR              a table of the paper, three seeds
    python rrkd.py --data DIR --teacher runs/sdssl/checkpoint.pth --no-labels --no-baseline
    torchrun --nproc_per_node=8 rrkd.py --data pets       ResNet-34, fine-tuned, into ResNet-18

The student goes to --output_dir, its teacher to `teacher/` and the student's network without
distillation to `baseline/` below it. --max_steps cuts these short, but never a teacher.

    what                    paper                      released code         here
    Eq. 3                   +1 inside the quotient     as above              as released
    classifier of Eq. 4     trained                    random, not trained   trained
    tau of LPKD             0.5                        not applied           0.5; --tau 1
    most confident anchors  "the teacher's"            -                     of a probe on it
    momentum, colour data   0.9 "during distillation"  -                     0.9; the teacher: 0
    fixed anchors           one set for the whole run  -                     embedded at each step
    accuracy, Tables 3, 4   "test accuracy"            -                     of the classifier
"""
import argparse
import functools
import json
import math
import statistics
from itertools import pairwise, zip_longest
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torchvision.models.resnet import BasicBlock

from common import (MEAN, RESNETS, STD, BatchNorm, ImageData, InputError, Parser, ResNet, Run, View,
                    ViewLoader, add_arguments, apply_recipe, at_least, autocast, backbone_weights,
                    barrier, cosine_schedule, create_backbone, distributed, draw, eval_batches,
                    existing_file, extract_features, fp32, gather, is_moco_small, knn_accuracy,
                    launch, load_data, load_weights, local_rows, log, meta_of, parameter_groups,
                    rank, read_checkpoint, save_figure, setup, start_from, subplots, to_device,
                    world_size)

# -------------------------------------------------------------------------------------- recipes

# lr is for a batch of 256: 0.2 is the paper's 0.1 at its batch of 128; constant, without decay
SGD = dict(batch_size=128, lr=0.2, momentum=0.9, warmup_epochs=0, weight_decay=0.0,
           pretrained=False, patch_size=4)
GREY = dict(  # Sec. 5.1: pixels in [-1, 1], no augmentation
    teacher_arch="ae64", arch="ae32", teacher_momentum=0.9, labels=False, metric="probe",
    mean=(0.5,) * 3, std=(0.5,) * 3, view=dict(scale=(1, 1), flip=0.0))
COLOUR = dict(  # Sec. 5.2: momentum of 0.9 to distil, none for the teacher
    teacher_momentum=0.0, labels=True, metric="head", mean=MEAN, std=STD, validation=0.0)
RECIPES = {
    "digits": dict(**SGD, **GREY, img_size=8, epochs=100, validation=0.0),  # epochs by trial
    "mnist": dict(**SGD, **GREY, img_size=28, epochs=20, validation=0.1),  # Sec. 5.1
    "cifar10": dict(  # Sec. 5.2: flips only; its SVHN has 20 epochs
        **SGD, **COLOUR, teacher_arch="resnet18", arch="resnet9_half", img_size=32, epochs=50,
        view=dict(scale=(1, 1))),
    "imagenet": dict(  # Sec. 5.3, whose Flowers have 50 epochs; strengths of the jitter are ours
        **SGD | dict(pretrained=True, patch_size=16), **COLOUR, teacher_arch="resnet34",
        arch="resnet18", img_size=224, epochs=20,
        view=dict(jitter=(0.4, 0.4, 0.4, 0.0), p_jitter=1.0)),
}

# --------------------------------------------------------------------------------------- losses

def unit(x: Tensor) -> Tensor:
    """Rows of length one. A row of zeros stays, without F.normalize's gradient of 1e12."""
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm > 1e-12, x / norm.clamp(min=1e-12), 0 * x)


@fp32
def relative_representation(z: Tensor, anchors: Tensor | None = None) -> Tensor:
    """Cosines of rows of z (B, D) and anchors (A, D), default z itself -> (B, A)."""
    if anchors is None:
        anchors = z
    return unit(z) @ unit(anchors).T  # Eq. 2


@fp32
def rrkd_loss(v_s: Tensor, v_t: Tensor, eps: float = 1e-8) -> Tensor:
    """Mean of -log of the cosine of rows of V_s and V_t (B, M), rescaled to [0, 1]."""
    cosine = (unit(v_s) * unit(v_t)).sum(-1).clamp(min=-1)  # (B,); rounding may go below -1
    return -(cosine / 2 + 1 / 2 + eps).log().mean()  # Eq. 3


@fp32
def spkd_loss(z_s: Tensor, z_t: Tensor) -> Tensor:
    """SPKD: squared error of the maps Z Z^T (B, M), rows normalised after the product."""
    return F.mse_loss(unit(z_s @ gather(z_s).T), unit(z_t @ gather(z_t).T))


@fp32
def lpkd_loss(z_s: Tensor, z_t: Tensor, k: int = 5, sigma: float = 1.0) -> Tensor:
    """LPKD: sum of w_ij * |z_s,i - z_s,j|^2 / k over the k rows j nearest to i for the teacher,
    but i itself; w_ij = exp(-|z_t,i - z_t,j|^2 / sigma^2)."""
    all_s = gather(z_s)  # (M, D_s)
    all_t = gather(z_t)  # (M, D_t)
    M = len(all_t)
    itself = torch.arange(M, device=z_t.device)[local_rows(M)]  # (B,)
    distance = torch.cdist(z_t, all_t).scatter(1, itself[:, None], torch.inf)  # (B, M)
    nearest = distance.topk(min(k, M - 1), largest=False).indices  # (B, k)
    # F.embedding(i, x) is x[i], but its gradient adds in a fixed order: runs repeat to the bit
    squared_s = (z_s[:, None] - F.embedding(nearest, all_s)).square().sum(-1)  # (B, k)
    squared_t = (z_t[:, None] - F.embedding(nearest, all_t)).square().sum(-1)  # (B, k)
    weights = torch.exp(-squared_t / sigma**2)
    # the sum is over the global batch, and the average over processes will divide it
    return world_size() * (weights * squared_s).sum() / k


@fp32
def soft_cross_entropy(logits_s: Tensor, logits_t: Tensor, tau: float = 1.0) -> Tensor:
    """Cross-entropy of logits (B, C) with the teacher's soft labels at temperature tau."""
    return F.cross_entropy(logits_s / tau, (logits_t / tau).softmax(-1))


@fp32
def distillation_losses(loss, z_s, z_t, logits=None, logits_t=None, anchors_s=None, anchors_t=None,
                        tau=None) -> dict[str, Tensor]:
    """Terms of Eq. 4 from features (B, D), logits (B, C) and fixed anchors (A, D), if there are
    any; LPKD's lambda and gamma are loss_soft's and loss_lpkd's weights."""
    if loss == "rrkd":
        if anchors_s is None:
            anchors_s = gather(z_s)  # (M, D_s)
            anchors_t = gather(z_t)  # (M, D_t)
        v_s = relative_representation(z_s, anchors_s)  # (B, M) or (B, A)
        v_t = relative_representation(z_t, anchors_t)
        return {"loss_rrkd": rrkd_loss(v_s, v_t)}
    if loss == "spkd":
        return {"loss_spkd": spkd_loss(z_s, z_t)}
    if loss == "lpkd":
        losses = {"loss_lpkd": lpkd_loss(z_s, z_t)}
        if logits is not None:  # where there are labels
            losses["loss_soft"] = soft_cross_entropy(logits, logits_t, tau or 0.5)
        return losses
    if loss == "kd":  # Hinton's; tau^2 makes its gradient of one size for every tau
        tau = tau or 4.0
        return {"loss_kd": tau**2 * soft_cross_entropy(logits, logits_t, tau)}
    return {"loss_feature": F.mse_loss(z_s, z_t)}  # FitNets: z_s is projected to D_t


# ---------------------------------------------------------------------------------------- model

MLPS = dict(ae64=(128, 64), ae32=(64, 32), mlp1200=(1200, 1200), mlp32=(32, 32))  # Sec. 5.1


class Layer(nn.Linear):
    """Dropout of a half, ReLU, linear. `hand_out` draws the numbers `u` (n, inputs)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * (self.u[: len(x)] >= 0.5) * 2
        return super().forward(F.relu(x))


def layers_of(*widths: int) -> nn.Sequential:
    """From each width to the next."""
    return nn.Sequential(*(Layer(*pair) for pair in pairwise(widths)))


class MLP(nn.Module):
    """An encoder of grey images; no dropout or ReLU at its ends."""

    def __init__(self, pixels: int, *widths: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(pixels, widths[0]), *layers_of(*widths))
        self.embed_dim = widths[-1]

    def forward(self, x: Tensor, layers: bool = False):
        x = x.mean(1).flatten(1)  # (B, 3, S, S) of three equal channels -> (B, S*S)
        z = self.layers(x)  # (B, D)
        return [z] if layers else z


class ResNet9Half(ResNet):
    """ResNet-9 x 0.5: one basic block a stage, widths half of ResNet-18's."""

    def __init__(self, img_size: int):
        super().__init__("BasicBlock", [1, 1, 1, 1], img_size)
        self.inplanes = 32
        self.embed_dim = 256
        self.layer_dims = [32, 64, 128, 256]
        stem = self.conv1
        self.conv1 = nn.Conv2d(3, 32, stem.kernel_size, stem.stride, stem.padding, bias=False)
        self.bn1 = BatchNorm(32)
        for i, width in enumerate(self.layer_dims):
            stage = self._make_layer(BasicBlock, width, 1, stride=min(i + 1, 2))
            setattr(self, f"layer{i + 1}", stage)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def make_backbone(arch, img_size, patch_size=4, pretrained=False, **options) -> nn.Module:
    """A backbone of this file or of `create_backbone`; pretrained: with timm's weights."""
    if pretrained and arch not in RESNETS and not arch.startswith("timm/"):
        raise InputError(f"no ImageNet weights for --arch {arch}: pass --no-pretrained")
    if arch in MLPS:
        return MLP(img_size**2, *MLPS[arch])
    if arch == "resnet9_half":
        return ResNet9Half(img_size)
    if pretrained:
        log(f"{arch} starts from timm's ImageNet weights; --no-pretrained: from random ones")
    backbone = create_backbone(arch, img_size, patch_size, pretrained, **options)
    if pretrained and arch in RESNETS:
        theirs = create_backbone(f"timm/{arch}", pretrained=True).model
        load_weights(backbone, theirs.state_dict(), f"timm/{arch}")
    return backbone


class Network(nn.Module):
    """A backbone, and what its losses need on top: a classifier, a decoder to pixels, or a
    projection to the teacher's width. mean, std: how its images are normalised."""

    def __init__(self, arch: str, backbone: nn.Module, classes: int, mean, std):
        super().__init__()
        self.backbone = backbone
        self.size = sum(p.numel() for p in backbone.parameters())
        self.classes = classes
        self.mean = list(mean)
        self.std = list(std)
        self.classifier = None
        self.decoder = None
        self.projection = None
        if classes and arch in MLPS:
            self.classifier = layers_of(backbone.embed_dim, classes)
        elif classes:
            self.classifier = nn.Linear(backbone.embed_dim, classes)

    def hand_out(self, seed: int, step: int, M: int, A: int) -> None:
        """Draws dropout for all images and anchors of a step, and keeps this process's."""
        layers = [module for module in self.modules() if isinstance(module, Layer)]
        widths = [layer.in_features for layer in layers]
        u = draw(seed, step, 2000, M + A, sum(widths))
        u = torch.cat([u[:M][local_rows(M)], u[M:][local_rows(A)]])
        for layer, part in zip(layers, u.split(widths, 1), strict=True):
            layer.u = to_device(part, layer.weight.device)

    def forward(self, x: Tensor, B: int | None = None):
        """Images (n, 3, S, S) -> features (n, D), and for the first B of them, default all, logits
        (B, C) and pixels (B, S*S), None without the part that makes them."""
        z = self.backbone(x)  # (n, D_s)
        logits = None
        pixels = None
        if self.classifier:
            logits = self.classifier(z[:B])  # (B, C)
        if self.decoder:
            pixels = self.decoder(z[:B]).tanh()  # (B, S*S)
        if self.projection:
            z = self.projection(z)  # (n, D_t)
        return z, logits, pixels


def load_teacher(path, args) -> Network:
    """A file's backbone and, if it has one, classifier: frozen, in evaluation mode."""
    content = read_checkpoint(path)
    meta = meta_of(content)
    options = meta.get("backbone") or dict(
        arch=args.teacher_arch, img_size=args.img_size, patch_size=args.patch_size)
    if options["arch"] in MLPS and options["img_size"] != args.img_size:
        raise InputError(f"{path} takes {options['img_size']}-pixel images: leave --img_size out")
    weights = backbone_weights(content)
    if is_moco_small(weights, content):
        options["num_heads"] = 12
    backbone = make_backbone(**options)
    load_weights(backbone, weights, path, as_dino=not meta)
    mean = meta.get("mean") or getattr(backbone, "mean", args.mean)  # its file, timm, or recipe
    std = meta.get("std") or getattr(backbone, "std", args.std)
    teacher = Network(options["arch"], backbone, meta.get("classes", 0), mean, std)
    if teacher.classifier:
        teacher.load_state_dict(content["student"], strict=False)  # its projection is left out
    if args.compile:
        backbone.compile()
    return teacher.eval().requires_grad_(False)


def build(args, classes: int, teacher: Network | None) -> tuple[Network, dict]:
    """-> student, and what a reader of the checkpoint must know. On its own an autoencoder has a
    decoder, any other network a classifier; a student has one where it gets labels or logits."""
    options = dict(arch=args.arch, img_size=args.img_size, patch_size=args.patch_size)
    backbone = make_backbone(**options, pretrained=args.pretrained and not args.init)
    if args.init:
        start_from(backbone, args.init)
    decodes = args.loss == "none" and args.arch.startswith("ae")
    classifies = args.labels or args.loss in ("kd", "none")
    needs_logits = args.loss == "kd" or (args.loss == "lpkd" and args.labels)  # the teacher's
    if decodes or not classifies:
        classes = 0
    elif not classes:
        raise InputError(f"{args.data} has no labels to train {args.arch} with: pass --no-labels "
                         f"--no-baseline --teacher FILE, and another --loss than kd")
    elif needs_logits and teacher and teacher.classes != classes:
        raise InputError(f"--loss {args.loss} needs logits of {classes} classes; the teacher has "
                         f"{teacher.classes}: leave --teacher out, or for lpkd pass --no-labels")
    elif needs_logits and not teacher and args.teacher_arch.startswith("ae"):
        raise InputError(f"--loss {args.loss} needs logits, and --teacher_arch {args.teacher_arch} "
                         f"is an autoencoder: pass mlp1200, say, or for lpkd --no-labels")
    source = teacher or backbone  # a teacher's normalisation becomes its student's
    mean = getattr(source, "mean", args.mean)
    std = getattr(source, "std", args.std)
    student = Network(args.arch, backbone, classes, mean, std)
    if decodes:  # the encoder's widths in reverse, up to the pixels
        student.decoder = layers_of(*reversed(MLPS[args.arch]), args.img_size**2)
    if teacher and args.loss == "feature":
        student.projection = nn.Linear(backbone.embed_dim, teacher.backbone.embed_dim)
    return student, dict(method="rrkd", network="student", backbone=options, classes=classes,
                         mean=student.mean, std=student.std)


# ------------------------------------------------------------------------------------- training

def prepare(args) -> tuple[ImageData, ImageData | None, ImageData | None]:
    """Fills `args` from the recipe -> images to train, check k-NN and test with."""
    train_data, test_data = load_data(args.data, args.data_path)
    apply_recipe(args, RECIPES, train_data)
    order = draw(0, 0, 2001, 1, len(train_data))[0].argsort()  # the same split for every seed
    held_out = int(args.validation * len(order))
    monitor_data = test_data
    if held_out:
        monitor_data = train_data.subset(order[:held_out])
    return train_data.subset(order[held_out:].sort().values), monitor_data, test_data


def features(args, network: Network, data: ImageData, rows=None) -> Tensor:
    """Of whole images, of all or of some rows of the data, on the CPU (n, D)."""
    z, = extract_features(
        network.backbone, data, args.img_size, torch.device(args.device), rows=rows,
        num_workers=args.num_workers, dtype=args.dtype, mean=network.mean, std=network.std)
    return z


def accuracy(args, network: Network, train_data: ImageData, test_data: ImageData | None) -> dict:
    """-> test accuracy in per cent, None without labels of two classes: of the network's own
    classifier ("head", where it has one for as many classes) or of a linear probe."""
    metric = args.metric
    if network.classes != len(train_data.classes):
        metric = "probe"
    known = train_data.subset((train_data.labels >= 0).nonzero()[:, 0])
    if test_data is None or not test_data.labelled or len(known.labels.unique()) < 2:
        return dict(accuracy=None, metric=metric, parameters=network.size)
    z = features(args, network, test_data)  # (n, D)
    if metric == "head":
        logits = network.classifier.eval()(z.to(args.device)).cpu()  # (n, C)
        right = (logits.argmax(1) == test_data.labels).double().mean().item()
    else:
        x = features(args, network, known)
        probe = LogisticRegression(max_iter=5000).fit(x.numpy(), known.labels.numpy())
        right = probe.score(z.numpy(), test_data.labels.numpy())
    return dict(accuracy=100 * right, metric=metric, parameters=network.size)


def choose_anchors(args, teacher: Network, data: ImageData) -> Tensor:
    """Rows of the data that are anchors for the whole run (A,): `random`, as many as in a batch;
    `class`, equally many of each class, no fewer in all; `confident`, as many, those that a linear
    probe of the teacher classifies correctly and most confidently."""
    score = draw(args.seed, 0, 2002, 1, len(data))[0].double()  # (n,)
    if args.anchors == "random":
        return score.argsort()[: args.batch_size]
    if args.anchors == "confident":  # a probe's probability of the class, -1 where it is wrong
        rows = (data.labels >= 0).nonzero()[:, 0]
        z = features(args, teacher, data, rows).numpy()  # (n, D_t)
        probe = LogisticRegression(max_iter=5000).fit(z, data.labels[rows].numpy())
        p, predicted = torch.from_numpy(probe.predict_proba(z)).double().max(1)
        right = torch.from_numpy(probe.classes_)[predicted] == data.labels[rows]
        score[:] = -1.0
        score[rows] = p.where(right, -1.0)
    each = math.ceil(args.batch_size / len(data.classes))
    chosen = []
    for c in range(len(data.classes)):
        rows = ((data.labels == c) & (score >= 0)).nonzero()[:, 0]
        chosen.append(rows[score[rows].argsort(descending=True)[:each]])
    return torch.cat(chosen)


def fixed_anchors(args, teacher: Network | None, data: ImageData, device):
    """This process's share of the anchors' images, and the teacher's features of all (A, D_t); []
    and None where the batch is the anchors."""
    if not teacher or args.loss != "rrkd" or args.anchors == "batch":
        return [], None
    chosen = choose_anchors(args, teacher, data)
    if len(chosen) % world_size():
        raise InputError(f"{len(chosen)} anchors do not divide by {world_size()} processes: use "
                         f"--anchors batch")
    mine = chosen[local_rows(len(chosen))]
    batches = eval_batches(data, mine, args.img_size, device, mean=teacher.mean, std=teacher.std)
    x_a = torch.cat(list(batches))  # (A / processes, 3, S, S)
    with torch.no_grad():
        z_t, *_ = teacher(x_a)
    return x_a, gather(z_t)


def fit(args, data, teacher_file=None) -> dict:
    """Trains args.arch with args.loss -> its accuracy, parameters and minutes."""
    # data and networks
    device = setup(args)  # seeds the weights
    train_data, monitor_data, test_data = data
    teacher = None
    weights = {}
    if args.loss != "none":
        teacher = load_teacher(teacher_file, args).to(device)
        # of Eq. 4; LPKD's as in Sec. 4 and 5.2, of the others 1
        weights = {"loss_lpkd": 1.5, "loss_soft": args.lambda_soft, "loss_ce": args.lambda_ce}
        if args.lambda_d is not None:
            weights[f"loss_{args.loss}"] = args.lambda_d
    student, meta = build(args, len(train_data.classes), teacher)
    student.to(device)
    model = distributed(student)
    supervised = student.classifier is not None and (args.labels or not teacher)
    if supervised:  # unlabelled images, which STL-10 has, are left out
        train_data = train_data.subset((train_data.labels >= 0).nonzero()[:, 0])
    if args.compile:
        student.backbone.compile()
    groups = parameter_groups(student, args.weight_decay)
    optimizer = torch.optim.SGD(groups, momentum=args.momentum)
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")

    # the run: one view of each image, k-NN of the student
    loader = ViewLoader(train_data, [View(args.img_size, **args.view)], args.batch_size, args.seed,
                        device, args.num_workers, student.mean, student.std)
    knn = functools.partial(
        knn_accuracy, student.backbone, train_data, monitor_data, args.img_size, device,
        num_workers=args.num_workers, dtype=args.dtype, mean=student.mean, std=student.std)
    maps = first_maps(args, teacher, student, test_data or train_data)
    run = Run(args, loader, meta, {"knn": (knn, args.knn_every)}, student=student,
              optimizer=optimizer, scaler=scaler)

    # schedule and fixed anchors
    M = args.batch_size
    B = M // world_size()
    peak_lr = args.lr * M / 256
    lr = cosine_schedule(peak_lr, peak_lr, run.total, int(args.warmup_epochs * run.steps_per_epoch))
    x_a, anchors_t = fixed_anchors(args, teacher, train_data, device)
    A = len(x_a) * world_size()
    log(f"{args.arch}, --loss {args.loss}: {student.size:,} parameters, {run.total} steps of {M} "
        f"images, lr {args.lr:.1e} * {M} / 256 = {peak_lr:.1e}")

    for step, (x,), index in run.steps():  # one view (B, 3, S, S)
        # schedule
        for group in optimizer.param_groups:
            group["lr"] = float(lr[step])

        # views: fixed anchors go through the student with the batch, its BatchNorm included
        labels = to_device(train_data.labels[index], device)  # (B,)
        if A:
            x = torch.cat([x, x_a])  # (B + A / processes, 3, S, S)
        student.hand_out(args.seed, step, M, A)

        # teacher: features and logits without gradient
        if teacher:
            with torch.no_grad(), autocast(device, args.dtype):
                z_t, logits_t, _ = teacher(x[:B])  # (B, D_t), (B, C)

        # student
        with autocast(device, args.dtype):
            z_s, logits, pixels = model(x, B)  # (B + A / processes, D_s), (B, C), (B, S*S)
        anchors_s = gather(z_s[B:]) if A else None  # (A, D_s)
        z_s = z_s[:B]

        # losses
        losses = {}
        if teacher:
            losses = distillation_losses(args.loss, z_s, z_t, logits, logits_t, anchors_s,
                                         anchors_t, args.tau)
        if supervised:
            losses["loss_ce"] = fp32(F.cross_entropy)(logits, labels)
        if student.decoder:
            losses["loss_pixel"] = fp32(F.mse_loss)(pixels, x.mean(1).flatten(1))
        loss = sum(weights.get(name, 1.0) * term for name, term in losses.items())  # Eq. 4
        losses["loss"] = loss

        # backward and step
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        # log, check and save, where it is due
        run.end_step(step, losses, features=z_s, lr=float(lr[step]))
    return result_of(args, run, student, train_data, test_data, maps)


def relation_map(args, network: Network, data: ImageData) -> Tensor:
    """V (64, 64) of evenly spaced images, sorted by label."""
    rows = torch.linspace(0, len(data) - 1, min(64, len(data))).round().long()
    rows = rows[data.labels[rows].argsort(stable=True)]
    return relative_representation(features(args, network, data, rows))


def first_maps(args, teacher, student: Network, data: ImageData) -> dict:
    """-> relation maps of teacher and untrained student, if it has one; prints their loss."""
    if not teacher:
        return {}
    v_t = relation_map(args, teacher, data)
    v_s = relation_map(args, student, data)
    collapsed = rrkd_loss(torch.ones_like(v_t), v_t)
    log(f"chance level of loss_rrkd, on {len(v_t)} whole images: {rrkd_loss(v_s, v_t):.3f} "
        f"untrained, {collapsed:.3f} with all images in one point")
    return {"teacher": v_t, "untrained": v_s}


def result_of(args, run: Run, student: Network, train_data, test_data, maps) -> dict:
    """The test accuracy, once: a finished run that is resumed finds it in its log."""
    barrier()  # the first process has written the log
    step = max(run.start, run.stop)
    seconds = 0.0  # of the training steps, those before an interruption too
    done = 0
    for record in run.records():
        if record["step"] == step and "parameters" in record:
            return record
        if "images_per_s" in record:
            seconds += (record["step"] - done) * args.batch_size / record["images_per_s"]
            done = record["step"]
    if maps:
        maps["trained"] = relation_map(args, student, test_data or train_data)
        if rank() == 0:
            draw_maps(run.folder / "maps.png", maps)
    result = dict(accuracy(args, student, train_data, test_data), minutes=seconds / 60)
    run.record(step, **result)
    return result


def variant(args, **changes) -> argparse.Namespace:
    """The same arguments but for some."""
    return argparse.Namespace(**{**vars(args), **changes})


def train(args) -> None:
    """Trains teacher, unless a file holds it, baseline, and student."""
    device = setup(args)
    if args.teacher and not args.img_size:
        args.img_size = meta_of(read_checkpoint(args.teacher)).get("backbone", {}).get("img_size")
    data = prepare(args)
    train_data, _, test_data = data
    C = len(train_data.classes)

    # what cannot work is found before a network is trained for nothing
    if args.anchors in ("class", "confident") and C < 2:
        raise InputError(f"--anchors {args.anchors} needs labels of two classes or more, and "
                         f"{args.data} has {C}: use random")
    teacher = None
    if args.teacher:
        teacher = load_teacher(args.teacher, args).to(device)
    build(args, C, teacher)
    if args.baseline:
        build(variant(args, loss="none"), C, teacher=None)

    # teacher
    results = {}
    folder = Path(args.output_dir)
    teacher_file = args.teacher or folder / "teacher" / "checkpoint.pth"
    if teacher:
        results["teacher"] = accuracy(args, teacher, train_data, test_data)
    elif args.loss != "none":
        first = variant(args, loss="none", arch=args.teacher_arch, momentum=args.teacher_momentum,
                        init=None, max_steps=None, output_dir=str(folder / "teacher"))
        results["teacher"] = fit(first, data)

    # baseline and student
    if args.baseline and args.loss != "none":
        alone = variant(args, loss="none", output_dir=str(folder / "baseline"))
        results["baseline"] = fit(alone, data)
    results["student"] = fit(args, data, teacher_file)

    # accuracies side by side
    for name, result in results.items():
        score = "none: no labels of two classes to test with"
        if result["accuracy"] is not None:
            score = f"{result['accuracy']:.2f} %"
        log(f"{name:10}{result['parameters']:>12,} parameters   {result['metric']} accuracy "
            f"{score}")


# ------------------------------------------------------------------------------------ arguments

def parse_arguments(argv=None):
    flag = argparse.BooleanOptionalAction
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_arguments(parser, "rrkd")
    add = parser.add_argument_group("networks").add_argument
    add("--teacher_arch", help=f"as --arch, and for both also {', '.join(MLPS)}, resnet9_half")
    add("--teacher", type=existing_file, metavar="FILE", help="its checkpoint or weights")
    add("--pretrained", action=flag, help="timm's ImageNet weights (default: recipe)")
    add("--baseline", action=flag, default=True, help="also the student without distillation")
    add = parser.add_argument_group("method").add_argument
    losses = ["rrkd", "spkd", "lpkd", "kd", "feature", "none"]
    add("--loss", default="rrkd", choices=losses, help="none: --arch on its own (default: rrkd)")
    add("--labels", action=flag, help="cross-entropy too, Eq. 4 (default: recipe)")
    add("--anchors", default="batch", choices=["batch", "random", "class", "confident"],
        help="what rrkd compares an image with; all but batch stay fixed (default: batch)")
    add("--lambda_d", type=at_least(0.0), help="weight of the distillation (1; lpkd 1.5)")
    add("--lambda_ce", type=at_least(0.0), default=1.0, help="weight of the labels' term (1)")
    add("--lambda_soft", type=at_least(0.0), default=2.0, help="weight of lpkd's soft labels (2)")
    add("--tau", type=at_least(1e-6), help="temperature of soft labels (lpkd 0.5, kd 4)")
    add("--momentum", type=at_least(0.0), help="of SGD (default: recipe)")
    add("--metric", choices=["probe", "head"], help="what is tested (default: recipe)")
    add = parser.add_argument_group("tables").add_argument
    add("--table", type=int, choices=list(TABLES), help="of the paper, instead of one run")
    add("--seeds", type=at_least(0), nargs="+", default=[42, 43, 44], help="of a table (42 43 44)")
    parser.set_defaults(data=None)  # a table has its own
    args = parser.parse_args(argv)
    if args.data is None and not args.table:
        args.data = "digits"
    if args.anchors != "batch" and (args.loss != "rrkd" or args.table):
        parser.error("--anchors is for --loss rrkd, and a --table has its own")
    if args.teacher and (args.loss == "none" or args.table):
        parser.error("--loss none trains --arch on its own, and --table trains its own teachers: "
                     "leave --teacher out")
    return args


# --------------------------------------------------------------- the paper's tables, and figures

# settings: of all rows. columns: {data: (the paper's numbers of the first rows, settings)}. rows:
# (name, folder, settings), the first of them the teacher; a folder that two tables name is one run
TEACHER = dict(loss="none", init=None, max_steps=None)  # --init is the student's; never cut short
AE64 = ("teacher (AE-64)", "ae64", dict(TEACHER, arch="ae64"))
RIVALS = [(name, loss, dict(loss=loss)) for name, loss in {
    "SPKD": "spkd", "LPKD": "lpkd", "RRKD": "rrkd", "no distillation": "none", "KD (Hinton)": "kd",
    "feature regression": "feature"}.items()]
TABLES = {
    1: dict(
        title="self-supervised MNIST, linear probe", settings=dict(recipe="mnist"),
        columns={"mnist": ([87.99, 74.14, 80.88], {})},
        rows=[AE64,
              ("baseline (AE-32), lr 1e-8", "ae32-lr1e-8", dict(loss="none", lr=2e-8)),
              ("student (AE-32), RRKD", "ae32-rrkd", dict(loss="rrkd")),
              ("baseline (AE-32), lr 0.1", "ae32", dict(loss="none")),
              ("student (AE-32), feature regression", "ae32-feature", dict(loss="feature"))]),
    2: dict(
        title="supervised MNIST, linear probe",
        settings=dict(recipe="mnist", arch="mlp32", labels=True, momentum=0.0),
        columns={"mnist": ([95.64, 90.87, 92.94], {})},
        rows=[("teacher (MLP-1200)", "mlp1200", dict(TEACHER, arch="mlp1200")),
              ("baseline (MLP-32)", "mlp32", dict(loss="none")),
              ("student (MLP-32), RRKD", "mlp32-rrkd", dict(loss="rrkd")),
              ("student (MLP-32), KD (Hinton), lr 0.02", "mlp32-kd", dict(loss="kd", lr=0.04))]),
    3: dict(
        title="relation-based distillation, accuracy of the classifier",
        settings=dict(recipe="cifar10"),
        columns={"cifar10": ([88.13, 85.85, 85.56, 86.21], {}),
                 "cifar100": ([60.72, 56.35, 57.04, 57.48], {}),
                 "svhn": ([94.66, 94.56, 94.49, 94.55], dict(epochs=20))},
        rows=[("teacher", "teacher", dict(TEACHER, arch="resnet18", momentum=0.0)), *RIVALS]),
    4: dict(
        title="transfer, accuracy of the classifier", settings=dict(recipe="imagenet"),
        columns={"cars": ([78.60, 72.63, 70.47, 76.79], {}),
                 "pets": ([90.52, 77.19, 73.81, 81.22], {}),
                 "flowers102": ([85.76, 80.50, 77.27, 84.62], dict(epochs=50))},
        rows=[("teacher", "teacher", dict(TEACHER, arch="resnet34", momentum=0.0)), *RIVALS]),
    5: dict(
        title="anchors, self-supervised MNIST, linear probe", settings=dict(recipe="mnist"),
        columns={"mnist": ([87.99, 81.42, 80.21, 80.59, 80.52], {})},
        rows=[AE64,
              ("in-batch, 128", "ae32-rrkd", dict(loss="rrkd")),
              ("random, 128", "ae32-random", dict(loss="rrkd", anchors="random")),
              ("per class, 130", "ae32-class", dict(loss="rrkd", anchors="class")),
              ("best per class, 130", "ae32-confident", dict(loss="rrkd", anchors="confident"))]),
}


def table(args) -> None:
    """Trains what a table needs; prints it beside the paper's, draws it, and writes it as JSON."""
    setup(args)
    spec = TABLES[args.table]
    columns = [args.data] if args.data else list(spec["columns"])
    lines = []
    for column in columns:
        lines += table_column(args, spec, column)
    if rank() > 0:
        return
    path = Path(args.output_dir) / f"table{args.table}.json"
    content = dict(table=args.table, title=spec["title"], seeds=args.seeds, rows=lines)
    path.write_text(json.dumps(content, indent=1))
    log(f"\nTable {args.table}: {spec['title']}, in per cent; seeds {args.seeds}\n"
        f"{'data':12}{'':38}{'parameters':>12}{'paper':>8}{'here':>8}{'std':>7}{'minutes':>9}")
    figure, axes = subplots(1, len(columns), 4.4, 4)
    axes = dict(zip(columns, axes[0], strict=True))
    for line in lines:
        paper = "" if line["paper"] is None else f"{line['paper']:.2f}"
        std = "" if line["std"] is None else f"{line['std']:.2f}"
        data_name = Path(line["data"]).name
        log(f"{data_name:12}{line['name']:38}{line['parameters']:>12,}{paper:>8}"
            f"{line['mean']:>8.2f}{std:>7}{line['minutes']:>9.1f}")
        axis = axes[line["data"]]
        here = axis.errorbar(line["parameters"], line["mean"], line["std"], fmt="o",
                             label=line["name"])
        if paper:
            axis.plot(line["parameters"], line["paper"], "x", color=here[0].get_color())
        axis.set(title=data_name, xlabel="parameters (o here, x paper)", ylabel="accuracy in %",
                 xscale="log")
        axis.legend(fontsize=6)
    save_figure(figure, path.with_suffix(".png"))
    log(f"wrote {path} and {path.with_suffix('.png')}")


def table_column(args, spec: dict, column: str) -> list[dict]:
    """Trains every row on one data set -> a line for each. Finished runs are not repeated."""
    data_name = Path(column).name  # a folder named cifar10 is CIFAR-10
    paper, settings = spec["columns"].get(data_name, ([], {}))
    given = {key: value for key, value in vars(args).items() if value is not None}
    own = dict(data=column, table=None, seeds=None, resume=not args.overwrite)
    base = variant(args, **spec["settings"] | settings | given | own)
    data = prepare(base)
    train_data, _, test_data = data
    if test_data is None or not test_data.labelled or len(train_data.classes) < 2:
        raise InputError(f"{column} needs labels: train/ and val/ of two class folders or more")
    place = Path(args.output_dir) / data_name
    _, teacher_folder, _ = spec["rows"][0]
    lines = []
    for (name, folder, settings), number in zip_longest(spec["rows"], paper):
        values = []
        minutes = 0.0
        for seed in args.seeds:
            row = variant(base, seed=seed, **settings, output_dir=str(place / folder / str(seed)))
            teacher_file = place / teacher_folder / str(seed) / "checkpoint.pth"
            result = fit(row, data, teacher_file)
            log(f"{column}, {name}, seed {seed}: {result['accuracy']:.2f} %")
            values.append(result["accuracy"])
            minutes += result["minutes"]
        std = statistics.stdev(values) if len(values) > 1 else None
        lines.append(dict(data=column, name=name, values=values, minutes=minutes, paper=number,
                          parameters=result["parameters"], mean=statistics.mean(values), std=std))
    return lines


def draw_maps(path: Path, maps: dict[str, Tensor]) -> None:
    """The maps V side by side, each with its loss (Eq. 3) to the teacher's."""
    figure, axes = subplots(1, len(maps), 3.2, 3)
    for axis, (name, v) in zip(axes[0], maps.items(), strict=True):
        image = axis.imshow(v, vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set(title=f"{name}: loss {rrkd_loss(v, maps['teacher']):.3f}", xticks=[], yticks=[])
    figure.colorbar(image, ax=axes[0].tolist(), label="cosine")
    save_figure(figure, path)


if __name__ == "__main__":
    arguments = parse_arguments()
    launch(lambda: table(arguments) if arguments.table else train(arguments))
