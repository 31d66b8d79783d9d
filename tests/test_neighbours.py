"""Packages that work with timm's models work with ours, with the same results as for timm's own.

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
from comparing import assert_same, collect, images, make_model, saved_bytes, train_step
from PIL import Image
from torch import nn
from torch.nn.utils import prune

import timm_tresnet
from timm_tresnet import TResNet
from timm_tresnet.utils.images import SAMPLES
from timm_tresnet.variants import ARCHITECTURES

SETTINGS = ["activations", "expansions"]
PHOTO = SAMPLES / "cat.jpg"
WEIGHTS = Path(timm_tresnet.__file__).parent / "weights" / "test_tresnet.r64_cifar10.safetensors"
each_setting = pytest.mark.parametrize("setting", SETTINGS)
scripting_when_imported = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torchvision


def need(module):
    return pytest.importorskip(module, reason=f"{module} is not installed; the extra `neighbours` has it")


def make_network(recompute="activations", **kwargs):
    """`test_tresnet` with its weights, which know ten classes."""
    return timm.create_model("test_tresnet", pretrained=True, recompute=recompute, **kwargs)


def make_builtin(model=None, **kwargs):
    """timm's own TResNet, with the weights of `test_tresnet` or of another network of that width."""
    builtin = timm.models.tresnet.TResNet(**{**ARCHITECTURES["test_tresnet"], "num_classes": 10, **kwargs})
    builtin.load_state_dict((make_network() if model is None else model).state_dict())
    return builtin


class SquaredFeatures(nn.Module):
    """Feature maps, each of which backward needs, as it does where a decoder takes them."""

    def __init__(self, recompute, **kwargs):
        super().__init__()
        self.features = make_network(recompute, features_only=True, out_indices=(1, 2, 3, 4), **kwargs)

    def forward(self, x):
        return torch.stack([feature.square().sum() for feature in self.features(x)])


@pytest.mark.parametrize(
    ("decoder", "settings"),
    [("Unet", {}), ("Unet", {"in_channels": 4}), ("DeepLabV3Plus", {"encoder_output_stride": 16})],
    ids=["unet", "unet_on_four_channels", "dilated_deeplab"],
)
@scripting_when_imported
def test_segmentation_models_train_on_our_features_with_less_memory(decoder, settings):
    smp = need("segmentation_models_pytorch")

    def make(recompute):
        torch.manual_seed(0)  # for the decoder
        settings_ = {"encoder_weights": True, "classes": 2, "recompute": recompute, **settings}
        return getattr(smp, decoder)("tu-test_tresnet", **settings_)

    channels = settings.get("in_channels", 3)
    x = torch.randn(2, channels, 64, 64)
    target = torch.randint(2, (2, 64, 64))

    def step(recompute):
        model = make(recompute)
        torch.manual_seed(0)  # for the dropout of DeepLabV3Plus
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        return collect(model, loss)

    assert_same(step("activations"), step("none"))
    encoder = make("activations").eval().encoder
    assert encoder.out_channels == [channels, 0, 16, 32, 256, 512]
    kwargs = {"in_chans": channels, "output_stride": encoder.output_stride}
    saved = [saved_bytes(make(recompute), x) for recompute in ("none", "activations")]
    alone = [saved_bytes(SquaredFeatures(recompute, **kwargs).train(), x) for recompute in ("none", "activations")]
    assert saved[0] - saved[1] == alone[0] - alone[1] > 0.35 * alone[0]
    expected = make_network(**kwargs).eval()
    maps = expected.forward_intermediates(x, 4, intermediates_only=True)
    torch.testing.assert_close(encoder(x)[2:], maps, rtol=0, atol=0)


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
        maps = model.forward_intermediates(pixels, intermediates_only=True)
        torch.testing.assert_close(list(output.hidden_states), maps, rtol=0, atol=0)
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


@scripting_when_imported
@each_setting
def test_fastai_learner_trains_to_the_same_weights(setting, tmp_path):
    vision = need("fastai.vision.all")
    for index in range(16):
        for color, pixel in {"dark": 40, "light": 200}.items():
            path = tmp_path / color / f"{index}.png"
            path.parent.mkdir(exist_ok=True)
            noise = torch.randint(-20, 20, (64, 64, 3)) + pixel
            Image.fromarray(noise.to(torch.uint8).numpy()).save(path)

    def train(recompute):
        vision.set_seed(0)
        loaders = vision.ImageDataLoaders.from_folder(tmp_path, valid_pct=0.25, seed=0, bs=8, num_workers=0)
        learner = vision.vision_learner(loaders, "test_tresnet", metrics=vision.accuracy, recompute=recompute)
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


