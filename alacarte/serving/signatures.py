"""Whether a version can replace another: the new signature accepts every request that the old signature accepts."""

from typing import Any

from mlflow.models import ModelSignature
from mlflow.types import DataType, ParamSchema, Schema, TensorSpec

# Type -> types that accept its values without loss, in JSON, CSV and DataFrames.
WIDER = {"integer": {"long", "double"}, "long": {"double"}, "float": {"double"}}

# Types that a client cannot tell apart in JSON.
JSON_TYPES = {"long": "integer", "double": "float"}
TENSOR_TYPES = {"i": "integer", "u": "integer", "f": "float", "b": "boolean"}


def objection(old: ModelSignature, new: ModelSignature) -> str | None:
    """Why a client of `old` cannot use `new`, or None. Columns are compared by name."""
    reasons = [*_inputs(old.inputs, new.inputs), *_outputs(old.outputs, new.outputs), *_params(old.params, new.params)]
    if not reasons:
        return None
    more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    return "another signature than the version that serves: " + "; ".join(reasons[:3]) + more


def _inputs(old: Schema | None, new: Schema | None) -> list[str]:
    if old is None or new is None:
        return []
    before, after = _by_name(old), _by_name(new)
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


def _by_name(schema: Schema) -> dict[str, Any]:
    return {spec.name or f"number {position}": spec for position, spec in enumerate(schema.inputs, 1)}


def _accepts(new: Any, old: Any) -> bool:
    if isinstance(new, TensorSpec) and isinstance(old, TensorSpec):
        same_rank = new.type == old.type and len(new.shape) == len(old.shape)
        return same_rank and all(n in (-1, o) for n, o in zip(new.shape, old.shape, strict=True))
    return _type(new) == _type(old) or _type(new) in WIDER.get(_type(old), ())


def _outputs(old: Schema | None, new: Schema | None) -> list[str]:
    if old is None:
        return []
    if new is None:
        return ["no output is declared, one was"]
    if len(old.inputs) != len(new.inputs):
        return [f"{len(new.inputs)} outputs, was {len(old.inputs)}"]
    types = zip(map(_output_type, old.inputs), map(_output_type, new.inputs), strict=True)
    return [f"output {position} is {now}, was {was}" for position, (was, now) in enumerate(types, 1) if now != was]


def _params(old: ParamSchema | None, new: ParamSchema | None) -> list[str]:
    before = {param.name: param for param in old or ()}
    return [
        f"parameter {param.name} is {param.dtype!r}, was {before[param.name].dtype!r}"
        for param in new or ()
        if param.name in before and (param.dtype, param.shape) != (before[param.name].dtype, before[param.name].shape)
    ]


def _type(spec: Any) -> str:
    if isinstance(spec, TensorSpec):
        return f"a tensor of {spec.type.name} {spec.shape}"
    return spec.type.name if isinstance(spec.type, DataType) else repr(spec.type)


def _output_type(spec: Any) -> str:
    if isinstance(spec, TensorSpec):
        return TENSOR_TYPES.get(spec.type.kind, "string") + str(spec.shape[1:] or "")
    return JSON_TYPES.get(_type(spec), _type(spec))
