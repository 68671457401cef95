"""RRKD: Knowledge Distillation with Relative Representations (Ramos, Alampay, Abu), and its rivals
SPKD and LPKD.

The idea. Two networks that see the same images arrange them alike, up to rotation and scale. So
describe an image not by its feature but by its cosine similarities with a set of anchors, by
default all images of the batch: its relative representation. The student learns to give each image
the relative representation that the frozen teacher gives it. The widths need not agree, nothing is
projected, and no labels are needed; where there are some, a cross-entropy is added.

    x -> teacher, frozen -> Z_t (n, D_t) -> cosines of the rows -> V_t (n, m)     a row: an image
    |                                                               |            a column: an anchor
    |                                   L_D = -mean log(cos(V_t,i , V_s,i) / 2 + 1/2 + eps)
    |                                                               |
    +--> student ---------> Z_s (n, D_s) -> cosines of the rows -> V_s (n, m)
                             |
                             +--> classifier -> P, with --labels

    V = Z~ Z~^T, rows of Z normalised                Eq. 2
    L_D                                              Eq. 3
    L = lambda_D * L_D + lambda_CE * CE(P, Y)        Eq. 4

SPKD compares Z Z^T, its rows normalised after the product; LPKD pulls together what lies close
together for the teacher. All of them move the student alone, and reach it through both sides of
the map: as a row and as an anchor. The teacher is frozen, in evaluation mode. Relations span the
global batch: a process compares its own n rows with the m rows that it gathers from all. Memory
grows with n * m, for LPKD with n * k * D, and never with m * m * D.

Symbols: B images of this process, M of the global batch, A fixed anchors, D_t and D_s the widths,
C classes, S side of an image.

    python rrkd.py                                        digits: teacher, baseline, student
    python rrkd.py --loss spkd --output_dir runs/spkd     a rival: lpkd, kd (Hinton), feature
                                                          (FitNets); --labels adds Eq. 4
    python rrkd.py --table 1 --data_path DIR              a table of the paper over three seeds
    python rrkd.py --data DIR --teacher runs/sdssl/checkpoint.pth --arch resnet18 --no-labels \
        --no-baseline
    torchrun --nproc_per_node=8 rrkd.py --data pets       an ImageNet ResNet-34, fine-tuned here,
                                                          into a ResNet-18

A single run writes the student to --output_dir, its teacher to `teacher/` and the student's network
without distillation to `baseline/` below it. --max_steps cuts baseline and student short, never a
teacher, so that a resumed student is exact.

Measured: the first command (seed 0, half a minute on a CPU core), accuracy of a linear probe:
teacher 95.0 %, baseline 88.3 %, student 93.6 %.

    what                    paper                      released code         here
    Eq. 3                   +1 inside the quotient     as above              as released: 0 where
                                                                             the maps are equal
    classifier of Eq. 4     trained                    random, not trained   trained
    tau of LPKD             0.5                        not applied           0.5; --tau 1
    most confident anchors  "the teacher's"            -                     of a probe on it
    momentum, colour data   0.9 "during distillation"  -                     so; none to teach
    fixed anchors           one set for the whole run  -                     embedded anew by the
                                                                             student at each step
    accuracy, Tables 3, 4   "test accuracy"            -                     of the classifier
"""
import argparse
import functools
import json
import math
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torchvision.models.resnet import BasicBlock

from common import (MEAN, RECIPE_OF, RESNETS, STD, BatchNorm, ImageData, InputError, Parser, ResNet,
                    Run, View, ViewLoader, add_arguments, apply_recipe, at_least, autocast,
                    backbone_weights, barrier, cosine_schedule, create_backbone, distributed, draw,
                    eval_batches, existing_file, extract_features, fp32, gather, knn_accuracy,
                    launch, load_data, load_weights, local_rows, log, meta_of, parameter_groups,
                    rank, read_checkpoint, setup, start_from, subplots, world_size)

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
    "cifar10": dict(  # Sec. 5.2: flips only
        **SGD, **COLOUR, teacher_arch="resnet18", arch="resnet9_half", img_size=32, epochs=50,
        view=dict(scale=(1, 1))),
    "imagenet": dict(  # Sec. 5.3
        **SGD | dict(pretrained=True, patch_size=16), **COLOUR, teacher_arch="resnet34",
        arch="resnet18", img_size=224, epochs=20,
        view=dict(jitter=(0.4, 0.4, 0.4, 0.0), p_jitter=1.0)),
}

# --------------------------------------------------------------------------------------- losses


def unit(x: Tensor) -> Tensor:
    """Rows of length one. A row of zeros stays, without a gradient, where F.normalize would give
    it one of 1e12."""
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm > 1e-12, x / norm.clamp(min=1e-12), 0 * x)


@fp32
def relative_representation(z: Tensor, anchors: Tensor | None = None) -> Tensor:
    """Cosines of the rows of z (n, D) with those of anchors (m, D), default z itself -> (n, m)."""
    if anchors is None:
        anchors = z
    return unit(z) @ unit(anchors).T  # Eq. 2


