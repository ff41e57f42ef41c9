"""`python -m pipelines doctor`: is everything there that a run needs? One line for each thing, with what to do.

command.py    the command, and the checks in their order
kubeflow.py   endpoint, version, token           settings.py   namespace, rights, account, retries, queue
secrets.py    secrets, kfp-launcher              asks.py       what each step of a package asks
nodes.py      is there a node for it             limits.py     quota, limits, shared memory
store.py      the store from here                pod.py        image and store from a pod
case.py       what is examined                   finding.py    one line of the answer
cluster.py    Kubernetes, with a limit on every wait
"""

from pipelines.doctor.command import doctor

__all__ = ["doctor"]
