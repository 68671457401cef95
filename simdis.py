"""SimDis: Simple Distillation Baselines for Improving Small Self-supervised Models (Gu, Liu, Tian), offline and online.

The idea. Self-supervised learning suits large networks; a small one trained alone falls far behind. SimDis trains a small
student S by BYOL and lets it predict, beside the projections of its own momentum network S^, those of a large teacher T or
of T's momentum network T^. Offline, the teacher was trained before and is frozen. Online, both learn at once: cheaper, but
the teacher knows little at first. There every projection that the step has made anyway becomes a target: seven views.

    view v ---> S --> z --> a predictor for each target --> q_1 ... q_7        predictions of view v
                |                                            |       |
                |                                         Eq. 1 ... Eq. 1      their mean, and the views exchanged
                |                                            |       |
    v and v' -> S, S^, T, T^: backbone, projector --- sg --> z_1 ... z_7       projections of v or v' (TARGETS); sg: no gradient

    L   = L_S + L_T                                                  L_T online only; offline, T and T^ never change
    L_S = mean over targets of  |q(v) - z|^2 + |q(v') - z|^2         Eq. 1; q and z are L2-normalised
    L_T = |q(v) - z^T^(v')|^2 + |q(v') - z^T^(v)|^2                  Eq. 1: the teacher is plain BYOL
    S^ <- m S^ + (1 - m) S,  T^ <- m T^ + (1 - m) T                  Eq. 2, once a step; m rises from 0.99 to 1 along a cosine

S is kept: backbone.pth is its backbone. Shapes: N images a process, D width of the backbone, K = 256.

Commands:
    python simdis.py                                                         digits: online, 7 views
    python simdis.py --targets byol --output_dir runs/byol                   a baseline: the student alone
    python simdis.py --stage teacher --output_dir runs/teacher               offline, first the teacher ...
    python simdis.py --stage offline --teacher runs/teacher/checkpoint.pth --output_dir runs/offline    ... then the student
    python simdis.py --targets "S^-v'" "T-v'" --output_dir runs/third        any row of Table 2 by its targets
    torchrun --nproc_per_node=32 simdis.py --data IMAGENET                   the paper's run (Table 1)
    torchrun --nproc_per_node=8 simdis.py --data IMAGENET --optimizer sgd --no-sync_bn --batch_size 1024    Table 2

Measured: the first command (40 epochs, seed 0, 1.9 minutes) takes k-NN of S from 63.9 % to 79.7 %, that of T from 65.8 % to 84.2 %.

    what                     paper                        released code                 here
    loss of the student      "BYOL and distillation"      mean over the targets         the same
    momentum networks        updated after the step       before the next forward       after the step
    frozen teacher           fixed                        BatchNorm in training mode    evaluation mode
    student alone (byol)     no teacher                   no teacher                    no teacher is made
    weight decay             not said                     1e-4, with SGD on biases too  1e-4, none on biases and norms
    linear evaluation        base lr 0.001                BatchNorm after the linear    before it, rates swept: eval_linear.py
    cost of 7 views          12 MFLOPs, for 6 predictors  -                             counted at the start: 2.1 M a predictor
    momentum BatchNorm       not said                     batch statistics              batch statistics, running ones of its own
"""
import argparse
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from common import (MEAN, STD, BatchNorm, InputError, Parser, Run, ViewLoader, add_arguments, apply_recipe, autocast,
                    byol_views, cosine_schedule, create_backbone, distributed, ema_update, fp32, knn_accuracy, load_data,
                    load_weights, log, meta_of, non_negative, parameter_groups, read_checkpoint, run, setup, start_from)

# ------------------------------------------------------------------------------------------------------------ recipes

