"""What may be loaded from a model folder, and the functions that load it."""

from alacarte.formats.check import (
    NODES,
    PICKLES,
    check_types,
    copy_project,
    load_skops,
    make_folder,
    save_skops,
    skops_io,
)

__all__ = ["NODES", "PICKLES", "check_types", "copy_project", "load_skops", "make_folder", "save_skops", "skops_io"]
