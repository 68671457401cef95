"""common.py against independent oracles: timm, torchvision, torch itself, or a loop written from the definition."""
import argparse
import copy
import io
import math
import os
import re
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from conftest import ROOT, SHARED, assert_one_line_error, finished, read_log, run_script, start_script
from PIL import Image
from torchvision.transforms.v2 import functional as tv

import common
from common import ImageData, InputError, View, ViewLoader

CPU = torch.device("cpu")


def perturbed(model, seed=0, size=0.05):
    """The model with every parameter moved by noise, so that no weight is at a value (0, 1) that would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def noise_images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same_tensors(a, b):
    """Two state dicts hold the same keys and bit-equal tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------------------------------------------------------- ViT

TIMM_VITS = [("vit_tiny", (32, 32), 8, {}), ("vit_small", (64, 32), 16, {"depth": 3})]


@pytest.mark.parametrize("name, size, patch, options", TIMM_VITS)
def test_vit_equals_timm(name, size, patch, options):
    """Our state dict loads strictly into timm's model, theirs into ours, and all outputs agree."""
    timm = pytest.importorskip("timm")
    options = dict(img_size=size, patch_size=patch, **options)
    ours = perturbed(getattr(common, name)(**options))
    theirs = timm.create_model(f"{name}_patch16_224", num_classes=0, **options).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = noise_images(2, 3, *size)
    with torch.no_grad():
        close = dict(rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours(x), theirs(x), **close)
        torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x), **close)
        layers = theirs.get_intermediate_layers(x, n=3, norm=True, return_prefix_tokens=True)
        for mine, (patches, prefix) in zip(ours.get_intermediate_layers(x, 3), layers, strict=True):
            torch.testing.assert_close(mine, torch.cat([prefix, patches], 1), **close)
    # and back
    common.load_weights(ours, perturbed(theirs, seed=1).state_dict(), "timm")
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), **close)


def test_vit_layers_end_with_the_output():
    """forward(layers=True) gives [CLS] of every block through the final norm; the last is forward itself."""
    vit = perturbed(common.vit_nano(img_size=16, patch_size=4))
    x = noise_images(2, 3, 16, 16)
    layers = vit(x, layers=True)
    assert len(layers) == len(vit.blocks) == len(vit.layer_dims) and vit.layer_dims == [y.shape[1] for y in layers]
    torch.testing.assert_close(layers[-1], vit(x))
    for mine, tokens in zip(layers, vit.get_intermediate_layers(x, len(vit.blocks)), strict=True):
        torch.testing.assert_close(mine, tokens[:, 0])
    assert not torch.allclose(layers[0], layers[-1], atol=1e-2)


def test_last_selfattention_is_an_explicit_softmax():
    """Rows sum to one and equal exp(q k / sqrt(d)) over its sum, written as loops over heads and rows."""
    vit = perturbed(common.vit_nano(img_size=8, patch_size=4), size=0.2)
    seen = []
    hook = vit.blocks[-1].norm1.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    x = noise_images(2, 3, 8, 8)
    vit(x)
    hook.remove()
    with torch.no_grad():
        attention = vit.get_last_selfattention(x)  # (B, heads, T, T)
    qkv = vit.blocks[-1].attn.qkv
    D, d = 96, 32
    assert attention.shape == (2, 3, 5, 5)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 3, 5))
    for b in range(2):
        for head in range(3):
            q_rows, k_rows = slice(head * d, (head + 1) * d), slice(D + head * d, D + (head + 1) * d)
            q = seen[0][b] @ qkv.weight[q_rows].T + qkv.bias[q_rows]
            k = seen[0][b] @ qkv.weight[k_rows].T + qkv.bias[k_rows]
            for i in range(5):
                e = torch.stack([torch.exp(q[i] @ k[j] / math.sqrt(d)) for j in range(5)])
                torch.testing.assert_close(attention[b, head, i], e / e.sum(), rtol=1e-4, atol=1e-5)


def first_block_input(vit, *args, **kwargs):
    seen = []
    hook = vit.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    vit.forward_features(*args, **kwargs)
    hook.remove()
    return seen[0]