class WithLoss(nn.Module):
    """A network as transformers' Trainer takes it."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, pixel_values, labels):
        logits = self.network(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.thorough
@pytest.mark.filterwarnings("default")  # theirs
def test_trainer_of_transformers_compiles_and_trains_as_with_the_builtin_network(tmp_path):
    transformers = need("transformers")
    need("accelerate")
    small = {"layers": (1, 1, 1, 1), "width_factor": 0.125, "num_classes": 10}
    ours = timm.create_model("tresnet_m", recompute="activations", **small)
    builtin = timm.models.tresnet.TResNet(**small)
    builtin.load_state_dict(ours.state_dict())
    examples = [{"pixel_values": x, "labels": index % 10} for index, x in enumerate(images(16, 32))]
    results = []
    for network in (ours, builtin):
        torch.compiler.reset()
        arguments = transformers.TrainingArguments(
            str(tmp_path), torch_compile=True, torch_compile_backend="eager", max_steps=2, logging_steps=1,
            per_device_train_batch_size=8, learning_rate=1e-2, optim="sgd", lr_scheduler_type="constant",
            save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = transformers.Trainer(WithLoss(network), arguments, train_dataset=examples)
        trainer.train()
        results.append([(each["loss"], each["grad_norm"]) for each in trainer.state.log_history if "loss" in each])
    assert len(results[0]) == 2
    assert results[0][0] != results[0][1]
    for actual, expected in zip(*results, strict=True):
        assert actual == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(ours.state_dict(), builtin.state_dict(), rtol=1e-4, atol=1e-5)


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


@scripting_when_imported
def test_torchmetrics_of_our_logits_are_those_of_the_definition_and_of_the_builtin_network():
    classification = need("torchmetrics.classification")
    model, builtin = make_network().eval(), make_builtin().eval()
    x = torch.rand(24, 3, 64, 64)
    labels = torch.randint(2, (24, 10))
    metric, whole = (classification.MultilabelAveragePrecision(num_labels=10, average=None) for _ in range(2))
    with torch.inference_mode():
        for batch, target in zip(x.split(8), labels.split(8), strict=True):
            metric.update(model(batch), target)
        logits = model(x)
        torch.testing.assert_close(metric.compute(), whole(builtin(x), labels))
    for scores, target, value in zip(logits.T, labels.T, metric.compute(), strict=True):
        hits = target[scores.argsort(descending=True)].double()
        precision = hits.cumsum(0) / torch.arange(1, 25)
        torch.testing.assert_close(value.double(), (precision * hits).sum() / hits.sum(), rtol=1e-6, atol=0)


def test_mixin_of_the_hub_pushes_and_loads_a_module_with_ours_inside(hub, run_child, tmp_path):
    (tmp_path / "tagger.py").write_text(
        """
import warnings
import timm
import torch
from huggingface_hub import PyTorchModelHubMixin

warnings.filterwarnings("ignore", "Use 'content=<...>' to upload raw", DeprecationWarning)  # of the client's own upload

class Tagger(torch.nn.Module, PyTorchModelHubMixin):
    def __init__(self, num_classes, recompute="none"):
        super().__init__()
        self.net = timm.create_model("test_tresnet", num_classes=num_classes, recompute=recompute)

    def forward(self, x):
        return self.net(x)

def compute(tagger):
    x = torch.linspace(0, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64)
    loss = tagger.train()(x).square().sum()
    loss.backward()
    return type(tagger.net).__module__, tagger.net.recompute, loss.item()

def run():
    torch.manual_seed(0)
    tagger = Tagger(num_classes=3, recompute="expansions")
    tagger.save_pretrained("folder")
    tagger.push_to_hub("owner/tagger", token="hf_token")
    print(*compute(tagger), sep="\\n")
    print(*compute(Tagger.from_pretrained("folder")), sep="\\n")
    print(*compute(Tagger.from_pretrained("owner/tagger")), sep="\\n")
