"""Fine-tune BEiT on semantic segmentation with SETR-PUP (arXiv 2106.08254, section 3.2, table 14).

No arguments is the paper's recipe: ViT-B from out/run/checkpoint.pt, 160,000 steps of 16 crops of
512 px of ADE20K. The paper reports 45.6 mIoU for it, 47.7 with intermediate fine-tuning; neither
has been measured with this code. `--data` holds images/{training,validation} and
annotations/{training,validation}. On 8 GPUs, from pre-training or from a classifier:
    torchrun --nproc_per_node=8 finetune_seg.py --data=/path/to/ADEChallengeData2016
    torchrun --nproc_per_node=8 finetune_seg.py --weights=out/imagenet/checkpoint.pt --out=out/inter
In minutes on two CPU cores, after `python pretrain.py --preset=shapes`:
    python finetune_seg.py --preset=shapes
Evaluate at several scales, or segment any folder of images:
    python finetune_seg.py --task=eval --weights=out/ade20k/checkpoint.pt --scales=0.75,1 --flip
    python finetune_seg.py --task=predict --weights=out/ade20k/checkpoint.pt --data=photos
`--help` lists every option. Run a command again after it was killed, and it goes on where it was.

Read this file from the bottom: main, train, then the evaluation and the images. The command line,
checkpoints and logs are pretrain.py's; the loop is written out here, as in finetune_cls.py.
"""

import colorsys
import functools
import math
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from model import Segmenter, load_weights, write_atomically
from pretrain import (
    NORMS, Images, Log, RunConfig, all_sum, batch_of_step, draw_shapes, folder_images, loader, log,
    micro_batches, open_shapes, parse_args, prepare, rank, run, run_length, save_columns,
    setup_device, share, stream, vit_config, world_size,
)

IGNORE = -1  # label of pixels that count neither in the loss nor in the evaluation

# ---- the options; the comment behind a field is its text in --help -------------------------------


@dataclass
class Config(RunConfig):
    data: str = "ade20k"  # folder in ADE20K's layout, or of any images to predict; or shapes
    out: str = "out/ade20k"  # one folder a run: checkpoint.pt, metrics.jsonl, config.json, pictures
    weights: str = "out/run/checkpoint.pt"  # what to start from (README); none: from scratch
    image_size: int = 512  # side of the crops and windows; short side of images in the evaluation
    epochs: float = 127  # passes over the data, if --steps=0
    steps: int = 160_000  # length of the run; 20,210 images of ADE20K are seen 127 times
    batch_size: int = 16  # images a step over ALL processes; batch norm wants 2 or more on each
    micro_batch: int = 16  # images or windows a process computes at once; batch norm sees as many
    lr: float = 1e-3  # peak for the heads, less below them (layer_decay)
    min_lr: float = 0.0  # where the linear decay ends
    warmup_epochs: float = 0.0  # linear warm-up, if --warmup_steps=0
    warmup_steps: int = 1500  # linear warm-up of the new heads and all below them
    clip_grad: float = 0.0  # largest gradient norm, 0 for none, as in table 14
    eval_every: int = 16_000  # steps between evaluations with pictures, 0 for one at the end
    task: Literal["train", "eval", "predict"] = "train"  # see the top of the file
    num_classes: int = 150  # classes to tell apart; labels run from 1 to this (ignore_zero)
    ignore_zero: bool = True  # label 0 is "other" and not learnt; false: it is the first class
    layer_decay: float = 0.65  # a layer's lr over that above it; 1 lets fine-tuning forget more
    aux_weight: float = 0.4  # of each auxiliary head's loss (SETR); 0 leaves them untrained
    scale_min: float = 0.5  # least factor that a training image is resized by before its crop
    scale_max: float = 2.0  # largest such factor; nearer to 1 where objects keep their size
    most_of_crop: float = 0.75  # a crop with more than this of one class is drawn again; 1: never
    distort: bool = True  # brightness, contrast, saturation and hue; false where colours tell all
    stride: int = 341  # pixels from window to window in the evaluation: two thirds of 512
    scales: str = "1"  # sizes that --task=eval averages over: 0.5,0.75,1,1.25,1.5,1.75 for more
    flip: bool = False  # average over the mirrored image too: a bit better at twice the time
    val_images: int = 0  # held-out images an evaluation reads, 0: all; fewer for a quick look


