"""ibot_rkd.py: structures and losses against loops written from the equations, masks, promises P1 to P10, flags, attention."""
import math
from itertools import product
from unittest.mock import Mock

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import assert_one_line_error, finished, leaf, read_log
from PIL import Image
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import ibot_rkd
from ibot_rkd import angle_potential, block_masks, distance_potential, rkd_loss

TINY = ("--batch_size 16 --hidden 32 --out_dim 48 --log_every 1 --knn_every 0 --num_workers 0 --epochs 2 --warmup_epochs 0.1 "
        "--device cpu").split()
FEW = common.load_data("digits")[0].subset(torch.arange(64))
POTENTIALS = [distance_potential, angle_potential]
each_potential = pytest.mark.parametrize("potential", POTENTIALS)
each_loss = pytest.mark.parametrize("potential, kind", list(product(POTENTIALS, ["ce", "huber"])))


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    """Runs see 64 digits, four steps an epoch, and neither draw curves nor check k-NN, which take longer than their steps."""
    monkeypatch.setattr(common.Run, "draw_curves", lambda self: None)
    monkeypatch.setattr(ibot_rkd, "knn_accuracy", lambda *arguments, **options: None)
    monkeypatch.setattr(ibot_rkd, "load_data", lambda name, path: (FEW, None))


def arguments(folder, *extra):
    return ibot_rkd.parse_arguments([*TINY, "--output_dir", str(folder), *map(str, extra)])


def train(folder, *extra):
    """One run in this process -> its checkpoint."""
    ibot_rkd.train(arguments(folder, *extra))
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def first_record(folder, *flags):
    train(folder, "--max_steps", 1, *flags)
    return read_log(folder)[0]


# ------------------------------------------------------------------------------------------------- losses, Eqs. 1 to 4


def naive_distances(z):
    """Eq. 1, over the mean of the V (V - 1) pairs of different items."""
    distances = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
    return distances / (distances.sum() / (len(z) * (len(z) - 1)))


def naive_angles(z):
    """Eq. 3: [i, j, k] is the cosine at j, and 0 where two of the three are one item."""
    unit = F.normalize(z[:, None] - z, dim=-1)  # [i, j]: from j to i
    different = 1 - torch.eye(len(z), dtype=z.dtype)
    return torch.einsum("ijd,kjd->ijk", unit, unit) * different[:, :, None] * different[:, None] * different


NAIVE = {distance_potential: naive_distances, angle_potential: naive_angles}


def assert_same_value_and_gradient(ours, naive, x):
    assert_close(ours, naive, rtol=1e-8, atol=1e-10)
    gradient, = torch.autograd.grad(naive, x)
    assert gradient.abs().max() > 1e-6
    assert_close(torch.autograd.grad(ours, x)[0], gradient, rtol=1e-6, atol=1e-9)


@each_potential
def test_potentials_equal_their_equations(potential):
    """Value and gradient, through the mean distance too, for leading dims (2, 3). Rotation, translation, scale change nothing."""
    z = leaf(2, 3, 5, 7)
    ours = potential(z)
    naive = torch.stack([torch.stack([NAIVE[potential](group) for group in groups]) for groups in z])
    assert_close(ours, naive, rtol=1e-8, atol=1e-10)
    direction = torch.randn_like(ours)
    assert_same_value_and_gradient((ours * direction).sum(), (naive * direction).sum(), z)
    z = z.detach().float()
    rotation = torch.linalg.qr(torch.randn(7, 7))[0]
    for other in (z, z @ rotation, z + 30, 1e-4 * z, 1e4 * z, 0.3 * z @ rotation - torch.randn(2, 3, 1, 7)):
        assert_close(potential(other), ours.float(), rtol=1e-4, atol=1e-4)
    assert (potential(z * torch.linspace(0.5, 2, 7)) - ours).abs().max() > 0.01


