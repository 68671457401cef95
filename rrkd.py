"""RRKD: Knowledge Distillation with Relative Representations (Ramos, Alampay, Abu), its rivals SPKD and LPKD, its five tables.

The idea. Two networks that see the same data arrange it alike, up to rotation and scale. So describe an image not by its
feature but by its cosine similarities with a set of anchors, by default all images of the batch: its relative representation.
The student is trained to give each image the relative representation that the frozen teacher gives it. The widths of the two
need not agree, nothing is projected, and no labels are needed; where there are some, a cross-entropy is added.

    x -> teacher, frozen -> Z_t (n, D_t) -> cosines of the rows -> V_t (n, m)      a row: one image, a column: one anchor
    |                                                                 |
    |                                                     L_D = -mean log(cos(V_t,i , V_s,i) / 2 + 1/2 + eps)
    |                                                                 |
    +--> student ---------> Z_s (n, D_s) -> cosines of the rows -> V_s (n, m)
                             |
                             +--> classifier -> P, with --labels

    V = Z~ Z~^T with normalised rows (Eq. 2)     L_D (Eq. 3)     L = lambda_D * L_D + lambda_CE * CE(P, Y) (Eq. 4)

SPKD compares Z Z^T, its rows normalised after the product; LPKD pulls together what lies close together for the teacher.
Relations span the global batch: a process compares its own n rows with the m gathered rows of all processes.
Shapes: B images a process, M in the global batch, A fixed anchors, D_t and D_s the widths, K classes, S the images' side.

Commands:
    python rrkd.py                                            digits: teacher, baseline and student in a minute
    python rrkd.py --loss spkd --output_dir runs/spkd         a rival: lpkd, kd (Hinton), feature (FitNets); --labels: Eq. 4
    python rrkd.py --table 1 --data_path DIR                  a table of the paper over three seeds; --quick: two minutes
    python rrkd.py --data DIR --teacher runs/sdssl/checkpoint.pth --arch resnet18 --no-labels --no-baseline
    torchrun --nproc_per_node=8 rrkd.py --data pets           an ImageNet ResNet-34, fine-tuned here, into a ResNet-18

A single run writes the student to --output_dir, its teacher to `teacher/` and the student's network without distillation to
`baseline/` below it. --max_steps cuts baseline and student short, never a teacher, so that a resumed student is exact.

Measured, accuracy of a linear probe in per cent: the first command (seed 0, one CPU core, half a minute) 95.0 teacher,
88.3 baseline, 93.6 student. Tables 1, 2 and 5 at full scale are in the README.

    what                    paper                        released code               here
    Eq. 3                   the +1 inside the quotient   -log(cos / 2 + 1/2 + eps)   as released: 0 for equal maps, and what the
                                                                                     text says ("rescaled between 0 and 1")
    classifier of Eq. 4     trained                      stays at its random start   trained
    tau of LPKD             0.5                          not applied                 0.5; --tau 1 as released
    most confident anchors  "the teacher's"              -                           of a probe: an autoencoder has no classes
    momentum on colour data 0.9 "during distillation"    -                           so; its teacher has none
    fixed anchors           one set for the whole run    -                           embedded anew by the student at each step
    accuracy, Tables 3, 4   "test accuracy"              -                           of the trained classifier; --metric probe
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

from common import (MEAN, RECIPE_OF, RESNETS, STD, BatchNorm, ImageData, InputError, Parser, ResNet, Run, View, ViewLoader, add_arguments,
                    apply_recipe, at_least, autocast, backbone_weights, barrier, cosine_schedule, create_backbone, distributed,
                    draw, eval_batches, existing_file, extract_features, fp32, gather, knn_accuracy, launch, load_data,
                    load_weights, local_rows, log, meta_of, parameter_groups, rank, read_checkpoint, setup, start_from, subplots,
                    world_size)

# ------------------------------------------------------------------------------------------------------------ recipes

# --lr is for a batch of 256: 0.2 is the paper's 0.1 at its batch of 128. Constant, without decay, as in the paper.
SGD = dict(batch_size=128, lr=0.2, momentum=0.9, warmup_epochs=0, weight_decay=0.0, pretrained=False, images=0, patch_size=4)
GREY = dict(teacher_arch="ae64", arch="ae32", teacher_momentum=0.9, labels=False, metric="probe", mean=(0.5,) * 3, std=(0.5,) * 3,
            view=dict(scale=(1, 1), flip=0.0))  # Sec. 5.1: pixels in [-1, 1], no augmentation
COLOUR = dict(teacher_momentum=0.0, labels=True, metric="head", mean=MEAN, std=STD, validation=0.0)  # Sec. 5.2: 0.9 to distil
RECIPES = {
    "digits": dict(**SGD, **GREY, img_size=8, epochs=100, validation=0.0),  # epochs found by trial
    "mnist": dict(**SGD, **GREY, img_size=28, epochs=20, validation=0.1),  # Sec. 5.1
    "cifar10": dict(**SGD, **COLOUR, teacher_arch="resnet18", arch="resnet9_half", img_size=32, epochs=50,
                    view=dict(scale=(1, 1))),  # Sec. 5.2: flips only
    "imagenet": dict(**SGD | dict(pretrained=True, patch_size=16), **COLOUR, teacher_arch="resnet34", arch="resnet18",
                     img_size=224, epochs=20, view=dict(jitter=(0.4, 0.4, 0.4, 0.0), p_jitter=1.0)),  # Sec. 5.3
}
QUICK = {  # --quick replaces these, and checks no k-NN: two minutes on two CPU cores for any table
    "digits": dict(epochs=20),
    "mnist": dict(images=6000, epochs=4),
    "cifar10": dict(images=2000, epochs=1, batch_size=32, img_size=16),
    "imagenet": dict(images=500, epochs=1, batch_size=32, img_size=64, pretrained=False),
}

# the paper's tables: title, columns {data: (paper's numbers of the first rows, settings)}, settings of every row, and the rows
# (name, folder, settings). The first row is the teacher; a folder that two tables name is one run.
AE = dict(teacher_arch="ae64", arch="ae32", labels=False, metric="probe")
MLP32 = dict(teacher_arch="mlp1200", arch="mlp32", labels=True, metric="probe", momentum=0.0)
TEACHER = dict(loss="none", arch="ae64")
RIVALS = [("SPKD", "spkd", dict(loss="spkd")), ("LPKD", "lpkd", dict(loss="lpkd")), ("RRKD", "rrkd", dict(loss="rrkd")),
          ("no distillation", "none", dict(loss="none")), ("KD (Hinton)", "kd", dict(loss="kd")),
          ("feature regression", "feature", dict(loss="feature"))]
TABLES = {
    1: dict(title="self-supervised MNIST, linear probe", settings=AE, columns={"mnist": ([87.99, 74.14, 80.88], {})}, rows=[
        ("teacher (AE-64)", "ae64", TEACHER), ("baseline (AE-32), lr 1e-8", "ae32-lr1e-8", dict(loss="none", lr=2e-8)),
        ("student (AE-32), RRKD", "ae32-rrkd", dict(loss="rrkd")), ("baseline (AE-32), lr 0.1", "ae32", dict(loss="none")),
        ("student (AE-32), feature regression", "ae32-feature", dict(loss="feature"))]),
    2: dict(title="supervised MNIST, linear probe", settings=MLP32, columns={"mnist": ([95.64, 90.87, 92.94], {})}, rows=[
        ("teacher (MLP-1200)", "mlp1200", dict(loss="none", arch="mlp1200")), ("baseline (MLP-32)", "mlp32", dict(loss="none")),
        ("student (MLP-32), RRKD", "mlp32-rrkd", dict(loss="rrkd")),
        ("student (MLP-32), KD (Hinton), lr 0.02", "mlp32-kd", dict(loss="kd", lr=0.04))]),
    3: dict(title="relation-based distillation, accuracy of the classifier",
            settings=dict(teacher_arch="resnet18", arch="resnet9_half", labels=True, metric="head"),
            columns={"cifar10": ([88.13, 85.85, 85.56, 86.21], {}), "cifar100": ([60.72, 56.35, 57.04, 57.48], {}),
                     "svhn": ([94.66, 94.56, 94.49, 94.55], dict(epochs=20))},
            rows=[("teacher", "teacher", dict(loss="none", arch="resnet18", momentum=0.0)), *RIVALS]),
    4: dict(title="transfer, accuracy of the classifier",
            settings=dict(teacher_arch="resnet34", arch="resnet18", labels=True, metric="head"),
            columns={"cars": ([78.60, 72.63, 70.47, 76.79], {}), "pets": ([90.52, 77.19, 73.81, 81.22], {}),
                     "flowers102": ([85.76, 80.50, 77.27, 84.62], dict(epochs=50))},
            rows=[("teacher", "teacher", dict(loss="none", arch="resnet34", momentum=0.0)), *RIVALS]),
    5: dict(title="anchors, self-supervised MNIST, linear probe", settings=AE,
            columns={"mnist": ([87.99, 81.42, 80.21, 80.59, 80.52], {})}, rows=[
        ("teacher (AE-64)", "ae64", TEACHER), ("in-batch, 128", "ae32-rrkd", dict(loss="rrkd")),
        ("random, 128", "ae32-random", dict(loss="rrkd", anchors="random")),
        ("per class, 130", "ae32-class", dict(loss="rrkd", anchors="class")),
        ("best per class, 130", "ae32-confident", dict(loss="rrkd", anchors="confident"))]),
}

# ------------------------------------------------------------------------------------------------------------- losses


def unit(x: Tensor) -> Tensor:
    """Rows of length one. A row of zeros stays, and gets no gradient, where F.normalize would give it one of 1e12."""
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm > 1e-12, x / norm.clamp(min=1e-12), 0 * x)


@fp32
def relative_representation(z: Tensor, anchors: Tensor | None = None) -> Tensor:
    """Cosines of the rows of z (n, D) with those of `anchors` (m, D), default z itself -> V (n, m)."""
    return unit(z) @ unit(z if anchors is None else anchors).T  # Eq. 2


@fp32
def rrkd_loss(v_s: Tensor, v_t: Tensor, eps: float = 1e-8) -> Tensor:
    """Mean over the rows of V_s and V_t (n, m) of -log of their cosine, rescaled to [0, 1]."""
    cosine = (unit(v_s) * unit(v_t)).sum(-1).clamp(min=-1)  # (n,); rounding may go below -1
    return -(cosine / 2 + 1 / 2 + eps).log().mean()  # Eq. 3


@fp32
def spkd_loss(z_s: Tensor, z_t: Tensor, all_s: Tensor | None = None, all_t: Tensor | None = None) -> Tensor:
    """SPKD: mean squared error of the maps Z Z^T (n, m), whose rows are normalised after the product and not before it.

    z (n, D): this process's rows; all (m, D): those of the global batch, default z itself. The widths may differ.
    """
    g_s, g_t = (unit(z @ (z if every is None else every).T) for z, every in ((z_s, all_s), (z_t, all_t)))  # (n, m)
    return F.mse_loss(g_s, g_t)


@fp32
def lpkd_loss(z_s: Tensor, z_t: Tensor, k: int = 5, sigma: float = 1.0, all_s: Tensor | None = None,
              all_t: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
    """LPKD: sum of w_ij * |z_s,i - z_s,j|^2 / k over the k rows j that are nearest to row i for the teacher.

    w_ij = exp(-|z_t,i - z_t,j|^2 / sigma^2). z (n, D), all (m, D): as in `spkd_loss`; rows (n,): where z is in all, so that
    a row is no neighbour of itself.
    """
    all_s, all_t = z_s if all_s is None else all_s, z_t if all_t is None else all_t
    rows = torch.arange(len(z_t), device=z_t.device) if rows is None else rows
    distance = torch.cdist(z_t, all_t).scatter(1, rows[:, None], torch.inf)  # (n, m)
    nearest = distance.topk(min(k, len(all_t) - 1), largest=False).indices  # (n, k)
    # F.embedding(i, x) is x[i] with a gradient that is summed in a fixed order, so that runs repeat to the bit
    squared_s, squared_t = ((z[:, None] - F.embedding(nearest, every)).square().sum(-1)  # (n, k) each
                            for z, every in ((z_s, all_s), (z_t, all_t)))
    weights = torch.exp(-squared_t / sigma**2)  # (n, k)
    return len(all_s) / len(z_s) * (weights * squared_s).sum() / k  # a sum over the global batch: processes are averaged


@fp32
def soft_cross_entropy(logits_s: Tensor, logits_t: Tensor, tau: float = 1.0) -> Tensor:
    """Mean cross-entropy of the student's logits (B, K) with the teacher's soft labels, both divided by tau."""
    return F.cross_entropy(logits_s / tau, (logits_t / tau).softmax(-1))


def distillation_losses(loss: str, z_s: Tensor, z_t: Tensor, anchors_s: Tensor | None = None,
                        anchors_t: Tensor | None = None) -> dict[str, Tensor]:
    """The term that compares features: own rows (B, D) with the gathered rows of all processes (M, D), or with fixed anchors."""
    if loss == "feature":
        return {"loss_feature": fp32(F.mse_loss)(z_s, z_t)}  # z_s is projected to D_t
    if loss not in ("rrkd", "spkd", "lpkd"):
        return {}
    all_s, all_t = (gather(z_s), gather(z_t)) if anchors_s is None else (anchors_s, anchors_t)
    if loss == "rrkd":
        v_s, v_t = relative_representation(z_s, all_s), relative_representation(z_t, all_t)  # (B, M) or (B, A)
        return {"loss_rrkd": rrkd_loss(v_s, v_t)}
    if loss == "spkd":
        return {"loss_spkd": spkd_loss(z_s, z_t, all_s, all_t)}
    rows = torch.arange(len(all_s), device=z_s.device)[local_rows(len(all_s))]  # (B,)
    return {"loss_lpkd": lpkd_loss(z_s, z_t, all_s=all_s, all_t=all_t, rows=rows)}


# -------------------------------------------------------------------------------------------------------------- model

MLPS = {"ae64": (128, 64), "ae32": (64, 32), "mlp1200": (1200, 1200), "mlp32": (32, 32)}  # widths after the pixels; Sec. 5.1


class MLP(nn.Module):
    """Linear layers; before each but the first, dropout of a half and then ReLU. `head`: before the first one too.

    An encoder takes grey images and so ends at a linear layer: its features have neither dropout nor ReLU on them.
    noise: uniform numbers (B, sum of `dropped`) that decide dropout in training.
    """

    def __init__(self, dims: list[int], head: bool):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(dims, dims[1:], strict=False))
        self.head, self.embed_dim, self.dropped = head, dims[-1], dims[:-1] if head else dims[1:-1]

    def forward(self, x: Tensor, layers: bool = False, noise: Tensor | None = None):
        x = x if self.head else x.mean(1).flatten(1)  # (B, 3, H, W) -> (B, H*W), for grey images of one of three equal channels
        noise = noise.split(self.dropped, 1) if self.training else None  # of (B, D_l) each
        for i, layer in enumerate(self.layers, start=int(self.head)):
            if i > 0:
                x = F.relu(x * (noise[i - 1] >= 0.5) * 2 if self.training else x)
            x = layer(x)
        return [x] if layers else x  # (B, D)


class ResNet9Half(ResNet):
    """ResNet-9 x 0.5: one basic block a stage, every width half of ResNet-18's, so features of 256."""

    def __init__(self, img_size: int):
        super().__init__("BasicBlock", [1, 1, 1, 1], img_size)
        self.inplanes, self.embed_dim, self.layer_dims = 32, 256, [32, 64, 128, 256]
        stem = self.conv1
        self.conv1 = nn.Conv2d(3, 32, stem.kernel_size, stem.stride, stem.padding, bias=False)
        self.bn1 = BatchNorm(32)
        for i, width in enumerate(self.layer_dims):
            setattr(self, f"layer{i + 1}", self._make_layer(BasicBlock, width, 1, stride=min(i + 1, 2)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def make_backbone(arch: str, img_size: int, patch_size: int = 4, pretrained=False, **options) -> nn.Module:
    """A backbone of this file by name, or one of `create_backbone`; pretrained: timm's ImageNet weights."""
    if pretrained and not (arch in RESNETS or arch.startswith("timm/")):
        raise InputError(f"there are no ImageNet weights for --arch {arch}: pass --no-pretrained, or timm/NAME")
    if arch in MLPS:
        return MLP([img_size**2, *MLPS[arch]], head=False)
    if arch == "resnet9_half":
        return ResNet9Half(img_size)
    backbone = create_backbone(arch, img_size, patch_size, pretrained, **options)
    if pretrained and arch in RESNETS:
        load_weights(backbone, create_backbone(f"timm/{arch}", pretrained=True).model.state_dict(), f"timm/{arch}")
    return backbone


def make_classifier(arch: str, dim: int, classes: int) -> nn.Module:
    return MLP([dim, classes], head=True) if arch in MLPS else nn.Linear(dim, classes)


class Student(nn.Module):
    """A backbone, and what its losses need on top: a classifier, a decoder to pixels, or a projection to the teacher's width."""

    def __init__(self, backbone, classifier=None, decoder=None, projection=None):
        super().__init__()
        self.backbone, self.classifier, self.decoder, self.projection = backbone, classifier, decoder, projection
        self.noise = [sum(getattr(part, "dropped", [])) for part in (backbone, classifier or decoder)]  # columns of each

    def forward(self, x: Tensor, noise: Tensor, rows: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Images (n, 3, S, S) -> features (n, D), and for the first `rows` of them logits (B, K) and pixels (B, S*S)."""
        def call(part, x, noise):
            return part(x, noise=noise) if isinstance(part, MLP) else part(x)

        first, second = noise.split(self.noise, 1)
        z = call(self.backbone, x, first)  # (n, D_s)
        logits = call(self.classifier, z[:rows], second[:rows]) if self.classifier else None  # (B, K)
        pixels = self.decoder(z[:rows], noise=second[:rows]).tanh() if self.decoder else None  # (B, S*S)
        return self.projection(z) if self.projection else z, logits, pixels


class Teacher(nn.Module):
    """A frozen backbone from a file and, where the file has one, its classifier: always in evaluation mode."""

    def __init__(self, path, args):
        super().__init__()
        content = read_checkpoint(path)
        meta = meta_of(content)
        options = meta.get("backbone") or dict(arch=args.teacher_arch, img_size=args.img_size, patch_size=args.patch_size)
        if options["arch"] in MLPS and options["img_size"] != args.img_size:
            raise InputError(f"{path} takes images of {options['img_size']} pixels and no others: leave --img_size out")
        self.backbone = make_backbone(**options)
        load_weights(self.backbone, backbone_weights(content), path)
        weights = content.get("student", {}) if meta.get("method") == "rrkd" else {}
        weights = {name.removeprefix("classifier."): w for name, w in weights.items() if name.startswith("classifier.")}
        self.classifier, self.classes = None, len(list(weights.values())[-1]) if weights else 0
        if weights:
            self.classifier = make_classifier(options["arch"], self.backbone.embed_dim, self.classes)
            self.classifier.load_state_dict(weights)
        self.mean, self.std = (meta.get(key, getattr(self.backbone, key, getattr(args, key))) for key in ("mean", "std"))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        z = self.backbone(x)  # (n, D_t)
        return z, self.classifier(z) if self.classifier else None  # (n, K)


def needs_logits(args) -> bool:
    """Whether the loss asks for the teacher's soft labels."""
    return args.loss == "kd" or args.loss == "lpkd" and args.labels


def build(args, classes: int, teacher: Teacher | None) -> tuple[Student, dict]:
    """-> student, and what a reader of the checkpoint must know of the backbone. On its own (`--loss none`) an autoencoder
    has a decoder and any other network a classifier; a distilled student has a classifier where it gets labels or logits."""
    options = dict(arch=args.arch, img_size=args.img_size, patch_size=args.patch_size)
    backbone = make_backbone(**options, pretrained=args.pretrained and not args.init)
    if args.init:
        start_from(backbone, args.init)
    D, alone = backbone.embed_dim, args.loss == "none"
    decode = alone and args.arch.startswith("ae")
    classify = not decode if alone else args.labels or args.loss == "kd"
    if classify and not classes:
        raise InputError(f"{args.data} has no labels to train {args.arch} with: pass --no-labels --no-baseline --teacher FILE")
    if args.anchors in ("class", "confident") and not classes:
        raise InputError(f"--anchors {args.anchors} needs labels, and {args.data} has none: use batch or random")
    if args.anchors == "confident" and classes < 2:
        raise InputError(f"--anchors confident needs labels of two classes, and {args.data} has one: use random")
    if not alone and teacher.classes != classes and needs_logits(args):
        raise InputError(f"--loss {args.loss} needs the teacher's logits of {classes} classes, and this teacher has "
                         f"{teacher.classes or 'no classifier'}: train one here, or for lpkd pass --no-labels")
    student = Student(backbone, make_classifier(args.arch, D, classes) if classify else None,
                      MLP([D, *MLPS[args.arch][-2::-1], args.img_size**2], head=True) if decode else None,
                      nn.Linear(D, teacher.backbone.embed_dim) if args.loss == "feature" else None)
    source = teacher or backbone  # a teacher's normalisation becomes its student's
    mean, std = (list(getattr(source, key, getattr(args, key))) for key in ("mean", "std"))
    return student, dict(method="rrkd", network="student", backbone=options, mean=mean, std=std)


# ----------------------------------------------------------------------------------------------------------- training


def labelled(data: ImageData) -> ImageData:
    return data if (data.labels >= 0).all() else data.subset((data.labels >= 0).nonzero()[:, 0])


def prepare(args) -> tuple[ImageData, ImageData | None, ImageData | None]:
    """Fills `args` from the recipe -> training images, those of the k-NN monitor (validation, if any, else test), test images."""
    train_data, test_data = load_data(args.data, args.data_path)
    recipes = {data: {**recipe, **(QUICK[data] if args.quick else {})} for data, recipe in RECIPES.items()}
    apply_recipe(args, recipes, train_data)

    def spaced(data):  # evenly over the data set, which may be sorted by class
        few = min(args.images or len(data), len(data))
        return data.subset(torch.linspace(0, len(data) - 1, few).round().long())

    train_data, test_data = spaced(train_data), spaced(test_data) if test_data else None
    order = draw(0, 0, 2001, 1, len(train_data))[0].argsort()  # the split is the same for every seed
    held_out = int(args.validation * len(order))
    monitor_data = train_data.subset(order[:held_out]) if held_out else test_data
    return train_data.subset(order[held_out:].sort().values), monitor_data, test_data


def embedder(args, mean, std):
    """-> `extract_features`, given how images reach both networks."""
    return functools.partial(extract_features, size=args.img_size, device=torch.device(args.device), num_workers=args.num_workers,
                             dtype=args.dtype, mean=mean, std=std)


def linear_probe(embed, backbone: nn.Module, data: ImageData) -> tuple[LogisticRegression, Tensor]:
    """Logistic regression on the frozen features of labelled images, and those features (N, D)."""
    z, = embed(backbone, data)  # (N, D)
    return LogisticRegression(max_iter=5000).fit(z.numpy(), data.labels.numpy()), z


def accuracy(embed, network, train_data: ImageData, test_data: ImageData | None, metric: str) -> dict:
    """-> test accuracy in per cent, of the network's own classifier (`head`), if it is one of these classes, or of a linear
    probe; None without labels of two classes."""
    own = network.classifier is not None and len(list(network.classifier.parameters())[-1]) == len(train_data.classes)
    metric = metric if own else "probe"
    if test_data is None or not test_data.labelled or len(labelled(train_data).labels.unique()) < 2:
        return dict(accuracy=None, metric=metric)
    z, = embed(network.backbone, test_data)  # (N, D)
    if metric == "head":
        device = next(network.parameters()).device
        predicted = network.classifier.eval()(z.to(device)).argmax(1).cpu()  # (N,)
    else:
        probe, _ = linear_probe(embed, network.backbone, labelled(train_data))
        predicted = torch.from_numpy(probe.predict(z.numpy()))  # (N,)
    return dict(accuracy=100 * (predicted == test_data.labels).float().mean().item(), metric=metric)


def choose_anchors(args, embed, teacher: Teacher, data: ImageData) -> Tensor:
    """Rows of the data that are anchors for the whole run (A,): as many as the batch has, or by class the least number above
    that which gives each class as many. `confident`: those of which a linear probe of the teacher is rightly surest."""
    score = draw(args.seed, 0, 2002, 1, len(data))[0].double()  # (N,)
    if args.anchors == "random":
        chosen = score.argsort()[: args.batch_size]
    else:
        if args.anchors == "confident":  # probability of the right class, where the probe is right
            rows = (data.labels >= 0).nonzero()[:, 0]
            probe, z = linear_probe(embed, teacher.backbone, data.subset(rows))
            p, predicted = torch.from_numpy(probe.predict_proba(z.numpy())).double().max(1)  # (N,) each
            right = torch.from_numpy(probe.classes_)[predicted] == data.labels[rows]
            score = torch.full_like(score, -1).index_copy(0, rows, p.where(right, -1.0))  # (N,)
        each = math.ceil(args.batch_size / len(data.classes))
        classes = [((data.labels == c) & (score >= 0)).nonzero()[:, 0] for c in range(len(data.classes))]
        chosen = torch.cat([rows[score[rows].argsort(descending=True)[:each]] for rows in classes])
    if len(chosen) % world_size():
        raise InputError(f"{len(chosen)} anchors do not divide by {world_size()} processes: use --anchors batch")
    return chosen


def relation_map(embed, backbone: nn.Module, data: ImageData) -> Tensor:
    """V (64, 64) of evenly spaced images, sorted by label."""
    rows = torch.linspace(0, len(data) - 1, min(64, len(data))).round().long()
    return relative_representation(embed(backbone, data, rows=rows[data.labels[rows].argsort(stable=True)])[0])


def draw_maps(path: Path, maps: dict[str, Tensor]) -> None:
    """Maps V of teacher and student side by side, each with its loss (Eq. 3) against the teacher's."""
    figure, axes = subplots(1, len(maps), 3.2, 3)
    for axis, (name, v) in zip(axes[0], maps.items(), strict=True):
        image = axis.imshow(v, vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set(title=f"{name}: loss {rrkd_loss(v, maps['teacher']):.3f}", xticks=[], yticks=[])
    figure.colorbar(image, ax=axes[0].tolist(), label="cosine")
    figure.savefig(path, dpi=80)


def fit(args, data, teacher_file=None) -> dict:
    """Trains one network, `args.arch` with `args.loss`, into args.output_dir -> its accuracy, parameters and minutes."""
    device = setup(args)  # seeds the weights
    train_data, monitor_data, test_data = data
    teacher = Teacher(teacher_file, args).to(device) if teacher_file else None
    student, meta = build(args, len(train_data.classes), teacher)
    student.to(device)
    model = distributed(student)
    supervised = student.classifier is not None and (args.labels or not teacher)
    train_data = labelled(train_data) if supervised else train_data
    embed = embedder(args, meta["mean"], meta["std"])
    if args.compile:
        for network in filter(None, (student, teacher)):
            network.backbone.compile()
    optimizer = torch.optim.SGD(parameter_groups(student, args.weight_decay), momentum=args.momentum)
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")

    loader = ViewLoader(train_data, [View(args.img_size, **args.view)], args.batch_size, args.seed, device, args.num_workers,
                        meta["mean"], meta["std"])

    def knn():
        return None if args.quick else knn_accuracy(student.backbone, train_data, monitor_data, **embed.keywords)

    parameters = sum(p.numel() for p in student.backbone.parameters())
    peak_lr = args.lr * args.batch_size / 256
    log(f"{args.arch}, --loss {args.loss}: {parameters:,} parameters, {args.epochs * loader.steps_per_epoch} steps of {args.batch_size} images, "
        f"lr {args.lr:.1e} * {args.batch_size} / 256 = {peak_lr:.1e}")
    if teacher:  # what Eq. 3 gives a student that knows nothing
        shown = test_data or train_data
        maps = {name: relation_map(embed, x.backbone, shown) for name, x in (("teacher", teacher), ("untrained", student))}
        untrained, collapsed = (rrkd_loss(v, maps["teacher"]) for v in (maps["untrained"], torch.ones_like(maps["teacher"])))
        log(f"chance level of loss_rrkd: {untrained:.3f} untrained, {collapsed:.3f} with all images in one point")
    run = Run(args, loader, meta, {"knn": (knn, args.knn_every)}, student=student, optimizer=optimizer, scaler=scaler)

    lr = cosine_schedule(peak_lr, peak_lr, run.total, warmup=int(args.warmup_epochs * loader.steps_per_epoch))  # constant
    lambda_d = args.lambda_d if args.lambda_d is not None else 1.5 if args.loss == "lpkd" else 1.0  # Sec. 4 and 5.2
    weights = {f"loss_{args.loss}": lambda_d, "loss_ce": args.lambda_ce, "loss_soft": args.lambda_soft} if teacher else {}
    tau = args.tau or (0.5 if args.loss == "lpkd" else 4.0)
    rows = torch.arange(args.batch_size)[local_rows(args.batch_size)]  # of dropout's draws
    B, A, anchors_s, anchors_t = len(rows), 0, None, None
    if teacher and args.anchors != "batch":  # fixed anchors: each process embeds its share of them
        chosen = choose_anchors(args, embed, teacher, train_data)
        A, share = len(chosen), local_rows(len(chosen))
        whole = eval_batches(train_data, chosen[share], args.img_size, device, mean=meta["mean"], std=meta["std"])
        x_a = torch.cat(list(whole))  # (A / processes, 3, S, S)
        rows = torch.cat([rows, args.batch_size + torch.arange(A)[share]])
        with torch.no_grad():
            anchors_t = gather(teacher(x_a)[0])  # (A, D_t)

    began = time.perf_counter()
    for step, (x,), index in run.steps():  # one view (B, 3, S, S)
        # schedule
        for group in optimizer.param_groups:
            group["lr"] = float(lr[step])

        # views: fixed anchors go through the student with the batch; dropout's draws are those of the global batch
        labels = train_data.labels[index].to(device, non_blocking=True)  # (B,)
        if A:
            x = torch.cat([x, x_a])  # (B + A / processes, 3, S, S)
        noise = draw(args.seed, step, 2000, args.batch_size + A, sum(student.noise))[rows].to(device, non_blocking=True)

        # teacher: features and logits without gradient
        if teacher:
            with torch.no_grad(), autocast(device, args.dtype):
                z_t, logits_t = teacher(x[:B])  # (B, D_t), (B, K)

        # student
        with autocast(device, args.dtype):
            z_s, logits, pixels = model(x, noise, B)  # (B + A / processes, D_s), (B, K), (B, S*S)
        if A:
            z_s, anchors_s = z_s[:B], gather(z_s[B:])  # (B, D_s), (A, D_s)

        # losses
        losses = distillation_losses(args.loss, z_s, z_t, anchors_s, anchors_t) if teacher else {}
        if args.loss == "lpkd" and args.labels:
            losses["loss_soft"] = soft_cross_entropy(logits, logits_t, tau)
        if args.loss == "kd":
            losses["loss_kd"] = tau**2 * soft_cross_entropy(logits, logits_t, tau)
        if supervised:
            losses["loss_ce"] = fp32(F.cross_entropy)(logits, labels)
        if student.decoder:
            losses["loss_pixel"] = fp32(F.mse_loss)(pixels, x.mean(1).flatten(1))
        loss = sum(weights.get(name, 1.0) * term for name, term in losses.items())  # Eq. 4
        losses["loss"] = loss  # last: where a term is not finite, the term is named

        # backward and step
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        # log, check and save, where it is due
        run.end_step(step, losses, features=z_s, lr=float(lr[step]))

    # result, once: a finished run that is resumed finds it in its log
    barrier()  # the first process has written the log
    done = max(run.start, run.stop)
    found = [record for record in run.records() if record["step"] == done and "parameters" in record]
    if found:
        return found[-1]
    if teacher:
        maps["trained"] = relation_map(embed, student.backbone, shown)
        if rank() == 0:
            draw_maps(run.folder / "maps.png", maps)
    result = dict(step=done, **accuracy(embed, student, train_data, test_data, args.metric), parameters=parameters,
                  minutes=(time.perf_counter() - began) / 60)
    run.record(**result)
    return result


def variant(args, **changes) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), **changes})


def train(args) -> None:
    """One distillation: the teacher, unless a file holds it, a baseline without distillation, and the student."""
    device = setup(args)
    if args.teacher:
        args.img_size = args.img_size or meta_of(read_checkpoint(args.teacher)).get("backbone", {}).get("img_size")
    data, folder = prepare(args), Path(args.output_dir)
    if not args.teacher and args.teacher_arch.startswith("ae") and needs_logits(args):
        raise InputError(f"--loss {args.loss} needs the logits of a classifier, and --teacher_arch {args.teacher_arch} is an "
                         f"autoencoder: pass mlp1200, say, or for lpkd --no-labels")
    make_backbone(args.arch, args.img_size, args.patch_size)  # one that cannot be made is found before a teacher is trained
    alone = dict(loss="none", anchors="batch")
    if args.loss == "none":
        results = {"student": fit(args, data)}
    else:
        results, teacher_file = {}, args.teacher or folder / "teacher" / "checkpoint.pth"
        if args.teacher:
            teacher = Teacher(args.teacher, args).to(device)
            score = accuracy(embedder(args, teacher.mean, teacher.std), teacher, data[0], data[2], args.metric)
            results["teacher"] = dict(**score, parameters=sum(p.numel() for p in teacher.backbone.parameters()))
        else:
            results["teacher"] = fit(variant(args, **alone, arch=args.teacher_arch, momentum=args.teacher_momentum, init=None,
                                             max_steps=None, output_dir=str(folder / "teacher")), data)
        if args.baseline:
            results["baseline"] = fit(variant(args, **alone, output_dir=str(folder / "baseline")), data)
        results["student"] = fit(args, data, teacher_file)
    for name, result in results.items():
        score = "none: no labels of two classes to test with" if result["accuracy"] is None else f"{result['accuracy']:.2f} %"
        log(f"{name:10}{result['parameters']:>12,} parameters   {result['metric']} accuracy {score}")


def table(args) -> None:
    """A table of the paper: every row for every seed, each in its own folder, so that what is finished is not repeated."""
    spec, runs = TABLES[args.table], Path(args.output_dir)
    if args.teacher:
        raise InputError("--table trains its own teachers: leave --teacher out")
    setup(args)
    seeds = args.seeds or ([42] if args.quick else [42, 43, 44])
    lines = []
    for column in [args.data] if args.data else spec["columns"]:
        place = Path(column).name + ("-quick" if args.quick else "")
        paper, settings = spec["columns"].get(Path(column).name, ([], {}))  # a folder named cifar10 is CIFAR-10
        given = {name: value for name, value in vars(args).items() if value is not None}
        settings = {**spec["settings"], **({} if args.quick else settings)}
        base = variant(args, **{**settings, **given, "data": column, "resume": not args.overwrite,
                                "table": None, "seeds": None})
        if Path(column).name in spec["columns"]:  # a folder named cifar10 is CIFAR-10
            base.recipe = base.recipe or RECIPE_OF.get(Path(column).name, Path(column).name)
        data = prepare(base)
        if data[2] is None or not data[2].labelled or len(data[0].classes) < 2:
            raise InputError(f"{column} has no test images with labels: a table needs train/ and val/ of two class folders or more")
        results = {name: [] for name, _, _ in spec["rows"]}
        for seed in seeds:
            for i, (name, folder, changes) in enumerate(spec["rows"]):
                row = variant(base, seed=seed, **changes, output_dir=str(runs / place / folder / str(seed)))
                row.anchors = row.anchors if row.loss == "rrkd" else "batch"
                teacher_file = row.output_dir + "/checkpoint.pth" if i == 0 else teacher_file
                results[name].append(fit(row, data, teacher_file if row.loss != "none" else None))
                log(f"{column}, {name}, seed {seed}: {results[name][-1]['accuracy']:.2f} %")
        for i, (name, found) in enumerate(results.items()):
            values = torch.tensor([result["accuracy"] for result in found], dtype=torch.float64)
            lines.append(dict(
                data=column, name=name, parameters=found[0]["parameters"], paper=paper[i] if i < len(paper) else None,
                mean=values.mean().item(), std=values.std().item() if len(values) > 1 else None, values=values.tolist(),
                minutes=sum(result["minutes"] for result in found)))
    if rank() == 0:
        report(args, spec["title"], seeds, lines, runs / f"table{args.table}{'-quick' if args.quick else ''}.json")


def report(args, title: str, seeds: list[int], lines: list[dict], path: Path) -> None:
    """Prints the paper's numbers beside ours, and writes them as JSON and as a figure of accuracy against parameters."""
    quick = ", at the size of --quick: not comparable with the paper" if args.quick else ""
    log(f"\nTable {args.table}: {title}, in per cent{quick}; seeds {' '.join(map(str, seeds))}\n"
        f"{'data':12}{'':38}{'parameters':>12}{'paper':>8}{'here':>8}{'std':>7}{'minutes':>9}")
    for line in lines:
        paper = "" if line["paper"] is None else f"{line['paper']:.2f}"
        std = "" if line["std"] is None else f"{line['std']:.2f}"
        log(f"{Path(line['data']).name:12}{line['name']:38}{line['parameters']:>12,}{paper:>8}{line['mean']:>8.2f}{std:>7}"
            f"{line['minutes']:>9.1f}")
    path.write_text(json.dumps(dict(table=args.table, title=title, quick=args.quick, seeds=seeds, rows=lines), indent=1))
    columns = list(dict.fromkeys(line["data"] for line in lines))
    figure, axes = subplots(1, len(columns), 4.4, 4)
    for axis, column in zip(axes[0], columns, strict=True):
        for i, line in enumerate(line for line in lines if line["data"] == column):
            axis.errorbar(line["parameters"], line["mean"], line["std"] or 0, fmt="o", color=f"C{i}", label=line["name"])
            if line["paper"] is not None:
                axis.plot(line["parameters"], line["paper"], "x", color=f"C{i}")
        axis.set(title=Path(column).name, xlabel="parameters (o here, x paper)", ylabel="accuracy in %", xscale="log")
        axis.legend(fontsize=6)
    figure.savefig(path.with_suffix(".png"), dpi=80)
    log(f"wrote {path} and {path.with_suffix('.png')}")


# ---------------------------------------------------------------------------------------------------------- arguments


def parse_arguments(argv=None):
    flag = argparse.BooleanOptionalAction
    parser = Parser(description=__doc__.split("\n")[0])
    add_arguments(parser, "rrkd")
    group = parser.add_argument_group("networks")
    group.add_argument("--student_arch", dest="arch", help=f"the same as --arch; here also {', '.join(MLPS)} and resnet9_half")
    group.add_argument("--teacher_arch", help="trained here first (default: recipe)")
    group.add_argument("--teacher", type=existing_file, metavar="FILE", help="a checkpoint that holds the teacher, or weights for --teacher_arch")
    group.add_argument("--pretrained", action=flag, help="start from timm's ImageNet weights (default: recipe)")
    group.add_argument("--baseline", action=flag, default=True, help="also train the student's network without distillation")
    group = parser.add_argument_group("method")
    group.add_argument("--loss", default="rrkd", choices=["rrkd", "spkd", "lpkd", "kd", "feature", "none"],
                       help="none: train --arch on its own (default: rrkd)")
    group.add_argument("--labels", action=flag, help="cross-entropy with the labels beside the loss, Eq. 4 (default: recipe)")
    group.add_argument("--anchors", default="batch", choices=["batch", "random", "class", "confident"],
                       help="what rrkd compares an image with; all but batch stay fixed (default: batch)")
    group.add_argument("--lambda_d", type=at_least(0.0), help="weight of the distillation term (default: 1; lpkd 1.5)")
    group.add_argument("--lambda_ce", type=at_least(0.0), default=1.0, help="weight of the labels' term (default: %(default)s)")
    group.add_argument("--lambda_soft", type=at_least(0.0), default=2.0, help="weight of lpkd's soft labels (default: %(default)s)")
    group.add_argument("--tau", type=at_least(1e-6), help="temperature of soft labels (default: lpkd 0.5, kd 4)")
    group.add_argument("--momentum", type=at_least(0.0), help="of SGD (default: recipe)")
    group.add_argument("--metric", choices=["probe", "head"], help="test accuracy of a linear probe or of the classifier")
    group.add_argument("--images", type=at_least(0), help="training and test images at most; 0: all (default: recipe)")
    group = parser.add_argument_group("tables")
    group.add_argument("--table", type=int, choices=list(TABLES), help="run a table of the paper instead")
    group.add_argument("--seeds", type=int, nargs="+", help="of a table (default: 42 43 44; with --quick 42)")
    group.add_argument("--quick", action="store_true", help="a size that ends in two minutes")
    parser.set_defaults(data=None)
    args = parser.parse_args(argv)
    args.data = args.data or (None if args.table else "digits")
    if args.anchors != "batch" and args.loss != "rrkd":
        parser.error("--anchors is for --loss rrkd")
    return args


if __name__ == "__main__":
    arguments = parse_arguments()
    launch(lambda: table(arguments) if arguments.table else train(arguments))
