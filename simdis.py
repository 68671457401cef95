"""SimDis: Simple Distillation Baselines for Improving Small Self-supervised Models (Gu et al.)

The idea. A small network trained alone falls far behind a large one. SimDis trains a small
student S by BYOL and lets it predict, beside the projections of its momentum network S^, those
of a large teacher T or of its T^. Offline, the teacher was trained before. Online, both learn
at once, and every other projection that the step has made becomes a target: seven views.

    view v -> S: backbone, projector, predictors -> q_1 ... q_7
                                                     |       |
                                                   Eq. 1 ... Eq. 1
                                                     |       |
    v, v' -> S, S^, T, T^: backbone, projector, sg  z_1 ... z_7

    L   = L_S + L_T                                          L_T online only
    L_S = mean over targets of |q(v) - z|^2 + |q(v') - z|^2  Eq. 1, of unit vectors
    L_T = |q(v) - z^T^(v')|^2 + |q(v') - z^T^(v)|^2          Eq. 1: plain BYOL
    S^ <- m S^ + (1 - m) S,  T^ <- m T^ + (1 - m) T          Eq. 2, once a step

L_S moves S and its predictors, L_T those of T. Targets carry no gradient (sg); offline, T and
T^ never change. The backbone of S is kept, as backbone.pth (--stage teacher: that of T).

Symbols: B images of this process, M of the global batch, K = 256 outputs of a projector.

    python simdis.py                digits, 2 minutes: k-NN of S from 64 % to 80 %
    python simdis.py --targets byol --output_dir runs/byol           S alone
    python simdis.py --targets "S^-v'" "T-v'" --output_dir runs/row  a row of Table 2
    python simdis.py --stage teacher --output_dir runs/teacher       offline: T first ...
    python simdis.py --stage offline --teacher runs/teacher/checkpoint.pth \
        --output_dir runs/offline                                    ... then S
    torchrun --nproc_per_node=8 simdis.py --data IMAGENET            Table 1
        --optimizer sgd --no-sync_bn --batch_size 1024               Table 2

    what               paper           released code       here
    loss of S          sum of BYOL's   mean over targets   mean over targets
                       and of T's
    momentum networks  after the step  before the forward  after the step
    frozen teacher     fixed           BatchNorm trains    evaluation mode
    weight decay       not said        1e-4, biases too    1e-4, matrices only
    linear evaluation  base lr 0.001   BatchNorm after it  before it: eval_linear.py
"""
import argparse
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor

from common import (MEAN, STD, BatchNorm, InputError, Parser, Run, ViewLoader, add_arguments,
                    apply_recipe, at_least, autocast, byol_views, cosine_schedule, create_backbone,
                    distributed, ema_update, existing_file, fp32, knn_accuracy, launch, load_data,
                    load_weights, log, parameter_groups, read_checkpoint, setup, start_from)

# -------------------------------------------------------------------------------------- recipes

# the columns of Table 2: what a prediction of view v is compared with, the projection of
# the same or of the other view by a network
TARGETS = {
    "S-v'": ("student", "other"),
    "S^-v": ("student_momentum", "same"),
    "S^-v'": ("student_momentum", "other"),
    "T-v": ("teacher", "same"),
    "T-v'": ("teacher", "other"),
    "T^-v": ("teacher_momentum", "same"),
    "T^-v'": ("teacher_momentum", "other"),
}
PRESETS = {"byol": ["S^-v'"], "2v": ["S^-v'", "T^-v'"], "7v": list(TARGETS)}
TEACHER_TARGETS = ["T^-v'"]  # BYOL

