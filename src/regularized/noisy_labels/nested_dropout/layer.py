"""Nested dropout: features in order of importance, for classifiers whose training labels are partly wrong.

At each step the feature vector in front of the classifier is cut after its first k channels, with a new random k,
mostly a small one. What generalises must go into the first channels; the detail that is needed to memorise wrong labels
finds little room. Afterwards the best width is chosen on validation data, and the network can be cut down to it.

    Chen, Hu, Shen, Ai, Suykens, "Compressing Features for Learning with Noisy Labels", IEEE TNNLS 2022, arXiv
    2206.13140. Official code: github.com/yingyichen-cyy/Nested-Co-teaching at 9a2fc40 (MIT). The layer is that of
    Rippel, Gelbart, Adams, "Learning Ordered Representations with Nested Dropout", ICML 2014.

=========  =======================  ====================================================================
paper      here                     meaning
=========  =======================  ====================================================================
h          ``features``             (B, D) or (B, D, ...) what the classifier reads
k          ``width``                how many channels are kept, 1 ... D; one for the whole batch
P(k)       ``width_distribution``   (D,) proportional to exp(-((k - mu) / sigma)^2)
sigma      ``sigma``                > 0; small: strong compression; infinite: all widths alike
k*         ``keep``                 width for evaluation: argmax of accuracy(k) - 1e-5 (k - 1)
=========  =======================  ====================================================================

Paper and code differ: the text speaks of a Gaussian of standard deviation sigma, the code's exponent has no factor 1/2.
We follow the code, because the published values of sigma belong to it. Kept channels are not rescaled.
Choosing a width is in ``width.py`` beside this module, cutting down to it in ``cutting.py``, the term for the loop in
``term.py``; the second phase of the full method is :mod:`regularized.noisy_labels.co_teaching`.
"""

import warnings
from bisect import bisect_right

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.ranges import allowed, count, finite, positive

__all__ = [
    "NestedDropout",
    "NestedLinear",
    "draw_together",
    "nest_classifier",
    "nested_layers",
    "width_distribution",
]

# Shapes: B samples of a batch, D channels of the features, C classes.

_GRAIN = 2**53  # probabilities are kept as integers of this grain: no cast of the model to half precision touches them


SIGMA = positive(remedy="math.inf makes all widths equally likely", infinity=True)
MU = finite("a width")


@allowed(features=count(1, "the number of channels"), sigma=SIGMA, mu=MU)
def width_distribution(features: int, *, sigma: float, mu: float = 0.0) -> Tensor:
    """Probability of each width, ``P(k)`` proportional to ``exp(-((k - mu) / sigma)^2)`` for k = 1 ... D.

    With ``mu = 0`` it falls with k: half of a Gaussian of standard deviation ``sigma / sqrt(2)``.

    Args:
        features: D, number of channels, at least 1.
        sigma: scale in channels, > 0; ``math.inf`` makes all widths equally likely.
        mu: the most likely width; default 0 (official code): the smaller the likelier.

    Returns:
        (D,) float64, sums to 1; entry j belongs to width j + 1.

    Raises:
        ValueError: ``features`` < 1, ``sigma`` <= 0, or all probabilities underflow to 0.

    Examples:
        >>> import math
        >>> width_distribution(3, sigma=math.inf)
        tensor([0.3333, 0.3333, 0.3333], dtype=torch.float64)
        >>> p = width_distribution(512, sigma=10.0)
        >>> torch.isclose(p[0] / p[1], torch.tensor(3 / 10.0**2).double().exp())
        tensor(True)
    """
    widths = torch.arange(1, features + 1, dtype=torch.float64, device="cpu")
    weights = torch.exp(-(((widths - mu) / sigma) ** 2))
    total = weights.sum()
    if not total > 0:
        raise ValueError(
            f"every width 1 ... {features} has probability 0 with mu={mu} and sigma={sigma}: mu lies too many sigma "
            "away; move it towards the widths, or enlarge sigma"
        )
    return weights / total


