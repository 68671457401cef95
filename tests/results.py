"""The tables of .github/RESULTS.md, one command each: trains every row for every seed, evaluates it
and prints the table.

    python tests/results.py sdssl --data /path/to/cifar10 --jobs 2

What is finished is not done again and what was cut off goes on, so a command that was stopped is
simply repeated. Each row prints mean and standard deviation over the seeds, then the paired
difference to the baseline of the same seeds with its standard error.
"""
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch

ROOT = Path(__file__).resolve().parent.parent

# measures: (title, evaluation, the field of its results.json)
KNN = ("k-NN", "eval_knn.py --k 20", "top-1")
KNN_LAYERS = ("k-NN, layer", "eval_knn.py --k 20 --layers all", "top-1")
LINEAR = ("linear", "eval_linear.py --cached", "test_top1")
LINEAR_LAYERS = ("linear, layer", "eval_linear.py --cached --layers all", "test_top1")
LINEAR_MEAN = ("linear", "eval_linear.py --cached --pool mean", "test_top1")


@dataclass
class Table:
    """flags: of all rows. rows: {label: flags of its own}; {LABEL} in them is the checkpoint of
    another row with the same seed, which is trained before. baseline: the row that the others are
    compared with. measures: what is shown of each."""

    script: str
    flags: str
    rows: dict
    baseline: str
    measures: list


VIT = "--arch vit_nano --patch_size 8 --knn_every 0 --num_workers 0"
TABLES = {
    "sdssl": Table(
        "sdssl.py", f"{VIT} --epochs 5 --batch_size 256 --lr 2e-3 --warmup_epochs 1 --hidden 512 "
        "--isd_hidden 256",
        {"MoCo v3": "--no-sd", "SD-MoCo v3": "--sd"}, "MoCo v3", [KNN_LAYERS, LINEAR_LAYERS]),
    "simdis": Table(
        "simdis.py", f"{VIT} --depth 1 --teacher_arch vit_nano --batch_size 128 --optimizer adamw "
        "--lr 4e-3 --warmup_epochs 0.2 --hidden 512",
        {"teacher": "--stage teacher --epochs 5",
         "BYOL alone": "--targets byol --epochs 1",
         "Off-2v": "--stage offline --targets 2v --epochs 1 --teacher {teacher}",
         "Off-7v": "--stage offline --targets 7v --epochs 1 --teacher {teacher}",
         "On-7v": "--targets 7v --epochs 1"}, "BYOL alone", [KNN, LINEAR]),
    "rrkd": Table(
        "rrkd.py", "--recipe cifar10 --labels --no-baseline --img_size 16 --knn_every 0 "
        "--num_workers 0",
        {"teacher": "--loss none --arch resnet9_half --epochs 6",
         "no distillation": "--loss none --arch resnet9_half --epochs 2",
         "SPKD": "--loss spkd --arch resnet9_half --epochs 2 --teacher {teacher}",
         "LPKD": "--loss lpkd --arch resnet9_half --epochs 2 --teacher {teacher}",
         "RRKD": "--loss rrkd --arch resnet9_half --epochs 2 --teacher {teacher}",
         "KD": "--loss kd --arch resnet9_half --epochs 2 --teacher {teacher}"},
        "no distillation", [("classifier", None, "accuracy")]),
    "ibot_rkd": Table(
        "ibot_rkd.py", f"{VIT} --pos_embed sincos --batch_size 64 --lr 2e-3 --warmup_epochs 0.3 "
        "--freeze_last_layer 0.1 --hidden 512 --out_dim 512 --momentum 0.99 --global_views 4 "
        "--epochs 1",
        {"random": "--max_steps 1 --lr 0",
         "iBOT": "--potential none --teacher_temp 0.02 --teacher_patch_temp 0.04 "
                 "--temp_epochs 0.3",
         "RKD-D": "--potential distance", "RKD-A": "--potential angle"}, "random",
        [KNN, LINEAR]),
    "d2v_kd": Table(
        "d2v_kd.py", f"{VIT} --depth 2 --student prenorm --epochs 3 --warmup_epochs 0.3 --lr 8e-3 "
        "--batch_size 256 --teacher_epochs 5",
        {"random": "--max_steps 1 --lr 0 --teacher {distilled.parent}/teacher/checkpoint.pth",
         "distilled": "",
         "first blocks, as they are": "--init teacher --max_steps 1 --lr 0 "
                                      "--teacher {distilled.parent}/teacher/checkpoint.pth",
         "first blocks, distilled": "--init teacher "
                                    "--teacher {distilled.parent}/teacher/checkpoint.pth"},
        "random", [KNN, LINEAR_MEAN]),
}


