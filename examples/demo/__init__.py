"""An entry point outside of steps/: the whole loop in one command, with simulated people."""

import steps  # noqa: F401 (its settings for the garbage collector and for Ctrl-C hold for every entry point)
