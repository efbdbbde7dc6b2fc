"""Fine-tune BEiT on image classification (arXiv 2106.08254, sections 2.6 and 3.1), and probe it.

Without arguments it runs table 13: ViT-B from out/run/checkpoint.pt, 100 epochs of ImageNet-1k at
224 px, batch 1024. The paper reports 83.2% top-1 for it, and 81.8% for DeiT-B from scratch; neither
has been measured with this code. `--data` holds train/CLASS/ and val/CLASS/, or CLASS/, of which a
tenth is held out.
    torchrun --nproc_per_node=8 finetune_cls.py --data=/path/to/imagenet --out=out/imagenet
    python finetune_cls.py --preset=shapes  # minutes, after `pretrain.py --preset=shapes`
    python finetune_cls.py --task=predict --weights=out/imagenet/checkpoint.pt --data=photos
README has the other tasks: eval, probe (appendix D), knn, attention (section 3.4), curves, lengths.
`--help` lists every option. A killed run resumes when its command is run again.

Read from the top: options, the objective, evaluation, main; that is all of fine-tuning. Images, and
what looks at a trained network, follow. The loop and all that it calls are pretrain.py's.
"""

import csv
import functools
import glob
import io
import math
import os
import re
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageDraw, ImageOps
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, make_grid
from tqdm import tqdm

from masking import (
    BICUBIC, DATASETS, NORMS, BadInput, batches_of_all, copy_to, derive_seed, evenly, fit_size,
    folder_images, make_loader, named_images, normalize, open_parts, open_pictures, rank,
    world_size,
)
from model import (
    Classifier, LinearProbes, ViT, load_weights, optional, read_json, read_network,
    write_atomically,
)
from pretrain import (
    NETWORK, RUN_CHOICES, Free, Objective, RunConfig, all_reduce_sum, as_trained, autocast,
    check_range, divide, evaluate, fit, local_rank0_first, log, need_weights, no_progress_bar,
    parse_args, read_metrics, run, save_columns, setup_device, vit_config,
)

# ---- options -------------------------------------------------------------------------------------

@dataclass
class Config(RunConfig):
    data: Free[str] = "imagenet"  # folder with train/CLASS/ and val/CLASS/, or with CLASS/
    out: Free[str] = "out/imagenet"  # one folder per run: checkpoint.pt, metrics.jsonl, config.json
    weights: str = "out/run/checkpoint.pt"  # what to start from (README); none: from scratch
    epochs: float = 100  # passes over the data; from scratch a ViT needs three times as many
    batch_size: int = 1024  # images per step over ALL processes; 512 have the same lr in table 13
    repeats: int = 3  # views of an image per batch: repeated augmentation (arXiv 1902.05509)
    lr: float = 4e-3  # peak for the head, less below it (layer_decay); the paper tries 2e-3 to 5e-3
    min_lr: float = 1e-6  # where the schedule ends
    warmup_epochs: float = 20  # linear warm-up; without it the new head would upset the backbone
    layer_decay: float = 0.65  # ratio of a layer's lr to the lr of the layer above; 1: no decay
    clip_grad: float = 0.0  # largest gradient norm, 0 for none, as in table 13
    eval_every: Free[int] = 1251  # steps between evaluations, here an epoch; 0 for one at the end
    task: str = "train"  # see the top of the file
    mixup: float = 0.8  # alpha of mixup (arXiv 1710.09412), 0 for none; for long runs only
    cutmix: float = 1.0  # alpha of cutmix (arXiv 1905.04899), 0 for none; each has half the batches
    smoothing: float = 0.1  # label smoothing; against overconfidence and for noisy labels
    randaug: float = 9.0  # RandAugment's magnitude out of 10, 0: none; torchvision's, not timm's
    randaug_noise: float = 0.5  # standard deviation of that magnitude from operation to operation
    erasing: float = 0.25  # probability that a rectangle of the image becomes noise
    crop_min: float = 0.08  # least area of a crop; raise it where images are tiny
    eval_crop: float = 0.875  # share of the short side that is evaluated; 1 at 384 px, tiny images
    labels_per_class: int = 0  # train on this many images per class, drawn by the seed; 0: all
    probe_layer: int = 0  # layer that --task=probe and knn look at, from 1; 0: each of them
    neighbours: int = 20  # of --task=knn; more of them smooth over rare classes
    query: Free[str] = ""  # row,column of the patch that attention looks from; empty: the middle
    runs: Free[tuple] = ()  # the folders that --task=curves or lengths draws


