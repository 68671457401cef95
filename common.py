"""The core that the five method files and the two evaluations share. It holds nothing that a paper is about.

Sections: launch · data · views · backbones · EMA · schedules · collectives · checkpoints · logging and monitors.
Shapes:   B batch, V views, L layers, N tokens, D dim, K output dim.

Two ideas carry the promises made in the README.
1. Every random number of training step t comes from `draw(seed, t, stream)`: drawn on the CPU for the whole global batch,
   of which each process keeps its own rows. So there is no RNG state to save, resuming is exact, and neither the number
   of processes nor the number of workers changes what is seen.
2. A sum that spans the global batch goes through `gather`, whose backward adds up what every process asks of it. With the
   average over processes that DDP takes, the gradient is the one that a single process would have.
"""
import argparse
import contextlib
import functools
import hashlib
import inspect
import json
import math
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as tv
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------- launch


class InputError(Exception):
    """Something that the user can mend: `run` prints it as one line and exits with code 2."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def log(message: str) -> None:
    """Prints on the first process only, above the progress bar."""
    if rank() == 0:
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


class Terminal:
    """stdout or stderr that cannot end a run: what it does not take is replaced or dropped."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")

    def write(self, text: str) -> int:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def run(main) -> None:
    """Runs `main()`. Whatever ends it early becomes one line and an exit code: 2 for input that can be mended, 1 for a file
    that cannot be read or written, 128 + number for a signal (which a training run, once it steps, handles itself)."""
    if not isinstance(sys.stdout, Terminal):
        sys.stdout, sys.stderr = Terminal(sys.stdout), Terminal(sys.stderr)

    def stop(number, frame):
        raise KeyboardInterrupt(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        main()
    except (InputError, OSError) as error:
        # an error raised in a loader's worker arrives behind its traceback: the last line is ours
        line = (str(error).strip().splitlines() or [type(error).__name__])[-1].removeprefix("common.InputError: ")
        process = "" if world_size() == 1 else f" (process {rank()})"
        tqdm.write(f"error{process}: {line}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt as interrupt:
        number = interrupt.args[0] if interrupt.args else signal.SIGINT
        tqdm.write(f"stopped by {signal.Signals(number).name}", file=sys.stderr)
        sys.exit(128 + number)
    if dist.is_initialized():
        dist.destroy_process_group()


def progress(items=None, **options) -> tqdm:
    """A progress bar on the first process; in a log file a line every ten seconds."""
    return tqdm(items, disable=rank() > 0, mininterval=0.5 if sys.stderr.isatty() else 10, dynamic_ncols=True, **options)


LIMITS = {"img_size": (1, 1e5), "patch_size": (1, 1e5), "epochs": (1, 1e6), "batch_size": (1, 1e9), "lr": (0, 1e6),
          "warmup_epochs": (0, 1e6), "weight_decay": (0, 1e3), "momentum": (0, 1), "hidden": (1, 1e6), "max_steps": (1, 1e12),
          "log_every": (1, 1e9), "seed": (0, 2**63 - 1), "num_heads": (1, 1e3)}


def check_limits(args, limits: dict) -> None:
    """Raises InputError for the first argument, or one of its list, that is not a number between its limits."""
    for name, (least, most) in limits.items():
        given = getattr(args, name, None)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not least <= value <= most:
                raise InputError(f"--{name} must be between {least:g} and {most:g}, not {value:g}")


_signal_received = []
_extracting = False  # features: then a signal does not wait for the end of a training step


def _note_signal(number, frame) -> None:
    _signal_received.append(number)
    if _extracting:
        raise KeyboardInterrupt(number)


def setup(args) -> torch.device:
    """Joins torchrun's process group if there is one, settles device, dtype and compile in `args`, and seeds the weights."""
    check_limits(args, LIMITS)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(args.device, lambda: True)():
        raise InputError(f"--device {args.device} is not available here; use --device auto")
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise InputError(f"{torch.cuda.device_count()} GPUs for more processes: lower --nproc_per_node, or pass --device cpu")
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        try:
            store, number, processes = next(dist.rendezvous("env://"))
        except ValueError as error:
            raise InputError(f"RANK is set, but not all that torchrun sets ({error}): start with torchrun, or unset RANK") from None
        # torchrun restarts its workers with the same store, which still says where the dead ones listened
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.PrefixStore(f"start{restart}", store),
                                rank=number, world_size=processes)
    if args.dtype is None:
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "fp32" if device.type != "cuda" else "bf16" if bf16 else "fp16"
    if getattr(args, "compile", False) is None:
        args.compile = device.type == "cuda"
    if args.dtype != "fp32":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    return device


def autocast(device: torch.device, dtype: str):
    """The one precision path: autocast to bf16 or fp16, or nothing for fp32."""
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, types[dtype], enabled=dtype != "fp32")


def _raised(x):
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x


