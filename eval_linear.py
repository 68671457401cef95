"""Evaluations that train something on top of a backbone: linear probes of its layers, and fine-tuning.

Probes (default). The backbone is frozen. Every layer's feature is standardised and goes to one linear classifier for each
learning rate of a grid. All layers x rates are one batched matmul on one forward pass, so the grid costs next to nothing:

    crops -> backbone -> h_1 ... h_L -> BatchNorm without parameters -> (L, B, D) @ (L, D, R*K) -> logits (L, B, R, K)
             frozen      [CLS], mean    so that the scale of the                                   R rates, K classes
                         or both        features does not matter

Each probe has the L2 penalty of scikit-learn's logistic regression (C = 1: half the squared weights over the number of images,
next to nothing on ImageNet), and ends within a point of it. A tenth of the training images, the same share of each class, is
held out. By it each layer chooses its rate; then the chosen probes, as they are, look at the test images once. `--layers all`
gives the multi-exit curve (SDSSL, Fig. 3). `--cached` makes every feature once, from whole images.

Fine-tuning (`--finetune all` or `head`). Pooled tokens -> LayerNorm -> linear, AdamW with layer decay (d2v_kd, Eq. 7):
    lr_l = lr * d^(L+1-l)     layer 0: patch projection, [CLS], positions; layer L+1: norms and head
Layer decay, Mixup, CutMix, RandAugment and random erasing are timm's. It learns from all images (but for --holdout).

    python eval_linear.py --checkpoint runs/sdssl/checkpoint.pth --data digits --layers all
    python eval_linear.py --checkpoint runs/sdssl/checkpoint.pth --data digits --cached --pool both --output_dir runs/both
    python eval_linear.py --checkpoint runs/sdssl/checkpoint.pth --data digits --finetune all
    python eval_linear.py --compare runs/linear-0 runs/linear-1 runs/plain-0 runs/plain-1   # multi-exit curves, by seed
    python eval_linear.py --checkpoint FILE --data cifar10 pets CUB_FOLDER --finetune all      # a table of several data sets
    torchrun --nproc_per_node=8 eval_linear.py --arch vit_small --patch_size 16 --checkpoint FILE --data DIR --layers all

--output_dir gets checkpoint.pth, log.jsonl, curves.png, results.json and, with --layers all, multi_exit.png.

    probes               MoCo v3                DINO                     here
    feature              [CLS]                  [CLS] of last 4 or 1     [CLS], patch mean or both, of each layer
    before the linear    nothing                nothing                  BatchNorm without parameters, as MAE
    optimiser            SGD 0.9, batch 1024, 90 epochs                  the same; DINO: 100 epochs
    weight decay         none                   none                     1/N, as scikit-learn; --weight_decay 0 as theirs
    learning rate        3 for ViTs             0.001                    a grid; for a batch of 256, as theirs
    cosine               for each epoch         for each epoch           for each step
    chosen               the epoch, by test     the epoch, by test       the rate, by held-out training images

All random numbers are functions of (seed, step, place in the global batch), timm's draws too, whose generators are seeded
for the call; Mixup pairs images of the global batch. So the number of processes does not matter (but for timm's own CNNs,
fine-tuned: their BatchNorm is per process). Crops are resized bilinearly, whole images bicubically.
"""
import argparse
import contextlib
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.optim import param_groups_layer_decay
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from common import (DATASETS, MEAN, STD, BatchNorm, ImageData, InputError, Parser, Run, View, ViewLoader, add_checkpoint_arguments,
                    add_system_arguments, apply_recipe, at_least, autocast, cosine_schedule, distributed, eval_batches,
                    extract_features, fp32, gather, launch, load_backbone, load_data, local_rows, log, mean_over_processes,
                    progress, rank, refuse_to_replace, replacing, setup, subplots, world_size)

# ------------------------------------------------------------------------------------------------------------ recipes

