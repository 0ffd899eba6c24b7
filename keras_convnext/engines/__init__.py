"""The engines of `distribution`, a module for each backend, and the processes of a run.

base.Engine <-- on_jax, on_tensorflow, on_torch; each joins its processes to a processes.Group
Nothing but `distribution` imports these.
"""