def fp32(loss):
    """Decorator: the function runs outside autocast, its half-precision tensors raised to fp32 first."""

    @functools.wraps(loss)
    def in_fp32(*args, **kwargs):
        device = next(x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with torch.autocast(device.type, enabled=False):
            return loss(*map(_raised, args), **{name: _raised(x) for name, x in kwargs.items()})

    return in_fp32


def draw(seed: int, step: int, stream: int, rows: int, columns: int) -> Tensor:
    """(rows, columns) uniform numbers in [0, 1): a pure function of its arguments."""
    return torch.from_numpy(np.random.default_rng([seed, step, stream]).random((rows, columns), dtype=np.float32))


def local_rows(global_batch: int) -> slice:
    """The rows of the global batch that this process works on."""
    rows = global_batch // world_size()
    return slice(rank() * rows, (rank() + 1) * rows)


# --------------------------------------------------------------------------------------------------------------- data

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for every data set: written into checkpoints
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"}
SMALL, MEMORY_LIMIT = 96, 2 * 2**30  # images of one size, up to 96 pixels and 2 GiB together, are kept in memory
DATASETS = {  # name: (torchvision class, arguments of the training split, of the test split)
    "mnist": ("MNIST", {"train": True}, {"train": False}),
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "svhn": ("SVHN", {"split": "train"}, {"split": "test"}),
    "stl10": ("STL10", {"split": "train+unlabeled"}, {"split": "test"}),
    "flowers102": ("Flowers102", {"split": "train"}, {"split": "test"}),
    "pets": ("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}),
    "cars": ("StanfordCars", {"split": "train"}, {"split": "test"}),
    "aircraft": ("FGVCAircraft", {"split": "trainval"}, {"split": "test"}),
}


@dataclass
class ImageData:
    """One split: small images in memory as uint8 (N, 3, H, W), others as paths; labels (N,) are -1 where unknown."""

    labels: Tensor
    classes: list
    images: Tensor | None = None
    paths: list | None = None

    def __len__(self):
        return len(self.labels)

    @property
    def labelled(self) -> bool:
        return bool((self.labels >= 0).any())

    def subset(self, rows: Tensor) -> "ImageData":
        """Some of the images, in the order of `rows` (n,)."""
        return ImageData(self.labels[rows], self.classes, None if self.images is None else self.images[rows],
                         [self.paths[i] for i in rows.tolist()] if self.paths else None)

    def image_size(self) -> tuple[int, int]:
        """Height and width; of the first image where they are files."""
        return tuple((self.images[0] if self.images is not None else read_image(self.paths[0])).shape[-2:])

    def fingerprint(self) -> str:
        """The number of images and a digest of their labels and of their names below the folder."""
        digest = hashlib.sha256(self.labels.cpu().numpy().tobytes())
        root = len(os.path.commonprefix(self.paths or []))
        for path in self.paths or []:
            digest.update(os.fsencode(path[root:]) + b"\n")
        return f"{len(self)} images, {digest.hexdigest()[:16]}"


log_once = functools.cache(log)


def read_image(path) -> Tensor:
    """Decodes one file to uint8 (3, H, W), upright. Raises InputError, naming the file, where it cannot be decoded whole."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode == "F":
                raise ValueError("pixels are floating-point numbers of unknown range")
            if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip at 255
                image = Image.fromarray(from_16_bits(np.asarray(image)))
            return tv.pil_to_tensor(image.convert("RGB"))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"cannot read image {path} ({reason}): replace or delete the file") from None


def from_16_bits(pixels: np.ndarray) -> np.ndarray:
    """Whole numbers from 0 to 65535 -> uint8."""
    least, most = pixels.min(), pixels.max()
    if least < 0 or most > 65535:
        raise ValueError(f"pixels from {least} to {most} do not fit 0 to 65535")
    if most < 4096:
        log_once("16-bit images that use 12 bits or fewer come out nearly black: scale them to 0 ... 65535")
    return (pixels / 257).round().astype(np.uint8)


def find_images(folder: Path) -> list[str]:
    """All image files below a folder, sorted, but hidden ones; links are followed, each folder is read once, and files of other
    kinds are counted aloud."""

    def fail(error):
        raise error

    found, others, seen = [], Counter(), set()
    if not os.path.isdir(folder):
        return found
    for top, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        if os.path.realpath(top) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(top))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in IMAGE_SUFFIXES and not name.startswith("."):
                found.append(os.path.join(top, name))
            elif not name.startswith("."):
                others[suffix or "no ending"] += 1
    if others:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        log(f"{folder}: {others.total()} files are not read as images ({counts})")
    return sorted(found)


def read_folder(folder: Path, class_folders: bool, classes: list | None = None) -> ImageData:
    """Images below a folder, labelled by its class folders if it has any and `class_folders` is true.

    `classes`: names that the class folders must be among, in the order of their labels; default the sorted folders.
    """
    folders = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if class_folders and folders:
        training, classes = classes is None, classes or folders
        unknown = set(folders) - set(classes)
        if unknown:
            raise InputError(f"{folder} has class folders that the training images lack ({', '.join(sorted(unknown)[:3])})")
        found = {name: find_images(folder / name) for name in folders}
        empty = [name for name in folders if not found[name]]
        if training and empty and len(empty) < len(folders):
            raise InputError(f"no images in class folder {folder / empty[0]}: add some, or delete it")
        paths = [path for name in folders for path in found[name]]
        labels = [classes.index(name) for name in folders for _ in found[name]]
    else:
        paths, classes = find_images(folder), []
        labels = [-1] * len(paths)
    if not paths:
        raise InputError(f"no images under {folder}: expected files such as .jpg or .png, in class folders or not")
    data = ImageData(torch.tensor(labels), classes, paths=paths)
    # small images of one size are decoded once and live in memory; the first few tell
    shapes = {read_image(path).shape for path in paths[:8]}
    if len(shapes) == 1 and max(*shapes) <= SMALL and len(paths) * math.prod(*shapes) <= MEMORY_LIMIT:
        with progress(paths, desc=f"reading {folder.name}", leave=False) as bar:  # closed before an error is printed
            images = [read_image(path) for path in bar]
        if len({image.shape for image in images}) == 1:
            data.images = torch.stack(images)  # (N, 3, H, W)
    return data


def load_data(data: str, data_path: str = "data") -> tuple[ImageData, ImageData | None]:
    """-> training images and test images (None where a folder has none) of a named data set or a directory."""
    if data == "digits":  # 1,797 handwritten digits of 8 x 8 pixels that ship inside scikit-learn
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))[:, None].expand(-1, 3, -1, -1)
        split = train_test_split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=digits.target)
        labels = torch.from_numpy(digits.target)
        return tuple(ImageData(labels[rows], list(range(10)), images[rows].contiguous()) for rows in split)
    if data in DATASETS:
        name, *splits = DATASETS[data]
        try:
            if rank() == 0:  # one process downloads, the others find the files
                _torchvision_splits(name, splits, data_path)
            barrier()
            return tuple(_torchvision_splits(name, splits, data_path))
        except InputError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            raise InputError(f"{data} is not under {data_path} and could not be downloaded ({reason}): "
                             f"put it there, or pass --data_path or --data DIR") from None
    root = Path(data)
    if not data or not root.is_dir():
        raise InputError(f"--data {data or repr(data)} is neither a directory nor one of: digits {' '.join(DATASETS)}")
    if not (root / "train").is_dir():
        return read_folder(root, class_folders=False), None
    train = read_folder(root / "train", class_folders=True)
    test = next((root / name for name in ("val", "validation", "test") if (root / name).is_dir()), None)
    return train, read_folder(test, True, train.classes) if test and train.classes else None


def _torchvision_splits(name: str, splits: list[dict], root: str) -> list[ImageData]:
    loaded = []
    for arguments in splits:
        cls = getattr(torchvision.datasets, name)
        try:
            split = cls(root, download=False, **arguments)
        except (RuntimeError, FileNotFoundError):
            split = cls(root, download=True, **arguments)
        if hasattr(split, "data"):  # arrays: MNIST (N, H, W), CIFAR (N, H, W, 3), SVHN and STL-10 (N, 3, H, W)
            images = torch.as_tensor(split.data)
            if images.ndim == 3:
                images = images[:, None].expand(-1, 3, -1, -1)  # (N, 3, H, W)
            elif images.shape[-1] == 3:
                images = images.permute(0, 3, 1, 2)  # (N, 3, H, W)
            labels = torch.as_tensor(getattr(split, "targets", getattr(split, "labels", None))).long()
            loaded.append(ImageData(labels, list(range(int(labels.max()) + 1)), images.contiguous()))
        else:  # files: Flowers, Pets, Cars, Aircraft
            paths = getattr(split, "_image_files", None) or getattr(split, "_images", None)
            labels = getattr(split, "_labels", None)
            if paths is None:
                paths, labels = zip(*split._samples, strict=True)
            labels = torch.tensor(labels)
            loaded.append(ImageData(labels, list(range(int(labels.max()) + 1)), paths=[str(path) for path in paths]))
    return loaded


# -------------------------------------------------------------------------------------------------------------- views


@dataclass(frozen=True)
class View:
    """How one view is made from an image; the defaults are a plain random crop and flip.

    `jitter` is (brightness, contrast, saturation, hue); `grey`, `flip`, `blur`, `solarize` and `p_jitter` are probabilities.
    As in torchvision's pipelines, but the order of the four jitters is drawn for the batch and not for each image.
    """

    size: int
    scale: tuple = (0.08, 1.0)
    flip: float = 0.5
    jitter: tuple = (0.0, 0.0, 0.0, 0.0)
    p_jitter: float = 0.0
    grey: float = 0.0
    blur: float = 0.0
    solarize: float = 0.0


def byol_views(size: int, scale=(0.08, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.2, 0.1), grey=0.2, blur=True) -> tuple[View, View]:
    """The two asymmetric views of BYOL and MoCo v3. `blur=False` for images of about 32 pixels, which it would erase."""
    shared = dict(size=size, scale=tuple(scale), flip=flip, jitter=tuple(jitter), p_jitter=0.8, grey=grey)
    return View(**shared, blur=1.0 * blur), View(**shared, blur=0.1 * blur, solarize=0.2)


CROP_TRIES = 10  # as torchvision's RandomResizedCrop: ten draws of area and aspect, then the middle, as much as 3:4 to 4:3 has
DRAWS = 2 * CROP_TRIES + 12  # numbers that one view of one image takes from `draw`, in the order they are read below


def crop_boxes(u: Tensor, height, width, scale) -> Tensor:
    """Uniform numbers (B, DRAWS) and image sizes -> boxes (B, 4) of top, left, height, width, in whole pixels."""
    height, width = torch.as_tensor(height).expand(len(u)), torch.as_tensor(width).expand(len(u))
    area = (scale[0] + (scale[1] - scale[0]) * u[:, :CROP_TRIES]) * (height * width)[:, None]  # (B, tries)
    ratio = torch.exp((2 * u[:, CROP_TRIES : 2 * CROP_TRIES] - 1) * math.log(4 / 3))  # (B, tries)
    w, h = (area * ratio).sqrt().round().clamp(min=1), (area / ratio).sqrt().round().clamp(min=1)
    fits = (w <= width[:, None]) & (h <= height[:, None])  # (B, tries)
    first = fits.int().argmax(1, keepdim=True)
    found = fits.any(1)
    w = torch.where(found, w.gather(1, first)[:, 0], width.minimum((height * 4 / 3).round()))  # (B,)
    h = torch.where(found, h.gather(1, first)[:, 0], height.minimum((width * 4 / 3).round()))  # (B,)
    top = torch.where(found, u[:, 2 * CROP_TRIES] * (height - h + 1), (height - h) / 2).floor()
    left = torch.where(found, u[:, 2 * CROP_TRIES + 1] * (width - w + 1), (width - w) / 2).floor()
    return torch.stack([top, left, h, w], 1)  # (B, 4)


def _resize_weights(start: Tensor, length: Tensor, size: int, out: int) -> Tensor:
    """(B, out, size): each output pixel's weights over the input line, the antialiased bilinear filter of PIL."""
    scale = (length / out)[:, None, None]  # (B, 1, 1)
    support = scale.clamp(min=1)
    centre = start[:, None, None] + (torch.arange(out, device=start.device)[:, None] + 0.5) * scale  # (B, out, 1)
    pixel = torch.arange(size, device=start.device) + 0.5  # (size,)
    inside = (pixel > start[:, None, None]) & (pixel < (start + length)[:, None, None])  # (B, 1, size)
    weights = (1 - (pixel - centre).abs() / support).clamp(min=0) * inside  # (B, out, size)
    return weights / weights.sum(-1, keepdim=True)


def crop_and_resize(images: Tensor, boxes: Tensor, out: int) -> Tensor:
    """(B, 3, H, W) in [0, 1] and a box for each -> (B, 3, out, out), as two batched matmuls on the images' device."""
    B, C, H, W = images.shape
    if H == W == out and (boxes[:, 2:] == out).all():
        return images.clone()  # all of them whole, and of the right size; `augment` works in place
    top, left, height, width = boxes.to(images.device, non_blocking=True).unbind(1)
    x = images.reshape(B, C * H, W) @ _resize_weights(left, width, W, out).transpose(1, 2)  # (B, C*H, out)
    return _resize_weights(top, height, H, out)[:, None] @ x.view(B, C, H, out)  # (B, C, out, out)


def _grey(x: Tensor) -> Tensor:
    return (0.2989 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])[:, None]  # (B, 1, H, W)


def _shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue by `shift` (B, 1, 1), a fraction of the circle, with value and saturation of HSV kept."""
    r, g, b = x.unbind(1)  # (B, H, W) each
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    # the largest channel decides; lerp with weights 0 and 1 is an exact choice, and faster than where
    hue = torch.lerp((r - g).add_(chroma, alpha=4), (b - r).add_(chroma, alpha=2), (value == g).float())
    hue = hue.lerp_(g - b, (value == r).float())
    hue = (hue / chroma.clamp(min=1e-8)).add_(6 * shift).remainder_(6)  # in sixths of the circle, from red
    # each channel is at value within a sixth of its own hue, at value - chroma beyond two, and linear between
    near = torch.stack([(hue - 3).abs_().sub_(1), 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()], 1).clamp_(0, 1)  # (B, 3, H, W)
    return near.mul_(chroma[:, None]).add_((value - chroma)[:, None])


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of (B, C, S, S), each image with its own sigma in pixels, edges reflected: two matmuls."""
    i = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype)
    last = x.shape[-1] - 1

    def gauss(j):  # weight of the pixel at position j for output i; none past 6 sigma, where products would be denormal, so slow
        squared = ((i[:, None] - j) / sigma[:, None, None]) ** 2  # (B, S, S)
        return torch.exp(-0.5 * squared.clamp(max=36)) * (squared < 36)

    kernel = gauss(i) + gauss(-i) * (i > 0) + gauss(2 * last - i) * (i < last)
    kernel = (kernel / kernel.sum(-1, keepdim=True))[:, None]  # (B, 1, S, S)
    return kernel @ x @ kernel.transpose(-1, -2)