RATES = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
WHOLE = dict(scale=(0.9, 1.0), flip=0.0)  # by trial: a digit that is cut or flipped is another one, or none
PROBE_RECIPES = {
    "digits": dict(epochs=200, batch_size=128, lr=RATES, views=WHOLE),
    "mnist": dict(epochs=20, batch_size=256, lr=RATES, views=WHOLE),
    "cifar10": dict(epochs=90, batch_size=256, lr=RATES, views=dict(scale=(0.3, 1.0))),
    "imagenet": dict(epochs=90, batch_size=1024, lr=RATES, views=dict(scale=(0.08, 1.0))),  # MoCo v3
}
TIMM = dict(lr=[1e-3], weight_decay=0.01, mixup=0.8, cutmix=1.0, randaugment="rand-m9-mstd0.5-inc1", erasing=0.25, smoothing=0.1)
GENTLE = TIMM | dict(lr=dict(all=[1e-3], head=[3e-2]), mixup=0.2, cutmix=0.0, randaugment="none", erasing=0.0, views=WHOLE)
FINETUNE_RECIPES = {
    "digits": dict(epochs=40, batch_size=128, warmup_epochs=4, layer_decay=0.75, **GENTLE),  # by trial, and so is MNIST's
    "mnist": dict(epochs=10, batch_size=256, warmup_epochs=1, layer_decay=0.75, **GENTLE),
    # d2v_kd, which enlarges CIFAR to 224 pixels; the crops of 32 pixels are ours
    "cifar10": dict(epochs=15, batch_size=256, warmup_epochs=1.5, layer_decay=0.75, views=dict(scale=(0.3, 1.0)), **TIMM),
    # d2v_kd, for its 6 blocks: 0.81 is the root of the 0.65 that Data2Vec2 has for 12
    "imagenet": dict(epochs=15, batch_size=256, warmup_epochs=1.5, layer_decay=0.81, views=dict(scale=(0.08, 1.0)), **TIMM),
}
MIX_PROB, SWITCH_PROB = 0.9, 0.5  # d2v_kd: how often images are mixed, and how often then by CutMix
EVAL_BATCH = 256  # images per process when nothing is learnt

# ----------------------------------------------------------------------------------------------------------- features


def pooled_layers(backbone: nn.Module, x: Tensor, pool: str, layers: bool) -> list[Tensor]:
    """Images (B, 3, H, W) -> features of all layers, or of the last one alone: a list of (B, D_l), each after the final norm.

    pool: [CLS] (of timm's models their own output), the mean of the patch tokens, or both side by side. ResNets have
    neither: a stage is averaged.
    """
    if pool == "cls" or not backbone.has_tokens:
        return backbone(x, layers=True) if layers else [backbone(x)]
    tokens = backbone.tokens(x, len(backbone.layer_dims) if layers else 1)
    tokens = [(cls, patches.mean((1, 2))) for cls, patches in tokens]  # (B, D) each
    return [mean if pool == "mean" else torch.cat([cls, mean], 1) for cls, mean in tokens]


def pooled_dims(backbone: nn.Module, pool: str, layers: bool) -> list[int]:
    return [d * (2 if pool == "both" else 1) for d in (backbone.layer_dims if layers else [backbone.embed_dim])]


class FrozenLayers(nn.Module):
    """`pooled_layers` of a backbone that stays as it is: BatchNorm neither uses nor keeps a batch's statistics."""

    def __init__(self, backbone: nn.Module, pool: str, layers: bool):
        super().__init__()
        self.backbone, self.pool, self.all_layers = backbone.eval().requires_grad_(False), pool, layers

    @torch.no_grad()
    def forward(self, x: Tensor, layers: bool = True) -> list[Tensor]:
        return pooled_layers(self.backbone, x, self.pool, self.all_layers)


# ------------------------------------------------------------------------------------------------------------- models


