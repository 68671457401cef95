"""What the five method files and the two evaluations share. Nothing in here is about a paper.

Where the first questions of a reader have their answer:

an image's random numbers     `draw`: a function of seed, step and view, made for the global batch;
                              each process takes its own rows, and nothing has to be saved
two processes train as one    `gather`, whose backward adds up what all of them ask of a row, and
                              `BatchNorm`, which is built on it
one more data set             `DATASETS`, or a folder
one more augmentation         `View`, a column in `COLUMNS`, and `augment`
one more backbone             `create_backbone`; what it has to offer is said above `ResNet`
what a checkpoint holds       `Run.save`
Ctrl-C, a full disk, mistakes `launch`; during training `Run.end_step`

Symbols, here and in all files: B images of this process, M of the global batch, V views, L layers,
N patch tokens, T = 1 + N tokens, D width, K outputs of a head, C classes, S side of an image.
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
import socket
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections import Counter, OrderedDict
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as tv
from tqdm import tqdm

# --------------------------------------------------------------------------------------- launch

class InputError(Exception):
    """A mistake that the user can mend: `launch` prints it as one line and exits with code 2."""


class Terminal:
    """stdout or stderr that cannot end a run: what it does not take is replaced or dropped."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")

    def write(self, text: str) -> int:
        encoding = self.stream.encoding or "utf-8"
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


signals = []  # SIGINT and SIGTERM that have arrived


def on_signal(number: int, frame) -> None:
    """Ends the command at once, but for a training step, which `Run` finishes first."""
    signals.append(number)
    if not Run.in_step:
        raise KeyboardInterrupt


def launch(main) -> None:
    """Runs `main()`. Whatever ends it early becomes one line and an exit code: 2 for input that
    can be mended, 1 for a file that cannot be read or written, 128 + number for a signal."""
    sys.stdout = Terminal(sys.stdout)
    sys.stderr = Terminal(sys.stderr)
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C; what torchrun and schedulers send
        signal.signal(number, on_signal)
    try:
        main()
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # and with them a loader and its workers
        if isinstance(error, KeyboardInterrupt):
            tqdm.write(f"stopped by {signal.Signals(signals[-1]).name}", file=sys.stderr)
            sys.exit(128 + signals[-1])
        # a loader's worker was killed, perhaps for want of memory
        killed = isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
        if killed or isinstance(error, (InputError, OSError)):
            tqdm.write(f"error: {one_line(error)}", file=sys.stderr)
            sys.exit(2 if isinstance(error, InputError) else 1)
        raise
    if dist.is_initialized():  # not after an error: others may wait for what does not come
        barrier()
        time.sleep(0.1)  # torch 2.6 would wait for gloo's threads, and they for Python's lock
        dist.destroy_process_group()


def one_line(error: Exception) -> str:
    """The last line of a message; a loader's worker puts its traceback before it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip().removeprefix("common.InputError: ")


def rank() -> int:
    """The number of this process; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def log(message: str) -> None:
    """Prints on the first process only, above the progress bar."""
    if rank() == 0:
        tqdm.write(message)
        sys.stdout.flush()


log_once = functools.cache(log)


def progress(items=None, **options) -> tqdm:
    """A progress bar on the first process; in a log file a line every ten seconds."""
    interval = 0.5 if sys.stderr.isatty() else 10
    return tqdm(items, disable=rank() > 0, mininterval=interval, dynamic_ncols=True, **options)


PATIENCE = timedelta(minutes=30)  # for the first process, which may download the data


def fresh_store(store, number: int) -> dist.Store:
    """A store for this start alone, which its first process serves. torchrun's own outlives the
    processes that it starts again, and still says where the dead ones listened."""
    host = os.environ["MASTER_ADDR"]
    if number == 0:
        fresh = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
        store.set("port", str(fresh.port))
        return fresh
    while True:
        port = int(store.get("port"))
        try:
            socket.create_connection((host, port), timeout=5).close()
            return dist.TCPStore(host, port, timeout=PATIENCE)
        except OSError:
            time.sleep(0.1)  # the port is that of a dead process: wait for the new one


def setup(args) -> torch.device:
    """Joins torchrun's process group if there is one, chooses device, dtype and compilation where
    `args` leaves them open, and seeds the weights."""
    if args.device == "auto":
        accelerator = torch.accelerator.is_available()
        args.device = torch.accelerator.current_accelerator().type if accelerator else "cpu"
    cuda = args.device == "cuda"
    # torchrun says which of this machine's GPUs is ours
    device = torch.device(args.device, int(os.environ.get("LOCAL_RANK", 0)) if cuda else None)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {args.device} is not available: use --device auto or cpu, or "
                         f"lower --nproc_per_node") from None
    if cuda:
        torch.cuda.set_device(device)  # where NCCL looks for it
    if "RANK" in os.environ and not dist.is_initialized():
        try:
            store, number, processes = next(dist.rendezvous("env://"))
        except ValueError as error:
            raise InputError(f"RANK is set, but not all that torchrun sets ({error}): start with "
                             f"torchrun, or unset RANK") from None
        dist.init_process_group("nccl" if cuda else "gloo", store=fresh_store(store, number),
                                rank=number, world_size=processes, timeout=PATIENCE)
    if args.dtype is None:
        args.dtype = "fp32"
        if cuda:
            args.dtype = "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    if getattr(args, "compile", False) is None:
        args.compile = cuda
    # TF32 for what autocast leaves in fp32; convolutions would take it for fp32 too
    if args.dtype != "fp32":
        torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = args.dtype != "fp32"
    torch.manual_seed(args.seed)  # of the weights alone: all else comes from `draw`
    return device


def autocast(device: torch.device, dtype: str):
    """The one precision path: autocast to bf16 or fp16, or nothing for fp32."""
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, types[dtype], enabled=dtype != "fp32")


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device, without waiting for what that still has to do. Only CUDA keeps a
    copy of what it has not read yet."""
    return x.to(device, non_blocking=device.type == "cuda")


def to_fp32(x):
    """Half-precision tensors in fp32; everything else as it is."""
    half = isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16)
    return x.float() if half else x


def fp32(loss):
    """Decorator: the function runs outside autocast, its half-precision tensors raised to fp32."""

    @functools.wraps(loss)
    def in_fp32(*args, **kwargs):
        args = [to_fp32(x) for x in args]
        kwargs = {name: to_fp32(x) for name, x in kwargs.items()}
        device = next(x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with torch.autocast(device.type, enabled=False):
            return loss(*args, **kwargs)

    return in_fp32


def draw(seed: int, step: int, stream: int, rows: int, columns: int) -> Tensor:
    """(rows, columns) uniform numbers in [0, 1): a pure function of its arguments."""
    # NumPy's, since its sequence is the same on every device and in every version
    generator = np.random.default_rng([seed, step, stream])
    return torch.from_numpy(generator.random((rows, columns), dtype=np.float32))


def local_rows(global_batch: int) -> slice:
    """The rows of the global batch that belong to this process."""
    B = global_batch // world_size()
    return slice(rank() * B, (rank() + 1) * B)


# ----------------------------------------------------------------------------------------- data

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, for every data set; checkpoints say what they used
STD = (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = (*torchvision.datasets.folder.IMG_EXTENSIONS, ".jpe", ".jfif", ".gif")
DATASETS = {  # name: (torchvision's class, arguments of its training split, of its test split)
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
    """One split of n images: small ones in memory as uint8 (n, 3, H, W), others as paths.

    labels (n,) are -1 where unknown; classes are their names. The images move to the device with
    the first step; everything else stays on the CPU.
    """

    labels: Tensor
    classes: list
    images: Tensor | None = None
    paths: list | None = None

    def __len__(self):
        return len(self.labels)

    @property
    def labelled(self) -> bool:
        """Whether any label is known."""
        return bool((self.labels >= 0).any())

    def subset(self, rows: Tensor) -> "ImageData":
        """Some of the images, in the order of `rows`."""
        part = ImageData(self.labels[rows], self.classes)
        if self.images is not None:
            part.images = self.images[rows]
        if self.paths:
            part.paths = [self.paths[i] for i in rows.tolist()]
        return part

    def image_size(self) -> tuple[int, int]:
        """Height and width; of the first image where they are files."""
        image = read_image(self.paths[0]) if self.images is None else self.images[0]
        return tuple(image.shape[-2:])

    def fingerprint(self) -> str:
        """Number and size of the images, and a digest of their labels and their names below the
        folder, which may move."""
        digest = hashlib.sha256(self.labels.numpy().tobytes())
        root = len(os.path.commonprefix(self.paths or []))
        for path in self.paths or []:
            digest.update(os.fsencode(path[root:]) + b"\n")
        height, width = self.image_size()
        return f"{len(self)} images of {height} x {width}, {digest.hexdigest()[:16]}"


def read_image(path) -> Tensor:
    """One file as uint8 (3, H, W), upright. Raises InputError with its name if it is damaged."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)  # phones store the rotation beside the pixels
            if image.mode == "F":
                raise ValueError("pixels are floating-point numbers of unknown range")
            if image.mode.startswith("I"):  # integers of more than 8 bits
                image = Image.fromarray(from_16_bits(np.asarray(image)))
            return tv.pil_to_tensor(image.convert("RGB"))
    except Exception as error:
        if isinstance(error, PermissionError):
            raise
        raise InputError(f"cannot read image {path} ({one_line(error)}): replace or delete "
                         f"the file") from None


def from_16_bits(pixels: np.ndarray) -> np.ndarray:
    """Whole numbers from 0 to 65535 -> uint8."""
    least, most = pixels.min(), pixels.max()
    if least < 0 or most > 65535:
        raise ValueError(f"pixels from {least} to {most} do not fit 0 to 65535")
    if 0 < most < 4096:
        log_once("16-bit images that use 12 bits or fewer are nearly black: scale them to 0..65535")
    return (pixels / 257).round().astype(np.uint8)  # 65535 / 257 = 255


def find_images(folder) -> list[str]:
    """All image files below a folder, sorted, but hidden ones; links are followed, each folder is
    read once, and files of other kinds are counted aloud."""

    def fail(error):
        raise error

    files, seen = [], set()
    if not os.path.isdir(folder):
        return files
    for top, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        if os.path.realpath(top) in seen:
            folders.clear()  # a link to a folder above would never end
            continue
        seen.add(os.path.realpath(top))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [os.path.join(top, name) for name in names if not name.startswith(".")]
    others = [file for file in files if not file.lower().endswith(IMAGE_SUFFIXES)]
    if others:
        suffixes = Counter(os.path.splitext(file)[1].lower() or "no ending" for file in others)
        counts = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5))
        log(f"{folder}: {len(others)} files are not read as images ({counts})")
    return sorted(set(files) - set(others))