def augment(x: Tensor, view: View, u: Tensor, order: list[int]) -> Tensor:
    """Everything after the crop: (B, 3, S, S) in [0, 1] and uniform numbers (B, DRAWS) -> (B, 3, S, S) in [0, 1].

    Each image has its own parameters. Which images an operation touches is decided on the CPU, so nothing waits for the
    device; `x` is changed in place.
    """
    at_once = 2**18 // x[0].numel() or 1  # on a CPU, as many images as stay in its cache
    if x.device.type == "cpu" and len(x) > at_once:
        return torch.cat([augment(images, view, draws, order)
                          for images, draws in zip(x.split(at_once), u.split(at_once), strict=True)])
    flip, p_jitter, *factors, grey, blur, sigma, solarize = u[:, 2 * CROP_TRIES + 2 :].T[:10]
    device = x.device

    def chosen(draws, p):
        return (draws < p).nonzero()[:, 0].to(device, non_blocking=True)

    if view.flip:
        rows = chosen(flip, view.flip)
        x[rows] = x[rows].flip(-1)
    if view.p_jitter:
        spread = torch.tensor(view.jitter)[:, None] * (2 * torch.stack(factors) - 1) * (p_jitter < view.p_jitter)  # (4, B)
        spread = spread.to(device, non_blocking=True)[:, :, None, None, None]  # (4, B, 1, 1, 1)
        for operation in order:
            if not view.jitter[operation]:
                continue
            f = 1 + spread[operation]  # (B, 1, 1, 1)
            if operation == 0:  # brightness
                x = x.mul_(f).clamp_(0, 1)
            elif operation == 1:  # contrast, about the mean of the grey image
                mean = _grey(x).mean((2, 3), keepdim=True)  # (B, 1, 1, 1)
                x = x.mul_(f).add_((1 - f) * mean).clamp_(0, 1)
            elif operation == 2:  # saturation, about the grey image
                x = torch.lerp(_grey(x), x, f).clamp_(0, 1)
            else:
                x = _shift_hue(x, spread[3][:, 0])
    if view.grey:
        rows = chosen(grey, view.grey)
        x[rows] = _grey(x[rows]).expand(-1, 3, -1, -1)
    if view.blur:
        rows = chosen(blur, view.blur)
        x[rows] = _blur(x[rows], (0.1 + 1.9 * sigma).to(device, non_blocking=True)[rows])
    if view.solarize:
        rows = chosen(solarize, view.solarize)
        some = x[rows]
        x[rows] = some.lerp(1 - some, (some >= 128 / 255).float())
    return x


@functools.lru_cache
def _by_channel(values: tuple, device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)[:, None, None]  # (3, 1, 1); made once, since making it waits for the device


def normalize(x: Tensor, mean=MEAN, std=STD) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> normalised by channel."""
    return (x - _by_channel(tuple(mean), x.device)).div_(_by_channel(tuple(std), x.device))


def _leave_group(worker: int) -> None:
    """In a loader's worker: a signal to the run's process group is for the main process, which saves and then ends its workers."""
    if hasattr(os, "setpgrp"):  # Windows has no groups
        os.setpgrp()


class ViewLoader:
    """`steps(start, stop)` iterates over training steps, yielding (step, views, index).

    views: one normalised tensor (B, 3, S, S) on the device for each `View`; index (B,): rows of `data`. B is this
    process's share of the global batch. An epoch is a permutation of the data, its last incomplete batch left out.
    Images in memory are cropped on the device; files are decoded and cropped by workers that make whole batches.
    `waited` is the number of seconds spent waiting for data so far.
    """

    def __init__(self, data: ImageData, views, batch_size: int, seed: int, device, num_workers=0, mean=MEAN, std=STD):
        if batch_size % world_size():
            raise InputError(f"--batch_size {batch_size} does not divide by {world_size()} processes")
        if len(data) < batch_size:
            raise InputError(f"{len(data)} images are fewer than --batch_size {batch_size}: lower it or add images")
        self.data, self.views, self.batch_size, self.seed = data, views, batch_size, seed
        self.device, self.num_workers, self.mean, self.std = torch.device(device), num_workers, mean, std
        self.rows = local_rows(batch_size)  # settled here: a worker has no process group to ask
        self.steps_per_epoch = len(data) // batch_size
        self.waited = 0.0

    def index(self, step: int) -> Tensor:
        """This process's rows of the data at a step (B,)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._permutation(epoch)[position * self.batch_size :][self.rows]

    @functools.lru_cache(maxsize=2)
    def _permutation(self, epoch: int) -> Tensor:
        return torch.from_numpy(np.random.default_rng([self.seed, epoch, 1000]).permutation(len(self.data)))

    def draws(self, step: int) -> list[Tensor]:
        """For each view, this process's uniform numbers (B, DRAWS)."""
        return [draw(self.seed, step, v, self.batch_size, DRAWS)[self.rows] for v in range(len(self.views))]

    def __getitem__(self, step: int) -> list[Tensor]:
        """The crops of one step, uint8, from files: what a worker does."""
        images = [read_image(self.data.paths[i]) for i in self.index(step).tolist()]
        height, width = torch.tensor([image.shape[1:] for image in images]).T
        crops = []
        for view, u in zip(self.views, self.draws(step), strict=True):
            boxes = crop_boxes(u, height, width, view.scale).int().tolist()
            crops.append(torch.stack([
                tv.resized_crop(image, *box, [view.size, view.size], antialias=True)
                for image, box in zip(images, boxes, strict=True)]))  # (B, 3, S, S)
        return crops

    def steps(self, start: int, stop: int):
        if self.data.images is None:
            from_files = iter(torch.utils.data.DataLoader(
                self, batch_size=None, sampler=range(start, stop), num_workers=self.num_workers,
                pin_memory=self.device.type == "cuda", generator=torch.Generator(), worker_init_fn=_leave_group))
        else:
            self.data.images = self.data.images.to(self.device)
        for step in range(start, stop):
            began = time.perf_counter()
            index = self.index(step)
            if self.data.images is None:
                crops = [crop.to(self.device, non_blocking=True).float() / 255 for crop in next(from_files)]
            else:
                images = self.data.images[index.to(self.device, non_blocking=True)].float() / 255  # (B, 3, H, W)
                crops = [crop_and_resize(images, crop_boxes(u, *images.shape[-2:], view.scale), view.size)
                         for view, u in zip(self.views, self.draws(step), strict=True)]
            self.waited += time.perf_counter() - began
            order = np.random.default_rng([self.seed, step, 1001]).permutation(4).tolist()
            yield step, [normalize(augment(crop, view, u, order), self.mean, self.std)
                         for crop, view, u in zip(crops, self.views, self.draws(step), strict=True)], index


def eval_batches(data: ImageData, rows, size: int, device, batch_size=256, num_workers=0, mean=MEAN, std=STD):
    """Yields normalised whole images (B, 3, size, size), in the order of `rows`.

    Images in memory are resized; files have their short side resized to size * 256 / 224, then the centre is cut out.
    """
    rows = torch.as_tensor(rows)
    if data.images is not None:
        for chunk in rows.split(batch_size):
            x = data.images[chunk.to(data.images.device)].to(device).float() / 255
            if x.shape[-2:] != (size, size):
                x = x.cpu() if x.device.type == "mps" else x  # which has no antialiased bicubic in torch 2.6
                x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
            yield normalize(x.to(device), mean, std)
        return
    crops = _CentreCrops(data.paths, size)
    for x in torch.utils.data.DataLoader(crops, batch_size, sampler=rows.tolist(), num_workers=num_workers,
                                         generator=torch.Generator(),  # its own, so that nothing else is disturbed
                                         worker_init_fn=_leave_group):
        yield normalize(x.to(device).float() / 255, mean, std)


