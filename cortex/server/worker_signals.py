"""SIGTERM and SIGINT while a forked worker imports the application: the worker ends.

A process that Granian forks inherits its handlers, which note the signal for the parent alone, until the application
is loaded: a worker that was told to end meanwhile would stay, and its parent would wait for it without end. So this
module is imported before what takes long, and gives both signals their default action; Granian's handlers for a worker
replace it later. Elsewhere (no child process, another thread) it does nothing.
"""

import multiprocessing
import signal
import sys
import threading

if multiprocessing.parent_process() is not None and threading.current_thread() is threading.main_thread():
    inherited = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if getattr(getattr(inherited, "__self__", None), "interrupt_signal", False):  # it came before this import
        sys.exit(0)
