"""Prefill of layers that the device does not hold, by way of host memory. run.py is the loop; plan.py says when."""
