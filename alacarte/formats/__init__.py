"""What may be loaded from a model folder, and the functions that load it."""

from alacarte.formats.check import check_types, copy_project, load_skops, make_folder, save_skops, skops_io

__all__ = ["check_types", "copy_project", "load_skops", "make_folder", "save_skops", "skops_io"]
