"""SimDis: Simple Distillation Baselines for Improving Small Self-supervised Models (Gu, Liu, Tian),
offline and online.

The idea. Self-supervised learning suits large networks; a small one trained alone falls far behind.
SimDis trains a small student S by BYOL and lets it predict, beside the projections of its own
momentum network S^, those of a large teacher T or of T's momentum network T^. Offline, the teacher
was trained before and is frozen. Online, both learn at once: cheaper, but the teacher knows little
at first. There every projection that the step has made anyway becomes a target: seven views.

    view v ---> S --> z --> a predictor for each target --> q_1 ... q_7     predictions of view v
                |                                            |       |
                |                                          Eq. 1 ... Eq. 1  mean; views exchanged
                |                                            |       |
    v and v' -> S, S^, T, T^: backbone, projector --- sg --> z_1 ... z_7    projections (TARGETS)

    L   = L_S + L_T                                            L_T online only
    L_S = mean over targets of  |q(v) - z|^2 + |q(v') - z|^2   Eq. 1; q and z are L2-normalised
    L_T = |q(v) - z^T^(v')|^2 + |q(v') - z^T^(v)|^2            Eq. 1: the teacher is plain BYOL
    S^ <- m S^ + (1 - m) S,  T^ <- m T^ + (1 - m) T            Eq. 2, once a step; m rises to 1

What each loss moves: L_S the backbone, projector and predictors of S; L_T those of T. Targets carry
no gradient (sg), and offline T and T^ never change. S is kept: backbone.pth is its backbone. There
are no negatives. Memory grows with B: S and a T that learns keep the activations of both views.

Symbols: B images of this process, M of the global batch, D width of a backbone, K = 256 outputs of
a projector, m momentum.

    python simdis.py                                              digits: online, 7 views
    python simdis.py --targets byol --output_dir runs/byol        a baseline: the student alone
    python simdis.py --stage teacher --output_dir runs/teacher    offline: first the teacher ...
    python simdis.py --stage offline --teacher runs/teacher/checkpoint.pth \
        --output_dir runs/offline                                 ... then the student
    python simdis.py --targets "S^-v'" "T-v'" --output_dir runs/third    a row of Table 2
    torchrun --nproc_per_node=32 simdis.py --data IMAGENET        the paper's run (Table 1)
    torchrun --nproc_per_node=8 simdis.py --data IMAGENET --optimizer sgd --no-sync_bn \
        --batch_size 1024                                         Table 2

Measured: the first command (40 epochs, seed 0, 1.9 minutes) takes k-NN of S from 63.9 % to 79.7 %,
that of T from 65.8 % to 84.2 %.

    what                 paper                     released code         here
    loss of the student  "BYOL and distillation"   mean over targets     the same
    momentum networks    updated after the step    before the forward    after the step
    frozen teacher       fixed                     BatchNorm trains      evaluation mode
    student alone        no teacher                no teacher            no teacher is made
    weight decay         not said                  1e-4, biases too      1e-4, not on biases, norms
    linear evaluation    base lr 0.001             BatchNorm after it    before it: eval_linear.py
    cost of 7 views      12 MFLOPs for 6           -                     counted at the start
    momentum BatchNorm   not said                  of the batch          of the batch
"""
import argparse
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from common import (MEAN, STD, BatchNorm, InputError, Parser, Run, ViewLoader, add_arguments,
                    apply_recipe, at_least, autocast, byol_views, cosine_schedule, create_backbone,
                    distributed, ema_update, existing_file, fp32, knn_accuracy, launch, load_data,
                    load_weights, log, meta_of, parameter_groups, read_checkpoint, setup,
                    start_from)

# -------------------------------------------------------------------------------------- recipes

# the columns of Table 2: a prediction of view v is compared with what `network` projects of the
# same or of the other view
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
    "digits": dict(  # found by trial on two CPU cores: a student of one block, a teacher of four
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
    "imagenet": dict(  # the paper: Sec. 4, and Sec. 4.3 for SGD (batch 1024); views as in BYOL
        arch="resnet18", teacher_arch="resnet50", img_size=224, patch_size=16, epochs=100,
        batch_size=2048, optimizer="lars", warmup_epochs=10, momentum=0.99, hidden=4096,
        rates=dict(lars=(0.3, 1e-4), sgd=(0.05, 1e-4)), views=dict(scale=(0.08, 1.0))),
}

