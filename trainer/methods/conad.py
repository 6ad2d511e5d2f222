"""ConAD: a variational auto-encoder that may answer with H pictures, and a critic that keeps them honest.

Nguyen, Lou, Klar, Brox, "Anomaly Detection With Multiple-Hypotheses Predictions", ICML 2019 (arXiv 1810.13292).  Owns
what is drawn in a step, the two turns, the normalization of the map, and where it lies.  Leaves layers to
``conad_nets``, formulas to ``conad_losses``, the deployed graph to ``conad_graph``.

    critic      real pictures against decodings of prior noise, of the posterior, and the best of the latter
    generator   NLL of the best head + KL(q(z|x) || N(0, I)) + the same made pictures, to be taken for real
    map         NLL of every pixel under the head that is best for the whole image, in deviations of held-out good maps
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edge.bundle import MapGeometry
from edge.errors import CommandError, DataError, TrainingError
from trainer.conad_graph import ConadGraph, pixels
from trainer.conad_losses import critic_terms, divergence, nll_maps, passing, winner_loss
from trainer.conad_nets import Critic, Generator
from trainer.configs.conad import ConadConfig
from trainer.method import Batch, Frames, Turn

_CHUNK = 16

SAME = 1e-3
"""Pictures in [-1, 1] that differ nowhere by more than this, an eighth of a gray level, are the same."""


@dataclass(frozen=True, slots=True, eq=False)
class _Made:
    """One batch through the generator: what both turns of a step look at."""

    pictures: Tensor  # (n, C, s, s)
    nll: Tensor  # (n, H), of whole images
    kl: Tensor
    posterior: Tensor  # (n, H, C, s, s)
    prior: Tensor  # (n, H, C, s, s)


class Conad:
    """``method.Method`` and ``method.Adversarial``; ``seed`` draws the first weights, each batch's ``draw`` every z."""

    name = "conad"

    def __init__(self, config: ConadConfig, *, seed: int, device: str = "cpu") -> None:
        self.config, self.device, self.seed = config, device, seed
        # Gray until `prepare` says otherwise: first and last layers depend on the channels.
        self._build(1)
        self._last: tuple[Batch, _Made] | None = None
        self.statistics: dict[str, Any] = {}

    @property
    def trainable(self) -> nn.Module:
        """Generator and critic, batch-norm statistics included."""
        return self._trainable

    @property
    def local(self) -> bool:
        """The latent code sees the whole picture, and so does the choice of the head."""
        return False

    def prepare(self, frames: Frames) -> None:
        """Build the networks for the channels of ``frames`` (n, h, w, C).

        Raises:
            DataError: the frames have another size than the networks, are constant, or are fewer than a group of
                hypothesis discrimination.
        """
        self._require_size(frames.shape)
        if frames.min() == frames.max():
            raise DataError("the training images are constant; there is nothing to learn from them")
        if self.config.hypothesis_discrimination and len(frames) < self.config.heads:
            raise DataError(
                f"hypothesis discrimination compares {self.config.heads} hypotheses with as many different pictures, "
                f"and there are {len(frames)} images to learn from; give more of them, or fewer heads (--set heads=N)"
            )
        if frames.shape[3] != self._channels:
            self._build(frames.shape[3])

    def turns(self) -> tuple[Turn, ...]:
        """The critic, then the generator: Adam each, with DCGAN's first beta."""
        betas = (self.config.beta1, 0.999)
        return (
            Turn("critic", tuple(self.critic.parameters()), self.critic_loss, self.config.critic_rate, betas),
            Turn("generator", tuple(self.net.parameters()), self.generator_loss, 1.0, betas),
        )

    def critic_loss(self, batch: Batch) -> dict[str, Tensor]:
        """L_D on this batch and what the generator makes of it now, each group averaged."""
        made = self._made(batch)
        with self._autocast():
            prior, posterior = (self.critic.of_hypotheses(one.detach()) for one in (made.prior, made.posterior))
            real = self.critic.of_pictures(made.pictures)
        return critic_terms(real.float(), prior.float(), posterior.float(), made.nll.detach().argmin(1))

    def generator_loss(self, batch: Batch) -> dict[str, Tensor]:
        """L_G: the winner's NLL, the divergence of its code, and what the critic says of all made pictures."""
        made = self._made(batch)
        terms = {
            "winner": winner_loss(made.nll, self.config.relaxation),
            "divergence": self.config.kl * made.kl,
        }
        if self.config.adversarial > 0:
            with self._autocast():
                prior, posterior = (self.critic.of_hypotheses(one) for one in (made.prior, made.posterior))
            pull = passing(prior.float(), posterior.float(), made.nll.detach().argmin(1))
            terms["adversarial"] = self.config.adversarial * pull
        self._last = None
        return terms

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Of images outside the training set: the winner's NLL and the divergence, with z at its mean."""
        self._require_size(tuple(batch.frames.shape))
        self.net.eval()
        pictures = pixels(batch.frames.to(self.device))
        mean, log_variance = self.net.encode(pictures)
        nll = self._nll(pictures, *self.net.decode(mean))
        return {"winner": winner_loss(nll), "divergence": self.config.kl * divergence(mean, log_variance)}

    @torch.no_grad()
    def fit_statistics(self, frames: Frames) -> None:
        """Fit mean and deviation of the map over all cells of held-out good images (n, h, w, C).

        Raises:
            DataError: the frames have another size.
            TrainingError: the map does not vary, or all heads give the same picture.
        """
        self._require_size(frames.shape)
        graph = self._graph(self.config.stride)
        values, winners, gaps, divergences = [], [], [], []
        for start in range(0, len(frames), _CHUNK):
            chunk = torch.from_numpy(frames[start : start + _CHUNK].copy())
            mean, log_variance = graph.net.encode(pixels(chunk))
            heads = graph.net.decode(mean)[0]
            values.append(graph(chunk)[0].numpy().ravel())
            winners.append(graph.head_maps(pixels(chunk)).mean((2, 3)).argmin(1))
            gaps.append(float((heads - heads[:, :1]).abs().max()))
            divergences.append(float(divergence(mean, log_variance)) * len(chunk))
        numbers = np.concatenate(values)
        mu, sigma = float(numbers.mean(dtype=np.float64)), float(numbers.std(dtype=np.float64))
        if not (math.isfinite(mu) and sigma > 1e-9 * max(1.0, abs(mu))):
            raise TrainingError(
                f"the maps of held-out good images have mean {mu:.4g} and deviation {sigma:.3g}: they say the same of "
                "everything; train longer, or at a lower learning rate"
            )
        if self.config.heads > 1 and max(gaps) < SAME:
            raise TrainingError(
                f"all {self.config.heads} heads give the same picture (they differ by {max(gaps):.2g} at most): the "
                "hypotheses have collapsed; train with hypothesis_discrimination=true, longer, or with heads=1"
            )
        won = torch.cat(winners).bincount(minlength=self.config.heads).tolist()
        self.statistics = {"mu": mu, "sigma": sigma, "winners": won, "divergence": sum(divergences) / len(frames)}

    def deployed(self, channels: int, *, stride: int | None = None) -> nn.Module:
        """The graph contract as a module on the CPU.

        Raises:
            CommandError: ``stride`` is not the configured one.
            TrainingError: the networks were trained for another number of channels.
        """
        if channels != self._channels:
            raise TrainingError(f"trained on {self._channels} channels, asked for a graph of {channels}")
        return self._graph(self._stride(stride), self.statistics["mu"], 1 / self.statistics["sigma"])

    def map_geometry(self, height_px: int, width_px: int, *, stride: int | None = None) -> MapGeometry:
        """A cell in the middle of every ``stride`` x ``stride`` px."""
        step = self._stride(stride)
        return MapGeometry(
            height=height_px // step, width=width_px // step, stride=float(step), offset_y=(step - 1) / 2,
            offset_x=(step - 1) / 2, reduction="mean" if self.config.score == "sum" else "top-q",
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """The fitted statistics: the map's, which head won how often, and the divergence of held-out images in nats."""
        return {"statistics": dict(self.statistics)}

    def _build(self, channels: int) -> None:
        self._channels = channels
        spec = self.config.spec(channels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.net = Generator(spec).to(self.device)
            self.critic = Critic(spec, discriminate=self.config.hypothesis_discrimination).to(self.device)
        self._trainable = nn.ModuleDict({"generator": self.net, "critic": self.critic})

    def _made(self, batch: Batch) -> _Made:
        """The batch through the generator with its gradient, once a step: only the critic changes between the turns."""
        if self._last is not None and self._last[0] is batch:
            return self._last[1]
        self._require_size(tuple(batch.frames.shape))
        self.net.train()
        random = torch.Generator().manual_seed(batch.draw)
        pictures = pixels(batch.frames.to(self.device))
        with self._autocast():
            mean, log_variance = (one.float() for one in self.net.encode(pictures))
            noise, other = (torch.randn(mean.shape, generator=random).to(self.device) for _ in range(2))
            latent = torch.cat([mean + noise * torch.exp(0.5 * log_variance), other])
            # Together: batch norm must not see codes of one kind in training and those of another afterwards.
            means, raw = self.net.decode(latent)
        count = len(pictures)
        posterior, prior = means[:count].float(), means[count:].float()
        nll = self._nll(pictures, posterior, None if raw is None else raw[:count].float())
        made = _Made(pictures, nll, divergence(mean, log_variance), posterior, prior)
        self._last = batch, made
        return made

    def _nll(self, pictures: Tensor, means: Tensor, raw: Tensor | None) -> Tensor:
        """The NLL (n, H) of whole images."""
        log_sigma = self._log_sigma if raw is None else raw.clamp(*self._bounds)
        return nll_maps(pictures, means, log_sigma).sum((2, 3))

    def _graph(self, stride: int, shift: float = 0.0, scale: float = 1.0) -> ConadGraph:
        net = Generator(self.net.spec)
        net.load_state_dict({name: tensor.detach().cpu() for name, tensor in self.net.state_dict().items()})
        graph = ConadGraph(
            net, log_sigma=self._log_sigma, bounds=self._bounds, score=self.config.score,
            top_share=self.config.top_share, stride=stride, shift=shift, scale=scale,
        )  # fmt: skip
        return graph.eval().requires_grad_(False)

    @property
    def _log_sigma(self) -> float:
        return math.log(self.config.sigma)

    @property
    def _bounds(self) -> tuple[float, float]:
        """A learned deviation that may go to zero makes one perfect pixel worth more than all others."""
        return self._log_sigma, 0.0

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _require_size(self, shape: tuple[int, ...]) -> None:
        side = self.config.size_px
        if len(shape) != 4 or tuple(shape[1:3]) != (side, side):
            raise DataError(
                f"these networks take pictures of {side} x {side} px, and {list(shape[1:3])} were given; "
                "prepare them at that size, or train with another --size"
            )

    def _stride(self, stride: int | None) -> int:
        if stride not in (None, self.config.stride):
            raise CommandError(
                f"this model cannot be evaluated every {stride} px: each cell of its map, one every "
                f"{self.config.stride} px, follows from the whole picture"
            )
        return self.config.stride
