"""Speed and memory, side by side in one run. By hand: `python tests/bench.py`, a part of it with `--only augmentation`.

training      step time, images/s and peak memory of each framework with and without self-distillation
              (CPU: ViT-S/16, 224 pixels, batch 16; CUDA: ViT-B/16 in bf16, compiled, at --batch_size)
augmentation  two views of 32 x 32 images in memory, against torchvision on PIL, on one core each
loading       JPEG files to two views of 224 pixels, against the same
probes        linear probes of 12 layers x 8 learning rates, against one probe of the last layer
"""
import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
import torchvision.transforms as T
from PIL import Image, ImageFilter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import sdssl  # noqa: E402

# ----------------------------------------------------------------------------------------------------------- training


class Step:
    """One training step of sdssl.py on random images."""

    def __init__(self, framework: str, sd: bool, device: torch.device, batch: int):
        arch = "vit_base" if device.type == "cuda" else "vit_small"
        self.args = sdssl.parse_arguments(["--framework", framework, "--sd" if sd else "--no-sd", "--arch", arch, "--img_size", "224",
                                           "--patch_size", "16", "--hidden", "4096", "--isd_hidden", "2048"])
        self.args.dtype = "bf16" if device.type == "cuda" else "fp32"
        torch.manual_seed(0)
        self.student, self.teacher, _ = sdssl.build(self.args)
        self.student.to(device)
        if self.teacher:
            self.teacher.to(device)
        if device.type == "cuda":
            for network in filter(None, (self.student, self.teacher)):
                network.backbone.compile()
        self.optimizer = torch.optim.AdamW(common.parameter_groups(self.student, 0.1), lr=1e-4, fused=True)
        self.views, self.device = torch.randn(2, batch, 3, 224, 224, device=device), device

    def __call__(self) -> float:
        began = self.clock()
        x1, x2 = self.views
        if self.teacher:
            with torch.no_grad(), common.autocast(self.device, self.args.dtype):
                z1, z2 = self.teacher(x1), self.teacher(x2)
        with common.autocast(self.device, self.args.dtype):
            (q1, q2), (p1, p2) = self.student(x1, x2)
        if not self.teacher:
            z1, z2 = q1[-1], q2[-1]
        loss = sum(sdssl.sdssl_losses(self.args.framework, q1, q2, z1, z2, p1, p2).values())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.teacher:
            self.teacher.update(self.student, 0.99)
        return self.clock() - began

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def peak_memory(number, framework, sd, device, batch, results):
    """In a process of its own: GiB at the peak of two steps."""
    step = Step(framework, sd, torch.device(device), batch)
    step(), step()
    if device == "cuda":
        results.put(torch.cuda.max_memory_allocated() / 2**30)
    else:
        # the kernel's peak of this program; getrusage would also count the parent's
        results.put(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20)


def bench_training(device: torch.device, batch: int, repeats: int) -> None:
    print(f"training, batch {batch} of 224 x 224, on {device}, median of {repeats} steps taken in turn")
    print(f"{'framework':<12}{'s/step':>9}{'images/s':>10}{'peak GiB':>10}{'SD time':>9}{'SD memory':>11}")
    for framework in ("mocov3", "byol", "simclr"):
        memory = {}
        for sd in (False, True):
            results = mp.get_context("spawn").SimpleQueue()
            mp.spawn(peak_memory, (framework, sd, device.type, batch, results), nprocs=1)
            memory[sd] = results.get()
        steps = {sd: Step(framework, sd, device, batch) for sd in (False, True)}
        times = {sd: [] for sd in steps}
        for repeat in range(repeats + 2):
            for sd, step in steps.items():
                seconds = step()
                if repeat >= 2:  # warm by then
                    times[sd].append(seconds)
        plain = statistics.median(times[False])
        for sd in (False, True):
            seconds = statistics.median(times[sd])
            extra = f"{100 * (seconds / plain - 1):+8.1f}%{100 * (memory[sd] / memory[False] - 1):+10.1f}%" if sd else ""
            print(f"{('SD-' if sd else '') + framework:<12}{seconds:9.3f}{batch / seconds:10.1f}{memory[sd]:10.2f}{extra}", flush=True)
        del steps


# -------------------------------------------------------------------------------------------------------------- views


class PilBlur:
    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0)))


def pil_views(size: int, blur: bool):
    """The two views of BYOL as torchvision makes them from a PIL image."""
    def view(p_blur, p_solarize):
        return T.Compose([
            T.RandomResizedCrop(size, scale=(0.08, 1.0)), T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), T.RandomGrayscale(0.2),
            *([T.RandomApply([PilBlur()], p=p_blur)] if blur else []), T.RandomSolarize(128, p_solarize),
            T.ToTensor(), T.Normalize(common.MEAN, common.STD)])

    return view(1.0, 0.0), view(0.1, 0.2)


