"""What waits for data can be asked to stop."""

import subprocess
import sys

STALLED = """
import signal, threading
from distill.data.stream import Position, PositionStream

asked, reading = threading.Event(), []

def produce(position):
    reading.append(threading.get_ident())
    asked.wait()
    return position.micro

def ask():
    while not reading:
        pass
    signal.pthread_kill(reading[0], signal.SIGTERM)  # the kernel may give a process's signal to any of its threads

signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
stream = PositionStream(produce, lambda position: Position(0, position.micro + 1), depth=1, workers=1)
threading.Timer(1.0, ask).start()
print(stream.take(Position(0, 7)))
stream.close()
"""


def test_a_signal_is_handled_while_data_is_waited_for_whichever_thread_gets_it():
    done = subprocess.run([sys.executable, "-c", STALLED], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr
