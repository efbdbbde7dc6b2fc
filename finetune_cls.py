"""Fine-tune BEiT on image classification (arXiv 2106.08254, sections 2.6 and 3.1), and probe it.

No arguments is the recipe of table 13: ViT-B from out/run/checkpoint.pt, 100 epochs of ImageNet-1k
at 224 px, batch 1024. The paper reports 83.2% top-1 for it, and 81.8% for DeiT-B from scratch;
neither has been measured with this code. `--data` holds train/CLASS/ and val/CLASS/, or CLASS/, of
which a tenth is held out. On 8 GPUs:
    torchrun --nproc_per_node=8 finetune_cls.py --data=/path/to/imagenet --out=out/imagenet
In minutes on two CPU cores, after `python pretrain.py --preset=shapes --steps=1200`:
    python finetune_cls.py --preset=shapes
What frozen features are worth (appendix D), and what the last block looks at (section 3.4):
    python finetune_cls.py --preset=probe --data=/path/to/imagenet
    python finetune_cls.py --task=knn --data=/path/to/imagenet --labels_per_class=50
    python finetune_cls.py --task=attention --weights=out/shapes/checkpoint.pt --data=picture.jpg
Evaluate, classify any folder of images, or draw the accuracy of several runs against their epochs:
    python finetune_cls.py --task=eval --weights=out/imagenet/checkpoint.pt --data=/path/to/imagenet
    python finetune_cls.py --task=predict --weights=out/imagenet/checkpoint.pt --data=photos
    python finetune_cls.py --task=curves out/imagenet out/scratch --out=out/curves
`--help` lists every option. Run a command again after it was killed, and it goes on where it was.

Read from the top: options, the objective, the loop, evaluation, main; that is all of fine-tuning.
Images, mixing, and what looks at a trained network follow. The plumbing is pretrain.py's.
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
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, make_grid
from tqdm import tqdm

from masking import (
    BICUBIC, DATASETS, NORMS, BadInput, batches_of_all, batches_of_steps, derive_seed,
    folder_images, make_loader, micro_batches, named_images, normalise, open_pictures,
    patch_grid, rank, read_image, world_size,
)
from model import (
    Classifier, LinearProbes, ViT, load_weights, optional, read_network, write_atomically,
)
from pretrain import (
    RUN_CHOICES, Logger, RunConfig, all_reduce_sum, as_trained, autocast, check_range,
    learning_rate, local_rank0_first, log, measure_speed, no_progress_bar, parse_args, prepare,
    read_metrics, run, run_length, save_columns, setup_device, vit_config,
)

# ---- options -------------------------------------------------------------------------------------
# The comment behind a field is its text in --help: why this value, or what goes wrong with another.


@dataclass
class Config(RunConfig):
    data: str = "imagenet"  # folder with train/CLASS/ and val/CLASS/, or with CLASS/
    out: str = "out/imagenet"  # one folder per run: checkpoint.pt, metrics.jsonl, config.json
    weights: str = "out/run/checkpoint.pt"  # what to start from (README); none: from scratch
    epochs: float = 100  # passes over the data; from scratch a ViT needs three times as many
    batch_size: int = 1024  # images per step over ALL processes; for half of it halve the lr
    lr: float = 4e-3  # peak for the head, less below it (layer_decay); the paper tries 2e-3 to 5e-3
    min_lr: float = 1e-6  # where the schedule ends
    warmup_epochs: float = 20  # linear warm-up; without it the new head would upset the backbone
    clip_grad: float = 0.0  # largest gradient norm, 0 for none, as in table 13
    eval_every: int = 1251  # steps between evaluations, here an epoch of ImageNet; 0: at the end
    task: str = "train"  # see the top of the file
    layer_decay: float = 0.65  # ratio of a layer's lr to that of the layer above; 1: no decay
    mixup: float = 0.8  # alpha of mixup (arXiv 1710.09412), 0 for none; for long runs only
    cutmix: float = 1.0  # alpha of cutmix (arXiv 1905.04899), 0 for none; each has half the batches
    smoothing: float = 0.1  # label smoothing; against overconfidence and for noisy labels
    randaug: float = 9.0  # RandAugment's magnitude out of 10, 0 for none; less for tiny images
    randaug_noise: float = 0.5  # standard deviation of that magnitude from operation to operation
    erasing: float = 0.25  # probability that a rectangle of the image becomes noise
    repeats: int = 3  # views of an image per batch: repeated augmentation (arXiv 1902.05509)
    crop_min: float = 0.08  # least area of a crop; raise it where images are tiny
    eval_crop: float = 0.875  # share of the side that evaluation sees; 1 at 384 px or tiny images
    labels_per_class: int = 0  # train on this many images per class, drawn by the seed; 0: all
    sam_rho: float = 0.0  # radius of sharpness-aware minimisation, such as 0.05; doubles the time
    probe_layer: int = 0  # layer that --task=probe and knn look at, from 1; 0: each of them
    neighbours: int = 20  # of --task=knn; more of them smooth over rare classes
    query: str = ""  # row,column of the patch that --task=attention looks from; empty: the middle
    runs: tuple = ()  # the folders that --task=curves draws


# What differs from the recipe
LARGE = {"size": "large", "layer_decay": 0.75, "repeats": 1}
IMAGENET384 = {
    "image_size": 384,
    "weights": "out/imagenet/checkpoint.pt",
    "out": "out/imagenet384",
    "epochs": 10,
    "lr": 4e-4,
    "warmup_epochs": 1,
    "eval_crop": 1.0,
    "micro_batch": 32,
}
CIFAR100 = {
    "data": "cifar100",
    "out": "out/cifar100_cls",
    "epochs": 150,
    "batch_size": 512,
    "weight_decay": 0.3,
    "erasing": 0.0,
    "eval_crop": 1.0,
    "eval_every": 97,
}
PLAIN = {
    "mixup": 0.0,
    "cutmix": 0.0,
    "smoothing": 0.0,
    "randaug": 0.0,
    "erasing": 0.0,
    "repeats": 1,
}
PROBE = {
    **PLAIN,
    "task": "probe",
    "epochs": 50,
    "lr": 4e-3,
    "weight_decay": 1e-4,
    "warmup_epochs": 0,
    "drop_path": 0.0,
}
CIFAR10 = {
    **PLAIN,
    "data": "cifar10",
    "weights": "out/cifar10/checkpoint.pt",
    "out": "out/cifar10_cls",
    "size": "nano",
    "image_size": 32,
    "patch_size": 4,
    "epochs": 30,
    "batch_size": 64,
    "lr": 2e-3,
    "layer_decay": 0.75,
    "warmup_epochs": 2,
    "smoothing": 0.1,
    "crop_min": 0.4,
    "eval_crop": 1.0,
    "num_workers": 2,
    "log_every": 25,
    "eval_every": 781,
    "save_every": 500,
}
SHAPES = {
    **CIFAR10,
    "data": "shapes",
    "weights": "out/shapes/checkpoint.pt",
    "out": "out/shapes_cls",
    "image_size": 64,
    "patch_size": 8,
    "epochs": 25,
    "warmup_epochs": 5,
    "crop_min": 0.5,
    "labels_per_class": 100,
    "eval_every": 100,
}
TINY_PROBE = {**PROBE, "epochs": 10, "batch_size": 256}
PRESETS = {
    "imagenet": {},
    "large": {**LARGE, "out": "out/large", "epochs": 50, "warmup_epochs": 5},
    "imagenet384": IMAGENET384,
    "large384": {
        **IMAGENET384,
        **LARGE,
        "weights": "out/large/checkpoint.pt",
        "out": "out/large384",
    },
    "probe": {**PROBE, "out": "out/imagenet_probe"},
    "cifar100": CIFAR100,
    "cifar100_probe": {**CIFAR100, **PROBE, "out": "out/cifar100_probe", "batch_size": 1024},
    "cifar10": CIFAR10,
    "cifar10_probe": {**CIFAR10, **TINY_PROBE, "out": "out/cifar10_probe"},
    "shapes": SHAPES,
    "shapes_probe": {**SHAPES, **TINY_PROBE, "out": "out/shapes_probe", "labels_per_class": 0},
}

# ---- the objective -------------------------------------------------------------------------------


class Classification(nn.Module):
    """Cross entropy with label smoothing, a mean over the images of the global batch."""

    def __init__(self, config, classes):
        super().__init__()
        self.classes = classes  # their names
        self.smoothing = config.smoothing
        self.model = self.make_model(config, len(classes))
        if config.weights != "none":
            log(load_weights(self.model, config.weights, head=config.task == "eval"))

    def make_model(self, config, num_classes):
        return Classifier(vit_config(config, shared=False), num_classes)

    def denominators(self, batch):
        return [len(batch["images"])]

    def forward(self, batch, denominators):
        """This batch's share of the mean; `labels` are (B,) int64, or (B, classes) when mixed."""
        logits = self.model(batch["images"]).float()  # (B, classes)
        loss = F.cross_entropy(logits, batch["labels"], label_smoothing=self.smoothing)
        return loss * (len(logits) / denominators[0])

    def eval_sums(self, batch):
        """Sums over a batch: the loss, and how many labels are first or among the first five."""
        return self.score(self.model(batch["images"]).float(), batch["labels"])

    def score(self, logits, labels):
        top5 = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return {"loss": loss, "top1": top5[:, 0].sum(), "top5": top5.sum()}

    def finish(self, sums, denominators):
        return {name: value / denominators[0] for name, value in sums.items()}


