"""The semi-supervised variational autoencoder, for data of which only some rows have labels."""

from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.errors import UsageError
from pyro_vae.models.vae import VAE
from pyro_vae.parts.convolutions import ConvEncoder
from pyro_vae.parts.factors import Factor, viewed
from pyro_vae.parts.networks import MLP, Shape, Viewed
from pyro_vae.parts.posteriors import Classes


class SemiSupervisedVAE(PyroModule):
    r"""A semi-supervised VAE: each datum has a class y and a latent vector z for its style.

    :math:`y \sim p(y),\ z \sim p(z|y),\ x \sim p(x|z, y)`, with the guide
    :math:`q(y|x)\,q(z|x, y)`. A known label is the value of y, and q(y|x) is then 1 at the label.
    An unknown y is summed out. Batches are ``(x, labels)``, where -1 marks a missing label. This is
    the model M2 of Kingma et al., 2014 (https://arxiv.org/abs/1406.5298).

    Arguments:
        classifier: a factor that returns q(y | x), with the family `Classes`.
        encoder: a factor that returns q(z | x, one-hot y).
        decoder: a factor that returns p(x | z, one-hot y).
        prior: a module that returns p(z | one-hot y).
        classification_weight: the weight of the classifier's log q(y | x) on rows with a label. It
            is a term of the objective, and not part of the ELBO or of log p(x).

    Raises `UsageError` if ``classification_weight`` is not positive, or if labels are not integers.

    >>> import torch, pyro_vae as pv
    >>> vae = SemiSupervisedVAE.mlp((4,), num_classes=3, latent_dim=2)
    >>> pv.predict(vae, torch.ones(5, 4)).shape
    torch.Size([5, 3])
    """

    classes: Tensor

    def __init__(
        self,
        classifier: Factor,
        encoder: Factor,
        decoder: Factor,
        prior: nn.Module,
        classification_weight: float = 50.0,
    ) -> None:
        super().__init__()
        if not classification_weight > 0:
            raise UsageError(
                f"must be positive, got {classification_weight}", argument="classification_weight"
            )
        self.classifier, self.encoder, self.decoder, self.prior = (
            classifier,
            encoder,
            decoder,
            prior,
        )
        self.classification_weight = classification_weight
        outputs = classifier.family.outputs(classifier.shape)
        self.register_buffer("classes", torch.eye(outputs), persistent=False)

    def model(self, x: Tensor, labels: Tensor) -> None:
        labels = _whole(labels)
        known: Any = labels >= 0
        label, only = labels.clamp(min=0), cast(Any, {"is_auxiliary": True})
        with pyro.plate("data", len(x), dim=-1):
            y = self.classes[pyro.sample("y", dist.Categorical(logits=self.classes[0] * 0))]
            z = pyro.sample("z", self.prior(y))
            pyro.sample("x", self.decoder(z, y), obs=x)
            with poutine.mask(mask=known):
                pyro.sample("label", dist.Categorical(logits=y.log()), obs=label)
                with poutine.scale(scale=self.classification_weight):
                    pyro.sample("classification", self.classifier(x), obs=label, infer=only)

    def guide(self, x: Tensor, labels: Tensor) -> None:
        labels = _whole(labels)
        known, label = labels[:, None] >= 0, self.classes[labels.clamp(min=0)]
        with pyro.plate("data", len(x), dim=-1):
            logits = torch.where(known, label.log(), self.classifier(x).logits)
            guess = dist.Categorical(logits=logits, validate_args=False)
            y = self.classes[pyro.sample("y", guess, infer={"enumerate": "parallel"})]
            pyro.sample("z", self.encoder(x, y))

    def template(self, n: int) -> tuple[Tensor, Tensor]:
        """A batch of n rows of the right shapes, without labels."""
        return torch.zeros(n, *self.decoder.shape), torch.full((n,), -1)

    @classmethod
    def mlp(
        cls, data_shape: Shape, num_classes: int, classification_weight: float = 50.0, **parts: Any
    ) -> "SemiSupervisedVAE":
        """A semi-supervised VAE of multilayer perceptrons.

        Arguments:
            data_shape: the shape of one datum.
            num_classes: the number of classes.
            classification_weight: as in the class.
            parts: the other arguments of `VAE.mlp`.

        The classifier has hidden layers of the same widths as the encoder.
        """
        vae = VAE.mlp(data_shape, context_shapes=[(num_classes,)], **parts)
        own = _inner(vae)

        def classifier(seen: Shape) -> nn.Module:
            return MLP([seen], own.hidden, num_classes, own.activation)

        network = viewed(classifier, vae.decoder.family, tuple(data_shape))
        return cls._of(vae, network, num_classes, classification_weight)

    @classmethod
    def conv(
        cls, data_shape: Shape, num_classes: int, classification_weight: float = 50.0, **parts: Any
    ) -> "SemiSupervisedVAE":
        """A semi-supervised VAE of convolutions, for images.

        Arguments:
            data_shape: the shape of one image, (channels, height, width).
            num_classes: the number of classes.
            classification_weight: as in the class.
            parts: the other arguments of `VAE.conv`.
        """
        vae = VAE.conv(data_shape, context_shapes=[(num_classes,)], **parts)
        own = _inner(vae)
        sizes = own.channels, own.hidden, num_classes, own.activation, own.blocks

        def classifier(seen: Shape) -> nn.Module:
            return ConvEncoder([seen], *sizes)

        network = viewed(classifier, vae.decoder.family, tuple(data_shape))
        return cls._of(vae, network, num_classes, classification_weight)

    @classmethod
    def _of(
        cls, vae: VAE, network: nn.Module, num_classes: int, classification_weight: float
    ) -> "SemiSupervisedVAE":
        classifier = Factor(network, Classes(num_classes), ())
        return cls(classifier, vae.encoder, vae.decoder, vae.prior, classification_weight)


def _inner(vae: VAE) -> Any:
    """The encoder's network behind the view of the likelihood, if there is a view."""
    network = vae.encoder.network
    return network.network if isinstance(network, Viewed) else network


def _whole(labels: Tensor) -> Tensor:
    """Labels of any integer type as indices."""
    if labels.is_floating_point():
        raise UsageError(f"labels must be integers, or -1 for a missing label, got {labels.dtype}")
    return labels.long()