class _CentreCrops(torch.utils.data.Dataset):
    def __init__(self, paths, size):
        self.paths, self.size = paths, size

    def __getitem__(self, i):
        image = tv.resize(read_image(self.paths[i]), [round(self.size * 256 / 224)], tv.InterpolationMode.BICUBIC, antialias=True)
        return tv.center_crop(image, [self.size, self.size])


# ---------------------------------------------------------------------------------------------------------- backbones


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> q, k, v of shape (B, heads, T, D / heads)."""
        B, T, D = x.shape
        return self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(*self.split(x))  # (B, heads, T, D / heads)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, T, D)

    def weights(self, x: Tensor, queries: int | None = None) -> Tensor:
        """(B, heads, T, T), or only the rows of the first `queries` tokens: each row sums to one."""
        q, k, _ = self.split(x)
        return (q[:, :, :queries] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block. `keep` (B, 2): factors of its two branches, 0 where stochastic depth drops one."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        if keep is None:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = x + keep[:, :1, None] * self.attn(self.norm1(x))
        return x + keep[:, 1:, None] * self.mlp(self.norm2(x))

    def attention(self, x: Tensor, queries: int | None = None) -> Tensor:
        """The weights (B, heads, T, T), or those of the first `queries` tokens, with which `forward` attends."""
        return self.attn.weights(self.norm1(x), queries)


class PostNormBlock(Block):
    """The same parts as in the first transformer, and in Data2Vec2: each norm comes after its residual sum."""

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        keep = x.new_ones(len(x), 2) if keep is None else keep
        x = self.norm1(x + keep[:, :1, None] * self.attn(x))
        return self.norm2(x + keep[:, 1:, None] * self.mlp(x))

    def attention(self, x: Tensor, queries: int | None = None) -> Tensor:
        return self.attn.weights(x, queries)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, N, D)


def sincos_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """(1, 1+N, D) fixed 2-D sine-cosine positions, zero for [CLS]: a quarter each for sin x, cos x, sin y, cos y."""
    if dim % 4:
        raise InputError(f"sine-cosine positions need a width that 4 divides, not {dim}")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    x, y = x.flatten()[:, None] * omega, y.flatten()[:, None] * omega  # (N, D/4) each
    patches = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1).float()  # (N, D)
    return torch.cat([torch.zeros(1, dim), patches])[None]  # (1, 1+N, D)


class VisionTransformer(nn.Module):
    """ViT as in timm and DINO, with their state-dict keys; beyond those only `mask_token`, unused unless a mask is given.

    pos_embed: "learnt", or "sincos" for fixed ones. drop_path: stochastic depth, rising linearly to this at the last block.
    post_norm: blocks as in Data2Vec2, a norm before the first and none after the last; its key is timm's for that place.
    Weights start Xavier-uniform with q, k and v as three matrices (MoCo v3, MAE); the patch projection likewise.
    """

    def __init__(self, img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6, mlp_ratio=4.0, in_chans=3,
                 pos_embed="learnt", drop_path=0.0, post_norm=False):
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height % patch_size or width % patch_size:
            raise InputError(f"image size {height} x {width} is not a multiple of patch size {patch_size}")
        if embed_dim % num_heads:
            raise InputError(f"--num_heads {num_heads} does not divide the width {embed_dim}")
        self.embed_dim, self.patch_size, self.grid = embed_dim, patch_size, (height // patch_size, width // patch_size)
        self.layer_dims = [embed_dim] * depth
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02)
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        positions = sincos_positions(embed_dim, self.grid) if pos_embed == "sincos" else (
            nn.init.trunc_normal_(torch.empty(1, 1 + math.prod(self.grid), embed_dim), std=0.02))
        self.pos_embed = nn.Parameter(positions, requires_grad=pos_embed != "sincos")
        block, norm = PostNormBlock if post_norm else Block, nn.LayerNorm(embed_dim, eps=1e-6)
        self.norm_pre = norm if post_norm else nn.Identity()
        self.blocks = nn.ModuleList(block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.Identity() if post_norm else norm
        self.drop_rates = torch.linspace(0, drop_path, depth).tolist()
        self.as_dino = False  # how positions are resized: see `positions`
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                fan_out = module.out_features // (3 if name.endswith("qkv") else 1)
                bound = math.sqrt(6 / (module.in_features + fan_out))
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.zeros_(module.bias)
        bound = math.sqrt(6 / (in_chans * patch_size**2 + embed_dim))
        nn.init.uniform_(self.patch_embed.proj.weight, -bound, bound)
        nn.init.zeros_(self.patch_embed.proj.bias)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """(1, 1+N, D) for a grid of patches, resized bicubically where it is not the one that was built: to the exact grid or,
        for other people's files, by the factor (n + 0.1) / m of DINO's and iBOT's code, with which they were measured."""
        if grid == self.grid:
            return self.pos_embed
        patches = self.pos_embed[:, 1:].unflatten(1, self.grid).permute(0, 3, 1, 2).float()  # (1, D, h, w)
        if self.as_dino:
            factor = [(n + 0.1) / m for n, m in zip(grid, self.grid, strict=True)]
            patches = F.interpolate(patches, scale_factor=factor, mode="bicubic")
        else:
            patches = F.interpolate(patches, grid, mode="bicubic")
        patches = patches.flatten(2).transpose(1, 2)  # (1, N, D)
        return torch.cat([self.pos_embed[:, :1], patches.to(self.pos_embed.dtype)], 1)

    def tokens(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) -> what enters the first block (B, 1+N, D)."""
        if x.shape[-2] % self.patch_size or x.shape[-1] % self.patch_size:
            raise InputError(f"images of {x.shape[-2]} x {x.shape[-1]} are not a multiple of patch size {self.patch_size}")
        grid = (x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size)
        x = self.patch_embed(x)  # (B, N, D)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.positions(grid)  # (B, 1+N, D)
        return self.norm_pre(x)

    def block_outputs(self, x: Tensor, mask: Tensor | None = None, noise: Tensor | None = None) -> list[Tensor]:
        """Every block's output (B, 1+N, D), before the final norm.

        noise: uniform numbers (B, 2 * depth) that decide stochastic depth in training; drawn here when absent.
        """
        x, outputs = self.tokens(x, mask), []
        for i, (block, rate) in enumerate(zip(self.blocks, self.drop_rates, strict=True)):
            keep = None
            if self.training and rate > 0:
                u = torch.rand(len(x), 2, device=x.device) if noise is None else noise[:, 2 * i : 2 * i + 2]
                keep = (u >= rate).to(x.dtype) / (1 - rate)  # (B, 2)
            x = block(x, keep)
            outputs.append(x)
        return outputs

    def forward_features(self, x: Tensor, mask: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """(B, 1+N, D) after the final norm. mask: bool (B, N), True where a patch becomes the mask token."""
        return self.norm(self.block_outputs(x, mask, noise)[-1])

    def forward(self, x: Tensor, layers: bool = False):
        """[CLS] after the final norm (B, D); with `layers` a list of L of them, one for each block."""
        outputs = self.block_outputs(x)
        return [self.norm(y[:, 0]) for y in outputs] if layers else self.norm(outputs[-1][:, 0])

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """The last n blocks' outputs (B, 1+N, D), each through the final norm."""
        return [self.norm(y) for y in self.block_outputs(x)[-n:]]

    def get_last_selfattention(self, x: Tensor, queries: int | None = None) -> Tensor:
        """(B, heads, 1+N, 1+N): the last block's attention; with queries=1 that of [CLS] alone, (B, heads, 1, 1+N)."""
        x = self.tokens(x)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1].attention(x, queries)


def _vit(**defaults):
    return lambda **kwargs: VisionTransformer(**{**defaults, **kwargs})


vit_nano = _vit(embed_dim=96, depth=4, num_heads=3)  # ours, for images of a few pixels; the others are timm's sizes
vit_tiny = _vit(embed_dim=192, depth=12, num_heads=3)
vit_small = _vit(embed_dim=384, depth=12, num_heads=6)
vit_base = _vit(embed_dim=768, depth=12, num_heads=12)
vit_large = _vit(embed_dim=1024, depth=24, num_heads=16)
VITS = dict(vit_nano=vit_nano, vit_tiny=vit_tiny, vit_small=vit_small, vit_base=vit_base, vit_large=vit_large)
RESNETS = {"resnet18": ("BasicBlock", [2, 2, 2, 2]), "resnet34": ("BasicBlock", [3, 4, 6, 3]),
           "resnet50": ("Bottleneck", [3, 4, 6, 3]), "resnet101": ("Bottleneck", [3, 4, 23, 3])}


