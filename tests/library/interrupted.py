"""python -m interrupted MODULE:ATTRIBUTE WHEN STEP [ARGUMENTS]: run a step that is killed, as by `kill -9`, at one point.

WHEN is `before` or `after` the first call of that function, or `alias=NAME`: after the first call that moves that alias.
With MOVE as WHEN, `champion` is moved to the version in the environment variable MOVE_TO in its place, by somebody else.
"""

import functools
import importlib
import os
import runpy
import signal
import sys


def interrupt(place: str, when: str) -> None:
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: object, **kwargs: object) -> object:
        if when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if when == "move":
            from mlflow import MlflowClient

            model, version = os.environ["MOVE_TO"].split("/")
            MlflowClient().set_registered_model_alias(model, "champion", version)
        elif when == "after" or when.partition("=")[2] in args:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)


if __name__ == "__main__":
    interrupt(*sys.argv[1:3])
    step = f"steps.{sys.argv[3]}"
    sys.argv = [step, *sys.argv[4:]]
    runpy.run_module(step, run_name="__main__", alter_sys=True)