def read_folder(folder: Path, labelled: bool, classes: list | None = None) -> ImageData:
    """Images below a folder, labelled by its class folders if it has any and they are asked for.

    classes: names that these may have, in the order of their labels; default: all, sorted.
    Images of one size up to 96 pixels and 2 GiB together are decoded once; the first few tell.
    """
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    folders = [entry for entry in entries if entry.is_dir() and labelled]
    training = classes is None
    classes = classes or [entry.name for entry in folders]
    paths = []
    labels = []
    for entry in folders:
        images = find_images(entry)
        if entry.name not in classes or (training and not images):
            reason = "has no images" if training else "is not among the training images"
            raise InputError(f"class folder {entry} {reason}: add some, or delete it")
        paths += images
        labels += [classes.index(entry.name)] * len(images)
    loose = [entry.name for entry in entries if not entry.is_dir()]
    if folders and loose:
        log(f"{folder}: {len(loose)} files beside the class folders are not read ({loose[0]} ...)")
    # without class folders, or where labels are not asked for: every image below
    if not folders:
        paths = find_images(folder)
        labels = [-1] * len(paths)
    if not paths:
        raise InputError(f"no images under {folder}: expected files such as .jpg or .png")
    data = ImageData(torch.tensor(labels), classes, paths=paths)
    # small images of one size are decoded once and stay in memory
    shape = read_image(paths[0]).shape
    alike = all(read_image(path).shape == shape for path in paths[1:8])
    if alike and max(shape) <= 96 and len(data) * math.prod(shape) <= 2 * 2**30:
        with progress(paths, desc=f"reading {folder.name}", leave=False) as bar:
            images = [read_image(path) for path in bar]
        if all(image.shape == shape for image in images):
            data.images = torch.stack(images)  # (n, 3, H, W)
    return data


def check_data(data: str) -> None:
    """Raises InputError for what is neither a named data set nor a directory."""
    if data not in ("digits", *DATASETS) and (not data or not Path(data).is_dir()):
        raise InputError(f"--data {data or repr(data)} is neither a directory nor one of: digits "
                         f"{' '.join(DATASETS)}")


def load_data(data: str, data_path: str = "data") -> tuple[ImageData, ImageData | None]:
    """Training and test images of a named data set or of a directory, which may lack the latter."""
    if data == "digits":
        return load_digits()
    if data in DATASETS:
        try:
            if rank() == 0:  # one process downloads, the others find the files
                loaded = load_torchvision(data, data_path)
            barrier()
            return loaded if rank() == 0 else load_torchvision(data, data_path)
        except Exception as error:
            raise InputError(f"{data} is not under {data_path} and could not be downloaded "
                             f"({one_line(error)}): pass --data_path or --data DIR") from None
    check_data(data)
    root = Path(data)
    if not (root / "train").is_dir():
        return read_folder(root, labelled=False), None
    train = read_folder(root / "train", labelled=True)
    for name in ("val", "validation", "test"):
        if (root / name).is_dir() and not train.classes:
            log(f"{root / name} is not read, since {root / 'train'} has no class folders")
        elif (root / name).is_dir():
            test = read_folder(root / name, True, train.classes)
            # both from files if one is: those in memory are not cut to their middle
            if train.images is None or test.images is None:
                train.images = None
                test.images = None
            return train, test
    return train, None


def load_digits() -> tuple[ImageData, ImageData]:
    """1,797 handwritten digits of 8 x 8 pixels, which ship inside scikit-learn."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    digits = datasets.load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)  # (n, 8, 8)
    images = torch.from_numpy(images)[:, None].repeat(1, 3, 1, 1)  # (n, 3, 8, 8)
    data = ImageData(torch.from_numpy(digits.target).long(), list(range(10)), images)
    rows = train_test_split(range(len(data)), test_size=0.2, random_state=0, stratify=data.labels)
    return tuple(data.subset(torch.tensor(part)) for part in rows)


def load_torchvision(data: str, root: str) -> tuple[ImageData, ImageData]:
    """Both splits of a named data set, downloaded into `root` where they are not there."""
    name, *splits = DATASETS[data]
    loaded = []
    for arguments in splits:
        try:
            split = getattr(torchvision.datasets, name)(root, download=False, **arguments)
        except (RuntimeError, FileNotFoundError):
            split = getattr(torchvision.datasets, name)(root, download=True, **arguments)
        fields = vars(split)  # some are not public, and each class has its own names
        if "_samples" in fields:
            paths, labels = zip(*fields["_samples"], strict=True)
        else:
            paths = fields.get("_image_files") or fields.get("_images")
            labels = next(fields[key] for key in ("targets", "labels", "_labels") if key in fields)
        labels = torch.as_tensor(labels).long()
        images = ImageData(labels, list(range(int(labels.max()) + 1)))
        if paths:
            images.paths = [str(path) for path in paths]
        else:  # MNIST (n, H, W), CIFAR (n, H, W, 3), SVHN and STL-10 (n, 3, H, W)
            pixels = torch.as_tensor(fields["data"])
            if pixels.ndim == 3:
                pixels = pixels[..., None].expand(-1, -1, -1, 3)  # (n, H, W, 3)
            if pixels.shape[-1] == 3:
                pixels = pixels.permute(0, 3, 1, 2)  # (n, 3, H, W)
            images.images = pixels.contiguous()
        loaded.append(images)
    return tuple(loaded)


# ---------------------------------------------------------------------------------------- views

@dataclass(frozen=True)
class View:
    """How one view is made from an image; the defaults are a plain random crop and flip.

    scale: share of the image's area that is cropped. flip, p_jitter, grey, blur and solarize are
    probabilities, jitter the strengths of brightness, contrast, saturation and hue. All as in
    torchvision, but that the order of the four is drawn for a batch and not for each image.
    """

    size: int
    scale: tuple = (0.08, 1.0)
    flip: float = 0.5
    jitter: tuple = (0.0, 0.0, 0.0, 0.0)
    p_jitter: float = 0.0
    grey: float = 0.0
    blur: float = 0.0
    solarize: float = 0.0


def byol_views(size: int, scale=(0.08, 1.0), flip=0.5, blur=True) -> tuple[View, View]:
    """The two views of BYOL and MoCo v3. Blur would erase images of about 32 pixels."""
    shared = dict(size=size, scale=scale, flip=flip, jitter=(0.4, 0.4, 0.2, 0.1), p_jitter=0.8,
                  grey=0.2)
    return View(**shared, blur=1.0 * blur), View(**shared, blur=0.1 * blur, solarize=0.2)


# what the uniform numbers of one view of one image, a row of `draw`, decide
COLUMNS = {"area": slice(0, 10), "aspect": slice(10, 20), "top": 20, "left": 21, "flip": 22,
           "p_jitter": 23, "brightness": 24, "contrast": 25, "saturation": 26, "hue": 27,
           "grey": 28, "blur": 29, "sigma": 30, "solarize": 31}
DRAWS = 32


def crop_boxes(u: Tensor, height, width, scale) -> Tensor:
    """Uniform numbers (B, DRAWS) and image sizes -> boxes (B, 4): top, left, height and width in
    whole pixels, as torchvision's RandomResizedCrop: the first of ten tries that fits, else as
    much of the middle as an aspect from 3:4 to 4:3 allows."""
    height = torch.as_tensor(height).expand(len(u))  # (B,)
    width = torch.as_tensor(width).expand(len(u))  # (B,)
    share = scale[0] + (scale[1] - scale[0]) * u[:, COLUMNS["area"]]  # (B, 10)
    area = share * (height * width)[:, None]  # (B, 10)
    aspect = torch.exp((2 * u[:, COLUMNS["aspect"]] - 1) * math.log(4 / 3))  # (B, 10)
    w = (area * aspect).sqrt().round().clamp(min=1)  # (B, 10)
    h = (area / aspect).sqrt().round().clamp(min=1)  # (B, 10)
    fits = (w <= width[:, None]) & (h <= height[:, None])  # (B, 10)
    first = fits.int().argmax(1, keepdim=True)  # (B, 1): argmax takes the first of equal ones
    fits = fits.any(1)  # (B,)
    # of those that fit the first; else the middle, as wide or as high as an aspect of 4:3 allows
    w = torch.where(fits, w.gather(1, first)[:, 0], width.minimum((height * 4 / 3).round()))  # (B,)
    h = torch.where(fits, h.gather(1, first)[:, 0], height.minimum((width * 4 / 3).round()))  # (B,)
    # anywhere in the image, in whole pixels
    top = torch.where(fits, u[:, COLUMNS["top"]] * (height - h + 1), (height - h) / 2).floor()
    left = torch.where(fits, u[:, COLUMNS["left"]] * (width - w + 1), (width - w) / 2).floor()
    return torch.stack([top, left, h, w], 1)  # (B, 4)


def resize_weights(start: Tensor, length: Tensor, size: int, out: int) -> Tensor:
    """(B, out, size): the weights of `size` pixels in each output pixel, where an image is cut to
    start ... start + length (B,): PIL's antialiased bilinear filter."""
    start = start[:, None, None]  # (B, 1, 1)
    end = start + length[:, None, None]  # (B, 1, 1)
    scale = (end - start) / out
    centre = start + (torch.arange(out, device=start.device)[:, None] + 0.5) * scale  # (B, out, 1)
    pixel = torch.arange(size, device=start.device) + 0.5  # (size,)
    inside = (pixel > start) & (pixel < end)  # (B, 1, size)
    # a triangle over one pixel of whichever is coarser, input or output
    weights = (1 - (pixel - centre).abs() / scale.clamp(min=1)).clamp(min=0) * inside
    return weights / weights.sum(-1, keepdim=True)


def crop_and_resize(images: Tensor, boxes: Tensor, out: int) -> Tensor:
    """(B, 3, H, W) in [0, 1] and a box for each -> (B, 3, out, out), as two batched matmuls."""
    B, _, H, W = images.shape
    if H == W == out and (boxes[:, 2:] == out).all():
        return images.clone()  # `augment` works in place
    top, left, height, width = to_device(boxes, images.device).unbind(1)  # (B,) each
    x = images.view(B, 3 * H, W) @ resize_weights(left, width, W, out).mT  # (B, 3*H, out)
    rows = resize_weights(top, height, H, out)  # (B, out, H)
    return rows[:, None] @ x.view(B, 3, H, out)  # (B, 3, out, out)


