"""The promises P1 to P9 for every training script, each written once.

What one script alone promises (its gradients on two processes, its teachers, the input that only it can refuse) is in its own
tests; eval_linear.py's runs are in test_eval_linear.py.
"""
import contextlib
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_one_line_error, finished, read_log, run_script, same, start_script
from torch._subclasses import FakeTensorMode

import common

TINY = ["--log_every", 1, "--knn_every", 0, "--num_workers", 0, "--epochs", 2, "--device", "cpu"]
FILES = ["backbone.pth", "checkpoint.pth", "curves.png", "log.jsonl"]
NANO = ["--arch", "vit_nano", "--img_size", 16, "--patch_size", 8]


@dataclass
class Script:
    """What the promises have to know about a script; {name} in a flag is a file of `teachers`."""

    name: str
    small: list  # flags of a run whose steps take no time
    methods: list  # flags of the methods that it has, each of which must resume exactly
    poison: tuple  # a network, one of its weights, and the loss that is not finite with it
    changed: tuple  # flags that a resumption refuses, and what it says about them
    on_files: list = field(default_factory=list)  # flags for a folder of images
    default: tuple = ("--max_steps", 2)  # flags that shorten the default job
    writes: list = field(default_factory=list)  # what the default job leaves beside FILES
    stand_ins: dict = field(default_factory=dict)  # for functions that need numbers
    says: str = "step 0 .*k-NN top-1.*step 2 .*k-NN top-1"  # what it prints, in this order

    @property
    def module(self):
        return importlib.import_module(self.name)


SCRIPTS = [
    Script(
        "sdssl", ["--batch_size", 32, "--hidden", 32, "--isd_hidden", 16, "--patch_size", 8],
        [["--framework", framework, sd] for framework in ("mocov3", "byol", "simclr") for sd in ("--sd", "--no-sd")],
        ("student", "isd_projector.weights.0", "loss_(isd|pred)"), (["--alpha", 0.5], "--alpha was 1.0"),
        on_files=NANO[:2] + ["--img_size", 32]),
    Script(
        "simdis", ["--batch_size", 32, "--hidden", 16, "--teacher_arch", "vit_nano", *NANO, "--depth", 1],
        [["--stage", "online", "--optimizer", "adamw"],
         ["--stage", "offline", "--teacher", "{simdis}", "--optimizer", "lars", "--lr", 0.1, "--weight_decay", 0.01],
         ["--stage", "teacher", "--optimizer", "sgd", "--lr", 0.1, "--weight_decay", 0.01]],
        ("student", "predictors.T-v.3.weight", "loss_student_T-v"), (["--targets", "2v"], "--targets was"),
        on_files=["--img_size", 32],
        says="step 0 .*teacher: k-NN top-1.*step 2 .*teacher: k-NN top-1.*"
             "step 2 [^:]*: k-NN top-1"),
    Script(
        "rrkd", ["--batch_size", 32, "--no-baseline", "--teacher", "{rrkd}"],
        [["--loss", "rrkd"], ["--loss", "rrkd", "--anchors", "class"],
         ["--teacher", "{rrkd_labels}", "--arch", "mlp32", "--labels", "--loss", "lpkd"]],
        ("student", "backbone.layers.0.weight", "loss_rrkd"), (["--loss", "spkd"], "--loss was"),
        on_files=["--img_size", 8, "--no-labels", "--arch", "ae32"], default=("--epochs", 3),
        writes=["baseline", "maps.png", "teacher"],
        stand_ins={"accuracy": lambda *arguments: dict(accuracy=None, metric="probe"),
                   "load_weights": lambda *arguments, **options: None, "first_maps": lambda *arguments: {}},
        says=r"k-NN top-1.*teacher +16,576 parameters +probe accuracy \d\d\.\d\d %\nbaseline +6,240 [^\n]*\nstudent +6,240 "),
    Script(
        "ibot_rkd", ["--batch_size", 32, "--hidden", 32, "--out_dim", 48],
        [["--potential", "none"], ["--potential", "distance"], ["--potential", "none", "angle"]],
        ("student", "backbone.mask_token", "loss_distance_(cls|patch)"), (["--relations", "batch"], "--relations was image"),
        on_files=["--arch", "vit_nano", "--img_size", 32, "--potential", "none", "distance", "--local_crops", 2,
                  "--local_size", 16],
        stand_ins={"masked_rows": lambda masks, u: (torch.zeros(len(masks), 2).long(), torch.full((len(masks), 2), 0.5))}),
    Script(
        "d2v_kd", ["--batch_size", 32, "--teacher", "{backbone}"],
        [["--student", "postnorm"], ["--student", "prenorm", "--init", "teacher", "--proj"]],
        ("student", "backbone.cls_token", "loss"), (["--student", "prenorm"], "--student was postnorm"),
        default=("--teacher_epochs", 1, "--max_steps", 2), writes=["teacher"],
        says="no --teacher: a small one is trained first.*teacher, vit_nano of 4 blocks.*student, vit_nano of 2 blocks.*"
             "teacher: k-NN top-1.*step 0 .*validation loss.*step 2 .*validation loss.*step 2 .*k-NN top-1"),
]
IDS = {"ids": lambda value: value.name if isinstance(value, Script) else None}
each_script = pytest.mark.parametrize("script", SCRIPTS, **IDS)
# by default the first script stands for all where a test takes many seconds and tests common.py
others = [pytest.param(script, marks=pytest.mark.slow) for script in SCRIPTS[1:]]
first_script = pytest.mark.parametrize("script", [SCRIPTS[0], *others], **IDS)


