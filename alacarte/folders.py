"""Where the files of the project and those of the library are."""

from pathlib import Path

ROOT = Path.cwd()  # the project is the folder in which a step is started
PACKAGE = Path(__file__).resolve().parent
# An installed library holds steps, configurations and a default project in `_template`. A checkout holds them beside it.
TEMPLATE = PACKAGE / "_template" if (PACKAGE / "_template").is_dir() else PACKAGE.parent
OURS = ("alacarte", "examples", "project", "steps")  # packages whose source decides the result of a step
