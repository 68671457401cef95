"""Evaluations of a frozen backbone that train nothing: k-NN, retrieval, copy detection, video.

--task knn        The k nearest training images of a test image vote for its class, each with weight
                  exp(cos / T), as in DINO and Wu et al. (instance discrimination). Several --data
                  give one table: transfer, SDSSL's Table 4.
--task retrieval  Revisited Oxford and Paris (Table 2): other photographs of a query's building.
--task copy       Copydays "strong" (Table 3, Fig. 4): the original of a photograph that was
                  printed, scanned, cut or painted over.
--task video      DAVIS 2017 (Table 3, Fig. 4): the first frame's labels, carried through the video
                  by similar patches.

    knn, retrieval   image -> backbone -> [CLS] (D,), of ResNets the   -> (whitening) -> cosines
                                          average-pooled last stage
    copy             image -> backbone -> [CLS] and GeM of its patch   -> (whitening) -> cosines
                                          tokens (2 * D,)
    video            frame -> backbone -> patch tokens (h, w, D) -> cosines with those of the first
                     frame and of the 7 before, at most 12 patches away -> the 5 nearest lend their
                     labels, with weights softmax(cos / T)

With `--layers all` every block's tokens go through the final norm (ResNets: every stage's average),
in one pass over the data. All tasks but knn write results.json into --output_dir, with `--layers
all` also the curve of Fig. 4 (layers.png). video adds masks/, which DAVIS's own evaluation reads,
and overlays/, the coloured masks over the frames, of the last layer. ViTs take any size, rounded
down to whole patches. ResNets do knn and retrieval: they have no patch tokens.

    python eval_knn.py --checkpoint runs/sdssl/checkpoint.pth --data digits --layers all
    python eval_knn.py --arch vit_small --patch_size 16 --checkpoint dino_deitsmall16_pretrain.pth \
        --data DIR
    torchrun --nproc_per_node=8 eval_knn.py --arch timm/vit_small_patch16_224.dino --data DIR
                                                       timm's weights, downloaded
    python eval_knn.py --arch vit_small --data DIR     random weights, the floor
    python eval_knn.py --checkpoint FILE --data DIR --features features.pth
                                                       features saved; labels are not needed
    python eval_knn.py --checkpoint FILE --data cifar10 flowers102 pets DIR     transfer
    python eval_knn.py --checkpoint FILE --task retrieval --data roxford5k rparis6k
    python eval_knn.py --checkpoint FILE --task copy --data copydays --distractors DIR \
        --whitening DIR --layers all
    python eval_knn.py --checkpoint FILE --task video --data DAVIS --layers all --compare runs/other

    what                 DINO's release, as SDSSL              here
    retrieval: query     the photograph                        its box, at the photograph's scale,
                                                               as the benchmark has it
    retrieval: scales    1, or 3 by a flag; 224 or 512 pixels  3; 512 pixels
    copy: whitening      covariance not centred; variances     centred; directions under 1e-5 of
                         raised to 1e-5 of the largest         the largest variance left out
    copy: AP             of the first 20                       of the ranking of all
    video: frames        480 x 854 become 480 x 832 (of 64)    480 x 848 for patches of 16
    video: ties          all that tie with the fifth           five
    video: normalised    red by 0.228                          by 0.229, as everywhere
    positions off the    scale factor (n + 0.1) / m            the same for other people's files;
    trained grid                                               timm/NAME as timm (antialiased);
                                                               ours exactly, bicubic

k-NN resizes the short side to 256/224 of --img_size and cuts out the centre; small images of one
size are resized as they are. k is cut to the number of training images, and a class without a vote
is no hit. Average precision is by trapezoids, precision at k with k cut to the last positive's
rank, J and F over all frames but the first and the last, then over objects; void pixels (255) are
no object: as the benchmarks' own code.

The file that --features writes is read with `torch.load(FILE, weights_only=True)`: for each split
("train", and "test" where there is one) a dict of `features` (n, D), with `--layers all` a list of
L of them; `paths`, the files in the same order, or for data sets in memory the rows (n,); `labels`
(n,), -1 where unknown; and `classes`, the names of the labels.

Symbols: B images of this process, L layers, N patch tokens on a grid of h x w, D width, C classes,
S side of an image.
"""
import argparse
import json
import math
import pickle
import re
from collections import deque
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as tv

from common import (CORES, DATASETS, ImageData, InputError, Parser, add_checkpoint_arguments,
                    at_least, autocast, barrier, extract_features, find_images, fp32,
                    knn_classifier, launch, load_backbone, load_data, log, mean_over_processes,
                    progress, rank, read_image, refuse_to_replace, replacing, save_file, setup,
                    subplots, world_size)

TASKS = {  # the settings of each, with DINO's defaults; a flag that a task does not list is refused
    "knn": dict(img_size=None, batch_size=256, k=[10, 20, 100, 200], temperature=0.07,
                features=None),
    "retrieval": dict(img_size=512, batch_size=16, scales=[1.0, 0.7071, 0.5], whitening=None,
                      distractors=None),
    "copy": dict(img_size=320, batch_size=16, scales=[1.0], whitening=None, distractors=None),
    "video": dict(img_size=480, k=[5], temperature=0.1, context=7, neighbourhood=12, split="val"),
}

