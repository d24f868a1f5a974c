"""A model's output layer, given labelled positions only, and what a loss makes of its logits.

Logits over a vocabulary of 150,000 tokens would be by far the largest tensors of a step, and of
those without a label nothing is needed. So the loss is taken inside the layer, where its weights
are whole even if the base is cut up: a chunk of labelled positions at a time, with the gradient of
what went into the layer, which is all that the backward pass has to know of it. No logits outlive
their chunk, none are computed twice, and ranks with more chunks than others wait for nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch.nn.functional import cross_entropy

from raytune_vlm.collate.arrays import IGNORED
from raytune_vlm.errors import ModelError, first_line
from raytune_vlm.models.lora import output_layer
from raytune_vlm.train import random_state

CHUNK_TOKENS = 512
"""Labelled tokens whose logits are in memory at one time, without a teacher; results do not depend
on it."""

PROBE = 100.0
"""Logits between this and its negative show what a model does behind its output layer."""

SCALE = 1024.0
"""Gradients are kept times this, a power of two: small ones would be zero in float16."""

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Makes logits `[tokens, vocabulary]` of states `[tokens, width]`."""

_T = TypeVar("_T")


class Unfollowed(ModelError):
    """A model does something with its output layer that is not followed here."""


class OutputLayer:
    """Forward passes in which something else takes the place of a model's output layer.

    The layer itself is given one position, and its answer there is replaced by known numbers: what
    the model makes of them in its first pass shows whether it does anything behind the layer.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.is_followed = False
        """Whether a pass has shown that there is nothing behind the layer but a cap."""

    def __call__(
        self, batch: dict[str, Any], chosen: torch.Tensor, use: Callable[[torch.Tensor, Logits], _T]
    ) -> _T:
        """One forward pass.

        Parameters
        ----------
        chosen
            bool `[batch, length - 1]`: whether the token that comes next is asked for.
        use
            Called inside the layer with what goes into it where `chosen`, `[tokens, width]`, and
            with what makes logits of that; its answer is this one's.

        Raises
        ------
        Unfollowed
            If the layer is not linear and frozen, is not used once for all positions, or if the
            model does something else behind it than capping logits.
        """
        layer = _frozen(self._model)
        cap = getattr(self._model.config.get_text_config(), "final_logit_softcapping", None)
        replaced = _Replaced(layer, cap, chosen, use)
        hooks = (
            layer.register_forward_pre_hook(replaced.before),
            layer.register_forward_hook(replaced.after),
        )
        try:
            came_out = self._model(**batch).logits
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self.is_followed or replaced.put_in is None:
                raise
            # If it is another error, the pass with all logits has it too.
            raise Unfollowed(f"fails behind its output layer ({first_line(error)})") from error
        finally:
            for hook in hooks:
                hook.remove()
        if not replaced.is_used_once or replaced.put_in is None:
            times = len(replaced.calls)
            raise Unfollowed(f"uses its output layer {times} times, not once for all tokens")
        if not self.is_followed:
            if not torch.equal(came_out.float(), replaced.capped(replaced.put_in).float()):
                raise Unfollowed("changes logits behind its output layer")
            self.is_followed = True
        made = replaced.made
        if not _has_gradient(made):
            return made
        # `fully_shard` makes its weights whole again when a gradient comes to the model's output.
        return _After.apply(made, came_out)  # type: ignore[no-untyped-call,no-any-return]


class _Replaced(Generic[_T]):
    """What is done in the place of an output layer in one pass, by hooks on it."""

    def __init__(
        self,
        layer: torch.nn.Linear,
        cap: float | None,
        chosen: torch.Tensor,
        use: Callable[[torch.Tensor, Logits], _T],
    ) -> None:
        self._layer, self._cap, self._use = layer, cap, use
        self._places = chosen.nonzero(as_tuple=True)  # now: later it would wait for the pass
        self._shape = (len(chosen), chosen.shape[1] + 1)
        self.calls: list[bool] = []
        """Of each use of the layer, whether it was given all positions."""
        self.made: _T
        self.put_in: torch.Tensor | None = None
        """The known numbers, `[1, 1, vocabulary]`."""

    @property
    def is_used_once(self) -> bool:
        """So far, and for all positions."""
        return self.calls == [True]

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """What Gemma makes of logits."""
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    def _logits_of(self, states: torch.Tensor) -> torch.Tensor:
        return self.capped(self._layer.forward(states))  # no hooks, which are on their way already

    def before(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Use what goes into the layer; one position of it goes on."""
        self.calls.append(bool(args) and args[0].shape[:2] == self._shape)
        if not self.is_used_once:
            return None
        self.made = self._use(args[0][self._places], self._logits_of)
        return (args[0][:1, :1].detach(), *args[1:])

    def after(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        """Known numbers take the place of logits."""
        if not self.is_used_once:
            return None
        probe = torch.linspace(-PROBE, PROBE, output.shape[-1], dtype=output.dtype)
        self.put_in = probe.to(output.device).expand(1, 1, -1)
        if not _has_gradient(self.made):
            return self.put_in
        return _After.apply(self.put_in, self.made)  # type: ignore[no-untyped-call,no-any-return]


def _has_gradient(made: object) -> bool:
    return isinstance(made, torch.Tensor) and made.requires_grad


class _After(torch.autograd.Function):
    """A tensor whose backward pass goes through another one first, with a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        ctx.shape, ctx.options = other.shape, {"dtype": other.dtype, "device": other.device}
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return upstream, torch.zeros(ctx.shape, **ctx.options)


def _frozen(model: Any) -> torch.nn.Linear:
    """The model's output layer."""
    layer = output_layer(model)
    if not isinstance(layer, torch.nn.Linear):
        raise Unfollowed("has no output layer that is a linear layer")
    if any(p.requires_grad for p in layer.parameters()):
        raise Unfollowed("trains its output layer")
    return layer


class TokenLosses:
    """The cross-entropy of every labelled token."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._layer: OutputLayer | None = OutputLayer(model)

    def __call__(
        self, batch: dict[str, Any], labels: torch.Tensor, say: Callable[[str], object]
    ) -> torch.Tensor:
        """One forward pass.

        Parameters
        ----------
        labels
            int64 `[batch, length]`, not shifted, -100 where there is no loss.
        say
            Told once if logits of all positions have to be made, and why.

        Returns
        -------
        Tensor
            float32 `[labelled tokens]`, row by row.
        """
        targets = labels[:, 1:]
        chosen = targets != IGNORED
        wanted = targets[chosen]
        if self._layer is not None:
            device, drawn = str(labels.device), None
            if not self._layer.is_followed:
                drawn = random_state.capture(device)
            try:
                return self._layer(
                    batch,
                    chosen,
                    lambda states, logits: losses(
                        states, logits, _entropy, wanted, chunk_tokens=CHUNK_TOKENS
                    ),
                )[:, 0]
            except Unfollowed as error:
                self._layer = None
                say(
                    "all positions go through the output layer, labelled or not, which takes "
                    f"memory: {self._model.config.model_type} {error}"
                )
                random_state.restore(drawn or {}, device)
        return _entropy(self._model(**batch).logits[:, :-1][chosen], wanted)[:, 0]


def _entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.float(), targets, reduction="none")[:, None]


def losses(
    states: torch.Tensor,
    logits_of: Logits,
    loss_of: Callable[..., torch.Tensor],
    *tables: torch.Tensor,
    chunk_tokens: int,
) -> torch.Tensor:
    """Losses of tokens, each by its own row of everything.

    Parameters
    ----------
    states
        `[tokens, width]`.
    loss_of
        Takes logits of some tokens and their rows of `tables`, and gives `[tokens, parts]`.
    chunk_tokens
        How many tokens at a time.

    Returns
    -------
    Tensor
        float32 `[tokens, parts]`. The first part alone has a gradient, and only that of `states`.
    """
    wanted = torch.is_grad_enabled() and states.requires_grad
    values, gradients = [], []
    chunks = (table.split(chunk_tokens) for table in (states.detach(), *tables))
    for part, *rest in zip(*chunks, strict=True):
        with torch.set_grad_enabled(wanted):
            leaf = part.requires_grad_(wanted)
            found = loss_of(logits_of(leaf), *rest)
        values.append(found.detach())
        if wanted:
            gradients += torch.autograd.grad(found[:, 0].sum() * SCALE, leaf)
        del found  # before the next chunk has logits of its own
    told = torch.cat(values)
    return _Known.apply(states, told, torch.cat(gradients)) if wanted else told


class _Known(torch.autograd.Function):
    """Values of rows whose gradients are known."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, values: torch.Tensor, gradients: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(gradients)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        (gradients,) = ctx.saved_tensors
        scaled = gradients.float() * (upstream[:, :1] / SCALE)
        return scaled.to(gradients.dtype), None, None