def test_masked_patches_become_the_mask_token_before_positions():
    """By hand: token n is (mask token if masked, else the projected patch) + position n; [CLS] is never masked."""
    vit = perturbed(common.vit_nano(img_size=(8, 12), patch_size=4, mask_token=True), size=0.3)
    assert vit.state_dict().keys() - common.vit_nano(img_size=8, patch_size=4).state_dict().keys() == {"mask_token"}
    x = noise_images(2, 3, 8, 12)
    mask = torch.tensor([[1, 0, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0]]).bool()
    tokens = first_block_input(vit, x, mask)
    weight, bias = vit.patch_embed.proj.weight.flatten(1), vit.patch_embed.proj.bias
    for b in range(2):
        torch.testing.assert_close(tokens[b, 0], (vit.cls_token[0, 0] + vit.pos_embed[0, 0]))
        for n in range(6):
            row, column = divmod(n, 3)
            patch = x[b, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(-1)
            token = vit.mask_token[0] if mask[b, n] else weight @ patch + bias
            torch.testing.assert_close(tokens[b, 1 + n], token + vit.pos_embed[0, 1 + n], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(vit.forward_features(x, torch.zeros(2, 6, dtype=torch.bool)), vit.forward_features(x))
        assert not torch.allclose(vit.forward_features(x, mask), vit.forward_features(x), atol=1e-3)


@pytest.mark.parametrize("built, given", [((8, 32), (16, 16)), ((16, 16), (24, 8)), ((16, 16), (12, 20))])
def test_positions_are_resized_whenever_the_grid_differs(built, given):
    """Equal to a model of the new size that was given F.interpolate's positions; (2, 8) to (4, 4) has the same token count."""
    vit = perturbed(common.vit_nano(img_size=built, patch_size=4), size=0.3)
    other = common.vit_nano(img_size=given, patch_size=4).eval()
    positions = vit.pos_embed.detach()
    old, new = [n // 4 for n in built], [n // 4 for n in given]
    grid = positions[0, 1:].T.reshape(1, 96, *old)
    resized = F.interpolate(grid, new, mode="bicubic", align_corners=False)[0].reshape(96, -1).T
    weights = {**vit.state_dict(), "pos_embed": torch.cat([positions[:, :1], resized[None]], 1)}
    other.load_state_dict(weights)
    x = noise_images(2, 3, *given)
    with torch.no_grad():
        torch.testing.assert_close(vit.forward_features(x), other.forward_features(x), rtol=1e-4, atol=1e-4)
        if old[0] * old[1] == new[0] * new[1]:  # and not the old positions, which would fit
            other.load_state_dict(vit.state_dict())
            assert not torch.allclose(vit.forward_features(x), other.forward_features(x), atol=1e-2)


@pytest.mark.parametrize("size", [(8, 8), (12, 8)])
def test_gradient_reaches_learnt_positions_only(size):
    """Learnt positions are trained, resized ones too; sine-cosine positions stay fixed."""
    for kind in ("learnt", "sincos"):
        vit = common.vit_nano(img_size=8, patch_size=4, pos_embed=kind)
        vit(noise_images(2, 3, *size)).square().sum().backward()
        if kind == "learnt":
            assert (vit.pos_embed.grad.abs().sum(-1) > 0).all()
        else:
            assert vit.pos_embed.grad is None and not vit.pos_embed.requires_grad
        assert vit.patch_embed.proj.weight.grad.abs().sum() > 0


def test_sincos_positions_by_loop():
    """Zero for [CLS]; for a patch in row y and column x: sin x w, cos x w, sin y w, cos y w with w = 10000^(-i / (D/4))."""
    vit = common.vit_nano(img_size=(8, 12), patch_size=4, embed_dim=24, num_heads=3, pos_embed="sincos")
    positions = vit.pos_embed[0]
    assert torch.equal(positions[0], torch.zeros(24))
    for y in range(2):
        for x in range(3):
            expected = [f(c / 10000 ** (i / 6)) for c, f in ((x, math.sin), (x, math.cos), (y, math.sin), (y, math.cos))
                        for i in range(6)]
            torch.testing.assert_close(positions[1 + 3 * y + x], torch.tensor(expected), atol=1e-6, rtol=0)
    with pytest.raises(InputError, match="30"):
        common.vit_nano(img_size=8, patch_size=4, embed_dim=30, num_heads=3, pos_embed="sincos")


def test_patch_size_that_does_not_divide_is_named():
    """One line that names image and patch size, when built and when called."""
    with pytest.raises(InputError, match=r"30.*patch size 8"):
        common.vit_nano(img_size=(32, 30), patch_size=8)
    vit = common.vit_nano(img_size=32, patch_size=8)
    for size in ((32, 30), (30, 32)):
        with pytest.raises(InputError, match=r"30.*patch size 8"):
            vit(torch.zeros(1, 3, *size))
    with pytest.raises(InputError, match="96"):
        common.vit_nano(img_size=32, patch_size=8, num_heads=5)
    with pytest.raises(InputError, match="vit_tinny"):
        common.create_backbone("vit_tinny")


def test_stochastic_depth():
    """Rate rises linearly to the last block; a kept branch is scaled by 1 / (1 - rate), so that the mean is the full model."""
    torch.manual_seed(0)
    vit = common.vit_nano(img_size=8, patch_size=4, depth=3, drop_path=0.4)
    image, B = noise_images(1, 3, 8, 8), 40
    x = image.expand(B, -1, -1, -1)
    noise = torch.full((B, 6), 0.999)  # two numbers a block; a branch is dropped below its block's rate
    noise[:, 2] = 0.1999 + 0.0002 * (torch.arange(B) % 2)  # the second block's attention: rate 0.2
    noise[:, 4] = (torch.arange(B) + 0.5) / B  # the last block's: rate 0.4
    with torch.no_grad():
        for block in vit.blocks:
            block.mlp.fc2.weight.zero_()  # only attention acts
        tokens = first_block_input(vit.eval(), image)
        first = tokens + vit.blocks[0].attn(vit.blocks[0].norm1(tokens))
        branch = vit.blocks[1].attn(vit.blocks[1].norm1(first))
        assert torch.equal(vit.forward_features(x, noise=noise), vit.forward_features(x))  # no effect in evaluation
        trained = vit.train().forward_features(x, noise=noise)
        for row in range(B):
            second = first if noise[row, 2] < 0.2 else first + branch / 0.8
            last = vit.blocks[2].attn(vit.blocks[2].norm1(second)) / 0.6
            expected = vit.norm(second if noise[row, 4] < 0.4 else second + last)
            torch.testing.assert_close(trained[row], expected[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(trained, vit.forward_features(x, noise=noise))  # noise decides everything
        assert not torch.equal(trained, vit.forward_features(x, noise=noise.flip(0)))
        assert not torch.equal(vit.forward_features(x), vit.forward_features(x))  # drawn where it is absent


@pytest.mark.parametrize("branch", [0, 1])
def test_stochastic_depth_keeps_the_mean(branch):
    """Over evenly spread noise, the mean of a block that is linear in its one branch is the block without drops."""
    torch.manual_seed(0)
    vit = common.vit_nano(img_size=8, patch_size=4, depth=2, drop_path=0.4)
    vit.norm = nn.Identity()
    image, noise = noise_images(1, 3, 8, 8), torch.full((20, 4), 0.999)
    noise[:, 2 + branch] = (torch.arange(20) + 0.5) / 20
    with torch.no_grad():
        silenced = vit.blocks[1].mlp.fc2 if branch == 0 else vit.blocks[1].attn.proj
        silenced.weight.zero_()
        trained = vit.train().forward_features(image.expand(20, -1, -1, -1), noise=noise)
        torch.testing.assert_close(trained.mean(0), vit.eval().forward_features(image)[0], rtol=1e-4, atol=1e-4)
        assert len((1000 * trained[:, 1]).round().unique(dim=0)) == 2  # kept or dropped


# ------------------------------------------------------------------------------------------------------------- ResNet


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_equals_torchvision(name):
    """Strict loads both ways, equal outputs in evaluation and in training, and four pooled stages."""
    torch.manual_seed(0)
    ours, theirs = common.create_backbone(name, img_size=64), getattr(torchvision.models, name)()
    theirs.fc = nn.Identity()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = noise_images(4, 3, 32, 32)
    stages = []
    for stage in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
        stage.register_forward_hook(lambda module, inputs, output: stages.append(output.mean(-1).mean(-1)))
    with torch.no_grad():
        for training in (True, False):
            stages.clear()
            expected = theirs.train(training)(x)
            torch.testing.assert_close(ours.train(training)(x), expected, rtol=1e-4, atol=1e-4)
            theirs.load_state_dict(ours.state_dict())
    layers = ours(x, layers=True)
    assert ours.layer_dims == [y.shape[1] for y in layers] and ours.embed_dim == layers[-1].shape[1]
    for mine, stage in zip(layers, stages, strict=True):
        torch.testing.assert_close(mine, stage, rtol=1e-4, atol=1e-4)


def test_resnet_small_stem():
    """Under 64 pixels: a 3x3 stride-1 convolution and no pooling, so that stage one keeps the image's size."""
    for size, expected in ((32, 32), (63, 63), (64, 16)):
        resnet, seen = common.create_backbone("resnet18", img_size=size).eval(), []
        resnet.layer1.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0].shape))
        with torch.no_grad():
            resnet(torch.zeros(1, 3, size, size))
        assert seen == [(1, 64, expected, expected)]
        assert resnet.conv1.kernel_size == ((3, 3) if size < 64 else (7, 7))


# -------------------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("out", [5, 16, 40])
def test_crop_and_resize_equals_torchvision(out):
    """torchvision's antialiased resized_crop, down and up, boxes of one pixel, at the borders and of the whole image."""
    images = torch.rand(8, 3, 24, 30, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[0, 0, 24, 30], [0, 0, 7, 9], [17, 21, 7, 9], [23, 29, 1, 1], [3, 4, 11, 13], [0, 10, 24, 3],
                          [10, 0, 3, 30], [5, 6, 16, 16]], dtype=torch.float32)
    views = common.crop_and_resize(images, boxes, out)
    assert views.shape == (8, 3, out, out)
    for image, box, view in zip(images, boxes.int().tolist(), views, strict=True):
        torch.testing.assert_close(view, tv.resized_crop(image, *box, [out, out], antialias=True), rtol=0, atol=2e-5)


@pytest.mark.parametrize("height, width, scale", [(64, 64, (0.08, 1.0)), (64, 64, (0.2, 1.0)), (50, 90, (0.08, 0.4)),
                                                  (8, 8, (0.2, 1.0))])
def test_crop_boxes(height, width, scale):
    """Whole pixels inside the image, area and aspect in range up to rounding, every position possible."""
    boxes = common.crop_boxes(common.draw(0, 0, 0, 4000, common.DRAWS), height, width, scale)
    assert torch.equal(boxes, boxes.round())
    top, left, h, w = boxes.unbind(1)
    assert (h >= 1).all() and (w >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()
    slack = 0.5 * (h + w) + 0.25  # rounding both sides moves the area by this much
    assert (h * w >= scale[0] * height * width - slack).all() and (h * w <= scale[1] * height * width + slack).all()
    assert ((w + 0.5) / (h - 0.5) >= 3 / 4).all() and ((w - 0.5) / (h + 0.5) <= 4 / 3).all()
    assert top.min() == left.min() == 0 and (top + h).max() == height and (left + w).max() == width


def test_crop_boxes_have_torchvisions_distribution():
    """Means and quantiles of area, aspect and position are those of RandomResizedCrop, within sampling error."""
    torch.manual_seed(0)
    image, n = torch.zeros(3, 64, 64), 4000
    get_params = torchvision.transforms.RandomResizedCrop.get_params
    theirs = torch.tensor([get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    ours = common.crop_boxes(common.draw(0, 0, 0, n, common.DRAWS), 64, 64, (0.2, 1.0))
    for of in (lambda b: b[:, 2] * b[:, 3] / 64**2, lambda b: (b[:, 3] / b[:, 2]).log(), lambda b: (b[:, 0] + b[:, 2] / 2) / 64,
               lambda b: (b[:, 1] + b[:, 3] / 2) / 64, lambda b: b[:, 0] / 64):
        a, b = of(theirs.float()), of(ours)
        error = 4 * (a.std() ** 2 / n + b.std() ** 2 / n) ** 0.5  # four standard errors
        assert (a.mean() - b.mean()).abs() < error and (a.std() / b.std() - 1).abs() < 0.06
        q = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
        assert (a.quantile(q) - b.quantile(q)).abs().max() < 0.05 * (a.max() - a.min())
    assert 0.5 < (ours[:, 2] * ours[:, 3]).mean() / 64**2 < 0.6  # uniform in (0.2, 1), less what does not fit


def test_crop_boxes_fall_back_to_the_middle():
    """Where no aspect in range has the area, and for sizes that differ by image: the box of torchvision."""
    u = common.draw(0, 0, 0, 6, common.DRAWS)
    height, width = torch.tensor([10, 200, 10, 1, 64, 64]), torch.tensor([200, 10, 300, 90, 64, 64])
    boxes = common.crop_boxes(u, height, width, (0.9, 1.0))
    theirs = [torchvision.transforms.RandomResizedCrop.get_params(torch.zeros(3, h, w), [0.9, 1.0], [3 / 4, 4 / 3])
              for h, w in zip(height[:4].tolist(), width[:4].tolist(), strict=True)]
    assert boxes[:4].tolist() == [list(box) for box in theirs]
    assert (boxes[4:, 2:].prod(1) > 0.85 * 64**2).all()


def test_views_share_no_memory():
    """A view that keeps the image whole has a tensor of its own, which another view's augmentation does not touch."""
    data = memory_data(4)
    plain = View(20, scale=(1, 1), flip=0)
    (_, (x1, x2), index), = ViewLoader(data, [View(20, scale=(1, 1), flip=0, solarize=1.0), plain], 4, 0, CPU).steps(0, 1)
    torch.testing.assert_close(x2, tv_normalize(data.images[index].float() / 255))
    assert not torch.equal(x1, x2)


# the last ten of a view's numbers, in the order in which `augment` reads them
NUMBERS = ("flip", "p_jitter", "brightness", "contrast", "saturation", "hue", "grey", "blur", "sigma", "solarize")


def numbers(rows, **values):
    """Uniform numbers for `augment`: 0.5 everywhere but where said (a number or one for each row)."""
    u = torch.full((rows, common.DRAWS), 0.5)
    for name, value in values.items():
        u[:, NUMBERS.index(name) - len(NUMBERS)] = torch.as_tensor(value)
    return u


def tv_normalize(x, mean=common.MEAN, std=common.STD):
    return tv.normalize(x, list(mean), list(std))


def denormalized(x):
    """By torchvision: the ImageNet mean and standard deviation undone."""
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    return tv.normalize(x, [-m / s for m, s in zip(mean, std, strict=True)], [1 / s for s in std])


def pictures(rows=4, size=24):
    """Random smooth colour pictures with values from 0 to 1."""
    x = torch.rand(rows, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return F.interpolate(x, (size, size), mode="bilinear")


def wide_blur(x, u):
    sigma = 0.1 + 1.9 * u  # uniform in (0.1, 2)
    return tv.gaussian_blur(x, [2 * (x.shape[-1] - 1) - 1] * 2, [sigma, sigma])


PER_ROW = torch.tensor([0.05, 0.35, 0.7, 0.95])
JITTER = {"brightness": tv.adjust_brightness, "contrast": tv.adjust_contrast, "saturation": tv.adjust_saturation}
ALONE = [
    # name, view, numbers, what torchvision does to one image whose number is u
    ("nothing", View(24, flip=0), {}, lambda x, u: x),
    ("flip", View(24, flip=1.0), {}, lambda x, u: tv.horizontal_flip(x)),
    *[(name, View(24, flip=0, jitter=tuple(0.8 * (name == other) for other in NUMBERS[2:6]), p_jitter=1.0), {name: PER_ROW},
       lambda x, u, adjust=adjust: adjust(x, 1 + 0.8 * (2 * u - 1))) for name, adjust in JITTER.items()],
    ("hue", View(24, flip=0, jitter=(0, 0, 0, 0.4), p_jitter=1.0), {"hue": PER_ROW},
     lambda x, u: tv.adjust_hue(x, 0.4 * (2 * u - 1))),
    ("grey", View(24, flip=0, grey=1.0), {}, lambda x, u: tv.rgb_to_grayscale(x, 3)),
    ("blur", View(24, flip=0, blur=1.0), {"sigma": PER_ROW}, wide_blur),
    ("solarize", View(24, flip=0, solarize=1.0), {}, lambda x, u: tv.solarize(x, 128 / 255)),
]


@pytest.mark.parametrize("name, view, values, oracle", ALONE, ids=[case[0] for case in ALONE])
def test_each_augmentation_alone_equals_torchvision(name, view, values, oracle):
    """One operation acts, with a known factor for each image; the rest leaves the image alone."""
    x = pictures()
    result = common.augment(x.clone(), view, numbers(4, **values), [0, 1, 2, 3])
    factors = next(iter(values.values()), PER_ROW).tolist()
    expected = torch.stack([oracle(image, u) for image, u in zip(x, factors, strict=True)])
    torch.testing.assert_close(result, expected, rtol=0, atol=3e-5)
    assert (name != "nothing") == bool((result - x).abs().max() > 0.05)  # it is seen


def test_augmentations_in_sequence_equal_torchvision():
    """Flip, the four jitters in the given order, grey, blur, solarize: the same as torchvision's functions one after another."""
    x = pictures()
    view = View(24, flip=0.6, jitter=(0.4, 0.4, 0.2, 0.1), p_jitter=0.8, grey=0.2, blur=0.5, solarize=0.2)
    u = torch.rand(4, common.DRAWS, generator=torch.Generator().manual_seed(3))
    u[:, -len(NUMBERS) :] = u[:, -len(NUMBERS) :] ** 1.5  # more of everything happens
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        result = common.augment(x.clone(), view, u, order)
        for i in range(4):
            draws = dict(zip(NUMBERS, u[i, -len(NUMBERS) :].tolist(), strict=True))
            y = x[i]
            y = tv.horizontal_flip(y) if draws["flip"] < 0.6 else y
            for operation in order:
                if draws["p_jitter"] < 0.8:
                    amount = view.jitter[operation] * (2 * draws[NUMBERS[2 + operation]] - 1)
                    adjust = (*JITTER.values(), tv.adjust_hue)[operation]
                    y = adjust(y, amount if operation == 3 else 1 + amount)
            y = tv.rgb_to_grayscale(y, 3) if draws["grey"] < 0.2 else y
            y = wide_blur(y, draws["sigma"]) if draws["blur"] < 0.5 else y
            y = tv.solarize(y, 128 / 255) if draws["solarize"] < 0.2 else y
            torch.testing.assert_close(result[i], y, rtol=0, atol=1e-4)


def changed(x, y):
    return (y - x).abs().amax((1, 2, 3)) > 1e-4


@pytest.mark.parametrize("name, view, p, happened", [
    ("flip", View(6, flip=0.3), 0.3, changed),
    ("grey", View(6, flip=0, grey=0.2), 0.2, lambda x, y: (y[:, 0] - y[:, 1]).abs().amax((1, 2)) < 1e-4),
    ("blur", View(6, flip=0, blur=0.1), 0.1, lambda x, y: (y - x).abs().amax((1, 2, 3)) > 0),
    ("solarize", View(6, flip=0, solarize=0.2), 0.2, changed),
    ("jitter", View(6, flip=0, jitter=(0.4, 0.4, 0.2, 0.1), p_jitter=0.8), 0.8, changed),
])
def test_augmentations_happen_with_their_probability(name, view, p, happened):
    """Over 5,000 images, within four standard errors."""
    n = 5000
    x = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0)).expand(n, -1, -1, -1).clone()
    result = common.augment(x.clone(), view, common.draw(0, 7, 1, n, common.DRAWS), [0, 1, 2, 3])
    share = happened(x, result).double().mean().item()
    assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / n), share


def test_every_image_has_parameters_of_its_own():
    """One image a hundred times: all its jittered copies differ, and strength covers the range evenly."""
    x = torch.full((100, 3, 8, 8), 0.3)
    view = View(8, flip=0, jitter=(0.4, 0, 0, 0), p_jitter=1.0)
    y = common.augment(x, view, common.draw(0, 0, 0, 100, common.DRAWS), [0, 1, 2, 3])[:, 0, 0, 0] / 0.3
    assert len(y.unique()) == 100 and 0.6 <= y.min() < 0.65 and 1.35 < y.max() <= 1.4001
    assert abs(y.mean() - 1) < 4 * 0.8 / math.sqrt(12 * 100)


def test_views_of_byol_are_asymmetric():
    """Blur always and solarize never in the first view, rarely and sometimes in the second; no blur for small images."""
    first, second = common.byol_views(32)
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    assert first.p_jitter == second.p_jitter == 0.8 and first.size == second.size == 32
    assert all(view.blur == 0 for view in common.byol_views(32, blur=False))


def test_normalize():
    """torchvision's normalize with ImageNet's constants, and with others."""
    x = pictures()
    torch.testing.assert_close(tv_normalize(x), tv.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(tv_normalize(x, (0.5,) * 3, (0.25,) * 3), (x - 0.5) / 0.25)


def test_draw_is_a_pure_function():
    """The same arguments give the same numbers whatever else was drawn; another seed, step or stream gives unrelated ones."""
    a = common.draw(3, 5, 1, 400, 32)
    torch.manual_seed(9)
    np.random.seed(9)
    assert torch.equal(a, common.draw(3, 5, 1, 400, 32)) and a.dtype == torch.float32 and a.shape == (400, 32)
    assert a.min() >= 0 and a.max() < 1 and abs(a.mean() - 0.5) < 4 / math.sqrt(12 * a.numel())
    for others in ((4, 5, 1), (3, 6, 1), (3, 5, 2), (5, 3, 1), (1, 5, 3)):
        b = common.draw(*others, 400, 32)
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(a.numel())


# -------------------------------------------------------------------------------------------------------- view loader

VIEWS = common.byol_views(16)


def memory_data(n=23, size=20):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    return ImageData(torch.arange(n) % 3, [0, 1, 2], images=images)


def write_images(folder, sizes, suffix="png", seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for i, size in enumerate(sizes):
        height, width = size if isinstance(size, tuple) else (size, size)
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i:03d}.{suffix}")
    return folder


def loaded(data, start=0, stop=6, batch=6, seed=0, workers=0):
    loader = ViewLoader(data, VIEWS, batch, seed, CPU, num_workers=workers)
    return [(step, [view.clone() for view in views], index.clone()) for step, views, index in loader.steps(start, stop)]


def assert_same_batches(a, b):
    for (step_a, views_a, index_a), (step_b, views_b, index_b) in zip(a, b, strict=True):
        assert step_a == step_b and torch.equal(index_a, index_b)
        assert len(views_a) == len(views_b) and all(map(torch.equal, views_a, views_b))


@pytest.fixture(params=["memory", "files"])
def samples(request, tmp_path):
    """23 images: tensors in memory, or PNG files of several sizes."""
    if request.param == "memory":
        return memory_data()
    return common.load_data(str(write_images(tmp_path / "pictures", [(20 + i % 3, 24) for i in range(23)])))[0]


def test_loader_starts_anywhere(samples):
    """Starting at step s gives what skipping s steps gives, bit-equal: mid-epoch, at an epoch's end and beyond it."""
    everything = loaded(samples, 0, 7)  # 3 steps an epoch
    assert [step for step, _, _ in everything] == list(range(7))
    for start in (1, 3, 5):
        assert_same_batches(loaded(samples, start, 7), everything[start:])
    assert loaded(samples, 7, 7) == []
    views = everything[0][1]
    assert len(views) == 2 and all(view.shape == (6, 3, 16, 16) and view.dtype == torch.float32 for view in views)
    assert not torch.allclose(views[0], views[1], atol=0.1)


def test_loader_epochs_are_permutations(samples):
    """No sample twice in an epoch; epochs and seeds differ, in samples and in augmentations."""
    batches = loaded(samples, 0, 6)
    for epoch in (batches[:3], batches[3:]):
        rows = torch.cat([index for _, _, index in epoch])
        assert len(rows.unique()) == 18 and rows.min() >= 0 and rows.max() < 23
    first, second = (torch.cat([index for _, _, index in epoch]) for epoch in (batches[:3], batches[3:]))
    assert not torch.equal(first, second)
    other = loaded(samples, 0, 3, seed=1)
    assert not torch.equal(first, torch.cat([index for _, _, index in other]))
    # the same image seen twice is cropped differently
    everything = memory_data(6)
    everything.images[:] = everything.images[:1]
    (_, one, _), (_, two, _) = loaded(everything, 0, 2)
    assert len(torch.cat([one[0], two[0]]).flatten(1).unique(dim=0)) == 12


def test_loader_workers_change_nothing(tmp_path):
    """Files decoded by two workers or by none: the same bits."""
    data = common.load_data(str(write_images(tmp_path, [(20 + i % 3, 24) for i in range(13)])))[0]
    assert data.images is None
    assert_same_batches(loaded(data, 0, 5, batch=4, workers=2), loaded(data, 0, 5, batch=4))


def test_loader_views_are_the_crops_of_the_images():
    """Without augmentation: each view is torchvision's resized crop of the image that `index` names."""
    data = memory_data(8)
    loader = ViewLoader(data, [View(16, flip=0)], 4, 0, CPU)
    for step, (view,), index in loader.steps(0, 2):
        boxes = common.crop_boxes(common.draw(0, step, 0, 4, common.DRAWS), 20, 20, (0.08, 1.0)).int().tolist()
        for row, box, crop in zip(index, boxes, view, strict=True):
            expected = tv.resized_crop(data.images[row].float() / 255, *box, [16, 16], antialias=True)
            torch.testing.assert_close(denormalized(crop), expected, rtol=0, atol=2e-5)


def test_files_and_memory_give_the_same_views(tmp_path):
    """The two paths differ by the rounding of the files' crops to uint8 only."""
    data = common.load_data(str(write_images(tmp_path, [20] * 8)))[0]
    assert data.images is not None
    files = ImageData(data.labels, [], paths=data.paths)
    views = [View(16, flip=0.5, jitter=(0.4, 0.4, 0.2, 0), p_jitter=0.8)]
    pairs = (ViewLoader(source, views, 4, 0, CPU).steps(0, 2) for source in (data, files))
    for (_, (a,), i), (_, (b,), j) in zip(*pairs, strict=True):
        assert torch.equal(i, j)
        assert (denormalized(a) - denormalized(b)).abs().max() < 2.5 / 255


def test_loader_refuses_what_it_cannot_do(monkeypatch):
    """Fewer images than a batch, and a batch that the processes do not divide."""
    with pytest.raises(InputError, match="23 images.*24"):
        ViewLoader(memory_data(), VIEWS, 24, 0, CPU)
    monkeypatch.setattr(common, "world_size", lambda: 4)
    with pytest.raises(InputError, match="6.*4 processes"):
        ViewLoader(memory_data(), VIEWS, 6, 0, CPU)


LOADING_SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import torch
import common

def main():
    data, _ = common.load_data(sys.argv[1])
    loader = common.ViewLoader(data, [common.View(16)], 4, 0, torch.device("cpu"), num_workers=int(sys.argv[2]))
    for _ in loader.steps(0, 3):
        pass

if __name__ == "__main__":
    common.launch(main)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_one_line_that_names_it(tmp_path, workers):
    """Exit code 2 and no traceback, from the main process and through a worker."""
    folder = write_images(tmp_path / "pictures", [(20 + i % 3, 24) for i in range(12)], "jpg")
    broken = folder / "011.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    script = tmp_path / "script.py"
    script.write_text(LOADING_SCRIPT.format(root=str(ROOT)))
    assert_one_line_error(run_script(script, folder, workers, cwd=tmp_path), r"011\.jpg", "truncated")
    if workers:  # nothing else is wrong with the script
        broken.unlink()
        assert run_script(script, folder, workers, cwd=tmp_path).returncode == 0


# --------------------------------------------------------------------------------------------------------------- data


def test_digits_are_split_80_20():
    """All of scikit-learn's digits, once, scaled from 0..16 to 0..255, each class in the same share of both splits."""
    from sklearn.datasets import load_digits

    train, test = common.load_data("digits")
    assert (len(train), len(test)) == (1437, 360) and train.labelled and train.image_size() == (8, 8)
    for split in (train, test):
        assert split.images.dtype == torch.uint8 and split.images.shape[1:] == (3, 8, 8) and split.labels.dtype == torch.int64
        assert torch.equal(split.images[:, 0], split.images[:, 2])
        counts = split.labels.bincount(minlength=10) / len(split)
        assert counts.min() > 0.09 and counts.max() < 0.11
    digits = load_digits()
    expected = sorted((int(label), [round(v * 255 / 16) for v in image.flatten().tolist()])
                      for label, image in zip(digits.target, digits.images, strict=True))
    found = sorted((label, image) for split in (train, test)
                   for label, image in zip(split.labels.tolist(), split.images[:, 0].flatten(1).tolist(), strict=True))
    assert [label for label, _ in found] == [label for label, _ in expected]
    difference = np.abs(np.array([v for _, v in found]) - np.array([v for _, v in expected]))
    assert difference.max() <= 1  # halves may be rounded either way
    again, _ = common.load_data("digits")
    assert torch.equal(train.images, again.images) and torch.equal(train.labels, again.labels)


def test_labelled_folders(tmp_path):
    """Labels are positions in the sorted names of train's class folders, for val too, even where val has fewer classes."""
    for i, name in enumerate(["zebra", "ant", "mole"]):
        write_images(tmp_path / "train" / name, [9, 9], seed=i)
    write_images(tmp_path / "train" / "mole" / "deeper", [9], seed=5)
    write_images(tmp_path / "val" / "zebra", [9], seed=6)
    write_images(tmp_path / "val" / "mole", [9], seed=7)
    train, val = common.load_data(str(tmp_path))
    assert train.classes == ["ant", "mole", "zebra"] and train.labelled
    def named(data, split):
        folders = [path.split(f"/{split}/")[1].split("/")[0] for path in data.paths]
        return set(zip(folders, data.labels.tolist(), strict=True))

    assert named(train, "train") == {("ant", 0), ("mole", 1), ("zebra", 2)}
    assert train.labels.bincount().tolist() == [2, 3, 2]
    assert named(val, "val") == {("mole", 1), ("zebra", 2)}
    write_images(tmp_path / "val" / "wombat", [9])
    with pytest.raises(InputError, match="wombat"):
        common.load_data(str(tmp_path))


def test_test_folder_stands_in_for_val(tmp_path):
    """`test/` is read where there is no `val/`; without either there is no test set; without class folders no labels."""
    write_images(tmp_path / "train" / "ant", [9])
    assert common.load_data(str(tmp_path))[1] is None
    write_images(tmp_path / "test" / "ant", [9, 9])
    assert len(common.load_data(str(tmp_path))[1]) == 2
    write_images(tmp_path / "plain" / "train", [9, 9])
    train, test = common.load_data(str(tmp_path / "plain"))
    assert len(train) == 2 and not train.labelled and test is None


def test_unlabelled_folders(tmp_path):
    """Flat or nested: every image is found, whatever the case of its suffix; hidden files and others are left out."""
    write_images(tmp_path / "flat", [9, 9])
    write_images(tmp_path / "nested" / "a" / "b", [9, 9])
    write_images(tmp_path / "nested" / "c", [9])
    (tmp_path / "nested" / "c" / "000.png").rename(tmp_path / "nested" / "c" / "SHOUTED.PNG")
    (tmp_path / "nested" / "a" / ".hidden.png").write_bytes(b"no image")
    write_images(tmp_path / "nested" / "a" / ".ipynb_checkpoints", [9])
    (tmp_path / "nested" / "a" / "round").symlink_to("..")
    (tmp_path / "nested" / "notes.txt").write_text("no image")
    for name, n in (("flat", 2), ("nested", 3)):
        data, test = common.load_data(str(tmp_path / name))
        assert len(data) == n == len(data.images) and test is None and not data.labelled and (data.labels == -1).all()


def test_empty_and_missing_folders(tmp_path):
    """Named in one line."""
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    (tmp_path / "classes" / "train" / "ant").mkdir(parents=True)
    for name in ("empty", "classes", "missing"):
        with pytest.raises(InputError, match=name) as caught:
            common.load_data(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="digits"):  # it says what there is
        common.load_data("digitz")


def test_small_images_of_one_size_live_in_memory(tmp_path):
    """Bit-equal to the files; other sizes, or one image that differs, stay paths."""
    data, _ = common.load_data(str(write_images(tmp_path / "same", [(9, 12)] * 10)))
    assert data.images.shape == (10, 3, 9, 12) and data.images.dtype == torch.uint8 and data.image_size() == (9, 12)
    for path, image in zip(data.paths, data.images, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), image.permute(1, 2, 0).numpy())
    for name, sizes in (("mixed", [9, 10]), ("last", [9] * 10 + [10]), ("large", [(9, 120)] * 2)):
        data, _ = common.load_data(str(write_images(tmp_path / name, sizes)))
        assert data.images is None and len(data.paths) == len(sizes) and data.image_size() == Image.open(data.paths[0]).size[::-1]


def picture(mode, size=(7, 5)):
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (*size, 4), dtype=np.uint8)).convert("RGBA").convert(mode)


