"""Networks: torch modules that map inputs and context to a flat vector of outputs."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyro_vae.errors import UsageError

Shape = tuple[int, ...]


class MLP(nn.Module):
    r"""A multilayer perceptron over the concatenation of its inputs.

    :math:`f(a, b, \dots) = W_L\,\sigma(\cdots\sigma(W_1 [a; b; \dots] + c_1)\cdots) + c_L`

    Arguments:
        inputs: the width of a single input, or a list with the shape (or width) of each input.
        hidden: the width of each hidden layer; an empty tuple gives a linear map.
        outputs: the width of the output; with None, the last hidden layer is the output.
        activation: a class or function that returns the nonlinearity after each hidden layer;
            ``nn.GLU`` gives gated layers, :math:`(W h + b) \odot \sigma(V h + c)`.
        normalize: whether each hidden layer is normalized over its units before the nonlinearity
            (layer normalization; Ba, Kiros & Hinton, 2016). A row then does not depend on the other
            rows of its minibatch.
        linear: whether to add a linear map of the inputs. The last layer then starts at 0, so that
            the network starts as this map.

    Inputs have shape ``(..., *shape)``. Their leading dimensions are broadcast together: context of
    shape ``(batch, 10)`` and latents of shape ``(samples, batch, 20)`` can be combined. The output
    has shape ``(..., outputs)``.

    >>> import torch
    >>> network = MLP([(1, 28, 28), 10], (400,), 40)
    >>> network(torch.zeros(5, 1, 28, 28), torch.zeros(5, 10)).shape
    torch.Size([5, 40])
    """

    def __init__(
        self,
        inputs: int | Sequence[int | Shape],
        hidden: Sequence[int],
        outputs: int | None,
        activation: Callable[[], nn.Module] = nn.ReLU,
        normalize: bool = False,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.inputs, self.hidden, self.outputs = inputs, tuple(hidden), outputs
        self.activation, self.normalize, self.linear = activation, normalize, linear
        self.shapes = shapes_of(inputs)
        _require_maker(activation)
        widths = [sum(map(prod, self.shapes)), *hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            width = 2 * after if activation is nn.GLU else after
            layers.append(nn.Linear(before, width))
            layers += [nn.LayerNorm(width)] if normalize else []
            layers.append(activation())
        if outputs is not None:
            layers.append(nn.Linear(widths[-1], outputs))
        self.layers = nn.Sequential(*layers)
        if linear:
            self.shortcut = _shortcut(widths[0], layers[-1] if layers else None)

    def forward(self, *inputs: Tensor) -> Tensor:
        joined = join(inputs, self.shapes)
        return self.layers(joined) + self.shortcut(joined) if self.linear else self.layers(joined)


def _shortcut(inputs: int, last: nn.Module | None) -> nn.Linear:
    """A linear map beside layers, of which the last starts at 0."""
    if not isinstance(last, nn.Linear):
        raise UsageError("needs outputs, got None", argument="linear")
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Linear(inputs, last.out_features)


class Chain(nn.Module):
    """A sequence of modules, where the first module also takes the context.

    Arguments:
        parts: the modules. The last may be a `pyro_vae.Factor`; the output is then a distribution.

    >>> import torch
    >>> Chain([MLP([4, 2], (8,), 8), MLP(8, (), 3)])(torch.zeros(5, 4), torch.zeros(5, 2)).shape
    torch.Size([5, 3])
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor, *context: Tensor) -> Any:
        first, *rest = self.parts
        value = first(x, *context)
        for part in rest:
            value = part(value)
        return value