def test_closed_forms():
    """Regular simplex: distances 1, angles of 60 degrees. Points on a line: 1, 2 and 3 apart; cosines of -1 and 1."""
    different = ~torch.eye(5, dtype=torch.bool)
    assert_close(distance_potential(torch.eye(5)), different.float())
    triplet = different[:, :, None] & different[:, None, :] & different[None]  # i, j, k all different
    assert_close(angle_potential(torch.eye(5)), 0.5 * triplet.float())
    line = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    assert_close(distance_potential(line), torch.tensor([[0.0, 1, 3], [1, 0, 2], [3, 2, 0]]) / 2)
    angles = angle_potential(line)
    assert [angles[0, 1, 2], angles[1, 0, 2], angles[0, 2, 1]] == pytest.approx([-1, 1, 1])
    corner = angle_potential(torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 5.0]]))  # a right angle at the middle item
    assert corner[0, 1, 2] == pytest.approx(0, abs=1e-6) and corner[0, 0, 2] == 0
    with pytest.raises(ValueError, match="potential: distance_potential or"):
        rkd_loss(line, line, torch.cdist)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coinciding_rows_are_finite(potential, kind, dtype):
    """Equal rows, all rows equal, all zero, equal but for rounding: finite values, and gradients no larger than elsewhere."""
    usual, target = leaf(5, 300, dtype=dtype), leaf(5, 300, seed=1, dtype=dtype).detach()
    z = usual.detach()
    largest = torch.autograd.grad(rkd_loss(usual, target, potential, kind), usual)[0].norm()
    cases = {"two": torch.cat([z[:3], z[:2]]), "all": z[:1].expand(5, -1), "zero": torch.zeros_like(z),
             "rounding": torch.cat([z[:3], z[:2] * (1 + 2 * torch.finfo(dtype).eps)]),
             "all, rounding": z[:1] * (1 + torch.finfo(dtype).eps * torch.arange(5, dtype=dtype)[:, None])}
    for name, rows in cases.items():
        rows = rows.clone().requires_grad_()
        assert potential(rows).isfinite().all(), name
        for student, teacher in ((rows, target), (rows, rows.detach())):
            gradient, = torch.autograd.grad(rkd_loss(student, teacher, potential, kind), rows)
            assert gradient.isfinite().all() and gradient.norm() < 100 * largest, name
    assert distance_potential(cases["two"])[0, 3] == 0
    for name in ("all", "all, rounding"):
        assert distance_potential(cases[name]).abs().max() == 0, name
    angles = angle_potential(cases["two"])
    assert angles[0, 3].abs().max() == 0 and angles[:, 3, 0].abs().max() == 0  # an end on the vertex
    assert rkd_loss(target, cases["two"], potential, kind).isfinite()  # and on the teacher's side


def naive_rows(s, t, potential, kind="ce", tau=0.1):
    """Loss of each row (or vertex) of one group (V, D)."""
    s, t = NAIVE[potential](s), NAIVE[potential](t)
    rows = []
    for r in range(len(s)):
        others = [i for i in range(len(s)) if i != r]
        if potential is distance_potential:
            a, b = -s[r], -t[r]
            distributions = [(a[others], b[others])]
        else:
            a, b = s[:, r], t[:, r]
            ends = [(i, [k for k in others if k != i]) for i in others]
            distributions = [(a[i, ks], b[i, ks]) for i, ks in ends]
        if kind == "huber":
            rows.append(F.huber_loss(a, b))
        else:
            rows.append(sum(F.cross_entropy(p / tau, (q / tau).softmax(0)) for p, q in distributions) / len(distributions))
    return torch.stack(rows)


@each_loss
@pytest.mark.parametrize("scale, width", [(1.0, 14), (30.0, 4)])
def test_rkd_loss_equals_naive_loops(potential, kind, scale, width, monkeypatch):
    """Value and gradient for groups (2, 2) and a teacher of another width, of all rows, of some, and weighted; scaling one item
    far out reaches the linear part of the Huber loss. How many groups and vertices are taken at once does not matter."""
    s, t = leaf(2, 2, 5, 7), leaf(2, 2, 5, width, seed=1)
    stretched = s * torch.tensor([scale, 1, 1, 1, 1], dtype=torch.float64)[:, None]
    of_rows = torch.stack([naive_rows(stretched[a, b], t[a, b], potential, kind, 0.2) for a, b in product(range(2), repeat=2)])
    rows = torch.tensor([[0, 3], [4, 1], [2, 0], [1, 2]])
    weights = torch.tensor([[0.5, 0.5], [1, 0], [0.3, 0.7], [0.8, 0.2]], dtype=torch.float64)
    weighted = (of_rows.gather(1, rows) * weights).sum(1).mean()
    cases = [(of_rows.mean(), None, None), (of_rows[:, 1:3].mean(), torch.tensor([1, 2]), None),
             (weighted, rows.view(2, 2, 2), weights.view(2, 2, 2))]
    for naive, rows, weights in cases:
        gradient, = torch.autograd.grad(naive, s, retain_graph=True)
        assert gradient.abs().max() > 1e-6
        for entries in (2**23, 1, 80, 400):
            monkeypatch.setattr(ibot_rkd, "ENTRIES", entries)
            ours = rkd_loss(stretched, t, potential, kind, 0.2, rows, weights)
            assert_close(ours, naive, rtol=1e-8, atol=1e-10)
            assert_close(torch.autograd.grad(ours, s, retain_graph=True)[0], gradient, rtol=1e-6, atol=1e-9)
    assert scale == 1 or (distance_potential(stretched) - distance_potential(t)).abs().max() > 1


