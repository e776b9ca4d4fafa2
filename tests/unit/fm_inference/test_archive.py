"""Archives that would run code, read files or fill the disk are refused before torch sees them."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from fm_inference.archive import ArchiveError, check_archive
from schemas.snapshot import MODEL_FILE

PROGRAM = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"
Members = dict[str, bytes]
Program = dict[str, Any]


class RunsACommand:
    """What unpickling it would do."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        import os

        return os.system, ("touch pwned",)


def pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save(RunsACommand(), buffer)
    return buffer.getvalue()


@pytest.fixture
def members(closed_form_folder: Path) -> Members:
    """The members of a good archive, without their root folder."""
    with zipfile.ZipFile(closed_form_folder / MODEL_FILE) as archive:
        return {entry.filename.split("/", 1)[1]: archive.read(entry) for entry in archive.infolist()}


@pytest.fixture
def archive_of(tmp_path: Path) -> Callable[[Members], Path]:
    """Writes members under a root folder, uncompressed as torch does."""

    def write(members: Members) -> Path:
        path = tmp_path / MODEL_FILE
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(f"model/{name}", content)
        return path

    return write


def refusal(path: Path) -> str:
    with pytest.raises(ArchiveError) as caught:
        check_archive(path)
    assert not Path("pwned").exists()
    return "; ".join(caught.value.reasons)


def edited(members: Members, edit: Callable[[Program], None]) -> Members:
    program = json.loads(members[PROGRAM])
    edit(program)
    return members | {PROGRAM: json.dumps(program).encode()}


def first_node(program: Program) -> Program:
    node: Program = program["graph_module"]["graph"]["nodes"][0]
    return node


def root_signature(program: Program) -> Program:
    signature: Program = program["graph_module"]["module_call_graph"][0]["signature"]
    return signature


def test_an_exported_archive_passes(closed_form_folder: Path) -> None:
    check_archive(closed_form_folder / MODEL_FILE)


def test_a_rewritten_archive_passes(members: Members, archive_of: Callable[[Members], Path]) -> None:
    check_archive(archive_of(members))


def test_pickled_sample_inputs_are_refused(members: Members, archive_of: Callable[[Members], Path]) -> None:
    path = archive_of(members | {SAMPLES: pickled()})
    assert "it holds sample inputs, which are a pickle" in refusal(path)


@pytest.mark.parametrize("config", [WEIGHTS, CONSTANTS])
def test_pickled_tensors_are_refused(config: str, members: Members, archive_of: Callable[[Members], Path]) -> None:
    folder, file = ("data/weights", "weight_9") if config == WEIGHTS else ("data/constants", "tensor_9")
    meta = {"path_name": file, "is_param": False, "use_pickle": True, "tensor_meta": None}
    path = archive_of(members | {config: json.dumps({"config": {"w": meta}}).encode(), f"{folder}/{file}": pickled()})
    assert "'w' is pickled; only plain tensors are taken" in refusal(path)


@pytest.mark.parametrize(
    "name",
    [
        "data/weights/model.pt",
        "data/constants/model.pt",
        "data/constants/custom_obj_0",
        "data/constants/opaque_obj_0",
        "data/aotinductor/model/evil.so",
        "data/aotinductor/model/evil.cubin",
        "models/other.json",
        "extra/notes.txt",
        "../../../etc/cron.d/evil",
        "data/weights/../../../evil",
        "/etc/passwd",
    ],
)
def test_members_that_have_no_place_are_refused(
    name: str, members: Members, archive_of: Callable[[Members], Path]
) -> None:
    assert "has no place in it" in refusal(archive_of(members | {name: b"x"}))


def test_a_second_root_folder_is_refused(members: Members, archive_of: Callable[[Members], Path]) -> None:
    path = archive_of(members)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/models/model.json", b"{}")
    assert "'other/models/model.json', which has no place in it" in refusal(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_is_there_twice_is_refused(members: Members, archive_of: Callable[[Members], Path]) -> None:
    path = archive_of(members)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"model/{PROGRAM}", members[PROGRAM])
    assert "is there twice" in refusal(path)


def test_a_zip_bomb_is_refused(members: Members, tmp_path: Path) -> None:
    path = tmp_path / MODEL_FILE
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (members | {"data/weights/weight_9": bytes(50_000_000)}).items():
            archive.writestr(f"model/{name}", content)
    assert "is compressed or encrypted" in refusal(path)


def test_members_that_claim_more_bytes_than_there_are_are_refused(
    members: Members, archive_of: Callable[[Members], Path]
) -> None:
    path = archive_of(members | {"data/weights/weight_9": b"x"})
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"model/data/weights/weight_9") - 46
    content[entry + 20 : entry + 28] = 2 * (1_000_000_000).to_bytes(4, "little")
    path.write_bytes(bytes(content))
    assert "its members add up to more than the file itself" in refusal(path)


