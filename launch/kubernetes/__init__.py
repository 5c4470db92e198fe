"""What runs under Kubernetes need: the objects of the API and their options. `launch/backends/kubernetes.py` offers it."""