@each_loss
def test_the_loss_is_least_where_the_structures_agree(potential, kind):
    """At a rotated, shifted, scaled copy of the teacher: no gradient, of Huber's loss 0, and more anywhere else."""
    t = leaf(2, 6, 7)
    rotation = torch.linalg.qr(leaf(7, 7, seed=3).detach())[0]
    s = (3 * t.detach() @ rotation + 1).requires_grad_()
    least = rkd_loss(s, t, potential, kind)
    gradient_s, gradient_t = torch.autograd.grad(least, (s, t), allow_unused=True)
    assert gradient_s.abs().max() < 1e-12 and gradient_t is None
    assert kind == "ce" or least < 1e-20
    for seed in range(20):
        assert rkd_loss(s + 0.05 * leaf(2, 6, 7, seed=seed), t, potential, kind) > least


def test_ibot_losses_equal_naive_loops():
    """[CLS]: all pairs of a teacher view and another student view, local crops among these. Patches: masked tokens of a view."""
    s, t, centre = leaf(5, 4, 6), leaf(2, 4, 6, seed=1).detach(), leaf(6, seed=2).detach()

    def ce(s, t, tau_s):
        return F.cross_entropy(s / tau_s, ((t - centre) / 0.07).softmax(0))

    naive = [ce(s[v, b], t[q, b], 0.2) for q in range(2) for v in range(5) if v != q for b in range(4)]
    assert_same_value_and_gradient(ibot_rkd.cls_loss(s, t, centre, 0.07, 0.2), sum(naive) / len(naive), s)
    assert_close(ibot_rkd.cls_loss(torch.zeros(2, 3, 6), torch.randn(2, 3, 6), torch.zeros(6)), torch.tensor(6.0).log())
    s, t = leaf(3, 5, 6), leaf(3, 5, 6, seed=1).detach()
    rows = torch.tensor([[0, 3], [4, 1], [2, 0]])
    weights = torch.tensor([[0.5, 0.5], [1, 0], [0.3, 0.7]], dtype=torch.float64)
    naive = [weights[p, i] * ce(s[p, rows[p, i]], t[p, rows[p, i]], 0.1) for p in range(3) for i in range(2)]
    assert_same_value_and_gradient(ibot_rkd.patch_loss(s, t, centre, rows, weights), sum(naive) / 3, s)


@pytest.mark.parametrize("relations", ["image", "batch"])
@pytest.mark.parametrize("patch_relations", ["tokens", "views"])
@pytest.mark.parametrize("name, potential", [("distance", distance_potential), ("angle", angle_potential)])
def test_what_the_items_are(relations, patch_relations, name, potential):
    """Groups of views of an image, or one group of all; tokens of a view, or its tokens side by side."""
    V, B, N, K = 4, 3, 6, 5
    s_cls, t_cls = leaf(V, B, K), leaf(V, B, K, seed=1)
    s_patch, t_patch = leaf(V * B, N, K, seed=2), leaf(V * B, N, K, seed=3)
    rows = torch.rand(V * B, N).argsort(1)[:, :3]
    weights = torch.full((V * B, 3), 1 / 3)
    losses = ibot_rkd.relational_losses(name, s_cls, t_cls, s_patch, t_patch, rows, weights, relations, patch_relations, vertices=2)

    def among_views(s, t):  # (V, B, D) each
        groups = list(zip(s.unbind(1), t.unbind(1), strict=True))
        if relations == "batch":
            groups = [(s.flatten(0, 1), t.flatten(0, 1))]
        return sum(naive_rows(*group, potential).mean() for group in groups) / len(groups)

    assert_close(losses[f"loss_{name}_cls"], among_views(s_cls, t_cls))
    if patch_relations == "views":
        expected = among_views(s_patch.reshape(V, B, N * K), t_patch.reshape(V, B, N * K))
    else:
        chosen = rows[:, :2] if name == "angle" else rows
        expected = sum(naive_rows(s_patch[p], t_patch[p], potential)[chosen[p]].mean() for p in range(V * B)) / (V * B)
    assert_close(losses[f"loss_{name}_patch"], expected)
    gradients = torch.autograd.grad(sum(losses.values()), (s_cls, s_patch, t_cls, t_patch), allow_unused=True)
    assert all(g is not None for g in gradients[:2]) and gradients[2:] == (None, None)


