"""Evaluations that train something on top of a backbone: linear probes of its layers, fine-tuning.

Probes (default). The backbone is frozen. Every layer's feature is standardised and goes to one
linear classifier for each learning rate of a grid. All layers and rates are one batched matmul on
one forward pass, so the grid costs next to nothing:

    crops -> backbone -> h_1 ... h_L -> BatchNorm without -> (L, B, D) @ (L, D, R*C) -> logits
             frozen      [CLS], mean    parameters: scale    R rates, C classes         (L, B, R, C)
                         or both        does not matter

Each probe has the L2 penalty of scikit-learn's logistic regression (C = 1: half the squared weights
over the number of images), and ends within a point of it. A tenth of the training images, the same
share of each class, is held out: by it each layer chooses its rate. Then the test images are looked
at, once. `--layers all` gives the multi-exit curve (SDSSL, Fig. 3). `--cached` makes every feature
once, from whole images.

Fine-tuning (`--finetune all` or `head`). Pooled tokens -> LayerNorm -> linear, AdamW, with timm's
Mixup, CutMix, RandAugment, random erasing and layer decay:

    lr_l = lr * d^(L+1-l)     layer 0: patch projection, [CLS], positions ...       d2v_kd, Eq. 7
                              layer L+1: norms and head

    python eval_linear.py --checkpoint runs/sdssl/checkpoint.pth --data digits --layers all
    python eval_linear.py --checkpoint runs/sdssl/checkpoint.pth --data digits --cached --pool both
    python eval_linear.py --checkpoint runs/sdssl/checkpoint.pth --data digits --finetune all
    python eval_linear.py --checkpoint FILE --data cifar10 pets DIR --finetune all    # one table
    python eval_linear.py --compare runs/a-0 runs/a-1 runs/b-0    # multi-exit curves, mean of seeds
    torchrun --nproc_per_node=8 eval_linear.py --checkpoint FILE --data DIR --layers all

--output_dir gets checkpoint.pth, log.jsonl, curves.png, results.json and, with --layers all,
multi_exit.png.

    probes               MoCo v3               DINO                  here
    feature              [CLS]                 [CLS] of last 4 or 1  [CLS], patch mean or both, of
                                                                     each layer
    before the linear    nothing               nothing               BatchNorm as MAE
    optimiser            SGD 0.9, batch 1024, 90 epochs              the same; DINO: 100 epochs
    weight decay         none                  none                  1 / images; --weight_decay 0
    learning rate        3 for ViTs            0.001                 a grid; for a batch of 256
    cosine               each epoch            each epoch            each step
    chosen               the epoch, by test    the epoch, by test    the rate, by held-out images

All random numbers are functions of (seed, step, place in the global batch), timm's too, so the
number of processes does not matter (timm's CNNs, whose BatchNorm is per process, are fine-tuned by
one). Crops are resized bilinearly, whole images bicubically, files to 256 / 224 of the side and
cut. The probe that is tested has not seen the images held out.

Symbols: B images of this process, M of the global batch, L layers, D width, R rates, C classes, S
side of an image.
"""
import argparse
import hashlib
import json
import math
import os
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
from timm.models import group_parameters
from timm.optim import auto_group_layers, param_groups_layer_decay
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from common import (DATASETS, BatchNorm, ImageData, InputError, Parser, Run, View, ViewLoader,
                    add_checkpoint_arguments, add_system_arguments, apply_recipe, at_least,
                    autocast, cosine_schedule, distributed, eval_batches, extract_features, fp32,
                    gather, launch, load_backbone, load_data, local_rows, log, mean_over_processes,
                    prepare_files, progress, rank, replacing, save_figure, setup, subplots,
                    to_device, world_size)

# -------------------------------------------------------------------------------------- recipes

