"""Evaluations of a frozen backbone that train nothing: k-NN, retrieval, copy detection, video.

    --task knn        image -> backbone -> [CLS] (D,) -> cosines -> the k nearest training images
                      vote for its class with weights exp(cos / T), as in DINO and Wu et al.
                      Several --data: transfer (Table 4)
    --task retrieval  image -> backbone -> [CLS] (D,) -> (whitening) -> cosines: photographs of
                      the same building in revisited Oxford and Paris (Table 2)
    --task copy       image -> backbone -> [CLS] and GeM of its patch tokens (2 * D,) ->
                      (whitening) -> cosines: what was printed, scanned, cut or painted over in
                      Copydays "strong" (Table 3, Fig. 4)
    --task video      frame -> backbone -> patch tokens (h, w, D) -> cosines with those of the
                      first frame and the 7 before, at most 12 patches away -> the 5 nearest lend
                      their labels with weights softmax(cos / T): DAVIS 2017 (Table 3, Fig. 4)

Tables and figures are SDSSL's. With `--layers all` every block's tokens go through the final norm,
in one pass over the data. ResNets, whose stages are averaged, do knn and retrieval.

    python eval_knn.py --checkpoint runs/sdssl/checkpoint.pth --data digits --layers all
    python eval_knn.py --arch vit_small --patch_size 16 --checkpoint dino.pth --data DIR
    torchrun --nproc_per_node=8 eval_knn.py --arch timm/vit_small_patch16_224.dino --data DIR
    python eval_knn.py --checkpoint FILE --data DIR --features features.pth
    python eval_knn.py --checkpoint FILE --data cifar10 flowers102 pets DIR
    python eval_knn.py --checkpoint FILE --task retrieval --data roxford5k rparis6k
    python eval_knn.py --checkpoint FILE --task copy --data copydays --distractors DIR \
        --whitening DIR --layers all
    python eval_knn.py --checkpoint FILE --task video --data DAVIS --layers all --compare runs/other

All tasks but knn write results.json into --output_dir, with `--layers all` also the curve of Fig. 4
(layers.png). video adds masks/ for DAVIS's own evaluation, and overlays/, the same over the frames.
--features writes for each split ("train", "test") a dict of `features` (n, D), with `--layers all`
L of them; `paths`, or for data sets in memory the rows (n,); `labels` (n,), -1 where unknown; and
`classes`, the labels' names.

    what                 DINO's release, as SDSSL              here
    retrieval: query     the photograph                        its box, at the photograph's scale,
                                                               as the benchmark has it
    retrieval: scales    1, or 3 by a flag; 224 or 512 pixels  3; 512 pixels
    copy: whitening      covariance not centred; variances     centred; directions under 1e-5 of
                         raised to 1e-5 of the largest         the largest variance left out
    copy: AP             of the first 20                       of the ranking of all
    resizing             Lanczos; frames: OpenCV's bilinear    antialiased bicubic
    k-NN: top-5          counts classes without votes          does not
    video: frames        480 x 854 become 480 x 832 (of 64)    480 x 848 for patches of 16
    video: masks         argmax at whole patches, nearest      argmax at the frame
    video: ties          all that tie with the fifth           five
    video: normalised    red by 0.228                          by 0.229, as everywhere
    positions of         scale factor (n + 0.1) / m            the same for bare weights; timm/NAME
    another grid                                               as timm; our checkpoint.pth exactly

Symbols: B images of this process, L layers, h x w patches, D width, C classes, S side.
"""
import argparse
import functools
import json
import math
import pickle
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.neighbors import KDTree
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as tv

from common import (CORES, DATASETS, InputError, Parser, add_checkpoint_arguments, at_least,
                    autocast, check_data, extract_features, find_images, fp32, knn_classifier,
                    launch, load_backbone, load_data, log, mean_over_processes, one_line,
                    outlive_signals, path_name, prepare_files, progress, rank, read_image,
                    replacing, save_figure, save_file, setup, subplots, world_size)

TASKS = {  # their settings, DINO's by default; flags of other tasks are refused
    "knn": dict(img_size=None, batch_size=256, k=[10, 20, 100, 200], temperature=0.07,
                features=None),
    "retrieval": dict(img_size=512, batch_size=16, scales=[1.0, 0.7071, 0.5], whitening=None,
                      distractors=None),
    "copy": dict(img_size=320, batch_size=16, scales=[1.0], whitening=None, distractors=None),
    "video": dict(img_size=480, k=[5], temperature=0.1, context=7, neighbourhood=12, split="val"),
}
METRICS = {  # the first is the one that is drawn and compared
    "knn": ["top-1", "top-5"],
    "retrieval": ["mAP", "mP@1", "mP@5", "mP@10"],
    "copy": ["mAP", "mP@1", "mP@5", "mP@10"],
    "video": ["J&F", "J", "F"],
}

