"""JAX with Ray Train, one process on each node. Not run on a cluster; tested is what it starts.

    export RAY_TRAIN_V2_ENABLED=1
    python recipes/launch/ray_train.py imagenet1k_convnext_tiny /shared/imagenet /shared/runs/tiny

Ray places the processes and starts them again; they find each other by the variables of
`keras.distribution.initialize`. The folder of the run must be the same on all nodes.
Ray: docs.ray.io/en/latest/train/api/api.html, DataParallelTrainer and ray.train.collective
"""

import os
import subprocess
import sys


def train(config):
    import ray
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    address = broadcast_from_rank_zero(ray.util.get_node_ip_address())
    context = get_context()
    variables = {
        "KERAS_BACKEND": "jax",
        "KERAS_DISTRIBUTION_JOB_ADDRESSES": f"{address}:12345",
        "KERAS_DISTRIBUTION_NUM_PROCESSES": str(context.get_world_size()),
        "KERAS_DISTRIBUTION_PROCESS_ID": str(context.get_world_rank()),
    }
    command = ["keras-convnext", "train", config["recipe"], "--data", config["data"], "--out", config["out"]]
    subprocess.run([*command, "--distribute", "data_parallel"], env=os.environ | variables, check=True)


def main(recipe, data, out, num_nodes=4, gpus_per_node=8):
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    DataParallelTrainer(
        train,
        train_loop_config={"recipe": recipe, "data": data, "out": out},
        scaling_config=ScalingConfig(
            num_workers=num_nodes,
            resources_per_worker={"GPU": gpus_per_node, "CPU": 16},
            use_gpu=True,
            placement_strategy="STRICT_SPREAD",
        ),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=10)),
    ).fit()


if __name__ == "__main__":
    main(*sys.argv[1:4])