class Probes(nn.Module):
    """Linear classifiers of L layers x R learning rates at once: L features (B, D_l) -> logits (L, B, R, K), in fp32.

    Narrower layers (a ResNet's lower stages) are padded with zeros, which add nothing. Weights start as in MoCo v3, those
    of one layer alike.
    """

    def __init__(self, dims: list[int], rates: int, classes: int):
        super().__init__()
        L, D = len(dims), max(dims)
        self.rates, self.norm = rates, BatchNorm(L * D, eps=1e-6, affine=False)
        self.weight = nn.Parameter((0.01 * torch.randn(L, D, classes)).repeat(1, 1, rates))  # (L, D, R*K)
        self.bias = nn.Parameter(torch.zeros(L, 1, rates * classes))

    def forward(self, features: list[Tensor]) -> Tensor:
        with torch.autocast(features[0].device.type, enabled=False):
            width = self.weight.shape[1]
            x = torch.stack([F.pad(f.float(), (0, width - f.shape[1])) for f in features], 1)  # (B, L, D)
            x = self.norm(x.flatten(1)).view_as(x).transpose(0, 1)  # (L, B, D)
            return torch.baddbmm(self.bias, x, self.weight).unflatten(2, (self.rates, -1))  # (L, B, R, K)

    def standardize_by(self, features: list[Tensor]) -> None:
        """Mean and variance of all training features (N, D_l) at once, in place of each batch's."""
        spread = [torch.var_mean(F.pad(f, (0, self.weight.shape[1] - f.shape[1])), 0) for f in features]
        variance, mean = (torch.cat(parts) for parts in zip(*spread, strict=True))  # (L*D,)
        self.norm.running_var.copy_(variance)
        self.norm.running_mean.copy_(mean)
        self.norm.eval()

    def penalty(self) -> Tensor:
        """(L, R): half the squared weights of each probe."""
        return self.weight.unflatten(2, (self.rates, -1)).pow(2).sum((1, 3)) / 2


