"""Evaluations of a frozen backbone that train nothing: k-NN, image retrieval, copy detection, video segmentation.

--task knn        A test image's k nearest training images vote for its class, each with weight exp(cos / T), as in DINO and
                  Wu et al. (instance discrimination). Several --data give one table: transfer, SDSSL's Table 4.
--task retrieval  Revisited Oxford and Paris (Table 2): other photographs of a query's building, among thousands.
--task copy       Copydays "strong" (Table 3, Fig. 4): the original of a photograph that was printed, scanned, cut, painted over.
--task video      DAVIS 2017 (Table 3, Fig. 4): the first frame's labels, carried through the video by similar patches.

    knn, retrieval   image -> backbone -> [CLS] (D,); ResNets: the average-pooled last stage --+-> (whitening) -> cosines
    copy             image -> backbone -> [CLS] and GeM of its patch tokens (2 D,) ------------+
    video            frame -> backbone -> patch tokens (h, w, D) -> cosines with those of the 7 frames before and of the first,
                     at most 12 patches away -> the 5 nearest lend their labels, with weights softmax(cos / T)

With `--layers all` every block's tokens go through the final norm (ResNets: every stage's average), in one pass over the data.
All tasks but knn write results.json into --output_dir, with `--layers all` also the curve of Fig. 4 (layers.png). video adds
masks/, which DAVIS's own evaluation reads, and overlays/, the coloured masks over the frames, of the last layer.
ViTs take any size, rounded down to whole patches. ResNets do knn and retrieval: they have no patch tokens.

    python eval_knn.py --checkpoint runs/sdssl/checkpoint.pth --data digits --layers all
    python eval_knn.py --arch vit_small --patch_size 16 --checkpoint dino_deitsmall16_pretrain.pth --data DIR
    torchrun --nproc_per_node=8 eval_knn.py --arch timm/vit_small_patch16_224.dino --data DIR   # downloads timm's weights
    python eval_knn.py --arch vit_small --data DIR                                              # random weights, the floor
    python eval_knn.py --checkpoint FILE --data DIR --features features.pth                     # labels are not needed
    python eval_knn.py --checkpoint FILE --data cifar10 cifar100 flowers102 pets cars CUB_DIR   # transfer
    python eval_knn.py --checkpoint FILE --task retrieval --data roxford5k rparis6k             # each has gnd_*.pkl and jpg/
    python eval_knn.py --checkpoint FILE --task copy --data copydays --distractors DIR --whitening DIR --layers all
    python eval_knn.py --checkpoint FILE --task video --data DAVIS --layers all --compare runs/other

    what                DINO's release, as SDSSL                      here
    retrieval: query    the whole photograph                          its box, at the whole's scale, as the benchmark has it
    retrieval: scales   1, or 3 by a flag; 224 or 512 pixels          3; 512 pixels
    copy: whitening     covariance not centred; small variances       centred; directions under 1e-5 of the largest variance
                        raised to 1e-5 of the largest                 are left out
    copy: AP            of the first 20                               of the whole ranking
    video: frames       480 x 854 become 480 x 832 (64 divides)       480 x 848 for patches of 16
    video: ties         all that tie with the fifth                   five

k-NN resizes the short side to 256/224 of --img_size and cuts out the centre; small images of one size are resized whole. k is
cut to the number of training images. Average precision is by trapezoids, precision at k with k cut to the last positive's
rank, J and F over all frames but the first and the last, then over objects: as the benchmarks' own code.

The file that --features writes is read with `torch.load(FILE, weights_only=True)`: for each split ("train", and "test" where
there is one) a dict of `features` (N, D), with `--layers all` a list of L of them; `paths`, the files in the same order, or
for data sets in memory the rows (N,); `labels` (N,), -1 where unknown; and `classes`, the names of the labels.
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
from torchvision.transforms.v2 import functional as tv

from common import (CORES, DATASETS, ImageData, InputError, Parser, add_checkpoint_arguments, at_least, autocast, barrier,
                    extract_features, find_images, fp32, knn_classifier, launch, load_backbone, load_data, log,
                    mean_over_processes, progress, rank, read_image, refuse_to_replace, replacing, save_file, setup, subplots,
                    world_size)

TASKS = {  # the settings of each, with DINO's defaults; a flag that a task does not list is not for it
    "knn": dict(img_size=None, batch_size=256, k=[10, 20, 100, 200], temperature=0.07, features=None),
    "retrieval": dict(img_size=512, batch_size=16, scales=[1.0, 0.7071, 0.5], whitening=None, distractors=None),
    "copy": dict(img_size=320, batch_size=16, scales=[1.0], whitening=None, distractors=None),
    "video": dict(img_size=480, k=[5], temperature=0.1, context=7, neighbourhood=12, split="val"),
}

# ----------------------------------------------------------------------------------------------------------- features


def split_features(data: ImageData, backbone, meta: dict, device, args) -> dict:
    """One split's features, paths, labels and classes, in the form that --features saves."""
    # training images without a label cannot vote: they are only worth extracting for a file
    rows = torch.arange(len(data)) if args.features else (data.labels >= 0).nonzero()[:, 0]  # (N,)
    features = extract_features(
        backbone, data, meta["img_size"], device, layers=args.layers == "all", rows=rows, dtype=args.dtype,
        batch_size=args.batch_size, num_workers=args.num_workers, mean=meta["mean"], std=meta["std"])  # one or L of (N, D)
    return {"features": features if args.layers == "all" else features[0], "labels": data.labels[rows],
            "paths": [data.paths[i] for i in rows.tolist()] if data.paths else rows, "classes": data.classes}