RECIPES = {  # rates: base learning rate and weight decay with each optimiser
    "digits": dict(  # found by trial on two CPU cores; the teacher has four blocks
        arch="vit_nano", depth=1, teacher_arch="vit_nano", img_size=16, patch_size=4, epochs=40,
        batch_size=64, optimizer="adamw", rates=dict(adamw=(4e-3, 0.1)), warmup_epochs=5,
        momentum=0.99, hidden=512, views=dict(scale=(0.5, 1.0), flip=0.0, blur=False)),
    "mnist": dict(
        arch="vit_nano", depth=1, teacher_arch="vit_nano", img_size=28, patch_size=7, epochs=20,
        batch_size=256, optimizer="adamw", rates=dict(adamw=(4e-3, 0.1)), warmup_epochs=1,
        momentum=0.99, hidden=512, views=dict(scale=(0.3, 1.0), flip=0.0, blur=False)),
    "cifar10": dict(  # the paper's networks with the small-image stem
        arch="resnet18", teacher_arch="resnet50", img_size=32, patch_size=8, epochs=200,
        batch_size=512, optimizer="sgd", warmup_epochs=10, momentum=0.99, hidden=4096,
        rates=dict(sgd=(0.1, 5e-4), lars=(0.3, 1e-4), adamw=(4e-3, 0.1)),
        views=dict(scale=(0.15, 1.0), blur=False)),
    "imagenet": dict(  # the paper: Sec. 4, and 4.3 for SGD; views as in BYOL
        arch="resnet18", teacher_arch="resnet50", img_size=224, patch_size=16, epochs=100,
        batch_size=2048, optimizer="lars", warmup_epochs=10, momentum=0.99, hidden=4096,
        rates=dict(lars=(0.3, 1e-4), sgd=(0.05, 1e-4)), views=dict(scale=(0.08, 1.0))),
}

# --------------------------------------------------------------------------------------- losses

@fp32
def regression_loss(p: Tensor, z: Tensor) -> Tensor:
    """Mean squared distance of the normalised rows of p and z (B, K): 2 - 2 cos."""
    return (F.normalize(p, dim=1) - F.normalize(z, dim=1)).pow(2).sum(1).mean()  # Eq. 1


def target_losses(p: list[dict], z: dict[str, list]) -> dict[str, Tensor]:
    """-> one loss for each target, over both views. p: for each view its predictions (B, K) by
    target. z: by network, its projections (B, K) of the two views."""
    p1, p2 = p
    losses = {}
    for target in p1:
        network, view = TARGETS[target]
        z1, z2 = (x.detach() for x in z[network])  # those of S and T come with a gradient
        if view == "other":
            z1, z2 = z2, z1
        losses[target] = regression_loss(p1[target], z1) + regression_loss(p2[target], z2)
    return losses


# ---------------------------------------------------------------------------------------- model

def mlp(dim: int, hidden: int) -> nn.Sequential:
    """Sec. 4, for projectors and predictors: FC(4096) + BN + ReLU + FC(256)."""
    return nn.Sequential(nn.Linear(dim, hidden), BatchNorm(hidden), nn.ReLU(),
                         nn.Linear(hidden, 256))


class Encoder(nn.Module):
    """Backbone and projector: S^, T^ and a frozen T."""

    def __init__(self, backbone: nn.Module, projector: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, *views: Tensor) -> list[Tensor]:
        return [self.projector(self.backbone(x)) for x in views]  # V of (B, K)


class Learner(Encoder):
    """S, and T while it learns: an encoder with a predictor for each target."""

    def __init__(self, backbone: nn.Module, targets: list[str], hidden: int):
        super().__init__(backbone, mlp(backbone.embed_dim, hidden))
        self.predictors = nn.ModuleDict({target: mlp(256, hidden) for target in targets})

    def forward(self, *views: Tensor) -> tuple[list, list]:
        """-> for each view its projection (B, K), and its predictions (B, K) by target."""
        z = super().forward(*views)
        p = []
        for projection in z:
            p.append({name: predict(projection) for name, predict in self.predictors.items()})
        return z, p


def load_teacher(path: str) -> tuple[dict, dict]:
    """T and T^ of a checkpoint, frozen in evaluation mode, and T's backbone options."""
    checkpoint = read_checkpoint(path)
    if "teacher_momentum" not in checkpoint:
        raise InputError(f"{path} holds no teacher of simdis.py: see --stage teacher")
    options = checkpoint["meta"]["teacher"]
    networks = {}
    for name in ("teacher", "teacher_momentum"):
        backbone = create_backbone(**options)
        projector = mlp(backbone.embed_dim, checkpoint["args"]["hidden"])
        networks[name] = Encoder(backbone, projector).eval().requires_grad_(False)
        load_weights(networks[name], checkpoint[name], path)  # its predictors are left out
    return networks, options