@pytest.fixture(autouse=True)
def bare_runs(monkeypatch):
    """Runs in this process draw nothing and check no k-NN, which take longer than their steps."""
    monkeypatch.setattr(common.Run, "draw_curves", lambda self: None)
    monkeypatch.setattr("rrkd.draw_maps", lambda *arguments: None)
    for script in SCRIPTS:
        monkeypatch.setattr(script.module, "knn_accuracy", lambda *arguments, **options: None)
    monkeypatch.setattr(common, "signals", [])


@pytest.fixture
def few_digits(monkeypatch):
    """Of the digits, 72 to train with and 40 to test with: few steps make an epoch."""
    train, test = common.load_data("digits")
    few = train.subset(torch.arange(72)), test.subset(torch.arange(40))
    for script in SCRIPTS:
        monkeypatch.setattr(script.module, "load_data", lambda name, path: few)


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """Files that the scripts learn from: {name of a script, or of a file's kind: its path}."""
    root = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(7)
    options = dict(arch="vit_nano", img_size=16, patch_size=4)
    student = {f"backbone.{key}": value for key, value in common.create_backbone(**options).state_dict().items()}
    meta = dict(network="student", backbone=options, mean=common.MEAN, std=common.STD)
    paths = {name: root / name / "checkpoint.pth" for name in ("simdis", "rrkd", "rrkd_labels")}
    paths["backbone"] = root / "backbone.pth"
    torch.save({"student": student, "meta": meta}, paths["backbone"])
    simdis, rrkd = SCRIPTS[1:3]
    with pytest.MonkeyPatch.context() as patch:
        bare_runs.__wrapped__(patch)
        teacher = ["--stage", "teacher", "--output_dir", root / "simdis", "--max_steps", 1]
        simdis.module.train(arguments(simdis, {}, *teacher))
        small = [*TINY, "--batch_size", 32, "--loss", "none", "--max_steps", 1, "--output_dir"]
        for flags in ([root / "rrkd"], [root / "rrkd_labels", "--arch", "mlp32", "--labels"]):
            rrkd.module.train(rrkd.module.parse_arguments([str(x) for x in [*small, *flags]]))
    return paths


def filled(flags, files):
    return [str(flag).format(**files) for flag in flags]


def arguments(script, files, *flags):
    return script.module.parse_arguments(filled([*TINY, *script.small, *flags], files))


def train(script, files, folder, *flags):
    """One run in this process -> its checkpoint."""
    script.module.train(arguments(script, files, "--output_dir", folder, *flags))
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def attempt(script, files, capsys, *flags):
    """A run through `launch` that must end early -> something like a finished process."""
    return finished(capsys, lambda: script.module.train(arguments(script, files, *flags)))


def losses_of(folder):
    """The records of training steps, without what a clock has measured."""
    records = [record for record in read_log(folder) if "loss" in record]
    for record in records:
        del record["images_per_s"], record["data_wait"]
    return records


def assert_same_run(one, two):
    one["args"] = two["args"] = None  # --max_steps and --resume differ
    assert same(one, two)


# ------------------------------------------------------- P1, P2, P3: several processes, exact repeats