# ------------------------------------------------------------------------------------------ k-NN


def knn(data: str, backbone, meta: dict, device, args) -> list[dict]:
    """Top-1 and top-5 in per cent, a row for each layer and k; none without labels."""
    train, test = load_data(data, args.data_path)
    labelled = test is not None and train.labelled and test.labelled
    if not (labelled or args.features):
        raise InputError(f"k-NN needs labels, and {data} has none on one side: give it train/CLASS "
                         f"and val/CLASS folders, or pass --features FILE to save features "
                         f"without labels")
    splits = {"train": train}
    if test is not None:
        splits["test"] = test
    sizes = ", ".join(f"{len(part)} {name} images" for name, part in splits.items())
    log(f"{data}: {sizes}, {len(train.classes)} classes")
    splits = {name: split_features(part, backbone, meta, device, args)
              for name, part in splits.items()}
    if args.features:
        if rank() == 0:
            save_file(splits, Path(args.features))
        barrier()
        log(f"features saved in {args.features}")
    if not labelled:
        log("k-NN skipped: it needs labels in a training and a test split")
        return []
    return knn_rows(splits["train"], splits["test"], args, device)


def split_features(data: ImageData, backbone, meta: dict, device, args) -> dict:
    """One split's features, paths, labels and classes, in the form that --features saves."""
    rows = (data.labels >= 0).nonzero()[:, 0]  # (n,): others have no vote
    if args.features:
        rows = torch.arange(len(data))
    layers = args.layers == "all"
    features = extract_features(
        backbone, data, meta["img_size"], device, layers=layers, rows=rows, dtype=args.dtype,
        batch_size=args.batch_size, num_workers=args.num_workers, mean=meta["mean"],
        std=meta["std"])  # one or L of (n, D)
    paths = rows
    if data.paths:
        paths = [data.paths[i] for i in rows.tolist()]
    return {"features": features if layers else features[0], "labels": data.labels[rows],
            "paths": paths, "classes": data.classes}


def knn_rows(train: dict, test: dict, args, device) -> list[dict]:
    """A row for each layer and k, from both splits' features."""
    C = len(train["classes"])
    known = train["labels"] >= 0
    asked = test["labels"] >= 0
    labels = train["labels"][known].to(device)  # (n,)
    test_labels = test["labels"][asked].to(device)
    layers = train["features"]
    test_layers = test["features"]
    if args.layers == "last":
        layers = [layers]
        test_layers = [test_layers]
    log(f"k-NN of {len(test_labels)} test among {len(labels)} training images, {C} classes, "
        f"T = {args.temperature}")
    rows = []
    for layer, (bank, queries) in enumerate(zip(layers, test_layers, strict=True), 1):
        bank = bank[known].to(device)  # (n, D)
        queries = queries[asked].to(device)
        for k in args.k:
            top1, top5 = top1_top5(bank, labels, queries, test_labels, k, args.temperature, C,
                                   args.chunk)
            rows.append({"layer": layer, "setup": str(k), "top-1": top1, "top-5": top5})
    return rows


def top1_top5(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int,
              temperature: float, num_classes: int, chunk: int = 512) -> tuple[float, float]:
    """Per cent of test features whose class is first, or among the first five, in the votes; the
    processes share the queries."""
    mine = slice(rank(), None, world_size())
    scores = knn_classifier(train, train_labels, test[mine], k, temperature, num_classes,
                            at_once(chunk, len(train)))  # (n, C)
    votes, ranked = scores.topk(min(5, num_classes), dim=1)  # (n, 5) each
    hits = (ranked == test_labels[mine, None]) & (votes > 0)  # no hit without a vote
    counts = torch.stack([hits[:, 0].sum(), hits.sum()]).float()  # (2,)
    top1, top5 = (100 * mean_over_processes(counts) * world_size() / len(test)).tolist()
    return top1, top5