class ResNet(torchvision.models.ResNet):
    """torchvision's ResNet without its classifier; under 64 pixels a 3x3 stride-1 stem without max-pooling.

    A "layer" is one of the four stages, averaged over the image. BatchNorm statistics span the global batch.
    """

    def __init__(self, block: str, depths: list[int], img_size: int = 224):
        super().__init__(getattr(torchvision.models.resnet, block), depths, norm_layer=BatchNorm)
        self.embed_dim, self.fc = self.fc.in_features, nn.Identity()
        self.layer_dims = [self.embed_dim // 8, self.embed_dim // 4, self.embed_dim // 2, self.embed_dim]
        if img_size < 64:
            self.conv1, self.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, layers: bool = False):
        """The last stage averaged over the image (B, D); with `layers` a list of the four stages, (B, D_l) each."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        pooled = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)  # (B, D_l, h, w)
            pooled.append(x.mean((2, 3)))  # (B, D_l)
        return pooled if layers else pooled[-1]


class TimmBackbone(nn.Module):
    """Any timm model behind the same call, which pools as timm does; `layers` wants a ViT that pools by [CLS].

    `model` holds the weights, with timm's keys.
    """

    def __init__(self, name: str, img_size: int | None, pretrained: bool):
        super().__init__()
        import timm

        if not timm.is_model(name):
            raise InputError(f"timm has no model {name!r}: timm.list_models() names them")
        size, dynamic = {"img_size": img_size} if img_size else {}, {"dynamic_img_size": True}  # other sizes resize positions
        try:
            for options in (size | ({} if name.startswith("beit") else dynamic), size, {}):
                try:
                    self.model = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
                    break
                except TypeError:  # not an option of this model
                    if not options:
                        raise
            data = timm.data.resolve_model_data_config(self.model)
            self.mean, self.std, self.img_size = data["mean"], data["std"], data["input_size"][1]
            side, training = img_size or self.img_size, self.model.training
            with torch.no_grad():
                self.embed_dim = self.model.eval()(torch.zeros(1, 3, side, side)).shape[1]
        except Exception as error:
            what = f"timm/{name}" + (f" for images of {img_size} pixels" if img_size else "")
            raise InputError(f"cannot make {what} ({' '.join(str(error).split())[:160]})") from None
        self.model.train(training)
        self.layer_dims = [self.embed_dim] * len(getattr(self.model, "blocks", [None]))
        self.has_tokens = hasattr(self.model, "get_intermediate_layers") and getattr(self.model, "cls_token", None) is not None
        for module in self.model.modules():  # statistics of the global batch
            if isinstance(module, nn.BatchNorm2d):
                module.__class__ = _TimmBatchNorm if hasattr(module, "act") else BatchNorm

    def forward(self, x: Tensor, layers: bool = False):
        if not layers:
            return self.model(x)  # (B, D)
        if self.model.global_pool != "token" or hasattr(self.model, "dist_token"):
            raise InputError("the layers of a timm model are to be had only where its own output is [CLS]")
        return [cls for cls, _ in self.tokens(x, len(self.layer_dims))]  # L of (B, D)

    def tokens(self, x: Tensor, n: int) -> list[tuple[Tensor, Tensor]]:
        """[CLS] (B, D) and patch tokens (B, N, D), after the final norm, of the last n layers."""
        if not self.has_tokens:
            raise InputError("tokens of a timm model are to be had from its ViTs with [CLS] only")
        outputs = self.model.get_intermediate_layers(x, n=n, return_prefix_tokens=True, norm=True)
        return [(prefix[:, 0], patches) for patches, prefix in outputs]


def patch_side(backbone) -> int:
    """Pixels that the sides of an image must be a multiple of."""
    embed = getattr(getattr(backbone, "model", backbone), "patch_embed", None)
    return embed.proj.kernel_size[0] if isinstance(embed, PatchEmbed) else embed.feat_ratio() if hasattr(embed, "feat_ratio") else 1


def has_tokens(backbone) -> bool:
    """Whether `token_layers` is to be had."""
    return getattr(backbone, "has_tokens", hasattr(backbone, "get_intermediate_layers"))


def token_layers(backbone, x: Tensor, layers: bool) -> list[tuple[Tensor, Tensor]]:
    """Images (B, 3, H, W) -> [CLS] (B, D) and patch tokens (B, h, w, D), after the final norm, of all layers or of the last."""
    n, side = len(backbone.layer_dims) if layers else 1, patch_side(backbone)
    if isinstance(backbone, TimmBackbone):
        outputs = backbone.tokens(x, n)
    else:
        outputs = [(tokens[:, 0], tokens[:, 1:]) for tokens in backbone.get_intermediate_layers(x, n)]
    return [(cls, patches.unflatten(1, (x.shape[-2] // side, x.shape[-1] // side))) for cls, patches in outputs]


def create_backbone(arch: str, img_size: int | None = 224, patch_size: int = 16, pretrained=False, **options) -> nn.Module:
    """A backbone by name: `vit_*`, `resnet*` or `timm/NAME`. Options are the ViT's; those that are None keep its default."""
    options = {name: value for name, value in options.items() if value is not None}
    if arch in VITS:
        return VITS[arch](img_size=img_size, patch_size=patch_size, **options)
    if arch in RESNETS:
        return ResNet(*RESNETS[arch], img_size=img_size)
    if arch.startswith("timm/"):
        return TimmBackbone(arch.removeprefix("timm/"), img_size, pretrained)
    raise InputError(f"unknown --arch {arch}: use one of {' '.join([*VITS, *RESNETS])} or timm/NAME")


# ---------------------------------------------------------------------------------------------------------------- EMA