@fp32
def rrkd_loss(v_s: Tensor, v_t: Tensor, eps: float = 1e-8) -> Tensor:
    """Mean over the rows of V_s and V_t (n, m) of -log of their cosine, rescaled to [0, 1]."""
    cosine = (unit(v_s) * unit(v_t)).sum(-1).clamp(min=-1)  # (n,); rounding may go below -1
    return -(cosine / 2 + 1 / 2 + eps).log().mean()  # Eq. 3


@fp32
def spkd_loss(z_s: Tensor, z_t: Tensor, all_s: Tensor | None = None,
              all_t: Tensor | None = None) -> Tensor:
    """SPKD: mean squared error of the maps Z Z^T (n, m), rows normalised after the product.

    z (n, D): this process's rows; all (m, D): those of the global batch, default z itself.
    """
    if all_s is None:
        all_s = z_s
        all_t = z_t
    return F.mse_loss(unit(z_s @ all_s.T), unit(z_t @ all_t.T))


@fp32
def lpkd_loss(z_s: Tensor, z_t: Tensor, k: int = 5, sigma: float = 1.0,
              all_s: Tensor | None = None, all_t: Tensor | None = None,
              rows: Tensor | None = None) -> Tensor:
    """LPKD: sum of w_ij * |z_s,i - z_s,j|^2 / k over the k rows j that are nearest to row i for the
    teacher, w_ij = exp(-|z_t,i - z_t,j|^2 / sigma^2).

    z (n, D), all (m, D): as in `spkd_loss`; rows (n,): where z is in all, so that a row is no
    neighbour of itself.
    """
    if all_s is None:
        all_s = z_s
        all_t = z_t
    if rows is None:
        rows = torch.arange(len(z_t), device=z_t.device)
    distance = torch.cdist(z_t, all_t).scatter(1, rows[:, None], torch.inf)  # (n, m)
    nearest = distance.topk(min(k, len(all_t) - 1), largest=False).indices  # (n, k)
    # F.embedding(i, x) is x[i], but its gradient adds in a fixed order: runs repeat to the bit
    squared_s = (z_s[:, None] - F.embedding(nearest, all_s)).square().sum(-1)  # (n, k)
    squared_t = (z_t[:, None] - F.embedding(nearest, all_t)).square().sum(-1)  # (n, k)
    weights = torch.exp(-squared_t / sigma**2)
    # a sum over the global batch, of which each process gives its rows: processes are averaged
    return len(all_s) / len(z_s) * (weights * squared_s).sum() / k


@fp32
def soft_cross_entropy(logits_s: Tensor, logits_t: Tensor, tau: float = 1.0) -> Tensor:
    """Mean cross-entropy of logits (B, C) with the teacher's soft labels, at temperature tau."""
    return F.cross_entropy(logits_s / tau, (logits_t / tau).softmax(-1))


def distillation_losses(loss: str, z_s: Tensor, z_t: Tensor, anchors_s: Tensor | None = None,
                        anchors_t: Tensor | None = None) -> dict[str, Tensor]:
    """The term that compares features: own rows (B, D) with fixed anchors (A, D), where there are
    any, else with the gathered rows of all processes (M, D)."""
    if loss == "feature":
        return {"loss_feature": fp32(F.mse_loss)(z_s, z_t)}  # z_s is projected to D_t
    if loss == "kd":
        return {}  # logits alone
    if anchors_s is None:
        anchors_s = gather(z_s)  # (M, D_s)
        anchors_t = gather(z_t)  # (M, D_t)
    if loss == "rrkd":
        v_s = relative_representation(z_s, anchors_s)  # (B, M) or (B, A)
        v_t = relative_representation(z_t, anchors_t)
        return {"loss_rrkd": rrkd_loss(v_s, v_t)}
    if loss == "spkd":
        return {"loss_spkd": spkd_loss(z_s, z_t, anchors_s, anchors_t)}
    rows = torch.arange(len(anchors_s), device=z_s.device)[local_rows(len(anchors_s))]  # (B,)
    return {"loss_lpkd": lpkd_loss(z_s, z_t, all_s=anchors_s, all_t=anchors_t, rows=rows)}


def logit_losses(loss: str, logits: Tensor, logits_t: Tensor,
                 tau: float | None = None) -> dict[str, Tensor]:
    """The term that compares logits (B, C): Hinton's KD at a temperature of 4, or what LPKD adds
    where there are labels, at 0.5."""
    if loss == "kd":
        tau = tau or 4.0  # tau^2: the gradient is then of the same size for every tau
        return {"loss_kd": tau**2 * soft_cross_entropy(logits, logits_t, tau)}
    return {"loss_soft": soft_cross_entropy(logits, logits_t, tau or 0.5)}


# ---------------------------------------------------------------------------------------- model

MLPS = {  # widths after the pixels, Sec. 5.1
    "ae64": (128, 64), "ae32": (64, 32), "mlp1200": (1200, 1200), "mlp32": (32, 32)}


