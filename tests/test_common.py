"""common.py against independent oracles: timm, torchvision, torch itself, or a loop written from the definition."""
import argparse
import copy
import functools
import itertools
import math
import os
import re
import shutil
import signal
import socket
import sys
import time
import urllib.error
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from conftest import SHARED, assert_one_line_error, finished, read_log, run_script, same, start_script
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms.v2 import functional as tv

import common
from common import ImageData, InputError, View, ViewLoader

CPU = torch.device("cpu")
close = functools.partial(assert_close, rtol=1e-4, atol=1e-4)


def perturbed(model, seed=0, size=0.05):
    """The model with every parameter moved by noise, so that no weight is at a value (0, 1) that would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def noise_images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def recorded(*modules):
    """A list that takes input and output of every call of these modules."""
    seen = []
    for module in modules:
        module.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    return seen


def refused(pattern, function, *args, **options):
    """The call ends in an InputError of one short line that matches."""
    with pytest.raises(InputError, match=pattern) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


# ---------------------------------------------------------------------------------------------------------------- ViT


@pytest.mark.parametrize("name, options", [("vit_tiny", dict(img_size=(32, 32), patch_size=8)),
                                           ("vit_small", dict(img_size=(64, 32), patch_size=16, depth=3))])
def test_vit_equals_timm(name, options):
    """Our state dict loads strictly into timm's model, theirs into ours, and all outputs agree, layer by layer too."""
    ours = perturbed(getattr(common, name)(**options))
    theirs = timm.create_model(f"{name}_patch16_224", num_classes=0, **options).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, depth = noise_images(2, 3, *options["img_size"]), len(ours.blocks)
    close(ours(x), theirs(x))
    close(ours.forward_features(x), theirs.forward_features(x))
    assert ours.layer_dims == [ours.embed_dim] * depth
    mine = ours.get_intermediate_layers(x, depth)
    expected = theirs.get_intermediate_layers(x, n=depth, norm=True, return_prefix_tokens=True)
    for tokens, cls, (patches, prefix) in zip(mine, ours(x, layers=True), expected, strict=True):
        close(tokens, torch.cat([prefix, patches], 1))
        close(cls, prefix[:, 0])
    assert same(ours.get_intermediate_layers(x, 2), mine[-2:])
    common.load_weights(ours, perturbed(theirs, seed=1).state_dict(), "timm")
    close(ours(x), theirs(x))


def test_last_selfattention_is_an_explicit_softmax():
    """exp(q k / sqrt(d)) over its sum, for each image and head."""
    vit = perturbed(common.vit_nano(img_size=8, patch_size=4), size=0.2)
    x, seen = noise_images(2, 3, 8, 8), recorded(vit.blocks[-1].attn.qkv)
    vit(x)
    attention, (_, qkv) = vit.get_last_selfattention(x), seen[0]
    assert attention.shape == (2, 3, 5, 5)  # (B, heads, T, T)
    for b, head in itertools.product(range(2), range(3)):
        q, k = (qkv[b, :, start + 32 * head :][:, :32] for start in (0, 96))
        e = torch.exp(q @ k.T / math.sqrt(32))
        close(attention[b, head], e / e.sum(1, keepdim=True), atol=1e-5)


def test_masked_patches_become_the_mask_token_before_positions():
    """Token n is (mask token if masked, else the projected patch) + position n; [CLS] is never masked."""
    vit = perturbed(common.vit_nano(img_size=(8, 12), patch_size=4, mask_token=True), size=0.3)
    assert vit.state_dict().keys() - common.vit_nano(img_size=8, patch_size=4).state_dict().keys() == {"mask_token"}
    x, seen = noise_images(2, 3, 8, 12), recorded(vit.blocks[0])
    mask = torch.tensor([[1, 0, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0]]).bool()
    masked, features = vit.forward_features(x, mask), vit.forward_features(x)
    tokens, proj = seen[0][0], vit.patch_embed.proj
    patches = F.linear(F.unfold(x, 4, stride=4).mT, proj.weight.flatten(1), proj.bias)
    patches[mask] = vit.mask_token
    assert_close(tokens[:, 0], (vit.cls_token[:, 0] + vit.pos_embed[:, 0]).expand(2, -1))
    close(tokens[:, 1:], patches + vit.pos_embed[:, 1:], atol=1e-5)
    assert torch.equal(vit.forward_features(x, torch.zeros(2, 6, dtype=torch.bool)), features)
    assert not torch.allclose(masked, features, atol=1e-3)


@pytest.mark.parametrize("as_dino", [False, True])
@pytest.mark.parametrize("built, given", [((8, 32), (16, 16)), ((16, 16), (24, 8)), ((16, 16), (12, 20))])
def test_positions_are_resized_whenever_the_grid_differs(built, given, as_dino):
    """By F.interpolate, to the exact grid or by the factor (n + 0.1) / m of DINO's code; (2, 8) has as many as (4, 4)."""
    vit = perturbed(common.vit_nano(img_size=built, patch_size=4), size=0.3)
    vit.positions_as_dino = as_dino
    old, new = ([n // 4 for n in size] for size in (built, given))
    how = {"scale_factor": [(n + 0.1) / m for n, m in zip(new, old, strict=True)]} if as_dino else {"size": new}
    grid = vit.pos_embed[:, 1:].mT.unflatten(2, old)
    resized = F.interpolate(grid, **how, mode="bicubic", align_corners=False).flatten(2).mT
    x, seen = noise_images(2, 3, *given), recorded(vit.blocks[0])
    vit.forward_features(x)
    expected = vit.patch_embed(x).flatten(2).mT + resized
    close(seen[0][0], torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(2, -1, -1), expected], 1), atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (12, 8)])
def test_gradient_reaches_learnt_positions_only(size):
    """Learnt positions are trained, resized ones too; sine-cosine positions stay fixed."""
    learnt, fixed = (common.vit_nano(img_size=8, patch_size=4, pos_embed=kind) for kind in ("learnt", "sincos"))
    for vit in (learnt, fixed):
        vit(noise_images(2, 3, *size)).square().sum().backward()
        assert vit.patch_embed.proj.weight.grad.abs().sum() > 0
    assert (learnt.pos_embed.grad.abs().sum(-1) > 0).all()
    assert fixed.pos_embed.grad is None and not fixed.pos_embed.requires_grad


def test_sincos_positions_by_loop():
    """Zero for [CLS]; for a patch in row y and column x: sin x w, cos x w, sin y w, cos y w with w = 10000^(-i / (D/4))."""
    vit = common.vit_nano(img_size=(8, 12), patch_size=4, embed_dim=24, num_heads=3, pos_embed="sincos")
    positions = vit.pos_embed[0]
    assert torch.equal(positions[0], torch.zeros(24))
    for y, x in itertools.product(range(2), range(3)):
        quarters = ((x, math.sin), (x, math.cos), (y, math.sin), (y, math.cos))
        expected = [f(c / 10000 ** (i / 6)) for c, f in quarters for i in range(6)]
        assert_close(positions[1 + 3 * y + x], torch.tensor(expected), atol=1e-6, rtol=0)


def test_stochastic_depth():
    """By loop: the rate rises linearly to the last block; a branch is dropped below it, else scaled by 1 / (1 - rate)."""
    vit = perturbed(common.vit_nano(img_size=8, patch_size=4, depth=3, drop_path=0.4))
    x, seen = noise_images(40, 3, 8, 8), recorded(vit.blocks[0])
    sides = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)).sign()
    noise = (torch.tensor([0.0, 0.0, 0.2, 0.2, 0.4, 0.4]) + 1e-4 * sides).clamp(min=0)  # two numbers a block, just beside its rate
    assert torch.equal(vit.forward_features(x), vit.forward_features(x, noise=noise))  # no effect in evaluation
    trained = vit.train().forward_features(x, noise=noise)
    for b in range(40):
        y = seen[0][0][b : b + 1]
        for block, rate, (attention, mlp) in zip(vit.blocks, (0, 0.2, 0.4), noise[b].view(3, 2), strict=True):
            if attention >= rate:
                y = y + block.attn(block.norm1(y)) / (1 - rate)
            if mlp >= rate:
                y = y + block.mlp(block.norm2(y)) / (1 - rate)
        close(trained[b], vit.norm(y)[0])
    assert torch.equal(trained, vit.forward_features(x, noise=noise))  # noise decides everything
    assert not torch.equal(vit.forward_features(x), vit.forward_features(x))  # drawn where it is absent


# ------------------------------------------------------------------------------------------------------------- ResNet


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_equals_torchvision(name):
    """Strict loads both ways, equal outputs in evaluation and in training, and four pooled stages."""
    torch.manual_seed(0)
    ours, theirs = common.create_backbone(name, img_size=64), getattr(torchvision.models, name)()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(perturbed(theirs).state_dict(), strict=True)
    x = noise_images(4, 3, 32, 32)
    close(ours.train()(x), theirs.train()(x))
    stages = recorded(theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4)
    close(ours.eval()(x), theirs.eval()(x))
    layers = ours(x, layers=True)
    assert ours.layer_dims == [y.shape[1] for y in layers] and ours.embed_dim == layers[-1].shape[1]
    for mine, (_, stage) in zip(layers, stages, strict=True):
        close(mine, stage.mean((2, 3)))


@pytest.mark.parametrize("size, expected", [(32, 32), (63, 63), (64, 16)])
def test_resnet_small_stem(size, expected):
    """Under 64 pixels: a 3x3 stride-1 convolution and no pooling, so that stage one keeps the image's size."""
    resnet = common.create_backbone("resnet18", img_size=size).eval()
    seen = recorded(resnet.layer1)
    resnet(torch.zeros(1, 3, size, size))
    assert seen[0][0].shape == (1, 64, expected, expected) and resnet.conv1.kernel_size == ((3, 3) if size < 64 else (7, 7))