def build(args) -> tuple[dict, dict]:
    """-> the networks of this stage by name, and what a reader of the checkpoint must know."""
    asked = any(TARGETS[target][0].startswith("teacher") for target in args.targets)
    if args.stage == "offline" and not asked:
        raise InputError("--stage offline with no target of the teacher: use --stage online")
    names = ["student"]  # those that learn
    if args.stage == "teacher":
        names = ["teacher"]
    elif args.stage == "online" and asked:
        names = ["student", "teacher"]
    saved = names[0]
    sizes = dict(img_size=args.img_size, patch_size=args.patch_size, pos_embed="sincos")
    options = {"student": dict(sizes, arch=args.arch, depth=args.depth or None),
               "teacher": dict(sizes, arch=args.teacher_arch)}
    targets = {"student": args.targets, "teacher": TEACHER_TARGETS}
    meta = dict(method="simdis", network=saved, backbone=options[saved], mean=MEAN, std=STD)
    networks = {}
    for name in names:
        meta[name] = options[name]
        backbone = create_backbone(**options[name])
        if args.init and name == saved:
            start_from(backbone, args.init)
        learner = Learner(backbone, targets[name], args.hidden)
        networks[name] = learner
        # in training mode as S: BatchNorm of the batch, with running statistics of its own
        follower = copy.deepcopy(Encoder(backbone, learner.projector))
        networks[f"{name}_momentum"] = follower.requires_grad_(False)
    if args.stage == "offline":
        frozen, meta["teacher"] = load_teacher(args.teacher)
        networks |= frozen
    for module in nn.ModuleDict(networks).modules():
        if isinstance(module, BatchNorm):
            # off in Sec. 4.3: cheaper, but then the number of processes matters
            module.across_processes = args.sync_bn
    return networks, meta


def make_optimizer(args, learners: nn.Module, fused: bool) -> torch.optim.Optimizer:
    """Biases and norms have no weight decay, and LARS does not scale them."""
    matrices, others = parameter_groups(learners, args.weight_decay)
    if args.optimizer == "lars":  # timm's leaves groups without decay alone
        return Lars([dict(matrices, always_adapt=True), others], lr=0.0, momentum=0.9)
    if args.optimizer == "sgd":
        return torch.optim.SGD([matrices, others], lr=0.0, momentum=0.9)
    return torch.optim.AdamW([matrices, others], lr=0.0, fused=fused)


# ------------------------------------------------------------------------------------- training

def complete(args, recipe: dict) -> None:
    """Fills in the targets, in the order of the table, and the rates of the optimiser."""
    if (args.stage == "offline") != bool(args.teacher):
        raise InputError("--stage offline needs --teacher FILE, made by --stage teacher; the "
                         "other stages take none")
    chosen = []
    for name in args.targets or ["7v"]:
        chosen += PRESETS.get(name, [name])
    args.targets = [target for target in TARGETS if target in chosen]
    lr, weight_decay = recipe["rates"].get(args.optimizer, (None, None))
    if args.lr is None:
        args.lr = lr
    if args.weight_decay is None:
        args.weight_decay = weight_decay
    if args.lr is None or args.weight_decay is None:
        raise InputError(f"no rates for --optimizer {args.optimizer}: pass --lr and --weight_decay")