def crop_and_resize_each(images: list[Tensor], boxes: Tensor, out: int) -> Tensor:
    """The same for uint8 images of many sizes."""
    boxes = boxes.int().tolist()
    return torch.stack([tv.resized_crop(image, *box, [out, out], antialias=True)
                        for image, box in zip(images, boxes, strict=True)])  # (B, 3, out, out)


JITTERS = ("brightness", "contrast", "saturation", "hue")


def adjust(x: Tensor, jitter: str, strength: Tensor) -> Tensor:
    """One jitter of images (B, 3, S, S) in [0, 1], with strengths (B, 1, 1, 1) about 0."""
    if jitter == "brightness":
        return (x * (1 + strength)).clamp_(0, 1)
    if jitter == "hue":
        return adjust_hue(x, strength)
    grey = tv.rgb_to_grayscale(x)  # (B, 1, S, S)
    if jitter == "contrast":
        grey = grey.mean((2, 3), keepdim=True)  # (B, 1, 1, 1)
    return torch.lerp(grey, x, 1 + strength).clamp_(0, 1)


def adjust_hue(x: Tensor, strength: Tensor) -> Tensor:
    """Turns the hue by a fraction of the circle; value and saturation of HSV stay."""
    r, g, b = x.unbind(1)  # (B, S, S) each
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    # in sixths of the circle, from red; the largest channel decides, and a lerp by 0 or 1 chooses
    # exactly and faster than where
    hue = torch.lerp(r - g + 4 * chroma, b - r + 2 * chroma, (value == g).float())
    hue = torch.lerp(hue, g - b, (value == r).float()) / chroma.clamp(min=1e-8)
    hue = (hue + 6 * strength[:, 0]).remainder_(6)  # (B, S, S)
    # a channel is at value within a sixth of its own hue, at value - chroma beyond two
    nearness = [(hue - 3).abs_() - 1, 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()]
    nearness = torch.stack(nearness, 1).clamp_(0, 1)  # (B, 3, S, S)
    return nearness.mul_(chroma[:, None]).add_((value - chroma)[:, None])  # (B, 3, S, S)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """(B, 3, S, S) blurred, each image by its own sigma (B,) in pixels, edges reflected."""
    last = x.shape[-1] - 1
    i = torch.arange(last + 1, device=x.device, dtype=x.dtype)  # (S,)

    def weights(j):  # none past 6 sigma: products of denormal numbers are slow
        squared = ((i[:, None] - j) / sigma[:, None, None]) ** 2  # (B, S, S)
        return torch.exp(-0.5 * squared.clamp(max=36)) * (squared < 36)

    # a pixel, and its mirror images at the left and the right edge, which are not doubled
    kernel = weights(i) + weights(-i) * (i > 0) + weights(2 * last - i) * (i < last)
    kernel = (kernel / kernel.sum(-1, keepdim=True))[:, None]  # (B, 1, S, S)
    return kernel @ x @ kernel.mT


def augment(x: Tensor, view: View, u: Tensor, order: list[int]) -> Tensor:
    """What follows the crop: (B, 3, S, S) in [0, 1], uniform numbers (B, DRAWS) -> the same shape.

    order: that of the four jitters. Which images an operation touches is decided on the CPU, so
    nothing waits for the device. `x` is changed in place.
    """
    at_once = max(1, 2**18 // x[0].numel())  # on a CPU, as many images as stay in its cache
    if x.device.type == "cpu" and len(x) > at_once:
        parts = zip(x.split(at_once), u.split(at_once), strict=True)
        return torch.cat([augment(images, view, numbers, order) for images, numbers in parts])

    def chosen(name: str, probability: float) -> Tensor:
        rows = (u[:, COLUMNS[name]] < probability).nonzero()[:, 0]  # (n,)
        return to_device(rows, x.device)

    if view.flip:
        # left and right exchanged
        rows = chosen("flip", view.flip)
        x[rows] = x[rows].flip(-1)
    for place in order:
        # where the jitter is not drawn, a strength of zero leaves the image as it is
        jitter = JITTERS[place]
        if view.p_jitter and view.jitter[place]:
            strength = view.jitter[place] * (2 * u[:, COLUMNS[jitter]] - 1)  # (B,)
            strength = strength * (u[:, COLUMNS["p_jitter"]] < view.p_jitter)
            x = adjust(x, jitter, to_device(strength, x.device)[:, None, None, None])
    if view.grey:
        rows = chosen("grey", view.grey)
        x[rows] = tv.rgb_to_grayscale(x[rows], 3)
    if view.blur:
        rows = chosen("blur", view.blur)
        sigma = 0.1 + 1.9 * u[:, COLUMNS["sigma"]]  # (B,)
        x[rows] = gaussian_blur(x[rows], to_device(sigma, x.device)[rows])
    if view.solarize:
        rows = chosen("solarize", view.solarize)
        images = x[rows]
        # what is brighter than the middle is inverted
        x[rows] = images.lerp(1 - images, (images >= 128 / 255).float())
    return x


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, images: int) -> Tensor:
    """The order of the images in one epoch; kept, since every step asks for it."""
    return torch.from_numpy(np.random.default_rng([seed, epoch, 1000]).permutation(images))


def outlive_signals(worker: int) -> None:
    """In a loader's worker: terminals and job schedulers signal it too, but the main process may
    need it for the step at which it saves."""
    if hasattr(os, "setpgrp"):  # Windows has neither groups nor alarms
        os.setpgrp()
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(20))


@dataclass
class ViewLoader:
    """`steps(start, stop)` yields training steps as (step, views, index).

    views: for each `View` a normalised tensor (B, 3, S, S) on the device; index (B,): rows of
    `data`. batch_size is M. An epoch is a permutation of the data without its incomplete last
    batch. Images in memory are cropped on the device; files are decoded and cropped by workers,
    a batch each. `waited`: seconds spent waiting for crops, since they were last read.
    """

    data: ImageData
    views: tuple
    batch_size: int
    seed: int
    device: torch.device
    num_workers: int = 0
    mean: tuple = MEAN
    std: tuple = STD

    def __post_init__(self):
        if self.batch_size % world_size():
            raise InputError(f"--batch_size {self.batch_size} does not divide by {world_size()} "
                             f"processes")
        if len(self.data) < self.batch_size:
            raise InputError(f"{len(self.data)} images are fewer than --batch_size "
                             f"{self.batch_size}: lower it or add images")
        # known before the workers start, which have no process group to ask
        self.rows = local_rows(self.batch_size)
        self.steps_per_epoch = len(self.data) // self.batch_size
        self.in_workers = self.data.images is None  # then they are decoded
        self.waited = 0.0

    def index(self, step: int) -> Tensor:
        """This process's rows of the data at a step (B,)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = permutation(self.seed, epoch, len(self.data))
        return order[position * self.batch_size :][self.rows]

    def __getitem__(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """For each view the crops (B, 3, S, S), uint8 from files and in [0, 1] from memory, and
        this process's uniform numbers (B, DRAWS)."""
        index = self.index(step)
        if self.data.images is None:
            images = [read_image(self.data.paths[i]) for i in index.tolist()]
            height, width = torch.tensor([image.shape[1:] for image in images]).T
            resize = crop_and_resize_each
        else:
            images = self.data.images
            images = images[to_device(index, images.device)].float() / 255
            height, width = images.shape[-2:]
            resize = crop_and_resize
        crops = []
        for v, view in enumerate(self.views):
            u = draw(self.seed, step, v, self.batch_size, DRAWS)[self.rows]
            crops.append((resize(images, crop_boxes(u, height, width, view.scale), view.size), u))
        return crops

    def steps(self, start: int, stop: int):
        """Yields (step, views, index) for start <= step < stop."""
        device = torch.device(self.device)
        mean = torch.tensor(self.mean, device=device)  # made once, since that waits for the device
        std = torch.tensor(self.std, device=device)
        if not self.views:  # the index alone is wanted
            batches = ([] for _ in range(start, stop))
        elif self.in_workers:
            # a sample of this loader is a whole batch, and its index is the step
            batches = iter(DataLoader(
                self, batch_size=None, sampler=range(start, stop), num_workers=self.num_workers,
                pin_memory=device.type == "cuda", generator=torch.Generator(),
                worker_init_fn=outlive_signals))
        else:
            self.data.images = self.data.images.to(device)
            batches = map(self.__getitem__, range(start, stop))
        for step in range(start, stop):
            began = time.perf_counter()
            crops = next(batches)
            self.waited += time.perf_counter() - began
            # the order of the jitters is the batch's, so that each is one operation
            order = np.random.default_rng([self.seed, step, 1001]).permutation(4).tolist()
            views = []
            for view, (x, u) in zip(self.views, crops, strict=True):
                if x.dtype == torch.uint8:
                    x = to_device(x, device).float() / 255
                views.append(tv.normalize(augment(x, view, u, order), mean, std))
            yield step, views, self.index(step)


def centre_crops(paths: list, size: int) -> Tensor:
    """Files as uint8 (B, 3, size, size): the short side resized to size * 256 / 224, then cut."""
    side, bicubic = [round(size * 256 / 224)], tv.InterpolationMode.BICUBIC
    images = [tv.resize(read_image(path), side, bicubic, antialias=True) for path in paths]
    return torch.stack([tv.center_crop(image, [size, size]) for image in images])


def eval_batches(data: ImageData, rows, size: int, device, batch_size=256, num_workers=0,
                 mean=MEAN, std=STD):
    """Yields normalised images (B, 3, size, size) in the order of `rows`: those in memory resized
    as they are, files as `centre_crops`."""
    rows = torch.as_tensor(rows)
    if data.images is not None:
        batches = (data.images[chunk.to(data.images.device)] for chunk in rows.split(batch_size))
    else:
        batches = DataLoader([data.paths[i] for i in rows.tolist()], batch_size,
                             collate_fn=functools.partial(centre_crops, size=size),
                             num_workers=num_workers, worker_init_fn=outlive_signals,
                             generator=torch.Generator())  # leaves the global one alone
    for x in batches:
        x = x.to(device).float() / 255
        if x.shape[-2:] != (size, size):
            if x.device.type == "mps":  # has no antialiased bicubic in torch 2.6
                x = x.cpu()
            x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        yield tv.normalize(x.to(device), mean, std)