@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("P", "png"), ("RGBA", "png"), ("LA", "png"), ("1", "png"), ("L", "jpg"),
                                          ("CMYK", "jpg"), ("P", "gif"), ("RGB", "webp"), ("RGB", "bmp"), ("RGB", "tif"),
                                          ("CMYK", "tif"), ("RGB", "ppm")])
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_read_image_of_every_kind(tmp_path, mode, suffix):
    """uint8 (3, H, W), equal to what PIL converts to RGB (up to 2 levels where JPEG decoders round)."""
    path = tmp_path / f"image.{suffix}"
    picture(mode).save(path)
    image = common.read_image(path)
    assert image.dtype == torch.uint8 and image.shape == (3, 7, 5)
    expected = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected).max() <= (2 if suffix in ("jpg", "webp") else 0)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_read_image_of_16_bits(tmp_path, suffix):
    """A grey image of 16 bits keeps its brightness: 65535 is 255."""
    deep = np.random.default_rng(0).integers(0, 65536, (7, 5), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / f"deep.{suffix}")
    image = common.read_image(tmp_path / f"deep.{suffix}")
    assert image.dtype == torch.uint8 and image.shape == (3, 7, 5)
    difference = np.abs(image[1].numpy().astype(float) - deep / 257).max()
    assert difference <= 1