class Classifier(nn.Module):
    """Backbone -> pooled tokens of the last layer -> LayerNorm -> linear. Logits (1, B, 1, K), as of one probe."""

    def __init__(self, backbone: nn.Module, pool: str, classes: int, head_only: bool):
        super().__init__()
        width, = pooled_dims(backbone, pool, layers=False)
        self.backbone, self.pool = backbone.requires_grad_(not head_only), pool
        self.backbone.train(not head_only)  # a frozen one keeps its BatchNorm statistics
        for name in ("fc_norm", "attn_pool"):  # of timm's own pooling, which the other pools go past
            part = getattr(getattr(backbone, "model", None), name, None)
            if part is not None and pool != "cls" and backbone.has_tokens:
                part.requires_grad_(False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        h, = pooled_layers(self.backbone, x, self.pool, layers=False)  # (B, D)
        return self.head(self.norm(h))[None, :, None]

    def group_matcher(self, coarse: bool = False) -> dict:
        """For timm's layer decay: layer 0, layers 1 to L; what neither names, norms and head, is layer L+1."""
        start = r"backbone\.(?:model\.)?"
        return dict(stem=start + r"(?:cls_token|pos_embed|patch_embed|reg_token|norm_pre|conv1|bn1)",
                    blocks=start + r"(?:blocks\.|layer)(\d+)")


def layer_decay_groups(model: Classifier, weight_decay: float, decay: float) -> list[dict]:
    """Parameters that learn, by layer, with `lr_scale` d^(L+1-l) (Eq. 7); biases, norms, [CLS] and positions do not decay."""
    single = [name for name, _ in model.named_parameters() if name.endswith(("cls_token", "pos_embed", "reg_token"))]
    return param_groups_layer_decay(model, weight_decay, no_weight_decay_list=single, layer_decay=decay)


@fp32
def sample_losses(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy (L, B, R) of logits (L, B, R, K) with labels (B,) or soft targets (B, K)."""
    L, B, R, K = logits.shape
    targets = targets[None, :, None].expand(L, B, R, *targets.shape[1:]).flatten(0, 2)  # (L*B*R,) or (L*B*R, K)
    return F.cross_entropy(logits.flatten(0, 2), targets, reduction="none", label_smoothing=smoothing).view(L, B, R)


# ------------------------------------------------------------------------------------------------ timm's augmentations


@contextlib.contextmanager
def seeded(*key: int):
    """timm draws from the global generators of Python, NumPy and PyTorch: in here these depend on `key` alone."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.random.default_generator.manual_seed(seed)
        yield
    random.setstate(python)
    np.random.set_state(numpy)


class RandAugmentLoader(ViewLoader):
    """A ViewLoader whose crops pass through timm's RandAugment, before the flip, in the workers: images in memory too."""

    def __init__(self, data: ImageData, views, batch_size: int, seed: int, device, num_workers: int, config: str, mean=MEAN, std=STD):
        super().__init__(data, views, batch_size, seed, device, num_workers, mean, std)
        self.in_workers, self.config = True, config
        # magnitudes stay just below 10: with -inc1 timm posterizes to 0 bits there, which Pillow refuses
        options = dict(translate_const=int(0.45 * views[0].size), img_mean=(124, 116, 104), magnitude_max=9.99)
        try:
            self.transform = rand_augment_transform(config, options)
        except (AssertionError, ValueError):
            raise InputError(f"--randaugment {config} is not understood: use such as rand-m9-mstd0.5-inc1, or none") from None

    def __getitem__(self, step: int) -> list[tuple[Tensor, Tensor]]:
        (crops, u), = super().__getitem__(step)  # (B, 3, S, S), (B, DRAWS)
        if crops.dtype != torch.uint8:  # of images in memory
            crops = (255 * crops).round().byte()
        for place, crop in enumerate(crops, self.rows.start):  # in the global batch
            with seeded(self.seed, step, 1002, place):
                try:
                    crop.copy_(tv.pil_to_tensor(self.transform(tv.to_pil_image(crop))))
                except ValueError as error:  # without -inc1, small magnitudes posterize to 0 bits
                    raise InputError(f"--randaugment {self.config} is too much for Pillow ({error}): add -inc1 to it") from None
        return [(crops, u)]


def erase(x: Tensor, erasing: RandomErasing, seed: int, step: int) -> Tensor:
    """timm's random erasing of this process's images (B, 3, S, S), in place."""
    for place, image in enumerate(x, local_rows(len(x) * world_size()).start):  # in the global batch
        with seeded(seed, step, 1003, place):
            erasing(image)
    return x


def mix(x: Tensor, labels: Tensor, mixup: Mixup, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """timm's Mixup or CutMix -> this process's images (B, 3, S, S) and soft targets (B, K).

    It pairs the first image with the last, and so on, so the images of all processes are brought together for it.
    """
    x, labels = gather(x), gather(labels)  # (W*B, 3, S, S), (W*B,)
    with seeded(seed, step, 1004):
        x, targets = mixup(x, labels)
    rows = local_rows(len(x))
    return x[rows], targets[rows]


# --------------------------------------------------------------------------------------------------- data, evaluation


def hold_out(data: ImageData, share: float, seed: int) -> tuple[ImageData, ImageData | None]:
    """-> the labelled images to learn from and, the same share of each class, those to choose by (None where share is 0)."""
    order = torch.from_numpy(np.random.default_rng([seed, 1005]).permutation(len(data)))
    order = order[data.labels[order] >= 0]
    order = order[data.labels[order].argsort(stable=True)]  # class after class, each in random order
    held = torch.from_numpy(np.diff(np.floor(np.arange(len(order) + 1) * share + 1e-9)) > 0)
    if share and not held.any():
        raise InputError(f"{len(order)} labelled training images are too few to hold out {share:g} of them: raise --holdout")
    return data.subset(order[~held].sort()[0]), data.subset(order[held].sort()[0]) if share else None


def labelled_data(args) -> tuple[ImageData, ImageData | None, ImageData]:
    """-> training, held-out and test images, all with labels."""
    train, test = load_data(args.data, args.data_path)
    if test is None or not (train.labelled and test.labelled):
        raise InputError(f"{args.data} has no labels on one side, and this evaluation learns from them: give it train/CLASS and "
                         f"val/CLASS folders, or use eval_knn.py --features")
    differ = [train.classes[i] for i in sorted({*train.labels.tolist()} ^ {*test.labels.tolist()}) if i >= 0]
    if differ:
        raise InputError(f"{args.data}: training and test images have different classes ({', '.join(map(str, differ[:3]))})")
    train, held = hold_out(train, args.holdout, args.seed)
    test, _ = hold_out(test, 0.0, args.seed)
    for name, data in {"held-out": held, "test": test}.items():
        if data and len(data) < world_size():
            raise InputError(f"{len(data)} {name} images are too few for {world_size()} processes")
    return train, held, test


@torch.no_grad()
def evaluate(predict, data: ImageData, meta: dict, device, args, name: str) -> Tensor:
    """predict: whole images (B, 3, H, W) -> logits (L, B, R, K). -> (3, L, R): top-1 and top-5 in per cent, and the loss."""
    mine, total = torch.arange(rank(), len(data), world_size()), 0  # the processes share the images
    batches = eval_batches(data, mine, meta["img_size"], device, EVAL_BATCH, args.num_workers, meta["mean"], meta["std"])
    with progress(total=len(data), desc=f"{name} images", unit="img", leave=False) as bar:
        for x, labels in zip(batches, data.labels[mine].to(device).split(EVAL_BATCH), strict=True):
            with autocast(device, args.dtype):
                logits = predict(x).float()
            hits = (logits.topk(min(5, logits.shape[-1])).indices == labels[:, None, None]).float()  # (L, B, R, 5)
            values = torch.stack([100 * hits[..., 0], 100 * hits.sum(-1), sample_losses(logits, labels)])  # (3, L, B, R)
            total = total + values.sum(2)
            bar.update(min(len(x) * world_size(), len(data) - bar.n))
    means = (mean_over_processes(total) * world_size() / len(data)).cpu()
    if not means.isfinite().all():
        sys.exit(log(f"stopped: the loss of the {name} images is not finite") or 1)
    return means


def best_rates(top1: Tensor, loss: Tensor, images: int) -> Tensor:
    """The rate (L,) of least loss (L, R) among those whose top-1 (L, R) is within a standard error of the layer's best.

    On few images top-1 is mostly luck and the loss decides, on many top-1.
    """
    best = top1.amax(1, keepdim=True)  # (L, 1) in per cent
    return torch.where(top1 >= best - (best * (100 - best) / images).sqrt(), loss, torch.inf).argmin(1)


def report(folder, rows: list[dict], grid: Tensor | None, args) -> None:
    """Prints the table and writes results.json; for several layers also the multi-exit curve."""
    log(f"{'layer':>6} {'lr':>8} {'val top-1 %':>12} {'test top-1 %':>13} {'test top-5 %':>13}")
    for row in rows:
        val = "-" if row["val_top1"] is None else f"{row['val_top1']:.2f}"
        log(f"{row['layer']:>6} {row['lr']:>8g} {val:>12} {row['test_top1']:13.2f} {row['test_top5']:13.2f}")
    if rank() > 0:
        return
    results = {"rows": rows, "val_top1_of_layers_and_rates": None if grid is None else grid[0].tolist(), "args": vars(args)}
    with replacing(folder / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")
    if len(rows) > 1:
        draw_multi_exit({folder.name: torch.tensor([[row["test_top1"] for row in rows]])}, folder / "multi_exit.png")


def draw_multi_exit(curves: dict[str, Tensor], path: Path) -> None:
    """Test top-1 over the layers: for each name (runs, L), the mean with a standard deviation about it."""
    figure, ((axis,),) = subplots(1, 1, 5, 3.5)
    for name, top1 in curves.items():
        spread = top1.std(0) if len(top1) > 1 else None
        axis.errorbar(range(1, top1.shape[1] + 1), top1.mean(0), spread, marker="o", capsize=3, label=name)
    axis.set(xlabel="layer", ylabel="top-1 of a linear probe (%)", xticks=range(1, top1.shape[1] + 1))
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def compare(folders: list[str], output_dir: Path) -> None:
    """Finished probes of all layers over each other: a table and multi_exit.png. Folders whose names differ by -SEED are one."""
    runs = {}
    for folder in map(Path, folders):
        try:
            top1 = [row["test_top1"] for row in json.loads((folder / "results.json").read_text())["rows"]]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{folder} has no results.json of a probe: make it with --layers all --output_dir {folder}") from None
        runs.setdefault(re.sub(r"-\d+$", "", str(folder)), []).append(top1)
    if len({len(run) for group in runs.values() for run in group}) > 1:
        raise InputError("--compare takes runs with the same number of layers, all probed with --layers all")
    distinct = len({Path(name).name for name in runs}) == len(runs)
    curves = {Path(name).name if distinct else name: torch.tensor(group) for name, group in runs.items()}  # (runs, L) each
    for name, top1 in curves.items():
        spread = top1.std(0) if len(top1) > 1 else torch.zeros(top1.shape[1])
        log(f"{name:<20} n = {len(top1)}   " + "   ".join(f"{m:.1f} +- {s:.1f}" for m, s in zip(top1.mean(0), spread, strict=True)))
    output_dir.mkdir(parents=True, exist_ok=True)
    draw_multi_exit(curves, output_dir / "multi_exit.png")


# ----------------------------------------------------------------------------------------------------------- training


def train(args, backbone: nn.Module, meta: dict, device, data: ImageData, held: ImageData | None,
          test: ImageData) -> list[dict]:
    """Both evaluations: probes of frozen features, or a classifier that brings its backbone along -> what `report` prints."""
    classes, scale, finetuned = len(data.classes), args.batch_size / 256, args.finetune is not None
    if finetuned:
        network = Classifier(backbone, args.pool, classes, args.finetune == "head").to(device)
        groups = layer_decay_groups(network, args.weight_decay, args.layer_decay)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=device.type != "mps")
        L, rates, peak_lr = 1, torch.ones(1, device=device), args.lr[0] * scale
        log("learning rates of the layers that learn, up to layer L+1: "
            + " ".join(f"{peak_lr * s:.1e}" for s in sorted({group["lr_scale"] for group in groups})))
    else:
        frozen = FrozenLayers(backbone, args.pool, args.layers == "all")
        dims = pooled_dims(backbone, args.pool, args.layers == "all")
        network = Probes(dims, len(args.lr), classes).to(device)
        optimizer = torch.optim.SGD(network.parameters(), momentum=0.9)
        # a probe's rate is the weight of its loss: SGD with momentum is linear in the gradient
        L, rates, peak_lr = len(dims), torch.tensor(args.lr, device=device), scale  # rates (R,)
    model = distributed(network)
    if args.compile:
        (network if finetuned else frozen).compile()
    scaler = torch.amp.GradScaler(device.type, enabled=finetuned and args.dtype == "fp16")
    mixup = Mixup(args.mixup, args.cutmix, prob=MIX_PROB, switch_prob=SWITCH_PROB, label_smoothing=args.smoothing,
                  num_classes=classes) if args.mixup or args.cutmix else None
    erasing = RandomErasing(args.erasing, mode="pixel", device="cpu") if args.erasing else None  # the same pixels on every device

    options = (data, [View(meta["img_size"], **args.views)], args.batch_size, args.seed, device, args.num_workers)
    colours = dict(mean=meta["mean"], std=meta["std"])
    loader = ViewLoader(*options, **colours) if args.randaugment in (None, "none") else (
        RandAugmentLoader(*options, args.randaugment, **colours))
    if args.cached:
        loader.steps = lambda start, stop: ((step, [None], loader.index(step)) for step in range(start, stop))
    method = dict(method="finetune", network="student") if finetuned else dict(method="linear", network=None)
    parts = {"student" if finetuned else "probes": network, "optimizer": optimizer, "scaler": scaler}
    run = Run(args, loader, {**meta, **method, "pool": args.pool}, **parts)
    lr = cosine_schedule(peak_lr, 0.0, run.total, warmup=int((args.warmup_epochs or 0) * loader.steps_per_epoch))

    cache = None
    if args.cached and run.start < run.stop:
        cache = extract_features(frozen, data, meta["img_size"], device, layers=True, dtype=args.dtype,
                                 num_workers=args.num_workers, mean=meta["mean"], std=meta["std"])  # L of (N, D_l)
        cache = [f.to(device) for f in cache]
        network.standardize_by(cache)

    for step, (x,), index in run.steps():  # x (B, 3, S, S)
        # schedules
        for group in optimizer.param_groups:
            group["lr"] = float(lr[step]) * group.get("lr_scale", 1.0)  # Eq. 7

        # images, erased and mixed
        index, targets = index.to(device), data.labels[index].to(device)  # (B,)
        if erasing:
            x = erase(x, erasing, args.seed, step)
        if mixup:
            x, targets = mix(x, targets, mixup, args.seed, step)  # (B, K), smoothed

        # the loss of every probe, or of the one classifier
        with autocast(device, args.dtype):
            inputs = x if finetuned else [f[index] for f in cache] if cache else frozen(x)  # for probes L of (B, D_l)
            logits = model(inputs)  # (L, B, R, K)
        losses = sample_losses(logits, targets, args.smoothing if finetuned and not mixup else 0.0).mean(1)  # (L, R)
        decay = 0.0 if finetuned else args.weight_decay * network.penalty()  # (L, R)
        loss = ((losses + decay) * rates).sum()

        # backward and step
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        # log: the mean over a layer's rates, and over all
        named = {f"loss_layer{l}": layer.mean() for l, layer in enumerate(losses.detach(), 1) if L > 1}
        named["loss"] = losses.detach().mean()
        run.end_step(step, named, lr=float(lr[step]) * (1.0 if finetuned else max(args.lr)))

    if run.stop < run.total:
        log(f"stopped by --max_steps after {run.stop} of {run.total} steps: the test images have not been looked at")
        return []
    network.eval()

    def predict(x):
        return network(x if finetuned else frozen(x))  # (L, B, R, K)

    grid = evaluate(predict, held, meta, device, args, "held-out") if held else None  # (3, L, R)
    choice = best_rates(grid[0], grid[2], len(held)) if held else torch.zeros(L, dtype=torch.long)  # (L,)
    chosen = torch.arange(L), slice(None), choice  # of (L, B, R, K): (L, B, K)
    tested = evaluate(lambda x: predict(x)[chosen][:, :, None], test, meta, device, args, "test")  # (3, L, 1)
    if held and len(args.lr) > 1 and {0, len(args.lr) - 1} & set(choice.tolist()):
        log("a chosen learning rate is at the edge of the grid: a wider --lr may do better")
    rows = [dict(layer=l + 1 if args.layers == "all" else "last", lr=args.lr[r], val_top1=grid[0, l, r].item() if held else None,
                 test_top1=tested[0, l, 0].item(), test_top5=tested[1, l, 0].item()) for l, r in enumerate(choice.tolist())]
    report(run.folder, rows, grid, args)
    return rows


# ---------------------------------------------------------------------------------------------------------- arguments


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    group = parser.add_argument_group("data")
    group.add_argument("--data", nargs="+", default=["digits"],
                       help=f"one or several of digits, {', '.join(DATASETS)}, or directories (default: digits)")
    group.add_argument("--data_path", default="data", help="where named data sets are, or are downloaded to (default: data)")
    group.add_argument("--img_size", type=at_least(1), help="side of the images in pixels (default: the checkpoint's, else 224)")
    group.add_argument("--holdout", type=at_least(0.0, 0.9), help="share of the training images to choose by (default: 0.1; 0 for one --lr)")
    add_checkpoint_arguments(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--layers", default="last", choices=["last", "all"], help="that are probed (default: %(default)s)")
    group.add_argument("--pool", choices=["cls", "mean", "both"], help="tokens (default: cls; for --finetune mean)")
    group.add_argument("--cached", action="store_true", help="make the features once, from whole images")
    group.add_argument("--compare", nargs="+", metavar="DIR", help="draw the multi-exit curves of these finished probes instead")
    group.add_argument("--finetune", choices=["all", "head"], help="with timm's augmentations: all layers, or the head alone")
    group = parser.add_argument_group("optimisation (defaults: recipe)")
    group.add_argument("--recipe", help="of which data set (default: by data and size)")
    group.add_argument("--epochs", type=at_least(1))
    group.add_argument("--batch_size", type=at_least(2), help="global, over all processes")
    group.add_argument("--lr", type=at_least(0.0), nargs="+", help="for a batch of 256; scaled linearly; for probes a grid")
    group.add_argument("--weight_decay", type=at_least(0.0), help="(default for probes: 1 / training images, scikit-learn's C = 1)")
    group.add_argument("--max_steps", type=at_least(1), help="stop here, without a test; schedules still span --epochs")
    group = parser.add_argument_group("fine-tuning (defaults: recipe)")
    group.add_argument("--warmup_epochs", type=at_least(0.0))
    group.add_argument("--layer_decay", type=at_least(0.01, 1.0), help="a layer's rate over that of the next one")
    group.add_argument("--mixup", type=at_least(0.0), help="alpha, 0 for none")
    group.add_argument("--cutmix", type=at_least(0.0), help="alpha, 0 for none")
    group.add_argument("--smoothing", type=at_least(0.0, 0.99), help="of the labels")
    group.add_argument("--erasing", type=at_least(0.0, 1.0), help="probability that a part of an image is erased")
    group.add_argument("--randaugment", help="timm's name, such as rand-m9-mstd0.5-inc1, or none")
    add_system_arguments(parser, None)
    args = parser.parse_args(argv)
    args.output_dir = args.output_dir or ("runs/finetune" if args.finetune else "runs/linear")
    return args


FINETUNING = ("warmup_epochs", "layer_decay", "mixup", "cutmix", "erasing", "smoothing", "randaugment")


def main():
    """Each data set by itself; of several, each in a folder of its own, and a table at the end (SDSSL's Table 4)."""
    args = parse_arguments()
    if args.compare:
        refuse_to_replace([Path(args.output_dir) / "multi_exit.png"], args.overwrite)
        return compare(args.compare, Path(args.output_dir))
    names = {data: Path(data).name or data for data in args.data}
    if len(set(names.values())) < len(args.data):
        raise InputError("two data sets of one name would share a folder: rename one")
    tables = {}
    for data, name in names.items():
        one = argparse.Namespace(**{**vars(args), "data": data})
        if len(names) > 1:
            one.output_dir = str(Path(args.output_dir) / name)
        tables[name] = evaluate_on(one)
    if len(tables) > 1 and all(tables.values()):
        log("\ntest top-1 in per cent\n" + " ".join(f"{column:>10}" for column in ["layer", *tables, "mean"]))
        for rows in zip(*tables.values(), strict=True):
            found = [row["test_top1"] for row in rows]
            log(f"{rows[0]['layer']:>10} " + " ".join(f"{value:10.2f}" for value in [*found, sum(found) / len(found)]))


def evaluate_on(args) -> list[dict]:
    """One data set -> a row of results for each layer; none where --max_steps stopped the run."""
    for name in FINETUNING:
        if getattr(args, name) is not None and not args.finetune:
            raise InputError(f"--{name} is for --finetune: probes have no augmentation but crops and flips")
    rates = len(args.lr or RATES[: 1 if args.finetune else None])
    if args.finetune and (args.layers == "all" or args.cached or rates > 1):
        raise InputError("--layers all, --cached and several --lr are for probes, not for --finetune")
    args.holdout = args.holdout if args.holdout is not None else 0.1 if rates > 1 else 0.0
    if rates > 1 and args.holdout == 0:
        raise InputError("--holdout 0 leaves no images to choose a learning rate by: pass a single --lr")

    device = setup(args)
    backbone, meta = load_backbone(args.checkpoint, args.arch, args.patch_size, args.img_size, args.network, args.num_heads)
    arch = meta["backbone"]["arch"]
    if args.pool in ("cls", "both") and not backbone.has_tokens:
        raise InputError(f"{arch} has no tokens, its stages are averaged: leave --pool out")
    args.pool = args.pool or ("mean" if args.finetune else "cls")
    data, held, test = labelled_data(args)
    apply_recipe(args, FINETUNE_RECIPES if args.finetune else PROBE_RECIPES, data)
    if isinstance(args.lr, dict):
        args.lr = args.lr[args.finetune]
    if args.weight_decay is None:
        args.weight_decay = 1 / len(data)
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        raise InputError(f"--batch_size {args.batch_size} is odd, and Mixup and CutMix pair the images: make it even")
    source = "timm's pretrained weights" if arch.startswith("timm/") else "random weights, for want of --checkpoint"
    log(f"{arch} with {args.checkpoint or source}, at {meta['img_size']} pixels; {len(held or [])} images held out, "
        f"{len(test)} test images")
    return train(args, backbone.to(device), meta, device, data, held, test)


if __name__ == "__main__":
    launch(main)