# the train() of the others runs on two processes in their own tests
@pytest.mark.parametrize("script", [SCRIPTS[0], SCRIPTS[1], SCRIPTS[4]], **IDS)
def test_two_processes_log_the_same_trace(script, teachers, tmp_path, monkeypatch):
    """P1: the losses and k-NN that two processes log are those of one."""
    monkeypatch.setattr(script.module, "knn_accuracy", common.knn_accuracy)
    train(script, teachers, tmp_path / "1", "--max_steps", 3)
    flags = filled([*TINY, *script.small], teachers)
    result = run_script(f"{script.name}.py", *flags, "--max_steps", 3, "--output_dir", tmp_path / "2", processes=2)
    assert result.returncode == 0, result.stderr
    one, two = (read_log(tmp_path / folder) for folder in "12")
    assert len(one) == len(two) >= 5
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for name in a:
            if name.startswith(("loss", "knn")):
                assert a[name] == pytest.approx(b[name], rel=1e-3), name


@pytest.mark.parametrize("script, flags", [(script, flags) for script in SCRIPTS for flags in script.methods], **IDS)
def test_resume_is_exact(script, flags, teachers, few_digits, tmp_path):
    """P2, P3: 3 steps, stop, resume and 3 steps = 6 steps, bit for bit and across the end of an epoch."""
    flags = [*flags, "--batch_size", 16]  # four steps an epoch
    whole = train(script, teachers, tmp_path / "whole", *flags, "--max_steps", 6)
    train(script, teachers, tmp_path / "parts", *flags, "--max_steps", 3)
    parts = train(script, teachers, tmp_path / "parts", *flags, "--max_steps", 6, "--resume")
    assert_same_run(whole, parts)
    trace = losses_of(tmp_path / "whole")
    assert trace == losses_of(tmp_path / "parts") and len(trace) == 6
    assert whole["optimizer"]["state"]


@each_script
def test_seeds_count_and_low_precision_stays_close(script, teachers, few_digits, tmp_path):
    """P3: another seed has another trace. Two steps under bf16 autocast are near, and not at, those in fp32."""
    losses = {}
    for name, flags in {"fp32": [], "seed": ["--seed", 1], "bf16": ["--dtype", "bf16"]}.items():
        train(script, teachers, tmp_path / name, "--max_steps", 2, "--batch_size", 8, *flags)
        losses[name] = [record["loss"] for record in losses_of(tmp_path / name)]
    assert losses["fp32"][0] != losses["seed"][0]
    assert losses["fp32"][1] != losses["bf16"][1] and losses["fp32"][1] == pytest.approx(losses["bf16"][1], rel=0.03)


@each_script
def test_workers_do_not_matter(script, teachers, image_folder, tmp_path):
    """P3: the same trace with 0 and 2 workers, from files; and where a run is resumed in mid-epoch with another number of them."""
    flags = ["--data", image_folder, *script.on_files, "--batch_size", 8, "--epochs", 4]
    one = train(script, teachers, tmp_path / "one", *flags, "--max_steps", 5)
    train(script, teachers, tmp_path / "two", *flags, "--max_steps", 2, "--num_workers", 2)
    two = train(script, teachers, tmp_path / "two", *flags, "--max_steps", 5, "--num_workers", 1, "--resume")
    assert_same_run(one, two)


# --------------------------------------------------------------------------- P5: one file copies