def test_read_image_of_an_animation(tmp_path):
    """The first frame."""
    frames = [Image.new("RGB", (5, 7), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    image = common.read_image(tmp_path / "moving.gif")
    assert image.shape == (3, 7, 5) and image[:, 0, 0].tolist() == [255, 0, 0]


def test_read_image_names_what_it_cannot_read(tmp_path):
    """Cut short, empty, or no image at all: one line with the file's name."""
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(content, "PNG")
    for name, data in (("cut.png", content.getvalue()[:-200]), ("empty.jpg", b""), ("words.jpg", b"these are words, not pixels")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=re.escape(name)) as caught:
            common.read_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    Image.fromarray(np.random.default_rng(0).random((9, 9), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(InputError, match="float.tif.*floating-point"):
        common.read_image(tmp_path / "float.tif")


def test_mnist():
    """torchvision's MNIST where it is at hand: 60,000 and 10,000 images, and the labels of the idx files."""
    raw = SHARED / "MNIST" / "raw"
    if not (raw / "t10k-images-idx3-ubyte").is_file():
        pytest.skip(f"no MNIST in {SHARED}")
    train, test = common.load_data("mnist", str(SHARED))
    assert train.images.shape == (60000, 3, 28, 28) and test.images.shape == (10000, 3, 28, 28)
    assert train.images.dtype == torch.uint8 and train.classes == list(range(10))
    labels = np.frombuffer((raw / "t10k-labels-idx1-ubyte").read_bytes()[8:], dtype=np.uint8)
    pixels = np.frombuffer((raw / "t10k-images-idx3-ubyte").read_bytes()[16:], dtype=np.uint8).reshape(-1, 28, 28)
    assert np.array_equal(test.labels.numpy(), labels)
    assert all(np.array_equal(test.images[:, c].numpy(), pixels) for c in range(3))


@pytest.mark.parametrize("name", ["mnist", "cifar10", "stl10", "flowers102", "pets", "cars", "aircraft"])
def test_a_data_set_that_cannot_be_downloaded_is_one_line(name, tmp_path, monkeypatch):
    """It names the data set and the way out."""
    def refused(*args, **kwargs):
        raise urllib.error.URLError("no route\nto host")

    monkeypatch.setattr("urllib.request.urlopen", refused)
    with pytest.raises(InputError, match=rf"{name}.*--data_path") as caught:
        common.load_data(name, str(tmp_path / "nothing"))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_views_with_another_normalisation():
    """The loader's mean and deviation are the caller's, ImageNet's by default."""
    colours = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    loaders = ViewLoader(memory_data(), [View(16)], 4, 0, "cpu"), ViewLoader(memory_data(), [View(16)], 4, 0, "cpu", **colours)
    (_, (x,), _), (_, (y,), _) = (next(loader.steps(0, 1)) for loader in loaders)
    torch.testing.assert_close(tv.normalize(denormalized(x), *colours.values()), y, rtol=0, atol=1e-5)


def test_eval_batches_of_memory_and_files(tmp_path):
    """Rows in their order; memory is resized whole, files have their short side resized and the centre cut out."""
    data = memory_data(7)
    x = torch.cat(list(common.eval_batches(data, [5, 0, 3], 20, CPU, batch_size=2)))
    torch.testing.assert_close(denormalized(x), data.images[[5, 0, 3]].float() / 255, rtol=0, atol=1e-5)
    x = torch.cat(list(common.eval_batches(data, [1], 10, CPU)))
    expected = tv.resize(data.images[1:2].float() / 255, [10, 10], tv.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    torch.testing.assert_close(denormalized(x), expected, rtol=0, atol=1e-4)
    files, _ = common.load_data(str(write_images(tmp_path, [(64, 80), (90, 64), (64, 64)])))
    for workers in (0, 2):
        x = torch.cat(list(common.eval_batches(files, [2, 0], 56, CPU, num_workers=workers)))
        for row, i in enumerate((2, 0)):
            image = tv.pil_to_tensor(Image.open(files.paths[i]))
            image = tv.center_crop(tv.resize(image, [64], tv.InterpolationMode.BICUBIC, antialias=True), [56, 56])
            torch.testing.assert_close(denormalized(x[row]), image.float() / 255, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- EMA


def norm_net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9, 0.996, 1.0])
def test_ema_update(momentum):
    """Every parameter is m t + (1 - m) s; buffers are left alone; no storage is shared; m = 0 and m = 1 are exact."""
    student, teacher = norm_net(0), norm_net(1)
    student(torch.randn(8, 4))  # its running statistics move
    before, there = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
    common.ema_update(student, teacher, momentum)
    parameters = dict(student.named_parameters())
    for name, now in teacher.state_dict().items():
        if name in parameters:
            expected = momentum * before[name].double() + (1 - momentum) * there[name].double()
            torch.testing.assert_close(now.double(), expected, rtol=1e-6, atol=1e-7)
            if momentum in (0.0, 1.0):
                assert torch.equal(now, there[name] if momentum == 0 else before[name])
        else:
            assert torch.equal(now, before[name])
    assert same_tensors(student.state_dict(), there)
    kept = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert same_tensors(teacher.state_dict(), kept)


def test_ema_of_equal_parameters_stays_bit_equal():
    """A thousand updates do not drift, and neither side gets a gradient or a graph."""
    student = norm_net(0)
    teacher = copy.deepcopy(student)
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    for i in range(1000):
        common.ema_update(student, teacher, 0.99 + 0.01 * i / 1000)
    assert same_tensors(student.state_dict(), teacher.state_dict())
    assert all(p.grad is None and p.grad_fn is None for p in teacher.parameters())


def test_ema_wants_two_networks_of_one_shape():
    """A teacher with fewer parameters is an error, not a partial update."""
    with pytest.raises(ValueError):
        common.ema_update(norm_net(0), nn.Linear(4, 5), 0.5)


# ------------------------------------------------------------------------------------- schedules and parameter groups


@pytest.mark.parametrize("base, final, total, warmup, start", [
    (1.0, 0.0, 50, 10, 0.0), (0.996, 1.0, 20, 0, 0.0), (0.3, 0.01, 30, 1, 0.1), (2.0, 0.5, 7, 6, 0.2)])
def test_cosine_schedule(base, final, total, warmup, start):
    """linspace(start, base, warmup), then final + (base - final) (1 + cos(pi i / (total - warmup))) / 2, by loop."""
    values = common.cosine_schedule(base, final, total, warmup, start)
    expected = [start + (base - start) * i / max(warmup - 1, 1) for i in range(warmup)]
    expected += [final + (base - final) * (1 + math.cos(math.pi * i / (total - warmup))) / 2 for i in range(total - warmup)]
    assert len(values) == total
    np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-15)


def test_cosine_schedule_at_its_limits():
    """A warm-up as long as the run or longer is all there is; no steps give no values."""
    np.testing.assert_allclose(common.cosine_schedule(1.0, 0.0, 5, 5), [0, 0.25, 0.5, 0.75, 1])
    longer = common.cosine_schedule(1.0, 0.0, 5, 9, 0.1)
    assert len(longer) == 5 and longer[0] == 0.1 and (np.diff(longer) > 0).all() and longer.max() <= 1
    assert len(common.cosine_schedule(1.0, 0.0, 0)) == len(common.cosine_schedule(1.0, 0.0, 0, 3)) == 0


def test_parameter_groups():
    """Matrices are decayed; biases, norms, tokens and positions are not; frozen ones are absent; nothing comes twice."""
    vit = common.vit_nano(img_size=8, patch_size=4)
    tied = nn.ModuleList([vit.blocks[0]])
    model = nn.ModuleDict({"student": vit, "tied": tied, "bn": common.BatchNorm(4), "last": nn.Linear(4, 4)})
    model["last"].requires_grad_(False)
    decayed, kept = common.parameter_groups(model, 0.05)
    assert decayed["weight_decay"] == 0.05 and kept["weight_decay"] == 0
    of = {id(p): name for name, p in model.named_parameters()}
    names = [[of[id(p)] for p in group["params"]] for group in (decayed, kept)]
    assert all(re.search(r"(qkv|attn\.proj|fc1|fc2|patch_embed\.proj)\.weight$", name) for name in names[0])
    assert all(re.search(r"(bias|norm\d?\.weight|bn\.weight|cls_token|mask_token|pos_embed)$", name) for name in names[1])
    everything = names[0] + names[1]
    assert len(set(everything)) == len(everything)
    assert set(everything) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("last") for name in everything)
    sincos = common.vit_nano(img_size=8, patch_size=4, pos_embed="sincos")
    assert not any(p is sincos.pos_embed for group in common.parameter_groups(sincos, 0.05) for p in group["params"])


# -------------------------------------------------------------------------------------------------------- collectives

SHAPES = [(8, 3), (8, 3, 5), (8, 3, 2, 4)]


class Contrast(nn.Module):
    """A small network with BatchNorm, whose loss compares each row with all rows of the global batch."""

    def __init__(self, norm):
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(6, 5), norm(5), nn.Linear(5, 4)

    def forward(self, x):
        return self.two(F.relu(self.norm(self.one(x))))


def contrast_case(norm):
    generator = torch.Generator().manual_seed(0)
    network = Contrast(norm)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return network, torch.randn(8, 6, generator=generator)


def norm_case(shape):
    generator = torch.Generator().manual_seed(len(shape))
    x, target = (torch.randn(shape, generator=generator) * 2 + 3 for _ in range(2))
    return x, target, torch.tensor([0.5, 1.5, -2.0]), torch.tensor([0.1, -0.3, 1.0])


def run_norm(norm, x, target, weight, bias, steps=2):
    """Two training steps and an evaluation of a normalisation layer -> outputs, gradients, statistics."""
    with torch.no_grad():
        norm.weight.copy_(weight), norm.bias.copy_(bias)
    x = x.clone().requires_grad_()
    for _ in range(steps):
        norm.zero_grad()
        x.grad = None
        y = norm(x)
        ((y - target) ** 3).mean().backward()
    found = dict(y=y.detach(), x=x.grad, weight=norm.weight.grad, bias=norm.bias.grad, mean=norm.running_mean.clone(),
                 var=norm.running_var.clone(), count=norm.num_batches_tracked.clone())
    norm.eval()
    found["eval"] = norm(x).detach()
    assert torch.equal(norm.running_mean, found["mean"])  # evaluation leaves the statistics
    return found


def small_vit():
    torch.manual_seed(0)
    return perturbed(common.vit_nano(img_size=20, patch_size=4))


def batches(data, start=0, stop=3, workers=0):
    """Steps, views and rows as lists, which go through a file."""
    loader = ViewLoader(data, VIEWS, 6, 0, CPU, num_workers=workers)
    return [[step, *views, index] for step, views, index in loader.steps(start, stop)]


def what_two_processes_do(rank, folder):
    """Everything that a process group is needed for, in one go: the tests below look at their part."""
    found = {}
    rows = slice(4 * rank, 4 * rank + 4)
    # gather: its value; its gradient where it is used twice and where its own gradient is shared with another tensor
    k = torch.arange(8.0).view(4, 2) + 10 * rank
    found["gathered"] = common.gather(k)
    found["mean"] = common.mean_over_processes(torch.tensor([1.0 + rank]))
    found["local_rows"] = torch.arange(8)[common.local_rows(8)]
    a, b, c = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True), torch.ones(4, 3, requires_grad=True)
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
    # BatchNorm
    for i, shape in enumerate(SHAPES):
        x, target, *affine = norm_case(shape)
        found[f"norm{i}"] = run_norm(common.BatchNorm(3), x[rows], target[rows], *affine)
    x, target, *affine = norm_case(SHAPES[2])
    found["norm_bf16"] = common.BatchNorm(3)(x[rows].bfloat16())
    # loader and features, with an odd number of images
    data = memory_data()
    found["views"] = batches(data, start=1, stop=5)
    files, _ = common.load_data(folder)
    found["file_views"] = batches(files, workers=2 * rank)
    vit = small_vit()
    found["features"] = {str(n): common.extract_features(vit, memory_data(n), 20, CPU, batch_size=4) for n in (1, 8, 23)}
    found["layers"] = common.extract_features(vit, data, 20, CPU, layers=True, rows=torch.tensor([3, 1, 22, 4, 9]))
    try:
        ViewLoader(data, VIEWS, 7, 0, CPU)
        found["refused"] = ""
    except InputError as error:
        found["refused"] = str(error)
    return found


_two = {}


@pytest.fixture
def two(in_processes, tmp_path):
    """What two gloo processes found, both of them; they are started once for all tests."""
    if not _two:
        folder = write_images(tmp_path / "pictures", [(20 + i % 3, 24) for i in range(13)])
        one = batches(common.load_data(str(folder))[0])
        _two.update(found=in_processes(2, what_two_processes_do, str(folder)), file_views=one)
    return _two["found"]


def test_gather_value(two):
    """The rows of all processes in their order, on each of them."""
    expected = torch.cat([torch.arange(8.0).view(4, 2), torch.arange(8.0).view(4, 2) + 10])
    assert all(torch.equal(found["gathered"], expected) for found in two)
    assert all(found["mean"].item() == 1.5 for found in two)
    assert [found["local_rows"].tolist() for found in two] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    x = torch.ones(2, requires_grad=True)
    assert common.gather(x) is x and common.local_rows(8) == slice(0, 8)  # one process


def test_gather_leaves_gradients_of_others_alone(two):
    """Sums d(3 sum)/dx = 3 over the two processes, once each, also where autograd hands one gradient to several tensors."""
    for found in two:
        assert [gradient.unique().tolist() for gradient in found["shared"]] == [[6.0], [6.0], [3.0]]


def test_gathered_loss_has_one_processs_gradients(two):
    """Mean over local rows, averaged over processes by DDP, BatchNorm inside: equal to the whole batch in one process."""
    network, x = contrast_case(nn.BatchNorm1d)
    z = network(x)
    loss = F.cross_entropy(z @ z.T, torch.arange(8))
    loss.backward()
    for found in two:
        torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-5, atol=0)
        for name, parameter in network.named_parameters():
            scale = parameter.grad.abs().max().item()
            if name == "one.bias":  # zero but for rounding: BatchNorm takes out every shift
                scale = network.one.weight.grad.abs().max().item()
            torch.testing.assert_close(found["contrast"][name], parameter.grad, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("case", range(len(SHAPES)))
def test_batchnorm_of_two_processes(two, case):
    """Output, running statistics and gradients of nn.BatchNorm on the whole batch; evaluation too; fp32, 1e-5."""
    x, target, *affine = norm_case(SHAPES[case])
    norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[case](3)
    expected = run_norm(norm, x, target, *affine)
    close = dict(rtol=1e-5, atol=1e-5)
    for rank, found in enumerate(found[f"norm{case}"] for found in two):
        rows = slice(4 * rank, 4 * rank + 4)
        torch.testing.assert_close(found["y"], expected["y"][rows], **close)
        torch.testing.assert_close(found["eval"], expected["eval"][rows], **close)
        torch.testing.assert_close(found["x"] / 2, expected["x"][rows], **close)  # DDP's average
        for name in ("mean", "var", "count"):
            torch.testing.assert_close(found[name], expected[name], **close)
    for name in ("weight", "bias"):
        torch.testing.assert_close((two[0][f"norm{case}"][name] + two[1][f"norm{case}"][name]) / 2, expected[name], **close)


@pytest.mark.parametrize("shape", SHAPES)
def test_batchnorm_of_one_process(shape):
    """Exactly nn.BatchNorm, for each rank of input, with its state-dict keys."""
    x, target, *affine = norm_case(shape)
    norm = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(3)
    ours = common.BatchNorm(3)
    assert ours.state_dict().keys() == norm.state_dict().keys()
    found, expected = (run_norm(layer, x, target, *affine) for layer in (ours, norm))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_batchnorm_of_bfloat16(two):
    """bf16 in, bf16 out, with statistics in fp32: the whole batch's result to bf16's precision."""
    x, *_ = norm_case(SHAPES[2])
    expected = nn.BatchNorm2d(3)(x.bfloat16().float()).detach()
    results = [found["norm_bf16"] for found in two]
    assert all(y.dtype == torch.bfloat16 for y in results)
    torch.testing.assert_close(torch.cat(results).float(), expected, rtol=1e-2, atol=1e-2)


def test_two_processes_see_one_processs_views(two):
    """The same samples, bit-equal, and the same views up to the rounding of batched matmuls; from memory and from files."""
    for name, expected in (("views", batches(memory_data(), start=1, stop=5)), ("file_views", _two["file_views"])):
        for whole, first, second in zip(expected, *(found[name] for found in two), strict=True):
            assert whole[0] == first[0] == second[0]
            assert torch.equal(torch.cat([first[-1], second[-1]]), whole[-1])
            for view in (1, 2):
                torch.testing.assert_close(torch.cat([first[view], second[view]]), whole[view], rtol=0, atol=5e-5)
    assert all(re.search("7.*2 processes", found["refused"]) for found in two)


def test_features_of_two_processes(two):
    """Each process gets every row once, in order, whether or not the count is even; layer by layer too."""
    vit = small_vit()
    x = tv_normalize(memory_data().images[[3, 1, 22, 4, 9]].float() / 255)
    with torch.no_grad():
        layers = vit(x, layers=True)
    for n in (1, 8, 23):
        data = memory_data(n)
        with torch.no_grad():
            expected = vit(tv_normalize(data.images.float() / 255))
        one = common.extract_features(vit, data, 20, CPU, batch_size=5)
        for features, in [one, *(found["features"][str(n)] for found in two)]:
            assert features.shape == (n, 96) and features.dtype == torch.float32
            torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    for found in two:
        for mine, theirs in zip(found["layers"], layers, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------------- checkpoints


def test_save_file_is_atomic(tmp_path, monkeypatch):
    """A save that fails half-way leaves the old file whole; what it leaves behind is not read as a checkpoint."""
    path = tmp_path / "checkpoint.pth"
    common.save_file({"step": 1}, path)
    assert common.read_checkpoint(path) == {"step": 1} and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]

    def fails(content, file, *args, **kwargs):
        file.write(b"half a file")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fails)
        with pytest.raises(OSError, match="disk full"):
            common.save_file({"step": 2}, path)
    assert common.read_checkpoint(path) == {"step": 1}
    for left in set(tmp_path.iterdir()) - {path}:
        assert left.suffix != ".pth"
        with pytest.raises(InputError):
            common.read_checkpoint(left)
    common.save_file({"step": 3}, path)  # and a later save works
    assert common.read_checkpoint(path) == {"step": 3} and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


