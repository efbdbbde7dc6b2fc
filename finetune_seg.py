"""Fine-tune BEiT on semantic segmentation with SETR-PUP (arXiv 2106.08254, section 3.2, table 14).

Without arguments it runs table 14: ViT-B from out/run/checkpoint.pt, 160,000 steps of 16 crops of
512 px of ADE20K. The paper reports 45.6 mIoU for it, 47.7 with intermediate fine-tuning; neither
has been measured with this code. `--data` holds images/{training,validation} and
annotations/{training,validation}.
    torchrun --nproc_per_node=8 finetune_seg.py --data=/path/to/ADEChallengeData2016
    python finetune_seg.py --preset=shapes  # minutes, after `pretrain.py --preset=shapes`
    python finetune_seg.py --task=eval --weights=out/ade20k/checkpoint.pt --scales=0.75,1 --flip
    python finetune_seg.py --task=predict --weights=out/ade20k/checkpoint.pt --data=photos
`--help` lists every option. A killed run resumes when its command is run again.

Read from the top: options, the objective, main. Windows, label maps and pictures follow. The loop
and all that it calls are pretrain.py's.
"""

import colorsys
import functools
import itertools
import math
import os
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from finetune_cls import confusion
from masking import (
    BadInput, copy_to, denormalize, derive_seed, evenly, fit_size, folder_images,
    local_shard, named_images, normalize, permutation, world_size,
)
from model import Segmenter, load_weights, write_atomically
from pretrain import (
    NETWORK, RUN_CHOICES, Free, Objective, RunConfig, as_trained, autocast, check_range, evaluate,
    fit, local_rank0_first, log, no_progress_bar, parse_args, run, setup_device, vit_config,
)

IGNORE = -1  # label of pixels that count neither in the loss nor in the evaluation

# ---- options; the comment behind a field is its text in --help -----------------------------------

@dataclass
class Config(RunConfig):
    data: Free[str] = "ade20k"  # folder in ADE20K's layout, or of any images to predict
    out: Free[str] = "out/ade20k"  # one folder per run
    weights: str = "out/run/checkpoint.pt"  # what to start from (README); none: from scratch
    image_size: int = 512  # side of crops and windows; short side of evaluated images
    epochs: float = 127  # passes over the data, if --steps=0
    steps: int = 160_000  # length of the run: ADE20K's 20,210 images are seen 127 times
    batch_size: int = 16  # images per step over ALL processes; batch norm wants 2 or more on each
    micro_batch: Free[int] = 16  # images or windows a process computes at once: batch norm's batch
    lr: float = 1e-3  # peak for the heads, less below them (layer_decay)
    min_lr: float = 0.0  # where the schedule ends
    schedule: str = "linear"  # how the lr falls after the warm-up
    warmup_epochs: float = 0.0  # linear warm-up, if --warmup_steps=0
    warmup_steps: int = 1500  # linear warm-up of the new heads and all below them
    clip_grad: float = 0.0  # largest gradient norm; 0: none, as table 14 names none
    eval_every: Free[int] = 16_000  # steps between evaluations with pictures, 0 for one at the end
    task: str = "train"  # see the top of the file
    num_classes: int = 150  # classes to tell apart; labels run from 1 to this (ignore_zero)
    ignore_zero: bool = True  # label 0 is "other" and ignored; false: it is the first class
    label_values: str = ""  # the classes' numbers in label maps, such as 0,255; empty: ignore_zero
    layer_decay: float = 0.65  # ratio of a layer's lr to the lr of the layer above; 1: no decay
    aux_weight: float = 0.4  # of each auxiliary head's loss (SETR); 0 leaves them untrained
    scale_min: float = 0.5  # least factor that a training image is resized by before its crop
    scale_max: float = 2.0  # largest such factor; nearer to 1 where objects keep their size
    most_of_crop: float = 0.75  # a crop with more than this of one class is drawn again; 1: never
    distort: bool = True  # brightness, contrast, saturation and hue; false where colors tell all
    stride: int = 341  # pixels from window to window in the evaluation: two thirds of 512
    scales: str = "1"  # sizes that --task=eval averages over; windows need 1, so less counts as 1
    flip: bool = False  # average over the mirrored image too: a bit better at twice the time
    val_images: int = 0  # held-out images an evaluation reads, 0: all; fewer for a quick look