def run(command: list, log: Path, threads: int) -> None:
    """A script of this repository, its output appended to a file; an error ends everything."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(log, "a") as file:
        result = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment,
                                stdout=file, stderr=subprocess.STDOUT)
    if result.returncode:
        last = log.read_text().strip().splitlines()[-1]
        sys.exit(f"{' '.join(command)} ended with code {result.returncode}: {last}; see {log}")


def folder_of(args, label: str, seed: int) -> Path:
    name = label.lower().replace(",", "").replace(" ", "-")
    return Path(args.output_dir).resolve() / args.table / f"{name}-{seed}"


def values_of(table: Table, folder: Path) -> dict:
    """{column: value} of a finished run; {} where something is missing."""
    values = {}
    for title, evaluation, name in table.measures:
        if evaluation is None:
            path = folder / "log.jsonl"
            records = [json.loads(line) for line in path.read_text().splitlines()]
            values |= {title: record[name] for record in records if name in record}
            continue
        path = folder / title.split(",")[0] / "results.json"
        if not path.is_file():
            return {}
        for row in json.loads(path.read_text())["rows"]:
            column = f"{title} {row['layer']}" if "layer" in title else title
            values[column] = row[name]
    return values


def fit(args, table: Table, label: str, seed: int) -> None:
    """Trains one row with one seed and evaluates it; what is there already stays."""
    folder = folder_of(args, label, seed)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "finished").exists():
        return
    checkpoints = {name: folder_of(args, name, seed) / "checkpoint.pth" for name in table.rows}
    flags = [flag.format(**checkpoints) for flag in table.rows[label].split()]
    common = [table.script, "--data", args.data, "--seed", str(seed), "--device", args.device]
    limit = ["--max_steps", str(args.max_steps)] if args.max_steps else []
    run([*common, *table.flags.split(), *limit, *flags, "--resume", "--output_dir", str(folder)],
        folder / "output.txt", args.threads)
    for title, evaluation, _ in table.measures:
        if evaluation:
            run([*evaluation.split(), "--checkpoint", str(folder / "checkpoint.pth"), "--data",
                 args.data, "--device", args.device, "--num_workers", "0", "--overwrite",
                 "--output_dir", str(folder / title.split(",")[0])],
                folder / "output.txt", args.threads)
    (folder / "finished").touch()
    print(f"{label}, seed {seed}: {values_of(table, folder)}", flush=True)


def minutes_of(folder: Path) -> float:
    """Of the training steps alone, by the log; so it does not count what an interruption lost."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    checkpoint = torch.load(folder / "checkpoint.pth", map_location="cpu", weights_only=True)
    batch = checkpoint["args"]["batch_size"]
    seconds = 0.0
    done = 0
    for record in log:
        if "images_per_s" in record:
            seconds += (record["step"] - done) * batch / record["images_per_s"]
            done = record["step"]
    return seconds / 60


def cell(values: list) -> str:
    """Mean and standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    return f"{mean(values):.1f} ± {stdev(values):.1f}"


def difference(values: list, baseline: list) -> str:
    """Mean of the differences by seed, with its standard error."""
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    if len(differences) < 2:
        return f"{differences[0]:+.1f}"
    return f"{mean(differences):+.1f} ± {stdev(differences) / len(differences) ** 0.5:.1f}"


def print_table(args, table: Table) -> None:
    results = {label: [values_of(table, folder_of(args, label, seed)) for seed in args.seeds]
               for label in table.rows}
    columns = list(results[table.baseline][0])
    print(f"\n| {args.table}, n = {len(args.seeds)} | {' | '.join(columns)} | minutes |")
    print("| --- " * (len(columns) + 2) + "|")
    for label, runs in results.items():
        minutes = mean(minutes_of(folder_of(args, label, seed)) for seed in args.seeds)
        cells = [cell([run[c] for run in runs]) if c in runs[0] else "" for c in columns]
        print(f"| {label} | {' | '.join(cells)} | {minutes:.1f} |")
    print(f"\n| difference to {table.baseline}, ± its standard error | {' | '.join(columns)} |")
    print("| --- " * (len(columns) + 1) + "|")
    for label, runs in results.items():
        cells = []
        for c in columns:
            baseline = [run[c] for run in results[table.baseline]]
            cells.append(difference([run[c] for run in runs], baseline) if c in runs[0] else "")
        if label != table.baseline:
            print(f"| {label} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--data", default="digits", help="as of the scripts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--max_steps", type=int, help="early end of every run, to try the command")
    parser.add_argument("--output_dir", default="runs/results")
    args = parser.parse_args()
    args.threads = max(1, (os.cpu_count() or 1) // args.jobs)
    table = TABLES[args.table]
    alone = [label for label, flags in table.rows.items() if "{" not in flags]
    others = [label for label in table.rows if label not in alone]
    for labels in (alone, others):  # the teachers first
        with ThreadPoolExecutor(args.jobs) as pool:
            runs = [pool.submit(fit, args, table, label, seed)
                    for seed in args.seeds for label in labels]
            for finished in runs:
                finished.result()
    print_table(args, table)


if __name__ == "__main__":
    main()
