"""Start a program once; print its seconds, its peak memory in KiB and its exit code.

A process of its own, and a small one: Linux counts the memory of whoever starts a
program into that program's peak, so this must stay below a bare `python -c pass`.
"""

import os
import sys
import time

quiet = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
begin = time.perf_counter()
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[quiet])
_, status, used = os.wait4(pid, 0)
seconds = time.perf_counter() - begin
print(seconds, used.ru_maxrss, os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1)
