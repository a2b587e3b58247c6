"""The multilevel VAE: each datum is a group of members that share a latent vector."""

from collections.abc import Callable, Sequence

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.compat import has_values
from pyro_vae.errors import UsageError
from pyro_vae.parts.factors import Factor, Family, made, made_prior, viewed
from pyro_vae.parts.likelihoods import Gaussian
from pyro_vae.parts.networks import MLP, DeepSet, Shape, require_sizes
from pyro_vae.parts.posteriors import DiagonalNormal
from pyro_vae.parts.priors import StandardNormal


class MultilevelVAE(PyroModule):
    r"""A multilevel VAE: the members of a group share a latent vector u.

    :math:`u_g \sim p(u),\ z_{gi} \sim p(z|u_g),\ x_{gi} \sim p(x|z_{gi}, c_{gi})`, with the
    amortized guide :math:`q(u_g | \{x_{gi}, c_{gi}\}_i) \prod_i q(z_{gi}|x_{gi}, u_g, c_{gi})`.
    A datum is a whole group, so all numbers are nats per group. Latents are the sites "u", of event
    shape ``(group_dim,)``, and "z", of event shape ``(members, latent_dim)``.

    Arguments:
        encoder: a factor that returns q(z | x, u, context) of a member.
        decoder: a factor that returns p(x | z, context) of a member.
        transition: a factor that returns p(z | u).
        group_encoder: a factor that returns q(u | group), given x, booleans (..., members) that say
            which members count, and the context. It must not depend on the order of the members.
        prior: a module that returns p(u).
        members: the number of members of each group that `pyro_vae.sample` draws.
        context_shapes: the shape of one member's part of each context tensor.

    A batch is x of shape ``(groups, members, *decoder.shape)``, then each context tensor of shape
    ``(groups, members, *shape)``, then the sizes of the groups, integers ``(groups,)``. The first
    members of a row count, as many as its size; the others are padding, whose values never count.
    Size -1 means that all members count. Without context you may leave the sizes out.
    `pyro_vae.by_group` makes such a batch from rows.

    Raises `UsageError` for a batch of other tensors or shapes, and for a size that is not -1 or
    from 1 to the number of members. Random effects: Laird & Ware, 1982; pooled guide: Zaheer et
    al., Deep sets, 2017 (https://arxiv.org/abs/1703.06114).

    >>> import torch, pyro_vae as pv
    >>> pair = pv.MultilevelVAE.mlp((3,), latent_dim=2, group_dim=1, members=5)
    >>> x, sizes = torch.zeros(4, 5, 3), torch.tensor([5, 2, 1, 3])
    >>> {name: code.shape for name, code in pv.encode(pair, x, sizes).items()}
    {'u': torch.Size([4, 1]), 'z': torch.Size([4, 5, 2])}
    """

    def __init__(
        self,
        encoder: Factor,
        decoder: Factor,
        transition: Factor,
        group_encoder: nn.Module,
        prior: nn.Module,
        members: int,
        context_shapes: Sequence[Shape] = (),
    ) -> None:
        super().__init__()
        if members < 1:
            raise UsageError(f"must be at least 1, got {members}", argument="members")
        self.encoder, self.decoder, self.transition = encoder, decoder, transition
        self.group_encoder, self.prior, self.members = group_encoder, prior, members
        self.context_shapes = tuple(map(tuple, context_shapes))

    def model(self, x: Tensor, *given: Tensor) -> None:
        x, counts, context = self._read(x, given)
        with pyro.plate("data", len(x), dim=-1):
            u = pyro.sample("u", self.prior())
            z = pyro.sample("z", self.transition(u.unsqueeze(-2)).mask(counts).to_event(1))
            pyro.sample("x", self.decoder(z, *context).mask(counts).to_event(1), obs=x)

    def guide(self, x: Tensor, *given: Tensor) -> None:
        x, counts, context = self._read(x, given)
        with pyro.plate("data", len(x), dim=-1):
            u = pyro.sample("u", self.group_encoder(x, counts, *context))
            q = self.encoder(x, u.unsqueeze(-2), *context)
            pyro.sample("z", q.mask(counts).to_event(1))

    def template(self, n: int) -> tuple[Tensor, ...]:
        """A batch of n full groups of the right shapes; the values have no meaning."""
        shapes = (self.decoder.shape, *self.context_shapes)
        rows = (torch.zeros(n, self.members, *shape) for shape in shapes)
        return (*rows, torch.full((n,), -1))

    def _read(self, x: Tensor, given: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """x and the context without the values of the padding, and which members count."""
        context, sizes = given[: len(self.context_shapes)], given[len(self.context_shapes) :]
        if len(context) < len(self.context_shapes) or len(sizes) > 1:
            raise UsageError(
                f"the model needs x, {len(self.context_shapes)} context tensors and the sizes of "
                f"the groups, got {len(given)} tensors after x"
            )
        self._require_shapes(x, context)
        counts = _counts(sizes[0] if sizes else x.new_full((len(x),), -1), x)
        x, *context = (_padded(tensor, counts) for tensor in (x, *context))
        return x, counts, context

    def _require_shapes(self, x: Tensor, context: Sequence[Tensor]) -> None:
        """Raise `UsageError` if a tensor is not (groups, members, *shape)."""
        members = x.shape[1] if x.dim() > 1 else -1
        shapes = (self.decoder.shape, *self.context_shapes)
        for i, (tensor, shape) in enumerate(zip((x, *context), shapes, strict=True)):
            if tuple(tensor.shape[1:]) != (members, *shape):
                wanted = ", ".join(map(str, (members if i else "members", *shape)))
                raise UsageError(
                    f"each row of {f'context {i}' if i else 'x'} must be a group of shape "
                    f"({wanted}), got {tuple(tensor.shape[1:])}; by_group makes groups from rows"
                )

    @classmethod
    def mlp(
        cls,
        data_shape: Shape,
        latent_dim: int = 8,
        group_dim: int = 2,
        hidden: Sequence[int] = (128, 64),
        likelihood: Family | type[Family] = Gaussian,
        posterior: Family | type[Family] = DiagonalNormal,
        group_posterior: Family | type[Family] = DiagonalNormal,
        prior: nn.Module | Callable[[int], nn.Module] = StandardNormal,
        members: int = 1,
        context_shapes: Sequence[Shape] = (),
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> "MultilevelVAE":
        """A multilevel VAE of multilayer perceptrons.

        Arguments:
            data_shape: the shape of one member's data.
            latent_dim, group_dim: the dimensions of z and u.
            hidden: the widths of the hidden layers of both encoders, from the data to the latents;
                the decoder has them in reverse, and p(z | u) has one layer of the last width.
            likelihood, posterior, group_posterior: the families of x, of q(z | x, u), and of
                q(u | group), or their classes.
            prior: p(u): a module, or a class or function of group_dim that returns one.
            members: the number of members of each group that `pyro_vae.sample` draws.
            context_shapes: the shape of one member's part of each context tensor.
            activation: a class or function that returns the nonlinearity.
        """
        require_sizes(data_shape, min(latent_dim, group_dim), hidden)
        likelihood, posterior, of_group = map(made, (likelihood, posterior, group_posterior))
        data_shape = tuple(data_shape)
        context = [tuple(shape) for shape in context_shapes]
        latents, group = (latent_dim,), (group_dim,)
        seen = context[: len(context) - likelihood.context]
        width = hidden[-1] if hidden else 2 * group_dim

        def each(view: Shape) -> nn.Module:
            return MLP([view, *context], hidden[:-1], width, activation)

        def own(view: Shape) -> nn.Module:
            outputs = posterior.outputs(latents)
            return MLP([view, group_dim, *context], hidden, outputs, activation)

        embedding = viewed(each, likelihood, data_shape)
        pool = DeepSet(embedding, MLP([width, 1], hidden[-1:], of_group.outputs(group), activation))
        up = MLP(group_dim, hidden[-1:], 2 * latent_dim, activation)
        down = MLP(
            [latent_dim, *seen], tuple(hidden)[::-1], likelihood.outputs(data_shape), activation
        )
        return cls(
            Factor(viewed(own, likelihood, data_shape), posterior, latents),
            Factor(down, likelihood, data_shape),
            Factor(up, DiagonalNormal(), latents),
            Factor(pool, of_group, group),
            made_prior(prior, group_dim),
            members,
            context,
        )


def _counts(sizes: Tensor, x: Tensor) -> Tensor:
    """Which members count, booleans (groups, members)."""
    most = x.shape[1]
    if sizes.dim() != 1:
        raise UsageError(
            f"the sizes must be one number for each group, got rows of shape "
            f"{tuple(sizes.shape[1:])}"
        )
    known = (sizes == -1) | ((sizes >= 1) & (sizes <= most))
    if has_values(known) and not bool(known.all()):
        raise UsageError(
            f"the size of a group must be from 1 to {most}, the number of members in x, or -1 for "
            f"all of them, got {sizes[~known][0].item():g}"
        )
    places = torch.arange(most, device=x.device)
    return (places < sizes[:, None]) | (sizes[:, None] == -1)


def _padded(tensor: Tensor, counts: Tensor) -> Tensor:
    """A tensor (groups, members, ...) with the first member in place of those that do not count.

    Its values are in the support of every likelihood. Zeros are not, and their gradient is NaN.
    """
    wide = counts.reshape(*counts.shape, *[1] * (tensor.dim() - 2))
    return torch.where(wide, tensor, tensor[:, :1])