def train(args) -> None:
    # data and networks
    device = setup(args)
    train_data, test_data = load_data(args.data, args.data_path)
    if args.arch and args.depth is None:
        args.depth = 0  # the recipe's depth is that of the recipe's student
    recipe = apply_recipe(args, RECIPES, train_data)
    complete(args, recipe)
    networks, meta = build(args)
    for network in networks.values():
        network.to(device)
        if args.compile:
            network.backbone.compile()
    learners = nn.ModuleDict({k: x for k, x in networks.items() if isinstance(x, Learner)})
    models = {name: distributed(learner) for name, learner in learners.items()}
    # the other networks run only where a target asks for them
    asked = set()
    for learner in learners.values():
        asked |= {TARGETS[target][0] for target in learner.predictors}
    others = [name for name in networks if name in asked and name not in learners]
    optimizer = make_optimizer(args, learners, fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")

    # the run: two views of each image, k-NN of what is kept and of a teacher beside it
    views = byol_views(args.img_size, **recipe["views"])
    loader = ViewLoader(train_data, views, args.batch_size, args.seed, device, args.num_workers)

    def knn(name):
        return knn_accuracy(networks[name].backbone, train_data, test_data, args.img_size, device,
                            num_workers=args.num_workers, dtype=args.dtype)

    checks = {}
    if args.stage != "teacher" and "teacher" in networks:
        every = args.knn_every if args.stage == "online" else 0
        checks["knn_teacher"] = (lambda: knn("teacher"), every)
    checks["knn"] = (lambda: knn(meta["network"]), args.knn_every)
    run = Run(args, loader, meta, checks, **networks, optimizer=optimizer, scaler=scaler)

    # schedules, a value for each step
    M = args.batch_size
    peak_lr = args.lr * M / 256
    warmup = int(args.warmup_epochs * run.steps_per_epoch)
    lr = cosine_schedule(peak_lr, 0.0, run.total, warmup)
    momentum = cosine_schedule(args.momentum, 1.0, run.total)
    chance = 4.0 * len(models)  # of L_S, L_T: orthogonal predictions, 2 a view
    log(f"{args.stage}, {args.optimizer}: {run.total} steps of {M} images, lr {args.lr:.1e} * {M} "
        f"/ 256 = {peak_lr:.1e}, chance level of loss {chance:.0f}")

    for step, (x1, x2), _ in run.steps():  # two views (B, 3, H, W)
        # schedules
        for group in optimizer.param_groups:
            group["lr"] = float(lr[step])

        # teachers, momentum networks and a frozen T: projections without gradient
        with torch.no_grad(), autocast(device, args.dtype):
            z = {name: networks[name](x1, x2) for name in others}  # each two of (B, K)

        # student, and online T: projections, and a prediction for each target
        p = {}
        with autocast(device, args.dtype):
            for name, model in models.items():
                z[name], p[name] = model(x1, x2)  # two of (B, K), two of {target: (B, K)}

        # losses
        losses = {}
        for name in models:
            terms = target_losses(p[name], z)  # Eq. 1 for each target
            losses |= {f"loss_{name}_{target}": term for target, term in terms.items()}
            losses[f"loss_{name}"] = sum(terms.values()) / len(terms)  # L_S or L_T
        loss = sum(losses[f"loss_{name}"] for name in models)
        losses["loss"] = loss

        # backward and step
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        # EMA, once a step, after the learners moved
        for name, learner in learners.items():  # Eq. 2
            follower = networks[f"{name}_momentum"]
            ema_update(learner.backbone, follower.backbone, float(momentum[step]))
            ema_update(learner.projector, follower.projector, float(momentum[step]))

        # log, check and save, where it is due
        run.end_step(step, losses, features=z[meta["network"]][0], lr=float(lr[step]),
                     momentum=float(momentum[step]), chance=chance)


# ------------------------------------------------------------------------------------ arguments

def parse_arguments(argv=None):
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_arguments(parser, "simdis")
    add = parser.add_argument_group("method (other defaults: recipe)").add_argument
    add("--stage", default="online", choices=["teacher", "offline", "online"])
    add("--targets", nargs="+", metavar="NAME", choices=[*PRESETS, *TARGETS],
        help=f"7v (default), 2v, byol, or some of {' '.join(TARGETS)}")
    add("--teacher", type=existing_file, metavar="FILE", help="checkpoint of --stage teacher")
    add("--teacher_arch", help="as --arch, the student's (offline: that of FILE)")
    add("--depth", type=at_least(0), help="blocks of a ViT student; with --arch: 0, all")
    add("--hidden", type=at_least(1), help="width of projectors and predictors")
    add("--momentum", type=at_least(0.0), help="first of S^ and T^, rising to 1")
    add("--optimizer", choices=["lars", "sgd", "adamw"])
    add("--sync_bn", action=argparse.BooleanOptionalAction, default=True,
        help="BatchNorm over the images of all processes")
    args = parser.parse_args(argv)
    if args.stage == "teacher" and args.targets:
        parser.error("--targets are the student's, and --stage teacher trains none")
    if args.stage == "teacher" and args.arch and not args.teacher_arch:
        parser.error("--arch is the student's, and --stage teacher trains none: --teacher_arch")
    return args


if __name__ == "__main__":
    launch(lambda: train(parse_arguments()))
