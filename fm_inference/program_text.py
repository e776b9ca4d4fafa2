"""Every string of a serialised program, held against the one shape that its place allows.

The program is JSON (torch/_export/serde/schema.py). Strings that torch resolves, evaluates or writes into source code:

- `target`, `as_operator`: an operator of the lists below. aten operators need a tensor in their schema, which leaves
  out TorchScript's functions on strings, lists and files that live beside them, and must not be on the denied list.
- `expr_str`: sympy evaluates it; only calls of known functions, symbols like s0 or u0, and numbers.
- `guards_code`: Python; only sizes of tensors, numbers and comparisons.
- `in_spec`, `out_spec`: tree shapes; only tuples, dicts with plain keys, and leaves.
- names: identifiers, dotted where they name weights; they become parameters and variables of generated source.
- `stack_trace` and its like: text that stays text.

A key that torch would read an object, a pickle or a custom class from is refused as such.
"""

import json
import keyword
import re
from collections.abc import Callable, Iterator

import torch

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")
_KEY = re.compile(r"[A-Za-z0-9_.@]{1,512}")
_ARGUMENT = re.compile(r"[A-Za-z0-9_.,:;'()<>=!*+\-> ]{0,256}")
_SOURCES = re.compile(r"[A-Za-z0-9_.,;@<> ]*")
_VERSION = re.compile(r"[A-Za-z0-9_.+<= -]{0,64}")
_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,2})?")
_ATEN = re.compile(r"torch\.ops\.aten\.([A-Za-z0-9_]+)\.([A-Za-z][A-Za-z0-9_]*)")

_REFUSED_KEYS = frozenset({"as_custom_obj", "custom_obj", "as_string_to_argument", "token"})
_EMPTY_KEYS = frozenset({"custom_obj_values", "treespec_namedtuple_fields"})
_TEXT_KEYS = frozenset({"stack_trace", "nn_module_stack", "torch_fn", "from_node", "custom"})

_PLAIN_OPERATORS = frozenset(
    [f"_operator.{name}" for name in (
        "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "getitem",
        "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_", "xor", "lshift", "rshift",
    )]
    + [f"math.{name}" for name in ("ceil", "floor", "trunc", "sqrt")]
    + [f"torch.{name}" for name in (
        "sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum", "_sym_sqrt",
    )]
    + ["torch.ops.higher_order.wrap_with_set_grad_enabled", "torch.ops.higher_order.wrap_with_autocast"]
)  # fmt: skip
_DENIED_ATEN = frozenset(
    {
        "from_file", "save", "warn", "manual_seed", "seed", "initial_seed", "set_grad_enabled", "wait", "backward",
        "record_stream", "set", "set_", "set_data", "resize", "resize_", "resize_as", "resize_as_", "segment_reduce",
        "requires_grad_", "retain_grad", "pin_memory", "is_pinned", "to_mkldnn", "data",
    }
)  # fmt: skip
_ALLOWED_PRIVATE_ATEN = re.compile(
    r"_to_copy|_assert_(tensor_metadata|scalar|async)|_(log_)?softmax|_scaled_dot_product_\w+|_native_batch_norm_legit\w*"
    r"|_unsafe_view|_unsafe_index|_embedding_bag|_embedding_bag_forward_only|_transformer_encoder_layer_fwd"
    r"|_native_multi_head_attention|_fused_rms_norm|_adaptive_avg_pool[123]d|_cdist_forward|_euclidean_dist"
    r"|_weight_norm|_weight_norm_interface|_thnn_fused_(lstm|gru)_cell|_local_scalar_dense|_stack|_trilinear"
    r"|__(and|or|xor|lshift|rshift)__|_prelu_kernel|_convolution|_safe_softmax|_masked_softmax|_batch_norm_no_update|_pack_padded_sequence"
)
_SYMPY_TOKEN = re.compile(
    r"(?:Symbol\('[a-z]{1,4}[0-9]{1,6}'"
    r"(?:, (?:integer|positive|nonnegative|negative|real|finite)=(?:True|False)){0,6}\)"
    r"|Float\('[0-9.e+-]{1,40}', precision=[0-9]{1,4}\)"
    r"|(?:Integer|Rational|Float|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|ModularIndexing|Where"
    r"|CeilToInt|FloorToInt|TruncToInt|TruncToFloat|RoundToInt|RoundDecimal|ToFloat|IntTrueDiv|FloatTrueDiv|PowByNatural"
    r"|FloatPow|LShift|RShift|Identity|Equality|Unequality|StrictLessThan|LessThan|StrictGreaterThan|GreaterThan"
    r"|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|ceiling|floor)\("
    r"|\b(?:[a-z]{1,4}[0-9]{1,6}|true|false|True|False|[0-9]{1,19}(?:\.[0-9]{1,19})?)\b"
    r"|[-+*/<>=&|~ ,()])*+"
)
_GUARD_TOKEN = re.compile(
    r"(?:L\['[A-Za-z_][A-Za-z0-9_]{0,255}'\](?:\[[0-9]{1,4}\])?(?:\.(?:size|stride)\(\)\[[0-9]{1,3}\]|\.storage_offset\(\))"
    r"|\b(?:and|or|not|True|False|Mod|PythonMod|FloorDiv|Max|Min|Eq|Ne|[0-9]{1,19})\b|[-+*/%<>=! ,()])*+"
)
_MAX_EXPRESSION = 4096


