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

Read from the top: options, the objective, the loop, evaluation, main. Label maps, windows and
pictures follow. The command line, checkpoints and logs are pretrain.py's.
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
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch import nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from finetune_cls import confusion, to_device
from masking import (
    BadInput, batches_of_all, batches_of_steps, denormalise, derive_seed, folder_images,
    local_shard, make_loader, micro_batches, named_images, normalise, permutation, rank,
    world_size,
)
from model import Segmenter, load_weights, write_atomically
from pretrain import (
    RUN_CHOICES, Logger, RunConfig, all_reduce_sum, as_trained, autocast, check_range,
    learning_rate, local_rank0_first, log, measure_speed, no_progress_bar, parse_args, prepare, run,
    run_length, save_columns, setup_device, vit_config,
)

IGNORE = -1  # label of pixels that count neither in the loss nor in the evaluation
ORIENTATION = ExifTags.Base.Orientation  # how a photograph is turned, from 1 to 8

# ---- options; the comment behind a field is its text in --help -----------------------------------


@dataclass
class Config(RunConfig):
    data: str = "ade20k"  # folder in ADE20K's layout, or of any images to predict
    out: str = "out/ade20k"  # one folder per run
    weights: str = "out/run/checkpoint.pt"  # what to start from (README); none: from scratch
    image_size: int = 512  # side of crops and windows; short side of evaluated images
    epochs: float = 127  # passes over the data, if --steps=0
    steps: int = 160_000  # length of the run: ADE20K's 20,210 images are seen 127 times
    batch_size: int = 16  # images per step over ALL processes; batch norm wants 2 or more on each
    micro_batch: int = 16  # images or windows a process computes at once; batch norm sees as many
    lr: float = 1e-3  # peak for the heads, less below them (layer_decay)
    min_lr: float = 0.0  # where the schedule ends
    schedule: str = "linear"  # how the lr falls after the warm-up, as in mmsegmentation
    warmup_epochs: float = 0.0  # linear warm-up, if --warmup_steps=0
    warmup_steps: int = 1500  # linear warm-up of the new heads and all below them
    clip_grad: float = 0.0  # largest gradient norm, 0 for none, as in table 14
    eval_every: int = 16_000  # steps between evaluations with pictures, 0 for one at the end
    task: str = "train"  # see the top of the file
    num_classes: int = 150  # classes to tell apart; labels run from 1 to this (ignore_zero)
    ignore_zero: bool = True  # label 0 is "other" and ignored; false: it is the first class
    label_values: str = ""  # numbers of the classes in the label maps, such as 0,255; else as above
    layer_decay: float = 0.65  # a layer's lr over that of the layer above; 1 disables the decay
    aux_weight: float = 0.4  # of each auxiliary head's loss (SETR); 0 leaves them untrained
    scale_min: float = 0.5  # least factor that a training image is resized by before its crop
    scale_max: float = 2.0  # largest such factor; nearer to 1 where objects keep their size
    most_of_crop: float = 0.75  # a crop with more than this of one class is drawn again; 1: never
    distort: bool = True  # brightness, contrast, saturation and hue; false where colours tell all
    stride: int = 341  # pixels from window to window in the evaluation: two thirds of 512
    scales: str = "1"  # sizes that --task=eval averages over: 0.5,0.75,1,1.25,1.5,1.75 for more
    flip: bool = False  # average over the mirrored image too: a bit better at twice the time
    val_images: int = 0  # held-out images an evaluation reads, 0: all; fewer for a quick look


CAMVID = {
    "data": "camvid",
    "out": "out/camvid",
    "weights": "none",
    "size": "nano",
    "num_classes": 11,
    "image_size": 128,
    "patch_size": 8,
    "stride": 85,
    "steps": 600,
    "warmup_steps": 50,
    "batch_size": 8,
    "lr": 2e-3,
    "layer_decay": 0.75,
    "num_workers": 2,
    "log_every": 25,
    "eval_every": 300,
    "save_every": 200,
}
SHAPES = {
    **CAMVID,
    "data": "shapes",
    "out": "out/shapes_seg",
    "weights": "out/shapes/checkpoint.pt",
    "num_classes": 9,
    "ignore_zero": False,
    "image_size": 64,
    "stride": 43,
    "warmup_steps": 120,
    "batch_size": 32,
    "lr": 3e-3,
    "layer_decay": 0.9,
    "clip_grad": 1.0,
    "val_images": 200,
    "most_of_crop": 1.0,
    "scale_min": 0.75,
    "scale_max": 1.33,
}
PRESETS = {"ade20k": {}, "camvid": CAMVID, "shapes": SHAPES}