# -------------------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("out", [5, 16, 40])
def test_crop_and_resize_equals_torchvision(out):
    """torchvision's antialiased resized_crop, down and up, boxes of one pixel, at the borders and of the whole image."""
    images = torch.rand(8, 3, 24, 30, generator=torch.Generator().manual_seed(0))
    boxes = [(0, 0, 24, 30), (0, 0, 7, 9), (17, 21, 7, 9), (23, 29, 1, 1), (3, 4, 11, 13), (0, 10, 24, 3), (10, 0, 3, 30), (5, 6, 16, 16)]
    views = common.crop_and_resize(images, torch.tensor(boxes, dtype=torch.float32), out)
    expected = [tv.resized_crop(image, *box, [out, out], antialias=True) for image, box in zip(images, boxes, strict=True)]
    assert_close(views, torch.stack(expected), rtol=0, atol=2e-5)


@pytest.mark.parametrize("height, width, scale", [(64, 64, (0.08, 1)), (64, 64, (0.2, 1)), (50, 90, (0.08, 0.4)), (8, 8, (0.2, 1))])
def test_crop_boxes(height, width, scale):
    """Whole pixels inside the image, area and aspect in range up to rounding, every position possible. Means and quantiles of area,
    aspect, centre and top are those of torchvision's RandomResizedCrop, within sampling error."""
    torch.manual_seed(0)
    n, image, get_params = 4000, torch.zeros(3, height, width), torchvision.transforms.RandomResizedCrop.get_params
    theirs = torch.tensor([get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(n)])
    ours = common.crop_boxes(common.draw(0, 0, 0, n, common.DRAWS), height, width, scale)
    assert torch.equal(ours, ours.round())
    top, left, h, w = ours.unbind(1)
    assert (h >= 1).all() and (w >= 1).all()
    assert top.min() == left.min() == 0 and (top + h).max() == height and (left + w).max() == width
    slack = 0.5 * (h + w) + 0.25  # rounding both sides moves the area by this much
    assert (h * w >= scale[0] * height * width - slack).all() and (h * w <= scale[1] * height * width + slack).all()
    assert ((w + 0.5) / (h - 0.5) >= 3 / 4).all() and ((w - 0.5) / (h + 0.5) <= 4 / 3).all()

    def measures(boxes):
        top, left, h, w = boxes.float().unbind(1)
        return h * w / (height * width), (w / h).log(), (top + h / 2) / height, (left + w / 2) / width, top / height

    for a, b in zip(measures(theirs), measures(ours), strict=True):
        error = 4 * (a.std() ** 2 / n + b.std() ** 2 / n) ** 0.5  # four standard errors
        assert (a.mean() - b.mean()).abs() < error and (a.std() / b.std() - 1).abs() < 0.06
        q = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
        assert height == 8 or (a.quantile(q) - b.quantile(q)).abs().max() < 0.05 * (a.max() - a.min())  # there a pixel is more


def test_crop_boxes_fall_back_to_the_middle():
    """Where no aspect in range has the area, and for sizes that differ by image: the box of torchvision."""
    sizes = torch.tensor([(10, 200), (200, 10), (10, 300), (1, 90), (64, 64), (64, 64)])
    boxes = common.crop_boxes(common.draw(0, 0, 0, 6, common.DRAWS), *sizes.T, (0.9, 1.0))
    for size, box in zip(sizes[:4], boxes, strict=False):
        theirs = torchvision.transforms.RandomResizedCrop.get_params(torch.zeros(3, *size), [0.9, 1.0], [3 / 4, 4 / 3])
        assert box.tolist() == list(theirs)
    assert (boxes[4:, 2:].prod(1) > 0.85 * 64**2).all()


# the last ten of a view's numbers, in the order in which `augment` reads them
NUMBERS = ("flip", "p_jitter", "brightness", "contrast", "saturation", "hue", "grey", "blur", "sigma", "solarize")
IMAGENET = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


def denormalized(x, mean, std):
    return x * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)


ALONE = [{}, {"flip": 1.0}, {"grey": 1.0}, {"blur": 1.0}, {"solarize": 1.0}]
ALONE += [{"p_jitter": 1.0, "jitter": jitter} for jitter in ((0.8, 0, 0, 0), (0, 0.8, 0, 0), (0, 0, 0.8, 0), (0, 0, 0, 0.4))]
TOGETHER = dict(flip=0.6, jitter=(0.4, 0.4, 0.2, 0.1), p_jitter=0.8, grey=0.2, blur=0.5, solarize=0.2)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]])
@pytest.mark.parametrize("view", [View(24, **{"flip": 0, **options}) for options in (*ALONE, TOGETHER)])
def test_augmentations_equal_torchvision(view, order):
    """Each alone and all in sequence, image by image, where the number that decides is just below or above the probability."""
    generator = torch.Generator().manual_seed(0)
    x = F.interpolate(torch.rand(8, 3, 6, 6, generator=generator), (24, 24), mode="bilinear")  # smooth pictures
    u = torch.rand(8, common.DRAWS, generator=generator)
    for name in ("flip", "p_jitter", "grey", "blur", "solarize"):
        beside = getattr(view, name) + 1e-4 * torch.randn(8, generator=generator).sign()
        u[:, NUMBERS.index(name) - len(NUMBERS)] = beside.clamp(0, 0.9999)
    result = common.augment(x.clone(), view, u, order)
    for i, y in enumerate(x):
        draws = dict(zip(NUMBERS, u[i, -len(NUMBERS) :].tolist(), strict=True))
        if draws["flip"] < view.flip:
            y = tv.horizontal_flip(y)
        for operation in order:
            if draws["p_jitter"] < view.p_jitter:
                amount = view.jitter[operation] * (2 * draws[NUMBERS[2 + operation]] - 1)
                adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)[operation]
                y = adjust(y, amount if operation == 3 else 1 + amount)
        if draws["grey"] < view.grey:
            y = tv.rgb_to_grayscale(y, 3)
        if draws["blur"] < view.blur:
            y = tv.gaussian_blur(y, [45, 45], [0.1 + 1.9 * draws["sigma"]] * 2)  # sigma uniform in (0.1, 2); as wide as can be
        if draws["solarize"] < view.solarize:
            y = tv.solarize(y, 128 / 255)
        assert_close(result[i], y, rtol=0, atol=3e-5)
    assert view == View(24, flip=0) or (result - x).abs().max() > 0.05  # it is seen
    assert_close(common.augment(x.repeat(24, 1, 1, 1), view, u.repeat(24, 1), order), result.repeat(24, 1, 1, 1))  # many at once


def test_views_of_byol_are_asymmetric():
    """Blur always and solarize never in the first view, rarely and sometimes in the second; no blur for small images."""
    first, second = common.byol_views(32)
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    assert first.p_jitter == second.p_jitter == 0.8 and first.size == second.size == 32
    assert all(view.blur == 0 for view in common.byol_views(32, blur=False))


def test_draw_is_a_pure_function():
    """Even numbers in [0, 1), whatever else was drawn; another seed, step, stream or row has unrelated ones."""
    a = common.draw(3, 5, 1, 400, 32)
    torch.manual_seed(9)
    np.random.seed(9)
    assert torch.equal(a, common.draw(3, 5, 1, 400, 32)) and a.dtype == torch.float32 and a.shape == (400, 32)
    assert a.min() >= 0 and a.max() < 1 and abs(a.mean() - 0.5) < 4 / math.sqrt(12 * a.numel())
    assert len(a.unique(dim=0)) == 400 and (a.histc(10, 0, 1) / a.numel() - 0.1).abs().max() < 0.012  # four standard errors
    others = [common.draw(*key, 400, 32) for key in ((4, 5, 1), (3, 6, 1), (3, 5, 2), (5, 3, 1), (1, 5, 3))]
    correlations = torch.corrcoef(torch.stack([a, *others]).flatten(1))[0, 1:]
    assert (correlations.abs() < 5 / math.sqrt(a.numel())).all()


# -------------------------------------------------------------------------------------------------------- view loader

VIEWS = common.byol_views(16)