class Dropout(nn.Module):
    """Dropout of a half that is handed its uniform numbers `u` (rows, width) before the forward
    pass, so that they are those of the global batch."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.u = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (self.u[: len(x)] >= 0.5) * 2


class MLP(nn.Module):
    """Linear layers; before each but the first, dropout and then ReLU. `head`: before the first one
    too.

    An encoder takes grey images and so ends at a linear layer: its features have neither dropout
    nor ReLU on them.
    """

    def __init__(self, dims: list[int], head: bool):
        super().__init__()
        pairs = zip(dims[:-1], dims[1:], strict=True)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairs)
        self.head = head
        dropped = dims[:-1] if head else dims[1:-1]
        self.dropouts = nn.ModuleList(Dropout(width) for width in dropped)
        self.embed_dim = dims[-1]
        self.out_features = dims[-1]  # as nn.Linear calls it

    def forward(self, x: Tensor, layers: bool = False):
        if not self.head:
            x = x.mean(1).flatten(1)  # (B, 3, S, S) of three equal channels -> (B, S*S)
            x = self.layers[0](x)
        linear = self.layers if self.head else self.layers[1:]
        for dropout, layer in zip(self.dropouts, linear, strict=True):
            x = layer(F.relu(dropout(x)))  # (B, D_l)
        return [x] if layers else x


class ResNet9Half(ResNet):
    """ResNet-9 x 0.5: one basic block a stage, every width half of ResNet-18's: features of 256."""

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


def make_backbone(arch: str, img_size: int, patch_size: int = 4, pretrained=False,
                  **options) -> nn.Module:
    """A backbone of this file, or one of `create_backbone`; pretrained: timm's ImageNet weights."""
    if pretrained and arch not in RESNETS and not arch.startswith("timm/"):
        raise InputError(f"there are no ImageNet weights for --arch {arch}: pass --no-pretrained, "
                         f"or timm/NAME")
    if arch in MLPS:
        return MLP([img_size**2, *MLPS[arch]], head=False)
    if arch == "resnet9_half":
        return ResNet9Half(img_size)
    backbone = create_backbone(arch, img_size, patch_size, pretrained, **options)
    if pretrained and arch in RESNETS:
        theirs = create_backbone(f"timm/{arch}", pretrained=True).model
        load_weights(backbone, theirs.state_dict(), f"timm/{arch}")
    return backbone


def make_classifier(arch: str, dim: int, classes: int) -> nn.Module:
    if arch in MLPS:
        return MLP([dim, classes], head=True)
    return nn.Linear(dim, classes)