# ------------------------------------------------------------------------------------------ k-NN

def knn(data: str, backbone, meta: dict, device, args) -> list[dict]:
    """Top-1 and top-5 in per cent, a row for each layer and k; none without labels."""
    # images
    train, test = load_data(data, args.data_path)
    labelled = test is not None and train.labelled and test.labelled
    if not (labelled or args.features):
        raise InputError(f"k-NN needs labels on both sides: give {data} train/CLASS and val/CLASS "
                         f"folders, or pass --features FILE")
    splits = {"train": train}
    if test is not None:
        splits["test"] = test
    sizes = ", ".join(f"{len(part)} {name} images" for name, part in splits.items())
    log(f"{data}: {sizes}, {len(train.classes)} classes")

    # features, saved where that is asked for
    splits = {name: split_features(part, backbone, meta, device, args)
              for name, part in splits.items()}
    if args.features:
        if rank() == 0:
            save_file(splits, Path(args.features))
        log(f"features saved in {args.features}")
    if not labelled:
        log("k-NN skipped: it needs labels in a training and a test split")
        return []

    # images without a label have no vote and are not asked
    train, test = splits.values()
    known = train["labels"] >= 0
    asked = test["labels"] >= 0
    labels = train["labels"][known].to(device)  # (n,)
    test_labels = test["labels"][asked].to(device)
    C = len(train["classes"])
    log(f"k-NN of {len(test_labels)} test among {len(labels)} training images, {C} classes, "
        f"T = {args.temperature}")

    # accuracies of each layer, or of the last one alone
    layers = [(train["features"], test["features"])]
    if args.layers == "all":
        layers = zip(train["features"], test["features"], strict=True)
    rows = []
    for layer, (bank, queries) in enumerate(layers, 1):
        bank = bank[known].to(device)  # (n, D)
        queries = queries[asked].to(device)
        for k in args.k:
            top1, top5 = top1_top5(bank, labels, queries, test_labels, k, args.temperature, C)
            rows.append({"layer": layer, "setup": str(k), "top-1": top1, "top-5": top5})
    return rows


def split_features(data, backbone, meta: dict, device, args) -> dict:
    """Features, labels, paths and classes of one split, as --features saves them."""
    if not args.features:
        data = data.subset((data.labels >= 0).nonzero()[:, 0])  # the others have no vote
    features = extract_features(
        backbone, data, meta["img_size"], device, layers=args.layers == "all", dtype=args.dtype,
        batch_size=args.batch_size, num_workers=args.num_workers, mean=meta["mean"],
        std=meta["std"])  # one or L of (n, D)
    if args.layers == "last":
        features = features[0]
    paths = data.paths or torch.arange(len(data))
    return {
        "features": features,
        "labels": data.labels,
        "paths": paths,
        "classes": data.classes,
    }