# ---- the objective -------------------------------------------------------------------------------


class Segmentation(nn.Module):
    """Cross entropy of the pixels of SETR-PUP's head and its auxiliary heads: the mean over all
    pixels of the global batch that are not to be ignored."""

    def __init__(self, config):
        super().__init__()
        self.model = Segmenter(vit_config(config, shared=False), config.num_classes)
        self.aux_weight = config.aux_weight
        if config.weights != "none":
            log(load_weights(self.model, config.weights, head=config.task != "train"))

    def denominators(self, batch):
        return [int((batch["labels"] != IGNORE).sum())]

    def forward(self, batch, denominators):
        """This batch's share of the mean; `labels` are (B, H, W) int64."""
        labels = batch["labels"]
        losses = [F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")
                  for logits in self.model(batch["images"])]  # (B, classes, H, W) each
        loss = losses[0] + self.aux_weight * sum(losses[1:])
        return loss / max(1, denominators[0])  # a batch may have nothing to learn


# ---- the loop ------------------------------------------------------------------------------------


def train(config):
    """One run, from its checkpoint if there is one. Returns whether it is done."""
    device, dtype = setup_device(config)
    train_images, val_images = local_rank0_first(open_segmented, config)
    steps, steps_per_epoch, warmup = run_length(config, len(train_images))
    count_labels(train_images, config)

    torch.manual_seed(config.seed)
    objective = Segmentation(config).to(device)
    if world_size() > 1 and device.type == "cuda":  # on the CPU each process has its own statistics
        objective = nn.SyncBatchNorm.convert_sync_batchnorm(objective)
    dataset = LabelMapViews(train_images, config, train=True)
    val_dataset = LabelMapViews(val_images, config, train=False)
    model, optimizer, scaler, save, start = prepare(objective, train_images, config, device, dtype,
                                                    config.layer_decay)
    log(f"{config.task} into {config.out}: step {start} of {steps}, {steps_per_epoch} per epoch, "
        f"warm-up {warmup}; {len(dataset):,} images, {len(val_dataset):,} held out")

    batches = batches_of_steps(range(start, steps), len(dataset), config.batch_size, config.seed)
    loader = make_loader(dataset, batches, config.num_workers, device)
    val_batches = batches_of_all(len(val_dataset), 1)  # one by one: sizes differ
    val_loader = make_loader(val_dataset, val_batches, config.num_workers, device)
    logger = Logger(config, train_images, start, steps, steps_per_epoch)

    for step, batch in enumerate(loader, start):
        # in one exchange between the CPUs: what the sums are divided by, and whether to stop
        *denominators, stop = all_reduce_sum(*objective.denominators(batch), logger.stop)
        if stop:
            break
        lr = learning_rate(config, step, steps, warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        torch.manual_seed(derive_seed(config.seed, step, rank()))  # for stochastic depth
        metrics = {}
        micros = micro_batches(batch, config.micro_batch)
        for number, micro in enumerate(micros, 1):
            model.require_backward_grad_sync = number == len(micros)  # DDP's switch
            with autocast(device, dtype):
                loss = model(to_device(micro, device), denominators)
            # each loss is its share of the global mean, to be added up; DDP averages gradients over
            # the processes, so this undoes its division
            scaler.scale(loss * world_size()).backward()
            metrics["loss"] = metrics.get("loss", 0) + loss.detach()
        scaler.unscale_(optimizer)  # float16: where a gradient overflowed, step() changes nothing
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad or math.inf)
        scaler.step(optimizer)
        scaler.update()  # and this lowers the scale
        optimizer.zero_grad(set_to_none=True)

        # the logger adds up the processes' shares; this norm is the same in all of them
        metrics["grad_norm"] = grad_norm / world_size()
        to_log, to_evaluate, to_save = logger.add(metrics, batch)  # no GPU waits until one is due
        if not (to_log or to_evaluate or to_save):
            continue
        record = logger.read(lr)
        if to_evaluate:
            objective.eval()
            values, table = evaluate(objective, val_loader, config, device, dtype)
            record |= values
            if rank() == 0:
                draw_predictions(objective, val_dataset, config, device, dtype)
            objective.train()
        logger.write(record)
        if logger.done == steps:
            log(table)
        if to_save:
            save(logger.done)
    return logger.close(save)