# What differs from the recipe
LARGE = dict(size="large", layer_decay=0.75, repeats=1)
IMAGENET384 = dict(  # 10 more epochs in DeiT's setting (sec. 3.1), but without its warm-up
    weights="out/imagenet/checkpoint.pt", out="out/imagenet384", image_size=384, micro_batch=32,
    epochs=10, warmup_epochs=0, batch_size=512, lr=5e-6, min_lr=5e-6, layer_decay=1.0,
    weight_decay=1e-8, eval_crop=1.0, eval_every=2502,
)
CIFAR100 = dict(
    data="cifar100", out="out/cifar100_cls", erasing=0.0,
    epochs=150, batch_size=512, weight_decay=0.3, eval_every=97,
)
PLAIN = dict(mixup=0.0, cutmix=0.0, smoothing=0.0, randaug=0.0, erasing=0.0, repeats=1)
PROBE = PLAIN | dict(task="probe", epochs=50, lr=4e-3, weight_decay=1e-4, warmup_epochs=0,
                     drop_path=0.0)
CIFAR10 = PLAIN | dict(
    data="cifar10", weights="out/cifar10/checkpoint.pt", out="out/cifar10_cls",
    size="nano", image_size=32, patch_size=4, crop_min=0.4, eval_crop=1.0, num_workers=2,
    threads=1, epochs=30, warmup_epochs=2, batch_size=32, lr=2e-3, layer_decay=0.75, smoothing=0.1,
    drop_path=0.0, log_every=25, eval_every=1562, save_every=500,
)
SHAPES = CIFAR10 | dict(
    data="shapes", weights="out/shapes/checkpoint.pt", out="out/shapes_cls",
    image_size=48, patch_size=8, crop_min=1.0, labels_per_class=100,
    epochs=8, warmup_epochs=1, layer_decay=1.0, eval_every=50,
)
TINY_PROBE = PROBE | dict(epochs=10, batch_size=256)
PRESETS = {
    "imagenet": dict(),
    "large": LARGE | dict(out="out/large", epochs=50, warmup_epochs=5),
    "imagenet384": IMAGENET384,
    "large384": LARGE | IMAGENET384 | dict(weights="out/large/checkpoint.pt", out="out/large384"),
    "probe": PROBE | dict(out="out/imagenet_probe"),
    "cifar100": CIFAR100,
    "cifar100_probe": CIFAR100 | PROBE | dict(out="out/cifar100_probe", batch_size=1024),
    "cifar10": CIFAR10,
    "cifar10_probe": CIFAR10 | TINY_PROBE | dict(out="out/cifar10_probe"),
    "shapes": SHAPES,
    "shapes_probe": SHAPES | TINY_PROBE | dict(out="out/shapes_probe", labels_per_class=0),
}

# ---- the objective -------------------------------------------------------------------------------