TINY = dict(size="nano", patch_size=8, num_workers=2, log_every=25, save_every=200, lr=2e-3)
TINY |= dict(layer_decay=0.75)
PRESETS = {
    "ade20k": {},
    "camvid": dict(
        TINY, data="camvid", out="out/camvid", weights="none", num_classes=11, image_size=128,
        stride=85, steps=600, batch_size=8, warmup_steps=50, eval_every=300,
    ),
    "shapes": dict(
        TINY, data="shapes", out="out/shapes_seg", weights="out/shapes/checkpoint.pt",
        num_classes=9, ignore_zero=False, image_size=64, stride=43, steps=600, batch_size=32,
        warmup_steps=120, eval_every=300, val_images=200, most_of_crop=1.0, scale_min=0.75,
        **dict(scale_max=1.33, lr=3e-3, layer_decay=0.9, clip_grad=1.0),
    ),
}

# ---- images and label maps -----------------------------------------------------------------------


def open_pairs(config):
    """Training and held-out (images, label maps): Images whose label map has the same index."""
    if config.data == "shapes":
        pairs = [open_shapes_pairs(config.image_size, train) for train in (True, False)]
    else:
        pairs = [open_folder(config, part) for part in ("training", "validation")]
    pairs[1] = [part.split(config.val_images or len(part))[0] for part in pairs[1]]
    return pairs


def open_shapes_pairs(size, train):
    images, read = open_shapes(size, train), functools.partial(shapes_labels, size, int(train))
    return images, Images(images.keys, read, "shapes")


def shapes_labels(size, seed, index):
    return draw_shapes(size, seed, index)[2].astype(np.int64)


def open_folder(config, part):
    """The images and label maps of one part of a folder in ADE20K's layout, by their names."""
    folders = [os.path.join(config.data, kind, part) for kind in ("images", "annotations")]
    for folder in folders:
        if not os.path.isdir(folder):
            raise ValueError(f"{folder}: no such folder; --data holds images/ and annotations/, "
                             "each with training/ and validation/")
    images, maps = map(folder_images, folders)
    if not len(images):
        raise ValueError(f"{folders[0]}: there are no images")

    def stem(path, folder):
        return os.path.splitext(os.path.relpath(path, folder))[0]

    by_stem = {stem(path, folders[1]): path for path in maps.keys}
    lacking = [path for path in images.keys if stem(path, folders[0]) not in by_stem]
    if lacking:
        raise ValueError(f"{lacking[0]}: has no label map of its name in {folders[1]}")
    keys = [by_stem[stem(path, folders[0])] for path in images.keys]
    return images, Images(keys, read_labels, folders[1])


def read_labels(path):
    """The numbers in a label map of 8 or 16 bits or with a palette, (height, width) int64."""
    try:
        with Image.open(path) as image:
            labels = np.asarray(image)
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and others
        raise ValueError(f"{path}: cannot be read as a label map ({error})") from error
    if labels.ndim != 2:
        raise ValueError(f"{path}: a label map has one channel, not {labels.shape[2]} colours; "
                         "save the numbers of the classes")
    return labels.astype(np.int64)


def classes_of(labels, config, path, size):
    """Labels as they are in the file -> the numbers of classes, from 0, or IGNORE. 255 is ignored
    where no class has it. Raises ValueError if they do not fit the image or the classes."""
    if labels.shape != size:
        raise ValueError(f"{path}: a label map of {labels.shape[1]}x{labels.shape[0]} for an image "
                         f"of {size[1]}x{size[0]}")
    shift = int(config.ignore_zero)
    top = config.num_classes - 1 + shift
    labels = np.where((labels == 255) & (top < 255), shift + IGNORE, labels)
    if labels.max() > top:
        raise ValueError(f"{path}: label {labels.max()} is above {top}, the last of --num_classes="
                         f"{config.num_classes} with --ignore_zero={config.ignore_zero}")
    return labels - shift  # 0 becomes IGNORE, if it is to be ignored


