"""What a trainer adds to learn from FMs without serving what they say: distill heads beside the served one.

    z_D = MLP_D(GradScale_beta(x)),  loss += weight * h(z_D, min(1, alpha p_F))        `AuxiliaryHead`
    z_A = MLP_A(z_F), trained on the labels alone by an optimizer of its own           `StudentAdapter`
    z_D2 = MLP_D2(GradScale_beta(x)),  loss += h(z_D2, stopgrad(sigmoid(z_A)))         a second `AuxiliaryHead` on z_A

x is what the student's backbone gives its served head, which none of this touches: the gradient of these terms reaches
the student through x alone. alpha = beta = weight = 1 is the plain form.

FMs and tasks: `tasks` names the tasks of each FM, as {"teacher": ["click"]}; of a dataset that is
{fm: said.tasks for fm, said in dataset.layout.fms.items()}. What they said comes as `Batch.fms`; a trainer with columns
of its own makes Supervision(present_B, {"click": logit_B}).

B rows, D width of x. Source: ExFM (arXiv 2502.17494).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vm_training.layers import mlp
from vm_training.losses import auxiliary_loss, label_loss
from vm_training.sampling import refuse_rates, to_sampled
from vm_training.tensors import Supervision

Tasks = Mapping[str, Sequence[str]]
Said = Mapping[str, Supervision]


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: float) -> Tensor:  # noqa: ANN401 - torch's own
        ctx.beta = beta
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return ctx.beta * gradient, None


class GradScale(nn.Module):
    """Gives its input as it is; the gradient that flows back through it is multiplied by beta."""

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        """Give x."""
        return _ScaledGradient.apply(x, self.beta)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Give what torch prints of the module."""
        return f"beta={self.beta}"