def text_reasons(program: object) -> list[str]:
    """Give every reason why a parsed program, or list of tensors, is not loaded; empty if it may be."""
    reasons: dict[str, None] = {}
    for key, value in _iter_places(program):
        reason = _place_reason(key, value)
        if reason is not None:
            reasons[reason] = None
    return list(reasons)


def _iter_places(program: object) -> Iterator[tuple[str, object]]:
    """Give each value of a JSON tree with the key it stands under; a list's elements stand under the list's key."""
    waiting: list[tuple[str, object]] = [("", program)]
    while waiting:
        key, value = waiting.pop()
        yield key, value
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(key, element) for element in value]


def _place_reason(key: str, value: object) -> str | None:
    if key in _REFUSED_KEYS:
        return f"it uses {key}: custom objects and dictionaries are not taken"
    if key in _EMPTY_KEYS and value:
        return f"it uses {key}: custom classes are not taken"
    if isinstance(value, dict):
        strange = [name for name in value if not _KEY.fullmatch(name)]
        return f"the name {strange[0][:80]!a} is not plain" if strange else None
    if isinstance(value, str) and key not in _TEXT_KEYS and not _RULES.get(key, _is_plain_name)(value):
        return f"{key} {value[:80]!a} is not allowed"
    return None


def _is_operator(text: str) -> bool:
    if text in _PLAIN_OPERATORS:
        return True
    parts = _ATEN.fullmatch(text)
    if parts is None or parts[1] in _DENIED_ATEN:
        return False
    if parts[1].startswith("_") and not _ALLOWED_PRIVATE_ATEN.fullmatch(parts[1]):
        return False
    return _has_tensors(parts[1], "" if parts[2] == "default" else parts[2])


def _has_tensors(name: str, overload: str) -> bool:
    """Give whether an aten operator exists and takes or gives tensors (or is a check on a size)."""
    try:
        schema = torch._C._get_schema(f"aten::{name}", overload)  # noqa: SLF001 - the only list of overloads there is
    except RuntimeError:
        return False
    kinds = [str(part.type) for part in (*schema.arguments, *schema.returns)]
    return any("Tensor" in kind for kind in kinds) or name in ("_assert_scalar", "sym_constrain_range_for_size")


def _is_tree(text: str) -> bool:
    """Give whether a serialised tree is a tuple of tuples and dicts with plain keys over leaves."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, list) and len(content) == 2 and content[0] == 1 and _is_tree_node(content[1], depth=3)


def _is_tree_node(node: object, *, depth: int) -> bool:
    if not isinstance(node, dict) or set(node) != {"type", "context", "children_spec"} or depth < 0:
        return False
    children = node["children_spec"]
    if not isinstance(children, list) or not all(_is_tree_node(child, depth=depth - 1) for child in children):
        return False
    if node["type"] is None:
        return node["context"] is None and not children
    if node["type"] in ("builtins.tuple", "builtins.list"):
        return bool(node["context"] == "null")
    return node["type"] == "builtins.dict" and _are_plain_keys(node["context"], len(children))


def _are_plain_keys(context: object, count: int) -> bool:
    try:
        names = json.loads(str(context))
    except (ValueError, RecursionError):
        return False
    plain = isinstance(names, list) and all(isinstance(name, str) and _is_identifier(name) for name in names)
    return plain and len(names) == count


def _is_identifier(text: str) -> bool:
    return _IDENTIFIER.fullmatch(text) is not None and not keyword.iskeyword(text)


def _is_plain_name(text: str) -> bool:
    return text == "" or _KEY.fullmatch(text) is not None


def _matches(pattern: re.Pattern[str], *, longest: int = 512) -> Callable[[str], bool]:
    return lambda text: len(text) <= longest and pattern.fullmatch(text) is not None


_RULES: dict[str, Callable[[str], bool]] = {
    "target": _is_operator,
    "as_operator": _is_operator,
    "expr_str": lambda text: len(text) <= _MAX_EXPRESSION and "**" not in text and bool(_SYMPY_TOKEN.fullmatch(text)),
    "guards_code": lambda text: (
        len(text) <= _MAX_EXPRESSION and "**" not in text and bool(_GUARD_TOKEN.fullmatch(text))
    ),
    "in_spec": _is_tree,
    "out_spec": _is_tree,
    "name": lambda text: text == "" or _is_identifier(text),
    "as_name": _is_identifier,
    "forward_arg_names": _is_identifier,
    "as_string": _matches(_ARGUMENT),
    "as_strings": _matches(_ARGUMENT),
    "type": _matches(_DEVICE),
    "source_fn_stack": _matches(_SOURCES, longest=65_536),  # torch looks these names up and does not call them
    "torch_version": _matches(_VERSION),
    "as_float": lambda text: text in ("Infinity", "-Infinity", "NaN"),
    "as_floats": lambda text: text in ("Infinity", "-Infinity", "NaN"),
}