class Pairs(Dataset):
    """dataset[epoch, index] is a dict of `images` (3, H, W), normalised float32, of `labels` (H, W)
    int64, the classes' numbers or IGNORE, and of `skipped`. In training both are an augmented crop
    of image_size, a function of (seed, epoch, index). Held-out images are resized so that their
    short side is image_size (table 14); their labels stay at the ORIGINAL size."""

    def __init__(self, images, maps, config, train):
        self.images, self.maps, self.config, self.train = images, maps, config, train
        self.finish = v2.Compose(
            [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)]
            + [v2.Normalize(*NORMS[config.norm])]
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        epoch, index = key
        image, found = self.images.load(index, self.config.skip_bad_images)
        image = tv_tensors.Image(v2.functional.pil_to_tensor(image))
        labels, size = None, tuple(image.shape[1:])
        if self.maps:
            labels = self.maps.read(self.maps.keys[found])
            labels = classes_of(labels, self.config, self.maps.name(found), size)
            labels = tv_tensors.Mask(torch.from_numpy(labels))
        if self.train:
            torch.default_generator.manual_seed(stream(self.config.seed, epoch, index))
            image, labels = self.finish(*self.augment(image, labels))
        else:
            image = self.finish(v2.Resize(fitted(size, self.config.image_size))(image))
        sample = {"images": image.as_subclass(torch.Tensor), "skipped": found != index}
        if labels is not None:
            sample["labels"] = labels.as_subclass(torch.Tensor)
        return sample

    def augment(self, image, labels):
        """Table 14's training view: resize, crop, flip and distort an image and its labels."""
        config, side = self.config, self.config.image_size
        factor = torch.empty(()).uniform_(config.scale_min, config.scale_max).item()
        image, labels = v2.Resize(fitted(image.shape[1:], side, factor))(image, labels)
        fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORE}
        crop = v2.RandomCrop(side, pad_if_needed=True, fill=fill)
        for _ in range(10):
            part, part_labels = crop(image, labels)
            counts = torch.bincount(part_labels[part_labels != IGNORE])
            if len(counts) and counts.max() <= config.most_of_crop * counts.sum():
                break
        part, part_labels = v2.RandomHorizontalFlip()(part, part_labels)
        for name, range_ in DISTORTIONS.items() if config.distort else ():
            part = v2.RandomApply([v2.ColorJitter(**{name: range_})], p=0.5)(part)
        return part, part_labels


DISTORTIONS = dict(brightness=0.125, contrast=0.5, saturation=0.5, hue=0.1)  # mmseg's ranges


def fitted(size, side, factor=1.0):
    """[height, width] of an image resized, with its aspect kept, to be as large as fits 4 * side by
    side, either way round, times a factor: its short side is `side`, unless it is very long."""
    short, long = min(size), max(size)
    scale = factor * min(4 * side / long, side / short)
    return [max(1, round(scale * length)) for length in size]


# ---- the objective -------------------------------------------------------------------------------


def check(config):
    """Raise ValueError for values that would leave pixels out, wait for ever, or fail late."""
    parse_scales(config)
    if not 0 < config.stride <= config.image_size:
        raise ValueError(f"--stride={config.stride}: with windows of --image_size="
                         f"{config.image_size}, give 1 to {config.image_size}")
    if not 0 < config.scale_min <= config.scale_max:
        raise ValueError(f"--scale_min={config.scale_min}: give more than 0 and at most "
                         f"--scale_max={config.scale_max}")
    if world_size() > 1 and config.batch_size % world_size():  # SyncBatchNorm waits for its peers
        raise ValueError(f"--batch_size={config.batch_size}: batch norm wants the same number on "
                         f"each of {world_size()} processes; give a multiple of it")


class Segmentation(nn.Module):
    """Cross entropy of the pixels, a mean over all that are not to be ignored."""

    def __init__(self, config):
        super().__init__()
        check(config)
        self.model = Segmenter(vit_config(config, shared=False), config.num_classes)
        self.aux_weight = config.aux_weight
        if config.weights != "none":
            log(load_weights(self.model, config.weights, head=config.task != "train"))
        elif config.task != "train":
            raise ValueError(f"--task={config.task}: give --weights=FILE, a checkpoint.pt")

    def weight(self, batch):
        return int((batch["labels"] != IGNORE).sum())

    def forward(self, batch):
        """The loss of `images` (B, 3, H, W) and `labels` (B, H, W)."""
        labels = batch["labels"]
        pixels = (labels != IGNORE).sum().clamp(min=1)  # a crop may have nothing to learn
        losses = [F.cross_entropy(x.float(), labels, ignore_index=IGNORE, reduction="sum") / pixels
                  for x in self.model(batch["images"])]
        return losses[0] + self.aux_weight * sum(losses[1:])


