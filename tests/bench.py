"""Speed and memory, side by side in one run. By hand: `python tests/bench.py`, parts of it with `--only`, the figures with `--json`.

training      every method and its baseline, run as a user runs them (CPU: ViT-S/16 and ResNets, 224 pixels, batch 16; CUDA: ViT-B/16,
              bf16, compiled): s/step, images/s, peak memory, share of the time spent waiting for data, share of the matmul peak
evaluation    whole commands: k-NN, copy detection and probes of the last layer against all layers
probes        a step of 12 layers x 8 learning rates, against one probe of the last layer
relations     peak extra memory and time of ibot_rkd's relational losses at batch 256, 4 views, 8192 outputs
augmentation  two views of 32 x 32 images in memory, against torchvision on PIL, on one core each
loading       JPEG files to two views of 224 pixels, against the same
cost          multiply-adds of SimDis's networks for one image (its Table 1, where a teacher that was trained before counts twice)
"""
import argparse
import json
import os
import re
import shutil
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
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import ibot_rkd  # noqa: E402
import simdis  # noqa: E402

# ----------------------------------------------------------------------------------------------------------- training

SSL = ["--patch_size", "16", "--hidden", "4096"]
RESNETS = ["--arch", "resnet18", "--no-pretrained"]
TRAINING = {  # name: (script, flags, the row that it is compared with); {VIT} and the like are filled in below
    "MoCo v3": ("sdssl.py", ["--no-sd", "--arch", "{VIT}", *SSL], None),
    "SD-MoCo v3": ("sdssl.py", ["--arch", "{VIT}", *SSL], "MoCo v3"),
    "BYOL": ("sdssl.py", ["--framework", "byol", "--no-sd", "--arch", "{VIT}", *SSL], None),
    "SD-BYOL": ("sdssl.py", ["--framework", "byol", "--arch", "{VIT}", *SSL], "BYOL"),
    "SimCLR": ("sdssl.py", ["--framework", "simclr", "--no-sd", "--arch", "{VIT}", *SSL], None),
    "SD-SimCLR": ("sdssl.py", ["--framework", "simclr", "--arch", "{VIT}", *SSL], "SimCLR"),
    "SimDis, student alone": ("simdis.py", ["--targets", "byol"], None),
    "SimDis, online, 2 views": ("simdis.py", ["--targets", "2v"], None),
    "SimDis, online, 7 views": ("simdis.py", ["--targets", "7v"], "SimDis, online, 2 views"),
    "RRKD, teacher (ResNet-34)": ("rrkd.py", ["--loss", "none", "--arch", "resnet34", "--no-pretrained"], None),
    "RRKD, student alone": ("rrkd.py", ["--loss", "none", *RESNETS], None),
    "RRKD, student": ("rrkd.py", ["--no-baseline", *RESNETS, "--teacher", "{RUNS}/RRKD, teacher (ResNet-34)/checkpoint.pth"],
                      "RRKD, student alone"),
    "iBOT": ("ibot_rkd.py", ["--potential", "none", "--global_views", "4", "--arch", "{VIT}"], None),
    "iBOT, RKD-D": ("ibot_rkd.py", ["--arch", "{VIT}"], "iBOT"),
    "iBOT, RKD-A": ("ibot_rkd.py", ["--potential", "angle", "--arch", "{VIT}"], "iBOT"),
    "d2v_kd, 6 blocks from 12": ("d2v_kd.py", ["--teacher", "{RUNS}/MoCo v3/checkpoint.pth"], None),
}


def watched(command: list[str]) -> tuple[float, float]:
    """Runs a command -> seconds, and GiB at its peak on this machine (not the GPU's)."""
    began, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            time.sleep(0.05)
            status = Path(f"/proc/{process.pid}/status")
            found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
            peak = max(peak, int(found[1])) if found else peak
        if process.returncode:
            errors.seek(0)
            sys.exit(errors.read().decode(errors="replace"))
    return time.perf_counter() - began, peak / 2**20


def count_flops(number, rows, results) -> None:
    """In a process of its own: floating-point operations of a training step for one image, forward and backward, of each row."""
    flops = {}
    sys.stdout = sys.stderr = open(os.devnull, "w")
    for name, (script, flags) in rows.items():
        method, counts = __import__(Path(script).stem), []
        for steps in (1, 2):
            with FlopCounterMode(display=False) as counter:
                method.train(method.parse_arguments([*flags, "--batch_size", "4", "--max_steps", str(steps)]))
            counts.append(counter.get_total_flops())
        flops[name] = (counts[1] - counts[0]) / 4
    results.put(flops)


