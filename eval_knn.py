"""k-NN evaluation of frozen features, as in DINO and Wu et al. (Unsupervised Feature Learning via Instance Discrimination).

Nothing is trained. Every image becomes one feature, the [CLS] token after the final norm (ResNets: the average-pooled last
stage). A test image's k nearest training images vote for their class, each with weight exp(cos / T):

    training images -> backbone -> features (N, D), normalised --+
                                                                 +--> cos (M, N) -> k nearest -> votes (M, classes)
    test images     -> backbone -> features (M, D), normalised --+

Protocol: cosine similarity, T = 0.07, k = 10, 20, 100, 200, top-1 and top-5 in per cent. No augmentation: files have their
short side resized to 256/224 of --img_size (bicubic) and the centre cut out; small images of one size are resized whole.
k is cut to the number of training images; training images without a label do not vote. Features are made in fp32.
With `--layers all` every block's [CLS] goes through the final norm (ResNets: every stage's average), in one pass over the data.

Our checkpoints say their architecture, sizes and normalisation; DINO, iBOT, MoCo v3 and timm weights need --arch and, for
ViTs, --patch_size. They are normalised by ImageNet's mean and deviation, and `--arch timm/NAME` by that model's own.

    python eval_knn.py --checkpoint runs/sdssl/checkpoint.pth --data digits
    python eval_knn.py --checkpoint runs/sdssl/checkpoint.pth --data digits --layers all --network teacher
    python eval_knn.py --arch vit_small --patch_size 16 --checkpoint dino_deitsmall16_pretrain.pth --data DIR
    torchrun --nproc_per_node=8 eval_knn.py --arch timm/vit_small_patch16_224.dino --data DIR   # downloads timm's weights
    python eval_knn.py --arch vit_small --data DIR                                              # random weights, the floor
    python eval_knn.py --checkpoint runs/sdssl/checkpoint.pth --data DIR --features features.pth  # labels are not needed

The file that --features writes is read with `torch.load(FILE, weights_only=True)`: for each split ("train", and "test" where
there is one) a dict of `features` (N, D), with `--layers all` a list of L of them; `paths`, the files in the same order, or
for data sets in memory the rows (N,); `labels` (N,), -1 where unknown; and `classes`, the names of the labels.
"""
import argparse
from pathlib import Path

import torch
from torch import Tensor

from common import (CORES, DATASETS, RESNETS, VITS, ImageData, InputError, barrier, extract_features, knn_classifier, load_backbone,
                    load_data, log, mean_over_processes, non_negative, rank, run, save_file, setup, world_size)

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


# --------------------------------------------------------------------------------------------------------------- k-NN


