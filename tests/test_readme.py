"""README.md and .github/RESULTS.md: every command runs, at tiny size, in its order (later ones read
what earlier ones wrote); line counts, links and the sizes of both hold."""
import importlib
import re
import shlex
import shutil
import struct
import sys

import pytest
import torch
from PIL import Image
from conftest import ROOT, run_script
from test_eval_knn import make_copydays, make_davis, make_oxford

import common

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / ".github" / "RESULTS.md").read_text()


def commands_of(text):
    """The lines of its blocks that start a script."""
    commands = []
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            if re.match(r"(python|torchrun) (?!-m venv|tests/)", line):
                commands.append(line.split("  #")[0].strip())
    return commands


COMMANDS = list(dict.fromkeys(commands_of(README) + commands_of(RESULTS)))
TORCHRUN = next(command for command in COMMANDS if command.startswith("torchrun"))
METHODS = ["sdssl.py", "simdis.py", "rrkd.py", "ibot_rkd.py", "d2v_kd.py"]
STEP = ["--max_steps", "1", "--num_workers", "0", "--overwrite"]
SMALL = {
    "sdssl.py": [*STEP, "--hidden", "32", "--isd_hidden", "16"],
    "simdis.py": [*STEP, "--hidden", "32"],
    "rrkd.py": [*STEP, "--epochs", "1", "--batch_size", "8", "--no-pretrained"],
    "ibot_rkd.py": [*STEP, "--hidden", "32", "--out_dim", "64"],
    "d2v_kd.py": [*STEP, "--teacher_epochs", "1"],
    "eval_knn.py": [],
    "eval_linear.py": ["--overwrite"],
}


def make_mnist(folder):
    """80 training and 40 test images in MNIST's own format: sizes as big-endian integers, bytes."""
    folder.mkdir(parents=True)
    for split, n in (("train", 80), ("t10k", 40)):
        images = torch.randint(0, 256, (n, 28, 28))
        for name, values in (("images-idx3", images), ("labels-idx1", torch.arange(n) % 10)):
            head = struct.pack(f">{1 + values.ndim}i", 0x800 + values.ndim, *values.shape)
            content = head + values.byte().numpy().tobytes()
            (folder / f"{split}-{name}-ubyte").write_bytes(content)


@pytest.fixture(scope="module")
def places(photos, image_folder, tmp_path_factory):
    """A folder with the scripts, data under the README's placeholders, a checkpoint of ours and
    one in DINO's form."""
    root = tmp_path_factory.mktemp("readme")
    (root / "DIR").mkdir()
    few = []
    for i, path in enumerate(sorted(photos.glob("*.jpg"))[:30]):
        few.append(root / "DIR" / f"{i}.jpg")
        Image.open(path).convert("RGB").resize((96, 64)).save(few[-1])
    make_oxford(root / "roxford5k", few)
    shutil.copytree(root / "roxford5k", root / "rparis6k")
    truth = root / "rparis6k" / "gnd_roxford5k.pkl"
    truth.rename(truth.with_name("gnd_rparis6k.pkl"))
    make_copydays(root / "copydays", few, 8, 8, 0.6)
    make_davis(root / "DAVIS", few)
    make_mnist(root / "data" / "MNIST" / "raw")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, root)
    shutil.copytree(image_folder, root / "images")
    shutil.copy(image_folder / "train" / "cat" / "0.jpg", root / "photo.jpg")
    weights = common.vit_small(img_size=224, patch_size=16).state_dict()
    weights = {f"backbone.{name}": value for name, value in weights.items()}
    torch.save({"teacher": weights}, root / "dino_deitsmall16_pretrain.pth")
    trained = run_script("sdssl.py", *SMALL["sdssl.py"], "--patch_size", 8, cwd=root)
    assert trained.returncode == 0, trained.stderr
    return root


def test_the_readme_shows_commands():
    assert len(COMMANDS) >= 8 and any(command.startswith("torchrun") for command in COMMANDS)


@pytest.mark.parametrize("path", ["README.md", ".github/RESULTS.md"])
def test_links_are_there(path):
    text = (ROOT / path).read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text)
    folder = (ROOT / path).parent
    assert links and [link for link in links if not (folder / link).is_file()] == []
    blocks = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)", blocks, re.MULTILINE)
    assert len(headings) == len(set(headings))


def test_the_readme_is_short_and_counts_right():
    assert len(README.splitlines()) <= 300 and len(README.encode()) <= 17_000
    counts = re.findall(r"^\| \[`(\w+\.py)`\]\(\1\) \| ([\d,]+) \|", README, re.MULTILINE)
    assert len(counts) == 8
    for name, lines in counts:
        assert len((ROOT / name).read_text().splitlines()) == int(lines.replace(",", "")), name


def test_functions_beside_equations_are_there():
    rows = README.split("| file | equation: function |\n")[1].split("\n\n")[0].splitlines()[1:]
    assert [re.match(r"\| `(\w+\.py)`", row)[1] for row in rows] == METHODS
    for row in rows:
        script, *names = re.findall(r"`([\w.]+)`", row)
        module = importlib.import_module(script.removesuffix(".py"))
        assert names and [name for name in names if not hasattr(module, name)] == []


