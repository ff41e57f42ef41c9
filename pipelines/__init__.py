"""The Kubeflow pipeline, its compiled package, and the commands around it."""
