"""Shared by all tests: the import path, markers, and ways to run a script or a function as a user would."""
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tests run side by side

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("SDSSL_TEST_DATA", ROOT.parent / "shared" / "data"))  # MNIST, CIFAR-10, photographs, where present
sys.path.insert(0, str(ROOT))
FORKS = mp.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "torchvision", "timm", "sklearn.linear_model", "matplotlib.figure", "pytest"])


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--gpu", action="store_true", help="run the tests that need a CUDA device, and no others")


def pytest_configure(config):
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests on every machine
    config.addinivalue_line("markers", "slow: takes minutes; run with --slow")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "figures: looks at what is drawn")
    # deprecated calls in our own modules are errors
    modules = "common|sdssl|simdis|rrkd|ibot_rkd|d2v_kd|eval_linear|eval_knn"
    for category in ("FutureWarning", "DeprecationWarning"):
        config.addinivalue_line("filterwarnings", f"error::{category}:({modules})")


def pytest_collection_modifyitems(config, items):
    # a worker takes a file at a time: the long ones first, so that both end together
    longest = ("readme", "promises", "common", "eval_linear", "simdis", "eval_knn", "d2v_kd", "sdssl", "rrkd", "ibot_rkd")
    place = {f"test_{name}": number for number, name in enumerate(longest)}
    items.sort(key=lambda item: place.get(item.path.stem, -1))
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # pytest-xdist's own order is by the number of tests
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if config.getoption("--gpu") != ("gpu" in item.keywords):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: run with --gpu, which skips all others"))


def _blank(self, path, **options):
    """Stands in for savefig, which takes a second or two."""
    Path(path).write_bytes(b"a figure")


def _be_a_script(script, arguments, cwd, threads, outputs, figures, environment):
    """In a forked process: what `python script arguments` does, or `python -m script arguments`."""
    os.setsid()  # a signal to its group is not one to ours
    for stream, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    mp.set_start_method(None, force=True)  # for a loader's workers: the interpreter's own choice again
    os.chdir(cwd)
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    sys.path[:] = [str(cwd), *(path for path in sys.path if Path(path) not in (ROOT, ROOT / "tests"))]
    torch.set_num_threads(threads)
    if not figures:
        Figure.savefig = _blank
    if str(script).endswith(".py"):
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def start_script(script, *arguments, outputs=(os.devnull, os.devnull), cwd=ROOT, threads=1, figures=False, environment={}):
    """Starts a script as a user would -> its process. outputs: the files that take stdout and stderr.

    It is forked from a server that has imported the libraries, and none of our files, so it starts in no time.
    figures: drawn, which takes a second or two, and not only written.
    """
    arguments = [str(argument) for argument in arguments]
    process = FORKS.Process(target=_be_a_script, args=(script, arguments, cwd, threads, outputs, figures, environment))
    process.start()
    return process


def run_script(script, *arguments, processes=1, timeout=600, **options):
    """Runs a script to its end -> the finished process, with text output. Several processes are told what torchrun tells its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    started = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(processes):
            environment = {**meeting, "RANK": str(number), "LOCAL_RANK": str(number)} if processes > 1 else {}
            outputs = [f"{folder}/{name}{number}" for name in ("stdout", "stderr")]
            started.append(start_script(script, *arguments, outputs=outputs, environment=environment, **options))
        for process in started:
            process.join(timeout)
            if process.is_alive():
                process.kill()
                raise subprocess.TimeoutExpired([script, *arguments], timeout)
        output = ["".join(path.read_text(errors="replace") for path in sorted(Path(folder).glob(f"{name}*")))
                  for name in ("stdout", "stderr")]
    code = next((process.exitcode for process in started if process.exitcode), 0)
    return subprocess.CompletedProcess([script, *arguments], code, *output)


def read_log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def assert_one_line_error(result, *patterns, code=2):
    """The exit code, no traceback, and one line on stderr that says `error: ...` and matches every pattern."""
    assert result.returncode == code, (result.returncode, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr and "Traceback" not in result.stdout, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip() and "%|" not in line and "it/s" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for pattern in patterns:
        assert re.search(pattern, lines[0]), (pattern, lines[0])


def same(a, b):
    """Bit-equal nested containers of tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def leaf(*shape, seed=0, dtype=torch.float64):
    """Random numbers that want a gradient."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def finished(capsys, main):
    """`launch(main)` in this process, which must exit -> something like a finished process."""
    import common

    capsys.readouterr()
    streams = sys.stdout, sys.stderr
    with pytest.raises(SystemExit) as stopped:
        common.launch(main)
    sys.stdout, sys.stderr = streams
    return subprocess.CompletedProcess(main, stopped.value.code, *capsys.readouterr())


@pytest.fixture(autouse=True)
def signals_stay():
    """A run in this process takes over SIGTERM and SIGINT: give them back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def blank_figures(request, monkeypatch):
    """Figures are drawn where a test looks at them."""
    if "figures" not in request.keywords:
        monkeypatch.setattr(Figure, "savefig", _blank)


@pytest.fixture
def tmp_path(tmp_path):
    """pytest's own, gone after the test: together the tests write ten gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Class folders with images of several sizes, so that they are decoded by workers."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("val", 4)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (40 + i, 48, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(root / split / name / f"{i}.jpg")
    return root


def _join_and_call(number, processes, address, function, arguments, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=number, world_size=processes)
    torch.save(function(number, *arguments), f"{results}/{number}.pt")
    import common

    sys.setswitchinterval(10)  # gloo's threads get Python only where this one waits, which torch 2.6 forgets when it ends a group
    common.launch(lambda: None)


@pytest.fixture
def in_processes(tmp_path):
    """in_processes(n, function, *arguments): calls function(rank, *arguments) in n gloo processes -> list of results."""

    def call(processes, function, *arguments):
        folder = tmp_path / f"group{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        mp.start_processes(_join_and_call, (processes, f"file://{folder}/meeting", function, arguments, str(folder)), nprocs=processes,
                           start_method="forkserver")
        return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(processes)]

    return call


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of photographs, or, where there are none, of pictures with as much detail."""
    from bench import photographs

    folder = SHARED / "photos"
    if not folder.is_dir():
        folder = tmp_path_factory.mktemp("photos")
        photographs(folder, 64)
    return folder