def rate(work, count: int, seconds: float = 6.0) -> float:
    """Images a second: `work()` handles `count` of them; the best of several rounds, after one to warm up."""
    work()
    best, deadline = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        began = time.perf_counter()
        work()
        best = max(best, count / (time.perf_counter() - began))
    return best


def bench_augmentation(device: torch.device) -> None:
    torch.set_num_threads(1)
    images = torch.randint(0, 256, (1024, 3, 32, 32), dtype=torch.uint8)
    pil = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images[:128]]
    data = common.ImageData(torch.zeros(1024, dtype=torch.long), [0], images=images)
    for blur in (False, True):
        views = pil_views(32, blur)
        baseline = rate(lambda views=views: [view(image) for image in pil for view in views], len(pil))
        loader = common.ViewLoader(data, common.byol_views(32, blur=blur), 256, 0, device)

        def ours(loader=loader):
            for _ in loader.steps(0, 4):
                if device.type == "cuda":
                    torch.cuda.synchronize()

        speed = rate(ours, 1024)
        print(f"augmentation, two views of 32 x 32 with{'' if blur else 'out'} blur: torchvision on PIL {baseline:.0f} images/s, "
              f"here {speed:.0f} on {device} ({speed / baseline:.1f}x)")


def bench_loading(folder: Path, device: torch.device) -> None:
    torch.set_num_threads(1)
    paths = common.find_images(folder)[:128]
    views = pil_views(224, blur=True)

    def pil():
        for path in paths[:64]:
            image = Image.open(path).convert("RGB")
            for view in views:
                view(image)

    baseline = rate(pil, 64)
    data = common.ImageData(torch.full((len(paths),), -1), [], paths=paths)
    loader = common.ViewLoader(data, common.byol_views(224), 32, 0, device)
    speed = rate(lambda: [loader[step] for step in range(len(paths) // 32)], len(paths))
    whole = rate(lambda: [None for _ in loader.steps(0, len(paths) // 32)], len(paths))
    print(f"loading, JPEG to two views of 224 x 224 on one core: torchvision on PIL {baseline:.0f} images/s, here a worker decodes and crops "
          f"{speed:.0f} ({speed / baseline:.1f}x); with the augmentation on {device} after it {whole:.0f} ({whole / baseline:.1f}x)")


def bench_probes(repeats: int) -> None:
    speeds = {"one probe": [], "12 layers x 8 rates": []}
    flags = ["--arch", "vit_tiny", "--img_size", "16", "--patch_size", "4", "--epochs", "2", "--log_every", "1"]
    for repeat in range(repeats):
        for name, extra in zip(speeds, (["--lr", "0.1", "--holdout", "0.1"], ["--layers", "all"]), strict=True):
            with tempfile.TemporaryDirectory() as folder:
                subprocess.run([sys.executable, str(ROOT / "eval_linear.py"), *flags, *extra, "--output_dir", folder], check=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
            speeds[name] += [record["images_per_s"] for record in records[2:]]
    one, all_layers = (statistics.median(values) for values in speeds.values())
    print(f"probes on vit_tiny, 16 x 16 images of digits: one {one:.0f} images/s, 12 layers x 8 rates {all_layers:.0f}: "
          f"{one / all_layers:.2f} times the step")


def photographs(folder: Path) -> Path:
    """JPEG files of 500 x 375 with the detail of photographs, more or less: noise over all scales."""
    generator = torch.Generator().manual_seed(0)
    for i in range(128):
        scales = [torch.nn.functional.interpolate(torch.rand(1, 3, 2**s, 2**s, generator=generator), (375, 500), mode="bilinear") / s for s in range(1, 9)]
        pixels = sum(scales)[0]
        pixels = (255 * (pixels - pixels.min()) / (pixels.max() - pixels.min())).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=92)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=["training", "augmentation", "loading", "probes"])
    parser.add_argument("--photos", type=Path, help="a folder of photographs for `loading` (default: makes some)")
    parser.add_argument("--batch_size", type=int, help="for `training` (default: 16 on a CPU, 256 on a GPU)")
    parser.add_argument("--repeats", type=int, default=7, help="steps measured (default: %(default)s)")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device.type == 'cuda' else f'{torch.get_num_threads()} CPU threads'}")
    if arguments.only in (None, "training"):
        bench_training(device, arguments.batch_size or (256 if device.type == "cuda" else 16), arguments.repeats)
    if arguments.only in (None, "augmentation"):
        bench_augmentation(device)
    if arguments.only in (None, "loading"):
        with tempfile.TemporaryDirectory() as made:
            bench_loading(arguments.photos or photographs(Path(made)), device)
    if arguments.only in (None, "probes"):
        bench_probes(max(1, arguments.repeats // 3))