# ------------------------------------------------------------------------------------ backbones

class Attention(nn.Module):
    """Multi-head self-attention over T tokens."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> q, k, v of shape (B, heads, T, D / heads)."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, T, 3, heads, D / heads)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, T, D / heads) each

    def forward(self, x: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(*self.split(x))  # (B, heads, T, D / heads)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, T, D)


class Block(nn.Module):
    """Transformer block; post_norm: each norm after its residual sum, as in Data2Vec2."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, post_norm: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(OrderedDict(  # timm's names
            fc1=nn.Linear(dim, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, dim)))
        self.post_norm = post_norm

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """keep (B, 2): factors of the two branches, 0 where stochastic depth drops one."""
        if self.post_norm:
            x = self.norm1(x + drop(self.attn(x), keep, 0))
            return self.norm2(x + drop(self.mlp(x), keep, 1))
        x = x + drop(self.attn(self.norm1(x)), keep, 0)
        return x + drop(self.mlp(self.norm2(x)), keep, 1)


def drop(branch: Tensor, keep: Tensor | None, which: int) -> Tensor:
    """A residual branch (B, T, D), scaled for each image by column `which` of keep (B, 2)."""
    return branch if keep is None else keep[:, which, None, None] * branch  # (B, 1, 1) * (B, T, D)


def sincos_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """(1, T, D) fixed positions: a quarter each for sin x, cos x, sin y, cos y; 0 for [CLS]."""
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # (D/4,)
    y = torch.arange(grid[0]).repeat_interleave(grid[1])[:, None] * omega  # (N, D/4)
    x = torch.arange(grid[1]).repeat(grid[0])[:, None] * omega  # (N, D/4)
    patches = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1).float()  # (N, D)
    return F.pad(patches, (0, 0, 1, 0))[None]  # (1, T, D)


def resize_positions(positions: Tensor, old, new, as_dino: bool) -> Tensor:
    """(1, T, D) of an old grid, bicubically for a new one: exactly or, as_dino, with the factor
    (n + 0.1) / m of DINO's and iBOT's code, which public weights were measured with."""
    patches = positions[:, 1:].unflatten(1, old).permute(0, 3, 1, 2).float()  # (1, D, h, w)
    if as_dino:
        factor = [(n + 0.1) / m for n, m in zip(new, old, strict=True)]
        patches = F.interpolate(patches, scale_factor=factor, mode="bicubic")
    else:
        patches = F.interpolate(patches, new, mode="bicubic")
    return torch.cat([positions[:, :1].float(), patches.flatten(2).mT], 1)  # (1, T, D)


