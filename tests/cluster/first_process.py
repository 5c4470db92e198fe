"""The first process of an emulated host: it names the host, mounts what is its own, starts scripts, and reaps.

Scripts come in by a FIFO, one path a line. A first process must collect every process that lost its parent.
"""

import os
import select
import signal
import subprocess
import sys


def do(*words: str) -> None:
    subprocess.run(words, check=True)


name, run, munge, munge_at, hosts = sys.argv[1:]
do("hostname", name)
if munge != munge_at:
    do("mount", "--bind", munge, munge_at)
do("mount", "--bind", hosts, "/etc/hosts")
do("ip", "link", "set", "lo", "up")
fifo = os.open(f"{run}/{name}.fifo", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda *_: None)
open(f"{run}/{name}.ready", "w").close()
text = b""
while True:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
    readable = select.select([fifo, woken], [], [])[0]
    if woken in readable:
        os.read(woken, 4096)
    if fifo in readable:
        text += os.read(fifo, 4096)
        *scripts, text = text.split(b"\n")
        for script in scripts:
            if os.fork() == 0:
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # which Python ignores
                os.setsid()
                os.execvp("sh", ["sh", script.decode()])