def linear(step, steps, warmup, peak, end):
    """Linear warm-up to `peak` over `warmup` steps, then a line to `end` after the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return end + (peak - end) * (steps - step) / (steps - warmup)


# ---- evaluation ----------------------------------------------------------------------------------


@torch.no_grad()
def slide(network, image, window, stride, batch=16):
    """Logits (1, classes, H, W) of an image (1, 3, H, W) of any size: `network` sees windows of
    `window` pixels every `stride`, the last ones at the border, `batch` at a time; where they
    overlap, logits are averaged. An image smaller than the window is padded for it."""
    height, width = image.shape[2:]
    padded = F.pad(image, (0, max(0, window - width), 0, max(0, window - height)))
    starts = [
        [min(k * stride, length - window) for k in range(-(-(length - window) // stride) + 1)]
        for length in padded.shape[2:]
    ]
    places = [(y, x) for y in starts[0] for x in starts[1]]
    total, count = 0, torch.zeros(padded.shape[2:], device=image.device)
    for first in range(0, len(places), batch):
        some = places[first : first + batch]
        crops = [padded[0, :, y : y + window, x : x + window] for y, x in some]
        for (y, x), logits in zip(some, network(torch.stack(crops)).float(), strict=True):
            if not torch.is_tensor(total):
                total = logits.new_zeros(1, len(logits), *padded.shape[2:])
            total[0, :, y : y + window, x : x + window] += logits
            count[y : y + window, x : x + window] += 1
    return (total / count)[:, :, :height, :width]


def predict_labels(model, image, size, config, dtype):
    """The class of each pixel, (1, *size) int64, of a normalised image (1, 3, H, W): probabilities
    of all --scales, mirrored too with --flip, are averaged at the image's original `size`."""
    total = 0
    for scale in parse_scales(config):
        sides = [max(1, round(scale * side)) for side in image.shape[2:]]
        scaled = image if scale == 1 else F.interpolate(image, sides, mode="bilinear")
        for mirrored in (False, True) if config.flip else (False,):
            view = scaled.flip(3) if mirrored else scaled
            with torch.autocast(image.device.type, dtype, enabled=dtype != torch.float32):
                logits = slide(model, view, config.image_size, config.stride, config.micro_batch)
            logits = logits.flip(3) if mirrored else logits
            logits = F.interpolate(logits, size, mode="bilinear")
            total = total + logits.softmax(dim=1)
    return total.argmax(dim=1)


def parse_scales(config):
    try:
        scales = [float(word) for word in config.scales.split(",")]
    except ValueError:
        scales = []
    if not scales or min(scales) <= 0:
        raise ValueError(f"--scales={config.scales}: give numbers above 0, such as 0.75,1,1.25")
    return scales


def confusion(truth, predicted, classes):
    """(classes, classes) int64: how many pixels of each class, a row, were taken for each."""
    valid = truth != IGNORE
    pairs = truth[valid] * classes + predicted[valid]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def scores(matrix):
    """A confusion matrix over a whole set -> (metrics, IoU of each class, accuracy of each). The
    means leave out classes without a pixel; in the table they are nan. `baseline_miou` is what
    calling everything the most frequent class gives."""
    matrix = np.asarray(matrix, dtype=np.float64)
    right, truth, predicted = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
    union = truth + predicted - right
    iou = np.divide(right, union, out=np.full(len(right), np.nan), where=union > 0)
    accuracy = np.divide(right, truth, out=np.full(len(right), np.nan), where=truth > 0)
    pixels = truth.sum()
    if pixels == 0:
        return dict(miou=0.0, mean_accuracy=0.0, pixel_accuracy=0.0), iou, accuracy
    means = dict(miou=np.nanmean(iou), mean_accuracy=np.nanmean(accuracy))
    means["pixel_accuracy"] = right.sum() / pixels
    means["baseline_miou"] = truth.max() / pixels / (truth > 0).sum()
    return means, iou, accuracy