@each_script
def test_two_files_in_an_empty_folder_run(script, tmp_path):
    """P5, P9: the default job, its files, its bar; and a second run does not replace the first."""
    for name in ("common.py", f"{script.name}.py"):
        shutil.copy(ROOT / name, tmp_path)
    result = run_script(f"{script.name}.py", *script.default, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / script.name
    assert sorted(path.name for path in run.iterdir()) == sorted([*FILES, *script.writes])
    assert re.search(script.says, result.stdout, re.DOTALL), result.stdout
    assert "chance" in result.stdout + (run / "log.jsonl").read_text()
    assert all(word in result.stderr for word in ("loss", "lr", "img/s"))
    assert len(re.split("[\r\n]+", result.stderr)) < 100  # bars keep short where nobody looks
    records = [record for record in read_log(run) if "loss" in record]
    assert records and all(0 <= record["data_wait"] <= 1 for record in records)
    again = run_script(f"{script.name}.py", *script.default, cwd=tmp_path)
    assert_one_line_error(again, "already holds a run", "--resume")


# ------------------------------------------------------------------------- P6: no silent failure


@each_script
def test_non_finite_loss_stops_and_keeps_the_checkpoint(script, teachers, tmp_path, capsys):
    """P6: the step and the term are named, exit code 1, and the checkpoint is as it was."""
    network, weight, term = script.poison
    checkpoint = train(script, teachers, tmp_path, "--max_steps", 3)
    checkpoint[network][weight].view(-1)[0] = math.nan
    common.save_file(checkpoint, tmp_path / "checkpoint.pth")
    poisoned = (tmp_path / "checkpoint.pth").read_bytes()
    result = attempt(script, teachers, capsys, "--output_dir", tmp_path, "--max_steps", 40, "--resume", "--log_every", 7)
    assert result.returncode == 1 and re.search(f"stopped: {term} was not finite at step 4", result.stdout)
    assert (tmp_path / "checkpoint.pth").read_bytes() == poisoned


@pytest.mark.parametrize("script, number", [(script, signal.SIGTERM) for script in SCRIPTS] + [(SCRIPTS[0], signal.SIGINT)], **IDS)
def test_signals_save_and_exit(script, number, teachers, few_digits, tmp_path, capsys, monkeypatch):
    """P6: a signal in the second step saves after it and says so, the exit code is 128 + signal, and --resume ends as a run that
    nothing happened to."""
    flags = ["--batch_size", 16, "--save_every", 0, "--max_steps", 4]
    whole = train(script, teachers, tmp_path / "whole", *flags)
    end_step = common.Run.end_step

    def interrupted(self, step, *losses, **values):
        if step == 1:
            os.kill(os.getpid(), number)
        end_step(self, step, *losses, **values)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "end_step", interrupted)
        result = attempt(script, teachers, capsys, "--output_dir", tmp_path / "cut", *flags)
    assert result.returncode == 128 + number and "continue with --resume" in result.stdout
    assert torch.load(tmp_path / "cut" / "checkpoint.pth", weights_only=True)["step"] == 2
    assert losses_of(tmp_path / "cut")[-1]["step"] == 2
    assert_same_run(whole, train(script, teachers, tmp_path / "cut", *flags, "--resume"))


@pytest.mark.parametrize("script, check", [(script, 1) for script in SCRIPTS] + [(SCRIPTS[0], 2)], **IDS)
def test_a_signal_in_a_check(script, check, teachers, tmp_path, capsys, monkeypatch):
    """P6: the check ends at once. Before the first step nothing is there to be saved: one line, exit code 130. Later the steps
    before the check are kept."""
    calls = []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == check:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        return 50.0

    monkeypatch.setattr(script.module, "knn_accuracy", interrupted)
    flags = ["--save_every", 0, "--knn_every", 1, "--epochs", 9, "--batch_size", 512]
    result = attempt(script, teachers, capsys, "--output_dir", tmp_path, *flags)
    assert result.returncode == 130 and result.stderr.strip().endswith("stopped by SIGINT")
    if check == 1:
        assert not (tmp_path / "checkpoint.pth").exists()
    else:
        assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] == 2
        assert [record["step"] for record in read_log(tmp_path) if "knn" in record] == [0]
        monkeypatch.setattr(common, "signals", [])
        train(script, teachers, tmp_path, *flags, "--max_steps", 3, "--resume")  # makes up for it
        assert [record["step"] for record in read_log(tmp_path) if "knn" in record] == [0, 2, 3]


