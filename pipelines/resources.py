"""What the steps' pods ask for: one table of constants, and the function that puts everything on a task.

CPU, memory and GPUs of steps that compute come from a hardware profile (`distillery/profiles.py`) or from pipeline
parameters; `plan` resolves them, so none of them needs an edit here. What KFP takes only as a constant stands in the
table: shared memory, scratch, deadline, caching, and the small pods of steps that compute nothing.

No step has `set_retry`: its deadline of one hour counts from the first start, and as KFP ships it retries neither exit
codes nor lost pods. Steps are resumed instead: submit again, or ask the API to retry the failed run. No step has a
display name: older KFP servers look for a step's outputs under it and fail.
"""

from dataclasses import dataclass
from typing import Any, Dict, List, Optional

from kfp import kubernetes
from kfp.dsl import PipelineTask

MINUTES, HOURS = 60, 3600
PIECES_AT_ONCE = 16
CELLS_AT_ONCE = 8  # pods of a loop; a cluster without room for so many queues them
NO_TOLERATIONS: List[dict] = []
ANY_NODE: Dict[str, str] = {}


@dataclass(frozen=True)
class Need:
    """One step's row. `cpu` and `memory` are "" where a profile or a parameter says them."""

    cpu: str
    memory: str
    shm: str  # /dev/shm, counted against memory; without it a pod has 64 MiB
    scratch: str  # /tmp: caches, downloads, temporary files; a pod that writes more is evicted
    deadline: int  # seconds from the pod's start; ends what hangs (a missing secret, a lost node) as well
    cached: bool  # may KFP reuse the outputs of an equal earlier task?


NEEDS = {
    # plan reads what a URI points to, so equal arguments may mean another experiment; report and verdict cost nothing.
    "plan": Need("1", "2Gi", "64Mi", "4Gi", 30 * MINUTES, cached=False),
    "prepare_data": Need("", "", "1Gi", "400Gi", 24 * HOURS, cached=True),
    "plan_teachers": Need("1", "2Gi", "64Mi", "4Gi", 30 * MINUTES, cached=False),
    "train_teacher": Need("", "", "2Gi", "200Gi", 72 * HOURS, cached=True),
    "gather_teachers": Need("", "", "2Gi", "200Gi", 24 * HOURS, cached=True),
    "synthesize": Need("", "", "2Gi", "200Gi", 72 * HOURS, cached=True),
    "plan_pieces": Need("1", "2Gi", "64Mi", "4Gi", 30 * MINUTES, cached=False),
    "synthesize_piece": Need("", "", "2Gi", "200Gi", 72 * HOURS, cached=True),
    "bundle_pieces": Need("2", "4Gi", "64Mi", "20Gi", 24 * HOURS, cached=True),
    "gather_pieces": Need("", "", "1Gi", "200Gi", 24 * HOURS, cached=True),  # only copies: never a GPU
    "relabel": Need("", "", "1Gi", "20Gi", 24 * HOURS, cached=True),
    "evaluate_student": Need("", "", "2Gi", "200Gi", 72 * HOURS, cached=True),
    "report": Need("1", "4Gi", "64Mi", "20Gi", 2 * HOURS, cached=False),
    "verdict": Need("1", "2Gi", "64Mi", "4Gi", 30 * MINUTES, cached=False),
}

AUTHORITY = "/etc/distillery/s3-ca"  # where the secret with ca.crt is mounted; an empty folder where it is missing
# An arbitrary user has no home of its own, and /tmp is the one place where it may write.
ENVIRONMENT = {
    "HOME": "/tmp",
    "XDG_CACHE_HOME": "/tmp/.cache",
    "TORCH_HOME": "/tmp/.cache/torch",
    "MPLCONFIGDIR": "/tmp/.cache/matplotlib",
    "DISTILLERY_S3_CA": f"{AUTHORITY}/ca.crt",
}
# Keys of the secret, as in KFP's own; each of them may be missing, and so may the secret.
SECRET = {
    "accesskey": "AWS_ACCESS_KEY_ID",
    "secretkey": "AWS_SECRET_ACCESS_KEY",
    "sessiontoken": "AWS_SESSION_TOKEN",
    "region": "AWS_REGION",
}


@dataclass(frozen=True)
class Pods:
    """What all pods of a run have in common; every value is a pipeline parameter."""

    image: Any
    gpu_type: Any  # name of the accelerator resource: nvidia.com/gpu, amd.com/gpu, nvidia.com/mig-1g.10gb
    tolerations: Any
    node_selector: Any
    s3_secret: Any
    s3_ca: Any


def fit(task: PipelineTask, pods: Pods, cpu: Any = "", memory: Any = "", gpus: Optional[Any] = None) -> PipelineTask:
    """Give a task its image, limits, place, volumes, secrets and deadline.

    Args:
        task: a task of one of the components in `NEEDS`.
        pods: what it has in common with the others.
        cpu, memory: parameters (strings) where the table has none.
        gpus: parameter; its value "" asks for none. None: a step that never has one.
    """
    need = NEEDS[task.component_spec.name.replace("-", "_")]
    task.set_container_image(pods.image).set_caching_options(need.cached)
    task.set_cpu_limit(cpu or need.cpu).set_memory_limit(memory or need.memory)
    if gpus is not None:
        task.set_accelerator_type(pods.gpu_type).set_accelerator_limit(gpus)
    for name, value in ENVIRONMENT.items():
        task.set_env_variable(name, value)
    kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=need.shm)
    kubernetes.empty_dir_mount(task, "scratch", "/tmp", size_limit=need.scratch)
    kubernetes.set_timeout(task, need.deadline)
    kubernetes.set_security_context(task, run_as_user=1000, run_as_group=1000, run_as_non_root=True)
    kubernetes.use_secret_as_env(task, pods.s3_secret, SECRET, optional=True)
    kubernetes.use_secret_as_volume(task, pods.s3_ca, AUTHORITY, optional=True)
    kubernetes.add_toleration_json(task, pods.tolerations)
    kubernetes.add_node_selector_json(task, pods.node_selector)
    return task