RATES = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
WHOLE = dict(scale=(0.9, 1.0), flip=0.0)  # by trial: a digit that is cut or flipped is another one
PROBE_RECIPES = {
    "digits": dict(epochs=200, batch_size=128, views=WHOLE),
    "mnist": dict(epochs=20, batch_size=256, views=WHOLE),
    "cifar10": dict(epochs=90, batch_size=256, views=dict(scale=(0.3, 1.0))),
    "imagenet": dict(epochs=90, batch_size=1024, views=dict(scale=(0.08, 1.0))),  # MoCo v3
}
TIMM = dict(epochs=15, batch_size=256, warmup_epochs=1.5, lr=[1e-3], weight_decay=0.01,
            layer_decay=0.75, mixup=0.8, cutmix=1.0, smoothing=0.1,
            randaugment="rand-m9-mstd0.5-inc1", erasing=0.25)
GENTLE = TIMM | dict(lr=dict(all=[1e-3], head=[3e-2]), mixup=0.2, cutmix=0.0, randaugment="none",
                     erasing=0.0, views=WHOLE)
FINETUNE_RECIPES = {
    # by trial, and so is MNIST's
    "digits": GENTLE | dict(epochs=40, batch_size=128, warmup_epochs=4),
    "mnist": GENTLE | dict(epochs=10, warmup_epochs=1),
    # d2v_kd, which enlarges CIFAR to 224 pixels; the crops of 32 pixels are ours
    "cifar10": TIMM | dict(views=dict(scale=(0.3, 1.0))),
    # d2v_kd, for its 6 blocks: 0.81 is the root of the 0.65 that Data2Vec2 has for 12
    "imagenet": TIMM | dict(layer_decay=0.81, views=dict(scale=(0.08, 1.0))),
}
EVAL_BATCH = 256  # images per process when nothing is learnt
VECTORS = dict(cls=1, mean=1, both=2)  # of a pooled feature

# -------------------------------------------------------------------------- features and models

def pooled_layers(backbone: nn.Module, x: Tensor, pool: str, layers: bool) -> list[Tensor]:
    """Images (B, 3, S, S) -> features of all layers, or of the last one alone: a list of (B, D_l),
    each after the final norm."""
    # [CLS]: of timm's models their own output; ResNets have no tokens, a stage is averaged
    if pool == "cls" or not backbone.has_tokens:
        return backbone(x, layers=True) if layers else [backbone(x)]
    tokens = backbone.tokens(x, len(backbone.layer_dims) if layers else 1)
    if pool == "mean":
        return [patches.mean((1, 2)) for _, patches in tokens]  # (B, h, w, D) -> (B, D)
    return [torch.cat([cls, patches.mean((1, 2))], 1) for cls, patches in tokens]  # (B, 2 * D)


class FrozenLayers(nn.Module):
    """Images (B, 3, S, S) -> `pooled_layers` (B, L, D) of a backbone that stays as it is."""

    def __init__(self, backbone: nn.Module, pool: str, layers: bool):
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        self.pool = pool
        self.all_layers = layers
        self.width = VECTORS[pool] * backbone.embed_dim

    @torch.no_grad()
    def forward(self, x: Tensor, layers: bool = False) -> Tensor:
        features = pooled_layers(self.backbone, x, self.pool, self.all_layers)
        # narrower layers (a ResNet's lower stages) end in zeros, which add nothing to a probe
        return torch.stack([F.pad(f, (0, self.width - f.shape[1])) for f in features], 1)


class Probes(nn.Module):
    """Linear classifiers of L layers x R learning rates at once: features (B, L, D) -> logits
    (L, B, R, C), in fp32. Weights start as in MoCo v3, those of one layer alike."""

    def __init__(self, L: int, D: int, rates: int, classes: int):
        super().__init__()
        self.rates = rates
        self.norm = BatchNorm(L * D, eps=1e-6, affine=False)
        weight = 0.01 * torch.randn(L, D, classes)
        self.weight = nn.Parameter(weight.repeat(1, 1, rates))  # (L, D, R*C)
        self.bias = nn.Parameter(torch.zeros(L, 1, rates * classes))

    @fp32
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.flatten(1)).view_as(x).transpose(0, 1)  # (L, B, D)
        logits = torch.baddbmm(self.bias, x, self.weight)  # (L, B, R*C)
        return logits.unflatten(2, (self.rates, -1))  # (L, B, R, C)