CAMVID = dict(
    data="camvid", out="out/camvid", weights="none", num_classes=11, num_workers=2,
    threads=1, size="nano", image_size=128, patch_size=8, stride=85,
    steps=600, warmup_steps=50, batch_size=8, lr=2e-3, layer_decay=0.75,
    log_every=25, eval_every=300, save_every=200,
)
SHAPES = CAMVID | dict(
    data="shapes:800", out="out/shapes_seg", weights="out/shapes/checkpoint.pt",
    num_classes=9, ignore_zero=False, val_images=200, image_size=48, stride=32, drop_path=0.0,
    steps=80, warmup_steps=20, batch_size=32, micro_batch=32, lr=1e-2, clip_grad=1.0,
    log_every=20, eval_every=40, most_of_crop=1.0, scale_min=1.0, scale_max=1.0,
)
PRESETS = {"ade20k": dict(), "camvid": CAMVID, "shapes": SHAPES}

# ---- the objective -------------------------------------------------------------------------------

class Segmentation(Objective):
    """Cross entropy of SETR-PUP's head and auxiliary heads, a mean over the pixels of the global
    batch that are not ignored. With `trained` the weights have heads, to be evaluated."""

    picture_file = "predictions.png"
    one_by_one = True

    def __init__(self, config, trained=False):
        super().__init__()
        self.config = config
        self.model = Segmenter(vit_config(config, shared=False), config.num_classes)
        if config.weights != "none":
            log(load_weights(self.model, config.weights, head=trained))

    def inputs(self, batch, device):
        return {name: copy_to(device, batch[name]) for name in ("images", "labels")}

    def denominators(self, batch):
        return [int((batch["labels"] != IGNORE).sum())]

    def forward(self, inputs, denominators, progress):
        """This batch's share of the mean; `labels` are (B, H, W) int64."""
        labels = inputs["labels"]
        losses = [F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")
                  for logits in self.model(inputs["images"])]  # (B, classes, H, W) each
        loss = losses[0] + self.config.aux_weight * sum(losses[1:])
        return loss / max(1, denominators[0]), {}  # a batch may have nothing to learn

    def eval_sums(self, inputs, progress):
        labels = inputs["labels"]
        found = predict_labels(self.model, inputs["images"], labels.shape[1:], self.config)
        return {"confusion": confusion(labels, found, self.config.num_classes)}

    def finish(self, sums, denominators):
        return scores(sums["confusion"])

    def table(self, metrics):
        rows = zip(class_labels(self.config), 100 * metrics["iou"], 100 * metrics["accuracy"])
        lines = ["{:>5}  {:5.1f}%    {:5.1f}%".format(*row) for row in rows]
        return "\n".join(["label     IoU  accuracy", *lines])

    @torch.no_grad()
    def pictures(self, dataset, device, dtype):
        """Held-out images, their labels and the prediction."""
        columns = {"image": [], "truth": [], "prediction": []}
        for index in evenly(len(dataset), 8):
            sample = dataset[0, index, 1.0]
            image = sample["images"][None].to(device)
            labels = sample["labels"]
            with autocast(device, dtype):
                found = predict_labels(self.model, image, labels.shape, self.config)[0]
            columns["image"].append(denormalize(image, self.config.norm).cpu())
            columns["truth"].append(color(labels, self.config.num_classes)[None])
            columns["prediction"].append(color(found, self.config.num_classes)[None])
        size = columns["image"][0].shape[2:]  # all rows at the size of the first image
        return {title: torch.cat([F.interpolate(picture, size) for picture in pictures])
                for title, pictures in columns.items()}


def train(config):
    """One run. Returns whether it is done."""
    config = as_trained(config)
    device, dtype = setup_device(config)
    train_images, val_images = local_rank0_first(open_segmented, config)
    count_labels(train_images, config)
    torch.manual_seed(config.seed)
    objective = Segmentation(config).to(device)
    if dist.is_initialized() and device.type == "cuda":  # on the CPU each has its own statistics
        objective = torch.nn.SyncBatchNorm.convert_sync_batchnorm(objective)
    dataset = LabelMapViews(train_images, config, train=True)
    val_dataset = LabelMapViews(val_images, config, train=False)
    return fit(objective, dataset, val_dataset, config, device, dtype)


def evaluate_weights(config):
    """--task=eval: the scores of --weights on the held-out images."""
    device, dtype = setup_device(config)
    images = local_rank0_first(open_segmented, config)[1]
    count_labels(images, config)
    objective = Segmentation(config, trained=True).to(device)
    dataset = LabelMapViews(images, config, train=False)
    metrics = evaluate(objective, dataset, config, device, dtype)
    log(f"{len(dataset):,} images", *(f"{name} {value:.6g}" for name, value in metrics.items()))
    return metrics