class Anything:
    """A class that a safe load must not construct."""


def test_read_checkpoint_errors(tmp_path):
    """One line each, with the file's name: missing, a folder, words, empty, a bare tensor, cut short, pickled objects."""
    torch.save({"a": torch.ones(1000)}, tmp_path / "whole.pth")
    assert torch.equal(common.read_checkpoint(tmp_path / "whole.pth")["a"], torch.ones(1000))
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "words.pth").write_text("no checkpoint")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "folder.pth").mkdir()
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    torch.save([torch.ones(3)], tmp_path / "list.pth")
    torch.save({"model": {"a": torch.ones(3)}, "args": Anything()}, tmp_path / "pickled.pth")
    expected = {"missing": "no checkpoint file", "folder": "no checkpoint file", "words": "not a PyTorch checkpoint",
                "empty": "not a PyTorch checkpoint", "cut": "damaged", "tensor": "no weights under their names",
                "list": "no weights under their names", "pickled": "pickled Python objects"}
    for name, pattern in expected.items():
        with pytest.raises(InputError, match=pattern) as caught:
            common.read_checkpoint(tmp_path / f"{name}.pth")
        assert f"{name}.pth" in str(caught.value) and "\n" not in str(caught.value)


def test_the_advice_for_pickled_checkpoints_works(tmp_path, monkeypatch):
    """The command that the error prints makes a file that loads."""
    import argparse

    torch.save({"teacher": {"a": torch.ones(3)}, "args": argparse.Namespace(lr=1), "best": np.float64(3)}, tmp_path / "foreign.pth")
    with pytest.raises(InputError) as caught:
        common.read_checkpoint(tmp_path / "foreign.pth")
    code = re.search(r'python -c "(.*)"', str(caught.value)).group(1)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert torch.equal(common.read_checkpoint(tmp_path / "clean.pth")["teacher"]["a"], torch.ones(3))


