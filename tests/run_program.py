# ruff: noqa: F821
"""Runs a Python program as the command `python` does; `start_program` runs this in a fork.

It gets `arguments`, `environment` and `output`, the file for stdout and stderr.
"""

import os
import runpy
import sys

os.environ.clear()
os.environ.update(environment)
with open(output, "wb") as file:
    for stream in (1, 2):
        os.dup2(file.fileno(), stream)
sys.stdout.reconfigure(line_buffering=True)  # in the order of what goes to stderr
if arguments[0] == "-m":
    sys.argv = arguments[1:]
    sys.path.insert(0, os.getcwd())
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.argv = arguments
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
