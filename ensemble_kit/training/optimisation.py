"""The papers' optimisation: a staircase of learning rates, gradients clipped one by one, Adam.

Recipes may choose alternatives: a warm-up, a cosine schedule, one norm for all gradients, a rate
for each part.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import groupby
from math import cos, pi

import torch
from torch import Tensor, nn

from ensemble_kit.errors import RecipeError
from ensemble_kit.recipes.tables import TrainingTable

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
# A recipe's table of the weights under each attribute of a sub-model.
TABLES = {
    "input_batch_norm": "input",
    "poolings": "pooling",
    "fusion": "fusion",
    "hidden": "hidden",
    "gating": "hidden",
    "head": "head",
    "probability_gating": "head",
}


def learning_rate_at(schedule: TrainingTable, examples: int) -> float:
    """Return the learning rate of the step that follows ``examples`` examples.

    It is the papers' staircase, ``rate * decay ^ floor(examples / examples_per_decay)``, or half a
    cosine, ``rate * (1 + cos(pi * examples / all examples)) / 2``. A warm-up multiplies it by
    ``(examples + batch) / warmup_examples`` as long as that is less than 1.
    """
    if schedule.schedule == "cosine":
        share = examples / (schedule.max_steps * schedule.batch_size)
        rate = schedule.learning_rate * (1 + cos(pi * share)) / 2
    else:
        stairs = examples // schedule.examples_per_decay
        rate = schedule.learning_rate * schedule.learning_rate_decay**stairs
    if schedule.warmup_examples is not None:
        rate *= min(1.0, (examples + schedule.batch_size) / schedule.warmup_examples)
    return rate


def clip_each(gradients: Sequence[Tensor], limit: float) -> None:
    """Scale each gradient by itself, in place, to an L2 norm of at most ``limit``.

    This is ``tf.clip_by_norm`` for each variable, as in the starter code; not the global norm.
    """
    norms = torch._foreach_norm(list(gradients))
    scales = [limit / norm.clamp_min(limit) for norm in norms]
    torch._foreach_mul_(list(gradients), scales)


def clip_together(gradients: Sequence[Tensor], limit: float) -> None:
    """Scale all gradients by one factor, in place, to a joint L2 norm of at most ``limit``."""
    norm = torch.stack(torch._foreach_norm(list(gradients))).norm()
    torch._foreach_mul_(list(gradients), limit / norm.clamp_min(limit))


def rate_factors(model: nn.Module, schedule: TrainingTable) -> dict[str, float]:
    """Return what each parameter's learning rate is multiplied by, by the parameter's name.

    Raises:
        RecipeError: There is a factor for a part of which the model has no weights.
    """
    factors = {}
    if schedule.learning_rate_factors is not None:
        factors = schedule.learning_rate_factors.model_dump(exclude_none=True)
    tables = {name: TABLES.get(name.partition(".")[0], "") for name, _ in model.named_parameters()}
    missing = sorted(set(factors) - set(tables.values()))
    if missing:
        trained = sorted(set(filter(None, tables.values())))
        raise RecipeError(
            f"training.learning_rate_factors names {', '.join(missing)}, of which the model has no "
            "weights.",
            hint=f"Name one of: {', '.join(trained)}." if trained else "Leave the factors out.",
        )
    return {name: factors.get(table, 1.0) for name, table in tables.items()}


class Optimiser:
    """Adam on a model's parameters, under a schedule.

    Args:
        model: The model that is trained.
        schedule: The recipe's table ``training``.

    Raises:
        RecipeError: See ``rate_factors``.
    """

    def __init__(self, model: nn.Module, schedule: TrainingTable) -> None:
        self._schedule = schedule
        factors = rate_factors(model, schedule)
        # Adam numbers its parameters group by group.
        named = sorted(model.named_parameters(), key=lambda each: factors[each[0]])
        self._parameters = dict(named)
        groups = [
            {"params": [parameter for _, parameter in group], "factor": factor}
            for factor, group in groupby(named, key=lambda each: factors[each[0]])
        ]
        self._adam = torch.optim.Adam(
            groups, lr=schedule.learning_rate, betas=(0.9, 0.999), eps=1e-8
        )

    def clear(self) -> None:
        """Remove the gradients of the last step."""
        self._adam.zero_grad(set_to_none=True)

    def step(self, examples: int) -> float:
        """Clip the gradients, take one step, and return its learning rate before any factor.

        Args:
            examples: How many videos the run has seen before this step.
        """
        rate = learning_rate_at(self._schedule, examples)
        for group in self._adam.param_groups:
            group["lr"] = rate * group["factor"]
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        clip = clip_together if self._schedule.clip == "global" else clip_each
        clip(gradients, self._schedule.clip_norm)
        self._adam.step()
        return rate

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield Adam's moments and step counts: ``exp_avg.head.gates.weight``, …."""
        for name, parameter in self._parameters.items():
            for moment, tensor in self._adam.state[parameter].items():
                yield f"{moment}.{name}", tensor

    def expected(self, names: Container[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield what ``restore`` looks for in tensors of such names, as tensors that are alike.

        A parameter without moments had no gradient.
        """
        for name, parameter in self._parameters.items():
            if any(f"{moment}.{name}" in names for moment in MOMENTS):
                yield f"exp_avg.{name}", parameter
                yield f"exp_avg_sq.{name}", parameter
                yield f"step.{name}", torch.zeros(())

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what ``tensors`` yielded; a parameter without moments never had a gradient."""
        state = {
            index: {moment: tensors[f"{moment}.{name}"].clone() for moment in MOMENTS}
            for index, name in enumerate(self._parameters)
            if f"step.{name}" in tensors
        }
        groups = self._adam.state_dict()["param_groups"]
        self._adam.load_state_dict({"state": state, "param_groups": groups})