def matmul_peak(device: torch.device) -> float:
    """Floating-point operations a second of a large matrix product, bf16 on CUDA and fp32 elsewhere."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    return rate(lambda: a @ a, 2 * n**3)


def bench_training(device: torch.device, batch: int, repeats: int, only: list[str], extra: list[str]) -> list[dict]:
    gpu, peak = device.type == "cuda", matmul_peak(device)
    steps, every = (40, 10) if gpu else (4, 1)
    print(f"training, batch {batch} of 224 x 224, on {device}; median over {repeats} runs taken in turn, the first quarter of each left out; "
          f"a large matrix product makes {peak / 1e12:.2f} TFLOP/s")
    rows = {name: row for name, row in TRAINING.items() if any(part in name for part in only)}
    speeds, waits, memory = ({name: [] for name in rows} for _ in range(3))
    counted = {}
    with tempfile.TemporaryDirectory() as runs:
        for split in ("a", "b"):
            (Path(runs) / "images" / "train" / split).mkdir(parents=True)
            folder = Path(runs) / "images" / "train" / split
            for path in photographs(folder, 16):
                for copy in range(max(4, batch // 16) - 1):
                    shutil.copy(path, folder / f"{path.stem}-{copy}.jpg")
        for repeat in range(repeats):
            for name, (script, flags, _) in rows.items():
                flags = [flag.format(VIT="vit_base" if gpu else "vit_small", RUNS=runs) for flag in flags]
                flags += [*extra, "--data", f"{runs}/images", "--img_size", "224", "--log_every", str(every), "--overwrite",
                          "--save_every", "0", "--num_workers", str(min(16, os.cpu_count()) if gpu else 0), "--output_dir", f"{runs}/{name}"]
                whole = [*flags, "--batch_size", str(batch), "--max_steps", str(steps)]
                _, gib = watched([sys.executable, str(ROOT / script), *whole])
                records = [json.loads(line) for line in (Path(runs) / name / "log.jsonl").read_text().splitlines()]
                records = [record for record in records if "images_per_s" in record]
                memory[name].append(records[-1].get("gpu_gib", gib))
                records = [record for record in records if record["step"] > steps // 4]
                speeds[name] += [record["images_per_s"] for record in records]
                print(f"{name}: {speeds[name][-1]:.1f} images/s, {memory[name][-1]:.2f} GiB", file=sys.stderr, flush=True)
                waits[name] += [record["data_wait"] for record in records]
                counted[name] = script, [*flags, "--no-compile", "--output_dir", f"{runs}/count"]
        results = mp.get_context("spawn").SimpleQueue()
        mp.spawn(count_flops, (counted, results), nprocs=1)
        flops = results.get()
    table = []
    print(f"{'':<27}{'s/step':>8}{'images/s':>10}{'GiB':>7}{'wait':>7}{'GFLOPs':>8}{'of peak':>9}   against")
    for name, (_, _, base) in rows.items():
        speed = statistics.median(speeds[name])
        row = dict(name=name, s_per_step=batch / speed, images_per_s=speed, gib=max(memory[name]), data_wait=statistics.median(waits[name]),
                   gflops_per_image=flops[name] / 1e9, share_of_peak=flops[name] * speed / peak)
        table.append(row)
        against = ""
        if base in rows:
            time_, gib = statistics.median(speeds[base]) / speed - 1, row["gib"] / max(memory[base]) - 1
            against = f"   {base}: {100 * time_:+.1f}% time, {100 * gib:+.1f}% memory, {100 * (flops[name] / flops[base] - 1):+.1f}% FLOPs"
        print(f"{name:<27}{row['s_per_step']:8.3f}{speed:10.1f}{row['gib']:7.2f}{100 * row['data_wait']:6.1f}%{flops[name] / 1e9:8.1f}"
              f"{100 * row['share_of_peak']:8.1f}%{against}", flush=True)
    return table


# --------------------------------------------------------------------------------------------------------- evaluation


def bench_evaluation(repeats: int) -> list[dict]:
    """Seconds of whole commands, start included, on ViT-Ti/16 with random weights."""
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("original", "strong"):
            (Path(folder) / "copies" / name).mkdir(parents=True)
        for name in photographs(Path(folder) / "copies" / "original", 64):
            number = 100 * int(name.stem)
            Image.open(name).save(name.with_name(f"{number:06d}.jpg"))
            Image.open(name).resize((250, 188)).save(Path(folder) / "copies" / "strong" / f"{number + 1:06d}.jpg", quality=30)
            name.unlink()
        vit = ["--arch", "vit_tiny", "--patch_size", "16"]
        commands = {"eval_knn.py, digits": ["eval_knn.py", *vit, "--img_size", "64"],
                    "eval_knn.py --task copy": ["eval_knn.py", *vit, "--img_size", "224", "--task", "copy", "--data", f"{folder}/copies"],
                    "eval_linear.py --cached, digits": ["eval_linear.py", *vit, "--img_size", "64", "--cached", "--epochs", "20"]}
        for name, (script, *flags) in commands.items():
            seconds, gib = {}, {}
            for layers in ("last", "all"):
                command = [sys.executable, str(ROOT / script), *flags, "--layers", layers, "--overwrite", "--output_dir", f"{folder}/out"]
                measured = [watched(command) for _ in range(repeats)]
                seconds[layers], gib[layers] = (statistics.median(values) for values in zip(*measured, strict=True))
            table.append(dict(name=name, seconds=seconds, gib=gib))
            print(f"{name:<34} last layer {seconds['last']:6.1f} s {gib['last']:5.2f} GiB, 12 layers {seconds['all']:6.1f} s "
                  f"{gib['all']:5.2f} GiB: {seconds['all'] / seconds['last']:.2f} times", flush=True)
    return table


# ---------------------------------------------------------------------------------------------------------- relations


def relation_memory(number, potential, relations, batch, device, results):
    """In a process of its own: GiB that a relational loss and its backward add to its inputs at their peak, and seconds."""
    def peak():
        if device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20  # the kernel's peak of this program

    s, t = torch.randn(2, 4, batch, 8192, device=device).unbind()  # [CLS] of 4 views: (V, B, K) each
    s_patch, t_patch = torch.randn(2, 4 * batch, 16, 8192, device=device).unbind()  # ViT-S/8 on 32 x 32: 16 tokens of each view
    rows = torch.rand(4 * batch, 16, device=device).argsort(1)[:, :5]  # a mask ratio of 0.3
    weights = torch.full(rows.shape, 0.2, device=device)
    s.requires_grad_(), s_patch.requires_grad_()
    before, began = peak(), time.perf_counter()
    losses = ibot_rkd.relational_losses(potential, s, t, s_patch, t_patch, rows, weights, relations)
    sum(losses.values()).backward()
    after = peak()  # waits for the device
    results.put((after - before, (s.grad.numel() + s_patch.grad.numel()) * 4 / 2**30, time.perf_counter() - began))


def bench_relations(device: torch.device, batch: int = 256) -> list[dict]:
    table = []
    for potential in ("distance", "angle"):
        for relations in ("image", "batch"):
            results = mp.get_context("spawn").SimpleQueue()
            mp.spawn(relation_memory, (potential, relations, batch, device.type, results), nprocs=1)
            extra, gradients, seconds = results.get()
            table.append(dict(name=f"{potential} {relations}", gib=extra, gib_of_gradients=gradients, seconds=seconds))
            print(f"relations, {potential:<8} among {relations:<5} of batch {batch}, 4 views, 8192 outputs: {extra:.2f} GiB beyond the outputs "
                  f"at the peak, of which {gradients:.2f} are their gradients; {seconds:.1f} s on {device}", flush=True)
    return table


# -------------------------------------------------------------------------------------------------------------- views


def pil_views(size: int, blur: bool):
    """The two views of BYOL as torchvision makes them from a PIL image."""
    blurred = T.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0))))

    def view(p_blur, p_solarize):
        return T.Compose([
            T.RandomResizedCrop(size, scale=(0.08, 1.0)), T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), T.RandomGrayscale(0.2),
            T.RandomApply([blurred], p=p_blur * blur), T.RandomSolarize(128, p_solarize),
            T.ToTensor(), T.Normalize(common.MEAN, common.STD)])

    return view(1.0, 0.0), view(0.1, 0.2)


def rate(work, count: int, seconds: float = 6.0) -> float:
    """A second: `work()` makes `count` images or operations; the best of several rounds, after one to warm up."""
    work()
    best, deadline = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = max(best, count / (time.perf_counter() - began))
    return best


def bench_augmentation(device: torch.device) -> list[dict]:
    torch.set_num_threads(1)
    table = []
    images = torch.randint(0, 256, (1024, 3, 32, 32), dtype=torch.uint8)
    pil = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images[:128]]
    data = common.ImageData(torch.zeros(1024, dtype=torch.long), [0], images=images)
    for blur in (False, True):
        views = pil_views(32, blur)
        baseline = rate(lambda views=views: [view(image) for image in pil for view in views], len(pil))
        loader = common.ViewLoader(data, common.byol_views(32, blur=blur), 256, 0, device)
        speed = rate(lambda loader=loader: [None for _ in loader.steps(0, 4)], 1024)
        print(f"augmentation, two views of 32 x 32 with{'' if blur else 'out'} blur: torchvision on PIL {baseline:.0f} images/s, "
              f"here {speed:.0f} on {device} ({speed / baseline:.1f}x)")
        table.append(dict(blur=blur, torchvision=baseline, here=speed))
    return table


def bench_loading(folder: Path, device: torch.device) -> dict:
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
    return dict(torchvision=baseline, worker=speed, with_augmentation=whole)


def bench_probes(repeats: int) -> dict:
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
    return dict(one=one, all_layers=all_layers, ratio=one / all_layers)


def photographs(folder: Path, count: int = 128) -> list[Path]:
    """JPEG files of 500 x 375 with the detail of photographs, more or less: noise over all scales."""
    generator, paths = torch.Generator().manual_seed(0), []
    for i in range(count):
        scales = [torch.nn.functional.interpolate(torch.rand(1, 3, 2**s, 2**s, generator=generator), (375, 500), mode="bilinear") / s
                  for s in range(1, 9)]
        pixels = sum(scales)[0]
        pixels = (255 * (pixels - pixels.min()) / (pixels.max() - pixels.min())).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=92)
        paths.append(folder / f"{i}.jpg")
    return paths


def loading(photos: Path | None, device: torch.device) -> dict:
    with tempfile.TemporaryDirectory() as made:
        if not photos:
            photographs(Path(made))
        return bench_loading(photos or Path(made), device)


def multiply_adds(network: torch.nn.Module, *shape: int) -> float:
    """Of a forward pass of one input. The network is on the meta device, so that nothing is computed."""
    with FlopCounterMode(display=False) as counter:
        network.eval()(torch.empty(1, *shape, device="meta"))
    return counter.get_total_flops() / 2


def bench_cost() -> dict:
    with torch.device("meta"):
        figures = {}
        for arch in ("resnet50", "resnet18"):
            backbone = common.create_backbone(arch, 224)
            encoder = simdis.Encoder(backbone, simdis.mlp(backbone.embed_dim, 4096))
            figures[f"{arch} and projector"] = multiply_adds(encoder, 3, 224, 224)
        figures["a predictor"] = multiply_adds(simdis.mlp(256, 4096), 256)
    for name, count in figures.items():
        print(f"{name:<27}{count / 1e6:10,.1f} M multiply-adds an image")
    return figures


if __name__ == "__main__":
    parts = ["training", "evaluation", "probes", "relations", "cost", "augmentation", "loading"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rows", nargs="+", default=[""], help="of `training`: those whose name holds one of these, such as SimDis")
    parser.add_argument("--flags", default="", help="of `training`: more flags of every run, such as --flags=--no-compile")
    parser.add_argument("--photos", type=Path, help="a folder of photographs for `loading` (default: makes some)")
    parser.add_argument("--batch_size", type=int, help="of `training` (default: 16 on a CPU, 256 on a GPU)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each command (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    figures = dict(torch=torch.__version__, device=name)
    print(f"torch {torch.__version__}, {name}")
    bench = dict(
        training=lambda: bench_training(device, arguments.batch_size or (256 if device.type == "cuda" else 16), arguments.repeats,
                                        arguments.rows, arguments.flags.split()),
        evaluation=lambda: bench_evaluation(arguments.repeats), probes=lambda: bench_probes(arguments.repeats),
        relations=lambda: bench_relations(device), cost=bench_cost, loading=lambda: loading(arguments.photos, device),
        augmentation=lambda: bench_augmentation(device))
    for part in parts:  # those that set the number of threads come last
        if part in arguments.only:
            figures[part] = bench[part]()
            if arguments.json:
                arguments.json.write_text(json.dumps(figures, indent=1))