class Classification(Objective):
    """Cross entropy with label smoothing, a mean over the images of the global batch. `images` are
    the training images; with `trained` the weights are those of a classifier, to be evaluated."""

    def __init__(self, config, images, trained=False):
        super().__init__()
        self.smoothing = config.smoothing
        self.notes = {"classes": images.classes}  # their names
        self.trained = trained
        num_classes = len(images.classes or ())
        self.model = self.make_model(config, num_classes)
        alphas = {v2.MixUp: config.mixup, v2.CutMix: config.cutmix}
        self.mixing = [kind(alpha=alpha, num_classes=num_classes)
                       for kind, alpha in alphas.items() if alpha]
        if config.weights != "none":
            log(load_weights(self.model, config.weights, head=trained))

    def make_model(self, config, num_classes):
        return Classifier(vit_config(config, shared=False), num_classes)

    def inputs(self, batch, device):
        """Images and labels (B,); in training mixed with the image before: labels (B, classes)."""
        inputs = {name: copy_to(device, batch[name]) for name in ("images", "labels")}
        return v2.RandomChoice(self.mixing)(inputs) if self.mixing and self.training else inputs

    def forward(self, inputs, denominators, progress):
        logits = self.model(inputs["images"]).float()  # (B, classes)
        loss = F.cross_entropy(logits, inputs["labels"], label_smoothing=self.smoothing)
        return loss * (len(logits) / denominators[0]), {}

    def eval_sums(self, inputs, progress):
        """The loss, how many labels are first or among the first five, maybe the confusion."""
        logits = self.model(inputs["images"]).float()
        sums = self.score(logits, inputs["labels"])
        if self.trained:
            sums["confusion"] = confusion(inputs["labels"], logits.argmax(1), logits.shape[1])
        return sums

    def score(self, logits, labels):
        top5 = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return {"loss": loss, "top1": top5[:, 0].sum(), "top5": top5.sum()}

    def finish(self, sums, denominators):
        counts = {"confusion": sums["confusion"]} if self.trained else {}
        return super().finish(sums, denominators) | counts

    def table(self, metrics):
        return confusion_table(metrics["confusion"], self.notes["classes"]) if self.trained else ""

    @staticmethod
    def label(value):
        """What the loss wants of an image's label: the number of its class."""
        if value != int(value):
            raise BadInput(f"label {value}: is no number of a class; write an objective for it")
        return int(value)

    @staticmethod
    def describe(images):
        """A line on the labels of held-out images: the accuracy of always naming one class."""
        if not images.classes:
            raise BadInput(f"{images.source}: labels without classes; write an objective for them")
        counts = np.bincount([Classification.label(images.read_label(key)) for key in images.keys])
        return (f"{len(images.classes)} classes, {100 * counts.max() / counts.sum():.1f}% of the "
                "held-out images in the most frequent one")

    @staticmethod
    def check(config):
        depth = vit_config(config, shared=False).depth  # raises BadInput if there is none
        check_range(config, 0, depth, "probe_layer")
        check_range(config, 0, math.inf, "mixup", "cutmix", "randaug_noise", "labels_per_class")
        check_range(config, 0.01, 1, "eval_crop")
        check_range(config, 0, 0.99, "smoothing")
        check_range(config, 0, 1, "erasing")
        check_range(config, 0, 10, "randaug")


def train(config):
    """One run of the objective of --task. Returns whether it is done."""
    config = as_trained(config)
    device, dtype = setup_device(config)
    train_images, val_images = local_rank0_first(open_labelled, config)
    torch.manual_seed(config.seed)
    objective = OBJECTIVES[config.task](config, train_images).to(device)
    log(objective.describe(val_images))
    dataset = LabelledViews(train_images, config, True, objective.label)
    val_dataset = LabelledViews(val_images, config, False, objective.label)
    return fit(objective, dataset, val_dataset, config, device, dtype)


def evaluate_weights(config):
    """--task=eval: the metrics of a fine-tuned network, and what it confuses."""
    config = as_trained(config, *NETWORK, "eval_crop", "probe_layer")
    device, dtype = setup_device(config)
    known = read_network(config.weights)[2]
    objective_class = OBJECTIVES.get(known.get("config", {}).get("task"), Classification)
    images = local_rank0_first(open_labelled, config, known.get("classes"), False)[1]
    numbers = [int(name) for name in images.classes or () if name.isdecimal()]
    if "classes" not in known and numbers != sorted(numbers):
        raise BadInput(f"--weights={config.weights}: names no classes, so 10 may stand before or "
                       "after 2; name the folders 02 and 10, in the order of its classes")
    objective = objective_class(config, images, trained=True).to(device)
    dataset = LabelledViews(images, config, False, objective.label)
    metrics = evaluate(objective, dataset, config, device, dtype)
    log(f"{len(dataset):,} images", *(f"{k} {v:.6g}" for k, v in metrics.items()))
    return metrics


