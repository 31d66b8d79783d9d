import reference
import torch

from timm_tresnet.models.layers import SqueezeExcite


def test_squeeze_excite_gates_channels_by_their_means():
    layer = SqueezeExcite(6, 4, dtype=torch.float64)
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    parameters = (layer.fc1.weight, layer.fc1.bias, layer.fc2.weight, layer.fc2.bias)
    torch.testing.assert_close(layer(x), reference.squeeze_excite(x, *parameters))