def bare(seed):
    """A ViT's weights as timm has them."""
    weights = perturbed(common.vit_nano(img_size=8, patch_size=4), seed).state_dict()
    return {key: value for key, value in weights.items() if key != "mask_token"}


def under(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


S, T = bare(1), bare(2)
HEAD = {"head.mlp.0.weight": torch.ones(3, 3), "head.last_layer.weight_v": torch.ones(2)}
DINO = {"student": under("module.", {**under("backbone.", S), **HEAD}), "teacher": {**under("backbone.", T), **HEAD}, "epoch": 3}
OURS = {"meta": {"network": "teacher"}, "student": S, "teacher": T}
MOCO = {"epoch": 3, "arch": "vit_small", "state_dict": {
    **under("module.base_encoder.", {**S, **HEAD}), **under("module.momentum_encoder.", {**T, **HEAD}),
    "module.predictor.0.weight": torch.ones(3)}}
TIMM = {**S, "head.weight": torch.ones(2, 96), "head.bias": torch.ones(2)}
MASK = {"masked_embed": torch.zeros(1, 96)}
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
    "SDSSL's release": ({"state_dict": {**under("student.net.", S), **under("teacher.net.", T), "student.projector.0.weight": torch.ones(2),
                                        "predictor.0.weight": torch.ones(2)}}, None, S),
    "SDSSL's release, its teacher": ({"state_dict": {**under("student.net.", S), **under("teacher.net.", T)}}, "teacher", T),
    "SimDis' release": ({"model": {**under("module.student.", {**S, "pred_s_dv.0.weight": torch.ones(2), "fc.0.weight": torch.ones(2)}),
                                   **under("module.teacher.", T), **under("module.student_ema.", T)}}, None, S),
    "SimDis' release, its teacher": ({"model": {**under("module.student.", S), **under("module.teacher.", T)}}, "teacher", T),
    "MAE, with its decoder": ({"model": {**S, "mask_token": torch.ones(1, 1, 7), "decoder_pos_embed": torch.ones(1, 5, 7),
                                         "decoder_blocks.0.norm1.weight": torch.ones(7)}}, None, S),
}


@pytest.mark.parametrize("style", KEY_STYLES)
def test_backbone_weights_of_every_key_style(style):
    """The backbone's weights under timm's keys come out, bit-equal, and load; heads and mask tokens are not loaded."""
    checkpoint, network, expected = KEY_STYLES[style]
    found = common.backbone_weights(checkpoint, network)
    assert same_tensors({key: value for key, value in found.items() if key in expected}, expected)
    assert not any(key.startswith(("blocks", "module", "backbone", "student", "teacher")) for key in found.keys() - expected.keys())
    model = common.vit_nano(img_size=8, patch_size=4)
    common.load_weights(model, found, style)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.items())


def test_backbone_weights_of_a_resnet():
    """torchvision's file without its classifier, and MoCo v3's encoder, load into ours."""
    theirs = torchvision.models.resnet18()
    for checkpoint in (theirs.state_dict(), {"state_dict": under("module.base_encoder.", theirs.state_dict())}):
        ours = common.create_backbone("resnet18", img_size=64)
        common.load_weights(ours, common.backbone_weights(checkpoint), "torchvision")
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())


def test_an_absent_network_is_an_error():
    """Asking for the teacher of a file that has none does not silently give the student."""
    with pytest.raises(InputError, match="teacher"):
        common.backbone_weights({"student": S}, "teacher")


