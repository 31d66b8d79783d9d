"""Packages that take models of timm take ours, and compute with it what they compute with timm's own.

Each test has the real package; it is skipped where that is not installed (the extra `neighbours` has all of them).
"""

import copy
import json
from pathlib import Path

import pytest
import timm
import timm.models.tresnet
import torch
import torch.nn.functional as F
from PIL import Image
from test_rebuild import assert_same, collect, images, saved_bytes

import timm_tresnet
from timm_tresnet import TResNet
from timm_tresnet.tresnet import ARCHITECTURES

SETTINGS = ["activations", "expansions"]
PHOTO = Path(timm_tresnet.__file__).parent / "samples" / "cat.jpg"
WEIGHTS = Path(timm_tresnet.__file__).parent / "weights" / "test_tresnet.r64_cifar10.safetensors"
each_setting = pytest.mark.parametrize("setting", SETTINGS)
scripting_when_imported = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torchvision


def need(module):
    return pytest.importorskip(module, reason=f"{module} is not installed; the extra `neighbours` has it")


def make_network(rebuild="activations", **kwargs):
    """`test_tresnet` with its weights, which know ten classes."""
    return timm.create_model("test_tresnet", pretrained=True, rebuild=rebuild, **kwargs)


def make_builtin(model=None, **kwargs):
    """timm's own TResNet, with the weights of `test_tresnet` or of another network of that width."""
    builtin = timm.models.tresnet.TResNet(**{**ARCHITECTURES["test_tresnet"], "num_classes": 10, **kwargs})
    builtin.load_state_dict((make_network() if model is None else model).state_dict())
    return builtin


# ---- segmentation_models_pytorch


@pytest.mark.parametrize(
    ("decoder", "settings"),
    [("Unet", {}), ("Unet", {"in_channels": 4}), ("DeepLabV3Plus", {"encoder_output_stride": 16})],
    ids=["unet", "unet_on_four_channels", "dilated_deeplab"],
)
@scripting_when_imported
def test_segmentation_models_train_on_our_features_with_less_memory(decoder, settings):
    smp = need("segmentation_models_pytorch")

    def make(rebuild):
        torch.manual_seed(0)  # for the decoder
        settings_ = {"encoder_weights": True, "classes": 2, "rebuild": rebuild, **settings}
        return getattr(smp, decoder)("tu-test_tresnet", **settings_)

    channels = settings.get("in_channels", 3)
    x = torch.randn(2, channels, 64, 64)
    target = torch.randint(2, (2, 64, 64))

    def step(rebuild):
        model = make(rebuild)
        torch.manual_seed(0)  # for the dropout of DeepLabV3Plus
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        return collect(model, loss)

    assert_same(step("activations"), step("none"))
    alone = [saved_bytes(make_network(rebuild, in_chans=channels).train(), x) for rebuild in ("none", "activations")]
    saved = [saved_bytes(make(rebuild), x) for rebuild in ("none", "activations")]
    assert saved[0] - saved[1] > 0.8 * (alone[0] - alone[1])  # the decoder keeps what the stages hand it
    encoder = make("activations").eval().encoder
    assert encoder.out_channels == [channels, 0, 16, 32, 256, 512]
    expected = make_network(in_chans=channels, output_stride=encoder.output_stride).eval()
    assert all(map(torch.equal, encoder(x)[2:], expected.forward_intermediates(x, 4, intermediates_only=True)))


# ---- transformers