@torch.no_grad()
def ema_update(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """In place, for every parameter: teacher = momentum * teacher + (1 - momentum) * student.

    Buffers are left alone: a teacher that runs in training mode keeps BatchNorm statistics of its own forward passes.
    """
    pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
    torch._foreach_lerp_([t for t, _ in pairs], [s for _, s in pairs], 1 - momentum)


# ------------------------------------------------------------------------------------- schedules and parameter groups


def cosine_schedule(base: float, final: float, total: int, warmup: int = 0, start: float = 0.0) -> np.ndarray:
    """A value for each of `total` steps: linspace(start, base, warmup), then half a cosine from base towards final."""
    warmup = min(warmup, total)
    i = np.arange(total - warmup)
    cosine = final + (base - final) * (1 + np.cos(np.pi * i / max(total - warmup, 1))) / 2
    return np.concatenate([np.linspace(start, base, warmup), cosine])


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: weight decay for matrices, none for biases, norms, tokens and positions."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            single = parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in ("cls_token", "mask_token", "pos_embed")
            groups[single].append(parameter)
    return [{"params": groups[False], "weight_decay": weight_decay}, {"params": groups[True], "weight_decay": 0.0}]


# -------------------------------------------------------------------------------------------------------- collectives


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.rows = len(x)
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd may hand the same one to other tensors
        dist.all_reduce(gradient)  # what every process asks of every row
        return gradient[rank() * ctx.rows :][: ctx.rows]


def gather(x: Tensor) -> Tensor:
    """(B, ...) of each process -> (W * B, ...) in the order of the processes, on all of them; differentiable."""
    return x if world_size() == 1 else _Gather.apply(x)


def mean_over_processes(x: Tensor) -> Tensor:
    """The average of a detached tensor over the processes, which all of them must ask for."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x / world_size()


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm of (B, C) or (B, C, ...) over the global batch, on any device; nn.BatchNorm2d's state-dict keys.

    With several processes, the local means and variances are gathered and combined, one collective each way.
    """

    def _check_input_dim(self, x):
        if x.ndim < 2:
            raise ValueError(f"expected (B, C, ...), got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        y = _raised(x)
        over = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        variances, means = gather(torch.stack(torch.var_mean(y, over, correction=0))[None]).unbind(1)  # (W, C) each
        mean = means.mean(0)  # (C,)
        variance = (variances + (means - mean) ** 2).mean(0)  # (C,)
        with torch.no_grad():
            n = x.numel() // x.shape[1] * world_size()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        y = (y - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


class _TimmBatchNorm(BatchNorm):
    """timm's BatchNormAct2d, over the global batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def distributed(model: nn.Module) -> nn.Module:
    """DistributedDataParallel where there are several processes: gradients averaged, buffers left alone."""
    if world_size() == 1:
        return model
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, BatchNorm):
            raise InputError(f"{name} normalises over the images of one process alone: use another --arch, or one process")
    ddp = nn.parallel.DistributedDataParallel
    devices = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else None
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in inspect.signature(ddp).parameters else "broadcast_buffers"
    return ddp(model, devices, gradient_as_bucket_view=True, **{buffers: False})  # the second name is that of torch < 2.13 or so


# -------------------------------------------------------------------------------------------------------- checkpoints


def save_file(content, path: Path) -> None:
    """torch.save to a temporary file, flushed to the disk, then renamed: a reader sees the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch.save says that a disk is full
        reason = " ".join(str(error).split())[-160:]
        raise OSError(f"cannot write {path} ({reason})") from None
    finally:
        temporary.unlink(missing_ok=True)


WEIGHT_KEYS = ("student", "teacher", "state_dict", "model")  # under one of these, or bare, a checkpoint keeps its weights


def read_checkpoint(path) -> dict:
    """Tensors and plain containers of a file, on the CPU. Raises InputError with what to do for anything else."""
    if not Path(path).is_file():
        raise InputError(f"no checkpoint file {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise InputError(
                f"{path} holds pickled Python objects beside its tensors, and loading those can run code; where you trust it, "
                f"convert it once: python -c \"import torch; c = torch.load('{path}', 'cpu', weights_only=False); "
                f"torch.save({{k: v for k, v in c.items() if k in {WEIGHT_KEYS} or isinstance(v, torch.Tensor)}}, "
                f"'clean.pth')\"") from None
        raise InputError(f"{path} is not a PyTorch checkpoint, or is damaged") from None
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path} is not a checkpoint: it holds a {type(checkpoint).__name__}, not a dictionary")
    if not all(isinstance(key, str) for key in checkpoint):
        raise InputError(f"{path} is not a checkpoint: the keys of its dictionary are not names")
    return checkpoint


def meta_of(checkpoint: dict) -> dict:
    """What a checkpoint of this repository says of its backbone: arch and sizes under `backbone`, mean, std; {} for others."""
    meta = checkpoint.get("meta")
    return dict(meta) if isinstance(meta, dict) and "backbone" in meta else {}


PREFIXES = {  # of keys, by network; None: of either
    None: ("module.", "_orig_mod.", "backbone.", "model.", "net."),
    "student": ("base_encoder.", "student."),
    "teacher": ("momentum_encoder.", "teacher."),
}
OTHERS = ("head", "fc.", "classifier.", "pre_logits.", "project", "predict", "pred_", "decoder", "prototypes", "queue", "lm_head.",
          "mask_token", "masked_embed")  # what a file may hold beside a backbone


def backbone_weights(checkpoint: dict, network: str | None = None) -> dict:
    """Weights out of a checkpoint of this repository, DINO, iBOT, MoCo v3, SDSSL, SimDis or timm; heads may be among them.

    network: "student" or "teacher". Default: what `backbone.pth` holds for our files; for others the teacher under DINO's
    and iBOT's key `teacher`, and the student of MoCo v3, SDSSL and SimDis.
    """
    meta = checkpoint.get("meta")
    network = network or (meta.get("network") if isinstance(meta, dict) else None)
    if network and network not in checkpoint and {"student", "teacher"} & set(checkpoint):
        raise InputError(f"the checkpoint has no {network} network: pass --network with the one that it has")
    weights = checkpoint
    for key in ([network] if network else ["teacher", "student"]) + ["state_dict", "model"]:
        if isinstance(weights.get(key), dict):
            weights = weights[key]
    prefixes, found = PREFIXES[None] + PREFIXES[network or "student"], True
    while found:  # until none is left; a prefix that is there marks what belongs to us
        found = [prefix for prefix in prefixes if any(key.startswith(prefix) for key in weights)]
        if found:
            weights = {key.removeprefix(found[0]): value for key, value in weights.items() if key.startswith(found[0])}
    return weights


def load_weights(model: nn.Module, weights: dict, source) -> None:
    """Loads a backbone's state dict, of which only a mask token may be absent. Positions of another grid bring their grid."""
    model = model.model if isinstance(model, TimmBackbone) else model
    ours = model.state_dict()
    if "mask_token" in ours and "masked_embed" in weights and "mask_token" not in weights:  # iBOT's name for it
        weights = {**weights, "mask_token": weights["masked_embed"]}
    if "mask_token" in ours and getattr(weights.get("mask_token"), "shape", None) != ours["mask_token"].shape:  # MAE's decoder's
        weights = {key: value for key, value in weights.items() if key != "mask_token"}
    left_out = sorted({key.split(".")[0] for key in weights if key not in ours and key.startswith(OTHERS)})
    weights = {key: value for key, value in weights.items() if key in ours or not key.startswith(OTHERS)}
    missing = [key for key in ours if key not in weights and key != "mask_token"]
    unexpected = [key for key in weights if key not in ours]
    if missing or unexpected:
        what = f"{len(missing)} keys are missing" + (f" (first: {missing[0]})" if missing else "")
        what += f", {len(unexpected)} are unknown" + (f" (first: {unexpected[0]})" if unexpected else "")
        raise InputError(f"{source} does not fit this architecture: {what}; check --arch and --network")
    if set(left_out) - {"mask_token", "masked_embed"}:
        log(f"{source}: left out, since not of the backbone: {' '.join(left_out)}")
    for key, value in weights.items():
        if not isinstance(value, Tensor) or value.ndim != ours[key].ndim:
            raise InputError(f"{source} does not fit this architecture: {key} is no tensor of {ours[key].ndim} dimensions")
        if not value.isfinite().all():
            raise InputError(f"{source} is damaged: {key} holds numbers that are not finite")
    positions, own = weights.get("pos_embed"), isinstance(model, VisionTransformer)
    if positions is not None and positions.shape != model.pos_embed.shape and (own or hasattr(model, "set_input_size")):
        extra = model.pos_embed.shape[1] - math.prod(model.grid if own else model.patch_embed.grid_size)  # [CLS] and the like
        side = math.isqrt(max(0, positions.shape[1] - extra))
        if positions.shape[1:] == (extra + side**2, model.embed_dim):
            if own:
                model.grid, model.pos_embed.data = (side, side), torch.empty_like(positions, dtype=torch.float32)
            else:
                model.set_input_size([side * patch for patch in model.patch_embed.patch_size])
            ours = model.state_dict()
    for key, value in weights.items():
        if ours[key].shape != value.shape:
            raise InputError(f"{source} does not fit this architecture: {key} is {tuple(value.shape)}, expected "
                             f"{tuple(ours[key].shape)}; check --arch, --patch_size and --img_size")
    model.load_state_dict(weights, strict=False)


def start_from(backbone: nn.Module, path: str) -> None:
    """--init: loads a backbone's weights from a file; positions of another grid are resized to the one that was built."""
    content, grid = read_checkpoint(path), getattr(backbone, "grid", None)
    weights = backbone_weights(content)
    heads = moco_heads(content, weights, backbone.embed_dim)
    if grid and heads and heads != backbone.blocks[0].attn.num_heads:
        raise InputError(f"{path} is MoCo v3's, whose ViT-S has {heads} heads and not {backbone.blocks[0].attn.num_heads}: "
                         f"pass --num_heads {heads}, which sdssl.py has")
    load_weights(backbone, weights, path)
    if grid and backbone.grid != grid:
        backbone.as_dino = not meta_of(content)
        backbone.pos_embed.data, backbone.grid = backbone.positions(grid).detach(), grid  # (1, 1+N, D)
        backbone.as_dino = False


def moco_heads(checkpoint: dict, weights: dict, width: int) -> int | None:
    """12 for MoCo v3's ViT-S, which has other heads than everybody's; None for all others.

    Shapes do not tell, but the keys of its own files do and, where a conversion renamed them, its fixed positions: our
    sine-cosine table with x and y exchanged.
    """
    content, positions = checkpoint.get("state_dict"), weights.get("pos_embed")
    if width != 384:
        return None
    if isinstance(content, dict) and any("base_encoder." in key for key in content):
        return 12
    if not isinstance(positions, Tensor) or positions.ndim != 3 or positions.shape[2] != width:
        return None
    side = math.isqrt(max(0, positions.shape[1] - 1))
    if positions.shape[1] != 1 + side**2:
        return None
    exchanged = sincos_positions(width, (side, side)).roll(width // 2, 2)
    return 12 if torch.allclose(positions.float(), exchanged, atol=1e-3) else None


def load_backbone(checkpoint: str | None, arch=None, patch_size=None, img_size=None, network=None,
                  num_heads=None) -> tuple[nn.Module, dict]:
    """-> a backbone in evaluation mode, and its meta: arch, img_size, patch_size, mean, std ...

    Our own `checkpoint.pth` says all of that itself. Other files need `arch` (and for ViTs `patch_size`, and `num_heads` where
    it is not timm's; a file of MoCo v3 has 12 for vit_small). Without a file: random weights, or timm's pretrained ones for
    `timm/NAME`.
    """
    content = read_checkpoint(checkpoint) if checkpoint else {}
    meta = meta_of(content)
    if not meta and not arch:
        raise InputError(f"{checkpoint or 'the command'} does not say which architecture: pass --arch (and --patch_size)")
    if meta and arch and arch != meta["backbone"]["arch"]:
        raise InputError(f"{checkpoint} holds a {meta['backbone']['arch']}, not --arch {arch}")
    if meta and patch_size and patch_size != meta["backbone"].get("patch_size"):
        raise InputError(f"{checkpoint} has --patch_size {meta['backbone'].get('patch_size')}, not --patch_size {patch_size}")
    options = meta.get("backbone") or dict(arch=arch, img_size=img_size or (None if arch.startswith("timm/") else 224),
                                           patch_size=patch_size or 16)
    if meta and num_heads:
        raise InputError(f"{checkpoint} says itself how many heads it has: leave --num_heads out")
    weights = backbone_weights(content, network) if checkpoint else {}
    num_heads = num_heads or (moco_heads(content, weights, 384) if arch == "vit_small" else None)
    options = options | ({"num_heads": num_heads} if num_heads else {})
    backbone = create_backbone(**options, pretrained=not checkpoint)
    if checkpoint:
        load_weights(backbone, weights, checkpoint)
        backbone.as_dino = not meta
    if checkpoint and not meta and arch in VITS:
        log(f"{checkpoint} does not say how its images were normalised; ImageNet's mean and deviation are taken. For weights that "
            f"want others (timm's augreg: 0.5) give timm's name, --arch timm/NAME")
    meta.setdefault("mean", getattr(backbone, "mean", MEAN))
    meta.setdefault("std", getattr(backbone, "std", STD))
    meta.update(backbone=options, img_size=img_size or options["img_size"] or backbone.img_size)
    if meta["img_size"] % patch_side(backbone):
        side = meta["img_size"]
        raise InputError(f"images of {side} x {side} are not a multiple of patch size {patch_side(backbone)}: change --img_size")
    return backbone.eval().requires_grad_(False), meta


# ----------------------------------------------------------------------------------------------- logging and monitors


@torch.no_grad()
def extract_features(backbone: nn.Module, data: ImageData, size: int, device, layers=False, rows=None, batch_size=256,
                     num_workers=0, dtype="fp32", mean=MEAN, std=STD) -> list[Tensor]:
    """Features of whole images in evaluation mode, a list of (N, D) in fp32 on the CPU: one, or with `layers` one a layer.

    The processes share the work and all get the result. The backbone's mode and statistics are as before.
    """
    rows = torch.arange(len(data)) if rows is None else torch.as_tensor(rows)
    padded = torch.arange(math.ceil(len(rows) / world_size()) * world_size()) % len(rows)
    mine = rows[padded][local_rows(len(padded))]
    modes, collected = [(module, module.training) for module in backbone.modules()], []
    backbone.eval()
    batches = eval_batches(data, mine, size, device, batch_size, num_workers, mean, std)
    global _extracting
    _extracting = True
    try:
        for x in progress(batches, desc="features", total=math.ceil(len(mine) / batch_size), leave=False, unit="batch"):
            with autocast(device, dtype):
                features = backbone(x, layers=layers)
            collected.append([f.float() for f in (features if layers else [features])])
    finally:
        _extracting = False
        for module, training in modes:
            module.training = training
    return [gather(torch.cat(parts))[: len(rows)].cpu() for parts in zip(*collected, strict=True)]


@fp32
@torch.no_grad()
def knn_classifier(train_features: Tensor, train_labels: Tensor, test_features: Tensor, k: int, temperature: float = 0.07,
                   num_classes: int | None = None, chunk: int = 1024) -> Tensor:
    """Weighted k-NN of DINO and Wu et al.: (M, classes) sums of exp(cos / T) over the k nearest training rows.

    Both sides are normalised here; k is cut to the number of training rows; the result is the same for every chunk.
    """
    if len(train_features) != len(train_labels):
        raise InputError(f"{len(train_features)} training features but {len(train_labels)} labels")
    num_classes = num_classes or int(train_labels.max()) + 1
    train = F.normalize(train_features, dim=1).T  # (D, N)
    scores = []
    for queries in F.normalize(test_features, dim=1).split(chunk):
        cosine, nearest = (queries @ train).topk(min(k, train.shape[1]), dim=1)  # (m, k) each
        votes = torch.zeros(len(queries), num_classes, device=train.device)
        scores.append(votes.scatter_add_(1, train_labels[nearest], (cosine / temperature).exp()))  # (m, classes)
    return torch.cat(scores)  # (M, classes)


def knn_accuracy(backbone, train: ImageData, test: ImageData | None, size: int, device, k=20, most=10_000,
                 **options) -> float | None:
    """Top-1 of k-NN in per cent, the monitor of training runs; None without labels on both sides.

    On at most `most` images of either split, evenly spaced; eval_knn.py takes all of them.
    """
    if test is None or not (train.labelled and test.labelled):
        return None
    rows, queries = ((split.labels >= 0).nonzero()[:, 0] for split in (train, test))
    rows, queries = (r[torch.linspace(0, len(r) - 1, min(most, len(r))).round().long()] for r in (rows, queries))
    bank, = extract_features(backbone, train, size, device, rows=rows, **options)  # (N, D)
    features, = extract_features(backbone, test, size, device, rows=queries, **options)  # (M, D)
    votes = knn_classifier(bank, train.labels[rows], features, k, num_classes=len(train.classes))
    return 100 * (votes.argmax(1) == test.labels[queries]).float().mean().item()


@fp32
@torch.no_grad()
def spread(z: Tensor) -> tuple[Tensor, Tensor]:
    """How far features (N, D) are from collapse: (std ratio, effective rank).

    std ratio: mean standard deviation of the normalised features' coordinates over 1 / sqrt(D); 1 is an even spread on the
    sphere, 0 one point. Effective rank: exp of the entropy of the normalised spectrum (Roy & Vetterli); 1 is one line.
    """
    z = F.normalize(z, dim=1)
    ratio = z.std(0).mean() * z.shape[1] ** 0.5
    spectrum = torch.linalg.svdvals(z - z.mean(0))
    p = spectrum / spectrum.sum().clamp(min=1e-12)
    return ratio, torch.exp(-(p * (p + 1e-12).log()).sum())


class Run:
    """One training run's folder and its face: resuming, the log, the bar, the curves, the watch on losses, saving.

    checkpoint.pth (everything that resuming needs), backbone.pth (bare weights), log.jsonl, curves.png.
    """

    # settings that may differ when a run goes on; all others must be as they were
    FREE = {"data_path", "num_workers", "device", "dtype", "compile", "output_dir", "resume", "overwrite", "init", "save_every",
            "knn_every", "max_steps", "log_every"}

    def __init__(self, args, total_steps: int, steps_per_epoch: int):
        self.args, self.total, self.steps_per_epoch = args, total_steps, steps_per_epoch
        self.folder = Path(args.output_dir)
        self.checkpoint = None
        path = self.folder / "checkpoint.pth"
        resume = args.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # torchrun --max-restarts
        if resume and path.is_file():
            self.checkpoint = read_checkpoint(path)
            then, step = (self.checkpoint.get(name) for name in ("args", "step"))
            if not (isinstance(then, dict) and isinstance(step, int)):
                raise InputError(f"{path} holds no run to resume: use another --output_dir")
            changed = [f"--{name} was {then.get(name)}" for name, value in plain(vars(args)).items()
                       if name not in self.FREE and then.get(name) != value]
            if changed:
                raise InputError(f"cannot resume {path} with other settings ({', '.join(changed[:3])}); use another --output_dir")
        elif not (resume or args.overwrite) and (path.is_file() or any("loss" in record for record in self.records())):
            raise InputError(f"{self.folder} already holds a run: pass --resume, --overwrite or another --output_dir")
        self.start = self.checkpoint["step"] if self.checkpoint else 0
        self.data = None
        self.stop = min(total_steps, args.max_steps or total_steps)
        self.first_bad = None
        for number in (signal.SIGTERM, signal.SIGINT):  # from here on they do not kill: `after_step` sees them, saves and exits
            signal.signal(number, _note_signal)
        barrier()  # no process writes before all have looked
        if rank() == 0:
            make_folder(self.folder)
            kept = [record for record in self.records() if record["step"] <= self.start] if self.checkpoint else []
            if not self.checkpoint:
                path.unlink(missing_ok=True)
            (self.folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
        self.bar = progress(total=self.stop, initial=self.start, unit="step")
        if self.start >= self.stop:
            log(f"{self.folder} is already at step {self.start}: nothing is left to do")
        self.clock, self.clock_step, self.clock_waited = time.perf_counter(), self.start, 0.0

    def same_data(self, data: ImageData) -> None:
        """Refuses to go on with other images than those that the run began with; their fingerprint goes into the checkpoint."""
        self.data = data.fingerprint()
        then = (self.checkpoint or {}).get("data", self.data)
        if then != self.data:
            self.bar.close()
            raise InputError(f"cannot resume {self.folder / 'checkpoint.pth'}: its training data were {then}, now {self.data}; "
                             f"bring them back, or use another --output_dir")

    def restore(self, **parts) -> None:
        """Networks, optimizer and scaler as they were, where the run goes on from a checkpoint; None is skipped."""
        for name, part in parts.items() if self.checkpoint else ():
            try:
                if part is not None and (self.checkpoint[name] or name != "scaler"):  # fp16 has scales to restore, others none
                    part.load_state_dict(self.checkpoint[name])
            except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
                self.bar.close()
                reason = " ".join(str(error).split())[:160]
                raise InputError(f"cannot resume {self.folder / 'checkpoint.pth'}: its {name} is not this run's ({reason}); "
                                 f"use another --output_dir") from None

    def records(self) -> list[dict]:
        """The log so far; a line that a kill cut short is left out."""
        path, records = self.folder / "log.jsonl", []
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def record(self, **values) -> None:
        if rank() == 0:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(values) + "\n")

    def log_now(self, step: int) -> bool:
        """Whether this step's losses are written: each of the first ten, every `--log_every`-th, and the last."""
        return step < 10 or (step + 1) % self.args.log_every == 0 or step + 1 == self.stop

    def watch(self, step: int, losses: dict[str, Tensor]) -> None:
        """Notes on the device the first step at which a term was not finite; `check` reads it."""
        values = torch.stack([loss.detach() for loss in losses.values()])
        bad = torch.where(values.isfinite(), torch.inf, float(step))
        self.terms = list(losses)
        self.first_bad = bad if self.first_bad is None else torch.minimum(self.first_bad, bad)

    def check(self) -> None:
        """Stops the run, naming step and term, if a loss was not finite on any process. Called before anything is saved."""
        if self.first_bad is None:
            return
        first_bad = self.first_bad.clone()
        if world_size() > 1:
            dist.all_reduce(first_bad, dist.ReduceOp.MIN)
        step, term = first_bad.min(0)
        if step.isfinite():
            self.give_up(f"{self.terms[int(term)]} was not finite at step {int(step) + 1}")

    def check_weights(self, step: int, state: dict) -> None:
        """Stops the run before non-finite weights are saved: a step can spoil them although its losses were finite."""
        for name in [name for name in ("student", "teacher") if name in state]:  # a probe has none
            if not torch.stack([value.isfinite().all() for value in state[name].values()]).all():
                self.give_up(f"weights of the {name} are not finite after step {step}")

    def give_up(self, reason: str) -> None:
        self.bar.close()
        saved = (self.folder / "checkpoint.pth").is_file()
        state = f"the last checkpoint in {self.folder} is intact" if saved else "nothing had been saved yet"
        log(f"stopped: {reason}; {state}. Lower --lr, or raise --warmup_epochs.")
        sys.exit(1)

    def log_step(self, step: int, losses: dict[str, Tensor], waited: float, features: Tensor | None = None, **values) -> None:
        """Writes one record: losses averaged over the processes, the given values, speed, and the spread of `features`."""
        self.check()
        means = mean_over_processes(torch.stack(list(losses.values()))).tolist()
        now = time.perf_counter()
        steps = step + 1 - self.clock_step
        elapsed = max(now - self.clock, 1e-9)
        speed = steps * self.args.batch_size / elapsed
        values = {**dict(zip(losses, means, strict=True)), **values}
        if self.args.device.startswith("cuda"):
            values["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if features is not None:
            features = gather(features.detach())  # of the global batch
            ratio, effective_rank = (x.item() for x in spread(features))
            values |= {"std_ratio": ratio, "effective_rank": effective_rank}
            if len(features) >= 8 and (ratio < 0.1 or effective_rank < 2):  # a few points span little in any case
                values["collapse"] = True
                log(f"collapse at step {step + 1}: the features' spread is {ratio:.3f} of an even one and their effective rank "
                    f"{effective_rank:.1f}; a lower --lr, a larger batch or a higher teacher momentum helps")
        self.record(step=step + 1, epoch=(step + 1) / self.steps_per_epoch, **values, images_per_s=speed,
                    data_wait=(waited - self.clock_waited) / elapsed)
        self.clock, self.clock_step, self.clock_waited = now, step + 1, waited
        self.bar.set_postfix_str(f"loss {values['loss']:.3f} lr {values['lr']:.1e} {speed:.0f} img/s", refresh=False)

    def after_step(self, step: int, state, knn=None) -> None:
        """Counts the step; saves where due and, after a signal, exits. `state()` and `knn()` are called only when needed."""
        self.bar.update(1)
        done, epoch, args = step + 1 == self.stop, self.steps_per_epoch, self.args
        ended = (step + 1) // epoch if (step + 1) % epoch == 0 else 0
        stopping = bool(_signal_received)
        if world_size() > 1:  # a signal reaches the processes at different steps: they agree where they log
            stopping = self.log_now(step) and bool(mean_over_processes(self.first_bad.new_tensor(float(stopping))) > 0)
        paused = time.perf_counter()
        check_knn = done or (args.knn_every and ended and ended % args.knn_every == 0)
        saving = done or stopping or (args.save_every and ended and ended % args.save_every == 0)
        if saving:
            self.check()
            content = state()
            self.check_weights(step + 1, content)
        if knn and check_knn:
            try:
                self.record_knn(step + 1, knn())
            except KeyboardInterrupt:  # the check is given up; the run is saved and ends
                if not saving:
                    self.check()
                    content = state()
                    self.check_weights(step + 1, content)
                saving = stopping = True
        if saving:
            self.save(step + 1, content)
        if rank() == 0 and (check_knn or stopping):
            self.draw_curves()
        self.clock += time.perf_counter() - paused  # speed is the steps' own
        if stopping:
            self.bar.close()
            log(f"signal received: saved {self.folder / 'checkpoint.pth'} at step {step + 1}; continue with --resume")
            sys.exit(128 + _signal_received[0] if _signal_received else 1)
        if done:
            self.bar.close()

    def record_knn(self, step: int, accuracy: float | None) -> None:
        if accuracy is not None:
            log(f"step {step} (epoch {step / self.steps_per_epoch:.1f}): k-NN top-1 {accuracy:.1f} %")
            self.record(step=step, knn=accuracy)

    def save(self, step: int, state: dict) -> None:
        """Writes the checkpoint and the bare backbone."""
        if rank() == 0:
            content = {**state, "step": step, "args": plain(vars(self.args))} | ({"data": self.data} if self.data else {})
            save_file(content, self.folder / "checkpoint.pth")
            networks = {name: state[name] for name in ("student", "teacher") if name in state}
            if networks:  # a probe has none
                weights = backbone_weights({"meta": state["meta"], **networks})
                weights = {key: value for key, value in weights.items() if key != "mask_token"}
                save_file(weights, self.folder / "backbone.pth")
        barrier()

    def draw_curves(self) -> None:
        """One panel for each logged value over the steps."""
        curves = {}
        for record in self.records():
            for name, value in record.items():
                if name not in ("step", "epoch", "collapse") and isinstance(value, (int, float)):
                    curves.setdefault(name, []).append((record["step"], value))
        columns = 4
        rows = max(1, math.ceil(len(curves) / columns))
        figure, axes = subplots(rows, columns, 3.2, 2.2)
        for axis in axes.flat[len(curves) :]:
            axis.axis("off")
        for axis, (name, points) in zip(axes.flat, curves.items(), strict=False):
            axis.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else None)
            axis.set_title(name, fontsize=9)
            axis.tick_params(labelsize=7)
        figure.savefig(self.folder / "curves.png", dpi=80)


def subplots(rows: int, columns: int, width: float, height: float):
    """A figure for a file, and its axes (rows, columns), of so many inches each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def make_folder(folder: Path) -> None:
    """For output. Raises InputError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder} for output: {error.strerror}") from None


def plain(values: dict) -> dict:
    """Arguments as plain containers, as they come back from a checkpoint."""
    return json.loads(json.dumps(values))


# ---------------------------------------------------------------------------------------------------------- arguments


CORES = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)  # that we may use