@each_script
@pytest.mark.parametrize("moment", ["save", "draw_curves"])
def test_a_signal_while_the_last_step_is_saved(script, moment, teachers, tmp_path, capsys, monkeypatch):
    """P6: it ends the command too, which may have had more to train."""
    original = getattr(common.Run, moment)

    def signalled(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        original(self, *arguments)

    monkeypatch.setattr(common.Run, moment, signalled)
    result = attempt(script, teachers, capsys, "--output_dir", tmp_path, "--max_steps", 2)
    assert result.returncode == 128 + signal.SIGTERM and "continue with --resume" in result.stdout
    assert common.read_checkpoint(tmp_path / "checkpoint.pth")["step"] == 2


@each_script
def test_what_torchrun_starts_again(script, teachers, tmp_path, capsys, monkeypatch):
    """A run that it has begun goes on, whatever the flags; another run is replaced or refused as at the first start."""
    train(script, teachers, tmp_path, "--max_steps", 2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr(os, "getppid", lambda: 1)  # another agent
    assert_one_line_error(attempt(script, teachers, capsys, "--output_dir", tmp_path), "already holds a run")
    assert train(script, teachers, tmp_path, "--max_steps", 1, "--overwrite")["step"] == 1
    assert train(script, teachers, tmp_path, "--max_steps", 3, "--overwrite")["step"] == 3
    assert [record["step"] for record in losses_of(tmp_path)] == [1, 2, 3]


@each_script
def test_overwrite_keeps_the_old_run_until_the_new_one_saves(script, teachers, tmp_path, capsys, monkeypatch):
    train(script, teachers, tmp_path, "--max_steps", 2)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    flags = ["--output_dir", tmp_path, "--max_steps", 1, "--overwrite"]

    def bad_image(self, *losses, **values):
        raise common.InputError("cannot read image 7.png")

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "end_step", bad_image)
        assert_one_line_error(attempt(script, teachers, capsys, *flags), "cannot read image 7.png")
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
    assert train(script, teachers, tmp_path, "--max_steps", 1, "--overwrite")["step"] == 1
    assert [record["step"] for record in losses_of(tmp_path)] == [1]
    assert not list(tmp_path.glob("*.new.*"))
    (tmp_path / "checkpoint.pth").unlink()  # which spares space, but the weights are worth keeping
    assert_one_line_error(attempt(script, teachers, capsys, *flags[:-1]), "backbone.pth already exists: pass --overwrite")


@each_script
def test_a_moved_run_with_a_damaged_log_resumes(script, teachers, tmp_path):
    """A folder may be moved; a log that a crash ended with garbage is cut there."""
    train(script, teachers, tmp_path / "here", "--max_steps", 2)
    with open(tmp_path / "here" / "log.jsonl", "ab") as file:
        file.write(b'{"step": 3, "loss"\x00\x00\xff\n\xfe')
    shutil.move(tmp_path / "here", tmp_path / "there")
    train(script, teachers, tmp_path / "there", "--max_steps", 3, "--resume")
    assert [record["step"] for record in losses_of(tmp_path / "there")] == [1, 2, 3]


@each_script
def test_two_runs_in_one_folder_are_refused(script, teachers, tmp_path, capsys):
    """The lock is another process's, and dies with it."""
    pytest.importorskip("fcntl")
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path / ".lock")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    result = attempt(script, teachers, capsys, "--output_dir", tmp_path)
    assert_one_line_error(result, "another process trains in .*another --output_dir")
    process.communicate()
    assert train(script, teachers, tmp_path, "--max_steps", 1)["step"] == 1


def test_a_closed_pipe_does_not_end_a_run(teachers, tmp_path):
    """`| head -1`: training goes on to its end."""
    os.mkfifo(tmp_path / "pipe")
    process = start(SCRIPTS[0], teachers, tmp_path / "run", "--epochs", 1, "--max_steps", 3, outputs=[tmp_path / "pipe"])
    with open(tmp_path / "pipe") as pipe:
        pipe.readline()
    process.join(timeout=120)
    assert process.exitcode == 0
    assert torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)["step"] == 3


def start(script, files, folder, *flags, **options):
    """A process that trains for as long as it is left to."""
    flags = [*TINY, *script.small, "--epochs", 5000, "--output_dir", folder, *flags]
    return start_script(f"{script.name}.py", *filled(flags, files), **options)


def wait_until(condition, seconds=180):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