class Classifier(nn.Module):
    """Backbone -> pooled tokens of the last layer -> LayerNorm -> linear. Logits (1, B, 1, C), as
    of one probe."""

    def __init__(self, backbone: nn.Module, pool: str, classes: int, head_only: bool):
        super().__init__()
        self.backbone = backbone.requires_grad_(not head_only)
        self.backbone.train(not head_only)  # a frozen one keeps its BatchNorm statistics
        self.pool = pool
        if pool != "cls" and backbone.has_tokens:
            # a timm model's own pooling, which its tokens go past
            for name, module in backbone.named_modules():
                if name in ("model.fc_norm", "model.attn_pool"):
                    module.requires_grad_(False)
        width = VECTORS[pool] * backbone.embed_dim
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        h, = pooled_layers(self.backbone, x, self.pool, layers=False)  # (B, D)
        return self.head(self.norm(h))[None, :, None]  # (1, B, 1, C)

    def group_matcher(self, coarse: bool = False):
        """For timm's layer decay: what says the layer of each name. Norms and head, which are in
        none of layers 0 to L, are layer L+1."""
        model = getattr(self.backbone, "model", None)
        if model is None:
            stem = "cls_token|pos_embed|patch_embed|norm_pre|conv1|bn1"
            return dict(stem=rf"backbone\.(?:{stem})", blocks=r"backbone\.(?:blocks\.|layer)(\d+)")
        if hasattr(model, "group_matcher"):
            layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
        else:
            layers = auto_group_layers(model)
        # without the norms, which timm counts to its last block
        layers = {f"backbone.model.{name}": layer for name, layer in layers.items()
                  if not name.startswith(("norm.", "fc_norm."))}
        return lambda name: layers.get(name, math.inf)


def layer_decay_groups(model: Classifier, weight_decay: float, decay: float) -> list[dict]:
    """Parameters that learn, by layer, with `lr_scale` d^(L+1-l) (Eq. 7); biases, norms, tokens
    and positions do not decay."""
    tokens = ["*cls_token", "*pos_embed", "*reg_token"]
    timm_model = getattr(model.backbone, "model", None)
    if hasattr(timm_model, "no_weight_decay"):
        tokens += [f"backbone.model.{name}" for name in timm_model.no_weight_decay()]
    return param_groups_layer_decay(model, weight_decay, no_weight_decay_list=tokens,
                                    layer_decay=decay)