def top1_top5(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int, temperature: float,
              num_classes: int) -> tuple[float, float]:
    """Per cent of test features whose class is first, or among the first five, in the votes. Processes share the queries."""
    mine = slice(rank(), None, world_size())
    chunk = max(1, 2**27 // len(train))  # 512 MiB of similarities at a time
    scores = knn_classifier(train, train_labels, test[mine], k, temperature, num_classes, chunk)  # (m, classes)
    ranked = scores.topk(min(5, num_classes), dim=1).indices  # (m, 5)
    hits = (ranked == test_labels[mine, None]).float()  # (m, 5)
    found = torch.stack([hits[:, 0].sum(), hits.sum()])  # (2,)
    top1, top5 = (100 * mean_over_processes(found) * world_size() / len(test)).tolist()
    return top1, top5


def print_table(train: dict, test: dict, args, device) -> None:
    """Top-1 and top-5 of every layer and every k."""
    labels, num_classes = train["labels"], len(train["classes"])
    known, queried = labels >= 0, test["labels"] >= 0
    labels, test_labels = labels[known].to(device), test["labels"][queried].to(device)
    layers = [train["features"]] if args.layers == "last" else train["features"]
    test_layers = [test["features"]] if args.layers == "last" else test["features"]
    ks = list(dict.fromkeys(min(k, len(labels)) for k in args.k))  # cut to the training set, each once
    log(f"k-NN of {len(test_labels)} test among {len(labels)} training images, {num_classes} classes, T = {args.temperature}")
    log(f"{'layer':>6} {'k':>6} {'top-1 %':>8} {'top-5 %':>8}")
    for number, (bank, queries) in enumerate(zip(layers, test_layers, strict=True), 1):
        bank, queries = bank[known].to(device), queries[queried].to(device)  # (N, D) (M, D)
        for k in ks:
            top1, top5 = top1_top5(bank, labels, queries, test_labels, k, args.temperature, num_classes)
            log(f"{number if args.layers == 'all' else 'last':>6} {k:>6} {top1:8.2f} {top5:8.2f}")


# ---------------------------------------------------------------------------------------------------------- arguments


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="k-NN evaluation of frozen features, and feature extraction")
    group = parser.add_argument_group("data")
    group.add_argument("--data", default="digits", help=f"digits, {', '.join(DATASETS)}, or a directory (default: %(default)s)")
    group.add_argument("--data_path", default="data", help="where named data sets are, or are downloaded to (default: data)")
    group.add_argument("--img_size", type=int, help="side of the images in pixels (default: the checkpoint's, else 224)")
    group = parser.add_argument_group("model")
    group.add_argument("--checkpoint", metavar="FILE", help="ours, or weights of DINO, iBOT, MoCo v3 or timm "
                       "(default: random weights, or timm's pretrained ones for timm/NAME)")
    group.add_argument("--arch", help=f"{', '.join([*VITS, *RESNETS])} or timm/NAME (default: the checkpoint's)")
    group.add_argument("--patch_size", type=int, help="side of a ViT's patches in pixels (default: the checkpoint's, else 16)")
    group.add_argument("--network", choices=["student", "teacher"], help="which one of the checkpoint (default: "
                       "the one that its method evaluates; the teacher of DINO and iBOT, the student of MoCo v3)")
    group = parser.add_argument_group("evaluation")
    group.add_argument("--layers", default="last", choices=["last", "all"], help="(default: %(default)s)")
    group.add_argument("--k", type=int, nargs="+", default=[10, 20, 100, 200], help="neighbours (default: 10 20 100 200)")
    group.add_argument("--temperature", type=float, default=0.07, help="(default: %(default)s)")
    group.add_argument("--features", metavar="FILE", help="save the features here; the images may then be without labels")
    group = parser.add_argument_group("system")
    group.add_argument("--batch_size", type=int, default=256, help="images per process (default: %(default)s)")
    group.add_argument("--num_workers", type=non_negative, default=CORES, help="that decode files (default: %(default)s)")
    group.add_argument("--seed", type=non_negative, default=0, help="of random weights (default: %(default)s)")
    group.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    group.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast (default: %(default)s)")
    args = parser.parse_args()
    sizes = {"--img_size": args.img_size, "--patch_size": args.patch_size, "--batch_size": args.batch_size, "--k": min(args.k)}
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    if args.temperature < 0.012:  # exp(1 / T) overflows fp32 a little below, and every vote would be infinite
        raise InputError(f"--temperature must be at least 0.012, not {args.temperature}")
    if args.features and Path(args.features).is_dir():
        raise InputError(f"--features {args.features} is a directory: name a file, such as {args.features}/features.pth")
    return args


def main():
    args = parse_arguments()
    device = setup(args)
    backbone, meta = load_backbone(args.checkpoint, args.arch, args.patch_size, args.img_size, args.network)
    backbone.to(device)
    train, test = load_data(args.data, args.data_path)
    labelled = test is not None and train.labelled and test.labelled
    if not (labelled or args.features):
        raise InputError(f"k-NN needs labels, and {args.data} has none on one side: give it train/CLASS and val/CLASS folders, "
                         f"or pass --features FILE to save features without labels")

    splits = {"train": train} | ({"test": test} if test is not None else {})
    arch, network = meta["backbone"]["arch"], args.network or meta.get("network")
    source = f"{args.checkpoint}{f' ({network})' if network else ''}" if args.checkpoint else (
        "timm's pretrained weights" if arch.startswith("timm/") else "random weights, for want of --checkpoint")
    log(f"{arch} with {source}, at {meta['img_size']} pixels; on {device.type} in {args.dtype}, {world_size()} process(es)")
    log(f"{args.data}: {', '.join(f'{len(data)} {name} images' for name, data in splits.items())}, {len(train.classes)} classes")

    splits = {name: split_features(data, backbone, meta, device, args) for name, data in splits.items()}
    if args.features:
        if rank() == 0:
            Path(args.features).parent.mkdir(parents=True, exist_ok=True)
            save_file(splits, Path(args.features))
        barrier()
        log(f"features saved in {args.features}")
    if labelled:
        print_table(splits["train"], splits["test"], args, device)
    else:
        log("k-NN skipped: it needs labels in a training and a test split")


if __name__ == "__main__":
    run(main)