def main(argv=None):
    config = parse_args(Config, PRESETS, {**RUN_CHOICES, "task": TASKS}, argv, __doc__)
    if TASKS[config.task] is not train:  # the weights know how a run read label maps and images
        names = ("num_classes", "ignore_zero", "label_values", "stride")
        config = as_trained(config, *NETWORK, *names)
    check(config)
    return TASKS[config.task](config)


# ==== A first reading can stop here: above is all of fine-tuning ==================================

# ---- scores and windows --------------------------------------------------------------------------

def check(config):
    """Raise BadInput for values that would leave pixels out, wait for ever, or fail late."""
    parse_scales(config)
    class_labels(config)
    check_range(config, 0, math.inf, "aux_weight")
    check_range(config, 0, 1, "most_of_crop")
    if not 0 < config.stride <= config.image_size:
        raise BadInput(f"--stride={config.stride}: with windows of --image_size="
                       f"{config.image_size}, give 1 to {config.image_size}")
    if not 0 < config.scale_min <= config.scale_max:
        raise BadInput(f"--scale_min={config.scale_min}: give more than 0 and at most "
                       f"--scale_max={config.scale_max}")
    if world_size() > 1 and config.batch_size % world_size():  # SyncBatchNorm would wait for ever
        raise BadInput(f"--batch_size={config.batch_size}: batch norm wants the same number on "
                       f"each of {world_size()} processes; give a multiple of it")


@torch.no_grad()
def sliding_window(network, image, window, stride, batch=16):
    """Logits (1, classes, H, W) of an image (1, 3, H, W), no side below `window`: `network` sees
    windows of `window` pixels every `stride` and at the border, `batch` at a time. Overlaps are
    averaged."""
    sides = image.shape[2:]
    starts = [[*range(0, side - window, stride), side - window] for side in sides]
    places = list(itertools.product(*starts))
    total = 0
    count = torch.zeros(sides, device=image.device)
    for first in range(0, len(places), batch):
        some = places[first : first + batch]
        crops = [image[0, :, y : y + window, x : x + window] for y, x in some]
        for (y, x), logits in zip(some, network(torch.stack(crops)).float(), strict=True):
            if not torch.is_tensor(total):
                total = logits.new_zeros(1, len(logits), *sides)
            total[0, :, y : y + window, x : x + window] += logits
            count[y : y + window, x : x + window] += 1
    return total / count


