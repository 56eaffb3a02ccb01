"""A child ends with its parent, in a session of its own too."""

import os
import signal
import subprocess
import sys
import time

CHILD = """
import signal, sys, time
from distill.children import end_with_parent
end_with_parent(signal.SIGKILL)
print("ready", flush=True)
time.sleep(600)
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True, start_new_session=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_child_in_a_session_of_its_own_ends_when_its_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    end = time.monotonic() + 30
    while time.monotonic() < end and os.path.exists(f"/proc/{child}"):
        with open(f"/proc/{child}/stat") as file:
            if file.read().rsplit(")", 1)[1].split()[0] == "Z":  # ended; nobody collects it in a container without an init
                break
        time.sleep(0.05)
    else:
        assert not os.path.exists(f"/proc/{child}")
