"""`deepspeed`: ZeRO (Rajbhandari et al. 2020) by `train.deepspeed`.

Stages 1 and 2 are a DeepSpeed engine around the adapter alone, made for each trial: the copy that
AdamW updates and its moments are divided among the workers, at stage 2 the summed gradients too,
with `offload_optimizer` in the host's memory. The base model is none of its business. Stage 3 is
that, and the frozen base partitioned once, before there is an adapter, by the engine that DeepSpeed
makes where it is given no optimizer: it gathers parameters module by module, and does nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from raytune_vlm.config.train import TrainConfig
from raytune_vlm.models.loading import Base
from raytune_vlm.train.backends.ddp import Ddp
from raytune_vlm.train.world import World

WHOLE_BELOW = 100_000
"""Parameters with fewer elements stay whole: norms and biases, not worth a message each."""

MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeed(Ddp):
    """See `Backend`.

    `optimizer` is the one that the caller gave. It holds the learning rates, and the moments of a
    checkpoint that was loaded or is to be written; between the two they are in the engine's own,
    which has the same groups.
    """

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        world: World,
        config: TrainConfig,
    ) -> None:
        super().__init__(model, optimizer, world, config)
        self._base_engine = getattr(model.get_base_model(), "raytune_vlm_engine", None)
        self._engine: Any = None
        self._present: list[bool] = []
        self._is_pending = False

    @staticmethod
    def is_sharded(config: TrainConfig) -> bool:
        """See `Backend`."""
        return config.holders > 1

    @staticmethod
    def place(base: Base, world: World, config: TrainConfig) -> None:
        """See `Backend`."""
        deepspeed = _deepspeed(world)
        if config.deepspeed.stage < 3:
            return
        zero = {"stage": 3, "stage3_param_persistence_threshold": WHOLE_BELOW}
        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        # Before the engine is made: it would move the whole base to the device first.
        deepspeed.zero.Init(module=base.model, config_dict_or_path=settings)
        for buffer in base.model.buffers():
            buffer.data = buffer.data.to(world.device)
        engine, *_ = deepspeed.initialize(model=base.model, config=settings)
        object.__setattr__(base.model, "raytune_vlm_engine", engine)  # no submodule: it holds this

    @staticmethod
    @contextmanager
    def whole(base: Base) -> Iterator[None]:
        """See `Backend`."""
        import deepspeed

        parameters = [p for p in base.model.parameters() if hasattr(p, "ds_id")]
        with deepspeed.zero.GatheredParameters(parameters) if parameters else nullcontext():
            yield

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """See `Backend`."""
        super().backward(loss, last=last)
        if self._base_engine is not None:
            # What the engine's own `backward` does: the next pass is expected to be as this was.
            self._base_engine.optimizer.get_param_coordinator().reset_step()

    def add_up(self) -> None:
        """Let every rank have its share of the sum of the ranks' gradients.

        The engine is started here at the latest moment, so that what was loaded into the adapter
        and the optimizer before is what it begins with.
        """
        if self._engine is None or self.optimizer.state:
            self._stop()
            self._start()
        present = torch.tensor([float(p.grad is not None) for p in self._parameters])
        present = present.to(self._world.device)
        torch.distributed.all_reduce(present)
        self._present = [bool(count) for count in present.tolist()]
        # All of them: what is left out keeps the last step's gradient in an offloaded buffer.
        self._fill_in()
        with self._engine.coalesce_grad_reduction():
            pass  # reduces what has been accumulated when it is left
        self._is_pending = True

    def reveal(self) -> None:
        """See `Backend`."""
        from deepspeed.utils import safe_get_full_grad

        for parameter, wanted in zip(self._parameters, self._present, strict=True):
            if wanted:
                parameter.grad = safe_get_full_grad(parameter)

    def clip(self) -> float:
        """The global norm; the engine scales gradients down where it uses them."""
        return float(self._engine.optimizer.scaled_global_norm())

    def step(self) -> None:
        """See `Backend`."""
        groups = self._engine.optimizer.param_groups
        for ours, theirs in zip(self.optimizer.param_groups, groups, strict=True):
            theirs["lr"] = ours["lr"]
        self._engine.step()
        self._is_pending = False

    def zero_grad(self) -> None:
        """See `Backend`."""
        if self._is_pending:  # of a step that was skipped, and DeepSpeed keeps them in many places
            self.collect()
        super().zero_grad()

    def collect(self) -> None:
        """See `Backend`. Stops the engine; the next step starts another one from what is here."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if self._engine is None:
            return
        inner = self._engine.optimizer.optimizer
        for ours, theirs in zip(self.optimizer.param_groups, inner.param_groups, strict=True):
            (flat,) = theirs["params"]
            step = inner.state[flat]["step"]
            for parameter in ours["params"] if step else ():
                moments = {
                    key: safe_get_full_optimizer_state(parameter, key).to(parameter.device)
                    for key in MOMENTS
                }
                self.optimizer.state[parameter] = {"step": step.clone(), **moments}
        self._stop()

    def close(self) -> None:
        """See `Backend`."""
        self._stop()
        super().zero_grad()

    def _start(self) -> None:
        """Make an engine from the adapter and the optimizer, and leave the moments to it."""
        deepspeed = _deepspeed(self._world)
        from deepspeed.utils import safe_set_full_optimizer_state

        gradients = [p.grad for p in self._parameters]
        groups = [{**group} for group in self.optimizer.param_groups]
        inner = torch.optim.AdamW(groups)
        self._engine, zero, *_ = deepspeed.initialize(
            model=torch.nn.ParameterList(self._parameters),
            optimizer=inner,
            config=self._settings(),
        )
        for hook in zero._grad_acc_hooks:
            # They reduce in the order of a rank's own backward pass, and one with text alone has
            # another than one with images.
            hook.remove()
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        step = max((state["step"] for state in self.optimizer.state.values()), default=0)
        for group in inner.param_groups:
            (flat,) = group["params"]
            zeros = {key: torch.zeros_like(flat).detach() for key in MOMENTS}
            inner.state[flat] = {"step": torch.tensor(float(step)), **zeros}
        # DeepSpeed would do it after the first step of the first group, when others have no state.
        zero._lazy_init_hp_params_optimizer_state()
        for parameter, state in self.optimizer.state.items():
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, state[key], key)
        self.optimizer.state.clear()

    def _settings(self) -> dict[str, Any]:
        count = sum(p.numel() for p in self._parameters)
        zero: dict[str, Any] = {
            "stage": min(self._config.deepspeed.stage, 2),
            "overlap_comm": False,
            "reduce_bucket_size": count,  # a buffer of that size
        }
        if self._config.deepspeed.offload_optimizer:
            pinned = self._world.device != "cpu"
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_allreduce_op": "sum",
            "gradient_clipping": self._config.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own would have to be compiled
            "zero_optimization": zero,
        }

    def _stop(self) -> None:
        if self._engine is not None:
            self._engine.destroy()
            # It is destroyed again when it is collected as garbage; by then another engine may have
            # linked the same parameters, and would lose them.
            self._engine.optimizer = None
        self._engine, self._is_pending = None, False


def _deepspeed(world: World) -> Any:
    """The package, told the device before it looks for one itself, and to compile nothing."""
    if world.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    if world.device == "cpu":
        # Faster messages on one machine; it would be compiled with g++ at the first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
