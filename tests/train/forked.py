"""`python forked.py script …` is `python script …`, forked from a process that has imported what `processes.py` needs."""

import os
import re
import runpy
import sys

from kvpipe.cli import server

# variables of launchers are read when processes meet
server.LATER = re.compile(server.LATER.pattern + "|RANK|LOCAL_RANK|WORLD_SIZE|MASTER_.*|ACCELERATE_.*")

if sys.argv[1] == "serve":
    server.LIBRARIES = ("processes",)
    server.serve(sys.argv[2])
else:
    server.delegate(os.environ["KVPIPE_SERVER"])
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