def test_a_zip_behind_other_bytes_is_refused(members: Members, archive_of: Callable[[Members], Path]) -> None:
    path = archive_of(members)
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    assert "it cannot be read as a PT2 archive: RuntimeError" in refusal(path)


def test_a_file_that_is_no_zip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / MODEL_FILE
    path.write_bytes(pickle.dumps(1))
    assert "it cannot be read as a PT2 archive: BadZipFile" in refusal(path)


@pytest.mark.parametrize("name", [PROGRAM, WEIGHTS, CONSTANTS, SAMPLES, "archive_format"])
def test_a_missing_member_is_named(name: str, members: Members, archive_of: Callable[[Members], Path]) -> None:
    del members[name]
    assert f"it has no {name}" in refusal(archive_of(members))


@pytest.mark.parametrize(
    "target",
    [
        "torch.os.system",
        "torch.hub.load",
        "torch.load",
        "torch.ops.load_library",
        "torch.utils.cpp_extension.load",
        "_operator.attrgetter",
        "_operator.methodcaller",
        "math.__loader__.load_module",
        "torch.ops.aten.save.default",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.warn.default",
        "torch.ops.aten.format.default",
        "torch.ops.aten.no_such_operator.default",
        "torch.ops.aten._print.default",
        "torch.ops.higher_order.while_loop",
        "torch.ops.aten.__class__.__init__",
        "torch.ops.aten.add.__globals__",
        "#evil:op",
    ],
)
def test_only_listed_operators_pass(target: str, members: Members, archive_of: Callable[[Members], Path]) -> None:
    path = archive_of(edited(members, lambda program: first_node(program).update(target=target)))
    assert f"target '{target}' is not allowed" in refusal(path)


def test_an_operator_as_an_argument_is_held_to_the_same_list(
    members: Members, archive_of: Callable[[Members], Path]
) -> None:
    argument = {"name": "f", "arg": {"as_operator": "torch.os.system"}, "kind": 1}
    path = archive_of(edited(members, lambda program: first_node(program)["inputs"].append(argument)))
    assert "as_operator 'torch.os.system' is not allowed" in refusal(path)


COMMAND = "__import__('os').system('touch pwned')"


@pytest.mark.parametrize(
    "expression",
    [
        COMMAND,
        f"Symbol('s0') + {COMMAND}",
        "().__class__.__base__.__subclasses__()",
        "Symbol('s0').func.__globals__",
        "lambdify(Symbol('s0'), 'x')",
        "Pow(Integer(9), Integer(9))**9",
        "Symbol('s0', __class__=True)",
        "[s0 for s0 in ()]",
    ],
)
def test_expressions_that_sympy_would_evaluate_are_refused(
    expression: str, members: Members, archive_of: Callable[[Members], Path]
) -> None:
    size = {"as_expr": {"expr_str": expression, "hint": None}}
    values = "tensor_values"
    path = archive_of(
        edited(members, lambda p: next(iter(p["graph_module"]["graph"][values].values()))["sizes"].append(size))
    )
    assert "expr_str" in refusal(path)


@pytest.mark.parametrize("guard", [f"{COMMAND} == 0", "L['dense'].__class__ == 1", "L['x'].size()[0] == (lambda: 1)()"])
def test_guards_that_torch_would_execute_are_refused(
    guard: str, members: Members, archive_of: Callable[[Members], Path]
) -> None:
    path = archive_of(edited(members, lambda program: program["guards_code"].append(guard)))
    assert "guards_code" in refusal(path)


def test_a_placeholder_name_that_would_become_code_is_refused(
    members: Members, archive_of: Callable[[Members], Path]
) -> None:
    text = members[PROGRAM].decode()
    evil = text.replace('"name": "dense"', f'"name": "dense={COMMAND}"').replace('"dense": {', f'"dense={COMMAND}": {{')
    assert evil != text
    said = refusal(archive_of(members | {PROGRAM: evil.encode()}))
    assert "is not allowed" in said
    assert "is not plain" in said


@pytest.mark.parametrize("name", ["x; import os", "x\ny", "lambda", "x.y", "x=1", "été"])
def test_a_node_name_is_an_identifier(name: str, members: Members, archive_of: Callable[[Members], Path]) -> None:
    path = archive_of(edited(members, lambda program: first_node(program).update(name=name)))
    assert "name" in refusal(path)