def top1_top5(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int,
              temperature: float, num_classes: int) -> tuple[float, float]:
    """Top-1 and top-5 of the votes in per cent. The processes share the queries."""
    mine = slice(rank(), None, world_size())
    chunk = max(1, 2**27 // len(train))  # 512 MiB of cosines at a time
    scores = knn_classifier(train, train_labels, test[mine], k, temperature, num_classes, chunk)
    votes, ranked = scores.topk(min(5, num_classes), dim=1)  # (n, C) -> (n, 5) each
    hits = (ranked == test_labels[mine, None]) & (votes > 0)  # no hit without a vote
    counts = torch.stack([hits[:, 0].sum(), hits.sum()]).float()  # (2,)
    top1, top5 = (100 * mean_over_processes(counts) * world_size() / len(test)).tolist()
    return top1, top5


# ----------------------------------------------------------------------- descriptors of photographs

def read_photographs(files: list, task: str, size: int, patch: int) -> list[Tensor]:
    """Files (path, box) as uint8 (3, H, W), resized bicubically to multiples of `patch`.

    A box is (left, top, right, bottom), or None for the whole image, whose scale it keeps. `size`
    is both sides of copies, the shorter one of videos, and the most of any side for retrieval.
    """
    images = []
    for path, box in files:
        image = read_image(path)  # (3, H, W)
        H, W = image.shape[1:]
        scale = size / min(H, W)
        if task == "retrieval":
            scale = min(1.0, size / max(H, W))
        if box:
            left, top, right, bottom = box
            image = image[:, max(top, 0) : bottom, max(left, 0) : right]
        sides = [round(scale * length) for length in image.shape[1:]]
        if task == "copy":
            sides = [size, size]
        # whole patches, one at least
        sides = [max(length // patch, 1) * patch for length in sides]
        images.append(tv.resize(image, sides, tv.InterpolationMode.BICUBIC, antialias=True))
    return images


def layers_of(backbone, args) -> int:
    """The number of layers, from the last one back."""
    return len(backbone.layer_dims) if args.layers == "all" else 1


def photographs(files: list, rows: range, batch_size: int, backbone, meta: dict, device, args):
    """Yields the files of these rows as (rows, normalised images (B, 3, H, W)) of one size each."""
    read = functools.partial(read_photographs, task=args.task, size=args.img_size,
                             patch=backbone.patch_size)
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    loader = DataLoader(files, batch_sampler=batches, num_workers=args.num_workers,
                        collate_fn=read, worker_init_fn=outlive_signals)
    with progress(total=len(rows), desc=args.task, unit="img", leave=False) as bar:
        for batch, images in zip(batches, loader, strict=True):
            for shape in {image.shape for image in images}:  # those of one size go together
                places = [i for i, image in zip(batch, images, strict=True) if image.shape == shape]
                alike = [image for image in images if image.shape == shape]
                x = torch.stack(alike).to(device).float() / 255  # (B, 3, H, W)
                yield places, tv.normalize(x, meta["mean"], meta["std"])
            bar.update(len(images))


def gem(patches: Tensor, p: float = 4.0, eps: float = 1e-6) -> Tensor:
    """Generalised mean of patch tokens (B, h, w, D) -> (B, D)."""
    return patches.float().clamp(min=eps).pow(p).mean((1, 2)).pow(1 / p)


def describe(backbone, x: Tensor, args) -> list[Tensor]:
    """Images (B, 3, H, W) -> features (B, D), of copies (B, 2 * D), of all layers or the last,
    averaged over the scales."""
    patch = backbone.patch_size
    of_scales = []
    for scale in args.scales:
        size = [max(int(scale * side) // patch, 1) * patch for side in x.shape[2:]]
        y = F.interpolate(x, size, mode="bilinear")
        with autocast(x.device, args.dtype):
            if args.task == "copy":
                tokens = backbone.tokens(y, layers_of(backbone, args))
                features = [torch.cat([cls, gem(patches)], 1) for cls, patches in tokens]
            elif args.layers == "all":
                features = backbone(y, layers=True)
            else:
                features = [backbone(y)]
        of_scales.append(features)
    return [torch.stack(scales).float().mean(0) for scales in zip(*of_scales, strict=True)]


def descriptors(backbone, files: list, meta: dict, device, args) -> list[Tensor]:
    """`describe` of n files: (n, D) of each layer, on the CPU. The processes share the work."""
    widths = backbone.layer_dims[-layers_of(backbone, args) :]
    if args.task == "copy":
        widths = [2 * D for D in widths]
    layers = [torch.zeros(len(files), D) for D in widths]  # L of (n, D)
    mine = range(rank(), len(files), world_size())
    for rows, x in photographs(files, mine, args.batch_size, backbone, meta, device, args):
        for layer, features in zip(layers, describe(backbone, x, args), strict=True):
            layer[rows] = features.cpu()
    # the rows of other processes are 0 here
    sums = [mean_over_processes(layer.to(device)) * world_size() for layer in layers]
    return [layer.cpu() for layer in sums]


# ------------------------------------------------------------------ retrieval and copy detection

def search(data: str, backbone, meta: dict, device, args) -> list[dict]:
    """mAP and mP@k in per cent, a row for each layer and setup."""
    # images, and for each query which of them are right
    read = {"retrieval": read_oxford, "copy": read_copydays}[args.task]
    queries, database, truths = read(Path(data))
    if not any(positives for truth in truths for positives, _ in truth.values()):
        raise InputError(f"{data}: no query has a positive image")
    distractors = images_below(args.distractors)
    others = images_below(args.whitening)
    learnt = f"whitening learnt on {len(others)} images" if others else "no whitening"
    log(f"{data}: {len(queries)} queries among {len(database)} images and {len(distractors)} "
        f"distractors; {learnt}")

    # descriptors: of each part, L of (n, D)
    parts = [queries, [(path, None) for path in database + distractors],
             [(path, None) for path in others]]
    described = [descriptors(backbone, files, meta, device, args) for files in parts]

    # each query ranks the database by cosine
    rows = []
    for layer, (asked, bank, others) in enumerate(zip(*described, strict=True), 1):
        if args.whitening:
            mean, matrix = whitening(others)
            asked = (asked - mean) @ matrix  # (n, K)
            bank = (bank - mean) @ matrix
        asked = F.normalize(asked.to(device), dim=1)
        bank = F.normalize(bank.to(device), dim=1)
        scores = {}
        for query, truth in zip(asked, truths, strict=True):
            for name, (positives, junk) in truth.items():
                if positives:  # a query without any does not count
                    scores.setdefault(name, []).append(judge(bank @ query, positives, junk))
        for name, values in scores.items():
            means = (100 * np.mean(values, 0)).tolist()
            metrics = dict(zip(METRICS[args.task], means, strict=True))
            rows.append({"layer": layer, "setup": name, **metrics})
    return rows


def judge(similarity: Tensor, positives, junk=(), ks=(1, 5, 10)) -> list[float]:
    """Average precision and precision at each k of one query's similarities (n,), by the rules of
    the benchmark: junk is as if it were not there, average precision is the area under
    precision-recall by trapezoids, and k is cut to the rank of the last positive."""
    kind = torch.zeros(len(similarity), dtype=torch.long)
    kind[list(junk)] = 2
    kind[list(positives)] = 1
    ranked = kind[similarity.argsort(descending=True, stable=True).cpu()]
    hits = ranked[ranked < 2] == 1
    ranks = hits.nonzero()[:, 0].tolist()  # of the positives, from 0
    area = 0.0
    for j, place in enumerate(ranks):
        before = j / place if place else 1.0  # precision just above this positive
        after = (j + 1) / (place + 1)  # and with it
        area += (before + after) / 2
    precisions = [hits[: min(k, ranks[-1] + 1)].float().mean().item() for k in ks]
    return [area / len(ranks), *precisions]


@fp32
def whitening(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and matrix (D, K) after which features (n, D) are uncorrelated, with variance 1."""
    mean = features.mean(0)
    centred = (features - mean).double()
    variances, vectors = torch.linalg.eigh(centred.T @ centred / len(features))  # ascending
    keep = variances > 1e-5 * variances[-1]
    if not keep.any():
        raise InputError(f"whitening cannot be learnt from {len(features)} images that are alike")
    return mean, (vectors[:, keep] / variances[keep].sqrt()).float()


# ------------------------------------------------------------------------- video segmentation

def video(data: str, backbone, meta: dict, device, args) -> list[dict]:
    """J and F of each layer; the processes share the sequences."""
    sequences = read_davis(Path(data), args.split)
    mine = sequences[rank() :: world_size()]
    files = [(frame, None) for _, frames, _ in mine for frame in frames]
    images = photographs(files, range(len(files)), 1, backbone, meta, device, args)
    totals = torch.zeros(layers_of(backbone, args), 3)  # sums of J and F; objects
    log(f"{data}: {len(sequences)} sequences of {args.split}, "
        f"{sum(len(frames) for _, frames, _ in sequences)} frames")
    for name, frames, masks in mine:
        scores = []
        for i, (frame, path) in enumerate(zip(frames, masks, strict=True)):
            true = read_mask(path, frame)  # (H, W)
            _, x = next(images)  # (1, 3, S, S')
            with autocast(device, args.dtype):
                tokens = backbone.tokens(x, layers_of(backbone, args))
            layers = [patches[0].float() for _, patches in tokens]  # L of (h, w, D)
            # the first frame has its labels; the others get them from those before
            if i == 0:
                objects, labels = first_labels(true, layers[0].shape[:2], path)
                memories = [[(features, labels.to(device))] for features in layers]
                predicted = [true]
            else:
                pairs = zip(memories, layers, strict=True)
                soft = [carry(memory, features, args) for memory, features in pairs]
                predicted = [hard_labels(labels, true.shape) for labels in soft]
            if 0 < i < len(frames) - 1:  # DAVIS does not count the others
                scores.append([score(mask, true, objects) for mask in predicted])
            write_masks(Path(args.output_dir), name, frame, predicted[-1])
        sums = torch.tensor(scores).mean(0).sum(1)  # (frames, L, objects, 2) -> (L, 2)
        totals += F.pad(sums, (0, 1), value=objects)  # (L, 3)

    # means over the objects of all sequences
    totals = mean_over_processes(totals.to(device)) * world_size()
    means = (100 * totals[:, :2] / totals[:, 2:]).tolist()
    rows = []
    for layer, (j, f) in enumerate(means, 1):
        both = (j + f) / 2
        rows.append({"layer": layer, "setup": args.split, "J&F": both, "J": j, "F": f})
    return rows


def carry(memory: list, target: Tensor, args) -> Tensor:
    """Labels (h, w, C) of a frame, which joins the features and labels in `memory`: those of the
    first frame and of the last few."""
    features, labels = zip(*memory, strict=True)
    carried = propagate(torch.stack(features), torch.stack(labels), target, args.k[0],
                        args.temperature, args.neighbourhood)
    memory.append((target, carried))
    del memory[1 : -args.context]
    return carried


@fp32
def propagate(features: Tensor, labels: Tensor, target: Tensor, k: int = 5,
              temperature: float = 0.1, neighbourhood: int = 12) -> Tensor:
    """Labels (h, w, C) of a frame with features `target` (h, w, D), from those of n others:
    features (n, h, w, D), labels (n, h, w, C). Each patch takes those of the k patches of greatest
    cosine, at most `neighbourhood` rows and columns away, with weights softmax(cos / T)."""
    h, w, _ = target.shape
    features = F.normalize(features, dim=-1)
    target = F.normalize(target, dim=-1)
    x = torch.arange(w, device=target.device)
    far = (x[:, None] - x).abs() > neighbourhood  # (w, w)
    rows = []
    for y in range(h):  # one row of patches at a time, to save memory
        band = slice(max(y - neighbourhood, 0), y + neighbourhood + 1)
        cosine = torch.einsum("xd,nijd->xnij", target[y], features[:, band])  # (w, n, r, w)
        cosine = cosine.masked_fill(far[:, None, None], -torch.inf)
        cosine = cosine.flatten(1)  # (w, n*r*w)
        cosine, nearest = cosine.topk(min(k, cosine.shape[1]))  # (w, k) each
        weights = (cosine / temperature).softmax(1)[..., None]  # (w, k, 1)
        lent = labels[:, band].flatten(0, 2)[nearest]  # (w, k, C)
        rows.append((weights * lent).sum(1))  # (w, C)
    return torch.stack(rows)


def hard_labels(labels: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Soft labels of patches (h, w, C) -> of pixels (H, W): stretched to 0 ... 1, the largest."""
    soft = labels.permute(2, 0, 1)[None]  # (1, C, h, w)
    soft = F.interpolate(soft, size, mode="bilinear")[0]  # (C, H, W)
    low = soft.amin((1, 2), keepdim=True)
    high = soft.amax((1, 2), keepdim=True)
    stretched = (soft - low) / (high - low).clamp(min=1e-8)
    return stretched.argmax(0).byte().cpu().numpy()


def first_labels(mask: np.ndarray, grid: tuple[int, int], path) -> tuple[int, Tensor]:
    """-> the number of objects, and the labels (h, w, 1 + objects) in the middle of patches."""
    objects = int(mask[mask < 255].max(initial=0))
    if not objects:
        raise InputError(f"{path}: the first mask of a sequence must show its objects")
    mask = np.where(mask < 255, mask, 0)
    mask = torch.from_numpy(mask).float()[None, None]  # (1, 1, H, W)
    labels = F.interpolate(mask, grid, mode="nearest-exact")[0, 0].long()  # (h, w)
    return objects, F.one_hot(labels, objects + 1).float()


def score(predicted: np.ndarray, true: np.ndarray, objects: int) -> list[tuple[float, float]]:
    """J and F of each object in two masks (H, W); void pixels are none."""
    pairs = [(predicted == o, true == o) for o in range(1, objects + 1)]
    return [(region_similarity(*pair), contour_accuracy(*pair)) for pair in pairs]


def region_similarity(predicted: np.ndarray, true: np.ndarray) -> float:
    """J: intersection over union of two masks (H, W); 1 where both are empty."""
    union = (predicted | true).sum()
    return float((predicted & true).sum() / union) if union else 1.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels (H, W) unlike the next to the right, below, or right below."""
    padded = np.pad(mask, (0, 1), mode="edge")
    right = mask != padded[:-1, 1:]
    below = mask != padded[1:, :-1]
    return right | below | (mask != padded[1:, 1:])


def contour_accuracy(predicted: np.ndarray, true: np.ndarray, tolerance: float = 0.008) -> float:
    """F: harmonic mean of boundary precision and recall of two masks (H, W). A pixel is matched if
    the other boundary is within `tolerance` of the image's diagonal, rounded up."""
    radius = math.ceil(tolerance * math.hypot(*true.shape))
    ours = np.argwhere(boundary(predicted))  # (n, 2)
    theirs = np.argwhere(boundary(true))  # (n', 2)
    if not len(ours) or not len(theirs):
        return float(len(ours) == len(theirs))
    precision = (KDTree(theirs).query(ours)[0] <= radius).mean()
    recall = (KDTree(ours).query(theirs)[0] <= radius).mean()
    return float(2 * precision * recall / max(precision + recall, 1e-12))


# -------------------------------------------------------------------------------------- results

def print_rows(rows: list[dict], names: list[str]) -> None:
    """A line for each layer and setup of one data set; names: of the metrics."""
    column = "k" if "top-1" in names else "setup"
    log(f"{'layer':>6} {column:>6} " + " ".join(f"{name + ' %':>8}" for name in names))
    for row in rows:
        values = " ".join(f"{row[name]:8.2f}" for name in names)
        log(f"{row['layer']:>6} {row['setup']:>6} {values}")
    if len({row["layer"] for row in rows}) > 1:
        best = max(rows, key=lambda row: row[names[0]])
        log(f"best: layer {best['layer']}, {best['setup']}, {names[0]} {best[names[0]]:.2f} %")


def print_side_by_side(tables: dict[str, list[dict]], metric: str) -> None:
    """A metric of several data sets, a column each; nan without such a row."""
    lines = {}
    for place, rows in enumerate(tables.values()):
        for row in rows:
            values = lines.setdefault((row["layer"], row["setup"]), [math.nan] * len(tables))
            values[place] = row[metric]
    names = [Path(data).name or data for data in tables]
    head = " ".join(f"{name:>10}" for name in [*names, "mean"])
    log(f"\n{metric} in per cent\n{'':>13} {head}")
    for (layer, row_setup), values in lines.items():
        values = " ".join(f"{value:10.2f}" for value in [*values, np.mean(values)])
        log(f"{layer:>6} {row_setup:>6} {values}")


def save_results(rows: list[dict], args) -> None:
    """results.json and, of several layers, their curve and those of --compare: layers.png."""
    folder = Path(args.output_dir)
    with replacing(folder / "results.json") as temporary:
        content = {"rows": rows, "args": vars(args)}
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    log(f"wrote {folder / 'results.json'}")
    if args.layers == "last":
        return
    metric = METRICS[args.task][0]
    curves = {}
    for other in [folder, *map(Path, args.compare or ())]:
        for row in json.loads((other / "results.json").read_text())["rows"]:
            names = ["/".join(Path(path).parts[-2:]) for path in (other, row["data"])]
            name = f"{': '.join(names)}, {row['setup']}"
            curves.setdefault(name, []).append((row["layer"], row[metric]))
    figure, ((axis,),) = subplots(1, 1, 5, 3.5)
    for name, points in curves.items():
        layers, values = zip(*points, strict=True)
        axis.plot(layers, values, marker="o", label=name)
    axis.set(xlabel="layer", ylabel=f"{metric} (%)")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=7)
    save_figure(figure, folder / "layers.png")


# ------------------------------------------------------------------------------------ arguments

def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", default=["digits"], help=f"digits, {', '.join(DATASETS)}, or folders")
    add("--data_path", default="data", help="folder of named data sets (default: data)")
    add("--img_size", type=at_least(1), help="pixels of the side (knn: as trained; copy: 320), of "
        "the longer side (retrieval: 512), or of the shorter one (video: 480)")
    add("--split", help="list of DAVIS in ImageSets/2017 (default: val)")
    add("--distractors", type=path_name, metavar="DIR", help="images beside the database")
    add("--whitening", type=path_name, metavar="DIR", help="images to learn PCA whitening on")
    add_checkpoint_arguments(parser)
    add = parser.add_argument_group("evaluation").add_argument
    add("--task", default="knn", choices=list(TASKS), help="(default: %(default)s)")
    add("--layers", default="last", choices=["last", "all"], help="(default: %(default)s)")
    add("--k", type=at_least(1), nargs="+", help="neighbours (10 20 100 200; video: 5)")
    add("--temperature", type=at_least(0.012),  # exp(1 / T) overflows fp32 a little below
        help="of their votes (default: 0.07; video: 0.1)")
    add("--scales", type=at_least(0.01, 4.0), nargs="+", help="averaged (retrieval: 1, 0.7071 and "
        "0.5; copy: 1)")
    add("--context", type=at_least(1), help="frames that lend labels, beside the first (7)")
    add("--neighbourhood", type=at_least(1), help="patches that things move at most (12)")
    add("--features", type=path_name, metavar="FILE", help="for k-NN's features; needs no labels")
    add("--compare", nargs="+", metavar="DIR", help="results to draw too (with --layers all)")
    add = parser.add_argument_group("system").add_argument
    add("--output_dir", type=path_name, help="of the results (default: runs/TASK; knn: none)")
    add("--overwrite", action="store_true", help="replacement of what is there")
    add("--batch_size", type=at_least(1), help="images per process (256 for knn, else 16)")
    add("--num_workers", type=at_least(0), default=CORES, help="processes that decode files")
    add("--seed", type=at_least(0), default=0, help="of random weights (default: 0)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="(default: fp32)")
    return parser.parse_args()


def complete(args) -> None:
    """Fills in the settings of the task; refuses before the work what cannot be done."""
    for name in {name for settings in TASKS.values() for name in settings}:
        tasks = [task for task, settings in TASKS.items() if name in settings]
        if getattr(args, name) is None:
            setattr(args, name, TASKS[args.task].get(name))
        elif args.task not in tasks:
            raise InputError(f"--{name} is not for --task {args.task}, but for {', '.join(tasks)}")
    if args.output_dir is None and args.task != "knn":
        args.output_dir = f"runs/{args.task}"
    if args.task == "video" and max(len(args.k), len(args.data)) > 1:
        raise InputError("--task video takes one --k and one --data")
    if args.features is not None and len(args.data) > 1:
        raise InputError("--features takes one data set: run it once for each")
    if args.compare and not (args.output_dir and args.layers == "all"):
        raise InputError("--compare draws layers: it needs --layers all and --output_dir")
    for folder in args.compare or ():
        path = Path(folder) / "results.json"
        try:
            content = json.loads(path.read_text())
            fits = content["rows"] and content["args"]["task"] == args.task
            fits = fits and content["args"]["layers"] == "all"
        except (OSError, ValueError, KeyError, TypeError):
            fits = False
        if not fits:
            raise InputError(f"{path} holds no results of --task {args.task} --layers all")
    files = [args.features] if args.features is not None else []
    if args.output_dir:
        files += [f"{args.output_dir}/{name}" for name in ("results.json", "layers.png")]
    prepare_files(files, args.overwrite)
    if args.task == "knn":
        for data in args.data:
            check_data(data)


def main() -> None:
    """One task on one data set or several."""
    args = parse_arguments()
    complete(args)
    device = setup(args)
    size = args.img_size if args.task == "knn" else None  # others: any
    backbone, meta = load_backbone(args.checkpoint, args.arch, args.patch_size, size, args.network,
                                   args.num_heads)
    backbone.to(device)
    arch = meta["backbone"]["arch"]
    if args.task in ("copy", "video") and not backbone.has_tokens:
        raise InputError(f"--task {args.task} needs patch tokens, which {arch} does not have")
    if args.img_size is None:
        args.img_size = meta["img_size"]
    log(f"on {device.type} in {args.dtype}, {world_size()} process(es)")
    settings = [f"{name} {getattr(args, name)}" for name in (*TASKS[args.task], "layers")]
    log(f"task {args.task}: {', '.join(settings)}")

    evaluate = {"knn": knn, "retrieval": search, "copy": search, "video": video}
    tables = {}
    for data in args.data:
        try:
            rows = evaluate[args.task](data, backbone, meta, device, args)
        except AssertionError as error:  # how timm says that a size does not suit a model
            raise InputError(f"pass an --img_size that {arch} takes ({error})") from None
        if args.layers == "last":
            rows = [{**row, "layer": "last"} for row in rows]
        tables[data] = [{"data": data, **row} for row in rows]
        if rows:
            print_rows(rows, METRICS[args.task])
        if rows and args.output_dir and rank() == 0:
            save_results(sum(tables.values(), []), args)
    if len(tables) > 1:
        print_side_by_side(tables, METRICS[args.task][0])


# ---------------------------------------------------------------------- files of the benchmarks

class PickledDtype:
    """Stands for numpy.dtype: numbers and strings alone, never a structure or a pointer."""

    def __init__(self, code, *_):
        if not re.fullmatch(r"[biufUSO]\d+", code):
            raise pickle.UnpicklingError(f"an array of type {code}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])

    def values(self, data) -> list:
        if self.dtype.hasobject:  # they stand in the pickle one by one
            return list(data)
        if isinstance(data, str):  # written by Python 2
            data = data.encode("latin1")
        return np.frombuffer(data, self.dtype).tolist()


class PickledArray(list):
    """Stands for numpy.ndarray of one dimension: a list."""

    def __setstate__(self, state):
        _, _, dtype, _, data = state
        self[:] = dtype.values(data)


class PlainUnpickler(pickle.Unpickler):
    """Plain containers, and NumPy's arrays as lists; what else a pickle may name is refused.
    NumPy's own unpickling can be led to follow pointers."""

    STAND_INS = {  # by name alone: these do no harm, whatever module is asked for them
        "dtype": PickledDtype,
        "ndarray": PickledArray,
        "_reconstruct": lambda *_: PickledArray(),
        "scalar": lambda dtype, data: dtype.values(data)[0],
        "_frombuffer": lambda data, dtype, *_: dtype.values(data),
        # how Python 3 writes bytes for Python 2, and how it writes none
        "encode": lambda text, encoding: text.encode("latin1"),
        "bytes": lambda: b""}

    def find_class(self, module, name):
        if name not in self.STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.STAND_INS[name]


def read_oxford(folder: Path) -> tuple[list, list, list]:
    """Revisited Oxford or Paris, gnd_*.pkl and jpg/NAME.jpg -> queries (path, box), paths of the
    database, and for each query {setup: (positives, junk)}, places in the database."""
    files = sorted(folder.glob("gnd_*.pkl"))
    if len(files) != 1:
        raise InputError(f"{folder} has {len(files)} gnd_*.pkl, not one: is it Oxford or Paris?")
    queries = []
    truths = []
    try:
        with open(files[0], "rb") as file:
            content = PlainUnpickler(file, encoding="latin1").load()
        images = [f"{folder}/jpg/{name}.jpg" for name in content["imlist"]]
        for name, truth in zip(content["qimlist"], content["gnd"], strict=True):
            easy = list(truth["easy"])
            hard = list(truth["hard"])
            junk = list(truth["junk"])
            if not set(easy + hard + junk) <= set(range(len(images))):
                raise ValueError("a place outside of imlist")
            left, top, right, bottom = (round(edge) for edge in truth["bbx"])
            queries.append((f"{folder}/jpg/{name}.jpg", (left, top, right, bottom)))
            truths.append({"Medium": (easy + hard, junk), "Hard": (hard, easy + junk)})
    except Exception as error:
        raise InputError(f"{files[0]} is no ground truth in plain containers and NumPy arrays "
                         f"({one_line(error)})") from None
    return queries, images, truths


def images_below(folder: str | None) -> list[str]:
    """The images of a folder, which must have some; none of no folder."""
    images = find_images(folder or "")
    if folder and not images:
        raise InputError(f"no images under {folder}")
    return images


def read_copydays(folder: Path) -> tuple[list, list, list]:
    """Copydays, as `read_oxford`. A copy's name begins with four characters of the original's."""
    originals = images_below(f"{folder}/original")
    copies = images_below(f"{folder}/strong")
    places = {Path(path).name[:4]: i for i, path in enumerate(originals)}
    if len(places) < len(originals):
        raise InputError(f"{folder}/original: several names begin with the same four characters")
    truths = []
    for path in copies:
        start = Path(path).name[:4]
        if start not in places:
            raise InputError(f"{path} is a copy of nothing: no original begins with {start}")
        truths.append({"strong": ([places[start]], [])})
    return [(path, None) for path in copies], originals, truths


def read_davis(folder: Path, split: str) -> list[tuple[str, list, list]]:
    """Name, frames and masks of each sequence in DAVIS's ImageSets/2017/SPLIT.txt."""
    names = folder / "ImageSets" / "2017" / f"{split}.txt"
    if not names.is_file():
        raise InputError(f"no {names}: give the folder of DAVIS 2017 and a --split that it has")
    sequences = []
    for name in names.read_text().split():
        frames = sorted(folder.glob(f"JPEGImages/480p/{name}/*.jpg"))
        masks = [folder / f"Annotations/480p/{name}/{frame.stem}.png" for frame in frames]
        if len(frames) < 3:
            raise InputError(f"{len(frames)} frames of {name} in {folder}: 3 are needed")
        sequences.append((name, frames, masks))
    if not sequences:
        raise InputError(f"{names} names no sequence")
    return sequences


def read_mask(path, frame) -> np.ndarray:
    """(H, W) uint8: 0 background, 1 ... objects, 255 void."""
    try:
        with Image.open(path) as image, Image.open(frame) as photograph:
            if image.mode not in ("P", "L") or image.size != photograph.size:
                raise ValueError(f"not an indexed PNG of the size of {frame}")
            return np.array(image)
    except Exception as error:
        raise InputError(f"cannot read mask {path} ({one_line(error)})") from None


PALETTE = np.resize(np.array([(255, 70, 70), (70, 200, 70), (80, 120, 255), (255, 200, 40),
                              (220, 90, 220), (60, 210, 210), (255, 140, 40)], np.uint8), (256, 3))
PALETTE[0] = 0  # the background


def write_masks(folder: Path, name: str, frame: Path, mask: np.ndarray) -> None:
    """masks/NAME/FRAME.png, indexed, and overlays/NAME/FRAME.jpg, the mask over the frame."""
    for kind in ("masks", "overlays"):
        (folder / kind / name).mkdir(parents=True, exist_ok=True)
    indexed = Image.fromarray(mask)
    indexed.putpalette(PALETTE.flatten().tolist())
    indexed.save(folder / "masks" / name / f"{frame.stem}.png")
    photograph = read_image(frame).permute(1, 2, 0).numpy()  # (H, W, 3)
    painted = photograph // 2 + PALETTE[mask] // 2  # (H, W, 3)
    painted = np.where(mask[..., None] > 0, painted, photograph)
    Image.fromarray(painted).save(folder / "overlays" / name / f"{frame.stem}.jpg")


if __name__ == "__main__":
    launch(main)