@torch.no_grad()
def evaluate(objective, dataset, config, device, dtype):
    """(metrics over all held-out images, each counted once, as val_*; lines of a table)."""
    objective.eval()
    keys, classes = share([(0, index) for index in range(len(dataset))]), config.num_classes
    batches = loader(dataset, [[key] for key in keys], config.num_workers, device)
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    hidden = rank() > 0 or not sys.stderr.isatty()
    for batch in tqdm(batches, "evaluating", total=len(keys), disable=hidden, leave=False):
        image, labels = batch["images"].to(device), batch["labels"].to(device)
        predicted = predict_labels(objective.model, image, labels.shape[1:], config, dtype)
        matrix += confusion(labels, predicted, classes).cpu()
    objective.train()
    means, iou, accuracy = scores(np.reshape(all_sum(*matrix.flatten().tolist()), matrix.shape))
    table = ["label     IoU  accuracy"]
    for number, row in enumerate(zip(100 * iou, 100 * accuracy), int(config.ignore_zero)):
        table.append(f"{number:>5}  {row[0]:5.1f}%    {row[1]:5.1f}%")
    return {f"val_{name}": float(value) for name, value in means.items()}, table


# ---- pictures ------------------------------------------------------------------------------------


def palette(classes):
    """(classes, 3) uint8: colours that are far apart for neighbouring numbers."""
    golden = 0.618034  # turns of the hue that never come back to where they were
    hues = [(number * golden % 1, 1 - 0.35 * (number % 2), 1 - 0.3 * (number // 2 % 2))
            for number in range(classes)]
    return np.round([[255 * c for c in colorsys.hsv_to_rgb(*hue)] for hue in hues]).astype(np.uint8)


def colour(labels, classes):
    """Labels (H, W) -> (3, H, W) in [0, 1]; IGNORE is black."""
    table = torch.cat([torch.from_numpy(palette(classes)), torch.zeros(1, 3, dtype=torch.uint8)])
    return table[labels.cpu()].permute(2, 0, 1) / 255  # IGNORE, -1, is the last row


def shown(image, config):
    """A normalised image (1, 3, H, W) -> (3, H, W) in [0, 1]."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in NORMS[config.norm])
    return (image[0].cpu() * std + mean).clamp(0, 1)


@torch.no_grad()
def draw_predictions(objective, dataset, config, device, dtype):
    """OUT/predictions.png: held-out images, their labels and the prediction, side by side."""
    objective.eval()
    rows, count = [], min(8, len(dataset))
    for index in np.linspace(0, len(dataset) - 1, count).astype(int).tolist():
        sample = dataset[0, index]
        image, labels = sample["images"][None].to(device), sample["labels"]
        found = predict_labels(objective.model, image, labels.shape, config, dtype)[0]
        maps = [colour(x, config.num_classes) for x in (labels, found)]
        rows.append([shown(image, config), *maps])
    objective.train()
    size = rows[0][0].shape[1:]  # all rows at the size of the first image
    columns = [torch.stack([F.interpolate(x[None], size)[0] for x in c]) for c in zip(*rows)]
    titles = ("image", "truth", "prediction")
    save_columns(os.path.join(config.out, "predictions.png"), dict(zip(titles, columns)))


@torch.no_grad()
def predict(config):
    """Write OUT/labels/NAME.png, the numbers that a label map would have, and OUT/overlay/NAME.png
    for each image in --data, at its own size."""
    device, dtype = setup_device(config)
    if not os.path.isdir(config.data) or not len(images := folder_images(config.data)):
        raise ValueError(f"--data={config.data}: no folder with images to predict")
    model = Segmentation(config).to(device).eval().model
    dataset = Pairs(images, None, config, train=False)
    first = int(config.ignore_zero)
    colours = np.concatenate([np.zeros((first, 3), np.uint8), palette(config.num_classes)])
    keys = share([(0, index) for index in range(len(images))])
    batches = loader(dataset, [[key] for key in keys], config.num_workers, device)
    for (_, index), batch in zip(tqdm(keys, disable=not sys.stderr.isatty()), batches, strict=True):
        if batch["skipped"].any():
            log(f"{images.keys[index]}: skipped, it cannot be read as an image")
            continue
        image = images.load(index)[0]
        size = image.size[::-1]
        labels = predict_labels(model, batch["images"].to(device), size, config, dtype)[0]
        labels = labels.cpu().numpy() + first
        if labels.max() < 256:
            picture = Image.fromarray(labels.astype(np.uint8))
            picture.putpalette(colours[:256].tobytes())
        else:
            picture = Image.fromarray(labels.astype(np.uint16))
        overlay = Image.blend(image, Image.fromarray(colours[labels]), 0.5)
        name = os.path.splitext(os.path.relpath(images.keys[index], config.data))[0] + ".png"
        for folder, file_ in (("labels", picture), ("overlay", overlay)):
            path = os.path.join(config.out, folder, name)
            write_atomically(path, lambda file, file_=file_: file_.save(file, "PNG"))
    log(f"wrote label maps and overlays into {config.out}")


# ---- training ------------------------------------------------------------------------------------


def train(config):
    """One run, from its checkpoint if there is one."""
    device, dtype = setup_device(config)
    train_pair, val_pair = open_pairs(config)
    torch.manual_seed(config.seed)
    objective = Segmentation(config).to(device)
    dataset = Pairs(*train_pair, config, train=True)
    val_dataset = Pairs(*val_pair, config, train=False)
    if config.task == "eval":
        line, table = evaluate(objective, val_dataset, config, device, dtype)
        log("\n".join(table))
        log(f"{len(val_dataset):,} images", *(f"{k} {v:.6g}" for k, v in line.items()))
        return line
    steps, per_epoch, warmup = run_length(config, len(dataset))
    if world_size() > 1 and device.type == "cuda":  # on the CPU each process has its own statistics
        objective = nn.SyncBatchNorm.convert_sync_batchnorm(objective)
    made = prepare(objective, config, device, dtype, config.layer_decay)
    model, optimizer, scaler, save, start = made
    log(f"{config.task} into {config.out}: step {start} of {steps}, {per_epoch} an epoch, warm-up "
        f"{warmup}; {len(dataset):,} images, {len(val_dataset):,} held out")
    if start == steps:
        return None

    batches = (share(batch_of_step(s, len(dataset), config)) for s in range(start, steps))
    batches = loader(dataset, batches, config.num_workers, device)
    output = Log(config, train_pair[0], start, steps, per_epoch)

    for step, batch in enumerate(batches, start):
        weight, stop = all_sum(objective.weight(batch), output.stop)
        if stop:
            break
        lr = linear(step, steps, warmup, config.lr, config.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        torch.manual_seed(stream(config.seed, step, rank()))  # for stochastic depth
        total, parts = 0, list(micro_batches(batch, config.micro_batch))
        for number, part in enumerate(parts, 1):
            part_share = objective.weight(part) / max(1, weight)
            sync = number == len(parts) or world_size() == 1
            moved = {k: part[k].to(device, non_blocking=True) for k in ("images", "labels")}
            with nullcontext() if sync else model.no_sync():
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss = model(moved)
                # DDP takes the mean over the processes; the loss is the mean over the whole batch
                scaler.scale(loss * part_share * world_size()).backward()
            total = total + part_share * loss.detach()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        row = {"loss": total, "grad_norm": norm / world_size()}
        to_log, to_evaluate, to_save = output.add(row, batch)
        if not (to_log or to_evaluate or to_save):
            continue
        line = output.read(lr)
        if to_evaluate:
            values, table = evaluate(objective, val_dataset, config, device, dtype)
            line |= values
            if rank() == 0:
                draw_predictions(objective, val_dataset, config, device, dtype)
        output.write(line)
        if to_save:
            save(output.done)
    if output.close(save):
        log("\n".join(table))


TASKS = {"train": train, "eval": train, "predict": predict}


def main(argv=None):
    config = parse_args(Config, PRESETS, argv, __doc__)
    return TASKS[config.task](config)


if __name__ == "__main__":
    run(main)