def at_once(chunk: int, candidates: int) -> int:
    """How many queries are compared at a time, for `chunk` MiB of similarities in fp32."""
    return max(1, chunk * 2**18 // candidates)


# ----------------------------------------------------------------------- descriptors of photographs


class Photographs(Dataset):
    """Images, or a box of each, as uint8 (3, H, W), resized bicubically to multiples of `patch`.

    fit: what becomes `size` pixels: "square" both sides, "long" the longer side unless it is
    shorter already, "short" the shorter one. A box (left, top, right, bottom), in whole pixels,
    keeps the scale of its image.
    """

    def __init__(self, paths: list, fit: str, size: int, patch: int, boxes: list | None = None):
        self.paths = paths
        self.fit = fit
        self.size = size
        self.patch = patch
        self.boxes = boxes

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        image = read_image(self.paths[i])  # (3, H, W)
        H, W = image.shape[1:]
        scale = self.size / min(H, W)
        if self.fit == "long":
            scale = min(1.0, self.size / max(H, W))
        if self.boxes:
            left, top, right, bottom = self.boxes[i]
            image = image[:, max(top, 0) : bottom, max(left, 0) : right]
            if not image.numel():
                raise InputError(f"the box {self.boxes[i]} of query {self.paths[i]} lies outside "
                                 f"of the image")
        size = [round(scale * length) for length in image.shape[1:]]
        if self.fit == "square":
            size = [self.size, self.size]
        size = [whole_patches(length, self.patch) for length in size]
        return tv.resize(image, size, tv.InterpolationMode.BICUBIC, antialias=True)

    def loader(self, rows, batch_size: int | None, num_workers: int) -> DataLoader:
        """Lists of images of many sizes, or with batch_size None one image at a time."""
        collate = list if batch_size else None
        return DataLoader(self, batch_size, sampler=rows, num_workers=num_workers,
                          collate_fn=collate, generator=torch.Generator())


def whole_patches(length: int, patch: int) -> int:
    """A side in pixels, rounded down to patches; one at least."""
    return max(length // patch, 1) * patch


def layers_of(backbone, args) -> int:
    return len(backbone.layer_dims) if args.layers == "all" else 1


def gem(patches: Tensor, p: float = 4.0, eps: float = 1e-6) -> Tensor:
    """Generalised mean of patch tokens (B, h, w, D) -> (B, D): p = 1 is their mean, a large p their
    maximum."""
    return patches.float().clamp(min=eps).pow(p).mean((1, 2)).pow(1 / p)


def describe(backbone, x: Tensor, args) -> list[Tensor]:
    """Images (B, 3, H, W) -> features (B, D), of copies (B, 2 * D), of all layers or the last,
    averaged over the scales."""
    of_scales = []
    for scale in args.scales:
        y = x
        if scale != 1:
            size = [whole_patches(int(scale * length), backbone.patch_size)
                    for length in x.shape[-2:]]
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


def descriptors(backbone, photographs: Photographs, name: str, meta: dict, device,
                args) -> list[Tensor]:
    """`describe` of n images, one (n, D) for each layer, on the CPU. The processes share the work
    and all get the result."""
    mine = range(rank(), len(photographs), world_size())
    widths = backbone.layer_dims if args.layers == "all" else [backbone.embed_dim]
    if args.task == "copy":
        widths = [2 * D for D in widths]
    layers = [torch.zeros(len(photographs), D) for D in widths]
    batches = [torch.tensor(mine[i : i + args.batch_size])
               for i in range(0, len(mine), args.batch_size)]
    with progress(total=len(mine), desc=name, unit="img", leave=False) as bar:
        images_of_batches = photographs.loader(mine, args.batch_size, args.num_workers)
        for rows, images in zip(batches, images_of_batches, strict=True):
            for shape in {image.shape for image in images}:  # those of one size go together
                places = [i for i, image in enumerate(images) if image.shape == shape]
                x = torch.stack([images[i] for i in places]).to(device).float() / 255
                x = tv.normalize(x, meta["mean"], meta["std"])  # (B, 3, H, W)
                for layer, features in zip(layers, describe(backbone, x, args), strict=True):
                    layer[rows[places]] = features.cpu()
            bar.update(len(images))
    # the rows of other processes are 0 here, so their sum is all of them
    return [(mean_over_processes(layer.to(device)) * world_size()).cpu() for layer in layers]


# ----------------------------------------------------------------------- retrieval and copies


def retrieval(data: str, backbone, meta: dict, device, args) -> list[dict]:
    """Revisited Oxford or Paris: DIR/gnd_*.pkl and DIR/jpg/NAME.jpg."""
    files = sorted(Path(data).glob("gnd_*.pkl"))
    if len(files) != 1:
        raise InputError(f"{data} has {len(files) or 'no'} gnd_*.pkl: give the folder of revisited "
                         f"Oxford or Paris")
    queries, boxes, truths, images = read_ground_truth(files[0])
    queries = [f"{data}/jpg/{name}.jpg" for name in queries]
    images = [f"{data}/jpg/{name}.jpg" for name in images]
    for path in queries + images:
        if not Path(path).is_file():
            raise InputError(f"no image {path}, which {files[0].name} names")
    options = ("long", args.img_size, backbone.patch_size)
    return search(data, Photographs(queries, *options, boxes), Photographs(images, *options),
                  truths, backbone, meta, device, args)


def copy_detection(data: str, backbone, meta: dict, device, args) -> list[dict]:
    """Copydays: DIR/original and DIR/strong. The first four characters of a name say which
    original a copy is of."""
    originals = images_below(f"{data}/original")
    copies = images_below(f"{data}/strong")
    places = {Path(path).name[:4]: i for i, path in enumerate(originals)}
    if len(places) < len(originals):
        raise InputError(f"{data}/original: several names begin with the same four characters, "
                         f"which tell the originals apart")
    truths = []
    for path in copies:
        start = Path(path).name[:4]
        if start not in places:
            raise InputError(f"{path} is a copy of nothing: no name in {data}/original begins with "
                             f"{start}")
        truths.append({"strong": ([places[start]], [])})
    options = ("square", args.img_size, backbone.patch_size)
    return search(data, Photographs(copies, *options), Photographs(originals, *options),
                  truths, backbone, meta, device, args)


def search(data: str, queries: Photographs, database: Photographs, truths: list[dict], backbone,
           meta, device, args) -> list[dict]:
    """mAP and mP@k in per cent, a row for each layer and setup.

    truths: of each query, {setup: (positives, junk)}, places in the database.
    """
    if not any(positives for truth in truths for positives, _ in truth.values()):
        raise InputError(f"{data}: no query has a positive image")
    distractors = images_below(args.distractors)
    others = images_below(args.whitening)
    options = (database.fit, database.size, database.patch)
    learnt = f"whitening learnt on {len(others)} images" if others else "no whitening"
    log(f"{data}: {len(queries)} queries among {len(database)} images and {len(distractors)} "
        f"distractors; {learnt}")
    parts = {"queries": queries,
             "database": Photographs(database.paths + distractors, *options),
             "whitening": Photographs(others, *options)}
    described = [descriptors(backbone, part, name, meta, device, args)
                 for name, part in parts.items()]
    rows = []
    for layer, (asked, bank, others) in enumerate(zip(*described, strict=True), 1):
        if args.whitening:
            mean, matrix = whitening(others)
            asked = (asked - mean) @ matrix  # (n, K)
            bank = (bank - mean) @ matrix
        asked = F.normalize(asked.to(device), dim=1)
        bank = F.normalize(bank.to(device), dim=1)
        chunks = asked.split(at_once(args.chunk, len(bank)))
        similarities = (row for chunk in chunks for row in chunk @ bank.T)  # (database,) each
        scores = {name: [] for name in truths[0]}
        for similarity, truth in zip(similarities, truths, strict=True):
            for name, (positives, junk) in truth.items():
                if positives:  # a query without any does not count
                    scores[name].append(judge(similarity, positives, junk))
        for name, values in scores.items():
            if values:
                means = (100 * np.mean(values, 0)).tolist()
                metrics = dict(zip(("mAP", "mP@1", "mP@5", "mP@10"), means, strict=True))
                rows.append({"layer": layer, "setup": name, **metrics})
    return rows


def images_below(folder: str | None) -> list[str]:
    """The images of a folder, which must have some; none of no folder."""
    images = find_images(folder) if folder else []
    if folder and not images:
        raise InputError(f"no images under {folder}")
    return images


def judge(similarity: Tensor, positives, junk=(), ks=(1, 5, 10)) -> list[float]:
    """Average precision and precision at each k of one query's similarities (n,); junk is as if it
    were not there.

    k is cut to the rank of the last positive: 3 positives on top are a precision at 10 of 1.
    """
    kind = torch.zeros(len(similarity), dtype=torch.long)
    kind[list(junk)] = 2
    kind[list(positives)] = 1
    ranked = kind[similarity.argsort(descending=True, stable=True).cpu()]
    hits = ranked[ranked < 2] == 1
    ranks = hits.nonzero()[:, 0].tolist()
    precisions = [hits[: min(k, ranks[-1] + 1)].float().mean().item() for k in ks]
    return [average_precision(ranks, len(ranks)), *precisions]


def average_precision(ranks: list[int], positives: int) -> float:
    """Area under precision-recall, by trapezoids: the benchmark's rule. ranks: of the positives,
    from 0, ascending."""
    area = 0.0
    for j, place in enumerate(ranks):
        before = j / place if place else 1.0  # precision just above this positive
        after = (j + 1) / (place + 1)  # and with it
        area += (before + after) / 2
    return area / positives


@fp32
def whitening(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and matrix (D, K) after which features (n, D) are uncorrelated, with variance 1."""
    mean = features.mean(0)
    centred = (features - mean).double()
    variances, vectors = torch.linalg.eigh(centred.T @ centred / len(features))  # ascending
    keep = variances > 1e-5 * variances[-1]
    if not keep.any():
        raise InputError(f"whitening cannot be learnt from {len(features)} images that are all "
                         f"alike: give more of them")
    return mean, (vectors[:, keep] / variances[keep].sqrt()).float()


# ------------------------------------------------------------------------- video segmentation


def video(data: str, backbone, meta: dict, device, args) -> list[dict]:
    """J and F of each layer. Processes share the sequences; the last layer's masks are written."""
    sequences = read_davis(Path(data), args.split)
    mine = sequences[rank() :: world_size()]
    paths = [str(frame) for _, frames, _ in mine for frame in frames]
    photographs = Photographs(paths, "short", args.img_size, backbone.patch_size)
    images = iter(photographs.loader(range(len(paths)), None, args.num_workers))
    totals = torch.zeros(layers_of(backbone, args), 3)  # sums of J and F, and number of objects
    log(f"{data}: {len(sequences)} sequences of {args.split}, "
        f"{sum(len(frames) for _, frames, _ in sequences)} frames")
    with progress(total=len(paths), desc="video", unit="frame", leave=False) as bar:
        for name, frames, masks in mine:
            scores = []
            for i, (frame, path) in enumerate(zip(frames, masks, strict=True)):
                true = read_mask(path, frame)  # (H, W)
                x = next(images)[None].to(device).float() / 255  # (1, 3, S, S')
                x = tv.normalize(x, meta["mean"], meta["std"])
                with autocast(device, args.dtype):
                    tokens = backbone.tokens(x, layers_of(backbone, args))
                layers = [patches[0].float() for _, patches in tokens]  # L of (h, w, D)
                if i == 0:
                    objects, labels = first_labels(true, layers[0].shape[:2], path)
                    labels = labels.to(device)
                    trackers = [Tracker(features, labels, args) for features in layers]
                    predicted = [true]
                else:
                    pairs = zip(trackers, layers, strict=True)
                    predicted = [hard_labels(track(features), true.shape)
                                 for track, features in pairs]  # L of (H, W)
                if 0 < i < len(frames) - 1:  # DAVIS does not count the first and the last
                    scores.append([score(mask, true, objects) for mask in predicted])
                write_masks(Path(args.output_dir), name, frame, predicted[-1])
                bar.update()
            sums = torch.tensor(scores).mean(0).sum(1)  # (frames, L, objects, 2) -> (L, 2)
            totals += F.pad(sums, (0, 1), value=objects)  # (L, 3)
    totals = mean_over_processes(totals.to(device)) * world_size()
    means = (100 * totals[:, :2] / totals[:, 2:]).tolist()  # over all objects
    rows = []
    for layer, (j, f) in enumerate(means, 1):
        rows.append({"layer": layer, "setup": args.split, "J&F": (j + f) / 2, "J": j, "F": f})
    return rows


class Tracker:
    """Carries labels (h, w, C) from the first frame's features (h, w, D) to those of each frame
    that follows."""

    def __init__(self, features: Tensor, labels: Tensor, args):
        self.first = (features, labels)
        self.recent = deque(maxlen=args.context)
        self.args = args

    def __call__(self, target: Tensor) -> Tensor:
        frames = [self.first, *self.recent]
        features = torch.stack([f for f, _ in frames])  # (n, h, w, D)
        labels = torch.stack([l for _, l in frames])  # (n, h, w, C)
        args = self.args
        labels = propagate(features, labels, target, args.k[0], args.temperature,
                           args.neighbourhood, args.chunk)
        self.recent.append((target, labels))
        return labels


@fp32
def propagate(features: Tensor, labels: Tensor, target: Tensor, k: int = 5,
              temperature: float = 0.1, neighbourhood: int = 12, chunk: int = 512) -> Tensor:
    """Labels (h, w, C) of a frame with features `target` (h, w, D), from those of n others:
    features (n, h, w, D), labels (n, h, w, C).

    Each patch takes the labels of the k patches of greatest cosine, among all that are at most
    `neighbourhood` rows and columns away in any of the frames, with weights softmax(cos / T). At
    most `chunk` MiB of cosines are held.
    """
    n, h, w, _ = features.shape
    features = F.normalize(features, dim=-1)
    target = F.normalize(target, dim=-1)
    y = torch.arange(h, device=target.device)
    x = torch.arange(w, device=target.device)
    near_x = (x[:, None] - x).abs() <= neighbourhood  # (w, w)
    parts = []
    for rows in y.split(max(1, at_once(chunk, n * h * w) // w)):  # r rows of the frame
        # the r' rows of the others that these may look at
        band = slice(max(int(rows[0]) - neighbourhood, 0), int(rows[-1]) + neighbourhood + 1)
        near_y = (rows[:, None] - y[band]).abs() <= neighbourhood  # (r, r')
        near = near_y[:, None, :, None] & near_x[:, None]  # (r, w, r', w)
        cosine = target[rows] @ features[:, band].flatten(0, 2).T  # (r, w, n*r'*w)
        cosine.unflatten(2, (n, -1, w)).masked_fill_(~near[:, :, None], -torch.inf)
        cosine, nearest = cosine.topk(min(k, cosine.shape[-1]))  # (r, w, k)
        weights = (cosine / temperature).softmax(-1)[..., None]  # (r, w, k, 1)
        lent = labels[:, band].flatten(0, 2)[nearest]  # (r, w, k, C)
        parts.append((weights * lent).sum(2))  # (r, w, C)
    return torch.cat(parts)


def hard_labels(labels: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Soft labels of patches (h, w, C) -> of pixels (H, W): enlarged, each label stretched to
    0 ... 1, and the largest taken."""
    soft = F.interpolate(labels.permute(2, 0, 1)[None], size, mode="bilinear")[0]  # (C, H, W)
    low = soft.amin((1, 2), keepdim=True)
    high = soft.amax((1, 2), keepdim=True)
    stretched = (soft - low) / (high - low).clamp(min=1e-8)
    return stretched.argmax(0).byte().cpu().numpy()


def first_labels(mask: np.ndarray, grid: tuple[int, int], path) -> tuple[int, Tensor]:
    """-> the number of objects, and the labels (h, w, 1 + objects) of the patches: that of the
    pixel in the middle of each."""
    objects = int(mask[mask < 255].max(initial=0))
    if not objects:
        raise InputError(f"{path}: the first mask of a sequence must show its objects")
    mask = torch.from_numpy(np.where(mask < 255, mask, 0)).float()[None, None]  # (1, 1, H, W)
    labels = F.interpolate(mask, grid, mode="nearest-exact")[0, 0].long()  # (h, w)
    return objects, F.one_hot(labels, objects + 1).float()


def score(predicted: np.ndarray, true: np.ndarray, objects: int) -> list[tuple[float, float]]:
    """J and F of each object of two masks (H, W); void pixels (255) are none of them."""
    scores = []
    for o in range(1, objects + 1):
        j = region_similarity(predicted == o, true == o)
        scores.append((j, contour_accuracy(predicted == o, true == o)))
    return scores


def region_similarity(predicted: np.ndarray, true: np.ndarray) -> float:
    """J: intersection over union of two masks (H, W); 1 where both are empty."""
    union = (predicted | true).sum()
    return float((predicted & true).sum() / union) if union else 1.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels (H, W) that differ from the one to the right, below, or right below."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right = mask != padded[:-1, 1:]
    below = mask != padded[1:, :-1]
    return right | below | (mask != padded[1:, 1:])


def contour_accuracy(predicted: np.ndarray, true: np.ndarray, tolerance: float = 0.008) -> float:
    """F: harmonic mean of boundary precision and recall of two masks (H, W).

    A boundary pixel is matched where the other boundary has one within `tolerance` of the image's
    diagonal, rounded up: what DAVIS's code finds by dilating one of them with a disk.
    """
    from sklearn.neighbors import KDTree

    radius = math.ceil(tolerance * math.hypot(*true.shape))
    ours = np.argwhere(boundary(predicted))  # (n, 2)
    theirs = np.argwhere(boundary(true))
    if not len(ours) or not len(theirs):
        return float(len(ours) == len(theirs))
    precision = (KDTree(theirs).query(ours)[0] <= radius).mean()
    recall = (KDTree(ours).query(theirs)[0] <= radius).mean()
    return float(2 * precision * recall / max(precision + recall, 1e-12))


# -------------------------------------------------------------------------------------- results


def metrics_of(row: dict) -> list[str]:
    return [name for name, value in row.items() if isinstance(value, float)]


def print_rows(rows: list[dict]) -> None:
    """One data set: a line for each layer and setup, and which layer is best."""
    names = metrics_of(rows[0])
    column = "k" if "top-1" in names else "setup"
    log(f"{'layer':>6} {column:>6} " + " ".join(f"{name + ' %':>8}" for name in names))
    for row in rows:
        values = " ".join(f"{row[name]:8.2f}" for name in names)
        log(f"{row['layer']:>6} {row['setup']:>6} {values}")
    if len({row["layer"] for row in rows}) > 1:
        best = max(rows, key=lambda row: row[names[0]])
        log(f"best: layer {best['layer']}, {best['setup']}, {names[0]} {best[names[0]]:.2f} %")


def print_side_by_side(rows: list[dict]) -> None:
    """The first metric of several data sets, a column each, as in SDSSL's Tables 2 and 4."""
    metric = metrics_of(rows[0])[0]
    columns = list(dict.fromkeys(row["data"] for row in rows))
    lines = {}
    for row in rows:
        lines.setdefault((row["layer"], row["setup"]), {})[row["data"]] = row[metric]
    names = [Path(column).name or column for column in columns]
    log(f"\n{metric} in per cent\n{'':>13} " + " ".join(f"{name:>10}" for name in [*names, "mean"]))
    for (layer, name), values in lines.items():
        values = [values[column] for column in columns]
        values.append(np.mean(values))
        log(f"{layer:>6} {name:>6} " + " ".join(f"{value:10.2f}" for value in values))


def save_results(rows: list[dict], args) -> None:
    """results.json and, of several layers, layers.png: the first metric over the layers, as in
    SDSSL's Fig. 4, beside the results of --compare."""
    folder = Path(args.output_dir)
    with replacing(folder / "results.json") as temporary:
        temporary.write_text(json.dumps({"rows": rows, "args": vars(args)}, indent=1) + "\n")
    log(f"wrote {folder / 'results.json'}")
    if args.layers == "last":
        return
    metric = metrics_of(rows[0])[0]
    curves = {}
    for other in [folder, *map(Path, args.compare or ())]:
        for row in json.loads((other / "results.json").read_text())["rows"]:
            name = f"{other.name}: {Path(row['data']).name}, {row['setup']}"
            curves.setdefault(name, []).append((row["layer"], row[metric]))
    figure, ((axis,),) = subplots(1, 1, 5, 3.5)
    for name, points in curves.items():
        layers = [layer for layer, _ in points]
        axis.plot(layers, [value for _, value in points], marker="o", label=name)
    axis.set(xlabel="layer", ylabel=f"{metric} (%)")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=7)
    figure.savefig(folder / "layers.png", dpi=100)


# ------------------------------------------------------------------------------------ arguments


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", default=["digits"],
        help=f"digits, {', '.join(DATASETS)}, or folders (default: digits)")
    add("--data_path", default="data", help="folder of named data sets (default: data)")
    add("--img_size", type=at_least(1), help="in pixels: the side (default for knn: the "
        "checkpoint's, else 224; for copy: 320), the longer side (retrieval: 512), the shorter one "
        "(video: 480)")
    add("--split", help="list of DAVIS in ImageSets/2017 (default: val)")
    add("--distractors", metavar="DIR", help="images beside the database, for retrieval and copy")
    add("--whitening", metavar="DIR", help="images to learn PCA whitening on, for retrieval, copy")
    add_checkpoint_arguments(parser)
    add = parser.add_argument_group("evaluation").add_argument
    add("--task", default="knn", choices=list(TASKS), help="(default: %(default)s)")
    add("--layers", default="last", choices=["last", "all"], help="(default: %(default)s)")
    add("--k", type=at_least(1), nargs="+", help="neighbours (10 20 100 200; video: 5)")
    add("--temperature", type=at_least(0.012),  # exp(1 / T) overflows fp32 a little below
        help="of their votes (default: 0.07; video: 0.1)")
    add("--scales", type=at_least(0.01, 4.0), nargs="+",
        help="averaged (default: 1, 0.7071 and 0.5 for retrieval, 1 for copy)")
    add("--context", type=at_least(1), help="frames before that a video's labels come from, beside "
        "the first (default: 7)")
    add("--neighbourhood", type=at_least(1), help="patches that things move at most (default: 12)")
    add("--features", metavar="FILE", help="file for k-NN's features; labels are not needed then")
    add("--compare", nargs="+", metavar="DIR", help="results to draw too (with --layers all)")
    add = parser.add_argument_group("system").add_argument
    add("--output_dir", help="for results.json and pictures (default: runs/TASK; none for knn)")
    add("--overwrite", action="store_true", help="replacement of what is there")
    add("--chunk", type=at_least(1), default=512, help="MiB of similarities at a time (512)")
    add("--batch_size", type=at_least(1), help="images per process (256 for knn, else 16)")
    add("--num_workers", type=at_least(0), default=CORES, help="processes that decode files")
    add("--seed", type=at_least(0), default=0, help="of random weights (default: 0)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="(default: fp32)")
    args = parser.parse_args()
    if args.output_dir is None and args.task != "knn":
        args.output_dir = f"runs/{args.task}"
    complete(args)
    prepare_output(args)
    return args


def complete(args) -> None:
    """Fills in the settings of the task; refuses flags of others."""
    for name in {name for settings in TASKS.values() for name in settings}:
        tasks = [task for task, settings in TASKS.items() if name in settings]
        if args.task not in tasks and getattr(args, name) is not None:
            raise InputError(f"--{name} is not for --task {args.task}, but for {', '.join(tasks)}")
        if getattr(args, name) is None:
            setattr(args, name, TASKS[args.task].get(name))
    if args.task == "video" and len(args.k) > 1:
        raise InputError("--task video takes one --k")
    if args.features is not None and len(args.data) > 1:
        raise InputError("--features takes one data set: run it once for each")


def prepare_output(args) -> None:
    """Refuses to replace files, and what cannot be compared, before the work."""
    if args.features is not None:
        refuse_to_replace([args.features], args.overwrite)
        Path(args.features).parent.mkdir(parents=True, exist_ok=True)
    if args.compare and not (args.output_dir and args.layers == "all"):
        raise InputError("--compare draws layers: it needs --layers all and --output_dir")
    for folder in args.compare or ():
        path = Path(folder) / "results.json"
        try:
            then = json.loads(path.read_text())["args"]
            if (then["task"], then["layers"]) != (args.task, "all"):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{path} holds no results of --task {args.task} --layers all to "
                             f"compare with") from None
    if args.output_dir:
        refuse_to_replace([Path(args.output_dir) / "results.json"], args.overwrite)
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)


def main() -> None:
    args = parse_arguments()
    device = setup(args)
    size = args.img_size if args.task == "knn" else None  # of other tasks images have many sizes
    backbone, meta = load_backbone(args.checkpoint, args.arch, args.patch_size, size, args.network,
                                   args.num_heads)
    backbone.to(device)
    arch = meta["backbone"]["arch"]
    if args.task in ("copy", "video") and not backbone.has_tokens:
        raise InputError(f"--task {args.task} needs patch tokens, which {arch} does not have: it "
                         f"does knn and retrieval")
    if args.img_size is None:
        args.img_size = meta["img_size"]
    log(f"on {device.type} in {args.dtype}, {world_size()} process(es)")
    settings = [f"{name} {getattr(args, name)}" for name in (*TASKS[args.task], "layers", "chunk")]
    log(f"task {args.task}: {', '.join(settings)}")

    evaluate = {"knn": knn, "retrieval": retrieval, "copy": copy_detection, "video": video}
    rows = []
    for data in args.data:
        try:
            rows_of_data = evaluate[args.task](data, backbone, meta, device, args)
        except AssertionError as error:  # how timm says that a size does not suit a model
            raise InputError(f"{arch} does not take images of this size ({error}): pass "
                             f"--img_size") from None
        for row in rows_of_data:
            layer = row["layer"] if args.layers == "all" else "last"
            rows.append({"data": data, **row, "layer": layer})
        if rows_of_data:
            print_rows(rows[-len(rows_of_data) :])
    if len(args.data) > 1 and rows:
        print_side_by_side(rows)
    if args.output_dir and rows and rank() == 0:
        save_results(rows, args)


# ---------------------------------------------------------------------- files of the benchmarks


class PickledDtype:
    """Stands for numpy.dtype while a pickle is read: numbers and strings alone, never a structure
    or a pointer."""

    def __init__(self, code, *_):
        if not re.fullmatch(r"[biufUSO]\d+", code):
            raise pickle.UnpicklingError(f"an array of type {code}")
        self.code = code
        self.order = "="

    def __setstate__(self, state):
        self.order = state[1] if state[1] in "<>" else "="

    def values(self, data, shape=(), order="C"):
        if self.code[0] == "O":  # strings, say: they stand in the pickle one by one
            return list(data)
        if isinstance(data, str):  # written by Python 2
            data = data.encode("latin1")
        return np.frombuffer(data, self.order + self.code).reshape(shape, order=order).tolist()


class PickledArray(list):
    """Stands for numpy.ndarray: a list."""

    def __init__(self, *_):
        super().__init__()

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        self[:] = dtype.values(data, shape, "F" if fortran else "C")


class PlainUnpickler(pickle.Unpickler):
    """Plain containers, and NumPy's arrays as lists; all else that a pickle could name is refused.

    NumPy's own unpickling is not trusted: it lets a dtype say that bytes are no pointers, and then
    follows them.
    """

    NUMPY = {"ndarray": PickledArray, "dtype": PickledDtype, "_reconstruct": PickledArray,
             "scalar": lambda dtype, data: dtype.values(data),
             "_frombuffer": lambda data, dtype, shape, order: dtype.values(data, shape, order)}
    MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric",
               "numpy._core.numeric")
    BYTES = {  # how Python 3 writes bytes for Python 2, and how it writes none
        ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
        ("__builtin__", "bytes"): lambda: b""}

    def find_class(self, module, name):
        if module in self.MODULES and name in self.NUMPY:
            return self.NUMPY[name]
        if (module, name) in self.BYTES:
            return self.BYTES[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_ground_truth(path: Path) -> tuple[list, list, list, list]:
    """A revisited Oxford or Paris file -> the queries' names, boxes and truths (as `search` takes
    them) and the names of the database's images."""
    boxes = []
    truths = []
    try:
        with open(path, "rb") as file:
            content = PlainUnpickler(file, encoding="latin1").load()
        images = content["imlist"]
        for truth in content["gnd"]:
            easy, hard, junk = (list(truth[kind]) for kind in ("easy", "hard", "junk"))
            if not set(easy + hard + junk) <= set(range(len(images))):
                raise ValueError("a place outside of imlist")
            left, top, right, bottom = (round(edge) for edge in truth["bbx"])
            boxes.append((left, top, right, bottom))
            truths.append({"Medium": (easy + hard, junk), "Hard": (hard, easy + junk)})
        queries = [name for name, _ in zip(content["qimlist"], truths, strict=True)]
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{path} is no ground truth: plain containers and NumPy arrays with "
                         f"imlist, qimlist and, for each query of gnd, bbx, easy, hard and junk "
                         f"({reason})") from None
    return queries, boxes, truths, images


def read_davis(folder: Path, split: str) -> list[tuple[str, list, list]]:
    """DAVIS 2017: name, frames and masks of each sequence that ImageSets/2017/SPLIT.txt names."""
    lists = folder / "ImageSets" / "2017"
    if not (lists / f"{split}.txt").is_file():
        there = ", ".join(sorted(path.stem for path in lists.glob("*.txt"))) or "none"
        raise InputError(f"no {lists}/{split}.txt: give the folder of DAVIS 2017 and a --split "
                         f"(there: {there})")
    sequences = []
    for name in (lists / f"{split}.txt").read_text().split():
        frames = sorted((folder / "JPEGImages" / "480p" / name).glob("*.jpg"))
        if len(frames) < 3:
            raise InputError(f"{len(frames)} frames in {folder}/JPEGImages/480p/{name}, which "
                             f"{split}.txt names: 3 are needed")
        masks = [folder / "Annotations" / "480p" / name / f"{frame.stem}.png" for frame in frames]
        for path in masks:
            if not path.is_file():
                raise InputError(f"no mask {path}")
        sequences.append((name, frames, masks))
    if not sequences:
        raise InputError(f"{lists}/{split}.txt names no sequence")
    return sequences


def read_mask(path, frame) -> np.ndarray:
    """(H, W) uint8: 0 background, 1 ... objects, 255 void."""
    try:
        with Image.open(path) as image, Image.open(frame) as photograph:
            if image.mode not in ("P", "L") or image.size != photograph.size:
                raise ValueError(f"not an indexed PNG of the size of {frame}")
            return np.array(image)
    except Exception as error:
        raise InputError(f"cannot read mask {path} ({' '.join(str(error).split())})") from None


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
    painted = np.where(mask[..., None] > 0, photograph // 2 + PALETTE[mask] // 2, photograph)
    Image.fromarray(painted).save(folder / "overlays" / name / f"{frame.stem}.jpg")


if __name__ == "__main__":
    launch(main)