class Student(nn.Module):
    """A backbone, and what its losses need on top: a classifier, a decoder to pixels, or a
    projection to the teacher's width."""

    def __init__(self, backbone, classifier=None):
        super().__init__()
        self.backbone = backbone
        self.classifier = classifier
        self.decoder = None
        self.projection = None

    @property
    def dropouts(self) -> list[Dropout]:
        return [module for module in self.modules() if isinstance(module, Dropout)]

    def hand_out(self, u: Tensor) -> None:
        """Gives every dropout its columns of the uniform numbers (rows, sum of the widths)."""
        parts = u.split([dropout.width for dropout in self.dropouts], 1)
        for dropout, part in zip(self.dropouts, parts, strict=True):
            dropout.u = part

    def forward(self, x: Tensor, B: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Images (n, 3, S, S) -> features (n, D), and for the first B of them logits (B, C) and
        pixels (B, S*S), None without the part that makes them."""
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


class Teacher(nn.Module):
    """A frozen backbone from a file and, where the file has one, its classifier: always in
    evaluation mode."""

    def __init__(self, path, args):
        super().__init__()
        content = read_checkpoint(path)
        meta = meta_of(content)
        options = meta.get("backbone") or dict(
            arch=args.teacher_arch, img_size=args.img_size, patch_size=args.patch_size)
        if options["arch"] in MLPS and options["img_size"] != args.img_size:
            raise InputError(f"{path} takes images of {options['img_size']} pixels and no others: "
                             f"leave --img_size out")
        self.backbone = make_backbone(**options)
        load_weights(self.backbone, backbone_weights(content), path)
        weights = {}
        if meta.get("method") == "rrkd":
            weights = {name.removeprefix("classifier."): value
                       for name, value in content.get("student", {}).items()
                       if name.startswith("classifier.")}
        self.classifier = None
        self.classes = 0
        if weights:
            *_, bias = weights.values()
            self.classes = len(bias)
            dim = self.backbone.embed_dim
            self.classifier = make_classifier(options["arch"], dim, self.classes)
            self.classifier.load_state_dict(weights)
        # how its images are normalised: as its file says, timm, or the recipe
        self.mean = meta.get("mean") or getattr(self.backbone, "mean", args.mean)
        self.std = meta.get("std") or getattr(self.backbone, "std", args.std)
        self.eval().requires_grad_(False)
        if args.compile:
            self.backbone.compile()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (n, 3, S, S) -> features (n, D_t) and logits (n, C), if it has any."""
        z = self.backbone(x)  # (n, D_t)
        logits = None
        if self.classifier:
            logits = self.classifier(z)  # (n, C)
        return z, logits


def needs_logits(args) -> bool:
    """Whether the loss asks for the teacher's soft labels."""
    return args.loss == "kd" or (args.loss == "lpkd" and args.labels)


def build(args, classes: int, teacher: Teacher | None) -> tuple[Student, dict]:
    """-> student, and what a reader of the checkpoint must know of the backbone.

    On its own (`--loss none`) an autoencoder has a decoder and any other network a classifier; a
    distilled student has a classifier where it gets labels or logits.
    """
    options = dict(arch=args.arch, img_size=args.img_size, patch_size=args.patch_size)
    backbone = make_backbone(**options, pretrained=args.pretrained and not args.init)
    if args.init:
        start_from(backbone, args.init)
    decodes = args.loss == "none" and args.arch.startswith("ae")
    classifies = args.labels or args.loss == "kd"
    if args.loss == "none":
        classifies = not decodes
    if classifies and not classes:
        raise InputError(f"{args.data} has no labels to train {args.arch} with: pass --no-labels "
                         f"--no-baseline --teacher FILE")
    if teacher and needs_logits(args) and teacher.classes != classes:
        raise InputError(f"--loss {args.loss} needs the teacher's logits of {classes} classes, and "
                         f"this teacher has {teacher.classes or 'no classifier'}: train one here, "
                         f"or for lpkd pass --no-labels")
    D = backbone.embed_dim
    student = Student(backbone)
    if classifies:
        student.classifier = make_classifier(args.arch, D, classes)
    if decodes:  # the encoder's widths in reverse, up to the pixels
        widths = MLPS[args.arch][-2::-1]
        student.decoder = MLP([D, *widths, args.img_size**2], head=True)
    if args.loss == "feature":
        student.projection = nn.Linear(D, teacher.backbone.embed_dim)
    source = teacher or backbone  # a teacher's normalisation becomes its student's
    mean = list(getattr(source, "mean", args.mean))
    std = list(getattr(source, "std", args.std))
    return student, dict(method="rrkd", network="student", backbone=options, mean=mean, std=std)


# ------------------------------------------------------------------------------------- training


def labelled(data: ImageData) -> ImageData:
    """The images whose label is known."""
    known = data.labels >= 0
    if known.all():
        return data
    return data.subset(known.nonzero()[:, 0])


def prepare(args) -> tuple[ImageData, ImageData | None, ImageData | None]:
    """Fills `args` from the recipe -> images to train with, for the k-NN monitor (held out, if
    any are, else the test images), and to test with."""
    train_data, test_data = load_data(args.data, args.data_path)
    apply_recipe(args, RECIPES, train_data)
    order = draw(0, 0, 2001, 1, len(train_data))[0].argsort()  # the same split for every seed
    held_out = int(args.validation * len(order))
    monitor_data = test_data
    if held_out:
        monitor_data = train_data.subset(order[:held_out])
    return train_data.subset(order[held_out:].sort().values), monitor_data, test_data


def embedder(args, mean, std):
    """-> `extract_features`, given how images reach both networks."""
    return functools.partial(
        extract_features, size=args.img_size, device=torch.device(args.device),
        num_workers=args.num_workers, dtype=args.dtype, mean=mean, std=std)


def linear_probe(embed, backbone: nn.Module,
                 data: ImageData) -> tuple[LogisticRegression, Tensor]:
    """Logistic regression on the frozen features of labelled images, and these (n, D)."""
    z, = embed(backbone, data)
    return LogisticRegression(max_iter=5000).fit(z.numpy(), data.labels.numpy()), z


def accuracy(embed, network, train_data: ImageData, test_data: ImageData | None,
             metric: str) -> dict:
    """-> test accuracy in per cent and what it is of: the network's own classifier ("head"), if it
    has one for these classes, or a linear probe. None without labels of two classes."""
    C = len(train_data.classes)
    if network.classifier is None or network.classifier.out_features != C:
        metric = "probe"
    known = labelled(train_data)
    if test_data is None or not test_data.labelled or len(known.labels.unique()) < 2:
        return dict(accuracy=None, metric=metric)
    z, = embed(network.backbone, test_data)  # (n, D)
    if metric == "head":
        device = next(network.parameters()).device
        predicted = network.classifier.eval()(z.to(device)).argmax(1).cpu()  # (n,)
    else:
        probe, _ = linear_probe(embed, network.backbone, known)
        predicted = torch.from_numpy(probe.predict(z.numpy()))  # (n,)
    right = (predicted == test_data.labels).float().mean().item()
    return dict(accuracy=100 * right, metric=metric)


def choose_anchors(args, embed, teacher: Teacher, data: ImageData) -> Tensor:
    """Rows of the data that are anchors for the whole run (A,).

    random: as many as the batch has. class: the least number from there on that gives each class as
    many. confident: of each class those of which a linear probe of the teacher is rightly surest.
    """
    score = draw(args.seed, 0, 2002, 1, len(data))[0].double()  # (n,)
    if args.anchors == "confident":  # a probe's probability of the class, -1 where it is wrong
        rows = (data.labels >= 0).nonzero()[:, 0]
        probe, z = linear_probe(embed, teacher.backbone, data.subset(rows))
        p, predicted = torch.from_numpy(probe.predict_proba(z.numpy())).double().max(1)
        right = torch.from_numpy(probe.classes_)[predicted] == data.labels[rows]
        score[:] = -1.0
        score[rows] = p.where(right, -1.0)
    if args.anchors == "random":
        chosen = score.argsort()[: args.batch_size]
    else:
        each = math.ceil(args.batch_size / len(data.classes))
        best = []
        for c in range(len(data.classes)):
            rows = ((data.labels == c) & (score >= 0)).nonzero()[:, 0]
            best.append(rows[score[rows].argsort(descending=True)[:each]])
        chosen = torch.cat(best)
    if len(chosen) % world_size():
        raise InputError(f"{len(chosen)} anchors do not divide by {world_size()} processes: use "
                         f"--anchors batch")
    return chosen


def relation_map(embed, backbone: nn.Module, data: ImageData) -> Tensor:
    """V (64, 64) of evenly spaced images, sorted by label."""
    rows = torch.linspace(0, len(data) - 1, min(64, len(data))).round().long()
    rows = rows[data.labels[rows].argsort(stable=True)]
    z, = embed(backbone, data, rows=rows)  # (64, D)
    return relative_representation(z)


def fit(args, data, teacher_file=None) -> dict:
    """Trains args.arch with args.loss -> its accuracy, parameters and minutes."""
    # data and networks
    device = setup(args)  # seeds the weights
    train_data, monitor_data, test_data = data
    teacher = Teacher(teacher_file, args).to(device) if teacher_file else None
    student, meta = build(args, len(train_data.classes), teacher)
    student.to(device)
    model = distributed(student)
    supervised = student.classifier is not None and (args.labels or not teacher)
    if supervised:
        train_data = labelled(train_data)
    if args.compile:
        student.backbone.compile()
    groups = parameter_groups(student, args.weight_decay)
    optimizer = torch.optim.SGD(groups, momentum=args.momentum)
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")

    # the run: one view of each image, k-NN of the student
    loader = ViewLoader(train_data, [View(args.img_size, **args.view)], args.batch_size, args.seed,
                        device, args.num_workers, meta["mean"], meta["std"])
    embed = embedder(args, meta["mean"], meta["std"])

    def knn():
        return knn_accuracy(student.backbone, train_data, monitor_data, **embed.keywords)

    maps = log_plan(args, embed, teacher, student, loader, test_data or train_data)
    run = Run(args, loader, meta, {"knn": (knn, args.knn_every)}, student=student,
              optimizer=optimizer, scaler=scaler)

    # schedule, weights of the terms, and anchors
    M = args.batch_size
    B = M // world_size()
    peak_lr = args.lr * M / 256
    lr = cosine_schedule(peak_lr, peak_lr, run.total, int(args.warmup_epochs * run.steps_per_epoch))
    weights = loss_weights(args) if teacher else {}
    x_a, anchors_t = fixed_anchors(args, embed, teacher, train_data, meta)
    A = len(x_a) * world_size()
    # dropout's draws: a row for each of our images, then for each of our anchors
    rows = torch.cat([torch.arange(M)[local_rows(M)], M + torch.arange(A)[local_rows(A)]])
    columns = sum(dropout.width for dropout in student.dropouts)

    began = time.perf_counter()
    for step, (x,), index in run.steps():  # one view (B, 3, S, S)
        # schedule
        for group in optimizer.param_groups:
            group["lr"] = float(lr[step])

        # views: fixed anchors go through the student with the batch
        labels = train_data.labels[index].to(device, non_blocking=True)  # (B,)
        if A:
            x = torch.cat([x, x_a])  # (B + A / processes, 3, S, S)
        u = draw(args.seed, step, 2000, M + A, columns)[rows]
        student.hand_out(u.to(device, non_blocking=True))

        # teacher: features and logits without gradient
        if teacher:
            with torch.no_grad(), autocast(device, args.dtype):
                z_t, logits_t = teacher(x[:B])  # (B, D_t), (B, C)

        # student
        with autocast(device, args.dtype):
            z_s, logits, pixels = model(x, B)  # (B + A / processes, D_s), (B, C), (B, S*S)
        anchors_s = gather(z_s[B:]) if A else None  # (A, D_s)
        z_s = z_s[:B]

        # losses
        losses = {}
        if teacher:
            losses |= distillation_losses(args.loss, z_s, z_t, anchors_s, anchors_t)
        if needs_logits(args):
            losses |= logit_losses(args.loss, logits, logits_t, args.tau)
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
    return result_of(args, run, embed, student, train_data, test_data, maps, began)


def loss_weights(args) -> dict[str, float]:
    """Of the terms of a distillation, Eq. 4; LPKD's as in Sec. 4 and 5.2."""
    lambda_d = args.lambda_d
    if lambda_d is None:
        lambda_d = 1.5 if args.loss == "lpkd" else 1.0
    return {f"loss_{args.loss}": lambda_d, "loss_ce": args.lambda_ce, "loss_soft": args.lambda_soft}


def fixed_anchors(args, embed, teacher, data: ImageData, meta: dict) -> tuple[Tensor, Tensor]:
    """This process's share of the anchors' images, and the teacher's features of all (A, D_t);
    none, and None, where the images of the batch are the anchors."""
    device = torch.device(args.device)
    if not teacher or args.anchors == "batch":
        return torch.empty(0, 3, args.img_size, args.img_size, device=device), None
    chosen = choose_anchors(args, embed, teacher, data)
    mine = chosen[local_rows(len(chosen))]
    batches = eval_batches(data, mine, args.img_size, device, mean=meta["mean"], std=meta["std"])
    x_a = torch.cat(list(batches))  # (A / processes, 3, S, S)
    with torch.no_grad():
        z_t, _ = teacher(x_a)
    return x_a, gather(z_t)


def log_plan(args, embed, teacher, student: Student, loader, data: ImageData) -> dict:
    """Prints what is trained -> maps of relations of teacher and untrained student, if it has a
    teacher."""
    parameters = parameters_of(student)
    steps = args.epochs * loader.steps_per_epoch
    peak_lr = args.lr * args.batch_size / 256
    log(f"{args.arch}, --loss {args.loss}: {parameters:,} parameters, {steps} steps of "
        f"{args.batch_size} images, lr {args.lr:.1e} * {args.batch_size} / 256 = {peak_lr:.1e}")
    if not teacher:
        return {}
    maps = {"teacher": relation_map(embed, teacher.backbone, data),
            "untrained": relation_map(embed, student.backbone, data)}
    untrained = rrkd_loss(maps["untrained"], maps["teacher"])
    collapsed = rrkd_loss(torch.ones_like(maps["teacher"]), maps["teacher"])
    log(f"chance level of loss_rrkd: {untrained:.3f} untrained, {collapsed:.3f} with all images in "
        f"one point")
    return maps


def result_of(args, run: Run, embed, student: Student, train_data: ImageData, test_data, maps: dict,
              began: float) -> dict:
    """The test accuracy at the end, once: a finished run that is resumed finds it in its log."""
    barrier()  # the first process has written the log
    step = max(run.start, run.stop)
    for record in run.records():
        if record["step"] == step and "parameters" in record:
            return record
    if maps:
        maps["trained"] = relation_map(embed, student.backbone, test_data or train_data)
        if rank() == 0:
            draw_maps(run.folder / "maps.png", maps)
    result = dict(step=step, **accuracy(embed, student, train_data, test_data, args.metric),
                  parameters=parameters_of(student),
                  minutes=(time.perf_counter() - began) / 60)
    run.record(**result)
    return result


def parameters_of(network) -> int:
    """The number of a backbone's parameters."""
    return sum(p.numel() for p in network.backbone.parameters())


def variant(args, **changes) -> argparse.Namespace:
    """The same arguments but for some."""
    return argparse.Namespace(**{**vars(args), **changes})


def train(args) -> None:
    """One distillation: the teacher, unless a file holds it, the student's network without
    distillation, and the student."""
    device = setup(args)
    if args.teacher and not args.img_size:
        backbone = meta_of(read_checkpoint(args.teacher)).get("backbone", {})
        args.img_size = backbone.get("img_size")
    data = prepare(args)
    folder = Path(args.output_dir)
    refuse_what_cannot_work(args, len(data[0].classes))
    if args.loss == "none":
        report_results({"student": fit(args, data)})
        return
    results = {}
    teacher_file = args.teacher or folder / "teacher" / "checkpoint.pth"
    alone = variant(args, loss="none", anchors="batch")
    if args.teacher:
        teacher = Teacher(args.teacher, args).to(device)
        embed = embedder(args, teacher.mean, teacher.std)
        score = accuracy(embed, teacher, data[0], data[2], args.metric)
        results["teacher"] = dict(**score, parameters=parameters_of(teacher))
    else:
        first = variant(alone, arch=args.teacher_arch, momentum=args.teacher_momentum, init=None,
                        max_steps=None, output_dir=str(folder / "teacher"))
        results["teacher"] = fit(first, data)
    if args.baseline:
        results["baseline"] = fit(variant(alone, output_dir=str(folder / "baseline")), data)
    results["student"] = fit(args, data, teacher_file)
    report_results(results)


def refuse_what_cannot_work(args, classes: int) -> None:
    """Looks at labels, networks and files before a teacher is trained for nothing."""
    if args.anchors in ("class", "confident") and not classes:
        raise InputError(f"--anchors {args.anchors} needs labels, and {args.data} has none: use "
                         f"batch or random")
    if args.anchors == "confident" and classes < 2:
        raise InputError(f"--anchors confident needs labels of two classes, and {args.data} has "
                         f"one: use random")
    if not args.teacher and args.teacher_arch.startswith("ae") and needs_logits(args):
        raise InputError(f"--loss {args.loss} needs the logits of a classifier, and --teacher_arch "
                         f"{args.teacher_arch} is an autoencoder: pass mlp1200, say, or for lpkd "
                         f"--no-labels")
    backbone = make_backbone(args.arch, args.img_size, args.patch_size,
                             pretrained=args.pretrained and not args.init)
    if args.init:
        start_from(backbone, args.init)
    if not args.teacher:
        make_backbone(args.teacher_arch, args.img_size, args.patch_size)


def report_results(results: dict) -> None:
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
    add("--student_arch", dest="arch", help=f"the same as --arch; here also {', '.join(MLPS)} and "
        "resnet9_half")
    add("--teacher_arch", help="trained here first (default: recipe)")
    add("--teacher", type=existing_file, metavar="FILE",
        help="a checkpoint that holds the teacher, or weights for --teacher_arch")
    add("--pretrained", action=flag, help="start from timm's ImageNet weights (default: recipe)")
    add("--baseline", action=flag, default=True, help="also the student without distillation")
    add = parser.add_argument_group("method").add_argument
    add("--loss", default="rrkd", choices=["rrkd", "spkd", "lpkd", "kd", "feature", "none"],
        help="none: --arch is trained on its own (default: rrkd)")
    add("--labels", action=flag, help="cross-entropy beside the loss, Eq. 4 (default: recipe)")
    add("--anchors", default="batch", choices=["batch", "random", "class", "confident"],
        help="what rrkd compares an image with; all but batch stay fixed (default: batch)")
    add("--lambda_d", type=at_least(0.0), help="weight of the distillation (1; lpkd 1.5)")
    add("--lambda_ce", type=at_least(0.0), default=1.0, help="weight of the labels' term (1)")
    add("--lambda_soft", type=at_least(0.0), default=2.0, help="weight of lpkd's soft labels (2)")
    add("--tau", type=at_least(1e-6), help="temperature of soft labels (lpkd 0.5, kd 4)")
    add("--momentum", type=at_least(0.0), help="of SGD (default: recipe)")
    add("--metric", choices=["probe", "head"], help="test accuracy of a probe or the classifier")
    add = parser.add_argument_group("tables").add_argument
    add("--table", type=int, choices=list(TABLES), help="a table of the paper instead of one run")
    add("--seeds", type=int, nargs="+", default=[42, 43, 44], help="of a table (default: 42 43 44)")
    parser.set_defaults(data=None)  # a table has its own
    args = parser.parse_args(argv)
    if args.data is None and not args.table:
        args.data = "digits"
    if args.anchors != "batch" and args.loss != "rrkd":
        parser.error("--anchors is for --loss rrkd")
    return args


# --------------------------------------------------------------- the paper's tables, and figures


# settings: of all rows. columns: {data: (the paper's numbers of the first rows, settings)}. rows:
# (name, folder, settings), the first of them the teacher; a folder that two tables name is one run
AE = dict(teacher_arch="ae64", arch="ae32", labels=False, metric="probe")
MLP32 = dict(teacher_arch="mlp1200", arch="mlp32", labels=True, metric="probe", momentum=0.0)
TEACHER = ("teacher (AE-64)", "ae64", dict(loss="none", arch="ae64"))
RIVALS = [
    ("SPKD", "spkd", dict(loss="spkd")),
    ("LPKD", "lpkd", dict(loss="lpkd")),
    ("RRKD", "rrkd", dict(loss="rrkd")),
    ("no distillation", "none", dict(loss="none")),
    ("KD (Hinton)", "kd", dict(loss="kd")),
    ("feature regression", "feature", dict(loss="feature"))]
TABLES = {
    1: dict(
        title="self-supervised MNIST, linear probe", settings=AE,
        columns={"mnist": ([87.99, 74.14, 80.88], {})},
        rows=[TEACHER,
              ("baseline (AE-32), lr 1e-8", "ae32-lr1e-8", dict(loss="none", lr=2e-8)),
              ("student (AE-32), RRKD", "ae32-rrkd", dict(loss="rrkd")),
              ("baseline (AE-32), lr 0.1", "ae32", dict(loss="none")),
              ("student (AE-32), feature regression", "ae32-feature", dict(loss="feature"))]),
    2: dict(
        title="supervised MNIST, linear probe", settings=MLP32,
        columns={"mnist": ([95.64, 90.87, 92.94], {})},
        rows=[("teacher (MLP-1200)", "mlp1200", dict(loss="none", arch="mlp1200")),
              ("baseline (MLP-32)", "mlp32", dict(loss="none")),
              ("student (MLP-32), RRKD", "mlp32-rrkd", dict(loss="rrkd")),
              ("student (MLP-32), KD (Hinton), lr 0.02", "mlp32-kd", dict(loss="kd", lr=0.04))]),
    3: dict(
        title="relation-based distillation, accuracy of the classifier",
        settings=dict(teacher_arch="resnet18", arch="resnet9_half", labels=True, metric="head"),
        columns={"cifar10": ([88.13, 85.85, 85.56, 86.21], {}),
                 "cifar100": ([60.72, 56.35, 57.04, 57.48], {}),
                 "svhn": ([94.66, 94.56, 94.49, 94.55], dict(epochs=20))},
        rows=[("teacher", "teacher", dict(loss="none", arch="resnet18", momentum=0.0)), *RIVALS]),
    4: dict(
        title="transfer, accuracy of the classifier",
        settings=dict(teacher_arch="resnet34", arch="resnet18", labels=True, metric="head"),
        columns={"cars": ([78.60, 72.63, 70.47, 76.79], {}),
                 "pets": ([90.52, 77.19, 73.81, 81.22], {}),
                 "flowers102": ([85.76, 80.50, 77.27, 84.62], dict(epochs=50))},
        rows=[("teacher", "teacher", dict(loss="none", arch="resnet34", momentum=0.0)), *RIVALS]),
    5: dict(
        title="anchors, self-supervised MNIST, linear probe", settings=AE,
        columns={"mnist": ([87.99, 81.42, 80.21, 80.59, 80.52], {})},
        rows=[TEACHER,
              ("in-batch, 128", "ae32-rrkd", dict(loss="rrkd")),
              ("random, 128", "ae32-random", dict(loss="rrkd", anchors="random")),
              ("per class, 130", "ae32-class", dict(loss="rrkd", anchors="class")),
              ("best per class, 130", "ae32-confident", dict(loss="rrkd", anchors="confident"))]),
}


def table(args) -> None:
    """A table of the paper: every row for every seed, each in its own folder, so that what is
    finished is not repeated."""
    if args.teacher:
        raise InputError("--table trains its own teachers: leave --teacher out")
    setup(args)
    spec = TABLES[args.table]
    lines = []
    for column in [args.data] if args.data else spec["columns"]:
        lines += table_column(args, spec, column)
    if rank() == 0:
        report_table(args, spec["title"], lines)


def table_column(args, spec: dict, column: str) -> list[dict]:
    """Trains all rows on one data set -> a line for each."""
    data_name = Path(column).name  # a folder named cifar10 is CIFAR-10
    paper, settings = spec["columns"].get(data_name, ([], {}))
    given = {key: value for key, value in vars(args).items() if value is not None}
    changes = {**spec["settings"], **settings, **given, "data": column, "table": None,
               "seeds": None, "resume": not args.overwrite}
    base = variant(args, **changes)
    if data_name in spec["columns"] and not base.recipe:
        base.recipe = RECIPE_OF.get(data_name, data_name)
    data = prepare(base)
    train_data, _, test_data = data
    if test_data is None or not test_data.labelled or len(train_data.classes) < 2:
        raise InputError(f"{column} has no test images with labels: a table needs train/ and val/ "
                         f"of two class folders or more")
    place = Path(args.output_dir) / data_name
    _, teacher_folder, _ = spec["rows"][0]
    lines = []
    for i, (name, folder, settings) in enumerate(spec["rows"]):
        line = dict(data=column, name=name, values=[], minutes=0.0)
        for seed in args.seeds:
            row = variant(base, seed=seed, **settings, output_dir=str(place / folder / str(seed)))
            teacher_file = None
            if row.loss != "none":
                teacher_file = str(place / teacher_folder / str(seed) / "checkpoint.pth")
            if row.loss != "rrkd":
                row.anchors = "batch"
            result = fit(row, data, teacher_file)
            log(f"{column}, {name}, seed {seed}: {result['accuracy']:.2f} %")
            line["values"].append(result["accuracy"])
            line["minutes"] += result["minutes"]
        values = torch.tensor(line["values"], dtype=torch.float64)
        line["parameters"] = result["parameters"]
        line["paper"] = paper[i] if i < len(paper) else None
        line["mean"] = values.mean().item()
        line["std"] = values.std().item() if len(values) > 1 else None
        lines.append(line)
    return lines


def report_table(args, title: str, lines: list[dict]) -> None:
    """Prints the paper's numbers beside ours; writes them as JSON, and as a figure of accuracy
    against parameters."""
    path = Path(args.output_dir) / f"table{args.table}.json"
    seeds = " ".join(map(str, args.seeds))
    log(f"\nTable {args.table}: {title}, in per cent; seeds {seeds}\n"
        f"{'data':12}{'':38}{'parameters':>12}{'paper':>8}{'here':>8}{'std':>7}{'minutes':>9}")
    for line in lines:
        paper = "" if line["paper"] is None else f"{line['paper']:.2f}"
        std = "" if line["std"] is None else f"{line['std']:.2f}"
        log(f"{Path(line['data']).name:12}{line['name']:38}{line['parameters']:>12,}{paper:>8}"
            f"{line['mean']:>8.2f}{std:>7}{line['minutes']:>9.1f}")
    content = dict(table=args.table, title=title, seeds=args.seeds, rows=lines)
    path.write_text(json.dumps(content, indent=1))
    columns = list(dict.fromkeys(line["data"] for line in lines))
    figure, axes = subplots(1, len(columns), 4.4, 4)
    for axis, column in zip(axes[0], columns, strict=True):
        here = [line for line in lines if line["data"] == column]
        for i, line in enumerate(here):
            axis.errorbar(line["parameters"], line["mean"], line["std"] or 0, fmt="o",
                          color=f"C{i}", label=line["name"])
            if line["paper"] is not None:
                axis.plot(line["parameters"], line["paper"], "x", color=f"C{i}")
        axis.set(title=Path(column).name, xlabel="parameters (o here, x paper)",
                 ylabel="accuracy in %", xscale="log")
        axis.legend(fontsize=6)
    figure.savefig(path.with_suffix(".png"), dpi=80)
    log(f"wrote {path} and {path.with_suffix('.png')}")


def draw_maps(path: Path, maps: dict[str, Tensor]) -> None:
    """Maps V of teacher and student side by side, each with its loss (Eq. 3) to the teacher's."""
    figure, axes = subplots(1, len(maps), 3.2, 3)
    for axis, (name, v) in zip(axes[0], maps.items(), strict=True):
        image = axis.imshow(v, vmin=-1, vmax=1, cmap="RdBu_r")
        loss = rrkd_loss(v, maps["teacher"])
        axis.set(title=f"{name}: loss {loss:.3f}", xticks=[], yticks=[])
    figure.colorbar(image, ax=axes[0].tolist(), label="cosine")
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    arguments = parse_arguments()
    launch(lambda: table(arguments) if arguments.table else train(arguments))