def main(argv=None):
    tasks = {**OBJECTIVES, **OTHER_TASKS}
    config = parse_args(Config, PRESETS, {**RUN_CHOICES, "task": tasks}, argv, __doc__)
    if config.runs and tasks[config.task] is not curves:
        raise BadInput(f"{config.runs[0]}: is no option; those are --NAME=VALUE")
    OBJECTIVES.get(config.task, Classification).check(config)
    return train(config) if config.task in OBJECTIVES else OTHER_TASKS[config.task](config)


# ==== A first reading can stop here: above is all of fine-tuning ==================================

# ---- labelled images -----------------------------------------------------------------------------

def open_labelled(config, classes=None, needs_training=True):
    """(training images, held-out ones) with labels, of --data: a name in DATASETS, or a folder as
    the top of this file says. Its labels number `classes`, or else the folder's own classes."""
    if named := named_images(config.data, config.image_size):
        train, val = named
    else:
        found = open_parts(config.data, [config.out], needs_training)
        train, *val = [open_classes(images, classes) for images in found if images is not None]
        val = val[0] if val else train
    if not named and len(found) == 1:
        labels = [train.read_label(key) for key in train.keys]
        firsts = {label: i for i, label in reversed([*enumerate(labels)])}.values()
        others = np.setdiff1d(np.arange(len(train)), [*firsts])  # a class keeps a training image
        held_out = others[evenly(len(others), max(1, len(others) // 10))]
        val = train.subset(held_out)
        train = train.subset(np.setdiff1d(np.arange(len(train)), held_out))
    if not train.read_label or not val.read_label:
        raise BadInput(f"--data={config.data}: has no labels")
    if odd := set(train.classes or ()) ^ set(val.classes or ()):
        raise BadInput(f"--data={config.data}: {len(train.classes)} classes in train/, "
                       f"{len(val.classes)} in val/; {min(odd)} is in one only")
    if len(train.classes or "no") < 2 or not len(val):
        raise BadInput(f"--data={config.data}: {len(train.classes or ())} classes, {len(val)} to "
                       "hold out; give a folder with a folder per class and two images in one")
    if config.labels_per_class:
        labels = np.array([train.read_label(key) for key in train.keys])
        order = np.random.default_rng(config.seed).permutation(len(labels))
        few = [order[labels[order] == label][: config.labels_per_class] for label in set(labels)]
        train = train.subset(sorted(np.concatenate(few).tolist()))
    return train, val


def open_classes(images, classes=None):
    """Images in a folder per class, with labels: these number `classes`, or else the folders in the
    order of their names."""
    where = images.source
    if not len(images):
        raise BadInput(f"{where}: no such folder, or no images in it; --data holds train/CLASS/ "
                       f"and val/CLASS/, or CLASS/, or is one of {', '.join(DATASETS)}")
    names = {class_folder(where, path) for path in images.keys}
    classes = classes or sorted(names)
    if strange := names - set(classes):
        raise BadInput(f"{where}/{min(strange)}: is none of the classes that --weights was trained "
                       f"on: {', '.join(classes[:10])}")
    numbers = {name: number for number, name in enumerate(classes)}
    return replace(images, classes=classes,
                   read_label=functools.partial(label_of_path, where, numbers))


def class_folder(where, path):
    name, _, rest = path[len(where) :].lstrip(os.sep).partition(os.sep)
    if not rest:
        raise BadInput(f"{path}: is in no class; {where} should hold a folder per class")
    return name


def label_of_path(where, numbers, path):
    return numbers[class_folder(where, path)]


class LabelledViews(Dataset):
    """dataset[epoch, index, progress] is a dict, all of it a function of (seed, epoch, index):
    images   (3, H, W), normalized float32
    labels   what `label` makes of its label; -1 where there are no labels
    skipped  whether it shows the next image because this one is unreadable"""

    def __init__(self, images, config, train, label=Classification.label):
        self.images = images
        self.config = config
        self.label = label
        size = config.image_size
        if train:
            crop = v2.RandomResizedCrop(size, (config.crop_min, 1.0), interpolation=BICUBIC)
            steps = [crop, v2.RandomHorizontalFlip()]
            if config.randaug:  # with Pillow: tensors cannot be turned bicubically
                augment = functools.partial(rand_augment, config.randaug, config.randaug_noise)
                steps += [v2.ToPILImage(), augment]
        else:  # with Pillow, as other libraries evaluate
            steps = [v2.ToPILImage(), center_crop(size, config.eval_crop)]
        steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        steps += [v2.Normalize(*NORMS[config.norm])]
        if train and config.erasing:
            steps += [v2.RandomErasing(config.erasing, (0.02, 1 / 3), value="random")]
        self.transform = v2.Compose(steps)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        epoch, index, _ = key
        image, found = self.images.load(index, self.config.skip_bad_images)
        read_label = self.images.read_label
        label = self.label(read_label(self.images.keys[found])) if read_label else -1
        torch.default_generator.manual_seed(derive_seed(self.config.seed, epoch, index))
        return {"images": self.transform(image), "labels": label, "skipped": found != index}


def center_crop(size, share):
    """The middle of an image, a square whose side is `share` of the image's shorter side."""
    return v2.Compose([v2.Resize(round(size / share), BICUBIC), v2.CenterCrop(size)])


def rand_augment(magnitude, noise, image):
    """RandAugment of table 13, "9/0.5": two operations, each left out half of the time, of a
    magnitude around 9 of 10. torchvision counts 31 steps, from 0 to 30. Its operations are not all
    of timm's, which the official code has: no Invert, no SolarizeAdd, 4 bits kept instead of 1 in
    Posterize, and Identity instead."""
    gray = [124, 116, 104]  # ImageNet's mean
    for _ in range(2):
        step = int((3 * torch.normal(magnitude, noise, ())).round().clamp(0, 30))
        if torch.rand(()) < 0.5:
            image = v2.RandAugment(1, step, interpolation=BICUBIC, fill=gray)(image)
    return image


# ---- frozen features: probes and nearest neighbours ----------------------------------------------

class LinearProbing(Classification):
    """A linear classifier per layer of a frozen network (appendix D): the mean of their losses. The
    metrics are the best layer's; each layer's accuracy is `top1_layer_N`."""

    def make_model(self, config, num_classes):
        arch = vit_config(config, shared=False)
        return LinearProbes(arch, num_classes, probed_layers(config, arch))

    def forward(self, inputs, denominators, progress):
        logits = self.model(inputs["images"]).float()  # (layers, B, classes)
        labels = inputs["labels"].repeat(len(logits))  # (layers * B,)
        loss = F.cross_entropy(logits.flatten(0, 1), labels)
        return loss * (logits.shape[1] / denominators[0]), {}

    def eval_sums(self, inputs, progress):
        logits = self.model(inputs["images"]).float()
        rows = [self.score(row, inputs["labels"]) for row in logits]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}  # (layers,)

    def finish(self, sums, denominators):
        means = divide(sums, denominators[0])
        best = means["top1"].argmax()
        layers = {f"top1_layer_{layer}": value
                  for layer, value in zip(self.model.probed, means["top1"], strict=True)}
        return {name: value[best] for name, value in means.items()} | layers

    def table(self, metrics):
        return layer_table(metrics)

    @staticmethod
    def check(config):
        Classification.check(config)
        need_weights(config)
        for name, plain in PLAIN.items():
            if getattr(config, name) != plain:
                raise BadInput(f"--task=probe --{name}={getattr(config, name)}: a probe has crops "
                               "and flips only (app. D); give a --preset whose name ends in probe")


def probed_layers(config, arch):
    check_range(config, 0, arch.depth, "probe_layer")
    return [config.probe_layer] if config.probe_layer else list(range(1, arch.depth + 1))


def layer_table(metrics):
    rows = [f"{layer:>5}  {top1:5.2f}%" for layer, top1 in layer_accuracies(metrics).items()]
    return "\n".join(["layer  top-1", *rows])


def layer_accuracies(metrics):
    """{layer: held-out accuracy in percent} of a probe or of nearest neighbours."""
    return {int(name.rpartition("_")[2]): 100 * value for name, value in metrics.items()
            if "top1_layer_" in name}


@torch.no_grad()
def knn(config):
    """--task=knn: the accuracy of a vote of the nearest training images, by mean patch features. It
    needs no training, so that one can watch a pre-training improve."""
    if world_size() > 1:
        raise BadInput("--task=knn runs in one process: start it without torchrun")
    check_range(config, 1, math.inf, "neighbours")
    config = as_trained(config, *NETWORK, "eval_crop")
    device, dtype = setup_device(config)
    train_images, val_images = open_labelled(config)
    model = ViT(vit_config(config, shared=False)).to(device).eval()
    log(load_weights(model, config.weights))
    bank, labels = layer_features(model, train_images, config, device, dtype)
    queries, truth = layer_features(model, val_images, config, device, dtype)
    count = min(config.neighbours, len(labels))
    metrics = {}
    for layer, keys, rows in zip(probed_layers(config, model.config), bank, queries, strict=True):
        keys = keys.to(device).float()
        found = [vote(part.to(device).float(), keys, labels.to(device), count).cpu()
                 for part in rows.split(256)]
        metrics[f"val_top1_layer_{layer}"] = (torch.cat(found) == truth).float().mean().item()
    log(f"{count} nearest of {len(labels):,} training images, {len(truth):,} held out")
    log(layer_table(metrics))
    return metrics


def layer_features(model, images, config, device, dtype):
    """(features (layers, images, D), float16 of length 1; labels (images,)) of all images."""
    dataset = LabelledViews(images, config, train=False)
    keys = batches_of_all(len(dataset), config.micro_batch)
    loader = make_loader(dataset, keys, config.num_workers, device)
    rows = [layer - 1 for layer in probed_layers(config, model.config)]
    features = []
    labels = []
    for batch in tqdm(loader, "features", disable=no_progress_bar()):
        with autocast(device, dtype):
            means = model.mean_features(batch["images"].to(device))  # (depth, B, D)
        features.append(F.normalize(means[rows].float(), dim=2).half().cpu())
        labels.append(batch["labels"])
    return torch.cat(features, dim=1), torch.cat(labels)


def vote(queries, keys, labels, count):
    """The class of each of `queries` (Q, D), by a vote of the `count` nearest of `keys` (K, D) with
    `labels` (K,): exp(cosine / 0.07) each, as in DINO (arXiv 2104.14294). All are of length 1."""
    close, index = (queries @ keys.T).topk(count)  # (Q, count)
    votes = queries.new_zeros(len(queries), int(labels.max()) + 1)
    return votes.scatter_add_(1, labels[index], (close / 0.07).exp()).argmax(dim=1)


# ---- tables and pictures of a network ------------------------------------------------------------

def confusion(truth, predicted, classes):
    """How many of each class, a row, were taken for each: (classes, classes). -1 does not count."""
    valid = truth >= 0
    pairs = truth[valid] * classes + predicted[valid]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def confusion_table(matrix, classes):
    """The accuracy of each class, or of the 50 with the lowest, and what it is mostly taken for."""
    totals = matrix.sum(axis=1)
    shares = 100 * matrix / totals.clip(min=1)[:, None]
    wrong = shares - np.diag(shares.diagonal())
    accuracy = np.where(totals > 0, shares.diagonal(), np.inf)
    width = max(map(len, classes))
    lines = [f"{'class':{width}}  images  top-1   mostly taken for"]
    for number in sorted(np.argsort(accuracy, kind="stable")[:50]):
        found = wrong[number].argmax()
        line = f"{classes[number]:{width}}  {totals[number]:6.0f}  {shares[number, number]:5.1f}%"
        if wrong[number, found]:
            line += f"  {classes[found]} ({wrong[number, found]:.1f}%)"
        lines.append(line)
    return "\n".join(lines)


@torch.no_grad()
def predict(config):
    """OUT/predictions.csv: the five likeliest classes of each image in the folder --data, and
    OUT/predictions.png, a contact sheet. It needs no options but the files: --weights knows all."""
    config = as_trained(config, *NETWORK, "eval_crop")
    device, dtype = setup_device(config)
    images = folder_images(config.data, [config.out])
    if not len(images):
        raise BadInput(f"--data={config.data}: no folder or tar with images to classify")
    state, arch, known = read_network(config.weights)
    if "head.weight" not in state:
        raise BadInput(f"--weights={config.weights}: holds no classifier; fine-tune it first")
    classes = known.get("classes") or [str(n) for n in range(len(state["head.weight"]))]
    config = replace(config, image_size=arch.image_size, skip_bad_images=True)
    model = Classifier(arch, len(classes)).to(device).eval()
    log(load_weights(model, config.weights, head=True))
    dataset = LabelledViews(images, config, train=False)
    keys = batches_of_all(len(dataset), config.micro_batch)
    loader = make_loader(dataset, keys, config.num_workers, device)
    found = np.zeros((len(dataset), min(5, len(classes)), 2))  # (class, its probability)
    for part, batch in zip(keys, tqdm(loader, "predicting", disable=no_progress_bar())):
        with autocast(device, dtype):
            logits = model(batch["images"].to(device))
        top = logits.float().softmax(dim=1).topk(found.shape[1])
        rows = torch.stack([top.indices, top.values], dim=2).cpu()
        rows[batch["skipped"]] = 0  # it showed the next image
        found[[index for _, index, _ in part]] = rows
    found = np.reshape(all_reduce_sum(*found.flatten().tolist()), found.shape)
    if rank() == 0:
        write_predictions(config.out, images, classes, found)


def write_predictions(out, images, classes, found):
    """`found` (images, k, 2): the likeliest classes with probabilities, or zeros if unreadable."""
    table = [["file"]]
    for place in range(1, found.shape[1] + 1):
        table[0] += [f"class_{place}", f"probability_{place}"]
    shown = []  # (path, caption)
    for path, pairs in zip(images.keys, found):
        if not pairs.any():
            log(f"{path}: skipped, it cannot be read as an image")
            continue
        row = [os.path.relpath(path, images.source)]
        for number, probability in pairs:
            row += [classes[int(number)], f"{probability:.4f}"]
        table.append(row)
        shown.append((path, f"{100 * pairs[0, 1]:.0f}% {row[1]}"))
    text = io.StringIO()
    csv.writer(text).writerows(table)
    with write_atomically(os.path.join(out, "predictions.csv")) as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))
    with write_atomically(os.path.join(out, "predictions.png")) as file:
        contact_sheet(images.read, shown).save(file, "PNG")
    log(f"wrote {out}/predictions.csv and .png: {len(shown):,} images")


