"""Imports in a child process of limited time and memory."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from builders import tiny_schema
from foreign_models import CLASSES, WIDTH, parsed_model, write_foreign
from onnx import helper

from ensemble_kit import import_onnx
from ensemble_kit.choices import ACTIVATION, FRAME_FORM
from ensemble_kit.data.schema import write_schema
from ensemble_kit.errors import ForeignModelError
from ensemble_kit.foreign import limits
from ensemble_kit.foreign.limits import convert_in_child
from ensemble_kit.foreign.plan import ImportPlan

SCHEMA = tiny_schema(widths={"rgb": WIDTH, "audio": 3}, num_classes=CLASSES, value_type="uint8")
INPUTS = f"float[b, t, {WIDTH}] x"
OUTPUT = f"float[b, {CLASSES}] p"
SECONDS = 5  # the child is ready to read after two


ENDLESS = """
       steps = Constant <value_int = 4611686018427387904> ()
       go = Constant <value = bool {1}> ()
       start = Constant <value_float = 0.0> ()
       v = Loop (steps, go, start) <body = step (int64 i, bool c, float a) => (bool d, float e) {
          d = Identity (c)
          unit = Constant <value_float = 0.0> ()
          e = Add (a, unit)
       }>
"""
SCRIPT = """
import sys
from pathlib import Path
from ensemble_kit import import_onnx
from ensemble_kit.data.schema import read_schema

