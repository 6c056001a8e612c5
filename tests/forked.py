"""What a process of `programs.run` does first: a place, an output and a path of its own."""

import json
import os
import runpy
import signal
import sys

if __name__ == "__main__":
    how = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(how["stderr"], os.O_WRONLY | os.O_APPEND), 2)
    os.chdir(how["cwd"])
    sys.path[0] = os.path.dirname(how["program"])
    if "path" in how:
        sys.path.insert(1, how["path"])
    sys.argv[:2] = [how["program"]]
    runpy.run_path(how["program"], run_name="__main__")