# ---- the loop ------------------------------------------------------------------------------------


def train(config, objective_class=Classification):
    """One run, from its checkpoint if there is one. Returns whether it is done."""
    device, dtype = setup_device(config)
    train_images, val_images = local_rank0_first(open_labelled, config)
    steps, steps_per_epoch, warmup = run_length(config, len(train_images))

    torch.manual_seed(config.seed)
    num_classes = len(train_images.classes)
    objective = objective_class(config, train_images.classes).to(device)
    dataset = LabelledViews(train_images, config, train=True)
    val_dataset = LabelledViews(val_images, config, train=False)
    model, optimizer, scaler, save, start = prepare(objective, train_images, config, device, dtype,
                                                    config.layer_decay)
    log(f"{config.task} into {config.out}: step {start} of {steps}, {steps_per_epoch} per epoch, "
        f"warm-up {warmup}; {len(dataset):,} images, {len(val_dataset):,} held out, "
        f"{num_classes} classes, {100 * most_frequent(val_images):.1f}% in the most frequent one")

    batches = batches_of_steps(range(start, steps), len(dataset), config.batch_size, config.seed,
                               config.repeats)
    loader = make_loader(dataset, batches, config.num_workers, device)
    val_batches = batches_of_all(len(val_dataset), config.micro_batch)
    val_loader = make_loader(val_dataset, val_batches, config.num_workers, device)
    logger = Logger(config, train_images, start, steps, steps_per_epoch)

    for step, batch in enumerate(loader, start):
        # What every process has to know before it starts, in one exchange between the CPUs: what
        # the sums are divided by, and whether a process was asked to stop.
        *denominators, stop = all_reduce_sum(*objective.denominators(batch), logger.stop)
        if stop:
            break
        lr = learning_rate(config, step, steps, warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        seed = derive_seed(config.seed, step, rank())
        mixed = mix(to_device(batch, device), config, num_classes, seed)
        torch.manual_seed(seed)  # for stochastic depth
        metrics = {}
        micros = micro_batches(mixed, config.micro_batch)
        for number, micro in enumerate(micros, 1):
            model.require_backward_grad_sync = number == len(micros)  # DDP's switch
            with autocast(device, dtype):
                loss = model(micro, denominators)
            # each loss is its share of the global mean, to be added up; DDP averages gradients over
            # the processes, so this undoes its division
            scaler.scale(loss * world_size()).backward()
            metrics["loss"] = metrics.get("loss", 0) + loss.detach()
        if config.sam_rho:
            sam_gradients(model, micros, denominators, scaler, config, dtype, seed)
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
            record |= evaluate(objective, val_loader, device, dtype)
            objective.train()
        logger.write(record)
        if to_save:
            save(logger.done)
    return logger.close(save)


@torch.no_grad()
def evaluate(objective, loader, device, dtype):
    """Means over the held-out images, each counted once whatever the number of processes: val_*."""
    sums = {}
    for batch in loader:
        with autocast(device, dtype):
            parts = objective.eval_sums(to_device(batch, device))
        for name, value in parts.items():
            sums[name] = sums.get(name, 0) + value.flatten().cpu().double()
    sums = {name: np.array(all_reduce_sum(*value.tolist())) for name, value in sums.items()}
    metrics = objective.finish(sums, [len(loader.dataset)])
    return {f"val_{name}": float(np.squeeze(value)) for name, value in metrics.items()}


def evaluate_weights(config):
    """--task=eval: the metrics of a fine-tuned network, and what it confuses."""
    device, dtype = setup_device(config)
    classes = read_network(config.weights)[2].get("classes")
    val_images = local_rank0_first(open_labelled, config, classes)[1]
    objective = Evaluation(config, val_images.classes).to(device).eval()
    dataset = LabelledViews(val_images, config, train=False)
    keys = batches_of_all(len(dataset), config.micro_batch)
    loader = make_loader(dataset, keys, config.num_workers, device)
    metrics = evaluate(objective, loader, device, dtype)
    log(confusion_table(objective.confusion, objective.classes))
    log(f"{len(dataset):,} images", *(f"{k} {v:.6g}" for k, v in metrics.items()))
    return metrics


def check(config):
    """Raise BadInput for values that mean nothing, before anything is loaded."""
    depth = vit_config(config, shared=False).depth  # says so if there is no such network
    if config.weights == "none" and config.task != "train":
        raise BadInput(f"--task={config.task}: give --weights=FILE, what it is to look at")
    check_range(config, 1, math.inf, "repeats", "neighbours")
    check_range(config, 0, math.inf, "mixup", "cutmix", "randaug_noise", "labels_per_class",
                "sam_rho")
    check_range(config, 0.01, 1, "eval_crop")
    check_range(config, 0, 0.99, "smoothing")
    check_range(config, 0, 1, "erasing")
    check_range(config, 0, 10, "randaug")
    check_range(config, 0, depth, "probe_layer")


def main(argv=None):
    config = parse_args(Config, PRESETS, {**RUN_CHOICES, "task": TASKS}, argv, __doc__)
    if config.runs and config.task != "curves":
        raise BadInput(f"{config.runs[0]}: is no option; those are --NAME=VALUE")
    if config.task in ("eval", "predict", "knn") and config.weights != "none":
        config = as_trained(config, "eval_crop")
    check(config)
    return bench(config) if config.bench else TASKS[config.task](config)


# ==== A first reading can stop here: above is all of fine-tuning ==================================

# ---- labelled images -----------------------------------------------------------------------------


def open_labelled(config, classes=None):
    """(training images, held-out ones), with labels, of --data: a name in DATASETS, or a folder
    with train/CLASS/ and val/CLASS/, or with CLASS/, where a tenth is held out. The labels of a
    folder number `classes`, or else its classes. --task=eval needs no train/."""
    train_folder = os.path.join(config.data, "train")
    val_folder = os.path.join(config.data, "val")
    if named := named_images(config.data, config.image_size):
        train, val = named
    elif os.path.isdir(train_folder) or os.path.isdir(val_folder):
        train = val = open_classes(val_folder, classes)
        if config.task != "eval":
            train = open_classes(train_folder, classes, without=val.keys)
    else:
        images = open_classes(config.data, classes)
        val, train = images.split(max(1, len(images) // 10))
    if not train.read_label or not val.read_label:
        raise BadInput(f"--data={config.data}: has no labels")
    if odd := set(train.classes) ^ set(val.classes):
        raise BadInput(f"--data={config.data}: {len(train.classes)} classes in train/, "
                       f"{len(val.classes)} in val/; {min(odd)} is in one only")
    if len(val) < world_size():
        raise BadInput(f"--data={config.data}: {len(val)} held-out images are too few")
    if config.labels_per_class:
        labels = np.array([train.read_label(key) for key in train.keys])
        train = train.subset(few_of_each(labels, config.labels_per_class, config.seed))
    return train, val


def open_classes(where, classes=None, without=()):
    """The images of where/CLASS/, less those of the paths in `without`. Labels number `classes`,
    or else the folders in the order of their names."""
    images = folder_images(where, without)
    if not len(images):
        raise BadInput(f"{where}: no such folder, or no images in it; --data holds train/CLASS/ "
                       f"and val/CLASS/, or CLASS/, or is one of {', '.join(DATASETS)}")
    names = {}  # of the classes, by path
    for path in images.keys:
        names[path], _, rest = os.path.relpath(path, where).partition(os.sep)
        if not rest:
            raise BadInput(f"{path}: is in no class; {where} should hold a folder per class")
    found = sorted(set(names.values()))
    classes = classes or found
    numbers = {name: number for number, name in enumerate(classes)}
    for name in found:
        if name not in numbers:
            raise BadInput(f"{where}/{name}: is none of the classes that --weights was trained on: "
                           f"{', '.join(classes[:10])}")
    labels = {path: numbers[name] for path, name in names.items()}
    return replace(images, classes=classes, read_label=labels.__getitem__)


def most_frequent(images):
    """The share of the most frequent class: the accuracy of always naming that."""
    counts = np.bincount([int(images.read_label(key)) for key in images.keys])
    return counts.max() / counts.sum()


def few_of_each(labels, count, seed):
    """The indices of `count` labels of each class, drawn by the seed, in order."""
    order = np.random.default_rng(seed).permutation(len(labels))
    kept = [order[labels[order] == label][:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(kept)).tolist()


class LabelledViews(Dataset):
    """dataset[epoch, index] is a dict, all of it a function of (seed, epoch, index):
    images   (3, H, W), normalised float32
    labels   the number of its class; -1 where there are no labels
    skipped  whether it shows the next image because this one is unreadable
    """

    def __init__(self, images, config, train):
        self.images = images
        self.config = config
        size = config.image_size
        if train:
            crop = v2.RandomResizedCrop(size, (config.crop_min, 1.0), interpolation=BICUBIC)
            steps = [crop, v2.RandomHorizontalFlip()]
            if config.randaug:
                augment = functools.partial(rand_augment, config.randaug, config.randaug_noise)
                steps += [v2.ToPILImage(), augment]  # tensors cannot be turned bicubically
        else:  # with Pillow, as other libraries evaluate
            steps = [v2.ToPILImage(), centre_crop(size, config.eval_crop)]
        steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        steps += [v2.Normalize(*NORMS[config.norm])]
        if train and config.erasing:
            steps += [v2.RandomErasing(config.erasing, (0.02, 1 / 3), value="random")]
        self.transform = v2.Compose(steps)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        epoch, index = key
        image, found = self.images.load(index, self.config.skip_bad_images)
        label = -1
        if self.images.read_label:
            label = int(self.images.read_label(self.images.keys[found]))
        torch.default_generator.manual_seed(derive_seed(self.config.seed, epoch, index))
        return {"images": self.transform(image), "labels": label, "skipped": found != index}


def centre_crop(size, share):
    """The middle of an image, which is `share` of its shorter side; with 1, the whole image."""
    if share == 1:
        return v2.Resize((size, size), BICUBIC)
    return v2.Compose([v2.Resize(round(size / share), BICUBIC), v2.CenterCrop(size)])


def rand_augment(magnitude, noise, image):
    """RandAugment as table 13's runs had it (timm's rand-m9-mstd0.5): two operations, each left out
    half of the time, of a magnitude around 9 of 10. torchvision counts 31 steps, from 0 to 30."""
    grey = [124, 116, 104]  # ImageNet's mean
    for _ in range(2):
        step = int((3 * torch.normal(magnitude, noise, ())).round().clamp(0, 30))
        if torch.rand(()) < 0.5:
            image = v2.RandAugment(1, step, interpolation=BICUBIC, fill=grey)(image)
    return image


def to_device(batch, device):
    return {name: batch[name].to(device, non_blocking=True) for name in ("images", "labels")}


def mix(batch, config, num_classes, seed):
    """Mixup or cutmix of each image with the one before it, drawn by the seed; labels become soft,
    (B, classes)."""
    alphas = {v2.MixUp: config.mixup, v2.CutMix: config.cutmix}
    kinds = [kind(alpha=a, num_classes=num_classes) for kind, a in alphas.items() if a]
    torch.manual_seed(seed)
    return v2.RandomChoice(kinds)(batch) if kinds else batch


def bench(config):
    """--bench: how fast images are loaded and learnt from."""
    device, dtype = setup_device(config)
    images = local_rank0_first(open_labelled, config)[0]
    objective = Classification(config, images.classes).to(device)
    dataset = LabelledViews(images, config, train=True)

    def to_inputs(batch):
        return mix(to_device(batch, device), config, len(images.classes), config.seed)

    def loss_of(model, inputs):
        return model(inputs, objective.denominators(inputs))

    measure_speed(config, objective, dataset, device, dtype, to_inputs, loss_of)


# ---- sharpness-aware minimisation ----------------------------------------------------------------


def sam_gradients(model, micros, denominators, scaler, config, dtype, seed):
    """Replace the gradients by those at the worst place near the weights (arXiv 2010.01412)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = sam_perturb(trained, config.sam_rho)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)  # for the same stochastic depth
    for number, micro in enumerate(micros, 1):
        model.require_backward_grad_sync = number == len(micros)
        with autocast(micro["images"].device, dtype):
            loss = model(micro, denominators)
        scaler.scale(loss * world_size()).backward()
    with torch.no_grad():
        for parameter, value in zip(trained, before, strict=True):
            parameter.copy_(value)


@torch.no_grad()
def sam_perturb(parameters, rho):
    """Move the weights w to w + rho * g / |g|, the worst place around them (eq. 2), and return them
    as they were. A gradient that float16 made infinite moves nothing."""
    before = [parameter.clone() for parameter in parameters]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    scale = torch.where(norm.isfinite(), rho / (norm + 1e-12), 0.0)
    for parameter in parameters:
        parameter.add_(parameter.grad.nan_to_num(0.0, 0.0, 0.0) * scale)
    return before


# ---- frozen features: probes and nearest neighbours ----------------------------------------------


class LinearProbing(Classification):
    """A linear classifier per layer of a frozen network (appendix D): the mean of their losses. The
    metrics are the best layer's; each layer's accuracy is `top1_layer_N`."""

    def make_model(self, config, num_classes):
        arch = vit_config(config, shared=False)
        return LinearProbes(arch, num_classes, probed_layers(config, arch))

    def forward(self, batch, denominators):
        logits = self.model(batch["images"]).float()  # (layers, B, classes)
        labels = batch["labels"].repeat(len(logits))  # (layers * B,)
        loss = F.cross_entropy(logits.flatten(0, 1), labels)
        return loss * (logits.shape[1] / denominators[0])

    def score(self, logits, labels):
        return torch.vmap(super().score, (0, None))(logits, labels)  # sums of (layers,)

    def finish(self, sums, denominators):
        means = super().finish(sums, denominators)
        best = means["top1"].argmax()
        metrics = {name: value[best] for name, value in means.items()}
        for layer, value in zip(self.model.probed, means["top1"], strict=True):
            metrics[f"top1_layer_{layer}"] = value
        return metrics


def probed_layers(config, arch):
    return [config.probe_layer] if config.probe_layer else list(range(1, arch.depth + 1))


def probe(config):
    """--task=probe: train the classifiers, and print the accuracy of each."""
    for name, plain in PLAIN.items():
        if getattr(config, name) != plain:
            raise BadInput(f"--task=probe --{name}={getattr(config, name)}: a probe has random "
                           "crops and flips only (appendix D); give --preset=probe, or another "
                           "that ends so")
    done = train(config, LinearProbing)
    if done and rank() == 0:
        print_table(read_metrics(os.path.join(config.out, "metrics.jsonl"))[-1])
    return done


def print_table(metrics):
    """The accuracy of each layer's features."""
    log("layer  top-1")
    for layer, accuracy in layer_accuracies(metrics).items():
        log(f"{layer:>5}  {accuracy:5.2f}%")


def layer_accuracies(metrics):
    """{layer: held-out accuracy in percent} of a probe or of nearest neighbours."""
    prefix = "val_top1_layer_"
    return {int(name.removeprefix(prefix)): 100 * value for name, value in metrics.items()
            if name.startswith(prefix)}


@torch.no_grad()
def knn(config):
    """--task=knn: accuracy of a vote of the nearest training images, by their mean patch features:
    it needs no training, so that one can watch a pre-training improve."""
    if world_size() > 1:
        raise BadInput("--task=knn runs in one process: start it without torchrun")
    device, dtype = setup_device(config)
    train_images, val_images = open_labelled(config)
    model = ViT(vit_config(config, shared=False))
    log(load_weights(model, config.weights))
    model.to(device).eval()
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
    print_table(metrics)
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


# ---- what a classifier says ----------------------------------------------------------------------


def confusion(truth, predicted, classes):
    """(classes, classes) int64: how many of each class, a row, were taken for each. A truth below 0
    does not count."""
    valid = truth >= 0
    pairs = truth[valid] * classes + predicted[valid]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


class Evaluation(Classification):
    """Classification that also counts what each class is taken for, in `confusion`."""

    def score(self, logits, labels):
        matrix = confusion(labels, logits.argmax(dim=1), len(self.classes))
        return {**super().score(logits, labels), "confusion": matrix}

    def finish(self, sums, denominators):
        self.confusion = sums.pop("confusion").reshape(len(self.classes), -1).astype(int)
        return super().finish(sums, denominators)


def confusion_table(matrix, classes):
    """The accuracy of up to 50 classes and what each is mostly taken for, or the 20 pairs that are
    confused most; `matrix` as in `confusion`."""
    totals = matrix.sum(axis=1)
    shares = 100 * matrix / totals.clip(min=1)[:, None]
    wrong = matrix - np.diag(matrix.diagonal())
    width = max(map(len, classes))
    many = len(classes) > 50
    if many:
        lines = [f"{'class':{width}}  taken for"]
        largest = np.argsort(-wrong, axis=None, kind="stable")[:20]
        pairs = zip(*np.unravel_index(largest, wrong.shape))
    else:
        lines = [f"{'class':{width}}  images  top-1   mostly taken for"]
        pairs = enumerate(wrong.argmax(axis=1))
    for true, found in pairs:
        line = f"{classes[true]:{width}}"
        if not many:
            line += f"  {totals[true]:>6}  {shares[true, true]:5.1f}%"
        if wrong[true, found]:
            line += f"  {classes[found]} ({shares[true, found]:.1f}%)"
        lines.append(line)
    return "\n".join(lines)


@torch.no_grad()
def predict(config):
    """OUT/predictions.csv: the five likeliest classes of each image in the folder --data, and
    OUT/predictions.png, a contact sheet. The network, and how it wants to see images, are read from
    --weights."""
    device, dtype = setup_device(config)
    images = folder_images(config.data)
    if not len(images):
        raise BadInput(f"--data={config.data}: no folder with images to classify")
    state, arch, known = read_network(config.weights)
    if "head.weight" not in state:
        raise BadInput(f"--weights={config.weights}: holds no classifier; fine-tune it first")
    classes = known.get("classes") or [str(n) for n in range(len(state["head.weight"]))]
    config = replace(config, image_size=arch.image_size, skip_bad_images=True)
    model = Classifier(arch, len(classes))
    log(load_weights(model, config.weights, head=True))
    model.to(device).eval()

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
        found[[index for _, index in part]] = rows
    found = np.reshape(all_reduce_sum(*found.flatten().tolist()), found.shape)
    if rank() == 0:
        write_predictions(config.out, images, classes, found)


def write_predictions(out, images, classes, found):
    """`found` are (images, k, 2): the k likeliest classes, each with its probability, or zeros for
    an unreadable image."""
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
    path = os.path.join(out, "predictions.csv")
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
    log(f"wrote {path}: {len(shown):,} images")
    path = os.path.join(out, "predictions.png")
    write_atomically(path, functools.partial(contact_sheet(shown).save, format="PNG"))
    log(f"wrote {path}")


def contact_sheet(shown):
    """A picture of up to 64 of the images in [(path, text below it)], evenly taken."""
    tiles = []
    for index in np.linspace(0, len(shown) - 1, min(64, len(shown))).astype(int):
        path, text = shown[index]
        picture = v2.functional.to_pil_image(read_image(path))
        tile = ImageOps.pad(picture, (124, 124), color="white")
        tile = ImageOps.expand(tile, (2, 2, 2, 18), "white")
        ImageDraw.Draw(tile).text((2, 126), text[:20], fill="black")
        tiles.append(v2.functional.pil_to_tensor(tile))
    return v2.functional.to_pil_image(make_grid(tiles, padding=0, pad_value=255))


# ---- pictures ------------------------------------------------------------------------------------


def curves(config):
    """OUT/curves.png: held-out accuracy against the epoch, a line per run, or of probes against the
    layer. Runs that a pattern such as 'out/a*' matches are one line: their mean, in a band of one
    standard deviation."""
    if not config.runs:
        raise BadInput("--task=curves: name the folders of the runs behind it")
    figure = optional("matplotlib.figure", "--task=curves").Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    labels = set()
    for pattern in config.runs:
        runs = []
        for folder in sorted(glob.glob(pattern)) or [pattern]:
            label, curve = read_curve(folder)
            labels.add(label)
            runs.append(curve)
        shared = sorted(set.intersection(*map(set, runs)))
        if not shared or len(labels) > 1:
            raise BadInput(f"{pattern}: these runs were evaluated at no common epoch or layer")
        values = np.array([[run[place] for place in shared] for run in runs])
        mean = values.mean(axis=0)
        axes.plot(shared, mean, marker=".", label=pattern)
        if len(runs) > 1:
            spread = values.std(axis=0, ddof=1)
            axes.fill_between(shared, mean - spread, mean + spread, alpha=0.2)
    axes.set(xlabel=labels.pop(), ylabel="top-1 accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend()
    path = os.path.join(config.out, "curves.png")
    write_atomically(path, functools.partial(figure.savefig, format="png", dpi=150))
    log("wrote", path)


def read_curve(folder):
    """("epoch", {epoch: held-out accuracy in percent}) of a run, ("layer", {layer: ...}) of a
    probe."""
    try:
        records = read_metrics(os.path.join(folder, "metrics.jsonl"))
    except ValueError:  # no JSON
        records = []
    probed = layer_accuracies(records[-1]) if records else {}
    if probed:
        return "layer", probed
    curve = {line["epoch"]: 100 * line["val_top1"] for line in records if "val_top1" in line}
    if not curve:
        raise BadInput(f"{folder}: no metrics.jsonl with val_top1 in it; give a run's --out")
    return "epoch", curve


@torch.no_grad()
def attention(config):
    """OUT/attention_NAME.png for a picture, or some of a folder or data set, at its own aspect:
    what each head of the last block looks at from one patch, framed in red (section 3.4)."""
    device, _ = setup_device(config)
    arch = read_network(config.weights)[1]
    model = ViT(arch).to(device).eval()
    log(load_weights(model, config.weights))
    patch = arch.patch_size
    glow = torch.tensor([1.0, 0.8, 0.2]).view(3, 1, 1)
    images = local_rank0_first(open_pictures, config.data, arch.image_size)
    for index in range(len(images)):
        picture = images.load(index, config.skip_bad_images)[0]
        height, width = patch_grid(picture.shape[1:], arch.image_size, patch)
        row, column = query_patch(config.query, height, width)
        sides = [height * patch, width * patch]
        image = v2.functional.resize(picture, sides, BICUBIC)[None] / 255
        probs = model.attention_probs(normalise(image.to(device), config.norm)).cpu()
        heat = probs[0, :, 1 + row * width + column, 1:]  # from that patch to all: (heads, N)
        heat = heat / heat.amax(dim=1, keepdim=True)
        heat = F.interpolate(heat.view(-1, 1, height, width), scale_factor=patch)
        panels = torch.cat([image, 0.35 * image + 0.65 * heat * glow])  # (1 + heads, 3, H, W)
        corner = torch.tensor([column * patch, row * patch])
        box = torch.cat([corner, corner + patch - 1])[None]
        framed = [draw_bounding_boxes(panel, box, colors="red")[None] for panel in panels]
        titles = ["query"] + [f"head {number}" for number in range(len(heat))]
        path = os.path.join(config.out, f"attention_{images.stem(index)}.png")
        save_columns(path, dict(zip(titles, framed, strict=True)))
        log("wrote", path)


def query_patch(query, height, width):
    """(row, column) of --query on a grid of patches; its middle if there is none."""
    if not query:
        return height // 2, width // 2
    numbers = re.fullmatch(r"(\d+),(\d+)", query)
    row, column = map(int, numbers.groups()) if numbers else (height, width)
    if row >= height or column >= width:
        raise BadInput(f"--query={query}: give row,column, up to {height - 1},{width - 1}")
    return row, column


TASKS = {
    "train": train,
    "eval": evaluate_weights,
    "predict": predict,
    "probe": probe,
    "knn": knn,
    "curves": curves,
    "attention": attention,
}

if __name__ == "__main__":
    run(main)
