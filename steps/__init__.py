"""The entry points, one script each."""

import signal

# Ctrl-C during a step's imports just ends the process, without a traceback; mlops/launch.py takes it over from there.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