@pytest.mark.parametrize("written_by", ["timm", "timm_tresnet", "transformers"])
def test_transformers_read_a_folder_and_classify_and_train_as_timm_does(written_by, tmp_path):
    transformers = need("transformers")
    folder = tmp_path / "folder"
    model = make_network().eval()
    if written_by == "timm_tresnet":
        preprocessing = {"input_size": 64, "crop_pct": 1, "interpolation": "bilinear", "mean": [0] * 3, "std": [1] * 3}
        timm_tresnet.write_folder(timm_tresnet.convert_checkpoint(WEIGHTS, **preprocessing), folder)
    else:
        names = {"label_names": model.pretrained_cfg["label_names"]}
        timm.models.save_for_hf(model, folder, model_config=names, safe_serialization=True)
        # From 1.0.31 on, timm writes the number of classes among the arguments too, and transformers 5.24 hands it to
        # timm.create_model twice: a TypeError for every model, resnet18 too.
        config = json.loads((folder / "config.json").read_text())
        config.get("model_args", {}).pop("num_classes", None)
        (folder / "config.json").write_text(json.dumps(config))
    classifiers = transformers.AutoModelForImageClassification
    if written_by == "transformers":
        classifiers.from_pretrained(folder).save_pretrained(tmp_path / "again")
        folder = tmp_path / "again"
    # A copy, since what is mapped from the file lies in memory aligned otherwise, where sums are in another order.
    wrapper = copy.deepcopy(classifiers.from_pretrained(folder)).eval()
    assert type(wrapper.timm_model) is TResNet

    photo = Image.open(PHOTO).convert("RGB")
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(photo)["pixel_values"]
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    assert torch.equal(pixels, transform(photo)[None])
    with torch.inference_mode():
        output = wrapper(pixels, output_hidden_states=True)
        assert torch.equal(output.logits, model(pixels))
        assert all(map(torch.equal, output.hidden_states, model.forward_intermediates(pixels, intermediates_only=True)))
        torch.testing.assert_close(output.logits, make_builtin().eval()(pixels))
    name = wrapper.config.id2label[output.logits.argmax().item()]
    assert name == ("LABEL_3" if written_by == "timm_tresnet" else "cat")  # the weights alone do not tell names

    x, labels = images(), torch.tensor([3, 7])
    wrapper.train()
    wrapper.activation_checkpointing_enable()
    plain = make_network("none").train()
    loss, expected = wrapper(x, labels=labels).loss, F.cross_entropy(plain(x), labels)
    loss.backward()
    expected.backward()
    assert_same(collect(wrapper.timm_model, loss), collect(plain, expected))


# ---- fastai


@scripting_when_imported
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:fast.*")
@each_setting
def test_fastai_learner_trains_to_the_same_weights(setting, tmp_path):
    vision = need("fastai.vision.all")
    for index in range(16):
        for color, pixel in {"dark": 40, "light": 200}.items():
            path = tmp_path / color / f"{index}.png"
            path.parent.mkdir(exist_ok=True)
            noise = torch.randint(-20, 20, (64, 64, 3)) + pixel
            Image.fromarray(noise.to(torch.uint8).numpy()).save(path)

    def train(rebuild):
        vision.set_seed(0)
        loaders = vision.ImageDataLoaders.from_folder(tmp_path, valid_pct=0.25, seed=0, bs=8, num_workers=0)
        learner = vision.vision_learner(loaders, "test_tresnet", metrics=vision.accuracy, rebuild=rebuild)
        with learner.no_bar(), learner.no_logging():
            learner.fine_tune(1, freeze_epochs=1)
        loss, accuracy = learner.validate()
        return learner.model, loss, accuracy

    actual, loss, accuracy = train(setting)
    expected, expected_loss, _ = train("none")
    assert type(actual[0].model) is TResNet
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(actual.state_dict()[name], value, msg=name)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert accuracy == 1


# ---- Lightning


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")  # Lightning asks PyTorch in the old way
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")  # Lightning advises
@each_setting
def test_lightning_module_trains_in_bfloat16_as_a_plain_loop_does(setting, precision, tmp_path):
    lightning = need("lightning.pytorch")
    batches = [(images(4) + step, torch.tensor([0, 1, 2, 3])) for step in range(3)]

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_network(setting)
            self.losses = []

        def training_step(self, batch, index):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision=precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))

    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    plain = make_network("none").train().to(dtype)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for x, labels in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = F.cross_entropy(plain(x.to(dtype)), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    assert module.losses[0].dtype == losses[0].dtype
    assert torch.equal(torch.stack(module.losses), torch.stack(losses))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(module.net.state_dict()[name], value, msg=name)