path, schema = map(Path, sys.argv[1:])
output = path.with_name("f.safetensors")
import_onnx(path, output, schema=read_schema(schema), name="m", inputs={"rgb": "x"})
"""


@pytest.fixture
def message_of(tmp_path):
    def message_of(model, **limit):
        path = tmp_path / "bomb.onnx"
        path.write_bytes(model.SerializeToString())
        plan = ImportPlan(
            model=path,
            output=tmp_path / "foreign.safetensors",
            data_schema=SCHEMA,
            name="m",
            inputs={"rgb": ("x",)},
            num_frames=None,
            is_frame=None,
            probabilities=None,
            frames=FRAME_FORM,
            activation=ACTIVATION,
            lengths=(SCHEMA.max_frames,),
            force=False,
        )
        with pytest.raises(ForeignModelError) as caught:
            convert_in_child(plan, **limit)
        assert list(tmp_path.iterdir()) == [path]
        return str(caught.value).replace(str(path), "PATH")

    return message_of


def probabilities_of(body, values=None):
    """A model whose probabilities are what ``v`` adds to the mean of some zeros."""
    tail = """
       one = Constant <value_ints = [1]> ()
       frames = ReduceMean <axes = [1], keepdims = 0> (x)
       w0 = MatMul (frames, w)
       h = Add (w0, v)
       p = Sigmoid (h)
    """
    matrix = np.zeros((WIDTH, CLASSES), np.float32)
    return parsed_model(INPUTS, body + tail, {"w": matrix, **(values or {})}, 17, OUTPUT)


def test_a_loop_without_end_is_ended(message_of):
    assert message_of(probabilities_of(ENDLESS), seconds=SECONDS) == (
        f"PATH could not be read and tested in {SECONDS} seconds of processor time.\n"
        "Export a model that is smaller or faster."
    )


def test_a_child_that_waits_for_a_busy_machine_is_ended_much_later(
    message_of, tmp_path_factory, monkeypatch
):
    slow = tmp_path_factory.mktemp("slow")
    (slow / "sitecustomize.py").write_text("import time\ntime.sleep(1000)\n")
    monkeypatch.setenv("PYTHONPATH", str(slow))

    assert message_of(probabilities_of(ENDLESS), seconds=1) == (
        "PATH could not be read and tested in 10 seconds.\nTry again when the machine is less busy."
    )


def test_a_process_that_waits_computes_nothing():
    line = "import time; print(flush=True); {}"
    with (
        subprocess.Popen(
            [sys.executable, "-c", line.format("time.sleep(60)")], stdout=subprocess.PIPE
        ) as waiting,
        subprocess.Popen(
            [sys.executable, "-c", line.format("[None for _ in iter(int, 1)]")],
            stdout=subprocess.PIPE,
        ) as computing,
    ):
        waiting.stdout.readline()
        computing.stdout.readline()
        before = limits._computed(waiting.pid)
        end = time.monotonic() + 60

        while limits._computed(computing.pid) < before + 1 and time.monotonic() < end:
            time.sleep(0.05)

        computed = limits._computed(computing.pid), limits._computed(waiting.pid)
        waiting.kill()
        computing.kill()
    assert computed[0] >= before + 1
    assert computed[1] == before


def test_a_constant_of_gigabytes_is_refused(message_of):
    body = """
       shape = Constant <value_ints = [30000, 30000]> ()
       many = ConstantOfShape (shape)
       more = Sqrt (many)
       v = ReduceMax <keepdims = 0> (more)
    """

    message = message_of(probabilities_of(body))

    assert message.startswith("PATH: ONNX Runtime cannot") or "2.0 GiB of memory" in message


def test_functions_that_double_with_each_call_are_ended(message_of):
    model = probabilities_of("z = Constant <value_float = 0.0> ()\n v = Identity (z)\n")
    (index,) = [i for i, node in enumerate(model.graph.node) if node.output[0] == "v"]
    model.graph.node[index].CopyFrom(helper.make_node("f39", ["z"], ["v"], domain="local"))
    model.opset_import.append(helper.make_opsetid("local", 1))
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    for level in range(40):
        inner = f"f{level - 1}" if level else "Identity"
        domain = "local" if level else ""
        nodes = [
            helper.make_node(inner, ["a"], ["b"], domain=domain),
            helper.make_node(inner, ["b"], ["c"], domain=domain),
        ]
        model.functions.append(
            helper.make_function("local", f"f{level}", ["a"], ["c"], nodes, imports)
        )

    assert message_of(model, seconds=SECONDS) in {
        f"PATH could not be read and tested in {SECONDS} seconds of processor time.\n"
        "Export a model that is smaller or faster.",
        "PATH could not be read and tested: the process needed more than 2.0 GiB of memory.\n"
        "Export a smaller model, or the model again from the framework that made it.",
    }


@pytest.mark.parametrize(
    ("code", "noise", "what"),
    [
        (-11, "", "ended with signal SIGSEGV"),
        (-24, "", "took more than 60 seconds of processor time"),
        (-6, "what():  std::bad_alloc", "needed more than 2.0 GiB of memory"),
        (1, "Traceback\nMemoryError", "needed more than 2.0 GiB of memory"),
    ],
)
def test_a_process_that_dies_is_an_error(code, noise, what, tmp_path):
    error = limits._death(tmp_path / "m.onnx", code, noise, 60, 2**31)

    assert str(error) == (
        f"{tmp_path}/m.onnx could not be read and tested: the process {what}.\n"
        "Export a smaller model, or the model again from the framework that made it."
    )


def test_a_mistake_of_the_kit_is_shown_whole(tmp_path):
    error = limits._death(tmp_path / "m.onnx", 1, "Traceback\nKeyError: 3", 60, 2**31)

    assert (type(error), str(error)) == (RuntimeError, "Traceback\nKeyError: 3")


def test_a_file_of_the_current_folder_is_never_executed(tmp_path, monkeypatch):
    (tmp_path / "pickle.py").write_text("open('executed', 'w')")
    (tmp_path / "json.py").write_text("open('executed', 'w')")
    monkeypatch.chdir(tmp_path)
    path = write_foreign(tmp_path / "m.onnx")

    file = import_onnx(
        path,
        tmp_path / "foreign.safetensors",
        schema=SCHEMA,
        name="m",
        inputs={"rgb": "pixels"},
        num_frames="lengths",
        activation="sigmoid",
    )

    assert file.path == tmp_path / "foreign.safetensors"
    assert file.path.is_file()
    assert not (tmp_path / "executed").exists()


def children_of(process):
    """Return the processes that a process has started and that have not ended."""
    listed = Path(f"/proc/{process}/task/{process}/children")
    return [int(each) for each in listed.read_text().split()] if listed.exists() else []


def has_ended(process):
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def wait_until(is_so):
    for _ in range(600):
        if is_so():
            return
        time.sleep(0.1)
    pytest.fail("nothing has happened for a minute")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="/proc lists the children")
def test_the_child_ends_with_its_parent(tmp_path):
    path = tmp_path / "bomb.onnx"
    path.write_bytes(probabilities_of(ENDLESS).SerializeToString())
    write_schema(SCHEMA, tmp_path / "schema.toml", force=False)
    parent = subprocess.Popen([sys.executable, "-c", SCRIPT, path, tmp_path / "schema.toml"])

    wait_until(lambda: children_of(parent.pid))
    (child,) = children_of(parent.pid)
    wait_until(lambda: "onnxruntime" in Path(f"/proc/{child}/maps").read_text())
    parent.kill()
    parent.wait()

    wait_until(lambda: has_ended(child))