def contact_sheet(read, shown):
    """A picture of up to 64 of the images in [(path, text below it)], evenly taken."""
    tiles = []
    for index in evenly(len(shown), 64):
        path, text = shown[index]
        picture = v2.functional.to_pil_image(read(path))
        tile = ImageOps.pad(picture, (124, 124), color="white")
        tile = ImageOps.expand(tile, (2, 2, 2, 18), "white")
        ImageDraw.Draw(tile).text((2, 126), text[:20], fill="black")
        tiles.append(v2.functional.pil_to_tensor(tile))
    return v2.functional.to_pil_image(make_grid(tiles, padding=0, pad_value=255))


def curves(config):
    """OUT/curves.png: a line per run of held-out accuracy against the epoch, or of probes against
    the layer; --task=lengths: of what fine-tuning reached against the steps of the pre-training
    before it. A pattern such as 'out/a*' gives one line, in a band of one standard deviation."""
    task = f"--task={config.task}"
    if not config.runs:
        raise BadInput(f"{task}: name the folders of the runs behind it")
    figure = optional("matplotlib.figure", task).Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    read = read_length if config.task == "lengths" else read_curve
    labels = set()
    for pattern in config.runs:
        folders = sorted(glob.glob(pattern)) or [pattern]
        found, runs = zip(*map(read, folders), strict=True)
        labels.update(found)
        join = set.intersection if read is read_curve else set.union
        places = sorted(join(*map(set, runs)))
        if not places or len(labels) > 1:
            raise BadInput(f"{pattern}: these runs were evaluated at no common epoch or layer")
        values = [[run[place] for run in runs if place in run] for place in places]
        mean = np.array([np.mean(group) for group in values])
        axes.plot(places, mean, marker=".", label=pattern)
        if min(map(len, values)) > 1:
            spread = np.array([np.std(group, ddof=1) for group in values])
            axes.fill_between(places, mean - spread, mean + spread, alpha=0.2)
    axes.set(xlabel=labels.pop(), ylabel="top-1 or mIoU, %")
    axes.grid(alpha=0.3)
    axes.legend()
    path = os.path.join(config.out, f"{config.task}.png")
    with write_atomically(path) as file:
        figure.savefig(file, format="png", dpi=150)
    log("wrote", path)