class VisionTransformer(nn.Module):
    """ViT as in timm and DINO, with their state-dict keys.

    pos_embed: "learnt", or "sincos" for fixed ones. drop_path: stochastic depth, rising linearly
    to this at the last block. post_norm: Data2Vec2's blocks, a norm before the first and none
    after the last. mask_token: adds that token, the one key beyond timm's. Weights start
    Xavier-uniform, those of q, k and v as three matrices (MoCo v3, MAE).
    """

    has_tokens = True

    def __init__(self, img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6,
                 mlp_ratio=4.0, in_chans=3, pos_embed="learnt", drop_path=0.0, post_norm=False,
                 mask_token=False):
        super().__init__()
        # created in this order, which decides what the seed gives to whom
        if embed_dim % num_heads:
            raise InputError(f"--num_heads {num_heads} does not divide the width {embed_dim}")
        self.embed_dim = embed_dim
        self.layer_dims = [embed_dim] * depth
        self.patch_size = patch_size
        self.grid = self.grid_of(*(img_size if isinstance(img_size, tuple) else [img_size] * 2))
        # how other grids get their positions: exactly, or as the code that public weights are from
        self.positions_as_dino = False
        proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj))
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02)
        if mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        if pos_embed == "sincos":
            self.pos_embed = nn.Parameter(sincos_positions(embed_dim, self.grid), False)
        else:
            positions = torch.empty(1, 1 + math.prod(self.grid), embed_dim)
            self.pos_embed = nn.Parameter(nn.init.trunc_normal_(positions, std=0.02))
        norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.norm_pre = norm if post_norm else nn.Identity()
        blocks = [Block(embed_dim, num_heads, mlp_ratio, post_norm) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.Identity() if post_norm else norm
        self.drop_rates = np.linspace(0, drop_path, depth).tolist()
        layers = [item for item in self.named_modules() if isinstance(item[1], nn.Linear)]
        for name, layer in [*layers, ("patch_embed.proj", self.patch_embed.proj)]:
            # q, k and v are one layer, but three matrices to Xavier
            matrices = 3 if name.endswith("qkv") else 1
            bound = math.sqrt(6 / (layer.weight[0].numel() + len(layer.weight) // matrices))
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image."""
        if height % self.patch_size or width % self.patch_size:
            raise InputError(f"image size {height} x {width} is not a multiple of patch size "
                             f"{self.patch_size}")
        return height // self.patch_size, width // self.patch_size

    def resized(self, positions: Tensor, as_dino: bool) -> Tensor:
        """Positions (1, T, D) of a file, for the grid of this model instead of a square one."""
        grid = position_grid(positions)
        if grid is None:
            return positions  # of no square grid: loading them says so
        return resize_positions(positions, grid, self.grid, as_dino)

    def embed(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) -> what enters the first block (B, T, D)."""
        grid = self.grid_of(*x.shape[-2:])
        x = self.patch_embed(x).flatten(2).mT  # (B, D, h, w) -> (B, N, D)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)  # (B, N, D)
        positions = self.pos_embed
        if grid != self.grid:
            positions = resize_positions(positions, self.grid, grid, self.positions_as_dino)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)  # (B, T, D)
        return self.norm_pre(x + positions)

    def block_outputs(self, x: Tensor, mask: Tensor | None = None,
                      noise: Tensor | None = None) -> list[Tensor]:
        """Every block's output (B, T, D), before the final norm. noise: the uniform numbers
        (B, 2 * L) that decide stochastic depth in training; default: drawn here."""
        x = self.embed(x, mask)
        if noise is None and self.training and self.drop_rates[-1] > 0:
            noise = torch.rand(len(x), 2 * len(self.blocks), device=x.device)
        outputs = []
        for i, (block, rate) in enumerate(zip(self.blocks, self.drop_rates, strict=True)):
            keep = None
            if self.training and rate > 0:
                # attention and MLP are dropped for each image by itself
                keep = (noise[:, 2 * i : 2 * i + 2] >= rate).to(x.dtype) / (1 - rate)  # (B, 2)
            x = block(x, keep)
            outputs.append(x)
        return outputs

    def forward_features(self, x: Tensor, mask: Tensor | None = None,
                         noise: Tensor | None = None) -> Tensor:
        """(B, T, D) after the final norm. mask: bool (B, N), True for the mask token."""
        return self.norm(self.block_outputs(x, mask, noise)[-1])

    def forward(self, x: Tensor, layers: bool = False):
        """[CLS] after the final norm (B, D); with `layers` a list of one for each block."""
        outputs = [self.norm(y[:, 0]) for y in self.block_outputs(x)[0 if layers else -1 :]]
        return outputs if layers else outputs[-1]

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """The last n blocks' outputs (B, T, D), each through the final norm."""
        return [self.norm(y) for y in self.block_outputs(x)[-n:]]

    def tokens(self, x: Tensor, n: int = 1) -> list[tuple[Tensor, Tensor]]:
        """[CLS] (B, D) and patches (B, h, w, D) of the last n blocks, through the final norm."""
        grid = self.grid_of(*x.shape[-2:])
        return [(y[:, 0], y[:, 1:].unflatten(1, grid)) for y in self.get_intermediate_layers(x, n)]

    def get_last_selfattention(self, x: Tensor, queries: int | None = None) -> Tensor:
        """(B, heads, T, T): the last block's attention; queries=1: the row of [CLS] alone."""
        x = self.embed(x)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        q, k, _ = last.attn.split(x if last.post_norm else last.norm1(x))
        return (q[:, :, :queries] @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


# vit_nano is ours, for images of a few pixels; the others have timm's sizes
vit_nano = functools.partial(VisionTransformer, embed_dim=96, depth=4, num_heads=3)
vit_tiny = functools.partial(VisionTransformer, embed_dim=192, depth=12, num_heads=3)
vit_small = functools.partial(VisionTransformer, embed_dim=384, depth=12, num_heads=6)
vit_base = functools.partial(VisionTransformer, embed_dim=768, depth=12, num_heads=12)
vit_large = functools.partial(VisionTransformer, embed_dim=1024, depth=24, num_heads=16)
VITS = dict(vit_nano=vit_nano, vit_tiny=vit_tiny, vit_small=vit_small, vit_base=vit_base,
            vit_large=vit_large)
RESNETS = {"resnet18": ("BasicBlock", [2, 2, 2, 2]), "resnet34": ("BasicBlock", [3, 4, 6, 3]),
           "resnet50": ("Bottleneck", [3, 4, 6, 3]), "resnet101": ("Bottleneck", [3, 4, 23, 3])}


class ResNet(torchvision.models.ResNet):
    """torchvision's ResNet without its classifier; under 64 pixels its stem is a 3x3 convolution
    of stride 1 without pooling. A layer is one of the four stages, averaged over the image.

    What every backbone has: `embed_dim` and `layer_dims`, widths of its output and its layers;
    `patch_size`, 1 if there are no patches; `forward(x, layers=False)`; `has_tokens`. If that is
    true, `tokens(x, n)`: of the last n layers [CLS] (B, D) and patches (B, h, w, D), normalised,
    and `block_outputs(x)`: of all layers (B, T, D), not normalised.
    """

    has_tokens = False
    patch_size = 1

    def __init__(self, block: str, depths: list[int], img_size: int = 224):
        super().__init__(getattr(torchvision.models.resnet, block), depths, norm_layer=BatchNorm)
        self.embed_dim = self.fc.in_features  # 512, or 2048 of bottlenecks
        self.layer_dims = [self.embed_dim // ratio for ratio in (8, 4, 2, 1)]
        self.fc = nn.Identity()
        if img_size < 64:
            self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
            self.maxpool = nn.Identity()
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, layers: bool = False):
        """The last stage (B, D); with `layers` a list of the four, (B, D_l) each."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        pooled = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)  # (B, D_l, h, w)
            pooled.append(x.mean((2, 3)))  # (B, D_l)
        return pooled if layers else pooled[-1]


class TimmBackbone(nn.Module):
    """Any timm model, kept in `model`, with its own pooling and normalisation. Layers and tokens
    are those of ViTs with [CLS]."""

    def __init__(self, name: str, img_size: int | None, pretrained: bool):
        super().__init__()
        import timm

        if not timm.is_model(name):
            raise InputError(f"timm has no model {name!r}: timm.list_models() names all")
        if pretrained:
            look_for_hub()
        # built for this image size, and for any other where the model can
        try:
            options = {"img_size": img_size, "dynamic_img_size": True}
            with torch.device("meta"):  # to see which of these its class, or a parent, takes
                classes = type(timm.create_model(name)).__mro__
            known = {option for cls in classes for option in inspect.signature(cls).parameters}
            options = {key: options[key] for key in options if key in known and options[key]}
            self.model = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
        except Exception as error:
            raise InputError(f"cannot make timm/{name} for images of {img_size} pixels "
                             f"({one_line(error)})") from None
        config = timm.data.resolve_model_data_config(self.model)
        self.mean = config["mean"]
        self.std = config["std"]
        self.img_size = config["input_size"][1]
        patch_embed = getattr(self.model, "patch_embed", None)
        self.patch_size = patch_embed.feat_ratio() if hasattr(patch_embed, "feat_ratio") else 1
        self.embed_dim = self.model.head_hidden_size
        self.layer_dims = [self.embed_dim] * len(getattr(self.model, "blocks", [None]))
        self.has_tokens = getattr(self.model, "cls_token", None) is not None
        self.has_tokens &= hasattr(self.model, "get_intermediate_layers")

    def resized(self, positions: Tensor, as_dino: bool) -> Tensor:
        """As timm resizes them: bicubically, antialiased."""
        from timm.layers import resample_abs_pos_embed

        grid = self.model.patch_embed.grid_size
        prefix = self.model.pos_embed.shape[1] - math.prod(grid)
        return resample_abs_pos_embed(positions.float(), grid, num_prefix_tokens=prefix)

    def forward(self, x: Tensor, layers: bool = False):
        if not layers:
            return self.model(x)  # (B, D)
        pooled = getattr(self.model, "global_pool", None)
        if not self.has_tokens or pooled != "token" or hasattr(self.model, "dist_token"):
            raise InputError("layers of a timm model are to be had if its own output is [CLS]")
        return [cls for cls, _ in self.tokens(x, len(self.layer_dims))]

    def tokens(self, x: Tensor, n: int = 1) -> list[tuple[Tensor, Tensor]]:
        outputs = self.model.get_intermediate_layers(x, n=n, return_prefix_tokens=True, norm=True)
        h = x.shape[-2] // self.patch_size
        return [(prefix[:, 0], patches.unflatten(1, (h, -1))) for patches, prefix in outputs]

    def block_outputs(self, x: Tensor) -> list[Tensor]:
        outputs = self.model.forward_intermediates(
            x, norm=False, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True)
        return [torch.cat([prefix, patches], 1) for patches, prefix in outputs]


def look_for_hub() -> None:
    """Tries once whether the hub of timm's weights answers; if not, only its cache is used."""
    from huggingface_hub import constants

    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=5)
    except urllib.error.HTTPError:
        pass  # an answer
    except OSError:
        constants.HF_HUB_OFFLINE = True  # spares a minute of retries


def create_backbone(arch: str, img_size: int | None = 224, patch_size: int = 16, pretrained=False,
                    **options) -> nn.Module:
    """A backbone by name: `vit_*`, `resnet*` or `timm/NAME`; options: our ViTs', None: default."""
    if arch in VITS:
        options = {name: value for name, value in options.items() if value is not None}
        return VITS[arch](img_size=img_size, patch_size=patch_size, **options)
    if arch in RESNETS:
        return ResNet(*RESNETS[arch], img_size=img_size)
    if not arch.startswith("timm/"):
        raise InputError(f"unknown --arch {arch}: use one of {' '.join([*VITS, *RESNETS])} or "
                         f"timm/NAME")
    backbone = TimmBackbone(arch.removeprefix("timm/"), img_size, pretrained)
    if img_size and img_size % backbone.patch_size:
        raise InputError(f"images of {img_size} pixels are not a multiple of patch size "
                         f"{backbone.patch_size} of {arch}")
    return backbone


# ------------------------------------------------------ EMA, schedules, groups of parameters

@torch.no_grad()
def ema_update(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """In place, for every parameter: teacher = momentum * teacher + (1 - momentum) * student.

    Buffers are left alone: a teacher in training mode keeps BatchNorm statistics of its own.
    """
    pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
    torch._foreach_lerp_([t for t, _ in pairs], [s for _, s in pairs], 1 - momentum)


def cosine_schedule(base: float, final: float, total: int, warmup: int = 0,
                    start: float = 0.0) -> np.ndarray:
    """`total` values: linspace(start, base, warmup), then half a cosine from base to final."""
    warmup = min(warmup, total)
    i = np.arange(total - warmup)
    cosine = final + (base - final) * (1 + np.cos(np.pi * i / max(total - warmup, 1))) / 2
    return np.concatenate([np.linspace(start, base, warmup), cosine])


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters: matrices with weight decay; biases, norms, tokens and positions
    without."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        token = name.endswith(("_token", "pos_embed"))
        group = others if token or parameter.ndim <= 1 else decayed
        if parameter.requires_grad:
            group.append(parameter)
    return [dict(params=decayed, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]


# ---------------------------------------------------------------------------------- collectives

class Gather(torch.autograd.Function):
    """all_gather with the gradient that dist.all_gather does not give."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        # a copy, since autograd may hand the same gradient to other tensors
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)  # what every process asks of every row
        return gradient[local_rows(len(gradient))]


def gather(x: Tensor) -> Tensor:
    """(B, ...) of each process -> (M, ...) in the order of the processes, on all of them.

    Differentiable: with the average over processes that DDP takes, the gradient of a loss over
    gathered rows is the one that a single process would have.
    """
    return x if world_size() == 1 else Gather.apply(x)


def mean_over_processes(x: Tensor) -> Tensor:
    """The average of a detached tensor over the processes, which all of them must ask for."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x / world_size()


def of_each_process(value) -> list:
    """A number or text of every process."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Waits until every process is here."""
    if world_size() > 1:
        dist.barrier()


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm of (B, C) or (B, C, ...) over the global batch, on any device, with the keys of
    nn.BatchNorm2d. Where `across_processes` is set to False: over each process's own images."""

    across_processes = True

    def _check_input_dim(self, x):
        pass  # any (B, C, ...)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1 or not self.across_processes:
            return super().forward(x)
        y = to_fp32(x).movedim(1, -1)  # (B, ..., C)
        rows = list(range(y.ndim - 1))
        local = torch.stack(torch.var_mean(y, rows, correction=0))  # (2, C)
        variances, means = gather(local[None]).unbind(1)  # (processes, C) each
        mean = means.mean(0)  # (C,)
        # of all rows: the mean within the processes, and the variance between them
        variance = (variances + (means - mean) ** 2).mean(0)  # (C,)
        with torch.no_grad():
            n = x.numel() // x.shape[1] * world_size()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)  # unbiased, as torch's
        y = (y - mean) * (variance + self.eps).rsqrt()
        if self.affine:
            y = y * self.weight + self.bias
        return y.movedim(-1, 1).to(x.dtype)  # (B, C, ...)


def distributed(model: nn.Module) -> nn.Module:
    """DistributedDataParallel for several processes: gradients averaged, buffers left alone."""
    if world_size() == 1:
        return model
    for name, module in model.named_modules():
        foreign = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if foreign and module.training and not isinstance(module, BatchNorm):
            raise InputError(f"{name} normalises over the images of one process alone: use another "
                             f"--arch, or one process")
    ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    ddp.broadcast_buffers = False  # set here, since the argument has two names by version
    return ddp


# -------------------------------------------------------------------------------------- weights

PARTS = ("teacher", "student", "state_dict", "model")  # where a checkpoint may keep its weights
PREFIXES = {  # of the keys, by network; None: of either
    None: ("module.", "backbone.", "model.", "net."),
    "student": ("base_encoder.", "student."),
    "teacher": ("momentum_encoder.", "teacher."),
}
HEADS = ("head", "fc.", "classifier.", "pre_logits.", "project", "predict", "pred_", "decoder",
         "prototypes", "queue", "lm_head.", "mask_token", "masked_embed")  # beside a backbone


@contextlib.contextmanager
def replacing(path: Path):
    """Yields a temporary name that becomes `path` when the block ends: a reader sees the old file
    or the new one, and an error leaves nothing behind."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the latter is torch.save's, of a full disk
        raise OSError(f"cannot write {path}, for want of space or rights "
                      f"({one_line(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)


def save_file(content, path: Path) -> None:
    """torch.save, on the disk before the old file goes."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def read_checkpoint(path) -> dict:
    """Tensors and plain containers of a file, on the CPU; InputError for anything else."""
    if not Path(path).is_file():
        raise InputError(f"no checkpoint file {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:
        if not any(f"Unsupported {kind}" in str(error) for kind in ("global", "class")):
            raise InputError(f"{path} is not a PyTorch checkpoint, or is damaged") from None
        wanted = f"{{k: v for k, v in c.items() if k in {PARTS} or torch.is_tensor(v)}}"
        raise InputError(f"{path} holds pickled Python objects, and loading those can run code; if "
                         f"you trust it, convert it once: python -c \"import torch; "
                         f"c = torch.load('{path}', 'cpu', weights_only=False); "
                         f"c = c if isinstance(c, dict) else c.state_dict(); "
                         f"torch.save({wanted}, 'clean.pth')\"") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path} is not a checkpoint: it holds no weights under their names")
    return content


def meta_of(content: dict) -> dict:
    """What a checkpoint of this repository says of its backbone; {} for other files."""
    meta = content.get("meta")
    return dict(meta) if isinstance(meta, dict) and "backbone" in meta else {}


def backbone_weights(content: dict, network: str | None = None) -> dict:
    """Weights out of a checkpoint of this repository, DINO, iBOT, MoCo v3, SDSSL, SimDis or timm.

    network: "student" or "teacher"; default: what our meta says, else the teacher of files that
    have one as a part (DINO, iBOT), the student of others.
    """
    meta = content.get("meta")
    if not network and isinstance(meta, dict):
        network = meta.get("network")
        if meta.get("method") == "linear":
            raise InputError("the checkpoint holds probes: give that of their backbone")
    if network and network not in content and {"student", "teacher"} & content.keys():
        raise InputError(f"the checkpoint has no {network}: pass --network with what it has")
    # the part of the file that holds the network
    parts = [content.get(part) for part in (network, *PARTS)]
    weights = next((part for part in parts if isinstance(part, dict)), content)
    # its keys, without what torch.compile puts into them and others before them
    weights = {key.replace("_orig_mod.", ""): value for key, value in weights.items()}
    prefixes = PREFIXES[None] + PREFIXES[network or "student"]
    while any(key.startswith(prefixes) for key in weights):  # until none is left
        for prefix in prefixes:
            below = {key.removeprefix(prefix): value for key, value in weights.items()
                     if key.startswith(prefix)}
            weights = below or weights
    return weights


def load_weights(backbone: nn.Module, weights: dict, source, as_dino: bool = False) -> None:
    """Loads all weights of a backbone. Heads and the like are named and left out; positions of
    another grid are resized to the one that was built."""
    model = getattr(backbone, "model", backbone)
    ours = model.state_dict()
    if "mask_token" in ours and "masked_embed" in weights:  # iBOT's name for it
        weights = {**weights, "mask_token": weights["masked_embed"]}
    if "mask_token" in ours and "decoder_pos_embed" in weights:  # of MAE's decoder
        weights = {key: value for key, value in weights.items() if key != "mask_token"}
    # all that the backbone owns has to be there; of the rest, only what heads are called
    missing = [key for key in ours if key not in weights and key != "mask_token"]
    extra = [key for key in weights if key not in ours]
    unknown = [key for key in extra if not key.startswith(HEADS)]
    if missing or unknown:
        raise InputError(f"{source} does not fit this architecture: {len(missing)} keys are "
                         f"missing ({' '.join(missing[:2])}), {len(unknown)} are unknown "
                         f"({' '.join(unknown[:2])}); check --arch and --network")
    if extra:
        parts = sorted({key.split(".")[0] for key in extra})
        log(f"{source}: left out, since not of the backbone: {' '.join(parts)}")
    weights = {key: weights[key] for key in ours if key in weights}
    for key, value in weights.items():
        if not isinstance(value, Tensor) or not value.float().isfinite().all():
            raise InputError(f"{source} is damaged: {key} does not hold finite numbers")
    positions = weights.get("pos_embed", torch.empty(0))
    try:
        if positions.ndim == 3 and positions.shape != ours["pos_embed"].shape:
            weights["pos_embed"] = backbone.resized(positions, as_dino)
        model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise InputError(f"{source} does not fit this architecture: {one_line(error)}; check "
                         f"--arch, --patch_size and --img_size") from None


def position_grid(positions) -> tuple[int, int] | None:
    """The square grid of patches that a file's positions (1, T, D), if it has any, are made for."""
    if not isinstance(positions, Tensor) or positions.ndim != 3 or positions.shape[1] < 2:
        return None
    side = math.isqrt(positions.shape[1] - 1)
    return (side, side) if side**2 + 1 == positions.shape[1] else None


def is_moco_small(weights: dict, content: dict) -> bool:
    """Whether this is MoCo v3's ViT-S, which has 12 heads where all others have 6. Shapes do not
    tell, but the names in its own files do, and its positions: sines with x and y exchanged."""
    grid = position_grid(weights.get("pos_embed"))
    if grid is None or weights["pos_embed"].shape[2] != 384:
        return False
    exchanged = sincos_positions(384, grid).roll(192, 2)
    names = content.get("state_dict", ())
    return (any("base_encoder." in name for name in names)
            or torch.allclose(weights["pos_embed"].float(), exchanged, atol=1e-3))


def start_from(backbone: nn.Module, path: str) -> None:
    """--init: loads a backbone's weights from a file."""
    content = read_checkpoint(path)
    weights = backbone_weights(content)
    load_weights(backbone, weights, path, as_dino=not meta_of(content))
    model = getattr(backbone, "model", backbone)
    heads = meta_of(content).get("backbone", {}).get("num_heads")
    if is_moco_small(weights, content):
        heads = 12
    if heads and model.blocks[0].attn.num_heads != heads:
        raise InputError(f"{path} is a ViT of {heads} heads: pass --num_heads {heads}, which "
                         f"sdssl.py has")


def load_backbone(checkpoint: str | None, arch=None, patch_size=None, img_size=None, network=None,
                  num_heads=None) -> tuple[nn.Module, dict]:
    """-> a frozen backbone in evaluation mode, and its meta: backbone, img_size, mean, std ...

    Our own `checkpoint.pth` says all of that. Other files need `arch` (and for ViTs `patch_size`
    and, if it is not timm's, `num_heads`). Without a file: random weights, or timm's for timm/NAME.
    """
    content = read_checkpoint(checkpoint) if checkpoint else {}
    weights = backbone_weights(content, network)
    meta = meta_of(content)
    if meta:
        options = meta.get(network, meta["backbone"])  # SimDis's networks have two architectures
        for name, value in dict(arch=arch, patch_size=patch_size, num_heads=num_heads).items():
            if value and value != options.get(name):
                raise InputError(f"{checkpoint} has --{name} {options.get(name)}, not --{name} "
                                 f"{value}")
    # other people's files hold weights alone
    elif not arch:
        raise InputError(f"{checkpoint or 'the command'} does not say which architecture: pass "
                         f"--arch (and --patch_size)")
    else:
        options = dict(arch=arch, patch_size=patch_size or 16, img_size=img_size)
        if arch in VITS:
            # the grid that the positions were trained on; other sizes are met in the forward pass
            grid = position_grid(weights.get("pos_embed"))
            options["img_size"] = grid[0] * options["patch_size"] if grid else img_size or 224
            options["num_heads"] = num_heads or (12 if is_moco_small(weights, content) else None)
        elif arch in RESNETS:
            options["img_size"] = img_size or 224
        elif is_moco_small(weights, content):
            raise InputError(f"{checkpoint} is MoCo v3's ViT-S of 12 heads: pass --arch vit_small")
    backbone = create_backbone(**options, pretrained=not checkpoint)
    source = "random weights, for want of --checkpoint"
    if checkpoint:
        # published numbers of other people's ViTs were measured with DINO's way of resizing
        backbone.positions_as_dino = not meta
        load_weights(backbone, weights, checkpoint)
        source = f"{network or meta.get('network', 'weights')} of {checkpoint}"
    elif arch.startswith("timm/"):
        source = "timm's pretrained weights"
    side = img_size or options["img_size"] or backbone.img_size
    meta |= dict(backbone=options, img_size=side)
    if checkpoint and "mean" not in meta and arch in VITS:
        log(f"{checkpoint} does not say how its images were normalised; taken as ImageNet's. If it "
            f"was otherwise (timm's augreg: 0.5), give timm's name: --arch timm/NAME")
    meta.setdefault("mean", getattr(backbone, "mean", MEAN))
    meta.setdefault("std", getattr(backbone, "std", STD))
    if side % backbone.patch_size:
        raise InputError(f"images of {side} x {side} are not a multiple of patch size "
                         f"{backbone.patch_size}: change --img_size")
    log(f"{options['arch']} of {side} pixels: {source}")
    return backbone.eval().requires_grad_(False), meta


# ------------------------------------------------------------------------------------- monitors

@torch.no_grad()
def extract_features(backbone: nn.Module, data: ImageData, size: int, device, layers=False,
                     rows=None, batch_size=256, num_workers=0, dtype="fp32", mean=MEAN,
                     std=STD) -> list[Tensor]:
    """Features of n whole images in evaluation mode: a list of (n, D) in fp32 on the CPU, one or,
    with `layers`, one a layer. The processes share the work and all get the result; the modes of
    the backbone's modules are as before."""
    rows = torch.arange(len(data)) if rows is None else torch.as_tensor(rows)
    # equal shares, as gather wants them: the first images once more where they do not divide
    share = math.ceil(len(rows) / world_size())
    padded = torch.arange(share * world_size()) % len(rows)
    mine = rows[padded[local_rows(len(padded))]]
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    batches = eval_batches(data, mine, size, device, batch_size, num_workers, mean, std)
    total = math.ceil(share / batch_size)
    collected = []
    for x in progress(batches, desc="features", total=total, leave=False, unit="batch"):
        with autocast(device, dtype):
            # what is compiled for training would be compiled again for these sizes
            features = backbone.forward(x, layers=layers)
        collected.append([f.float() for f in (features if layers else [features])])
    for module, training in modes:
        module.training = training
    return [gather(torch.cat(parts))[: len(rows)].cpu() for parts in zip(*collected, strict=True)]


@fp32
@torch.no_grad()
def knn_classifier(train_features: Tensor, train_labels: Tensor, test_features: Tensor, k: int,
                   temperature: float = 0.07, num_classes: int | None = None,
                   chunk: int = 1024) -> Tensor:
    """Weighted k-NN of DINO and Wu et al.: (test images, C) sums of exp(cos / T) over the k nearest
    training rows. Both sides are normalised here; the result is the same for every chunk."""
    num_classes = num_classes or int(train_labels.max()) + 1
    train = F.normalize(train_features, dim=1).T  # (D, n)
    scores = []
    for queries in F.normalize(test_features, dim=1).split(chunk):
        cosine, nearest = (queries @ train).topk(min(k, train.shape[1]), dim=1)  # (chunk, k) each
        votes = cosine.new_zeros(len(queries), num_classes)
        votes.scatter_add_(1, train_labels[nearest], (cosine / temperature).exp())
        scores.append(votes)  # (chunk, C)
    return torch.cat(scores)


def knn_accuracy(backbone, train: ImageData, test: ImageData | None, size: int, device, k=20,
                 most=10_000, **options) -> float | None:
    """Top-1 of k-NN in per cent, the monitor of training runs, on at most `most` evenly spaced
    images of either split (eval_knn.py takes all); None without labels on both sides."""
    if test is None or not (train.labelled and test.labelled):
        return None
    features, labels = [], []
    for data in (train, test):
        rows = (data.labels >= 0).nonzero()[:, 0]  # (n,)
        rows = rows[torch.linspace(0, len(rows) - 1, min(most, len(rows))).round().long()]
        features += extract_features(backbone, data, size, device, rows=rows, **options)
        labels.append(data.labels[rows])
    votes = knn_classifier(features[0], labels[0], features[1], k, num_classes=len(train.classes))
    return 100 * (votes.argmax(1) == labels[1]).float().mean().item()


@fp32
@torch.no_grad()
def collapse_measures(z: Tensor) -> tuple[Tensor, Tensor]:
    """How far features (n, D) are from collapse. Std ratio: mean standard deviation of the
    normalised features over 1 / sqrt(D), 1 for an even spread on the sphere, 0 for one point.
    Effective rank (Roy & Vetterli): exp of the entropy of the normalised spectrum, 1 for a line."""
    z = F.normalize(z, dim=1)
    ratio = z.std(0).mean() * z.shape[1] ** 0.5
    spectrum = torch.linalg.svdvals(z - z.mean(0))
    p = spectrum / spectrum.sum().clamp(min=1e-12)
    return ratio, torch.exp(-(p * (p + 1e-12).log()).sum())


def subplots(rows: int, columns: int, width: float, height: float):
    """A figure for a file, and its axes (rows, columns) of so many inches each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure, path: Path) -> None:
    """As a PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def prepare_files(paths, overwrite: bool) -> None:
    """Before the work that will write them: raises InputError for a file that exists, unless
    --overwrite was given, makes their folders, and sees whether these can be written into."""
    for path in map(Path, paths):
        if path.exists() and not overwrite:
            raise InputError(f"{path} already exists: pass --overwrite or another place")
        if path.is_dir():
            raise InputError(f"{path} is a folder: name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(f"cannot write into {path.parent}")


# ----------------------------------------------------------------------------------------- runs

class Run:
    """Output folder of one training run: checkpoint.pth, backbone.pth (bare weights), log.jsonl and
    curves.png.

    meta: what a reader of the checkpoint must know; meta["network"] is the part whose backbone
    becomes backbone.pth. checks: {name: (function, every)}, values for the log, made before the
    first step, after each so many epochs (0: none) and at the end. parts: networks, optimizer and
    scaler by name; where the run is resumed, they are as they were from here on.
    """

    in_step = False  # then a signal waits for the end of the step
    MAY_DIFFER = {"data", "data_path", "num_workers", "device", "dtype", "compile", "output_dir",
                  "resume", "overwrite", "init", "checkpoint", "save_every", "knn_every",
                  "max_steps", "log_every"}
    SHOWN = {"knn": "k-NN top-1 {:.1f} %", "knn_teacher": "teacher: k-NN top-1 {:.1f} %",
             "loss_val": "validation loss {:.4f}"}

    def __init__(self, args, loader: ViewLoader, meta: dict, checks: dict | None = None, **parts):
        self.args = args
        self.settings = json.loads(json.dumps(vars(args)))  # as they come back from a file
        self.loader = loader
        self.data = loader.data.fingerprint()
        self.meta = meta
        self.checks = checks or {}
        self.parts = parts
        self.steps_per_epoch = loader.steps_per_epoch
        self.total = args.epochs * loader.steps_per_epoch  # what schedules span
        self.stop = min(self.total, args.max_steps or self.total)  # where this command ends
        self.start = 0  # steps that are done
        # of each loss, the step at which it first was not finite
        self.first_bad = torch.full((), math.inf, device=loader.device)
        self.folder = Path(args.output_dir)
        self.log_file = self.folder / "log.jsonl"
        path = self.folder / "checkpoint.pth"
        self.lock_folder()
        # torchrun starts dead processes again with the same flags: then the run that it has begun
        # goes on; each machine counts the restarts that it asked for itself
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        restarts = max(of_each_process(restarts))
        self.agents = of_each_process(f"{socket.gethostname()} {os.getppid()}")
        if path.is_file():
            checkpoint = {}
            if args.resume or restarts > 0:
                checkpoint = read_checkpoint(path)
            begun = set(self.agents) & set(checkpoint.get("agents", []))
            if args.resume or begun:
                self.resume(checkpoint, path)
            elif args.overwrite:
                self.log_file = self.folder / "log.new.jsonl"  # until the new run saves
            else:
                raise InputError(f"{self.folder} already holds a run: pass --resume, --overwrite "
                                 f"or another --output_dir")
        elif not (args.resume or restarts):
            prepare_files([self.folder / "backbone.pth"], args.overwrite)
        # all have looked before one writes
        seen = of_each_process(f"{self.start} {self.data}")
        if min(seen) < max(seen):
            raise InputError(f"the processes do not see the same images, or not the same "
                             f"checkpoint in {self.folder}: all machines need the same files")
        if rank() == 0:
            # a run that was killed has logged steps that its checkpoint does not know
            records = [record for record in self.records() if record["step"] <= self.start]
            lines = [json.dumps(record) + "\n" for record in records if self.start > 0]
            with replacing(self.log_file) as temporary:
                temporary.write_text("".join(lines))
        barrier()

    def lock_folder(self) -> None:
        """Refuses a folder in which another process trains; the lock dies with its process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if rank() > 0 or os.name == "nt":  # Windows has no fcntl
            return
        import fcntl

        self.lock = open(self.folder / ".lock", "w")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process trains in {self.folder}: pass another "
                             f"--output_dir") from None
        except OSError:
            log(f"{self.folder} is on a file system without locks: a second run in it would not "
                f"be noticed")

    def resume(self, checkpoint: dict, path: Path) -> None:
        """Puts every part and the step back; refuses other settings, other data, other parts."""
        settings = checkpoint.get("args")
        self.start = checkpoint.get("step")
        if not isinstance(settings, dict) or not isinstance(self.start, int):
            raise InputError(f"{path} holds no run to resume: use another --output_dir")
        # a resumed run must be the same run
        changed = [f"--{name} was {settings.get(name)}" for name, value in self.settings.items()
                   if name not in self.MAY_DIFFER and settings.get(name) != value]
        if checkpoint.get("data") != self.data:
            changed.append(f"its images were others: {checkpoint.get('data')}, now {self.data}")
        if changed:
            raise InputError(f"cannot resume {path} with other settings or data "
                             f"({', '.join(changed[:3])}); use another --output_dir")
        for name, part in self.parts.items():
            try:
                if name != "scaler" or checkpoint[name]:  # only fp16 has scales
                    part.load_state_dict(checkpoint[name])
            except Exception as error:
                raise InputError(f"cannot resume {path}: its {name} is not this run's "
                                 f"({one_line(error)}); use another --output_dir") from None

    def records(self) -> list[dict]:
        """The log, up to the first line that a crash left unreadable."""
        records = []
        with contextlib.suppress(FileNotFoundError, ValueError):
            for line in self.log_file.read_text(errors="replace").splitlines():
                records.append(json.loads(line))
        return records

    def record(self, step: int, **values) -> None:
        """Appends a line to the log."""
        if rank() == 0:
            with open(self.log_file, "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def steps(self):
        """What the loader has for the steps that are left. A new run is checked before, and so is
        one that ended in a check or before it."""
        if self.start >= self.stop:
            log(f"{self.folder} is already at step {self.start}: nothing is left to do")
        due = self.due(self.start)
        for record in self.records():
            if record["step"] == self.start:
                due = [name for name in due if name not in record]
        self.check(self.start, due)
        if rank() == 0 and self.start > 0 and due:
            self.draw_curves()
        self.clock = time.perf_counter()
        self.clock_step = self.start
        signals.clear()
        # from here on a signal waits for the end of its step
        with progress(total=self.stop, initial=self.start, unit="step") as self.bar:
            try:
                Run.in_step = True
                yield from self.loader.steps(self.start, self.stop)
            finally:
                Run.in_step = False
                (self.folder / ".lock").unlink(missing_ok=True)
        if self.signalled():  # while the last step was saved
            self.leave(self.stop)

    def end_step(self, step: int, losses: dict[str, Tensor], features=None, **values) -> None:
        """Logs, checks and saves where that is due; after a signal saves and exits.

        losses: scalars, the total last, so that a bad term is named. features (B, D): watched for
        collapse. values: other scalars for the log.
        """
        # when each term first was not finite, noted on the device without waiting for it
        terms = torch.stack([loss.detach() for loss in losses.values()])  # (terms,)
        bad = torch.where(terms.isfinite(), torch.inf, float(step + 1))
        self.first_bad = self.first_bad.minimum(bad)
        self.terms = list(losses)
        self.bar.update()
        step += 1  # the steps that are done
        last = step == self.stop
        logging = last or step <= 10 or step % self.args.log_every == 0
        if logging:
            self.log_step(step, {**losses, **values}, features)
        # SIGINT or SIGTERM: save and exit
        stopping = len(signals) > 0
        if world_size() > 1:  # processes get a signal at different steps: they agree where they log
            stopping = logging and self.signalled()
        due = self.due(step)
        if not (due or last or stopping or self.ends_epoch(step, self.args.save_every)):
            return
        # saving and checks, whose time is not that of the steps
        paused = time.perf_counter()
        self.prepare_weights(step)
        self.save(step)
        if self.signalled():  # by now
            self.leave(step)
        Run.in_step = False  # a signal ends a check at once: what is trained has been saved
        self.check(step, due)
        Run.in_step = True
        if rank() == 0 and (due or last):
            self.draw_curves()
        barrier()  # the others wait for what the first process writes
        self.clock += time.perf_counter() - paused  # speed is that of the steps alone

    def signalled(self) -> bool:
        """Whether any process has had a signal."""
        return max(of_each_process(len(signals))) > 0

    def leave(self, step: int) -> None:
        """Ends the command after a signal."""
        self.bar.close()
        log(f"signal received: saved {self.folder / 'checkpoint.pth'} at step {step}; continue "
            f"with --resume")
        sys.exit(128 + signals[0] if signals else 1)

    def due(self, step: int) -> list[str]:
        """The checks of a step: all before the first one and after the last."""
        return [name for name, (_, every) in self.checks.items()
                if step in (0, self.stop) or self.ends_epoch(step, every)]

    def ends_epoch(self, step: int, every: int) -> bool:
        """Whether so many epochs, or a multiple of them, have just ended; 0: never."""
        return every > 0 and step % (every * self.steps_per_epoch) == 0

    def check(self, step: int, names: list[str]) -> None:
        """Logs the values of these checks; None, of a check that is not possible, is left out."""
        for name in names:
            value = self.checks[name][0]()
            if value is not None:
                epoch = step / self.steps_per_epoch
                log(f"step {step} (epoch {epoch:.1f}): {self.SHOWN[name].format(value)}")
                self.record(step, **{name: value})

    def refuse_bad_losses(self) -> None:
        """Stops the run at the earliest term that any process has seen go wrong."""
        step, term = gather(self.first_bad[None]).amin(0).min(0)
        if step.isfinite():
            self.give_up(f"{self.terms[int(term)]} was not finite at step {int(step)}")

    def prepare_weights(self, step: int) -> None:
        """Before weights are saved or measured: a step can spoil them although its losses were
        finite, and BatchNorm over each process's own images has other running statistics in each,
        where those of the first process are to count."""
        self.refuse_bad_losses()
        for name, part in self.parts.items():
            if isinstance(part, nn.Module):
                finite = [value.isfinite().all() for value in part.state_dict().values()]
                if not torch.stack(finite).all():
                    self.give_up(f"weights of the {name} are not finite after step {step}")
                for buffer in part.buffers():
                    if world_size() > 1:
                        dist.broadcast(buffer, 0)

    def give_up(self, reason: str) -> None:
        """Ends the run with exit code 1; nothing more is saved."""
        self.bar.close()
        log(f"stopped: {reason}; nothing more is saved. Lower --lr, or raise --warmup_epochs.")
        sys.exit(1)

    def log_step(self, step: int, values: dict, features: Tensor | None) -> None:
        """Writes one record: scalars averaged over the processes, speed, and signs of collapse."""
        self.refuse_bad_losses()
        # one exchange between the processes, and one wait for the device
        tensors = {name: x.detach().float() for name, x in values.items() if isinstance(x, Tensor)}
        means = mean_over_processes(torch.stack(list(tensors.values()))).tolist()  # of each value
        values = {**values, **dict(zip(tensors, means, strict=True))}
        if features is not None:
            features = gather(features.detach())  # (M, D)
            ratio, effective_rank = (x.item() for x in collapse_measures(features))
            values |= {"std_ratio": ratio, "effective_rank": effective_rank}
            if len(features) >= 8 and (ratio < 0.1 or effective_rank < 2):  # fewer span little
                values["collapse"] = True
                log(f"collapse at step {step}: the features' spread is {ratio:.3f} of an even one "
                    f"and their effective rank {effective_rank:.1f}; a lower --lr, a larger batch "
                    f"or a higher teacher momentum helps")
        if self.args.device == "cuda":
            values["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
        now = time.perf_counter()
        elapsed = max(now - self.clock, 1e-9)
        speed = (step - self.clock_step) * self.args.batch_size / elapsed
        waited = self.loader.waited / elapsed
        epoch = step / self.steps_per_epoch
        self.record(step, epoch=epoch, **values, images_per_s=speed, data_wait=waited)
        self.clock = now
        self.clock_step = step
        self.loader.waited = 0.0
        self.bar.set_postfix_str(f"loss {values['loss']:.3f} lr {values['lr']:.1e} "
                                 f"{speed:.0f} img/s", refresh=False)

    def save(self, step: int) -> None:
        """The checkpoint: state of all parts, step, settings, meta, fingerprint of the data, and
        torchrun's agents that began the run."""
        if rank() > 0:
            return
        # plain containers and tensors, so that it loads with weights_only=True
        content = {name: part.state_dict() for name, part in self.parts.items()}
        network = self.meta.get("network")
        if network:  # before the checkpoint: a run that dies between the two makes both again
            weights = backbone_weights({"model": content[network]})
            weights.pop("mask_token", None)
            save_file(weights, self.folder / "backbone.pth")
        content |= {"step": step, "args": self.settings, "meta": self.meta, "data": self.data,
                    "agents": self.agents}
        save_file(content, self.folder / "checkpoint.pth")
        # the old run, if there was one, has now been replaced
        if self.log_file.name != "log.jsonl":
            self.log_file = self.log_file.replace(self.folder / "log.jsonl")
            for name in ("curves.png", "maps.png", "multi_exit.png", "results.json"):
                (self.folder / name).unlink(missing_ok=True)

    def draw_curves(self) -> None:
        """One panel for each logged value over the steps."""
        curves = {}
        for record in self.records():
            for name, value in record.items():
                if name not in ("step", "epoch", "collapse") and value is not None:
                    curves.setdefault(name, []).append((record["step"], value))
        # four panels a row
        figure, axes = subplots(max(1, math.ceil(len(curves) / 4)), 4, 3.2, 2.2)
        for axis in axes.flat[len(curves) :]:
            axis.axis("off")
        for axis, (name, points) in zip(axes.flat, curves.items(), strict=False):
            axis.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else None)
            axis.set_title(name, fontsize=9)
            axis.tick_params(labelsize=7)
        save_figure(figure, self.folder / "curves.png")


# ------------------------------------------------------------------------------------ arguments

CORES = min(8, os.cpu_count() or 1)
if hasattr(os, "sched_getaffinity"):  # those that we may use, where the system says
    CORES = min(8, len(os.sched_getaffinity(0)))


class Parser(argparse.ArgumentParser):
    """Its errors are one line, as all others."""

    def error(self, message):
        self.exit(2, f"error: {message}; see --help\n")


def at_least(least, at_most=math.inf):
    """For argparse: finite numbers in these limits, whole ones where `least` is an int."""

    def number(text: str):
        value = type(least)(text)
        if not least <= value <= at_most or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} is not a number of at least {least} and at "
                                             f"most {at_most}")
        return value

    number.__name__ = type(least).__name__  # in argparse's own message
    return number


def existing_file(text: str) -> str:
    """For argparse: the name of a file that is there; an empty one is not taken for none."""
    if not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"no file {text!r}")
    return text


def path_name(text: str) -> str:
    """For argparse: the name of a file or folder, which an unset shell variable leaves empty."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def add_arguments(parser: argparse.ArgumentParser, method: str, init_type=existing_file) -> None:
    """The flags of every training script; a default of None is the recipe's or `setup`'s."""
    add = parser.add_argument_group("data").add_argument
    add("--data", default="digits", help=f"digits, {', '.join(DATASETS)}, or a directory")
    add("--data_path", default="data", help="folder of named data sets (default: data)")
    add("--img_size", type=at_least(1), help="side of the training views in pixels")
    add("--recipe", help="the data set whose recipe is used (default: by data and size)")
    add = parser.add_argument_group("model").add_argument
    add("--arch", help=f"{', '.join([*VITS, *RESNETS])} or timm/NAME (default: recipe)")
    add("--patch_size", type=at_least(1), help="side of a ViT's patches in pixels")
    add("--init", type=init_type, metavar="FILE", help="backbone weights to start from")
    add = parser.add_argument_group("optimisation (defaults: recipe)").add_argument
    add("--epochs", type=at_least(1))
    add("--batch_size", type=at_least(2), help="global, over all processes")
    add("--lr", type=at_least(0.0), help="for a batch of 256; scaled linearly")
    add("--warmup_epochs", type=at_least(0.0))
    add("--weight_decay", type=at_least(0.0))
    add("--max_steps", type=at_least(1), help="early end; schedules still span --epochs")
    add_system_arguments(parser, f"runs/{method}")
    add = parser.add_argument_group("monitoring").add_argument
    add("--knn_every", type=at_least(0), default=10, help="epochs between k-NN checks; 0: none but "
        "before and after")


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of both evaluations that say which backbone and how it is to be made."""
    add = parser.add_argument_group("model (defaults: what the checkpoint says)").add_argument
    add("--checkpoint", type=existing_file, metavar="FILE", help="ours, or weights of DINO, iBOT, "
        "MoCo v3, timm ... (default: random weights, or timm's for timm/NAME)")
    add("--arch", help=f"{', '.join([*VITS, *RESNETS])} or timm/NAME")
    add("--patch_size", type=at_least(1), help="side of a ViT's patches in pixels (else 16)")
    add("--num_heads", type=at_least(1), help="attention heads of a ViT that are not timm's")
    add("--network", choices=["student", "teacher"], help="network of the file (default: the one "
        "that its method evaluates; of DINO and iBOT the teacher)")


def add_system_arguments(parser, output_dir: str) -> None:
    """The flags of everything that trains, eval_linear.py included."""
    add = parser.add_argument_group("system").add_argument
    add("--seed", type=at_least(0, 2**63 - 1), default=0)
    add("--num_workers", type=at_least(0), default=CORES, help="processes that decode files")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--dtype", choices=["fp32", "bf16", "fp16"], help="(default: bf16 on CUDA, else fp32)")
    add("--compile", action=argparse.BooleanOptionalAction, help="(default: on CUDA)")
    add("--output_dir", type=path_name, default=output_dir, help=f"of the run ({output_dir})")
    add("--resume", action="store_true", help="go on from output_dir/checkpoint.pth if it exists")
    add("--overwrite", action="store_true", help="replacement of what output_dir holds")
    add("--save_every", type=at_least(0), default=1, help="epochs between checkpoints; 0: none "
        "but before checks and at the end")
    add("--log_every", type=at_least(1), default=10, help="steps between log records, where "
        "several processes heed signals (default: 10)")


def apply_recipe(args, recipes: dict, data: ImageData) -> dict:
    """Fills what was not given from a recipe, says which, and returns it: that of --recipe, of the
    data set, or by the size that is trained at, CIFAR-10's up to 64 pixels and ImageNet's above."""
    name = args.recipe or args.data
    if args.recipe and name not in recipes:
        raise InputError(f"unknown --recipe {name}: use one of {' '.join(recipes)}")
    if name not in recipes:
        size = args.img_size or max(data.image_size())
        name = "cifar10" if size <= 64 else "imagenet"
    for key, value in recipes[name].items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    log(f"{len(data)} training images of {args.data}, recipe {name}; {args.device}, {args.dtype}, "
        f"{world_size()} process(es)")
    if getattr(args, "warmup_epochs", None) and args.warmup_epochs >= args.epochs:
        log(f"--warmup_epochs {args.warmup_epochs:g} fill all {args.epochs} epochs: the learning "
            f"rate does not fall")
    return recipes[name]