def memory_data(n=23):
    images = torch.randint(0, 256, (n, 3, 20, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageData(torch.arange(n) % 3, [0, 1, 2], images=images)


def write_images(folder, sizes, suffix="png", seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for i, size in enumerate(sizes):
        pixels = random.integers(0, 256, (*np.broadcast_to(size, 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.{suffix}")
    return folder


def file_data(folder, n, suffix="png"):
    """Images of several sizes, which stay files."""
    return common.load_data(str(write_images(folder, [(20 + i % 3, 24) for i in range(n)], suffix)))[0]


def batches(data, start=0, stop=6, seed=0, workers=0):
    """Steps, views and rows of 6 images at a time as lists, which go through a file."""
    loader = ViewLoader(data, VIEWS, 6, seed, CPU, num_workers=workers)
    return [[step, *views, index] for step, views, index in loader.steps(start, stop)]


@pytest.fixture(params=["memory", "files"])
def samples(request, tmp_path):
    """23 images: tensors in memory, or PNG files of several sizes."""
    return memory_data() if request.param == "memory" else file_data(tmp_path / "pictures", 23)


def test_loader_starts_anywhere(samples):
    """Starting at step s gives what skipping s steps gives, bit-equal: mid-epoch, at its end, beyond it; with workers too."""
    everything = batches(samples, 0, 7)  # 3 steps an epoch
    assert [step for step, *_ in everything] == list(range(7))
    for start, stop, workers in ((1, 7, 0), (3, 7, 0), (5, 7, 0), (7, 7, 0), (1, 5, 2)):
        assert same(batches(samples, start, stop, workers=workers), everything[start:stop])
    _, x1, x2, index = everything[0]
    assert x1.shape == x2.shape == (6, 3, 16, 16) and x1.dtype == x2.dtype == torch.float32 and len(index) == 6
    assert not torch.allclose(x1, x2, atol=0.1)


def test_loader_epochs_are_permutations(samples):
    """No sample twice in an epoch; epochs and seeds differ, in samples and in augmentations."""
    first, second, other = (torch.cat([index for *_, index in batches(samples, start, start + 3, seed)])
                            for start, seed in ((0, 0), (3, 0), (0, 1)))
    for epoch in (first, second):
        assert len(epoch.unique()) == 18 and epoch.min() >= 0 and epoch.max() < 23
    assert not torch.equal(first, second) and not torch.equal(first, other)
    # the same image seen twelve times is cropped differently
    one = memory_data(6)
    one.images[:] = one.images[:1]
    assert len(torch.cat([x for _, x, *_ in batches(one, 0, 2)]).flatten(1).unique(dim=0)) == 12


@pytest.mark.parametrize("colours", [IMAGENET, dict(mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])])
def test_loader_views_are_the_crops_of_the_images(colours):
    """Without augmentation: torchvision's resized crop of the image that `index` names, normalised as told or as ImageNet."""
    data = memory_data(8)
    options = {} if colours is IMAGENET else colours
    for step, (view,), index in ViewLoader(data, [View(16, flip=0)], 4, 0, CPU, **options).steps(0, 2):
        boxes = common.crop_boxes(common.draw(0, step, 0, 4, common.DRAWS), 20, 20, (0.08, 1.0)).int().tolist()
        for row, box, crop in zip(index, boxes, view, strict=True):
            expected = tv.resized_crop(data.images[row].float() / 255, *box, [16, 16], antialias=True)
            assert_close(denormalized(crop, **colours), expected, rtol=0, atol=2e-5)


def test_views_share_no_memory():
    """A view that keeps the image whole has a tensor of its own, which another view's augmentation does not touch."""
    data, whole = memory_data(4), dict(scale=(1, 1), flip=0)
    (_, (x1, x2), index), = ViewLoader(data, [View(20, **whole, solarize=1.0), View(20, **whole)], 4, 0, CPU).steps(0, 1)
    assert_close(x2, tv.normalize(data.images[index].float() / 255, **IMAGENET))
    assert not torch.equal(x1, x2)


def test_files_and_memory_give_the_same_views(tmp_path):
    """The two paths differ by the rounding of the files' crops to uint8 only."""
    data = common.load_data(str(write_images(tmp_path, [20] * 8)))[0]
    assert data.images is not None
    views = [View(16, flip=0.5, jitter=(0.4, 0.4, 0.2, 0), p_jitter=0.8)]
    pairs = (ViewLoader(source, views, 4, 0, CPU).steps(0, 2) for source in (data, ImageData(data.labels, [], paths=data.paths)))
    for (_, (a,), i), (_, (b,), j) in zip(*pairs, strict=True):
        assert torch.equal(i, j) and (denormalized(a, **IMAGENET) - denormalized(b, **IMAGENET)).abs().max() < 2.5 / 255


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_one_line_that_names_it(tmp_path, workers, capfd):
    """Exit code 2 and no traceback, from the main process and through a worker."""
    loader = ViewLoader(file_data(tmp_path, 12, "jpg"), [View(16)], 4, 0, CPU, num_workers=workers)
    file = tmp_path / "011.jpg"
    whole = file.read_bytes()
    file.write_bytes(whole[:300])
    assert_one_line_error(finished(capfd, lambda: list(loader.steps(0, 3))), r"011\.jpg", "truncated")
    file.write_bytes(whole)
    assert len(list(loader.steps(0, 3))) == 3  # nothing else was wrong


# --------------------------------------------------------------------------------------------------------------- data


def test_digits_are_split_80_20():
    """All of scikit-learn's digits, once, scaled from 0..16 to 0..255, each class in the same share of both splits."""
    from sklearn.datasets import load_digits

    train, test = common.load_data("digits")
    assert (len(train), len(test)) == (1437, 360) and train.labelled and train.image_size() == (8, 8)
    for split in (train, test):
        assert split.images.dtype == torch.uint8 and split.images.shape[1:] == (3, 8, 8) and split.labels.dtype == torch.int64
        assert torch.equal(split.images[:, 0], split.images[:, 2])
        assert (split.labels.bincount(minlength=10) / len(split) - 0.1).abs().max() < 0.01
    rows = [np.column_stack([split.labels, split.images[:, 0].flatten(1) * (16 / 255)]) for split in (train, test)]
    ours, theirs = np.concatenate(rows), np.column_stack([load_digits().target, load_digits().data])  # a label and 64 pixels each
    assert np.abs(np.array(sorted(ours.tolist())) - sorted(theirs.tolist())).max() < 0.04  # half a step of 255
    assert same([split.images for split in common.load_data("digits")], [train.images, test.images])


def test_labelled_folders(tmp_path, capsys):
    """Labels are positions in the sorted names of train's class folders, for val too, even where that has fewer; other files are
    counted aloud, an empty class and one that train does not have are refused."""
    for i, name in enumerate(["train/zebra", "train/ant", "train/mole/deeper", "val/zebra", "val/mole"]):
        write_images(tmp_path / name, [9], seed=i)
    root = tmp_path / "train"
    write_images(root / "mole", [9], suffix="JFIF")
    (root / "ant" / "notes.txt").write_text("no image")
    (root / "n01.tar").touch()
    (root / "bear").symlink_to("nowhere")
    train, val = common.load_data(str(tmp_path))
    assert train.classes == ["ant", "mole", "zebra"] and train.labelled
    assert re.search(r"1 \.txt(?s:.*)train: 2 files beside the class folders are not read \(bear \.\.\.\)", capsys.readouterr().out)
    for data, split, expected in ((train, "train", ["ant 0", "mole 1", "mole 1", "zebra 2"]), (val, "val", ["mole 1", "zebra 2"])):
        folders = [Path(path).relative_to(tmp_path / split).parts[0] for path in data.paths]
        assert sorted(f"{folder} {label}" for folder, label in zip(folders, data.labels, strict=True)) == expected
    write_images(tmp_path / "val" / "wombat", [9])
    refused("wombat", common.load_data, str(tmp_path))
    (root / "bee").mkdir()
    refused("class folder .*bee has no images", common.load_data, str(tmp_path))


def test_test_folders(tmp_path, capsys):
    """`val/`, or else `validation/`, or else `test/`; without any there is no test set; without class folders no labels."""
    write_images(tmp_path / "train" / "ant", [9])
    assert common.load_data(str(tmp_path))[1] is None
    for n, name in ((2, "test"), (3, "validation"), (4, "val")):
        write_images(tmp_path / name / "ant", [9] * n)
        assert len(common.load_data(str(tmp_path))[1]) == n
    write_images(tmp_path / "plain" / "train", [9, 9])
    write_images(tmp_path / "plain" / "val" / "ant", [9])
    train, test = common.load_data(str(tmp_path / "plain"))
    assert len(train) == 2 and not train.labelled and test is None
    assert "plain/val is not read, since" in capsys.readouterr().out


def test_unlabelled_folders(tmp_path):
    """Flat or nested: every image is found once, whatever the case of its suffix; hidden files and folders are left out."""
    write_images(tmp_path / "flat", [9, 9])
    nested = tmp_path / "nested"
    write_images(nested / "a" / "b", [9, 9])
    write_images(nested / "c", [9], suffix="PNG")
    (nested / "a" / ".hidden.png").write_bytes(b"no image")
    write_images(nested / "a" / ".ipynb_checkpoints", [9])
    (nested / "a" / "round").symlink_to("..")
    for folder, n in ((tmp_path / "flat", 2), (nested, 3)):
        data, test = common.load_data(str(folder))
        assert len(data) == n == len(data.images) and test is None and not data.labelled and (data.labels == -1).all()
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    refused("no images under .*empty", common.load_data, str(tmp_path / "empty"))


def test_small_images_of_one_size_live_in_memory(tmp_path):
    """Bit-equal to the files; other sizes, or one image that differs, stay paths."""
    data, _ = common.load_data(str(write_images(tmp_path / "same", [(9, 12)] * 10)))
    assert data.images.shape == (10, 3, 9, 12) and data.images.dtype == torch.uint8 and data.image_size() == (9, 12)
    for path, image in zip(data.paths, data.images, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), image.permute(1, 2, 0).numpy())
    for split, sizes in (("train", [9] * 10), ("val", [9] * 3 + [10])):
        write_images(tmp_path / "both" / split / "cat", sizes)
    train, val = common.load_data(str(tmp_path / "both"))
    assert train.images is None and val.images is None  # or one would be cut to its middle and the other not
    for name, sizes in (("mixed", [9, 10]), ("last", [9] * 10 + [10]), ("large", [(9, 120)] * 2)):
        data, _ = common.load_data(str(write_images(tmp_path / name, sizes)))
        assert data.images is None and len(data.paths) == len(sizes) and data.image_size() == Image.open(data.paths[0]).size[::-1]


@pytest.mark.parametrize("name", "L.png P.png RGBA.png LA.png 1.png L.jpg CMYK.jpg P.gif RGB.webp RGB.bmp RGB.tif CMYK.tif RGB.ppm".split())
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_read_image_of_every_kind(tmp_path, name):
    """uint8 (3, H, W), equal to what PIL converts to RGB (up to 2 levels where JPEG decoders round)."""
    path, mode = tmp_path / name, name.split(".")[0]
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 4), dtype=np.uint8)
    Image.fromarray(pixels).convert("RGBA").convert(mode).save(path)
    image = common.read_image(path)
    assert image.dtype == torch.uint8 and image.shape == (3, 7, 5)
    expected = tv.pil_to_tensor(Image.open(path).convert("RGB"))
    assert_close(image.int(), expected.int(), rtol=0, atol=2 if path.suffix in (".jpg", ".webp") else 0)


def test_read_image_of_deep_moving_and_turned_ones(tmp_path):
    """16 bits keep their brightness: 65535 is 255; the first frame; EXIF orientation 6: the camera was turned by 90 degrees."""
    deep = np.random.default_rng(0).integers(0, 65536, (7, 5), dtype=np.uint16)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        image = common.read_image(tmp_path / name)
        assert image.dtype == torch.uint8 and image.shape == (3, 7, 5) and np.abs(image[1].numpy() - deep / 257).max() <= 1
    frames = [Image.new("RGB", (5, 7), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    image = common.read_image(tmp_path / "moving.gif")
    assert image.shape == (3, 7, 5) and image[:, 0, 0].tolist() == [255, 0, 0]
    exif = Image.Exif()
    exif[0x0112] = 6
    frames[0].save(tmp_path / "phone.png", exif=exif)
    assert common.read_image(tmp_path / "phone.png").shape == (3, 5, 7)


def test_reading_without_rights_is_no_damage(tmp_path, monkeypatch):
    for module, name in ((Image, "open"), (torch, "load")):
        monkeypatch.setattr(module, name, Mock(side_effect=PermissionError(13, "Permission denied")))
    (tmp_path / "file.pth").touch()
    for read in (common.read_image, common.read_checkpoint):
        with pytest.raises(PermissionError):
            read(tmp_path / "file.pth")


def test_read_image_names_what_it_cannot_read(tmp_path):
    """Cut short, empty, no image, of floating-point numbers, signed, or wider than 16 bits: one line with the file's name."""
    write_images(tmp_path, [40])
    for name, content in (("cut.png", (tmp_path / "000.png").read_bytes()[:-200]), ("empty.jpg", b""), ("words.jpg", b"no pixels")):
        (tmp_path / name).write_bytes(content)
    Image.fromarray(np.random.default_rng(0).random((9, 9), dtype=np.float32)).save(tmp_path / "float.tif")
    for name, low, high in (("signed", -5, 100), ("wide", 0, 70000)):
        Image.fromarray(np.linspace(low, high, 63, dtype=np.int32).reshape(7, 9)).save(tmp_path / f"{name}.tif")
    for name, reason in (("cut.png", ""), ("empty.jpg", ""), ("words.jpg", ""), ("float.tif", "floating-point"),
                         ("signed.tif", r"\(pixels from -5 to 100"), ("wide.tif", r"\(pixels from 0 to 70000")):
        refused(f"{re.escape(name)}.*{reason}", common.read_image, tmp_path / name)


def test_mnist():
    """torchvision's MNIST where it is at hand: 60,000 and 10,000 images, and the labels of the idx files."""
    raw = SHARED / "MNIST" / "raw"
    if not (raw / "t10k-images-idx3-ubyte").is_file():
        pytest.skip(f"no MNIST in {SHARED}")
    train, test = common.load_data("mnist", str(SHARED))
    assert train.images.shape == (60000, 3, 28, 28) and train.images.dtype == torch.uint8 and train.classes == list(range(10))
    labels = np.frombuffer((raw / "t10k-labels-idx1-ubyte").read_bytes()[8:], dtype=np.uint8)
    pixels = np.frombuffer((raw / "t10k-images-idx3-ubyte").read_bytes()[16:], dtype=np.uint8).reshape(-1, 1, 28, 28)
    assert np.array_equal(test.labels, labels) and np.array_equal(test.images, pixels.repeat(3, 1))


@pytest.mark.parametrize("name", ["mnist", "cifar10", "stl10", "flowers102", "pets", "cars", "aircraft"])
def test_a_data_set_that_cannot_be_downloaded_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=urllib.error.URLError("no route\nto host")))
    refused(f"{name}.*--data_path", common.load_data, name, str(tmp_path / "nothing"))


def test_eval_batches_of_memory_and_files(tmp_path):
    """Rows in their order; memory is resized whole, files have their short side resized and the centre cut out."""
    def made(*args, **options):
        return denormalized(torch.cat(list(common.eval_batches(*args, CPU, **options))), **IMAGENET)

    resize = functools.partial(tv.resize, interpolation=tv.InterpolationMode.BICUBIC, antialias=True)
    data = memory_data(7)
    assert_close(made(data, [5, 0, 3], 20, batch_size=2), data.images[[5, 0, 3]].float() / 255, rtol=0, atol=1e-5)
    for size in (10, 30):
        assert_close(made(data, [1], size), resize(data.images[1:2].float() / 255, [size] * 2).clamp(0, 1), rtol=0, atol=1e-4)
    files, _ = common.load_data(str(write_images(tmp_path, [(64, 80), (90, 64), (64, 64)])))
    images = [tv.center_crop(resize(tv.pil_to_tensor(Image.open(files.paths[i])), [64]), [56, 56]) for i in (2, 0)]
    for workers in (0, 2):
        assert_close(made(files, [2, 0], 56, num_workers=workers), torch.stack(images).float() / 255, rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------- EMA, schedules and parameter groups


def norm_net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


@pytest.mark.parametrize("momentum, rtol", [(0.0, 0), (0.3, 1e-6), (0.9, 1e-6), (0.996, 1e-6), (1.0, 0)])
def test_ema_update(momentum, rtol):
    """Every parameter is m t + (1 - m) s, exactly for m = 0 and m = 1; buffers are left alone; no storage is shared."""
    student, teacher = norm_net(0), norm_net(1)
    student(torch.randn(8, 4))  # its running statistics move
    t, s = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
    common.ema_update(student, teacher, momentum)
    assert same(student.state_dict(), s)
    for parameter in student.parameters():
        parameter.data.add_(1)
    for name, now in teacher.state_dict().items():
        m = momentum if name in dict(student.named_parameters()) else 1
        assert_close(now.double(), m * t[name].double() + (1 - m) * s[name].double(), rtol=rtol, atol=rtol / 10)


def test_ema_of_equal_parameters_stays_bit_equal():
    """A thousand updates do not drift, and neither side gets a gradient or a graph; a teacher of another shape is an error."""
    student = norm_net(0)
    teacher = copy.deepcopy(student)
    for i in range(1000):
        common.ema_update(student, teacher, 0.99 + 0.01 * i / 1000)
    assert same(student.state_dict(), teacher.state_dict())
    assert all(p.grad is None and p.grad_fn is None for p in teacher.parameters())
    with pytest.raises(ValueError):
        common.ema_update(student, nn.Linear(4, 5), 0.5)


@pytest.mark.parametrize("base, final, total, warmup, start", [
    (1.0, 0.0, 50, 10, 0.0), (0.996, 1.0, 20, 0, 0.0), (0.3, 0.01, 30, 1, 0.1), (2.0, 0.5, 7, 6, 0.2), (1.0, 0.0, 5, 5, 0.0),
    (1.0, 0.0, 5, 9, 0.1), (1.0, 0.0, 0, 0, 0.0), (1.0, 0.0, 0, 3, 0.0)])
def test_cosine_schedule(base, final, total, warmup, start):
    """linspace(start, base, warmup), then final + (base - final) (1 + cos(pi i / (total - warmup))) / 2, by loop."""
    values = common.cosine_schedule(base, final, total, warmup, start)
    warmup = min(warmup, total)  # one as long as the run or longer is all there is
    expected = [start + (base - start) * i / max(warmup - 1, 1) for i in range(warmup)]
    expected += [final + (base - final) * (1 + math.cos(math.pi * i / (total - warmup))) / 2 for i in range(total - warmup)]
    np.testing.assert_allclose(values, np.array(expected), rtol=1e-12, atol=1e-15)


def test_parameter_groups():
    """Matrices are decayed; biases, norms, tokens and positions are not; frozen ones are absent; nothing comes twice."""
    vit = common.vit_nano(img_size=8, patch_size=4)
    sincos = common.vit_nano(img_size=8, patch_size=4, pos_embed="sincos", mask_token=True)
    last = nn.Linear(4, 4).requires_grad_(False)
    model = nn.ModuleDict({"student": vit, "tied": vit.blocks[0], "sincos": sincos, "bn": common.BatchNorm(4), "last": last})
    groups = common.parameter_groups(model, 0.05)
    assert [group["weight_decay"] for group in groups] == [0.05, 0]
    of = {id(p): name for name, p in model.named_parameters()}
    names = [[of[id(p)] for p in group["params"]] for group in groups]
    assert all(re.search(r"(qkv|attn\.proj|fc1|fc2|patch_embed\.proj)\.weight$", name) for name in names[0])
    assert all(re.search(r"(bias|norm\d?\.weight|bn\.weight|cls_token|mask_token|pos_embed)$", name) for name in names[1])
    assert sorted(names[0] + names[1]) == sorted(set(of.values()) - {"sincos.pos_embed", "last.weight", "last.bias"})


# -------------------------------------------------------------------------------------------------------- collectives

SHAPES = [(8, 3), (8, 3, 5), (8, 3, 2, 4)]


def contrast_case(norm):
    """A small network with BatchNorm, whose loss compares each row with all rows of the global batch, and its input."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), norm(5), nn.ReLU(), nn.Linear(5, 4))
    return perturbed(network, size=1).train(), torch.randn(8, 6)


def run_norm(norm, shape, rows=slice(None)):
    """Two training steps on these rows, an evaluation, a step in bf16 -> outputs, gradients, statistics."""
    torch.manual_seed(0)
    x, target = (torch.randn(2, *shape) * 2 + 3)[:, rows]
    norm.weight.data, norm.bias.data = torch.tensor([[0.5, 1.5, -2.0], [0.1, -0.3, 1.0]])
    for _ in range(2):
        norm.zero_grad()
        x = x.detach().requires_grad_()
        y = norm(x)
        ((y - target) ** 3).mean().backward()
    found = dict(y=y.detach(), x=x.grad, weight=norm.weight.grad, bias=norm.bias.grad, mean=norm.running_mean.clone(),
                 var=norm.running_var.clone(), count=norm.num_batches_tracked.clone())
    found["eval"] = norm.eval()(x).detach()
    assert torch.equal(norm.running_mean, found["mean"])  # evaluation leaves the statistics
    found["half"] = norm.train()(x.bfloat16()).detach()
    return found


def small_vit():
    torch.manual_seed(0)
    return perturbed(common.vit_nano(img_size=20, patch_size=4))


def what_two_processes_do(rank, folder):
    """Everything that a process group is needed for, in one go: the tests below look at their part."""
    rows, data, vit = slice(4 * rank, 4 * rank + 4), memory_data(), small_vit()
    # gather: its value; its gradient where it is used twice and where its own gradient is shared with another tensor
    found = {"gathered": common.gather(torch.arange(8.0).view(4, 2) + 10 * rank), "local_rows": torch.arange(8)[common.local_rows(8)],
             "mean": common.mean_over_processes(torch.tensor([1.0 + rank]))}
    a, b, c = (torch.ones(n, 3, requires_grad=True) for n in (2, 2, 4))
    ((common.gather(a) + common.gather(b) + c) * 3).sum().backward()
    found["shared"] = [a.grad, b.grad, c.grad]
    # a contrastive loss over gathered rows, through distributed()
    network, x = contrast_case(common.BatchNorm)
    model = common.distributed(network)
    for _ in range(2):
        network.zero_grad()
        z = model(x[rows])
        loss = F.cross_entropy(z @ common.gather(z).T, torch.arange(8)[rows])
        loss.backward()
    found["contrast"] = {name: parameter.grad for name, parameter in network.named_parameters()}
    found["loss"] = common.mean_over_processes(loss)
    found |= {str(shape): run_norm(common.BatchNorm(3), shape, rows) for shape in SHAPES}
    # loader and features, with an odd number of images
    found["views"] = batches(data, 1, 5)
    found["file_views"] = batches(common.load_data(folder)[0], 0, 3, workers=2 * rank)
    found["features"] = [common.extract_features(vit, memory_data(n), 20, CPU, batch_size=4) for n in (1, 8, 23)]
    found["layers"] = common.extract_features(vit, data, 20, CPU, layers=True, rows=torch.tensor([3, 1, 22, 4, 9]))
    refused("7.*2 processes", ViewLoader, data, VIEWS, 7, 0, CPU)
    resnet = common.create_backbone("timm/resnet10t", img_size=32)
    refused("normalises over the images of one process alone", common.distributed, resnet)
    common.distributed(nn.Sequential(resnet.eval().requires_grad_(False), nn.Linear(512, 2)))
    return found


_two = {}


@pytest.fixture
def two(in_processes, tmp_path):
    """What two gloo processes found, both of them; they are started once for all tests."""
    if not _two:
        one = batches(file_data(tmp_path / "pictures", 13), 0, 3)
        _two.update(found=in_processes(2, what_two_processes_do, str(tmp_path / "pictures")), file_views=one)
    return _two["found"]


def test_gather(two):
    """All processes' rows in order. The gradient sums d(3 sum)/dx = 3 over both, once each, also where autograd shares one gradient."""
    expected = torch.cat([torch.arange(8.0).view(4, 2), torch.arange(8.0).view(4, 2) + 10])
    for found, rows in zip(two, ([0, 1, 2, 3], [4, 5, 6, 7]), strict=True):
        assert torch.equal(found["gathered"], expected) and found["mean"].item() == 1.5
        assert [gradient.unique().tolist() for gradient in found["shared"]] == [[6.0], [6.0], [3.0]]
        assert found["local_rows"].tolist() == rows
    x = torch.ones(2, requires_grad=True)
    assert common.gather(x) is x and common.local_rows(8) == slice(0, 8)  # one process


def test_gathered_loss_has_one_processs_gradients(two):
    """Mean over local rows, averaged over processes by DDP, BatchNorm inside: equal to the whole batch in one process."""
    network, x = contrast_case(nn.BatchNorm1d)
    z = network(x)
    loss = F.cross_entropy(z @ z.T, torch.arange(8))
    loss.backward()
    for found in two:
        assert_close(found["loss"], loss.detach(), rtol=1e-5, atol=0)
        for name, parameter in network.named_parameters():
            # the first bias has a gradient of zero but for rounding: BatchNorm takes out every shift
            scale = (network[0].weight if name == "0.bias" else parameter).grad.abs().max().item()
            assert_close(found["contrast"][name], parameter.grad, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("shape", SHAPES)
def test_batchnorm(two, shape):
    """One process: nn.BatchNorm, with its keys. Two: its outputs, statistics and gradients on the whole batch."""
    norm, ours = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(3), common.BatchNorm(3)
    assert ours.state_dict().keys() == norm.state_dict().keys()
    expected, one = run_norm(norm, shape), run_norm(ours, shape)
    first, second = (found[str(shape)] for found in two)
    half = expected.pop("half")
    for result in (one.pop("half"), torch.cat([first["half"], second["half"]])):
        assert_close(result, half, rtol=1e-2, atol=1e-2)  # bf16 too
    for name in expected:
        assert_close(one[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)
        a, b = first[name], second[name]
        if name in ("y", "eval", "x"):  # gradients are averaged by DDP
            a = b = torch.cat([a, b]) / (2 if name == "x" else 1)
        elif name in ("weight", "bias"):
            a = b = (a + b) / 2
        assert_close([a, b], [expected[name]] * 2, rtol=1e-5, atol=1e-5)


def test_two_processes_see_one_processs_views(two):
    """The same samples, bit-equal, and the same views up to the rounding of batched matmuls; from memory and from files."""
    for name, expected in (("views", batches(memory_data(), 1, 5)), ("file_views", _two["file_views"])):
        for whole, first, second in zip(expected, *(found[name] for found in two), strict=True):
            assert whole[0] == first[0] == second[0]
            assert torch.equal(torch.cat([first[-1], second[-1]]), whole[-1])
            for view in (1, 2):
                assert_close(torch.cat([first[view], second[view]]), whole[view], rtol=0, atol=5e-5)


def test_extract_features(two):
    """Every row once, in order, in each process, for any count; layer by layer; in fp32 from a bf16 pass; normalised as told."""
    vit = small_vit()
    colours = dict(mean=(0.5,) * 3, std=(0.25,) * 3)
    for i, n in enumerate((1, 8, 23)):
        x = memory_data(n).images.float() / 255
        one = common.extract_features(vit, memory_data(n), 20, CPU, batch_size=5)
        for features, in [one, *(found["features"][i] for found in two)]:
            close(features, vit(tv.normalize(x, **IMAGENET)))  # shape and dtype too
        features, = common.extract_features(vit, memory_data(n), 20, CPU, batch_size=3, **colours)
        close(features, vit((x - 0.5) / 0.25))
        half, = common.extract_features(vit, memory_data(n), 20, CPU, dtype="bf16", **colours)
        assert_close(half, features, rtol=0.1, atol=0.1)
        assert not torch.equal(half, features)
    layers = vit(tv.normalize(x[[3, 1, 22, 4, 9]], **IMAGENET), layers=True)
    close([found["layers"] for found in two], [layers] * 2)


# -------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("PytorchStreamWriter failed: file write failed")])
def test_a_save_that_fails_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch, capsys, error):
    """Exit code 1, the old file whole, nothing else left behind, and a later save works."""
    path = tmp_path / "checkpoint.pth"
    common.save_file({"step": 1}, path)

    def fails(content, file, *args, **kwargs):
        file.write(b"half a file")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fails)
        result = finished(capsys, lambda: common.save_file({"step": 2}, path))
    assert_one_line_error(result, "cannot write .*checkpoint.pth, for want of space or rights .*(disk full|file write failed)", code=1)
    assert common.read_checkpoint(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]
    common.save_file({"step": 3}, path)
    assert common.read_checkpoint(path) == {"step": 3} and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_stdout_that_takes_nothing_does_not_end_a_run():
    print("Größe " * 10_000, file=common.Terminal(open("/dev/full", "w", encoding="ascii")), flush=True)


def test_read_checkpoint_errors(tmp_path):
    """One line each, with the file's name."""
    ones = torch.ones(1000)
    for name, content in dict(whole={"a": ones}, tensor=ones, list=[ones], numbers={0: ones, 1: ones}).items():
        torch.save(content, tmp_path / f"{name}.pth")
    assert same(common.read_checkpoint(tmp_path / "whole.pth"), {"a": ones})
    whole = (tmp_path / "whole.pth").read_bytes()
    for name, content in dict(cut=whole[: len(whole) // 2], words=b"no checkpoint", empty=b"").items():
        (tmp_path / f"{name}.pth").write_bytes(content)
    (tmp_path / "folder.pth").mkdir()
    for pattern, names in (("no checkpoint file .*NAME.pth", ("missing", "folder")),
                           ("NAME.pth is not a PyTorch checkpoint, or is damaged", ("words", "empty", "cut")),
                           ("NAME.pth .*no weights under their names", ("tensor", "list", "numbers"))):
        for name in names:
            refused(pattern.replace("NAME", name), common.read_checkpoint, tmp_path / f"{name}.pth")


def test_pickled_checkpoints(tmp_path, monkeypatch):
    """They are refused, and the command that the error prints makes a file that loads."""
    monkeypatch.chdir(tmp_path)
    foreign = {"teacher": {"a": torch.ones(3)}, "args": argparse.Namespace(lr=1), "best": np.float64(3), "other": View(8)}
    layer = nn.Linear(2, 3)
    for content, expected in ((foreign, {"teacher": {"a": torch.ones(3)}}), (layer, layer.state_dict())):
        torch.save(content, "foreign.pth")
        with pytest.raises(InputError, match="^foreign.pth holds pickled Python objects.*") as caught:
            common.read_checkpoint("foreign.pth")
        exec(re.search(r'python -c "(.*)"', str(caught.value))[1], {})
        assert same(common.read_checkpoint("clean.pth"), expected)


def under(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


S, T = (perturbed(common.vit_nano(img_size=8, patch_size=4), seed).state_dict() for seed in (1, 2))
HEAD = {"head.mlp.0.weight": torch.ones(3, 3), "head.last_layer.weight_v": torch.ones(2)}
DINO = {"student": under("module.", {**under("backbone.", S), **HEAD}), "teacher": {**under("backbone.", T), **HEAD}, "epoch": 3}
OURS = {"meta": {"network": "teacher"}, "student": S, "teacher": T}
MOCO = {"epoch": 3, "arch": "vit_small", "state_dict": {"module.predictor.0.weight": torch.ones(3), **under(
    "module.base_encoder.", {**S, **HEAD}), **under("module.momentum_encoder.", {**T, **HEAD})}}
TIMM = {**S, "head.weight": torch.ones(2, 96), "head.bias": torch.ones(2)}
MASK = {"masked_embed": torch.zeros(1, 96)}
SDSSL = {"state_dict": {**under("student.net.", S), **under("teacher.net.", T), "student.projector.0.weight": torch.ones(2),
                        "predictor.0.weight": torch.ones(2)}}
SIMDIS = {"model": {**under("module.student.", {**S, "pred_s_dv.0.weight": torch.ones(2), "fc.0.weight": torch.ones(2)}),
                    **under("module.teacher.", T), **under("module.student_ema.", T)}}
RESNET = torchvision.models.resnet18().state_dict()
TRUNK = {key: value for key, value in RESNET.items() if not key.startswith("fc.")}
KEY_STYLES = {  # name: (checkpoint, the network asked for, the weights that must come out)
    "ours, the student": ({**OURS, "meta": {"network": "student"}}, None, S),
    "ours, the teacher": (OURS, None, T),
    "ours, asked for": (OURS, "student", S),
    "ours, a whole student": ({"student": {**under("backbone.", S), "projector.0.weight": torch.ones(2)}}, "student", S),
    "ours, compiled": ({"meta": {"network": "student"}, "student": under("_orig_mod.", S)}, None, S),
    "bare, with a mask token": ({**S, "mask_token": torch.zeros(1, 96)}, None, S),
    "DINO": (DINO, None, T),
    "DINO, its student": (DINO, "student", S),
    "DINO's released backbone": (S, None, S),
    "iBOT": ({**DINO, "teacher": {**under("backbone.", {**T, **MASK}), **HEAD}}, None, T),
    "iBOT's released teacher": ({"state_dict": {**T, **MASK, **HEAD}}, None, T),
    "MoCo v3": (MOCO, None, S),
    "MoCo v3, its teacher": (MOCO, "teacher", T),
    "timm": (TIMM, None, S),
    "DeiT": ({"model": TIMM}, None, S),
    "compiled, then distributed": (under("_orig_mod.module.", S), None, S),
    "compiled inside": ({"student": under("backbone._orig_mod.", S), "meta": {"network": "student"}}, None, S),
    "compiled in a model": (under("model._orig_mod.", S), None, S),
    "compiled block by block": ({key.replace("blocks.0.", "blocks.0._orig_mod."): value for key, value in S.items()}, None, S),
    "SDSSL's release": (SDSSL, None, S),
    "SDSSL's release, its teacher": (SDSSL, "teacher", T),
    "SimDis' release": (SIMDIS, None, S),
    "SimDis' release, its teacher": (SIMDIS, "teacher", T),
    "MAE, with its decoder": ({"model": {**S, "mask_token": torch.ones(1, 1, 7), "decoder_pos_embed": torch.ones(1, 5, 7),
                                         "decoder_blocks.0.norm1.weight": torch.ones(7)}}, None, S),
    "OpenMMLab, with a meta of its own": ({"meta": {"epoch": 3}, "state_dict": S}, None, S),
    "a meta that is a word": ({"meta": "a word", "state_dict": S}, None, S),
    "a meta that is nothing": ({"meta": None, "state_dict": S}, None, S),
    "torchvision, with its classifier": (RESNET, None, TRUNK),
    "MoCo v3's ResNet": ({"state_dict": under("module.base_encoder.", RESNET)}, None, TRUNK),
}


@pytest.mark.parametrize("style", KEY_STYLES)
def test_backbone_weights_of_every_key_style(style, tmp_path):
    """The backbone's weights load, bit-equal; heads and the like are left out."""
    checkpoint, network, expected = KEY_STYLES[style]
    torch.save(checkpoint, tmp_path / "file.pth")
    arch, size = ("resnet18", 64) if "conv1.weight" in expected else ("vit_nano", 8)
    backbone, _ = common.load_backbone(str(tmp_path / "file.pth"), arch, 4, size, network=network)
    assert same(backbone.state_dict(), expected)
    if style == "MAE, with its decoder":  # whose mask token is not that of a backbone which has one
        masked = common.vit_nano(img_size=8, patch_size=4, mask_token=True)
        common.start_from(masked, str(tmp_path / "file.pth"))
        assert same(dict(masked.state_dict(), mask_token=0), dict(expected, mask_token=0))


@pytest.mark.parametrize("pattern, weights", [
    (r"blocks\.1\.attn\.qkv\.weight", {key: value for key, value in S.items() if key != "blocks.1.attn.qkv.weight"}),
    ("extra", {**S, "extra": torch.ones(1)}),
    ("size mismatch for", common.vit_nano(img_size=8, patch_size=4, embed_dim=192).state_dict()),
    (r"patch_embed.*--patch_size", common.vit_nano(img_size=16, patch_size=8).state_dict()),
    ("missing", {}),
    ("--arch", {"fc1": torch.ones(1)}),
    (r"norm\.weight", {**S, "norm.weight": torch.ones(5)}),
    ("norm.weight does not hold", {**S, "norm.weight": [1.0] * 96}),
    ("norm.weight does not hold finite numbers", {**S, "norm.weight": torch.full((96,), math.nan)}),
    ("pos_embed", {**S, "pos_embed": torch.ones(3)}),
    ("pos_embed", {**S, "pos_embed": torch.zeros(1, 1 + 6, 96)}),
    ("reg_token", {**S, "reg_token": torch.ones(1, 4, 96)}),
    (r"blocks\.0\.ls1\.gamma", {**S, "blocks.0.ls1.gamma": torch.ones(96)}),
])
def test_load_weights_errors(pattern, weights):
    """Missing, unknown, misshapen and broken weights are named in one line, with the file."""
    refused(f"some.pth.*{pattern}", common.load_weights, common.vit_nano(img_size=8, patch_size=4), weights, "some.pth")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_files_of_another_size(tmp_path, dtype):
    """Of 16 pixels: an evaluation keeps that grid, --init makes the new one; in fp32, with positions as DINO's code has them."""
    source = perturbed(common.vit_nano(img_size=16, patch_size=4), size=0.3).to(dtype)
    path = str(tmp_path / "source.pth")
    torch.save(source.state_dict(), path)
    source.float().positions_as_dino = True
    evaluated, meta = common.load_backbone(path, "vit_nano", patch_size=4, img_size=8)
    started = common.vit_nano(img_size=8, patch_size=4).eval()
    common.start_from(started, path)
    assert evaluated.grid == (4, 4) and meta["img_size"] == 8 and started.grid == (2, 2)
    for model, size in ((evaluated, 16), (evaluated, 8), (evaluated, 24), (started, 8)):
        assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
        x = noise_images(2, 3, size, size)
        close(model(x), source(x))


def test_init_from_moco_v3(tmp_path):
    """Its ViT-S has 12 heads, which keys show or sine-cosine positions with x and y exchanged; it fits no other network."""
    def start(name, backbone, **options):
        common.start_from(common.create_backbone(backbone, 64, **options), str(tmp_path / f"{name}.pth"))

    ours = common.vit_small(img_size=64, depth=1, num_heads=12, pos_embed="sincos").state_dict()
    learnt, exchanged = {**ours, "pos_embed": torch.randn(1, 17, 384)}, ours["pos_embed"].roll(192, 2)
    moco = {"keys": {"state_dict": under("module.base_encoder.", learnt)}, "positions": {**ours, "pos_embed": exchanged},
            "half": {**ours, "pos_embed": exchanged.half()}}
    run = {"student": under("backbone.", ours), "meta": {"backbone": dict(num_heads=12)}}  # of sdssl.py --num_heads 12
    for name, content in {**moco, "ours": ours, "learnt": learnt, "run": run}.items():
        torch.save(content, tmp_path / f"{name}.pth")
    for name in moco:
        refused("12 heads: pass --num_heads 12", start, name, "vit_small", depth=1)
    refused("run.pth is a ViT of 12 heads", start, "run", "vit_small", depth=1)
    for name, heads in (("ours", None), ("learnt", None), ("run", 12)):
        start(name, "vit_small", depth=1, num_heads=heads)
    for arch in ("resnet18", "timm/test_vit"):
        refused("positions.pth does not fit this architecture", start, "positions", arch)


def test_vit_small_of_moco_v3_has_12_heads(tmp_path):
    """Its shapes are those of 6 heads, so nothing but the keys can tell; other files say it by --num_heads."""
    theirs = perturbed(timm.create_model("vit_small_patch16_224", img_size=32, num_heads=12, num_classes=0))
    x = noise_images(2, 3, 32, 32)
    torch.save({"state_dict": under("module.base_encoder.", theirs.state_dict())}, tmp_path / "moco.pth")
    torch.save(theirs.state_dict(), tmp_path / "bare.pth")
    for name, heads in (("moco", None), ("moco", 12), ("bare", 12)):
        backbone, meta = common.load_backbone(str(tmp_path / f"{name}.pth"), "vit_small", 16, 32, num_heads=heads)
        close(backbone(x), theirs(x))
        assert meta["backbone"]["num_heads"] == 12
    refused("moco.pth is MoCo v3's ViT-S of 12 heads: pass --arch vit_small",  # timm's own has 6
            common.load_backbone, str(tmp_path / "moco.pth"), "timm/vit_small_patch16_224")
    assert (common.load_backbone(str(tmp_path / "bare.pth"), "vit_small", 16, 32)[0](x) - theirs(x)).abs().max() > 1e-3


def test_load_backbone_round_trip(tmp_path):
    """Our checkpoint says what it is: the same outputs, frozen and in evaluation mode, with its normalisation."""
    options = dict(arch="vit_nano", img_size=16, patch_size=4)
    student, teacher = (perturbed(common.create_backbone(**options), seed) for seed in (1, 2))
    meta = {"backbone": options, "network": "teacher", "mean": [0.5] * 3, "std": [0.2] * 3}
    path, x = str(tmp_path / "checkpoint.pth"), noise_images(2, 3, 16, 16)
    torch.save({"meta": meta, "student": under("backbone.", student.state_dict()), "teacher": teacher.state_dict(), "step": 1}, path)
    for network, source in ((None, teacher), ("teacher", teacher), ("student", student)):
        backbone, found = common.load_backbone(path, network=network)
        assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
        assert torch.equal(backbone(x), source(x))
        assert found["backbone"] == options and found["img_size"] == 16
        assert list(found["mean"]) == [0.5] * 3 and list(found["std"]) == [0.2] * 3
    for pattern, wrong in (("vit_nano.*vit_tiny", {"arch": "vit_tiny"}), ("patch", {"patch_size": 8})):
        refused(pattern, common.load_backbone, path, **wrong)
    # bare weights need to be told
    torch.save(teacher.state_dict(), path)
    refused("--arch", common.load_backbone, path)
    backbone, found = common.load_backbone(path, "vit_nano", patch_size=4, img_size=16)
    assert torch.equal(backbone(x), teacher(x)) and tuple(found["mean"]) == common.MEAN and found["img_size"] == 16
    # a ResNet, whose stem goes by the image size
    resnet, options = common.create_backbone("resnet18", img_size=32), dict(arch="resnet18", img_size=32, patch_size=16)
    torch.save({"meta": {"backbone": options, "network": "student"}, "student": resnet.state_dict()}, path)
    backbone, _ = common.load_backbone(path)
    assert same(backbone.state_dict(), resnet.state_dict()) and not backbone.training


@pytest.mark.parametrize("name, options", [("vit_tiny_patch16_224", {"img_size": 64}), ("test_convnext", {})])
def test_weights_of_timm(name, options):
    """timm's outputs from its file, without the classifier, but with a norm below `head.`; our own file comes back whole."""
    theirs = perturbed(timm.create_model(name, **options))
    x = noise_images(2, 3, 64, 64)
    expected = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
    ours = common.create_backbone(f"timm/{name}", img_size=64).eval()
    common.load_weights(ours, common.backbone_weights(theirs.state_dict()), "timm's")
    assert torch.equal(ours(x), expected)
    saved = copy.deepcopy({"student": under("backbone.", ours.state_dict()), "meta": {"network": "student"}})
    assert not torch.allclose(perturbed(ours, seed=1)(x), expected, atol=1e-2)
    common.load_weights(ours, common.backbone_weights(saved), "ours")
    assert torch.equal(ours(x), expected)


@pytest.mark.parametrize("arch", ["vit_nano", "resnet18", "timm/test_vit", "timm/test_vit2", "timm/test_convnext", "timm/resnet10t",
                                  "timm/mobilenetv3_small_050", "timm/vit_relpos_small_patch16_224"])
def test_every_backbone_has_the_same_interface(arch):
    """What callers use of a backbone without asking which class it has; a timm model without layers by [CLS] says so."""
    backbone = common.distributed(common.create_backbone(arch, img_size=64).eval())
    x = noise_images(2, 3, 64, 64)
    y = backbone(x)
    assert y.shape == (2, backbone.embed_dim)
    assert (backbone.patch_size == 1) == (arch in ("resnet18", "timm/test_convnext", "timm/resnet10t", "timm/mobilenetv3_small_050"))
    if arch not in ("vit_nano", "resnet18", "timm/test_vit"):
        refused(r"if its own output is \[CLS\]", backbone, x, layers=True)
        return
    layers = backbone(x, layers=True)
    close(layers[-1], y)
    assert [layer.shape for layer in layers] == [(2, D) for D in backbone.layer_dims]
    if backbone.has_tokens:
        side = 64 // backbone.patch_size
        assert [tokens.shape for tokens in backbone.block_outputs(x)] == [(2, 1 + side**2, D) for D in backbone.layer_dims]
        for layer, (cls, patches) in zip(layers[-2:], backbone.tokens(x, 2), strict=True):
            close(cls, layer)
            assert patches.shape == (2, side, side, backbone.embed_dim)


def test_a_hub_that_cannot_be_reached_is_one_line_soon(monkeypatch):
    """No retries: without an answer only the cache is looked at."""
    import huggingface_hub

    ask = Mock(side_effect=urllib.error.URLError("Name or service not known"))
    monkeypatch.setattr("urllib.request.urlopen", ask)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    refused("cannot make timm/vit_tiny_patch16_224", common.create_backbone, "timm/vit_tiny_patch16_224", pretrained=True)
    assert huggingface_hub.constants.HF_HUB_OFFLINE and all(call.kwargs["timeout"] <= 5 for call in ask.call_args_list)


@pytest.mark.parametrize("pattern, mistake", [
    (r"30.*patch size 8", lambda: common.vit_nano(img_size=(32, 30), patch_size=8)),
    (r"30.*patch size 8", lambda: common.vit_nano(img_size=32, patch_size=8)(torch.zeros(1, 3, 32, 30))),
    (r"30.*patch size 8", lambda: common.vit_nano(img_size=32, patch_size=8)(torch.zeros(1, 3, 30, 32))),
    ("images of 20 pixels are not a multiple of patch size 16 of timm/vit_tiny_patch16_224",
     lambda: common.create_backbone("timm/vit_tiny_patch16_224", img_size=20)),
    ("images of 33 pixels are not a multiple of patch size 16 of timm/test_vit", lambda: common.create_backbone("timm/test_vit", 33)),
    ("--num_heads 5 .*96", lambda: common.vit_nano(img_size=32, patch_size=8, num_heads=5)),
    ("digitz.*digits", lambda: common.load_data("digitz")),
    ("vit_tinny", lambda: common.create_backbone("vit_tinny")),
    ("vit_nothing", lambda: common.create_backbone("timm/vit_nothing")),
    ("23 images.*24", lambda: ViewLoader(memory_data(), VIEWS, 24, 0, CPU)),
    ("has no teacher", lambda: common.backbone_weights({"student": S}, "teacher")),  # not silently the student
])
def test_mistakes_are_one_line(pattern, mistake):
    refused(pattern, mistake)


# ----------------------------------------------------------------------------------------------------------- monitors


def test_spread_of_known_features():
    """Isotropic Gaussians are spread evenly; equal rows not at all; r orthogonal directions have effective rank r."""
    ratio, rank = common.collapse_measures(noise_images(4000, 32))
    assert abs(ratio - 1) < 0.02 and 30 < rank <= 32
    assert common.collapse_measures(torch.ones(50, 1) @ noise_images(1, 16))[0] < 1e-5
    for r in (1, 2, 5):
        basis = torch.linalg.qr(noise_images(16, 16))[0][:r]
        z = torch.cat([basis, -basis]).repeat(4, 1) * torch.arange(1, 8 * r + 1)[:, None]  # of any length: they are normalised
        ratio, rank = common.collapse_measures(z)
        assert abs(rank - r) < 0.01 * r
        # each coordinate's variance is the mean square; together they are 1 over n / (n - 1)
        expected = (z / z.norm(dim=1, keepdim=True)).numpy().std(0, ddof=1).mean() * 4
        assert abs(ratio - expected) < 1e-4
    assert common.collapse_measures(torch.ones(8, 4))[1].isfinite()


def test_fp32_decorator():
    """Half inputs are raised, positional or named, and autocast is off inside; other dtypes and values pass through."""
    seen = []

    @common.fp32
    def loss(a, b, scale=1.0, c=None):
        """The name and docstring stay."""
        seen.append((a.dtype, b.dtype, c.dtype))
        return (a @ a.T).sum() * scale

    x = noise_images(16, 16)
    half = x.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x.T).dtype == torch.bfloat16
        result = loss(half, torch.arange(3), scale=2.0, c=x.half())
        assert seen == [(torch.float32, torch.int64, torch.float32)]
        assert_close(loss(x, x, c=x), (x.double() @ x.double().T).sum().float())  # not with products in bf16
        assert loss(x.double(), x, c=x).dtype == torch.float64
    assert_close(result, (half.float() @ half.float().T).sum() * 2)
    assert loss.__name__ == "loss" and "docstring" in loss.__doc__
    result.backward()
    assert half.grad.dtype == torch.bfloat16  # the caller's


@pytest.mark.parametrize("training", [True, False])
def test_knn_accuracy_disturbs_nothing(training):
    """Modes (of every module), parameters, buffers and the random state are as before; the accuracy is scikit-learn's."""
    from sklearn.neighbors import KNeighborsClassifier

    train, test = common.load_data("digits")
    train, test = train.subset(torch.arange(120)), test.subset(torch.arange(40))
    train.labels[:20] = -1  # unknown labels are no neighbours
    backbone = common.create_backbone("resnet18", img_size=8).train(training)
    backbone.layer1.train(not training)  # a part that is in another mode than the whole
    modes = [module.training for module in backbone.modules()]
    before, state = copy.deepcopy(backbone.state_dict()), torch.get_rng_state()
    accuracy = common.knn_accuracy(backbone, train, test, 8, CPU)
    assert same(backbone.state_dict(), before) and torch.equal(state, torch.get_rng_state())
    assert [module.training for module in backbone.modules()] == modes
    backbone.eval()
    with torch.no_grad():
        bank, queries = (backbone(tv.normalize(split.images.float() / 255, **IMAGENET)) for split in (train, test))
    theirs = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    theirs.fit(bank[20:], train.labels[20:])
    assert abs(accuracy - 100 * theirs.score(queries, test.labels)) <= 2.5 + 1e-6  # one query may sit on a tie
    assert common.knn_accuracy(backbone, train, None, 8, CPU) is None
    unlabelled = ImageData(torch.full((120,), -1), [], train.images)
    assert common.knn_accuracy(backbone, unlabelled, test, 8, CPU) is None


def test_knn_monitor_takes_a_spread_of_at_most_most_images():
    """A large data set is sampled evenly: the monitor sees `most` images of either split, over all classes of sorted data."""
    class Mean(nn.Module):
        def forward(self, x, layers=False):
            seen.append(x.mean((2, 3)))
            return seen[-1]

    labels = torch.arange(10).repeat_interleave(20)  # sorted by class, as folders are
    images = torch.zeros(200, 3, 8, 8, dtype=torch.uint8)
    images[:, 0] = 25 * labels[:, None, None]
    data = ImageData(labels, list(range(10)), images=images)
    for most, count in ((10_000, 400), (30, 60)):
        seen = []
        assert common.knn_accuracy(Mean(), data, data, 8, CPU, k=1, most=most) == 100
        assert len(torch.cat(seen)) == count and len(torch.cat(seen).unique(dim=0)) == 10


# ----------------------------------------------------------------- faults of the world around a run, restarts, several machines

# of sdssl.py
FLAGS = ["--hidden", 32, "--isd_hidden", 16, "--patch_size", 8, "--batch_size", 16, "--knn_every", 0, "--device", "cpu"]


@pytest.fixture
def train(tmp_path, capsys, monkeypatch):
    """train(*flags): sdssl.py in this process, without curves and k-NN, which take longer than its steps -> a finished process."""
    import sdssl

    monkeypatch.setattr(common.Run, "draw_curves", lambda self: None)
    monkeypatch.setattr(sdssl, "knn_accuracy", lambda *args, **options: None)

    def main(flags):
        sdssl.train(sdssl.parse_arguments([str(flag) for flag in (*FLAGS, "--output_dir", tmp_path / "run", *flags)]))
        sys.exit(0)

    return lambda *flags: finished(capsys, lambda: main(flags))


def test_weights_that_are_not_finite_are_not_saved(tmp_path, train, monkeypatch):
    """P6: a step can spoil the weights while the losses are finite, at the last step too; exit code 1, nothing written."""
    flags = ["--warmup_epochs", 0, "--lr", 0]
    assert train(*flags, "--max_steps", 1).returncode == 0
    good, original = (tmp_path / "run" / "checkpoint.pth").read_bytes(), torch.optim.AdamW.step

    def spoil(self, *arguments, **options):
        original(self, *arguments, **options)
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(math.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    result = train(*flags, "--max_steps", 2, "--resume")
    assert result.returncode == 1 and "weights of the student are not finite after step 2" in result.stdout
    assert (tmp_path / "run" / "checkpoint.pth").read_bytes() == good


def test_a_checkpoint_that_does_not_fit_its_run_is_one_line(tmp_path, train):
    """P7: networks or keys that are missing, no step; and another --dtype goes on, with a gradient scaler or without."""
    path = tmp_path / "run" / "checkpoint.pth"
    for step, dtype in enumerate(("fp32", "fp16", "bf16"), 1):
        assert train("--max_steps", step, "--resume", "--dtype", dtype).returncode == 0
    content = torch.load(path, weights_only=True)
    short = {name: value for name, value in content["student"].items() if "blocks.0.attn.qkv" not in name}
    headless = {name: value for name, value in content.items() if name != "teacher"}
    for broken, pattern in (({**content, "student": short}, "its student is not this run's"),
                            ({**content, "args": None}, "no run to resume"), (headless, "its teacher is not this run's")):
        torch.save(broken, path)
        assert_one_line_error(train("--max_steps", 4, "--resume"), pattern, "another --output_dir")


def test_other_images_are_not_resumed_with(tmp_path, train):
    """One image that is gone changes every permutation: --resume says so. The folder may move."""
    def resume(folder, step):
        return train("--data", folder, "--arch", "vit_nano", "--img_size", 16, "--epochs", 3, "--resume", "--max_steps", step)

    data = write_images(tmp_path / "data", [16] * 40)
    assert resume(data, 1).returncode == 0
    moved = data.rename(tmp_path / "moved")
    assert resume(moved, 2).returncode == 0
    (moved / "007.png").unlink()
    assert_one_line_error(resume(moved, 3), "its images were others: 40 images of 16 x 16.*now 39 images")
    write_images(moved, [17] * 40)
    assert_one_line_error(resume(moved, 3), "its images were others: 40 images of 16 x 16.*now 40 images of 17 x 17")


def test_a_rank_without_torchrun_is_one_line(train, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert_one_line_error(train(), "start with torchrun, or unset RANK")


def test_the_recipe_can_be_named(capsys):
    args = argparse.Namespace(recipe="cifar10", data="digits", img_size=None, lr=None, device="cpu", dtype="fp32")
    recipes = {"digits": {"lr": 1.0}, "cifar10": {"lr": 2.0}}
    common.apply_recipe(args, recipes, memory_data())
    assert args.lr == 2.0 and "recipe cifar10" in capsys.readouterr().out
    args.recipe = "cifar11"
    refused("unknown --recipe cifar11: use one of digits cifar10", common.apply_recipe, args, recipes, memory_data())


@pytest.mark.parametrize("data, img_size, lr", [("digits", 96, 1.0), ("cars", 64, 2.0), ("cars", 65, 3.0), ("cifar100", None, 2.0)])
def test_without_a_recipe_of_its_own_the_size_decides(data, img_size, lr):
    args = argparse.Namespace(recipe=None, data=data, img_size=img_size, lr=None, device="cpu", dtype="fp32")
    common.apply_recipe(args, {"digits": {"lr": 1.0}, "cifar10": {"lr": 2.0}, "imagenet": {"lr": 3.0}}, memory_data())
    assert args.lr == lr


@pytest.mark.parametrize("end, code, says", [
    (lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60)), 128 + signal.SIGTERM, "stopped by SIGTERM"),
    (Mock(side_effect=RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")), 1,
     "error: DataLoader worker (pid 7) is killed by signal: Killed."),
])
def test_an_end_outside_of_a_step_is_one_line(end, code, says, capsys, monkeypatch):
    """A signal in an evaluation, or before the first step; a worker that is dead: an exit code and no traceback."""
    monkeypatch.setattr(common, "signals", [])
    result = finished(capsys, end)
    assert (result.returncode, result.stderr.strip(), result.stdout) == (code, says, "")


@pytest.fixture
def endless(image_folder):
    """Flags of a run that lasts until --max_steps; on files, which spares its processes the import of scikit-learn."""
    return [*FLAGS, "--data", image_folder, "--arch", "vit_nano", "--img_size", 32, "--batch_size", 8, "--epochs", 2000,
            "--save_every", 1, "--log_every", 1, "--num_workers", 0]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the workers through Linux's /proc")
@pytest.mark.parametrize("machines", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_torchrun_restarts_after_a_worker_is_killed(machines, endless, tmp_path):
    """The run goes on by itself and ends as one that nothing happened to. Two machines' agents count different numbers of restarts."""
    flags = [*endless, "--max_steps", 12]
    outputs = [tmp_path / f"output{number}.txt" for number in range(machines)]
    torchrun = ["torch.distributed.run", f"--nnodes={machines}", f"--nproc_per_node={2 // machines}", "--max-restarts=2",
                "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--local_addr=127.0.0.1"]
    agents = [start_script(*torchrun, "sdssl.py", *flags, "--output_dir", tmp_path / "killed", outputs=(output, output))
              for output in outputs]
    deadline = time.time() + 180
    while not (tmp_path / "killed" / "checkpoint.pth").exists():
        assert time.time() < deadline
        time.sleep(0.05)
    workers = Path(f"/proc/{agents[-1].pid}/task/{agents[-1].pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    for agent, output in zip(agents, outputs, strict=True):
        agent.join(300)
        assert agent.exitcode == 0, output.read_text()[-3000:]
    assert run_script("sdssl.py", *flags, "--output_dir", tmp_path / "whole", processes=2).returncode == 0
    killed, whole = ([(record["step"], record["loss"]) for record in read_log(tmp_path / name) if "loss" in record]
                     for name in ("killed", "whole"))
    assert [step for step, _ in killed] == list(range(1, 13)) and killed == whole


@pytest.mark.parametrize("unlike", ["checkpoint", "images"])
def test_processes_that_see_different_files(unlike, endless, image_folder, tmp_path):
    """Two machines without a common file system: both say so in one line, instead of going on from different steps or images."""
    folders = {"0": image_folder, "1": image_folder}
    if unlike == "checkpoint":
        assert run_script("sdssl.py", *endless, "--max_steps", 2, "--output_dir", tmp_path / "0").returncode == 0
    else:
        folders["1"] = shutil.copytree(image_folder, tmp_path / "images")
        (folders["1"] / "train" / "cat" / "3.jpg").rename(folders["1"] / "train" / "cat" / "13.jpg")
    meeting, started = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}, {}
    for number, folder in folders.items():
        started[number] = start_script(
            "sdssl.py", *endless, "--data", folder, "--max_steps", 4, "--resume", "--output_dir", tmp_path / number,
            outputs=(os.devnull, tmp_path / f"{number}.txt"), environment={**meeting, "RANK": number, "LOCAL_RANK": number})
    for number, process in started.items():
        process.join(300)
        assert process.exitcode == 2 and "do not see the same images, or not" in (tmp_path / f"{number}.txt").read_text()


def test_a_file_system_without_locks(train, monkeypatch):
    """The run goes on, and says what it cannot notice."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "lockf", Mock(side_effect=OSError(38, "Function not implemented")))
    assert "file system without locks" in train("--max_steps", 1).stdout
