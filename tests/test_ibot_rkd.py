"""ibot_rkd.py: structures and losses against loops written from the equations, masks, the promises P1-P10, every flag, attention."""
import math
import signal

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import assert_one_line_error, finished, leaf, read_log
from torch.utils._python_dispatch import TorchDispatchMode

import common
import ibot_rkd
from ibot_rkd import angle_potential, block_masks, distance_potential, rkd_loss

TINY = ["--batch_size", "16", "--hidden", "32", "--out_dim", "48", "--log_every", "1", "--knn_every", "0", "--num_workers", "0",
        "--epochs", "2", "--warmup_epochs", "0.1"]
POTENTIALS = [distance_potential, angle_potential]


@pytest.fixture(autouse=True)
def bare_runs(monkeypatch):
    """Runs in this process draw no curves and check no k-NN, which take longer than their few steps; the subprocesses do."""
    monkeypatch.setattr(common.Run, "draw_curves", lambda self: None)
    monkeypatch.setattr(ibot_rkd, "knn_accuracy", lambda *arguments, **options: None)


DIGITS = common.load_data("digits")[0]
FEW = common.ImageData(DIGITS.labels[:64], DIGITS.classes, DIGITS.images[:64])


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    """Runs in this process see 64 digits: four steps an epoch at batch 16."""
    monkeypatch.setattr(ibot_rkd, "load_data", lambda name, path: (FEW, None) if name == "digits" else common.load_data(name, path))


def arguments(folder, *extra):
    return ibot_rkd.parse_arguments([*TINY, "--device", "cpu", "--output_dir", str(folder), *map(str, extra)])


def train(folder, *extra):
    """One run in this process -> its checkpoint."""
    ibot_rkd.train(arguments(folder, *extra))
    return torch.load(folder / "checkpoint.pth", weights_only=True)


# -------------------------------------------------------------------------------------------------- structures, Eqs. 1, 3


def naive_distances(z):
    """Eq. 1, pair by pair."""
    V = len(z)
    norms = [[(z[i] - z[j]).norm() if i != j else z.new_zeros(()) for j in range(V)] for i in range(V)]
    u = sum(norms[i][j] for i in range(V) for j in range(V) if i != j) / (V * (V - 1))
    return torch.stack([torch.stack(row) for row in norms]) / u


def naive_angles(z):
    """Eq. 3, triplet by triplet: [i, j, k] is the cosine at j."""
    V = len(z)

    def entry(i, j, k):
        if len({i, j, k}) < 3:
            return z.new_zeros(())
        a, b = z[i] - z[j], z[k] - z[j]
        return (a / a.norm()) @ (b / b.norm())

    return torch.stack([torch.stack([torch.stack([entry(i, j, k) for k in range(V)]) for j in range(V)]) for i in range(V)])


NAIVE = {distance_potential: naive_distances, angle_potential: naive_angles}


def assert_same_value_and_gradient(ours, naive, *inputs):
    ours_value, naive_value = ours(), naive()
    torch.testing.assert_close(ours_value, naive_value, rtol=1e-8, atol=1e-10)
    ours_gradient = torch.autograd.grad(ours_value, inputs)
    naive_gradient = torch.autograd.grad(naive_value, inputs)
    assert max(g.abs().max() for g in naive_gradient) > 1e-6
    torch.testing.assert_close(ours_gradient, naive_gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("potential", POTENTIALS)
def test_potentials_equal_their_equations(potential):
    """Value and gradient, the gradient through the mean distance too, for leading group dims (2, 3)."""
    z = leaf(2, 3, 5, 7)
    ours = potential(z)
    naive = torch.stack([torch.stack([NAIVE[potential](group) for group in groups]) for groups in z])
    torch.testing.assert_close(ours, naive, rtol=1e-8, atol=1e-10)
    direction = torch.randn_like(ours)
    torch.testing.assert_close(torch.autograd.grad((ours * direction).sum(), z), torch.autograd.grad((naive * direction).sum(), z))
    assert potential(z[0, 0].float()).dtype == torch.float32


def test_closed_forms():
    """Regular simplex: distances 1, angles of 60 degrees. Points on a line: 1, 2 and 3 apart; cosines of -1 and 1."""
    different = ~torch.eye(5, dtype=torch.bool)
    torch.testing.assert_close(distance_potential(torch.eye(5)), different.float())
    triplet = different[:, :, None] & different[:, None, :] & different[None]  # i, j, k all different
    torch.testing.assert_close(angle_potential(torch.eye(5)), 0.5 * triplet.float())
    line = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    torch.testing.assert_close(distance_potential(line), torch.tensor([[0.0, 1, 3], [1, 0, 2], [3, 2, 0]]) / 2)
    angles = angle_potential(line)
    assert angles[0, 1, 2] == pytest.approx(-1) and angles[1, 0, 2] == pytest.approx(1) and angles[0, 2, 1] == pytest.approx(1)
    corner = angle_potential(torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 5.0]]))  # a right angle at the middle item
    assert corner[0, 1, 2] == pytest.approx(0, abs=1e-6) and corner[0, 0, 2] == 0