@each_potential
def test_losses_run_in_fp32_under_autocast(potential):
    s, t = torch.randn(2, 3, 5, 8).bfloat16()
    rows = torch.arange(5).expand(3, 5)
    centre = torch.randn(8)
    for loss in (lambda s, t: rkd_loss(s, t, potential), lambda s, t: rkd_loss(s, t, potential, "huber"),
                 lambda s, t: ibot_rkd.cls_loss(s, t, centre),
                 lambda s, t: ibot_rkd.patch_loss(s, t, centre, rows, torch.full((3, 5), 0.2))):
        with torch.autocast("cpu", torch.bfloat16):
            under = loss(s, t)
        assert under.dtype == torch.float32
        assert_close(under, loss(s.float(), t.float()), rtol=1e-6, atol=1e-6)


class Largest(TorchDispatchMode):
    """Notes the entries of the largest new tensor that any operation makes, forward and backward."""

    entries = 0

    def __torch_dispatch__(self, function, types, given=(), options=None):
        result = function(*given, **(options or {}))
        old, new = ([x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)] for tree in (given, result))
        old = {x.untyped_storage().data_ptr() for x in old}
        self.entries = max([self.entries, *(x.numel() for x in new if x.untyped_storage().data_ptr() not in old)])
        return result


@each_loss
def test_memory_is_bounded(potential, kind, monkeypatch):
    """No tensor of all angles (V^3), of all differences (V^2 * D), or of more than a few groups is made on the way."""
    monkeypatch.setattr(ibot_rkd, "ENTRIES", 2**14)
    s, t = leaf(2, 1, 64, 100, dtype=torch.float32)
    with Largest() as largest:
        rkd_loss(s, t, potential, kind).backward()
    assert 64 * 64 <= largest.entries <= 2**14  # all angles would be 16 times as many, all differences 25 times
    s, t = leaf(2, 50, 8, 300, dtype=torch.float32)
    with Largest() as largest:
        rkd_loss(s, t, potential, kind)
    assert largest.entries <= 50 * 8 * 8 * 8  # no copy of the features, 120,000 entries


# ---------------------------------------------------------------------------------------------------- masks and model


@pytest.mark.parametrize("grid", [(4, 4), (4, 6), (7, 5), (8, 8), (14, 14)])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 0.9, 1.0])
def test_masks_have_exactly_the_ratio(grid, ratio):
    """And each depends on its own numbers only."""
    N = math.prod(grid)
    u = torch.rand(300, ibot_rkd.MASK_DRAWS)
    masks = block_masks(u, grid, ratio)
    assert masks.shape == (300, N) and masks.dtype == torch.bool
    assert (masks.sum(1) == max(1, round(ratio * N))).all()
    assert all(torch.equal(block_masks(u[i : i + 1], grid, ratio)[0], masks[i]) for i in range(5))
    spread = min(ratio, 1 - ratio) / 2
    drawn = block_masks(u, grid, ratio, spread).sum(1)
    assert (drawn == (N * (ratio + spread * (2 * u[:, 0] - 1))).round().clamp(min=1)).all()
    assert spread == 0 or N * spread < 1 or len(drawn.unique()) > 1


def test_masks_are_made_of_blocks_everywhere():
    """Neighbours go together far more often than by chance; no patch is spared or always masked; another place, another mask."""
    masks = block_masks(torch.rand(2000, ibot_rkd.MASK_DRAWS), (8, 8), 0.3).view(-1, 8, 8).float()
    assert (masks[:, :, 1:] * masks[:, :, :-1]).mean() / masks.mean() > 0.65  # by chance 0.3
    assert masks.mean(0).min() > 0.03 and masks.mean(0).max() < 0.6
    assert len(masks.flatten(1).unique(dim=0)) > 1500
    single = block_masks(torch.full((1, ibot_rkd.MASK_DRAWS), 0.5), (6, 6), 0.25).view(6, 6)  # one square block in the middle
    assert single.int().sum() == 9 and single[2:5, 2:5].all()


def test_masked_rows():
    """Each view's masked tokens, every one once, in an order that the numbers decide; equal weights that sum to one."""
    masks = block_masks(torch.rand(50, ibot_rkd.MASK_DRAWS), (4, 4), 0.4, 0.3)
    counts = masks.sum(1)
    rows, weights = ibot_rkd.masked_rows(masks, torch.rand(50, 16))
    assert rows.shape == weights.shape == (50, counts.max()) and len(counts.unique()) > 2
    assert_close(weights.sum(1), torch.ones(50))
    for mask, row, weight, count in zip(masks, rows, weights, counts.tolist(), strict=True):
        assert sorted(row[:count].tolist()) == mask.nonzero()[:, 0].tolist()
        assert_close(weight[:count], torch.full((count,), 1 / count))
        assert (weight[count:] == 0).all()
    first = ibot_rkd.masked_rows(torch.ones(200, 16, dtype=torch.bool), torch.rand(200, 16))[0][:, 0]
    assert len(first.unique()) > 10