def read_curve(folder):
    """("epoch", {epoch: accuracy in percent}) of a run, ("layer", {layer: ...}) of a probe."""
    records = read_metrics(os.path.join(folder, "metrics.jsonl"))
    if records and (probed := layer_accuracies(records[-1])):
        return "layer", probed
    curve = {line["epoch"]: 100 * line["val_top1"] for line in records if "val_top1" in line}
    if not curve:
        raise BadInput(f"{folder}: no metrics.jsonl with val_top1 in it; give a run's --out")
    return "epoch", curve


def read_length(folder):
    """("pre-training steps", {steps: accuracy or mIoU in percent}) of a fine-tuned run."""
    records = read_metrics(os.path.join(folder, "metrics.jsonl"))
    reached = [line[name] for line in records for name in ("val_top1", "val_miou") if name in line]
    if not reached:
        raise BadInput(f"{folder}: no metrics.jsonl with val_top1 or val_miou in it")
    weights = read_json(os.path.join(folder, "config.json"))["weights"]
    path = os.path.join(os.path.dirname(weights), "metrics.jsonl")
    before = read_metrics(path) if weights != "none" else [{"step": 0}]
    if not before:
        raise BadInput(f"{folder}: its pre-training left no metrics.jsonl beside {weights}")
    return "pre-training steps", {before[-1]["step"]: 100 * reached[-1]}