class Parser(argparse.ArgumentParser):
    """Whose errors are one line, as all others."""

    def error(self, message):
        self.exit(2, f"error: {message}; see --help\n")


def non_negative(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser, method: str) -> None:
    """The flags that every training script takes. A default of None comes from the recipe (or is settled by `setup`)."""
    flag = argparse.BooleanOptionalAction
    group = parser.add_argument_group("data")
    group.add_argument("--data", default="digits", help=f"digits (the default), {', '.join(DATASETS)}, or a directory of images")
    group.add_argument("--data_path", default="data", help="where named data sets are, or are downloaded to (default: data)")
    group.add_argument("--img_size", type=int, help="side of the training views in pixels (default: recipe)")
    group = parser.add_argument_group("model")
    group.add_argument("--arch", help=f"{', '.join([*VITS, *RESNETS])} or timm/NAME (default: recipe)")
    group.add_argument("--patch_size", type=int, help="side of a ViT's patches in pixels (default: recipe)")
    group.add_argument("--init", metavar="FILE", help="start from these backbone weights")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, help="(default: recipe)")
    group.add_argument("--batch_size", type=int, help="global, over all processes (default: recipe)")
    group.add_argument("--lr", type=float, help="for a batch of 256; scaled linearly (default: recipe)")
    group.add_argument("--warmup_epochs", type=float, help="(default: recipe)")
    group.add_argument("--weight_decay", type=float, help="(default: recipe)")
    group.add_argument("--max_steps", type=int, help="stop here; schedules still span --epochs")
    group = parser.add_argument_group("system")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--num_workers", type=non_negative, default=CORES, help="that decode files (default: %(default)s)")
    group.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    group.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="(default: bf16 on CUDA, else fp32)")
    group.add_argument("--compile", action=flag, help="torch.compile the backbones (default: on CUDA)")
    group.add_argument("--output_dir", default=f"runs/{method}", help="(default: %(default)s)")
    group.add_argument("--resume", action="store_true", help="go on from output_dir/checkpoint.pth, if there is one")
    group.add_argument("--overwrite", action="store_true", help="replace the run that output_dir holds")
    group.add_argument("--save_every", type=non_negative, default=1, help="epochs between checkpoints; 0: at the end (default: 1)")
    group.add_argument("--knn_every", type=non_negative, default=10, help="epochs between k-NN checks; 0: at the end (default: 10)")
    group.add_argument("--log_every", type=int, default=10, help="steps between log records (default: 10)")


RECIPE_OF = dict(cifar100="cifar10", svhn="cifar10", stl10="cifar10", flowers102="imagenet", pets="imagenet", cars="imagenet",
                 aircraft="imagenet")


def apply_recipe(args, recipes: dict, data: ImageData, name: str | None = None) -> dict:
    """Fills the arguments that were not given from the data set's recipe, says which, and returns the recipe.

    A directory takes the recipe of CIFAR-10 where --img_size or, without it, its first image has at most 64 pixels a side, else
    ImageNet's, unless `name` says which data set it holds.
    """
    name = name or args.data
    name = RECIPE_OF.get(name, name)
    if name not in recipes:
        name = "cifar10" if (getattr(args, "img_size", None) or max(data.image_size())) <= 64 else "imagenet"
    recipe = recipes[name]
    for key, value in recipe.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    if args.batch_size < 2:
        raise InputError("--batch_size must be at least 2")
    log(f"{len(data)} training images of {args.data}, recipe {name}; {args.device}, {args.dtype}, {world_size()} process(es)")
    return recipe