def test_head_is_a_weight_normalised_layer_on_the_unit_sphere():
    """With gains held at one: the cosines of the MLP's outputs and the last layer's rows."""
    head, x = ibot_rkd.Head(12, 16, 40), torch.randn(3, 5, 12)
    assert_close(head(x), F.cosine_similarity(head.mlp(x)[..., None, :], head.last.weight, dim=-1))


def built(*flags):
    args = arguments("unused", "--arch", "vit_nano", "--img_size", 16, "--patch_size", 4, "--drop_path", 0.1, *flags)
    torch.manual_seed(0)
    return ibot_rkd.build(args)


def test_student_and_teacher_see_what_they_should():
    """One head for [CLS] and patches; the teacher without masks and stochastic depth; local crops give [CLS] only."""
    student, teacher, _ = built()
    views, crops = list(torch.randn(2, 2, 3, 16, 16)), list(torch.randn(3, 2, 3, 8, 8))
    masks = torch.zeros(4, 16, dtype=torch.bool)
    noise = torch.rand(10, 8)
    noise[:4] = 1  # no branch of the views is dropped
    cls, patches = student(views + crops, masks, noise)
    assert cls.shape == (5, 2, 48) and patches.shape == (4, 16, 48)
    features = student.backbone.forward_features(torch.cat(views), noise=noise[:4])
    assert_close(cls[:2], student.head(features[:, 0]).view(2, 2, 48))
    assert_close(patches, student.head(features[:, 1:]))
    features = student.backbone.forward_features(torch.cat(crops), noise=noise[4:])
    assert_close(cls[2:], student.head(features[:, 0]).view(3, 2, 48))
    t_cls, t_patch, features = teacher(views)
    assert_close(t_cls[0], teacher.head(features))
    assert_close(features, teacher.backbone(views[0]))
    assert torch.equal(teacher(views)[1], t_patch)  # nothing random
    assert not torch.allclose(student(views, masks, torch.zeros(4, 8))[0], cls[:2])  # numbers below the rate drop a branch
    masks[:, 3] = True
    assert not torch.allclose(student(views, masks, noise)[0], cls[:2])
    student.backbone.mask_token.data.normal_()
    hidden = student(views, masks, noise)[1]
    for x in views:
        x[:, :, 0:4, 12:16] += 1  # patch 3 of a 4 x 4 grid
    assert_close(student(views, masks, noise)[1], hidden)


def test_teacher_is_the_ema_after_a_step(tmp_path):
    """P4: after a step teacher = m * teacher + (1 - m) * student, for every parameter; nothing is shared, and no gradient. Its
    centres, of one process (of two: `test_world_size_does_not_matter`)."""
    student, teacher, _ = built()
    cls, patches = torch.randn(2, 4, 48), torch.randn(8, 16, 48)
    for _ in range(2):
        teacher.recentre(cls, patches)
    assert_close(teacher.centre_cls, 0.19 * cls.mean((0, 1)))  # 0.9 * 0.1 + 0.1
    assert_close(teacher.centre_patch, 0.19 * patches.mean((0, 1)))
    assert not {p.data_ptr() for p in student.state_dict().values()} & {p.data_ptr() for p in teacher.state_dict().values()}
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
    assert [n for n, _ in student.named_parameters()] == [n for n, _ in teacher.named_parameters()]
    flags = ["--lr", 0.01, "--momentum", 0.9, "--potential", "none", "distance"]
    first, second = (train(tmp_path / str(steps), *flags, "--max_steps", steps) for steps in (1, 2))
    m = float(common.cosine_schedule(0.9, 1.0, 8)[1])
    for name, value in second["student"].items():
        assert_close(second["teacher"][name], m * first["teacher"][name] + (1 - m) * value, rtol=1e-6, atol=1e-7)
    moved = [name for name in second["student"] if not torch.equal(first["teacher"][name], second["teacher"][name])]
    assert any("blocks" in name for name in moved) and "backbone.mask_token" in moved


# ----------------------------------------------------------------------------------------------------------- promises


def step_of(number, *flags):
    """Losses, gradients and centres of one step on a global batch of 8 digits, from whichever share this process has."""
    recorded = {}

    def end_step(self, step, losses, **values):
        recorded.update({name: common.mean_over_processes(loss) for name, loss in losses.items()})
        parameters = self.parts["student"].parameters()
        recorded["gradients"] = torch.cat([p.grad.flatten() for p in parameters if p.requires_grad])
        recorded["centres"] = torch.cat([self.parts["teacher"].centre_cls, self.parts["teacher"].centre_patch])

    with pytest.MonkeyPatch.context() as patch:
        few_digits.__wrapped__(patch)  # the fixtures of the first process do not reach the others
        patch.setattr(common.Run, "end_step", end_step)
        ibot_rkd.train(arguments(number, "--batch_size", 8, "--freeze_last_layer", 0, "--clip_grad", 1e9, "--max_steps", 1, *flags))
    return recorded


