"""The files of recipes/launch start our command with its own options. None was run on a cluster.

The programs that they call are replaced by small ones, which start the command that they are given, on the
second of four hosts; in place of `keras-convnext` a program prints its words and its environment.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

from keras_convnext.cli import main, train
from keras_convnext.training.recipes.classification import ENGINES

FOLDER = pathlib.Path(__file__).parents[2] / "recipes" / "launch"
FILES = sorted(path.name for path in FOLDER.iterdir() if path.is_file())
IN_THE_FIRST_TIER = "slurm_jax.sbatch"
WORDS = ["imagenet1k_convnext_tiny", "/shared/imagenet", "/shared/a run"]
PRINTING = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
PROGRAMS = {
    "keras-convnext": f"exec {sys.executable} -c '{PRINTING}' \"$@\"",
    "scontrol": "printf 'node%d\\n' 1 2 3 4",
    "srun": 'while [[ "$1" == --* ]]; do shift; done; SLURM_PROCID=1 exec "$@"',
    "torchrun": 'while [ "$1" != -m ]; do shift; done; shift 2; exec keras-convnext "$@"',
    "gcloud": 'for word; do case $word in --command=*) exec bash -c "${word#--command=}";; esac; done',
}
RAY = {
    "ray/__init__.py": "from ray import train, util",
    "ray/util.py": "get_node_ip_address = lambda: '10.0.0.2'",
    "ray/train/__init__.py": """
class Context:
    get_world_size = staticmethod(lambda: 4)
    get_world_rank = staticmethod(lambda: 1)
get_context = Context""",
    "ray/train/collective.py": "broadcast_from_rank_zero = lambda value: '10.0.0.1'",
}

pytestmark = pytest.mark.once


def started(path, folder):
    """The words and the environment that `keras-convnext` gets from a launch file."""
    for name, text in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    variables = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[1-4]"}
    variables |= {"SLURM_NNODES": "4", "SLURM_JOB_ID": "7"}
    words = ["bash", path, *(["name", "zone"] if path.name == "cloud_tpu.sh" else []), *WORDS]
    if path.suffix == ".yaml":
        (job,) = yaml.safe_load(path.read_text())["spec"]["replicatedJobs"]
        assert job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] == 4
        (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
        variables |= {entry["name"]: entry.get("value", "1") for entry in container["env"]}
        words = container["command"]
    elif path.suffix == ".py":
        for name, text in RAY.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        variables["PYTHONPATH"] = f"{folder}:{path.parent}"
        config = dict(zip(("recipe", "data", "out"), WORDS, strict=True))
        words = [sys.executable, "-c", f"import ray_train; ray_train.train({config!r})"]
    ended = subprocess.run(
        words, env=os.environ | variables, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == IN_THE_FIRST_TIER else pytest.mark.slow) for name in FILES],
)
def test_a_launch_file_starts_our_command_where_processes_find_each_other(name, tmp_path):
    words, environment = started(FOLDER / name, tmp_path)
    options = main._parser().parse_args(words)
    assert options.run is train.train_command
    assert [options.recipe, options.data] == WORDS[:2]
    assert options.out == (WORDS[2] if not name.endswith(".yaml") else "/shared/runs/tiny")
    backend = environment["KERAS_BACKEND"]
    assert options.distribute is None or ENGINES[options.distribute] == backend == "jax"
    if backend == "tensorflow":
        cluster = {"worker": [f"node{number}:12345" for number in (1, 2, 3, 4)]}
        task = {"type": "worker", "index": 1}
        assert json.loads(environment["TF_CONFIG"]) == {"cluster": cluster, "task": task}
    found = {key: value for key, value in environment.items() if key.startswith("KERAS_DISTRIBUTION_")}
    if name in ("jobset_jax.yaml", "ray_train.py"):
        address = "10.0.0.1:12345" if name == "ray_train.py" else "convnext-workers-0-0.convnext:12345"
        expected = {"JOB_ADDRESSES": address, "NUM_PROCESSES": "4", "PROCESS_ID": "1"}
        assert found == {f"KERAS_DISTRIBUTION_{key}": value for key, value in expected.items()}


@pytest.mark.slow
def test_a_wrong_option_in_a_launch_file_would_be_noticed(tmp_path, capsys):
    path = tmp_path / "slurm.sbatch"
    path.write_text((FOLDER / "slurm_jax.sbatch").read_text().replace("--out", "--output"))
    words, _ = started(path, tmp_path)
    with pytest.raises(SystemExit):
        main._parser().parse_args(words)
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize("name", FILES)
def test_a_launch_file_says_what_was_not_run(name):
    text = (FOLDER / name).read_text()
    assert re.search("Not run on a (cluster|TPU); tested is what it starts", text)
