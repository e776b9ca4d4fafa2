"""The served graph alone: what learns from FMs stays behind, and the graph proves it.

torch.export carries every parameter of a module along, used or not, so heads that a trainer hung into its student would
travel into serving. Here they are taken out while the module is exported, and the graph is then searched for them.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vm_training.heads import AuxiliaryHead, StudentAdapter


def export_served(
    student: nn.Module, example: Mapping[str, Tensor], *, unserved: Iterable[nn.Module] = ()
) -> ExportedProgram:
    """Give the graph of student(**example) in eval mode, without any `AuxiliaryHead` or `StudentAdapter`.

    example: tensors by the name of the argument, of two rows or more; their first dimension stays free (lists have
    another one than rows, offsets one more). unserved: further modules that must not be served, inside the student or
    outside. The student is left as it was. `torch.export.save` writes the graph; the example is not in it.

    Raises:
        ValueError: The student's forward calls a module that must not be served, or one of its tensors is in the graph.
        AttributeError: The student's forward uses a part of such a module.
    """
    outside = list(unserved)
    inside = [module for module in student.modules() if isinstance(module, (AuxiliaryHead, StudentAdapter))]
    was_training = student.training
    student.eval()
    try:
        with _left_out(student, [*inside, *outside]), torch.no_grad():
            free = {name: {0: Dim.DYNAMIC} for name in example}
            program = torch.export.export(student, (), kwargs=dict(example), dynamic_shapes=free, strict=False)
    finally:
        student.train(was_training)
    program._example_inputs = None  # noqa: SLF001 - rows of the trainer, which torch would save with the graph
    refuse_unserved(program, [*inside, *outside])
    return program


def refuse_unserved(program: ExportedProgram, unserved: Iterable[nn.Module]) -> None:
    """Raise ValueError if the graph holds a parameter or buffer of a module that must not be served.

    Tensors are told apart by their memory, so under whatever name the graph has them; program: as torch.export made it
    in this process, not one read from a file.
    """
    theirs = {
        _memory(tensor): name
        for module in unserved
        for name, tensor in chain(module.named_parameters(), module.named_buffers())
        if tensor.numel()
    }
    for name, tensor in _tensors(program):
        if tensor.numel() and _memory(tensor) in theirs:
            raise ValueError(f"the graph holds {name}, which is {theirs[_memory(tensor)]} of a head that nobody serves")


def _tensors(program: ExportedProgram) -> Iterator[tuple[str, Tensor]]:
    for name, value in chain(program.state_dict.items(), program.constants.items()):
        if isinstance(value, Tensor):
            yield name, value


def _memory(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


_USED = "the student's forward uses a head that nobody serves: use it where the loss is made"


class _LeftOut(nn.Module):
    def forward(self, *_: object, **__: object) -> NoReturn:
        raise ValueError(_USED)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{_USED} (.{name})")


@contextmanager
def _left_out(student: nn.Module, unserved: Iterable[nn.Module]) -> Iterator[None]:
    """Put a stand-in for each of these modules, wherever the student holds it, and put them back."""
    chosen = {id(module) for module in unserved}
    held = [
        (parent, name, child)
        for parent in student.modules()
        for name, child in parent._modules.items()  # noqa: SLF001 - all names, where a module is held under two
        if id(child) in chosen
    ]
    for parent, name, _ in held:
        parent._modules[name] = _LeftOut()  # noqa: SLF001
    try:
        yield
    finally:
        for parent, name, child in held:
            parent._modules[name] = child  # noqa: SLF001