@torch.no_grad()
def evaluate(objective, loader, config, device, dtype):
    """(metrics over all held-out images, each counted once, as val_*; a table of the classes)."""
    classes = config.num_classes
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    for batch in tqdm(loader, "evaluating", disable=no_progress_bar(), leave=False):
        image = batch["images"].to(device)
        labels = batch["labels"].to(device)
        predicted = predict_labels(objective.model, image, labels.shape[1:], config, dtype)
        matrix += confusion(labels, predicted, classes).cpu()
    matrix = np.reshape(all_reduce_sum(*matrix.flatten().tolist()), matrix.shape)
    means, iou, accuracy = scores(matrix)
    table = ["label     IoU  accuracy"]
    for row in zip(class_labels(config), 100 * iou, 100 * accuracy):
        table.append("{:>5}  {:5.1f}%    {:5.1f}%".format(*row))
    return {f"val_{name}": float(value) for name, value in means.items()}, "\n".join(table)


def predict_labels(model, image, size, config, dtype):
    """The class of each pixel, (1, *size) int64, of a normalised image (1, 3, H, W): probabilities
    of all --scales, mirrored too with --flip, are averaged at the image's original `size`."""
    total = 0
    for scale in parse_scales(config):
        sides = [max(1, round(scale * side)) for side in image.shape[2:]]
        scaled = image if scale == 1 else F.interpolate(image, sides, mode="bilinear")
        for mirrored in (False, True) if config.flip else (False,):
            view = scaled.flip(3) if mirrored else scaled
            with autocast(image.device, dtype):
                logits = sliding_window(model, view, config.image_size, config.stride,
                                        config.micro_batch)
            logits = logits.flip(3) if mirrored else logits
            logits = F.interpolate(logits, size, mode="bilinear")
            total = total + logits.softmax(dim=1)
    return total.argmax(dim=1)


def evaluate_weights(config):
    """--task=eval: the scores of --weights on the held-out images."""
    device, dtype = setup_device(config)
    val_images = local_rank0_first(open_segmented, config)[1]
    count_labels(val_images, config)
    objective = Segmentation(config).to(device).eval()
    dataset = LabelMapViews(val_images, config, train=False)
    loader = make_loader(dataset, batches_of_all(len(dataset), 1), config.num_workers, device)
    record, table = evaluate(objective, loader, config, device, dtype)
    log(table)
    log(f"{len(dataset):,} images", *(f"{name} {value:.6g}" for name, value in record.items()))
    return record


def main(argv=None):
    config = parse_args(Config, PRESETS, {**RUN_CHOICES, "task": TASKS}, argv, __doc__)
    if config.task != "train" and config.weights != "none":
        config = as_trained(config, "num_classes", "ignore_zero", "label_values", "stride")
    check(config)
    return bench(config) if config.bench else TASKS[config.task](config)


# ==== A first reading can stop here: above is all of fine-tuning ==================================

# ---- scores and windows --------------------------------------------------------------------------


def check(config):
    """Raise BadInput for values that would leave pixels out, wait for ever, or fail late."""
    if config.weights == "none" and config.task != "train":
        raise BadInput(f"--task={config.task}: give --weights=FILE, a checkpoint.pt")
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
    """Logits (1, classes, H, W) of an image (1, 3, H, W) of any size: `network` sees windows of
    `window` pixels every `stride`, the last ones at the border, `batch` at a time; where they
    overlap, logits are averaged. An image smaller than the window is padded for it."""
    height, width = image.shape[2:]
    padded = F.pad(image, (0, max(0, window - width), 0, max(0, window - height)))
    starts = [[*range(0, side - window, stride), side - window] for side in padded.shape[2:]]
    places = list(itertools.product(*starts))
    total = 0
    count = torch.zeros(padded.shape[2:], device=image.device)
    for first in range(0, len(places), batch):
        some = places[first : first + batch]
        crops = [padded[0, :, y : y + window, x : x + window] for y, x in some]
        for (y, x), logits in zip(some, network(torch.stack(crops)).float(), strict=True):
            if not torch.is_tensor(total):
                total = logits.new_zeros(1, len(logits), *padded.shape[2:])
            total[0, :, y : y + window, x : x + window] += logits
            count[y : y + window, x : x + window] += 1
    return (total / count)[:, :, :height, :width]