def test_a_signal_to_all_processes_saves_too(teachers, image_folder, tmp_path):
    """P6: shells and torchrun signal the whole group, job schedulers every process, the workers of the loader included."""
    script = SCRIPTS[0]
    flags = ["--data", image_folder, *script.on_files, "--batch_size", 8, "--save_every", 0, "--num_workers", 2]
    process = start(script, teachers, tmp_path, *flags, outputs=[tmp_path / "stdout"])
    log = tmp_path / "log.jsonl"
    wait_until(lambda: not process.is_alive() or log.exists() and len(losses_of(tmp_path)) > 3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    for worker in children.read_text().split() if children.exists() else []:
        os.kill(int(worker), signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)
    process.join(timeout=120)
    assert process.exitcode == 128 + signal.SIGTERM
    assert "continue with --resume" in (tmp_path / "stdout").read_text()
    saved = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert saved["step"] == losses_of(tmp_path)[-1]["step"]


@first_script
def test_kills_at_any_moment(script, teachers, tmp_path):
    """P6: kill -9 leaves a whole checkpoint, none is older than the last, and --resume goes on."""
    path = tmp_path / "checkpoint.pth"
    steps = [0]
    for delay in (0.0, 0.3, 0.75):
        process = start(script, teachers, tmp_path, "--resume")
        wait_until(lambda: path.exists() or not process.is_alive())
        time.sleep(delay)
        process.kill()
        process.join()
        steps.append(common.read_checkpoint(path)["step"])
    assert steps == sorted(steps) and steps[1] > 0
    flags = ["--epochs", 5000, "--max_steps", steps[-1] + 2, "--resume"]
    train(script, teachers, tmp_path, *flags)
    trained = [record["step"] for record in losses_of(tmp_path)]
    assert trained == list(range(1, steps[-1] + 3))


# ----------------------------------------------------------------------------- P7: bad input


@each_script
def test_numbers_out_of_bounds_and_unknown_flags_are_one_line(script, teachers, tmp_path, capsys):
    """P7, what every script takes: numbers, files, flags that do not exist, a bad folder."""
    (tmp_path / "file").touch()

    def check(*flags, says, code=2):
        result = attempt(script, teachers, capsys, "--output_dir", tmp_path / "run", *flags)
        assert_one_line_error(result, says, code=code)

    least = dict(img_size=1, patch_size=1, epochs=1, batch_size=2, max_steps=1, log_every=1, seed=0, lr=0, warmup_epochs=0,
                 weight_decay=0, num_workers=0, save_every=0, knn_every=0)
    for name, value in least.items():
        check(f"--{name}", value - 1, says=f"argument --{name}: {value - 1} is not a number of at least {value}")
    check("--lr", "nan", says="argument --lr: nan is not a number of at least 0")
    check("--lr", "fast", says="argument --lr: invalid float value: 'fast'")
    check("--init", "", says="argument --init: no file ''")
    check("--init", tmp_path / "none.pth", says="argument --init: no file .*none.pth")
    check("--nonsense", says="unrecognized arguments: --nonsense; see --help")
    check("--recipe", "imagenot", says="unknown --recipe imagenot: use one of .*digits")
    check("--data", tmp_path / "nowhere", says="nowhere is neither a directory nor one of.*digits")
    check("--data", "", says="--data '' is neither a directory")
    check("--output_dir", "", says="argument --output_dir: the name is empty")
    check("--arch", "vit_giant", says="--arch vit_giant.*vit_small")
    assert not (tmp_path / "run" / "checkpoint.pth").exists()
    check("--output_dir", tmp_path / "file", says="(File exists|Not a directory).*file", code=1)


@each_script
def test_images_and_weights_that_do_not_fit_are_one_line(script, teachers, image_folder, tmp_path, capsys):
    """P7, P10: folders, sizes and files; and --init from DINO's layout of a checkpoint, which does fit."""
    def check(*flags, says):
        assert_one_line_error(attempt(script, teachers, capsys, "--output_dir", tmp_path / "run", *flags), says)

    size = 8 if script.name == "rrkd" else 16
    vit = ["--arch", "vit_nano", "--img_size", size, "--patch_size", 4]
    vit += {"d2v_kd": ["--student", "prenorm"], "simdis": ["--depth", 0]}.get(script.name, [])
    for name in ("empty", "broken"):
        (tmp_path / name / "train" / "cat").mkdir(parents=True)
    check(*vit, "--data", tmp_path / "empty", says="class folder .*cat has no images")
    for i in range(8):
        photo = (image_folder / "train" / "cat" / f"{i}.jpg").read_bytes()
        (tmp_path / "broken" / "train" / "cat" / f"{i}.jpg").write_bytes(photo if i != 7 else photo[:500])
    check(*vit, "--data", tmp_path / "broken", "--batch_size", 9, says="[78] images are fewer than --batch_size 9")
    check(*vit, "--data", tmp_path / "broken", "--batch_size", 7, "--epochs", 9, says="cannot read image .*7.jpg")
    odd = ["--patch_size", 3] if script.name == "rrkd" else ["--img_size", 18]
    check(*vit, *odd, says="is not a multiple of patch size|images of 18 x 18 are not a multiple")
    weights = common.vit_nano(img_size=16, patch_size=4).state_dict()
    dino = {"teacher": {f"module.backbone.{key}": value for key, value in weights.items()} | {"module.head.mlp.0.bias": torch.ones(3)}}
    torch.save(dino, tmp_path / "dino.pth")
    del weights["norm.bias"]
    torch.save(weights, tmp_path / "short.pth")
    (tmp_path / "words.pth").write_text("no checkpoint")
    check(*vit, "--init", tmp_path / "short.pth", says="1 keys are missing .norm.bias")
    check(*vit, "--init", tmp_path / "words.pth", says="words.pth is not a PyTorch checkpoint")
    assert not (tmp_path / "run" / "checkpoint.pth").exists()
    assert train(script, teachers, tmp_path / "run", *vit, "--init", tmp_path / "dino.pth", "--max_steps", 1)["step"] == 1


def test_every_load_is_of_weights_alone():
    """P8."""
    source = "".join(path.read_text() for path in ROOT.glob("*.py"))
    calls = re.findall(r"torch\.load\((?!'\{path\}).*", source)  # but what a message advises for files that one trusts
    assert calls and all(call.endswith("weights_only=True)") for call in calls)


@each_script
def test_resume_with_other_settings_is_refused(script, teachers, tmp_path, capsys):
    flags, says = script.changed
    train(script, teachers, tmp_path, "--max_steps", 1)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    result = attempt(script, teachers, capsys, "--output_dir", tmp_path, "--resume", *flags)
    assert_one_line_error(result, "cannot resume", says)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


# ------------------------------------------------------------------- flags, precision, learning


@pytest.mark.parametrize("script", [*(script.name for script in SCRIPTS), "eval_linear"])
def test_every_flag_is_read(script):
    """No dead flags: each is read as an attribute of args somewhere."""
    source = (ROOT / f"{script}.py").read_text() + (ROOT / "common.py").read_text()
    for name in vars(importlib.import_module(script).parse_arguments([])):
        assert re.search(rf"\bargs\.{name}\b", source), name


class StepDone(Exception):
    """What a step leaves: its losses and the features that are watched."""


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="fake tensors of torch 2.6 ask for a CUDA driver")
@each_script
def test_a_step_keeps_to_its_device(script, teachers, tmp_path, monkeypatch):
    """The forward pass of a step on a GPU that need not exist: fake tensors have no numbers, but refuse what mixes devices. It
    begins once the networks are made, on the CPU, and moved."""
    cuda = torch.device("cuda", 0)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    module_to = torch.nn.Module.to

    def move(self, device):
        if torch.device(device).type != "cuda":
            return module_to(self, device)
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None:
            stack.enter_context(fake)
        moved = {}  # a tensor that two modules share stays one
        for module in self.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        copy = torch.empty_like(tensor, device=cuda)
                        if isinstance(tensor, torch.nn.Parameter):
                            copy = torch.nn.Parameter(copy, tensor.requires_grad)
                        tensors[name] = moved.setdefault(id(tensor), copy)
        return self

    def setup(args):
        vars(args).update(device="cuda", dtype="fp32", compile=False)
        return cuda

    def steps(self):
        M = self.loader.batch_size
        views = [torch.randn(M, 3, v.size, v.size, device=cuda) for v in self.loader.views]
        yield 0, views, torch.arange(M)

    def end_step(self, step, losses, features=None, **values):
        raise StepDone(losses, features)

    monkeypatch.setattr(torch.nn.Module, "to", move)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    for name, stand_in in script.stand_ins.items():
        monkeypatch.setattr(script.module, name, stand_in)
    monkeypatch.setattr(script.module, "setup", setup)
    monkeypatch.setattr(common.ImageData, "fingerprint", lambda self: "")
    monkeypatch.setattr(common.Run, "steps", steps)
    monkeypatch.setattr(common.Run, "end_step", end_step)
    args = arguments(script, teachers, "--output_dir", tmp_path)
    with contextlib.ExitStack() as stack, pytest.raises(StepDone) as done:
        script.module.train(args)
    losses, features = done.value.args
    assert losses and all(loss.device == cuda for loss in losses.values())
    assert features.device == cuda


