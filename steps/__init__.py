"""The entry points, one script each."""

import gc
import importlib.util
import signal

if importlib.util.find_spec("mlflow") is None:
    raise SystemExit(
        "steps: this Python has no mlflow: run make setup once, then source .venv/bin/activate in each shell"
    )

# The imports make a million objects that stay, and the collector would look through them again and again.
gc.set_threshold(100_000, 50, 50)

# Ctrl-C during a step's imports just ends the process, without a traceback; alacarte/launch.py takes it over from there.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
