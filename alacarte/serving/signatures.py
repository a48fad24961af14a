"""Whether a version can replace another: the new signature accepts every request that the old signature accepts."""

from typing import Any

from mlflow.models import ModelSignature
from mlflow.types import DataType, Schema, TensorSpec

# Type -> types that accept its values without loss, in JSON, CSV and DataFrames.
WIDER = {"integer": {"long", "double"}, "long": {"double"}, "float": {"double"}}

# Types that a client cannot tell apart in JSON.
JSON_TYPES = {"long": "integer", "double": "float"}
TENSOR_TYPES = {"i": "integer", "u": "integer", "f": "float", "b": "boolean"}


def objection(old: ModelSignature, new: ModelSignature) -> str | None:
    """Why a client of `old` cannot use `new`, or None. Columns are compared by name."""
    reasons = []
    if old.inputs and new.inputs:
        reasons += _inputs(old.inputs, new.inputs)
    if old.outputs:
        before, after = ([_output_type(spec) for spec in schema or ()] for schema in (old.outputs, new.outputs))
        if len(before) != len(after):
            reasons.append(f"{len(after)} outputs, was {len(before)}")
        pairs = enumerate(zip(before, after, strict=False), 1)
        reasons += [f"output {position} is {now}, was {was}" for position, (was, now) in pairs if now != was]
    params = {param.name: param for param in old.params or ()}
    for param in new.params or ():
        was = params.get(param.name, param)
        if (param.dtype, param.shape) != (was.dtype, was.shape):
            reasons.append(f"parameter {param.name} is {param.dtype!r}, was {was.dtype!r}")
    if not reasons:
        return None
    more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    return "another signature than the version that serves: " + "; ".join(reasons[:3]) + more


def _inputs(old: Schema, new: Schema) -> list[str]:
    before, after = (
        {spec.name or f"number {position}": spec for position, spec in enumerate(schema, 1)} for schema in (old, new)
    )
    reasons = []
    if not (old.has_input_names() and new.has_input_names()) and len(before) != len(after):
        reasons.append(f"{len(after)} inputs, was {len(before)}")
    for name, spec in after.items():
        if name not in before:
            if spec.required:
                reasons.append(f"input {name} is required and new")
        elif not _accepts(spec, before[name]):
            reasons.append(f"input {name} is {_type(spec)}, was {_type(before[name])}")
        elif spec.required and not before[name].required:
            reasons.append(f"input {name} is required, was optional")
    return reasons


def _accepts(new: Any, old: Any) -> bool:
    if isinstance(new, TensorSpec) and isinstance(old, TensorSpec):
        same_rank = new.type == old.type and len(new.shape) == len(old.shape)
        return same_rank and all(n in (-1, o) for n, o in zip(new.shape, old.shape, strict=True))
    return _type(new) == _type(old) or _type(new) in WIDER.get(_type(old), ())


def _type(spec: Any) -> str:
    if isinstance(spec, TensorSpec):
        return f"a tensor of {spec.type.name} {spec.shape}"
    return spec.type.name if isinstance(spec.type, DataType) else repr(spec.type)


def _output_type(spec: Any) -> str:
    if isinstance(spec, TensorSpec):
        return TENSOR_TYPES.get(spec.type.kind, "string") + str(spec.shape[1:] or "")
    return JSON_TYPES.get(_type(spec), _type(spec))