# --------------------------------------------------------------------------------------- losses


@fp32
def regression_loss(p: Tensor, z: Tensor) -> Tensor:
    """Squared distance of the normalised rows of p and z (B, K), mean over rows: 2 - 2 cos."""
    return (F.normalize(p, dim=1) - F.normalize(z, dim=1)).pow(2).sum(1).mean()  # Eq. 1


def target_losses(p: list[dict[str, Tensor]], z: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """-> one loss for each target, over both views.

    p: for each of the two views its predictions (B, K) by target. z: by network, its projections
    (B, K) of the two views.
    """
    losses = {}
    for target in p[0]:
        network, view = TARGETS[target]
        z1, z2 = (x.detach() for x in z[network])  # those of S and T come with a gradient
        if view == "other":
            z1, z2 = z2, z1
        losses[target] = regression_loss(p[0][target], z1) + regression_loss(p[1][target], z2)
    return losses


# ---------------------------------------------------------------------------------------- model


def mlp(dim: int, hidden: int, out_dim: int = 256) -> nn.Sequential:
    """Sec. 4, for projectors and predictors: FC(4096) + BN + ReLU + FC(256)."""
    layers = [nn.Linear(dim, hidden), BatchNorm(hidden), nn.ReLU(), nn.Linear(hidden, out_dim)]
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """Backbone and projector: S^, T^ and a frozen T."""

    def __init__(self, backbone: nn.Module, projector: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, *views: Tensor) -> list[Tensor]:
        return [self.projector(self.backbone(x)) for x in views]  # V of (B, D) -> V of (B, K)


class Learner(Encoder):
    """S, and T while it learns: an encoder with a predictor for each target."""

    def __init__(self, backbone: nn.Module, targets: list[str], hidden: int):
        super().__init__(backbone, mlp(backbone.embed_dim, hidden))
        self.predictors = nn.ModuleDict({target: mlp(256, hidden) for target in targets})

    def forward(self, *views: Tensor) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """-> for each view its projection (B, K), and its predictions (B, K) by target."""
        z = super().forward(*views)
        p = []
        for projection in z:
            p.append({name: predict(projection) for name, predict in self.predictors.items()})
        return z, p


def load_teacher(path: str) -> tuple[dict[str, Encoder], dict]:
    """T and T^ of a checkpoint of `--stage teacher` (or online), frozen in evaluation mode, and T's
    backbone options."""
    checkpoint = read_checkpoint(path)
    ours = meta_of(checkpoint).get("method") == "simdis"
    if not ours or not {"teacher", "teacher_momentum"} <= checkpoint.keys():
        raise InputError(f"{path} holds no teacher of simdis.py: make one with --stage teacher")
    options = checkpoint["meta"]["teacher"]
    networks = {}
    for name in ("teacher", "teacher_momentum"):
        backbone = create_backbone(**options)
        projector = mlp(backbone.embed_dim, checkpoint["args"]["hidden"])
        networks[name] = Encoder(backbone, projector).eval().requires_grad_(False)
        load_weights(networks[name], checkpoint[name], path)  # its predictors are left out
    return networks, options


def build(args) -> tuple[dict[str, Encoder], dict]:
    """-> the networks of this stage by name, and what a reader of the checkpoint must know."""
    learn = {"teacher": ["teacher"], "offline": ["student"], "online": ["student", "teacher"]}
    names = learn[args.stage]
    if not any(TARGETS[target][0].startswith("teacher") for target in args.targets):
        if args.stage == "offline":
            raise InputError("--stage offline with no target of the teacher is the student alone: "
                             "use --stage online")
        names = ["student"]
    sizes = dict(img_size=args.img_size, patch_size=args.patch_size, pos_embed="sincos")
    options = {"student": dict(sizes, arch=args.arch, depth=args.depth or None),
               "teacher": dict(sizes, arch=args.teacher_arch)}
    targets = {"student": args.targets, "teacher": TEACHER_TARGETS}
    meta = dict(method="simdis", network=names[0], mean=MEAN, std=STD)  # the one that is kept
    networks = {}
    for name in names:
        meta[name] = options[name]
        backbone = create_backbone(**options[name])
        if args.init and name == names[0]:
            start_from(backbone, args.init)
        learner = Learner(backbone, targets[name], args.hidden)
        # in training mode as S: BatchNorm of the batch, with running statistics of its own
        follower = copy.deepcopy(Encoder(backbone, learner.projector)).requires_grad_(False)
        networks |= {name: learner, f"{name}_momentum": follower}
    if args.stage == "offline":
        frozen, meta["teacher"] = load_teacher(args.teacher)
        networks |= frozen
    if not args.sync_bn:  # Sec. 4.3: cheaper, but then the number of processes matters
        for module in nn.ModuleDict(networks).modules():
            if isinstance(module, BatchNorm):
                module.across_processes = False
    meta["backbone"] = meta[names[0]]
    return networks, meta


def make_optimizer(args, learners: nn.Module, fused: bool) -> torch.optim.Optimizer:
    """Biases and norms have no weight decay, and LARS does not scale them."""
    matrices, others = parameter_groups(learners, args.weight_decay)
    if args.optimizer == "lars":  # timm's scales a group that has weight decay, or that asks for it
        return Lars([dict(matrices, always_adapt=True), others], lr=0.0, momentum=0.9)
    if args.optimizer == "sgd":
        return torch.optim.SGD([matrices, others], lr=0.0, momentum=0.9)
    return torch.optim.AdamW([matrices, others], lr=0.0, fused=fused)


# ------------------------------------------------------------------------------------- training


def complete(args, recipe: dict) -> None:
    """Fills what depends on other arguments: targets by name, in the order of the table; the rates
    of the optimiser."""
    if args.stage == "teacher" and args.targets:
        raise InputError("--targets are the student's, and --stage teacher trains none")
    if (args.stage == "offline") != bool(args.teacher):
        raise InputError("--stage offline needs --teacher FILE, a checkpoint of --stage teacher; "
                         "the other stages take none")
    chosen = []
    for name in args.targets or ["7v"]:
        chosen += PRESETS.get(name, [name])
    unknown = [name for name in chosen if name not in TARGETS]
    if unknown:
        raise InputError(f"unknown --targets {unknown[0]}: use {', '.join(PRESETS)}, or some of "
                         f"{' '.join(TARGETS)}")
    args.targets = [target for target in TARGETS if target in chosen]
    lr, weight_decay = recipe["rates"].get(args.optimizer, (None, None))
    if args.lr is None:
        args.lr = lr
    if args.weight_decay is None:
        args.weight_decay = weight_decay
    if args.lr is None or args.weight_decay is None:
        raise InputError(f"the recipe has no rates for --optimizer {args.optimizer}: pass --lr and "
                         f"--weight_decay")


def train(args) -> None:
    # data and networks
    device = setup(args)
    train_data, test_data = load_data(args.data, args.data_path)
    if args.arch and args.depth is None:
        args.depth = 0  # the recipe's depth is that of the recipe's student
    recipe = apply_recipe(args, RECIPES, train_data)
    complete(args, recipe)
    networks, meta = build(args)
    log_networks(networks, meta, args.img_size)
    for network in networks.values():
        network.to(device)
        if args.compile:
            network.backbone.compile()
    learners = nn.ModuleDict({k: x for k, x in networks.items() if isinstance(x, Learner)})
    models = {name: distributed(learner) for name, learner in learners.items()}
    # the other networks run only where a target asks for them
    asked = {TARGETS[target][0] for learner in learners.values() for target in learner.predictors}
    others = [name for name in networks if name in asked and name not in learners]
    optimizer = make_optimizer(args, learners, fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")

    # the run: two views of each image, k-NN of what is kept and of a teacher beside it
    views = byol_views(args.img_size, **recipe["views"])
    loader = ViewLoader(train_data, views, args.batch_size, args.seed, device, args.num_workers)

    def knn(name):
        return knn_accuracy(networks[name].backbone, train_data, test_data, args.img_size, device,
                            num_workers=args.num_workers, dtype=args.dtype)

    checks = {"knn": (lambda: knn(meta["network"]), args.knn_every)}
    if args.stage == "online" and "teacher" in networks:
        checks = {"knn_teacher": (lambda: knn("teacher"), args.knn_every), **checks}
    run = Run(args, loader, meta, checks, **networks, optimizer=optimizer, scaler=scaler)
    if args.stage == "offline" and run.start == 0:
        accuracy = knn("teacher")
        if accuracy is not None:
            log(f"teacher: k-NN top-1 {accuracy:.1f} %")
            run.record(0, knn_teacher=accuracy)

    # schedules, a value for each step
    M = args.batch_size
    peak_lr = args.lr * M / 256
    lr = cosine_schedule(peak_lr, 0.0, run.total, int(args.warmup_epochs * run.steps_per_epoch))
    momentum = cosine_schedule(args.momentum, 1.0, run.total)
    chance = 4.0  # of each target: 2 for each view, where prediction and target are orthogonal
    log(f"{args.stage}, {args.optimizer}: {run.total} steps of {M} images, lr {args.lr:.1e} * {M} "
        f"/ 256 = {peak_lr:.1e}, chance level of each loss {chance:.0f}")

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
    add = parser.add_argument_group("method").add_argument
    add("--stage", default="online", choices=["teacher", "offline", "online"])
    add("--targets", nargs="+", metavar="NAME",
        help=f"{', '.join(PRESETS)} (the default), or some of {' '.join(TARGETS)}")
    add("--teacher", type=existing_file, metavar="FILE", help="checkpoint of --stage teacher")
    add("--teacher_arch", help="as --arch, the student's (default: recipe; offline: FILE's)")
    add("--depth", type=at_least(0), help="blocks of a ViT student (recipe; with --arch: 0, all)")
    add("--hidden", type=at_least(1), help="width of projectors and predictors (default: recipe)")
    add("--momentum", type=at_least(0.0), help="first of S^ and T^, rising to 1 (default: recipe)")
    add("--optimizer", choices=["lars", "sgd", "adamw"], help="(default: recipe)")
    add("--sync_bn", action=argparse.BooleanOptionalAction, default=True,
        help="BatchNorm over the images of all processes")
    return parser.parse_args(argv)


# -------------------------------------------------------------- cost of the networks (Table 1)


@torch.no_grad()
def multiply_adds(network: nn.Module, *shape: int) -> float:
    """Of one input of this shape: Table 1's FLOPs. On the meta device, so nothing is computed."""
    network = copy.deepcopy(network).to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, *shape, device="meta"))
    return counter.get_total_flops() / 2