def test_what_the_first_command_prints_is_what_it_prints(places):
    """The lines of the README, numbers aside."""
    shown = re.search(r"that it prints:\n\n```\n(.*?)```", README, re.DOTALL)[1].splitlines()
    result = run_script("sdssl.py", "--max_steps", "2", "--output_dir", "runs/first", cwd=places)
    printed = re.sub(r"[\d.e+-]+", "0", result.stdout).splitlines()
    assert len(shown) == 6
    for line in shown:
        assert re.sub(r"[\d.e+-]+", "0", line) in printed, line


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command, places):
    if "beitv2_base" in command:
        pytest.skip("weights of 86 M parameters; test_d2v_kd.py makes and runs them with --slow")
    words = shlex.split(re.sub(r"/path/to/\S+|\bcifar10\b", str(places / "images"), command))
    processes = 2 if command == TORCHRUN else 1  # the flags of the others need no second process
    script, *flags = [word for word in words[1:] if not word.startswith("--nproc")]
    if script in METHODS and "--data" in flags:
        flags += ["--img_size", "16" if script == "rrkd.py" else "32", "--batch_size", "8"]
    elif script in METHODS and script != "ibot_rkd.py":
        flags += ["--patch_size", "8"]
    if script == "eval_linear.py" and "--cached" not in flags and "--compare" not in flags:
        flags += ["--max_steps", "1"]
    if script == "eval_linear.py" and "/path/to" in command:
        flags += ["--batch_size", "8"]
    if "--cached" in flags:
        flags += ["--epochs", "2"]
    if "torchrun" in command and script in ("sdssl.py", "ibot_rkd.py"):
        flags += ["--arch", "vit_nano"]
    if script == "simdis.py" and "torchrun" in command:
        flags += ["--arch", "vit_nano", "--teacher_arch", "vit_nano", "--patch_size", "8"]
    if "--analyze" in flags:
        flags += ["--data", str(places / "images")]
    if "dino_deitsmall16" in command:
        flags += ["--img_size", "64"]
    if script == "sdssl.py" and "--analyze" not in flags and "--resume" not in flags:
        flags += ["--output_dir", "runs/other"]  # the evaluations want the small one
    if "--task" in flags:
        ours = str(places / "runs" / "sdssl" / "checkpoint.pth")
        flags = [ours if flag == "FILE" else flag for flag in flags] + ["--img_size", "64"]
    result = run_script(script, *flags, *SMALL[script], cwd=places, processes=processes)
    assert result.returncode == 0, result.stderr


def snippet(text, word):
    """The block of Python that holds this word."""
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return next(block for block in blocks if word in block)


def test_the_backbone_loads_and_gives_features_as_shown(places, monkeypatch):
    monkeypatch.chdir(places)
    names = {"images": torch.rand(2, 3, 16, 16)}
    exec(snippet(README, "load_backbone"), names)
    assert names["features"].shape == (2, names["backbone"].embed_dim)
    torch.testing.assert_close(names["per_layer"][-1], names["features"])
    assert len(names["per_layer"]) == len(names["backbone"].layer_dims)


def test_weights_load_into_timm_as_shown(places, tmp_path, monkeypatch):
    weights = common.vit_small(img_size=224, patch_size=16).state_dict()
    (tmp_path / "runs" / "sdssl").mkdir(parents=True)
    torch.save(weights, tmp_path / "runs" / "sdssl" / "backbone.pth")
    monkeypatch.chdir(tmp_path)
    exec(snippet(README, "timm.create_model"), {})


def test_the_figure_is_drawn_from_its_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    code = snippet(RESULTS, "errorbar")
    exec(code, {})
    assert (tmp_path / "sdssl_layers.png").is_file()
    shown = re.findall(r"\[(.*?)\], \[(.*?)\].*?label=\"(.*?)\"", code)
    assert len(shown) == 2
    for means, deviations, label in shown:
        pairs = zip(means.split(", "), deviations.split(", "), strict=True)
        cells = " | ".join(f"{mean} ± {deviation}" for mean, deviation in pairs)
        for text in (README, RESULTS):
            assert re.search(rf"^\| {label} \| (3 \| )?{re.escape(cells)} \|$", text, re.MULTILINE)


@pytest.mark.parametrize("name", ["sdssl", *(
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("simdis", "rrkd", "ibot_rkd", "d2v_kd"))])
def test_results_are_one_command_that_can_be_repeated(name, tmp_path, monkeypatch, capsys):
    """tests/results.py trains and evaluates every row, prints the tables, does nothing twice."""
    import results

    commands = []

    def run(command, log, threads):
        commands.append(command)
        script, *flags = command
        monkeypatch.setattr(sys, "argv", command)
        module = importlib.import_module(script.removesuffix(".py"))
        if script in METHODS:
            monkeypatch.setattr(module, "knn_accuracy", lambda *arguments, **options: None)
            module.train(module.parse_arguments(flags))
        else:
            module.main()

    monkeypatch.setattr(results, "run", run)
    table = results.TABLES[name]
    monkeypatch.setattr(table, "measures", table.measures[:1])
    arguments = ["results.py", name, "--data", "digits", "--seeds", "0", "1", "--max_steps", "2",
                 "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    results.main()
    printed = capsys.readouterr().out
    trained = [command for command in commands if command[0] == table.script]
    assert len(trained) == 2 * len(table.rows)
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 * len(table.rows) + 3 and "±" in lines[2]
    done = len(commands)
    monkeypatch.setattr(sys, "argv", arguments)
    results.main()
    assert len(commands) == done and lines[0] in capsys.readouterr().out