class AuxiliaryHead(nn.Module):
    """A distill head per FM and task on a backbone's output; together they give one term of the loss.

    width: D, of the backbone's output. hidden: sizes of MLP_D; none is one linear layer. alpha, beta, weight: above.
    sampling_rates: the share of the negatives that the student's rows keep, by task, where it is not 1
    (`vm_training.sampling`); none for a head on adapted logits, which are of the student's rows already.

    Raises:
        ValueError: There is no task, or a setting is out of its range.
    """

    def __init__(
        self,
        width: int,
        tasks: Tasks,
        *,
        hidden: Sequence[int] = (),
        alpha: float = 1.0,
        beta: float = 1.0,
        weight: float = 1.0,
        sampling_rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        if alpha <= 0 or beta < 0 or weight < 0:
            raise ValueError(f"alpha={alpha}, beta={beta}, weight={weight}: alpha is above 0, the others not below")
        self.tasks, self.sampling_rates = _checked(tasks, sampling_rates)
        self.alpha, self.weight = alpha, weight
        self.scale = GradScale(beta)
        self.heads = nn.ModuleDict({_key(*named): mlp(width, hidden, out=1) for named in _pairs(tasks)})

    def forward(self, x_BD: Tensor, fms: Said) -> Tensor:
        """Give the term to add to the student's loss: weight * the sum of each FM's and task's mean over its rows.

        Raises:
            ValueError: An FM or a task is not among fms, or x_BD has other rows.
        """
        scaled_BD = self.scale(x_BD)
        term = x_BD.new_zeros(())
        for fm, task in _pairs(self.tasks):
            logit_B = self.heads[_key(fm, task)](scaled_BD).squeeze(1)
            rate = self.sampling_rates.get(task, 1.0)
            present_B = _said(fms, fm, task).present_B
            term = term + auxiliary_loss(logit_B, fms[fm].logits[task], present_B, alpha=self.alpha, sampling_rate=rate)
        return self.weight * term


class StudentAdapter(nn.Module):
    """A tiny MLP per FM and task from its logit to one that fits the student's labels; trains itself.

    Before its first step it gives back what it gets: a student that is trained already would have to unlearn what
    random weights say. hidden: units of each layer, two or more.

    What a batch costs the adapter is learnt by `optimizer` (Adam, learning_rate; save its state beside the module's, or
    put another in its place) inside `step`, so the student's optimizer and loss know nothing of it; if these parameters
    are among the student's too, they have no gradient there and are left alone. With several ranks each has an adapter
    of its own: keep it out of what DistributedDataParallel wraps.

    sampling_rates: as for `AuxiliaryHead`; the MLP gets the logit of the student's rows.

    Raises:
        ValueError: There is no task, a sampling rate is no share, or a layer has one unit.
    """

    def __init__(
        self,
        tasks: Tasks,
        *,
        hidden: Sequence[int] = (8,),
        learning_rate: float = 1e-2,
        sampling_rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.tasks, self.sampling_rates = _checked(tasks, sampling_rates)
        self.adapters = nn.ModuleDict({_key(*named): _identity(hidden) for named in _pairs(tasks)})
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate)

    def step(
        self, fms: Said, labels: Mapping[str, Tensor], labeled: Mapping[str, Tensor] | None = None
    ) -> dict[str, Supervision]:
        """Train the adapters on a batch's labels, where there is a label and supervision; then give `forward`.

        labels, labeled: by task, as in `Batch`; without labeled, where the label is not NaN.

        Raises:
            ValueError: An FM or a task is not among fms, or shapes differ.
            KeyError: A task has no labels.
        """
        loss = torch.zeros((), device=next(self.parameters()).device)
        for fm, task in _pairs(self.tasks):
            label_B = labels[task]
            labeled_B = ~label_B.isnan() if labeled is None else labeled[task]
            loss = loss + label_loss(self._adapted(fms, fm, task), label_B, labeled_B & fms[fm].present_B)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self(fms)

    @torch.no_grad()
    def forward(self, fms: Said) -> dict[str, Supervision]:
        """Give what the FMs said with the adapted logits in place of theirs, detached and of the student's rows.

        Only `tasks`; embeddings stay. It is a target like any other: of an `AuxiliaryHead`, or of `distillation_loss`.

        Raises:
            ValueError: An FM or a task is not among fms.
        """
        return {
            fm: replace(_said(fms, fm), logits={task: self._adapted(fms, fm, task) for task in tasks})
            for fm, tasks in self.tasks.items()
        }

    def _adapted(self, fms: Said, fm: str, task: str) -> Tensor:
        said = _said(fms, fm, task)
        logit_B = torch.where(said.present_B, said.logits[task].detach(), 0.0)  # a NaN would reach the weights
        sampled_B = to_sampled(logit_B, self.sampling_rates.get(task, 1.0))
        return self.adapters[_key(fm, task)](sampled_B[:, None]).squeeze(1)


def _identity(hidden: Sequence[int]) -> nn.Sequential:
    """Give an MLP of one input that gives it back: x = silu(x) - silu(-x), handed on by two units of each layer.

    SiLU: rectified units of one input may all be dead where its logits lie. The other units start at random.

    Raises:
        ValueError: A layer has fewer than two units.
    """
    if min(hidden, default=2) < 2:
        raise ValueError(f"an adapter's layers need two units or more, not {tuple(hidden)}")
    layers = mlp(1, hidden, out=1, activation=nn.SiLU)
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for layer in linear:
            pair = torch.tensor([[1.0], [-1.0]])
            into = pair if layer.in_features == 1 else pair @ pair.T  # x of a pair is their difference
            layer.weight[:2] = 0.0
            layer.weight[:2, : into.shape[1]] = into[: layer.out_features]
            layer.bias[:2] = 0.0
    return layers


def _checked(
    tasks: Tasks, sampling_rates: Mapping[str, float] | None
) -> tuple[dict[str, tuple[str, ...]], dict[str, float]]:
    named, rates = {fm: tuple(names) for fm, names in tasks.items()}, dict(sampling_rates or {})
    if not any(named.values()):
        raise ValueError("no FM has a task: name them, as {'teacher': ['click']}")
    if unknown := rates.keys() - {task for names in named.values() for task in names}:
        raise ValueError(f"a sampling rate is given for {', '.join(sorted(unknown))}, which is no task here")
    refuse_rates(rates)
    return named, rates


def _pairs(tasks: Tasks) -> Iterator[tuple[str, str]]:
    return ((fm, task) for fm, names in tasks.items() for task in names)


def _key(fm: str, task: str) -> str:
    """Give the name of a module, as the service names the column; a task's own may be one of nn.ModuleDict's."""
    return f"{fm}__{task}"


def _said(fms: Said, fm: str, task: str | None = None) -> Supervision:
    if fm not in fms:
        raise ValueError(
            f"FM {fm} said nothing in this batch, it has {', '.join(fms) or 'no FM'}: ask for fms=[{fm!r}]"
        )
    if task is not None and task not in fms[fm].logits:
        raise ValueError(f"FM {fm} has no logit of task {task} in this batch, it has {', '.join(fms[fm].logits)}")
    return fms[fm]