class NestedDropout(nn.Module):
    """Keeps the first k channels and sets the others to 0; in training with a new random k for each batch.

    Put it between features and classifier. Where the classifier is an ``nn.Linear``, :class:`NestedLinear` does the
    same for less work. In ``eval()`` mode the width is ``keep``, all D until one is chosen by
    :func:`~regularized.noisy_labels.nested_dropout.select_width`.

    The width is drawn on the host from a table: no device is waited for. Under ``torch.compile`` it is drawn on the
    device, from its global random state, and the channels are masked, so that no width compiles the graph anew.

    Not in front of a normalisation layer that mixes channels: it would see another input at each width.

    Args:
        features: D, size of the channel axis.
        sigma: scale of the widths in channels, > 0; 10 for CIFAR-10, 100 for CIFAR-100, Clothing1M and ANIMAL-10N
            (official scripts). Small values compress more; infinite: uniform.
        mu: the most likely width; default 0 (official code).
        dim: the channel axis; default 1.
        generator: CPU generator of the widths; default: torch's global one.

    Attributes:
        keep: width in ``eval()`` mode, or None; part of the ``state_dict``.

    Raises:
        ValueError: a setting is outside its range; at the call: the input has no D channels.

    Examples:
        >>> layer = NestedDropout(4, sigma=2.0)
        >>> layer.hold(2)  # instead of a random width
        >>> layer(torch.ones(1, 4))
        tensor([[1., 1., 0., 0.]])
        >>> layer.keep = 1
        >>> layer.eval()(torch.ones(1, 4))
        tensor([[1., 0., 0., 0.]])
    """

    thresholds: Tensor
    width: Tensor

    def __init__(
        self,
        features: int,
        *,
        sigma: float,
        mu: float = 0.0,
        dim: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        cumulative = width_distribution(features, sigma=sigma, mu=mu).cumsum(0)
        thresholds = (cumulative * _GRAIN).round().to(torch.int64).clamp_(max=_GRAIN)
        thresholds[-1] = _GRAIN  # whatever the sum was rounded to, the draw below ends inside 1 ... D
        self.features = features
        self.sigma = sigma
        self.mu = mu
        self.dim = dim
        self.generator = generator
        self._table: list[int] = thresholds.tolist()
        self._number = torch.zeros((), dtype=torch.int64, device="cpu")  # reused: a draw allocates nothing
        self._held: int | None = None
        self._is_held = False
        self._keep: int | None = None
        self._warned = False
        # Copies on the device, for compiled graphs alone.
        self.register_buffer("thresholds", thresholds, persistent=False)
        self.register_buffer("width", torch.tensor(0), persistent=False)

    @property
    def keep(self) -> int | None:
        """Width in ``eval()`` mode; None (all D) until it is chosen."""
        return self._keep

    @keep.setter
    def keep(self, width: int | None) -> None:
        self._keep = None if width is None else self.checked(width)

    def draw(self) -> int:
        """A random width, 1 ... D. The number is drawn on the CPU: reading it waits for no device."""
        return bisect_right(self._table, int(self._number.random_(0, _GRAIN, generator=self.generator))) + 1

    def hold(self, width: int | None) -> None:
        """Train with this width instead of a random one; None lets go. ``eval()`` mode has ``keep``.

        Raises:
            ValueError: ``width`` is not in 1 ... D.
        """
        if width is not None:
            self.width.fill_(self.checked(width))
        self._held, self._is_held = width, width is not None

    def current_width(self) -> int:
        """The width of this forward pass: in training the held or a new random one, else ``keep`` or D."""
        if self.training:
            return self.draw() if self._held is None else self._held
        if self._keep is None:
            self._warn_of_no_choice()
            return self.features
        return self._keep

    def forward(self, features: Tensor) -> Tensor:
        """(B, D, ...) to the same shape, channels from the width on exactly 0, and so is the gradient to them."""
        self.check(features, self.dim)
        dim = self.dim % features.ndim
        if torch.compiler.is_compiling():
            return self.masked(features, dim)
        width = self.current_width()
        if width == self.features:
            return features
        # Only what is kept is read; padding writes the zeros.
        behind = [0, 0] * (features.ndim - 1 - dim)
        return F.pad(features.narrow(dim, 0, width), (*behind, 0, self.features - width))

    def masked(self, features: Tensor, dim: int) -> Tensor:
        """The same by a mask on the device, with a width that the host never sees; for ``torch.compile``.

        Raises:
            RuntimeError: the layer has a generator, which a compiled graph cannot draw from.
        """
        width: Tensor | int
        if not self.training:
            if self._keep is None:
                return features
            width = self._keep
        elif self._is_held:
            width = self.width
        elif self.generator is not None:
            raise RuntimeError(
                "NestedDropout has a generator, and a compiled graph draws from the device's global one only; build it "
                "without generator, or give each step its width by hold(layer.draw()) outside the graph"
            )
        else:
            number = torch.randint(_GRAIN, (), device=features.device)
            width = torch.searchsorted(self.thresholds, number, right=True) + 1
        kept = torch.arange(self.features, device=features.device) < width
        return torch.where(kept.view(-1, *[1] * (features.ndim - 1 - dim)), features, 0.0)

    def check(self, features: Tensor, dim: int) -> None:
        """Refuse an input without D channels on axis ``dim``.

        Raises:
            ValueError: with the shape that came and the one that is needed.
        """
        if features.ndim < 2 or not -features.ndim <= dim < features.ndim or features.shape[dim] != self.features:
            raise ValueError(
                f"nested dropout was built for {self.features} channels on axis {dim} of an input (B, D) or "
                f"(B, D, ...); got shape {tuple(features.shape)}"
            )

    def get_extra_state(self) -> Tensor:
        """``keep`` for the ``state_dict``; 0 stands for None."""
        return torch.tensor(self._keep or 0)

    def set_extra_state(self, state: Tensor) -> None:
        """Take ``keep`` from a ``state_dict``."""
        self.keep = int(state) or None

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"{self.features}, sigma={self.sigma}, mu={self.mu}, dim={self.dim}, keep={self.keep}"

    def checked(self, width: int) -> int:
        """Refuse what is no width of this layer.

        Raises:
            ValueError: ``width`` is not an integer in 1 ... D.
        """
        if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= self.features:
            raise ValueError(f"a width must be an integer in 1 ... {self.features}, the channels; got {width!r}")
        return width

    def _warn_of_no_choice(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"nested dropout evaluates with all {self.features} channels because no width was chosen yet: call "
                "select_width(model, validation_data), or set its keep",
                stacklevel=3,
            )


class NestedLinear(nn.Linear):
    """A linear classifier that reads the first k features only: nested dropout and classifier in one.

    The product is taken over k columns, ``h[:, :k] @ W[:, :k].T``, so it costs k / D of the plain layer, where
    :class:`NestedDropout` in front of an ``nn.Linear`` costs all of it and a mask. Same values, same gradients.

    Args:
        in_features: D.
        out_features: C.
        sigma: scale of the widths, > 0, see :class:`NestedDropout`.
        mu: the most likely width; default 0.
        bias: add a bias; default False (the paper's classifier has none).
        generator: CPU generator of the widths; default: torch's global one.

    Attributes:
        nested: the :class:`NestedDropout` that decides the width.

    Raises:
        ValueError: a setting is outside its range, or the input has no D features on its last axis.

    Examples:
        >>> head = NestedLinear(128, 10, sigma=10.0)
        >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), head)
        >>> model(torch.randn(5, 64)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sigma: float,
        mu: float = 0.0,
        bias: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.nested: NestedDropout = NestedDropout(in_features, sigma=sigma, mu=mu, dim=-1, generator=generator)

    def forward(self, input: Tensor) -> Tensor:
        """(B, ..., D) to (B, ..., C)."""
        self.nested.check(input, -1)
        if torch.compiler.is_compiling():
            return F.linear(self.nested.masked(input, input.ndim - 1), self.weight, self.bias)
        width = self.nested.current_width()
        if width == self.in_features:
            return F.linear(input, self.weight, self.bias)
        return F.linear(input[..., :width], self.weight[:, :width], self.bias)


def nest_classifier(
    model: nn.Module, name: str, *, sigma: float, mu: float = 0.0, generator: torch.Generator | None = None
) -> NestedLinear:
    """Replace a linear classifier of a model by a :class:`NestedLinear` with the very same parameters.

    An optimizer that was built before stays right. Doing it twice does nothing.

    Args:
        model: changed in place.
        name: dotted name of the classifier, such as ``"head"``.
        sigma: scale of the widths, > 0.
        mu: the most likely width; default 0.
        generator: CPU generator of the widths; default: torch's global one.

    Returns:
        The new classifier.

    Raises:
        ValueError: there is no such submodule, it is no ``nn.Linear``, or it was nested before with other settings.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> nest_classifier(model, "2", sigma=5.0).nested
        NestedDropout(16, sigma=5.0, mu=0.0, dim=-1, keep=None)
    """
    modules = dict(model.named_modules())
    linears = [key for key, module in modules.items() if isinstance(module, nn.Linear)]
    if name not in modules or not name:
        raise ValueError(f"the model has no submodule {name!r}; its linear layers are {linears}")
    old = modules[name]
    if isinstance(old, NestedLinear):
        if (old.nested.sigma, old.nested.mu) != (sigma, mu):
            raise ValueError(
                f"{name!r} is nested already, with sigma={old.nested.sigma} and mu={old.nested.mu}; asked for were "
                f"sigma={sigma} and mu={mu}"
            )
        return old
    if type(old) is not nn.Linear:
        raise ValueError(
            f"{name!r} is a {type(old).__name__}, not a plain nn.Linear; the model's linear layers are {linears}. In "
            "front of anything else put a NestedDropout"
        )
    weight = old.weight
    new = NestedLinear(old.in_features, old.out_features, sigma=sigma, mu=mu, generator=generator)
    new.weight, new.bias = weight, old.bias
    new.nested.to(weight.device)
    new.train(old.training)
    model.set_submodule(name, new)
    return new


def nested_layers(model: nn.Module) -> dict[str, NestedDropout]:
    """The nested dropout layers of a model by name; that of a :class:`NestedLinear` under the name of the classifier.

    Args:
        model: searched through, itself included (under the name ``""``).

    Returns:
        Name to layer, in the order of ``named_modules``.

    Examples:
        >>> list(nested_layers(nn.Sequential(nn.Linear(4, 8), NestedLinear(8, 2, sigma=3.0))))
        ['1']
    """
    found: dict[str, NestedDropout] = {}
    for name, module in model.named_modules():
        if isinstance(module, NestedLinear):
            found[name] = module.nested
        elif isinstance(module, NestedDropout) and all(module is not own for own in found.values()):
            found[name] = module
    return found


def find_nested(model: nn.Module, layer: str | None) -> tuple[str, NestedDropout]:
    """Name and nested layer; the name is that of the ``NestedLinear`` where it belongs to one.

    Raises:
        ValueError: there is none, or several and none was named.
    """
    layers = nested_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no nested dropout; put NestedDropout or NestedLinear into it, or use "
            "nest_classifier(model, name, sigma=...)"
        )
    if layer is None and len(layers) > 1:
        raise ValueError(f"the model has several nested layers, {list(layers)}: name one, layer=...")
    name = next(iter(layers)) if layer is None else layer
    if name not in layers:
        raise ValueError(f"the model has no nested layer {name!r}; it has {list(layers)}")
    return name, layers[name]


def draw_together(*models: nn.Module, seed: int) -> None:
    """Let the nested layers of several models draw the same widths, step by step.

    Each layer gets a generator of its own with the same seed: models that take the same number of training passes have
    the same width in each. The generators are part of checkpoints. The full method trains its two networks so.

    Args:
        models: each with the same number of nested layers, of the same D.
        seed: of the widths.

    Raises:
        ValueError: a model has no nested layer, or the models' layers do not correspond.

    Examples:
        >>> a, b = NestedLinear(99, 2, sigma=30.0), NestedLinear(99, 2, sigma=30.0)
        >>> draw_together(a, b, seed=0)
        >>> [a.nested.draw() for _ in range(5)] == [b.nested.draw() for _ in range(5)]
        True
    """
    layers = [list(nested_layers(model).values()) for model in models]
    sizes = [[layer.features for layer in own] for own in layers]
    if any(own != sizes[0] or not own for own in sizes):
        raise ValueError(f"the models must have corresponding nested layers; their channels are {sizes}")
    for own in layers:
        for number, layer in enumerate(own):
            layer.generator = torch.Generator().manual_seed(seed + number)