def test_load_weights_errors():
    """Missing, unknown and misshapen weights are named in one line."""
    without = {key: value for key, value in S.items() if key != "blocks.1.attn.qkv.weight"}
    wide = common.vit_nano(img_size=8, patch_size=4, embed_dim=192).state_dict()
    patches = common.vit_nano(img_size=16, patch_size=8).state_dict()
    for weights, pattern in ((without, r"blocks\.1\.attn\.qkv\.weight"), ({**S, "extra": torch.ones(1)}, "extra"), (wide, "size mismatch for"),
                             (patches, r"patch_embed.*--patch_size"), ({}, "missing"), ({"fc1": torch.ones(1)}, "--arch"),
                             ({**S, "norm.weight": torch.ones(5)}, r"norm\.weight"), ({**S, "norm.weight": [1.0] * 96}, "norm.weight does not hold"),
                             ({**S, "pos_embed": torch.ones(3)}, "pos_embed"),
                             ({**S, "pos_embed": torch.zeros(1, 1 + 6, 96)}, "pos_embed"), ({**S, "reg_token": torch.ones(1, 4, 96)}, "reg_token"),
                             ({**S, "blocks.0.ls1.gamma": torch.ones(96)}, r"blocks\.0\.ls1\.gamma")):
        model = common.vit_nano(img_size=8, patch_size=4)
        with pytest.raises(InputError, match=pattern) as caught:
            common.load_weights(model, weights, "some.pth")
        assert "some.pth" in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_of_another_size_loads_with_its_grid(tmp_path):
    """Weights of 16-pixel images give the outputs of the model they come from at every size: other grids as DINO's code has them."""
    source = perturbed(common.vit_nano(img_size=16, patch_size=4), size=0.3)
    source.positions_as_dino = True
    common.save_file(source.state_dict(), tmp_path / "source.pth")
    model, meta = common.load_backbone(str(tmp_path / "source.pth"), "vit_nano", patch_size=4, img_size=8)
    assert model.grid == (4, 4) and meta["img_size"] == 8
    with torch.no_grad():
        for size in (16, 8, 24):
            x = noise_images(2, 3, size, size)
            torch.testing.assert_close(model(x), source(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_init_resizes_positions_to_the_grid_that_was_built(tmp_path, dtype):
    """Weights of 16-pixel images in a model for 8: its own grid, fp32, positions as DINO's code has them there."""
    source = perturbed(common.vit_nano(img_size=16, patch_size=4), size=0.3).to(dtype)
    common.save_file(source.state_dict(), tmp_path / "source.pth")
    source.float().positions_as_dino = True
    model = common.vit_nano(img_size=8, patch_size=4).eval()
    common.start_from(model, str(tmp_path / "source.pth"))
    x = noise_images(2, 3, 8, 8)
    assert model.grid == (2, 2) and model.pos_embed.shape == (1, 5, 96)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(model(x), source(x), rtol=1e-4, atol=1e-4)


def test_init_wants_the_heads_of_moco_v3(tmp_path):
    """Its ViT-S has 12, which no shape shows."""
    moco = common.vit_small(img_size=8, patch_size=4, depth=1, num_heads=12)
    common.save_file({"state_dict": under("module.base_encoder.", moco.state_dict())}, tmp_path / "moco.pth")
    with pytest.raises(InputError, match="12 heads: pass --num_heads 12"):
        common.start_from(common.vit_small(img_size=8, patch_size=4, depth=1), str(tmp_path / "moco.pth"))


def test_vit_small_of_moco_v3_has_12_heads(tmp_path):
    """Its shapes are those of 6 heads, so nothing but the keys can tell; other files say it by --num_heads."""
    timm = pytest.importorskip("timm")
    theirs = perturbed(timm.create_model("vit_small_patch16_224", img_size=32, num_heads=12, num_classes=0))
    x = noise_images(2, 3, 32, 32)
    common.save_file({"state_dict": under("module.base_encoder.", theirs.state_dict())}, tmp_path / "moco.pth")
    common.save_file(theirs.state_dict(), tmp_path / "bare.pth")
    for name, heads in (("moco", None), ("moco", 12), ("bare", 12)):
        backbone, meta = common.load_backbone(str(tmp_path / f"{name}.pth"), "vit_small", 16, 32, num_heads=heads)
        torch.testing.assert_close(backbone(x), theirs(x), rtol=1e-4, atol=1e-4)
        assert meta["backbone"]["num_heads"] == 12
    backbone, _ = common.load_backbone(str(tmp_path / "bare.pth"), "vit_small", 16, 32)
    assert (backbone(x) - theirs(x)).abs().max() > 1e-3


def test_load_backbone_round_trip(tmp_path):
    """Our checkpoint says what it is: the same outputs, frozen and in evaluation mode, with its normalisation."""
    options = dict(arch="vit_nano", img_size=16, patch_size=4)
    student, teacher = (perturbed(common.create_backbone(**options), seed) for seed in (1, 2))
    meta = {"backbone": options, "network": "teacher", "mean": [0.5] * 3, "std": [0.2] * 3}
    content = {"meta": meta, "student": under("backbone.", student.state_dict()), "teacher": teacher.state_dict(), "step": 1}
    common.save_file(content, tmp_path / "checkpoint.pth")
    x = noise_images(2, 3, 16, 16)
    for network, source in ((None, teacher), ("teacher", teacher), ("student", student)):
        backbone, found = common.load_backbone(str(tmp_path / "checkpoint.pth"), network=network)
        assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
        assert torch.equal(backbone(x), source(x))
        assert found["backbone"] == options and found["img_size"] == 16
        assert list(found["mean"]) == [0.5] * 3 and list(found["std"]) == [0.2] * 3
    for other, pattern in (({"arch": "vit_tiny"}, "vit_nano.*vit_tiny"), ({"patch_size": 8}, "patch")):
        with pytest.raises(InputError, match=pattern):
            common.load_backbone(str(tmp_path / "checkpoint.pth"), **other)
    # bare weights need to be told
    common.save_file(common.backbone_weights({"meta": meta, "teacher": teacher.state_dict()}), tmp_path / "backbone.pth")
    with pytest.raises(InputError, match="--arch"):
        common.load_backbone(str(tmp_path / "backbone.pth"))
    backbone, found = common.load_backbone(str(tmp_path / "backbone.pth"), "vit_nano", patch_size=4, img_size=16)
    assert torch.equal(backbone(x), teacher(x)) and tuple(found["mean"]) == common.MEAN and found["img_size"] == 16
    # a ResNet, whose stem goes by the image size
    resnet, options = common.create_backbone("resnet18", img_size=32), dict(arch="resnet18", img_size=32, patch_size=16)
    content = {"meta": {"backbone": options, "network": "student"}, "student": resnet.state_dict()}
    common.save_file(content, tmp_path / "resnet.pth")
    backbone, _ = common.load_backbone(str(tmp_path / "resnet.pth"))
    assert same_tensors(backbone.state_dict(), resnet.state_dict()) and not backbone.training


def test_load_backbone_of_foreign_files(tmp_path):
    """A `meta` that is not ours, as OpenMMLab's files have, and keys that are no names: loaded or refused in one line."""
    torch.save({"meta": {"epoch": 3}, "state_dict": S}, tmp_path / "foreign.pth")
    backbone, _ = common.load_backbone(str(tmp_path / "foreign.pth"), "vit_nano", patch_size=4, img_size=8)
    assert torch.equal(backbone.norm.weight, S["norm.weight"])
    for meta in (None, "a word", [1]):
        torch.save({"meta": meta, "state_dict": S}, tmp_path / "meta.pth")
        backbone, _ = common.load_backbone(str(tmp_path / "meta.pth"), "vit_nano", patch_size=4, img_size=8)
        assert torch.equal(backbone.norm.weight, S["norm.weight"])
    torch.save({0: torch.ones(1), 1: torch.ones(1)}, tmp_path / "numbers.pth")
    with pytest.raises(InputError, match="numbers.pth"):
        common.load_backbone(str(tmp_path / "numbers.pth"), "vit_nano", patch_size=4, img_size=8)


def test_load_backbone_of_timm():
    """timm/NAME: timm's outputs behind our call, with every block's [CLS]; its own and timm's state dicts load."""
    timm = pytest.importorskip("timm")
    backbone = common.create_backbone("timm/vit_tiny_patch16_224", img_size=32).eval()
    x = noise_images(2, 3, 32, 32)
    with torch.no_grad():
        layers = backbone(x, layers=True)
        torch.testing.assert_close(layers[-1], backbone(x), rtol=1e-4, atol=1e-4)
    assert len(layers) == 12 and backbone.embed_dim == 192 and backbone.layer_dims == [y.shape[1] for y in layers]
    other = perturbed(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0))
    common.load_weights(backbone, common.backbone_weights(other.state_dict()), "timm's own")
    with torch.no_grad():
        assert torch.equal(backbone(x), other(x))
        saved = copy.deepcopy(backbone.state_dict())
        perturbed(backbone, seed=1)
        assert not torch.allclose(backbone(x), other(x), atol=1e-2)
        common.load_weights(backbone, common.backbone_weights({"student": saved}), "ours")
        assert torch.equal(backbone(x), other(x))
    with pytest.raises(InputError, match="vit_nothing"):
        common.create_backbone("timm/vit_nothing")


def test_any_timm_model_or_one_line(tmp_path):
    """Widths are those of the output, sizes that a model cannot take are named, and so are layers that it does not have."""
    pytest.importorskip("timm")
    for name, size in (("mobilenetv3_small_050", 32), ("resnet10t", 32), ("vit_relpos_small_patch16_224", 32), ("test_vit2", 32)):
        backbone = common.create_backbone(f"timm/{name}", img_size=size).eval()
        x = noise_images(1, 3, size, size)
        assert backbone(x).shape == (1, backbone.embed_dim)
        with pytest.raises(InputError, match=r"if its own output is \[CLS\]"):
            backbone(x, layers=True)
    for name, size in (("vit_tiny_patch16_224", 20), ("test_vit", 33)):
        with pytest.raises(InputError, match=f"images of {size} pixels are not a multiple of patch size 16 of timm/{name}"):
            common.create_backbone(f"timm/{name}", img_size=size)
    assert not common.create_backbone("timm/vit_medium_patch16_gap_256", img_size=32).has_tokens  # no [CLS]


def timm_norms(rank):
    """What several processes say of a timm network whose BatchNorm would see one process's images."""
    try:
        common.distributed(common.create_backbone("timm/resnet10t", img_size=32))
    except InputError as error:
        return str(error)
    return ""


def test_batchnorm_of_timm_is_refused_on_several_processes(in_processes):
    """P1: in one line; one process takes the network."""
    pytest.importorskip("timm")
    assert all("normalises over the images of one process alone" in message for message in in_processes(2, timm_norms))
    assert common.distributed(common.create_backbone("timm/resnet10t", img_size=32))


@pytest.mark.parametrize("arch", ["vit_nano", "resnet18", "timm/test_vit", "timm/test_resnet", "timm/test_convnext"])
def test_every_backbone_has_the_same_interface(arch):
    """What callers use of a backbone without asking which class it has."""
    backbone = common.create_backbone(arch, img_size=64).eval()
    x = noise_images(2, 3, 64, 64)
    with torch.no_grad():
        assert backbone(x).shape == (2, backbone.embed_dim)
        assert (backbone.patch_embed is None) == (backbone.patch_size == 1)
        if not backbone.has_tokens:
            return
        (cls, patches), = backbone.tokens(x, 1)
        side = 64 // backbone.patch_size
        assert cls.shape == (2, backbone.embed_dim) and patches.shape == (2, side, side, backbone.embed_dim)
        assert len(backbone.tokens(x, 2)) == 2
        outputs = backbone.block_outputs(x)
        assert [y.shape for y in outputs] == [(2, 1 + side**2, D) for D in backbone.layer_dims]
        layers = backbone(x, layers=True)
        torch.testing.assert_close(layers[-1], cls)
        assert [y.shape[1] for y in layers] == backbone.layer_dims


# ----------------------------------------------------------------------------------------------------------- monitors


def test_spread_of_known_features():
    """Isotropic Gaussians are spread evenly; equal rows not at all; r orthogonal directions have effective rank r."""
    ratio, rank = common.collapse_measures(noise_images(4000, 32))
    assert abs(ratio - 1) < 0.02 and 30 < rank <= 32
    ratio, _ = common.collapse_measures(torch.ones(50, 1) @ noise_images(1, 16))
    assert ratio < 1e-5
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
    seen = {}

    @common.fp32
    def loss(a, b, scale=1.0, c=None):
        """The name and docstring stay."""
        seen.update(a=a.dtype, b=b.dtype, c=None if c is None else c.dtype, product=(a @ a.T).dtype)
        return (a @ a.T).sum() * scale

    x = noise_images(16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x.T).dtype == torch.bfloat16
        result = loss(x.bfloat16(), torch.arange(3), scale=2.0, c=x.half())
    assert seen == dict(a=torch.float32, b=torch.int64, c=torch.float32, product=torch.float32) and result.dtype == torch.float32
    torch.testing.assert_close(result, (x.bfloat16().float() @ x.bfloat16().float().T).sum() * 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(x, x).dtype == torch.float32 and seen["product"] == torch.float32
        assert loss(x.double(), x).dtype == torch.float64
    assert loss.__name__ == "loss" and "docstring" in loss.__doc__
    # gradients come back in the caller's dtype
    half = x.bfloat16().requires_grad_()
    loss(half, half).backward()
    assert half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("training", [True, False])
def test_knn_accuracy_disturbs_nothing(training):
    """Modes (of every module), parameters, buffers and the random state are as before; the accuracy is that of a loop."""
    train, test = common.load_data("digits")
    train, test = (ImageData(split.labels[:n], split.classes, split.images[:n]) for split, n in ((train, 120), (test, 40)))
    train.labels[:20] = -1  # unknown labels are no neighbours
    backbone = common.create_backbone("resnet18", img_size=8).train(training)
    backbone.layer1.train(not training)  # a part that is in another mode than the whole
    modes = [module.training for module in backbone.modules()]
    before, state = copy.deepcopy(backbone.state_dict()), torch.get_rng_state()
    accuracy = common.knn_accuracy(backbone, train, test, 8, CPU)
    assert same_tensors(backbone.state_dict(), before) and torch.equal(state, torch.get_rng_state())
    assert [module.training for module in backbone.modules()] == modes
    backbone.eval()
    with torch.no_grad():
        bank, queries = (F.normalize(backbone(tv_normalize(split.images.float() / 255))) for split in (train, test))
    right = 0
    for query, label in zip(queries, test.labels.tolist(), strict=True):
        votes = [0.0] * 10
        near = [(float(query @ row), y) for row, y in zip(bank, train.labels.tolist(), strict=True) if y >= 0]
        for cosine, y in sorted(near, reverse=True)[:20]:
            votes[y] += math.exp(cosine / 0.07)
        right += votes.index(max(votes)) == label
    assert abs(accuracy - 100 * right / 40) <= 2.5 + 1e-6  # one query may sit on a tie
    assert common.knn_accuracy(backbone, train, None, 8, CPU) is None
    unlabelled = ImageData(torch.full((120,), -1), [], train.images)
    assert common.knn_accuracy(backbone, unlabelled, test, 8, CPU) is None


def test_extract_features_normalises_as_told():
    """Whole images, in order, through the given mean and standard deviation, in fp32 from a bf16 pass."""
    data, vit = memory_data(7), small_vit()
    x = data.images.float() / 255
    with torch.no_grad():
        expected = vit((x - 0.5) / 0.25)
    features, = common.extract_features(vit, data, 20, CPU, batch_size=3, mean=(0.5,) * 3, std=(0.25,) * 3)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    half, = common.extract_features(vit, data, 20, CPU, dtype="bf16", mean=(0.5,) * 3, std=(0.25,) * 3)
    assert half.dtype == torch.float32 and not torch.equal(half, features)
    torch.testing.assert_close(half, expected, rtol=0.1, atol=0.1)


def test_knn_monitor_takes_a_spread_of_at_most_most_images():
    """A large data set is sampled evenly: the monitor sees `most` images of either split, over all classes of sorted data."""
    seen = []

    class Mean(torch.nn.Module):
        def forward(self, x, layers=False):
            seen.append(len(x))
            return x.mean((2, 3))

    labels = torch.arange(10).repeat_interleave(20)  # sorted by class, as folders are
    images = (25 * labels[:, None, None, None] * torch.tensor([1, 0, 0])[:, None, None]).expand(-1, -1, 8, 8).to(torch.uint8).contiguous()
    data = common.ImageData(labels, list(range(10)), images=images)
    assert common.knn_accuracy(Mean(), data, data, 8, CPU, k=1) is not None and sum(seen) == 400
    seen.clear()
    common.knn_accuracy(Mean(), data, data, 8, CPU, k=1, most=30)
    assert sum(seen) == 60


# ------------------------------------------------------------------- kills, restarts and several machines, for every script

METHODS = {"sdssl.py": ["--hidden", 32, "--isd_hidden", 16, "--patch_size", 8], "simdis.py": ["--hidden", 32], "rrkd.py": ["--no-baseline"],
           "ibot_rkd.py": ["--hidden", 32, "--out_dim", 48], "d2v_kd.py": ["--teacher_epochs", 1]}
ENDLESS = ["--batch_size", 64, "--epochs", 2000, "--save_every", 1, "--knn_every", 0, "--log_every", 1, "--num_workers", 0,
           "--device", "cpu"]


@pytest.fixture
def bare_runs(monkeypatch):
    """Runs in this process draw no curves and check no k-NN, which take longer than their steps."""
    monkeypatch.setattr(common.Run, "draw_curves", lambda self: None)
    monkeypatch.setattr("sdssl.knn_accuracy", lambda *arguments, **options: None)


def test_weights_that_are_not_finite_are_not_saved(tmp_path, capsys, bare_runs):
    """P6: a step can spoil the weights while the losses are finite, at the last step too; exit code 1, nothing written."""
    import sdssl

    flags = [*METHODS["sdssl.py"], "--warmup_epochs", 0, "--knn_every", 0, "--batch_size", 16, "--device", "cpu", "--output_dir", tmp_path]
    sdssl.train(sdssl.parse_arguments([*map(str, flags), "--lr", "0", "--max_steps", "1"]))
    good, original = (tmp_path / "checkpoint.pth").read_bytes(), torch.optim.AdamW.step

    def spoil(self, *arguments, **options):
        original(self, *arguments, **options)
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(math.inf)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spoil)
        with pytest.raises(SystemExit) as stopped:
            sdssl.train(sdssl.parse_arguments([*map(str, flags), "--lr", "0", "--max_steps", "2", "--resume"]))
    assert stopped.value.code == 1 and "weights of the student are not finite after step 2" in capsys.readouterr().out
    assert (tmp_path / "checkpoint.pth").read_bytes() == good


def test_a_checkpoint_that_does_not_fit_its_run_is_one_line(tmp_path, capsys, bare_runs):
    """P7: networks or keys that are missing, no step; and another --dtype goes on, with a gradient scaler or without."""
    import sdssl

    flags = [*METHODS["sdssl.py"], "--knn_every", 0, "--batch_size", 16, "--device", "cpu", "--output_dir", tmp_path]

    def train(*extra):
        return finished(capsys, lambda: (sdssl.train(sdssl.parse_arguments([*map(str, [*flags, *extra])])), sys.exit(0)))

    assert train("--max_steps", 1).returncode == 0
    assert train("--max_steps", 2, "--resume", "--dtype", "fp16").returncode == 0
    assert train("--max_steps", 3, "--resume", "--dtype", "bf16").returncode == 0
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    short = {name: value for name, value in content["student"].items() if "blocks.0.attn.qkv" not in name}
    for broken, pattern in (({**content, "student": short}, "its student is not this run's"), ({**content, "args": None}, "no run to resume"),
                            ({name: value for name, value in content.items() if name != "teacher"}, "its teacher is not this run's")):
        torch.save(broken, tmp_path / "checkpoint.pth")
        assert_one_line_error(train("--max_steps", 4, "--resume"), pattern, "another --output_dir")


def test_a_rank_without_torchrun_is_one_line(tmp_path, monkeypatch, capsys):
    import sdssl

    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    flags = ["--device", "cpu", "--output_dir", str(tmp_path)]
    assert_one_line_error(finished(capsys, lambda: sdssl.train(sdssl.parse_arguments(flags))), "start with torchrun, or unset RANK")


@pytest.mark.parametrize("capabilities, times", [({"avx512_bf16": True}, 1), ({"amx_bf16": True}, 1), ({"avx512_bf16": False}, 0), ({}, 0)])
def test_bf16_is_offered_once_where_the_processor_has_it(capabilities, times, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    common.log_once.cache_clear()
    for _ in range(2):
        args = argparse.Namespace(device="cpu", dtype=None, seed=0)
        common.setup(args)
        assert args.dtype == "fp32"
    assert capsys.readouterr().out.count("--dtype bf16 would be faster") == times


def losses_of(folder):
    return [record for record in read_log(folder) if "loss" in record]


def wait_until(condition, seconds=180):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


def on_files(folder):
    """Flags that spare a new interpreter the import of scikit-learn, for its digits."""
    return ["--data", folder, "--arch", "vit_nano", "--img_size", 32, "--batch_size", 8]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the workers through Linux's /proc")
def test_torchrun_restarts_after_a_worker_is_killed(image_folder, tmp_path):
    """--max-restarts: the run goes on from its last checkpoint by itself, and ends as one that nothing happened to."""
    flags = [*METHODS["sdssl.py"], *ENDLESS, "--max_steps", 12, *on_files(image_folder)]
    output = tmp_path / "output.txt"
    process = start_script("torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2", "sdssl.py", *flags,
                           "--output_dir", tmp_path / "killed", outputs=(output, output))
    wait_until(lambda: (tmp_path / "killed" / "checkpoint.pth").exists())
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    process.join(300)
    assert process.exitcode == 0, output.read_text()[-3000:]
    assert run_script("sdssl.py", *flags, "--output_dir", tmp_path / "whole", processes=2).returncode == 0
    killed, whole = ([(record["step"], record["loss"]) for record in losses_of(tmp_path / name)] for name in ("killed", "whole"))
    assert [step for step, _ in killed] == list(range(1, 13)) and killed == whole


def test_two_machines_train_as_one(image_folder, tmp_path):
    """Two agents that meet on loopback, one process each, have the trace of one process."""
    flags = [*METHODS["sdssl.py"], *ENDLESS, "--max_steps", 3, *on_files(image_folder)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outputs = [tmp_path / name for name in ("first.txt", "second.txt")]
    agents = [start_script("torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
                           f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1", "sdssl.py", *flags,
                           "--output_dir", tmp_path / "two", outputs=(output, output)) for output in outputs]
    for agent, output in zip(agents, outputs, strict=True):
        agent.join(300)
        assert agent.exitcode == 0, output.read_text()[-3000:]
    assert run_script("sdssl.py", *flags, "--output_dir", tmp_path / "one").returncode == 0
    one, two = ([record["loss"] for record in losses_of(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 3 and one == pytest.approx(two, rel=1e-5)


# --------------------------------------------------------------- faults of files, of images, and of the world around a run


def test_our_own_files_are_never_stripped():
    """A timm model's norm below `head.` is its own: the headless model's weights come back whole; its classifier is left out."""
    timm = pytest.importorskip("timm")
    ours = common.create_backbone("timm/test_convnext", img_size=64)
    assert any(key.startswith("head.norm") for key in ours.model.state_dict())
    whole = perturbed(timm.create_model("test_convnext"), seed=3).state_dict()
    assert any(key.startswith("head.fc") for key in whole)
    common.load_weights(ours, common.backbone_weights(whole), "timm's")
    assert all(torch.equal(value, whole[key]) for key, value in ours.model.state_dict().items())
    weights = common.backbone_weights({"student": under("backbone.", ours.state_dict()), "meta": {"network": "student"}})
    assert weights.keys() == ours.model.state_dict().keys()


@pytest.mark.parametrize("arch", ["resnet18", "timm/test_vit"])
def test_moco_weights_for_another_network_are_one_line(arch, tmp_path):
    moco = common.vit_small(img_size=64, patch_size=16, depth=1, num_heads=12, pos_embed="sincos").state_dict()
    torch.save({**moco, "pos_embed": moco["pos_embed"].roll(192, 2)}, tmp_path / "moco.pth")
    with pytest.raises(common.InputError, match="moco.pth does not fit this architecture"):
        common.start_from(common.create_backbone(arch, img_size=64), str(tmp_path / "moco.pth"))


def test_moco_positions_tell_its_heads(tmp_path):
    """Renamed keys: sine-cosine positions with x and y exchanged are MoCo v3's; ours and learnt ones are not."""
    moco = common.vit_small(img_size=64, patch_size=16, depth=1, num_heads=12, pos_embed="sincos").state_dict()
    for name, positions, heads in (("moco", moco["pos_embed"].roll(192, 2), 12), ("ours", moco["pos_embed"], None),
                                   ("learnt", torch.randn(1, 17, 384), None), ("half", moco["pos_embed"].roll(192, 2).half(), 12)):
        assert common.is_moco_small({**moco, "pos_embed": positions}, {}) == (heads == 12), name


def test_positions_of_other_peoples_files_follow_dino():
    """The factor (n + 0.1) / m, as DINO's interpolate_pos_encoding; ours go to the exact grid."""
    vit = perturbed(common.vit_nano(img_size=16, patch_size=4), size=0.3)
    positions = common.resize_positions(vit.pos_embed, vit.grid, (6, 3), as_dino=True)
    grid = vit.pos_embed[:, 1:].reshape(1, 4, 4, 96).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, scale_factor=(6.1 / 4, 3.1 / 4), mode="bicubic")
    assert expected.shape[-2:] == (6, 3)
    torch.testing.assert_close(positions[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, 18, 96))


def test_weights_that_are_not_finite_do_not_load():
    """One line that names the key."""
    broken = {**S, "norm.weight": S["norm.weight"].clone().fill_(math.nan)}
    with pytest.raises(InputError, match="norm.weight does not hold finite numbers"):
        common.load_weights(common.vit_nano(img_size=8, patch_size=4), broken, "some.pth")


@pytest.mark.parametrize("dtype, low, high", [(np.int32, -5, 100), (np.int32, 0, 70000)])
def test_integer_images_out_of_range_are_named(tmp_path, dtype, low, high):
    """Signed or wider than 16 bits: one line with the name and the range, and not a wrapped picture."""
    Image.fromarray(np.linspace(low, high, 63, dtype=dtype).reshape(7, 9)).save(tmp_path / "wide.tif")
    with pytest.raises(InputError, match=rf"wide.tif \(pixels from {low} to {high}"):
        common.read_image(tmp_path / "wide.tif")


def test_photographs_are_turned_upright(tmp_path):
    """EXIF orientation 6: the camera was turned by 90 degrees."""
    image = Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "phone.png", exif=exif)
    assert common.read_image(tmp_path / "phone.png").shape == (3, 6, 4)


def test_files_are_not_passed_over_without_a_word(tmp_path, capsys):
    """JPEG's other endings are read, other files counted aloud, an empty class stops, and validation/ is a test folder."""
    write_images(tmp_path / "train" / "ant", [9, 9], suffix="jpg")
    (tmp_path / "train" / "ant" / "000.jpg").rename(tmp_path / "train" / "ant" / "000.JFIF")
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no image")
    write_images(tmp_path / "validation" / "ant", [9])
    train, test = common.load_data(str(tmp_path))
    assert len(train) == 2 and len(test) == 1 and "1 .txt" in capsys.readouterr().out
    (tmp_path / "train" / "bee").mkdir()
    with pytest.raises(InputError, match="class folder .*bee has no images"):
        common.load_data(str(tmp_path))


def test_other_images_are_not_resumed_with(tmp_path, capsys, bare_runs):
    """One image that is gone changes every permutation: --resume says so; a folder that was only moved goes on."""
    import sdssl

    write_images(tmp_path / "data", [16] * 40)
    flags = [*METHODS["sdssl.py"], "--arch", "vit_nano", "--patch_size", 8, "--img_size", 16, "--batch_size", 16, "--epochs", 3,
             "--knn_every", 0, "--device", "cpu", "--output_dir", tmp_path / "run", "--save_every", 1]

    def train(*extra):
        return finished(capsys, lambda: (sdssl.train(sdssl.parse_arguments([*map(str, [*flags, *extra])])), sys.exit(0)))

    assert train("--data", tmp_path / "data", "--max_steps", 1).returncode == 0
    assert train("--data", tmp_path / "data", "--max_steps", 2, "--resume").returncode == 0
    (tmp_path / "data" / "007.png").unlink()
    assert_one_line_error(train("--data", tmp_path / "data", "--max_steps", 3, "--resume"), "its images were others: 40 images.*now 39 images")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    """Exit code 1, the old file whole, no .tmp; and a stdout that takes nothing does not end the run."""
    common.save_file({"step": 1}, tmp_path / "checkpoint.pth")

    def full(content, file, *args, **kwargs):
        file.write(b"half a file")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    result = finished(capsys, lambda: common.save_file({"step": 2}, tmp_path / "checkpoint.pth"))
    assert_one_line_error(result, "cannot write .*checkpoint.pth .*file write failed", code=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]
    assert common.read_checkpoint(tmp_path / "checkpoint.pth") == {"step": 1}
    terminal = common.Terminal(open("/dev/full", "w", encoding="ascii"))
    print("Größe " * 10_000, file=terminal, flush=True)


def test_a_signal_outside_of_a_step_is_one_line(tmp_path):
    """Ctrl-C in an evaluation, or before the first step: exit code 128 + number and no traceback."""
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport os, signal, time, common\n"
                      "common.launch(lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60)))\n")
    result = run_script(script, cwd=tmp_path)
    assert result.returncode == 128 + signal.SIGTERM and result.stderr.strip() == "stopped by SIGTERM"


def test_a_hub_that_cannot_be_reached_is_one_line_soon(monkeypatch):
    """No retries: without an answer only the cache is looked at."""
    import huggingface_hub

    def no_answer(request, timeout):
        assert timeout <= 5
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", no_answer)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match="cannot make timm/vit_tiny_patch16_224") as caught:
        common.create_backbone("timm/vit_tiny_patch16_224", pretrained=True)
    assert huggingface_hub.constants.HF_HUB_OFFLINE and "\n" not in str(caught.value)


def test_the_recipe_can_be_named(capsys):
    args = argparse.Namespace(recipe="cifar10", data="digits", img_size=None, lr=None, device="cpu", dtype="fp32")
    recipes = {"digits": {"lr": 1.0}, "cifar10": {"lr": 2.0}}
    common.apply_recipe(args, recipes, common.load_data("digits")[0])
    assert args.lr == 2.0 and "recipe cifar10" in capsys.readouterr().out
    args.recipe = "cifar11"
    with pytest.raises(InputError, match="unknown --recipe cifar11: use one of digits cifar10"):
        common.apply_recipe(args, recipes, common.load_data("digits")[0])