def parse_scales(config):
    try:
        scales = [float(word) for word in config.scales.split(",")]
    except ValueError:
        scales = []
    if not scales or not all(0 < scale < math.inf for scale in scales):
        raise BadInput(f"--scales={config.scales}: give numbers above 0, such as 0.75,1,1.25")
    return scales


def scores(matrix):
    """A confusion matrix over a whole set -> (metrics, IoU of each class, accuracy of each). The
    means leave out classes without a pixel; in the table they are nan. `baseline_miou` is what
    calling everything the most frequent class gives."""
    matrix = np.asarray(matrix, dtype=np.float64)
    correct = matrix.diagonal()
    truth = matrix.sum(axis=1)
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan
        iou = correct / (truth + matrix.sum(axis=0) - correct)
        accuracy = correct / truth
    pixels = truth.sum()
    if pixels == 0:
        return dict(miou=0.0, mean_accuracy=0.0, pixel_accuracy=0.0), iou, accuracy
    means = {
        "miou": np.nanmean(iou),
        "mean_accuracy": np.nanmean(accuracy),
        "pixel_accuracy": correct.sum() / pixels,
        "baseline_miou": truth.max() / pixels / (truth > 0).sum(),
    }
    return means, iou, accuracy


# ---- images and label maps -----------------------------------------------------------------------


def open_segmented(config):
    """(training, held-out) Images with label maps of --data: a name in DATASETS, or a folder."""
    if named := named_images(config.data, config.image_size):
        train, val = named
        if train.read_label_map is None:
            raise BadInput(f"--data={config.data}: has no label maps to learn segmentation from")
    else:
        val = open_folder(config.data, "validation")
        train = open_folder(config.data, "training", without=val.keys)
    return train, val.split(config.val_images or len(val))[0]


def open_folder(data, part, without=()):
    """The images of one part of a folder in ADE20K's layout, with the label maps of their names."""
    folder = os.path.join(data, "images", part)
    maps_folder = os.path.join(data, "annotations", part)
    images = folder_images(folder, without)
    if not len(images):
        raise BadInput(f"{folder}: no such folder, or no images in it; --data holds images/ and "
                       "annotations/, each with training/ and validation/")
    by_stem = {stem(path, maps_folder): path for path in folder_images(maps_folder).keys}
    label_maps = {path: by_stem.get(stem(path, folder)) for path in images.keys}
    for path, label_map in label_maps.items():
        if label_map is None:
            raise BadInput(f"{path}: has no label map of its name in {maps_folder}")
    return replace(images, read_label_map=functools.partial(read_label_map, label_maps))


def stem(path, folder):
    return os.path.splitext(os.path.relpath(path, folder))[0]


def read_label_map(label_maps, path):
    """The label map of an image as it is seen upright. It counts as drawn so, unless its size is
    that of the stored pixels, before EXIF's quarter turn: then it is turned like the image."""
    labels = read_labels(label_maps[path])
    with Image.open(path) as image:
        width, height = image.size
        turn = image.getexif().get(ORIENTATION, 1) if "exif" in image.info else 1
    if turn >= 5 and width != height and labels.shape == (height, width):  # the quarter turns
        stored = Image.fromarray(labels.astype(np.int32))
        stored.getexif()[ORIENTATION] = turn
        labels = np.asarray(ImageOps.exif_transpose(stored)).astype(np.int64)
    return labels