TARGETS = {  # the columns of Table 2: a prediction of view v is compared with what `network` projects of v or of the other view
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
    # found by trial on two CPU cores: a student of one block, a teacher of four
    "digits": dict(arch="vit_nano", depth=1, teacher_arch="vit_nano", img_size=16, patch_size=4, epochs=40, batch_size=64,
                   optimizer="adamw", rates=dict(adamw=(4e-3, 0.1)), warmup_epochs=5, momentum=0.99, hidden=512,
                   views=dict(scale=(0.5, 1.0), flip=0.0, blur=False)),
    "mnist": dict(arch="vit_nano", depth=1, teacher_arch="vit_nano", img_size=28, patch_size=7, epochs=20, batch_size=256,
                  optimizer="adamw", rates=dict(adamw=(4e-3, 0.1)), warmup_epochs=1, momentum=0.99, hidden=512,
                  views=dict(scale=(0.3, 1.0), flip=0.0, blur=False)),
    # the paper's networks with the small-image stem; at 32 pixels blur would erase the image
    "cifar10": dict(arch="resnet18", teacher_arch="resnet50", img_size=32, patch_size=8, epochs=200, batch_size=512,
                    optimizer="sgd", rates=dict(sgd=(0.1, 5e-4), lars=(0.3, 1e-4), adamw=(4e-3, 0.1)), warmup_epochs=10,
                    momentum=0.99, hidden=4096, views=dict(scale=(0.15, 1.0), blur=False)),
    # the paper: Sec. 4, and Sec. 4.3 for SGD (batch 1024); views as in BYOL
    "imagenet": dict(arch="resnet18", teacher_arch="resnet50", img_size=224, patch_size=16, epochs=100, batch_size=2048,
                     optimizer="lars", rates=dict(lars=(0.3, 1e-4), sgd=(0.05, 1e-4)), warmup_epochs=10, momentum=0.99,
                     hidden=4096, views=dict(scale=(0.08, 1.0))),
}

# ------------------------------------------------------------------------------------------------------------- losses


@fp32
def regression_loss(p: Tensor, z: Tensor) -> Tensor:
    """Squared distance of the normalised rows of p and z (N, K), mean over the rows: 2 - 2 cos, from 0 to 4."""
    return (F.normalize(p, dim=1) - F.normalize(z, dim=1)).pow(2).sum(1).mean()  # Eq. 1


def target_losses(p: list[dict[str, Tensor]], z: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """-> one loss for each target, over both views.

    p: for each of the two views its predictions (N, K) by target. z: by network, its projections (N, K) of the two views.
    """
    losses = {}
    for target in p[0]:
        network, view = TARGETS[target]
        z1, z2 = (x.detach() for x in z[network])  # S-v', T-v and T-v' come with a gradient, which stays out
        if view == "other":
            z1, z2 = z2, z1
        losses[target] = regression_loss(p[0][target], z1) + regression_loss(p[1][target], z2)  # Eq. 1, symmetrical
    return losses


# -------------------------------------------------------------------------------------------------------------- model


def mlp(dim: int, hidden: int, out_dim: int = 256) -> nn.Sequential:
    """Sec. 4, of projectors and predictors: FC(4096) + BN + ReLU + FC(256)."""
    return nn.Sequential(nn.Linear(dim, hidden), BatchNorm(hidden), nn.ReLU(), nn.Linear(hidden, out_dim))


class Encoder(nn.Module):
    """Backbone and projector: S^, T^ and a frozen T."""

    def __init__(self, backbone: nn.Module, projector: nn.Module):
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, *views: Tensor) -> list[Tensor]:
        return [self.projector(self.backbone(x)) for x in views]  # V of (N, D) -> V of (N, K)

    def update(self, learner: "Learner", momentum: float) -> None:
        ema_update(learner.backbone, self.backbone, momentum)  # Eq. 2
        ema_update(learner.projector, self.projector, momentum)


class Learner(Encoder):
    """S, and T while it learns: an encoder with a predictor for each target. They share its forward pass."""

    def __init__(self, backbone: nn.Module, targets: list[str], hidden: int, out_dim: int = 256):
        super().__init__(backbone, mlp(backbone.embed_dim, hidden, out_dim))
        self.predictors = nn.ModuleDict({target: mlp(out_dim, hidden, out_dim) for target in targets})

    def forward(self, *views: Tensor) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """-> for each view its projection (N, K), and its predictions (N, K) by target."""
        z = super().forward(*views)
        return z, [{target: predictor(x) for target, predictor in self.predictors.items()} for x in z]