class Photographs(torch.utils.data.Dataset):
    """Whole images, or a box of each, as uint8 (3, h, w), resized bicubically to whole patches of `side` pixels.

    fit: what becomes `size` pixels: "square" both sides, "long" the longer side unless it is shorter already, "short" the
    shorter one. A box (left, top, right, bottom) keeps the scale of its image.
    """

    def __init__(self, paths: list, fit: str, size: int, side: int, boxes: list | None = None):
        self.paths, self.fit, self.size, self.side, self.boxes = paths, fit, size, side, boxes

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        image = read_image(self.paths[i])  # (3, H, W)
        scale = min(1.0, self.size / max(image.shape[1:])) if self.fit == "long" else self.size / min(image.shape[1:])
        if self.boxes:
            left, top, right, bottom = (round(edge) for edge in self.boxes[i])
            image = image[:, max(top, 0) : bottom, max(left, 0) : right]
            if not image.numel():
                raise InputError(f"the box {self.boxes[i]} of query {self.paths[i]} lies outside of the image")
        target = [self.size, self.size] if self.fit == "square" else [round(scale * length) for length in image.shape[1:]]
        target = [max(length // self.side, 1) * self.side for length in target]
        return tv.resize(image, target, tv.InterpolationMode.BICUBIC, antialias=True)

    def loader(self, rows, batch_size: int | None, num_workers: int):
        """Lists of images of many sizes, or with batch_size None one image at a time."""
        return torch.utils.data.DataLoader(self, batch_size, sampler=rows, num_workers=num_workers, generator=torch.Generator(),
                                           collate_fn=list if batch_size else None)


def layers_of(backbone, args) -> int:
    return len(backbone.layer_dims) if args.layers == "all" else 1


def gem(patches: Tensor, p: float = 4.0, eps: float = 1e-6) -> Tensor:
    """Generalised mean of patch tokens (B, h, w, D) -> (B, D): p = 1 is their mean, a large p their maximum."""
    return patches.float().clamp(min=eps).pow(p).mean((1, 2)).pow(1 / p)


def describe(backbone, x: Tensor, args) -> list[Tensor]:
    """Images (B, 3, H, W) -> descriptors (B, D) of all layers or of the last, averaged over the scales."""
    side, total = backbone.patch_size, None
    for scale in args.scales:
        size = [max(int(scale * length) // side, 1) * side for length in x.shape[-2:]]
        y = x if scale == 1 else F.interpolate(x, size, mode="bilinear")
        with autocast(x.device, args.dtype):
            if args.task == "copy":
                layers = [torch.cat([cls, gem(patches)], 1) for cls, patches in backbone.tokens(y, layers_of(backbone, args))]
            else:
                layers = backbone(y, layers=True) if args.layers == "all" else [backbone(y)]
        total = [f.float() for f in layers] if total is None else [t + f for t, f in zip(total, layers, strict=True)]
    return [t / len(args.scales) for t in total]


def descriptors(backbone, photographs: Photographs, name: str, meta: dict, device, args) -> list[Tensor]:
    """`describe` of all images, one (N, D) for each layer, on the CPU. The processes share the work and all get the result."""
    mine = range(rank(), len(photographs), world_size())
    widths = backbone.layer_dims if args.layers == "all" else [backbone.embed_dim]
    found = [torch.zeros(len(photographs), width * (2 if args.task == "copy" else 1)) for width in widths]
    start = 0
    with progress(total=len(mine), desc=name, unit="img", leave=False) as bar:
        for images in photographs.loader(mine, args.batch_size, args.num_workers):
            for shape in {image.shape for image in images}:  # those of one size go together
                places = [i for i, image in enumerate(images) if image.shape == shape]
                x = torch.stack([images[i] for i in places]).to(device).float() / 255  # (B, 3, H, W)
                rows = torch.tensor([mine[start + i] for i in places])
                for layer, f in zip(found, describe(backbone, tv.normalize(x, meta["mean"], meta["std"]), args), strict=True):
                    layer[rows] = f.cpu()
            start += len(images)
            bar.update(len(images))
    return [(mean_over_processes(layer.to(device)) * world_size()).cpu() for layer in found]


# --------------------------------------------------------------------------------------------------------------- k-NN


def top1_top5(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int, temperature: float,
              num_classes: int, chunk: int = 512) -> tuple[float, float]:
    """Per cent of test features whose class is first, or among the first five, in the votes. Processes share the queries."""
    mine = slice(rank(), None, world_size())
    queries = at_once(chunk, len(train))
    scores = knn_classifier(train, train_labels, test[mine], k, temperature, num_classes, queries)  # (m, classes)
    votes, ranked = scores.topk(min(5, num_classes), dim=1)  # (m, 5) each
    hits = ((ranked == test_labels[mine, None]) & (votes > 0)).float()  # (m, 5): a class without a vote is no hit
    found = torch.stack([hits[:, 0].sum(), hits.sum()])  # (2,)
    top1, top5 = (100 * mean_over_processes(found) * world_size() / len(test)).tolist()
    return top1, top5


def at_once(chunk: int, candidates: int) -> int:
    """How many queries are compared at a time, for `chunk` MiB of similarities."""
    return max(1, chunk * 2**18 // candidates)


def knn_rows(train: dict, test: dict, args, device) -> list[dict]:
    """Top-1 and top-5 of every layer and every k."""
    labels, num_classes = train["labels"], len(train["classes"])
    known, queried = labels >= 0, test["labels"] >= 0
    labels, test_labels = labels[known].to(device), test["labels"][queried].to(device)
    layers = [train["features"]] if args.layers == "last" else train["features"]
    test_layers = [test["features"]] if args.layers == "last" else test["features"]
    ks = list(dict.fromkeys(min(k, len(labels)) for k in args.k))  # cut to the training set, each once
    log(f"k-NN of {len(test_labels)} test among {len(labels)} training images, {num_classes} classes, T = {args.temperature}")
    rows = []
    for layer, (bank, queries) in enumerate(zip(layers, test_layers, strict=True), 1):
        bank, queries = bank[known].to(device), queries[queried].to(device)  # (N, D) (M, D)
        for k in ks:
            top1, top5 = top1_top5(bank, labels, queries, test_labels, k, args.temperature, num_classes, args.chunk)
            rows.append({"layer": layer, "setup": str(k), "top-1": top1, "top-5": top5})
    return rows


def knn(data: str, backbone, meta: dict, device, args) -> list[dict]:
    train, test = load_data(data, args.data_path)
    labelled = test is not None and train.labelled and test.labelled
    if not (labelled or args.features):
        raise InputError(f"k-NN needs labels, and {data} has none on one side: give it train/CLASS and val/CLASS folders, "
                         f"or pass --features FILE to save features without labels")
    splits = {"train": train} | ({"test": test} if test is not None else {})
    log(f"{data}: {', '.join(f'{len(part)} {name} images' for name, part in splits.items())}, {len(train.classes)} classes")
    splits = {name: split_features(part, backbone, meta, device, args) for name, part in splits.items()}
    if args.features:
        if rank() == 0:
            save_file(splits, Path(args.features))
        barrier()
        log(f"features saved in {args.features}")
    if labelled:
        return knn_rows(splits["train"], splits["test"], args, device)
    log("k-NN skipped: it needs labels in a training and a test split")
    return []


# ---------------------------------------------------------------------------------------------------------- retrieval


class _Dtype:
    """Stands for numpy.dtype while a pickle is read: numbers and strings alone, never a structure or a pointer."""

    def __init__(self, code, *_):
        if not re.fullmatch(r"[biufUSO]\d+", code):
            raise pickle.UnpicklingError(f"an array of type {code}")
        self.code, self.order = code, "="

    def __setstate__(self, state):
        self.order = state[1] if state[1] in "<>" else "="

    def values(self, data, shape=(), order="C"):
        if self.code[0] == "O":  # strings, say: they stand in the pickle one by one
            return list(data)
        data = data.encode("latin1") if isinstance(data, str) else data  # written by Python 2
        return np.frombuffer(data, self.order + self.code).reshape(shape, order=order).tolist()


class _Array(list):
    """Stands for numpy.ndarray: a list."""

    def __init__(self, *_):
        super().__init__()

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        self[:] = dtype.values(data, shape, "F" if fortran else "C")


class PlainUnpickler(pickle.Unpickler):
    """Plain containers, and NumPy's arrays as lists; everything else that a pickle could name is refused.

    NumPy's own unpickling is not trusted: it lets a dtype say that bytes are no pointers, and then follows them.
    """

    NUMPY = {"ndarray": _Array, "dtype": _Dtype, "_reconstruct": _Array, "scalar": lambda dtype, data: dtype.values(data),
             "_frombuffer": lambda data, dtype, shape, order: dtype.values(data, shape, order)}
    BYTES = {("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),  # how Python 3 writes bytes for Python 2,
             ("__builtin__", "bytes"): lambda: b""}  # and how it writes none

    def find_class(self, module, name):
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric"):
            if name in self.NUMPY:
                return self.NUMPY[name]
        if (module, name) in self.BYTES:
            return self.BYTES[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_ground_truth(path: Path) -> dict:
    """A revisited Oxford or Paris file: imlist, qimlist, and for each query of gnd its bbx, easy, hard and junk."""
    try:
        with open(path, "rb") as file:
            content = PlainUnpickler(file, encoding="latin1").load()
    except Exception as error:
        raise InputError(f"{path} is refused: a ground truth holds plain containers and NumPy arrays only "
                         f"({' '.join(str(error).split())[:120] or type(error).__name__})") from None
    try:
        images, queries, gnd = content["imlist"], content["qimlist"], content["gnd"]
        sound = images and queries and len(queries) == len(gnd) and all(Path(name).name == name for name in [*images, *queries])
        for truth in gnd:
            sound = sound and len(truth["bbx"]) == 4 and all(math.isfinite(edge) for edge in truth["bbx"])
            places = [*truth["easy"], *truth["hard"], *truth["junk"]]
            sound = sound and all(place in range(len(images)) for place in places)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise InputError(f"{path} is no ground truth: it needs imlist and qimlist, names of images and not empty, and gnd, for "
                         f"each query its bbx (4 numbers) and easy, hard and junk (places in imlist)")
    return content


def average_precision(ranks: list[int], positives: int) -> float:
    """Area under precision-recall, by trapezoids: the benchmark's rule. ranks: of the positives found, from 0, ascending."""
    before = [j / rank if rank else 1.0 for j, rank in enumerate(ranks)]  # precision just above each positive
    after = [(j + 1) / (rank + 1) for j, rank in enumerate(ranks)]  # and with it
    return sum(a + b for a, b in zip(before, after, strict=True)) / (2 * positives)


def judge(similarity: Tensor, positives, junk=(), ks=(1, 5, 10)) -> list[float]:
    """Average precision and precision at each k of one query's similarities (N,); junk is as if it were not there.

    k is cut to the rank of the last positive, so that 3 positives on top are a precision at 10 of 1.
    """
    kind = torch.zeros(len(similarity), dtype=torch.long)
    kind[list(junk)] = 2
    kind[list(positives)] = 1
    kind = kind[similarity.argsort(descending=True, stable=True).cpu()]  # ranked
    found = kind[kind < 2] == 1
    ranks = found.nonzero()[:, 0].tolist()
    cut = [min(k, ranks[-1] + 1) for k in ks]
    return [average_precision(ranks, len(ranks))] + [found[:k].float().mean().item() for k in cut]


@fp32
def whitening(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and matrix (D, K) after which features (N, D) are uncorrelated, with variance 1."""
    centred = (features - features.mean(0)).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(features))  # ascending
    keep = values > 1e-5 * values[-1]
    if not keep.any():
        raise InputError(f"whitening cannot be learnt from {len(features)} images that are all alike: give more of them")
    return features.mean(0), (vectors[:, keep] / values[keep].sqrt()).float()


def search(data: str, queries: Photographs, database: Photographs, judged: dict, backbone, meta, device, args) -> list[dict]:
    """mAP and mP@k in per cent, a row for each layer and setup. judged: for each setup, each query's positives and junk."""
    if not any(positives for truths in judged.values() for positives, _ in truths):
        raise InputError(f"{data}: no query has a positive image")
    options, others = (database.fit, database.size, database.side), {"distractors": [], "whitening": []}
    for name in others:
        folder = getattr(args, name)
        others[name] = find_images(Path(folder)) if folder else []
        if folder and not others[name]:
            raise InputError(f"no images under --{name} {folder}")
    parts = {"queries": queries, "database": Photographs(database.paths + others["distractors"], *options),
             "whitening": Photographs(others["whitening"], *options)}
    log(f"{data}: {len(queries)} queries among {len(database)} images and {len(others['distractors'])} distractors; "
        + (f"whitening learnt on {len(others['whitening'])} images" if args.whitening else "no whitening"))
    parts = [descriptors(backbone, part, name, meta, device, args) for name, part in parts.items()]
    rows = []
    for layer, (asked, bank, extra) in enumerate(zip(*parts, strict=True), 1):
        if args.whitening:
            mean, matrix = whitening(extra)
            asked, bank = ((part - mean) @ matrix for part in (asked, bank))  # (M, K) (N, K)
        asked, bank = F.normalize(asked.to(device), dim=1), F.normalize(bank.to(device), dim=1)
        scores, at = {setup: [] for setup in judged}, 0
        for some in asked.split(at_once(args.chunk, len(bank))):
            for at, similarity in enumerate(some @ bank.T, at):  # (N,)
                for setup, truths in judged.items():
                    if truths[at][0]:  # a query without positives does not count
                        scores[setup].append(judge(similarity, *truths[at]))
            at += 1
        for setup, found in scores.items():
            if found:
                means = (100 * np.mean(found, 0)).tolist()
                rows.append({"layer": layer, "setup": setup} | dict(zip(("mAP", "mP@1", "mP@5", "mP@10"), means, strict=True)))
    return rows


def retrieval(data: str, backbone, meta: dict, device, args) -> list[dict]:
    """Revisited Oxford or Paris: DIR/gnd_*.pkl and DIR/jpg/NAME.jpg."""
    found = sorted(Path(data).glob("gnd_*.pkl"))
    if len(found) != 1:
        raise InputError(f"{data} has {len(found) or 'no'} gnd_*.pkl: give the folder of revisited Oxford or Paris")
    content = read_ground_truth(found[0])
    queries, images = ([str(Path(data) / "jpg" / f"{name}.jpg") for name in content[names]] for names in ("qimlist", "imlist"))
    for path in queries + images:
        if not Path(path).is_file():
            raise InputError(f"no image {path}, which {found[0].name} names")
    easy, hard, junk = ([list(truth[kind]) for truth in content["gnd"]] for kind in ("easy", "hard", "junk"))
    judged = {"Medium": [(e + h, j) for e, h, j in zip(easy, hard, junk, strict=True)],
              "Hard": [(h, e + j) for e, h, j in zip(easy, hard, junk, strict=True)]}
    options, boxes = ("long", args.img_size, backbone.patch_size), [list(truth["bbx"]) for truth in content["gnd"]]
    queries, images = Photographs(queries, *options, boxes), Photographs(images, *options)
    return search(data, queries, images, judged, backbone, meta, device, args)


# ----------------------------------------------------------------------------------------------------- copy detection


def copy_detection(data: str, backbone, meta: dict, device, args) -> list[dict]:
    """Copydays: DIR/original and DIR/strong. The first four characters of a name say which original a copy is of."""
    originals, copies = (find_images(Path(data) / part) for part in ("original", "strong"))
    if not originals or not copies:
        raise InputError(f"no images under {data}/{'strong' if originals else 'original'}: Copydays has original/ and strong/")
    places = {Path(path).name[:4]: i for i, path in enumerate(originals)}
    if len(places) < len(originals):
        raise InputError(f"{data}/original: several names begin with the same four characters, which tell the originals apart")
    lost = [path for path in copies if Path(path).name[:4] not in places]
    if lost:
        raise InputError(f"{lost[0]} is a copy of nothing: no name in {data}/original begins with {Path(lost[0]).name[:4]}")
    judged = {"strong": [([places[Path(path).name[:4]]], ()) for path in copies]}
    options = ("square", args.img_size, backbone.patch_size)
    return search(data, Photographs(copies, *options), Photographs(originals, *options), judged, backbone, meta, device, args)


# ------------------------------------------------------------------------------------------------- video segmentation


def region_similarity(found: np.ndarray, true: np.ndarray, void: np.ndarray | None = None) -> float:
    """J: intersection over union of two masks (H, W); 1 where both are empty. Void pixels do not count."""
    valid = True if void is None else ~void
    union = ((found | true) & valid).sum()
    return float((found & true & valid).sum() / union) if union else 1.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels (H, W) that differ from the one to the right, below, or right below."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def contour_accuracy(found: np.ndarray, true: np.ndarray, void: np.ndarray | None = None, tolerance: float = 0.008) -> float:
    """F: harmonic mean of boundary precision and recall of two masks (H, W).

    A boundary pixel is matched where the other boundary has one within `tolerance` of the image's diagonal, rounded up: what
    DAVIS's code finds by dilating one of them with a disk.
    """
    from sklearn.neighbors import KDTree

    valid, radius = True if void is None else ~void, math.ceil(tolerance * math.hypot(*true.shape))
    found, true = (np.argwhere(boundary(mask & valid)) for mask in (found, true))  # (n, 2)
    if not len(found) or not len(true):
        return float(len(found) == len(true))
    precision, recall = ((KDTree(b).query(a)[0] <= radius).mean() for a, b in ((found, true), (true, found)))
    return float(2 * precision * recall / max(precision + recall, 1e-12))


def score(found: np.ndarray, true: np.ndarray, objects: int) -> list[tuple[float, float]]:
    """J and F of each object of two masks (H, W)."""
    return [(region_similarity(found == o, true == o, true == 255), contour_accuracy(found == o, true == o, true == 255))
            for o in range(1, objects + 1)]


@fp32
def propagate(features: Tensor, labels: Tensor, target: Tensor, k: int = 5, temperature: float = 0.1, neighbourhood: int = 12,
              chunk: int = 512) -> Tensor:
    """Labels of a frame (h, w, C) from those of n others: features (n, h, w, D), labels (n, h, w, C), its features (h, w, D).

    Each patch takes the labels of the k patches of greatest cosine, among all that are at most `neighbourhood` rows and
    columns away in any of the frames, with weights softmax(cos / T). At most `chunk` MiB of cosines are held.
    """
    n, h, w, _ = features.shape
    features, target = F.normalize(features, dim=-1), F.normalize(target, dim=-1)
    y, x = (torch.arange(length, device=target.device) for length in (h, w))
    near_x = (x[:, None] - x).abs() <= neighbourhood  # (w, w)
    found = []
    for rows in y.split(max(1, at_once(chunk, n * h * w) // w)):
        band = slice(max(int(rows[0]) - neighbourhood, 0), int(rows[-1]) + neighbourhood + 1)  # r' rows that these r may look at
        near = ((rows[:, None] - y[band]).abs() <= neighbourhood)[:, None, :, None] & near_x[:, None]  # (r, w, r', w)
        cosine = target[rows] @ features[:, band].flatten(0, 2).T  # (r, w, n*r'*w)
        cosine.unflatten(2, (n, -1, w)).masked_fill_(~near[:, :, None], -torch.inf)
        cosine, nearest = cosine.topk(min(k, cosine.shape[-1]))  # (r, w, k)
        weights = (cosine / temperature).softmax(-1)[..., None]  # (r, w, k, 1)
        found.append((weights * labels[:, band].flatten(0, 2)[nearest]).sum(2))  # (r, w, C)
    return torch.cat(found)


def hard_labels(labels: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Soft labels of patches (h, w, C) -> of pixels (H, W): enlarged, each label stretched to 0 ... 1, and the largest taken."""
    soft = F.interpolate(labels.permute(2, 0, 1)[None], size, mode="bilinear")[0]  # (C, H, W)
    low, high = soft.amin((1, 2), keepdim=True), soft.amax((1, 2), keepdim=True)
    return ((soft - low) / (high - low).clamp(min=1e-8)).argmax(0).byte().cpu().numpy()


def read_mask(path, frame) -> np.ndarray:
    """(H, W) uint8: 0 background, 1 ... objects, 255 void."""
    try:
        with Image.open(path) as image, Image.open(frame) as photograph:
            sound, mask = image.mode in ("P", "L") and image.size == photograph.size, np.array(image)
    except Exception as error:
        raise InputError(f"cannot read mask {path} ({' '.join(str(error).split())})") from None
    if not sound:
        raise InputError(f"{path} is no mask of {frame}: an indexed PNG of its size, with the number of the object at each pixel")
    return mask


def read_davis(folder: Path, split: str) -> list[tuple[str, list, list]]:
    """DAVIS 2017: the name, frames and masks of each sequence that ImageSets/2017/SPLIT.txt names."""
    lists, sequences = folder / "ImageSets" / "2017", []
    if not (lists / f"{split}.txt").is_file():
        there = ", ".join(sorted(path.stem for path in lists.glob("*.txt"))) or "none"
        raise InputError(f"no {lists}/{split}.txt: give the folder of DAVIS 2017 and a --split (there: {there})")
    for name in (lists / f"{split}.txt").read_text().split():
        frames = sorted((folder / "JPEGImages" / "480p" / name).glob("*.jpg"))
        masks = [folder / "Annotations" / "480p" / name / f"{frame.stem}.png" for frame in frames]
        if len(frames) < 3:
            raise InputError(f"{len(frames)} frames in {folder}/JPEGImages/480p/{name}, which {split}.txt names: 3 are needed")
        for path in masks:
            if not path.is_file():
                raise InputError(f"no mask {path}")
        sequences.append((name, frames, masks))
    if not sequences:
        raise InputError(f"{lists}/{split}.txt names no sequence")
    return sequences


def first_labels(mask: np.ndarray, grid: tuple[int, int], path) -> tuple[int, Tensor]:
    """-> the number of objects, and the labels (h, w, 1 + objects) of the patches: that of the pixel in the middle of each."""
    objects = int(mask[mask < 255].max(initial=0))
    if not objects:
        raise InputError(f"{path}: the first mask of a sequence must show its objects")
    mask = torch.from_numpy(np.where(mask < 255, mask, 0)).float()[None, None]  # (1, 1, H, W)
    return objects, F.one_hot(F.interpolate(mask, grid, mode="nearest-exact")[0, 0].long(), objects + 1).float()


COLOURS = np.resize(np.array([(255, 70, 70), (70, 200, 70), (80, 120, 255), (255, 200, 40), (220, 90, 220), (60, 210, 210),
                              (255, 140, 40)], np.uint8), (256, 3))
COLOURS[0] = 0  # the background


def write_masks(folder: Path, name: str, frame: Path, mask: np.ndarray) -> None:
    """masks/NAME/FRAME.png, indexed, and overlays/NAME/FRAME.jpg, the coloured mask over the frame."""
    for kind in ("masks", "overlays"):
        (folder / kind / name).mkdir(parents=True, exist_ok=True)
    indexed = Image.fromarray(mask)
    indexed.putpalette(COLOURS.flatten().tolist())
    indexed.save(folder / "masks" / name / f"{frame.stem}.png")
    photograph = read_image(frame).permute(1, 2, 0).numpy()
    painted = np.where(mask[..., None] > 0, photograph // 2 + COLOURS[mask] // 2, photograph)
    Image.fromarray(painted).save(folder / "overlays" / name / f"{frame.stem}.jpg")


class Tracker:
    """Carries labels (h, w, C) from the first frame's features (h, w, D) to those of each frame that follows."""

    def __init__(self, features: Tensor, labels: Tensor, args):
        self.first, self.recent, self.args = (features, labels), deque(maxlen=args.context), args

    def __call__(self, target: Tensor) -> Tensor:
        features, labels = (torch.stack(frames) for frames in zip(self.first, *self.recent, strict=True))  # (n, h, w, ...)
        args = self.args
        labels = propagate(features, labels, target, args.k[0], args.temperature, args.neighbourhood, args.chunk)
        self.recent.append((target, labels))
        return labels


def video(data: str, backbone, meta: dict, device, args) -> list[dict]:
    """J and F of each layer. Processes share the sequences; the masks of the last layer are written."""
    sequences, side = read_davis(Path(data), args.split), backbone.patch_size
    mine = sequences[rank() :: world_size()]
    photographs = Photographs([str(frame) for _, frames, _ in mine for frame in frames], "short", args.img_size, side)
    images = iter(photographs.loader(range(len(photographs)), None, args.num_workers))
    layers = len(backbone.layer_dims) if args.layers == "all" else 1
    totals = torch.zeros(layers, 3)  # sums of J and of F over all objects, and their number
    log(f"{data}: {len(sequences)} sequences of {args.split}, {sum(len(frames) for _, frames, _ in sequences)} frames")
    with progress(total=len(photographs), desc="video", unit="frame", leave=False) as bar:
        for name, frames, masks in mine:
            scores = []  # (frames, L, objects, 2)
            for i, (frame, path) in enumerate(zip(frames, masks, strict=True)):
                true, x = read_mask(path, frame), next(images)[None].to(device).float() / 255  # (H, W), (1, 3, h*side, w*side)
                with autocast(device, args.dtype):
                    tokens = backbone.tokens(tv.normalize(x, meta["mean"], meta["std"]), layers_of(backbone, args))
                features = [patches[0].float() for _, patches in tokens]  # L of (h, w, D)
                if i == 0:
                    objects, labels = first_labels(true, features[0].shape[:2], path)
                    trackers, found = [Tracker(layer, labels.to(device), args) for layer in features], [true]
                else:
                    labels = [track(layer) for track, layer in zip(trackers, features, strict=True)]  # L of (h, w, C)
                    found = [hard_labels(soft, true.shape) for soft in labels]  # L of (H, W)
                if 0 < i < len(frames) - 1:  # DAVIS does not count the first and the last
                    scores.append([score(mask, true, objects) for mask in found])
                write_masks(Path(args.output_dir), name, frame, found[-1])
                bar.update()
            totals += F.pad(torch.tensor(scores).mean(0).sum(1), (0, 1), value=objects)  # (L, 3)
    totals = mean_over_processes(totals.to(device)) * world_size()  # (L, 3)
    means = (100 * totals[:, :2] / totals[:, 2:]).tolist()  # over all objects
    return [{"layer": layer, "setup": args.split, "J&F": (j + f) / 2, "J": j, "F": f} for layer, (j, f) in enumerate(means, 1)]


# ------------------------------------------------------------------------------------------------------------ results


def metrics_of(row: dict) -> list[str]:
    return [name for name, value in row.items() if isinstance(value, float)]


def print_rows(rows: list[dict]) -> None:
    """One data set: a line for each layer and setup, and which layer is best."""
    names = metrics_of(rows[0])
    log(f"{'layer':>6} {'k' if 'top-1' in names else 'setup':>6} " + " ".join(f"{name + ' %':>8}" for name in names))
    for row in rows:
        log(f"{row['layer']:>6} {row['setup']:>6} " + " ".join(f"{row[name]:8.2f}" for name in names))
    if len({row["layer"] for row in rows}) > 1:
        best = max(rows, key=lambda row: row[names[0]])
        log(f"best: layer {best['layer']}, {best['setup']}, {names[0]} {best[names[0]]:.2f} %")


def print_side_by_side(rows: list[dict]) -> None:
    """The first metric of several data sets, a column each, as in SDSSL's Tables 2 and 4."""
    columns, lines, metric = list(dict.fromkeys(row["data"] for row in rows)), {}, metrics_of(rows[0])[0]
    for row in rows:
        lines.setdefault((row["layer"], row["setup"]), {})[row["data"]] = row[metric]
    log(f"\n{metric} in per cent\n{'':>13} " + " ".join(f"{Path(name).name or name:>10}" for name in [*columns, "mean"]))
    for (layer, setup), found in lines.items():
        mean = sum(found.values()) / len(columns) if len(found) == len(columns) else math.nan
        values = [found.get(name, math.nan) for name in columns] + [mean]  # none where k was cut to a smaller training set
        log(f"{layer:>6} {setup:>6} " + " ".join(f"{value:10.2f}" for value in values).replace("nan", "  -"))


def save_results(rows: list[dict], args) -> None:
    """results.json and, of several layers, layers.png: the first metric over the layers, as in SDSSL's Fig. 4."""
    folder, metric = Path(args.output_dir), metrics_of(rows[0])[0]
    with replacing(folder / "results.json") as temporary:
        temporary.write_text(json.dumps({"rows": rows, "args": vars(args)}, indent=1) + "\n")
    log(f"wrote {folder / 'results.json'}")
    if args.layers == "last":
        return
    curves = {}
    for other in [folder, *map(Path, args.compare or ())]:
        for row in json.loads((other / "results.json").read_text())["rows"]:
            curves.setdefault(f"{other.name}: {Path(row['data']).name}, {row['setup']}", []).append((row["layer"], row[metric]))
    figure, ((axis,),) = subplots(1, 1, 5, 3.5)
    for name, points in curves.items():
        axis.plot(*zip(*points, strict=True), marker="o", label=name)
    axis.set(xlabel="layer", ylabel=f"{metric} (%)")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=7)
    figure.savefig(folder / "layers.png", dpi=100)


# ---------------------------------------------------------------------------------------------------------- arguments


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    group = parser.add_argument_group("data")
    names = f"digits, {', '.join(DATASETS)}, or folders (default: digits)"
    group.add_argument("--data", nargs="+", default=["digits"], help=names)
    group.add_argument("--data_path", default="data", help="where named data sets are, or are downloaded to (default: data)")
    group.add_argument("--img_size", type=int, help="in pixels: the side (default for knn: the checkpoint's, else 224; for "
                       "copy: 320), the longer side (retrieval: 512), the shorter one (video: 480)")
    group.add_argument("--split", help="list of DAVIS in ImageSets/2017 (default: val)")
    group.add_argument("--distractors", metavar="DIR", help="images to add to the database, for retrieval and copy")
    group.add_argument("--whitening", metavar="DIR", help="other images to learn PCA whitening on, for retrieval and copy")
    add_checkpoint_arguments(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--task", default="knn", choices=list(TASKS), help="(default: %(default)s)")
    group.add_argument("--layers", default="last", choices=["last", "all"], help="(default: %(default)s)")
    group.add_argument("--k", type=int, nargs="+", help="neighbours (default: 10 20 100 200; video: 5)")
    group.add_argument("--temperature", type=float, help="of their votes (default: 0.07; video: 0.1)")
    group.add_argument("--scales", type=float, nargs="+", help="averaged (default: 1, 0.7071 and 0.5 for retrieval, 1 for copy)")
    group.add_argument("--context", type=int, help="frames before that a video's labels come from, beside the first (default: 7)")
    group.add_argument("--neighbourhood", type=int, help="patches that things move at most in a video (default: 12)")
    group.add_argument("--features", metavar="FILE", help="save k-NN's features here; the images may then be without labels")
    group.add_argument("--compare", nargs="+", metavar="DIR", help="draw the layers of these results too (with --layers all)")
    group = parser.add_argument_group("system")
    group.add_argument("--output_dir", help="for results.json and pictures (default: runs/TASK; none for knn)")
    group.add_argument("--overwrite", action="store_true", help="replace the results that output_dir holds")
    group.add_argument("--chunk", type=int, default=512, help="MiB of similarities held at a time (default: %(default)s)")
    group.add_argument("--batch_size", type=int, help="images per process (default: 256 for knn, else 16)")
    group.add_argument("--num_workers", type=at_least(0), default=CORES, help="that decode files (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="of random weights (default: %(default)s)")
    group.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    group.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast (default: %(default)s)")
    args = parser.parse_args()

    settings = TASKS[args.task]
    for name in {name for task in TASKS.values() for name in task}:
        if name not in settings and getattr(args, name) is not None:
            raise InputError(f"--{name} is not for --task {args.task}, but for {', '.join(t for t in TASKS if name in TASKS[t])}")
        if getattr(args, name) is None:
            setattr(args, name, settings.get(name))
    for name in ("img_size", "patch_size", "batch_size", "chunk", "k", "context", "neighbourhood"):
        value = getattr(args, name)
        if value is not None and min(value if name == "k" else [value]) < 1:
            raise InputError(f"--{name} must be at least 1, not {min(value) if name == 'k' else value}")
    if args.temperature is not None and not args.temperature >= 0.012:  # exp(1 / T) overflows fp32 a little below
        raise InputError(f"--temperature must be at least 0.012, not {args.temperature}")
    if args.scales and not 0 < min(args.scales) <= max(args.scales) <= 4:
        raise InputError(f"--scales must be above 0 and at most 4, not {' '.join(map(str, args.scales))}")
    if args.task == "video" and len(args.k) > 1:
        raise InputError("--task video takes one --k")
    if args.features and Path(args.features).is_dir():
        raise InputError(f"--features {args.features} is a directory: name a file, such as {args.features}/features.pth")
    if args.features:
        refuse_to_replace([args.features], args.overwrite)
        Path(args.features).parent.mkdir(parents=True, exist_ok=True)
    if args.features and len(args.data) > 1:
        raise InputError("--features takes one data set: run it once for each")
    args.output_dir = args.output_dir or (None if args.task == "knn" else f"runs/{args.task}")
    if args.compare and not (args.output_dir and args.layers == "all"):
        raise InputError("--compare draws layers: it needs --layers all and --output_dir")
    for folder in args.compare or ():
        path = Path(folder) / "results.json"
        try:
            then = json.loads(path.read_text())["args"]
            if (then["task"], then["layers"]) != (args.task, "all"):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{path} holds no results of --task {args.task} --layers all to compare with") from None
    if args.output_dir and (Path(args.output_dir) / "results.json").is_file() and not args.overwrite:
        raise InputError(f"{args.output_dir} already holds results: pass --overwrite or another --output_dir")
    if args.output_dir:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    return args


def main():
    args = parse_arguments()
    device = setup(args)
    own_size = args.img_size if args.task == "knn" else None  # the other tasks have images of many sizes
    backbone, meta = load_backbone(args.checkpoint, args.arch, args.patch_size, own_size, args.network, args.num_heads)
    backbone.to(device)
    arch, network = meta["backbone"]["arch"], args.network or meta.get("network")
    if args.task in ("copy", "video") and not backbone.has_tokens:
        raise InputError(f"--task {args.task} needs patch tokens, which {arch} does not have: it does knn and retrieval")
    source = f"{args.checkpoint}{f' ({network})' if network else ''}" if args.checkpoint else (
        "timm's pretrained weights" if arch.startswith("timm/") else "random weights, for want of --checkpoint")
    args.img_size = args.img_size or meta["img_size"]
    log(f"{arch} with {source}, at {args.img_size} pixels; on {device.type} in {args.dtype}, {world_size()} process(es)")
    log(f"task {args.task}: " + ", ".join(f"{name} {getattr(args, name)}" for name in (*TASKS[args.task], "layers", "chunk")))

    rows, evaluate = [], {"knn": knn, "retrieval": retrieval, "copy": copy_detection, "video": video}[args.task]
    for data in args.data:
        try:
            found = evaluate(data, backbone, meta, device, args)
        except AssertionError as error:  # how timm says that a size does not suit a model
            raise InputError(f"{arch} does not take images of this size ({error}): pass --img_size") from None
        if found:
            found = [{"data": data, **row, "layer": row["layer"] if args.layers == "all" else "last"} for row in found]
            print_rows(found)
        rows += found
    if len(args.data) > 1 and rows:
        print_side_by_side(rows)
    if args.output_dir and rows and rank() == 0:
        save_results(rows, args)


if __name__ == "__main__":
    launch(main)