def read_labels(path):
    """The numbers in a label map of 8, 16 or 32 bits or with a palette, (height, width) int64."""
    try:
        with Image.open(path) as image:
            lossy = image.format == "JPEG"
            labels = np.asarray(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and others
        raise BadInput(f"{path}: cannot be read as a label map ({error})") from error
    if lossy:
        raise BadInput(f"{path}: a JPEG; its compression makes up labels. Save label maps as PNG")
    if labels.ndim == 3 and (labels[..., :3] == labels[..., :1]).all():
        labels = labels[..., 0]  # grey, saved as a colour image
    if labels.ndim != 2 or labels.dtype.kind == "f" or labels.min() < 0:
        raise BadInput(f"{path}: a label map has one channel of whole numbers, those of the "
                       "classes; this holds colours or other numbers")
    return labels.astype(np.int64)


def class_labels(config):
    """(num_classes,) int64: the number of each class in the label maps."""
    if config.num_classes < 2:
        raise BadInput(f"--num_classes={config.num_classes}: leaves nothing to tell apart; the "
                       "background is a class too. Where it is 0 and the other 255, give "
                       "--num_classes=2 --label_values=0,255")
    numbers = range(int(config.ignore_zero), config.num_classes + int(config.ignore_zero))
    if config.label_values:
        numbers = [int(word) if word.strip().isdecimal() else -1
                   for word in config.label_values.split(",")]
        if min(numbers) < 0 or len(set(numbers)) != config.num_classes:
            raise BadInput(f"--label_values={config.label_values}: give --num_classes="
                           f"{config.num_classes} different numbers, such as 0,255")
    return np.array(numbers)


def classes_of(labels, config, name):
    """Labels as they are in the file -> the numbers of classes, from 0, or IGNORE. 255 is ignored
    where no class has it; with --label_values all that are not listed are. Raises BadInput if a
    label is none of them."""
    numbers = class_labels(config)
    wrong = (labels > numbers.max()) & (labels != 255)
    if not config.label_values and wrong.any():
        raise BadInput(f"{name}: label {labels[wrong].max()} is above {numbers.max()}, the last of "
                       f"--num_classes={config.num_classes} with --ignore_zero="
                       f"{config.ignore_zero}; --label_values lists others")
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
    learnt = numbers & pixels.keys()
    share = 100 / pixels.total()
    ignored = 100 - share * sum(pixels[label] for label in learnt)
    frequent = ", ".join(f"{k} ({share * count:.1f}%)" for k, count in pixels.most_common(10))
    log(f"labels: {len(learnt)} of {config.num_classes} classes occur, {ignored:.1f}% of the "
        f"pixels are ignored; the most frequent labels are {frequent}")
    if len(learnt) < 2:
        raise BadInput(f"--data={config.data}: {len(learnt)} of --num_classes={config.num_classes} "
                       f"occur in its label maps, which hold {frequent}; say which numbers are the "
                       "classes: --num_classes=2 --label_values=0,255")


class LabelMapViews(Dataset):
    """dataset[epoch, index] is a dict of `images` (3, H, W), normalised float32, of `labels` (H, W)
    int64, the classes' numbers or IGNORE, and of `skipped`. In training both are an augmented crop
    of image_size, a function of (seed, epoch, index). Held-out images are resized so that their
    short side is image_size (table 14); their labels stay at the ORIGINAL size."""

    def __init__(self, images, config, train):
        self.images = images
        self.config = config
        self.train = train

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        epoch, index = key
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
        """Table 14's training view: resize, crop, flip and distort an image and its labels."""
        config = self.config
        factor = torch.empty(()).uniform_(config.scale_min, config.scale_max).item()
        resize = v2.Resize(fit_size(labels.shape, config.image_size, factor))
        image, labels = resize(image, tv_tensors.Mask(labels))
        fill = {tv_tensors.Mask: IGNORE, "others": 0}
        crop = v2.RandomCrop(config.image_size, pad_if_needed=True, fill=fill)
        for _ in range(10):
            part, part_labels = crop(image, labels)
            counts = torch.bincount(part_labels[part_labels != IGNORE])
            if len(counts) and counts.max() <= config.most_of_crop * counts.sum():
                break
        part, part_labels = v2.RandomHorizontalFlip()(part, part_labels)
        if config.distort:
            ranges = dict(brightness=0.125, contrast=0.5, saturation=0.5, hue=0.1)  # mmseg's
            for name, strength in ranges.items():
                part = v2.RandomApply([v2.ColorJitter(**{name: strength})], p=0.5)(part)
        return normalise(part[None] / 255, config.norm)[0], part_labels.as_subclass(torch.Tensor)


def held_out_view(image, config):
    """An image as an evaluation sees it, (3, H, W): its short side is image_size (table 14)."""
    image = v2.functional.resize(image, fit_size(image.shape[1:], config.image_size))
    return normalise(image[None] / 255, config.norm)[0]


def fit_size(size, side, factor=1.0):
    """[height, width] of an image resized, with its aspect kept, so that it just fits 4 * side by
    side, in either orientation, times a factor: its short side is `side`, or less if it is long."""
    scale = factor * min(4 * side / max(size), side / min(size))
    return [max(1, round(scale * length)) for length in size]


def bench(config):
    """--bench: how fast images are loaded and learnt from."""
    device, dtype = setup_device(config)
    images = local_rank0_first(open_segmented, config)[0]
    objective = Segmentation(config).to(device)

    def to_inputs(batch):  # counted on the CPU, where no GPU waits
        return {**to_device(batch, device), "denominators": objective.denominators(batch)}

    def loss_of(model, inputs):
        return model(inputs, inputs["denominators"])

    measure_speed(config, objective, LabelMapViews(images, config, train=True), device, dtype,
                  to_inputs, loss_of)


# ---- pictures ------------------------------------------------------------------------------------


def palette(classes):
    """(classes, 3) uint8: colours that are far apart for neighbouring numbers."""
    golden = 0.618034  # golden ratio: successive hues never repeat
    hues = [(number * golden % 1, 1 - 0.35 * (number % 2), 1 - 0.3 * (number // 2 % 2))
            for number in range(classes)]
    return np.round([[255 * c for c in colorsys.hsv_to_rgb(*hue)] for hue in hues]).astype(np.uint8)


def colour(labels, classes):
    """Labels (H, W) -> (3, H, W) in [0, 1]; IGNORE is black."""
    table = torch.cat([torch.from_numpy(palette(classes)), torch.zeros(1, 3, dtype=torch.uint8)])
    return table[labels.cpu()].permute(2, 0, 1) / 255  # IGNORE, -1, is the last row


@torch.no_grad()
def draw_predictions(objective, dataset, config, device, dtype):
    """OUT/predictions.png: held-out images, their labels and the prediction, side by side."""
    columns = {"image": [], "truth": [], "prediction": []}
    for index in np.linspace(0, len(dataset) - 1, min(8, len(dataset))).astype(int).tolist():
        sample = dataset[0, index]
        image = sample["images"][None].to(device)
        labels = sample["labels"]
        found = predict_labels(objective.model, image, labels.shape, config, dtype)[0]
        columns["image"].append(denormalise(image, config.norm).cpu())
        columns["truth"].append(colour(labels, config.num_classes)[None])
        columns["prediction"].append(colour(found, config.num_classes)[None])
    size = columns["image"][0].shape[2:]  # all rows at the size of the first image
    for title, pictures in columns.items():
        columns[title] = torch.cat([F.interpolate(picture, size) for picture in pictures])
    save_columns(os.path.join(config.out, "predictions.png"), columns)


@torch.no_grad()
def predict(config):
    """Write OUT/labels/NAME.png, the numbers that a label map would have, and OUT/overlay/NAME.png
    for each image in --data, at its own size."""
    device, dtype = setup_device(config)
    images = folder_images(config.data)
    if not len(images):
        raise BadInput(f"--data={config.data}: no folder with images to predict")
    model = Segmentation(config).to(device).eval().model
    numbers = class_labels(config)
    colours = np.zeros((1 + max(255, *numbers), 3), np.uint8)
    colours[numbers] = palette(config.num_classes)
    shard = local_shard(range(len(images)))
    for index in tqdm(shard, "predicting", disable=no_progress_bar()):
        path = images.keys[index]
        image, found = images.load(index, config.skip_bad_images)
        if found != index:
            log(f"{path}: skipped, it cannot be read as an image")
            continue
        view = held_out_view(image, config)[None].to(device)
        labels = predict_labels(model, view, image.shape[1:], config, dtype)[0]
        labels = numbers[labels.cpu().numpy()]
        if labels.max() < 256:
            picture = Image.fromarray(labels.astype(np.uint8))
            picture.putpalette(colours[:256].tobytes())
        else:
            picture = Image.fromarray(labels.astype(np.uint16))
        photograph = v2.functional.to_pil_image(image)
        overlay = Image.blend(photograph, Image.fromarray(colours[labels]), 0.5)
        name = stem(path, config.data) + ".png"
        for folder, drawn in (("labels", picture), ("overlay", overlay)):
            save_png = functools.partial(drawn.save, format="PNG")
            write_atomically(os.path.join(config.out, folder, name), save_png)
    log(f"wrote label maps and overlays into {config.out}")


TASKS = {"train": train, "eval": evaluate_weights, "predict": predict}


if __name__ == "__main__":
    run(main)