def log_networks(networks: dict[str, Encoder], meta: dict, img_size: int) -> dict[str, float]:
    """Logs what learns and, as Table 1 counts them, the multiply-adds of one image -> these counts:
    T's forward pass (twice where it was trained before), S's, and S's predictors."""
    flops = {}
    for name in ("teacher", "student"):
        if name in networks:
            network = networks[name]
            learns = isinstance(network, Learner)
            encoder = Encoder(network.backbone, network.projector)
            count = multiply_adds(encoder, 3, img_size, img_size)
            flops[name] = count if learns else 2 * count
            parameters = sum(p.numel() for p in network.backbone.parameters()) / 1e6
            doing = f"learns {' '.join(network.predictors)}" if learns else "is frozen"
            log(f"{name}: {meta[name]['arch']}, {parameters:.1f} M parameters in the backbone, "
                f"{doing}")
    if "student" in networks:
        predictors = networks["student"].predictors.values()
        flops["predictors"] = sum(multiply_adds(q, q[0].in_features) for q in predictors)
    counts = [f"{name} {count / 1e6:,.1f} M" for name, count in flops.items()]
    log(f"multiply-adds of an image, as in Table 1: {' + '.join(counts)}")
    return flops


if __name__ == "__main__":
    arguments = parse_arguments()
    launch(lambda: train(arguments))