@fp32
def sample_losses(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy (L, B, R) of logits (L, B, R, C) with labels (B,) or soft targets (B, C)."""
    L, B, R, _ = logits.shape
    # one row for each image of each probe: (L*B*R,) or (L*B*R, C)
    targets = targets[None, :, None].expand(L, B, R, *targets.shape[1:]).flatten(0, 2)
    losses = F.cross_entropy(logits.flatten(0, 2), targets, reduction="none",
                             label_smoothing=smoothing)
    return losses.view(L, B, R)


# ------------------------------------------------------------------ data, timm's augmentations

def seed_globals(*key: int) -> None:
    """Makes what timm draws next, from Python, NumPy and PyTorch, a function of `key` alone."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class RandAugmentLoader(ViewLoader):
    """A ViewLoader whose crops pass through timm's RandAugment, before the flip, in the workers:
    images in memory too."""

    def __init__(self, *settings, config: str):
        super().__init__(*settings)
        self.in_workers = True
        self.config = config
        # magnitudes stay just below 10: there -inc1 posterizes to 0 bits, which Pillow refuses
        limits = dict(translate_const=int(0.45 * self.views[0].size), magnitude_max=9.99,
                      img_mean=(124, 116, 104))
        try:
            self.transform = rand_augment_transform(config, limits)
        except (AssertionError, ValueError):
            raise InputError(f"--randaugment {config} is not understood: use such as "
                             f"rand-m9-mstd0.5-inc1, or none") from None

    def __getitem__(self, step: int) -> list[tuple[Tensor, Tensor]]:
        (crops, u), = super().__getitem__(step)  # (B, 3, S, S), (B, DRAWS)
        if crops.dtype != torch.uint8:  # of images in memory
            crops = (255 * crops).round().byte()
        for place, crop in enumerate(crops, self.rows.start):  # in the global batch
            seed_globals(self.seed, step, 1002, place)
            try:
                crop.copy_(tv.pil_to_tensor(self.transform(tv.to_pil_image(crop))))
            except ValueError as error:  # small magnitudes without -inc1: 0 bits again
                raise InputError(f"--randaugment {self.config} is too much for Pillow ({error}): "
                                 f"add -inc1 to it") from None
        return [(crops, u)]


def erase(x: Tensor, erasing: RandomErasing, seed: int, step: int) -> Tensor:
    """timm's random erasing of this process's images (B, 3, S, S), in place."""
    for place, image in enumerate(x, rank() * len(x)):  # in the global batch
        seed_globals(seed, step, 1003, place)
        erasing(image)
    return x


def mix(x: Tensor, labels: Tensor, mixup: Mixup, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """timm's Mixup or CutMix -> this process's images (B, 3, S, S) and soft targets (B, C). It
    pairs the first image of the global batch with the last, and so on."""
    x = gather(x)  # (M, 3, S, S)
    labels = gather(labels)  # (M,)
    seed_globals(seed, step, 1004)
    x, targets = mixup(x, labels)
    mine = local_rows(len(x))
    return x[mine], targets[mine]


def hold_out(data: ImageData, share: float, seed: int) -> tuple[ImageData, ImageData]:
    """-> the labelled images to learn from, and a share of each class to choose by."""
    order = torch.from_numpy(np.random.default_rng([seed, 1005]).permutation(len(data)))
    order = order[data.labels[order] >= 0]
    order = order[data.labels[order].argsort(stable=True)]  # class after class, each shuffled
    # one of every 1 / share images, where the running sum of the shares passes a whole number
    sums = np.floor(np.arange(len(order) + 1) * share + 1e-9)
    held = torch.from_numpy(np.diff(sums) > 0)  # (n,)
    left = order[~held]
    emptied = len(data.labels[left].unique()) < len(data.labels[order].unique())
    if emptied or (share and not held.any()):
        raise InputError(f"{len(order)} labelled training images are too few to hold out {share:g} "
                         f"of them and keep some of each class: change --holdout")
    return data.subset(left.sort().values), data.subset(order[held].sort().values)


# ------------------------------------------------------------------------------------- training

def train_probes(args, backbone, loader: ViewLoader, meta: dict) -> tuple[Run, nn.Module]:
    """Probes of frozen features -> the run, and the backbone with its probes."""
    # networks
    data = loader.data
    device = loader.device
    frozen = FrozenLayers(backbone, args.pool, args.layers == "all")
    L = len(backbone.layer_dims) if args.layers == "all" else 1
    probes = Probes(L, frozen.width, len(args.lr), len(data.classes)).to(device)
    model = distributed(probes)
    if args.compile:
        frozen.compile()
    optimizer = torch.optim.SGD(probes.parameters(), momentum=0.9)
    # a probe's rate is the weight of its loss: SGD with momentum is linear in the gradient
    rates = torch.tensor(args.lr, device=device)  # (R,)

    # the run
    meta = {**meta, "pool": args.pool, "method": "linear", "network": None}
    run = Run(args, loader, meta, probes=probes, optimizer=optimizer)
    lr = cosine_schedule(args.batch_size / 256, 0.0, run.total)
    if args.cached and run.start < run.stop:
        cache, = extract_features(frozen, data, meta["img_size"], device, dtype=args.dtype,
                                  num_workers=args.num_workers, mean=meta["mean"], std=meta["std"])
        cache = cache.to(device)  # (n, L, D)
        # mean and variance of all images in place of each batch's
        variance, mean = torch.var_mean(cache.flatten(1), 0)  # (L*D,) each
        probes.norm.running_var.copy_(variance)
        probes.norm.running_mean.copy_(mean)
        probes.norm.eval()

    for step, views, index in run.steps():  # a view (B, 3, S, S), but of cached features
        # schedule
        for group in optimizer.param_groups:
            group["lr"] = float(lr[step])

        # features of the layers, without gradient
        labels = to_device(data.labels[index], device)  # (B,)
        if args.cached:
            features = cache[to_device(index, device)]  # (B, L, D)
        else:
            with autocast(device, args.dtype):
                features = frozen(views[0])

        # losses of the probes
        logits = model(features)  # (L, B, R, C)
        losses = sample_losses(logits, labels).mean(1)  # (L, R)
        squares = probes.weight.unflatten(2, (len(rates), -1)).pow(2).sum((1, 3))  # (L, R)
        loss = ((losses + args.weight_decay * squares / 2) * rates).sum()

        # backward and step
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        # log, check and save, where it is due: the mean over a layer's rates, and over all
        logged = {}
        if L > 1:
            logged = {f"loss_layer{l}": layer.mean() for l, layer in enumerate(losses, 1)}
        logged["loss"] = losses.mean()
        run.end_step(step, logged, lr=float(lr[step]) * max(args.lr))
    return run, nn.Sequential(frozen, probes)


def finetune(args, backbone, loader: ViewLoader, meta: dict) -> tuple[Run, nn.Module]:
    """A classifier that brings its backbone along -> the run, and the classifier."""
    # networks
    data = loader.data
    device = loader.device
    C = len(data.classes)
    student = Classifier(backbone, args.pool, C, args.finetune == "head").to(device)
    model = distributed(student)
    if args.compile:
        student.compile()
    groups = layer_decay_groups(student, args.weight_decay, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")
    peak_lr = args.lr[0] * args.batch_size / 256
    scales = sorted({group["lr_scale"] for group in groups})
    log("learning rates of the layers that learn, up to layer L+1: "
        + " ".join(f"{peak_lr * scale:.1e}" for scale in scales))

    # augmentations
    mixup = Mixup(args.mixup, args.cutmix, prob=0.9, switch_prob=0.5,  # d2v_kd
                  label_smoothing=args.smoothing, num_classes=C)
    # drawn on the CPU: the same pixels on every device
    erasing = RandomErasing(args.erasing, mode="pixel", device="cpu")

    # the run
    meta = {**meta, "pool": args.pool, "method": "finetune", "network": "student"}
    run = Run(args, loader, meta, student=student, optimizer=optimizer, scaler=scaler)
    warmup = int(args.warmup_epochs * run.steps_per_epoch)
    lr = cosine_schedule(peak_lr, 0.0, run.total, warmup)

    for step, (x,), index in run.steps():  # one view (B, 3, S, S)
        # schedules
        for group in optimizer.param_groups:
            group["lr"] = float(lr[step]) * group["lr_scale"]  # Eq. 7

        # images, erased and mixed
        targets = to_device(data.labels[index], device)  # (B,)
        smoothing = args.smoothing
        if args.erasing:
            x = erase(x, erasing, args.seed, step)
        if args.mixup or args.cutmix:
            x, targets = mix(x, targets, mixup, args.seed, step)  # (B, C), smoothed
            smoothing = 0.0

        # loss
        with autocast(device, args.dtype):
            logits = model(x)  # (1, B, 1, C)
        loss = sample_losses(logits, targets, smoothing).mean()

        # backward and step
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        # log, check and save, where it is due
        run.end_step(step, {"loss": loss}, lr=float(lr[step]))
    return run, student


# ------------------------------------------------------------------------------------- accuracy

@torch.no_grad()
def evaluate(run: Run, network: nn.Module, data: ImageData, name: str) -> Tensor:
    """Whole images through a network with logits (L, B, R, C) -> (3, L, R): top-1 and top-5 in per
    cent, and the loss."""
    loader = run.loader
    # the processes share the images; where they do not divide, the first come again, uncounted
    share = math.ceil(len(data) / world_size())
    places = torch.arange(rank(), share * world_size(), world_size())
    mine = places % len(data)
    counted = (places < len(data)).to(loader.device)[:, None].split(EVAL_BATCH)  # of (B, 1)
    batches = eval_batches(data, mine, run.meta["img_size"], loader.device, EVAL_BATCH,
                           loader.num_workers, loader.mean, loader.std)
    labels_of_batches = data.labels[mine].to(loader.device).split(EVAL_BATCH)
    total = 0
    bar = progress(batches, total=len(labels_of_batches), desc=f"{name} images", leave=False)
    for x, labels, once in zip(bar, labels_of_batches, counted, strict=True):
        with autocast(loader.device, run.args.dtype):
            logits = network(x).float()  # (L, B, R, C)
        best = logits.topk(min(5, logits.shape[-1])).indices  # (L, B, R, 5)
        hits = 100.0 * (best == labels[:, None, None])
        values = [hits[..., 0], hits.sum(-1), sample_losses(logits, labels)]  # (L, B, R) each
        total = total + (torch.stack(values) * once).sum(2)  # (3, L, R)
    means = (mean_over_processes(total) * world_size() / len(data)).cpu()
    if not means.isfinite().all():
        log(f"stopped: the loss of the {name} images is not finite")
        sys.exit(1)
    return means


def best_rates(top1: Tensor, loss: Tensor, images: int) -> Tensor:
    """The rate (L,) of least loss (L, R) among those whose top-1 (L, R) is within a standard error
    of the layer's best: on few images top-1 is mostly luck and the loss decides, on many top-1."""
    best = top1.amax(1, keepdim=True)  # (L, 1) in per cent
    error = (best * (100 - best) / images).sqrt()
    return torch.where(top1 >= best - error, loss, torch.inf).argmin(1)


def choose_and_test(run: Run, network: nn.Module, held: ImageData, test: ImageData) -> list[dict]:
    """Chooses each layer's rate by the held-out images, then looks at the test images, once. Prints
    and writes a row for each layer, and returns them."""
    args = run.args
    done = max(run.start, run.stop)
    if done < run.total:
        log(f"stopped by --max_steps after {done} of {run.total} steps: the test images have not "
            f"been looked at")
        return []
    network.eval()
    if held:
        val, _, loss = evaluate(run, network, held, "held-out")  # (L, R) each
        grid = val.tolist()
        choice = best_rates(val, loss, len(held)).tolist()
        if len(args.lr) > 1 and {0, len(args.lr) - 1} & set(choice):
            log("a chosen learning rate is at the edge of the grid: a wider --lr may do better")
    top1, top5, _ = evaluate(run, network, test, "test").tolist()  # L of R each
    if not held:  # there is one rate
        grid = [[None]] * len(top1)
        choice = [0] * len(top1)
    # the table, printed and as a file
    log(f"{'layer':>6} {'lr':>8} {'val top-1 %':>12} {'test top-1 %':>13} {'test top-5 %':>13}")
    rows = []
    for l, r in enumerate(choice):
        row = dict(layer=l + 1 if args.layers == "all" else "last", lr=args.lr[r],
                   val_top1=grid[l][r], test_top1=top1[l][r], test_top5=top5[l][r])
        rows.append(row)
        shown = f"{row['val_top1']:.2f}" if held else "-"
        log(f"{row['layer']:>6} {row['lr']:>8g} {shown:>12} {row['test_top1']:13.2f} "
            f"{row['test_top5']:13.2f}")
    if rank() == 0:
        results = {"rows": rows, "val_top1_of_layers_and_rates": grid, "args": vars(args)}
        with replacing(run.folder / "results.json") as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")
        if len(rows) > 1:
            compare([run.folder], run.folder)
    return rows


# ------------------------------------------------------------------------------------ arguments

def parse_arguments(argv=None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", default=["digits"],
        help=f"digits, {', '.join(DATASETS)}, or directories; one or several (default: digits)")
    add("--data_path", default="data", help="folder of named data sets (default: data)")
    add("--img_size", type=at_least(1), help="side in pixels (default: the checkpoint's, else 224)")
    add("--holdout", type=at_least(0.0, 0.9), help="share to choose by (0.1; for one --lr 0)")
    add_checkpoint_arguments(parser)
    add = parser.add_argument_group("evaluation").add_argument
    add("--layers", default="last", choices=["last", "all"], help="layers to probe (default: last)")
    add("--pool", choices=["cls", "mean", "both"], help="tokens (cls; for --finetune mean)")
    add("--cached", action="store_true", help="features made once, from whole images")
    add("--compare", nargs="+", metavar="DIR", help="multi-exit curves of finished probes instead")
    add("--finetune", choices=["all", "head"], help="all layers, or the head alone")
    add = parser.add_argument_group("optimisation (defaults: recipe)").add_argument
    add("--recipe", help="the data set whose recipe is used (default: by data and size)")
    add("--epochs", type=at_least(1))
    add("--batch_size", type=at_least(2), help="global, over all processes")
    add("--lr", type=at_least(0.0), nargs="+", help="for a batch of 256; for probes a grid")
    add("--weight_decay", type=at_least(0.0), help="(for probes: 1 / images, scikit-learn's C = 1)")
    add("--max_steps", type=at_least(1), help="early end, without a test")
    add = parser.add_argument_group("fine-tuning (defaults: recipe)").add_argument
    add("--warmup_epochs", type=at_least(0.0))
    add("--layer_decay", type=at_least(0.01, 1.0), help="a layer's rate over that of the next one")
    add("--mixup", type=at_least(0.0), help="alpha, 0 for none")
    add("--cutmix", type=at_least(0.0), help="alpha, 0 for none")
    add("--smoothing", type=at_least(0.0, 0.99), help="of the labels")
    add("--erasing", type=at_least(0.0, 1.0), help="probability that a part is erased")
    add("--randaugment", help="timm's name, such as rand-m9-mstd0.5-inc1, or none")
    add_system_arguments(parser, "runs/linear, or runs/finetune")
    parser.set_defaults(output_dir=None)
    args = parser.parse_args(argv)
    if args.output_dir is None:
        args.output_dir = "runs/finetune" if args.finetune else "runs/linear"
    return args


def check_flags(args) -> None:
    """Refuses flags of the other evaluation; fills in --holdout and the probes' --lr."""
    if not args.finetune:
        for name in ("warmup_epochs", "layer_decay", "mixup", "cutmix", "erasing", "smoothing",
                     "randaugment"):
            if getattr(args, name) is not None:
                raise InputError(f"--{name} is for --finetune: probes have no augmentation but "
                                 f"crops and flips")
        args.lr = args.lr or RATES
    several = args.lr is not None and len(args.lr) > 1
    if args.finetune and (args.layers == "all" or args.cached or several):
        raise InputError("--layers all, --cached and several --lr are for probes, not for "
                         "--finetune")
    if args.holdout is None:
        args.holdout = 0.1 if several else 0.0
    if several and args.holdout == 0:
        raise InputError("--holdout 0 leaves no images to choose a learning rate by: pass a single "
                         "--lr")


def evaluate_on(args, data: ImageData, test: ImageData | None) -> list[dict]:
    """One data set -> a row of results for each layer; none where --max_steps stopped the run."""
    device = setup(args)
    folder = Path(args.output_dir)
    if not (folder / "checkpoint.pth").is_file():  # of another evaluation, perhaps
        prepare_files([folder / "results.json", folder / "multi_exit.png"], args.overwrite)
    # the network
    backbone, meta = load_backbone(args.checkpoint, args.arch, args.patch_size, args.img_size,
                                   args.network, args.num_heads)
    digest = hashlib.sha256()
    for value in backbone.state_dict().values():
        digest.update(value.contiguous().numpy())
    args.weights = digest.hexdigest()[:16]  # a run that is resumed must have the same
    if args.pool is None:
        args.pool = "mean" if args.finetune else "cls"
    elif args.pool != "mean" and not backbone.has_tokens:
        raise InputError(f"{meta['backbone']['arch']} has no tokens, its stages are averaged: "
                         f"leave --pool out")

    # the images, all with labels
    if test is None or not (data.labelled and test.labelled):
        raise InputError(f"{args.data} has no labels on one side, and this evaluation learns from "
                         f"them: give it train/CLASS and val/CLASS folders, or use eval_knn.py "
                         f"--features")
    differing = sorted({*data.labels.tolist()} ^ {*test.labels.tolist()})
    names = [str(data.classes[i]) for i in differing if i >= 0]
    if names:
        raise InputError(f"{args.data}: training and test images have different classes "
                         f"({', '.join(names[:3])})")
    data, held = hold_out(data, args.holdout, args.seed)
    test, _ = hold_out(test, 0.0, args.seed)

    # the recipe, that of the size which is trained at
    args.img_size = meta["img_size"]
    apply_recipe(args, FINETUNE_RECIPES if args.finetune else PROBE_RECIPES, data)
    if isinstance(args.lr, dict):
        args.lr = args.lr[args.finetune]
    if args.weight_decay is None:
        args.weight_decay = 1 / len(data)
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        raise InputError(f"--batch_size {args.batch_size} is odd, and Mixup and CutMix pair the "
                         f"images: make it even")
    log(f"{len(held)} images held out, {len(test)} test images")

    views = [View(meta["img_size"], **args.views)]
    if args.cached:
        views = []  # the steps say which images they have, and make nothing of them
    settings = (data, views, args.batch_size, args.seed, device, args.num_workers, meta["mean"],
                meta["std"])
    if args.randaugment in (None, "none"):
        loader = ViewLoader(*settings)
    else:
        loader = RandAugmentLoader(*settings, config=args.randaugment)
    train = finetune if args.finetune else train_probes
    run, network = train(args, backbone.to(device), loader, meta)
    return choose_and_test(run, network, held, test)


def main() -> None:
    """Each data set by itself; of several, each in a folder of its own, and a table at the end
    (SDSSL's Table 4)."""
    args = parse_arguments()
    if args.compare:
        prepare_files([Path(args.output_dir) / "multi_exit.png"], args.overwrite)
        log("\n".join(compare(args.compare, Path(args.output_dir))))
        return
    names = {data: Path(data).name or data for data in args.data}
    if len(set(names.values())) < len(args.data):
        raise InputError("two data sets of one name would share a folder: rename one")
    check_flags(args)
    setup(args)
    splits = {data: load_data(data, args.data_path) for data in names}  # all, before the work
    tables = {}
    for data, name in names.items():
        one = argparse.Namespace(**{**vars(args), "data": data})
        if len(names) > 1:
            one.output_dir = str(Path(args.output_dir) / name)
        tables[name] = evaluate_on(one, *splits[data])
    if len(tables) > 1 and all(tables.values()):
        columns = ["layer", *tables, "mean"]
        log("\ntest top-1 in per cent\n" + " ".join(f"{column:>10}" for column in columns))
        for rows in zip(*tables.values(), strict=True):
            top1 = [row["test_top1"] for row in rows]
            values = [*top1, sum(top1) / len(top1)]
            log(f"{rows[0]['layer']:>10} " + " ".join(f"{value:10.2f}" for value in values))


# --------------------------------------------------------------------------- multi-exit curves

def compare(folders: list, output_dir: Path) -> list[str]:
    """Draws test top-1 over the layers of finished probes: the mean of the runs whose folders
    differ by -SEED alone, with their standard deviation. -> the same as text, a line for each
    curve."""
    curves = {}
    for folder in map(Path, folders):
        try:
            rows = json.loads((folder / "results.json").read_text())["rows"]
            top1 = [row["test_top1"] for row in rows]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{folder} has no results.json of a probe: make it with --layers all "
                             f"--output_dir {folder}") from None
        name = re.sub(r"-\d+$", "", os.path.abspath(folder))
        curves.setdefault(name, []).append(top1)
    if len({len(top1) for runs in curves.values() for top1 in runs}) > 1:
        raise InputError("--compare takes runs with the same number of layers, all probed with "
                         "--layers all")
    # a curve is named by what its folder does not share with the others'
    parent = os.path.commonpath([os.path.dirname(name) for name in curves])
    curves = {os.path.relpath(name, parent): runs for name, runs in curves.items()}
    figure, ((axis,),) = subplots(1, 1, 5, 3.5)
    lines = []
    for name, runs in curves.items():
        top1 = torch.tensor(runs)  # (runs, L)
        layers = range(1, top1.shape[1] + 1)
        means = top1.mean(0).tolist()
        deviations = top1.std(0, correction=min(len(top1) - 1, 1)).tolist()  # 0 of a single run
        axis.errorbar(layers, means, deviations, marker="o", capsize=3, label=name)
        cells = [f"{a:.1f} +- {b:.1f}" for a, b in zip(means, deviations, strict=True)]
        lines.append(f"{name:<20} n = {len(top1)}   " + "   ".join(cells))
    axis.set(xlabel="layer", ylabel="top-1 of a linear probe (%)", xticks=layers)
    axis.legend(fontsize=8)
    save_figure(figure, output_dir / "multi_exit.png")
    return lines


if __name__ == "__main__":
    launch(main)
