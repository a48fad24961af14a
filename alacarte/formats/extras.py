"""Packages that only some models need."""

from importlib import import_module
from types import ModuleType

from alacarte.errors import UserError

# The package of each module, with the range of pyproject.toml.
EXTRAS = {
    "lightgbm": "lightgbm>=4.7,<5",
    "xgboost": "xgboost-cpu>=3.2,<4",
    "keras": "keras>=3.15,<4",
    "torch": "torch>=2.13,<2.14",
}


def import_extra(name: str) -> ModuleType:
    """Import a module of an optional package. UserError with the installation command if it is missing."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        package = EXTRAS.get(str(error.name).partition(".")[0])
        if package is None:
            raise
        raise UserError(f"{error.name} is not installed, and this model needs it: pip install '{package}'") from error
