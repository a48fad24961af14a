"""Whether a version can replace another: the new signature accepts every request that the old signature accepts."""

from typing import Any

from mlflow.models import ModelSignature
from mlflow.types import DataType, Schema, TensorSpec

# What a type also takes without losing anything, by JSON, CSV and DataFrame alike.
WIDER = {"integer": {"long", "double"}, "long": {"double"}, "float": {"double"}}

# What a client that reads JSON cannot tell apart.
ALIKE = {"long": "integer", "double": "float"}


def objection(old: ModelSignature, new: ModelSignature) -> str | None:
    """Which columns of `new` break a client of `old`; None when none does. Columns are matched by name."""
    found = [*_inputs(old.inputs, new.inputs), *_outputs(old.outputs, new.outputs), *_params(old.params, new.params)]
    if not found:
        return None
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return "another signature than the version that serves: " + "; ".join(found[:3]) + more


def _inputs(old: Schema | None, new: Schema | None) -> list[str]:
    if old is None or new is None:
        return []
    before, after = _columns(old), _columns(new)
    found = []
    if not (old.has_input_names() and new.has_input_names()) and len(before) != len(after):
        found.append(f"{len(after)} inputs, was {len(before)}")
    for name, spec in after.items():
        if name not in before:
            if spec.required:
                found.append(f"input {name} is required and new")
        elif not _takes(spec, before[name]):
            found.append(f"input {name} is {_type(spec)}, was {_type(before[name])}")
        elif spec.required and not before[name].required:
            found.append(f"input {name} is required, was optional")
    return found


def _takes(new: Any, old: Any) -> bool:
    if isinstance(new, TensorSpec) and isinstance(old, TensorSpec):
        fits = len(new.shape) == len(old.shape) and all(n in (-1, o) for n, o in zip(new.shape, old.shape, strict=True))
        return new.type == old.type and fits
    return _type(new) == _type(old) or _type(new) in WIDER.get(_type(old), ())


def _outputs(old: Schema | None, new: Schema | None) -> list[str]:
    if old is None:
        return []
    if new is None:
        return ["no output is declared, one was"]
    if len(old.inputs) != len(new.inputs):
        return [f"{len(new.inputs)} outputs, was {len(old.inputs)}"]
    pairs = zip(map(_answer, old.inputs), map(_answer, new.inputs), strict=True)
    return [f"output {place} is {now}, was {was}" for place, (was, now) in enumerate(pairs, 1) if now != was]


def _params(old: Any, new: Any) -> list[str]:
    before = {param.name: param for param in old.params} if old else {}
    return [
        f"parameter {param.name} is {param.dtype!r}, was {before[param.name].dtype!r}"
        for param in (new.params if new else [])
        if param.name in before and (param.dtype, param.shape) != (before[param.name].dtype, before[param.name].shape)
    ]


def _columns(schema: Schema) -> dict[str, Any]:
    """Name, or position from 1 where there is none -> spec."""
    return {spec.name or f"number {place}": spec for place, spec in enumerate(schema.inputs, 1)}


def _type(spec: Any) -> str:
    if isinstance(spec, TensorSpec):
        return f"a tensor of {spec.type.name} {spec.shape}"
    return spec.type.name if isinstance(spec.type, DataType) else repr(spec.type)


def _answer(spec: Any) -> str:
    if isinstance(spec, TensorSpec):
        kind = {"i": "integer", "u": "integer", "f": "float", "b": "boolean"}.get(spec.type.kind, "string")
        return kind + str(spec.shape[1:] or "")
    return ALIKE.get(_type(spec), _type(spec))
