"""Tests: behavior, with numbers from elsewhere (numpy, other implementations, the paper's tables).

    python -m pytest test_all.py

They take about fourteen minutes on two cores, and need neither a network nor a GPU. timm and
transformers are compared with where they are installed. The order is that of the files.
"""

import argparse
import contextlib
import copy
import csv
import functools
import gzip
import glob
import itertools
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import tarfile
import time
import types
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch._subclasses.fake_tensor import FakeTensorMode

import finetune_cls
import finetune_seg
import masking
import model as network
import pretrain
from masking import MASKS, BadInput, blockwise_mask, random_mask
from model import (
    CONTRASTIVE_LOSSES, VIT_SIZES, BEiT, Classifier, ContrastiveLoss, LinearProbes, Segmenter,
    UpsamplingHead, ViT, ViTConfig, export_weights, load_weights, param_groups, read_checkpoint,
)
from pretrain import read_metrics, sample_batch
from tokenizer import DVAE, TOKENIZERS, ContinuousTarget, DVAEConfig, build_tokenizer

MEAN, STD = masking.NORMS["imagenet"]
CPU = torch.device("cpu")
HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPTS = {"pretrain": pretrain, "finetune_cls": finetune_cls, "finetune_seg": finetune_seg}
KILLS = int(os.environ.get("KILLS", 3))  # how often the kill test kills; 20 takes some minutes

# ---- what the tests share ------------------------------------------------------------------------

COMMON = (
    "--preset=shapes --image_size=32 --steps=6 --warmup_epochs=0 --num_workers=0 --log_every=1 "
    "--eval_every=0 --save_every=2 --drop_path=0.1"
).split()
TOY = COMMON + (
    "--patch_size=4 --batch_size=8 --lr=3e-3 --downsample=2 --vocab_size=32 --dvae_dim=8 "
    "--tokenizer_steps=2 --val_images=8 --jitter=0.4"
).split()
TUNING = [*COMMON, "--patch_size=8", "--batch_size=6", "--weights=none"]
TOY_CLS = [*TUNING, "--labels_per_class=0"]
TOY_SEG = [*TUNING, "--stride=20", "--num_classes=3", "--ignore_zero=true"]
TOYS = {"pretrain": TOY, "finetune_cls": TOY_CLS, "finetune_seg": TOY_SEG}


def python(*words, processes=1, check=True, **options):
    """Run a script of this repository as a user would; returns the finished process."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    options = dict(capture_output=True, text=True, cwd=HERE, timeout=300) | options
    done = subprocess.run([*launch, *map(str, words)], **options)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def toy(out, *words, script=pretrain, options=TOY):
    """A toy run in this process; returns its metrics."""
    script.main([*options, f"--out={out}", *map(str, words)])
    return read_metrics(f"{out}/metrics.jsonl")


toy_cls = functools.partial(toy, script=finetune_cls, options=TOY_CLS)
toy_seg = functools.partial(toy, script=finetune_seg, options=TOY_SEG)


def parse(*words, script=pretrain):
    choices = pretrain.CHOICES if script is pretrain else pretrain.RUN_CHOICES
    tasks = getattr(script, "TASKS", None) or script.OBJECTIVES | script.OTHER_TASKS
    choices = {**choices, "task": tasks}
    return pretrain.parse_args(script.Config, script.PRESETS, choices, list(words))


def failure_of(capsys, call, code=2):
    """The one line that a script with bad input prints; `code` is its exit code."""
    with pytest.raises(SystemExit) as stop:
        pretrain.run(call)
    assert stop.value.code == code
    text = capsys.readouterr().err.strip()
    assert text.startswith("error: ") and "\n" not in text, text
    return text


def error_of(capsys, *words, script=pretrain):
    """The one line that a command with bad input prints."""
    return failure_of(capsys, lambda: script.main(list(map(str, words))))


def check_errors(capsys, common, cases, script=pretrain):
    """`cases` are (words beside the common ones, what the message must say), or only what it must
    say if the words stand before its colon."""
    for case in cases:
        words, message = (case.split(": ")[0], case) if isinstance(case, str) else case
        text = error_of(capsys, *common, *words.split(), script=script)
        assert message in text, (words, text)


def help_of(capsys, script=pretrain):
    """What --help says of the options, on one line."""
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    text = re.split("positional arguments:|options:", capsys.readouterr().out, maxsplit=1)[1]
    return " ".join(text.split())


def saved(out):
    return read_checkpoint(f"{out}/checkpoint.pt")


def same_weights(a, b):
    a, b = saved(a)["model"], saved(b)["model"]
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def gradients(out):
    """AdamW's first moment after one step is a tenth of the gradient."""
    state = saved(out)["optimizer"]["state"]
    return torch.cat([state[key]["exp_avg"].flatten() for key in sorted(state)]) * 10


def views_of(config, token_size, train=False):
    """The views of a run's training images, or of the held-out ones."""
    images = masking.open_images(config.data, config.image_size, config.val_images)
    return masking.Views(images[0 if train else 1], config, token_size, train, config.mask)


def make_objective(*words, tokenizer=None):
    """A toy objective of pre-training, and the views that it is trained on."""
    config = parse(*TOY, *words)
    objective = pretrain.make_objective(config, CPU, tokenizer)
    images = masking.open_images(config.data, config.image_size, config.val_images)[0]
    return objective, masking.Views(images, config, objective.token_size, True, objective.mask,
                                    objective.extra_views)


def shake(model):
    """Give every parameter a value that matters, tables and gains included."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * 0.03
            parameter.copy_(noise + 1 if ("norm" in name and "weight" in name) else noise)
            if "gamma" in name:
                parameter.add_(0.5)
    return model.eval()


def small(image_size=32, position="absolute", cls=BEiT, **changes):
    config = dict(image_size=image_size, patch_size=4, dim=16, depth=2, heads=2, layer_scale=0.1)
    config = ViTConfig(position=position, **(config | changes))
    return shake(cls(config, 10) if cls is BEiT else cls(config))


NANO = ViTConfig.named("nano", image_size=32, patch_size=8)


def save(model, path, **more):
    torch.save({"model": model.state_dict(), "arch": asdict(model.config), **more}, path)


def drawing(side, number):
    return Image.fromarray(masking.draw_shapes(side, 7, number)[0])


def make_folder(path, count=12, side=40, different=1000):
    """Image files in nested folders. Where a test wants to see a loss fall, few are different: what
    there is to learn must be more than its noise, and two pictures are soon known by heart."""
    for number in range(count):
        place = path / f"class{number % 3}" / "deep"
        place.mkdir(parents=True, exist_ok=True)
        drawing(side, number % different).save(place / f"{number}.png")
    return path


def make_mapped(path, draw, counts=(6, 6), ending="png"):
    """A folder in ADE20K's layout: draw() gives an image and its label map, if there is one."""
    for part, count in zip(("training", "validation"), counts):
        for number in range(count):
            for kind, end, picture in zip(("images", "annotations"), ("png", ending), draw()):
                (path / kind / part).mkdir(parents=True, exist_ok=True)
                picture.save(path / kind / part / f"{number}.{end}")
    return path


def evaluated(path, side=32):
    """A square image file as the evaluation of whole images sees it: (1, 3, side, side)."""
    with Image.open(path) as image:
        pixels = np.asarray(image.resize((side, side), Image.BICUBIC)) / 255
    return torch.tensor((pixels - MEAN) / STD).permute(2, 0, 1)[None].float()


@pytest.fixture(autouse=True)
def seeded():
    """So that a test draws the same numbers whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def one_process(monkeypatch):
    """What torchrun --nproc_per_node=1 gives its process."""
    for name, value in dict(RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=0).items():
        monkeypatch.setenv(name, str(value))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """A folder with 24 training and 10 held-out images of 3 classes: a class has a color."""
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    for place, count in (("train/a", 8), ("train/b", 8), ("train/c", 8), ("val/a", 4), ("val/b", 3),
                         ("val/c", 3)):
        (folder / place).mkdir(parents=True)
        for number in range(count):
            image = rng.integers(0, 120, (40, 40, 3)).astype(np.uint8)
            image[..., "abc".index(place[-1])] += 100
            Image.fromarray(image).save(folder / place / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def mapped(tmp_path_factory):
    """A folder in ADE20K's layout with 12 and 5 images of several sizes: a color is a class."""
    rng = np.random.default_rng(0)

    def draw():
        height, width = rng.integers(30, 70, 2)
        labels = rng.integers(0, 4, (height // 10 + 1, width // 10 + 1))
        labels = labels.repeat(10, 0).repeat(10, 1)[:height, :width].astype(np.uint8)
        image = rng.integers(0, 100, (height, width, 3)).astype(np.uint8)
        for label in (1, 2, 3):
            image[labels == label, label - 1] += 150
        return Image.fromarray(image), Image.fromarray(labels)

    return make_mapped(tmp_path_factory.mktemp("mapped"), draw, (12, 5))


@pytest.fixture(scope="session")
def dvae(tmp_path_factory):
    """The path of a toy dVAE."""
    out = tmp_path_factory.mktemp("dvae")
    toy(out, "--task=tokenizer", "--steps=20")
    return f"{out}/checkpoint.pt"


@pytest.fixture(scope="session")
def dalle(tmp_path_factory):
    """A folder with full-size DALL-E modules of random weights, pickled as OpenAI's files are, and
    the modules. The official files predate an attribute of nn.Upsample, so it is taken out."""
    import dall_e

    folder = tmp_path_factory.mktemp("dalle")
    torch.manual_seed(0)
    modules = dall_e.Encoder(), dall_e.Decoder()
    for name, module in zip(("encoder", "decoder"), modules):
        old = copy.deepcopy(module)
        for part in old.modules():
            vars(part).pop("recompute_scale_factor", None)
        torch.save(old, folder / f"{name}.pkl")
    return folder, *modules


# ---- masking: masks ------------------------------------------------------------------------------


def test_blockwise_masks_have_the_official_statistics():
    rng = np.random.default_rng(0)
    counts = np.array([blockwise_mask(14, 14, 75, rng=rng).sum() for _ in range(5000)])
    assert abs(counts.mean() - 74.47) < 0.15  # official, of 5,000: 74.47, 66% of 75, least 65
    assert abs((counts == 75).mean() - 0.66) < 0.025
    assert counts.min() >= 62 and counts.max() == 75


def test_blocks_are_rectangles_of_the_requested_size_and_aspect():
    ratios = []
    for seed in range(500):
        rng = np.random.default_rng(seed)
        square = blockwise_mask(14, 14, 36, min_block=36, min_aspect=1, rng=rng)
        rows, columns = np.flatnonzero(square.any(1)), np.flatnonzero(square.any(0))
        assert square.dtype == bool and square.shape == (14, 14) and square.sum() == 36
        assert len(rows) == len(columns) == 6
        mask = blockwise_mask(14, 14, 30, min_block=30, rng=rng)
        h, w = mask.any(1).sum(), mask.any(0).sum()
        if mask.sum() == h * w:  # one block, without a smaller second one
            ratios.append(h / w)
            assert h < 14 and w < 14
    assert len(ratios) > 100 and 0.2 < min(ratios) < 0.5 and 2 < max(ratios) < 5
    assert abs(np.log(ratios).mean()) < 0.2  # tall and wide alike
    masks = [blockwise_mask(14, 14, 75, 16, 20, rng=rng) for _ in range(200)]
    jumps = np.mean([(mask[1:] != mask[:-1]).sum() for mask in masks])
    mixed = [random_mask(14, 14, 75, rng) for _ in range(200)]
    mixed = np.mean([(mask[1:] != mask[:-1]).sum() for mask in mixed])
    assert jumps < mixed / 2


def test_masks_of_any_grid_are_never_empty():
    for height, width, count, least in (
        (2, 2, 2, 1), (3, 3, 4, 2), (4, 4, 6, 4), (8, 8, 26, 16), (7, 20, 50, 16), (32, 32, 400, 16)
    ):
        for seed in range(200):
            mask = blockwise_mask(height, width, count, least, rng=np.random.default_rng(seed))
            assert 0 < mask.sum() <= count and mask.shape == (height, width)


def test_a_mask_that_cannot_be_placed_is_an_error():
    for arguments, message in (
        ((14, 14, 10), "min_block=16 with num_masked=10"),
        ((4, 4, 15, 15), "no block of at least 15 patches fits a 4x4 grid"),
        ((14, 14, 0), "mask at least 1 patch"),
        ((14, 14, 197), "at most 195"),
        ((14, 14, 75, 16, 10), "max_block=10 is below min_block=16"),
        ((14, 14, 75, 16, None, 0), "min_aspect=0"),
    ):
        with pytest.raises(BadInput, match=message):
            blockwise_mask(*arguments)


def test_random_masks():
    masks = np.array([random_mask(6, 5, 12, np.random.default_rng(s)) for s in range(2000)])
    assert masks.shape == (2000, 6, 5) and (masks.sum((1, 2)) == 12).all()
    assert abs(masks.mean(0) - 0.4).max() < 0.05  # every patch is equally likely
    with pytest.raises(BadInput, match="at most 30"):
        random_mask(6, 5, 31)


# ---- masking: images, views, batches -------------------------------------------------------------


def test_every_kind_of_image_file_becomes_upright_rgb(tmp_path):
    ramp = np.linspace(0, 255, 20 * 30).reshape(20, 30).astype(np.uint8)
    grey = ramp[..., None].repeat(3, 2)
    color = np.stack([ramp, ramp[::-1], 255 - ramp], axis=2)
    files = {
        "grey.png": (Image.fromarray(ramp), grey),
        "deep.png": (Image.fromarray(ramp.astype(np.uint16) * 257), grey),
        "palette.png": (Image.fromarray(color).quantize(256), color),
        "alpha.png": (Image.fromarray(color).convert("RGBA"), color),
        "cmyk.tif": (Image.fromarray(color).convert("CMYK"), color),
        "cmyk.jpg": (Image.fromarray(color).convert("CMYK"), color),
        "grey.jpg": (Image.fromarray(ramp), grey),
        "one_bit.png": (Image.fromarray(ramp).point(lambda v: 255 * (v > 99), "1"), None),
    }
    for name, (image, expected) in files.items():
        image.save(tmp_path / name, quality=95)
        read = masking.read_image(tmp_path / name)
        assert read.dtype == torch.uint8 and read.shape == (3, 20, 30)
        if expected is not None:
            difference = np.abs(read.permute(1, 2, 0).numpy().astype(int) - expected)
            assert difference.mean() < (8 if name == "palette.png" else 3), name
    ramp = np.linspace(0, 1, 20 * 30).reshape(20, 30)  # deep images are as bright as what they hold
    for dtype, tops in ((np.float32, (1, 255, 65535)), (np.int32, (255, 4095)),
                        (np.uint16, (255, 4095, 65535))):
        for top in tops:
            Image.fromarray((ramp * top).astype(dtype)).save(tmp_path / "deep.tif")
            read = masking.read_image(tmp_path / "deep.tif").numpy()
            assert np.abs(read - ramp * 255).max() <= 1, (dtype, top)


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_photographs_are_turned_as_their_tag_says(ending, tmp_path):
    picture = drawing(48, 0).crop((0, 0, 48, 32))
    exif = picture.getexif()
    for tag in range(1, 9):
        exif[0x0112] = tag
        path = tmp_path / f"{tag}.{ending}"
        picture.save(path, exif=exif)
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image))
        assert np.array_equal(masking.read_image(path).permute(1, 2, 0), expected), tag


def app1(payload):
    return b"\xff\xe1" + (len(payload) + 2).to_bytes(2, "big") + payload