@pytest.mark.parametrize("potential", POTENTIALS)
def test_structures_see_neither_rotation_nor_translation_nor_scale(potential):
    """So neither centring nor temperature of the outputs matters to them."""
    z = leaf(2, 6, 8, dtype=torch.float32).detach()
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
    expected = potential(z)
    for other in (z @ rotation, z + 30, 1e-4 * z, 1e4 * z, 0.3 * z @ rotation - torch.randn(2, 1, 8)):
        torch.testing.assert_close(potential(other), expected, rtol=1e-4, atol=1e-4)
    assert (potential(z * torch.linspace(0.5, 2, 8)) - expected).abs().max() > 0.01


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("kind", ["ce", "huber"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coinciding_rows_are_finite(potential, kind, dtype):
    """Equal rows, all rows equal, all zero, equal but for rounding: finite values, and gradients no larger than elsewhere."""
    z = leaf(5, 300, dtype=dtype).detach()
    target = leaf(5, 300, seed=1, dtype=dtype).detach()
    usual = leaf(5, 300, dtype=dtype)
    largest = torch.autograd.grad(rkd_loss(usual, target, potential, kind), usual)[0].norm()
    cases = {"two": torch.cat([z[:3], z[:2]]), "all": z[:1].expand(5, -1), "zero": torch.zeros_like(z),
             "rounding": torch.cat([z[:3], z[:2] * (1 + 2 * torch.finfo(dtype).eps)])}
    for name, rows in cases.items():
        rows = rows.clone().requires_grad_()
        structure = potential(rows)
        assert structure.isfinite().all(), name
        for student, teacher in ((rows, target), (rows, rows.detach())):
            gradient, = torch.autograd.grad(rkd_loss(student, teacher, potential, kind), rows)
            assert gradient.isfinite().all() and gradient.norm() < 100 * largest, name
    assert distance_potential(cases["two"])[0, 3] == 0 and distance_potential(cases["all"]).abs().max() == 0
    angles = angle_potential(cases["two"])
    assert angles[0, 3].abs().max() == 0 and angles[:, 3, 0].abs().max() == 0  # an end on the vertex
    assert rkd_loss(target, cases["two"], potential, kind).isfinite()  # and on the teacher's side


# --------------------------------------------------------------------------------------------------- losses, Eqs. 2, 4


def softmax(values):
    return torch.stack(values).softmax(0)


def naive_rows(s, t, potential, kind, tau):
    """Loss of each row (or vertex) of one group (V, D), entry by entry."""
    V = len(s)
    s, t = NAIVE[potential](s), NAIVE[potential](t)

    def huber(a, b):
        return 0.5 * (a - b) ** 2 if (a - b).abs() < 1 else (a - b).abs() - 0.5

    def ce(a, b):
        return -sum(p * q.log() for p, q in zip(softmax(b), softmax(a), strict=True))

    rows = []
    for r in range(V):
        if kind == "huber":
            a, b = (s[r], t[r]) if potential is distance_potential else (s[:, r], t[:, r])
            rows.append(sum(huber(x, y) for x, y in zip(a.flatten(), b.flatten(), strict=True)) / a.numel())
        elif potential is distance_potential:
            others = [j for j in range(V) if j != r]
            rows.append(ce([-s[r, j] / tau for j in others], [-t[r, j] / tau for j in others]))
        else:
            pairs = [([s[i, r, k] / tau for k in range(V) if k not in (i, r)], [t[i, r, k] / tau for k in range(V) if k not in (i, r)])
                     for i in range(V) if i != r]
            rows.append(sum(ce(a, b) for a, b in pairs) / len(pairs))
    return torch.stack(rows)


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("kind", ["ce", "huber"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_rkd_loss_equals_naive_loops(potential, kind, scale):
    """Value and gradient for groups (2, 2); scaling one item far out reaches the linear part of the Huber loss."""
    s, t = leaf(2, 2, 5, 7), leaf(2, 2, 5, 7, seed=1).detach()
    stretch = torch.tensor([scale, 1, 1, 1, 1], dtype=torch.float64)[:, None]
    assert_same_value_and_gradient(
        lambda: rkd_loss(s * stretch, t, potential, kind, 0.2),
        lambda: sum(naive_rows(s[a, b] * stretch, t[a, b], potential, kind, 0.2).mean() for a in range(2) for b in range(2)) / 4, s)
    assert potential is angle_potential or scale == 1 or (distance_potential(s * stretch) - distance_potential(t)).abs().max() > 1


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("kind", ["ce", "huber"])
def test_rows_choose_and_weights_weigh(potential, kind):
    s, t = leaf(3, 5, 7), leaf(3, 5, 7, seed=1).detach()
    rows, weights = torch.tensor([[0, 3], [4, 1], [2, 0]]), torch.tensor([[0.5, 0.5], [1, 0], [0.3, 0.7]], dtype=torch.float64)

    def naive():
        return sum((naive_rows(a, b, potential, kind, 0.1)[r] * w).sum() for a, b, r, w in zip(s, t, rows, weights, strict=True)) / 3

    assert_same_value_and_gradient(lambda: rkd_loss(s, t, potential, kind, rows=rows, weights=weights), naive, s)
    torch.testing.assert_close(rkd_loss(s, t, potential, kind, rows=torch.tensor([1, 2])),
                               sum(naive_rows(a, b, potential, kind, 0.1)[1:3].mean() for a, b in zip(s, t, strict=True)) / 3)


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("kind", ["ce", "huber"])
def test_a_few_at_a_time_is_the_same(potential, kind, monkeypatch):
    """The loss and its gradient do not depend on how many groups and vertices are taken at once."""
    s, t = leaf(6, 5, 7), leaf(6, 5, 7, seed=1)
    whole = rkd_loss(s, t, potential, kind)
    expected = torch.autograd.grad(whole, s)
    for entries in (1, 80, 400):
        monkeypatch.setattr(ibot_rkd, "ENTRIES", entries)
        part = rkd_loss(s, t, potential, kind)
        torch.testing.assert_close(part, whole)
        torch.testing.assert_close(torch.autograd.grad(part, s), expected)


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("kind", ["ce", "huber"])
def test_the_loss_is_least_where_the_structures_agree(potential, kind):
    """At a rotated, shifted, scaled copy of the teacher: no gradient, the target's entropy (Huber: 0), and more anywhere else."""
    t = leaf(2, 6, 7)
    rotation = torch.linalg.qr(leaf(7, 7, seed=3).detach())[0]
    s = (3 * t.detach() @ rotation + 1).requires_grad_()
    least = rkd_loss(s, t, potential, kind)
    gradient_s, gradient_t = torch.autograd.grad(least, (s, t), allow_unused=True)
    assert gradient_s.abs().max() < 1e-12 and gradient_t is None
    if kind == "huber":
        assert least < 1e-20
    elif potential is distance_potential:
        p = (-distance_potential(t) / 0.1).masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf).softmax(-1)
        torch.testing.assert_close(least, -torch.special.xlogy(p, p).sum(-1).mean())
    for seed in range(20):
        assert rkd_loss(s + 0.05 * leaf(2, 6, 7, seed=seed), t, potential, kind) > least


def test_cls_loss_pairs_different_views():
    """iBOT: all pairs of a teacher view and another student view, local crops among these; centred and sharpened targets."""
    s, t, centre = leaf(5, 4, 6), leaf(2, 4, 6, seed=1), leaf(6, seed=2).detach()

    def naive():
        pairs = [(q, v) for q in range(2) for v in range(5) if v != q]
        return sum(-(((t[q, b] - centre) / 0.07).softmax(0) * (s[v, b] / 0.2).log_softmax(0)).sum() for q, v in pairs for b in range(4)) / (4 * len(pairs))

    t = t.detach()
    assert_same_value_and_gradient(lambda: ibot_rkd.cls_loss(s, t, centre, 0.2, 0.07), naive, s)
    torch.testing.assert_close(ibot_rkd.cls_loss(torch.zeros(2, 3, 6), torch.randn(2, 3, 6), torch.zeros(6)), torch.tensor(6.0).log())


def test_patch_loss_averages_over_masked_tokens_of_a_view():
    s, t, centre = leaf(3, 2, 6), leaf(3, 2, 6, seed=1).detach(), leaf(6, seed=2).detach()
    weights = torch.tensor([[0.5, 0.5], [1, 0], [0.5, 0.5]], dtype=torch.float64)

    def naive():
        return sum(-weights[p, i] * (((t[p, i] - centre) / 0.07).softmax(0) * (s[p, i] / 0.1).log_softmax(0)).sum()
                   for p in range(3) for i in range(2)) / 3

    assert_same_value_and_gradient(lambda: ibot_rkd.patch_loss(s, t, centre, weights), naive, s)


@pytest.mark.parametrize("relations", ["image", "batch"])
@pytest.mark.parametrize("patch_relations", ["tokens", "views"])
@pytest.mark.parametrize("name", ["distance", "angle"])
def test_what_the_items_are(relations, patch_relations, name):
    """Groups of views of an image, or one group of all; tokens of a view, or its tokens side by side."""
    V, B, N, K = 4, 3, 6, 5
    s_cls, t_cls, s_patch, t_patch = leaf(V, B, K), leaf(V, B, K, seed=1), leaf(V * B, N, K, seed=2), leaf(V * B, N, K, seed=3)
    masks = torch.zeros(V * B, N, dtype=torch.bool).scatter_(1, torch.rand(V * B, N).argsort(1)[:, :3], True)
    rows, weights = ibot_rkd.masked_rows(masks, torch.rand(V * B, N))
    losses = ibot_rkd.relational_losses(name, s_cls, t_cls, s_patch, t_patch, rows, weights, relations, patch_relations, vertices=2)
    potential = {"distance": distance_potential, "angle": angle_potential}[name]

    def among_views(s, t):
        groups = [[(v, b) for v in range(V)] for b in range(B)] if relations == "image" else [[(v, b) for v in range(V) for b in range(B)]]
        return sum(naive_rows(*(torch.stack([x[v, b] for v, b in group]) for x in (s, t)), potential, "ce", 0.1).mean() for group in groups) / len(groups)

    torch.testing.assert_close(losses[f"loss_{name}_cls"], among_views(s_cls, t_cls))
    if patch_relations == "views":
        expected = among_views(s_patch.reshape(V, B, N * K), t_patch.reshape(V, B, N * K))
    else:
        chosen = rows[:, :2] if name == "angle" else rows
        expected = sum(naive_rows(s, t, potential, "ce", 0.1)[r].mean() for s, t, r in zip(s_patch, t_patch, chosen, strict=True)) / (V * B)
    torch.testing.assert_close(losses[f"loss_{name}_patch"], expected)
    gradients = torch.autograd.grad(sum(losses.values()), (s_cls, s_patch, t_cls, t_patch), allow_unused=True)
    assert all(g is not None for g in gradients[:2]) and gradients[2:] == (None, None)


@pytest.mark.parametrize("potential", POTENTIALS)
def test_losses_run_in_fp32_under_autocast(potential):
    s, t = torch.randn(3, 5, 8).bfloat16(), torch.randn(3, 5, 8).bfloat16()
    weights, centre = torch.full((3, 5), 0.2), torch.randn(8)
    for loss in (lambda s, t: rkd_loss(s, t, potential), lambda s, t: rkd_loss(s, t, potential, "huber"),
                 lambda s, t: ibot_rkd.cls_loss(s, t, centre), lambda s, t: ibot_rkd.patch_loss(s, t, centre, weights)):
        with torch.autocast("cpu", torch.bfloat16):
            under = loss(s, t)
        assert under.dtype == torch.float32
        torch.testing.assert_close(under, loss(s.float(), t.float()), rtol=1e-6, atol=1e-6)


class Largest(TorchDispatchMode):
    """Notes the entries of the largest new tensor that any operation makes, forward and backward."""

    entries = 0

    def __torch_dispatch__(self, function, types, given=(), options=None):
        result = function(*given, **(options or {}))
        old = {x.untyped_storage().data_ptr() for x in given if isinstance(x, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in old:
                self.entries = max(self.entries, tensor.numel())
        return result


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("kind", ["ce", "huber"])
def test_memory_is_bounded(potential, kind, monkeypatch):
    """No tensor of all angles (V^3), of all differences (V^2 * D), or of more than a few groups is made on the way."""
    monkeypatch.setattr(ibot_rkd, "ENTRIES", 2**14)
    s, t = leaf(1, 64, 100, dtype=torch.float32), leaf(1, 64, 100, seed=1, dtype=torch.float32)
    with Largest() as largest:
        rkd_loss(s, t, potential, kind).backward()
    assert 64 * 64 <= largest.entries <= 2**14  # all angles would be 16 times as many, all differences 25 times
    s, t = leaf(50, 8, 300, dtype=torch.float32), leaf(50, 8, 300, seed=1, dtype=torch.float32)
    with Largest() as largest:
        rkd_loss(s, t, potential, kind)
    assert largest.entries <= 50 * 8 * 8 * 8  # no copy of the features, 120,000 entries


# -------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("grid", [(4, 4), (4, 6), (7, 5), (8, 8), (14, 14)])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 0.9, 1.0])
def test_masks_have_exactly_the_ratio(grid, ratio):
    N = grid[0] * grid[1]
    u = torch.rand(300, ibot_rkd.MASK_DRAWS)
    masks = block_masks(u, grid, ratio)
    assert masks.shape == (300, N) and masks.dtype == torch.bool
    assert (masks.sum(1) == max(1, round(ratio * N))).all()
    spread = min(ratio, 1 - ratio) / 2
    drawn = block_masks(u, grid, ratio, spread).sum(1)
    expected = (N * (ratio + spread * (2 * u[:, 0] - 1))).round().clamp(min=1)
    assert (drawn == expected).all() and (spread == 0 or N * spread < 1 or len(drawn.unique()) > 1)


def test_masks_are_made_of_blocks_everywhere():
    """Neighbours go together far more often than by chance; no patch is spared or always masked; another place, another mask."""
    masks = block_masks(torch.rand(2000, ibot_rkd.MASK_DRAWS), (8, 8), 0.3).view(-1, 8, 8).float()
    together = (masks[:, :, 1:] * masks[:, :, :-1]).mean() / masks.mean()
    assert together > 0.65  # by chance 0.3
    assert masks.mean(0).min() > 0.03 and masks.mean(0).max() < 0.6
    assert len(masks.flatten(1).unique(dim=0)) > 1500
    single = block_masks(torch.full((1, ibot_rkd.MASK_DRAWS), 0.5), (6, 6), 0.25).view(6, 6)  # one square block in the middle
    assert single.int().sum() == 9 and single[2:5, 2:5].all()


def test_a_mask_depends_on_its_own_numbers_only():
    u = torch.rand(20, ibot_rkd.MASK_DRAWS)
    masks = block_masks(u, (5, 5), 0.4)
    assert all(torch.equal(block_masks(u[i : i + 1], (5, 5), 0.4)[0], masks[i]) for i in range(20))


def test_masked_rows():
    """Each view's masked tokens, every one once, in an order that the numbers decide; equal weights that sum to one."""
    masks = block_masks(torch.rand(50, ibot_rkd.MASK_DRAWS), (4, 4), 0.4, 0.3)
    counts = masks.sum(1)
    rows, weights = ibot_rkd.masked_rows(masks, torch.rand(50, 16))
    assert rows.shape == weights.shape == (50, counts.max()) and len(counts.unique()) > 2
    torch.testing.assert_close(weights.sum(1), torch.ones(50))
    for mask, row, weight, count in zip(masks, rows, weights, counts, strict=True):
        assert sorted(row[:count].tolist()) == mask.nonzero()[:, 0].tolist()
        torch.testing.assert_close(weight[:count], torch.full((int(count),), 1 / int(count)))
        assert (weight[count:] == 0).all()
    full = torch.ones(200, 16, dtype=torch.bool)
    first = ibot_rkd.masked_rows(full, torch.rand(200, 16))[0][:, 0]
    assert len(first.unique()) > 10


# -------------------------------------------------------------------------------------------------------------- model


def test_head_is_a_weight_normalised_layer_on_the_unit_sphere():
    """The last layer equals torch's weight_norm with its gains held at one."""
    head = ibot_rkd.Head(12, 16, 40)
    reference = nn.utils.parametrizations.weight_norm(nn.Linear(256, 40, bias=False))
    reference.parametrizations.weight.original0.data.fill_(1)
    reference.parametrizations.weight.original1.data.copy_(head.last.weight)
    x = torch.randn(3, 5, 12)
    torch.testing.assert_close(head(x), reference(F.normalize(head.mlp(x), dim=-1)))
    assert head(x).abs().max() <= 1 + 1e-6


def built(*flags):
    args = arguments("unused", "--arch", "vit_nano", "--img_size", 16, "--patch_size", 4, "--drop_path", 0.1, *flags)
    torch.manual_seed(0)
    return ibot_rkd.build(args)


def test_student_and_teacher_see_what_they_should():
    """One head for [CLS] and patches; the teacher without masks and stochastic depth; local crops give [CLS] only."""
    student, teacher, _ = built()
    x, crops, masks, noise = torch.randn(4, 3, 16, 16), torch.randn(6, 3, 8, 8), torch.zeros(4, 16, dtype=torch.bool), torch.ones(10, 8)
    cls, patches = student(x, masks, noise, crops)
    assert cls.shape == (10, 48) and patches.shape == (4, 16, 48)
    torch.testing.assert_close(torch.cat([cls[:4, None], patches], 1)[:, :1], student(x, masks, noise)[0][:, None])
    t_cls, t_patch, features = teacher(x)
    torch.testing.assert_close(t_cls, teacher.head(features))
    torch.testing.assert_close(features, teacher.backbone(x))
    assert torch.equal(teacher(x)[1], t_patch)  # nothing random
    dropped = student(x, masks, torch.zeros(10, 8))[0]
    assert not torch.allclose(dropped, cls[:4])  # numbers below the rate drop a branch
    masks[:, 3] = True
    assert not torch.allclose(student(x, masks, noise)[0], cls[:4])
    student.backbone.mask_token.data.normal_()
    one = student(x, masks, noise)[1]
    x[:, :, 0:4, 12:16] += 1  # patch 3 of a 4 x 4 grid
    torch.testing.assert_close(student(x, masks, noise)[1], one)  # hidden


def test_teacher_shares_nothing_and_gets_no_gradient():
    """P4."""
    student, teacher, _ = built()
    assert not {p.data_ptr() for p in student.state_dict().values()} & {p.data_ptr() for p in teacher.state_dict().values()}
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
    assert [n for n, _ in student.named_parameters()] == [n for n, _ in teacher.named_parameters()]


def test_teacher_is_the_ema_after_a_step(tmp_path):
    """P4: after a step teacher = m * teacher + (1 - m) * student, for every parameter."""
    flags = ["--lr", 0.01, "--momentum", 0.9, "--potential", "none", "distance"]
    first = train(tmp_path / "one", *flags, "--max_steps", 1)
    second = train(tmp_path / "two", *flags, "--max_steps", 2)
    m = float(common.cosine_schedule(0.9, 1.0, 8)[1])
    for name, value in second["student"].items():
        torch.testing.assert_close(second["teacher"][name], m * first["teacher"][name] + (1 - m) * value, rtol=1e-6, atol=1e-7)
    moved = [name for name in second["student"] if not torch.equal(first["teacher"][name], second["teacher"][name])]
    assert any("blocks" in name for name in moved) and "backbone.mask_token" in moved


def recentre(number, processes):
    teacher = built()[1]
    cls, patches = (leaf(*shape, seed=5).detach().float() for shape in ((8, 48), (8, 16, 48)))
    share = slice(number * 8 // processes, (number + 1) * 8 // processes)
    for _ in range(2):
        teacher.recentre(cls[share], patches[share])
    return {"cls": teacher.centre_cls, "patch": teacher.centre_patch}


def test_centres_equal_their_definition_across_processes(in_processes):
    cls, patches = (leaf(*shape, seed=5).detach().float() for shape in ((8, 48), (8, 16, 48)))
    expected = {"cls": 0.19 * cls.mean(0), "patch": 0.19 * patches.mean((0, 1))}  # 0.9 * 0.1 + 0.1
    for centres in (recentre(0, 1), *in_processes(2, recentre, 2)):
        for name, value in expected.items():
            torch.testing.assert_close(centres[name], value, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------------------------------- P1: several processes


def step_gradients(number, *flags):
    """Losses and gradients of one step on a global batch of 8 digits, from whichever share this process has."""
    recorded = {}

    class Stop(Exception):
        pass

    def halt(self, step, losses):
        recorded.update({name: common.mean_over_processes(loss) for name, loss in losses.items()})
        raise Stop

    args = ibot_rkd.parse_arguments([*TINY, "--device", "cpu", "--batch_size", "8", "--freeze_last_layer", "0", "--clip_grad", "1e9",
                                     "--max_steps", "1", "--overwrite", "--output_dir", f"{number}", *flags])
    gradients = {}
    original = nn.utils.clip_grad_norm_

    def keep(parameters, largest):
        gradients["all"] = torch.cat([p.grad.flatten() for p in parameters if p.requires_grad])
        return gradients["all"].norm()

    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    knn, watch, load = ibot_rkd.knn_accuracy, common.Run.watch, ibot_rkd.load_data
    nn.utils.clip_grad_norm_, ibot_rkd.knn_accuracy, common.Run.watch = keep, lambda *a, **k: None, halt
    ibot_rkd.load_data = lambda name, path: (FEW, None)  # the fixtures of this process do not reach the others
    try:
        ibot_rkd.train(args)
    except Stop:
        pass
    finally:
        nn.utils.clip_grad_norm_, ibot_rkd.knn_accuracy, common.Run.watch, ibot_rkd.load_data = original, knn, watch, load
        for n, handler in zip((signal.SIGTERM, signal.SIGINT), handlers, strict=True):
            signal.signal(n, handler)
    return {**recorded, "gradients": gradients["all"]}


SETTINGS = [["--potential", "none", "--mask_ratio_var", "0.2", "--local_crops", "2"], ["--potential", "distance", "angle"],
            ["--potential", "none", "distance", "angle", "--relations", "batch", "--global_views", "2"],
            ["--potential", "distance", "angle", "--relations", "batch", "--patch_relations", "views", "--relation_loss", "huber", "--global_views", "2"]]


@pytest.mark.parametrize("flags", SETTINGS, ids=lambda flags: " ".join(flags).replace("--", ""))
def test_world_size_does_not_matter(flags, in_processes, tmp_path, monkeypatch):
    """P1: two processes with 4 images each = one with 8: every term, and the gradient to 1e-5 of its norm."""
    monkeypatch.chdir(tmp_path)
    alone = step_gradients(0, *flags)
    for one in in_processes(2, step_gradients, *flags):
        assert one.keys() == alone.keys() and len(one) > 3
        for name in alone.keys() - {"gradients"}:
            torch.testing.assert_close(one[name], alone[name], rtol=1e-5, atol=0)
        assert (one["gradients"] - alone["gradients"]).norm() / alone["gradients"].norm() < 1e-5


# ------------------------------------------------------------------------------------------------------ P7: bad input


def run_in_process(capsys, *flags):
    """main() as `python ibot_rkd.py` calls it -> something like a finished process."""

    def main():
        args = ibot_rkd.parse_arguments([*TINY, "--device", "cpu", *map(str, flags)])
        ibot_rkd.draw_attention(args) if args.attention else ibot_rkd.train(args)

    return finished(capsys, main)


def test_bad_input_gets_one_line(tmp_path, capsys, image_folder):
    """P7: what is wrong and what to do, exit code 2."""

    def check(*flags, says):
        assert_one_line_error(run_in_process(capsys, "--output_dir", tmp_path / "run", *flags), *says)

    nano = ["--arch", "vit_nano", "--img_size", 32, "--patch_size", 8]
    check("--data", tmp_path / "nowhere", says=["nowhere is neither a directory nor one of"])
    (tmp_path / "empty").mkdir()
    check("--data", tmp_path / "empty", says=["no images under"])
    check("--data", image_folder, *nano, "--batch_size", 100, says=["24 images are fewer than --batch_size 100"])
    check("--img_size", 18, says=["18 x 18 is not a multiple of patch size 4"])
    check("--patch_size", 8, says=["--patch_size 8 of --img_size 16 gives too few patches"])
    check("--arch", "vit_giant", says=["unknown --arch vit_giant"])
    check("--arch", "resnet18", says=["resnet18 has no patch tokens to mask", "vit_small"])
    check("--global_views", 2, says=["--global_views 2 are too few", "needs 3"])
    check("--potential", "angle", "--global_views", 3, says=["--global_views 3 are too few", "needs 4"])
    check("--potential", "none", "--global_views", 1, says=["needs 2"])
    check("--local_crops", 2, says=["--local_crops", "add none to --potential"])
    check("--potential", "none", "--local_crops", 2, "--local_size", 9, says=["--local_size 9", "--patch_size 4"])
    check("--mask_ratio", 0, says=["mask 0 to 0 of the patches"])
    check("--mask_ratio", 0.9, "--mask_ratio_var", 0.2, says=["mask 0.7 to 1.1 of the patches"])
    check("--relation_tau", 0, says=["argument --relation_tau: 0 is not a number"])
    check("--angle_vertices", 0, says=["--angle_vertices"])

    (tmp_path / "cut").mkdir()
    photo = next((image_folder / "train" / "cat").iterdir()).read_bytes()
    for i in range(8):
        (tmp_path / "cut" / f"{i}.jpg").write_bytes(photo if i != 5 else photo[: len(photo) // 2])
    check("--data", tmp_path / "cut", *nano, "--batch_size", 8, says=[r"cannot read image \S*cut/5.jpg"])

    (tmp_path / "not.pth").write_text("not a checkpoint")
    check("--init", tmp_path / "not.pth", says=["not a PyTorch checkpoint"])
    torch.save(common.vit_tiny(img_size=16, patch_size=4, depth=4).state_dict(), tmp_path / "tiny.pth")
    check("--init", tmp_path / "tiny.pth", says=["does not fit this architecture", "--arch"])
    picture = next((image_folder / "train" / "cat").iterdir())
    check("--attention", picture, says=["at least one checkpoint and one image"])
    check("--attention", tmp_path / "none.pth", picture, says=["no file"])
    assert not (tmp_path / "run" / "checkpoint.pth").exists()


# --------------------------------------------------------------------------------------------- P8, P10: what is saved


def test_backbone_loads_into_timm(tmp_path):
    """P10: the teacher's backbone, strict, with equal outputs; the checkpoint itself is plain (P8: loads here are weights_only)."""
    import timm

    checkpoint = train(tmp_path, "--arch", "vit_tiny", "--max_steps", 2, "--batch_size", 8, "--lr", 0.05, "--momentum", 0.5)
    saved = torch.load(tmp_path / "backbone.pth", weights_only=True)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, num_classes=0)
    theirs.load_state_dict(saved, strict=True)
    ours, meta = common.load_backbone(tmp_path / "checkpoint.pth")
    assert meta["network"] == "teacher" and meta["img_size"] == 16
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(saved["norm.weight"], checkpoint["teacher"]["backbone.norm.weight"])
    assert not torch.equal(saved["norm.weight"], checkpoint["student"]["backbone.norm.weight"])


def test_init_starts_from_weights(tmp_path):
    train(tmp_path / "a", "--max_steps", 1)
    student, teacher, _ = built("--init", tmp_path / "a" / "checkpoint.pth")
    saved = torch.load(tmp_path / "a" / "backbone.pth", weights_only=True)
    for network in (student, teacher):
        assert all(torch.equal(network.backbone.state_dict()[name], value) for name, value in saved.items())


# ----------------------------------------------------------------------------------------------------- flags, recipes


@pytest.mark.parametrize("flags", [["--relation_loss", "huber"], ["--relations", "batch"], ["--patch_relations", "views"],
                                   ["--relation_tau", 0.5], ["--mask_ratio", 0.6], ["--mask_ratio_var", 0.2], ["--drop_path", 0],
                                   ["--global_views", 5]], ids=str)
def test_relational_flags_change_the_loss(flags, tmp_path):
    usual = first_record(tmp_path / "usual", "--drop_path", 0.5)
    assert first_record(tmp_path / "other", "--drop_path", 0.5, *flags)["loss"] != usual["loss"]


def first_record(folder, *flags):
    train(folder, "--max_steps", 1, *flags)
    return read_log(folder)[0]


def test_potentials_are_combined(tmp_path):
    """`--potential none distance angle` is the sum of all six terms, each of which stands alone too; chance levels likewise."""
    flags = ["--global_views", 4]
    alone = {name: first_record(tmp_path / name, "--potential", name, *flags) for name in ("none", "distance", "angle")}
    both = first_record(tmp_path / "all", "--potential", "none", "distance", "angle", *flags)
    names = ["loss_cls", "loss_patch", "loss_distance_cls", "loss_distance_patch", "loss_angle_cls", "loss_angle_patch"]
    assert [name for name in both if name.startswith("loss_")] == names
    terms = {name: value for record in alone.values() for name, value in record.items() if name.startswith("loss_")}
    assert {name: both[name] for name in names} == pytest.approx(terms, rel=1e-5)
    assert both["loss"] == pytest.approx(sum(terms.values()), rel=1e-5)
    assert both["chance"] == pytest.approx(sum(record["chance"] for record in alone.values()))
    assert alone["none"]["chance"] == pytest.approx(2 * math.log(48))
    assert alone["distance"]["chance"] == pytest.approx(math.log(3) + math.log(15))
    assert alone["angle"]["chance"] == pytest.approx(math.log(2) + math.log(14))
    assert 0 <= both["accuracy"] <= 1


def test_schedules(tmp_path):
    """Weight decay and teacher momentum rise along cosines; the patch temperature rises; the last layer waits for an epoch."""
    steps, per_epoch = 8, 4
    flags = ["--potential", "none", "--temp_epochs", 1, "--teacher_temp", 0.04, "--teacher_patch_temp", 0.07, "--lr", 0.1]
    seen = []
    original = ibot_rkd.patch_loss
    ibot_rkd.patch_loss = lambda *given: seen.append(given[-1]) or original(*given)
    try:
        start = train(tmp_path / "a", *flags, "--max_steps", 1)
        end = train(tmp_path / "a", *flags, "--max_steps", per_epoch, "--resume")
        after = train(tmp_path / "a", *flags, "--max_steps", per_epoch + 1, "--resume")
    finally:
        ibot_rkd.patch_loss = original
    assert seen == pytest.approx([0.04, 0.0475, 0.055, 0.0625, 0.07])
    last = "head.last.weight"
    assert torch.equal(start["student"][last], end["student"][last]) and not torch.equal(end["student"][last], after["student"][last])
    assert not torch.equal(start["student"]["head.mlp.0.weight"], end["student"]["head.mlp.0.weight"])
    decay = common.cosine_schedule(0.04, 0.4, steps)
    groups = [checkpoint["optimizer"]["param_groups"] for checkpoint in (start, end, after)]
    assert [group[0]["weight_decay"] for group in groups] == pytest.approx([decay[0], decay[per_epoch - 1], decay[per_epoch]])
    assert all(group[1]["weight_decay"] == 0 for group in groups)
    free = train(tmp_path / "free", *flags, "--freeze_last_layer", 0, "--max_steps", 2)
    assert not torch.equal(free["student"][last], start["student"][last])


def test_clipping(tmp_path):
    """The gradient that the optimiser sees has at most the given norm; the logged one is from before."""
    seen = []
    step = torch.optim.AdamW.step

    def watched(self, *given, **options):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.append(torch.stack([g.norm() for g in gradients]).norm().item())
        return step(self, *given, **options)

    torch.optim.AdamW.step = watched
    try:
        record = first_record(tmp_path / "a", "--clip_grad", 0.01)
        assert seen[-1] == pytest.approx(0.01, rel=1e-3) and record["gradient_norm"] > 0.1
    finally:
        torch.optim.AdamW.step = step


def test_views_follow_the_flags():
    """The paper: more views with relations; global crops of 0.14-1, or from where local crops end."""
    recipe = ibot_rkd.RECIPES["imagenet"]

    def views(*flags):
        args = arguments("unused", "--img_size", 224, "--patch_size", 16, "--local_size", 96, "--teacher_temp", 0.04, "--teacher_patch_temp", 0.07,
                         *flags)
        ibot_rkd.complete(args)
        return ibot_rkd.make_views(args, recipe)

    two, four, multi = views("--potential", "none"), views(), views("--potential", "none", "distance", "--local_crops", 6)
    assert (len(two), len(four), len(multi)) == (2, 4, 10)
    assert {view.scale for view in two} == {(0.14, 1.0)} and {view.scale for view in multi[:4]} == {(0.25, 1.0)}
    assert {(view.scale, view.size, view.blur, view.solarize) for view in multi[4:]} == {((0.05, 0.25), 96, 0.5, 0.0)}
    assert [(view.blur, view.solarize) for view in two] == [(1.0, 0.0), (0.1, 0.2)]


def test_recipes_follow_the_paper():
    """Sec. 3.4 and METHODS of iBOT: ViT-S/8 on 32 pixels, batch 256, head 2048 and 8192, lr 5e-4, momentum 0.996, decay 0.04 to 0.4."""
    paper, args = ibot_rkd.RECIPES["cifar10"], ibot_rkd.parse_arguments([])
    assert (paper["arch"], paper["patch_size"], paper["img_size"], paper["batch_size"]) == ("vit_small", 8, 32, 256)
    assert (paper["hidden"], paper["out_dim"], paper["lr"], paper["momentum"], paper["weight_decay"]) == (2048, 8192, 5e-4, 0.996, 0.04)
    assert (args.weight_decay_end, args.clip_grad, args.mask_ratio, args.freeze_last_layer) == (0.4, 3.0, 0.3, 1)
    assert (args.student_temp, paper["teacher_temp"], paper["teacher_patch_temp"], paper["drop_path"]) == (0.1, 0.04, 0.07, 0.1)
    assert all(recipe.keys() == paper.keys() for recipe in ibot_rkd.RECIPES.values())
    assert all(recipe["local_size"] % recipe["patch_size"] == 0 for recipe in ibot_rkd.RECIPES.values())


def test_collapse_is_named(tmp_path, capsys, monkeypatch):
    """P6: a teacher whose features are one point."""
    original = ibot_rkd.Teacher.forward

    def collapsed(self, x):
        cls, patches, features = original(self, x)
        return cls, patches, features * 0 + 1

    monkeypatch.setattr(ibot_rkd.Teacher, "forward", collapsed)
    train(tmp_path, "--max_steps", 1)
    assert "collapse at step 1" in capsys.readouterr().out and read_log(tmp_path)[0]["collapse"]


# ---------------------------------------------------------------------------------------------------------- attention


def test_attention_equals_the_explicit_softmax():
    """Rows sum to one; the maps are [CLS]'s row without itself, laid out as the image, for one that is not square."""
    torch.manual_seed(0)
    backbone = common.vit_nano(img_size=16, patch_size=4).eval()
    x = torch.randn(1, 3, 12, 24)
    tokens = backbone.embed(x)
    for block in backbone.blocks[:-1]:
        tokens = block(tokens)
    last = backbone.blocks[-1]
    qkv = last.attn.qkv(last.norm1(tokens)).view(19, 3, 3, 32)
    maps = ibot_rkd.attention_maps(backbone, x)
    assert maps.shape == (3, 3, 6)
    for head in range(3):
        scores = torch.stack([qkv[0, 0, head] @ qkv[n, 1, head] / 32**0.5 for n in range(19)])
        row = scores.exp() / scores.exp().sum()
        torch.testing.assert_close(maps[head].flatten(), row[1:])
        torch.testing.assert_close(maps[head].sum() + row[0], torch.tensor(1.0))
    whole = backbone.get_last_selfattention(x)  # (1, 3, 19, 19)
    torch.testing.assert_close(whole.sum(-1), torch.ones(1, 3, 19))
    torch.testing.assert_close(backbone.get_last_selfattention(x, queries=1), whole[:, :, :1])


@pytest.mark.figures
def test_attention_is_drawn_side_by_side(tmp_path, image_folder, capsys):
    """Two checkpoints, two images of different sizes that are not square, in any order; at their size or another."""
    from PIL import Image

    train(tmp_path / "a", "--max_steps", 1)
    train(tmp_path / "b", "--max_steps", 1, "--seed", 1)
    Image.new("RGB", (50, 34), (200, 10, 30)).save(tmp_path / "plain.png")
    photo = next((image_folder / "train" / "dog").iterdir())
    files = [tmp_path / "a" / "checkpoint.pth", photo, tmp_path / "b" / "checkpoint.pth", tmp_path / "plain.png"]
    for name, extra in (("own", []), ("small", ["--img_size", 16])):
        ibot_rkd.draw_attention(arguments(tmp_path / name, "--attention", *files, *extra))
        with Image.open(tmp_path / name / "attention.png") as picture:
            assert picture.size[0] / picture.size[1] == pytest.approx(5 / 4, rel=0.05)  # image, three heads, all; two images for two checkpoints
    with pytest.raises(common.InputError, match="attention.png already exists: pass --overwrite"):
        ibot_rkd.draw_attention(arguments(tmp_path / "own", "--attention", *files[:2]))
    ibot_rkd.draw_attention(arguments(tmp_path / "own", "--attention", *files[:2], "--overwrite"))
    (tmp_path / "file").touch()
    result = run_in_process(capsys, "--attention", *files[:2], "--output_dir", tmp_path / "file")
    assert_one_line_error(result, "file", code=1)


def test_attention_of_a_large_image_is_bounded(tmp_path, monkeypatch, capsys):
    """Only [CLS] asks, and without --img_size an image is shrunk to MOST_TOKENS at most, in its own proportions."""
    from PIL import Image

    train(tmp_path / "a", "--max_steps", 1)
    Image.new("RGB", (640, 480), (200, 10, 30)).save(tmp_path / "large.png")
    seen, original = [], ibot_rkd.attention_maps
    monkeypatch.setattr(ibot_rkd, "attention_maps", lambda backbone, x: seen.append(x.shape) or original(backbone, x))
    monkeypatch.setattr(ibot_rkd, "MOST_TOKENS", 1200)
    for extra in ([], ["--img_size", 24]):
        ibot_rkd.draw_attention(arguments(tmp_path / "out", "--attention", tmp_path / "a" / "checkpoint.pth", tmp_path / "large.png",
                                          "--overwrite", *extra))
    assert seen == [(1, 3, 120, 160), (1, 3, 24, 32)] and "enough for 1200 tokens" in capsys.readouterr().out


def test_init_from_weights_of_another_image_size(tmp_path):
    """Masks and positions are those of the grid that was built; --resume goes on without --init."""
    train(tmp_path / "a", "--max_steps", 1)
    flags = ["--img_size", 24]
    train(tmp_path / "b", *flags, "--init", tmp_path / "a" / "checkpoint.pth", "--max_steps", 2)
    content = train(tmp_path / "b", *flags, "--resume", "--max_steps", 3)
    assert content["student"]["backbone.pos_embed"].shape[1] == 1 + 36


@pytest.mark.parametrize("kind", ["ce", "huber"])
@pytest.mark.parametrize("potential", [ibot_rkd.distance_potential, ibot_rkd.angle_potential])
def test_relations_take_any_two_widths(potential, kind):
    """A teacher of another width, also one with a multiple of the student's numbers: as with zeros in place of what is missing."""
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)
    for width in (4, 12, 24):
        t = torch.randn(3, 5, width, generator=generator, dtype=torch.float64)
        padded = [torch.nn.functional.pad(z, (0, 24 - z.shape[-1])) for z in (s, t)]  # distances and angles do not see zeros
        found, expected = ibot_rkd.rkd_loss(s, t, potential, kind), ibot_rkd.rkd_loss(*padded, potential, kind)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