class DeepSet(nn.Module):
    r"""A network over a set of any size, which does not depend on the order of its members.

    :math:`f(\{x_i\}_{i=1}^n) = h\big(\tfrac1n \sum_i e(x_i, c_i),\ \log(1 + n)\big)`

    Arguments:
        member: the network e, from the data and context of a member to its embedding.
        head: the network h, which takes the mean embedding and a tensor of width 1.

    It takes x of shape ``(..., members, *shape)``, booleans ``(..., members)`` that say which
    members count, and the context of the members. With the number n, the output can depend on how
    much the set tells. Zaheer et al., Deep sets, 2017 (https://arxiv.org/abs/1703.06114).

    >>> import torch
    >>> network = DeepSet(MLP(3, (8,), 8), MLP([8, 1], (), 2))
    >>> network(torch.zeros(5, 4, 3), torch.ones(5, 4).bool()).shape
    torch.Size([5, 2])
    """

    def __init__(self, member: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.member, self.head = member, head

    def forward(self, x: Tensor, counts: Tensor, *context: Tensor) -> Tensor:
        each = self.member(x, *context)
        n = counts.sum(-1, keepdim=True).to(each.dtype)
        total = torch.where(counts.unsqueeze(-1), each, torch.zeros_like(each)).sum(-2)
        return self.head(total / n.clamp(min=1), n.log1p())


class Viewed(nn.Module):
    """A network that sees its first input through a view, such as `Log1p`.

    Arguments:
        network: takes the output of the view, then the other inputs.
        view: a module that transforms the first input.

    >>> import torch
    >>> Viewed(MLP([2, 1], (), 3), Log1p())(torch.ones(5, 2), torch.zeros(5, 1)).shape
    torch.Size([5, 3])
    """

    def __init__(self, network: nn.Module, view: nn.Module) -> None:
        super().__init__()
        self.network, self.view = network, view

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        return self.network(self.view(x), *context)


class Log1p(nn.Module):
    """The view log(1 + x) of counts x, where negative x count as 0.

    A pseudo-input of `pyro_vae.VampPrior` may be negative.

    >>> Log1p()(torch.tensor([0.0, 1e6]))
    tensor([ 0.0000, 13.8155])
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return torch.log1p(x.clamp(min=0))


class OneHot(nn.Module):
    """The one-hot view of tokens 0 to levels - 1, where the levels multiply the channels.

    Arguments:
        levels: the number of tokens.
        dims: the number of dimensions of one datum. For 3, (..., 5, 8, 8) becomes
            (..., 5 * levels, 8, 8).

    >>> OneHot(3, 1)(torch.tensor([[0, 2]]))
    tensor([[1., 0., 0., 0., 0., 1.]])
    """

    def __init__(self, levels: int, dims: int) -> None:
        super().__init__()
        self.levels, self.dims = levels, dims

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.arange(self.levels, device=x.device).reshape(-1, *[1] * self.dims)
        rows = (x.unsqueeze(-1 - self.dims) == tokens).flatten(-1 - self.dims, -self.dims)
        return rows.to(x.dtype if x.is_floating_point() else torch.get_default_dtype())


def _require_maker(activation: Any) -> None:
    if not callable(activation):
        raise UsageError(
            f"must be a class such as torch.nn.ReLU, got {activation!r}", argument="activation"
        )


def require_ungated(activation: Callable[[], nn.Module]) -> None:
    """Raise `UsageError` if an activation of convolutions is ``nn.GLU``."""
    _require_maker(activation)
    if activation is nn.GLU:
        raise UsageError(
            "cannot be nn.GLU for convolutions: use another one, such as torch.nn.ReLU",
            argument="activation",
        )


def require_sizes(data_shape: Shape, latent_dim: int, hidden: Sequence[int]) -> None:
    """Raise `UsageError` if a size is not positive, or if shape or widths are not sequences."""
    for name, value in (("data_shape", data_shape), ("hidden", hidden)):
        if not isinstance(value, Sequence):
            raise UsageError(f"must be a tuple of integers, got {value!r}", argument=name)
    for size in (latent_dim, *hidden, *data_shape):
        if not isinstance(size, Integral):
            raise UsageError(f"sizes must be whole numbers, got {size!r}")
    if min(latent_dim, *hidden, *data_shape) < 1:
        raise UsageError(
            f"sizes must be positive, got `data_shape` {tuple(data_shape)}, `latent_dim` "
            f"{latent_dim} and `hidden` {tuple(hidden)}"
        )


def join(inputs: Sequence[Tensor], shapes: Sequence[Shape]) -> Tensor:
    """Flatten each input to a vector, broadcast the leading dimensions, and concatenate."""
    require_number(inputs, shapes)
    leading = [
        tensor.shape[: tensor.dim() - len(shape)] for tensor, shape in zip_sizes(inputs, shapes)
    ]
    for tensor, shape in zip_sizes(inputs, shapes):
        require_shape(tensor, shape)
    common = torch.broadcast_shapes(*leading)
    flat = [
        tensor.reshape(*front, prod(shape)).expand(*common, prod(shape))
        for tensor, front, shape in zip(inputs, leading, shapes, strict=True)
    ]
    return flat[0] if len(flat) == 1 else torch.cat(flat, -1)


def require_number(inputs: Sequence[Tensor], shapes: Sequence[Shape]) -> None:
    """Raise `UsageError` if the number of inputs is wrong."""
    if len(inputs) != len(shapes):
        raise UsageError(f"the network needs {len(shapes)} inputs, got {len(inputs)}")


def require_shape(tensor: Tensor, shape: Shape) -> None:
    """Raise `UsageError` if the last dimensions of an input are not this shape."""
    if tensor.dim() < len(shape) or tuple(tensor.shape[tensor.dim() - len(shape) :]) != shape:
        raise UsageError(
            f"the network needs an input of shape (..., {', '.join(map(str, shape))}), "
            f"got shape {tuple(tensor.shape)}"
        )


def zip_sizes(inputs: Sequence[Tensor], shapes: Sequence[Shape]) -> zip:
    return zip(inputs, shapes, strict=True)


def shapes_of(inputs: int | Sequence[int | Shape]) -> list[Shape]:
    """The shape of each input, given one width or a list of widths and shapes."""
    if isinstance(inputs, Integral):
        inputs = [int(inputs)]
    items = cast(Sequence[Any], inputs)
    return [(int(item),) if isinstance(item, Integral) else tuple(item) for item in items]


def all_sizes(image: Shape, halvings: int) -> list[tuple[int, int]]:
    """Height and width of an image, and after each of ``halvings`` convolutions of stride 2."""
    _, height, width = image
    sizes = [(height, width)]
    for _ in range(halvings):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return sizes