@pytest.mark.parametrize("first", [
    b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta></x:xmpmeta>", b"", b"Exif\0\0no TIFF",
])
def test_photographs_are_turned_whatever_stands_before_exif(first, tmp_path):
    """What cameras and editors write: also an orientation of no meaning, or in XMP alone."""
    drawing(48, 0).crop((0, 0, 48, 32)).save(tmp_path / "plain.jpg", quality=95)
    plain = (tmp_path / "plain.jpg").read_bytes()
    turns = [b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0%c\0\0\0\0\0\0" % turn
             for turn in (1, 3, 5, 6, 7, 8, 77)]
    turns.append(b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation="6"></x:xmpmeta>')
    for turn in turns:
        (tmp_path / "a.jpg").write_bytes(plain[:20] + app1(first) + app1(turn) + plain[20:])
        with Image.open(tmp_path / "a.jpg") as image:
            expected = np.asarray(ImageOps.exif_transpose(image))
        assert np.array_equal(masking.read_image(tmp_path / "a.jpg").permute(1, 2, 0), expected)


def tiff16(array, order="<", planar=1):
    """A TIFF file of uint16 colors (height, width, 3), which Pillow reads but does not write."""
    height, width, channels = array.shape
    parts = array.transpose(2, 0, 1) if planar == 2 else array[None]
    size = array.nbytes // len(parts)
    start = 8 + 2 + 12 * 9 + 4  # of what does not fit the nine entries
    starts = [start + 6 + 8 * len(parts) + size * number for number in range(len(parts))]
    tables = np.array([*starts, *[size] * len(parts)], order + "u4").tobytes()
    entries = [(256, 1, width), (257, 1, height), (258, 3, start), (262, 1, 2),
               (273, len(parts), start + 6), (277, 1, channels), (278, 1, height),
               (279, len(parts), start + 6 + 4 * len(parts)), (284, 1, planar)]
    if len(parts) == 1:
        entries[4], entries[7] = (273, 1, starts[0]), (279, 1, size)
    pack = lambda form, *values: struct.pack(order + form, *values)  # noqa: E731
    fields = b"".join(
        pack("HHI", tag, 3 if tag in (258, 262, 277, 284) else 4, count)
        + (pack("HH", value, 0) if tag in (262, 277, 284) else pack("I", value))
        for tag, count, value in entries)
    head = {"<": b"II", ">": b"MM"}[order] + pack("HIH", 42, 8, 9) + fields + bytes(4)
    return head + pack("3H", 16, 16, 16) + tables + parts.astype(order + "u2").tobytes()


def test_colors_of_16_bits_are_read_or_refused(tmp_path):
    path = tmp_path / "a.tif"
    values = np.random.default_rng(0).integers(0, 65536, (8, 9, 3))
    for order in "<>":
        path.write_bytes(tiff16(values, order))
        read = masking.read_image(path).permute(1, 2, 0).numpy()
        assert np.abs(read - values / 257).max() <= 1
    gray = Image.fromarray(values[..., 0].astype(np.uint16))
    gray.save(path)
    white_is_0 = path.read_bytes().replace(struct.pack("<HHIH", 262, 3, 1, 1),
                                           struct.pack("<HHIH", 262, 3, 1, 0))
    for file in (tiff16(values // 16), tiff16(values, planar=2), white_is_0):
        path.write_bytes(file)
        with pytest.raises(BadInput, match="a.tif.*save it"):
            masking.folder_images(tmp_path).load(0)


@pytest.mark.parametrize("value", [-1.0, np.nan, 1e6])
def test_an_image_of_other_numbers_and_a_strip_are_refused(value, tmp_path):
    Image.fromarray(np.array([[0.5, value]], np.float32)).save(tmp_path / "odd.tif")
    Image.new("L", (2, 60_000)).save(tmp_path / "strip.png")
    for name, message in (("odd.tif", "8 or 16 bits"), ("strip.png", "2x60000 pixels")):
        images = masking.folder_images(tmp_path)
        with pytest.raises(BadInput, match=f"{name}.*{message}"):
            images.load([*images.keys].index(str(tmp_path / name)))


def test_each_real_file_counts_once_and_hidden_ones_do_not(tmp_path):
    make_folder(tmp_path / "train", 9)
    make_folder(tmp_path / "val", 3)
    (tmp_path / "train" / "up").symlink_to(tmp_path)  # leads back to train/, and to val/
    (tmp_path / "train" / "again").symlink_to(tmp_path / "train" / "class0")
    (tmp_path / "train" / "copy.png").symlink_to(tmp_path / "val" / "class0" / "deep" / "0.png")
    for name in ("._0.png", ".ipynb_checkpoints/0.png", "__MACOSX/0.png"):
        (tmp_path / "train" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / name).write_bytes(b"no image")
    elsewhere = make_folder(tmp_path / "elsewhere", 2)
    (tmp_path / "train" / "linked").symlink_to(elsewhere)
    train, val = masking.open_images(str(tmp_path), 32, 2048)
    real = [os.path.realpath(path) for path in train.keys]
    assert len(train) == len(set(real)) == 11 and len(val) == 3
    assert not set(real) & {os.path.realpath(path) for path in val.keys}
    assert not any("/again/" in path for path in train.keys)  # the real path is preferred
    assert len(masking.folder_images(tmp_path)) == 14


def test_folders_are_searched_recursively_and_split(tmp_path):
    train, val = masking.open_images(str(make_folder(tmp_path / "flat", 30)), 32, 2048)
    assert len(train) == 27 and len(val) == 3  # a tenth is held out
    assert not set(train.keys) & set(val.keys)
    make_folder(tmp_path / "parts" / "train", 9), make_folder(tmp_path / "parts" / "val", 5)
    train, val = masking.open_images(str(tmp_path / "parts"), 32, 2048)
    assert len(train) == 9 and len(val) == 5 and "/val/" in val.name(0)


@pytest.mark.parametrize("folders, expected", [
    ("train val", "train val"), ("Train Val", "Train Val"), ("train", "train val"),
    ("Training TESTING", "Training TESTING"), ("train val test extra .git", "train val"),
    ("train @eaDir", "train val"), ("train valid", "train valid"), ("train ape", ""),
    ("ape bee", ""), ("", ""), ("ape bee test", "train test"),
])
def test_parts_of_a_folder(folders, expected, tmp_path):
    for name in folders.split():
        (tmp_path / name).mkdir()
    found = masking.open_parts(str(tmp_path))
    names = [os.path.basename(images.source) for images in found] if len(found) == 2 else []
    assert names == expected.split()


def test_what_was_found_is_said_and_systems_folders_are_none(tmp_path, capsys):
    for name in ("ape/0.jfif", "ape/1.JPE", "bee/0.png", "bee/1.heic", "bee/notes.txt",
                 "bee/.0.png", "@eaDir/0.png", "bee/#recycle/0.png", "lost+found/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        drawing(8, 0).save(tmp_path / name, "JPEG" if "j" in name.lower()[-4:] else "PNG")
    (tmp_path / "cow.png").symlink_to(tmp_path / "bee" / "0.png")
    images = masking.folder_images(str(tmp_path))
    assert images.stems() == ["ape/0", "ape/1", "bee/0"]
    said = capsys.readouterr().out
    assert "3 images; 2 folders, such as {'ape': 2, 'bee': 1}; left out: {" in said
    assert "{'hidden': 4, 'seen elsewhere': 1, '.heic': 1, '.txt': 1}" in said


def make_tar(path, folder, **options):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        tar.add(folder, ".")
    return path


@pytest.fixture
def tars(tmp_path, labelled, monkeypatch):
    """What holds the images of `labelled`: a tar, a folder of tars of tars, as of ImageNet."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for part in ("train", "val"):
        for name in "abc":
            make_tar(tmp_path / part / f"{name}.tar", labelled / part / name)
        make_tar(tmp_path / "nested" / f"{part}.tar", tmp_path / part)
    whole = make_tar(tmp_path / "all.tar", labelled, format=tarfile.PAX_FORMAT)
    return [whole, tmp_path / "nested"]


def test_tars_hold_what_the_folder_holds(tars, labelled, tmp_path, monkeypatch):
    expected = finetune_cls.open_labelled(finetune_cls.Config(data=str(labelled)))
    for data in map(str, tars):
        for opened in range(2):  # the second time from the index
            for ours, other in zip(masking.open_images(data, 32, 100), expected):
                assert ours.stems() == other.stems() and ours.fingerprint() == other.fingerprint()
                for index in range(len(ours)):
                    assert torch.equal(ours.load(index)[0], other.load(index)[0])
            monkeypatch.setattr(masking, "list_tar", None)
        config = finetune_cls.Config(data=data)
        for ours, other in zip(finetune_cls.open_labelled(config), expected):
            assert ours.classes == other.classes
            labels = [[images.read_label(key) for key in images.keys] for images in (ours, other)]
            assert labels[0] == labels[1]
        monkeypatch.undo(), monkeypatch.setattr(torch.hub, "get_dir", lambda: f"{tmp_path}/hub")
    shards = [make_tar(tmp_path / "shards" / f"{n}.tar", labelled / "train" / n) for n in "abc"]
    images = masking.folder_images(str(tmp_path / "shards"))
    assert images.stems() == expected[0].stems()  # a flat tar is a class
    both = make_folder(tmp_path / "download.target", 3)  # a tar beside images is no source
    make_tar(both / "left.tar", labelled)
    assert len(masking.folder_images(str(both))) == 3
    photograph = f"{both}/class0/deep/0.png"
    assert [*masking.open_pictures(photograph, 32).keys] == [photograph]
    os.utime(shards[0], (1, 1))  # another one now
    monkeypatch.setattr(masking, "list_tar", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        masking.folder_images(str(tmp_path / "shards"))


def test_runs_on_a_tar_are_those_on_its_folder(tars, labelled, tmp_path, dvae):
    words = [f"--tokenizer=dvae:{dvae}", "--num_workers=1", "--batch_size=4"]
    losses = [[line["loss"] for line in toy(tmp_path / f"{number}", f"--data={data}", *words)]
              for number, data in enumerate((labelled, tars[0]))]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    toy(tmp_path / "0", f"--data={tars[1]}", *words)  # the same run
    toy_cls(tmp_path / "cls", f"--data={tars[0]}")
    for data in (labelled, tars[0]):
        finetune_cls.main([*COMMON, "--task=predict", f"--data={data}", f"--out={tmp_path}/cls",
                           f"--weights={tmp_path}/cls/checkpoint.pt"])
        rows = list(csv.reader(open(tmp_path / "cls" / "predictions.csv")))
        assert len(rows) == 35 and rows[1][0] == "train/a/0.png"


def test_tars_that_cannot_be_read_in_place_are_one_line(tars, tmp_path, capsys):
    whole = tars[0].read_bytes()
    images = whole[: -(-len(whole.rstrip(b"\0")) // 512) * 512]
    bad = tmp_path / "bad.tar"
    for content, message in (
        (gzip.compress(whole), "without compression (invalid header)"), (b"", "(empty file)"),
        (whole[: len(whole) // 2], "(unexpected end"), (images, "(its end is missing)"),
        (bytes(10240), "no two images"),
    ):
        bad.write_bytes(content)
        text = error_of(capsys, *TOY, "--tokenizer=pixel", f"--data={bad}", f"--out={tmp_path}/o")
        assert message in text and "bad.tar: " in text


def test_only_the_outline_of_a_shape_identifies_its_class():
    draws = [masking.draw_shapes(48, 0, index) for index in range(1500)]
    labels = np.array([label for _, label, _ in draws])
    assert abs(np.bincount(labels, minlength=8) / 1500 - 1 / 8).max() < 0.03
    for image, label, label_map in draws[:50]:
        assert image.shape == (48, 48, 3) and label_map.shape == (48, 48)
        assert np.bincount(label_map.flatten(), minlength=9)[1:].argmax() == label  # the main one
    colors = np.array([image.reshape(-1, 3).mean(0) / 255 for image, _, _ in draws])
    areas = np.array([(label_map == label + 1).mean() for _, label, label_map in draws])
    for statistic in (*colors.T, areas):  # no class differs from the rest by more than noise
        means = np.array([statistic[labels == kind].mean() for kind in range(8)])
        noise = statistic.std() / math.sqrt(1500 / 8)
        assert abs(means - statistic.mean()).max() < 4.5 * noise
    for size in (17, 224):
        image, label, _ = masking.draw_shapes(size, 0, 3)
        assert image.shape == (size, size, 3) and label == labels[3]


def test_both_views_show_the_same_crop():
    config = pretrain.Config(image_size=64, patch_size=8, min_block=4)
    ramp = np.add.outer(np.arange(90), 2 * np.arange(120)).clip(0, 255).astype(np.uint8)
    images = masking.Images([0], lambda key: ramp[..., None].repeat(3, 2), "ramp")
    views = masking.Views(images, config, 32, train=True, mask="block")
    crops = set()
    for epoch in range(20):
        sample = views[epoch, 0, 1.0]
        assert sample["images"].shape == (3, 64, 64) and sample["token_images"].shape == (3, 32, 32)
        assert sample["mask"].shape == (8, 8) and sample["mask"].sum() > 0
        shrunk = F.avg_pool2d(sample["images"].float(), 2)
        assert (shrunk - sample["token_images"].float()).abs().mean() < 3
        crops.add(sample["images"].numpy().tobytes())
        again = views[epoch, 0, 1.0]
        assert all(torch.equal(value, torch.as_tensor(again[k])) for k, value in sample.items()
                   if torch.is_tensor(value))
        loaded = next(iter(masking.make_loader(views, [[(epoch, 0, 1.0)]], 0, CPU)))
        inputs = masking.network_inputs(loaded, CPU, "half")
        shrunk = F.avg_pool2d(inputs["images"] / 2 + 0.5, 2)  # the colors too
        assert (shrunk - inputs["token_images"]).abs().mean() < 3 / 255
        assert inputs["positions"].tolist() == np.flatnonzero(sample["mask"].numpy()).tolist()
    assert len(crops) == 20


def test_pictures_are_of_images_from_everywhere():
    config = pretrain.Config(image_size=32, patch_size=8, min_block=4)
    images = masking.Images(list(range(101)), lambda key: np.full((32, 32, 3), 2 * key, np.uint8),
                            "greys")  # a class's files lie together
    views = masking.Views(images, config, 16, train=False, mask="block")
    greys = sample_batch(views, 5)["token_images"].float().mean(dim=(1, 2, 3))
    assert torch.allclose(greys, torch.tensor([0.0, 50, 100, 150, 200]))
    assert len(sample_batch(views, 200)["images"]) == 101


def test_the_change_of_colors_is_torchvisions_jitter_in_any_order():
    images = 0.4 + 0.2 * torch.rand(20, 3, 24, 24)  # so that nothing is clipped
    factors = torch.empty(20, 3).uniform_(0.6, 1.4)
    found = masking.jitter_colors(images, factors)
    orders = itertools.permutations(enumerate(("brightness", "contrast", "saturation")))
    for i, order in itertools.product(range(20), orders):
        expected = images[i]
        for place, change in order:
            adjust = getattr(torchvision.transforms.functional, f"adjust_{change}")
            expected = adjust(expected, factors[i, place].item())
        # torchvision's weights of red, green and blue sum up to 0.9999
        assert (found[i] - expected).abs().max() < 1e-4
    assert (found - images).abs().max() > 0.01


@pytest.mark.parametrize("size", [(90, 120), (400, 40)])
def test_crops_are_distributed_as_torchvisions(size):
    rng = np.random.default_rng(0)
    image = torch.empty(1, *size)
    transform = torchvision.transforms.RandomResizedCrop(224)
    draws = []
    for _ in range(10_000):
        rows, columns = masking.draw_crop(*size, 0.08, rng)
        ours = (rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
        theirs = transform.get_params(image, transform.scale, transform.ratio)
        assert min(ours) >= 0 and rows.stop <= size[0] and columns.stop <= size[1]
        draws.append([[top, left, h * w, h / w] for top, left, h, w in (ours, theirs)])
    # Kolmogorov and Smirnov's distance of each statistic's two distributions: 0.0276 has p = 0.001
    for pair in np.sort(np.transpose(draws, (2, 1, 0))):  # (2, draws)
        shares = [np.searchsorted(one, pair.flatten(), "right") / len(draws) for one in pair]
        assert np.abs(shares[0] - shares[1]).max() < 0.0276


def test_no_more_loaders_than_cores_that_may_be_used(capsys):
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(everywhere)})  # as srun does, unless told otherwise
    try:
        assert masking.make_loader([0], [[0]], 8, CPU).num_workers == 1
        pretrain.setup_device(pretrain.Config(device="cpu"))
    finally:
        os.sched_setaffinity(0, everywhere)
    assert capsys.readouterr().out.strip().endswith(" 1 cores")


def test_a_tiny_network_computes_in_one_thread_on_any_number_of_cores(tmp_path, dvae):
    for threads in (1, 2):
        torch.set_num_threads(threads)
        pretrain.setup_device(pretrain.Config(device="cpu"))
        assert torch.get_num_threads() == threads  # left as it was
        toy(tmp_path / str(threads), f"--tokenizer=dvae:{dvae}")
        assert torch.get_num_threads() == 1
    assert same_weights(tmp_path / "1", tmp_path / "2")


def test_micro_batches_are_even():
    batch = {"images": torch.arange(171), "mask": torch.arange(171) % 2}
    parts = masking.micro_batches(batch, 128)
    assert [len(part["images"]) for part in parts] == [86, 85]
    for name, whole in batch.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), whole)


def test_batches_do_not_depend_on_workers_or_processes(monkeypatch):
    dataset = views_of(parse(*TOY), 16, train=True)
    seen = {}
    for processes, workers in ((1, 0), (1, 4), (2, 0), (3, 2)):
        parts = []
        for rank in range(processes):
            monkeypatch.setenv("RANK", str(rank)), monkeypatch.setenv("WORLD_SIZE", str(processes))
            keys = list(masking.batches_of_steps(1999, 2002, 20_000, 10, 0))
            for step, part in enumerate(keys, 1999):  # the last of an epoch, and two of the next
                assert {(epoch, done) for epoch, _, done in part} == {(step // 2000, step / 2002)}
            parts.append(list(masking.make_loader(dataset, keys, workers, CPU)))
        whole = [{k: torch.cat([p[s][k] for p in parts]) for k in parts[0][s]} for s in range(3)]
        seen[processes, workers] = whole
        assert all(len(batch["mask"]) == 10 for batch in whole)
    for batches in seen.values():
        for batch, reference in zip(batches, seen[1, 0]):
            assert all(torch.equal(batch[name], reference[name]) for name in batch)
    epoch = [index for s in range(2000) for _, index in masking.batch_of_step(s, 20_000, 10, 0)]
    assert sorted(epoch) == list(range(20_000))  # every image once per epoch
    repeated = masking.batch_of_step(5, 100, 12, seed=0, repeats=3)
    indices = [index for _, index in repeated]
    assert len(set(indices)) == 4 and all(indices.count(i) == 3 for i in indices)
    assert len(set(repeated)) == 12  # each image thrice, and each time another view


# ---- tokenizer -----------------------------------------------------------------------------------


def test_dalle_reads_the_official_pickles(dalle):
    folder, encoder, decoder = dalle
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 53_786_240
    tokenizer = build_tokenizer(f"dalle:{folder}")
    assert (tokenizer.vocab_size, tokenizer.downsample) == (8192, 8)
    images = torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        tokens = encoder(images * 0.8 + 0.1).argmax(1)  # map_pixels, written out
        codes = F.one_hot(tokens, 8192).permute(0, 3, 1, 2).float()
        decoded = ((torch.sigmoid(decoder(codes)[:, :3]) - 0.1) / 0.8).clamp(0, 1)
    assert torch.equal(tokenizer.encode(images), tokens) and tokens.shape == (2, 2, 3)
    at = torch.tensor([0, 3, 4, 10])
    assert torch.equal(tokenizer.encode_at(images, at), tokens.flatten()[at])
    saved_flops = (pretrain.flops_of(tokenizer.encode, images)
                   - pretrain.flops_of(tokenizer.encode_at, images, at))
    assert saved_flops == 2 * (12 - 4) * 2048 * 8192
    assert torch.allclose(tokenizer.decode(tokens), decoded, atol=1e-5)
    assert decoded.shape == images.shape


def test_our_dvae_has_any_downsampling():
    images = torch.rand(2, 3, 32, 48)
    for downsample in (1, 2, 4, 8, 16):
        model = DVAE(DVAEConfig(20, downsample, 8)).eval()
        tokens = model.encode(images)
        assert tokens.shape == (2, 32 // downsample, 48 // downsample)
        decoded = model.decode(tokens)
        assert tokens.dtype == torch.int64 and decoded.shape == images.shape
        assert 0 <= decoded.min() <= decoded.max() <= 1
    with pytest.raises(BadInput, match="downsample=3 is no power of two"):
        DVAEConfig(20, 3)


def test_autocast_changes_no_token_of_our_dvae(dvae):
    tokenizer = build_tokenizer(f"dvae:{dvae}")
    images = sample_batch(views_of(parse(*TOY), 16), 8)["token_images"] / 255
    tokens = tokenizer.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(images), tokens) and len(tokens.unique()) > 2
        at = torch.tensor([5, 2, 77])
        assert torch.equal(tokenizer.encode_at(images, at), tokens.flatten()[at])


def test_the_dvae_loss_is_the_formula():
    model, images = DVAE(DVAEConfig(6, 4, 8)), torch.rand(2, 3, 8, 8)
    torch.manual_seed(5)
    loss, metrics = model.training_loss(images, 0.5, 0.3)
    torch.manual_seed(5)
    uniform = torch.rand(2, 6, 2, 2).double().numpy()
    logits = model.logits(images).double().detach().numpy()
    q = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    kl = (q * np.log(q * 6)).sum(1).mean()
    relaxed = np.exp((logits - np.log(-np.log(uniform))) / 0.5)
    relaxed /= relaxed.sum(1, keepdims=True)
    codes = np.einsum("bvhw,vd->bdhw", relaxed, model.codebook.weight.double().detach().numpy())
    output = model.decoder(torch.tensor(codes).float()).detach().double().numpy()
    error = ((output - (2 * images.double().numpy() - 1)) ** 2).mean()
    assert math.isclose(loss.item(), error + 0.3 * kl, rel_tol=1e-4)
    assert math.isclose(metrics["kl"].item(), kl, rel_tol=1e-4)


def slow_vqgan(state, images):
    """taming-transformers' f=16 VQ-GAN from its paper and its checkpoint's names: (features before
    the codebook, tokens, decoded images)."""

    def conv(x, name, **options):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    def norm(x, name):
        groups = x.reshape(len(x), 32, -1)
        mean, var = groups.mean(2, keepdim=True), groups.var(2, unbiased=False, keepdim=True)
        x = ((groups - mean) / (var + 1e-6).sqrt()).view_as(x)
        weight, bias = (state[f"{name}.{kind}"][:, None, None] for kind in ("weight", "bias"))
        return x * weight + bias

    def swish(x):
        return x * torch.sigmoid(x)

    def block(x, name):
        h = conv(swish(norm(x, f"{name}.norm1")), f"{name}.conv1", padding=1)
        h = conv(swish(norm(h, f"{name}.norm2")), f"{name}.conv2", padding=1)
        short = f"{name}.nin_shortcut"
        return h + (conv(x, short) if f"{short}.weight" in state else x)

    def attention(x, name):
        q, k, v = (conv(norm(x, f"{name}.norm"), f"{name}.{kind}").flatten(2) for kind in "qkv")
        weights = (torch.einsum("bci,bcj->bij", q, k) / math.sqrt(x.shape[1])).softmax(2)
        return x + conv(torch.einsum("bij,bcj->bci", weights, v).view_as(x), f"{name}.proj_out")

    def blocks(x, name, level, count):
        for number in range(count):
            x = block(x, f"{name}.{level}.block.{number}")
            x = attention(x, f"{name}.{level}.attn.{number}") if level == 4 else x
        return x

    def middle(x, name):
        return block(attention(block(x, f"{name}.block_1"), f"{name}.attn_1"), f"{name}.block_2")

    x = conv(images * 2 - 1, "encoder.conv_in", padding=1)
    for level in range(5):
        x = blocks(x, "encoder.down", level, 2)
        if level < 4:
            x = conv(F.pad(x, (0, 1, 0, 1)), f"encoder.down.{level}.downsample.conv", stride=2)
    x = swish(norm(middle(x, "encoder.mid"), "encoder.norm_out"))
    features = conv(conv(x, "encoder.conv_out", padding=1), "quant_conv")
    codes = state["quantize.embedding.weight"]
    tokens = (features.unsqueeze(1) - codes[None, :, :, None, None]).square().sum(2).argmin(1)
    x = conv(codes[tokens].permute(0, 3, 1, 2), "post_quant_conv")
    x = middle(conv(x, "decoder.conv_in", padding=1), "decoder.mid")
    for level in reversed(range(5)):
        x = blocks(x, "decoder.up", level, 3)
        if level > 0:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = conv(x, f"decoder.up.{level}.upsample.conv", padding=1)
    x = conv(swish(norm(x, "decoder.norm_out")), "decoder.conv_out", padding=1)
    return features, tokens, ((x + 1) / 2).clamp(0, 1)


def test_vqgan_reads_lightnings_checkpoint_and_computes_the_same(tmp_path, monkeypatch):
    vqgan = TOKENIZERS["vqgan"]
    with torch.device("meta"):  # of the originals' full size
        counts = [sum(p.numel() for p in vqgan(codes).parameters()) for codes in (1024, 16384)]
    assert counts == [72_141_699, 76_073_859]
    monkeypatch.setattr("tokenizer.CHANNELS", (32, 32, 64, 64, 128))
    state = vqgan(50).state_dict()
    state["quantize.embedding.weight"] *= 0.3
    # as Lightning writes it: callbacks by their class, and a loss's networks
    callback = types.ModuleType("pytorch_lightning")
    callback.Callback = type("Callback", (), {"__module__": callback.__name__})
    monkeypatch.setitem(sys.modules, callback.__name__, callback)
    state["loss.discriminator.weight"] = torch.zeros(3)
    content = {"state_dict": state, "epoch": 1, "callbacks": {callback.Callback: np.float64(0.5)}}
    torch.save(content, tmp_path / "last.ckpt")
    monkeypatch.delitem(sys.modules, callback.__name__)

    vqgan = build_tokenizer(f"vqgan:{tmp_path}/last.ckpt")
    assert (vqgan.vocab_size, vqgan.downsample) == (50, 16)
    for height, width in ((32, 32), (48, 80), (64, 32)):
        images = torch.rand(2, 3, height, width)
        with torch.no_grad():
            features, tokens, decoded = slow_vqgan(state, images)
            assert (vqgan.quant_conv(vqgan.encoder(images * 2 - 1)) - features).abs().max() < 1e-4
        with torch.autocast("cpu", torch.bfloat16):  # it is off
            assert torch.equal(vqgan.encode(images), tokens) and len(tokens.unique()) > 2
        assert tokens.shape == (2, height // 16, width // 16)
        assert (vqgan.decode(tokens) - decoded).abs().max() < 1e-4
    torch.save({"state_dict": {"quantize.embedding.weight": torch.zeros(5, 256)}}, tmp_path / "x")
    with pytest.raises(BadInput, match="x: no checkpoint of taming-transformers' f=16 VQ-GAN"):
        build_tokenizer(f"vqgan:{tmp_path}/x")


def test_pixels_are_those_of_the_patch():
    images = torch.rand(2, 3, 8, 12)
    plain, normed = (build_tokenizer(spec, patch_size=4) for spec in ("pixel", "pixel:norm"))
    values, normed = plain.encode(images), normed.encode(images)
    assert values.shape == (2, 2, 3, 48) and plain.downsample == 4
    patch = images[1, :, 4:8, 8:12].flatten()  # row 1, column 2
    assert torch.allclose(values[1, 1, 2], 4 * patch - 2, atol=1e-6)
    expected = (patch - patch.mean()) / patch.std(unbiased=False)
    assert torch.allclose(normed[1, 1, 2], expected, atol=1e-3)
    assert torch.allclose(plain.decode(values), images, atol=1e-6)
    with pytest.raises(BadInput, match="pixel:x: give pixel or pixel:norm"):
        build_tokenizer("pixel:x")


# ---- model: the network --------------------------------------------------------------------------


def test_sizes_follow_table_12_and_deit():
    table = {"tiny": (12, 192, 3, 768), "small": (12, 384, 6, 1536), "base": (12, 768, 12, 3072),
             "large": (24, 1024, 16, 4096)}
    for size, (layers, width, heads, mlp) in table.items():
        with torch.device("meta"):
            model = ViT(ViTConfig.named(size, "released"))
        assert len(model.blocks) == layers and model.blocks[0].attn.heads == heads
        assert model.blocks[0].mlp.fc1.weight.shape == (mlp, width)
        assert model.config.layer_scale == (1e-5 if size == "large" else 0.1)
    for variant, count in (("released", 91_965_776), ("paper", 92_089_856)):
        with torch.device("meta"):
            model = BEiT(ViTConfig.named("base", variant), 8192)
        assert sum(parameter.numel() for parameter in model.parameters()) == count
    with pytest.raises(BadInput, match="'huge' is none of nano, tiny, small, base, large"):
        ViTConfig.named("huge")


@pytest.mark.parametrize("variant", ["paper", "released", "relative"])
def test_every_layer_equals_timms(variant):
    beit = pytest.importorskip("timm.models.beit")
    changes = dict(position="relative") if variant == "relative" else {}
    config = ViTConfig.named("base", "paper" if variant == "paper" else "released", **changes)
    ours = shake(ViT(config))
    theirs = beit.Beit(
        num_classes=0, global_pool="token", init_values=config.layer_scale or None,
        use_abs_pos_emb=variant == "paper", use_rel_pos_bias=variant == "relative",
        use_shared_rel_pos_bias=variant == "released",
    ).eval()
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not missing.unexpected_keys and all("norm" in name for name in missing.missing_keys)
    outputs = {ours: [], theirs: []}
    for model, kept in outputs.items():
        for block in model.blocks:
            block.register_forward_hook(lambda m, i, output, kept=kept: kept.append(output))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        ours(images), theirs.forward_features(images)
    assert len(outputs[ours]) == 12
    for a, b in zip(*outputs.values()):
        assert (a - b).abs().max() < 1e-5 * max(1, b.abs().max())


def test_beit_predicts_the_positions_asked_for_from_what_is_not_masked():
    model = small()
    images, mask = torch.randn(3, 3, 32, 32), torch.rand(3, 8, 8) < 0.4
    pixels = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(images)
    with torch.no_grad():
        logits = model(images, mask, torch.arange(3 * 64))
        features = model.masked_features(images, mask)
        assert logits.shape == (3 * 64, 10) and features.shape == (3, 65, 16)
        # the features are those before the final norm, of the image whose masked patches are not
        # seen: other pixels there change nothing, other pixels elsewhere do
        patches = features[:, 1:].flatten(0, 1)
        assert torch.allclose(model.lm_head(model.norm(patches)), logits, atol=1e-6)
        assert torch.equal(model(torch.where(pixels, 9.0, images), mask), model(images, mask))
        other = model(torch.where(pixels, images, 9.0), mask)
        assert not torch.allclose(other, model(images, mask), atol=1e-3)
        none = torch.zeros_like(mask)
        assert torch.allclose(model.masked_features(images, none), model.features(images))
        assert torch.allclose(model(images, mask), logits.view(3, 8, 8, 10)[mask], atol=1e-6)
        asked = torch.tensor([130, 7, 64, 7])  # in any order, and of any image
        assert torch.allclose(model(images, mask, asked), logits[asked], atol=1e-6)
        assert torch.allclose(model.predict(features, asked), logits[asked], atol=1e-6)


def test_relative_positions_are_counted_as_the_formula_says():
    config = ViTConfig(image_size=12, patch_size=4, dim=8, depth=1, heads=2, position="relative")
    model = ViT(config)
    table = torch.arange(28 * 2.0).view(28, 2)  # (2 * 3 - 1) ** 2 + 3 rows
    with torch.no_grad():
        model.blocks[0].attn.relative_position_bias_table.copy_(table)
    bias = model.position_biases((3, 3))[0]
    for head in range(2):
        for a in range(9):
            for b in range(9):
                dy, dx = a // 3 - b // 3, a % 3 - b % 3
                assert bias[head, 1 + a, 1 + b] == table[(dy + 2) * 5 + dx + 2, head]
        assert (bias[head, 0, 1:10] == table[25, head]).all()  # [CLS] to patches
        assert (bias[head, 1:, 0] == table[26, head]).all() and bias[head, 0, 0] == table[27, head]


@pytest.mark.parametrize("position", ["absolute", "relative", "shared_relative"])
def test_positions_of_another_grid_are_interpolated_on_the_fly(position, tmp_path):
    old = small(32, position, cls=ViT)
    save(old, tmp_path / "w.pt")
    new = small(48, position, cls=ViT)
    load_weights(new, tmp_path / "w.pt")
    images = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        assert (old(images) - new(images)).abs().max() < 1e-5
        wide = old(images[..., :32])
        assert wide.shape == (1, 1 + 12 * 8, 16)
        if position != "absolute":  # offsets alone count: a shifted image has shifted features
            bias = old.position_biases((12, 8))[0][:, 1:, 1:97].unflatten(1, (12, 8))
            bias = bias.unflatten(3, (12, 8))
            assert torch.equal(bias[:, 2, 1, 5, 6], bias[:, 6, 2, 9, 7])
            assert not torch.equal(bias[:, 2, 1, 5, 6], bias[:, 5, 6, 2, 1])


def test_attention_probs_are_those_of_the_forward_pass():
    for position in ("absolute", "relative", "shared_relative"):
        model, kept = small(16, position, cls=ViT), {}
        last = model.blocks[-1].attn
        last.register_forward_hook(lambda m, i, o: kept.update(input=i[0], output=o))
        images = torch.randn(3, 3, 16, 16)
        with torch.no_grad():
            probs = model.attention_probs(images).numpy()
            model(images)
        x = kept["input"].numpy()
        value = x @ last.qkv.weight[32:].detach().numpy().T + last.v_bias.detach().numpy()
        value = value.reshape(3, 17, 2, 8).transpose(0, 2, 1, 3)
        mixed = (probs @ value).transpose(0, 2, 1, 3).reshape(3, 17, 16)
        mixed = mixed @ last.proj.weight.detach().numpy().T + last.proj.bias.detach().numpy()
        assert np.allclose(probs.sum(-1), 1, atol=1e-5)
        assert np.allclose(mixed, kept["output"].numpy(), atol=1e-5)


def test_the_init_is_the_papers():
    model = BEiT(ViTConfig.named("small", "released"), 500)
    state = model.state_dict()
    assert (state["blocks.3.gamma_1"] == 0.1).all()
    for name, value in state.items():
        if name.endswith("bias") or name.endswith("bias_table"):
            assert (value == 0).all(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        elif "gamma" not in name:
            number = re.match(r"blocks\.(\d+)\.(attn\.proj|mlp\.fc2)\.weight", name)
            scale = math.sqrt(2 * (int(number[1]) + 1)) if number else 1
            assert value.abs().max() * scale <= 0.02 + 1e-6, name  # cut at one standard deviation
            if value.numel() > 10_000:  # a normal cut at +-1 sigma has a deviation of 0.5396 sigma
                assert abs(value.std() * scale / 0.02 - 0.5396) < 0.01, name
    model = Classifier(NANO, 1000)
    # a new head: the init of all, then times 0.001 as in the official code
    assert abs(model.head.weight.std() / (0.02 * 0.5396 * 0.001) - 1) < 0.02
    assert (model.head.bias == 0).all() and model(torch.randn(2, 3, 32, 32)).abs().max() < 1e-2


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    config = ViTConfig(image_size=8, patch_size=4, dim=8, depth=3, heads=2, drop_path=0.5)
    model = shake(ViT(config))
    assert [block.drop_path for block in model.blocks] == [0, 0.25, 0.5]  # linear in depth
    block, x = model.blocks[2], torch.randn(4000, 5, 8)
    for gamma in (None, torch.rand(8) + 0.5):
        full = x if gamma is None else x * gamma
        assert torch.equal(block.eval().scale(x, gamma), full)
        out = block.train().scale(x, gamma)
        kept = (out - 2 * full).abs().amax((1, 2)) < 1e-5  # divided by the rate of staying, 1/2
        dropped = out.abs().amax((1, 2)) == 0
        assert (kept | dropped).all() and abs(kept.float().mean() - 0.5) < 0.03
    model.train()
    block.drop_path = 1.0 - 1e-9  # all samples of a small batch may be dropped
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(1, 3, 8, 8))).all()


LINEAR = {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight", "head.weight"}
DECAYED = LINEAR | {"patch_embed.proj.weight", "attn.relative_position_bias_table"}


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_parameter_groups_follow_the_rule(variant):
    changes = dict(position="relative") if variant == "released" else {}
    with torch.device("meta"):
        model = Classifier(ViTConfig.named("base", variant, **changes), 1000)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in param_groups(model, 0.05, layer_decay=0.65):
        for parameter in group["params"]:
            name = names.pop(parameter)
            layer, inside = 13, name
            if block := re.match(r"blocks\.(\d+)\.(.*)", name):
                layer, inside = int(block[1]) + 1, block[2]
            elif name.split(".")[0] in ("patch_embed", "cls_token", "pos_embed"):
                layer = 0
            assert math.isclose(group["lr_scale"], 0.65 ** (13 - layer), rel_tol=1e-5), name
            assert group["weight_decay"] == (0.05 if inside in DECAYED else 0), name
            assert group["matrix"] == (inside in LINEAR), name
    assert not names  # each parameter is in one group


def tiny_network(cls, variant):
    """A classifier or segmenter of 5 classes whose logits are of order 1."""
    changes = dict(position="relative") if variant == "released" else {}
    config = ViTConfig.named("nano", variant, image_size=32, patch_size=8, dim=16, depth=2, heads=2,
                             **changes)
    model = shake(cls(config, 5))
    with torch.no_grad():
        for name, parameter in model.head.named_parameters():
            parameter.mul_(1 if "norm" in name else 8)
    return model


@pytest.mark.filterwarnings("ignore:.*trace")
@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("cls", [Classifier, Segmenter])
def test_networks_are_traced_and_exported_for_any_batch(cls, variant):
    model, images = tiny_network(cls, variant), torch.randn(2, 3, 32, 32)
    batch = {"images": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(model, (images,), dynamic_shapes=batch).module()
    traced = torch.jit.trace(model, images)
    for number in (1, 3):
        images = torch.randn(number, 3, 32, 32)
        with torch.no_grad():
            expected = model(images)
            assert expected.std() > 0.1
            assert (traced(images) - expected).abs().max() < 1e-5
            assert (exported(images) - expected).abs().max() < 1e-5


def test_the_head_of_base_at_any_size():
    with torch.device("meta"):
        head = UpsamplingHead(768, 150, [2, 2, 2, 2])
        for height, width in ((14, 14), (32, 32), (32, 48)):
            shape = head(torch.empty(2, height, width, 768)).shape
            assert shape == (2, 150, 16 * height, 16 * width)
        # SETR's: in_index 9, 14, 19, 23 of its paper's model, and 4, 7, 9, 11 with DeiT, from 0
        assert Segmenter(ViTConfig.named("large"), 150).auxiliary == [10, 15, 20, 24]
        assert Segmenter(ViTConfig.named("base"), 5).auxiliary == [5, 8, 10, 12]
        assert Segmenter(ViTConfig.named("nano"), 5).auxiliary == [2, 3, 4, 6]
    convolutions = 9 * (768 * 256 + 3 * 256 * 256)
    count = 2 * 768 + convolutions + 4 * 2 * 256 + 256 * 150 + 150
    assert sum(parameter.numel() for parameter in head.parameters()) == count == 3_581_078
    model = Segmenter(ViTConfig.named("nano", image_size=16, patch_size=4), 5)
    for height, width in ((16, 16), (32, 16), (20, 36)):
        images = torch.randn(2, 3, height, width)
        outputs = model.train()(images)
        assert len(outputs) == 5
        assert all(output.shape == (2, 5, height, width) for output in outputs)
        assert model.eval()(images).shape == (2, 5, height, width)
    with pytest.raises(BadInput, match="18x16 pixels: the sides are to be multiples"):
        model(torch.randn(1, 3, 18, 16))


# ---- model: contrastive losses -------------------------------------------------------------------


LOSS_SCRIPT = """
import sys, torch
import torch.distributed as dist
from masking import local_shard, rank, world_size
from model import CONTRASTIVE_LOSSES, GlobalBatchNorm
from pretrain import Config
if world_size() > 1:
    dist.init_process_group("gloo")
data = torch.load(sys.argv[1], weights_only=True)
config = Config(prototypes=6, teacher_temperature=0.1)
results = {}
for name, (student, teacher, center, progress) in data.items():
    student = {k: local_shard(v).requires_grad_() for k, v in student.items()}
    teacher = {k: local_shard(v) for k, v in teacher.items()}
    loss = CONTRASTIVE_LOSSES[name](config)
    if name == "dino":
        loss.center.copy_(center)
    if loss.has_teacher:  # each of the student's views with each other one of the teacher's
        pairs = [(s, t) for a, t in teacher.items() for b, s in student.items() if a != b]
    else:
        pairs = [tuple(student.values())]
    total = sum(loss(a, b, progress) for a, b in pairs)
    total = total if loss.sums_pairs else total / len(pairs)
    total.backward()
    loss.after_step()
    results[name] = total.detach(), {k: v.grad for k, v in student.items()}, loss.state_dict()
norm, x = GlobalBatchNorm(3), local_shard(data["dino"][0][0])[:, :3].clone().requires_grad_()
y = norm(x)
y.pow(3).sum().backward()
results["norm"] = y.detach(), x.grad
torch.save(results, f"{sys.argv[2]}.{rank()}")
if world_size() > 1:
    dist.barrier()
    dist.destroy_process_group()
"""


def other_views(student, teacher):
    return [(s, t) for a, t in teacher.items() for b, s in student.items() if a != b]


def slow_dino(student, teacher, center, progress):
    temperature = 0.04 + 0.06 * min(1, progress * 10)
    total, pairs = 0, other_views(student, teacher)
    for s, t in pairs:
        for i in range(len(t)):
            p, q = torch.exp((t[i] - center) / temperature), torch.exp(s[i] / 0.1)
            total = total - sum(p / p.sum() * torch.log(q / q.sum()))
    return total / len(pairs)


def cosine_similarity(a, b):
    return (a * b).sum() / (a.norm() * b.norm())


def slow_moco(student, teacher, center, progress):
    total = 0
    for s, t in other_views(student, teacher):
        for i in range(len(s)):
            terms = [torch.exp(cosine_similarity(s[i], t[j]) / 0.2) for j in range(len(t))]
            total = total - 2 * 0.2 * torch.log(terms[i] / sum(terms))
    return total


def slow_simclr(student, teacher, center, progress):
    z = torch.cat(list(student.values()))
    count, total = len(z) // 2, 0
    for i in range(2 * count):
        terms = [torch.exp(cosine_similarity(z[i], z[j]) / 0.1) for j in range(2 * count)]
        total = total - torch.log(terms[(i + count) % (2 * count)] / (sum(terms) - terms[i]))
    return total / 2


def test_contrastive_losses_are_those_of_slow_loops_on_one_and_two_processes(tmp_path):
    def views(*names):
        return {name: torch.randn(4, 6) for name in names}

    data = {
        "dino": (views(0, 1, 2, 3), views(0, 1), torch.randn(6) / 10, 0.04),
        "moco": (views(0, 1), views(0, 1), None, 0.5),
        "simclr": (views("masked", 0), {}, None, 0.5),
    }
    torch.save(data, tmp_path / "data.pt")
    (tmp_path / "run.py").write_text(LOSS_SCRIPT)
    for processes in (1, 2):
        python(tmp_path / "run.py", tmp_path / "data.pt", tmp_path / f"of{processes}",
               processes=processes, env={**os.environ, "PYTHONPATH": HERE})
        parts = [torch.load(tmp_path / f"of{processes}.{r}", weights_only=True)
                 for r in range(processes)]
        for name, slow in dict(dino=slow_dino, moco=slow_moco, simclr=slow_simclr).items():
            student, teacher, center, progress = data[name]
            student = {k: v.double().requires_grad_() for k, v in student.items()}
            teacher = {k: v.double() for k, v in teacher.items()}
            loss = slow(student, teacher, center, progress)
            loss.backward()
            assert math.isclose(sum(part[name][0] for part in parts), loss.item(), rel_tol=1e-5)
            for key, value in student.items():
                found = torch.cat([part[name][1][key] for part in parts])
                assert torch.allclose(found.double(), value.grad, atol=1e-5), (name, key)
        (_, teachers, center, _), x = data["dino"], data["dino"][0][0][:, :3].clone()
        mean = torch.cat([*teachers.values()]).mean(0)
        for part in parts:  # the center follows the whole batch in every process
            assert torch.allclose(part["dino"][2]["center"], 0.9 * center + 0.1 * mean)
        y = (x.requires_grad_() - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
        y.pow(3).sum().backward()
        for number, expected in enumerate((y, x.grad)):
            found = torch.cat([part["norm"][number] for part in parts])
            assert torch.allclose(found, expected, atol=1e-5)


# ---- model: weights in and out -------------------------------------------------------------------


@pytest.mark.parametrize("side", [224, 384])
@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("head", [BEiT, Classifier])
def test_weights_go_to_other_libraries_and_back(head, variant, side, tmp_path):
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    changes = dict(position="relative") if (head, variant) == (Classifier, "released") else {}
    config = ViTConfig.named("tiny", variant, image_size=side, depth=2, **changes)
    ours, again = shake(head(config, 10)), [head(config, 10).eval() for _ in range(3)]
    images = torch.randn(2, 3, side, side)
    mask = torch.rand(2, config.grid, config.grid) < 0.4
    save(ours, tmp_path / "ours.pt")

    folder, copied = tmp_path / "folder", tmp_path / "copied"
    export_weights(tmp_path / "ours.pt", "transformers", folder)
    masked = head is BEiT
    kind = "BeitForMaskedImageModeling" if masked else "AutoModelForImageClassification"
    theirs, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    theirs.eval().save_pretrained(copied)
    with torch.no_grad():
        if masked:
            all_logits = theirs(images, bool_masked_pos=mask.flatten(1)).logits
            expected = all_logits[mask.flatten(1)]
            everywhere = torch.arange(mask.numel())
            assert (ours(images, mask, everywhere) - all_logits.flatten(0, 1)).abs().max() < 1e-4
        else:
            expected = theirs(images).logits
        inputs = (images, mask) if masked else (images,)
        assert (ours(*inputs) - expected).abs().max() < 1e-4
        for model, path in zip(again, (folder, copied)):
            assert "newly initialized: none" in load_weights(model, path, head=True)
            assert (model(*inputs) - expected).abs().max() < 1e-4

    python = {"timm": timm, "torch": torch}
    exec(export_weights(tmp_path / "ours.pt", "timm", tmp_path / "timm.pth"), python)
    theirs = python["model"]
    with torch.no_grad():
        if masked:  # timm's model masks no patches: compare the logits of all, none masked
            logits = ours(images, torch.zeros_like(mask), everywhere).view(2, -1, 10)
            assert (logits - theirs(images)[:, 1:]).abs().max() < 1e-4
        else:
            assert (ours(images) - theirs(images)).abs().max() < 1e-4
            torch.save(theirs.state_dict(), tmp_path / "state.pth")
            assert "newly initialized: none" in load_weights(again[2], tmp_path / "state.pth")
            assert (again[2](images) - theirs(images)).abs().max() < 1e-4


def test_positions_are_resized_and_the_extra_rows_kept(tmp_path):
    old = small(32)  # 8 x 8 patches
    with torch.no_grad():  # a ramp stays a ramp away from the border
        ramp = torch.arange(8.0)[:, None].expand(8, 8)
        old.pos_embed[0, 1:] = ramp.reshape(64, 1).expand(64, 16)
    save(old, tmp_path / "a.pth")
    new = small(48)  # 12 x 12
    load_weights(new, tmp_path / "a.pth")
    assert torch.equal(new.pos_embed[0, 0], old.pos_embed[0, 0])
    rows = new.pos_embed[0, 1:].view(12, 12, 16)[:, 5, 3].detach().numpy()
    assert np.allclose(rows[3:9], (np.arange(12) + 0.5)[3:9] * 8 / 12 - 0.5, atol=0.06)

    old = small(32, "shared_relative")
    with torch.no_grad():
        table = old.rel_pos_bias.relative_position_bias_table
        offsets = torch.arange(-7.0, 8)
        table[:225, 0] = (offsets[:, None] + 0 * offsets).flatten()  # the vertical offset
    save(old, tmp_path / "b.pth")
    new = small(48, "relative")  # and one table for all layers becomes one for each
    load_weights(new, tmp_path / "b.pth")
    for block in new.blocks:
        wide = block.attn.relative_position_bias_table.detach()
        assert torch.equal(wide[-3:], table[-3:]) and wide.shape == (23 * 23 + 3, 2)
        column = wide[:-3, 0].view(23, 23)[:, 11]
        assert abs(column[11]) < 1e-5 and torch.allclose(column, -column.flip(0), atol=1e-5)
        assert 0.55 < column[13] - column[12] < 0.75  # 15 offsets stretched over 23


def test_weights_that_do_not_fit_are_named(tmp_path):
    model, path = small(), tmp_path / "w.pth"
    state = model.state_dict()
    ours = {"model": state, "arch": asdict(model.config)}
    foreign = {"model": state | {"registers": torch.ones(4, 16), "projector.0": torch.ones(3)}}
    for content, other, message in (
        (ours, small(dim=8), r"cls_token is \(1, 1, 16\) there and \(1, 1, 8\)"),
        (ours, small(depth=3), "blocks.2.gamma_1 is not in it"),
        (state | {"pos_embed": torch.ones(1, 66, 16)}, small(48),  # 65 are no square
         r"pos_embed is \(1, 66, 16\) there"),
        (ours, small(layer_scale=0.0), "blocks.0.gamma_1 has no place in the model"),
        (ours, small(depth=1), "blocks.1..* has no place in the model; give the --size"),
        (ours | foreign | {"config": {}}, model, "registers has no place in the model"),
    ):
        torch.save(content, path)
        with pytest.raises(BadInput, match=message):
            load_weights(other, path)
    torch.save(foreign, path)  # only our own runs are known to need all that they hold
    assert "registers, projector.0" in load_weights(model, path)
    del foreign["model"]["registers"]
    torch.save(ours | foreign | {"config": {}}, path)
    assert "left out: projector.0\n" in load_weights(model, path)
    path.write_bytes(b"not a checkpoint")
    for path, message in ((path, "w.pth: damaged"), (tmp_path / "missing.pth", "no such file")):
        with pytest.raises(BadInput, match=message):
            load_weights(model, path)


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def wrapped_files(model, other):
    """Files that hold `model`, most of them besides the worse weights of `other`: (what kind of
    file, its content, the part that is to be read)."""
    state, worse = model.state_dict(), other.state_dict()
    index = {"blocks.0.attn.relative_position_index": torch.ones(3, 3)}
    averaged = torch.optim.swa_utils.AveragedModel(model)
    head = {"head.mlp.0.weight": torch.ones(3, 3), "head.last_layer.weight_g": torch.ones(3)}
    return [
        ("plain", state, ""),
        ("ours", {"objective": {"teacher": worse}, "model": state, "arch": asdict(model.config)},
         "model"),
        ("official", {"model": worse, "model_ema": state | index, "epoch": 3,
                      "args": argparse.Namespace(lr=1.0)}, "model_ema"),  # their command line
        ("timm", {"state_dict": worse, "state_dict_ema": state, "arch": "beit_base_patch16_224",
                  "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}, "state_dict_ema"),
        ("lightning", {"state_dict": prefixed("model.", state), "hyper_parameters": {"lr": 1.0},
                       "optimizer_states": [{}]}, "state_dict.model"),
        ("two in one", prefixed("net.", worse) | prefixed("net_ema.", state), "net_ema"),
        ("mmseg", {"state_dict": prefixed("backbone.", state) | {"decode_head.a": torch.ones(3)},
                   "meta": {"epoch": 1}}, "state_dict.backbone"),
        ("ddp", torch.nn.DataParallel(model).state_dict(), "module"),
        ("compiled", torch.nn.DataParallel(torch.compile(model)).state_dict(), "module"),
        ("averaged", {"model": worse, "averaged": averaged.state_dict()}, "averaged.module"),
        ("dino", {"student": prefixed("module.backbone.", worse) | prefixed("module.", head),
                  "teacher": prefixed("backbone.", state) | head}, "teacher.backbone"),
        ("nested", {"epoch": 1, "net": {"model_state_dict": state}}, "net.model_state_dict"),
    ]


def test_weights_are_found_in_other_peoples_files(tmp_path):
    model, other = small(cls=ViT), small(cls=ViT)
    with torch.no_grad():
        other.cls_token.add_(1)
    images = torch.randn(1, 3, 32, 32)
    for kind, content, part in wrapped_files(model, other):
        torch.save(content, tmp_path / "w.pth")
        new = ViT(model.config).eval()
        report = load_weights(new, tmp_path / "w.pth").split("\n")
        found = f" ({part})" if part else ""
        count = len(model.state_dict())
        assert report[0] == f"loaded {count} tensors from {tmp_path}/w.pth{found}", kind
        assert report[2] == "newly initialized: none", kind
        assert report[1] == "left out: none", kind
        assert torch.equal(new(images), model(images)), kind
    with pytest.raises(BadInput, match="no weights of a BEiT; it holds epoch, net"):
        torch.save({"epoch": 1, "net": {"fc.weight": torch.ones(3)}}, tmp_path / "w.pth")
        load_weights(model, tmp_path / "w.pth")


def test_plain_vits_are_loaded(tmp_path):
    """MAE's, DINO's and DeiT's networks have a bias on the keys too, which has no effect."""
    timm = pytest.importorskip("timm")
    theirs = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=128, depth=2,
                                           num_heads=2, num_classes=0, global_pool="token")
    shake(theirs)
    torch.save({"model": theirs.state_dict()}, tmp_path / "vit.pth")
    ours = ViT(ViTConfig(image_size=32, patch_size=8, dim=128, depth=2, heads=2)).eval()
    load_weights(ours, tmp_path / "vit.pth")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert (theirs.norm(ours(images)) - theirs.forward_features(images)).abs().max() < 1e-5


@pytest.mark.parametrize("library", ["Beit", "Data2VecVision"])
@pytest.mark.parametrize("kind", ["Model", "ForImageClassification"])
def test_folders_and_state_dicts_of_transformers(library, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    position = "relative" if library == "Beit" else "absolute"
    theirs = shake(getattr(transformers, library + kind)(getattr(transformers, library + "Config")(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
        image_size=32, patch_size=8, layer_norm_eps=1e-6, use_mean_pooling=True, num_labels=5,
        use_relative_position_bias=position == "relative",
        use_absolute_position_embeddings=position == "absolute",
    )))
    new, old = tmp_path / "new", tmp_path / "old"  # as it wrote until it had safetensors
    for folder in (new, old):
        theirs.save_pretrained(folder)
    (old / "model.safetensors").unlink()
    load_file = pytest.importorskip("safetensors.torch").load_file
    torch.save(load_file(new / "model.safetensors"), old / "pytorch_model.bin")
    torch.save({"state_dict": prefixed("model.", theirs.state_dict())}, tmp_path / "lightning.ckpt")
    images = torch.randn(2, 3, 32, 32)
    config = ViTConfig(image_size=32, patch_size=8, dim=128, depth=2, heads=2, mlp_ratio=2,
                       position=position, layer_scale=0.1)
    for name in ("new", "old", "new/model.safetensors", "lightning.ckpt"):
        ours = ViT(config).eval() if kind == "Model" else Classifier(config, 5).eval()
        load_weights(ours, tmp_path / name, head=True)
        with torch.no_grad():
            assert (ours(images) - theirs(images)[0]).abs().max() < 1e-5, name
    (old / "config.json").unlink()
    with pytest.raises(BadInput, match="old: no transformers folder, which holds config.json"):
        load_weights(ours, old)


def save_classifier(path, share, cls=Classifier, variant="released"):
    model = tiny_network(cls, variant)
    save(model, path, classes=list("abcde"), config={"eval_crop": share, "norm": "half"})
    return model


@pytest.mark.parametrize("share", [0.875, 0.6, 1.0])
def test_exported_classifiers_see_what_our_evaluation_sees(share, tmp_path, capsys):
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    model = save_classifier(tmp_path / "w.pt", share)
    command = ["export", "--to=timm", f"{tmp_path}/timm.pth", "--weights"]
    network.main([*command, f"{tmp_path}/w.pt"])
    python = {"timm": timm, "torch": torch}
    exec(capsys.readouterr().out.partition("in Python:\n")[2], python)
    assert python["classes"] == list("abcde")
    folder = str(tmp_path / "folder")
    export_weights(tmp_path / "w.pt", "transformers", folder)
    classify = transformers.pipeline("image-classification", model=folder, top_k=5)
    # Of these widths no crop leaves a margin of 3 more than a multiple of 4 pixels, half of which
    # torchvision rounds up and transformers down.
    for number, width in enumerate((104, 112, 128)):
        noise = np.random.default_rng(number).integers(0, 256, (4, 6, 3)).astype(np.uint8)
        picture = Image.fromarray(noise).resize((width, 64), Image.Resampling.BICUBIC)  # smooth
        shares = (share, 1.0 if share == 0.6 else 0.6)
        views = np.stack([finetune_cls.center_crop(32, x)(picture) for x in shares])
        views = masking.normalize(torch.tensor(views).permute(0, 3, 1, 2) / 255, "half")
        timms_view = python["transform"](picture)
        with torch.no_grad():
            logits, other_logits = model(views)
            timms_logits = python["model"](timms_view[None])[0]
        assert (timms_view - views[0]).abs().max() < 1e-6
        assert (timms_logits - logits).abs().max() < 1e-5
        rows = classify(picture, function_to_apply="none")
        found = torch.tensor([row["score"] for row in sorted(rows, key=lambda row: row["label"])])
        # they resize tensors and we PIL's images, which rounds otherwise
        assert (found - logits).abs().max() < 0.03 < 0.2 < (other_logits - logits).abs().max()
    with pytest.raises(SystemExit) as stop:
        network.main([*command, f"{tmp_path}/missing.pt"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"error: {tmp_path}/missing.pt: no such file" in error


def test_where_a_file_does_not_say_how_it_is_evaluated(tmp_path):
    """The official code crops 7/8 of the side below 384 px, as our pre-training always does."""
    pytest.importorskip("safetensors")
    cases = [(32, {}, 37), (384, {}, 384), (384, {"config": {"norm": "half"}}, 439)]
    for side, content, edge in cases:
        model = Classifier(ViTConfig(image_size=side, patch_size=16, dim=8, depth=1, heads=2), 3)
        save(model, tmp_path / "w.pt", **content)
        export_weights(tmp_path / "w.pt", "transformers", tmp_path / "out")
        processor = json.load(open(tmp_path / "out" / "preprocessor_config.json"))
        assert processor["size"] == {"shortest_edge": edge} and processor["do_center_crop"]
        assert processor["image_mean"] == ([0.5] * 3 if content else list(MEAN))
        config = json.load(open(tmp_path / "out" / "config.json"))
        assert config["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}


@pytest.mark.parametrize("cls, variant", [(Classifier, "released"), (Segmenter, "paper")])
def test_onnx(cls, variant, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = save_classifier(tmp_path / "w.pt", 1.0, cls, variant)
    text = export_weights(tmp_path / "w.pt", "onnx", tmp_path / "w.onnx")
    for number in (1, 3):
        images = torch.randn(number, 3, 32, 32)
        python = {"onnxruntime": onnxruntime, "images": images.numpy()}
        exec(text, python)
        with torch.no_grad():
            assert np.abs(python["logits"] - model(images).numpy()).max() < 1e-5
    about = {name: json.loads(value) for name, value in python["about"].items()}
    assert about == {"image_size": 32, "shorter_side": 32, "mean": [0.5] * 3, "std": [0.5] * 3,
                     "classes": list("abcde")}


def test_what_another_library_does_not_have_is_not_exported(tmp_path, monkeypatch):
    save(small(cls=lambda config: Segmenter(config, 3)), tmp_path / "s.pt")
    save(small(), tmp_path / "m.pt")
    save(small(cls=ViT), tmp_path / "v.pt")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    for path, to, message in (
        ("s.pt", "timm", "a segmenter; --to=timm takes a masked model or a classifier"),
        ("s.pt", "transformers", "a segmenter; .* takes a masked model or a classifier"),
        ("m.pt", "onnx", "a masked model; --to=onnx takes a classifier or a segmenter"),
        ("v.pt", "timm", "v.pt: a network without a head; .* takes a masked model"),
        ("s.pt", "onnx", "--to=onnx: first pip install onnxscript"),
    ):
        with pytest.raises(BadInput, match=message):
            export_weights(tmp_path / path, to, str(tmp_path / "out"))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("size, heads", [("nano", 4), ("small", 6), ("other", 3)])
def test_heads_of_a_state_dict_are_those_of_the_size_or_said_to_be_assumed(size, heads, tmp_path):
    config = replace(NANO, dim=192, depth=1) if size == "other" else ViTConfig.named(size)
    model = ViT(config)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert network.read_network(tmp_path / "w.pt")[1].heads == heads
    said = f"assumed, as it does not say: {config.heads} heads"
    assert said in load_weights(model, tmp_path / "w.pt")
    save(model, tmp_path / "ours.pt")
    assert network.read_network(tmp_path / "ours.pt")[1].heads == config.heads
    assert "assumed" not in load_weights(model, tmp_path / "ours.pt")


def test_what_is_no_beit_is_called_by_its_name(tmp_path):
    timm = pytest.importorskip("timm")
    foreign = timm.create_model("vit_small_patch14_dinov2", img_size=56, depth=1, num_classes=0)
    key_bias = ViT(NANO).state_dict() | {"blocks.0.attn.k.bias": torch.zeros(NANO.dim)}
    path = tmp_path / "w.pth"
    for content, message in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "b'version https"),
        (b"\n<!DOCTYPE html><html>", "<!DOCTYPE html>"),
        (gzip.compress(b"weights"), "begins with b'.x1f.x8b"),
        (b"value", "Unsupported operand"),
        (foreign.state_dict(), "a ViT with ls1.gamma, no BEiT"),
        (key_bias, "a ViT with attn.k.bias, no BEiT"),
    ):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(BadInput, match=f"w.pth: .*{message}") as error:
            load_weights(small(), path)
        assert "weights_only" not in str(error.value)
        if isinstance(content, bytes):
            assert "Git LFS pointer, a web page" in str(error.value)


def test_no_file_runs_code(tmp_path, dalle):
    target = tmp_path / "owned"
    for name in ("encoder.pkl", "decoder.pkl", "w.pth"):
        torch.save({"model": Payload(target)}, tmp_path / name)
    for name, load, argument in (
        ("w.pth", functools.partial(load_weights, small()), tmp_path / "w.pth"),
        ("encoder.pkl", build_tokenizer, f"dalle:{tmp_path}"),
        ("w.pth", build_tokenizer, f"dvae:{tmp_path}/w.pth"),
    ):
        with pytest.raises(BadInput, match=f"{name}: damaged"):
            load(argument)
    assert not target.exists()
    for script in ("tokenizer", "model", *SCRIPTS):
        source = open(f"{HERE}/{script}.py").read()
        assert source.count("torch.load(") == source.count("weights_only=True"), script


# ---- pretrain: options ---------------------------------------------------------------------------


def test_the_defaults_are_the_papers_table_12():
    recipe = dict(
        epochs=800, batch_size=2048, lr=1.5e-3, min_lr=1e-5, warmup_epochs=10, schedule="cosine",
        weight_decay=0.05, clip_grad=3.0, drop_path=0.1, image_size=224, patch_size=16, size="base",
        variant="paper", tokenizer="dalle", mask="block", predict="masked", min_block=16,
        crop_min=0.08, jitter=0.4, teacher_temperature=0.07, prototypes=65_536,  # DINO's
    )
    large = dict(recipe, size="large", clip_grad=1.0)
    for words, expected in (([], recipe), (["--preset=large"], large)):
        config = parse(*words)
        assert {name: getattr(config, name) for name in expected} == expected
        assert round(config.mask_ratio * 196) == 75
    for contrast, hidden, momentum in (("dino", 2048, 0.996), ("moco", 4096, 0.99)):
        with torch.device("meta"):  # the hidden units and the momentum are the method's own
            config = parse(f"--contrast={contrast}")
            objective = pretrain.MIMWithContrast(config, DVAE(DVAEConfig()))
        widths = {len(layer.weight) for layer in objective.model.projector.modules()
                  if isinstance(layer, torch.nn.Linear)}
        assert (widths, objective.contrast.teacher.momentum) == ({hidden, 256}, momentum)
    for preset in pretrain.PRESETS:  # all build what they name
        with torch.device("meta"):
            assert BEiT(pretrain.vit_config(parse(f"--preset={preset}")), 10)


@pytest.mark.parametrize("script", SCRIPTS.values())
def test_every_field_has_a_text_and_is_read(script, capsys):
    def source(name):
        return open(os.path.join(HERE, name)).read()

    # the networks' configs in model.py and tokenizer.py have fields of the same names: what reads
    # a run's options there are the contrastive losses, and `untrained`, which gets all of them
    code = source("pretrain.py") + source("masking.py") + source(script.__file__)
    code += source("model.py").partition("# ---- contrastive losses")[2]
    read = set(re.findall(r"config\.(\w+)", code) + re.findall(r"\"(\w+)\"(?!:)", code))
    for options in re.findall(r"def untrained\((.*?)\)", source("tokenizer.py")):
        read |= set(options.split(", "))
    texts = pretrain.field_texts(script.Config)
    help_text = help_of(capsys, script)
    for field in fields(script.Config):
        text = " ".join(texts[field.name].split())
        assert len(text.split()) >= 2 and field.name in read, field.name
        assert re.search(rf"\b{field.name} .*?{re.escape(text)}", help_text), field.name


def test_the_schedules():
    def lr(step, schedule):
        config = pretrain.Config(lr=1.0, min_lr=0.1, schedule=schedule)
        return pretrain.learning_rate(config, step, 110, 10)

    for schedule in ("cosine", "linear"):
        ends = [lr(step, schedule) for step in (0, 9, 10, 60, 110)]
        assert np.allclose(ends, [0.1, 1.0, 1.0, 0.55, 0.1])
    assert math.isclose(lr(35, "cosine"), 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert math.isclose(lr(35, "linear"), 0.1 + 0.9 * 0.75)


@pytest.mark.parametrize("script, words, length, warmup", [
    (pretrain, "", 500_000, 6250),
    (pretrain, "--preset=large", 500_000, 6250),
    (pretrain, "--preset=shapes", 3000, 100),
    (pretrain, "--preset=shapes --steps=60", 60, 15),
    (pretrain, "--preset=shapes --steps=9600", 9600, 100),  # a longer run has the same
    (pretrain, "--preset=shapes --steps=60 --warmup_steps=30", 60, 15),
    (pretrain, "--preset=shapes --steps=60 --warmup_steps=9", 60, 9),
    (pretrain, "--preset=shapes --steps=900 --warmup_epochs=2", 900, 225),  # 2 are 1,250 steps
    (pretrain, "--preset=shapes --epochs=2", 1250, 100),
    (pretrain, "--batch_size=64 --steps=1040", 1040, 260),
    (finetune_cls, "--batch_size=64 --steps=1000", 1000, 250),
    (finetune_seg, "", 160_000, 1500),
    (finetune_seg, "--steps=1600", 1600, 400),
    (finetune_seg, "--steps=1600 --warmup_steps=9", 1600, 9),
])
def test_the_warm_up_is_at_most_a_quarter_of_the_run(script, words, length, warmup):
    count = 20_000 if "shapes" in words or "steps" in words else 1_281_167
    steps, _, found = pretrain.run_length(parse(*words.split(), script=script), count)
    assert (steps, found) == (length, warmup)


def test_a_fork_is_one_function_and_one_line(tmp_path, monkeypatch, capsys):
    """One of each is added from outside, and the command line does the rest."""
    seen_images, masked_columns, objectives, seen_groups, records = [], [], [], [], []

    def rising(height, width, num_masked, rng=None, min_block=None, progress=0.0):
        return np.tile(np.arange(width) <= round(6 * progress), (height, 1))

    def grey(train, image_size, argument):
        return masking.Images(range(20), lambda key: Image.new("RGB", (40, 40), argument), "grey")

    class Stripes(ContinuousTarget):  # without `decode`
        num_outputs, downsample = 2, 4

        def __init__(self, patch_size):
            super().__init__()

        def encode(self, images):
            seen_images.append(images)
            return torch.tensor([2.0, 4.0]).repeat(4)[:, None, None].expand(len(images), 8, 8, 2)

    class Doubled(pretrain.MaskedImageModeling):
        extra_views = {"thumbs": (2, lambda image: image[:, ::10, ::10])}

        def __init__(self, config, tokenizer):
            super().__init__(config, tokenizer)
            self.beside = torch.nn.Linear(3, 2, bias=False)  # what is trained besides `model`
            torch.nn.init.zeros_(self.beside.weight)
            tokenizer.counter = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
            objectives.append(self)

        @staticmethod
        def check(config):
            if config.mask == "none":
                raise BadInput("--task=doubled wants a mask")

        def inputs(self, batch, device):
            masked_columns.append(batch["mask"].any(1).sum(1).unique().tolist())
            return super().inputs(batch, device)

        def forward(self, inputs, denominators, progress):
            assert inputs["thumbs"].shape == (8, 2, 3, 4, 4)
            loss, metrics = super().forward(inputs, denominators, progress)
            return 2 * loss + self.beside.weight.sum(), {**metrics, "half": loss.detach()}

        def after_step(self, progress):
            self.tokenizer.counter += 1  # as a teacher that hangs on the tokenizer changes

    class Seven(ContrastiveLoss):
        def make_head(self, dim, hidden):
            return torch.nn.Linear(dim, hidden)

        def forward(self, student, other, progress):
            assert student.shape == other.shape == (8, 5)
            return 7 * len(student) + 0 * student.sum()

    def sgd(groups, config):
        seen_groups.extend(groups)
        return torch.optim.SGD(groups, config.lr)

    mine = {"data": "grey:#4d4d4d", "mask": "rising", "schedule": "stairs"}
    mine |= {"tokenizer": "stripes", "size": "micro", "projector_dim": 5, "optimizer": "sgd"}
    added = {
        "size": (VIT_SIZES, "micro", dict(dim=24, depth=1, heads=2, layer_scale=0.1)),
        "preset": (pretrain.PRESETS, "mine", pretrain.PRESETS["shapes"] | mine),
        "mask": (MASKS, "rising", rising),
        "data": (masking.DATASETS, "grey", grey),
        "schedule": (pretrain.SCHEDULES, "stairs", lambda progress: 1 if progress < 0.5 else 0.25),
        "optimizer": (pretrain.OPTIMIZERS, "sgd", sgd),
        "tokenizer": (TOKENIZERS, "stripes", Stripes),
        "task": (pretrain.OBJECTIVES, "doubled", Doubled),
        "contrast": (CONTRASTIVE_LOSSES, "seven", Seven),
    }
    for table, name, made in added.values():
        monkeypatch.setitem(table, name, made)
    monkeypatch.setitem(pretrain.SINKS, "list", lambda config, start: records.append)
    words = [*TOY, "--preset=mine", "--jitter=0"]
    lines = toy(tmp_path / "doubled", *words, "--task=doubled")
    assert [line["lr"] for line in lines] == [3e-3] * 3 + [1e-5 + 0.25 * (3e-3 - 1e-5)] * 3
    assert abs(lines[0]["half"] / 10 - 1) < 0.1  # of (2 - almost 0)^2 and (4 - almost 0)^2
    assert lines[0]["loss"] == 2 * lines[0]["half"]
    assert records == lines
    # of 8 columns as many as the progress of 6 steps says, and all but one at the end, when it is
    # evaluated and draws a picture: without `decode` only of the image and what is masked
    assert masked_columns == [[1], [2], [3], [4], [5], [6], [7], [7]]
    assert Image.open(tmp_path / "doubled" / "reconstruction.png").width == 2 * 132 + 4
    state = saved(tmp_path / "doubled")
    assert state["arch"]["dim"] == 24 and (state["objective"]["beside.weight"] < 0).all()
    assert "momentum" in state["optimizer"]["param_groups"][0]  # SGD's
    linear = [m.weight for m in objectives[0].modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == 6  # of the block four, lm_head and what is beside
    assert set(linear) == {p for group in seen_groups if group["matrix"] for p in group["params"]}
    (tmp_path / "doubled" / "checkpoint.pt").unlink()  # goes on from previous.pt, of step 4
    assert toy(tmp_path / "doubled", *words, "--task=doubled")[-1]["loss"] == lines[-1]["loss"]
    assert saved(tmp_path / "doubled")["objective"]["tokenizer.counter"] == 6
    line = toy(tmp_path / "seven", *words, "--contrast=seven")[0]
    assert line["contrast_loss"] == 7 and abs(line["mim_loss"] / 10 - 1) < 0.1
    assert all((images * 255 - 0x4D).abs().max() < 1e-3 for images in seen_images)

    help_text = help_of(capsys)
    for option, (_, name, _) in added.items():
        assert name in re.search(rf"--{option} (.*?)( --|$)", help_text)[1], option
        text = error_of(capsys, *TOY, f"--out={tmp_path}/wrong", f"--{option}=wrong")
        assert "wrong" in text and name in text, text
    words = ["--preset=mine", "--task=doubled", "--mask=none"]
    check_errors(capsys, words, [("", "--task=doubled wants a mask")])
    for script, lacking in ((finetune_cls, "has no labels"), (finetune_seg, "has no label maps")):
        words = ["--preset=shapes", "--weights=none", "--size=micro", "--schedule=stairs"]
        assert lacking in error_of(capsys, *words, "--data=grey", script=script)


def test_a_regression_is_a_fork_too_and_no_classification(tmp_path, monkeypatch, capsys):
    seen = []

    def dark(train, image_size, argument):
        return masking.Images(range(20), lambda key: Image.new("RGB", (40, 40)), "dark",
                              lambda key: 0.7, list(argument) or None)

    class Regression(finetune_cls.Classification):
        label = float

        def make_model(self, config, num_classes):
            return super().make_model(config, 1)

        def forward(self, inputs, denominators, progress):
            seen.extend(inputs["labels"].tolist())
            errors = self.model(inputs["images"])[:, 0] - inputs["labels"].float()
            return errors.square().sum() / denominators[0], {}

        def eval_sums(self, inputs, progress):
            return {"loss": self.forward(inputs, [1], progress)[0]}

        @staticmethod
        def describe(images):
            return "a number per image"

    monkeypatch.setitem(masking.DATASETS, "dark", dark)
    monkeypatch.setitem(finetune_cls.OBJECTIVES, "regression", Regression)
    lines = toy_cls(tmp_path / "run", "--task=regression", "--data=dark")
    assert set(seen) == {0.7} and abs(lines[0]["loss"] - 0.49) < 0.01  # (0.7 - almost 0)^2
    assert lines[-1]["val_loss"] < 0.4
    words = [*TOY_CLS, f"--out={tmp_path}/classes", "--data=dark:ab"]
    assert "label 0.7: is no number of a class" in error_of(capsys, *words, script=finetune_cls)
    words[-1] = "--data=dark"
    assert "labels without classes" in error_of(capsys, *words, script=finetune_cls)


def test_bad_input_gets_one_line(tmp_path, dvae, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    (tmp_path / "empty").mkdir()
    broken = make_folder(tmp_path / "broken")
    (broken / "class0" / "deep" / "0.png").write_bytes(b"no image")
    tiny = make_folder(tmp_path / "tiny", 4)
    words = [*TOY, f"--out={tmp_path}/out", f"--tokenizer=dvae:{dvae}", "--save_every=0"]
    check_errors(capsys, words, (
        ("--learning_rate=1", "unrecognized arguments: --learning_rate=1"),
        ("--batchsize=1", "did you mean --batch_size?"),
        ("--steps=many", "argument --steps: invalid int value: 'many'"),
        ("--compile=si", "'si' is neither true nor false"),
        ("--variant=new", "argument --variant: invalid choice: 'new' (choose from"),
        (f"--data={broken} --out={tmp_path}/held_out", "0.png: cannot be read as an image"),
        (f"--data={tiny}", "--batch_size=8: must be from 1"),
        f"--data={tmp_path}/empty: holds no two images", "--data=/no/where: no such folder",
        "--seed=-1: give 0 or more", "--num_workers=-1: give 0 or more", "--threads=-1: give 0",
        "--lr=nan: give 1e-09 or more", "--jitter=-1.0: give 0 or more",
        "--crop_min=2.0: give 0.01 to 1", "--batch_size=0: give 1 or more",
        ("--patch_size=5", "image_size=32 is no multiple of patch_size=5"),
        "--tokenizer=vqvae:x: unknown; known are dalle, dvae:FILE",
        (f"--tokenizer=dalle:{tmp_path}", "needs DALL-E's encoder.pkl in"),
        ("--tokenizer=dvae:gone.pt", "gone.pt: no such file"),
        ("--weights=gone.pt", "gone.pt: no such file"),
        (f"--weights={dvae}", "no weights of a BEiT; it holds"),
        "--device=tpu9: not on this machine", "--tensorboard: first pip install tensorboard",
        ("--task=tokenizer --weights=x", "leave --weights out"),
    ))


def test_bad_options_are_refused_before_a_tokenizer_is_trained(tmp_path, capsys):
    for target in ("dvae", "pca"):
        check_errors(capsys, [*TOY, f"--out={tmp_path}/out", f"--tokenizer={target}"], (
            ("--min_block=60", "min_block=60 with num_masked=25"),
            ("--mask_ratio=1.5", "mask at least 1 patch and at most 63"),
            ("--mask_ratio=0 --mask=random", "mask at least 1 patch and at most 64"),
            ("--mask=none", "--mask=none masks nothing to predict: give --predict=all with it"),
            ("--patch_size=0", "patch_size=0"),
            ("--drop_path=1", "drop_path=1.0 is not from 0 to below 1"),
            ("--contrast=dino --prototypes=0", "--prototypes=0: give 1 or more"),
        ))
    assert not (tmp_path / "out").exists()


def test_bad_input_from_a_loader_process_is_one_line_too(tmp_path, dvae):
    folder = make_folder(tmp_path / "images")
    (folder / "class1" / "deep" / "1.png").write_bytes(b"no image")
    words = [*TOY, f"--out={tmp_path}/out", f"--data={folder}", f"--tokenizer=dvae:{dvae}"]
    done = python("pretrain.py", *words, "--num_workers=2", check=False, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"^error: .*1\.png: cannot be read as an image", done.stderr, re.MULTILINE)
    lines = toy(tmp_path / "out2", f"--data={folder}", f"--tokenizer=dvae:{dvae}",
                "--skip_bad_images")
    assert lines[-1]["step"] == 6 and lines[-1]["bad_images"] >= 1


BROKEN_MASK = """
import sys, masking, pretrain
from torch.utils.data import get_worker_info
def broken(height, width, num_masked, **options):
    if get_worker_info():  # in a process that loads images
        height, width = height, width, num_masked
    return masking.random_mask(height, width, num_masked)
masking.MASKS["broken"] = broken
pretrain.run(lambda: pretrain.main(sys.argv[1:]))
"""


DIFFERENT = """
import sys, pretrain
from masking import BadInput, rank
common, *cases, broken = [word.split() for word in sys.argv[1:]]
for words in cases:
    try:
        pretrain.main([*common, *words[: 2 * rank()]])
    except (BadInput, SystemExit) as error:
        print(f"process {rank()} stops with {error}", flush=True)
pretrain.run(lambda: pretrain.main([*common, *broken]))
"""


def test_of_several_processes_the_one_with_the_error_speaks(tmp_path):
    """One has other images, or another checkpoint, or finds a bad image."""
    (tmp_path / "run.py").write_text(DIFFERENT)
    here = make_folder(tmp_path / "here", 20)
    bad = make_folder(tmp_path / "bad", 20)
    (bad / "class0" / "deep" / "0.png").write_bytes(b"no image")
    common = [*TOY, "--tokenizer=pixel", f"--data={here}", f"--out={tmp_path}/out"]
    python("pretrain.py", *common, "--steps=4")
    common += ["--steps=4", "--num_workers=1"]
    cases = [f"--data={here}/class0", f"--out={tmp_path}/a_disk_of_its_own",
             f"--data={bad} --out={tmp_path}/bad_run"]
    done = python(tmp_path / "run.py", " ".join(common), *cases, processes=2, check=False,
                  timeout=60, env={**os.environ, "PYTHONPATH": HERE, "OMP_NUM_THREADS": "1"})
    assert done.returncode
    assert all(done.stdout.count(f"process {number} stops with 2") == 2 for number in (0, 1))
    lines = [line for line in done.stderr.splitlines() if not re.match(r"[WE]\d+ |\W*$", line)]
    images = f"error: --data={here}: 18 images, names in process 0, 6 images, names in process 1;"
    assert re.sub(r"names \w+", "names", lines[0]).startswith(images)
    assert f"error: --out={tmp_path}/out: step 4 in process 0, no checkpoint in" in lines[1]
    assert re.match(r"error: .*0\.png: cannot be read as an image", lines[2])
    assert re.match(r"error: .*; another process stopped", lines[3])
    assert "Traceback" in lines[4] and '/pretrain.py", line' not in done.stderr  # torchrun's


def failing(error):
    def main():
        raise error

    return main


def test_bad_input_is_one_line_and_any_other_error_keeps_its_traceback(tmp_path, capsys):
    for error_class, code in ((BadInput, 2), (FloatingPointError, 1)):
        text = failure_of(capsys, failing(error_class("not enough values to unpack")), code)
        assert text == "error: not enough values to unpack"
    for error_class in (ValueError, OSError):
        with pytest.raises(SystemExit) as stop:
            pretrain.run(failing(error_class("not enough values to unpack")))
        text = capsys.readouterr().err
        assert stop.value.code == 1 and text.startswith("Traceback") and "raise error" in text
    words = [*TOY, f"--out={tmp_path}/out", "--mask=broken", "--tokenizer=pixel", "--num_workers=1"]
    done = python("-c", BROKEN_MASK, *words, check=False, timeout=60)
    assert done.returncode == 1 and "error: " not in done.stderr
    assert "Traceback" in done.stderr and "in broken" in done.stderr
    assert "ValueError: too many values to unpack (expected 2)" in done.stderr


def test_a_download_that_fails_says_what_to_do(monkeypatch, capsys, tmp_path):
    def refuse(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(masking.CIFAR10, "__init__", refuse)
    for word, said in (("--tokenizer=dalle", "=dalle:DIR"), ("--data=cifar10", "CIFAR10")):
        text = error_of(capsys, *TOY, f"--out={tmp_path}/out", word)
        assert "download failed (no route)" in text and said in text
    (tmp_path / "file").write_text("in the way of the cache folder")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "file"))
    monkeypatch.setattr(masking.CIFAR10, "__init__", lambda self, root, **_: os.makedirs(root))
    for word in ("--tokenizer=dalle", "--data=cifar10"):
        text = error_of(capsys, *TOY, f"--out={tmp_path}/out", word)
        assert f"{tmp_path}/file" in text and "TORCH_HOME" in text


def test_without_dalles_weights_the_bench_measures_random_ones(monkeypatch, capsys, tmp_path):
    def refuse(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    words = ["--tokenizer=dalle", "--bench", "--image_size=8", "--batch_size=2", "--min_block=1"]
    pretrain.main([*TOY, *words])
    said = capsys.readouterr().out
    assert "download failed (no route)" in said and "measuring with random weights" in said
    assert json.loads(said.splitlines()[-1])["tokenizer_images_per_s"] > 0


# ---- pretrain: runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_start_where_nothing_is_forked(script, labelled, mapped, tmp_path):
    """As on Windows, which lacks two modules too, and on macOS."""
    (tmp_path / "sitecustomize.py").write_text(
        "import multiprocessing, sys\n"
        "sys.modules['resource'] = sys.modules['fcntl'] = None\n"
        "multiprocessing.set_start_method('spawn')\n")
    data = {"pretrain": labelled, "finetune_cls": labelled, "finetune_seg": mapped}[script]
    words = [*TOYS[script], f"--data={data}", "--num_workers=1", "--steps=2"]
    done = python(f"{script}.py", *words, f"--out={tmp_path}/out",
                  env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert "Traceback" not in done.stderr
    assert read_metrics(tmp_path / "out" / "metrics.jsonl")[-1]["step"] == 2


def test_one_run_per_folder_and_a_killed_one_leaves_no_lock(tmp_path, dvae, capsys):
    words = [*TOY, f"--out={tmp_path}", f"--tokenizer=dvae:{dvae}", "--steps=3000"]
    first = subprocess.Popen([sys.executable, "pretrain.py", *words, "--num_workers=2"], cwd=HERE,
                             stdout=subprocess.PIPE, text=True)
    while not first.stdout.readline().startswith("step 3"):
        assert first.poll() is None
    text = error_of(capsys, *words)
    assert "another run is in it" in text and "90 seconds" in text
    first.kill()
    first.wait()
    pretrain.claim_folder(parse(*words), masking.open_images("shapes", 32, 8)[0])


def test_a_run_from_scratch_to_its_pictures(tmp_path):
    """The README's first command at toy size: the dVAE, then BEiT, and all that they write."""
    words = [*TOY, f"--out={tmp_path}", "--tokenizer_steps=60", "--steps=60", "--eval_every=30"]
    words += ["--batch_size=16", "--val_images=32", "--num_workers=2"]
    done = python("pretrain.py", *words)
    assert "commit" in done.stdout and "Traceback" not in done.stderr
    for folder, columns in ((tmp_path / "tokenizer", 2), (tmp_path, 4)):
        lines = read_metrics(folder / "metrics.jsonl")
        assert [line["step"] for line in lines] == list(range(1, 61))
        losses = [line["loss"] for line in lines]
        assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:5])
        assert {"epoch", "lr", "grad_norm", "images_per_s"} <= lines[0].keys()
        assert [line["step"] for line in lines if "val_loss" in line] == [30, 60]
        with Image.open(folder / "reconstruction.png") as picture:
            assert picture.width == columns * 132 + 4
        assert json.load(open(folder / "config.json"))["steps"] == 60
    done = python("pretrain.py", *words)
    assert "step 60 of 60" in done.stdout  # a run that is complete is not run again

    # the trivial baselines, again from the tokens of the masked patches by numpy
    line, tokens = lines[-1], []
    tokenizer = build_tokenizer(f"dvae:{tmp_path}/tokenizer/checkpoint.pt")
    dataset = views_of(pretrain.Config(**saved(tmp_path)["config"]), 16)
    for sample in (dataset[0, index, 1.0] for index in range(len(dataset))):
        codes = tokenizer.encode(sample["token_images"][None] / 255.0)[0]
        tokens += codes[sample["mask"]].tolist()
    share = np.unique(tokens, return_counts=True)[1] / len(tokens)
    assert math.isclose(line["val_unigram_entropy"], -(share * np.log(share)).sum(), rel_tol=1e-4)
    assert math.isclose(line["val_most_frequent"], share.max(), rel_tol=1e-5)
    assert math.isclose(line["val_vocab_used"], len(share) / 32, rel_tol=1e-6)


@pytest.mark.parametrize("tokenizer", ["pixel", "dvae"])
def test_any_picture_is_reconstructed_at_its_own_aspect(tokenizer, tmp_path):
    contrast = ["--contrast=dino", "--prototypes=16"] if tokenizer == "dvae" else []  # ignored
    toy(tmp_path / "run", f"--tokenizer={tokenizer}", "--steps=2", *contrast)
    drawing(40, 0).resize((30, 90)).save(tmp_path / "tall.png")
    words = ["--task=reconstruct", f"--out={tmp_path}", f"--data={tmp_path}/tall.png"]
    pretrain.main([*words, f"--weights={tmp_path}/run/checkpoint.pt"])
    with Image.open(tmp_path / "reconstruction_tall.png") as picture:
        side = 4 * 4  # a patch on a grid of 24 x 8, drawn at four times its size
        assert picture.size == (4 * (8 * side + 4) + 4, 14 + 24 * side + 8)
        columns = [np.asarray(picture.convert("RGB")).astype(int)[18:, 4 + n * (8 * side + 4) :]
                   for n in range(4)]
    patches = [column[: 24 * side, : 8 * side].reshape(24, side, 8, side, 3) for column in columns]
    image, masked, tokens, filled = (part.swapaxes(1, 2) for part in patches)
    hidden = np.abs(masked - 127.5).max(axis=(2, 3, 4)) <= 1
    assert 60 <= hidden.sum() <= 74  # of 192 patches at most 38.3%
    assert np.abs(image - masked)[~hidden].max() <= 1
    if tokenizer == "pixel":  # a dVAE's decoder would see the neighbours too
        assert np.abs(tokens - image).max() <= 1
        changed = np.abs(filled - tokens).max(axis=(2, 3, 4)) > 1
        assert not changed[~hidden].any() and changed[hidden].all()


@pytest.mark.parametrize("mask, predict", [
    ("block", "masked"), ("random", "masked"), ("block", "all"), ("none", "all"),
])
def test_the_loss_is_equation_2_over_the_patches_to_predict(mask, predict, dvae):
    words = ["--drop_path=0", f"--mask={mask}", f"--predict={predict}"]
    tokenizer = build_tokenizer(f"dvae:{dvae}")
    objective, views = make_objective(*words, tokenizer=tokenizer)
    shake(objective.model)
    batch = sample_batch(views, 5)
    masks = batch["mask"].numpy().reshape(5, 64)
    assert 0.35 < masks.mean() <= 0.41 if mask != "none" else not masks.any()
    inputs = objective.inputs(batch, CPU)
    with torch.no_grad():
        loss, metrics = objective(inputs, objective.denominators(batch), 0.0)
        tokens = tokenizer.logits(inputs["token_images"]).numpy().argmax(axis=1).reshape(5, 64)
        logits = objective.model(inputs["images"], inputs["mask"], torch.arange(5 * 64))
    logits = logits.double().numpy().reshape(5, 64, 32)
    where = masks if predict == "masked" else np.ones((5, 64), bool)
    right = np.take_along_axis(logits, tokens[..., None], 2)[..., 0]
    surprise = np.log(np.exp(logits).sum(axis=2)) - right  # -log p of the token, for each patch
    assert math.isclose(loss, surprise[where].mean(), rel_tol=1e-5)
    hits = (logits.argmax(axis=2) == tokens)[where]
    assert math.isclose(metrics["accuracy"], hits.mean(), abs_tol=1e-6)


@pytest.mark.parametrize("script, words, runs, close", [
    ("pretrain", "--tokenizer=dvae:DVAE", [(1, 3), (2, 10), (3, 2)], 2e-6),
    ("finetune_cls", "", [(1, 3), (2, 3)], 2e-6),
    ("finetune_cls", "--sam_rho=0.5", [(1, 3), (2, 3)], 2e-6),
    # temperatures amplify noise
    ("pretrain", "--contrast=dino --contrast_on=mean", [(3, 2)], 1e-4),
    ("pretrain", "--contrast=dino --local_crops=2", [(1, 3)], 1e-4),
    ("pretrain", "--contrast=moco", [(2, 5)], 1e-4),
    ("pretrain", "--contrast=simclr --mim_weight=0", [(2, 5)], 1e-4),
])
def test_processes_and_accumulation_do_not_change_the_gradient(script, words, runs, close, tmp_path,
                                                               dvae, labelled):
    data = [f"--data={labelled}"]
    if script == "pretrain":
        data = ["--tokenizer=pixel", "--projector_dim=16", "--prototypes=32"]
    words = [*TOYS[script], *data, *words.replace("DVAE", dvae).split(), "--drop_path=0"]
    words += ["--steps=1", "--batch_size=10", "--clip_grad=0"]
    lines, found = [], []  # a run of one process first
    for processes, micro in ((1, 10), *runs):
        options = [*words, f"--out={tmp_path}/{processes}_{micro}", f"--micro_batch={micro}"]
        if processes > 1:
            python(f"{script}.py", *options, processes=processes)
        else:
            SCRIPTS[script].main(options)
        lines += read_metrics(f"{tmp_path}/{processes}_{micro}/metrics.jsonl")
        found.append(gradients(f"{tmp_path}/{processes}_{micro}"))
    largest = found[0].abs().max()
    assert largest > 1e-3
    for line, gradient in zip(lines[1:], found[1:], strict=True):
        assert (gradient - found[0]).abs().max() < 1e-6 + close / 2 * largest
        for name in {"loss", "accuracy", "mim_loss", "contrast_loss", "grad_norm", "val_loss",
                     "val_unigram_entropy", "val_feature_std"} & line.keys():
            rtol = 1e-2 if name == "val_feature_std" else close
            assert math.isclose(line[name], lines[0][name], rel_tol=rtol), name


@pytest.mark.parametrize("script, words", [
    ("pretrain", "--contrast=moco --projector_dim=16 --tokenizer=pixel"), ("finetune_cls", ""),
    ("finetune_seg", "--data=MAPPED"),
])
def test_one_process_under_torchrun_computes_the_same(script, words, tmp_path, mapped, one_process,
                                                      monkeypatch):
    """Its group runs all that several GPUs would. DDP keeps a gradient once, in its buckets."""
    kept = []
    clip = torch.nn.utils.clip_grad_norm_

    def look(parameters, *args):
        parameters = list(parameters)
        grads = [p.grad for p in parameters if p.grad is not None]
        kept.append(sum(grad.untyped_storage().nbytes() > grad.nbytes for grad in grads))
        return clip(parameters, *args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", look)
    words = [*TOYS[script], *words.replace("MAPPED", str(mapped)).split(), "--steps=2"]
    SCRIPTS[script].main([*words, f"--out={tmp_path}/group"])
    assert dist.get_world_size() == 1 and min(kept) > 40
    dist.destroy_process_group()
    monkeypatch.delenv("RANK")
    kept.clear()
    SCRIPTS[script].main([*words, f"--out={tmp_path}/alone"])
    assert max(kept) < 20 and not dist.is_initialized()  # only attention's biases share a gradient
    assert same_weights(tmp_path / "group", tmp_path / "alone")


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_runs_end_with_the_same_weights(script, tmp_path, dvae, labelled, mapped):
    data = {"pretrain": [f"--tokenizer=dvae:{dvae}"], "finetune_seg": [f"--data={mapped}"],
            "finetune_cls": [f"--data={labelled}", "--mixup=0.8"]}[script]
    words = [f"{script}.py", *TOYS[script], *data, "--steps=40", "--save_every=3"]
    words += ["--num_workers=2"]
    clock = time.time()
    python(*words, f"--out={tmp_path}/whole")
    length = time.time() - clock
    rng = np.random.default_rng()
    kills = 0
    while kills < (KILLS if script == "pretrain" else max(1, KILLS // 3)):
        run = subprocess.Popen([sys.executable, *words, f"--out={tmp_path}/killed"],
                               cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            _, error = run.communicate(timeout=rng.uniform(0.4, 1.0) * length)
            assert run.returncode == 0, error.decode()  # it came to its end: check, and again
            assert same_weights(tmp_path / "whole", tmp_path / "killed")
            for path in (tmp_path / "killed").iterdir():
                path.unlink()
        except subprocess.TimeoutExpired:
            run.kill()
            run.communicate()
            kills += 1
    python(*words, f"--out={tmp_path}/killed")
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
    whole, killed = (read_metrics(tmp_path / out / "metrics.jsonl") for out in ("whole", "killed"))
    assert [line["step"] for line in killed] == list(range(1, 41))
    for line, uncut in zip(killed, whole, strict=True):
        lost = {"step", "epoch"} | {name for name in uncut if name.startswith("val_")} == {*line}
        assert line["step"] == 40 and lost or line["loss"] == uncut["loss"]  # killed evaluating


def test_signals_save_and_more_processes_resume(tmp_path, dvae):
    """One process gets SIGTERM; two, with torchrun and their loaders, get SIGUSR1, as by Slurm."""
    words = [*TOY, f"--tokenizer=dvae:{dvae}", "--steps=80", "--save_every=0", "--num_workers=1"]
    words = ["pretrain.py", *words, f"--out={tmp_path}/run"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    step = 0
    for number, launch, code, last in (
        (signal.SIGTERM, ["exec", sys.executable], 143, 5),
        (signal.SIGUSR1, ["trap '' USR1; exec", sys.executable, "-m", *torchrun], 1, 40),
    ):
        run = subprocess.Popen(" ".join([*launch, *words]), cwd=HERE, stdout=subprocess.PIPE,
                               text=True, shell=True)
        said = ""
        for line in run.stdout:
            said += line
            if line.startswith(f"step {last} "):
                for path in glob.glob("/proc/[0-9]*/cmdline"):
                    with contextlib.suppress(OSError):  # another process that just ended
                        if f"{tmp_path}/run".encode() in Path(path).read_bytes():
                            os.kill(int(path.split("/")[2]), number)
                break
        said += run.communicate(timeout=60)[0]
        found = re.search(r"stopped by a signal after step (\d+)", said)
        assert run.returncode == code and found, said
        assert f"step {step} of 80" in said
        step = int(found[1])
        assert saved(tmp_path / "run")["step"] == step < 80
    python(*words)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 81))
    assert np.mean([line["loss"] for line in lines[-20:]]) < np.mean([x["loss"] for x in lines[:5]])


def stopped(call):
    with pytest.raises(SystemExit) as stop:
        pretrain.run(call)
    return stop.value.code == 143


def without_speed(lines):
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines]


def test_a_signal_or_a_kill_during_an_evaluation_or_a_save(tmp_path, dvae, monkeypatch):
    words = [f"--tokenizer=dvae:{dvae}", "--eval_every=2"]
    whole = toy(tmp_path / "whole", *words)
    assert [line["step"] for line in whole if "val_loss" in line] == [2, 4, 6]
    monkeypatch.setattr(pretrain.Logger, "stop", False, raising=False)
    out = str(tmp_path / "hit")
    saves = []
    save = pretrain.save_checkpoint

    def note(config, *args, **state):
        saves.append((os.path.basename(config.out), state.get("step", args[1:])))
        save(config, *args, **state)

    monkeypatch.setattr(pretrain, "save_checkpoint", note)
    for name in ("evaluate", "save_checkpoint"):
        for number in (signal.SIGTERM, signal.SIGUSR1, None):
            pretrain.Logger.stop = False
            call = getattr(pretrain, name)

            def hit(*args, **options):
                if number is None:
                    raise KeyboardInterrupt
                os.kill(os.getpid(), number)
                return call(*args, **options)

            with monkeypatch.context() as patch:
                patch.setattr(pretrain, name, hit)
                if number is None:  # a kill, as nothing catches it
                    with pytest.raises(KeyboardInterrupt):
                        toy(out, *words, "--resume=never")
                else:
                    assert stopped(lambda: pretrain.main([*TOY, f"--out={out}", *words,
                                                          "--resume=never"]))
            assert saves == ([] if (name, number) == ("save_checkpoint", None) else [("hit", (2,))])
            saves.clear()
            pretrain.Logger.stop = False
            lines = without_speed(toy(out, *words))
            if (name, number) == ("evaluate", None):  # its step's training is not in the log
                assert lines[1].items() < without_speed(whole)[1].items() and "val_loss" in lines[1]
                lines[1] = without_speed(whole)[1]
            assert lines == without_speed(whole) and same_weights(tmp_path / "whole", out)
            saves.clear()


@pytest.mark.parametrize("steps", [2, 4])
def test_a_signal_stops_a_tokenizers_training_and_what_would_follow(steps, tmp_path, monkeypatch):
    """Even during its last evaluation."""
    monkeypatch.setattr(pretrain.Logger, "stop", False, raising=False)
    evaluate = pretrain.evaluate

    def hit(*args, **options):
        os.kill(os.getpid(), signal.SIGUSR1)
        return evaluate(*args, **options)

    monkeypatch.setattr(pretrain, "evaluate", hit)
    words = [*TOY, f"--out={tmp_path}", f"--tokenizer_steps={steps}", "--eval_every=2"]
    assert stopped(lambda: pretrain.main(words))
    assert saved(tmp_path / "tokenizer")["step"] == 2
    assert not (tmp_path / "checkpoint.pt").exists()


def test_logging_and_saving_and_evaluating_do_not_change_the_training(tmp_path, dvae):
    words = [f"--tokenizer=dvae:{dvae}"]
    often = toy(tmp_path / "often", *words, "--eval_every=1", "--save_every=1")
    toy(tmp_path / "seldom", *words, "--log_every=3", "--eval_every=4", "--save_every=5")
    seldom = read_metrics(tmp_path / "seldom" / "metrics.jsonl")
    assert [line["step"] for line in seldom] == [3, 4, 5, 6]
    losses = {line["step"]: line["loss"] for line in often}
    assert all(line["loss"] == losses[line["step"]] for line in seldom)
    assert same_weights(tmp_path / "often", tmp_path / "seldom")


def test_the_log_counts_the_steps_that_float16_skipped(tmp_path):
    config = pretrain.Config(out=str(tmp_path), batch_size=4, log_every=3, eval_every=0)
    logger = pretrain.Logger(config, None, 10, 20, steps_per_epoch=5)
    for norm, loss, due in ((1.0, 0.5, set()), (math.inf, 0.5, {"log"}), (2.0, 0.5, set()),
                            (1.0, 1.0, set())):
        metrics = {"loss": torch.tensor(loss), "grad_norm": torch.tensor(norm)}
        assert logger.add(metrics, {"skipped": torch.zeros(4)}) == due
    lines = []
    logger.sinks = [lines.append]
    logger.write(logger.read(0.1))
    [line] = lines
    assert (line["skipped_steps"], line["step"], line["epoch"], line["lr"]) == (1, 14, 2.8, 0.1)
    assert (line["loss"], line["grad_norm"]) == (1.0, 1.0)


def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(tmp_path, dvae, capsys):
    words = [f"--tokenizer=dvae:{dvae}"]
    toy(tmp_path / "whole", *words)
    for damage in ("cut", "flipped"):
        out = tmp_path / damage
        toy(out, *words)
        data = bytearray((out / "checkpoint.pt").read_bytes())
        if damage == "cut":
            del data[len(data) // 2 :]
        else:
            data[len(data) // 2] ^= 4  # in a tensor: torch.load alone would not notice
        (out / "checkpoint.pt").write_bytes(data)
        capsys.readouterr()
        toy(out, *words)
        said = capsys.readouterr().out
        assert "checkpoint.pt: damaged" in said and "step 4 of 6" in said
        assert same_weights(tmp_path / "whole", out)
    for name in ("checkpoint.pt", "previous.pt"):
        (out / name).write_bytes(b"nothing")
    assert "previous.pt: damaged; --resume=never" in error_of(capsys, *TOY, f"--out={out}", *words)


def test_a_run_goes_on_with_the_same_config_and_images_only(tmp_path, dvae, capsys):
    here, there = make_folder(tmp_path / "here", 20), tmp_path / "there"
    words = [*TOY, f"--out={tmp_path}/out", f"--tokenizer=dvae:{dvae}", "--steps=2"]
    pretrain.main([*words, f"--data={here}"])
    check_errors(capsys, [*words, f"--data={here}"], [
        ("--lr=0.5 --seed=3", "lr: 0.003 there, 0.5 now, seed: 0 there, 3 now"),
        ("--steps=4", "to train longer, --weights="),
        ("--data=shapes", "20000 images"),
    ])
    (tmp_path / "out" / "checkpoint.pt.1.tmp").write_bytes(b"of a killed save")
    here.rename(there)  # where the images lie may change, and some options
    words += [f"--data={there}"]
    pretrain.main([*words, "--num_workers=1", "--micro_batch=4"])
    assert not list((tmp_path / "out").glob("*.tmp"))
    Image.new("RGB", (40, 40)).save(there / "new.png")
    assert re.search("'18 images, .* there, '19 images, .* now", error_of(capsys, *words))
    (there / "class0" / "deep" / "0.png").unlink()  # as many, but others
    assert "18 images" in error_of(capsys, *words)
    pretrain.main([*words, "--lr=0.5", "--resume=never"])
    assert read_metrics(tmp_path / "out" / "metrics.jsonl")[-1]["step"] == 2


def test_what_a_crash_leaves_in_the_folder(tmp_path, dvae, capsys):
    words = [f"--tokenizer=dvae:{dvae}", "--steps=2"]
    toy(tmp_path, *words, "--save_every=1")
    metrics, config = tmp_path / "metrics.jsonl", tmp_path / "config.json"
    lines = metrics.read_bytes().splitlines()
    metrics.write_bytes(lines[0] + b'\n\0\0{"step": 1}\n3\n{"step": 2, "lo\n\xff\n' + lines[1])
    assert [line["step"] for line in read_metrics(metrics)] == [1, 2]
    assert len(toy(tmp_path, *words)) == 2 and metrics.read_text().count("\n") == 2
    config.write_bytes(b"")
    text = error_of(capsys, *TOY, f"--out={tmp_path}", *words)
    assert text.startswith(f"error: {config}: damaged") and "remove" in text
    config.unlink()
    assert len(toy(tmp_path, *words)) == 2
    config.rename(tmp_path / "tokens.json").write_bytes(b"")
    text = error_of(capsys, *TOY, f"--out={tmp_path}/b", *words, f"--token_cache={tmp_path}",
                    "--cache_epochs=1")
    assert "tokens.json: damaged" in text


def test_each_picture_has_its_own_file(tmp_path, dvae, mapped):
    """Names that differ by their folder, their ending or their case, long ones, and bytes that are
    no UTF-8, which a Mac has not."""
    data = tmp_path / "data"
    for name in ("a/0.png", "b/0.png", "a_0.png", "c.png", "c.jpg", "C.bmp", "x" * 250 + ".png",
                 os.fsdecode(b"\xff.png")):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        drawing(40, 0).save(data / name)
    toy(tmp_path / "pre", f"--tokenizer=dvae:{dvae}", "--steps=1")
    toy_cls(tmp_path / "cls", "--steps=1")
    toy_seg(tmp_path / "seg", f"--data={mapped}", "--steps=1")
    for script, task, run, pattern, count in (
            (pretrain, "reconstruct", "pre", "reconstruction_*", 8),
            (finetune_cls, "attention", "cls", "attention_*", 8),
            (finetune_seg, "predict", "seg", "labels/**/*.png", 8),
            (finetune_cls, "predict", "cls", "predictions.*", 2)):
        out = tmp_path / task / run
        weights = f"--weights={tmp_path}/{run}/checkpoint.pt"
        script.main([f"--task={task}", f"--data={data}", weights, f"--out={out}"])
        assert len(list(out.glob(pattern))) == count, task
    assert {"c.jpg.png", "a_0.png"} <= set(os.listdir(tmp_path / "predict" / "seg" / "labels"))
    rows = (tmp_path / "predict" / "cls" / "predictions.csv").read_bytes().splitlines()
    assert any(row.startswith(b"\xff.png,") for row in rows)


def test_the_same_folder_is_the_same_however_it_is_written(tmp_path, monkeypatch, capsys):
    """And what a run draws into a folder below --data is no image of it."""
    make_folder(tmp_path / "data", 20)
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--tokenizer=pixel", "--steps=2"]
    plain = toy(tmp_path / "data/out", *words, f"--data={tmp_path}/data")
    for data in ("~/data", "~/data//", f"{tmp_path}/x/../data/."):
        pretrain.main([*TOY, *words, f"--data={data}", "--out=~/data/out/"])
        assert "step 2 of 2" in capsys.readouterr().out
    toy(tmp_path / "data/again", *words, "--data=~/data", "--out=~/data/out")
    assert read_metrics(tmp_path / "data/out/metrics.jsonl") == plain
    config = parse("--token_cache=~/c/", "--tokenizer=dvae:~/d.pt", "--weights=a//b.pt", "--data=")
    assert config.token_cache == f"{tmp_path}/c" and config.tokenizer == f"dvae:{tmp_path}/d.pt"
    assert config.weights == "a/b.pt" and config.data == ""
    text = error_of(capsys, *TOY, *words, "--data=~/data", "--out=~/data/")
    assert "is --out too" in text


def test_a_full_disk_is_one_line_and_the_last_checkpoint_intact(tmp_path):
    """No file may grow beyond some size after the first checkpoint: the system's error is as when
    the disk is full."""
    code = """
import resource, sys, finetune_cls, pretrain
save = pretrain.save_checkpoint
def save_and_limit(*args, **state):
    save(*args, **state)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
pretrain.save_checkpoint = save_and_limit
pretrain.run(lambda: finetune_cls.main(sys.argv[1:]))
"""
    done = python("-c", code, *TOY_CLS, f"--out={tmp_path}", "--data=shapes", check=False)
    errors = done.stderr.strip().splitlines()
    assert done.returncode == 1 and errors[-1].startswith("error: ") and "Traceback" not in errors
    assert "File too large; make room" in errors[-1]
    assert saved(tmp_path)["step"] == 2 and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("error, remedy", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total"),
     "lower --micro_batch"),
    (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback\n"
                  "RuntimeError: unable to allocate shared memory(shm) for file </torch_1_2_0>: "
                  "No space left on device (28)"), "give --num_workers=0"),
    (RuntimeError("DataLoader worker (pid 1) is killed by signal: Bus error. It is possible that "
                  "dataloader's workers are out of shared memory."), "give --num_workers=0"),
    (PermissionError(13, "Permission denied", "/out/a.png"), "/out/a.png'; give another --out"),
])
def test_what_a_machine_lacks_is_one_line_with_its_remedy(error, remedy, capsys):
    assert remedy in failure_of(capsys, failing(error), code=1)


def test_a_float16_run_that_overflows_goes_on_in_float32_and_back(tmp_path, dvae):
    """Where one image's activations overflow, each try in float16 ends at its step."""
    words = [f"--tokenizer=dvae:{dvae}", "--data=shapes"]
    toy(tmp_path, *words, "--dtype=float16")
    (tmp_path / "checkpoint.pt").unlink()  # previous.pt is of step 4
    lines = toy(tmp_path, *words, "--dtype=float32")
    assert [line["step"] for line in lines] == list(range(1, 7)) and not saved(tmp_path)["scaler"]
    (tmp_path / "checkpoint.pt").unlink()
    assert toy(tmp_path, *words, "--dtype=float16")[-1]["step"] == 6 and saved(tmp_path)["scaler"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, dvae, capsys):
    folder = make_folder(tmp_path / "images", 20)
    words = [*TOY, f"--out={tmp_path}/out", f"--tokenizer=dvae:{dvae}", f"--data={folder}"]
    words += ["--lr=1e30", "--clip_grad=0", "--save_every=1", "--steps=30"]
    text = failure_of(capsys, lambda: pretrain.main(words), code=1)
    step = int(re.search(r"the loss of step (\d+) is (nan|inf)", text)[1])
    assert "with float16 try --dtype=float32" in text
    assert len(set(re.findall(r"deep/\d+\.png", text))) == 8  # the batch's images
    assert saved(tmp_path / "out")["step"] == step - 1


@pytest.mark.parametrize("words", [
    "--variant=released --mask=random --predict=all",
    "--mask=none --predict=all --dtype=bfloat16 --repeats=2",
    "--dtype=float16 --batch_size=4 --layer_decay=0.9",
])
def test_other_options_train_too(words, tmp_path, dvae):
    folder = make_folder(tmp_path / "images", 40, side=32, different=2)
    words = [f"--tokenizer=dvae:{dvae}", f"--data={folder}", "--lr=1e-3", *words.split()]
    words += ["--crop_min=0.95", "--jitter=0"]
    lines = toy(tmp_path, "--steps=24", "--eval_every=12", *words)
    losses = [line["loss"] for line in lines]
    assert max(losses[-5:]) < losses[0] and math.isfinite(lines[-1]["val_loss"])
    model = BEiT(ViTConfig(**saved(tmp_path)["arch"]), 32)
    assert "newly initialized: none" in load_weights(model, tmp_path / "checkpoint.pt")
    words += ["--steps=2", f"--weights={tmp_path}/checkpoint.pt"]
    assert toy(tmp_path / "on", *words)[0]["loss"] < losses[0]


def test_compiled_blocks_compute_the_same(tmp_path, dvae, monkeypatch):
    """With the compiler's front end alone: C++ code takes it minutes on two cores."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    words = [f"--tokenizer=dvae:{dvae}", "--steps=2", "--drop_path=0.4", "--save_every=0"]
    plain = toy(tmp_path / "plain", *words)
    compiled = toy(tmp_path / "compiled", *words, "--compile")
    toy(tmp_path / "checkpointed", *words, "--checkpointing")
    for a, b in zip(plain, compiled):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-4)
    assert same_weights(tmp_path / "plain", tmp_path / "checkpointed")


@pytest.mark.parametrize("words, graphs", [
    # blocks with and without stochastic depth; the pixels of the patches, and the loss
    ("--tokenizer=pixel --size=tiny", 4),
    ("--tokenizer=pixel --batch_size=16 --micro_batch=12", 4),  # 8 + 8, not 12 + 4
    # besides pixels and loss: blocks of both kinds for one view, for two and small ones, and the
    # teacher's
    ("--tokenizer=pixel --contrast=dino --local_crops=2 --prototypes=32 --projector_dim=16", 9),
])
def test_blocks_are_compiled_once_a_shape_also_in_ddp(words, graphs, tmp_path, one_process,
                                                      monkeypatch):
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    toy(tmp_path, *words.split(), "--compile", "--drop_path=0.1", "--steps=3", "--eval_every=2")
    assert len(made) == graphs


def test_the_plan_of_the_papers_run():
    text = python("pretrain.py", "--dry_run", "--processes=16", "--images_per_s=148").stdout
    assert "500,000 of 2,048 images, 625 per epoch, 6,250 of warm-up" in text
    assert "16 processes x 1 micro-batches x 128 images" in text and "92,089,856" in text
    flops = float(re.search(r"compute +([\d.]+) GFLOP", text)[1])
    # 26 GMAC of DALL-E's encoder, its last layer at masked patches only; 17.5 of ViT-B's forward
    # pass, the head; twice that backward
    tokens = 26 - (196 - 75) * 2048 * 8192 / 1e9
    head = 75 * 768 * 8192 / 1e9
    assert abs(flops / (2 * tokens + 6 * (17.5 + head)) - 1) < 0.02
    # 800 epochs of 1,281,167 images of 14x14 tokens of 2 bytes; 24 GMAC of 78 are the tokens'
    assert "0.502 GB per epoch; saves 31% of the compute" in text
    assert "5.01 days on 16 processes" in text  # 800 * 1.28M / (16 * 148 * 86400), about five


def test_base_trains_on_photographs_with_dalles_tokens(tmp_path, dalle):
    folder = make_folder(tmp_path / "photos", 4, side=260)
    words = [f"--data={folder}", f"--tokenizer=dalle:{dalle[0]}", "--steps=3", "--batch_size=2"]
    words += ["--warmup_epochs=0", "--num_workers=0", "--log_every=1", "--lr=1e-3", "--drop_path=0"]
    lines = toy(tmp_path / "out", *words, "--crop_min=0.9", "--eval_every=0", options=[])
    losses = [line["loss"] for line in lines]
    assert abs(losses[0] - math.log(8192)) < 0.5 and min(losses) < losses[0] - 1
    assert os.path.getsize(f"{tmp_path}/out/reconstruction.png") > 10_000
    model = BEiT(ViTConfig.named("base"), 8192)
    assert "newly initialized: none" in load_weights(model, f"{tmp_path}/out/checkpoint.pt")


def test_cached_tokens_change_nothing_but_the_time(tmp_path, dvae, capsys):
    folder = make_folder(tmp_path / "images", 18)  # 17 to train on: 2 steps per epoch
    words = [f"--data={folder}", f"--tokenizer=dvae:{dvae}", "--val_images=1"]
    toy(tmp_path / "plain", *words)  # 3 epochs
    cache = tmp_path / "cache"
    making = [*TOY, *words, "--task=tokens", "--cache_epochs=3", f"--out={cache}"]
    pretrain.main(making)
    reading = ["--cache_epochs=3", f"--token_cache={cache}"]
    toy(tmp_path / "cached", *words, *reading)
    assert same_weights(tmp_path / "plain", tmp_path / "cached")
    tokens = np.load(cache / "tokens.npy")
    assert tokens.shape == (3, 17, 8, 8) and tokens.dtype == np.uint16
    reading = [*TOY, *words, *reading, f"--out={tmp_path}/wrong"]

    known = json.loads((cache / "tokens.json").read_text())
    assert known["done"] == 3  # as if it had been stopped in the second epoch
    (cache / "tokens.json").write_text(json.dumps(known | {"done": 1}))
    np.save(cache / "tokens.npy", np.zeros_like(tokens))
    check_errors(capsys, reading, [("", "1 of 3 epochs are done; run its --task=tokens again")])
    python("pretrain.py", *making, processes=2)
    again = np.load(cache / "tokens.npy")
    assert np.array_equal(again[1:], tokens[1:]) and not again[0].any()
    toy(tmp_path / "other", "--task=tokenizer", "--steps=1")
    check_errors(capsys, reading, [
        ("--seed=1", "seed is 0 there, 1 here"),
        ("--jitter=0.1", "jitter is 0.4 there, 0.1 here"),
        ("--cache_epochs=2", "cache_epochs is 3 there, 2 here"),
        (f"--data={folder}/class0 --batch_size=4", "images is"),
        (f"--tokenizer=dvae:{tmp_path}/other/checkpoint.pt", "tokenizer is"),
        (f"--token_cache={tmp_path}", "--task=tokens writes it"),
    ])
    check_errors(capsys, [*TOY, "--task=tokens", f"--out={tmp_path}/wrong"], [
        (f"--tokenizer=dvae:{dvae}", "--cache_epochs=0: give 1 or more"),
        ("--cache_epochs=1", "give a trained tokenizer, dvae:FILE"),
        ("--cache_epochs=1 --tokenizer=pixel", "has no tokens"),
    ])


def test_tokens_cached_on_a_gpu_are_read_on_a_cpu_and_those_of_another_dalle_are_not(tmp_path,
                                                                                      dalle):
    config = parse(*TOY, "--cache_epochs=1")
    images = masking.folder_images(str(make_folder(tmp_path / "images")))
    tokenizer = build_tokenizer(f"dalle:{dalle[0]}")
    on_a_gpu = copy.deepcopy(tokenizer)
    for part in on_a_gpu.modules():
        if getattr(part, "use_float16", False):
            part.half()
    pretrain.open_tokens(str(tmp_path / "cache"), config, images, on_a_gpu, "r+")
    pretrain.open_tokens(str(tmp_path / "cache"), config, images, tokenizer, "r+")
    next(tokenizer.parameters())[0, 0, 0, 0] += 0.01
    with pytest.raises(BadInput, match="tokenizer is"):
        pretrain.open_tokens(str(tmp_path / "cache"), config, images, tokenizer, "r+")


def test_with_cache_epochs_the_crops_repeat_and_the_masks_do_not():
    views = views_of(parse(*TOY, "--cache_epochs=2"), 16, train=True)
    first, second, third = (views[epoch, 5, 1.0] for epoch in range(3))
    for name in ("images", "token_images", "jitter"):
        assert torch.equal(first[name], third[name]) and not torch.equal(first[name], second[name])
    assert not torch.equal(first["mask"], third["mask"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_bench_ends_in_a_line_of_json(script, tmp_path, mapped, capsys):
    words = dict(pretrain="--tokenizer=pixel", finetune_cls="--bench",
                 finetune_seg=f"--data={mapped}")[script]
    SCRIPTS[script].main([*TOYS[script], words, f"--out={tmp_path}/out", "--bench"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = ["load_images_per_s_per_core", "tokenizer_images_per_s", "model_images_per_s"]
    names += ["step_images_per_s", "peak_memory_gb", "utilisation"]
    assert list(found) == names and not (tmp_path / "out").exists()
    assert all(found[name] > 0 for name in names if found[name] is not None)
    assert (found["tokenizer_images_per_s"] is None) == (script != "pretrain")
    assert found["utilisation"] < 1.1


# ---- pretrain: other objectives ------------------------------------------------------------------


@pytest.mark.parametrize("target", ["dvae", "pca"])
def test_options_of_mim_do_not_change_the_tokenizer_that_is_trained_first(target, tmp_path):
    words = [f"--data={make_folder(tmp_path / 'images', 20, side=32)}", f"--tokenizer={target}"]
    words += ["--components=3", "--tokenizer_steps=8", "--tokenizer_lr=1e-3"]
    changed = "--steps=3 --warmup_steps=2 --lr=1e-4 --min_lr=1e-6 --schedule=linear --clip_grad=1 "
    changed += "--weight_decay=0.3 --mask=random --mask_ratio=0.5 --min_block=4 --predict=all "
    changed += "--size=tiny --variant=released --drop_path=0.3 --norm=half --contrast=simclr "
    changed += "--projector_dim=8 --mim_weight=0.5"
    changed = [*words, *changed.split()]
    toy(tmp_path / "one", *words), toy(tmp_path / "two", *changed)
    made = tmp_path / "one" / "tokenizer"
    assert same_weights(made, tmp_path / "two" / "tokenizer")
    rates = [line["lr"] for line in read_metrics(made / "metrics.jsonl")]
    assert target == "pca" or np.allclose(rates[:3], [5e-4, 1e-3, 1e-3])  # a quarter of its steps
    content = (made / "checkpoint.pt").read_bytes()
    for name in ("checkpoint.pt", "previous.pt"):  # of BEiT; the tokenizer stays
        (tmp_path / "one" / name).unlink()
    toy(tmp_path / "one", *changed)
    assert (made / "checkpoint.pt").read_bytes() == content


def test_principal_components_are_those_of_numpys_svd(tmp_path, capsys):
    folder = make_folder(tmp_path / "images", 12, side=16)
    words = [*TOY, "--task=pca", f"--data={folder}", "--components=20", "--micro_batch=5"]
    words = [*words, "--jitter=0", "--crop_min=0.9"]
    pretrain.main([*words, f"--out={tmp_path}/one"])
    python("pretrain.py", *words, f"--out={tmp_path}/two", processes=2)
    views = views_of(parse(*words), 32, train=True)
    images = np.stack([views[0, i, 1.0]["images"].numpy() for i in range(len(views))]) / 255
    patches = images.reshape(-1, 3, 8, 4, 8, 4).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 48)
    mean = patches.mean(0)
    _, scale, rows = np.linalg.svd(patches - mean, full_matrices=False)
    variances = scale**2 / len(patches)
    for out in ("one", "two"):
        pca = build_tokenizer(f"pca:{tmp_path}/{out}/checkpoint.pt")
        assert np.allclose(pca.mean, mean, atol=1e-6)
        assert np.allclose(pca.variances, variances, rtol=1e-3, atol=1e-8)
        assert pca.num_outputs == 20
        assert np.allclose(abs(pca.components.numpy() @ rows[:20].T), np.eye(20), atol=1e-3)
    values = pca.encode(torch.tensor(images, dtype=torch.float32))
    white = values.flatten(0, 2).numpy()
    assert abs(white.mean(0)).max() < 1e-3 and np.allclose(white.std(0), 1, atol=1e-2)
    errors = [(pca.decode(values[..., :n]) - torch.tensor(images)).square().mean().item()
              for n in range(1, 21)]
    assert all(a > b for a, b in zip(errors, errors[1:]))
    assert math.isclose(errors[-1], variances[20:].sum() / 48, rel_tol=0.05)  # what is left out
    said = capsys.readouterr().out
    assert f"20 of 48 components hold {100 * variances[:20].sum() / variances.sum():.2f}%" in said


@pytest.mark.parametrize("target", ["pixel", "pixel:norm", "pca"])
def test_other_targets_train_from_one_command(target, tmp_path):
    words = [f"--tokenizer={target}", "--steps=80", "--components=3", "--lr=1e-3", "--jitter=0"]
    folder = make_folder(tmp_path / "images", 40, side=32, different=2)
    lines = toy(tmp_path, *words, f"--data={folder}", "--crop_min=0.95")
    losses = [line["loss"] for line in lines]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5]) and lines[-1]["val_explained"] > 0.05
    spec = f"pca:{tmp_path}/tokenizer/checkpoint.pt" if target == "pca" else target
    tokenizer = build_tokenizer(spec, patch_size=4)
    dataset = views_of(pretrain.Config(**saved(tmp_path)["config"]), 32)
    values = []
    for sample in (dataset[0, index, 1.0] for index in range(len(dataset))):
        values.append(tokenizer.encode(sample["images"][None] / 255.0)[0][sample["mask"]])
    values = torch.cat(values).double().numpy()
    constant = ((values - values.mean(0)) ** 2).mean()
    assert math.isclose(lines[-1]["val_constant_loss"], constant, rel_tol=1e-4)
    explained = 1 - lines[-1]["val_loss"] / constant
    assert math.isclose(lines[-1]["val_explained"], explained, rel_tol=1e-3, abs_tol=1e-4)
    assert Image.open(tmp_path / "reconstruction.png").width == 4 * 132 + 4


def contrastive(*words):
    """A toy objective with a contrastive loss, its views, and a batch as the networks see it."""
    small = ["--tokenizer=pixel", "--projector_dim=16", "--prototypes=32", "--drop_path=0"]
    objective, views = make_objective(*small, *words)
    return objective, views, objective.inputs(sample_batch(views, 8), CPU)


def test_the_teacher_is_the_students_moving_average():
    objective, _, inputs = contrastive("--contrast=moco", "--teacher_momentum=0.98")
    teacher = objective.contrast.teacher.network
    expected = {name: value.clone() for name, value in teacher.named_parameters()}
    assert expected and not any(v.requires_grad for v in teacher.parameters())
    optimizer = torch.optim.SGD(objective.model.parameters(), lr=0.5)
    for step in range(10):
        loss, _ = objective(inputs, objective.denominators(inputs), step / 10)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        objective.after_step(step / 10)
        momentum = 1 - 0.02 * (1 + math.cos(math.pi * step / 10)) / 2  # from 0.98 to 1
        student = dict(objective.model.named_parameters())
        expected = {name: momentum * value + (1 - momentum) * student[name]
                    for name, value in expected.items()}
    moved = 0
    for name, value in teacher.named_parameters():
        assert torch.allclose(value, expected[name], atol=1e-6), name
        moved = max(moved, (value - student[name]).abs().max())
    assert moved > 1e-3


def test_the_teacher_computes_in_the_networks_precision():
    objective, _, inputs = contrastive("--contrast=moco")
    seen = []
    layer = objective.contrast.teacher.network.blocks[0].mlp.fc1
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = objective(inputs, objective.denominators(inputs), 0.0)
    assert seen == [torch.bfloat16] and loss.dtype == torch.float32


def test_heads_normalize_one_view_at_a_time():
    objective, views, inputs = contrastive("--contrast=moco", "--mim_weight=0")
    model, batch = objective.model, sample_batch(views, 8)
    both = objective.outputs(inputs["views"])
    for one, view in zip(both, batch["views"].unbind(1), strict=True):
        view = (view / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        x = model.norm(model.features(view))[:, 0]
        assert torch.allclose(one, model.projector(x), atol=1e-4)


def test_views_of_a_contrastive_loss():
    for words, whole, small, area in (
        (["--contrast=dino"], 1, None, (0.14, 1)),  # DINO's --global_crops_scale: its help
        (["--contrast=moco", "--mim_weight=0"], 2, None, (0.08, 1)),
        (["--contrast=dino", "--local_crops=3"], 2, (8, 3, 3, 12, 12), (0.4, 1)),
    ):
        _, views, _ = contrastive(*words)
        assert views.extra_views["views"][1].transforms[0].scale == area
        first, again = sample_batch(views, 8), sample_batch(views, 8)
        assert first["views"].shape == (8, whole, 3, 32, 32)
        assert small is None or first["local_views"].shape == small  # 96 / 224 of 8 patches: 3
        assert all(torch.equal(first[k], again[k]) for k in ("views", "images"))
        assert first["mask"].any() == ("--mim_weight=0" not in words)
        others = [first["images"], *first["views"].unbind(1)]
        for a, b in itertools.combinations(others, 2):
            assert (a != b).any()


def test_moco_alone_keeps_its_patch_projection_at_random(tmp_path):
    for words, still in ((["--mim_weight=0"], True), ([], False)):
        words = ["--contrast=moco", "--tokenizer=pixel", "--projector_dim=16", *words]
        made = [saved(toy(tmp_path / f"{still}{n}", *words, f"--steps={n}") and
                      tmp_path / f"{still}{n}")["model"] for n in (1, 3)]
        same = {k for k in made[0] if torch.equal(made[0][k], made[1][k])}
        assert same == ({"patch_embed.proj.weight", "patch_embed.proj.bias"} if still else set())


@pytest.mark.parametrize("contrast", ["dino", "moco", "simclr"])
def test_a_contrastive_loss_is_learned_beside_mim(contrast):
    """From the same batch, with the teacher at rest."""
    objective, _, inputs = contrastive(f"--contrast={contrast}")
    optimizer = torch.optim.Adam(objective.model.parameters(), lr=1e-3)
    lines = []
    for _ in range(40):
        loss, metrics = objective(inputs, objective.denominators(inputs), 0.0)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        lines.append(metrics)
    for name in ("mim_loss", "contrast_loss"):  # (DINO's has a floor: its targets' entropy)
        assert min(line[name] for line in lines) < 0.95 * lines[0][name], name


@pytest.mark.parametrize("contrast", ["dino", "moco", "simclr"])
def test_contrastive_runs_resume_exactly(contrast, tmp_path):
    words = [f"--contrast={contrast}", "--tokenizer=pixel", "--projector_dim=16", "--steps=20"]
    words += ["--prototypes=32", "--save_every=10", "--lr=1e-3", "--jitter=0"]
    words += [f"--data={make_folder(tmp_path / 'images', 44, side=32)}", "--val_images=4"]
    lines = toy(tmp_path / "whole", *words)
    chance = dict(dino=math.log(32), moco=2 * 0.2 * math.log(8), simclr=math.log(15))[contrast]
    assert 0.4 < lines[0]["contrast_loss"] / chance < 2.5  # a mean over images
    toy(tmp_path / "half", *words)
    (tmp_path / "half" / "checkpoint.pt").unlink()  # resumes from previous.pt, of step 10
    assert toy(tmp_path / "half", *words)[-1]["loss"] == lines[-1]["loss"]
    a, b = saved(tmp_path / "whole"), saved(tmp_path / "half")
    assert same_weights(tmp_path / "whole", tmp_path / "half")
    assert all(torch.equal(v, b["objective"][k]) for k, v in a["objective"].items())
    has_teacher = contrast != "simclr"
    assert any(".teacher." in k for k in a["objective"]) == has_teacher
    # such weights are a start for the teacher too, and go to other libraries
    path = tmp_path / "whole" / "checkpoint.pt"
    report = load_weights(Classifier(ViTConfig(**a["arch"]), 3), path)
    assert "projector" in report.splitlines()[1]
    export_weights(path, "timm", str(tmp_path / "timm.pth"))
    objective, _ = make_objective(*words, f"--weights={path}")
    networks = [objective.model] + ([objective.contrast.teacher.network] if has_teacher else [])
    assert all(torch.equal(n.pos_embed, a["model"]["pos_embed"]) for n in networks)
    views = views_of(pretrain.Config(**a["config"]), 32)
    images = torch.stack([views[0, i, 1.0]["images"] for i in range(4)])
    images = masking.normalize(images / 255, "imagenet")
    with torch.no_grad():
        z = objective.eval().contrast.outputs([images])[0].numpy()
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    feature_std = z.std(0).mean() * math.sqrt(z.shape[1])
    assert math.isclose(lines[-1]["val_feature_std"], feature_std, rel_tol=1e-2)


def test_bad_input_of_other_objectives_gets_one_line(tmp_path, capsys):
    torch.save(torch.zeros(3), tmp_path / "bare.pt")
    toy(tmp_path / "pca", "--task=pca", "--components=4", f"--data={make_folder(tmp_path / 'i')}")
    check_errors(capsys, [*TOY, f"--out={tmp_path}/out", "--tokenizer=pixel"], (
        ("--contrast=moco --micro_batch=4", "cannot accumulate; give --micro_batch=8"),
        ("--contrast=simclr --micro_batch=4", "compares all images of a batch"),
        ("--contrast=moco --local_crops=2", "--contrast=moco has no small views"),
        ("--contrast=moco --batch_size=256 --dry_run", "give --micro_batch=256"),
        ("--contrast=simclr --contrast_weight=-1", "--contrast_weight=-1.0: give 0 or more"),
        ("--contrast=simclr --batch_size=1", "a --batch_size of 2 or more"),
        ("--contrast=dino --mim_weight=0 --contrast_weight=0", "nothing is left to train"),
        ("--contrast=dino --teacher_momentum=1.5", "--teacher_momentum=1.5: give 0 to 1"),
        ("--contrast=dino --teacher_temperature=0", "=0.0: give 0.001 or more"),
        ("--tokenizer=pca --components=49", "a patch of 4x4 pixels has 1 to 48"),
        ("--tokenizer=vqgan", "known are dalle, dvae:FILE, vqgan:FILE, pca:FILE, pixel"),
        ("--tokenizer=vqgan:none.ckpt", "none.ckpt: no such file"),
        ("--dry_run --tokenizer=vae", "--tokenizer=vae: unknown; known are dalle"),
        ("--task=pca --components=2 --micro_batch=0", "--micro_batch=0"),
        (f"--tokenizer=dvae:{tmp_path}/bare.pt", "bare.pt: no checkpoint of --task=tokenizer"),
        (f"--tokenizer=dvae:{tmp_path}/pca/checkpoint.pt", "no checkpoint of --task=tokenizer"),
        ("--mim_weight=0", "a contrastive loss"),
        ("--local_crops=2", "a contrastive loss"),
        ("--dry_run --task=pca", "--task=pca has no plan"),
    ))


# ---- finetune_cls --------------------------------------------------------------------------------


OF_ABC = masking.Images([], None, "", classes=["a", "b", "c"])


def test_the_defaults_are_the_papers_table_13():
    recipe = dict(
        epochs=100, batch_size=1024, lr=4e-3, min_lr=1e-6, warmup_epochs=20, schedule="cosine",
        layer_decay=0.65, weight_decay=0.05, clip_grad=0, drop_path=0.1, smoothing=0.1, repeats=3,
        mixup=0.8, cutmix=1.0, randaug=9, randaug_noise=0.5, erasing=0.25, crop_min=0.08,
        size="base", variant="paper", image_size=224,
    )
    large = dict(recipe, size="large", epochs=50, warmup_epochs=5, layer_decay=0.75, repeats=1)
    cifar = dict(recipe, epochs=150, batch_size=512, weight_decay=0.3, erasing=0, eval_crop=0.875)
    higher = dict(image_size=384, epochs=10, batch_size=512, lr=5e-6, min_lr=5e-6, warmup_epochs=0,
                  layer_decay=1, weight_decay=1e-8, eval_crop=1)  # DeiT's, but for epochs and crop
    probe = dict(epochs=50, batch_size=1024, lr=4e-3, weight_decay=1e-4, mixup=0, cutmix=0,
                 randaug=0, erasing=0, smoothing=0, repeats=1, task="probe")
    tiny_probe = dict(probe, epochs=10, batch_size=256)
    presets = dict(
        imagenet=recipe, large=large, imagenet384=recipe | higher, large384=large | higher,
        cifar100=cifar, probe=probe, cifar100_probe=dict(probe, data="cifar100"),
        cifar10_probe=tiny_probe, shapes_probe=tiny_probe, cifar10={}, shapes={},
    )
    assert parse(script=finetune_cls) == parse("--preset=imagenet", script=finetune_cls)
    assert presets.keys() <= finetune_cls.PRESETS.keys()
    for name, expected in presets.items():
        config = parse(f"--preset={name}", "--weights=none", script=finetune_cls)
        assert {name: getattr(config, name) for name in expected} == expected, name
        with torch.device("meta"):  # all build what they name
            plain = replace(config, mixup=0, cutmix=0)  # which draw their shares on a real device
            assert finetune_cls.OBJECTIVES[config.task](plain, OF_ABC)
    assert parse("--preset=large", "--epochs=30", script=finetune_cls).epochs == 30


def test_evaluation_resizes_the_short_side_and_crops_the_middle(tmp_path):
    """As in the official code: to 256 for 224 pixels, to 384 for 384."""
    for width, height in ((600, 400), (400, 600)):
        picture = drawing(600, 3).resize((width, height), Image.BICUBIC)
        images = masking.Images([0], lambda key: picture, "one")

        def middle(side, short, long):
            size = (long, short) if width > height else (short, long)
            left, top = [(length - side) // 2 for length in size]
            box = (left, top, left + side, top + side)
            return np.asarray(picture.resize(size, Image.BICUBIC).crop(box))  # (side, side, 3)

        for preset, side, short, long in (("imagenet", 224, 256, 384), ("cifar100", 224, 256, 384),
                                          ("imagenet384", 384, 384, 576)):
            config = parse(f"--preset={preset}", "--weights=none", script=finetune_cls)
            view = finetune_cls.LabelledViews(images, config, train=False)[0, 0, 1.0]["images"]
            expected = (middle(side, short, long) / 255 - MEAN) / STD
            assert np.abs(view.permute(1, 2, 0).numpy() - expected).max() < 1e-5
        for preset, side, short, long in (("paper", 224, 256, 384), ("shapes", 48, 48, 72)):
            views = masking.Views(images, parse(f"--preset={preset}"), side, train=False)
            view = views[0, 0, 1.0]["images"].permute(1, 2, 0).float().numpy()
            assert np.abs(view - middle(side, short, long)).max() <= 1  # shapes: whole


def test_mixing_mixes_images_and_labels_alike():
    labels = torch.arange(3)
    images = labels.float().view(3, 1, 1, 1).expand(3, 3, 16, 16).contiguous()  # its label's number
    batch = {"images": images, "labels": labels}
    config = parse(*TOY_CLS, "--mixup=0.8", "--cutmix=1", script=finetune_cls)
    objective = finetune_cls.Classification(config, OF_ABC)
    kinds = {"mixup": 0, "cutmix": 0}
    for seed in range(40):
        torch.manual_seed(seed)
        mixed, soft = objective.inputs(batch, CPU).values()
        torch.manual_seed(seed)
        assert torch.equal(mixed, objective.inputs(batch, CPU)["images"])
        assert torch.allclose(soft.sum(1), torch.ones(3)) and soft.shape == (3, 3)
        assert torch.allclose(mixed.mean((1, 2, 3)), soft @ torch.arange(3.0), atol=1e-4)
        whole = torch.equal(mixed, mixed.round())  # cutmix keeps each pixel of one of the two
        kinds["cutmix" if whole else "mixup"] += 1
        assert ((soft > 0).sum(1) <= 2).all()
    assert min(kinds.values()) >= 8
    plain = finetune_cls.Classification(parse(*TOY_CLS, script=finetune_cls), OF_ABC)
    for objective in (objective.eval(), plain):
        assert all(torch.equal(v, batch[k]) for k, v in objective.inputs(batch, CPU).items())


def test_training_views_are_augmented_and_evaluation_is_not(labelled):
    config = finetune_cls.Config(data=str(labelled), image_size=32, patch_size=8, erasing=0.5)
    images, _ = finetune_cls.open_labelled(config)
    views = finetune_cls.LabelledViews(images, config, train=True)
    samples = [views[epoch, 0, 1.0] for epoch in range(40)]
    assert torch.equal(samples[3]["images"], views[3, 0, 0.5]["images"])  # a function of the key
    assert len({sample["images"].numpy().tobytes() for sample in samples}) == 40
    # erased pixels are standard normal noise, which reaches below what black becomes
    black = -max(m / s for m, s in zip(MEAN, STD))
    erased = np.mean([(s["images"] < black - 0.05).any().item() for s in samples])
    assert 0.25 < erased < 0.75
    plain = finetune_cls.LabelledViews(images, config, train=False)[5, 0, 1.0]["images"]
    whole = evaluated(images.keys[0], 37)[0]
    assert (plain - whole[:, 2:34, 2:34]).abs().mean() < 0.05


def test_randaugment_has_the_requested_magnitude(monkeypatch):
    seen = []
    draw = finetune_cls.v2.RandAugment
    monkeypatch.setattr(finetune_cls.v2, "RandAugment",
                        lambda count, step, **k: seen.append(step) or draw(count, step, **k))
    for _ in range(1000):
        finetune_cls.rand_augment(9.0, 0.5, Image.new("RGB", (16, 16), "gray"))
    assert abs(len(seen) / 2000 - 0.5) < 0.04  # each of two operations half of the time
    assert abs(np.mean(seen) - 27) < 0.15 and abs(np.std(seen) - 1.5) < 0.15  # of 30, thrice 9


def test_labels_of_the_built_in_shapes_are_those_of_the_images():
    few = []  # drawn evenly and by the seed
    for count, seed in ((0, 0), (3, 0), (3, 0), (3, 1)):
        config = finetune_cls.Config("shapes", image_size=24, labels_per_class=count, seed=seed)
        train, val = finetune_cls.open_labelled(config)
        assert train.classes == val.classes == list(masking.OUTLINES)
        assert len(train) == (24 if count else 20_000) and len(val) == 2000
        few.append(set(train.keys))
        counts = np.bincount([train.read_label(key) for key in train.keys])
        assert not count or (counts.tolist() == [3] * 8 and len(few[-1]) == 24)
        for seed, images in ((1, train), (0, val)):
            for index in range(20):
                key = images.keys[index]
                drawn, label, label_map = masking.draw_shapes(24, seed, key)
                assert label == images.read_label(key)
                assert np.array_equal(drawn, images.load(index)[0].permute(1, 2, 0).numpy())
                assert np.array_equal(label_map, images.read_label_map(key))
    assert few[1] == few[2] != few[3]
    train, val = masking.open_images("shapes:30", 24, 2000)
    assert (len(train), len(val)) == (30, 2000)
    with pytest.raises(masking.BadInput, match="a number of training images"):
        masking.open_images("shapes:few", 24, 2000)


def test_classification_learns_and_evaluates_the_same_anywhere(labelled, tmp_path, capsys):
    words = [f"--data={labelled}", "--steps=24", "--eval_every=12", "--lr=2e-3", "--batch_size=12"]
    lines = toy_cls(tmp_path / "run", *words)
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"] and lines[-1]["val_top1"] >= 0.8
    assert lines[-1]["val_top5"] == 1  # of three classes
    weights = tmp_path / "run" / "checkpoint.pt"
    # it needs no options but the files
    words = ["--num_workers=0", "--task=eval", f"--weights={weights}", f"--data={labelled}"]
    alone = finetune_cls.main(words)
    done = python("finetune_cls.py", *words, "--micro_batch=2", processes=3)  # 3 do not divide 10
    found = re.search(r"10 images val_loss (\S+) val_top1 (\S+) val_top5 (\S+)", done.stdout)
    assert np.allclose([*map(float, found.groups())], [*alone.values()], rtol=1e-5)

    model = Classifier(ViTConfig(**saved(tmp_path / "run")["arch"]), 3).eval()
    load_weights(model, weights, head=True)
    with torch.no_grad():  # again, from the files
        probs = {path: model(evaluated(path)).softmax(dim=1)[0].numpy()
                 for path in sorted((labelled / "val").glob("*/*.png"))}
    right = {path: "abc"[row.argmax()] == path.parent.name for path, row in probs.items()}
    assert math.isclose(alone["val_top1"], sum(right.values()) / 10)
    for kind, count in zip("abc", (4, 3, 3)):  # the table of classes
        top1 = 100 * np.mean([right[path] for path in right if path.parent.name == kind])
        assert re.search(rf"^{kind} +{count} +{top1:.1f}%", done.stdout, re.MULTILINE)

    # a folder with some of the classes, and one with another
    part = tmp_path / "some" / "val"
    part.mkdir(parents=True)
    (part / "c").symlink_to(labelled / "val" / "c")
    words[-1] = f"--data={tmp_path}/some"
    of_c = [right[path] for path in right if path.parent.name == "c"]
    assert math.isclose(finetune_cls.main(words)["val_top1"], np.mean(of_c), abs_tol=1e-6)
    (part / "d").symlink_to(labelled / "val" / "b")
    check_errors(capsys, words, [("", "val/d: is none of the classes")], script=finetune_cls)

    # a folder of classes alone: a tenth is held out
    train, val = finetune_cls.open_labelled(parse(f"--data={labelled}/train", script=finetune_cls))
    assert len(train) == 22 and len(val) == 2 and train.classes == val.classes == ["a", "b", "c"]
    assert not set(train.keys) & set(val.keys)
    assert all("abc"[train.read_label(path)] == path.split("/")[-2] for path in train.keys)

    # prediction needs no options but the files
    (labelled / "val" / "broken.jpg").write_bytes(b"no image")
    words = ["--task=predict", f"--weights={weights}", f"--data={labelled}/val",
             f"--out={tmp_path}/predicted", "--micro_batch=2", "--num_workers=0"]
    done = python("finetune_cls.py", *words, processes=2)
    (labelled / "val" / "broken.jpg").unlink()
    assert "broken.jpg: skipped" in done.stdout
    with open(tmp_path / "predicted" / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    for row in rows:
        expected = probs[labelled / "val" / row["file"]]
        for place, number in enumerate(np.argsort(-expected), 1):
            assert row[f"class_{place}"] == "abc"[number]
            assert abs(float(row[f"probability_{place}"]) - expected[number]) < 1e-3
    assert Image.open(tmp_path / "predicted" / "predictions.png").size == (8 * 128, 2 * 144)


def test_of_many_classes_the_50_with_the_lowest_accuracy_are_listed():
    matrix = np.eye(60, dtype=int) * 5
    matrix[57, 3] = 15
    matrix[2, 9] = 4
    matrix[1] = 0  # not held out
    table = finetune_cls.confusion_table(matrix, [f"class{n}" for n in range(60)]).splitlines()
    head, *rows = (line.split() for line in table)
    assert head == ["class", "images", "top-1", "mostly", "taken", "for"]
    assert [row[0] for row in rows] == [f"class{n}" for n in (0, *range(2, 50), 57)]
    assert rows[0] == ["class0", "5", "100.0%"]
    assert rows[1] == ["class2", "9", "55.6%", "class9", "(44.4%)"]
    assert rows[-1] == ["class57", "20", "25.0%", "class3", "(75.0%)"]


def test_a_classifier_is_the_start_of_another_with_other_classes(labelled, tmp_path):
    weights = tmp_path / "w.pt"
    save(shake(Classifier(replace(NANO, image_size=16), 7)), weights)
    report = load_weights(Classifier(NANO, 3), weights).split("\n")
    assert report[1] == "left out: head.weight, head.bias"
    assert report[2] == "newly initialized: head.weight, head.bias"
    assert toy_cls(tmp_path / "run", f"--data={labelled}", f"--weights={weights}")[-1]["step"] == 6


def test_each_class_keeps_a_training_image_and_there_are_two(tmp_path, capsys):
    for name in ("ape/0", *(f"bee/{number}" for number in range(19)), "cow/0"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        drawing(8, 0).save(tmp_path / f"{name}.png")
    train, val = finetune_cls.open_labelled(finetune_cls.Config(data=str(tmp_path)))
    assert val.stems() == ["bee/1"] and len(train) == 20 and not {*train.keys} & {*val.keys}
    words = [*TOY_CLS, f"--out={tmp_path}/out"]
    text = error_of(capsys, *words, f"--data={tmp_path}/bee", script=finetune_cls)
    assert "is in no class" in text
    (tmp_path / "more").mkdir()
    for name in ("bee", "ape", "cow"):
        (tmp_path / name).rename(tmp_path / "more" / name)
    assert "1 classes" in error_of(capsys, *words, f"--data={tmp_path}", script=finetune_cls)


def test_numbered_folders_without_names_in_the_weights(tmp_path, capsys):
    """As text 10 stands before 2, as a number after it; with 02 there is no doubt."""
    model = Classifier(ViTConfig.named("nano", image_size=32, patch_size=8), 12)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    words = ["--task=eval", f"--weights={tmp_path}/w.pt", f"--data={tmp_path}/data", "--size=nano",
             "--image_size=32", "--patch_size=8"]
    for number in range(12):
        (tmp_path / "data" / "val" / str(number)).mkdir(parents=True)
        drawing(32, number).save(tmp_path / "data" / "val" / str(number) / "0.png")
    assert "name the folders 02" in error_of(capsys, *words, script=finetune_cls)
    for number in range(10):
        (tmp_path / "data/val" / str(number)).rename(tmp_path / "data/val" / f"0{number}")
    assert "val_top1" in finetune_cls.main(words)


def test_every_task_keeps_the_norm_of_the_weights(labelled, mapped, tmp_path, capsys):
    toy(tmp_path / "half", "--tokenizer=pixel", "--steps=1", "--norm=half")
    weights = f"--weights={tmp_path}/half/checkpoint.pt"
    probe = f"--preset=shapes_probe {' '.join(TOY_CLS[1:])} {weights} --patch_size=4"
    for number, (script, options) in enumerate((
            (pretrain, [*TOY, "--tokenizer=pixel"]), (finetune_cls, [*TOY_CLS, "--patch_size=4"]),
            (finetune_cls, probe.split()), (finetune_seg, [*TOY_SEG, "--patch_size=4"]))):
        data = f"--data={mapped if script is finetune_seg else labelled}"
        words = [*options, data, weights, "--steps=1"]
        for more, norm in (([], "half"), (["--norm=imagenet"], "imagenet")):
            out = tmp_path / f"{number}{norm}"
            capsys.readouterr()
            script.main([*words, f"--out={out}", *more])
            assert saved(out)["config"]["norm"] == norm
            assert ("as it was trained: norm half" in capsys.readouterr().out) == (norm == "half")


def test_an_option_counts_as_given_at_its_default_too(labelled, tmp_path, capsys):
    toy_cls(tmp_path, f"--data={labelled}", "--steps=1")
    words = ["--task=eval", f"--data={labelled}", f"--weights={tmp_path}/checkpoint.pt"]
    sides = []
    for more in ([], ["--image_size=224"], ["--image_size=64"]):
        config = pretrain.as_trained(parse(*words, *more, script=finetune_cls), *pretrain.NETWORK)
        sides.append(config.image_size)
    assert sides == [32, 224, 64]
    assert "cls_token is" in error_of(capsys, *words, "--size=base", script=finetune_cls)


def test_sharpness_aware_minimization_by_hand(labelled, tmp_path):
    """A loss of two weights, (a - 1)^2 + 5 (b + 2)^2 at (2, 1): g = (2, 30)."""
    objective = torch.nn.Module()
    objective.weights = weights = torch.nn.Parameter(torch.tensor([2.0, 1.0]))

    def backward():
        ((weights[0] - 1) ** 2 + 5 * (weights[1] + 2) ** 2).backward()

    backward()
    pretrain.sharpen_gradients(objective, 0.05, backward)
    length = math.hypot(2, 30)
    a, b = 2 + 0.05 * 2 / length, 1 + 0.05 * 30 / length
    assert np.allclose(weights.detach(), [2, 1])
    assert np.allclose(weights.grad, [2 * (a - 1), 10 * (b + 2)])
    weights.grad = torch.tensor([math.inf, math.nan])  # an overflow of float16
    pretrain.sharpen_gradients(objective, 0.05, backward)
    assert np.allclose(weights.grad, [2, 30])

    for script, words in (("pretrain", ["--tokenizer=pixel"]),
                          ("finetune_cls", [f"--data={labelled}", "--mixup=0.8"])):
        def run(*more):
            out = tmp_path / (script + "".join(more))
            return out, toy(out, *words, "--drop_path=0.5", *more, script=SCRIPTS[script],
                            options=TOYS[script])

        plain, _ = run()
        tiny, _ = run("--sam_rho=1e-30")  # nothing but the second pass
        wide, lines = run("--sam_rho=0.5")
        _, half = run("--sam_rho=0.5", "--dtype=float16")
        assert same_weights(plain, tiny) and not same_weights(plain, wide)
        assert math.isclose(half[-1]["loss"], lines[-1]["loss"], rel_tol=0.25)
        still = ["--steps=1", "--lr=1e-9", "--weight_decay=0"]
        one, two = (saved(run(*still, f"--sam_rho={rho}")[0])["model"] for rho in (0, 0.5))
        # the step starts from the weights as they were
        assert all((one[name] - value).abs().max() < 1e-7 for name, value in two.items())


def test_probes_of_all_layers_leave_the_network_as_it_is(labelled, tmp_path, capsys):
    backbone = shake(ViT(NANO))
    save(backbone, tmp_path / "w.pt")
    words = ["--preset=shapes_probe", f"--data={labelled}", f"--weights={tmp_path}/w.pt"]
    words += ["--steps=40", "--batch_size=12", "--crop_min=0.9"]
    line = toy_cls(tmp_path / "all", *words)[-1]
    assert line["val_top1"] == max(line[f"val_top1_layer_{n}"] for n in range(1, 7)) >= 0.8
    assert "layer  top-1" in capsys.readouterr().out
    state = saved(tmp_path / "all")["model"]
    assert all(torch.equal(state[name], value) for name, value in backbone.state_dict().items())
    line = toy_cls(tmp_path / "one", *words, "--probe_layer=2", "--steps=2")[-1]
    assert [name for name in line if "layer" in name] == ["val_top1_layer_2"]

    model, outputs = LinearProbes(NANO, 3, [2, 5]).eval(), []
    load_weights(model, tmp_path / "w.pt")
    for block in model.blocks:
        block.register_forward_hook(lambda m, i, output: outputs.append(output.numpy()))
    logits = model(torch.randn(2, 3, 32, 32)).detach().numpy()
    for row, layer in enumerate([2, 5]):
        mean = outputs[layer - 1][:, 1:].mean(1)
        mean -= mean.mean(1, keepdims=True)
        mean /= np.sqrt((mean**2).mean(1, keepdims=True) + 1e-5)
        weight, bias = (p.detach().numpy() for p in model.probes[row].parameters())
        assert np.allclose(logits[row], mean @ weight.T + bias, atol=1e-4)


def test_nearest_neighbours_are_those_of_a_slow_loop(labelled, tmp_path):
    model = shake(ViT(NANO))
    save(model, tmp_path / "w.pt")
    words = [*TOY_CLS, f"--data={labelled}", f"--weights={tmp_path}/w.pt", "--task=knn"]
    line = finetune_cls.main([*words, "--neighbours=5"])
    features = {}
    for part in ("train", "val"):
        rows = []
        for path in sorted((labelled / part).glob("*/*.png")):
            with torch.no_grad():
                row = model.mean_features(evaluated(path))[3, 0].double().numpy()
            rows.append((row / np.linalg.norm(row), "abc".index(path.parent.name)))
        features[part] = rows
    right = sum(slow_vote(query, features["train"], 5) == truth for query, truth in features["val"])
    assert math.isclose(line["val_top1_layer_4"], right / 10, rel_tol=1e-6) and len(line) == 6

    rng = np.random.default_rng(0)
    keys, queries = (rng.normal(size=(count, 3)) for count in (300, 100))
    keys, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (keys, queries))
    labels = rng.integers(0, 6, 300)
    slow = [slow_vote(query, list(zip(keys, labels)), 30) for query in queries]
    assert finetune_cls.vote(*map(torch.tensor, (queries, keys, labels)), 30).tolist() == slow
    counted = [slow_vote(query, list(zip(keys, labels)), 30, 1e9) for query in queries]
    assert slow != counted  # near ones weigh more


def slow_vote(query, bank, count, temperature=0.07):
    near = sorted(bank, key=lambda pair: -(query @ pair[0]))[:count]
    votes = [sum(math.exp(query @ key / temperature) for key, label in near if label == k)
             for k in range(6)]
    return int(np.argmax(votes))


def test_attention_maps_have_a_panel_per_head(tmp_path):
    save(shake(BEiT(replace(NANO, patch_size=4), 10)), tmp_path / "w.pt")
    words = ["--task=attention", f"--weights={tmp_path}/w.pt", f"--out={tmp_path}"]
    finetune_cls.main([*words, "--data=shapes", "--query=1,2"])
    maps = list(tmp_path.glob("attention_*.png"))
    assert len(maps) == 8
    with Image.open(maps[0]) as picture:
        assert picture.width == 5 * 132 + 4  # the image and four heads
        red = np.asarray(picture.convert("RGB"))[14 + 4 + 16, 4 + 2 * 16 : 4 + 3 * 16]
        assert (red == [255, 0, 0]).all()  # the frame around row 1, column 2
    drawing(40, 0).resize((90, 30)).save(tmp_path / "wide.png")
    finetune_cls.main([*words, f"--data={tmp_path}/wide.png"])
    with Image.open(tmp_path / "attention_wide.png") as picture:
        side = 2 * 4  # a patch on a grid of 8 x 24, drawn at twice its size
        assert picture.size == (5 * (24 * side + 4) + 4, 14 + 8 * side + 8)
        red = np.asarray(picture.convert("RGB"))[14 + 4 + 4 * side, 4 + 12 * side : 4 + 13 * side]
        assert (red == [255, 0, 0]).all()  # around the patch in the middle


def test_curves_of_runs_become_a_picture(labelled, tmp_path, capsys, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes").Axes
    drawn = []
    for name in ("plot", "fill_between"):
        def noted(self, *args, draw=getattr(axes, name), **options):
            drawn.append(args)
            return draw(self, *args, **options)

        monkeypatch.setattr(axes, name, noted)
    for name in "ab":
        toy_cls(tmp_path / name, f"--data={labelled}", "--eval_every=2", f"--seed={ord(name)}")
    finetune_cls.main(["--task=curves", f"{tmp_path}/a", f"{tmp_path}/[ab]", f"--out={tmp_path}/c"])
    runs = [[100 * line["val_top1"] for line in read_metrics(tmp_path / name / "metrics.jsonl")
             if "val_top1" in line] for name in "ab"]
    mean = np.mean(runs, axis=0)
    spread = np.abs(np.subtract(*runs)) / np.sqrt(2)  # of two
    (_, alone), (_, both), (_, low, high) = drawn
    assert len(mean) == 3 and np.allclose(alone, runs[0]) and np.allclose(both, mean)
    assert np.allclose(low, mean - spread) and np.allclose(high, mean + spread)
    with Image.open(tmp_path / "c" / "curves.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20
    for name, accuracy in (("p0", 0.5), ("p1", 0.7)):  # probes: against the layer
        (tmp_path / name).mkdir()
        record = {"val_top1": accuracy, "val_top1_layer_1": 0.25, "val_top1_layer_2": accuracy}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    drawn.clear()
    finetune_cls.main(["--task=curves", f"{tmp_path}/p?", f"--out={tmp_path}/c"])
    assert drawn[0][0] == [1, 2] and np.allclose(drawn[0][1], [25, 60])
    for number, (steps, reached) in enumerate([(0, 0.2), (100, 0.5), (100, 0.7), (400, 0.9)]):
        before, after = tmp_path / f"from{steps}", tmp_path / f"ft{number}"
        after.mkdir()
        before.mkdir(exist_ok=True)
        (before / "metrics.jsonl").write_text(json.dumps({"step": steps}))
        weights = f"{before}/checkpoint.pt" if steps else "none"
        (after / "config.json").write_text(json.dumps({"weights": weights}))
        name = "val_miou" if steps == 400 else "val_top1"
        lines = [json.dumps({name: value}) for value in (0.1, reached)]
        (after / "metrics.jsonl").write_text("\n".join(lines))
    drawn.clear()
    finetune_cls.main(["--task=lengths", f"{tmp_path}/ft?", f"--out={tmp_path}/c"])
    assert drawn[0][0] == [0, 100, 400] and np.allclose(drawn[0][1], [20, 60, 90])
    assert (tmp_path / "c" / "lengths.png").exists()
    os.remove(tmp_path / "from400" / "metrics.jsonl")
    check_errors(capsys, ["--task=lengths"], [
        (f"{tmp_path}/no", "val_top1 or val_miou"), (f"{tmp_path}/ft?", "left no metrics.jsonl"),
    ], script=finetune_cls)
    check_errors(capsys, ["--task=curves"], [
        (f"{tmp_path}/[ap]*", "no common epoch or layer"),
        (f"{tmp_path}/no", "no metrics.jsonl with val_top1"),
        ("", "name the folders"),
    ], script=finetune_cls)


def test_bad_input_of_classification_gets_one_line(labelled, tmp_path, capsys):
    for place in ("noval/train/a", "differ/train/a", "differ/train/b", "differ/val/a",
                  "loose/train", "loose/val", "cut/train/a", "cut/val/a", "cut/train/b",
                  "cut/val/b"):
        (tmp_path / place).mkdir(parents=True)
        for number in range(8):
            Image.effect_noise((64, 64), 50).save(tmp_path / place / f"{number}.jpg")
    path = tmp_path / "cut" / "train" / "a" / "3.jpg"
    path.write_bytes(path.read_bytes()[:700])
    save(shake(Classifier(NANO, 5)), tmp_path / "five.pt")
    cut, five = f"--data={tmp_path}/cut", f"--weights={tmp_path}/five.pt"
    check_errors(capsys, [*TOY_CLS, f"--out={tmp_path}/out", f"--data={labelled}"], (
        (f"--data={tmp_path}/noval", "noval/val: no such folder"),
        (f"--data={tmp_path}/differ", "2 classes in train/, 1 in val/; b is in one only"),
        (f"--data={tmp_path}/loose", ".jpg: is in no class"),
        (cut, "3.jpg: cannot be read as an image"),
        (f"--task=eval {five}", "head.weight is (5, 64) there and (3, 64) in the model"),
        (f"{five} --size=tiny", "cls_token is (1, 1, 64) there and (1, 1, 192)"),
        ("--weights=gone.pt", "gone.pt: no such file"),
        "--task=probe: give --weights=FILE", "--task=attention: give --weights=FILE",
        (f"--task=probe {five}", "--task=probe --smoothing=0.1: a probe has"),
        (f"--task=attention {five} --query=4,0", "--query=4,0: give row,col"),
        ("--randaugment=3", "did you mean --randaug?"),
        ("--task=fit", "argument --task: invalid choice: 'fit' (choose from"),
        ("--drop_path=1", "drop_path=1.0 is not from 0 to below 1"),
        "--eval_crop=0.0: give 0.01 to 1", "--smoothing=2.0: give 0 to 0.99",
        "--labels_per_class=-1: give 0 or more", "--repeats=0: give 1 or more",
        "--probe_layer=7: give 0 to 6", "lr=3: is no option",
    ), script=finetune_cls)
    assert toy_cls(tmp_path / "skip", cut, "--skip_bad_images")[-1]["bad_images"] >= 1


# ---- finetune_seg --------------------------------------------------------------------------------


def test_the_defaults_are_the_papers_table_14():
    config = parse(script=finetune_seg)
    recipe = dict(
        steps=160_000, batch_size=16, image_size=512, lr=1e-3, min_lr=0, clip_grad=0,
        warmup_steps=1500, layer_decay=0.65, weight_decay=0.05, drop_path=0.1, schedule="linear",
        size="base", variant="paper", patch_size=16, num_classes=150, ignore_zero=True,
        aux_weight=0.4, stride=341, scale_min=0.5, scale_max=2, most_of_crop=0.75, scales="1",
        flip=False,
    )
    assert {name: getattr(config, name) for name in recipe} == recipe
    assert pretrain.run_length(config, 20_210) == (160_000, 1263, 1500)
    for step, share in ((0, 1 / 1500), (1499, 1), (1500, 1), (80_750, 0.5), (160_000, 0)):
        assert math.isclose(pretrain.learning_rate(config, step, 160_000, 1500), 1e-3 * share)


def test_windows_of_a_network_of_pixels_give_the_whole_image():
    weight, sizes = torch.randn(4, 3), set()

    def network(x):
        sizes.add(tuple(x.shape[2:]))
        return torch.einsum("kc,bchw->bkhw", weight, x).tanh()

    for height, width in ((32, 32), (33, 71), (71, 33), (64, 128)):
        image = torch.randn(1, 3, height, width)
        expected = torch.einsum("kc,bchw->bkhw", weight, image).tanh()
        for stride, batch in ((21, 1), (32, 5), (7, 16)):
            logits = finetune_seg.sliding_window(network, image, 32, stride, batch)
            assert logits.shape == expected.shape and (logits - expected).abs().max() < 1e-5
    assert sizes == {(32, 32)}


def test_images_below_the_window_are_enlarged_to_it():
    """The official SETR_Resize for multiple scales: the short side is that of the scale, but at
    least the window's. Nothing black is added, which the network would take for a place."""
    seen = []

    def network(x):
        seen.append(x)
        return torch.stack([x.mean(1), 1 - x.mean(1)], dim=1)

    for (height, width), scales, sides in (
        ((32, 40), "0.5", (32, 40)), ((32, 40), "0.75,2", (64, 80)), ((20, 50), "1", (32, 80)),
        ((64, 80), "0.25", (32, 40)), ((5, 64), "1.5", (32, 410)),
    ):
        config = parse(*TOY_SEG, f"--scales={scales}", "--micro_batch=1000", script=finetune_seg)
        image = torch.rand(1, 3, height, width) + 1
        labels = finetune_seg.predict_labels(network, image, (height, width), config)
        assert labels.shape == (1, height, width) and labels.sum() == 0
        starts = [len({*range(0, side - 32, 20), side - 32}) for side in sides]
        assert seen[-1].shape == (math.prod(starts), 3, 32, 32)
        assert seen[-1].min() >= 1
        assert scales != "0.5" or torch.equal(seen[-1][0], image[0, :, :, :32])  # not resized


def test_labels_of_a_large_image_are_found_in_bands():
    """All classes of all its pixels at once would take gigabytes."""
    weight = torch.randn(5, 3)
    config = parse(*TOY_SEG, "--scales=1,1.5", "--flip", script=finetune_seg)
    image, size = torch.randn(1, 3, 32, 50), (601, 907)
    interpolate, seen, total = F.interpolate, [], 0

    def network(x):
        return torch.einsum("kc,bchw->bkhw", weight, x).tanh()

    for side, flip in itertools.product(((32, 50), (48, 75)), (False, True)):
        view = interpolate(image, side, mode="bilinear")
        logits = network(view.flip(3)).flip(3) if flip else network(view)
        total = total + interpolate(logits, size, mode="bilinear").softmax(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "interpolate", lambda x, *a, **k: seen.append(interpolate(x, *a, **k))
                      or seen[-1])
        labels = finetune_seg.predict_labels(network, image, size, config)
    best, second = total.topk(2, dim=1).values.unbind(1)
    assert labels.shape == (1, *size)
    assert ((labels == total.argmax(1)) | (best - second < 1e-5)).all()
    assert max(x.numel() for x in seen) < 601 * 907 * 5 / 4


def test_windows_that_overlap_are_averaged():
    def network(x):  # windows of 8 at columns 0, 3 and 4: the last at the border
        return torch.tensor([1.0, 4.0, 10.0]).view(3, 1, 1, 1).expand(3, 2, 8, 8)

    row = finetune_seg.sliding_window(network, torch.zeros(1, 3, 8, 12), 8, 3)[0, 1, 5]
    assert np.allclose(row, [1, 1, 1, 2.5] + [5] * 4 + [7] * 3 + [10])


def test_scores_equal_the_definitions():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(-1, 6, (4, 30, 40)), rng.integers(0, 6, (4, 30, 40))
    truth[truth == 2] = 3  # class 2 is never there but predicted, class 5 the other way round,
    found[found == 5] = 1  # class 6 neither
    matrix = sum(
        finetune_seg.confusion(torch.tensor(t), torch.tensor(f), 7) for t, f in zip(truth, found)
    )
    means = finetune_seg.scores(matrix)
    ious, accuracies, valid = [], [], truth >= 0
    for k in range(7):
        both = ((truth == k) & (found == k) & valid).sum()
        either = (((truth == k) | (found == k)) & valid).sum()
        ious.append(both / either if either else math.nan)
        accuracies.append(both / (truth == k).sum() if (truth == k).any() else math.nan)
    assert np.isnan(ious).tolist() == [False] * 6 + [True]
    assert np.allclose(means["iou"], ious, equal_nan=True)
    assert np.allclose(means["accuracy"], accuracies, equal_nan=True)
    assert math.isclose(means["miou"], np.mean(ious[:6]))
    assert math.isclose(means["mean_accuracy"], np.nanmean(accuracies))
    assert math.isclose(means["pixel_accuracy"], ((truth == found) & valid).sum() / valid.sum())
    most = max(range(7), key=lambda k: (truth == k).sum())
    constant = [((truth == k) & (k == most)).sum() / valid.sum() if k == most else 0
                for k in range(7) if (truth == k).any()]
    assert math.isclose(means["baseline_miou"], np.mean(constant))


def test_label_maps_of_every_kind(tmp_path):
    labels = np.arange(12).reshape(3, 4)
    eight = Image.fromarray(labels.astype(np.uint8))
    eight.save(tmp_path / "grey.png")
    Image.fromarray(labels.astype(np.uint16)).save(tmp_path / "deep.png")
    eight.putpalette(np.random.default_rng(0).integers(0, 255, 768).astype(np.uint8).tobytes())
    eight.save(tmp_path / "palette.png")
    Image.fromarray(labels.astype(np.uint8)).convert("RGB").save(tmp_path / "rgb.png")
    for name in ("grey", "deep", "palette", "rgb"):
        assert np.array_equal(finetune_seg.read_labels(tmp_path / f"{name}.png", {}), labels)
    for labels, expected, options in (  # 255 is what many tools write for "nothing"
        (range(12), [-1, *range(11)], dict(num_classes=11)),
        (range(12), range(12), dict(num_classes=12, ignore_zero=False)),
        ([255, 1], [-1, 0], dict(num_classes=5)),
        ([255, 1], [-1, 1], dict(num_classes=5, ignore_zero=False)),
        ([255, 0, 3, 7, 70_000], [1, 0, -1, 2, -1], dict(num_classes=3, label_values="0, 255,7")),
    ):
        found = finetune_seg.classes_of(np.array([labels]), finetune_seg.Config(**options), "x.png")
        assert found.tolist() == [list(expected)], options


def test_label_maps_with_alpha_and_with_palettes_that_differ(tmp_path, capsys):
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3
    for mode, bands in (("LA", 1), ("RGBA", 3), ("PA", 1)):
        alpha = np.arange(12, dtype=np.uint8).reshape(3, 4)
        picture = Image.fromarray(np.stack([labels] * bands + [alpha], 2), mode)
        if mode == "PA":
            picture.putpalette([number for number in range(256) for _ in range(3)])
        path = tmp_path / ("a.tif" if mode == "PA" else "a.png")
        picture.save(path)
        assert np.array_equal(finetune_seg.read_labels(path, {}), labels), mode
    table = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]], np.uint8)
    ramp = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)
    order, colors = np.array([0, 2, 1, 3]), {}

    def read(palette, values=labels):
        picture = Image.fromarray(values)
        picture.putpalette(palette.tobytes())
        picture.save(tmp_path / "a.png")
        return finetune_seg.read_labels(tmp_path / "a.png", colors)

    for palette in (table, table[:3], table, ramp):  # a palette may lack what does not occur
        assert np.array_equal(read(palette), labels)
    for palette in (table[order], ramp[[0, 90, 180]]):
        with pytest.raises(BadInput, match=r"a.png: [12] has the color \(.*one palette"):
            read(palette)


def test_one_label_map_for_an_image(tmp_path, capsys):
    def draw():
        return drawing(32, 0), Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32) % 4)

    data = make_mapped(tmp_path / "data", draw)
    words = [*TOY_SEG, f"--data={data}", f"--out={tmp_path}/out"]
    for kind, ending in (("images", "jpg"), ("annotations", "tif")):
        second = data / kind / "training" / f"3.{ending}"
        drawing(32, 0).save(second)
        text = error_of(capsys, *words, script=finetune_seg)
        assert f"3.{ending}" in text and "3.png" in text and "for itself" in text
        second.unlink()


@pytest.mark.parametrize("turn, rotations", [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_label_maps_are_upright_unless_their_size_says_otherwise(turn, rotations, tmp_path):
    """EXIF's 3 is to be turned by 180 degrees, 6 by 90 clockwise, 8 by 90 the other way."""
    stored = np.arange(12, dtype=np.uint8).reshape(3, 4)
    upright = np.rot90(stored, rotations)
    photo = Image.fromarray(stored * 20).convert("RGB")
    photo.getexif()[0x0112] = turn
    photo.save(tmp_path / "photo.jpg", quality=100, exif=photo.getexif())
    seen = masking.read_image(tmp_path / "photo.jpg")[0].numpy()
    assert np.abs(seen / 20 - upright).max() < 0.3
    as_seen = {"of_upright": upright}
    if stored.shape != upright.shape:
        as_seen["of_stored"] = stored
    for name, labels in as_seen.items():
        Image.fromarray(labels).save(tmp_path / f"{name}.png")
        label_maps = {tmp_path / "photo.jpg": tmp_path / f"{name}.png"}
        found = finetune_seg.read_label_map(label_maps, {}, tmp_path / "photo.jpg")
        assert np.array_equal(found, upright), name


def test_binary_label_maps_of_drawing_tools(tmp_path, capsys):
    """0 and 255: useless as they are, and one line says so; with --label_values they are learnt,
    and predicted label maps have these numbers again."""
    rng = np.random.default_rng(0)

    def draw():
        labels = np.full((40, 40), 255, np.uint8)
        labels[:, : rng.integers(10, 30)] = 0
        return Image.fromarray(np.where(labels, 200, 30).astype(np.uint8)), Image.fromarray(labels)

    make_mapped(tmp_path, draw)
    words = [f"--data={tmp_path}", "--num_classes=2"]
    check_errors(capsys, [*TOY_SEG, *words, f"--out={tmp_path}/out"], (
        ("", "0 of --num_classes=2 occur in its label maps, which hold"),
        ("--ignore_zero=false", "1 of --num_classes=2 occur"),
        ("--num_classes=1", "--num_classes=2 --label_values=0,255"),
        ("--label_values=0", "give --num_classes=2 different numbers"),
        ("--label_values=0,all", "give --num_classes=2 different numbers"),
    ), script=finetune_seg)
    lines = toy_seg(tmp_path / "out", *words, "--label_values=0,255", "--lr=1e-2", "--steps=30")
    assert lines[-1]["val_miou"] > 0.7
    assert "2 of 2 classes occur, 0.0% of the pixels are ignored" in capsys.readouterr().out
    finetune_seg.main([f"--weights={tmp_path}/out/checkpoint.pt", "--task=predict",
                       f"--data={tmp_path}/images/validation", f"--out={tmp_path}/predicted"])
    predicted = np.asarray(Image.open(tmp_path / "predicted" / "labels" / "0.png"))
    assert set(np.unique(predicted)) == {0, 255}


def test_training_crops_keep_image_and_labels_together(mapped):
    config = finetune_seg.Config(data=str(mapped), image_size=32, num_classes=3, distort=False)
    images = finetune_seg.open_segmented(config)[0]
    dataset = finetune_seg.LabelMapViews(images, config, train=True)
    sizes = set()
    for epoch in range(60):
        key = (epoch, epoch % 12, 1.0)
        image, labels = dataset[key]["images"], dataset[key]["labels"]
        assert image.shape == (3, 32, 32) and labels.shape == (32, 32)
        again = dataset[key]
        assert torch.equal(image, again["images"]) and torch.equal(labels, again["labels"])
        colors = image * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        valid = labels >= 0
        agree = (colors.argmax(0) == labels)[valid].float().mean()
        assert agree > 0.8, epoch  # its channel is the brightest, but for edges
        counts = torch.bincount(labels[valid])
        sizes.add((counts.max() / counts.sum()).item() <= 0.75)
    assert True in sizes
    other = finetune_seg.LabelMapViews(images, replace(config, distort=True), train=True)
    pairs = [(other[epoch, 0, 1.0], dataset[epoch, 0, 1.0]) for epoch in range(20)]
    assert sum(not torch.equal(a["images"], b["images"]) for a, b in pairs) > 12
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in pairs)


def test_held_out_images_fit_the_test_size():
    for size, expected in (((683, 512), [683, 512]), ((480, 360), [683, 512]),
                           ((360, 480), [512, 683]), ((100, 1000), [205, 2048])):
        assert finetune_seg.fit_size(size, 512) == expected
    assert finetune_seg.fit_size((512, 1024), 0.5 * 512) == [256, 512]


def test_segmentation_learns_evaluates_and_predicts(mapped, tmp_path):
    words = [f"--data={mapped}", "--steps=50", "--eval_every=25", "--batch_size=8", "--lr=3e-3"]
    lines = toy_seg(tmp_path / "run", *words, "--distort=false")
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[-1]["val_miou"] > 2 * lines[-1]["val_baseline_miou"]
    with Image.open(tmp_path / "run" / "predictions.png") as picture:
        assert picture.width > picture.height / 5 and picture.height > 300
    weights = f"--weights={tmp_path}/run/checkpoint.pt"
    # it needs no options but the files
    words = ["--num_workers=0", "--task=eval", weights, f"--data={mapped}"]
    alone = finetune_seg.main(words)
    done = python("finetune_seg.py", *words, "--batch_size=3", "--micro_batch=1", processes=3)
    found = re.search(r"5 images (val_miou.*)", done.stdout)[1]
    assert found == " ".join(f"{name} {value:.6g}" for name, value in alone.items())
    assert "label     IoU  accuracy" in done.stdout
    finetune_seg.main([weights, f"--data={mapped}/images/validation", "--task=predict",
                       f"--out={tmp_path}/predicted"])
    matrix, predicted = 0, tmp_path / "predicted"
    for number in range(5):  # the evaluation again, from the files
        folders = mapped / "annotations" / "validation", predicted / "labels", predicted / "overlay"
        truth, labels, overlay = (Image.open(folder / f"{number}.png") for folder in folders)
        assert labels.mode == "P" and labels.size == overlay.size == truth.size
        truth, labels = np.asarray(truth).astype(int), np.asarray(labels).astype(int)
        assert 1 <= labels.min() <= labels.max() <= 3
        pair = (truth * 4 + labels)[truth > 0]
        matrix = matrix + np.bincount(pair, minlength=16).reshape(4, 4)[1:, 1:]
    iou = matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())
    assert math.isclose(alone["val_miou"], iou.mean(), rel_tol=1e-4)
    more = finetune_seg.main([*TOY_SEG, "--task=eval", weights, f"--data={mapped}", "--flip",
                              "--scales=0.75,1,1.5"])
    assert abs(more["val_miou"] - iou.mean()) < 0.2
    assert toy_seg(tmp_path / "inter", f"--data={mapped}", weights)[-1]["step"] == 6


def test_accumulation_of_uneven_pixels_is_the_mean_over_all():
    objective = finetune_seg.Segmentation(parse(*TOY_SEG, script=finetune_seg))
    objective.eval()  # batch norm apart
    objective.model.forward = lambda images: [images * 2, images - 1]
    labels = torch.randint(-1, 3, (4, 8, 8))
    labels[0] = -1
    labels[1, :, :6] = -1
    batch = dict(images=torch.randn(4, 3, 8, 8), labels=labels)
    denominators = objective.denominators(batch)
    expected = 0
    for scale, shift, weight in ((2, 0, 1), (1, -1, 0.4)):
        x = batch["images"].double().numpy() * scale + shift
        picked = np.take_along_axis(x, labels.clamp(min=0).numpy()[:, None], 1)[:, 0]
        expected += weight * (np.log(np.exp(x).sum(1)) - picked)[labels.numpy() >= 0].mean()
    first, *parts = masking.micro_batches(batch, 1)
    for batches in ([batch], parts):
        loss = sum(objective(part, denominators, 0.0)[0].item() for part in batches)
        assert math.isclose(loss, expected, rel_tol=1e-5)
    assert objective(first, [0], 0.0)[0].item() == 0  # nothing to learn


def test_bad_input_of_segmentation_gets_one_line(mapped, tmp_path, capsys):
    def folder(name, *labels, ending="tif"):
        pictures = Image.new("RGB", (40, 40)), *labels
        return f"--data={make_mapped(tmp_path / name, lambda: pictures, ending=ending)}"

    grey = Image.fromarray(np.arange(1600).reshape(40, 40).astype(np.uint8) % 3)
    high = Image.fromarray(np.full((40, 40), 9, np.uint8))
    colors = Image.fromarray(np.random.default_rng(0).integers(0, 9, (40, 40, 3)).astype(np.uint8))
    save(ViT(ViTConfig(image_size=32, patch_size=8, dim=64, depth=4, heads=2)), tmp_path / "x.pt")
    broken = folder("broken", grey)
    for path in (tmp_path / "broken" / "images" / "training").iterdir():
        path.write_bytes(b"no image")
    check_errors(capsys, [*TOY_SEG, f"--out={tmp_path}/out", f"--data={mapped}"], (
        (f"--data={tmp_path}", "images/validation: no such folder"),
        (folder("missing"), "0.png: has no label map of its name"),
        (folder("size", grey.resize((30, 40))), "label map has 30x40 pixels, the image 40x40"),
        (folder("high", high), "label 9 is above 3, the last of --num_classes=3"),
        (folder("color", colors), "a label map has one channel of whole numbers"),
        (folder("floats", grey.convert("F")), "a label map has one channel of whole numbers"),
        (broken, ".png: cannot be read as an image"),
        (folder("jpeg", grey, ending="jpg"), "a JPEG; its compression makes up labels"),
        ("--patch_size=16 --image_size=40", "no multiple of patch_size"),
        (f"--data=/no --task=predict --weights={tmp_path}/x.pt", "no folder or tar with images"),
        "--micro_batch=0: give 1 or more", "--val_images=-1: give 0 or more",
        "--scales=nan: give numbers above 0", "--scales=1,big: give numbers above 0",
        "--task=eval: give --weights=FILE", "--scale_min=3.0: give more than 0 and at most",
        "--stride=0: with windows of", "--stride=40: with windows of",
    ), script=finetune_seg)


# ---- GPUs ----------------------------------------------------------------------------------------

CUDA = torch.device("cuda:0")


@pytest.fixture
def fake_gpu(monkeypatch):
    """A mode in which tensors have shapes, types and devices but no values: a GPU need not be there
    to see that all of them are in the right place."""
    mode = FakeTensorMode()

    def copy(device, tensor):
        with mode:
            return mode.from_tensor(tensor).to(device) if device.type == "cuda" else tensor

    for module in (masking, network, finetune_cls, finetune_seg):
        monkeypatch.setattr(module, "copy_to", copy)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    return mode


def step_on_fake_gpu(mode, objective, dataset, config):
    """A training step without its backward pass, which needs a driver."""
    batch = sample_batch(dataset, 4)
    inputs, denominators = objective.inputs(batch, CUDA), objective.denominators(batch)
    pretrain.parallelize(objective, config)  # for --checkpointing
    with mode:
        for part in objective.modules():
            for name, weight in part.named_parameters(recurse=False):
                moved = mode.from_tensor(weight).to(CUDA).detach()
                setattr(part, name, torch.nn.Parameter(moved, weight.requires_grad))
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, mode.from_tensor(buffer).to(CUDA))
        optimizer = pretrain.make_optimizer(objective, config)
        with pretrain.autocast(CUDA, torch.float16):
            loss, _ = objective(inputs, denominators, 0.5)
        assert loss.device == CUDA and loss.dtype == torch.float32 and loss.shape == ()
        for parameter in objective.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 3.0)
        optimizer.step()
        objective.after_step(0.5)


@pytest.mark.parametrize("words", [
    "", "--variant=released", "--checkpointing=true", "--predict=all --mask=random",
    "--task=tokenizer", "--tokenizer=dalle --patch_size=16", "--tokenizer=vqgan --patch_size=16",
    "--tokenizer=pixel:norm", "--tokenizer=pca --components=8", "--contrast=dino --local_crops=2",
    "--contrast=moco", "--contrast=simclr", "--contrast=dino --mim_weight=0",
])
def test_pretraining_steps_on_a_fake_gpu(words, fake_gpu):
    words = ["--prototypes=64", "--min_block=1", *words.split()]
    config = parse(*TOY, *words)
    kind = config.tokenizer.partition(":")[0]
    tokenizer = TOKENIZERS[kind].untrained(**vars(config)).requires_grad_(False)
    objective, views = make_objective(*words, tokenizer=tokenizer)
    step_on_fake_gpu(fake_gpu, objective, views, config)


@pytest.mark.parametrize("script", ["finetune_cls", "finetune_seg"])
def test_finetuning_steps_on_a_fake_gpu(script, mapped, fake_gpu):
    config = parse(*TOYS[script], script=SCRIPTS[script])
    if script == "finetune_cls":
        images = finetune_cls.open_labelled(config)[0]
        objective = finetune_cls.Classification(config, images)
        dataset = finetune_cls.LabelledViews(images, config, train=True)
    else:
        config.data = str(mapped)
        objective = finetune_seg.Segmentation(config)
        images = finetune_seg.open_segmented(config)[0]
        dataset = finetune_seg.LabelMapViews(images, config, train=True)
    step_on_fake_gpu(fake_gpu, objective, dataset, config)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("words", [
    "--dtype=float16", "--dtype=bfloat16", "--dtype=float32", "--dtype=bfloat16 --compile=true",
    "--dtype=float16 --checkpointing=true", "--dtype=bfloat16 --contrast=simclr",
])
def test_runs_on_a_gpu_resume_and_agree_with_the_cpu(words, tmp_path):
    words = [*words.split(), "--tokenizer=pixel", "--drop_path=0"]
    whole = toy(tmp_path / "gpu", *words)
    (tmp_path / "gpu" / "checkpoint.pt").unlink()  # resumes from previous.pt, of step 4
    resumed = toy(tmp_path / "gpu", *words)
    for a, b in zip(whole, resumed, strict=True):
        assert a["loss"] == b["loss"]
    on_cpu = toy(tmp_path / "cpu", *words, "--device=cpu", "--dtype=float32", "--compile=false")
    for a, b in zip(whole[:2], on_cpu):  # later a contrastive loss, of 8 images, drifts apart
        assert math.isclose(a["loss"], b["loss"], rel_tol=0.03), (a, b)


@needs_gpu
def test_a_step_that_does_not_log_never_waits_for_the_gpu():
    objective, views = make_objective("--tokenizer=pixel")
    objective.to(CUDA)
    optimizer = torch.optim.AdamW(objective.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cuda")
    batch = sample_batch(views, 4)
    for mode in ("default", "error"):  # the first step makes the states
        torch.cuda.set_sync_debug_mode(mode)
        try:
            inputs = objective.inputs(batch, CUDA)
            with pretrain.autocast(CUDA, torch.float16):
                loss, _ = objective(inputs, objective.denominators(batch), 0.5)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(objective.parameters(), 3.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- README --------------------------------------------------------------------------------------


COUNTS = {  # training images
    "shapes": 20_000, "shapes:800": 800, "ade20k": 20_210, "camvid": 80, "cifar10": 50_000,
    "cifar100": 50_000,
}


def readme_commands():
    """(script, its words) of each command in the README's shell blocks, as bash expands them; what
    they run is replaced by functions that print their words."""
    text = open(os.path.join(HERE, "README.md")).read()
    assert text.count("```") % 2 == 0
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    programs = ("python", "python3", "pip", "torchrun", "srun", "scontrol", "head", "grep", ".")
    shell = "".join(name + "() { printf '%s\\t' \"$@\"; echo; }\n" for name in programs)
    run = subprocess.run(["bash", "-c", "PATH=\n" + shell + "".join(blocks)],
                         capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run.stderr
    commands = []
    for line in run.stdout.splitlines():
        words = line.split("\t")[:-1]
        while words and words[0].removesuffix(".py") not in SCRIPTS:
            words.pop(0)
        if words:
            commands.append((words[0].removesuffix(".py"), words[1:]))
    return commands


def test_every_command_of_the_readme_is_understood():
    commands = readme_commands()
    assert len(commands) >= 12
    for name, words in commands:
        config = parse(*words, script=SCRIPTS[name])
        if config.task in ("mim", "tokenizer", "train", "probe"):
            count = COUNTS.get(config.data, 80 if "camvid" in config.data else 1_281_167)
            few = 8 * getattr(config, "labels_per_class", 0)
            pretrain.run_length(config, few or count)
            pretrain.vit_config(config)


def test_the_mask_in_the_readme_trains(tmp_path, monkeypatch):
    readme = open(os.path.join(HERE, "README.md")).read()
    example = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    monkeypatch.setitem(MASKS, "checkerboard", None)  # taken out again after the test
    exec(example, dict(vars(masking)))
    line = toy(tmp_path, "--mask=checkerboard", "--tokenizer=pixel", "--steps=2")[-1]
    assert line["step"] == 2 and math.isfinite(line["val_loss"])
    mask = views_of(pretrain.Config(**saved(tmp_path)["config"]), 32)[0, 0, 1.0]["mask"]
    assert mask.tolist() == [[(row + column) % 2 == 1 for column in range(8)] for row in range(8)]