def predict_labels(model, image, size, config):
    """The class of each pixel, (1, *size) int64, of a normalized image (1, 3, H, W): probabilities
    of all --scales, mirrored too with --flip, are averaged at the image's original `size`. As in
    SETR an image is enlarged until no side is below the window."""
    found = []  # logits of each view, at its own size
    for scale in parse_scales(config):
        scale = max(scale, config.image_size / min(image.shape[2:]))
        sides = [max(config.image_size, round(scale * side)) for side in image.shape[2:]]
        scaled = image if scale == 1 else F.interpolate(image, sides, mode="bilinear")
        for mirrored in (False, True) if config.flip else (False,):
            view = scaled.flip(3) if mirrored else scaled
            logits = sliding_window(model, view, config.image_size, config.stride,
                                    config.micro_batch)
            found.append(logits.flip(3) if mirrored else logits)
    # in bands of rows: all classes of a whole photograph would take gigabytes
    bands = torch.arange(size[0], device=image.device).split(max(1, 2**16 // size[1]))
    return torch.cat([sum(resize_rows(logits, rows, size).softmax(dim=1) for logits in found)
                      .argmax(dim=1) for rows in bands], dim=1)


def resize_rows(logits, rows, size):
    """These `rows` of F.interpolate(logits, size, mode="bilinear"), (1, classes, rows, width)."""
    last = logits.shape[2] - 1
    places = ((rows + 0.5) * ((last + 1) / size[0]) - 0.5).clamp(0, last)
    above = places.floor().long()
    below = (above + 1).clamp(max=last)
    share = (places - above)[:, None].to(logits.dtype)
    band = torch.lerp(logits[:, :, above], logits[:, :, below], share)
    return F.interpolate(band, (len(rows), size[1]), mode="bilinear")


def parse_scales(config):
    try:
        scales = [float(word) for word in config.scales.split(",")]
    except ValueError:
        scales = []
    if not scales or not all(0 < scale < math.inf for scale in scales):
        raise BadInput(f"--scales={config.scales}: give numbers above 0, such as 0.75,1,1.25")
    return scales


def scores(matrix):
    """A confusion matrix -> metrics, and the `iou` and `accuracy` of each class: nan if it has no
    pixel, and the means leave it out. `baseline_miou`: all is called the most frequent class."""
    matrix = np.asarray(matrix, dtype=np.float64)
    correct = matrix.diagonal()
    truth = matrix.sum(axis=1)
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan
        iou = correct / (truth + matrix.sum(axis=0) - correct)
        accuracy = correct / truth
        pixels = truth.sum()
        return {
            "miou": np.nanmean(iou) if pixels else 0.0,
            "mean_accuracy": np.nanmean(accuracy) if pixels else 0.0,
            "pixel_accuracy": correct.sum() / pixels,
            "baseline_miou": truth.max() / pixels / (truth > 0).sum(),
            "iou": iou,
            "accuracy": accuracy,
        }


# ---- images and label maps -----------------------------------------------------------------------

def open_segmented(config):
    """(training, held-out) Images with label maps of --data: a name in DATASETS, or a folder."""
    if named := named_images(config.data, config.image_size):
        train, val = named
        if train.read_label_map is None:
            raise BadInput(f"--data={config.data}: has no label maps to learn segmentation from")
    else:
        colors = {}  # of the numbers in label maps with palettes
        val = open_folder(config.data, "validation", colors)
        train = open_folder(config.data, "training", colors, without=val.keys)
    return train, val.split(config.val_images or len(val))[0]


def open_folder(data, part, colors, without=()):
    """The images of one part of a folder in ADE20K's layout, with the label maps of their names."""
    folder = os.path.join(data, "images", part)
    maps_folder = os.path.join(data, "annotations", part)
    images = folder_images(folder, without)
    if not len(images):
        raise BadInput(f"{folder}: no such folder, or no images in it; --data holds images/ and "
                       "annotations/, each with training/ and validation/")
    maps = folder_images(maps_folder)
    by_stem = dict(zip(maps.stems(), maps.keys))
    label_maps = {path: by_stem.get(stem) for path, stem in zip(images.keys, images.stems())}
    for path, label_map in label_maps.items():
        if label_map is None:
            name = f"{os.sep}{os.path.splitext(os.path.basename(path))[0]}."
            same = ", ".join(other for other in [*images.keys, *maps.keys] if name in other)
            raise BadInput(f"{path}: has no label map of its name for itself; there are {same}")
    return replace(images, read_label_map=functools.partial(read_label_map, label_maps, colors))


def read_label_map(label_maps, colors, path):
    """The label map of the image at a path, seen upright. It is turned like the image if it has the
    size of the image's stored pixels, before EXIF's quarter turn. `colors`: see read_labels."""
    labels = read_labels(label_maps[path], colors)
    with Image.open(path) as image:
        width, height = image.size
        turn = image.getexif().get(ExifTags.Base.Orientation, 1) if "exif" in image.info else 1
    if turn >= 5 and width != height and labels.shape == (height, width):  # the quarter turns
        stored = Image.fromarray(labels.astype(np.int32))
        stored.getexif()[ExifTags.Base.Orientation] = turn
        labels = np.asarray(ImageOps.exif_transpose(stored)).astype(np.int64)
    return labels


def read_labels(path, colors):
    """The numbers in a label map of 8, 16 or 32 bits or with a palette, (height, width) int64. In
    all palettes they are to have the same `colors`, a dict that grows; in a gray one their own."""
    try:
        with Image.open(path) as image:
            lossy = image.format == "JPEG"
            image = ImageOps.exif_transpose(image)
            if image.mode in ("LA", "PA", "RGBA"):  # what is transparent has a label too
                image = image.convert(image.mode[:-1])
            labels = np.asarray(image)
            palette = image.getpalette() if image.mode == "P" else []
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and others
        raise BadInput(f"{path}: cannot be read as a label map ({error})") from error
    if lossy:
        raise BadInput(f"{path}: a JPEG; its compression makes up labels. Save label maps as PNG")
    if labels.ndim == 3 and (labels == labels[..., :1]).all():
        labels = labels[..., 0]  # gray, saved as a color image
    if labels.ndim != 2 or labels.dtype.kind == "f" or labels.min() < 0:
        raise BadInput(f"{path}: a label map has one channel of whole numbers, those of the "
                       "classes; this holds colors or other numbers")
    palette = np.reshape(palette, (-1, 3))
    gray = (palette == palette[:, :1]).all()  # of a map that a program made smaller
    for number in np.unique(labels[labels < len(palette)]).tolist():
        color = tuple(palette[number].tolist())
        wanted = (number,) * 3 if gray else colors.setdefault(number, color)
        if color != wanted:
            raise BadInput(f"{path}: {number} has the color {color} in its palette, not {wanted}; "
                           "save all label maps in gray or with one palette")
    return labels.astype(np.int64)


def class_labels(config):
    """(num_classes,) int64: the number of each class in the label maps."""
    if config.num_classes < 2:
        raise BadInput(f"--num_classes={config.num_classes}: give 2 or more, as the background is "
                       "a class too: --num_classes=2 --label_values=0,255 for the values 0 and 255")
    numbers = range(int(config.ignore_zero), config.num_classes + int(config.ignore_zero))
    if config.label_values:
        numbers = [int(word) if word.strip().isdecimal() else -1
                   for word in config.label_values.split(",")]
        if min(numbers) < 0 or len(set(numbers)) != config.num_classes:
            raise BadInput(f"--label_values={config.label_values}: give --num_classes="
                           f"{config.num_classes} different numbers, such as 0,255")
    return np.array(numbers)


def classes_of(labels, config, name):
    """Labels as they are in a file -> the numbers of classes, from 0, or IGNORE: for 255 unless it
    is a class, and for all that --label_values does not list. Raises BadInput for other labels."""
    numbers = class_labels(config)
    wrong = (labels > numbers.max()) & (labels != 255)
    if not config.label_values and wrong.any():
        raise BadInput(f"{name}: label {labels[wrong].max()} is above {numbers.max()}, the last of "
                       f"--num_classes={config.num_classes}; see --ignore_zero and --label_values")
    table = np.full(1 + max(255, *numbers, labels.max()), IGNORE)
    table[numbers] = np.arange(len(numbers))
    return table[labels]


def count_labels(images, config):
    """Log which labels occur in 50 of the label maps, and how much is ignored. Raises BadInput if
    there are no two classes: then all others are read too, as one may be rare."""
    numbers = set(class_labels(config).tolist())
    pixels = Counter()  # of each label
    for number, index in enumerate(permutation(len(images), 0, 0)):
        if number >= 50 and len(numbers & pixels.keys()) > 1:
            break
        found = images.load(index, config.skip_bad_images)[1]
        labels = images.read_label_map(images.keys[found])
        classes_of(labels, config, images.name(found))  # raises BadInput if they are none
        pixels.update(labels.flatten().tolist())
    seen = numbers & pixels.keys()
    share = 100 / pixels.total()
    ignored = 100 - share * sum(pixels[label] for label in seen)
    frequent = ", ".join(f"{k} ({share * count:.1f}%)" for k, count in pixels.most_common(10))
    log(f"labels: {len(seen)} of {config.num_classes} classes occur, {ignored:.1f}% of the "
        f"pixels are ignored; the most frequent labels are {frequent}")
    if len(seen) < 2:
        raise BadInput(f"--data={config.data}: {len(seen)} of --num_classes={config.num_classes} "
                       f"occur in its label maps, which hold {frequent}; give the classes' numbers "
                       "as in --num_classes=2 --label_values=0,255")


class LabelMapViews(Dataset):
    """dataset[epoch, index, progress] is a dict of `images` (3, H, W), normalized float32, `labels`
    (H, W) int64, the classes' numbers or IGNORE, and `skipped`. In training both are an augmented
    crop, a function of (seed, epoch, index). Held-out labels stay at the image's ORIGINAL size."""

    def __init__(self, images, config, train):
        self.images = images
        self.config = config
        self.train = train

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        epoch, index, _ = key
        image, found = self.images.load(index, self.config.skip_bad_images)
        name = self.images.name(found)
        labels = self.images.read_label_map(self.images.keys[found])
        labels = torch.from_numpy(classes_of(labels, self.config, name))
        if labels.shape != image.shape[1:]:
            raise BadInput(f"{name}: its label map has {labels.shape[1]}x{labels.shape[0]} pixels, "
                           f"the image {image.shape[2]}x{image.shape[1]}")
        if self.train:
            torch.default_generator.manual_seed(derive_seed(self.config.seed, epoch, index))
            image, labels = self.augment(image, labels)
        else:
            image = held_out_view(image, self.config)
        return {"images": image, "labels": labels, "skipped": found != index}

    def augment(self, image, labels):
        """SETR's training view, 512 px of table 14: an image and its labels resized, cropped,
        flipped and distorted."""
        config = self.config
        factor = torch.empty(()).uniform_(config.scale_min, config.scale_max).item()
        resize = v2.Resize(fit_size(labels.shape, factor * config.image_size))
        image, labels = resize(image, tv_tensors.Mask(labels))
        fill = {tv_tensors.Mask: IGNORE, "others": 0}
        crop = v2.RandomCrop(config.image_size, pad_if_needed=True, fill=fill)
        for _ in range(10):
            part, part_labels = crop(image, labels)
            counts = torch.bincount(part_labels[part_labels != IGNORE])
            if len(counts) and counts.max() <= config.most_of_crop * counts.sum():
                break
        part, part_labels = v2.RandomHorizontalFlip()(part, part_labels)
        if config.distort:  # mmsegmentation's ranges, but it adds to the brightness
            ranges = dict(brightness=0.125, contrast=0.5, saturation=0.5, hue=0.1)
            for name, strength in ranges.items():
                part = v2.RandomApply([v2.ColorJitter(**{name: strength})], p=0.5)(part)
        return normalize(part / 255, config.norm), part_labels.as_subclass(torch.Tensor)


def held_out_view(image, config):
    """An image as an evaluation sees it, (3, H, W): its short side is image_size, as in SETR."""
    image = v2.functional.resize(image, fit_size(image.shape[1:], config.image_size))
    return normalize(image / 255, config.norm)


# ---- pictures ------------------------------------------------------------------------------------

def palette(classes):
    """(classes, 3) uint8: steps by the golden ratio, so hues are far apart and never repeat."""
    hues = [(number * 0.618034 % 1, 1 - 0.35 * (number % 2), 1 - 0.3 * (number // 2 % 2))
            for number in range(classes)]
    return np.round([[255 * c for c in colorsys.hsv_to_rgb(*hue)] for hue in hues]).astype(np.uint8)


def color(labels, classes):
    """Labels (H, W) -> (3, H, W) in [0, 1]; IGNORE is black."""
    table = torch.cat([torch.from_numpy(palette(classes)), torch.zeros(1, 3, dtype=torch.uint8)])
    return table[labels.cpu()].permute(2, 0, 1) / 255  # IGNORE, -1, is the last row


@torch.no_grad()
def predict(config):
    """Write OUT/labels/NAME.png, with the numbers of a label map, and OUT/overlay/NAME.png for each
    image in --data, at its own size."""
    device, dtype = setup_device(config)
    images = folder_images(config.data, [config.out])
    if not len(images):
        raise BadInput(f"--data={config.data}: no folder or tar with images to predict")
    model = Segmentation(config, trained=True).to(device).eval().model
    numbers = class_labels(config)
    colors = np.zeros((1 + max(255, *numbers), 3), np.uint8)
    colors[numbers] = palette(config.num_classes)
    names = images.stems()
    for index in tqdm(local_shard(range(len(images))), "predicting", disable=no_progress_bar()):
        path = images.keys[index]
        image, found = images.load(index, config.skip_bad_images)
        if found != index:
            log(f"{path}: skipped, it cannot be read as an image")
            continue
        view = held_out_view(image, config)[None].to(device)
        with autocast(device, dtype):
            labels = predict_labels(model, view, image.shape[1:], config)[0]
        labels = numbers[labels.cpu().numpy()]
        picture = Image.fromarray(labels.astype(np.uint8 if labels.max() < 256 else np.uint16))
        if picture.mode == "L":  # 8 bits
            picture.putpalette(colors[:256].tobytes())
        photograph = v2.functional.to_pil_image(image)
        overlay = Image.blend(photograph, Image.fromarray(colors[labels]), 0.5)
        name = names[index] + ".png"
        for folder, drawn in (("labels", picture), ("overlay", overlay)):
            with write_atomically(os.path.join(config.out, folder, name)) as file:
                drawn.save(file, "PNG")
    log(f"wrote label maps and overlays into {config.out}")


TASKS = {"train": train, "eval": evaluate_weights, "predict": predict}

if __name__ == "__main__":
    run(main)