def test_an_argument_name_that_would_become_code_is_refused(
    members: Members, archive_of: Callable[[Members], Path]
) -> None:
    names = {"forward_arg_names": [f"dense={COMMAND}"]}
    assert "forward_arg_names" in refusal(archive_of(edited(members, lambda p: root_signature(p).update(names))))


@pytest.mark.parametrize(
    "tree",
    [
        {"type": "collections.defaultdict", "context": '{"default_factory_module": "os"}', "children_spec": []},
        {"type": "builtins.dict", "context": json.dumps([f"a':{COMMAND},'b"]), "children_spec": [None]},
        {"type": "builtins.dict", "context": '["a"]', "children_spec": []},
        {"type": "os.system", "context": "null", "children_spec": []},
        "text",
    ],
)
def test_tree_shapes_other_than_tuples_and_dicts_are_refused(
    tree: object, members: Members, archive_of: Callable[[Members], Path]
) -> None:
    specs = {"out_spec": json.dumps([1, tree])}
    assert "out_spec" in refusal(archive_of(edited(members, lambda p: root_signature(p).update(specs))))


def test_custom_objects_are_refused(members: Members, archive_of: Callable[[Members], Path]) -> None:
    argument = {"name": "o", "arg": {"as_custom_obj": {"name": "o", "class_fqn": "os.system"}}, "kind": 1}
    path = archive_of(edited(members, lambda program: first_node(program)["inputs"].append(argument)))
    assert "it uses as_custom_obj" in refusal(path)


def test_a_key_that_is_there_twice_is_refused(members: Members, archive_of: Callable[[Members], Path]) -> None:
    twice = members[WEIGHTS].replace(b'{"config"', b'{"config": {}, "config"', 1)
    assert "cannot be read as a PT2 archive" in refusal(archive_of(members | {WEIGHTS: twice}))


def test_a_very_deep_program_is_refused(members: Members, archive_of: Callable[[Members], Path]) -> None:
    deep = b"[" * 200_000 + b"]" * 200_000
    assert "cannot be read as a PT2 archive: RecursionError" in refusal(archive_of(members | {PROGRAM: deep}))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.words = nn.Embedding(50, 16)

    def forward(self, tags: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.encoder(self.words(tags), src_key_padding_mask=~mask).mean(1)}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm, self.gru = nn.Embedding(50, 8), nn.LSTM(8, 4, batch_first=True), nn.GRU(8, 4)
        self.rest = nn.Sequential(nn.BatchNorm1d(4), nn.LayerNorm(4), nn.Dropout(0.5), nn.GELU(), nn.PReLU())

    def forward(self, tags: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden, _ = self.lstm(self.words(tags) * mask[:, :, None])
        return {"y": self.rest(hidden[:, -1]) + self.gru(self.words(tags).transpose(0, 1))[0][-1]}


class Crosses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.cross = nn.EmbeddingBag(50, 8, mode="sum"), nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.tables = nn.ModuleDict({"user_id": nn.Embedding(50, 4)})

    def forward(self, tags: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = tags.shape[0]
        x_BD = first_BD = self.bag(tags)
        for layer in self.cross:
            x_BD = first_BD * torch.relu(layer(x_BD)) + x_BD
        with torch.no_grad():
            pairs = torch.einsum("bi,bj->bij", x_BD, x_BD).view(rows, -1)
        weight_BT = torch.where(mask, self.tables["user_id"](tags).sum(-1), 0.0).masked_fill(~mask, -1e9).softmax(-1)
        place = torch.bucketize(x_BD, torch.linspace(-1, 1, 10)).float() + torch.arange(rows)[:, None] * 0
        top = torch.topk(x_BD, 2).values
        known = nn.functional.one_hot(tags[:, 0] % 7, 7).float()
        parts = [x_BD, pairs, weight_BT, place, top, known, (mask | (tags > 3)).float()]
        return {"y": torch.cat(parts, dim=1), "share": mask.sum(1) / mask.shape[1]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", [Attention, Recurrent, Crosses])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("decomposed", [False, True])
def test_ordinary_models_pass(module: type[nn.Module], tmp_path: Path, *, strict: bool, decomposed: bool) -> None:
    example = {"tags": torch.randint(0, 50, (7, 6)), "mask": torch.ones(7, 6, dtype=torch.bool)}
    shapes = {name: {0: Dim("batch", min=1, max=100)} for name in example}
    program = torch.export.export(module().eval(), (), kwargs=example, dynamic_shapes=shapes, strict=strict)
    program = program.run_decompositions() if decomposed else program
    program._example_inputs = None
    torch.export.save(program, str(tmp_path / MODEL_FILE))
    check_archive(tmp_path / MODEL_FILE)