@pytest.mark.slow
@each_script
def test_compiled_run_equals_eager(script, teachers, tmp_path):
    train(script, teachers, tmp_path / "eager", "--max_steps", 2)
    train(script, teachers, tmp_path / "compiled", "--max_steps", 2, "--compile")
    eager, compiled = (losses_of(tmp_path / name)[1]["loss"] for name in ("eager", "compiled"))
    assert eager == pytest.approx(compiled, rel=1e-4)


@pytest.mark.slow
@each_script
def test_default_run_learns(script, tmp_path):
    """The README's first command of each script: k-NN rises well above its start."""
    result = run_script(f"{script.name}.py", "--output_dir", tmp_path, timeout=1200)
    assert result.returncode == 0, result.stderr
    accuracies = [record["knn"] for record in read_log(tmp_path) if "knn" in record]
    assert accuracies[-1] >= accuracies[0] + 5 and "collapse" not in result.stdout


# ------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@each_script
def test_a_gpu_takes_the_same_steps(script, teachers, few_digits, tmp_path):
    """The losses of three steps in fp32 are those of the CPU. In fp16 the first is near it; then steps may be left out, until the
    scale of the losses fits."""
    losses = {}
    for name, flags in {"cpu": [], "cuda": ["--device", "cuda"], "fp16": ["--device", "cuda", "--dtype", "fp16"]}.items():
        train(script, teachers, tmp_path / name, "--max_steps", 3, "--dtype", "fp32", "--no-compile", *flags)
        losses[name] = [record["loss"] for record in losses_of(tmp_path / name)]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)
    assert losses["fp16"][0] == pytest.approx(losses["cpu"][0], rel=0.03) and all(map(math.isfinite, losses["fp16"]))


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["memory", "files"])
@each_script
def test_no_step_waits_for_the_gpu(script, where, teachers, image_folder, tmp_path, monkeypatch):
    """Between two records of the log, nothing waits for the device."""
    steps_of = common.ViewLoader.steps

    def steps(self, start, stop):
        for step, views, index in steps_of(self, start, stop):
            torch.cuda.set_sync_debug_mode("error" if 10 <= step < 13 else "default")  # the first ten are logged
            yield step, views, index

    monkeypatch.setattr(common.ViewLoader, "steps", steps)
    monkeypatch.setattr(common.Run, "ends_epoch", lambda self, step, every: False)  # no checks, which wait
    flags = ["--device", "cuda", "--dtype", "bf16", "--no-compile", "--log_every", 100, "--save_every", 0, "--epochs", 10]
    if where == "files":
        flags += ["--data", image_folder, *script.on_files, "--batch_size", 8, "--num_workers", 2]
    try:
        train(script, teachers, tmp_path, *flags, "--max_steps", 14)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@each_script
