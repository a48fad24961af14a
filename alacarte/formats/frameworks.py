"""The packages of the frameworks, and the learners that were registered for them."""

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from alacarte.errors import UserError
from alacarte.folders import PACKAGE, ROOT, TEMPLATE

# The package of each module that only some models need, with the range of pyproject.toml.
EXTRAS = {
    "lightgbm": "lightgbm>=4.7,<5",
    "xgboost": "xgboost-cpu>=3.2,<4",
    "keras": "keras>=3.15,<4",
    "torch": "torch>=2.13,<2.14",
    "safetensors": "safetensors>=0.8,<1",
}

LEARNERS: dict[str, Any] = {}  # the class of each module that registered one

# Where the modules, classes and functions are that a model file may name. All of them are in this checkout.
PACKAGES = ("project.", "alacarte.")


def import_extra(name: str) -> ModuleType:
    """Import a module of an optional package. UserError with the installation command if it is missing."""
    if name == "keras":
        os.environ["KERAS_BACKEND"] = "torch"  # keras reads it when it is imported
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        package = EXTRAS.get(str(error.name).partition(".")[0])
        if package is None:
            raise
        raise UserError(f"{error.name} is not installed, and this model needs it: pip install '{package}'") from error


def register(flavor: str) -> Callable[[type], type]:
    """Class decorator for the learner of a framework, one per module. `flavor` is the name of the framework in MLmodel.

    A saved model names the module. The steps and the server import it from this checkout.
    """

    def add(cls: type) -> type:
        cls.flavor = flavor  # type: ignore[attr-defined]
        LEARNERS[cls.__module__] = cls
        return cls

    return add


def registered_learner(module: object) -> Any:
    """The learner that a module of this checkout registers. UserError for every other module."""
    name = str(module)
    if not name.startswith(PACKAGES) or "__" in name:
        raise UserError(f"the model names the learner {name}; allowed are modules of {' and '.join(PACKAGES)}")
    try:
        _import_from_checkout(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            raise UserError(f"the model needs the module {name}, which is not in this checkout") from error
        raise
    if name not in LEARNERS:
        raise UserError(f"{name} registers no learner; docs/models.md shows how")
    return LEARNERS[name]


def resolve(target: str) -> Any:
    """The class or function that "package.module.name" names. None for all that no module of this checkout defines."""
    module, _, name = target.rpartition(".")
    if not f"{module}.".startswith(PACKAGES) or "__" in target:
        return None
    try:
        value = vars(_import_from_checkout(module)).get(name)
    except ModuleNotFoundError:
        return None
    defined = f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', None)}"
    return value if defined == target else None


def _import_from_checkout(name: str) -> ModuleType:
    """Import a module of PACKAGES. UserError where it is a copy in a model folder that another loader put on the path."""
    module = import_module(name)
    file = Path(str(module.__file__)).resolve()
    if not any(file.is_relative_to(folder) for folder in (ROOT / "project", TEMPLATE / "project", PACKAGE)):
        raise UserError(f"{name} was imported from {file}, which is not in this checkout: not loaded")
    return module