@pytest.mark.parametrize("flags", [
    "--potential none --mask_ratio_var 0.2 --local_crops 2", "--potential distance angle",
    "--potential none distance angle --relations batch --global_views 2",
    "--potential distance angle --patch_relations views --relation_loss huber --relations batch --global_views 2"])
def test_world_size_does_not_matter(flags, in_processes, tmp_path, monkeypatch):
    """P1: two processes with 4 images each = one with 8: every term, and gradients and centres to 1e-5 of their norm."""
    monkeypatch.chdir(tmp_path)
    alone = step_of("alone", *flags.split())
    for one in in_processes(2, step_of, *flags.split()):
        assert one.keys() == alone.keys() and len(one) > 4
        for name in alone:
            assert (one[name] - alone[name]).norm() <= 1e-5 * alone[name].norm(), name


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(*flags, says=patterns): `python ibot_rkd.py` with these flags ends in one line, before anything is saved."""

    def check(*flags, says, folder=tmp_path / "refused", code=2):
        def main():
            args = arguments(folder, *flags)
            ibot_rkd.draw_attention(args) if args.attention else ibot_rkd.train(args)

        assert_one_line_error(finished(capsys, main), *says, code=code)
        assert not (tmp_path / "refused" / "checkpoint.pth").exists()

    return check


def test_bad_input_gets_one_line(tmp_path, image_folder, refused):
    """P7: what is wrong and what to do. What all scripts refuse is in test_promises.py; images and files in test_common.py."""
    refused("--img_size", 18, says=["18 x 18 is not a multiple of patch size 4"])
    refused("--patch_size", 8, says=["--patch_size 8 of --img_size 16 gives too few patches"])
    refused("--arch", "resnet18", says=["resnet18 has no patch tokens to mask", "vit_small"])
    refused("--global_views", 2, says=["--global_views 2 are too few", "needs 3"])
    refused("--potential", "angle", "--global_views", 3, says=["--global_views 3 are too few", "needs 4"])
    refused("--potential", "none", "--global_views", 1, says=["needs 2"])
    refused("--local_crops", 2, says=["--local_crops", "add none to --potential"])
    refused("--potential", "none", "--local_crops", 2, "--local_size", 9, says=["9 x 9 is not a multiple of patch size 4"])
    refused("--mask_ratio", 0, says=["--mask_ratio: 0 is not a number of at least 0.01 and at most 1"])
    refused("--mask_ratio_var", 30, says=["--mask_ratio_var: 30 is not a number"])
    refused("--relation_tau", 0, says=["argument --relation_tau: 0 is not a number"])
    torch.save(common.create_backbone("resnet18").state_dict(), tmp_path / "resnet.pth")
    photo = next((image_folder / "train" / "cat").iterdir())
    refused("--attention", photo, says=["needs a checkpoint and an image"])
    refused("--attention", tmp_path / "none.pth", photo, says=["no file"])
    refused("--attention", tmp_path / "resnet.pth", photo, "--arch", "resnet18", says=["resnet.pth is none of our ViTs"])


def test_weights_load_into_timm_and_into_another_run(tmp_path):
    """P10: the teacher's backbone, strict, with equal outputs; the checkpoint itself is plain (P8: loads here are weights_only).
    --init, of another image size too: masks and positions are those of the grid that was built; --resume goes on without it."""
    checkpoint = train(tmp_path, "--arch", "vit_tiny", "--batch_size", 8, "--max_steps", 2, "--lr", 0.05, "--momentum", 0.5)
    saved = torch.load(tmp_path / "backbone.pth", weights_only=True)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, num_classes=0)
    theirs.load_state_dict(saved, strict=True)
    ours, meta = common.load_backbone(tmp_path / "checkpoint.pth")
    assert meta["network"] == "teacher" and meta["img_size"] == 16
    x = torch.randn(2, 3, 16, 16)
    assert_close(ours(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(saved["norm.weight"], checkpoint["teacher"]["backbone.norm.weight"])
    assert not torch.equal(saved["norm.weight"], checkpoint["student"]["backbone.norm.weight"])
    train(tmp_path / "a", "--seed", 1, "--max_steps", 1)
    init = ["--init", tmp_path / "a" / "checkpoint.pth"]
    saved = torch.load(tmp_path / "a" / "backbone.pth", weights_only=True)
    for network in built(*init)[:2]:
        assert all(torch.equal(network.backbone.state_dict()[name], value) for name, value in saved.items())
    train(tmp_path / "b", "--img_size", 24, *init, "--max_steps", 1)
    content = train(tmp_path / "b", "--img_size", 24, "--resume", "--max_steps", 2)
    assert content["student"]["backbone.pos_embed"].shape[1] == 1 + 36


# --------------------------------------------------------------------------------------------------- flags and figures


def test_relational_flags_change_the_loss(tmp_path):
    choices = ["", "--relation_loss huber", "--relations batch", "--patch_relations views", "--relation_tau 0.5", "--mask_ratio 0.6",
               "--mask_ratio_var 0.2", "--drop_path 0", "--global_views 5"]
    losses = {first_record(tmp_path / f"run{choice}", "--drop_path", 0.5, *choice.split())["loss"] for choice in choices}
    assert len(losses) == len(choices)


def test_potentials_are_combined(tmp_path):
    """`--potential none distance angle` is the sum of all six terms, each of which stands alone too; chance levels likewise."""
    alone = {name: first_record(tmp_path / name, "--potential", name) for name in ("none", "distance", "angle")}
    both = first_record(tmp_path / "all", "--potential", "none", "distance", "angle")
    names = ["loss_cls", "loss_patch", "loss_distance_cls", "loss_distance_patch", "loss_angle_cls", "loss_angle_patch"]
    assert [name for name in both if name.startswith("loss_")] == names
    terms = {name: value for record in alone.values() for name, value in record.items() if name.startswith("loss_")}
    assert {name: both[name] for name in names} == pytest.approx(terms, rel=1e-5)
    assert both["loss"] == pytest.approx(sum(terms.values()), rel=1e-5)
    levels = {"none": 2 * math.log(48), "distance": math.log(3) + math.log(15), "angle": math.log(2) + math.log(14)}
    assert {name: record["chance"] for name, record in alone.items()} == pytest.approx(levels)
    assert both["chance"] == pytest.approx(sum(levels.values()))
    assert 0 <= both["accuracy"] <= 1


def test_schedules_and_clipping(tmp_path, monkeypatch):
    """Weight decay and teacher momentum rise along cosines; the patch temperature rises; the last layer waits for an epoch. The
    gradient that the optimiser sees has at most the given norm; the logged one is from before."""
    flags = ["--potential", "none", "--temp_epochs", 1, "--teacher_temp", 0.04, "--teacher_patch_temp", 0.07, "--lr", 0.1,
             "--clip_grad", 0.01]
    norms = []
    watched_loss, adamw_step = Mock(wraps=ibot_rkd.patch_loss), torch.optim.AdamW.step

    def watched_step(self, *given, **options):
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.cat(gradients).norm().item())
        return adamw_step(self, *given, **options)

    monkeypatch.setattr(ibot_rkd, "patch_loss", watched_loss)
    monkeypatch.setattr(torch.optim.AdamW, "step", watched_step)
    start, end, after = (train(tmp_path / "a", *flags, "--max_steps", steps, "--resume") for steps in (1, 4, 5))  # four an epoch
    assert [call.args[-1] for call in watched_loss.call_args_list] == pytest.approx([0.04, 0.0475, 0.055, 0.0625, 0.07])
    records = read_log(tmp_path / "a")
    assert norms == pytest.approx([0.01] * 5, rel=1e-3) and min(record["gradient_norm"] for record in records) > 0.05
    momentum = common.cosine_schedule(0.99, 1.0, 8)[:5].tolist()
    assert [record["momentum"] for record in records] == pytest.approx(momentum)
    groups = [checkpoint["optimizer"]["param_groups"] for checkpoint in (start, end, after)]
    decay = common.cosine_schedule(0.04, 0.4, 8)[[0, 3, 4]].tolist()
    assert [group[0]["weight_decay"] for group in groups] == pytest.approx(decay)
    assert all(group[1]["weight_decay"] == 0 for group in groups)
    free = train(tmp_path / "free", *flags, "--freeze_last_layer", 0, "--max_steps", 2)
    last = start["student"]["head.last.weight"]
    assert [torch.equal(last, run["student"]["head.last.weight"]) for run in (end, after, free)] == [True, False, False]
    assert not torch.equal(start["student"]["head.mlp.0.weight"], end["student"]["head.mlp.0.weight"])


def test_views_and_recipes_follow_the_paper():
    """Sec. 3.4 and METHODS of iBOT; more views with relations; global crops of 0.14-1, or from where local crops end."""

    def views(*flags):
        args = arguments("unused", "--img_size", 224, "--patch_size", 16, "--local_size", 96, *flags)
        ibot_rkd.complete(args)
        return ibot_rkd.make_views(args, ibot_rkd.RECIPES["imagenet"])

    two, four, multi = views("--potential", "none"), views(), views("--potential", "none", "distance", "--local_crops", 6)
    assert (len(two), len(four), len(multi)) == (2, 4, 10)
    assert {view.scale for view in two} == {(0.14, 1.0)} and {view.scale for view in multi[:4]} == {(0.25, 1.0)}
    assert {(view.scale, view.size, view.blur, view.solarize) for view in multi[4:]} == {((0.05, 0.25), 96, 0.5, 0.0)}
    assert [(view.blur, view.solarize) for view in two] == [(1.0, 0.0), (0.1, 0.2)]
    paper = dict(arch="vit_small", patch_size=8, img_size=32, batch_size=256, hidden=2048, out_dim=8192, lr=5e-4, momentum=0.996,
                 weight_decay=0.04, teacher_temp=0.04, teacher_patch_temp=0.07, drop_path=0.1)
    assert paper.items() <= ibot_rkd.RECIPES["cifar10"].items()
    args = ibot_rkd.parse_arguments([])
    assert (args.weight_decay_end, args.clip_grad, args.mask_ratio, args.freeze_last_layer) == (0.4, 3.0, 0.3, 1)
    for recipe in ibot_rkd.RECIPES.values():
        assert recipe.keys() | {"global_views"} == ibot_rkd.RECIPES["digits"].keys()
        assert recipe["local_size"] % recipe["patch_size"] == 0


def test_collapse_is_named(tmp_path, capsys, monkeypatch):
    """P6: a teacher whose features are one point."""
    original = ibot_rkd.Teacher.forward
    monkeypatch.setattr(ibot_rkd.Teacher, "forward", lambda self, views: (*original(self, views)[:2], torch.ones(16, 96)))
    train(tmp_path, "--max_steps", 1)
    assert "collapse at step 1" in capsys.readouterr().out and read_log(tmp_path)[0]["collapse"]


def test_attention_maps_are_those_of_cls():
    """Its row without itself, laid out as the image, which is not square; test_common.py has the softmax."""
    backbone = common.vit_nano(img_size=16, patch_size=4).eval()
    x = torch.randn(1, 3, 12, 24)
    attention = backbone.get_last_selfattention(x)  # (1, 3, 19, 19)
    assert_close(attention.sum(-1), torch.ones(1, 3, 19))
    assert_close(ibot_rkd.attention_maps(backbone, x), attention[0, :, 0, 1:].view(3, 3, 6))


@pytest.mark.figures
def test_attention_is_drawn_side_by_side(tmp_path, image_folder, refused, monkeypatch):
    """Two checkpoints, two images of different sizes that are not square, in any order; at their size, or --img_size, but large
    ones at 480 pixels, in their own proportions."""
    train(tmp_path / "a", "--max_steps", 1)
    train(tmp_path / "b", "--max_steps", 1, "--seed", 1)
    Image.new("RGB", (50, 34), (200, 10, 30)).save(tmp_path / "plain.png")
    photo = next((image_folder / "train" / "dog").glob("0.jpg"))  # 48 x 40
    files = [tmp_path / "a" / "checkpoint.pth", photo, tmp_path / "b" / "checkpoint.pth", tmp_path / "plain.png"]
    seen = []
    original = ibot_rkd.attention_maps

    def watched(backbone, x):
        seen.append(tuple(x.shape[2:]))
        return original(backbone, x) if x.shape[2] < 400 else torch.rand(3, 4, 4)

    monkeypatch.setattr(ibot_rkd, "attention_maps", watched)
    for name, extra, sizes in (("own", [], [(40, 48), (32, 48)]), ("small", ["--img_size", 16], [(16, 16), (16, 20)])):
        seen.clear()
        ibot_rkd.draw_attention(arguments(tmp_path / name, "--attention", *files, *extra))
        assert seen == 2 * sizes
        with Image.open(tmp_path / name / "attention.png") as picture:
            assert picture.size[0] / picture.size[1] == pytest.approx(5 / 4, rel=0.05)  # image, three heads, all; four lines
    refused("--attention", *files[:2], says=["attention.png already exists: pass --overwrite"], folder=tmp_path / "own")
    refused("--attention", *files[:2], "--img_size", 3, says=["0.jpg is smaller than a patch of 4 pixels"], folder=tmp_path / "tiny")
    Image.new("RGB", (1000, 700), (200, 10, 30)).save(tmp_path / "large.png")
    ibot_rkd.draw_attention(arguments(tmp_path / "own", "--attention", files[0], tmp_path / "large.png", "--overwrite"))
    assert seen[-1] == (480, 684)
    (tmp_path / "file").touch()
    refused("--attention", *files[:2], says=["file"], folder=tmp_path / "file", code=1)
