"""An exported file run by ONNX Runtime alone, in a process that may be ended by it."""

import json
import subprocess
import sys

# videos, and frames of the inputs; other numbers of videos than frames have would be broadcast
NOTHING = [[0, 0, 3], [2, 2, 0], [0, 0, 0], [1, 0, 3], [0, 1, 3]]
REFUSED = "no_videos_or_no_frames"
PLAIN_RUN = """
import json, sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
types = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(uint8)": "uint8"}
for videos, counts, frames in json.loads(sys.argv[2]):
    feed = {
        port.name: numpy.ones(
            [videos, frames, port.shape[2]] if len(port.shape) == 3 else [counts], types[port.type]
        )
        for port in session.get_inputs()
    }
    try:
        print("ran", session.run(None, feed)[0].shape)
    except Exception as error:
        print(str(error).partition("Name:'")[2].partition("/")[0])
"""


def plain_answers(path, shapes):
    """Run a file as a server does that knows nothing of ensemble-kit; return what was said.

    In its own process, because recurrent operators end it on no videos if nothing prevents it.
    """
    command = [sys.executable, "-P", "-c", PLAIN_RUN, str(path), json.dumps(shapes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-500:]}"
    return done.stdout.splitlines()