def frozen_copy(encoder: Encoder) -> Encoder:
    """Backbone and projector in storage of their own, without gradient. S^ and T^ stay in training mode, so their BatchNorm
    uses the batch's statistics and keeps running ones of its own."""
    return Encoder(copy.deepcopy(encoder.backbone), copy.deepcopy(encoder.projector)).requires_grad_(False)


class LocalBatchNorm(BatchNorm):
    """Over the images of each process alone (Sec. 4.3): cheaper, but then the number of processes matters."""

    forward = nn.BatchNorm2d.forward


def load_teacher(path: str) -> tuple[dict[str, Encoder], dict]:
    """T and T^ of a checkpoint of `--stage teacher` (or online), frozen in evaluation mode, and T's backbone options."""
    checkpoint = read_checkpoint(path)
    if meta_of(checkpoint).get("method") != "simdis" or not {"teacher", "teacher_momentum"} <= checkpoint.keys():
        raise InputError(f"{path} holds no teacher of simdis.py: make one with --stage teacher")
    options, networks = checkpoint["meta"]["teacher"], {}
    for name in ("teacher", "teacher_momentum"):
        backbone = create_backbone(**options)
        networks[name] = Encoder(backbone, mlp(backbone.embed_dim, checkpoint["args"]["hidden"])).eval().requires_grad_(False)
        weights = {key: value for key, value in checkpoint[name].items() if not key.startswith("predictors.")}
        load_weights(networks[name], weights, path)
    return networks, options


def build(args) -> tuple[dict[str, Encoder], dict]:
    """-> the networks of this stage by name, and what a reader of the checkpoint must know of the backbones."""
    networks, kept = {}, "teacher" if args.stage == "teacher" else "student"
    options = dict(img_size=args.img_size, patch_size=args.patch_size, pos_embed="sincos")
    meta = dict(method="simdis", network=kept, mean=MEAN, std=STD)
    pairs = {"student": (dict(arch=args.arch, depth=args.depth or None), args.targets),
             "teacher": (dict(arch=args.teacher_arch), TEACHER_TARGETS)}
    taught = any(TARGETS[target][0].startswith("teacher") for target in args.targets)
    if args.stage == "offline" and not taught:
        raise InputError("--stage offline with no target of the teacher is the student alone: use --stage online")
    if args.stage == "teacher":
        del pairs["student"]
    elif args.stage == "offline" or not taught:
        del pairs["teacher"]
    for name, (own, targets) in pairs.items():
        meta[name] = {**options, **own}
        backbone = create_backbone(**meta[name])
        if args.init and name == kept:
            start_from(backbone, args.init)
        if hasattr(backbone, "mask_token"):
            backbone.mask_token.requires_grad_(False)  # no masks in this method
        networks[name] = Learner(backbone, targets, args.hidden)
        networks[f"{name}_momentum"] = frozen_copy(networks[name])
    if args.stage == "offline":
        frozen, meta["teacher"] = load_teacher(args.teacher)
        networks |= frozen
    if not args.sync_bn:
        for module in nn.ModuleDict(networks).modules():
            if isinstance(module, BatchNorm):
                module.__class__ = LocalBatchNorm
    return networks, dict(meta, backbone=meta[kept])


def make_optimizer(args, learners: nn.Module, fused: bool) -> torch.optim.Optimizer:
    """Of matrices and, without weight decay, of biases and norms, which LARS leaves unscaled too."""
    matrices, others = parameter_groups(learners, args.weight_decay)
    if args.optimizer == "lars":  # timm's scales a group that has weight decay, or that asks for it
        return Lars([dict(matrices, always_adapt=True), others], lr=0.0, momentum=0.9)
    if args.optimizer == "sgd":
        return torch.optim.SGD([matrices, others], lr=0.0, momentum=0.9)
    return torch.optim.AdamW([matrices, others], lr=0.0, fused=fused)


@torch.no_grad()
def multiply_adds(network: nn.Module, *shape: int) -> float:
    """Of one input of this shape in evaluation, what Table 1 calls FLOPs. Counted on shapes alone, nothing is computed."""
    network = copy.deepcopy(network).to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, *shape, device="meta"))
    return counter.get_total_flops() / 2


def table1_flops(networks: dict[str, Encoder], img_size: int) -> dict[str, float]:
    """Table 1's count for one image: a forward pass of T (twice where it was trained before) and of S, and S's predictors."""
    flops = {}
    for name in ("teacher", "student"):
        if name in networks:
            encoder = Encoder(networks[name].backbone, networks[name].projector)
            passes = 2 if name == "teacher" and not isinstance(networks[name], Learner) else 1
            flops[name] = passes * multiply_adds(encoder, 3, img_size, img_size)
    if "student" in networks:
        predictors = networks["student"].predictors.values()
        flops["predictors"] = sum(multiply_adds(predictor, predictor[0].in_features) for predictor in predictors)
    return flops


# ----------------------------------------------------------------------------------------------------------- training


def settle(args, recipe: dict) -> None:
    """What depends on other arguments: targets by name, in the order of the table; the rates of the optimiser."""
    if args.stage == "teacher" and args.targets:
        raise InputError("--targets are the student's, and --stage teacher trains none")
    if (args.stage == "offline") != bool(args.teacher):
        raise InputError("--stage offline needs --teacher FILE, a checkpoint of --stage teacher; the other stages take none")
    chosen = [target for name in args.targets or ["7v"] for target in PRESETS.get(name, [name])]
    unknown = [name for name in chosen if name not in TARGETS]
    if unknown:
        raise InputError(f"unknown --targets {unknown[0]}: use {', '.join(PRESETS)}, or some of {' '.join(TARGETS)}")
    args.targets = [target for target in TARGETS if target in chosen]
    lr, weight_decay = recipe["rates"].get(args.optimizer, (None, None))
    args.lr = lr if args.lr is None else args.lr
    args.weight_decay = weight_decay if args.weight_decay is None else args.weight_decay
    if args.lr is None or args.weight_decay is None:
        raise InputError(f"the recipe has no rates for --optimizer {args.optimizer}: pass --lr and --weight_decay")


