import pytest
import timm
import torch

from timm_tresnet.deployment import running
from timm_tresnet.deployment.running import Runner


@pytest.fixture
def network():
    network = timm.create_model("test_tresnet", pretrained=True).eval()
    network.pretrained_cfg |= {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}
    return network


def test_pixels_are_normalised_and_prepared_images_are_not(network):
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    prepared = (pixels.float() / 255 - mean) / std
    with torch.no_grad():
        expected = network(prepared)
    run = Runner(network)
    torch.testing.assert_close(run(prepared), expected)
    torch.testing.assert_close(run(pixels), expected)


def test_logits_are_float32_without_gradients_whatever_it_computes_in(network):
    images = torch.rand(2, 3, 64, 64)
    expected = Runner(network)(images)
    logits = Runner(network, amp=torch.bfloat16, channels_last=True)(images)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    torch.testing.assert_close(logits, expected, rtol=0.1, atol=0.2)
    assert not torch.equal(logits, expected)


def test_a_compiled_network_sees_batches_of_one_size(network, monkeypatch):
    shapes = []

    def compile_it(model):
        return lambda images: shapes.append(tuple(images.shape)) or model(images)

    monkeypatch.setattr(running, "optimize_for_inference", compile_it)
    images = torch.rand(5, 3, 64, 64)
    logits = Runner(network, compile_for=5)(images[:2])
    assert shapes == [(5, 3, 64, 64)]
    torch.testing.assert_close(logits, Runner(network)(images[:2]))


@pytest.mark.thorough
def test_compiling_changes_nothing_but_rounding(network, monkeypatch):
    """Inductor itself compiles the snippets of docs/inference.md."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, mode, **kwargs: compiler(*args, backend="aot_eager", **kwargs))
    images = torch.rand(3, 3, 64, 64)
    expected = Runner(network)(images)
    torch.testing.assert_close(Runner(network, compile_for=4)(images), expected, rtol=1e-3, atol=1e-4)


def test_callables_that_are_not_modules_run_unchanged(network):
    class Artifact:
        in_chans, pretrained_cfg = 3, network.pretrained_cfg

        def __call__(self, images):
            return images.mean((2, 3))

    assert Runner(Artifact())(torch.ones(2, 3, 8, 8)).tolist() == [[1.0] * 3] * 2