"""
    )
    lines = run_child("import sys; sys.path.insert(0, '.'); import tagger; tagger.run()").splitlines()
    lines = [line for line in lines if not line.startswith("Loading weights")]  # as the client says
    assert lines[:2] == ["timm_tresnet.models.network", "expansions"]
    assert lines[:3] == lines[3:6] == lines[6:9]
    assert {"config.json", "model.safetensors"} <= {
        path.name for path in list(hub.repositories["owner/tagger"].revisions.values())[-1].iterdir()
    }


@pytest.mark.parametrize(
    "wrapper", ["list", "fx", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("dict", "hook", "getter"))]
)
@each_setting
def test_feature_wrappers_of_timm_train_as_with_plain_pytorch_and_keep_no_more(wrapper, setting):
    x = images()

    class Features(nn.Module):
        def __init__(self, recompute):
            super().__init__()
            self.net = make_network(recompute, features_only=True, feature_cls=wrapper, out_indices=(1, 2, 4)).train()

        def forward(self, x):
            features = self.net(x)
            features = features.values() if isinstance(features, dict) else features
            return torch.cat([feature.flatten(1) for feature in features], 1)

    assert_same(train_step(Features(setting), x), train_step(Features("none"), x))
    assert saved_bytes(Features(setting), x) <= 0.7 * saved_bytes(Features("none"), x)
    builtin = make_builtin().eval()
    stages = [builtin.body[: position + 2] for position in (1, 2, 4)]
    expected = torch.cat([stage(x).flatten(1) for stage in stages], 1)
    torch.testing.assert_close(Features(setting).eval()(x), expected)


@pytest.mark.parametrize("method", ["fx", "hook"])
def test_attention_extract_of_timm_takes_the_gates_and_finds_no_attention(method):
    gates = {}
    for name, model in {"ours": make_network(), "builtin": make_builtin()}.items():
        with pytest.raises(RuntimeError, match="names found matching"):
            timm.utils.AttentionExtract(model, method=method)
        names = ["*.se.gate", "*.se.gate.sigmoid"]  # the second in the graph of timm's, whose gate is no PyTorch module
        gates[name] = timm.utils.AttentionExtract(model, names, method=method)(images())
    assert len(gates["ours"]) == 7  # a block each in the first three stages
    torch.testing.assert_close(list(gates["ours"].values()), list(gates["builtin"].values()))


def explain(model, layer, x, classes):
    """Grad-CAM (arXiv:1610.02391, eq. 1-2) by its formula, without the ReLU."""
    kept = []
    handle = layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    score = model(x)[torch.arange(len(x)), classes].sum()
    handle.remove()
    (grad,) = torch.autograd.grad(score, kept)
    return (grad.mean((2, 3), keepdim=True) * kept[0]).sum(1).detach()


@pytest.mark.parametrize("package", ["captum", "torchcam"])
@pytest.mark.parametrize("stage", ["layer3", "layer4"])
@each_setting
def test_grad_cam_shows_what_the_formula_gives_for_the_builtin_network(setting, stage, package):
    x, classes = images(), [3, 7]
    for training in (False, True):
        model, builtin = make_network(setting).train(training), make_builtin().train(training)
        layer = model.body.get_submodule(stage)
        expected = explain(builtin, builtin.body.get_submodule(stage), x, classes)
        if package == "captum":
            attribution = need("captum.attr").LayerGradCam(model, layer).attribute(x, target=classes)
            torch.testing.assert_close(attribution[:, 0], expected, rtol=1e-4, atol=1e-5)
        else:
            with need("torchcam.methods").GradCAM(model, f"body.{stage}") as extractor:
                (cam,) = extractor(classes, model(x), normalized=False)
            torch.testing.assert_close(cam, expected.relu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["IntegratedGradients", "GuidedBackprop", "DeepLift"])
@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU activations")  # captum, of GuidedBackprop
@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks and attributes on non-linear")  # of DeepLift
def test_captum_attributes_to_pixels_as_with_the_builtin_network(method):
    attr = need("captum.attr")
    model, builtin = make_network().eval(), make_builtin().eval()
    for module in builtin.modules():
        if hasattr(module, "gate"):
            module.gate = nn.Sigmoid()  # DeepLift knows PyTorch's, which ours has, and passes over timm's
    x = images()
    kwargs = {"n_steps": 5} if method == "IntegratedGradients" else {}
    actual, expected = (
        getattr(attr, method)(each).attribute(x.clone().requires_grad_(), target=[3, 7], **kwargs)
        for each in (model, builtin)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def give_channels_nothing_to_do(model, share=0.5):
    """Zero the norms of the first channels inside each block; the network is the same with and without these."""
    for block in blocks_of(model):
        for unit in (block.conv1, block.conv2) if hasattr(block, "conv3") else (block.conv1,):
            idle = int(unit.conv.out_channels * share)
            unit.bn.weight.data[:idle] = 0
            unit.bn.bias.data[:idle] = 0
    return model


def blocks_of(model):
    return [block for stage in list(model.body)[2:] for block in stage]


@each_setting
def test_torch_pruning_takes_out_idle_channels_and_leaves_the_logits(setting):
    pruning = need("torch_pruning")
    model, x = give_channels_nothing_to_do(make_network(setting).eval()), images()
    expected, parameters = model(x).detach(), sum(parameter.numel() for parameter in model.parameters())
    graph = pruning.DependencyGraph().build_dependency(model, example_inputs=x)
    for block in blocks_of(model):
        for unit in (block.conv1, block.conv2) if hasattr(block, "conv3") else (block.conv1,):
            idle = list(range(unit.conv.out_channels // 2))
            graph.get_pruning_group(unit.conv, pruning.prune_conv_out_channels, idle).prune()
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.62 * parameters
    torch.testing.assert_close(model(x), expected)  # the same sums with fewer zeros among them

    plain = copy.deepcopy(model).train()
    plain.set_recompute("none")
    assert_same(train_step(model.train(), x), train_step(plain, x))
    assert saved_bytes(model, x) < 0.6 * saved_bytes(plain, x)


@each_setting
def test_torch_pruning_of_every_layer_leaves_a_network_that_trains_exports_and_takes_a_new_classifier(setting):
    # timm's own cannot be pruned so: the filter of its blur keeps the number of channels it was made with.
    pruning = need("torch_pruning")
    model, x = make_network(setting).eval(), images()
    importance = pruning.importance.GroupMagnitudeImportance(p=2)
    pruning.pruner.BasePruner(model, x, importance, pruning_ratio=0.5, ignored_layers=[model.head.fc]).step()
    assert [block.conv1.conv.out_channels for block in blocks_of(model)] == [8, 8, 16, 16, 32, 32, 32, 64]
    plain = copy.deepcopy(model).train()
    plain.set_recompute("none")
    assert_same(train_step(model.train(), x), train_step(plain, x))
    model.eval()
    expected = model(x)
    torch.testing.assert_close(timm_tresnet.fold_batch_norms(model)(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


@pytest.mark.parametrize("setting", [*SETTINGS, "checkpointing"])
def test_masks_of_pytorch_prune_hold_in_training_whatever_is_recomputed(setting):
    def train(recompute):
        model = make_network("activations" if recompute == "checkpointing" else recompute).train()
        model.set_grad_checkpointing(recompute == "checkpointing")
        weights = [(module, "weight") for module in model.modules() if isinstance(module, nn.Conv2d)]
        prune.global_unstructured(weights, prune.L1Unstructured, amount=0.6)
        results = [train_step(model, images())]
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        results.append(train_step(model, images()))
        for module, name in weights:
            prune.remove(module, name)
        return model.eval(), results

    model, actual = train(setting)
    _, expected = train("none")
    for each in map(assert_same, actual, expected):
        assert each is None
    convolutions = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    zeros = sum((weight == 0).sum().item() for weight in convolutions)
    assert zeros / sum(map(torch.numel, convolutions)) == pytest.approx(0.6, abs=1e-3)
    torch.testing.assert_close(model(images()), make_builtin(model).eval()(images()))


@each_setting
def test_fake_quantised_weights_train_the_same_whatever_is_recomputed(setting):
    quantization = need("torchao.quantization.pt2e")

    class FakeQuantised(nn.Module):
        def __init__(self):
            super().__init__()
            observer = quantization.MovingAveragePerChannelMinMaxObserver
            self.quantise = quantization.FakeQuantize(
                observer, -127, 127, dtype=torch.int8, qscheme=torch.per_channel_symmetric, ch_axis=0
            )

        def forward(self, weight):
            return self.quantise(weight)

    def train(recompute):
        model = make_network(recompute).train()
        for module in list(model.modules()):
            if isinstance(module, nn.Conv2d):
                nn.utils.parametrize.register_parametrization(module, "weight", FakeQuantised())
        return model, train_step(model, images())

    model, actual = train(setting)
    assert_same(actual, train("none")[1])
    floating = make_network().train()
    train_step(floating, images())  # for the running statistics
    weight = model.body.conv1.conv.weight[0]
    assert 8 < len(weight.unique()) <= 255
    with torch.no_grad():
        logits, expected = model.eval()(images()), floating.eval()(images())
    assert (logits - expected).norm() < 0.1 * expected.norm()  # eight bits a weight


def test_exported_network_is_prepared_for_quantisation_as_the_builtin_one_is():
    pt2e = need("torchao.quantization.pt2e")
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    layers, x = (1, 1, 1, 1), images()
    ours = make_model("activations", layers=layers)
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            # torchao 0.18 multiplies and divides by these, so those that are zero, as in a new network, give NaN.
            nn.init.uniform_(module.weight, 0.5, 1.5)

    def train(model):
        quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_qat=True))
        prepared = prepare_qat_pt2e(torch.export.export(model.train(), (x,)).module(), quantizer)
        loss = prepared(x).square().mean()
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in prepared.named_parameters()}
        pt2e.move_exported_model_to_eval(prepared)
        return loss.detach(), gradients, prepared(x).detach()  # converting it takes half a minute

    builtin = make_builtin(ours, layers=layers)
    floating = copy.deepcopy(ours)
    actual = train(ours)
    torch.testing.assert_close(actual, train(builtin))
    assert 0 < abs(actual[0] / floating(x).square().mean() - 1) < 0.2  # eight bits a weight and an activation