def train(args) -> None:
    device = setup(args)
    train_data, test_data = load_data(args.data, args.data_path)
    if args.arch and args.depth is None:
        args.depth = 0  # the recipe's depth is that of the recipe's student
    recipe = apply_recipe(args, RECIPES, train_data)
    settle(args, recipe)
    networks, meta = build(args)
    kept = meta["network"]
    flops = table1_flops(networks, args.img_size)
    for network in networks.values():
        network.to(device)
        if args.compile:
            network.backbone.compile()
    learners = nn.ModuleDict({name: network for name, network in networks.items() if isinstance(network, Learner)})
    models = {name: distributed(learner) for name, learner in learners.items()}
    # the other networks run only where a target asks for them
    asked = {TARGETS[target][0] for learner in learners.values() for target in learner.predictors}
    fixed = [name for name in networks if name in asked and name not in learners]
    optimizer = make_optimizer(args, learners, fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")

    views = byol_views(args.img_size, **recipe["views"])
    loader = ViewLoader(train_data, views, args.batch_size, args.seed, device, args.num_workers)
    steps_per_epoch = loader.steps_per_epoch
    total = args.epochs * steps_per_epoch
    job = Run(args, total, steps_per_epoch)
    job.same_data(train_data)
    job.restore(**networks, optimizer=optimizer, scaler=scaler)

    peak_lr = args.lr * args.batch_size / 256
    lr = cosine_schedule(peak_lr, 0.0, total, warmup=int(args.warmup_epochs * steps_per_epoch))
    momentum = cosine_schedule(args.momentum, 1.0, total)
    chance = 4.0  # of each target: two views at right angles to what they predict
    for name in ("teacher", "student"):
        if name in networks:
            parameters = sum(p.numel() for p in networks[name].backbone.parameters()) / 1e6
            doing = f"learns {' '.join(learners[name].predictors)}" if name in learners else "is frozen"
            log(f"{name}: {meta[name]['arch']}, {parameters:.1f} M parameters in the backbone, {doing}")
    log(f"{args.stage}, {args.optimizer}: {total} steps of {args.batch_size} images, lr {args.lr:.1e} * {args.batch_size} / 256 "
        f"= {peak_lr:.1e}, chance level of each loss {chance:.0f}")
    counts = " + ".join(f"{name} {count / 1e6:,.1f} M" for name, count in flops.items())
    log(f"multiply-adds of an image, as in Table 1: {counts}")

    def knn(name):
        return knn_accuracy(networks[name].backbone, train_data, test_data, args.img_size, device, num_workers=args.num_workers,
                            dtype=args.dtype)

    def check():
        """k-NN of what is kept, after that of the teacher beside it."""
        if kept == "student" and "teacher" in learners:
            note_teacher()
        return knn(kept)

    def note_teacher():
        accuracy = knn("teacher")
        if accuracy is not None:
            log(f"teacher: k-NN top-1 {accuracy:.1f} %")
            job.record(step=step + 1, knn_teacher=accuracy)

    def state():
        return dict({name: network.state_dict() for name, network in networks.items()}, optimizer=optimizer.state_dict(),
                    scaler=scaler.state_dict(), meta=meta)

    step = job.start - 1
    if job.start == 0:
        if args.stage == "offline":
            note_teacher()
        job.record_knn(0, check())
    for step, (x1, x2), _ in loader.steps(job.start, job.stop):  # two views (N, 3, H, W)
        # schedules
        for group in optimizer.param_groups:
            group["lr"] = float(lr[step])

        # momentum networks, and a frozen teacher: projections without gradient
        with torch.no_grad(), autocast(device, args.dtype):
            z = {name: networks[name](x1, x2) for name in fixed}  # each two of (N, K)

        # student, and online the teacher: projections, and a prediction for each target
        p = {}
        with autocast(device, args.dtype):
            for name, model in models.items():
                z[name], p[name] = model(x1, x2)  # two of (N, K), two of {target: (N, K)}

        # losses
        losses, loss = {}, 0.0
        for name in models:
            terms = target_losses(p[name], z)  # Eq. 1 for each target
            losses |= {f"loss_{name}_{target}": term for target, term in terms.items()}
            losses[f"loss_{name}"] = sum(terms.values()) / len(terms)
            loss = loss + losses[f"loss_{name}"]
        losses["loss"] = loss  # last: where a term is not finite, the term is named

        # backward and step
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        # EMA, once a step, after the learners moved
        for name, learner in learners.items():
            networks[f"{name}_momentum"].update(learner, float(momentum[step]))  # Eq. 2

        # log
        job.watch(step, losses)
        if job.log_now(step):
            job.log_step(step, losses, loader.waited, features=z[kept][0].detach(), lr=float(lr[step]),
                         momentum=float(momentum[step]), chance=chance)
        job.after_step(step, state, check)


# ---------------------------------------------------------------------------------------------------------- arguments


def parse_arguments(argv=None):
    flag = argparse.BooleanOptionalAction
    parser = Parser(description=__doc__.split("\n")[0])
    add_arguments(parser, "simdis")
    group = parser.add_argument_group("method")
    group.add_argument("--stage", default="online", choices=["teacher", "offline", "online"], help="(default: %(default)s)")
    group.add_argument("--targets", nargs="+", metavar="NAME",
                       help=f"{', '.join(PRESETS)} (the default), or some of {' '.join(TARGETS)}")
    group.add_argument("--teacher", metavar="FILE", help="for --stage offline: a checkpoint of --stage teacher")
    group.add_argument("--teacher_arch", help="as --arch, which is the student's (default: recipe; offline: FILE's)")
    group.add_argument("--depth", type=non_negative, help="blocks of a ViT student (default: recipe; with --arch: 0, all)")
    group.add_argument("--hidden", type=int, help="width of projectors and predictors (default: recipe)")
    group.add_argument("--momentum", type=float, help="of S^ and T^ at the start, rising to 1 (default: recipe)")
    group.add_argument("--optimizer", choices=["lars", "sgd", "adamw"], help="(default: recipe)")
    group.add_argument("--sync_bn", action=flag, default=True, help="BatchNorm over the images of all processes")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse_arguments()
    run(lambda: train(arguments))