def test_default_job_on_a_gpu(script, tmp_path):
    """bf16 and compiled, through torchrun's process group; stopped and resumed."""
    job = ["--standalone", "--nproc_per_node=1", f"{script.name}.py", "--num_workers", 2, "--output_dir", tmp_path]
    first = run_script("torch.distributed.run", *job, *script.default)
    assert first.returncode == 0, first.stderr
    assert "cuda, bf16" in first.stdout and re.search(script.says, first.stdout, re.DOTALL)
    more = [*script.default[:-1], script.default[-1] + 2 * ("--max_steps" in script.default)]
    second = run_script("torch.distributed.run", *job, *more, "--resume")
    assert second.returncode == 0 and "recompile_limit" not in first.stderr + second.stderr, second.stderr
    records = losses_of(tmp_path)
    assert records[-1]["step"] == torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] > 2
    assert all(math.isfinite(record["loss"]) and record["gpu_gib"] > 0 for record in records)


@pytest.mark.gpu
@pytest.mark.parametrize("command", [
    "eval_knn.py --layers all", "eval_linear.py --epochs 2 --layers all", "eval_linear.py --epochs 5 --cached",
    "eval_linear.py --epochs 2 --finetune all --mixup 0.8 --erasing 0.25"])
def test_an_evaluation_on_a_gpu(command, teachers, tmp_path):
    """In fp32 as on the CPU, and the default of bf16 and compilation near it."""
    top1 = {}
    exact = ["--dtype", "fp32"] + ["--no-compile"] * ("linear" in command)
    for name, flags in {"cpu": ["--device", "cpu", *exact], "cuda": ["--device", "cuda", *exact], "default": []}.items():
        script, *arguments = command.split()
        result = run_script(script, *arguments, *flags, "--checkpoint", teachers["backbone"], "--output_dir", tmp_path / name)
        assert result.returncode == 0, result.stderr
        rows = json.loads((tmp_path / name / "results.json").read_text())["rows"]
        top1[name] = [row.get("top-1", row.get("test_top1")) for row in rows]
    assert top1["cuda"] == pytest.approx(top1["cpu"], abs=1)
    assert top1["default"] == pytest.approx(top1["cpu"], abs=3)