@torch.no_grad()
def attention(config):
    """OUT/attention_NAME.png for a picture, or some of a folder or data set, at its own aspect:
    what each head of the last block looks at from one patch, framed in red (section 3.4)."""
    config = as_trained(config, *NETWORK)
    device, _ = setup_device(config)
    arch = read_network(config.weights)[1]
    model = ViT(arch).to(device).eval()
    log(load_weights(model, config.weights))
    patch = arch.patch_size
    glow = torch.tensor([1.0, 0.8, 0.2]).view(3, 1, 1)
    images = local_rank0_first(open_pictures, config.data, arch.image_size, config.out)
    for index, stem in enumerate(images.stems()):
        picture = images.load(index, config.skip_bad_images)[0]
        height, width = fit_size(picture.shape[1:], arch.image_size, patch)
        row, column = height // 2, width // 2
        if config.query:
            numbers = re.fullmatch(r"(\d+),(\d+)", config.query)
            row, column = map(int, numbers.groups()) if numbers else (height, width)
            if row >= height or column >= width:
                raise BadInput(f"--query={config.query}: give row,column below {height},{width}")
        sides = [height * patch, width * patch]
        image = v2.functional.resize(picture, sides, BICUBIC)[None] / 255
        probs = model.attention_probs(normalize(image.to(device), config.norm)).cpu()
        heat = probs[0, :, 1 + row * width + column, 1:]  # from that patch to all: (heads, N)
        heat = heat / heat.amax(dim=1, keepdim=True)
        heat = F.interpolate(heat.view(-1, 1, height, width), scale_factor=patch)
        panels = torch.cat([image, 0.35 * image + 0.65 * heat * glow])  # (1 + heads, 3, H, W)
        corner = torch.tensor([column * patch, row * patch])
        box = torch.cat([corner, corner + patch - 1])[None]
        framed = [draw_bounding_boxes(panel, box, colors="red")[None] for panel in panels]
        titles = ["query"] + [f"head {number}" for number in range(len(heat))]
        path = os.path.join(config.out, f"attention_{stem}.png")
        save_columns(path, dict(zip(titles, framed, strict=True)))
        log("wrote", path)


OBJECTIVES = {"train": Classification, "probe": LinearProbing}
# tasks that need no loop
OTHER_TASKS = {"eval": evaluate_weights, "predict": predict, "knn": knn, "curves": curves,
               "lengths": curves, "attention": attention}

if __name__ == "__main__":
    run(main)
