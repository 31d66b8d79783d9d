"""User-defined modules in each position of the network; some edit tensors unnoticed by autograd."""

import torch
import torch.nn.functional as F
from comparing import train_step
from torch import nn
from users import MODIFIED, everywhere, inputs, module_in_stage, same_as_plain, shortcut


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return F.leaky_relu(x, 0.1 * self.calls)


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.3))

    def forward(self, x):
        return F.silu(x * self.gain)


class MoreLeaky(nn.LeakyReLU):
    def forward(self, x):
        return super().forward(x) * 0.5 + 0.1


class MoreReLU(nn.ReLU):
    def forward(self, x):
        return super().forward(x).square()


class DataEdit(nn.Module):
    def forward(self, x):
        y = F.relu(x)
        y.data.mul_(-0.5)
        return y + 0


class DataEditBoth(nn.Module):
    def forward(self, x):
        y = F.relu(x)
        y.data.mul_(-0.5)
        return y + x


class DataEditOfInput(nn.Module):
    def forward(self, x):
        x.data.mul_(-0.5)
        return F.silu(x)


class NoGradEditOfSaved(nn.Module):  # an error
    def forward(self, x):
        y = F.relu(x)
        with torch.no_grad():
            y.mul_(2)
        return y + y


class DetachEditOfSaved(nn.Module):  # an error
    def forward(self, x):
        a = x + 1
        y = F.silu(a)
        a.detach().mul_(2)
        return y + y


class ProductEdited(nn.Module):  # an error
    def forward(self, x):
        gate = x.mean((2, 3), keepdim=True).exp2() + 1
        y = x * gate
        with torch.no_grad():
            gate.mul_(2)
        return y + y


class NoGradEditOfInput(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            x.clamp_(max=0.5)
        return F.leaky_relu(x, 0.2)


class NoGradEditOfUnsaved(nn.Module):
    def forward(self, x):
        y = x + 1
        with torch.no_grad():
            y.clamp_(max=0.5)
        return F.leaky_relu(y, 0.2) + y


class Long(nn.Module):
    def forward(self, x):
        for _ in range(600):
            x = F.leaky_relu(x, 0.999)
        return x


class OverwritesSaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x * 2
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        x.mul_(0)
        return grad * 2


class OverwritingModule(nn.Module):
    def forward(self, x):
        return OverwritesSaved.apply(x)


class ZeroesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        ctx.saved_tensors[0].data.zero_()
        return grad * 2


class ZeroingModule(nn.Module):
    def forward(self, x):
        return ZeroesInBackward.apply(x)


class SparseSaving(nn.Module):
    def forward(self, x):
        sparse = torch.eye(x.shape[1]).to_sparse().requires_grad_()
        flat = x.permute(1, 0, 2, 3).reshape(x.shape[1], -1)
        return torch.sparse.mm(sparse, flat).reshape(x.permute(1, 0, 2, 3).shape).permute(1, 0, 2, 3)


class SaveOnCpu(nn.Module):
    def forward(self, x):
        with torch.autograd.graph.save_on_cpu():
            return F.silu(x).square()


class Backwards(nn.Module):
    """Asks for gradients inside its forward, as energy-based models do."""

    def forward(self, x):
        z = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(F.silu(z).sum(), z)
        return x * grad


class Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.recompute = "a user's own attribute"
        ctx.save_for_backward(x)
        return x * 3

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


class AgainModule(nn.Module):
    def forward(self, x):
        return Again.apply(x) + 0 * x


def scripted():
    class Scripted(nn.Module):
        def forward(self, x):
            y = torch.relu(x)
            y.detach().mul_(-0.5)
            return y + x

    return torch.jit.script(Scripted())


@torch.fx.wrap
def edit_traced(y):
    y.data.mul_(-0.5)
    return y


class TracedInner(nn.Module):
    def forward(self, x):
        y = edit_traced(torch.relu(x))
        return y + x


def traced():
    return torch.fx.symbolic_trace(TracedInner())


MODULES = [
    Stateful,
    Gain,
    MoreLeaky,
    MoreReLU,
    DataEdit,
    DataEditBoth,
    DataEditOfInput,
    NoGradEditOfSaved,
    DetachEditOfSaved,
    ProductEdited,
    NoGradEditOfInput,
    NoGradEditOfUnsaved,
    Long,
    OverwritingModule,
    ZeroingModule,
    SparseSaving,
    SaveOnCpu,
    Backwards,
    AgainModule,
    scripted,
    traced,
]


ITS_OWN = (NoGradEditOfSaved, DetachEditOfSaved, ProductEdited, scripted)  # what they edit is theirs
OF_OTHERS = (NoGradEditOfInput, OverwritingModule)  # what they edit is their input, which others may have saved


def is_refused(put, make):
    return make in ITS_OWN or (make in OF_OTHERS and put in (module_in_stage, shortcut))


@same_as_plain(*everywhere(MODULES), few=len(MODULES), in_turn=True, raises=MODIFIED, when=is_refused)
def test_module_put_in(put, make, model):
    return train_step(put(model, make), inputs())
